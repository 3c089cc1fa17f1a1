//go:build !unix

package pgserver

import (
	"errors"
	"io"
	"os/exec"
)

const (
	pause = iota
	resume
)

func runAsOther(*exec.Cmd, ...string) error { return nil }

func detach(*exec.Cmd) {}

// Watchman is on Unix only.
func Watchman(...string) (io.WriteCloser, error) {
	return struct {
		io.Writer
		io.Closer
	}{io.Discard, io.NopCloser(nil)}, nil
}

func (s *Server) signalAll(int) error {
	return errors.New("pgserver: a server cannot be paused on this system")
}
