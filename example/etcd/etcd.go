package etcd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"strings"
	"time"

	"github.com/infobloxopen/hotload"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	patience  = 5 * time.Second       // for an answer
	firstWait = 50 * time.Millisecond // before etcd is asked again; doubles
	lastWait  = 15 * time.Second      // with each failure, up to this
)

var errNoAnswer = fmt.Errorf("no answer within %v, want a cluster with a leader at the client's endpoints", patience)

// Strategy follows keys of etcd. It implements [hotload.Strategy]. New makes one; the zero
// Strategy does not work.
type Strategy struct {
	client *clientv3.Client
	kv     clientv3.KV
	// Each watch has a Watcher, and so a stream, of its own. Why not the client's, whose stream all
	// share? A stream keeps the token that it began with, and etcd refuses a watch that begins
	// on it when that has expired. And nothing that was begun there ends while the server is away.
	newWatcher func() clientv3.Watcher
	quiet      time.Duration // without an event, until the key is read again
}

var _ hotload.Strategy = (*Strategy)(nil)

// New returns a strategy that asks client, which remains the caller's to close.
func New(client *clientv3.Client) *Strategy {
	return &Strategy{
		client:     client,
		kv:         clientv3.NewKV(client),
		newWatcher: func() clientv3.Watcher { return clientv3.NewWatcher(client) },
		quiet:      time.Minute,
	}
}

// Watch returns the value that the key pth holds now, and a channel of those that it holds later,
// until ctx ends or the client is closed.
func (s *Strategy) Watch(ctx context.Context, pth string, options url.Values) (value string, _ <-chan string, err error) {
	for name := range options {
		return "", nil, fmt.Errorf("hotload: etcd: unknown option %q, want none", name)
	}
	if len(pth) < 2 {
		return "", nil, fmt.Errorf("hotload: etcd: the path is %q, want a key, as in etcd://postgres/services/orders/dsn", pth)
	}
	w := &watch{Strategy: s, key: pth, wait: firstWait, found: make(chan string)}
	if err := cmp.Or(w.read(ctx), w.away); err != nil {
		return "", nil, fmt.Errorf("hotload: etcd: %q: %w", pth, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.client.Ctx(), cancel)
	first, values := w.value, make(chan string)
	go func() {
		defer cancel()
		defer stop()
		w.run(ctx)
	}()
	go deliver(ctx, first, w.found, values)
	return first, values, nil
}

// A watch is one call of Strategy.Watch. Only one goroutine uses it: first that of Watch, then that
// of run.
type watch struct {
	*Strategy
	key   string
	found chan string // what deliver is to deliver

	revision int64  // of the store, at which the key held
	value    string // this; or nothing,
	away     error  // which is what this says

	problem string        // logged last
	wait    time.Duration // after the next failure
}

// run follows the key until ctx ends.
func (w *watch) run(ctx context.Context) {
	for ctx.Err() == nil {
		err := w.follow(ctx)
		for err != nil && w.pause(ctx, err) {
			if err = w.read(ctx); err == nil {
				w.tell(ctx)
			}
		}
	}
}

// follow tells what is announced after w.revision, so that nothing is lost between the read and
// the events. It returns when that cannot go on: the key is to be read again.
func (w *watch) follow(ctx context.Context) error {
	watching, cancel := context.WithCancelCause(clientv3.WithRequireLeader(ctx))
	defer cancel(nil)
	begin := time.AfterFunc(patience, func() { cancel(errNoAnswer) })
	defer begin.Stop()
	watcher := w.newWatcher()
	defer watcher.Close()
	responses := watcher.Watch(watching, w.key, clientv3.WithRev(w.revision+1), clientv3.WithCreatedNotify())
	for {
		select {
		case <-watching.Done():
			return context.Cause(watching)
		case resp, ok := <-responses:
			if err := cmp.Or(resp.Err(), context.Cause(watching)); err != nil {
				return err
			} else if !ok {
				return errors.New("etcd ended the watch")
			}
			begin.Stop() // the first response says that the watch has begun
			w.wait = firstWait
			for _, e := range resp.Events {
				if e.Kv.ModRevision <= w.revision {
					continue // a read below has overtaken it, and may have told something newer
				}
				w.learn(e.Kv.ModRevision, e.Type == clientv3.EventTypePut, e.Kv.Value)
				w.tell(ctx)
			}
		case <-time.After(w.quiet/2 + rand.N(w.quiet)):
			before := w.revision
			if err := w.read(ctx); err != nil {
				return err
			} else if w.revision < before {
				// No event would come until the store had got to where this watch began.
				return errors.New("the store's revision went back, as after a restore from a backup")
			}
			w.tell(ctx)
		}
		w.report(w.away)
	}
}

// read learns what the key holds, from a linearizable get: all that had been put before it began,
// or something newer.
func (w *watch) read(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errNoAnswer)
	defer cancel()
	resp, err := w.kv.Get(ctx, w.key)
	switch {
	case err == nil && len(resp.Kvs) == 0:
		w.learn(resp.Header.Revision, false, nil)
	case err == nil:
		w.learn(resp.Header.Revision, true, resp.Kvs[0].Value)
	case w.client.Ctx().Err() != nil:
		return errors.New("the client is closed, want it open until the pools are closed")
	}
	return cmp.Or(context.Cause(ctx), err)
}

func (w *watch) learn(revision int64, exists bool, value []byte) {
	w.revision, w.value, w.away = revision, strings.TrimSpace(string(value)), nil
	if !exists {
		w.away = errors.New("the key does not exist, want it to hold a connection string")
	} else if w.value == "" {
		w.away = errors.New("the key is blank, want it to hold a connection string")
	}
}

// tell passes a value on. That the key is away changes nothing but the log.
func (w *watch) tell(ctx context.Context) {
	if w.away == nil {
		select {
		case w.found <- w.value:
		case <-ctx.Done():
		}
	}
}

// pause lets pass the time after a failure, which grows until a watch has begun. It is random,
// because the pools of a fleet all fail at the same moment. It returns false if ctx has ended.
func (w *watch) pause(ctx context.Context, failure error) bool {
	if ctx.Err() != nil {
		return false
	}
	w.report(failure)
	wait := w.wait/2 + rand.N(w.wait/2)
	w.wait = min(2*w.wait, lastWait)
	select {
	case <-time.After(wait):
		return true
	case <-ctx.Done():
		return false
	}
}

// report logs what is wrong, or nil if nothing is, when that changes.
func (w *watch) report(problem error) {
	text := ""
	if problem != nil {
		text = problem.Error()
	}
	switch {
	case text == w.problem:
	case problem == nil:
		slog.Info("hotload: key usable again", "strategy", "etcd", "path", w.key)
	default:
		slog.Warn("hotload: key unusable, keeping the last value", "strategy", "etcd", "path", w.key, "error", text)
	}
	w.problem = text
}

// deliver sends the newest value that was found, unless the consumer has it. It has a goroutine of
// its own, so that a consumer that takes its time holds up no reading, and gets no superseded value.
func deliver(ctx context.Context, has string, found <-chan string, values chan<- string) {
	defer close(values)
	for newest := has; ; {
		out := values
		if newest == has {
			out = nil
		}
		select {
		case newest = <-found:
		case out <- newest:
			has = newest
		case <-ctx.Done():
			return
		}
	}
}
