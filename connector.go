package hotload

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// patience is how long hotload waits for what ought to be quick and cannot be
// hurried: a driver's Close, and a driver or a strategy whose context has ended.
const patience = time.Second

// A connector is the driver.Connector of one sql.DB: its watch, and the
// generation that new connections belong to.
//
// A value from the strategy becomes a candidate, a generation that is not in
// force yet (offer). A goroutine of its own tries it until it is good (prove)
// and puts it in force (publish). A newer value takes the candidate's place. So
// a value that is refused changes nothing, and is tried again all the same: what
// it lacks, such as the file of a certificate, may still come.
//
// Locks: connector.mu, generation.mu and killer.mu. None is held while another
// one is taken, nor while a strategy, a driver, a logger or a context of the
// program is called. They guard fields, for a moment, and nothing waits for a
// slow driver. database/sql calls some methods of a proxy under its own locks.
type connector struct {
	dsn
	strategy Strategy
	driver   driver.Driver
	alone    bool // made by Driver.Open: it closes with its connection

	ctx  context.Context // of the watch and of what waits in the background; ended by Close, under mu
	stop context.CancelFunc

	// current is the generation in force; nil until a first value is. Once set it
	// is never nil again. It is an atomic because every operation loads it.
	current atomic.Pointer[generation]

	// running counts the goroutines that Close waits for: the watch, the tries of a
	// candidate, what closes connections and drained generations, and what waits
	// for a kill. Dials are not among them: nobody can await a driver's Open that
	// hangs, and what a dial brings after Close is its caller's, or closes.
	running atomic.Int64

	proving chan struct{} // holds one element while a candidate is being tried

	mu        sync.Mutex    // guards the following fields, and changes of current
	first     *firstWatch   // nil before the first connect, and after a first Watch that failed
	candidate *generation   // that is to be put in force; nil if there is none
	uncounted []*serverConn // closing, though database/sql counts them no more

	blank bool // the last value was blank, of which the log tells once; used by watch alone
}

var _ driver.Connector = (*connector)(nil)
var _ io.Closer = (*connector)(nil)

func newConnector(d dsn, strategy Strategy, drv driver.Driver) *connector {
	c := &connector{dsn: d, strategy: strategy, driver: drv, proving: make(chan struct{}, 1)}
	c.ctx, c.stop = context.WithCancel(context.Background())
	return c
}

func (c *connector) Driver() driver.Driver { return hotloadDriver{} }

// Connect opens a connection with the value in force. The first one starts the
// watch.
func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	if err := c.start(ctx); err != nil {
		return nil, err
	}
	// A pool whose connections are slow to close must not exceed MaxOpenConns on
	// the server. Each connection that is closing has left room for one new one,
	// so this one waits for the oldest, and the next for another.
	c.stillClosing()
	c.mu.Lock()
	var oldest *serverConn
	if len(c.uncounted) > 0 {
		oldest, c.uncounted = c.uncounted[0], c.uncounted[1:]
	}
	c.mu.Unlock()
	if oldest != nil {
		oldest.awaitClosed(ctx)
	}
	s, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	return newConn(ctx, c, s), nil
}

// stillClosing adds connections that database/sql has closed, and so counts no
// more, to uncounted. It removes those that have closed by now, and returns how
// many are left. A pool that has shrunk would otherwise wait for connections long
// gone.
func (c *connector) stillClosing(conns ...*serverConn) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.uncounted = slices.DeleteFunc(append(c.uncounted, conns...), func(s *serverConn) bool { return isClosed(s.gone) })
	return len(c.uncounted)
}

// dial opens a server connection with the value in force. When that is
// superseded meanwhile, it leaves the dial and makes another. So callers get the
// error of a dial to the value in force, or their own context's.
func (c *connector) dial(ctx context.Context) (*serverConn, error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		g := c.current.Load()
		s, err := g.dial(ctx)
		// The bug of many pools is to trust a connection whose dial began before the
		// change. It may have come after the sweep of its generation, which then has
		// missed it. So look again, and close it; if the sweep has found it after all,
		// the second to retire it does nothing. A change that comes after this look
		// finds the connection idle, and take finds the change.
		if g == c.current.Load() {
			return s, err
		}
		if err == nil {
			s.retireIdle()
			s.awaitClosed(ctx)
		}
	}
}

