package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/infobloxopen/hotload"
)

// TestKill proves what SPEC.md says of forceKill.
func TestKill(t *testing.T) {
	t.Run("R-28/what is in use ends at the change", killsIdle)
	t.Run("R-29/what is in use ends at its deadline", killsAtDeadline)
	t.Run("R-30/a killed call is not run again", killsCalls)
	t.Run("R-31/a killed transaction and killed rows say so", func(t *testing.T) {
		t.Run("transaction", killsTx)
		t.Run("rows", killsRows)
	})
	t.Run("R-32/a kill waits for the call, if not for ever", func(t *testing.T) {
		t.Run("deaf", killsDeaf)
		t.Run("Raw", killsRaw)
		t.Run("Scan", scansDuringCall)
		t.Run("Stmt.Close", awaitsStmtClose)
	})
	t.Run("R-33/nothing on the value in force is killed", func(t *testing.T) {
		t.Run("dialled anew", sparesTheValueInForce)
	})
}

// killsCalls kills each kind of call and lets it unwind in each way that a
// driver could: it is cancelled through its context, its connection is closed
// when it has returned and not before, its error matches ErrKilled and nothing
// that would have it run again, and it runs once. If it succeeds it says so.
// Meanwhile new work goes on.
func killsCalls(t *testing.T) {
	type things struct { // in use, each on a connection of its own
		db   *sql.DB // with prepared statements
		stmt map[string]*sql.Stmt
		tx   *sql.Tx
		conn *sql.Conn
		own  *sql.Stmt // of a connection
		rows *sql.Rows
	}
	calls := []struct {
		name, call string
		ctx        bool // the driver gets a context
		skips      bool // it may answer ErrSkip
		run        func(t *testing.T, x things) error
	}{
		{"DB.Exec", "Exec insert", true, true, func(t *testing.T, x things) error { return insert(x.db) }},
		{"DB.Query", "Query select", true, true, func(t *testing.T, x things) error {
			rows, err := x.db.Query("select")
			if err == nil {
				want(t, "another row of killed rows", rows.Next(), false)
				mustBeKilled(t, "rows of a query that was killed", rows.Err())
			}
			return err
		}},
		{"DB.Ping", "Ping", true, false, func(t *testing.T, x things) error { return x.db.Ping() }},
		{"DB.Begin", "Begin", true, false, func(t *testing.T, x things) error {
			tx, err := x.db.Begin()
			if err == nil {
				mustBeKilled(t, "Commit of a transaction whose Begin was killed", tx.Commit())
			}
			return err
		}},
		{"DB.Prepare", "Prepare new", true, false, func(t *testing.T, x things) error {
			stmt, err := x.db.Prepare("new")
			if err == nil {
				_, err := stmt.Exec()
				must(t, "Exec of a statement whose Prepare was killed", err)
				must(t, "its Close", stmt.Close())
			}
			return err
		}},
		{"Stmt.Exec", "Exec insert", true, false, func(t *testing.T, x things) error { _, err := x.stmt["insert"].Exec(); return err }},
		{"Stmt.Query", "Query select", true, false, func(t *testing.T, x things) error {
			rows, err := x.stmt["select"].Query()
			if err == nil {
				mustBeKilled(t, "Close of rows of a query that was killed", rows.Close())
			}
			return err
		}},
		{"Tx.Exec", "Exec insert", true, true, func(t *testing.T, x things) error {
			err := insert(x.tx)
			mustBeKilled(t, "Commit", x.tx.Commit())
			return err
		}},
		{"Tx.Commit", "Commit", false, false, func(t *testing.T, x things) error { return x.tx.Commit() }},
		{"Tx.Rollback", "Rollback", false, false, func(t *testing.T, x things) error { return x.tx.Rollback() }},
		{"Conn.Exec", "Exec insert", true, true, func(t *testing.T, x things) error {
			err := insert(x.conn)
			mustBeKilled(t, "the next call", x.conn.PingContext(t.Context()))
			return err
		}},
		{"first use of a Conn that ends a statement", "Close own", false, false, func(t *testing.T, x things) error { return x.own.Close() }},
		{"Rows.Next", "Next", true, false, func(t *testing.T, x things) error {
			if !x.rows.Next() {
				return x.rows.Err()
			}
			want(t, "another row of killed rows", x.rows.Next(), false)
			mustBeKilled(t, "rows that were killed", x.rows.Err())
			return nil
		}},
		{"Rows.Close", "Close rows", false, false, func(t *testing.T, x things) error { return x.rows.Close() }},
	}
	outcomes := []struct {
		name string
		err  error
	}{
		{"success", nil},
		{"ErrBadConn", driver.ErrBadConn},
		{"ErrBadConn wrapped", fmt.Errorf("fake: %w", driver.ErrBadConn)},
		{"Canceled", context.Canceled},
		{"Canceled wrapped", fmt.Errorf("fake: %w", errors.Join(io.ErrUnexpectedEOF, context.Canceled))},
		{"EOF", io.EOF},
		{"the driver's own error", &driverError{57014}},
		{"ErrSkip", driver.ErrSkip},
	}
	for _, call := range calls {
		for _, outcome := range outcomes {
			if outcome.err == driver.ErrSkip && !call.skips {
				continue
			}
			bubble(t, call.name+"/"+outcome.name, func(t *testing.T) {
				f, o, src := newFake(t), newObstacle(call.call), newSource("1")
				f.onCall = o.onCall
				f.rowCount = 3
				f.heedless = true
				db := open(t, ctxFake{f}, src, "forceKill=true")
				x := things{db: db, stmt: make(map[string]*sql.Stmt), tx: begin(t, db), conn: take(t, db)}
				x.own = prepare(t, take(t, db), "own")
				for _, text := range []string{"insert", "select"} {
					x.stmt[text] = prepare(t, db, text)
				}
				x.rows = query(t, db, "select")
				defer x.tx.Rollback()
				defer x.rows.Close()
				o.armed.Store(true)
				done := make(chan error, 1)
				go func() { done <- call.run(t, x) }()
				ctx := receive(t, "the call begins", o.there)
				src.set("2")
				if call.ctx {
					<-ctx.Done()
					want(t, "cause of the end of the driver's context", context.Cause(ctx), hotload.ErrKilled)
				}
				_, err := db.Exec("new work")
				must(t, "new work", err)
				synctest.Wait()
				want(t, "connections on the old value while the call unwinds", f.liveOn("1"), 1)
				time.Sleep(patience - 1)
				want(t, "connections on the old value as long as there is patience", f.liveOn("1"), 1)
				o.returns <- outcome.err
				err = receive(t, "the call returns", done)
				synctest.Wait()
				want(t, "connections on the old value when the call has returned", f.liveOn("1"), 0)
				if outcome.err == nil {
					must(t, "a call that succeeds all the same", err)
				} else {
					mustBeKilled(t, "the call", err)
				}
				var own *driverError
				if _, is := outcome.err.(*driverError); is && (!errors.As(err, &own) || own.code != 57014) {
					t.Errorf("the driver's error cannot be had from %v", err)
				}
				if call.name == "DB.Prepare" && outcome.err == nil {
					o.calls.Add(-1) // the statement was used, on the new value
				}
				want(t, "times that the driver was called", o.calls.Load(), 1)
				want(t, "value of the next work", ask(t, db), "2")
			})
		}
	}
}

// TestKillPassesContextOn checks the context that a driver gets in this mode: it
// is the caller's in all but its end, also when the call has ended.
func TestKillPassesContextOn(t *testing.T) {
	type key struct{}
	f, o := newFake(t), newObstacle("Exec insert")
	f.onCall = o.onCall
	db := open(t, ctxFake{f}, newSource("1"), "forceKill=1h")
	o.armed.Store(true)
	ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), key{}, "v"), time.Hour)
	defer cancel()
	done := make(chan error, 1)
	go func() { _, err := db.ExecContext(ctx, "insert"); done <- err }()
	have := receive(t, "the call begins", o.there)
	want(t, "value of the context", have.Value(key{}), any("v"))
	haveDeadline, _ := have.Deadline()
	wantDeadline, _ := ctx.Deadline()
	want(t, "deadline of the context", haveDeadline, wantDeadline)
	cancel()
	<-have.Done()
	want(t, "cause of a cancellation by the caller", context.Cause(have), context.Canceled)
	o.returns <- have.Err()
	want(t, "error of a call cancelled by the caller", receive(t, "the call returns", done), context.Canceled)
	want(t, "value after the call", have.Value(key{}), any("v"))
	o.calls.Store(0)
	go func() { o.returns <- nil }()
	go func() { have = <-o.there; done <- nil }()
	_, err := db.ExecContext(context.WithValue(t.Context(), key{}, "unasked"), "insert")
	must(t, "exec", err)
	<-done
	want(t, "value of a context whose Done nobody asked for", have.Value(key{}), any("unasked"))
}

// TestKillContextsEnd checks that no context outlives what it was made for,
// and that it lasts until a transaction or rows have ended.
func TestKillContextsEnd(t *testing.T) {
	f, src := newFake(t), newSource("1")
	var mu sync.Mutex
	ctxs := make(map[string]context.Context)
	closing := make(map[string]error) // state of the context during the last call that it covers
	f.rowCount = 2
	f.onCall = func(ctx context.Context, _ *fakeConn, call string) error {
		mu.Lock()
		defer mu.Unlock()
		switch call {
		case "Close rows":
			closing["rows"] = ctxs["Query select"].Err()
		case "Commit", "Rollback":
			closing[call] = ctxs["Begin"].Err()
		}
		ctxs[call] = ctx
		return nil
	}
	db := open(t, ctxFake{f}, src, "forceKill=true")
	ended := func(what, call string, want bool) {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		if have := ctxs[call].Err() != nil; have != want {
			t.Errorf("%s: ended: have %t, want %t", what, have, want)
		}
	}
	must(t, "exec", insert(db))
	ended("Exec's context after it", "Exec insert", true)
	rows := query(t, db, "select")
	rows.Next()
	ended("Query's context while rows are open", "Query select", false)
	rows.Close()
	ended("Query's context after Rows.Close", "Query select", true)
	for how, end := range map[string]func(*sql.Tx) error{"Commit": (*sql.Tx).Commit, "Rollback": (*sql.Tx).Rollback} {
		tx := begin(t, db)
		must(t, "exec", insert(tx))
		ended("Begin's context in the transaction", "Begin", false)
		must(t, how, end(tx))
		ended("Begin's context after "+how, "Begin", true)
	}
	for what, err := range closing {
		must(t, "context during the call that ends it: "+what, err)
	}
}

// TestKillContextsAreForgotten: a connection that stays in the pool does not
// hold the contexts of what ran on it.
func TestKillContextsAreForgotten(t *testing.T) {
	type key struct{}
	f := newFake(t)
	db := open(t, ctxFake{f}, newSource("1"), "forceKill=true")
	const operations = 100
	var forgotten atomic.Int32
	for range operations {
		value := new([64]byte)
		runtime.AddCleanup(value, func(int) { forgotten.Add(1) }, 0)
		_, err := db.ExecContext(context.WithValue(t.Context(), key{}, value), "insert")
		must(t, "exec", err)
	}
	await(t, "the contexts are garbage", func() bool {
		runtime.GC()
		return forgotten.Load() > operations-10
	})
	want(t, "connections opened", f.opened.Load(), 1)
}

