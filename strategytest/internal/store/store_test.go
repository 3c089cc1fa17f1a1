package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/infobloxopen/hotload/strategytest"
	"github.com/infobloxopen/hotload/strategytest/internal/store"
)

// TestStrategy runs the suite for each way in which such a store can fail.
func TestStrategy(t *testing.T) {
	for _, tt := range []struct {
		name        string
		set, remove func(s *server, key, value string)
	}{
		{"key deleted", (*server).put, func(s *server, key, _ string) { s.put(key, "") }},
		{"server down", func(s *server, key, value string) { s.put(key, value); s.turn(up) },
			func(s *server, _, _ string) { s.turn(down) }},
		{"compaction", func(s *server, key, value string) { s.put(key, value); s.compact() },
			func(s *server, key, _ string) { s.put(key, ""); s.compact() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			strategytest.Run(t, func(t *testing.T) strategytest.Subject {
				s := newServer()
				const key, other = "/orders/dsn", "/orders/dsn.old"
				return strategytest.Subject{
					Strategy:  store.Strategy{Client: s},
					Path:      key,
					OtherPath: other,
					Set:       func(value string) error { tt.set(s, key, value); return nil },
					SetOther:  func(value string) error { tt.set(s, other, value); return nil },
					Remove:    func() error { tt.remove(s, key, ""); return nil },
					Stall:     func() error { s.turn(silent); return nil },
				}
			})
		})
	}
}

// TestAdvised holds what SPEC.md advises but the suite does not test.
func TestAdvised(t *testing.T) {
	t.Run("S-35/leaves time between deliveries", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := newServer()
			s.put("k", "0")
			values, end := watch(t, s, "k")
			defer end()
			go func() {
				for i := range 100 {
					s.put("k", fmt.Sprint(i+1))
					time.Sleep(20 * time.Millisecond)
				}
			}()
			began, last := time.Now(), time.Now()
			for n, v := 0, ""; v != "100"; n++ {
				v = <-values
				if n == 0 && time.Since(began) > 10*time.Millisecond {
					t.Errorf("want the first change at once, it took %v", time.Since(began))
				}
				if n > 0 && time.Since(last) < 200*time.Millisecond {
					t.Errorf("%q was delivered %v after the value before, want 200ms or more", v, time.Since(last))
				}
				last = time.Now()
			}
		})
	})
	t.Run("S-36/logs what becomes of its source", func(t *testing.T) {
		var out bytes.Buffer
		logger := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{
			ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
				if a.Key == slog.TimeKey {
					return slog.Attr{}
				}
				return a
			},
		}))
		before := slog.Default()
		slog.SetDefault(logger)
		defer slog.SetDefault(before)
		synctest.Test(t, func(t *testing.T) {
			s := newServer()
			s.put("/k", "one")
			values, end := watch(t, s, "/k")
			defer end()
			s.turn(down)
			time.Sleep(time.Hour)
			s.turn(up)
			s.put("/k", "two")
			<-values
			s.put("/k", "")
			time.Sleep(time.Hour)
			s.put("/k", "three")
			<-values
			synctest.Wait()
		})
		const want = `level=WARN msg="store: no value, going on with the last one" strategy=store path=/k error="connection refused"
level=INFO msg="store: the key is back" strategy=store path=/k
level=WARN msg="store: no value, going on with the last one" strategy=store path=/k error="there is no value, want a connection string"
level=INFO msg="store: the key is back" strategy=store path=/k
`
		if out.String() != want {
			t.Errorf("logged\nwant %s\nhave %s", want, out.String())
		}
	})
}

// watch begins a watch, and returns what ends it and waits for that.
func watch(t *testing.T, s *server, key string) (values <-chan string, end func()) {
	ctx, cancel := context.WithCancel(t.Context())
	_, values, err := store.Strategy{Client: s}.Watch(ctx, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	return values, func() {
		cancel()
		for range values {
		}
	}
}

// TestSpecification holds that the worked strategy of SPEC.md is this one, without its head.
func TestSpecification(t *testing.T) {
	source, err := os.ReadFile("store.go")
	if err != nil {
		t.Fatal(err)
	}
	spec, err := os.ReadFile("../../../SPEC.md")
	if err != nil {
		t.Fatal(err)
	}
	_, body, found := strings.Cut(string(source), "\n)\n\n")
	if !found || !strings.Contains(string(spec), "```go\n"+body+"```\n") {
		t.Error("store.go is not in SPEC.md, or differs from what is there")
	}
}

// A server is a store with revisions, and its own client.
type server struct {
	mu        sync.Mutex
	state     state
	revision  int64
	compacted int64 // changes up to this revision are forgotten
	changes   []change
	moved     chan struct{} // closed and replaced when something happens
}

type change struct {
	at         int64
	key, value string
}

type state int

const (
	up state = iota
	down
	silent
)

func newServer() *server { return &server{moved: make(chan struct{})} }

func (s *server) do(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.moved)
	s.moved = make(chan struct{})
}

func (s *server) put(key, value string) {
	s.do(func() {
		s.revision++
		s.changes = append(s.changes, change{s.revision, key, value})
	})
}

func (s *server) compact()     { s.do(func() { s.compacted = s.revision }) }
func (s *server) turn(x state) { s.do(func() { s.state = x }) }

func (s *server) Get(ctx context.Context, key string) (value string, revision int64, err error) {
	if err := s.ask(ctx); err != nil {
		return "", 0, err
	}
	defer s.mu.Unlock()
	for _, c := range s.changes {
		if c.key == key {
			value = c.value
		}
	}
	return value, s.revision, nil
}

func (s *server) Next(ctx context.Context, key string, revision int64) (string, int64, error) {
	for {
		err := s.ask(ctx)
		if err != nil {
			return "", 0, err
		}
		moved := s.moved
		for _, c := range s.changes {
			if c.key == key && c.at > revision {
				if c.at <= s.compacted {
					err = errors.New("the revision has been compacted")
				}
				s.mu.Unlock()
				return c.value, c.at, err
			}
		}
		s.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return "", 0, ctx.Err()
		}
	}
}

// ask takes a millisecond, and leaves the server locked unless it fails.
func (s *server) ask(ctx context.Context) error {
	time.Sleep(time.Millisecond)
	s.mu.Lock()
	if s.state == up && ctx.Err() == nil {
		return nil
	}
	defer s.mu.Unlock()
	if s.state == silent {
		s.mu.Unlock()
		<-ctx.Done()
		s.mu.Lock()
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.New("connection refused")
}
