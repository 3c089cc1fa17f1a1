package fsnotify_test

import (
	"bytes"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	upstream "github.com/fsnotify/fsnotify"
	"github.com/infobloxopen/hotload"
	"github.com/infobloxopen/hotload/fsnotify"
)

// BenchmarkLatency measures from the return of the system call that completes a
// change until the consumer has the new value: through the strategy; through it
// until a pool has put the value in force and is about to log that; and through
// a bare upstream watcher whose receiver reads the file. The strategy's in-place
// figures include the quiet time. Where there is one the files are in a memory
// file system: on a disk most deliveries are over before the rename returns.
func BenchmarkLatency(b *testing.B) {
	watchers := []struct {
		name  string
		start func(b *testing.B, path string) (values <-chan string, received func() time.Time)
	}{
		{"hotload", func(b *testing.B, path string) (<-chan string, func() time.Time) {
			_, values, err := fsnotify.NewStrategy().Watch(b.Context(), path, nil)
			if err != nil {
				b.Fatal(err)
			}
			return values, time.Now
		}},
		{"in-force", inForce},
		{"bare", bare},
	}
	changes := []struct {
		name   string
		change func(b *testing.B, path, value string) time.Time
	}{
		{"rename", func(b *testing.B, path, value string) time.Time {
			write(b, path+".new", value)
			if err := os.Rename(path+".new", path); err != nil {
				b.Fatal(err)
			}
			return time.Now()
		}},
		{"in-place", func(b *testing.B, path, value string) time.Time {
			write(b, path, value)
			return time.Now()
		}},
	}
	for _, change := range changes {
		for _, watcher := range watchers {
			b.Run(change.name+"/"+watcher.name, func(b *testing.B) {
				if _, err := os.Stat("/dev/shm"); err == nil {
					b.Setenv("TMPDIR", "/dev/shm")
				}
				path := filepath.Join(b.TempDir(), "file")
				write(b, path, "value 0")
				values, received := watcher.start(b, path)
				var took []time.Duration
				for b.Loop() {
					value := fmt.Sprint("value ", len(took)+1)
					start := change.change(b, path, value)
					for got := range values {
						if got == value {
							break
						}
					}
					took = append(took, received().Sub(start))
				}
				slices.Sort(took)
				us := func(p int) float64 { return float64(took[(len(took)-1)*p/100].Nanoseconds()) / 1e3 }
				b.ReportMetric(us(50), "p50-us")
				b.ReportMetric(us(99), "p99-us")
				b.ReportMetric(0, "ns/op") // would count the writing too
			})
		}
	}
}

// inForce sends the value of a pool when it has been put in force. When that was
// known can be asked afterwards.
func inForce(b *testing.B, path string) (<-chan string, func() time.Time) {
	var at atomic.Value
	d := valueDriver{make(chan string, 1), make(chan string, 1), &at}
	name := fmt.Sprintf("bench%d", benches.Add(1))
	hotload.Register(name, d)
	old := slog.Default()
	slog.SetDefault(slog.New(d))
	b.Cleanup(func() { slog.SetDefault(old) })
	db, err := sql.Open("hotload", "fsnotify://"+name+path)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { db.Close() })
	db.Ping() // starts the watch; the driver refuses to connect
	<-d.accepted
	return d.accepted, func() time.Time { return at.Load().(time.Time) }
}

var benches atomic.Int32

// A valueDriver hears of values when it makes a connector of them, and, as a
// log handler, when they have been put in force.
type valueDriver struct {
	offered, accepted chan string
	at                *atomic.Value // when the last was accepted
}

func (d valueDriver) OpenConnector(value string) (driver.Connector, error) {
	d.offered <- value
	return d, nil
}

func (d valueDriver) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "hotload: value accepted" {
		d.at.Store(time.Now())
		d.accepted <- <-d.offered
	}
	return nil
}

