package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/infobloxopen/hotload"
)

// Data source names that every test may use.
func init() {
	hotload.Register("fake", newFake(nil))
	hotload.RegisterStrategy("memory", newSource("1"))
}

var dataSourceNames = []struct {
	name string
	dsn  string
	bad  []string // parts of the error; none if the name is good
}{
	{"good", "memory://fake/path", nil},
	{"good without a path", "memory://fake", nil},
	{"good with options of the strategy", "memory://fake/a/b%20c?poll=1s&forceKill=30s&probe=true", nil},
	{"good scheme in capitals", "MEMORY://fake/path", nil},
	{"forceKill=true", "memory://fake/p?forceKill=true", nil},
	{"forceKill=false", "memory://fake/p?forceKill=false", nil},
	{"probe=false", "memory://fake/p?probe=false", nil},
	{"empty: checked when used", "", nil},
	{"no strategy", "S3CRET", []string{"no strategy", "strategy://driver/path"}},
	{"empty strategy", "://fake/S3CRET", []string{"no strategy", "strategy://driver/path"}},
	{"key=value", "user=me password=S3CRET", []string{"no strategy"}},
	{"key=value with a URL in it", "password=S3CRET application_name=http://x", []string{"not a valid URL"}},
	{"opaque", "memory:fake://S3CRET", []string{"no strategy"}},
	{"MySQL", "root:S3CRET@tcp(127.0.0.1:3306)/db", []string{"no strategy"}},
	{"no driver", "memory:///S3CRET", []string{"names no driver"}},
	{"user information", "memory://me:S3CRET@fake/path", []string{"user information"}},
	{"user name", "memory://S3CRET@fake/path", []string{"user information"}},
	{"port", "memory://fake:5432/path", []string{"port"}},
	{"empty port", "memory://fake:/path", []string{"port"}},
	{"fragment", "memory://fake/path#S3CRET", []string{"fragment", "%23"}},
	{"empty fragment", "memory://fake/path#", []string{"fragment"}},
	{"escape in the path", "memory://fake/S3CRET%zz", []string{"not a valid URL"}},
	{"escape in the options", "memory://fake/path?S3CRET=%zz", []string{"options", "percent-encoded"}},
	{"semicolon in the options", "memory://fake/path?a=S3CRET;b=1", []string{"options"}},
	{"unknown strategy", "fsnotifi://fake/S3CRET", []string{`unknown strategy "fsnotifi"`, "memory", "forgotten import", "hotload/fsnotify"}},
	{"unknown driver", "memory://postgrs/S3CRET", []string{`unknown driver "postgrs"`, "fake", "forgotten import", "hotload.Register"}},
	{"forceKill not understood", "memory://fake/p?forceKill=S3CRET", []string{"forceKill", "true, false or a positive duration"}},
	{"forceKill empty", "memory://fake/p?forceKill=", []string{"forceKill"}},
	{"forceKill without unit", "memory://fake/p?forceKill=30", []string{"forceKill"}},
	{"forceKill zero", "memory://fake/p?forceKill=0s", []string{"forceKill"}},
	{"forceKill negative", "memory://fake/p?forceKill=-1s", []string{"forceKill"}},
	{"forceKill twice", "memory://fake/p?forceKill=true&forceKill=true", []string{"forceKill", "2 times"}},
	{"probe not understood", "memory://fake/p?probe=1", []string{"probe", "true or false"}},
	{"probe twice", "memory://fake/p?probe=true&probe=S3CRET", []string{"probe", "2 times"}},
}

func TestDataSourceName(t *testing.T) {
	t.Run("R-1/sql.Open checks and starts nothing", func(t *testing.T) {
		for _, tt := range dataSourceNames {
			t.Run(tt.name, func(t *testing.T) {
				db, err := sql.Open("hotload", tt.dsn)
				if err == nil {
					db.Close()
				}
				if (err != nil) != (tt.bad != nil) {
					t.Fatalf("Open: %v", err)
				}
				for _, part := range tt.bad {
					if text := err.Error(); !strings.HasPrefix(text, "hotload: ") || !strings.Contains(text, part) || strings.Contains(text, "S3CRET") {
						t.Errorf("error %q: want it to begin with hotload: and say %q", text, part)
					}
				}
			})
		}
	})
}

func FuzzDataSourceName(f *testing.F) {
	for _, tt := range dataSourceNames {
		f.Add(tt.dsn)
	}
	f.Fuzz(func(t *testing.T, dsn string) {
		db, err := sql.Open("hotload", dsn)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "hotload: ") {
				t.Errorf("error %q does not begin with hotload:", err)
			}
			return
		}
		defer db.Close()
		if u, err := url.Parse(dsn); dsn != "" && (err != nil || u.Scheme != "memory" || u.Host != "fake" || u.User != nil || u.Fragment != "") {
			t.Errorf("accepted %q", dsn)
		}
	})
}

// TestOptions checks what reaches the strategy.
func TestOptions(t *testing.T) {
	t.Run("R-2/keeps its own options from the strategy", func(t *testing.T) {
		type watched struct {
			path    string
			options url.Values
		}
		got := make(chan watched, 1)
		strategy := watchFunc(func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
			got <- watched{pth, options}
			return "1", nil, nil
		})
		db, err := sql.Open("hotload", register(newFake(t), strategy)+"/b%20c%2Fd?poll=1s&forceKill=30s&x=1&x=2&probe=true&forcekill=true")
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		ask(t, db)
		want := watched{"/path/b c/d", url.Values{"poll": {"1s"}, "x": {"1", "2"}, "forcekill": {"true"}}}
		if have := <-got; !reflect.DeepEqual(have, want) {
			t.Errorf("Watch: have %v, want %v", have, want)
		}
	})
	t.Run("survive a strategy that changes them", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			watches := 0
			db := open(t, newFake(t), watchFunc(func(_ context.Context, _ string, options url.Values) (string, <-chan string, error) {
				watches++
				want(t, "option x", strings.Join(options["x"], " "), "1 2")
				options["x"][0] = "spoiled"
				values := make(chan string)
				close(values)
				return "1", values, nil
			}), "x=1&x=2")
			ask(t, db)
			time.Sleep(time.Second)
			db.Close()
			want(t, "watches in a second", watches, 4)
		})
	})
}

