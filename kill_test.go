package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"reflect"
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

// lastResort is how long a driver may take to return from a killed call before
// its connection is closed under it.
const lastResort = time.Second

// bubble runs a subtest in a synctest bubble. Time passes there only when
// nothing else can happen, and a goroutine that is left behind fails the test.
func bubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

// must fails the test on an error.
func must(t testing.TB, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// mustBeKilled fails the test unless err is what a killed operation returns.
func mustBeKilled(t testing.TB, what string, err error) {
	t.Helper()
	if !errors.Is(err, hotload.ErrKilled) {
		t.Errorf("%s: have error %v, want one that matches ErrKilled", what, err)
	}
	for _, bad := range []error{driver.ErrBadConn, context.Canceled, context.DeadlineExceeded, io.EOF, sql.ErrNoRows} {
		if errors.Is(err, bad) {
			t.Errorf("%s: error %v matches %v", what, err, bad)
		}
	}
}

// A heedless is a fake that finishes what it was asked to do although the
// context has ended. Its hooks get the context as it is.
type heedless struct{ ctxFake }

type heedlessConnector struct{ *fakeConnector }

func (d heedless) OpenConnector(value string) (driver.Connector, error) {
	return heedlessConnector{&fakeConnector{d.fake, value}}, nil
}

func (c heedlessConnector) Connect(ctx context.Context) (driver.Conn, error) {
	ci, err := c.fakeConnector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return heedlessConn{ci.(*fakeConn)}, nil
}

// An endless is a context that does not show that it has ended.
type endless struct{ context.Context }

func (endless) Err() error { return nil }

type heedlessConn struct{ *fakeConn }

func (c heedlessConn) Ping(ctx context.Context) error { return c.fakeConn.Ping(endless{ctx}) }

func (c heedlessConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	return c.fakeConn.ExecContext(endless{ctx}, query, args)
}

func (c heedlessConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	return c.fakeConn.QueryContext(endless{ctx}, query, args)
}

func (c heedlessConn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	return c.fakeConn.BeginTx(endless{ctx}, opts)
}

func (c heedlessConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	st, err := c.fakeConn.PrepareContext(endless{ctx}, query)
	if err != nil {
		return nil, err
	}
	return heedlessStmt{st.(*fakeStmt)}, nil
}

type heedlessStmt struct{ *fakeStmt }

func (s heedlessStmt) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	return s.fakeStmt.ExecContext(endless{ctx}, args)
}

func (s heedlessStmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	return s.fakeStmt.QueryContext(endless{ctx}, args)
}

// An obstacle stops one call of the driver, the first of its name once it is
// armed, and has it return what the test says.
type obstacle struct {
	call    string
	armed   atomic.Bool
	calls   atomic.Int32 // since it was armed
	there   chan context.Context
	returns chan error
}

func newObstacle(call string) *obstacle {
	return &obstacle{call: call, there: make(chan context.Context), returns: make(chan error)}
}

// onCall is the hook of a fake.
func (o *obstacle) onCall(ctx context.Context, _ *fakeConn, call string) error {
	if call != o.call || !o.armed.Load() {
		return nil
	}
	if o.calls.Add(1) > 1 {
		return nil
	}
	if e, ok := ctx.(endless); ok {
		ctx = e.Context
	}
	o.there <- ctx
	return <-o.returns
}

// A driverError is an error of the driver's own.
type driverError struct{ code int }

func (e *driverError) Error() string { return fmt.Sprintf("fake: error %d", e.code) }

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
	})
	t.Run("R-33/nothing on the value in force is killed", func(t *testing.T) {
		t.Run("dialled anew", sparesTheValueInForce)
		t.Run("Stmt.Close", sparesStmtClose)
	})
}

