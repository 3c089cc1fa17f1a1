package hotload

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
)

// A stmt is a prepared statement of a proxy. It prepares itself again when the
// proxy has another server connection than the one it was prepared on.
type stmt struct {
	p       *conn
	text    string      // of the query
	s       *serverConn // that it is prepared on
	si      driver.Stmt
	checker driver.NamedValueChecker // si, or the connection, or nil
	exec    func(ctx context.Context, args []driver.NamedValue) (driver.Result, error)
	query   func(ctx context.Context, args []driver.NamedValue) (driver.Rows, error)
}

// A columnStmt is a stmt of a driver whose statements are ColumnConverters. Of
// others database/sql must not find a ColumnConverter: it converts by other rules
// where there is one (an argument too many is let through, for example).
type columnStmt struct{ *stmt }

var _ driver.StmtExecContext = (*stmt)(nil)
var _ driver.StmtQueryContext = (*stmt)(nil)
var _ driver.NamedValueChecker = (*stmt)(nil)
var _ driver.ColumnConverter = columnStmt{}

// prepare prepares the statement on s, within a call that was begun there. It
// is ctxDriverPrepare of database/sql.
func (st *stmt) prepare(ctx context.Context, s *serverConn) error {
	var si driver.Stmt
	var err error
	c, ok := s.ci.(driver.ConnPrepareContext)
	if ok {
		si, err = c.PrepareContext(ctx, st.text)
	} else {
		si, err = s.ci.Prepare(st.text)
	}
	if err != nil {
		return err
	}
	if si == nil {
		return errors.New("hotload: the driver returned neither a statement nor an error")
	}
	if s.stmts == nil {
		s.stmts = make(map[*stmt]driver.Stmt)
	}
	s.stmts[st] = si
	if err = ctx.Err(); err != nil && !ok {
		// After the last resort of a kill, the statement closes with all else that
		// it had to leave.
		if !s.closed.Load() {
			delete(s.stmts, st)
			si.Close()
		}
		return err
	}
	st.s, st.si = s, si
	st.exec = func(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
		return plain(ctx, args, si.Exec)
	}
	if e, ok := si.(driver.StmtExecContext); ok {
		st.exec = e.ExecContext
	}
	st.query = func(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
		return plain(ctx, args, si.Query)
	}
	if q, ok := si.(driver.StmtQueryContext); ok {
		st.query = q.QueryContext
	}
	if st.checker, ok = si.(driver.NamedValueChecker); !ok {
		st.checker = s.checker
	}
	return nil
}

// Close closes the driver's statement, unless that is closed with its server
// connection. It may come when the connection is back in the pool, at the same
// time as a change.
func (st *stmt) Close() error {
	s := st.s
	if s.state.CompareAndSwap(idle, taken) {
		defer s.giveBack()
	} else if s.state.Load() != taken {
		return nil // retired: who won the swap closes the statement too
	}
	if !s.k.enter() {
		return nil // killed: the same
	}
	if _, open := s.stmts[st]; !open { // closed twice: a program can do that in a Raw callback
		return s.k.leave(nil)
	}
	delete(s.stmts, st)
	return s.k.leave(st.si.Close())
}

// enter begins a call of the driver's statement, to ask it about its arguments.
// It reports false if the statement is not prepared where it is to run: then
// the arguments are converted later.
func (st *stmt) enter() bool {
	p := st.p
	p.unchecked = !p.use() || st.s != p.s
	return !p.unchecked && st.s.k.enter()
}

// NumInput returns -1, for unknown, if the statement has to be prepared again.
// Then the arguments are counted when they are converted.
func (st *stmt) NumInput() int {
	if !st.enter() {
		return -1
	}
	defer st.s.k.leave(nil)
	return st.si.NumInput()
}

func (st *stmt) CheckNamedValue(nv *driver.NamedValue) error {
	if !st.enter() {
		return nil
	}
	return st.s.k.leave(check(st.checker, nv))
}

// check has the driver check an argument, if it does.
func check(checker driver.NamedValueChecker, nv *driver.NamedValue) error {
	if checker == nil {
		return driver.ErrSkip
	}
	return checker.CheckNamedValue(nv)
}

func (st columnStmt) ColumnConverter(i int) driver.ValueConverter {
	if cc, ok := st.si.(driver.ColumnConverter); ok && st.enter() {
		defer st.s.k.leave(nil)
		return cc.ColumnConverter(i)
	}
	return driver.DefaultParameterConverter
}

func (st *stmt) Exec(args []driver.Value) (driver.Result, error) {
	return st.ExecContext(context.Background(), named(args))
}
func (st *stmt) Query(args []driver.Value) (driver.Rows, error) {
	return st.QueryContext(context.Background(), named(args))
}

