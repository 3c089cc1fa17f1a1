package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/infobloxopen/hotload"
)

// A statement that a server is slow to close is closed when its proxy has long
// prepared it again elsewhere: what is closed then is what was open there.
func TestStatementPreparedAgainWhileClosing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.onCall = func(_ context.Context, c *fakeConn, call string) error {
			if c.value == "a" && strings.HasPrefix(call, "Close ") {
				time.Sleep(3 * time.Second)
			}
			return nil
		}
		src := newSource("a")
		db := open(t, f, src, "")
		db.SetMaxOpenConns(1)
		var stmts []*sql.Stmt
		for range 2 {
			stmt, err := db.Prepare("ask")
			if err != nil {
				t.Fatal(err)
			}
			stmts = append(stmts, stmt)
		}
		src.set("b")
		for range 8 {
			for _, stmt := range stmts {
				var value string
				if err := stmt.QueryRow().Scan(&value); err != nil || value != "b" {
					t.Errorf("statement after the change: %q, %v", value, err)
				}
			}
			time.Sleep(time.Second)
		}
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

// A dial that has chosen its generation and then sleeps until that has drained
// opens nothing with it.
func TestDrainedMeansNoDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := collect(t)
		d := &shutFake{fake: newFake(t)}
		src := newSource("a")
		name := register(d, src)
		connector, err := open(t, d, src, "").Driver().(driver.DriverContext).OpenConnector(name)
		if err != nil {
			t.Fatal(err)
		}
		defer connector.(io.Closer).Close()
		first, err := connector.Connect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer first.Close()

		ctx := &blockingContext{Context: t.Context(), asked: make(chan struct{}), answer: make(chan struct{})}
		result := make(chan driver.Conn)
		go func() {
			c, err := connector.Connect(ctx)
			if err != nil {
				t.Error(err)
			}
			result <- c
		}()
		<-ctx.asked
		src.set("b")
		synctest.Wait()
		want(t, "drained", l.count("generation drained", "generation=1"), 1)
		f := d.fake
		opened := f.opened.Load()
		close(ctx.answer)
		second := <-result
		defer second.Close()
		synctest.Wait()
		want(t, "opened since", f.opened.Load()-opened, 1)
		want(t, "drained", l.count("generation drained", "generation=1"), 1)
	})
}

// What is closing already when a value is accepted is not in use.
func TestClosingIsNotInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := collect(t)
		f := newFake(t)
		slow := make(chan struct{})
		defer close(slow)
		f.onClose = func(*fakeConn) { <-slow }
		src := newSource("a")
		db := open(t, f, src, "")
		db.SetMaxIdleConns(-1)
		if err := db.Ping(); err != nil { // its connection goes on closing
			t.Fatal(err)
		}
		src.set("b")
		synctest.Wait()
		want(t, "log of in_use=0:\n"+l.String(), l.count("value accepted", "generation=2", "in_use=0"), 1)
	})
}

// A connection that comes when its caller has left is gone with the rest when
// DB.Close returns, whether it is kept for another caller or closing.
func TestLateConnectionIsGoneAfterClose(t *testing.T) {
	for _, withContext := range []bool{false, true} {
		bubble(t, fmt.Sprintf("DriverContext=%t", withContext), func(t *testing.T) {
			f := newFake(t)
			var d driver.Driver = f
			if withContext {
				d = ctxFake{f}
			}
			f.onOpen = func(context.Context, string) error { time.Sleep(2 * patience); return nil }
			f.onClose = func(*fakeConn) { time.Sleep(100 * time.Millisecond) }
			db := open(t, d, newSource("a"), "")
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			defer cancel()
			start := time.Now()
			if err := db.PingContext(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("impatient caller: %v", err)
			}
			time.Sleep(2*patience + 50*time.Millisecond - time.Since(start))
			want(t, "open", len(f.live()), 1)
			db.Close()
			want(t, "open after DB.Close", len(f.live()), 0)
		})
	}
}

