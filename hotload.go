// Package hotload is a driver for database/sql whose connection string can
// change while the program runs.
//
// It stands in front of the real driver. A [Strategy] watches the place where
// the connection string is kept, such as a file that a secret store rewrites;
// when the string changes, hotload retires the connections opened with the old
// one, and the pool goes on with connections opened with the new one. The
// program keeps its [sql.DB], and no query fails:
//
//	import (
//		"database/sql"
//		"github.com/infobloxopen/hotload"
//		_ "github.com/infobloxopen/hotload/fsnotify"
//		"github.com/lib/pq"
//	)
//
//	func init() { hotload.Register("postgres", pq.Driver{}) }
//
//	func main() {
//		db, err := sql.Open("hotload", "fsnotify://postgres/tmp/myconfig.txt")
//		...
//	}
//
// Here /tmp/myconfig.txt holds what the driver opens, for example
// "user=pqgotest dbname=pqgotest sslmode=verify-full".
//
// # The data source name
//
// A data source name is strategy://driver/path?options. The strategy is one
// registered with [RegisterStrategy], the driver one registered with
// [Register]. The strategy gets the path, and those options that are not
// hotload's own:
//
//   - forceKill: "false", the default, lets what is in use at a change finish
//     on its own connection. "true" ends it at the change. A duration, such as
//     "30s", ends what is still in use when it has passed.
//   - probe: with "true", a new value is put in force only once a connection
//     has been opened with it, and pinged if the driver can; until then the
//     pool goes on with the last good one. The first value is not tried. The
//     default, "false", puts each value in force at once, because moving off a
//     server may be meant whether or not the next one is up.
//
// [sql.Open] checks the name and starts nothing. The first connection starts
// the watch and DB.Close ends it.
//
// # What happens at a change
//
// A connection is in use when something has run on it since it was taken from
// the pool. Once a value has been put in force:
//
//   - Operations that take a connection from the pool run on one opened with
//     that value or a later one.
//   - Connections not in use close at once. Those in use finish their work and
//     close when they are returned, or are ended as forceKill says.
//   - A dial in progress is abandoned and made again with the new value.
//   - A value that is empty or blank, or that the driver's OpenConnector
//     refuses, changes nothing. Drivers that parse at the dial, such as
//     pq.Driver and pgx's, refuse none: see probe.
//
// The error of an operation that forceKill ended matches [ErrKilled]; the
// operation is not run again. Without forceKill a change causes no error.
//
// A pooled connection without a server connection behind it dials when it is
// next used. [sql.DBStats] counts it as open.
//
// What happens is logged through [slog.Default]; the events, and all that a
// strategy must and may do, are set out in SPEC.md beside this file.
//
// # Limits
//
//   - A dial of a driver that takes no context, such as pq.Driver, can be
//     abandoned but not interrupted: it goes on in the background.
//   - A library that wraps hotload has to pass on the Close of its connector,
//     which ends the watch.
//
// # The driver's own connection
//
// What [sql.Conn.Raw] passes to its callback has a method Raw, which returns
// the driver's connection, or nil if there is none: it was killed, or none could
// be opened:
//
//	err := conn.Raw(func(driverConn any) error {
//		c := driverConn.(interface{ Raw() driver.Conn }).Raw()
//		...
//	})
package hotload

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// ErrKilled is matched, with errors.Is, by the error of every operation that
// forceKill ended, and of every later one on the same transaction, rows or
// [sql.Conn]. A call that was in progress may have taken effect on the old
// server; database/sql does not run it again.
var ErrKilled = errors.New("hotload: connection killed because its connection string was replaced")

var (
	errClosed   = errors.New("hotload: the connector is closed")
	errEmptyDSN = errors.New("hotload: the data source name is empty: want strategy://driver/path?options")
)

// A Strategy watches the place where a connection string is kept. SPEC.md is
// its contract, and package strategytest tests an implementation against it.
type Strategy interface {
	// Watch returns the connection string that is kept at pth now, and a channel
	// that delivers those that replace it. It may skip values, but never the
	// last one. Soon after ctx has ended it closes the channel. The argument pth
	// is the path of the data source name, percent-decoded, with its leading
	// slash, or empty if there is none; options are its options without
	// hotload's own, and one that the strategy does not know is an error.
	//
	// An error says why there is no first value; nothing is left running then.
	// Watch may be called by several goroutines at a time; each watch is
	// independent of the others.
	//
	// If the channel is closed before ctx ends, the last value stays in force
	// and hotload calls Watch again, after a while.
	Watch(ctx context.Context, pth string, options url.Values) (value string, values <-chan string, err error)
}

var (
	registryMu sync.RWMutex // protects drivers and strategies
	drivers    = make(map[string]driver.Driver)
	strategies = make(map[string]Strategy)
)

// Register makes a driver available under name, which data source names give as
// their host. It panics if d is nil, if name is registered already, or if it
// cannot be the host of a data source name.
func Register(name string, d driver.Driver) {
	if d == nil {
		panic("hotload: Register driver is nil")
	}
	if u, err := url.Parse("x://" + name + "/"); err != nil || name == "" || u.Host != name || strings.Contains(name, ":") {
		panic(fmt.Sprintf("hotload: Register name %q cannot be the host of a data source name", name))
	}
	registryMu.Lock()
	defer registryMu.Unlock()
	if _, dup := drivers[name]; dup {
		panic(fmt.Sprintf("hotload: Register called twice for driver %q", name))
	}
	drivers[name] = d
}

// RegisterStrategy makes a strategy available under name, which data source
// names give as their scheme, in lower case. It panics if s is nil, if name is
// registered already, or if it cannot be the scheme of a data source name.
func RegisterStrategy(name string, s Strategy) {
	if s == nil {
		panic("hotload: RegisterStrategy strategy is nil")
	}
	if u, err := url.Parse(name + "://x/"); err != nil || u.Scheme != name {
		panic(fmt.Sprintf("hotload: RegisterStrategy name %q cannot be the scheme of a data source name", name))
	}
	registryMu.Lock()
	defer registryMu.Unlock()
	if _, dup := strategies[name]; dup {
		panic(fmt.Sprintf("hotload: RegisterStrategy called twice for strategy %q", name))
	}
	strategies[name] = s
}

// A dsn is a data source name that has been read and found good.
type dsn struct {
	strategyName, driverName, path string
	options                        url.Values // the strategy's
	forceKill                      bool
	grace                          time.Duration // with forceKill: how long what is in use may go on
	probe                          bool
}

// parseDSN reads strategy://driver/path?options. Its errors quote nothing
// of the name: it may hold secrets, all the more when it is another driver's,
// passed by mistake.
func parseDSN(name string) (d dsn, err error) {
	if scheme, _, ok := strings.Cut(name, "://"); !ok || scheme == "" {
		return d, errors.New("hotload: the data source name has no strategy: want strategy://driver/path?options")
	}
	u, err := url.Parse(name)
	if err != nil {
		return d, errors.New("hotload: the data source name is not a valid URL: " +
			"want strategy://driver/path?options with special characters percent-encoded")
	}
	for _, bad := range []struct {
		found bool
		what  string
	}{
		{u.Opaque != "", `has no strategy before "://"`},
		{u.User != nil, "has user information, which belongs in the connection string that the strategy delivers"},
		{u.Hostname() == "", `names no driver after "://"`},
		{strings.Contains(u.Host, ":"), "has a port, which belongs in the connection string that the strategy delivers"},
		{strings.Contains(name, "#"), "has a fragment: write %23 for a # in the path or the options"},
	} {
		if bad.found {
			return d, errors.New("hotload: the data source name " + bad.what + ": want strategy://driver/path?options")
		}
	}
	d = dsn{strategyName: u.Scheme, driverName: u.Host, path: u.Path}
	if d.options, err = url.ParseQuery(u.RawQuery); err != nil {
		return d, errors.New("hotload: the options of the data source name cannot be read: " +
			"want name=value pairs separated by & with special characters percent-encoded")
	}
	kill, err := d.own("forceKill")
	if err != nil {
		return d, err
	}
	if d.forceKill = kill != "false"; d.forceKill && kill != "true" {
		if d.grace, err = time.ParseDuration(kill); err != nil || d.grace <= 0 {
			return d, errors.New("hotload: option forceKill: want true, false or a positive duration such as 30s")
		}
	}
	probe, err := d.own("probe")
	if err != nil {
		return d, err
	}
	if d.probe = probe == "true"; !d.probe && probe != "false" {
		return d, errors.New("hotload: option probe: want true or false")
	}
	return d, nil
}

// own takes an option of hotload's own, "false" by default, from those of the
// strategy.
func (d *dsn) own(option string) (value string, err error) {
	values, ok := d.options[option]
	delete(d.options, option)
	if !ok {
		return "false", nil
	}
	if len(values) > 1 {
		return "", fmt.Errorf("hotload: option %s is given %d times: want it once", option, len(values))
	}
	return values[0], nil
}

func init() { sql.Register("hotload", hotloadDriver{}) }

// hotloadDriver is the driver that database/sql knows as "hotload".
type hotloadDriver struct{}

