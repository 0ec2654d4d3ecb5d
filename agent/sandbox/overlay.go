package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"dormouse/agent/sandbox/pid1"

	"golang.org/x/sys/unix"
)

// overlayOptions are the mount options of a sandbox's root. Each is fixed, as a
// kernel's own defaults may differ between nodes: what one node writes to the
// upper layer another one must be able to use.
//
// CRIU restores inotify and fanotify watches by file handle, which an overlay
// has only with nfs_export, which needs index. With xino a file keeps its
// device and inode number when upper and lower layer are different file
// systems. A file system without handles below makes the kernel fall back to
// none of this; such watches then cannot be dumped.
func overlayOptions(lower, upper, work string) string {
	return fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,index=on,nfs_export=on,xino=on,metacopy=off,redirect_dir=off", lower, upper, work)
}

// KeepXattr reports whether an extended attribute of a file in an upper layer
// means the same on another node. The overlay's own bookkeeping names inodes of
// this node's lower layer; only "this directory hides what is below" is content.
func KeepXattr(name string) bool {
	mark, ok := strings.CutPrefix(name, "trusted.overlay.")
	return !ok || mark == "opaque"
}

const opaqueMark = "trusted.overlay.opaque"

// hide covers the directory dir of the layer lower (both absolute) by an empty
// one in upper. Directories above it are made with the attributes they have
// below. The upper layer may be a checkpoint's, in which a task has put whatever
// it liked: only true directories are entered, anything else hides dir already.
func hide(upper, lower, dir string) error {
	inside, below := upper, lower
	for name := range strings.SplitSeq(strings.TrimPrefix(dir, strings.TrimSuffix(lower, "/")+"/"), "/") {
		inside, below = filepath.Join(inside, name), filepath.Join(below, name)
		info, err := os.Lstat(inside)
		if errors.Is(err, os.ErrNotExist) {
			err = copyDirectory(below, inside)
		} else if err == nil && (!info.IsDir() || isOpaque(inside)) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("cannot hide %s from the sandbox: %w", dir, err)
		}
	}
	if err := unix.Lsetxattr(inside, opaqueMark, []byte("y"), 0); err != nil {
		return fmt.Errorf("cannot hide %s from the sandbox: the file system of %s does not take trusted attributes: %w", dir, upper, err)
	}
	return nil
}

func isOpaque(dir string) bool {
	mark := make([]byte, 1)
	n, err := unix.Lgetxattr(dir, opaqueMark, mark)
	return err == nil && n == 1 && mark[0] == 'y'
}

// copyDirectory makes the directory to with owner and mode of from.
func copyDirectory(from, to string) error {
	var stat syscall.Stat_t
	if err := syscall.Lstat(from, &stat); err != nil {
		return err
	}
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	if err := os.Lchown(to, int(stat.Uid), int(stat.Gid)); err != nil {
		return err
	}
	return syscall.Chmod(to, stat.Mode&0o7777)
}

// hideNode covers, in the upper layer, those of the node's directories that lie
// in the lower layer.
func hideNode(upper, lower string, dirs []string) error {
	var hidden []string
	for _, dir := range dirs {
		real, err := filepath.EvalSymlinks(dir)
		if errors.Is(err, os.ErrNotExist) || err == nil && !within(real, lower) {
			continue
		}
		if err != nil {
			return fmt.Errorf("cannot hide %s from the sandbox: %w", dir, err)
		}
		hidden = append(hidden, real)
	}
	for _, dir := range hidden {
		// One below another would show up in it again.
		if slices.ContainsFunc(hidden, func(other string) bool { return dir != other && within(dir, other) }) {
			continue
		}
		if err := hide(upper, lower, dir); err != nil {
			return err
		}
	}
	return nil
}

// within reports whether path is dir or below it; both are clean.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// freshRun gives a host root an empty /run: the node's sockets and pid files
// speak of daemons that are not in the sandbox.
func freshRun(upper string) error {
	if err := hide(upper, "/", "/run"); err != nil {
		return err
	}
	lock := filepath.Join(upper, "run/lock")
	if err := os.Mkdir(lock, 0o755); err != nil {
		return fmt.Errorf("cannot make the sandbox's /run: %w", err)
	}
	return os.Chmod(lock, 0o777|os.ModeSticky)
}

// plantInit puts pid 1's directory and binary into the upper layer. It is a
// copy, never a link: root in the sandbox may write to it.
func plantInit(upper, binary string) error {
	dir := filepath.Join(upper, pid1.Directory)
	if err := makePrograms(dir); err != nil {
		return fmt.Errorf("cannot make pid 1's directory: %w", err)
	}
	from, err := os.Open(binary)
	if err != nil {
		return fmt.Errorf("cannot copy dormouse-init into the sandbox: %w", err)
	}
	defer from.Close()
	to, err := os.OpenFile(filepath.Join(dir, pid1.InitFile), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o700)
	if err != nil {
		return fmt.Errorf("cannot copy dormouse-init into the sandbox: %w", err)
	}
	_, err = to.ReadFrom(from)
	// The task's user runs it, too, under the names of programs.
	if err := errors.Join(err, to.Chmod(0o755), to.Close()); err != nil {
		return fmt.Errorf("cannot copy dormouse-init into the sandbox: %w", err)
	}
	return nil
}

// makePrograms makes pid 1's directory, and in it the names under which the task
// runs its binary.
func makePrograms(dir string) error {
	for _, d := range []struct {
		name string
		mode os.FileMode
	}{{dir, 0o711}, {filepath.Join(dir, pid1.EmptyDir), 0o555}, {filepath.Join(dir, pid1.BinDir), 0o755}} {
		if err := os.Mkdir(d.name, 0o700); err != nil {
			return err
		}
		if err := os.Chmod(d.name, d.mode); err != nil {
			return err
		}
	}
	for _, name := range []string{pid1.RemoteShell, pid1.Controller} {
		if err := os.Symlink(filepath.Join("..", pid1.InitFile), filepath.Join(dir, pid1.BinDir, name)); err != nil {
			return err
		}
	}
	return nil
}

// mountRoot mounts the overlay privately in the agent's mount namespace.
func (s *Sandbox) mountRoot() error {
	if err := unix.Mount("overlay", s.rootDir(), "overlay", unix.MS_NODEV, s.overlay()); err != nil {
		return fmt.Errorf("cannot mount the root of %s: %w", s.state.Config.ID, err)
	}
	if err := unix.Mount("", s.rootDir(), "", unix.MS_PRIVATE, ""); err != nil {
		return errors.Join(fmt.Errorf("cannot make the root of %s private: %w", s.state.Config.ID, err), s.unmountRoot())
	}
	return nil
}

// unmountRoot undoes mountRoot; not being mounted is fine.
func (s *Sandbox) unmountRoot() error {
	if err := unmount(s.rootDir()); err != nil {
		return fmt.Errorf("cannot unmount the root of %s: %w", s.state.Config.ID, err)
	}
	return nil
}

// unmount takes away what is mounted on dir, if there is something.
func unmount(dir string) error {
	err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err == unix.EINVAL || err == unix.ENOENT {
		return nil
	}
	return err
}

func (s *Sandbox) overlay() string {
	return overlayOptions(s.state.Lower, s.UpperDir(), filepath.Join(s.Dir(), "work"))
}