// The end of one result set is not the end of all when the connection is
// killed there.
func TestKillBetweenResultSets(t *testing.T) {
	f := newFake(t)
	src := newSource("a")
	name := register(endlessFake{f}, src) + "?forceKill=true"
	connector, err := open(t, f, src, "").Driver().(driver.DriverContext).OpenConnector(name)
	if err != nil {
		t.Fatal(err)
	}
	defer connector.(io.Closer).Close()
	conn, err := connector.Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r, err := conn.(driver.QueryerContext).QueryContext(t.Context(), "ask", nil)
	if err != nil {
		t.Fatal(err)
	}
	dest := make([]driver.Value, 1)
	for err == nil {
		err = r.Next(dest)
	}
	want(t, "end of the first result set", err, io.EOF)
	src.set("b")
	sets := r.(driver.RowsNextResultSet)
	want(t, "another result set", sets.HasNextResultSet(), true)
	if err := sets.NextResultSet(); !errors.Is(err, hotload.ErrKilled) {
		t.Errorf("NextResultSet: %v, want ErrKilled", err)
	}
}

// A endlessFake is a fake whose queries have many result sets.
type endlessFake struct{ *fake }

type endlessConn struct{ *fakeConn }

type endlessRows struct{ driver.Rows }

func (f endlessFake) Open(value string) (driver.Conn, error) {
	c, err := f.fake.Open(value)
	if err != nil {
		return nil, err
	}
	return endlessConn{c.(*fakeConn)}, nil
}

func (c endlessConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	r, err := c.fakeConn.QueryContext(ctx, query, args)
	return endlessRows{r}, err
}

func (endlessRows) HasNextResultSet() bool { return true }
func (endlessRows) NextResultSet() error   { return nil }

// A driver that is deaf to a kill gets the Close of its connection during the
// call, and no other call; hotload's own books survive that.
func TestDeafStatement(t *testing.T) {
	modern := func(f *fake) driver.Driver { return f }
	for _, row := range []struct {
		deaf   string
		driver func(f *fake) driver.Driver
		call   func(db *sql.DB, old *sql.Stmt) error // old has to be prepared again
	}{
		{"Prepare two", modern, func(db *sql.DB, _ *sql.Stmt) error {
			conn, _ := db.Conn(bg)
			defer conn.Close()
			conn.PrepareContext(bg, "one") // stays open
			_, err := conn.PrepareContext(bg, "two")
			return err
		}},
		{"Close one", modern, func(db *sql.DB, _ *sql.Stmt) error {
			conn, _ := db.Conn(bg)
			defer conn.Close()
			stmt, _ := conn.PrepareContext(bg, "one")
			stmt.Close()
			return conn.PingContext(bg)
		}},
		{"Prepare old", func(f *fake) driver.Driver { return heedless{ctxFake{f}} }, func(_ *sql.DB, old *sql.Stmt) error {
			_, err := old.Exec()
			return err
		}},
		{"Next", func(f *fake) driver.Driver { return setsDriver{ctxFake{f}} }, func(db *sql.DB, _ *sql.Stmt) error {
			return db.QueryRow("ask").Scan(new(string))
		}},
	} {
		bubble(t, row.deaf, func(t *testing.T) {
			f, src := newFake(t), newSource("a")
			f.lenient.Store(true)
			f.onCall = func(_ context.Context, c *fakeConn, call string) error {
				if call != row.deaf || c.value != "b" {
					return nil
				}
				if time.Sleep(3 * time.Second); call == "Next" {
					return io.EOF
				}
				return nil
			}
			db := open(t, row.driver(f), src, "forceKill=true")
			old, err := db.Prepare("old")
			must(t, "prepare", err)
			defer old.Close()
			src.set("b")
			done := make(chan error, 1)
			go func() { done <- row.call(db, old) }()
			synctest.Wait()
			src.set("c")
			time.Sleep(2 * lastResort)
			want(t, "connections on the old value", f.liveOn("b"), 0)
			mustBeKilled(t, "the call", <-done)
		})
	}
}

// A legacyFake is a fake whose connections know no contexts.
type legacyFake struct{ *fake }

type legacyConn struct{ c *fakeConn }

func (f legacyFake) Open(value string) (driver.Conn, error) {
	c, err := f.fake.Open(value)
	if err != nil {
		return nil, err
	}
	return legacyConn{c.(*fakeConn)}, nil
}

func (c legacyConn) Close() error { return c.c.Close() }

func (c legacyConn) Prepare(query string) (driver.Stmt, error) {
	return c.c.PrepareContext(context.Background(), query)
}

func (c legacyConn) Begin() (driver.Tx, error) {
	return c.c.BeginTx(context.Background(), driver.TxOptions{})
}

