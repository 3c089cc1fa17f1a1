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
// A value is the whole of a regular file of at most 1 MiB without NUL bytes,
// less a UTF-8 byte order mark and surrounding white space. What is empty, too
// large, unreadable or away is never delivered: the last value stays, and the
// file is read again until it is good. At the first read such a file is the error
// of Watch; later it is logged, and so is its return. Content that is equal but
// for white space is no change.
//
// # Changes
//
// What is put in place by rename from the same directory, be it the file or a
// symbolic link to it as in Kubernetes' Secret and ConfigMap volumes, is taken to be
// whole, and delivered at once. A file that may not be complete yet is delivered
// when it has not changed for 25 ms, or after one second of changes. So a writer
// that pauses for longer in the middle of a value, that takes longer than a second,
// or that goes on writing to a file just renamed into place, can be caught
// half-way. It is better to write a new file beside the old one, and to rename it
// over the old one when it is complete.
//
// A consumer that does not read holds nothing up, and gets the newest value
// when it does.
//
// Changes are noticed through the operating system's notifications: of the
// file, of its directory and of the directory of every symbolic link on the way
// to it. What they do not announce (a bind mount, most network file systems, a
// renamed grandparent directory) is found by reading the file again every now
// and then, as is everything where there are no notifications. That is logged,
// and notifications are tried again. A Kubernetes subPath mount is never
// updated, by anyone: mount the volume's directory.
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
//	poll  how long until the file is read again without a notification:
//	      a duration with its unit, at least 10ms; 3s by default
//
// Any other option is an error.
//
// [fsnotify.Watcher]: https://pkg.go.dev/github.com/fsnotify/fsnotify#Watcher
package fsnotify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	upstream "github.com/fsnotify/fsnotify"
	"github.com/infobloxopen/hotload"
)

const (
	quietTime   = 25 * time.Millisecond // a file in the writing is done when unchanged for so long,
	maxWait     = time.Second           // or taken as it is
	maxSize     = 1 << 20
	defaultPoll = 3 * time.Second
	minPoll     = 10 * time.Millisecond
)

func init() { hotload.RegisterStrategy("fsnotify", NewStrategy()) }

// Strategy watches files. It implements [hotload.Strategy]. NewStrategy makes
// one; the zero Strategy does not work.
type Strategy struct{ hub *hub }

var _ hotload.Strategy = (*Strategy)(nil)

// process is the hub of every Strategy: inotify instances are few.
var process = newHub(upstream.NewWatcher)

// NewStrategy returns the file strategy, to be registered under another name
// or used without hotload. All of them share one watcher.
func NewStrategy() *Strategy { return &Strategy{process} }

