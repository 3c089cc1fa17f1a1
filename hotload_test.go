package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"net/url"
	"strings"
	"sync"
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
		synctest.Test(t, func(t *testing.T) { // and a strategy that changes them spoils no later Watch
			watches := 0
			strategy := watchFunc(func(_ context.Context, pth string, options url.Values) (string, <-chan string, error) {
				watches++
				want(t, "path", pth, "/path/b c/d")
				want(t, "options", options.Encode(), "poll=1s&x=1&x=2")
				options["x"][0] = "spoiled"
				values := make(chan string)
				close(values)
				return "1", values, nil
			})
			db, err := sql.Open("hotload", register(newFake(t), strategy)+"/b%20c%2Fd?poll=1s&forceKill=30s&x=1&x=2&probe=true")
			must(t, "open", err)
			ask(t, db)
			time.Sleep(time.Second)
			must(t, "DB.Close", db.Close())
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

// Drivers and strategies may be registered while names that use others are opened.
func TestRegisterWhileOpening(t *testing.T) {
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 50 {
				db, err := sql.Open("hotload", register(newFake(t), newSource("1")))
				if err != nil {
					t.Error(err)
					return
				}
				db.Close()
			}
		})
	}
	wg.Wait()
}

// TestEmptyDataSourceName: instrumentation libraries open one to get at the driver.
func TestEmptyDataSourceName(t *testing.T) {
	db, err := sql.Open("hotload", "")
	must(t, "open", err)
	defer db.Close()
	mustSay(t, "first use", db.Ping(), "hotload: ")
	if _, ok := db.Driver().(driver.DriverContext); !ok {
		t.Errorf("DB.Driver returns a %T, want a driver.DriverContext", db.Driver())
	}
}

// TestDriverOpen uses Driver.Open as no sql.DB does: each connection has a
// watch, which ends with it, and what it returns is the driver's own.
func TestDriverOpen(t *testing.T) {
	watching := func(t *testing.T, f *fake) (name string, watched chan context.Context) {
		watched = make(chan context.Context, 1)
		return register(f, watchFunc(func(ctx context.Context, _ string, _ url.Values) (string, <-chan string, error) {
			watched <- ctx
			values := make(chan string)
			go func() {
				<-ctx.Done()
				close(values)
			}()
			return "1", values, nil
		})), watched
	}
	t.Run("R-39/a connection of Driver.Open ends its watch", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			name, watched := watching(t, f)
			c, err := hotloadDriver(t).Open(name)
			must(t, "open", err)
			watch := <-watched
			rows, err := c.(driver.QueryerContext).QueryContext(t.Context(), "ask", nil)
			if _, ok := rows.(*fakeRows); !ok {
				t.Errorf("QueryContext: have %T, %v; want the driver's own rows", rows, err)
			}
			res, err := c.(driver.ExecerContext).ExecContext(t.Context(), "insert", nil)
			if _, ok := res.(fakeResult); !ok {
				t.Errorf("ExecContext: have %T, %v; want the driver's own result", res, err)
			}
			tx, err := c.(driver.ConnBeginTx).BeginTx(t.Context(), driver.TxOptions{})
			if _, ok := tx.(fakeTx); !ok {
				t.Errorf("BeginTx: have %T, %v; want the driver's own transaction", tx, err)
			}
			want(t, "watch while the connection is open", watch.Err(), nil)
			must(t, "Close", c.Close())
			<-watch.Done()
			want(t, "connections", len(f.live()), 0)
		})
	})
	for _, call := range []string{"Open", "Close"} {
		bubble(t, "which also ends when the driver panics in "+call, func(t *testing.T) {
			f := newFake(t)
			f.onOpen = func(context.Context, string) error {
				if call == "Open" {
					panic("a bug in the driver")
				}
				return nil
			}
			f.onClose = func(*fakeConn) { panic("a bug in the driver") }
			name, watched := watching(t, f)
			c, err := hotloadDriver(t).Open(name)
			if call == "Close" {
				must(t, "Open", err)
				err = c.Close()
			}
			mustSay(t, call, err, "panicked")
			<-(<-watched).Done()
		})
		t.Run("the error of "+call+" is the driver's own", func(t *testing.T) {
			v := &variant{conn: func(c *recConn) driver.Conn { return c }, fails: map[string]error{call: errDriver}}
			c, err := hotloadDriver(t).Open(register(newSubject(v).recorder.driver(), newSource("1")))
			if err == nil {
				err = c.Close()
			}
			want(t, "error", err, errDriver)
		})
	}
}

