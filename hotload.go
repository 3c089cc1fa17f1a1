// Package hotload is a driver for database/sql whose connection string can
// change while the program runs.
//
// It stands in front of the real driver. A [Strategy] watches the place where
// the connection string is kept, such as a file that a secret store rewrites;
// when the string changes, hotload retires the connections opened with the old
// one, and the pool goes on with connections opened with the new one. The
// program keeps its [sql.DB], and by default a change to a string that works
// fails no query:
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
//     pool goes on with the last good one. The first value is not probed. The
//     default, "false", puts each value in force at once, because moving off a
//     server may be meant whether or not the next one is up.
//
// [sql.Open] checks the name and starts nothing. It refuses an option that differs
// from forceKill or probe only in case, such as ?forcekill=true. The first
// connection starts the watch and DB.Close ends it.
//
// # What happens at a change
//
// A connection is in use when something has run on it since it was taken from
// the pool. Once a value has been put in force:
//
//   - Operations that take a connection from the pool run on one opened with
//     that value or a later one.
//   - Connections not in use close at once. Those in use finish their work and
//     close when they are returned, or are ended as forceKill says. A sql.Conn
//     on which nothing has run yet moves to the new value when it is first used.
//   - A dial in progress is abandoned and made again with the new value.
//
// A blank value is ignored. A value that the driver's OpenConnector refuses is
// not put in force. It is tried again, with growing pauses, until it is accepted
// or another one comes: a certificate that it names may not be there yet. Drivers
// that parse at the dial, such as pq.Driver and pgx's, refuse none: see probe.
//
// A value that a probe refuses is tried again, too. When the server denies it, for
// example because of a wrong password, it is tried after 2 s, 10 s, a minute, and
// then every five minutes. A server that locks accounts has to allow that, for each
// pool: see [Operating].
//
// The error of an operation that forceKill ended matches [ErrKilled]; the
// operation is not run again. Without forceKill a change causes no error, but for
// those of dials with a value that does not work.
//
// A pooled connection whose server connection has been closed by a change dials
// when it is next used. [sql.DBStats] counts it as open.
//
// DB.Driver returns hotload's driver, not the one behind it.
//
// What happens is logged through [slog.Default]. The events, and all that a
// strategy must and may do, are set out in [SPEC.md]; what to do about each event
// and error in [Operating]. [Recipes] are there for Kubernetes, Vault, drivers,
// libraries and metrics.
//
// # Limits
//
//   - A dial of a driver that takes no context, such as pq.Driver, can be
//     abandoned but not interrupted: it goes on in the background.
//   - forceKill does not guard a cursor that an Exec hands out through [sql.Out],
//     nor one that is a column of a row (godror has both): after a kill it runs on a
//     closed connection.
//   - A library that wraps hotload must pass on the connector's Close, which ends
//     the watch, and the connection's ResetSession and IsValid. Without these two
//     a pooled connection never moves to a new value.
//   - After DB.Close, a sql.Conn on which nothing has run since a change dials
//     through a driver's connector that is closed, if it is an io.Closer.
//   - DB.SetConnMaxLifetime counts a connection's age from when its place in the
//     pool was made, also if a change has renewed the connection since.
//
// # The driver's own connection
//
// What [sql.Conn.Raw] passes to its callback has a method Raw, which returns
// the driver's connection, or nil if there is none: it was killed, or none could
// be opened in the time that DB.Conn was given. Use either it or the proxy within
// one callback, not both: a method of the proxy tells forceKill that the callback
// is over.
//
//	err := conn.Raw(func(driverConn any) error {
//		c := driverConn.(interface{ Raw() driver.Conn }).Raw()
//		...
//	})
//
// [SPEC.md]: https://github.com/infobloxopen/hotload/blob/main/SPEC.md
// [Operating]: https://github.com/infobloxopen/hotload/blob/main/docs/operating.md
// [Recipes]: https://github.com/infobloxopen/hotload/blob/main/docs/recipes.md
package hotload

// The files, in the order in which they are best read:
//
//	hotload.go     what users see: registries, the data source name, the driver
//	connector.go   one sql.DB: its watch, and a value's way into force
//	server.go      a server connection: its three states, and its closing
//	generation.go  what was opened with one value: dials, the end, the drain
//	conn.go        the proxy that database/sql holds in place of a server connection
//	stmt.go        prepared statements, and the conversion of arguments
//	kill.go        forceKill: read the others first; without it a killer is nil
//	kill_go127.go  what Go 1.27 adds to rows
//
// The core is the table of states and the two rules below it, in server.go.

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// ErrKilled is matched, with errors.Is, by the error of every operation that
// forceKill ended, and of every later one on the same transaction, rows or
// [sql.Conn]. A call that was in progress may have taken effect on the old
// server; database/sql does not run it again.
var ErrKilled = errors.New("hotload: connection killed because its connection string was replaced")

