package hotload_test

import (
	"bytes"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/infobloxopen/hotload"
	"github.com/lib/pq"
)

// limit is how long a test waits for what must happen: long enough for the
// slowest machine, as only a failing test waits it out.
const limit = 30 * time.Second

// A source is a strategy whose values the test sets.
type source struct {
	mu      sync.Mutex // guards value
	value   string
	values  chan string // unbuffered: who has sent twice knows that the first was taken up
	watches atomic.Int32
}

var names atomic.Int32

// register registers a driver and a strategy under a name that no other test
// has, and returns the data source name for them.
func register(d driver.Driver, s hotload.Strategy) string {
	name := fmt.Sprintf("test%d", names.Add(1))
	hotload.Register(name, d)
	hotload.RegisterStrategy(name, s)
	return name + "://" + name + "/path"
}

func newSource(value string) *source {
	return &source{value: value, values: make(chan string)}
}

// open opens a sql.DB on a driver and a source. Options, such as
// "forceKill=true", may be empty.
func open(t testing.TB, d driver.Driver, s hotload.Strategy, options string) *sql.DB {
	t.Helper()
	db, err := sql.Open("hotload", register(d, s)+"?"+options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func (s *source) Watch(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
	s.watches.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	values := make(chan string)
	go func() {
		defer close(values)
		for {
			select {
			case <-ctx.Done():
				return
			case v := <-s.values:
				select {
				case <-ctx.Done():
					return
				case values <- v:
				}
			}
		}
	}()
	return s.value, values, nil
}

// set delivers a value and returns when hotload has taken it up: the next
// values are received only then, and an equal one is no change.
func (s *source) set(value string) {
	s.mu.Lock()
	s.value = value
	s.mu.Unlock()
	for range 3 { // the goroutine of Watch holds one, hotload takes up another
		s.values <- value
	}
}

// A watchFunc is a Strategy.
type watchFunc func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error)

func (f watchFunc) Watch(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
	return f(ctx, pth, options)
}

// A fake is a driver that polices how it is used: two calls on a connection at
// a time, a call after Close and a second Close fail the test. Its hooks may
// be nil; they run within the call that they are named after.
type fake struct {
	t         testing.TB
	onOpen    func(ctx context.Context, value string) error // ctx is Background without DriverContext
	onClose   func(c *fakeConn)
	onShut    func(value string) // Close of a connector
	onCall    func(ctx context.Context, c *fakeConn, call string) error
	rowCount  int         // of each query
	forgiving bool        // rows, transactions and statements may be ended twice, as most drivers have it
	heedless  bool        // calls do what they were asked to although their context has ended
	lenient   atomic.Bool // a Close during a call is allowed: forceKill's last resort

	// What database/sql gets for what the fake makes; nil: the thing itself.
	asConn func(*fakeConn) driver.Conn
	asRows func(*fakeRows) driver.Rows

	opened, closed atomic.Int64
	dialing        atomic.Int64 // Opens and Connects in progress
	maxDialing     atomic.Int64
	maxLive        atomic.Int64
	mu             sync.Mutex // guards the following fields
	conns          map[*fakeConn]bool
	shut           []string // the values of the connectors that are closed
}

// A ctxFake is a fake with DriverContext, whose connectors are io.Closers. A
// value that begins with "bad" is refused.
type ctxFake struct{ *fake }

type fakeConnector struct {
	f      *fake
	value  string
	closed bool // guarded by f.mu
}

func newFake(t testing.TB) *fake {
	return &fake{t: t, conns: make(map[*fakeConn]bool)}
}

func (f *fake) Open(value string) (driver.Conn, error) { return f.dial(context.Background(), value) }

func (f ctxFake) OpenConnector(value string) (driver.Connector, error) {
	if strings.HasPrefix(value, "bad") {
		return nil, fmt.Errorf("fake: cannot parse %q", value)
	}
	return &fakeConnector{f: f.fake, value: value}, nil
}

func (c *fakeConnector) Driver() driver.Driver { return c.f }

func (c *fakeConnector) Connect(ctx context.Context) (driver.Conn, error) {
	c.f.mu.Lock()
	if c.closed && !c.f.lenient.Load() {
		c.f.t.Errorf("Connect of a connector (%s) that is closed", c.value)
	}
	c.f.mu.Unlock()
	return c.f.dial(ctx, c.value)
}

func (c *fakeConnector) Close() error {
	if c.f.onShut != nil {
		c.f.onShut(c.value)
	}
	c.f.mu.Lock()
	defer c.f.mu.Unlock()
	if c.closed {
		c.f.t.Errorf("second Close of a connector (%s)", c.value)
	}
	c.closed = true
	c.f.shut = append(c.f.shut, c.value)
	return nil
}

// connectorsClosed returns the values of the connectors that are closed, in
// that order.
func (f *fake) connectorsClosed() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.shut, " ")
}

