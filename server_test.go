package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lib/pq"
)

// TestIdle proves that connections not in use close at the change, without
// traffic, and that one that is slow to close holds up nothing.
func TestIdle(t *testing.T) {
	for _, holds := range []string{"R-16/what is not in use closes at once", "R-17/a Close that blocks holds up nobody"} {
		bubble(t, holds, func(t *testing.T) {
			log := collect(t)
			f, src, g := newFake(t), newSource("1"), newGate()
			f.onClose = onClose("1", g.pass)
			db := open(t, f, src, "")
			unused := []*sql.Conn{take(t, db), take(t, db)} // nor returned
			fill(t, db, 8)
			src.set("2")
			synctest.Wait()
			want(t, "connections that are closing", len(g.arrived), 10)
			want(t, "accepted", log.count("hotload: value accepted", "generation=2", "closed=10", "in_use=0"), 1)
			drained := func(generation string) int {
				synctest.Wait()
				return log.count("hotload: generation drained", generation)
			}
			if strings.HasPrefix(holds, "R-17") {
				src.set("3")
				want(t, "value of a connection not used yet", ask(t, unused[0]), "3")
				want(t, "generation 1 drained", drained("generation=1"), 0)
				want(t, "generation 2 drained", drained("generation=2"), 1)
			}
			close(g.open)
			want(t, "generation 1 drained", drained("generation=1"), 1)
		})
	}
}

// TestInUse proves that what is in use lives through ten changes on its own
// connection, and that the connection closes when it is returned.
func TestInUse(t *testing.T) {
	for _, tt := range []struct {
		name string
		use  func(t *testing.T, db *sql.DB, change func()) // calls change in the middle of the use
	}{
		{"statement", func(t *testing.T, db *sql.DB, _ func()) { must(t, "exec", insert(db)) }}, // the fake calls change
		{"rows", func(t *testing.T, db *sql.DB, change func()) {
			rows := query(t, db, "ask")
			defer rows.Close()
			n, value := 0, ""
			for ; rows.Next(); n++ {
				rows.Scan(&value)
				want(t, "value", value, "0")
				if n == 0 {
					change()
				}
			}
			must(t, "rows", rows.Err())
			want(t, "rows", n, 3)
		}},
		{"transaction", func(t *testing.T, db *sql.DB, change func()) {
			tx := begin(t, db)
			change()
			want(t, "value", ask(t, tx), "0")
			must(t, "commit", tx.Commit())
		}},
		{"conn", func(t *testing.T, db *sql.DB, change func()) {
			conn := take(t, db)
			want(t, "value", ask(t, conn), "0")
			change()
			want(t, "value", ask(t, conn), "0")
			stmt := prepare(t, conn, "ask")
			change()
			want(t, "value", ask(t, prepared{stmt}), "0")
			must(t, "Stmt.Close", stmt.Close())
			must(t, "Conn.Close", conn.Close())
		}},
		{"conn used through Raw", func(t *testing.T, db *sql.DB, change func()) {
			conn := take(t, db)
			want(t, "value", raw(t, conn).(*fakeConn).value, "0")
			change()
			want(t, "value", ask(t, conn), "0")
			must(t, "Conn.Close", conn.Close())
		}},
	} {
		t.Run("R-15/what is in use finishes on its connection", func(t *testing.T) {
			t.Log(tt.name)
			log := collect(t)
			f, src := newFake(t), newSource("0")
			f.rowCount = 3
			changes := 0
			change := func() {
				for range 10 {
					changes++
					src.set(strconv.Itoa(changes))
				}
				want(t, "connections on the first value", f.liveOn("0"), 1)
			}
			f.onCall = onCall("0", "Exec insert", func(context.Context) error { change(); return nil })
			db := open(t, f, src, "")
			tt.use(t, db, change)
			want(t, "accepted", log.count("hotload: value accepted", "generation=2", "closed=0", "in_use=1"), 1)
			await(t, "generation 1 drained", func() bool { return log.count("hotload: generation drained", "generation=1") == 1 })
			want(t, "connections on the first value", f.liveOn("0"), 0)
			want(t, "value", ask(t, db), strconv.Itoa(changes))
		})
	}
}