var _ driver.DriverContext = hotloadDriver{}

// OpenConnector checks the data source name and starts nothing. An empty name
// is refused only when it is used: instrumentation libraries open one to get
// at the driver.
func (hotloadDriver) OpenConnector(name string) (driver.Connector, error) {
	if name == "" {
		return newConnector(dsn{}, nil, nil), nil
	}
	d, err := parseDSN(name)
	if err != nil {
		return nil, err
	}
	registryMu.RLock()
	defer registryMu.RUnlock()
	strategy, ok := strategies[d.strategyName]
	if !ok {
		return nil, fmt.Errorf("hotload: unknown strategy %q (registered: %s): forgotten import? "+
			`(import _ "github.com/infobloxopen/hotload/fsnotify" registers the strategy "fsnotify")`, d.strategyName, registered(strategies))
	}
	drv, ok := drivers[d.driverName]
	if !ok {
		return nil, fmt.Errorf("hotload: unknown driver %q (registered: %s): forgotten import? "+
			"(import the driver's package and pass the driver to hotload.Register)", d.driverName, registered(drivers))
	}
	return newConnector(d, strategy, drv), nil
}

func registered[T any](m map[string]T) string {
	if len(m) == 0 {
		return "none"
	}
	return strings.Join(slices.Sorted(maps.Keys(m)), ", ")
}

// Open opens a single connection with a watch of its own, which ends when the
// connection is closed.
func (d hotloadDriver) Open(name string) (driver.Conn, error) {
	dc, err := d.OpenConnector(name)
	if err != nil {
		return nil, err
	}
	c := dc.(*connector)
	opened := false
	defer func() {
		if !opened { // also when the driver panics
			c.Close()
		}
	}()
	s, err := c.connect(context.Background())
	if err != nil {
		return nil, err
	}
	opened = true
	return newConn(c, s, true), nil
}

// patience is how long hotload waits for what ought to be quick and cannot be
// hurried: a driver's Close, and drivers and strategies whose context ended.
const patience = time.Second

// A connector is the driver.Connector of one sql.DB: its watch, and the
// generation that new connections belong to.
//
// The mutexes of connector, generation and serverConn are leaves: under none
// of them is another one taken, a strategy, a driver or a logger called.
type connector struct {
	dsn
	strategy Strategy
	driver   driver.Driver

	ctx    context.Context // of the watch, and of all else in the background
	stop   context.CancelFunc
	trying chan struct{} // holds an element while a value is being tried

	gen atomic.Pointer[generation] // in force; nil until a first value is accepted

	mu      sync.Mutex // guards the following fields, and changes of gen
	closed  bool
	running int                      // goroutines in the background
	ended   chan struct{}            // made by Close, which waits until none of them is left; then closed
	first   *firstWatch              // nil before the first connect and after a first Watch that failed
	probing *probe                   // of the value that is to be put in force next; nil if there is none
	orphans map[*serverConn]struct{} // closing, and counted by no pool

	refused string // what was refused last, and why; used by run alone
}

var (
	_ driver.Connector = (*connector)(nil)
	_ io.Closer        = (*connector)(nil)
)

func newConnector(d dsn, strategy Strategy, drv driver.Driver) *connector {
	c := &connector{
		dsn:      d,
		strategy: strategy,
		driver:   drv,
		trying:   make(chan struct{}, 1),
		orphans:  make(map[*serverConn]struct{}),
	}
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
	if s := c.takeOrphan(); s != nil {
		if err := s.awaitClose(ctx); err != nil {
			c.addOrphan(s)
			return nil, err
		}
	}
	return c.dial(ctx)
}

// dial opens a server connection with the value in force. When that is
// replaced meanwhile, it leaves the dial and makes another.
func (c *connector) dial(ctx context.Context) (*serverConn, error) {
	for {
		g := c.gen.Load()
		s, err := g.dial(ctx)
		if g == c.gen.Load() {
			return s, err
		}
		if err == nil { // late: the generation was swept without it
			s.retire()
			if s.awaitClose(ctx) != nil {
				c.addOrphan(s)
			}
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
}

// Close ends the watch. Connections that are checked out work on.
func (c *connector) Close() error {
	c.mu.Lock()
	again := c.closed
	c.closed = true
	c.mu.Unlock()
	if again {
		return nil
	}
	c.stop()

	deadline := time.Now().Add(patience)
	g := c.gen.Load()
	if g != nil {
		g.dropSpares()
	}
	ended := make(chan struct{})
	c.mu.Lock()
	if c.running == 0 {
		close(ended)
	} else {
		c.ended = ended
	}
	c.mu.Unlock()
	select {
	case <-ended:
	case <-time.After(time.Until(deadline)):
	}
	if g == nil {
		return nil
	}
	closed := make(chan error, 1)
	go func() { closed <- g.close() }()
	select {
	case err := <-closed:
		return repanic(err)
	case <-time.After(max(time.Until(deadline), patience/2)): // it has not had its time if others used it up
		return nil
	}
}

// inBackground calls f in a goroutine that Close waits for, for a while, and
// for those that it starts in its turn.
func (c *connector) inBackground(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inBackgroundLocked(f)
}

func (c *connector) inBackgroundLocked(f func()) {
	c.running++
	go func() {
		defer func() { // also when a driver calls runtime.Goexit
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.running--; c.running == 0 && c.ended != nil {
				close(c.ended)
				c.ended = nil
			}
		}()
		f()
	}()
}

// addOrphan notes a server connection that is closing and has no proxy, unless
// it is closed already.
func (c *connector) addOrphan(s *serverConn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-s.done:
	default:
		c.orphans[s] = struct{}{}
	}
}

func (c *connector) removeOrphan(s *serverConn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.orphans, s)
}

func (c *connector) hasOrphans() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.orphans) > 0
}

func (c *connector) takeOrphan() *serverConn {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.orphans {
		delete(c.orphans, s)
		return s
	}
	return nil
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
	if c.closed {
		c.mu.Unlock()
		return errClosed
	}
	w := c.first
	if w == nil {
		w = &firstWatch{ready: make(chan struct{})}
		c.first = w
		c.inBackgroundLocked(func() { c.run(w) })
	}
	c.mu.Unlock()
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
		case err == nil:
			if !first {
				lost = ""
				c.logger().Info("hotload: watch regained")
			}
			c.offer(value)
		case first:
			c.mu.Lock()
			c.first, w.err = nil, err
			c.mu.Unlock()
		}
		if first {
			close(w.ready)
		}
		if err == nil {
			c.follow(values)
			if time.Since(began) > mostWatchPause {
				pause = leastWatchPause
			}
		} else if first {
			return
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
	for {
		select {
		case value, ok := <-values:
			if !ok {
				return
			}
			c.offer(value)
		case <-c.ctx.Done():
			limit := time.NewTimer(patience)
			defer limit.Stop()
			for ok := values != nil; ok; {
				select {
				case _, ok = <-values:
				case <-limit.C:
					return
				}
			}
			return
		}
	}
}

// offer takes up a value from the strategy: it is put in force, has to prove
// itself first, is refused, or is no change.
func (c *connector) offer(value string) {
	c.mu.Lock()
	cur, p := c.gen.Load(), c.probing
	if cur != nil && cur.value == value {
		c.probing = nil
		c.mu.Unlock()
		c.refused = ""
		if p != nil {
			p.cancel()
		}
		return
	}
	c.mu.Unlock()
	if p != nil && p.g.value == value {
		return
	}
	g, err := c.newGeneration(value)
	if err != nil {
		c.mu.Lock()
		c.first.err = err
		c.mu.Unlock()
		return
	}
	if cur == nil || !c.probe {
		c.publish(g, nil)
		return
	}
	next := &probe{g: g}
	next.ctx, next.cancel = context.WithCancel(c.ctx)
	c.mu.Lock()
	p, c.probing = c.probing, next
	c.mu.Unlock()
	if p != nil {
		p.cancel()
	}
	c.inBackground(func() { c.prove(next) })
}

// newGeneration makes a generation of a value, unless the value is refused.
func (c *connector) newGeneration(value string) (*generation, error) {
	if strings.TrimSpace(value) == "" {
		c.refuse("", "empty", nil)
		return nil, fmt.Errorf("hotload: strategy %q delivered an empty or blank connection string for path %q", c.strategyName, c.path)
	}
	g := &generation{c: c, value: value, gone: make(chan struct{})}
	if d, ok := c.driver.(driver.DriverContext); ok {
		err := recovered(func() (err error) {
			g.connector, err = d.OpenConnector(value)
			return err
		})
		if err != nil {
			c.refuse(value, "driver", err)
			return nil, &refusedError{c.strategyName, c.driverName, c.path, err}
		}
	}
	c.refused = ""
	g.ctx, g.end = context.WithCancel(context.Background())
	return g, nil
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
		if code := state.SQLState(); isSQLState(code) {
			attrs = append(attrs, "sqlstate", code)
		}
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		attrs = append(attrs, "errno", errno.Error())
	}
	return attrs
}