func TestRegisterPanics(t *testing.T) {
	register := func(name string) { hotload.Register(name, newFake(t)) }
	strategy := func(name string) { hotload.RegisterStrategy(name, newSource("")) }
	for _, tt := range []struct {
		name string
		call func()
	}{
		{"driver nil", func() { hotload.Register("nil", nil) }},
		{"driver twice", func() { register("fake") }},
		{"driver without a name", func() { register("") }},
		{"driver with a port", func() { register("a:1") }},
		{"driver with a slash", func() { register("a/b") }},
		{"driver with a space", func() { register("a b") }},
		{"driver with user information", func() { register("a@b") }},
		{"driver with a question mark", func() { register("a?b") }},
		{"driver with an escape", func() { register("a%41") }},
		{"strategy nil", func() { hotload.RegisterStrategy("nil", nil) }},
		{"strategy twice", func() { strategy("memory") }},
		{"strategy without a name", func() { strategy("") }},
		{"strategy in capitals", func() { strategy("Memory") }},
		{"strategy with an underscore", func() { strategy("a_b") }},
		{"strategy with a digit first", func() { strategy("1a") }},
		{"strategy with a colon", func() { strategy("a:b") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			defer func() {
				if text, _ := recover().(string); !strings.HasPrefix(text, "hotload: Register") {
					t.Errorf("panic: have %q, want one that begins with hotload: Register", text)
				}
			}()
			tt.call()
		})
	}
}

// A gate lets nobody pass until it is opened; arrived tells who came.
type gate struct {
	arrived chan struct{}
	open    chan struct{}
}

func newGate() *gate { return &gate{make(chan struct{}, 1000), make(chan struct{})} }

func (g *gate) pass() {
	g.arrived <- struct{}{}
	<-g.open
}

func TestFirstConnect(t *testing.T) {
	t.Run("nothing is started by sql.Open", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		open(t, f, src, "").Close()
		want(t, "watches", src.watches.Load(), 0)
	})
	t.Run("R-3/first connects share one watch", func(t *testing.T) {
		g := newGate()
		var watches atomic.Int32
		db := open(t, newFake(t), watchFunc(func(ctx context.Context, _ string, _ url.Values) (string, <-chan string, error) {
			watches.Add(1)
			g.pass()
			return "1", make(chan string), nil
		}), "")
		answers := make(chan error)
		for range 5 {
			go func() { answers <- db.Ping() }()
		}
		<-g.arrived
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		if err := db.PingContext(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("ping with a deadline: %v", err)
		}
		close(g.open)
		for range 5 {
			if err := receive(t, "ping", answers); err != nil {
				t.Errorf("ping: %v", err)
			}
		}
		want(t, "watches", watches.Load(), 1)
	})
	t.Run("R-4/an error of Watch is the operation's and the next connect tries again", func(t *testing.T) {
		errWatch := errors.New("no such thing")
		src := newSource("1")
		var watches int
		db := open(t, newFake(t), watchFunc(func(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
			if watches++; watches < 3 {
				return "", nil, errWatch
			}
			return src.Watch(ctx, pth, options)
		}), "")
		for range 2 {
			if err := db.Ping(); err != errWatch {
				t.Errorf("ping: have %v, want %v", err, errWatch)
			}
		}
		want(t, "value", ask(t, db), "1")
		want(t, "watches", watches, 3)
	})
	for name, value := range map[string]string{"empty": "", "blank": " \n", "refused by the driver": "bad S3CRET"} {
		t.Run("R-5/a refused first value is an error and the next can be good", func(t *testing.T) {
			t.Log(name)
			src := newSource(value)
			db := open(t, ctxFake{newFake(t)}, src, "")
			for range 2 {
				err := db.Ping()
				if err == nil || !strings.HasPrefix(err.Error(), "hotload: ") || strings.Contains(err.Error(), "S3CRET") {
					t.Errorf("ping: %v", err)
				}
				if inner := errors.Unwrap(err); (inner != nil) != strings.HasPrefix(value, "bad") {
					t.Errorf("the driver's error: %v", inner)
				}
			}
			src.set("2")
			want(t, "value", ask(t, db), "2")
			want(t, "watches", src.watches.Load(), 1)
		})
	}
}

func TestValues(t *testing.T) {
	log := collect(t)
	f, src := newFake(t), newSource("1")
	db := open(t, ctxFake{f}, src, "")
	want(t, "value", ask(t, db), "1")
	for _, tt := range []struct {
		name, set, want string
		opened          int64
		logged          []string
	}{
		{"R-6/an equal value is no change", "1", "1", 1, nil},
		{"R-7/a refused value changes nothing", "", "1", 1, []string{"hotload: value refused", "reason=empty"}},
		{"blank", " \n", "1", 1, nil},
		{"the same again", "", "1", 1, nil},
		{"refused by the driver", "bad S3CRET", "1", 1, []string{"hotload: value refused", "reason=driver", "error_type=*errors.errorString"}},
		{"R-8/puts each value in force in turn", "2", "2", 2, []string{"hotload: value accepted", "generation=2", "closed=1", "in_use=0"}},
		{"equal again", "2", "2", 2, nil},
		{"an earlier value", "1", "1", 3, []string{"hotload: value accepted", "generation=3", "closed=1", "in_use=0"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := log.count("accepted") + log.count("refused")
			src.set(tt.set)
			want(t, "value", ask(t, db), tt.want)
			want(t, "connections opened", f.opened.Load(), tt.opened)
			more := 0
			if tt.logged != nil {
				more = 1
				want(t, "lines with "+strings.Join(tt.logged, " "), log.count(tt.logged...), 1)
			}
			want(t, "lines logged", log.count("accepted")+log.count("refused"), before+more)
		})
	}
	if strings.Contains(log.String(), "S3CRET") {
		t.Errorf("a value is logged:\n%s", log)
	}
}

