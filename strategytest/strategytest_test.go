package strategytest

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestMinimalStrategy(t *testing.T) {
	Run(t, func(*testing.T) Subject { return newMemory().subject() })
}

const tenth = 400 * time.Millisecond

// TestPermitted holds that the suite passes what SPEC.md permits, advised or not.
func TestPermitted(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		make func(m *memory) watchFunc
	}{
		{"S-9/one superseded value before the newest", func(m *memory) watchFunc {
			return relay(m, func(ctx context.Context, _ string, from <-chan string, to chan<- string) {
				forward(ctx, from, to)
			})
		}},
		{"S-9/takes a tenth of the Patience for each change", func(m *memory) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				ctx, cancel := context.WithCancel(ctx)
				value, all, err := queue(m, func([]string) int { return 0 })(ctx, pth, options)
				if err != nil {
					cancel()
					return "", nil, err
				}
				values := make(chan string)
				go func() {
					defer cancel()
					defer close(values)
					last, next := value, value
					var rest <-chan time.Time
					for {
						from, to := all, values
						if rest != nil {
							from = nil
						}
						if next == last || rest != nil {
							to = nil
						}
						select {
						case v, ok := <-from:
							if !ok {
								return
							}
							next, rest = v, time.After(tenth)
						case to <- next:
							last = next
						case <-rest:
							rest = nil
						case <-ctx.Done():
							return
						}
					}
				}()
				return value, values, nil
			}
		}},
		{"S-16/waits for a value until its context ends", func(m *memory) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, values, err := m.Watch(ctx, pth, options)
				if errors.Is(err, errAway) || errors.Is(err, errBlank) {
					<-ctx.Done()
				}
				return value, values, err
			}
		}},
		{"S-19/gives up a silent source by itself", func(m *memory) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				read, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
				defer cancel()
				value, changed, err := m.first(read, pth, options)
				if err != nil {
					return "", nil, fmt.Errorf("%v", err)
				}
				values := make(chan string)
				go m.deliver(ctx, values, value, changed, m.get)
				return value, values, nil
			}
		}},
		{"S-26/what watches share grows up to a limit", func(m *memory) watchFunc {
			var shared atomic.Int32
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				if shared.Add(1) < 30 {
					go leak(t.Context().Done())
				}
				return m.Watch(ctx, pth, options)
			}
		}},
		{"S-26/goroutines that all watches share stay", func(m *memory) watchFunc {
			var once sync.Once
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				once.Do(func() {
					for range 20 {
						go leak(t.Context().Done())
					}
				})
				return m.Watch(ctx, pth, options)
			}
		}},
		{"S-28/delivers what is in force again when its source is back", func(m *memory) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				wasAway := false
				return with(m, func(ctx context.Context) (string, <-chan struct{}, error) {
					value, changed, err := m.get(ctx)
					if err == nil && wasAway {
						now := make(chan struct{})
						time.AfterFunc(20*time.Millisecond, func() { close(now) })
						changed = now
					}
					wasAway = err == errAway
					return value, changed, err
				})(ctx, pth, options)
			}
		}},
		{"S-28/the same value twice running", func(m *memory) watchFunc {
			return relay(m, func(ctx context.Context, _ string, from <-chan string, to chan<- string) {
				for v := range from {
					for range 2 {
						send(ctx, to, v)
					}
				}
			})
		}},
		{"S-30/values are left out", func(m *memory) watchFunc {
			return with(m, func(ctx context.Context) (string, <-chan struct{}, error) {
				time.Sleep(5 * time.Millisecond)
				return m.get(ctx)
			})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for _, r := range requirements {
				m := newMemory()
				s := m.subject()
				s.Strategy = m.each(tt.make)
				if strings.Contains(tt.name, "a tenth of the Patience") {
					s.Patience = 10 * tenth
				}
				if res := r.try(s); res != (result{}) {
					t.Errorf("%s: want a pass, have %+v", r.fullName(), res)
				}
			}
		})
	}
}

