//lint:file-ignore SA1012 a call that has no context is recorded with none

package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"math"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/infobloxopen/hotload"
)

// TestFidelity runs a script of operations on a driver directly and on the
// same driver under hotload. A program sees the same results, and the driver
// the same calls. It sees the same results even when the connection string
// changes before each operation.
func TestFidelity(t *testing.T) {
	modes := []struct {
		name, options string
		changes       bool
	}{
		{"graceful", "", false},
		{"forceKill", "forceKill=true", false},
		{"graceful, changes", "", true},
		{"forceKill later, changes", "forceKill=1h", true},
	}
	t.Run("R-35/the proxy is invisible", func(t *testing.T) {
		for _, v := range variants {
			t.Run(v.name, func(t *testing.T) {
				t.Parallel()
				direct := newSubject(v)
				subjects := make([]*subject, len(modes))
				for i, m := range modes {
					s := newSubject(v)
					s.changes = m.changes
					s.dsn = register(s.recorder.driver(), s) + "?" + m.options
					subjects[i] = s
				}
				for _, step := range script {
					if step.call != "" && !(v.failing && direct.recorder.made[step.call]) {
						continue
					}
					t.Run(step.name, func(t *testing.T) {
						want, wantCalls := direct.play(t, step)
						for i, m := range modes {
							if m.changes && (step.still || v.still) {
								continue
							}
							t.Run(m.name, func(t *testing.T) {
								have, calls := subjects[i].play(t, step)
								same(t, "results", have, want)
								if !m.changes && !(step.name == "arguments after some that failed" && strings.HasSuffix(v.name, "er only")) {
									same(t, "driver calls", comparableCalls(calls, m.options), comparableCalls(wantCalls, m.options))
								}
							})
						}
					})
				}
			})
		}
	})
}

// comparableCalls leaves out the calls that may differ: with forceKill the columns are
// asked for once for each result set.
func comparableCalls(calls []string, options string) []string {
	if options == "" {
		return calls
	}
	calls = slices.DeleteFunc(slices.Clone(calls), func(call string) bool { return strings.HasSuffix(call, "Rows.Columns") })
	for i, call := range calls { // a statement's driver must not hold on to the context that it was prepared with
		if strings.Contains(call, " Stmt.") || strings.Contains(call, " Rows.") || strings.Contains(call, "NextResultSet") || strings.Contains(call, "ScanColumn") {
			calls[i], _, _ = strings.Cut(call, " ctx: ")
		}
	}
	return calls
}

// same fails the test where two lists differ first.
func same(t *testing.T, what string, have, want []string) {
	t.Helper()
	if slices.Equal(have, want) {
		return
	}
	i := 0
	for i < len(have) && i < len(want) && have[i] == want[i] {
		i++
	}
	t.Errorf("%s differ from those without hotload\nbefore:\t%s\nhave:\t%s\nwant:\t%s", what,
		strings.Join(want[max(0, i-3):i], "\n\t"),
		strings.Join(have[i:min(len(have), i+4)], "\n\t"),
		strings.Join(want[i:min(len(want), i+4)], "\n\t"))
}

// A variant is a driver that has some of the optional interfaces.
type variant struct {
	name    string
	context bool // the driver is a DriverContext, and its connector an io.Closer
	counts  bool // its statements know how many arguments they take
	conn    func(*recConn) driver.Conn
	stmt    func(*recStmt) driver.Stmt // nil: no optional interfaces
	rows    func(*recRows) driver.Rows // nil: no optional interfaces
	fails   map[string]error           // what calls answer always
	failing bool                       // also with calls that fail, and contexts that end during calls
	still   bool                       // not with changes: what it answers always uses up database/sql's tries
}

// The sets of optional interfaces that come together in many variants.
type (
	modernConn struct {
		*recConn
		pinger
		preparer
		beginner
		execer
		queryer
	}
	pooledConn struct {
		modernConn
		resetter
		validator
	}
	fullConn struct {
		pooledConn
		checker
	}
	fullStmt struct {
		*recStmt
		stmtExecer
		stmtQueryer
	}
	fullRows struct {
		*recRows
		setRows
		scanTypeRows
		typeNameRows
		lengthRows
		nullableRows
		precisionRows
	}
)

func modern(c *recConn) modernConn {
	return modernConn{c, pinger{c}, preparer{c}, beginner{c}, execer{c}, queryer{c}}
}
func pooled(c *recConn) pooledConn { return pooledConn{modern(c), resetter{c}, validator{c}} }
func full(c *recConn) fullConn     { return fullConn{pooled(c), checker{c}} }
func fullStmtOf(s *recStmt) driver.Stmt {
	return fullStmt{s, stmtExecer{s}, stmtQueryer{s}}
}
func fullRowsOf(r *recRows) driver.Rows {
	return fullRows{r, setRows{r}, scanTypeRows{r}, typeNameRows{r}, lengthRows{r}, nullableRows{r}, precisionRows{r}}
}

