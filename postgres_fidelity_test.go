package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/infobloxopen/hotload/internal/pgserver"
	"github.com/lib/pq"
)

// TestPostgresFidelity runs what lib/pq does beyond plain statements, directly
// and under hotload. Each step has the results that it is to have.
func TestPostgresFidelity(t *testing.T) {
	server := pgserver.ForTest(t, pgserver.Options{Name: "fidelity"})
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
		{"column types", []string{
			"n INT4 int32 0 false 0 0 false", "s VARCHAR string 12 true 0 0 false",
			"d NUMERIC interface {} 0 false 10 2 true", "t TEXT string 9223372036854775807 true 0 0 false",
		}, func(p *pgRun) {
			rows, err := p.db.Query("SELECT 1 AS n, ''::varchar(12) AS s, 0::decimal(10, 2) AS d, ''::text AS t")
			p.must(err)
			defer rows.Close()
			types, err := rows.ColumnTypes()
			p.must(err)
			for _, ct := range types {
				length, hasLength := ct.Length()
				precision, scale, hasPrecision := ct.DecimalSize()
				p.tell(ct.Name(), ct.DatabaseTypeName(), ct.ScanType(), length, hasLength, precision, scale, hasPrecision)
			}
		}},
		{"result sets", []string{"[1 2] [a] []"}, func(p *pgRun) {
			rows, err := p.db.Query("SELECT generate_series(1, 2); SELECT 'a'; SELECT 1 WHERE false")
			p.must(err)
			defer rows.Close()
			var sets []any
			for more := true; more; more = rows.NextResultSet() {
				sets = append(sets, p.scan(rows))
			}
			p.tell(sets...)
		}},
		{"notices, through Raw", []string{"hello"}, func(p *pgRun) {
			conn, err := p.db.Conn(p.t.Context())
			p.must(err)
			defer conn.Close()
			handle := func(handler func(*pq.Error)) {
				p.must(conn.Raw(func(c any) error {
					if under, ok := c.(interface{ Raw() driver.Conn }); ok {
						c = under.Raw()
					}
					pq.SetNoticeHandler(c.(driver.Conn), handler)
					return nil
				}))
			}
			handle(func(notice *pq.Error) { p.tell(notice.Message) })
			_, err = conn.ExecContext(p.t.Context(), "DO $$ BEGIN RAISE NOTICE 'hello'; END $$")
			p.must(err)
			handle(nil)
		}},
	}
	modes := []struct {
		name string
		open func(t *testing.T) *sql.DB
	}{
		{"directly", func(t *testing.T) *sql.DB {
			db, err := sql.Open("postgres", server.SuperDSN())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { db.Close() })
			return db
		}},
		{"graceful", func(t *testing.T) *sql.DB { return open(t, pq.Driver{}, newSource(server.SuperDSN()), "") }},
		{"forceKill", func(t *testing.T) *sql.DB {
			return open(t, pq.Driver{}, newSource(server.SuperDSN()), "forceKill=true")
		}},
	}
	for _, step := range steps {
		for _, mode := range modes {
			t.Run(step.name+"/"+mode.name, func(t *testing.T) {
				p := &pgRun{t: t, db: mode.open(t)}
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
