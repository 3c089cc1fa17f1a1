package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

const (
	rowEvery = 100 * time.Millisecond
	columns  = 80 // of a terminal
	barWidth = 17 // leaves room for two users
)

// A timeline draws a row every rowEvery, and between them what happens. On a terminal it has
// bars and, unless NO_COLOR is set, colours.
type timeline struct {
	bars, colours bool
	full          int // operations in a row that fill a bar
	begin         time.Time

	mu  sync.Mutex // protects out
	out io.Writer
}

// A row is what the timeline shows of a moment.
type row struct {
	at       time.Duration
	ops      map[string]int // operations that succeeded, by server
	users    []string       // who ran them
	open     map[string]int // connections by server; none if it does not answer
	failures int
}

func newTimeline(out io.Writer, workers int) *timeline {
	t := &timeline{out: out, begin: time.Now(), full: workers * int(rowEvery/pace)}
	if f, ok := out.(*os.File); ok {
		info, err := f.Stat()
		t.bars = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	term := os.Getenv("TERM")
	t.colours = t.bars && os.Getenv("NO_COLOR") == "" && term != "" && term != "dumb"
	return t
}

const (
	bold   = "1"
	dim    = "2"
	red    = "91"
	yellow = "93"
)

var colourOf = map[string]string{"blue": "94", "green": "92"}

func (t *timeline) paint(colour, text string) string {
	if !t.colours || colour == "" || text == "" {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

func (t *timeline) println(line string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fmt.Fprintln(t.out, line)
}

// heading begins a step.
func (t *timeline) heading(text string) {
	t.println("\n" + t.paint(bold, text) + "\n" + t.header())
}

// mark tells, between two rows, what the demonstration has done or seen.
func (t *timeline) mark(text string) {
	t.println(t.paint(yellow, "       ── "+text))
}

// log tells what hotload has logged, on a terminal in as many lines as it takes.
func (t *timeline) log(line string) {
	const label = "       log: "
	if t.bars {
		line = strings.Join(wrap(line, columns-len(label)), "\n"+strings.Repeat(" ", len(label)))
	}
	t.println(t.paint(dim, label+line))
}

// wrap breaks a text between words into lines of at most width, or of one word that is longer.
func wrap(text string, width int) (lines []string) {
	line := ""
	for word := range strings.SplitAfterSeq(text, " ") {
		if line != "" && utf8.RuneCountInString(strings.TrimRight(line+word, " ")) > width {
			lines = append(lines, strings.TrimRight(line, " "))
			line = ""
		}
		line += word
	}
	return append(lines, line)
}

func (t *timeline) header() string {
	if !t.bars {
		return "  time    blue   green  open: blue  green  errors  user"
	}
	name := func(name string) string {
		return t.paint(colourOf[name], fmt.Sprintf("%-*s", barWidth+6, name))
	}
	return t.paint(dim, "  time ") + name("blue") + name("green") + t.paint(dim, "   open   errors user")
}

func (t *timeline) row(r row) string {
	open := func(name string) string {
		if n, ok := r.open[name]; ok {
			return fmt.Sprint(n)
		}
		return "-" // it does not answer
	}
	users := strings.Join(r.users, "+")
	if !t.bars {
		return fmt.Sprintf("%5.1fs  %6d  %6d  %10s  %5s  %6d  %s", r.at.Seconds(),
			r.ops["blue"], r.ops["green"], open("blue"), open("green"), r.failures, users)
	}
	bar := func(name string) string {
		n := fmt.Sprintf("%4d  ", r.ops[name])
		if r.ops[name] == 0 {
			n = t.paint(dim, "   ·  ")
		}
		return t.paint(colourOf[name], bar(r.ops[name], t.full, barWidth)) + n
	}
	failures := fmt.Sprintf("%6d", r.failures)
	if r.failures > 0 {
		failures = t.paint(red, failures)
	}
	return fmt.Sprintf("%5.1fs ", r.at.Seconds()) + bar("blue") + bar("green") +
		t.paint(colourOf["blue"], fmt.Sprintf("%3s", open("blue"))) + " " +
		t.paint(colourOf["green"], fmt.Sprintf("%3s", open("green"))) + failures + "  " + users
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
		tick := time.NewTicker(rowEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				t.println(t.row(d.sample()))
			case <-ctx.Done():
				return
			}
		}
	})
	return func() {
		cancel()
		drawing.Wait()
	}
}

func (d *demo) sample() row {
	ctx, cancel := context.WithTimeout(context.Background(), rowEvery)
	defer cancel()
	r := row{at: time.Since(d.timeline.begin), ops: map[string]int{}, open: map[string]int{}}
	succeeded, failed := d.load.sinceLastRow()
	for at, n := range succeeded {
		r.ops[at.server] += n
		r.users = append(r.users, at.user)
	}
	slices.Sort(r.users)
	r.users = slices.Compact(r.users)
	r.failures = failed
	for _, s := range []*server{d.blue, d.green} {
		if n, err := s.connections(ctx, d.label, ""); err == nil {
			r.open[s.name] = n
		}
	}
	return r
}

func (t *timeline) intro(d *demo, dsn string, opts options) {
	t.println(t.paint(bold, "A live pool moves between two PostgreSQL servers.") + "\n")
	t.println(fmt.Sprintf("  %s   %s\n  %s  %s", t.paint(colourOf["blue"], "blue"), d.blue.address,
		t.paint(colourOf["green"], "green"), d.green.address))
	t.println(fmt.Sprintf("  pool   sql.Open(\"hotload\",\n    %q)", dsn))
	t.println(fmt.Sprintf("  load   %d workers: inserts, queries, transactions, prepared statements;", opts.workers))
	t.println(fmt.Sprintf("         one transaction after another that takes %v", longTx))
	if opts.config == "" && d.blue.throwaway == nil {
		t.println("  left out on your own servers: what makes and drops users, and stops a server")
	}
	if opts.config != "" {
		t.println("\nEdit the file while this runs, as you like:")
		if d.blue.throwaway != nil {
			for _, s := range []*server{d.green, d.blue} {
				t.println(fmt.Sprintf("\n  # %s\n  echo \"%s\" > '%s.new' && mv '%[3]s.new' '%[3]s'", s.name, s.value, d.file))
			}
		} else {
			t.println("connections are counted, here and in the summary, if what you write has\napplication_name=" + d.label)
		}
		t.println("\nCtrl-C ends it.")
	}
	t.println("\n" + t.header())
}
