package hotload_test

import (
	"database/sql"
	"database/sql/driver"
	"log"
	"os"
	"path/filepath"
	"strings"

	"github.com/infobloxopen/hotload"
	"github.com/lib/pq"
)

// keysDriver is lib/pq's driver for values that are a password. The user's name is
// in the file "username" in dir.
type keysDriver struct {
	pq.Driver
	dir    string
	server string // the rest of the connection string
}

func (d keysDriver) OpenConnector(password string) (driver.Connector, error) {
	username, err := os.ReadFile(filepath.Join(d.dir, "username"))
	if err != nil {
		return nil, err
	}
	cfg, err := pq.NewConfig(d.server)
	if err != nil {
		return nil, err
	}
	cfg.User, cfg.Password = strings.TrimSpace(string(username)), password
	return pq.NewConnectorConfig(cfg)
}

// A Secret of type kubernetes.io/basic-auth has the keys username and password, which are files
// of the volume. The file that is watched is the password's: a change of the name alone goes
// unnoticed.
func Example_separateKeys() {
	hotload.Register("keys", keysDriver{dir: "/etc/db", server: "host=db dbname=app"})

	db, err := sql.Open("hotload", "fsnotify://keys/etc/db/password?probe=true")
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()
}
