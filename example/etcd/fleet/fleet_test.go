package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/infobloxopen/hotload/internal/pgserver"
)

// TestMain is the demonstration, or one of its children, when a test starts this binary again as one.
func TestMain(m *testing.M) {
	if os.Getenv("HOTLOAD_TEST_AS_FLEET") == "1" || os.Getenv(childEnv) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// TestStory is the demonstration from end to end, a little smaller, with etcd killed in the middle.
func TestStory(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	out, errs := new(output), new(output)
	status := run(t.Context(), strings.Fields("-processes 2 -pools 5 -duration 2s -outage 500ms"), out, errs)
	text := out.String()
	if status != 0 || errs.String() != "" {
		t.Fatalf("exit status %d, want 0\n%s%s", status, errs, text)
	}
	for _, want := range []string{
		`(?m)^10 pools in 2 processes follow one key of etcd`,
		`(?m)^ +\d+\.\ds +\d+ +0  ▒{20} 10 #1 green \d\.\d\ds$`,
		`(?m)^ +\d+\.\ds +\d+ +0  █{20} 10 #2 blue \d\.\d\ds$`,
		`── etcd is killed`, `── etcd is back`, `── the last pool is on it, \d`,
		`(?m)^  it is in force, in any pool +\d+\.\d ms +\d+\.\d ms +\d+\.\d ms$`,
		`(?m)^  it is in force, in the last pool +\d`,
		`(?m)^  the first operation on it, in any pool +\d`,
		`(?m)^  the first operation on it, in the last pool +\d`,
		`(?m)^[1-9]\d+ operations, 0 errors$`,
	} {
		if !regexp.MustCompile(want).MatchString(text) {
			t.Errorf("nothing in the output matches %s:\n%s", want, text)
		}
	}
	nothingLeft(t)
}

// TestPostgreSQL moves the pools between two real servers.
func TestPostgreSQL(t *testing.T) {
	args := strings.Fields("-processes 2 -pools 5 -duration 1s")
	for _, name := range []string{"blue", "green"} {
		server := pgserver.ForTest(t, pgserver.Options{Name: "hotload-" + name})
		args = append(args, "-dsn", server.SuperDSN()+" application_name={change}")
	}
	t.Setenv("TMPDIR", t.TempDir())
	out, errs := new(output), new(output)
	if status := run(t.Context(), args, out, errs); status != 0 || !strings.Contains(out.String(), " 0 errors") {
		t.Fatalf("exit status %d, want 0\n%s%s", status, errs, out)
	}
	nothingLeft(t)
}

// TestRefused holds the exit statuses, and that what cannot work is said.
func TestRefused(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	const nowhere = "host=127.0.0.1 port=1 sslmode=disable application_name={change}"
	for _, tt := range []struct {
		args   []string
		status int
		want   string
	}{
		{[]string{"-help"}, 0, "-outage"},
		{[]string{"-pools", "0"}, 2, "-pools must be at least 1"},
		{[]string{"now"}, 2, `unexpected argument "now"`},
		{[]string{"-dsn", "host=db1"}, 2, "want one with application_name={change}"},
		{[]string{"-dsn", nowhere}, 2, "want two servers"},
		{[]string{"-dsn", nowhere, "-dsn", nowhere}, 1, "a pool's first operation failed: "},
	} {
		out, errs := new(output), new(output)
		if status := run(t.Context(), tt.args, out, errs); status != tt.status || !strings.Contains(errs.String(), tt.want) {
			t.Errorf("%q: want exit status %d and %q, have %d and %s", tt.args, tt.status, tt.want, status, errs)
		}
	}
	nothingLeft(t)
}

// TestFailure holds that one failed operation is the exit status, and is told.
func TestFailure(t *testing.T) {
	out := new(output)
	f := newFleet(options{processes: 1, pools: 1}, out, nil)
	now := time.Now()
	f.puts, f.taken = []time.Time{now, now}, []time.Time{now, now}
	f.inForce = [][]time.Time{{now}, {now}}
	f.heard(0, message{Operations: 9, Arrivals: []arrival{{0, 1, now}, {0, 2, now.Add(time.Millisecond)}}})
	if !f.summary() {
		t.Error("nothing failed, and the summary is not well")
	}
	f.heard(0, message{Operations: 1, Failures: 1, Failure: "no such table"})
	if f.summary() {
		t.Error("an operation failed, and all is well")
	}
	if text := out.String(); !strings.Contains(text, "10 operations, 1 errors\nthe first error: no such table\n") {
		t.Errorf("the error is not told:\n%s", text)
	}
}

// TestLeavesNothing holds that no process and no file is left, whatever ends the demonstration.
func TestLeavesNothing(t *testing.T) {
	for _, tt := range []struct {
		name   string
		when   string // is in the output
		end    func(t *testing.T, p *os.Process)
		status int
		want   string // on standard error
	}{
		{"interrupted", " #3 ", interrupt, 130, "interrupted"},
		{"interrupted while etcd is killed", "etcd is killed", interrupt, 130, "interrupted"},
		{"killed", " #3 ", kill, -1, ""},
		{"killed while etcd is killed", "etcd is killed", kill, -1, ""},
		{"a program dies", " #3 ", func(t *testing.T, p *os.Process) { kill(t, childOf(t, p, "program")) }, 1, "the program process"},
		{"etcd dies", " #3 ", func(t *testing.T, p *os.Process) { kill(t, childOf(t, p, "etcd")) }, 1, "the etcd process"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("TMPDIR", t.TempDir())
			t.Setenv("HOTLOAD_TEST_AS_FLEET", "1")
			cmd := exec.Command(os.Args[0], strings.Fields("-processes 2 -pools 5 -duration 2s -outage 1m")...)
			stdout, errs := new(output), new(output)
			cmd.Stdout = stdout
			// All processes have this pipe, so it ends when the last of them does.
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			cmd.Stderr = w
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			w.Close()
			gone := make(chan struct{})
			go func() {
				defer close(gone)
				io.Copy(errs, r)
			}()
			for deadline := time.Now().Add(time.Minute); !strings.Contains(stdout.String(), tt.when); time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					cmd.Process.Kill()
					t.Fatalf("waited a minute for %q in\n%s%s", tt.when, stdout, errs)
				}
			}
			tt.end(t, cmd.Process)
			cmd.Wait()
			select {
			case <-gone:
			case <-time.After(time.Minute):
				t.Fatal("a process is left after a minute")
			}
			if status := cmd.ProcessState.ExitCode(); status != tt.status || !strings.Contains(errs.String(), tt.want) {
				t.Errorf("want exit status %d and %q, have %d and %s", tt.status, tt.want, status, errs)
			}
			nothingLeft(t)
		})
	}
}

