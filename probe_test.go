package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/infobloxopen/hotload"
	"github.com/lib/pq"
)

// A shutFake is a fake whose connectors are io.Closers, and police it: a
// second Close, and a Connect that begins after Close, fail the test.
type shutFake struct {
	*fake
	noPing bool       // its connections are no Pingers
	mu     sync.Mutex // guards closed
	closed []string   // the values of the connectors that are closed
}

type shutConnector struct {
	fakeConnector
	d    *shutFake
	shut bool // guarded by d.mu
}

func (d *shutFake) OpenConnector(value string) (driver.Connector, error) {
	c, err := ctxFake{d.fake}.OpenConnector(value)
	if err != nil {
		return nil, err
	}
	return &shutConnector{fakeConnector: *c.(*fakeConnector), d: d}, nil
}

func (c *shutConnector) Connect(ctx context.Context) (driver.Conn, error) {
	c.d.mu.Lock()
	if c.shut {
		c.f.t.Errorf("Connect of a connector (%s) that is closed", c.value)
	}
	c.d.mu.Unlock()
	ci, err := c.fakeConnector.Connect(ctx)
	if err == nil && c.d.noPing {
		ci = struct {
			driver.Conn
			driver.QueryerContext
		}{ci, ci.(driver.QueryerContext)}
	}
	return ci, err
}

func (c *shutConnector) Close() error {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	if c.shut {
		c.f.t.Errorf("second Close of a connector (%s)", c.value)
	}
	c.shut = true
	c.d.closed = append(c.d.closed, c.value)
	return nil
}

// connectorsClosed returns the values of the connectors that are closed, in
// alphabetical order.
func (d *shutFake) connectorsClosed() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return strings.Join(slices.Sorted(slices.Values(d.closed)), " ")
}

// A prober is a pool with probe=true, in a synctest bubble, whose value in
// force is "a". It keeps the story of what its driver is asked: each line says
// when, counted from the beginning, and what.
type prober struct {
	t      *testing.T
	f      *fake
	driver driver.Driver
	closer *shutFake // the driver, if it has DriverContext
	src    *source
	db     *sql.DB
	log    *logs
	start  time.Time

	mu    sync.Mutex // guards the following fields
	story []string
}

// An answer is what a dial or a ping of another value than "a" gets, at a time
// since the beginning. Nil is a good one.
type answer func(ctx context.Context, value string, at time.Duration) error

// The kinds of drivers.
const (
	withContext = "DriverContext"
	without     = "Open"
	noPinger    = "DriverContext without Pinger"
)

func newProber(t *testing.T, kind, options string, dial, ping answer) *prober {
	p := &prober{t: t, f: newFake(t), src: newSource("a"), log: collect(t), start: time.Now()}
	p.driver = p.f
	if kind != without {
		p.closer = &shutFake{fake: p.f, noPing: kind == noPinger}
		p.driver = p.closer
	}
	p.f.onOpen = func(ctx context.Context, value string) error {
		p.tell("open", value)
		return p.answer(ctx, value, dial)
	}
	p.f.onCall = func(ctx context.Context, c *fakeConn, call string) error {
		if call != "Ping" {
			return nil
		}
		p.tell("ping", c.value)
		return p.answer(ctx, c.value, ping)
	}
	p.f.onClose = func(c *fakeConn) { p.tell("close", c.value) }
	p.db = open(t, p.driver, p.src, "probe=true&"+options)
	want(t, "first value", ask(t, p.db), "a")
	p.told()
	return p
}

func (p *prober) answer(ctx context.Context, value string, f answer) error {
	var err error
	if f != nil && value != "a" {
		err = f(ctx, value, time.Since(p.start))
	}
	if ctx.Err() != nil {
		p.tell("left", value)
	}
	return err
}

func (p *prober) tell(what, value string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.story = append(p.story, fmt.Sprint(time.Since(p.start), " ", what, " ", value))
}

// told returns the story since it was told last, but for the closing of what
// was opened with "a".
func (p *prober) told() string {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	var lines strings.Builder
	for _, line := range p.story {
		if !strings.HasSuffix(line, "close a") {
			fmt.Fprintln(&lines, line)
		}
	}
	p.story = nil
	return lines.String()
}

