package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/infobloxopen/hotload"
)

// TestFirstUse: a sql.Conn on which nothing has run moves to the value in force
// when it is first used, and stays there.
func TestFirstUse(t *testing.T) {
	for _, row := range []struct {
		name string
		use  func(conn *sql.Conn) error
	}{
		{"exec with arguments", func(conn *sql.Conn) error {
			_, err := conn.ExecContext(bg, "insert", special{"a"}, sql.Named("n", special{"b"}))
			return err
		}},
		{"query", func(conn *sql.Conn) error { return conn.QueryRowContext(bg, "ask").Scan(new(string)) }},
		{"prepare", func(conn *sql.Conn) error { _, err := conn.PrepareContext(bg, "insert ?"); return err }},
		{"begin", func(conn *sql.Conn) error {
			tx, err := conn.BeginTx(bg, nil)
			if err != nil {
				return err
			}
			return tx.Rollback()
		}},
		{"ping", func(conn *sql.Conn) error { return conn.PingContext(bg) }},
		{"raw", func(conn *sql.Conn) error {
			return conn.Raw(func(c any) error { c.(interface{ Raw() driver.Conn }).Raw(); return nil })
		}},
	} {
		for _, pooled := range []bool{false, true} {
			t.Run("R-19/the first use of a sql.Conn is on the value in force", func(t *testing.T) {
				t.Logf("%s, from the pool: %t", row.name, pooled)
				src := newSource("1")
				db := open(t, newFake(t), src, "")
				if pooled {
					ask(t, db)
				}
				conn := take(t, db)
				src.set("2")
				must(t, "use", row.use(conn))
				src.set("3")
				want(t, "value", ask(t, conn), "2")
			})
		}
	}
}

// TestHandedOver: a connection that is superseded between its return and its
// hand-over to a waiter.
func TestHandedOver(t *testing.T) {
	src := newSource("1")
	db := open(t, newFake(t), src, "")
	db.SetMaxOpenConns(1)
	conn := take(t, db)
	ask(t, conn)
	answer := make(chan string)
	go func() { answer <- ask(t, db) }()
	await(t, "a waiter", func() bool { return db.Stats().WaitCount == 1 })
	src.set("2")
	conn.Close()
	want(t, "value", receive(t, "query", answer), "2")
}

// TestNobodyWaits is the measured hang of pools whose stale connections answer
// ErrBadConn: with changes quick enough, a caller waited for ever. In other
// pools, where connections come and go in other ways, nobody waits either.
func TestNobodyWaits(t *testing.T) {
	for _, row := range []struct {
		name    string
		changes int
		patient time.Duration // of each caller
		set     func(db *sql.DB)
	}{
		{"R-14/nobody waits", 1500, limit, func(db *sql.DB) {}},
		{"waiters give up", 150, 100 * time.Microsecond, func(db *sql.DB) { db.SetMaxOpenConns(2) }},
		{"connections live for a moment", 150, limit, func(db *sql.DB) { db.SetConnMaxLifetime(time.Millisecond) }},
		{"idle ones live for a moment", 150, limit, func(db *sql.DB) { db.SetConnMaxIdleTime(time.Microsecond) }},
		{"no idle ones", 150, limit, func(db *sql.DB) { db.SetMaxIdleConns(0) }},
		{"no idle ones, and short lives", 150, limit, func(db *sql.DB) { db.SetMaxIdleConns(0); db.SetConnMaxLifetime(time.Microsecond) }},
	} {
		t.Run(row.name, func(t *testing.T) {
			f, src := newFake(t), newSource("-1")
			db := open(t, f, src, "")
			db.SetMaxOpenConns(3)
			row.set(db)
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var wg sync.WaitGroup
			var ops atomic.Int64
			for range 6 {
				wg.Go(func() {
					for ctx.Err() == nil {
						ctx, cancel := context.WithTimeout(context.Background(), row.patient)
						if _, err := db.ExecContext(ctx, "insert"); err != nil && (row.patient == limit || err != context.DeadlineExceeded) {
							t.Error(err)
						}
						cancel()
						ops.Add(1)
					}
				})
			}
			last := strconv.Itoa(row.changes)
			for n := range row.changes {
				src.set(strconv.Itoa(n + 1))
			}
			stop()
			done := make(chan struct{})
			go func() { wg.Wait(); close(done) }()
			receive(t, "every caller has come back", done)
			want(t, "value", ask(t, db), last)
			await(t, "no connection is in use", func() bool { return db.Stats().InUse == 0 })
			db.Close()
			await(t, "every connection is closed", func() bool { return len(f.live()) == 0 })
			t.Logf("%d operations", ops.Load())
		})
	}
}