// TestHeldInPool: a change during a call on a connection that is not in use
// closes it when the call has returned, and an error of that call is nobody's.
func TestHeldInPool(t *testing.T) {
	for call, run := range map[string]func(t *testing.T, conn driver.Conn) error{
		"ResetSession": func(t *testing.T, conn driver.Conn) error {
			return conn.(driver.SessionResetter).ResetSession(t.Context())
		},
		"Close insert": func(t *testing.T, conn driver.Conn) error {
			stmt, err := conn.Prepare("insert")
			must(t, "prepare", err)
			want(t, "valid", conn.(driver.Validator).IsValid(), true)
			stmt.Close()
			return nil
		},
	} {
		bubble(t, call, func(t *testing.T) {
			f, src, g := newFake(t), newSource("1"), newGate()
			f.onCall = onCall("1", call, func(context.Context) error { g.pass(); return driver.ErrBadConn })
			_, conn := connect(t, f, src, "") // database/sql would try again
			done := make(chan error)
			go func() { done <- run(t, conn) }()
			<-g.arrived
			src.set("2")
			synctest.Wait()
			want(t, "connections on the old value", f.liveOn("1"), 1)
			close(g.open)
			must(t, call, <-done)
			synctest.Wait()
			want(t, "connections on the old value", f.liveOn("1"), 0)
		})
	}
}

// What is closing already when a value is accepted is not in use.
func TestClosingIsNotInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := collect(t)
		f, slow := newFake(t), make(chan struct{})
		defer close(slow)
		f.onClose = func(*fakeConn) { <-slow }
		src := newSource("1")
		db := open(t, f, src, "")
		db.SetMaxIdleConns(-1)
		must(t, "ping", db.Ping()) // its connection goes on closing
		src.set("2")
		synctest.Wait()
		want(t, "log of in_use=0:\n"+log.String(), log.count("value accepted", "generation=2", "in_use=0"), 1)
	})
}

// TestMaxOpenConns proves that the server never sees more connections than
// MaxOpenConns while old ones close slowly.
func TestMaxOpenConns(t *testing.T) {
	for _, idle := range []int{0, 2, 8} {
		bubble(t, "R-18/keeps to MaxOpenConns", func(t *testing.T) {
			t.Logf("MaxIdleConns %d", idle)
			f, src := newFake(t), newSource("0")
			f.onClose = func(*fakeConn) { time.Sleep(30 * time.Millisecond) }
			f.onCall = func(_ context.Context, _ *fakeConn, call string) error {
				if call == "Exec insert" {
					time.Sleep(time.Millisecond)
				}
				return nil
			}
			db := open(t, f, src, "")
			db.SetMaxOpenConns(8)
			db.SetMaxIdleConns(idle)
			ctx, stop := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			for range 16 {
				wg.Go(func() {
					for ctx.Err() == nil {
						must(t, "exec", insert(db))
					}
				})
			}
			for n := range 50 {
				time.Sleep(20 * time.Millisecond)
				src.set(strconv.Itoa(n))
			}
			stop()
			wg.Wait()
			want(t, "most connections at a time", f.maxLive.Load(), 8)
		})
	}
}

// A connection whose Close hangs is waited for once, by a caller who has half
// of the time left then, and no more when a second has passed.
func TestHungClose(t *testing.T) {
	for _, since := range []time.Duration{0, time.Hour} {
		for _, inUse := range []bool{false, true} {
			bubble(t, fmt.Sprintf("%v after the change,in use=%t", since, inUse), func(t *testing.T) {
				f, src, stuck := newFake(t), newSource("1"), make(chan struct{})
				defer close(stuck)
				f.onClose = onClose("1", func() { <-stuck })
				db := open(t, f, src, "")
				db.SetMaxOpenConns(1)
				tx := begin(t, db)
				if inUse {
					db.SetMaxIdleConns(-1) // it is closing when the pool counts it no more
					src.set("2")
				}
				must(t, "commit", tx.Commit())
				if !inUse {
					src.set("2")
				}
				time.Sleep(since)
				const limit = 900 * time.Millisecond
				began := time.Now()
				for range 20 {
					ctx, cancel := context.WithTimeout(t.Context(), limit)
					must(t, "impatient caller", db.PingContext(ctx))
					cancel()
				}
				most := limit / 2
				if since > 0 {
					most = 0
				}
				want(t, "time that 20 callers took", time.Since(began), most)
			})
		}
	}
}