// killsCalls kills each kind of call and lets it unwind in each way that a
// driver could: it is cancelled through its context, its connection is closed
// when it has returned and not before, its error matches ErrKilled and nothing
// that would have it run again, and it runs once. If it succeeds it says so.
// Meanwhile new work goes on.
func killsCalls(t *testing.T) {
	begun := func(t *testing.T, db *sql.DB) *sql.Tx {
		tx, err := db.Begin()
		must(t, "begin", err)
		return tx
	}
	queried := func(t *testing.T, db *sql.DB) *sql.Rows {
		rows, err := db.Query("select")
		must(t, "query", err)
		return rows
	}
	taken := func(t *testing.T, db *sql.DB) *sql.Conn {
		conn, err := db.Conn(t.Context())
		must(t, "conn", err)
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	calls := []struct {
		name, call string
		ctx        bool // the driver gets a context
		skips      bool // it may answer ErrSkip
		set        func(t *testing.T, db *sql.DB) (run func() error)
	}{
		{"DB.Exec", "Exec insert", true, true, func(t *testing.T, db *sql.DB) func() error {
			return func() error { _, err := db.Exec("insert"); return err }
		}},
		{"DB.Query", "Query select", true, true, func(t *testing.T, db *sql.DB) func() error {
			return func() error {
				rows, err := db.Query("select")
				if err == nil {
					for rows.Next() {
						t.Error("killed rows go on")
					}
					mustBeKilled(t, "rows of a query that was killed", rows.Err())
				}
				return err
			}
		}},
		{"DB.Ping", "Ping", true, false, func(t *testing.T, db *sql.DB) func() error { return db.Ping }},
		{"DB.Begin", "Begin", true, false, func(t *testing.T, db *sql.DB) func() error {
			return func() error {
				tx, err := db.Begin()
				if err == nil {
					mustBeKilled(t, "Commit of a transaction whose Begin was killed", tx.Commit())
				}
				return err
			}
		}},
		{"DB.Prepare", "Prepare insert", true, false, func(t *testing.T, db *sql.DB) func() error {
			return func() error {
				stmt, err := db.Prepare("insert")
				if err == nil {
					_, err := stmt.Exec()
					must(t, "Exec of a statement whose Prepare was killed", err)
					must(t, "its Close", stmt.Close())
				}
				return err
			}
		}},
		{"Stmt.Exec", "Exec insert", true, false, func(t *testing.T, db *sql.DB) func() error {
			stmt, err := db.Prepare("insert")
			must(t, "prepare", err)
			t.Cleanup(func() { stmt.Close() })
			return func() error { _, err := stmt.Exec(); return err }
		}},
		{"Stmt.Query", "Query select", true, false, func(t *testing.T, db *sql.DB) func() error {
			stmt, err := db.Prepare("select")
			must(t, "prepare", err)
			t.Cleanup(func() { stmt.Close() })
			return func() error {
				rows, err := stmt.Query()
				if err == nil {
					mustBeKilled(t, "Close of rows of a query that was killed", rows.Close())
				}
				return err
			}
		}},
		{"Tx.Exec", "Exec insert", true, true, func(t *testing.T, db *sql.DB) func() error {
			tx := begun(t, db)
			return func() error {
				_, err := tx.Exec("insert")
				mustBeKilled(t, "Commit", tx.Commit())
				return err
			}
		}},
		{"Tx.Commit", "Commit", false, false, func(t *testing.T, db *sql.DB) func() error { return begun(t, db).Commit }},
		{"Tx.Rollback", "Rollback", false, false, func(t *testing.T, db *sql.DB) func() error { return begun(t, db).Rollback }},
		{"Conn.Exec", "Exec insert", true, true, func(t *testing.T, db *sql.DB) func() error {
			conn := taken(t, db)
			return func() error {
				_, err := conn.ExecContext(t.Context(), "insert")
				_, next := conn.ExecContext(t.Context(), "next")
				mustBeKilled(t, "the next call", next)
				return err
			}
		}},
		{"first use of a Conn that ends a statement", "Close insert", false, false, func(t *testing.T, db *sql.DB) func() error {
			stmt, err := taken(t, db).PrepareContext(t.Context(), "insert")
			must(t, "prepare", err)
			return stmt.Close
		}},
		{"Rows.Next", "Next", true, false, func(t *testing.T, db *sql.DB) func() error {
			rows := queried(t, db)
			return func() error {
				if !rows.Next() {
					return rows.Err()
				}
				if rows.Next() {
					t.Error("killed rows go on")
				}
				mustBeKilled(t, "rows that were killed", rows.Err())
				return nil
			}
		}},
		{"Rows.Close", "Close rows", false, false, func(t *testing.T, db *sql.DB) func() error { return queried(t, db).Close }},
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
				db := open(t, heedless{ctxFake{f}}, src, "forceKill=true")
				run := call.set(t, db)
				o.armed.Store(true)
				done := make(chan error, 1)
				go func() { done <- run() }()
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
				time.Sleep(lastResort - 1)
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

// TestKillPassesContextOn checks the context that a driver gets in this mode.
func TestKillPassesContextOn(t *testing.T) {
	type key struct{}
	f, o, src := newFake(t), newObstacle("Exec insert"), newSource("1")
	f.onCall = o.onCall
	db := open(t, ctxFake{f}, src, "forceKill=1h")
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
	if err := receive(t, "the call returns", done); err != context.Canceled {
		t.Errorf("a call cancelled by the caller: have %v, want the driver's error as it was", err)
	}
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
		tx, err := db.Begin()
		must(t, "begin", err)
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
			stmt, err := conn.PrepareContext(t.Context(), "insert ?")
			must(t, "prepare", err)
			return func() error { defer stmt.Close(); _, err := stmt.Exec(special{"x"}); return err }
		}},
		{"transaction", false, func(t *testing.T, db *sql.DB, conn *sql.Conn) func() error {
			tx, err := conn.BeginTx(t.Context(), nil)
			must(t, "begin", err)
			return tx.Commit
		}},
		{"transaction with a statement", false, func(t *testing.T, db *sql.DB, conn *sql.Conn) func() error {
			tx, err := conn.BeginTx(t.Context(), nil)
			must(t, "begin", err)
			stmt, err := tx.Prepare("insert ?")
			must(t, "prepare", err)
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
				if c.value == "1" && touched.Load() && call != "Close insert ?" {
					t.Errorf("%s on the killed connection", call)
				}
				if call == "Begin" || call == "Query select" {
					held = ctx
				}
				return nil
			}
			db := open(t, ctxFake{f}, src, "forceKill=true")
			conn, err := db.Conn(t.Context())
			must(t, "conn", err)
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
			err = after()
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
			pooled, err := db.Prepare("pooled ?")
			must(t, "prepare", err)
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
		stmt, err := db.Prepare("select ?")
		must(t, "prepare", err)
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
		{"exec", "Exec deaf", func(t *testing.T, db *sql.DB) error { _, err := db.Exec("deaf"); return err }},
		{"prepare", "Prepare deaf", func(t *testing.T, db *sql.DB) error { _, err := db.Prepare("deaf"); return err }},
		{"begin", "Begin", func(t *testing.T, db *sql.DB) error { _, err := db.Begin(); return err }},
		{"commit", "Commit", func(t *testing.T, db *sql.DB) error {
			tx, err := db.Begin()
			must(t, "begin", err)
			return tx.Commit()
		}},
		{"next", "Next", func(t *testing.T, db *sql.DB) error { return db.QueryRow("select").Scan(new(string)) }},
		{"exec of a prepared statement", "Exec deaf", func(t *testing.T, db *sql.DB) error {
			stmt, err := db.Prepare("deaf")
			must(t, "prepare", err)
			defer stmt.Close()
			_, err = stmt.Exec()
			return err
		}},
		{"exec with prepared statements open", "Exec deaf", func(t *testing.T, db *sql.DB) error {
			conn, err := db.Conn(t.Context())
			must(t, "conn", err)
			defer conn.Close()
			for i := range 2 {
				stmt, err := conn.PrepareContext(t.Context(), fmt.Sprint("other ", i))
				must(t, "prepare", err)
				defer stmt.Close()
			}
			_, err = conn.ExecContext(t.Context(), "deaf")
			return err
		}},
		{"close of a prepared statement", "Close deaf", func(t *testing.T, db *sql.DB) error {
			conn, err := db.Conn(t.Context())
			must(t, "conn", err)
			defer conn.Close()
			stmt, err := conn.PrepareContext(t.Context(), "deaf")
			must(t, "prepare", err)
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
			db := open(t, heedless{ctxFake{f}}, src, "forceKill=true")
			done := make(chan error, 1)
			go func() { done <- test.use(t, db) }()
			receive(t, "the call begins", there)
			start := time.Now()
			src.set("2")
			want(t, "value of new work", ask(t, db), "2")
			conn, err := db.Conn(t.Context())
			must(t, "conn", err)
			want(t, "value of new work", ask(t, conn), "2")
			src.set("3")
			_, err = conn.ExecContext(t.Context(), "insert")
			mustBeKilled(t, "another kill", err)
			conn.Close()
			want(t, "value of new work", ask(t, db), "3")
			want(t, "time that all this took", time.Since(start), 0)
			time.Sleep(lastResort - 1)
			synctest.Wait()
			want(t, "connections on the old value while there is patience", f.liveOn("1"), 1)
			mustBeKilled(t, "the call", receive(t, "the call returns", done))
			want(t, "time until the call returned", time.Since(start), lastResort)
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
		db := open(t, heedless{ctxFake{f}}, src, "forceKill=true")
		stmt, err := db.Prepare("deaf")
		must(t, "prepare", err)
		src.set("1")
		o.armed.Store(true)
		done := make(chan error, 1)
		go func() { _, err := stmt.Exec(); done <- err }()
		receive(t, "the call begins", o.there)
		src.set("2")
		o.returns <- nil
		mustBeKilled(t, "the call", receive(t, "the call returns", done))
		await(t, "the connection is closed", func() bool { return f.liveOn("1") == 0 })
		_, err = stmt.Exec()
		must(t, "the statement after the kill", err)
		must(t, "Stmt.Close", stmt.Close())
	})
}

// TestCloseAwaitsLastResort: DB.Close waits also for what the last resort closes,
// and for what is closed after that.
func TestCloseAwaitsLastResort(t *testing.T) {
	bubble(t, "call", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		f.lenient.Store(true)
		shut := make(chan bool)
		f.onCall = func(_ context.Context, _ *fakeConn, call string) error {
			if call == "Exec deaf" {
				<-shut
				return driver.ErrBadConn
			}
			return nil
		}
		f.onClose = func(c *fakeConn) {
			if c.value == "1" {
				close(shut)
				time.Sleep(lastResort / 4)
			}
		}
		var closed atomic.Int32
		db := open(t, closerDriver{ctxFake{f}, func(value string) {
			if value == "1" {
				time.Sleep(lastResort / 4)
			}
			closed.Add(1)
		}}, src, "forceKill=true")
		killed := make(chan error)
		go func() {
			_, err := db.Exec("deaf")
			killed <- err
		}()
		synctest.Wait()
		src.set("2")
		mustBeKilled(t, "exec", <-killed)
		db.Close()
		want(t, "connections", len(f.live()), 0)
		want(t, "connectors closed", closed.Load(), 2)
	})
	t.Run("call that returns at the last moment", func(t *testing.T) {
		for range 2000 { // which comes first, the return or the last resort, is up to chance
			synctest.Test(t, func(t *testing.T) {
				f, src := newFake(t), newSource("1")
				f.lenient.Store(true)
				f.onCall = func(_ context.Context, _ *fakeConn, call string) error {
					if call == "Exec slow" {
						time.Sleep(lastResort)
						return driver.ErrBadConn
					}
					return nil
				}
				f.onClose = func(*fakeConn) { time.Sleep(lastResort / 5) }
				db := open(t, ctxFake{f}, src, "forceKill=true")
				left := make(chan int)
				go func() {
					db.Exec("slow")
					db.Close()
					left <- len(f.live())
				}()
				synctest.Wait()
				src.set("2")
				want(t, "connections", <-left, 0)
			})
		}
	})
	bubble(t, "Stmt.Close that returns at the last moment", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		f.lenient.Store(true)
		f.onCall = func(_ context.Context, _ *fakeConn, call string) error {
			if call == "Close slow" {
				time.Sleep(lastResort)
			}
			return nil
		}
		f.onClose = func(*fakeConn) { time.Sleep(lastResort / 5) }
		db := open(t, ctxFake{f}, src, "forceKill=true")
		_, err := db.Prepare("slow")
		must(t, "prepare", err)
		src.set("2")
		time.Sleep(lastResort / 2)
		db.Close()
		want(t, "connections", len(f.live()), 0)
	})
	bubble(t, "Stmt.Close", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		f.lenient.Store(true)
		shut := make(chan bool)
		f.onCall = func(_ context.Context, _ *fakeConn, call string) error {
			if call == "Close deaf" {
				<-shut
			}
			return nil
		}
		f.onClose = func(c *fakeConn) {
			close(shut)
			time.Sleep(lastResort / 2)
		}
		db := open(t, ctxFake{f}, src, "forceKill=true")
		_, err := db.Prepare("deaf")
		must(t, "prepare", err)
		src.set("2")
		time.Sleep(lastResort + lastResort/4)
		db.Close()
		want(t, "connections", len(f.live()), 0)
	})
}

