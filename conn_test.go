package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
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
	poor  bool
	calls *atomic.Int64
}

type (
	wrappedConnector struct {
		driver.Connector
		w wrapper
	}
	wrappedConn struct {
		driver.Conn
		w wrapper
	}
	richConn struct{ wrappedConn }
)

func (w wrapper) OpenConnector(name string) (driver.Connector, error) {
	c, err := w.Driver.(driver.DriverContext).OpenConnector(name)
	return wrappedConnector{c, w}, err
}

func (c wrappedConnector) Driver() driver.Driver { return c.w }

func (c wrappedConnector) Close() error {
	if closer, ok := c.Connector.(io.Closer); ok {
		return closer.Close()
	}
	return nil
}

func (c wrappedConnector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	if c.w.poor {
		return wrappedConn{conn, c.w}, nil
	}
	return richConn{wrappedConn{conn, c.w}}, nil
}

func (c wrappedConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	c.w.calls.Add(1)
	return c.Conn.(driver.QueryerContext).QueryContext(ctx, query, args)
}

func (c wrappedConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	c.w.calls.Add(1)
	return c.Conn.(driver.ConnPrepareContext).PrepareContext(ctx, query)
}

func (c wrappedConn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	c.w.calls.Add(1)
	return c.Conn.(driver.ConnBeginTx).BeginTx(ctx, opts)
}

func (c wrappedConn) CheckNamedValue(nv *driver.NamedValue) error {
	return c.Conn.(driver.NamedValueChecker).CheckNamedValue(nv)
}

func (c wrappedConn) ResetSession(ctx context.Context) error {
	return c.Conn.(driver.SessionResetter).ResetSession(ctx)
}

func (c richConn) IsValid() bool { return c.Conn.(driver.Validator).IsValid() }

// around opens a pool on a layer around hotload that passes ResetSession on but
// not IsValid.
func around(t testing.TB, d driver.Driver, src hotload.Strategy, options string) *sql.DB {
	t.Helper()
	db := wrapper{poor: true, calls: new(atomic.Int64)}.around(t, d, src, options)
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
				w := wrapper{poor: poor, calls: new(atomic.Int64)}
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
					var value string
					must(t, "query", st.QueryRow(special{"x"}).Scan(&value))
					want(t, "a statement after a change", value, "2")
				}
				if w.calls.Load() == 0 {
					t.Error("nothing went through the wrapper")
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

type deafConn struct{ wrappedConn }

func (l deafLayer) Connect(ctx context.Context) (driver.Conn, error) {
	c, err := l.Connector.Connect(ctx)
	return deafConn{wrappedConn{c, wrapper{calls: new(atomic.Int64)}}}, err
}

func (c deafConn) IsValid() bool {
	c.Conn.(driver.Validator).IsValid()
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
