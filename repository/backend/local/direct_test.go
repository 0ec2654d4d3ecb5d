package local

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestWhatIsInThePageCacheIsKnown(t *testing.T) {
	const size = 1 << 20
	dir, err := os.MkdirTemp("/var/tmp", "dormouse-test-") // of a disk: from a tmpfs nothing is dropped
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	name := filepath.Join(dir, "pack")
	if err := os.WriteFile(name, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var stat unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &stat, 0); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("cachestat: %v", err)
		}
		t.Skipf("needs cachestat(2), Linux 6.5: %v", err)
	}
	for _, stretch := range [][2]int{{0, size}, {5, 1}, {4095, 2}, {size / 2, size / 2}} {
		if !cached(f, int64(stretch[0]), stretch[1]) {
			t.Errorf("%d bytes at %d are not in the page cache, just written", stretch[1], stretch[0])
		}
	}
	if cached(f, size/2, size) {
		t.Error("what is beyond the end is in the page cache")
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fadvise(int(f.Fd()), 0, size, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	if cached(f, 0, size) {
		t.Error("what was dropped is in the page cache")
	}
}