// TestBrokenStrategies tries each broken strategy as Run would, and holds what it makes of each
// requirement. They mostly wait, so all of them run at the same time, whatever -parallel says.
func TestBrokenStrategies(t *testing.T) {
	t.Parallel()
	surprises := make([]chan []string, len(broken))
	for i, b := range broken {
		surprises[i] = make(chan []string, 1)
		go func() { surprises[i] <- tryBroken(b) }()
	}
	for i, b := range broken {
		t.Run(b.name, func(t *testing.T) {
			for _, s := range <-surprises[i] {
				t.Error(s)
			}
		})
	}
}

var counting = make(chan struct{}, 4)

func tryBroken(b brokenStrategy) (surprises []string) {
	surprise := func(format string, args ...any) { surprises = append(surprises, fmt.Sprintf(format, args...)) }
	over := make(chan struct{})
	defer close(over)
	// To count the goroutines of a process in which all leak at the same time takes too long.
	try := func(r *requirement, s Subject) result {
		if r.id() == "S-26" {
			counting <- struct{}{}
			defer func() { <-counting }()
		}
		return r.try(s)
	}
	subject := func(patience time.Duration) Subject {
		m := newMemory()
		s := m.subject()
		s.Strategy = m.each(func(m *memory) watchFunc { return b.make(m, over) })
		s.Patience = patience
		return s
	}
	results := make(outcomes)
	id, when, _ := strings.Cut(b.id, "/")
	for _, r := range requirements {
		res := result{skipped: r.blocked(results)}
		switch {
		case res.skipped != "":
		case r.id() != id || r.when != when:
			if res = try(r, subject(0)); res != (result{}) {
				surprise("%s: want a pass, have %+v", r.fullName(), res)
			}
		default:
			want := regexp.MustCompile("^" + id + ": " + b.seen + "$")
			var seen, rule string
			// On a busy machine a breach can be missed, or so little patience run out before it.
			for patience := 2 * time.Second; patience < time.Minute && !want.MatchString(seen); patience *= 2 {
				res = try(r, subject(patience))
				seen, rule, _ = strings.Cut(res.failed, "\n")
			}
			if !want.MatchString(seen) {
				surprise("%s: want the failure %s\nhave %+v", r.name, want, res)
			} else if want := id + " (SPEC.md): " + r.rule; rule != want {
				surprise("%s: want the rule %q, have %q", r.name, want, rule)
			}
		}
		results.add(r, res)
	}
	return surprises
}

// TestEachRequirementHasABreach keeps the table of broken strategies whole.
func TestEachRequirementHasABreach(t *testing.T) {
	breached := make(map[string]bool)
	for _, b := range broken {
		breached[b.id] = true
	}
	for _, r := range requirements {
		id := r.id()
		if r.when != "" {
			id += "/" + r.when
		}
		if !breached[id] {
			t.Errorf("no broken strategy breaks %s", r.fullName())
		}
	}
}

// TestNeeds holds that a requirement needs only earlier ones: Run tries them in order.
func TestNeeds(t *testing.T) {
	tried := make(map[string]bool)
	for _, r := range requirements {
		for _, id := range r.needs {
			if !tried[id] {
				t.Errorf("%s needs %s, which does not come before it", r.name, id)
			}
		}
		if tried[r.id()] != (r.when != "") {
			t.Errorf("%s: want each ID once, and what only some Subjects can do after it", r.fullName())
		}
		tried[r.id()] = true
	}
}

