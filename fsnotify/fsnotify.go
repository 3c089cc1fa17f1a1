// Package fsnotify is hotload's file strategy: the connection string is the
// content of a file, and a change of the file is a new connection string.
// Importing the package registers it under the name "fsnotify":
//
//	import (
//		"database/sql"
//
//		"github.com/infobloxopen/hotload"
//		_ "github.com/infobloxopen/hotload/fsnotify"
//		"github.com/lib/pq"
//	)
//
//	func init() { hotload.Register("postgres", pq.Driver{}) }
//
//	func main() {
//		db, err := sql.Open("hotload", "fsnotify://postgres/tmp/myconfig.txt")
//		...
//	}
//
// The path is absolute, and may lead through symbolic links. On Windows
// /C:/dir/file means C:\dir\file.
//
// # Content
//
// A value is the whole of a regular file of at most 1 MiB in UTF-8, without NUL
// bytes, less a byte order mark and surrounding white space. What is empty, too
// large, unreadable, away, or in UTF-16 or UTF-32 is never delivered: the last value
// stays, and the file is read again until it is good. At the first read such a file
// is the error of Watch; later it is logged, with the reason, and so is its return.
// Content that is equal but for white space is no change.
//
// # Changes
//
// What is put in place by rename from the same directory, be it the file or a
// symbolic link to it as in Kubernetes' Secret and ConfigMap volumes, is taken to be
// whole, and delivered at once. So is, at the first read, a file that was modified
// more than a minute ago. Any other file may still be being written: it is delivered
// when two readings 25 ms apart were equal and no write was announced between them, and
// after a second in any case, as it then is. What the file's times say plays no part in that.
//
// So a writer that pauses for longer in the middle of a value, that takes longer
// than a second, or that goes on writing to a file just renamed into place, can be
// caught half-way. It is better to write a new file beside the old one, and to
// rename it over the old one when it is complete.
//
// A consumer that does not read holds nothing up, and gets the newest value
// when it does.
//
// Changes are noticed through the operating system's notifications: of the
// file, of its directory and of the directory of every symbolic link on the way
// to it. What they do not announce (a bind mount, most network file systems, a
// renamed grandparent directory) is found by looking at the file every now and then:
// it is read again if its size, its times or the file itself is another, and once a
// minute in any case. Where there are no notifications everything is found so, by reading.
// That is logged, and notifications are tried again.
//
// # Mounted files
//
// A single file that is mounted into a container (docker run -v file:file, a
// Kubernetes subPath) stays what it was when the file outside is replaced: nobody can
// follow that from inside. It shows in the file's link count, which is 0 then, and is
// logged once. Mount the file's directory, or the whole volume.
//
// # Many files
//
// However many files are watched, there is one [fsnotify.Watcher] in the
// process (on Linux: one inotify instance), and none when no watch is left. The
// watches of one path share their reading. A file system that hangs holds up
// only the files on it; others may have to be polled meanwhile. Where two paths
// lead to one file or directory by way of hard links or bind mounts, notifications
// may come for one of them only.
//
// # Options
//
// Options follow the path, as in fsnotify://postgres/tmp/myconfig.txt?poll=30s.
//
//	poll  how long at most until the file is looked at without a notification:
//	      a duration with its unit, at least 10ms; 3s by default
//
// Any other option is an error.
//
// [fsnotify.Watcher]: https://pkg.go.dev/github.com/fsnotify/fsnotify#Watcher
package fsnotify

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	upstream "github.com/fsnotify/fsnotify"
	"github.com/infobloxopen/hotload"
)

const (
	defaultPoll = 3 * time.Second
	minPoll     = 10 * time.Millisecond
	quietTime   = 25 * time.Millisecond // how long a file must stay as it is to be taken for whole,
	maxWait     = time.Second           // and how long that is waited for
	longAgo     = time.Minute           // a file modified before is whole at the first reading
	fileTick    = 2 * time.Second       // of the file times that tick most slowly
	maxRest     = time.Minute           // how long a file is only looked at, and not read
	maxSize     = 1 << 20
)

func init() { hotload.RegisterStrategy("fsnotify", NewStrategy()) }

// Strategy watches files. It implements [hotload.Strategy]. NewStrategy makes
// one; the zero Strategy does not work.
type Strategy struct{ hub *hub }

// process is the hub of every Strategy: inotify instances are few.
var process = newHub(upstream.NewWatcher)

// NewStrategy returns the file strategy, to be registered under another name
// or used without hotload. All of them share one watcher.
func NewStrategy() *Strategy { return &Strategy{process} }

// Watch returns the value that the file pth holds now, and a channel of those
// that it holds later, until ctx ends. Options are those of the package comment.
func (s *Strategy) Watch(ctx context.Context, pth string, options url.Values) (value string, values <-chan string, err error) {
	path, poll, err := parse(pth, options)
	if err != nil {
		return "", nil, err
	}
	w := &watch{poll: poll, first: make(chan reading, 1), values: make(chan string, 1)}
	f := s.hub.join(path, w)
	var r reading
	select {
	case r = <-w.first:
	case <-ctx.Done():
	}
	if ctx.Err() != nil { // whatever was chosen
		r.err = fmt.Errorf("hotload: fsnotify: reading %s: %w", path, ctx.Err())
	}
	if r.err != nil {
		s.hub.leave(f, w)
		return "", nil, r.err
	}
	context.AfterFunc(ctx, func() { s.hub.leave(f, w) })
	return r.value, w.values, nil
}

