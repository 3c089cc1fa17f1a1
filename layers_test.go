package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// around opens a pool on a layer around hotload that passes ResetSession on
// but not IsValid.
func around(t *testing.T, d driver.Driver, src *source, options string) *sql.DB {
	t.Helper()
	empty, err := sql.Open("hotload", "")
	if err != nil {
		t.Fatal(err)
	}
	w := wrapper{Driver: empty.Driver(), poor: true, calls: new(atomic.Int64)}
	empty.Close()
	name := register(d, src)
	sql.Register(name, w)
	db, err := sql.Open(name, name+"?"+options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	db.SetMaxOpenConns(1)
	return db
}

// A bareFake's connections are no SessionResetters and no Validators.
type bareFake struct{ *fake }

type bareConn struct {
	driver.Conn
	driver.QueryerContext
	driver.ConnBeginTx
	driver.ConnPrepareContext
}

func (f bareFake) Open(value string) (driver.Conn, error) {
	c, err := f.fake.Open(value)
	if err != nil {
		return nil, err
	}
	fc := c.(*fakeConn)
	return bareConn{fc, fc, fc, fc}, nil
}

// A layer that does not pass IsValid on: a connection that was in use at a change is not
// used again, also if the driver is no SessionResetter.
func TestLayerWithoutIsValidStale(t *testing.T) {
	src := newSource("1")
	db := around(t, bareFake{newFake(t)}, src, "")
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	src.set("2")
	tx.Commit()
	for range 3 {
		if v := ask(t, db); v != "2" {
			t.Errorf("new operation after the change runs on %q", v)
		}
	}
}

// The same: a connection that was killed does not fail later operations.
func TestLayerWithoutIsValidKilled(t *testing.T) {
	src := newSource("1")
	db := around(t, newFake(t), src, "forceKill=true")
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	src.set("2")
	tx.Rollback()
	for range 3 {
		var v string
		if err := db.QueryRow("ask").Scan(&v); err != nil || v != "2" {
			t.Errorf("new operation after the kill: %q, %v", v, err)
		}
	}
}

// The same: nor does one whose transaction was rolled back as its context had ended.
func TestLayerWithoutIsValidSpoiled(t *testing.T) {
	src := newSource("1")
	db := around(t, bareFake{newFake(t)}, src, "")
	for range 50 {
		ctx, cancel := context.WithCancel(t.Context())
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		cancel()
		tx.Rollback()
		for range 2 {
			var v string
			if err := db.QueryRow("ask").Scan(&v); err != nil {
				t.Fatalf("new operation after a rollback: %q, %v", v, err)
			}
		}
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
		f, src := newFake(t), newSource("1")
		f.onCall = func(_ context.Context, _ *fakeConn, call string) error {
			if call == "IsValid" {
				return driver.ErrBadConn
			}
			return nil
		}
		connector, err := open(t, f, src, "").Driver().(driver.DriverContext).OpenConnector(register(f, src))
		must(t, "OpenConnector", err)
		defer connector.(io.Closer).Close()
		db := sql.OpenDB(deafLayer{connector})
		for range 3 {
			conn, err := db.Conn(t.Context())
			must(t, "conn", err)
			conn.Close()
		}
		must(t, "DB.Close", db.Close())
		synctest.Wait()
		want(t, "open connections", len(f.live()), 0)
	})
}

