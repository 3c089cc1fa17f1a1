package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/infobloxopen/hotload/example/etcd/internal/throwaway"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// A cluster is one or more members of etcd on loopback. What they say to each other and to
// clients goes through fronts, so that a member can be stopped and started, or the network can
// fail, while every address stays what it is.
type cluster struct {
	t       *testing.T
	members []*member
	client  *clientv3.Client // for the test itself
}

type member struct {
	cfg           *embed.Config
	clients, peer *front
	server        *embed.Etcd // nil while it is stopped
}

// newCluster starts so many members. If configure is not nil, it may change what they are; then
// the test's own client needs tls.
func newCluster(t *testing.T, size int, configure func(*embed.Config), tls *tls.Config) *cluster {
	c := &cluster{t: t}
	var initial []string
	for i := range size {
		m := &member{cfg: throwaway.Config(t.TempDir(), 0), clients: newFront(t), peer: newFront(t)}
		m.cfg.Name = fmt.Sprint("member", i)
		m.cfg.AdvertisePeerUrls = []url.URL{{Scheme: "http", Host: m.peer.addr()}}
		initial = append(initial, m.cfg.Name+"=http://"+m.peer.addr())
		c.members = append(c.members, m)
	}
	for _, m := range c.members {
		m.cfg.InitialCluster = strings.Join(initial, ",")
		if configure != nil {
			configure(m.cfg)
		}
	}
	c.start()
	t.Cleanup(c.stop)
	c.client = c.newClient(clientv3.Config{TLS: tls})
	return c
}

// start starts the members that are stopped, and returns when the cluster answers.
func (c *cluster) start() {
	c.t.Helper()
	var starting sync.WaitGroup
	errs := make([]error, len(c.members))
	for i, m := range c.members {
		if m.server == nil {
			starting.Go(func() { errs[i] = m.start() })
		}
	}
	starting.Wait()
	if err := errors.Join(errs...); err != nil {
		c.t.Fatal(err)
	}
	for _, m := range c.members {
		select {
		case <-m.server.Server.ReadyNotify():
		case <-time.After(time.Minute):
			c.t.Fatal("a member is not ready after a minute")
		}
	}
}

func (m *member) start() (err error) {
	if m.server, err = embed.StartEtcd(m.cfg); err != nil {
		return err
	}
	m.peer.lead(m.server.Peers[0].Addr().String())
	m.clients.lead(m.server.Clients[0].Addr().String())
	return nil
}

func (c *cluster) stop() {
	var stopping sync.WaitGroup
	for _, m := range c.members {
		// Without connections a server stops at once; else it waits five seconds for them to end.
		m.clients.cut()
		m.peer.cut()
		if m.server != nil {
			stopping.Go(func() { m.server.Close(); m.server = nil })
		}
	}
	stopping.Wait()
}

// newClient returns a client that knows all members.
func (c *cluster) newClient(cfg clientv3.Config) *clientv3.Client {
	for _, m := range c.members {
		scheme := "http://"
		if cfg.TLS != nil {
			scheme = "https://"
		}
		cfg.Endpoints = append(cfg.Endpoints, scheme+m.clients.addr())
	}
	return newClient(c.t, cfg)
}

func newClient(t *testing.T, cfg clientv3.Config) *clientv3.Client {
	t.Helper()
	cfg.Logger = zap.NewNop()
	client, err := clientv3.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// put tries again while the members have yet to find each other.
func (c *cluster) put(key, value string) (err error) {
	for range 10 {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		_, err = c.client.Put(ctx, key, value)
		cancel()
		if err == nil {
			return nil
		}
	}
	return err
}

// enableAuth makes a user who may do everything, and lets nobody else do anything.
func (c *cluster) enableAuth(name, password string) error {
	ctx := context.Background()
	_, err := c.client.UserAdd(ctx, name, password)
	if err == nil {
		_, err = c.client.UserGrantRole(ctx, name, "root")
	}
	if err == nil {
		_, err = c.client.AuthEnable(ctx)
	}
	return err
}

// A front is an address on loopback that leads to another.
type front struct {
	listener net.Listener

	mu      sync.Mutex
	backend string        // where it leads; "" while it is cut
	stalled chan struct{} // not nil while nothing passes, and closed when it does again
	conns   map[net.Conn]bool
}

func newFront(t *testing.T) *front {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &front{listener: listener, conns: make(map[net.Conn]bool)}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { f.serve(conn) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		f.cut()
		serving.Wait()
	})
	return f
}

func (f *front) addr() string { return f.listener.Addr().String() }

func (f *front) serve(conn net.Conn) {
	defer conn.Close()
	f.mu.Lock()
	backend := f.backend
	f.mu.Unlock()
	other, err := net.Dial("tcp", backend)
	if err != nil {
		return
	}
	defer other.Close()
	f.mu.Lock()
	if f.backend != backend {
		f.mu.Unlock()
		return
	}
	f.conns[conn], f.conns[other] = true, true
	f.mu.Unlock()

	var passing sync.WaitGroup
	pass := func(to, from net.Conn) {
		io.Copy(gated{to, f}, from)
		to.Close()
		from.Close()
	}
	passing.Go(func() { pass(other, conn) })
	passing.Go(func() { pass(conn, other) })
	passing.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.conns, conn)
	delete(f.conns, other)
}

// gated is a connection on which nothing is written while its front is stalled.
type gated struct {
	net.Conn
	front *front
}

func (g gated) Write(b []byte) (int, error) {
	g.front.mu.Lock()
	stalled := g.front.stalled
	g.front.mu.Unlock()
	if stalled != nil {
		<-stalled
	}
	return g.Conn.Write(b)
}

// lead ends what keeps a front from leading to a backend.
func (f *front) lead(backend string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.backend = backend
	f.release()
}

func (f *front) release() {
	if f.stalled != nil {
		close(f.stalled)
		f.stalled = nil
	}
}

// cut ends all connections and refuses new ones. It returns where the front led.
func (f *front) cut() (backend string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	backend, f.backend = f.backend, ""
	for conn := range f.conns {
		conn.Close()
	}
	f.release()
	return backend
}

// stall lets nothing pass any more, without a word to either side.
func (f *front) stall() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stalled == nil {
		f.stalled = make(chan struct{})
	}
	return nil
}
