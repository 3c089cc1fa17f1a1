package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestDial(t *testing.T) {
	eachDriver(t, "R-23/a hung dial moves to the new value", func(t *testing.T, f *fake, d driver.Driver) {
		log := collect(t)
		src, g := newSource("1"), newGate()
		f.onOpen = onOpen("1", func(context.Context) error { g.pass(); return nil }) // deaf to its context
		db := open(t, d, src, "")
		answers := make(chan string)
		for range 3 {
			go func() { answers <- ask(t, db) }()
		}
		synctest.Wait()
		want(t, "dials", len(g.arrived), 3)
		src.set("2")
		for range 3 {
			want(t, "value", <-answers, "2")
		}
		drained := func() int { return log.count("hotload: generation drained", "generation=1") }
		want(t, "generation 1 drained", drained(), 0)
		close(g.open)
		synctest.Wait()
		want(t, "generation 1 drained", drained(), 1)
		want(t, "connections on the old value", f.liveOn("1"), 0)
		want(t, "value", ask(t, db), "2")
	})
	t.Run("R-24/a late connection is closed", func(t *testing.T) {
		f, src := newFake(t), newSource("0")
		dials := make(chan bool)
		f.onOpen = func(ctx context.Context, v string) error {
			if strings.HasPrefix(v, "-") {
				dials <- true
				<-ctx.Done() // as it does when the value is superseded
			}
			return nil
		}
		db := open(t, ctxFake{f}, src, "")
		ask(t, db)
		db.SetMaxIdleConns(0)
		for n := 1; n < 200; n++ {
			src.set(strconv.Itoa(-n))
			conns := make(chan *sql.Conn)
			go func() { conns <- take(t, db) }()
			<-dials
			src.set(strconv.Itoa(n))
			conn := receive(t, "connection", conns)
			await(t, "the old connections are closed", func() bool { return f.liveOn(strconv.Itoa(-n)) == 0 })
			conn.Close()
		}
	})
	for _, parked := range []bool{false, true} {
		eachDriver(t, "R-25/a dial honours its caller's deadline", func(t *testing.T, f *fake, d driver.Driver) {
			src, g := newSource("1"), newGate()
			f.onOpen = onOpen("2", func(context.Context) error { g.pass(); return nil })
			db := open(t, d, src, "")
			db.SetMaxOpenConns(1)
			if ask(t, db); !parked {
				db.SetMaxIdleConns(-1)
			}
			src.set("2")
			ctx, cancel := context.WithTimeout(t.Context(), moment)
			defer cancel()
			want(t, "error", db.PingContext(ctx), context.DeadlineExceeded)
			answer := make(chan string)
			go func() { answer <- ask(t, db) }()
			synctest.Wait()
			want(t, "value of another pool", ask(t, open(t, d, newSource("0"), "")), "0")
			src.set("3")
			want(t, "value", <-answer, "3")
			close(g.open)
		})
	}
	eachDriver(t, "R-27/an error of a dial is the driver's own", func(t *testing.T, f *fake, d driver.Driver) {
		f.onOpen = onOpen("2", func(context.Context) error { return errDead })
		src := newSource("1")
		db := open(t, d, src, "")
		ask(t, db)
		src.set("2")
		for range 3 {
			want(t, "error", insert(db), error(errDead))
		}
		f.onOpen = onOpen("2", func(context.Context) error { panic("a bug in the driver") })
		mustSay(t, "a dial that panics", insert(db), "panicked")
		src.set("3")
		want(t, "value", ask(t, db), "3")
	})
}