// TestWatchAgain checks the pauses before Watch is called again.
func TestWatchAgain(t *testing.T) {
	t.Run("R-11/watches again with back-off", func(t *testing.T) {
		log := collect(t)
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			type watch struct {
				after time.Duration // since the one before it
				value chan string
			}
			watches := make(chan watch)
			var failing atomic.Bool
			db := open(t, newFake(t), watchFunc(func(ctx context.Context, _ string, _ url.Values) (string, <-chan string, error) {
				w := watch{time.Since(began), make(chan string)}
				began = time.Now()
				if ctx.Err() != nil {
					return "", nil, ctx.Err()
				}
				watches <- w
				if failing.Load() {
					return "", nil, errors.New("lost")
				}
				return fmt.Sprint(w.after), w.value, nil
			}), "")
			go db.Ping()
			w := <-watches
			for _, tt := range []struct {
				lasts time.Duration
				fail  bool
				want  time.Duration
			}{
				{0, false, 100 * time.Millisecond},
				{time.Second, false, 200 * time.Millisecond},
				{0, true, 400 * time.Millisecond},
				{0, false, 800 * time.Millisecond},
				{0, false, 1600 * time.Millisecond},
				{0, false, 3200 * time.Millisecond},
				{0, false, 6400 * time.Millisecond},
				{0, false, 12800 * time.Millisecond},
				{0, false, 25600 * time.Millisecond},
				{0, false, 30 * time.Second},
				{30 * time.Second, false, 30 * time.Second},
				{30*time.Second + time.Millisecond, false, 100 * time.Millisecond},
				{0, false, 200 * time.Millisecond},
			} {
				time.Sleep(tt.lasts)
				synctest.Wait()
				if !failing.Load() {
					close(w.value)
				}
				failing.Store(tt.fail)
				w = <-watches
				want(t, "time since the last Watch", w.after, tt.lasts+tt.want)
				synctest.Wait()
			}
			// The last value stays in force meanwhile; that of a new watch is taken up.
			want(t, "value", ask(t, db), "200ms")
			db.Close()
		})
		want(t, "watches lost", log.count("level=WARN", "hotload: watch lost"), 12+1)
		want(t, "because Watch failed", log.count("hotload: watch lost", "error_type=*errors.errorString"), 1)
		want(t, "watches regained", log.count("hotload: watch regained"), 12)
	})
	t.Run("a watch has not lasted because it was slow to begin", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			const slow = 31 * time.Second
			var began []time.Duration
			start := time.Now()
			db := open(t, newFake(t), watchFunc(func(ctx context.Context, _ string, _ url.Values) (string, <-chan string, error) {
				began = append(began, time.Since(start)-time.Duration(len(began))*slow)
				select {
				case <-time.After(slow):
				case <-ctx.Done():
				}
				values := make(chan string)
				close(values)
				return "1", values, ctx.Err()
			}), "")
			ask(t, db)
			time.Sleep(4 * slow)
			db.Close()
			want(t, "pauses between watches, summed up", fmt.Sprint(began), "[0s 100ms 300ms 700ms 1.5s]")
		})
	})
}

