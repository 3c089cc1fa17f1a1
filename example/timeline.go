package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

const (
	rowEvery = 100 * time.Millisecond
	quiet    = time.Second // between the rows that say nothing new
)

// A timeline shows rows and events in the order of their times. A row begins at its time and
// counts until the next one begins. An event waits for the row that covers its time: when it
// says that something has ended, no row below it counts any of it.
//
// On a terminal there are bars and, unless NO_COLOR is set, colours.
type timeline struct {
	width   int // of the terminal; 0 if there is none
	colours bool
	full    int // operations in a row that fill a bar: without a terminal, none do
	begin   time.Time
	over    chan struct{} // is sent to at the end of a row, if somebody receives

	mu     sync.Mutex // protects what follows
	out    io.Writer
	end    time.Duration // of the last row
	events []string      // since then
	last   row
	unseen string        // the last row, if it was not printed
	seen   time.Duration // when the last one that was printed began
	more   int           // rows to print, whatever they say
}

// A row is what the timeline shows of a moment.
type row struct {
	at       time.Duration
	ops      map[string]int // operations that succeeded, by server
	users    []string       // who ran them
	open     map[string]int // connections by server; none if it does not answer
	failures int
	events   []string // before the next row
}

// news tells whether r says something that last, the row before it, did not.
func (r row) news(last row) bool {
	for _, name := range names {
		if n, was := r.ops[name], last.ops[name]; n > 2*was || was > 2*n {
			return true
		}
	}
	return r.failures > 0 || len(r.events) > 0 || !slices.Equal(r.users, last.users) || !maps.Equal(r.open, last.open)
}

func newTimeline(out io.Writer, workers int) *timeline {
	t := &timeline{out: out, begin: time.Now(), full: math.MaxInt, over: make(chan struct{})}
	if f, ok := out.(*os.File); ok {
		if info, err := f.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			t.width, t.full = columns(f), workers*int(rowEvery/pace)
		}
	}
	t.colours = t.width > 0 && os.Getenv("NO_COLOR") == "" && !slices.Contains([]string{"", "dumb"}, os.Getenv("TERM"))
	return t
}

// columns returns the width of a terminal, by a command that Linux and macOS have.
func columns(terminal *os.File) (n int) {
	stty := exec.Command("stty", "size")
	stty.Stdin = terminal
	if out, err := stty.Output(); err == nil {
		fmt.Sscan(string(out), new(int), &n)
	}
	return cmp.Or(n, 80)
}

const (
	bold   = "1"
	dim    = "2"
	red    = "91"
	yellow = "93"
)

var names = []string{"blue", "green"}

var colourOf = map[string]string{"blue": "94", "green": "92"}

