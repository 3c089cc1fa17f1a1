package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"io"
	"net/url"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/infobloxopen/hotload/internal/pgserver"
)

// A nop is a driver that does nothing but know its value and count its
// connections, so that what is measured is database/sql and hotload.
type nop struct {
	value string
	open  *atomic.Int64
	one   chan bool // receives when a Close has left one
}

type nopConn struct{ d nop }

func newNop() nop { return nop{"0", new(atomic.Int64), make(chan bool, 1)} }

func (d nop) OpenConnector(value string) (driver.Connector, error) {
	d.value = value
	return d, nil
}

func (d nop) Connect(context.Context) (driver.Conn, error) { return d.Open(d.value) }
func (d nop) Driver() driver.Driver                        { return d }

func (d nop) Open(value string) (driver.Conn, error) {
	d.value = value
	d.open.Add(1)
	return &nopConn{d}, nil
}

func (c *nopConn) Close() error {
	if c.d.open.Add(-1) == 1 {
		select {
		case c.d.one <- true:
		default:
		}
	}
	return nil
}

func (*nopConn) Begin() (driver.Tx, error)                { return nopTx{}, nil }
func (*nopConn) Prepare(string) (driver.Stmt, error)      { return nopStmt{}, nil }
func (*nopConn) ResetSession(context.Context) error       { return nil }
func (*nopConn) IsValid() bool                            { return true }
func (*nopConn) CheckNamedValue(*driver.NamedValue) error { return nil }
func (*nopConn) Ping(context.Context) error               { return nil }

func (*nopConn) PrepareContext(context.Context, string) (driver.Stmt, error) {
	return nopStmt{}, nil
}

func (*nopConn) BeginTx(context.Context, driver.TxOptions) (driver.Tx, error) { return nopTx{}, nil }

func (c *nopConn) ExecContext(context.Context, string, []driver.NamedValue) (driver.Result, error) {
	return nopResult{&c.d}, nil
}

func (*nopConn) QueryContext(context.Context, string, []driver.NamedValue) (driver.Rows, error) {
	return &nopRows{}, nil
}

// A nopResult is the value that it came about on.
type nopResult struct{ d *nop }

func (r nopResult) LastInsertId() (int64, error) { return strconv.ParseInt(r.d.value, 10, 64) }
func (r nopResult) RowsAffected() (int64, error) { return 1, nil }

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

// modes are the ways to use a driver that are compared.
var modes = []string{"direct", "graceful", "forceKill"}

// openNop opens a sql.DB on a nop.
func openNop(b testing.TB, mode string) *sql.DB {
	if mode == "direct" {
		return sql.OpenDB(newNop())
	}
	db := open(b, newNop(), newSource("1"), "forceKill="+strconv.FormatBool(mode == "forceKill"))
	db.SetMaxIdleConns(16)
	return db
}

// inParallel calls f n times, shared among as many goroutines as can run.
func inParallel(n int, f func()) {
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for range n / runtime.GOMAXPROCS(0) {
				f()
			}
		})
	}
	wg.Wait()
}

// TestAllocations holds each operation to what it may allocate beyond what
// database/sql and the driver do: nothing, and with forceKill a context for
// each call, and what makes rows and transactions end when they are killed.
func TestAllocations(t *testing.T) {
	const n = 100
	forceKill := map[string]float64{"exec": 3, "query": 4, "transaction": 7, "statement": 3}
	for _, op := range operations {
		t.Run(op.name, func(t *testing.T) {
			allocs := make(map[string]float64)
			for _, mode := range modes {
				db := openNop(t, mode)
				defer db.Close()
				stmt := prepare(t, db, "insert")
				for range 50 { // the runtime allocates too, now and then: the least counts
					var before, after runtime.MemStats
					runtime.ReadMemStats(&before)
					for range n {
						must(t, op.name, op.run(db, stmt))
					}
					runtime.ReadMemStats(&after)
					now := float64((after.Mallocs - before.Mallocs) / n)
					if least, ok := allocs[mode]; !ok || now < least {
						allocs[mode] = now
					}
				}
			}
			for mode, more := range map[string]float64{"graceful": 0, "forceKill": forceKill[op.name]} {
				if allocs[mode] > allocs["direct"]+more {
					t.Errorf("%s: %v allocations, want %v and at most %v more", mode, allocs[mode], allocs["direct"], more)
				}
			}
		})
	}
}

// BenchmarkRatio measures operations on a driver that does nothing, used directly
// and through hotload.
func BenchmarkRatio(b *testing.B) {
	for _, op := range operations {
		for _, how := range []string{"serial", "parallel"} {
			b.Run(op.name+"/"+how, func(b *testing.B) {
				ratio(b, 500, how == "parallel", openNop, op.run)
			})
		}
	}
}

