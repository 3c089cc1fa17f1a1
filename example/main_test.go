package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/infobloxopen/hotload/internal/pgserver"
	"github.com/lib/pq"
)

// TestMain is the example itself when a test starts this binary again as one.
func TestMain(m *testing.M) {
	if os.Getenv("HOTLOAD_TEST_AS_EXAMPLE") == "1" {
		main()
	}
	os.Exit(m.Run())
}

const label = "hotload_example_test"

// servers returns blue and green, as the example starts them, with their tables.
func servers(t *testing.T) (blue, green *server) {
	t.Helper()
	start := func(name string) *server {
		s, err := startServer(t.Context(), name, label)
		if err != nil {
			pgserver.Missing(t, err)
		}
		t.Cleanup(s.close)
		if err := s.createTable(t.Context(), label); err != nil {
			t.Fatal(err)
		}
		return s
	}
	return start("blue"), start("green")
}

// number asks a server, not through hotload.
func number(t *testing.T, s *server, query string, args ...any) (n int) {
	t.Helper()
	if err := s.admin.QueryRowContext(t.Context(), query, args...).Scan(&n); err != nil {
		t.Fatalf("%s: %s: %v", s.name, query, err)
	}
	return n
}

// TestStory is the demonstration from end to end, a little faster, and its facts asked of the servers.
func TestStory(t *testing.T) {
	blue, green := servers(t)
	file := filepath.Join(t.TempDir(), "config.txt")
	if err := os.WriteFile(file, []byte(blue.value), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s", &out)
		}
	})
	opts := options{duration: 6 * time.Second, workers: 8}
	r, err := play(t.Context(), opts, demo{label: label, blue: blue, green: green, file: file}, &out)
	if err != nil {
		t.Fatal(err)
	}

	for _, err := range r.errors {
		t.Errorf("an operation failed: %v", err)
	}
	if !r.ok() {
		t.Errorf("%d lost, %d doubled, %d unknown, %d connections open", r.lost, r.doubled, r.unknown, r.open)
	}
	total := 0
	for _, s := range []*server{blue, green} {
		n := number(t, s, "SELECT count(*) FROM "+label+" WHERE n > 0")
		if n == 0 || n != r.rows[s.name] {
			t.Errorf("%s has %d rows, and the report says %d", s.name, n, r.rows[s.name])
		}
		if distinct := number(t, s, "SELECT count(DISTINCT n) FROM "+label+" WHERE n > 0"); distinct != n {
			t.Errorf("%s has %d rows, and %d of them twice", s.name, n, n-distinct)
		}
		if n := number(t, s, "SELECT count(*) FROM pg_stat_activity WHERE usename IN ($1, $2)", firstUser, secondUser); n != 0 {
			t.Errorf("the pool is closed, and %s still has %d of its connections", s.name, n)
		}
		total += n
	}
	if total != r.written {
		t.Errorf("the client saw %d rows written, and the servers have %d", r.written, total)
	}

	if n := number(t, green, "SELECT count(*) FROM pg_roles WHERE rolname = $1", firstUser); n != 0 {
		t.Errorf("green still has user %s", firstUser)
	}

	if len(r.changes) != len(steps) {
		t.Fatalf("%d changes reported, want %d", len(r.changes), len(steps))
	}
	for i, c := range r.changes {
		if c.title != steps[i].title {
			t.Errorf("change %d is %q, want %q", i+1, c.title, steps[i].title)
		}
		if c.note == "" && (c.first <= 0 || c.left <= 0) {
			t.Errorf("%s: the first operation at the new place after %v, the last connection gone after %v; want both measured", c.title, c.first, c.left)
		}
	}
	text := out.String()
	for generation := range 5 {
		if !strings.Contains(text, valueAccepted+"  generation="+string(rune('1'+generation))) {
			t.Errorf("the timeline does not show that generation %d was accepted", generation+1)
		}
	}
	for _, secret := range []string{blue.value, green.value} {
		cfg, err := pq.NewConfig(secret)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(text, cfg.Password) {
			t.Errorf("a password is on the timeline")
		}
	}
	rows := regexp.MustCompile(`(?m)^ *[0-9.]+s( +[0-9-]+){5}`).FindAllString(text, -1)
	if drawn, want := len(rows), int(opts.duration/rowEvery)/2; drawn < want {
		t.Errorf("%d rows drawn, want at least %d", drawn, want)
	}
}

func TestReconcile(t *testing.T) {
	blue, green := servers(t)
	for s, numbers := range map[*server]string{
		blue:  "(1), (2), (5), (5)",
		green: "(2), (3), (9)",
	} {
		if _, err := s.admin.ExecContext(t.Context(), "INSERT INTO "+label+" (n) VALUES "+numbers); err != nil {
			t.Fatal(err)
		}
	}
	d := demo{label: label, blue: blue, green: green, load: &load{written: []int64{1, 2, 3, 4, 5}}}
	r, err := d.reconcile()
	if err != nil {
		t.Fatal(err)
	}
	if r.lost != 1 || r.doubled != 2 || r.unknown != 1 {
		t.Errorf("%d lost, %d doubled, %d unknown; want 1 (4), 2 (2 and 5), 1 (9)", r.lost, r.doubled, r.unknown)
	}
	if r.ok() {
		t.Error("and the report says that all is well")
	}
	for _, bad := range []report{{errors: []error{io.EOF}}, {lost: 1}, {doubled: 1}, {unknown: 1}, {open: 1}} {
		if bad.ok() {
			t.Errorf("%+v is said to be well", bad)
		}
	}
}

