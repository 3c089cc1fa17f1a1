package strategytest

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// watchFunc is a strategy that is broken in one way; the rest it mostly leaves to a memory.
type watchFunc func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error)

func (f watchFunc) Watch(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
	return f(ctx, pth, options)
}

// A brokenStrategy breaks one requirement: no other fails, save those that cannot be tried without
// it, which are skipped.
type brokenStrategy struct {
	name string
	id   string // of the requirement that it breaks
	seen string // a regular expression for the first line of the failure, after the ID
	// make breaks a memory; calls and goroutines that would last for ever end with over.
	make func(m *memory, over <-chan struct{}) watchFunc
}

var broken = []brokenStrategy{
	{
		"delivers the first value before it returns", "S-1",
		`waited \d+s for Watch to return`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, values, err := m.Watch(ctx, pth, options)
				first := make(chan string)
				select {
				case first <- value:
				case <-over:
				}
				return value, values, err
			}
		},
	},
	{
		"returns before it has the first value", "S-1",
		`Watch returned "", the source holds "host=db1\.example dbname=app user=u1"`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return relay(m, func(ctx context.Context, first string, from <-chan string, to chan<- string) {
				if send(ctx, to, first) {
					forward(ctx, from, to)
				}
			}, func(value *string) { *value = "" })
		},
	},
	{
		"returns a nil channel", "S-2",
		`Watch returned a nil channel and a nil error`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, _, err := m.Watch(ctx, pth, options)
				return value, nil, err
			}
		},
	},
	{
		"closes its channel after one delivery", "S-3",
		`the channel was closed, though its context lives and its source can be read`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return relay(m, func(ctx context.Context, _ string, from <-chan string, to chan<- string) {
				if v, ok := <-from; ok {
					send(ctx, to, v)
				}
			})
		},
	},
	{
		"drops the last value", "S-4",
		`waited \d+s for "host=db2\.example dbname=app user=u2" to be delivered, the source's last value; delivered meanwhile: nothing`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return relay(m, func(ctx context.Context, _ string, from <-chan string, to chan<- string) {
				for v := range from { // held back until the next one comes
					next, ok := <-from
					if !ok || !send(ctx, to, v) || !send(ctx, to, next) {
						return
					}
				}
			})
		},
	},
	{
		"delivers later values as its source encodes them", "S-4",
		`waited \d+s for "host=db2\.example dbname=app user=u2" to be delivered, the source's last value; delivered meanwhile: 1, the last of 48 bytes, "aG9zdD1kYjIuZXhhbXBsZSBkYm5hbWU9YXBwIHVz"`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return relay(m, func(ctx context.Context, _ string, from <-chan string, to chan<- string) {
				for v := range from {
					if !send(ctx, to, base64.StdEncoding.EncodeToString([]byte(v))) {
						return
					}
				}
			})
		},
	},
	{
		"sends the first value as well", "S-5",
		`"host=db1\.example dbname=app user=u1" was delivered, which Watch had returned`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return relay(m, func(ctx context.Context, first string, from <-chan string, to chan<- string) {
				if send(ctx, to, first) {
					forward(ctx, from, to)
				}
			})
		},
	},
	{
		"reads first and looks for changes later", "S-6",
		`waited \d+s for "host=db\d+\.example dbname=app user=u\d+" to be delivered, the source's last value; delivered meanwhile: nothing`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, _, err := m.first(ctx, pth, options)
				if err != nil {
					return "", nil, err
				}
				time.Sleep(5 * time.Millisecond)
				last, changed, err := m.get(ctx)
				if err != nil {
					return "", nil, err
				}
				values := make(chan string)
				go m.deliver(ctx, values, last, changed, m.get)
				return value, values, nil
			}
		},
	},
	{
		"delivers no value a second time", "S-7",
		`waited \d+s for "host=db1\.example dbname=app user=u1" to be delivered, the source's last value; delivered meanwhile: nothing`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return relay(m, func(ctx context.Context, first string, from <-chan string, to chan<- string) {
				had := map[string]bool{first: true}
				for v := range from {
					if !had[v] && !send(ctx, to, v) {
						return
					}
					had[v] = true
				}
			})
		},
	},
	{
		"compares with what it delivered last, whatever waits", "S-7",
		`waited \d+s for "host=db2\.example dbname=app user=u2" to be delivered after "host=db1\.example dbname=app user=u1": the source went back to it while nobody read; delivered meanwhile: nothing`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return relay(m, func(_ context.Context, delivered string, from <-chan string, to chan<- string) {
				var next string
				var out chan<- string
				for {
					select {
					case v, ok := <-from:
						if !ok {
							return
						}
						if v != delivered {
							next, out = v, to
						}
					case out <- next:
						delivered, out = next, nil
					}
				}
			})
		},
	},
	{
		"delivers what waits in the wrong order", "S-8",
		`"host=db\d+\.example dbname=app user=u\d+" was delivered after "host=db\d+\.example dbname=app user=u\d+", which the source held later`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return queue(m, func(waiting []string) int { return len(waiting) - 1 })
		},
	},
	{
		"blocks on a slow consumer and then delivers stale values", "S-9",
		`after 20 changes that nobody received, 19 superseded values came before the newest`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return queue(m, func([]string) int { return 0 })
		},
	},
	{
		"gives its channel room for a hundred values", "S-9",
		`after 20 changes that nobody received, \d+ superseded values came before the newest`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, from, err := m.Watch(ctx, pth, options)
				if err != nil {
					return "", nil, err
				}
				to := make(chan string, 100)
				go func() {
					defer close(to)
					for v := range from {
						to <- v
						time.Sleep(100 * time.Microsecond) // the source announces quick changes at once
					}
				}()
				return value, to, nil
			}
		},
	},
	{
		"delivers a value as it is being read", "S-10",
		`a value of 512 bytes was delivered, "host=.*, which the source never held`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return relay(m, func(ctx context.Context, _ string, from <-chan string, to chan<- string) {
				for v := range from {
					if len(v) > 512 && !send(ctx, to, v[:512]) || !send(ctx, to, v) {
						return
					}
				}
			})
		},
	},
	{
		"cuts values off", "S-10",
		`a value of 512 bytes was delivered, "host=.*, which the source never held`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return relay(m, func(ctx context.Context, _ string, from <-chan string, to chan<- string) {
				for v := range from {
					if !send(ctx, to, v[:min(len(v), 512)]) {
						return
					}
				}
			})
		},
	},
	{
		"delivers an empty value", "S-11",
		`"" was delivered`,
		func(m *memory, _ <-chan struct{}) watchFunc { return emptyAfter(m, errBlank) },
	},
	{
		"takes the first absence for the end", "S-12",
		`waited \d+s for "host=db2\.example dbname=app user=u2" to be delivered, the source's last value; delivered meanwhile: nothing`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return with(m, func(ctx context.Context) (string, <-chan struct{}, error) {
				value, changed, err := m.get(ctx)
				if err == errAway {
					changed = nil
				}
				return value, changed, err
			})
		},
	},
	{
		"delivers an empty value when its source goes away", "S-13",
		`"" was delivered, between the value before the source went away and the one after`,
		func(m *memory, _ <-chan struct{}) watchFunc { return emptyAfter(m, errAway) },
	},
	{
		"takes any option", "S-14",
		`Watch returned a nil error for the option "strategytest\.no-such-option"`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, _ url.Values) (string, <-chan string, error) {
				return m.Watch(ctx, pth, nil)
			}
		},
	},
	{
		"takes the options that it reads out of the map", "S-15",
		`Watch was passed the options "strategytest\.no-such-option=1" and left ""`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				all := maps.Clone(options)
				clear(options)
				return m.Watch(ctx, pth, all)
			}
		},
	},
	{
		"fails the first read silently", "S-16",
		`Watch returned "" and a nil error while the source holds ""`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, values, err := m.Watch(ctx, pth, options)
				if errors.Is(err, errAway) || errors.Is(err, errBlank) {
					none := make(chan string)
					close(none)
					return "", none, nil
				}
				return value, values, err
			}
		},
	},
	{
		"returns a channel with its error", "S-17",
		`the error "memory: .*" came with the value "" and a channel that is not nil`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, values, err := m.Watch(ctx, pth, options)
				if err != nil {
					values = make(chan string)
				}
				return value, values, err
			}
		},
	},
	{
		"returns a default value with its error", "S-17",
		`the error "memory: .*" came with the value "host=localhost" and a channel that is nil`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, values, err := m.Watch(ctx, pth, options)
				if err != nil {
					value = "host=localhost"
				}
				return value, values, err
			}
		},
	},
	{
		"quotes the value in its error", "S-18",
		`the error of Watch quotes the value "kq7xwzr3vj9plm2tnyb8gdhs", or a part of it: after "kq7xwzr3vj9plm2tnyb8gdhs": memory: .*`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return quote(m, func(value string) string { return value })
		},
	},
	{
		"quotes the end of the value in its error", "S-18",
		`the error of Watch quotes the value "kq7xwzr3vj9plm2tnyb8gdhs", or a part of it: after "yb8gdhs": memory: .*`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return quote(m, func(value string) string { return value[max(0, len(value)-7):] })
		},
	},
	{
		"ignores its context in the first read", "S-19",
		`waited \d+s for Watch to return after its context ended, its source not answering`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, values, err := m.Watch(ctx, pth, options)
				if errors.Is(err, context.DeadlineExceeded) {
					<-over
				}
				return value, values, err
			}
		},
	},
	{
		"holds a lock while it reads", "S-19",
		`waited \d+s for Watch to return after its context ended, its source not answering and another Watch waiting for it`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			var mu sync.Mutex
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				mu.Lock()
				defer mu.Unlock()
				return m.Watch(ctx, pth, options)
			}
		},
	},
	{
		"never closes its channel", "S-20",
		`waited \d+s for the channel to be closed after its context ended, with 0 changes not received`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, values, err := m.Watch(ctx, pth, options)
				if err != nil {
					return "", nil, err
				}
				open := make(chan string)
				go forward(ctx, values, open)
				return value, open, nil
			}
		},
	},
	{
		"ignores its context after the first read", "S-20",
		`waited \d+s for the channel to be closed after its context ended, with 0 changes not received`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				if _, _, err := m.get(ctx); err != nil {
					return "", nil, err
				}
				ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
				go func() { <-over; cancel() }()
				return m.Watch(ctx, pth, options)
			}
		},
	},
	{
		"waits for its source to be back, whatever its context", "S-20",
		`waited \d+s for the channel to be closed after its context ended, its source being away`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return with(m, func(ctx context.Context) (string, <-chan struct{}, error) {
				value, changed, err := m.get(ctx)
				if err == errAway {
					select {
					case <-changed:
					case <-over:
					}
				}
				return value, changed, err
			})
		},
	},
	{
		"reads with a context of its own", "S-20",
		`waited \d+s for the channel to be closed after its context ended, its source not answering`,
		func(m *memory, over <-chan struct{}) watchFunc {
			own, cancel := context.WithCancel(context.Background())
			go func() { <-over; cancel() }()
			return with(m, func(context.Context) (string, <-chan struct{}, error) { return m.get(own) })
		},
	},
	{
		"shares one channel between its watches", "S-21",
		`two watches that are both alive were given one channel`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			var mu sync.Mutex
			var users int
			var shared <-chan string
			var end context.CancelFunc
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, _, err := m.first(ctx, pth, options)
				if err != nil {
					return "", nil, err
				}
				mu.Lock()
				defer mu.Unlock()
				if users == 0 {
					var own context.Context
					own, end = context.WithCancel(context.WithoutCancel(ctx))
					if _, shared, err = m.Watch(own, pth, options); err != nil {
						return "", nil, err
					}
				}
				users++
				context.AfterFunc(ctx, func() {
					mu.Lock()
					defer mu.Unlock()
					if users--; users == 0 {
						end()
					}
				})
				return value, shared, nil
			}
		},
	},
	{
		"remembers what it once read", "S-22",
		`Watch returned "host=db1\.example dbname=app user=u1", the source holds "host=db3\.example dbname=app user=u3"`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			var first string
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, _, err := m.first(ctx, pth, options)
				if err != nil {
					return "", nil, err
				}
				m.mu.Lock()
				defer m.mu.Unlock()
				if first == "" {
					first = value
				}
				values, now := make(chan string), make(chan struct{})
				close(now)
				go m.deliver(ctx, values, first, now, m.get)
				return first, values, nil
			}
		},
	},
	{
		"has one watch at a time", "S-23",
		`a channel was closed before its context ended`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			var mu sync.Mutex
			last := func() {}
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				mu.Lock()
				last()
				ctx, last = context.WithCancel(ctx)
				mu.Unlock()
				return m.Watch(ctx, pth, options)
			}
		},
	},
	{
		"returns what a watch in progress last read", "S-23",
		`with 8 watches in progress Watch returned "host=db1\.example dbname=app user=u1", the source holds "host=db2\.example dbname=app user=u2"`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			var mu sync.Mutex
			var last string
			var watches []context.Context
			get := func(ctx context.Context) (string, <-chan struct{}, error) {
				value, changed, err := m.get(ctx)
				time.Sleep(5 * time.Millisecond)
				if err == nil {
					mu.Lock()
					defer mu.Unlock()
					last = value
				}
				return value, changed, err
			}
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, _, err := m.first(ctx, pth, options)
				if err != nil {
					return "", nil, err
				}
				mu.Lock()
				defer mu.Unlock()
				watches = slices.DeleteFunc(watches, func(w context.Context) bool { return w.Err() != nil })
				if len(watches) == 0 {
					last = value
				}
				watches = append(watches, ctx)
				values, now := make(chan string), make(chan struct{})
				close(now)
				go m.deliver(ctx, values, last, now, get)
				return last, values, nil
			}
		},
	},
	{
		"ends newer watches with an older one", "S-24",
		`a channel was closed before its context ended`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return bind(m, func(older, newer peer) { context.AfterFunc(older.ctx, newer.cancel) })
		},
	},
	{
		"ends older watches with a newer one", "S-24",
		`a channel was closed before its context ended`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return bind(m, func(older, newer peer) { context.AfterFunc(newer.ctx, older.cancel) })
		},
	},
	{
		"keeps all watches waiting for a slow one", "S-25",
		`waited \d+s for "host=db\d\.example dbname=app user=u\d" to be delivered by 1 of the watches in progress; delivered meanwhile: nothing`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			turn := make(chan struct{}, 1)
			return relay(m, func(ctx context.Context, _ string, from <-chan string, to chan<- string) {
				for v := range from {
					select {
					case turn <- struct{}{}:
					case <-ctx.Done():
						return
					}
					sent := send(ctx, to, v)
					<-turn
					if !sent {
						return
					}
				}
			})
		},
	},
	{
		"leaks a goroutine", "S-26",
		`after 16 more watches and as many failed calls there are 16 more goroutines that began with \S+strategytest\.leak`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, values, err := m.Watch(ctx, pth, options)
				if err == nil {
					go leak(over)
				}
				return value, values, err
			}
		},
	},
	{
		"leaks a goroutine when it fails", "S-26",
		`after 16 more watches and as many failed calls there are \d+ more goroutines that began with \S+strategytest\.leak`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, values, err := m.Watch(ctx, pth, options)
				if err != nil {
					go leak(over)
				}
				return value, values, err
			}
		},
	},
	{
		"ends only after its last value was received", "S-26",
		`after 16 more watches and as many failed calls there are \d+ more goroutines that began with \S+strategytest\.\S*relay\S+`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return relay(m, func(_ context.Context, _ string, from <-chan string, to chan<- string) {
				for v := range from {
					select {
					case to <- v:
					case <-over:
						return
					}
				}
			})
		},
	},
}