func (t *timeline) paint(colour, text string) string {
	if !t.colours || colour == "" || text == "" {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

func (t *timeline) println(lines ...string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, line := range lines {
		fmt.Fprintln(t.out, line)
	}
}

// heading begins a step.
func (t *timeline) heading(text string) {
	<-t.over
	t.println("\n"+t.paint(bold, text), t.header())
}

// mark tells what the demonstration is about to do. It waits until a row is over: the rows
// above count what was before, those below what came after.
func (t *timeline) mark(text string) {
	<-t.over
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lookAround()
	fmt.Fprintln(t.out, t.event(t.end, yellow, "──", text))
}

// note tells, after the row that covers it, what the demonstration has seen.
func (t *timeline) note(text string) { t.later(yellow, "──", text) }

// log tells what hotload has logged.
func (t *timeline) log(line string) { t.later(dim, "log:", line) }

func (t *timeline) later(colour, sign, text string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.events = append(t.events, t.event(time.Since(t.begin), colour, sign, text))
}

func (t *timeline) event(at time.Duration, colour, sign, text string) string {
	return t.paint(colour, t.fit(fmt.Sprintf("%6.2fs %s ", at.Seconds(), sign), text))
}

// fit puts a text behind its label, on a terminal in as many lines as it takes.
func (t *timeline) fit(label, text string) string {
	indent := utf8.RuneCountInString(label)
	width := cmp.Or(t.width, math.MaxInt) - indent
	line, length := label, 0
	for word := range strings.SplitAfterSeq(text, " ") {
		if length > 0 && length+utf8.RuneCountInString(strings.TrimSpace(word)) > width {
			line, length = strings.TrimRight(line, " ")+"\n"+strings.Repeat(" ", indent), 0
		}
		line, length = line+word, length+utf8.RuneCountInString(word)
	}
	return line
}

// barWidth leaves room for two users on a terminal of 60 columns or more.
func (t *timeline) barWidth() int { return min(max((t.width-49)/2, 5), 25) }

func (t *timeline) header() string {
	line := t.paint(dim, "   time ")
	for _, name := range names {
		line += t.paint(colourOf[name], fmt.Sprintf("%-*s", t.barWidth(), name)) + t.paint(dim, "  ops open ")
	}
	return line + t.paint(dim, "errors  user")
}

func (t *timeline) row(r row) string {
	line := fmt.Sprintf("%6.2fs ", r.at.Seconds())
	for _, name := range names {
		ops := fmt.Sprintf("%5d", r.ops[name])
		if r.ops[name] == 0 {
			ops = t.paint(dim, ops)
		}
		open := "-" // it does not answer
		if n, ok := r.open[name]; ok {
			open = fmt.Sprint(n)
		}
		line += t.paint(colourOf[name], bar(r.ops[name], t.full, t.barWidth())) + ops + t.paint(colourOf[name], fmt.Sprintf("%5s ", open))
	}
	failures := fmt.Sprintf("%6d", r.failures)
	if r.failures > 0 {
		failures = t.paint(red, failures)
	}
	return line + failures + "  " + strings.Join(r.users, "+")
}

// bar draws n of full, to an eighth of a cell.
func bar(n, full, width int) string {
	eighths := min(n*8*width/max(full, 1), 8*width)
	s := strings.Repeat("█", eighths/8)
	if rest := eighths % 8; rest > 0 {
		s += string([]rune("▏▎▍▌▋▊▉")[rest-1])
	}
	return s + strings.Repeat(" ", width-(eighths+7)/8)
}

// follow draws rows until it is told to stop.
func (t *timeline) follow(d *demo) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var drawing sync.WaitGroup
	drawing.Go(func() {
		for ctx.Err() == nil {
			time.Sleep(rowEvery)
			t.draw(d.sample())
			select {
			case t.over <- struct{}{}:
			default:
			}
		}
	})
	return func() {
		cancel()
		drawing.Wait()
	}
}

// cut ends a row: it returns when that began, and the events since.
func (t *timeline) cut() (began time.Duration, events []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	began, t.end = t.end, time.Since(t.begin)
	events, t.events = t.events, nil
	return began, events
}

// draw prints a row if it or the events after it tell something new, or if one near it does.
func (t *timeline) draw(r row) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.news(t.last) {
		t.lookAround()
	}
	t.last, t.unseen = r, t.row(r)
	if t.more > 0 || r.at-t.seen >= quiet {
		fmt.Fprintln(t.out, t.unseen)
		t.seen, t.unseen = r.at, ""
		t.more--
	}
	for _, event := range r.events {
		fmt.Fprintln(t.out, event)
	}
}

// lookAround prints the row before, and has the next three printed. t.mu is held.
func (t *timeline) lookAround() {
	if t.unseen != "" {
		fmt.Fprintln(t.out, t.unseen)
		t.unseen = ""
	}
	t.more = 3
}

func (d *demo) sample() row {
	ctx, cancel := context.WithTimeout(context.Background(), 5*rowEvery)
	defer cancel()
	r := row{ops: map[string]int{}, open: map[string]int{}}
	for _, s := range []*server{d.blue, d.green} {
		if n, err := s.connections(ctx, d.label, ""); err == nil {
			r.open[s.name] = n
		}
	}
	r.at, r.events = d.timeline.cut()
	// A connection is closed, and this logged, a moment before the operation that ended on it
	// has counted itself. The count is to be in the row above the event.
	time.Sleep(time.Millisecond)
	succeeded, failed := d.load.sinceLastRow()
	r.failures = failed
	for at, n := range succeeded {
		r.ops[at.server] += n
		r.users = append(r.users, at.user)
	}
	slices.Sort(r.users)
	r.users = slices.Compact(r.users)
	return r
}

func (t *timeline) intro(d *demo, dsn string, opts options) {
	t.println(t.paint(bold, "A live pool moves between two PostgreSQL servers."), "")
	for _, s := range []*server{d.blue, d.green} {
		t.println("  " + t.paint(colourOf[s.name], fmt.Sprintf("%-5s", s.name)) + "  " + s.address)
	}
	t.println(fmt.Sprintf("  pool   sql.Open(\"hotload\",\n    %q)", dsn),
		t.fit("  load   ", fmt.Sprintf("%d workers: inserts, queries, transactions, prepared statements; "+
			"one transaction after another that takes %v", opts.workers, longTx)),
		t.fit("  rows   ", fmt.Sprintf("each is about %v from its time on: operations, errors, connections open at its end; "+
			"most rows that say nothing new are left out", rowEvery)))
	if opts.config == "" && d.blue.throwaway == nil {
		t.println(t.fit("  left out on your own servers: ", "what makes and drops users, and stops a server"))
	}
	if opts.config != "" {
		t.println("", t.fit("", "Edit "+d.file+" while this runs, as you like, or paste:"))
		for _, s := range []*server{d.green, d.blue} {
			t.println(fmt.Sprintf("\n  cp '%s' '%s.new' && mv '%[2]s.new' '%[2]s'", filepath.Join(d.dir, s.name), d.file))
		}
		t.println("", t.fit("", "Connections are counted if the file has application_name="+d.label+", as those have."), "", "Ctrl-C ends it.")
	}
	t.println("", t.header())
}