func (f *fake) dial(ctx context.Context, value string) (driver.Conn, error) {
	raise(&f.maxDialing, f.dialing.Add(1))
	defer f.dialing.Add(-1)
	if f.onOpen != nil {
		if err := f.onOpen(ctx, value); err != nil {
			return nil, err
		}
	}
	c := &fakeConn{f: f, value: value}
	f.opened.Add(1)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.conns[c] = true
	raise(&f.maxLive, int64(len(f.conns)))
	if f.asConn != nil {
		return f.asConn(c), nil
	}
	return c, nil
}

// The hooks of a fake, for one call on connections with one value; an empty one is
// any. A call that ends with a space is all that begin so.

func onOpen(value string, do func(ctx context.Context) error) func(context.Context, string) error {
	return func(ctx context.Context, v string) error {
		if v != value {
			return nil
		}
		return do(ctx)
	}
}

// firstOpen is onOpen for the first dial alone.
func firstOpen(value string, do func() error) func(context.Context, string) error {
	var dials atomic.Int64
	return onOpen(value, func(context.Context) error {
		if dials.Add(1) > 1 {
			return nil
		}
		return do()
	})
}

func onClose(value string, do func()) func(*fakeConn) {
	return func(c *fakeConn) {
		if c.value == value {
			do()
		}
	}
}

func onCall(value, call string, do func(ctx context.Context) error) func(context.Context, *fakeConn, string) error {
	return func(ctx context.Context, c *fakeConn, have string) error {
		if value != "" && value != c.value || have != call && !(strings.HasSuffix(call, " ") && strings.HasPrefix(have, call)) {
			return nil
		}
		return do(ctx)
	}
}

// lasts is for hooks: something takes a while.
func lasts(d time.Duration) func(context.Context) error {
	return func(context.Context) error { time.Sleep(d); return nil }
}

func raise(high *atomic.Int64, n int64) {
	for old := high.Load(); n > old && !high.CompareAndSwap(old, n); old = high.Load() {
	}
}

// live returns the values of the connections that are open.
func (f *fake) live() (values []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.conns {
		values = append(values, c.value)
	}
	slices.Sort(values)
	return values
}

// liveOn counts the open connections with a value.
func (f *fake) liveOn(value string) (n int) {
	for _, v := range f.live() {
		if v == value {
			n++
		}
	}
	return n
}

type fakeConn struct {
	f     *fake
	value string
	calls atomic.Int32 // in progress
	shut  atomic.Bool
	stmts atomic.Int32 // open
	inTx  bool
}

// call polices a call, and runs the hook.
func (c *fakeConn) call(ctx context.Context, call string) error {
	if c.shut.Load() {
		if c.f.lenient.Load() && strings.HasPrefix(call, "Close ") {
			return nil // rows and statements that the last resort had to leave
		}
		c.f.t.Errorf("%s on a connection (%s) that is closed", call, c.value)
		return errors.New("fake: closed")
	}
	if c.calls.Add(1) > 1 {
		c.f.t.Errorf("%s during another call on the same connection (%s)", call, c.value)
	}
	defer c.calls.Add(-1)
	if c.f.onCall != nil {
		if err := c.f.onCall(ctx, c, call); err != nil {
			return err
		}
	}
	if c.f.heedless {
		return nil
	}
	return ctx.Err()
}

