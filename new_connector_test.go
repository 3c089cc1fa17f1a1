package hotload_test

import (
	"context"
	"crypto/x509"
	"database/sql/driver"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lib/pq"
)

// A parserFake is a ctxFake whose OpenConnector asks the test.
type parserFake struct {
	ctxFake
	onParse func(value string) error

	mu     sync.Mutex // guards parsed
	parsed []string
}

func newParser(t testing.TB, onParse func(value string) error) *parserFake {
	return &parserFake{ctxFake: ctxFake{newFake(t)}, onParse: onParse}
}

func (d *parserFake) OpenConnector(value string) (driver.Connector, error) {
	d.mu.Lock()
	d.parsed = append(d.parsed, value)
	d.mu.Unlock()
	if err := d.onParse(value); err != nil {
		return nil, err
	}
	return d.ctxFake.OpenConnector(value)
}

// parses counts the calls of OpenConnector with a value.
func (d *parserFake) parses(value string) (n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, v := range d.parsed {
		if v == value {
			n++
		}
	}
	return n
}

var (
	errNoFile  = &fs.PathError{Op: "open", Path: "client.pem", Err: syscall.ENOENT}
	errNoValue = errors.New("fake: the certificate is not complete")
)

// A value that the driver refuses may be good later, when a file that it names
// is there. It is tried again without a change of content, be it the first
// value or a later one.
func TestRefusedIsTriedAgain(t *testing.T) {
	for _, options := range []string{"", "probe=true", "forceKill=true", "forceKill=1h&probe=true"} {
		for _, first := range []bool{true, false} {
			for _, refusal := range []error{errNoFile, fmt.Errorf("tls: %w", errNoFile), errNoValue} {
				for _, row := range []struct{ comes, recovers time.Duration }{ // since the value came
					{time.Second, 3 * time.Second},
					{30 * time.Second, 2 * time.Minute},
					{time.Hour, time.Hour + 6*time.Minute},
				} {
					bubble(t, fmt.Sprintf("options=%s,first=%t,%v,%v", options, first, refusal, row.comes), func(t *testing.T) {
						l := collect(t)
						var there atomic.Bool
						d := newParser(t, func(value string) error {
							if value == "2" && !there.Load() {
								return refusal
							}
							return nil
						})
						src := newSource(map[bool]string{true: "2", false: "1"}[first])
						db := open(t, d, src, options)
						if first {
							start := time.Now()
							for range 3 {
								if err := db.Ping(); !errors.Is(err, refusal) || !strings.HasPrefix(err.Error(), "hotload: ") {
									t.Fatalf("ping with a first value that is refused: have error %v, want hotload's for %v", err, refusal)
								}
							}
							want(t, "time that this took", time.Since(start), 0)
						} else {
							want(t, "value", ask(t, db), "1")
							src.set("2")
							want(t, "value while the next is refused", ask(t, db), "1")
						}
						time.Sleep(row.comes)
						there.Store(true)
						time.Sleep(row.recovers - row.comes)
						if n := d.parses("2"); n < 2 {
							t.Fatalf("the driver was asked %d times in %v about the value that it refused at first", n, row.recovers)
						}
						want(t, fmt.Sprint("value ", row.recovers-row.comes, " after the file came"), ask(t, db), "2")
						want(t, "refusals logged in\n"+l.String(), l.count("value refused", "reason=driver"), 1)
						want(t, "values accepted", l.count("value accepted"), map[bool]int{true: 1, false: 2}[first])
						n := d.parses("2")
						time.Sleep(time.Hour)
						want(t, "OpenConnectors of the value in force", d.parses("2"), n)
					})
				}
			}
		}
	}
}

