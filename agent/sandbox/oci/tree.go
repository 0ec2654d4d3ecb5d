package oci

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// limits bound what an image may unfold to.
type limits struct {
	entries int64 // files, directories, links of all layers
	bytes   int64 // of all files of all layers
	spare   int64 // that must stay free on the disk
}

// tree is a root file system being built. Paths go through the kernel's own
// resolution within it, one parent directory at a time.
type tree struct {
	root    int // descriptor of the directory
	limits  limits
	entries int64
	bytes   int64
	// written are the paths of the present layer: an opaque mark hides what is
	// in the layers below, wherever in the archive it stands.
	written map[string]bool
	// dirTimes are set last, as filling a directory changes them.
	dirTimes map[string]time.Time
}

func openTree(dir string, l limits) (*tree, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the new root: %w", err)
	}
	return &tree{root: fd, limits: l}, nil
}

func (t *tree) close() { _ = unix.Close(t.root) }

// applyVerified applies a layer and checks that it was the one named.
func applyVerified(ctx context.Context, t *tree, layer v1.Layer, want v1.Hash) error {
	reader, err := layer.Uncompressed()
	if err != nil {
		return badImage("it cannot be read: %w", err)
	}
	defer reader.Close()
	hash := sha256.New()
	content := io.TeeReader(reader, hash)
	if err := t.apply(ctx, tar.NewReader(content)); err != nil {
		return err
	}
	// What follows the archive's end belongs to the layer too. It is bounded
	// like the rest.
	n, err := io.Copy(io.Discard, io.LimitReader(content, t.limits.bytes))
	if err != nil || n == t.limits.bytes {
		return badImage("it cannot be read to its end: %w", err)
	}
	if got := hex.EncodeToString(hash.Sum(nil)); want.Algorithm != "sha256" || got != want.Hex {
		return badImage("its content is not what the image's configuration names (sha256:%s instead of %s)", got, want)
	}
	return nil
}

// apply adds one layer.
func (t *tree) apply(ctx context.Context, entries *tar.Reader) error {
	t.written, t.dirTimes = map[string]bool{}, map[string]time.Time{}
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		header, err := entries.Next()
		if err == io.EOF {
			return t.setDirTimes()
		}
		if err != nil {
			return badImage("it is damaged: %w", err)
		}
		if err := t.add(ctx, header, entries); err != nil {
			return err
		}
	}
}

// Names that stand for something missing: the image specification, "Whiteouts".
const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
	aufsMark = ".wh..wh."
)

// add carries out one entry.
func (t *tree) add(ctx context.Context, header *tar.Header, content io.Reader) error {
	if t.entries++; t.entries > t.limits.entries {
		return badImage("it holds more than the %d files allowed", t.limits.entries)
	}
	name, err := cleanName(header.Name)
	if err != nil {
		return err
	}
	if name == "." {
		return t.finish(t.root, ".", header, true)
	}
	dir, base := path.Split(name)
	parent, err := t.parent(dir)
	if err != nil {
		return fmt.Errorf("cannot make the directory of %s: %w", name, err)
	}
	defer unix.Close(parent)
	switch {
	case base == opaque:
		return t.clear(parent, path.Clean(dir))
	case strings.HasPrefix(base, aufsMark):
		return nil
	case strings.HasPrefix(base, whiteout):
		victim := strings.TrimPrefix(base, whiteout)
		if victim == "" || victim == "." || victim == ".." {
			return badImage("it removes %q, which is no file name", victim)
		}
		return removeAt(parent, victim)
	}
	for sofar := name; sofar != "."; sofar = path.Dir(sofar) {
		t.written[sofar] = true
	}
	if err := t.create(ctx, parent, base, header, content); err != nil {
		if errors.Is(err, ErrBadImage) {
			return err
		}
		return fmt.Errorf("cannot make %s: %w", name, err)
	}
	return nil
}

// cleanName refuses names that only an attacker writes.
func cleanName(name string) (string, error) {
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", badImage("it names %q, outside of the image", name)
		}
	}
	if strings.Contains(name, "\x00") || name == "" {
		return "", badImage("it names a file %q", name)
	}
	return path.Clean(strings.TrimLeft(path.Clean("/"+name), "/")), nil
}

// parent opens a directory of the tree, making what is missing. Links in the
// path are followed as a process inside the root would.
func (t *tree) parent(dir string) (int, error) { return t.parentVia(dir, 0) }

// parentVia is parent after so many links that led to directories still
// missing.
func (t *tree) parentVia(dir string, links int) (int, error) {
	fd, err := unix.Dup(t.root)
	if err != nil {
		return -1, err
	}
	sofar := "/"
	for part := range strings.SplitSeq(strings.Trim(dir, "/"), "/") {
		if part == "" {
			continue
		}
		next, err := t.descend(fd, sofar, part, links)
		_ = unix.Close(fd)
		if err != nil {
			return -1, err
		}
		fd, sofar = next, path.Join(sofar, part)
	}
	return fd, nil
}

