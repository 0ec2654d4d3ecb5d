package layers

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const module = "dormouse/"

// mayImport lists, for each part, the only other parts of Dormouse that its
// non-test code may import. A part is the longest matching prefix. cmd wires
// everything and is free; parts that are missing here may import nothing.
var mayImport = map[string][]string{
	"api":                  {},
	"client":               {"api"},
	"repository":           {"api"},
	"monitor":              {"api"},
	"drivers":              {"api"},
	"controller/scheduler": {"api"},
	"controller/protocol":  {"api"},
	"controller/interval":  {},
	"controller/retention": {"api"},
	"controller":           {"api", "repository", "drivers", "monitor", "migrate", "internal"},
	"agent":                {"api", "repository", "monitor", "internal"},
	"migrate":              {"api"},
	"internal":             {"api"},
	"e2e":                  {"api", "client", "repository", "internal"},
	"cmd/dormouse-init":    {"agent/sandbox", "internal"},
}

func TestImportsFollowTheLayers(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	err = filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() {
			if base := entry.Name(); strings.HasPrefix(base, ".") || base == "testdata" || base == "bin" {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		seen++
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		checkFile(t, name, filepath.ToSlash(rel))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen == 0 {
		t.Fatal("no Go file found: the test looks in the wrong place")
	}
}

func checkFile(t *testing.T, name, rel string) {
	t.Helper()
	part := partOf(path.Dir(rel))
	if part == "cmd/dormouse" {
		return
	}
	file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly)
	if err != nil {
		t.Errorf("%s: %v", rel, err)
		return
	}
	for _, spec := range file.Imports {
		imported, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			t.Errorf("%s: %v", rel, err)
			continue
		}
		target, ours := strings.CutPrefix(imported, module)
		if ours && !allowed(part, target) {
			t.Errorf("%s: %s may not import %s", rel, part, target)
		}
	}
}

// partOf returns the part of the map that a folder belongs to.
func partOf(dir string) string {
	best := ""
	for part := range mayImport {
		if within(dir, part) && len(part) > len(best) {
			best = part
		}
	}
	if best == "" {
		return dir
	}
	return best
}

func allowed(part, target string) bool {
	if within(target, part) {
		return true
	}
	for _, may := range mayImport[part] {
		if within(target, may) {
			return true
		}
	}
	// A folder may use the parts below it: controller its scheduler.
	return strings.HasPrefix(target, part+"/")
}

func within(dir, part string) bool {
	return dir == part || strings.HasPrefix(dir, part+"/")
}
