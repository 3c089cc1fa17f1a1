package hotload_test

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// A liteFake is a driver like SQLite's: a connection holds its file, and the
// file's lock if it has written in a transaction, until it is closed and its
// statements and rows are, too. Like lib/pq's and MySQL's it hands out its
// buffer with each row, and overwrites it in whatever closes something.
//
// It fails the test when a connection is closed before its rows and statements,
// or a statement before its rows, or when two calls are made at a time. The one
// exception is a Close of the connection during a call, forceKill's last resort:
// after it, only what it had to leave open may be closed, when the call has
// returned.
type liteFake struct {
	t        testing.TB
	onCall   func(ctx context.Context, c *liteConn, call string) error // may be nil
	rowCount int                                                       // of each result set
	sets     int                                                       // result sets of a query, 1 by default
	heedless bool                                                      // calls succeed although their context has ended
	untidy   bool                                                      // the order of Closes is another test's matter

	mu       sync.Mutex // guards the following fields, and those of what it opened
	files    map[string]int
	writers  map[string]*liteConn
	shut     int // connections closed
	overlaps int // Closes of a connection during a call
}

// A liteCtxFake is a liteFake with DriverContext.
type liteCtxFake struct{ *liteFake }

type liteConnector struct {
	f     *liteFake
	value string
}

// A liteConn is a connection with all that knows contexts; a litePlain is one
// that can prepare and begin and nothing else.
type (
	liteConn struct {
		f          *liteFake
		value      string
		buf        []byte
		calls      []string // in progress
		closed     bool
		lastResort bool // closed during a call
		inTx       bool
		plain      bool                // it knows no contexts
		children   map[*liteChild]bool // open rows and statements
	}
	litePlain struct{ c *liteConn }
)

// A liteChild is rows or a statement.
type liteChild struct {
	c      *liteConn
	name   string
	parent *liteChild // the statement of rows
	// tooLate means that it is a statement of a driver without contexts that
	// came about when its connection was closed.
	tooLate bool
}

func newLite(t testing.TB) *liteFake {
	return &liteFake{t: t, rowCount: 3, sets: 1, files: make(map[string]int), writers: make(map[string]*liteConn)}
}

func (f *liteFake) Open(value string) (driver.Conn, error) {
	c := f.open(value)
	c.plain = true
	return litePlain{c}, nil
}

func (f liteCtxFake) OpenConnector(value string) (driver.Connector, error) {
	return liteConnector{f.liteFake, value}, nil
}

func (c liteConnector) Connect(context.Context) (driver.Conn, error) { return c.f.open(c.value), nil }
func (c liteConnector) Driver() driver.Driver                        { return c.f }

func (f *liteFake) open(value string) *liteConn {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.files[value]++
	return &liteConn{f: f, value: value, buf: make([]byte, 64), children: make(map[*liteChild]bool)}
}

// held counts the connections that hold the file of a value.
func (f *liteFake) held(value string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.files[value]
}

// locked reports whether somebody has the lock of a value's file.
func (f *liteFake) locked(value string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.writers[value] != nil
}

// closed counts the connections that are closed.
func (f *liteFake) closed() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.shut
}

// lastResorts counts the Closes of a connection during a call.
func (f *liteFake) lastResorts() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.overlaps
}

var errLiteClosed = errors.New("fake: the connection is closed")

// call makes a call on the connection, or on one of its children; f.mu is held
// for do.
func (c *liteConn) call(ctx context.Context, child *liteChild, call string, do func() error) error {
	f := c.f
	f.mu.Lock()
	left := child != nil && (c.lastResort || f.untidy) && !child.tooLate && strings.HasPrefix(call, "Close ")
	if c.closed && !left {
		f.t.Errorf("%s on a connection (%s) that is closed", call, c.value)
		f.mu.Unlock()
		return errLiteClosed
	}
	if len(c.calls) > 0 {
		f.t.Errorf("%s during %s on the same connection (%s)", call, c.calls, c.value)
	}
	c.calls = append(c.calls, call)
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		i := slices.Index(c.calls, call)
		c.calls = slices.Delete(c.calls, i, i+1)
	}()
	var err error
	if f.onCall != nil {
		err = f.onCall(ctx, c, call)
	}
	if err == nil && !f.heedless {
		err = ctx.Err()
	}
	if err != nil && !strings.HasPrefix(call, "Close ") { // a Close that fails closes all the same
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if e := do(); e != nil {
		return e // as it is: io.EOF is compared
	}
	return err
}

// overwrite does to the buffer what reading the server's next answer does.
func (c *liteConn) overwrite() {
	for i := range c.buf {
		c.buf[i] = 'X'
	}
}

func (c *liteConn) release() {
	if c.closed && len(c.children) == 0 {
		c.f.files[c.value]--
		if c.f.writers[c.value] == c {
			delete(c.f.writers, c.value)
		}
	}
}

