package fsnotify_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	upstream "github.com/fsnotify/fsnotify"
	"github.com/infobloxopen/hotload/fsnotify"
)

const (
	patience  = 30 * time.Second // for what must happen
	notEvents = time.Hour        // a poll that never comes: what is seen then was announced
)

func TestMain(m *testing.M) {
	slog.SetDefault(slog.New(slog.DiscardHandler))
	os.Exit(m.Run())
}

// deaf returns a strategy without notifications.
func deaf() *fsnotify.Strategy {
	return fsnotify.NewStrategyWith(func() (*upstream.Watcher, error) { return nil, errors.New("turned off") })
}

func poll(d time.Duration) url.Values { return url.Values{"poll": {d.String()}} }

// A row is a way in which a file changes. The file holds "value 0" at first,
// the link to it if path is given.
type row struct {
	name   string
	path   string               // below the directory of the test; "file" if empty
	setup  func(f *file)        // instead of writing the file
	change func(f *file) string // returns what the file holds in the end, "" if nothing is to be delivered
	poll   bool                 // no event announces it
	mmap   bool                 // nor does its modification time on some file systems
	// mounted says that the file cannot be renamed over.
	mounted bool
}

// A file is what a row changes.
type file struct {
	*testing.T
	dir  string
	path string

	whole map[string]bool // what may be delivered

	mu  sync.Mutex
	got []string // what was delivered
}

func (f *file) join(name string) string { return filepath.Join(f.dir, filepath.FromSlash(name)) }

// may says that values may be delivered.
func (f *file) may(values ...string) {
	for _, v := range values {
		f.whole[v] = true
	}
}

// delivered returns what the consumer got.
func (f *file) delivered() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.got)
}

// await waits until value is the last one delivered, or the first value if none was,
// and returns what was delivered.
func (f *file) await(value string) []string {
	f.Helper()
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		got := f.delivered()
		if append([]string{"value 0"}, got...)[len(got)] == value {
			return got
		}
		if time.Since(start) > patience {
			f.Fatalf("not delivered: %.40q; delivered: %.40q", value, got)
		}
	}
}

func (f *file) check(err error) {
	f.Helper()
	if err != nil {
		f.Fatal(err)
	}
}

// put writes a file in place.
func (f *file) put(name, content string) {
	f.Helper()
	f.may(strings.TrimSpace(strings.TrimPrefix(content, "\ufeff")))
	f.check(os.WriteFile(f.join(name), []byte(content), 0o644))
}

// rename writes a file beside and renames it over.
func (f *file) rename(name, content string) {
	f.Helper()
	f.put(name+".new", content)
	f.check(os.Rename(f.join(name+".new"), f.join(name)))
}

// link makes a symbolic link, renamed over what is there.
func (f *file) link(target, name string) {
	f.Helper()
	f.check(os.Symlink(filepath.FromSlash(target), f.join(name+".tmp")))
	f.check(os.Rename(f.join(name+".tmp"), f.join(name)))
}

func (f *file) mkdir(name string) {
	f.Helper()
	f.check(os.MkdirAll(f.join(name), 0o755))
}

// chunks writes parts in place with pauses shorter than the quiet time. If
// one was longer after all, what was there then may be delivered.
func (f *file) chunks(name string, flag int, parts ...string) {
	f.Helper()
	f.chunksAnd(func() {}, name, flag, parts...)
}

// chunksAnd is chunks with something done after each write.
func (f *file) chunksAnd(after func(), name string, flag int, parts ...string) {
	f.Helper()
	w, err := os.OpenFile(f.join(name), os.O_WRONLY|os.O_CREATE|flag, 0o644)
	f.check(err)
	defer w.Close()
	f.may(strings.Join(parts, ""))
	var before time.Time
	for i, part := range parts {
		if i > 0 {
			time.Sleep(fsnotify.QuietTime / 5)
		}
		was, err := os.ReadFile(f.join(name))
		f.check(err)
		previous := before
		before = time.Now()
		_, err = w.WriteString(part)
		f.check(err)
		after()
		if i > 0 && time.Since(previous) >= fsnotify.QuietTime {
			f.may(strings.TrimSpace(string(was)))
		}
	}
}

