package etcd

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/infobloxopen/hotload/strategytest"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
)

var lastKey atomic.Int64

// newKey returns a path that no other test has.
func newKey() string { return fmt.Sprintf("/services/s%d/dsn", lastKey.Add(1)) }

// TestStrategy holds the contract, for each way in which etcd can fail.
func TestStrategy(t *testing.T) {
	t.Run("the key is deleted", func(t *testing.T) {
		c := newCluster(t, 1, nil, nil)
		strategytest.Run(t, func(t *testing.T) strategytest.Subject {
			s := c.subject(t)
			ours := newFront(t)
			ours.lead(c.members[0].server.Clients[0].Addr().String())
			s.Strategy = New(newClient(t, clientv3.Config{Endpoints: []string{ours.addr()}}))
			s.Stall = ours.stall
			s.Remove = func() error {
				_, err := c.client.Delete(context.Background(), s.Path)
				return err
			}
			return s
		})
	})
	t.Run("the server is stopped", func(t *testing.T) {
		strategytest.Run(t, func(t *testing.T) strategytest.Subject {
			c := newCluster(t, 1, nil, nil)
			s := c.subject(t)
			s.Set = func(value string) error {
				c.start()
				return c.put(s.Path, value)
			}
			s.Remove = func() error {
				c.stop()
				return nil
			}
			return s
		})
	})
	t.Run("each put is followed by a compaction", func(t *testing.T) {
		c := newCluster(t, 1, nil, nil)
		strategytest.Run(t, func(t *testing.T) strategytest.Subject {
			s := c.subject(t)
			s.Set = func(value string) error {
				resp, err := c.client.Put(context.Background(), s.Path, value)
				if err == nil {
					_, err = c.client.Compact(context.Background(), resp.Header.Revision, clientv3.WithCompactPhysical())
				}
				return err
			}
			return s
		})
	})
	t.Run("the leader is lost", func(t *testing.T) {
		c := newCluster(t, 3, nil, nil)
		strategytest.Run(t, func(t *testing.T) strategytest.Subject {
			s := c.subject(t)
			heal := func() {}
			s.Set = func(value string) error {
				heal()
				return c.put(s.Path, value)
			}
			s.Remove = func() error {
				heal = c.partition()
				return nil
			}
			t.Cleanup(func() { heal() })
			return s
		})
	})
}

// partition keeps the members from talking to each other until heal is called. It returns when none
// has a leader, and heal when there is one that can do its work.
func (c *cluster) partition() (heal func()) {
	backends := make([]string, len(c.members))
	for i, m := range c.members {
		backends[i] = m.peer.cut()
	}
	for _, m := range c.members {
		eventually(c.t, "every member to miss its leader", func() bool { return m.server.Server.Leader() == 0 })
	}
	return func() {
		for i, m := range c.members {
			m.peer.lead(backends[i])
		}
		for _, m := range c.members {
			eventually(c.t, "the members to elect a leader", func() bool { return m.server.Server.Leader() != 0 })
		}
	}
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited a minute for %s", what)
		}
	}
}

// subject is a key of the cluster, watched through a client of its own.
func (c *cluster) subject(t *testing.T) strategytest.Subject {
	c.t = t
	s := strategytest.Subject{Strategy: New(c.newClient(clientv3.Config{})), Path: newKey()}
	s.OtherPath = s.Path + ".old" // which a watch of a prefix would hear of
	s.Set = func(value string) error { return c.put(s.Path, value) }
	s.SetOther = func(value string) error { return c.put(s.OtherPath, value) }
	return s
}

// A follower is a watch, with what it delivers.
type follower struct {
	t      *testing.T
	values <-chan string
	end    context.CancelFunc
}

func follow(t *testing.T, s *Strategy, key, want string) follower {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	value, values, err := s.Watch(ctx, key, nil)
	if err != nil || value != want {
		cancel()
		t.Fatalf("Watch: want %q and no error, have %q, %v", want, value, err)
	}
	t.Cleanup(cancel)
	return follower{t, values, cancel}
}

