package hotload_test

import (
	"context"
	"database/sql"
	"fmt"
	"testing"
	"time"

	"github.com/infobloxopen/hotload/internal/pgserver"
	"github.com/lib/pq"
)

// quick is how long may take what is over in a second or two on a machine that
// has nothing else to do. The tests log how long it took.
const quick = 10 * time.Second

// A pgPool is a pool under forceKill=true whose value is about to change from
// one server to another.
type pgPool struct {
	*sql.DB
	old, next     *pgserver.Server
	onOld, onNext *sql.DB // the superuser's, without hotload
	src           *source
}

// change puts the next server in force.
func (p *pgPool) change() {
	p.src.set(p.next.SuperDSN() + " application_name=pool")
}

// backends counts the pool's connections on the old server that are in a state.
func (p *pgPool) backends(t *testing.T, condition string) (n int) {
	t.Helper()
	must(t, "pg_stat_activity", p.onOld.QueryRow(
		"select count(*) from pg_stat_activity where application_name = 'pool' and "+condition).Scan(&n))
	return n
}

// on returns the port of the server that the pool's next operation runs on.
func (p *pgPool) on(t *testing.T) (port int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	must(t, "new work", p.QueryRowContext(ctx, "select current_setting('port')::int").Scan(&port))
	return port
}

// took logs how long something took, and fails the test if that was too long.
func took(t *testing.T, what string, start time.Time, most time.Duration) {
	t.Helper()
	d := time.Since(start)
	t.Logf("%s: %v", what, d.Round(time.Millisecond))
	if d > most {
		t.Errorf("%s: took %v, want at most %v", what, d, most)
	}
}

