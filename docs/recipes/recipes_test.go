package recipes_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/infobloxopen/hotload"
	"github.com/infobloxopen/hotload/internal/pgserver"
	"github.com/lib/pq"
	"modernc.org/sqlite"
)

// limit is how long what must happen is waited for; only a failing test waits it out.
const limit = 30 * time.Second

// put puts a file in place by rename.
func put(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// dsn is the data source name for a driver and a file.
func dsn(name, path string) string {
	path = filepath.ToSlash(path)
	if !strings.HasPrefix(path, "/") {
		path = "/" + path // C:/dir/file
	}
	return "fsnotify://" + name + path
}

func open(t *testing.T, name string) *sql.DB {
	t.Helper()
	db, err := sql.Open("hotload", name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// follows fails the test unless ask, which no error may ever come of, answers old now, and new
// soon after the change.
func follows(t *testing.T, ask func() (string, error), old, new string, change func()) {
	t.Helper()
	if got, err := ask(); err != nil || got != old {
		t.Fatalf("before the change: %q, %v; want %q", got, err, old)
	}
	change()
	for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		got, err := ask()
		switch {
		case err != nil:
			t.Fatalf("at the change: %v", err)
		case got == new:
			return
		case got != old:
			t.Fatalf("at the change: %q, want %q or %q", got, old, new)
		case time.Now().After(end):
			t.Fatalf("still %q %v after the change, want %q", got, limit, new)
		}
	}
}

func init() {
	hotload.Register("postgres", pq.Driver{})
	sqlite.MustRegisterDeterministicScalarFunction("twice", 1,
		func(_ *sqlite.FunctionContext, args []driver.Value) (driver.Value, error) {
			return 2 * args[0].(int64), nil
		})
}

// TestSQLite: the pool moves from one database to another, and on both it has the functions
// that were registered with the driver.
func TestSQLite(t *testing.T) {
	dir := t.TempDir()
	for n, name := range []string{"one", "two"} {
		db, err := sql.Open("sqlite", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := db.Exec("create table t as select ? as n", n+1); err != nil {
			t.Fatal(err)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "dsn")
	put(t, file, filepath.Join(dir, "one"))
	db := open(t, dsn("sqlite", file))
	ask := func() (s string, err error) {
		err = db.QueryRow("select twice(n) from t").Scan(&s)
		return s, err
	}
	follows(t, ask, "2", "4", func() { put(t, file, filepath.Join(dir, "two")) })
}

// TestMySQL: MySQL's driver parses a value before it is put in force. No server is needed for that.
func TestMySQL(t *testing.T) {
	file := filepath.Join(t.TempDir(), "dsn")
	put(t, file, "not a connection string")
	err := open(t, dsn("mysql", file)).Ping()
	if err == nil || !strings.Contains(err.Error(), `driver "mysql" refused the connection string`) {
		t.Errorf("Ping: %v, want a refusal", err)
	}
}

// TestPostgres: each way to get at a pool on PostgreSQL follows a change of user.
func TestPostgres(t *testing.T) {
	server := pgserver.ForTest(t, pgserver.Options{Name: "recipes", Users: map[string]string{"one": "1", "two": "2"}})
	const query = "select current_user::text"
	asking := func(db *sql.DB) func() (string, error) {
		return func() (s string, err error) {
			err = db.QueryRow(query).Scan(&s)
			return s, err
		}
	}
	for name, open := range map[string]func(t *testing.T, file string) func() (string, error){
		"pgx": func(t *testing.T, file string) func() (string, error) {
			return asking(open(t, dsn("pgx", file)))
		},
		"otelsql under hotload": func(t *testing.T, file string) func() (string, error) {
			return asking(open(t, dsn("traced", file)))
		},
		"otelsql around hotload": func(t *testing.T, file string) func() (string, error) {
			db, err := openTraced(dsn("postgres", file))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { db.Close() })
			return asking(db)
		},
		"gorm": func(t *testing.T, file string) func() (string, error) {
			db, err := openGorm(open(t, dsn("pgx", file)))
			if err != nil {
				t.Fatal(err)
			}
			return func() (s string, err error) {
				err = db.Raw(query).Scan(&s).Error
				return s, err
			}
		},
		"sqlx": func(t *testing.T, file string) func() (string, error) {
			db := openSqlx(open(t, dsn("postgres", file)))
			return func() (s string, err error) {
				err = db.Get(&s, db.Rebind("select current_user where 1 = ?"), 1)
				return s, err
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "dsn")
			put(t, file, server.DSN("one", "1"))
			ask := open(t, file)
			follows(t, ask, "one", "two", func() { put(t, file, server.DSN("two", "2")) })
		})
	}

	t.Run("pgx's own connection", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "dsn")
		put(t, file, server.DSN("one", "1"))
		db := open(t, dsn("pgx", file))
		db.SetMaxOpenConns(1)
		pid, err := backend(context.Background(), db)
		if err != nil {
			t.Fatal(err)
		}
		var want string
		if err := db.QueryRow("select pg_backend_pid()").Scan(&want); err != nil || fmt.Sprint(pid) != want {
			t.Errorf("process %d, %v; want %s", pid, err, want)
		}
	})
}
