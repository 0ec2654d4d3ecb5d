package sample

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Group names the directories of one task's control group.
type Group struct {
	Unified string            // in cgroup v2; "" where there is none
	V1      map[string]string // by controller: cpu, cpuacct, memory, blkio; those there are
}

// members is the directory whose processes are the task's.
func (g Group) members() string {
	if g.Unified != "" {
		return g.Unified
	}
	for _, controller := range []string{"cpu", "memory", "cpuacct", "blkio"} {
		if dir := g.V1[controller]; dir != "" {
			return dir
		}
	}
	return ""
}

// GroupOf finds the control groups of process pid. The root of a hierarchy is
// left out: its figures are the whole machine's.
func GroupOf(pid int) (Group, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return Group{}, fmt.Errorf("cannot find the cgroup mounts: %w", err)
	}
	paths, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return Group{}, fmt.Errorf("cannot find the control groups of process %d: %w", pid, err)
	}
	group := locate(mounts, paths)
	if group.members() == "" {
		return Group{}, fmt.Errorf("process %d is in no control group of its own: it cannot be told from the rest of the machine", pid)
	}
	return group, nil
}

// locate joins proc_pid_mountinfo(5) and /proc/PID/cgroup of cgroups(7).
func locate(mountinfo, paths []byte) Group {
	points := mountPoints(mountinfo)
	group := Group{V1: map[string]string{}}
	lines := bufio.NewScanner(bytes.NewReader(paths))
	for lines.Scan() {
		parts := strings.SplitN(lines.Text(), ":", 3)
		if len(parts) != 3 || parts[2] == "/" {
			continue
		}
		if parts[0] == "0" {
			if point := points[""]; point != "" {
				group.Unified = filepath.Join(point, parts[2])
			}
			continue
		}
		for controller := range strings.SplitSeq(parts[1], ",") {
			if point := points[controller]; point != "" && measured(controller) {
				group.V1[controller] = filepath.Join(point, parts[2])
			}
		}
	}
	return group
}

// mountPoints of the hierarchies, by controller; "" is cgroup v2.
func mountPoints(mountinfo []byte) map[string]string {
	points := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(mountinfo))
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 3 || left[3] != "/" {
			continue
		}
		point := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(left[4])
		switch right[0] {
		case "cgroup2":
			if points[""] == "" {
				points[""] = point
			}
		case "cgroup":
			for option := range strings.SplitSeq(right[2], ",") {
				if points[option] == "" {
					points[option] = point
				}
			}
		}
	}
	return points
}

func measured(controller string) bool {
	switch controller {
	case "cpu", "cpuacct", "memory", "blkio":
		return true
	}
	return false
}
