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
)

var zeroPage [pageSize]byte

// DropZeros removes pages full of zeros from the private anonymous memory
// of the images in dir, and returns the bytes saved. Images in a form it does
// not know are left alone. It changes the images in place: when it fails
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

// scanStep is how much of a pages image is looked at, or moved, at once: little,
// so that it stays in the processor's cache.
const scanStep = 256 << 10

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

// zeroPages says of each page of a file whether it is full of zeros.
func zeroPages(f *os.File, pages int64) ([]bool, error) {
	zero := make([]bool, pages)
	var next atomic.Int64
	var group errgroup.Group
	for range runtime.NumCPU() {
		group.Go(func() error {
			buf := make([]byte, scanStep)
			for {
				at := next.Add(scanStep) - scanStep
				left := pages*pageSize - at
				if left <= 0 {
					return nil
				}
				step := buf[:min(left, scanStep)]
				if _, err := f.ReadAt(step, at); err != nil {
					return fmt.Errorf("%s ends too early: %w", f.Name(), err)
				}
				for i := 0; i < len(step); i += pageSize {
					zero[(at+int64(i))/pageSize] = bytes.Equal(step[i:i+pageSize], zeroPage[:])
				}
			}
		})
	}
	return zero, group.Wait()
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
		m.buf = make([]byte, scanStep)
	}
	for done := int64(0); done < m.length; {
		step := m.buf[:min(m.length-done, scanStep)]
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