// TestOwnServers has two databases on one server, which is all that a person may have.
func TestOwnServers(t *testing.T) {
	const user, password = "me", "my p@ss'word"
	own := pgserver.ForTest(t, pgserver.Options{Users: map[string]string{user: password}})
	blue := own.DSN(user, password)
	s, err := ownServer(t.Context(), "blue", own.SuperDSN(), label)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if _, err := s.admin.ExecContext(t.Context(), "CREATE DATABASE other OWNER "+user); err != nil {
		t.Fatal(err)
	}
	u := url.URL{Scheme: "postgres", User: url.UserPassword(user, password), Path: "other", RawQuery: "sslmode=disable",
		Host: fmt.Sprintf("127.0.0.1:%d", own.Port())}
	green := u.String()
	var out, errOut bytes.Buffer
	args := []string{"-duration", "2s", "-blue", blue, "-green", green}
	status := run(t.Context(), args, &out, &errOut)
	if status != 0 {
		t.Fatalf("exit status %d\n%s\n%s", status, &errOut, &out)
	}
	for _, dsn := range []string{blue, green} {
		s, err := ownServer(t.Context(), "blue", dsn, label)
		if err != nil {
			t.Fatal(err)
		}
		if n := number(t, s, "SELECT count(*) FROM pg_tables WHERE tablename LIKE 'hotload%'"); n != 0 {
			t.Errorf("%d tables were left", n)
		}
		s.close()
	}
	if text := out.String(); strings.Contains(text, "p@ss") || strings.Contains(text, "p%40ss") {
		t.Error("a person's password is on the timeline")
	}

	errOut.Reset()
	status = run(t.Context(), []string{"-blue", green, "-green", green}, &out, &errOut)
	if want := "same database"; status != 1 || !strings.Contains(errOut.String(), want) {
		t.Errorf("green and green: exit status %d and %q, want 1 and %q", status, &errOut, want)
	}

	ctx, interrupt := context.WithCancel(t.Context())
	interrupt()
	errOut.Reset()
	status = run(ctx, args, &out, &errOut)
	if got, want := errOut.String(), "example: interrupted\n"; status != 130 || got != want {
		t.Errorf("interrupted: exit status %d and %q, want 130 and %q", status, got, want)
	}
}

// TestConfig is a person who pastes the first command that the example shows, then interrupts.
func TestConfig(t *testing.T) {
	if _, err := pgserver.Find(); err != nil {
		pgserver.Missing(t, err)
	}
	if runtime.GOOS == "windows" {
		t.Skip("the command is for a Unix shell")
	}
	file := filepath.Join(t.TempDir(), "my config.txt")
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	reader, writer := io.Pipe()
	var errOut bytes.Buffer
	status := make(chan int)
	go func() {
		s := run(ctx, []string{"-config", file}, writer, &errOut)
		writer.Close()
		status <- s
	}()
	row := regexp.MustCompile(`^ +\d+\.\ds `)
	var command string
	var pasted, accepted bool
	var text strings.Builder
	for lines := bufio.NewScanner(reader); lines.Scan(); {
		line := lines.Text()
		text.WriteString(line + "\n")
		switch {
		case command == "" && strings.HasPrefix(line, "  echo "):
			command = line
		case !pasted && row.MatchString(line): // the load is under way
			pasted = true
			if out, err := exec.CommandContext(ctx, "/bin/sh", "-c", command).CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", command, err, out)
				interrupt()
			}
		case strings.Contains(line, valueAccepted+"  generation=2"):
			accepted = true
		case strings.Contains(line, generationDrained):
			interrupt()
		}
	}
	if s := <-status; s != 0 || !accepted {
		t.Errorf("exit status %d, and that the new value was accepted was seen: %v\n%s\n%s", s, accepted, &errOut, &text)
	}
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file is still there: %v", err)
	}
}