// A connection of a superseded generation that is no longer valid keeps its
// place in the pool.
func TestInvalidAfterChange(t *testing.T) {
	f, src := newFake(t), newSource("1")
	f.onCall = onCall("1", "IsValid", func(context.Context) error { return errDead })
	db := open(t, f, src, "")
	tx := begin(t, db)
	src.set("2")
	must(t, "commit", tx.Commit())
	want(t, "connections in the pool", db.Stats().OpenConnections, 1)
	want(t, "value", ask(t, db), "2")
}

// A connection that has no ExecContext takes the place of one that has.
func TestUnlikeConnections(t *testing.T) {
	f, src := newFake(t), newSource("1")
	f.asConn = func(c *fakeConn) driver.Conn {
		if c.value == "2" {
			return asBare(c)
		}
		return c
	}
	db := open(t, f, src, "")
	db.SetMaxOpenConns(1)
	must(t, "ping", db.Ping())
	for _, value := range []string{"1", "2", "1"} {
		src.set(value)
		for range 3 {
			res, err := db.Exec("insert ?", 1)
			must(t, "exec", err)
			on, _ := res.LastInsertId()
			want(t, "value that it ran on", fmt.Sprint(on), value)
		}
	}
}

func TestRaw(t *testing.T) {
	for _, options := range []string{"", "forceKill=1h"} {
		t.Run(options, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			db := open(t, ctxFake{f}, src, options)
			used, unused := take(t, db), take(t, db)
			c := raw(t, used).(*fakeConn)
			src.set("2")
			want(t, "the value of a connection that Raw used", c.value, "1")
			want(t, "Raw after a change", raw(t, used), driver.Conn(c))
			want(t, "an operation after Raw and a change", ask(t, used), "1")
			used.Close()
			await(t, "the connection is returned and closed", c.shut.Load)
			want(t, "the value of a connection that was not used before the change", raw(t, unused).(*fakeConn).value, "2")
			want(t, "an operation of the pool", ask(t, db), "2")

			parked := take(t, db)
			f.onOpen = onOpen("3", func(context.Context) error { return errDead })
			src.set("3")
			want(t, "Raw if no connection can be opened", raw(t, parked), nil)
			src.set("4")
			want(t, "the value of Raw after that", raw(t, parked).(*fakeConn).value, "4")
		})
	}
}

// What a Raw callback gets from the driver may be ended twice; the second end is
// not that of something else.
func TestDoubleEnd(t *testing.T) {
	for _, options := range []string{"", "forceKill=true"} {
		t.Run(options, func(t *testing.T) {
			f := newFake(t)
			f.forgiving = true
			inRaw(t, take(t, open(t, f, newSource("1"), options)), func(c any) {
				query := func() driver.Rows {
					rows, err := c.(driver.QueryerContext).QueryContext(bg, "ask", nil)
					must(t, "query", err)
					return rows
				}
				first := query()
				first.Close()
				second := query()
				first.Close()
				must(t, "Next of other rows", second.Next(make([]driver.Value, 1)))
				second.Close()
				tx, err := c.(driver.ConnBeginTx).BeginTx(bg, driver.TxOptions{})
				must(t, "begin", err)
				tx.Commit()
				want(t, "second end of a transaction", tx.Rollback(), sql.ErrTxDone)
				stmt, err := c.(driver.ConnPrepareContext).PrepareContext(bg, "ask")
				must(t, "prepare", err)
				must(t, "Stmt.Close", stmt.Close())
				must(t, "second Stmt.Close", stmt.Close())
			})
		})
	}
}

