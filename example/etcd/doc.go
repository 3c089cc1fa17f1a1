// Package etcd is a strategy for hotload that follows a key of etcd, so that a fleet of programs
// changes its connection string at the same time. A program makes the client, and registers the
// strategy under the name that its data source names are to begin with:
//
//	hotload.RegisterStrategy("etcd", etcd.New(client))
//	...
//	db, err := sql.Open("hotload", "etcd://postgres/services/orders/dsn")
//
// The path is the key, byte for byte and with its leading slash: here the key is
// /services/orders/dsn, and whoever rotates the password says
//
//	etcdctl put /services/orders/dsn 'host=db user=app_2 password=...'
//
// There are no options. The value is what the key holds, less surrounding white space. While the
// key does not exist or is blank, the last value stays in force.
//
// # The client
//
// One client serves all watches. The program closes it, after it has closed the pools. If it is
// closed before, the pools stay on their last value, and hotload logs "watch lost".
//
// Set DialKeepAliveTime and DialKeepAliveTimeout: without them a connection that has died without a
// word (a host that froze, a firewall that forgot it) is given up late or never. The example of New
// has a client with TLS and a user. The user needs permission to read the key and nothing else.
//
// With a password, each watch logs in to etcd when it begins, because etcd checks a watch by the
// token that its stream began with, and tokens expire. A login keeps the server busy for some 50 ms.
// A large fleet is better off with client certificates (etcd --client-cert-auth) and no password.
//
// A namespace that is put around the client's KV and Watcher has no effect: the path is the whole key.
//
// etcd keeps superseded values until they are compacted, and stores them as they are. Whoever may
// read the key can read old passwords too.
//
// # When something is wrong
//
// The first read of a pool fails with an error that names the key. Later the last value stays in
// force, whatever happens. A warning is logged for each reason, "hotload: key unusable, keeping
// the last value", with strategy, path and error; and then "hotload: key usable again". Neither has
// the value, a password or the name of a user. etcd is asked again after 50 ms, and then less and less
// often, up to every 15 s, at random times so that the pools of a fleet do not all ask at once.
//
//   - The key may not be read: the error is etcd's, "etcdserver: permission denied". If the permission
//     is taken away later, that is noticed when the key is read again.
//   - A compaction overtakes the watch, because the connection was broken for a while: the key is read
//     again, and followed from there. Values in between are left out.
//   - The leader is lost: etcd ends the watch, because it was asked to (clientv3.WithRequireLeader),
//     and a read waits for a leader. When there is one, the key is read and followed again. So a
//     member that is cut off from the others does not keep a pool on an old value.
//   - etcd is stopped and started: the client connects again and misses no change. It tries after a
//     second, and then less and less often, up to every two minutes. These are gRPC's limits; to
//     change them, put grpc.WithConnectParams into the client's DialOptions.
//   - The cluster is restored from an old backup: its revisions begin again where the backup ended,
//     and etcd would announce nothing to a watch from a later revision until it has got there. So the
//     key is read again when nothing was announced for a minute (for 30 to 90 seconds, at random).
//     What the backup holds is then put in force.
//
// Reads are linearizable: a pool that opens after a put was acknowledged begins with that value.
package etcd