// lines is a story.
func lines(line ...string) string {
	if len(line) == 0 {
		return ""
	}
	return strings.Join(line, "\n") + "\n"
}

var (
	errDead = &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	errAuth = &pq.Error{Code: "28P01", Message: "password authentication failed"}
)

// always answers with an error.
func always(err error) answer { return until(time.Hour, err) }

// until answers with an error until the time comes.
func until(end time.Duration, err error) answer {
	return func(_ context.Context, _ string, at time.Duration) error {
		if at < end {
			return err
		}
		return nil
	}
}

// hang answers when the context ends.
func hang(ctx context.Context, _ string, _ time.Duration) error {
	<-ctx.Done()
	return ctx.Err()
}

// deaf answers well after some time, whatever becomes of the context.
func deaf(d time.Duration) answer {
	return func(context.Context, string, time.Duration) error {
		time.Sleep(d)
		return nil
	}
}

// of answers for one value, and well for all others.
func of(value string, f answer) answer {
	return func(ctx context.Context, v string, at time.Duration) error {
		if v != value {
			return nil
		}
		return f(ctx, v, at)
	}
}

// first answers at the beginning.
func first(f answer) answer {
	return func(ctx context.Context, value string, at time.Duration) error {
		if at > 0 {
			return nil
		}
		return f(ctx, value, at)
	}
}

