package strategytest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"net/url"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A trial is one try of one requirement. Its methods may only be called by the goroutine that
// runs the check, which fail, skip and the watchdog end.
type trial struct {
	Subject
	*requirement
	ctx      context.Context // the watches' contexts come from it; ends with the trial
	result   result
	watchdog *time.Timer
	waiting  atomic.Value  // string: what the check waits for
	values   int           // so many were made by next
	lastSet  string        // the last of them that the source was given
	slowest  time.Duration // how long the delivery of a change took at most so far
}

// wait says what the check is about to wait for, and gives it the Subject's Patience. It ends a
// check that was given up and came back from the call that held it.
func (t *trial) wait(format string, args ...any) {
	if t.ctx.Err() != nil {
		runtime.Goexit()
	}
	t.waiting.Store(fmt.Sprintf(format, args...))
	t.watchdog.Reset(t.Patience)
}

// await is wait for values to be delivered: those that come are passed to came, by any goroutine,
// so that a timeout tells of them.
func (t *trial) await(format string, args ...any) (came func(v string)) {
	what := fmt.Sprintf(format, args...)
	t.wait("%s; meanwhile nothing came", what)
	var n atomic.Int32
	return func(v string) {
		t.waiting.Store(fmt.Sprintf("%s; meanwhile %d came, the last one %.40q, of %d bytes", what, n.Add(1), v, len(v)))
	}
}

// rounds yields 0, 1, 2 and so on, most of them if that takes no time to speak of, else fewer, but at
// least as many as least: a source that is polled every two seconds must not take minutes.
func (t *trial) rounds(least, most int) iter.Seq[int] {
	return func(yield func(int) bool) {
		began := time.Now()
		for i := range most {
			if i >= least && time.Since(began) > t.Patience/30 || !yield(i) {
				return
			}
		}
	}
}

func (t *trial) fail(format string, args ...any) {
	t.result.failed = t.breach(format, args...)
	runtime.Goexit()
}

func (t *trial) skip(format string, args ...any) {
	t.result.skipped = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

// next returns a value that has not been used in this trial.
func (t *trial) next() string {
	t.values++
	return fmt.Sprintf("host=db%d.example dbname=app user=u%d", t.values, t.values)
}

// set makes v what the source holds.
func (t *trial) set(v string) string {
	t.wait("the Subject's Set(%.40q) to return", v)
	if err := t.Set(v); err != nil {
		t.fail("the Subject's Set(%.40q): %v", v, err)
	}
	t.lastSet = v
	return v
}

// setNext gives the source n new values, one after another, and returns them.
func (t *trial) setNext(n int) []string {
	values := make([]string, n)
	for i := range values {
		values[i] = t.set(t.next())
	}
	return values
}

func (t *trial) remove() {
	if t.Remove == nil {
		t.skip("the Subject has no Remove")
	}
	t.wait("the Subject's Remove to return")
	if err := t.Remove(); err != nil {
		t.fail("the Subject's Remove: %v", err)
	}
}

// stall makes the source keep silent for the rest of the trial.
func (t *trial) stall() {
	if t.Stall == nil {
		t.skip("the Subject has no Stall")
	}
	t.wait("the Subject's Stall to return")
	if err := t.Stall(); err != nil {
		t.fail("the Subject's Stall: %v", err)
	}
}

// blank makes v, which is no value, what the source holds, or reports that the source cannot.
func (t *trial) blank(v string) bool {
	t.wait("the Subject's Set(%q) to return", v)
	err := t.Set(v)
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		t.fail("the Subject's Set(%q): %v", v, err)
	}
	return err == nil
}

// absences yields each state in which the source has no value that the Subject can bring about; for a
// slow one, a single blank value stands for all.
func (t *trial) absences(yield func(state string) bool) {
	for i, v := range blanks {
		if i > 0 && t.slow() {
			break
		}
		if t.blank(v) && !yield(fmt.Sprintf("holds %q", v)) {
			return
		}
	}
	if t.Remove != nil {
		t.set(t.next()) // there must be something to remove
		t.remove()
		yield("is away")
	}
}

var blanks = []string{"", " \t\r\n"}

// An answer is what a call of Watch returned.
type answer struct {
	value  string
	values <-chan string
	err    error
	alive  bool // its context had not ended then
}

// call calls Watch with options of its own, as hotload does.
func (t *trial) call(ctx context.Context, options url.Values) (a answer) {
	a.value, a.values, a.err = t.Strategy.Watch(ctx, t.Path, cloneOptions(options))
	a.alive = ctx.Err() == nil
	return a
}

// A watch is a call of Watch that succeeded.
type watch struct {
	value  string
	values <-chan string
	cancel context.CancelFunc
}

// watch begins a watch; the source must hold a value.
func (t *trial) watch() *watch {
	ctx, cancel := context.WithCancel(t.ctx)
	t.wait("Watch to return")
	a := t.call(ctx, t.Options)
	if a.err != nil {
		cancel()
		t.fail("Watch failed while its source holds a value: %v", a.err)
	}
	return &watch{a.value, a.values, cancel}
}

