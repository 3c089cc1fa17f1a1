package hotload_test

import (
	"bufio"
	"bytes"
	"database/sql"
	"database/sql/driver"
	"errors"
	"expvar"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"text/template"

	"github.com/infobloxopen/hotload"
	"github.com/infobloxopen/hotload/internal/pgserver"
	"github.com/lib/pq"
)

// blocks returns the code blocks of a document that are in a language.
func blocks(t *testing.T, document, language string) []string {
	t.Helper()
	text, err := os.ReadFile(document)
	must(t, "read", err)
	var found []string
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllSubmatch(text, -1) {
		found = append(found, string(m[1]))
	}
	if len(found) == 0 {
		t.Fatalf("%s has no block of %s", document, language)
	}
	return found
}

// find returns the only block that contains text.
func find(t *testing.T, blocks []string, text string) string {
	t.Helper()
	blocks = slices.DeleteFunc(blocks, func(b string) bool { return !strings.Contains(b, text) })
	if len(blocks) != 1 {
		t.Fatalf("%d blocks contain %q, want 1", len(blocks), text)
	}
	return blocks[0]
}

// replaceFile puts a file in place by rename.
func replaceFile(t *testing.T, path, content string) {
	t.Helper()
	must(t, "write", os.WriteFile(path+".new", []byte(content), 0o600))
	must(t, "rename", os.Rename(path+".new", path))
}

// fileName is the data source name for a driver and a file.
func fileName(driverName, path string) string {
	return "fsnotify://" + driverName + "/" + strings.TrimPrefix(filepath.ToSlash(path), "/")
}

// TestReadme runs the README's program on a server with the README's users, and makes the
// README's edit.
func TestReadme(t *testing.T) {
	server := pgserver.ForTest(t, pgserver.Options{Name: "readme"})
	shell := find(t, blocks(t, "README.md", "sh"), "psql")
	super, err := sql.Open("postgres", server.SuperDSN())
	must(t, "open", err)
	defer super.Close()
	statements := regexp.MustCompile(`-c "([^"]*)"`).FindAllStringSubmatch(shell, -1)
	want(t, "statements", len(statements), 2)
	for _, s := range statements {
		_, err := super.Exec(s[1])
		must(t, s[1], err)
	}

	dir := t.TempDir()
	file := filepath.Join(dir, "myconfig.txt")
	value := regexp.MustCompile(`echo "(.*)" > /tmp/myconfig.txt`).FindStringSubmatch(shell)[1]
	edited := strings.Replace(value, "user=app_1 password=one", "user=app_2 password=two", 1)
	readme, err := os.ReadFile("README.md")
	must(t, "read", err)
	if edited == value || !strings.Contains(string(readme), "make it `user=app_2 password=two`") {
		t.Fatal("the README's edit is another")
	}
	here := fmt.Sprintf(" host=127.0.0.1 port=%d", server.Port()) // lib/pq takes the last
	must(t, "write", os.WriteFile(file, []byte(value+here), 0o600))

	program := find(t, blocks(t, "README.md", "go"), "package main")
	url := fileName("postgres", file)
	if strings.Count(program, "fsnotify://postgres/tmp/myconfig.txt") != 1 {
		t.Fatal("the README's program opens something else")
	}
	program = strings.Replace(program, "fsnotify://postgres/tmp/myconfig.txt", url, 1)
	source, binary := filepath.Join(dir, "main.go"), filepath.Join(dir, "hello.exe")
	must(t, "write", os.WriteFile(source, []byte(program), 0o600))
	if out, err := exec.Command("go", "build", "-o", binary, source).CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	cmd := exec.Command(binary)
	r, w, err := os.Pipe()
	must(t, "pipe", err)
	defer r.Close()
	cmd.Stdout, cmd.Stderr = w, w
	must(t, "start", cmd.Start())
	w.Close()
	defer cmd.Wait()
	defer cmd.Process.Kill()
	lines := make(chan string)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(r); s.Scan(); {
			select {
			case lines <- s.Text():
			case <-t.Context().Done():
			}
		}
	}()
	shown := regexp.MustCompile("INFO hotload: value accepted |INFO hotload: generation drained |connected as app_[12]$")
	for _, user := range []string{"app_1", "app_2"} {
		for line := ""; !strings.HasSuffix(line, "connected as "+user); {
			if line = receive(t, user, lines); !shown.MatchString(line) {
				t.Fatalf("the program says %q, which the README does not show", line)
			}
		}
		replaceFile(t, file, edited+here)
	}
}

