package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/infobloxopen/hotload/internal/pgserver"
	"github.com/lib/pq"
)

// pgUsers are the users that the servers have, besides the superuser.
var pgUsers = map[string]string{"old": "old's", "new": "new's"}

// TestPostgres runs lib/pq against two real servers, which all its parts share:
// making them takes longer than using them.
func TestPostgres(t *testing.T) {
	servers, errs := make([]*pgserver.Server, 2), make([]error, 2)
	var wg sync.WaitGroup
	for i, name := range []string{"one", "two"} {
		wg.Go(func() {
			servers[i], errs[i] = pgserver.Start(t.Context(), pgserver.Options{Name: name, Users: pgUsers})
		})
	}
	wg.Wait()
	for _, server := range servers {
		if server != nil {
			t.Cleanup(func() { server.Close() })
		}
	}
	if err := errors.Join(errs...); err != nil {
		pgserver.Missing(t, err)
	}
	t.Run("fidelity", func(t *testing.T) { postgresFidelity(t, servers[0]) })
	t.Run("storm", func(t *testing.T) { postgresStorm(t, servers[0]) })
	t.Run("kill", func(t *testing.T) { postgresKill(t, servers[0], servers[1]) })
	t.Run("probe", func(t *testing.T) { postgresProbe(t, servers[0], servers[1]) })
}

// openPostgres opens a pool on a server in one of the modes.
func openPostgres(t testing.TB, value, mode string) *sql.DB {
	t.Helper()
	if mode != "direct" {
		return open(t, pq.Driver{}, newSource(value), "forceKill="+strconv.FormatBool(mode == "forceKill"))
	}
	db, err := sql.Open("postgres", value)
	must(t, "open", err)
	t.Cleanup(func() { db.Close() })
	return db
}

