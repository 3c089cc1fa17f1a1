package hotload

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A killer is what forceKill adds to a server connection: it can be ended while
// its owner uses it. driver.Conn is not for two goroutines, so a kill does not
// close the connection under a running call, where some drivers have data races
// and others answer ErrBadConn, upon which database/sql runs the statement
// again. It cancels the contexts that the driver has, and the connection closes
// when the call in progress has returned.
//
// After a kill the owner still has the connection, and is told so by each call
// that he makes: it is taken until he returns it. But he enters the driver no
// more. From then on the driver's connection, rows and statements belong to who
// closes them.
//
// Why can this not miss a connection whose first use begins in the instant of the
// kill? The kill comes after the sweep, so by the rules in server.go such a
// connection is taken, or its owner will see the change and run nothing on it.
// And whether a call has begun on a taken one is decided under mu.
//
// Without forceKill a server connection has none. The methods of a nil *killer
// and of a nil *call have nothing to do. Those that every operation goes through
// are in two parts, so that the compiler can inline the test for nil.
type killer struct {
	s *serverConn

	mu sync.Mutex // guards the following fields
	// busy says that a call of the driver is in progress. After Raw it stays true,
	// because nobody tells when the callback returns, until another call begins or
	// the connection is returned.
	busy     bool
	killed   bool          // goes from false to true once
	callDone chan struct{} // made by a kill that finds it busy; closed when the call has returned
	calls    []*call       // whose contexts the driver may hold on to
}

// A call is a call of the driver and what it began: its context lives until the
// call, the rows or the transaction has ended. lib/pq and pgx watch the context
// for as long.
type call struct {
	s      *serverConn
	cancel context.CancelCauseFunc
	rows   driver.Rows // open; nil if the call has brought none. Set under k.mu, before the call ends
}

// enter begins a call of the driver, which leave ends. It reports false if the
// connection was killed.
func (k *killer) enter() bool { return k == nil || k.enterSlow() }

func (k *killer) enterSlow() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.enterLocked()
}

func (k *killer) enterLocked() bool {
	if k.killed {
		k.leaveLocked(nil) // a Raw callback has returned: the closing need not wait for it
		return false
	}
	k.busy = true
	return true
}

// leave ends what enter or begin began. If the call was killed and failed, its
// error becomes one that database/sql does not take for a reason to run the
// call again. If it succeeded, it says so.
func (k *killer) leave(err error) error {
	if k == nil {
		return err
	}
	return k.leaveSlow(err)
}

func (k *killer) leaveSlow(err error) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.leaveLocked(err)
}

func (k *killer) leaveLocked(err error) error {
	k.busy = false
	if k.callDone != nil {
		close(k.callDone)
		k.callDone = nil
	}
	switch {
	case !k.killed, err == nil, err == ErrKilled, err == driver.ErrSkip, err == driver.ErrRemoveArgument:
		return err // database/sql compares the last two with ==
	}
	return &killedError{err}
}

// begin is enter for a call with a context, which it derives from the caller's.
func (k *killer) begin(ctx context.Context) (context.Context, *call, error) {
	if k == nil {
		return ctx, nil, nil
	}
	return k.beginSlow(ctx)
}

func (k *killer) beginSlow(ctx context.Context) (context.Context, *call, error) {
	c := &call{s: k.s}
	ctx, c.cancel = context.WithCancelCause(ctx)
	k.mu.Lock()
	entered := k.enterLocked()
	if entered {
		k.calls = append(k.calls, c)
	}
	k.mu.Unlock()
	if !entered {
		c.cancel(ErrKilled)
		return nil, nil, ErrKilled
	}
	return ctx, c, nil
}

// end ends the call and its context.
func (c *call) end(err error) error {
	if c == nil {
		return err
	}
	k := c.s.k
	k.mu.Lock()
	// This removes the call's rows too; the owner has closed them. The call may be
	// gone already: a program that began a transaction inside a Raw callback can end
	// it twice.
	k.calls = slices.DeleteFunc(k.calls, func(other *call) bool { return other == c })
	err = k.leaveLocked(err)
	k.mu.Unlock()
	c.cancel(nil)
	return err
}

// endExec is end for an Exec. If it may have set a cursor, through sql.Out, its
// context lives on until the connection is returned to the pool, or the cursor
// would end with the Exec. (A kill ends the context, but guards no calls on the
// cursor: drivers assert its type, so it cannot be wrapped.)
func (c *call) endExec(args []driver.NamedValue, err error) error {
	for i := range args {
		if out, ok := args[i].Value.(sql.Out); ok && err == nil && c != nil {
			switch out.Dest.(type) {
			case *driver.Rows, *any:
				return c.s.k.leave(nil)
			}
		}
	}
	return c.end(err)
}