// parse returns the name of the file that the path of a data source name means, and
// the poll option.
func parse(pth string, options url.Values) (path string, poll time.Duration, err error) {
	if !strings.HasPrefix(pth, "/") {
		return "", 0, fmt.Errorf("hotload: fsnotify: path %q, want the absolute path of a file, as in fsnotify://driver/path/of/file", pth)
	}
	path = filepath.FromSlash(pth)
	if filepath.VolumeName(path[1:]) != "" {
		path = path[1:]
	}
	poll = defaultPoll
	for name, given := range options {
		if name != "poll" {
			return "", 0, fmt.Errorf("hotload: fsnotify: unknown option %q, want poll or none", name)
		}
		if len(given) != 1 {
			return "", 0, fmt.Errorf("hotload: fsnotify: option poll given %d times, want once", len(given))
		}
		if poll, err = time.ParseDuration(given[0]); err != nil || poll < minPoll {
			return "", 0, fmt.Errorf("hotload: fsnotify: option poll is %q, want a duration of at least %v, such as %v", given[0], minPoll, defaultPoll)
		}
	}
	return path, poll, nil
}

// A file is a path that is watched. Its goroutine does all the reading, so that
// a file system that hangs holds up no other file.
type file struct {
	hub   *hub
	path  string
	hints atomic.Uint32
	wake  chan struct{} // has room for one; sent to after hints were set

	// Owned by the goroutine.
	settling
	began, ended time.Time   // the last reading
	prompt       time.Time   // the end of the last one that followed an event
	info         fs.FileInfo // of the last reading
	seen         time.Time   // when the file was first read with this info
	way          way         // as the hub was last asked to follow it; nil before
	due          time.Time   // when the next look is, without a hint
	stale        bool        // the hub is to follow the way again
	said         bool        // that the file was replaced outside its mount

	// Guarded by hub.mu.
	watches  map[*watch]bool
	followed way // what the hub wakes it by
}

func (f *file) hint(hints uint32) {
	f.hints.Or(hints)
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

func (f *file) run() {
	timer := time.NewTimer(defaultPoll)
	for {
		select {
		case <-f.wake:
		case <-timer.C:
		}
		// The hints first: a watch that joins after them hints again.
		hints := f.hints.Swap(0)
		poll, heard, watched := f.hub.turn(f)
		if !watched {
			f.hub.request(f, nil)
			return
		}
		f.due = time.Now().Add(f.look(hints, poll, heard))
		timer.Reset(time.Until(f.due))
	}
}

// look reads the file if need be, delivers what it can, and has its way followed. It
// returns how long until the next look without a hint.
func (f *file) look(hints uint32, poll time.Duration, heard bool) (next time.Duration) {
	now := time.Now()
	wait := f.due.Sub(now) // without a hint: the last look has taken those that f was woken for
	if hints != 0 {
		wait = f.prompt.Add(quietTime).Sub(now) // a reading for each event would cost too much
	}
	if wait > 0 && hints&(renamed|asked) == 0 {
		f.hints.Or(hints)
		return wait
	}
	if hints == 0 && heard && !f.stale && f.rests(now) {
		return poll
	}

	r := read(f.path)
	if !f.said && replaced(f.info, r.info, now.Sub(f.seen)) {
		f.said = true
		slog.Warn("hotload: file replaced outside its mount, changes cannot be seen", "strategy", "fsnotify", "path", f.path)
	}
	f.began, f.ended = now, time.Now()
	if !unchanged(r.info, f.info) {
		f.info, f.seen = r.info, f.ended
	}
	was, had := f.acted, f.had
	act, next := f.decide(r, hints|f.hints.Load()&written, f.began, f.ended)
	if act {
		next = poll
		f.deliver(r, was, had)
	}
	if r.passing || r.err == nil && unlinked(r.info) {
		next = min(next, maxWait)
	}

	way := trace(f.path)
	switch moved := !heard || !maps.EqualFunc(way, f.way, sameFile); {
	case hints&announced != 0:
		// A watch may have died with what it watched, though all looks the same. That is
		// mended in the next look, so that what follows this event soon is delivered first.
		f.stale, f.prompt, next = true, f.ended, min(next, quietTime)
	case moved && hints&asked != 0 && f.way != nil:
		// It moved while it was being followed. On some file systems it seems to move
		// between any two looks, so it is not followed again at once.
		f.stale, next = true, min(next, maxWait)
	case moved || f.stale:
		f.stale, f.way = false, way
		f.hub.request(f, way)
	}
	return next
}

// deliver gives r, which is acted upon after was, to those that wait for a first
// value, and if it is a new value to all others.
func (f *file) deliver(r, was reading, had bool) {
	f.hub.mu.Lock()
	for w := range f.watches {
		switch {
		case w.answered && r.err == nil:
			w.offer(r.value)
		case !w.answered && w.looked:
			w.answered, w.sent = true, r.value
			w.first <- r
		}
	}
	f.hub.mu.Unlock()
	switch {
	case r.err == nil && was.err != nil && had:
		slog.Info("hotload: file usable again", "strategy", "fsnotify", "path", f.path)
	case r.err != nil && !r.same(was) && had:
		slog.Warn("hotload: file unusable, keeping the last value", "strategy", "fsnotify", "path", f.path, "error", r.err)
	}
}

// A watch is one call of Strategy.Watch.
type watch struct {
	poll  time.Duration
	first chan reading // has room for one: the answer to the call

	// Guarded by hub.mu.
	looked   bool // a look has begun since it joined
	answered bool
	values   chan string // has room for one: the newest value, until it is taken
	sent     string      // what the consumer has when it has taken what is in values
	taken    string      // what it had before
}

// offer makes value the next that the consumer gets, unless it has it already.
func (w *watch) offer(value string) {
	select {
	case <-w.values: // not taken yet, and not needed any more
	default:
		w.taken = w.sent
	}
	if w.sent = value; value != w.taken {
		w.values <- value
	}
}
