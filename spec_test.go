package hotload_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestSpecification holds SPEC.md and the tests to each other: each requirement has the subtest
// that its row names, no subtest names a requirement that is not there, and the events listed are
// those logged. SPEC.md stays as short as promised.
func TestSpecification(t *testing.T) {
	text, err := os.ReadFile("SPEC.md")
	if err != nil {
		t.Fatal(err)
	}
	spec := string(text)

	subtests := make(map[string]string) // by ID, as SPEC.md has it
	for _, row := range regexp.MustCompile(`(?m)^\| ([SR]-\d+) \|.*\| ([^|]+) \|$`).FindAllStringSubmatch(spec, -1) {
		id, words := row[1], row[2]
		if subtests[id] != "" {
			t.Errorf("%s stands twice in SPEC.md", id)
		}
		subtests[id] = id + "/" + words
	}
	if len(subtests) == 0 {
		t.Fatal("no requirements found in SPEC.md")
	}
	if lines := strings.Count(spec, "\n"); lines > 430 {
		t.Errorf("SPEC.md has %d lines, want at most 430", lines)
	}

	found := subtestLiterals(t)
	for name, place := range found {
		if id, _, _ := strings.Cut(name, "/"); subtests[id] == "" {
			t.Errorf("%s: the subtest %q names a requirement that SPEC.md has not", place, name)
		}
	}
	for _, name := range subtests {
		if found[name] == "" {
			t.Errorf("SPEC.md names the subtest %q, which no test has", name)
		}
	}

	var events []string
	for _, row := range regexp.MustCompile("(?m)^\\| `(hotload: [^`]+)` \\|").FindAllStringSubmatch(spec, -1) {
		events = append(events, row[1])
	}
	slices.Sort(events)
	if logged := loggedEvents(t); !slices.Equal(events, logged) {
		t.Errorf("events\nin SPEC.md %q\nlogged     %q", events, logged)
	}
}

// subtestLiterals returns the strings in tests and in strategytest that have the form of a
// requirement's subtest, and in which file each is.
func subtestLiterals(t *testing.T) map[string]string {
	form := regexp.MustCompile(`^[SR]-\d+/.`)
	found := make(map[string]string)
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		path = filepath.ToSlash(path)
		if filepath.Ext(path) != ".go" || !strings.HasSuffix(path, "_test.go") && !strings.HasPrefix(path, "strategytest/") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if s, ok := literal(n); ok && form.MatchString(s) {
				found[s] = path
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// loggedEvents returns the messages that hotload passes to log/slog.
func loggedEvents(t *testing.T) []string {
	var events []string
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) == 0 {
				return true
			}
			method, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || !slices.Contains([]string{"Debug", "Info", "Warn", "Error"}, method.Sel.Name) {
				return true
			}
			if s, ok := literal(call.Args[0]); ok {
				events = append(events, s)
			}
			return true
		})
	}
	slices.Sort(events)
	return slices.Compact(events)
}

func literal(n ast.Node) (string, bool) {
	lit, ok := n.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return "", false
	}
	s, err := strconv.Unquote(lit.Value)
	return s, err == nil
}