func interrupt(t *testing.T, p *os.Process) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows cannot interrupt another process")
	}
	p.Signal(os.Interrupt)
}

func kill(t *testing.T, p *os.Process) { p.Kill() }

// childOf finds a child of p in a role.
func childOf(t *testing.T, p *os.Process, role string) *os.Process {
	if runtime.GOOS != "linux" {
		t.Skip("finds a process by /proc")
	}
	children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range children {
		pids, _ := os.ReadFile(file) // a thread may have ended
		for pid := range strings.FieldsSeq(string(pids)) {
			env, _ := os.ReadFile("/proc/" + pid + "/environ")
			if n, err := strconv.Atoi(pid); err == nil && bytes.Contains(env, []byte(`"Role":"`+role+`"`)) {
				child, err := os.FindProcess(n)
				if err != nil {
					t.Fatal(err)
				}
				return child
			}
		}
	}
	t.Fatalf("no child is the %s", role)
	return nil
}

func nothingLeft(t *testing.T) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(os.TempDir(), "hotload-fleet-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left in the temporary directory: %v, %v", left, err)
	}
}

// TestInterruptedEarly holds the same for an interruption at any moment of the start.
func TestInterruptedEarly(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	for _, after := range []time.Duration{0, 20, 50, 100, 200} {
		ctx, cancel := context.WithTimeout(t.Context(), after*time.Millisecond)
		out, errs := new(output), new(output)
		if status := run(ctx, strings.Fields("-processes 2 -pools 5 -duration 1m"), out, errs); status != 130 {
			t.Errorf("after %v: exit status %d, want 130\n%s", after*time.Millisecond, status, errs)
		}
		cancel()
	}
	nothingLeft(t)
}

// output keeps what is written to it.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}
