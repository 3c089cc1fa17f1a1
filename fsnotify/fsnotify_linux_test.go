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
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
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
func inotifyWatches(t *testing.T) int { return len(inotifyLines(t)) }

// watchesInode reports whether one of them is for what has this number.
func watchesInode(t *testing.T, ino uint64) bool {
	return slices.ContainsFunc(inotifyLines(t), func(line string) bool { return strings.Contains(line, fmt.Sprintf(" ino:%x ", ino)) })
}

// inotifyLines returns what the kernel says of the process's watches.
func inotifyLines(t *testing.T) (watches []string) {
	for _, fd := range inotifyFDs() {
		info, err := os.Open("/proc/self/fdinfo/" + fd)
		if err != nil {
			t.Fatal(err)
		}
		for lines := bufio.NewScanner(info); lines.Scan(); {
			if strings.HasPrefix(lines.Text(), "inotify wd:") {
				watches = append(watches, lines.Text())
			}
		}
		info.Close()
	}
	return watches
}

// cpuTime returns what the process has used of the processors.
func cpuTime(tb testing.TB) time.Duration {
	var use syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &use); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(use.Utime.Nano() + use.Stime.Nano())
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
		{name: "written through a memory map", poll: true, mmap: true, change: func(f *file) string {
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

// TestWholeSeconds: all changes, on a file system whose times are in whole seconds.
func TestWholeSeconds(t *testing.T) {
	f := &file{T: t, dir: t.TempDir(), whole: make(map[string]bool)}
	image := f.join("image")
	write(t, image, "")
	f.check(os.Truncate(image, 64<<20))
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-I", "128", "-O", "^metadata_csum", image).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED, no file system with times in whole seconds to test on: mke2fs: %v: %s", err, out)
	}
	f.mkdir("mnt")
	if out, err := exec.Command("mount", "-o", "loop", image, f.join("mnt")).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED, no file system with times in whole seconds to test on: mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", "-l", f.join("mnt")).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	write(t, f.join("mnt/stamp"), "")
	info, err := os.Stat(f.join("mnt/stamp"))
	f.check(err)
	if info.ModTime().Nanosecond() != 0 {
		t.Fatalf("the time of a file there is %v, want whole seconds", info.ModTime())
	}
	t.Setenv("TMPDIR", f.join("mnt"))
	for name, s := range map[string]*fsnotify.Strategy{"notified": fsnotify.NewStrategy(), "polled": deaf()} {
		t.Run(name, func(t *testing.T) {
			for _, row := range rows {
				options := poll(notEvents)
				if name == "polled" || row.poll {
					options = poll(20 * time.Millisecond)
				}
				t.Run(row.name, func(t *testing.T) { testChange(t, s, row, options, 0) })
			}
		})
	}
	t.Run("first read", func(t *testing.T) {
		for range 40 {
			f := &file{T: t, dir: t.TempDir(), whole: make(map[string]bool)}
			start := time.Now()
			write(t, f.join("file"), "val")
			done := make(chan struct{})
			go func() {
				defer close(done)
				f.chunks("file", os.O_APPEND, "ue", " 0")
				if f.may("value 0"); time.Since(start) >= fsnotify.QuietTime {
					f.may("val", "value")
				}
			}()
			value, _, err := fsnotify.NewStrategy().Watch(t.Context(), f.join("file"), nil)
			<-done
			if err != nil || !f.whole[value] {
				t.Errorf("Watch: %q, %v; want value 0", value, err)
			}
		}
	})
}

