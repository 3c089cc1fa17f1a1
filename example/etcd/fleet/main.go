// Command fleet shows a fleet of programs that follow one key of etcd, and measures how long
// it takes until every pool of theirs is on a new value.
//
// It starts an etcd server and, as processes of their own, the programs. Each has many pools,
// all opened through hotload with the strategy of package etcd, and each pool runs an operation
// every 10 ms, which tells which value its connection was opened with. Then the key is changed,
// again and again. At the end it says how long after a put the value was in force, and how long
// after it the first operation ran on it, which includes up to 10 ms until the next one was due.
//
//	go run ./fleet                # 4 processes with 50 pools each, for twelve seconds
//	go run ./fleet -outage 10s    # etcd is killed in the middle, and started again
//
// It needs nothing installed: the driver answers at once, and there is no database. To move
// between two PostgreSQL servers, give a connection string for each, with {change} where
// the number of the change is to stand:
//
//	go run ./fleet -processes 2 -pools 20 \
//		-dsn 'host=db1 user=app password=... application_name={change}' \
//		-dsn 'host=db2 user=app password=... application_name={change}'
//
// Exit status: 0 if every operation succeeded and every pool is on the last value, 1 if not,
// 2 if a flag is wrong, 130 if interrupted.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const (
	key      = "/services/orders/dsn"
	patience = 3 * time.Minute // gRPC waits up to two minutes before it connects again
)

func main() {
	if role := os.Getenv(childEnv); role != "" {
		beChild(role)
		return
	}
	// What reads the drawing may go away; everything is cleaned up all the same.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

type options struct {
	processes, pools        int
	every, duration, outage time.Duration
	dsns                    []string
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (status int) {
	var opts options
	flags := flag.NewFlagSet("fleet", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&opts.processes, "processes", 4, "how many programs follow the key")
	flags.IntVar(&opts.pools, "pools", 50, "how many pools each of them has")
	flags.DurationVar(&opts.every, "every", 300*time.Millisecond, "how often the key is changed")
	flags.DurationVar(&opts.duration, "duration", 12*time.Second, "for how long, the outage not counted")
	flags.DurationVar(&opts.outage, "outage", 0, "kill etcd in the middle, and start it again after so long")
	flags.Func("dsn", "connection `string` of a PostgreSQL server, with application_name={change}; give two", func(s string) error {
		if !strings.Contains(s, "application_name={change}") {
			return errors.New("want one with application_name={change}")
		}
		opts.dsns = append(opts.dsns, s)
		return nil
	})
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	switch {
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "fleet: unexpected argument %q; see -help\n", flags.Arg(0))
		return 2
	case opts.processes < 1 || opts.pools < 1 || opts.every <= 0 || opts.duration < opts.every || opts.outage < 0:
		fmt.Fprintln(stderr, "fleet: -processes and -pools must be at least 1, -every positive, -duration at least -every, -outage not negative")
		return 2
	case len(opts.dsns) != 0 && len(opts.dsns) != 2:
		fmt.Fprintf(stderr, "fleet: -dsn was given %d times, want two servers or none\n", len(opts.dsns))
		return 2
	}
	ok, err := story(ctx, opts, stdout)
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "fleet: interrupted; every process is stopped and the directory removed")
		return 130
	case err != nil:
		fmt.Fprintln(stderr, "fleet:", err)
		return 1
	case !ok:
		return 1
	}
	return 0
}

// story starts everything, changes the key, reports, and leaves nothing behind. It reports whether
// all went well.
func story(ctx context.Context, opts options, out io.Writer) (ok bool, err error) {
	ctx, fail := context.WithCancelCause(ctx) // a child that dies ends it all
	defer fail(nil)
	f := newFleet(opts, out, fail)
	if f.dir, err = os.MkdirTemp("", "hotload-fleet-"); err != nil {
		return false, err
	}
	defer os.RemoveAll(f.dir)
	if f.etcd, err = startEtcd(ctx, fail, f.dir, 0); err != nil {
		return false, err
	}
	defer func() { f.etcd.end() }() // the second, after an outage
	endpoint := fmt.Sprintf("127.0.0.1:%d", f.etcd.port)
	if f.client, err = clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()}); err != nil {
		return false, err
	}
	defer f.client.Close()
	if err := f.change(ctx); err != nil {
		return false, err
	}
	stop, err := f.startPrograms(endpoint)
	defer stop()
	if err != nil {
		return false, err
	}
	if err := f.settled(ctx); err != nil {
		return false, err
	}
	stopDrawing := f.draw()
	defer stopDrawing()

	if opts.outage > 0 {
		opts.duration /= 2 // before it, and after it
		if err := f.changes(ctx, opts.duration); err != nil {
			return false, err
		}
		if err := f.withoutEtcd(ctx); err != nil {
			return false, err
		}
	}
	if err := f.changes(ctx, opts.duration); err != nil {
		return false, err
	}
	stop()
	stopDrawing()
	return f.summary(), context.Cause(ctx)
}

// startPrograms starts the programs. Stop ends those that were started, and returns when they are gone.
func (f *fleet) startPrograms(endpoint string) (stop func(), err error) {
	var programs []*child
	stop = sync.OnceFunc(func() {
		var ending sync.WaitGroup
		for _, p := range programs {
			ending.Go(p.end)
		}
		ending.Wait()
	})
	cfg := childConfig{Role: "program", Dir: f.dir, Endpoint: endpoint, Pools: f.opts.pools, PostgreSQL: f.opts.dsns != nil}
	for i := range f.opts.processes {
		p, err := startChild(f.fail, cfg, func(m message) { f.heard(i, m) })
		if err != nil {
			return stop, err
		}
		programs = append(programs, p)
	}
	return stop, nil
}

// changes changes the key every so often, and returns when every pool is on the last value.
func (f *fleet) changes(ctx context.Context, d time.Duration) error {
	for end := time.Now().Add(d); time.Now().Before(end); {
		if err := sleep(ctx, f.opts.every); err != nil {
			return err
		}
		if err := f.change(ctx); err != nil {
			return err
		}
	}
	return f.settled(ctx)
}

// withoutEtcd kills etcd, and starts it again in the same directory and on the same port. Then it
// changes the key, and measures when the last pool is on that value.
func (f *fleet) withoutEtcd(ctx context.Context) error {
	f.etcd.end()
	f.mark("etcd is killed")
	if err := sleep(ctx, f.opts.outage); err != nil {
		return err
	}
	etcd, err := startEtcd(ctx, f.fail, f.dir, f.etcd.port)
	if err != nil {
		return err
	}
	f.etcd = etcd
	f.mark("etcd is back")
	began := time.Now()
	if err := f.change(ctx); err != nil {
		return err
	}
	f.returned = len(f.puts)
	f.mark(fmt.Sprintf("it has a new value, %.1f s later: the client that puts it had to connect again, too", time.Since(began).Seconds()))
	if err := f.settled(ctx); err != nil {
		return err
	}
	f.followed = time.Since(began)
	f.mark(fmt.Sprintf("the last pool is on it, %.1f s after etcd was back", f.followed.Seconds()))
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// value is the connection string of a change. They lead to two servers by turns.
func (o options) value(change int) string {
	if o.dsns == nil {
		return fmt.Sprintf("host=%s application_name=%d", colour(change), change)
	}
	return strings.ReplaceAll(o.dsns[change%2], "{change}", strconv.Itoa(change))
}

func colour(change int) string { return []string{"blue", "green"}[change%2] }
