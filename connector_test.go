package hotload_test

import (
	"context"
	"crypto/x509"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strconv"
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

func TestFirstConnect(t *testing.T) {
	t.Run("nothing is started by sql.Open", func(t *testing.T) {
		src := newSource("1")
		open(t, newFake(t), src, "").Close()
		want(t, "watches", src.watches.Load(), 0)
	})
	bubble(t, "nothing is started after Close", func(t *testing.T) {
		src := newSource("1")
		c, err := hotloadDriver(t).(driver.DriverContext).OpenConnector(register(newFake(t), src))
		must(t, "OpenConnector", err)
		must(t, "Close", c.(io.Closer).Close())
		_, err = c.Connect(t.Context())
		mustSay(t, "Connect", err, "hotload: the connector is closed")
		synctest.Wait()
		want(t, "watches", src.watches.Load(), 0)
	})
	bubble(t, "R-3/first connects share one watch", func(t *testing.T) {
		g := newGate()
		src := newSource("1")
		db := open(t, newFake(t), watchFunc(func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
			g.pass()
			return src.Watch(ctx, pth, options)
		}), "")
		answers := make(chan error)
		for range 5 {
			go func() { answers <- db.Ping() }()
		}
		<-g.arrived
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		want(t, "error of a caller with a deadline", db.PingContext(ctx), context.DeadlineExceeded)
		close(g.open)
		for range 5 {
			must(t, "ping", <-answers)
		}
		want(t, "watches", src.watches.Load(), 1)
	})
	t.Run("R-4/an error of Watch is the operation's and the next connect tries again", func(t *testing.T) {
		errWatch := errors.New("no such thing")
		src := newSource("1")
		watches := 0
		db := open(t, newFake(t), watchFunc(func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
			if watches++; watches < 3 {
				return "", nil, errWatch
			}
			return src.Watch(ctx, pth, options)
		}), "")
		for range 2 {
			want(t, "error", db.Ping(), errWatch)
		}
		want(t, "value", ask(t, db), "1")
		want(t, "watches", watches, 3)
	})
	for name, value := range map[string]string{"empty": "", "blank": " \n", "refused by the driver": "bad S3CRET"} {
		t.Run("R-5/a refused first value is an error and the next can be good", func(t *testing.T) {
			t.Log(name)
			src := newSource(value)
			db := open(t, ctxFake{newFake(t)}, src, "")
			for range 2 {
				err := db.Ping()
				if err == nil || !strings.HasPrefix(err.Error(), "hotload: ") || strings.Contains(err.Error(), "S3CRET") {
					t.Errorf("ping: %v", err)
				}
				if inner := errors.Unwrap(err); (inner != nil) != strings.HasPrefix(value, "bad") {
					t.Errorf("the driver's error: %v", inner)
				}
			}
			src.set("2")
			want(t, "value", ask(t, db), "2")
			want(t, "watches", src.watches.Load(), 1)
		})
	}
}

// A blank value that follows the first one at once is no error of those who wait
// for the first.
func TestFirstThenBlank(t *testing.T) {
	for range 200 {
		synctest.Test(t, func(t *testing.T) {
			db := open(t, newFake(t), watchFunc(func(context.Context, string, url.Values) (string, <-chan string, error) {
				values := make(chan string, 1)
				values <- ""
				close(values)
				return "1", values, nil
			}), "")
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					if err := db.Ping(); err != nil {
						t.Errorf("ping: %v", err)
					}
				})
			}
			wg.Wait()
		})
	}
}

// Bad values come while operations wait for a first good one.
func TestRefusedWhileConnecting(t *testing.T) {
	src := newSource("bad")
	db := open(t, ctxFake{newFake(t)}, src, "")
	mustSay(t, "ping", db.Ping(), "refused")
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := db.PingContext(ctx); err == nil {
					t.Error("no error")
				}
			}
		})
	}
	for n := range 200 {
		src.values <- fmt.Sprint("bad", n)
		src.values <- "" // hotload itself refuses this one, the driver the other
	}
	cancel()
	wg.Wait()
	src.set("1")
	want(t, "value", ask(t, db), "1")
}

func TestValues(t *testing.T) {
	log := collect(t)
	f, src := newFake(t), newSource("1")
	db := open(t, ctxFake{f}, src, "")
	want(t, "value", ask(t, db), "1")
	await(t, "the first value is logged", func() bool { return log.count("value accepted") == 1 })
	for _, tt := range []struct {
		name, set, want string
		opened          int64
		logged          []string
	}{
		{"R-6/an equal value is no change", "1", "1", 1, nil},
		{"R-7/a refused value changes nothing", "", "1", 1, []string{"hotload: value refused", "reason=empty"}},
		{"blank", " \n", "1", 1, nil},
		{"the same again", "", "1", 1, nil},
		{"refused by the driver", "bad S3CRET", "1", 1, []string{"hotload: value refused", "reason=driver", "error_type=*errors.errorString"}},
		{"R-8/puts each value in force in turn", "2", "2", 2, []string{"hotload: value accepted", "generation=2", "closed=1", "in_use=0"}},
		{"equal again", "2", "2", 2, nil},
		{"an earlier value", "1", "1", 3, []string{"hotload: value accepted", "generation=3", "closed=1", "in_use=0"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := log.count("accepted") + log.count("refused")
			src.set(tt.set)
			want(t, "value", ask(t, db), tt.want)
			want(t, "connections opened", f.opened.Load(), tt.opened)
			more := 0
			if tt.logged != nil {
				more = 1
				want(t, "lines with "+strings.Join(tt.logged, " "), log.count(tt.logged...), 1)
			}
			want(t, "lines logged", log.count("accepted")+log.count("refused"), before+more)
		})
	}
	if strings.Contains(log.String(), "S3CRET") {
		t.Errorf("a value is logged:\n%s", log)
	}
}

// TestWatchAgain checks the pauses before Watch is called again. A watch has not
// lasted because it was slow to begin.
func TestWatchAgain(t *testing.T) {
	bubble(t, "R-11/watches again with back-off", func(t *testing.T) {
		const ms, s = time.Millisecond, time.Second
		watches := []struct {
			begins, lasts time.Duration
			fails         bool
			pause         time.Duration // after it
		}{
			{0, 0, false, 100 * ms}, {0, 1 * s, false, 200 * ms}, {0, 0, true, 400 * ms}, {31 * s, 0, false, 800 * ms}, {0, 0, false, 1600 * ms},
			{0, 0, false, 3200 * ms}, {0, 0, false, 6400 * ms}, {31 * s, 0, false, 12800 * ms}, {0, 0, false, 25600 * ms}, {0, 0, false, 30 * s},
			{31 * s, 0, false, 30 * s}, {0, 30 * s, false, 30 * s}, {0, 30*s + ms, false, 100 * ms}, {0, 0, false, 200 * ms}, {0, time.Hour, false, 0},
		}
		log := collect(t)
		n, ended := 0, time.Now()
		db := open(t, newFake(t), watchFunc(func(ctx context.Context, _ string, _ url.Values) (string, <-chan string, error) {
			w := watches[n]
			if n++; n > 1 && time.Since(ended) != watches[n-2].pause {
				t.Errorf("pause after watch %d: have %v, want %v", n-1, time.Since(ended), watches[n-2].pause)
			}
			time.Sleep(w.begins)
			if ended = time.Now().Add(w.lasts); w.fails {
				return "", nil, errors.New("lost")
			}
			values := make(chan string)
			time.AfterFunc(w.lasts, func() { close(values) })
			return strconv.Itoa(n), values, nil
		}), "")
		want(t, "value", ask(t, db), "1")
		time.Sleep(10 * time.Minute)
		// The last value stays in force meanwhile; that of a new watch is taken up.
		want(t, "value", ask(t, db), "15")
		want(t, "watches lost", log.count("level=WARN", "hotload: watch lost"), 13+1)
		want(t, "because Watch failed", log.count("hotload: watch lost", "error_type=*errors.errorString"), 1)
		want(t, "watches regained", log.count("hotload: watch regained"), 13)
	})
}

