// Package strategytest is what hotload's specification demands of strategies, as a test suite. The
// specification is at https://github.com/infobloxopen/hotload/blob/main/SPEC.md; its part I is for
// authors of strategies, and S-1 and the like are requirements there.
//
// The author of a strategy hands [Run] a function that makes a fresh [Subject], and gets a
// subtest for each requirement:
//
//	func TestStrategy(t *testing.T) {
//		strategytest.Run(t, func(t *testing.T) strategytest.Subject {
//			file := filepath.Join(t.TempDir(), "dsn")
//			return strategytest.Subject{
//				Strategy: mystrategy.New(),
//				Path:     file,
//				Set:      func(value string) error { return replaceFile(file, value) },
//				Remove:   func() error { return os.Remove(file) },
//			}
//		})
//	}
//
// # What a pass claims
//
// A pass means that no subtest saw a MUST broken, for the values, the number of watches and the
// order of events that the suite tries. A skipped subtest says what the Subject lacked for it. A pass
// says nothing about
//
//   - SHOULDs, and what the strategy logs;
//   - sources that fail in ways for which the Subject has no function;
//   - what a watch leaves behind other than goroutines: connections, leases, timers; nor about what
//     all watches share, if a little more of it is left each time;
//   - what takes longer than a subtest, such as an outage of minutes or a lease that ends.
//
// Run it with -race, which is what finds unguarded state, and more than once: some breaches show
// only when goroutines meet unluckily.
//
// # How long it takes
//
// A Run takes about 5 seconds, and some 65 times as long as the strategy takes to deliver a change:
// two minutes and more for one that polls every 2 seconds. A strategy that is slow is tried less often,
// and may pass where it would fail if it were quick. So let it poll every 10 milliseconds in its tests.
// A subtest that fails often takes as long as [Subject].Patience.
//
// A slow machine does not make a test fail: the suite waits up to the Patience for each thing, and
// tests "nothing may be delivered" by what comes before a later value.
//
// # Limits
//
// A subtest that waits in vain fails and says for what; the next begins with a fresh Subject. A
// call into the strategy that never returns cannot be ended from outside: its goroutine stays
// until the test binary exits. A fake that answers in no time hides changes that are lost between
// its read and its subscription (S-6): let its reads take a millisecond. The suite cannot run in a
// testing/synctest bubble.
package strategytest

import (
	"context"
	"net/url"
	"testing"
	"time"

	"github.com/infobloxopen/hotload"
)

// A Subject is a strategy to be tested and the means to change its source. The functions are
// called one at a time, though not all from one goroutine, and while watches run; an error from
// one of them fails the subtest. What they leave behind is for the author's t.Cleanup.
//
// Those that may be nil are for what not every source can do. Without them something is not tried,
// and a skipped subtest says what.
//
// A source that can fail in more than one way gets a Run for each: one whose Remove deletes the
// key, one whose Remove stops the server, one whose Set also compacts.
type Subject struct {
	Strategy hotload.Strategy
	Path     string     // as hotload passes it: the path of the data source name, with its slash
	Options  url.Values // as hotload passes them; nil if the strategy needs none

	// Set makes value what the source holds, whole, and at once for a Watch that begins after Set
	// has returned. It brings back a source that Remove took away. The values are printable
	// text of at most 1,000 bytes, and empty or blank ones, for which Set may return
	// [errors.ErrUnsupported] if the source cannot hold them.
	Set func(value string) error

	// Remove takes the source away, also at once: the file is deleted, the key gone, the
	// server down. May be nil.
	Remove func() error

	// Stall makes the source keep silent for the rest of the subtest: questions reach it and
	// get no answer. A refused connection is not a stall. May be nil, and should be for a source
	// that always answers at once.
	Stall func() error

	// SetOther is Set for OtherPath, a second path of the same source. A good one begins with Path,
	// such as Path+".old": then a strategy that watches all that begins with Path is found out.
	// Remove may take both away. May be nil.
	SetOther  func(value string) error
	OtherPath string

	// Patience is how long the suite waits for any one thing that must happen, before it
	// calls it missing. Zero means 30 seconds. It must be at least ten times as long as the strategy
	// takes to deliver a change: its polling interval, or the time for which it lets its source rest.
	Patience time.Duration
}

// Run tests the strategy that newSubject returns, each requirement in a subtest of its own that
// bears its ID, as in "S-20/closes its channel when its context ends", and with a Subject of its own. What only some
// Subjects can do is in a further subtest, as in ".../while its source is away".
// A subtest that could only repeat the failure of an earlier one is skipped and says so; newSubject
// must not call t.Parallel.
func Run(t *testing.T, newSubject func(t *testing.T) Subject) {
	t.Helper() // here and below: a failure bears the line of the author's call of Run
	results := make(outcomes)
	for _, r := range requirements {
		t.Run(r.fullName(), func(t *testing.T) {
			t.Helper()
			res := result{skipped: r.blocked(results)}
			if res.skipped == "" {
				s := newSubject(t)
				if s.Strategy == nil || s.Set == nil {
					t.Fatal("strategytest: a Subject needs a Strategy and a Set")
				}
				res = r.try(s)
			}
			results.add(r, res)
			switch {
			case res.failed != "":
				t.Error(res.failed)
			case res.skipped != "":
				t.Skip(res.skipped)
			}
		})
	}
}

// A result is the outcome of one try of one requirement; with neither text, it held.
type result struct {
	failed  string
	skipped string
}

// outcomes holds the result for each ID: a failure, else that of its main try.
type outcomes map[string]result

func (all outcomes) add(r *requirement, res result) {
	if r.when == "" || res.failed != "" {
		all[r.id()] = res
	}
}

const defaultPatience = 30 * time.Second

// try runs r's check on s under a watchdog: the check runs in a goroutine of its own, names each
// thing it is going to wait for, and is given up when one of them takes longer than the Patience.
func (r *requirement) try(s Subject) result {
	if s.Patience <= 0 {
		s.Patience = defaultPatience
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	t := &trial{Subject: s, requirement: r, ctx: ctx, watchdog: time.NewTimer(s.Patience)}
	defer t.watchdog.Stop()

	done := make(chan result, 1)
	go func() {
		defer func() { done <- t.result }() // deferred: fail and skip end the goroutine
		r.check(t)
	}()
	select {
	case res := <-done:
		return res
	case <-t.watchdog.C:
		return result{failed: r.breach("waited %v for %s", s.Patience, t.waiting.Load())}
	}
}