// What was refused is tried no more when another value comes, when the value in
// force comes back, and after DB.Close.
func TestRefusedGivesWay(t *testing.T) {
	for _, options := range []string{"", "probe=true"} {
		for _, row := range []struct {
			name    string
			first   string
			do      func(src *source, close func())
			inForce string
		}{
			{"another value", "1", func(src *source, _ func()) { src.set("3") }, "3"},
			{"another value after a first that was refused", "2", func(src *source, _ func()) { src.set("3") }, "3"},
			{"the value in force comes back", "1", func(src *source, _ func()) { src.set("1") }, "1"},
			{"DB.Close", "1", func(_ *source, close func()) { close() }, ""},
			{"DB.Close after a first that was refused", "2", func(_ *source, close func()) { close() }, ""},
		} {
			bubble(t, options+","+row.name, func(t *testing.T) {
				var there atomic.Bool
				d := newParser(t, func(value string) error {
					if value == "2" && !there.Load() {
						return errNoFile
					}
					return nil
				})
				src := newSource(row.first)
				db := open(t, d, src, options)
				if err := db.Ping(); (err != nil) != (row.first == "2") {
					t.Fatalf("ping: %v", err)
				}
				if row.first != "2" {
					src.set("2")
				}
				time.Sleep(time.Second)
				row.do(src, func() { db.Close() })
				time.Sleep(time.Second)
				n := d.parses("2")
				there.Store(true)
				time.Sleep(time.Hour)
				want(t, "OpenConnectors of the value that gave way", d.parses("2"), n)
				want(t, "connections with it", d.liveOn("2"), 0)
				if row.inForce != "" {
					want(t, "value in force", ask(t, db), row.inForce)
				}
			})
		}
	}
}

// The same refused value, delivered again and again, is not tried more often
// for that, and neither is it in the end forgotten.
func TestRefusedComesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := collect(t)
		var there atomic.Bool
		d := newParser(t, func(value string) error {
			if value == "2" && !there.Load() {
				return errNoFile
			}
			return nil
		})
		src := newSource("1")
		db := open(t, d, src, "")
		want(t, "value", ask(t, db), "1")
		for range 20 {
			src.set("2")
			time.Sleep(time.Second)
		}
		want(t, "refusals logged in\n"+l.String(), l.count("value refused"), 1)
		there.Store(true)
		time.Sleep(time.Minute)
		want(t, "value", ask(t, db), "2")
	})
}

// A mysqlError is an error of a type that hotload cannot know.
type mysqlError struct{ Number uint16 }

func (e *mysqlError) Error() string { return fmt.Sprint("Error ", e.Number) }

