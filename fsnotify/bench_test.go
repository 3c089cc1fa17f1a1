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
