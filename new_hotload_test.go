package hotload_test

import (
	"database/sql"
	"database/sql/driver"
	"strings"
	"testing"
)

// An option that differs from one of hotload's own only in case is refused when
// the data source name is read, as it could only be a mistake that leaves the
// option off. It names the right one, and quotes no value.
func TestNearMisses(t *testing.T) {
	dsn := register(newFake(t), newSource("1"))
	for _, row := range []struct {
		options string
		suggest string // empty if the option is the strategy's
	}{
		{"forcekill=true", "forceKill"},
		{"ForceKill=true", "forceKill"},
		{"FORCEKILL=30s", "forceKill"},
		{"forcekilL=canary", "forceKill"},
		{"forcekill", "forceKill"},
		{"force%6Bill=true", "forceKill"},
		{"forceKill=true&forcekill=true", "forceKill"},
		{"poll=1s&forcekill=true", "forceKill"},
		{"Probe=true", "probe"},
		{"PROBE=false", "probe"},
		{"probE=canary", "probe"},
		{"probe=true&Probe=true", "probe"},
		{"forceKill=true&pRobe=true", "probe"},
		{options: "poll=1s"},
		{options: "Poll=1s"},
		{options: "force=true"},
		{options: "forceKills=true"},
		{options: "force-kill=true"},
		{options: "forcekill2=true"},
		{options: "kill=true"},
		{options: "probes=true"},
		{options: "prob=true"},
		{options: "xprobe=true"},
		{options: "key=forcekill&other=Probe"},
		{options: "forceKill=true&probe=true"},
	} {
		t.Run(row.options, func(t *testing.T) {
			db, err := sql.Open("hotload", dsn+"?"+row.options)
			if row.suggest == "" {
				must(t, "sql.Open", err)
				db.Close()
				return
			}
			if err == nil {
				db.Close()
				t.Fatalf("sql.Open accepts an option that differs from %s only in case", row.suggest)
			}
			if text := err.Error(); !strings.HasPrefix(text, "hotload: ") || !strings.Contains(text, row.suggest) || strings.Contains(text, "canary") {
				t.Errorf("sql.Open: have error %q, want hotload's, with %s and without a value", text, row.suggest)
			}
		})
	}
}

// DB.Driver is hotload's driver, not the one behind it: a library that wraps
// what it finds there wraps hotload, and keeps its promises.
func TestDriverIsHotloads(t *testing.T) {
	f, src := newFake(t), newSource("1")
	dsn := register(ctxFake{f}, src)
	db, err := sql.Open("hotload", dsn)
	must(t, "sql.Open", err)
	defer db.Close()
	want(t, "value", ask(t, db), "1")
	d := db.Driver()
	switch d.(type) {
	case *fake, ctxFake:
		t.Fatalf("DB.Driver is the driver behind hotload")
	}
	opener, ok := d.(driver.DriverContext)
	if !ok {
		t.Fatalf("DB.Driver, a %T, has no OpenConnector", d)
	}
	if _, err := opener.OpenConnector(dsn + "?forceKill=nonsense"); err == nil {
		t.Error("OpenConnector reads no data source names of hotload's")
	}
	connector, err := opener.OpenConnector(dsn)
	must(t, "OpenConnector", err)
	want(t, "driver of the connector", connector.Driver(), d)
	other := sql.OpenDB(connector)
	want(t, "driver of the pool on it", other.Driver(), d)
	want(t, "value of the pool on it", ask(t, other), "1")
	await(t, "both pools are on the next value", func() bool {
		select {
		case src.values <- "2":
		default:
		}
		return ask(t, db) == "2" && ask(t, other) == "2"
	})
	must(t, "DB.Close", other.Close())
	want(t, "watches", src.watches.Load(), 2)
	empty, err := sql.Open("hotload", "")
	must(t, "sql.Open of an empty name", err)
	defer empty.Close()
	want(t, "driver of an empty name", empty.Driver(), d)
}