var errClosed = errors.New("hotload: the connector is closed")

// A Strategy watches the place where a connection string is kept. Part I of [SPEC.md]
// is its contract, and package strategytest tests an implementation against it.
//
// [SPEC.md]: https://github.com/infobloxopen/hotload/blob/main/SPEC.md
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

var registryMu sync.RWMutex // protects drivers and strategies
var drivers = make(map[string]driver.Driver)
var strategies = make(map[string]Strategy)

// Register makes a driver available under name, which data source names give as
// their host. It panics if d is nil, if name is registered already, or if it
// cannot be the host of a data source name.
func Register(name string, d driver.Driver) {
	if d == nil {
		panic("hotload: Register driver is nil")
	}
	u, err := url.Parse("x://" + name + "/")
	if err != nil || name == "" || u.Host != name || strings.Contains(name, ":") {
		panic(fmt.Sprintf("hotload: Register name %q cannot be the host of a data source name", name))
	}
	register(drivers, "Register", "driver", name, d)
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
	register(strategies, "RegisterStrategy", "strategy", name, s)
}

func register[T any](registry map[string]T, f, what, name string, v T) {
	registryMu.Lock()
	defer registryMu.Unlock()
	if _, dup := registry[name]; dup {
		panic(fmt.Sprintf("hotload: %s called twice for %s %q", f, what, name))
	}
	registry[name] = v
}

// A dsn is a data source name that has been read and found good.
type dsn struct {
	strategyName, driverName, path string
	options                        url.Values // the strategy's
	forceKill, probe               bool
	grace                          time.Duration // with forceKill: how long what is in use may go on
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
	for _, part := range []struct {
		bad bool
		how string
	}{
		{u.Opaque != "", `has no strategy before "://"`},
		{u.User != nil, "has user information, which belongs in the connection string that the strategy delivers"},
		{u.Hostname() == "", `names no driver after "://"`},
		{strings.Contains(u.Host, ":"), "has a port, which belongs in the connection string that the strategy delivers"},
		{strings.Contains(name, "#"), "has a fragment: write %23 for a # in the path or the options"},
	} {
		if part.bad {
			return d, errors.New("hotload: the data source name " + part.how + ": want strategy://driver/path?options")
		}
	}
	d = dsn{strategyName: u.Scheme, driverName: u.Host, path: u.Path}
	if d.options, err = url.ParseQuery(u.RawQuery); err != nil {
		return d, errors.New("hotload: the options of the data source name cannot be read: " +
			"want name=value pairs separated by & with special characters percent-encoded")
	}
	return d, d.takeOptions()
}

// takeOptions takes hotload's own options from those of the strategy.
func (d *dsn) takeOptions() error {
	kill, killErr := d.takeOption("forceKill")
	probe, probeErr := d.takeOption("probe")
	if err := cmp.Or(killErr, probeErr); err != nil {
		return err
	}
	d.forceKill, d.probe = kill != "false", probe == "true"
	if kill != "true" && kill != "false" {
		var err error
		if d.grace, err = time.ParseDuration(kill); err != nil || d.grace <= 0 {
			return errors.New("hotload: option forceKill: want true, false or a positive duration such as 30s")
		}
	}
	if probe != "true" && probe != "false" {
		return errors.New("hotload: option probe: want true or false")
	}
	return nil
}

// takeOption returns an option of hotload's own, "false" by default. One whose
// name differs only in case is an error: a strategy that ignores what it does
// not know would silently ignore it.
func (d *dsn) takeOption(name string) (value string, err error) {
	for other := range d.options {
		if other != name && strings.EqualFold(other, name) {
			return "", fmt.Errorf("hotload: option %s is misspelt in the data source name: want it with these capitals", name)
		}
	}
	values, ok := d.options[name]
	delete(d.options, name)
	if !ok {
		return "false", nil
	}
	if len(values) > 1 {
		return "", fmt.Errorf("hotload: option %s is given %d times: want it once", name, len(values))
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
	c.alone = true
	ci, err := c.Connect(context.Background())
	if err != nil {
		c.Close()
	}
	return ci, err
}