// TestPassingErrors: a file that cannot be read for a moment, for a reason that is not in
// it, is read when that has passed, at first and later.
func TestPassingErrors(t *testing.T) {
	for _, test := range []struct {
		name string
		fail func(t *testing.T, path string) (failed <-chan struct{}, end func())
	}{
		{"out of descriptors", func(t *testing.T, path string) (<-chan struct{}, func()) {
			var was syscall.Rlimit
			if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 0, Max: was.Max}); err != nil {
				t.Fatal(err)
			}
			failed := make(chan struct{})
			time.AfterFunc(enough, func() { close(failed) })
			return failed, func() {
				if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
					t.Error(err)
				}
			}
		}},
		{"a lease", func(t *testing.T, path string) (<-chan struct{}, func()) {
			holder, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			asks := make(chan os.Signal, 100) // the kernel's, to give the lease up
			signal.Notify(asks, syscall.SIGIO)
			const setLease = 1024
			if _, _, errno := syscall.Syscall(syscall.SYS_FCNTL, holder.Fd(), setLease, syscall.F_WRLCK); errno != 0 {
				t.Skip("SKIPPED, no leases to be had: ", errno)
			}
			failed := make(chan struct{})
			go func() { <-asks; time.Sleep(enough); close(failed) }()
			return failed, func() {
				signal.Stop(asks)
				holder.Close()
			}
		}},
	} {
		for name, s := range map[string]*fsnotify.Strategy{"notified": fsnotify.NewStrategy(), "polled": deaf()} {
			t.Run(test.name+"/"+name, func(t *testing.T) {
				log := captureLogs(t)
				path := filepath.Join(t.TempDir(), "file")
				write(t, path, "value 0")
				other := filepath.Join(t.TempDir(), "file") // so that there is a watcher
				write(t, other, "value 0")
				watchFile(t, t.Context(), s, other, poll(notEvents))
				watches := func(n int) { // so that what happens is announced, where anything is
					await(t, fmt.Sprint(n, " watches"), func() bool { return name == "polled" || inotifyWatches(t) == n })
				}
				watches(2)

				failed, end := test.fail(t, path)
				done := make(chan error, 1)
				go func() {
					value, _, err := s.Watch(t.Context(), path, poll(notEvents))
					if err == nil && value != "value 0" {
						err = fmt.Errorf("%q", value)
					}
					done <- err
				}()
				select {
				case <-failed:
				case err := <-done:
					t.Errorf("Watch: %v, before it could have read the file", err)
				}
				end()
				if err := <-done; err != nil {
					t.Errorf("Watch: %v, want value 0", err)
				}

				if name == "polled" {
					return // when a poll comes is not this test's matter
				}
				_, values := watchFile(t, t.Context(), s, path, poll(notEvents))
				watches(4)
				write(t, path+".new", "value 1")
				failed, end = test.fail(t, path+".new")
				if err := os.Rename(path+".new", path); err != nil {
					t.Error(err)
				}
				<-failed
				end()
				start := time.Now()
				if got := receive(t, values); got != "value 1" {
					t.Errorf("received %q, want value 1", got)
				}
				if took := time.Since(start); took > patience/5 {
					t.Errorf("received after %v", took)
				}
				for _, line := range log.lines() {
					if strings.Contains(line, "unusable") {
						t.Errorf("logged %q", line)
					}
				}
			})
		}
	}
}

// TestPassingErrorStays: one that does not pass is the reason that Watch returns, or logs,
// in about a second, and the file is read when it has passed after all.
func TestPassingErrorStays(t *testing.T) {
	log := captureLogs(t)
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, "value 0")
	s := fsnotify.NewStrategy()
	_, values := watchFile(t, t.Context(), s, path, poll(notEvents))
	await(t, "2 watches", func() bool { return inotifyWatches(t) == 2 })
	write(t, path+".new", "value 1")
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 0, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	renamed := os.Rename(path+".new", path)
	await(t, "the reason", func() bool { return len(log.lines()) > 0 })
	_, _, err := s.Watch(t.Context(), path, poll(notEvents))
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if renamed != nil || !errors.Is(err, syscall.EMFILE) || !strings.Contains(err.Error(), path) {
		t.Errorf("Watch: %v, want too many open files", err)
	}
	if got := log.lines(); len(got) != 1 || !strings.Contains(got[0], "file unusable") || !strings.Contains(got[0], "too many open files") {
		t.Errorf("logged %q", got)
	}
	if got := receive(t, values); got != "value 1" {
		t.Errorf("received %q, want value 1", got)
	}
}

