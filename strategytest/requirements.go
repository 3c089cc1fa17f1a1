package strategytest

import (
	"context"
	"fmt"
	"maps"
	"net/url"
	"runtime/pprof"
	"slices"
	"strings"
	"time"
)

// A requirement is a MUST of SPEC.md that can be tested from outside a strategy.
type requirement struct {
	name  string   // of the subtest: the ID, a slash, and words
	rule  string   // as SPEC.md has it
	needs []string // IDs of earlier requirements without which the check would tell nothing
	check func(*trial)
}

func (r *requirement) id() string {
	id, _, _ := strings.Cut(r.name, "/")
	return id
}

// breach is the text of a failure: what was seen, and the rule that it breaks.
func (r *requirement) breach(format string, args ...any) string {
	return fmt.Sprintf("%s: %s\n%s (SPEC.md): %s", r.id(), fmt.Sprintf(format, args...), r.id(), r.rule)
}

// blocked says why r cannot be tried after such results, or is empty.
func (r *requirement) blocked(earlier map[string]result) string {
	for _, id := range r.needs {
		switch res := earlier[id]; {
		case res.failed != "":
			return fmt.Sprintf("not tried: needs %s, which failed", id)
		case res.skipped != "":
			return fmt.Sprintf("not tried: needs %s, which was skipped", id)
		}
	}
	return ""
}

