package strategytest

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
)

// A memory is the least strategy that the suite passes: a variable that can be watched, and its
// own source.
type memory struct {
	path  string
	other *memory // at the other path

	mu      sync.Mutex
	value   string
	state   memoryState
	changed chan struct{} // closed and replaced at each change
	held    []string      // every value so far, for the strategies that queue them
}

type memoryState int

const (
	away memoryState = iota
	present
	silent
)

var (
	errAway  = errors.New("nothing there, want a connection string")
	errBlank = errors.New("an empty value, want a connection string")
)

func newMemory() *memory {
	m := &memory{path: "/memory", changed: make(chan struct{})}
	m.other = &memory{path: "/memory.old", other: m, changed: make(chan struct{})}
	return m
}

// each is a strategy that watches each of the two paths with what make makes of the memory there.
func (m *memory) each(make func(m *memory) watchFunc) watchFunc {
	watch := map[string]watchFunc{m.path: make(m), m.other.path: make(m.other)}
	return func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
		return watch[pth](ctx, pth, options)
	}
}

func (m *memory) Watch(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
	value, changed, err := m.first(ctx, pth, options)
	if err != nil {
		return "", nil, err
	}
	values := make(chan string)
	go m.deliver(ctx, values, value, changed, m.get)
	return value, values, nil
}

func (m *memory) first(ctx context.Context, pth string, options url.Values) (string, <-chan struct{}, error) {
	for name := range options {
		return "", nil, fmt.Errorf("memory: unknown option %q, there are none", name)
	}
	value, changed, err := m.get(ctx)
	if err != nil {
		return "", nil, fmt.Errorf("memory: %s: %w", pth, err)
	}
	return value, changed, nil
}

// deliver offers the newest value as long as it is not last, which the consumer has.
func (m *memory) deliver(ctx context.Context, values chan<- string, last string, changed <-chan struct{}, get getFunc) {
	defer close(values)
	next := last
	for {
		out := values
		if next == last {
			out = nil
		}
		select {
		case <-ctx.Done():
			return
		case out <- next:
			last = next
		case <-changed:
			var v string
			var err error
			if v, changed, err = get(ctx); err == nil {
				next = v
			}
		}
	}
}

type getFunc func(ctx context.Context) (value string, changed <-chan struct{}, err error)

// get returns the value, and a channel that is closed when it has changed.
func (m *memory) get(ctx context.Context) (string, <-chan struct{}, error) {
	m.mu.Lock()
	value, state, changed := m.value, m.state, m.changed
	m.mu.Unlock()
	switch {
	case state == silent:
		<-ctx.Done()
		return "", changed, fmt.Errorf("no answer: %w", context.Cause(ctx))
	case state == away:
		return "", changed, errAway
	case strings.TrimSpace(value) == "":
		return "", changed, errBlank
	}
	return value, changed, nil
}

func (m *memory) set(value string, state memoryState) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.value, m.state = value, state
	m.held = append(m.held, value)
	close(m.changed)
	m.changed = make(chan struct{})
	return nil
}

func (m *memory) subject() Subject {
	return Subject{
		Strategy: m.each(func(m *memory) watchFunc { return m.Watch }),
		Path:     m.path,
		Set:      func(v string) error { return m.set(v, present) },
		Remove:   func() error { return m.set("", away) },
		Stall:    func() error { return m.set("", silent) },

		OtherPath: m.other.path,
		SetOther:  func(v string) error { return m.other.set(v, present) },
	}
}