// Watch returns the value that the file pth holds now, and a channel of those
// that it holds later, until ctx ends. Options are those of the package comment.
func (s *Strategy) Watch(ctx context.Context, pth string, options url.Values) (value string, values <-chan string, err error) {
	path, err := filePath(pth)
	if err != nil {
		return "", nil, err
	}
	poll, err := parseOptions(options)
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

// filePath returns the name of the file that the path of a data source name means.
func filePath(pth string) (string, error) {
	if !strings.HasPrefix(pth, "/") {
		return "", fmt.Errorf("hotload: fsnotify: path %q, want the absolute path of a file, as in fsnotify://driver/path/of/file", pth)
	}
	if p := filepath.FromSlash(pth[1:]); filepath.VolumeName(p) != "" {
		return p, nil
	}
	return filepath.FromSlash(pth), nil
}

func parseOptions(options url.Values) (poll time.Duration, err error) {
	poll = defaultPoll
	for name, given := range options {
		if name != "poll" {
			return 0, fmt.Errorf("hotload: fsnotify: unknown option %q, want poll or none", name)
		}
		if len(given) != 1 {
			return 0, fmt.Errorf("hotload: fsnotify: option poll given %d times, want once", len(given))
		}
		if poll, err = time.ParseDuration(given[0]); err != nil || poll < minPoll {
			return 0, fmt.Errorf("hotload: fsnotify: option poll is %q, want a duration of at least %v, such as %v", given[0], minPoll, defaultPoll)
		}
	}
	return poll, nil
}

// A hub has what all watches share: the files, and the upstream watcher that
// wakes them.
//
// Upstream holds a lock of its own while it sends some of its errors, and Add
// and Remove want that lock. So the goroutine that receives must never wait for one
// that adds.
type hub struct {
	open func() (*upstream.Watcher, error)

	// watchMu is held across calls into the upstream watcher, which a file
	// system that hangs can block, and never taken by the goroutine that
	// receives from it. It is locked before mu.
	watchMu sync.Mutex
	watcher *upstream.Watcher      // nil when idle, or where there are no notifications
	added   map[string]fs.FileInfo // what the watcher watches, by name
	deaf    map[*file]bool         // those that cannot be watched

	// mu is never held across a call that can block.
	mu     sync.Mutex
	files  map[string]*file          // those with a watch, by path
	routes map[string]map[*file]bool // whom an event with that name concerns
}

func newHub(open func() (*upstream.Watcher, error)) *hub {
	return &hub{
		open:   open,
		added:  make(map[string]fs.FileInfo),
		deaf:   make(map[*file]bool),
		files:  make(map[string]*file),
		routes: make(map[string]map[*file]bool),
	}
}

// join adds w to the file's watches. The file's goroutine answers on w.first.
func (h *hub) join(path string, w *watch) *file {
	h.mu.Lock()
	defer h.mu.Unlock()
	var hints uint32
	f := h.files[path]
	if f == nil {
		f = &file{
			hub:     h,
			path:    path,
			wake:    make(chan struct{}, 1),
			watches: make(map[*watch]bool),
		}
		h.files[path] = f
		hints = announced
		go f.run()
	}
	w.joined = f.looks
	f.watches[w] = true
	f.hint(hints)
	return f
}

// leave ends w. It does not wait for the file's goroutine, which may be
// stuck in a read, and ends by itself if this was the last watch.
func (h *hub) leave(f *file, w *watch) {
	h.mu.Lock()
	defer h.mu.Unlock()
	w.withdraw()
	close(w.values)
	delete(f.watches, w)
	f.hint(0)
}

// watched reports whether f has a watch.
func (h *hub) watched(f *file) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(f.watches) > 0
}

// follow makes names, as returned by trace, what f is woken by. The first use of
// the watcher opens it. It reports false, and does nothing, if another file is at
// it: that one may be stuck, on a file system that hangs.
func (h *hub) follow(f *file, names map[string]fs.FileInfo) bool {
	if !h.watchMu.TryLock() {
		return false
	}
	wasDeaf := len(h.deaf) > 0
	err := h.followLocked(f, names)
	if err != nil {
		h.deaf[f] = true
	} else {
		delete(h.deaf, f)
	}
	isDeaf := len(h.deaf) > 0
	h.watchMu.Unlock() // a log handler may take its time, and watch another file

	if isDeaf && !wasDeaf {
		slog.Warn("hotload: file notifications unavailable, polling", "strategy", "fsnotify", "path", f.path, "error", err)
	} else if wasDeaf && !isDeaf {
		slog.Info("hotload: file notifications available again", "strategy", "fsnotify", "path", f.path)
	}
	return true
}

// forget ends f if it still has no watch. The end of the last file closes the
// watcher. It reports false as follow does, or if there is a watch.
func (h *hub) forget(f *file) bool {
	if !h.watchMu.TryLock() {
		return false
	}
	defer h.watchMu.Unlock()
	h.mu.Lock()
	watched := len(f.watches) > 0
	if !watched {
		delete(h.files, f.path)
	}
	h.mu.Unlock()
	if watched {
		return false
	}
	_ = h.followLocked(f, nil)
	delete(h.deaf, f)
	return true
}