// killsIdle proves: what is in use without a call in progress is closed at once,
// and a sql.Conn on which nothing has run moves.
func killsIdle(t *testing.T) {
	for _, s := range []struct {
		name  string
		moves bool
		use   func(t *testing.T, conn *sql.Conn) (after func() error)
	}{
		{"Conn on which nothing has run", true, func(t *testing.T, conn *sql.Conn) func() error {
			return func() error { return insert(conn) }
		}},
		{"Conn that was used", false, func(t *testing.T, conn *sql.Conn) func() error {
			must(t, "exec", insert(conn))
			return func() error { return insert(conn) }
		}},
		{"Conn whose statement was prepared", false, func(t *testing.T, conn *sql.Conn) func() error {
			stmt := prepare(t, conn, "insert ?")
			return func() error { defer stmt.Close(); _, err := stmt.Exec(special{"x"}); return err }
		}},
		{"transaction", false, func(t *testing.T, conn *sql.Conn) func() error { return begin(t, conn).Commit }},
		{"rows half read", false, func(t *testing.T, conn *sql.Conn) func() error {
			rows := query(t, conn, "select")
			rows.Next()
			return func() error {
				rows.Next()
				mustBeKilled(t, "Rows.Err", rows.Err())
				return rows.Scan(new(string))
			}
		}},
	} {
		bubble(t, s.name, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			f.rowCount = 5
			killed := false
			var held context.Context // by the driver
			f.onCall = func(ctx context.Context, c *fakeConn, call string) error {
				if c.value == "1" && killed && !strings.HasPrefix(call, "Close ") {
					t.Errorf("%s on the killed connection", call)
				}
				if call == "Begin" || call == "Query select" {
					held = ctx
				}
				return nil
			}
			db := open(t, ctxFake{f}, src, "forceKill=true")
			conn := take(t, db)
			after := s.use(t, conn)
			killed = true
			start := time.Now()
			src.set("2")
			synctest.Wait()
			want(t, "time that passed", time.Since(start), 0)
			want(t, "connections on the old value", f.liveOn("1"), 0)
			if held != nil {
				want(t, "cause of the end of the context that the driver holds", context.Cause(held), hotload.ErrKilled)
			}
			err := after()
			if s.moves {
				must(t, "first use", err)
				want(t, "value", ask(t, conn), "2")
			} else {
				mustBeKilled(t, "use", err)
				mustBeKilled(t, "use again", insert(conn))
			}
			must(t, "Conn.Close", conn.Close())
			want(t, "value that the pool goes on with", ask(t, db), "2")
		})
	}
}

// killsTx proves: a Commit begun after the kill fails, and neither it nor
// anything else of the transaction reaches the driver.
func killsTx(t *testing.T) {
	for _, end := range []string{"Commit", "Rollback", "context"} {
		bubble(t, end, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			f.rowCount = 2
			db := open(t, ctxFake{f}, src, "forceKill=true")
			pooled := prepare(t, db, "pooled ?")
			defer pooled.Close()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			tx, err := db.BeginTx(ctx, nil)
			must(t, "begin", err)
			own := tx.Stmt(pooled)
			_, err = own.Exec(1)
			must(t, "exec", err)
			rows := query(t, tx, "select")
			src.set("2")
			synctest.Wait()
			want(t, "connections on the old value", f.liveOn("1"), 0) // the fake polices that nothing comes after

			rows.Next()
			mustBeKilled(t, "rows", rows.Err())
			_, err = tx.Exec("insert", special{"x"})
			mustBeKilled(t, "Tx.Exec", err)
			var v string
			mustBeKilled(t, "Tx.QueryRow", tx.QueryRow("select").Scan(&v))
			_, err = tx.Prepare("q")
			mustBeKilled(t, "Tx.Prepare", err)
			_, err = own.Exec(1)
			mustBeKilled(t, "statement prepared before", err)
			_, err = tx.Stmt(pooled).Exec(1)
			mustBeKilled(t, "statement of the pool in the transaction", err)
			switch end {
			case "Commit":
				mustBeKilled(t, "Commit", tx.Commit())
			case "Rollback":
				mustBeKilled(t, "Rollback", tx.Rollback())
			case "context":
				cancel()
				synctest.Wait()
			}
			if err := tx.Rollback(); err != sql.ErrTxDone {
				t.Errorf("Rollback in the end: have %v, want ErrTxDone", err)
			}
			_, err = pooled.Exec(special{"x"})
			must(t, "statement of the pool after the kill", err)
			synctest.Wait()
			want(t, "connections in use", db.Stats().InUse, 0)
			want(t, "value that the pool goes on with", ask(t, db), "2")
		})
	}
}

// killsDeaf proves: a driver that does not return within about a second is closed
// from another goroutine, as a last resort, and blocks nothing: not the change,
// new work, other kills, or DB.Close.
func killsDeaf(t *testing.T) {
	for _, row := range []struct {
		name, call string
		use        func(t *testing.T, db *sql.DB, old *sql.Stmt) error // old has to be prepared again
	}{
		{"exec", "Exec insert", func(t *testing.T, db *sql.DB, _ *sql.Stmt) error { return insert(db) }},
		{"prepare", "Prepare deaf", func(t *testing.T, db *sql.DB, _ *sql.Stmt) error { _, err := db.Prepare("deaf"); return err }},
		{"prepare with a statement open", "Prepare deaf", func(t *testing.T, db *sql.DB, _ *sql.Stmt) error {
			conn := take(t, db)
			prepare(t, conn, "other")
			_, err := conn.PrepareContext(bg, "deaf")
			return err
		}},
		{"prepare anew", "Prepare old", func(t *testing.T, db *sql.DB, old *sql.Stmt) error { _, err := old.Exec(); return err }},
		{"begin", "Begin", func(t *testing.T, db *sql.DB, _ *sql.Stmt) error { _, err := db.Begin(); return err }},
		{"commit", "Commit", func(t *testing.T, db *sql.DB, _ *sql.Stmt) error { return begin(t, db).Commit() }},
		{"next", "Next", func(t *testing.T, db *sql.DB, _ *sql.Stmt) error { return db.QueryRow("select").Scan(new(string)) }},
		{"exec of a prepared statement", "Exec deaf", func(t *testing.T, db *sql.DB, _ *sql.Stmt) error {
			_, err := prepare(t, db, "deaf").Exec()
			return err
		}},
		{"exec with prepared statements open", "Exec insert", func(t *testing.T, db *sql.DB, _ *sql.Stmt) error {
			conn := take(t, db)
			for i := range 2 {
				prepare(t, conn, fmt.Sprint("other ", i))
			}
			return insert(conn)
		}},
		{"close of a prepared statement", "Close deaf", func(t *testing.T, db *sql.DB, _ *sql.Stmt) error {
			conn := take(t, db)
			prepare(t, conn, "deaf").Close()
			return conn.PingContext(bg)
		}},
	} {
		for _, late := range []bool{false, true} { // deaf to the Close, too
			bubble(t, fmt.Sprint(row.name, "/late=", late), func(t *testing.T) {
				f, src := newFake(t), newSource("0")
				f.lenient.Store(true)
				f.heedless = true
				f.asRows = asTwoSets
				there, shut, returns := make(chan bool), make(chan bool), patience
				if late {
					returns = 3 * patience
				}
				f.onCall = onCall("1", row.call, func(context.Context) error {
					there <- true
					<-shut
					time.Sleep(returns - patience)
					switch row.name {
					case "next":
						return io.EOF
					case "prepare anew":
						return nil
					}
					return driver.ErrBadConn
				})
				f.onClose = onClose("1", func() { close(shut) })
				db := open(t, ctxFake{f}, src, "forceKill=true")
				old := prepare(t, db, "old")
				src.set("1")
				done := make(chan error, 1)
				go func() { done <- row.use(t, db, old) }()
				<-there
				start := time.Now()
				src.set("2")
				want(t, "value of new work", ask(t, db), "2")
				conn := take(t, db)
				want(t, "value of new work", ask(t, conn), "2")
				src.set("3")
				mustBeKilled(t, "another kill", insert(conn))
				conn.Close()
				want(t, "value of new work", ask(t, db), "3")
				want(t, "time that all this took", time.Since(start), 0)
				time.Sleep(patience - time.Nanosecond)
				synctest.Wait()
				want(t, "connections on the old value while there is patience", f.liveOn("1"), 1)
				time.Sleep(time.Nanosecond)
				synctest.Wait()
				want(t, "connections on the old value after that", f.liveOn("1"), 0)
				mustBeKilled(t, "the call", <-done)
				want(t, "time until the call returned", time.Since(start), returns)
				_, err := old.Exec()
				must(t, "the statement after the kill", err)
				must(t, "Stmt.Close", old.Close())
			})
		}
	}
}

// TestKillDuringPrepareAnew: a statement that is prepared again while its
// connection is killed is closed with it. In real time, because that orders
// nothing: the race detector sees it all.
func TestKillDuringPrepareAnew(t *testing.T) {
	f, o, src := newFake(t), newObstacle("Prepare deaf"), newSource("0")
	f.heedless = true
	f.onCall = o.onCall
	db := open(t, ctxFake{f}, src, "forceKill=true")
	stmt := prepare(t, db, "deaf")
	src.set("1")
	o.armed.Store(true)
	done := make(chan error, 1)
	go func() { _, err := stmt.Exec(); done <- err }()
	receive(t, "the call begins", o.there)
	src.set("2")
	o.returns <- nil
	mustBeKilled(t, "the call", receive(t, "the call returns", done))
	await(t, "the connection is closed", func() bool { return f.liveOn("1") == 0 })
	_, err := stmt.Exec()
	must(t, "the statement after the kill", err)
	must(t, "Stmt.Close", stmt.Close())
}

// TestCloseAwaitsLastResort: DB.Close waits also for what the last resort closes,
// and for what is closed after that.
func TestCloseAwaitsLastResort(t *testing.T) {
	for _, row := range []struct {
		name, call  string        // that is in progress at the change
		takes       time.Duration // 0: until its connection is closed
		close, shut time.Duration // that the Close of connection and connector take
		wait        time.Duration // after the change
		times       int
	}{
		{"a call", "Exec insert", 0, patience / 4, patience / 4, patience, 1},
		// Which comes first, the return or the last resort, is up to chance.
		{"a call that returns at the last moment", "Exec insert", patience, patience / 5, 0, patience, 1000},
		{"a Stmt.Close", "Close slow", 0, patience / 2, 0, patience + patience/4, 1},
		{"a Stmt.Close that returns at the last moment", "Close slow", patience, patience / 5, 0, patience / 2, 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			for range row.times {
				synctest.Test(t, func(t *testing.T) {
					f, src, shut := newFake(t), newSource("1"), make(chan bool)
					f.lenient.Store(true)
					f.onCall = onCall("1", row.call, func(context.Context) error {
						if row.takes > 0 {
							time.Sleep(row.takes)
						} else {
							<-shut
						}
						return driver.ErrBadConn
					})
					f.onClose = onClose("1", func() { close(shut); time.Sleep(row.close) })
					f.onShut = func(value string) {
						if value == "1" {
							time.Sleep(row.shut)
						}
					}
					db := open(t, ctxFake{f}, src, "forceKill=true")
					prepare(t, db, "slow")
					killed := make(chan error, 1)
					if row.call == "Exec insert" {
						go func() { killed <- insert(db) }()
						synctest.Wait()
					}
					src.set("2")
					if row.call == "Exec insert" {
						mustBeKilled(t, "exec", <-killed)
					} else {
						time.Sleep(row.wait)
					}
					db.Close()
					want(t, "connections", len(f.live()), 0)
					want(t, "connectors closed", f.connectorsClosed(), "1 2")
				})
			}
		})
	}
}

