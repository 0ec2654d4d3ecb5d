package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"dormouse/agent/sandbox/cgroup"
	"dormouse/agent/sandbox/oci"
	"dormouse/api"

	"golang.org/x/sys/unix"
)

// Options are what a Runtime needs.
type Options struct {
	Init   string       // path of the dormouse-init binary
	Cgroup string       // where tasks' cgroups go: a path below the cgroup v2 mount
	Images string       // directory of unpacked OCI images; made when missing
	Hide   []string     // directories of the node that no sandbox may see
	Log    *slog.Logger // nil: no logs
	// Network connects the sandboxes; nil: each is alone, with its address on the
	// loopback device.
	Network Network
}

// Runtime makes the sandboxes of one agent.
type Runtime struct {
	options     Options
	hierarchies *cgroup.Hierarchies
	parent      string // of tasks' cgroups, relative to every hierarchy
	images      *oci.Cache
	log         *slog.Logger
}

// New checks that this machine can hold sandboxes.
func New(o Options) (*Runtime, error) {
	info, err := os.Stat(o.Init)
	if err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return nil, fmt.Errorf("dormouse-init is not an executable file at %s: build it with `make build`", o.Init)
	}
	hierarchies, err := cgroup.Detect()
	if err != nil {
		return nil, err
	}
	parent, err := hierarchies.Relative(o.Cgroup)
	if err != nil {
		return nil, err
	}
	log := o.Log
	if log == nil {
		log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	return &Runtime{options: o, hierarchies: hierarchies, parent: parent, images: oci.NewCache(o.Images), log: log}, nil
}

