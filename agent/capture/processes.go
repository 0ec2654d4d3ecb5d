package capture

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"dormouse/repository"
)

// Inodes are inode numbers. Those of different file systems are not told apart:
// an overlay shows other device numbers than its layers, and taking a file
// for a mapped one only costs a copy.
type Inodes map[uint64]struct{}

// Has reports whether the file with an identity is among n.
func (n Inodes) Has(key repository.FileKey) bool {
	_, ok := n[key.Ino]
	return ok
}

// View is what the processes of a task have to do with files.
type View struct {
	// Paths are the files and directories, inside the task's root mount, that a
	// process has mapped or open, or as its program, working directory or root,
	// or that something is mounted on; sorted, without a leading slash.
	Paths []string
	// Shared are the files that are mapped shared and writable.
	Shared Inodes
}

// Look reads from /proc what the processes pids have to do with files. init is
// the process whose mount namespace is the task's; upper is the upper layer of
// its root, in which mapped files are looked up by name, too. Processes that end
// meanwhile are left out.
func Look(init int, pids []int, upper string) (*View, error) {
	mounts, err := mountPoints(init)
	if err != nil {
		return nil, err
	}
	l := &looking{upper: upper, mounts: mounts, paths: map[string]struct{}{}, shared: Inodes{}}
	l.addMountPoints()
	for _, pid := range pids {
		if err := l.process(pid); err != nil && !gone(err) {
			return nil, fmt.Errorf("look at the files of process %d: %w", pid, err)
		}
	}
	v := &View{Shared: l.shared}
	for p := range l.paths {
		v.Paths = append(v.Paths, p)
	}
	slices.Sort(v.Paths)
	return v, nil
}

func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) }

type looking struct {
	upper  string
	mounts []string // below the root
	paths  map[string]struct{}
	shared Inodes
}

func (l *looking) process(pid int) error {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	if err := l.maps(filepath.Join(dir, "maps")); err != nil {
		return err
	}
	for _, link := range []string{"exe", "cwd", "root"} {
		if err := l.link(filepath.Join(dir, link)); err != nil {
			return err
		}
	}
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return err
	}
	for _, fd := range fds {
		if err := l.link(filepath.Join(dir, "fd", fd.Name())); err != nil && !gone(err) {
			return err
		}
	}
	return nil
}

func (l *looking) link(name string) error {
	target, err := os.Readlink(name)
	if err != nil {
		// A kernel thread, or a process that has just ended, has none.
		if gone(err) {
			return nil
		}
		return err
	}
	l.add(target)
	return nil
}

// addMountPoints notes where other file systems are mounted on the root itself.
func (l *looking) addMountPoints() {
	for _, point := range l.mounts {
		if l.mountOver(path.Dir(point)) == "" {
			l.paths[strings.TrimPrefix(point, "/")] = struct{}{}
		}
	}
}

// mountOver returns the mount below the root that path p lies in, or "".
func (l *looking) mountOver(p string) string {
	for _, mount := range l.mounts {
		if p == mount || strings.HasPrefix(p, mount+"/") {
			return mount
		}
	}
	return ""
}

// add notes a path as the kernel prints it, if it lies in the root mount.
func (l *looking) add(target string) {
	if !strings.HasPrefix(target, "/") || strings.HasSuffix(target, " (deleted)") {
		return // a pipe, a socket, ..., or a ghost
	}
	if l.mountOver(target) != "" {
		return
	}
	if relative := strings.TrimPrefix(path.Clean(target), "/"); relative != "" {
		l.paths[relative] = struct{}{}
	}
}

// maps reads proc_pid_maps(5).
func (l *looking) maps(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		// address perms offset dev inode  pathname
		fields := strings.SplitN(lines.Text(), " ", 6)
		if len(fields) < 6 || fields[4] == "0" {
			continue
		}
		target := unescapeOctal(strings.TrimLeft(fields[5], " "))
		l.add(target)
		if strings.HasSuffix(fields[1], "s") && strings.Contains(fields[1], "w") {
			l.addShared(fields[4], target)
		}
	}
	return lines.Err()
}

func (l *looking) addShared(inode, target string) {
	if n, err := strconv.ParseUint(inode, 10, 64); err == nil {
		l.shared[n] = struct{}{}
	}
	if info, err := os.Lstat(filepath.Join(l.upper, path.Clean("/"+target))); err == nil {
		l.shared[repository.FileKeyOf(info).Ino] = struct{}{}
	}
}

// mountPoints returns where, in the mount namespace of process pid, other file
// systems are mounted on its root: proc_pid_mountinfo(5).
func mountPoints(pid int) ([]string, error) {
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "mountinfo"))
	if err != nil {
		return nil, err
	}
	var points []string
	for line := range strings.Lines(string(raw)) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		if point := unescapeOctal(fields[4]); point != "/" {
			points = append(points, point)
		}
	}
	return points, nil
}

// unescapeOctal undoes the kernel's \ooo.
func unescapeOctal(s string) string {
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
