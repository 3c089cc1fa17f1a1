package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	rowEvery = 100 * time.Millisecond
	barWidth = 20
)

// A fleet is what the parent has, and what it knows of its programs. Changes are numbered from 1.
type fleet struct {
	opts   options
	fail   func(error) // ends the demonstration
	dir    string      // of etcd
	etcd   *server
	client *clientv3.Client
	begin  time.Time

	returned int           // the first change after an outage; 0 without one
	followed time.Duration // from etcd's return until the last pool was on that

	mu       sync.Mutex // guards what follows
	out      io.Writer
	puts     []time.Time   // of each change, just before it was put
	taken    []time.Time   // and when etcd said that it has it
	inForce  [][]time.Time // of each change, in each pool
	arrivals [][]time.Time // of each pool: its first operation on each change, or on a later one in its place
	counts   message
	drawn    int // operations until the last row
}

func newFleet(opts options, out io.Writer, fail func(error)) *fleet {
	return &fleet{opts: opts, fail: fail, begin: time.Now(), out: out, arrivals: make([][]time.Time, opts.processes*opts.pools)}
}

// change puts the next value.
func (f *fleet) change(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("etcd did not take a value within %v", patience))
	defer cancel()
	f.mu.Lock()
	f.puts, f.inForce = append(f.puts, time.Now()), append(f.inForce, nil)
	change := len(f.puts)
	f.mu.Unlock()
	if _, err := f.client.Put(ctx, key, f.opts.value(change)); err != nil {
		return cmp.Or(context.Cause(ctx), err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.taken = append(f.taken, time.Now())
	return nil
}

// heard takes what a process tells.
func (f *fleet) heard(process int, m message) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.counts.Operations += m.Operations
	f.counts.Failures += m.Failures
	if f.counts.Failure == "" {
		f.counts.Failure = m.Failure
	}
	for _, a := range m.InForce {
		f.inForce[a.Change-1] = append(f.inForce[a.Change-1], a.At)
	}
	for _, a := range m.Arrivals {
		at := &f.arrivals[process*f.opts.pools+a.Pool]
		for len(*at) < a.Change {
			*at = append(*at, a.At)
		}
	}
}

// settled returns when every pool is on the last value.
func (f *fleet) settled(ctx context.Context) error {
	for deadline := time.Now().Add(patience); ; {
		f.mu.Lock()
		on, all, failure := f.onChange()[len(f.puts)], len(f.arrivals), f.counts.Failure
		opening := len(f.puts) == 1
		f.mu.Unlock()
		switch {
		case on == all:
			return nil
		case opening && failure != "":
			return fmt.Errorf("a pool's first operation failed: %s", failure)
		case time.Now().After(deadline):
			return fmt.Errorf("after %v, %d of %d pools are on the last value", patience, on, all)
		}
		if err := sleep(ctx, time.Millisecond); err != nil {
			return err
		}
	}
}

// draw draws a row when something has changed, and at least every half a second, until it is stopped.
func (f *fleet) draw() (stop func()) {
	servers := "two that answer at once"
	if f.opts.dsns != nil {
		servers = "the two of -dsn"
	}
	fmt.Fprintf(f.out, `%d pools in %d processes follow one key of etcd, with
  sql.Open("hotload", "etcd://driver%s")
The servers are %s: blue █ and green ▒.

   time    ops errors  pools on each change, and how long ago it was put
`, len(f.arrivals), f.opts.processes, key, servers)
	ctx, cancel := context.WithCancel(context.Background())
	var drawing sync.WaitGroup
	drawing.Go(func() {
		var last []int
		for skipped := 0; sleep(ctx, rowEvery) == nil; skipped++ {
			f.mu.Lock()
			if pools := f.onChange(); skipped >= 4 || !slices.Equal(pools, last) {
				fmt.Fprintln(f.out, f.row(pools, time.Now()))
				last, skipped = pools, -1
			}
			f.mu.Unlock()
		}
	})
	return sync.OnceFunc(func() {
		cancel()
		drawing.Wait()
	})
}

// onChange counts the pools on each change.
func (f *fleet) onChange() []int {
	pools := make([]int, len(f.puts)+1)
	for _, at := range f.arrivals {
		pools[len(at)]++
	}
	return pools
}

func (f *fleet) row(pools []int, now time.Time) string {
	row := fmt.Sprintf("%6.1fs %6d %6d", now.Sub(f.begin).Seconds(), f.counts.Operations-f.drawn, f.counts.Failures)
	f.drawn = f.counts.Operations
	for change, n := range pools {
		if n > 0 {
			bar := strings.Repeat([]string{"█", "▒"}[change%2], max(1, n*barWidth/len(f.arrivals)))
			row += fmt.Sprintf("  %s %d #%d %s %.2fs", bar, n, change, colour(change), now.Sub(f.puts[change-1]).Seconds())
		}
	}
	return row
}

// mark tells, between two rows, what happened.
func (f *fleet) mark(text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fmt.Fprintln(f.out, "        ── "+text)
}

// summary reports whether all went well. The first change is not measured: the pools opened with it;
// nor is the one after an outage.
func (f *fleet) summary() (ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var taken, inForce, inForceLast, used, usedLast []time.Duration
	for i, put := range f.puts {
		if i == 0 || i+1 == f.returned {
			continue
		}
		taken = append(taken, f.taken[i].Sub(put))
		var last time.Duration
		for _, at := range f.inForce[i] {
			inForce = append(inForce, at.Sub(put))
			last = max(last, at.Sub(put))
		}
		inForceLast = append(inForceLast, last)
		last = 0
		for _, at := range f.arrivals {
			used = append(used, at[i].Sub(put))
			last = max(last, at[i].Sub(put))
		}
		usedLast = append(usedLast, last)
	}
	fmt.Fprintf(f.out, "\n%-50s     p50       p99       max\n", fmt.Sprintf("%d changes: from the start of a put until", len(taken)))
	for _, line := range []struct {
		name  string
		times []time.Duration
	}{
		{"etcd has acknowledged it", taken},
		{"it is in force, in any pool", inForce},
		{"it is in force, in the last pool", inForceLast},
		{"the first operation on it, in any pool", used},
		{"the first operation on it, in the last pool", usedLast},
	} {
		slices.Sort(line.times)
		fmt.Fprintf(f.out, "  %-44s", line.name)
		for _, p := range []float64{0.5, 0.99, 1} {
			fmt.Fprintf(f.out, " %6.1f ms", line.times[int(p*float64(len(line.times)-1))].Seconds()*1000)
		}
		fmt.Fprintln(f.out)
	}
	if f.returned > 0 {
		fmt.Fprintf(f.out, "\nThe last pool was on a new value %.1f s after etcd was back.\n", f.followed.Seconds())
	}
	fmt.Fprintf(f.out, "\n%d operations, %d errors\n", f.counts.Operations, f.counts.Failures)
	if f.counts.Failures > 0 {
		fmt.Fprintln(f.out, "the first error:", f.counts.Failure)
	}
	return f.counts.Failures == 0
}
