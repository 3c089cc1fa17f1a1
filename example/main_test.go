package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
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
	checkScreen(t, text)
}

// checkScreen reads a story as a sceptic does: from top to bottom, taking each line at its word.
func checkScreen(t *testing.T, text string) {
	t.Helper()
	drawn, latest, lastRow := 0, -1.0, -1.0
	moved := false        // to green, for the first time
	var user, gone string // who has left which server
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		at, err := strconv.ParseFloat(strings.TrimSuffix(fields[0], "s"), 64)
		if err != nil || !strings.HasSuffix(fields[0], "s") {
			continue
		}
		if at < latest {
			t.Errorf("what is from %.2f is below what is from %.2f: %q", at, latest, line)
		}
		latest = at
		switch fields[1] {
		case "log:":
		case "──":
			if left := regexp.MustCompile(`the last connection of (\w+) has left (\w+)`).FindStringSubmatch(line); left != nil {
				user, gone = left[1], left[2]
			} else if !strings.Contains(line, "dropped") { // the file is changed
				user, gone = "", ""
				moved = moved || strings.Contains(line, "green")
			}
		default:
			if drawn++; at <= lastRow {
				t.Errorf("two rows begin at %.2f: %q", at, line)
			}
			lastRow = at
			ops := map[string]string{"blue": fields[1], "green": fields[3]}
			if !moved && ops["green"] != "0" {
				t.Errorf("operations on green before the file has ever said so: %q", line)
			}
			users := fields[min(6, len(fields)-1)]
			if gone != "" && ops[gone] != "0" && strings.Contains(users, user) {
				t.Errorf("%s has left %s, and below that is %q", user, gone, line)
			}
		}
	}
	if !moved || drawn < 20 {
		t.Errorf("%d rows drawn, and a move to green is told: %v; want at least 20 and true", drawn, moved)
	}
}

// TestMark shows that the file is changed between two rows, not within one.
func TestMark(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		tl := newTimeline(&out, 8)
		go tl.mark("change")
		synctest.Wait()
		if out.Len() > 0 {
			t.Errorf("within a row: %q", &out)
		}
		time.Sleep(rowEvery)
		tl.cut()
		tl.over <- struct{}{}
		synctest.Wait()
		if want := "  0.10s ── change\n"; out.String() != want {
			t.Errorf("when the row is over: %q, want %q", &out, want)
		}
	})
}

// TestNews has the rows and events of a timeline as they come, and those that are to be seen.
func TestNews(t *testing.T) {
	var out strings.Builder
	tl := newTimeline(&out, 8)
	steady := row{ops: map[string]int{"blue": 200}, open: map[string]int{"blue": 8, "green": 0}, users: []string{firstUser}}
	draw := func(tenth int, change func(*row)) {
		r := steady
		r.at = time.Duration(tenth) * rowEvery
		r.ops = maps.Clone(r.ops)
		change(&r)
		tl.draw(r)
	}
	same := func(*row) {}
	for tenth := range 30 {
		draw(tenth, same)
	}
	draw(30, func(r *row) { r.events = []string{"an event"} })
	for tenth := 31; tenth < 50; tenth++ {
		draw(tenth, same)
	}
	draw(50, func(r *row) { r.ops["blue"] = 20 })
	draw(51, same)
	var seen []string
	for line := range strings.Lines(out.String()) {
		seen = append(seen, regexp.MustCompile(`\S+`).FindString(line))
	}
	want := "0.00s 0.10s 0.20s 1.20s 2.20s 2.90s 3.00s an 3.10s 3.20s 4.20s 4.90s 5.00s 5.10s"
	if got := strings.Join(seen, " "); got != want {
		t.Errorf("seen are %s\n    want %s", got, want)
	}
	for name, change := range map[string]func(*row){
		"an error":        func(r *row) { r.failures = 1 },
		"another user":    func(r *row) { r.users = []string{secondUser} },
		"a connection":    func(r *row) { r.open = map[string]int{"blue": 8, "green": 1} },
		"another server":  func(r *row) { r.ops["green"] = 1 },
		"a pause":         func(r *row) { r.ops["blue"] = 99 },
		"the end of one":  func(r *row) { r.ops["blue"] = 401 },
		"it is not there": func(r *row) { r.open = map[string]int{"blue": 8} },
	} {
		r := steady
		r.ops = maps.Clone(r.ops)
		if change(&r); !r.news(steady) {
			t.Errorf("%s is no news", name)
		}
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
	t.Run("throwaway servers", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "my config.txt")
		paste(t, file)
		if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the file is still there: %v", err)
		}
	})
	t.Run("own servers", func(t *testing.T) {
		blue, green := servers(t)
		file := filepath.Join(t.TempDir(), "config.txt")
		if err := os.WriteFile(file, []byte(blue.value), 0o600); err != nil {
			t.Fatal(err)
		}
		paste(t, file, "-blue", blue.value, "-green", green.value)
		if content, err := os.ReadFile(file); !strings.HasPrefix(string(content), green.value) {
			t.Errorf("the file is left as %q, %v; want what was pasted", content, err)
		}
	})
}

