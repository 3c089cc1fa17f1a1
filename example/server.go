package main

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/infobloxopen/hotload/internal/pgserver"
	"github.com/lib/pq"
)

const (
	firstUser  = "app_1"
	secondUser = "app_2"
)

// A server is one of the two between which the pool moves.
type server struct {
	name      string           // blue or green
	address   string           // for people
	value     string           // what the file says when the pool is to use this server
	user      string           // who the pool is when it says so
	admin     *sql.DB          // the demonstration's own eyes and hands, past hotload
	throwaway *pgserver.Server // nil if the server is the person's own
}

func startServer(ctx context.Context, name, application string) (*server, error) {
	password := rand.Text()
	pg, err := pgserver.Start(ctx, pgserver.Options{Name: "hotload-" + name, Users: map[string]string{firstUser: password}})
	if err != nil {
		return nil, err
	}
	s := &server{
		name:      name,
		address:   fmt.Sprintf("127.0.0.1:%d, a throwaway", pg.Port()),
		user:      firstUser,
		throwaway: pg,
	}
	if s.value, err = tagged(pg.DSN(firstUser, password), application); err == nil {
		s.admin, err = sql.Open("postgres", pg.SuperDSN())
	}
	if err != nil {
		pg.Close()
		return nil, err
	}
	return s, nil
}

func ownServer(ctx context.Context, name, dsn, application string) (*server, error) {
	s := &server{name: name, address: "your own"}
	var err error
	if s.value, err = tagged(dsn, application); err != nil {
		return nil, fmt.Errorf("-%s: not a connection string that lib/pq reads: %w", name, errors.Unwrap(err))
	}
	if s.admin, err = sql.Open("postgres", dsn); err != nil {
		return nil, fmt.Errorf("-%s: %w", name, err)
	}
	if err = s.admin.QueryRowContext(ctx, "SELECT current_user").Scan(&s.user); err != nil {
		s.admin.Close()
		return nil, fmt.Errorf("-%s: %w", name, err)
	}
	return s, nil
}

func (s *server) close() {
	s.admin.Close()
	if s.throwaway != nil {
		s.throwaway.Close()
	}
}

// createTable makes the table for the writes, with a column that tells whose table it is.
// Nothing makes its numbers unique: a write that ran twice is to be seen.
func (s *server) createTable(ctx context.Context, table string) error {
	query := fmt.Sprintf(`CREATE TABLE %s (n bigint NOT NULL, server text NOT NULL DEFAULT %s);
		CREATE INDEX ON %[1]s (n);
		INSERT INTO %[1]s VALUES (0)`, table, pq.QuoteLiteral(s.name))
	if s.throwaway != nil {
		query += fmt.Sprintf(`; GRANT SELECT, INSERT ON %s TO %s`, table, firstUser)
	}
	if _, err := s.admin.ExecContext(ctx, query); err != nil {
		return fmt.Errorf("%s: %w", s.name, err)
	}
	return nil
}

func (s *server) dropTable(table string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err := s.admin.ExecContext(ctx, "DROP TABLE "+table)
	return err
}

// rows counts the rows of each write.
func (s *server) rows(ctx context.Context, table string) (map[int64]int, error) {
	rows, err := s.admin.QueryContext(ctx, "SELECT n, count(*) FROM "+table+" WHERE n > 0 GROUP BY n")
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	defer rows.Close()
	found := map[int64]int{}
	for rows.Next() {
		var n int64
		var count int
		if err := rows.Scan(&n, &count); err != nil {
			return nil, err
		}
		found[n] = count
	}
	return found, rows.Err()
}

// connections counts the pool's connections to the database as the server sees them: all, or those of one user.
func (s *server) connections(ctx context.Context, application, user string) (n int, err error) {
	err = s.admin.QueryRowContext(ctx, `SELECT count(*) FROM pg_stat_activity
		WHERE datname = current_database() AND application_name = $1 AND ($2 = '' OR usename = $2)`, application, user).Scan(&n)
	return n, err
}

// emptied waits until the connections are gone: the server may take a moment to notice that a
// client is. It returns how many there are after all.
func (s *server) emptied(ctx context.Context, application, user string, wait time.Duration) (n int, err error) {
	for end := time.Now().Add(wait); ; time.Sleep(2 * time.Millisecond) {
		n, err = s.connections(ctx, application, user)
		if err != nil || n == 0 || time.Now().After(end) {
			return n, err
		}
	}
}

// tagged returns a connection string with an application_name, by which a server tells the
// pool's connections from others.
func tagged(dsn, application string) (string, error) {
	if !strings.HasPrefix(dsn, "postgres://") && !strings.HasPrefix(dsn, "postgresql://") {
		return dsn + " application_name=" + application, nil // the last one holds
	}
	u, err := url.Parse(dsn)
	if err != nil {
		return "", err
	}
	q := u.Query()
	q.Set("application_name", application)
	u.RawQuery = q.Encode()
	return u.String(), nil
}