// TestHurriedCaller: who has no time to wait for a connection that is closing
// leaves that to others, DB.Close among them.
func TestHurriedCaller(t *testing.T) {
	for _, returned := range []bool{false, true} { // its place is taken, or given up
		bubble(t, fmt.Sprint("returned=", returned), func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			f.onClose = onClose("1", func() { time.Sleep(patience / 2) })
			db := open(t, ctxFake{f}, src, "")
			if returned {
				db.SetMaxIdleConns(-1)
			}
			conn := take(t, db)
			src.set("2")
			must(t, "Conn.Close", conn.Close())
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			must(t, "ping", db.PingContext(ctx))
			db.Close()
			want(t, "connections on the old value after DB.Close", f.liveOn("1"), 0)
		})
	}
}

// Nobody waits for the Close of a broken connection of a superseded generation.
func TestBrokenAfterChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		f.onCall = onCall("1", "Rollback", func(context.Context) error { return driver.ErrBadConn })
		f.onClose = onClose("1", func() { time.Sleep(10 * time.Second) })
		tx := begin(t, open(t, f, src, ""))
		src.set("2")
		start := time.Now()
		want(t, "error of Rollback", tx.Rollback(), driver.ErrBadConn)
		want(t, "time that Rollback took", time.Since(start), 0)
		time.Sleep(time.Minute)
	})
}

// What an old server answered to a Close is no error of DB.Close.
func TestOldCloseError(t *testing.T) {
	for _, options := range []string{"", "forceKill=true"} {
		for _, use := range []string{"idle", "in use", "in use, under a layer without IsValid"} {
			bubble(t, options+","+use, func(t *testing.T) {
				v := &variant{conn: func(c *recConn) driver.Conn { return modern(c) }, fails: map[string]error{"Close": errDriver}}
				src := newSource("1")
				pool := open
				if strings.Contains(use, "layer") {
					pool = around
				}
				db := pool(t, newSubject(v).recorder.driver(), src, options)
				tx := begin(t, db)
				if use == "idle" {
					must(t, "commit", tx.Commit())
				}
				src.set("2")
				synctest.Wait()
				tx.Rollback()
				synctest.Wait()
				must(t, "DB.Close", db.Close())
			})
		}
	}
}

// A driver that panics when it closes what a change retires ends nothing else;
// in DB.Close the panic is the caller's.
func TestPanicInClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bug = "a bug in the driver"
		log := collect(t)
		f, src := newFake(t), newSource("1")
		f.onCall = onCall("1", "Close ", func(context.Context) error { panic(bug) })
		f.onClose = onClose("1", func() { panic(bug) })
		f.onShut = func(string) { panic(bug) }
		f.lenient.Store(true) // the statement is not closed
		db := open(t, ctxFake{f}, src, "")
		prepare(t, db, "insert")
		src.set("2")
		want(t, "value", ask(t, db), "2")
		synctest.Wait()
		want(t, "drained", log.count("generation drained", "generation=1"), 1)
		mustSay(t, "DB.Close", db.Close(), "panicked")
	})
}

// A bugFake is a driver that panics for the value "1" in one of its calls, with
// what the test says.
type (
	bugFake struct {
		*fake
		at    string
		value any           // of the panic; nil for an error of the runtime's
		armed *atomic.Bool  // else it does not panic
		bugs  *atomic.Int64 // panics
	}
	bugCtxFake   struct{ bugFake }
	bugConnector struct {
		fakeConnector
		d bugFake
	}
	bugConn struct {
		*fakeConn
		d bugFake
	}
	bugRows struct {
		driver.Rows
		c bugConn
	}
	bugStmt struct {
		*fakeStmt
		c bugConn
	}
)

func (d bugFake) bug(at, value string) {
	if at != d.at || value != "1" || !d.armed.Load() {
		return
	}
	d.bugs.Add(1)
	if d.value == nil {
		var none []string
		_ = none[d.bugs.Load()] // an index out of range
	}
	panic(d.value)
}