// What an old server answered to a Close is no error of DB.Close.
func TestOldCloseError(t *testing.T) {
	for _, options := range []string{"", "forceKill=true"} {
		for _, used := range []bool{false, true} {
			bubble(t, fmt.Sprintf("options=%s,in use=%t", options, used), func(t *testing.T) {
				v := &variant{conn: func(c *recConn) driver.Conn { return c }, fails: map[string]error{"Close": errDriver}}
				src := newSource("1")
				db := open(t, newSubject(v).recorder.driver(), src, options)
				tx, err := db.Begin()
				must(t, "begin", err)
				if !used {
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

// Arguments that were not converted, as the dial failed, leave no trace: those
// of a Raw callback go to the driver as they are.
func TestConvertedNotTwice(t *testing.T) {
	f, src := newFake(t), newSource("1")
	checks := 0
	f.onCall = func(_ context.Context, _ *fakeConn, call string) error {
		if call == "CheckNamedValue" {
			checks++
		}
		return nil
	}
	db := open(t, f, src, "")
	conn, err := db.Conn(t.Context())
	must(t, "conn", err)
	defer conn.Close()
	src.set("2")
	f.onOpen = func(context.Context, string) error { f.onOpen = nil; return errDead }
	_, err = conn.ExecContext(t.Context(), "insert ?", 1)
	want(t, "error of the dial", err, error(errDead))
	must(t, "Raw", conn.Raw(func(dc any) error {
		_, err := dc.(driver.ExecerContext).ExecContext(t.Context(), "insert ?", []driver.NamedValue{{Ordinal: 1, Value: int64(1)}})
		return err
	}))
	want(t, "arguments checked", checks, 0)
}

// A layer that does not ask a statement how many arguments it takes: it is
// prepared again all the same.
func TestLayerWithoutNumInput(t *testing.T) {
	f, src := newFake(t), newSource("1")
	conn, err := open(t, f, src, "").Driver().Open(register(f, src))
	must(t, "Open", err)
	defer conn.Close()
	stmt, err := conn.Prepare("insert")
	must(t, "prepare", err)
	conn.(driver.Validator).IsValid()
	src.set("2")
	_, err = conn.(driver.ExecerContext).ExecContext(t.Context(), "insert", nil)
	must(t, "exec", err)
	res, err := stmt.(driver.StmtExecContext).ExecContext(t.Context(), nil)
	must(t, "exec of the statement", err)
	on, _ := res.LastInsertId()
	want(t, "value that it ran on", on, 2)
	must(t, "Stmt.Close", stmt.Close())
}

// An unlikeFake's connections to 2 have no ExecContext, unlike those to 1.
type unlikeFake struct{ *fake }

func (f unlikeFake) Open(value string) (driver.Conn, error) {
	if value == "2" {
		return bareFake(f).Open(value)
	}
	return f.fake.Open(value)
}

// A connection that has no ExecContext takes the place of one that has.
func TestUnlikeConnections(t *testing.T) {
	src := newSource("1")
	db := open(t, unlikeFake{newFake(t)}, src, "")
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

// Rows and transactions of a Raw callback may be ended twice.
func TestDoubleEnd(t *testing.T) {
	for _, what := range []string{"rows", "tx"} {
		t.Run(what, func(t *testing.T) {
			db := open(t, lenientFake{newFake(t)}, newSource("1"), "forceKill=true")
			conn, err := db.Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.Raw(func(dc any) error {
				defer func() {
					if r := recover(); r != nil {
						t.Errorf("panic: %v", r)
					}
				}()
				if what == "rows" {
					rows, err := dc.(driver.QueryerContext).QueryContext(t.Context(), "ask", nil)
					if err != nil {
						t.Error(err)
					}
					defer rows.Close()
					rows.Close()
				} else {
					tx, err := dc.(driver.ConnBeginTx).BeginTx(t.Context(), driver.TxOptions{})
					if err != nil {
						t.Error(err)
					}
					defer tx.Rollback()
					tx.Commit()
				}
				return nil
			})
		})
	}
}

// The second end of rows does not end the context of others.
func TestDoubleEndCancelsOther(t *testing.T) {
	db := open(t, lenientFake{newFake(t)}, newSource("1"), "forceKill=true")
	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.Raw(func(dc any) error {
		first, err := dc.(driver.QueryerContext).QueryContext(t.Context(), "ask", nil)
		if err != nil {
			t.Error(err)
		}
		first.Close()
		second, err := dc.(driver.QueryerContext).QueryContext(t.Context(), "ask", nil)
		if err != nil {
			t.Error(err)
		}
		first.Close()
		if err := second.Next(make([]driver.Value, 1)); err != nil {
			t.Errorf("Next of other rows: %v", err)
		}
		return nil
	})
}

// A lenientFake's rows and transactions may be ended twice, as most drivers have it.
type lenientFake struct{ *fake }

type lenientConn struct{ *fakeConn }

type lenientRows struct {
	driver.Rows
	closed bool
}

func (r *lenientRows) Close() error {
	if r.closed {
		return nil
	}
	r.closed = true
	return r.Rows.Close()
}

type lenientTx struct {
	driver.Tx
	done bool
}

func (t *lenientTx) end(f func() error) error {
	if t.done {
		return sql.ErrTxDone
	}
	t.done = true
	return f()
}
func (t *lenientTx) Commit() error   { return t.end(t.Tx.Commit) }
func (t *lenientTx) Rollback() error { return t.end(t.Tx.Rollback) }

func (f lenientFake) Open(value string) (driver.Conn, error) {
	c, err := f.fake.Open(value)
	if err != nil {
		return nil, err
	}
	return lenientConn{c.(*fakeConn)}, nil
}

func (c lenientConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	r, err := c.fakeConn.QueryContext(ctx, query, args)
	return &lenientRows{Rows: r}, err
}

func (c lenientConn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	tx, err := c.fakeConn.BeginTx(ctx, opts)
	return &lenientTx{Tx: tx}, err
}

// A cursorFake has rows whose column is a cursor: a driver.Rows.
type cursorFake struct{ *fake }

type cursorConn struct{ *fakeConn }

type cursorRows struct {
	driver.Rows
	c *fakeConn
}

func (f cursorFake) Open(value string) (driver.Conn, error) {
	c, err := f.fake.Open(value)
	if err != nil {
		return nil, err
	}
	return cursorConn{c.(*fakeConn)}, nil
}

func (c cursorConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	r, err := c.fakeConn.QueryContext(ctx, query, args)
	return cursorRows{r, c.fakeConn}, err
}

func (c cursorConn) CheckNamedValue(nv *driver.NamedValue) error { return nil }

// ExecContext sets a cursor that heeds the context of the Exec.
func (c cursorConn) ExecContext(ctx context.Context, _ string, args []driver.NamedValue) (driver.Result, error) {
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

func (r cursorRows) Next(dest []driver.Value) error {
	if err := r.Rows.Next(dest); err != nil {
		return err
	}
	dest[0] = &fakeRows{c: r.c, ctx: context.Background(), left: 2}
	return nil
}

// A cursor that an Exec has set can be read until its connection is returned to
// the pool, where its context ends.
func TestOutCursor(t *testing.T) {
	for _, prepared := range []bool{false, true} {
		t.Run(fmt.Sprintf("prepared=%t", prepared), func(t *testing.T) {
			db := open(t, cursorFake{newFake(t)}, newSource("1"), "forceKill=true")
			conn, err := db.Conn(t.Context())
			must(t, "conn", err)
			var cursor driver.Rows
			if out := (sql.Out{Dest: &cursor}); prepared {
				stmt, prepareErr := conn.PrepareContext(t.Context(), "open ?")
				must(t, "prepare", prepareErr)
				_, err = stmt.Exec(out)
			} else {
				_, err = conn.ExecContext(t.Context(), "open ?", out)
			}
			must(t, "exec", err)
			must(t, "Next of the cursor", cursor.Next(make([]driver.Value, 1)))
			must(t, "another call", conn.PingContext(t.Context()))
			want(t, "end of the cursor", cursor.Next(nil), io.EOF)
			must(t, "Conn.Close", conn.Close())
			want(t, "its context in the pool", cursor.(*fakeRows).ctx.Err(), context.Canceled)
		})
	}
}

// A statement of a Raw callback may be closed twice.
func TestDoubleStmtClose(t *testing.T) {
	for _, options := range []string{"", "forceKill=true"} {
		t.Run(options, func(t *testing.T) {
			db := open(t, lenientFake{newFake(t)}, newSource("1"), options)
			conn, err := db.Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.Raw(func(dc any) error {
				defer func() {
					if r := recover(); r != nil {
						t.Errorf("panic: %v", r)
					}
				}()
				st, err := dc.(driver.ConnPrepareContext).PrepareContext(t.Context(), "ask")
				if err != nil {
					t.Error(err)
				}
				defer st.Close()
				st.Close()
				return nil
			})
		})
	}
}

type lenientStmt struct {
	*fakeStmt
	done bool
}

func (s *lenientStmt) Close() error {
	if s.done {
		return nil
	}
	s.done = true
	return s.fakeStmt.Close()
}

func (c lenientConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	s, err := c.fakeConn.PrepareContext(ctx, query)
	if err != nil {
		return nil, err
	}
	return &lenientStmt{fakeStmt: s.(*fakeStmt)}, nil
}

// After an argument error no call is in progress: a kill closes at once,
// statements first.
func TestArgumentErrorThenKill(t *testing.T) {
	f, src := newFake(t), newSource("1")
	db := open(t, f, src, "forceKill=true")
	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.PrepareContext(t.Context(), "ask"); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.ExecContext(t.Context(), "x", make(chan int)); err == nil {
		t.Fatal("no error")
	}
	src.set("2") // the fake polices that the statement is closed first
	await(t, "the connection is closed", func() bool { return f.closed.Load() == 1 })
}

// A driver that panics does so in its caller's goroutine, or is refused.
func TestPanic(t *testing.T) {
	log := collect(t)
	f, src := newFake(t), newSource("1")
	f.onOpen = func(_ context.Context, value string) error {
		if value == "2" {
			panic("a bug in the driver")
		}
		return nil
	}
	db := open(t, panickingFake{ctxFake{f}}, src, "")
	ask(t, db)
	src.set("panic")
	want(t, "refused", log.count("hotload: value refused", "reason=driver", "error_type=*hotload.driverPanic"), 1)
	want(t, "value", ask(t, db), "1")
	src.set("2")
	if err := db.Ping(); err == nil || !strings.Contains(err.Error(), "panicked") {
		t.Errorf("ping: %v, want an error that tells of the panic", err)
	}
}

type panickingFake struct{ ctxFake }

func (f panickingFake) OpenConnector(value string) (driver.Connector, error) {
	if value == "panic" {
		panic("a bug in the driver")
	}
	return f.ctxFake.OpenConnector(value)
}

// TestPanicInClose: a driver that panics when it closes what a change retires
// ends nothing else; in DB.Close the panic is the caller's.
func TestPanicInClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bug = "a bug in the driver"
		log := collect(t)
		f, src := newFake(t), newSource("1")
		f.onCall = func(_ context.Context, c *fakeConn, call string) error {
			if c.value == "1" && strings.HasPrefix(call, "Close ") {
				panic(bug)
			}
			return nil
		}
		f.onClose = func(c *fakeConn) {
			if c.value == "1" {
				panic(bug)
			}
		}
		f.lenient.Store(true) // the statement is not closed
		db := open(t, closerDriver{ctxFake{f}, func(string) { panic(bug) }}, src, "")
		_, err := db.Prepare("insert")
		must(t, "prepare", err)
		src.set("2")
		want(t, "value", ask(t, db), "2")
		synctest.Wait()
		want(t, "drained", log.count("generation drained", "generation=1"), 1)
		if err := db.Close(); err == nil || !strings.Contains(err.Error(), "panicked") {
			t.Errorf("DB.Close: %v, want an error that tells of the panic", err)
		}
	})
}

// A connection of Driver.Open ends its watch also when the driver's Close panics.
func TestPanicInCloseOfDriverOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.onClose = func(*fakeConn) { panic("a bug in the driver") }
		conn, err := open(t, f, newSource("1"), "").Driver().Open(register(f, newSource("1")))
		must(t, "Open", err)
		if err := conn.Close(); err == nil || !strings.Contains(err.Error(), "panicked") {
			t.Errorf("Close: %v, want an error that tells of the panic", err)
		}
	})
}
