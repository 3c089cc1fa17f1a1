package strategytest

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"
)

// A requirement is a MUST of SPEC.md that can be tested from outside a strategy, or what of it only
// some Subjects allow to be tried, in a subtest of its own.
type requirement struct {
	name  string   // of the subtest: the ID, a slash, and words
	when  string   // what only some Subjects can bring about; added to the name
	rule  string   // as SPEC.md has it; filled in below for a when
	needs []string // IDs of requirements tried earlier, without which the check would tell nothing
	check func(*trial)
}

func (r *requirement) id() string {
	id, _, _ := strings.Cut(r.name, "/")
	return id
}

func (r *requirement) fullName() string {
	if r.when == "" {
		return r.name
	}
	return r.name + "/" + r.when
}

// breach is the text of a failure: what was seen, and the rule that it breaks.
func (r *requirement) breach(format string, args ...any) string {
	return fmt.Sprintf("%s: %s\n%s (SPEC.md): %s", r.id(), fmt.Sprintf(format, args...), r.id(), r.rule)
}

// blocked says why r cannot be tried after such results, or is empty.
func (r *requirement) blocked(earlier outcomes) string {
	needs := r.needs
	if r.when != "" {
		needs = append([]string{r.id()}, needs...)
	}
	for _, id := range needs {
		switch res := earlier[id]; {
		case res.failed != "":
			return fmt.Sprintf("not tried: needs %s, which failed", id)
		case res.skipped != "":
			return fmt.Sprintf("not tried: needs %s, which was skipped", id)
		}
	}
	return ""
}

const (
	whileAway   = "while its source is away"
	whileSilent = "while its source does not answer"
)