func (d bugFake) Open(value string) (driver.Conn, error) {
	d.bug("Open", value)
	c, err := d.fake.Open(value)
	if err != nil {
		return nil, err
	}
	return bugConn{c.(*fakeConn), d}, nil
}

func (d bugCtxFake) OpenConnector(value string) (driver.Connector, error) {
	d.bug("OpenConnector", value)
	return &bugConnector{fakeConnector{f: d.fake, value: value}, d.bugFake}, nil
}

func (c *bugConnector) Connect(ctx context.Context) (driver.Conn, error) {
	c.d.bug("Connect", c.value)
	ci, err := c.fakeConnector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return bugConn{ci.(*fakeConn), c.d}, nil
}

func (c *bugConnector) Close() error {
	c.d.bug("Close connector", c.value)
	return nil
}

func (c bugConn) Close() error {
	err := c.fakeConn.Close()
	c.d.bug("Close connection", c.value)
	return err
}

func (c bugConn) Ping(ctx context.Context) error {
	c.d.bug("Ping", c.value)
	return c.fakeConn.Ping(ctx)
}

func (c bugConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	st, err := c.fakeConn.PrepareContext(ctx, query)
	if err != nil {
		return nil, err
	}
	return bugStmt{st.(*fakeStmt), c}, nil
}

func (s bugStmt) Close() error {
	err := s.fakeStmt.Close()
	s.c.d.bug("Close statement", s.c.value)
	return err
}

func (c bugConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	r, err := c.fakeConn.QueryContext(ctx, query, args)
	if err != nil {
		return nil, err
	}
	return bugRows{r, c}, nil
}

func (r bugRows) Close() error {
	err := r.Rows.Close()
	r.c.d.bug("Close rows", r.c.value)
	return err
}

// A quotingError is an error whose text quotes the connection string.
type quotingError struct{ text string }

func (e quotingError) Error() string { return e.text }

// A driver's panic in a goroutine of hotload's ends nothing. It is an error of
// the operation, if there is one, which says so and has the panic's text only if
// that is an error of the runtime's: another may quote the secret.
func TestDriverPanics(t *testing.T) {
	const secret = "canary"
	survives(t, func(t *testing.T) {
		for _, row := range []struct {
			at      string
			context bool
			first   string // value
			options string
			refused bool // the later value is never in force
		}{
			{at: "Open", first: "1"},
			{at: "Connect", context: true, first: "1"},
			{at: "OpenConnector", context: true, first: "1"},
			{at: "Open", first: "0"},
			{at: "Connect", context: true, first: "0"},
			{at: "OpenConnector", context: true, first: "0", refused: true},
			{at: "Open", first: "0", options: "probe=true", refused: true},
			{at: "Connect", context: true, first: "0", options: "probe=true", refused: true},
			{at: "Ping", first: "0", options: "probe=true", refused: true},
			{at: "Ping", context: true, first: "0", options: "probe=true", refused: true},
			{at: "OpenConnector", context: true, first: "0", options: "probe=true", refused: true},
			{at: "Close connection", first: "1"},
			{at: "Close connection", context: true, first: "1"},
			{at: "Close connection", context: true, first: "1", options: "forceKill=true"},
			{at: "Close statement", context: true, first: "1"},
			{at: "Close statement", context: true, first: "1", options: "forceKill=true"},
			{at: "Close rows", context: true, first: "1", options: "forceKill=true"},
			{at: "Close rows", first: "1", options: "forceKill=true"},
			{at: "Close connector", context: true, first: "1"},
			{at: "Close connector", context: true, first: "1", options: "forceKill=true"},
		} {
			for _, value := range []any{nil, secret, quotingError{secret}, errors.New(secret), 7} {
				bubble(t, fmt.Sprintf("%s,contexts=%t,first=%s,%s,%T", row.at, row.context, row.first, row.options, value), func(t *testing.T) {
					l := collect(t)
					f, src := newFake(t), newSource(row.first)
					d := bugFake{f, row.at, value, new(atomic.Bool), new(atomic.Int64)}
					var drv driver.Driver = d
					if row.context {
						drv = bugCtxFake{d}
					}
					check := func(err error) {
						t.Helper()
						text := ""
						for e := err; e != nil; e = errors.Unwrap(e) {
							text += e.Error() + "\n"
						}
						if !strings.Contains(text, "panicked") || !strings.HasPrefix(text, "hotload: ") {
							t.Errorf("have error %q, want one of hotload's that tells of a panic", text)
						}
						if strings.Contains(text, secret) {
							t.Errorf("the error %q quotes what the driver panicked with", text)
						}
						if value == nil && !strings.Contains(text, "index out of range") {
							t.Errorf("the error %q has not the text of the runtime's error", text)
						}
					}
					db := open(t, drv, src, row.options)
					opening := row.at == "Open" || row.at == "Connect" || row.at == "OpenConnector"
					if d.armed.Store(opening); opening && row.first == "1" {
						check(db.Ping())
					} else {
						want(t, "first value", ask(t, db), row.first)
					}
					d.armed.Store(true)
					if row.first == "0" {
						src.set("1")
						time.Sleep(20 * time.Second)
						if row.refused {
							want(t, "value while the next is refused", ask(t, db), "0")
							want(t, "refusals in\n"+l.String(), l.count("value refused"), 1)
						} else {
							check(db.Ping())
						}
					}
					if !opening && row.first == "1" {
						_, err := db.Prepare("select")
						must(t, "prepare", err)
						if row.options != "" { // in use, else idle
							tx, err := db.Begin()
							must(t, "begin", err)
							defer tx.Rollback()
							rows, err := tx.Query("select")
							must(t, "query", err)
							defer rows.Close()
						}
					}
					src.set("2")
					time.Sleep(time.Second) // for a probe
					want(t, "value after the change", ask(t, db), "2")
					time.Sleep(time.Minute)
					want(t, "connections with the old value", f.liveOn("1"), 0)
					if d.bugs.Load() == 0 {
						t.Error("the driver has not panicked")
					}
					if row.first == "1" && row.at != "OpenConnector" {
						want(t, "drained", l.count("generation drained", "generation=1"), 1)
					}
					must(t, "DB.Close", db.Close())
					if strings.Contains(l.String(), secret) {
						t.Errorf("the log quotes what the driver panicked with:\n%s", l)
					}
				})
			}
		}
	})
}