// asBare makes a connection that is no SessionResetter, no Validator and no
// Execer.
func asBare(c *fakeConn) driver.Conn {
	return struct {
		driver.Conn
		driver.QueryerContext
		driver.ConnBeginTx
		driver.ConnPrepareContext
	}{c, c, c, c}
}

// A wrapper does what instrumentation libraries do to a driver. Some of them
// do not pass on what the connection can answer to IsValid and ResetSession.
type wrapper struct {
	driver.Driver
	poor bool
}

type (
	wrappedConnector struct {
		driver.Connector
		w wrapper
	}
	poorConn interface {
		driver.Conn
		driver.QueryerContext
		driver.ConnPrepareContext
		driver.ConnBeginTx
		driver.NamedValueChecker
		driver.SessionResetter
	}
	wrappedConn struct{ poorConn }
	richConn    struct {
		poorConn
		driver.Validator
	}
)

func (w wrapper) OpenConnector(name string) (driver.Connector, error) {
	c, err := w.Driver.(driver.DriverContext).OpenConnector(name)
	return wrappedConnector{c, w}, err
}

func (c wrappedConnector) Driver() driver.Driver { return c.w }
func (c wrappedConnector) Close() error          { return c.Connector.(io.Closer).Close() }

func (c wrappedConnector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	if c.w.poor {
		return wrappedConn{conn.(poorConn)}, nil
	}
	return richConn{conn.(poorConn), conn.(driver.Validator)}, nil
}

// around opens a pool on a layer around hotload that passes ResetSession on but
// not IsValid.
func around(t testing.TB, d driver.Driver, src hotload.Strategy, options string) *sql.DB {
	t.Helper()
	db := wrapper{poor: true}.around(t, d, src, options)
	db.SetMaxOpenConns(1)
	return db
}

// around opens a pool on the wrapper around hotload.
func (w wrapper) around(t testing.TB, d driver.Driver, src hotload.Strategy, options string) *sql.DB {
	t.Helper()
	w.Driver = hotloadDriver(t)
	name := register(d, src)
	sql.Register(name, w)
	db, err := sql.Open(name, name+"?"+options)
	must(t, "open", err)
	t.Cleanup(func() { db.Close() })
	return db
}

// TestWrapped has instrumentation around hotload and under it.
func TestWrapped(t *testing.T) {
	for _, poor := range []bool{false, true} {
		for _, where := range []string{"around", "under"} {
			t.Run(fmt.Sprintf("%s hotload, poor=%t", where, poor), func(t *testing.T) {
				w := wrapper{poor: poor}
				f, src := newFake(t), newSource("1")
				var db *sql.DB
				if w.Driver = (ctxFake{f}); where == "around" {
					db = w.around(t, w.Driver, src, "")
				} else {
					db = open(t, w, src, "")
				}
				st, tx := prepare(t, db, "ask ?"), begin(t, db)
				want(t, "an operation", ask(t, tx), "1")
				src.set("2")
				want(t, "an operation in a transaction, after a change", ask(t, tx), "1")
				must(t, "commit", tx.Commit())
				for range 2 {
					want(t, "an operation after a change", ask(t, db), "2")
					want(t, "a statement after a change", ask(t, prepared{st}, special{"x"}), "2")
				}
				st.Close()
				must(t, "DB.Close", db.Close())
				await(t, "every connection is closed", func() bool { return len(f.live()) == 0 })
			})
		}
	}
}