func TestInterrupt(t *testing.T) {
	if _, err := pgserver.Find(); err != nil {
		pgserver.Missing(t, err)
	}
	if runtime.GOOS == "windows" {
		t.Skip("a process cannot be interrupted on Windows")
	}
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			tmp := t.TempDir()
			if err := os.Chmod(filepath.Dir(tmp), 0o755); err != nil { // the servers' user passes here
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-duration", "1m")
			cmd.Env = append(os.Environ(), "HOTLOAD_TEST_AS_EXAMPLE=1", "TMPDIR="+tmp)
			var errOut bytes.Buffer
			cmd.Stderr = &errOut
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			interrupted := false
			for lines := bufio.NewScanner(out); lines.Scan(); {
				if !interrupted && strings.Contains(lines.Text(), firstUser) {
					interrupted = true
					cmd.Process.Signal(sig)
				}
			}
			cmd.Wait()
			if status := cmd.ProcessState.ExitCode(); status != 130 || !interrupted {
				t.Errorf("exit status %d, want 130\n%s", status, &errOut)
			}
			left, err := os.ReadDir(tmp)
			if err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

func TestExitStatus(t *testing.T) {
	exists := filepath.Join(t.TempDir(), "config.txt")
	if err := os.WriteFile(exists, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	const nobody = "host=127.0.0.1 port=1 user=nobody password=S3CRET sslmode=disable"
	for _, tt := range []struct {
		name   string
		args   []string
		hidden bool // PostgreSQL's programs
		status int
		says   []string
	}{
		{name: "help", args: []string{"-help"}, status: 0, says: []string{"-config", "-duration"}},
		{name: "unknown flag", args: []string{"-blu"}, status: 2, says: []string{"-blu"}},
		{name: "argument", args: []string{"blue"}, status: 2, says: []string{`"blue"`}},
		{name: "one server", args: []string{"-blue", nobody}, status: 2, says: []string{"-green"}},
		{name: "no workers", args: []string{"-workers", "0"}, status: 2, says: []string{"-workers"}},
		{name: "more workers than connections", args: []string{"-workers", "250"}, status: 2, says: []string{"250", "at most 90"}},
		{name: "no PostgreSQL", hidden: true, status: 2,
			says: []string{"initdb", "PATH", "/nowhere/*/bin", "apt-get install -y postgresql", "your package manager's postgresql"}},
		{name: "own servers need no programs", args: []string{"-blue", nobody, "-green", nobody}, hidden: true,
			status: 1, says: []string{"-blue", "refused"}},
		{name: "a file that exists", args: []string{"-config", exists}, status: 1, says: []string{exists, "does not exist"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.hidden {
				places := pgserver.Places
				t.Cleanup(func() { pgserver.Places = places })
				pgserver.Places = []string{"/nowhere/*/bin"}
				t.Setenv("PATH", "")
			}
			var out, errOut bytes.Buffer
			if status := run(t.Context(), tt.args, &out, &errOut); status != tt.status {
				t.Errorf("exit status %d, want %d", status, tt.status)
			}
			for _, part := range tt.says {
				if !strings.Contains(errOut.String(), part) {
					t.Errorf("it does not say %q:\n%s", part, &errOut)
				}
			}
			if strings.Contains(errOut.String(), "S3CRET") {
				t.Errorf("it tells the password:\n%s", &errOut)
			}
		})
	}
	if content, err := os.ReadFile(exists); string(content) != "precious" {
		t.Errorf("the person's file is now %q, %v", content, err)
	}
}

func TestTimelineFits(t *testing.T) {
	for _, n := range []int{0, 1, 7, 8, 100, 1000} {
		if got := utf8.RuneCountInString(bar(n, 100, barWidth)); got != barWidth {
			t.Errorf("a bar for %d of 100 is %d wide, want %d", n, got, barWidth)
		}
	}
	busy := row{
		at:       99900 * time.Millisecond,
		ops:      map[string]int{"blue": 1234, "green": 1234},
		open:     map[string]int{"blue": 100, "green": 100},
		users:    []string{firstUser, secondUser},
		failures: 12,
	}
	const logged = valueRefused + "  reason=probe  error_type=*net.OpError  errno=connection refused"
	var out strings.Builder
	if (&timeline{out: &out}).log(logged); out.String() != "       log: "+logged+"\n" {
		t.Errorf("where the output is no terminal, a log line is broken or cut: %q", &out)
	}
	for _, bars := range []bool{false, true} {
		out.Reset()
		tl := &timeline{bars: bars, full: 200, out: &out}
		dsn := "fsnotify://postgres/tmp/hotload-example-4294967295/config.txt?probe=true"
		tl.intro(&demo{blue: &server{throwaway: &pgserver.Server{}}, green: &server{}}, dsn, options{})
		tl.intro(&demo{blue: &server{}, green: &server{}}, dsn, options{})
		tl.intro(&demo{blue: &server{}, green: &server{}, label: label}, dsn, options{config: "config.txt"})
		for _, s := range steps {
			tl.heading("1. " + s.title)
		}
		tl.println(tl.row(busy))
		tl.println(tl.row(row{}))
		if bars {
			tl.log(logged)
			words := func(s string) string { return strings.Join(strings.Fields(s), " ") }
			if !strings.Contains(words(out.String()), words(logged)) {
				t.Errorf("hotload logged %q, and the timeline does not show it all:\n%s", logged, &out)
			}
		}
		tl.summary(&report{changes: []change{{title: steps[0].title, first: time.Second, left: time.Second}}})
		for line := range strings.Lines(out.String()) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > columns {
				t.Errorf("%d columns, want at most %d: %q", n, columns, line)
			}
		}
	}
}