// relay puts f between a memory and its consumer; edit, if any, changes the first value.
func relay(m *memory, f func(ctx context.Context, first string, from <-chan string, to chan<- string), edit ...func(*string)) watchFunc {
	return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
		ctx, cancel := context.WithCancel(ctx)
		value, from, err := m.Watch(ctx, pth, options)
		if err != nil {
			cancel()
			return "", nil, err
		}
		to := make(chan string)
		go func() {
			defer cancel()
			defer close(to)
			f(ctx, value, from, to)
		}()
		returned := value
		for _, e := range edit {
			e(&returned)
		}
		return returned, to, nil
	}
}

func forward(ctx context.Context, from <-chan string, to chan<- string) {
	for v := range from {
		if !send(ctx, to, v) {
			return
		}
	}
}

func send(ctx context.Context, to chan<- string, v string) bool {
	select {
	case to <- v:
		return true
	case <-ctx.Done():
		return false
	}
}

// quote is a memory whose errors quote what part makes of the last value that it returned.
func quote(m *memory, part func(value string) string) watchFunc {
	var last string
	return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
		value, values, err := m.Watch(ctx, pth, options)
		m.mu.Lock()
		defer m.mu.Unlock()
		if err != nil {
			return "", nil, fmt.Errorf("after %q: %w", part(last), err)
		}
		last = value
		return value, values, nil
	}
}