// TestKillBlockedClose: a driver's Close that hangs delays nothing but, for a
// second, a dial in its place.
func TestKillBlockedClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		hang := make(chan bool)
		f.onClose = func(c *fakeConn) {
			if c.value == "1" {
				<-hang
			}
		}
		db := open(t, ctxFake{f}, src, "forceKill=true")
		tx, err := db.Begin()
		must(t, "begin", err)
		start := time.Now()
		src.set("2")
		want(t, "value of new work", ask(t, db), "2")
		mustBeKilled(t, "Commit", tx.Commit())
		want(t, "time that this took", time.Since(start), 0)
		db.SetMaxIdleConns(2)
		src.set("3")
		want(t, "value of new work", ask(t, db), "3")
		must(t, "DB.Close", db.Close())
		if d := time.Since(start); d > 2*lastResort {
			t.Errorf("a hanging Close held up work and DB.Close for %v", d)
		}
		close(hang)
	})
}

// TestSlowStmtClose: a driver that takes long to close the statements of a
// retired connection, or a killed one, must not be made to close those that
// were prepared in their place. With forceKill it does not keep the connection
// open for long.
func TestSlowStmtClose(t *testing.T) {
	for _, options := range []string{"", "forceKill=true"} {
		for _, used := range []string{"", "transaction", "call"} {
			bubble(t, fmt.Sprintf("options=%s,in use=%s", options, used), func(t *testing.T) {
				f, src := newFake(t), newSource("1")
				hang := make(chan bool)
				f.onCall = func(ctx context.Context, c *fakeConn, call string) error {
					switch {
					case c.value == "1" && strings.HasPrefix(call, "Close "):
						<-hang
					case call == "Exec long" && options != "":
						<-ctx.Done()
					}
					return nil
				}
				f.lenient.Store(options != "")
				db := open(t, ctxFake{f}, src, options)
				db.SetMaxOpenConns(1)
				var stmts []*sql.Stmt
				for i := range 3 {
					stmt, err := db.Prepare(fmt.Sprint("insert ", i))
					must(t, "prepare", err)
					stmts = append(stmts, stmt)
				}
				tx, err := db.Begin()
				must(t, "begin", err)
				done := make(chan bool)
				go func() {
					defer close(done)
					if used == "call" {
						tx.Exec("long")
					}
				}()
				synctest.Wait()
				if used != "" {
					src.set("2")
				}
				<-done
				if err = tx.Commit(); used != "" && options != "" {
					mustBeKilled(t, "Commit", err)
				} else {
					must(t, "Commit", err)
				}
				if used == "" {
					src.set("2")
				}
				start := time.Now()
				use := func() {
					for _, stmt := range stmts {
						_, err := stmt.Exec()
						must(t, "exec", err)
					}
				}
				use()
				if d := time.Since(start); d > lastResort {
					t.Errorf("work waited %v for the old connection", d)
				}
				if options != "" {
					time.Sleep(lastResort)
					synctest.Wait()
					want(t, "connections on the old value after the last resort", f.liveOn("1"), 0)
				}
				close(hang)
				synctest.Wait()
				want(t, "connections on the old value", f.liveOn("1"), 0)
				use()
				for _, stmt := range stmts {
					must(t, "Stmt.Close", stmt.Close())
				}
			})
		}
	}
}

