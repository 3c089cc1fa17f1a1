package hotload

import (
	"context"
	"database/sql/driver"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"time"
)

// The states of a server connection.
//
//	state    meaning                                      becomes
//	idle     nothing has run on it since it was opened    taken: an operation begins; or, for a moment,
//	         or taken from the pool                       a ResetSession or a Stmt.Close in the pool
//	                                                      retired: its generation is superseded
//	taken    its owner's alone: something runs on it,     idle: returned to the pool, or the moment is over
//	         or has run                                   retired: the same, its generation superseded meanwhile
//	retired  detached from its proxy, which dials when    nothing
//	         it is next used; closing, or closed
//
// The goroutine that sets taken owns the connection until it is idle again. The
// goroutine that sets retired closes it; no other does. Closing a proxy retires
// its server connection from whatever state. (There is one exception: a kill
// closes a connection that stays taken until its owner returns it.)
//
// A change comes at any time, and waits for nobody. Two rules see to it that
// nothing runs on an old value and nothing is forgotten:
//
//  1. publish first stores the new generation and then sweeps the connections of
//     the old one: it retires those that are idle. (It must not look the other
//     way round: what is dialled between the two would be missed.)
//  2. An owner first changes the state and then loads the generation: in take,
//     and again in giveBack. Superseded, he retires the connection himself.
//
// All of these are atomic operations in one total order. So if the owner, having
// made the state taken, loads the old generation, the new one was stored later,
// and the sweep later still: it finds the connection taken, leaves it alone and
// counts it as in use. And if the sweep found it taken, the owner who makes it
// idle afterwards loads the new generation. One of the two always sees the other.
const (
	idle int32 = iota
	taken
	retired
)

// A serverConn is a connection of the driver. The proxy that database/sql
// holds is apart from it: a proxy outlives its server connection, and what is
// done to a server connection that was retired cannot touch its successor.
type serverConn struct {
	gen   *generation
	index int // in gen.conns, guarded by gen.mu
	ci    driver.Conn
	k     *killer // nil without forceKill; its methods then do nothing
	state atomic.Int32

	// What most operations ask of ci; nil where the driver has none.
	exec      func(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error)
	query     func(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error)
	resetter  driver.SessionResetter
	validator driver.Validator
	checker   driver.NamedValueChecker

	stmts map[*stmt]driver.Stmt // open; the owner's, then whoever closes the connection's

	// The closing begins, what is open on the connection closes, the driver's Close
	// begins, it returns: closing, closed and gone tell these moments.
	cancel  context.CancelFunc        // ends the dial's context
	closing atomic.Pointer[time.Time] // when its closing began; nil if it has not
	closed  atomic.Bool               // ci.Close has begun
	gone    chan struct{}             // closed when ci is
	err     error                     // of ci.Close, published by gone
}

func newServerConn(g *generation, ci driver.Conn, cancel context.CancelFunc) *serverConn {
	s := &serverConn{gen: g, ci: ci, cancel: cancel, gone: make(chan struct{})}
	if g.c.forceKill {
		s.k = &killer{s: s}
	}
	s.resetter, _ = ci.(driver.SessionResetter)
	s.validator, _ = ci.(driver.Validator)
	s.checker, _ = ci.(driver.NamedValueChecker)
	switch ci := ci.(type) {
	case driver.ExecerContext:
		s.exec = ci.ExecContext
	case driver.Execer:
		s.exec = func(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
			return plain(ctx, args, func(values []driver.Value) (driver.Result, error) { return ci.Exec(query, values) })
		}
	}
	switch ci := ci.(type) {
	case driver.QueryerContext:
		s.query = ci.QueryContext
	case driver.Queryer:
		s.query = func(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
			return plain(ctx, args, func(values []driver.Value) (driver.Rows, error) { return ci.Query(query, values) })
		}
	}
	return s
}

// superseded reports whether another generation is in force. It is true also of
// a candidate's connection, and if the same value has come back as a new
// generation.
func (s *serverConn) superseded() bool { return s.gen != s.gen.c.current.Load() }

// hold makes the caller the owner, for a moment in which nothing begins: the
// session is reset, a statement of the pool closes, the connection is returned.
// It reports false if the connection is retired. Only the sweep can win this swap,
// and the sweep closes the connection.
//
// The caller has the proxy, and database/sql lets only one have it at a time. So
// if the connection is taken already it is the caller's.
func (s *serverConn) hold() bool {
	return s.state.Load() == taken || s.state.CompareAndSwap(idle, taken)
}

