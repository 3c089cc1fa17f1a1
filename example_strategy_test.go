package hotload_test

import (
	"context"
	"database/sql"
	"fmt"
	"log"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/infobloxopen/hotload"
)

// env is a strategy that reads an environment variable every second. What else a strategy
// has to do is in https://github.com/infobloxopen/hotload/blob/main/SPEC.md.
type env struct{}

func (env) Watch(ctx context.Context, pth string, options url.Values) (string, <-chan string, error) {
	name := strings.TrimPrefix(pth, "/")
	if len(options) != 0 {
		return "", nil, fmt.Errorf("env: options are given for %s: want none", name)
	}
	value := strings.TrimSpace(os.Getenv(name))
	if value == "" {
		return "", nil, fmt.Errorf("env: the environment variable %s is blank: want a connection string", name)
	}
	values := make(chan string)
	go func() {
		defer close(values)
		for tick := time.Tick(time.Second); ; {
			select {
			case <-tick:
			case <-ctx.Done():
				return
			}
			next := strings.TrimSpace(os.Getenv(name))
			if next == "" || next == value {
				continue
			}
			value = next
			select {
			case values <- value:
			case <-ctx.Done():
				return
			}
		}
	}()
	return value, values, nil
}

// A strategy of one's own. Without a first value its error is the operation's,
// and the next operation tries again.
func ExampleRegisterStrategy() {
	hotload.RegisterStrategy("env", env{})

	db, err := sql.Open("hotload", "env://postgres/DATABASE_DSN")
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()

	fmt.Println(db.Ping())
	// Output: env: the environment variable DATABASE_DSN is blank: want a connection string
}
