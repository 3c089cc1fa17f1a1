package strategytest

import (
	"context"
	"database/sql/driver"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
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
	id   string // of the requirement that it breaks, with a slash and the when of the part
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
		`waited \d+s for "host=db2\.example dbname=app user=u2" to be delivered, the source's last value; meanwhile nothing came`,
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
		`waited \d+s for "host=db2\.example dbname=app user=u2" to be delivered, the source's last value; meanwhile 1 came, the last one "aG9zdD1kYjIuZXhhbXBsZSBkYm5hbWU9YXBwIHVz", of 48 bytes`,
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
		`waited \d+s for "host=db\d+\.example dbname=app user=u\d+" to be delivered, which the source was given while Watch ran; Watch returned "host=db\d+\.example dbname=app user=u\d+"; meanwhile nothing came`,
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
		`waited \d+s for "host=db1\.example dbname=app user=u1" to be delivered, the source's last value; meanwhile nothing came`,
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
		`waited \d+s for "host=db2\.example dbname=app user=u2" to be delivered after "host=db1\.example dbname=app user=u1": the source went back to it while nobody read; meanwhile nothing came`,
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
		`after 5 changes that nobody received, 4 superseded values came before the newest`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return queue(m, func([]string) int { return 0 })
		},
	},
	{
		"gives its channel room for a hundred values", "S-9",
		`after 5 changes that nobody received, \d superseded values came before the newest`,
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
		`what was delivered its source never held: it has 512 bytes, and from byte 512 on it is ""; what was held has 1000 bytes, and there "[b-f]{20}"`,
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
		`what was delivered its source never held: it has 512 bytes, and from byte 512 on it is ""; what was held has 1000 bytes, and there "[b-f]{20}"`,
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
		`waited \d+s for "host=.*" to be delivered, the source's last value; meanwhile nothing came`,
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
		`"" was delivered as the source is away or came back; the last value that it had held was "host=.*"`,
		func(m *memory, _ <-chan struct{}) watchFunc { return emptyAfter(m, errAway) },
	},
	{
		"takes any option", "S-14",
		`Watch returned a nil error for the options "strategytest\.no-such-option=1", of which no strategy has "strategytest\.no-such-option"`,
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
		"ignores its context in the first read", "S-19/" + whileSilent,
		`waited \d+s for Watch to return after its context ended, its source not answering`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, values, err := m.Watch(ctx, pth, options)
				if errors.Is(err, context.Canceled) {
					<-over
				}
				return value, values, err
			}
		},
	},
	{
		"holds a lock while it reads", "S-19/" + whileSilent,
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
		"waits for its source to be back, whatever its context", "S-20/" + whileAway,
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
		"reads with a context of its own", "S-20/" + whileSilent,
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
		`Watch returned an old value, "host=db\d\.example dbname=app user=u\d": the source holds "host=db\d\.example dbname=app user=u\d"`,
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
		`waited \d+s for "host=db\d\.example dbname=app user=u\d" to be delivered by 1 of the watches in progress; meanwhile nothing came`,
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
		`after watches and failed calls that have ended there are \d+ more goroutines that began with \S+strategytest\.leak, as there were after those before`,
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
		`after watches and failed calls that have ended there are \d+ more goroutines that began with \S+strategytest\.leak, as there were after those before`,
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
		`after watches and failed calls that have ended there are \d+ more goroutines that began with \S+strategytest\.\S*relay\S+, as there were after those before`,
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
	{
		"delivers ten values", "S-4",
		`waited \d+s for "host=.*" to be delivered, the source's last value; meanwhile nothing came`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return relay(m, func(ctx context.Context, _ string, from <-chan string, to chan<- string) {
				for range 10 {
					if v, ok := <-from; !ok || !send(ctx, to, v) {
						return
					}
				}
				<-ctx.Done()
			})
		},
	},
	{
		"drops a value that is not received in time", "S-4",
		`waited \d+s for "host=.*" to be delivered, the source's last value; meanwhile nothing came`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return relay(m, func(ctx context.Context, _ string, from <-chan string, to chan<- string) {
				for v := range from {
					select {
					case to <- v:
					case <-time.After(150 * time.Millisecond):
					case <-ctx.Done():
						return
					}
				}
			})
		},
	},
	{
		"compares with its first value when its source is back", "S-7/" + whileAway,
		`waited \d+s for "host=db1\.example dbname=app user=u1" to be delivered, the source's last value; meanwhile nothing came`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				wasAway := false
				return with(m, func(ctx context.Context) (string, <-chan struct{}, error) {
					value, changed, err := m.get(ctx)
					if err == nil && wasAway && value == m.oldest() {
						err = errAway
					}
					wasAway = err == errAway
					return value, changed, err
				})(ctx, pth, options)
			}
		},
	},
	{
		"tears down what a new watch has joined", "S-22",
		`the channel was closed before its context ended`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			var mu sync.Mutex
			var alive []context.CancelFunc
			n := 0
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				own, cancel := context.WithCancel(ctx)
				value, values, err := m.Watch(own, pth, options)
				if err != nil {
					cancel()
					return "", nil, err
				}
				mu.Lock()
				defer mu.Unlock()
				n++
				alive = append(alive, cancel)
				context.AfterFunc(ctx, func() {
					mu.Lock()
					defer mu.Unlock()
					if n--; n > 0 {
						return
					}
					mu.Unlock()
					time.Sleep(time.Millisecond) // says goodbye
					mu.Lock()
					for _, end := range alive {
						end()
					}
					alive = nil
				})
				return value, values, nil
			}
		},
	},
	{
		"delivers what it heard before it read", "S-8",
		`"host=db\d+\.example dbname=app user=u\d+" was delivered after "host=db\d+\.example dbname=app user=u\d+", which the source held later`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				m.mu.Lock()
				from := len(m.held)
				m.mu.Unlock()
				time.Sleep(5 * time.Millisecond)
				m.mu.Lock()
				heard := slices.Clone(m.held[from:])
				m.mu.Unlock()
				return relay(m, func(ctx context.Context, first string, from <-chan string, to chan<- string) {
					if len(heard) > 1 && heard[0] != first && !send(ctx, to, heard[0]) {
						return
					}
					forward(ctx, from, to)
				})(ctx, pth, options)
			}
		},
	},
	{
		"stops when its value is written again", "S-4",
		`waited \d+s for "host=.*" to be delivered, the source's last value; meanwhile nothing came`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return stopsIf(m, func(last, value string, wasAway bool) bool { return value == last && !wasAway })
		},
	},
	{
		"stops when its source is back with the value that it had", "S-12",
		`waited \d+s for "host=.*" to be delivered, the source's last value; meanwhile nothing came`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return stopsIf(m, func(last, value string, wasAway bool) bool { return value == last && wasAway })
		},
	},
	{
		"compares the beginnings of values", "S-4",
		`waited \d+s for "host=.* y" to be delivered, the source's last value; meanwhile nothing came`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return relay(m, func(ctx context.Context, last string, from <-chan string, to chan<- string) {
				for v := range from {
					if n := min(len(v), len(last), 36); v[:n] != last[:n] && !send(ctx, to, v) {
						return
					}
					last = v
				}
			})
		},
	},
	{
		"collapses blanks", "S-10",
		`Watch returned what its source never held: it has \d+ bytes, and from byte \d+ on it is "!\\"#.*; what was held has 1000 bytes, and there " !\\"#.*`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return edited(m, func(v string) string { return strings.Join(strings.Fields(v), " ") })
		},
	},
	{
		"strips quotes", "S-10",
		`Watch returned what its source never held: it has 998 bytes, and from byte 0 on it is "host=.*; what was held has 1000 bytes, and there "\\"host=.*`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return edited(m, func(v string) string { return strings.Trim(v, "\"'") })
		},
	},
	{
		"expands variables", "S-10",
		`Watch returned what its source never held: .*; what was held has 1000 bytes, and there "\$.*`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return edited(m, func(v string) string { return os.Expand(v, func(string) string { return "/root" }) })
		},
	},
	{
		"joins the halves of two reads", "S-10",
		`what was delivered its source never held: it has 1000 bytes, and from byte 500 on it is "b+"; what was held has 1000 bytes, and there "a+"`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return relay(m, func(ctx context.Context, last string, from <-chan string, to chan<- string) {
				for v := range from {
					if n := 500; len(last) > n && len(v) > n && !send(ctx, to, last[:n]+v[n:]) || !send(ctx, to, v) {
						return
					}
					last = v
				}
			})
		},
	},
	{
		"gives up a source that is away for long", "S-12",
		`waited \d+s for "host=.*" to be delivered, the source's last value; meanwhile nothing came`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return with(m, func(ctx context.Context) (string, <-chan struct{}, error) {
				value, changed, err := m.get(ctx)
				if err == errAway {
					select {
					case <-changed:
						return m.get(ctx)
					case <-ctx.Done():
					case <-time.After(100 * time.Millisecond):
					}
					changed = nil
				}
				return value, changed, err
			})
		},
	},
	{
		"goes back to an old value when its key is deleted", "S-13",
		`"host=db1\.example dbname=app user=u1" was delivered as the source is away or came back; the last value that it had held was "host=db\d\.example dbname=app user=u\d"`,
		func(m *memory, _ <-chan struct{}) watchFunc { return olderAfter(m, errAway) },
	},
	{
		"goes back to an old value when its key is blank", "S-13",
		`"host=db1\.example dbname=app user=u1" was delivered as the source holds "" or came back; the last value that it had held was "host=db\d\.example dbname=app user=u\d"`,
		func(m *memory, _ <-chan struct{}) watchFunc { return olderAfter(m, errBlank) },
	},
	{
		"replays from the start when its source is back", "S-13",
		`"host=db1\.example dbname=app user=u1" was delivered as the source is away or came back; the last value that it had held was "host=db\d\.example dbname=app user=u\d"`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				wasAway := false
				return with(m, func(ctx context.Context) (string, <-chan struct{}, error) {
					value, changed, err := m.get(ctx)
					if err == nil && wasAway {
						now := make(chan struct{})
						time.AfterFunc(20*time.Millisecond, func() { close(now) })
						value, changed = m.oldest(), now
					}
					wasAway = err == errAway
					return value, changed, err
				})(ctx, pth, options)
			}
		},
	},
	{
		"takes an unknown option without a value", "S-14",
		`Watch returned a nil error for the options "strategytest\.no-such-option=", of which no strategy has "strategytest\.no-such-option"`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				maps.DeleteFunc(options, func(_ string, values []string) bool { return values[0] == "" })
				return m.Watch(ctx, pth, options)
			}
		},
	},
	{
		"takes hotload's options, however they are spelt", "S-14",
		`Watch returned a nil error for the options "forcekill=1", of which no strategy has "forcekill"`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				options = maps.Clone(options)
				maps.DeleteFunc(options, func(name string, _ []string) bool { return strings.EqualFold(name, "forceKill") })
				return m.Watch(ctx, pth, options)
			}
		},
	},
	{
		"serves its last good value while its source is away", "S-16",
		`Watch returned "host=.*" and a nil error while the source holds "", and another watch was in progress`,
		func(m *memory, _ <-chan struct{}) watchFunc { return cached(m, true) },
	},
	{
		"serves the last good value of watches that have ended", "S-16",
		`Watch returned "host=.*" and a nil error while the source (holds ".*"|is away), after another watch`,
		func(m *memory, _ <-chan struct{}) watchFunc { return cached(m, false) },
	},
	{
		"hangs when its context has ended already", "S-19",
		`waited \d+s for Watch to return, called with a context that had ended`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				if ctx.Err() != nil {
					<-over
				}
				return m.Watch(ctx, pth, options)
			}
		},
	},
	{
		"heeds a deadline only", "S-19/" + whileSilent,
		`waited \d+s for Watch to return after its context ended, its source not answering`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				read, cancel := context.WithCancel(context.WithoutCancel(ctx))
				if deadline, ok := ctx.Deadline(); ok {
					read, cancel = context.WithDeadline(read, deadline)
				}
				go func() { <-over; cancel() }()
				value, changed, err := m.first(read, pth, options)
				if err != nil {
					return "", nil, err
				}
				values := make(chan string)
				go m.deliver(ctx, values, value, changed, m.get)
				return value, values, nil
			}
		},
	},
	{
		"keeps its channel open when its context had ended before", "S-20",
		`waited \d+s for the channel to be closed, its context having ended before or while Watch ran`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, values, err := m.Watch(ctx, pth, options)
				if ctx.Err() != nil && err == nil {
					values = make(chan string)
				}
				return value, values, err
			}
		},
	},
	{
		"remembers that it failed", "S-22",
		`Watch failed while its source holds a value: memory: .*`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			var mu sync.Mutex
			var failed error
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				value, values, err := m.Watch(ctx, pth, options)
				mu.Lock()
				defer mu.Unlock()
				if failed == nil && (errors.Is(err, errAway) || errors.Is(err, errBlank)) {
					failed = err
				}
				if failed != nil {
					return "", nil, failed
				}
				return value, values, err
			}
		},
	},
	{
		"lets one watch go on when its source is back", "S-23/" + whileAway,
		`waited \d+s for "host=.*" to be delivered by 8 of the watches in progress; meanwhile nothing came`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			turn := make(chan struct{}, 1)
			return with(m, func(ctx context.Context) (string, <-chan struct{}, error) {
				value, changed, err := m.get(ctx)
				if err != errAway {
					return value, changed, err
				}
				select {
				case turn <- struct{}{}:
				default:
					return "", nil, err
				}
				defer func() { <-turn }()
				select {
				case <-changed:
				case <-ctx.Done():
				}
				return m.get(ctx)
			})
		},
	},
	{
		"ends all watches when a call fails", "S-24",
		`a channel was closed before its context ended`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return endOnFailure(m, func(err error) bool { return !errors.Is(err, errAway) && !errors.Is(err, errBlank) })
		},
	},
	{
		"ends all watches when a call finds no value", "S-24/" + whileAway,
		`a channel was closed before its context ended`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			return endOnFailure(m, func(err error) bool { return errors.Is(err, errAway) })
		},
	},
	{
		"reads once for all, with the context of the first", "S-24/" + whileSilent,
		`a call of Watch failed when the context of another one ended: memory: /memory: no answer: context canceled`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			type read struct {
				done    chan struct{}
				value   string
				changed <-chan struct{}
				err     error
			}
			var mu sync.Mutex
			var inProgress *read
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				if len(options) > 0 {
					return m.Watch(ctx, pth, options)
				}
				mu.Lock()
				r := inProgress
				if r == nil {
					r = &read{done: make(chan struct{})}
					inProgress = r
					mu.Unlock()
					r.value, r.changed, r.err = m.first(ctx, pth, options)
					mu.Lock()
					inProgress = nil
					close(r.done)
				}
				mu.Unlock()
				select {
				case <-r.done:
				case <-ctx.Done():
					return "", nil, ctx.Err()
				}
				if r.err != nil {
					return "", nil, r.err
				}
				values := make(chan string)
				go m.deliver(ctx, values, r.value, r.changed, m.get)
				return r.value, values, nil
			}
		},
	},
	{
		"holds a lock while a value waits to be received", "S-25",
		`waited \d+s for Watch to return`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			var mu sync.RWMutex
			watches := 0
			delivers := relay(m, func(ctx context.Context, _ string, from <-chan string, to chan<- string) {
				for v := range from {
					mu.RLock()
					sent := send(ctx, to, v)
					mu.RUnlock()
					if !sent {
						return
					}
				}
			})
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				mu.Lock()
				watches++
				mu.Unlock()
				return delivers(ctx, pth, options)
			}
		},
	},
	{
		"leaks a goroutine with each value", "S-26",
		`after watches and failed calls that have ended there are \d+ more goroutines that began with \S+strategytest\.leak, as there were after those before`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return relay(m, func(ctx context.Context, _ string, from <-chan string, to chan<- string) {
				for v := range from {
					if !send(ctx, to, v) {
						return
					}
					go leak(over)
				}
			})
		},
	},
	{
		"leaks a goroutine when its context has ended already", "S-26",
		`after watches and failed calls that have ended there are \d+ more goroutines that began with \S+strategytest\.leak, as there were after those before`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				if ctx.Err() != nil {
					go leak(over)
				}
				return m.Watch(ctx, pth, options)
			}
		},
	},
	{
		"leaks a goroutine with each outage", "S-26/" + whileAway,
		`after watches and failed calls that have ended there are \d+ more goroutines that began with \S+strategytest\.leak, as there were after those before`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return with(m, func(ctx context.Context) (string, <-chan struct{}, error) {
				value, changed, err := m.get(ctx)
				if err == errAway {
					go leak(over)
				}
				return value, changed, err
			})
		},
	},
	{
		"leaks a goroutine when its context ends during back-off", "S-26/" + whileAway,
		`after watches and failed calls that have ended there are \d+ more goroutines that began with \S+strategytest\.leak, as there were after those before`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return with(m, func(ctx context.Context) (string, <-chan struct{}, error) {
				value, changed, err := m.get(ctx)
				if err == errAway {
					select {
					case <-changed:
						return m.get(ctx)
					case <-ctx.Done():
						go leak(over)
					}
				}
				return value, changed, err
			})
		},
	},
	{
		"leaves its read behind", "S-26/" + whileSilent,
		`after 16 more watches and as many calls, ended while the source did not answer, there are \d+ more goroutines that began with \S+`,
		func(m *memory, over <-chan struct{}) watchFunc {
			return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
				own, cancel := context.WithCancel(context.WithoutCancel(ctx))
				go func() {
					select {
					case <-over:
						cancel()
					case <-own.Done():
					}
				}()
				read := make(chan error, 1)
				go func() {
					defer cancel()
					_, _, err := m.first(own, pth, options)
					read <- err
				}()
				select {
				case err := <-read:
					if err != nil {
						return "", nil, err
					}
				case <-ctx.Done():
					return "", nil, fmt.Errorf("memory: %s: no answer: %w", pth, ctx.Err())
				}
				return m.Watch(ctx, pth, options)
			}
		},
	},
	{
		"watches one path", "S-31",
		`Watch returned "host=db1\.example dbname=app user=u1" for the path "/memory\.old", where the source holds "host=db2\.example dbname=app user=u2"`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			if m.path != "/memory" {
				m = m.other
			}
			return m.Watch
		},
	},
	{
		"watches all paths that begin with its own", "S-31",
		`"host=.*" was delivered for the path "/memory": it is the value at "/memory\.old"`,
		func(m *memory, _ <-chan struct{}) watchFunc {
			if m.path != "/memory" {
				return m.Watch
			}
			return relay(m, func(ctx context.Context, _ string, from <-chan string, to chan<- string) {
				_, changed, _ := m.other.get(ctx)
				for {
					var v string
					var ok bool
					select {
					case v, ok = <-from:
					case <-changed:
						var err error
						v, changed, err = m.other.get(ctx)
						ok = err == nil
					}
					if !ok || !send(ctx, to, v) {
						return
					}
				}
			})
		},
	},
	{
		"fails with driver.ErrBadConn", "S-32",
		`an error of Watch matches driver\.ErrBadConn: memory: .*: driver: bad connection`,
		func(m *memory, _ <-chan struct{}) watchFunc { return failWith(m, driver.ErrBadConn) },
	},
	{
		"fails with the error of a context of its own", "S-32",
		`an error of Watch, whose own context had not ended, matches context\.DeadlineExceeded: memory: .*: context deadline exceeded`,
		func(m *memory, _ <-chan struct{}) watchFunc { return failWith(m, context.DeadlineExceeded) },
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

// edited is a memory that edits each value.
func edited(m *memory, edit func(string) string) watchFunc {
	return relay(m, func(ctx context.Context, _ string, from <-chan string, to chan<- string) {
		for v := range from {
			if !send(ctx, to, edit(v)) {
				return
			}
		}
	}, func(first *string) { *first = edit(*first) })
}

// failWith is a memory whose errors about a source that is away wrap err.
func failWith(m *memory, err error) watchFunc {
	return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
		value, values, failed := m.Watch(ctx, pth, options)
		if errors.Is(failed, errAway) || errors.Is(failed, errBlank) {
			failed = fmt.Errorf("%w: %w", failed, err)
		}
		return value, values, failed
	}
}

