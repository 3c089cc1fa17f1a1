package hotload_test

import (
	"context"
	"expvar"
	"log/slog"
	"os"
)

// Metrics of each pool, by the path of its data source name.
var (
	generation = expvar.NewMap("hotload_generation") // the one in force
	changed    = expvar.NewMap("hotload_changed")    // when it came into force, in Unix seconds
	refused    = expvar.NewMap("hotload_refused")    // how many values were refused
	killed     = expvar.NewMap("hotload_killed")     // how many connections forceKill ended
)

// metricsHandler is a slog.Handler that counts hotload's events and hands on every record.
type metricsHandler struct {
	slog.Handler
	path string
}

// Enabled lets the events come, whatever the other handler lets pass.
func (h metricsHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo || h.Handler.Enabled(ctx, level)
}

// WithAttrs gets the attributes that say which pool it is.
func (h metricsHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	for _, a := range attrs {
		if a.Key == "path" {
			h.path = a.Value.String()
		}
	}
	h.Handler = h.Handler.WithAttrs(attrs)
	return h
}

func (h metricsHandler) WithGroup(name string) slog.Handler {
	h.Handler = h.Handler.WithGroup(name)
	return h
}

func (h metricsHandler) Handle(ctx context.Context, r slog.Record) error {
	switch r.Message {
	case "hotload: value accepted":
		set(generation, h.path, number(r, "generation"))
		set(changed, h.path, r.Time.Unix())
	case "hotload: value refused":
		refused.Add(h.path, 1)
	case "hotload: connections killed":
		killed.Add(h.path, number(r, "killed"))
	}
	if !h.Handler.Enabled(ctx, r.Level) {
		return nil
	}
	return h.Handler.Handle(ctx, r)
}

func set(m *expvar.Map, key string, n int64) {
	v := new(expvar.Int)
	v.Set(n)
	m.Set(key, v)
}

func number(r slog.Record, key string) (n int64) {
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == key {
			n = a.Value.Int64()
		}
		return a.Key != key
	})
	return n
}

// hotload's log lines become metrics: here the standard library's, which net/http serves at
// /debug/vars. Do not wrap slog.Default().Handler(): that one and slog.SetDefault call each other for ever.
func Example_metrics() {
	slog.SetDefault(slog.New(metricsHandler{Handler: slog.NewTextHandler(os.Stderr, nil)}))
}
