package fsnotify_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	upstream "github.com/fsnotify/fsnotify"
	"github.com/infobloxopen/hotload/fsnotify"
)

func mkfifo(path string) error { return syscall.Mkfifo(path, 0o644) }

// inotifyFDs returns the descriptors of the process's inotify instances.
func inotifyFDs() (fds []string) {
	all, _ := os.ReadDir("/proc/self/fd")
	for _, fd := range all {
		if target, _ := os.Readlink("/proc/self/fd/" + fd.Name()); strings.Contains(target, "inotify") {
			fds = append(fds, fd.Name())
		}
	}
	return fds
}

// inotifyWatches returns how many watches the kernel has for the process.
func inotifyWatches(t *testing.T) (n int) {
	for _, fd := range inotifyFDs() {
		info, err := os.Open("/proc/self/fdinfo/" + fd)
		if err != nil {
			t.Fatal(err)
		}
		for lines := bufio.NewScanner(info); lines.Scan(); {
			if strings.HasPrefix(lines.Text(), "inotify wd:") {
				n++
			}
		}
		info.Close()
	}
	return n
}

// mount binds source over target until the end of the test.
func mount(f *file, source, target string) (unmount func()) {
	f.Helper()
	if err := syscall.Mount(source, target, "", syscall.MS_BIND, ""); errors.Is(err, fs.ErrPermission) {
		f.Skipf("mounting needs root: %v", err)
	} else if err != nil {
		f.Fatal(err)
	}
	unmount = sync.OnceFunc(func() {
		if err := syscall.Unmount(target, syscall.MNT_DETACH); err != nil {
			f.Error(err)
		}
	})
	f.Cleanup(unmount)
	return unmount
}

func init() {
	rows = append(rows, []row{
		{name: "bind mount over it", poll: true, change: func(f *file) string {
			f.put("other", "value 1")
			unmount := mount(f, f.join("other"), f.path)
			time.Sleep(100 * time.Millisecond)
			f.put("other", "value 2") // renaming over a mount point is refused
			time.Sleep(100 * time.Millisecond)
			unmount()
			return "value 0"
		}},
		{name: "bind mount over its directory", path: "in/file", poll: true, setup: func(f *file) {
			f.mkdir("in")
			f.put("in/file", "value 0")
		}, change: func(f *file) string {
			f.mkdir("other")
			f.put("other/file", "value 1")
			mount(f, f.join("other"), f.join("in"))
			return "value 1"
		}},
		{name: "mounted file written at its source", setup: func(f *file) {
			f.mkdir("other")
			f.put("other/file", "value 0")
			f.put("file", "")
			mount(f, f.join("other/file"), f.path)
		}, mounted: true, change: func(f *file) string {
			f.put("other/file", "value 1")
			return "value 1"
		}},
		{name: "a FIFO in its place", change: func(f *file) string {
			f.check(os.Remove(f.path))
			f.check(mkfifo(f.path))
			w, err := os.OpenFile(f.path, os.O_RDWR, 0) // a reader would wait for it
			f.check(err)
			defer w.Close()
			time.Sleep(2 * fsnotify.QuietTime)
			f.check(os.Remove(f.path))
			f.put("file", "value 1")
			return "value 1"
		}},
		{name: "a socket in its place", change: func(f *file) string {
			f.check(os.Remove(f.path))
			l, err := net.Listen("unix", f.path)
			if err != nil {
				f.Skip(err) // the path is too long
			}
			time.Sleep(2 * fsnotify.QuietTime)
			f.check(l.Close())
			f.put("file", "value 1")
			return "value 1"
		}},
		{name: "a device in its place", change: func(f *file) string {
			f.link("/dev/zero", "file")
			time.Sleep(2 * fsnotify.QuietTime)
			f.rename("file", "value 1")
			return "value 1"
		}},
		{name: "exchanged with another", change: func(f *file) string {
			f.put("other", "value 1")
			renameat2 := map[string]uintptr{"amd64": 316, "arm64": 276}[runtime.GOARCH]
			if renameat2 == 0 {
				f.Skip("no number for renameat2")
			}
			from, _ := syscall.BytePtrFromString(f.join("other"))
			to, _ := syscall.BytePtrFromString(f.path)
			const atFDCWD, exchange = -100, 2
			at := atFDCWD
			_, _, errno := syscall.Syscall6(renameat2, uintptr(at), uintptr(unsafe.Pointer(from)), uintptr(at), uintptr(unsafe.Pointer(to)), exchange, 0)
			if errno != 0 {
				f.Skip(errno)
			}
			return "value 1"
		}},
		{name: "written through a memory map", poll: true, change: func(f *file) string {
			w, err := os.OpenFile(f.path, os.O_RDWR, 0)
			f.check(err)
			defer w.Close()
			m, err := syscall.Mmap(int(w.Fd()), 0, len("value 0"), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
			f.check(err)
			f.may("value 1")
			m[len(m)-1] = '1'
			f.check(syscall.Munmap(m))
			return "value 1"
		}},
	}...)
}

// TestRootDirectory: events of the files there have names of a form of their own.
func TestRootDirectory(t *testing.T) {
	w, err := os.CreateTemp("/", "hotload-test-")
	if err != nil {
		t.Skip(err)
	}
	defer os.Remove(w.Name())
	write(t, w.Name(), "value 0")
	_, values := watchFile(t, t.Context(), fsnotify.NewStrategy(), w.Name(), poll(notEvents))
	if err := os.Remove(w.Name()); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * fsnotify.QuietTime) // for the file's own watch to be of no help
	write(t, w.Name(), "value 1")
	if got := receive(t, values); got != "value 1" {
		t.Errorf("received %q, want value 1", got)
	}
}