func paste(t *testing.T, file string, args ...string) {
	t.Helper()
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	reader, writer := io.Pipe()
	var errOut bytes.Buffer
	status := make(chan int)
	go func() {
		s := run(ctx, append(args, "-config", file), writer, &errOut)
		writer.Close()
		status <- s
	}()
	row := regexp.MustCompile(`^ *\d+\.\d\ds +\d+ +(\S+) +\d+ +(\S+) `) // with the open connections
	var command string
	var pasted, accepted, counted bool
	var text strings.Builder
	for lines := bufio.NewScanner(reader); lines.Scan(); {
		line := lines.Text()
		text.WriteString(line + "\n")
		switch {
		case command == "" && strings.HasPrefix(line, "  cp "):
			command = line
		case !pasted && row.MatchString(line) && strings.Contains(line, firstUser): // the load is under way
			pasted = true
			if out, err := exec.CommandContext(ctx, "/bin/sh", "-c", command).CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", command, err, out)
				interrupt()
			}
		case strings.Contains(line, valueAccepted+"  generation=2"):
			accepted = true
		case strings.Contains(line, generationDrained):
			interrupt()
		default:
			open := row.FindStringSubmatch(line)
			counted = counted || open != nil && open[2] != "-" && open[2] != "0"
		}
	}
	if s := <-status; s != 0 || !accepted || !counted {
		t.Errorf("exit status %d; seen that the new value was accepted: %v, connections on green: %v\n%s\n%s", s, accepted, counted, &errOut, &text)
	}
	if strings.Contains(text.String(), "password") {
		t.Errorf("a password is on the timeline:\n%s", &text)
	}
}

func TestInterrupt(t *testing.T) {
	if _, err := pgserver.Find(); err != nil {
		pgserver.Missing(t, err)
	}
	if runtime.GOOS == "windows" {
		t.Skip("a process cannot be interrupted on Windows")
	}
	for _, tt := range []struct {
		name    string
		signals []os.Signal
		status  int
	}{
		{"interrupt", []os.Signal{os.Interrupt}, 130},
		{"terminate", []os.Signal{syscall.SIGTERM}, 130},
		{"hang up", []os.Signal{syscall.SIGHUP}, 130},
		{"kill", []os.Signal{os.Kill}, -1},
		{"interrupt again and again", slices.Repeat([]os.Signal{os.Interrupt}, 20), -1},
	} {
		t.Run(tt.name, func(t *testing.T) {
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
					for _, sig := range tt.signals {
						cmd.Process.Signal(sig)
						time.Sleep(5 * time.Millisecond)
					}
				}
			}
			cmd.Wait()
			if status := cmd.ProcessState.ExitCode(); status != tt.status || !interrupted {
				t.Errorf("exit status %d, want %d\n%s", status, tt.status, &errOut)
			}
			left, err := os.ReadDir(tmp)
			// A process that was killed leaves it to the watchmen.
			for deadline := time.Now().Add(15 * time.Second); tt.status == -1 && len(left) > 0 && time.Now().Before(deadline); {
				time.Sleep(20 * time.Millisecond)
				left, err = os.ReadDir(tmp)
			}
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
		{name: "help", args: []string{"-help"}, status: 0, says: []string{"counted against", "does not exist", "Exit status", "-duration"}},
		{name: "unknown flag", args: []string{"-blu"}, status: 2, says: []string{"-blu"}},
		{name: "argument", args: []string{"blue"}, status: 2, says: []string{`"blue"`}},
		{name: "one server", args: []string{"-blue", nobody}, status: 2, says: []string{"-green"}},
		{name: "no workers", args: []string{"-workers", "0"}, status: 2, says: []string{"-workers"}},
		{name: "more workers than connections", args: []string{"-workers", "250"}, status: 2, says: []string{"250", "at most 90"}},
		{name: "no PostgreSQL", hidden: true, status: 2,
			says: []string{"initdb", "PATH", "/nowhere/*/bin", "apt-get install -y --no-install-recommends postgresql", "your package manager's postgresql"}},
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
		if got := utf8.RuneCountInString(bar(n, 100, 17)); got != 17 {
			t.Errorf("a bar for %d of 100 is %d wide, want 17", n, got)
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
	if got, want := (&timeline{}).event(0, dim, "log:", logged), "  0.00s log: "+logged; got != want {
		t.Errorf("where the output is no terminal, a log line is %q, want %q", got, want)
	}
	over := make(chan struct{})
	close(over)
	for _, width := range []int{0, 60, 80, 120} {
		out.Reset()
		tl := &timeline{width: width, full: 200, out: &out, over: over}
		dsn := "fsnotify://postgres/tmp/config.txt?probe=true" // a longer word cannot be broken
		tl.intro(&demo{blue: &server{throwaway: &pgserver.Server{}}, green: &server{}}, dsn, options{})
		tl.intro(&demo{blue: &server{}, green: &server{}}, dsn, options{})
		tl.intro(&demo{blue: &server{}, green: &server{}, label: label}, dsn, options{config: "config.txt"})
		for _, s := range steps {
			tl.heading("1. " + s.title)
		}
		tl.println(tl.row(busy))
		tl.println(tl.row(row{}))
		tl.log(logged)
		tl.summary(&report{changes: []change{{title: steps[0].title, first: time.Second, left: time.Second}}})
		words := func(s string) string { return strings.Join(strings.Fields(s), " ") }
		if !strings.Contains(words(out.String()), words(logged)) {
			t.Errorf("hotload logged %q, and the timeline does not show it all:\n%s", logged, &out)
		}
		for line := range strings.Lines(out.String()) {
			n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n"))
			if width > 0 && n > width && !strings.HasPrefix(line, "  cp ") { // what is to be pasted is not broken
				t.Errorf("%d columns, want at most %d: %q", n, width, line)
			}
		}
	}
}
