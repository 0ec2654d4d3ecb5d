package repository

import (
	"errors"
	"fmt"
	"iter"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Walk gives the entries of a directory for AddTree: everything in it, in
// order, with extended attributes and hard links; of what is mounted in it only
// the mount points, empty. It remembers the names of files that have several until
// it has met all of them.
func Walk(dir string) iter.Seq2[TreeEntry, error] {
	return func(yield func(TreeEntry, error) bool) {
		w := &walker{root: dir, links: make(map[[2]uint64]*linked)}
		w.walk(".", nil, yield)
	}
}

// Pick gives only the named files of a directory and the directories that lead
// to them. Names are relative to root and slash separated; the files and
// symlinks they name are taken as they are, not followed.
func Pick(root string, names []string) iter.Seq2[TreeEntry, error] {
	return func(yield func(TreeEntry, error) bool) {
		w := &walker{root: root, links: make(map[[2]uint64]*linked)}
		only := newPicked()
		for _, name := range names {
			if err := checkPath(name); err != nil {
				yield(TreeEntry{}, err)
				return
			}
			only.add(strings.Split(name, "/"))
		}
		w.walk(".", only, yield)
	}
}

// picked is a tree of names; a leaf stands for the entry itself.
type picked map[string]picked

func newPicked() picked { return make(picked) }

func (p picked) add(names []string) {
	if len(names) == 0 || names[0] == "." {
		return
	}
	if p[names[0]] == nil {
		p[names[0]] = newPicked()
	}
	p[names[0]].add(names[1:])
}

type walker struct {
	root   string
	device uint64 // of root
	mount  uint64 // that root is in
	links  map[[2]uint64]*linked
}

// linked is a file with several names, some of which have not been met.
type linked struct {
	path string
	left uint64
}

// walk gives the entry at p and what is in it; false when yield has had enough.
// With only, no more than the names in it.
func (w *walker) walk(p string, only picked, yield func(TreeEntry, error) bool) bool {
	e, device, err := w.entry(p)
	if err != nil {
		return yield(TreeEntry{}, err)
	}
	mounted := false
	if only == nil {
		if mounted, err = w.elsewhere(p, device); err != nil {
			return yield(TreeEntry{}, err)
		}
	}
	if mounted && e.Type == TypeFile {
		e.Size, e.Key, e.Open = 0, FileKey{}, func() (*os.File, error) { return os.Open(os.DevNull) }
	}
	if !yield(e, nil) {
		return false
	}
	if mounted {
		return true
	}
	if e.Type != TypeDir {
		if len(only) > 0 {
			return yield(TreeEntry{}, fmt.Errorf("%s is not a directory", w.path(p)))
		}
		return true
	}
	names, err := w.names(p, only)
	if err != nil {
		return yield(TreeEntry{}, err)
	}
	for _, name := range names {
		var below picked
		if only != nil {
			below = only[name]
		}
		if !w.walk(path.Join(p, name), below, yield) {
			return false
		}
	}
	return true
}

func (w *walker) names(p string, only picked) ([]string, error) {
	var names []string
	if only != nil {
		for name := range only {
			names = append(names, name)
		}
		slices.Sort(names)
		return names, nil
	}
	f, err := os.Open(w.path(p))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err = f.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

func (w *walker) path(p string) string { return filepath.Join(w.root, p) }

// entry gives what is at p, and the device it is on.
func (w *walker) entry(p string) (e TreeEntry, device uint64, err error) {
	full := w.path(p)
	fi, err := os.Lstat(full)
	if err != nil {
		return e, 0, err
	}
	st := fi.Sys().(*syscall.Stat_t)
	e = TreeEntry{Entry: Entry{Path: p, Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, ModTime: st.Mtim.Nano()}}
	if e.Type, err = typeOf(st); err != nil {
		return e, 0, fmt.Errorf("%s: %w", full, err)
	}
	if e.Type != TypeDir && st.Nlink > 1 {
		if first := w.linkTo(st, p); first != "" {
			e.Entry = Entry{Path: p, Type: TypeHardlink, Target: first}
			return e, st.Dev, nil
		}
	}
	switch e.Type {
	case TypeFile:
		e.Size = st.Size
		e.Key = FileKeyOf(fi)
		e.Open = func() (*os.File, error) { return os.Open(full) }
	case TypeSymlink:
		if e.Target, err = os.Readlink(full); err != nil {
			return e, 0, err
		}
	case TypeChar, TypeBlock:
		e.Major, e.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	}
	e.Xattrs, err = Xattrs(full)
	return e, st.Dev, err
}

// elsewhere reports whether what is at p, on a device, is mounted there.
func (w *walker) elsewhere(p string, device uint64) (bool, error) {
	if p != "." && device == w.device {
		return false, nil
	}
	mount, err := mountOf(w.path(p))
	if p == "." {
		w.device, w.mount = device, mount
	}
	return mount != w.mount, err
}

// mountOf is the id of the mount that a file is in, statx(2). Device numbers alone
// prove nothing: within one mount, an overlay or btrfs may have several.
func mountOf(file string) (uint64, error) {
	var stat unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, file, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_MNT_ID, &stat)
	if err != nil {
		return 0, &os.PathError{Op: "statx", Path: file, Err: err}
	}
	return stat.Mnt_id, nil
}

// linkTo returns the first name of a file that was met before.
func (w *walker) linkTo(st *syscall.Stat_t, p string) string {
	key := [2]uint64{uint64(st.Dev), st.Ino}
	l := w.links[key]
	if l == nil {
		w.links[key] = &linked{p, uint64(st.Nlink) - 1}
		return ""
	}
	if l.left--; l.left == 0 {
		delete(w.links, key)
	}
	return l.path
}

func typeOf(st *syscall.Stat_t) (EntryType, error) {
	switch st.Mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		return TypeFile, nil
	case syscall.S_IFDIR:
		return TypeDir, nil
	case syscall.S_IFLNK:
		return TypeSymlink, nil
	case syscall.S_IFIFO:
		return TypeFifo, nil
	case syscall.S_IFSOCK:
		return TypeSocket, nil
	case syscall.S_IFCHR:
		return TypeChar, nil
	case syscall.S_IFBLK:
		return TypeBlock, nil
	}
	return "", fmt.Errorf("unknown kind of file, mode %#o", st.Mode)
}

// Xattrs reads all extended attributes of a file, without following a symlink;
// nil if it has none or the file system knows none.
func Xattrs(file string) (map[string][]byte, error) {
	list, err := readXattr(func(p []byte) (int, error) { return unix.Llistxattr(file, p) })
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the extended attributes of %s: %w", file, err)
	}
	var attrs map[string][]byte
	for name := range strings.SplitSeq(string(list), "\x00") {
		if name == "" {
			continue
		}
		value, err := readXattr(func(p []byte) (int, error) { return unix.Lgetxattr(file, name, p) })
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the extended attribute %s of %s: %w", name, file, err)
		}
		if attrs == nil {
			attrs = make(map[string][]byte)
		}
		attrs[name] = value
	}
	return attrs, nil
}

// readXattr asks for the size and then for the value, again if it grew meanwhile.
func readXattr(call func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := call(nil)
		if err != nil || n == 0 {
			return nil, err
		}
		p := make([]byte, n)
		n, err = call(p)
		if errors.Is(err, unix.ERANGE) {
			continue
		}
		return p[:max(n, 0)], err
	}
}