// TestIdle proves that connections not in use close at the change, without
// traffic, and that one that is slow to close holds up nothing.
func TestIdle(t *testing.T) {
	log := collect(t)
	f, src := newFake(t), newSource("1")
	g := newGate()
	f.onClose = func(c *fakeConn) {
		if c.value == "1" {
			g.pass()
		}
	}
	db := open(t, f, src, "")
	db.SetMaxIdleConns(10)
	var conns []*sql.Conn
	for range 10 {
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	for _, conn := range conns[:8] { // the last two have not been used, nor returned
		if err := conn.PingContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	t.Run("R-16/what is not in use closes at once", func(t *testing.T) {
		src.set("2")
		for range 10 {
			receive(t, "Close of a connection", g.arrived)
		}
		await(t, "accepted", func() bool {
			return log.count("hotload: value accepted", "generation=2", "closed=10", "in_use=0") == 1
		})
	})
	t.Run("R-17/a Close that blocks holds up nobody", func(t *testing.T) {
		src.set("3")
		want(t, "value of a connection not used yet", ask(t, conns[8]), "3")
		want(t, "drained", log.count("hotload: generation drained", "generation=1"), 0)
	})
	close(g.open)
	await(t, "generation 1 drained", func() bool { return log.count("hotload: generation drained", "generation=1") == 1 })
	want(t, "value", ask(t, db), "3")
	await(t, "generation 2 drained", func() bool { return log.count("hotload: generation drained", "generation=2") == 1 })
}

// TestInUse proves that what is in use lives through ten changes on its own
// connection, and that the connection closes when it is returned.
func TestInUse(t *testing.T) {
	for _, tt := range []struct {
		name string
		use  func(t *testing.T, db *sql.DB, change func()) // calls change in the middle of the use
	}{
		{"statement", func(t *testing.T, db *sql.DB, change func()) {
			if _, err := db.Exec("change"); err != nil { // the fake calls change
				t.Error(err)
			}
		}},
		{"rows", func(t *testing.T, db *sql.DB, change func()) {
			rows, err := db.Query("ask")
			if err != nil {
				t.Fatal(err)
			}
			defer rows.Close()
			for n := 0; ; n++ {
				if n == 1 {
					change()
				}
				if !rows.Next() {
					want(t, "rows", n, 3)
					break
				}
				var value string
				rows.Scan(&value)
				want(t, "value", value, "0")
			}
			if err := rows.Err(); err != nil {
				t.Error(err)
			}
		}},
		{"transaction", func(t *testing.T, db *sql.DB, change func()) {
			tx, err := db.Begin()
			if err != nil {
				t.Fatal(err)
			}
			change()
			want(t, "value", ask(t, tx), "0")
			if err := tx.Commit(); err != nil {
				t.Error(err)
			}
		}},
		{"conn", func(t *testing.T, db *sql.DB, change func()) {
			conn, err := db.Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			want(t, "value", ask(t, conn), "0")
			change()
			want(t, "value", ask(t, conn), "0")
			stmt, err := conn.PrepareContext(t.Context(), "ask")
			if err != nil {
				t.Fatal(err)
			}
			defer stmt.Close()
			change()
			var value string
			if err := stmt.QueryRow().Scan(&value); err != nil {
				t.Error(err)
			}
			want(t, "value", value, "0")
		}},
		{"conn used through Raw", func(t *testing.T, db *sql.DB, change func()) {
			conn, err := db.Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.Raw(func(c any) error {
				if raw := c.(interface{ Raw() driver.Conn }).Raw().(*fakeConn); raw.value != "0" {
					t.Errorf("value: %s", raw.value)
				}
				return nil
			})
			change()
			want(t, "value", ask(t, conn), "0")
		}},
	} {
		t.Run("R-15/what is in use finishes on its connection", func(t *testing.T) {
			t.Log(tt.name)
			log := collect(t)
			f, src := newFake(t), newSource("0")
			f.rowCount = 3
			changes := 0
			change := func() {
				for range 10 {
					changes++
					src.set(strconv.Itoa(changes))
				}
				want(t, "connections on the first value", f.liveOn("0"), 1)
			}
			f.onCall = func(_ context.Context, _ *fakeConn, call string) error {
				if call == "Exec change" {
					change()
				}
				return nil
			}
			db := open(t, f, src, "")
			tt.use(t, db, change)
			want(t, "accepted", log.count("hotload: value accepted", "generation=2", "closed=0", "in_use=1"), 1)
			await(t, "generation 1 drained", func() bool { return log.count("hotload: generation drained", "generation=1") == 1 })
			want(t, "connections on the first value", f.liveOn("0"), 0)
			want(t, "value", ask(t, db), strconv.Itoa(changes))
		})
	}
}

// drivers are the two ways to open a connection.
func eachDriver(t *testing.T, test func(t *testing.T, f *fake, d driver.Driver)) {
	f := newFake(t)
	t.Run("with DriverContext", func(t *testing.T) { test(t, f, ctxFake{f}) })
	f = newFake(t)
	t.Run("without DriverContext", func(t *testing.T) { test(t, f, f) })
}

func TestDial(t *testing.T) {
	// hang makes dials to a value hang, and deaf to their context.
	hang := func(f *fake, value string) *gate {
		g := newGate()
		f.onOpen = func(_ context.Context, v string) error {
			if v == value {
				g.pass()
			}
			return nil
		}
		return g
	}
	t.Run("R-23/a hung dial moves to the new value", func(t *testing.T) {
		eachDriver(t, func(t *testing.T, f *fake, d driver.Driver) {
			log := collect(t)
			src := newSource("1")
			g := hang(f, "1")
			db := open(t, d, src, "")
			answers := make(chan string)
			for range 3 {
				go func() { answers <- ask(t, db) }()
			}
			for range 3 {
				receive(t, "dial", g.arrived)
			}
			src.set("2")
			for range 3 {
				want(t, "value", receive(t, "query", answers), "2")
			}
			want(t, "generation 1 drained", log.count("hotload: generation drained"), 0)
			close(g.open)
			await(t, "generation 1 drained", func() bool { return log.count("hotload: generation drained", "generation=1") == 1 })
			want(t, "connections on the old value", f.liveOn("1"), 0)
			want(t, "value", ask(t, db), "2")
		})
	})
	t.Run("R-24/a late connection is closed", func(t *testing.T) {
		f, src := newFake(t), newSource("0")
		ended := newGate()
		close(ended.open)
		f.onOpen = func(ctx context.Context, v string) error {
			if strings.HasPrefix(v, "-") {
				ended.pass()
				<-ctx.Done() // as it does when the value is superseded
			}
			return nil
		}
		db := open(t, ctxFake{f}, src, "")
		ask(t, db)
		db.SetMaxIdleConns(0)
		for n := 1; n < 200; n++ {
			src.set(strconv.Itoa(-n))
			conns := make(chan *sql.Conn)
			go func() {
				conn, err := db.Conn(t.Context())
				if err != nil {
					t.Error(err)
				}
				conns <- conn
			}()
			<-ended.arrived
			src.set(strconv.Itoa(n))
			conn := receive(t, "connection", conns)
			await(t, "the old connections are closed", func() bool { return f.liveOn(strconv.Itoa(-n)) == 0 })
			conn.Close()
		}
	})
	t.Run("R-25/a dial honours its caller's deadline", func(t *testing.T) {
		eachDriver(t, func(t *testing.T, f *fake, d driver.Driver) {
			g := hang(f, "1")
			defer close(g.open)
			db := open(t, d, newSource("1"), "")
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			defer cancel()
			if err := db.PingContext(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("ping: %v", err)
			}
			go db.Ping()
			want(t, "value of another pool", ask(t, open(t, d, newSource("2"), "")), "2")
		})
	})
	t.Run("of a parked connection: the same", func(t *testing.T) {
		eachDriver(t, func(t *testing.T, f *fake, d driver.Driver) {
			g := hang(f, "2")
			defer close(g.open)
			src := newSource("1")
			db := open(t, d, src, "")
			db.SetMaxOpenConns(1)
			ask(t, db)
			src.set("2")
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			defer cancel()
			if err := db.PingContext(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("ping: %v", err)
			}
			answer := make(chan string)
			go func() { answer <- ask(t, db) }()
			receive(t, "dial", g.arrived)
			src.set("3")
			want(t, "value", receive(t, "query", answer), "3")
		})
	})
	t.Run("R-27/an error of a dial is the driver's own", func(t *testing.T) {
		eachDriver(t, func(t *testing.T, f *fake, d driver.Driver) {
			errDial := errors.New("refused")
			f.onOpen = func(_ context.Context, v string) error {
				if v == "2" {
					return errDial
				}
				return nil
			}
			src := newSource("1")
			db := open(t, d, src, "")
			ask(t, db)
			src.set("2")
			for range 3 {
				if _, err := db.Exec("insert"); err != errDial {
					t.Errorf("exec: have %v, want %v", err, errDial)
				}
			}
			src.set("3")
			want(t, "value", ask(t, db), "3")
		})
	})
	t.Run("R-26/an Open that was left serves the next caller", func(t *testing.T) {
		f := newFake(t)
		g := hang(f, "1")
		db := open(t, f, newSource("1"), "")
		db.SetMaxOpenConns(2)
		for range 100 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			if err := db.PingContext(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("ping: %v", err)
			}
			cancel()
		}
		want(t, "Opens in progress", f.dialing.Load(), 1)
		close(g.open)
		await(t, "the Open has returned", func() bool { return f.dialing.Load() == 0 })
		want(t, "value", ask(t, db), "1")
		want(t, "Opens", f.opened.Load(), 1)
	})
	for _, tt := range []struct {
		takes time.Duration
		kept  int
	}{
		{5 * time.Second, 1},
		{time.Minute, 0}, // too old by then
	} {
		t.Run(fmt.Sprintf("an Open of %v that was left and serves nobody is closed", tt.takes), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				f.onOpen = func(context.Context, string) error { time.Sleep(tt.takes); return nil }
				db := open(t, f, newSource("1"), "")
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				if err := db.PingContext(ctx); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("ping: %v", err)
				}
				time.Sleep(tt.takes)
				want(t, "connections", len(f.live()), tt.kept)
				time.Sleep(time.Minute)
				want(t, "connections", len(f.live()), 0)
				db.Close()
			})
		})
	}
}