var variants = []*variant{
	{
		name: "Conn only", failing: true,
		conn: func(c *recConn) driver.Conn { return c },
	},
	{
		name: "everything", context: true, counts: true, failing: true,
		conn: func(c *recConn) driver.Conn { return full(c) },
		stmt: func(s *recStmt) driver.Stmt {
			return struct {
				fullStmt
				stmtChecker
			}{fullStmtOf(s).(fullStmt), stmtChecker{s}}
		},
		rows: fullRowsOf,
	},
	{
		name: "legacy Execer and Queryer", counts: true, failing: true,
		conn: func(c *recConn) driver.Conn {
			return struct {
				*recConn
				legacyExecer
				legacyQueryer
			}{c, legacyExecer{c}, legacyQueryer{c}}
		},
	},
	{
		name: "legacy Execer and QueryerContext", context: true,
		conn: func(c *recConn) driver.Conn {
			return struct {
				*recConn
				legacyExecer
				queryer
				preparer
			}{c, legacyExecer{c}, queryer{c}, preparer{c}}
		},
	},
	{
		name: "Execer only", context: true,
		conn: func(c *recConn) driver.Conn {
			return struct {
				*recConn
				execer
				checker
			}{c, execer{c}, checker{c}}
		},
	},
	{
		name: "Queryer only", counts: true,
		conn: func(c *recConn) driver.Conn {
			return struct {
				*recConn
				queryer
				pinger
			}{c, queryer{c}, pinger{c}}
		},
		stmt: func(s *recStmt) driver.Stmt {
			return struct {
				*recStmt
				stmtExecer
			}{s, stmtExecer{s}}
		},
	},
	{
		name: "neither Execer nor Queryer, Stmt with a checker", context: true, counts: true, failing: true,
		conn: func(c *recConn) driver.Conn {
			return struct {
				*recConn
				preparer
				beginner
				checker
			}{c, preparer{c}, beginner{c}, checker{c}}
		},
		stmt: func(s *recStmt) driver.Stmt {
			return struct {
				*recStmt
				stmtChecker
				stmtQueryer
			}{s, stmtChecker{s}, stmtQueryer{s}}
		},
	},
	{
		name: "ErrSkip from Exec and Query", context: true, counts: true,
		conn:  func(c *recConn) driver.Conn { return full(c) },
		stmt:  fullStmtOf,
		fails: map[string]error{"Exec": driver.ErrSkip, "Query": driver.ErrSkip},
	},
	{
		name: "ErrSkip from legacy Exec and Query",
		conn: func(c *recConn) driver.Conn {
			return struct {
				*recConn
				legacyExecer
				legacyQueryer
				checker
			}{c, legacyExecer{c}, legacyQueryer{c}, checker{c}}
		},
		fails: map[string]error{"Exec": driver.ErrSkip, "Query": driver.ErrSkip},
	},
	{
		name: "ColumnConverter, NumInput -1",
		conn: func(c *recConn) driver.Conn { return c },
		stmt: func(s *recStmt) driver.Stmt {
			return struct {
				*recStmt
				columns
			}{s, columns{s}}
		},
	},
	{
		name: "ColumnConverter, NumInput n", counts: true, failing: true,
		conn: func(c *recConn) driver.Conn { return c },
		stmt: func(s *recStmt) driver.Stmt {
			return struct {
				fullStmt
				columns
			}{fullStmtOf(s).(fullStmt), columns{s}}
		},
	},
	{
		name: "ColumnConverter and a checker on the Conn", counts: true,
		conn: func(c *recConn) driver.Conn {
			return struct {
				*recConn
				checker
			}{c, checker{c}}
		},
		stmt: func(s *recStmt) driver.Stmt {
			return struct {
				*recStmt
				columns
			}{s, columns{s}}
		},
	},
	{
		name: "ColumnConverter and a checker on the Stmt", context: true,
		conn: func(c *recConn) driver.Conn { return modern(c) },
		stmt: func(s *recStmt) driver.Stmt {
			return struct {
				*recStmt
				columns
				stmtChecker
			}{s, columns{s}, stmtChecker{s}}
		},
	},
	{
		name: "checker on the Conn, plain Stmt", counts: true,
		conn: func(c *recConn) driver.Conn {
			return struct {
				modernConn
				checker
			}{modern(c), checker{c}}
		},
	},
	{
		name: "no ConnBeginTx", context: true,
		conn: func(c *recConn) driver.Conn {
			return struct {
				*recConn
				preparer
				execer
				queryer
				resetter
				validator
			}{c, preparer{c}, execer{c}, queryer{c}, resetter{c}, validator{c}}
		},
		rows: fullRowsOf,
	},
	{
		name: "no ConnPrepareContext", context: true,
		conn: func(c *recConn) driver.Conn {
			return struct {
				*recConn
				beginner
				execer
				resetter
				validator
			}{c, beginner{c}, execer{c}, resetter{c}, validator{c}}
		},
		stmt: fullStmtOf,
	},
	{
		name: "SessionResetter without Validator", context: true,
		conn: func(c *recConn) driver.Conn {
			return struct {
				modernConn
				resetter
			}{modern(c), resetter{c}}
		},
	},
	{
		name: "Validator without SessionResetter",
		conn: func(c *recConn) driver.Conn {
			return struct {
				modernConn
				validator
			}{modern(c), validator{c}}
		},
	},
	{
		name: "Validator that says no", context: true,
		conn:  func(c *recConn) driver.Conn { return full(c) },
		fails: map[string]error{"IsValid": errDriver},
	},
	{
		name: "ResetSession fails", context: true,
		conn:  func(c *recConn) driver.Conn { return full(c) },
		fails: map[string]error{"ResetSession": errDriver},
	},
	{
		name:  "ResetSession says ErrBadConn",
		conn:  func(c *recConn) driver.Conn { return pooled(c) },
		fails: map[string]error{"ResetSession": fmt.Errorf("wrapped: %w", driver.ErrBadConn)},
		still: true,
	},
	{
		name: "NextResultSet, no column types",
		conn: func(c *recConn) driver.Conn { return modern(c) },
		rows: func(r *recRows) driver.Rows {
			return struct {
				*recRows
				setRows
			}{r, setRows{r}}
		},
	},
	{
		name: "some column types, no NextResultSet", context: true,
		conn: func(c *recConn) driver.Conn { return pooled(c) },
		rows: func(r *recRows) driver.Rows {
			return struct {
				*recRows
				typeNameRows
				precisionRows
			}{r, typeNameRows{r}, precisionRows{r}}
		},
	},
}

// A recError is an error of the driver's own type.
type recError struct{ code string }

func (e *recError) Error() string { return "driver: error " + e.code }

var (
	errDriver error = &recError{"E1"}

	sentinels = []error{
		errDriver, driver.ErrBadConn, driver.ErrSkip, driver.ErrRemoveArgument, io.EOF, context.Canceled, context.DeadlineExceeded,
		sql.ErrNoRows, sql.ErrTxDone, sql.ErrConnDone, hotload.ErrKilled,
	}
)

// A failure is an error for so many calls.
type failure struct {
	err   error
	times int
}