// TestLeftOpen is what becomes of the Open of a driver without contexts when its
// caller has left.
func TestLeftOpen(t *testing.T) {
	// leave has a caller leave after a time.
	leave := func(t *testing.T, db *sql.DB, after time.Duration) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), after)
		defer cancel()
		want(t, "error of an impatient caller", db.PingContext(ctx), context.DeadlineExceeded)
	}
	bubble(t, "R-26/an Open that was left serves the next caller", func(t *testing.T) {
		f, g := newFake(t), newGate()
		f.onOpen = onOpen("1", func(context.Context) error { g.pass(); return nil })
		db := open(t, f, newSource("1"), "")
		db.SetMaxOpenConns(2)
		for range 100 {
			leave(t, db, time.Millisecond)
		}
		want(t, "Opens in progress", f.dialing.Load(), 1)
		close(g.open)
		synctest.Wait()
		want(t, "value", ask(t, db), "1")
		want(t, "Opens", f.opened.Load(), 1)
	})
	for takes, kept := range map[time.Duration]int{5 * time.Second: 1, time.Minute: 0} {
		bubble(t, fmt.Sprintf("one of %v that serves nobody is closed", takes), func(t *testing.T) {
			f := newFake(t)
			f.onOpen = onOpen("1", lasts(takes))
			leave(t, open(t, f, newSource("1"), ""), time.Second)
			time.Sleep(takes)
			want(t, "connections", len(f.live()), kept)
			time.Sleep(time.Minute)
			want(t, "connections", len(f.live()), 0)
		})
	}
	bubble(t, "its failure is not that of who came later", func(t *testing.T) {
		f, dials := newFake(t), 0
		f.onOpen = func(context.Context, string) error {
			if dials++; dials > 1 {
				return nil // the server is back
			}
			time.Sleep(5 * time.Second)
			return errDead
		}
		db := open(t, f, newSource("1"), "")
		leave(t, db, time.Second)
		must(t, "the next caller", db.Ping())
		want(t, "most dials at a time", f.maxDialing.Load(), 1)
	})
	bubble(t, "the Open after one that failed is a dial like any other", func(t *testing.T) {
		log := collect(t)
		f, src, hang := newFake(t), newSource("1"), make(chan bool)
		var dials atomic.Int64
		f.onOpen = onOpen("1", func(context.Context) error {
			if dials.Add(1) > 1 {
				<-hang
				return nil
			}
			time.Sleep(5 * time.Second)
			return errDead
		})
		db := open(t, f, src, "")
		leave(t, db, time.Second)
		next := make(chan error, 1)
		go func() { next <- db.Ping() }()
		time.Sleep(5 * time.Second) // the second Open hangs now
		for range 3 {               // callers who leave begin no more
			leave(t, db, moment)
		}
		want(t, "Opens in progress", f.dialing.Load(), 2)
		src.set("2")
		must(t, "next", <-next)
		drained := func() int { synctest.Wait(); return log.count("generation drained", "generation=1") }
		want(t, "drained while an Open is in progress", drained(), 0)
		close(hang)
		want(t, "drained", drained(), 1)
	})
	bubble(t, "one that hangs keeps nobody from an Open of his own", func(t *testing.T) {
		f, hang := newFake(t), make(chan bool)
		var dials atomic.Int64
		f.onOpen = func(context.Context, string) error {
			if dials.Add(1) == 1 {
				<-hang
			}
			return nil
		}
		db := open(t, f, newSource("1"), "")
		defer close(hang)
		start := time.Now()
		for range 3 {
			leave(t, db, 2*time.Second)
		}
		want(t, "dials", dials.Load(), 1)
		must(t, "a patient caller", db.Ping())
		want(t, "when that was served", time.Since(start), 10*time.Second)
		must(t, "the next", db.Ping())
		want(t, "dials", dials.Load(), 2)
	})
	bubble(t, "who waits for long has one Open, not one more every ten seconds", func(t *testing.T) {
		f, hang := newFake(t), make(chan bool)
		f.onOpen = func(context.Context, string) error { <-hang; return nil }
		db := open(t, f, newSource("1"), "")
		var callers sync.WaitGroup
		for range 2 {
			callers.Go(func() { must(t, "ping", db.Ping()) })
		}
		time.Sleep(10 * time.Minute)
		want(t, "most Opens at a time", f.maxDialing.Load(), 2)
		close(hang)
		callers.Wait()
	})
	eachDriver(t, "what comes late is gone when DB.Close returns", func(t *testing.T, f *fake, d driver.Driver) {
		f.onOpen = onOpen("1", lasts(2*patience))
		f.onClose = func(*fakeConn) { time.Sleep(patience / 10) }
		db := open(t, d, newSource("1"), "")
		start := time.Now()
		leave(t, db, moment)
		time.Sleep(2*patience + patience/20 - time.Since(start))
		want(t, "open", len(f.live()), 1)
		db.Close()
		want(t, "open after DB.Close", len(f.live()), 0)
	})
}

// TestLeftConnect is the same of a driver with contexts: the context of a
// Connect ends when its caller leaves, and when its generation is superseded,
// and what it returns is its own caller's.
func TestLeftConnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		ended := make(chan error, 1)
		f.onOpen = onOpen("1", func(ctx context.Context) error {
			<-ctx.Done()
			ended <- ctx.Err()
			return ctx.Err()
		})
		db := open(t, ctxFake{f}, src, "")
		ctx, cancel := context.WithCancel(t.Context())
		left := make(chan error)
		go func() { left <- db.PingContext(ctx) }()
		synctest.Wait()
		cancel()
		want(t, "error of a caller who leaves", <-left, context.Canceled)
		want(t, "how his Connect ended", <-ended, context.Canceled)
		value := make(chan string)
		go func() { value <- ask(t, db) }()
		synctest.Wait()
		src.set("2")
		want(t, "how the old Connect ended", <-ended, context.Canceled)
		want(t, "value", <-value, "2")

		hang := make(chan bool)
		var dials atomic.Int64
		f.onOpen = onOpen("3", func(context.Context) error {
			if dials.Add(1) == 1 {
				<-hang
			}
			return nil
		})
		src.set("3")
		first := make(chan error, 1)
		go func() { first <- db.Ping() }()
		synctest.Wait()
		must(t, "a caller whose Connect returns at once", db.Ping())
		want(t, "callers served before their own Connect has returned", len(first), 0)
		close(hang)
		must(t, "the first", <-first)
	})
}

