package criu

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mountEntry is a line of /proc/PID/mountinfo (proc_pid_mountinfo(5)).
type mountEntry struct {
	id         int
	device     string // "8:1"
	root       string
	mountpoint string
	kind       string // file system type
	source     string
	pid        int // a process that has it
}

// parseMountInfo skips lines it does not understand: the kernel may add fields.
func parseMountInfo(text string) []mountEntry {
	var list []mountEntry
	for line := range strings.Lines(text) {
		before, after, ok := strings.Cut(strings.TrimSpace(line), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 6 || len(right) < 2 {
			continue
		}
		id, err := strconv.Atoi(left[0])
		if err != nil {
			continue
		}
		list = append(list, mountEntry{
			id:         id,
			device:     left[2],
			root:       unescape(left[3]),
			mountpoint: unescape(left[4]),
			kind:       right[0],
			source:     unescape(right[1]),
		})
	}
	return list
}

// unescape undoes the octal escapes of blanks, newlines and backslashes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func (i *inspection) addMounts(pid int) error {
	data, err := os.ReadFile(procPath(pid, "mountinfo"))
	if err != nil {
		return err
	}
	list := parseMountInfo(string(data))
	for _, m := range list {
		m.pid = pid
		if _, known := i.mounts[m.id]; !known {
			i.mounts[m.id] = m
			i.checkMount(m)
		}
	}
	return nil
}

// captured are file systems whose contents or nature CRIU knows to recreate.
var captured = []string{
	"proc", "sysfs", "tmpfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "mqueue", "binfmt_misc",
	"securityfs", "debugfs", "tracefs", "pstore", "fusectl", "bpf", "efivarfs",
}

// checkMount refuses a mount of another file system than the root's that was
// not declared external, and adds what a tmpfs holds to the estimate.
func (i *inspection) checkMount(m mountEntry) {
	if m.mountpoint == "/" && m.pid == i.request.Pid {
		i.rootDevice = m.device
	}
	external := slices.ContainsFunc(i.request.ExternalMounts, func(x DumpMount) bool { return x.Mountpoint == m.mountpoint })
	switch {
	case external || m.device == i.rootDevice:
	case !slices.Contains(captured, m.kind):
		i.refuse(m.pid, fmt.Sprintf("has a %s file system (%s) mounted at %s", m.kind, m.source, m.mountpoint),
			"give it to the job as a --volume, or unmount it")
	case m.kind == "tmpfs" && !i.counted[m.device]:
		i.counted[m.device] = true
		i.report.ImageBytes += usedBytes(filepath.Join(procPath(m.pid, "root"), m.mountpoint))
	}
}

func usedBytes(path string) int64 {
	var fs unix.Statfs_t
	if unix.Statfs(path, &fs) != nil {
		return 0
	}
	return int64(fs.Blocks-fs.Bfree) * fs.Bsize
}
