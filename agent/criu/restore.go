package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
)

// RestoreMount gives a source to a mount that was left out of the images.
type RestoreMount struct {
	Key    string // as in the dump
	Source string // on this machine
}

// Birth says where CRIU, and with it a restored tree, is born.
type Birth struct {
	// NetNS is the network namespace of the task. Needed if and only if the
	// dump had ExternalNetNS. It may be furnished while CRIU starts.
	NetNS *os.File
	// Cgroup is the directory of the v2 cgroup that CRIU is born in, or nil, and
	// Tasks are the files "tasks" of the v1 cgroups that it moves itself to before it
	// does anything: the restored processes inherit them. To be moved by others
	// takes a process some 10 ms, for which the kernel waits for all its processors
	// (cgroup_threadgroup_rwsem).
	Cgroup *os.File
	Tasks  []string
}

// RestoreRequest says what to restore and into what.
type RestoreRequest struct {
	ImagesDir string
	// WorkDir receives the log and the statistics. Empty: ImagesDir.
	WorkDir string
	// Root is the task's root. It must be a mount point with private
	// propagation; after the restore it may be unmounted.
	Root           string
	ExternalMounts []RestoreMount
	// Grace is how long a cancelled restore may take to undo itself before CRIU
	// is killed. Zero: 20 s.
	Grace time.Duration
	// LogLevel is CRIU's: 1 errors, 2 warnings (the default), 3 info, 4 debug.
	LogLevel int
	// Notify may be nil. It gets the pid of the tree's init once there is one. At
	// EventPreResume threads are pinned already.
	Notify Notify
}

// RestoreResult describes a restored tree.
type RestoreResult struct {
	Pid   int           `json:"pid"` // of the init, in our own pid namespace
	Stats RestoreStats  `json:"stats"`
	Wall  time.Duration `json:"wall_ns"` // of the whole call
}

// PendingRestore is a restore whose CRIU has started and waits to be told what to
// restore. One of Restore and Abort must be called, once.
type PendingRestore struct {
	engine  *Engine
	options sessionOptions
	session *session
}

// PrepareRestore starts the CRIU of a restore. That takes it some 10 ms: a caller
// that has more to prepare than b does so meanwhile. The files of b stay open until
// Restore or Abort has returned.
func (e *Engine) PrepareRestore(b Birth) (*PendingRestore, error) {
	p := &PendingRestore{engine: e, options: sessionOptions{ownMounts: true, cgroup: b.Cgroup, tasks: b.Tasks}}
	if b.NetNS != nil {
		p.options.inherit = []*os.File{b.NetNS}
	}
	if err := p.start(); err != nil {
		return nil, fmt.Errorf("criu restore: %w", err)
	}
	return p, nil
}

func (p *PendingRestore) start() (err error) {
	if p.session, err = p.engine.start(p.options); err != nil {
		return fmt.Errorf("start %s: %w", p.engine.path, err)
	}
	return nil
}

// show makes sure that CRIU sees these files as we do, if need be by starting
// another one.
func (p *PendingRestore) show(files []string) error {
	err := p.session.show(files)
	if err == nil {
		return nil
	}
	p.engine.log.Debug("CRIU gets no mounts of its own", "error", err)
	p.session.discard()
	p.options.ownMounts = false
	return p.start()
}

// Abort ends CRIU. Nothing was restored.
func (p *PendingRestore) Abort() {
	if p.session != nil {
		p.session.discard()
	}
}

