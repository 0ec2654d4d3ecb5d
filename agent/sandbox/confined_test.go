package sandbox

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPathsOfUsersJobsMustNotBeMovable(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test makes directories of several owners: run it as root")
		}
		t.Skip("this test makes directories of several owners: run it as root")
	}
	const alice = 12345
	base, err := os.MkdirTemp("/var/lib", "dormouse-confined-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(base)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Chmod(base, 0o755))
	home := filepath.Join(base, "alice")
	must(os.MkdirAll(filepath.Join(home, "data"), 0o755))
	must(os.Chown(home, alice, alice))
	must(os.Mkdir(filepath.Join(base, "open"), 0o755))
	must(os.Chmod(filepath.Join(base, "open"), 0o777))
	must(os.Mkdir(filepath.Join(base, "open", "data"), 0o755))
	must(os.Symlink("/root", filepath.Join(base, "link")))
	for _, c := range []struct{ path, why string }{
		{base, ""},
		{home, ""},
		{filepath.Join(home, "data"), "which others than root can change"},
		{filepath.Join(base, "open"), ""},
		{filepath.Join(base, "open", "data"), "which others than root can change"},
		{filepath.Join(base, "link"), "symbolic link"},
		{filepath.Join(base, "link", "sub"), "symbolic link"},
		{filepath.Join(base, "none"), "no such file"},
	} {
		err := checkPath("volume", c.path)
		if c.why == "" && err != nil || c.why != "" && (err == nil || !strings.Contains(err.Error(), c.why)) {
			t.Errorf("%s: want a refusal with %q, got %v", c.path, c.why, err)
		}
	}
}
