package pages

import (
	"bytes"
	"errors"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// stored is a Source in memory.
type stored map[string][]byte

func (s stored) Read(name string, offset int64, n int, use func(parts [][]byte) error) error {
	p := s[name][offset:]
	p = p[:min(n, len(p))]
	middle := len(p) / 3
	return use([][]byte{p[:middle], p[middle:]})
}

func (s stored) sizes() map[string]int64 {
	sizes := make(map[string]int64)
	for name, p := range s {
		sizes[name] = int64(len(p))
	}
	return sizes
}

func randomPages(n int) []byte {
	p := make([]byte, n*pageSize)
	rand.NewChaCha8([32]byte{byte(n)}).Read(p)
	return p
}

const flags = pagePresent | 2

// TestMemoryIsDivided fills an area of this very process, and checks that what is
// left to CRIU is everything else.
func TestMemoryIsDivided(t *testing.T) {
	const size = 3 * blockSize
	memory, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	must(t, err)
	defer unix.Munmap(memory)
	start := uint64(uintptr(unsafe.Pointer(&memory[0])))
	runs := []pageRun{
		{0x1e000, 4, flags}, // a file's
		{start - 2*pageSize, 40, flags},
		{start + 100*pageSize, 2*blockPages + 3, flags},
		{start + size - pageSize, 3, flags}, // and the two behind it
	}
	var pages int
	for _, r := range runs {
		pages += int(r.pages)
	}
	content := stored{"pages-7.img": randomPages(pages)}
	dir := t.TempDir()
	image(t, dir, 1, 7, true, runs, areaOf(0x10000, 0x20000, areaRegular|1<<6, unix.MAP_PRIVATE), anonymous(start, start+size))
	before, err := os.ReadFile(filepath.Join(dir, "pagemap-1.img"))
	must(t, err)
	d, err := Divide(dir, content.sizes(), map[int]int{1: 0})
	must(t, err)

	left, err := readPagemap(filepath.Join(dir, "pagemap-1.img"))
	must(t, err)
	want := []pageRun{{0x1e000, 4, flags}, {start - 2*pageSize, 2, flags}, {start + size, 2, flags}}
	if !slices.Equal(left.entries, want) {
		t.Errorf("to CRIU are left %v, want %v", left.entries, want)
	}
	all := content["pages-7.img"]
	rest := slices.Concat(all[:6*pageSize], all[len(all)-2*pageSize:])
	if sizes := d.Sizes(); !maps.Equal(sizes, map[string]int64{"pages-7.img": int64(len(rest))}) {
		t.Errorf("the sizes are %v", sizes)
	}
	for _, step := range []int{pageSize, 3 * pageSize, len(rest), len(rest) + 1} {
		if !bytes.Equal(readAll(t, d.Rest(content), "pages-7.img", step), rest) {
			t.Errorf("CRIU gets other content in steps of %d", step)
		}
	}

	must(t, d.Fill(t.Context(), content, map[int]int{1: os.Getpid()}))
	expected := make([]byte, size)
	at := 6 * pageSize
	copy(expected, all[at:at+38*pageSize])
	at += 38 * pageSize
	copy(expected[100*pageSize:], all[at:at+(2*blockPages+3)*pageSize])
	copy(expected[size-pageSize:], all[len(all)-3*pageSize:len(all)-2*pageSize])
	if !bytes.Equal(memory, expected) {
		t.Error("the memory is not filled with the content")
	}

	must(t, d.Restore())
	after, err := os.ReadFile(filepath.Join(dir, "pagemap-1.img"))
	must(t, err)
	if !bytes.Equal(after, before) {
		t.Error("the pagemap image is not as it was")
	}
}

// TestFarStretchesAreNotHeldAtOnce has a page of CRIU's in each of many blocks, of
// which a source holds but a few.
func TestFarStretchesAreNotHeldAtOnce(t *testing.T) {
	const areas = 40
	var runs []pageRun
	var own []*vma.VmaEntry
	for i := range uint64(areas) {
		start := 0x10_0000_0000 + i*4*blockSize
		runs = append(runs, pageRun{start, blockPages, flags}, pageRun{start + 2*blockSize, 1, flags})
		own = append(own, anonymous(start, start+blockSize))
	}
	dir := t.TempDir()
	image(t, dir, 1, 7, true, runs, own...)
	const size = areas * (blockPages + 1) * pageSize
	d, err := Divide(dir, map[string]int64{"pages-7.img": size}, map[int]int{1: 0})
	must(t, err)
	got := readAll(t, d.Rest(single{t, new(atomic.Int32)}), "pages-7.img", 1<<20)
	for i := range areas {
		want := bytes.Repeat([]byte{byte((i+1)*(blockPages+1) - 1)}, pageSize)
		if !bytes.Equal(got[i*pageSize:][:pageSize], want) {
			t.Errorf("page %d of the rest is another", i)
		}
	}
	if len(got) != areas*pageSize {
		t.Errorf("the rest has %d bytes, want %d", len(got), areas*pageSize)
	}
}

// single is a Source that holds one read at a time; each page is full of its number.
type single struct {
	t    *testing.T
	held *atomic.Int32
}

func (s single) Read(_ string, offset int64, n int, use func(parts [][]byte) error) error {
	if s.held.Add(1) > 1 {
		s.t.Error("a read begins while another is held")
	}
	defer s.held.Add(-1)
	p := make([]byte, n)
	for i := range p {
		p[i] = byte((offset + int64(i)) / pageSize)
	}
	return use([][]byte{p})
}

// readAll reads an image by steps, as CRIU does.
func readAll(t testing.TB, source Source, name string, step int) []byte {
	t.Helper()
	var got []byte
	for more := true; more; {
		more = false
		must(t, source.Read(name, int64(len(got)), step, func(parts [][]byte) error {
			for _, p := range parts {
				got = append(got, p...)
				more = more || len(p) > 0
			}
			return nil
		}))
	}
	return got
}

func TestWhatIsLeftToCRIU(t *testing.T) {
	const start, end = 0x200000, 0x200000 + 64*pageSize
	readOnly := anonymous(start, end)
	*readOnly.Prot = unix.PROT_READ
	for name, build := range map[string]func(dir string) map[int]int{
		"all that parent and child may share": func(dir string) map[int]int {
			image(t, dir, 1, 7, true, []pageRun{{start, 64, flags}}, anonymous(start, end))
			image(t, dir, 2, 8, true, []pageRun{{start + 32*pageSize, 32, flags}}, anonymous(start+32*pageSize, end))
			return map[int]int{1: 0, 2: 1}
		},
		"what a child cannot write any more": func(dir string) map[int]int {
			image(t, dir, 1, 7, true, []pageRun{{start, 64, flags}}, anonymous(start, end))
			image(t, dir, 2, 8, true, []pageRun{{start, 32, flags}}, readOnly)
			return map[int]int{1: 0, 2: 1}
		},
		"what cannot be written": func(dir string) map[int]int {
			image(t, dir, 1, 7, true, []pageRun{{start, 64, flags}}, readOnly)
			return map[int]int{1: 0}
		},
		"files": func(dir string) map[int]int {
			image(t, dir, 1, 7, true, []pageRun{{start, 64, flags}}, areaOf(start, end, areaRegular|1<<6, unix.MAP_PRIVATE))
			return map[int]int{1: 0}
		},
		"little": func(dir string) map[int]int {
			image(t, dir, 1, 7, true, []pageRun{{start, worthwhile - 1, flags}}, anonymous(start, end))
			return map[int]int{1: 0}
		},
		"an image of another size": func(dir string) map[int]int {
			image(t, dir, 1, 7, true, []pageRun{{start, 63, flags}}, anonymous(start, end))
			return map[int]int{1: 0}
		},
		"what is in a parent": func(dir string) map[int]int {
			image(t, dir, 1, 7, true, []pageRun{{start, 64, flags | pageParent}}, anonymous(start, end))
			return map[int]int{1: 0}
		},
		"the images of a zombie": func(string) map[int]int { return map[int]int{1: 0} },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			parents := build(dir)
			sizes := map[string]int64{"pages-7.img": 64 * pageSize, "pages-8.img": 32 * pageSize}
			if name == "little" {
				sizes["pages-7.img"] = (worthwhile - 1) * pageSize
			}
			before := files(t, dir)
			d, err := Divide(dir, sizes, parents)
			must(t, err)
			if got := d.Sizes(); !maps.Equal(got, sizes) || len(d.blocks()) > 0 {
				t.Errorf("%d blocks are taken; the sizes are %v", len(d.blocks()), got)
			}
			if !maps.Equal(files(t, dir), before) {
				t.Error("images were changed")
			}
		})
	}
}