// A prober is a pool with probe=true, in a synctest bubble, whose value in
// force is "a". It keeps the story of what its driver is asked: when, counted
// from the beginning, and what.
type prober struct {
	f     *fake
	src   *source
	db    *sql.DB
	log   *logs
	start time.Time

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
	p := &prober{f: newFake(t), src: newSource("a"), log: collect(t), start: time.Now()}
	var d driver.Driver = ctxFake{p.f}
	switch kind {
	case without:
		d = p.f
	case noPinger:
		p.f.asConn = func(c *fakeConn) driver.Conn {
			return struct {
				driver.Conn
				driver.QueryerContext
			}{c, c}
		}
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
	p.db = open(t, d, p.src, "probe=true&"+options)
	want(t, "first value", ask(t, p.db), "a")
	p.told()
	return p
}

func (p *prober) answer(ctx context.Context, value string, f answer) (err error) {
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
	story := slices.DeleteFunc(p.story, func(line string) bool { return strings.HasSuffix(line, "close a") })
	p.story = nil
	return strings.Join(story, ", ")
}

// set sets values, and waits as long after each.
func (p *prober) set(wait time.Duration, values ...string) {
	for _, value := range values {
		p.src.set(value)
		time.Sleep(wait)
		synctest.Wait()
	}
}

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
	var twenty, twentyTries []string // values that come every 100ms
	for n := range 20 {
		twenty = append(twenty, fmt.Sprint("b", n))
		twentyTries = append(twentyTries, fmt.Sprint(time.Duration(n)*100*time.Millisecond, " open b", n))
	}
	for _, row := range []struct {
		holds, name string
		kind        string // of driver: withContext and without, unless said
		dial, ping  answer
		wait        time.Duration // after each of
		set         []string
		then        string // is set in the end, if not empty
		story       string // up to a minute later
		inForce     string
		refusals    []string // parts of the lines that log one
		closed      string   // connectors that are closed by then
		tries       int64    // at a time at most, if not 1
	}{
		{
			holds: works, name: "a good value is tried once, pinged and closed", set: []string{"b"},
			story: "0s open b, 0s ping b, 0s close b", inForce: "b", closed: "a",
		}, {
			holds: works, name: "a driver that cannot ping is not asked to", kind: noPinger, set: []string{"b"},
			story: "0s open b, 0s close b", inForce: "b", closed: "a",
		}, {
			holds: works, name: "a value that the driver refuses is not tried", kind: withContext, set: []string{"bad"},
			inForce: "a", refusals: []string{"reason=driver"},
		}, {
			holds: works, name: "an empty value is not tried", set: []string{""},
			inForce: "a", refusals: []string{"reason=empty"},
		}, {
			holds: works, name: "a ping that fails is a failure, and the connection is closed", ping: until(100*time.Millisecond, driver.ErrBadConn), set: []string{"b"},
			story:   "0s open b, 0s ping b, 0s close b, 2s open b, 2s ping b, 2s close b",
			inForce: "b", refusals: []string{"reason=probe"}, closed: "a",
		}, {
			holds: works, name: "tries are repeated with back-off", dial: until(20*time.Second, errDead), set: []string{"b"},
			story: "0s open b, 250ms open b, 750ms open b, 1.75s open b, 3.75s open b, 7.75s open b, " +
				"12.75s open b, 17.75s open b, 22.75s open b, 22.75s ping b, 22.75s close b",
			inForce: "b", refusals: []string{"reason=probe"}, closed: "a",
		}, {
			holds: yield, name: "of three values in a row the last counts", set: []string{"b", "c", "d"},
			dial: func(_ context.Context, value string, _ time.Duration) error {
				if value == "d" {
					return nil
				}
				return errDead
			},
			story:   "0s open b, 0s open c, 0s open d, 0s ping d, 0s close d",
			inForce: "d", refusals: []string{"reason=probe", "reason=probe"}, closed: "a b c",
		}, {
			holds: yield, name: "a value that comes back ends the tries of another", dial: always(errDead), wait: 300 * time.Millisecond, set: []string{"b"}, then: "a",
			story: "0s open b, 250ms open b", inForce: "a", refusals: []string{"reason=probe"}, closed: "b",
		}, {
			holds: yield, name: "a value that comes back ends a hung try", kind: withContext, dial: hang, wait: 300 * time.Millisecond, set: []string{"b"}, then: "a",
			story: "0s open b, 300ms left b", inForce: "a", closed: "b",
		}, {
			holds: yield, name: "a value that comes back overtakes a try that succeeds late", kind: noPinger, dial: deaf(5 * time.Second), wait: 300 * time.Millisecond, set: []string{"b"}, then: "a",
			story: "0s open b, 5s left b, 5s close b", inForce: "a", closed: "b",
		}, {
			holds: yield, name: "a value that comes back overtakes a try that succeeds late", kind: without, dial: deaf(5 * time.Second), wait: 300 * time.Millisecond, set: []string{"b"}, then: "a",
			story: "0s open b, 5s close b", inForce: "a",
		}, {
			holds: yield, name: "what was given up is not tried again", dial: always(errDead), wait: 100 * time.Millisecond, set: twenty, then: "a",
			story: strings.Join(twentyTries, ", "), inForce: "a", refusals: make([]string, 20),
			closed: strings.Join(slices.Sorted(slices.Values(twenty)), " "),
		}, {
			holds: yield, name: "a hung try is cancelled by the next value", kind: withContext, dial: of("b", hang), wait: time.Second, set: []string{"b"}, then: "c",
			story: "0s open b, 1s left b, 1s open c, 1s ping c, 1s close c", inForce: "c", closed: "a b",
		}, {
			holds: yield, name: "a try that cannot be interrupted is left after a second", kind: without, dial: of("b", deaf(5*time.Second)), wait: time.Second, set: []string{"b"}, then: "c",
			story: "0s open b, 2s open c, 2s ping c, 2s close c, 5s close b", inForce: "c", tries: 2,
		}, {
			holds: works, name: "a dial has a time limit", kind: withContext, dial: first(hang), set: []string{"b"},
			story:   "0s open b, 10s left b, 10.25s open b, 10.25s ping b, 10.25s close b",
			inForce: "b", refusals: []string{"error_type=context.deadlineExceededError"}, closed: "a",
		}, {
			holds: works, name: "a ping has a time limit", ping: first(hang), set: []string{"b"},
			story:   "0s open b, 0s ping b, 10s left b, 10s close b, 10.25s open b, 10.25s ping b, 10.25s close b",
			inForce: "b", refusals: []string{"error_type=context.deadlineExceededError"}, closed: "a",
		}, {
			holds: yield, name: "a dial is left a second after the next value", kind: noPinger, dial: of("b", deaf(30*time.Second)), set: []string{"b", "c"},
			story: "0s open b, 1s open c, 1s close c, 30s left b, 30s close b", inForce: "c", closed: "a b", tries: 2,
		}, {
			holds: yield, name: "a dial that is overdue is left a second after the next value", kind: without, dial: of("b", deaf(30*time.Second)), wait: 20 * time.Second, set: []string{"b"}, then: "c",
			story:   "0s open b, 21s open c, 21s ping c, 21s close c, 30s close b",
			inForce: "c", refusals: []string{"error_type=context.deadlineExceededError"}, tries: 2,
		}, {
			holds: yield, name: "a ping is left a second after the next value", ping: of("b", deaf(30*time.Second)), set: []string{"b", "c"},
			story:   "0s open b, 0s ping b, 1s open c, 1s ping c, 1s close c, 30s left b, 30s close b",
			inForce: "c", closed: "a b",
		}, {
			holds: works, name: "a ping that panics is a failure, and the connection is closed", set: []string{"b"},
			ping:    first(func(context.Context, string, time.Duration) error { panic("a bug in the driver") }),
			story:   "0s open b, 0s ping b, 0s close b, 2s open b, 2s ping b, 2s close b",
			inForce: "b", refusals: []string{"error_type=*hotload.driverPanic"}, closed: "a",
		}, {
			holds: works, name: "a value refused meanwhile, and the same again, change nothing", dial: until(600*time.Millisecond, errDead),
			wait: 100 * time.Millisecond, set: []string{"b", "", "b"},
			story:   "0s open b, 250ms open b, 750ms open b, 750ms ping b, 750ms close b",
			inForce: "b", refusals: []string{"reason=probe", "reason=empty"}, closed: "a",
		},
	} {
		kinds := []string{withContext, without}
		if row.kind != "" {
			kinds = []string{row.kind}
		}
		for _, kind := range kinds {
			bubble(t, row.holds+"/"+row.name+"/"+kind, func(t *testing.T) {
				p := newProber(t, kind, "", row.dial, row.ping)
				p.set(row.wait, row.set...)
				if row.then != "" {
					p.set(0, row.then)
				}
				time.Sleep(time.Minute)
				want(t, "story", p.told(), row.story)
				want(t, "most tries at a time", p.f.maxDialing.Load(), max(1, row.tries))
				idle, accepted := "", 2
				if row.inForce == "a" {
					idle, accepted = "a", 1
				}
				want(t, "open connections", strings.Join(p.f.live(), " "), idle)
				want(t, "value in force", ask(t, p.db), row.inForce)
				want(t, "values accepted", p.log.count("value accepted"), accepted)
				want(t, "refusals in\n"+p.log.String(), p.log.count("value refused"), len(row.refusals))
				for _, part := range row.refusals {
					if p.log.count("value refused", part) == 0 {
						t.Errorf("no refusal with %s in\n%s", part, p.log)
					}
				}
				if kind != without {
					closed := strings.Fields(p.f.connectorsClosed())
					want(t, "connectors closed", strings.Join(slices.Sorted(slices.Values(closed)), " "), row.closed)
				}
			})
		}
	}
}