// A connection whose Close hangs is waited for once, by a caller who has half
// of the time left then, and no more when a second has passed.
func TestHungClose(t *testing.T) {
	for _, since := range []time.Duration{0, time.Hour} {
		for _, inUse := range []bool{false, true} {
			bubble(t, fmt.Sprintf("%v after the change,in use=%t", since, inUse), func(t *testing.T) {
				f, src := newFake(t), newSource("1")
				stuck := make(chan struct{})
				defer close(stuck)
				f.onClose = func(c *fakeConn) {
					if c.value == "1" {
						<-stuck
					}
				}
				db := open(t, f, src, "")
				db.SetMaxOpenConns(1)
				tx, err := db.Begin()
				must(t, "begin", err)
				if inUse {
					db.SetMaxIdleConns(-1) // it is closing when the pool counts it no more
					src.set("2")
				}
				must(t, "commit", tx.Commit())
				if !inUse {
					src.set("2")
				}
				time.Sleep(since)
				const patience = 900 * time.Millisecond
				began := time.Now()
				for range 20 {
					ctx, cancel := context.WithTimeout(t.Context(), patience)
					must(t, "impatient caller", db.PingContext(ctx))
					cancel()
				}
				most := patience / 2
				if since > 0 {
					most = 0
				}
				want(t, "time that 20 callers took", time.Since(began), most)
			})
		}
	}
}

// What failed a caller who has left does not fail one who came later.
func TestFailureOfLeftOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, dials := newFake(t), 0
		f.onOpen = func(context.Context, string) error {
			if dials++; dials > 1 {
				return nil // the server is back
			}
			time.Sleep(5 * time.Second)
			return errDead
		}
		db := open(t, f, newSource("1"), "")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		want(t, "error of the impatient caller", db.PingContext(ctx), context.DeadlineExceeded)
		must(t, "the next caller", db.Ping())
		want(t, "most dials at a time", f.maxDialing.Load(), 1)
	})
}

// A slowLog is a log handler that takes a second over one event, and lists all
// in the order in which it was done with them.
type slowLog struct {
	event string
	mu    sync.Mutex // guards done
	done  []string
}

func (l *slowLog) Enabled(context.Context, slog.Level) bool { return true }
func (l *slowLog) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *slowLog) WithGroup(string) slog.Handler            { return l }

func (l *slowLog) Handle(_ context.Context, r slog.Record) error {
	event := strings.TrimPrefix(r.Message, "hotload: ")
	r.Attrs(func(a slog.Attr) bool { event += " " + a.Value.String(); return false }) // the generation
	if event == l.event {
		time.Sleep(time.Second)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.done = append(l.done, event)
	return nil
}

// What is logged of a generation is in order, however slow the logger is.
func TestLogOrder(t *testing.T) {
	for _, row := range []struct{ options, first, then string }{
		{"", "value accepted 2", "generation drained 1"},
		{"", "value accepted 2", "value accepted 3"},
		{"forceKill=true", "connections killed 1", "generation drained 1"},
		{"forceKill=1s", "connections killed 1", "generation drained 1"},
	} {
		bubble(t, row.options+"/"+row.then, func(t *testing.T) {
			old, l := slog.Default(), &slowLog{event: row.first}
			slog.SetDefault(slog.New(l))
			defer slog.SetDefault(old)
			src := newSource("1")
			db := open(t, newFake(t), src, row.options)
			tx, err := db.Begin()
			must(t, "begin", err)
			set := make(chan bool)
			go func() { src.set("2"); close(set) }()
			synctest.Wait()
			if row.options == "" {
				must(t, "commit", tx.Commit()) // drains its generation while the logger is slow
			}
			<-set
			src.set("3")
			time.Sleep(time.Minute)
			tx.Rollback()
			must(t, "DB.Close", db.Close())
			synctest.Wait()
			if first, then := slices.Index(l.done, row.first), slices.Index(l.done, row.then); first < 0 || then < first {
				t.Errorf("have %q, want %q before %q", l.done, row.first, row.then)
			}
		})
	}
}

// TestHungReset: with forceKill a driver that asks its server something in
// ResetSession, and waits, is closed as a last resort.
func TestHungReset(t *testing.T) {
	bubble(t, "forceKill=true", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		f.lenient.Store(true)
		shut, hung := make(chan bool, 1), make(chan bool)
		f.onClose = func(c *fakeConn) {
			if c.value == "1" {
				shut <- true
			}
		}
		f.onCall = func(_ context.Context, c *fakeConn, call string) error {
			if c.value != "1" || call != "ResetSession" {
				return nil
			}
			hung <- true
			<-shut
			return driver.ErrBadConn
		}
		db := open(t, ctxFake{f}, src, "forceKill=true")
		db.SetMaxOpenConns(1)
		must(t, "ping", db.Ping())
		value := make(chan string)
		go func() { value <- ask(t, db) }()
		receive(t, "ResetSession", hung)
		start := time.Now()
		src.set("2")
		want(t, "value", receive(t, "value", value), "2")
		want(t, "time until the caller goes on", time.Since(start), lastResort)
		synctest.Wait()
		want(t, "connections on the old value", f.liveOn("1"), 0)
	})
}

