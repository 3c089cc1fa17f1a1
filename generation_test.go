package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"
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
		f := newFake(t)
		f.onOpen = firstOpen("1", func() error { time.Sleep(5 * time.Second); return errDead }) // the server is back then
		db := open(t, f, newSource("1"), "")
		leave(t, db, time.Second)
		must(t, "the next caller", db.Ping())
		want(t, "most dials at a time", f.maxDialing.Load(), 1)
	})
	bubble(t, "the Open after one that failed is a dial like any other", func(t *testing.T) {
		log := collect(t)
		f, src, hang := newFake(t), newSource("1"), make(chan bool)
		failing := firstOpen("1", func() error { time.Sleep(5 * time.Second); return errDead })
		f.onOpen = func(ctx context.Context, value string) error {
			err := failing(ctx, value)
			if err == nil && value == "1" {
				<-hang
			}
			return err
		}
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
		f.onOpen = firstOpen("1", func() error { <-hang; return nil })
		db := open(t, f, newSource("1"), "")
		defer close(hang)
		start := time.Now()
		for range 3 {
			leave(t, db, 2*time.Second)
		}
		want(t, "Opens in progress", f.dialing.Load(), 1)
		must(t, "a patient caller", db.Ping())
		want(t, "when that was served", time.Since(start), 10*time.Second)
		must(t, "the next", db.Ping())
		want(t, "connections opened", f.opened.Load(), 1)
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

// An Open that its caller leaves after DB.Close is nobody's: what it opens is
// closed at once.
func TestLeftAfterClose(t *testing.T) {
	eachDriver(t, "", func(t *testing.T, f *fake, d driver.Driver) {
		f.onOpen = onOpen("1", lasts(6*time.Second))
		db := open(t, d, newSource("1"), "")
		start := time.Now()
		left := make(chan error)
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
			defer cancel()
			left <- db.PingContext(ctx)
		}()
		time.Sleep(time.Second)
		db.Close()
		want(t, "error of the caller", <-left, context.DeadlineExceeded)
		time.Sleep(6*time.Second - time.Since(start))
		synctest.Wait()
		want(t, "opened", f.opened.Load(), 1)
		want(t, "open", len(f.live()), 0)
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
		f.onOpen = firstOpen("3", func() error { <-hang; return nil })
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

// A voidFake is a driver that returns neither what it was asked for nor an
// error, for the value "1". A voidCtxFake is one with DriverContext and contexts.
type (
	voidFake struct {
		*fake
		call string // that does so
	}
	voidCtxFake   struct{ voidFake }
	voidConnector struct {
		fakeConnector
		d voidFake
	}
	voidConn struct {
		*fakeConn
		d voidFake
	}
	voidStmt struct {
		*fakeStmt
		d voidFake
	}
	voidPlainConn struct{ c voidConn }
	voidPlainStmt struct{ s voidStmt }
)

func (d voidFake) void(call, value string) bool { return call == d.call && value == "1" }

func (d voidFake) Open(value string) (driver.Conn, error) {
	if d.void("Open", value) {
		return nil, nil
	}
	c, err := d.fake.Open(value)
	if err != nil {
		return nil, err
	}
	return voidPlainConn{voidConn{c.(*fakeConn), d}}, nil
}

func (d voidCtxFake) OpenConnector(value string) (driver.Connector, error) {
	if d.void("OpenConnector", value) {
		return nil, nil
	}
	return &voidConnector{fakeConnector{f: d.fake, value: value}, d.voidFake}, nil
}

func (c *voidConnector) Connect(ctx context.Context) (driver.Conn, error) {
	if c.d.void("Connect", c.value) {
		return nil, nil
	}
	ci, err := c.fakeConnector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return voidConn{ci.(*fakeConn), c.d}, nil
}

func (c voidConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	if c.d.void("Prepare", c.value) {
		return nil, nil
	}
	st, err := c.fakeConn.PrepareContext(ctx, query)
	if err != nil {
		return nil, err
	}
	return voidStmt{st.(*fakeStmt), c.d}, nil
}

func (c voidConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	if c.d.void("Query", c.value) {
		return nil, nil
	}
	return c.fakeConn.QueryContext(ctx, query, args)
}

func (c voidConn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	if c.d.void("Begin", c.value) {
		return nil, nil
	}
	return c.fakeConn.BeginTx(ctx, opts)
}

func (s voidStmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	if s.d.void("Stmt.Query", s.c.value) {
		return nil, nil
	}
	return s.fakeStmt.QueryContext(ctx, args)
}

func (p voidPlainConn) Close() error { return p.c.Close() }

func (p voidPlainConn) Prepare(query string) (driver.Stmt, error) {
	st, err := p.c.PrepareContext(context.Background(), query)
	if st == nil || err != nil {
		return nil, err
	}
	return voidPlainStmt{st.(voidStmt)}, nil
}

func (p voidPlainConn) Begin() (driver.Tx, error) {
	return p.c.BeginTx(context.Background(), driver.TxOptions{})
}

func (p voidPlainStmt) Close() error  { return p.s.Close() }
func (p voidPlainStmt) NumInput() int { return p.s.NumInput() }

func (p voidPlainStmt) Exec([]driver.Value) (driver.Result, error) {
	return p.s.ExecContext(context.Background(), nil)
}

func (p voidPlainStmt) Query([]driver.Value) (driver.Rows, error) {
	return p.s.QueryContext(context.Background(), nil)
}

// voidOpen is open for a pool that a panic may have left locked.
func voidOpen(t *testing.T, d driver.Driver, src *source, options string) *sql.DB {
	t.Helper()
	db, err := sql.Open("hotload", register(d, src)+"?"+options)
	must(t, "sql.Open", err)
	return db
}

// voidly makes a call that ought to fail because the driver returns nothing.
func voidly(t *testing.T, what string, call func() error) {
	t.Helper()
	defer func() {
		if v := recover(); v != nil {
			t.Fatalf("%s: panics (%v), want an error", what, v)
		}
	}()
	if err := call(); err == nil {
		t.Errorf("%s: no error although the driver returned nothing", what)
	} else if !strings.HasPrefix(err.Error(), "hotload: ") {
		t.Errorf("%s: have error %q, want one of hotload's", what, err)
	}
}

// A driver that returns neither what it was asked for nor an error causes an
// error, and does not end the process, at the call or at a change. (Rows and a
// transaction that are nil are between the driver and its caller, who panics as
// without hotload.)
func TestDriverReturnsNothing(t *testing.T) {
	survives(t, func(t *testing.T) {
		prepareAnd := func(db *sql.DB, do func(*sql.Stmt) error) error {
			stmt, err := db.Prepare("select")
			if err != nil {
				return err
			}
			defer stmt.Close()
			return do(stmt)
		}
		exec := func(db *sql.DB) error { _, err := db.Exec("insert"); return err }
		ping := func(db *sql.DB) error { return db.Ping() }
		prepare := func(db *sql.DB) error { return prepareAnd(db, func(*sql.Stmt) error { return nil }) }
		query := func(db *sql.DB) error {
			rows, err := db.Query("select")
			if err == nil {
				rows.Close()
			}
			return err
		}
		for _, row := range []struct {
			call    string
			context bool
			do      func(db *sql.DB) error
		}{
			{"Open", false, ping},
			{"Connect", true, ping},
			{"OpenConnector", true, ping},
			{"Prepare", false, prepare},
			{"Prepare", true, prepare},
			{"Prepare", false, exec}, // without Exec a statement is made for it
			{"Prepare", false, query},
		} {
			for _, options := range []string{"", "forceKill=true"} {
				t.Run(fmt.Sprintf("%s,contexts=%t,%s", row.call, row.context, options), func(t *testing.T) {
					f, src := newFake(t), newSource("1")
					var d driver.Driver = voidFake{f, row.call}
					if row.context {
						d = voidCtxFake{voidFake{f, row.call}}
					}
					db := voidOpen(t, d, src, options)
					voidly(t, row.call, func() error { return row.do(db) })
					src.set("2")
					want(t, "value after the change", ask(t, db), "2")
					must(t, "DB.Close", db.Close())
					await(t, "all connections are closed", func() bool { return len(f.live()) == 0 })
				})
			}
		}
	})
}

// A value with which the driver returns no connection, no error, or no
// connector is refused, and is in force as soon as it works.
func TestDriverReturnsNothingForLaterValue(t *testing.T) {
	survives(t, func(t *testing.T) {
		for _, row := range []struct{ call, options string }{
			{"Open", "probe=true"},
			{"Connect", "probe=true"},
			{"OpenConnector", "probe=true"},
			{"OpenConnector", ""},
		} {
			bubble(t, row.call+","+row.options, func(t *testing.T) {
				l := collect(t)
				f, src := newFake(t), newSource("0")
				var d driver.Driver = voidFake{f, row.call}
				if row.call != "Open" {
					d = voidCtxFake{voidFake{f, row.call}}
				}
				db := open(t, d, src, row.options)
				want(t, "value", ask(t, db), "0")
				src.set("1")
				time.Sleep(time.Minute)
				want(t, "value while the next is void", ask(t, db), "0")
				want(t, "refusals in\n"+l.String(), l.count("value refused"), 1)
				src.set("2")
				time.Sleep(time.Minute)
				want(t, "value", ask(t, db), "2")
				want(t, "values accepted", l.count("value accepted"), 2)
				must(t, "DB.Close", db.Close())
			})
		}
	})
}

// A statement that is prepared again on the next value, where the driver
// returns none, is an error of the operation.
func TestDriverReturnsNoStatementAgain(t *testing.T) {
	survives(t, func(t *testing.T) {
		for _, context := range []bool{false, true} {
			for _, options := range []string{"", "forceKill=true"} {
				t.Run(fmt.Sprintf("contexts=%t,%s", context, options), func(t *testing.T) {
					f, src := newFake(t), newSource("0")
					var d driver.Driver = voidFake{f, "Prepare"}
					if context {
						d = voidCtxFake{voidFake{f, "Prepare"}}
					}
					db := voidOpen(t, d, src, options)
					db.SetMaxOpenConns(1)
					stmt, err := db.Prepare("insert")
					must(t, "prepare", err)
					_, err = stmt.Exec()
					must(t, "exec", err)
					src.set("1")
					voidly(t, "exec", func() error { _, err := stmt.Exec(); return err })
					voidly(t, "exec again", func() error { _, err := stmt.Exec(); return err })
					src.set("2")
					_, err = stmt.Exec()
					must(t, "exec", err)
					must(t, "Stmt.Close", stmt.Close())
					must(t, "DB.Close", db.Close())
				})
			}
		}
	})
}

// An Open that is done serves the next caller before one that hangs.
func TestAdoptsTheOpenThatIsDone(t *testing.T) {
	for _, hung := range []int64{1, 2, 3} {
		bubble(t, fmt.Sprintf("hangs=%d", hung), func(t *testing.T) {
			f := newFake(t)
			never := make(chan bool)
			var opens atomic.Int64
			f.onOpen = func(context.Context, string) error {
				if opens.Add(1) == hung {
					<-never
				} else {
					time.Sleep(300 * time.Millisecond)
				}
				return nil
			}
			db := open(t, f, newSource("1"), "")
			t.Cleanup(func() { close(never) })
			ping := func(patience time.Duration) error {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				return db.PingContext(ctx)
			}
			for range 3 { // leave three Opens, of which one hangs
				go ping(100 * time.Millisecond)
				time.Sleep(time.Millisecond)
			}
			time.Sleep(time.Second)
			want(t, "Opens in progress", f.dialing.Load(), 1)
			want(t, "server connections", len(f.live()), 2)
			for range 5 {
				must(t, "a caller while a connection is ready", ping(100*time.Millisecond))
			}
			want(t, "Opens", opens.Load(), 3)
		})
	}
}

// No Open is begun for a caller whose context has ended.
func TestNoOpenForNobody(t *testing.T) {
	for _, withContext := range []bool{false, true} {
		for _, before := range []bool{false, true} {
			bubble(t, fmt.Sprintf("DriverContext=%t,ended before the call=%t", withContext, before), func(t *testing.T) {
				f, src := newFake(t), newSource("1")
				f.onClose = func(c *fakeConn) {
					if c.value == "1" {
						time.Sleep(900 * time.Millisecond)
					}
				}
				var d driver.Driver = f
				if withContext {
					d = ctxFake{f}
				}
				db := open(t, d, src, "")
				want(t, "value", ask(t, db), "1")
				src.set("2")
				ctx, cancel := context.WithCancel(t.Context())
				if before {
					cancel()
				} else {
					time.AfterFunc(100*time.Millisecond, cancel) // while the old connection closes
				}
				_, err := db.ExecContext(ctx, "insert")
				want(t, "error", err, context.Canceled)
				time.Sleep(5 * time.Second)
				want(t, "connections with the new value", f.liveOn("2"), 0)
				want(t, "connections opened", f.opened.Load(), 1)
			})
		}
	}
}

// What "value accepted" says of closed connections includes those that were
// opened for a caller who had left.
func TestClosedCountsSpares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := collect(t)
		f, src := newFake(t), newSource("1")
		f.onOpen = func(context.Context, string) error {
			time.Sleep(300 * time.Millisecond)
			return nil
		}
		db := open(t, f, src, "")
		for range 3 {
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
				defer cancel()
				db.PingContext(ctx)
			}()
		}
		time.Sleep(time.Second)
		want(t, "connections", f.liveOn("1"), 3)
		src.set("2")
		synctest.Wait()
		want(t, "connections after the change", f.liveOn("1"), 0)
		want(t, "value accepted, with three closed, in\n"+l.String(), l.count("value accepted", "generation=2", "closed=3", "in_use=0"), 1)
	})
}

