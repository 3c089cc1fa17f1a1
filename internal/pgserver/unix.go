//go:build unix

package pgserver

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"syscall"
)

const (
	pause  = syscall.SIGSTOP
	resume = syscall.SIGCONT
)

// runAsOther makes cmd run as user postgres or nobody if this process is root, whom
// PostgreSQL's programs refuse, and gives that user the files.
func runAsOther(cmd *exec.Cmd, files ...string) error {
	if os.Getuid() != 0 {
		return nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		if u, err = user.Lookup("nobody"); err != nil {
			return fmt.Errorf("PostgreSQL does not run as root, and there is no other user to run it as: %w", err)
		}
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return err
	}
	for _, file := range files {
		if err := os.Chown(file, int(uid), int(gid)); err != nil {
			return err
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	return nil
}

// detach keeps the terminal's signals from cmd: an interrupt is for this process, which
// stops its servers when it no longer needs them.
func detach(cmd *exec.Cmd) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
}

// Watchman starts a process that removes files and directories when this process has died
// without closing what is returned, and first ends the process whose number was last written to
// it, a line each and an empty one for none. It notices by the end of a pipe, which the kernel
// closes however a process dies.
func Watchman(paths ...string) (io.WriteCloser, error) {
	// initdb leaves a child behind, which may still write when rm first tries.
	const script = `pid=
while read -r line; do pid=$line; done
n=0
if [ -n "$pid" ]; then
	kill -CONT "$pid"; kill -QUIT "$pid"
	while kill -0 "$pid" && [ $n -lt 100 ]; do n=$((n+1)); sleep 0.1; done
fi
until rm -rf "$@" || [ $n -ge 200 ]; do n=$((n+1)); sleep 0.1; done`
	cmd := exec.Command("/bin/sh", append([]string{"-c", script, "watchman"}, paths...)...)
	detach(cmd)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return struct {
		io.Writer
		io.Closer
	}{stdin, closer(func() error {
		cmd.Process.Kill() // before Wait closes the pipe, which it would take for our death
		cmd.Wait()
		return nil
	})}, nil
}

type closer func() error

func (c closer) Close() error { return c() }

// signalAll signals the server, so that one that is to stop forks no more, and then its
// backends, which are not in its process group.
func (s *Server) signalAll(sig syscall.Signal) error {
	if s.running == nil {
		return errors.New("pgserver: the server is not running")
	}
	pid := s.running.Process.Pid
	if err := syscall.Kill(pid, sig); err != nil {
		return fmt.Errorf("pgserver: %w", err)
	}
	backends, err := children(pid)
	for _, backend := range backends {
		syscall.Kill(backend, sig) // it may have ended by itself
	}
	return err
}

func children(pid int) (pids []int, err error) {
	if out, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid)); err == nil {
		for field := range strings.FieldsSeq(string(out)) {
			child, _ := strconv.Atoi(field)
			pids = append(pids, child)
		}
		return pids, nil
	}
	out, err := exec.Command("ps", "-A", "-o", "pid=,ppid=").Output()
	if err != nil {
		return nil, fmt.Errorf("pgserver: listing the server's backends: ps: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		var child, parent int
		if fmt.Sscan(line, &child, &parent); parent == pid {
			pids = append(pids, child)
		}
	}
	return pids, nil
}