// TestRecovery has 40 connections in use by 200 callers at a change, with dials
// of 20 ms: they dial in parallel, so that no operation takes more than a few
// dials' time.
func TestRecovery(t *testing.T) {
	bubble(t, "R-22/the pool recovers in parallel", func(t *testing.T) {
		const dial = 20 * time.Millisecond
		f, src := newFake(t), newSource("1")
		f.onOpen = func(context.Context, string) error { time.Sleep(dial); return nil }
		f.onCall = func(_ context.Context, _ *fakeConn, call string) error {
			if call == "Exec insert" {
				time.Sleep(time.Millisecond / 4) // short, as database/sql serves waiters in random order
			}
			return nil
		}
		db := open(t, f, src, "")
		db.SetMaxOpenConns(40)
		db.SetMaxIdleConns(40)
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var worst atomic.Int64
		for range 200 {
			wg.Go(func() {
				for ctx.Err() == nil {
					began := time.Now()
					must(t, "exec", insert(db))
					raise(&worst, int64(time.Since(began)))
				}
			})
		}
		time.Sleep(5 * dial)
		worst.Store(0)
		src.set("2")
		time.Sleep(5 * dial)
		stop()
		wg.Wait()
		if worst := time.Duration(worst.Load()); worst > 3*dial {
			t.Errorf("the slowest operation took %v, want at most %v", worst, 3*dial)
		}
	})
}

// TestDrained is what has to be gone before a generation has drained.
func TestDrained(t *testing.T) {
	// drained returns how often the first generation has.
	drained := func(log *logs) int {
		synctest.Wait()
		return log.count("hotload: generation drained", "generation=1")
	}
	bubble(t, "R-42/drained means that nothing is left", func(t *testing.T) {
		log := collect(t)
		f, src := newFake(t), newSource("1")
		db := open(t, f, src, "")
		tx := begin(t, db)
		dial, closing := newGate(), newGate()
		f.onOpen = onOpen("1", func(context.Context) error { dial.pass(); return nil })
		f.onClose = onClose("1", closing.pass)
		go insert(db)
		synctest.Wait()
		src.set("2")
		tx.Rollback()
		synctest.Wait()
		want(t, "connections that are closing", len(closing.arrived), 1)
		want(t, "drained before that Close has returned", drained(log), 0)
		close(closing.open)
		want(t, "drained before the dial has returned", drained(log), 0)
		close(dial.open)
		want(t, "drained", drained(log), 1)
		want(t, "connections left", f.liveOn("1"), 0)
		src.set("3")
		want(t, "times that generation 1 drained", drained(log), 1)
		want(t, "generation 2 drained", log.count("hotload: generation drained", "generation=2"), 1)
	})
	bubble(t, "a dial that chose its generation before opens nothing with it", func(t *testing.T) {
		log := collect(t)
		f, src := newFake(t), newSource("1")
		connector, first := connect(t, ctxFake{f}, src, "")
		defer first.Close()
		ctx := &blockingContext{Context: t.Context(), asked: make(chan struct{}), answer: make(chan struct{})}
		result := make(chan driver.Conn)
		go func() {
			c, err := connector.Connect(ctx)
			must(t, "Connect", err)
			result <- c
		}()
		<-ctx.asked
		src.set("2")
		want(t, "drained", drained(log), 1)
		opened := f.opened.Load()
		close(ctx.answer) // the fake polices that the connector of 1 is not used
		defer (<-result).Close()
		want(t, "drained", drained(log), 1)
		want(t, "opened since", f.opened.Load()-opened, 1)
	})
}

// A generation that has drained before the time for a kill drains once.
func TestDrainedBeforeKill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := collect(t)
		src := newSource("1")
		db := open(t, newFake(t), src, "forceKill=30s")
		ask(t, db)
		src.set("2")
		time.Sleep(time.Minute)
		synctest.Wait()
		want(t, "drained", log.count("generation drained", "generation=1"), 1)
	})
}

// blockingContext lets whoever asks for its Done channel wait.
type blockingContext struct {
	context.Context
	asked, answer chan struct{}
	once          sync.Once
}

func (c *blockingContext) Done() <-chan struct{} {
	c.once.Do(func() { close(c.asked); <-c.answer })
	return c.Context.Done()
}