// Callers who leave the same Open cost nothing when they have left.
func TestImpatientCallersAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		never := make(chan bool)
		f.onOpen = func(context.Context, string) error { <-never; return nil }
		db := open(t, f, newSource("1"), "")
		t.Cleanup(func() { close(never); time.Sleep(time.Minute) })
		heap := func() int64 {
			runtime.GC()
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return int64(m.HeapAlloc)
		}
		ping := func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Microsecond)
			defer cancel()
			db.PingContext(ctx)
		}
		for range 100 {
			ping()
		}
		before := heap()
		const callers = 20_000
		for range callers {
			ping()
		}
		if grown := heap() - before; grown > 1<<20 {
			t.Errorf("%d kB are held for %d callers that have left, all of one Open", grown>>10, callers)
		}
		want(t, "Opens in progress", f.dialing.Load(), 1)
	})
}

// A countingContext counts those who wait for its end, which never comes.
type countingContext struct {
	context.Context
	done    chan struct{}
	waiting atomic.Int32
}

func (c *countingContext) Done() <-chan struct{} { return c.done }

// AfterFunc is what package context calls when it derives a context from one that
// it did not make.
func (c *countingContext) AfterFunc(func()) (stop func() bool) {
	c.waiting.Add(1)
	return sync.OnceValue(func() bool { c.waiting.Add(-1); return true })
}

