package capture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/repository"
)

// Stored is a closure in the repository; a repository.PartReader is one.
type Stored interface {
	Entries(ctx context.Context, tree string) iter.Seq2[repository.StoredEntry, error]
	SameContent(ctx context.Context, e repository.StoredEntry, f *os.File) (bool, error)
}

// Differing returns the paths of a stored closure that lower lacks or has
// otherwise.
func Differing(ctx context.Context, stored Stored, tree, lower string) (map[string]bool, error) {
	differing := map[string]bool{}
	for entry, err := range stored.Entries(ctx, tree) {
		if err != nil {
			return nil, err
		}
		if entry.Type == repository.TypeHardlink {
			differing[entry.Path] = differing[entry.Target]
			continue
		}
		same, err := sameNode(ctx, stored, entry, filepath.Join(lower, entry.Path))
		if err != nil {
			return nil, fmt.Errorf("compare /%s with the checkpoint's: %w", entry.Path, err)
		}
		if !same {
			differing[entry.Path] = true
		}
	}
	return differing, nil
}

// sameNode reports whether CRIU, and the program that had the entry open, can
// take the file at path for it.
func sameNode(ctx context.Context, stored Stored, e repository.StoredEntry, path string) (bool, error) {
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if e.Type == repository.TypeDir {
		return st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
	}
	if st.Mode&0o7777 != e.Mode || st.Uid != e.UID || st.Gid != e.GID {
		return false, nil
	}
	switch kind := st.Mode & unix.S_IFMT; e.Type {
	case repository.TypeFile:
		if kind != unix.S_IFREG || st.Size != e.Size {
			return false, nil
		}
		f, err := os.Open(path)
		if err != nil {
			return false, err
		}
		defer f.Close()
		return stored.SameContent(ctx, e, f)
	case repository.TypeSymlink:
		target, err := os.Readlink(path)
		return err == nil && target == e.Target, nil
	case repository.TypeFifo:
		return kind == unix.S_IFIFO, nil
	}
	return false, nil
}

// Apply makes an overlay of upper over lower show what is in stored, a
// directory on upper's file system with the differing files of a closure: they
// are moved into upper, and directories that lower lacks are made there.
func Apply(stored, lower, upper string) error {
	return filepath.WalkDir(stored, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		p, err := filepath.Rel(stored, name)
		if err != nil || p == "." {
			return err
		}
		if entry.IsDir() && isDir(filepath.Join(lower, p)) {
			return nil // made when a file in it needs it
		}
		if _, err := os.Lstat(filepath.Join(upper, p)); err == nil {
			return nil // the task's own
		}
		if err := move(stored, lower, upper, p, entry.IsDir()); err != nil {
			return fmt.Errorf("put /%s into the task's files: %w", p, err)
		}
		return nil
	})
}

func isDir(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.IsDir()
}

func move(stored, lower, upper, p string, dir bool) error {
	if err := makeParents(stored, lower, upper, filepath.Dir(p)); err != nil {
		return err
	}
	if dir {
		return makeDir(filepath.Join(upper, p), filepath.Join(stored, p))
	}
	return os.Rename(filepath.Join(stored, p), filepath.Join(upper, p))
}

// makeParents makes the directory p of upper and those above it, with the
// attributes they have in lower, or else in the closure.
func makeParents(stored, lower, upper, p string) error {
	if p == "." {
		return nil
	}
	if _, err := os.Lstat(filepath.Join(upper, p)); err == nil {
		return nil
	}
	if err := makeParents(stored, lower, upper, filepath.Dir(p)); err != nil {
		return err
	}
	like := filepath.Join(lower, p)
	if !isDir(like) {
		like = filepath.Join(stored, p)
	}
	return makeDir(filepath.Join(upper, p), like)
}

// makeDir makes a directory with the owner, mode, times and attributes of another.
func makeDir(path, like string) error {
	info, err := os.Lstat(like)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s: its attributes cannot be read", like)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	if err := copyXattrs(path, like); err != nil {
		return err
	}
	if err := os.Lchown(path, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := os.Chmod(path, info.Mode()); err != nil {
		return err
	}
	return os.Chtimes(path, time.Unix(st.Atim.Unix()), info.ModTime())
}

func copyXattrs(path, like string) error {
	size, err := unix.Llistxattr(like, nil)
	if err != nil || size == 0 {
		return ignoreUnsupported(err)
	}
	names := make([]byte, size)
	if size, err = unix.Llistxattr(like, names); err != nil {
		return err
	}
	for name := range bytes.SplitSeq(bytes.TrimRight(names[:size], "\x00"), []byte{0}) {
		value := make([]byte, 64<<10) // the kernel's limit, XATTR_SIZE_MAX
		n, err := unix.Lgetxattr(like, string(name), value)
		if err != nil {
			return err
		}
		if err := ignoreUnsupported(unix.Lsetxattr(path, string(name), value[:n], 0)); err != nil {
			return err
		}
	}
	return nil
}

func ignoreUnsupported(err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}
