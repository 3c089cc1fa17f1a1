package hotload

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A generation is a value and what was opened with it. It begins as a candidate,
// is put in force when its try succeeds, and is superseded by the next one. A
// candidate can also be replaced before that. Then its connections close.
//
// It is drained when refs is 0: its last connection is closed, and nobody dials.
// refs counts one while it is in force or a candidate, one for each dial, which
// becomes its connection's, and one for each try and each kill while they last.
// It reaches 0 only once, because retain fails when it is 0.
type generation struct {
	c         *connector
	number    int // counts the values put in force, from 1; 0 before that
	value     string
	connector driver.Connector // the driver's, set by try; nil if the driver is no driver.DriverContext
	ctx       context.Context  // ends when the generation is superseded, or another candidate replaces it
	end       context.CancelFunc
	drained   chan struct{}   // closed when refs is 0
	refusals  map[string]bool // what was logged of its refusals; guarded by connector.mu

	mu     sync.Mutex // guards the following fields
	refs   int
	conns  []*serverConn // not closed yet, each at its index
	spares []*opening    // whose callers have left, for the next callers
}

func newGeneration(c *connector, value string) *generation {
	g := &generation{c: c, value: value, refs: 1, drained: make(chan struct{}), refusals: make(map[string]bool)}
	g.ctx, g.end = context.WithCancel(context.Background())
	return g
}

// try does what has to succeed before a candidate is put in force: the driver's
// OpenConnector, and with probe, if there is a value to go on with meanwhile, a
// connection.
func (g *generation) try() error {
	if !g.retain() {
		return g.ctx.Err()
	}
	defer g.release(nil)
	if d, ok := g.c.driver.(driver.DriverContext); ok && g.connector == nil {
		err := safely(func() (err error) {
			g.connector, err = d.OpenConnector(g.value)
			if err == nil && g.connector == nil {
				err = errors.New("hotload: the driver returned neither a connector nor an error")
			}
			return err
		})
		if err != nil {
			g.connector = nil
			return &refusedError{fmt.Sprintf("hotload: driver %q refused the connection string that strategy %q delivered for path %q, "+
				"with an error of type %T (unwrap it for its text, which may quote the string)", g.c.driverName, g.c.strategyName, g.c.path, err), err}
		}
	}
	if !g.c.probe || g.c.current.Load() == nil {
		return nil
	}
	return g.probe()
}

// probe opens a connection, pings it if the driver can, and closes it. It waits
// for a driver that does not return in time: see prove.
func (g *generation) probe() error {
	ctx, cancel := context.WithTimeout(g.ctx, tryLimit)
	defer cancel()
	o := g.open(ctx, cancel)
	if o == nil {
		return g.ctx.Err()
	}
	<-o.done
	if o.err != nil {
		return o.err
	}
	// Not take: a candidate is not in force, so take would retire its connection.
	if !o.s.hold() { // the candidate was replaced, and supersede has retired the connection
		return g.ctx.Err()
	}
	defer o.s.awaitClosed(context.Background())
	defer o.s.retire()
	if pinger, ok := o.s.ci.(driver.Pinger); ok && ctx.Err() == nil {
		return pinger.Ping(ctx)
	}
	return ctx.Err()
}

// spareLife is how old an Open whose caller has left may become, or its
// connection, and still serve another caller: long enough for callers who give
// up before the server answers, short enough not to go stale.
const spareLife = 10 * time.Second

// An opening is a call of the driver's Connect or Open, in a goroutine that its
// caller can leave: deadlines hold, and changes are followed at once, even if the
// driver ignores its context or takes none.
//
// Open takes no context, so one that was left goes on. It is kept as a spare,
// and the next caller adopts it instead of calling Open again. So callers with
// short deadlines do not pile up Opens. An Open older than spareLife is no longer
// shared: its host may hang for good, while another caller's Open goes through.
//
// Connect takes a context, which ends when its caller leaves. It is no spare.
type opening struct {
	done chan struct{} // closed when the driver has returned
	s    *serverConn   // s and err are published by done
	err  error
	old  chan struct{} // closed when it is older than spareLife

	abandoned atomic.Bool // nobody will take what it brings
}

// dial opens a server connection, or adopts a spare. If the caller's context ends
// or the generation is superseded, it leaves the driver to itself, and its error
// does not matter or is the context's.
func (g *generation) dial(ctx context.Context) (_ *serverConn, err error) {
	// A connection of Connect keeps this context until it is closed, because the
	// driver may hold on to it: closeConn cancels it then. If there is to be no
	// connection, or Open made it, nobody needs the context after this.
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		if err != nil || g.connector == nil {
			cancel()
		}
	}()
	// A change ends the dial. When the dial is over that is undone: a connection is
	// not to lose its context because its value was superseded. If the change comes
	// in between, connector.dial sees it.
	defer context.AfterFunc(g.ctx, cancel)()
	for {
		o := g.adopt()
		var tooOld <-chan struct{}
		adopted := o != nil
		if adopted {
			tooOld = o.old
		} else if o = g.open(ctx, cancel); o == nil {
			return nil, context.Canceled // superseded
		}
		select {
		case <-o.done:
			if adopted && o.err != nil {
				continue // that is an answer to the caller who began it, not to this one
			}
			return o.s, o.err
		case <-tooOld:
			o.abandon()
			continue
		case <-ctx.Done():
		}
		if g.connector == nil {
			g.keepSpare(o)
			return nil, ctx.Err()
		}
		// The driver sees the end of the context too, and has an error of its own to
		// return, which says more. Nobody wants that of a superseded value.
		select {
		case <-o.done:
			return o.s, o.err
		case <-g.ctx.Done():
		case <-time.After(patience):
		}
		o.abandon()
		return nil, ctx.Err()
	}
}