// watchAll begins n watches at the same time.
func (t *trial) watchAll(n int) []*watch {
	watches := make([]*watch, n)
	contexts := make([]context.Context, n)
	for i := range watches {
		ctx, cancel := context.WithCancel(t.ctx)
		watches[i], contexts[i] = &watch{cancel: cancel}, ctx
	}
	for i, a := range t.callAll(contexts, t.Options) {
		if a.err != nil {
			t.fail("one of %d calls of Watch at the same time failed: %v", n, a.err)
		}
		watches[i].value, watches[i].values = a.value, a.values
	}
	return watches
}

// failing calls Watch n times where it should fail, and soon ends its context in case it does not.
// The context has no deadline, since hotload's has none.
func (t *trial) failing(n int, options url.Values) []answer {
	ctx, cancel := context.WithCancel(t.ctx)
	defer cancel()
	defer time.AfterFunc(t.Patience/100, cancel).Stop()
	return t.callAll(slices.Repeat([]context.Context{ctx}, n), options)
}

// interrupted calls Watch n times while the source holds a value: once with a context that has ended
// already, then with one that ends later and later during the call.
func (t *trial) interrupted(n int) []answer {
	began := time.Now()
	t.watch().cancel()
	took := time.Since(began)
	answers := make([]answer, n)
	for i := range answers {
		ctx, cancel := context.WithCancel(t.ctx)
		if i == 0 {
			cancel()
			t.wait("Watch to return, called with a context that had ended")
		} else {
			time.AfterFunc(took*time.Duration(i)/time.Duration(n), cancel)
			t.wait("Watch to return, or to go on and then end, as its context ends during the call")
		}
		answers[i] = t.call(ctx, t.Options)
		cancel()
	}
	return answers
}

// errors makes Watch fail in each way that the Subject offers, while the source holds value or has
// just held it, and returns the answers with an error.
func (t *trial) errors(value string) []answer {
	t.set(value)
	t.watch().cancel()
	answers := t.failing(1, t.unknownOptions()[0])
	for range t.absences {
		answers = append(answers, t.failing(1, t.Options)...)
		t.set(value)
		t.watch().cancel()
	}
	answers = append(answers, t.interrupted(5)...)
	return slices.DeleteFunc(answers, func(a answer) bool { return a.err == nil })
}

// callAll calls Watch with each of the contexts, at the same time.
func (t *trial) callAll(contexts []context.Context, options url.Values) []answer {
	t.wait("%d calls of Watch to return", len(contexts))
	answers := make([]answer, len(contexts))
	var wg sync.WaitGroup
	for i, ctx := range contexts {
		wg.Go(func() { answers[i] = t.call(ctx, options) })
	}
	wg.Wait()
	return answers
}

// unknown are the names of options that no strategy has. The second is the slip that matters most:
// sql.Open refuses it, and so no strategy can mean something else by it.
var unknown = []string{"strategytest.no-such-option", "forcekill"}

// unknownOptions returns options of which one is unknown: added to the Subject's, alone, and in
// place of each of the Subject's, with a value and without.
func (t *trial) unknownOptions() []url.Values {
	var all []url.Values
	for _, name := range unknown {
		for _, value := range []string{"1", ""} {
			added := cloneOptions(t.Options)
			added.Set(name, value)
			all = append(all, added)
			for known := range t.Options {
				instead := cloneOptions(added)
				instead.Del(known)
				all = append(all, instead)
			}
			if len(t.Options) > 1 {
				all = append(all, url.Values{name: {value}})
			}
		}
	}
	return all
}

func cloneOptions(options url.Values) url.Values {
	clone := make(url.Values, len(options))
	for name, values := range options {
		clone[name] = slices.Clone(values)
	}
	return clone
}

// receive returns the next value, and ends the trial if the channel is closed first.
func (t *trial) receive(w *watch) string {
	select {
	case v, ok := <-w.values:
		if !ok {
			t.fail("the channel was closed before its context ended")
		}
		return v
	case <-t.ctx.Done(): // the watchdog gave up
		runtime.Goexit()
		panic("unreachable")
	}
}

// until receives up to and with want, and returns what came.
func (t *trial) until(w *watch, want string) []string {
	return slices.Collect(t.upTo(w, want))
}

// upTo yields what comes, up to and with want.
func (t *trial) upTo(w *watch, want string) iter.Seq[string] {
	return func(yield func(string) bool) {
		came := t.await("%.40q to be delivered, the source's last value", want)
		began := time.Now()
		for {
			v := t.receive(w)
			came(v)
			if v == want {
				t.slowest = max(t.slowest, time.Since(began))
			}
			if !yield(v) || v == want {
				return
			}
		}
	}
}

// inOrder fails unless those of got that are in order come in that order.
func (t *trial) inOrder(order, got []string) {
	newest := 0
	for _, v := range got {
		i := slices.Index(order, v)
		if i >= 0 && i < newest {
			t.fail("%q was delivered after %q, which the source held later", v, order[newest])
		}
		newest = max(newest, i)
	}
}

// closed receives until the channel is closed.
func (t *trial) closed(w *watch) {
	for {
		select {
		case _, ok := <-w.values:
			if !ok {
				return
			}
		case <-t.ctx.Done():
			runtime.Goexit()
		}
	}
}