// isSQLState reports whether code has the form of an SQLSTATE: a driver could
// return any text.
func isSQLState(code string) bool {
	return len(code) == 5 && strings.Trim(code, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ") == ""
}

// A refusedError says that the driver refused the first value. Its text does
// not include the driver's, which may quote the value.
type refusedError struct {
	strategy, driver, path string
	err                    error
}

func (e *refusedError) Error() string {
	return fmt.Sprintf("hotload: driver %q refused the connection string that strategy %q delivered for path %q, with an error of type %T "+
		"(unwrap it for its text, which may quote the string)", e.driver, e.strategy, e.path, e.err)
}

func (e *refusedError) Unwrap() error { return e.err }

// publish puts a generation in force and retires the one before it. It drops
// the generation if the connector is closed, or if the probe that it comes
// from was overtaken by another value.
func (c *connector) publish(g *generation, p *probe) {
	c.mu.Lock()
	if c.closed || c.probing != p {
		c.mu.Unlock()
		c.inBackground(func() { g.close() })
		return
	}
	old := c.gen.Load()
	if g.number = 1; old != nil {
		g.number = old.number + 1
	}
	c.probing = nil
	c.gen.Store(g)
	c.mu.Unlock()

	var retired []*serverConn
	inUse := 0
	if old != nil {
		old.end()
		for _, s := range old.connections() {
			switch {
			case s.state.CompareAndSwap(clean, parked):
				retired = append(retired, s)
			case s.state.Load() != parked: // else it is closing already
				inUse++
			}
		}
		closeAll(retired)
	}
	c.logger().Info("hotload: value accepted", "generation", g.number, "closed", len(retired), "in_use", inUse)
	switch {
	case old == nil:
	case c.forceKill && c.grace == 0:
		old.kill()
	default:
		old.retire()
		if c.forceKill {
			c.inBackground(func() { c.killLater(old) })
		}
	}
}

// A generation is a value that the driver has not refused, and what was opened
// with it.
type generation struct {
	c         *connector
	number    int // counts the values put in force, from 1; 0 before that
	value     string
	connector driver.Connector // nil if the driver is no driver.DriverContext
	ctx       context.Context  // ends when the generation is superseded
	end       context.CancelFunc
	gone      chan struct{} // closed when it is superseded and its last connection is gone

	mu      sync.Mutex      // guards the following fields
	retired bool            // superseded, and what comes before "drained" has been logged
	conns   []*serverConn   // not closed, each at its place
	dialing int             // calls of the driver's Open or Connect in progress
	overdue int             // of those, Opens that serve no caller any more
	waiting []chan<- dialed // callers that wait for one, oldest first
	spares  []*serverConn   // opened by an Open that its caller left, for the next caller
}

// dialed is what became of a dial.
type dialed struct {
	s   *serverConn
	err error
}

func (d dialed) result() (*serverConn, error) { return d.s, repanic(d.err) }

// spareLife is how long an Open whose caller has left, and then its connection,
// is kept for the next caller: long enough for callers who give up before the
// server answers, short enough not to go stale.
const spareLife = 10 * time.Second

// dial opens a server connection, unless the caller's context ends or the
// generation is superseded. The driver is called in a goroutine that the caller can
// leave. An Open, which has no context, goes on then and serves the next
// caller, so that there are never more of them than there were callers at a
// time, save those that have expired.
func (g *generation) dial(ctx context.Context) (_ *serverConn, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		if err != nil || g.connector == nil {
			cancel() // else it ends with the connection
		}
	}()
	defer context.AfterFunc(g.ctx, cancel)()
	result := make(chan dialed, 1)

	g.mu.Lock()
	if g.ctx.Err() != nil { // asked under the lock: it may have drained
		g.mu.Unlock()
		return nil, context.Canceled
	}
	if last := len(g.spares) - 1; last >= 0 {
		s := g.spares[last]
		g.spares = g.spares[:last]
		g.mu.Unlock()
		return s, nil
	}
	g.waiting = append(g.waiting, result)
	if g.connector != nil || g.dialing-g.overdue < len(g.waiting) {
		g.dialing++
		go g.open(ctx, cancel, result)
	}
	g.mu.Unlock()

	select {
	case d := <-result:
		return d.result()
	case <-ctx.Done():
	}
	if g.connector != nil {
		// A driver that heeds its context has an error of its own to return.
		limit := time.NewTimer(patience)
		defer limit.Stop()
		select {
		case d := <-result:
			return d.result()
		case <-g.ctx.Done():
		case <-limit.C:
		}
	}
	g.mu.Lock()
	i := slices.Index(g.waiting, result)
	if i >= 0 {
		g.waiting = slices.Delete(g.waiting, i, i+1)
	}
	g.mu.Unlock()
	if i < 0 {
		d := <-result
		return d.result()
	}
	return nil, ctx.Err()
}

// open calls the driver and hands what it returns to a caller: a connection from
// an Open to the one that has waited longest, all else to the one it was begun
// for.
func (g *generation) open(ctx context.Context, cancel context.CancelFunc, result chan<- dialed) {
	o := &opening{result: result}
	if g.connector == nil {
		g.expireLater(o)
	}
	ci, err := g.connect(ctx)
	var s *serverConn
	if err == nil {
		if g.connector == nil {
			cancel = func() {} // the caller's, who may be served by another Open
		}
		s = newServerConn(g, ci, cancel)
	}
	g.mu.Lock()
	g.dialing--
	o.ended = true
	if o.overdue {
		g.overdue--
	}
	if s != nil {
		g.addLocked(s)
	}
	if g.connector == nil && err == nil && len(g.waiting) > 0 {
		result = g.waiting[0]
	}
	i := slices.Index(g.waiting, result)
	spare := i < 0 && s != nil && g.connector == nil && !o.overdue
	switch {
	case i >= 0:
		g.waiting = slices.Delete(g.waiting, i, i+1)
		result <- dialed{s, err}
	case spare:
		g.spares = append(g.spares, s)
	case g.connector == nil && err != nil: // it failed its caller, who has left; others wait
		g.openAgainLocked()
	}
	gone := g.goneLocked()
	g.mu.Unlock()
	switch {
	case i >= 0:
	case spare && g.ctx.Err() == nil && g.c.ctx.Err() == nil:
		time.AfterFunc(spareLife, g.dropSpares)
	case s != nil:
		if s.retire() {
			g.c.addOrphan(s)
		}
	}
	if gone {
		g.c.inBackground(g.drained)
	}
}

// An opening is an Open in progress, guarded by generation.mu.
type opening struct {
	result  chan<- dialed // for the caller that it was begun for
	ended   bool
	overdue bool
}

// expireLater writes off an Open that has taken longer than spareLife and whose
// caller has left: it counts as overdue, no longer as one that serves a caller.
func (g *generation) expireLater(o *opening) {
	time.AfterFunc(spareLife, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		switch {
		case o.ended:
		case slices.Contains(g.waiting, o.result):
			g.expireLater(o)
		default:
			o.overdue = true
			g.overdue++
			g.openAgainLocked()
		}
	})
}

// openAgainLocked starts another Open if fewer are under way, without those
// that are overdue, than callers wait.
func (g *generation) openAgainLocked() {
	if g.dialing-g.overdue < len(g.waiting) && g.ctx.Err() == nil {
		g.dialing++
		go g.open(context.Background(), nil, g.waiting[0])
	}
}

// connect calls the driver.
func (g *generation) connect(ctx context.Context) (ci driver.Conn, err error) {
	defer recoverPanic(&err)
	if g.connector != nil {
		return g.connector.Connect(ctx)
	}
	return g.c.driver.Open(g.value)
}

// A driverPanic is a panic of the driver in a goroutine of hotload's, where
// nobody could recover from it.
type driverPanic struct{ value any }

func (*driverPanic) Error() string { return "hotload: the driver panicked" }

func recoverPanic(err *error) {
	if v := recover(); v != nil {
		*err = &driverPanic{v}
	}
}

// recovered calls the driver, and makes an error of its panic.
func recovered(f func() error) (err error) {
	defer recoverPanic(&err)
	return f()
}

// repanic returns err, or goes on with the panic that it stands for, in the
// goroutine of the caller.
func repanic(err error) error {
	if p, ok := err.(*driverPanic); ok {
		panic(p.value)
	}
	return err
}

// dropSpares closes the connections that wait for a next caller.
func (g *generation) dropSpares() {
	g.mu.Lock()
	spares := g.spares
	g.spares = nil
	g.mu.Unlock()
	for _, s := range spares {
		if s.retire() {
			g.c.addOrphan(s)
		}
	}
}

func (g *generation) connections() []*serverConn {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.conns)
}

func (g *generation) addLocked(s *serverConn) {
	s.index = len(g.conns)
	g.conns = append(g.conns, s)
}

// remove forgets a connection that is closed.
func (g *generation) remove(s *serverConn) {
	g.mu.Lock()
	last := len(g.conns) - 1
	g.conns[s.index], g.conns[last].index = g.conns[last], s.index
	g.conns[last] = nil
	g.conns = g.conns[:last]
	gone := g.goneLocked()
	g.mu.Unlock()
	if gone {
		g.drained() // before Close, which waits for the caller
	}
}

