package pages

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
)

// Source gives the content of pages images. Read calls use with n bytes at offset
// in parts, or with what is left of the image. It is called by several goroutines.
type Source interface {
	Read(name string, offset int64, n int, use func(parts [][]byte) error) error
}

// Division says who fills what of the memory of a restored tree.
type Division struct {
	sizes map[string]int64     // of all pages images
	rest  map[string][]stretch // what is left to CRIU of those that were divided
	taken []takenImage
	runs  int      // of all taken
	moved []string // pagemap images whose originals are beside them
}

// stretch is a part of a pages image, in pages.
type stretch struct{ first, pages int64 }

func (s stretch) bytes() int64 { return s.pages * pageSize }

// takenImage is what Fill writes from a pages image into a process.
type takenImage struct {
	name string
	pid  int // inside the tree
	size int64
	runs []takenRun // ascending; none crosses the border of a block
}

type takenRun struct {
	address uint64
	first   uint32 // page of the image
	pages   uint32
}

const (
	// worthwhile is how many pages an area must have for Fill to write it.
	worthwhile = 16
	// blockSize is how much Fill asks for and writes at once: what a MemoryReader
	// holds in one piece.
	blockSize  = 4 << 20
	blockPages = blockSize / pageSize
	// mostRuns bounds what a Division holds, to 16 MiB. The images of processes that
	// would need more are left alone.
	mostRuns = 1 << 20

	original = ".all"
)

// Divide divides the memory that the images in dir describe. Their pages images
// have the given sizes and are elsewhere; parents has the parent of each process,
// all by their numbers inside the tree. It changes the pagemap images: nobody but
// CRIU should look at them before Restore.
func Divide(dir string, sizes map[string]int64, parents map[int]int) (_ *Division, err error) {
	d := &Division{sizes: sizes, rest: make(map[string][]stretch)}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Restore())
		}
	}()
	areas := make(map[int][]area)
	for pid := range parents {
		// Of a zombie there is none.
		areas[pid], err = anonymousAreas(filepath.Join(dir, fmt.Sprintf("mm-%d.img", pid)))
		if err != nil && !errors.Is(err, errOdd) {
			return nil, err
		}
	}
	own := make(map[int][]area)
	for pid := range parents {
		own[pid] = slices.DeleteFunc(slices.Clone(areas[pid]), func(a area) bool { return !a.writable })
	}
	for child, parent := range parents {
		own[child] = apart(own[child], areas[parent])
		own[parent] = apart(own[parent], areas[child])
	}
	for pid := range parents {
		if err := d.divide(dir, pid, own[pid]); err != nil && !errors.Is(err, errOdd) {
			return nil, fmt.Errorf("the images of process %d: %w", pid, err)
		}
	}
	return d, nil
}

// apart returns the areas that do not overlap any of others. Both ascend.
func apart(areas, others []area) []area {
	return slices.DeleteFunc(areas, func(a area) bool {
		for len(others) > 0 && others[0].end <= a.start {
			others = others[1:]
		}
		return len(others) > 0 && others[0].start < a.end
	})
}

// divide takes what it can of one process.
func (d *Division) divide(dir string, pid int, areas []area) error {
	name := filepath.Join(dir, fmt.Sprintf("pagemap-%d.img", pid))
	all, err := readPagemap(name)
	if err != nil {
		return err
	}
	image := "pages-" + strconv.FormatUint(all.id, 10) + ".img"
	if size := all.bytes(); d.sizes[image] != size || d.rest[image] != nil || size > math.MaxUint32*pageSize {
		return errOdd
	}
	left, rest, runs := all.split(areas)
	if len(runs) == 0 || len(runs) > mostRuns-d.runs {
		return errOdd
	}
	d.runs += len(runs)
	if err := os.Rename(name, name+original); err != nil {
		return err
	}
	d.moved = append(d.moved, name)
	d.rest[image] = rest
	d.taken = append(d.taken, takenImage{name: image, pid: pid, size: all.bytes(), runs: runs})
	return os.WriteFile(name, left.encode(), 0o600)
}