// TestSiblingsHaveNothingToShare has two children at the same addresses.
func TestSiblingsHaveNothingToShare(t *testing.T) {
	const start, end = 0x200000, 0x200000 + 64*pageSize
	dir := t.TempDir()
	image(t, dir, 1, 6, true, []pageRun{{0x1000, 1, flags}}, anonymous(0x1000, 0x2000))
	for _, pid := range []int{2, 3} {
		image(t, dir, pid, 5+pid, true, []pageRun{{start, 64, flags}}, anonymous(start, end))
	}
	sizes := map[string]int64{"pages-6.img": pageSize, "pages-7.img": 64 * pageSize, "pages-8.img": 64 * pageSize}
	d, err := Divide(dir, sizes, map[int]int{1: 0, 2: 1, 3: 1})
	must(t, err)
	if want := map[string]int64{"pages-6.img": pageSize, "pages-7.img": 0, "pages-8.img": 0}; !maps.Equal(d.Sizes(), want) {
		t.Errorf("the sizes are %v, want %v", d.Sizes(), want)
	}
}

func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := make(map[string]string)
	list, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range list {
		content, err := os.ReadFile(filepath.Join(dir, e.Name()))
		must(t, err)
		found[e.Name()] = string(content)
	}
	return found
}

func TestFillSaysWhatFailed(t *testing.T) {
	const start, pages = 0x1000, 64 // below vm.mmap_min_addr: nobody has it
	dir := t.TempDir()
	image(t, dir, 1, 7, true, []pageRun{{start, pages, flags}}, anonymous(start, start+pages*pageSize))
	content := stored{"pages-7.img": randomPages(pages)}
	d, err := Divide(dir, content.sizes(), map[int]int{1: 0})
	must(t, err)
	if err := d.Fill(t.Context(), content, map[int]int{1: os.Getpid()}); !errors.Is(err, ErrNotFilled) || !errors.Is(err, unix.EFAULT) {
		t.Errorf("memory that is not there: %v", err)
	}
	if err := d.Fill(t.Context(), content, map[int]int{}); !errors.Is(err, ErrNotFilled) {
		t.Errorf("a process that is not there: %v", err)
	}
	broken := errors.New("damaged")
	if err := d.Fill(t.Context(), failing{broken}, map[int]int{1: os.Getpid()}); !errors.Is(err, broken) {
		t.Errorf("content that cannot be read: %v", err)
	}
}

