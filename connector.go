package hotload

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// patience is how long hotload waits for what ought to be quick and cannot be
// hurried: a driver's Close, and drivers and strategies whose context ended.
const patience = time.Second

// A connector is the driver.Connector of one sql.DB: its watch, and the
// generation that new connections belong to.
//
// A killer's mutex may be taken under its generation's; those and connector's
// are else leaves: under none of them is another one taken, a strategy, a driver
// or a logger called.
type connector struct {
	dsn
	strategy Strategy
	driver   driver.Driver

	ctx  context.Context // of the watch, and of all else in the background
	stop context.CancelFunc

	gen     atomic.Pointer[generation] // in force; nil until a first value is accepted
	running atomic.Int64               // goroutines in the background, which Close waits for

	mu      sync.Mutex    // guards the following fields, and changes of gen
	leaving []*serverConn // closing, and counted by no pool
	closed  bool
	first   *firstWatch // nil before the first connect and after a first Watch that failed
	next    *generation // that is to be put in force, and may have to prove itself first; nil if there is none

	refused string // what was refused last, and why; used by run alone
}

var (
	_ driver.Connector = (*connector)(nil)
	_ io.Closer        = (*connector)(nil)
)

func newConnector(d dsn, strategy Strategy, drv driver.Driver) *connector {
	c := &connector{dsn: d, strategy: strategy, driver: drv}
	c.ctx, c.stop = context.WithCancel(context.Background())
	return c
}

func (c *connector) Driver() driver.Driver { return hotloadDriver{} }

// Connect opens a connection with the value in force. The first one starts the
// watch.
func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	s, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	return newConn(c, s, false), nil
}

func (c *connector) connect(ctx context.Context) (*serverConn, error) {
	if err := c.start(ctx); err != nil {
		return nil, err
	}
	// A pool whose connections are slow to close must not exceed its
	// MaxOpenConns on the server: wait for one that it no longer counts.
	c.mu.Lock()
	leaving := c.stillLeaving(nil)
	if len(leaving) > 0 {
		c.leaving = leaving[1:]
	}
	c.mu.Unlock()
	if len(leaving) > 0 {
		leaving[0].awaitClosed(ctx)
	}
	return c.dial(ctx)
}

// stillLeaving returns those that are, and s; mu is held.
func (c *connector) stillLeaving(s *serverConn) []*serverConn {
	if s != nil {
		c.leaving = append(c.leaving, s)
	}
	c.leaving = slices.DeleteFunc(c.leaving, (*serverConn).isGone)
	return c.leaving
}

// dial opens a server connection with the value in force. When that is
// replaced meanwhile, it leaves the dial and makes another.
func (c *connector) dial(ctx context.Context) (*serverConn, error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		g := c.gen.Load()
		s, err := g.dial(ctx)
		if g == c.gen.Load() {
			return s, err
		}
		if err == nil { // late: the generation was swept without it
			s.retire()
			s.awaitClosed(ctx)
		}
	}
}

// Close ends the watch. Connections that are checked out work on.
func (c *connector) Close() error {
	c.mu.Lock()
	again, next := c.closed, c.next
	c.closed, c.next = true, nil
	c.mu.Unlock()
	if again {
		return nil
	}
	c.stop()
	if next != nil {
		next.drop()
	}
	g := c.gen.Load()
	if g != nil {
		g.abandonAll()
	}
	for end := time.Now().Add(patience); c.running.Load() > 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if g == nil {
		return nil
	}
	result := make(chan error, 1)
	go func() { result <- g.close() }()
	select {
	case err := <-result:
		return err
	case <-time.After(patience / 2):
		return nil
	}
}

// inBackground calls f in a goroutine that Close waits for, for a while.
func (c *connector) inBackground(f func()) {
	c.running.Add(1)
	go func() {
		defer c.running.Add(-1)
		f()
	}()
}