// A driver's error is asked for what it is in a goroutine of hotload's, where
// its methods can panic: a nil pointer that is an error, for one.
func TestDriverErrorPanics(t *testing.T) {
	survives(t, func(t *testing.T) {
		for _, row := range []struct {
			kind    string
			options string
		}{{"Open", "probe=true"}, {"Connect", "probe=true"}, {"OpenConnector", ""}, {"OpenConnector", "probe=true"}} {
			bubble(t, row.kind+","+row.options, func(t *testing.T) {
				bad := func(kind string) func(value string) error {
					return func(value string) error {
						if value == "1" && kind == row.kind {
							return (*pq.Error)(nil)
						}
						return nil
					}
				}
				d := newParser(t, bad("OpenConnector"))
				d.onOpen = func(_ context.Context, value string) error {
					if err := bad("Open")(value); err != nil {
						return err
					}
					return bad("Connect")(value)
				}
				var drv driver.Driver = d
				if row.kind == "Open" {
					drv = d.fake
				}
				src := newSource("0")
				db := open(t, drv, src, row.options)
				want(t, "value", ask(t, db), "0")
				src.set("1")
				time.Sleep(time.Minute)
				want(t, "value", ask(t, db), "0")
				src.set("2")
				time.Sleep(time.Minute)
				want(t, "value", ask(t, db), "2")
			})
		}
	})
}

