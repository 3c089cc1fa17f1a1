package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
)

// events is a slog.Handler that keeps what hotload logs, so that the demonstration can wait
// for it as an operator's tools would, and shows it.
type events struct {
	show  func(line string)
	attrs []slog.Attr // WithAttrs
	*record
}

type record struct {
	mu   sync.Mutex    // protects what follows
	list []string      // of messages
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
	var line strings.Builder
	line.WriteString(r.Message)
	add := func(a slog.Attr) bool {
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
	e.list = append(e.list, r.Message)
	close(e.more)
	e.more = make(chan struct{})
	return nil
}

// since returns the messages after the first n.
func (e *events) since(n int) []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.list[n:]
}

// wait waits for a message after the first n.
func (e *events) wait(ctx context.Context, n int, msg string) error {
	for {
		e.mu.Lock()
		list, more := e.list[n:], e.more
		e.mu.Unlock()
		if slices.Contains(list, msg) {
			return nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return fmt.Errorf("waiting for hotload to log %q: %w", msg, context.Cause(ctx))
		}
	}
}

// What hotload logs, as SPEC.md has it.
const (
	valueAccepted     = "hotload: value accepted"
	valueRefused      = "hotload: value refused"
	generationDrained = "hotload: generation drained"
)