// adopt returns a spare, if there is one: rather one that is there already than
// one that may hang.
func (g *generation) adopt() *opening {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.spares) == 0 {
		return nil
	}
	i := max(0, slices.IndexFunc(g.spares, func(o *opening) bool { return isClosed(o.done) }))
	o := g.spares[i]
	g.spares = slices.Delete(g.spares, i, i+1)
	return o
}

// open calls the driver in a goroutine. It returns nil if the generation is
// superseded.
//
// The new connection is added to conns before done is closed. If the sweep runs
// later, it finds the connection there. If the sweep ran earlier, connector.dial
// notices the change and retires the connection. If the caller has left, abandon
// retires it.
func (g *generation) open(ctx context.Context, cancel context.CancelFunc) *opening {
	if g.ctx.Err() != nil || !g.retain() {
		return nil
	}
	o := &opening{done: make(chan struct{}), old: make(chan struct{})}
	if g.connector == nil {
		time.AfterFunc(spareLife, func() { close(o.old); g.pruneSpares() })
	}
	go func() {
		var ci driver.Conn
		o.err = safely(func() (err error) {
			if g.connector != nil {
				ci, err = g.connector.Connect(ctx)
			} else {
				ci, err = g.c.driver.Open(g.value)
			}
			if err == nil && ci == nil {
				err = errors.New("hotload: the driver returned neither a connection nor an error")
			}
			return err
		})
		g.mu.Lock()
		if o.err == nil {
			o.s = newServerConn(g, ci, cancel)
			o.s.index = len(g.conns)
			g.conns = append(g.conns, o.s)
		}
		close(o.done)
		g.mu.Unlock()
		if o.err != nil {
			g.release(nil)
		} else if o.abandoned.Load() {
			o.s.retireIdle()
		}
	}()
	return o
}

// keepSpare keeps an Open that its caller leaves, for the next caller.
func (g *generation) keepSpare(o *opening) {
	g.mu.Lock()
	g.spares = append(g.spares, o)
	g.mu.Unlock()
	g.pruneSpares()
}

// pruneSpares abandons the spares that can serve nobody: those that are too old,
// and all of a generation that ends. It is called after each of these has come
// about, and after each spare has come in. So none is missed.
func (g *generation) pruneSpares() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.spares = slices.DeleteFunc(g.spares, func(o *opening) bool {
		useless := isClosed(o.old) || g.ctx.Err() != nil || g.c.ctx.Err() != nil
		if useless {
			o.abandon()
		}
		return useless
	})
}

// abandon closes the connection that an opening brings: now, or open does when it
// is there. Open closes done and then looks, this sets abandoned and then looks:
// one of the two sees the other, and if both do, the second has nothing to do.
func (o *opening) abandon() {
	o.abandoned.Store(true)
	if isClosed(o.done) && o.s != nil {
		o.s.retireIdle()
	}
}

// supersede ends a generation: it closes the connections that are not in use,
// and counts the others, which close when they are returned. It is the sweep of
// rule 1 in server.go. Dials in progress are cancelled (Connect) or left to finish
// (Open); their connections close on arrival. Spares count as idle connections.
func (g *generation) supersede() (closed, inUse int) {
	g.end()
	var swept []*serverConn
	g.mu.Lock()
	for _, s := range g.conns {
		// Who loses this swap has just taken it, and looks whether it is superseded.
		if s.state.CompareAndSwap(idle, retired) {
			swept = append(swept, s)
		} else if s.state.Load() == taken {
			inUse++
		}
	}
	g.mu.Unlock()
	g.pruneSpares()
	closeAll(swept)
	return len(swept), inUse
}

// retain counts one reference more, unless the generation has drained.
func (g *generation) retain() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.refs == 0 {
		return false
	}
	g.refs++
	return true
}

// release gives a reference back: that of s, which is closed, or if s is nil,
// any other.
func (g *generation) release(s *serverConn) {
	g.mu.Lock()
	if last := len(g.conns) - 1; s != nil {
		g.conns[s.index], g.conns[last].index = g.conns[last], s.index
		g.conns = slices.Delete(g.conns, last, last+1)
	}
	g.refs--
	drained := g.refs == 0
	g.mu.Unlock()
	if !drained {
		return
	}
	close(g.drained)
	g.c.inBackground(func() {
		if g.number > 0 {
			g.c.logger().Info("hotload: generation drained", "generation", g.number)
		}
		g.close()
	})
}

// close closes the driver's connector, which happens once: when the generation
// has drained, or is in force at DB.Close.
func (g *generation) close() error {
	if c, ok := g.connector.(io.Closer); ok {
		return safely(func() error { return c.Close() })
	}
	return nil
}