var rows = []row{
	{name: "written in place", change: func(f *file) string {
		f.put("file", "value 1\n")
		return "value 1"
	}},
	{name: "truncated, paused, written", change: func(f *file) string {
		w, err := os.Create(f.join("file"))
		f.check(err)
		defer w.Close()
		time.Sleep(200 * time.Millisecond)
		f.may("value 1")
		_, err = w.WriteString("value 1")
		f.check(err)
		return "value 1"
	}},
	{name: "written in two chunks", change: func(f *file) string {
		f.chunks("file", os.O_TRUNC, "value", " 1")
		return "value 1"
	}},
	{name: "written in many chunks", change: func(f *file) string {
		f.chunks("file", os.O_TRUNC, strings.SplitAfter("a long value in many parts", "")...)
		return "a long value in many parts"
	}},
	{name: "written in chunks, with other times after each", change: func(f *file) string {
		age := time.Second
		f.chunksAnd(func() {
			old := time.Now().Add(-age)
			f.check(os.Chtimes(f.path, old, old))
			age *= 100
		}, "file", os.O_TRUNC, "val", "ue ", "1")
		return "value 1"
	}},
	{name: "written in chunks, with the same time after each", change: func(f *file) string {
		old := time.Unix(1e9, 0)
		f.chunksAnd(func() { f.check(os.Chtimes(f.path, old, old)) }, "file", os.O_TRUNC, "val", "ue ", "1")
		return "value 1"
	}},
	{name: "written in chunks, with a chmod after each", change: func(f *file) string {
		mode := fs.FileMode(0o600)
		f.chunksAnd(func() {
			f.check(os.Chmod(f.path, mode))
			mode ^= 0o040
		}, "file", os.O_TRUNC, "val", "ue ", "1")
		return "value 1"
	}},
	{name: "created in chunks, with an old time", change: func(f *file) string {
		f.check(os.Remove(f.path))
		old := time.Now().Add(-time.Hour)
		f.chunksAnd(func() { f.check(os.Chtimes(f.path, old, old)) }, "file", 0, "val", "ue ", "1")
		return "value 1"
	}},
	{name: "overwritten from the start", change: func(f *file) string {
		f.may("VALUE 0") // the second chunk is shorter than the first, the file as long
		f.chunks("file", 0, "VAL", "UE 1")
		return "VALUE 1"
	}},
	{name: "appended", change: func(f *file) string {
		f.may("value 0 and 1 and 2")
		f.chunks("file", os.O_APPEND, " and 1", " and 2")
		return "value 0 and 1 and 2"
	}},
	{name: "cut short", change: func(f *file) string {
		f.may("value")
		f.check(os.Truncate(f.path, 5))
		return "value"
	}},
	{name: "renamed over", change: func(f *file) string {
		f.rename("file", "value 1")
		return "value 1"
	}},
	{name: "renamed over from another directory", change: func(f *file) string {
		f.mkdir("other")
		f.put("other/file", "value 1")
		f.check(os.Rename(f.join("other/file"), f.path))
		return "value 1"
	}},
	{name: "renamed over, a slowly written one", change: func(f *file) string {
		f.put("file.new", "val")
		time.Sleep(2 * fsnotify.QuietTime)
		f.whole = map[string]bool{} // nobody has seen the half
		f.put("file.new", "value 1")
		f.check(os.Rename(f.join("file.new"), f.path))
		return "value 1"
	}},
	{name: "renamed over a thousand times", change: func(f *file) string {
		for i := range 1000 {
			f.rename("file", fmt.Sprint("value ", i+1))
		}
		return "value 1000"
	}},
	{name: "renamed over, then written in chunks", change: func(f *file) string {
		f.rename("file", "value 1")
		f.await("value 1")
		f.chunks("file", os.O_TRUNC, "val", "ue 2")
		return "value 2"
	}},
	{name: "written in chunks, then renamed over", change: func(f *file) string {
		f.chunks("file", os.O_TRUNC, "val", "ue 1")
		f.rename("file", "value 2")
		return "value 2"
	}},
	{name: "Kubernetes volume", path: "volume/file", setup: func(f *file) {
		f.mkdir("volume/..1")
		f.put("volume/..1/file", "value 0")
		f.link("..1", "volume/..data")
		f.link("..data/file", "volume/file")
	}, change: func(f *file) string {
		for i := range 5 {
			f.mkdir(fmt.Sprint("volume/..", i+2))
			f.put(fmt.Sprintf("volume/..%d/file", i+2), fmt.Sprint("value ", i+1))
			f.link(fmt.Sprint("..", i+2), "volume/..data")
			f.check(os.RemoveAll(f.join(fmt.Sprint("volume/..", i+1))))
		}
		return "value 5"
	}},
	{name: "link retargeted by rename", setup: func(f *file) {
		f.put("one", "value 0")
		f.link("one", "file")
	}, change: func(f *file) string {
		f.put("two", "value 1")
		f.link("two", "file")
		return "value 1"
	}},
	{name: "link removed and made again", setup: func(f *file) {
		f.put("one", "value 0")
		f.link("one", "file")
	}, change: func(f *file) string {
		f.put("two", "value 1")
		f.check(os.Remove(f.path))
		f.check(os.Symlink("two", f.path))
		return "value 1"
	}},
	{name: "link's target renamed over elsewhere", setup: func(f *file) {
		f.mkdir("other")
		f.put("other/file", "value 0")
		f.link(f.join("other/file"), "file")
	}, change: func(f *file) string {
		f.rename("other/file", "value 1")
		return "value 1"
	}},
	{name: "link's target removed, and made later", setup: func(f *file) {
		f.mkdir("other")
		f.put("other/file", "value 0")
		f.link("other/file", "file")
	}, change: func(f *file) string {
		f.check(os.RemoveAll(f.join("other")))
		time.Sleep(2 * fsnotify.QuietTime)
		f.mkdir("other")
		time.Sleep(2 * fsnotify.QuietTime)
		f.chunks("other/file", 0, "value", " 1")
		return "value 1"
	}},
	{name: "link in the middle of a chain retargeted", setup: func(f *file) {
		f.mkdir("a/b")
		f.mkdir("c/d")
		f.put("one", "value 0")
		f.link("../../one", "c/d/third")
		f.link("../c/d/third", "a/second")
		f.link("a/b/../second", "file")
	}, change: func(f *file) string {
		f.put("two", "value 1")
		f.link("../two", "a/second")
		return "value 1"
	}},
	{name: "directory link swapped", path: "current/file", setup: func(f *file) {
		f.mkdir("1")
		f.put("1/file", "value 0")
		f.link("1", "current")
	}, change: func(f *file) string {
		f.mkdir("2")
		f.put("2/file", "value 1")
		f.link("2", "current")
		return "value 1"
	}},
	{name: "link loop, then a file", setup: func(f *file) {
		f.put("one", "value 0")
		f.link("one", "file")
	}, change: func(f *file) string {
		f.link("file", "loop")
		f.link("loop", "file")
		time.Sleep(2 * fsnotify.QuietTime)
		f.rename("file", "value 1")
		return "value 1"
	}},
	{name: "deleted, created later, written again", change: func(f *file) string {
		f.check(os.Remove(f.path))
		time.Sleep(300 * time.Millisecond)
		f.put("file", "value 1")
		time.Sleep(2 * fsnotify.QuietTime)
		f.put("file", "value 2")
		return "value 2"
	}},
	{name: "deleted while open, created", change: func(f *file) string {
		w, err := os.OpenFile(f.path, os.O_RDWR, 0)
		f.check(err)
		defer w.Close()
		f.check(os.Remove(f.path))
		_, err = w.WriteString("of no name")
		f.check(err)
		f.put("file", "value 1")
		return "value 1"
	}},
	{name: "moved aside, written new", change: func(f *file) string {
		for i := range 3 {
			f.check(os.Rename(f.path, f.path+"~"))
			f.chunks("file", os.O_EXCL, "value ", fmt.Sprint(i+1))
			time.Sleep(2 * fsnotify.QuietTime)
		}
		return "value 3"
	}},
	{name: "moved aside and back", change: func(f *file) string {
		f.check(os.Rename(f.path, f.path+"~"))
		time.Sleep(2 * fsnotify.QuietTime)
		f.check(os.Rename(f.path+"~", f.path))
		return ""
	}},
	{name: "linked while being written", change: func(f *file) string {
		return linkChunks(f, "file")
	}},
	{name: "linked while being written, named like an event's text", path: `a" ← "b`, setup: func(f *file) {
		f.put(`a" ← "b`, "value 0")
	}, change: func(f *file) string {
		return linkChunks(f, `a" ← "b`)
	}},
	{name: "its directory replaced", path: "in/file", setup: func(f *file) {
		f.mkdir("in")
		f.put("in/file", "value 0")
	}, change: func(f *file) string {
		f.mkdir("in.new")
		f.put("in.new/file", "value 1")
		f.check(os.Rename(f.join("in"), f.join("in.old")))
		time.Sleep(2 * fsnotify.QuietTime)
		f.check(os.Rename(f.join("in.new"), f.join("in")))
		return "value 1"
	}},
	{name: "its directory replaced, then written", path: "in/file", setup: func(f *file) {
		f.mkdir("in")
		f.put("in/file", "value 0")
	}, change: func(f *file) string {
		f.check(os.RemoveAll(f.join("in")))
		f.mkdir("in")
		f.put("in/file", "value 1")
		time.Sleep(2 * fsnotify.QuietTime)
		f.rename("in/file", "value 2")
		return "value 2"
	}},
	{name: "its directory's directory replaced", path: "over/in/file", poll: true, setup: func(f *file) {
		f.mkdir("over/in")
		f.put("over/in/file", "value 0")
	}, change: func(f *file) string {
		f.mkdir("over.new/in")
		f.put("over.new/in/file", "value 1")
		f.check(os.Rename(f.join("over"), f.join("over.old")))
		f.check(os.Rename(f.join("over.new"), f.join("over")))
		return "value 1"
	}},
	{name: "a thousand writes", change: func(f *file) string {
		for i := range 1000 {
			f.put("file", fmt.Sprint("value ", i+1))
		}
		return "value 1000"
	}},
	{name: "written without end", change: func(f *file) string {
		value := ""
		for i, start := 0, time.Now(); len(f.delivered()) == 0; i++ {
			if time.Since(start) > patience {
				f.Fatal("nothing delivered")
			}
			value = fmt.Sprint("value ", i+1)
			f.put("file", value)
			time.Sleep(time.Millisecond)
		}
		return value
	}},
	{name: "the same again", change: func(f *file) string {
		f.put("file", "value 0")
		f.rename("file", "value 0")
		return ""
	}},
	{name: "only white space and byte order mark changed", change: func(f *file) string {
		f.put("file", "\ufeff\r\n\tvalue 0 \n\n")
		return ""
	}},
	{name: "byte order mark and a value", change: func(f *file) string {
		f.put("file", "\ufeffvalue 1\r\n")
		return "value 1"
	}},
	{name: "emptied", change: func(f *file) string {
		f.put("file", "")
		return ""
	}},
	{name: "blank", change: func(f *file) string {
		f.rename("file", " \t\r\n")
		return ""
	}},
	{name: "NUL bytes", change: func(f *file) string {
		f.rename("file", "value\x001")
		f.put("file", "v\x00a\x00l\x00u\x00e\x00")
		return ""
	}},
	{name: "UTF-16, or only its mark", change: func(f *file) string {
		f.rename("file", "\xff\xfe")
		f.put("file", "\xfe\xff")
		f.rename("file", "\xff\xfev\x00a\x00l\x00")
		return ""
	}},
	{name: "too large", change: func(f *file) string {
		f.rename("file", strings.Repeat("x", fsnotify.MaxSize+1))
		return ""
	}},
	{name: "as large as can be", change: func(f *file) string {
		large := strings.Repeat("x", fsnotify.MaxSize)
		f.put("file", large)
		return large
	}},
	{name: "a directory in its place", change: func(f *file) string {
		f.check(os.Remove(f.path))
		f.mkdir("file")
		time.Sleep(2 * fsnotify.QuietTime)
		f.check(os.Remove(f.path))
		f.put("file", "value 1")
		return "value 1"
	}},
	{name: "modification time unchanged", change: func(f *file) string {
		info, err := os.Stat(f.path)
		f.check(err)
		f.put("file", "value 1")
		f.check(os.Chtimes(f.path, time.Time{}, info.ModTime()))
		return "value 1"
	}},
	{name: "modification time earlier", change: func(f *file) string {
		f.put("file.new", "value 1")
		f.check(os.Chtimes(f.path+".new", time.Time{}, time.Unix(1e9, 0)))
		f.check(os.Rename(f.path+".new", f.path))
		return "value 1"
	}},
	{name: "modification time in the future", change: func(f *file) string {
		f.put("file.new", "value 1")
		f.check(os.Chtimes(f.path+".new", time.Time{}, time.Now().Add(time.Hour)))
		f.check(os.Rename(f.path+".new", f.path))
		return "value 1"
	}},
	{name: "hard link put in its place", change: func(f *file) string {
		f.put("one", "value 1")
		f.check(os.Link(f.join("one"), f.join("two")))
		f.check(os.Rename(f.join("two"), f.path))
		return "value 1"
	}},
	{name: "written through a hard link elsewhere", setup: func(f *file) {
		f.mkdir("other")
		f.put("other/file", "value 0")
		f.check(os.Link(f.join("other/file"), f.join("file")))
	}, change: func(f *file) string {
		f.put("other/file", "value 1")
		return "value 1"
	}},
	{name: "Vault agent", change: func(f *file) string {
		for i := range 3 {
			value := fmt.Sprint("value ", i+1)
			f.may(value)
			w, err := os.CreateTemp(f.dir, "")
			f.check(err)
			_, err = w.WriteString(value)
			f.check(err)
			f.check(w.Sync())
			f.check(w.Close())
			f.check(os.Chmod(w.Name(), 0o640))
			f.check(os.Rename(w.Name(), f.path))
			if os.Geteuid() == 0 {
				f.check(os.Chown(f.path, 65534, 65534))
			}
		}
		return "value 3"
	}},
}

