package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
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

// A ledger counts the effects of writes, each of which has a number in its
// context. Its hook makes calls last a while, and has those whose context ends
// fail in all the ways that drivers do, before their effect or after it.
type ledger struct {
	next    atomic.Int64
	mu      sync.Mutex                  // guards the following fields
	effects map[int64]int               // of each write
	pending map[*fakeConn][]int64       // written in a transaction that is not committed
	txs     map[*fakeConn]endedOrNot    // the contexts of the transactions
	wants   map[int64]func(n int) error // what is right, by the operation's result
}

type endedOrNot interface{ Err() error }

type writeNumber struct{}

func newLedger() *ledger {
	return &ledger{
		effects: make(map[int64]int),
		pending: make(map[*fakeConn][]int64),
		txs:     make(map[*fakeConn]endedOrNot),
		wants:   make(map[int64]func(int) error),
	}
}

// write returns a context that numbers a write.
func (l *ledger) write(ctx context.Context) (context.Context, int64) {
	n := l.next.Add(1)
	return context.WithValue(ctx, writeNumber{}, n), n
}

// done notes how often a write may have taken effect.
func (l *ledger) done(n int64, least, most int, how string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wants[n] = func(have int) error {
		if have < least || have > most {
			return fmt.Errorf("write %d, %s, took effect %d times: want at least %d and at most %d", n, how, have, least, most)
		}
		return nil
	}
}

func (l *ledger) check(t *testing.T) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for n, have := range l.effects {
		if l.wants[n] == nil {
			t.Errorf("write %d took effect %d times and nobody knows of it", n, have)
		}
	}
	for n, want := range l.wants {
		if err := want(l.effects[n]); err != nil {
			t.Error(err)
		}
	}
}

