package fsnotify_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/infobloxopen/hotload/fsnotify"
)

// A strategy can be used by itself. Programs that use hotload import the package
// and leave this to it.
func ExampleNewStrategy() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "myconfig.txt")
	put := func(content string) {
		if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
			log.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			log.Fatal(err)
		}
	}
	put("user=blue sslmode=verify-full\n")

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	value, values, err := fsnotify.NewStrategy().Watch(ctx, filepath.ToSlash(path), nil)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(value)

	put("user=green sslmode=verify-full\n")
	fmt.Println(<-values)
	// Output:
	// user=blue sslmode=verify-full
	// user=green sslmode=verify-full
}