// linkChunks puts a file in place as a hard link, half written.
func linkChunks(f *file, name string) string {
	f.mkdir("other")
	f.check(os.Remove(f.join(name)))
	start := time.Now()
	f.check(os.WriteFile(f.join("other/file"), []byte("value"), 0o644))
	f.check(os.Link(f.join("other/file"), f.join(name)))
	f.chunks("other/file", os.O_APPEND, " ", "1")
	if time.Since(start) >= fsnotify.QuietTime {
		f.may("value")
	}
	f.may("value 1")
	return "value 1"
}

// TestChanges: every way in which a file changes is seen, nothing is delivered
// that was never a value, and nothing twice running.
func TestChanges(t *testing.T) {
	for _, mode := range []struct {
		name     string
		strategy *fsnotify.Strategy
		deaf     bool
	}{
		{"notified", fsnotify.NewStrategy(), false},
		{"polled", deaf(), true},
	} {
		t.Run(mode.name, func(t *testing.T) {
			for _, row := range rows {
				t.Run(row.name, func(t *testing.T) {
					t.Parallel()
					options := poll(notEvents)
					if mode.deaf || row.poll {
						options = poll(20 * time.Millisecond)
					}
					testChange(t, mode.strategy, row, options, 0)
				})
			}
		})
	}
	t.Run("at rest", func(t *testing.T) { // when a poll only looks
		for _, row := range rows {
			if row.poll && !row.mmap {
				t.Run(row.name, func(t *testing.T) {
					t.Parallel()
					testChange(t, fsnotify.NewStrategy(), row, poll(20*time.Millisecond), fsnotify.FileTick+100*time.Millisecond)
				})
			}
		}
	})
}