// postgresFidelity runs what lib/pq does beyond plain statements, directly
// and under hotload. Each step has the results that it is to have.
func postgresFidelity(t *testing.T, server *pgserver.Server) {
	steps := []struct {
		name string
		want []string
		run  func(p *pgRun) // on a pool of its own, with an empty table t
	}{
		{"COPY", []string{"3 ok", "1 one, 2 <nil>, 3 three"}, func(p *pgRun) {
			tx := p.begin(nil)
			st, err := tx.Prepare(pq.CopyIn("t", "n", "s"))
			p.must(err)
			for i, s := range []any{"one", nil, "three"} {
				_, err := st.Exec(i+1, s)
				p.must(err)
			}
			res, err := st.Exec()
			p.must(err)
			n, err := res.RowsAffected()
			p.tell(n, err)
			p.must(st.Close())
			p.must(tx.Commit())
			p.table()
		}},
		{"COPY that fails", []string{`pq: invalid input syntax for type integer: "x" (22P02), 22P02`, ""}, func(p *pgRun) {
			tx := p.begin(nil)
			st, err := tx.Prepare(pq.CopyIn("t", "n", "s"))
			p.must(err)
			_, err = st.Exec("x", "text")
			if err == nil {
				_, err = st.Exec()
			}
			p.tell(err)
			p.must(tx.Rollback())
			p.table()
		}},
		{"arrays", []string{"[a NULL b,c] [1 2] true"}, func(p *pgRun) {
			var strs []string
			var ints []int64
			var in bool
			p.must(p.db.QueryRow("SELECT $1::text[], $2::bigint[], 5 = ANY($3)", pq.Array([]string{"a", "NULL", "b,c"}),
				pq.Int64Array{1, 2}, pq.Array([]int{4, 5})).Scan(pq.Array(&strs), pq.Array(&ints), &in))
			p.tell(strs, ints, in)
		}},
		{"arguments", []string{"7 text [1 2] 2001-02-03T04:05:06Z <nil> true"}, func(p *pgRun) {
			when := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
			var n, s, b, tm, null, yes any
			p.must(p.db.QueryRow("SELECT $1::int, $2::text, $3::bytea, $4::timestamptz, $5::int, $6::bool",
				7, "text", []byte{1, 2}, when, (*int)(nil), sql.NullBool{Bool: true, Valid: true}).Scan(&n, &s, &b, &tm, &null, &yes))
			p.tell(n, s, b, tm.(time.Time).UTC().Format(time.RFC3339), null, yes)
		}},
		{"a cursor in a transaction", []string{"1 2 3", "ok", `pq: cursor "c" does not exist (34000), 34000`}, func(p *pgRun) {
			tx := p.begin(&sql.TxOptions{Isolation: sql.LevelRepeatableRead, ReadOnly: true})
			_, err := tx.Exec("DECLARE c CURSOR FOR SELECT generate_series(1, 3)")
			p.must(err)
			p.tell(strings.Join(slices.Concat(p.list(tx, "FETCH 2 FROM c"), p.list(tx, "FETCH 2 FROM c")), " "))
			p.tell(tx.Commit())
			_, err = p.db.Exec("FETCH 1 FROM c")
			p.tell(err)
		}},
		{"errors", []string{
			`pq: duplicate key value violates unique constraint "t_pkey" (23505), 23505 t_pkey`,
			"pq: cannot execute INSERT in a read-only transaction (25006), 25006",
			"pq: division by zero (22012), 22012",
			"pq: got 2 parameters but the statement requires 1",
			"context deadline exceeded",
		}, func(p *pgRun) {
			_, err := p.db.Exec("INSERT INTO t VALUES (1, 'a'), (1, 'b')")
			p.tell(err)
			tx := p.begin(&sql.TxOptions{ReadOnly: true})
			_, err = tx.Exec("INSERT INTO t VALUES (1, 'a')")
			p.tell(err)
			p.must(tx.Rollback())
			rows, err := p.db.Query("SELECT 1 / (2 - n) FROM generate_series(1, 3) AS n")
			if err == nil {
				for rows.Next() {
				}
				err = rows.Err()
				rows.Close()
			}
			p.tell(err)
			_, err = p.db.Exec("SELECT $1::int", 1, 2)
			p.tell(err)
			ctx, cancel := context.WithTimeout(p.t.Context(), 50*time.Millisecond)
			defer cancel()
			_, err = p.db.ExecContext(ctx, "SELECT pg_sleep(60)")
			if errors.Is(err, context.DeadlineExceeded) || (*pq.Error)(nil) != asPQ(err) && asPQ(err).Code == "57014" {
				err = context.DeadlineExceeded // lib/pq has either error
			}
			p.tell(err)
		}},
		{"prepared statements", []string{"2 3 4 [5]", "10"}, func(p *pgRun) {
			st, err := p.db.Prepare("SELECT $1::int + 1")
			p.must(err)
			defer st.Close()
			tx := p.begin(nil)
			a, b, c := 0, 0, 0
			p.must(st.QueryRow(1).Scan(&a))
			p.must(tx.Stmt(st).QueryRow(2).Scan(&b))
			own, err := tx.Prepare("SELECT $1::int")
			p.must(err)
			p.must(own.QueryRow(4).Scan(&c))
			d := p.list(tx, "SELECT 5")
			p.must(tx.Commit())
			p.tell(a, b, c, d)
			sum := 0
			for i := range 5 {
				n := 0
				p.must(st.QueryRow(i - 1).Scan(&n))
				sum += n
			}
			p.tell(sum)
		}},
		{"notices, through Raw", []string{"hello"}, func(p *pgRun) {
			conn := take(p.t, p.db)
			handle := func(handler func(*pq.Error)) {
				inRaw(p.t, conn, func(c any) {
					if under, ok := c.(interface{ Raw() driver.Conn }); ok {
						c = under.Raw()
					}
					pq.SetNoticeHandler(c.(driver.Conn), handler)
				})
			}
			handle(func(notice *pq.Error) { p.tell(notice.Message) })
			_, err := conn.ExecContext(p.t.Context(), "DO $$ BEGIN RAISE NOTICE 'hello'; END $$")
			p.must(err)
			handle(nil)
		}},
	}
	for _, step := range steps {
		for _, mode := range modes {
			t.Run(step.name+"/"+mode, func(t *testing.T) {
				p := &pgRun{t: t, db: openPostgres(t, server.SuperDSN(), mode)}
				_, err := p.db.Exec("DROP TABLE IF EXISTS t; CREATE TABLE t (n int PRIMARY KEY, s text)")
				p.must(err)
				step.run(p)
				if !slices.Equal(p.out, step.want) {
					t.Errorf("results:\nhave %q\nwant %q", p.out, step.want)
				}
			})
		}
	}
}