func (valueDriver) Enabled(context.Context, slog.Level) bool     { return true }
func (d valueDriver) WithAttrs([]slog.Attr) slog.Handler         { return d }
func (d valueDriver) WithGroup(string) slog.Handler              { return d }
func (d valueDriver) Driver() driver.Driver                      { return d }
func (valueDriver) Open(string) (driver.Conn, error)             { return nil, errors.ErrUnsupported }
func (valueDriver) Connect(context.Context) (driver.Conn, error) { return nil, errors.ErrUnsupported }

// bare sends the content of path after each event of its directory.
func bare(b *testing.B, path string) (<-chan string, func() time.Time) {
	w, err := upstream.NewWatcher()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { w.Close() })
	if err := w.Add(filepath.Dir(path)); err != nil {
		b.Fatal(err)
	}
	values := make(chan string, 1)
	go func() {
		var last []byte
		for e := range w.Events {
			if e.Name != path {
				continue
			}
			if content, err := os.ReadFile(path); err == nil && len(content) > 0 && !bytes.Equal(content, last) {
				last = content
				values <- string(content)
			}
		}
	}()
	return values, time.Now
}

// BenchmarkIdle has 10,000 files watched, in one directory, in directories of their own,
// and without notifications. It states how long it takes to begin, what they cost while
// nothing happens (percent of one core), and how long a rename of one of them takes to arrive.
func BenchmarkIdle(b *testing.B) {
	const files = 10000
	for _, test := range []struct {
		name     string
		path     string // of one, %d is its number
		strategy *fsnotify.Strategy
	}{
		{"one-directory", "file%d", fsnotify.NewStrategy()},
		{"own-directories", "dir%d/file", fsnotify.NewStrategy()},
		{"polled", "file%d", deaf()},
	} {
		b.Run(test.name, func(b *testing.B) {
			if _, err := os.Stat("/dev/shm"); err == nil {
				b.Setenv("TMPDIR", "/dev/shm")
			}
			dir := b.TempDir()
			paths, values := make([]string, files), make([]<-chan string, files)
			for i := range paths {
				paths[i] = filepath.Join(dir, fmt.Sprintf(test.path, i))
				if err := os.MkdirAll(filepath.Dir(paths[i]), 0o755); err != nil {
					b.Fatal(err)
				}
				write(b, paths[i], "value 0")
			}
			ctx, cancel := context.WithCancel(b.Context())
			var wg sync.WaitGroup
			start := time.Now()
			for i, path := range paths {
				wg.Go(func() {
					var err error
					if _, values[i], err = test.strategy.Watch(ctx, path, nil); err != nil {
						b.Error(err)
					}
				})
			}
			wg.Wait()
			setUp := time.Since(start)

			time.Sleep(7 * time.Second) // the first polls read, those that follow only look
			start, used := time.Now(), cpuTime(b)
			time.Sleep(6 * time.Second)
			share := 100 * float64(cpuTime(b)-used) / float64(time.Since(start))

			var took []time.Duration
			for b.Loop() {
				if test.name == "polled" {
					continue // when a poll comes is no latency
				}
				i := len(took) * 7919 % files
				value := fmt.Sprint("value ", len(took)+1)
				write(b, paths[i]+".new", value)
				if err := os.Rename(paths[i]+".new", paths[i]); err != nil {
					b.Fatal(err)
				}
				start := time.Now()
				if got := <-values[i]; got != value {
					b.Fatalf("received %q, want %q", got, value)
				}
				took = append(took, time.Since(start))
				time.Sleep(time.Millisecond)
			}
			b.ReportMetric(float64(setUp.Milliseconds()), "set-up-ms")
			b.ReportMetric(share, "%core")
			if slices.Sort(took); len(took) > 0 {
				b.ReportMetric(float64(took[(len(took)-1)/2].Nanoseconds())/1e3, "p50-us")
				b.ReportMetric(float64(took[(len(took)-1)*99/100].Nanoseconds())/1e3, "p99-us")
			}
			b.ReportMetric(0, "ns/op")
			cancel()
			for _, v := range values {
				for range v {
				}
			}
		})
	}
}