// TestLayerWithoutIsValid: under a layer that does not pass IsValid on, a
// connection that was in use at a change, or killed, or whose transaction was
// rolled back because its context had ended, does not spoil later operations.
func TestLayerWithoutIsValid(t *testing.T) {
	for _, row := range []struct {
		name, options string
		asConn        func(*fakeConn) driver.Conn
		change        bool
	}{
		{"in use at a change", "", asBare, true},
		{"killed", "forceKill=true", nil, true},
		{"rolled back", "", asBare, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			f, src := newFake(t), newSource("0")
			f.asConn = row.asConn
			db := around(t, f, src, row.options)
			for n := range 50 {
				ctx, cancel := context.WithCancel(t.Context())
				tx, err := db.BeginTx(ctx, nil)
				must(t, "begin", err)
				value := "0"
				if row.change {
					value = strconv.Itoa(n + 1)
					src.set(value)
				} else {
					cancel()
				}
				tx.Rollback()
				for range 2 {
					want(t, "value", ask(t, db), value)
				}
				cancel()
			}
		})
	}
}

// A deafLayer keeps a connection whatever it answers to IsValid.
type deafLayer struct{ driver.Connector }

type deafConn struct {
	poorConn
	valid func() bool
}

func (l deafLayer) Connect(ctx context.Context) (driver.Conn, error) {
	c, err := l.Connector.Connect(ctx)
	return deafConn{c.(poorConn), c.(driver.Validator).IsValid}, err
}

func (c deafConn) IsValid() bool {
	c.valid()
	return true
}

// A connection that is no longer valid is closed, also when a layer has kept it.
func TestDeafLayer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.onCall = onCall("1", "IsValid", func(context.Context) error { return driver.ErrBadConn })
		connector, _ := connect(t, f, newSource("1"), "")
		db := sql.OpenDB(deafLayer{connector})
		for range 3 {
			must(t, "Conn.Close", take(t, db).Close())
		}
		must(t, "DB.Close", db.Close())
		synctest.Wait()
		want(t, "open connections", len(f.live()), 1) // that of connect
	})
}

// The dial of Conn.Raw keeps to the time that the program gave db.Conn, on
// which its connection was taken: Raw has no context of its own.
func TestRawKeepsDeadline(t *testing.T) {
	const forEver = time.Hour // as long as a dial takes that nothing ends
	for _, row := range []struct {
		name    string
		given   time.Duration // to db.Conn; 0 for no deadline
		cancel  bool          // the context of db.Conn when that has returned
		later   time.Duration // when Raw is called
		dial    time.Duration
		most    time.Duration // that Raw may take
		dialled bool
	}{
		{name: "a host that hangs", given: 500 * time.Millisecond, dial: forEver, most: 500 * time.Millisecond},
		{name: "a host that hangs, after a cancel", given: 500 * time.Millisecond, cancel: true, dial: forEver, most: 500 * time.Millisecond},
		{name: "a host that is slow", given: 10 * time.Second, dial: 5 * time.Second, most: 5 * time.Second, dialled: true},
		{name: "a host that is slow, after a cancel", given: 10 * time.Second, cancel: true, dial: 5 * time.Second, most: 5 * time.Second, dialled: true},
		{name: "no deadline", dial: 20 * time.Second, most: 20 * time.Second, dialled: true},
		{name: "no deadline, after a cancel", cancel: true, dial: 20 * time.Second, most: 20 * time.Second, dialled: true},
		// A graceful change causes no error: a db.Conn of 500 ms that is held for a minute
		// must not fail because of it.
		{name: "a deadline long past", given: 500 * time.Millisecond, cancel: true, later: time.Minute, dial: 100 * time.Millisecond, most: 100 * time.Millisecond, dialled: true},
	} {
		for _, kind := range []string{"Connect", "Connect, deaf", "Open"} {
			for _, pooled := range []bool{false, true} {
				for _, options := range []string{"", "forceKill=true"} {
					bubble(t, fmt.Sprintf("%s,%s,from the pool=%t,%s", row.name, kind, pooled, options), func(t *testing.T) {
						f, src := newFake(t), newSource("1")
						t.Cleanup(func() { time.Sleep(forEver) }) // for a deaf dial to return
						f.onOpen = func(ctx context.Context, value string) error {
							if value == "1" {
								return nil
							}
							done := ctx.Done()
							if kind == "Connect, deaf" {
								done = nil
							}
							select {
							case <-time.After(row.dial):
								return nil
							case <-done:
								return ctx.Err()
							}
						}
						var d driver.Driver = ctxFake{f}
						if kind == "Open" {
							d = f
						}
						db := open(t, d, src, options)
						if pooled { // with a deadline of its own, which is none of the next
							ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
							conn, err := db.Conn(ctx)
							must(t, "conn", err)
							must(t, "Conn.Close", conn.Close())
							cancel()
						}
						ctx, cancel := context.WithCancel(t.Context())
						if row.given > 0 {
							ctx, cancel = context.WithTimeout(ctx, row.given)
						}
						defer cancel()
						conn, err := db.Conn(ctx)
						must(t, "conn", err)
						defer conn.Close()
						if row.cancel {
							cancel()
						}
						src.set("2")
						time.Sleep(row.later)
						start := time.Now()
						var have driver.Conn
						must(t, "Raw", conn.Raw(func(dc any) error {
							have = dc.(interface{ Raw() driver.Conn }).Raw()
							return nil
						}))
						most := row.most
						if kind == "Connect, deaf" && !row.dialled {
							most += patience // for the driver to return
						}
						if took := time.Since(start); took > most {
							t.Errorf("Raw took %v, want at most %v", took, most)
						}
						if !row.dialled {
							want(t, "connection of a host that hangs", have, nil)
						} else if c, ok := have.(*fakeConn); !ok {
							t.Errorf("Raw: have %v, want a connection", have)
						} else {
							want(t, "value of the connection", c.value, "2")
						}
					})
				}
			}
		}
	}
}

