package pgserver_test

import (
	"context"
	"database/sql"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/infobloxopen/hotload/internal/pgserver"
	"github.com/lib/pq"
)

func open(t *testing.T, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func TestServer(t *testing.T) {
	const password = `it's a \ p%40ss`
	s := pgserver.ForTest(t, pgserver.Options{Users: map[string]string{"o'neil \\": password}})
	ctx := t.Context()

	for name, dsn := range map[string]string{
		"TCP":            s.DSN("o'neil \\", password),
		"socket":         s.SocketDSN("o'neil \\", password),
		"superuser":      s.SuperDSN(),
		"superuser here": s.SuperSocketDSN(),
	} {
		var n int
		if err := open(t, dsn).QueryRowContext(ctx, "SELECT 1").Scan(&n); err != nil || n != 1 {
			t.Errorf("%s: SELECT 1 = %d, %v", name, n, err)
		}
	}
	for name, dsn := range map[string]string{
		"TCP":    s.DSN("o'neil \\", "wrong"),
		"socket": s.SocketDSN("o'neil \\", "wrong"),
	} {
		err := open(t, dsn).PingContext(ctx)
		if pqErr := (*pq.Error)(nil); !errors.As(err, &pqErr) || pqErr.SQLState() != "28P01" {
			t.Errorf("%s: a wrong password answers %v, want SQLSTATE 28P01", name, err)
		}
	}

	db := open(t, s.DSN("o'neil \\", password))
	if _, err := db.ExecContext(ctx, "CREATE TABLE t AS SELECT 7 AS n"); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := db.PingContext(ctx); err == nil {
		t.Error("a stopped server answers")
	}
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	var n int
	if err := db.QueryRowContext(ctx, "SELECT n FROM t").Scan(&n); err != nil || n != 7 {
		t.Errorf("after a restart: SELECT n = %d, %v; want 7", n, err)
	}
}

func TestPause(t *testing.T) {
	s := pgserver.ForTest(t, pgserver.Options{})
	db := open(t, s.SuperDSN())
	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := s.Pause(); err != nil {
		t.Skip(err)
	}
	answer := make(chan error, 2)
	go func() {
		_, err := conn.ExecContext(context.Background(), "SELECT 1")
		answer <- err
	}()
	go func() { answer <- db.PingContext(context.Background()) }() // on a new connection
	select {
	case err := <-answer:
		t.Errorf("a paused server answers: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	if err := s.Resume(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-answer; err != nil {
			t.Errorf("after it was resumed: %v", err)
		}
	}
	// Cleanup then shows that a paused server can be closed.
	if err := s.Pause(); err != nil {
		t.Fatal(err)
	}
}

// longTempDir returns a directory that the server's user can enter, and whose path is too long for a Unix socket.
func longTempDir(t *testing.T) string {
	t.Helper()
	tmp := t.TempDir()
	if err := os.Chmod(filepath.Dir(tmp), 0o755); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(tmp, strings.Repeat("long", 25))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// gone tells whether the directory of the socket that a connection string names was removed.
func gone(t *testing.T, dsn string) bool {
	t.Helper()
	host := regexp.MustCompile(`host='(/.*?)'`).FindStringSubmatch(dsn)
	if host == nil {
		t.Fatalf("no directory in the connection string %s", dsn)
	}
	_, err := os.Stat(host[1])
	return errors.Is(err, os.ErrNotExist)
}

func TestLongTempDir(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("the place for sockets with a short path is /tmp")
	}
	t.Setenv("TMPDIR", longTempDir(t))
	s := pgserver.ForTest(t, pgserver.Options{})
	if err := open(t, s.SuperSocketDSN()).PingContext(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if !gone(t, s.SuperSocketDSN()) {
		t.Error("the server is closed, and the directory of its socket is still there")
	}
}

func TestForbiddenTempDir(t *testing.T) {
	if _, err := pgserver.Find(); err != nil {
		pgserver.Missing(t, err)
	}
	if os.Getuid() != 0 {
		t.Skip("only root starts servers as another user, who may be kept out")
	}
	tmp := filepath.Join(t.TempDir(), "private")
	if err := os.Mkdir(tmp, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", tmp)
	s, err := pgserver.Create(t.Context(), pgserver.Options{})
	if err == nil {
		s.Close()
	}
	if want := "to enter " + tmp; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Create: %v; want an error that says %q", err, want)
	}
}

// TestWatchman starts this test binary again as a process that starts a server and is killed.
func TestWatchman(t *testing.T) {
	if os.Getenv("PGSERVER_ORPHAN") == "1" {
		s := pgserver.ForTest(t, pgserver.Options{})
		os.Stdout.WriteString(s.SuperSocketDSN())
		os.Stdout.Close()
		select {}
	}
	if _, err := pgserver.Find(); err != nil {
		pgserver.Missing(t, err)
	}
	if runtime.GOOS == "windows" {
		t.Skip("there is no watchman on Windows")
	}
	tmp := longTempDir(t)
	orphan := func() (kill func(), out io.Reader) {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestWatchman$")
		cmd.Env = append(os.Environ(), "PGSERVER_ORPHAN=1", "TMPDIR="+tmp)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return func() {
			cmd.Process.Kill()
			cmd.Wait()
		}, out
	}
	files := func(pattern string) []string {
		found, _ := filepath.Glob(filepath.Join(tmp, pattern)) // fails only on a malformed pattern
		return found
	}
	await := func(what string, done func() bool) {
		t.Helper()
		for deadline := time.Now().Add(15 * time.Second); !done(); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("not within 15 s: %s; there are %v", what, files("*"))
			}
		}
	}

	kill, _ := orphan()
	await("initdb is at work", func() bool { return len(files("*/data/*")) > 0 })
	kill()
	await("initdb's work is removed", func() bool { return len(files("*")) == 0 })

	kill, out := orphan()
	dsn, err := io.ReadAll(out)
	if err != nil {
		t.Fatal(err)
	}
	db := open(t, string(dsn))
	if err := db.PingContext(t.Context()); err != nil {
		t.Fatalf("%s: %v", dsn, err)
	}
	kill()
	await("the server's directories are removed", func() bool { return len(files("*")) == 0 && gone(t, string(dsn)) })
	if err := db.PingContext(t.Context()); err == nil {
		t.Error("the process was killed, and its server still answers")
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	install := func(version string) string {
		bin := filepath.Join(dir, version, "bin")
		if err := os.MkdirAll(bin, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"initdb", "postgres", "initdb.exe", "postgres.exe"} {
			if err := os.WriteFile(filepath.Join(bin, name), nil, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		return bin
	}
	places := pgserver.Places
	t.Cleanup(func() { pgserver.Places = places })
	pgserver.Places = []string{filepath.Join(dir, "*", "bin")}
	t.Setenv("PATH", t.TempDir())

	_, err := pgserver.Find()
	if !errors.Is(err, pgserver.ErrNoPrograms) {
		t.Fatalf("nothing installed: %v, want ErrNoPrograms", err)
	}
	for _, part := range []string{os.Getenv("PATH"), pgserver.Places[0], "apt-get install -y --no-install-recommends postgresql"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("the error does not tell %q:\n%v", part, err)
		}
	}
	install("9.6")
	newest := install("17")
	install("15")
	if got, err := pgserver.Find(); got != newest {
		t.Errorf("Find() = %s, %v; want the newest, %s", got, err, newest)
	}
	onPath := install("path")
	t.Setenv("PATH", onPath)
	if got, err := pgserver.Find(); got != onPath {
		t.Errorf("Find() = %s, %v; want the one on PATH, %s", got, err, onPath)
	}
}
