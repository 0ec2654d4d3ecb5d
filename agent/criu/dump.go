package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
)

// DumpMount is a mount of the task whose contents are not captured.
type DumpMount struct {
	Key        string // names it in the images
	Mountpoint string // inside the task
}

// DumpRequest says what to dump and where to.
type DumpRequest struct {
	// Pid of the tree's init, in our own pid namespace.
	Pid int
	// ImagesDir receives the images. It must exist and should be empty.
	ImagesDir string
	// WorkDir receives the log and the statistics. Empty: ImagesDir.
	WorkDir string
	// LeaveRunning keeps the tree alive after the dump; otherwise all its
	// processes are killed once the images are complete.
	LeaveRunning bool
	// FreezeCgroup is the tree's cgroup v2 directory. If it is frozen when
	// Notify returns from EventPreDump, it is frozen when Dump returns (unless
	// the tree was killed), also after a failure. Freezing it in Notify rather
	// than before Dump keeps CRIU's start, some 20 to 30 ms, out of the pause.
	// All its processes must belong to the tree.
	FreezeCgroup string
	// ExternalMounts are left out; a restore gives a source for each.
	ExternalMounts []DumpMount
	// ExternalNetNS leaves the network namespace (devices, routes) out; a
	// restore brings its own. Sockets are captured in any case.
	ExternalNetNS bool
	// FreezeTimeout bounds the time until all processes stand still. Zero: 10 s.
	FreezeTimeout time.Duration
	// Grace is how long a cancelled dump may take to undo itself before CRIU is
	// killed and its sockets are repaired. Zero: 20 s.
	Grace time.Duration
	// LogLevel is CRIU's: 1 errors, 2 warnings (the default), 3 info, 4 debug.
	LogLevel int
	// Notify may be nil.
	Notify Notify `json:"-"`
}

// DumpResult describes a complete dump.
type DumpResult struct {
	Stats   DumpStats     `json:"stats"`
	Tree    []TreeProcess `json:"tree"`
	Bytes   int64         `json:"bytes"` // of all image files
	Version Version       `json:"criu_version"`
	Wall    time.Duration `json:"wall_ns"` // of the whole call
}

// Dump captures a process tree. On any error the tree is left as it was; the
// error is an *Error if CRIU had a part in it, and wraps ErrInFlight, ErrUnread,
// ErrBusy, ErrNoSpace, ErrLeftOut or ErrDied if that is the reason. The images of a
// failed dump are worthless; removing them is the caller's part.
func (e *Engine) Dump(ctx context.Context, r DumpRequest) (*DumpResult, error) {
	begin := time.Now()
	if err := r.check(); err != nil {
		return nil, err
	}
	if r.WorkDir == "" {
		r.WorkDir = r.ImagesDir
	}
	dirs, err := openDirs(r.ImagesDir, r.WorkDir)
	if err != nil {
		return nil, fmt.Errorf("criu dump: %w", err)
	}
	defer dirs.close()

	if _, err := os.Stat(procPath(r.Pid)); err != nil {
		return nil, fmt.Errorf("criu dump: process %d does not exist", r.Pid)
	}
	network, err := e.excludeNet(r)
	if err != nil {
		return nil, fmt.Errorf("criu dump: %w", err)
	}
	defer network.close()

	notes := &notes{}
	defer notes.close()
	s, err := e.start(sessionOptions{
		grace:     r.Grace,
		abort:     func(pid int) { failLargeWrites(pid, r.WorkDir) },
		dying:     notes.hold,
		ownMounts: !sharesMounts(r.Pid),
		netNS:     network.inside,
	})
	if err != nil {
		return nil, fmt.Errorf("criu dump: start %s: %w", e.path, err)
	}
	if err := noteRunning(r.WorkDir, s.pid()); err != nil {
		s.discard()
		return nil, fmt.Errorf("criu dump: %w", err)
	}
	defer forgetRunning(r.WorkDir)
	kind := rpc.CriuReqType_DUMP
	req := &rpc.CriuReq{Type: &kind, Opts: dumpOptions(r, dirs.images, dirs.work, network.outside)}
	result := &DumpResult{Version: e.version}
	resp, err := s.call(ctx, req, func(ctx context.Context, event Event, pid int) error {
		if event == EventPostDump {
			// Here everything can still be undone.
			if err := result.complete(r, network, notes.affinity); err != nil {
				return err
			}
		}
		if r.Notify != nil {
			if err := r.Notify(ctx, event, pid); err != nil {
				return err
			}
		}
		if event == EventPreDump {
			return notes.take(r)
		}
		return nil
	})
	if err := e.dumpFailure(r, resp, err, notes, s); err != nil {
		return nil, err
	}
	if result.Stats, err = ReadDumpStats(r.WorkDir); err != nil {
		// Worth no failure: the images are good, and the tree may be gone.
		e.log.Debug("dump statistics", "error", err)
	}
	result.Wall = time.Since(begin)
	e.log.Debug("dumped", "pid", r.Pid, "processes", len(result.Tree), "bytes", result.Bytes,
		"frozen", result.Stats.Frozen, "wall", result.Wall)
	return result, nil
}