// Values come while others prove themselves: the last one is in force in the end.
func TestProbeStorm(t *testing.T) {
	src := newSource("0")
	db := open(t, ctxFake{newFake(t)}, src, "probe=true")
	ask(t, db)
	last := ""
	for n := range 2000 {
		last = strconv.Itoa(n + 1)
		src.values <- last
	}
	await(t, "the last value in force", func() bool { return ask(t, db) == last })
}

// A try whose connection hangs in its Close is a success after a second. Such a
// connection belongs to its generation, which has not drained while it is
// closing.
func TestProbeHungClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProber(t, withContext, "", nil, nil)
		stuck := make(chan struct{})
		var tried atomic.Bool
		p.f.onClose = onClose("b", func() {
			if !tried.Swap(true) {
				<-stuck
			}
		})
		for _, value := range []string{"b", "c"} {
			p.set(patience, value)
			want(t, "value in force", ask(t, p.db), value)
		}
		drained := func() int { return p.log.count("generation drained", "generation=2") }
		want(t, "drained while a connection is open", drained(), 0)
		close(stuck)
		synctest.Wait()
		want(t, "drained", drained(), 1)
	})
}

// A connector of an overtaken value that hangs in its Close does not hold up
// the value that overtook it.
func TestProbeHungConnector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProber(t, withContext, "", of("b", deaf(3*time.Second)), nil)
		stuck := make(chan struct{})
		p.f.onShut = func(value string) {
			if value == "b" {
				<-stuck
			}
		}
		p.set(time.Second, "b")
		p.set(10*time.Second, "c")
		want(t, "value", ask(t, p.db), "c")
		close(stuck)
		synctest.Wait()
		want(t, "connectors closed", p.f.connectorsClosed(), "a b")
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
		bubble(t, row.options, func(t *testing.T) {
			p := newProber(t, withContext, row.options, until(5*time.Second, errDead), nil)
			old := begin(t, p.db)
			p.set(7*time.Second+700*time.Millisecond, "b")
			late := begin(t, p.db)
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
		bubble(t, row.name+"/"+row.kind, func(t *testing.T) {
			p := newProber(t, row.kind, "", row.dial, row.ping)
			p.set(100*time.Millisecond, "b")
			began := time.Now()
			must(t, "DB.Close", p.db.Close())
			want(t, "DB.Close took", time.Since(began).Truncate(moment), row.takes)
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
			if row.kind != without {
				want(t, "number of connectors closed", len(p.f.connectorsClosed()), len("a b"))
			}
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
		bubble(t, row.name, func(t *testing.T) {
			f, src := newFake(t), newSource(row.first)
			start := time.Now()
			f.onOpen = func(context.Context, string) error {
				if time.Since(start) < time.Second {
					return row.err
				}
				return nil
			}
			f.onCall = onCall("b", "Ping", func(context.Context) error { t.Error("a first value is probed"); return nil })
			db := open(t, ctxFake{f}, src, "probe=true")
			query := func() error { return db.QueryRow("ask").Scan(new(string)) }
			if row.then != "" {
				mustSay(t, "the first value", query(), "hotload: ")
				src.set(row.then)
			}
			want(t, "error", query(), row.err)
			time.Sleep(time.Second)
			want(t, "value in force", ask(t, db), "b")
			want(t, "connections opened", f.opened.Load(), 1)
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
			time.Sleep(time.Hour)
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

// TestClose proves G9. The bubble of each row ends only when every goroutine in
// it has.
func TestClose(t *testing.T) {
	closed := func(t *testing.T, f *fake, db *sql.DB) {
		t.Helper()
		must(t, "DB.Close", db.Close())
		want(t, "connections", len(f.live()), 0)
	}
	const (
		nothing = "R-36/Close leaves nothing behind"
		nobody  = "R-37/Close waits for nobody who hangs"
	)
	for _, row := range []struct {
		name string
		run  func(t *testing.T, f *fake, src *source, db *sql.DB)
	}{
		{"idle", func(t *testing.T, f *fake, src *source, db *sql.DB) {
			ask(t, db)
			closed(t, f, db)
		}},
		{"just after a change", func(t *testing.T, f *fake, src *source, db *sql.DB) {
			f.onClose = func(*fakeConn) { time.Sleep(patience / 2) }
			ask(t, db)
			src.set("2")
			closed(t, f, db)
		}},
		{"just after a change of many", func(t *testing.T, f *fake, src *source, db *sql.DB) {
			fill(t, db, 2000)
			src.set("2")
			closed(t, f, db)
		}},
		{"while an operation waits for a Close", func(t *testing.T, f *fake, src *source, db *sql.DB) {
			f.onClose = func(*fakeConn) { time.Sleep(patience / 2) }
			f.lenient.Store(true) // the operation dials with the connector that is closed
			ask(t, db)
			src.set("2")
			answer := make(chan error)
			go func() { answer <- insert(db) }()
			synctest.Wait()
			db.Close()
			want(t, "connections to 1", f.liveOn("1"), 0)
			must(t, "the operation that waited", <-answer)
		}},
		{"in use", func(t *testing.T, f *fake, src *source, db *sql.DB) {
			tx, conn := begin(t, db), take(t, db)
			src.set("2")
			f.lenient.Store(true) // conn, on which nothing has run, dials with the connector that is closed
			db.Close()
			want(t, "value in a transaction", ask(t, tx), "1")
			must(t, "commit", tx.Commit())
			want(t, "value on a connection", ask(t, conn), "2")
			conn.Close()
		}},
		{"during a dial", func(t *testing.T, f *fake, src *source, db *sql.DB) {
			ask(t, db)
			f.onOpen = func(context.Context, string) error { time.Sleep(time.Second); return nil }
			conn := take(t, db) // the idle one
			answer := make(chan error)
			go func() { answer <- insert(db) }()
			synctest.Wait()
			db.Close()
			must(t, "the operation that was dialling", <-answer)
			conn.Close()
		}},
	} {
		bubble(t, nothing+"/"+row.name, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			row.run(t, f, src, open(t, ctxFake{f}, src, ""))
			time.Sleep(patience)
			synctest.Wait()
			want(t, "connections", len(f.live()), 0)
		})
	}
	bubble(t, nothing+"/of the watch", func(t *testing.T) {
		gone := false
		db := open(t, newFake(t), watchFunc(func(ctx context.Context, _ string, _ url.Values) (string, <-chan string, error) {
			values := make(chan string)
			go func() {
				<-ctx.Done()
				time.Sleep(moment)
				gone = true
				close(values)
			}()
			return "1", values, nil
		}), "")
		ask(t, db)
		db.Close()
		want(t, "the watch is gone", gone, true)
	})

	const every = "1 2"
	for _, row := range []struct {
		name        string
		close, shut string // values of connections and connectors that hang in their Close
		most        time.Duration
		run         func(t *testing.T, src *source, db *sql.DB)
	}{
		{"a Close", every, "", 2 * patience, func(t *testing.T, src *source, db *sql.DB) { ask(t, db) }},
		{"a Close, since a change", every, "", 2 * patience, func(t *testing.T, src *source, db *sql.DB) {
			ask(t, db)
			src.set("2")
		}},
		{"many a Close", every, "", 2 * patience, func(t *testing.T, src *source, db *sql.DB) { fill(t, db, 10) }},
		{"a connector", "", "2", 2 * patience, func(t *testing.T, src *source, db *sql.DB) {
			ask(t, db)
			src.set("2")
			src.set("3") // the connector of 2 is closed
			want(t, "value", ask(t, db), "3")
			src.set("2")
		}},
		{"all that is closed", every, every, 5 * patience / 2, func(t *testing.T, src *source, db *sql.DB) {
			ask(t, db)
			src.set("2")
			ask(t, db)
		}},
	} {
		bubble(t, nobody+"/"+row.name, func(t *testing.T) {
			f, src, stuck := newFake(t), newSource("1"), make(chan struct{})
			hang := func(values, value string) {
				if strings.Contains(values, value) {
					<-stuck
				}
			}
			f.onClose = func(c *fakeConn) { hang(row.close, c.value) }
			f.onShut = func(value string) { hang(row.shut, value) }
			db := open(t, ctxFake{f}, src, "")
			row.run(t, src, db)
			began := time.Now()
			db.Close()
			if took := time.Since(began); took > row.most+moment {
				t.Errorf("DB.Close took %v, want at most %v", took, row.most)
			}
			close(stuck)
			synctest.Wait()
			want(t, "connections", len(f.live()), 0)
		})
	}
	bubble(t, "but for the connector, though a Close hangs", func(t *testing.T) {
		f, src, stuck := newFake(t), newSource("1"), make(chan struct{})
		f.onClose = onClose("1", func() { <-stuck })
		f.onShut = func(string) { time.Sleep(patience/2 - moment) }
		db := open(t, ctxFake{f}, src, "")
		ask(t, db)
		src.set("2")
		want(t, "value", ask(t, db), "2")
		db.Close()
		want(t, "connectors closed", f.connectorsClosed(), "2")
		close(stuck)
		time.Sleep(patience)
	})
	for _, row := range []struct {
		name  string
		most  time.Duration
		watch func(ctx context.Context, stuck chan struct{})
	}{
		{"Watch", moment, func(ctx context.Context, _ chan struct{}) { <-ctx.Done() }},
		{"a Watch that ignores its context", patience, func(_ context.Context, stuck chan struct{}) { <-stuck }},
		{"a channel that the strategy does not close", patience, func(context.Context, chan struct{}) {}},
	} {
		bubble(t, nobody+"/"+row.name, func(t *testing.T) {
			stuck := make(chan struct{})
			db := open(t, newFake(t), watchFunc(func(ctx context.Context, _ string, _ url.Values) (string, <-chan string, error) {
				row.watch(ctx, stuck)
				return "1", make(chan string), ctx.Err()
			}), "")
			answer := make(chan error, 1)
			go func() { answer <- db.Ping() }()
			synctest.Wait()
			began := time.Now()
			db.Close()
			if took := time.Since(began); took > row.most+moment {
				t.Errorf("DB.Close took %v, want at most %v", took, row.most)
			}
			if err := <-answer; err == nil && row.name != "a channel that the strategy does not close" {
				t.Error("ping: no error")
			}
			close(stuck)
		})
	}
}

// TestClosers proves that the driver's connectors are closed once each: a
// superseded one when its generation has drained, the last one by DB.Close.
func TestClosers(t *testing.T) {
	bubble(t, "R-38/each connector is closed once", func(t *testing.T) { // which the fake polices
		f, src := newFake(t), newSource("1")
		db := open(t, ctxFake{f}, src, "")
		tx := begin(t, db)
		src.set("2")
		src.set("3")
		synctest.Wait()
		want(t, "connectors closed", f.connectorsClosed(), "2")
		tx.Rollback()
		synctest.Wait()
		want(t, "connectors closed", f.connectorsClosed(), "2 1")
		ask(t, db)
		db.Close()
		want(t, "connectors closed", f.connectorsClosed(), "2 1 3")
	})
	bubble(t, "DB.Close waits for one that is slow", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		f.onClose = func(*fakeConn) { time.Sleep(patience / 4) }
		f.onShut = func(value string) {
			if value == "1" {
				time.Sleep(patience / 2)
			}
		}
		db := open(t, ctxFake{f}, src, "")
		ask(t, db)
		src.set("2")
		synctest.Wait()
		db.Close()
		want(t, "connectors closed", f.connectorsClosed(), "1 2")
	})
}

// TestEvents checks what operators see.
func TestEvents(t *testing.T) {
	bubble(t, "R-41/logs each event", func(t *testing.T) {
		log := collect(t)
		f := newFake(t)
		watches := make(chan chan string, 1)
		db := open(t, ctxFake{f}, watchFunc(func(context.Context, string, url.Values) (string, <-chan string, error) {
			values := make(chan string)
			watches <- values
			return "1", values, nil
		}), "forceKill=true")
		txs := []*sql.Tx{begin(t, db), begin(t, db)}
		ask(t, db) // leaves an idle connection
		values := <-watches
		for _, value := range []string{"bad", "", "2"} {
			values <- value
			synctest.Wait()
		}
		for _, tx := range txs {
			mustBeKilled(t, "Commit", tx.Commit())
		}
		close(values)
		time.Sleep(time.Second)
		defer close(<-watches)
		pool := regexp.MustCompile("strategy=(test[0-9]+) driver=(test[0-9]+) path=/path").FindString(log.String())
		for _, line := range []string{
			`level=INFO msg="hotload: value accepted" POOL generation=1 closed=0 in_use=0`,
			`level=WARN msg="hotload: value refused" POOL reason=driver error_type=*errors.errorString`,
			`level=WARN msg="hotload: value refused" POOL reason=empty`,
			`level=INFO msg="hotload: value accepted" POOL generation=2 closed=1 in_use=2`,
			`level=WARN msg="hotload: connections killed" POOL generation=1 killed=2`,
			`level=INFO msg="hotload: generation drained" POOL generation=1`,
			`level=WARN msg="hotload: watch lost" POOL`,
			`level=INFO msg="hotload: watch regained" POOL`,
			`level=INFO msg="hotload: value accepted" POOL generation=3 closed=0 in_use=0`,
		} {
			line = strings.Replace(line, "POOL", pool, 1) + "\n"
			want(t, line+"in\n"+log.String(), strings.Count(log.String(), line), 1)
		}
		want(t, "kills: of generation 2 there was nothing in use", log.count("connections killed"), 1)
	})
	bubble(t, "DB.Close is no event", func(t *testing.T) {
		log := collect(t)
		db := open(t, newFake(t), newSource("1"), "")
		ask(t, db)
		must(t, "DB.Close", db.Close())
		synctest.Wait()
		want(t, "events but the first value in\n"+log.String(), log.count("hotload: "), 1)
	})
}

// What is logged of a generation is in order, however slow the logger is.
func TestLogOrder(t *testing.T) {
	for _, row := range []struct{ options, first, then string }{
		{"", "value accepted 2", "generation drained 1"},
		{"", "value accepted 2", "value accepted 3"},
		{"forceKill=true", "connections killed 1", "generation drained 1"},
		{"forceKill=1s", "connections killed 1", "generation drained 1"},
	} {
		bubble(t, row.options+"/"+row.then, func(t *testing.T) {
			var mu sync.Mutex // guards done
			var done []string
			logTo(t, logHook(func(event string) {
				if event == row.first {
					time.Sleep(time.Second)
				}
				mu.Lock()
				defer mu.Unlock()
				done = append(done, event)
			}))
			src := newSource("1")
			db := open(t, newFake(t), src, row.options)
			tx := begin(t, db)
			set := make(chan bool)
			go func() { src.set("2"); close(set) }()
			synctest.Wait()
			if row.options == "" {
				must(t, "commit", tx.Commit()) // drains its generation while the logger is slow
			}
			<-set
			src.set("3")
			time.Sleep(time.Minute)
			tx.Rollback()
			must(t, "DB.Close", db.Close())
			synctest.Wait()
			if first, then := slices.Index(done, row.first), slices.Index(done, row.then); first < 0 || then < first {
				t.Errorf("have %q, want %q before %q", done, row.first, row.then)
			}
		})
	}
}

// A driver that panics where it parses a value has refused it.
func TestPanicInOpenConnector(t *testing.T) {
	log := collect(t)
	src := newSource("1")
	db := open(t, panickingFake{ctxFake{newFake(t)}}, src, "")
	ask(t, db)
	src.set("panic")
	want(t, "refused", log.count("hotload: value refused", "reason=driver", "error_type=*hotload.driverPanic"), 1)
	want(t, "value", ask(t, db), "1")
}

type panickingFake struct{ ctxFake }

func (f panickingFake) OpenConnector(value string) (driver.Connector, error) {
	if value == "panic" {
		panic("a bug in the driver")
	}
	return f.ctxFake.OpenConnector(value)
}

// A parserFake is a ctxFake whose OpenConnector asks the test.
type parserFake struct {
	ctxFake
	onParse func(value string) error

	mu     sync.Mutex // guards parsed
	parsed []string
}

func newParser(t testing.TB, onParse func(value string) error) *parserFake {
	return &parserFake{ctxFake: ctxFake{newFake(t)}, onParse: onParse}
}

func (d *parserFake) OpenConnector(value string) (driver.Connector, error) {
	d.mu.Lock()
	d.parsed = append(d.parsed, value)
	d.mu.Unlock()
	if err := d.onParse(value); err != nil {
		return nil, err
	}
	return d.ctxFake.OpenConnector(value)
}

// parses counts the calls of OpenConnector with a value.
func (d *parserFake) parses(value string) (n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, v := range d.parsed {
		if v == value {
			n++
		}
	}
	return n
}

var (
	errNoFile  = &fs.PathError{Op: "open", Path: "client.pem", Err: syscall.ENOENT}
	errNoValue = errors.New("fake: the certificate is not complete")
)

// A value that the driver refuses may be good later, when a file that it names
// is there. It is tried again without a change of content, be it the first
// value or a later one.
func TestRefusedIsTriedAgain(t *testing.T) {
	for _, options := range []string{"", "probe=true", "forceKill=true", "forceKill=1h&probe=true"} {
		for _, first := range []bool{true, false} {
			for _, refusal := range []error{errNoFile, fmt.Errorf("tls: %w", errNoFile), errNoValue} {
				for _, row := range []struct{ comes, recovers time.Duration }{ // since the value came
					{time.Second, 3 * time.Second},
					{30 * time.Second, 2 * time.Minute},
					{time.Hour, time.Hour + 6*time.Minute},
				} {
					bubble(t, fmt.Sprintf("options=%s,first=%t,%v,%v", options, first, refusal, row.comes), func(t *testing.T) {
						l := collect(t)
						var there atomic.Bool
						d := newParser(t, func(value string) error {
							if value == "2" && !there.Load() {
								return refusal
							}
							return nil
						})
						src := newSource(map[bool]string{true: "2", false: "1"}[first])
						db := open(t, d, src, options)
						if first {
							start := time.Now()
							for range 3 {
								if err := db.Ping(); !errors.Is(err, refusal) || !strings.HasPrefix(err.Error(), "hotload: ") {
									t.Fatalf("ping with a first value that is refused: have error %v, want hotload's for %v", err, refusal)
								}
							}
							want(t, "time that this took", time.Since(start), 0)
						} else {
							want(t, "value", ask(t, db), "1")
							src.set("2")
							want(t, "value while the next is refused", ask(t, db), "1")
						}
						time.Sleep(row.comes)
						there.Store(true)
						time.Sleep(row.recovers - row.comes)
						if n := d.parses("2"); n < 2 {
							t.Fatalf("the driver was asked %d times in %v about the value that it refused at first", n, row.recovers)
						}
						want(t, fmt.Sprint("value ", row.recovers-row.comes, " after the file came"), ask(t, db), "2")
						want(t, "refusals logged in\n"+l.String(), l.count("value refused", "reason=driver"), 1)
						want(t, "values accepted", l.count("value accepted"), map[bool]int{true: 1, false: 2}[first])
						n := d.parses("2")
						time.Sleep(time.Hour)
						want(t, "OpenConnectors of the value in force", d.parses("2"), n)
					})
				}
			}
		}
	}
}

// What was refused is tried no more when another value comes, when the value in
// force comes back, and after DB.Close.
func TestRefusedGivesWay(t *testing.T) {
	for _, options := range []string{"", "probe=true"} {
		for _, row := range []struct {
			name    string
			first   string
			do      func(src *source, close func())
			inForce string
		}{
			{"another value", "1", func(src *source, _ func()) { src.set("3") }, "3"},
			{"another value after a first that was refused", "2", func(src *source, _ func()) { src.set("3") }, "3"},
			{"the value in force comes back", "1", func(src *source, _ func()) { src.set("1") }, "1"},
			{"DB.Close", "1", func(_ *source, close func()) { close() }, ""},
			{"DB.Close after a first that was refused", "2", func(_ *source, close func()) { close() }, ""},
		} {
			bubble(t, options+","+row.name, func(t *testing.T) {
				var there atomic.Bool
				d := newParser(t, func(value string) error {
					if value == "2" && !there.Load() {
						return errNoFile
					}
					return nil
				})
				src := newSource(row.first)
				db := open(t, d, src, options)
				if err := db.Ping(); (err != nil) != (row.first == "2") {
					t.Fatalf("ping: %v", err)
				}
				if row.first != "2" {
					src.set("2")
				}
				time.Sleep(time.Second)
				row.do(src, func() { db.Close() })
				time.Sleep(time.Second)
				n := d.parses("2")
				there.Store(true)
				time.Sleep(time.Hour)
				want(t, "OpenConnectors of the value that gave way", d.parses("2"), n)
				want(t, "connections with it", d.liveOn("2"), 0)
				if row.inForce != "" {
					want(t, "value in force", ask(t, db), row.inForce)
				}
			})
		}
	}
}

// The same refused value, delivered again and again, is not tried more often
// for that, and neither is it in the end forgotten.
func TestRefusedComesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := collect(t)
		var there atomic.Bool
		d := newParser(t, func(value string) error {
			if value == "2" && !there.Load() {
				return errNoFile
			}
			return nil
		})
		src := newSource("1")
		db := open(t, d, src, "")
		want(t, "value", ask(t, db), "1")
		for range 20 {
			src.set("2")
			time.Sleep(time.Second)
		}
		want(t, "refusals logged in\n"+l.String(), l.count("value refused"), 1)
		there.Store(true)
		time.Sleep(time.Minute)
		want(t, "value", ask(t, db), "2")
	})
}

// A mysqlError is an error of a type that hotload cannot know.
type mysqlError struct{ Number uint16 }

func (e *mysqlError) Error() string { return fmt.Sprint("Error ", e.Number) }

// An answer of a server that denies is asked for again seldom, because servers
// lock accounts: at most five times in the first six minutes. What is not
// reachable, or not up yet, is tried again within seconds.
func TestProbeBackOff(t *testing.T) {
	dead := &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	denied := &pq.Error{Code: "28P01"}
	always := func(err error) func(int) error { return func(int) error { return err } }
	for _, row := range []struct {
		name   string
		err    func(try int) error
		denies bool
		mixed  bool // denials among others
	}{
		{name: "SQLSTATE 28P01", err: always(denied), denies: true},
		{name: "SQLSTATE 28P01, wrapped", err: always(fmt.Errorf("connect: %w", denied)), denies: true},
		{name: "SQLSTATE 28P01, of another driver", err: always(codeError("28P01")), denies: true},
		{name: "SQLSTATE 28000", err: always(codeError("28000")), denies: true},
		{name: "SQLSTATE 3D000", err: always(&pq.Error{Code: "3D000"}), denies: true},
		{name: "a denial beside a host that is not reachable", err: always(errors.Join(dead, denied)), denies: true},
		{name: "an error that is no SQLSTATE", err: always(codeError("")), denies: true},
		{name: "a MySQL error", err: always(&mysqlError{1045}), denies: true},
		{name: "an unknown error", err: always(errors.New("access denied")), denies: true},
		{name: "a certificate that is not accepted", err: always(x509.UnknownAuthorityError{}), denies: true},
		{name: "not reachable and denied in turns", err: func(try int) error {
			if try%2 == 0 {
				return denied
			}
			return dead
		}, denies: true, mixed: true},
		{name: "not reachable for a while, then denied", err: func(try int) error {
			if try < 20 {
				return dead
			}
			return denied
		}, denies: true, mixed: true},
		{name: "net.OpError", err: always(dead)},
		{name: "net.DNSError", err: always(&net.DNSError{Err: "no such host", IsNotFound: true})},
		{name: "net.OpError, wrapped", err: always(fmt.Errorf("connect: %w", dead))},
		{name: "errno", err: always(syscall.ECONNREFUSED)},
		{name: "errno of a file", err: always(errNoFile)},
		{name: "deadline", err: always(context.DeadlineExceeded)},
		{name: "deadline, wrapped", err: always(fmt.Errorf("connect: %w", context.DeadlineExceeded))},
		{name: "cancelled", err: always(context.Canceled)},
		{name: "SQLSTATE 08006", err: always(&pq.Error{Code: "08006"})},
		{name: "SQLSTATE 53300", err: always(codeError("53300"))},
		{name: "SQLSTATE 57P03", err: always(fmt.Errorf("connect: %w", &pq.Error{Code: "57P03"}))},
	} {
		for _, kind := range []string{"Open", "Connect", "Ping"} {
			bubble(t, row.name+"/"+kind, func(t *testing.T) {
				f, src := newFake(t), newSource("1")
				start := time.Now()
				var all, denials []time.Duration // of the tries; they come one at a time
				try := func(at, value string) error {
					if value != "2" || (at == "Ping") != (kind == "Ping") {
						return nil
					}
					err := row.err(len(all))
					all = append(all, time.Since(start))
					if err != error(dead) {
						denials = append(denials, time.Since(start))
					}
					return err
				}
				f.onOpen = func(_ context.Context, value string) error { return try("Open", value) }
				f.onCall = func(_ context.Context, c *fakeConn, call string) error {
					if call == "Ping" {
						return try("Ping", c.value)
					}
					return nil
				}
				var d driver.Driver = ctxFake{f}
				if kind == "Open" {
					d = f
				}
				db := open(t, d, src, "probe=true")
				want(t, "value", ask(t, db), "1")
				src.set("2")
				time.Sleep(time.Hour)
				synctest.Wait()
				if !row.denies {
					if len(all) < 60*60/10 {
						t.Errorf("%d tries in an hour, want one every few seconds: at %v", len(all), all[:min(len(all), 10)])
					}
					for i := 1; i < len(all); i++ {
						if pause := all[i] - all[i-1]; pause < 50*time.Millisecond || pause > 10*time.Second {
							t.Fatalf("%v between two tries, want some seconds at most: tries at %v", pause, all[:i+1])
						}
					}
					return
				}
				for i := 5; i < len(denials); i++ {
					if within := denials[i] - denials[i-5]; within <= 6*time.Minute {
						t.Fatalf("six denied tries within %v, want at most five in six minutes: at %v", within, denials[:i+1])
					}
				}
				if row.mixed {
					if len(denials) < 3 {
						t.Errorf("%d denied tries in an hour: at %v", len(denials), denials)
					}
					return
				}
				for i, pause := range []struct{ least, most time.Duration }{
					{1500 * time.Millisecond, 3 * time.Second},
					{7 * time.Second, 11 * time.Second},
					{45 * time.Second, 75 * time.Second},
					{4 * time.Minute, 6 * time.Minute},
					{4 * time.Minute, 6 * time.Minute},
				} {
					if i+1 >= len(all) {
						t.Fatalf("%d tries in an hour, at %v: want another within %v", len(all), all, pause.most)
					}
					if d := all[i+1] - all[i]; d < pause.least || d > pause.most {
						t.Fatalf("%v between tries %d and %d, want %v to %v: tries at %v", d, i+1, i+2, pause.least, pause.most, all[:i+2])
					}
				}
				for i := 1; i < len(all); i++ {
					if pause := all[i] - all[i-1]; pause > 6*time.Minute {
						t.Fatalf("%v between two tries, want five minutes: at %v", pause, all)
					}
				}
			})
		}
	}
}

// A denied value that becomes good, because the server learns of the new
// password a moment after the file does, is in force soon.
func TestProbeDeniedForAMoment(t *testing.T) {
	for _, moment := range []time.Duration{time.Second, 8 * time.Second} {
		bubble(t, moment.String(), func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			start := time.Now()
			f.onOpen = func(_ context.Context, value string) error {
				if value == "2" && time.Since(start) < moment {
					return &pq.Error{Code: "28P01"}
				}
				return nil
			}
			db := open(t, ctxFake{f}, src, "probe=true")
			want(t, "value", ask(t, db), "1")
			src.set("2")
			time.Sleep(moment + 6*time.Second - time.Since(start))
			want(t, "value", ask(t, db), "2")
		})
	}
}

