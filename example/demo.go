package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/lib/pq"
)

// A demo is one showing.
type demo struct {
	label       string // of the tables and the pool's connections
	dir         string // has what file can say, in files called blue and green
	file        string // that hotload watches
	blue, green *server

	load     *load
	events   *events
	timeline *timeline

	current target
	changes []change
}

// A target is what the file can say: a server, and the user to be there.
type target struct {
	*server
	user, value string
}

func (t target) place() place { return place{t.name, t.user} }

// A change is what became of a change of the file.
type change struct {
	title string
	first time.Duration // from the change to the end of the first operation at the new place
	left  time.Duration // from the change to the last connection leaving the old one
	note  string        // instead, for one that is to change nothing
}

// A step is a part of the story.
type step struct {
	title string
	do    func(*demo, context.Context, *change) error
	// own tells that it can be done on a person's own servers: it makes no users and stops no server.
	own bool
}

var steps = []step{
	{"move to green: a new file renamed over the old", (*demo).moveToGreen, true},
	{"another user on green, the old one dropped", (*demo).rotateUser, false},
	{"the file empty for a moment", (*demo).emptyFile, true},
	{"back to blue: the file written in place", (*demo).moveToBlue, true},
	{"bad values, then a server that is not up yet", (*demo).badValues, false},
}

// play opens the pool, puts it under load, tells the story, and reports.
func play(ctx context.Context, opts options, d demo, out io.Writer) (*report, error) {
	d.timeline = newTimeline(out, opts.workers)
	d.events = newEvents(d.timeline.log)
	// What hotload logs goes where an operator's log processor would be.
	slog.SetDefault(slog.New(d.events))

	path := filepath.ToSlash(d.file)
	dsn := url.URL{Scheme: "fsnotify", Host: "postgres", Path: "/" + strings.TrimPrefix(path, "/"), RawQuery: "probe=true"}
	db, err := sql.Open("hotload", dsn.String())
	if err != nil {
		return nil, err
	}
	defer db.Close()
	// As many connections as workers, the slow one not counted: they have to take turns.
	db.SetMaxOpenConns(opts.workers)
	db.SetMaxIdleConns(opts.workers)

	d.current = target{d.blue, d.blue.user, d.blue.value}
	d.timeline.intro(&d, dsn.String(), opts)
	if d.load, err = startLoad(ctx, db, d.label, opts.workers); err != nil {
		return nil, fmt.Errorf("the pool's first connection: %w", err)
	}
	stopDrawing := d.timeline.follow(&d)
	err = d.tell(ctx, opts)
	stopDrawing()
	d.load.stop()
	db.Close()

	r, reconcileErr := d.reconcile()
	if reconcileErr != nil {
		return nil, errors.Join(err, reconcileErr)
	}
	d.timeline.summary(r)
	return r, err
}

// tell takes the steps at equal distances; when the file is the person's to edit, it waits.
func (d *demo) tell(ctx context.Context, opts options) error {
	if opts.config != "" {
		if opts.duration > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, opts.duration)
			defer cancel()
		}
		<-ctx.Done()
		return nil
	}
	todo := make([]step, 0, len(steps))
	for _, s := range steps {
		if s.own || d.blue.throwaway != nil {
			todo = append(todo, s)
		}
	}
	begin := time.Now()
	for i, s := range todo {
		if err := until(ctx, begin.Add(opts.duration*time.Duration(i+1)/time.Duration(len(todo)+1))); err != nil {
			return err
		}
		d.timeline.heading(fmt.Sprintf("%d. %s", i+1, s.title))
		c := change{title: s.title}
		if err := s.do(d, ctx, &c); err != nil {
			return fmt.Errorf("step %d, %s: %w", i+1, s.title, err)
		}
		d.changes = append(d.changes, c)
	}
	return until(ctx, begin.Add(opts.duration))
}