// An answer of a server that denies is asked for again seldom, because servers
// lock accounts: at most five times in the first six minutes. What is not
// reachable, or not up yet, is tried again within seconds.
func TestProbeBackOff(t *testing.T) {
	dead := &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	denied := &pq.Error{Code: "28P01"}
	always := func(err error) func(int) error { return func(int) error { return err } }
	for _, row := range []struct {
		name   string
		err    func(try int) error
		denies bool
		mixed  bool // denials among others
	}{
		{name: "SQLSTATE 28P01", err: always(denied), denies: true},
		{name: "SQLSTATE 28P01, wrapped", err: always(fmt.Errorf("connect: %w", denied)), denies: true},
		{name: "SQLSTATE 28P01, of another driver", err: always(codeError("28P01")), denies: true},
		{name: "SQLSTATE 28000", err: always(codeError("28000")), denies: true},
		{name: "SQLSTATE 3D000", err: always(&pq.Error{Code: "3D000"}), denies: true},
		{name: "a denial beside a host that is not reachable", err: always(errors.Join(dead, denied)), denies: true},
		{name: "an error that is no SQLSTATE", err: always(codeError("")), denies: true},
		{name: "a MySQL error", err: always(&mysqlError{1045}), denies: true},
		{name: "an unknown error", err: always(errors.New("access denied")), denies: true},
		{name: "a certificate that is not accepted", err: always(x509.UnknownAuthorityError{}), denies: true},
		{name: "not reachable and denied in turns", err: func(try int) error {
			if try%2 == 0 {
				return denied
			}
			return dead
		}, denies: true, mixed: true},
		{name: "not reachable for a while, then denied", err: func(try int) error {
			if try < 20 {
				return dead
			}
			return denied
		}, denies: true, mixed: true},
		{name: "net.OpError", err: always(dead)},
		{name: "net.DNSError", err: always(&net.DNSError{Err: "no such host", IsNotFound: true})},
		{name: "net.OpError, wrapped", err: always(fmt.Errorf("connect: %w", dead))},
		{name: "errno", err: always(syscall.ECONNREFUSED)},
		{name: "errno of a file", err: always(errNoFile)},
		{name: "deadline", err: always(context.DeadlineExceeded)},
		{name: "deadline, wrapped", err: always(fmt.Errorf("connect: %w", context.DeadlineExceeded))},
		{name: "cancelled", err: always(context.Canceled)},
		{name: "SQLSTATE 08006", err: always(&pq.Error{Code: "08006"})},
		{name: "SQLSTATE 53300", err: always(codeError("53300"))},
		{name: "SQLSTATE 57P03", err: always(fmt.Errorf("connect: %w", &pq.Error{Code: "57P03"}))},
	} {
		for _, kind := range []string{"Open", "Connect", "Ping"} {
			bubble(t, row.name+"/"+kind, func(t *testing.T) {
				f, src := newFake(t), newSource("1")
				start := time.Now()
				var all, denials []time.Duration // of the tries; they come one at a time
				try := func(at, value string) error {
					if value != "2" || (at == "Ping") != (kind == "Ping") {
						return nil
					}
					err := row.err(len(all))
					all = append(all, time.Since(start))
					if err != error(dead) {
						denials = append(denials, time.Since(start))
					}
					return err
				}
				f.onOpen = func(_ context.Context, value string) error { return try("Open", value) }
				f.onCall = func(_ context.Context, c *fakeConn, call string) error {
					if call == "Ping" {
						return try("Ping", c.value)
					}
					return nil
				}
				var d driver.Driver = ctxFake{f}
				if kind == "Open" {
					d = f
				}
				db := open(t, d, src, "probe=true")
				want(t, "value", ask(t, db), "1")
				src.set("2")
				time.Sleep(time.Hour)
				synctest.Wait()
				if !row.denies {
					if len(all) < 60*60/10 {
						t.Errorf("%d tries in an hour, want one every few seconds: at %v", len(all), all[:min(len(all), 10)])
					}
					for i := 1; i < len(all); i++ {
						if pause := all[i] - all[i-1]; pause < 50*time.Millisecond || pause > 10*time.Second {
							t.Fatalf("%v between two tries, want some seconds at most: tries at %v", pause, all[:i+1])
						}
					}
					return
				}
				for i := 5; i < len(denials); i++ {
					if within := denials[i] - denials[i-5]; within <= 6*time.Minute {
						t.Fatalf("six denied tries within %v, want at most five in six minutes: at %v", within, denials[:i+1])
					}
				}
				if row.mixed {
					if len(denials) < 3 {
						t.Errorf("%d denied tries in an hour: at %v", len(denials), denials)
					}
					return
				}
				for i, pause := range []struct{ least, most time.Duration }{
					{1500 * time.Millisecond, 3 * time.Second},
					{7 * time.Second, 11 * time.Second},
					{45 * time.Second, 75 * time.Second},
					{4 * time.Minute, 6 * time.Minute},
					{4 * time.Minute, 6 * time.Minute},
				} {
					if i+1 >= len(all) {
						t.Fatalf("%d tries in an hour, at %v: want another within %v", len(all), all, pause.most)
					}
					if d := all[i+1] - all[i]; d < pause.least || d > pause.most {
						t.Fatalf("%v between tries %d and %d, want %v to %v: tries at %v", d, i+1, i+2, pause.least, pause.most, all[:i+2])
					}
				}
				for i := 1; i < len(all); i++ {
					if pause := all[i] - all[i-1]; pause > 6*time.Minute {
						t.Fatalf("%v between two tries, want five minutes: at %v", pause, all)
					}
				}
			})
		}
	}
}

// A denied value that becomes good, because the server learns of the new
// password a moment after the file does, is in force soon.
func TestProbeDeniedForAMoment(t *testing.T) {
	for _, moment := range []time.Duration{time.Second, 8 * time.Second} {
		bubble(t, moment.String(), func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			start := time.Now()
			f.onOpen = func(_ context.Context, value string) error {
				if value == "2" && time.Since(start) < moment {
					return &pq.Error{Code: "28P01"}
				}
				return nil
			}
			db := open(t, ctxFake{f}, src, "probe=true")
			want(t, "value", ask(t, db), "1")
			src.set("2")
			time.Sleep(moment + 6*time.Second - time.Since(start))
			want(t, "value", ask(t, db), "2")
		})
	}
}

