package pages

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

var zeroPage [pageSize]byte

// DropZeros removes pages full of zeros from the private anonymous memory
// of the images in dir, which lies in memory, and returns the bytes saved. Images
// in a form it does not know are left alone. It changes the images in place: when it fails
// half-way they are worthless, which the error says.
func DropZeros(dir string) (saved int64, err error) {
	names, err := filepath.Glob(filepath.Join(dir, "mm-*.img"))
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		pid := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(name), "mm-"), ".img")
		n, err := dropZeros(dir, pid)
		if err != nil && !errors.Is(err, errOdd) {
			return saved, fmt.Errorf("the images of process %s are damaged: %w", pid, err)
		}
		saved += n
	}
	return saved, nil
}

func dropZeros(dir, pid string) (int64, error) {
	areas, err := anonymousAreas(filepath.Join(dir, "mm-"+pid+".img"))
	if err != nil {
		return 0, err
	}
	mapName := filepath.Join(dir, "pagemap-"+pid+".img")
	pages, err := readPagemap(mapName)
	if err != nil {
		return 0, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "pages-"+strconv.FormatUint(pages.id, 10)+".img"), os.O_RDWR, 0)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errOdd, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if info.Size() != pages.bytes() || info.Size() == 0 {
		return 0, errOdd
	}
	kept, left, err := pages.compact(f, areas)
	if err != nil {
		return 0, err
	}
	if left == info.Size() {
		return 0, nil
	}
	if err := f.Truncate(left); err != nil {
		return 0, err
	}
	return info.Size() - left, os.WriteFile(mapName, kept.encode(), 0o600)
}

const (
	// scanPages is how much of a pages image is looked at at once.
	scanPages = 4096
	// moveStep is how much of it is moved at once: little, so that it stays in the
	// processor's cache.
	moveStep = 256 << 10
)

// compact moves the pages that are kept to the front of f, the pages image, and
// returns the map of them and their size.
func (m *pagemap) compact(f *os.File, areas []area) (*pagemap, int64, error) {
	zero, err := zeroPages(f, m.bytes()/pageSize)
	if err != nil {
		return nil, 0, err
	}
	kept := &pagemap{head: m.head, id: m.id, wide: m.wide}
	moves := mover{f: f}
	var page int64
	for _, r := range m.entries {
		for end := r.address + r.pages*pageSize; r.address < end; r.address += pageSize {
			for len(areas) > 0 && areas[0].end <= r.address {
				areas = areas[1:]
			}
			anonymous := len(areas) > 0 && areas[0].start <= r.address
			if !anonymous || !zero[page] {
				kept.add(pageRun{r.address, 1, r.flags})
				if err := moves.keep(page * pageSize); err != nil {
					return nil, 0, err
				}
			}
			page++
		}
	}
	return kept, moves.to + moves.length, moves.flush()
}

// zeroPages says of each page of a file in memory whether it is full of zeros.
func zeroPages(f *os.File, pages int64) ([]bool, error) {
	zero := make([]bool, pages)
	var next atomic.Int64
	var group errgroup.Group
	for range runtime.NumCPU() {
		group.Go(func() error {
			for {
				from := next.Add(scanPages) - scanPages
				if from >= pages {
					return nil
				}
				if err := scan(f, from, zero[from:min(from+scanPages, pages)]); err != nil {
					return err
				}
			}
		})
	}
	return zero, group.Wait()
}

// scan looks at the pages from the given one on where they are.
func scan(f *os.File, from int64, zero []bool) error {
	content, err := unix.Mmap(int(f.Fd()), from*pageSize, len(zero)*pageSize, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return &os.PathError{Op: "mmap", Path: f.Name(), Err: err}
	}
	defer unix.Munmap(content)
	for i := range zero {
		zero[i] = bytes.Equal(content[i*pageSize:][:pageSize], zeroPage[:])
	}
	return nil
}

// mover moves stretches of a file towards its beginning.
type mover struct {
	f            *os.File
	buf          []byte
	from, length int64 // the stretch that is kept, and not moved yet
	to           int64 // where it goes
}

// keep keeps the page at an offset; offsets ascend.
func (m *mover) keep(offset int64) error {
	if offset != m.from+m.length {
		if err := m.flush(); err != nil {
			return err
		}
		m.to, m.from, m.length = m.to+m.length, offset, 0
	}
	m.length += pageSize
	return nil
}

// flush moves the present stretch.
func (m *mover) flush() error {
	if m.from == m.to {
		return nil
	}
	if m.buf == nil {
		m.buf = make([]byte, moveStep)
	}
	for done := int64(0); done < m.length; {
		step := m.buf[:min(m.length-done, moveStep)]
		if _, err := m.f.ReadAt(step, m.from+done); err != nil {
			return err
		}
		if _, err := m.f.WriteAt(step, m.to+done); err != nil {
			return err
		}
		done += int64(len(step))
	}
	return nil
}
