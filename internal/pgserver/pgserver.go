// Package pgserver starts throwaway PostgreSQL servers for the example and the tests.
//
// A server lives in a temporary directory of its own, listens on a loopback port and on a
// Unix socket, and asks for scram-sha-256 passwords on both. It survives nothing: fsync is
// off, Close removes it, and if the process that created it dies without closing it, a
// watchman (on Unix) does so.
package pgserver

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lib/pq"
)

// ErrNoPrograms is matched by the error of Find, Create and Start when PostgreSQL is not installed.
var ErrNoPrograms = errors.New("PostgreSQL's programs were not found")

// Places are the directories in which Find looks after PATH, as patterns for filepath.Glob
// with a * where the version is.
var Places = []string{
	"/usr/lib/postgresql/*/bin", // Debian, which leaves them out of PATH
	"/usr/pgsql-*/bin",          // Red Hat
	"/opt/homebrew/opt/postgresql*/bin",
	"/usr/local/opt/postgresql*/bin",
	"/Applications/Postgres.app/Contents/Versions/*/bin",
	`C:\Program Files\PostgreSQL\*\bin`,
}

var version = regexp.MustCompile(`\d+(\.\d+)?`)

// Find returns the directory that holds initdb and postgres: on PATH, else the newest in Places.
func Find() (string, error) {
	dirs := filepath.SplitList(os.Getenv("PATH"))
	for _, place := range Places {
		found, _ := filepath.Glob(place) // fails only on a malformed pattern
		newest := func(dir string) float64 {
			n, _ := strconv.ParseFloat(version.FindString(dir[strings.IndexByte(place, '*'):]), 64)
			return -n
		}
		slices.SortFunc(found, func(a, b string) int { return cmp.Compare(newest(a), newest(b)) })
		dirs = append(dirs, found...)
	}
	for _, dir := range dirs {
		if isProgram(dir, "initdb") && isProgram(dir, "postgres") {
			return filepath.Abs(dir)
		}
	}
	return "", fmt.Errorf(`%w: looked for initdb and postgres
  on PATH:  %s
  then in:  %s
To install them:
  Debian, Ubuntu:  apt-get install -y --no-install-recommends postgresql
  elsewhere:       your package manager's postgresql (macOS: brew install postgresql)`,
		ErrNoPrograms, cmp.Or(os.Getenv("PATH"), "(empty)"),
		cmp.Or(strings.Join(Places, "\n            "), "(nowhere else)"))
}

func isProgram(dir, name string) bool {
	if runtime.GOOS == "windows" {
		name += ".exe"
	}
	info, err := os.Stat(filepath.Join(dir, name))
	return err == nil && info.Mode().IsRegular() && (runtime.GOOS == "windows" || info.Mode()&0o111 != 0)
}

// Options say what a server is to be like. The zero value is fine.
type Options struct {
	Name  string            // shows in the directory's name
	Port  int               // on loopback; 0 for a free one
	Users map[string]string // extra users that can log in and create tables: name to password
}

// A Server is a PostgreSQL server that may or may not be running.
// Its methods are not for concurrent use, but for DSN and SocketDSN.
type Server struct {
	programs string // the directory of initdb and postgres
	dir      string // everything the server has
	sockets  string // where its sockets are: dir, unless its path is too long
	port     int
	password string            // of the superuser
	users    map[string]string // not created yet

	running  *exec.Cmd      // nil when stopped
	exited   chan struct{}  // closed when running has been waited for
	watchman io.WriteCloser // is to be told what runs
}

// maxSocketPath is what the path of a Unix socket may have: 103 bytes on macOS, a little more elsewhere.
const maxSocketPath = 103

// Superuser is the role that owns a server. SuperDSN logs in as it.
const Superuser = "postgres"