func (c *liteConn) born(name string, parent *liteChild) *liteChild {
	child := &liteChild{c: c, name: name, parent: parent, tooLate: c.closed && c.plain && name != "rows"}
	if !child.tooLate {
		if c.closed && len(c.children) == 0 {
			c.f.files[c.value]++ // it holds the file again
		}
		c.children[child] = true
	}
	return child
}

// Close is also called during another call, as the last resort.
func (c *liteConn) Close() error {
	f := c.f
	if f.onCall != nil {
		f.onCall(context.Background(), c, "Close connection")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if c.closed {
		f.t.Errorf("second Close of a connection (%s)", c.value)
		return nil
	}
	c.closed = true
	f.shut++
	if c.lastResort = len(c.calls) > 0; c.lastResort {
		f.overlaps++
	} else if len(c.children) > 0 && !f.untidy {
		f.t.Errorf("Close of a connection (%s) with %s open", c.value, c.names())
	}
	c.overwrite()
	c.release()
	return nil
}

func (c *liteConn) names() string {
	var names []string
	for child := range c.children {
		names = append(names, child.name)
	}
	slices.Sort(names)
	return strings.Join(names, " and ")
}

// close closes rows or a statement.
func (s *liteChild) close() error {
	return s.c.call(context.Background(), s, "Close "+s.name, func() error {
		if !s.c.children[s] {
			s.c.f.t.Errorf("second Close of %s (%s)", s.name, s.c.value)
			return nil
		}
		for child := range s.c.children {
			if child.parent == s && !s.c.f.untidy {
				s.c.f.t.Errorf("Close of %s under its open %s (%s)", s.name, child.name, s.c.value)
			}
		}
		delete(s.c.children, s)
		s.c.overwrite()
		s.c.release()
		return nil
	})
}

// busyTimeout is how long a writer waits for the lock of a file.
const busyTimeout = 10 * time.Second

// exec runs a statement. One that begins with "write" takes the file's lock.
func (c *liteConn) exec(ctx context.Context, query string) (driver.Result, error) {
	err := c.call(ctx, nil, "Exec "+query, func() error {
		if !strings.HasPrefix(query, "write") {
			return nil
		}
		for end := time.Now().Add(busyTimeout); c.f.writers[c.value] != nil && c.f.writers[c.value] != c; {
			c.f.mu.Unlock()
			time.Sleep(10 * time.Millisecond)
			c.f.mu.Lock()
			switch {
			case c.closed:
				return errLiteClosed
			case ctx.Err() != nil && !c.f.heedless:
				return ctx.Err()
			case time.Now().After(end):
				return fmt.Errorf("fake: file %s is locked", c.value)
			}
		}
		if c.inTx && !c.closed {
			c.f.writers[c.value] = c
		}
		return nil
	})
	return driver.RowsAffected(1), err
}

func (c *liteConn) begin(ctx context.Context) (tx driver.Tx, err error) {
	return liteTx{c}, c.call(ctx, nil, "Begin", func() error {
		c.inTx = true
		return nil
	})
}

type liteTx struct{ c *liteConn }

func (t liteTx) Commit() error   { return t.end("Commit") }
func (t liteTx) Rollback() error { return t.end("Rollback") }

func (t liteTx) end(call string) error {
	return t.c.call(context.Background(), nil, call, func() error {
		if t.c.inTx = false; t.c.f.writers[t.c.value] == t.c {
			delete(t.c.f.writers, t.c.value)
		}
		return nil
	})
}

type liteStmt struct {
	*liteChild
	query string
}

func (c *liteConn) prepare(ctx context.Context, query string) (st *liteStmt, err error) {
	err = c.call(ctx, nil, "Prepare "+query, func() error {
		st = &liteStmt{c.born("statement "+query, nil), query}
		return nil
	})
	return st, err
}

func (s *liteStmt) Close() error  { return s.close() }
func (s *liteStmt) NumInput() int { return strings.Count(s.query, "?") }

func (c *liteConn) rows(ctx context.Context, query string, st *liteChild) (driver.Rows, error) {
	r := &liteRows{ctx: ctx, left: c.f.rowCount}
	err := c.call(ctx, nil, "Query "+query, func() error {
		r.liteChild = c.born("rows", st)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// liteRows have two columns, of which the second tells the row's number. Both
// are parts of the connection's buffer. The query "edges" has empty ones.
type liteRows struct {
	*liteChild
	ctx  context.Context
	set  int
	row  int // that was read last
	left int // of the result set
}

func (r *liteRows) Columns() []string { return []string{"text", "number"} }
func (r *liteRows) Close() error      { return r.close() }

// liteRow is what a row's columns are.
func liteRow(value string, set, row int) (text, number string) {
	return "text of " + value + strings.Repeat("+", row%5), fmt.Sprint(set, ".", row)
}

func (r *liteRows) Next(dest []driver.Value) error {
	return r.c.call(r.ctx, r.liteChild, "Next", func() error {
		if r.left == 0 {
			return io.EOF
		}
		r.left--
		r.row++
		text, number := r.read()
		dest[0], dest[1] = text, number
		return nil
	})
}

// read reads a row into the connection's buffer.
func (r *liteRows) read() (text, number []byte) {
	r.c.overwrite()
	s, n := liteRow(r.c.value, r.set, r.row)
	return r.c.buf[:copy(r.c.buf, s)], r.c.buf[len(s) : len(s)+copy(r.c.buf[len(s):], n)]
}

func (r *liteRows) HasNextResultSet() bool { return r.set+1 < r.c.f.sets }

func (r *liteRows) NextResultSet() error {
	return r.c.call(r.ctx, r.liteChild, "NextResultSet", func() error {
		if r.set+1 >= r.c.f.sets {
			return io.EOF
		}
		r.set++
		r.row, r.left = 0, r.c.f.rowCount
		r.c.overwrite()
		return nil
	})
}

func (c *liteConn) Prepare(query string) (driver.Stmt, error) { panic("PrepareContext is there") }
func (c *liteConn) Begin() (driver.Tx, error)                 { panic("BeginTx is there") }

func (c *liteConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	st, err := c.prepare(ctx, query)
	if err != nil {
		return nil, err
	}
	return liteCtxStmt{st}, nil
}

func (c *liteConn) ResetSession(ctx context.Context) error {
	return c.call(ctx, nil, "ResetSession", func() error { return nil })
}

func (c *liteConn) IsValid() bool {
	return c.call(context.Background(), nil, "IsValid", func() error { return nil }) == nil
}

func (c *liteConn) BeginTx(ctx context.Context, _ driver.TxOptions) (driver.Tx, error) {
	tx, err := c.begin(ctx)
	if err != nil {
		return nil, err
	}
	return tx, nil
}

func (c *liteConn) ExecContext(ctx context.Context, query string, _ []driver.NamedValue) (driver.Result, error) {
	return c.exec(ctx, query)
}

func (c *liteConn) QueryContext(ctx context.Context, query string, _ []driver.NamedValue) (driver.Rows, error) {
	return c.rows(ctx, query, nil)
}

type liteCtxStmt struct{ *liteStmt }

func (s liteCtxStmt) Exec([]driver.Value) (driver.Result, error) { panic("ExecContext is there") }
func (s liteCtxStmt) Query([]driver.Value) (driver.Rows, error)  { panic("QueryContext is there") }

func (s liteCtxStmt) ExecContext(ctx context.Context, _ []driver.NamedValue) (driver.Result, error) {
	return s.c.exec(ctx, s.query)
}

func (s liteCtxStmt) QueryContext(ctx context.Context, _ []driver.NamedValue) (driver.Rows, error) {
	return s.c.rows(ctx, s.query, s.liteChild)
}

func (p litePlain) Close() error { return p.c.Close() }

func (p litePlain) Prepare(query string) (driver.Stmt, error) {
	st, err := p.c.prepare(context.Background(), query)
	if err != nil {
		return nil, err
	}
	return litePlainStmt{st}, nil
}

func (p litePlain) Begin() (driver.Tx, error) {
	tx, err := p.c.begin(context.Background())
	if err != nil {
		return nil, err
	}
	return tx, nil
}

type litePlainStmt struct{ *liteStmt }

func (s litePlainStmt) Exec([]driver.Value) (driver.Result, error) {
	return s.c.exec(context.Background(), s.query)
}

func (s litePlainStmt) Query([]driver.Value) (driver.Rows, error) {
	return s.c.rows(context.Background(), s.query, s.liteChild)
}

// survives runs a test in a process of its own, which a panic in a goroutine of
// hotload's would end.
func survives(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	const child = "HOTLOAD_TEST_CHILD"
	if os.Getenv(child) == t.Name() {
		f(t)
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout="+limit.String())
	cmd.Env = append(os.Environ(), child+"="+t.Name(), "GORACE=atexit_sleep_ms=0")
	out, err := cmd.CombinedOutput()
	if err == nil {
		return
	}
	var seen []string
	last := ""
	for line := range strings.Lines(string(out)) {
		line = strings.TrimRight(line, "\n")
		switch {
		case strings.HasPrefix(line, "=== RUN"):
			last = line
		case strings.HasPrefix(line, "panic: "):
			seen = append(seen, "the process ended in "+strings.Fields(last)[2], line)
		case strings.Contains(line, "--- FAIL") || strings.Contains(line, "_test.go:") && !strings.HasPrefix(line, "\t"):
			seen = append(seen, line)
		}
	}
	t.Errorf("%v:\n%s", err, strings.Join(seen, "\n"))
}