// killsRaw proves: a Raw callback counts as a call in progress whose end cannot be
// seen, until the next operation or the return to the pool shows it.
func killsRaw(t *testing.T) {
	raw := func(t *testing.T, conn *sql.Conn, f func()) {
		must(t, "Raw", conn.Raw(func(dc any) error {
			c, ok := dc.(interface{ Raw() driver.Conn }).Raw().(*fakeConn)
			if !ok || c.value != "1" {
				t.Errorf("Raw: have %v", c)
			}
			f()
			return nil
		}))
	}
	for _, test := range []struct {
		name  string
		ends  time.Duration // after the change
		check func(t *testing.T, conn *sql.Conn, change func())
	}{
		{"callback in progress", lastResort, func(t *testing.T, conn *sql.Conn, change func()) {
			raw(t, conn, func() {
				change()
				time.Sleep(2 * lastResort)
			})
			_, err := conn.ExecContext(t.Context(), "insert")
			mustBeKilled(t, "the next operation", err)
		}},
		{"callback has returned", lastResort, func(t *testing.T, conn *sql.Conn, change func()) {
			raw(t, conn, func() {})
			change()
			time.Sleep(2 * lastResort)
			_, err := conn.ExecContext(t.Context(), "insert")
			mustBeKilled(t, "the next operation", err)
		}},
		{"next operation", 0, func(t *testing.T, conn *sql.Conn, change func()) {
			raw(t, conn, change)
			_, err := conn.ExecContext(t.Context(), "insert", special{"x"})
			mustBeKilled(t, "the next operation", err)
		}},
		{"next Raw", 0, func(t *testing.T, conn *sql.Conn, change func()) {
			raw(t, conn, change)
			must(t, "Raw", conn.Raw(func(dc any) error {
				if c := dc.(interface{ Raw() driver.Conn }).Raw(); c != nil {
					t.Errorf("Raw of a killed connection: have %v, want nil", c)
				}
				return nil
			}))
		}},
		{"returned to the pool", 0, func(t *testing.T, conn *sql.Conn, change func()) {
			raw(t, conn, change)
			conn.Close()
		}},
		{"operation between", 0, func(t *testing.T, conn *sql.Conn, change func()) {
			raw(t, conn, func() {})
			_, err := conn.ExecContext(t.Context(), "insert")
			must(t, "exec", err)
			change()
		}},
		{"transaction", 0, func(t *testing.T, conn *sql.Conn, change func()) {
			tx, err := conn.BeginTx(t.Context(), nil)
			must(t, "begin", err)
			raw(t, conn, change)
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
			conn, err := db.Conn(t.Context())
			must(t, "conn", err)
			var changed time.Time
			test.check(t, conn, func() {
				src.set("2")
				changed = time.Now()
			})
			time.Sleep(2 * lastResort)
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
			conn, err := db.Conn(t.Context())
			must(t, "conn", err)
			raw(t, conn, func() {})
			conn.Close()
		}
		want(t, "connections opened", f.opened.Load(), 1)
	})
}

// A setsRows is rows of two result sets and with all optional interfaces.
type setsRows struct {
	*fakeRows
	more int
}

func (r *setsRows) Columns() []string {
	if r.more == 0 {
		return []string{"another value"}
	}
	return r.fakeRows.Columns()
}

func (r *setsRows) HasNextResultSet() bool {
	return r.c.call(r.ctx, "HasNextResultSet") == nil && r.more > 0
}

func (r *setsRows) NextResultSet() error {
	if err := r.c.call(r.ctx, "NextResultSet"); err != nil {
		return err
	}
	if r.more == 0 {
		return io.EOF
	}
	r.more--
	r.left = 1
	return nil
}

func (r *setsRows) ColumnTypeScanType(int) reflect.Type               { return reflect.TypeFor[float32]() }
func (r *setsRows) ColumnTypeDatabaseTypeName(int) string             { return "NUMBER" }
func (r *setsRows) ColumnTypeLength(int) (int64, bool)                { return 5, true }
func (r *setsRows) ColumnTypeNullable(int) (nullable, ok bool)        { return true, true }
func (r *setsRows) ColumnTypePrecisionScale(int) (int64, int64, bool) { return 7, 2, true }

// A setsDriver is a fake whose rows are setsRows.
type setsDriver struct{ ctxFake }

type setsConnector struct{ *fakeConnector }

func (d setsDriver) OpenConnector(value string) (driver.Connector, error) {
	return setsConnector{&fakeConnector{d.fake, value}}, nil
}

func (c setsConnector) Connect(ctx context.Context) (driver.Conn, error) {
	ci, err := c.fakeConnector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return setsConn{ci.(*fakeConn)}, nil
}

type setsConn struct{ *fakeConn }

func (c setsConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	rows, err := c.fakeConn.QueryContext(ctx, query, args)
	if err != nil {
		return nil, err
	}
	return &setsRows{rows.(*fakeRows), 1}, nil
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
				db := open(t, setsDriver{ctxFake{f}}, src, "forceKill=true")
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
	for _, during := range []string{"", "Next", "NextResultSet"} {
		bubble(t, "during="+during, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			f.onCall = func(ctx context.Context, _ *fakeConn, call string) error {
				if call != during {
					return nil
				}
				src.set("2")
				<-ctx.Done()
				return io.EOF
			}
			db := open(t, setsDriver{ctxFake{f}}, src, "forceKill=true")
			conn, err := db.Conn(t.Context())
			must(t, "conn", err)
			defer conn.Close()
			must(t, "Raw", conn.Raw(func(dc any) error {
				rows, err := dc.(driver.QueryerContext).QueryContext(t.Context(), "select", nil)
				must(t, "query", err)
				if during == "" {
					src.set("2")
				}
				if during != "NextResultSet" {
					mustBeKilled(t, "Next", rows.Next(make([]driver.Value, 1)))
					mustBeKilled(t, "Next again", rows.Next(make([]driver.Value, 1)))
				}
				mustBeKilled(t, "NextResultSet", rows.(driver.RowsNextResultSet).NextResultSet())
				mustBeKilled(t, "NextResultSet again", rows.(driver.RowsNextResultSet).NextResultSet())
				mustBeKilled(t, "Close", rows.Close())
				return nil
			}))
		})
	}
}

