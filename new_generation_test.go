package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"strings"
	"testing"
	"time"
)

// A voidFake is a driver that returns neither what it was asked for nor an
// error, for the value "1". A voidCtxFake is one with DriverContext and contexts.
type (
	voidFake struct {
		*fake
		call string // that does so
	}
	voidCtxFake   struct{ voidFake }
	voidConnector struct {
		fakeConnector
		d voidFake
	}
	voidConn struct {
		*fakeConn
		d voidFake
	}
	voidStmt struct {
		*fakeStmt
		d voidFake
	}
	voidPlainConn struct{ c voidConn }
	voidPlainStmt struct{ s voidStmt }
)

func (d voidFake) void(call, value string) bool { return call == d.call && value == "1" }

func (d voidFake) Open(value string) (driver.Conn, error) {
	if d.void("Open", value) {
		return nil, nil
	}
	c, err := d.fake.Open(value)
	if err != nil {
		return nil, err
	}
	return voidPlainConn{voidConn{c.(*fakeConn), d}}, nil
}

func (d voidCtxFake) OpenConnector(value string) (driver.Connector, error) {
	if d.void("OpenConnector", value) {
		return nil, nil
	}
	return &voidConnector{fakeConnector{d.fake, value}, d.voidFake}, nil
}

func (c *voidConnector) Connect(ctx context.Context) (driver.Conn, error) {
	if c.d.void("Connect", c.value) {
		return nil, nil
	}
	ci, err := c.fakeConnector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return voidConn{ci.(*fakeConn), c.d}, nil
}

func (c voidConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	if c.d.void("Prepare", c.value) {
		return nil, nil
	}
	st, err := c.fakeConn.PrepareContext(ctx, query)
	if err != nil {
		return nil, err
	}
	return voidStmt{st.(*fakeStmt), c.d}, nil
}

func (c voidConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	if c.d.void("Query", c.value) {
		return nil, nil
	}
	return c.fakeConn.QueryContext(ctx, query, args)
}

func (c voidConn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	if c.d.void("Begin", c.value) {
		return nil, nil
	}
	return c.fakeConn.BeginTx(ctx, opts)
}

func (s voidStmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	if s.d.void("Stmt.Query", s.c.value) {
		return nil, nil
	}
	return s.fakeStmt.QueryContext(ctx, args)
}

func (p voidPlainConn) Close() error { return p.c.Close() }

func (p voidPlainConn) Prepare(query string) (driver.Stmt, error) {
	st, err := p.c.PrepareContext(context.Background(), query)
	if st == nil || err != nil {
		return nil, err
	}
	return voidPlainStmt{st.(voidStmt)}, nil
}

func (p voidPlainConn) Begin() (driver.Tx, error) {
	return p.c.BeginTx(context.Background(), driver.TxOptions{})
}

func (p voidPlainStmt) Close() error  { return p.s.Close() }
func (p voidPlainStmt) NumInput() int { return p.s.NumInput() }

func (p voidPlainStmt) Exec([]driver.Value) (driver.Result, error) {
	return p.s.ExecContext(context.Background(), nil)
}

func (p voidPlainStmt) Query([]driver.Value) (driver.Rows, error) {
	return p.s.QueryContext(context.Background(), nil)
}

// voidOpen is open for a pool that a panic may have left locked.
func voidOpen(t *testing.T, d driver.Driver, src *source, options string) *sql.DB {
	t.Helper()
	db, err := sql.Open("hotload", register(d, src)+"?"+options)
	must(t, "sql.Open", err)
	return db
}

// voidly makes a call that ought to fail because the driver returns nothing.
func voidly(t *testing.T, what string, call func() error) {
	t.Helper()
	defer func() {
		if v := recover(); v != nil {
			t.Fatalf("%s: panics (%v), want an error", what, v)
		}
	}()
	if err := call(); err == nil {
		t.Errorf("%s: no error although the driver returned nothing", what)
	} else if !strings.HasPrefix(err.Error(), "hotload: ") {
		t.Errorf("%s: have error %q, want one of hotload's", what, err)
	}
}