// Open takes no context. So when it has returned, its caller's context is let go
// of: it may be the whole program's.
func TestOpenLetsGoOfContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, g := newFake(t), newGate()
		f.onOpen = func(context.Context, string) error { g.pass(); return nil }
		db := open(t, f, newSource("1"), "")
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		want(t, "ping", db.PingContext(short), context.DeadlineExceeded)
		var callers [2]countingContext // one adopts the Open that was left
		conns := make(chan *sql.Conn)
		for i := range callers {
			callers[i].Context, callers[i].done = t.Context(), make(chan struct{})
			go func() {
				conn, err := db.Conn(&callers[i])
				if err != nil {
					t.Error(err)
				}
				conns <- conn
			}()
		}
		synctest.Wait()
		want(t, "Opens", len(g.arrived), 2)
		for i := range callers {
			want(t, "waiting for the end of a caller's context during the Open", callers[i].waiting.Load(), 1)
		}
		close(g.open)
		for range callers {
			defer (<-conns).Close()
		}
		for i := range callers {
			want(t, "waiting for the end of a caller's context after the Open", callers[i].waiting.Load(), 0)
		}
	})
}

// Connect's context lasts as long as its connection, and no longer.
func TestConnectLetsGoOfContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		db := open(t, ctxFake{f}, src, "")
		caller := countingContext{Context: t.Context(), done: make(chan struct{})}
		conn, err := db.Conn(&caller)
		must(t, "conn", err)
		want(t, "waiting for the end of the context of a connection", caller.waiting.Load(), 1)
		src.set("2")
		synctest.Wait()
		want(t, "waiting for the end of the context of a closed connection", caller.waiting.Load(), 0)
		f.onOpen = func(context.Context, string) error { return errDead }
		want(t, "error of a dial", conn.PingContext(&caller), error(errDead))
		want(t, "waiting for the end of the context of a failed dial", caller.waiting.Load(), 0)
		must(t, "Conn.Close", conn.Close())
	})
}