func (c *fakeConn) Close() error {
	if c.shut.Swap(true) {
		c.f.t.Errorf("second Close of a connection (%s)", c.value)
		return nil
	}
	if c.calls.Load() != 0 && !c.f.lenient.Load() {
		c.f.t.Errorf("Close of a connection (%s) during a call", c.value)
	}
	if n := c.stmts.Load(); n != 0 && !c.f.lenient.Load() {
		c.f.t.Errorf("Close of a connection (%s) with %d prepared statements open", c.value, n)
	}
	if c.f.onClose != nil {
		c.f.onClose(c)
	}
	c.f.closed.Add(1)
	c.f.mu.Lock()
	defer c.f.mu.Unlock()
	delete(c.f.conns, c)
	return nil
}

// A special is an argument that only the fake's own checker accepts.
type special struct{ s string }

func (c *fakeConn) CheckNamedValue(nv *driver.NamedValue) error {
	if err := c.call(context.Background(), "CheckNamedValue"); err != nil {
		return err
	}
	if s, ok := nv.Value.(special); ok {
		nv.Value = s.s
		return nil
	}
	return driver.ErrSkip
}

func (c *fakeConn) Ping(ctx context.Context) error         { return c.call(ctx, "Ping") }
func (c *fakeConn) ResetSession(ctx context.Context) error { return c.call(ctx, "ResetSession") }
func (c *fakeConn) IsValid() bool                          { return c.call(context.Background(), "IsValid") == nil }

func (c *fakeConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	if err := c.call(ctx, "Exec "+query); err != nil {
		return nil, err
	}
	c.check(args)
	return fakeResult{c}, nil
}

func (c *fakeConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	if err := c.call(ctx, "Query "+query); err != nil {
		return nil, err
	}
	c.check(args)
	rows := &fakeRows{c: c, ctx: ctx, left: max(1, c.f.rowCount)}
	if c.f.asRows != nil {
		return c.f.asRows(rows), nil
	}
	return rows, nil
}

// A fakeResult has the number of the value that it came about on.
type fakeResult struct{ c *fakeConn }

func (r fakeResult) LastInsertId() (int64, error) { return strconv.ParseInt(r.c.value, 10, 64) }
func (r fakeResult) RowsAffected() (int64, error) { return 1, nil }

// check finds arguments that were not converted, or not numbered.
func (c *fakeConn) check(args []driver.NamedValue) {
	for i, arg := range args {
		if arg.Ordinal != i+1 {
			c.f.t.Errorf("argument %d has number %d", i+1, arg.Ordinal)
		}
		if !driver.IsValue(arg.Value) {
			c.f.t.Errorf("argument %d is a %T: not converted", arg.Ordinal, arg.Value)
		}
	}
}

func (c *fakeConn) Begin() (driver.Tx, error) { panic("BeginTx is there") }

func (c *fakeConn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	if err := c.call(ctx, "Begin"); err != nil {
		return nil, err
	}
	c.inTx = true
	return fakeTx{c}, nil
}

type fakeTx struct{ c *fakeConn }

func (t fakeTx) Commit() error   { return t.end("Commit") }
func (t fakeTx) Rollback() error { return t.end("Rollback") }

func (t fakeTx) end(call string) error {
	if !t.c.inTx && t.c.f.forgiving {
		return sql.ErrTxDone
	}
	if !t.c.inTx {
		t.c.f.t.Errorf("%s without a transaction", call)
	}
	t.c.inTx = false
	return t.c.call(context.Background(), call)
}

func (c *fakeConn) Prepare(query string) (driver.Stmt, error) { panic("PrepareContext is there") }

func (c *fakeConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	if err := c.call(ctx, "Prepare "+query); err != nil {
		return nil, err
	}
	c.stmts.Add(1)
	return &fakeStmt{c: c, query: query}, nil
}

// A fakeStmt takes as many arguments as its query has question marks.
type fakeStmt struct {
	c      *fakeConn
	query  string
	closed bool
}

func (s *fakeStmt) Close() error {
	if s.closed && s.c.f.forgiving {
		return nil
	}
	if s.closed {
		s.c.f.t.Errorf("second Close of statement %q", s.query)
	}
	s.closed = true
	s.c.stmts.Add(-1)
	return s.c.call(context.Background(), "Close "+s.query)
}

func (s *fakeStmt) NumInput() int {
	s.c.call(context.Background(), "NumInput")
	return strings.Count(s.query, "?")
}

func (s *fakeStmt) Exec(args []driver.Value) (driver.Result, error) { panic("ExecContext is there") }
func (s *fakeStmt) Query(args []driver.Value) (driver.Rows, error)  { panic("QueryContext is there") }

