package pages

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

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

// errOdd says that images are not as expected, and so are left as they are.
var errOdd = errors.New("not as expected")

// area is a stretch of addresses.
type area struct {
	start, end uint64
	writable   bool
}

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
		a := area{v.GetStart(), v.GetEnd(), v.GetProt()&unix.PROT_WRITE != 0}
		if n := len(areas); n > 0 && a.start < areas[n-1].end || a.start >= a.end || (a.start|a.end)%pageSize != 0 {
			return nil, errOdd
		}
		areas = append(areas, a)
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

// add appends a run, or lengthens the last by it.
func (m *pagemap) add(r pageRun) {
	if n := len(m.entries); n > 0 {
		last := &m.entries[n-1]
		if last.flags == r.flags && last.address+last.pages*pageSize == r.address {
			last.pages += r.pages
			return
		}
	}
	m.entries = append(m.entries, r)
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
