package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestStatement: prepared statements and arguments at changes.
func TestStatement(t *testing.T) {
	t.Run("R-20/prepared statements go on", func(t *testing.T) {
		src := newSource("1")
		stmt := prepare(t, open(t, newFake(t), src, ""), "ask ? ?")
		for n := 2; n < 5; n++ {
			src.set(strconv.Itoa(n))
			want(t, "value", ask(t, prepared{stmt}, special{"a"}, 1), strconv.Itoa(n))
			src.set(strconv.Itoa(-n))
			mustSay(t, "query", stmt.QueryRow(special{"a"}).Scan(new(string)), "sql: expected 2 arguments, got 1")
		}
		must(t, "Stmt.Close", stmt.Close())
	})
	t.Run("R-21/arguments are the driver's to convert", func(t *testing.T) {
		src := newSource("0")
		db := open(t, newFake(t), src, "")
		for n, args := range [][]any{
			{special{"a"}, 1, time.Time{}},
			{sql.Named("n", special{"a"})},
			{struct{}{}},
		} {
			_, before := db.Exec("insert", args...) // on a connection
			src.set(strconv.Itoa(n + 1))
			_, after := db.Exec("insert", args...) // without one
			want(t, "error", fmt.Sprint(after), fmt.Sprint(before))
			want(t, "is an error", after != nil, n == 2)
			want(t, "value", ask(t, db), strconv.Itoa(n+1))
		}
	})
}

// Arguments that were not converted, as the dial failed, leave no trace: those
// of a Raw callback go to the driver as they are.
func TestConvertedNotTwice(t *testing.T) {
	f, src := newFake(t), newSource("1")
	f.onCall = onCall("", "CheckNamedValue", func(context.Context) error { t.Error("an argument is checked"); return nil })
	conn := take(t, open(t, f, src, ""))
	src.set("2")
	f.onOpen = onOpen("2", func(context.Context) error { f.onOpen = nil; return errDead })
	_, err := conn.ExecContext(t.Context(), "insert ?", 1)
	want(t, "error of the dial", err, error(errDead))
	inRaw(t, conn, func(c any) {
		_, err := c.(driver.ExecerContext).ExecContext(t.Context(), "insert ?", []driver.NamedValue{{Ordinal: 1, Value: int64(1)}})
		must(t, "exec", err)
	})
}

// A layer that does not ask a statement how many arguments it takes: it is
// prepared again all the same.
func TestLayerWithoutNumInput(t *testing.T) {
	src := newSource("1")
	_, conn := connect(t, newFake(t), src, "")
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

// A layer that knows no contexts: the driver gets the arguments numbered, as the
// fake checks, also those of a statement that is prepared again.
func TestLayerWithoutContexts(t *testing.T) {
	src := newSource("1")
	_, conn := connect(t, newFake(t), src, "")
	stmt, err := conn.Prepare("ask ? ?")
	must(t, "prepare", err)
	for _, value := range []int64{1, 2} {
		src.set(strconv.FormatInt(value, 10))
		res, err := stmt.Exec([]driver.Value{"a", int64(2)})
		must(t, "exec", err)
		on, _ := res.LastInsertId()
		want(t, "value that it ran on", on, value)
		rows, err := stmt.Query([]driver.Value{"a", int64(2)})
		must(t, "query", err)
		must(t, "Rows.Close", rows.Close())
		conn.(driver.Validator).IsValid()
	}
	must(t, "Stmt.Close", stmt.Close())
}

// TestSlowStmtClose: a driver that takes long to close the statements of a
// retired connection, or a killed one, must not be made to close those that
// were prepared in their place. With forceKill it does not keep the connection
// open for long: all its statements together have a second.
func TestSlowStmtClose(t *testing.T) {
	for _, options := range []string{"", "forceKill=true"} {
		for _, used := range []string{"", "transaction", "call"} {
			for _, takes := range []time.Duration{20 * time.Millisecond, 3 * time.Second} {
				bubble(t, fmt.Sprintf("options=%s,in use=%s,%v", options, used, takes), func(t *testing.T) {
					f, src := newFake(t), newSource("1")
					f.onCall = func(ctx context.Context, c *fakeConn, call string) error {
						switch {
						case c.value == "1" && strings.HasPrefix(call, "Close "):
							time.Sleep(takes)
						case call == "Exec long" && options != "":
							<-ctx.Done()
						}
						return nil
					}
					f.lenient.Store(options != "" && takes > patience)
					db := open(t, ctxFake{f}, src, options)
					db.SetMaxOpenConns(1)
					var stmts []*sql.Stmt
					for i := range 3 {
						stmts = append(stmts, prepare(t, db, fmt.Sprint("ask ", i)))
					}
					tx := begin(t, db)
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
					if err := tx.Commit(); used != "" && options != "" {
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
							want(t, "value", ask(t, prepared{stmt}), "2")
						}
					}
					use()
					if d := time.Since(start); d > patience {
						t.Errorf("work waited %v for the old connection", d)
					}
					if options != "" {
						time.Sleep(patience)
						synctest.Wait()
						want(t, "connections on the old value after the last resort", f.liveOn("1"), 0)
					}
					for range 10 {
						time.Sleep(takes)
						use()
					}
					want(t, "connections on the old value", f.liveOn("1"), 0)
					for _, stmt := range stmts {
						must(t, "Stmt.Close", stmt.Close())
					}
				})
			}
		}
	}
}

// Statements that are slow to close, and do not hang, all close before their
// connection.
func TestManySlowStatements(t *testing.T) {
	for _, options := range []string{"", "forceKill=1h", "forceKill=true"} {
		bubble(t, options, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			f.onCall = onCall("1", "Close ", lasts(30*time.Millisecond))
			db := open(t, ctxFake{f}, src, options)
			for i := range 50 {
				defer prepare(t, db, fmt.Sprint("ask", i)).Close()
			}
			src.set("2")
			time.Sleep(time.Minute)
			want(t, "old connections", f.liveOn("1"), 0)
			must(t, "DB.Close", db.Close())
		})
	}
}
