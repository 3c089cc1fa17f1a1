package main

import (
	"context"
	"database/sql"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

const (
	pace     = 4 * time.Millisecond   // each worker begins an operation this often, if it can
	longTx   = 300 * time.Millisecond // what the long transactions take
	patience = 10 * time.Second       // an operation that takes longer has failed
)

// A place is where an operation ran: on which server, and as which user.
type place struct{ server, user string }

// load is what an application does with its pool. It knows nothing of hotload.
// Every write has a number of its own.
type load struct {
	db       *sql.DB
	prepared *sql.Stmt // prepared once, and used across every change
	insert   string
	read     string
	number   atomic.Int64 // of the latest write

	stopping chan struct{}
	workers  sync.WaitGroup

	mu      sync.Mutex // protects what follows
	row     map[place]int
	failed  int // since the last row
	total   map[string]int
	errors  []error
	written []int64                  // the writes that succeeded
	slowest time.Duration            // operation, not counting a long transaction's pause
	awaited map[place]chan time.Time // see arrival
}

// startLoad makes the pool's first connection and lets workers go.
func startLoad(ctx context.Context, db *sql.DB, table string, workers int) (*load, error) {
	l := &load{
		db:       db,
		insert:   "INSERT INTO " + table + " (n) VALUES ($1) RETURNING server, current_user",
		read:     "SELECT server, current_user FROM " + table + ", generate_series(1, $1) WHERE n = 0",
		stopping: make(chan struct{}),
		row:      map[place]int{},
		total:    map[string]int{},
		awaited:  map[place]chan time.Time{},
	}
	var err error
	if l.prepared, err = db.PrepareContext(ctx, l.insert); err != nil {
		return nil, err
	}
	kinds := []func(context.Context) (place, []int64, error){l.write, l.query, l.transaction, l.writePrepared}
	for i := range workers {
		l.workers.Go(func() {
			tick := time.NewTicker(pace)
			defer tick.Stop()
			for ; l.goesOn(tick.C); i++ {
				l.do(0, kinds[i%len(kinds)])
			}
		})
	}
	// One more, so that every change meets a transaction that takes its time.
	l.workers.Go(func() {
		tick := time.NewTicker(pace)
		defer tick.Stop()
		for l.goesOn(tick.C) {
			l.do(longTx, func(ctx context.Context) (place, []int64, error) { return l.longTransaction(ctx, longTx) })
		}
	})
	return l, nil
}

func (l *load) goesOn(tick <-chan time.Time) bool {
	select {
	case <-l.stopping:
		return false
	case <-tick:
		return true
	}
}

// stop lets every operation that has begun come to its end.
func (l *load) stop() {
	close(l.stopping)
	l.workers.Wait()
	l.prepared.Close()
}

func (l *load) do(pause time.Duration, operation func(context.Context) (place, []int64, error)) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	start := time.Now()
	at, wrote, err := operation(ctx)
	end := time.Now()

	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.failed++
		l.errors = append(l.errors, err)
		return
	}
	l.row[at]++
	l.total[at.server]++
	l.written = append(l.written, wrote...)
	l.slowest = max(l.slowest, end.Sub(start)-pause)
	if c := l.awaited[at]; c != nil {
		c <- end
		delete(l.awaited, at)
	}
}

// arrival returns a channel that tells when the first operation at a place ended.
func (l *load) arrival(at place) <-chan time.Time {
	c := make(chan time.Time, 1)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.awaited[at] = c
	return c
}

// sinceLastRow returns how many operations succeeded at each place, and how many failed,
// since it was last called.
func (l *load) sinceLastRow() (succeeded map[place]int, failed int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	succeeded, failed = l.row, l.failed
	l.row, l.failed = map[place]int{}, 0
	return succeeded, failed
}

func (l *load) write(ctx context.Context) (at place, wrote []int64, err error) {
	n := l.number.Add(1)
	err = l.db.QueryRowContext(ctx, l.insert, n).Scan(&at.server, &at.user)
	return at, []int64{n}, err
}

func (l *load) writePrepared(ctx context.Context) (at place, wrote []int64, err error) {
	n := l.number.Add(1)
	err = l.prepared.QueryRowContext(ctx, n).Scan(&at.server, &at.user)
	return at, []int64{n}, err
}

func (l *load) query(ctx context.Context) (at place, _ []int64, err error) {
	const want = 20
	rows, err := l.db.QueryContext(ctx, l.read, want)
	if err != nil {
		return at, nil, err
	}
	defer rows.Close()
	got := 0
	for ; rows.Next(); got++ {
		if err := rows.Scan(&at.server, &at.user); err != nil {
			return at, nil, err
		}
	}
	if err := rows.Err(); err != nil {
		return at, nil, err
	}
	if got != want {
		return at, nil, fmt.Errorf("a query answered %d rows instead of %d", got, want)
	}
	return at, nil, nil
}

func (l *load) transaction(ctx context.Context) (place, []int64, error) {
	return l.longTransaction(ctx, 0)
}

// longTransaction makes three writes, with a pause, and sees to it that all are made at the same place.
func (l *load) longTransaction(ctx context.Context, pause time.Duration) (at place, wrote []int64, err error) {
	tx, err := l.db.BeginTx(ctx, nil)
	if err != nil {
		return at, nil, err
	}
	defer tx.Rollback() // does nothing after Commit
	n := l.number.Add(3)
	var first place
	if err := tx.QueryRowContext(ctx, l.insert, n-2).Scan(&first.server, &first.user); err != nil {
		return at, nil, err
	}
	if _, err := tx.ExecContext(ctx, l.insert, n-1); err != nil {
		return at, nil, err
	}
	if pause > 0 {
		if _, err := tx.ExecContext(ctx, "SELECT pg_sleep($1)", pause.Seconds()); err != nil {
			return at, nil, err
		}
	}
	if err := tx.StmtContext(ctx, l.prepared).QueryRowContext(ctx, n).Scan(&at.server, &at.user); err != nil {
		return at, nil, err
	}
	if at != first {
		return at, nil, fmt.Errorf("a transaction began on %v and ended on %v", first, at)
	}
	return at, []int64{n - 2, n - 1, n}, tx.Commit()
}
