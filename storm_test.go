package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/infobloxopen/hotload"
)

var stormTime = flag.Duration("storm", 300*time.Millisecond, "how long each storm of changes lasts")

// A storm changes the value again and again under a load of operations, and
// checks what they run on.
type storm struct {
	t       *testing.T
	db      *sql.DB
	kills   bool // operations may be killed
	slow    bool // the driver takes a while over most calls, and unwinds those whose context ends in all the ways that drivers do
	every   time.Duration
	begun   atomic.Int64 // the number of the value that is being put in force
	applied atomic.Int64 // the number of a value that is in force for sure
	ops     atomic.Int64
	killed  atomic.Int64
	failed  firsts
	stale   firsts

	// Each write has a number in its context.
	writes  atomic.Int64
	mu      sync.Mutex                    // guards the following fields
	effects map[int64]int                 // of each write, until it is known to be right
	most    map[int64]int                 // effects that a write which has returned may have
	pending map[*fakeConn][]int64         // written in a transaction that is not committed
	txs     map[*fakeConn]context.Context // the contexts of the transactions
}

type writeNumber struct{}

func newStorm(t *testing.T) *storm {
	s := &storm{t: t, effects: make(map[int64]int), most: make(map[int64]int),
		pending: make(map[*fakeConn][]int64), txs: make(map[*fakeConn]context.Context)}
	s.begun.Store(1)
	s.applied.Store(1)
	return s
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

// op runs an operation, which may return the value that it ran on. It may fail
// only if it was killed, and a change was being applied at any time during it.
func (s *storm) op(what string, f func() (value string, err error)) {
	before := s.applied.Load()
	quiet := before == s.begun.Load()
	value, err := f()
	quiet = quiet && before == s.begun.Load()
	s.ops.Add(1)
	if err != nil {
		s.killed.Add(1)
		if !s.kills {
			s.failed.add("%s: %v", what, err)
		} else if mustBeKilled(s.t, what, err); quiet {
			s.failed.add("%s, although no change was applied meanwhile: %v", what, err)
		}
		return
	}
	if value == "" {
		return
	}
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil || n < before {
		s.stale.add("%s: ran on value %q when %d was in force", what, value, before)
	}
	raise(&s.applied, n) // what one operation saw, later ones see too
}

// rest lets some of the time between two changes pass.
func (s *storm) rest() { time.Sleep(rand.N(s.every)) }

// write returns a context that numbers a write, and what to call when it has
// returned, with how often it may have taken effect.
func (s *storm) write() (ctx context.Context, done func(how string, least, most int)) {
	n := s.writes.Add(1)
	return context.WithValue(s.t.Context(), writeNumber{}, n), func(how string, least, most int) {
		s.mu.Lock()
		defer s.mu.Unlock()
		have := s.effects[n]
		if have < least || have > most {
			s.t.Errorf("write %d, %s, took effect %d times: want at least %d and at most %d", n, how, have, least, most)
		}
		if have == most {
			delete(s.effects, n)
		} else {
			s.most[n] = most
		}
	}
}

// exec runs a write, and returns the value that it ran on.
func (s *storm) exec(f func(ctx context.Context) (sql.Result, error)) (string, error) {
	ctx, done := s.write()
	res, err := f(ctx)
	if err != nil {
		done("which failed", 0, 1)
		return "", err
	}
	done("which succeeded", 1, 1)
	n, err := res.LastInsertId()
	return strconv.FormatInt(n, 10), err
}

// checkWrites finds writes that took effect after all was known of them.
func (s *storm) checkWrites() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n, have := range s.effects {
		if have > s.most[n] {
			s.t.Errorf("write %d took effect %d times more than it should", n, have-s.most[n])
		}
	}
}

// linger makes a call last a while, unless its context ends, and then fail.
func (s *storm) linger(ctx context.Context) error {
	if s.slow && rand.N(3) > 0 {
		timer := time.NewTimer(rand.N(2 * time.Millisecond))
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
	}
	return s.unwind(ctx)
}

// unwind takes its time and returns an error of a call whose context ended.
func (s *storm) unwind(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	if s.slow {
		time.Sleep(rand.N(time.Millisecond))
	}
	errs := []error{driver.ErrBadConn, context.Canceled, fmt.Errorf("fake: %w", driver.ErrBadConn),
		fmt.Errorf("fake: %w", context.Canceled), io.EOF, &driverError{57014}}
	return errs[rand.N(len(errs))]
}