// TestKillBlockedClose: a driver's Close that hangs delays nothing but, for a
// second, a dial in its place.
func TestKillBlockedClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		hang := make(chan bool)
		f.onClose = onClose("1", func() { <-hang })
		db := open(t, ctxFake{f}, src, "forceKill=true")
		tx := begin(t, db)
		start := time.Now()
		src.set("2")
		want(t, "value of new work", ask(t, db), "2")
		mustBeKilled(t, "Commit", tx.Commit())
		want(t, "time that this took", time.Since(start), 0)
		db.SetMaxIdleConns(2)
		src.set("3")
		want(t, "value of new work", ask(t, db), "3")
		must(t, "DB.Close", db.Close())
		if d := time.Since(start); d > 2*patience {
			t.Errorf("a hanging Close held up work and DB.Close for %v", d)
		}
		close(hang)
	})
}

// TestHungReset: a driver that asks its server something in ResetSession, and
// waits, is closed as a last resort.
func TestHungReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src, shut := newFake(t), newSource("1"), make(chan bool)
		f.lenient.Store(true)
		f.onClose = onClose("1", func() { close(shut) })
		f.onCall = onCall("1", "ResetSession", func(context.Context) error { <-shut; return driver.ErrBadConn })
		db := open(t, ctxFake{f}, src, "forceKill=true")
		db.SetMaxOpenConns(1)
		must(t, "ping", db.Ping())
		value := make(chan string)
		go func() { value <- ask(t, db) }()
		synctest.Wait()
		start := time.Now()
		src.set("2")
		want(t, "value", <-value, "2")
		want(t, "time until the caller goes on", time.Since(start), patience)
		synctest.Wait()
		want(t, "connections on the old value", f.liveOn("1"), 0)
	})
}

// After an argument error no call is in progress: a kill closes at once,
// statements first, which the fake polices.
func TestArgumentErrorThenKill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		conn := take(t, open(t, f, src, "forceKill=true"))
		prepare(t, conn, "ask")
		_, err := conn.ExecContext(t.Context(), "x", make(chan int))
		mustSay(t, "exec", err, "unsupported type")
		src.set("2")
		synctest.Wait()
		want(t, "connections closed", f.closed.Load(), 1)
	})
}

// No call is too small for a kill to wait for: the fake polices that it is not
// closed during any.
func TestKillDuringSmallCalls(t *testing.T) {
	for _, at := range []string{
		"CheckNamedValue", "NumInput", "Columns", "ColumnTypeScanType", "ColumnTypeDatabaseTypeName", "ColumnTypeLength",
		"ColumnTypeNullable", "ColumnTypePrecisionScale", "HasNextResultSet", "NextResultSet", "Close rows", "Close insert ?", "ResetSession", "IsValid",
	} {
		bubble(t, at, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			f.asRows = asTwoSets
			armed, during := false, 0
			f.onCall = onCall("1", at, func(context.Context) error {
				if armed {
					armed = false
					src.set("2")
					time.Sleep(moment)
					during++
				}
				return nil
			})
			db := open(t, f, src, "forceKill=true")
			conn := take(t, db)
			tx := begin(t, conn)
			stmt := prepare(t, tx, "insert ?")
			rows := query(t, tx, "ask")
			armed = true
			rows.ColumnTypes()
			for rows.Next() {
			}
			rows.NextResultSet()
			rows.Close()
			stmt.Exec(1)
			stmt.Close()
			tx.Rollback()
			conn.Close()
			ask(t, db)
			want(t, "times that the value changed during the call", during, 1)
			synctest.Wait()
			want(t, "connections on the old value", f.liveOn("1"), 0)
		})
	}
}

// A convertingConn is a fake's connection whose statements are ColumnConverters.
type (
	convertingConn struct{ *fakeConn }
	convertingStmt struct{ *fakeStmt }
)

func (c convertingConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	stmt, err := c.fakeConn.PrepareContext(ctx, query)
	if err != nil {
		return nil, err
	}
	return convertingStmt{stmt.(*fakeStmt)}, nil
}

func (s convertingStmt) ColumnConverter(int) driver.ValueConverter {
	s.c.call(context.Background(), "ColumnConverter")
	return driver.DefaultParameterConverter
}

// A statement that was killed while one of its arguments was checked is not asked
// for a converter.
func TestKilledColumnConverter(t *testing.T) {
	for _, killed := range []bool{false, true} {
		bubble(t, fmt.Sprintf("killed=%t", killed), func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			f.asConn = func(c *fakeConn) driver.Conn { return convertingConn{c} }
			asked := 0
			f.onCall = func(_ context.Context, c *fakeConn, call string) error {
				if c.value == "1" && call == "ColumnConverter" {
					asked++
				}
				if killed && c.value == "1" && call == "CheckNamedValue" {
					src.set("2")
				}
				return nil
			}
			tx := begin(t, open(t, f, src, "forceKill=true"))
			_, err := prepare(t, tx, "insert ?").Exec(1)
			if !killed {
				must(t, "exec", err)
				want(t, "times that the statement was asked", asked, 1)
				return
			}
			mustBeKilled(t, "exec", err)
			want(t, "times that the statement was asked", asked, 0)
		})
	}
}

// killsRaw proves: a Raw callback counts as a call in progress whose end cannot be
// seen, until the next operation or the return to the pool shows it.
func killsRaw(t *testing.T) {
	inRaw := func(t *testing.T, conn *sql.Conn, f func()) {
		inRaw(t, conn, func(proxy any) {
			want(t, "there is a connection", proxy.(interface{ Raw() driver.Conn }).Raw() != nil, true)
			f()
		})
	}
	for _, test := range []struct {
		name  string
		ends  time.Duration // after the change
		check func(t *testing.T, conn *sql.Conn, change func())
	}{
		{"callback in progress", patience, func(t *testing.T, conn *sql.Conn, change func()) {
			inRaw(t, conn, func() {
				change()
				time.Sleep(2 * patience)
			})
			mustBeKilled(t, "the next operation", insert(conn))
		}},
		{"callback has returned", patience, func(t *testing.T, conn *sql.Conn, change func()) {
			inRaw(t, conn, func() {})
			change()
			time.Sleep(2 * patience)
			mustBeKilled(t, "the next operation", insert(conn))
		}},
		{"next operation", 0, func(t *testing.T, conn *sql.Conn, change func()) {
			inRaw(t, conn, change)
			_, err := conn.ExecContext(t.Context(), "insert", special{"x"})
			mustBeKilled(t, "the next operation", err)
		}},
		{"next Raw", 0, func(t *testing.T, conn *sql.Conn, change func()) {
			inRaw(t, conn, change)
			want(t, "Raw of a killed connection", raw(t, conn), nil)
		}},
		{"returned to the pool", 0, func(t *testing.T, conn *sql.Conn, change func()) {
			inRaw(t, conn, change)
			conn.Close()
		}},
		{"returned to the pool by a bare driver", 0, func(t *testing.T, conn *sql.Conn, change func()) {
			inRaw(t, conn, change)
			conn.Close()
		}},
		{"operation between", 0, func(t *testing.T, conn *sql.Conn, change func()) {
			inRaw(t, conn, func() {})
			must(t, "exec", insert(conn))
			change()
		}},
		{"transaction", 0, func(t *testing.T, conn *sql.Conn, change func()) {
			tx := begin(t, conn)
			inRaw(t, conn, change)
			mustBeKilled(t, "Commit", tx.Commit())
		}},
	} {
		bubble(t, test.name, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			if strings.HasSuffix(test.name, "bare driver") {
				f.asConn = asBare
			}
			var closed time.Time
			f.onClose = onClose("1", func() { closed = time.Now() })
			db := open(t, ctxFake{f}, src, "forceKill=true")
			conn := take(t, db)
			var changed time.Time
			test.check(t, conn, func() { src.set("2"); changed = time.Now() })
			time.Sleep(2 * patience)
			synctest.Wait()
			want(t, "connections on the old value", f.liveOn("1"), 0)
			want(t, "time of the close after the change", closed.Sub(changed), test.ends)
			conn.Close()
			want(t, "value that the pool goes on with", ask(t, db), "2")
		})
	}

	t.Run("no change", func(t *testing.T) {
		f := newFake(t)
		db := open(t, ctxFake{f}, newSource("1"), "forceKill=true")
		for range 3 {
			conn := take(t, db)
			inRaw(t, conn, func() {})
			conn.Close()
		}
		want(t, "connections opened", f.opened.Load(), 1)
	})
}

// killsRows kills rows at each point of their reading,
// with a driver that answers a cancelled read with the end of the rows.
func killsRows(t *testing.T) {
	const calls = 12 // more than there are
	for _, during := range []bool{false, true} {
		for at := range calls {
			bubble(t, fmt.Sprintf("during a call=%t,call %d", during, at), func(t *testing.T) {
				f, src := newFake(t), newSource("1")
				f.rowCount = 3
				n, killed := 0, false
				kill := func() {
					src.set("2")
					synctest.Wait()
					killed = true
				}
				f.onCall = func(ctx context.Context, c *fakeConn, call string) error {
					if c.value != "1" {
						return nil
					}
					if ctx.Err() != nil {
						return io.EOF
					}
					if during && (strings.HasPrefix(call, "Next") || call == "HasNextResultSet") {
						if n++; n == at+1 {
							kill()
							<-ctx.Done()
							return io.EOF
						}
					}
					return nil
				}
				f.asRows = asTwoSets
				db := open(t, ctxFake{f}, src, "forceKill=true")
				rows := query(t, db, "select")
				reads, sets, step := 0, 1, 0
				between := func() {
					if !during && step == at {
						kill()
					}
					step++
				}
				for more := true; more; {
					between()
					for rows.Next() {
						reads++
						between()
					}
					between()
					if more = rows.NextResultSet(); more {
						sets++
					}
				}
				err := rows.Err()
				switch {
				case killed:
					if err == nil && reads == 4 && sets == 2 && !during {
						break // killed when the last row had been read and the rows closed
					}
					mustBeKilled(t, fmt.Sprintf("Rows.Err after %d rows, %d sets", reads, sets), err)
				case err != nil || reads != 4 || sets != 2:
					t.Errorf("have %d rows and %d sets, error %v", reads, sets, err)
				}
				rows.Close()
				want(t, "connections in use", db.Stats().InUse, 0)
			})
		}
	}
}