// TestOptions holds that the suite finds out strategies with options of their own that take others.
func TestOptions(t *testing.T) {
	i := slices.IndexFunc(requirements, func(r *requirement) bool { return r.id() == "S-14" })
	for _, tt := range []struct {
		name    string
		options url.Values
		takes   func(options url.Values) bool
		want    string
	}{
		{"as it should", url.Values{"poll": {"1s"}}, func(o url.Values) bool { return len(o) == 1 && o.Has("poll") }, ""},
		{"one, whatever its name", url.Values{"poll": {"1s"}}, func(o url.Values) bool { return len(o) < 2 },
			`S-14: Watch returned a nil error for the options "strategytest.no-such-option=1", of which no strategy has "strategytest.no-such-option"`},
		{"two, whatever their names", url.Values{"poll": {"1s"}, "ca": {"file"}}, func(o url.Values) bool { return len(o) == 2 },
			`S-14: Watch returned a nil error for the options "`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMemory()
			s := m.subject()
			s.Options = tt.options
			s.Strategy = watchFunc(func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				if !tt.takes(options) {
					return "", nil, errors.New("memory: bad options")
				}
				return m.Watch(ctx, pth, nil)
			})
			if have := requirements[i].try(s); !strings.HasPrefix(have.failed, tt.want) || (have.failed == "") != (tt.want == "") {
				t.Errorf("want %q\nhave %+v", tt.want, have)
			}
		})
	}
}

// TestLeaks holds what is a leak: not what grows once, or twice.
func TestLeaks(t *testing.T) {
	for _, tt := range []struct {
		left  []int // by each round
		leaks bool
	}{
		{[]int{100, 7}, false},
		{[]int{100, 8, 0}, false},
		{[]int{100, 8, 8}, true},
	} {
		t.Run(fmt.Sprint(tt.left), func(t *testing.T) {
			r := &requirement{name: "S-0/", check: func(trial *trial) {
				round := 0
				trial.leaks(8, func() {
					for range tt.left[round] {
						go leak(t.Context().Done())
					}
					round++
					trial.pause(10 * time.Millisecond) // till they have begun
				})
			}}
			if res := r.try(Subject{Patience: 500 * time.Millisecond}); (res.failed != "") != tt.leaks {
				t.Errorf("want a leak: %v, have %+v", tt.leaks, res)
			}
		})
	}
}

// TestSubjectsFault holds what the suite says when it is the Subject that fails or lacks something.
func TestSubjectsFault(t *testing.T) {
	fault := fmt.Errorf("disk full")
	forever := func(string) error { select {} }
	const stalled = "S-19/returns when its context ends/" + whileSilent
	for _, tt := range []struct {
		name string
		id   string
		edit func(*Subject)
		want result
	}{
		{"Set fails", "S-1", func(s *Subject) { s.Set = func(string) error { return fault } },
			result{failed: `S-1: the Subject's Set("host=db1.example dbname=app user=u1"): disk full`}},
		{"Set never returns", "S-1", func(s *Subject) { s.Set = forever },
			result{failed: `S-1: waited 50ms for the Subject's Set("host=db1.example dbname=app user=u1") to return`}},
		{"Remove fails", "S-12", func(s *Subject) { s.Remove = func() error { return fault } },
			result{failed: "S-12: the Subject's Remove: disk full"}},
		{"no Remove", "S-12", func(s *Subject) { s.Remove = nil },
			result{skipped: "the Subject has no Remove"}},
		{"Stall fails", stalled, func(s *Subject) { s.Stall = func() error { return fault } },
			result{failed: "S-19: the Subject's Stall: disk full"}},
		{"no Stall", stalled, func(s *Subject) { s.Stall = nil },
			result{skipped: "the Subject has no Stall"}},
		{"Stall does nothing", stalled, func(s *Subject) { s.Stall = func() error { return nil } },
			result{failed: `S-19: after the Subject's Stall, Watch returned "host=db1.example dbname=app user=u1" and a nil error: ` +
				"the Stall does not stall, or Watch does not ask its source"}},
		{"Stall takes the source away", stalled, func(s *Subject) { s.Stall = s.Remove },
			result{failed: "S-19: the Subject's Stall does not stall: Watch failed after 0s, before its context ended: memory: /memory: " + errAway.Error()}},
		{"no SetOther", "S-31", func(s *Subject) { s.SetOther = nil },
			result{skipped: "the Subject has no SetOther"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newMemory().subject()
			if strings.Contains(tt.want.failed, "50ms") {
				s.Patience = 50 * time.Millisecond
			}
			tt.edit(&s)
			i := slices.IndexFunc(requirements, func(r *requirement) bool { return r.fullName() == tt.id || r.id() == tt.id })
			have := requirements[i].try(s)
			have.failed, _, _ = strings.Cut(have.failed, "\n")
			if have != tt.want {
				t.Errorf("want %+v\nhave %+v", tt.want, have)
			}
		})
	}
}