type failing struct{ err error }

func (f failing) Read(string, int64, int, func([][]byte) error) error { return f.err }

// TestEveryPageIsFilledOnce divides pagemaps and areas of all shapes.
func TestEveryPageIsFilledOnce(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		m := &pagemap{head: []byte{8, 7}, id: 7}
		address := uint64(0)
		for range rapid.IntRange(0, 12).Draw(rt, "runs") {
			address += rapid.Uint64Range(0, 5).Draw(rt, "gap") * pageSize
			n := rapid.OneOf(rapid.Uint64Range(1, 40), rapid.Uint64Range(blockPages-2, 2*blockPages)).Draw(rt, "pages")
			m.entries = append(m.entries, pageRun{address, n, flags})
			address += n * pageSize
		}
		var areas []area
		for at := uint64(0); at < address && rapid.IntRange(0, 9).Draw(rt, "more") > 0; {
			at += rapid.Uint64Range(0, 40).Draw(rt, "between") * pageSize
			end := at + rapid.Uint64Range(1, 2*blockPages).Draw(rt, "long")*pageSize
			areas = append(areas, area{at, end, true})
			at = end
		}
		left, rest, taken := m.split(areas)
		owner := make(map[int64]uint64) // address by page of the image
		for i, r := range taken {
			if i > 0 && r.first < taken[i-1].first || r.first/blockPages != (r.first+r.pages-1)/blockPages {
				rt.Fatalf("the runs are %v", taken)
			}
			for n := range r.pages {
				owner[int64(r.first+n)] = r.address + uint64(n)*pageSize
			}
		}
		var addresses []uint64
		for _, r := range left.entries {
			for n := range r.pages {
				addresses = append(addresses, r.address+n*pageSize)
			}
		}
		for _, s := range rest {
			for n := range s.pages {
				if _, twice := owner[s.first+n]; twice || len(addresses) == 0 {
					rt.Fatalf("page %d is filled twice, or has no address", s.first+n)
				}
				owner[s.first+n], addresses = addresses[0], addresses[1:]
			}
		}
		var page int64
		for _, r := range m.entries {
			for n := range r.pages {
				if got, ok := owner[page]; !ok || got != r.address+n*pageSize {
					rt.Fatalf("page %d goes to %#x, want %#x", page, got, r.address+n*pageSize)
				}
				page++
			}
		}
		if len(owner) != int(page) || len(addresses) > 0 {
			rt.Fatalf("%d pages are filled of %d", len(owner), page)
		}
	})
}