// TestMoments are changes at moments that are easily got wrong.
func TestMoments(t *testing.T) {
	t.Run("handed over to a waiter", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		db := open(t, f, src, "")
		db.SetMaxOpenConns(1)
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ask(t, conn)
		answer := make(chan string)
		go func() { answer <- ask(t, db) }()
		await(t, "a waiter", func() bool { return db.Stats().WaitCount == 1 })
		src.set("2")
		conn.Close()
		want(t, "value", receive(t, "query", answer), "2")
	})
	t.Run("R-19/the first use of a sql.Conn is on the value in force", func(t *testing.T) {
		for _, use := range []string{"query", "exec with arguments", "prepare", "begin", "ping", "raw"} {
			t.Run(use, func(t *testing.T) {
				f, src := newFake(t), newSource("1")
				db := open(t, f, src, "")
				ask(t, db) // the second time, it comes from the pool
				conn, err := db.Conn(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				src.set("2")
				ctx := t.Context()
				switch use {
				case "exec with arguments":
					_, err = conn.ExecContext(ctx, "insert", special{"a"}, sql.Named("n", special{"b"}))
				case "prepare":
					_, err = conn.PrepareContext(ctx, "insert ?")
				case "begin":
					var tx *sql.Tx
					if tx, err = conn.BeginTx(ctx, nil); err == nil {
						defer tx.Rollback()
					}
				case "ping":
					err = conn.PingContext(ctx)
				case "raw":
					err = conn.Raw(func(c any) error { c.(interface{ Raw() driver.Conn }).Raw(); return nil })
				}
				if err != nil {
					t.Error(err)
				}
				src.set("3")
				want(t, "value", ask(t, conn), map[bool]string{true: "3", false: "2"}[use == "query"])
			})
		}
	})
	t.Run("Raw with the new value out of reach", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		f.onOpen = func(_ context.Context, v string) error {
			if v == "2" {
				return errors.New("refused")
			}
			return nil
		}
		conn, err := open(t, f, src, "").Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		src.set("2")
		conn.Raw(func(c any) error {
			if raw := c.(interface{ Raw() driver.Conn }).Raw(); raw != nil {
				t.Errorf("Raw: %v", raw)
			}
			return nil
		})
	})
	t.Run("Stmt.Close on a pooled connection", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		g := newGate()
		f.onCall = func(_ context.Context, _ *fakeConn, call string) error {
			if call == "Close insert" {
				g.pass()
			}
			return nil
		}
		db := open(t, f, src, "")
		db.SetMaxOpenConns(1)
		stmt, err := db.Prepare("insert")
		if err != nil {
			t.Fatal(err)
		}
		closed := make(chan error)
		go func() { closed <- stmt.Close() }()
		receive(t, "Close of the statement", g.arrived)
		src.set("2")
		want(t, "connections on the old value", f.liveOn("1"), 1) // not under the call
		close(g.open)
		if err := receive(t, "Stmt.Close", closed); err != nil {
			t.Error(err)
		}
		await(t, "the old connection is closed", func() bool { return f.liveOn("1") == 0 })
		want(t, "value", ask(t, db), "2")
	})
	t.Run("ResetSession", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		g := newGate()
		f.onCall = func(_ context.Context, c *fakeConn, call string) error {
			if call == "ResetSession" {
				g.pass()
				return driver.ErrBadConn
			}
			return nil
		}
		// Without database/sql, which tries again.
		connector, err := open(t, f, src, "").Driver().(driver.DriverContext).OpenConnector(register(f, src))
		if err != nil {
			t.Fatal(err)
		}
		defer connector.(io.Closer).Close()
		conn, err := connector.Connect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		reset := make(chan error)
		go func() { reset <- conn.(driver.SessionResetter).ResetSession(t.Context()) }()
		receive(t, "ResetSession", g.arrived)
		src.set("2")
		want(t, "connections on the old value", f.liveOn("1"), 1) // not under the call
		close(g.open)
		want(t, "error of a connection that is superseded", receive(t, "ResetSession", reset), nil)
		await(t, "the old connection is closed", func() bool { return f.liveOn("1") == 0 })
	})
	t.Run("R-20/prepared statements go on", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		db := open(t, f, src, "")
		stmt, err := db.Prepare("ask ? ?")
		if err != nil {
			t.Fatal(err)
		}
		defer stmt.Close()
		for n := 2; n < 5; n++ {
			src.set(strconv.Itoa(n))
			var value string
			if err := stmt.QueryRow(special{"a"}, 1).Scan(&value); err != nil {
				t.Error(err)
			}
			want(t, "value", value, strconv.Itoa(n))
			src.set(strconv.Itoa(-n))
			err := stmt.QueryRow(special{"a"}).Scan(&value)
			want(t, "error", fmt.Sprint(err), "sql: expected 2 arguments, got 1")
		}
	})
	t.Run("R-21/arguments are the driver's to convert", func(t *testing.T) {
		f, src := newFake(t), newSource("0")
		db := open(t, f, src, "")
		for n, use := range []func() error{
			func() error { _, err := db.Exec("insert", special{"a"}, 1, time.Time{}); return err },
			func() error { return db.QueryRow("ask", sql.Named("n", special{"a"})).Scan(new(string)) },
			func() error { _, err := db.Exec("insert", struct{}{}); return err },
		} {
			before := use() // on a connection
			ask(t, db)
			src.set(strconv.Itoa(n + 1))
			after := use() // without one
			want(t, "error", fmt.Sprint(after), fmt.Sprint(before))
			want(t, "is an error", after != nil, n == 2)
			want(t, "value", ask(t, db), strconv.Itoa(n+1))
		}
	})
	t.Run("a waiter that gives up", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		db := open(t, f, src, "")
		db.SetMaxOpenConns(2)
		var wg sync.WaitGroup
		for range 6 {
			wg.Go(func() {
				for range 200 {
					ctx, cancel := context.WithTimeout(t.Context(), 100*time.Microsecond)
					if _, err := db.ExecContext(ctx, "insert"); err != nil && !errors.Is(err, context.DeadlineExceeded) {
						t.Error(err)
					}
					cancel()
				}
			})
		}
		for n := range 100 {
			src.set(strconv.Itoa(n))
		}
		wg.Wait()
		want(t, "value", ask(t, db), "99")
		await(t, "no connection is in use", func() bool { return db.Stats().InUse == 0 })
	})
	t.Run("with lifetimes, and without idle connections", func(t *testing.T) {
		for _, set := range []func(db *sql.DB){
			func(db *sql.DB) { db.SetConnMaxLifetime(time.Millisecond) },
			func(db *sql.DB) { db.SetConnMaxIdleTime(time.Microsecond) },
			func(db *sql.DB) { db.SetMaxIdleConns(0) },
			func(db *sql.DB) { db.SetMaxIdleConns(0); db.SetConnMaxLifetime(time.Microsecond) },
		} {
			f, src := newFake(t), newSource("0")
			db := open(t, f, src, "")
			db.SetMaxOpenConns(3)
			set(db)
			var wg sync.WaitGroup
			for range 6 {
				wg.Go(func() {
					for range 300 {
						ask(t, db)
					}
				})
			}
			for n := range 100 {
				src.set(strconv.Itoa(n))
			}
			wg.Wait()
			want(t, "value", ask(t, db), "99")
			db.Close()
			await(t, "every connection is closed", func() bool { return len(f.live()) == 0 })
		}
	})
}