// TestReplacedOutsideMount: a single file that is mounted and replaced at its source cannot
// be followed, which is logged once.
func TestReplacedOutsideMount(t *testing.T) {
	for name, s := range map[string]*fsnotify.Strategy{"notified": fsnotify.NewStrategy(), "polled": deaf()} {
		t.Run(name, func(t *testing.T) {
			f := &file{T: t, dir: t.TempDir(), whole: make(map[string]bool)}
			f.mkdir("outside")
			f.put("outside/file", "value 0")
			f.put("file", "")
			unmount := mount(f, f.join("outside/file"), f.join("file"))
			log := captureLogs(t)
			options := poll(notEvents)
			if name == "polled" {
				options = poll(10 * time.Millisecond)
			}
			_, values := watchFile(t, t.Context(), s, f.join("file"), options)
			said := func() (n int) {
				for _, line := range log.lines() {
					if line == `level=WARN msg="hotload: file replaced outside its mount, changes cannot be seen" strategy=fsnotify path=`+f.join("file") {
						n++
					}
				}
				return n
			}
			f.put("outside/file", "value 1")
			if got := receive(t, values); got != "value 1" || said() != 0 {
				t.Fatalf("received %q, want value 1; logged %q", got, log.lines())
			}
			f.rename("outside/file", "value 2")
			await(t, "a line in the log", func() bool { return said() > 0 })
			f.check(os.Chmod(f.join("file"), 0o600)) // to be read again
			f.check(os.Chmod(f.join("file"), 0o644))
			time.Sleep(4 * fsnotify.QuietTime)
			if n := said(); n != 1 {
				t.Errorf("logged %d times, want once", n)
			}
			if len(values) != 0 {
				t.Errorf("received %q", <-values)
			}
			unmount()
			f.rename("file", "value 3")
			if got := receive(t, values); got != "value 3" {
				t.Errorf("received %q, want value 3", got)
			}
		})
	}
}

// TestReplacedInside: a file that is renamed over, even while it is held open, is no file
// replaced outside its mount.
func TestReplacedInside(t *testing.T) {
	log := captureLogs(t)
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, "value 0")
	_, values := watchFile(t, t.Context(), fsnotify.NewStrategy(), path, poll(10*time.Millisecond))
	for i := range 300 {
		held, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		replace(t, path, fmt.Sprint("value ", i+1))
		receive(t, values)
		held.Close()
	}
	if got := log.lines(); len(got) != 0 {
		t.Errorf("logged %q", got)
	}
}