// pause lets d pass, which is not what the watchdog is for.
func (t *trial) pause(d time.Duration) {
	t.wait("a pause to pass")
	t.watchdog.Reset(t.Patience + d)
	select {
	case <-time.After(d):
	case <-t.ctx.Done():
		runtime.Goexit()
	}
}

// lull receives what comes while the strategy has a chance to do wrong. No check rests on its
// length: too short a lull can only miss a breach.
func (t *trial) lull(w *watch) []string { return t.during(w, shortest) }

const shortest = 25 * time.Millisecond

// slow reports whether a change has taken so long to be delivered that few things can be tried.
func (t *trial) slow() bool { return t.slowest > t.Patience/100 }

// notice is a lull in which the strategy should notice that its source is away: it lasts longer than
// a change has taken to be delivered.
func (t *trial) notice(w *watch) []string {
	return t.during(w, min(shortest+t.slowest*5/4, t.Patience/10))
}

// during receives what comes within d.
func (t *trial) during(w *watch, d time.Duration) []string {
	t.wait("a pause to pass")
	t.watchdog.Reset(t.Patience + d)
	var got []string
	end := time.After(d)
	for {
		select {
		case v, ok := <-w.values:
			if !ok {
				return got
			}
			got = append(got, v)
		case <-end:
			return got
		case <-t.ctx.Done():
			runtime.Goexit()
		}
	}
}

// allUntil receives from all watches at the same time until each has delivered want.
func (t *trial) allUntil(watches []*watch, want string) {
	came := t.await("%q to be delivered by %d of the watches in progress", want, len(watches))
	began := time.Now()
	var closed atomic.Bool
	var wg sync.WaitGroup
	for _, w := range watches {
		wg.Go(func() {
			for {
				select {
				case v, ok := <-w.values:
					if v == want {
						return
					}
					if !ok {
						closed.Store(true)
						return
					}
					came(v)
				case <-t.ctx.Done():
					return
				}
			}
		})
	}
	wg.Wait()
	if closed.Load() {
		t.fail("a channel was closed before its context ended")
	}
	t.slowest = max(t.slowest, time.Since(began))
}

// cancelAll ends watches without receiving what they may still offer.
func cancelAll(watches []*watch) {
	for _, w := range watches {
		w.cancel()
	}
}

// leaks fails if each call of round leaves as many as n goroutines behind that began with the same
// function. What watches share, such as connections, is there after the first call or grows up to a
// limit: so a leak is only what grows once more.
func (t *trial) leaks(n int, round func()) {
	t.labelled(func(count func() map[string]int) {
		round()
		t.pause(t.Patience / 100)
		var left string
		for range 2 {
			before := count()
			round()
			if left = t.left(n, before, count); left == "" {
				return
			}
		}
		t.fail("after watches and failed calls that have ended there are %s, as there were after those before", left)
	})
}

// left waits until there are fewer than n more goroutines than before that began with the same function,
// or says which they are. It looks less and less often: to count goroutines stops the world.
func (t *trial) left(n int, before map[string]int, count func() map[string]int) (left string) {
	pause := t.Patience / 1000
	for deadline := time.Now().Add(t.Patience); time.Now().Before(deadline); pause *= 2 {
		left = ""
		for name, now := range count() {
			if now -= before[name]; now >= n {
				left = fmt.Sprintf("%d more goroutines that began with %s", now, name)
			}
		}
		if left == "" {
			break
		}
		t.pause(pause)
	}
	return left
}

// labelled calls f with the means to count the goroutines that are started meanwhile.
func (t *trial) labelled(f func(count func() map[string]int)) {
	const key = "strategytest"
	label := fmt.Sprintf("%p", t) // tells this trial from others in the same process
	pprof.Do(t.ctx, pprof.Labels(key, label), func(context.Context) {
		f(func() map[string]int { return goroutines(key, label) })
	})
}

// goroutines counts the live goroutines that bear the label key=value, by the function that each
// began with. Labels pass from a goroutine to those it starts, so that this sees the strategy's and
// nobody else's, whatever runs beside.
func goroutines(key, value string) map[string]int {
	var buf bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&buf, 1); err != nil {
		return nil
	}
	counts := make(map[string]int)
	// A record is a line "count @ addresses", one "# labels: {...}", and one for each frame,
	// "#	0xaddress	function+0xoffset	file:line", the outermost last.
	for record := range strings.SplitSeq(buf.String(), "\n\n") {
		if !strings.Contains(record, fmt.Sprintf("%q:%q", key, value)) {
			continue
		}
		count, frames, _ := strings.Cut(record, " @ ")
		n, err := strconv.Atoi(count[strings.LastIndexByte(count, '\n')+1:])
		if err != nil {
			continue
		}
		last := frames[strings.LastIndexByte(strings.TrimSpace(frames), '\n')+1:]
		if f := strings.Fields(last); len(f) >= 3 {
			name, _, _ := strings.Cut(f[2], "+0x")
			counts[name] += n
		}
	}
	return counts
}