func testChange(t *testing.T, s *fsnotify.Strategy, row row, options url.Values, rest time.Duration) {
	f := &file{T: t, dir: t.TempDir(), whole: make(map[string]bool)}
	f.path = f.join("file")
	if row.path != "" {
		f.path = f.join(row.path)
	}
	if row.setup != nil {
		row.setup(f)
	} else {
		f.put("file", "value 0")
	}
	value, values, err := s.Watch(t.Context(), urlPath(f.path), options)
	if err != nil || value != "value 0" {
		t.Fatalf("Watch: %q, %v; want value 0", value, err)
	}

	go func() { // reads as the change goes on
		for v := range values {
			f.mu.Lock()
			f.got = append(f.got, v)
			f.mu.Unlock()
		}
	}()

	time.Sleep(rest)
	start := time.Now()
	final := row.change(f)
	if final == "" {
		time.Sleep(4 * fsnotify.QuietTime) // for a wrong delivery to show
		final = "value 0"
	}
	n := len(f.await(final))
	if limit := 2 + int(time.Since(start)/fsnotify.QuietTime); strings.Contains(row.name, "writes") && n > limit {
		t.Errorf("%d deliveries, want at most %d", n, limit)
	}

	// What comes next is the next change and nothing before it.
	f.may("the end")
	if row.mounted {
		write(t, f.path, "the end")
	} else {
		replace(t, f.path, "the end")
	}
	got := f.await("the end")
	if len(got) != n+1 {
		t.Errorf("delivered %.40q, want the end only", got[n:])
	}
	for i, v := range got {
		if v == "" || !f.whole[v] || i > 0 && v == got[i-1] || i == 0 && v == value {
			t.Errorf("delivered %.40q at %d, of %.40q", v, i, got)
		}
	}
}

// urlPath returns path as the path of a connection string has it.
func urlPath(path string) string {
	path = filepath.ToSlash(path)
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	return path
}

func receive(t *testing.T, values <-chan string) string {
	t.Helper()
	select {
	case v, ok := <-values:
		if !ok {
			t.Fatal("channel closed, want a value")
		}
		return v
	case <-time.After(patience):
		t.Fatal("nothing delivered")
	}
	panic("unreachable")
}

func watchFile(t *testing.T, ctx context.Context, s *fsnotify.Strategy, path string, options url.Values) (string, <-chan string) {
	t.Helper()
	value, values, err := s.Watch(ctx, urlPath(path), options)
	if err != nil {
		t.Fatal(err)
	}
	return value, values
}

func replace(tb testing.TB, path, content string) {
	tb.Helper()
	write(tb, path+".new", content)
	if err := os.Rename(path+".new", path); err != nil {
		tb.Fatal(err)
	}
}

func write(tb testing.TB, path, content string) {
	tb.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		tb.Fatal(err)
	}
}

// leftovers describes the goroutines of the package and its upstream watchers.
func leftovers() string {
	buf := make([]byte, 1<<20)
	var left []string
	for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(g, "hotload/fsnotify.(*") || strings.Contains(g, "fsnotify.(*inotify)") {
			left = append(left, g)
		}
	}
	return strings.Join(left, "\n\n")
}

// noLeftovers waits for everything to be gone.
func noLeftovers(t *testing.T) {
	t.Helper()
	await(t, "goroutines and descriptors to be gone", func() bool { return leftovers() == "" && len(inotifyFDs()) == 0 })
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for start := time.Now(); !ok(); time.Sleep(time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("waited in vain for %s\n%s", what, leftovers())
		}
	}
}

func TestFirstReadErrors(t *testing.T) {
	for _, test := range []struct {
		name, content string
		is            error
		make          func(path string) error
		want          string
	}{
		{name: "missing", is: fs.ErrNotExist},
		{name: "dangling", is: fs.ErrNotExist, make: func(path string) error { return os.Symlink("nowhere", path) }},
		{name: "loop", make: func(path string) error { return os.Symlink(filepath.Base(path), path) }},
		{name: "directory", want: "is a directory, want a regular file", make: func(path string) error { return os.Mkdir(path, 0o755) }},
		{name: "FIFO", want: "want a regular file", make: mkfifo},
		{name: "empty", want: "is empty or blank", make: func(path string) error { return os.WriteFile(path, nil, 0o644) }},
		{name: "blank", content: "\ufeff \n", want: "is empty or blank"},
		{name: "NUL", content: "S3CRET\x00", want: "NUL"},
		{name: "UTF-16", content: "\xff\xfeS\x003\x00C\x00", want: "begins with the mark of UTF-16 or UTF-32, want a connection string in UTF-8"},
		{name: "UTF-16 the other way round", content: "\xfe\xff\x00S\x003", want: "mark of UTF-16"},
		{name: "UTF-16's mark alone", content: "\xff\xfe", want: "mark of UTF-16"},
		{name: "the other mark alone", content: "\xfe\xff", want: "mark of UTF-16"},
		{name: "UTF-32", content: "\xff\xfe\x00\x00S\x00\x00\x00", want: "UTF-32"},
		{name: "UTF-32 the other way round", content: "\x00\x00\xfe\xff\x00\x00\x00S", want: "UTF-32"},
		{name: "UTF-16 without a mark", content: "S\x003\x00C\x00", want: "NUL byte, as text in UTF-16"},
		{name: "UTF-8's mark alone", content: "\ufeff", want: "is empty or blank"},
		{name: "two marks", content: "\ufeff\ufeffS3CRET", want: "begins with two byte order marks of UTF-8, want one or none"},
		{name: "two marks with white space between", content: "\ufeff \ufeffS3CRET", want: "two byte order marks"},
		{name: "too large", content: "S3CRET" + strings.Repeat(" ", fsnotify.MaxSize), want: "larger than 1048576 bytes"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "file")
			if test.content != "" {
				write(t, path, test.content)
			} else if test.make != nil {
				if err := test.make(path); errors.Is(err, errors.ErrUnsupported) {
					t.Skip(err)
				} else if err != nil {
					t.Fatal(err)
				}
			}
			value, values, err := fsnotify.NewStrategy().Watch(t.Context(), urlPath(path), nil)
			if err == nil || values != nil || value != "" {
				t.Fatalf("Watch: %q, %v, %v; want an error alone", value, values, err)
			}
			text := err.Error()
			if !strings.HasPrefix(text, "hotload: fsnotify: ") || !strings.Contains(text, path) || !strings.Contains(text, test.want) || strings.Contains(text, "S3CRET") {
				t.Errorf("error %q", text)
			}
			if test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("error %q is not %q", text, test.is)
			}
		})
	}
	noLeftovers(t)
}