// logger returns the default logger with what identifies the pool.
func (c *connector) logger() *slog.Logger {
	return slog.With("strategy", c.strategyName, "driver", c.driverName, "path", c.path)
}

// A firstWatch is what the callers of a first connect wait for: the outcome of
// the first call of Strategy.Watch, which they share.
type firstWatch struct {
	ready chan struct{} // closed when the first value was taken up, or Watch failed
	err   error         // why no value is in force; guarded by connector.mu
}

// start makes sure that a value is in force: it starts the watch unless there
// is one, and waits for the first value. Callers share the watch, each with a
// deadline of its own.
func (c *connector) start(ctx context.Context) error {
	if c.gen.Load() != nil {
		return nil
	}
	if c.strategy == nil {
		return errEmptyDSN
	}
	c.mu.Lock()
	if c.first == nil && !c.closed {
		w := &firstWatch{ready: make(chan struct{})}
		c.first = w
		c.inBackground(func() { c.run(w) })
	}
	w := c.first
	c.mu.Unlock()
	if w == nil {
		return errClosed
	}
	select {
	case <-w.ready:
	case <-ctx.Done():
		return ctx.Err()
	case <-c.ctx.Done():
		return errClosed
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.gen.Load() != nil:
		return nil
	case w.err != nil:
		return w.err
	}
	return errClosed // before the first value could be put in force
}

// The pause before Watch is called again doubles from the least to the most.
// It starts afresh only after a watch that outlived the most, so that a
// strategy whose watches keep breaking off is not called in a hurry.
const (
	leastWatchPause = 100 * time.Millisecond
	mostWatchPause  = 30 * time.Second
)

// run watches until the connector is closed. It ends early if the very first
// Watch fails: then the next connect starts another.
func (c *connector) run(w *firstWatch) {
	pause := leastWatchPause
	lost := "" // what was logged of the loss of the watch
	for first := true; ; first = false {
		options, _ := url.ParseQuery(c.options.Encode()) // a copy: a strategy that breaks S-15 spoils no later Watch
		value, values, err := c.strategy.Watch(c.ctx, c.path, options)
		began := time.Now()
		switch {
		case err != nil && first:
			c.mu.Lock()
			c.first, w.err = nil, err
			c.mu.Unlock()
			close(w.ready)
			return
		case err == nil:
			if !first {
				lost = ""
				c.logger().Info("hotload: watch regained")
			}
			c.offer(value)
			if first {
				close(w.ready)
			}
			c.follow(values)
			if time.Since(began) > mostWatchPause {
				pause = leastWatchPause
			}
		}
		if c.ctx.Err() != nil {
			return
		}
		attrs := describe(err)
		if what := fmt.Sprint("lost ", attrs); what != lost {
			lost = what
			c.logger().Warn("hotload: watch lost", attrs...)
		}
		select {
		case <-c.ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, mostWatchPause)
	}
}

// follow takes up what the strategy delivers until it closes the channel. When
// the connector is closed it waits for that, because then the watch is gone,
// but not for long: the strategy may be one that ignores its context.
func (c *connector) follow(values <-chan string) {
	done, limit := c.ctx.Done(), (<-chan time.Time)(nil)
	for values != nil {
		select {
		case value, ok := <-values:
			if !ok {
				return
			}
			if limit == nil {
				c.offer(value)
			}
		case <-done:
			done, limit = nil, time.After(patience)
		case <-limit:
			return
		}
	}
}

// offer takes up a value from the strategy: it is put in force, has to prove
// itself first, is refused, or is no change.
func (c *connector) offer(value string) {
	c.mu.Lock()
	cur, next := c.gen.Load(), c.next
	same := cur != nil && cur.value == value
	if same {
		c.next = nil
	}
	c.mu.Unlock()
	if !same && next != nil && next.value == value {
		return
	}
	var g *generation
	if !same {
		var err error
		g, err = c.newGeneration(value)
		c.mu.Lock()
		if err != nil {
			c.first.err = err
			c.mu.Unlock()
			return
		}
		if c.closed {
			c.mu.Unlock()
			g.drop()
			return
		}
		next, c.next = c.next, g
		c.mu.Unlock()
	}
	c.refused = ""
	if next != nil {
		next.drop()
	}
	switch {
	case same:
	case cur != nil && c.probe:
		c.inBackground(func() { c.prove(g) })
	default:
		c.publish(g)
	}
}