// A hangFake hangs for the value "b", deaf to contexts, until the test lets go.
type hangFake struct {
	*parserFake
	kind  string
	free  chan struct{}
	once  sync.Once
	tries atomic.Int64 // in progress
	most  atomic.Int64
	begun atomic.Int64
}

// The kinds of tries that hang: an OpenConnector at once, or when it is called
// again because it refused the value at first.
var hangKinds = []string{"Open", "Connect", "Ping", "OpenConnector", "OpenConnector again"}

func newHangFake(t *testing.T, kind string) *hangFake {
	h := &hangFake{kind: kind, free: make(chan struct{})}
	h.parserFake = newParser(t, func(value string) error {
		if kind == "OpenConnector again" && h.parses("b") == 1 && value == "b" {
			return errNoFile
		}
		h.hang("OpenConnector", value)
		h.hang("OpenConnector again", value)
		return nil
	})
	h.onOpen = func(_ context.Context, value string) error {
		h.hang("Open", value)
		h.hang("Connect", value)
		return nil
	}
	h.onCall = func(_ context.Context, c *fakeConn, call string) error {
		h.hang(call, c.value)
		return nil
	}
	return h
}

func (h *hangFake) hang(call, value string) {
	if call != h.kind || value != "b" {
		return
	}
	h.begun.Add(1)
	raise(&h.most, h.tries.Add(1))
	defer h.tries.Add(-1)
	<-h.free
}

func (h *hangFake) driver() driver.Driver {
	if h.kind == "Open" {
		return h.fake
	}
	return h.parserFake
}

// letGo ends all that hangs, at the latest when the test does.
func (h *hangFake) letGo() {
	h.once.Do(func() { close(h.free) })
	synctest.Wait()
}

// begin delivers the value that hangs, and waits for its try.
func (h *hangFake) begin(t *testing.T, src *source) {
	t.Helper()
	src.values <- "b"
	if h.kind == "OpenConnector again" {
		time.Sleep(3 * time.Second)
	}
	synctest.Wait()
	want(t, "tries in progress", h.tries.Load(), 1)
}

// A try that hangs, in a driver that cannot be interrupted, is left after about
// a second when another value overtakes it, and is the only one of its value.
func TestHungTryGivesWay(t *testing.T) {
	for _, kind := range hangKinds {
		for _, after := range []time.Duration{0, 300 * time.Millisecond, 5 * time.Second, 20 * time.Second} {
			for _, next := range []string{"c", "a"} {
				bubble(t, fmt.Sprintf("%s,%s after %v", kind, next, after), func(t *testing.T) {
					h, src := newHangFake(t, kind), newSource("a")
					db := open(t, h.driver(), src, "probe=true")
					t.Cleanup(h.letGo)
					want(t, "value", ask(t, db), "a")
					h.begin(t, src)
					time.Sleep(after)
					go src.set(next)
					// An OpenConnector may hold up what the strategy delivers for a second, too.
					time.Sleep(2500 * time.Millisecond)
					want(t, "value two and a half seconds after the next came", ask(t, db), next)
					time.Sleep(time.Hour)
					want(t, "tries that were begun", h.begun.Load(), 1)
					h.letGo()
					time.Sleep(time.Hour)
					want(t, "value in the end", ask(t, db), next)
					want(t, "tries that were begun", h.begun.Load(), 1)
					want(t, "connections with the value that was overtaken", h.liveOn("b"), 0)
				})
			}
		}
	}
}