// retire lets the generation drain, now that the value that superseded it has
// been logged.
func (g *generation) retire() {
	g.mu.Lock()
	g.retired = true
	gone := g.goneLocked()
	g.mu.Unlock()
	if gone {
		g.c.inBackground(g.drained)
	}
}

// goneLocked reports, once, that nothing is left of the generation: it is
// superseded, its last connection is closed, and no dial can bring another.
func (g *generation) goneLocked() bool {
	if !g.retired || g.dialing > 0 || len(g.conns) > 0 {
		return false
	}
	select {
	case <-g.gone:
		return false
	default:
		close(g.gone)
		return true
	}
}

func (g *generation) drained() {
	g.c.logger().Info("hotload: generation drained", "generation", g.number)
	g.close()
}

// close closes the driver's connector, which happens once: when the
// generation has drained, or is in force at DB.Close, or never was in force.
func (g *generation) close() error {
	if c, ok := g.connector.(io.Closer); ok {
		return recovered(c.Close)
	}
	return nil
}

// A probe is a value that is put in force when it has proved itself.
type probe struct {
	g      *generation
	ctx    context.Context // ends when another value comes
	cancel context.CancelFunc
}

// A try may last as long as the limit, unless the driver ignores its context
// or has none; the pause between two tries doubles from the least to the most.
const (
	probeLimit      = 10 * time.Second
	leastProbePause = 250 * time.Millisecond
	mostProbePause  = 5 * time.Second
)

// prove tries a value until a connection can be opened with it, and then puts
// it in force. A failure is logged once for each reason.
func (c *connector) prove(p *probe) {
	defer p.cancel()
	told := make(map[string]bool)
	tell := func(err error) {
		attrs := describe(err)
		if reason := fmt.Sprint(attrs...); !told[reason] && p.ctx.Err() == nil {
			told[reason] = true
			c.logger().Warn("hotload: value refused", slices.Concat([]any{"reason", "probe"}, attrs)...)
		}
	}
	for pause := leastProbePause; ; pause = min(2*pause, mostProbePause) {
		select {
		case c.trying <- struct{}{}: // one at a time, even if a try of another value cannot be interrupted
		case <-p.ctx.Done():
			p.g.close()
			return
		}
		result := make(chan error, 1)
		go func() { result <- p.g.try(p.ctx) }()
		var err error
		select {
		case err = <-result:
		case <-time.After(probeLimit + patience): // a driver that heeds no limit
			tell(context.DeadlineExceeded)
			select {
			case err = <-result:
			case <-p.ctx.Done(): // overdue and overtaken: leave it
				<-c.trying
				go func() {
					<-result
					p.g.close()
				}()
				return
			}
		}
		if err == nil {
			c.publish(p.g, p)
		}
		<-c.trying
		if err == nil {
			return
		}
		tell(err)
		select {
		case <-time.After(pause):
		case <-p.ctx.Done():
		}
	}
}

