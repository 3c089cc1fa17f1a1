package etcd_test

import (
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"log"
	"os"
	"time"

	"github.com/infobloxopen/hotload"
	"github.com/infobloxopen/hotload/example/etcd"
	"github.com/lib/pq"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A program with a client for TLS and a user. The password is the one for etcd; the one for the
// database is in the value.
func ExampleNew() {
	ca, err := os.ReadFile("/etc/orders/etcd-ca.pem")
	if err != nil {
		log.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		log.Fatal("/etc/orders/etcd-ca.pem holds no certificate")
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            []string{"https://etcd1:2379", "https://etcd2:2379", "https://etcd3:2379"},
		TLS:                  &tls.Config{RootCAs: roots},
		Username:             "orders",
		Password:             os.Getenv("ETCD_PASSWORD"),
		DialTimeout:          10 * time.Second, // with a user New logs in, and else waits for ever
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close() // after the pools

	hotload.RegisterStrategy("etcd", etcd.New(client))
	hotload.Register("postgres", pq.Driver{})
	db, err := sql.Open("hotload", "etcd://postgres/services/orders/dsn")
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()
}
