package criu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// treePIDs lists root and all its descendants, by their numbers in our own pid
// namespace. In a pid namespace of its own, everything that its init did not
// start from outside descends from it.
func treePIDs(root int) ([]int, error) {
	if _, err := os.Stat(procPath(root)); err != nil {
		return nil, fmt.Errorf("process %d does not exist", root)
	}
	pids := []int{root}
	for i := 0; i < len(pids); i++ {
		tids, err := threadIDs(pids[i])
		if err != nil {
			continue // ended meanwhile
		}
		for _, tid := range tids {
			data, err := os.ReadFile(procPath(pids[i], "task", strconv.Itoa(tid), "children"))
			if err != nil {
				continue
			}
			for _, field := range strings.Fields(string(data)) {
				if pid, err := strconv.Atoi(field); err == nil && !slices.Contains(pids, pid) {
					pids = append(pids, pid)
				}
			}
		}
	}
	return pids, nil
}

// InnerPIDs maps the numbers of processes inside the pid namespace of a tree to
// those in our own. root is the tree's init.
func InnerPIDs(root int) (map[int]int, error) {
	pids, err := treePIDs(root)
	if err != nil {
		return nil, err
	}
	inner := make(map[int]int)
	for _, pid := range pids {
		number, err := innerID(procPath(pid), "NSpid")
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		inner[number] = pid
	}
	return inner, nil
}

func threadIDs(pid int) ([]int, error) {
	entries, err := os.ReadDir(procPath(pid, "task"))
	if err != nil {
		return nil, err
	}
	tids := make([]int, 0, len(entries))
	for _, e := range entries {
		if tid, err := strconv.Atoi(e.Name()); err == nil {
			tids = append(tids, tid)
		}
	}
	return tids, nil
}

func procPath(pid int, parts ...string) string {
	return filepath.Join(append([]string{"/proc", strconv.Itoa(pid)}, parts...)...)
}

// statusField returns a field of a /proc/.../status file, trimmed.
func statusField(path, field string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			return strings.TrimSpace(rest), nil
		}
	}
	return "", fmt.Errorf("%s has no field %s", path, field)
}

// innerID is the number of a process or thread in its own, innermost pid
// namespace; dir is its directory in /proc.
func innerID(dir, field string) (int, error) {
	value, err := statusField(filepath.Join(dir, "status"), field)
	if err != nil {
		return 0, err
	}
	ids := strings.Fields(value)
	if len(ids) == 0 {
		return 0, fmt.Errorf("%s/status: empty %s", dir, field)
	}
	return strconv.Atoi(ids[len(ids)-1])
}

// comm is a process's short name, for messages.
func comm(pid int) string {
	data, err := os.ReadFile(procPath(pid, "comm"))
	if err != nil {
		return "?"
	}
	return strings.TrimSpace(string(data))
}

// gone tells whether an error only says that a process has ended meanwhile.
func gone(err error) bool {
	// EINVAL: /proc/PID/mountinfo of a process that has given up its namespaces
	// on its way out.
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL)
}

// CgroupPIDs lists the processes in a cgroup directory and in those below it,
// by their numbers in our own pid namespace (0 for one that is not in it).
func CgroupPIDs(dir string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		data, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			return err
		}
		for _, field := range strings.Fields(string(data)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return fmt.Errorf("%s/cgroup.procs: %w", path, err)
			}
			pids = append(pids, pid)
		}
		return nil
	})
	return pids, err
}
