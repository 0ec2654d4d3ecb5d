package sandbox

import (
	"os"
	"path/filepath"
	"testing"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("trusted attributes need root")
	}
	t.Skip("trusted attributes need root")
}

// onDisk is a temporary directory on a file system with trusted attributes.
func onDisk(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/lib", "dormouse-test-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func TestHidingCopiesTheDirectoriesAbove(t *testing.T) {
	needRoot(t)
	dir := onDisk(t)
	upper, lower := filepath.Join(dir, "upper"), filepath.Join(dir, "lower")
	if err := os.MkdirAll(lower+"/a/b/secret", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(lower+"/a", 0o750|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(lower+"/a/b", 5, 6); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(upper, 0o755); err != nil {
		t.Fatal(err)
	}
	for range 2 { // a restore does it again
		if err := hide(upper, lower, lower+"/a/b/secret"); err != nil {
			t.Fatal(err)
		}
	}
	if info, err := os.Stat(upper + "/a"); err != nil || info.Mode() != os.ModeDir|0o750|os.ModeSetgid {
		t.Errorf("a: %v %v", info.Mode(), err)
	}
	for name, want := range map[string]bool{"/a": false, "/a/b": false, "/a/b/secret": true} {
		if got := isOpaque(upper + name); got != want {
			t.Errorf("%s opaque: %v, want %v", name, got, want)
		}
	}
}

// A restored upper layer is the work of a task.
func TestHidingFollowsNoLinkOfTheUpperLayer(t *testing.T) {
	needRoot(t)
	dir := onDisk(t)
	upper, lower, outside := filepath.Join(dir, "upper"), filepath.Join(dir, "lower"), filepath.Join(dir, "outside")
	for _, d := range []string{upper, lower + "/a/secret", outside} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, upper+"/a"); err != nil {
		t.Fatal(err)
	}
	if err := hide(upper, lower, lower+"/a/secret"); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(outside); err != nil || len(entries) != 0 || isOpaque(outside) {
		t.Errorf("the link was followed: %v %v", entries, err)
	}
}

func TestKeepXattr(t *testing.T) {
	for name, want := range map[string]bool{
		"trusted.overlay.opaque": true, "trusted.overlay.origin": false, "trusted.overlay.impure": false,
		"trusted.overlay.nlink": false, "trusted.overlay.upper": false, "trusted.overlay.uuid": false,
		"user.anything": true, "security.capability": true, "trusted.other": true,
	} {
		if got := KeepXattr(name); got != want {
			t.Errorf("KeepXattr(%s) = %v, want %v", name, got, want)
		}
	}
}

func TestParseRoot(t *testing.T) {
	layout := t.TempDir()
	if err := os.WriteFile(layout+"/oci-layout", []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	for in, want := range map[string]Root{
		"": {"host", "/"}, "host": {"host", "/"}, "dir:/srv/x/": {"dir", "/srv/x"}, "/srv": {"dir", "/srv"},
		"oci:/x.tar": {"oci", "/x.tar"}, "oci:redis:7": {"oci", "redis:7"}, layout: {"oci", layout},
	} {
		if got, err := ParseRoot(in); err != nil || got != want {
			t.Errorf("ParseRoot(%q) = %+v, %v, want %+v", in, got, err, want)
		}
	}
	for _, in := range []string{"dir:relative", "dir:", "oci:", "zip:/x", "redis"} {
		if got, err := ParseRoot(in); err == nil {
			t.Errorf("ParseRoot(%q) = %+v, want an error", in, got)
		}
	}
}
