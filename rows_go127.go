//go:build go1.27

package hotload

import "database/sql/driver"

// A scannerRows is rows of a driver that scans columns itself. database/sql
// does not call Next then.
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
	if !r.call.k.enter() {
		return ErrKilled
	}
	return r.next(r.scanner.NextRow())
}

func (r scannerRows) ScanColumn(scanCtx driver.ScanContext, index int, dest any) error {
	if !r.call.k.enter() {
		return ErrKilled
	}
	return r.call.k.leave(r.scanner.ScanColumn(scanCtx, index, dest))
}