// TestNobodyWaits is the measured hang of pools whose stale connections answer
// ErrBadConn: with changes quick enough, a caller waited for ever.
func TestNobodyWaits(t *testing.T) {
	t.Run("R-14/nobody waits", func(t *testing.T) {
		f, src := newFake(t), newSource("-1")
		db := open(t, f, src, "")
		db.SetMaxOpenConns(3)
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var wg sync.WaitGroup
		var ops atomic.Int64
		for range 6 {
			wg.Go(func() {
				for ctx.Err() == nil {
					ask(t, db)
					ops.Add(1)
				}
			})
		}
		for n := range 1500 {
			src.set(strconv.Itoa(n))
		}
		stop()
		done := make(chan struct{})
		go func() { wg.Wait(); close(done) }()
		receive(t, "every caller has come back", done)
		t.Logf("%d operations", ops.Load())
	})
}

// TestRecovery has 40 connections in use by 200 callers at a change, with dials
// of 20 ms: they dial in parallel, so that no operation takes more than a few
// dials' time.
func TestRecovery(t *testing.T) {
	t.Run("R-22/the pool recovers in parallel", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			const dial = 20 * time.Millisecond
			f, src := newFake(t), newSource("1")
			f.onOpen = func(context.Context, string) error { time.Sleep(dial); return nil }
			f.onCall = func(_ context.Context, _ *fakeConn, call string) error {
				if call == "Exec work" {
					time.Sleep(time.Millisecond / 10) // short, as database/sql serves waiters in random order
				}
				return nil
			}
			db := open(t, f, src, "")
			db.SetMaxOpenConns(40)
			db.SetMaxIdleConns(40)
			ctx, stop := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			var worst atomic.Int64
			for range 200 {
				wg.Go(func() {
					for ctx.Err() == nil {
						began := time.Now()
						if _, err := db.Exec("work"); err != nil {
							t.Error(err)
						}
						raise(&worst, int64(time.Since(began)))
					}
				})
			}
			time.Sleep(5 * dial)
			worst.Store(0)
			src.set("2")
			time.Sleep(5 * dial)
			stop()
			wg.Wait()
			if worst := time.Duration(worst.Load()); worst > 3*dial {
				t.Errorf("the slowest operation took %v, want at most %v", worst, 3*dial)
			}
			db.Close()
		})
	})
}

// TestMaxOpenConns proves that the server never sees more connections than
// MaxOpenConns while old ones close slowly.
func TestMaxOpenConns(t *testing.T) {
	for _, idle := range []int{0, 2, 8} {
		t.Run("R-18/keeps to MaxOpenConns", func(t *testing.T) {
			t.Logf("MaxIdleConns %d", idle)
			synctest.Test(t, func(t *testing.T) {
				f, src := newFake(t), newSource("0")
				f.onClose = func(*fakeConn) { time.Sleep(30 * time.Millisecond) }
				f.onCall = func(_ context.Context, _ *fakeConn, call string) error {
					if call == "Exec work" {
						time.Sleep(time.Millisecond)
					}
					return nil
				}
				db := open(t, f, src, "")
				db.SetMaxOpenConns(8)
				db.SetMaxIdleConns(idle)
				ctx, stop := context.WithCancel(t.Context())
				var wg sync.WaitGroup
				for range 16 {
					wg.Go(func() {
						for ctx.Err() == nil {
							if _, err := db.Exec("work"); err != nil {
								t.Error(err)
							}
						}
					})
				}
				for n := range 50 {
					time.Sleep(20 * time.Millisecond)
					src.set(strconv.Itoa(n))
				}
				stop()
				wg.Wait()
				want(t, "most connections at a time", f.maxLive.Load(), 8)
				db.Close()
			})
		})
	}
}

// TestClose proves G9.
func TestClose(t *testing.T) {
	t.Run("R-36/Close leaves nothing behind", closeLeavesNothing)
	t.Run("R-37/Close waits for nobody who hangs", closeWaitsForNobody)
	t.Run("R-39/a connection of Driver.Open ends its watch", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			db := open(t, f, newSource("1"), "")
			conn, err := db.Driver().Open(register(f, newSource("1")))
			if err != nil {
				t.Fatal(err)
			}
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
			want(t, "connections", len(f.live()), 0)
			db.Close()
		})
	})
}

// closing runs a test of DB.Close in a bubble, which ends only when every
// goroutine in it has.
func closing(t *testing.T, name string, test func(t *testing.T, f *fake, src *source, db *sql.DB)) {
	t.Run(name, func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f, src := newFake(t), newSource("1")
			test(t, f, src, open(t, ctxFake{f}, src, ""))
			synctest.Wait()
			want(t, "connections", len(f.live()), 0)
		})
	})
}