func TestArguments(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, "value 0")
	for _, test := range []struct{ path, query, want string }{
		{"", "", `path "", want the absolute path of a file`},
		{"file", "", `path "file", want the absolute path of a file`},
		{urlPath(path), "poll=10ms", ""},
		{urlPath(path), "poll=1h30m", ""},
		{urlPath(path), "pol=3s", `unknown option "pol", want poll`},
		{urlPath(path), "Poll=3s", `unknown option "Poll", want poll`},
		{urlPath(path), "poll=3s&poll=3s", "option poll given 2 times, want once"},
		{urlPath(path), "poll=", `option poll is "", want a duration of at least 10ms`},
		{urlPath(path), "poll=3", `option poll is "3", want a duration`},
		{urlPath(path), "poll=0s", `option poll is "0s", want a duration`},
		{urlPath(path), "poll=-3s", `option poll is "-3s", want a duration`},
		{urlPath(path), "poll=9ms", `option poll is "9ms", want a duration`},
		{urlPath(path), "poll=often", `option poll is "often", want a duration`},
	} {
		options, err := url.ParseQuery(test.query)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		value, values, err := fsnotify.NewStrategy().Watch(ctx, test.path, options)
		cancel()
		switch {
		case test.want == "" && (value != "value 0" || err != nil):
			t.Errorf("Watch(%q, %q): %q, %v; want value 0", test.path, test.query, value, err)
		case test.want != "" && (err == nil || values != nil || !strings.HasPrefix(err.Error(), "hotload: fsnotify: "+test.want)):
			t.Errorf("Watch(%q, %q): %v; want %s", test.path, test.query, err, test.want)
		}
	}
	noLeftovers(t)
}

// TestContext: the context that Watch gets ends the watch, before and after it has
// returned.
func TestContext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, "value 0")
	ctx, cancel := context.WithCancel(t.Context())
	_, one := watchFile(t, ctx, fsnotify.NewStrategy(), path, nil)
	_, other := watchFile(t, t.Context(), fsnotify.NewStrategy(), path, nil)
	replace(t, path, "value 1")
	receive(t, other) // so one has it too, and has not read it
	cancel()
	await(t, "the channel to be closed", func() bool {
		select {
		case v, ok := <-one:
			if ok && v != "value 1" {
				t.Errorf("received %q", v)
			}
			return !ok
		default:
			return false
		}
	})
	replace(t, path, "value 2")
	if got := receive(t, other); got != "value 2" {
		t.Errorf("the other watch received %q, want value 2", got)
	}

	for range 100 { // the value is there as well
		if _, values, err := fsnotify.NewStrategy().Watch(ctx, urlPath(path), nil); !errors.Is(err, context.Canceled) || values != nil {
			t.Fatalf("Watch with a context that has ended: %v, want it to be context.Canceled", err)
		}
	}
}

// TestAtOnce: what is put in place by rename is not kept back for the quiet time.
func TestAtOnce(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(path, value string) error
	}{
		{"file", func(path, value string) error { return os.Rename(path+".new", path) }},
		{"link", func(path, value string) error {
			if err := os.Rename(path+".new", path+value); err != nil {
				return err
			}
			if err := os.Symlink(path+value, path+".link"); err != nil {
				return err
			}
			return os.Rename(path+".link", path)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "file")
			write(t, path, "value 0")
			_, values := watchFile(t, t.Context(), fsnotify.NewStrategy(), path, poll(notEvents))
			write(t, path, "in place") // what was before does not matter
			receive(t, values)
			var took []time.Duration
			for i := range 51 {
				write(t, path+".new", fmt.Sprint("value ", i+1))
				start := time.Now()
				if err := test.change(path, fmt.Sprint(i)); err != nil {
					t.Fatal(err)
				}
				receive(t, values)
				took = append(took, time.Since(start))
			}
			slices.Sort(took)
			if median := took[len(took)/2]; median >= fsnotify.QuietTime {
				t.Errorf("delivered after %v as a rule, want at once", median)
			}
		})
	}
}

// TestPolledReads: without notifications a file is read at each poll, also if it seems
// not to have changed.
func TestPolledReads(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, "value 0")
	old := time.Unix(1e9, 0)
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
	_, values := watchFile(t, t.Context(), deaf(), path, poll(10*time.Millisecond))
	time.Sleep(fsnotify.FileTick + 10*fsnotify.QuietTime)
	if err := over(path, 0, "value 1"); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, values); got != "value 1" {
		t.Errorf("received %q, want value 1", got)
	}
}