// endQuery ends a call that brought rows, with which its context lives on.
func (c *call) endQuery(r driver.Rows, err error) (driver.Rows, error) {
	if c == nil || err != nil || r == nil {
		return r, c.end(err)
	}
	k := c.s.k
	k.mu.Lock()
	c.rows = r // before the call has ended: if it was killed, these rows are to be closed
	k.leaveLocked(nil)
	k.mu.Unlock()
	return wrapRows(&rows{Rows: r, call: c}), nil
}

// lastCall makes the last call that needs the context: the end of rows or of a
// transaction. After a kill it is not made: the rows close with the connection,
// and the transaction is rolled back by its end. So a Commit fails.
func (c *call) lastCall(f func() error) error {
	if c != nil && !c.s.k.enter() {
		return ErrKilled
	}
	return c.end(f())
}

// endUse ends all use: the connection is taken from the pool, returned to it, or
// closed. It ends the contexts that the driver may hold on to.
func (k *killer) endUse() {
	if k != nil {
		k.endUseSlow()
	}
}

func (k *killer) endUseSlow() {
	k.mu.Lock()
	k.leaveLocked(nil) // Raw
	var ended []*call
	if !k.killed && len(k.calls) > 0 { // after a kill, who closes the connection has to find their rows
		ended, k.calls = k.calls, nil
	}
	k.mu.Unlock()
	for _, c := range ended {
		c.cancel(nil)
	}
}

// closeRows closes the rows that are open, for who closes the connection. After
// a kill no call comes or goes any more; and if database/sql closes the
// connection, nobody else has it.
func (k *killer) closeRows() {
	if k == nil {
		return
	}
	k.mu.Lock()
	calls := k.calls
	k.mu.Unlock()
	for _, c := range calls {
		if c.rows != nil {
			k.s.closeChild(func() error { return c.rows.Close() })
		}
	}
}

// claim sets closed and returns true for the first caller only. It takes k.mu so
// that the driver's Close cannot begin while rows copy their buffer.
func (k *killer) claim(closed *atomic.Bool) bool {
	if k != nil {
		k.mu.Lock()
		defer k.mu.Unlock()
	}
	return closed.CompareAndSwap(false, true)
}

// kill ends what is in use. It reports false if nothing is. The generation is
// superseded and swept, so what is idle is about to be retired by its owner.
//
// A connection that is taken is in use, save for the moment of a ResetSession or
// of a Stmt.Close in the pool. To kill it then does no harm: its proxy finds the
// connection retired afterwards, and dials. It even does good where the server
// is frozen and the call would never return.
func (s *serverConn) kill() bool {
	k := s.k
	k.mu.Lock()
	if k.killed || s.state.Load() != taken {
		k.mu.Unlock()
		return false
	}
	k.killed = true // from here on the owner enters no more
	if k.busy {
		k.callDone = make(chan struct{})
	}
	callDone, calls := k.callDone, slices.Clone(k.calls)
	k.mu.Unlock()
	for _, c := range calls {
		c.cancel(ErrKilled)
	}
	s.startClosing(callDone)
	return true
}

// killLater waits until the time of a superseded generation is over. If its
// value is in force again by then, nothing is killed, and the time begins anew
// when that is superseded in its turn.
func (c *connector) killLater(g *generation) {
	over, back := time.After(c.grace), (<-chan struct{})(nil)
	for {
		select {
		case <-over:
			current := c.current.Load()
			if current.value != g.value {
				g.kill()
				return
			}
			back = current.ctx.Done()
		case <-back:
			over, back = time.After(c.grace), nil
		case <-g.drained: // or it would be kept in memory for the whole time
			return
		case <-c.ctx.Done():
			return
		}
	}
}

// kill kills what is in use on a superseded generation.
func (g *generation) kill() {
	if !g.retain() { // it drains when the kill has been logged, not before
		return
	}
	g.mu.Lock()
	conns := slices.Clone(g.conns)
	g.mu.Unlock()
	n := 0
	for _, s := range conns {
		if s.kill() {
			n++
		}
	}
	if n > 0 {
		g.c.logger().Warn("hotload: connections killed", "generation", g.number, "killed", n)
	}
	g.release(nil)
}

// A killedError is the error of a call that was killed. It matches ErrKilled
// and nothing else. It has no Unwrap on purpose: the driver's error may be
// ErrBadConn, and database/sql would run the statement again. That error can be
// had with errors.As.
type killedError struct{ err error }

func (e *killedError) Error() string        { return ErrKilled.Error() + ": " + e.err.Error() }
func (e *killedError) Is(target error) bool { return target == ErrKilled }
func (e *killedError) As(target any) bool   { return errors.As(e.err, target) }

