package hotload

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"reflect"
	"sync"
	"time"
)

// A killer is what forceKill adds to a server connection: it can be killed
// while its owner uses it. A kill cancels the contexts that the driver holds,
// and closes the connection when the call in progress has returned, or after
// patience with it. Without forceKill a server connection has none: the methods
// of a nil *killer and a nil *call have nothing to do.
type killer struct {
	mu       sync.Mutex // guards the following fields
	used     bool       // something has run since the connection was taken from the pool
	busy     bool       // a call is in progress, or Raw was called
	killed   bool
	returned chan struct{} // made by a kill that finds it busy, closed when the call returns
	calls    []*call       // whose contexts the driver holds
}

// A call is a call of the driver and its context, which lives until it is ended:
// with the call, or with the rows or the transaction that it began. It is what
// context.WithCancelCause makes of the caller's, but is made only when the
// driver asks for Done, or when it is killed: the quickest calls never do.
type call struct {
	context.Context // the caller's
	k               *killer

	// Guarded by k.mu.
	index  int // in k.calls; -1 once it has ended
	made   context.Context
	cancel context.CancelCauseFunc
}

func (c *call) makeLocked() context.Context {
	if c.made == nil {
		c.made, c.cancel = context.WithCancelCause(c.Context)
		if c.index < 0 {
			c.cancel(nil)
		}
	}
	return c.made
}

func (c *call) Done() <-chan struct{} {
	c.k.mu.Lock()
	defer c.k.mu.Unlock()
	return c.makeLocked().Done()
}

func (c *call) Err() error {
	c.k.mu.Lock()
	defer c.k.mu.Unlock()
	if c.made == nil && c.index >= 0 {
		return c.Context.Err()
	}
	return c.makeLocked().Err()
}

// Value answers from the context that was made: package context finds its own
// there, and needs no goroutine to wait for Done.
func (c *call) Value(key any) any {
	c.k.mu.Lock()
	ctx := c.made
	c.k.mu.Unlock()
	if ctx == nil {
		ctx = c.Context
	}
	return ctx.Value(key)
}

// The compiler inlines these, so that without forceKill they cost next to nothing.

func (k *killer) use(s *serverConn) bool {
	return k == nil && !s.superseded() || k != nil && k.begun(s)
}
func (k *killer) enter() bool { return k == nil || k.entered() }

func (k *killer) leave(err error) error {
	if k == nil {
		return err
	}
	return k.left(err)
}

func (k *killer) done() {
	if k != nil {
		k.unused()
	}
}

func (c *call) end(err error) error {
	if c == nil {
		return err
	}
	return c.ended(err)
}

// begun makes a connection that nothing has run on one that is in use, unless
// its value is no longer in force.
func (k *killer) begun(s *serverConn) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.used = !s.superseded() // asked under the lock: a kill comes after the change
	return k.used
}

// unused ends all use: the connection is returned to the pool, or taken from it.
func (k *killer) unused() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.used = false
	k.leaveLocked(nil)
	for len(k.calls) > 0 {
		k.endLocked(k.calls[0])
	}
}

// entered begins a call of the driver. It reports false if the connection was
// killed.
func (k *killer) entered() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.enterLocked()
}

func (k *killer) enterLocked() bool {
	if k.killed {
		k.leaveLocked(nil) // Raw, which has returned
		return false
	}
	k.used, k.busy = true, true
	return true
}

// left ends what enter or begin began. If the call was killed and failed, its
// error becomes one that database/sql does not take for a reason to run the
// call again.
func (k *killer) left(err error) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.leaveLocked(err)
}

func (k *killer) leaveLocked(err error) error {
	k.busy = false
	if k.returned != nil {
		close(k.returned)
		k.returned = nil
	}
	if k.killed && err != nil && err != driver.ErrSkip {
		return &killedError{err}
	}
	return err
}

// begin is enter for a call with a context.
func (k *killer) begin(caller context.Context) (context.Context, *call, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.enterLocked() {
		return nil, nil, ErrKilled
	}
	c := &call{Context: caller, k: k, index: len(k.calls)}
	k.calls = append(k.calls, c)
	return c, c, nil
}

// ended ends the call and its context.
func (c *call) ended(err error) error {
	c.k.mu.Lock()
	defer c.k.mu.Unlock()
	c.k.endLocked(c)
	return c.k.leaveLocked(err)
}

func (k *killer) endLocked(c *call) {
	if c.index < 0 {
		return // who has a transaction from a Raw callback may end it twice
	}
	last := len(k.calls) - 1
	k.calls[c.index], k.calls[last].index = k.calls[last], c.index
	k.calls[last] = nil
	k.calls = k.calls[:last]
	c.index = -1
	if c.made != nil {
		c.cancel(nil)
	}
}

