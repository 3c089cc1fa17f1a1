package hotload_test

import (
	"fmt"
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
// that its row names, where the table of section 13 says; no subtest names another requirement; and
// the events listed are those logged.
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

	found := subtestLiterals(t)
	for place, names := range found {
		for _, name := range names {
			if id, _, _ := strings.Cut(name, "/"); subtests[id] == "" {
				t.Errorf("%s: the subtest %q names a requirement that SPEC.md has not", place, name)
			}
		}
	}

	traced := make(map[string]bool)
	for _, row := range regexp.MustCompile("(?m)^\\| (\\S+\\.go), `(\\w+)` \\| (.*) \\|$").FindAllStringSubmatch(spec, -1) {
		place := row[1] + " " + row[2]
		for _, id := range expandIDs(t, row[3]) {
			switch want := subtests[id]; {
			case want == "":
				t.Errorf("section 13 traces %s, which SPEC.md has not", id)
			case traced[id]:
				t.Errorf("section 13 traces %s twice", id)
			case !slices.Contains(found[place], want):
				t.Errorf("no subtest %q in %s", want, place)
			}
			traced[id] = true
		}
	}
	for id := range subtests {
		if !traced[id] {
			t.Errorf("section 13 does not trace %s", id)
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

// expandIDs reads a list such as "S-1 to S-3, S-7".
func expandIDs(t *testing.T, list string) []string {
	var ids []string
	for item := range strings.SplitSeq(list, ", ") {
		first, last, isRange := strings.Cut(item, " to ")
		if !isRange {
			last = first
		}
		kind, from, _ := strings.Cut(first, "-")
		i, err1 := strconv.Atoi(from)
		j, err2 := strconv.Atoi(strings.TrimPrefix(last, kind+"-"))
		if err1 != nil || err2 != nil || i > j {
			t.Fatalf("section 13: want IDs such as R-1 to R-3, found %q", item)
		}
		for ; i <= j; i++ {
			ids = append(ids, fmt.Sprintf("%s-%d", kind, i))
		}
	}
	return ids
}

// subtestLiterals returns, by file and top-level function or variable, the strings in tests and in
// strategytest that have the form of a requirement's subtest.
func subtestLiterals(t *testing.T) map[string][]string {
	form := regexp.MustCompile(`^[SR]-\d+/.`)
	found := make(map[string][]string)
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
		for _, decl := range file.Decls {
			place := path
			switch decl := decl.(type) {
			case *ast.FuncDecl:
				place += " " + decl.Name.Name
			case *ast.GenDecl:
				if v, ok := decl.Specs[0].(*ast.ValueSpec); ok {
					place += " " + v.Names[0].Name
				}
			}
			ast.Inspect(decl, func(n ast.Node) bool {
				if s, ok := literal(n); ok && form.MatchString(s) {
					found[place] = append(found[place], s)
				}
				return true
			})
		}
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