// TestKilledRowsOfRaw: who reads the driver's rows himself, in a Raw callback,
// does not take killed ones for complete either.
func TestKilledRowsOfRaw(t *testing.T) {
	for _, at := range []string{"before Next", "Next", "between the result sets", "NextResultSet"} {
		bubble(t, at, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			f.asRows = asTwoSets
			kill := func(ctx context.Context) error {
				src.set("2")
				<-ctx.Done()
				return io.EOF
			}
			f.onCall = onCall("1", at, kill)
			inRaw(t, take(t, open(t, ctxFake{f}, src, "forceKill=true")), func(c any) {
				rows, err := c.(driver.QueryerContext).QueryContext(t.Context(), "select", nil)
				must(t, "query", err)
				sets, dest := rows.(driver.RowsNextResultSet), make([]driver.Value, 1)
				switch at {
				case "before Next":
					src.set("2")
				case "between the result sets":
					must(t, "Next", rows.Next(dest))
					want(t, "Next", rows.Next(dest), io.EOF)
					src.set("2")
					want(t, "another result set", sets.HasNextResultSet(), true)
				}
				if at != "NextResultSet" {
					mustBeKilled(t, "Next", rows.Next(dest))
					mustBeKilled(t, "Next again", rows.Next(dest))
				}
				mustBeKilled(t, "NextResultSet", sets.NextResultSet())
				mustBeKilled(t, "NextResultSet again", sets.NextResultSet())
				mustBeKilled(t, "Close", rows.Close())
			})
		})
	}
}

// TestKilledRowsColumns: what database/sql asks about rows after the kill has
// an answer, and does not touch the closed connection.
func TestKilledRowsColumns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		f.rowCount = 3
		f.asRows = asTwoSets
		db := open(t, ctxFake{f}, src, "forceKill=true")
		rows := query(t, db, "select")
		rows.Next()
		src.set("2")
		synctest.Wait()
		mustSay(t, "Scan of the row that was read, into a wrong type", rows.Scan(new(time.Time)), `name "value"`)
		var v string
		must(t, "Scan of the row that was read", rows.Scan(&v))
		want(t, "value", v, "1")
		columns, err := rows.Columns()
		must(t, "Columns", err)
		want(t, "columns", fmt.Sprint(columns), "[value]")
		types, err := rows.ColumnTypes()
		must(t, "ColumnTypes", err)
		want(t, "types", len(types), 1)
		if rows.Next() {
			t.Error("killed rows go on")
		}
		mustBeKilled(t, "Rows.Err", rows.Err())
	})
}

// scansDuringCall: a Rows.Scan that fails asks the driver's rows for their
// columns without database/sql's lock on the connection, so possibly during
// another call on it. That must not make it seem idle.
func scansDuringCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, o, src := newFake(t), newObstacle("Exec insert"), newSource("1")
		f.onCall = o.onCall
		f.rowCount = 3
		db := open(t, ctxFake{f}, src, "forceKill=true")
		tx := begin(t, db)
		rows := query(t, tx, "select")
		rows.Next()
		o.armed.Store(true)
		done := make(chan error, 1)
		go func() { _, err := tx.Exec("insert"); done <- err }()
		ctx := receive(t, "the call begins", o.there)
		mustSay(t, "Scan into a wrong type", rows.Scan(new(time.Time)), `name "value"`)
		src.set("2")
		<-ctx.Done()
		synctest.Wait()
		want(t, "connections on the old value while the call unwinds", f.liveOn("1"), 1)
		o.returns <- driver.ErrBadConn
		mustBeKilled(t, "the call", receive(t, "the call returns", done))
		rows.Close()
		tx.Rollback()
		synctest.Wait()
		want(t, "connections on the old value in the end", f.liveOn("1"), 0)
	})
}

// TestKilledRowsContext: rows are interrupted through the context of their
// query, though another call on the connection came later.
func TestKilledRowsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		var cause error
		f.onCall = onCall("1", "Next", func(ctx context.Context) error {
			<-ctx.Done()
			cause = context.Cause(ctx)
			return ctx.Err()
		})
		tx := begin(t, open(t, ctxFake{f}, src, "forceKill=true"))
		defer tx.Rollback()
		rows := query(t, tx, "select")
		defer rows.Close()
		must(t, "exec", insert(tx))
		more := make(chan bool)
		go func() { more <- rows.Next() }()
		synctest.Wait()
		start := time.Now()
		src.set("2")
		want(t, "another row", <-more, false)
		want(t, "time until Next returned", time.Since(start), 0)
		want(t, "cause of the context's end", cause, hotload.ErrKilled)
		mustBeKilled(t, "the rows", rows.Err())
	})
}

// A cursorConn is a connection whose Execs set a cursor that heeds their context.
type cursorConn struct{ *fakeConn }

func asCursors(c *fakeConn) driver.Conn { return cursorConn{c} }

func (c cursorConn) CheckNamedValue(nv *driver.NamedValue) error { return nil }

func (c cursorConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	if err := c.call(ctx, "Exec "+query); err != nil {
		return nil, err
	}
	*args[0].Value.(sql.Out).Dest.(*driver.Rows) = &fakeRows{c: c.fakeConn, ctx: ctx, left: 1}
	return fakeResult{c.fakeConn}, nil
}

func (c cursorConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	st, err := c.fakeConn.PrepareContext(ctx, query)
	return cursorStmt{st.(*fakeStmt), c}, err
}

type cursorStmt struct {
	*fakeStmt
	conn cursorConn
}

func (s cursorStmt) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	return s.conn.ExecContext(ctx, s.query, args)
}

// A cursor that an Exec has set can be read until its connection is returned to
// the pool, where its context ends, or until it is taken again, under a layer
// without IsValid. An Exec that fails says so.
func TestOutCursor(t *testing.T) {
	for _, options := range []string{"", "forceKill=true"} {
		for _, prepared := range []bool{false, true} {
			t.Run(fmt.Sprintf("options=%s,prepared=%t", options, prepared), func(t *testing.T) {
				f := newFake(t)
				f.asConn = asCursors
				f.onCall = onCall("1", "Exec fail ?", func(context.Context) error { return errDead })
				conn := take(t, open(t, f, newSource("1"), options))
				exec := func(query string, dest *driver.Rows) error {
					if prepared {
						_, err := prepare(t, conn, query).Exec(sql.Out{Dest: dest})
						return err
					}
					_, err := conn.ExecContext(bg, query, sql.Out{Dest: dest})
					return err
				}
				var cursor driver.Rows
				want(t, "error of an Exec that fails", exec("fail ?", &cursor), error(errDead))
				must(t, "exec", exec("open ?", &cursor))
				must(t, "Next of the cursor", cursor.Next(make([]driver.Value, 1)))
				must(t, "another call", conn.PingContext(t.Context()))
				want(t, "end of the cursor", cursor.Next(nil), io.EOF)
				must(t, "Conn.Close", conn.Close())
				if options != "" {
					want(t, "its context in the pool", cursor.(*fakeRows).ctx.Err(), context.Canceled)
				}
			})
		}
	}
	t.Run("layer without IsValid", func(t *testing.T) {
		f := newFake(t)
		f.asConn = asCursors
		db := around(t, f, newSource("1"), "forceKill=true")
		var cursor driver.Rows
		_, err := db.Exec("open ?", sql.Out{Dest: &cursor})
		must(t, "exec", err)
		ask(t, db)
		want(t, "the cursor's context", cursor.(*fakeRows).ctx.Err(), context.Canceled)
	})
}

// sparesTheValueInForce proves: nothing on the value in force is killed while
// the kill of what is on the old one is under way.
func sparesTheValueInForce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		accepted, goOn := make(chan bool), make(chan bool)
		logTo(t, logHook(func(event string) { // the new value is in force then, and nothing is killed yet
			if event == "value accepted 2" {
				accepted <- true
				<-goOn
			}
		}))
		f, src := newFake(t), newSource("1")
		db := open(t, ctxFake{f}, src, "forceKill=true")
		db.SetMaxOpenConns(4)
		db.SetMaxIdleConns(4)
		doomed, returned, idle := begin(t, db), begin(t, db), begin(t, db)
		fresh := take(t, db)
		must(t, "commit", idle.Commit())

		change := make(chan bool)
		go func() {
			src.set("2")
			close(change)
		}()
		<-accepted
		redialled := begin(t, db) // on what was idle
		want(t, "value of the connection dialled anew", ask(t, redialled), "2")
		want(t, "value of the sql.Conn that was not used", ask(t, fresh), "2")
		must(t, "commit on the old value", returned.Commit())
		reused := begin(t, db)
		want(t, "value of the connection used again", ask(t, reused), "2")
		must(t, "work on the old value before the kill", insert(doomed))
		close(goOn)
		<-change
		synctest.Wait()

		want(t, "connections on the old value", f.liveOn("1"), 0)
		mustBeKilled(t, "Commit on the old value", doomed.Commit())
		must(t, "Commit of the connection dialled anew", redialled.Commit())
		must(t, "Commit of the connection used again", reused.Commit())
		want(t, "value of the sql.Conn", ask(t, fresh), "2")
		must(t, "Conn.Close", fresh.Close())
		want(t, "connections opened with the new value", f.opened.Load(), 4+3)
	})
}

// awaitsStmtClose proves: a Stmt.Close on a pooled connection is waited for like
// any call in progress, and so not for ever.
func awaitsStmtClose(t *testing.T) {
	for _, row := range []struct {
		name  string
		takes time.Duration // from the kill
		open  int           // connections on the old value just before it returns
	}{
		{"returns", patience - moment, 1},
		{"hangs", time.Minute, 0},
	} {
		bubble(t, row.name, func(t *testing.T) {
			f, o, src := newFake(t), newObstacle("Close select"), newSource("1")
			f.onCall = o.onCall
			f.lenient.Store(row.open == 0)
			db := open(t, ctxFake{f}, src, "forceKill=true")
			stmt := prepare(t, db, "select")
			o.armed.Store(true)
			done := make(chan error, 1)
			go func() { done <- stmt.Close() }()
			receive(t, "the Close begins", o.there)
			src.set("2")
			time.Sleep(row.takes)
			want(t, "connections on the old value", f.liveOn("1"), row.open)
			o.returns <- nil
			must(t, "Stmt.Close", receive(t, "Stmt.Close returns", done))
			synctest.Wait()
			want(t, "connections on the old value", f.liveOn("1"), 0)
			want(t, "value that the pool goes on with", ask(t, db), "2")
		})
	}
}

