// Package store is a strategy for a store that announces changes: "store://postgres/orders/dsn".
package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"time"
)

// A Client is how such a store is asked. It may be closed when every sql.DB that uses it is closed.
type Client interface {
	// Get returns what key holds, or "", and the revision of the whole store.
	Get(ctx context.Context, key string) (value string, revision int64, err error)
	// Next waits for the first change of key after that revision, and returns what it holds then.
	Next(ctx context.Context, key string, revision int64) (value string, at int64, err error)
}

type Strategy struct{ Client Client }

func (s Strategy) Watch(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
	if len(options) > 0 {
		return "", nil, fmt.Errorf("store: %s: there are options, want none", pth)
	}
	value, revision, err := s.Client.Get(ctx, pth)
	if value, err = usable(value, err); err != nil {
		return "", nil, fmt.Errorf("store: %s: %v", pth, err) // %v and not %w: S-32
	}
	newest, values := make(chan string), make(chan string)
	go s.read(ctx, pth, revision, newest)
	go deliver(value, newest, values)
	return value, values, nil
}

// read sends what key comes to hold after that revision, until ctx ends.
func (s Strategy) read(ctx context.Context, key string, revision int64, newest chan<- string) {
	defer close(newest)
	const soon, rarely = 100 * time.Millisecond, time.Minute
	log, away := slog.With("strategy", "store", "path", key), ""
	for pause := soon; ctx.Err() == nil; {
		value, at, err := s.Client.Next(ctx, key, revision)
		if err != nil { // the server is down, or has forgotten the revision: begin afresh
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			value, at, err = s.Client.Get(ctx, key)
			pause = min(2*pause, rarely)
		}
		if err == nil {
			pause, revision = soon, at
		}
		switch value, err = usable(value, err); {
		case err == nil:
			newest <- value // deliver receives it at once
			if away != "" {
				log.Info("store: the key is back")
			}
			away = ""
		case ctx.Err() == nil && err.Error() != away:
			away = err.Error()
			log.Warn("store: no value, going on with the last one", "error", away)
		}
	}
}

// usable removes white space and a byte order mark, and makes an error of a value that is empty then.
func usable(value string, err error) (string, error) {
	if value = strings.TrimSpace(strings.TrimPrefix(value, "\ufeff")); err == nil && value == "" {
		err = errors.New("there is no value, want a connection string")
	}
	return value, err
}

// deliver sends the newest value if it is not the last one sent, until newest is closed.
func deliver(last string, newest <-chan string, values chan<- string) {
	defer close(values)
	for next, rest := last, (<-chan time.Time)(nil); ; {
		out := values
		if next == last || rest != nil {
			out = nil // nothing to send, or too soon
		}
		select {
		case v, ok := <-newest:
			if !ok {
				return
			}
			next = v
		case out <- next:
			last, rest = next, time.After(200*time.Millisecond)
		case <-rest:
			rest = nil
		}
	}
}