// attentive returns a strategy that does not read again what it hears nothing of, which could hide
// that it is deaf.
func attentive(client *clientv3.Client) *Strategy {
	s := New(client)
	s.quiet = time.Hour
	return s
}

// expect holds that this value comes, and no other before it.
func (f follower) expect(want string) {
	f.t.Helper()
	select {
	case v, ok := <-f.values:
		if !ok || v != want {
			f.t.Fatalf("want %q delivered, have %q, %v", want, v, ok)
		}
	case <-time.After(time.Minute):
		f.t.Fatalf("waited a minute for %q", want)
	}
}

// A logbook keeps what was logged.
type logbook struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logbook) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// captureLog redirects slog until the test ends.
func captureLog(t *testing.T) *logbook {
	before := slog.Default()
	t.Cleanup(func() { slog.SetDefault(before) })
	l := new(logbook)
	slog.SetDefault(slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}})))
	return l
}

// TestErrors holds what an operator reads when a pool's first read fails.
func TestErrors(t *testing.T) {
	c := newCluster(t, 1, nil, nil)
	away := newFront(t) // leads nowhere
	closed := c.newClient(clientv3.Config{})
	closed.Close()
	if err := c.put("/blank", " \n"); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		client  *clientv3.Client
		path    string
		options url.Values
		want    string
	}{
		{"absent", c.client, "/absent", nil, `hotload: etcd: "/absent": the key does not exist, want it to hold a connection string`},
		{"blank", c.client, "/blank", nil, `hotload: etcd: "/blank": the key is blank, want it to hold a connection string`},
		{"no path", c.client, "", nil, `hotload: etcd: the path is "", want a key, as in etcd://postgres/services/orders/dsn`},
		{"an option", c.client, "/absent", url.Values{"forcekill": {"S3CRET"}}, `hotload: etcd: unknown option "forcekill", want none`},
		{"no server", newClient(t, clientv3.Config{Endpoints: []string{away.addr()}}), "/absent", nil,
			`hotload: etcd: "/absent": no answer within 5s, want a cluster with a leader at the client's endpoints`},
		{"the client is closed", closed, "/absent", nil,
			`hotload: etcd: "/absent": the client is closed, want it open until the pools are closed`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := New(tt.client).Watch(t.Context(), tt.path, tt.options)
			if err == nil || err.Error() != tt.want {
				t.Errorf("want %s\nhave %v", tt.want, err)
			}
			if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
				t.Error("the error looks like that of the caller's own context")
			}
		})
	}
}

// TestLog holds that each reason is logged once, with its end, and never a value.
func TestLog(t *testing.T) {
	log := captureLog(t)
	c := newCluster(t, 1, nil, nil)
	key := newKey()
	c.put(key, "S3CRET one")
	f := follow(t, New(c.client), key, "S3CRET one")
	logged := func(text string) { // what etcd announces together is told together
		t.Helper()
		eventually(t, "the log of "+text, func() bool { return strings.Contains(log.String(), text) })
	}
	for _, blank := range []string{"", " ", "\n"} {
		c.put(key, blank)
		logged("is blank")
	}
	if _, err := c.client.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	logged("does not exist")
	c.put(key, "S3CRET two\n")
	f.expect("S3CRET two")
	end := "level=INFO msg=\"hotload: key usable again\" strategy=etcd path=" + key + "\n"
	logged(end)
	warning := "level=WARN msg=\"hotload: key unusable, keeping the last value\" strategy=etcd path=" + key
	want := warning + " error=\"the key is blank, want it to hold a connection string\"\n" +
		warning + " error=\"the key does not exist, want it to hold a connection string\"\n" + end
	if have := log.String(); have != want {
		t.Errorf("logged\nwant %s\nhave %s", want, have)
	}
}

