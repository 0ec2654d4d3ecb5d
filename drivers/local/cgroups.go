package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// cgroups are the control groups of one installation: a directory of the same
// name in the v2 hierarchy and in every v1 hierarchy of this machine.
type cgroups struct {
	unified string   // mount of cgroup v2
	v1      []string // mounts of v1 hierarchies
	name    string
}

// findCgroups reads the mounts, proc_pid_mountinfo(5).
func findCgroups(name string) (*cgroups, error) {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	c := &cgroups{name: name}
	for line := range strings.SplitSeq(string(raw), "\n") {
		before, after, ok := strings.Cut(line, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 1 || left[3] != "/" {
			continue
		}
		switch {
		case right[0] == "cgroup2" && c.unified == "":
			c.unified = left[4]
		case right[0] == "cgroup":
			c.v1 = append(c.v1, left[4])
		}
	}
	if c.unified == "" {
		return nil, errors.New("virtual nodes need cgroup v2: no cgroup2 file system is mounted; mount one with `mount -t cgroup2 cgroup2 DIRECTORY`")
	}
	return c, nil
}

func (c *cgroups) node(name string) group {
	return group{cgroups: c, path: filepath.Join(c.name, name)}
}

// removeTop removes the installation's directories if no node uses them.
func (c *cgroups) removeTop() error {
	var failed error
	for _, mount := range append([]string{c.unified}, c.v1...) {
		err := os.Remove(filepath.Join(mount, c.name))
		if err != nil && !missing(err) && !errors.Is(err, syscall.EBUSY) && !errors.Is(err, syscall.ENOTEMPTY) {
			failed = errors.Join(failed, err)
		}
	}
	return failed
}

// group is the control group of one node.
type group struct {
	*cgroups
	path string // below every mount
}

func (g group) dir() string       { return filepath.Join(g.unified, g.path) }
func (g group) agentDir() string  { return filepath.Join(g.dir(), "agent") }
func (g group) anchorDir() string { return filepath.Join(g.dir(), "anchor") }
func (g group) tasksPath() string { return filepath.Join(g.path, "tasks") }

func (g group) create() error {
	for _, dir := range []string{g.anchorDir(), g.agentDir(), filepath.Join(g.unified, g.tasksPath())} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make the node's cgroup: %w", err)
		}
	}
	return nil
}

func (g group) exists() bool {
	_, err := os.Stat(g.dir())
	return err == nil
}

// populated reports whether any process is in the group or below it.
func (g group) populated() bool {
	events, err := os.ReadFile(filepath.Join(g.dir(), "cgroup.events"))
	return err == nil && bytes.Contains(events, []byte("populated 1"))
}

// pids are the processes in a directory of the group.
func (g group) pids(dir string) ([]int, error) {
	raw, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, field := range strings.Fields(string(raw)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return nil, fmt.Errorf("cgroup.procs of %s: %w", g.path, err)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

func (g group) killAndRemove(ctx context.Context) error {
	return errors.Join(g.kill(ctx), g.remove())
}

// kill ends every process of the group, frozen ones too, and returns when none
// is left.
func (g group) kill(ctx context.Context) error {
	if !g.exists() {
		return nil
	}
	events, err := os.Open(filepath.Join(g.dir(), "cgroup.events"))
	if err != nil {
		return err
	}
	defer events.Close()
	if err := os.WriteFile(filepath.Join(g.dir(), "cgroup.kill"), []byte("1"), 0); err != nil {
		return fmt.Errorf("kill the processes of %s: %w", g.path, err)
	}
	for g.populated() {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("wait for the processes of %s to end: %w", g.path, err)
		}
		// cgroups(7): a change of cgroup.events is a POLLPRI on it. Woken now
		// and then to look at ctx.
		poll := []unix.PollFd{{Fd: int32(events.Fd()), Events: unix.POLLPRI}}
		if _, err := unix.Poll(poll, 100); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return nil
}

// remove deletes the group in every hierarchy, from the leaves up.
func (g group) remove() error {
	var failed error
	for _, mount := range append([]string{g.unified}, g.v1...) {
		failed = errors.Join(failed, removeTree(filepath.Join(mount, g.path)))
	}
	return failed
}

func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if missing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.IsDir() {
			if err := removeTree(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	// The last processes may still be leaving: a zombie no longer counts as
	// populated but holds the directory until it is reaped.
	for wait := time.Millisecond; ; wait *= 2 {
		err := os.Remove(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, syscall.EBUSY) || wait > 2*time.Second {
			return fmt.Errorf("remove cgroup: %w", err)
		}
		time.Sleep(wait)
	}
}
