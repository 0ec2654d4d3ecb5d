package capture

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Apply makes an overlay of upper over lower show the files of a closure as
// they were captured. stored is the closure tree, restored to a directory on
// upper's file system; what lower lacks, or has otherwise, is moved from there
// into upper. It returns the paths that were moved.
func Apply(stored, lower, upper string) (moved []string, err error) {
	err = filepath.WalkDir(stored, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		p, err := filepath.Rel(stored, name)
		if err != nil || p == "." {
			return err
		}
		if _, err := os.Lstat(filepath.Join(upper, p)); err == nil {
			return nil // made for an earlier file of the closure, or the task's own
		}
		same, err := sameNode(name, filepath.Join(lower, p))
		if err != nil || same {
			return err
		}
		if err := move(stored, lower, upper, p, entry.IsDir()); err != nil {
			return fmt.Errorf("put /%s into the task's files: %w", p, err)
		}
		moved = append(moved, p)
		return nil
	})
	return moved, err
}

// sameNode reports whether CRIU, and the program that had a open, can take b for
// it.
func sameNode(a, b string) (bool, error) {
	ai, err := os.Lstat(a)
	if err != nil {
		return false, err
	}
	bi, err := os.Lstat(b)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	switch {
	case ai.IsDir():
		return bi.IsDir(), nil
	case ai.Mode() != bi.Mode() || ai.Size() != bi.Size():
		return false, nil
	case ai.Mode().IsRegular():
		return sameContent(a, b)
	case ai.Mode()&fs.ModeSymlink != 0:
		at, err := os.Readlink(a)
		if err != nil {
			return false, err
		}
		bt, err := os.Readlink(b)
		return at == bt, err
	}
	return true, nil
}

func sameContent(a, b string) (bool, error) {
	af, err := os.Open(a)
	if err != nil {
		return false, err
	}
	defer af.Close()
	bf, err := os.Open(b)
	if err != nil {
		return false, err
	}
	defer bf.Close()
	ab, bb := make([]byte, 1<<18), make([]byte, 1<<18)
	for {
		n, aerr := io.ReadFull(af, ab)
		m, berr := io.ReadFull(bf, bb)
		if !bytes.Equal(ab[:n], bb[:m]) {
			return false, nil
		}
		if aerr == io.EOF || aerr == io.ErrUnexpectedEOF {
			return berr == aerr, nil
		}
		if err := errors.Join(aerr, berr); err != nil {
			return false, err
		}
	}
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
	if info, err := os.Lstat(like); err != nil || !info.IsDir() {
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