// TestSlowConsumer: one that does not read gets the newest value when it does, and
// not again the one that it has.
func TestSlowConsumer(t *testing.T) {
	for name, s := range map[string]*fsnotify.Strategy{"notified": fsnotify.NewStrategy(), "polled": deaf()} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "file")
			write(t, path, "value 0")
			options := poll(10 * time.Millisecond)
			_, slow := watchFile(t, t.Context(), s, path, options)
			_, fast := watchFile(t, t.Context(), s, path, options)
			to := func(value string) {
				t.Helper()
				replace(t, path, value)
				if got := receive(t, fast); got != value {
					t.Fatalf("received %q, want %q", got, value)
				}
				// Deliveries of one change are in no order, and all made when
				// another watch of the file has had its first value.
				if got, _ := watchFile(t, t.Context(), s, path, options); got != value {
					t.Fatalf("Watch returned %q, want %q", got, value)
				}
			}
			for i := range 5 {
				to(fmt.Sprint("value ", i+1))
			}
			if got := receive(t, slow); got != "value 5" {
				t.Errorf("received %q, want the newest, value 5", got)
			}
			to("value 6")
			to("value 5")
			to("value 7")
			to("value 5") // as the consumer has it
			to("value 8")
			if got := receive(t, slow); got != "value 8" {
				t.Errorf("received %q, want value 8", got)
			}
			to("value 9")
			to("value 8")
			if len(slow) != 0 {
				t.Error("value 9 was not taken back")
			}
		})
	}
}

// TestHungFollowing: where the watcher is stuck, on a file system that hangs, other
// files are polled, and Watch returns.
func TestHungFollowing(t *testing.T) {
	stuck := make(chan struct{})
	release := sync.OnceFunc(func() { close(stuck) })
	defer release()
	s := fsnotify.NewStrategyWith(func() (*upstream.Watcher, error) {
		<-stuck
		return upstream.NewWatcher()
	})
	dir := t.TempDir()
	options := poll(10 * time.Millisecond)
	watch := func(name string) (<-chan string, context.CancelFunc) {
		t.Helper()
		write(t, filepath.Join(dir, name), "value 0")
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		t.Cleanup(cancel)
		_, values := watchFile(t, ctx, s, filepath.Join(dir, name), options)
		return values, cancel
	}
	one, endOne := watch("one")
	other, endOther := watch("other")
	for i := range 3 {
		want := fmt.Sprint("value ", i+1)
		for name, values := range map[string]<-chan string{"one": one, "other": other} {
			replace(t, filepath.Join(dir, name), want)
			if got := receive(t, values); got != want {
				t.Errorf("received %q, want %q", got, want)
			}
		}
	}
	if _, _, err := s.Watch(t.Context(), urlPath(filepath.Join(dir, "missing")), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Watch of a missing file: %v", err)
	}
	endOne()
	endOther()
	for _, values := range []<-chan string{one, other} {
		if _, open := <-values; open {
			t.Error("received a value, want the end")
		}
	}
	for range 20 {
		_, end := watch("other")
		end()
	}
	await(t, "the files' goroutines to be gone", func() bool { return !strings.Contains(leftovers(), ".(*file).run(") })
	release()
	await(t, "everything to be gone", func() bool { return leftovers() == "" })
}

// TestFresh: Watch returns what the file holds when it is called, though
// another watch of the file has not seen it yet.
func TestFresh(t *testing.T) {
	for name, s := range map[string]*fsnotify.Strategy{"notified": fsnotify.NewStrategy(), "polled": deaf()} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "file")
			write(t, path, "value 0")
			watchFile(t, t.Context(), s, path, nil)
			for i := range 30 {
				want := fmt.Sprint("value ", i+1)
				replace(t, path, want)
				if got, _ := watchFile(t, t.Context(), s, path, nil); got != want {
					t.Fatalf("Watch returned %q, want %q", got, want)
				}
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if _, _, err := s.Watch(t.Context(), urlPath(path), nil); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("Watch of a missing file that is watched: %v", err)
			}
		})
	}
}

// TestFirstReadWaits: the first value is no part of one either, whatever the file's
// times say.
func TestFirstReadWaits(t *testing.T) {
	for _, age := range []time.Duration{0, time.Second, 55 * time.Second, -time.Hour} {
		t.Run(age.String(), func(t *testing.T) {
			for range 5 {
				f := &file{T: t, dir: t.TempDir(), whole: make(map[string]bool)}
				f.may("value 0")
				stamp := func() {
					at := time.Now().Add(-age)
					f.check(os.Chtimes(f.join("file"), at, at))
				}
				start := time.Now()
				write(t, f.join("file"), "val")
				stamp()
				done := make(chan struct{})
				go func() {
					defer close(done)
					f.chunksAnd(stamp, "file", os.O_APPEND, "ue", " 0")
					if time.Since(start) >= fsnotify.QuietTime {
						f.may("val", "value") // a pause may have been too long
					}
				}()
				value, _, err := fsnotify.NewStrategy().Watch(t.Context(), urlPath(f.join("file")), nil)
				<-done
				if err != nil || !f.whole[value] {
					t.Errorf("Watch: %q, %v; want value 0", value, err)
				}
			}
		})
	}
}

// TestFirstReadAtOnce: a restart is not delayed where nothing has changed for long.
func TestFirstReadAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, "value 0")
	old := time.Now().Add(-2 * time.Minute)
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
	best := patience
	for range 20 { // the best of many, for the machine may be busy
		ctx, cancel := context.WithCancel(t.Context())
		start := time.Now()
		watchFile(t, ctx, fsnotify.NewStrategyWith(upstream.NewWatcher), path, nil)
		best = min(best, time.Since(start))
		cancel()
	}
	if best >= fsnotify.QuietTime {
		t.Errorf("Watch took %v at best, want less than %v", best, fsnotify.QuietTime)
	}
}