// Restore builds a process tree from images. When it returns without an error
// the tree runs. After an error CRIU has ended and the tree's init was killed;
// should anything be left, or still be dying, it is in its cgroups:
// killing those is the caller's part.
func (p *PendingRestore) Restore(ctx context.Context, r RestoreRequest) (*RestoreResult, error) {
	begin := time.Now()
	if r.WorkDir == "" {
		r.WorkDir = r.ImagesDir
	}
	dirs, affinity, err := p.ready(r)
	if err != nil {
		p.Abort()
		return nil, fmt.Errorf("criu restore: %w", err)
	}
	defer dirs.close()
	defer forgetRunning(r.WorkDir)
	s := p.session
	kind := rpc.CriuReqType_RESTORE
	req := &rpc.CriuReq{Type: &kind, Opts: restoreOptions(r, dirs.images, dirs.work, len(p.options.inherit) > 0)}
	root := newborn{pidfd: -1}
	defer root.close()
	resp, err := s.call(ctx, req, func(ctx context.Context, event Event, pid int) error {
		if pid != 0 {
			root.open(pid)
		}
		if event == EventPreResume {
			if err := applyAffinity(root.pid, affinity); err != nil {
				return err
			}
		}
		if r.Notify == nil {
			return nil
		}
		return r.Notify(ctx, event, root.pid)
	})
	if err != nil || !resp.GetSuccess() {
		root.kill()
		return nil, restoreFailure(r, resp, err, s)
	}
	result := &RestoreResult{Pid: int(resp.GetRestore().GetPid())}
	if result.Stats, err = ReadRestoreStats(r.WorkDir); err != nil {
		// Worth no failure: the tree runs.
		p.engine.log.Debug("restore statistics", "error", err)
	}
	result.Wall = time.Since(begin)
	p.engine.log.Debug("restored", "pid", result.Pid, "wall", result.Wall)
	return result, nil
}

// ready checks what is asked for, and that CRIU can do it.
func (p *PendingRestore) ready(r RestoreRequest) (d dirs, affinity []pinned, err error) {
	if err := r.check(); err != nil {
		return d, nil, err
	}
	if affinity, err = readAffinity(r.ImagesDir); err != nil {
		return d, nil, err
	}
	if err := p.show(r.files()); err != nil {
		return d, nil, err
	}
	if r.Grace > 0 {
		p.session.grace = r.Grace
	}
	if d, err = openDirs(r.ImagesDir, r.WorkDir); err != nil {
		return d, nil, err
	}
	if err := noteRunning(r.WorkDir, p.session.pid()); err != nil {
		d.close()
		return d, nil, err
	}
	return d, affinity, nil
}

// newborn is the init of a tree that is being restored.
type newborn struct{ pid, pidfd int }

func (n *newborn) open(pid int) {
	if n.pidfd >= 0 {
		return
	}
	n.pid = pid
	if fd, err := unix.PidfdOpen(pid, 0); err == nil {
		n.pidfd = fd
	}
}

// kill ends the tree with its init: a failing CRIU does not always do so.
func (n *newborn) kill() {
	if n.pidfd >= 0 {
		_ = unix.PidfdSendSignal(n.pidfd, unix.SIGKILL, nil, 0)
	}
}

func (n *newborn) close() {
	if n.pidfd >= 0 {
		unix.Close(n.pidfd)
	}
}

func (r RestoreRequest) check() error {
	if r.Root == "" {
		return errors.New("no root directory given")
	}
	for _, m := range r.ExternalMounts {
		if strings.Contains(m.Key, "]") || m.Key == "" {
			return fmt.Errorf("CRIU cannot name the mount %q", m.Key)
		}
	}
	return nil
}

// files are those that CRIU looks for by their names.
func (r RestoreRequest) files() []string {
	files := []string{r.Root}
	for _, m := range r.ExternalMounts {
		files = append(files, m.Source)
	}
	return files
}

func restoreFailure(r RestoreRequest, resp *rpc.CriuResp, err error, s *session) error {
	if resp == nil {
		// CRIU did not clean up: end its process group, which the half-made
		// processes are in until they get their own.
		_ = unix.Kill(-s.pid(), unix.SIGKILL)
		if errors.Is(err, ErrDied) {
			err = fmt.Errorf("%w (%s)", err, s.child.status)
		}
	}
	return newError("restore", filepath.Join(r.WorkDir, restoreLog), resp.GetCrErrmsg(), err)
}