// killsAtDeadline proves: with a duration, what is in use lives until its own
// generation's time is up, and not a moment longer. Each row is a story: "set B"
// is a change, "begin 1 B" a transaction called 1, which has to be on B, "wait 10"
// lets so many seconds pass, "lives 1", "dead 1" and "commit 1" say what becomes
// of it, and "close" is DB.Close, which has to take no time. The value at first is
// A, and forceKill=30s.
func killsAtDeadline(t *testing.T) {
	for _, row := range []struct{ name, story string }{
		{"lives a moment before, is dead on time", "begin 1 A, set B, wait 29.999, lives 1, wait 0.001, dead 1"},
		{"what finishes in time is not harmed, and what is in force lives",
			"begin 1 A, set B, wait 29.999, commit 1, begin 2 B, wait 60, lives 2, commit 2"},
		{"each generation has its own", "begin 1 A, set B, begin 2 B, wait 10, set C, begin 3 C, wait 10, set D, begin 4 D, " +
			"wait 9.999, lives 1, wait 0.001, dead 1, lives 2, wait 9.999, lives 2, wait 0.001, dead 2, " +
			"wait 9.999, lives 3, wait 0.001, dead 3, wait 300, lives 4, commit 4"},
		{"the old value is in force again at the deadline", "begin 1 A, set B, begin 2 B, wait 15, set A, begin 3 A, wait 15, lives 1, " +
			"wait 14.999, lives 2, wait 0.001, dead 2, wait 300, lives 1, set C, wait 29.999, lives 1, lives 3, wait 0.001, dead 1, dead 3"},
		{"the old value was in force again, but not at the deadline",
			"begin 1 A, set B, wait 10, set A, begin 2 A, wait 10, set C, wait 10, dead 1, lives 2, wait 20, dead 2"},
		{"DB.Close during it leaves nothing behind", "begin 1 A, set B, begin 2 B, set C, begin 3 C, wait 15, close, wait 300, " +
			"lives 1, lives 2, lives 3, commit 1, commit 2, commit 3"},
		{"DB.Close when it has passed with the old value back in force", "begin 1 A, set B, set A, wait 60, close, wait 60, lives 1, commit 1"},
	} {
		bubble(t, row.name, func(t *testing.T) {
			log := collect(t)
			f, src := newFake(t), newSource("A")
			db := open(t, ctxFake{f}, src, "forceKill=30s")
			db.SetMaxIdleConns(0)
			txs, dead, last := make(map[string]*sql.Tx), 0, "A"
			for _, step := range strings.Split(row.story, ", ") {
				words := strings.Fields(step + " _ _")
				name := words[1]
				switch tx := txs[name]; words[0] {
				case "set":
					last = name
					src.set(name)
				case "begin":
					txs[name] = begin(t, db)
					want(t, step, ask(t, txs[name]), words[2])
				case "wait":
					d, err := time.ParseDuration(name + "s")
					must(t, step, err)
					time.Sleep(d)
					synctest.Wait()
				case "lives":
					must(t, step, insert(tx))
				case "dead":
					dead++
					mustBeKilled(t, step, insert(tx))
					mustBeKilled(t, step, tx.Commit())
				case "commit":
					must(t, step, tx.Commit())
				case "close":
					start := time.Now()
					must(t, step, db.Close())
					want(t, "time that DB.Close took", time.Since(start).Truncate(moment), 0)
				}
			}
			want(t, "connections killed in\n"+log.String(), log.count("hotload: connections killed", "killed=1"), dead)
			synctest.Wait()
			want(t, "connections that are open and on an old value", len(f.live())-f.liveOn(last), 0)
		})
	}
	bubble(t, "a call in progress", func(t *testing.T) {
		f, o, src := newFake(t), newObstacle("Exec insert"), newSource("1")
		f.onCall = o.onCall
		db := open(t, ctxFake{f}, src, "forceKill=30s")
		o.armed.Store(true)
		done := make(chan error, 1)
		go func() { done <- insert(db) }()
		ctx := receive(t, "the call begins", o.there)
		src.set("2")
		time.Sleep(30*time.Second - time.Nanosecond)
		must(t, "context of a call before the deadline", ctx.Err())
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		want(t, "cause of the end of the call's context", context.Cause(ctx), hotload.ErrKilled)
		o.returns <- ctx.Err()
		mustBeKilled(t, "the call", <-done)
	})
	bubble(t, "a drained generation has none", func(t *testing.T) {
		src := newSource("1")
		db := open(t, newFake(t), src, "forceKill=1h")
		ask(t, db)
		synctest.Wait()
		before := runtime.NumGoroutine()
		for _, value := range []string{"2", "3", "2"} {
			tx := begin(t, db)
			src.set(value)
			must(t, "Commit", tx.Commit())
			synctest.Wait()
		}
		await(t, "no more goroutines than before the changes", func() bool { return runtime.NumGoroutine() <= before })
	})
}

// TestNoKill: by default, and with forceKill=false, nothing is ever killed.
func TestNoKill(t *testing.T) {
	for _, options := range []string{"", "forceKill=false"} {
		bubble(t, "options="+options, func(t *testing.T) {
			f, o, src := newFake(t), newObstacle("Exec long"), newSource("1")
			f.onCall = o.onCall
			db := open(t, ctxFake{f}, src, options)
			tx := begin(t, db)
			o.armed.Store(true)
			done := make(chan error, 1)
			go func() { _, err := db.Exec("long"); done <- err }()
			ctx := receive(t, "the call begins", o.there)
			for _, value := range []string{"2", "3", "1", "4"} {
				src.set(value)
				time.Sleep(24 * time.Hour)
			}
			must(t, "context of a call in progress", ctx.Err())
			o.returns <- nil
			must(t, "a call in progress", receive(t, "the call returns", done))
			want(t, "value of the transaction", ask(t, tx), "1")
			must(t, "Commit", tx.Commit())
		})
	}
}

// liteBegin begins a transaction, which ends with the test at the latest: a
// test that fails in a bubble leaves nothing behind.
func liteBegin(t *testing.T, db interface {
	BeginTx(context.Context, *sql.TxOptions) (*sql.Tx, error)
}) *sql.Tx {
	t.Helper()
	tx, err := db.BeginTx(context.Background(), nil)
	must(t, "begin", err)
	t.Cleanup(func() { tx.Rollback() })
	return tx
}

// liteQuery begins a query, whose rows are closed with the test at the latest.
func liteQuery(t *testing.T, query func() (*sql.Rows, error)) *sql.Rows {
	t.Helper()
	rows, err := query()
	must(t, "query", err)
	t.Cleanup(func() { rows.Close() })
	return rows
}

// liteGo makes a call in a goroutine. The test waits for it before all else when
// it ends: database/sql's lock on a connection, which the call holds, keeps the
// time of a bubble from passing.
func liteGo(t *testing.T, call func()) (done chan struct{}) {
	done = make(chan struct{})
	go func() {
		defer close(done)
		call()
	}()
	t.Cleanup(func() { <-done })
	return done
}

// A liteReader begins to read rows in one of the ways that there are, and
// returns what the program does when it has read them.
type liteReader struct {
	name string
	read func(t *testing.T, db *sql.DB) (*sql.Rows, func())
}

var liteReaders = []liteReader{
	{"query", func(t *testing.T, db *sql.DB) (*sql.Rows, func()) {
		return liteQuery(t, func() (*sql.Rows, error) { return db.Query("select") }), func() {}
	}},
	{"prepared statement", func(t *testing.T, db *sql.DB) (*sql.Rows, func()) {
		stmt, err := db.Prepare("select")
		must(t, "prepare", err)
		return liteQuery(t, func() (*sql.Rows, error) { return stmt.Query() }), func() { stmt.Close() }
	}},
	{"transaction that has written", func(t *testing.T, db *sql.DB) (*sql.Rows, func()) {
		tx := liteBegin(t, db)
		_, err := tx.Exec("write")
		must(t, "exec", err)
		rows := liteQuery(t, func() (*sql.Rows, error) { return tx.Query("select") })
		return rows, func() { mustBeKilled(t, "Commit", tx.Commit()) }
	}},
	{"prepared statement in a transaction that has written", func(t *testing.T, db *sql.DB) (*sql.Rows, func()) {
		tx := liteBegin(t, db)
		stmt, err := tx.Prepare("select")
		must(t, "prepare", err)
		_, err = tx.Exec("write")
		must(t, "exec", err)
		rows := liteQuery(t, func() (*sql.Rows, error) { return stmt.Query() })
		return rows, func() { mustBeKilled(t, "Commit", tx.Commit()) }
	}},
	{"sql.Conn with two statements and other rows", func(t *testing.T, db *sql.DB) (*sql.Rows, func()) {
		conn, err := db.Conn(t.Context())
		must(t, "conn", err)
		t.Cleanup(func() { conn.Close() })
		stmt, err := conn.PrepareContext(t.Context(), "select")
		must(t, "prepare", err)
		_, err = conn.PrepareContext(t.Context(), "other")
		must(t, "prepare", err)
		tx := liteBegin(t, conn)
		liteQuery(t, func() (*sql.Rows, error) { return tx.Query("other rows") })
		rows := liteQuery(t, func() (*sql.Rows, error) { return tx.Stmt(stmt).Query() })
		return rows, func() { tx.Rollback(); conn.Close() }
	}},
}

// A row that was read before a kill stays what it is: in its columns when they
// are scanned after the kill, in what was scanned before it, and in RawBytes
// until the next Next.
func TestKilledRowStays(t *testing.T) {
	type target struct {
		name string
		new  func() (dest any, have func() string)
	}
	targets := []target{
		{"string", func() (any, func() string) { v := new(string); return v, func() string { return *v } }},
		{"[]byte", func() (any, func() string) { v := new([]byte); return v, func() string { return string(*v) } }},
		{"any", func() (any, func() string) { v := new(any); return v, func() string { return fmt.Sprintf("%s", *v) } }},
		{"RawBytes", func() (any, func() string) { v := new(sql.RawBytes); return v, func() string { return string(*v) } }},
		{"Null", func() (any, func() string) { v := new(sql.Null[string]); return v, func() string { return v.V } }},
	}
	for _, reader := range liteReaders {
		for _, target := range targets {
			for _, set := range []int{0, 1} {
				for _, scanned := range []bool{false, true} {
					bubble(t, fmt.Sprintf("%s into %s,set=%d,scanned before=%t", reader.name, target.name, set, scanned), func(t *testing.T) {
						f, src := newLite(t), newSource("1")
						f.sets, f.untidy = 2, true
						db := open(t, liteCtxFake{f}, src, "forceKill=true")
						rows, end := reader.read(t, db)
						for range set {
							want(t, "another result set", rows.NextResultSet(), true)
						}
						want(t, "a first row", rows.Next(), true)
						want(t, "a second row", rows.Next(), true)
						text, haveText := target.new()
						number, haveNumber := target.new()
						scan := func() { must(t, "Scan", rows.Scan(text, number)) }
						check := func(when string) {
							t.Helper()
							wantText, wantNumber := liteRow("1", set, 2)
							want(t, "column text "+when, haveText(), wantText)
							want(t, "column number "+when, haveNumber(), wantNumber)
						}
						if scanned {
							scan()
							check("before the kill")
						}
						src.set("2")
						synctest.Wait()
						want(t, "connections closed", f.closed(), 1)
						if !scanned {
							scan()
						}
						check("after the kill")
						want(t, "a row after the kill", rows.Next(), false)
						mustBeKilled(t, "Rows.Err", rows.Err())
						rows.Close()
						end()
					})
				}
			}
		}
	}
}