// A heavyFake keeps book of which of its connectors are still in memory.
type (
	heavyFake struct {
		ctxFake
		mu   *sync.Mutex
		made *[]weak.Pointer[heavyConnector]
	}
	heavyConnector struct {
		fakeConnector
		_ [1 << 10]byte
	}
)

func (d heavyFake) OpenConnector(value string) (driver.Connector, error) {
	c := &heavyConnector{fakeConnector: fakeConnector{f: d.fake, value: value}}
	d.mu.Lock()
	defer d.mu.Unlock()
	*d.made = append(*d.made, weak.Make(c))
	return c, nil
}

func (d heavyFake) alive() (n int) {
	runtime.GC()
	runtime.GC()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range *d.made {
		if p.Value() != nil {
			n++
		}
	}
	return n
}

// A generation that has drained is let go of: also where it waits for its
// deadline, and where its value is in force again when that comes.
func TestDrainedIsForgotten(t *testing.T) {
	for _, row := range []struct {
		name, options string
		values        int // that come in turns
		pause         time.Duration
	}{
		{"graceful", "", 1000, 0},
		{"forced", "forceKill=true", 1000, 0},
		{"probed", "probe=true", 1000, time.Second},
		{"a long grace", "forceKill=24h", 1000, 0},
		{"values come back before their deadline", "forceKill=10s", 2, 7 * time.Second},
		{"values come back after their deadline", "forceKill=10s", 2, 11 * time.Second},
		{"values come back at their deadline", "forceKill=10s", 2, 5 * time.Second},
	} {
		bubble(t, row.name, func(t *testing.T) {
			d := heavyFake{ctxFake{newFake(t)}, new(sync.Mutex), new([]weak.Pointer[heavyConnector])}
			src := newSource("0")
			db := open(t, d, src, row.options)
			stmt, err := db.Prepare("select")
			must(t, "prepare", err)
			const changes = 100
			for i := range changes {
				src.set(strconv.Itoa((i + 1) % row.values))
				time.Sleep(row.pause)
				tx, err := db.Begin()
				must(t, "begin", err)
				_, err = tx.Stmt(stmt).Exec()
				must(t, "exec", err)
				must(t, "commit", tx.Commit())
			}
			time.Sleep(time.Minute)
			if n := d.alive(); n > 1 {
				t.Errorf("%d generations are in memory a minute after %d changes, all but one drained", n, changes)
			}
			must(t, "Stmt.Close", stmt.Close())
		})
	}
}

