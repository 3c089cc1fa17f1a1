package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
)

// An event is something that hotload logged.
type event struct {
	at    time.Time
	msg   string
	attrs map[string]string
}

// events is a slog.Handler that keeps what hotload logs, so that the demonstration can wait
// for it as an operator's tools would, and shows it.
type events struct {
	show  func(line string)
	attrs []slog.Attr // WithAttrs
	*record
}

type record struct {
	mu   sync.Mutex // protects what follows
	list []event
	more chan struct{} // closed and made anew with each event
}

func newEvents(show func(line string)) *events {
	return &events{show: show, record: &record{more: make(chan struct{})}}
}

func (e *events) Enabled(context.Context, slog.Level) bool { return true }

func (e *events) WithGroup(string) slog.Handler { return e }

func (e *events) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &events{show: e.show, attrs: slices.Concat(e.attrs, attrs), record: e.record}
}

func (e *events) Handle(_ context.Context, r slog.Record) error {
	ev := event{at: r.Time, msg: r.Message, attrs: map[string]string{}}
	var line strings.Builder
	line.WriteString(r.Message)
	add := func(a slog.Attr) bool {
		ev.attrs[a.Key] = a.Value.String()
		switch a.Key {
		case "strategy", "driver", "path": // they tell the pool, and there is but one
		default:
			fmt.Fprintf(&line, "  %s=%v", a.Key, a.Value)
		}
		return true
	}
	for _, a := range e.attrs {
		add(a)
	}
	r.Attrs(add)
	e.show(line.String())

	e.mu.Lock()
	defer e.mu.Unlock()
	e.list = append(e.list, ev)
	close(e.more)
	e.more = make(chan struct{})
	return nil
}

// count tells how many events there have been: what wait takes for since.
func (e *events) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.list)
}

// since returns the events after those that n counts.
func (e *events) since(n int) []event {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.list[n:]
}

// generation returns the number of the value in force.
func (e *events) generation() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, ev := range slices.Backward(e.list) {
		if ev.msg == valueAccepted {
			return ev.attrs["generation"]
		}
	}
	return ""
}

// wait returns the first event after those that since counts that has this message and, if key
// is not empty, this attribute.
func (e *events) wait(ctx context.Context, since int, msg, key, value string) (event, error) {
	for {
		e.mu.Lock()
		list, more := e.list[since:], e.more
		e.mu.Unlock()
		for _, ev := range list {
			if ev.msg == msg && (key == "" || ev.attrs[key] == value) {
				return ev, nil
			}
		}
		select {
		case <-more:
		case <-ctx.Done():
			return event{}, fmt.Errorf("waiting for hotload to log %q %s=%s: %w", msg, key, value, context.Cause(ctx))
		}
	}
}

// What hotload logs, as SPEC.md has it.
const (
	valueAccepted     = "hotload: value accepted"
	valueRefused      = "hotload: value refused"
	generationDrained = "hotload: generation drained"
)