// split separates the pages that lie in areas from the others.
func (m *pagemap) split(areas []area) (left *pagemap, rest []stretch, taken []takenRun) {
	content := make(map[uint64]uint64) // pages by the start of their area
	m.cut(areas, func(r pageRun, in *area) {
		if in != nil {
			content[in.start] += r.pages
		}
	})
	areas = slices.DeleteFunc(slices.Clone(areas), func(a area) bool { return content[a.start] < worthwhile })
	left = &pagemap{head: m.head, id: m.id, wide: m.wide}
	var at int64
	m.cut(areas, func(r pageRun, in *area) {
		switch {
		case in != nil:
			taken = appendRun(taken, r.address, at, int64(r.pages))
		case len(rest) > 0 && rest[len(rest)-1].first+rest[len(rest)-1].pages == at:
			rest[len(rest)-1].pages += int64(r.pages)
			left.add(r)
		default:
			rest = append(rest, stretch{at, int64(r.pages)})
			left.add(r)
		}
		at += int64(r.pages)
	})
	return left, rest, taken
}

// cut calls each with the runs of the map, cut where an area begins or ends, and
// the area they are in, or nil.
func (m *pagemap) cut(areas []area, each func(pageRun, *area)) {
	for _, r := range m.entries {
		for left := r.pages; left > 0; {
			for len(areas) > 0 && areas[0].end <= r.address {
				areas = areas[1:]
			}
			var in *area
			r.pages = left
			switch {
			case len(areas) == 0:
			case areas[0].start <= r.address:
				in = &areas[0]
				r.pages = min(left, (in.end-r.address)/pageSize)
			default:
				r.pages = min(left, (areas[0].start-r.address)/pageSize)
			}
			each(r, in)
			left -= r.pages
			r.address += r.pages * pageSize
		}
	}
}

// appendRun appends the pages of an image from first on, cut at the borders of
// blocks.
func appendRun(runs []takenRun, address uint64, first, pages int64) []takenRun {
	for pages > 0 {
		n := min(pages, blockPages-first%blockPages)
		runs = append(runs, takenRun{address: address, first: uint32(first), pages: uint32(n)})
		address, first, pages = address+uint64(n)*pageSize, first+n, pages-n
	}
	return runs
}

// Restore puts the pagemap images back that Divide has changed.
func (d *Division) Restore() error {
	var errs []error
	for _, name := range d.moved {
		errs = append(errs, os.Rename(name+original, name))
	}
	d.moved = nil
	return errors.Join(errs...)
}

// Sizes are the sizes of the pages images that CRIU is to see.
func (d *Division) Sizes() map[string]int64 {
	sizes := make(map[string]int64)
	for name, size := range d.sizes {
		if rest, divided := d.rest[name]; divided {
			size = 0
			for _, s := range rest {
				size += s.bytes()
			}
		}
		sizes[name] = size
	}
	return sizes
}

// Taken are the pages images that Fill reads, in its order.
func (d *Division) Taken() []string {
	var names []string
	for i := range d.taken {
		names = append(names, d.taken[i].name)
	}
	return names
}

// Rest is the content of the pages images that CRIU is to see, out of that of the
// stored ones.
func (d *Division) Rest(all Source) Source { return rest{d, all} }

type rest struct {
	division *Division
	all      Source
}

func (r rest) Read(name string, offset int64, n int, use func(parts [][]byte) error) error {
	stretches, divided := r.division.rest[name]
	if !divided {
		return r.all.Read(name, offset, n, use)
	}
	for len(stretches) > 0 && stretches[0].bytes() <= offset {
		offset -= stretches[0].bytes()
		stretches = stretches[1:]
	}
	if len(stretches) > 0 && int64(n) <= stretches[0].bytes()-offset {
		return r.all.Read(name, stretches[0].first*pageSize+offset, n, use)
	}
	// The stretches may lie far apart, in more blocks than a source can hold.
	var content []byte
	for _, s := range stretches {
		step := min(n-len(content), int(s.bytes()-offset))
		if step == 0 {
			break
		}
		err := r.all.Read(name, s.first*pageSize+offset, step, func(parts [][]byte) error {
			for _, p := range parts {
				content = append(content, p...)
			}
			return nil
		})
		if err != nil {
			return err
		}
		offset = 0
	}
	return use([][]byte{content})
}
