package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"dormouse/agent/sandbox/pid1"

	"golang.org/x/sys/unix"
)

// CRIU runs a tar for the content of each tmpfs, which takes it some 3 ms in the
// pause of a dump and again in a restore. So those that every sandbox has are
// external mounts to it as long as they hold little, and the caller carries their
// content. Of more, CRIU's way is better: what tar writes in a restore is charged
// to the task's memory.

// What such a tmpfs may hold.
const (
	smallBytes = 1 << 20
	smallFiles = 1 << 10
)

// Tmpfs is a small file system in memory of the sandbox.
type Tmpfs struct {
	Name       string
	Mountpoint string // inside the sandbox
	// Dir is where the agent reaches it: in a running sandbox, with what is mounted
	// on it; for a restore, by itself.
	Dir string
}

// External is how CRIU knows it.
func (t Tmpfs) External() External {
	return External{Mountpoint: t.Mountpoint, Key: "tmpfs-" + t.Name, Source: t.Dir}
}

// SmallTmpfs lists those of the running sandbox.
func (s *Sandbox) SmallTmpfs() ([]Tmpfs, error) {
	proc := fmt.Sprintf("/proc/%d", s.Pid())
	text, err := os.ReadFile(filepath.Join(proc, "mountinfo"))
	if err != nil {
		return nil, fmt.Errorf("cannot see the mounts of sandbox %s: %w", s.ID(), err)
	}
	var small []Tmpfs
	for _, m := range pid1.TmpfsMounts(0) {
		if !onlyTmpfs(string(text), m.Target) {
			continue
		}
		dir := filepath.Join(proc, "root", m.Target)
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err != nil {
			return nil, fmt.Errorf("cannot look at %s of sandbox %s: %w", m.Target, s.ID(), err)
		}
		if int64(fs.Blocks-fs.Bfree)*fs.Bsize <= smallBytes && fs.Files-fs.Ffree <= smallFiles {
			small = append(small, Tmpfs{Name: m.Name, Mountpoint: m.Target, Dir: dir})
		}
	}
	return small, nil
}

// onlyTmpfs reports whether one thing is mounted at a place, and that is all of a
// tmpfs: proc_pid_mountinfo(5).
func onlyTmpfs(mountinfo, target string) bool {
	mounts, tmpfs := 0, false
	for line := range strings.Lines(mountinfo) {
		before, after, _ := strings.Cut(line, " - ")
		if fields := strings.Fields(before); len(fields) > 4 && fields[4] == target {
			mounts++
			tmpfs = fields[3] == "/" && strings.HasPrefix(after, "tmpfs ")
		}
	}
	return mounts == 1 && tmpfs
}

// MountTmpfs makes those of the given names, empty, for the caller to fill before
// CRIU restores a tree that had them. They vanish with FinishRestore or Destroy.
func (s *Sandbox) MountTmpfs(names []string) (made []Tmpfs, err error) {
	if len(names) == 0 {
		return nil, nil
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.unmountTmpfs())
		}
	}()
	for _, m := range pid1.TmpfsMounts(s.state.Config.TmpBytes) {
		if !slices.Contains(names, m.Name) {
			continue
		}
		dir := s.tmpfsDir(m.Name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("cannot make a place for %s of %s: %w", m.Target, s.ID(), err)
		}
		if err := unix.Mount(m.Source, dir, "tmpfs", m.Flags, m.Options); err != nil {
			return nil, fmt.Errorf("cannot mount %s of %s: %w", m.Target, s.ID(), err)
		}
		made = append(made, Tmpfs{Name: m.Name, Mountpoint: m.Target, Dir: dir})
	}
	if len(made) != len(names) {
		return nil, fmt.Errorf("the checkpoint of %s has a tmpfs that this agent does not know, among %q", s.ID(), names)
	}
	return made, nil
}

// unmountTmpfs undoes MountTmpfs; not being mounted is fine.
func (s *Sandbox) unmountTmpfs() error {
	var errs []error
	for _, m := range pid1.TmpfsMounts(0) {
		errs = append(errs, unmount(s.tmpfsDir(m.Name)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("cannot unmount what was restored of %s: %w", s.ID(), err)
	}
	return nil
}

func (s *Sandbox) tmpfsDir(name string) string { return filepath.Join(s.dir, "tmpfs", name) }