// TestCompaction holds that a watch that is overtaken by a compaction goes on: the connection breaks,
// and what it would go on from has been compacted when it is there again.
func TestCompaction(t *testing.T) {
	log := captureLog(t)
	c := newCluster(t, 1, nil, nil)
	ours := newFront(t)
	ours.lead(c.members[0].server.Clients[0].Addr().String())
	key := newKey()
	c.put(key, "one")
	f := follow(t, attentive(newClient(t, clientv3.Config{Endpoints: []string{ours.addr()}})), key, "one")
	c.put(key, "two")
	f.expect("two") // the watch has begun

	backend := ours.cut()
	c.put(key, "three")
	resp, err := c.client.Put(t.Context(), key, "four")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.client.Compact(t.Context(), resp.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	ours.lead(backend)
	f.expect("four")
	c.put(key, "five")
	f.expect("five")
	if reason := "required revision has been compacted"; !strings.Contains(log.String(), reason) {
		t.Errorf("the test did not do what it is for: nothing was logged with %q", reason)
	}
}

// TestRestore holds that a watch follows a cluster that was restored from an old backup, although
// its revisions have gone back.
func TestRestore(t *testing.T) {
	c := newCluster(t, 1, nil, nil)
	log := captureLog(t)
	s := New(c.client)
	s.quiet = 100 * time.Millisecond
	key := newKey()
	c.put(key, "one")
	c.stop()
	backup := t.TempDir()
	if err := os.CopyFS(backup, os.DirFS(c.members[0].cfg.Dir)); err != nil {
		t.Fatal(err)
	}
	c.start()
	f := follow(t, s, key, "one")
	for range 100 {
		c.put(newKey(), "something else")
	}
	c.put(key, "two")
	f.expect("two")
	c.stop()
	c.members[0].cfg.Dir = backup
	c.start()
	f.expect("one")
	c.put(key, "three")
	f.expect("three")
	// Without that the key would still be read again, but the watch would stay deaf.
	if reason := "revision went back"; !strings.Contains(log.String(), reason) {
		t.Errorf("nothing was logged with %q", reason)
	}
}

// TestLostLeader holds that a member that is cut off from the others does not keep a watch: etcd ends
// it, and the watch goes on when there is a leader.
func TestLostLeader(t *testing.T) {
	log := captureLog(t)
	c := newCluster(t, 3, nil, nil)
	key := newKey()
	c.put(key, "one")
	s := attentive(c.newClient(clientv3.Config{}))
	f := follow(t, s, key, "one")
	c.put(key, "two")
	f.expect("two")
	heal := c.partition()
	eventually(t, "the watch to miss its leader", func() bool { return strings.Contains(log.String(), "no leader") })
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if value, _, err := s.Watch(ctx, key, nil); err == nil {
		t.Errorf("a member without a leader answered %q, which may be old", value)
	}
	heal()
	c.put(key, "three")
	f.expect("three")
}

// TestClosedClient holds that a watch ends when the program closes the client, and leaves nothing.
func TestClosedClient(t *testing.T) {
	c := newCluster(t, 1, nil, nil)
	key := newKey()
	c.put(key, "one")
	client := c.newClient(clientv3.Config{})
	before := runtime.NumGoroutine()
	f := follow(t, New(client), key, "one")
	client.Close()
	select {
	case v, ok := <-f.values:
		if ok {
			t.Errorf("%q was delivered, want the channel closed", v)
		}
	case <-time.After(time.Minute):
		t.Fatal("waited a minute for the channel to be closed")
	}
	eventually(t, "the goroutines to end", func() bool { return runtime.NumGoroutine() <= before })
}

// TestUser holds that a user of a server with TLS follows what it may read, also after its token has
// expired, and that neither a password nor a value comes to light where it may not.
func TestUser(t *testing.T) {
	log := captureLog(t)
	certFile, keyFile, pool := certificate(t)
	c := newCluster(t, 1, func(cfg *embed.Config) {
		cfg.ListenClientUrls[0].Scheme = "https"
		cfg.AdvertiseClientUrls[0].Scheme = "https"
		cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = certFile, keyFile
		cfg.AuthTokenTTL = 1 // seconds
		cfg.BcryptCost = 4   // the quickest
	}, &tls.Config{RootCAs: pool})
	const password = "S3CRET-password"
	allowed, forbidden := newKey(), newKey()
	for _, err := range []error{
		c.put(allowed, "S3CRET one"), c.put(forbidden, "S3CRET not yours"),
		c.enableAuth("root", password),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	user := func(name, password string) *clientv3.Client {
		return c.newClient(clientv3.Config{Username: name, Password: password, TLS: &tls.Config{RootCAs: pool}})
	}
	root := user("root", password)
	c.client = root
	ctx := t.Context()
	grant := func() {
		t.Helper()
		if _, err := root.RoleGrantPermission(ctx, "reader", allowed, "", clientv3.PermissionType(clientv3.PermRead)); err != nil {
			t.Fatal(err)
		}
	}
	root.RoleAdd(ctx, "reader")
	grant()
	root.UserAdd(ctx, "orders", password)
	if _, err := root.UserGrantRole(ctx, "orders", "reader"); err != nil {
		t.Fatal(err)
	}

	root.UserAdd(ctx, "retired", password)
	retired := New(user("retired", password))
	if _, err := root.UserChangePassword(ctx, "retired", "S3CRET-changed"); err != nil {
		t.Fatal(err)
	}

	orders := New(user("orders", password))
	orders.quiet = 100 * time.Millisecond
	f := follow(t, orders, allowed, "S3CRET one")
	c.put(allowed, "S3CRET two")
	f.expect("S3CRET two")
	var failures []string
	for _, tt := range []struct {
		name     string
		strategy *Strategy
		path     string
		want     string
	}{
		{"a key that may not be read", orders, forbidden, "permission denied"},
		{"a password that was changed", retired, allowed, "authentication failed"},
		{"no user", New(c.newClient(clientv3.Config{TLS: &tls.Config{RootCAs: pool}})), allowed, "user name is empty"},
	} {
		_, _, err := tt.strategy.Watch(ctx, tt.path, nil)
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), tt.path) {
			t.Errorf("%s: want an error that names %s and says %s, have %v", tt.name, tt.path, tt.want, err)
		}
		failures = append(failures, fmt.Sprint(err))
	}

	// The permission is taken away and given back.
	if _, err := root.RoleRevokePermission(ctx, "reader", allowed, ""); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the lost permission to be logged", func() bool { return strings.Contains(log.String(), "permission denied") })
	c.put(allowed, "S3CRET three")
	grant()
	f.expect("S3CRET three")

	// A token that is not used is gone after a second or two, but the stream of a watch that began with
	// it goes on. A watch that begins later must not depend on it.
	quiet := New(user("orders", password))
	first := follow(t, quiet, allowed, "S3CRET three")
	c.put(allowed, "S3CRET four")
	first.expect("S3CRET four")
	f.expect("S3CRET four")
	f.end()
	time.Sleep(3 * time.Second) // there is nothing to wait for: etcd does not tell
	late := follow(t, quiet, allowed, "S3CRET four")
	c.put(allowed, "S3CRET five")
	late.expect("S3CRET five")
	first.expect("S3CRET five")
	if text := log.String() + strings.Join(failures, "\n"); strings.Contains(text, "S3CRET") || strings.Contains(text, "orders\"") {
		t.Errorf("a secret came to light:\n%s", text)
	}
	if strings.Contains(log.String(), "invalid auth token") {
		t.Errorf("a watch began with a token that had expired:\n%s", log)
	}
}