func TestProbe(t *testing.T) {
	const (
		works = "R-9/a probed value is in force once it works"
		yield = "R-10/a probe gives way to a newer value"
	)
	set := func(values ...string) func(p *prober) {
		return func(p *prober) {
			for _, value := range values {
				p.src.set(value)
				synctest.Wait()
			}
		}
	}
	setAndBack := func(p *prober) {
		p.src.set("b")
		time.Sleep(300 * time.Millisecond)
		p.src.set("a")
	}
	for _, row := range []struct {
		holds      string
		name       string
		kind       string // of driver: withContext and without, unless said
		dial, ping answer
		do         func(p *prober)
		story      string // up to a minute later
		inForce    string
		refusals   []string // parts of the lines that log one
		connectors string   // that are closed by then
		tries      int64    // at a time at most, if not 1
	}{
		{
			holds: works, name: "a good value is tried once, pinged and closed", do: set("b"),
			story: lines("0s open b", "0s ping b", "0s close b"), inForce: "b", connectors: "a",
		},
		{
			holds: works, name: "a driver that cannot ping is not asked to", kind: noPinger, do: set("b"),
			story: lines("0s open b", "0s close b"), inForce: "b", connectors: "a",
		},
		{
			holds: works, name: "a value that the driver refuses is not tried", kind: withContext, do: set("bad"),
			inForce: "a", refusals: []string{"reason=driver"},
		},
		{
			holds: works, name: "an empty value is not tried", do: set(""),
			inForce: "a", refusals: []string{"reason=empty"},
		},
		{
			holds: works, name: "a value that is good later is put in force then", dial: until(600*time.Millisecond, errDead), do: set("b"),
			story:   lines("0s open b", "250ms open b", "750ms open b", "750ms ping b", "750ms close b"),
			inForce: "b", refusals: []string{"reason=probe"}, connectors: "a",
		},
		{
			holds: works, name: "a ping that fails is a failure, and the connection is closed", ping: until(100*time.Millisecond, driver.ErrBadConn), do: set("b"),
			story: lines("0s open b", "0s ping b", "0s close b",
				"250ms open b", "250ms ping b", "250ms close b"),
			inForce: "b", refusals: []string{"reason=probe"}, connectors: "a",
		},
		{
			holds: works, name: "tries are repeated with back-off", dial: until(20*time.Second, errDead), do: set("b"),
			story: lines("0s open b", "250ms open b", "750ms open b", "1.75s open b", "3.75s open b", "7.75s open b",
				"12.75s open b", "17.75s open b", "22.75s open b", "22.75s ping b", "22.75s close b"),
			inForce: "b", refusals: []string{"reason=probe"}, connectors: "a",
		},
		{
			holds: yield, name: "of three values in a row the last counts", dial: func(_ context.Context, value string, _ time.Duration) error {
				if value == "d" {
					return nil
				}
				return errDead
			}, do: set("b", "c", "d"),
			story:   lines("0s open b", "0s open c", "0s open d", "0s ping d", "0s close d"),
			inForce: "d", refusals: []string{"reason=probe", "reason=probe"}, connectors: "a b c",
		},
		{
			holds: yield, name: "a value that comes back ends the tries of another", dial: always(errDead),
			do:    setAndBack,
			story: lines("0s open b", "250ms open b"), inForce: "a", refusals: []string{"reason=probe"}, connectors: "b",
		},
		{
			holds: yield, name: "a value that comes back ends a hung try", kind: withContext, dial: hang,
			do:    setAndBack,
			story: lines("0s open b", "300ms left b"), inForce: "a", connectors: "b",
		},
		{
			holds: yield, name: "a value that comes back overtakes a try that succeeds late", kind: withContext, dial: deaf(5 * time.Second),
			do:    setAndBack,
			story: lines("0s open b", "5s left b", "5s close b"), inForce: "a", connectors: "b",
		},
		{
			holds: yield, name: "a value that comes back overtakes a try that succeeds late", kind: without, dial: deaf(5 * time.Second),
			do:    setAndBack,
			story: lines("0s open b", "5s close b"), inForce: "a",
		},
		{
			holds: yield, name: "a value that comes back overtakes a try that succeeds late", kind: noPinger, dial: deaf(5 * time.Second),
			do:    setAndBack,
			story: lines("0s open b", "5s left b", "5s close b"), inForce: "a", connectors: "b",
		},
		{
			holds: yield, name: "the next value overtakes a try that succeeds late", kind: noPinger, dial: of("b", deaf(5*time.Second)),
			do:    set("b", "c"),
			story: lines("0s open b", "0s open c", "0s close c", "5s left b", "5s close b"), inForce: "c", connectors: "a b", tries: 2,
		},
		{
			holds: yield, name: "what was given up is not tried again", dial: always(errDead),
			do: func(p *prober) {
				for n := range 20 {
					p.src.set(fmt.Sprint("b", n))
					time.Sleep(100 * time.Millisecond)
				}
				p.src.set("a")
			},
			story: func() (s string) {
				for n := range 20 {
					s += lines(fmt.Sprint(time.Duration(n)*100*time.Millisecond, " open b", n))
				}
				return s
			}(),
			inForce: "a", refusals: make([]string, 20),
			connectors: "b0 b1 b10 b11 b12 b13 b14 b15 b16 b17 b18 b19 b2 b3 b4 b5 b6 b7 b8 b9",
		},
		{
			holds: yield, name: "a hung try is cancelled by the next value", kind: withContext, dial: of("b", hang),
			do: func(p *prober) {
				p.src.set("b")
				time.Sleep(time.Second)
				p.src.set("c")
			},
			story: lines("0s open b", "1s left b", "1s open c", "1s ping c", "1s close c"), inForce: "c", connectors: "a b",
		},
		{
			holds: yield, name: "a try that cannot be interrupted is left", kind: without, dial: of("b", deaf(5*time.Second)),
			do: func(p *prober) {
				p.src.set("b")
				time.Sleep(time.Second)
				p.src.set("d")
			},
			story:   lines("0s open b", "1s open d", "1s ping d", "1s close d", "5s close b"),
			inForce: "d", tries: 2,
		},
		{
			holds: works, name: "a dial has a time limit", kind: withContext, dial: first(hang), do: set("b"),
			story:   lines("0s open b", "10s left b", "10.25s open b", "10.25s ping b", "10.25s close b"),
			inForce: "b", refusals: []string{"error_type=context.deadlineExceededError"}, connectors: "a",
		},
		{
			holds: works, name: "a ping has a time limit", ping: first(hang), do: set("b"),
			story: lines("0s open b", "0s ping b", "10s left b", "10s close b",
				"10.25s open b", "10.25s ping b", "10.25s close b"),
			inForce: "b", refusals: []string{"error_type=context.deadlineExceededError"}, connectors: "a",
		},
		{
			holds: yield, name: "a dial that is overdue is left to the next value", kind: noPinger, dial: of("b", deaf(30*time.Second)),
			do:    set("b", "c"),
			story: lines("0s open b", "0s open c", "0s close c", "30s left b", "30s close b"), inForce: "c", connectors: "a b", tries: 2,
		},
		{
			holds: yield, name: "a dial that is overdue is left at once", kind: without, dial: of("b", deaf(30*time.Second)),
			do: func(p *prober) {
				p.src.set("b")
				time.Sleep(20 * time.Second)
				p.src.set("c")
			},
			story:   lines("0s open b", "20s open c", "20s ping c", "20s close c", "30s close b"),
			inForce: "c", refusals: []string{"error_type=context.deadlineExceededError"}, tries: 2,
		},
		{
			holds: yield, name: "a ping that is overdue is left to the next value", ping: of("b", deaf(30*time.Second)), do: set("b", "c"),
			story:   lines("0s open b", "0s ping b", "0s open c", "0s ping c", "0s close c", "30s left b", "30s close b"),
			inForce: "c", connectors: "a b",
		},
		{
			holds: works, name: "a ping that panics is a failure, and the connection is closed", do: set("b"),
			ping: first(func(context.Context, string, time.Duration) error { panic("a bug in the driver") }),
			story: lines("0s open b", "0s ping b", "0s close b",
				"250ms open b", "250ms ping b", "250ms close b"),
			inForce: "b", refusals: []string{"error_type=*hotload.driverPanic"}, connectors: "a",
		},
		{
			holds: works, name: "a value refused meanwhile changes nothing", dial: until(600*time.Millisecond, errDead),
			do: func(p *prober) {
				p.src.set("b")
				time.Sleep(100 * time.Millisecond)
				p.src.set("")
			},
			story:   lines("0s open b", "250ms open b", "750ms open b", "750ms ping b", "750ms close b"),
			inForce: "b", refusals: []string{"reason=probe", "reason=empty"}, connectors: "a",
		},
		{
			holds: works, name: "the same value again changes nothing", dial: until(600*time.Millisecond, errDead),
			do: func(p *prober) {
				p.src.set("b")
				time.Sleep(100 * time.Millisecond)
				p.src.set("b")
			},
			story:   lines("0s open b", "250ms open b", "750ms open b", "750ms ping b", "750ms close b"),
			inForce: "b", refusals: []string{"reason=probe"}, connectors: "a",
		},
	} {
		kinds := []string{withContext, without}
		if row.kind != "" {
			kinds = []string{row.kind}
		}
		for _, kind := range kinds {
			t.Run(row.holds+"/"+row.name+"/"+kind, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					p := newProber(t, kind, "", row.dial, row.ping)
					row.do(p)
					time.Sleep(time.Minute)
					want(t, "story", p.told(), row.story)
					want(t, "most tries at a time", p.f.maxDialing.Load(), max(1, row.tries))
					idle := ""
					if row.inForce == "a" {
						idle = "a"
					}
					want(t, "open connections", strings.Join(p.f.live(), " "), idle)
					want(t, "value in force", ask(t, p.db), row.inForce)
					accepted := 1
					if row.inForce != "a" {
						accepted = 2
					}
					want(t, "values accepted", p.log.count("value accepted"), accepted)
					want(t, "refusals in\n"+p.log.String(), p.log.count("value refused"), len(row.refusals))
					for _, part := range row.refusals {
						if p.log.count("value refused", part) == 0 {
							t.Errorf("no refusal with %s in\n%s", part, p.log)
						}
					}
					if p.closer != nil {
						want(t, "connectors closed", p.closer.connectorsClosed(), row.connectors)
					}
				})
			})
		}
	}
}