// TestPermission: a file whose permission is lost keeps its value, and is read when
// it is restored. Root gives up its privileges for the time.
func TestPermission(t *testing.T) {
	dir, err := os.MkdirTemp("", "") // t.TempDir's is below one that only root can enter
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "file")
	write(t, path, "value 0")
	if os.Geteuid() == 0 {
		const nobody = 65534
		for _, name := range []string{dir, path} {
			if err := os.Chown(name, nobody, nobody); err != nil {
				t.Fatal(err)
			}
		}
		if err := syscall.Setreuid(-1, nobody); err != nil {
			t.Skip(err)
		}
		defer func() {
			if err := syscall.Setreuid(-1, 0); err != nil {
				t.Fatal(err)
			}
		}()
	}
	chmod := func(t *testing.T, name string, mode fs.FileMode) {
		t.Helper()
		if err := os.Chmod(name, mode); err != nil {
			t.Fatal(err)
		}
	}
	for name, s := range map[string]*fsnotify.Strategy{"notified": fsnotify.NewStrategy(), "polled": deaf()} {
		t.Run(name, func(t *testing.T) {
			chmod(t, path, 0o600)
			replace(t, path, "value 0")
			options := poll(notEvents)
			if name == "polled" {
				options = poll(10 * time.Millisecond)
			}
			value, values := watchFile(t, t.Context(), s, path, options)
			if value != "value 0" {
				t.Fatalf("Watch: %q, want value 0", value)
			}
			for i := range 3 {
				want := fmt.Sprint("value ", i+1)
				write(t, path+".new", want)
				chmod(t, path+".new", 0)
				if err := os.Rename(path+".new", path); err != nil {
					t.Fatal(err)
				}
				if _, _, err := s.Watch(t.Context(), path, nil); !errors.Is(err, fs.ErrPermission) {
					t.Errorf("Watch of an unreadable file: %v", err)
				}
				chmod(t, path, 0o400)
				if got := receive(t, values); got != want {
					t.Errorf("received %q, want %q", got, want)
				}
			}
			chmod(t, dir, 0)
			time.Sleep(2 * fsnotify.QuietTime)
			chmod(t, dir, 0o700)
			replace(t, path, "the end")
			if got := receive(t, values); got != "the end" {
				t.Errorf("received %q, want the end", got)
			}
		})
	}
}

