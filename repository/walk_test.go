package repository

import (
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestWalkStaysInItsMount(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"other", "plain"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	other := filepath.Join(dir, "other")
	if err := unix.Mount("tmpfs", other, "tmpfs", 0, "size=1m"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("mount of a small tmpfs: %v", err)
		}
		t.Skipf("needs to mount a small tmpfs: %v", err)
	}
	defer unix.Unmount(other, unix.MNT_DETACH)
	for _, name := range []string{"other/file", "plain/file", "plain/bound"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	bound := filepath.Join(dir, "plain/bound")
	if err := unix.Mount(filepath.Join(other, "file"), bound, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(bound, unix.MNT_DETACH)
	got := make(map[string]string)
	for e, err := range Walk(dir) {
		if err != nil {
			t.Fatal(err)
		}
		got[e.Path] = string(e.Type)
		if e.Type == TypeFile {
			f, err := e.Open()
			if err != nil {
				t.Fatal(err)
			}
			content, err := io.ReadAll(f)
			f.Close()
			if err != nil || int64(len(content)) != e.Size {
				t.Errorf("%s: %d bytes, size %d: %v", e.Path, len(content), e.Size, err)
			}
			got[e.Path] = string(content)
		}
	}
	want := map[string]string{".": string(TypeDir), "other": string(TypeDir), "plain": string(TypeDir), "plain/file": "plain/file", "plain/bound": ""}
	for path, content := range want {
		if have, there := got[path]; !there || have != content {
			t.Errorf("%s is %q, want %q", path, have, content)
		}
	}
	if len(got) != len(want) {
		t.Errorf("got %q", got)
	}
}
