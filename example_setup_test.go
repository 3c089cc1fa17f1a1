package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"log"

	"github.com/infobloxopen/hotload"
	"github.com/lib/pq"
)

// setupDriver is lib/pq's driver, and runs a statement on each connection that it opens.
type setupDriver struct {
	pq.Driver
	statement string
}

func (d setupDriver) OpenConnector(dsn string) (driver.Connector, error) {
	c, err := pq.NewConnector(dsn)
	if err != nil {
		return nil, err
	}
	return setupConnector{c, d.statement}, nil
}

type setupConnector struct {
	driver.Connector
	statement string
}

func (c setupConnector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := conn.(driver.ExecerContext).ExecContext(ctx, c.statement, nil); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// A statement that is to run on each new connection, before anything else does, belongs to the
// driver. With probe=true a value on whose connection it fails is not put in force.
func Example_setup() {
	hotload.Register("setup", setupDriver{statement: "set role app_writer"})

	db, err := sql.Open("hotload", "fsnotify://setup/tmp/myconfig.txt?probe=true")
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()
}