// A row also stays what it is when the last resort closes the connection while
// another call is in progress.
func TestKilledRowStaysAtLastResort(t *testing.T) {
	for _, scanned := range []bool{false, true} {
		bubble(t, fmt.Sprintf("scanned before=%t", scanned), func(t *testing.T) {
			f, src := newLite(t), newSource("1")
			f.onCall = func(_ context.Context, _ *liteConn, call string) error {
				if call == "Exec deaf" {
					time.Sleep(3 * patience)
				}
				return nil
			}
			db := open(t, liteCtxFake{f}, src, "forceKill=true")
			tx := liteBegin(t, db)
			rows := liteQuery(t, func() (*sql.Rows, error) { return tx.Query("select") })
			want(t, "a row", rows.Next(), true)
			var text, number sql.RawBytes
			if scanned {
				must(t, "Scan", rows.Scan(&text, &number))
			}
			done := liteGo(t, func() { tx.Exec("deaf") })
			synctest.Wait()
			src.set("2")
			time.Sleep(2 * patience)
			want(t, "connections closed during a call", f.lastResorts(), 1)
			check := func(when string) {
				t.Helper()
				wantText, wantNumber := liteRow("1", 0, 1)
				want(t, "column text "+when, string(text), wantText)
				want(t, "column number "+when, string(number), wantNumber)
			}
			if !scanned {
				must(t, "Scan", rows.Scan(&text, &number))
			}
			check("after the last resort")
			<-done
			synctest.Wait()
			check("after the call has returned")
			want(t, "a row after the kill", rows.Next(), false)
			mustBeKilled(t, "Rows.Err", rows.Err())
			tx.Rollback()
		})
	}
}

// A row that comes after the last resort is no row: it was read from a connection
// that was closed meanwhile.
func TestNoRowAfterLastResort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src := newLite(t), newSource("1")
		f.heedless = true
		f.onCall = func(_ context.Context, c *liteConn, call string) error {
			if call == "Next" {
				time.Sleep(3 * patience)
			}
			return nil
		}
		db := open(t, liteCtxFake{f}, src, "forceKill=true")
		rows := liteQuery(t, func() (*sql.Rows, error) { return db.Query("select") })
		done := liteGo(t, func() {
			want(t, "a row", rows.Next(), false)
			mustBeKilled(t, "Rows.Err", rows.Err())
		})
		synctest.Wait()
		src.set("2")
		<-done
		want(t, "connections closed during a call", f.lastResorts(), 1)
	})
}

// With forceKill=true what is in use ends at the change, even if the value comes
// back in the same instant: only a time of grace can save it.
func TestKillThoughValueComesBack(t *testing.T) {
	for range 100 {
		synctest.Test(t, func(t *testing.T) {
			src := newSource("1")
			tx := begin(t, open(t, newFake(t), src, "forceKill=true"))
			src.values <- "2"
			src.values <- "1"
			synctest.Wait()
			mustBeKilled(t, "exec", insert(tx))
		})
	}
}

// A row that comes in the instant of the last resort is the right one, or there
// is an error: it is copied before the driver's Close can overwrite it. Run it
// with -race, which sees what chance does not show.
func TestKilledRowAtTheLastMoment(t *testing.T) {
	for range 300 {
		synctest.Test(t, func(t *testing.T) {
			f, src := newLite(t), newSource("1")
			f.heedless = true
			f.untidy = true // the call is over in the fake, and not yet in hotload
			f.onCall = func(_ context.Context, c *liteConn, call string) error {
				if call == "Next" && c.value == "1" {
					time.Sleep(patience)
				}
				return nil
			}
			db := open(t, liteCtxFake{f}, src, "forceKill=true")
			rows := liteQuery(t, func() (*sql.Rows, error) { return db.Query("select") })
			liteGo(t, func() {
				if !rows.Next() {
					mustBeKilled(t, "Rows.Err", rows.Err())
					return
				}
				var text, number string
				if err := rows.Scan(&text, &number); err != nil {
					mustBeKilled(t, "Scan", err)
					return
				}
				wantText, wantNumber := liteRow("1", 0, 1)
				if text != wantText || number != wantNumber {
					t.Errorf("have row %q, %q, want %q, %q", text, number, wantText, wantNumber)
				}
			})
			synctest.Wait()
			src.set("2")
		})
	}
}

// A driver's rows reach the program as they are: nil stays nil, empty stays
// empty, and a value that is no []byte stays of its type.
func TestKillKeepsValues(t *testing.T) {
	values := []driver.Value{[]byte{}, []byte(nil), nil, []byte("text"), []byte{}, "string", int64(7), []byte("more")}
	for _, options := range []string{"", "forceKill=true"} {
		bubble(t, "options="+options, func(t *testing.T) {
			db := open(t, edgeFake{ctxFake{newFake(t)}, values}, newSource("1"), options)
			rows := liteQuery(t, func() (*sql.Rows, error) { return db.Query("select") })
			for row := range 3 { // also where a buffer is there from the row before
				want(t, "a row", rows.Next(), true)
				have := make([]any, len(values))
				raw := make([]sql.RawBytes, len(values))
				for i, to := range [][]any{pointers(have), pointers(raw)} {
					must(t, fmt.Sprintf("Scan %d", i), rows.Scan(to...))
				}
				for i, v := range values {
					want(t, fmt.Sprintf("row %d, column %d", row, i), fmt.Sprintf("%#v", have[i]), fmt.Sprintf("%#v", v))
					if b, ok := v.([]byte); ok {
						want(t, fmt.Sprintf("row %d, column %d as RawBytes", row, i), fmt.Sprintf("%#v", []byte(raw[i])), fmt.Sprintf("%#v", b))
					}
				}
			}
		})
	}
}

func pointers[T any](values []T) (p []any) {
	for i := range values {
		p = append(p, &values[i])
	}
	return p
}

// An edgeFake's rows have the columns that the test says.
type edgeFake struct {
	ctxFake
	values []driver.Value
}

type edgeConnector struct {
	*fakeConnector
	values []driver.Value
}

type edgeConn struct {
	*fakeConn
	values []driver.Value
}

type edgeRows struct {
	driver.Rows
	values []driver.Value
}

func (d edgeFake) OpenConnector(value string) (driver.Connector, error) {
	return edgeConnector{&fakeConnector{f: d.fake, value: value}, d.values}, nil
}

func (c edgeConnector) Connect(ctx context.Context) (driver.Conn, error) {
	ci, err := c.fakeConnector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return edgeConn{ci.(*fakeConn), c.values}, nil
}

func (c edgeConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	r, err := c.fakeConn.QueryContext(ctx, query, args)
	return edgeRows{r, c.values}, err
}

func (r edgeRows) Columns() []string { return make([]string, len(r.values)) }

func (r edgeRows) Next(dest []driver.Value) error {
	copy(dest, r.values)
	return nil
}

// What a kill ends is released: the driver's rows are closed, then its
// statements, then the connection. The program need not do anything for it.
func TestKillReleases(t *testing.T) {
	for _, options := range []string{"forceKill=true", "forceKill=1m"} {
		for _, next := range []int{0, 1, 4} {
			for _, reader := range liteReaders {
				if next == 4 && reader.name == "query" || next == 4 && reader.name == "prepared statement" {
					continue // database/sql has closed the rows and returned the connection
				}
				bubble(t, fmt.Sprintf("%s,%s,read=%d", options, reader.name, next), func(t *testing.T) {
					f, src := newLite(t), newSource("1")
					db := open(t, liteCtxFake{f}, src, options)
					rows, end := reader.read(t, db)
					for range next {
						rows.Next()
					}
					src.set("2")
					time.Sleep(time.Minute)
					synctest.Wait()
					want(t, "server connections of the old value", f.held("1"), 0)
					want(t, "the old file is locked", f.locked("1"), false)
					want(t, "connections closed during a call", f.lastResorts(), 0)
					rows.Close()
					end()
					must(t, "DB.Close", db.Close())
					want(t, "server connections", f.held("1")+f.held("2"), 0)
				})
			}
		}
	}
}

// A kill during a call releases all when the call has returned: rows that are
// open beside it, statements, and the connection, each once and in this order.
// A call that does not return has its connection closed under it; what that had
// to leave open is closed when the call returns at last.
func TestKillReleasesAfterCall(t *testing.T) {
	type during struct {
		call string
		make func(t *testing.T, db *sql.DB, arm func()) // makes the call once it is armed
	}
	inTx := func(do func(tx *sql.Tx, stmt *sql.Stmt, rows *sql.Rows)) func(*testing.T, *sql.DB, func()) {
		return func(t *testing.T, db *sql.DB, begun func()) {
			tx := liteBegin(t, db)
			_, err := tx.Exec("write")
			must(t, "exec", err)
			stmt, err := tx.Prepare("select")
			must(t, "prepare", err)
			rows := liteQuery(t, func() (*sql.Rows, error) { return stmt.Query() })
			want(t, "a row", rows.Next(), true)
			begun()
			do(tx, stmt, rows)
		}
	}
	for _, during := range []during{
		{"Exec slow", inTx(func(tx *sql.Tx, _ *sql.Stmt, _ *sql.Rows) { tx.Exec("slow") })},
		{"Query slow", inTx(func(tx *sql.Tx, _ *sql.Stmt, _ *sql.Rows) {
			if rows, err := tx.Query("slow"); err == nil {
				rows.Close()
			}
		})},
		{"Prepare slow", inTx(func(tx *sql.Tx, _ *sql.Stmt, _ *sql.Rows) {
			if stmt, err := tx.Prepare("slow"); err == nil {
				stmt.Close()
			}
		})},
		{"Query select", inTx(func(_ *sql.Tx, stmt *sql.Stmt, _ *sql.Rows) {
			if rows, err := stmt.Query(); err == nil {
				rows.Close()
			}
		})},
		{"Next", inTx(func(_ *sql.Tx, _ *sql.Stmt, rows *sql.Rows) { rows.Next() })},
		{"Close rows", inTx(func(_ *sql.Tx, _ *sql.Stmt, rows *sql.Rows) { rows.Close() })},
		{"Commit", inTx(func(tx *sql.Tx, _ *sql.Stmt, _ *sql.Rows) { tx.Commit() })},
	} {
		for _, takes := range []time.Duration{patience / 2, 5 * patience} {
			for _, fails := range []bool{false, true} {
				bubble(t, fmt.Sprintf("%s takes %v,fails=%t", during.call, takes, fails), func(t *testing.T) {
					f, src := newLite(t), newSource("1")
					f.heedless = true
					armed := false
					f.onCall = func(_ context.Context, c *liteConn, call string) error {
						if call != during.call || !armed || c.value != "1" {
							return nil
						}
						armed = false
						if time.Sleep(takes); fails {
							return driver.ErrBadConn
						}
						return nil
					}
					db := open(t, liteCtxFake{f}, src, "forceKill=true")
					done := liteGo(t, func() { during.make(t, db, func() { armed = true }) })
					synctest.Wait()
					src.set("2")
					synctest.Wait()
					if f.held("1") != 1 {
						t.Errorf("the connection is gone while the call is in progress, and its patience lasts")
					}
					<-done
					synctest.Wait()
					want(t, "connections closed during a call", f.lastResorts(), map[bool]int{true: 1}[takes > patience])
					want(t, "server connections of the old value when the call has returned", f.held("1"), 0)
					want(t, "the old file is locked", f.locked("1"), false)
				})
			}
		}
	}
}