// netExclusion is how CRIU leaves the tree's network namespace out. It is told
// the inode or, which saves some 10 ms of the pause, started in that namespace:
// what it takes for its own it does not look at.
type netExclusion struct {
	inside  *os.File
	outside uint64
}

func (n netExclusion) close() {
	if n.inside != nil {
		n.inside.Close()
	}
}

// excludeNet decides for inside unless CRIU has still to find out about the
// kernel, for which it opens connections, or processes of the tree have further
// namespaces, which it captures from outside alone.
func (e *Engine) excludeNet(r DumpRequest) (n netExclusion, err error) {
	if !r.ExternalNetNS {
		return n, nil
	}
	root, err := nsInode(r.Pid, "net")
	if err != nil {
		return n, err
	}
	pids, err := r.pids()
	if err != nil {
		return n, err
	}
	further := slices.ContainsFunc(pids, func(pid int) bool {
		inode, err := nsInode(pid, "net")
		return err == nil && inode != root
	})
	if further || !e.kernel.known() || sharesMounts(r.Pid) {
		return netExclusion{outside: root}, nil
	}
	n.inside, err = os.Open(procPath(r.Pid, "ns", "net"))
	return n, err
}

// notes are what is written down of the tree just before CRIU touches it.
type notes struct {
	affinity []pinned

	mu    sync.Mutex // dying CRIUs are seen by another goroutine
	guard *guard
}

func (n *notes) take(r DumpRequest) error {
	pids, err := r.pids()
	if err != nil {
		return err
	}
	if err := unreadEvents(pids); err != nil {
		return err
	}
	if n.affinity, err = recordAffinity(pids); err != nil {
		return fmt.Errorf("read CPU affinities: %w", err)
	}
	g, err := newGuard(pids, r.FreezeCgroup)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.guard = g
	return err
}

// pids lists the processes, from the cgroup if possible: that is one read
// instead of one for each thread, and the tree may stand still already.
func (r DumpRequest) pids() ([]int, error) {
	if r.FreezeCgroup == "" {
		return treePIDs(r.Pid)
	}
	pids, err := CgroupPIDs(r.FreezeCgroup)
	return slices.DeleteFunc(pids, func(pid int) bool { return pid == 0 }), err
}

// taken is nil as long as CRIU has touched nothing.
func (n *notes) taken() *guard {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.guard
}

func (n *notes) hold() {
	if g := n.taken(); g != nil {
		g.hold()
	}
}

func (n *notes) close() {
	if g := n.taken(); g != nil {
		g.close()
	}
}

func (r DumpRequest) check() error {
	if r.Pid <= 0 {
		return fmt.Errorf("criu dump: %d is no process number", r.Pid)
	}
	for _, m := range r.ExternalMounts {
		if strings.Contains(m.Mountpoint, "]") || strings.Contains(m.Key, "]") || m.Key == "" {
			return fmt.Errorf("criu dump: CRIU cannot name the mount %q", m.Mountpoint)
		}
	}
	return nil
}