func (s *fakeStmt) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	s.check(args)
	return s.c.ExecContext(ctx, s.query, args)
}

func (s *fakeStmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	s.check(args)
	return s.c.QueryContext(ctx, s.query, args)
}

func (s *fakeStmt) check(args []driver.NamedValue) {
	if s.closed {
		s.c.f.t.Errorf("use of statement %q after Close", s.query)
	}
	if want := strings.Count(s.query, "?"); len(args) != want {
		s.c.f.t.Errorf("statement %q got %d arguments", s.query, len(args))
	}
}

// fakeRows has one column: the value that its connection was opened with.
type fakeRows struct {
	c      *fakeConn
	ctx    context.Context
	left   int
	closed bool
}

func (r *fakeRows) Columns() []string { return []string{"value"} }

func (r *fakeRows) Close() error {
	if r.closed && r.c.f.forgiving {
		return nil
	}
	if r.closed {
		r.c.f.t.Error("second Close of rows")
	}
	r.closed = true
	return r.c.call(context.Background(), "Close rows")
}

func (r *fakeRows) Next(dest []driver.Value) error {
	if err := r.c.call(r.ctx, "Next"); err != nil {
		return err
	}
	if r.left == 0 {
		return io.EOF
	}
	r.left--
	dest[0] = r.c.value
	return nil
}

// A twoSets is rows of two result sets and with all optional interfaces; the
// second set has one row.
type twoSets struct {
	*fakeRows
	set int
}

func asTwoSets(r *fakeRows) driver.Rows { return &twoSets{r, 1} }

func (r *twoSets) Columns() []string {
	r.c.call(r.ctx, "Columns")
	return []string{"", "value", "another value"}[r.set:][:1]
}

func (r *twoSets) HasNextResultSet() bool {
	return r.c.call(r.ctx, "HasNextResultSet") == nil && r.set == 1
}

func (r *twoSets) NextResultSet() error {
	if err := r.c.call(r.ctx, "NextResultSet"); err != nil {
		return err
	}
	if r.set == 2 {
		return io.EOF
	}
	r.set, r.left = 2, 1
	return nil
}

func (r *twoSets) ColumnTypeScanType(int) reflect.Type {
	r.c.call(r.ctx, "ColumnTypeScanType")
	return reflect.TypeFor[float32]()
}

func (r *twoSets) ColumnTypeDatabaseTypeName(int) string {
	r.c.call(r.ctx, "ColumnTypeDatabaseTypeName")
	return "NUMBER"
}

func (r *twoSets) ColumnTypeLength(int) (int64, bool) {
	r.c.call(r.ctx, "ColumnTypeLength")
	return 5, true
}

func (r *twoSets) ColumnTypeNullable(int) (nullable, ok bool) {
	r.c.call(r.ctx, "ColumnTypeNullable")
	return true, true
}

func (r *twoSets) ColumnTypePrecisionScale(int) (int64, int64, bool) {
	r.c.call(r.ctx, "ColumnTypePrecisionScale")
	return 7, 2, true
}

// An obstacle is a hook that stops one call of the driver, the first of its
// name once it is armed, and has it return what the test says.
type obstacle struct {
	call    string
	armed   atomic.Bool
	calls   atomic.Int32 // since it was armed
	there   chan context.Context
	returns chan error
}

func newObstacle(call string) *obstacle {
	return &obstacle{call: call, there: make(chan context.Context), returns: make(chan error)}
}

func (o *obstacle) onCall(ctx context.Context, _ *fakeConn, call string) error {
	if call != o.call || !o.armed.Load() || o.calls.Add(1) > 1 {
		return nil
	}
	o.there <- ctx
	return <-o.returns
}

// A gate lets nobody pass until it is opened; arrived tells who came.
type gate struct {
	arrived chan struct{}
	open    chan struct{}
}

func newGate() *gate { return &gate{make(chan struct{}, 1000), make(chan struct{})} }

func (g *gate) pass() {
	g.arrived <- struct{}{}
	<-g.open
}

// A driverError is an error of the driver's own.
type driverError struct{ code int }

func (e *driverError) Error() string { return fmt.Sprintf("fake: error %d", e.code) }

var (
	errDead = &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	errAuth = &pq.Error{Code: "28P01", Message: "password authentication failed"}
)