// Rows and statements of a killed connection that are slow to close do not keep
// it open for more than a second, but are closed, each once.
func TestKillReleasesSlowly(t *testing.T) {
	for _, slow := range []string{"Close rows", "Close statement select"} {
		bubble(t, slow, func(t *testing.T) {
			f, src := newLite(t), newSource("1")
			f.onCall = func(_ context.Context, c *liteConn, call string) error {
				if call == slow && c.value == "1" {
					time.Sleep(5 * patience)
				}
				return nil
			}
			db := open(t, liteCtxFake{f}, src, "forceKill=true")
			tx := liteBegin(t, db)
			var all []*sql.Rows
			for range 2 {
				stmt, err := tx.Prepare("select")
				must(t, "prepare", err)
				all = append(all, liteQuery(t, func() (*sql.Rows, error) { return stmt.Query() }))
			}
			src.set("2")
			time.Sleep(patience + patience/2)
			want(t, "connections closed after a second and a half", f.closed(), 1)
			for _, rows := range all {
				rows.Close()
			}
			time.Sleep(time.Minute)
			want(t, "server connections of the old value in the end", f.held("1"), 0)
		})
	}
}

// Rows that a program has from the driver's interface, in a Raw callback, are
// released by a kill as others are.
func TestKillReleasesRowsOfRaw(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src := newLite(t), newSource("1")
		db := open(t, liteCtxFake{f}, src, "forceKill=true")
		conn, err := db.Conn(t.Context())
		must(t, "conn", err)
		defer conn.Close()
		must(t, "Raw", conn.Raw(func(dc any) error {
			rows, err := dc.(driver.QueryerContext).QueryContext(t.Context(), "select", nil)
			must(t, "query", err)
			dest := make([]driver.Value, 2)
			must(t, "Next", rows.Next(dest))
			src.set("2")
			synctest.Wait()
			want(t, "server connections of the old value", f.held("1"), 0)
			text, _ := liteRow("1", 0, 1)
			want(t, "the row that was read", fmt.Sprintf("%s", dest[0]), text)
			rows.Close()
			return nil
		}))
	})
}

// A Raw callback counts as a call in progress whose end cannot be seen. Rows
// that are open beside it are released when the connection is returned.
func TestKillReleasesAfterRaw(t *testing.T) {
	for _, uses := range []bool{false, true} {
		bubble(t, fmt.Sprintf("rows are used after it=%t", uses), func(t *testing.T) {
			f, src := newLite(t), newSource("1")
			f.untidy = true // the fake cannot see the call in progress either
			db := open(t, liteCtxFake{f}, src, "forceKill=true")
			conn, err := db.Conn(t.Context())
			must(t, "conn", err)
			t.Cleanup(func() { conn.Close() }) // after the transaction's end
			tx := liteBegin(t, conn)
			_, err = tx.Exec("write")
			must(t, "exec", err)
			rows := liteQuery(t, func() (*sql.Rows, error) { return tx.Query("select") })
			want(t, "a row", rows.Next(), true)
			must(t, "Raw", conn.Raw(func(dc any) error {
				dc.(interface{ Raw() driver.Conn }).Raw()
				return nil
			}))
			src.set("2")
			time.Sleep(2 * patience)
			want(t, "connections closed", f.closed(), 1)
			if uses {
				want(t, "a row after the kill", rows.Next(), false)
				mustBeKilled(t, "Rows.Err", rows.Err())
			} else {
				rows.Close()
				mustBeKilled(t, "Commit", tx.Commit())
				conn.Close()
			}
			synctest.Wait()
			want(t, "server connections of the old value", f.held("1"), 0)
			want(t, "the old file is locked", f.locked("1"), false)
		})
	}
}

// After the last resort a driver gets no call, no Rollback for example, save the
// Close of rows and statements when the call has returned: those that were there
// before, and those that came too late, or they would keep the file open.
func TestNothingAfterLastResort(t *testing.T) {
	for _, row := range []struct {
		late string
		do   func(t *testing.T, conn *sql.Conn)
	}{
		{"Prepare late", func(t *testing.T, conn *sql.Conn) { conn.PrepareContext(t.Context(), "late") }},
		{"Begin", func(t *testing.T, conn *sql.Conn) { conn.BeginTx(t.Context(), nil) }},
		{"Exec exec", func(t *testing.T, conn *sql.Conn) { conn.ExecContext(t.Context(), "exec") }},
		{"Prepare exec", func(t *testing.T, conn *sql.Conn) { conn.ExecContext(t.Context(), "exec") }},
		{"Close statement exec", func(t *testing.T, conn *sql.Conn) { conn.ExecContext(t.Context(), "exec") }},
	} {
		for _, takes := range []time.Duration{patience / 2, 3 * patience} {
			bubble(t, fmt.Sprintf("%s takes %v", row.late, takes), func(t *testing.T) {
				f, src := newLite(t), newSource("1")
				armed, closes := false, 0
				f.onCall = func(_ context.Context, c *liteConn, call string) error {
					switch {
					case c.value != "1":
					case call == row.late && armed:
						armed = false
						time.Sleep(takes)
					case call == "Close statement early":
						closes++
					}
					return nil
				}
				db := open(t, f, src, "forceKill=true")
				conn, err := db.Conn(t.Context())
				must(t, "conn", err)
				defer conn.Close()
				_, err = conn.PrepareContext(t.Context(), "early")
				must(t, "prepare", err)
				armed = true
				done := liteGo(t, func() { row.do(t, conn) })
				synctest.Wait()
				want(t, row.late+" is in progress", armed, false)
				src.set("2")
				<-done
				synctest.Wait()
				want(t, "connections closed", f.closed(), 1) // the fake polices the rest
				want(t, "connections closed during a call", f.lastResorts(), map[bool]int{true: 1}[takes > patience])
				want(t, "Closes of the statement that was there before", closes, 1)
				want(t, "server connections of the old value", f.held("1"), 0)
			})
		}
	}
}

// Two SQLite files in turns, under load: no file is held when nobody uses it,
// and nobody meets a lock of a transaction that was killed.
func TestKillStormOverFiles(t *testing.T) {
	for _, maxOpen := range []int{1, 4} {
		for _, plain := range []bool{false, true} {
			// Not in a bubble: database/sql's locks would keep its time from passing.
			t.Run(fmt.Sprintf("max=%d,contexts=%t", maxOpen, !plain), func(t *testing.T) {
				t.Parallel()
				f, src := newLite(t), newSource("0")
				f.untidy = true // a last resort can come when a call is over in the fake, and not yet in hotload
				var calls atomic.Uint64
				f.onCall = func(ctx context.Context, _ *liteConn, call string) error {
					n := calls.Add(1)
					switch {
					case n%7 == 0:
						select {
						case <-time.After(time.Duration(n%5) * time.Millisecond):
						case <-ctx.Done():
						}
					case (n == 500 || n == 1000) && call != "Close connection":
						time.Sleep(patience + patience/5) // deaf
					}
					return nil
				}
				var d driver.Driver = liteCtxFake{f}
				if plain {
					d = f
				}
				db := open(t, d, src, "forceKill=true")
				db.SetMaxOpenConns(maxOpen)
				var done atomic.Bool
				var killed, good atomic.Int64
				see := func(what string, err error) bool {
					switch {
					case err == nil:
						good.Add(1)
					case errors.Is(err, hotload.ErrKilled):
						killed.Add(1)
					case errors.Is(err, context.Canceled) || errors.Is(err, sql.ErrTxDone):
					default:
						t.Errorf("%s: %v", what, err)
					}
					return err == nil
				}
				read := func(query func() (*sql.Rows, error)) {
					rows, err := query()
					if !see("query", err) {
						return
					}
					defer rows.Close()
					var value string
					for n := 1; rows.Next(); n++ {
						var text, number string
						if err := rows.Scan(&text, &number); err != nil {
							t.Errorf("Scan: %v", err)
							return
						}
						if n == 1 {
							value = strings.TrimSuffix(strings.TrimPrefix(text, "text of "), "+")
						}
						wantText, wantNumber := liteRow(value, 0, n)
						if text != wantText || number != wantNumber {
							t.Errorf("row %d: have %q, %q, want %q, %q", n, text, number, wantText, wantNumber)
						}
						if n == 2 && calls.Load()%3 == 0 {
							return
						}
					}
					see("rows", rows.Err())
				}
				var wg sync.WaitGroup
				for worker := range 6 {
					wg.Go(func() {
						for !done.Load() {
							switch worker % 3 {
							case 0:
								read(func() (*sql.Rows, error) { return db.Query("select") })
							case 1:
								tx, err := db.Begin()
								if !see("begin", err) {
									continue
								}
								_, err = tx.Exec("write")
								see("write", err)
								read(func() (*sql.Rows, error) { return tx.Query("select") })
								see("Commit", tx.Commit())
							case 2:
								stmt, err := db.Prepare("select")
								if !see("prepare", err) {
									continue
								}
								read(func() (*sql.Rows, error) { return stmt.Query() })
								stmt.Close()
							}
						}
					})
				}
				const changes = 300
				for n := 1; n <= changes; n++ {
					src.set(strconv.Itoa(n % 2))
					time.Sleep(time.Duration(n%7) * time.Millisecond)
				}
				done.Store(true)
				wg.Wait()
				must(t, "DB.Close", db.Close())
				await(t, "no file is held after DB.Close", func() bool { return f.held("0")+f.held("1") == 0 })
				want(t, "files locked after DB.Close", f.locked("0") || f.locked("1"), false)
				t.Logf("%d calls, %d good operations, %d killed, %d last resorts", calls.Load(), good.Load(), killed.Load(), f.lastResorts())
			})
		}
	}
}

// A gapLayer is a layer around hotload that kills between two calls that
// database/sql makes one after the other: after the Next that returned io.EOF,
// before it asks for another result set.
type (
	gapLayer struct {
		driver.Connector
		atEnd func()
	}
	gapConn struct {
		driver.Conn
		atEnd func()
	}
	gapRows struct {
		driver.Rows
		driver.RowsNextResultSet
		atEnd func()
	}
)

func (l gapLayer) Connect(ctx context.Context) (driver.Conn, error) {
	c, err := l.Connector.Connect(ctx)
	return gapConn{c, l.atEnd}, err
}

func (c gapConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	r, err := c.Conn.(driver.QueryerContext).QueryContext(ctx, query, args)
	if err != nil {
		return nil, err
	}
	return gapRows{r, r.(driver.RowsNextResultSet), c.atEnd}, nil
}

