package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/infobloxopen/hotload"
)

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

// After the last resort a driver without contexts gets no call for what came
// too late: it knows itself that the connection is closed. Rows and statements
// that were there before are closed when the call has returned.
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
							value = strings.Trim(text, "text of +")
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