// newGeneration makes a generation of a value, unless the value is refused.
func (c *connector) newGeneration(value string) (*generation, error) {
	if strings.TrimSpace(value) == "" {
		c.refuse("", "empty", nil)
		return nil, fmt.Errorf("hotload: strategy %q delivered an empty or blank connection string for path %q", c.strategyName, c.path)
	}
	g := &generation{c: c, value: value, refs: 1}
	if d, ok := c.driver.(driver.DriverContext); ok {
		err := safely(func() (err error) {
			g.connector, err = d.OpenConnector(value)
			return err
		})
		if err != nil {
			c.refuse(value, "driver", err)
			return nil, &hiddenError{fmt.Sprintf("hotload: driver %q refused the connection string that strategy %q delivered for path %q, "+
				"with an error of type %T (unwrap it for its text, which may quote the string)", c.driverName, c.strategyName, c.path, err), err}
		}
	}
	g.ctx, g.end = context.WithCancel(context.Background())
	return g, nil
}

// publish puts a generation in force and retires the one before it. It drops
// the generation if it was overtaken by another value, or by Close.
func (c *connector) publish(g *generation) {
	c.mu.Lock()
	if c.next != g {
		c.mu.Unlock()
		return // who overtook it has retired it
	}
	c.next = nil
	if c.closed {
		c.mu.Unlock()
		g.drop()
		return
	}
	old := c.gen.Load()
	if g.number = 1; old != nil {
		g.number = old.number + 1
	}
	c.gen.Store(g)
	c.mu.Unlock()

	closed, inUse := 0, 0
	if old != nil {
		closed, inUse = old.retire()
	}
	c.logger().Info("hotload: value accepted", "generation", g.number, "closed", closed, "in_use", inUse)
	if old != nil {
		if c.forceKill {
			c.kill(old)
		}
		old.release(nil)
	}
}

// refuse logs that a value is refused, once if it comes again.
func (c *connector) refuse(value, reason string, err error) {
	what := reason + " " + value
	if c.refused != what {
		c.refused = what
		c.logger().Warn("hotload: value refused", slices.Concat([]any{"reason", reason}, describe(err))...)
	}
}

// describe returns what may be logged of an error of a driver or a strategy,
// whose text may quote the connection string.
func describe(err error) (attrs []any) {
	if err == nil {
		return nil
	}
	attrs = append(attrs, "error_type", fmt.Sprintf("%T", err))
	var state interface{ SQLState() string }
	if errors.As(err, &state) {
		// A driver could return any text.
		if code := state.SQLState(); len(code) == 5 && strings.Trim(code, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ") == "" {
			attrs = append(attrs, "sqlstate", code)
		}
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		attrs = append(attrs, "errno", errno.Error())
	}
	return attrs
}

// A hiddenError does not tell the text of the error that it is about, which may
// quote the connection string.
type hiddenError struct {
	text string
	err  error
}

func (e *hiddenError) Error() string { return e.text }
func (e *hiddenError) Unwrap() error { return e.err }

// A driverPanic is a panic of the driver in a goroutine of hotload's, where it
// would end the program. Its text does not quote what may hold the secret.
type driverPanic struct{ value any }

func (p *driverPanic) Error() string {
	return fmt.Sprintf("hotload: the driver panicked with a %T", p.value)
}

// safely calls the driver, and makes an error of its panic.
func safely(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &driverPanic{v}
		}
	}()
	return f()
}