// A try whose connection hangs in its Close is a success after a second, and
// holds up no later one.
func TestProbeHungClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProber(t, withContext, "", nil, nil)
		stuck := make(chan struct{})
		defer close(stuck)
		p.f.onClose = func(c *fakeConn) {
			if c.value != "a" {
				<-stuck
			}
		}
		for n, value := range []string{"b", "c"} {
			p.src.set(value)
			time.Sleep(patience)
			synctest.Wait()
			want(t, "values accepted", p.log.count("value accepted"), n+2)
		}
		want(t, "value in force", ask(t, p.db), "c")
	})
}

// Until a value has proved itself the last good one is in force, for new
// connections too, and nothing of it is retired.
func TestProbeKeepsLastGood(t *testing.T) {
	for _, row := range []struct {
		options string
		commit  error
		after   time.Duration // the value is in force, the transaction begins to fail
	}{
		{"", nil, 0},
		{"forceKill=true", hotload.ErrKilled, 0},
		{"forceKill=30s", hotload.ErrKilled, 30 * time.Second},
	} {
		t.Run(row.options, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newProber(t, withContext, row.options, until(5*time.Second, errDead), nil)
				begin := func() *sql.Tx {
					tx, err := p.db.Begin()
					if err != nil {
						t.Fatal(err)
					}
					return tx
				}
				old := begin()
				p.src.set("b")
				time.Sleep(7*time.Second + 700*time.Millisecond)
				late := begin()
				for _, tx := range []*sql.Tx{old, late} {
					want(t, "value in a transaction during the tries", ask(t, tx), "a")
				}
				want(t, "connections with the last good value", p.f.liveOn("a"), 2)
				time.Sleep(50 * time.Millisecond) // 7.75s: a try succeeds
				synctest.Wait()
				want(t, "value in force", ask(t, p.db), "b")
				if row.after > 0 {
					time.Sleep(row.after - time.Nanosecond)
					want(t, "value in a transaction before its time is over", ask(t, old), "a")
					time.Sleep(time.Nanosecond)
					synctest.Wait()
				}
				for _, tx := range []*sql.Tx{old, late} {
					if err := tx.Commit(); !errors.Is(err, row.commit) {
						t.Errorf("Commit: %v, want %v", err, row.commit)
					}
				}
				synctest.Wait()
				want(t, "connections with the old value", p.f.liveOn("a"), 0)
				want(t, "drained", p.log.count("generation drained", "generation=1"), 1)
			})
		})
	}
}

