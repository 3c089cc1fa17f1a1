package strategytest_test

import (
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/infobloxopen/hotload/fsnotify"
	"github.com/infobloxopen/hotload/strategytest"
)

func TestFileStrategy(t *testing.T) {
	strategytest.Run(t, func(t *testing.T) strategytest.Subject {
		file := filepath.Join(t.TempDir(), "dsn")
		return strategytest.Subject{
			Strategy:  fsnotify.NewStrategy(),
			Path:      file,
			Set:       func(value string) error { return replace(file, value) },
			Remove:    func() error { return os.Remove(file) },
			OtherPath: file + ".old",
			SetOther:  func(value string) error { return replace(file+".old", value) },
		}
	})
}

func replace(file, value string) error {
	if err := os.WriteFile(file+".new", []byte(value), 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// TestFileStrategyAdvised holds the file strategy to what SPEC.md advises but the suite does not test.
func TestFileStrategyAdvised(t *testing.T) {
	t.Run("S-27/says which source failed and how", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "nothing-here")
		_, _, err := fsnotify.NewStrategy().Watch(t.Context(), file, nil)
		if err == nil || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), "no such file") {
			t.Errorf("want an error that names %s and says that it is not there, have %v", file, err)
		}
	})
	t.Run("S-33/refuses options that make no sense", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "dsn")
		if err := replace(file, "one"); err != nil {
			t.Fatal(err)
		}
		for _, given := range [][]string{{""}, {"soon"}, {"-1s"}, {"1s", "1s"}} {
			_, _, err := fsnotify.NewStrategy().Watch(t.Context(), file, url.Values{"poll": given})
			if err == nil || !strings.Contains(err.Error(), "poll") {
				t.Errorf("poll=%q: want an error that names it, have %v", given, err)
			}
		}
	})
	t.Run("S-34/takes a value as it is meant", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "dsn")
		want := strings.Repeat("x", 64<<10)
		if err := replace(file, "\ufeff\t "+want+" \r\n\n"); err != nil {
			t.Fatal(err)
		}
		value, _, err := fsnotify.NewStrategy().Watch(t.Context(), file, nil)
		if err != nil || value != want {
			t.Errorf("want the %d bytes between mark and white space, have %d and %v", len(want), len(value), err)
		}
		if err := replace(file, strings.Repeat("x", 2<<20)); err != nil {
			t.Fatal(err)
		}
		if value, _, err := fsnotify.NewStrategy().Watch(t.Context(), file, nil); err == nil {
			t.Errorf("want an error for a value of 2 MiB, have %d bytes", len(value))
		}
	})
	t.Run("S-28/delivers no value twice running", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "dsn")
		write := func(value string) {
			t.Helper()
			if err := replace(file, value); err != nil {
				t.Fatal(err)
			}
		}
		write("one")
		_, values, err := fsnotify.NewStrategy().Watch(t.Context(), file, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range []string{"one", "one", "two"} {
			write(v)
		}
		if got := <-values; got != "two" {
			t.Errorf("want two, have %q", got)
		}
		for _, v := range []string{"two", "two", "three"} {
			write(v)
		}
		if got := <-values; got != "three" {
			t.Errorf("want three, have %q", got)
		}
	})
}