// Create makes a sandbox with nothing running in it and an empty upper layer:
// Start fills it from what Config says, a restore from a checkpoint. On failure
// nothing is left.
func (r *Runtime) Create(ctx context.Context, cfg Config) (*Sandbox, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	root, err := ParseRoot(cfg.Root)
	if err != nil {
		return nil, err
	}
	s := &Sandbox{runtime: r, dir: cfg.Dir, state: state{Version: 1, Config: cfg}}
	err = take(ctx, []step{
		{do: func(context.Context) error { return r.checkVolumes(cfg) }},
		{do: func(ctx context.Context) error { return r.findRoot(ctx, s, root) }},
		{do: s.makeDirs, undo: s.removeDirs},
		{do: s.foresee}, // so that after a crash the next agent knows what to remove
		{do: s.makeCgroup, undo: s.removeCgroup},
		{do: s.note},
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// checkVolumes finds volumes that are not there, or that lie in Dormouse's own
// state: a task must not read keys or another task's files.
func (r *Runtime) checkVolumes(cfg Config) error {
	for _, v := range cfg.Volumes {
		if cfg.Confined {
			if err := checkPath("volume", v.Source); err != nil {
				return err
			}
		}
		source, err := filepath.EvalSymlinks(v.Source)
		if err != nil {
			return refuse("the volume %s cannot be used on this node: %v", v.Source, err)
		}
		for _, dir := range r.options.Hide {
			if hidden, err := filepath.EvalSymlinks(dir); err == nil && within(source, hidden) {
				return refuse("the volume %s cannot be used: Dormouse keeps its own state in %s", v.Source, dir)
			}
		}
	}
	return nil
}

// Cgroup is the cgroup v2 directory above those of all sandboxes.
func (r *Runtime) Cgroup() string { return filepath.Join(r.hierarchies.Unified, r.parent) }

// findRoot decides what lies below the overlay.
func (r *Runtime) findRoot(ctx context.Context, s *Sandbox, root Root) error {
	if s.state.Config.Confined && filepath.IsAbs(root.Path) && root.Kind != api.RootHost {
		if err := checkPath("root", root.Path); err != nil {
			return err
		}
	}
	switch root.Kind {
	case api.RootOCI:
		image, err := r.images.Get(ctx, root.Path)
		if err != nil {
			return err
		}
		s.state.Lower, s.state.Image = image.Root, &image.Config
	case api.RootDir:
		info, err := os.Stat(root.Path)
		if err != nil || !info.IsDir() {
			return refuse("the root %s is not a directory on this node", root.Path)
		}
		s.state.Lower = root.Path
	default:
		s.state.Lower = "/"
	}
	if strings.ContainsAny(s.state.Lower, `,:\`) {
		return refuse("the root %s has a comma, colon or backslash in its path, which an overlay cannot take", s.state.Lower)
	}
	if len(s.command()) == 0 && !s.state.Config.Serve {
		return refuse("no command was given, and the root does not name one")
	}
	return nil
}

func (s *Sandbox) makeDirs(context.Context) error {
	if err := os.MkdirAll(filepath.Dir(s.dir), 0o700); err != nil {
		return fmt.Errorf("cannot make the sandbox: %w", err)
	}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return fmt.Errorf("cannot make the sandbox: %w", err)
	}
	s.madeDir = true
	for _, name := range []string{"upper", "work", "root"} {
		// The upper directory's attributes are those of "/" in the sandbox.
		if err := os.Mkdir(filepath.Join(s.dir, name), 0o755); err != nil {
			return fmt.Errorf("cannot make the sandbox: %w", err)
		}
	}
	return nil
}

// removeDirs takes back makeDirs, and nothing that was there before.
func (s *Sandbox) removeDirs(context.Context) error {
	if !s.madeDir {
		return nil
	}
	return os.RemoveAll(s.dir)
}

// foresee records the cgroups that makeCgroup may make, before it does.
func (s *Sandbox) foresee(ctx context.Context) error {
	s.state.Cgroup = s.runtime.hierarchies.Foresee(s.cgroupPath())
	return s.note(ctx)
}

func (s *Sandbox) cgroupPath() string { return filepath.Join(s.runtime.parent, s.state.Config.ID) }

func (s *Sandbox) makeCgroup(context.Context) error {
	group, err := s.runtime.hierarchies.Create(s.cgroupPath(), cgroup.Limits{
		CPUs: s.state.Config.CPUs, MemBytes: s.state.Config.MemBytes, Realtime: s.mayRunRealtime(),
	})
	s.state.Cgroup = cgroup.Group{}
	if err != nil {
		return err // what there is of that name is not ours
	}
	s.state.Cgroup = *group
	return nil
}

// mayRunRealtime reports whether the task was given the capability that
// sched_setscheduler(2) asks for.
func (s *Sandbox) mayRunRealtime() bool {
	added, err := capabilityNumbers(s.state.Config.CapAdd)
	return err == nil && slices.Contains(added, unix.CAP_SYS_NICE)
}

func (s *Sandbox) removeCgroup(ctx context.Context) error {
	if s.state.Cgroup.Unified == "" {
		return nil
	}
	return s.state.Cgroup.Remove(ctx)
}

// Open finds the sandbox in dir again, after a restart of the agent. Its error
// is fs.ErrNotExist when there is none.
func (r *Runtime) Open(ctx context.Context, dir string) (*Sandbox, error) {
	s := &Sandbox{runtime: r, dir: dir, madeDir: true}
	if err := s.load(); err != nil {
		return nil, err
	}
	if s.state.Pid == 0 {
		return s, nil
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if boot != s.state.Boot {
		return s, nil // the machine has been started anew: it is gone
	}
	pidfd, err := openProcess(s.state.Pid, s.state.StartTime)
	if errors.Is(err, errGone) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	if inside, err := s.state.Cgroup.Contains(s.state.Pid); err != nil || !inside {
		// An ended process that nobody has waited for is in no cgroup.
		if err == nil && pidfd.ended() {
			return s, pidfd.Close()
		}
		return nil, errors.Join(fmt.Errorf("process %d of sandbox %s is not in its cgroup %s: it is not ours to touch", s.state.Pid, s.ID(), s.state.Cgroup.Unified), err, pidfd.Close())
	}
	s.process = pidfd
	return s, nil
}
