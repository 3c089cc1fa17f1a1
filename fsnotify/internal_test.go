package fsnotify

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	upstream "github.com/fsnotify/fsnotify"
)

// A stamp is a FileInfo of which only the modification time is asked.
type stamp struct {
	fs.FileInfo
	modified time.Time
}

func (s stamp) ModTime() time.Time { return s.modified }

// TestDecide: when a reading is acted upon, row by row of the table at settling.
func TestDecide(t *testing.T) {
	type look struct {
		at      int // milliseconds: when the reading was begun; it takes one
		value   string
		hints   uint32
		act     bool
		again   int // milliseconds, if it is not acted upon
		passing bool
	}
	const event = announced
	const write = announced | written
	for _, test := range []struct {
		name     string
		first    bool // else a file that holds "old" is in force
		modified int  // milliseconds: the file's time, at each look
		looks    []look
	}{
		{name: "nothing new", looks: []look{{0, "old", 0, true, 0, false}, {9, "old", write, true, 0, false}, {10, "old", event | renamed, true, 0, false}}},
		{name: "written", looks: []look{{0, "new", write, false, 25, false}, {26, "new", 0, true, 0, false}}},
		{name: "found by a poll, modified long ago", modified: -1e6, looks: []look{{0, "new", 0, false, 25, false}, {26, "new", 0, true, 0, false}}},
		{name: "written, with an old time", modified: -1e6, looks: []look{{0, "new", write, false, 25, false}, {26, "new", 0, true, 0, false}}},
		{name: "changed by chmod or utimes, modified long ago", modified: -1e6, looks: []look{{0, "n", event, false, 25, false}, {10, "new", event, false, 25, false}, {36, "new", 0, true, 0, false}}},
		{name: "looked at too soon", looks: []look{{0, "new", write, false, 25, false}, {11, "new", 0, false, 14, false}, {25, "new", 0, false, 0, false}, {26, "new", 0, true, 0, false}}},
		{name: "written in parts", looks: []look{
			{0, "n", write, false, 25, false}, {26, "ne", write, false, 25, false}, {52, "new", 0, false, 25, false}, {78, "new", 0, true, 0, false}}},
		{name: "the same again, but a write was announced between", looks: []look{
			{0, "n", write, false, 25, false}, {26, "n", write, false, 25, false}, {52, "new", write, false, 25, false}, {78, "new", 0, true, 0, false}}},
		{name: "back to what it was", looks: []look{{0, "new", write, false, 25, false}, {26, "old", write, false, 25, false}, {52, "old", 0, true, 0, false}, {60, "new", 0, false, 25, false}}},
		{name: "back to what it was now and then, without end", looks: []look{
			{0, "1", write, false, 25, false}, {500, "old", write, false, 25, false}, {990, "2", write, false, 9, false}, {1000, "3", write, true, 0, false}}},
		{name: "renamed", looks: []look{{0, "new", event | renamed, true, 0, false}}},
		{name: "renamed and written, in an order not known", looks: []look{{0, "new", write | renamed, false, 25, false}, {26, "new", 0, true, 0, false}}},
		{name: "renamed, written later", looks: []look{{0, "new", event | renamed, true, 0, false}, {5, "n", write, false, 25, false}, {31, "newer", 0, false, 25, false}}},
		{name: "renamed while another was being written", looks: []look{{0, "n", write, false, 25, false}, {9, "new", event | renamed, true, 0, false}}},
		{name: "renamed, at first not readable for a passing reason", looks: []look{
			{0, "", event | renamed, false, 1, true}, {2, "", 0, false, 3, true}, {6, "new", 0, true, 0, false}}},
		{name: "renamed, not readable, then written", looks: []look{
			{0, "", event | renamed, false, 1, true}, {2, "n", write, false, 25, false}, {28, "new", 0, false, 25, false}}},
		{name: "no good, renamed", looks: []look{{0, "", event | renamed, false, 25, false}, {26, "", 0, true, 0, false}, {60, "", event, true, 0, false}}},
		{name: "gone for a moment", looks: []look{{0, "", event, false, 25, false}, {24, "old", event, false, 25, false}, {50, "old", 0, true, 0, false}, {60, "", 0, false, 25, false}, {86, "", 0, true, 0, false}}},
		{name: "never at rest", looks: []look{
			{0, "1", write, false, 25, false}, {500, "2", write, false, 25, false}, {980, "3", write, false, 19, false}, {1000, "4", write, true, 0, false},
			{1001, "5", write, false, 25, false}, {2000, "6", write, false, 0, false}, {2001, "7", write, true, 0, false}}},
		{name: "good and no good in turn, without end", looks: []look{
			{0, "1", write, false, 25, false}, {600, "2", write, false, 25, false}, {1100, "", write, false, 25, false}, {1200, "3", write, true, 0, false}}},
		{name: "good now and then, and else no good, with nothing announced", looks: []look{
			{0, "", 0, false, 25, false}, {26, "", 0, true, 0, false}, {60, "1", 0, false, 25, false}, {86, "", 0, false, 25, false}, {112, "", 0, false, 25, false},
			{600, "2", 0, false, 25, false}, {626, "", 0, false, 25, false}, {700, "", 0, false, 25, false}, {1070, "3", 0, true, 0, false}}},
		{name: "good, then no good without end", looks: []look{
			{0, "", write, false, 25, false}, {600, "1", write, false, 25, false}, {1590, "", write, false, 10, false}, {1601, "", write, true, 0, false}}},
		{name: "no good, and touched without end", looks: []look{
			{0, "", write, false, 25, false}, {500, "", write, false, 25, false}, {1000, "", write, true, 0, false}, {1100, "", write, true, 0, false}}},
		{name: "a passing error that stays", looks: []look{
			{0, "", event, false, 1, true}, {2, "", 0, false, 3, true}, {6, "", 0, false, 7, true}, {600, "", 0, false, 399, true}, {1000, "", 0, true, 0, true}, {2000, "", 0, true, 0, true}}},
		{name: "first, modified long ago", first: true, modified: -60001, looks: []look{{0, "new", asked, true, 0, false}}},
		{name: "first, modified a minute ago", first: true, modified: -60000, looks: []look{{0, "new", asked, false, 25, false}, {26, "new", 0, true, 0, false}}},
		{name: "first, modified in the future", first: true, modified: 1e9, looks: []look{{0, "new", asked, false, 25, false}, {26, "new", 0, true, 0, false}}},
		{name: "first, modified long ago, being written", first: true, modified: -1e6, looks: []look{{0, "n", asked | write, false, 25, false}, {26, "new", 0, true, 0, false}}},
		{name: "first, no good", first: true, modified: -1e6, looks: []look{{0, "", asked, false, 25, false}, {26, "", 0, true, 0, false}}},
		{name: "first, a passing error", first: true, looks: []look{{0, "", asked, false, 1, true}, {2, "new", 0, false, 25, false}, {28, "new", 0, true, 0, false}}},
		{name: "first, never at rest", first: true, looks: []look{{0, "1", asked, false, 25, false}, {500, "2", 0, false, 25, false}, {1000, "3", 0, true, 0, false}}},
		{name: "first, no good, and touched without end", first: true, looks: []look{{0, "", asked | write, false, 25, false}, {500, "", write, false, 25, false}, {1000, "", write, true, 0, false}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			at := func(ms int) time.Time { return time.Unix(1e9, int64(ms)*1e6) }
			var s settling
			if !test.first {
				s.acted, s.had = reading{value: "old"}, true
			}
			for _, look := range test.looks {
				r := reading{value: look.value, info: stamp{modified: at(test.modified)}, passing: look.passing}
				if r.value == "" {
					r.err, r.info = errors.New("no good"), nil
				}
				act, again := s.decide(r, look.hints, at(look.at), at(look.at+1))
				if act != look.act || again != time.Duration(look.again)*time.Millisecond {
					t.Errorf("at %d ms: %v, %v, want %v, %d ms", look.at, act, again, look.act, look.again)
				}
			}
		})
	}
}

