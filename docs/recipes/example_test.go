package recipes_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"log"

	"github.com/XSAM/otelsql"
	"github.com/go-sql-driver/mysql"
	"github.com/infobloxopen/hotload"
	_ "github.com/infobloxopen/hotload/fsnotify"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
	"gorm.io/driver/postgres"
	"gorm.io/gorm"
	_ "modernc.org/sqlite"
)

func init() {
	registerPgx()
	registerMySQL()
	registerSQLite()
	registerTraced()
}

func registerPgx() {
	hotload.Register("pgx", stdlib.GetDefaultDriver())
}

func registerMySQL() {
	hotload.Register("mysql", mysql.MySQLDriver{})
}

func registerSQLite() {
	db, err := sql.Open("sqlite", "") // opens no database: it is asked for its driver
	if err != nil {
		log.Fatal(err)
	}
	hotload.Register("sqlite", db.Driver())
}

func registerTraced() {
	hotload.Register("traced", otelsql.WrapDriver(pq.Driver{}))
}

func openTraced(dsn string) (*sql.DB, error) {
	return otelsql.Open("hotload", dsn)
}

func openGorm(db *sql.DB) (*gorm.DB, error) {
	return gorm.Open(postgres.New(postgres.Config{Conn: db}))
}

func openSqlx(db *sql.DB) *sqlx.DB {
	return sqlx.NewDb(db, "postgres")
}

// backend asks pgx's own connection for what database/sql does not have.
func backend(ctx context.Context, db *sql.DB) (pid uint32, err error) {
	conn, err := db.Conn(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	err = conn.Raw(func(driverConn any) error {
		c, ok := driverConn.(interface{ Raw() driver.Conn }).Raw().(*stdlib.Conn)
		if !ok {
			return errors.New("no connection")
		}
		pid = c.Conn().PgConn().PID()
		return nil
	})
	return pid, err
}