func until(ctx context.Context, at time.Time) error {
	select {
	case <-time.After(time.Until(at)):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *demo) moveToGreen(ctx context.Context, c *change) error {
	return d.move(ctx, c, target{d.green, d.green.user, d.green.value}, "a new file renamed over: green", d.rename)
}

func (d *demo) moveToBlue(ctx context.Context, c *change) error {
	return d.move(ctx, c, target{d.blue, d.blue.user, d.blue.value}, "the file written in place: blue", d.writeInPlace)
}

// rotateUser is a change of credentials: the new user is made, the file changed, and the old
// user dropped as soon as hotload has logged that its last connection is gone.
func (d *demo) rotateUser(ctx context.Context, c *change) error {
	password := rand.Text()
	if _, err := d.green.admin.ExecContext(ctx, fmt.Sprintf(
		`CREATE ROLE %s LOGIN PASSWORD %s; GRANT SELECT, INSERT ON %s TO %[1]s`,
		secondUser, pq.QuoteLiteral(password), d.label)); err != nil {
		return err
	}
	value, err := tagged(d.green.throwaway.DSN(secondUser, password), d.label)
	if err != nil {
		return err
	}
	old := d.current
	if err := d.move(ctx, c, target{d.green, secondUser, value}, "a new file renamed over: user "+secondUser, d.rename); err != nil {
		return err
	}
	if _, err := d.green.admin.ExecContext(ctx, fmt.Sprintf(`DROP OWNED BY %s; DROP ROLE %[1]s`, old.user)); err != nil {
		return err
	}
	d.green.user, d.green.value = secondUser, value
	d.timeline.note("user " + old.user + " dropped on green")
	return nil
}

// emptyFile shows a writer caught between truncating the file and writing it.
func (d *demo) emptyFile(ctx context.Context, c *change) error {
	d.timeline.mark("the file is empty")
	seen := len(d.events.since(0))
	if err := d.writeInPlace(""); err != nil {
		return err
	}
	if err := until(ctx, time.Now().Add(500*time.Millisecond)); err != nil {
		return err
	}
	d.timeline.mark("the file is as it was")
	if err := d.writeInPlace(d.current.value); err != nil {
		return err
	}
	if err := until(ctx, time.Now().Add(200*time.Millisecond)); err != nil {
		return err
	}
	if slices.Contains(d.events.since(seen), valueAccepted) {
		return errors.New("hotload took the empty file for a new value")
	}
	c.note = "nothing changed"
	return nil
}

// badValues puts values into the file that do not work, and one that does not work yet. With
// probe=true a value is tried first, and the pool goes on with the last good one until one works.
func (d *demo) badValues(ctx context.Context, c *change) error {
	good := target{d.green, d.green.user, d.green.value}
	wrong, err := tagged(d.green.throwaway.DSN(good.user, "not the password"), d.label)
	if err != nil {
		return err
	}
	if err := d.refused(ctx, "garbage in the file", "hello, world"); err != nil {
		return err
	}
	if err := d.refused(ctx, "green's address with a wrong password in the file", wrong); err != nil {
		return err
	}
	if err := d.green.throwaway.Stop(); err != nil {
		return err
	}
	if err := d.refused(ctx, "green's connection string in the file, but green is not up yet", good.value); err != nil {
		return err
	}
	return d.move(ctx, c, good, "green is started", func(string) error { return d.green.throwaway.Start(ctx) })
}

// refused puts a value into the file that hotload is to refuse, and gives the timeline a moment
// to show that nothing else happens.
func (d *demo) refused(ctx context.Context, what, value string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not within %v", patience))
	defer cancel()
	d.timeline.mark(what)
	seen := len(d.events.since(0))
	if err := d.rename(value); err != nil {
		return err
	}
	if err := d.events.wait(ctx, seen, valueRefused); err != nil {
		return err
	}
	return until(ctx, time.Now().Add(300*time.Millisecond))
}

// move lets the file say something else, by way of put, and measures how the pool follows.
func (d *demo) move(ctx context.Context, c *change, to target, mark string, put func(value string) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not within %v", patience))
	defer cancel()
	d.timeline.mark(mark)
	from, seen := d.current, len(d.events.since(0))
	arrival := d.load.arrival(to.place())
	start := time.Now()
	if err := put(to.value); err != nil {
		return err
	}
	select {
	case at := <-arrival:
		c.first = at.Sub(start)
	case <-ctx.Done():
		return fmt.Errorf("waiting for an operation on %s as %s: %w", to.name, to.user, context.Cause(ctx))
	}
	d.current = to
	if err := d.events.wait(ctx, seen, generationDrained); err != nil {
		return err
	}
	if n, err := from.emptied(ctx, d.label, from.user, patience); err != nil || n > 0 {
		return fmt.Errorf("%d connections of %s are still on %s: %w", n, from.user, from.name, cmp.Or(err, context.DeadlineExceeded))
	}
	c.left = time.Since(start)
	d.timeline.note(fmt.Sprintf("the last connection of %s has left %s", from.user, from.name))
	return nil
}

// rename replaces the file as it should be done: at no moment can anyone read half a value.
func (d *demo) rename(value string) error {
	if err := os.WriteFile(d.file+".new", []byte(value+"\n"), 0o600); err != nil {
		return err
	}
	return os.Rename(d.file+".new", d.file)
}

// writeInPlace replaces the file as it is often done.
func (d *demo) writeInPlace(value string) error {
	return os.WriteFile(d.file, []byte(value), 0o600)
}
