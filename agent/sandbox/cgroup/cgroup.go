// Package cgroup gives each sandbox its control groups, on machines with cgroup
// v2, v1 or both.
//
// The v2 directory always exists: it is the task's identity and carries the
// core features that need no controller (cgroup.freeze, cgroup.kill,
// cgroup.events). Limits go to the v2 controllers when the machine has them
// there, else to the v1 hierarchies, under the same path (see V1Path). Where each
// controller is comes from /proc/self/mountinfo, never from a fixed path.
//
//	v2 mount/PARENT/ID          freeze, kill, events [, cpu.max, memory.max]
//	v1 cpu mount/PARENT/ID      cpu.cfs_quota_us      (when v2 lacks cpu)
//	v1 memory mount/PARENT/ID   memory.limit_in_bytes (when v2 lacks memory)
//	v1 devices mount/PARENT/ID  devices.allow         (when there is one; else a
//	                            BPF program on the v2 directory)
//
// Waiting is for events of the kernel (poll(2) on cgroup.events), not for time.
package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Hierarchies are the cgroup mounts of this machine.
type Hierarchies struct {
	Unified string            // mount point of cgroup v2
	V1      map[string]string // controller → mount point
}

// ErrNoUnified means that no cgroup v2 mount exists.
var ErrNoUnified = errors.New("no cgroup2 file system is mounted: mount one with `mount -t cgroup2 cgroup2 DIRECTORY`")

// Detect finds the hierarchies mounted in the caller's mount namespace.
func Detect() (*Hierarchies, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("cannot find the cgroup mounts: %w", err)
	}
	defer file.Close()
	return parse(file)
}

// parse reads the format of proc_pid_mountinfo(5).
func parse(mountinfo io.Reader) (*Hierarchies, error) {
	h := &Hierarchies{V1: map[string]string{}}
	lines := bufio.NewScanner(mountinfo)
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 3 || left[3] != "/" {
			continue
		}
		point := unescape(left[4])
		switch right[0] {
		case "cgroup2":
			if h.Unified == "" {
				h.Unified = point
			}
		case "cgroup":
			for option := range strings.SplitSeq(right[2], ",") {
				if _, seen := h.V1[option]; !seen && isController(option) {
					h.V1[option] = point
				}
			}
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("cannot find the cgroup mounts: %w", err)
	}
	if h.Unified == "" {
		return nil, ErrNoUnified
	}
	return h, nil
}

