package hotload_test

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/infobloxopen/hotload/internal/pgserver"
	"github.com/lib/pq"
)

// TestPostgresProbe pushes bad values to a pool under load, on lib/pq's plain
// driver, which has no DriverContext: it can tell even garbage only by trying.
func TestPostgresProbe(t *testing.T) {
	users := map[string]string{"old": "old's", "new": "new's"}
	server := pgserver.ForTest(t, pgserver.Options{Name: "probe", Users: users})
	late, err := pgserver.Create(t.Context(), pgserver.Options{Name: "probe-late", Users: users})
	if err != nil {
		pgserver.Missing(t, err)
	}
	t.Cleanup(func() { late.Close() })
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	deadPort := dead.Addr().(*net.TCPAddr).Port
	dead.Close()

	l := collect(t)
	src := newSource(server.DSN("old", users["old"]))
	db := open(t, pq.Driver{}, src, "probe=true")
	db.SetMaxOpenConns(4)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	var ops, failed atomic.Int64
	var inForce atomic.Value // who the load runs as, and where
	query := func() (who string, err error) {
		return who, db.QueryRow("SELECT current_user || '@' || inet_server_port() || $1", "").Scan(&who)
	}
	who, err := query()
	if err != nil {
		t.Fatal(err)
	}
	want(t, "first value", who, fmt.Sprint("old@", server.Port()))
	inForce.Store(who)
	for range 6 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				before := inForce.Load()
				who, err := query()
				switch ops.Add(1); {
				case err != nil:
					failed.Add(1)
					t.Error(err)
				case who != before && who != fmt.Sprint("new@", late.Port()):
					t.Errorf("ran as %s when %s was in force", who, before)
				}
			}
		})
	}
	defer wg.Wait()
	defer close(stop)

	for _, row := range []struct {
		name, value, log string
	}{
		{"garbage", "S3CRET no connection string", "reason=probe error_type=*errors.errorString"},
		{"wrong password", server.DSN("new", "S3CRET"), "reason=probe error_type=*pq.Error sqlstate=28P01"},
		{"dead port", fmt.Sprintf("postgres://new:S3CRET@127.0.0.1:%d/postgres?sslmode=disable", deadPort),
			`reason=probe error_type=*net.OpError errno="connection refused"`},
		{"server that is not up yet", late.DSN("new", users["new"]),
			`reason=probe error_type=*net.OpError errno="connection refused"`},
	} {
		t.Run(row.name, func(t *testing.T) {
			before, refused := ops.Load(), l.count(row.log)
			src.set(row.value)
			await(t, row.log, func() bool { return l.count(row.log) > refused })
			await(t, "more operations", func() bool { return ops.Load() > before+500 })
			want(t, "values accepted", l.count("value accepted"), 1)
			want(t, "operations failed", failed.Load(), 0)
			t.Logf("%d operations", ops.Load()-before)
		})
	}
	t.Run("server that comes up two seconds later", func(t *testing.T) {
		before := ops.Load()
		time.Sleep(2 * time.Second)
		if err := late.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		await(t, "the value is accepted", func() bool { return l.count("value accepted") == 2 })
		who, err := query()
		if err != nil {
			t.Fatal(err)
		}
		want(t, "value in force", who, fmt.Sprint("new@", late.Port()))
		inForce.Store(who)
		await(t, "the old value is gone", func() bool { return l.count("generation drained", "generation=1") == 1 })
		now := ops.Load()
		await(t, "more operations", func() bool { return ops.Load() > now+500 })
		want(t, "operations failed", failed.Load(), 0)
		t.Logf("%d operations", ops.Load()-before)
	})
	if strings.Contains(l.String(), "S3CRET") {
		t.Errorf("a secret is logged:\n%s", l)
	}
}
