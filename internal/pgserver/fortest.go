package pgserver

import (
	"context"
	"os"
	"time"
)

// TB is what ForTest needs of a testing.TB. The example uses this package too, and is not to
// link package testing.
type TB interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
	Errorf(format string, args ...any)
	Cleanup(func())
}

// ForTest returns a running server that is closed when the test ends. Where none can be
// started, the test is skipped, or fails if HOTLOAD_REQUIRE_POSTGRES is 1, as it is in CI.
func ForTest(t TB, opts Options) *Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s, err := Start(ctx, opts)
	if err != nil {
		Missing(t, err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("%v", err)
		}
	})
	return s
}

// Missing ends a test that cannot do without PostgreSQL, as ForTest does.
func Missing(t TB, err error) {
	t.Helper()
	if os.Getenv("HOTLOAD_REQUIRE_POSTGRES") == "1" {
		t.Fatalf("HOTLOAD_REQUIRE_POSTGRES=1, and no PostgreSQL server can be started: %v", err)
	}
	t.Skipf("this test needs a PostgreSQL server that it can start itself: %v", err)
}