// onCall is the hook of the fake.
func (s *storm) onCall(ctx context.Context, c *fakeConn, call string) error {
	switch kind, _, _ := strings.Cut(call, " "); kind {
	case "Exec", "Query", "Next", "Prepare", "Ping":
		if err := s.linger(ctx); err != nil {
			return err
		}
		if n, ok := ctx.Value(writeNumber{}).(int64); ok && kind == "Exec" {
			s.mu.Lock()
			if c.inTx {
				s.pending[c] = append(s.pending[c], n)
			} else {
				s.effects[n]++
			}
			s.mu.Unlock()
		}
		return s.linger(ctx)
	case "Begin":
		s.linger(ctx)
		s.mu.Lock()
		s.pending[c], s.txs[c] = nil, ctx
		s.mu.Unlock()
	case "Commit":
		s.mu.Lock()
		tx := s.txs[c]
		s.mu.Unlock()
		if err := s.linger(tx); err != nil {
			return err
		}
		s.mu.Lock()
		for _, n := range s.pending[c] {
			s.effects[n]++
		}
		delete(s.pending, c)
		delete(s.txs, c)
		s.mu.Unlock()
		if err := s.linger(tx); rand.N(2) == 0 {
			return err
		}
	}
	return nil
}

// workers are the kinds of load: what each does once.
var workers = []struct {
	name string
	work func(s *storm, write, read *sql.Stmt)
}{
	{"query", func(s *storm, _, _ *sql.Stmt) {
		s.op("query", func() (v string, err error) {
			return v, s.db.QueryRow("ask", 1, special{"x"}).Scan(&v)
		})
	}},
	{"exec", func(s *storm, _, _ *sql.Stmt) {
		s.op("exec", func() (string, error) {
			return s.exec(func(ctx context.Context) (sql.Result, error) {
				return s.db.ExecContext(ctx, "write", "a", special{"x"})
			})
		})
	}},
	{"statement", func(s *storm, write, _ *sql.Stmt) {
		s.op("statement", func() (string, error) {
			return s.exec(func(ctx context.Context) (sql.Result, error) { return write.ExecContext(ctx, special{"x"}, 2) })
		})
	}},
	{"statement's query", func(s *storm, _, read *sql.Stmt) {
		s.op("statement's query", func() (v string, err error) {
			return v, read.QueryRow(special{"x"}).Scan(&v)
		})
	}},
	{"rows", func(s *storm, _, _ *sql.Stmt) {
		s.op("rows", func() (v string, err error) {
			rows, err := s.db.Query("read", special{"x"})
			if err != nil {
				return "", err
			}
			defer rows.Close()
			n := 0
			for ; rows.Next(); n++ {
				if err := rows.Scan(&v); err != nil {
					return "", err
				}
				time.Sleep(rand.N(100 * time.Microsecond))
			}
			if err := rows.Err(); err != nil {
				return "", err
			}
			if n != 3 {
				s.t.Errorf("rows: have %d without an error, want 3", n)
			}
			return v, rows.Close()
		})
	}},
	{"transaction", func(s *storm, write, _ *sql.Stmt) {
		s.op("transaction", func() (v string, err error) {
			ctx, done := s.write()
			how, least, most := "in a transaction that was not committed", 0, 0
			defer func() { done(how, least, most) }()
			tx, err := s.db.BeginTx(ctx, nil)
			if err != nil {
				return "", err
			}
			defer tx.Rollback()
			if err := tx.QueryRow("read", special{"x"}).Scan(&v); err != nil {
				return "", err
			}
			if rand.N(2) == 0 {
				_, err = tx.ExecContext(ctx, "write", special{"x"})
			} else {
				_, err = tx.StmtContext(ctx, write).ExecContext(ctx, 1, special{"x"})
			}
			if err != nil {
				return "", err
			}
			if s.slow {
				s.rest()
			}
			if rand.N(4) == 0 {
				return v, tx.Rollback()
			}
			if err = tx.Commit(); err == nil {
				how, least, most = "in a transaction that was committed", 1, 1
			} else if errors.Is(err, hotload.ErrKilled) {
				how, most = "in a transaction whose Commit may have been in progress", 1
			}
			return v, err
		})
	}},
	{"conn", func(s *storm, _, _ *sql.Stmt) {
		conn, err := s.db.Conn(s.t.Context())
		if err != nil {
			s.failed.add("conn: %v", err)
			return
		}
		defer conn.Close()
		s.rest() // the first use comes later
		s.op("conn", func() (v string, err error) {
			if rand.N(2) == 0 {
				return v, conn.QueryRowContext(s.t.Context(), "read", special{"x"}).Scan(&v)
			}
			return s.exec(func(ctx context.Context) (sql.Result, error) { return conn.ExecContext(ctx, "write", special{"x"}) })
		})
	}},
	{"prepare", func(s *storm, _, _ *sql.Stmt) {
		s.op("prepare", func() (v string, err error) {
			stmt, err := s.db.Prepare("read")
			if err != nil {
				return "", err
			}
			defer stmt.Close()
			return v, stmt.QueryRow().Scan(&v)
		})
	}},
}