// TestRecipesAreCompiled: each block of Go in the recipes stands, but for its indentation, in
// a file that is compiled.
func TestRecipesAreCompiled(t *testing.T) {
	flat := func(code string) string {
		lines := strings.Split(strings.TrimSpace(code), "\n")
		for i, line := range lines {
			lines[i] = strings.TrimSpace(line)
		}
		return "\n" + strings.Join(lines, "\n") + "\n"
	}
	var compiled string
	for _, pattern := range []string{"example*_test.go", "docs/recipes/example*_test.go"} {
		files, err := filepath.Glob(pattern)
		must(t, "glob", err)
		for _, file := range files {
			text, err := os.ReadFile(file)
			must(t, "read", err)
			compiled += flat(string(text))
		}
	}
	for _, block := range blocks(t, "docs/recipes.md", "go") {
		if !strings.Contains(compiled, flat(block)) {
			t.Errorf("in no example:\n%s", block)
		}
	}
}

// TestScript runs the recipe for a script.
func TestScript(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("the script is one for a Unix shell")
	}
	dir := t.TempDir()
	script := strings.ReplaceAll(find(t, blocks(t, "docs/recipes.md", "sh"), "umask"), "/etc/app", dir)
	value := `user=app password='a "b" $c \n 100%'`
	cmd := exec.Command("sh", "-euc", script)
	cmd.Env = append(os.Environ(), "dsn="+value)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	content, err := os.ReadFile(filepath.Join(dir, "dsn"))
	must(t, "read", err)
	want(t, "content", string(content), value)
	info, err := os.Stat(filepath.Join(dir, "dsn"))
	must(t, "stat", err)
	want(t, "mode", info.Mode().Perm(), 0o600)
	entries, err := os.ReadDir(dir)
	must(t, "read", err)
	want(t, "files", len(entries), 1)
}

// TestVaultTemplate renders the recipe for Vault agent, whose templates are text/template's
// with some functions more, and has lib/pq read what comes out.
func TestVaultTemplate(t *testing.T) {
	_, text, _ := strings.Cut(find(t, blocks(t, "docs/recipes.md", "hcl"), "template"), "<<EOT\n")
	text, _, ok := strings.Cut(text, "EOT\n")
	if !ok {
		t.Fatal("the recipe has no heredoc")
	}
	const password = `it's \ 'so' "x"=%s`
	tmpl, err := template.New("").Funcs(template.FuncMap{
		"replaceAll": func(from, to, s string) string { return strings.ReplaceAll(s, from, to) },
		"secret": func(string) any {
			return map[string]any{"Data": map[string]string{"username": "app", "password": password}}
		},
	}).Parse(text)
	must(t, "parse", err)
	var out bytes.Buffer
	must(t, "execute", tmpl.Execute(&out, nil))
	cfg, err := pq.NewConfig(out.String())
	must(t, "lib/pq", err)
	want(t, "user", cfg.User, "app")
	want(t, "password", cfg.Password, password)
	want(t, "database", cfg.Database, "app")
}