// An option that differs from one of hotload's own only in case is refused when
// the data source name is read, as it could only be a mistake that leaves the
// option off. It names the right one, and quotes no value.
func TestNearMisses(t *testing.T) {
	dsn := register(newFake(t), newSource("1"))
	for _, row := range []struct {
		options string
		suggest string // empty if the option is the strategy's
	}{
		{"forcekill=true", "forceKill"},
		{"ForceKill=true", "forceKill"},
		{"FORCEKILL=30s", "forceKill"},
		{"forcekilL=canary", "forceKill"},
		{"forcekill", "forceKill"},
		{"force%6Bill=true", "forceKill"},
		{"forceKill=true&forcekill=true", "forceKill"},
		{"poll=1s&forcekill=true", "forceKill"},
		{"Probe=true", "probe"},
		{"PROBE=false", "probe"},
		{"probE=canary", "probe"},
		{"probe=true&Probe=true", "probe"},
		{"forceKill=true&pRobe=true", "probe"},
		{options: "poll=1s"},
		{options: "Poll=1s"},
		{options: "force=true"},
		{options: "forceKills=true"},
		{options: "force-kill=true"},
		{options: "forcekill2=true"},
		{options: "kill=true"},
		{options: "probes=true"},
		{options: "prob=true"},
		{options: "xprobe=true"},
		{options: "key=forcekill&other=Probe"},
		{options: "forceKill=true&probe=true"},
	} {
		t.Run(row.options, func(t *testing.T) {
			db, err := sql.Open("hotload", dsn+"?"+row.options)
			if row.suggest == "" {
				must(t, "sql.Open", err)
				db.Close()
				return
			}
			if err == nil {
				db.Close()
				t.Fatalf("sql.Open accepts an option that differs from %s only in case", row.suggest)
			}
			if text := err.Error(); !strings.HasPrefix(text, "hotload: ") || !strings.Contains(text, row.suggest) || strings.Contains(text, "canary") {
				t.Errorf("sql.Open: have error %q, want hotload's, with %s and without a value", text, row.suggest)
			}
		})
	}
}

// DB.Driver is hotload's driver, not the one behind it: a library that wraps
// what it finds there wraps hotload, and keeps its promises.
func TestDriverIsHotloads(t *testing.T) {
	f, src := newFake(t), newSource("1")
	dsn := register(ctxFake{f}, src)
	db, err := sql.Open("hotload", dsn)
	must(t, "sql.Open", err)
	defer db.Close()
	want(t, "value", ask(t, db), "1")
	d := db.Driver()
	switch d.(type) {
	case *fake, ctxFake:
		t.Fatalf("DB.Driver is the driver behind hotload")
	}
	opener, ok := d.(driver.DriverContext)
	if !ok {
		t.Fatalf("DB.Driver, a %T, has no OpenConnector", d)
	}
	if _, err := opener.OpenConnector(dsn + "?forceKill=nonsense"); err == nil {
		t.Error("OpenConnector reads no data source names of hotload's")
	}
	connector, err := opener.OpenConnector(dsn)
	must(t, "OpenConnector", err)
	want(t, "driver of the connector", connector.Driver(), d)
	other := sql.OpenDB(connector)
	want(t, "driver of the pool on it", other.Driver(), d)
	want(t, "value of the pool on it", ask(t, other), "1")
	await(t, "both pools are on the next value", func() bool {
		select {
		case src.values <- "2":
		default:
		}
		return ask(t, db) == "2" && ask(t, other) == "2"
	})
	must(t, "DB.Close", other.Close())
	want(t, "watches", src.watches.Load(), 2)
	empty, err := sql.Open("hotload", "")
	must(t, "sql.Open of an empty name", err)
	defer empty.Close()
	want(t, "driver of an empty name", empty.Driver(), d)
}