// try opens a connection, pings it if the driver can, and closes it, unless the
// value has been given up.
func (g *generation) try(ctx context.Context) (err error) {
	defer recoverPanic(&err)
	if err := ctx.Err(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	ci, err := g.connect(ctx)
	if err != nil {
		return err
	}
	s := newServerConn(g, ci, cancel)
	s.state.Store(parked)
	g.mu.Lock()
	g.addLocked(s)
	g.mu.Unlock()
	defer func() { // also when Ping panics
		s.awaitClose(context.Background())
		g.c.addOrphan(s)
	}()
	if pinger, ok := ci.(driver.Pinger); ok {
		err = pinger.Ping(ctx)
	}
	return err
}

// The states of a server connection. Whoever moves one out of clean owns it
// until it is clean again; what is parked or killed is closed by whoever made
// it so.
//
//	state    meaning                                    becomes
//	clean    nothing has run since it was opened or     inUse: an operation begins
//	         taken from the pool                        calling: the driver is asked about arguments
//	                                                    or a statement (forceKill only)
//	                                                    held: see there
//	                                                    parked: its generation is superseded
//	inUse    something ran, no call is in progress      held, or clean without forceKill: returned to
//	                                                    the pool (IsValid)
//	                                                    calling: a call begins (forceKill only)
//	                                                    killed: forceKill
//	                                                    parked: superseded before anything ran
//	held     owned for a moment that is no use:         clean, and parked if its generation was
//	         ResetSession, IsValid, Stmt.Close on a     superseded meanwhile
//	         pooled connection; never killed
//	calling  a call is in progress, or Raw was called   inUse: the call returns
//	                                                    held: returned to the pool after Raw
//	                                                    killing: forceKill
//	                                                    parked: superseded before anything ran
//	killing  killed, but the call is still in progress  killed: it returns, or patience ends
//	                                                    parked: returned to the pool after Raw
//	killed   ended; the proxy has to say so             parked: returned to the pool
//	parked   detached; the proxy dials when next used   nothing
//
// In graceful mode calling, killing and killed do not occur. Closing
// the proxy parks its server connection from whatever state.
const (
	clean int32 = iota
	inUse
	held
	calling
	killing
	killed
	parked
)

// A serverConn is a connection of the driver. The proxy that database/sql
// holds is apart from it: a proxy outlives its server connection, and what is
// done to a server connection that was retired cannot touch its successor.
type serverConn struct {
	gen    *generation
	index  int // in gen.conns, guarded by gen.mu
	ci     driver.Conn
	forced bool  // forceKill
	busy   int32 // what a call makes of clean: calling with forceKill, else inUse
	state  atomic.Int32

	// What most operations ask of ci; nil where the driver has none.
	execer    driver.ExecerContext
	queryer   driver.QueryerContext
	resetter  driver.SessionResetter
	validator driver.Validator
	checker   driver.NamedValueChecker

	// Used by the owner alone.
	stmts []*prepared // open
	outs  []*callCtx  // kept, of Execs that may have set a cursor

	// call is the context of the call in progress, if it has one. The owner sets
	// it before the state is calling; whoever makes that killing reads it.
	call *callCtx

	cancel  context.CancelFunc        // ends the dial's context, which the driver may hold on to
	closing atomic.Pointer[time.Time] // when its closing was begun, if it was
	done    chan struct{}             // closed when ci.Close has returned
	err     error                     // what it returned; published by done

	mu   sync.Mutex // guards kept, and the index of those in it
	kept []*callCtx // those that outlive their call
}

func newServerConn(g *generation, ci driver.Conn, cancel context.CancelFunc) *serverConn {
	s := &serverConn{gen: g, ci: ci, forced: g.c.forceKill, busy: inUse, cancel: cancel, done: make(chan struct{})}
	if s.forced {
		s.busy = calling
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
	return s
}

// superseded reports whether another value is in force.
func (s *serverConn) superseded() bool { return s.gen != s.gen.c.gen.Load() }

// retire parks and closes the connection if it is clean.
func (s *serverConn) retire() bool {
	if !s.state.CompareAndSwap(clean, parked) {
		return false
	}
	s.close()
	return true
}

// release makes a connection that is held, or in use and not subject to a kill,
// clean. It reports whether it stays so.
func (s *serverConn) release() bool {
	s.state.Store(clean)
	if s.superseded() {
		s.retire()
		return false
	}
	return true
}

// close closes the driver's connection in the background, its prepared
// statements first as database/sql does, so that nobody has to wait for it.
func (s *serverConn) close() { s.gen.c.inBackground(s.closeOnce) }

// closeAll is close for many, of which none waits for another. Each goroutine
// starts the next before it calls the driver: started at the same time, they
// would keep all else in the program from running.
func closeAll(conns []*serverConn) {
	if len(conns) > 0 {
		conns[0].gen.c.inBackground(func() {
			closeAll(conns[1:])
			conns[0].closeOnce()
		})
	}
}

// closeOnce does nothing if another has begun: who parked or killed the
// connection, awaitClose, or a kill whose patience ended.
func (s *serverConn) closeOnce() {
	if now := time.Now(); !s.closing.CompareAndSwap(nil, &now) {
		return
	}
	for _, st := range s.stmts {
		if !s.forced {
			recovered(st.si.Close)
			continue
		}
		// The last resort, also here: one that hangs does not keep the connection open.
		var claimed atomic.Bool // by who goes on to close the connection
		limit := time.AfterFunc(patience, func() {
			s.gen.c.inBackground(func() {
				if claimed.CompareAndSwap(false, true) {
					s.closeConn()
				}
			})
		})
		recovered(st.si.Close)
		if !limit.Stop() && !claimed.CompareAndSwap(false, true) {
			return
		}
	}
	s.closeConn()
}

// closeConn closes the driver's connection.
func (s *serverConn) closeConn() {
	s.err = recovered(s.ci.Close)
	s.cancel()
	if s.forced {
		s.endKept(nil)
	}
	close(s.done) // first: who waits for it need not wait for the lock that a change's many are removed under
	s.gen.c.removeOrphan(s)
	s.gen.remove(s)
}

// awaitClose waits for the connection to be closed, while patience with it lasts
// and for at most half of the time that the caller has: a nil error does not
// mean that it is closed. It starts the Close if nobody has, so as not to wait
// for all others that a change closes.
func (s *serverConn) awaitClose(ctx context.Context) error {
	wait := patience
	select {
	case <-s.done:
		return nil
	default:
		if began := s.closing.Load(); began != nil {
			wait -= time.Since(*began)
		} else {
			s.close()
		}
	}
	hurried := false
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline)/2 < wait {
		hurried, wait = true, time.Until(deadline)/2
	}
	limit := time.NewTimer(wait)
	defer limit.Stop()
	select {
	case <-s.done:
	case <-limit.C:
		if hurried {
			s.gen.c.addOrphan(s) // for others to wait for
		}
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// A conn is the proxy that database/sql holds as its driver.Conn: a place for
// one server connection after another. As database/sql makes one call at a
// time on it, its fields need no lock; the retiring of a generation works on
// server connections, never on proxies.
//
// Its kinds differ in whether they have ExecContext and QueryContext: if the
// driver has neither them nor their predecessors, database/sql must not find
// them here, because it would convert the arguments before it learned that it
// has to prepare a statement.
type conn struct {
	c      *connector
	s      *serverConn
	alone  bool // opened by Driver.Open: closing it closes the connector
	closed bool

	// unchecked means that the arguments for the operation to come are as the
	// program passed them: there was no connection to check them.
	unchecked bool
	// spoiled means that database/sql would have closed the driver's
	// connection by now: see spoilingTx.
	spoiled bool
}

type (
	execConn      struct{ conn }
	queryConn     struct{ conn }
	execQueryConn struct{ execConn }
)

var (
	_ driver.ConnPrepareContext = (*conn)(nil)
	_ driver.ConnBeginTx        = (*conn)(nil)
	_ driver.Pinger             = (*conn)(nil)
	_ driver.NamedValueChecker  = (*conn)(nil)
	_ driver.SessionResetter    = (*conn)(nil)
	_ driver.Validator          = (*conn)(nil)
	_ driver.ExecerContext      = (*execConn)(nil)
	_ driver.QueryerContext     = (*queryConn)(nil)
	_ driver.ExecerContext      = (*execQueryConn)(nil)
	_ driver.QueryerContext     = (*execQueryConn)(nil)
)

func newConn(c *connector, s *serverConn, alone bool) driver.Conn {
	p := conn{c: c, s: s, alone: alone}
	switch {
	case s.execer != nil && s.queryer != nil:
		return &execQueryConn{execConn{p}}
	case s.execer != nil:
		return &execConn{p}
	case s.queryer != nil:
		return &queryConn{p}
	}
	return &p
}

// take takes the server connection for an operation, which makes a clean one
// inUse, or calling if a call begins. It returns nil if the proxy has none, or
// one that was killed.
func (p *conn) take(state int32) *serverConn {
	s := p.s
	if p.spoiled {
		return nil
	}
	switch s.state.Load() {
	case clean:
		if !s.state.CompareAndSwap(clean, state) {
			return nil
		}
		if s.superseded() {
			// Nothing ran: move on to the value in force, even if the
			// connection was killed this moment.
			s.state.Store(parked)
			s.close()
			return nil
		}
	case killing, killed, parked:
		return nil
	}
	return s
}

// acquire takes the server connection, dialling if there is none.
func (p *conn) acquire(ctx context.Context) (*serverConn, error) {
	if p.spoiled {
		return nil, sql.ErrConnDone
	}
	for {
		if s := p.take(inUse); s != nil {
			return s, nil
		}
		switch p.s.state.Load() {
		case killing: // since a call of Raw, which has returned
			p.s.leave(nil)
			return nil, ErrKilled
		case killed:
			return nil, ErrKilled
		}
		if p.closed {
			return nil, driver.ErrBadConn
		}
		if err := p.s.awaitClose(ctx); err != nil {
			return nil, err
		}
		s, err := p.c.dial(ctx)
		if err != nil {
			return nil, err
		}
		p.s = s
	}
}

// hold takes the server connection for a moment that is no use. It reports
// false if there is none.
func (p *conn) hold() bool {
	for {
		switch state := p.s.state.Load(); state {
		case clean, inUse, calling:
			if p.s.state.CompareAndSwap(state, held) {
				return true
			}
		default:
			return false
		}
	}
}

// ResetSession does nothing if the proxy is parked: its next server connection
// will be a new one.
//
// A layer above that does not pass IsValid on leaves it to this method to take
// the connection back.
func (p *conn) ResetSession(ctx context.Context) error {
	s := p.s
	p.spoiled = false // database/sql has kept it
	if s.resetter == nil && s.state.Load() == clean {
		return nil
	}
	if !p.hold() {
		p.park()
		return nil
	}
	if s.forced {
		s.dropCalls()
	}
	var err error
	if s.resetter != nil {
		err = s.resetSession(ctx)
	}
	if !s.release() {
		return nil
	}
	return err
}

// resetSession calls the driver. With forceKill its context ends also when the
// generation is superseded: the driver may ask a server that no longer answers,
// and nothing would be lost.
func (s *serverConn) resetSession(caller context.Context) error {
	if !s.forced {
		return s.resetter.ResetSession(caller)
	}
	ctx := &callCtx{Context: caller, gen: s.gen.ctx}
	err := s.resetter.ResetSession(ctx)
	if ctx.made.Load() != nil { // else the driver may have kept it, to reset the session with the next call
		ctx.end(nil)
	}
	return err
}

// park parks the server connection and closes it. It reports false if it is
// closed, or closing, since a change.
func (p *conn) park() bool {
	if was := p.s.state.Swap(parked); was == parked || was == killed {
		return false
	}
	p.s.close()
	return true
}

// IsValid tells that the connection is being returned to the pool. A server
// connection whose generation is superseded leaves; the proxy stays.
func (p *conn) IsValid() bool {
	s, spoiled := p.s, p.spoiled
	p.spoiled = false
	if owned := !s.forced && s.state.Load() == inUse; !owned && !p.hold() {
		p.park()
		return true
	}
	if s.forced {
		s.dropCalls()
	}
	if (spoiled || s.validator != nil && !s.validator.IsValid()) && !s.superseded() {
		return false
	}
	s.release()
	return true
}

// Close waits for the driver's Close, but not for long, and not at all if the
// connection's generation is superseded: database/sql may hold its lock.
func (p *conn) Close() (err error) {
	if p.alone {
		defer func() { // also when the driver panics
			if cerr := p.c.Close(); cerr != nil {
				err = cerr
			}
		}()
	}
	p.closed = true
	s := p.s
	ours := p.park()
	if ours && !s.superseded() && !p.c.hasOrphans() { // if one hangs, the next may too
		s.awaitClose(context.Background())
	}
	select {
	case <-s.done:
		if ours {
			err = repanic(s.err)
		}
	default:
		p.c.addOrphan(s)
	}
	return err
}

// Raw returns the driver's connection for use in the callback of sql.Conn.Raw;
// nil if it was killed, or there is none and none can be opened.
func (p *conn) Raw() driver.Conn {
	s, err := p.acquire(context.Background())
	if err != nil || !s.enter() {
		return nil
	}
	return s.ci // the call does not end here, but when the next one begins
}

func (p *conn) Ping(ctx context.Context) error {
	s, ctx, err := p.begin(ctx)
	if err != nil {
		return err
	}
	if pinger, ok := s.ci.(driver.Pinger); ok {
		err = pinger.Ping(ctx)
	}
	return s.end(err)
}

func (p *queryConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	return p.query(ctx, query, args)
}

func (p *execQueryConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	return p.query(ctx, query, args)
}

func (p *execConn) ExecContext(caller context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	if p.direct() && p.s.execer != nil {
		return p.s.execer.ExecContext(caller, query, args)
	}
	s, ctx, err := p.begin(caller)
	if err != nil {
		return nil, err
	}
	if p.unchecked {
		if args, err = p.checked(nil, args); err != nil {
			return nil, s.end(err)
		}
	}
	if s.execer == nil { // unlike the connection that this proxy was made for
		return nil, s.end(driver.ErrSkip)
	}
	res, err := s.execer.ExecContext(ctx, query, args)
	return res, s.endExec(err, args)
}

func (p *conn) query(caller context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	s, ctx, err := p.begin(caller)
	if err != nil {
		return nil, err
	}
	if p.unchecked {
		if args, err = p.checked(nil, args); err != nil {
			return nil, s.end(err)
		}
	}
	if s.queryer == nil {
		return nil, s.end(driver.ErrSkip)
	}
	return s.rows(s.queryer.QueryContext(ctx, query, args))
}

func (p *conn) Begin() (driver.Tx, error) {
	return p.BeginTx(context.Background(), driver.TxOptions{})
}

func (p *conn) BeginTx(caller context.Context, opts driver.TxOptions) (driver.Tx, error) {
	s, err := p.ready(caller)
	if err != nil {
		return nil, err
	}
	ctx := caller
	var forced *tx
	if s.forced {
		forced = &tx{s: s, ctx: callCtx{Context: caller}}
		ctx = &forced.ctx
		if err := s.beginForced(&forced.ctx); err != nil {
			return nil, err
		}
	}
	t, err := begin(ctx, s, opts)
	if err != nil {
		return nil, s.end(err)
	}
	if s.resetter == nil || s.validator == nil {
		t = &spoilingTx{t, p, caller}
	}
	if forced == nil {
		return t, nil
	}
	forced.tx = t
	s.keep(s.call)
	s.leave(nil)
	return forced, nil
}

// A spoilingTx is a transaction of a driver's connection that is no
// SessionResetter or no Validator. The proxy is both, and so database/sql keeps
// it when it rolls back because the transaction's context ended, whereas it
// would have closed the driver's.
type spoilingTx struct {
	driver.Tx
	p   *conn
	ctx context.Context
}

func (t *spoilingTx) Rollback() error {
	t.p.spoiled = t.ctx.Err() != nil
	return t.Tx.Rollback()
}

func (p *conn) Prepare(query string) (driver.Stmt, error) {
	return p.PrepareContext(context.Background(), query)
}

func (p *conn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	s, ctx, err := p.begin(ctx)
	if err != nil {
		return nil, err
	}
	st := &stmt{p: p, text: query}
	if err := st.prepare(ctx, s); err != nil {
		return nil, s.end(err)
	}
	st.ctx = s.keep(s.call)
	s.leave(nil)
	if _, ok := st.si.(driver.ColumnConverter); ok {
		return &columnStmt{st}, nil
	}
	return st, nil
}

// CheckNamedValue has the driver's connection check an argument of the
// operation to come. Without a connection it accepts the argument as it is:
// there is no context to dial with.
func (p *conn) CheckNamedValue(nv *driver.NamedValue) error {
	s := p.take(p.s.busy)
	p.unchecked = s == nil
	if s == nil || !s.enter() {
		return nil
	}
	err := driver.ErrSkip
	if s.checker != nil {
		err = s.checker.CheckNamedValue(nv)
	}
	s.leave(nil)
	return err
}

// checked returns the arguments that there was no connection to check as
// database/sql would have converted them.
func (p *conn) checked(si driver.Stmt, args []driver.NamedValue) ([]driver.NamedValue, error) {
	p.unchecked = false
	return convert(p.s.ci, si, args)
}

// A stmt is a prepared statement of a proxy. It prepares itself again when the
// proxy has another server connection than the one it was prepared on.
type stmt struct {
	p    *conn
	text string // of the query
	*prepared
}

// A prepared is a statement of the driver. It stays what it is when its stmt
// is prepared again, as its connection may be closing still.
type prepared struct {
	s       *serverConn
	si      driver.Stmt
	exec    driver.StmtExecContext // si, or what has it do so
	query   driver.StmtQueryContext
	checker driver.NamedValueChecker // si, or the connection, or nil
	ctx     *callCtx                 // kept, that it was prepared with; nil without forceKill
	index   int                      // in s.stmts
}

func newPrepared(s *serverConn, si driver.Stmt) *prepared {
	st := &prepared{s: s, si: si, index: len(s.stmts)}
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
	return st
}

// A columnStmt is a stmt of a driver whose statements are ColumnConverters.
type columnStmt struct{ *stmt }

var (
	_ driver.StmtExecContext   = (*stmt)(nil)
	_ driver.StmtQueryContext  = (*stmt)(nil)
	_ driver.NamedValueChecker = (*stmt)(nil)
	_ driver.ColumnConverter   = (*columnStmt)(nil)
)

// prepare prepares the statement in a call, whose context ends with it.
func (st *stmt) prepare(ctx context.Context, s *serverConn) error {
	si, err := prepare(ctx, s, st.text)
	if err != nil {
		return err
	}
	st.prepared = newPrepared(s, si)
	s.stmts = append(s.stmts, st.prepared)
	return nil
}

// Close closes the driver's statement, unless that was closed with its server
// connection. It may come when the connection is back in the pool.
func (st *stmt) Close() error {
	s := st.s
	if s != st.p.s {
		return nil
	}
	switch {
	case s.state.CompareAndSwap(clean, held):
		err := st.close()
		s.release()
		return err
	case s.state.Load() == parked || !s.enter():
		return nil
	}
	return s.leave(st.close())
}

func (st *stmt) close() error {
	if st.index < 0 {
		return nil // closed already, in a Raw callback
	}
	open, last := st.s.stmts, len(st.s.stmts)-1
	open[st.index], open[last].index = open[last], st.index
	open[last] = nil
	st.s.stmts = open[:last]
	st.index = -1
	defer st.s.drop(st.ctx)
	return st.si.Close()
}

// take takes the server connection for an operation of the statement; nil if
// the statement is not prepared there.
func (st *stmt) take() *serverConn {
	p := st.p
	if p.s != st.s {
		p.unchecked = true
		return nil
	}
	s := p.take(p.s.busy)
	p.unchecked = s == nil
	if s == nil || !s.enter() {
		return nil
	}
	return s
}

// NumInput returns -1, for unknown, if the statement has to be prepared again.
// Then the arguments are counted when they are converted.
func (st *stmt) NumInput() int {
	s := st.take()
	if s == nil {
		return -1
	}
	n := st.si.NumInput()
	s.leave(nil)
	return n
}

func (st *stmt) CheckNamedValue(nv *driver.NamedValue) error {
	s := st.take()
	if s == nil {
		return nil
	}
	err := driver.ErrSkip
	if st.checker != nil {
		err = st.checker.CheckNamedValue(nv)
	}
	s.leave(nil)
	return err
}

func (st *columnStmt) ColumnConverter(i int) driver.ValueConverter {
	if cc, ok := st.si.(driver.ColumnConverter); ok {
		if s := st.take(); s != nil {
			defer s.leave(nil)
			return cc.ColumnConverter(i)
		}
	}
	return driver.DefaultParameterConverter
}

func (st *stmt) Exec(args []driver.Value) (driver.Result, error) {
	return st.ExecContext(context.Background(), named(args))
}

func (st *stmt) Query(args []driver.Value) (driver.Rows, error) {
	return st.QueryContext(context.Background(), named(args))
}

func (st *stmt) ExecContext(caller context.Context, args []driver.NamedValue) (driver.Result, error) {
	if p := st.p; p.direct() && p.s == st.s {
		return st.exec.ExecContext(caller, args)
	}
	s, ctx, args, err := st.begin(caller, args)
	if err != nil {
		return nil, err
	}
	res, err := st.exec.ExecContext(ctx, args)
	return res, s.endExec(err, args)
}

func (st *stmt) QueryContext(caller context.Context, args []driver.NamedValue) (driver.Rows, error) {
	s, ctx, args, err := st.begin(caller, args)
	if err != nil {
		return nil, err
	}
	return s.rows(st.query.QueryContext(ctx, args))
}

// begin begins a call with the statement prepared and the arguments converted.
func (st *stmt) begin(caller context.Context, args []driver.NamedValue) (*serverConn, context.Context, []driver.NamedValue, error) {
	s, ctx, err := st.p.begin(caller)
	if err != nil {
		return nil, nil, nil, err
	}
	if st.s != s {
		err = st.prepareAgain(caller, s)
	}
	if err == nil && s.over() {
		err = ErrKilled
	}
	if err == nil && st.p.unchecked {
		args, err = st.p.checked(st.si, args)
	}
	if err != nil {
		return nil, nil, nil, s.end(err)
	}
	return s, ctx, args, nil
}

// prepareAgain prepares the statement on another server connection than
// before, in a call that is for something else: it has a context of its own.
func (st *stmt) prepareAgain(caller context.Context, s *serverConn) error {
	if !s.forced {
		return st.prepare(caller, s)
	}
	ctx := s.keep(&callCtx{Context: caller})
	if s.state.Load() != calling {
		ctx.end(ErrKilled) // killed before it was kept
	}
	if err := st.prepare(ctx, s); err != nil {
		s.drop(ctx)
		return err
	}
	st.ctx = ctx
	return nil
}

// begin takes the server connection and begins a call on it. With forceKill
// the call has a context of its own, derived from the caller's, which outlives
// the call while the driver may hold on to it: until a transaction, rows or a
// statement end.
func (p *conn) begin(caller context.Context) (*serverConn, context.Context, error) {
	s, err := p.ready(caller)
	if err != nil || !s.forced {
		return s, caller, err
	}
	ctx := &callCtx{Context: caller}
	return s, ctx, s.beginForced(ctx)
}

// direct reports whether an Exec has nothing to begin and nothing to end: its
// arguments have taken the connection, without forceKill. The quickest Execs
// take 3 % longer without it, in BenchmarkRatio.
func (p *conn) direct() bool {
	return !p.s.forced && !p.unchecked && !p.spoiled && p.s.state.Load() == inUse
}

// ready takes the server connection, unless it was taken already.
func (p *conn) ready(caller context.Context) (*serverConn, error) {
	if s := p.s; s.state.Load() == inUse && !p.spoiled {
		return s, nil
	}
	s, err := p.acquire(caller)
	if err != nil {
		p.unchecked = false
	}
	return s, err
}

func (s *serverConn) beginForced(ctx *callCtx) error {
	switch s.state.Load() {
	case calling, killing: // since a call of Raw, which has returned
		s.leave(nil)
	}
	if s.state.Load() != inUse {
		return ErrKilled
	}
	s.call = ctx
	if !s.enter() {
		return ErrKilled
	}
	return nil
}

// end ends a call, and its context.
func (s *serverConn) end(err error) error {
	if s.forced {
		return s.endForced(err)
	}
	return err
}

func (s *serverConn) endForced(err error) error {
	ctx := s.call
	err = s.leave(err)
	ctx.end(nil)
	return err
}

// endExec is end for an Exec. Its context lives on while the connection is
// checked out if it may have set a cursor.
func (s *serverConn) endExec(err error, args []driver.NamedValue) error {
	if !s.forced {
		return err
	}
	for i := range args {
		if out, ok := args[i].Value.(sql.Out); ok && err == nil && isCursor(out.Dest) {
			s.outs = append(s.outs, s.keep(s.call))
			return s.leave(nil)
		}
	}
	return s.endForced(err)
}

func isCursor(dest any) bool {
	switch dest.(type) {
	case *driver.Rows, *any:
		return true
	}
	return false
}

// dropCalls drops the contexts of calls that are over when the connection is
// returned to the pool.
func (s *serverConn) dropCalls() {
	s.call = nil
	for _, ctx := range s.outs {
		s.drop(ctx)
	}
	s.outs = nil
}

// keep lets a context outlive its call, until it is dropped. There is none
// without forceKill.
func (s *serverConn) keep(ctx *callCtx) *callCtx {
	if ctx != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		ctx.index = len(s.kept)
		s.kept = append(s.kept, ctx)
	}
	return ctx
}

// drop ends a context that was kept, if there is one. It may be called again:
// who has a transaction from a Raw callback may end it twice.
func (s *serverConn) drop(ctx *callCtx) {
	if ctx != nil && s.forget(ctx) {
		ctx.end(nil)
	}
}

func (s *serverConn) forget(ctx *callCtx) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ctx.index < 0 {
		return false
	}
	last := len(s.kept) - 1
	s.kept[ctx.index], s.kept[last].index = s.kept[last], ctx.index
	s.kept[last] = nil
	s.kept = s.kept[:last]
	ctx.index = -1
	return true
}

// endKept ends the contexts that outlive their call.
func (s *serverConn) endKept(cause error) {
	s.mu.Lock()
	kept := slices.Clone(s.kept)
	s.mu.Unlock()
	for _, ctx := range kept {
		ctx.end(cause)
	}
}

// A callCtx is a caller's context for a call of the driver, which hotload can
// end. It is what context.WithCancelCause makes of that, but is made only when
// the driver asks for Done, or when it is killed: most calls do not come to that.
type callCtx struct {
	context.Context                         // the caller's
	gen             context.Context         // ends it too, unless nil
	made            atomic.Pointer[madeCtx] // endedCtx if it ended before that
	index           int                     // in serverConn.kept, if it is kept; -1 once it is dropped
}

type madeCtx struct {
	context.Context
	cancel context.CancelCauseFunc
}

// endedCtx is what is made of a context that ended before the driver asked for Done.
var endedCtx = func() *madeCtx {
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(nil)
	return &madeCtx{ctx, cancel}
}()

func (c *callCtx) make() *madeCtx {
	if c.made.Load() == nil {
		ctx, cancel := context.WithCancelCause(c.Context)
		m := &madeCtx{ctx, cancel}
		if c.gen != nil {
			stop := context.AfterFunc(c.gen, func() { cancel(nil) })
			m.cancel = func(cause error) {
				stop()
				cancel(cause)
			}
			if c.gen.Err() != nil { // as Err has said, perhaps
				cancel(nil)
			}
		}
		if !c.made.CompareAndSwap(nil, m) {
			m.cancel(nil)
		}
	}
	return c.made.Load()
}

func (c *callCtx) end(cause error) {
	if cause != nil || !c.made.CompareAndSwap(nil, endedCtx) {
		c.make().cancel(cause)
	}
}

func (c *callCtx) Done() <-chan struct{} { return c.make().Done() }

func (c *callCtx) Err() error {
	if m := c.made.Load(); m != nil {
		return m.Err()
	}
	if c.gen != nil && c.gen.Err() != nil {
		return c.gen.Err()
	}
	return c.Context.Err()
}

// Value answers from the context that was made, if there is one: package context
// finds its own there, and needs no goroutine to wait for Done.
func (c *callCtx) Value(key any) any {
	if m := c.made.Load(); m != nil && m != endedCtx {
		return m.Value(key)
	}
	return c.Context.Value(key)
}

// rows ends a call that returned rows, or failed.
func (s *serverConn) rows(r driver.Rows, err error) (driver.Rows, error) {
	if err != nil {
		return nil, s.end(err)
	}
	if !s.forced {
		return r, nil
	}
	ctx := s.keep(s.call)
	s.leave(nil)
	return wrapRows(&rows{Rows: r, s: s, ctx: ctx}), nil
}

// enter begins a call of the driver. It reports false if the connection was
// killed. Without forceKill there is nothing to do.
func (s *serverConn) enter() bool {
	return !s.forced || s.state.Load() == calling || s.state.CompareAndSwap(inUse, calling)
}

// over reports whether the call in progress was killed: it must not go on to
// another of the driver's, whose connection may be closed by now.
func (s *serverConn) over() bool { return s.forced && s.state.Load() != calling }

// leave ends a call of the driver. If it was killed, the connection is closed
// and its error, if it failed, becomes one that database/sql does not take for
// a reason to run the call again.
func (s *serverConn) leave(err error) error {
	if !s.forced || s.state.CompareAndSwap(calling, inUse) {
		return err
	}
	return s.leaveKilled(err)
}

func (s *serverConn) leaveKilled(err error) error {
	if s.state.CompareAndSwap(killing, killed) {
		s.close()
	}
	if err == nil || err == driver.ErrSkip {
		return err
	}
	return &killedError{err}
}

// kill ends what is in use: it cancels the contexts that the driver holds and
// closes the connection when the call in progress has returned, or when
// patience with it ends. It reports false if nothing is in use.
func (s *serverConn) kill() bool {
	for {
		switch s.state.Load() {
		case inUse:
			if s.state.CompareAndSwap(inUse, killed) {
				s.endKept(ErrKilled)
				s.close()
				return true
			}
		case calling:
			if s.state.CompareAndSwap(calling, killing) {
				if s.call != nil {
					s.call.end(ErrKilled)
				}
				s.endKept(ErrKilled)
				time.AfterFunc(patience, func() {
					// In the background before it is killed, when DB.Close can come.
					s.gen.c.inBackground(func() {
						// Not its statements: the call in progress holds up their Close.
						if now := time.Now(); s.state.CompareAndSwap(killing, killed) && s.closing.CompareAndSwap(nil, &now) {
							s.closeConn()
						}
					})
				})
				return true
			}
		default:
			return false
		}
	}
}

// kill ends what is in use on a superseded generation, and retires it once that
// has been logged.
func (g *generation) kill() {
	g.mu.Lock()
	g.retired = false
	g.mu.Unlock()
	defer g.retire()
	n := 0
	for _, s := range g.connections() {
		if s.kill() {
			n++
		}
	}
	if n > 0 {
		g.c.logger().Warn("hotload: connections killed", "generation", g.number, "killed", n)
	}
}

// killLater kills what is in use on a superseded generation when its grace is
// over. If its value is in force again by then, the grace begins anew when
// that is superseded in its turn.
func (c *connector) killLater(g *generation) {
	for {
		select {
		case <-time.After(c.grace):
		case <-g.gone:
			return
		case <-c.ctx.Done():
			return
		}
		cur := c.gen.Load()
		if cur.value != g.value {
			g.kill()
			return
		}
		select {
		case <-cur.ctx.Done():
		case <-g.gone:
			return
		case <-c.ctx.Done():
			return
		}
	}
}

// A killedError is the error of a call that was killed. It matches ErrKilled
// and nothing else, but the driver's error can be had with errors.As.
type killedError struct{ err error }

func (e *killedError) Error() string        { return ErrKilled.Error() + ": " + e.err.Error() }
func (e *killedError) Is(target error) bool { return target == ErrKilled }
func (e *killedError) As(target any) bool   { return errors.As(e.err, target) }

// A tx is a transaction that can be killed.
type tx struct {
	s   *serverConn
	ctx callCtx // kept
	tx  driver.Tx
}

func (t *tx) Commit() error   { return t.end(t.tx.Commit) }
func (t *tx) Rollback() error { return t.end(t.tx.Rollback) }

func (t *tx) end(f func() error) error {
	defer t.s.drop(&t.ctx)
	if !t.s.enter() {
		return ErrKilled
	}
	return t.s.leave(f())
}

// A rows is rows that can be killed. Where the driver's lack an optional
// interface, it answers as database/sql would have.
type rows struct {
	driver.Rows
	s       *serverConn
	ctx     *callCtx // kept; nil of a cursor within rows
	columns []string // of the result set
	more    bool     // another result set follows: database/sql asks when Next has said io.EOF
}

var (
	_ driver.RowsNextResultSet              = (*rows)(nil)
	_ driver.RowsColumnTypeScanType         = (*rows)(nil)
	_ driver.RowsColumnTypeDatabaseTypeName = (*rows)(nil)
	_ driver.RowsColumnTypeLength           = (*rows)(nil)
	_ driver.RowsColumnTypeNullable         = (*rows)(nil)
	_ driver.RowsColumnTypePrecisionScale   = (*rows)(nil)
)

// wrapRows gives rows the optional interfaces that only a newer Go has.
var wrapRows = func(r *rows) driver.Rows { return r }

// Columns asks the driver once for each result set: a Rows.Scan that fails
// asks without database/sql's lock, perhaps during another call.
func (r *rows) Columns() []string {
	if r.columns == nil && r.s.enter() {
		r.columns = r.Rows.Columns()
		r.s.leave(nil)
	}
	return r.columns
}

func (r *rows) Close() error {
	defer r.s.drop(r.ctx)
	if !r.s.enter() {
		return ErrKilled
	}
	return r.s.leave(r.Rows.Close())
}

func (r *rows) Next(dest []driver.Value) error {
	if !r.s.enter() {
		return ErrKilled
	}
	err := r.Rows.Next(dest)
	if err == nil {
		for i, v := range dest {
			if cursor, ok := v.(driver.Rows); ok { // sql.Rows.Scan makes it a sql.Rows
				dest[i] = wrapRows(&rows{Rows: cursor, s: r.s})
			}
		}
	}
	return r.next(err)
}

// next ends a call that asked for a row. At the end of a result set it asks for
// the next in the same call: afterwards the connection can have been killed.
func (r *rows) next(err error) error {
	if sets, ok := r.Rows.(driver.RowsNextResultSet); ok && err == io.EOF && !r.s.over() {
		r.more = sets.HasNextResultSet()
	}
	return r.s.leave(err)
}

func (r *rows) HasNextResultSet() bool { return r.more }

func (r *rows) NextResultSet() error {
	sets, ok := r.Rows.(driver.RowsNextResultSet)
	if !ok {
		return io.EOF
	}
	if !r.s.enter() {
		return ErrKilled
	}
	r.columns = nil
	return r.s.leave(sets.NextResultSet())
}

func (r *rows) ColumnTypeScanType(i int) reflect.Type {
	if prop, ok := r.Rows.(driver.RowsColumnTypeScanType); ok && r.s.enter() {
		defer r.s.leave(nil)
		return prop.ColumnTypeScanType(i)
	}
	return reflect.TypeFor[any]()
}

func (r *rows) ColumnTypeDatabaseTypeName(i int) string {
	if prop, ok := r.Rows.(driver.RowsColumnTypeDatabaseTypeName); ok && r.s.enter() {
		defer r.s.leave(nil)
		return prop.ColumnTypeDatabaseTypeName(i)
	}
	return ""
}

func (r *rows) ColumnTypeLength(i int) (length int64, ok bool) {
	if prop, ok := r.Rows.(driver.RowsColumnTypeLength); ok && r.s.enter() {
		defer r.s.leave(nil)
		return prop.ColumnTypeLength(i)
	}
	return 0, false
}

func (r *rows) ColumnTypeNullable(i int) (nullable, ok bool) {
	if prop, ok := r.Rows.(driver.RowsColumnTypeNullable); ok && r.s.enter() {
		defer r.s.leave(nil)
		return prop.ColumnTypeNullable(i)
	}
	return false, false
}

func (r *rows) ColumnTypePrecisionScale(i int) (precision, scale int64, ok bool) {
	if prop, ok := r.Rows.(driver.RowsColumnTypePrecisionScale); ok && r.s.enter() {
		defer r.s.leave(nil)
		return prop.ColumnTypePrecisionScale(i)
	}
	return 0, 0, false
}

// What follows does for a driver's connection what database/sql would have
// done, had it held that connection itself: ctxutil.go and convert.go there.

// prepare is ctxDriverPrepare.
func prepare(ctx context.Context, s *serverConn, query string) (driver.Stmt, error) {
	if c, ok := s.ci.(driver.ConnPrepareContext); ok {
		return c.PrepareContext(ctx, query)
	}
	si, err := s.ci.Prepare(query)
	if err == nil && ctx.Err() != nil {
		if !s.over() {
			si.Close()
		}
		return nil, ctx.Err()
	}
	return si, err
}

// begin is ctxDriverBegin.
func begin(ctx context.Context, s *serverConn, opts driver.TxOptions) (driver.Tx, error) {
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
		if !s.over() {
			t.Rollback()
		}
		return nil, ctx.Err()
	}
	return t, err
}

