package criu

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"dormouse/internal/thread"
)

// showMounts mounts for a CRIU with mounts of its own what was mounted on one of the
// files since it was started.
func showMounts(pid int, files []string) error {
	if contain(files, runDir) {
		return errHidden
	}
	return thread.Spare(func() error {
		ours, err := os.Open("/proc/thread-self/ns/mnt")
		if err != nil {
			return err
		}
		defer ours.Close()
		its, err := os.Open(procPath(pid, "ns/mnt"))
		if err != nil {
			return err
		}
		defer its.Close()
		// Threads that share their working directory cannot part: setns(2).
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		want := identify(files)
		if err := enterMounts(its); err != nil {
			return err
		}
		have := identify(files)
		if err := enterMounts(ours); err != nil {
			return err
		}
		for i, file := range files {
			if have[i] == want[i] {
				continue
			}
			if err := carry(file, its, ours); err != nil {
				return fmt.Errorf("mount %s for CRIU: %w", file, err)
			}
		}
		if err := enterMounts(its); err != nil {
			return err
		}
		if !slices.Equal(identify(files), want) {
			return errHidden
		}
		return nil
	})
}

// contain reports whether one of the files is a directory that is, or has in it,
// dir.
func contain(files []string, dir string) bool {
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	for _, file := range files {
		if real, err := filepath.EvalSymlinks(file); err == nil {
			file = real
		}
		if file == "/" || dir == file || strings.HasPrefix(dir, file+"/") {
			return true
		}
	}
	return false
}

// carry mounts what the calling thread, which is in the mount namespace ours, finds
// under a name under the same name in its.
func carry(file string, its, ours *os.File) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, file, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("open_tree", err)
	}
	defer unix.Close(tree)
	if err := enterMounts(its); err != nil {
		return err
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, file, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return os.NewSyscallError("move_mount", err)
	}
	return enterMounts(ours)
}

func enterMounts(ns *os.File) error {
	return os.NewSyscallError("setns", unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS))
}

// identify tells which files the calling thread finds under these names.
func identify(files []string) []string {
	all := make([]string, len(files))
	for i, file := range files {
		var st unix.Stat_t
		err := unix.Stat(file, &st)
		all[i] = fmt.Sprintln(st.Dev, st.Ino, err)
	}
	return all
}