// TestHungOpen: an Open that never returns serves later callers for ten seconds,
// and then no longer keeps them from an Open of their own.
func TestHungOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src, hang := newFake(t), newSource("1"), make(chan bool)
		var dials atomic.Int64
		f.onOpen = func(context.Context, string) error {
			if dials.Add(1) == 1 {
				<-hang
			}
			return nil
		}
		db := open(t, f, src, "")
		defer close(hang)
		start := time.Now()
		for range 3 {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			want(t, "error of an impatient caller", db.PingContext(ctx), context.DeadlineExceeded)
		}
		want(t, "dials", dials.Load(), 1)
		must(t, "a patient caller", db.Ping())
		want(t, "when that was served", time.Since(start), 10*time.Second)
		must(t, "the next", db.Ping())
		want(t, "dials", dials.Load(), 2)
	})
}

// TestManyStatements: with forceKill the statements of a connection that closes
// have a second, all of them together.
func TestManyStatements(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		f.onCall = func(_ context.Context, c *fakeConn, call string) error {
			if strings.HasPrefix(call, "Close ") {
				time.Sleep(20 * time.Millisecond)
			}
			return nil
		}
		db := open(t, ctxFake{f}, src, "forceKill=true")
		db.SetMaxOpenConns(1)
		for i := range 10 {
			_, err := db.Prepare(fmt.Sprint("insert ", i))
			must(t, "prepare", err)
		}
		src.set("2")
		await(t, "the connection to be closed", func() bool { return f.liveOn("1") == 0 })
		want(t, "value", ask(t, db), "2")
	})
}

// TestHurriedCaller: who has no time to wait for a connection that is closing
// leaves that to others, DB.Close among them.
func TestHurriedCaller(t *testing.T) {
	for _, returned := range []bool{false, true} { // its place is taken, or given up
		bubble(t, fmt.Sprint("returned=", returned), func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			f.onClose = func(c *fakeConn) {
				if c.value == "1" {
					time.Sleep(500 * time.Millisecond)
				}
			}
			db := open(t, ctxFake{f}, src, "")
			if returned {
				db.SetMaxIdleConns(-1)
			}
			conn, err := db.Conn(t.Context())
			must(t, "conn", err)
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

// TestPatientCallers: who waits for a hung host for long has one Open, not one
// more every ten seconds.
func TestPatientCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, hang := newFake(t), make(chan bool)
		f.onOpen = func(context.Context, string) error {
			<-hang
			return nil
		}
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
}

// TestKilledRowsContext: rows are interrupted through the context of their
// query, though another call on the connection came later.
func TestKilledRowsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		f.rowCount = 2
		var cause error
		f.onCall = func(ctx context.Context, c *fakeConn, call string) error {
			if call != "Next" || c.value != "1" {
				return nil
			}
			<-ctx.Done()
			cause = context.Cause(ctx)
			return ctx.Err()
		}
		db := open(t, ctxFake{f}, src, "forceKill=true")
		tx, err := db.Begin()
		must(t, "begin", err)
		defer tx.Rollback()
		rows, err := tx.Query("select")
		must(t, "query", err)
		defer rows.Close()
		_, err = tx.Exec("insert")
		must(t, "exec", err)
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

// TestLeftConnectEnds: the context of a Connect ends when its generation is
// superseded, and when its caller leaves.
func TestLeftConnectEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		ended := make(chan error, 1)
		f.onOpen = func(ctx context.Context, value string) error {
			if value != "1" {
				return nil
			}
			<-ctx.Done()
			ended <- ctx.Err()
			return ctx.Err()
		}
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