func closeLeavesNothing(t *testing.T) {
	closing(t, "idle", func(t *testing.T, f *fake, src *source, db *sql.DB) {
		ask(t, db)
		db.Close()
		want(t, "connections", len(f.live()), 0)
	})
	closing(t, "just after a change", func(t *testing.T, f *fake, src *source, db *sql.DB) {
		f.onClose = func(*fakeConn) { time.Sleep(patience / 2) }
		ask(t, db)
		src.set("2")
		db.Close()
		want(t, "connections", len(f.live()), 0)
	})
	closing(t, "just after a change of many", func(t *testing.T, f *fake, src *source, db *sql.DB) {
		fill(t, db, 2000)
		src.set("2")
		db.Close()
		want(t, "connections", len(f.live()), 0)
	})
	closing(t, "while an operation waits for a Close", func(t *testing.T, f *fake, src *source, db *sql.DB) {
		f.onClose = func(*fakeConn) { time.Sleep(patience / 2) }
		ask(t, db)
		src.set("2")
		answer := make(chan error)
		go func() {
			_, err := db.Exec("insert")
			answer <- err
		}()
		synctest.Wait()
		db.Close()
		want(t, "connections to 1", f.liveOn("1"), 0)
		if err := <-answer; err != nil {
			t.Errorf("the operation that waited: %v", err)
		}
		time.Sleep(patience)
	})
	closing(t, "in use", func(t *testing.T, f *fake, src *source, db *sql.DB) {
		tx, err := db.Begin()
		if err != nil {
			t.Fatal(err)
		}
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		src.set("2")
		db.Close()
		want(t, "value in a transaction", ask(t, tx), "1")
		if err := tx.Commit(); err != nil {
			t.Error(err)
		}
		want(t, "value on a connection", ask(t, conn), "2")
		conn.Close()
	})
	closing(t, "during a dial", func(t *testing.T, f *fake, src *source, db *sql.DB) {
		ask(t, db)
		f.onOpen = func(ctx context.Context, value string) error { time.Sleep(time.Second); return nil }
		answer := make(chan error)
		conn, err := db.Conn(t.Context()) // takes the idle one
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := db.Exec("insert")
			answer <- err
		}()
		synctest.Wait()
		db.Close()
		if err := <-answer; err != nil {
			t.Errorf("the operation that was dialling: %v", err)
		}
		conn.Close()
	})
	t.Run("the watch is gone when it returns", func(t *testing.T) {
		var gone atomic.Bool
		db := open(t, newFake(t), watchFunc(func(ctx context.Context, _ string, _ url.Values) (string, <-chan string, error) {
			values := make(chan string)
			go func() {
				<-ctx.Done()
				time.Sleep(10 * time.Millisecond)
				gone.Store(true)
				close(values)
			}()
			return "1", values, nil
		}), "")
		ask(t, db)
		db.Close()
		want(t, "the watch is gone", gone.Load(), true)
	})
}

func closeWaitsForNobody(t *testing.T) {
	closing(t, "with a Close that hangs", func(t *testing.T, f *fake, src *source, db *sql.DB) {
		open := make(chan struct{})
		f.onClose = func(*fakeConn) { <-open }
		ask(t, db)
		began := time.Now()
		db.Close()
		if took := time.Since(began); took > 2*patience {
			t.Errorf("DB.Close took %v", took)
		}
		close(open)
	})
	closing(t, "with a Close that hangs since a change", func(t *testing.T, f *fake, src *source, db *sql.DB) {
		open := make(chan struct{})
		f.onClose = func(*fakeConn) { <-open }
		ask(t, db)
		src.set("2")
		began := time.Now()
		db.Close()
		if took := time.Since(began); took > 2*patience {
			t.Errorf("DB.Close took %v", took)
		}
		close(open)
	})
	closing(t, "with many a Close that hangs", func(t *testing.T, f *fake, src *source, db *sql.DB) {
		open := make(chan struct{})
		f.onClose = func(*fakeConn) { <-open }
		fill(t, db, 10)
		began := time.Now()
		db.Close()
		if took := time.Since(began); took > 2*patience {
			t.Errorf("DB.Close took %v", took)
		}
		close(open)
	})
	t.Run("with a connector whose Close hangs", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			stuck := make(chan struct{})
			defer close(stuck)
			src := newSource("1")
			db := open(t, closerDriver{ctxFake{newFake(t)}, func(value string) {
				if value == "2" {
					<-stuck
				}
			}}, src, "")
			ask(t, db)
			src.set("2")
			src.set("3") // the connector of 2 is closed
			want(t, "value", ask(t, db), "3")
			src.set("2")
			began := time.Now()
			db.Close()
			if took := time.Since(began); took > 2*patience {
				t.Errorf("DB.Close took %v", took)
			}
		})
	})
	closing(t, "with a Close that hangs since long ago", func(t *testing.T, f *fake, src *source, _ *sql.DB) {
		stuck := make(chan struct{})
		f.onClose = func(c *fakeConn) {
			if c.value == "1" {
				<-stuck
			}
		}
		var closed atomic.Int32
		db := open(t, closerDriver{ctxFake{f}, func(string) {
			time.Sleep(patience / 4)
			closed.Add(1)
		}}, src, "")
		ask(t, db)
		src.set("2")
		want(t, "value", ask(t, db), "2")
		db.Close()
		want(t, "connectors closed", closed.Load(), 1)
		close(stuck)
		time.Sleep(patience)
	})
	for name, heeds := range map[string]bool{"during Watch": true, "during a Watch that ignores its context": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				open1 := make(chan struct{})
				db := open(t, newFake(t), watchFunc(func(ctx context.Context, _ string, _ url.Values) (string, <-chan string, error) {
					select {
					case <-open1:
					case <-map[bool]<-chan struct{}{true: ctx.Done()}[heeds]:
						return "", nil, ctx.Err()
					}
					return "1", nil, nil
				}), "")
				answer := make(chan error)
				go func() { answer <- db.Ping() }()
				synctest.Wait()
				began := time.Now()
				db.Close()
				if took := time.Since(began); took > patience || heeds && took > 10*time.Millisecond {
					t.Errorf("DB.Close took %v", took)
				}
				if err := <-answer; err == nil {
					t.Error("ping: no error")
				}
				close(open1)
			})
		})
	}
	t.Run("with a channel that the strategy does not close", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			db := open(t, newFake(t), watchFunc(func(context.Context, string, url.Values) (string, <-chan string, error) {
				return "1", make(chan string), nil
			}), "")
			ask(t, db)
			began := time.Now()
			db.Close()
			if took := time.Since(began); took > patience {
				t.Errorf("DB.Close took %v", took)
			}
		})
	})
}