// TestNeverAtRest: where a file's times or its content never rest there is a value or a
// reason all the same, at first and later, in time for a caller that waits for seconds.
func TestNeverAtRest(t *testing.T) {
	large := strings.Repeat("x", fsnotify.MaxSize+1)
	for _, test := range []struct {
		name  string
		start string // what the file holds, "value 1" if empty
		touch func(path string, i int) error
		want  string // in the reason; none if there is a value
	}{
		{name: "other times at each look", touch: func(path string, i int) error {
			return os.Chtimes(path, time.Time{}, time.Now().Add(time.Duration(i)*time.Hour))
		}},
		{name: "the same content", touch: func(path string, i int) error { return over(path, 0, "value 1") }},
		{name: "other content", touch: func(path string, i int) error { return over(path, 0, fmt.Sprint("value ", i%10)) }},
		{name: "a log", start: large, want: "larger than", touch: func(path string, i int) error { return over(path, os.O_APPEND, "line\n") }},
		{name: "NUL bytes, written", start: "S3CRET\x00", want: "NUL", touch: func(path string, i int) error { return over(path, os.O_APPEND, "\x00") }},
		{name: "NUL bytes, touched", start: "S3CRET\x00", want: "NUL", touch: func(path string, i int) error {
			return os.Chtimes(path, time.Time{}, time.Now().Add(time.Duration(i)*time.Hour))
		}},
		{name: "empty", start: " ", want: "empty", touch: func(path string, i int) error { return over(path, 0, " ") }},
		{name: "empty, renamed", start: " ", want: "empty", touch: func(path string, i int) error {
			if err := os.WriteFile(path+".new", []byte(" "), 0o644); err != nil {
				return err
			}
			return os.Rename(path+".new", path)
		}},
	} {
		for name, s := range map[string]*fsnotify.Strategy{"notified": fsnotify.NewStrategy(), "polled": deaf()} {
			t.Run(test.name+"/"+name, func(t *testing.T) {
				log := captureLogs(t)
				path := filepath.Join(t.TempDir(), "file")
				begin := func() (end func()) {
					if test.start == "" {
						test.start = "value 1"
					}
					write(t, path, test.start)
					stop, stopped := make(chan struct{}), make(chan struct{})
					go func() {
						defer close(stopped)
						for i := 0; ; i++ {
							select {
							case <-stop:
								return
							case <-time.After(time.Millisecond):
							}
							if err := test.touch(path, i); err != nil {
								t.Error(err)
								return
							}
						}
					}()
					return func() { close(stop); <-stopped }
				}
				options := poll(20 * time.Millisecond)
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()

				end := begin()
				start := time.Now()
				value, _, err := s.Watch(ctx, urlPath(path), options)
				if took := time.Since(start); took > patience/5 {
					t.Errorf("Watch took %v", took)
				}
				end()
				switch {
				case test.want == "" && (err != nil || !strings.HasPrefix(value, "value ")):
					t.Errorf("Watch: %q, %v, want a value", value, err)
				case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
					t.Errorf("Watch: %q, %v, want %s", value, err, test.want)
				}

				replace(t, path, "value 0")
				_, values := watchFile(t, ctx, s, path, options)
				end = begin()
				defer end()
				if test.want == "" {
					if got := receive(t, values); !strings.HasPrefix(got, "value ") {
						t.Errorf("received %q", got)
					}
					return
				}
				await(t, "the reason", func() bool {
					return slices.ContainsFunc(log.lines(), func(line string) bool {
						return strings.Contains(line, "file unusable, keeping the last value") && strings.Contains(line, test.want)
					})
				})
			})
		}
	}
}

// over writes content over what is in the file, or appends it.
func over(path string, flag int, content string) error {
	w, err := os.OpenFile(path, os.O_WRONLY|flag, 0)
	if err != nil {
		return err
	}
	defer w.Close()
	_, err = w.WriteString(content)
	return err
}

// TestNothingLost: what changes while Watch is at work is its first value or
// delivered, without a poll.
func TestNothingLost(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			path := filepath.Join(dir, fmt.Sprint("file", i))
			write(t, path, "value 0")
			old := time.Now().Add(-time.Hour) // so the first read is at once
			if err := os.Chtimes(path, old, old); err != nil {
				t.Error(err)
			}
			write(t, path+".new", "value 1")
			go func() {
				time.Sleep(rand.N(2 * time.Millisecond))
				if err := os.Rename(path+".new", path); err != nil {
					t.Error(err)
				}
			}()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			value, values, err := fsnotify.NewStrategy().Watch(ctx, urlPath(path), poll(notEvents))
			if err == nil && value != "value 1" {
				value = <-values
			}
			if value != "value 1" {
				t.Errorf("received %q, %v; want value 1", value, err)
			}
		}()
	}
	wg.Wait()
	noLeftovers(t)
}

// TestRenamedOverAnother: a watched file renamed over a watched file is a change
// of the one and the end of the other.
func TestRenamedOverAnother(t *testing.T) {
	dir := t.TempDir()
	one, two := filepath.Join(dir, "one"), filepath.Join(dir, "two")
	write(t, one, "one 0")
	write(t, two, "two 0")
	ctx, cancel := context.WithCancel(t.Context())
	_, ones := watchFile(t, ctx, fsnotify.NewStrategy(), one, poll(notEvents))
	_, twos := watchFile(t, ctx, fsnotify.NewStrategy(), two, poll(notEvents))
	for i := range 100 {
		if err := os.Rename(two, one); err != nil {
			t.Fatal(err)
		}
		if got, want := receive(t, ones), fmt.Sprint("two ", i); got != want {
			t.Fatalf("received %q, want %q", got, want)
		}
		replace(t, two, fmt.Sprint("two ", i+1))
		if got, want := receive(t, twos), fmt.Sprint("two ", i+1); got != want {
			t.Fatalf("received %q, want %q", got, want)
		}
	}
	cancel()
	noLeftovers(t)
}

// TestShortestPoll: the watches of one path share their reading, at the pace of
// the one that polls most often.
func TestShortestPoll(t *testing.T) {
	s := deaf()
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, "value 0")
	_, values := watchFile(t, t.Context(), s, path, poll(notEvents))
	ctx, cancel := context.WithCancel(t.Context())
	watchFile(t, ctx, s, path, poll(10*time.Millisecond))
	if got := strings.Count(leftovers(), ".(*file).run("); got != 1 {
		t.Errorf("%d goroutines read the file, want 1", got)
	}
	replace(t, path, "value 1")
	if got := receive(t, values); got != "value 1" {
		t.Errorf("received %q, want value 1", got)
	}
	cancel()
}