// A pgRun is a step that runs in a mode, and its results.
type pgRun struct {
	t   *testing.T
	db  *sql.DB
	out []string
}

func (p *pgRun) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func asPQ(err error) (e *pq.Error) {
	errors.As(err, &e)
	return e
}

// tell adds a result. An error is told with all that errors.As finds in it.
func (p *pgRun) tell(values ...any) {
	words := make([]string, len(values))
	for i, v := range values {
		words[i] = fmt.Sprint(v)
		if err, ok := v.(error); ok {
			if e := asPQ(err); e != nil {
				words[i] = strings.TrimSpace(fmt.Sprintf("%v, %s %s", err, e.SQLState(), e.Constraint))
			}
		} else if v == nil && i == len(values)-1 {
			words[i] = "ok"
		}
	}
	p.out = append(p.out, strings.Join(words, " "))
}

func (p *pgRun) begin(opts *sql.TxOptions) *sql.Tx {
	p.t.Helper()
	tx, err := p.db.BeginTx(p.t.Context(), opts)
	p.must(err)
	return tx
}

// list returns the first column of a query.
func (p *pgRun) list(x runner, query string) []string {
	p.t.Helper()
	rows, err := x.QueryContext(p.t.Context(), query)
	p.must(err)
	defer rows.Close()
	return p.scan(rows)
}

func (p *pgRun) scan(rows *sql.Rows) (list []string) {
	p.t.Helper()
	for rows.Next() {
		var s string
		p.must(rows.Scan(&s))
		list = append(list, s)
	}
	p.must(rows.Err())
	return list
}

// table tells what is in the table.
func (p *pgRun) table() {
	p.t.Helper()
	p.tell(strings.Join(p.list(p.db, "SELECT n || ' ' || coalesce(s, '<nil>') FROM t ORDER BY n"), ", "))
}