// TestOneInstance: 500 watched files take one inotify instance, and two watches
// of the kernel for each at most; what no longer leads to a file takes none.
func TestOneInstance(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	path := func(i int) string { return filepath.Join(dir, fmt.Sprint("dir", i), "file") }
	var all []<-chan string
	for i := range 500 {
		if err := os.Mkdir(filepath.Dir(path(i)), 0o755); err != nil {
			t.Fatal(err)
		}
		replace(t, path(i), "value 0")
	}
	var wg sync.WaitGroup
	all = make([]<-chan string, 500)
	for i := range all {
		wg.Add(1)
		go func() {
			defer wg.Done()
			var err error
			if _, all[i], err = fsnotify.NewStrategy().Watch(ctx, path(i), poll(notEvents)); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	if n := len(inotifyFDs()); n != 1 {
		t.Errorf("%d inotify instances, want 1", n)
	}
	for i, values := range all {
		replace(t, path(i), fmt.Sprint("value ", i+1))
		if got, want := receive(t, values), fmt.Sprint("value ", i+1); got != want {
			t.Fatalf("received %q, want %q", got, want)
		}
	}
	await(t, "1000 watches", func() bool { return inotifyWatches(t) == 1000 })
	cancel()
	noLeftovers(t)

	// A watch for each link's directory, the target's and the target.
	link, ctx := filepath.Join(dir, "link"), t.Context()
	if err := os.Symlink(path(0), link); err != nil {
		t.Fatal(err)
	}
	_, values := watchFile(t, ctx, fsnotify.NewStrategy(), link, poll(notEvents))
	for i := range 100 {
		if err := os.Rename(path(i), path(i)+".old"); err != nil { // lives on
			t.Fatal(err)
		}
		write(t, path(i), "moved")
		replace(t, path(i), fmt.Sprint("moved ", i))
		if i > 0 {
			if err := os.Symlink(path(i), link+".new"); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(link+".new", link); err != nil {
				t.Fatal(err)
			}
		}
		for want := fmt.Sprint("moved ", i); receive(t, values) != want; {
		}
	}
	await(t, "3 watches", func() bool { return inotifyWatches(t) == 3 })
	watchFile(t, ctx, fsnotify.NewStrategy(), path(99), poll(notEvents))
	ctx, cancel = context.WithCancel(ctx)
	watchFile(t, ctx, fsnotify.NewStrategy(), path(98), poll(notEvents))
	watchFile(t, ctx, fsnotify.NewStrategy(), path(99)+".old", poll(notEvents))
	await(t, "6 watches", func() bool { return inotifyWatches(t) == 6 })
	cancel()
	await(t, "3 watches", func() bool { return inotifyWatches(t) == 3 })
	replace(t, path(99), "still watched")
	if got := receive(t, values); got != "still watched" {
		t.Errorf("received %q", got)
	}
}

// TestWatchesMoveOn: what is mounted over takes no watch of the kernel, though
// nothing announces it.
func TestWatchesMoveOn(t *testing.T) {
	f := &file{T: t, dir: t.TempDir(), whole: make(map[string]bool)}
	f.mkdir("in")
	f.mkdir("other")
	f.put("in/file", "value 0")
	f.put("other/file", "value 1")
	_, values := watchFile(t, t.Context(), fsnotify.NewStrategy(), f.join("in/file"), poll(10*time.Millisecond))
	unmount := mount(f, f.join("other"), f.join("in"))
	if got := receive(t, values); got != "value 1" {
		t.Errorf("received %q, want value 1", got)
	}
	await(t, "2 watches", func() bool { return inotifyWatches(t) == 2 })
	unmount()
	if got := receive(t, values); got != "value 0" {
		t.Errorf("received %q, want value 0", got)
	}
	await(t, "2 watches", func() bool { return inotifyWatches(t) == 2 })
}

// TestInodeReused: a directory that is made again is watched again, though it may
// have the number of the one removed.
func TestInodeReused(t *testing.T) {
	f := &file{T: t, dir: t.TempDir(), whole: make(map[string]bool)}
	f.mkdir("in")
	f.put("in/file", "value 0")
	s := fsnotify.NewStrategy()
	_, values := watchFile(t, t.Context(), s, f.join("in/file"), poll(notEvents))
	for i := range 10 {
		release := s.Stall() // so that nothing is seen to be missing
		f.check(os.RemoveAll(f.join("in")))
		f.mkdir("in")
		f.put("in/file", fmt.Sprint("made ", i))
		release()
		if got, want := receive(t, values), fmt.Sprint("made ", i); got != want {
			t.Fatalf("received %q, want %q", got, want)
		}
		f.rename("in/file", fmt.Sprint("renamed ", i))
		if got, want := receive(t, values), fmt.Sprint("renamed ", i); got != want {
			t.Fatalf("received %q, want %q", got, want)
		}
	}
}

// TestOverflow: when events were lost all files are read again.
func TestOverflow(t *testing.T) {
	limit, err := os.ReadFile("/proc/sys/fs/inotify/max_queued_events")
	if err != nil {
		t.Skip(err)
	}
	n, err := strconv.Atoi(string(bytes.TrimSpace(limit)))
	if err != nil || n > 1<<17 {
		t.Skipf("max_queued_events is %s", limit)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	write(t, path, "value 0")
	s := fsnotify.NewStrategy()
	_, values := watchFile(t, t.Context(), s, path, poll(notEvents))
	release := s.Stall()
	for i := range n + 10000 { // as upstream has room for some; in turn, or they count as one
		noise := filepath.Join(dir, fmt.Sprint("noise", i%2))
		if i < 2 {
			write(t, noise, "")
		}
		if err := os.Chmod(noise, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	replace(t, path, "value 1")
	release()
	if got := receive(t, values); got != "value 1" {
		t.Errorf("received %q, want value 1", got)
	}
}

// hang makes every open or read of the file that is at path now wait for release. An
// open waits when it has found the file.
func hang(t *testing.T, path string, event uintptr) (release func()) {
	t.Helper()
	// Who listens for permission events and does not answer them does that.
	const classContent, cloexec, markAdd, atFDCWD = 4, 1, 1, -100
	fd, _, errno := syscall.Syscall(syscall.SYS_FANOTIFY_INIT, classContent|cloexec, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if errno != 0 {
		t.Skip("fanotify: ", errno)
	}
	release = sync.OnceFunc(func() { syscall.Close(int(fd)) })
	t.Cleanup(release)
	name, _ := syscall.BytePtrFromString(path)
	at := atFDCWD
	if _, _, errno := syscall.Syscall6(syscall.SYS_FANOTIFY_MARK, fd, markAdd, event, uintptr(at), uintptr(unsafe.Pointer(name)), 0); errno != 0 {
		t.Skip("fanotify: ", errno)
	}
	return release
}

const opens, reads = 0x10000, 0x20000 // FAN_OPEN_PERM, FAN_ACCESS_PERM

const enough = 50 * time.Millisecond // to get to where it hangs; if not, nothing is tested

// TestWrittenWhileReading: what is read while it is written is no value, though it had
// not been modified for long.
func TestWrittenWhileReading(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, "value 0")
	w, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	old := time.Now().Add(-time.Minute)
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
	release := hang(t, path, reads)
	first := make(chan string)
	go func() {
		value, _, err := deaf().Watch(t.Context(), path, nil)
		if err != nil {
			t.Error(err)
		}
		first <- value
	}()
	time.Sleep(enough)
	if _, err := w.WriteString("val"); err != nil {
		t.Fatal(err)
	}
	if err := w.Truncate(3); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	release()
	if _, err := w.WriteString("ue 1"); err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	if got := <-first; got != "value 1" && took < fsnotify.QuietTime {
		t.Errorf("Watch: %q, want value 1", got)
	}
}

// TestChangedWhileFollowing: what changes between the finding of the names to follow
// and their following is not announced, and must be found nevertheless.
func TestChangedWhileFollowing(t *testing.T) {
	f := &file{T: t, dir: t.TempDir(), whole: make(map[string]bool)}
	f.mkdir("1")
	f.mkdir("2")
	f.put("1/file", "value 0")
	f.put("2/file", "value 1")
	f.link("1/file", "file")
	time.Sleep(enough) // to be delivered at once, with nothing that brings another look
	found, follow := make(chan struct{}), make(chan struct{})
	s := fsnotify.NewStrategyWith(func() (*upstream.Watcher, error) {
		close(found)
		<-follow
		return upstream.NewWatcher()
	})
	type result struct {
		value  string
		values <-chan string
	}
	first := make(chan result)
	go func() {
		value, values, err := s.Watch(t.Context(), f.join("file"), poll(notEvents))
		if err != nil {
			t.Error(err)
		}
		first <- result{value, values}
	}()
	<-found
	f.link("2/file", "file")
	close(follow)
	got := <-first
	if got.value != "value 1" {
		t.Errorf("Watch: %q, want value 1", got.value)
	}
	time.Sleep(enough)
	f.rename("2/file", "value 2")
	if got := receive(t, got.values); got != "value 2" {
		t.Errorf("received %q, want value 2", got)
	}
}

// TestChangedWhileReading: a file that is replaced after it was opened and before it
// was read.
func TestChangedWhileReading(t *testing.T) {
	s := fsnotify.NewStrategy()
	path := filepath.Join(t.TempDir(), "file")
	old := time.Now().Add(-time.Minute)
	put := func(value string) {
		t.Helper()
		write(t, path+".new", value)
		if err := os.Chtimes(path+".new", old, old); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	type result struct {
		value  string
		values <-chan string
		err    error
	}
	watch := func() <-chan result {
		done := make(chan result, 1)
		go func() {
			value, values, err := s.Watch(t.Context(), path, poll(notEvents))
			done <- result{value, values, err}
		}()
		time.Sleep(enough)
		return done
	}

	put("value 0")
	release := hang(t, path, opens)
	first := watch()
	put("value 1")
	release()
	one := <-first
	if one.err != nil {
		t.Fatal(one.err)
	}
	if one.value != "value 1" {
		if got := receive(t, one.values); got != "value 1" {
			t.Errorf("received %q, want value 1, which came while the first value was read", got)
		}
	}

	release = hang(t, path, opens)
	if err := os.Chmod(path, 0o600); err != nil { // to be read again
		t.Fatal(err)
	}
	time.Sleep(enough)
	put("value 2")
	second := watch()
	release()
	if two := <-second; two.err != nil || two.value != "value 2" {
		t.Errorf("Watch: %q, %v; want value 2, which was there when it was called", two.value, two.err)
	}
}

// TestHungFile: a file that cannot be opened to the end holds up nothing else: not
// its Watch past the context, nor another file.
func TestHungFile(t *testing.T) {
	dir := t.TempDir()
	hung, path := filepath.Join(dir, "hung"), filepath.Join(dir, "file")
	write(t, hung, "value 0")
	write(t, path, "value 0")

	release := hang(t, hung, opens)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	done := make(chan error)
	go func() {
		_, _, err := fsnotify.NewStrategy().Watch(ctx, hung, nil)
		done <- err
	}()
	_, values := watchFile(t, t.Context(), fsnotify.NewStrategy(), path, poll(notEvents))
	for i := range 10 {
		want := fmt.Sprint("value ", i+1)
		replace(t, path, want)
		if got := receive(t, values); got != want {
			t.Errorf("received %q, want %q", got, want)
		}
	}
	select {
	case err := <-done:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Watch of the file that hangs: %v", err)
		}
	case <-time.After(patience):
		t.Error("Watch does not end with its context")
	}
	release()
	await(t, "the stuck goroutine to end", func() bool { return strings.Count(leftovers(), ".(*file).run(") == 1 })
}

// TestHungFileOnce: watches of a file that cannot be opened to the end, one after
// another, are stuck in one goroutine.
func TestHungFileOnce(t *testing.T) {
	s := fsnotify.NewStrategy()
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, "value 0")
	release := hang(t, path, opens)
	for range 10 {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		if _, _, err := s.Watch(ctx, path, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Watch of a file that hangs: %v", err)
		}
		cancel()
	}
	if n := strings.Count(leftovers(), ".(*file).run("); n != 1 {
		t.Errorf("%d goroutines are stuck, want 1", n)
	}
	release()
	noLeftovers(t)

	write(t, path, "value 1")
	if got, _ := watchFile(t, t.Context(), s, path, nil); got != "value 1" {
		t.Errorf("Watch afterwards: %q, want value 1", got)
	}
}
