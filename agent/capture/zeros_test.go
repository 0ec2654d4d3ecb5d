package capture

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// process writes the images of a process with one anonymous and one file area.
func process(t *testing.T, dir string, wide bool, runs []pageRun, content []byte) {
	t.Helper()
	areaOf := func(start, end uint64, status, flags uint32) *vma.VmaEntry {
		return &vma.VmaEntry{
			Start: &start, End: &end, Pgoff: proto.Uint64(0), Shmid: proto.Uint64(0), Prot: proto.Uint32(3),
			Flags: &flags, Status: &status, Fd: proto.Int64(-1),
		}
	}
	entry := &mm.MmEntry{
		MmStartCode: proto.Uint64(0), MmEndCode: proto.Uint64(0), MmStartData: proto.Uint64(0), MmEndData: proto.Uint64(0),
		MmStartStack: proto.Uint64(0), MmStartBrk: proto.Uint64(0), MmBrk: proto.Uint64(0), MmArgStart: proto.Uint64(0),
		MmArgEnd: proto.Uint64(0), MmEnvStart: proto.Uint64(0), MmEnvEnd: proto.Uint64(0), ExeFileId: proto.Uint32(1),
		Vmas: []*vma.VmaEntry{
			areaOf(0x10000, 0x20000, areaRegular|1<<6, unix.MAP_PRIVATE),
			areaOf(0x20000, 0x40000, areaRegular|areaAnonPrivate, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS),
		},
	}
	message, err := proto.Marshal(entry)
	must(t, err)
	image := binary.LittleEndian.AppendUint32(nil, commonMagic)
	image = binary.LittleEndian.AppendUint32(image, mmMagic)
	image = binary.LittleEndian.AppendUint32(image, uint32(len(message)))
	must(t, os.WriteFile(filepath.Join(dir, "mm-1.img"), append(image, message...), 0o600))
	m := &pagemap{head: []byte{8, 7}, id: 7, wide: wide, entries: runs}
	must(t, os.WriteFile(filepath.Join(dir, "pagemap-1.img"), m.encode(), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "pages-7.img"), content, 0o600))
}

func pagesOf(kinds string) []byte {
	var out []byte
	for _, kind := range kinds {
		fill := byte(kind)
		if kind == '0' {
			fill = 0
		}
		out = append(out, bytes.Repeat([]byte{fill}, pageSize)...)
	}
	return out
}

func TestZeroPagesOfAnonymousMemoryAreDropped(t *testing.T) {
	for _, wide := range []bool{false, true} {
		dir := t.TempDir()
		const flags = pagePresent | 2
		process(t, dir, wide, []pageRun{
			{0x1e000, 4, flags}, // two pages of a file's area, two anonymous ones
			{0x30000, 3, flags},
			{0x50000, 1, flags}, // in no area
		}, pagesOf("0a0b"+"00c"+"0"))
		saved, err := DropZeroPages(dir)
		must(t, err)
		if saved != 3*pageSize {
			t.Errorf("saved %d bytes, want those of 3 pages", saved)
		}
		m, err := readPagemap(filepath.Join(dir, "pagemap-1.img"))
		must(t, err)
		want := []pageRun{{0x1e000, 2, flags}, {0x21000, 1, flags}, {0x32000, 1, flags}, {0x50000, 1, flags}}
		if m.wide != wide || m.id != 7 || !slices.Equal(m.entries, want) {
			t.Errorf("the map is %+v, want the runs %v", m, want)
		}
		content, err := os.ReadFile(filepath.Join(dir, "pages-7.img"))
		must(t, err)
		if !bytes.Equal(content, pagesOf("0abc0")) {
			t.Error("the pages image does not hold the kept pages in their order")
		}
		if again, err := DropZeroPages(dir); again != 0 || err != nil {
			t.Errorf("a second time saved %d (%v)", again, err)
		}
	}
}

func TestOddImagesAreLeftAlone(t *testing.T) {
	const flags = pagePresent
	for name, runs := range map[string][]pageRun{
		"in a parent":   {{0x20000, 2, flags | pageParent}},
		"not present":   {{0x20000, 2, 0}},
		"too few pages": {{0x20000, 3, flags}},
		"unaligned":     {{0x20001, 2, flags}},
	} {
		dir := t.TempDir()
		process(t, dir, true, runs, pagesOf("00"))
		before, err := os.ReadFile(filepath.Join(dir, "pagemap-1.img"))
		must(t, err)
		saved, err := DropZeroPages(dir)
		must(t, err)
		after, err := os.ReadFile(filepath.Join(dir, "pagemap-1.img"))
		must(t, err)
		if saved != 0 || !bytes.Equal(before, after) {
			t.Errorf("%s: saved %d bytes", name, saved)
		}
	}
}

func FuzzReadPagemap(f *testing.F) {
	m := &pagemap{head: []byte{8, 7}, id: 7, wide: true, entries: []pageRun{{0x1000, 4, pagePresent}}}
	f.Add(m.encode())
	f.Fuzz(func(t *testing.T, image []byte) {
		name := filepath.Join(t.TempDir(), "pagemap")
		must(t, os.WriteFile(name, image, 0o600))
		got, err := readPagemap(name)
		if err != nil {
			if !errors.Is(err, errOdd) {
				t.Errorf("got %v", err)
			}
			return
		}
		must(t, os.WriteFile(name, got.encode(), 0o600))
		again, err := readPagemap(name)
		must(t, err)
		if !slices.Equal(again.entries, got.entries) {
			t.Errorf("%v became %v", got.entries, again.entries)
		}
	})
}
