package hotload_test

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"
)

// The dial of Conn.Raw keeps to the time that the program gave db.Conn, on
// which its connection was taken: Raw has no context of its own.
func TestRawKeepsDeadline(t *testing.T) {
	const forEver = time.Hour // as long as a dial takes that nothing ends
	for _, row := range []struct {
		name    string
		given   time.Duration // to db.Conn; 0 for no deadline
		cancel  bool          // the context of db.Conn when that has returned
		later   time.Duration // when Raw is called
		dial    time.Duration
		most    time.Duration // that Raw may take
		dialled bool
	}{
		{name: "a host that hangs", given: 500 * time.Millisecond, dial: forEver, most: 500 * time.Millisecond},
		{name: "a host that hangs, after a cancel", given: 500 * time.Millisecond, cancel: true, dial: forEver, most: 500 * time.Millisecond},
		{name: "a host that is slow", given: 10 * time.Second, dial: 5 * time.Second, most: 5 * time.Second, dialled: true},
		{name: "a host that is slow, after a cancel", given: 10 * time.Second, cancel: true, dial: 5 * time.Second, most: 5 * time.Second, dialled: true},
		{name: "no deadline", dial: 20 * time.Second, most: 20 * time.Second, dialled: true},
		{name: "no deadline, after a cancel", cancel: true, dial: 20 * time.Second, most: 20 * time.Second, dialled: true},
		// A graceful change causes no error: a db.Conn of 500 ms that is held for a minute
		// must not fail because of it.
		{name: "a deadline long past", given: 500 * time.Millisecond, cancel: true, later: time.Minute, dial: 100 * time.Millisecond, most: 100 * time.Millisecond, dialled: true},
	} {
		for _, kind := range []string{"Connect", "Connect, deaf", "Open"} {
			for _, pooled := range []bool{false, true} {
				for _, options := range []string{"", "forceKill=true"} {
					bubble(t, fmt.Sprintf("%s,%s,from the pool=%t,%s", row.name, kind, pooled, options), func(t *testing.T) {
						f, src := newFake(t), newSource("1")
						t.Cleanup(func() { time.Sleep(forEver) }) // for a deaf dial to return
						f.onOpen = func(ctx context.Context, value string) error {
							if value == "1" {
								return nil
							}
							done := ctx.Done()
							if kind == "Connect, deaf" {
								done = nil
							}
							select {
							case <-time.After(row.dial):
								return nil
							case <-done:
								return ctx.Err()
							}
						}
						var d driver.Driver = ctxFake{f}
						if kind == "Open" {
							d = f
						}
						db := open(t, d, src, options)
						if pooled { // with a deadline of its own, which is none of the next
							ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
							conn, err := db.Conn(ctx)
							must(t, "conn", err)
							must(t, "Conn.Close", conn.Close())
							cancel()
						}
						ctx, cancel := context.WithCancel(t.Context())
						if row.given > 0 {
							ctx, cancel = context.WithTimeout(ctx, row.given)
						}
						defer cancel()
						conn, err := db.Conn(ctx)
						must(t, "conn", err)
						defer conn.Close()
						if row.cancel {
							cancel()
						}
						src.set("2")
						time.Sleep(row.later)
						start := time.Now()
						var have driver.Conn
						must(t, "Raw", conn.Raw(func(dc any) error {
							have = dc.(interface{ Raw() driver.Conn }).Raw()
							return nil
						}))
						most := row.most
						if kind == "Connect, deaf" && !row.dialled {
							most += patience // for the driver to return
						}
						if took := time.Since(start); took > most {
							t.Errorf("Raw took %v, want at most %v", took, most)
						}
						if !row.dialled {
							want(t, "connection of a host that hangs", have, nil)
						} else if c, ok := have.(*fakeConn); !ok {
							t.Errorf("Raw: have %v, want a connection", have)
						} else {
							want(t, "value of the connection", c.value, "2")
						}
					})
				}
			}
		}
	}
}

// A failingFake's connections answer Close with an error.
type (
	failingFake      struct{ ctxFake }
	failingConnector struct{ *fakeConnector }
	failingConn      struct{ *fakeConn }
)

var errFailing = errors.New("fake: Close failed")

func (d failingFake) OpenConnector(value string) (driver.Connector, error) {
	return failingConnector{&fakeConnector{f: d.fake, value: value}}, nil
}

func (c failingConnector) Connect(ctx context.Context) (driver.Conn, error) {
	ci, err := c.fakeConnector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return failingConn{ci.(*fakeConn)}, nil
}

func (c failingConn) Close() error {
	c.fakeConn.Close()
	return errFailing
}

// DB.Close tells the driver's error of a Close, as without hotload, also when
// another Close was slow once.
func TestCloseErrorAfterSlowClose(t *testing.T) {
	for _, slow := range []time.Duration{0, patience / 2, 2 * patience} {
		bubble(t, slow.String(), func(t *testing.T) {
			f := newFake(t)
			var pause atomic.Int64
			f.onClose = func(*fakeConn) { time.Sleep(time.Duration(pause.Load())) }
			db := open(t, failingFake{ctxFake{f}}, newSource("1"), "")
			db.SetMaxIdleConns(-1)
			pause.Store(int64(slow))
			_, err := db.Exec("insert") // and a Close, which is slow
			must(t, "exec", err)
			time.Sleep(time.Hour)
			pause.Store(0)
			db.SetMaxIdleConns(2)
			_, err = db.Exec("insert")
			must(t, "exec", err)
			if err := db.Close(); !errors.Is(err, errFailing) {
				t.Errorf("DB.Close: have error %v, want the driver's", err)
			}
		})
	}
}
