package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
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
			rows, err := db.Query("ask")
			must(t, "query", err)
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
			var value string
			must(t, "query", stmt.QueryRow().Scan(&value))
			want(t, "value", value, "0")
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
				v := &variant{conn: func(c *recConn) driver.Conn { return c }, fails: map[string]error{"Close": errDriver}}
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
