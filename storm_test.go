package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"flag"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var stormTime = flag.Duration("storm", 300*time.Millisecond, "how long each storm of changes lasts")

// A storm changes the value again and again under a load of operations, and
// checks what they run on.
type storm struct {
	t       *testing.T
	db      *sql.DB
	applied atomic.Int64 // the number of a value that is in force for sure
	ops     atomic.Int64
	failed  firsts
	stale   firsts
}

// firsts counts, and keeps the first message.
type firsts struct {
	atomic.Int64
	first atomic.Pointer[string]
}

func (f *firsts) add(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	f.first.CompareAndSwap(nil, &text)
	f.Add(1)
}

// none fails the test if anything was counted.
func (f *firsts) none(t *testing.T) {
	if n := f.Load(); n > 0 {
		t.Errorf("%d times, first: %s", n, *f.first.Load())
	}
}

// check is the requirements that every storm has to meet.
func (s *storm) check(t *testing.T) {
	t.Run("R-12/nothing new runs on an old value", s.stale.none)
	t.Run("R-13/no operation fails", s.failed.none)
}

// op runs an operation that returns the value it ran on.
func (s *storm) op(what string, f func() (string, error)) {
	before := s.applied.Load()
	value, err := f()
	s.ops.Add(1)
	if err != nil {
		s.failed.add("%s: %v", what, err)
		return
	}
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil || n < before {
		s.stale.add("%s: ran on value %q when %d was in force", what, value, before)
	}
	raise(&s.applied, n) // what one operation saw, later ones see too
}

// workers are the kinds of load: what each does once.
var workers = []struct {
	name string
	work func(s *storm, stmt *sql.Stmt)
}{
	{"query", func(s *storm, _ *sql.Stmt) {
		s.op("query", func() (v string, err error) {
			return v, s.db.QueryRow("ask", 1, special{"x"}).Scan(&v)
		})
	}},
	{"transaction", func(s *storm, _ *sql.Stmt) {
		s.op("transaction", func() (v string, err error) {
			tx, err := s.db.Begin()
			if err != nil {
				return "", err
			}
			defer tx.Rollback()
			if err := tx.QueryRow("ask", special{"x"}).Scan(&v); err != nil {
				return "", err
			}
			if _, err := tx.Exec("insert", 1); err != nil {
				return "", err
			}
			return v, tx.Commit()
		})
	}},
	{"conn", func(s *storm, _ *sql.Stmt) {
		conn, err := s.db.Conn(s.t.Context())
		if err != nil {
			s.failed.add("conn: %v", err)
			return
		}
		defer conn.Close()
		time.Sleep(rand.N(2 * time.Millisecond)) // the first use comes later
		s.op("conn", func() (v string, err error) {
			return v, conn.QueryRowContext(s.t.Context(), "ask", special{"x"}).Scan(&v)
		})
	}},
	{"exec", func(s *storm, _ *sql.Stmt) {
		s.op("exec", func() (string, error) {
			res, err := s.db.Exec("insert", "a", special{"x"})
			if err != nil {
				return "", err
			}
			n, err := res.LastInsertId()
			return strconv.FormatInt(n, 10), err
		})
	}},
	{"statement", func(s *storm, stmt *sql.Stmt) {
		s.op("statement", func() (v string, err error) {
			return v, stmt.QueryRow(special{"x"}, 2).Scan(&v)
		})
	}},
}

// TestStorm proves G1, G3 and G7 together: no operation fails, none runs on an
// older value than was in force when it began, and each superseded connection
// is closed once.
func TestStorm(t *testing.T) {
	for _, maxOpen := range []int{1, 2, 8, 0} {
		for _, withContext := range []bool{false, true} {
			t.Run(fmt.Sprintf("max=%d,DriverContext=%t", maxOpen, withContext), func(t *testing.T) {
				f := newFake(t)
				var d driver.Driver = f
				if withContext {
					d = ctxFake{f}
				}
				src := newSource("1")
				s := &storm{t: t, db: open(t, d, src, "")}
				s.db.SetMaxOpenConns(maxOpen)
				s.db.SetMaxIdleConns(4)
				stmt, err := s.db.Prepare("ask ? ?")
				if err != nil {
					t.Fatal(err)
				}
				ctx, stop := context.WithTimeout(t.Context(), *stormTime)
				defer stop()
				var wg sync.WaitGroup
				for range 3 {
					for _, w := range workers {
						wg.Go(func() {
							for ctx.Err() == nil {
								w.work(s, stmt)
							}
						})
					}
				}
				changes := 0
				for ; ctx.Err() == nil; changes++ {
					src.set(strconv.Itoa(changes + 2))
					raise(&s.applied, int64(changes+2))
					time.Sleep(rand.N(3 * time.Millisecond))
				}
				wg.Wait()
				stmt.Close()
				s.db.Close()
				t.Run("R-34/the driver is used as it demands", func(t *testing.T) { // the fake polices the rest
					await(t, "every connection is closed", func() bool { return f.closed.Load() == f.opened.Load() })
				})
				s.check(t)
				t.Logf("%d operations, %d changes, %d failed, %d stale, %d connections",
					s.ops.Load(), changes, s.failed.Load(), s.stale.Load(), f.opened.Load())
				if s.ops.Load() == 0 || changes == 0 {
					t.Error("the storm did not happen")
				}
			})
		}
	}
}

// TestManyIdle proves that what one operation saw, later ones see too, while a
// change is still working its way through many idle connections.
func TestManyIdle(t *testing.T) {
	const idle = 2000
	f, src := newFake(t), newSource("1")
	s := &storm{t: t, db: open(t, f, src, "")}
	s.db.SetMaxIdleConns(idle)
	for n := 2; n < 10; n++ {
		conns := make([]*sql.Conn, idle)
		for i := range conns {
			var err error
			if conns[i], err = s.db.Conn(t.Context()); err != nil {
				t.Fatal(err)
			}
			ask(t, conns[i])
		}
		for _, conn := range conns {
			conn.Close()
		}
		done := make(chan struct{})
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				for {
					select {
					case <-done:
						return
					default:
						workers[0].work(s, nil)
					}
				}
			})
		}
		src.set(strconv.Itoa(n))
		close(done)
		wg.Wait()
	}
	s.stale.none(t)
	s.failed.none(t)
}
