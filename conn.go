package hotload

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"sync/atomic"
	"time"
)

// The states of a server connection. Who makes one taken owns it until it is
// idle again; who makes one parked closes it.
//
//	state   meaning                                      becomes
//	idle    in the pool, or new                          taken: ResetSession, or the first operation of
//	                                                     a new one, or a Stmt.Close in the pool
//	                                                     parked: its generation is superseded
//	taken   in use                                       idle: returned to the pool (IsValid)
//	                                                     parked: returned, and its generation is superseded;
//	                                                     superseded before anything ran
//	parked  detached; the proxy dials when next used     nothing
//
// Closing the proxy parks its server connection from whatever state.
const (
	idle int32 = iota
	taken
	parked
)

// A serverConn is a connection of the driver. The proxy that database/sql
// holds is apart from it: a proxy outlives its server connection, and what is
// done to a server connection that was retired cannot touch its successor.
type serverConn struct {
	gen   *generation
	index int // in gen.conns, guarded by gen.mu
	ci    driver.Conn
	k     *killer // nil without forceKill
	state atomic.Int32

	// What most operations ask of ci; nil where the driver has none.
	execer    driver.ExecerContext
	queryer   driver.QueryerContext
	resetter  driver.SessionResetter
	validator driver.Validator
	checker   driver.NamedValueChecker
	odd       bool // only one of execer and queryer is there

	stmts map[*stmt]driver.Stmt // open; used by the owner alone

	cancel  context.CancelFunc        // ends the dial's context
	closing atomic.Pointer[time.Time] // when its closing began; nil if it has not
	closed  atomic.Bool               // ci.Close has begun
	gone    chan struct{}             // closed when ci is
	err     error                     // of ci.Close, published by gone
}

func newServerConn(g *generation, ci driver.Conn, cancel context.CancelFunc) *serverConn {
	s := &serverConn{gen: g, ci: ci, cancel: cancel, gone: make(chan struct{})}
	if g.c.forceKill {
		s.k = new(killer)
	}
	s.resetter, _ = ci.(driver.SessionResetter)
	s.validator, _ = ci.(driver.Validator)
	s.checker, _ = ci.(driver.NamedValueChecker)
	switch ci := ci.(type) {
	case driver.ExecerContext:
		s.execer = ci
	case driver.Execer:
		s.execer = plainExecer{ci}
	}
	switch ci := ci.(type) {
	case driver.QueryerContext:
		s.queryer = ci
	case driver.Queryer:
		s.queryer = plainQueryer{ci}
	}
	s.odd = (s.execer == nil) != (s.queryer == nil)
	return s
}

// superseded reports whether another value is in force.
func (s *serverConn) superseded() bool { return s.gen != s.gen.c.gen.Load() }

// own makes the caller, who has the proxy, the owner of the server connection.
// It reports false if there is none any more.
func (s *serverConn) own() bool {
	return s.state.Load() == taken || s.state.CompareAndSwap(idle, taken)
}

// disown is the end of own.
func (s *serverConn) disown() {
	s.state.Store(idle)
	if s.superseded() {
		s.retire()
	}
}

// retire closes the connection unless it is in use.
func (s *serverConn) retire() bool {
	if !s.state.CompareAndSwap(idle, parked) {
		return false
	}
	s.close(nil)
	return true
}

// park closes the connection, whose owner the caller is. It reports false if it
// was parked before.
func (s *serverConn) park() bool {
	if s.state.Swap(parked) == parked {
		return false
	}
	s.close(nil)
	return true
}

// close closes the driver's connection in the background, so that nobody has
// to wait for it, when the call in progress has returned; nil if there is none.
func (s *serverConn) close(returned <-chan struct{}) {
	s.gen.c.inBackground(func() { s.shut(returned) })
}

// closeAll is close for many, of which none waits for another. Each goroutine
// starts the next before it calls the driver: started at the same time, they
// would keep all else in the program from running.
func closeAll(conns []*serverConn) {
	if len(conns) > 0 {
		conns[0].gen.c.inBackground(func() {
			closeAll(conns[1:])
			conns[0].shut(nil)
		})
	}
}

func (s *serverConn) shut(returned <-chan struct{}) {
	if now := time.Now(); !s.closing.CompareAndSwap(nil, &now) {
		return // killed
	}
	if returned != nil {
		select {
		case <-returned:
		case <-time.After(patience): // the last resort
			s.closeConn()
			return
		}
	}
	s.closeStmts()
	s.closeConn()
}

// closeStmts closes the prepared statements first, as database/sql does. With
// forceKill one that hangs does not keep the connection open.
func (s *serverConn) closeStmts() {
	if len(s.stmts) == 0 {
		return
	}
	var late atomic.Bool
	if s.k != nil {
		limit := time.AfterFunc(patience, func() {
			late.Store(true)
			s.gen.c.inBackground(s.closeConn)
		})
		defer limit.Stop()
	}
	for _, si := range s.stmts {
		if !late.Load() {
			safely(si.Close)
		}
	}
}

