package pagefs

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// contents are files in memory, given out in parts of odd sizes. Where a file
// holds the byte of failing, reading fails.
type contents map[string][]byte

var errDamaged = errors.New("damaged")

const failing = 13 << 20

func (c contents) Read(name string, offset int64, n int, use func([][]byte) error) error {
	if name == "bad" && offset+int64(n) > failing {
		return errDamaged
	}
	p := c[name][offset : offset+int64(n)]
	cut := min(len(p), 5000)
	return use([][]byte{p[:cut], p[cut:]})
}

func mount(t *testing.T) (*Server, string, contents) {
	t.Helper()
	dir := t.TempDir()
	if !Usable(dir) {
		if os.Getenv("CI") == "true" {
			t.Fatal("/dev/fuse cannot be used")
		}
		t.Skip("needs root and /dev/fuse")
	}
	c, sizes := contents{}, map[string]int64{}
	rnd := rand.NewChaCha8([32]byte{1})
	for name, size := range map[string]int64{"pages-1.img": 0, "pages-2.img": 1, "pages-3.img": 9<<20 + 4096, "bad": 16 << 20} {
		c[name], sizes[name] = make([]byte, size), size
		rnd.Read(c[name])
	}
	s, err := Mount(dir, sizes, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if names, err := os.ReadDir(dir); err != nil || len(names) != 0 {
			t.Errorf("after Close the directory has %v (%v), expected it empty", names, err)
		}
	})
	return s, dir, c
}

// open opens a file without making it known to Go's poller: epoll_ctl(2) would
// ask the file system, which is we, while it keeps the runtime from running us.
func open(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func readAll(path string) ([]byte, error) {
	f, err := open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

func TestFilesReadAsTheirSourceSays(t *testing.T) {
	s, dir, c := mount(t)
	var readers sync.WaitGroup
	for _, name := range []string{"pages-1.img", "pages-2.img", "pages-3.img"} {
		for range 3 {
			readers.Go(func() {
				got, err := readAll(filepath.Join(dir, name))
				if err != nil || !bytes.Equal(got, c[name]) {
					t.Errorf("%s: got %d bytes (%v), expected the %d of the source", name, len(got), err, len(c[name]))
				}
			})
		}
	}
	readers.Wait()
	if s.Err() != nil {
		t.Errorf("Err is %v, expected none", s.Err())
	}
}

// CRIU reads many stretches of memory with one call.
func TestOneReadFillsManyBuffers(t *testing.T) {
	_, dir, c := mount(t)
	f, err := open(filepath.Join(dir, "pages-3.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buffers := [][]byte{make([]byte, 4096), make([]byte, 3<<20), make([]byte, 8192)}
	n, err := unix.Preadv(int(f.Fd()), buffers, 1<<20)
	if err != nil || n != 3<<20+3*4096 {
		t.Fatalf("read %d bytes (%v), expected all that was asked for", n, err)
	}
	if got := bytes.Join(buffers, nil); !bytes.Equal(got, c["pages-3.img"][1<<20:][:n]) {
		t.Error("the buffers do not hold what the file does")
	}
}

func TestASourceThatFailsIsAnIOError(t *testing.T) {
	s, dir, c := mount(t)
	f, err := open(filepath.Join(dir, "bad"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := io.ReadAll(f)
	if !errors.Is(err, syscall.EIO) || !errors.Is(s.Err(), errDamaged) {
		t.Errorf("reading failed with %v and Err is %v, expected EIO and the source's error", err, s.Err())
	}
	if len(got) > failing || !bytes.Equal(got, c["bad"][:len(got)]) {
		t.Errorf("read %d bytes that the source never gave", len(got))
	}
}

func TestOtherNamesAndWritingAreRefused(t *testing.T) {
	_, dir, _ := mount(t)
	if _, err := open(filepath.Join(dir, "pages-9.img")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("opening an unknown name: %v", err)
	}
	if _, err := os.OpenFile(filepath.Join(dir, "pages-3.img"), os.O_WRONLY, 0); !errors.Is(err, syscall.EROFS) {
		t.Errorf("opening for writing: %v, expected that the file system is read-only", err)
	}
}
