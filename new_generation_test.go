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
