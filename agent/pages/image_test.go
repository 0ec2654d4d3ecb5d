package pages

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// process writes the images of a process with one anonymous and one file area.
func process(t *testing.T, dir string, wide bool, runs []pageRun, content []byte) {
	t.Helper()
	image(t, dir, 1, 7, wide, runs, areaOf(0x10000, 0x20000, areaRegular|1<<6, unix.MAP_PRIVATE), anonymous(0x20000, 0x40000))
	must(t, os.WriteFile(filepath.Join(dir, "pages-7.img"), content, 0o600))
}

func areaOf(start, end uint64, status, flags uint32) *vma.VmaEntry {
	return &vma.VmaEntry{
		Start: &start, End: &end, Pgoff: proto.Uint64(0), Shmid: proto.Uint64(0), Prot: proto.Uint32(unix.PROT_READ | unix.PROT_WRITE),
		Flags: &flags, Status: &status, Fd: proto.Int64(-1),
	}
}

func anonymous(start, end uint64) *vma.VmaEntry {
	return areaOf(start, end, areaRegular|areaAnonPrivate, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
}

// image writes the images of a process but for its pages.
func image(t *testing.T, dir string, pid, id int, wide bool, runs []pageRun, areas ...*vma.VmaEntry) {
	t.Helper()
	entry := &mm.MmEntry{
		MmStartCode: proto.Uint64(0), MmEndCode: proto.Uint64(0), MmStartData: proto.Uint64(0), MmEndData: proto.Uint64(0),
		MmStartStack: proto.Uint64(0), MmStartBrk: proto.Uint64(0), MmBrk: proto.Uint64(0), MmArgStart: proto.Uint64(0),
		MmArgEnd: proto.Uint64(0), MmEnvStart: proto.Uint64(0), MmEnvEnd: proto.Uint64(0), ExeFileId: proto.Uint32(1),
		Vmas: areas,
	}
	message, err := proto.Marshal(entry)
	must(t, err)
	p := binary.LittleEndian.AppendUint32(nil, commonMagic)
	p = binary.LittleEndian.AppendUint32(p, mmMagic)
	p = binary.LittleEndian.AppendUint32(p, uint32(len(message)))
	must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("mm-%d.img", pid)), append(p, message...), 0o600))
	m := &pagemap{head: []byte{8, byte(id)}, id: uint64(id), wide: wide, entries: runs}
	must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("pagemap-%d.img", pid)), m.encode(), 0o600))
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