// isController tells the v1 controllers we use from mount options.
func isController(option string) bool {
	return option == "cpu" || option == "memory" || option == "devices" || option == "blkio"
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// Relative turns a path below the v2 mount, absolute or not, into one relative
// to it, and refuses what would leave it.
func (h *Hierarchies) Relative(path string) (string, error) {
	if rest, ok := strings.CutPrefix(filepath.Clean(path), h.Unified+"/"); ok {
		path = rest
	}
	path = strings.TrimPrefix(filepath.Clean("/"+path), "/")
	if path == "" {
		return "", errors.New("the cgroup of an agent must not be the root of the hierarchy")
	}
	return path, nil
}

// Limits bound a group. Zero means no limit.
type Limits struct {
	CPUs     float64 // processors' worth of time per second
	MemBytes int64   // memory including page cache and tmpfs; swap is not given beyond it
	// Realtime lets the group's processes use the real-time scheduling classes,
	// as far as the machine has time for those left.
	Realtime bool
}

// Foresee returns a group with every directory that Create may make for path,
// for a record that must be written first. It is good for Kill and Remove only.
func (h *Hierarchies) Foresee(path string) Group {
	group := Group{Unified: filepath.Join(h.Unified, path)}
	for _, controller := range slices.Sorted(maps.Keys(h.V1)) {
		group.V1 = append(group.V1, filepath.Join(h.V1[controller], V1Path(path)))
	}
	return group
}

// Create makes the group at path (relative to every hierarchy) with limits. It
// fails, leaving nothing, when a limit cannot be enforced on this machine.
func (h *Hierarchies) Create(path string, limits Limits) (*Group, error) {
	group := &Group{Unified: filepath.Join(h.Unified, path)}
	err := group.build(h, path, limits)
	if err != nil {
		return nil, errors.Join(err, group.removeDirs())
	}
	return group, nil
}

func (g *Group) build(h *Hierarchies, path string, limits Limits) error {
	parent := filepath.Dir(path)
	if err := os.MkdirAll(filepath.Join(h.Unified, parent), 0o755); err != nil {
		return fmt.Errorf("cannot make the cgroup %s: %w", parent, err)
	}
	if _, err := os.Stat(g.Unified); err == nil {
		return fmt.Errorf("the cgroup %s exists already", g.Unified)
	}
	enabled := h.enable(parent)
	if err := os.Mkdir(g.Unified, 0o755); err != nil {
		return fmt.Errorf("cannot make the cgroup %s: %w", g.Unified, err)
	}
	if limits.CPUs > 0 {
		if err := g.limitCPU(h, path, limits.CPUs, slices.Contains(enabled, "cpu"), limits.Realtime); err != nil {
			return err
		}
	}
	if limits.MemBytes > 0 {
		if err := g.limitMemory(h, path, limits.MemBytes, slices.Contains(enabled, "memory")); err != nil {
			return err
		}
	}
	if err := g.limitDevices(h, path); err != nil {
		return err
	}
	return g.accountIO(h, path)
}

// accountIO has the group's I/O counted: with v2 that is all of the io controller's
// being on.
func (g *Group) accountIO(h *Hierarchies, path string) error {
	if _, ok := h.V1["blkio"]; !ok {
		return nil
	}
	_, err := g.addV1(h, "blkio", path)
	return err
}

// enable switches the cpu, memory and io controllers on for the children of parent,
// level by level, and returns those that are on. A level that holds processes
// cannot delegate (cgroups(7), "no internal processes"): such a controller is
// simply not among the result.
func (h *Hierarchies) enable(parent string) []string {
	dir := h.Unified
	levels := []string{dir}
	for name := range strings.SplitSeq(parent, "/") {
		dir = filepath.Join(dir, name)
		levels = append(levels, dir)
	}
	for _, level := range levels {
		for _, controller := range []string{"cpu", "memory", "io"} {
			// The outcome is read below.
			_ = write(level, "cgroup.subtree_control", "+"+controller)
		}
	}
	on, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	if err != nil {
		return nil
	}
	return strings.Fields(string(on))
}

// period is the scheduler's accounting interval for CPU limits, in microseconds.
const period = 100_000

func (g *Group) limitCPU(h *Hierarchies, path string, cpus float64, unified, realtime bool) error {
	quota := max(int64(cpus*period), 1000) // the kernel refuses less than 1 ms
	if unified {
		return write(g.Unified, "cpu.max", fmt.Sprintf("%d %d", quota, period))
	}
	dir, err := g.addV1(h, "cpu", path)
	if err != nil {
		return err
	}
	if realtime {
		g.Realtime = allowRealtime(h.V1["cpu"], dir)
	}
	if err := write(dir, "cpu.cfs_period_us", fmt.Sprint(period)); err != nil {
		return err
	}
	return write(dir, "cpu.cfs_quota_us", fmt.Sprint(quota))
}

func (g *Group) limitMemory(h *Hierarchies, path string, bytes int64, unified bool) error {
	limit := fmt.Sprint(bytes)
	if unified {
		g.MemoryV2 = true
		if err := write(g.Unified, "memory.max", limit); err != nil {
			return err
		}
		return ignoreMissing(write(g.Unified, "memory.swap.max", "0"))
	}
	dir, err := g.addV1(h, "memory", path)
	if err != nil {
		return err
	}
	// Without use_hierarchy a group below would escape; always on since 5.11.
	_ = write(filepath.Dir(dir), "memory.use_hierarchy", "1")
	if err := write(dir, "memory.limit_in_bytes", limit); err != nil {
		return err
	}
	return ignoreMissing(write(dir, "memory.memsw.limit_in_bytes", limit))
}

// V1Path is the path of a group in the v1 hierarchies: the same as in v2, except
// that every v1 directory has a file "tasks", so none can be called that.
func V1Path(path string) string {
	parts := strings.Split(path, "/")
	for i, part := range parts {
		if part == "tasks" {
			parts[i] = "tasks.d"
		}
	}
	return strings.Join(parts, "/")
}

// addV1 makes the group's directory in the v1 hierarchy of controller.
func (g *Group) addV1(h *Hierarchies, controller, path string) (string, error) {
	mount, ok := h.V1[controller]
	if !ok {
		return "", fmt.Errorf("the %s limit cannot be enforced: neither cgroup v2 at %s nor a v1 hierarchy offers the %s controller", controller, h.Unified, controller)
	}
	dir := filepath.Join(mount, V1Path(path))
	if slices.Contains(g.V1, dir) {
		return dir, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("cannot make the cgroup %s: %w", dir, err)
	}
	g.V1 = append(g.V1, dir)
	return dir, nil
}

func write(dir, name, value string) error {
	// Control files exist or do not: never create one, as on a plain directory.
	file, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
	if err == nil {
		_, err = file.WriteString(value)
		err = errors.Join(err, file.Close())
	}
	if err != nil {
		return fmt.Errorf("cannot write %q to the cgroup file %s: %w", value, filepath.Join(dir, name), err)
	}
	return nil
}

func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