// postgresStorm is TestStorm in small, with lib/pq against a real server that
// counts the connections of each value by their application_name.
func postgresStorm(t *testing.T, server *pgserver.Server) {
	monitor := openPostgres(t, server.SuperDSN(), "direct")
	_, err := monitor.Exec("create table writes (value text)")
	must(t, "create table", err)
	// connections counts the server's connections by value.
	connections := func() (byValue map[string]int, sum int) {
		rows := query(t, monitor, "select application_name, count(*) from pg_stat_activity where application_name ~ '^[0-9]+$' group by 1")
		defer rows.Close()
		byValue = make(map[string]int)
		for rows.Next() {
			var name string
			var n int
			must(t, "scan", rows.Scan(&name, &n))
			byValue[name] = n
			sum += n
		}
		return byValue, sum
	}
	value := func(n int) string {
		return server.SuperSocketDSN() + " application_name=" + strconv.Itoa(n)
	}

	const ask = "select current_setting('application_name'), $1::int[]"
	args := pq.Array([]int{1, 2})
	scan := func(row *sql.Row) (v string, err error) {
		var numbers []int64
		return v, row.Scan(&v, pq.Array(&numbers))
	}
	for _, maxOpen := range []int{1, 4} {
		t.Run(fmt.Sprintf("max=%d", maxOpen), func(t *testing.T) {
			src := newSource(value(1))
			s := newStorm(t)
			s.db = open(t, pq.Driver{}, src, "")
			s.db.SetMaxOpenConns(maxOpen)
			stmt := prepare(t, s.db, ask)
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var wg sync.WaitGroup
			for _, work := range []func() (string, error){
				func() (string, error) { return scan(s.db.QueryRow(ask, args)) },
				func() (string, error) { return scan(stmt.QueryRow(args)) },
				func() (string, error) {
					tx, err := s.db.Begin()
					if err != nil {
						return "", err
					}
					defer tx.Rollback()
					v, err := scan(tx.QueryRow(ask, args))
					if err != nil {
						return "", err
					}
					if _, err := tx.Exec("insert into writes values ($1)", v); err != nil {
						return "", err
					}
					return v, tx.Commit()
				},
				func() (string, error) {
					conn, err := s.db.Conn(t.Context())
					if err != nil {
						return "", err
					}
					defer conn.Close()
					time.Sleep(rand.N(2 * time.Millisecond)) // the first use comes later
					return scan(conn.QueryRowContext(t.Context(), ask, args))
				},
			} {
				wg.Go(func() {
					for ctx.Err() == nil {
						s.op("operation", work)
					}
				})
			}
			const changes = 20
			for n := 2; n <= changes; n++ {
				s.begun.Store(int64(n))
				src.set(value(n))
				s.applied.Store(int64(n))
				next := s.ops.Load() + rand.Int64N(50) // sometimes at once, sometimes after some work
				await(t, "operations", func() bool { return s.ops.Load() >= next })
				if _, sum := connections(); sum > maxOpen {
					// A backend shows for a moment after its client has closed.
					await(t, "the server's connections are within MaxOpenConns", func() bool {
						_, sum := connections()
						return sum <= maxOpen
					})
				}
			}
			stop()
			wg.Wait()
			await(t, "the server has connections of the last value only", func() bool {
				byValue, sum := connections()
				return byValue[strconv.Itoa(changes)] == sum
			})
			s.check(t)
			t.Logf("%d operations, %d changes", s.ops.Load(), changes)
			s.db.Close()
			await(t, "the server has no connection left", func() bool { _, sum := connections(); return sum == 0 })
		})
	}
}

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

