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
				for _, query := range []string{"insert", "select"} {
					x.stmt[query] = prepare(t, db, query)
				}
				var err error
				x.rows, err = db.Query("select")
				must(t, "query", err)
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
				_, err = db.Exec("new work")
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
	_, err := db.Exec("insert")
	must(t, "exec", err)
	ended("Exec's context after it", "Exec insert", true)
	rows, err := db.Query("select")
	must(t, "query", err)
	rows.Next()
	ended("Query's context while rows are open", "Query select", false)
	rows.Close()
	ended("Query's context after Rows.Close", "Query select", true)
	for _, how := range []string{"Commit", "Rollback"} {
		tx := begin(t, db)
		_, err = tx.Exec("insert")
		must(t, "exec", err)
		ended("Begin's context in the transaction", "Begin", false)
		if how == "Commit" {
			err = tx.Commit()
		} else {
			err = tx.Rollback()
		}
		must(t, how, err)
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
	type subject struct {
		name  string
		moves bool
		use   func(t *testing.T, db *sql.DB, conn *sql.Conn) (after func() error)
	}
	later := func(conn *sql.Conn) func() error {
		return func() error { _, err := conn.ExecContext(context.Background(), "later"); return err }
	}
	subjects := []subject{
		{"Conn on which nothing has run", true, func(t *testing.T, db *sql.DB, conn *sql.Conn) func() error {
			return later(conn)
		}},
		{"Conn that was used", false, func(t *testing.T, db *sql.DB, conn *sql.Conn) func() error {
			_, err := conn.ExecContext(t.Context(), "set role")
			must(t, "exec", err)
			return later(conn)
		}},
		{"Conn whose statement was prepared", false, func(t *testing.T, db *sql.DB, conn *sql.Conn) func() error {
			stmt := prepare(t, conn, "insert ?")
			return func() error { defer stmt.Close(); _, err := stmt.Exec(special{"x"}); return err }
		}},
		{"transaction", false, func(t *testing.T, db *sql.DB, conn *sql.Conn) func() error {
			tx := begin(t, conn)
			return tx.Commit
		}},
		{"transaction with a statement", false, func(t *testing.T, db *sql.DB, conn *sql.Conn) func() error {
			tx := begin(t, conn)
			stmt := prepare(t, tx, "insert ?")
			return func() error {
				_, err := stmt.Exec(1)
				mustBeKilled(t, "Rollback", tx.Rollback())
				return err
			}
		}},
		{"rows", false, func(t *testing.T, db *sql.DB, conn *sql.Conn) func() error {
			rows, err := conn.QueryContext(t.Context(), "select")
			must(t, "query", err)
			return func() error {
				for rows.Next() {
					t.Error("killed rows go on")
				}
				return rows.Err()
			}
		}},
		{"rows half read", false, func(t *testing.T, db *sql.DB, conn *sql.Conn) func() error {
			rows, err := conn.QueryContext(t.Context(), "select")
			must(t, "query", err)
			rows.Next()
			return func() error {
				rows.Next()
				mustBeKilled(t, "Rows.Err", rows.Err())
				var v string
				return rows.Scan(&v)
			}
		}},
	}
	for _, s := range subjects {
		bubble(t, s.name, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			f.rowCount = 5
			var touched atomic.Bool
			var held context.Context // by the driver
			f.onCall = func(ctx context.Context, c *fakeConn, call string) error {
				if c.value == "1" && touched.Load() && call != "Close insert ?" && call != "Close rows" {
					t.Errorf("%s on the killed connection", call)
				}
				if call == "Begin" || call == "Query select" {
					held = ctx
				}
				return nil
			}
			db := open(t, ctxFake{f}, src, "forceKill=true")
			conn := take(t, db)
			after := s.use(t, db, conn)
			touched.Store(true)
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
				_, err := conn.ExecContext(t.Context(), "again")
				mustBeKilled(t, "use again", err)
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
			var killed atomic.Bool
			f.onCall = func(_ context.Context, c *fakeConn, call string) error {
				if killed.Load() && c.value == "1" {
					t.Errorf("%s on the killed connection", call)
				}
				return nil
			}
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
			rows, err := tx.Query("select")
			must(t, "query", err)
			f.lenient.Store(true) // its statements are closed with it
			f.onClose = func(c *fakeConn) { killed.Store(c.value == "1") }
			src.set("2")
			synctest.Wait()
			want(t, "connections on the old value", f.liveOn("1"), 0)

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

// TestKilledStmt: a prepared statement of the pool whose call was killed goes
// on with the new value, arguments and all.
func TestKilledStmt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, o, src := newFake(t), newObstacle("Query select ?"), newSource("1")
		f.onCall = o.onCall
		db := open(t, ctxFake{f}, src, "forceKill=true")
		db.SetMaxOpenConns(1)
		stmt := prepare(t, db, "select ?")
		defer stmt.Close()
		var v string
		for i := range 3 {
			must(t, "query", stmt.QueryRow(special{"x"}).Scan(&v))
			want(t, "value", v, strconv.Itoa(i+1))
			o.calls.Store(0)
			o.armed.Store(true)
			done := make(chan error, 1)
			go func() { done <- stmt.QueryRow(special{"x"}).Scan(new(string)) }()
			ctx := receive(t, "the call begins", o.there)
			src.set(strconv.Itoa(i + 2))
			<-ctx.Done()
			o.returns <- driver.ErrBadConn
			mustBeKilled(t, "the call", receive(t, "the call returns", done))
			o.armed.Store(false)
		}
		must(t, "query", stmt.QueryRow(special{"x"}).Scan(&v))
		want(t, "value", v, "4")
		if err := stmt.QueryRow().Scan(&v); err == nil || !strings.Contains(err.Error(), "expected 1 arguments, got 0") {
			t.Errorf("a wrong number of arguments: %v", err)
		}
	})
}