// requirements is in the order of SPEC.md, in which each comes after those it needs.
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
			for _, changes := range []int{1, 10, 1, 2} {
				t.until(w, t.setNext(changes)[changes-1])
			}
		},
	},
	{
		name:  "S-5/does not send the first value",
		rule:  "The value that Watch returns MUST NOT be sent on the channel as well, unless the source has gone back to it since.",
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
		name:  "S-6/misses nothing while it starts",
		rule:  "A change that the source undergoes while Watch runs MUST be returned or delivered.",
		needs: []string{"S-4"},
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
			for i := range rounds {
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
					t.until(w, during)
				}
				end()
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
			for range 2 {
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
		name:  "S-8/delivers in order",
		rule:  "Values MUST be delivered in the order in which the source held them; some MAY be left out.",
		needs: []string{"S-4"},
		check: func(t *trial) {
			order := []string{t.set(t.next())}
			w := t.watch()
			// Once with nobody reading meanwhile, once with somebody reading: each time the last
			// value, whatever may follow it, and a further one.
			burst := t.setNext(20)
			got := t.until(w, burst[len(burst)-1])
			got = append(got, t.lull(w)...)
			order = append(order, burst...)
			for range 10 {
				order = append(order, t.set(t.next()))
				got = append(got, t.lull(w)...)
			}
			order = append(order, t.set(t.next()))
			got = append(got, t.until(w, order[len(order)-1])...)
			newest := 0
			for _, v := range got {
				i := slices.Index(order, v)
				if i >= 0 && i < newest {
					t.fail("%q was delivered after %q, which the source held later", v, order[newest])
				}
				newest = max(newest, i)
			}
		},
	},
	{
		name:  "S-9/keeps no queue",
		rule:  "Values MUST NOT queue up for a consumer that does not read: when it reads again, at most one superseded value MAY come before the newest.",
		needs: []string{"S-4"},
		check: func(t *trial) {
			t.set(t.next())
			w := t.watch()
			// The pauses between the changes keep a source from announcing them all at once. When
			// the strategy has seen the last one cannot be known. So it has longer and longer for
			// that, and breaks the rule if the longest is not enough.
			var got []string
			for _, settle := range []time.Duration{t.Patience / 300, t.Patience / 10, t.Patience / 2} {
				var last string
				for range 20 {
					last = t.set(t.next())
					t.pause(t.Patience / 6000)
				}
				t.pause(settle)
				if got = t.until(w, last); len(got) <= 2 {
					return
				}
			}
			t.fail("after 20 changes that nobody received, %d superseded values came before the newest", len(got)-1)
		},
	},
	{
		name:  "S-10/delivers whole values",
		rule:  "A value MUST be whole, exactly as the source held it at one time, save white space around it.",
		needs: []string{"S-4"},
		check: func(t *trial) {
			held := make(map[string]bool)
			long := func(size int) string {
				v := t.next() + ` password='%2F é "?&=;' # `
				v = t.set(v + strings.Repeat("x", max(0, size-len(v)-1)) + ".")
				held[v] = true
				return v
			}
			first := long(1000)
			w := t.watch()
			if w.value != first {
				t.fail("Watch returned %d bytes, %.60q, the source holds %d, %.60q", len(w.value), w.value, len(first), first)
			}
			for _, size := range []int{0, 1000, 100, 999, 500, 1000} {
				for v := range t.upTo(w, long(size)) {
					if !held[v] {
						t.fail("a value of %d bytes was delivered, %.60q, which the source never held", len(v), v)
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
			tried := false
			for _, v := range blanks {
				if !t.blank(v) {
					continue
				}
				tried = true
				got := t.lull(w)
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
			for range 2 {
				t.remove()
				t.lull(w)
				t.until(w, t.set(t.next()))
			}
		},
	},
	{
		name:  "S-13/delivers nothing while the source is away",
		rule:  "A strategy MUST NOT deliver anything because its source is away: the last good value stays in force.",
		needs: []string{"S-12"},
		check: func(t *trial) {
			before := t.set(t.next())
			w := t.watch()
			t.remove()
			got := t.lull(w)
			back := t.set(t.next())
			for _, v := range append(got, t.until(w, back)...) {
				if v != before && v != back {
					t.fail("%.60q was delivered, between the value before the source went away and the one after", v)
				}
			}
		},
	},
	{
		name:  "S-14/refuses unknown options",
		rule:  "Watch MUST return an error for an option that it does not know.",
		needs: []string{"S-1"},
		check: func(t *trial) {
			t.set(t.next())
			if a := t.failing(1, t.unknownOption())[0]; a.err == nil {
				t.fail("Watch returned a nil error for the option %q", unknownOption)
			}
		},
	},
	{
		name:  "S-15/leaves its options as they are",
		rule:  "The options MUST NOT be changed: they are the caller's.",
		needs: []string{"S-1"},
		check: func(t *trial) {
			t.set(t.next())
			for _, options := range []url.Values{t.Options, t.unknownOption()} {
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
		name:  "S-16/returns an error without a value",
		rule:  "If the source is away, Watch MUST return an error, at the latest when its context ends. It SHOULD do so at once: then the caller learns why.",
		needs: []string{"S-1"},
		check: func(t *trial) {
			tried := false
			for state := range t.absences {
				tried = true
				if a := t.failing(1, t.Options)[0]; a.err == nil {
					t.fail("Watch returned %.60q and a nil error while the source %s", a.value, state)
				}
			}
			if !tried {
				t.skip("the Subject has no Remove, and its Set takes no blank value")
			}
		},
	},
	{
		name:  "S-17/returns an error alone",
		rule:  "With an error, Watch MUST return an empty value and a nil channel.",
		needs: []string{"S-1"},
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
		needs: []string{"S-1"},
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
		name:  "S-19/returns when its context ends",
		rule:  "Watch MUST return soon after its context has ended, also while its source does not answer.",
		needs: []string{"S-1"},
		check: func(t *trial) {
			t.set(t.next())
			ended, cancel := context.WithCancel(t.ctx)
			cancel()
			t.wait("Watch to return, called with a context that had ended")
			t.Strategy.Watch(ended, t.Path, t.Options)
			if t.Stall == nil {
				return
			}
			t.stall()
			returns := func(others string) {
				ctx, cancel := context.WithTimeout(t.ctx, t.Patience/100)
				defer cancel()
				t.wait("Watch to return after its context ended, its source not answering%s", others)
				t.Strategy.Watch(ctx, t.Path, cloneOptions(t.Options))
			}
			returns("")
			go t.Strategy.Watch(t.ctx, t.Path, cloneOptions(t.Options)) // ends with the trial
			t.pause(t.Patience / 1000)
			returns(" and another Watch waiting for it")
		},
	},
	{
		name:  "S-20/closes its channel when its context ends",
		rule:  "The context governs the whole watch: soon after it has ended, the channel MUST be closed.",
		needs: []string{"S-3"},
		check: func(t *trial) {
			for _, unread := range []int{0, 1, 3} {
				t.set(t.next())
				w := t.watch()
				t.setNext(unread)
				w.cancel()
				t.wait("the channel to be closed after its context ended, with %d changes not received", unread)
				t.closed(w)
			}
			ends := func(state string, bringAbout func()) {
				t.set(t.next())
				w := t.watch()
				bringAbout()
				t.lull(w)
				w.cancel()
				t.wait("the channel to be closed after its context ended, its source %s", state)
				t.closed(w)
			}
			if t.Remove != nil {
				ends("being away", t.remove)
			}
			if t.Stall != nil { // last: it is for the rest of the subtest
				ends("not answering", t.stall)
			}
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
		rule:  "A Watch that begins after another has ended MUST work as the first did, with the value that the source holds now.",
		needs: []string{"S-4", "S-20", "S-21"},
		check: func(t *trial) {
			for range 3 {
				v := t.set(t.next())
				w := t.watch()
				if w.value != v {
					t.fail("Watch returned %q, the source holds %q", w.value, v)
				}
				t.until(w, t.set(t.next()))
				w.cancel()
				t.wait("the channel to be closed after its context ended")
				t.closed(w)
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
			for range 3 {
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
		name:  "S-24/ends one watch alone",
		rule:  "The end of one watch MUST NOT end or disturb another.",
		needs: []string{"S-20", "S-23"},
		check: func(t *trial) {
			t.set(t.next())
			// The others can hang on the oldest watch, or on the newest.
			for _, newestFirst := range []bool{false, true} {
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
		},
	},
	{
		name:  "S-25/lets no watch wait for another",
		rule:  "A consumer that does not read MUST NOT keep values from other watches.",
		needs: []string{"S-23"},
		check: func(t *trial) {
			t.set(t.next())
			watches := t.watchAll(3)
			for range 5 {
				t.allUntil(watches[1:2], t.set(t.next()))
			}
		},
	},
	{
		name:  "S-26/leaves nothing running",
		rule:  "When a watch has ended, or Watch failed, it MUST NOT leave anything of its own behind; what watches share MAY stay.",
		needs: []string{"S-20", "S-25"},
		check: func(t *trial) {
			const key, watches = "strategytest", 16
			label := fmt.Sprintf("%p", t) // tells this trial from others in the same process
			round := func() {
				t.set(t.next())
				all := t.watchAll(watches)
				t.allUntil(all[:1], t.set(t.next())) // the others end with a value not received
				t.lull(all[0])
				for _, w := range all {
					w.cancel()
				}
				for range t.absences {
					t.failing(watches, t.Options)
				}
				t.set(t.next())
				t.failing(watches, t.unknownOption())
			}
			count := func() map[string]int { return goroutines(key, label) }
			pprof.Do(t.ctx, pprof.Labels(key, label), func(context.Context) {
				// What watches share is there after the first round and does not grow in the
				// second; of what is each watch's own, the second adds one for each.
				round()
				t.pause(t.Patience / 100)
				before := count()
				round()
				var left string
				for deadline := time.Now().Add(t.Patience); time.Now().Before(deadline); {
					left = ""
					for name, n := range count() {
						if n -= before[name]; n >= watches/2 {
							left = fmt.Sprintf("%d more goroutines that began with %s", n, name)
						}
					}
					if left == "" {
						return
					}
					t.pause(t.Patience / 1000)
				}
				t.fail("after %d more watches and as many failed calls there are %s", watches, left)
			})
		},
	},
}