// A driver that returns neither what it was asked for nor an error causes an
// error, and does not end the process, at the call or at a change.
func TestDriverReturnsNothing(t *testing.T) {
	survives(t, func(t *testing.T) {
		prepareAnd := func(db *sql.DB, do func(*sql.Stmt) error) error {
			stmt, err := db.Prepare("select")
			if err != nil {
				return err
			}
			defer stmt.Close()
			return do(stmt)
		}
		exec := func(db *sql.DB) error { _, err := db.Exec("insert"); return err }
		ping := func(db *sql.DB) error { return db.Ping() }
		prepare := func(db *sql.DB) error { return prepareAnd(db, func(*sql.Stmt) error { return nil }) }
		begin := func(db *sql.DB) error {
			tx, err := db.Begin()
			if err == nil {
				tx.Rollback()
			}
			return err
		}
		query := func(db *sql.DB) error {
			rows, err := db.Query("select")
			if err == nil {
				rows.Close()
			}
			return err
		}
		stmtQuery := func(db *sql.DB) error {
			return prepareAnd(db, func(stmt *sql.Stmt) error {
				rows, err := stmt.Query()
				if err == nil {
					rows.Close()
				}
				return err
			})
		}
		for _, row := range []struct {
			call    string
			context bool
			do      func(db *sql.DB) error
		}{
			{"Open", false, ping},
			{"Connect", true, ping},
			{"OpenConnector", true, ping},
			{"Prepare", false, prepare},
			{"Prepare", true, prepare},
			{"Prepare", false, exec}, // without Exec a statement is made for it
			{"Prepare", false, query},
			{"Query", true, query},
			{"Stmt.Query", false, query},
			{"Stmt.Query", false, stmtQuery},
			{"Stmt.Query", true, stmtQuery},
			{"Begin", false, begin},
			{"Begin", true, begin},
		} {
			for _, options := range []string{"", "forceKill=true"} {
				t.Run(fmt.Sprintf("%s,contexts=%t,%s", row.call, row.context, options), func(t *testing.T) {
					f, src := newFake(t), newSource("1")
					var d driver.Driver = voidFake{f, row.call}
					if row.context {
						d = voidCtxFake{voidFake{f, row.call}}
					}
					db := voidOpen(t, d, src, options)
					voidly(t, row.call, func() error { return row.do(db) })
					src.set("2")
					want(t, "value after the change", ask(t, db), "2")
					must(t, "DB.Close", db.Close())
					await(t, "all connections are closed", func() bool { return len(f.live()) == 0 })
				})
			}
		}
	})
}

// A value with which the driver returns no connection, no error, or no
// connector is refused, and is in force as soon as it works.
func TestDriverReturnsNothingForLaterValue(t *testing.T) {
	survives(t, func(t *testing.T) {
		for _, row := range []struct{ call, options string }{
			{"Open", "probe=true"},
			{"Connect", "probe=true"},
			{"OpenConnector", "probe=true"},
			{"OpenConnector", ""},
		} {
			bubble(t, row.call+","+row.options, func(t *testing.T) {
				l := collect(t)
				f, src := newFake(t), newSource("0")
				var d driver.Driver = voidFake{f, row.call}
				if row.call != "Open" {
					d = voidCtxFake{voidFake{f, row.call}}
				}
				db := open(t, d, src, row.options)
				want(t, "value", ask(t, db), "0")
				src.set("1")
				time.Sleep(time.Minute)
				want(t, "value while the next is void", ask(t, db), "0")
				want(t, "refusals in\n"+l.String(), l.count("value refused"), 1)
				src.set("2")
				time.Sleep(time.Minute)
				want(t, "value", ask(t, db), "2")
				want(t, "values accepted", l.count("value accepted"), 2)
				must(t, "DB.Close", db.Close())
			})
		}
	})
}

// A statement that is prepared again on the next value, where the driver
// returns none, is an error of the operation.
func TestDriverReturnsNoStatementAgain(t *testing.T) {
	survives(t, func(t *testing.T) {
		for _, context := range []bool{false, true} {
			for _, options := range []string{"", "forceKill=true"} {
				t.Run(fmt.Sprintf("contexts=%t,%s", context, options), func(t *testing.T) {
					f, src := newFake(t), newSource("0")
					var d driver.Driver = voidFake{f, "Prepare"}
					if context {
						d = voidCtxFake{voidFake{f, "Prepare"}}
					}
					db := voidOpen(t, d, src, options)
					db.SetMaxOpenConns(1)
					stmt, err := db.Prepare("insert")
					must(t, "prepare", err)
					_, err = stmt.Exec()
					must(t, "exec", err)
					src.set("1")
					voidly(t, "exec", func() error { _, err := stmt.Exec(); return err })
					voidly(t, "exec again", func() error { _, err := stmt.Exec(); return err })
					src.set("2")
					_, err = stmt.Exec()
					must(t, "exec", err)
					must(t, "Stmt.Close", stmt.Close())
					must(t, "DB.Close", db.Close())
				})
			}
		}
	})
}
