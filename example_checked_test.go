package hotload_test

import (
	"database/sql"
	"database/sql/driver"
	"log"

	"github.com/infobloxopen/hotload"
	"github.com/lib/pq"
)

// checkedDriver is lib/pq's driver with an OpenConnector, which parses the value. Its
// dials heed their context, as long as TCP is not connected yet.
type checkedDriver struct{ pq.Driver }

func (checkedDriver) OpenConnector(dsn string) (driver.Connector, error) {
	return pq.NewConnector(dsn)
}

// With lib/pq's connector a value that does not parse changes nothing: it is refused.
// With pq.Driver alone it would be put in force, and its dials would fail.
func Example_checked() {
	hotload.Register("checked", checkedDriver{})

	db, err := sql.Open("hotload", "fsnotify://checked/tmp/myconfig.txt")
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()
}