// TestRests: when a file is only looked at. It was found as it is at 0 s.
func TestRests(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	put := func(content string, modified int64) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, time.Unix(modified, 0), time.Unix(modified, 0)); err != nil {
			t.Fatal(err)
		}
	}
	again := func() { put("value", 1e9) }
	for _, test := range []struct {
		name      string
		read, now int // seconds
		since     time.Time
		err       error
		change    func()
		want      bool
	}{
		{name: "unchanged", read: 2, now: 3, change: again, want: true},
		{name: "found too soon before it was read", read: 1, now: 3, change: again},
		{name: "read too long ago", read: 2, now: 62, change: again},
		{name: "being settled", read: 2, now: 3, since: time.Unix(1e9, 0), change: again},
		{name: "no good", read: 2, now: 3, err: errors.New("no good"), change: again},
		{name: "another time", read: 2, now: 3, change: func() { put("value", 1e9+1) }},
		{name: "another size", read: 2, now: 3, change: func() { put("values", 1e9) }},
		{name: "another file", read: 2, now: 3, change: func() {
			if err := os.Rename(path, path+".old"); err != nil {
				t.Fatal(err)
			}
			put("value", 1e9)
		}},
		{name: "gone", read: 2, now: 3, change: func() {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			put("value", 1e9)
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			start := time.Unix(1e9, 0)
			at := func(s int) time.Time { return start.Add(time.Duration(s) * time.Second) }
			f := &file{path: path, info: info, seen: start, began: at(test.read)}
			f.acted, f.since = reading{value: "value", err: test.err}, test.since
			test.change()
			if got := f.rests(at(test.now)); got != test.want {
				t.Errorf("%v, want %v", got, test.want)
			}
		})
	}
}

