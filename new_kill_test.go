package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
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