// TestComeAndGo: hundreds of watches come and go while their files change; those that
// stay get every file's last value, and nothing is left in the end.
func TestComeAndGo(t *testing.T) {
	for name, s := range map[string]*fsnotify.Strategy{"notified": fsnotify.NewStrategy(), "polled": deaf()} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			ctx, cancel := context.WithCancel(t.Context())
			var stay []<-chan string
			var paths []string
			for i := range 10 {
				paths = append(paths, filepath.Join(dir, fmt.Sprint("file", i)))
				write(t, paths[i], "value 0")
				_, values := watchFile(t, ctx, s, paths[i], poll(20*time.Millisecond))
				stay = append(stay, values)
			}
			var wg sync.WaitGroup
			for i, path := range paths {
				wg.Add(1)
				go func() {
					defer wg.Done()
					for n := range 100 {
						if n%10 == i {
							write(t, path, fmt.Sprint("value ", n+1))
						} else {
							replace(t, path, fmt.Sprint("value ", n+1))
						}
						time.Sleep(time.Millisecond)
					}
				}()
			}
			for range 30 {
				wg.Add(1)
				go func() {
					defer wg.Done()
					for range 10 {
						ctx, cancel := context.WithTimeout(t.Context(), rand.N(20*time.Millisecond))
						value, values, err := s.Watch(ctx, urlPath(paths[rand.N(len(paths))]), poll(20*time.Millisecond))
						if err == nil {
							for last := value; ; last = value {
								var ok bool
								if value, ok = <-values; !ok {
									break
								}
								if value == last || !strings.HasPrefix(value, "value ") {
									t.Errorf("received %q after %q", value, last)
								}
							}
						}
						cancel()
					}
				}()
			}
			wg.Wait()
			for _, values := range stay {
				for receive(t, values) != "value 100" {
				}
			}
			cancel()
			for _, values := range stay {
				for range values {
				}
			}
			noLeftovers(t)
		})
	}
}

// logs collects what is logged, as text.
type logs struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logs) lines() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(strings.Split(l.buf.String(), "\n"), func(s string) bool { return s == "" })
}

func captureLogs(t *testing.T) *logs {
	l := new(logs)
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}})))
	t.Cleanup(func() { slog.SetDefault(old) })
	return l
}

// TestNotificationsComeBack: without notifications files are polled, which
// is logged once, and notifications are used when there are some.
func TestNotificationsComeBack(t *testing.T) {
	log := captureLogs(t)
	var mu sync.Mutex
	broken := true
	s := fsnotify.NewStrategyWith(func() (*upstream.Watcher, error) {
		mu.Lock()
		defer mu.Unlock()
		if broken {
			return nil, errors.New("too many instances")
		}
		return upstream.NewWatcher()
	})
	dir := t.TempDir()
	var values []<-chan string
	for i := range 10 {
		path := filepath.Join(dir, fmt.Sprint("file", i))
		write(t, path, "S3CRET 0")
		_, v := watchFile(t, t.Context(), s, path, poll(10*time.Millisecond))
		values = append(values, v)
		ctx, cancel := context.WithCancel(t.Context())
		other := filepath.Join(dir, "other")
		write(t, other, "S3CRET 0")
		watchFile(t, ctx, s, other, nil)
		cancel() // one that is gone does not count
		replace(t, path, "S3CRET 1")
	}
	for _, v := range values {
		receive(t, v)
	}
	if got := log.lines(); len(got) != 1 || !strings.HasPrefix(got[0], `level=WARN msg="hotload: file notifications unavailable, polling" strategy=fsnotify path=`+filepath.Join(dir, "file")) ||
		!strings.HasSuffix(got[0], `error="too many instances"`) {
		t.Errorf("logged %q", got)
	}
	mu.Lock()
	broken = false
	mu.Unlock()
	await(t, "a second log line", func() bool { return len(log.lines()) > 1 })
	if got := log.lines(); len(got) != 2 || !strings.HasPrefix(got[1], `level=INFO msg="hotload: file notifications available again" strategy=fsnotify path=`) {
		t.Errorf("logged %q", got)
	}
}

// TestOutageLogged: a file that stays unusable is logged once, and once when it is
// back, without its content.
func TestOutageLogged(t *testing.T) {
	log := captureLogs(t)
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, "S3CRET 0")
	_, values := watchFile(t, t.Context(), fsnotify.NewStrategy(), path, poll(10*time.Millisecond))
	replace(t, path, "S3CRET\x00")
	await(t, "a log line", func() bool { return len(log.lines()) == 1 })
	time.Sleep(50 * time.Millisecond) // some polls
	replace(t, path, "S3CRET 1")
	receive(t, values)
	await(t, "another log line", func() bool { return len(log.lines()) > 1 })
	replace(t, path, "")
	await(t, "a log line", func() bool { return len(log.lines()) == 3 })
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	await(t, "a line for the other reason", func() bool { return len(log.lines()) == 4 })
	replace(t, path, "S3CRET 2")
	receive(t, values)
	await(t, "another log line", func() bool { return len(log.lines()) > 4 })
	missing := errors.Unwrap(func() error { _, err := os.Stat(path + ".new"); return err }())
	want := []string{
		`level=WARN msg="hotload: file unusable, keeping the last value" strategy=fsnotify path=` + path + ` error="hotload: fsnotify: ` + path + ` holds a NUL byte, as text in UTF-16 or UTF-32 does, want a connection string in UTF-8"`,
		`level=INFO msg="hotload: file usable again" strategy=fsnotify path=` + path,
		`level=WARN msg="hotload: file unusable, keeping the last value" strategy=fsnotify path=` + path + ` error="hotload: fsnotify: ` + path + ` is empty or blank, want a connection string"`,
		`level=WARN msg="hotload: file unusable, keeping the last value" strategy=fsnotify path=` + path + ` error="hotload: fsnotify: open ` + path + `: ` + missing.Error() + `"`,
		`level=INFO msg="hotload: file usable again" strategy=fsnotify path=` + path,
	}
	if got := log.lines(); !slices.Equal(got, want) {
		t.Errorf("logged %q, want %q", got, want)
	}
}

func FuzzClean(f *testing.F) {
	for _, content := range []string{"value", "\ufeffvalue\r\n", " \n", "", "\x00", "a b", "\xff", "\ufeff\ufeff", "\xff\xfe", "\xfe\xff\x00a", "a\ufeff"} {
		f.Add([]byte(content))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		value, err := fsnotify.Clean(content)
		if err != nil {
			if value != "" || len(content) > 20 && strings.Contains(err.Error(), string(content)) {
				t.Errorf("%q, %v", value, err)
			}
			return
		}
		if value == "" || value != strings.TrimSpace(value) || strings.Contains(value, "\x00") || !bytes.Contains(content, []byte(value)) {
			t.Errorf("%q from %q", value, content)
		}
	})
}
