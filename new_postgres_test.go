package hotload_test

import (
	"database/sql"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/infobloxopen/hotload/internal/pgserver"
	"github.com/lib/pq"
)

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
