package criu

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestProbePasses(t *testing.T) {
	e := newEngine(t)
	if err := e.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "dormouse-probe-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestFeaturesExplainWhatIsMissing(t *testing.T) {
	e := newEngine(t)
	list, err := e.Features(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range list {
		if !f.OK && f.Detail == "" {
			t.Errorf("%s is missing without a word about it", f.Name)
		}
		if !f.OK && f.Needed {
			t.Errorf("%s is needed and missing: %s", f.Name, f.Detail)
		}
	}
}

func TestNewRefusesWhatIsNoUsableCRIU(t *testing.T) {
	for _, c := range []struct{ name, path, want string }{
		{"missing", "/nonexistent/criu", "not found at /nonexistent/criu"},
		{"not CRIU", mustLook(t, "true"), "for its version"},
	} {
		_, err := New(t.Context(), Options{Path: c.path, Libexec: t.TempDir()})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, expected %q", c.name, err, c.want)
		}
	}
}

func mustLook(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}
