package agent

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// spoolOf mounts a spool directory of a size, with a directory for images.
func spoolOf(t *testing.T, size int64) (images string) {
	t.Helper()
	dir := t.TempDir()
	err := mountSpool(dir, size)
	if errors.Is(err, syscall.EPERM) && os.Getenv("CI") != "true" {
		t.Skip("needs root")
	}
	must(t, err)
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	images = filepath.Join(dir, imagesDir)
	must(t, os.Mkdir(images, 0o700))
	return images
}

func randomBytes(n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(p)
	return p
}

// What CRIU writes is among the images afterwards, whether more or less than
// was expected; what it did not create is not.
func TestStreamsBecomeTheImagesThatCRIUWrote(t *testing.T) {
	images := spoolOf(t, 64<<20)
	p, err := newPageStreams(t.Context(), images, []int64{4 << 20, 0, 8 << 20})
	must(t, err)
	defer p.close()
	want := map[string][]byte{
		"pages-1.img": randomBytes(3<<20 + 4096),
		"pages-2.img": randomBytes(5 << 20),
		"pages-3.img": {},
		"pages-5.img": randomBytes(4096),
	}
	var total int64
	for name, content := range want {
		must(t, os.WriteFile(filepath.Join(images, name), content, 0o600)) // opens as CRIU does
		total += int64(len(content))
	}
	must(t, os.WriteFile(filepath.Join(images, "inventory.img"), nil, 0o600))
	got, err := p.finish()
	must(t, err)
	if got != total {
		t.Errorf("finish counted %d bytes, expected %d", got, total)
	}
	names, err := os.ReadDir(images)
	must(t, err)
	if len(names) != len(want)+1 {
		t.Errorf("the images are %v, expected %d of pages and the inventory", names, len(want))
	}
	for name, content := range want {
		info, err := os.Lstat(filepath.Join(images, name))
		must(t, err)
		have, err := os.ReadFile(filepath.Join(images, name))
		must(t, err)
		if !info.Mode().IsRegular() || !bytes.Equal(have, content) {
			t.Errorf("%s is %v with %d bytes, expected a file with the %d that were written", name, info.Mode(), len(have), len(content))
		}
	}
}

// A full spool must not stop CRIU in the middle: it holds the task.
func TestAFullSpoolDoesNotStopTheWriter(t *testing.T) {
	images := spoolOf(t, 4<<20)
	p, err := newPageStreams(t.Context(), images, nil)
	must(t, err)
	defer p.close()
	for _, name := range []string{"pages-1.img", "pages-2.img"} {
		if err := os.WriteFile(filepath.Join(images, name), randomBytes(8<<20), 0o600); err != nil {
			t.Errorf("writing %s failed: %v", name, err)
		}
	}
	if _, err := p.finish(); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("finish says %v, expected that no space is left", err)
	}
}

func TestStreamsThatWereNeverUsedEnd(t *testing.T) {
	images := spoolOf(t, 4<<20)
	p, err := newPageStreams(t.Context(), images, []int64{1 << 20})
	must(t, err)
	p.close()
	p.close()
}
