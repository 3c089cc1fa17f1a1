package hotload_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"log"

	"github.com/infobloxopen/hotload"
	_ "github.com/infobloxopen/hotload/fsnotify"
	"github.com/lib/pq"
)

func init() { hotload.Register("postgres", pq.Driver{}) }

// The connection string is the content of /tmp/myconfig.txt, for example
// "user=pqgotest dbname=pqgotest sslmode=verify-full". When the file changes,
// the pool goes on with the new one, and what is in use finishes on the old.
func Example() {
	db, err := sql.Open("hotload", "fsnotify://postgres/tmp/myconfig.txt")
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()

	var user string
	if err := db.QueryRow("select current_user").Scan(&user); err != nil {
		log.Fatal(err)
	}
	log.Printf("connected as %s", user)
}

// A new value is put in force once a connection has been opened with it and pinged.
// Until then the pool goes on with the last good one: a mistake in a rotation is
// logged, and changes nothing.
func Example_probe() {
	db, err := sql.Open("hotload", "fsnotify://postgres/tmp/myconfig.txt?probe=true")
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()

	var user string
	if err := db.QueryRow("select current_user").Scan(&user); err != nil {
		log.Fatal(err)
	}
	log.Printf("connected as %s", user)
}

// What is still in use 30 seconds after a change is ended then. Its error
// matches ErrKilled: it may have taken effect on the old server.
func Example_forceKill() {
	db, err := sql.Open("hotload", "fsnotify://postgres/tmp/myconfig.txt?forceKill=30s")
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()

	_, err = db.Exec("insert into report select * from expensive")
	if errors.Is(err, hotload.ErrKilled) {
		log.Print("the report did not finish in time; look whether it is there before running it again")
	}
}

// The driver's own connection has what database/sql has not, such as lib/pq's
// notice handler.
func Example_raw() {
	db, err := sql.Open("hotload", "fsnotify://postgres/tmp/myconfig.txt")
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()

	ctx := context.Background()
	conn, err := db.Conn(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	err = conn.Raw(func(driverConn any) error {
		c := driverConn.(interface{ Raw() driver.Conn }).Raw()
		if c == nil {
			return errors.New("no connection")
		}
		pq.SetNoticeHandler(c, func(notice *pq.Error) { log.Print(notice.Message) })
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	// conn is in use now, and stays on this connection until it is closed.
	if _, err := conn.ExecContext(ctx, "do $$ begin raise notice 'hello'; end $$"); err != nil {
		log.Fatal(err)
	}
}

// Errors of sql.Open say what is wrong with the data source name and what
// would be right.
func Example_errors() {
	for _, dsn := range []string{
		"fsnotify://postgres/tmp/myconfig.txt?forceKill=yes",
		"fsnotify://me:secret@postgres/tmp/myconfig.txt",
	} {
		_, err := sql.Open("hotload", dsn)
		fmt.Println(err)
	}
	// Output:
	// hotload: option forceKill: want true, false or a positive duration such as 30s
	// hotload: the data source name has user information, which belongs in the connection string that the strategy delivers: want strategy://driver/path?options
}
