//go:build !linux

package fsnotify_test

import "errors"

func mkfifo(string) error { return errors.ErrUnsupported }

func inotifyFDs() []string { return nil }