// A host that hangs for an hour has one try at a time, is told of once, and is
// in force when it works. DB.Close does not wait for it, and ends the tries.
func TestHungTryIsTheOnlyOne(t *testing.T) {
	for _, kind := range hangKinds {
		for _, end := range []string{"works", "DB.Close"} {
			bubble(t, kind+","+end, func(t *testing.T) {
				l := collect(t)
				h, src := newHangFake(t, kind), newSource("a")
				db := open(t, h.driver(), src, "probe=true")
				t.Cleanup(h.letGo)
				want(t, "value", ask(t, db), "a")
				h.begin(t, src)
				time.Sleep(time.Minute)
				want(t, "refusals logged in a minute:\n"+l.String(), l.count("value refused") > 0, true)
				time.Sleep(time.Hour)
				want(t, "most tries at a time in an hour", h.most.Load(), 1)
				if kind != "OpenConnector again" {
					want(t, "refusals logged in an hour:\n"+l.String(), l.count("value refused"), 1)
					want(t, "of them", l.count("value refused", "error_type=context.deadlineExceededError"), 1)
				}
				want(t, "value in force", ask(t, db), "a")
				if end == "works" {
					h.letGo()
					time.Sleep(6 * time.Minute)
					want(t, "value in force six minutes after the host worked", ask(t, db), "b")
					return
				}
				start := time.Now()
				db.Close()
				if took := time.Since(start); took > 3*patience {
					t.Errorf("DB.Close took %v", took)
				}
				begun := h.begun.Load()
				h.letGo()
				time.Sleep(time.Hour)
				want(t, "tries that were begun after DB.Close", h.begun.Load()-begun, 0)
				want(t, "connections with the value", h.liveOn("b"), 0)
			})
		}
	}
}

// DB.Close while a value is being taken up ends its tries before they begin.
func TestCloseDuringOffer(t *testing.T) {
	for _, refuses := range []bool{false, true} {
		bubble(t, fmt.Sprintf("refused=%t", refuses), func(t *testing.T) {
			entered, goOn := make(chan bool), make(chan bool)
			var dials, parses atomic.Int64
			var mended atomic.Bool
			d := newParser(t, func(value string) error {
				if value != "2" || mended.Load() {
					return nil
				}
				if parses.Add(1) == 1 {
					close(entered)
					<-goOn
				}
				if refuses {
					return errNoFile
				}
				return nil
			})
			d.onOpen = func(_ context.Context, value string) error {
				if value != "2" || mended.Load() {
					return nil
				}
				dials.Add(1)
				return errors.New("no route to host")
			}
			src := newSource("1")
			db := open(t, d, src, "probe=true")
			want(t, "value", ask(t, db), "1")
			go func() { src.values <- "2" }()
			<-entered
			db.Close()
			close(goOn)
			time.Sleep(10 * time.Minute)
			have := fmt.Sprintf("%d dials, %d OpenConnectors", dials.Load(), parses.Load())
			mended.Store(true) // what goes on for ever would keep the bubble
			time.Sleep(10 * time.Minute)
			want(t, "after DB.Close", have, "0 dials, 1 OpenConnectors")
		})
	}
}

// A value that comes in the instant in which a try of another succeeds is in
// force in the end, and DB.Close in that instant leaves nothing behind.
func TestOvertakenAtTheLastMoment(t *testing.T) {
	for _, row := range []struct{ at, next string }{
		{"dial", "c"}, {"dial", "a"}, {"dial", "DB.Close"},
		{"OpenConnector", "c"}, {"OpenConnector", "a"}, {"OpenConnector", "DB.Close"},
	} {
		t.Run(row.at+","+row.next, func(t *testing.T) {
			for range 300 {
				synctest.Test(t, func(t *testing.T) {
					d := newParser(t, nil)
					slow := func(at string) func(value string) error {
						return func(value string) error {
							switch {
							case value != "b" || at != row.at:
							case at == "OpenConnector" && d.parses("b") == 1:
								return errNoFile
							default:
								time.Sleep(500 * time.Millisecond)
							}
							return nil
						}
					}
					d.onParse = slow("OpenConnector")
					d.onOpen = func(_ context.Context, value string) error { return slow("dial")(value) }
					src := newSource("a")
					db := open(t, d, src, "probe=true")
					want(t, "value", ask(t, db), "a")
					src.values <- "b"
					synctest.Wait()
					if row.at == "OpenConnector" {
						for d.parses("b") < 2 { // one is refused
							time.Sleep(10 * time.Millisecond)
						}
					}
					if time.Sleep(500 * time.Millisecond); row.next == "DB.Close" {
						db.Close()
						time.Sleep(time.Minute)
						want(t, "connections after DB.Close", len(d.live()), 0)
						return
					}
					src.values <- row.next
					time.Sleep(3 * time.Second)
					want(t, "value in the end", ask(t, db), row.next)
					want(t, "connections with the value that was overtaken", d.liveOn("b"), 0)
				})
			}
		})
	}
}