func (s *serverConn) closeConn() {
	if !s.closed.CompareAndSwap(false, true) {
		return
	}
	s.err = safely(func() error { return s.ci.Close() }) // ci can be nil
	s.cancel()
	s.k.done()
	close(s.gone)
	s.gen.release(s)
}

func (s *serverConn) isGone() bool {
	select {
	case <-s.gone:
		return true
	default:
		return false
	}
}

// awaitClosed waits until a connection that is closing is closed, while patience
// with it lasts and for at most half of the time that the caller has.
func (s *serverConn) awaitClosed(ctx context.Context) bool {
	if s.isGone() {
		return true
	}
	wait := patience
	if began := s.closing.Load(); began != nil {
		wait -= time.Since(*began)
	}
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline)/2)
	}
	limit := time.NewTimer(wait)
	defer limit.Stop()
	select {
	case <-s.gone:
		return true
	case <-limit.C:
	case <-ctx.Done():
	}
	return false
}

// A conn is the proxy that database/sql holds as its driver.Conn: a place for
// one server connection after another. As database/sql makes one call at a
// time on it, its fields need no lock; the retiring of a generation works on
// server connections, never on proxies.
type conn struct {
	c      *connector
	s      *serverConn
	alone  bool // opened by Driver.Open: closing it closes the connector
	closed bool

	// used means that something has run on s since it was taken from the pool.
	used bool
	// unchecked means that the arguments for the operation to come are as the
	// program passed them: there was no connection to check them.
	unchecked bool
	// spoiled means that database/sql would have closed the driver's
	// connection by now: see tx.
	spoiled bool
}

var (
	_ driver.ConnPrepareContext = (*conn)(nil)
	_ driver.ConnBeginTx        = (*conn)(nil)
	_ driver.Pinger             = (*conn)(nil)
	_ driver.NamedValueChecker  = (*conn)(nil)
	_ driver.SessionResetter    = (*conn)(nil)
	_ driver.Validator          = (*conn)(nil)
	_ driver.ExecerContext      = (*directConn)(nil)
	_ driver.QueryerContext     = (*directConn)(nil)
)

// A directConn is the conn of a driver that can exec or query without a
// statement. Of others database/sql must not find ExecContext and QueryContext,
// because it would convert the arguments before it prepared a statement.
type directConn struct{ conn }

func newConn(c *connector, s *serverConn, alone bool) driver.Conn {
	p := conn{c: c, s: s, alone: alone}
	if s.execer == nil && s.queryer == nil {
		return &p
	}
	return &directConn{p}
}

// take reports whether there is a server connection to run something on. One
// that was superseded before anything ran is parked.
func (p *conn) take() bool {
	if p.used {
		return true
	}
	switch s := p.s; {
	case p.spoiled || !s.own():
	case !s.k.use(s):
		s.park()
	default:
		p.used = true
	}
	return p.used
}

// acquire dials if there is no server connection to run something on.
func (p *conn) acquire(ctx context.Context) error {
	for !p.take() {
		switch {
		case p.spoiled:
			return sql.ErrConnDone
		case p.closed:
			return driver.ErrBadConn
		}
		p.s.awaitClosed(ctx)
		s, err := p.c.dial(ctx)
		if err != nil {
			return err
		}
		p.s = s
	}
	return nil
}

// ready reports that a call has nothing to begin and nothing to end: its
// arguments have taken the connection, without forceKill.
func (p *conn) ready() bool { return p.used && !p.unchecked && p.s.k == nil }

// begin begins a call of the driver.
func (p *conn) begin(ctx context.Context) (*serverConn, context.Context, *call, error) {
	if !p.used && !p.take() {
		if err := p.acquire(ctx); err != nil {
			p.unchecked = false
			return nil, nil, nil, err
		}
	}
	s := p.s
	if s.k == nil {
		return s, ctx, nil, nil
	}
	ctx, call, err := s.k.begin(ctx)
	return s, ctx, call, err
}

// ResetSession tells that the connection is taken from the pool. It does
// nothing if there is none: the next operation dials.
func (p *conn) ResetSession(ctx context.Context) error {
	s := p.s
	p.used, p.spoiled = false, false // also for a layer above that does not pass IsValid on
	if !s.own() {
		return nil
	}
	var err error
	if s.resetter != nil && s.k.enter() {
		err = s.resetter.ResetSession(ctx)
	}
	s.k.done()
	if s.disown(); s.superseded() {
		return nil
	}
	return err
}

// IsValid tells that the connection is being returned to the pool. A server
// connection whose generation is superseded leaves; the proxy stays.
func (p *conn) IsValid() bool {
	s := p.s
	valid := !p.spoiled
	p.used, p.spoiled = false, false
	if !s.own() {
		return true
	}
	if valid && s.validator != nil && s.k.enter() {
		valid = s.validator.IsValid()
	}
	s.k.done()
	if !valid && !s.superseded() {
		return false
	}
	s.disown()
	return true
}

