package hotload_test

import (
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"log"

	"github.com/infobloxopen/hotload"
	"github.com/lib/pq"
)

// secretDriver is lib/pq's driver for values as AWS Secrets Manager keeps them for a
// PostgreSQL database: JSON.
type secretDriver struct{ pq.Driver }

func (secretDriver) OpenConnector(secret string) (driver.Connector, error) {
	var s struct {
		Host, Username, Password, DBName string
		Port                             uint16
	}
	if err := json.Unmarshal([]byte(secret), &s); err != nil {
		return nil, err
	}
	if s.Host == "" || s.Port == 0 || s.Username == "" {
		return nil, errors.New("the secret has no host, no port or no username")
	}
	cfg, err := pq.NewConfig("connect_timeout=5") // what else the connections are to have
	if err != nil {
		return nil, err
	}
	cfg.Host, cfg.Port, cfg.Database = s.Host, s.Port, s.DBName
	cfg.User, cfg.Password = s.Username, s.Password
	return pq.NewConnectorConfig(cfg)
}

// A value need not be a connection string: OpenConnector makes of it what the driver needs.
// Here it is a JSON secret. What OpenConnector refuses is not put in force.
func Example_jsonSecret() {
	hotload.Register("secret", secretDriver{})

	db, err := sql.Open("hotload", "fsnotify://secret/run/secrets/db.json?probe=true")
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()
}