// patience is hotload's: how long it waits for what cannot be hurried.
const patience = time.Second + 10*time.Millisecond // and DB.Close polls

// TestClosers proves that the driver's connectors are closed once each: a
// superseded one when its generation has drained, the last one by DB.Close.
func TestClosers(t *testing.T) {
	t.Run("R-38/each connector is closed once", func(t *testing.T) {
		f, src := newFake(t), newSource("1")
		var mu sync.Mutex
		var closed []string
		d := closerDriver{ctxFake{f}, func(value string) {
			mu.Lock()
			defer mu.Unlock()
			closed = append(closed, value)
		}}
		have := func() string {
			mu.Lock()
			defer mu.Unlock()
			return strings.Join(slices.Clone(closed), " ")
		}
		db := open(t, d, src, "")
		tx, err := db.Begin()
		if err != nil {
			t.Fatal(err)
		}
		src.set("2")
		src.set("3")
		await(t, "the connector of 2 is closed", func() bool { return have() == "2" })
		tx.Rollback()
		await(t, "the connector of 1 is closed", func() bool { return have() == "2 1" })
		ask(t, db)
		db.Close()
		want(t, "connectors closed", have(), "2 1 3")
	})
	t.Run("DB.Close waits for one that is slow", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var closed atomic.Int32
			f, src := newFake(t), newSource("1")
			f.onClose = func(*fakeConn) { time.Sleep(patience / 4) }
			db := open(t, closerDriver{ctxFake{f}, func(value string) {
				if value == "1" {
					time.Sleep(patience / 2)
				}
				closed.Add(1)
			}}, src, "")
			ask(t, db)
			src.set("2")
			synctest.Wait()
			db.Close()
			want(t, "connectors closed", closed.Load(), 2)
		})
	})
}

// A closerDriver makes connectors that are io.Closers.
type closerDriver struct {
	contextDriver
	closed func(value string)
}

type contextDriver interface {
	driver.Driver
	driver.DriverContext
}

type closerConnector struct {
	driver.Connector
	closed func()
}

func (d closerDriver) OpenConnector(value string) (driver.Connector, error) {
	c, err := d.contextDriver.OpenConnector(value)
	return closerConnector{c, func() { d.closed(value) }}, err
}

func (c closerConnector) Close() error { c.closed(); return nil }

// TestEvents checks what operators see.
func TestEvents(t *testing.T) {
	t.Run("R-41/logs each event", func(t *testing.T) {
		log := collect(t)
		f := newFake(t)
		values := make(chan chan string)
		watch := func(ctx context.Context, _ string, _ url.Values) (string, <-chan string, error) {
			c := make(chan string)
			select {
			case values <- c:
			case <-ctx.Done():
			}
			return "1", c, nil
		}
		db := open(t, ctxFake{f}, watchFunc(watch), "forceKill=true")
		pinged := make(chan error)
		go func() { pinged <- db.Ping() }()
		c := <-values
		if err := receive(t, "ping", pinged); err != nil {
			t.Fatal(err)
		}
		tx, err := db.Begin()
		if err != nil {
			t.Fatal(err)
		}
		ask(t, db) // leaves an idle connection
		c <- "bad"
		c <- ""
		c <- "2"
		await(t, "the transaction is killed", func() bool { return f.liveOn("1") == 0 })
		if err := tx.Commit(); !errors.Is(err, hotload.ErrKilled) {
			t.Errorf("commit: %v", err)
		}
		close(c)
		<-values
		pool := regexp.MustCompile("strategy=(test[0-9]+) driver=(test[0-9]+) path=/path").FindString(log.String())
		for _, line := range []string{
			`level=INFO msg="hotload: value accepted" POOL generation=1 closed=0 in_use=0`,
			`level=WARN msg="hotload: value refused" POOL reason=driver error_type=*errors.errorString`,
			`level=WARN msg="hotload: value refused" POOL reason=empty`,
			`level=INFO msg="hotload: value accepted" POOL generation=2 closed=1 in_use=1`,
			`level=WARN msg="hotload: connections killed" POOL generation=1 killed=1`,
			`level=INFO msg="hotload: generation drained" POOL generation=1`,
			`level=WARN msg="hotload: watch lost" POOL`,
			`level=INFO msg="hotload: watch regained" POOL`,
			`level=INFO msg="hotload: value accepted" POOL generation=3 closed=0 in_use=0`,
		} {
			line = strings.Replace(line, "POOL", pool, 1) + "\n"
			await(t, line, func() bool { return strings.Contains(log.String(), line) })
		}
	})
	t.Run("R-42/drained means that nothing is left", func(t *testing.T) {
		log := collect(t)
		f, src := newFake(t), newSource("1")
		db := open(t, f, src, "")
		drained := func() int { return log.count("hotload: generation drained", "generation=1") }
		tx, err := db.Begin()
		if err != nil {
			t.Fatal(err)
		}
		dial, closing := newGate(), newGate()
		f.onOpen = func(_ context.Context, v string) error {
			if v == "1" {
				dial.pass()
			}
			return nil
		}
		f.onClose = func(c *fakeConn) {
			if c.value == "1" {
				closing.pass()
			}
		}
		go db.Exec("insert")
		receive(t, "dial", dial.arrived)
		src.set("2")
		tx.Rollback()
		receive(t, "Close of what was in use", closing.arrived)
		want(t, "drained before that Close has returned", drained(), 0)
		close(closing.open)
		await(t, "it is closed", func() bool { return f.liveOn("1") == 0 })
		want(t, "drained before the dial has returned", drained(), 0)
		close(dial.open)
		await(t, "drained", func() bool { return drained() == 1 })
		want(t, "connections left", f.liveOn("1"), 0)
		src.set("3")
		await(t, "generation 2 drained", func() bool { return log.count("hotload: generation drained", "generation=2") == 1 })
		want(t, "times that generation 1 drained", drained(), 1)
	})
}