// TestKilledRowsColumns: what database/sql asks about rows after the kill has
// an answer, and does not touch the closed connection.
func TestKilledRowsColumns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		f.rowCount = 3
		db := open(t, setsDriver{ctxFake{f}}, src, "forceKill=true")
		rows, err := db.Query("select")
		must(t, "query", err)
		rows.Next()
		src.set("2")
		synctest.Wait()
		if err := rows.Scan(new(time.Time)); err == nil || !strings.Contains(err.Error(), `name "value"`) {
			t.Errorf("Scan of the row that was read, into a wrong type: %v", err)
		}
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
		tx, err := db.Begin()
		must(t, "begin", err)
		rows, err := tx.Query("select")
		must(t, "query", err)
		rows.Next()
		o.armed.Store(true)
		done := make(chan error, 1)
		go func() { _, err := tx.Exec("insert"); done <- err }()
		ctx := receive(t, "the call begins", o.there)
		if err := rows.Scan(new(time.Time)); err == nil || !strings.Contains(err.Error(), `name "value"`) {
			t.Errorf("Scan into a wrong type: %v", err)
		}
		src.set("2")
		<-ctx.Done()
		synctest.Wait()
		if f.liveOn("1") != 1 {
			t.Error("the connection was closed while the call unwound")
		}
		o.returns <- driver.ErrBadConn
		mustBeKilled(t, "the call", receive(t, "the call returns", done))
		rows.Close()
		tx.Rollback()
		synctest.Wait()
		want(t, "connections on the old value in the end", f.liveOn("1"), 0)
	})
}

// A stopLog is a log handler that stops at a message. That is inside hotload's
// work of applying a change: the new value is in force, and nothing is killed yet.
type stopLog struct {
	message string
	there   chan bool
	goOn    chan bool
}

func (l *stopLog) Enabled(context.Context, slog.Level) bool { return true }
func (l *stopLog) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *stopLog) WithGroup(string) slog.Handler            { return l }

func (l *stopLog) Handle(_ context.Context, r slog.Record) error {
	generation := int64(0)
	if r.Message == l.message {
		r.Attrs(func(a slog.Attr) bool {
			if a.Key == "generation" {
				generation = a.Value.Int64()
			}
			return true
		})
	}
	if generation == 2 {
		l.there <- true
		<-l.goOn
	}
	return nil
}

// sparesTheValueInForce proves: nothing on the value in force is killed while
// the kill of what is on the old one is under way.
func sparesTheValueInForce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &stopLog{"hotload: value accepted", make(chan bool), make(chan bool)}
		old := slog.Default()
		slog.SetDefault(slog.New(l))
		t.Cleanup(func() { slog.SetDefault(old) })
		f, src := newFake(t), newSource("1")
		db := open(t, ctxFake{f}, src, "forceKill=true")
		db.SetMaxOpenConns(4)
		db.SetMaxIdleConns(4)
		begin := func() *sql.Tx {
			tx, err := db.Begin()
			must(t, "begin", err)
			return tx
		}
		doomed, returned, idle := begin(), begin(), begin()
		fresh, err := db.Conn(t.Context())
		must(t, "conn", err)
		must(t, "commit", idle.Commit())

		change := make(chan bool)
		go func() {
			src.set("2")
			close(change)
		}()
		receive(t, "the new value is in force", l.there)
		redialled := begin() // on what was idle
		want(t, "value of the connection dialled anew", ask(t, redialled), "2")
		want(t, "value of the sql.Conn that was not used", ask(t, fresh), "2")
		must(t, "commit on the old value", returned.Commit())
		reused := begin()
		want(t, "value of the connection used again", ask(t, reused), "2")
		_, err = doomed.Exec("insert")
		must(t, "work on the old value before the kill", err)
		close(l.goOn)
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

// sparesStmtClose proves: a pooled connection that a Stmt.Close holds for a
// moment is not in use, and not killed.
func sparesStmtClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := collect(t)
		f, o, src := newFake(t), newObstacle("Close select"), newSource("1")
		f.onCall = o.onCall
		db := open(t, ctxFake{f}, src, "forceKill=true")
		stmt, err := db.Prepare("select")
		must(t, "prepare", err)
		o.armed.Store(true)
		done := make(chan error, 1)
		go func() { done <- stmt.Close() }()
		receive(t, "the Close begins", o.there)
		src.set("2")
		time.Sleep(2 * lastResort)
		want(t, "connections on the old value", f.liveOn("1"), 1)
		o.returns <- nil
		must(t, "Stmt.Close", receive(t, "Stmt.Close returns", done))
		synctest.Wait()
		want(t, "connections on the old value", f.liveOn("1"), 0)
		want(t, "kills logged", l.count("hotload: connections killed"), 0)
		want(t, "value that the pool goes on with", ask(t, db), "2")
	})
}