// A hangFake hangs for the value "b", deaf to contexts, until the test lets go.
type hangFake struct {
	*parserFake
	kind  string
	free  chan struct{}
	once  sync.Once
	tries atomic.Int64 // in progress
	most  atomic.Int64
	begun atomic.Int64
}

// The kinds of tries that hang: an OpenConnector at once, or when it is called
// again because it refused the value at first.
var hangKinds = []string{"Open", "Connect", "Ping", "OpenConnector", "OpenConnector again"}

func newHangFake(t *testing.T, kind string) *hangFake {
	h := &hangFake{kind: kind, free: make(chan struct{})}
	h.parserFake = newParser(t, func(value string) error {
		if kind == "OpenConnector again" && h.parses("b") == 1 && value == "b" {
			return errNoFile
		}
		h.hang("OpenConnector", value)
		h.hang("OpenConnector again", value)
		return nil
	})
	h.onOpen = func(_ context.Context, value string) error {
		h.hang("Open", value)
		h.hang("Connect", value)
		return nil
	}
	h.onCall = func(_ context.Context, c *fakeConn, call string) error {
		h.hang(call, c.value)
		return nil
	}
	return h
}

func (h *hangFake) hang(call, value string) {
	if call != h.kind || value != "b" {
		return
	}
	h.begun.Add(1)
	raise(&h.most, h.tries.Add(1))
	defer h.tries.Add(-1)
	<-h.free
}