// certificate makes one for this machine that signs itself.
func certificate(t *testing.T) (certFile, keyFile string, pool *x509.CertPool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		// The server is a client of its own, too: its gateway.
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IsCA:        true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyBytes, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, block string, content []byte) string {
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: block, Bytes: content}), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	parsed, err := x509.ParseCertificate(cert)
	if err != nil {
		t.Fatal(err)
	}
	pool = x509.NewCertPool()
	pool.AddCert(parsed)
	return write("cert.pem", "CERTIFICATE", cert), write("key.pem", "PRIVATE KEY", keyBytes), pool
}

// fakeStrategy asks a fake etcd, whose key holds the value one.
func fakeStrategy(t *testing.T, key string, answer *clientv3.GetResponse) (*Strategy, *fakeEtcd) {
	e := &fakeEtcd{answer: answer}
	s := New(clientv3.NewCtxClient(t.Context()))
	s.kv, s.newWatcher = e, func() clientv3.Watcher { return fakeWatcher{fake: e} }
	return s, e
}

// answers returns what a real server answers when a key has held the values, one after another.
func answers(t *testing.T, key string, values ...string) (answers []*clientv3.GetResponse) {
	c := newCluster(t, 1, nil, nil)
	for _, v := range values {
		c.put(key, v)
		answer, err := c.client.Get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		answers = append(answers, answer)
	}
	return answers
}