// eachDriver runs a test in a bubble with each of the two kinds of drivers.
func eachDriver(t *testing.T, name string, test func(t *testing.T, f *fake, d driver.Driver)) {
	bubble(t, name+"/with DriverContext", func(t *testing.T) {
		f := newFake(t)
		test(t, f, ctxFake{f})
	})
	bubble(t, name+"/without DriverContext", func(t *testing.T) {
		f := newFake(t)
		test(t, f, f)
	})
}

// bubble runs a subtest in a synctest bubble. Time passes there only when
// nothing else can happen, and a goroutine that is left behind fails the test.
func bubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

const (
	// patience is hotload's: how long it waits for what cannot be hurried, and
	// how long a driver may take to return from a killed call before its
	// connection is closed under it.
	patience = time.Second
	// moment is how long may take what should take no time, as DB.Close polls.
	moment = 10 * time.Millisecond
)

// bg is a context that the recording driver knows again.
var bg = context.WithValue(context.Background(), ctxKey{}, "background")

// A runner is a sql.DB, sql.Tx, sql.Conn, or prepared.
type runner interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// begin begins a transaction, which ends with the test at the latest: a test that
// fails in a bubble would else end the program.
func begin(t testing.TB, x interface {
	BeginTx(context.Context, *sql.TxOptions) (*sql.Tx, error)
}) *sql.Tx {
	t.Helper()
	tx, err := x.BeginTx(context.Background(), nil)
	must(t, "begin", err)
	t.Cleanup(func() { tx.Rollback() })
	return tx
}

// take takes a connection from the pool, until the test ends.
func take(t testing.TB, db *sql.DB) *sql.Conn {
	t.Helper()
	conn, err := db.Conn(context.Background())
	must(t, "conn", err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// prepare prepares a statement.
func prepare(t testing.TB, x interface {
	PrepareContext(context.Context, string) (*sql.Stmt, error)
}, query string) *sql.Stmt {
	t.Helper()
	stmt, err := x.PrepareContext(context.Background(), query)
	must(t, "prepare", err)
	return stmt
}

// query begins a query.
func query(t testing.TB, x runner, text string, args ...any) *sql.Rows {
	t.Helper()
	rows, err := x.QueryContext(context.Background(), text, args...)
	must(t, "query", err)
	return rows
}

// insert executes "insert" without arguments.
func insert(x runner) error {
	_, err := x.ExecContext(context.Background(), "insert")
	return err
}

// fill makes a pool hold so many idle connections.
func fill(t testing.TB, db *sql.DB, idle int) {
	db.SetMaxIdleConns(idle)
	conns := make([]*sql.Conn, idle)
	for i := range conns {
		var err error
		conns[i], err = db.Conn(context.Background())
		must(t, "conn", err)
		must(t, "exec", insert(conns[i]))
	}
	for _, conn := range conns {
		conn.Close()
	}
}

// inRaw calls f with what a Raw callback gets.
func inRaw(t testing.TB, conn *sql.Conn, f func(c any)) {
	t.Helper()
	must(t, "Raw", conn.Raw(func(c any) error { f(c); return nil }))
}

// raw returns the driver's connection of one of the pool.
func raw(t testing.TB, conn *sql.Conn) (c driver.Conn) {
	t.Helper()
	inRaw(t, conn, func(proxy any) { c = proxy.(interface{ Raw() driver.Conn }).Raw() })
	return c
}

// hotloadDriver is the driver that programs get from DB.Driver.
func hotloadDriver(t testing.TB) driver.Driver {
	db, err := sql.Open("hotload", "")
	must(t, "open", err)
	defer db.Close()
	return db.Driver()
}

// connect makes a connector, and a connection as database/sql has it, for tests
// that do without database/sql.
func connect(t testing.TB, d driver.Driver, s hotload.Strategy, options string) (driver.Connector, driver.Conn) {
	t.Helper()
	connector, err := hotloadDriver(t).(driver.DriverContext).OpenConnector(register(d, s) + "?" + options)
	must(t, "OpenConnector", err)
	t.Cleanup(func() { connector.(io.Closer).Close() })
	conn, err := connector.Connect(context.Background())
	must(t, "Connect", err)
	t.Cleanup(func() { conn.Close() })
	return connector, conn
}

// ask returns the value that an operation of the pool runs on.
func ask(t testing.TB, x runner, args ...any) (value string) {
	t.Helper()
	must(t, "query", x.QueryRowContext(t.Context(), "ask", args...).Scan(&value))
	return value
}

// must fails the test on an error.
func must(t testing.TB, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// mustBeKilled fails the test unless err is what a killed operation returns.
func mustBeKilled(t testing.TB, what string, err error) {
	t.Helper()
	if !errors.Is(err, hotload.ErrKilled) {
		t.Errorf("%s: have error %v, want one that matches ErrKilled", what, err)
	}
	for _, bad := range []error{driver.ErrBadConn, context.Canceled, context.DeadlineExceeded, io.EOF, sql.ErrNoRows} {
		if errors.Is(err, bad) {
			t.Errorf("%s: error %v matches %v", what, err, bad)
		}
	}
}

// mustSay fails the test unless an error says what it should.
func mustSay(t testing.TB, what string, err error, text string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("%s: have error %v, want one that says %q", what, err, text)
	}
}

// want fails the test unless have is what it should be.
func want[T comparable](t testing.TB, what string, have, want T) {
	t.Helper()
	if have != want {
		t.Fatalf("%s: have %v, want %v", what, have, want)
	}
}

// await waits until a condition holds.
func await(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("waited in vain: %s\n%s", what, stacks[:runtime.Stack(stacks, true)])
		}
	}
}