// postgresKill kills what lib/pq does on real servers.
func postgresKill(t *testing.T, old, next *pgserver.Server) {
	direct := func(s *pgserver.Server) *sql.DB {
		db := openPostgres(t, s.SuperDSN(), "direct")
		_, err := db.Exec("drop table if exists t; create table t (n int)")
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
			stmt := prepare(t, p, insert)
			t.Cleanup(func() { stmt.Close() })
			return func() error { _, err := stmt.Exec(); return err }
		}},
		{"query", func(t *testing.T, p *pgPool) func() error {
			return func() error { return p.QueryRow(insert + " returning n").Scan(new(int)) }
		}},
		{"transaction", func(t *testing.T, p *pgPool) func() error {
			tx := begin(t, p)
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
		tx := begin(t, p)
		_, err := tx.Exec("lock table t")
		must(t, "lock", err)
		_, err = tx.Exec("insert into t values ($1)", 1)
		must(t, "insert", err)
		stmt := prepare(t, tx, "insert into t values ($1)")
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
		prepared := prepare(t, p, "insert into t select 1 from pg_sleep(601)")
		late := make(chan error, 1)
		go func() { _, err := prepared.Exec(); late <- err }()
		tx := begin(t, p)
		stmt := prepare(t, tx, "insert into t values ($1)")
		conn := take(t, p.DB)
		prepare(t, conn, "select 1")
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
		_, err := stmt.Exec(1)
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

// postgresProbe pushes bad values to a pool under load, on lib/pq's plain
// driver, which has no DriverContext: it can tell even garbage only by trying.
func postgresProbe(t *testing.T, server, late *pgserver.Server) {
	must(t, "Stop", late.Stop())
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, "listen", err)
	deadPort := dead.Addr().(*net.TCPAddr).Port
	dead.Close()

	l := collect(t)
	src := newSource(server.DSN("old", pgUsers["old"]))
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
	must(t, "query", err)
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
		{"server that is not up yet", late.DSN("new", pgUsers["new"]),
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
	t.Run("server that comes up later", func(t *testing.T) {
		before := ops.Load()
		must(t, "Start", late.Start(t.Context()))
		await(t, "the value is accepted", func() bool { return l.count("value accepted") == 2 })
		who, err := query()
		must(t, "query", err)
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

// TestKillPostgresRowStays kills lib/pq between Next and Scan, and after a Scan
// into RawBytes: the row stays what it is, although lib/pq hands out its buffer.
func TestKillPostgresRowStays(t *testing.T) {
	server := pgserver.ForTest(t, pgserver.Options{Name: "rows"})
	// Of a numeric and a name lib/pq hands out its buffer, of a text it does not.
	const query = "select repeat((n % 10)::text, 10 + n)::numeric, ('number ' || n)::name from generate_series(1, 20) n"
	for _, row := range []struct {
		name  string
		query func(t *testing.T, db *sql.DB) (*sql.Rows, error)
	}{
		{"query", func(_ *testing.T, db *sql.DB) (*sql.Rows, error) { return db.Query(query) }},
		{"query with arguments", func(_ *testing.T, db *sql.DB) (*sql.Rows, error) {
			return db.Query(query+" where n < $1", 30)
		}},
		{"prepared statement", func(t *testing.T, db *sql.DB) (*sql.Rows, error) {
			stmt, err := db.Prepare(query)
			must(t, "prepare", err)
			t.Cleanup(func() { stmt.Close() })
			return stmt.Query()
		}},
		{"prepared statement in a transaction", func(t *testing.T, db *sql.DB) (*sql.Rows, error) {
			tx, err := db.Begin()
			must(t, "begin", err)
			t.Cleanup(func() { tx.Rollback() })
			stmt, err := tx.Prepare(query)
			must(t, "prepare", err)
			return stmt.Query()
		}},
	} {
		for _, into := range []string{"string", "RawBytes"} {
			for _, last := range []int{1, 7, 19} { // row that was read before the kill
				t.Run(fmt.Sprintf("%s,%s,row=%d", row.name, into, last), func(t *testing.T) {
					l := collect(t)
					src := newSource(server.SuperSocketDSN() + " application_name=old")
					db := open(t, pq.Driver{}, src, "forceKill=true")
					rows, err := row.query(t, db)
					must(t, "query", err)
					t.Cleanup(func() { rows.Close() })
					for range last {
						want(t, "a row", rows.Next(), true)
					}
					var text, number string
					var rawText, rawNumber sql.RawBytes
					if into == "RawBytes" {
						must(t, "Scan", rows.Scan(&rawText, &rawNumber))
					}
					src.set(server.SuperSocketDSN() + " application_name=new")
					await(t, "the old connection is closed", func() bool {
						return l.count("generation drained", "generation=1") == 1
					})
					if into == "string" {
						must(t, "Scan", rows.Scan(&text, &number))
					} else {
						text, number = string(rawText), string(rawNumber)
					}
					want(t, "first column after the kill", strconv.Quote(text), strconv.Quote(strings.Repeat(strconv.Itoa(last%10), 10+last)))
					want(t, "second column after the kill", strconv.Quote(number), strconv.Quote(fmt.Sprint("number ", last)))
					want(t, "a row after the kill", rows.Next(), false)
					mustBeKilled(t, "Rows.Err", rows.Err())
				})
			}
		}
	}
}