// A peer is a watch among others.
type peer struct {
	ctx    context.Context
	cancel context.CancelFunc
}

// bind is a memory that applies f to each new watch and each in progress.
func bind(m *memory, f func(older, newer peer)) watchFunc {
	var mu sync.Mutex
	var peers []peer
	return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
		ctx, cancel := context.WithCancel(ctx)
		mu.Lock()
		peers = slices.DeleteFunc(peers, func(p peer) bool { return p.ctx.Err() != nil })
		newer := peer{ctx, cancel}
		for _, older := range peers {
			f(older, newer)
		}
		peers = append(peers, newer)
		mu.Unlock()
		return m.Watch(ctx, pth, options)
	}
}

// with is a memory that, after its first read, reads with get.
func with(m *memory, get getFunc) watchFunc {
	return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
		value, changed, err := m.first(ctx, pth, options)
		if err != nil {
			return "", nil, err
		}
		values := make(chan string)
		go m.deliver(ctx, values, value, changed, get)
		return value, values, nil
	}
}

// emptyAfter is a memory that delivers an empty value when it reads that error.
func emptyAfter(m *memory, absence error) watchFunc {
	return with(m, func(ctx context.Context) (string, <-chan struct{}, error) {
		value, changed, err := m.get(ctx)
		if err == absence {
			return "", changed, nil
		}
		return value, changed, err
	})
}

// queue is a memory that keeps every value until it is received, the one at index pick first.
func queue(m *memory, pick func(waiting []string) int) watchFunc {
	return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
		m.mu.Lock()
		seen := len(m.held)
		m.mu.Unlock()
		value, _, err := m.first(ctx, pth, options)
		if err != nil {
			return "", nil, err
		}
		values := make(chan string)
		go func() {
			defer close(values)
			var waiting []string
			for {
				m.mu.Lock()
				for _, v := range m.held[seen:] {
					if strings.TrimSpace(v) != "" {
						waiting = append(waiting, v)
					}
				}
				seen = len(m.held)
				changed := m.changed
				m.mu.Unlock()
				var out chan<- string
				var next string
				i := 0
				if len(waiting) > 0 {
					i = pick(waiting)
					out, next = values, waiting[i]
				}
				select {
				case <-ctx.Done():
					return
				case out <- next:
					waiting = slices.Delete(waiting, i, i+1)
				case <-changed:
				}
			}
		}()
		return value, values, nil
	}
}

func leak(over <-chan struct{}) { <-over }