// linger makes a call last a while, unless its context ends.
func linger(ctx context.Context) {
	if rand.N(3) == 0 {
		return
	}
	timer := time.NewTimer(rand.N(2 * time.Millisecond))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// unwind takes its time and returns an error of a call whose context ended.
func unwind() error {
	time.Sleep(rand.N(time.Millisecond))
	errs := []error{driver.ErrBadConn, context.Canceled, fmt.Errorf("fake: %w", driver.ErrBadConn),
		fmt.Errorf("fake: %w", context.Canceled), io.EOF, &driverError{57014}}
	return errs[rand.N(len(errs))]
}

func (l *ledger) onCall(ctx context.Context, c *fakeConn, call string) error {
	switch kind, _, _ := strings.Cut(call, " "); kind {
	case "Exec", "Query", "Next", "Prepare", "Ping":
		linger(ctx)
		if ctx.Err() != nil {
			return unwind()
		}
		if n, ok := ctx.Value(writeNumber{}).(int64); ok && kind == "Exec" {
			l.mu.Lock()
			if c.inTx {
				l.pending[c] = append(l.pending[c], n)
			} else {
				l.effects[n]++
			}
			l.mu.Unlock()
		}
		linger(ctx)
		if ctx.Err() != nil {
			return unwind()
		}
	case "Begin":
		linger(ctx)
		l.mu.Lock()
		l.pending[c], l.txs[c] = nil, ctx
		l.mu.Unlock()
	case "Commit":
		l.mu.Lock()
		tx := l.txs[c]
		l.mu.Unlock()
		time.Sleep(rand.N(time.Millisecond))
		if tx.Err() != nil {
			return unwind()
		}
		l.mu.Lock()
		for _, n := range l.pending[c] {
			l.effects[n]++
		}
		l.pending[c] = nil
		l.mu.Unlock()
		time.Sleep(rand.N(time.Millisecond))
		if tx.Err() != nil && rand.N(2) == 0 {
			return unwind()
		}
	}
	return nil
}

// A killStorm changes the value again and again under a load of operations
// that forceKill may end.
type killStorm struct {
	t              *testing.T
	db             *sql.DB
	ledger         *ledger
	begun, applied atomic.Int64 // the number of the value that is being put in force, and of the one that is
	ops, killed    atomic.Int64
}

// op runs an operation. It may fail if a change was being applied at any time
// during it, and then it was killed. It may return the value that it ran on.
func (s *killStorm) op(what string, f func() (value string, err error)) {
	applied := s.applied.Load()
	quiet := applied == s.begun.Load()
	value, err := f()
	quiet = quiet && applied == s.begun.Load()
	s.ops.Add(1)
	if err != nil {
		s.killed.Add(1)
		if mustBeKilled(s.t, what, err); quiet {
			s.t.Errorf("%s: failed although no change was applied meanwhile: %v", what, err)
		}
		return
	}
	if n, err := strconv.ParseInt(value, 10, 64); value != "" && (err != nil || n < applied) {
		s.t.Errorf("%s: ran on value %q when %d was in force", what, value, applied)
	}
}

// exec runs a write.
func (s *killStorm) exec(ctx context.Context, f func(ctx context.Context) (sql.Result, error)) error {
	ctx, n := s.ledger.write(ctx)
	_, err := f(ctx)
	if err == nil {
		s.ledger.done(n, 1, 1, "which succeeded")
	} else {
		s.ledger.done(n, 0, 1, "which failed")
	}
	return err
}

var killWorkers = []struct {
	name string
	work func(s *killStorm, write, read *sql.Stmt)
}{
	{"exec", func(s *killStorm, _, _ *sql.Stmt) {
		s.op("exec", func() (string, error) {
			return "", s.exec(s.t.Context(), func(ctx context.Context) (sql.Result, error) {
				return s.db.ExecContext(ctx, "write", special{"x"})
			})
		})
	}},
	{"statement", func(s *killStorm, write, _ *sql.Stmt) {
		s.op("statement", func() (string, error) {
			return "", s.exec(s.t.Context(), func(ctx context.Context) (sql.Result, error) {
				return write.ExecContext(ctx, special{"x"}, 2)
			})
		})
	}},
	{"statement's query", func(s *killStorm, _, read *sql.Stmt) {
		s.op("statement's query", func() (v string, err error) {
			return v, read.QueryRow(special{"x"}).Scan(&v)
		})
	}},
	{"rows", func(s *killStorm, _, _ *sql.Stmt) {
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
	{"transaction", func(s *killStorm, write, _ *sql.Stmt) {
		s.op("transaction", func() (v string, err error) {
			ctx, n := s.ledger.write(s.t.Context())
			done, how := 0, "in a transaction that was not committed"
			defer func() {
				s.ledger.done(n, done, done, how)
			}()
			tx, err := s.db.BeginTx(ctx, nil)
			if err != nil {
				return "", err
			}
			defer tx.Rollback()
			if err := tx.QueryRow("read").Scan(&v); err != nil {
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
			time.Sleep(rand.N(time.Millisecond))
			if rand.N(4) == 0 {
				err = tx.Rollback()
				how = "in a transaction that was rolled back"
				return v, err
			}
			if err = tx.Commit(); err == nil {
				done, how = 1, "in a transaction that was committed"
			} else if errors.Is(err, hotload.ErrKilled) {
				// The Commit may have been in progress.
				s.ledger.mu.Lock()
				done = min(1, s.ledger.effects[n])
				s.ledger.mu.Unlock()
			}
			return v, err
		})
	}},
	{"conn", func(s *killStorm, _, _ *sql.Stmt) {
		conn, err := s.db.Conn(s.t.Context())
		if err != nil {
			s.t.Errorf("conn: %v", err)
			return
		}
		defer conn.Close()
		time.Sleep(rand.N(2 * time.Millisecond)) // the first use comes later
		s.op("conn", func() (v string, err error) {
			if rand.N(2) == 0 {
				return v, conn.QueryRowContext(s.t.Context(), "read", special{"x"}).Scan(&v)
			}
			return "", s.exec(s.t.Context(), func(ctx context.Context) (sql.Result, error) {
				return conn.ExecContext(ctx, "write", special{"x"})
			})
		})
	}},
	{"prepare", func(s *killStorm, _, _ *sql.Stmt) {
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

// TestKillStorm: under a storm of changes that kill, the driver is used as it
// has to be, each failure is a kill, each success took effect once and each
// failure at most once, and nothing fails while no change is applied.
func TestKillStorm(t *testing.T) {
	for _, test := range []struct {
		options string
		maxOpen int
	}{
		{"forceKill=true", 1}, {"forceKill=true", 2}, {"forceKill=true", 8}, {"forceKill=true", 0},
		{"forceKill=2ms", 1}, {"forceKill=2ms", 0},
	} {
		for _, withContext := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,max=%d,DriverContext=%t", test.options, test.maxOpen, withContext), func(t *testing.T) {
				f := newFake(t)
				f.rowCount = 3
				var d driver.Driver = f
				if withContext {
					d = ctxFake{f}
				}
				src := newSource("1")
				s := &killStorm{t: t, db: open(t, d, src, test.options), ledger: newLedger()}
				f.onCall = s.ledger.onCall
				s.begun.Store(1)
				s.applied.Store(1)
				s.db.SetMaxOpenConns(test.maxOpen)
				s.db.SetMaxIdleConns(4)
				write, err := s.db.Prepare("write ? ?")
				must(t, "prepare", err)
				read, err := s.db.Prepare("read ?")
				must(t, "prepare", err)
				ctx, stop := context.WithTimeout(t.Context(), *stormTime)
				defer stop()
				var wg sync.WaitGroup
				for range 2 {
					for _, w := range killWorkers {
						wg.Go(func() {
							for ctx.Err() == nil {
								w.work(s, write, read)
							}
						})
					}
				}
				changes := 0
				for ; ctx.Err() == nil; changes++ {
					time.Sleep(rand.N(8 * time.Millisecond))
					s.begun.Add(1)
					src.set(strconv.FormatInt(s.begun.Load(), 10))
					s.applied.Add(1)
				}
				wg.Wait()
				write.Close()
				read.Close()
				s.db.Close()
				await(t, "every connection is closed", func() bool { return len(f.live()) == 0 })
				s.ledger.check(t)
				t.Logf("%d operations, %d killed, %d changes, %d connections", s.ops.Load(), s.killed.Load(), changes, f.opened.Load())
				if s.ops.Load() == s.killed.Load() || s.killed.Load() == 0 || changes == 0 {
					t.Error("the storm did not happen")
				}
			})
		}
	}
}