// TestJoinDuringLook: a watch that joins while its file is being looked at is answered
// by that look or by one that follows at once, at whatever step it joins.
func TestJoinDuringLook(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("value"), 0o600); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
	for at := range 4 {
		h := newHub(func() (*upstream.Watcher, error) { return nil, errors.New("turned off") })
		f := &file{hub: h, path: path, wake: make(chan struct{}, 1), watches: make(map[*watch]bool)}
		h.files[path] = f // so that nobody else runs it
		var watches []*watch
		join := func() {
			w := &watch{poll: time.Hour, first: make(chan reading, 1), values: make(chan string, 1)}
			h.join(path, w)
			watches = append(watches, w)
		}
		join()
		for first := true; len(f.wake) > 0; first = false { // as in run
			step := func(n int) {
				if first && n == at {
					join()
				}
			}
			<-f.wake
			step(0)
			hints := f.hints.Swap(0)
			step(1)
			poll, heard, _ := h.turn(f)
			step(2)
			f.due = time.Now().Add(f.look(hints, poll, heard))
			step(3)
		}
		for i, w := range watches {
			if len(w.first) == 0 {
				t.Errorf("watch %d was not answered, the second joined at step %d", i, at)
			}
		}
	}
}

// TestReplaced: when a file is taken to be replaced outside its mount.
func TestReplaced(t *testing.T) {
	var linked, unlinked [2]fs.FileInfo
	for i := range linked {
		f, err := os.Create(filepath.Join(t.TempDir(), "file"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if linked[i], err = f.Stat(); err != nil {
			t.Fatal(err)
		}
		if os.Remove(f.Name()) != nil {
			t.Skip("a file that is open cannot be removed here")
		}
		if unlinked[i], err = f.Stat(); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name      string
		then, now fs.FileInfo
		apart     time.Duration
		want      bool
	}{
		{"without a link for a quiet time", unlinked[0], unlinked[0], quietTime, true},
		{"without a link for an instant", unlinked[0], unlinked[0], quietTime - 1, false},
		{"without a link since now", linked[0], unlinked[0], time.Hour, false},
		{"another file", unlinked[1], unlinked[0], time.Hour, false},
		{"with a link", linked[0], linked[0], time.Hour, false},
		{"not there before", nil, unlinked[0], time.Hour, false},
		{"not there now", unlinked[0], nil, time.Hour, false},
		{"not there", nil, nil, time.Hour, false},
	} {
		if got := replaced(test.then, test.now, test.apart); got != test.want {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
		}
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
