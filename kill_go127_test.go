//go:build go1.27

package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"
)

// A liteScanFake is a liteFake whose rows scan columns themselves: database/sql
// does not call Next then, and what it scans into RawBytes is the driver's buffer.
type (
	liteScanFake      struct{ liteCtxFake }
	liteScanConnector struct{ liteConnector }
	liteScanConn      struct{ *liteConn }
	liteScanStmt      struct{ liteCtxStmt }
	liteScanRows      struct {
		*liteRows
		columns [2][]byte
	}
)

func (d liteScanFake) OpenConnector(value string) (driver.Connector, error) {
	return liteScanConnector{liteConnector{d.liteFake, value}}, nil
}

func (c liteScanConnector) Connect(context.Context) (driver.Conn, error) {
	return liteScanConn{c.f.open(c.value)}, nil
}

func (c liteScanConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	return liteScans(c.liteConn.QueryContext(ctx, query, args))
}

func (c liteScanConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	st, err := c.liteConn.PrepareContext(ctx, query)
	if err != nil {
		return nil, err
	}
	return liteScanStmt{st.(liteCtxStmt)}, nil
}

func (s liteScanStmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	return liteScans(s.liteCtxStmt.QueryContext(ctx, args))
}

func liteScans(r driver.Rows, err error) (driver.Rows, error) {
	if err != nil {
		return nil, err
	}
	return &liteScanRows{liteRows: r.(*liteRows)}, nil
}

func (r *liteScanRows) Next([]driver.Value) error { panic("NextRow is there") }

func (r *liteScanRows) NextRow() error {
	return r.c.call(r.ctx, r.liteChild, "Next", func() error {
		if r.left == 0 {
			return io.EOF
		}
		r.left--
		r.row++
		r.columns[0], r.columns[1] = r.read()
		return nil
	})
}

func (r *liteScanRows) ScanColumn(ctx driver.ScanContext, index int, dest any) error {
	return r.c.call(r.ctx, r.liteChild, "ScanColumn", func() error {
		return sql.ConvertAssign(ctx, dest, r.columns[index])
	})
}

// A row of a driver that scans columns itself stays what it was when it was
// scanned, RawBytes until the next Next. A Scan after the kill is an error: the
// driver cannot be asked any more.
func TestKilledScannedRowStays(t *testing.T) {
	for _, reader := range liteReaders {
		for n := range 4 {
			set, rawBytes := n/2, n%2 == 1
			bubble(t, fmt.Sprintf("%s,set=%d,RawBytes=%t", reader.name, set, rawBytes), func(t *testing.T) {
				f, src := newLite(t), newSource("1")
				f.sets, f.untidy = 2, true
				db := open(t, liteScanFake{liteCtxFake{f}}, src, "forceKill=true")
				rows, end := reader.read(t, db)
				for range set {
					want(t, "another result set", rows.NextResultSet(), true)
				}
				var raw, number sql.RawBytes
				for row := 1; row <= 2; row++ { // also where there is something from the row before
					want(t, "a row", rows.Next(), true)
					must(t, "Scan", rows.Scan(&raw, &number))
					text, n := liteRow("1", set, row)
					want(t, "column text", string(raw), text)
					want(t, "column number", string(number), n)
				}
				want(t, "a last row", rows.Next(), true)
				var text, copied string
				var copiedBytes []byte
				var copiedAny any
				must(t, "Scan", rows.Scan(&text, &copied))
				must(t, "Scan", rows.Scan(&copiedBytes, &copiedAny))
				if rawBytes { // no other Scan may follow
					must(t, "Scan", rows.Scan(&raw, &number))
				}
				src.set("2")
				synctest.Wait()
				want(t, "connections closed", f.closed(), 1)
				wantText, wantNumber := liteRow("1", set, 3)
				want(t, "column text after the kill, in a string", text, wantText)
				want(t, "column text after the kill, in a []byte", string(copiedBytes), wantText)
				want(t, "column number after the kill, in a string", copied, wantNumber)
				want(t, "column number after the kill, in an any", fmt.Sprintf("%s", copiedAny), wantNumber)
				if rawBytes {
					want(t, "column text after the kill, in RawBytes", string(raw), wantText)
					want(t, "column number after the kill, in RawBytes", string(number), wantNumber)
				} else if err := rows.Scan(&text, &copied); err == nil {
					want(t, "column text of a Scan after the kill that has no error", text, wantText)
				} else {
					mustBeKilled(t, "Scan after the kill", err)
				}
				want(t, "a row after the kill", rows.Next(), false)
				mustBeKilled(t, "Rows.Err", rows.Err())
				rows.Close()
				end()
			})
		}
	}
}

