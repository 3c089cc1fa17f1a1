//go:build go1.27

package hotload

import (
	"database/sql"
	"database/sql/driver"
)

// A scannerRows is rows of a driver that scans columns itself. database/sql
// calls NextRow and ScanColumn then, and not Next.
type scannerRows struct {
	*rows
	scanner driver.RowsColumnScanner
}

var _ driver.RowsColumnScanner = scannerRows{}

func init() {
	wrapRows = func(r *rows) driver.Rows {
		if scanner, ok := r.Rows.(driver.RowsColumnScanner); ok {
			return scannerRows{r, scanner}
		}
		return r
	}
}

func (r scannerRows) NextRow() error {
	if !r.call.s.k.enter() {
		return ErrKilled
	}
	return r.leave(r.noteMore(r.scanner.NextRow()), func() { r.buf = r.buf[:0] })
}

// ScanColumn copies the bytes that the driver has filled a RawBytes with, as
// Next does.
func (r scannerRows) ScanColumn(scanCtx driver.ScanContext, index int, dest any) error {
	if !r.call.s.k.enter() {
		return ErrKilled
	}
	return r.leave(r.scanner.ScanColumn(scanCtx, index, dest), func() {
		if raw, ok := dest.(*sql.RawBytes); ok {
			*raw = r.keep(*raw)
		}
	})
}
