// Package httppoll is a strategy that polls a URL: "https://postgres/example.com/dsn?poll=10s".
package httppoll

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

type Strategy struct{ Client *http.Client } // with a Timeout: a server that hangs has failed

func (s Strategy) Watch(ctx context.Context, pth string, options url.Values) (value string, _ <-chan string, err error) {
	poll, badPoll := time.ParseDuration(options.Get("poll"))
	req, badURL := http.NewRequestWithContext(ctx, http.MethodGet, "https:/"+pth, nil)
	if badPoll != nil || badURL != nil || poll <= 0 || len(options) != 1 {
		return "", nil, fmt.Errorf("httppoll: https:/%s?%s, want a URL with ?poll=10s", pth, options.Encode())
	}
	if value, err = s.get(req, ""); err != nil {
		return "", nil, err
	}
	values := make(chan string)
	go func() {
		defer close(values)
		for last, wait, out := value, poll, (chan string)(nil); ctx.Err() == nil; {
			select { // out is values while last is to be delivered, else nil
			case <-ctx.Done():
			case out <- last:
				out = nil
			case <-time.After(wait):
				if next, err := s.get(req, last); err != nil {
					wait = min(2*wait, poll+time.Minute) // and last stays in force
				} else if wait = poll; next != last {
					last, out = next, values
				}
			}
		}
	}()
	return value, values, nil
}

func (s Strategy) get(req *http.Request, last string) (string, error) {
	resp, err := s.Client.Do(req)
	if err != nil { // not wrapped, here and below: S-32
		return "", fmt.Errorf("httppoll: %v", err)
	} else if resp.StatusCode == http.StatusNotModified { // which has no body
		return last, nil
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if value := strings.TrimSpace(string(body)); err == nil && resp.StatusCode == http.StatusOK && value != "" {
		req.Header.Set("If-None-Match", resp.Header.Get("ETag"))
		return value, nil
	} else if err == nil {
		err = fmt.Errorf("%s, %d bytes, want 200 and a connection string", resp.Status, len(body))
	}
	return "", fmt.Errorf("httppoll: %s: %v", req.URL, err)
}
