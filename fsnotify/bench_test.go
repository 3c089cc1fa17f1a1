package fsnotify_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	upstream "github.com/fsnotify/fsnotify"
	"github.com/infobloxopen/hotload/fsnotify"
)

// BenchmarkLatency measures from the return of the system call that completes a
// change to the new value at the consumer: through the strategy, and through a bare
// upstream watcher whose receiver reads the file. The strategy's in-place figures
// include the quiet time. Where there is one the files are in a memory file system: on a
// disk most deliveries are over before the rename returns.
func BenchmarkLatency(b *testing.B) {
	watchers := []struct {
		name  string
		start func(b *testing.B, path string) <-chan string
	}{
		{"hotload", func(b *testing.B, path string) <-chan string {
			_, values, err := fsnotify.NewStrategy().Watch(b.Context(), path, nil)
			if err != nil {
				b.Fatal(err)
			}
			return values
		}},
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
				values := watcher.start(b, path)
				var took []time.Duration
				for b.Loop() {
					value := fmt.Sprint("value ", len(took)+1)
					start := change.change(b, path, value)
					for got := range values {
						if got == value {
							break
						}
					}
					took = append(took, time.Since(start))
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

// bare sends the content of path after each event of its directory.
func bare(b *testing.B, path string) <-chan string {
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
	return values
}