// DB.Close ends the tries and what they opened, and waits for a driver that
// cannot be interrupted no longer than for any other.
func TestProbeClose(t *testing.T) {
	for _, row := range []struct {
		name, kind string
		dial, ping answer
		takes      time.Duration
	}{
		{"in a pause", withContext, always(errDead), nil, 0},
		{"in a pause", without, always(errDead), nil, 0},
		{"in a dial", withContext, hang, nil, 0},
		{"in a ping", withContext, nil, hang, 0},
		{"in a ping", without, nil, hang, 0},
		{"in a dial that ignores its context", withContext, deaf(5 * time.Second), nil, time.Second},
		{"in a dial that ignores its context", noPinger, deaf(5 * time.Second), nil, time.Second},
		{"in a dial that has none", without, deaf(5 * time.Second), nil, time.Second},
	} {
		t.Run(row.name+"/"+row.kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newProber(t, row.kind, "", row.dial, row.ping)
				p.src.set("b")
				time.Sleep(100 * time.Millisecond)
				began := time.Now()
				if err := p.db.Close(); err != nil {
					t.Error(err)
				}
				want(t, "DB.Close took", time.Since(began).Truncate(10*time.Millisecond), 0)
				if row.takes == 0 {
					want(t, "open after DB.Close", len(p.f.live()), 0)
				}
				opened := p.f.opened.Load()
				time.Sleep(time.Minute)
				want(t, "open a minute later", len(p.f.live()), 0)
				if p.f.opened.Load() > opened+1 || strings.Count(p.told(), "open b") != 1 {
					t.Error("tried again after DB.Close")
				}
				want(t, "values accepted", p.log.count("value accepted"), 1)
				if p.closer != nil && len(p.closer.connectorsClosed()) != len("a b") {
					t.Errorf("connectors closed: %s, want a and b", p.closer.connectorsClosed())
				}
			})
		})
	}
}

