//go:build !linux

package fsnotify_test

import (
	"errors"
	"testing"
	"time"
)

func mkfifo(string) error { return errors.ErrUnsupported }

func inotifyFDs() []string { return nil }

func cpuTime(tb testing.TB) time.Duration {
	tb.Skip("not measured on this system")
	return 0
}