// requirements is in an order in which each comes after those it needs.
var requirements = []*requirement{
	{
		name: "S-1/returns the value of its source",
		rule: "Watch MUST return the value that the source holds when it is called, and a nil error.",
		check: func(t *trial) {
			v := t.set(t.next())
			if w := t.watch(); w.value != v {
				t.fail("Watch returned %.60q, the source holds %.60q", w.value, v)
			}
		},
	},
	{
		name:  "S-2/returns a channel",
		rule:  "With a nil error, Watch MUST return a channel that is not nil.",
		needs: []string{"S-1"},
		check: func(t *trial) {
			t.set(t.next())
			if w := t.watch(); w.values == nil {
				t.fail("Watch returned a nil channel and a nil error")
			}
		},
	},
	{
		name:  "S-3/keeps its channel open",
		rule:  "The channel MUST NOT be closed before the context has ended, unless the watch is lost for good.",
		needs: []string{"S-2"},
		check: func(t *trial) {
			t.set(t.next())
			w := t.watch()
			for range 3 {
				t.set(t.next())
				// Whether the value comes is another requirement's business.
				t.wait("a pause to pass")
				select {
				case _, ok := <-w.values:
					if !ok {
						t.fail("the channel was closed, though its context lives and its source can be read")
					}
				case <-time.After(t.Patience / 30):
				}
			}
		},
	},
	{
		name:  "S-4/delivers the last value",
		rule:  "After any number of changes, however quick, the source's last value MUST be delivered.",
		needs: []string{"S-3"},
		check: func(t *trial) {
			t.set(t.next())
			w := t.watch()
			// Some changes are easily overlooked by a strategy that compares sizes or first parts, or
			// that stops at a value which is written again.
			v := t.set(t.next())
			t.until(w, v)
			for i := range t.rounds(3, 30) {
				switch i {
				case 0:
					t.setNext(4)
					v = t.set(t.next() + " x")
				case 1:
					v = t.set(strings.TrimSuffix(v, "x") + "y")
				case 2:
					t.set(v)
					t.lull(w)
					v = t.set(t.next())
				default:
					v = t.set(t.next())
				}
				t.until(w, v)
			}
			// The pool may be late to receive.
			v = t.set(t.next())
			t.pause(t.Patience / 20)
			t.until(w, v)
		},
	},
	{
		name:  "S-5/does not send the first value",
		rule:  "The value that Watch returns MUST NOT be sent on the channel as well, unless the source has changed or been away since.",
		needs: []string{"S-4"},
		check: func(t *trial) {
			first := t.set(t.next())
			w := t.watch()
			got := t.lull(w)
			got = append(got, t.until(w, t.set(t.next()))...)
			if slices.Contains(got, first) {
				t.fail("%q was delivered, which Watch had returned", first)
			}
		},
	},
	{
		name:  "S-8/delivers in order",
		rule:  "Values MUST be delivered in the order in which the source held them; some MAY be left out.",
		needs: []string{"S-4"},
		check: func(t *trial) {
			order := []string{t.set(t.next())}
			w := t.watch()
			// Once with nobody reading meanwhile, once with somebody reading: each time the last
			// value, whatever may follow it, and a further one.
			burst := t.setNext(5)
			got := t.until(w, burst[len(burst)-1])
			got = append(got, t.lull(w)...)
			order = append(order, burst...)
			for range 4 {
				order = append(order, t.set(t.next()))
				got = append(got, t.lull(w)...)
			}
			order = append(order, t.set(t.next()))
			got = append(got, t.until(w, order[len(order)-1])...)
			t.inOrder(order, got)
			w.cancel()
			t.lull(w)

			// What was announced while Watch was reading can be older than what it read.
			began := time.Now()
			t.watch().cancel()
			took := time.Since(began)
			for range t.rounds(2, 10) {
				order := []string{t.next(), t.next(), t.next()}
				set := make(chan error, 1)
				go func() {
					var err error
					for _, v := range order {
						err = errors.Join(err, t.Set(v))
						time.Sleep(took / 4)
					}
					set <- err
				}()
				w := t.watch()
				t.wait("the Subject's Set to return")
				if err := <-set; err != nil {
					t.fail("the Subject's Set: %v", err)
				}
				t.inOrder(order, append([]string{w.value}, t.lull(w)...))
				w.cancel()
				t.lull(w)
			}
		},
	},
	{
		name:  "S-9/keeps no queue",
		rule:  "Values MUST NOT queue up for a pool that does not receive: when it receives again, at most one superseded value MAY come before the newest.",
		needs: []string{"S-4"},
		check: func(t *trial) {
			const changes = 5
			t.set(t.next())
			w := t.watch()
			t.until(w, t.set(t.next()))
			// The pauses between the changes keep a source from announcing them all at once. When
			// the strategy has seen the last one cannot be known. So it has longer and longer for
			// that, and breaks the rule if the longest is not enough: a strategy that takes its time
			// for each change is given it.
			var got []string
			for _, settle := range []time.Duration{t.Patience / 300, t.Patience / 10, t.Patience} {
				var last string
				for range changes {
					last = t.set(t.next())
					t.pause(min(t.Patience/6000+t.slowest*3/2, t.Patience/100))
				}
				t.pause(settle)
				if got = t.until(w, last); len(got) <= 2 {
					return
				}
			}
			t.fail("after %d changes that nobody received, %d superseded values came before the newest", changes, len(got)-1)
		},
	},
	{
		name:  "S-10/delivers whole values",
		rule:  "A value MUST be whole, exactly as the source held it at one time, save white space around it.",
		needs: []string{"S-4"},
		check: func(t *trial) {
			// Each is full of what is easily taken for something else than text, and of a letter
			// that no other has, so that two halves of two values do not make one of them.
			var held []string
			long := func(size int, quote string) string {
				v := quote + t.next() + tricky
				filler := string(rune('a' + len(held)))
				v += strings.Repeat(filler, max(1, size-len(v)-len(quote))) + quote
				held = append(held, t.set(v))
				return v
			}
			first := long(1000, `"`)
			w := t.watch()
			if w.value != first {
				t.fail("Watch returned what its source never held: %s", unlike(w.value, held))
			}
			others := []struct {
				size  int
				quote string
			}{{1000, `'`}, {1000, ""}, {0, ""}, {999, "`"}, {600, `'`}}
			for i := range t.rounds(3, len(others)) {
				next := others[i]
				for v := range t.upTo(w, long(next.size, next.quote)) {
					if !slices.Contains(held, v) {
						t.fail("what was delivered its source never held: %s", unlike(v, held))
					}
				}
			}
		},
	},
	{
		name:  "S-11/delivers no blank value",
		rule:  "An empty value, or one of white space only, MUST NOT be delivered: a source that holds one is away.",
		needs: []string{"S-4"},
		check: func(t *trial) {
			t.set(t.next())
			w := t.watch()
			t.until(w, t.set(t.next()))
			tried := false
			for _, v := range blanks {
				if tried && t.slow() || !t.blank(v) {
					continue
				}
				tried = true
				got := t.notice(w)
				got = append(got, t.until(w, t.set(t.next()))...)
				for _, v := range got {
					if strings.TrimSpace(v) == "" {
						t.fail("%q was delivered", v)
					}
				}
			}
			if !tried {
				t.skip("the Subject's Set takes no blank value")
			}
		},
	},
	{
		name:  "S-12/goes on when the source is back",
		rule:  "A watch MUST outlive a source that is away for a while: when it is back, so is delivery, on the same channel.",
		needs: []string{"S-4"},
		check: func(t *trial) {
			t.set(t.next())
			w := t.watch()
			before := t.set(t.next())
			t.until(w, before)
			t.remove()
			t.notice(w)
			if !t.slow() { // back with the value that it had
				t.set(before)
				t.notice(w)
			}
			t.until(w, t.set(t.next()))
			if !t.slow() { // long enough to give up after a few tries
				t.remove()
				t.during(w, t.Patience/100)
				t.until(w, t.set(t.next()))
			}
		},
	},
	{
		name:  "S-13/delivers nothing while the source is away",
		rule:  "A strategy MUST NOT deliver anything because its source is away: the last good value stays in force.",
		needs: []string{"S-10", "S-12"},
		check: func(t *trial) {
			t.set(t.next())
			w := t.watch()
			last := t.set(t.next())
			t.until(w, last)
			tried := false
			for state := range t.absences {
				tried = true
				if t.slow() && t.Remove != nil && state != "is away" {
					continue
				}
				held := []string{last}
				if state == "is away" {
					held = append(held, t.lastSet)
				}
				got := t.notice(w)
				last = t.set(t.next())
				for _, v := range append(got, t.until(w, last)...) {
					// That a blank value is none is S-11's business.
					if v != last && !slices.Contains(held, v) && (state == "is away" || strings.TrimSpace(v) != "") {
						t.fail("%.60q was delivered as the source %s or came back; the last value that it had held was %.60q", v, state, held[0])
					}
				}
			}
			if !tried {
				t.skip("the Subject has no Remove, and its Set takes no blank value")
			}
		},
	},
	{
		name:  "S-7/delivers an earlier value again",
		rule:  "A return to an earlier value is a change like any other, and MUST be delivered.",
		needs: []string{"S-4"},
		check: func(t *trial) {
			first := t.set(t.next())
			w := t.watch()
			second := t.set(t.next())
			t.until(w, second)
			for range t.rounds(1, 3) {
				t.until(w, t.set(first))
				t.until(w, t.set(second))
			}
			// While nobody reads: when first comes all the same, second must follow.
			t.set(first)
			t.pause(t.Patience / 300)
			t.set(second)
			t.pause(t.Patience / 300)
			if got := t.lull(w); slices.Contains(got, first) && !slices.Contains(got, second) {
				came := t.await("%.40q to be delivered after %.40q: the source went back to it while nobody read", second, first)
				for v := ""; v != second; came(v) {
					v = t.receive(w)
				}
			}
		},
	},
	{
		name:  "S-7/delivers an earlier value again",
		when:  whileAway,
		needs: []string{"S-12", "S-13"},
		check: func(t *trial) {
			first := t.set(t.next())
			w := t.watch()
			t.until(w, t.set(t.next()))
			t.remove()
			t.notice(w)
			t.until(w, t.set(first))
		},
	},
	{
		name:  "S-14/refuses unknown options",
		rule:  "Watch MUST return an error for an option that it does not know.",
		needs: []string{"S-1"},
		check: func(t *trial) {
			t.set(t.next())
			for _, options := range t.unknownOptions() {
				ctx, cancel := context.WithCancel(t.ctx) // ends later: the error must be about the option
				t.wait("Watch to return, with the options %q", options.Encode())
				a := t.call(ctx, options)
				cancel()
				if a.err == nil {
					name := unknown[0]
					if !options.Has(name) {
						name = unknown[1]
					}
					t.fail("Watch returned a nil error for the options %q, of which no strategy has %q", options.Encode(), name)
				}
			}
		},
	},
	{
		name:  "S-15/leaves its options as they are",
		rule:  "The options MUST NOT be changed: they are the caller's.",
		needs: []string{"S-1"},
		check: func(t *trial) {
			t.set(t.next())
			for _, options := range []url.Values{cloneOptions(t.Options), t.unknownOptions()[0]} {
				before := cloneOptions(options)
				ctx, cancel := context.WithCancel(t.ctx)
				t.wait("Watch to return")
				t.Strategy.Watch(ctx, t.Path, options)
				cancel()
				if !maps.EqualFunc(before, options, slices.Equal) {
					t.fail("Watch was passed the options %q and left %q", before.Encode(), options.Encode())
				}
			}
		},
	},
	{
		name:  "S-19/returns when its context ends",
		rule:  "Watch MUST return soon after its context has ended, also while its source does not answer.",
		needs: []string{"S-1"},
		check: func(t *trial) {
			t.set(t.next())
			t.interrupted(20)
		},
	},
	{
		name:  "S-19/returns when its context ends",
		when:  whileSilent,
		needs: []string{"S-2"},
		check: func(t *trial) {
			t.set(t.next())
			t.watch()
			t.stall()
			returns := func(others string) {
				ctx, cancel := context.WithCancel(t.ctx)
				defer cancel()
				returned := make(chan answer, 1)
				began := time.Now()
				t.wait("a pause to pass")
				go func() { returned <- t.call(ctx, t.Options) }()
				select {
				case a := <-returned:
					// A strategy may give up by itself, but not as quickly as that.
					switch took := time.Since(began); {
					case a.err == nil:
						t.fail("after the Subject's Stall, Watch returned %.60q and a nil error: the Stall does not stall, or Watch does not ask its source", a.value)
					case took < t.Patience/1000:
						t.fail("the Subject's Stall does not stall: Watch failed after %v, before its context ended: %v", took.Round(time.Millisecond), a.err)
					}
					return
				case <-time.After(t.Patience / 100):
				}
				cancel()
				t.wait("Watch to return after its context ended, its source not answering%s", others)
				select {
				case <-returned:
				case <-t.ctx.Done():
				}
			}
			returns("")
			go t.call(t.ctx, t.Options) // ends with the trial
			t.pause(t.Patience / 1000)
			returns(" and another Watch waiting for it")
		},
	},
	{
		name:  "S-20/closes its channel when its context ends",
		rule:  "The context governs the whole watch: soon after it has ended, the channel MUST be closed.",
		needs: []string{"S-3", "S-19"},
		check: func(t *trial) {
			for _, unread := range []int{0, 1, 3} {
				t.set(t.next())
				w := t.watch()
				t.setNext(unread)
				w.cancel()
				t.wait("the channel to be closed after its context ended, with %d changes not received", unread)
				t.closed(w)
			}
			for _, a := range t.interrupted(20) {
				if a.err == nil {
					t.wait("the channel to be closed, its context having ended before or while Watch ran")
					t.closed(&watch{values: a.values})
				}
			}
		},
	},
	{
		name:  "S-20/closes its channel when its context ends",
		when:  whileAway,
		needs: []string{"S-4"},
		check: func(t *trial) {
			t.set(t.next())
			w := t.watch()
			t.until(w, t.set(t.next()))
			t.remove()
			t.notice(w)
			w.cancel()
			t.wait("the channel to be closed after its context ended, its source being away")
			t.closed(w)
		},
	},
	{
		name:  "S-20/closes its channel when its context ends",
		when:  whileSilent,
		needs: []string{"S-4"},
		check: func(t *trial) {
			t.set(t.next())
			w := t.watch()
			t.until(w, t.set(t.next()))
			t.stall()
			t.notice(w)
			w.cancel()
			t.wait("the channel to be closed after its context ended, its source not answering")
			t.closed(w)
		},
	},
	{
		name:  "S-21/gives each watch its own channel",
		rule:  "Each Watch MUST return a channel that no other watch has.",
		needs: []string{"S-2"},
		check: func(t *trial) {
			t.set(t.next())
			a, b := t.watch(), t.watch()
			if a.values == b.values {
				t.fail("two watches that are both alive were given one channel")
			}
			a.cancel()
			if c := t.watch(); c.values == a.values || c.values == b.values {
				t.fail("a watch was given the channel of an earlier one")
			}
		},
	},
	{
		name:  "S-22/watches afresh",
		rule:  "A Watch that begins after another has ended or failed MUST work as the first did, with the value that the source holds now.",
		needs: []string{"S-4", "S-20", "S-21"},
		check: func(t *trial) {
			for range t.absences {
				t.failing(1, t.Options)
			}
			for i := range t.rounds(2, 4) {
				v := t.set(t.next())
				if i > 0 {
					t.failing(1, t.unknownOptions()[0])
				}
				w := t.watch()
				if w.value != v {
					t.fail("Watch returned an old value, %q: the source holds %q", w.value, v)
				}
				t.until(w, t.set(t.next()))
				w.cancel()
				t.wait("the channel to be closed after its context ended")
				t.closed(w)
			}
			// At the very moment at which another ends, before its channel is closed or just then.
			w := t.watch()
			for i := range t.rounds(1, 10) {
				w.cancel()
				if i%2 == 0 {
					t.wait("the channel to be closed after its context ended")
					t.closed(w)
				}
				w = t.watch()
				t.lull(w)
				t.until(w, t.set(t.next()))
			}
		},
	},
	{
		name:  "S-6/misses nothing while it starts",
		rule:  "A change that the source undergoes while Watch runs MUST be returned or delivered.",
		needs: []string{"S-22"},
		check: func(t *trial) {
			t.set(t.next())
			began := time.Now()
			w := t.watch()
			took := time.Since(began)
			end := func() { // whole, since that one watch disturbs the next is S-24's business
				w.cancel()
				t.lull(w)
			}
			end()

			const rounds = 20
			for i := range t.rounds(3, rounds) {
				i = i * 7 % rounds // so that a few are spread as well
				t.set(t.next())
				during := t.next()
				set := make(chan error, 1)
				go func() {
					time.Sleep(took * time.Duration(i) / rounds)
					set <- t.Set(during)
				}()
				w = t.watch()
				t.wait("the Subject's Set(%q) to return", during)
				if err := <-set; err != nil {
					t.fail("the Subject's Set(%q): %v", during, err)
				}
				if w.value != during {
					came := t.await("%q to be delivered, which the source was given while Watch ran; Watch returned %q", during, w.value)
					for v := ""; v != during; came(v) {
						v = t.receive(w)
					}
				}
				end()
			}
		},
	},
	{
		name:  "S-16/returns an error without a value",
		rule:  "If the source is away, Watch MUST return an error, at the latest when its context ends. It SHOULD do so at once: then the caller learns why.",
		needs: []string{"S-22"},
		check: func(t *trial) {
			tried := false
			fails := func(state, history string) {
				tried = true
				if a := t.failing(1, t.Options)[0]; a.err == nil {
					t.fail("Watch returned %.60q and a nil error while the source %s%s", a.value, state, history)
				}
			}
			for state := range t.absences {
				fails(state, "")
			}
			// The same by a strategy that has seen a value, and could hand it out again.
			t.set(t.next())
			w := t.watch()
			for state := range t.absences {
				t.lull(w)
				fails(state, ", and another watch was in progress")
			}
			t.set(t.next())
			w.cancel()
			t.wait("the channel to be closed after its context ended")
			t.closed(w)
			for state := range t.absences {
				fails(state, ", after another watch")
			}
			if !tried {
				t.skip("the Subject has no Remove, and its Set takes no blank value")
			}
		},
	},
	{
		name:  "S-17/returns an error alone",
		rule:  "With an error, Watch MUST return an empty value and a nil channel.",
		needs: []string{"S-22"},
		check: func(t *trial) {
			for _, a := range t.errors("v") {
				channel := "nil"
				if a.values != nil {
					channel = "not nil"
				}
				if a.value != "" || a.values != nil {
					t.fail("the error %q came with the value %.60q and a channel that is %s", a.err, a.value, channel)
				}
			}
		},
	},
	{
		name:  "S-18/tells no secret",
		rule:  "A value, or a part of one, MUST NOT appear in an error or in what the strategy logs.",
		needs: []string{"S-22"},
		check: func(t *trial) {
			// No part of it is a word, a number or changed by quoting, so that a part of six
			// bytes in an error comes from here.
			const value, part = "kq7xwzr3vj9plm2tnyb8gdhs", 6
			for _, a := range t.errors(value) {
				for i := range len(value) - part + 1 {
					if strings.Contains(a.err.Error(), value[i:i+part]) {
						t.fail("the error of Watch quotes the value %q, or a part of it: %v", value, a.err)
					}
				}
			}
		},
	},
	{
		name:  "S-32/returns errors of its own",
		rule:  "An error of Watch MUST NOT match driver.ErrBadConn, nor context.Canceled or context.DeadlineExceeded unless Watch's own context has ended.",
		needs: []string{"S-22"},
		check: func(t *trial) {
			for _, a := range t.errors("v") {
				for _, foreign := range []struct {
					name string
					err  error
				}{
					{"driver.ErrBadConn", driver.ErrBadConn},
					{"context.Canceled", context.Canceled},
					{"context.DeadlineExceeded", context.DeadlineExceeded},
				} {
					switch {
					case !errors.Is(a.err, foreign.err):
					case foreign.err == driver.ErrBadConn:
						t.fail("an error of Watch matches %s: %v", foreign.name, a.err)
					case a.alive:
						t.fail("an error of Watch, whose own context had not ended, matches %s: %v", foreign.name, a.err)
					}
				}
			}
		},
	},
	{
		name:  "S-23/serves watches at the same time",
		rule:  "Watch MUST be safe to call from many goroutines, on the same path and with watches in progress; each gets every last value.",
		needs: []string{"S-4", "S-21", "S-22"},
		check: func(t *trial) {
			first := t.set(t.next())
			watches := t.watchAll(8)
			for _, w := range watches {
				if w.value != first {
					t.fail("one of %d calls at a time returned %q, the source holds %q", len(watches), w.value, first)
				}
			}
			for range t.rounds(1, 4) {
				v := t.set(t.next())
				w := t.watch()
				if w.value != v {
					t.fail("with %d watches in progress Watch returned %q, the source holds %q", len(watches), w.value, v)
				}
				t.allUntil(watches, v)
				watches = append(watches, w)
			}
		},
	},
	{
		name:  "S-23/serves watches at the same time",
		when:  whileAway,
		needs: []string{"S-12"},
		check: func(t *trial) {
			t.set(t.next())
			watches := t.watchAll(8)
			for range t.rounds(1, 2) {
				t.allUntil(watches, t.set(t.next()))
				t.remove()
				t.notice(watches[0])
				t.allUntil(watches, t.set(t.next()))
			}
		},
	},
	{
		name:  "S-24/ends one watch alone",
		rule:  "The end of one watch, or the failure of one call, MUST NOT end or disturb another.",
		needs: []string{"S-20", "S-23"},
		check: func(t *trial) {
			t.set(t.next())
			// The others can hang on the oldest watch, or on the newest.
			for _, newestFirst := range []bool{false, true} {
				if newestFirst && t.slow() {
					break
				}
				watches := []*watch{t.watch(), t.watch(), t.watch()}
				if newestFirst {
					slices.Reverse(watches)
				}
				for len(watches) > 0 {
					watches[0].cancel()
					t.wait("the channel to be closed after its context ended")
					t.closed(watches[0])
					watches = watches[1:]
					t.allUntil(watches, t.set(t.next()))
				}
			}
			w := t.watch()
			t.failing(2, t.unknownOptions()[0])
			t.interrupted(5)
			t.allUntil([]*watch{w}, t.set(t.next()))
		},
	},
	{
		name:  "S-24/ends one watch alone",
		when:  whileAway,
		needs: []string{"S-12"},
		check: func(t *trial) {
			t.set(t.next())
			w := t.watch()
			t.remove()
			t.failing(2, t.Options)
			t.allUntil([]*watch{w}, t.set(t.next()))
		},
	},
	{
		name:  "S-24/ends one watch alone",
		when:  whileSilent,
		needs: []string{"S-19"},
		check: func(t *trial) {
			t.set(t.next())
			t.stall()
			ending, end := context.WithCancel(t.ctx)
			others := make(chan answer, 2)
			go func() { others <- t.call(ending, t.Options) }()
			t.pause(t.Patience / 1000)
			go func() { others <- t.call(t.ctx, t.Options) }() // ends with the trial
			t.pause(t.Patience / 1000)
			end()
			t.pause(t.Patience / 300)
			for range len(others) {
				a := <-others
				if a.alive && a.err != nil && (errors.Is(a.err, context.Canceled) || strings.Contains(a.err.Error(), context.Canceled.Error())) {
					t.fail("a call of Watch failed when the context of another one ended: %v", a.err)
				}
			}
		},
	},
	{
		name:  "S-25/lets no watch wait for another",
		rule:  "A pool that does not receive MUST NOT keep values from other watches.",
		needs: []string{"S-23"},
		check: func(t *trial) {
			t.set(t.next())
			watches := t.watchAll(3)
			var v string
			for range t.rounds(1, 5) {
				v = t.set(t.next())
				t.allUntil(watches[1:2], v)
			}
			// Nor from watches that begin now, nor does one of those wait to be closed.
			w := t.watch()
			if w.value != v {
				t.fail("with watches in progress of which two do not read, Watch returned %q, the source holds %q", w.value, v)
			}
			w.cancel()
			t.wait("the channel to be closed after its context ended, with watches in progress of which two do not read")
			t.closed(w)
		},
	},
	{
		name:  "S-26/leaves nothing running",
		rule:  "When a watch has ended, or Watch failed, it MUST NOT leave anything of its own behind; what watches share MAY stay.",
		needs: []string{"S-20", "S-25"},
		check: func(t *trial) {
			const watches = 32
			t.leaks(watches/2, func() {
				t.set(t.next())
				all := t.watchAll(watches)
				readers := all[:watches/2] // the others end with a value not received
				var last string
				for range 3 {
					last = t.set(t.next())
					t.pause(t.Patience / 6000)
				}
				t.allUntil(readers, last)
				cancelAll(all)
				for range t.absences {
					t.failing(watches, t.Options)
				}
				t.set(t.next())
				t.failing(watches, t.unknownOptions()[0])
				ended, end := context.WithCancel(t.ctx)
				end()
				t.callAll(slices.Repeat([]context.Context{ended}, watches), t.Options)
				t.interrupted(watches)
			})
		},
	},
	{
		name:  "S-26/leaves nothing running",
		when:  whileAway,
		needs: []string{"S-12", "S-24"},
		check: func(t *trial) {
			const watches = 32
			t.leaks(watches/4, func() {
				t.set(t.next())
				all := t.watchAll(watches)
				readers, others := all[:watches/2], all[watches/2:]
				t.remove()
				t.notice(readers[0])
				cancelAll(slices.Concat(readers[watches/4:], others[watches/4:]))
				readers, others = readers[:watches/4], others[:watches/4]
				t.allUntil(readers, t.set(t.next()))
				cancelAll(slices.Concat(readers, others))
			})
		},
	},
	{
		name:  "S-26/leaves nothing running",
		when:  whileSilent,
		needs: []string{"S-19"},
		check: func(t *trial) {
			const watches = 16
			t.labelled(func(count func() map[string]int) {
				t.set(t.next())
				cancelAll(t.watchAll(2 * watches)) // what they share is there now
				t.pause(t.Patience / 100)
				before := count()
				all := t.watchAll(watches)
				t.stall()
				t.failing(watches, t.Options)
				cancelAll(all)
				if left := t.left(watches/2, before, count); left != "" {
					t.fail("after %d more watches and as many calls, ended while the source did not answer, there are %s", watches, left)
				}
			})
		},
	},
	{
		name:  "S-31/keeps to its path",
		rule:  "Watch MUST return and deliver the values at pth, and of no other path.",
		needs: []string{"S-22"},
		check: func(t *trial) {
			if t.SetOther == nil {
				t.skip("the Subject has no SetOther")
			}
			here := t.Subject
			there := here
			there.Path, there.Set = here.OtherPath, here.SetOther
			for _, pair := range [][2]Subject{{here, there}, {there, here}} {
				at := func(i int) *trial { t.Subject = pair[i]; return t }
				held := [2]string{at(0).set(t.next()), at(1).set(t.next())}
				watches := [2]*watch{at(0).watch(), at(1).watch()}
				for i, w := range watches {
					if w.value != held[i] {
						t.fail("Watch returned %q for the path %q, where the source holds %q", w.value, pair[i].Path, held[i])
					}
				}
				for range t.rounds(1, 3) {
					t.until(watches[0], at(0).set(t.next()))
					// The other changes last, so that its value is the newest of all.
					others := at(1).set(t.next())
					t.until(watches[1], others)
					got := t.notice(watches[0])
					got = append(got, t.until(watches[0], at(0).set(t.next()))...)
					if slices.Contains(got, others) {
						t.fail("%q was delivered for the path %q: it is the value at %q", others, pair[0].Path, pair[1].Path)
					}
				}
				cancelAll(watches[:])
				if t.slow() {
					break
				}
			}
		},
	},
}

func init() {
	for i, r := range requirements {
		if r.when != "" { // it follows its main try, or another part of it
			r.rule = requirements[i-1].rule
		}
	}
}

// tricky is printable text that a strategy or its source could take for something else: for what is to
// be decoded, expanded, collapsed or cut off.
const tricky = `  !"#$%&'()*+,-./09:;<=>?@AZ[\]^_az{|}~ é  password='two  blanks' %2F+ &amp; \n \\ $HOME ${HOME} {{.}} <!-- # // -- `

// unlike says how v differs from the one of held that it resembles most.
func unlike(v string, held []string) string {
	most, alike := "", -1
	for _, h := range held {
		n := 0
		for n < min(len(v), len(h)) && v[n] == h[n] {
			n++
		}
		if n > alike {
			most, alike = h, n
		}
	}
	return fmt.Sprintf("it has %d bytes, and from byte %d on it is %.20q; what was held has %d bytes, and there %.20q",
		len(v), alike, v[alike:], len(most), most[alike:])
}