// Start creates a server and starts it.
func Start(ctx context.Context, opts Options) (*Server, error) {
	s, err := Create(ctx, opts)
	if err != nil {
		return nil, err
	}
	if err := s.Start(ctx); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// Create makes a server and chooses its port, without starting it: connections are refused until then.
func Create(ctx context.Context, opts Options) (_ *Server, err error) {
	programs, err := Find()
	if err != nil {
		return nil, err
	}
	s := &Server{programs: programs, port: opts.Port, password: rand.Text(), users: opts.Users}
	if s.port == 0 {
		if s.port, err = freePort(); err != nil {
			return nil, fmt.Errorf("pgserver: %w", err)
		}
	}
	if s.dir, err = os.MkdirTemp("", "pg-"+opts.Name+"-"); err != nil {
		return nil, fmt.Errorf("pgserver: %w", err)
	}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	s.sockets = s.dir
	if len(filepath.Join(s.dir, ".s.PGSQL.65535")) > maxSocketPath {
		if s.sockets, err = os.MkdirTemp("/tmp", "pg-"); err != nil {
			return nil, fmt.Errorf("pgserver: %s is too long a path for a Unix socket: %w", s.dir, err)
		}
	}
	if s.watchman, err = Watchman(s.dir, s.sockets); err != nil {
		return nil, fmt.Errorf("pgserver: %w", err)
	}
	pwfile := filepath.Join(s.dir, "password")
	if err := os.WriteFile(pwfile, []byte(s.password+"\n"), 0o600); err != nil {
		return nil, fmt.Errorf("pgserver: %w", err)
	}
	initdb := s.command(ctx, "initdb", "-D", s.data(), "-U", Superuser, "--pwfile", pwfile,
		"--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync")
	if err := runAsOther(initdb, s.dir, s.sockets, pwfile); err != nil {
		return nil, fmt.Errorf("pgserver: %w", err)
	}
	var out bytes.Buffer
	initdb.Stdout, initdb.Stderr = &out, &out
	if err = initdb.Start(); err == nil {
		fmt.Fprintln(s.watchman, initdb.Process.Pid)
		err = initdb.Wait()
	}
	if err != nil {
		if errors.Is(err, os.ErrPermission) {
			err = fmt.Errorf("%w: the user it runs as must be able to run it and to enter %s", err, s.dir)
		}
		return nil, fmt.Errorf("pgserver: %s: %w\n%s", initdb.Path, cmp.Or(ctx.Err(), err), bytes.TrimSpace(out.Bytes()))
	}
	fmt.Fprintln(s.watchman)
	return s, os.Remove(pwfile)
}

func (s *Server) data() string { return filepath.Join(s.dir, "data") }
func (s *Server) log() string  { return filepath.Join(s.dir, "log") }

func (s *Server) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(s.programs, name), args...)
	cmd.Dir = s.dir // the other user may not be able to enter the present one
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "PG") && !strings.HasPrefix(kv, "LC_") { // PGPORT, PGOPTIONS and the like
			cmd.Env = append(cmd.Env, kv)
		}
	}
	return cmd
}

// Start starts the server and returns when it answers. A server that was stopped starts again
// on the same port and with the same data.
func (s *Server) Start(ctx context.Context) error {
	log, err := os.Create(s.log())
	if err != nil {
		return fmt.Errorf("pgserver: %w", err)
	}
	defer log.Close()
	// The server must outlive ctx, which is for starting it.
	cmd := s.command(context.Background(), "postgres", "-D", s.data(),
		"-c", "listen_addresses=127.0.0.1", "-c", "port="+strconv.Itoa(s.port),
		"-c", "unix_socket_directories="+s.sockets,
		"-c", "max_connections=200", "-c", "shared_buffers=32MB",
		"-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off",
		"-c", "wal_level=minimal", "-c", "max_wal_senders=0")
	cmd.Stdout, cmd.Stderr = log, log
	if err := runAsOther(cmd); err != nil {
		return fmt.Errorf("pgserver: %w", err)
	}
	detach(cmd)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("pgserver: %w", err)
	}
	s.running, s.exited = cmd, make(chan struct{})
	go func() {
		cmd.Wait()
		close(s.exited)
	}()
	fmt.Fprintln(s.watchman, cmd.Process.Pid)
	if err := s.ready(ctx); err != nil {
		s.Stop()
		out, _ := os.ReadFile(s.log())
		return fmt.Errorf("pgserver: %s: %w\n%s", cmd.Path, err, bytes.TrimSpace(out))
	}
	return nil
}

