package strategytest_test

import (
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"github.com/infobloxopen/hotload/fsnotify"
	"github.com/infobloxopen/hotload/strategytest"
)

// In a test of the strategy's package. The file strategy stands for the
// author's own here.
func ExampleRun() {
	_ = func(t *testing.T) { // func TestStrategy(t *testing.T)
		strategytest.Run(t, func(t *testing.T) strategytest.Subject {
			file := filepath.Join(t.TempDir(), "dsn")
			replace := func(file, value string) error {
				if err := os.WriteFile(file+".new", []byte(value), 0o600); err != nil {
					return err
				}
				return os.Rename(file+".new", file)
			}
			return strategytest.Subject{
				Strategy:  fsnotify.NewStrategy(),
				Path:      file,
				Options:   url.Values{"poll": {"1s"}},
				Set:       func(value string) error { return replace(file, value) },
				Remove:    func() error { return os.Remove(file) },
				OtherPath: file + ".old",
				SetOther:  func(value string) error { return replace(file+".old", value) },
			}
		})
	}
}
