package criu

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// watch is a file that an inotify or fanotify descriptor watches, as
// /proc/PID/fdinfo/N tells it (proc_pid_fdinfo(5)): by a file handle.
type watch struct {
	inode  uint64
	device string // "8:1"
	kind   int32
	handle []byte
}

// parseWatch reads a line of the file; ok is false if it describes no watch of
// a file.
func parseWatch(line string) (w watch, ok bool) {
	fields := strings.Fields(line)
	if len(fields) == 0 || fields[0] != "inotify" && fields[0] != "fanotify" {
		return watch{}, false
	}
	for _, field := range fields[1:] {
		key, value, _ := strings.Cut(field, ":")
		n, err := strconv.ParseUint(value, 16, 64)
		switch key {
		case "ino":
			w.inode = n
		case "sdev": // the kernel's own packing: 12 bits major, 20 bits minor
			w.device = fmt.Sprintf("%d:%d", n>>20, n&(1<<20-1))
		case "fhandle-type":
			w.kind = int32(n)
		case "f_handle":
			if w.handle, err = hex.DecodeString(value); err != nil {
				return watch{}, false
			}
		default:
			continue
		}
		if err != nil && key != "f_handle" {
			return watch{}, false
		}
	}
	return w, len(w.handle) > 0
}

// checkWatches refuses watches of files that CRIU cannot find again. It opens
// the handle; overlay file systems without nfs_export give handles that cannot
// be opened.
func (i *inspection) checkWatches(pid, fd int) {
	data, err := os.ReadFile(procPath(pid, "fdinfo", strconv.Itoa(fd)))
	if err != nil {
		return
	}
	for line := range strings.Lines(string(data)) {
		w, ok := parseWatch(line)
		if !ok || i.opens(w) {
			continue
		}
		i.refuse(pid, fmt.Sprintf("watches a file (inode %d, descriptor %d) that cannot be found again", w.inode, fd),
			"remove the watch, or run it on a root file system with file handles (overlay: nfs_export=on)")
	}
}

// unreadEvents is ErrUnread when one of the processes has events of its watches to
// read: CRIU restores the watches, but not what they have seen.
func unreadEvents(pids []int) error {
	for _, pid := range pids {
		dir := procPath(pid, "fd")
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue // it has ended
		}
		for _, entry := range entries {
			link, err := os.Readlink(filepath.Join(dir, entry.Name()))
			if err != nil || link != inotifyLink && link != fanotifyLink {
				continue
			}
			fd, err := strconv.Atoi(entry.Name())
			if err != nil {
				continue
			}
			if n := unreadBytes(pid, fd); n > 0 {
				unread := NewRefusal(pid, fmt.Sprintf("has %d bytes of events of its watches to read (descriptor %d)", n, fd), "have it read them first")
				return fmt.Errorf("%s: %w", unread, ErrUnread)
			}
		}
	}
	return nil
}

// The links in /proc/PID/fd of what has watches.
const (
	inotifyLink  = "anon_inode:inotify"
	fanotifyLink = "anon_inode:[fanotify]"
)

// unreadBytes asks a descriptor of another process how much there is to read;
// zero when it is not there any more. The request is FIONREAD of inotify(7), by its
// other name.
func unreadBytes(pid, fd int) int {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(pidfd)
	own, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(own)
	n, err := unix.IoctlGetInt(own, unix.TIOCINQ)
	if err != nil {
		return 0
	}
	return n
}

// foundAnyway are directories in which CRIU looks for a watched file by its
// inode when the handle does not help (CRIU, irmap.c).
var foundAnyway = []string{"/etc", "/var/spool", "/var/log"}

func (i *inspection) opens(w watch) bool {
	for _, m := range i.mounts {
		if m.device != w.device {
			continue
		}
		root := filepath.Join(procPath(m.pid, "root"))
		mount, err := unix.Open(filepath.Join(root, m.mountpoint), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		file, err := unix.OpenByHandleAt(mount, unix.NewFileHandle(w.kind, w.handle), unix.O_PATH|unix.O_CLOEXEC)
		unix.Close(mount)
		if err == nil {
			unix.Close(file)
			return true
		}
		if !errors.Is(err, unix.ESTALE) {
			return true // we cannot tell
		}
		if slices.ContainsFunc(foundAnyway, func(dir string) bool { return hasInode(filepath.Join(root, dir), w.inode) }) {
			return true
		}
	}
	return false
}

// hasInode looks for an inode in a directory and directly in it.
func hasInode(dir string, inode uint64) bool {
	var st unix.Stat_t
	if unix.Stat(dir, &st) == nil && st.Ino == inode {
		return true
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		return unix.Lstat(filepath.Join(dir, e.Name()), &st) == nil && st.Ino == inode
	})
}