// TestOutput runs a test that fails in a process of its own, and holds what an author reads.
func TestOutput(t *testing.T) {
	const variable = "STRATEGYTEST_OUTPUT"
	if os.Getenv(variable) != "" {
		Run(t, func(*testing.T) Subject {
			m := newMemory()
			s := m.subject()
			s.Strategy = watchFunc(func(ctx context.Context, pth string, _ url.Values) (string, <-chan string, error) {
				return m.Watch(ctx, pth, nil)
			})
			s.Set = func(v string) error {
				if strings.TrimSpace(v) == "" {
					return errors.ErrUnsupported
				}
				return m.set(v, present)
			}
			s.Remove, s.SetOther = nil, nil
			return s
		})
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestOutput$", "-test.v")
	cmd.Env = append(os.Environ(), variable+"=1")
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Error("want a failed test, it passed")
	}
	for _, want := range []string{
		"--- PASS: TestOutput/S-1/returns_the_value_of_its_source",
		"--- FAIL: TestOutput/S-14/refuses_unknown_options",
		`S-14: Watch returned a nil error for the options "strategytest.no-such-option=1", of which no strategy has "strategytest.no-such-option"`,
		"S-14 (SPEC.md): Watch MUST return an error for an option that it does not know.",
		"--- SKIP: TestOutput/S-11/delivers_no_blank_value",
		"the Subject's Set takes no blank value",
		"--- SKIP: TestOutput/S-13/delivers_nothing_while_the_source_is_away",
		"not tried: needs S-12, which was skipped",
		"--- PASS: TestOutput/S-26/leaves_nothing_running",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("want %q in the output", want)
		}
	}
	if n := strings.Count(string(out), "--- FAIL"); n != 2 { // the subtest and its parent
		t.Errorf("want one failed subtest, have %d lines of FAIL", n)
	}
	if t.Failed() {
		t.Logf("%s", out)
	}
}

// TestLeavesNothing holds that the suite's own goroutines end, those of a check that was given up too.
func TestLeavesNothing(t *testing.T) {
	const key = "strategytest.self"
	m := newMemory()
	stuck := m.subject()
	stuck.Patience = 50 * time.Millisecond
	stuck.Strategy = relay(m, func(ctx context.Context, _ string, _ <-chan string, _ chan<- string) { <-ctx.Done() })
	pprof.Do(t.Context(), pprof.Labels(key, "1"), func(context.Context) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			for _, r := range requirements {
				r.try(newMemory().subject())
			}
			for _, r := range requirements[3:10] {
				r.try(stuck)
			}
		}()
		<-done
		var left map[string]int
		for range 1000 {
			left = goroutines(key, "1")
			if len(left) <= 1 { // this one
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("the suite left %v", left)
	})
}

// TestSpecification holds that the suite tests the MUSTs of SPEC.md, each under the name and with the
// rule that it has there.
func TestSpecification(t *testing.T) {
	text, err := os.ReadFile("../SPEC.md")
	if err != nil {
		t.Fatal(err)
	}
	var want, have []string
	for _, row := range regexp.MustCompile(`(?m)^\| (S-\d+) \| (.*) \| .* \| (.*) \|$`).FindAllStringSubmatch(string(text), -1) {
		if strings.Contains(row[2], "MUST") {
			want = append(want, row[1]+"/"+row[3]+": "+strings.ReplaceAll(row[2], "`", ""))
		}
	}
	for _, r := range requirements {
		if r.when == "" {
			have = append(have, r.name+": "+r.rule)
		}
	}
	slices.Sort(want)
	slices.Sort(have)
	for i := range max(len(want), len(have)) {
		if i >= len(want) || i >= len(have) || want[i] != have[i] {
			t.Fatalf("want %q\nhave %q", want[min(i, len(want)):], have[min(i, len(have)):])
		}
	}
}
