package criu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// When CRIU dies in the middle of a dump the kernel detaches it from the
// processes, and its code inside them notices and removes itself: they run on.
// Two things stay behind. TCP sockets are in repair mode, in which the
// application's send(2) and recv(2) fail with EPERM; and the cgroup is thawed,
// or frozen, depending on the instant.
//
// guard holds a duplicate of every TCP socket of the tree during a dump. Its
// hold runs while the dying CRIU still has the processes stopped (child.go), so
// that they never see an unusable socket.
type guard struct {
	freezer freezer
	pids    []int
	stopped map[int]bool // that were stopped by a signal before the dump

	mu      sync.Mutex
	sockets []heldSocket
	held    bool
}

// heldSocket is our duplicate of a TCP socket of the tree.
type heldSocket struct {
	fd    int
	reuse int // SO_REUSEADDR before the dump; leaving repair mode clears it
}

// newGuard looks at the tree before the dump. The caller must close it.
func newGuard(pids []int, freezeDir string) (*guard, error) {
	g := &guard{pids: pids, stopped: map[int]bool{}}
	var err error
	if g.freezer, err = readFreezer(freezeDir); err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for _, pid := range pids {
		if state(pid) == 'T' {
			g.stopped[pid] = true
		}
		if err := g.duplicate(pid, seen); err != nil && !gone(err) {
			g.close()
			return nil, fmt.Errorf("duplicate the TCP sockets of process %d: %w", pid, err)
		}
	}
	return g, nil
}

// duplicate adds the TCP sockets of one process.
func (g *guard) duplicate(pid int, seen map[string]bool) error {
	return EachTCPSocket(pid, seen, func(fd int) error {
		own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		reuse, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR)
		g.sockets = append(g.sockets, heldSocket{own, reuse})
		return nil
	})
}

// EachTCPSocket calls do with a duplicate of each TCP socket of a process, which
// it closes afterwards. seen has those known already, by their link text
// "socket:[INODE]": processes share them.
func EachTCPSocket(pid int, seen map[string]bool, do func(fd int) error) error {
	dir := procPath(pid, "fd")
	fds, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	pidfd := -1
	defer func() {
		if pidfd >= 0 {
			unix.Close(pidfd)
		}
	}()
	for _, entry := range fds {
		link, err := os.Readlink(filepath.Join(dir, entry.Name()))
		if err != nil || !strings.HasPrefix(link, "socket:") || seen[link] {
			continue
		}
		seen[link] = true
		if pidfd < 0 {
			if pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
				return fmt.Errorf("pidfd_open: %w", err)
			}
		}
		number, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		fd, err := unix.PidfdGetfd(pidfd, number, 0)
		if errors.Is(err, unix.EBADF) {
			continue // closed meanwhile
		}
		if err != nil {
			return fmt.Errorf("pidfd_getfd: %w", err)
		}
		if isTCP(fd) {
			err = do(fd)
		}
		if err = errors.Join(err, unix.Close(fd)); err != nil {
			return err
		}
	}
	return nil
}

func isTCP(fd int) bool {
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return err == nil && protocol == unix.IPPROTO_TCP
}

// hold makes the tree usable. It is called when CRIU can do nothing any more.
func (g *guard) hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.held {
		return
	}
	g.held = true
	for _, s := range g.sockets {
		leaveRepair(s)
	}
	_ = g.freezer.restore() // repair tries again and reports
}

// leaveRepair makes a socket usable again if it is in repair mode.
func leaveRepair(s heldSocket) error {
	mode, err := unix.GetsockoptInt(s.fd, unix.IPPROTO_TCP, unix.TCP_REPAIR)
	if err != nil || mode == 0 {
		return nil // not in repair mode, or a state that cannot be
	}
	// Not TCP_REPAIR_OFF_NO_WP: the window probe makes the peer tell where it
	// stands, should anything have been lost meanwhile.
	if err := unix.SetsockoptInt(s.fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, unix.TCP_REPAIR_OFF); err != nil {
		return fmt.Errorf("take a socket out of TCP repair mode: %w", err)
	}
	return unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, s.reuse)
}

// repair completes what hold began, once CRIU is certainly gone.
func (g *guard) repair() error {
	g.hold()
	g.mu.Lock()
	defer g.mu.Unlock()
	var errs []error
	for _, s := range g.sockets {
		errs = append(errs, leaveRepair(s))
	}
	errs = append(errs, g.freezer.restore())
	for _, pid := range g.pids {
		if state(pid) == 'T' && !g.stopped[pid] {
			errs = append(errs, unix.Kill(pid, unix.SIGCONT))
		}
	}
	return errors.Join(errs...)
}

func (g *guard) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, s := range g.sockets {
		unix.Close(s.fd)
	}
	g.sockets = nil
}

// state is the letter of /proc/PID/stat, or 0.
func state(pid int) byte {
	data, err := os.ReadFile(procPath(pid, "stat"))
	if err != nil {
		return 0
	}
	// The name before it may contain anything, also parentheses.
	if i := strings.LastIndexByte(string(data), ')'); i >= 0 && i+2 < len(data) {
		return data[i+2]
	}
	return 0
}

// freezer is a cgroup's freezer with the state it had.
type freezer struct {
	path  string // empty: none
	state string // to write to bring it back
}

// freezerFiles are cgroup v2's and v1's.
var freezerFiles = []string{"cgroup.freeze", "freezer.state"}

func readFreezer(dir string) (freezer, error) {
	if dir == "" {
		return freezer{}, nil
	}
	i := slices.IndexFunc(freezerFiles, func(name string) bool {
		_, err := os.Stat(filepath.Join(dir, name))
		return err == nil
	})
	if i < 0 {
		return freezer{}, fmt.Errorf("%s is no cgroup with a freezer", dir)
	}
	path := filepath.Join(dir, freezerFiles[i])
	data, err := os.ReadFile(path)
	if err != nil {
		return freezer{}, err
	}
	state := strings.TrimSpace(string(data))
	if state == "FREEZING" {
		state = "FROZEN"
	}
	return freezer{path, state}, nil
}

func (f freezer) restore() error {
	if f.path == "" {
		return nil
	}
	err := os.WriteFile(f.path, []byte(f.state), 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil // the cgroup has ended
	}
	return err
}

// failLargeWrites makes CRIU's next write to a large file fail with EFBIG: the
// dump of memory is the one long step of CRIU's during which it does not listen
// to us. It then undoes its work by itself. The log may still grow.
func failLargeWrites(pid int, workDir string) {
	limit := uint64(1 << 20)
	if info, err := os.Stat(filepath.Join(workDir, dumpLog)); err == nil {
		limit += uint64(info.Size())
	}
	// If it fails, CRIU merely takes longer to notice.
	_ = unix.Prlimit(pid, unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: limit, Max: limit}, nil)
}
