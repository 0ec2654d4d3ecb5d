package criu

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// CRIU restores nice values and scheduling policies, but not which CPUs a
// thread is pinned to. The engine notes that beside the images and pins the
// threads again before they run.

// affinityFile is the engine's own file among the images.
const affinityFile = "dormouse-affinity.json"

// pinned is one thread that may not run on every CPU; numbers are those inside
// the tree's pid namespace.
type pinned struct {
	PID  int   `json:"pid"`
	TID  int   `json:"tid"`
	CPUs []int `json:"cpus"`
}

// recordAffinity lists the pinned threads of a tree.
func recordAffinity(pids []int) ([]pinned, error) {
	var list []pinned
	online := readCPUSet("/sys/devices/system/cpu/online")
	byCgroup := map[string]unix.CPUSet{} // most processes share one
	for _, pid := range pids {
		tids, err := threadIDs(pid)
		if err != nil {
			continue // a process that ends now is not dumped either
		}
		cgroups, err := os.ReadFile(procPath(pid, "cgroup"))
		if err != nil {
			continue
		}
		all, known := byCgroup[string(cgroups)]
		if !known {
			all = allowedCPUs(string(cgroups), online)
			byCgroup[string(cgroups)] = all
		}
		for _, tid := range tids {
			var set unix.CPUSet
			if unix.SchedGetaffinity(tid, &set) != nil || containsSet(set, all) {
				continue
			}
			p := pinned{CPUs: cpuList(set)}
			if p.PID, err = innerID(procPath(pid), "NSpid"); err == nil {
				p.TID, err = innerID(procPath(pid, "task", strconv.Itoa(tid)), "NSpid")
			}
			if gone(err) {
				continue
			}
			if err != nil {
				return nil, err
			}
			list = append(list, p)
		}
	}
	return list, nil
}

// allowedCPUs are the CPUs an unpinned thread may use: those online, within its
// cpuset. cgroups is the text of /proc/PID/cgroup.
func allowedCPUs(cgroups string, online unix.CPUSet) unix.CPUSet {
	for line := range strings.Lines(cgroups) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		file := ""
		switch parts[1] {
		case "cpuset":
			file = filepath.Join("/sys/fs/cgroup/cpuset", parts[2], "cpuset.effective_cpus")
		case "":
			file = filepath.Join("/sys/fs/cgroup", parts[2], "cpuset.cpus.effective")
		default:
			continue
		}
		if set := readCPUSet(file); set.Count() > 0 {
			return set
		}
	}
	return online
}

// readCPUSet reads a list such as "0-3,7"; on any error the set is empty.
func readCPUSet(path string) unix.CPUSet {
	data, err := os.ReadFile(path)
	if err != nil {
		return unix.CPUSet{}
	}
	return parseCPUSet(strings.TrimSpace(string(data)))
}

func parseCPUSet(list string) (set unix.CPUSet) {
	for part := range strings.SplitSeq(list, ",") {
		from, to, ranged := strings.Cut(part, "-")
		first, err := strconv.Atoi(from)
		if err != nil || first < 0 {
			return unix.CPUSet{}
		}
		last := first
		if ranged {
			if last, err = strconv.Atoi(to); err != nil || last >= maxCPUs {
				return unix.CPUSet{}
			}
		}
		for cpu := first; cpu <= last; cpu++ {
			set.Set(cpu)
		}
	}
	return set
}

// maxCPUs is the size of unix.CPUSet.
const maxCPUs = 1024

func cpuList(set unix.CPUSet) []int {
	var list []int
	for cpu := range maxCPUs {
		if set.IsSet(cpu) {
			list = append(list, cpu)
		}
	}
	return list
}

func containsSet(set, sub unix.CPUSet) bool {
	for cpu := range maxCPUs {
		if sub.IsSet(cpu) && !set.IsSet(cpu) {
			return false
		}
	}
	return sub.Count() > 0
}

func writeAffinity(imagesDir string, list []pinned) error {
	if len(list) == 0 {
		return nil
	}
	data, err := json.Marshal(list)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(imagesDir, affinityFile), data, 0o600)
}

func readAffinity(imagesDir string) ([]pinned, error) {
	data, err := os.ReadFile(filepath.Join(imagesDir, affinityFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var list []pinned
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, fmt.Errorf("%s: %w", affinityFile, err)
	}
	return list, nil
}

// applyAffinity pins the threads of a restored tree. A thread whose CPUs do not
// exist here, or are outside this task's cpuset, stays unpinned: it shall run.
func applyAffinity(root int, list []pinned) error {
	if len(list) == 0 {
		return nil
	}
	tids, err := innerThreads(root)
	if err != nil {
		return err
	}
	for _, p := range list {
		tid, ok := tids[[2]int{p.PID, p.TID}]
		if !ok {
			return fmt.Errorf("thread %d of process %d, which was pinned to CPUs %v, was not restored", p.TID, p.PID, p.CPUs)
		}
		var want unix.CPUSet
		for _, cpu := range p.CPUs {
			want.Set(cpu)
		}
		// The kernel takes the intersection with what exists and is allowed,
		// and answers EINVAL if that is empty: sched_setaffinity(2).
		if err := unix.SchedSetaffinity(tid, &want); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("pin thread %d to CPUs %v: %w", tid, p.CPUs, err)
		}
	}
	return nil
}

// innerThreads maps (pid, tid) inside a tree's pid namespace to the thread's
// number in ours.
func innerThreads(root int) (map[[2]int]int, error) {
	pids, err := InnerPIDs(root)
	if err != nil {
		return nil, err
	}
	threads := map[[2]int]int{}
	for inner, pid := range pids {
		tids, err := threadIDs(pid)
		if err != nil {
			return nil, err
		}
		for _, tid := range tids {
			innerTID, err := innerID(procPath(pid, "task", strconv.Itoa(tid)), "NSpid")
			if err != nil {
				return nil, err
			}
			threads[[2]int{inner, innerTID}] = tid
		}
	}
	return threads, nil
}
