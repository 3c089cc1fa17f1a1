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
	exec    driver.StmtExecContext   // si, or what has it do so
	query   driver.StmtQueryContext  // the same
	checker driver.NamedValueChecker // si, or the connection, or nil
}

// A columnStmt is a stmt of a driver whose statements are ColumnConverters.
type columnStmt struct{ *stmt }

var (
	_ driver.StmtExecContext   = (*stmt)(nil)
	_ driver.StmtQueryContext  = (*stmt)(nil)
	_ driver.NamedValueChecker = (*stmt)(nil)
	_ driver.ColumnConverter   = columnStmt{}
)

func (st *stmt) prepare(ctx context.Context, s *serverConn) error {
	si, err := prepare(ctx, s.ci, st.text)
	if err != nil {
		return err
	}
	st.s, st.si = s, si
	var ok bool
	if st.exec, ok = si.(driver.StmtExecContext); !ok {
		st.exec = plainStmt{si}
	}
	if st.query, ok = si.(driver.StmtQueryContext); !ok {
		st.query = plainStmt{si}
	}
	if st.checker, ok = si.(driver.NamedValueChecker); !ok {
		st.checker = s.checker
	}
	if s.stmts == nil {
		s.stmts = make(map[*stmt]driver.Stmt)
	}
	s.stmts[st] = si
	return nil
}

// Close closes the driver's statement, unless that was closed with its server
// connection. It may come when the connection is back in the pool.
func (st *stmt) Close() error {
	s := st.s
	if s.state.CompareAndSwap(idle, taken) {
		defer s.disown() // no use: nothing is killed
	} else if s.state.Load() != taken || !s.k.enter() {
		return nil
	}
	if _, open := s.stmts[st]; !open { // closed already, in a Raw callback
		return s.k.leave(nil)
	}
	delete(s.stmts, st)
	return s.k.leave(st.si.Close())
}

// there reports whether the statement is prepared where it is to run, so that
// it can be asked about its arguments. Else they are converted later.
func (st *stmt) there() bool {
	p := st.p
	p.unchecked = !(p.used || p.take()) || st.s != p.s
	return !p.unchecked && st.s.k.enter()
}

// NumInput returns -1, for unknown, if the statement has to be prepared again.
// Then the arguments are counted when they are converted.
func (st *stmt) NumInput() int {
	if !st.there() {
		return -1
	}
	n := st.si.NumInput()
	st.s.k.leave(nil)
	return n
}

func (st *stmt) CheckNamedValue(nv *driver.NamedValue) error {
	if !st.there() {
		return nil
	}
	err := driver.ErrSkip
	if st.checker != nil {
		err = st.checker.CheckNamedValue(nv)
	}
	st.s.k.leave(nil)
	return err
}

func (st columnStmt) ColumnConverter(i int) driver.ValueConverter {
	if cc, ok := st.si.(driver.ColumnConverter); ok && st.there() {
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
	if st.p.ready() && st.s == st.p.s {
		return st.exec.ExecContext(ctx, args)
	}
	ctx, call, args, err := st.begin(ctx, args)
	if err != nil {
		return nil, err
	}
	res, err := st.exec.ExecContext(ctx, args)
	if call != nil {
		err = call.endExec(args, err)
	}
	return res, err
}

func (st *stmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	ctx, call, args, err := st.begin(ctx, args)
	if err != nil {
		return nil, err
	}
	r, err := st.query.QueryContext(ctx, args)
	if call != nil {
		return call.rows(r, err)
	}
	return r, err
}

// begin begins a call with the statement prepared and the arguments converted.
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
		args, err = convert(st.checker, st.si, args)
	}
	st.p.unchecked = false
	if err != nil {
		return nil, nil, nil, call.end(err)
	}
	return ctx, call, args, nil
}

// What follows does for a driver's connection what database/sql would have
// done, had it held that connection itself: ctxutil.go and convert.go there.

// prepare is ctxDriverPrepare.
func prepare(ctx context.Context, ci driver.Conn, query string) (driver.Stmt, error) {
	if c, ok := ci.(driver.ConnPrepareContext); ok {
		return c.PrepareContext(ctx, query)
	}
	si, err := ci.Prepare(query)
	if err == nil && ctx.Err() != nil {
		si.Close()
		return nil, ctx.Err()
	}
	return si, err
}

// plainExecer, plainQueryer and plainStmt are ctxDriverExec and its like: they
// call methods that take neither contexts nor names.
type (
	plainExecer  struct{ driver.Execer }
	plainQueryer struct{ driver.Queryer }
	plainStmt    struct{ driver.Stmt }
)

func (p plainExecer) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	return plain(ctx, args, func(values []driver.Value) (driver.Result, error) { return p.Exec(query, values) })
}

func (p plainQueryer) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	return plain(ctx, args, func(values []driver.Value) (driver.Rows, error) { return p.Query(query, values) })
}

func (p plainStmt) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	return plain(ctx, args, p.Exec)
}

func (p plainStmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	return plain(ctx, args, p.Query)
}

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
func convert(checker driver.NamedValueChecker, si driver.Stmt, raw []driver.NamedValue) ([]driver.NamedValue, error) {
	args := make([]any, len(raw))
	for i, arg := range raw {
		if args[i] = arg.Value; arg.Name != "" {
			args[i] = sql.Named(arg.Name, arg.Value)
		}
	}
	c := &catcher{si: si, checker: checker}
	db := sql.OpenDB(c)
	defer db.Close()
	conn, err := db.Conn(context.Background()) // unlike the sql.DB, it tries once
	if err == nil {
		_, err = conn.ExecContext(context.Background(), "", args...)
		conn.Close()
	}
	return c.args, err
}

// A catcher is a driver whose only statement catches its arguments.
type catcher struct {
	si      driver.Stmt // nil for an operation without one
	checker driver.NamedValueChecker
	args    []driver.NamedValue
}

func (c *catcher) Connect(context.Context) (driver.Conn, error) { return c, nil }
func (c *catcher) Driver() driver.Driver                        { return nil }
func (c *catcher) Begin() (driver.Tx, error)                    { return nil, driver.ErrSkip }
func (c *catcher) Close() error                                 { return nil }
func (c *catcher) Prepare(string) (driver.Stmt, error) {
	if cc, ok := c.si.(driver.ColumnConverter); ok {
		return columnCaught{&caught{c}, cc}, nil
	}
	return &caught{c}, nil
}

type (
	caught       struct{ c *catcher }
	columnCaught struct {
		*caught
		cc driver.ColumnConverter
	}
)

func (s columnCaught) ColumnConverter(i int) driver.ValueConverter { return s.cc.ColumnConverter(i) }

func (s *caught) Close() error { return nil }

func (s *caught) NumInput() int {
	if s.c.si == nil {
		return -1
	}
	return s.c.si.NumInput()
}

func (s *caught) CheckNamedValue(nv *driver.NamedValue) error {
	if s.c.checker == nil {
		return driver.ErrSkip
	}
	return s.c.checker.CheckNamedValue(nv)
}

func (s *caught) Exec([]driver.Value) (driver.Result, error) { return nil, nil }
func (s *caught) Query([]driver.Value) (driver.Rows, error)  { return nil, nil }

func (s *caught) ExecContext(_ context.Context, args []driver.NamedValue) (driver.Result, error) {
	s.c.args = args
	return driver.ResultNoRows, nil
}