// failures are what the script makes calls fail with. Of ErrBadConn it matters
// how often, as database/sql tries again.
var failures = []failure{
	{errDriver, 1},
	{driver.ErrBadConn, 1},
	{fmt.Errorf("wrapped: %w", driver.ErrBadConn), 3},
	{driver.ErrSkip, math.MaxInt},
	{driver.ErrRemoveArgument, 1},
	{io.EOF, 2},
	{fmt.Errorf("wrapped: %w", context.Canceled), 1},
}

// identity tells all that a program can tell about an error.
func identity(err error) string {
	if err == nil {
		return "ok"
	}
	s := fmt.Sprintf("%v (%T)", err, err)
	for i, sentinel := range sentinels {
		if err == sentinel {
			s += fmt.Sprintf(", == %d", i)
		} else if errors.Is(err, sentinel) {
			s += fmt.Sprintf(", is %d", i)
		}
	}
	if e := (*recError)(nil); errors.As(err, &e) {
		s += ", code " + e.code
	}
	return s
}

// A recorder records the calls of a driver.
type recorder struct {
	variant *variant

	mu     sync.Mutex // guards the following fields
	calls  []string
	conns  int
	made   map[string]bool // calls that were made ever, by their names as fails and during have them
	fails  map[string]*failure
	during map[string]func() // what happens while a call is in progress
}

type ctxKey struct{}

// call records a call. Names that differ in the suffix Context or Tx only are
// the same for failures and what happens meanwhile.
func (r *recorder) call(ctx context.Context, conn int, name string, args ...any) error {
	line := fmt.Sprintf("%d %s", conn, name)
	for _, arg := range args {
		if nv, ok := arg.(driver.NamedValue); ok {
			line += fmt.Sprintf(" %s#%d", nv.Name, nv.Ordinal)
			arg = nv.Value
		}
		line += fmt.Sprintf(" %T", arg)
		switch arg.(type) {
		case int, driver.TxOptions, special:
			line += fmt.Sprint(arg)
		default:
			if driver.IsValue(arg) { // what else there is may hold pointers
				line += fmt.Sprintf("(%v)", arg)
			}
		}
	}
	if ctx != nil {
		deadline, ok := ctx.Deadline()
		line += fmt.Sprintf(" ctx: %v, %v, %t %v", ctx.Value(ctxKey{}), ctx.Err(), ok, deadline.UnixNano())
	}
	base := strings.TrimSuffix(strings.TrimSuffix(name, "Context"), "Tx")
	r.mu.Lock()
	r.calls = append(r.calls, line)
	r.made[base] = true
	during := r.during[base]
	f := r.fails[base]
	err := r.variant.fails[base]
	if f != nil && f.times > 0 {
		f.times--
		err = f.err
	}
	r.mu.Unlock()
	if during != nil {
		during()
		if ctx != nil {
			<-ctx.Done()
			return ctx.Err()
		}
	}
	return err
}

func (r *recorder) driver() driver.Driver {
	if r.variant.context {
		return recContextDriver{recDriver{r}}
	}
	return recDriver{r}
}

type (
	recDriver        struct{ r *recorder }
	recContextDriver struct{ recDriver }
	recConnector     struct{ recDriver }
	openConnector    struct{ recDriver } // what database/sql makes of a driver without DriverContext
)

func (d recDriver) Driver() driver.Driver { return d.r.driver() }

func (d recDriver) Open(name string) (driver.Conn, error) { return d.dial(nil, "Open") }

func (d recContextDriver) OpenConnector(name string) (driver.Connector, error) {
	return recConnector(d), nil
}

func (d openConnector) Connect(context.Context) (driver.Conn, error) { return d.Open("") }

func (d recConnector) Connect(ctx context.Context) (driver.Conn, error) {
	return d.dial(ctx, "Connect")
}

func (d recConnector) Close() error { return d.r.call(nil, 0, "Connector.Close") }

func (d recDriver) dial(ctx context.Context, name string) (driver.Conn, error) {
	d.r.mu.Lock()
	d.r.conns++
	id := d.r.conns
	d.r.mu.Unlock()
	if err := d.r.call(ctx, id, name); err != nil {
		return nil, err
	}
	return d.r.variant.conn(&recConn{r: d.r, id: id, ctx: ctx}), nil
}

// A recConn has no optional interfaces. Those are types of their own, from
// which variants are put together.
type recConn struct {
	r   *recorder
	id  int
	ctx context.Context // Connect's

	closed atomic.Bool
}

var errGone = errors.New("driver: connection closed")

func (c *recConn) call(ctx context.Context, name string, args ...any) error {
	return c.r.call(ctx, c.id, name, args...)
}

func (c *recConn) Prepare(query string) (driver.Stmt, error) { return c.prepare(nil, "Prepare", query) }
func (c *recConn) Begin() (driver.Tx, error)                 { return c.begin(nil, "Begin") }

func (c *recConn) Close() error {
	c.closed.Store(true)
	return c.call(c.ctx, "Close")
}

func (c *recConn) prepare(ctx context.Context, name, query string) (driver.Stmt, error) {
	if err := c.call(ctx, name, query); err != nil {
		return nil, err
	}
	s := &recStmt{c, query, ctx}
	if c.r.variant.stmt == nil {
		return s, nil
	}
	return c.r.variant.stmt(s), nil
}

func (c *recConn) begin(ctx context.Context, name string, opts ...any) (driver.Tx, error) {
	if err := c.call(ctx, name, opts...); err != nil {
		return nil, err
	}
	return recTx{c, ctx}, nil
}

func (c *recConn) exec(ctx context.Context, name, query string, args []any) (driver.Result, error) {
	if c.closed.Load() {
		return nil, errGone
	}
	if err := c.call(ctx, name, append([]any{query}, args...)...); err != nil {
		return nil, err
	}
	return recResult{c}, nil
}

func (c *recConn) query(ctx context.Context, name, query string, args []any) (driver.Rows, error) {
	if c.closed.Load() {
		return nil, errGone
	}
	if err := c.call(ctx, name, append([]any{query}, args...)...); err != nil {
		return nil, err
	}
	r := &recRows{c: c, ctx: ctx, query: query}
	if c.r.variant.rows == nil {
		return r, nil
	}
	return c.r.variant.rows(r), nil
}

// anys returns arguments as call takes them.
func anys[T any](args []T) (as []any) {
	for _, arg := range args {
		as = append(as, arg)
	}
	return as
}

