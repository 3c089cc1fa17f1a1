package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"io"
	"strconv"
	"testing"
)

// A nop is a driver that does nothing, so that what is measured is database/sql
// and hotload.
type nop struct{}

type nopConn struct{}

func (nop) Open(string) (driver.Conn, error)               { return &nopConn{}, nil }
func (nop) OpenConnector(string) (driver.Connector, error) { return nop{}, nil }
func (nop) Connect(context.Context) (driver.Conn, error)   { return &nopConn{}, nil }
func (nop) Driver() driver.Driver                          { return nop{} }
func (*nopConn) Close() error                              { return nil }
func (*nopConn) Begin() (driver.Tx, error)                 { return nopTx{}, nil }
func (*nopConn) Prepare(string) (driver.Stmt, error)       { return nopStmt{}, nil }
func (*nopConn) ResetSession(context.Context) error        { return nil }
func (*nopConn) IsValid() bool                             { return true }
func (*nopConn) CheckNamedValue(*driver.NamedValue) error  { return nil }
func (*nopConn) Ping(context.Context) error                { return nil }
func (c *nopConn) PrepareContext(context.Context, string) (driver.Stmt, error) {
	return nopStmt{}, nil
}
func (*nopConn) BeginTx(context.Context, driver.TxOptions) (driver.Tx, error) { return nopTx{}, nil }
func (*nopConn) ExecContext(context.Context, string, []driver.NamedValue) (driver.Result, error) {
	return driver.ResultNoRows, nil
}
func (*nopConn) QueryContext(context.Context, string, []driver.NamedValue) (driver.Rows, error) {
	return &nopRows{}, nil
}

type nopTx struct{}

func (nopTx) Commit() error   { return nil }
func (nopTx) Rollback() error { return nil }

type nopStmt struct{}

func (nopStmt) Close() error                               { return nil }
func (nopStmt) NumInput() int                              { return 1 }
func (nopStmt) Exec([]driver.Value) (driver.Result, error) { return driver.ResultNoRows, nil }
func (nopStmt) Query([]driver.Value) (driver.Rows, error)  { return &nopRows{}, nil }
func (nopStmt) ExecContext(context.Context, []driver.NamedValue) (driver.Result, error) {
	return driver.ResultNoRows, nil
}
func (nopStmt) QueryContext(context.Context, []driver.NamedValue) (driver.Rows, error) {
	return &nopRows{}, nil
}

type nopRows struct{ n int }

func (*nopRows) Columns() []string { return []string{"n"} }
func (*nopRows) Close() error      { return nil }
func (r *nopRows) Next(dest []driver.Value) error {
	if r.n++; r.n > 20 {
		return io.EOF
	}
	dest[0] = int64(r.n)
	return nil
}

// operations are what the benchmarks of operations do.
var operations = []struct {
	name string
	run  func(db *sql.DB, stmt *sql.Stmt) error
}{
	{"exec", func(db *sql.DB, _ *sql.Stmt) error {
		_, err := db.Exec("insert", 1)
		return err
	}},
	{"query", func(db *sql.DB, _ *sql.Stmt) error {
		rows, err := db.Query("select")
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var n int64
			if err := rows.Scan(&n); err != nil {
				return err
			}
		}
		return rows.Err()
	}},
	{"transaction", func(db *sql.DB, _ *sql.Stmt) error {
		tx, err := db.Begin()
		if err != nil {
			return err
		}
		if _, err := tx.Exec("insert", 1); err != nil {
			return err
		}
		return tx.Commit()
	}},
	{"statement", func(_ *sql.DB, stmt *sql.Stmt) error {
		_, err := stmt.Exec(1)
		return err
	}},
}

// BenchmarkOperation compares operations on a driver that does nothing, used
// directly and through hotload.
func BenchmarkOperation(b *testing.B) {
	dsn := register(nop{}, newSource("1"))
	benchmarkOperations(b, func(mode string) *sql.DB {
		if mode == "direct" {
			return sql.OpenDB(nop{})
		}
		db, err := sql.Open("hotload", dsn+"?forceKill="+strconv.FormatBool(mode == "forceKill"))
		if err != nil {
			b.Fatal(err)
		}
		return db
	})
}

func benchmarkOperations(b *testing.B, open func(mode string) *sql.DB) {
	for _, op := range operations {
		for _, parallel := range []bool{false, true} {
			name := op.name + "/serial"
			if parallel {
				name = op.name + "/parallel"
			}
			for _, mode := range []string{"direct", "graceful", "forceKill"} {
				b.Run(name+"/"+mode, func(b *testing.B) {
					db := open(mode)
					defer db.Close()
					db.SetMaxIdleConns(16)
					stmt, err := db.Prepare("insert")
					if err != nil {
						b.Fatal(err)
					}
					defer stmt.Close()
					b.ReportAllocs()
					if parallel {
						b.RunParallel(func(pb *testing.PB) {
							for pb.Next() {
								if err := op.run(db, stmt); err != nil {
									b.Error(err)
								}
							}
						})
						return
					}
					for b.Loop() {
						if err := op.run(db, stmt); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		}
	}
}