// A rows is rows that can be killed. Where the driver's lack an optional
// interface, it answers as database/sql would have.
type rows struct {
	driver.Rows
	call    *call
	columns []string // of the result set
	more    bool     // another follows
	buf     []byte   // the bytes of the row, while Next's results are valid
}

// wrapRows gives rows the optional interfaces that only a newer Go has.
var wrapRows = func(r *rows) driver.Rows { return r }

// Columns asks the driver once for each result set. A Rows.Scan that fails asks
// for them without database/sql's lock, perhaps during another call: Next has
// asked before it.
func (r *rows) Columns() []string {
	if r.columns == nil {
		ask(r, func(rows driver.Rows) { r.columns = rows.Columns() })
	}
	return r.columns
}

func (r *rows) Close() error { return r.call.lastCall(r.Rows.Close) }

// Next copies the bytes of the row. They are a part of the driver's buffer,
// which is good until the next call on its connection or its rows, and a kill
// makes one at any time: it closes them. database/sql and the program read the
// bytes after Next has returned.
func (r *rows) Next(dest []driver.Value) error {
	if !r.call.s.k.enter() {
		return ErrKilled
	}
	return r.leave(r.noteMore(r.Rows.Next(dest)), func() {
		r.buf = r.buf[:0]
		for i, v := range dest {
			if b, ok := v.([]byte); ok {
				dest[i] = r.keep(b)
			}
		}
	})
}

// keep copies a part of the driver's buffer into one that is the rows' own.
func (r *rows) keep(b []byte) []byte {
	if len(b) == 0 {
		return b // nil is NULL, and empty is not
	}
	n := len(r.buf)
	r.buf = append(r.buf, b...)
	return r.buf[n:len(r.buf):len(r.buf)]
}

// noteMore asks at the end of a result set whether another follows, in the same call
// of the driver: afterwards the connection can have been killed, and rows that
// have ended without an error must close.
func (r *rows) noteMore(err error) error {
	if sets, ok := r.Rows.(driver.RowsNextResultSet); ok && err == io.EOF && !r.call.s.closed.Load() {
		r.more = sets.HasNextResultSet()
	}
	return err
}

// leave ends a call that read a row or a part of one, which copy copies. It runs
// under k.mu, which claim takes too. So the last resort has either set closed
// already, and this is an error, or it closes the connection only after the copy.
func (r *rows) leave(err error, copy func()) error {
	s := r.call.s
	s.k.mu.Lock()
	defer s.k.mu.Unlock()
	if err == nil && s.closed.Load() {
		err = ErrKilled
	} else if err == nil {
		copy()
	}
	return s.k.leaveLocked(err)
}

func (r *rows) HasNextResultSet() bool { return r.more }

func (r *rows) NextResultSet() error {
	sets, ok := r.Rows.(driver.RowsNextResultSet)
	if !ok {
		return io.EOF
	}
	if !r.call.s.k.enter() {
		return ErrKilled
	}
	r.columns = nil
	return r.call.s.k.leave(sets.NextResultSet())
}

// ask calls the driver's rows unless they lack an interface, or were killed.
func ask[Interface any](r *rows, f func(Interface)) {
	if prop, ok := r.Rows.(Interface); ok && r.call.s.k.enter() {
		f(prop)
		r.call.s.k.leave(nil)
	}
}

func (r *rows) ColumnTypeScanType(i int) reflect.Type {
	t := reflect.TypeFor[any]()
	ask(r, func(prop driver.RowsColumnTypeScanType) { t = prop.ColumnTypeScanType(i) })
	return t
}

func (r *rows) ColumnTypeDatabaseTypeName(i int) (name string) {
	ask(r, func(prop driver.RowsColumnTypeDatabaseTypeName) { name = prop.ColumnTypeDatabaseTypeName(i) })
	return name
}

func (r *rows) ColumnTypeLength(i int) (length int64, ok bool) {
	ask(r, func(prop driver.RowsColumnTypeLength) { length, ok = prop.ColumnTypeLength(i) })
	return length, ok
}

func (r *rows) ColumnTypeNullable(i int) (nullable, ok bool) {
	ask(r, func(prop driver.RowsColumnTypeNullable) { nullable, ok = prop.ColumnTypeNullable(i) })
	return nullable, ok
}

func (r *rows) ColumnTypePrecisionScale(i int) (precision, scale int64, ok bool) {
	ask(r, func(prop driver.RowsColumnTypePrecisionScale) {
		precision, scale, ok = prop.ColumnTypePrecisionScale(i)
	})
	return precision, scale, ok
}
