// Package local keeps a repository in a directory, of a disk or of a file
// system that several machines share.
//
//	config              the config object
//	packs/ab/abcdef...  packs, spread over 256 directories by their first two characters
//	index/ parts/ manifests/ locks/
//	tmp/                objects being written
//
// Large objects are written and read past the page cache where that is possible
// (direct.go). An object is written to tmp/, synced, linked to its final name
// (link(2) fails when that exists, on network file systems too), and the directory
// is synced.
// Directories have mode 0700 and files 0600: checkpoints hold the memory of
// other people's programs.
package local

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/repository/backend"
)

// Local is a backend.Backend in a directory.
type Local struct {
	dir string
}

var _ backend.Backend = (*Local)(nil)

// NoSpaceError says which directory is full. It is backend.ErrNoSpace.
type NoSpaceError struct {
	Dir string
	Err error // ENOSPC or EDQUOT
}

func (e *NoSpaceError) Error() string {
	what := "no space left"
	if errors.Is(e.Err, syscall.EDQUOT) {
		what = "the disk quota is used up"
	}
	return fmt.Sprintf("%s in the repository directory %s: make room there or remove checkpoints that are no longer needed", what, e.Dir)
}

// Is makes errors.Is(err, backend.ErrNoSpace) true.
func (e *NoSpaceError) Is(target error) bool { return target == backend.ErrNoSpace }

func (e *NoSpaceError) Unwrap() error { return e.Err }

// Open uses dir as a repository's place and makes the directories it needs.
func Open(dir string) (*Local, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("repository directory: %w", err)
	}
	l := &Local{dir: dir}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, l.wrap("create the repository directory", err)
	}
	for _, sub := range []string{"packs", "index", "parts", "manifests", "locks", "tmp"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, l.wrap("create the repository directory", err)
		}
	}
	return l, syncDir(dir)
}

// Location is the directory.
func (l *Local) Location() string { return l.dir }

// Save implements backend.Backend.
func (l *Local) Save(ctx context.Context, h backend.Handle, rd io.Reader, size int64) error {
	if err := errors.Join(h.Valid(), ctx.Err()); err != nil {
		return err
	}
	if _, err := os.Lstat(l.path(h)); err == nil {
		return fmt.Errorf("save %s: %w", h, backend.ErrExist)
	}
	tmp := filepath.Join(l.dir, "tmp", string(h.Kind)+"-"+rand.Text())
	defer os.Remove(tmp)
	if err := l.write(ctx, tmp, rd, size); err != nil {
		return l.wrap("save "+h.String(), err)
	}
	if err := l.publish(tmp, l.path(h)); err != nil {
		return l.wrap("save "+h.String(), err)
	}
	return nil
}

func (l *Local) write(ctx context.Context, name string, rd io.Reader, size int64) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := &exactWriter{ctx: ctx, f: f, left: size, large: size >= largeObject}
	if _, err := io.Copy(w, rd); err != nil {
		return err
	}
	if w.left > 0 {
		return errSize
	}
	return f.Sync()
}

func (l *Local) publish(tmp, final string) error {
	err := os.Link(tmp, final)
	if errors.Is(err, fs.ErrNotExist) { // the first pack of its directory
		if err := os.MkdirAll(filepath.Dir(final), 0o700); err != nil {
			return err
		}
		if err := syncDir(filepath.Dir(filepath.Dir(final))); err != nil {
			return err
		}
		err = os.Link(tmp, final)
	}
	if errors.Is(err, fs.ErrExist) {
		return backend.ErrExist
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(final))
}

// ReadAt implements backend.Backend.
func (l *Local) ReadAt(ctx context.Context, h backend.Handle, p []byte, off int64) (int, error) {
	if err := errors.Join(h.Valid(), ctx.Err()); err != nil {
		return 0, err
	}
	f, err := os.Open(l.path(h))
	if err != nil {
		return 0, l.wrap("read "+h.String(), err)
	}
	defer f.Close()
	n, err := readAt(f, p, off)
	if err == io.EOF {
		return n, io.EOF
	}
	return n, l.wrap("read "+h.String(), err)
}

// Stat implements backend.Backend.
func (l *Local) Stat(ctx context.Context, h backend.Handle) (backend.Info, error) {
	if err := errors.Join(h.Valid(), ctx.Err()); err != nil {
		return backend.Info{}, err
	}
	fi, err := os.Lstat(l.path(h))
	if err != nil {
		return backend.Info{}, l.wrap("look up "+h.String(), err)
	}
	return backend.Info{Name: h.Name, Size: fi.Size(), Modified: fi.ModTime()}, nil
}