// killsAtDeadline proves: with a duration, what is in use lives until its own
// generation's time is up, and not a moment longer.
func killsAtDeadline(t *testing.T) {
	const (
		grace  = 30 * time.Second
		moment = time.Millisecond
	)
	// inTx begins a transaction on the value in force.
	inTx := func(t *testing.T, db *sql.DB, value string) *sql.Tx {
		t.Helper()
		tx, err := db.Begin()
		must(t, "begin", err)
		want(t, "value of a new transaction", ask(t, tx), value)
		return tx
	}
	lives := func(t *testing.T, what string, tx *sql.Tx) {
		t.Helper()
		synctest.Wait()
		_, err := tx.Exec("insert")
		must(t, what, err)
	}
	dead := func(t *testing.T, what string, tx *sql.Tx) {
		t.Helper()
		synctest.Wait()
		_, err := tx.Exec("insert")
		mustBeKilled(t, what, err)
		mustBeKilled(t, what+": Commit", tx.Commit())
	}

	bubble(t, "lives a moment before, is dead on time", func(t *testing.T) {
		f, o, src := newFake(t), newObstacle("Exec long"), newSource("1")
		f.onCall = o.onCall
		l := collect(t)
		db := open(t, ctxFake{f}, src, "forceKill=30s")
		tx := inTx(t, db, "1")
		o.armed.Store(true)
		done := make(chan error, 1)
		go func() { _, err := db.Exec("long"); done <- err }()
		ctx := receive(t, "the call begins", o.there)
		src.set("2")
		want(t, "value of new work", ask(t, db), "2")
		time.Sleep(grace - moment)
		lives(t, "before the deadline", tx)
		must(t, "context of a call before the deadline", ctx.Err())
		want(t, "kills logged", l.count("hotload: connections killed"), 0)
		time.Sleep(moment)
		dead(t, "at the deadline", tx)
		want(t, "cause of the end of the call's context", context.Cause(ctx), hotload.ErrKilled)
		o.returns <- ctx.Err()
		mustBeKilled(t, "the call", receive(t, "the call returns", done))
		want(t, "kills logged", l.count("hotload: connections killed", "generation=1", "killed=2"), 1)
		synctest.Wait()
		want(t, "connections on the old value", f.liveOn("1"), 0)
		want(t, "value of new work", ask(t, db), "2")
	})

	bubble(t, "what finishes in time is not harmed", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		db := open(t, ctxFake{f}, src, "forceKill=30s")
		tx := inTx(t, db, "1")
		src.set("2")
		time.Sleep(grace - moment)
		must(t, "Commit", tx.Commit())
		synctest.Wait()
		want(t, "connections on the old value", f.liveOn("1"), 0)
		tx = inTx(t, db, "2")
		time.Sleep(2 * grace)
		lives(t, "on the value in force, on the connection that was returned", tx)
		must(t, "Commit", tx.Commit())
	})

	bubble(t, "each generation has its own", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		db := open(t, ctxFake{f}, src, "forceKill=30s")
		db.SetMaxIdleConns(0)
		tx1 := inTx(t, db, "1")
		src.set("2")
		tx2 := inTx(t, db, "2")
		time.Sleep(grace / 3)
		src.set("3")
		tx3 := inTx(t, db, "3")
		time.Sleep(grace / 3)
		src.set("4")
		tx4 := inTx(t, db, "4")
		time.Sleep(grace/3 - moment)
		lives(t, "1 before its deadline", tx1)
		time.Sleep(moment)
		dead(t, "1 at its deadline", tx1)
		lives(t, "2 at the deadline of 1", tx2)
		time.Sleep(grace/3 - moment)
		lives(t, "2 before its deadline", tx2)
		time.Sleep(moment)
		dead(t, "2 at its deadline", tx2)
		time.Sleep(grace/3 - moment)
		lives(t, "3 before its deadline", tx3)
		time.Sleep(moment)
		dead(t, "3 at its deadline", tx3)
		time.Sleep(10 * grace)
		lives(t, "the value in force", tx4)
		must(t, "Commit", tx4.Commit())
	})

	bubble(t, "the old value is in force again at the deadline", func(t *testing.T) {
		f, src := newFake(t), newSource("A")
		db := open(t, ctxFake{f}, src, "forceKill=30s")
		db.SetMaxIdleConns(0)
		first := inTx(t, db, "A")
		src.set("B")
		onB := inTx(t, db, "B")
		time.Sleep(grace / 2)
		src.set("A")
		second := inTx(t, db, "A")
		time.Sleep(grace / 2)
		lives(t, "on A at its deadline, with A in force", first)
		time.Sleep(grace/2 - moment)
		lives(t, "on B before its deadline", onB)
		time.Sleep(moment)
		dead(t, "on B at its deadline", onB)
		time.Sleep(10 * grace)
		lives(t, "on A long after", first)
		src.set("C")
		time.Sleep(grace - moment)
		lives(t, "on A before the second deadline", first)
		lives(t, "on the second A before its deadline", second)
		time.Sleep(moment)
		dead(t, "on A at the second deadline", first)
		dead(t, "on the second A at its deadline", second)
		synctest.Wait()
		want(t, "connections on A", f.liveOn("A"), 0)
	})

	bubble(t, "the old value was in force again, but not at the deadline", func(t *testing.T) {
		f, src := newFake(t), newSource("A")
		db := open(t, ctxFake{f}, src, "forceKill=30s")
		db.SetMaxIdleConns(0)
		first := inTx(t, db, "A")
		src.set("B")
		time.Sleep(grace / 3)
		src.set("A")
		second := inTx(t, db, "A")
		time.Sleep(grace / 3)
		src.set("C")
		time.Sleep(grace / 3)
		dead(t, "on A at its deadline", first)
		lives(t, "on the second A at the deadline of the first", second)
		time.Sleep(grace / 3 * 2)
		dead(t, "on the second A at its deadline", second)
	})

	bubble(t, "DB.Close during it leaves nothing behind", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		db := open(t, ctxFake{f}, src, "forceKill=30s")
		var txs []*sql.Tx
		for i, value := range []string{"1", "2", "3"} {
			if i > 0 {
				src.set(value)
			}
			txs = append(txs, inTx(t, db, value))
		}
		time.Sleep(grace / 2)
		start := time.Now()
		must(t, "DB.Close", db.Close())
		want(t, "time that DB.Close took", time.Since(start).Truncate(10*time.Millisecond), 0)
		time.Sleep(10 * grace)
		for _, tx := range txs {
			lives(t, "in use after DB.Close", tx)
			must(t, "Commit", tx.Commit())
		}
		synctest.Wait()
		want(t, "open connections", len(f.live()), 0)
	})

	bubble(t, "DB.Close when it has passed with the old value back in force", func(t *testing.T) {
		f, src := newFake(t), newSource("A")
		db := open(t, ctxFake{f}, src, "forceKill=30s")
		tx := inTx(t, db, "A")
		src.set("B")
		src.set("A")
		time.Sleep(2 * grace)
		start := time.Now()
		must(t, "DB.Close", db.Close())
		want(t, "time that DB.Close took", time.Since(start).Truncate(10*time.Millisecond), 0)
		time.Sleep(2 * grace)
		lives(t, "in use after DB.Close", tx)
		must(t, "Commit", tx.Commit())
	})

	bubble(t, "a drained generation has none", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		db := open(t, ctxFake{f}, src, "forceKill=1h")
		want(t, "value", ask(t, db), "1")
		synctest.Wait()
		before := runtime.NumGoroutine()
		for _, value := range []string{"2", "3", "2"} {
			tx, err := db.Begin()
			must(t, "begin", err)
			src.set(value)
			must(t, "Commit", tx.Commit())
			synctest.Wait()
		}
		await(t, "no more goroutines than before the changes", func() bool { return runtime.NumGoroutine() <= before })
		want(t, "value of new work", ask(t, db), "2")
	})
}