// maxLinks is the kernel's own limit, path_resolution(7).
const maxLinks = 40

// descend opens the directory part of the directory at, which is open as fd.
func (t *tree) descend(fd int, at, part string, links int) (int, error) {
	name := path.Join(at, part)
	next, err := t.open(name)
	if errors.Is(err, unix.ELOOP) {
		return -1, badImage("the link %s leads to itself", name)
	}
	if err == nil || !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) {
		return next, err
	}
	if errors.Is(err, unix.ENOTDIR) {
		// A file of a lower layer that became a directory.
		if err := removeAt(fd, part); err != nil {
			return -1, err
		}
	}
	if err := unix.Mkdirat(fd, part, 0o755); err == nil {
		return t.open(name)
	} else if err != unix.EEXIST {
		return -1, err
	}
	// It is missing and exists: a link to what is missing.
	target := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, part, target)
	if err != nil {
		return -1, err
	}
	if links == maxLinks {
		return -1, badImage("the link %s leads to itself", name)
	}
	to := string(target[:n])
	if !path.IsAbs(to) {
		to = path.Join(at, to)
	}
	made, err := t.parentVia(path.Clean("/"+to), links+1)
	if err != nil {
		return -1, err
	}
	_ = unix.Close(made)
	next, err = t.open(name)
	if err != nil {
		return -1, badImage("the link %s leads to no directory", name)
	}
	return next, nil
}

// open resolves a path within the tree.
func (t *tree) open(name string) (int, error) {
	for {
		fd, err := unix.Openat2(t.root, name, &unix.OpenHow{
			Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
		})
		// EAGAIN: a rename somewhere on the machine raced with "..".
		if err != unix.EAGAIN && err != unix.EINTR {
			return fd, err
		}
	}
}

// create makes the entry base in parent, in place of what was there.
func (t *tree) create(ctx context.Context, parent int, base string, header *tar.Header, content io.Reader) error {
	isDir := header.Typeflag == tar.TypeDir
	if err := makeRoom(parent, base, isDir); err != nil {
		return err
	}
	switch header.Typeflag {
	case tar.TypeDir:
		if err := unix.Mkdirat(parent, base, 0o700); err != nil && err != unix.EEXIST {
			return err
		}
	case tar.TypeReg:
		return t.createFile(ctx, parent, base, header, content)
	case tar.TypeSymlink:
		if err := unix.Symlinkat(header.Linkname, parent, base); err != nil {
			return err
		}
	case tar.TypeLink:
		return t.createLink(parent, base, header)
	case tar.TypeFifo:
		if err := unix.Mknodat(parent, base, unix.S_IFIFO|0o600, 0); err != nil {
			return err
		}
	case tar.TypeChar, tar.TypeBlock:
		// The root is mounted without devices: an empty file is as good, and a
		// character device 0:0 would be a whiteout to the overlay.
		header.Typeflag = tar.TypeReg
		header.Size = 0
		return t.createFile(ctx, parent, base, header, strings.NewReader(""))
	default:
		return badImage("%s is of the unknown type %q", header.Name, header.Typeflag)
	}
	return t.finish(parent, base, header, isDir)
}

// makeRoom removes what is at base, unless both are directories.
func makeRoom(parent int, base string, isDir bool) error {
	var stat unix.Stat_t
	err := unix.Fstatat(parent, base, &stat, unix.AT_SYMLINK_NOFOLLOW)
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return err
	}
	if isDir && stat.Mode&unix.S_IFMT == unix.S_IFDIR {
		return nil
	}
	return removeAt(parent, base)
}

