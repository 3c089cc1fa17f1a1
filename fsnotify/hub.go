package fsnotify

import (
	"errors"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	upstream "github.com/fsnotify/fsnotify"
)

// A hub has what all watches share: the files, and the upstream watcher that
// wakes them.
//
// Upstream holds a lock of its own while it sends some of its errors, and Add
// and Remove want that lock. So the goroutine that receives never adds. Nor does a
// file's own goroutine: Add can hang with a file system, and a goroutine that waited for it
// would not poll. That leaves a goroutine for it alone.
type hub struct {
	open func() (*upstream.Watcher, error)

	// mu is never held across a call that can block.
	mu        sync.Mutex
	files     map[string]*file          // those with a watch, by path
	routes    map[string]map[*file]bool // whom an event with that name concerns
	requests  map[*file]way             // what is to be followed; nil: nothing any more
	following bool                      // a goroutine is in serve
	deaf      map[*file]bool            // those whose way could not be followed

	// Owned by the goroutine in serve; by nobody when there is none.
	watcher *upstream.Watcher // nil when idle, or where there are no notifications
	added   way               // what the watcher watches
}

func newHub(open func() (*upstream.Watcher, error)) *hub {
	return &hub{open: open, files: make(map[string]*file), routes: make(map[string]map[*file]bool),
		requests: make(map[*file]way), added: make(way), deaf: make(map[*file]bool)}
}

// join adds w to the file's watches. The file's goroutine answers on w.first.
func (h *hub) join(path string, w *watch) *file {
	h.mu.Lock()
	defer h.mu.Unlock()
	f := h.files[path]
	if f == nil {
		f = &file{hub: h, path: path, wake: make(chan struct{}, 1), watches: make(map[*watch]bool)}
		h.files[path] = f
		go f.run()
	}
	f.watches[w] = true
	f.hint(asked)
	return f
}

// leave ends w. It does not wait for the file's goroutine, which may be
// stuck in a read, and ends by itself if this was the last watch.
func (h *hub) leave(f *file, w *watch) {
	h.mu.Lock()
	defer h.mu.Unlock()
	close(w.values)
	delete(f.watches, w)
	f.hint(0)
}

// turn begins a look at f. It returns how long until the next poll, and whether what
// happens on its way is announced. If f has no watch it is watched no more.
func (h *hub) turn(f *file) (poll time.Duration, heard, watched bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(f.watches) == 0 {
		delete(h.files, f.path)
		return 0, false, false
	}
	poll = 1<<63 - 1
	for w := range f.watches {
		w.looked = true
		poll = min(poll, w.poll)
	}
	// If many files were read at once, they are not all polled at once, which would hold up
	// what is announced meanwhile.
	return poll - rand.N(poll/4), f.followed != nil && !h.deaf[f], true
}

// request has the way w followed for f, or nothing if w is nil. When that is done f is
// asked to look again: what happened before was not announced.
func (h *hub) request(f *file, w way) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.requests[f] = w
	if !h.following {
		h.following = true
		go h.serve()
	}
}

// serve does what is requested, and ends when there is nothing more.
func (h *hub) serve() {
	for {
		h.mu.Lock()
		requests := h.requests
		h.requests = make(map[*file]way)
		h.following = len(requests) > 0
		h.mu.Unlock()
		if len(requests) == 0 {
			return
		}
		for f, w := range requests {
			err := h.follow(f, w)
			h.mu.Lock()
			wasDeaf := len(h.deaf) > 0
			if delete(h.deaf, f); err != nil {
				h.deaf[f] = true
			} else {
				f.hint(asked)
			}
			isDeaf := len(h.deaf) > 0
			h.mu.Unlock()
			if isDeaf && !wasDeaf {
				slog.Warn("hotload: file notifications unavailable, polling", "strategy", "fsnotify", "path", f.path, "error", err)
			} else if wasDeaf && !isDeaf && w != nil {
				slog.Info("hotload: file notifications available again", "strategy", "fsnotify", "path", f.path)
			}
		}
	}
}

// follow makes the names of w what f is woken by; none if w is nil. The first use of the
// watcher opens it, the end of the last file closes it.
func (h *hub) follow(f *file, w way) (err error) {
	for _, name := range h.route(f, w) {
		h.remove(name)
	}
	if w == nil && h.watcher != nil && len(h.added) == 0 {
		h.watcher.Close()
		h.watcher = nil
	} else if w != nil && h.watcher == nil {
		if h.watcher, err = h.open(); err != nil {
			return err
		}
		go h.receive(h.watcher)
	}
	for name, info := range w {
		if info != nil {
			info, _ = os.Lstat(name) // it may be another since it was traced
		}
		if !sameFile(h.added[name], info) {
			h.remove(name) // upstream would forget the old watch, and the kernel not
		}
		if info == nil {
			continue
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

// route has events with the names of w wake f, and no others. It returns the names
// that wake nobody any more.
func (h *hub) route(f *file, w way) (unused []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for name := range f.followed {
		delete(h.routes[name], f)
	}
	for name := range w {
		if h.routes[name] == nil {
			h.routes[name] = make(map[*file]bool)
		}
		h.routes[name][f] = true
	}
	for name := range f.followed {
		if len(h.routes[name]) == 0 {
			delete(h.routes, name)
			unused = append(unused, name)
		}
	}
	f.followed = w
	return unused
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
		e, err, ok := upstream.Event{}, error(nil), false
		select {
		case e, ok = <-w.Events:
		case err, ok = <-w.Errors:
		}
		if !ok {
			return
		}
		hints := announced
		if e.Has(upstream.Write) {
			hints |= written
		}
		// Upstream tells a file renamed from one that is created only here.
		if e.Has(upstream.Create) && strings.Contains(e.String(), `" ← "`) {
			hints |= renamed
		}
		h.mu.Lock()
		for f := range h.routes[filepath.Clean(e.Name)] { // in the root directory it begins with "//"
			f.hint(hints)
		}
		if errors.Is(err, upstream.ErrEventOverflow) { // other errors mostly tell of a watch that has ended
			for _, f := range h.files {
				f.hint(hints)
			}
		}
		h.mu.Unlock()
	}
}

// A way has the names whose events can change what a path leads to. Those to be
// watched have their FileInfo: the file, its directory, that of every symbolic link on
// the way, and where something is missing the directory that lacks it.
type way map[string]fs.FileInfo

// trace follows path as the kernel does, and returns its way.
func trace(path string) way {
	w, dir, rest := make(way), "", ""
	for range 40 { // as many links as Linux follows
		if filepath.IsAbs(path) {
			dir = filepath.VolumeName(path) + string(filepath.Separator)
		}
		rest = strings.TrimLeft(filepath.ToSlash(strings.TrimPrefix(path, filepath.VolumeName(path)))+"/"+rest, "/")
		name, info, isLink := dir, fs.FileInfo(nil), false
		for more := true; more && rest != ""; more = info != nil && !isLink {
			dir = name
			name, rest, _ = strings.Cut(rest, "/")
			// There are no links in dir, so what Join makes of .. is the parent.
			name, rest = filepath.Join(dir, name), strings.TrimLeft(rest, "/")
			info, _ = os.Lstat(name)
			isLink = info != nil && info.Mode()&fs.ModeSymlink != 0
		}
		w[name] = info
		w[dir], _ = os.Lstat(dir)
		if !isLink {
			break
		}
		w[name] = nil
		path, _ = os.Readlink(name) // if the link is gone by now, an event says so
	}
	return w
}