func (h *hub) followLocked(f *file, names map[string]fs.FileInfo) (err error) {
	h.mu.Lock()
	old := f.names
	f.names = names
	for name := range old {
		if delete(h.routes[name], f); len(h.routes[name]) == 0 {
			delete(h.routes, name)
		}
	}
	for name := range names {
		if h.routes[name] == nil {
			h.routes[name] = make(map[*file]bool)
		}
		h.routes[name][f] = true
	}
	needed := make(map[string]bool)
	for name := range old {
		for other := range h.routes[name] {
			needed[name] = needed[name] || other.names[name] != nil
		}
	}
	idle := len(h.files) == 0
	h.mu.Unlock()

	if idle {
		if h.watcher != nil {
			h.watcher.Close()
		}
		h.watcher = nil
		clear(h.added)
		clear(h.deaf)
		return nil
	}
	if h.watcher == nil && names != nil {
		w, err := h.open()
		if err != nil {
			return err
		}
		h.watcher = w
		go h.receive(w)
	}
	for name := range old {
		if !needed[name] {
			h.remove(name)
		}
	}
	for name, info := range names {
		if info == nil {
			continue
		}
		if !sameFile(h.added[name], info) {
			h.remove(name) // upstream would forget the old watch, and the kernel not
		}
		// Always: whether a watch is still alive cannot be known.
		if e := h.watcher.Add(name); e == nil {
			h.added[name] = info
		} else if info.IsDir() && !errors.Is(e, fs.ErrNotExist) {
			err = e // for the file alone, its directory's watch will do
		}
	}
	return err
}

// remove ends the upstream watch of name, if there is one.
func (h *hub) remove(name string) {
	if h.added[name] == nil {
		return
	}
	delete(h.added, name)
	// Upstream 1.10.1 dereferences nil, after its work is done, if between our Lstat
	// and Add another watched file was renamed to name.
	defer func() { _ = recover() }()
	_ = h.watcher.Remove(name) // an error means that the watch is gone
}

// receive wakes the files that the watcher's events concern, until it is closed.
func (h *hub) receive(w *upstream.Watcher) {
	for {
		select {
		case e, ok := <-w.Events:
			if !ok {
				return
			}
			h.route(e)
		case _, ok := <-w.Errors:
			if !ok {
				return
			}
			// Events were lost, and which is not known.
			h.mu.Lock()
			for _, f := range h.files {
				f.hint(announced)
			}
			h.mu.Unlock()
		}
	}
}

func (h *hub) route(e upstream.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	files := h.routes[filepath.Clean(e.Name)] // in the root directory it begins with "//"
	hints := announced
	if e.Has(upstream.Write) {
		hints |= written
	}
	// Upstream tells a file renamed from one that is created only here.
	if e.Has(upstream.Create) && strings.Contains(e.String(), `" ← "`) {
		hints |= renamed
	}
	for f := range files {
		f.hint(hints)
	}
}

// Hints say why a file is looked at. They decide when a change is delivered,
// never what is.
const (
	announced uint32 = 1 << iota // by an event, or by the first watch of the file; else it is time for it
	written                      // its content was changed in place
	renamed                      // it, or a link to it, was put in place by rename
)

// A file is a path that is watched. Its goroutine does all the reading, so that
// a file system that hangs holds up no other file.
//
// A reading that differs from the last one settled is settled, and then
// delivered, when
//
//	it was put in place by rename and not written since, or
//	it was announced and its modification is long enough ago, or
//	it has stayed as it is for the quiet time, or
//	it has kept changing for the longest wait.
//
// A file that is no good is given the quiet time to be good again, save at first.
type file struct {
	hub   *hub
	path  string
	hints atomic.Uint32
	wake  chan struct{} // has room for one; sent to after hints were set

	// The goroutine's own.
	settled   reading   // the last reading settled, good or not
	value     string    // the last good one settled
	unsettled reading   // the last reading, unless since is zero
	since     time.Time // when readings began to differ from settled; zero if they do not
	changed   time.Time // when unsettled was first read as it is, at the latest

	// Guarded by hub.mu.
	watches map[*watch]bool
	looks   int                    // looks begun
	names   map[string]fs.FileInfo // what wakes it; changed with watchMu held too
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
	defer timer.Stop()
	// When the names are to be followed next: not at once after an event, so that a
	// change that comes soon after another is delivered first.
	due := time.Now()
	for {
		select {
		case <-f.wake:
		case <-timer.C:
		}
		if !f.hub.watched(f) {
			if f.hub.forget(f) {
				return
			}
			timer.Reset(quietTime)
			continue
		}
		hints := f.hints.Swap(0)
		now := time.Now()
		if now.Before(due) {
			next := now.Add(min(f.look(hints), quietTime))
			if next.Before(due) {
				due = next
			}
		} else if names := trace(f.path); f.hub.follow(f, names) {
			// What happened before the names were followed was not announced.
			if !maps.EqualFunc(names, trace(f.path), sameFile) {
				f.hint(announced)
			}
			due = now.Add(f.look(hints))
		} else {
			due = now.Add(min(f.look(hints), quietTime))
		}
		timer.Reset(time.Until(due))
	}
}

