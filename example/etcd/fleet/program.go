package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/infobloxopen/hotload"
	"github.com/infobloxopen/hotload/example/etcd"
	"github.com/lib/pq"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const (
	operationEvery = 10 * time.Millisecond
	tellEvery      = 50 * time.Millisecond
)

// A program is what a service of the fleet would be, with counters.
type program struct {
	tell *json.Encoder

	mu     sync.Mutex // guards counts
	counts message    // what is to be told
}

// beProgram opens the pools and runs operations until the process is told to end.
func beProgram(ctx context.Context, cfg childConfig, tell *json.Encoder) error {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{cfg.Endpoint}, Logger: zap.NewNop()})
	if err != nil {
		return err
	}
	defer client.Close() // after the pools
	p := &program{tell: tell}
	hotload.RegisterStrategy("etcd", etcd.New(client))
	hotload.Register("instant", noting{p, instant{}, instantConnector})
	hotload.Register("postgres", noting{p, pq.Driver{}, postgresConnector})
	name := "instant"
	if cfg.PostgreSQL {
		name = "postgres"
	}

	var pools sync.WaitGroup
	defer p.tellCounts()
	defer pools.Wait()
	for i := range cfg.Pools {
		db, err := sql.Open("hotload", "etcd://"+name+key)
		if err != nil {
			return err
		}
		pools.Go(func() {
			defer db.Close()
			p.use(ctx, db, i)
		})
	}
	for sleep(ctx, tellEvery) == nil {
		p.tellCounts()
	}
	return nil
}

func (p *program) tellCounts() {
	p.mu.Lock()
	counts := p.counts
	p.counts = message{}
	p.mu.Unlock()
	p.tell.Encode(counts)
}

// use runs an operation on a pool every so often, and notes when the first has run on a new value.
func (p *program) use(ctx context.Context, db *sql.DB, pool int) {
	if sleep(ctx, rand.N(operationEvery)) != nil { // not all pools at the same moment
		return
	}
	tick := time.NewTicker(operationEvery)
	defer tick.Stop()
	for last := 0; ctx.Err() == nil; {
		change, err := operation(db)
		at := time.Now()
		if err == nil && change < last {
			err = fmt.Errorf("pool %d went back from change %d to %d", pool, last, change)
		}
		p.mu.Lock()
		p.counts.Operations++
		if err != nil {
			p.counts.Failures++
			if p.counts.Failure == "" {
				p.counts.Failure = err.Error()
			}
		} else if change > last {
			p.counts.Arrivals = append(p.counts.Arrivals, arrival{pool, change, at})
			last = change
		}
		p.mu.Unlock()
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// operation asks for the application_name that its connection was opened with: the number of a change.
func operation(db *sql.DB) (change int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err = db.QueryRowContext(ctx, "SELECT current_setting('application_name')").Scan(&change)
	return change, err
}

// noting is a driver that notes when hotload hands it a new value, which is the moment before that
// is in force.
type noting struct {
	*program
	driver.Driver
	connector func(dsn string, change int) (driver.Connector, error)
}

func (n noting) OpenConnector(dsn string) (driver.Connector, error) {
	at := time.Now()
	var change int
	_, after, _ := strings.Cut(dsn, "application_name=")
	if _, err := fmt.Sscanf(after, "%d", &change); err != nil {
		return nil, errors.New("fleet: a connection string without the number of its change")
	}
	n.mu.Lock()
	n.counts.InForce = append(n.counts.InForce, arrival{Change: change, At: at})
	n.mu.Unlock()
	return n.connector(dsn, change)
}

func postgresConnector(dsn string, _ int) (driver.Connector, error) { return pq.NewConnector(dsn) }

func instantConnector(_ string, change int) (driver.Connector, error) {
	return instant{int64(change)}, nil
}

// instant is a driver that answers every query at once, with the application_name of its connection.
type instant struct{ change int64 }

func (i instant) Connect(context.Context) (driver.Conn, error) { return instantConn(i), nil }
func (i instant) Driver() driver.Driver                        { return i }
func (instant) Open(string) (driver.Conn, error)               { return nil, errors.ErrUnsupported }

type instantConn struct{ change int64 }

func (c instantConn) QueryContext(context.Context, string, []driver.NamedValue) (driver.Rows, error) {
	return &instantRows{change: c.change}, nil
}
func (instantConn) Prepare(string) (driver.Stmt, error) { return nil, errors.ErrUnsupported }
func (instantConn) Begin() (driver.Tx, error)           { return nil, errors.ErrUnsupported }
func (instantConn) Close() error                        { return nil }

type instantRows struct {
	change int64
	done   bool
}

func (*instantRows) Columns() []string { return []string{"current_setting"} }
func (*instantRows) Close() error      { return nil }
func (r *instantRows) Next(dest []driver.Value) error {
	if r.done {
		return io.EOF
	}
	r.done, dest[0] = true, r.change
	return nil
}