// Close ends the watch. Connections that are checked out work on.
//
// database/sql calls it after it has closed the idle connections one by one. Each
// of these closings is waited for, for at most patience; once one has taken
// longer, the rest are not waited for. Close then waits at most patience for the
// background work, and half of patience for the driver's connector. Whatever
// takes longer continues without it.
func (c *connector) Close() error {
	c.mu.Lock()
	again := c.ctx.Err() != nil
	c.stop()
	c.mu.Unlock()
	if again {
		return nil
	}
	c.setCandidate(nil)
	g := c.current.Load()
	if g != nil {
		g.pruneSpares()
	}
	// Why not a WaitGroup? Connections are returned, and close, while this waits
	// and later. Its Add from zero must not race with its Wait.
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

// inBackground calls f in a goroutine that Close waits for, for a while. The
// count rises before inBackground returns. So Close waits for work started before
// it, and for work which that work starts.
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

// A firstWatch is the result of the first Strategy.Watch. All callers of Connect
// wait for it until a value is in force.
type firstWatch struct {
	ready chan struct{} // closed when a value is in force, or there is a reason why none is
	err   error         // that reason; guarded by connector.mu
}

// settleLocked tells those who wait for a first value what became of it; nil
// means that one is in force. A later outcome replaces an earlier one. Once a
// value is in force nobody asks any more. connector.mu is held.
func (w *firstWatch) settleLocked(err error) {
	if w.err = err; !isClosed(w.ready) {
		close(w.ready)
	}
}

// start makes sure that a value is in force: it starts the watch unless there
// is one, and waits for the first value. Callers share the watch, each with a
// deadline of its own.
func (c *connector) start(ctx context.Context) error {
	if c.current.Load() != nil {
		return nil
	}
	if c.strategy == nil {
		return errors.New("hotload: the data source name is empty: want strategy://driver/path?options")
	}
	c.mu.Lock()
	if c.first == nil && c.ctx.Err() == nil {
		w := &firstWatch{ready: make(chan struct{})}
		c.first = w
		c.inBackground(func() { c.watch(w) })
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
	if c.current.Load() == nil {
		return w.err // the first value was refused, and so was what has come since
	}
	return nil
}

// The pause before Watch is called again doubles from the least to the most.
// It starts afresh only after a watch that outlived the most, so that a
// strategy whose watches keep breaking off is not called in a hurry.
const leastWatchPause, mostWatchPause = 100 * time.Millisecond, 30 * time.Second

// watch calls Strategy.Watch, again and again, until the connector is closed:
// when a strategy gives up a watch, the last value stays in force meanwhile. It
// ends early if the very first call fails: that is an error of the connects which
// wait for it, and the next connect starts another watch.
func (c *connector) watch(w *firstWatch) {
	pause := leastWatchPause
	lost := "" // what was logged of the loss of the watch
	for first := true; ; first = false {
		options, _ := url.ParseQuery(c.options.Encode()) // a copy, lest a strategy change what the next Watch gets
		value, values, err := c.strategy.Watch(c.ctx, c.path, options)
		if err != nil && first {
			c.mu.Lock()
			c.first = nil
			w.settleLocked(err)
			c.mu.Unlock()
			return
		}
		if err == nil {
			if !first {
				lost = ""
				c.logger().Info("hotload: watch regained")
			}
			began := time.Now()
			c.offer(value)
			c.follow(values)
			if time.Since(began) > mostWatchPause {
				pause = leastWatchPause
			}
		}
		if c.ctx.Err() != nil {
			return
		}
		attrs, _ := describe(err)
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
	for values != nil { // a nil channel is taken for one that is closed
		select {
		case value, ok := <-values:
			if !ok {
				return
			}
			c.offer(value) // after Close it does nothing
		case <-done:
			done, limit = nil, time.After(patience)
		case <-limit:
			return
		}
	}
}

// offer takes up a value from the strategy. A blank one is refused for good: the
// strategy should not have delivered it, and trying it again helps nobody.
//
// Unless it is to be probed, the value is in force or refused when offer returns.
// So values are handled in order. Only a driver whose OpenConnector hangs makes
// offer return earlier, after patience.
func (c *connector) offer(value string) {
	if strings.TrimSpace(value) == "" {
		if !c.blank {
			c.blank = true
			c.logger().Warn("hotload: value refused", "reason", "empty")
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.first.settleLocked(fmt.Errorf("hotload: strategy %q delivered an empty or blank connection string for path %q, want one for driver %q",
			c.strategyName, c.path, c.driverName))
		return
	}
	c.blank = false
	g := newGeneration(c, value)
	if !c.setCandidate(g) {
		return
	}
	tried := make(chan struct{})
	c.inBackground(func() { c.prove(g, sync.OnceFunc(func() { close(tried) })) })
	if c.probe && c.current.Load() != nil {
		return
	}
	select {
	case <-tried:
	case <-c.ctx.Done():
	case <-time.After(patience):
	}
}

// setCandidate replaces the candidate and reports whether g is it now. It is
// not if its value is in force, and then nothing is to be done; if its value is
// being tried already; or if the connector is closed. Close calls it with nil.
//
// This is the only place that sets a new candidate. It checks under mu whether
// c.ctx has ended, and Close ends c.ctx under mu. So a value delivered during
// Close is either rejected here, or removed by Close's own call. Otherwise it
// would be tried for ever.
func (c *connector) setCandidate(g *generation) bool {
	c.mu.Lock()
	old, current := c.candidate, c.current.Load()
	switch {
	case c.ctx.Err() != nil: // closed
		g = nil
	case old != nil && old.value == g.value:
		c.mu.Unlock()
		return false
	case current != nil && current.value == g.value:
		g = nil
	}
	c.candidate = g
	c.mu.Unlock()
	if old != nil {
		old.supersede()
		old.release(nil)
	}
	return g != nil
}

// tryLimit is how long a probe may take. A value whose dial takes longer is never
// proved. A try that has not returned patience later, even in OpenConnector, is
// logged as refused.
const tryLimit = 10 * time.Second

// prove tries a candidate until it is good, and then puts it in force. It ends
// when another value takes its place. It calls tried after the first try.
//
// One candidate is tried at a time, and has one try at a time. A driver that
// ignores its context, or has none, is waited for: were it left and tried again,
// a host that hangs would have hundreds of our dials after an hour. A candidate
// that has been replaced is another matter, because its value is no longer wanted:
// when its driver has not returned after patience, the next candidate begins.
// The same value delivered again is not tried at once: it keeps its pauses.
func (c *connector) prove(g *generation, tried func()) {
	defer tried()
	select {
	case c.proving <- struct{}{}:
	case <-g.ctx.Done():
		return
	}
	next := sync.OnceFunc(func() { <-c.proving })
	defer next()
	defer context.AfterFunc(g.ctx, func() { time.AfterFunc(patience, next) })()

	// Servers lock an account after a few wrong passwords, so an answer that denies
	// is followed by long pauses. What says that the driver cannot read the value
	// yet, or the server cannot be reached yet, is tried again within seconds.
	soon := 250 * time.Millisecond
	denials, denied := 0, [...]time.Duration{2 * time.Second, 10 * time.Second, time.Minute, 5 * time.Minute}
	slow := error(context.DeadlineExceeded)  // the error of a try that does not return
	if !c.probe || c.current.Load() == nil { // then only OpenConnector is called
		slow = &refusedError{fmt.Sprintf("hotload: driver %q has not returned from OpenConnector within %v", c.driverName, tryLimit), slow}
	}
	for {
		late := time.AfterFunc(tryLimit+patience, func() { c.refuse(g, slow) })
		err := safely(g.try)
		late.Stop()
		if err == nil {
			c.publish(g) // publish and refuse look whether it has been replaced
			return
		}
		pause := soon
		if c.refuse(g, err) {
			soon = min(2*soon, 5*time.Second)
		} else {
			pause = denied[min(denials, len(denied)-1)]
			denials++
		}
		tried()
		select {
		case <-time.After(pause):
		case <-g.ctx.Done():
			return
		}
	}
}

// refuse logs why a candidate is not in force, once for each reason, and tells
// those who wait for a first value. It reports whether trying again soon does no
// harm: the driver did not come as far as the server, or the server is not there.
func (c *connector) refuse(g *generation, err error) (harmless bool) {
	reason, cause := "probe", err
	r, ok := err.(*refusedError)
	if ok {
		reason, cause = "driver", r.err
	}
	attrs, unreachable := describe(cause)
	what := fmt.Sprint(reason, attrs)
	c.mu.Lock()
	tell := c.candidate == g && !g.refusals[what] // nobody asks about one that was replaced
	if tell {
		g.refusals[what] = true
		c.first.settleLocked(err)
	}
	c.mu.Unlock()
	if tell {
		c.logger().Warn("hotload: value refused", append([]any{"reason", reason}, attrs...)...)
	}
	return ok || unreachable
}

// publish puts a candidate in force and retires the generation before it. It
// does nothing if the candidate has been replaced; setCandidate has ended that one
// already.
// New work does not wait for the sweep, let alone for the closing.
func (c *connector) publish(g *generation) {
	c.mu.Lock()
	if c.candidate != g {
		c.mu.Unlock()
		return
	}
	c.candidate = nil
	old := c.current.Load()
	if g.number = 1; old != nil {
		g.number = old.number + 1
	}
	// First the new value, then the sweep of the old connections: see server.go.
	c.current.Store(g)
	c.first.settleLocked(nil)
	c.mu.Unlock()

	closed, inUse := 0, 0
	if old != nil {
		closed, inUse = old.supersede()
	}
	c.logger().Info("hotload: value accepted", "generation", g.number, "closed", closed, "in_use", inUse)
	if old == nil {
		return
	}
	if c.forceKill && c.grace == 0 {
		old.kill()
	} else if c.forceKill {
		c.inBackground(func() { c.killLater(old) })
	}
	old.release(nil) // it is in force no more; so it can drain
}

// describe returns what may be logged of an error of a driver or a strategy,
// whose text may quote the connection string. It reports also whether the error
// says that a server cannot be reached, or not yet, and no more than that.
func describe(err error) (attrs []any, unreachable bool) {
	if err == nil {
		return nil, false
	}
	attrs = append(attrs, "error_type", fmt.Sprintf("%T", err))
	safely(func() error { // the error's methods are the driver's
		var errno syscall.Errno
		var network net.Error // context.DeadlineExceeded is one
		unreachable = errors.As(err, &errno) || errors.As(err, &network) || errors.Is(err, context.Canceled)
		var server interface{ SQLState() string }
		if errors.As(err, &server) {
			// A driver could return any text: what does not look like a SQLSTATE may be
			// a secret. What does is the server's answer, and decides.
			if state := server.SQLState(); len(state) == 5 && strings.Trim(state, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ") == "" {
				attrs = append(attrs, "sqlstate", state)
				// Connection exception, insufficient resources, operator intervention.
				unreachable = slices.Contains([]string{"08", "53", "57"}, state[:2])
			}
		}
		if errno != 0 {
			attrs = append(attrs, "errno", errno.Error())
		}
		return nil
	})
	return attrs, unreachable
}

// A refusedError says that the driver's OpenConnector refused a value. It does
// not tell the text of the driver's error, which may quote the value.
type refusedError struct {
	text string
	err  error
}

func (e *refusedError) Error() string { return e.text }
func (e *refusedError) Unwrap() error { return e.err }