// look reads the file, settles and delivers what it can, and returns how long
// until the next look.
func (f *file) look(hints uint32) time.Duration {
	f.hub.mu.Lock()
	f.looks++
	f.hub.mu.Unlock()

	begun := time.Now()
	r := read(f.path)
	hints |= f.hints.Load() & written // meanwhile
	if f.settle(r, hints, begun, time.Now()) {
		f.deliver(r)
	}

	if !f.since.IsZero() {
		quiet, limit := time.Until(f.changed.Add(quietTime)), time.Until(f.since.Add(maxWait))
		if limit > 0 {
			return min(quiet, limit)
		}
		return quiet
	}
	f.hub.mu.Lock()
	defer f.hub.mu.Unlock()
	poll := time.Duration(1<<63 - 1)
	for w := range f.watches {
		poll = min(poll, w.poll)
	}
	return poll
}

// settle reports whether r, read between begun and ended, is to be acted upon.
func (f *file) settle(r reading, hints uint32, begun, ended time.Time) bool {
	inPlace := hints&written != 0
	const longAgo = 2 * quietTime // the clock of file times ticks slowly
	switch {
	case r.same(f.settled) && (r.err == nil || f.since.IsZero()):
	case hints&renamed != 0 && !inPlace && r.err == nil:
	case hints&announced != 0 && !inPlace && (r.err == nil || f.value == "") && begun.Sub(r.modified) >= longAgo:
	case f.since.IsZero():
		f.since = begun
		f.changed, f.unsettled = ended, r
		return false
	case begun.Sub(f.since) >= maxWait && r.err == nil:
	case !r.same(f.unsettled) || !r.modified.Equal(f.unsettled.modified):
		f.changed, f.unsettled = ended, r
		return false
	case begun.Sub(f.changed) < quietTime:
		return false
	}
	f.since = time.Time{}
	return true
}

// deliver gives r to those that wait for a first value, and if it is a new value
// to all others.
func (f *file) deliver(r reading) {
	was, again := f.settled, f.value != ""
	f.settled = r
	if r.err == nil {
		f.value = r.value
	}
	f.hub.mu.Lock()
	for w := range f.watches {
		switch {
		case w.answered && r.err == nil:
			w.offer(r.value)
		case !w.answered && w.joined < f.looks: // else the read was begun before it joined
			w.answered = true
			w.taken = r.value
			w.first <- r
		}
	}
	f.hub.mu.Unlock()
	switch {
	case r.err == nil && was.err != nil && again:
		slog.Info("hotload: file usable again", "strategy", "fsnotify", "path", f.path)
	case r.err != nil && was.err == nil && again:
		slog.Warn("hotload: file unusable, keeping the last value", "strategy", "fsnotify", "path", f.path, "error", r.err)
	}
}

// A watch is one call of Strategy.Watch.
type watch struct {
	poll  time.Duration
	first chan reading // has room for one: the answer to the call

	// Guarded by hub.mu.
	joined   int // the file's looks at the time
	answered bool
	values   chan string // has room for one: the newest value, until it is taken
	pending  string      // in values, or taken from there since; "" if neither
	taken    string      // what the consumer took before
}

