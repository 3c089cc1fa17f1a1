//go:build go1.27

package hotload_test

import (
	"database/sql"
	"database/sql/driver"
	"io"
)

func init() {
	variants = append(variants,
		&variant{
			name: "RowsColumnScanner", context: true, failing: true,
			conn: func(c *recConn) driver.Conn { return full(c) },
			rows: func(r *recRows) driver.Rows {
				return struct {
					fullRows
					scannerRows
				}{fullRowsOf(r).(fullRows), scannerRows{r}}
			},
		},
		&variant{
			name: "RowsColumnScanner, no other interfaces of Rows",
			conn: func(c *recConn) driver.Conn { return c },
			rows: func(r *recRows) driver.Rows {
				return struct {
					*recRows
					scannerRows
				}{r, scannerRows{r}}
			},
		},
	)
}

// scannerRows is a RowsColumnScanner. Its values differ from those of Next,
// which database/sql does not call then.
type scannerRows struct{ r *recRows }

func (i scannerRows) NextRow() error {
	if err := i.r.c.call(i.r.ctx, "Rows.NextRow"); err != nil {
		return err
	}
	if i.r.query == "none" || i.r.row == 2 {
		return io.EOF
	}
	i.r.row++
	return nil
}

func (i scannerRows) ScanColumn(scanCtx driver.ScanContext, index int, dest any) error {
	if err := i.r.c.call(i.r.ctx, "ScanColumn", index); err != nil {
		return err
	}
	return sql.ConvertAssign(scanCtx, dest, []driver.Value{int64(1000 + i.r.row), []byte("scanned")}[index])
}