type (
	pinger        struct{ c *recConn }
	preparer      struct{ c *recConn }
	beginner      struct{ c *recConn }
	execer        struct{ c *recConn }
	queryer       struct{ c *recConn }
	legacyExecer  struct{ c *recConn }
	legacyQueryer struct{ c *recConn }
	checker       struct{ c *recConn }
	resetter      struct{ c *recConn }
	validator     struct{ c *recConn }
)

func (i pinger) Ping(ctx context.Context) error           { return i.c.call(ctx, "Ping") }
func (i resetter) ResetSession(ctx context.Context) error { return i.c.call(ctx, "ResetSession") }
func (i validator) IsValid() bool                         { return i.c.call(nil, "IsValid") == nil }

func (i preparer) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	return i.c.prepare(ctx, "PrepareContext", query)
}

func (i beginner) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	return i.c.begin(ctx, "BeginTx", opts)
}

func (i execer) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	return i.c.exec(ctx, "ExecContext", query, anys(args))
}

func (i queryer) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	return i.c.query(ctx, "QueryContext", query, anys(args))
}

func (i legacyExecer) Exec(query string, args []driver.Value) (driver.Result, error) {
	return i.c.exec(nil, "Exec", query, anys(args))
}

func (i legacyQueryer) Query(query string, args []driver.Value) (driver.Rows, error) {
	return i.c.query(nil, "Query", query, anys(args))
}

func (i checker) CheckNamedValue(nv *driver.NamedValue) error {
	return i.c.check("CheckNamedValue", nv)
}

// removed is an argument that checkers remove.
type removed struct{}

func (c *recConn) check(name string, nv *driver.NamedValue) error {
	if err := c.call(nil, name, *nv); err != nil {
		return err
	}
	switch v := nv.Value.(type) {
	case special:
		nv.Value = "checked " + v.s
		return nil
	case removed:
		return driver.ErrRemoveArgument
	}
	return driver.ErrSkip
}

type recTx struct {
	c   *recConn
	ctx context.Context // BeginTx's
}

func (t recTx) Commit() error   { return t.c.call(t.ctx, "Commit") }
func (t recTx) Rollback() error { return t.c.call(t.ctx, "Rollback") }

type recResult struct{ c *recConn }

func (r recResult) LastInsertId() (int64, error) { return 7, r.c.call(nil, "LastInsertId") }
func (r recResult) RowsAffected() (int64, error) { return 8, r.c.call(nil, "RowsAffected") }

// A recStmt has no optional interfaces either. Some drivers hold on to the
// context that a statement was prepared with.
type recStmt struct {
	c     *recConn
	query string
	ctx   context.Context // PrepareContext's
}

func (s *recStmt) Close() error { return s.c.call(s.ctx, "Stmt.Close", s.query) }

func (s *recStmt) NumInput() int {
	s.c.call(nil, "NumInput")
	if s.c.r.variant.counts {
		return strings.Count(s.query, "?")
	}
	return -1
}

func (s *recStmt) Exec(args []driver.Value) (driver.Result, error) {
	return s.c.exec(s.ctx, "Stmt.Exec", s.query, anys(args))
}

func (s *recStmt) Query(args []driver.Value) (driver.Rows, error) {
	return s.c.query(s.ctx, "Stmt.Query", s.query, anys(args))
}

type (
	stmtExecer  struct{ s *recStmt }
	stmtQueryer struct{ s *recStmt }
	stmtChecker struct{ s *recStmt }
	columns     struct{ s *recStmt }
)

func (i stmtExecer) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	return i.s.c.exec(ctx, "Stmt.ExecContext", i.s.query, anys(args))
}

func (i stmtQueryer) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	return i.s.c.query(ctx, "Stmt.QueryContext", i.s.query, anys(args))
}

func (i stmtChecker) CheckNamedValue(nv *driver.NamedValue) error {
	return i.s.c.check("Stmt.CheckNamedValue", nv)
}

func (i columns) ColumnConverter(column int) driver.ValueConverter {
	i.s.c.call(nil, "ColumnConverter", column)
	return converter{i.s, column}
}

type converter struct {
	s      *recStmt
	column int
}

func (c converter) ConvertValue(v any) (driver.Value, error) {
	if err := c.s.c.call(nil, "ConvertValue", c.column, v); err != nil {
		return nil, err
	}
	switch v := v.(type) {
	case special:
		return "converted " + v.s, nil
	case []int:
		return v, nil // which is no driver.Value
	}
	return driver.DefaultParameterConverter.ConvertValue(v)
}

// recRows has no optional interfaces either. It has two columns and two rows,
// none if the query is "none".
type recRows struct {
	c     *recConn
	ctx   context.Context
	query string
	set   int
	row   int
}

func (r *recRows) Columns() []string {
	r.c.call(nil, "Rows.Columns")
	return []string{"n", "s"}
}

func (r *recRows) Close() error { return r.c.call(r.ctx, "Rows.Close") }

func (r *recRows) Next(dest []driver.Value) error {
	if err := r.c.call(r.ctx, "Rows.Next"); err != nil {
		return err
	}
	if r.query == "none" || r.row == 2 {
		return io.EOF
	}
	r.row++
	dest[0], dest[1] = int64(100*r.set+r.row), []byte(fmt.Sprint("row ", r.row))
	return nil
}

type (
	setRows       struct{ r *recRows }
	scanTypeRows  struct{ r *recRows }
	typeNameRows  struct{ r *recRows }
	lengthRows    struct{ r *recRows }
	nullableRows  struct{ r *recRows }
	precisionRows struct{ r *recRows }
)

func (i setRows) HasNextResultSet() bool {
	i.r.c.call(nil, "HasNextResultSet")
	return i.r.set == 0
}

func (i setRows) NextResultSet() error {
	if err := i.r.c.call(i.r.ctx, "NextResultSet"); err != nil {
		return err
	}
	if i.r.set > 0 {
		return io.EOF
	}
	i.r.set++
	i.r.row = 0
	return nil
}

