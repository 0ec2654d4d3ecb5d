package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"dormouse/agent/sandbox/pid1"
)

// RestoreTarget is where CRIU is to put a tree.
type RestoreTarget struct {
	// Root is the sandbox's root, a private mount in the agent's mount
	// namespace: criu --root.
	Root     string
	External []External
}

// OpenCgroup opens the v2 cgroup's directory, to start criu in it, and names the
// files through which that enters the v1 cgroups, before it forks.
func (s *Sandbox) OpenCgroup() (unified *os.File, tasks []string, err error) {
	unified, err = os.Open(s.CgroupPath())
	return unified, s.state.Cgroup.TaskFiles(), err
}

// PrepareRestore builds what a restored tree lands in, beside netns. The caller has
// filled UpperDir with the checkpoint's upper layer, changes the root as needed through
// RestoreTarget.Root, runs CRIU, calls Recognize before the tree runs, and
// FinishRestore or Destroy.
func (s *Sandbox) PrepareRestore(ctx context.Context, netns *os.File) (*RestoreTarget, error) {
	if s.Pid() != 0 {
		return nil, fmt.Errorf("the sandbox %s was started before", s.ID())
	}
	err := take(ctx, []step{
		{do: s.checkUpper},
		{do: func(context.Context) error { return hideNode(s.UpperDir(), s.state.Lower, s.hidden()) }},
		{
			do:   func(context.Context) error { return s.mountRoot() },
			undo: func(context.Context) error { return s.unmountRoot() },
		},
		{do: func(context.Context) (err error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.state.NetNS, err = inodeOf(netns)
			return err
		}},
	})
	if err != nil {
		return nil, fmt.Errorf("cannot prepare the restore of %s: %w", s.ID(), err)
	}
	return &RestoreTarget{Root: s.rootDir(), External: s.External()}, nil
}

// checkUpper makes sure that the upper layer is a sandbox's.
func (s *Sandbox) checkUpper(context.Context) error {
	info, err := os.Lstat(filepath.Join(s.UpperDir(), pid1.Directory))
	if err != nil || !info.IsDir() {
		return fmt.Errorf("the upper layer in %s is not that of a sandbox: %s is missing", s.UpperDir(), pid1.Directory)
	}
	return nil
}

// Restored is a tree that CRIU has built for a sandbox.
type Restored struct{ init *first }

// Close gives up a tree that FinishRestore was not given. r may be nil.
func (r *Restored) Close() {
	if r != nil {
		r.init.process.Close()
	}
}

// Recognize takes hold of the tree that was restored for the sandbox, whose pid 1
// is pid in the agent's pid namespace. None of it runs yet: once it does, it may
// end at any moment.
func (s *Sandbox) Recognize(pid int) (*Restored, error) {
	if inside, err := s.state.Cgroup.Contains(pid); err != nil || !inside {
		return nil, errors.Join(fmt.Errorf("the restored process %d is not in the cgroup of sandbox %s", pid, s.ID()), err)
	}
	network, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, fmt.Errorf("cannot find the restored network namespace: %w", err)
	}
	defer network.Close()
	if inode, err := inodeOf(network); err != nil || inode != s.NetNS() {
		return nil, errors.Join(fmt.Errorf("the restored process %d is not in the network namespace made for sandbox %s", pid, s.ID()), err)
	}
	init, err := s.take(pid, network)
	if err != nil {
		return nil, err
	}
	return &Restored{init}, nil
}

// FinishRestore takes over the restored tree, which runs or has ended. Exec
// sessions from before the checkpoint are hung up: their users are on another node.
func (s *Sandbox) FinishRestore(ctx context.Context, r *Restored) error {
	s.adopt(r.init)
	if err := s.save(ctx); err != nil {
		return err
	}
	if err := errors.Join(s.unmountRoot(), s.unmountTmpfs()); err != nil {
		return err
	}
	s.runtime.log.Info("sandbox restored", "sandbox", s.ID(), "pid", s.Pid())
	return s.keepSessions(ctx)
}