// TestEndsWhileAway holds that a watch that ends while the server is away leaves nothing, also in the
// client, although that goes on to look for the server.
func TestEndsWhileAway(t *testing.T) {
	c := newCluster(t, 1, nil, nil)
	ours := newFront(t)
	ours.lead(c.members[0].server.Clients[0].Addr().String())
	key := newKey()
	c.put(key, "one")
	f := follow(t, New(newClient(t, clientv3.Config{Endpoints: []string{ours.addr()}})), key, "one")
	c.put(key, "two")
	f.expect("two")
	// The client's goroutine for a stream is in one of these.
	is := func(function string) bool {
		stacks := make([]byte, 1<<20)
		return strings.Contains(string(stacks[:runtime.Stack(stacks, true)]), "(*watchGRPCStream)."+function+"(")
	}
	ours.cut()
	eventually(t, "the client to look for the server", func() bool { return is("openWatchClient") })
	f.end()
	eventually(t, "the stream to end", func() bool { return !is("run") })
}

// TestEndsWhileTelling holds that a watch that ends amid many events leaves nothing: the bubble
// would not end.
func TestEndsWhileTelling(t *testing.T) {
	key := newKey()
	at := answers(t, key, "one", "two")
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			s, e := fakeStrategy(t, key, at[0])
			f := follow(t, s, key, "one")
			synctest.Wait()
			var events []*clientv3.Event
			for i := range int64(1000) {
				kv := another(at[1].Kvs[0])
				kv.Value, kv.ModRevision = at[1].Kvs[0].Value, at[1].Header.Revision+i
				events = append(events, &clientv3.Event{Type: clientv3.EventTypePut, Kv: kv})
			}
			e.watching <- clientv3.WatchResponse{Events: events}
			f.expect("two") // the first of them
			f.end()
		})
	}
}

// another makes one of a type whose package this module has no other use for.
func another[T any](*T) *T { return new(T) }

// TestBackOff holds that a cluster that fails is asked less and less often, up to every 15 seconds,
// and as often as at first when a watch has begun again. It is the same whether it answers no
// reads, ends each watch, or does not say that a watch has begun.
func TestBackOff(t *testing.T) {
	key := newKey()
	answer := answers(t, key, "one")[0]
	t.Run("S-29/backs off while its source fails", func(t *testing.T) {
		for _, failure := range []failure{readsFail, watchesEnd, watchesHang} {
			synctest.Test(t, func(t *testing.T) {
				s, e := fakeStrategy(t, key, answer)
				if _, _, err := s.Watch(t.Context(), key, nil); err != nil {
					t.Fatal(err)
				}
				for range 2 {
					synctest.Wait()
					e.fail(failure)
					time.Sleep(5 * time.Minute)
					waits := e.fail(works)
					for i, want := 0, firstWait; i < len(waits); i, want = i+1, min(2*want, lastWait) {
						have := waits[i]
						if failure == watchesHang && i > 0 {
							have -= patience // for which a watch was waited for
						}
						if have < want/2 || have > want {
							t.Errorf("failure %d: attempt %d came after %v, want %v to %v", failure, i+1, have, want/2, want)
						}
					}
					if n := len(waits); n < 15 || n > 50 {
						t.Errorf("failure %d: asked %d times in five minutes, want 15 to 50", failure, n)
					} else if waits[n-1] == waits[n-2] && waits[n-2] == waits[n-3] {
						t.Errorf("failure %d: the waits are not random: %v", failure, waits[n-3:])
					}
					time.Sleep(lastWait + patience)
					synctest.Wait()
					if !e.watched() {
						t.Errorf("failure %d: no watch, though the failure has ended", failure)
					}
				}
			})
		}
	})
}