// endExec is end for an Exec. If it may have set a cursor, its context lives on
// until the connection is returned to the pool.
func (c *call) endExec(args []driver.NamedValue, err error) error {
	for i := range args {
		if out, ok := args[i].Value.(sql.Out); ok && err == nil {
			switch out.Dest.(type) {
			case *driver.Rows, *any:
				return c.k.leave(nil)
			}
		}
	}
	return c.end(err)
}

// last makes the last call that needs the context.
func (c *call) last(f func() error) error {
	if !c.k.enter() {
		c.end(nil)
		return ErrKilled
	}
	return c.end(f())
}

// rows ends a call that returned rows, or failed.
func (c *call) rows(r driver.Rows, err error) (driver.Rows, error) {
	if err != nil {
		return nil, c.end(err)
	}
	c.k.leave(nil)
	return wrapRows(&rows{Rows: r, call: c}), nil
}

// kill ends what is in use. It reports false if nothing is.
func (s *serverConn) kill() bool {
	k := s.k
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.used || k.killed || s.state.Load() == parked {
		return false
	}
	k.killed = true
	for _, c := range k.calls {
		c.makeLocked()
		c.cancel(ErrKilled)
	}
	if k.busy {
		k.returned = make(chan struct{})
	}
	s.close(k.returned)
	return true
}

// kill kills what is in use on a superseded generation, at once or when its
// grace is over. If its value is in force again by then, the grace begins anew
// when that is superseded in its turn.
func (c *connector) kill(g *generation) {
	if c.grace == 0 {
		g.kill()
		return
	}
	g.later(func() func() bool {
		return time.AfterFunc(c.grace, func() {
			switch cur := c.gen.Load(); {
			case c.ctx.Err() != nil:
			case cur.value == g.value:
				g.later(func() func() bool { return context.AfterFunc(cur.ctx, func() { c.kill(g) }) })
			default:
				g.kill()
			}
		}).Stop
	})
}

// later begins a waiting that ends when the generation has drained.
func (g *generation) later(begin func() (stop func() bool)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.refs > 0 {
		g.stop = begin()
	}
}

// kill kills what is in use on a superseded generation, unless that has drained.
func (g *generation) kill() {
	n := 0
	g.mu.Lock()
	if g.refs == 0 {
		g.mu.Unlock()
		return
	}
	g.refs++ // it drains when the kill has been logged
	for _, s := range g.conns {
		if s.kill() {
			n++
		}
	}
	g.mu.Unlock()
	if n > 0 {
		g.c.logger().Warn("hotload: connections killed", "generation", g.number, "killed", n)
	}
	g.release(nil)
}

// A killedError is the error of a call that was killed. It matches ErrKilled
// and nothing else, but the driver's error can be had with errors.As.
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
}

// wrapRows gives rows the optional interfaces that only a newer Go has.
var wrapRows = func(r *rows) driver.Rows { return r }

// Columns asks the driver once for each result set: a Rows.Scan that fails
// asks without database/sql's lock, perhaps during another call.
func (r *rows) Columns() []string {
	if r.columns == nil {
		ask(r, func(rows driver.Rows) { r.columns = rows.Columns() })
	}
	return r.columns
}

func (r *rows) Close() error { return r.call.last(r.Rows.Close) }

func (r *rows) Next(dest []driver.Value) error {
	if !r.call.k.enter() {
		return ErrKilled
	}
	return r.next(r.Rows.Next(dest))
}

// next ends a call that asked for a row. At the end of a result set it asks for
// the next in the same call: afterwards the connection can have been killed.
func (r *rows) next(err error) error {
	if sets, ok := r.Rows.(driver.RowsNextResultSet); ok && err == io.EOF && r.call.k.enter() {
		r.more = sets.HasNextResultSet()
	}
	return r.call.k.leave(err)
}

func (r *rows) HasNextResultSet() bool { return r.more }

func (r *rows) NextResultSet() error {
	sets, ok := r.Rows.(driver.RowsNextResultSet)
	if !ok {
		return io.EOF
	}
	if !r.call.k.enter() {
		return ErrKilled
	}
	r.columns = nil
	return r.call.k.leave(sets.NextResultSet())
}

// ask calls the driver's rows unless they lack an interface, or were killed.
func ask[Interface any](r *rows, f func(Interface)) {
	if prop, ok := r.Rows.(Interface); ok && r.call.k.enter() {
		defer r.call.k.leave(nil)
		f(prop)
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