// The first value is not probed, whether it is good or not.
func TestProbeNotAtFirst(t *testing.T) {
	for _, row := range []struct {
		name, first, then string
		err               error // of connects in the first second
	}{
		{name: "a good one", first: "b"},
		{name: "one that cannot be dialled", first: "b", err: errDead},
		{name: "one that follows a refused one", first: "bad", then: "b"},
		{name: "one that follows a refused one and cannot be dialled", first: "", then: "b", err: errDead},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, src := newFake(t), newSource(row.first)
				start := time.Now()
				f.onOpen = func(context.Context, string) error {
					if time.Since(start) < time.Second {
						return row.err
					}
					return nil
				}
				f.onCall = func(_ context.Context, c *fakeConn, call string) error {
					if call == "Ping" {
						t.Error("a first value is probed")
					}
					return nil
				}
				db := open(t, ctxFake{f}, src, "probe=true")
				query := func() error { return db.QueryRow("ask").Scan(new(string)) }
				if row.then != "" {
					if err := query(); err == nil || !strings.HasPrefix(err.Error(), "hotload: ") {
						t.Errorf("error with the first value: %v", err)
					}
					src.set(row.then)
				}
				if err := query(); err != row.err {
					t.Errorf("error: %v, want %v", err, row.err)
				}
				time.Sleep(time.Second)
				want(t, "value in force", ask(t, db), "b")
				want(t, "connections opened", f.opened.Load(), 1)
			})
		})
	}
}

// What is logged of a try that failed tells a wrong password from a dead host,
// and does so once for each value and reason.
func TestProbeLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		failures := []error{errDead, errDead, errAuth, errDead, errAuth, fmt.Errorf("wrapped: %w", errDead), errAuth,
			codeError("S3CRET"), codeError("canar"), codeError("42")}
		p := newProber(t, withContext, "", func(context.Context, string, time.Duration) error {
			n++
			return failures[(n-1)%len(failures)]
		}, nil)
		reasons := []string{
			`reason=probe error_type=*net.OpError errno="connection refused"`,
			`reason=probe error_type=*pq.Error sqlstate=28P01`,
			`reason=probe error_type=*fmt.wrapError errno="connection refused"`,
			`reason=probe error_type=hotload_test.codeError`,
		}
		for times, value := range []string{"b", "c"} {
			p.src.set(value)
			time.Sleep(time.Minute)
			want(t, "refusals in\n"+p.log.String(), p.log.count("value refused"), (times+1)*len(reasons))
			for _, reason := range reasons {
				want(t, reason, p.log.count("level=WARN", "value refused", reason), times+1)
			}
			want(t, "codes in\n"+p.log.String(), strings.Count(p.log.String(), "sqlstate="), times+1)
		}
	})
}

// A codeError quotes the connection string in what is to be a code.
type codeError string

func (e codeError) Error() string    { return string(e) }
func (e codeError) SQLState() string { return string(e) }

// A pqContext is lib/pq with DriverContext: it refuses what it cannot parse.
type pqContext struct{ pq.Driver }

func (pqContext) OpenConnector(value string) (driver.Connector, error) { return pq.NewConnector(value) }