// A failingFake's connections answer Close with an error.
type (
	failingFake      struct{ ctxFake }
	failingConnector struct{ *fakeConnector }
	failingConn      struct{ *fakeConn }
)

var errFailing = errors.New("fake: Close failed")

func (d failingFake) OpenConnector(value string) (driver.Connector, error) {
	return failingConnector{&fakeConnector{f: d.fake, value: value}}, nil
}

func (c failingConnector) Connect(ctx context.Context) (driver.Conn, error) {
	ci, err := c.fakeConnector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return failingConn{ci.(*fakeConn)}, nil
}

func (c failingConn) Close() error {
	c.fakeConn.Close()
	return errFailing
}

// DB.Close tells the driver's error of a Close, as without hotload, also when
// another Close was slow once.
func TestCloseErrorAfterSlowClose(t *testing.T) {
	for _, slow := range []time.Duration{0, patience / 2, 2 * patience} {
		bubble(t, slow.String(), func(t *testing.T) {
			f := newFake(t)
			var pause atomic.Int64
			f.onClose = func(*fakeConn) { time.Sleep(time.Duration(pause.Load())) }
			db := open(t, failingFake{ctxFake{f}}, newSource("1"), "")
			db.SetMaxIdleConns(-1)
			pause.Store(int64(slow))
			_, err := db.Exec("insert") // and a Close, which is slow
			must(t, "exec", err)
			time.Sleep(time.Hour)
			pause.Store(0)
			db.SetMaxIdleConns(2)
			_, err = db.Exec("insert")
			must(t, "exec", err)
			if err := db.Close(); !errors.Is(err, errFailing) {
				t.Errorf("DB.Close: have error %v, want the driver's", err)
			}
		})
	}
}

// The context of a connection that Raw has dialled lives on while the callback
// runs, as that of any other connection.
func TestContextOfRawsDial(t *testing.T) {
	bubble(t, "", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		var kept context.Context
		f.onOpen = onOpen("2", func(ctx context.Context) error { kept = ctx; return nil })
		db := open(t, ctxFake{f}, src, "")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		conn, err := db.Conn(ctx)
		must(t, "conn", err)
		src.set("2")
		inRaw(t, conn, func(c any) {
			c.(interface{ Raw() driver.Conn }).Raw()
			if kept.Err() != nil {
				t.Errorf("the context of the connection has ended (%v) before the callback runs", kept.Err())
			}
		})
		conn.Close()
		db.Close()
	})
}