func (i scanTypeRows) ColumnTypeScanType(column int) reflect.Type {
	i.r.c.call(nil, "ScanType", column)
	return []reflect.Type{reflect.TypeFor[int64](), reflect.TypeFor[sql.RawBytes]()}[column]
}

func (i typeNameRows) ColumnTypeDatabaseTypeName(column int) string {
	i.r.c.call(nil, "DatabaseTypeName", column)
	return []string{"BIGINT", "TEXT"}[column]
}

func (i lengthRows) ColumnTypeLength(column int) (int64, bool) {
	i.r.c.call(nil, "Length", column)
	return math.MaxInt64, column == 1
}

func (i nullableRows) ColumnTypeNullable(column int) (nullable, ok bool) {
	i.r.c.call(nil, "Nullable", column)
	return column == 1, column == 0
}

func (i precisionRows) ColumnTypePrecisionScale(column int) (precision, scale int64, ok bool) {
	i.r.c.call(nil, "PrecisionScale", column)
	return 10, 2, column == 0
}

// A subject is a driver that the script runs on, directly or under hotload.
type subject struct {
	recorder *recorder
	dsn      string // empty: directly
	changes  bool   // before each operation
	types    bool   // read includes the types of columns
	src      *source
	value    int

	t   *testing.T
	db  *sql.DB
	out []string
}

func newSubject(v *variant) *subject {
	return &subject{recorder: &recorder{variant: v, made: make(map[string]bool)}}
}

func (s *subject) Watch(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
	return s.src.Watch(ctx, pth, options)
}

// play runs a step on a pool of its own and returns its results and the
// driver's calls. The bubble that it runs in ends only if nothing is left.
func (s *subject) play(t *testing.T, step step) (out, calls []string) {
	synctest.Test(t, func(t *testing.T) {
		r := s.recorder
		s.t, s.out, s.src, s.types = t, nil, newSource("0"), false
		r.calls, r.conns, r.fails, r.during = nil, 0, nil, nil
		s.open()
		step.run(s)
		s.close()
		synctest.Wait()
		out, calls = s.out, withoutLeft(r.calls)
	})
	return out, calls
}

// withoutLeft removes the closing of statements that were open when their
// connection was closed. Hotload closes them just before it. Directly,
// database/sql does so in any order, or after it, or never.
func withoutLeft(calls []string) []string {
	kept := make([]string, 0, len(calls))
	closed := make(map[string]bool) // connections
	for _, line := range calls {
		conn, call, _ := strings.Cut(line, " ")
		switch {
		case strings.HasPrefix(call, "Close"):
			closed[conn] = true
			for len(kept) > 0 && strings.HasPrefix(kept[len(kept)-1], conn+" Stmt.Close") {
				kept = kept[:len(kept)-1]
			}
		case closed[conn] && strings.HasPrefix(call, "Stmt.Close"):
			continue
		}
		kept = append(kept, line)
	}
	return kept
}

func (s *subject) open() {
	d := s.recorder.driver()
	switch {
	case s.dsn != "":
		db, err := sql.Open("hotload", s.dsn)
		if err != nil {
			s.t.Fatal(err)
		}
		s.db = db
	case s.recorder.variant.context:
		s.db = sql.OpenDB(recConnector{recDriver{s.recorder}})
	default:
		s.db = sql.OpenDB(openConnector{d.(recDriver)})
	}
}

func (s *subject) close() {
	synctest.Wait()
	err := s.db.Close()
	r := s.recorder
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, "pool closed: "+identity(err)) // no result: with changes, what has an error may be closed already
}

// tell adds a result.
func (s *subject) tell(what string, err error, values ...any) {
	s.out = append(s.out, fmt.Sprint(what, ": ", identity(err), " ", values))
}

// before makes a change before an operation, once the pool has been used. What
// goes on in the background comes to an end first.
func (s *subject) before() {
	synctest.Wait()
	if s.changes && s.src.watches.Load() > 0 {
		s.value++
		s.src.set(fmt.Sprint(s.value))
		synctest.Wait()
	}
}

// fail makes the next calls of a name fail.
func (s *subject) fail(call string, f failure) {
	s.tell(fmt.Sprintf("%s fails %d times: %v", call, f.times, f.err), nil)
	s.recorder.mu.Lock()
	defer s.recorder.mu.Unlock()
	s.recorder.fails = map[string]*failure{call: &f}
}

// meanwhile has something done while a call is in progress.
func (s *subject) meanwhile(call string, f func()) {
	s.recorder.mu.Lock()
	defer s.recorder.mu.Unlock()
	s.recorder.during = map[string]func(){call: f}
}

// A runner is a sql.DB, sql.Tx, sql.Conn, or prepared.
type runner interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// prepared is a statement as a runner that has its query already.
type prepared struct{ *sql.Stmt }

func (p prepared) ExecContext(ctx context.Context, _ string, args ...any) (sql.Result, error) {
	return p.Stmt.ExecContext(ctx, args...)
}

func (p prepared) QueryContext(ctx context.Context, _ string, args ...any) (*sql.Rows, error) {
	return p.Stmt.QueryContext(ctx, args...)
}

func (p prepared) QueryRowContext(ctx context.Context, _ string, args ...any) *sql.Row {
	return p.Stmt.QueryRowContext(ctx, args...)
}

func (s *subject) ping(ctx context.Context, x interface{ PingContext(context.Context) error }) {
	s.before()
	s.tell("ping", x.PingContext(ctx))
}

func (s *subject) exec(ctx context.Context, x runner, query string, args ...any) {
	s.before()
	res, err := x.ExecContext(ctx, query, args...)
	s.tell("exec", err)
	if err == nil {
		id, err := res.LastInsertId()
		s.tell("last insert id", err, id)
		n, err := res.RowsAffected()
		s.tell("rows affected", err, n)
	}
}

func (s *subject) query(ctx context.Context, x runner, query string, args ...any) {
	s.before()
	rows, err := x.QueryContext(ctx, query, args...)
	s.tell("query", err)
	if err == nil {
		s.read(rows)
	}
}