// plainExecer, plainQueryer and plainStmt are ctxDriverExec and its like: they
// call methods that take neither contexts nor names.
type (
	plainExecer  struct{ driver.Execer }
	plainQueryer struct{ driver.Queryer }
	plainStmt    struct{ driver.Stmt }
)

func (p plainExecer) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	values, err := plain(ctx, args)
	if err != nil {
		return nil, err
	}
	return p.Exec(query, values)
}

func (p plainQueryer) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	values, err := plain(ctx, args)
	if err != nil {
		return nil, err
	}
	return p.Query(query, values)
}

func (p plainStmt) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	values, err := plain(ctx, args)
	if err != nil {
		return nil, err
	}
	return p.Exec(values)
}

func (p plainStmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	values, err := plain(ctx, args)
	if err != nil {
		return nil, err
	}
	return p.Query(values)
}

// plain returns the values of arguments, if they have no names and the context
// has not ended.
func plain(ctx context.Context, args []driver.NamedValue) ([]driver.Value, error) {
	values := make([]driver.Value, len(args))
	for i, arg := range args {
		if arg.Name != "" {
			return nil, errors.New("sql: driver does not support the use of Named Parameters")
		}
		values[i] = arg.Value
	}
	return values, ctx.Err()
}

// named is the reverse of plain.
func named(values []driver.Value) []driver.NamedValue {
	args := make([]driver.NamedValue, len(values))
	for i, v := range values {
		args[i] = driver.NamedValue{Ordinal: i + 1, Value: v}
	}
	return args
}

