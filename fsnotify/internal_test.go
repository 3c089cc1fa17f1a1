package fsnotify

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	upstream "github.com/fsnotify/fsnotify"
)

// TestSettle: when a reading is acted upon. A file holds "old" at first.
func TestSettle(t *testing.T) {
	type look struct {
		at       int // milliseconds: when the reading was begun
		value    string
		modified int // milliseconds
		hints    uint32
		want     bool
	}
	const aged = -1000
	empty := errors.New("empty")
	for _, test := range []struct {
		name  string
		looks []look
	}{
		{"nothing new", []look{{0, "old", 0, 0, true}, {9, "old", 8, announced | written, true}}},
		{"written", []look{{0, "new", 0, announced | written, false}, {24, "new", 0, 0, false}, {26, "new", 0, 0, true}}},
		{"written in parts", []look{
			{0, "n", 0, announced | written, false}, {24, "ne", 24, announced | written, false},
			{26, "ne", 24, 0, false}, {48, "new", 48, announced | written, false}, {73, "new", 48, 0, false}, {75, "new", 48, 0, true},
		}},
		{"the same, but modified", []look{{0, "new", 0, 0, false}, {26, "new", 20, 0, false}, {52, "new", 20, 0, true}}},
		{"renamed", []look{{0, "new", 0, announced | renamed, true}}},
		{"renamed and written", []look{{0, "new", 0, announced | renamed | written, false}}},
		{"renamed while another was being written", []look{{0, "n", 0, announced | written, false}, {9, "new", 0, announced | renamed, true}}},
		{"announced, long modified", []look{{0, "new", -50, announced, true}}},
		{"announced, just modified", []look{{0, "new", -49, announced, false}, {26, "new", -49, 0, true}}},
		{"announced, modified in the future", []look{{0, "new", 5000, announced, false}, {26, "new", 5000, 0, true}}},
		{"written, with an old time", []look{{0, "new", aged, announced | written, false}, {26, "new", aged, 0, true}}},
		{"polled, with an old time", []look{{0, "new", aged, 0, false}, {26, "new", aged, 0, true}}},
		{"written without end", []look{
			{0, "1", 0, 0, false}, {20, "", 20, 0, false}, {999, "2", 999, 0, false}, {1000, "", 1000, 0, false},
			{1010, "3", 1010, 0, true}, {1011, "4", 1011, 0, false}, {2010, "5", 2010, 0, false}, {2011, "6", 2011, 0, true},
		}},
		{"empty, then written without end", []look{
			{0, "", 0, 0, false}, {26, "", 0, 0, true}, {60, "", 0, announced, true},
			{100, "1", 0, 0, false}, {600, "", 600, 0, false}, {1100, "2", 1100, 0, true},
		}},
		{"gone for a moment", []look{{0, "", aged, announced, false}, {24, "old", 0, announced, true}, {50, "", aged, 0, false}, {76, "", aged, 0, true}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			start := time.Now()
			at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
			old := reading{value: "old"}
			f := &file{settled: old, value: "old"}
			for _, look := range test.looks {
				r := reading{value: look.value, modified: at(look.modified)}
				if r.value == "" {
					r.err = empty
				}
				// The reading takes a while, and who knows at which end of it.
				got := f.settle(r, look.hints, at(look.at), at(look.at+1))
				if got != look.want {
					t.Errorf("at %d ms: %v, want %v", look.at, got, look.want)
				}
				if got {
					f.settled = r
				}
			}
		})
	}
	f := new(file)
	if now := time.Now(); !f.settle(reading{err: empty, modified: now.Add(-time.Minute)}, announced, now, now) {
		t.Error("at first, what is no good is not reported at once")
	}
	if now := time.Now(); f.settle(reading{err: errors.New("other"), modified: now}, announced, now, now) {
		t.Error("at first, what may still be being written is reported at once")
	}
}

// TestRemovePanic: what upstream does with a name whose watch it has lost, because a
// watched file was renamed to it before Add, does not get further than remove.
func TestRemovePanic(t *testing.T) {
	h := newHub(upstream.NewWatcher)
	w, err := h.open()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	h.watcher = w // its events are not received, so it does not see the rename
	dir := t.TempDir()
	one, two := filepath.Join(dir, "one"), filepath.Join(dir, "two")
	for _, name := range []string{one, two, one} {
		if h.added[name] != nil {
			if err := os.Rename(two, one); err != nil {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := w.Add(name); err != nil {
			t.Fatal(err)
		}
		if h.added[name], err = os.Lstat(name); err != nil {
			t.Fatal(err)
		}
	}
	h.remove(one)
	h.remove(two)
	if left := w.WatchList(); len(left) != 0 {
		t.Errorf("upstream still watches %q", left)
	}
}