// A sql.Conn on which nothing has run, be it fresh or from the pool, is not in
// use: its server connection closes at a change, in any mode, and it goes on
// with the value in force.
func TestUnusedConnsAlike(t *testing.T) {
	for _, options := range []string{"", "forceKill=true", "forceKill=24h", "probe=true"} {
		for _, pooled := range []bool{false, true} {
			bubble(t, fmt.Sprintf("options=%s,from the pool=%t", options, pooled), func(t *testing.T) {
				l := collect(t)
				f, src := newFake(t), newSource("1")
				db := open(t, ctxFake{f}, src, options)
				if pooled {
					want(t, "value", ask(t, db), "1")
				}
				conn, err := db.Conn(t.Context())
				must(t, "conn", err)
				defer conn.Close()
				want(t, "server connections", f.liveOn("1"), 1)
				src.set("2")
				time.Sleep(time.Second) // for a probe
				want(t, "server connections of the old value", f.liveOn("1"), 0)
				want(t, "in use at the change", l.count("value accepted", "generation=2", "in_use=0"), 1)
				want(t, "drained", l.count("generation drained", "generation=1"), 1)
				want(t, "killed", l.count("connections killed"), 0)
				want(t, "value at the first use", ask(t, conn), "2")
			})
		}
	}
}

// A pool whose connections are slow to close does not exceed MaxOpenConns on
// the server: a new one waits for one that is closing, not for one long gone.
func TestClosingCountsAsOpen(t *testing.T) {
	conns := func(t *testing.T, db *sql.DB, n int, use bool) (all []*sql.Conn) {
		t.Helper()
		for range n {
			conn, err := db.Conn(t.Context())
			must(t, "conn", err)
			if all = append(all, conn); use {
				must(t, "ping", conn.PingContext(t.Context()))
			}
		}
		return all
	}
	giveBack := func(conns []*sql.Conn) {
		for _, conn := range conns {
			conn.Close()
		}
	}
	exec := func(t *testing.T, db *sql.DB) {
		t.Helper()
		_, err := db.Exec("insert")
		must(t, "exec", err)
	}
	for _, row := range []struct {
		name string
		max  int
		do   func(t *testing.T, db *sql.DB, src *source, slow func(string, time.Duration), measure func())
	}{
		{"after many have closed", 1, func(t *testing.T, db *sql.DB, src *source, slow func(string, time.Duration), measure func()) {
			db.SetMaxIdleConns(70)
			giveBack(conns(t, db, 70, false))
			src.set("2") // closes them all
			time.Sleep(time.Minute)
			db.SetMaxIdleConns(-1) // database/sql closes their proxies
			db.SetMaxOpenConns(1)
			time.Sleep(time.Hour)
			used := conns(t, db, 1, true)
			slow("2", 500*time.Millisecond)
			measure()
			src.set("3")
			giveBack(used)
			want(t, "value", ask(t, db), "3")
		}},
		{"after one was slow once", 1, func(t *testing.T, db *sql.DB, _ *source, slow func(string, time.Duration), measure func()) {
			db.SetMaxIdleConns(-1)
			slow("1", 2*time.Second)
			exec(t, db)
			time.Sleep(time.Hour)
			slow("", 0)
			db.SetMaxIdleConns(20)
			giveBack(conns(t, db, 20, false))
			db.SetMaxIdleConns(-1)
			time.Sleep(time.Hour)
			db.SetMaxOpenConns(1)
			slow("1", 500*time.Millisecond)
			measure()
			exec(t, db)
			exec(t, db)
		}},
		{"when a hundred close at a time", 100, func(t *testing.T, db *sql.DB, src *source, slow func(string, time.Duration), measure func()) {
			db.SetMaxOpenConns(100)
			used := conns(t, db, 100, true)
			slow("1", 500*time.Millisecond)
			src.set("2")
			giveBack(used) // database/sql keeps two of them
			measure()
			done := make(chan bool)
			for range 100 {
				go func() {
					defer func() { done <- true }()
					giveBack(conns(t, db, 1, true))
				}()
			}
			for range 100 {
				<-done
			}
		}},
	} {
		bubble(t, row.name, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			var slow atomic.Value // the value whose connections are slow to close
			var pause atomic.Int64
			f.onClose = func(c *fakeConn) {
				if slow.Load() == any(c.value) {
					time.Sleep(time.Duration(pause.Load()))
				}
			}
			db := open(t, ctxFake{f}, src, "")
			row.do(t, db, src, func(value string, d time.Duration) { slow.Store(value); pause.Store(int64(d)) }, func() { f.maxLive.Store(0) })
			if have := f.maxLive.Load(); have > int64(row.max) {
				t.Errorf("%d server connections at a time with MaxOpenConns %d", have, row.max)
			}
		})
	}
}