// RawBytes that are scanned in the instant of the last resort hold the right
// row, or there is an error.
func TestKilledScanAtTheLastMoment(t *testing.T) {
	for range 300 {
		synctest.Test(t, func(t *testing.T) {
			f, src := newLite(t), newSource("1")
			f.heedless = true
			f.untidy = true // the call is over in the fake, and not yet in hotload
			f.onCall = func(_ context.Context, c *liteConn, call string) error {
				if call == "ScanColumn" && c.value == "1" {
					time.Sleep(patience)
				}
				return nil
			}
			db := open(t, liteScanFake{liteCtxFake{f}}, src, "forceKill=true")
			rows := liteQuery(t, func() (*sql.Rows, error) { return db.Query("select") })
			want(t, "a row", rows.Next(), true)
			liteGo(t, func() {
				var text, number sql.RawBytes
				if err := rows.Scan(&text, &number); err != nil {
					mustBeKilled(t, "Scan", err)
					return
				}
				wantText, wantNumber := liteRow("1", 0, 1)
				if string(text) != wantText || string(number) != wantNumber {
					t.Errorf("have row %q, %q, want %q, %q", text, number, wantText, wantNumber)
				}
			})
			synctest.Wait()
			src.set("2")
		})
	}
}

// What ScanColumn leaves in RawBytes is nil where the driver has nil, and empty
// where it has empty, with forceKill as without.
func TestKillKeepsScannedValues(t *testing.T) {
	for _, options := range []string{"", "forceKill=true"} {
		bubble(t, "options="+options, func(t *testing.T) {
			f := newLite(t)
			d := liteScanFake{liteCtxFake{f}}
			db := open(t, liteEdgeFake{d}, newSource("1"), options)
			rows := liteQuery(t, func() (*sql.Rows, error) { return db.Query("select") })
			for range 2 {
				want(t, "a row", rows.Next(), true)
				var empty, null sql.RawBytes
				must(t, "Scan", rows.Scan(&empty, &null))
				want(t, "empty", fmt.Sprintf("%#v", empty), fmt.Sprintf("%#v", sql.RawBytes{}))
				want(t, "null", null == nil, true)
			}
		})
	}
}

// A liteEdgeFake's rows have an empty and a null column.
type (
	liteEdgeFake      struct{ liteScanFake }
	liteEdgeConnector struct{ liteScanConnector }
	liteEdgeConn      struct{ liteScanConn }
	liteEdgeRows      struct{ *liteScanRows }
)

func (d liteEdgeFake) OpenConnector(value string) (driver.Connector, error) {
	return liteEdgeConnector{liteScanConnector{liteConnector{d.liteFake, value}}}, nil
}

func (c liteEdgeConnector) Connect(context.Context) (driver.Conn, error) {
	return liteEdgeConn{liteScanConn{c.f.open(c.value)}}, nil
}

func (c liteEdgeConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	r, err := c.liteScanConn.QueryContext(ctx, query, args)
	if err != nil {
		return nil, err
	}
	return liteEdgeRows{r.(*liteScanRows)}, nil
}

func (r liteEdgeRows) ScanColumn(ctx driver.ScanContext, index int, dest any) error {
	if index == 0 {
		return sql.ConvertAssign(ctx, dest, []byte{})
	}
	return sql.ConvertAssign(ctx, dest, nil)
}