func (r gapRows) Columns() []string { return r.Rows.Columns() }
func (r gapRows) Close() error      { return r.Rows.Close() }

func (r gapRows) Next(dest []driver.Value) error {
	err := r.Rows.Next(dest)
	if err == io.EOF {
		r.atEnd()
	}
	return err
}

// Rows that were read to their end before the kill are complete: there is no
// other result set, and database/sql closes them by itself. If there is another
// one, it cannot be had, which is an error.
func TestKillAtTheEndOfRows(t *testing.T) {
	for sets := 1; sets <= 2; sets++ {
		bubble(t, fmt.Sprintf("result sets=%d", sets), func(t *testing.T) {
			f, src := newLite(t), newSource("1")
			f.untidy = true // the order is another test's matter
			f.sets = sets
			hotloads, err := open(t, f, src, "").Driver().(driver.DriverContext).OpenConnector(register(liteCtxFake{f}, src) + "?forceKill=true")
			must(t, "OpenConnector", err)
			db := sql.OpenDB(gapLayer{hotloads, func() {
				src.set("2")
				synctest.Wait()
			}})
			t.Cleanup(func() {
				db.Close()
				hotloads.(io.Closer).Close()
			})
			rows := liteQuery(t, func() (*sql.Rows, error) { return db.Query("select") })
			n := 0
			for rows.Next() {
				n++
			}
			want(t, "rows", n, f.rowCount)
			if err := rows.Err(); err != nil { // of Rows.Close
				mustBeKilled(t, "Rows.Err", err)
			}
			want(t, "connections closed", f.closed(), 1)
			if sets == 1 {
				want(t, "connections in use after the rows' end", db.Stats().InUse, 0)
				return
			}
			want(t, "another result set", rows.NextResultSet(), false)
			mustBeKilled(t, "Rows.Err", rows.Err())
		})
	}
}

// An outFake takes any argument, and keeps the contexts of its Execs.
type (
	outFake struct {
		ctxFake
		mu   *sync.Mutex
		ctxs *[]context.Context
	}
	outConnector struct {
		*fakeConnector
		d outFake
	}
	outConn struct {
		*fakeConn
		d outFake
	}
)

func (d outFake) OpenConnector(value string) (driver.Connector, error) {
	return outConnector{&fakeConnector{f: d.fake, value: value}, d}, nil
}

func (c outConnector) Connect(ctx context.Context) (driver.Conn, error) {
	ci, err := c.fakeConnector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return outConn{ci.(*fakeConn), c.d}, nil
}

func (c outConn) CheckNamedValue(*driver.NamedValue) error { return nil }

func (c outConn) ExecContext(ctx context.Context, query string, _ []driver.NamedValue) (driver.Result, error) {
	ctx.Done()
	c.d.mu.Lock()
	*c.d.ctxs = append(*c.d.ctxs, ctx)
	c.d.mu.Unlock()
	if query == "broken" {
		return nil, driver.ErrBadConn
	}
	return driver.RowsAffected(1), c.call(ctx, "Exec "+query)
}

// alive counts the contexts that have not ended.
func (d outFake) alive() (n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, ctx := range *d.ctxs {
		if ctx.Err() == nil {
			n++
		}
	}
	return n
}

func newOutFake(t *testing.T) outFake {
	return outFake{ctxFake{newFake(t)}, new(sync.Mutex), new([]context.Context)}
}

// The context of an Exec with output parameters ends with it, unless one can be
// a cursor: that lives until the connection is returned, or closed because it broke.
func TestContextsOfOut(t *testing.T) {
	const execs = 100
	for _, row := range []struct {
		name         string
		dest         any
		last         string // Exec before the connection is returned
		before, then int    // contexts alive before that, and when it is returned
	}{
		{"string", new(string), "exec", 0, 0},
		{"time", new(time.Time), "exec", 0, 0},
		{"pointer", new(*string), "exec", 0, 0},
		{"cursor", new(driver.Rows), "exec", execs, 0},
		{"any", new(any), "exec", execs, 0},
		{"cursor of a connection that broke", new(driver.Rows), "broken", execs, 0},
	} {
		bubble(t, row.name, func(t *testing.T) {
			d := newOutFake(t)
			db := open(t, d, newSource("1"), "forceKill=30s")
			ctx, cancel := context.WithCancel(context.Background()) // else ctx has no children to leave behind
			defer cancel()
			conn, err := db.Conn(ctx)
			must(t, "conn", err)
			defer conn.Close()
			for range execs {
				_, err := conn.ExecContext(ctx, "call", sql.Out{Dest: row.dest})
				must(t, "exec", err)
			}
			want(t, "contexts alive", d.alive(), row.before)
			conn.ExecContext(ctx, row.last)
			conn.Close()
			time.Sleep(time.Minute)
			want(t, "contexts alive after Conn.Close", d.alive(), row.then)
		})
	}
}

// "connections killed" counts what was in use, not what database/sql was
// closing already.
func TestKilledCountsWhatWasInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := collect(t)
		d := newOutFake(t)
		d.onClose = func(c *fakeConn) {
			if c.value == "1" {
				time.Sleep(time.Minute)
			}
		}
		src := newSource("1")
		db := open(t, d, src, "forceKill=true")
		conn, err := db.Conn(t.Context())
		must(t, "conn", err)
		_, err = conn.ExecContext(t.Context(), "broken") // database/sql closes it, which takes a minute
		want(t, "error", err, driver.ErrBadConn)
		conn.Close()
		src.set("2")
		synctest.Wait()
		want(t, "connections killed, in\n"+l.String(), l.count("connections killed"), 0)
		want(t, "in use", l.count("value accepted", "generation=2", "in_use=0"), 1)
		time.Sleep(2 * time.Minute)
	})
}

// A call that is killed while its argument is checked matches ErrKilled. Only
// outside a transaction, where nothing can have been sent, may it run again, on
// the new value.
func TestKilledCheckOfArgument(t *testing.T) {
	for _, prepared := range []bool{false, true} {
		for _, inTx := range []bool{false, true} {
			bubble(t, fmt.Sprintf("prepared=%t,in a transaction=%t", prepared, inTx), func(t *testing.T) {
				f, src := newFake(t), newSource("1")
				f.lenient.Store(true) // for the last resort
				in, out := make(chan bool), make(chan bool)
				f.onCall = func(_ context.Context, c *fakeConn, call string) error {
					if call != "CheckNamedValue" || c.value != "1" {
						return nil
					}
					close(in) // the driver asks its server, until the connection is closed under it
					<-out
					return driver.ErrBadConn
				}
				f.onClose = func(c *fakeConn) {
					if c.value == "1" {
						close(out)
					}
				}
				db := open(t, ctxFake{f}, src, "forceKill=true")
				var on interface {
					Exec(string, ...any) (sql.Result, error)
					Prepare(string) (*sql.Stmt, error)
				} = db
				var tx *sql.Tx
				if inTx {
					tx = liteBegin(t, db)
					on = tx
				}
				exec := func() (sql.Result, error) { return on.Exec("insert ?", "ask") }
				if prepared {
					stmt, err := on.Prepare("insert ?")
					must(t, "prepare", err)
					t.Cleanup(func() { stmt.Close() })
					exec = func() (sql.Result, error) { return stmt.Exec("ask") }
				}
				go func() {
					<-in
					src.set("2")
				}()
				res, err := exec()
				if inTx {
					mustBeKilled(t, "exec", err)
					mustBeKilled(t, "Commit", tx.Commit())
					return
				}
				if err != nil {
					mustBeKilled(t, "exec", err)
					return
				}
				on2, _ := res.LastInsertId()
				want(t, "value that it ran on", on2, 2)
			})
		}
	}
}

// The arguments of an operation are converted on a connection dialled anew, and
// the check outlasts the last resort of a kill: nothing runs on the closed
// connection.
func TestKilledWhileConverted(t *testing.T) {
	for _, kind := range []string{"exec", "statement"} {
		bubble(t, kind, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			f.lenient.Store(true)
			f.onCall = onCall("2", "CheckNamedValue", func(context.Context) error {
				go src.set("3")
				time.Sleep(patience + patience/2)
				return nil
			})
			db := open(t, ctxFake{f}, src, "forceKill=true")
			db.SetMaxOpenConns(1)
			stmt := prepare(t, db, "write ?")
			run := func() error { _, err := stmt.Exec(1); return err }
			if kind == "exec" {
				conn := take(t, db)
				defer conn.Close()
				run = func() error { _, err := conn.ExecContext(bg, "write", 1); return err }
			}
			src.set("2")
			mustBeKilled(t, kind, run())
			time.Sleep(time.Minute)
			want(t, "connections with the killed value", f.liveOn("2"), 0)
		})
	}
}

// A kill during each call of the driver: nothing fails but what runs, nothing is
// closed during a call that returns in time, and the pool goes on.
func TestKillInEachCall(t *testing.T) {
	for _, call := range []string{"ResetSession", "IsValid", "Close ask", "CheckNamedValue", "NumInput", "Begin", "Commit", "Rollback", "Prepare ask", "Next", "Close rows", "Ping", "Exec insert", "Exec ask ?"} {
		for _, deaf := range []time.Duration{10 * time.Millisecond, 1500 * time.Millisecond} {
			bubble(t, call+" "+deaf.String(), func(t *testing.T) {
				f, src := newFake(t), newSource("1")
				f.lenient.Store(deaf > time.Second)
				f.heedless = true
				once := false
				f.onCall = onCall("1", call, func(context.Context) error {
					if !once {
						once = true
						src.set("2")
						time.Sleep(deaf)
					}
					return nil
				})
				db := open(t, ctxFake{f}, src, "forceKill=true")
				db.SetMaxOpenConns(1)
				ok := func(what string, err error) {
					if err != nil && !errors.Is(err, hotload.ErrKilled) {
						t.Errorf("%s: %v", what, err)
					}
				}
				for range 2 {
					ok("insert", insert(db))
					st, err := db.Prepare("ask")
					ok("prepare", err)
					if err == nil {
						rows, err := st.Query()
						ok("query", err)
						if err == nil {
							for rows.Next() {
							}
							ok("rows", rows.Err())
							rows.Close()
						}
						st.Close()
					}
					st, err = db.Prepare("ask ?")
					ok("prepare", err)
					if err == nil {
						_, err = st.Exec(1)
						ok("exec", err)
						st.Close()
					}
					ok("ping", db.Ping())
					tx, err := db.Begin()
					ok("begin", err)
					if err == nil {
						ok("commit", tx.Commit())
					}
					tx, err = db.Begin()
					ok("begin", err)
					if err == nil {
						ok("rollback", tx.Rollback())
					}
				}
				time.Sleep(time.Minute)
				if !once {
					t.Error("the kill did not come")
				}
				want(t, "old connections", f.liveOn("1"), 0)
				want(t, "value", ask(t, db), "2")
				db.Close()
				want(t, "connections", len(f.live()), 0)
			})
		}
	}
}