// Close waits for the driver's Close, but not for long, and not at all if the
// connection's generation is superseded: database/sql may hold its lock.
func (p *conn) Close() (err error) {
	if p.alone {
		defer func() {
			if cerr := p.c.Close(); cerr != nil {
				err = cerr
			}
		}()
	}
	s := p.s
	p.closed, p.used = true, false
	p.c.mu.Lock()
	hung := len(p.c.stillLeaving(nil)) > 0 // if one hangs, the next may too
	p.c.mu.Unlock()
	if s.park() && !s.superseded() && !hung && s.awaitClosed(context.Background()) {
		return s.err
	}
	p.c.mu.Lock()
	defer p.c.mu.Unlock()
	p.c.stillLeaving(s)
	return nil
}

// Raw returns the driver's connection for use in the callback of sql.Conn.Raw;
// nil if it was killed, or there is none and none can be opened.
func (p *conn) Raw() driver.Conn {
	if err := p.acquire(context.Background()); err != nil || !p.s.k.enter() {
		return nil
	}
	return p.s.ci // the call does not end here, but when the next one does
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
	if p.ready() && p.s.execer != nil {
		return p.s.execer.ExecContext(ctx, query, args)
	}
	s, ctx, call, err := p.begin(ctx)
	if err != nil {
		return nil, err
	}
	if p.unchecked || s.execer == nil {
		if args, err = p.convert(args, s.execer != nil); err != nil {
			return nil, call.end(err)
		}
	}
	res, err := s.execer.ExecContext(ctx, query, args)
	if call != nil {
		err = call.endExec(args, err)
	}
	return res, err
}

func (p *directConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	s, ctx, call, err := p.begin(ctx)
	if err != nil {
		return nil, err
	}
	if p.unchecked || s.queryer == nil {
		if args, err = p.convert(args, s.queryer != nil); err != nil {
			return nil, call.end(err)
		}
	}
	r, err := s.queryer.QueryContext(ctx, query, args)
	if call != nil {
		return call.rows(r, err)
	}
	return r, err
}

func (p *conn) Begin() (driver.Tx, error) {
	return p.BeginTx(context.Background(), driver.TxOptions{})
}

func (p *conn) BeginTx(caller context.Context, opts driver.TxOptions) (driver.Tx, error) {
	s, ctx, call, err := p.begin(caller)
	if err != nil {
		return nil, err
	}
	t, err := begin(ctx, s.ci, opts)
	if err != nil {
		return nil, call.end(err)
	}
	lacking := s.resetter == nil || s.validator == nil
	if call == nil && !lacking {
		return t, nil
	}
	s.k.leave(nil)
	return &tx{t, p, call, caller, lacking}, nil
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

func (t *tx) Commit() error { return t.end(t.Tx.Commit) }

func (t *tx) Rollback() error {
	if t.lacking && t.caller.Err() != nil {
		t.p.spoiled, t.p.used = true, false
	}
	return t.end(t.Tx.Rollback)
}

func (t *tx) end(f func() error) error {
	if t.call == nil {
		return f()
	}
	return t.call.last(f)
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
// operation to come. Without a connection it accepts the argument as it is:
// there is no context to dial with. So it does if it cannot tell whether the
// driver needs a statement for the operation, which then checks.
func (p *conn) CheckNamedValue(nv *driver.NamedValue) error {
	s := p.s
	p.unchecked = !(p.used || p.take()) || s.odd
	if p.unchecked || !s.k.enter() {
		return nil
	}
	err := driver.ErrSkip
	if s.checker != nil {
		err = s.checker.CheckNamedValue(nv)
	}
	s.k.leave(nil)
	return err
}

// convert returns the arguments of an operation as database/sql would have
// converted them, had there been a connection to check them. It leaves to
// database/sql what the driver can do with a statement only.
func (p *conn) convert(args []driver.NamedValue, able bool) ([]driver.NamedValue, error) {
	p.unchecked = false
	if !able {
		return nil, driver.ErrSkip
	}
	return convert(p.s.checker, nil, args)
}

// begin is ctxDriverBegin of database/sql.
func begin(ctx context.Context, ci driver.Conn, opts driver.TxOptions) (driver.Tx, error) {
	if c, ok := ci.(driver.ConnBeginTx); ok {
		return c.BeginTx(ctx, opts)
	}
	if sql.IsolationLevel(opts.Isolation) != sql.LevelDefault {
		return nil, errors.New("sql: driver does not support non-default isolation level")
	}
	if opts.ReadOnly {
		return nil, errors.New("sql: driver does not support read-only transactions")
	}
	t, err := ci.Begin()
	if err == nil && ctx.Err() != nil {
		t.Rollback()
		return nil, ctx.Err()
	}
	return t, err
}