// ready waits until the server lets the superuser in, and creates the extra users.
func (s *Server) ready(ctx context.Context) error {
	db, err := sql.Open("postgres", s.SuperDSN())
	if err != nil {
		return err
	}
	defer db.Close()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for db.PingContext(ctx) != nil {
		select {
		case <-tick.C:
		case <-s.exited:
			return fmt.Errorf("ended at once: %v", s.running.ProcessState)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for user, password := range s.users {
		if _, err := db.ExecContext(ctx, "CREATE ROLE "+pq.QuoteIdentifier(user)+
			" LOGIN PASSWORD "+pq.QuoteLiteral(password)); err != nil {
			return err
		}
	}
	s.users = nil
	_, err = db.ExecContext(ctx, "GRANT ALL ON SCHEMA public TO PUBLIC")
	return err
}

// Stop ends the server, a paused one too, and keeps its data: its clients see their
// connections closed, and new ones refused.
func (s *Server) Stop() error {
	if s.running == nil {
		return nil
	}
	s.Resume()
	process := s.running.Process
	if err := process.Signal(os.Interrupt); err != nil { // "fast shutdown"; Windows cannot
		process.Kill()
	}
	var err error
	select {
	case <-s.exited:
	case <-time.After(10 * time.Second):
		err = errors.New("pgserver: postgres did not end when asked to, and was killed")
		process.Kill()
		<-s.exited
	}
	fmt.Fprintln(s.watchman)
	s.running = nil
	return err
}

// Close stops the server and removes its directory.
func (s *Server) Close() error {
	err := errors.Join(s.Stop(), os.RemoveAll(s.dir), os.RemoveAll(s.sockets))
	if s.watchman != nil {
		s.watchman.Close()
	}
	return err
}

// Pause freezes the server and all its backends, as a host that hangs would: connections
// stay open, new ones are taken by the kernel, and nothing answers. Unix only.
func (s *Server) Pause() error { return s.signalAll(pause) }

// Resume lets a paused server go on.
func (s *Server) Resume() error { return s.signalAll(resume) }

// Port is where the server listens, or will, on 127.0.0.1.
func (s *Server) Port() int { return s.port }

// DSN is the connection string, as lib/pq reads it, for a user of the database "postgres" over TCP.
func (s *Server) DSN(user, password string) string {
	return s.dsn("127.0.0.1", user, password)
}

// SocketDSN is DSN over the Unix socket.
func (s *Server) SocketDSN(user, password string) string {
	return s.dsn(s.sockets, user, password)
}

// SuperDSN is DSN for the superuser.
func (s *Server) SuperDSN() string { return s.DSN(Superuser, s.password) }

// SuperSocketDSN is SocketDSN for the superuser.
func (s *Server) SuperSocketDSN() string { return s.SocketDSN(Superuser, s.password) }

func (s *Server) dsn(host, user, password string) string {
	quote := strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace
	return fmt.Sprintf("host='%s' port=%d user='%s' password='%s' dbname=postgres sslmode=disable",
		quote(host), s.port, quote(user), quote(password))
}

// freePort returns a loopback port on which nobody listens. It stays below the ports that
// kernels hand out for outgoing connections, so that none of those takes it meanwhile.
func freePort() (int, error) {
	var err error
	for range 100 {
		var b [2]byte
		rand.Read(b[:])
		port := 10_000 + (int(b[0])<<8|int(b[1]))%20_000
		var l net.Listener
		if l, err = net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
			return port, l.Close()
		}
	}
	return 0, fmt.Errorf("no free port found: %w", err)
}