func (t *tree) createFile(ctx context.Context, parent int, base string, header *tar.Header, content io.Reader) error {
	if t.bytes += header.Size; header.Size < 0 || t.bytes > t.limits.bytes {
		return badImage("it unfolds to more than the %d bytes allowed", t.limits.bytes)
	}
	fd, err := unix.Openat(parent, base, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	if err := t.checkSpace(fd, header.Size); err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	file := os.NewFile(uintptr(fd), base)
	n, err := io.Copy(file, &contextReader{ctx, content})
	if err == nil && n != header.Size {
		err = io.ErrUnexpectedEOF
	}
	if err == nil || errors.Is(err, syscall.ENOSPC) || ctx.Err() != nil {
		err = errors.Join(err, file.Close())
	} else {
		err = errors.Join(badImage("it is damaged at %s: %w", header.Name, err), file.Close())
	}
	if err != nil {
		return err
	}
	return t.finish(parent, base, header, false)
}

// contextReader ends a long copy when ctx does.
type contextReader struct {
	ctx context.Context
	io.Reader
}

func (r *contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.Reader.Read(p)
}

// checkSpace refuses a file that would fill the disk.
func (t *tree) checkSpace(fd int, size int64) error {
	var stat unix.Statfs_t
	if err := unix.Fstatfs(fd, &stat); err != nil {
		return err
	}
	if free := int64(stat.Bavail) * stat.Bsize; size > free-t.limits.spare {
		return fmt.Errorf("no space is left for the image: a file of %d bytes, but only %d free: %w", size, free, syscall.ENOSPC)
	}
	return nil
}

// createLink makes a hard link to a file of the tree.
func (t *tree) createLink(parent int, base string, header *tar.Header) error {
	target, err := cleanName(header.Linkname)
	if err != nil {
		return err
	}
	dir, name := path.Split(target)
	from, err := t.open("/" + dir)
	if err != nil {
		return badImage("the hard link %s leads to %s, which is not there", header.Name, header.Linkname)
	}
	defer unix.Close(from)
	if err := unix.Linkat(from, name, parent, base, 0); err != nil {
		return badImage("the hard link %s to %s cannot be made: %w", header.Name, header.Linkname, err)
	}
	return nil
}

// finish sets owner, mode, attributes and time, in the order in which they do
// not undo each other.
func (t *tree) finish(parent int, base string, header *tar.Header, isDir bool) error {
	if err := unix.Fchownat(parent, base, header.Uid, header.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	isLink := header.Typeflag == tar.TypeSymlink
	if !isLink {
		if err := unix.Fchmodat(parent, base, uint32(header.Mode)&0o7777, 0); err != nil {
			return err
		}
		if err := setXattrs(parent, base, header); err != nil {
			return err
		}
	}
	if isDir {
		name, err := cleanName(header.Name)
		t.dirTimes[name] = header.ModTime
		return err
	}
	return setTime(parent, base, header.ModTime)
}

func setTime(parent int, base string, at time.Time) error {
	if at.IsZero() {
		return nil
	}
	spec, err := unix.TimeToTimespec(at)
	if err != nil {
		return err
	}
	return unix.UtimesNanoAt(parent, base, []unix.Timespec{spec, spec}, unix.AT_SYMLINK_NOFOLLOW)
}

func (t *tree) setDirTimes() error {
	for name, at := range t.dirTimes {
		fd, err := t.open("/" + name)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			continue // removed by a later entry
		}
		if err != nil {
			return err
		}
		err = setTime(fd, ".", at)
		if err := errors.Join(err, unix.Close(fd)); err != nil {
			return err
		}
	}
	return nil
}

// setXattrs sets the attributes that a user may carry into an image: his own,
// and file capabilities. Those of the overlay and of security modules are the
// node's business.
func setXattrs(parent int, base string, header *tar.Header) error {
	for key, value := range header.PAXRecords {
		name, ok := strings.CutPrefix(key, "SCHILY.xattr.")
		if !ok || name != "security.capability" && !strings.HasPrefix(name, "user.") {
			continue
		}
		// There is no setxattrat(2) on older kernels. The last part is neither a
		// link (checked by the caller) nor replaceable by anybody.
		at := filepath.Join("/proc/self/fd", fmt.Sprint(parent), base)
		if err := unix.Lsetxattr(at, name, []byte(value), 0); err != nil && err != unix.ENOTSUP {
			return fmt.Errorf("cannot set the attribute %s: %w", name, err)
		}
	}
	return nil
}

// clear removes from dir what lower layers put there.
func (t *tree) clear(dir int, name string) error {
	names, err := readNames(dir)
	if err != nil {
		return err
	}
	for _, child := range names {
		inside := path.Join(name, child)
		if !t.written[inside] {
			if err := removeAt(dir, child); err != nil {
				return err
			}
			continue
		}
		// Of this layer, but if it is a directory, lower layers may be in it.
		fd, err := unix.Openat(dir, child, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == unix.ENOTDIR || err == unix.ELOOP {
			continue
		}
		if err != nil {
			return err
		}
		if err := errors.Join(t.clear(fd, inside), unix.Close(fd)); err != nil {
			return err
		}
	}
	return nil
}

func readNames(dir int) ([]string, error) {
	fd, err := unix.Openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "directory")
	defer file.Close()
	return file.Readdirnames(-1)
}

// removeAt removes base and all below, never following a link. Missing is fine.
func removeAt(parent int, base string) error {
	root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", parent))
	if err != nil {
		return err
	}
	defer root.Close()
	return root.RemoveAll(base)
}