// killsDeaf proves: a driver that does not return within about a second is closed
// from another goroutine, as a last resort, and blocks nothing: not the change,
// new work, other kills, or DB.Close.
func killsDeaf(t *testing.T) {
	for _, test := range []struct {
		name, call string
		use        func(t *testing.T, db *sql.DB) error
	}{
		{"exec", "Exec insert", func(t *testing.T, db *sql.DB) error { return insert(db) }},
		{"prepare", "Prepare deaf", func(t *testing.T, db *sql.DB) error { _, err := db.Prepare("deaf"); return err }},
		{"begin", "Begin", func(t *testing.T, db *sql.DB) error { _, err := db.Begin(); return err }},
		{"commit", "Commit", func(t *testing.T, db *sql.DB) error {
			tx := begin(t, db)
			return tx.Commit()
		}},
		{"next", "Next", func(t *testing.T, db *sql.DB) error { return db.QueryRow("select").Scan(new(string)) }},
		{"exec of a prepared statement", "Exec deaf", func(t *testing.T, db *sql.DB) error {
			stmt := prepare(t, db, "deaf")
			defer stmt.Close()
			_, err := stmt.Exec()
			return err
		}},
		{"exec with prepared statements open", "Exec deaf", func(t *testing.T, db *sql.DB) error {
			conn := take(t, db)
			for i := range 2 {
				stmt := prepare(t, conn, fmt.Sprint("other ", i))
				defer stmt.Close()
			}
			_, err := conn.ExecContext(t.Context(), "deaf")
			return err
		}},
		{"close of a prepared statement", "Close deaf", func(t *testing.T, db *sql.DB) error {
			conn := take(t, db)
			stmt := prepare(t, conn, "deaf")
			return stmt.Close()
		}},
	} {
		bubble(t, test.name, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			f.lenient.Store(true)
			there, shut := make(chan bool), make(chan bool)
			f.onCall = func(_ context.Context, c *fakeConn, call string) error {
				if c.value == "1" && call == test.call {
					there <- true
					<-shut
					return driver.ErrBadConn
				}
				return nil
			}
			f.onClose = func(c *fakeConn) {
				if c.value == "1" {
					close(shut)
				}
			}
			f.heedless = true
			db := open(t, ctxFake{f}, src, "forceKill=true")
			done := make(chan error, 1)
			go func() { done <- test.use(t, db) }()
			receive(t, "the call begins", there)
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
			time.Sleep(patience - 1)
			synctest.Wait()
			want(t, "connections on the old value while there is patience", f.liveOn("1"), 1)
			mustBeKilled(t, "the call", receive(t, "the call returns", done))
			want(t, "time until the call returned", time.Since(start), patience)
			synctest.Wait()
			want(t, "connections on the old value in the end", f.liveOn("1"), 0)
		})
	}

	// In real time, because that orders nothing: the race detector sees it all.
	t.Run("prepared anew in the killed call", func(t *testing.T) {
		f, src := newFake(t), newSource("0")
		f.lenient.Store(true)
		o := newObstacle("Prepare deaf")
		shut := make(chan bool)
		f.onCall = func(ctx context.Context, c *fakeConn, call string) error {
			if c.value == "1" && call == "Exec deaf" {
				<-shut
				return driver.ErrBadConn
			}
			return o.onCall(ctx, c, call)
		}
		f.onClose = func(c *fakeConn) {
			if c.value == "1" {
				close(shut)
			}
		}
		f.heedless = true
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
	})
}