// TestRecipes runs the examples that wrap lib/pq's driver.
func TestRecipes(t *testing.T) {
	server := pgserver.ForTest(t, pgserver.Options{Name: "recipes", Users: pgUsers})
	follow := func(t *testing.T, d driver.Driver, file string, change func()) *sql.DB {
		t.Helper()
		name := fmt.Sprintf("recipe%d", names.Add(1))
		hotload.Register(name, d)
		db, err := sql.Open("hotload", fileName(name, file)+"?probe=true")
		must(t, "open", err)
		t.Cleanup(func() { db.Close() })
		var user string
		must(t, "query", db.QueryRow("select current_user").Scan(&user))
		want(t, "user", user, "old")
		change()
		await(t, "the new user", func() bool {
			must(t, "query", db.QueryRow("select current_user").Scan(&user))
			return user == "new"
		})
		return db
	}

	t.Run("secret", func(t *testing.T) {
		t.Setenv("PGSSLMODE", "disable")
		file := filepath.Join(t.TempDir(), "db.json")
		secret := func(user string) string {
			return fmt.Sprintf(`{"engine":"postgres","host":"127.0.0.1","port":%d,"username":%q,"password":%q,"dbname":"postgres"}`,
				server.Port(), user, pgUsers[user])
		}
		replaceFile(t, file, secret("old"))
		follow(t, secretDriver{}, file, func() { replaceFile(t, file, secret("new")) })
		for _, bad := range []string{"", "{", "{}", "null", `{"host":"db"}`, `{"host":"db","port":"x","username":"u"}`} {
			if _, err := (secretDriver{}).OpenConnector(bad); err == nil {
				t.Errorf("%q is not refused", bad)
			}
		}
	})

	t.Run("keys", func(t *testing.T) {
		// As Kubernetes lays out a Secret: the keys are links through ..data, which is replaced.
		dir := t.TempDir()
		lay := func(user string) {
			to := filepath.Join(dir, ".."+user)
			must(t, "mkdir", os.Mkdir(to, 0o700))
			must(t, "write", os.WriteFile(filepath.Join(to, "username"), []byte(user), 0o600))
			must(t, "write", os.WriteFile(filepath.Join(to, "password"), []byte(pgUsers[user]), 0o600))
			must(t, "link", os.Symlink(".."+user, filepath.Join(dir, "..data_tmp")))
			must(t, "rename", os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
		}
		lay("old")
		for _, key := range []string{"username", "password"} {
			must(t, "link", os.Symlink(filepath.Join("..data", key), filepath.Join(dir, key)))
		}
		d := keysDriver{dir: dir, server: fmt.Sprintf("host=127.0.0.1 port=%d dbname=postgres sslmode=disable", server.Port())}
		follow(t, d, filepath.Join(dir, "password"), func() { lay("new") })
	})

	t.Run("checked", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "dsn")
		replaceFile(t, file, server.DSN("old", pgUsers["old"]))
		log := collect(t)
		follow(t, checkedDriver{}, file, func() {
			replaceFile(t, file, "user='unfinished")
			await(t, "a refusal", func() bool { return log.count("value refused", "reason=driver") == 1 })
			replaceFile(t, file, server.DSN("new", pgUsers["new"]))
		})
	})

	t.Run("setup", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "dsn")
		replaceFile(t, file, server.DSN("old", pgUsers["old"]))
		d := setupDriver{statement: "set application_name = 'set up'"}
		db := follow(t, d, file, func() { replaceFile(t, file, server.DSN("new", pgUsers["new"])) })
		var name string
		must(t, "query", db.QueryRow("select current_setting('application_name')").Scan(&name))
		want(t, "application_name", name, "set up")

		c, err := setupDriver{statement: "no statement"}.OpenConnector(server.DSN("old", pgUsers["old"]))
		must(t, "OpenConnector", err)
		_, err = c.Connect(t.Context())
		if e := new(pq.Error); !errors.As(err, &e) {
			t.Errorf("Connect: %v, want the statement's error", err)
		}
	})
}

// TestMetrics: the example's handler sees what happens, also where the other handler lets nothing
// pass that is not an error.
func TestMetrics(t *testing.T) {
	var out bytes.Buffer
	logTo(t, metricsHandler{Handler: slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelError})})
	for _, m := range []*expvar.Map{generation, changed, refused, killed} {
		m.Init()
	}
	s := newSource("1")
	db := open(t, newNop(), s, "forceKill=true")
	must(t, "ping", db.Ping())
	conn, err := db.Conn(t.Context())
	must(t, "conn", err)
	defer conn.Close()
	must(t, "ping", conn.PingContext(t.Context()))

	get := func(m *expvar.Map) string {
		if v := m.Get("/path"); v != nil {
			return v.String()
		}
		return "none"
	}
	await(t, "a first generation", func() bool { return get(generation) == "1" })
	want(t, "refused", get(refused), "none")
	s.set("")
	await(t, "a refusal", func() bool { return get(refused) == "1" })
	s.set("2")
	await(t, "a change", func() bool { return get(generation) == "2" })
	await(t, "a kill", func() bool { return get(killed) == "1" })
	if get(changed) == "none" {
		t.Error("no time of the change")
	}
	slog.Error("something else")
	if got := out.String(); strings.Contains(got, "hotload") || !strings.Contains(got, "something else") {
		t.Errorf("handed on: %q", got)
	}
}
