package criu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v7/magic"
	"github.com/checkpoint-restore/go-criu/v7/stats"
	"google.golang.org/protobuf/proto"
)

// DumpStats are CRIU's own figures of a dump.
type DumpStats struct {
	Freezing     time.Duration `json:"freezing_ns"` // until all processes stood still
	Frozen       time.Duration `json:"frozen_ns"`   // that they stood still
	MemDump      time.Duration `json:"memdump_ns"`  // draining pages into pipes
	MemWrite     time.Duration `json:"memwrite_ns"` // writing pages to the images
	PagesScanned uint64        `json:"pages_scanned"`
	PagesWritten uint64        `json:"pages_written"`
	// Shared memory is counted apart.
	SharedPagesScanned uint64 `json:"shared_pages_scanned"`
	SharedPagesWritten uint64 `json:"shared_pages_written"`
}

// RestoreStats are CRIU's own figures of a restore.
type RestoreStats struct {
	Forking       time.Duration `json:"forking_ns"`
	Restore       time.Duration `json:"restore_ns"`
	PagesRestored uint64        `json:"pages_restored"`
}

// TreeProcess is one process of the dumped tree; numbers are those inside the
// tree's pid namespace.
type TreeProcess struct {
	PID, PPID, PGID, SID int
	Threads              []int
}

// Image files begin with two magic numbers, one of all images and one of their kind,
// but for the inventory, which has only that of its kind (CRIU's own table of them is
// in the magic package); entries follow, each a length and a protobuf message, all
// little endian. Statistics are such a file too.
const (
	magicSize = 4
	maxEntry  = 64 << 20 // far above any entry but raw page data, which we do not read

	pstreeFile       = "pstree.img"
	statsDumpFile    = "stats-dump"
	statsRestoreFile = "stats-restore"
)

var errBadImage = errors.New("not a CRIU image")

// readEntries calls entry with each message of an image whose second magic
// number has the given name. The slice is valid during the call.
func readEntries(r io.Reader, name string, entry func([]byte) error) error {
	var common [magicSize]byte
	if _, err := io.ReadFull(r, common[:]); err != nil {
		return fmt.Errorf("%w: %w", errBadImage, noEOF(err))
	}
	return readKind(r, name, entry)
}

// readKind is readEntries for an image that has no other than the magic number of
// its kind.
func readKind(r io.Reader, name string, entry func([]byte) error) error {
	var kind [magicSize]byte
	if _, err := io.ReadFull(r, kind[:]); err != nil {
		return fmt.Errorf("%w: %w", errBadImage, noEOF(err))
	}
	known := magic.LoadMagic()
	if got := known.ByValue[uint64(binary.LittleEndian.Uint32(kind[:]))]; got != name {
		return fmt.Errorf("%w: its kind is %q, expected %q", errBadImage, got, name)
	}
	var buf []byte
	for {
		var size uint32
		switch err := binary.Read(r, binary.LittleEndian, &size); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("%w: %w", errBadImage, err)
		case size > maxEntry:
			return fmt.Errorf("%w: an entry of %d bytes", errBadImage, size)
		}
		var err error
		if buf, err = readSized(r, buf[:0], int(size)); err != nil {
			return fmt.Errorf("%w: %w", errBadImage, noEOF(err))
		}
		if err := entry(buf); err != nil {
			return err
		}
	}
}

func appendEntry(image *bytes.Buffer, entry []byte) {
	_ = binary.Write(image, binary.LittleEndian, uint32(len(entry)))
	image.Write(entry)
}

// writeImage puts an image in the place of one that may be there.
func writeImage(path string, image []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, image, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// readSized reads n bytes without trusting n before they are there.
func readSized(r io.Reader, buf []byte, n int) ([]byte, error) {
	const step = 64 << 10
	for len(buf) < n {
		have := len(buf)
		buf = append(buf, make([]byte, min(step, n-have))...)
		if _, err := io.ReadFull(r, buf[have:]); err != nil {
			return buf, err
		}
	}
	return buf, nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// ReadTree reads the process tree of a set of images.
func ReadTree(imagesDir string) ([]TreeProcess, error) {
	f, err := os.Open(filepath.Join(imagesDir, pstreeFile))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	tree, err := readTree(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return tree, nil
}

func readTree(r io.Reader) ([]TreeProcess, error) {
	var tree []TreeProcess
	err := readEntries(r, "PSTREE", func(b []byte) error {
		var e pstree.PstreeEntry
		if err := proto.Unmarshal(b, &e); err != nil {
			return fmt.Errorf("%w: %w", errBadImage, err)
		}
		p := TreeProcess{PID: int(e.GetPid()), PPID: int(e.GetPpid()), PGID: int(e.GetPgid()), SID: int(e.GetSid())}
		for _, t := range e.GetThreads() {
			p.Threads = append(p.Threads, int(t))
		}
		tree = append(tree, p)
		return nil
	})
	return tree, err
}

// ReadDumpStats reads a dump's statistics from its work directory.
func ReadDumpStats(workDir string) (DumpStats, error) {
	entry, err := readStats(filepath.Join(workDir, statsDumpFile))
	if err != nil {
		return DumpStats{}, err
	}
	d := entry.GetDump()
	return DumpStats{
		Freezing:           microseconds(d.GetFreezingTime()),
		Frozen:             microseconds(d.GetFrozenTime()),
		MemDump:            microseconds(d.GetMemdumpTime()),
		MemWrite:           microseconds(d.GetMemwriteTime()),
		PagesScanned:       d.GetPagesScanned(),
		PagesWritten:       d.GetPagesWritten(),
		SharedPagesScanned: d.GetShpagesScanned(),
		SharedPagesWritten: d.GetShpagesWritten(),
	}, nil
}

// ReadRestoreStats reads a restore's statistics from its work directory.
func ReadRestoreStats(workDir string) (RestoreStats, error) {
	entry, err := readStats(filepath.Join(workDir, statsRestoreFile))
	if err != nil {
		return RestoreStats{}, err
	}
	r := entry.GetRestore()
	return RestoreStats{
		Forking:       microseconds(r.GetForkingTime()),
		Restore:       microseconds(r.GetRestoreTime()),
		PagesRestored: r.GetPagesRestored(),
	}, nil
}

func readStats(path string) (*stats.StatsEntry, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var entry stats.StatsEntry
	err = readEntries(f, "STATS", func(b []byte) error { return proto.Unmarshal(b, &entry) })
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &entry, nil
}

func microseconds(n uint32) time.Duration { return time.Duration(n) * time.Microsecond }

// imageBytes is the size of all files in a directory.
func imageBytes(dir string) (int64, error) {
	var sum int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		sum += info.Size()
		return nil
	})
	return sum, err
}
