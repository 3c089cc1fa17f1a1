// Command example moves a live pool between two real PostgreSQL servers, and shows that
// nothing is lost on the way.
//
// go run ./example -help says what it does and what can be asked of it.
package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/infobloxopen/hotload"
	_ "github.com/infobloxopen/hotload/fsnotify"
	"github.com/infobloxopen/hotload/internal/pgserver"
	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// The whole of what a program has to say to hotload. The rest is sql.Open, in play.
func init() { hotload.Register("postgres", pq.Driver{}) }

func main() {
	// What reads the timeline may go away; the servers are stopped all the same.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // a second signal ends the program where it is
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

const usage = `Moves a live pool between two PostgreSQL servers, blue and green, as the connection
string in a file changes, and shows that nothing is lost on the way.

It starts two throwaway servers, writes blue's connection string to a file, opens that file
through hotload, and puts the pool under load. Then it changes the file as an operator would:
another server, another user, a mistake. A timeline shows who serves the operations. At the
end the rows on both servers are counted against the writes that the client saw succeed.

  go run ./example                          the whole story, in about twelve seconds
  go run ./example -config /tmp/config.txt  change the file yourself, until Ctrl-C
  go run ./example -blue DSN -green DSN     between two servers of your own

-config wants the path of a file that does not exist: it is made, with blue's connection
string, and removed at the end. With servers of your own the file may exist; then it is
left as you leave it. The program prints commands to paste that write it.

Exit status: 0 if every operation succeeded and every row is there exactly once, 1 if not,
2 if PostgreSQL's programs were not found or a flag is wrong, 130 if interrupted. With
-config an interrupt is the end, and the status is 0 or 1.

`

type options struct {
	blue, green string
	config      string
	duration    time.Duration // 0: until interrupted
	workers     int
}

// maxWorkers is for throwaway servers, which take 200 connections: in a change of users each
// worker may have a connection that is being closed beside its new one.
const maxWorkers = 90

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (status int) {
	var opts options
	flags := flag.NewFlagSet("example", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {}
	flags.StringVar(&opts.blue, "blue", "", "connection `string` of a server of your own, instead of a throwaway one")
	flags.StringVar(&opts.green, "green", "", "connection `string` of the other")
	flags.StringVar(&opts.config, "config", "", "watch this `file`, which you edit by hand, instead of showing the changes")
	flags.DurationVar(&opts.duration, "duration", 12*time.Second, "how long it all takes; with -config: until interrupted, unless given")
	flags.IntVar(&opts.workers, "workers", 8, "how many goroutines use the pool")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(stderr, usage)
		flags.PrintDefaults()
		return 0
	} else if err != nil {
		fmt.Fprintln(stderr, "example: see -help")
		return 2
	}
	timed := false
	flags.Visit(func(f *flag.Flag) { timed = timed || f.Name == "duration" })
	if opts.config != "" && !timed {
		opts.duration = 0
	}
	switch {
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "example: unexpected argument %q; see -help\n", flags.Arg(0))
		return 2
	case (opts.blue == "") != (opts.green == ""):
		fmt.Fprintln(stderr, "example: -blue and -green go together: two servers of your own, or none")
		return 2
	case opts.workers < 1 || opts.duration < 0:
		fmt.Fprintln(stderr, "example: -workers must be at least 1, and -duration not negative")
		return 2
	case opts.workers > maxWorkers && opts.blue == "":
		fmt.Fprintf(stderr, "example: -workers is %d, want at most %d on throwaway servers\n", opts.workers, maxWorkers)
		return 2
	}

	r, err := story(ctx, opts, stdout)
	switch {
	case errors.Is(err, pgserver.ErrNoPrograms):
		fmt.Fprintf(stderr, "example: %v\n", err)
		return 2
	case ctx.Err() != nil && (r == nil || opts.config == ""):
		message := "example: interrupted"
		if opts.blue == "" {
			message += "; the servers are stopped and their directories removed"
		}
		fmt.Fprintln(stderr, message)
		return 130
	case err != nil:
		fmt.Fprintf(stderr, "example: %v\n", err)
		return 1
	case !r.ok():
		return 1
	}
	return 0
}

// story gets two servers and a file, plays the demonstration on them, and cleans up.
// The report is nil if it did not come to its summary.
func story(ctx context.Context, opts options, out io.Writer) (*report, error) {
	if _, err := os.Stat(opts.config); err == nil && opts.blue == "" {
		return nil, fmt.Errorf("%s exists, and cannot know servers that are yet to be started; "+
			"name a file that does not exist: it is created, and removed at the end", opts.config)
	}
	// Names the tables and the pool's connections, so that nobody else's are meant.
	label := "hotload_example_" + strings.ToLower(rand.Text()[:8])
	connect := startServer
	if opts.blue != "" {
		connect = func(ctx context.Context, name, label string) (*server, error) {
			return ownServer(ctx, name, map[string]string{"blue": opts.blue, "green": opts.green}[name], label)
		}
	}
	var blue, green *server
	var errBlue, errGreen error
	var wg sync.WaitGroup
	wg.Go(func() { blue, errBlue = connect(ctx, "blue", label) })
	wg.Go(func() { green, errGreen = connect(ctx, "green", label) })
	wg.Wait()
	for _, s := range []*server{blue, green} {
		if s != nil {
			defer s.close()
		}
	}
	if err := cmp.Or(errBlue, errGreen); err != nil {
		return nil, err
	}
	for _, s := range []*server{blue, green} {
		if err := s.createTable(ctx, label); pq.As(err, pqerror.DuplicateTable) != nil {
			return nil, errors.New("-blue and -green lead to the same database, want two")
		} else if err != nil {
			return nil, err
		}
		defer s.dropTable(label)
	}

	d := demo{label: label, blue: blue, green: green}
	remove, err := d.makeFiles(opts.config)
	if err != nil {
		return nil, err
	}
	defer remove()
	return play(ctx, opts, d, out)
}

// makeFiles makes a directory with the connection strings, and the file that hotload is to watch
// if it does not exist. They have passwords: if remove is not called, a watchman removes them.
func (d *demo) makeFiles(config string) (remove func(), err error) {
	if d.dir, err = os.MkdirTemp("", "hotload-example-"); err != nil {
		return nil, err
	}
	d.file = filepath.Join(d.dir, "config.txt")
	if config != "" {
		d.file, err = filepath.Abs(config)
	}
	made := []string{d.dir}
	content := map[string]string{filepath.Join(d.dir, "blue"): d.blue.value, filepath.Join(d.dir, "green"): d.green.value}
	if _, missing := os.Stat(d.file); errors.Is(missing, os.ErrNotExist) {
		made = append(made, d.file)
		content[d.file] = d.blue.value
	}
	watchman, watchErr := pgserver.Watchman(made...)
	if watchErr != nil {
		os.Remove(d.dir)
		return nil, watchErr
	}
	remove = func() {
		for _, path := range made {
			os.RemoveAll(path)
		}
		watchman.Close()
	}
	for path, value := range content {
		err = cmp.Or(err, os.WriteFile(path, []byte(value+"\n"), 0o600))
	}
	if err != nil {
		remove()
		return nil, err
	}
	return remove, nil
}