// TestReadOnceInAQuietTime: a large file is not read at each of its changes.
func TestReadOnceInAQuietTime(t *testing.T) {
	read := func() (n int64) { // bytes read by the process
		t.Helper()
		io, err := os.ReadFile("/proc/self/io")
		if err != nil {
			t.Skip("SKIPPED, what is read is not counted: ", err)
		}
		if _, err := fmt.Sscanf(string(io), "rchar: %d", &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	const size = 900_000
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, strings.Repeat("x", size))
	_, values := watchFile(t, t.Context(), fsnotify.NewStrategy(), path, poll(notEvents))
	w, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for _, what := range []string{"written", "touched"} {
		start, before, changes := time.Now(), read(), 0
		for ; time.Since(start) < 60*fsnotify.QuietTime; changes++ {
			if what == "written" {
				_, err = w.WriteAt(fmt.Append(nil, changes), 0)
			} else {
				err = os.Chtimes(path, time.Time{}, time.Unix(int64(changes), 0))
			}
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
		n, limit := (read()-before)/size, 5+int64(time.Since(start)/fsnotify.QuietTime)
		t.Logf("read %d times for %d changes", n, changes)
		if n > limit {
			t.Errorf("%s %d times, and read %d times, want at most %d", what, changes, n, limit)
		}
		if what == "written" {
			for v := receive(t, values); !strings.HasPrefix(v, fmt.Sprint(changes-1)); v = receive(t, values) {
			}
		}
	}
}

// TestOnlyLookedAt: a file that is at rest is not read at each poll, nor when upstream
// finds that a watch has ended, as it does when an editor saves another file.
func TestOnlyLookedAt(t *testing.T) {
	var w *upstream.Watcher
	s := fsnotify.NewStrategyWith(func() (_ *upstream.Watcher, err error) {
		w, err = upstream.NewWatcher()
		return w, err
	})
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, "value 0")
	_, values := watchFile(t, t.Context(), s, path, poll(10*time.Millisecond))
	time.Sleep(fsnotify.FileTick + 10*fsnotify.QuietTime)
	// An open would wait, and so would what comes after it.
	hang(t, path, opens)
	w.Errors <- syscall.EINVAL
	time.Sleep(10 * fsnotify.QuietTime)
	replace(t, path, "value 1")
	if got := receive(t, values); got != "value 1" {
		t.Errorf("received %q, want value 1", got)
	}
}

// TestRootDirectory: events of the files there have names of a form of their own.
func TestRootDirectory(t *testing.T) {
	w, err := os.CreateTemp("/", "hotload-test-")
	if err != nil {
		t.Skip(err)
	}
	defer os.Remove(w.Name())
	if _, _, err := fsnotify.NewStrategy().Watch(t.Context(), "/", nil); err == nil || !strings.Contains(err.Error(), "/ is a directory, want a regular file") {
		t.Errorf("Watch of the directory: %v", err)
	}
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
	old := time.Now().Add(-time.Hour)
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

// TestWrittenAfterRename: what was put in place by rename is not whole if it is written to
// before it has been read.
func TestWrittenAfterRename(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, "value 0")
	_, values := watchFile(t, t.Context(), fsnotify.NewStrategy(), path, poll(notEvents))
	write(t, path+".new", "value 1")
	release := hang(t, path+".new", reads)
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	time.Sleep(enough)
	write(t, path, "val")
	time.Sleep(enough)
	start := time.Now()
	release()
	if err := over(path, os.O_APPEND, "ue 2"); err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	if got := receive(t, values); got != "value 2" && took < fsnotify.QuietTime {
		t.Errorf("received %q, want value 2", got)
	}
}

// TestChangedWhileFollowing: what changes between the finding of the names to follow
// and their following is not announced, and must be found nevertheless.
func TestChangedWhileFollowing(t *testing.T) {
	t.Run("the value too", func(t *testing.T) { testChangedWhileFollowing(t, "value 1") })
	t.Run("the way only", func(t *testing.T) { testChangedWhileFollowing(t, "value 0") })
}

func testChangedWhileFollowing(t *testing.T, then string) {
	f := &file{T: t, dir: t.TempDir(), whole: make(map[string]bool)}
	f.mkdir("1")
	f.mkdir("2")
	f.put("1/file", "value 0")
	f.put("2/file", then)
	f.link("1/file", "file")
	old := time.Now().Add(-time.Hour) // to be delivered at once, with nothing that brings another look
	f.check(os.Chtimes(f.join("1/file"), old, old))
	f.check(os.Chtimes(f.join("2/file"), old, old))
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
	if got.value != then {
		if got := receive(t, got.values); got != then {
			t.Errorf("received %q, want %s", got, then)
		}
	}
	info, err := os.Stat(f.join("2"))
	f.check(err)
	await(t, "a watch of the new directory", func() bool { return watchesInode(t, info.Sys().(*syscall.Stat_t).Ino) })
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
	old := time.Now().Add(-time.Hour)
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