func (h *hangFake) driver() driver.Driver {
	if h.kind == "Open" {
		return h.fake
	}
	return h.parserFake
}

// letGo ends all that hangs, at the latest when the test does.
func (h *hangFake) letGo() {
	h.once.Do(func() { close(h.free) })
	synctest.Wait()
}

// begin delivers the value that hangs, and waits for its try.
func (h *hangFake) begin(t *testing.T, src *source) {
	t.Helper()
	src.values <- "b"
	if h.kind == "OpenConnector again" {
		time.Sleep(3 * time.Second)
	}
	synctest.Wait()
	want(t, "tries in progress", h.tries.Load(), 1)
}

// A try that hangs, in a driver that cannot be interrupted, is left after about
// a second when another value overtakes it, and is the only one of its value.
func TestHungTryGivesWay(t *testing.T) {
	for _, kind := range hangKinds {
		for _, after := range []time.Duration{0, 300 * time.Millisecond, 5 * time.Second, 20 * time.Second} {
			for _, next := range []string{"c", "a"} {
				bubble(t, fmt.Sprintf("%s,%s after %v", kind, next, after), func(t *testing.T) {
					h, src := newHangFake(t, kind), newSource("a")
					db := open(t, h.driver(), src, "probe=true")
					t.Cleanup(h.letGo)
					want(t, "value", ask(t, db), "a")
					h.begin(t, src)
					time.Sleep(after)
					go src.set(next)
					// An OpenConnector may hold up what the strategy delivers for a second, too.
					time.Sleep(2500 * time.Millisecond)
					want(t, "value two and a half seconds after the next came", ask(t, db), next)
					time.Sleep(time.Hour)
					want(t, "tries that were begun", h.begun.Load(), 1)
					h.letGo()
					time.Sleep(time.Hour)
					want(t, "value in the end", ask(t, db), next)
					want(t, "tries that were begun", h.begun.Load(), 1)
					want(t, "connections with the value that was overtaken", h.liveOn("b"), 0)
				})
			}
		}
	}
}