// take is hold for an operation. It reports false also if the connection is
// superseded: then it is retired now.
func (s *serverConn) take() bool {
	if !s.hold() {
		return false
	}
	// Rule 2: a change may have come before the swap. Nothing has run yet, so
	// nothing is lost.
	if s.superseded() {
		s.retire()
		return false
	}
	return true
}

// giveBack is the end of take and of hold.
func (s *serverConn) giveBack() {
	s.state.Store(idle)
	if s.superseded() { // rule 2: the sweep may have found it taken, and left it
		s.retireIdle()
	}
}

// retireIdle retires the connection if nobody owns it. Of several that try at a
// time one succeeds, and the others have nothing to do.
func (s *serverConn) retireIdle() {
	if s.state.CompareAndSwap(idle, retired) {
		s.startClosing(nil)
	}
}

// retire retires the connection for its owner, unless the sweep has done so.
func (s *serverConn) retire() {
	if s.state.Swap(retired) != retired {
		s.startClosing(nil)
	}
}

// startClosing closes the connection in the background, so that nobody has to
// wait for a slow Close: after the call in progress has returned, if there is
// one.
func (s *serverConn) startClosing(callDone <-chan struct{}) {
	s.gen.c.inBackground(func() { s.close(callDone) })
}

// closeAll closes connections that have been retired, of which none waits for
// another. Each goroutine starts the next before it calls the driver. Started in
// a loop, ten thousand of them would keep all else in the program from running.
func closeAll(conns []*serverConn) {
	if len(conns) > 0 {
		conns[0].gen.c.inBackground(func() {
			closeAll(conns[1:])
			conns[0].close(nil)
		})
	}
}

// close closes what is open on the connection and then the connection, as
// database/sql does: SQLite keeps a closed connection's file open while a
// statement of it is.
func (s *serverConn) close(callDone <-chan struct{}) {
	// A connection that was killed is retired once more when it is returned.
	if now := time.Now(); !s.closing.CompareAndSwap(nil, &now) {
		return
	}
	if callDone != nil {
		select {
		case <-callDone:
		case <-time.After(patience):
			// The last resort: the driver's Close, beside the call that does not
			// return. What is open is the call's until then, and closes when it
			// returns at last. Until then its caller waits. "Drained" does not.
			s.closeConn()
			go func() { <-callDone; s.closeChildren() }()
			return
		}
	}
	s.closeChildren()
	s.closeConn()
}

// closeChildren closes the rows and the statements that are open on a
// connection.
func (s *serverConn) closeChildren() {
	s.k.closeRows()
	for _, si := range s.stmts {
		s.closeChild(func() error { return si.Close() })
	}
}

// closeChild closes one of them. With forceKill, one that hangs for longer than
// patience does not keep the connection open. Without it, nothing is closed under
// a running call.
func (s *serverConn) closeChild(f func() error) {
	if s.k != nil {
		defer time.AfterFunc(patience, func() { s.gen.c.inBackground(s.closeConn) }).Stop()
	}
	safely(f)
}

// closeConn calls the driver's Close, once.
func (s *serverConn) closeConn() {
	if !s.k.claim(&s.closed) {
		return // the last resort, or the limit of closeChildren, was first
	}
	s.err = safely(func() error { return s.ci.Close() })
	s.cancel()
	close(s.gone)
	s.gen.release(s)
}

// isClosed reports whether a channel that nobody sends on is closed.
func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// awaitClosed waits until a connection that is closing is closed, while patience
// with it lasts and for at most half of the time that the caller has.
func (s *serverConn) awaitClosed(ctx context.Context) bool {
	wait := patience
	if began := s.closing.Load(); began != nil {
		wait -= time.Since(*began)
	}
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline)/2)
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	select {
	case <-s.gone:
	case <-ctx.Done():
	}
	return isClosed(s.gone)
}

// safely calls the driver in a goroutine of hotload's, where a panic would end
// the program, and makes an error of it. Pass a function literal: for a method
// of a nil value, s.ci.Close alone would panic before safely is called.
func safely(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &driverPanic{v, debug.Stack()}
		}
	}()
	return f()
}

// A driverPanic is a panic of the driver as an error.
type driverPanic struct {
	value any
	stack []byte
}

// Error tells the text of a runtime error, such as an index out of range. Any
// other text is the driver's, and may quote the connection string.
func (p *driverPanic) Error() string {
	if e, ok := p.value.(runtime.Error); ok {
		return "hotload: the driver panicked: " + e.Error()
	}
	return fmt.Sprintf("hotload: the driver panicked with a %T", p.value)
}

// Stack returns the stack of the panic, which holds no strings of the program.
// It can be had with errors.As and an interface that has this method.
func (p *driverPanic) Stack() []byte { return p.stack }
