package capture

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// CRIU stores every page that was ever written, also those full of zeros. In
// private anonymous memory a page that is missing in the images reads as zeros
// after a restore, too: without them images are smaller, and CRIU and the task
// need not carry them. See criu/pagemap.c and images/pagemap.proto of CRIU 4.2.
const (
	pageSize  = 4096
	mapLimit  = 64 << 20 // of the images that describe memory; they are far smaller
	imagesHdr = 8        // two magic numbers

	commonMagic  = 0x54564319 // IMG_COMMON_MAGIC
	pagemapMagic = 0x56084025 // PAGEMAP_MAGIC
	mmMagic      = 0x57492820 // MM_MAGIC

	pagePresent = 1 << 2 // PE_PRESENT: the pages are in the pages image
	pageParent  = 1 << 0 // PE_PARENT: they are in another dump's images

	areaRegular, areaHeap, areaAnonPrivate = 1 << 0, 1 << 5, 1 << 9 // criu/include/image.h, VMA_*
)

var zeroPage [pageSize]byte

// errOdd says that images are not as expected, and so are left as they are.
var errOdd = errors.New("not as expected")

// DropZeroPages removes pages full of zeros from the private anonymous memory
// of the images in dir, and returns the bytes saved. Images in a form it does
// not know are left alone. It changes the images in place: when it fails
// half-way they are worthless, which the error says.
func DropZeroPages(dir string) (saved int64, err error) {
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

// area is a stretch of addresses.
type area struct{ start, end uint64 }

// anonymousAreas returns the private anonymous areas of a process, ascending.
func anonymousAreas(name string) ([]area, error) {
	messages, err := readImage(name, mmMagic)
	if err != nil || len(messages) != 1 {
		return nil, errors.Join(errOdd, err)
	}
	var entry mm.MmEntry
	if err := proto.Unmarshal(messages[0], &entry); err != nil {
		return nil, fmt.Errorf("%w: %w", errOdd, err)
	}
	var areas []area
	for _, v := range entry.GetVmas() {
		const kind = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_HUGETLB | unix.MAP_GROWSDOWN | unix.MAP_SHARED
		if v.GetStatus()&^areaHeap != areaRegular|areaAnonPrivate || v.GetFlags()&kind != unix.MAP_PRIVATE|unix.MAP_ANONYMOUS {
			continue
		}
		if n := len(areas); n > 0 && v.GetStart() < areas[n-1].end {
			return nil, errOdd
		}
		areas = append(areas, area{v.GetStart(), v.GetEnd()})
	}
	return areas, nil
}

// pagemap is a pagemap image.
type pagemap struct {
	head    []byte // its first message
	id      uint64 // of the pages image
	wide    bool   // counts are in field 5, as since CRIU 4.2, else in field 2
	entries []pageRun
}

// pageRun is a run of pages that follow one another in memory and in the image.
type pageRun struct {
	address, pages, flags uint64
}

func (r pageRun) present() bool { return r.flags&pagePresent != 0 }

func readPagemap(name string) (*pagemap, error) {
	messages, err := readImage(name, pagemapMagic)
	if err != nil || len(messages) == 0 {
		return nil, errors.Join(errOdd, err)
	}
	m := &pagemap{head: messages[0]}
	head, err := varints(messages[0], 1)
	if err != nil {
		return nil, err
	}
	m.id = head[1]
	for i, message := range messages[1:] {
		f, err := varints(message, 1, 2, 4, 5)
		if err != nil {
			return nil, err
		}
		wide := f[5] != 0
		if i > 0 && wide != m.wide || wide && f[2] != 0 && f[2] != f[5] {
			return nil, errOdd
		}
		m.wide = wide
		r := pageRun{address: f[1], pages: max(f[2], f[5]), flags: f[4]}
		if !r.present() || r.flags&pageParent != 0 || r.address%pageSize != 0 || r.pages > math.MaxInt32 {
			return nil, errOdd
		}
		m.entries = append(m.entries, r)
	}
	return m, nil
}

func (m *pagemap) bytes() int64 {
	var total int64
	for _, r := range m.entries {
		total += int64(r.pages) * pageSize
	}
	return total
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
				kept.add(r.address, r.flags)
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

func (m *pagemap) add(address, flags uint64) {
	if n := len(m.entries); n > 0 {
		last := &m.entries[n-1]
		if last.flags == flags && last.address+last.pages*pageSize == address {
			last.pages++
			return
		}
	}
	m.entries = append(m.entries, pageRun{address: address, pages: 1, flags: flags})
}

func (m *pagemap) encode() []byte {
	out := binary.LittleEndian.AppendUint32(nil, commonMagic)
	out = binary.LittleEndian.AppendUint32(out, pagemapMagic)
	message := func(p []byte) {
		out = binary.LittleEndian.AppendUint32(out, uint32(len(p)))
		out = append(out, p...)
	}
	message(m.head)
	for _, r := range m.entries {
		narrow, wide := r.pages, uint64(0)
		if m.wide {
			narrow, wide = 0, r.pages
		}
		var p []byte
		for _, field := range []struct {
			number protowire.Number
			value  uint64
		}{{1, r.address}, {2, narrow}, {4, r.flags}, {5, wide}} {
			if field.number == 5 && !m.wide {
				continue
			}
			p = protowire.AppendTag(p, field.number, protowire.VarintType)
			p = protowire.AppendVarint(p, field.value)
		}
		message(p)
	}
	return out
}

// readImage returns the messages of an image of a kind.
func readImage(name string, magic uint32) ([][]byte, error) {
	info, err := os.Stat(name)
	if err != nil || info.Size() > mapLimit {
		return nil, errors.Join(errOdd, err)
	}
	p, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	if len(p) < imagesHdr || binary.LittleEndian.Uint32(p) != commonMagic || binary.LittleEndian.Uint32(p[4:]) != magic {
		return nil, errOdd
	}
	var messages [][]byte
	for p = p[imagesHdr:]; len(p) > 0; {
		if len(p) < 4 || uint64(len(p)-4) < uint64(binary.LittleEndian.Uint32(p)) {
			return nil, errOdd
		}
		n := binary.LittleEndian.Uint32(p)
		messages = append(messages, p[4:4+n])
		p = p[4+n:]
	}
	return messages, nil
}

// varints returns the fields of a message that has none but those allowed, all
// of them integers.
func varints(p []byte, allowed ...protowire.Number) (map[protowire.Number]uint64, error) {
	fields := map[protowire.Number]uint64{}
	for len(p) > 0 {
		number, kind, n := protowire.ConsumeTag(p)
		if n < 0 || kind != protowire.VarintType || !slices.Contains(allowed, number) {
			return nil, errOdd
		}
		value, m := protowire.ConsumeVarint(p[n:])
		if m < 0 {
			return nil, errOdd
		}
		fields[number] = value
		p = p[n+m:]
	}
	return fields, nil
}
