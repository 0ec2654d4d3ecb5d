package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"

	"dormouse/agent/pagefs"
	"dormouse/repository"

	"github.com/shirou/gopsutil/v3/mem"
	"golang.org/x/sys/unix"
)

// Room that is left to others when images are kept in memory or on a disk.
const (
	memoryReserve = 512 << 20
	diskReserve   = 64 << 20
)

// spooler gives out directories for images on their way between CRIU and the
// repository. They are in memory (a tmpfs of their own, so that giving one back
// is one unmount) when the node's memory comfortably holds them, else on disk.
//
// The mounts are made in the agent's mount namespace and vanish with it: what
// an agent captured in memory is lost when it ends.
type spooler struct {
	disk   string
	memory string
	limit  int64 // of all in memory together; 0: what the host can spare; negative: none
	fuse   bool  // the kernel has file systems in user space

	mu   sync.Mutex
	used int64 // promised to directories in memory
}

// spoolDir is one such directory.
type spoolDir struct {
	path     string
	inMemory bool
	promised int64
	owner    *spooler
}

func newSpooler(c Config) (*spooler, error) {
	s := &spooler{disk: c.Spool, memory: filepath.Join(c.State, "memory"), limit: c.SpoolMemBytes}
	for _, dir := range []string{s.disk, s.memory} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("agent: spool directory: %w", err)
		}
	}
	s.fuse = !c.RestoreFromSpool && pagefs.Usable(s.memory)
	return s, nil
}

// sizeOfRestore is how much room a restore needs: for all images, or for those
// that CRIU does not read through a memorySource; and for the fingerprints of
// pages.
func (s *spooler) sizeOfRestore(ctx context.Context, part *repository.PartReader) (int64, error) {
	var images, memory int64
	for e, err := range part.Images(ctx) {
		if err != nil {
			return 0, err
		}
		if isPages(e.Path) {
			memory += e.Size
		} else {
			images += e.Size
		}
	}
	size := images + memory/256 + slack
	if !s.fuse {
		size += memory
	}
	return size, nil
}

// errNoRoom is wrapped by the error for a spool that has too little room.
var errNoRoom = errors.New("no space")

// open makes the directory name with room for size bytes. what is who needs it,
// for the error: "the checkpoint".
func (s *spooler) open(name, what string, size int64) (*spoolDir, error) {
	if d, err := s.openInMemory(name, size); d != nil || err != nil {
		return d, err
	}
	free, err := freeBytes(s.disk)
	if err != nil {
		return nil, err
	}
	if free-diskReserve < size {
		return nil, fmt.Errorf("%w for %s on %s: needs about %s, %s free", errNoRoom, what, s.disk, bytesText(size), bytesText(free))
	}
	d := &spoolDir{path: filepath.Join(s.disk, name), owner: s}
	if err := os.Mkdir(d.path, 0o700); err != nil {
		return nil, err
	}
	return d, nil
}

// openInMemory returns nil when memory does not comfortably hold size bytes.
func (s *spooler) openInMemory(name string, size int64) (*spoolDir, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	room, err := s.memoryRoom()
	if err != nil {
		return nil, err
	}
	if size > room {
		return nil, nil
	}
	// An estimate may be wrong by some; the limit keeps a wrong one from eating
	// the memory of others.
	bound := min(size+size/2+memoryReserve/2, room)
	d := &spoolDir{path: filepath.Join(s.memory, name), inMemory: true, promised: bound, owner: s}
	if err := os.Mkdir(d.path, 0o700); err != nil {
		return nil, err
	}
	if err := mountSpool(d.path, bound); err != nil {
		os.Remove(d.path)
		return nil, os.NewSyscallError("mount tmpfs", err)
	}
	s.used += bound
	return d, nil
}

// mountSpool mounts a tmpfs, of huge pages where a file fills them and the kernel
// has them: they are allocated, cleared, written and read in half the time.
func mountSpool(path string, size int64) error {
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	options := fmt.Sprintf("size=%d,mode=700", size)
	err := unix.Mount("dormouse-spool", path, "tmpfs", flags, options+",huge=within_size")
	if errors.Is(err, unix.EINVAL) {
		err = unix.Mount("dormouse-spool", path, "tmpfs", flags, options)
	}
	return err
}

// memoryRoom is how much memory images may take now.
func (s *spooler) memoryRoom() (int64, error) {
	if s.limit < 0 {
		return -1, nil
	}
	memory, err := mem.VirtualMemory()
	if err != nil {
		return 0, fmt.Errorf("read the free memory: %w", err)
	}
	// Tasks grow: only half of what is free now is taken.
	room := int64(memory.Available)/2 - memoryReserve - s.used
	if s.limit > 0 {
		room = min(room, s.limit-s.used)
	}
	return room, nil
}

// allocate has the kernel find, and a hypervisor back, memory for the first size
// bytes of a file on a tmpfs, in huge pages if it can. A failure costs time only.
func allocate(ctx context.Context, f *os.File, size int64) {
	if size == 0 || f.Truncate(size) != nil {
		return
	}
	// A window at a time: what is mapped counts as the agent's memory. By all
	// cores: most of the time may be the hypervisor's.
	const window = 16 << 20
	var next atomic.Int64
	var group sync.WaitGroup
	for range runtime.NumCPU() {
		group.Go(func() {
			for ctx.Err() == nil {
				at := next.Add(window) - window
				if at >= size || populate(f, at, int(min(size-at, window))) != nil {
					return
				}
			}
		})
	}
	group.Wait()
}

// populate has the kernel allocate a part of a file on a tmpfs.
func populate(f *os.File, at int64, size int) error {
	pages, err := unix.Mmap(int(f.Fd()), at, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer unix.Munmap(pages)
	return unix.Madvise(pages, unix.MADV_POPULATE_WRITE) // madvise(2), since Linux 5.14
}

// close removes the directory and its contents. It may be called again.
func (d *spoolDir) close() error {
	if !d.inMemory {
		// Of an agent that died within a restore; as a rule there is none.
		_ = unix.Unmount(memoryDir(filepath.Join(d.path, imagesDir)), unix.MNT_DETACH)
		return os.RemoveAll(d.path)
	}
	if err := unix.Unmount(d.path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return os.NewSyscallError("unmount", err)
	}
	d.owner.mu.Lock()
	d.owner.used -= d.promised
	d.owner.mu.Unlock()
	d.promised = 0
	if err := os.Remove(d.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// leftovers returns what an earlier agent left: nothing in memory survives it,
// so its mount points are removed.
func (s *spooler) leftovers() (onDisk []*spoolDir, err error) {
	points, err := os.ReadDir(s.memory)
	if err != nil {
		return nil, err
	}
	for _, point := range points {
		dead := &spoolDir{path: filepath.Join(s.memory, point.Name()), inMemory: true, owner: s}
		if err := dead.close(); err != nil {
			return nil, err
		}
	}
	dirs, err := os.ReadDir(s.disk)
	if err != nil {
		return nil, err
	}
	for _, dir := range dirs {
		onDisk = append(onDisk, &spoolDir{path: filepath.Join(s.disk, dir.Name()), owner: s})
	}
	return onDisk, nil
}

func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// bytesText says a size as people do.
func bytesText(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d KiB", (n+1023)>>10)
}