// BenchmarkPostgres measures queries on a PostgreSQL server, over its Unix
// socket, in the same way. lib/pq starts a goroutine for each call whose context
// can be cancelled, as those of a service can. With forceKill all can.
func BenchmarkPostgres(b *testing.B) {
	server := pgserver.ForTest(b, pgserver.Options{Name: "bench"})
	cancellable, cancel := context.WithCancel(context.Background())
	defer cancel()
	for _, caller := range []struct {
		context string
		ctx     context.Context
	}{{"background", context.Background()}, {"cancellable", cancellable}} {
		b.Run(caller.context, func(b *testing.B) {
			ratio(b, 50, false, func(t testing.TB, mode string) *sql.DB {
				return openPostgres(t, server.SuperSocketDSN(), mode)
			}, func(db *sql.DB, _ *sql.Stmt) error {
				return db.QueryRowContext(caller.ctx, "select $1::int", 1).Scan(new(int))
			})
		})
	}
}

// ratio measures in small batches, by turns, and reports the ratios of the
// quickest: they hold on a machine that does other things too. Each iteration is
// a batch.
func ratio(b *testing.B, batch int, parallel bool, open func(t testing.TB, mode string) *sql.DB, run func(db *sql.DB, stmt *sql.Stmt) error) {
	best := make([]time.Duration, len(modes))
	var runs []func()
	for i, mode := range modes {
		best[i] = time.Hour
		db := open(b, mode)
		defer db.Close()
		stmt := prepare(b, db, "select 1")
		runs = append(runs, func() {
			if err := run(db, stmt); err != nil {
				b.Error(err)
			}
		})
	}
	for b.Loop() {
		for i, run := range runs {
			began := time.Now()
			if parallel {
				inParallel(batch, run)
			} else {
				for range batch {
					run()
				}
			}
			best[i] = min(best[i], time.Since(began))
		}
	}
	for i, mode := range modes[1:] {
		b.ReportMetric(float64(best[i+1])/float64(best[0]), mode+"/direct")
	}
	b.ReportMetric(float64(best[0].Nanoseconds())/float64(batch), "direct-ns")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkChange measures, with so many idle connections, how long it takes
// from a new value until new work runs on it, and until the old connections
// are closed; through hotload, and with a sql.DB that is replaced.
func BenchmarkChange(b *testing.B) {
	for _, idle := range []int{1, 100, 1000, 10000} {
		for _, mode := range []string{"hotload", "reopen"} {
			b.Run(fmt.Sprintf("idle=%d/%s", idle, mode), func(b *testing.B) {
				d := newNop()
				var db *sql.DB
				var change func(value string)
				if mode == "hotload" {
					values := make(chan string)
					db = open(b, d, watchFunc(func(context.Context, string, url.Values) (string, <-chan string, error) {
						return "0", values, nil
					}), "")
					change = func(value string) { values <- value }
				} else {
					reopen := func(value string) *sql.DB {
						connector, _ := d.OpenConnector(value)
						return sql.OpenDB(connector)
					}
					db = reopen("0")
					change = func(value string) {
						old := db
						db = reopen(value)
						go old.Close()
					}
				}
				var newWork, allClosed time.Duration
				for n := 1; b.Loop(); n++ {
					b.StopTimer()
					fill(b, db, idle)
					runtime.GC()
					b.StartTimer()
					began := time.Now()
					change(strconv.Itoa(n))
					for on := int64(0); on != int64(n); {
						res, err := db.Exec("insert")
						must(b, "exec", err)
						on, _ = res.LastInsertId()
						runtime.Gosched() // others have work too, among them who puts the value in force
					}
					newWork += time.Since(began)
					for d.open.Load() > 1 {
						<-d.one
					}
					allClosed += time.Since(began)
				}
				db.Close()
				per := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / float64(b.N) / 1e3 }
				b.ReportMetric(per(newWork), "new-work-us")
				b.ReportMetric(per(allClosed), "closed-us")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

// BenchmarkMemory measures the memory of each pooled connection, and of each
// pool with one connection.
func BenchmarkMemory(b *testing.B) {
	const n = 10000
	heap := func() float64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc + m.StackInuse)
	}
	dsn := register(newNop(), newSource("0"))
	for _, mode := range modes {
		open := func() *sql.DB {
			if mode == "direct" {
				return sql.OpenDB(newNop())
			}
			db, err := sql.Open("hotload", dsn+"?forceKill="+strconv.FormatBool(mode == "forceKill"))
			must(b, "open", err)
			return db
		}
		b.Run("connection/"+mode, func(b *testing.B) {
			for b.Loop() {
				db := open()
				fill(b, db, 1)
				before := heap()
				fill(b, db, n)
				b.ReportMetric((heap()-before)/n, "B/conn")
				db.Close()
			}
			b.ReportMetric(0, "ns/op")
		})
		b.Run("pool/"+mode, func(b *testing.B) {
			for b.Loop() {
				dbs := make([]*sql.DB, n/10)
				before := heap()
				for i := range dbs {
					dbs[i] = open()
					fill(b, dbs[i], 1)
				}
				b.ReportMetric((heap()-before)/float64(len(dbs)), "B/pool")
				for _, db := range dbs {
					db.Close()
				}
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}