// dumpFailure turns CRIU's end into an error, and makes the tree usable again
// where CRIU itself did not.
func (e *Engine) dumpFailure(r DumpRequest, resp *rpc.CriuResp, err error, notes *notes, s *session) error {
	if err == nil && resp.GetSuccess() {
		return nil
	}
	if resp == nil {
		// CRIU said nothing at the end, so it did not undo its work either.
		if g := notes.taken(); g != nil {
			err = errors.Join(err, g.repair())
		}
		if errors.Is(err, ErrDied) {
			err = fmt.Errorf("%w (%s)", err, s.child.status)
		}
	}
	if resp.GetSuccess() {
		// A notification was refused and CRIU went on: possible only after the
		// point of no return, so the dump is good.
		return nil
	}
	return newError("dump", filepath.Join(r.WorkDir, dumpLog), resp.GetCrErrmsg(), err)
}

// complete checks the images and adds what CRIU does not put into them.
func (d *DumpResult) complete(r DumpRequest, network netExclusion, affinity []pinned) error {
	var err error
	if d.Tree, err = ReadTree(r.ImagesDir); err != nil {
		return err
	}
	if err := checkNoneLeftOut(r, d.Tree); err != nil {
		return err
	}
	if err := rearmTimers(r.ImagesDir); err != nil {
		return err
	}
	if network.inside != nil {
		if err := declareNetExternal(r.ImagesDir); err != nil {
			return err
		}
	}
	if err := writeAffinity(r.ImagesDir, affinity); err != nil {
		return err
	}
	d.Bytes, err = imageBytes(r.ImagesDir)
	return err
}

// checkNoneLeftOut compares the dumped tree with the cgroup while the processes
// still exist. CRIU itself only warns of processes that were put into the
// sandbox from outside and leaves them out.
func checkNoneLeftOut(r DumpRequest, tree []TreeProcess) error {
	if r.FreezeCgroup == "" {
		return nil
	}
	members, err := CgroupPIDs(r.FreezeCgroup)
	if err != nil {
		return err
	}
	for _, pid := range members {
		inner, err := innerID(procPath(pid), "NSpid")
		if gone(err) && pid != 0 {
			continue
		}
		if err != nil {
			return fmt.Errorf("%w: process %d", ErrLeftOut, pid)
		}
		same, err := samePIDNamespace(pid, r.Pid)
		if gone(err) {
			continue
		}
		if err != nil {
			return err
		}
		dumped := same && slices.ContainsFunc(tree, func(p TreeProcess) bool { return p.PID == inner })
		if !dumped {
			return fmt.Errorf("%w: process %d (%s) was entered from outside and would be lost: end it, then checkpoint", ErrLeftOut, pid, comm(pid))
		}
	}
	return nil
}

func samePIDNamespace(a, b int) (bool, error) {
	first, err := nsInode(a, "pid")
	if err != nil {
		return false, err
	}
	second, err := nsInode(b, "pid")
	return first == second, err
}

// sharesMounts reports whether a process is in our mount namespace.
func sharesMounts(pid int) bool {
	theirs, err := nsInode(pid, "mnt")
	if err != nil {
		return true
	}
	ours, err := nsInode(os.Getpid(), "mnt")
	return err != nil || ours == theirs
}

// nsInode identifies a namespace of a process.
func nsInode(pid int, kind string) (uint64, error) {
	var st unix.Stat_t
	path := procPath(pid, "ns", kind)
	if err := unix.Stat(path, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Ino, nil
}

// dirs are the two directories that CRIU reaches through our descriptors.
type dirs struct{ images, work *os.File }

func openDirs(images, work string) (dirs, error) {
	i, err := os.Open(images)
	if err != nil {
		return dirs{}, err
	}
	w, err := os.Open(work)
	if err != nil {
		i.Close()
		return dirs{}, err
	}
	return dirs{i, w}, nil
}

func (d dirs) close() {
	d.images.Close()
	d.work.Close()
}
