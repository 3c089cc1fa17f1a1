package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
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

// TestWatchAgain checks the pauses before Watch is called again.
func TestWatchAgain(t *testing.T) {
	t.Run("R-11/watches again with back-off", func(t *testing.T) {
		log := collect(t)
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			type watch struct {
				after time.Duration // since the one before it
				value chan string
			}
			watches := make(chan watch)
			var failing atomic.Bool
			db := open(t, newFake(t), watchFunc(func(ctx context.Context, _ string, _ url.Values) (string, <-chan string, error) {
				w := watch{time.Since(began), make(chan string)}
				began = time.Now()
				if ctx.Err() != nil {
					return "", nil, ctx.Err()
				}
				watches <- w
				if failing.Load() {
					return "", nil, errors.New("lost")
				}
				return fmt.Sprint(w.after), w.value, nil
			}), "")
			go db.Ping()
			w := <-watches
			for _, tt := range []struct {
				lasts time.Duration
				fail  bool
				want  time.Duration
			}{
				{0, false, 100 * time.Millisecond},
				{time.Second, false, 200 * time.Millisecond},
				{0, true, 400 * time.Millisecond},
				{0, false, 800 * time.Millisecond},
				{0, false, 1600 * time.Millisecond},
				{0, false, 3200 * time.Millisecond},
				{0, false, 6400 * time.Millisecond},
				{0, false, 12800 * time.Millisecond},
				{0, false, 25600 * time.Millisecond},
				{0, false, 30 * time.Second},
				{30 * time.Second, false, 30 * time.Second},
				{30*time.Second + time.Millisecond, false, 100 * time.Millisecond},
				{0, false, 200 * time.Millisecond},
			} {
				time.Sleep(tt.lasts)
				synctest.Wait()
				if !failing.Load() {
					close(w.value)
				}
				failing.Store(tt.fail)
				w = <-watches
				want(t, "time since the last Watch", w.after, tt.lasts+tt.want)
				synctest.Wait()
			}
			// The last value stays in force meanwhile; that of a new watch is taken up.
			want(t, "value", ask(t, db), "200ms")
			db.Close()
		})
		want(t, "watches lost", log.count("level=WARN", "hotload: watch lost"), 12+1)
		want(t, "because Watch failed", log.count("hotload: watch lost", "error_type=*errors.errorString"), 1)
		want(t, "watches regained", log.count("hotload: watch regained"), 12)
	})
	t.Run("a watch has not lasted because it was slow to begin", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			const slow = 31 * time.Second
			var began []time.Duration
			start := time.Now()
			db := open(t, newFake(t), watchFunc(func(ctx context.Context, _ string, _ url.Values) (string, <-chan string, error) {
				began = append(began, time.Since(start)-time.Duration(len(began))*slow)
				select {
				case <-time.After(slow):
				case <-ctx.Done():
				}
				values := make(chan string)
				close(values)
				return "1", values, ctx.Err()
			}), "")
			ask(t, db)
			time.Sleep(4 * slow)
			db.Close()
			want(t, "pauses between watches, summed up", fmt.Sprint(began), "[0s 100ms 300ms 700ms 1.5s]")
		})
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
		f.onShut = func(string) { time.Sleep(patience / 4) }
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
		tx := begin(t, db)
		ask(t, db) // leaves an idle connection
		values := <-watches
		for _, value := range []string{"bad", "", "2"} {
			values <- value
			synctest.Wait()
		}
		mustBeKilled(t, "Commit", tx.Commit())
		close(values)
		time.Sleep(time.Second)
		defer close(<-watches)
		pool := regexp.MustCompile("strategy=(test[0-9]+) driver=(test[0-9]+) path=/path").FindString(log.String())
		for _, line := range []string{
			`level=INFO msg="hotload: value accepted" POOL generation=1 closed=0 in_use=0`,
			`level=WARN msg="hotload: value refused" POOL reason=driver error_type=*errors.errorString`,
			`level=WARN msg="hotload: value refused" POOL reason=empty`,
			`level=INFO msg="hotload: value accepted" POOL generation=2 closed=1 in_use=1`,
			`level=WARN msg="hotload: connections killed" POOL generation=1 killed=1`,
			`level=INFO msg="hotload: generation drained" POOL generation=1`,
			`level=WARN msg="hotload: watch lost" POOL`,
			`level=INFO msg="hotload: watch regained" POOL`,
			`level=INFO msg="hotload: value accepted" POOL generation=3 closed=0 in_use=0`,
		} {
			line = strings.Replace(line, "POOL", pool, 1) + "\n"
			want(t, line+"in\n"+log.String(), strings.Count(log.String(), line), 1)
		}
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
