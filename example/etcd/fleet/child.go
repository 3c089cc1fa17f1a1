package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/infobloxopen/hotload/example/etcd/internal/throwaway"
)

// childEnv is the environment variable that makes this program a child, with its configuration.
const childEnv = "HOTLOAD_FLEET_CHILD"

// A childConfig says what a child is to be.
type childConfig struct {
	Role string // etcd or program
	Dir  string // of etcd; removed by the children if the parent dies

	Port int // of etcd, if it had one

	// Of a program:
	Endpoint   string
	Pools      int
	PostgreSQL bool
}

// A message is what a child tells its parent, as a line of JSON.
type message struct {
	Port int `json:",omitempty"` // etcd answers there

	// Since the last such message:
	Operations, Failures int
	Failure              string    `json:",omitempty"` // the first
	Arrivals             []arrival `json:",omitempty"`
	InForce              []arrival `json:",omitempty"` // of whichever pool
}

// An arrival is the first operation of a pool on a change.
type arrival struct {
	Pool, Change int
	At           time.Time
}

// A child is a process of this program. It ends when its parent says so, with a line on its
// standard input, and when its parent dies, which ends its standard input.
type child struct {
	stdin  io.WriteCloser
	exited chan struct{}
	cmd    *exec.Cmd
	ending chan struct{}
}

// startChild starts a child. What it says goes to heard. If it ends before it is told to, that
// is a failure.
func startChild(fail func(error), cfg childConfig, heard func(message)) (*child, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	role, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	c := &child{cmd: exec.Command(program), exited: make(chan struct{}), ending: make(chan struct{})}
	c.cmd.Env = append(os.Environ(), childEnv+"="+string(role))
	c.cmd.Stderr = os.Stderr
	if c.stdin, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(c.exited)
		for lines := json.NewDecoder(stdout); ; {
			var m message
			if err := lines.Decode(&m); err != nil {
				break
			}
			heard(m)
		}
		err := c.cmd.Wait()
		select {
		case <-c.ending:
		default:
			fail(fmt.Errorf("the %s process %d ended: %v", cfg.Role, c.cmd.Process.Pid, c.cmd.ProcessState))
			return
		}
		if err != nil {
			fail(fmt.Errorf("the %s process %d: %w", cfg.Role, c.cmd.Process.Pid, err))
		}
	}()
	return c, nil
}

// end ends a child, and returns when it is gone and has been heard to its end.
func (c *child) end() {
	select { // it may have been told already
	case <-c.ending:
	default:
		close(c.ending)
		io.WriteString(c.stdin, "end\n")
	}
	select {
	case <-c.exited:
	case <-time.After(10 * time.Second):
		c.cmd.Process.Kill()
		<-c.exited
	}
}

// beChild is main in a child.
func beChild(role string) {
	var cfg childConfig
	if err := json.Unmarshal([]byte(role), &cfg); err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", childEnv, "is not for people")
		os.Exit(2)
	}
	// Ctrl-C in a terminal goes to all processes; it is the parent that ends the others.
	signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	ctx, end := context.WithCancel(context.Background())
	go func() {
		stdin := bufio.NewReader(os.Stdin)
		for {
			if _, err := stdin.ReadString('\n'); err != nil { // the parent is gone
				for range 100 { // etcd may be writing there
					if os.RemoveAll(cfg.Dir) == nil {
						break
					}
					time.Sleep(10 * time.Millisecond)
				}
				os.Exit(1)
			}
			end()
		}
	}()
	tell := json.NewEncoder(os.Stdout)
	var err error
	switch cfg.Role {
	case "etcd":
		err = beEtcd(ctx, cfg, tell)
	case "program":
		err = beProgram(ctx, cfg, tell)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		os.Exit(1)
	}
}

// A server is etcd, in a child.
type server struct {
	*child
	port int
}

// startEtcd returns when the server answers.
func startEtcd(ctx context.Context, fail func(error), dir string, port int) (*server, error) {
	ready := make(chan int, 1)
	c, err := startChild(fail, childConfig{Role: "etcd", Dir: dir, Port: port}, func(m message) { ready <- m.Port })
	if err != nil {
		return nil, err
	}
	s := &server{child: c}
	select {
	case s.port = <-ready:
		return s, nil
	case <-c.exited:
		err = errors.New("etcd did not start")
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	c.end()
	return nil, err
}

// beEtcd runs etcd until the process is told to end. Then it just ends, as in a crash.
func beEtcd(ctx context.Context, cfg childConfig, tell *json.Encoder) error {
	port := cfg.Port
	var err error
	for range 20 {
		if cfg.Port == 0 {
			// Below the ports that kernels hand out for outgoing connections: one of those could
			// have it when etcd is started again.
			port = 10_000 + rand.N(20_000)
		}
		if _, err = throwaway.Start(ctx, throwaway.Config(cfg.Dir, port)); err == nil {
			tell.Encode(message{Port: port})
			<-ctx.Done()
			return nil
		}
	}
	return err
}