// receive waits for a channel.
func receive[T any](t testing.TB, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(limit):
		t.Fatalf("waited in vain: %s", what)
	}
	return v
}

// logs collects what is logged through slog's default logger.
type logs struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

// collect replaces slog's default logger until the test ends: such a test
// cannot be parallel.
func collect(t testing.TB) *logs {
	l := &logs{}
	logTo(t, slog.NewTextHandler(l, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	return l
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// count counts the lines that contain all of the parts: attributes, such as
// generation=1, and parts of the message.
func (l *logs) count(parts ...string) (n int) {
	for line := range strings.Lines(l.String()) {
		line = strings.ReplaceAll(line, "\n", " ")
		if !slices.ContainsFunc(parts, func(part string) bool {
			if strings.Contains(part, "=") {
				part = " " + part + " "
			}
			return !strings.Contains(" "+line, part)
		}) {
			n++
		}
	}
	return n
}

// A logHook is a log handler: a function that is called with each event, which is
// a message without its prefix, and the generation. What is logged goes on when
// it has returned.
type logHook func(event string)

func (h logHook) Enabled(context.Context, slog.Level) bool { return true }
func (h logHook) WithAttrs([]slog.Attr) slog.Handler       { return h }
func (h logHook) WithGroup(string) slog.Handler            { return h }

func (h logHook) Handle(_ context.Context, r slog.Record) error {
	event := strings.TrimPrefix(r.Message, "hotload: ")
	r.Attrs(func(a slog.Attr) bool { event += " " + a.Value.String(); return false })
	h(event)
	return nil
}

// logTo replaces slog's default logger until the test ends.
func logTo(t testing.TB, h slog.Handler) {
	old := slog.Default()
	slog.SetDefault(slog.New(h))
	t.Cleanup(func() { slog.SetDefault(old) })
}

func TestMain(m *testing.M) {
	slog.SetDefault(slog.New(slog.DiscardHandler)) // tests that look at the log collect it
	m.Run()
}

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
		children   map[*liteChild]bool // open rows and statements
	}
	litePlain struct{ c *liteConn }
)

// A liteChild is rows or a statement.
type liteChild struct {
	c      *liteConn
	name   string
	parent *liteChild // the statement of rows
}

func newLite(t testing.TB) *liteFake {
	return &liteFake{t: t, rowCount: 3, sets: 1, files: make(map[string]int), writers: make(map[string]*liteConn)}
}

func (f *liteFake) Open(value string) (driver.Conn, error) {
	c := f.open(value)
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
	left := child != nil && (c.lastResort || f.untidy) && strings.HasPrefix(call, "Close ")
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
	child := &liteChild{c: c, name: name, parent: parent}
	if c.closed && len(c.children) == 0 {
		c.f.files[c.value]++ // it holds the file again
	}
	c.children[child] = true
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
