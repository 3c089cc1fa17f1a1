package hotload

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"time"
)

// A conn is the proxy that database/sql holds as its driver.Conn: a place for
// one server connection after another. database/sql makes one call at a time on
// it, so its fields need no lock. A change works on server connections, never
// on proxies.
//
// Why dial again behind a proxy, and not answer driver.ErrBadConn as others do?
// database/sql tries three times. In a small pool under quick changes the third
// connection, too, can be superseded before it is used, and the operation fails.
//
// used, unchecked and spoiled carry news from one call of database/sql to a later
// one.
type conn struct {
	c        *connector
	s        *serverConn
	deadline time.Time // of the context that DB.Conn had, or the operation, when it took the connection; zero if none

	// used says that something has run on s since it was taken from the pool: s is
	// taken, and need not be looked at again. Set by use, reset when the connection
	// is taken from the pool and returned to it.
	used bool
	// unchecked says that the arguments of the operation to come are as the
	// program passed them, for want of a connection to check them. Set by each
	// check of an argument, reset by the operation. If database/sql gives up in
	// between, a stale true has the next operation convert arguments that need no
	// conversion, which changes nothing.
	unchecked bool
	// spoiled says that database/sql would have closed the driver's connection by
	// now: see tx. Reset when the connection is taken from the pool.
	spoiled bool
}

var _ driver.ConnPrepareContext = (*conn)(nil)
var _ driver.ConnBeginTx = (*conn)(nil)
var _ driver.Pinger = (*conn)(nil)
var _ driver.NamedValueChecker = (*conn)(nil)
var _ driver.SessionResetter = (*conn)(nil)
var _ driver.Validator = (*conn)(nil)
var _ driver.ExecerContext = (*directConn)(nil)
var _ driver.QueryerContext = (*directConn)(nil)

// A directConn is the conn of a driver that can exec or query without a
// statement. Of others database/sql must not find ExecContext and QueryContext,
// because it would convert the arguments before it prepared a statement, and so
// without the statement's converters.
type directConn struct{ conn }

// newConn returns the proxy of s, which was opened under ctx.
func newConn(ctx context.Context, c *connector, s *serverConn) driver.Conn {
	p := conn{c: c, s: s}
	p.deadline, _ = ctx.Deadline()
	if s.exec == nil && s.query == nil {
		return &p
	}
	return &directConn{p}
}

// use reports whether there is a server connection to run something on.
func (p *conn) use() bool {
	p.used = p.used || !p.spoiled && p.s.take()
	return p.used
}

// acquire dials if there is no server connection to run something on. A change
// during the dial is seen by use, and then it dials again.
func (p *conn) acquire(ctx context.Context) error {
	for !p.use() {
		if p.spoiled {
			return sql.ErrConnDone
		}
		p.s.awaitClosed(ctx) // or there would be one more than MaxOpenConns
		s, err := p.c.dial(ctx)
		if err != nil {
			return err
		}
		p.s = s
	}
	return nil
}

// begin begins a call of the driver, which call.end ends. The call gets the
// context that is returned.
func (p *conn) begin(ctx context.Context) (*serverConn, context.Context, *call, error) {
	if !p.used {
		if err := p.acquire(ctx); err != nil {
			p.unchecked = false
			return nil, nil, nil, err
		}
	}
	ctx, call, err := p.s.k.begin(ctx)
	return p.s, ctx, call, err
}

// direct reports whether a call can skip begin and end: the connection is in use
// already (a check of an argument may have begun that), the arguments are checked,
// and there is no killer. It spares the quickest Execs some 3 %; for a query, which
// takes longer, that does not show.
func (p *conn) direct() bool { return p.used && !p.unchecked && p.s.k == nil }

// ResetSession tells that the connection is taken from the pool. It does
// nothing if its server connection is retired: the next operation dials.
//
// Why not dial here? A new connection gets no ResetSession, and a sql.Conn may
// wait for hours between this and its first use.
func (p *conn) ResetSession(ctx context.Context) error {
	s := p.s
	p.used, p.spoiled = false, false // a layer above may not pass IsValid on
	p.deadline, _ = ctx.Deadline()
	if !s.hold() {
		return nil
	}
	var err error
	if s.resetter != nil && s.k.enter() {
		err = s.resetter.ResetSession(ctx)
	}
	s.k.endUse()
	s.giveBack()
	if s.superseded() {
		return nil // whatever the old connection says
	}
	return err
}

// IsValid tells that the connection is being returned to the pool.
//
// If its generation is superseded, the server connection leaves and the proxy
// stays: what the driver says of the old connection does not matter then. Were
// the answer false, database/sql would dial the replacements one after another,
// and could hand one that is superseded to a caller on his last try.
func (p *conn) IsValid() bool {
	s := p.s
	valid := !p.spoiled
	p.used, p.spoiled = false, false
	if !s.hold() {
		return true
	}
	if valid && s.validator != nil && s.k.enter() {
		valid = s.validator.IsValid()
	}
	s.k.endUse()
	if !valid && !s.superseded() {
		return false // database/sql closes the proxy
	}
	s.giveBack()
	return true
}

// Close waits for the driver's Close to have its error, but not for long, and
// not at all if the connection is superseded or another one is closing: if one
// hangs the next may too, and database/sql may hold its lock.
func (p *conn) Close() error {
	if p.c.alone {
		defer p.c.Close()
	}
	s := p.s
	s.k.endUse()
	s.retire()
	if !s.superseded() && p.c.stillClosing() == 0 && s.awaitClosed(context.Background()) {
		return s.err
	}
	p.c.stillClosing(s)
	return nil
}