// read reads rows and closes them.
func (s *subject) read(rows *sql.Rows) {
	for more := true; more; more = rows.NextResultSet() {
		s.before()
		columns, err := rows.Columns()
		s.tell("columns", err, columns)
		if s.types {
			s.columnTypes(rows)
		}
		for rows.Next() {
			synctest.Wait() // a context that ended during Next closes the rows
			var n int
			var v any
			err := rows.Scan(&n, &v)
			s.tell("scan", err, n, v)
		}
		synctest.Wait()
		_, err = rows.Columns()
		s.tell("closed after the last row", err)
	}
	s.tell("rows end", rows.Err())
	s.tell("close rows", rows.Close())
}

func (s *subject) columnTypes(rows *sql.Rows) {
	types, err := rows.ColumnTypes()
	s.tell("column types", err)
	for _, ct := range types {
		length, hasLength := ct.Length()
		precision, scale, hasPrecision := ct.DecimalSize()
		nullable, hasNullable := ct.Nullable()
		s.tell(ct.Name(), nil, ct.DatabaseTypeName(), ct.ScanType(), length, hasLength, precision, scale, hasPrecision, nullable, hasNullable)
	}
}

func (s *subject) queryRow(ctx context.Context, x runner, query string, dest ...any) {
	s.before()
	s.tell("query row", x.QueryRowContext(ctx, query).Scan(dest...))
}

func (s *subject) prepare(ctx context.Context, x interface {
	PrepareContext(context.Context, string) (*sql.Stmt, error)
}, query string) (prepared, bool) {
	s.before()
	st, err := x.PrepareContext(ctx, query)
	s.tell("prepare", err)
	return prepared{st}, err == nil
}

func (s *subject) begin(ctx context.Context, x interface {
	BeginTx(context.Context, *sql.TxOptions) (*sql.Tx, error)
}, opts *sql.TxOptions) (*sql.Tx, bool) {
	s.before()
	tx, err := x.BeginTx(ctx, opts)
	s.tell("begin", err)
	return tx, err == nil
}

// end commits, rolls back or closes.
func (s *subject) end(what string, f func() error) {
	s.before()
	s.tell(what, f())
}

func (s *subject) conn(ctx context.Context) (*sql.Conn, bool) {
	s.before()
	conn, err := s.db.Conn(ctx)
	s.tell("conn", err)
	return conn, err == nil
}

// use runs a little of everything on a runner.
func (s *subject) use(ctx context.Context, x runner) {
	s.exec(ctx, x, "insert ?", 1)
	s.query(ctx, x, "select ?", "a")
	p, ok := x.(interface {
		PrepareContext(context.Context, string) (*sql.Stmt, error)
	})
	if !ok {
		return
	}
	if st, ok := s.prepare(ctx, p, "statement ?"); ok {
		s.exec(ctx, st, "", 2)
		s.query(ctx, st, "", "b")
		s.exec(ctx, st, "", 3)
		s.end("close statement", st.Close)
	}
}

// tour makes every call that a driver can get.
func (s *subject) tour(ctx context.Context) {
	s.ping(ctx, s.db)
	s.use(ctx, s.db)
	if tx, ok := s.begin(ctx, s.db, nil); ok {
		s.use(ctx, tx)
		s.end("commit", tx.Commit)
	}
	if conn, ok := s.conn(ctx); ok {
		s.use(ctx, conn)
		if tx, ok := s.begin(ctx, conn, nil); ok {
			s.exec(ctx, tx, "insert ?", 4)
			s.end("rollback", tx.Rollback)
		}
		s.end("close conn", conn.Close)
	}
}

// A counted is a Valuer that is counted: its calls are results.
type counted struct {
	s     *subject
	value driver.Value
	err   error
}

func (c counted) Value() (driver.Value, error) {
	c.s.tell("Value", nil)
	return c.value, c.err
}

// A byPointer is a Valuer only as a pointer, which may be nil.
type byPointer struct{ n int64 }

func (p *byPointer) Value() (driver.Value, error) {
	if p == nil {
		return "nil", nil
	}
	return p.n, nil
}

type step struct {
	name  string
	call  string // what fails or is interrupted: not for drivers that never get this call
	still bool   // not with changes: what it makes fail is not called then, or called more often
	run   func(s *subject)
}