func (st *stmt) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	if st.p.direct() && st.s == st.p.s {
		return st.exec(ctx, args)
	}
	ctx, call, args, err := st.begin(ctx, args)
	if err != nil {
		return nil, err
	}
	res, err := st.exec(ctx, args)
	return res, call.endExec(args, err)
}

func (st *stmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	ctx, call, args, err := st.begin(ctx, args)
	if err != nil {
		return nil, err
	}
	r, err := st.query(ctx, args)
	return call.endQuery(r, err)
}

// begin begins a call on the server connection of the proxy, where it prepares
// the statement if it is not yet, and then converts the arguments.
func (st *stmt) begin(ctx context.Context, args []driver.NamedValue) (context.Context, *call, []driver.NamedValue, error) {
	s, ctx, call, err := st.p.begin(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	if st.s != s {
		if err = st.prepare(ctx, s); err == nil {
			err = ctx.Err() // a call that was killed goes no further
		}
	}
	if err == nil && st.p.unchecked {
		args, err = convert(ctx, st.checker, st.si, args)
	}
	st.p.unchecked = false
	if err != nil {
		return nil, nil, nil, call.end(err)
	}
	return ctx, call, args, nil
}

// What follows does for a driver's connection what database/sql would have
// done, had it held that connection itself: ctxutil.go and convert.go there.

// plain is ctxDriverExec and its like: f calls a method that takes neither a
// context nor names.
func plain[T any](ctx context.Context, args []driver.NamedValue, f func([]driver.Value) (T, error)) (none T, err error) {
	values := make([]driver.Value, len(args))
	for i, arg := range args {
		if arg.Name != "" {
			return none, errors.New("sql: driver does not support the use of Named Parameters")
		}
		values[i] = arg.Value
	}
	if err := ctx.Err(); err != nil {
		return none, err
	}
	return f(values)
}

// named is the reverse of plain.
func named(values []driver.Value) []driver.NamedValue {
	args := make([]driver.NamedValue, len(values))
	for i, v := range values {
		args[i] = driver.NamedValue{Ordinal: i + 1, Value: v}
	}
	return args
}

// convert has database/sql convert the arguments of an operation that there was
// no connection to check for. Its rules are many and change between releases of
// Go, so it is asked itself: a private sql.DB prepares and executes on a catcher,
// which has the driver's checks, and keeps what they make of the arguments.
func convert(ctx context.Context, checker driver.NamedValueChecker, si driver.Stmt, raw []driver.NamedValue) ([]driver.NamedValue, error) {
	args := make([]any, len(raw))
	for i, arg := range raw {
		if args[i] = arg.Value; arg.Name != "" {
			args[i] = sql.Named(arg.Name, arg.Value)
		}
	}
	c := &catcher{si: si, checker: checker}
	db := sql.OpenDB(c)
	defer db.Close()
	conn, err := db.Conn(ctx) // unlike the sql.DB, it tries once
	if err == nil {
		_, err = conn.ExecContext(ctx, "", args...)
		conn.Close()
	}
	return c.args, err
}

// A catcher is a driver's connector, its connection and the only statement,
// which catches its arguments.
type catcher struct {
	driver.Conn // both nil: what database/sql does not call here
	driver.Stmt
	si      driver.Stmt // nil for an operation without one
	checker driver.NamedValueChecker
	args    []driver.NamedValue
}

// A columnCatcher is a catcher for a statement that is a ColumnConverter.
type columnCatcher struct {
	*catcher
	cc driver.ColumnConverter
}

func (c columnCatcher) ColumnConverter(i int) driver.ValueConverter { return c.cc.ColumnConverter(i) }

func (c *catcher) Connect(context.Context) (driver.Conn, error) { return c, nil }
func (c *catcher) Driver() driver.Driver                        { return nil }
func (c *catcher) Close() error                                 { return nil }
func (c *catcher) Prepare(string) (driver.Stmt, error) {
	if cc, ok := c.si.(driver.ColumnConverter); ok {
		return columnCatcher{c, cc}, nil
	}
	return c, nil
}

func (c *catcher) NumInput() int {
	if c.si == nil {
		return -1
	}
	return c.si.NumInput()
}

func (c *catcher) CheckNamedValue(nv *driver.NamedValue) error { return check(c.checker, nv) }

// ExecContext fails if the operation's context has ended. An operation that was
// killed must go no further: the last resort may have closed its connection.
func (c *catcher) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	c.args = args
	return driver.ResultNoRows, ctx.Err()
}
