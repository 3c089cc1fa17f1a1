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
	if badPoll != nil || badURL != nil || poll <= 0 || len(options) != 1 || len(options["poll"]) != 1 {
		return "", nil, fmt.Errorf("httppoll: the path %s or its options are wrong, want host/path?poll=10s", pth)
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
	if err != nil {
		return "", fmt.Errorf("httppoll: %v", err) // %v and not %w: S-32
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotModified {
		return last, nil
	}
	body, err := io.ReadAll(resp.Body)
	value := strings.TrimSpace(string(body))
	switch {
	case err != nil:
		return "", fmt.Errorf("httppoll: %s: %v", req.URL.Redacted(), err)
	case resp.StatusCode != http.StatusOK || value == "":
		return "", fmt.Errorf("httppoll: %s: %s, %d bytes, want 200 and a connection string", req.URL.Redacted(), resp.Status, len(body))
	}
	req.Header.Set("If-None-Match", resp.Header.Get("ETag"))
	return value, nil
}
