package hotload_test

import (
	"context"
	"database/sql"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/infobloxopen/hotload/internal/pgserver"
	"github.com/lib/pq"
)

// TestPostgresStorm is TestStorm in small, with lib/pq against a real server
// that counts the connections of each value by their application_name.
func TestPostgresStorm(t *testing.T) {
	server := pgserver.ForTest(t, pgserver.Options{Name: "storm"})
	monitor, err := sql.Open("postgres", server.SuperSocketDSN()+" application_name=monitor")
	if err != nil {
		t.Fatal(err)
	}
	defer monitor.Close()
	monitor.SetMaxOpenConns(1)
	if _, err := monitor.Exec("create table writes (value text)"); err != nil {
		t.Fatal(err)
	}
	// connections counts the server's connections by value.
	connections := func() (byValue map[string]int, sum int) {
		rows, err := monitor.Query("select application_name, count(*) from pg_stat_activity" +
			" where application_name ~ '^[0-9]+$' group by 1")
		if err != nil {
			t.Fatal(err)
		}
		defer rows.Close()
		byValue = make(map[string]int)
		for rows.Next() {
			var name string
			var n int
			if err := rows.Scan(&name, &n); err != nil {
				t.Fatal(err)
			}
			byValue[name] = n
			sum += n
		}
		return byValue, sum
	}
	value := func(n int) string {
		return server.SuperSocketDSN() + " application_name=" + strconv.Itoa(n)
	}

	const ask = "select current_setting('application_name'), $1::int[]"
	args := pq.Array([]int{1, 2})
	scan := func(row *sql.Row) (v string, err error) {
		var numbers []int64
		return v, row.Scan(&v, pq.Array(&numbers))
	}
	for _, maxOpen := range []int{1, 4} {
		t.Run(fmt.Sprintf("max=%d", maxOpen), func(t *testing.T) {
			src := newSource(value(1))
			s := newStorm(t)
			s.db = open(t, pq.Driver{}, src, "")
			s.db.SetMaxOpenConns(maxOpen)
			stmt, err := s.db.Prepare(ask)
			if err != nil {
				t.Fatal(err)
			}
			defer stmt.Close()
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var wg sync.WaitGroup
			for _, work := range []func() (string, error){
				func() (string, error) { return scan(s.db.QueryRow(ask, args)) },
				func() (string, error) { return scan(stmt.QueryRow(args)) },
				func() (string, error) {
					tx, err := s.db.Begin()
					if err != nil {
						return "", err
					}
					defer tx.Rollback()
					v, err := scan(tx.QueryRow(ask, args))
					if err != nil {
						return "", err
					}
					if _, err := tx.Exec("insert into writes values ($1)", v); err != nil {
						return "", err
					}
					return v, tx.Commit()
				},
				func() (string, error) {
					conn, err := s.db.Conn(t.Context())
					if err != nil {
						return "", err
					}
					defer conn.Close()
					time.Sleep(rand.N(2 * time.Millisecond)) // the first use comes later
					return scan(conn.QueryRowContext(t.Context(), ask, args))
				},
			} {
				wg.Go(func() {
					for ctx.Err() == nil {
						s.op("operation", work)
					}
				})
			}
			const changes = 20
			for n := 2; n <= changes; n++ {
				src.set(value(n))
				s.applied.Store(int64(n))
				next := s.ops.Load() + rand.Int64N(50) // sometimes at once, sometimes after some work
				await(t, "operations", func() bool { return s.ops.Load() >= next })
				if _, sum := connections(); sum > maxOpen {
					// A backend shows for a moment after its client has closed.
					await(t, "the server's connections are within MaxOpenConns", func() bool {
						_, sum := connections()
						return sum <= maxOpen
					})
				}
			}
			stop()
			wg.Wait()
			await(t, "the server has connections of the last value only", func() bool {
				byValue, sum := connections()
				return byValue[strconv.Itoa(changes)] == sum
			})
			s.failed.none(t)
			s.stale.none(t)
			t.Logf("%d operations, %d changes, %d failed, %d stale", s.ops.Load(), changes, s.failed.Load(), s.stale.Load())
			s.db.Close()
			await(t, "the server has no connection left", func() bool { _, sum := connections(); return sum == 0 })
		})
	}
}
