package hotload

import (
	"context"
	"database/sql/driver"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"
)

// A generation is a value that the driver has not refused, and what was opened
// with it.
type generation struct {
	c         *connector
	number    int // counts the values put in force, from 1; 0 before that
	value     string
	connector driver.Connector // nil if the driver is no driver.DriverContext
	ctx       context.Context  // ends when the generation is superseded
	end       context.CancelFunc

	mu    sync.Mutex    // guards the following fields
	refs  int           // dials, connections, and one until it is superseded; drained when none is left
	conns []*serverConn // not closed, each at its place
	left  []*opening    // Opens whose callers have left, for the next callers
	stop  func() bool   // the waiting for a kill; nil if there is none
}

// spareLife is how old an Open whose caller has left may become, or its
// connection, and still serve another caller: long enough for callers who give
// up before the server answers, short enough not to go stale.
const spareLife = 10 * time.Second

// An opening is a call of the driver's Open or Connect in a goroutine that its
// caller can leave.
type opening struct {
	began     time.Time
	done      chan struct{} // closed when the driver has returned
	s         *serverConn   // s and err are published by done
	err       error
	abandoned bool // nobody will take what it opens; guarded by generation.mu
	expires   bool // a timer drops it if nobody has it when it is too old; the same
}

// dial opens a server connection, unless the caller's context ends or the
// generation is superseded. An Open, which has no context, goes on when its
// caller leaves and serves the next one, so that there are never more of them
// than there were callers at a time, save those that are too old.
func (g *generation) dial(ctx context.Context) (_ *serverConn, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		if err != nil || g.connector == nil {
			cancel() // else it ends with the connection: the driver may hold on to it
		}
	}()
	defer context.AfterFunc(g.ctx, cancel)()
	for {
		o, adopted := g.open(ctx, cancel)
		if o == nil {
			return nil, context.Canceled
		}
		var tooOld <-chan time.Time
		if adopted {
			tooOld = time.After(spareLife - time.Since(o.began))
		}
		select {
		case <-o.done:
			if adopted && o.err != nil { // what failed another caller
				continue
			}
			return o.s, o.err
		case <-tooOld:
			g.leave(o)
			continue
		case <-ctx.Done():
		}
		if g.connector != nil { // a driver that heeds its context has an error of its own to return
			select {
			case <-o.done:
				return o.s, o.err
			case <-g.ctx.Done():
			case <-time.After(patience):
			}
		}
		g.leave(o)
		return nil, ctx.Err()
	}
}

// open finds an Open that its caller has left, or else calls the driver.
func (g *generation) open(ctx context.Context, cancel context.CancelFunc) (o *opening, adopted bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.left) > 0 {
		i := max(0, slices.IndexFunc(g.left, (*opening).isDone))
		o = g.left[i]
		g.left = slices.Delete(g.left, i, i+1)
		return o, true
	}
	if g.ctx.Err() != nil {
		return nil, false
	}
	g.refs++
	o = &opening{began: time.Now(), done: make(chan struct{})}
	go func() {
		var ci driver.Conn
		o.err = safely(func() (err error) {
			if g.connector != nil {
				ci, err = g.connector.Connect(ctx)
			} else {
				ci, err = g.c.driver.Open(g.value)
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
		if o.abandoned {
			o.drop()
		}
		g.mu.Unlock()
		if o.err != nil {
			g.release(nil)
		}
	}()
	return o, false
}

// leave leaves an Open to the next caller, for a while.
func (g *generation) leave(o *opening) {
	g.mu.Lock()
	defer g.mu.Unlock()
	rest := spareLife - time.Since(o.began)
	if o.abandoned = g.connector != nil || rest <= 0 || g.ctx.Err() != nil || g.c.ctx.Err() != nil; o.abandoned {
		o.drop()
		return
	}
	g.left = append(g.left, o)
	if o.expires {
		return
	}
	o.expires = true
	time.AfterFunc(rest, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if i := slices.Index(g.left, o); i >= 0 {
			g.left = slices.Delete(g.left, i, i+1)
			o.drop()
		}
	})
}

// abandonAll lets no Open that was left serve anyone any more.
func (g *generation) abandonAll() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, o := range g.left {
		o.drop()
	}
	g.left = nil
}