// List implements backend.Backend.
func (l *Local) List(ctx context.Context, kind backend.Kind, fn func(backend.Info) error) error {
	switch kind {
	case backend.Config:
		info, err := l.Stat(ctx, backend.Handle{Kind: kind, Name: string(kind)})
		if errors.Is(err, backend.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return fn(info)
	case backend.Pack:
		dirs, err := os.ReadDir(l.kindDir(kind))
		if err != nil {
			return l.wrap("list packs", err)
		}
		for _, d := range dirs {
			if !d.IsDir() {
				continue
			}
			if err := l.listDir(ctx, filepath.Join(l.kindDir(kind), d.Name()), fn); err != nil {
				return err
			}
		}
		return nil
	}
	return l.listDir(ctx, l.kindDir(kind), fn)
}

func (l *Local) listDir(ctx context.Context, dir string, fn func(backend.Info) error) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return l.wrap("list "+dir, err)
	}
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) || err == nil && !fi.Mode().IsRegular() {
			continue
		}
		if err != nil {
			return l.wrap("list "+dir, err)
		}
		if err := fn(backend.Info{Name: e.Name(), Size: fi.Size(), Modified: fi.ModTime()}); err != nil {
			return err
		}
	}
	return nil
}

// Remove implements backend.Backend.
func (l *Local) Remove(ctx context.Context, h backend.Handle) error {
	if err := errors.Join(h.Valid(), ctx.Err()); err != nil {
		return err
	}
	err := os.Remove(l.path(h))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return l.wrap("remove "+h.String(), err)
	}
	return syncDir(filepath.Dir(l.path(h)))
}

// RemoveIncomplete implements backend.Backend.
func (l *Local) RemoveIncomplete(ctx context.Context, olderThan time.Duration) error {
	tmp := filepath.Join(l.dir, "tmp")
	return l.listDir(ctx, tmp, func(i backend.Info) error {
		if time.Since(i.Modified) < olderThan {
			return nil
		}
		err := os.Remove(filepath.Join(tmp, i.Name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return l.wrap("clean up", err)
		}
		return nil
	})
}

func (l *Local) kindDir(kind backend.Kind) string {
	switch kind {
	case backend.Config:
		return l.dir
	case backend.Index:
		return filepath.Join(l.dir, "index")
	}
	return filepath.Join(l.dir, string(kind)+"s")
}

func (l *Local) path(h backend.Handle) string {
	if h.Kind == backend.Pack {
		return filepath.Join(l.kindDir(h.Kind), prefix(h.Name), h.Name)
	}
	return filepath.Join(l.kindDir(h.Kind), h.Name)
}

// prefix spreads packs; names are hashes, so their first characters do.
func prefix(name string) string {
	return strings.ReplaceAll((name + "__")[:2], ".", "_")
}

// wrap gives an error of the file system its meaning in the contract.
func (l *Local) wrap(doing string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return &NoSpaceError{Dir: l.dir, Err: err}
	case errors.Is(err, backend.ErrExist):
		return fmt.Errorf("%s: %w", doing, backend.ErrExist)
	case errors.Is(err, fs.ErrNotExist):
		if _, statErr := os.Stat(l.dir); statErr != nil {
			return fmt.Errorf("%s: the repository directory %s is gone: %w", doing, l.dir, err)
		}
		return fmt.Errorf("%s in %s: %w", doing, l.dir, backend.ErrNotExist)
	}
	return fmt.Errorf("%s in %s: %w", doing, l.dir, err)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

var errSize = errors.New("the data has not the announced size")

const (
	// largeObject goes past the page cache when it is written. In smaller ones are the
	// descriptions of what the large ones have.
	largeObject = 8 << 20
	// largeRead is how much has to be read at once to go past the page cache, unless
	// it is there.
	largeRead = 256 << 10
)

func readAt(f *os.File, p []byte, off int64) (int, error) {
	if len(p) < largeRead || cached(f, off, len(p)) {
		return f.ReadAt(p, off)
	}
	return directly(f, p, off, f.ReadAt)
}

// exactWriter writes to a file, no more than was announced and no longer than
// ctx lasts. A reader in memory writes itself into it without a copy.
type exactWriter struct {
	ctx   context.Context
	f     *os.File
	at    int64
	left  int64
	large bool
}

const writeStep = 4 << 20

func (w *exactWriter) Write(p []byte) (n int, err error) {
	if int64(len(p)) > w.left {
		return 0, errSize
	}
	for n < len(p) {
		if err := w.ctx.Err(); err != nil {
			return n, err
		}
		m, err := w.step(p[n:min(n+writeStep, len(p))])
		n += m
		w.at += int64(m)
		w.left -= int64(m)
		if err != nil {
			return n, err
		}
	}
	return n, w.ctx.Err()
}

func (w *exactWriter) step(p []byte) (n int, err error) {
	if w.large {
		n, err = directly(w.f, p, w.at, w.f.WriteAt)
	} else {
		n, err = w.f.WriteAt(p, w.at)
	}
	if err == nil {
		startWriting(w.f, w.at, int64(n))
	}
	return n, err
}

// startWriting has the kernel begin to write a stretch to the disk, so that the
// final sync finds little left to wait for. It may fail: the sync decides.
func startWriting(f *os.File, at, length int64) {
	_ = unix.SyncFileRange(int(f.Fd()), at, length, unix.SYNC_FILE_RANGE_WRITE)
}