var script = slices.Concat([]step{
	{name: "tour", run: func(s *subject) { s.tour(bg) }},
	{name: "two tours on one connection", run: func(s *subject) {
		s.db.SetMaxOpenConns(1)
		s.tour(bg)
		s.tour(context.Background())
	}},
	{name: "no idle connections", run: func(s *subject) {
		s.db.SetMaxIdleConns(-1)
		s.tour(bg)
	}},
	{name: "arguments", run: func(s *subject) {
		i, str, when := 5, "string", time.Unix(1e9, 0).UTC()
		for _, arg := range []any{
			nil, true, 1, int8(2), uint64(3), uint64(math.MaxUint64), float32(4), "five", []byte("six"), []byte(nil), when, &when,
			&i, &str, (*int)(nil), byte(7), time.Second, sql.NullString{}, sql.NullInt64{Int64: 8, Valid: true},
			special{"nine"}, &special{"ten"}, []int{11}, map[string]int{}, struct{}{}, func() {},
			counted{s, int64(12), nil}, &counted{s, "thirteen", nil}, (*counted)(nil), counted{s, nil, errDriver}, counted{s, 14, nil},
			counted{s, nil, driver.ErrSkip}, counted{s, nil, driver.ErrRemoveArgument}, counted{s, nil, driver.ErrBadConn},
			&byPointer{15}, (*byPointer)(nil), sql.Out{Dest: &i}, sql.Named("name", 16), sql.Named("name", counted{s, "seventeen", nil}),
			sql.Named("name", special{"eighteen"}), sql.Named("name", []int{19}),
		} {
			s.tell(fmt.Sprintf("%T", arg), nil)
			s.use2(bg, "one ?", arg)
			s.use2(bg, "three ? ? ?", counted{s, "first", nil}, arg, sql.Named("last", counted{s, "last", nil}))
		}
	}},
	{name: "arguments removed", run: func(s *subject) {
		s.use2(bg, "none", removed{})
		s.use2(bg, "one ?", removed{}, 1)
		s.use2(bg, "one ?", 1, removed{})
		s.use2(bg, "two ? ?", counted{s, 1.5, nil}, removed{}, removed{}, special{"2"})
		s.use2(bg, "two ? ?", 1, removed{})
		s.use2(bg, "one ?", sql.Named("name", removed{}), removed{}, 1)
		s.use2(bg, "one ?", sql.Named("name", removed{}), []int{1}) // the error names it
		s.use2(bg, "two ? ?", sql.Named("name", removed{}), 1, []int{2})
	}},
	{name: "wrong number of arguments", run: func(s *subject) {
		s.use2(bg, "none", 1)
		s.use2(bg, "one ?")
		s.use2(bg, "two ? ?", 1)
		s.use2(bg, "two ? ?", counted{s, 1.5, nil}, 2, counted{s, 2.5, nil}, special{"3"})
		s.use2(bg, "two ? ?", 1, 2)
	}},
	{name: "arguments after some that failed", run: func(s *subject) {
		st, ok := s.prepare(bg, s.db, "one ?")
		for range 2 {
			s.exec(bg, s.db, "two ? ?", 1, sql.Named("", 2))
			s.exec(bg, s.db, "two ? ?", 1, sql.Named("2nd", 2))
			s.exec(bg, s.db, "none")
			s.query(bg, s.db, "one ?", special{"3"})
			if ok {
				s.exec(bg, st, "", sql.Named("", 4))
				s.query(bg, st, "", counted{s, "5", nil})
			}
		}
		if ok {
			s.end("close", st.Close)
		}
	}},
	{name: "rows", run: func(s *subject) {
		s.types = true
		var n int
		var str string
		var raw sql.RawBytes
		var when time.Time
		s.query(bg, s.db, "select")
		s.query(bg, s.db, "none")
		s.queryRow(bg, s.db, "select", &n, &str)
		s.queryRow(bg, s.db, "select", &n)
		s.queryRow(bg, s.db, "select", &n, &when)
		s.queryRow(bg, s.db, "select", &n, &raw)
		s.queryRow(bg, s.db, "none", &n, &str)
		s.tell("scanned", nil, n, str)
		s.before()
		rows, err := s.db.QueryContext(bg, "select")
		s.tell("query", err)
		if err != nil {
			return
		}
		s.tell("scan before next", rows.Scan(&n, &str))
		s.tell("next", nil, rows.Next())
		s.tell("too few", rows.Scan(&n))
		s.tell("mismatch", rows.Scan(&n, &when))
		s.tell("raw", rows.Scan(&n, &raw), n, string(raw))
		s.tell("next set early", nil, rows.NextResultSet())
		s.before()
		s.tell("next", nil, rows.Next())
		s.tell("scan", rows.Scan(&n, &str), n, str)
		s.tell("close", rows.Close())
		s.tell("close again", rows.Close())
		s.tell("err", rows.Err())
		_, err = rows.Columns()
		s.tell("columns", err)
		s.tell("scan", rows.Scan(&n, &str))
		s.tell("next", nil, rows.Next(), rows.NextResultSet())
	}},
	{name: "rows side by side", run: func(s *subject) {
		st, ok := s.prepare(bg, s.db, "statement")
		if !ok {
			return
		}
		for _, x := range []runner{s.db, st} {
			s.before()
			one, err := x.QueryContext(bg, "select")
			s.tell("one", err)
			s.before()
			two, err2 := x.QueryContext(bg, "select")
			s.tell("two", err2)
			if err == nil && err2 == nil {
				s.tell("next", nil, one.Next())
				s.read(two)
				s.read(one)
			}
		}
		s.before()
		rows, err := st.QueryContext(bg, "")
		s.end("close the statement under its rows", st.Close)
		if err == nil {
			s.read(rows)
		}
		s.exec(bg, st, "")
	}},
	{name: "statement of the pool, used across transactions", run: func(s *subject) {
		st, ok := s.prepare(bg, s.db, "statement ?")
		if !ok {
			return
		}
		s.exec(bg, st, "", 1)
		for range 2 {
			tx, ok := s.begin(bg, s.db, nil)
			if !ok {
				return
			}
			s.exec(bg, st, "", 2) // on another connection
			s.before()
			in := prepared{tx.StmtContext(bg, st.Stmt)}
			s.query(bg, in, "", 3)
			s.exec(bg, in, "", special{"4"})
			own, ok := s.prepare(bg, tx, "own ?")
			if ok {
				s.exec(bg, own, "", 5)
				s.exec(bg, prepared{tx.StmtContext(bg, own.Stmt)}, "", 6)
			}
			s.end("commit", tx.Commit)
			s.exec(bg, in, "", 7)
			if ok {
				s.exec(bg, own, "", 8)
			}
		}
		s.exec(bg, st, "", 9)
		s.end("close", st.Close)
		s.exec(bg, st, "", 10)
	}},
	{name: "statement of a conn", run: func(s *subject) {
		conn, ok := s.conn(bg)
		if !ok {
			return
		}
		one, ok1 := s.prepare(bg, conn, "one ?")
		two, ok2 := s.prepare(bg, conn, "two ?")
		if ok1 && ok2 {
			s.exec(bg, one, "", 1)
			s.query(bg, two, "", 2)
			s.end("close", one.Close)
			s.query(bg, two, "", 3)
		}
		s.end("close conn", conn.Close) // and the other statement never
		s.exec(bg, s.db, "insert")
	}},
	{name: "transaction options", run: func(s *subject) {
		for _, opts := range []*sql.TxOptions{nil, {}, {ReadOnly: true}, {Isolation: sql.LevelSerializable}, {Isolation: sql.LevelLinearizable, ReadOnly: true}} {
			if tx, ok := s.begin(bg, s.db, opts); ok {
				s.exec(bg, tx, "insert")
				s.end("commit", tx.Commit)
				s.end("commit again", tx.Commit)
				s.end("rollback", tx.Rollback)
				s.exec(bg, tx, "insert")
			}
		}
	}},
	{name: "transaction whose context ends", run: func(s *subject) {
		for _, late := range []bool{false, true} {
			ctx, cancel := context.WithCancel(bg)
			defer cancel()
			tx, ok := s.begin(ctx, s.db, nil)
			if !ok {
				return
			}
			s.prepare(bg, tx, "statement")
			s.before()
			rows, err := tx.QueryContext(bg, "select")
			s.tell("query", err)
			if late {
				s.end("close rows", rows.Close)
				s.end("commit", tx.Commit)
			}
			cancel()
			synctest.Wait()
			if !late {
				s.read(rows)
			}
			s.exec(bg, tx, "insert")
			s.end("commit", tx.Commit)
			s.end("rollback", tx.Rollback)
			s.exec(bg, s.db, "insert") // on the same connection or another one, as the driver has it
		}
	}},
	{name: "transaction of a conn, whose context ends afterwards", run: func(s *subject) {
		for _, commit := range []bool{true, false} {
			conn, ok := s.conn(bg)
			if !ok {
				return
			}
			ctx, cancel := context.WithCancel(bg)
			if tx, ok := s.begin(ctx, conn, nil); ok && commit {
				s.end("commit", tx.Commit)
			} else if ok {
				s.end("rollback", tx.Rollback)
			}
			cancel()
			s.exec(bg, conn, "insert")
			s.end("close conn", conn.Close)
			s.exec(bg, s.db, "insert")
		}
	}},
	{name: "transaction of a conn, whose context ends", run: func(s *subject) {
		conn, ok := s.conn(bg)
		if !ok {
			return
		}
		ctx, cancel := context.WithCancel(bg)
		defer cancel()
		tx, ok := s.begin(ctx, conn, nil)
		if !ok {
			return
		}
		s.exec(bg, tx, "insert")
		cancel()
		synctest.Wait()
		s.end("commit", tx.Commit)
		s.exec(bg, conn, "insert") // sql.ErrConnDone if the driver's connection is discarded
		s.before()
		conn.Close() // which sql.ErrConnDone says again
		s.exec(bg, s.db, "insert")
	}},
	{name: "conn", run: func(s *subject) {
		for _, err := range []error{nil, errDriver, driver.ErrBadConn} {
			conn, ok := s.conn(bg)
			if !ok {
				return
			}
			s.end("raw", func() error { return conn.Raw(func(any) error { return err }) })
			s.exec(bg, conn, "insert")
			s.end("close", conn.Close)
			s.end("close", conn.Close)
			s.ping(bg, conn)
		}
	}},
	{name: "panic", run: func(s *subject) {
		survive := func(f func()) {
			defer func() { s.tell("panic", nil, recover()) }()
			f()
		}
		for _, call := range []string{"Exec", "Stmt.Exec"} {
			s.meanwhile(call, func() { panic(call) })
			survive(func() { s.exec(bg, s.db, "insert") })
			s.meanwhile("", nil)
			s.exec(bg, s.db, "insert")
		}
		if conn, ok := s.conn(bg); ok {
			survive(func() { conn.Raw(func(any) error { panic("Raw") }) })
			s.exec(bg, conn, "insert")
			s.end("close", conn.Close)
		}
	}},
	{name: "contexts", run: func(s *subject) {
		type key struct{}
		deadline, cancel := context.WithDeadline(context.WithValue(bg, ctxKey{}, "deadline"), time.Now().Add(time.Hour))
		defer cancel()
		ended, cancel := context.WithCancel(context.WithValue(bg, key{}, "ended"))
		cancel()
		cause, cancelCause := context.WithCancelCause(bg)
		cancelCause(errDriver)
		for _, ctx := range []context.Context{context.Background(), bg, deadline, ended, cause, context.WithoutCancel(ended)} {
			s.tour(ctx)
		}
	}},
	{name: "statement prepared with a context that ends", run: func(s *subject) {
		ctx, cancel := context.WithCancel(bg)
		st, ok := s.prepare(ctx, s.db, "statement")
		if ok {
			s.exec(bg, st, "")
			cancel()
			s.exec(bg, st, "")
			s.end("close", st.Close)
		}
		cancel()
	}},
}, stepsOf("%s fails", []string{
	"Ping", "Prepare", "Exec", "Query", "Begin", "Commit", "Rollback", "CheckNamedValue", "ResetSession", "IsValid",
	"Stmt.Exec", "Stmt.Query", "Stmt.CheckNamedValue", "ConvertValue",
	"Rows.Next", "Rows.NextRow", "ScanColumn", "Rows.Close", "NextResultSet", "LastInsertId",
}, false, func(s *subject, call string) {
	s.tour(bg)
	for _, f := range failures {
		s.fail(call, f)
		s.tour(bg)
	}
}), stepsOf("%s fails in a new pool", []string{
	"Open", "Connect", "Close", "Connector.Close", "Stmt.Close",
}, true, func(s *subject, call string) {
	for _, f := range failures {
		s.ping(bg, s.db)
		s.close()
		s.open()
		s.fail(call, f)
		s.tour(bg)
	}
}), stepsOf("context ends during %s", []string{
	"Connect", "Ping", "Prepare", "Exec", "Query", "Begin", "NumInput", "Stmt.Exec", "Stmt.Query", "Rows.Next", "Rows.NextRow", "Rows.Close",
	"Commit", "Rollback", "ResetSession", "CheckNamedValue", "IsValid",
}, true, func(s *subject, call string) {
	for _, cause := range []error{nil, errDriver} {
		ctx, cancel := context.WithCancelCause(bg)
		s.meanwhile(call, func() { cancel(cause) })
		s.tour(ctx)
		s.meanwhile("", nil)
		s.tour(bg)
		cancel(nil)
	}
}))

// stepsOf makes a step for each of some calls of the driver.
func stepsOf(name string, calls []string, still bool, run func(s *subject, call string)) (steps []step) {
	for _, call := range calls {
		steps = append(steps, step{fmt.Sprintf(name, call), call, still, func(s *subject) { run(s, call) }})
	}
	return steps
}

// use2 runs a query with arguments in every way.
func (s *subject) use2(ctx context.Context, query string, args ...any) {
	s.exec(ctx, s.db, query, args...)
	s.query(ctx, s.db, query, args...)
	if st, ok := s.prepare(ctx, s.db, query); ok {
		s.exec(ctx, st, "", args...)
		s.query(ctx, st, "", args...)
		s.end("close", st.Close)
	}
}