// TestKillPostgres kills what lib/pq does on real servers.
func TestKillPostgres(t *testing.T) {
	old, next := pgserver.ForTest(t, pgserver.Options{Name: "old"}), pgserver.ForTest(t, pgserver.Options{Name: "next"})
	direct := func(s *pgserver.Server) *sql.DB {
		db, err := sql.Open("postgres", s.SuperDSN())
		must(t, "open", err)
		t.Cleanup(func() { db.Close() })
		_, err = db.Exec("create table t (n int)")
		must(t, "create table", err)
		return db
	}
	onOld, onNext := direct(old), direct(next)
	run := func(name string, f func(t *testing.T, p *pgPool)) {
		t.Run(name, func(t *testing.T) {
			src := newSource(old.SuperDSN() + " application_name=pool")
			p := &pgPool{open(t, pq.Driver{}, src, "forceKill=true"), old, next, onOld, onNext, src}
			want(t, "server before the change", p.on(t), old.Port())
			f(t, p)
			want(t, "server after the change", p.on(t), next.Port())
			must(t, "DB.Close", p.Close())
			await(t, "the old server has no connection of the pool", func() bool { return p.backends(t, "true") == 0 })
		})
	}
	nothingWritten := func(t *testing.T, p *pgPool) {
		t.Helper()
		for name, db := range map[string]*sql.DB{"old": p.onOld, "next": p.onNext} {
			n := -1
			must(t, "count", db.QueryRow("select count(*) from t").Scan(&n))
			want(t, "rows on the "+name+" server", n, 0)
		}
	}

	const insert = "insert into t select 1 from pg_sleep(20)"
	for _, call := range []struct {
		name string
		exec func(t *testing.T, p *pgPool) func() error
	}{
		{"Exec", func(t *testing.T, p *pgPool) func() error {
			return func() error { _, err := p.Exec(insert); return err }
		}},
		{"Exec with arguments", func(t *testing.T, p *pgPool) func() error {
			return func() error { _, err := p.Exec("insert into t select $1::int from pg_sleep(20)", 1); return err }
		}},
		{"prepared statement", func(t *testing.T, p *pgPool) func() error {
			stmt, err := p.Prepare(insert)
			must(t, "prepare", err)
			t.Cleanup(func() { stmt.Close() })
			return func() error { _, err := stmt.Exec(); return err }
		}},
		{"query", func(t *testing.T, p *pgPool) func() error {
			return func() error { return p.QueryRow(insert + " returning n").Scan(new(int)) }
		}},
		{"transaction", func(t *testing.T, p *pgPool) func() error {
			tx, err := p.Begin()
			must(t, "begin", err)
			return func() error {
				_, err := tx.Exec(insert)
				mustBeKilled(t, "Commit", tx.Commit())
				return err
			}
		}},
	} {
		run("a long insert is killed/"+call.name, func(t *testing.T, p *pgPool) {
			exec := call.exec(t, p)
			done := make(chan error, 1)
			go func() { done <- exec() }()
			await(t, "the insert runs", func() bool {
				return p.backends(t, "state = 'active' and wait_event = 'PgSleep'") == 1
			})
			start := time.Now()
			p.change()
			mustBeKilled(t, "the insert", receive(t, "the insert returns", done))
			took(t, "the insert returned after the change", start, quick)
			await(t, "the old server has ended it", func() bool { return p.backends(t, "state = 'active'") == 0 })
			took(t, "the old server had ended it after the change", start, quick)
			nothingWritten(t, p)
		})
	}

	run("the locks of an idle transaction are free", func(t *testing.T, p *pgPool) {
		tx, err := p.Begin()
		must(t, "begin", err)
		_, err = tx.Exec("lock table t")
		must(t, "lock", err)
		_, err = tx.Exec("insert into t values ($1)", 1)
		must(t, "insert", err)
		stmt, err := tx.Prepare("insert into t values ($1)")
		must(t, "prepare", err)
		start := time.Now()
		p.change()
		other, err := p.onOld.Begin()
		must(t, "begin", err)
		_, err = other.Exec("set lock_timeout = '" + fmt.Sprint(limit.Milliseconds()) + "'; lock table t")
		must(t, "lock on the old server", err)
		took(t, "the lock was free after the change", start, quick)
		must(t, "commit on the old server", other.Commit())
		_, err = stmt.Exec(2)
		mustBeKilled(t, "statement", err)
		mustBeKilled(t, "Commit", tx.Commit())
		nothingWritten(t, p)
	})

	const million = 1_000_000
	for _, prepared := range []bool{false, true} {
		run(fmt.Sprintf("a long result ends with an error/prepared=%t", prepared), func(t *testing.T, p *pgPool) {
			query := "select generate_series(1, 1000000)"
			var rows *sql.Rows
			var err error
			if prepared {
				stmt, prepareErr := p.Prepare(query)
				must(t, "prepare", prepareErr)
				defer stmt.Close()
				rows, err = stmt.Query()
			} else {
				rows, err = p.Query(query)
			}
			must(t, "query", err)
			n := 0
			changed := make(chan bool)
			for rows.Next() {
				if n++; n == 1000 {
					go func() {
						p.change()
						close(changed)
					}()
				}
				if n == 2000 {
					<-changed
				}
			}
			mustBeKilled(t, fmt.Sprintf("Rows.Err after %d rows", n), rows.Err())
			if n >= million {
				t.Errorf("have all %d rows", n)
			}
			rows.Close()
		})
	}

	run("a frozen server", func(t *testing.T, p *pgPool) {
		l := collect(t)
		done := make(chan error, 1)
		go func() { _, err := p.Exec("insert into t select 1 from pg_sleep(600)"); done <- err }()
		// The call of a prepared statement cannot be had back from lib/pq before
		// the server has answered its request to cancel.
		prepared, err := p.Prepare("insert into t select 1 from pg_sleep(601)")
		must(t, "prepare", err)
		late := make(chan error, 1)
		go func() { _, err := prepared.Exec(); late <- err }()
		tx, err := p.Begin()
		must(t, "begin", err)
		stmt, err := tx.Prepare("insert into t values ($1)")
		must(t, "prepare", err)
		conn, err := p.Conn(t.Context())
		must(t, "conn", err)
		_, err = conn.PrepareContext(t.Context(), "select 1")
		must(t, "prepare", err)
		await(t, "the inserts run", func() bool {
			return p.backends(t, "state = 'active' and wait_event = 'PgSleep'") == 2
		})
		must(t, "Pause", p.old.Pause())
		resumed := false
		resume := func() {
			if !resumed {
				resumed = true
				must(t, "Resume", p.old.Resume())
			}
		}
		defer resume()
		start := time.Now()
		p.change()
		for range 3 {
			want(t, "server of new work", p.on(t), p.next.Port())
		}
		took(t, "the change, and three times new work", start, quick)
		_, err = stmt.Exec(1)
		mustBeKilled(t, "statement of the transaction", err)
		mustBeKilled(t, "Commit", tx.Commit())
		mustBeKilled(t, "the insert", receive(t, "the insert returns", done))
		took(t, "the insert returned after the change", start, quick)
		start = time.Now()
		must(t, "DB.Close", p.Close())
		took(t, "DB.Close", start, quick)
		must(t, "Conn.Close", conn.Close()) // lib/pq cannot close its statement before the server goes on
		await(t, "the connections are closed", func() bool { return l.count("generation drained", "generation=1") == 1 })
		select {
		case err := <-late:
			t.Log("the prepared insert has returned: it need no longer be an exception here")
			late <- err
		default:
		}
		resume()
		mustBeKilled(t, "the prepared insert", receive(t, "the prepared insert returns", late))
		await(t, "the old server has ended the inserts", func() bool { return p.backends(t, "true") == 0 })
		nothingWritten(t, p)
		p.DB = open(t, pq.Driver{}, newSource(p.next.SuperDSN()), "forceKill=true")
	})
}