// A host that hangs for an hour has one try at a time, is told of once, and is
// in force when it works. DB.Close does not wait for it, and ends the tries.
func TestHungTryIsTheOnlyOne(t *testing.T) {
	for _, kind := range hangKinds {
		for _, end := range []string{"works", "DB.Close"} {
			bubble(t, kind+","+end, func(t *testing.T) {
				l := collect(t)
				h, src := newHangFake(t, kind), newSource("a")
				db := open(t, h.driver(), src, "probe=true")
				t.Cleanup(h.letGo)
				want(t, "value", ask(t, db), "a")
				h.begin(t, src)
				time.Sleep(time.Minute)
				want(t, "refusals logged in a minute:\n"+l.String(), l.count("value refused") > 0, true)
				time.Sleep(time.Hour)
				want(t, "most tries at a time in an hour", h.most.Load(), 1)
				if kind != "OpenConnector again" {
					want(t, "refusals logged in an hour:\n"+l.String(), l.count("value refused"), 1)
					want(t, "of them", l.count("value refused", "error_type=context.deadlineExceededError"), 1)
				}
				want(t, "value in force", ask(t, db), "a")
				if end == "works" {
					h.letGo()
					time.Sleep(6 * time.Minute)
					want(t, "value in force six minutes after the host worked", ask(t, db), "b")
					return
				}
				start := time.Now()
				db.Close()
				if took := time.Since(start); took > 3*patience {
					t.Errorf("DB.Close took %v", took)
				}
				begun := h.begun.Load()
				h.letGo()
				time.Sleep(time.Hour)
				want(t, "tries that were begun after DB.Close", h.begun.Load()-begun, 0)
				want(t, "connections with the value", h.liveOn("b"), 0)
			})
		}
	}
}