// TestStorm proves G1, G3, G5 and G7 together: no operation fails but those that
// are killed, none runs on an older value than was in force when it began, each
// success took effect once and each failure at most once, and each superseded
// connection is closed once.
func TestStorm(t *testing.T) {
	const dense = 100 * time.Microsecond // more than a few changes during each operation
	for _, row := range []struct {
		options     string
		every       time.Duration
		maxOpen     int
		withContext bool
	}{
		{"", 3 * time.Millisecond, 1, false},
		{"", 3 * time.Millisecond, 1, true},
		{"", 3 * time.Millisecond, 2, true},
		{"", 3 * time.Millisecond, 8, false},
		{"", 3 * time.Millisecond, 0, false},
		{"", 3 * time.Millisecond, 0, true},
		{"", dense, 2, false},
		{"", dense, 0, true},
		{"forceKill=true", 8 * time.Millisecond, 1, false},
		{"forceKill=true", 8 * time.Millisecond, 1, true},
		{"forceKill=true", 8 * time.Millisecond, 2, false},
		{"forceKill=true", 8 * time.Millisecond, 8, true},
		{"forceKill=true", 8 * time.Millisecond, 0, false},
		{"forceKill=true", 8 * time.Millisecond, 0, true},
		{"forceKill=2ms", 8 * time.Millisecond, 1, true},
		{"forceKill=2ms", 8 * time.Millisecond, 0, false},
		{"forceKill=true", dense, 2, true},
		{"forceKill=true", dense, 0, false},
	} {
		t.Run(fmt.Sprintf("%s,every %v,max=%d,DriverContext=%t", row.options, row.every, row.maxOpen, row.withContext), func(t *testing.T) {
			t.Parallel()
			f, src := newFake(t), newSource("1")
			f.rowCount = 3
			var d driver.Driver = f
			if row.withContext {
				d = ctxFake{f}
			}
			s := newStorm(t)
			s.every, s.kills = row.every, row.options != ""
			s.slow = s.kills && row.every != dense
			f.onCall = s.onCall
			s.db = open(t, d, src, row.options)
			s.db.SetMaxOpenConns(row.maxOpen)
			s.db.SetMaxIdleConns(4)
			write, read := prepare(t, s.db, "write ? ?"), prepare(t, s.db, "read ?")
			ctx, stop := context.WithTimeout(t.Context(), *stormTime)
			defer stop()
			var wg sync.WaitGroup
			for range 2 {
				for _, w := range workers {
					wg.Go(func() {
						for ctx.Err() == nil {
							w.work(s, write, read)
						}
					})
				}
			}
			changes := 0
			for next := time.Now(); ctx.Err() == nil; changes++ {
				src.set(strconv.FormatInt(s.begun.Add(1), 10))
				raise(&s.applied, s.begun.Load())
				if row.every == dense {
					next = next.Add(dense)
					time.Sleep(time.Until(next))
				} else {
					s.rest()
				}
			}
			wg.Wait()
			write.Close()
			read.Close()
			s.db.Close()
			t.Run("R-34/the driver is used as it demands", func(t *testing.T) { // the fake polices the rest
				await(t, "every connection is closed", func() bool { return f.closed.Load() == f.opened.Load() && len(f.live()) == 0 })
			})
			s.check(t)
			s.checkWrites()
			t.Logf("%d operations, %d killed, %d changes, %d connections", s.ops.Load(), s.killed.Load(), changes, f.opened.Load())
			if s.ops.Load() == s.killed.Load() || (s.killed.Load() > 0) != s.kills || changes == 0 {
				t.Error("the storm did not happen")
			}
		})
	}
}

// TestManyIdle proves that what one operation saw, later ones see too, while a
// change is still working its way through many idle connections.
func TestManyIdle(t *testing.T) {
	const idle = 2000
	src := newSource("1")
	s := newStorm(t)
	s.db = open(t, newFake(t), src, "")
	for n := 2; n < 10; n++ {
		fill(t, s.db, idle)
		done := make(chan struct{})
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				for {
					select {
					case <-done:
						return
					default:
						workers[0].work(s, nil, nil)
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
