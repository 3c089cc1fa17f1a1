package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"strings"
	"sync"
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

// A connection that an Open brought whose caller had left is gone with the
// rest when DB.Close returns.
func TestSpareIsGoneAfterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.onOpen = func(context.Context, string) error { time.Sleep(100 * time.Millisecond); return nil }
		f.onClose = func(*fakeConn) { time.Sleep(100 * time.Millisecond) }
		db := open(t, f, newSource("a"), "")
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		if err := db.PingContext(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("impatient caller: %v", err)
		}
		time.Sleep(time.Second)
		want(t, "open", len(f.live()), 1)
		db.Close()
		want(t, "open after DB.Close", len(f.live()), 0)
	})
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
	for _, deaf := range []string{"Prepare two", "Close one"} {
		t.Run(deaf, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				f.lenient.Store(true)
				f.onCall = func(_ context.Context, c *fakeConn, call string) error {
					if call == deaf && c.value == "a" {
						time.Sleep(3 * time.Second)
					}
					return nil
				}
				src := newSource("a")
				db := open(t, f, src, "forceKill=true")
				conn, err := db.Conn(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				stmt, err := conn.PrepareContext(t.Context(), "one")
				if err != nil {
					t.Fatal(err)
				}
				done := make(chan struct{})
				go func() {
					defer close(done)
					if deaf == "Close one" {
						stmt.Close()
					} else {
						conn.PrepareContext(t.Context(), "two")
					}
				}()
				synctest.Wait()
				src.set("b")
				time.Sleep(2 * time.Second)
				want(t, "connections closed", f.closed.Load(), 1)
				<-done
			})
		})
	}
}

// TestHungReset: a driver that asks its server something in ResetSession, and
// waits, is no reason to wait for a server that was left: nothing has run yet.
func TestHungReset(t *testing.T) {
	for _, options := range []string{"", "forceKill=true"} {
		bubble(t, "options="+options, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			resets := make(chan error, 1)
			f.onCall = func(ctx context.Context, c *fakeConn, call string) error {
				if c.value != "1" || call != "ResetSession" {
					return nil
				}
				<-ctx.Done()
				resets <- ctx.Err()
				return driver.ErrBadConn
			}
			db := open(t, ctxFake{f}, src, options)
			db.SetMaxOpenConns(1)
			must(t, "ping", db.Ping())

			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := db.ExecContext(ctx, "insert"); err == nil {
				t.Error("an operation whose time was over in ResetSession: no error")
			}
			want(t, "how its context ended", <-resets, context.DeadlineExceeded)

			must(t, "ping", db.Ping()) // on a connection that needs no reset yet
			value := make(chan string)
			go func() { value <- ask(t, db) }()
			synctest.Wait()
			src.set("2")
			want(t, "how the context ended", <-resets, context.Canceled)
			want(t, "value", <-value, "2")
			synctest.Wait()
			want(t, "connections on the old value", f.liveOn("1"), 0)
		})
	}
}
