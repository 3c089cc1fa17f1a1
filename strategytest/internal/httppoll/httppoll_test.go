package httppoll_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/infobloxopen/hotload/strategytest"
	"github.com/infobloxopen/hotload/strategytest/internal/httppoll"
)

func TestStrategy(t *testing.T) {
	strategytest.Run(t, func(t *testing.T) strategytest.Subject {
		var e, other endpoint
		other.set("", http.StatusNotFound)
		paths := http.NewServeMux()
		paths.Handle("/dsn", &e)
		paths.Handle("/dsn.old", &other)
		server := httptest.NewUnstartedServer(paths)
		server.Config.ErrorLog = log.New(io.Discard, "", 0) // of requests whose context ended
		server.StartTLS()
		t.Cleanup(server.Close)
		t.Cleanup(func() { e.set("", http.StatusServiceUnavailable) }) // ends a stall
		return strategytest.Subject{
			Strategy: httppoll.Strategy{Client: server.Client()},
			Path:     strings.TrimPrefix(server.URL, "https:/") + "/dsn",
			Options:  url.Values{"poll": {"10ms"}},
			Set:      func(value string) error { return e.set(value, http.StatusOK) },
			Remove:   func() error { return e.set("", http.StatusNotFound) },
			Stall:    func() error { return e.set("", 0) },

			OtherPath: strings.TrimPrefix(server.URL, "https:/") + "/dsn.old",
			SetOther:  func(value string) error { return other.set(value, http.StatusOK) },
		}
	})
}

// TestBackOff holds that the strategy asks a failing server less and less often, at the latest a
// minute later than usual, and as often as before once it answers. It asks with the last ETag.
func TestBackOff(t *testing.T) {
	t.Run("S-29/backs off while its source fails", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var e endpoint
			e.set("one", http.StatusOK)
			client := &http.Client{Transport: &e}
			_, values, err := httppoll.Strategy{Client: client}.Watch(t.Context(), "/example.com/dsn", url.Values{"poll": {"10s"}})
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			time.Sleep(15 * time.Second)
			e.set("", http.StatusInternalServerError)
			time.Sleep(5 * time.Minute)
			e.set("two", http.StatusOK)
			if got := <-values; got != "two" {
				t.Errorf("want the value two after the failure, have %q", got)
			}
			time.Sleep(25 * time.Second)

			synctest.Wait()
			e.mu.Lock()
			defer e.mu.Unlock()
			var have []string
			for _, r := range e.asked[1:] {
				have = append(have, fmt.Sprintf("%v:%d", r.at.Sub(began), r.status))
			}
			want := "10s:304 20s:500 40s:500 1m20s:500 2m30s:500 3m40s:500 4m50s:500 6m0s:200 6m10s:304 6m20s:304"
			if got := strings.Join(have, " "); got != want {
				t.Errorf("asked at\nwant %s\nhave %s", want, got)
			}
		})
	})
}

// TestErrors holds what an operator reads about a server that has no value.
func TestErrors(t *testing.T) {
	for _, tt := range []struct {
		name   string
		status int
		body   io.Reader
		want   string
	}{
		{"not found", http.StatusNotFound, strings.NewReader("not here\n"),
			"httppoll: https://example.com/dsn: 404 Not Found, 9 bytes, want 200 and a connection string"},
		{"blank", http.StatusOK, strings.NewReader(" \n"),
			"httppoll: https://example.com/dsn: 200 OK, 2 bytes, want 200 and a connection string"},
		{"broken off", http.StatusOK, io.MultiReader(strings.NewReader("user="), iotest.ErrReader(io.ErrUnexpectedEOF)),
			"httppoll: https://example.com/dsn: unexpected EOF"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client := &http.Client{Transport: roundTrip(func(*http.Request) (*http.Response, error) {
				status := fmt.Sprintf("%d %s", tt.status, http.StatusText(tt.status))
				return &http.Response{Status: status, StatusCode: tt.status, Body: io.NopCloser(tt.body)}, nil
			})}
			_, _, err := httppoll.Strategy{Client: client}.Watch(t.Context(), "/example.com/dsn", url.Values{"poll": {"10s"}})
			if err == nil || err.Error() != tt.want {
				t.Errorf("want %s\nhave %v", tt.want, err)
			}
		})
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// An endpoint serves a value with its ETag, over the network or as a http.RoundTripper.
type endpoint struct {
	mu      sync.Mutex
	value   string
	status  int           // 0: no answer
	changed chan struct{} // closed when value or status change
	asked   []struct {
		at     time.Time
		status int
	}
}

func (e *endpoint) set(value string, status int) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.value, e.status = value, status
	if e.changed != nil {
		close(e.changed)
	}
	e.changed = make(chan struct{})
	return nil
}

func (e *endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	value, status, changed := e.value, e.status, e.changed
	e.mu.Unlock()
	if status == 0 {
		select {
		case <-changed:
		case <-r.Context().Done():
		}
		return
	}
	etag := fmt.Sprintf(`"%x"`, sha256.Sum256([]byte(value)))
	if status == http.StatusOK && r.Header.Get("If-None-Match") == etag {
		status = http.StatusNotModified
	}
	w.Header().Set("ETag", etag)
	w.WriteHeader(status)
	if status == http.StatusOK {
		io.WriteString(w, value+"\n")
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked = append(e.asked, struct {
		at     time.Time
		status int
	}{time.Now(), status})
}

func (e *endpoint) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.String() != "https://example.com/dsn" {
		return nil, errors.New("no such URL")
	}
	w := httptest.NewRecorder()
	e.ServeHTTP(w, r)
	return w.Result(), nil
}
