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
	waiting  atomic.Value // string: what the check waits for
	values   int          // so many were made by next
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
	t.wait("%s; delivered meanwhile: nothing", what)
	var n atomic.Int32
	return func(v string) {
		t.waiting.Store(fmt.Sprintf("%s; delivered meanwhile: %d, the last of %d bytes, %.40q", what, n.Add(1), len(v), v))
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

func (t *trial) stall() {
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

// absences yields each state in which the source has no value that the Subject can bring about.
func (t *trial) absences(yield func(state string) bool) {
	for _, v := range blanks {
		if t.blank(v) && !yield(fmt.Sprintf("holds %q", v)) {
			return
		}
	}
	if t.Remove != nil {
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
	value, values, err := t.Strategy.Watch(ctx, t.Path, t.Options)
	if err != nil {
		cancel()
		t.fail("Watch failed while its source holds a value: %v", err)
	}
	return &watch{value, values, cancel}
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
func (t *trial) failing(n int, options url.Values) []answer {
	ctx, cancel := context.WithTimeout(t.ctx, t.Patience/100)
	defer cancel()
	return t.callAll(slices.Repeat([]context.Context{ctx}, n), options)
}

// errors makes Watch fail in each way that the Subject offers, while the source holds value or has
// just held it, and returns the answers with an error.
func (t *trial) errors(value string) []answer {
	t.set(value)
	t.watch().cancel()
	answers := t.failing(1, t.unknownOption())
	for range t.absences {
		answers = append(answers, t.failing(1, t.Options)...)
		t.set(value)
		t.watch().cancel()
	}
	return slices.DeleteFunc(answers, func(a answer) bool { return a.err == nil })
}

// callAll calls Watch with each of the contexts, at the same time. As under hotload, each
// has options of its own.
func (t *trial) callAll(contexts []context.Context, options url.Values) []answer {
	t.wait("%d calls of Watch to return", len(contexts))
	answers := make([]answer, len(contexts))
	var wg sync.WaitGroup
	for i, ctx := range contexts {
		own := cloneOptions(options)
		wg.Go(func() {
			a := &answers[i]
			a.value, a.values, a.err = t.Strategy.Watch(ctx, t.Path, own)
		})
	}
	wg.Wait()
	return answers
}

const unknownOption = "strategytest.no-such-option"

// unknownOption returns the Subject's options and one that no strategy knows.
func (t *trial) unknownOption() url.Values {
	options := cloneOptions(t.Options)
	options.Set(unknownOption, "1")
	return options
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
		for {
			v := t.receive(w)
			came(v)
			if !yield(v) || v == want {
				return
			}
		}
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
func (t *trial) lull(w *watch) []string {
	const length = 25 * time.Millisecond
	t.wait("a pause to pass")
	var got []string
	end := time.After(length)
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
