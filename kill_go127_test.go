//go:build go1.27

package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
)

func init() {
	cursorFakes["ScanColumn"] = func(f *fake) driver.Driver { return scannerFake{f} }
}

// A scannerFake has rows that scan their column, a cursor, themselves.
type scannerFake struct{ *fake }

type scannerConn struct{ *fakeConn }

type cursorScanner struct{ *fakeRows }

func (f scannerFake) Open(value string) (driver.Conn, error) {
	c, err := f.fake.Open(value)
	if err != nil {
		return nil, err
	}
	return scannerConn{c.(*fakeConn)}, nil
}

func (c scannerConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	r, err := c.fakeConn.QueryContext(ctx, query, args)
	return cursorScanner{r.(*fakeRows)}, err
}

func (r cursorScanner) NextRow() error { return r.Next(make([]driver.Value, 1)) }

func (r cursorScanner) ScanColumn(scanCtx driver.ScanContext, _ int, dest any) error {
	cursor := &fakeRows{c: r.c, ctx: context.Background(), left: 2}
	return sql.ConvertAssign(scanCtx, dest, driver.Rows(cursor))
}