// An OpenConnector that does not return is the answer to who waits for a first
// value, and is logged as the driver's. With probe it is called without a dial
// for a first value, too.
func TestHungOpenConnector(t *testing.T) {
	for _, options := range []string{"", "probe=true"} {
		bubble(t, options, func(t *testing.T) {
			log := collect(t)
			stuck := make(chan struct{})
			d := newParser(t, func(string) error { <-stuck; return nil })
			db := open(t, d, newSource("1"), options)
			began := time.Now()
			mustSay(t, "ping", db.Ping(), "has not returned from OpenConnector within 10s")
			want(t, "after", time.Since(began), 11*time.Second)
			synctest.Wait()
			want(t, "refusals by the driver in\n"+log.String(), log.count("value refused", "reason=driver"), 1)
			close(stuck)
			synctest.Wait()
			want(t, "value", ask(t, db), "1")
		})
	}
}

// DB.Close while a value is being taken up ends its tries before they begin.
func TestCloseDuringOffer(t *testing.T) {
	for _, refuses := range []bool{false, true} {
		bubble(t, fmt.Sprintf("refused=%t", refuses), func(t *testing.T) {
			entered, goOn := make(chan bool), make(chan bool)
			var dials, parses atomic.Int64
			var mended atomic.Bool
			d := newParser(t, func(value string) error {
				if value != "2" || mended.Load() {
					return nil
				}
				if parses.Add(1) == 1 {
					close(entered)
					<-goOn
				}
				if refuses {
					return errNoFile
				}
				return nil
			})
			d.onOpen = func(_ context.Context, value string) error {
				if value != "2" || mended.Load() {
					return nil
				}
				dials.Add(1)
				return errors.New("no route to host")
			}
			src := newSource("1")
			db := open(t, d, src, "probe=true")
			want(t, "value", ask(t, db), "1")
			go func() { src.values <- "2" }()
			<-entered
			db.Close()
			close(goOn)
			time.Sleep(10 * time.Minute)
			have := fmt.Sprintf("%d dials, %d OpenConnectors", dials.Load(), parses.Load())
			mended.Store(true) // what goes on for ever would keep the bubble
			time.Sleep(10 * time.Minute)
			want(t, "after DB.Close", have, "0 dials, 1 OpenConnectors")
		})
	}
}