// TestNoKill: by default, and with forceKill=false, nothing is ever killed.
func TestNoKill(t *testing.T) {
	for _, options := range []string{"", "forceKill=false"} {
		bubble(t, "options="+options, func(t *testing.T) {
			f, o, src := newFake(t), newObstacle("Exec long"), newSource("1")
			f.onCall = o.onCall
			db := open(t, ctxFake{f}, src, options)
			tx, err := db.Begin()
			must(t, "begin", err)
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

// TestKillWraps: rows and transactions are the driver's own in graceful mode,
// and wrapped with forceKill.
func TestKillWraps(t *testing.T) {
	ours := func(v any) bool { return strings.HasPrefix(fmt.Sprintf("%T", v), "*hotload.") }
	for options, wrapped := range map[string]bool{"": false, "forceKill=false": false, "forceKill=true": true, "forceKill=1h": true} {
		t.Run("options="+options, func(t *testing.T) {
			f := newFake(t)
			db := open(t, ctxFake{f}, newSource("1"), options)
			conn, err := db.Conn(t.Context())
			must(t, "conn", err)
			defer conn.Close()
			must(t, "Raw", conn.Raw(func(dc any) error {
				rows, err := dc.(driver.QueryerContext).QueryContext(t.Context(), "select", nil)
				must(t, "query", err)
				want(t, "rows of the connection are hotload's", ours(rows), wrapped)
				must(t, "Rows.Close", rows.Close())
				st, err := dc.(driver.ConnPrepareContext).PrepareContext(t.Context(), "select")
				must(t, "prepare", err)
				rows, err = st.(driver.StmtQueryContext).QueryContext(t.Context(), nil)
				must(t, "query", err)
				want(t, "rows of a statement are hotload's", ours(rows), wrapped)
				must(t, "Rows.Close", rows.Close())
				must(t, "Stmt.Close", st.Close())
				tx, err := dc.(driver.ConnBeginTx).BeginTx(t.Context(), driver.TxOptions{})
				must(t, "begin", err)
				want(t, "the transaction is hotload's", ours(tx), wrapped)
				must(t, "Rollback", tx.Rollback())
				res, err := dc.(driver.ExecerContext).ExecContext(t.Context(), "insert", nil)
				must(t, "exec", err)
				want(t, "the result is hotload's", ours(res), false)
				return nil
			}))
		})
	}
}

// TestKillKeepsRowsInterfaces: wrapped rows answer as the driver's own would,
// whether they have the optional interfaces or not.
func TestKillKeepsRowsInterfaces(t *testing.T) {
	describe := func(t *testing.T, db *sql.DB) (text string) {
		rows, err := db.Query("select")
		must(t, "query", err)
		defer rows.Close()
		for more := true; more; more = rows.NextResultSet() {
			columns, err := rows.Columns()
			text += fmt.Sprintln(columns, err)
			types, err := rows.ColumnTypes()
			must(t, "ColumnTypes", err)
			for _, c := range types {
				length, hasLength := c.Length()
				nullable, hasNullable := c.Nullable()
				precision, scale, hasDecimal := c.DecimalSize()
				text += fmt.Sprintln(c.Name(), c.DatabaseTypeName(), c.ScanType(), length, hasLength, nullable, hasNullable, precision, scale, hasDecimal)
			}
			for rows.Next() {
				var v string
				must(t, "scan", rows.Scan(&v))
				text += "row " + v + "\n"
			}
		}
		text += fmt.Sprintln(rows.Err())
		skip, err := db.Query("select")
		must(t, "query", err)
		defer skip.Close()
		return text + fmt.Sprintln(skip.NextResultSet(), skip.Next(), skip.NextResultSet(), skip.Next(), skip.Err())
	}
	for name, d := range map[string]interface {
		driver.Driver
		driver.DriverContext
	}{
		"without": ctxFake{newFake(t)},
		"with":    setsDriver{ctxFake{newFake(t)}},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := d.OpenConnector("1")
			must(t, "connector", err)
			direct := sql.OpenDB(c)
			defer direct.Close()
			want(t, "rows", describe(t, open(t, d, newSource("1"), "forceKill=true")), describe(t, direct))
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
			tx, err := db.Begin()
			must(t, "begin", err)
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

// A ledger counts the effects of writes, each of which has a number in its
// context. Its hook makes calls last a while, and has those whose context ends
// fail in all the ways that drivers do, before their effect or after it.
type ledger struct {
	next    atomic.Int64
	mu      sync.Mutex                  // guards the following fields
	effects map[int64]int               // of each write
	pending map[*fakeConn][]int64       // written in a transaction that is not committed
	txs     map[*fakeConn]endedOrNot    // the contexts of the transactions
	wants   map[int64]func(n int) error // what is right, by the operation's result
}

type endedOrNot interface{ Err() error }

type writeNumber struct{}

func newLedger() *ledger {
	return &ledger{
		effects: make(map[int64]int),
		pending: make(map[*fakeConn][]int64),
		txs:     make(map[*fakeConn]endedOrNot),
		wants:   make(map[int64]func(int) error),
	}
}

// write returns a context that numbers a write.
func (l *ledger) write(ctx context.Context) (context.Context, int64) {
	n := l.next.Add(1)
	return context.WithValue(ctx, writeNumber{}, n), n
}

// done notes how often a write may have taken effect.
func (l *ledger) done(n int64, least, most int, how string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wants[n] = func(have int) error {
		if have < least || have > most {
			return fmt.Errorf("write %d, %s, took effect %d times: want at least %d and at most %d", n, how, have, least, most)
		}
		return nil
	}
}

func (l *ledger) check(t *testing.T) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for n, have := range l.effects {
		if l.wants[n] == nil {
			t.Errorf("write %d took effect %d times and nobody knows of it", n, have)
		}
	}
	for n, want := range l.wants {
		if err := want(l.effects[n]); err != nil {
			t.Error(err)
		}
	}
}

// linger makes a call last a while, unless its context ends.
func linger(ctx context.Context) {
	if rand.N(3) == 0 {
		return
	}
	timer := time.NewTimer(rand.N(2 * time.Millisecond))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// unwind takes its time and returns an error of a call whose context ended.
func unwind() error {
	time.Sleep(rand.N(time.Millisecond))
	errs := []error{driver.ErrBadConn, context.Canceled, fmt.Errorf("fake: %w", driver.ErrBadConn),
		fmt.Errorf("fake: %w", context.Canceled), io.EOF, &driverError{57014}}
	return errs[rand.N(len(errs))]
}

func (l *ledger) onCall(ctx context.Context, c *fakeConn, call string) error {
	switch kind, _, _ := strings.Cut(call, " "); kind {
	case "Exec", "Query", "Next", "Prepare", "Ping":
		linger(ctx)
		if ctx.Err() != nil {
			return unwind()
		}
		if n, ok := ctx.Value(writeNumber{}).(int64); ok && kind == "Exec" {
			l.mu.Lock()
			if c.inTx {
				l.pending[c] = append(l.pending[c], n)
			} else {
				l.effects[n]++
			}
			l.mu.Unlock()
		}
		linger(ctx)
		if ctx.Err() != nil {
			return unwind()
		}
	case "Begin":
		linger(ctx)
		l.mu.Lock()
		l.pending[c], l.txs[c] = nil, ctx
		l.mu.Unlock()
	case "Commit":
		l.mu.Lock()
		tx := l.txs[c]
		l.mu.Unlock()
		time.Sleep(rand.N(time.Millisecond))
		if tx.Err() != nil {
			return unwind()
		}
		l.mu.Lock()
		for _, n := range l.pending[c] {
			l.effects[n]++
		}
		l.pending[c] = nil
		l.mu.Unlock()
		time.Sleep(rand.N(time.Millisecond))
		if tx.Err() != nil && rand.N(2) == 0 {
			return unwind()
		}
	}
	return nil
}

// A killStorm changes the value again and again under a load of operations
// that forceKill may end.
type killStorm struct {
	t              *testing.T
	db             *sql.DB
	ledger         *ledger
	begun, applied atomic.Int64 // the number of the value that is being put in force, and of the one that is
	ops, killed    atomic.Int64
}

// op runs an operation. It may fail if a change was being applied at any time
// during it, and then it was killed. It may return the value that it ran on.
func (s *killStorm) op(what string, f func() (value string, err error)) {
	applied := s.applied.Load()
	quiet := applied == s.begun.Load()
	value, err := f()
	quiet = quiet && applied == s.begun.Load()
	s.ops.Add(1)
	if err != nil {
		s.killed.Add(1)
		if mustBeKilled(s.t, what, err); quiet {
			s.t.Errorf("%s: failed although no change was applied meanwhile: %v", what, err)
		}
		return
	}
	if n, err := strconv.ParseInt(value, 10, 64); value != "" && (err != nil || n < applied) {
		s.t.Errorf("%s: ran on value %q when %d was in force", what, value, applied)
	}
}

// exec runs a write.
func (s *killStorm) exec(ctx context.Context, f func(ctx context.Context) (sql.Result, error)) error {
	ctx, n := s.ledger.write(ctx)
	_, err := f(ctx)
	if err == nil {
		s.ledger.done(n, 1, 1, "which succeeded")
	} else {
		s.ledger.done(n, 0, 1, "which failed")
	}
	return err
}

var killWorkers = []struct {
	name string
	work func(s *killStorm, write, read *sql.Stmt)
}{
	{"exec", func(s *killStorm, _, _ *sql.Stmt) {
		s.op("exec", func() (string, error) {
			return "", s.exec(s.t.Context(), func(ctx context.Context) (sql.Result, error) {
				return s.db.ExecContext(ctx, "write", special{"x"})
			})
		})
	}},
	{"statement", func(s *killStorm, write, _ *sql.Stmt) {
		s.op("statement", func() (string, error) {
			return "", s.exec(s.t.Context(), func(ctx context.Context) (sql.Result, error) {
				return write.ExecContext(ctx, special{"x"}, 2)
			})
		})
	}},
	{"statement's query", func(s *killStorm, _, read *sql.Stmt) {
		s.op("statement's query", func() (v string, err error) {
			return v, read.QueryRow(special{"x"}).Scan(&v)
		})
	}},
	{"rows", func(s *killStorm, _, _ *sql.Stmt) {
		s.op("rows", func() (v string, err error) {
			rows, err := s.db.Query("read", special{"x"})
			if err != nil {
				return "", err
			}
			defer rows.Close()
			n := 0
			for ; rows.Next(); n++ {
				if err := rows.Scan(&v); err != nil {
					return "", err
				}
				time.Sleep(rand.N(100 * time.Microsecond))
			}
			if err := rows.Err(); err != nil {
				return "", err
			}
			if n != 3 {
				s.t.Errorf("rows: have %d without an error, want 3", n)
			}
			return v, rows.Close()
		})
	}},
	{"transaction", func(s *killStorm, write, _ *sql.Stmt) {
		s.op("transaction", func() (v string, err error) {
			ctx, n := s.ledger.write(s.t.Context())
			done, how := 0, "in a transaction that was not committed"
			defer func() {
				s.ledger.done(n, done, done, how)
			}()
			tx, err := s.db.BeginTx(ctx, nil)
			if err != nil {
				return "", err
			}
			defer tx.Rollback()
			if err := tx.QueryRow("read").Scan(&v); err != nil {
				return "", err
			}
			if rand.N(2) == 0 {
				_, err = tx.ExecContext(ctx, "write", special{"x"})
			} else {
				_, err = tx.StmtContext(ctx, write).ExecContext(ctx, 1, special{"x"})
			}
			if err != nil {
				return "", err
			}
			time.Sleep(rand.N(time.Millisecond))
			if rand.N(4) == 0 {
				err = tx.Rollback()
				how = "in a transaction that was rolled back"
				return v, err
			}
			if err = tx.Commit(); err == nil {
				done, how = 1, "in a transaction that was committed"
			} else if errors.Is(err, hotload.ErrKilled) {
				// The Commit may have been in progress.
				s.ledger.mu.Lock()
				done = min(1, s.ledger.effects[n])
				s.ledger.mu.Unlock()
			}
			return v, err
		})
	}},
	{"conn", func(s *killStorm, _, _ *sql.Stmt) {
		conn, err := s.db.Conn(s.t.Context())
		if err != nil {
			s.t.Errorf("conn: %v", err)
			return
		}
		defer conn.Close()
		time.Sleep(rand.N(2 * time.Millisecond)) // the first use comes later
		s.op("conn", func() (v string, err error) {
			if rand.N(2) == 0 {
				return v, conn.QueryRowContext(s.t.Context(), "read", special{"x"}).Scan(&v)
			}
			return "", s.exec(s.t.Context(), func(ctx context.Context) (sql.Result, error) {
				return conn.ExecContext(ctx, "write", special{"x"})
			})
		})
	}},
	{"prepare", func(s *killStorm, _, _ *sql.Stmt) {
		s.op("prepare", func() (v string, err error) {
			stmt, err := s.db.Prepare("read")
			if err != nil {
				return "", err
			}
			defer stmt.Close()
			return v, stmt.QueryRow().Scan(&v)
		})
	}},
}

// TestKillStorm: under a storm of changes that kill, the driver is used as it
// has to be, each failure is a kill, each success took effect once and each
// failure at most once, and nothing fails while no change is applied.
func TestKillStorm(t *testing.T) {
	for _, test := range []struct {
		options string
		maxOpen int
	}{
		{"forceKill=true", 1}, {"forceKill=true", 2}, {"forceKill=true", 8}, {"forceKill=true", 0},
		{"forceKill=2ms", 1}, {"forceKill=2ms", 0},
	} {
		for _, withContext := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,max=%d,DriverContext=%t", test.options, test.maxOpen, withContext), func(t *testing.T) {
				f := newFake(t)
				f.rowCount = 3
				var d driver.Driver = f
				if withContext {
					d = ctxFake{f}
				}
				src := newSource("1")
				s := &killStorm{t: t, db: open(t, d, src, test.options), ledger: newLedger()}
				f.onCall = s.ledger.onCall
				s.begun.Store(1)
				s.applied.Store(1)
				s.db.SetMaxOpenConns(test.maxOpen)
				s.db.SetMaxIdleConns(4)
				write, err := s.db.Prepare("write ? ?")
				must(t, "prepare", err)
				read, err := s.db.Prepare("read ?")
				must(t, "prepare", err)
				ctx, stop := context.WithTimeout(t.Context(), *stormTime)
				defer stop()
				var wg sync.WaitGroup
				for range 2 {
					for _, w := range killWorkers {
						wg.Go(func() {
							for ctx.Err() == nil {
								w.work(s, write, read)
							}
						})
					}
				}
				changes := 0
				for ; ctx.Err() == nil; changes++ {
					time.Sleep(rand.N(8 * time.Millisecond))
					s.begun.Add(1)
					src.set(strconv.FormatInt(s.begun.Load(), 10))
					s.applied.Add(1)
				}
				wg.Wait()
				write.Close()
				read.Close()
				s.db.Close()
				await(t, "every connection is closed", func() bool { return len(f.live()) == 0 })
				s.ledger.check(t)
				t.Logf("%d operations, %d killed, %d changes, %d connections", s.ops.Load(), s.killed.Load(), changes, f.opened.Load())
				if s.ops.Load() == s.killed.Load() || s.killed.Load() == 0 || changes == 0 {
					t.Error("the storm did not happen")
				}
			})
		}
	}
}