// A generation that was in use at its deadline, and was not killed because its
// value was in force again, is let go of when it has drained, too.
func TestDrainedWithItsValueInForceIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := heavyFake{ctxFake{newFake(t)}, new(sync.Mutex), new([]weak.Pointer[heavyConnector])}
		src := newSource("1")
		db := open(t, d, src, "forceKill=10s")
		tx, err := db.Begin()
		must(t, "begin", err)
		defer tx.Rollback()
		src.set("2")
		time.Sleep(7 * time.Second)
		src.set("1")
		time.Sleep(7 * time.Second)
		_, err = tx.Exec("insert")
		must(t, "exec after the deadline, with the value in force", err)
		must(t, "commit", tx.Commit())
		want(t, "value", ask(t, db), "1")
		time.Sleep(time.Minute)
		want(t, "generations in memory", d.alive(), 1)
	})
}

// A spare is an idle connection like others: DB.Close waits for its Close.
func TestSpareClosesWithDB(t *testing.T) {
	bubble(t, "", func(t *testing.T) {
		f := newFake(t)
		f.onOpen = firstOpen("1", func() error { time.Sleep(time.Second); return nil })
		f.onClose = onClose("1", func() { time.Sleep(100 * time.Millisecond) })
		db := open(t, f, newSource("1"), "")
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := db.PingContext(ctx); err == nil {
			t.Fatal("no error")
		}
		time.Sleep(2 * time.Second)
		want(t, "spares", f.liveOn("1"), 1)
		must(t, "DB.Close", db.Close())
		want(t, "open after DB.Close", f.liveOn("1"), 0)
	})
}