// convert is driverArgsConnLocked: it asks the statement or else the
// connection, then the column, and then database/sql's default.
func convert(ci driver.Conn, si driver.Stmt, raw []driver.NamedValue) ([]driver.NamedValue, error) {
	want := -1
	if si != nil {
		want = si.NumInput()
	}
	checker, ok := si.(driver.NamedValueChecker)
	if !ok {
		checker, _ = ci.(driver.NamedValueChecker)
	}
	columns, _ := si.(driver.ColumnConverter)
	args := make([]driver.NamedValue, 0, len(raw))
	removed := "" // the name of a removed argument is that of the next if it has none
	for _, arg := range raw {
		if arg.Name == "" {
			arg.Name = removed
		}
		removed = ""
		arg.Ordinal = len(args) + 1
		err := driver.ErrSkip
		if checker != nil {
			err = checker.CheckNamedValue(&arg)
		}
		if err == driver.ErrSkip && columns != nil {
			err = convertColumn(columns, want, &arg)
		}
		for err == driver.ErrSkip { // a Valuer may answer it
			arg.Value, err = driver.DefaultParameterConverter.ConvertValue(arg.Value)
		}
		if err == driver.ErrRemoveArgument {
			removed = arg.Name
			continue
		}
		if err != nil {
			what := fmt.Sprintf("$%d", arg.Ordinal)
			if arg.Name != "" {
				what = fmt.Sprintf("with name %q", arg.Name)
			}
			return nil, fmt.Errorf("sql: converting argument %s type: %w", what, err)
		}
		args = append(args, arg)
	}
	if want != -1 && len(args) != want {
		return nil, fmt.Errorf("sql: expected %d arguments, got %d", want, len(args))
	}
	return args, nil
}

// convertColumn is ccChecker.
func convertColumn(columns driver.ColumnConverter, want int, arg *driver.NamedValue) error {
	i := arg.Ordinal - 1
	if want >= 0 && want <= i {
		return nil
	}
	if valuer, ok := arg.Value.(driver.Valuer); ok {
		value, err := callValuer(valuer)
		if err != nil {
			return err
		}
		if !driver.IsValue(value) {
			return fmt.Errorf("non-subset type %T returned from Value", value)
		}
		arg.Value = value
	}
	var err error
	from := arg.Value
	if arg.Value, err = columns.ColumnConverter(i).ConvertValue(from); err != nil {
		return err
	}
	if !driver.IsValue(arg.Value) {
		return fmt.Errorf("driver ColumnConverter error converted %T to unsupported type %T", from, arg.Value)
	}
	return nil
}

// callValuer is callValuerValue: a nil pointer whose type has Value by way of
// what it points to stands for NULL.
func callValuer(v driver.Valuer) (driver.Value, error) {
	if rv := reflect.ValueOf(v); rv.Kind() == reflect.Pointer && rv.IsNil() && rv.Type().Elem().Implements(reflect.TypeFor[driver.Valuer]()) {
		return nil, nil
	}
	return v.Value()
}