// endOnFailure is a memory that ends all its watches when a call fails with such an error.
func endOnFailure(m *memory, such func(error) bool) watchFunc {
	var mu sync.Mutex
	var all []context.CancelFunc
	return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
		ctx, cancel := context.WithCancel(ctx)
		value, values, err := m.Watch(ctx, pth, options)
		mu.Lock()
		defer mu.Unlock()
		if all = append(all, cancel); err != nil && such(err) {
			for _, end := range all {
				end()
			}
		}
		return value, values, err
	}
}

// cached is a memory that hands out its last good value while its source is away, as long as a watch
// is in progress or only when none is.
func cached(m *memory, inProgress bool) watchFunc {
	var mu sync.Mutex
	var last string
	var watches int
	return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
		value, changed, err := m.first(ctx, pth, options)
		mu.Lock()
		defer mu.Unlock()
		if (errors.Is(err, errAway) || errors.Is(err, errBlank)) && last != "" && (watches > 0) == inProgress {
			value = last
			_, changed, _ = m.get(ctx)
		} else if err != nil {
			return "", nil, err
		}
		last = value
		watches++
		context.AfterFunc(ctx, func() {
			mu.Lock()
			defer mu.Unlock()
			watches--
		})
		values := make(chan string)
		go m.deliver(ctx, values, value, changed, m.get)
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

// stopsIf is a memory whose watches stop to look for changes after such a read.
func stopsIf(m *memory, such func(last, value string, wasAway bool) bool) watchFunc {
	return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
		last, wasAway := "", false
		return with(m, func(ctx context.Context) (string, <-chan struct{}, error) {
			value, changed, err := m.get(ctx)
			if err == nil && such(last, value, wasAway) {
				changed = nil
			}
			if wasAway = err == errAway; err == nil {
				last = value
			}
			return value, changed, err
		})(ctx, pth, options)
	}
}

// olderAfter is a memory that delivers the first of its values when it reads that error.
func olderAfter(m *memory, absence error) watchFunc {
	return with(m, func(ctx context.Context) (string, <-chan struct{}, error) {
		value, changed, err := m.get(ctx)
		if err == absence {
			return m.oldest(), changed, nil
		}
		return value, changed, err
	})
}

// oldest returns the first of the values that were not blank.
func (m *memory) oldest() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.held[slices.IndexFunc(m.held, func(v string) bool { return strings.TrimSpace(v) != "" })]
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
