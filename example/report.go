package main

import (
	"cmp"
	"context"
	"fmt"
	"time"
)

// A report is what is left when the load has stopped: what the client saw, and what the servers have.
type report struct {
	operations map[string]int // that succeeded, by server
	errors     []error        // of those that did not
	slowest    time.Duration
	written    int            // rows that the client saw written
	rows       map[string]int // rows that are there, by server
	lost       int            // written, and not there
	doubled    int            // there more than once
	unknown    int            // there, and not known to be written
	open       int            // connections that the closed pool has left
	changes    []change
}

func (r *report) ok() bool {
	return len(r.errors) == 0 && r.lost == 0 && r.doubled == 0 && r.unknown == 0 && r.open == 0
}

// reconcile counts the rows on both servers against the writes that the client saw succeed.
func (d *demo) reconcile() (*report, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r := &report{
		operations: d.load.total,
		errors:     d.load.errors,
		slowest:    d.load.slowest,
		written:    len(d.load.written),
		rows:       map[string]int{},
		changes:    d.changes,
	}
	found := map[int64]int{}
	for _, s := range []*server{d.blue, d.green} {
		rows, err := s.rows(ctx, d.label)
		if err != nil {
			return nil, err
		}
		for n, count := range rows {
			found[n] += count
			r.rows[s.name] += count
			if found[n] > 1 {
				r.doubled++
			}
		}
		open, err := s.emptied(ctx, d.label, "", time.Second)
		if err != nil {
			return nil, err
		}
		r.open += open
	}
	for _, n := range d.load.written {
		if found[n] == 0 {
			r.lost++
		}
		delete(found, n)
	}
	r.unknown = len(found)
	return r, nil
}

func (t *timeline) summary(r *report) {
	bad := func(n int, text string) string {
		if n > 0 {
			return t.paint(red, text)
		}
		return text
	}
	line := func(name string, format string, args ...any) {
		t.println(t.fit(fmt.Sprintf("  %-12s ", name), fmt.Sprintf(format, args...)))
	}
	_, events := t.cut()
	t.println(events...)
	t.println("\n" + t.paint(bold, "Summary"))
	line("operations", "%d: %d on blue, %d on green; the slowest took %s",
		r.operations["blue"]+r.operations["green"], r.operations["blue"], r.operations["green"], ms(r.slowest))
	line("errors", "%s", bad(len(r.errors), fmt.Sprint(len(r.errors))))
	line("rows", "%d written; %d on blue + %d on green = %d", r.written, r.rows["blue"], r.rows["green"], r.rows["blue"]+r.rows["green"])
	line("", "%s, %s, %s", bad(r.lost, fmt.Sprintf("%d lost", r.lost)), bad(r.doubled, fmt.Sprintf("%d doubled", r.doubled)),
		bad(r.unknown, fmt.Sprintf("%d that nobody saw written", r.unknown)))
	line("connections", "%s left by the closed pool", bad(r.open, fmt.Sprint(r.open)))

	if len(r.changes) > 0 {
		t.println("\n" + t.paint(bold, "Changes"))
	}
	for i, c := range r.changes {
		c.note = cmp.Or(c.note, fmt.Sprintf("first operation on the new %s, last connection off the old %s", ms(c.first), ms(c.left)))
		t.println(fmt.Sprintf("  %d. %s", i+1, c.title), t.fit("     ", c.note))
	}

	const shown = 5
	for i, err := range r.errors[:min(len(r.errors), shown)] {
		t.println(t.paint(red, fmt.Sprintf("  error %d: %v", i+1, err)))
	}
	if n := len(r.errors) - shown; n > 0 {
		t.println(fmt.Sprintf("  and %d more", n))
	}
	t.println("")
	colour, verdict := colourOf["green"], "Not one operation failed, and every row is there exactly once."
	if !r.ok() {
		colour, verdict = red, "Not as it should be: see above."
	}
	t.println(t.paint(colour, t.fit("", verdict)))
}

func ms(d time.Duration) string {
	if d < 10*time.Millisecond {
		return fmt.Sprintf("%.1f ms", float64(d)/1e6)
	}
	return fmt.Sprintf("%d ms", d.Milliseconds())
}