// Raw returns the driver's connection for use in the callback of sql.Conn.Raw;
// nil if it was killed, or there is none and none can be opened. sql.Conn.Raw
// takes no context, so a dial ends at the deadline that DB.Conn had. If that is
// over, because the program has held the sql.Conn for long, it gets a second. (A
// DB.Conn that waited for a connection may get one that database/sql has opened in
// the background: then its deadline is not known here.)
func (p *conn) Raw() driver.Conn {
	wait := time.Duration(1<<63 - 1)
	if !p.deadline.IsZero() {
		wait = cmp.Or(max(time.Until(p.deadline), 0), patience)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer time.AfterFunc(wait, cancel).Stop() // and not cancel: the driver may hold on to ctx
	if err := p.acquire(ctx); err != nil || !p.s.k.enter() {
		return nil
	}
	return p.s.ci // nobody tells when the callback returns: the next call ends this one
}

func (p *conn) Ping(ctx context.Context) error {
	s, ctx, call, err := p.begin(ctx)
	if err != nil {
		return err
	}
	if pinger, ok := s.ci.(driver.Pinger); ok {
		err = pinger.Ping(ctx)
	}
	return call.end(err)
}

func (p *directConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	if p.direct() && p.s.exec != nil {
		return p.s.exec(ctx, query, args)
	}
	s, ctx, call, err := p.begin(ctx)
	if err != nil {
		return nil, err
	}
	if args, err = p.checked(ctx, args, s.exec != nil); err != nil {
		return nil, call.end(err)
	}
	res, err := s.exec(ctx, query, args)
	return res, call.endExec(args, err)
}

func (p *directConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	s, ctx, call, err := p.begin(ctx)
	if err != nil {
		return nil, err
	}
	if args, err = p.checked(ctx, args, s.query != nil); err != nil {
		return nil, call.end(err)
	}
	r, err := s.query(ctx, query, args)
	return call.endQuery(r, err)
}

func (p *conn) Begin() (driver.Tx, error) { return p.BeginTx(context.Background(), driver.TxOptions{}) }

func (p *conn) BeginTx(caller context.Context, opts driver.TxOptions) (driver.Tx, error) {
	s, ctx, call, err := p.begin(caller)
	if err != nil {
		return nil, err
	}
	t, err := beginTx(ctx, s, opts)
	if err != nil {
		return nil, call.end(err)
	}
	lacking := s.resetter == nil || s.validator == nil
	if call == nil && !lacking {
		return t, nil
	}
	s.k.leave(nil) // the context lives on, until the transaction ends
	return &tx{t, p, call, caller, lacking}, nil
}

// beginTx is ctxDriverBegin of database/sql.
func beginTx(ctx context.Context, s *serverConn, opts driver.TxOptions) (driver.Tx, error) {
	if c, ok := s.ci.(driver.ConnBeginTx); ok {
		return c.BeginTx(ctx, opts)
	}
	if sql.IsolationLevel(opts.Isolation) != sql.LevelDefault {
		return nil, errors.New("sql: driver does not support non-default isolation level")
	}
	if opts.ReadOnly {
		return nil, errors.New("sql: driver does not support read-only transactions")
	}
	t, err := s.ci.Begin()
	if err == nil && ctx.Err() != nil {
		if !s.closed.Load() { // by the last resort of a kill
			t.Rollback()
		}
		return nil, ctx.Err()
	}
	return t, err
}

// A tx is a transaction that can be killed, or one of a driver's connection
// that is no SessionResetter or no Validator. The proxy is both, and so
// database/sql keeps it when it rolls back because the transaction's context
// ended, whereas it would have closed the driver's.
type tx struct {
	driver.Tx
	p       *conn
	call    *call // nil without forceKill
	caller  context.Context
	lacking bool
}

func (t *tx) Commit() error { return t.call.lastCall(t.Tx.Commit) }

func (t *tx) Rollback() error {
	if t.lacking && t.caller.Err() != nil {
		t.p.spoiled, t.p.used = true, false
	}
	return t.call.lastCall(t.Tx.Rollback)
}

func (p *conn) Prepare(query string) (driver.Stmt, error) {
	return p.PrepareContext(context.Background(), query)
}

func (p *conn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	s, ctx, call, err := p.begin(ctx)
	if err != nil {
		return nil, err
	}
	st := &stmt{p: p, text: query}
	if err = call.end(st.prepare(ctx, s)); err != nil {
		return nil, err
	}
	if _, ok := st.si.(driver.ColumnConverter); ok {
		return columnStmt{st}, nil
	}
	return st, nil
}

// CheckNamedValue has the driver's connection check an argument of the
// operation to come. It accepts the argument unseen if there is no connection:
// it has no context to dial with. It does so too if the driver can only exec or
// only query without a statement: which of the two is to come, nobody says, and
// for the other the statement has to check.
func (p *conn) CheckNamedValue(nv *driver.NamedValue) error {
	s := p.s
	p.unchecked = !p.use() || (s.exec == nil) != (s.query == nil)
	if p.unchecked || !s.k.enter() {
		return nil // if it was killed, the operation says so
	}
	return s.k.leave(check(s.checker, nv))
}

// checked returns the arguments of an operation as the driver is to get them.
// If the driver can do the operation with a statement only, it leaves that to
// database/sql.
func (p *conn) checked(ctx context.Context, args []driver.NamedValue, able bool) ([]driver.NamedValue, error) {
	unchecked := p.unchecked
	p.unchecked = false
	switch {
	case !able:
		return nil, driver.ErrSkip
	case unchecked:
		return convert(ctx, p.s.checker, nil, args)
	}
	return args, nil
}