func (o *opening) isDone() bool {
	select {
	case <-o.done:
		return true
	default:
		return false
	}
}

// drop closes what was opened for nobody, now or when it is there.
func (o *opening) drop() {
	o.abandoned = true
	if o.isDone() && o.s != nil {
		o.s.retire()
	}
}

// retire ends a generation: it closes the connections that are not in use, and
// counts the others. It is drained when release is called for the last of them,
// and for what superseded it.
func (g *generation) retire() (closed, inUse int) {
	g.end()
	var retired []*serverConn
	g.mu.Lock()
	for _, s := range g.conns {
		switch {
		case s.state.CompareAndSwap(idle, parked):
			retired = append(retired, s)
		case s.state.Load() == taken: // else it is closing already
			inUse++
		}
	}
	g.mu.Unlock()
	g.abandonAll()
	closeAll(retired)
	return len(retired), inUse
}

// drop ends a generation that was never in force.
func (g *generation) drop() {
	g.retire()
	g.release(nil)
}

// release forgets a connection that is closed, a dial that failed, or that the
// generation is in force.
func (g *generation) release(s *serverConn) {
	g.mu.Lock()
	if last := len(g.conns) - 1; s != nil {
		g.conns[s.index], g.conns[last].index = g.conns[last], s.index
		g.conns[last] = nil
		g.conns = g.conns[:last]
	}
	g.refs--
	drained := g.refs == 0
	if drained && g.stop != nil {
		g.stop()
	}
	g.mu.Unlock()
	if drained {
		g.c.inBackground(func() {
			if g.number > 0 {
				g.c.logger().Info("hotload: generation drained", "generation", g.number)
			}
			g.close()
		})
	}
}

// close closes the driver's connector, which happens once: when the generation
// has drained, or is in force at DB.Close.
func (g *generation) close() error {
	if c, ok := g.connector.(io.Closer); ok {
		return safely(c.Close)
	}
	return nil
}

// A try may last as long as the limit, unless the driver ignores its context
// or has none; the pause between two tries doubles from the least to the most.
const (
	probeLimit      = 10 * time.Second
	leastProbePause = 250 * time.Millisecond
	mostProbePause  = 5 * time.Second
)

// prove tries a value until a connection can be opened with it, and then puts
// it in force. A failure is logged once for each reason.
func (c *connector) prove(g *generation) {
	told := make(map[string]bool)
	for pause := leastProbePause; ; pause = min(2*pause, mostProbePause) {
		result := make(chan error, 1)
		go func() { result <- safely(g.try) }()
		var err error
		select {
		case err = <-result:
		case <-time.After(probeLimit + patience): // a driver that heeds no limit
			err = context.DeadlineExceeded
		}
		if g.ctx.Err() != nil {
			return
		}
		if err == nil {
			c.publish(g)
			return
		}
		attrs := describe(err)
		if reason := fmt.Sprint(attrs...); !told[reason] {
			told[reason] = true
			c.logger().Warn("hotload: value refused", slices.Concat([]any{"reason", "probe"}, attrs)...)
		}
		for g.trying() && g.ctx.Err() == nil {
			select {
			case <-time.After(pause):
			case <-g.ctx.Done():
			}
		}
		select {
		case <-time.After(pause):
		case <-g.ctx.Done():
			return
		}
	}
}

// trying reports whether a try that ran into its limit is still going on.
func (g *generation) trying() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.refs > 1
}

// try opens a connection, pings it if the driver can, and closes it.
func (g *generation) try() error {
	ctx, cancel := context.WithTimeout(g.ctx, probeLimit)
	defer cancel()
	s, err := g.dial(ctx)
	if err != nil {
		return err
	}
	if s.own() {
		defer s.awaitClosed(context.Background())
		defer s.park()
		if pinger, ok := s.ci.(driver.Pinger); ok {
			return pinger.Ping(ctx)
		}
	}
	return ctx.Err()
}
