package local_test

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"dormouse/repository/backend"
	"dormouse/repository/backend/backendtest"
	"dormouse/repository/backend/local"
)

func open(t *testing.T) backend.Backend {
	be, err := local.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return be
}

func TestConformance(t *testing.T) { backendtest.Run(t, open) }

func TestFilesArePrivate(t *testing.T) {
	be := open(t)
	h := backend.Handle{Kind: backend.Pack, Name: "abcdef"}
	if err := be.Save(t.Context(), h, strings.NewReader("x"), 1); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(be.Location(), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		want := fs.FileMode(0o600)
		if d.IsDir() {
			want = 0o700
		}
		// The root is the test's own directory; Open does not change what exists.
		if path != be.Location() && fi.Mode().Perm() != want {
			t.Errorf("%s has mode %o, want %o", path, fi.Mode().Perm(), want)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestLargeObjectsAreReadTheSameFromDiskAndPageCache(t *testing.T) {
	be := open(t)
	h := backend.Handle{Kind: backend.Pack, Name: "abcdef"}
	content := make([]byte, 9<<20+5)
	rand.NewChaCha8([32]byte{}).Read(content)
	if err := be.Save(t.Context(), h, bytes.NewReader(content), int64(len(content))); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		for _, at := range []int{0, 4096, 5, 8 << 20} {
			p := make([]byte, min(1<<20, len(content)-at))
			if n, err := be.ReadAt(t.Context(), h, p, int64(at)); n != len(p) || err != nil {
				t.Fatalf("%d of %d bytes at %d: %v", n, len(p), at, err)
			}
			if !bytes.Equal(p, content[at:at+len(p)]) {
				t.Errorf("other content at %d", at)
			}
		}
		if _, err := os.ReadFile(filepath.Join(be.Location(), "packs", "ab", h.Name)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFullDiskIsOneSentenceThatNamesTheDirectory(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("mount of a small tmpfs: %v", err)
		}
		t.Skipf("needs to mount a small tmpfs: %v", err)
	}
	defer unix.Unmount(dir, 0)
	be, err := local.Open(filepath.Join(dir, "repo"))
	if err != nil {
		t.Fatal(err)
	}
	h := backend.Handle{Kind: backend.Pack, Name: "big"}
	err = be.Save(t.Context(), h, bytes.NewReader(make([]byte, 2<<20)), 2<<20)
	if !errors.Is(err, backend.ErrNoSpace) {
		t.Fatalf("Save on a full disk = %v, want ErrNoSpace", err)
	}
	if !strings.Contains(err.Error(), be.Location()) || strings.Contains(err.Error(), "\n") {
		t.Errorf("the error %q is not one sentence that names %s", err, be.Location())
	}
	left, err := os.ReadDir(filepath.Join(be.Location(), "tmp"))
	if err != nil || len(left) != 0 {
		t.Errorf("a failed Save left %v, %v in tmp", left, err)
	}
}