// TestDeafStatement: a driver that is deaf to a kill, and to the Close of its
// connection, gets that Close during the call, and no other call, which the fake
// polices; hotload's own books survive it.
func TestDeafStatement(t *testing.T) {
	for _, row := range []struct {
		deaf string
		call func(db *sql.DB, old *sql.Stmt) error // old has to be prepared again
	}{
		{"Prepare two", func(db *sql.DB, _ *sql.Stmt) error {
			conn, _ := db.Conn(bg)
			defer conn.Close()
			conn.PrepareContext(bg, "one") // stays open
			_, err := conn.PrepareContext(bg, "two")
			return err
		}},
		{"Close one", func(db *sql.DB, _ *sql.Stmt) error {
			conn, _ := db.Conn(bg)
			defer conn.Close()
			stmt, _ := conn.PrepareContext(bg, "one")
			stmt.Close()
			return conn.PingContext(bg)
		}},
		{"Prepare old", func(_ *sql.DB, old *sql.Stmt) error { _, err := old.Exec(); return err }},
		{"Next", func(db *sql.DB, _ *sql.Stmt) error { return db.QueryRow("ask").Scan(new(string)) }},
	} {
		bubble(t, row.deaf, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			f.lenient.Store(true)
			f.heedless = row.deaf == "Prepare old"
			f.asRows = asTwoSets
			f.onCall = onCall("2", row.deaf, func(context.Context) error {
				if time.Sleep(3 * patience); row.deaf == "Next" {
					return io.EOF
				}
				return nil
			})
			db := open(t, ctxFake{f}, src, "forceKill=true")
			old := prepare(t, db, "old")
			src.set("2")
			done := make(chan error, 1)
			go func() { done <- row.call(db, old) }()
			synctest.Wait()
			src.set("3")
			time.Sleep(2 * patience)
			want(t, "connections on the old value", f.liveOn("2"), 0)
			mustBeKilled(t, "the call", <-done)
			must(t, "Stmt.Close", old.Close())
		})
	}
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
			rows, err := tx.Query("ask")
			must(t, "query", err)
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

// killsRaw proves: a Raw callback counts as a call in progress whose end cannot be
// seen, until the next operation or the return to the pool shows it.
func killsRaw(t *testing.T) {
	inRaw := func(t *testing.T, conn *sql.Conn, f func()) {
		inRaw(t, conn, func(proxy any) {
			c, ok := proxy.(interface{ Raw() driver.Conn }).Raw().(*fakeConn)
			if !ok || c.value != "1" {
				t.Errorf("Raw: have %v", c)
			}
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
			var closed time.Time
			f.onClose = func(c *fakeConn) {
				if c.value == "1" {
					closed = time.Now()
				}
			}
			db := open(t, ctxFake{f}, src, "forceKill=true")
			conn := take(t, db)
			var changed time.Time
			test.check(t, conn, func() {
				src.set("2")
				changed = time.Now()
			})
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
				n, kill, returned := 0, make(chan bool), make(chan bool)
				f.onCall = func(ctx context.Context, c *fakeConn, call string) error {
					if c.value != "1" {
						return nil
					}
					if ctx.Err() != nil {
						return io.EOF
					}
					if during && (strings.HasPrefix(call, "Next") || call == "HasNextResultSet") {
						if n == at {
							kill <- true
							<-returned
							<-ctx.Done()
							n++
							return io.EOF
						}
						n++
					}
					return nil
				}
				f.asRows = asTwoSets
				db := open(t, ctxFake{f}, src, "forceKill=true")
				rows, err := db.Query("select")
				must(t, "query", err)
				killed := false
				stop := make(chan bool)
				stopped := make(chan bool)
				go func() {
					defer close(stopped)
					select {
					case <-kill:
						src.set("2")
						killed = true
						close(returned)
					case <-stop:
					}
				}()
				reads, sets, step := 0, 1, 0
				between := func() {
					if !during && step == at {
						src.set("2")
						synctest.Wait()
						killed = true
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
				close(stop)
				<-stopped
				err = rows.Err()
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
		rows, err := db.Query("select")
		must(t, "query", err)
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
		rows, err := tx.Query("select")
		must(t, "query", err)
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
		rows, err := tx.Query("select")
		must(t, "query", err)
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
// A, and forceKill=30s. A moment is a millisecond.
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

// TestKillLogs checks what operators see of a kill.
func TestKillLogs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := collect(t)
		f, src := newFake(t), newSource("S3CRET-1")
		db := open(t, ctxFake{f}, src, "forceKill=true")
		for range 2 {
			tx := begin(t, db)
			defer tx.Rollback()
		}
		src.set("S3CRET-2")
		src.set("S3CRET-3") // nothing in use: nothing killed
		synctest.Wait()
		want(t, "kills logged", l.count("hotload: connections killed"), 1)
		want(t, "kills logged in full", l.count("level=WARN", "hotload: connections killed", "generation=1", "killed=2", "path=/path"), 1)
		want(t, "generations drained", l.count("hotload: generation drained"), 2)
		want(t, "secrets", l.count("S3CRET"), 0)
	})
}
