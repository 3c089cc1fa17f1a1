//go:build go1.27

package hotload

import (
	"database/sql"
	"database/sql/driver"
)

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
	if !r.s.enter() {
		return ErrKilled
	}
	return r.next(r.scanner.NextRow())
}

// ScanColumn has a cursor scanned as it is, to wrap it as Next does, before it
// becomes a sql.Rows.
func (r scannerRows) ScanColumn(scanCtx driver.ScanContext, index int, dest any) error {
	if !r.s.enter() {
		return ErrKilled
	}
	target := dest
	if _, ok := dest.(*sql.Rows); ok {
		target = new(any)
	}
	err := r.s.leave(r.scanner.ScanColumn(scanCtx, index, target))
	value, ok := target.(*any)
	if err != nil || !ok || value == nil {
		return err
	}
	if cursor, ok := (*value).(driver.Rows); ok {
		*value = wrapRows(&rows{Rows: cursor, s: r.s})
	}
	if target != dest {
		return sql.ConvertAssign(scanCtx, dest, *value)
	}
	return nil
}