// A value that comes in the instant in which a try of another succeeds is in
// force in the end, and DB.Close in that instant leaves nothing behind.
func TestOvertakenAtTheLastMoment(t *testing.T) {
	for _, row := range []struct{ at, next string }{
		{"dial", "c"}, {"dial", "a"}, {"dial", "DB.Close"},
		{"OpenConnector", "c"}, {"OpenConnector", "a"}, {"OpenConnector", "DB.Close"},
	} {
		t.Run(row.at+","+row.next, func(t *testing.T) {
			for range 300 {
				synctest.Test(t, func(t *testing.T) {
					d := newParser(t, nil)
					slow := func(at string) func(value string) error {
						return func(value string) error {
							switch {
							case value != "b" || at != row.at:
							case at == "OpenConnector" && d.parses("b") == 1:
								return errNoFile
							default:
								time.Sleep(500 * time.Millisecond)
							}
							return nil
						}
					}
					d.onParse = slow("OpenConnector")
					d.onOpen = func(_ context.Context, value string) error { return slow("dial")(value) }
					src := newSource("a")
					db := open(t, d, src, "probe=true")
					want(t, "value", ask(t, db), "a")
					src.values <- "b"
					synctest.Wait()
					if row.at == "OpenConnector" {
						for n := 0; d.parses("b") < 2; n++ { // the first is refused
							if time.Sleep(10 * time.Millisecond); n > 1000 {
								t.Fatal("a value that was refused is not tried again")
							}
						}
					}
					if time.Sleep(500 * time.Millisecond); row.next == "DB.Close" {
						db.Close()
						time.Sleep(time.Minute)
						want(t, "connections after DB.Close", len(d.live()), 0)
						return
					}
					src.values <- row.next
					time.Sleep(3 * time.Second)
					want(t, "value in the end", ask(t, db), row.next)
					want(t, "connections with the value that was overtaken", d.liveOn("b"), 0)
				})
			}
		})
	}
}

// Values of all kinds come in any order and at any time. A good one is in force
// soon, whatever the one before does; nothing else ever is; few dials go on at a
// time, and none begins after DB.Close.
func TestCandidatesInAnyOrder(t *testing.T) {
	for round := range 60 {
		seed := rand.Uint64()
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { candidates(t, seed) })
		})
		if t.Failed() {
			t.Logf("seed %d", seed)
			return
		}
	}
}

func candidates(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	withContext := r.IntN(2) == 0
	f, src := newFake(t), newSource("good0")
	var mu sync.Mutex
	since := make(map[string]time.Time)
	dials := make(map[string]int)
	ended := false
	latest, latestAt := "good0", time.Now()
	f.onOpen = func(ctx context.Context, value string) error {
		mu.Lock()
		if since[value].IsZero() {
			since[value] = time.Now()
		}
		dials[value]++
		age, last, quiet := time.Since(since[value]), latest, time.Since(latestAt)
		if ended {
			t.Errorf("dial to %s after DB.Close", value)
		}
		mu.Unlock()
		if value != last && (value[0] == 'd' || value[0] == 'h') && age > 0 && quiet > 0 {
			t.Errorf("dial to %s when %s was the latest", value, last)
		}
		switch value[0] {
		case 'd':
			return errAuth
		case 'x': // reachable after half a minute
			if age < 30*time.Second {
				return errDead
			}
		case 'h':
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(20 * time.Second):
			}
			return errDead
		case 's':
			time.Sleep(700 * time.Millisecond)
		}
		return nil
	}
	var d driver.Driver = f
	if withContext {
		d = ctxFake{f}
	}
	db := open(t, d, src, "probe=true")
	ask(t, db)
	sleeps := []time.Duration{0, 0, time.Millisecond, 300 * time.Millisecond, 999 * time.Millisecond, time.Second, 1001 * time.Millisecond,
		3 * time.Second, 11 * time.Second, 12 * time.Second, 40 * time.Second, 400 * time.Second}
	have := func() string {
		v := ask(t, db)
		if v[0] == 'd' || v[0] == 'h' {
			t.Errorf("%s is in force", v)
		}
		return v
	}
	for i := 1; i < 25; i++ {
		value := fmt.Sprint([]string{"good", "deny", "xlate", "hang", "slow"}[r.IntN(5)], i)
		if r.IntN(4) == 0 {
			value = have()
		}
		mu.Lock()
		latest, latestAt = value, time.Now()
		mu.Unlock()
		src.set(value)
		time.Sleep(sleeps[r.IntN(len(sleeps))])
		if r.IntN(2) == 0 {
			have()
		}
		if value[0] == 'g' || value[0] == 's' {
			time.Sleep(2 * time.Second)
			if v := have(); v != value {
				t.Errorf("%s is in force two seconds after %s was set", v, value)
			}
		}
		if n := f.dialing.Load(); n > 21 {
			t.Errorf("%d dials at a time", n)
		}
	}
	time.Sleep(sleeps[r.IntN(len(sleeps))])
	have()
	if latest[0] == 'x' {
		time.Sleep(2 * time.Minute)
		want(t, "value in force", have(), latest)
	}
	mu.Lock()
	for value, n := range dials {
		if value[0] == 'd' && n > 7+int(time.Since(since[value])/(5*time.Minute)) {
			t.Errorf("%d dials to %s", n, value)
		}
	}
	mu.Unlock()
	db.Close()
	mu.Lock()
	ended = true
	mu.Unlock()
	time.Sleep(time.Hour)
	want(t, "connections", len(f.live()), 0)
}