// TestSecrets greps all that hotload writes for a canary in every position of
// a connection string. The errors of connects are the driver's and not searched.
func TestSecrets(t *testing.T) {
	t.Run("R-40/tells no secret", func(t *testing.T) {
		l := collect(t)
		f := newFake(t)
		f.onOpen = func(_ context.Context, value string) error { return fmt.Errorf("fake: cannot connect with %s", value) }
		var values []string
		for _, canary := range []string{"canary", "canary:/?#@%&=' x", "%63%61%6e%61%72%79"} {
			for _, position := range []string{
				"%s", "bad%s", "%s=x", "x=%s", "user=%s", "password=%s", "password='%s", "password=x %s", "dbname=%s", "port=%s", "host=/%s",
				"sslmode=%s", "sslcert=%s", "connect_timeout=%s", "application_name=%s", "options=%s",
				"postgres://%s", "postgres://%s@127.0.0.1:1/", "postgres://%s:x@127.0.0.1:1/", "postgres://u:%s@127.0.0.1:1/d?sslmode=disable",
				"postgres://u:%%zz%s@127.0.0.1:1/", "postgres://u:x@127.0.0.1:%s/", "postgres://u:x@127.0.0.1:1/%s",
				"postgres://u:x@127.0.0.1:1/?%s", "postgres://u:x@127.0.0.1:1/?sslmode=%s", "postgres://u:x@127.0.0.1:1/#%s", "%s://u@127.0.0.1:1/",
			} {
				value := fmt.Sprintf(position, canary)
				if !strings.Contains(value, "://") {
					value += " host=127.0.0.1 port=1 sslmode=disable"
				}
				values = append(values, value)
			}
		}
		leaks := func(text string) bool {
			text = strings.ToLower(text)
			return strings.Contains(text, "canary") || strings.Contains(text, "%zz") || strings.Contains(text, "%63%61%6e%61%72%79")
		}
		searched := 0
		search := func(err error) {
			if err == nil || !strings.HasPrefix(err.Error(), "hotload: ") {
				return
			}
			if searched++; leaks(err.Error()) {
				t.Errorf("error text: %v", err)
			}
		}

		for _, d := range []driver.Driver{f, ctxFake{f}, pq.Driver{}, pqContext{}} {
			first := newSource("host=127.0.0.1 port=1")
			probing := open(t, d, first, "probe=true")
			if probing.Ping() == nil {
				t.Fatal("a dead port answers")
			}
			for _, value := range values {
				before := l.count("value refused")
				first.set(value)
				await(t, "refusal", func() bool { return l.count("value refused") > before })

				db := open(t, d, newSource(value), "")
				search(db.Ping())
				db.Close()
			}
		}
		for _, value := range values {
			for _, name := range []string{"%s", "x://%s@drv/", "x://u:%s@drv/", "x://drv:%s/", "x://drv/%%zz%s", "x://drv/?%%zz%s",
				"x://drv/?forceKill=%s", "x://drv/?forceKill=1s&forceKill=%s", "x://drv/?probe=%s", "x://drv/#%s"} {
				_, err := sql.Open("hotload", fmt.Sprintf(name, value))
				if err == nil || !strings.HasPrefix(err.Error(), "hotload: ") {
					t.Errorf("sql.Open of %s: %v", fmt.Sprintf(name, value), err)
				}
				search(err)
			}
		}
		for line := range strings.Lines(l.String()) {
			if searched++; leaks(line) {
				t.Errorf("logged: %s", line)
			}
		}
		t.Logf("%d values, %d lines and error texts searched", len(values), searched)
	})
}

// TestProbeDrains: the connection of a try belongs to the generation that the
// try makes, which has not drained while that is closing.
func TestProbeDrains(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := collect(t)
		f, src := newFake(t), newSource("1")
		hang := make(chan bool)
		var tried atomic.Bool
		f.onClose = func(c *fakeConn) {
			if c.value == "2" && !tried.Swap(true) {
				<-hang
			}
		}
		db := open(t, ctxFake{f}, src, "probe=true")
		want(t, "value", ask(t, db), "1")
		for _, value := range []string{"2", "3"} {
			src.set(value)
			time.Sleep(2 * time.Second) // more than is waited for a Close
			want(t, "value", ask(t, db), value)
		}
		want(t, "drained while a connection is open", log.count("generation drained", "generation=2"), 0)
		close(hang)
		synctest.Wait()
		want(t, "drained", log.count("generation drained", "generation=2"), 1)
	})
}

// TestProbeHangingConnector: a connector of an overtaken value that hangs in its
// Close does not hold up the value that overtook it.
func TestProbeHangingConnector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		f.onOpen = func(_ context.Context, value string) error {
			if value == "2" {
				time.Sleep(3 * time.Second)
			}
			return nil
		}
		hang := make(chan bool)
		var closed atomic.Int64
		d := closerDriver{heedless{ctxFake{f}}, func(value string) {
			if closed.Add(1); value == "2" {
				<-hang
			}
		}}
		db := open(t, d, src, "probe=true")
		want(t, "value", ask(t, db), "1")
		src.set("2")
		time.Sleep(time.Second)
		src.set("3")
		time.Sleep(10 * time.Second)
		want(t, "value", ask(t, db), "3")
		close(hang)
		synctest.Wait()
		want(t, "connectors closed", closed.Load(), 2)
	})
}