// withdraw takes back the value that the consumer has not taken yet.
func (w *watch) withdraw() {
	select {
	case <-w.values:
	default:
		if w.pending != "" {
			w.taken = w.pending
		}
	}
	w.pending = ""
}

// offer makes value the next that the consumer gets, unless it has it already.
func (w *watch) offer(value string) {
	if value == w.pending {
		return
	}
	w.withdraw()
	if value != w.taken {
		w.pending = value
		w.values <- value
	}
}

// A reading is what a file was found to be.
type reading struct {
	value    string // "" if err is set
	modified time.Time
	err      error
}

func (r reading) same(s reading) bool {
	if r.err == nil || s.err == nil {
		return r.value == s.value && r.err == s.err
	}
	return r.err.Error() == s.err.Error()
}

// errChanging means that the file was written to while it was being read.
var errChanging = errors.New("it is being written")

func read(path string) (r reading) {
	defer func() {
		if r.err != nil && r.err != errChanging {
			r.err = fmt.Errorf("hotload: fsnotify: %w", r.err)
		}
	}()
	// A FIFO must not hold up its opening.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return reading{err: err}
	}
	defer f.Close()
	before, err := f.Stat()
	if err != nil {
		return reading{err: err}
	}
	r.modified = before.ModTime()
	if !before.Mode().IsRegular() {
		r.err = fmt.Errorf("%s has mode %v, want a regular file", path, before.Mode())
		return r
	}
	content, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		r.err = err
		return r
	}
	after, err := f.Stat()
	if err != nil {
		r.err = err
		return r
	}
	if after.Size() != before.Size() || !after.ModTime().Equal(before.ModTime()) {
		return reading{modified: time.Now(), err: errChanging}
	}
	r.value, err = clean(content)
	if err != nil {
		r.err = fmt.Errorf("%s %w", path, err)
	}
	return r
}

// clean returns the value in a file's content. Its errors hold nothing of it.
func clean(content []byte) (string, error) {
	if len(content) > maxSize {
		return "", fmt.Errorf("is larger than %d bytes, want a connection string", maxSize)
	}
	if bytes.IndexByte(content, 0) >= 0 {
		return "", errors.New("holds a NUL byte, want a connection string in UTF-8")
	}
	value := bytes.TrimSpace(bytes.TrimPrefix(content, []byte("\ufeff")))
	if len(value) == 0 {
		return "", errors.New("is empty or blank, want a connection string")
	}
	return string(value), nil
}

// trace follows path as the kernel does, and returns the names whose events
// can change what is there. Those to be watched have their FileInfo: the file, its
// directory, that of every symbolic link on the way, and where something is
// missing the directory that lacks it.
func trace(path string) map[string]fs.FileInfo {
	names := make(map[string]fs.FileInfo)
	split := func(path string) (root string, parts []string) {
		volume := filepath.VolumeName(path)
		parts = strings.Split(filepath.ToSlash(path[len(volume):]), "/")
		return volume + string(filepath.Separator), slices.DeleteFunc(parts, func(s string) bool { return s == "" || s == "." })
	}
	dir, parts := split(path)
	for links := 0; len(parts) > 0 && links < 40; {
		name := filepath.Join(dir, parts[0]) // dir has no links, so Join's .. is the parent
		parts = parts[1:]
		info, err := os.Lstat(name)
		isLink := err == nil && info.Mode()&fs.ModeSymlink != 0
		if err == nil && !isLink && len(parts) > 0 {
			dir = name
			continue
		}
		if dirInfo, err := os.Lstat(dir); err == nil {
			names[dir] = dirInfo
		}
		if !isLink {
			names[name] = info
			break
		}
		names[name] = nil
		links++
		target, err := os.Readlink(name)
		if err != nil {
			break
		}
		root, more := split(target)
		if filepath.IsAbs(target) {
			dir = root
		}
		parts = append(more, parts...)
	}
	return names
}

func sameFile(a, b fs.FileInfo) bool {
	return a == nil && b == nil || a != nil && b != nil && os.SameFile(a, b)
}