// TestReadAgain holds that a watch that hears nothing is left alone for 30 seconds, and that the key
// is read again within 90.
func TestReadAgain(t *testing.T) {
	key := newKey()
	answer := answers(t, key, "one")[0]
	synctest.Test(t, func(t *testing.T) {
		s, e := fakeStrategy(t, key, answer)
		follow(t, s, key, "one")
		e.fail(works) // forgets the first read
		time.Sleep(30*time.Second - 1)
		if waits := e.fail(works); len(waits) > 0 {
			t.Errorf("the key was read again after %v", waits)
		}
		time.Sleep(time.Minute + 1)
		if waits := e.fail(works); len(waits) != 1 && len(waits) != 2 {
			t.Errorf("the key was read again %d times in 90 seconds, want 1 or 2", len(waits))
		}
	})
}

// TestOrder holds that an event that a read has overtaken is not told after it.
func TestOrder(t *testing.T) {
	key := newKey()
	at := answers(t, key, "one", "two", "three", "four")
	synctest.Test(t, func(t *testing.T) {
		s, e := fakeStrategy(t, key, at[0])
		s.quiet = time.Second
		f := follow(t, s, key, "one")
		synctest.Wait()
		e.mu.Lock()
		e.answer = at[2]
		e.mu.Unlock()
		f.expect("three") // read after a quiet time
		for _, late := range at[1:] {
			e.watching <- clientv3.WatchResponse{Events: []*clientv3.Event{{Type: clientv3.EventTypePut, Kv: late.Kvs[0]}}}
		}
		f.expect("four")
	})
}

// A fakeEtcd answers in no time, or fails.
type fakeEtcd struct {
	clientv3.KV

	mu       sync.Mutex
	answer   *clientv3.GetResponse
	failure  failure
	last     time.Time                   // it was asked, or a failure began
	waits    []time.Duration             // until it was asked again
	watching chan clientv3.WatchResponse // nil without a watch
}

type failure int

const (
	works failure = iota
	readsFail
	watchesEnd
	watchesHang
)

func (e *fakeEtcd) Get(context.Context, string, ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.waits = append(e.waits, time.Since(e.last))
	e.last = time.Now()
	if e.failure == readsFail {
		return nil, errors.New("unavailable")
	}
	return e.answer, nil
}

// fail ends the watch if there is one, and lets what follows fail in that way, or work. It returns
// the times until it was asked, since it was called before.
func (e *fakeEtcd) fail(f failure) (waits []time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	waits = e.waits
	e.failure, e.last, e.waits = f, time.Now(), nil
	if f != works && e.watching != nil {
		e.watching <- clientv3.WatchResponse{Canceled: true, CancelReason: "etcdserver: no leader"}
		close(e.watching)
		e.watching = nil
	}
	return waits
}

func (e *fakeEtcd) watched() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.watching != nil
}

type fakeWatcher struct {
	clientv3.Watcher
	fake *fakeEtcd
}

func (w fakeWatcher) Watch(context.Context, string, ...clientv3.OpOption) clientv3.WatchChan {
	w.fake.mu.Lock()
	defer w.fake.mu.Unlock()
	responses := make(chan clientv3.WatchResponse, 10)
	switch w.fake.failure {
	case works:
		responses <- clientv3.WatchResponse{Created: true}
		w.fake.watching = responses
	case watchesEnd:
		close(responses)
	}
	return clientv3.WatchChan(responses)
}

func (fakeWatcher) Close() error { return nil }
