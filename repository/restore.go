package repository

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// RestoreOptions of RestoreTree and RestoreImages.
type RestoreOptions struct {
	// KeepOwner leaves files to the user who restores.
	KeepOwner bool
	// Only, if set, chooses the entries to restore. The directories that lead
	// to a chosen entry are restored too; for a hard link, choose its target.
	Only func(Entry) bool
	// Local, if set, names a file of this machine that may have the content of an
	// entry, or is empty. What it has, by the hashes, is not taken from the repository.
	Local func(Entry) string
	// Progress is told how many bytes are done in all, from several goroutines.
	Progress func(bytes int64)
}

// RestoreImages writes the images into dir, which must be absent or empty, for
// CRIU. When it fails, nothing is left in dir.
func (p *PartReader) RestoreImages(ctx context.Context, dir string, opts RestoreOptions) error {
	opts.KeepOwner = true
	return p.RestoreTree(ctx, imagesTree, dir, opts)
}

// RestoreTree writes a tree into dest, which must be absent or empty: content,
// holes, modes, owners, times, extended attributes. Every chunk's hash is
// checked before any of it is written. When it fails, nothing is left in dest.
//
// It cannot write anywhere else: each name is created, never followed, in a
// directory that this call itself has made.
func (p *PartReader) RestoreTree(ctx context.Context, name, dest string, opts RestoreOptions) error {
	t, err := p.tree(name)
	if err != nil {
		return err
	}
	root, created, err := emptyDir(dest)
	if err != nil {
		return fmt.Errorf("restore tree %q: %w", name, err)
	}
	defer unix.Close(root)
	r := &restorer{repo: p.repo, opts: opts, root: root, workers: p.repo.workers}
	if err := r.run(ctx, t); err != nil {
		return errors.Join(fmt.Errorf("restore tree %q of part %s: %w", name, p.id, err), clean(dest, created))
	}
	return nil
}

// emptyDir opens a directory that has nothing in it.
func emptyDir(dir string) (fd int, created bool, err error) {
	err = os.Mkdir(dir, 0o700)
	created = err == nil
	if err != nil && !errors.Is(err, os.ErrExist) {
		return -1, false, err
	}
	f, err := os.Open(dir)
	if err != nil {
		return -1, created, err
	}
	defer f.Close()
	if names, _ := f.Readdirnames(1); len(names) > 0 {
		return -1, created, fmt.Errorf("%s is not empty", dir)
	}
	fd, err = unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, created, fmt.Errorf("open %s: %w", dir, err)
	}
	return fd, created, nil
}

func clean(dir string, created bool) error {
	if created {
		return os.RemoveAll(dir)
	}
	names, err := os.ReadDir(dir)
	for _, d := range names {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, d.Name())))
	}
	return err
}

// restorer makes one tree. One goroutine makes names in order; workers fill files.
type restorer struct {
	repo    *Repository
	opts    RestoreOptions
	workers int
	root    int
	dirs    []openDir // from the root to the present directory
	order   nesting
	jobs    chan fillJob
	done    atomic.Int64
}

// openDir is a directory that is being filled; not made yet while fd is -1.
type openDir struct {
	fd    int
	entry Entry
}

// fillJob is a segment of a file.
type fillJob struct {
	file *openFile
	ref  segmentRef
	at   int64
}

// openFile is a file until its last segment is written.
type openFile struct {
	fd    int
	local *os.File // that may have the same content, or nil
	entry Entry
	left  atomic.Int64
}

func (f *openFile) close() {
	unix.Close(f.fd)
	if f.local != nil {
		f.local.Close()
	}
}

func (r *restorer) run(ctx context.Context, t *treeRoot) error {
	g, ctx := errgroup.WithContext(ctx)
	r.jobs = make(chan fillJob, r.workers)
	for range r.workers {
		g.Go(func() error { return r.fill(ctx) })
	}
	g.Go(func() error {
		defer close(r.jobs)
		return r.names(ctx, t)
	})
	err := g.Wait()
	for job := range r.jobs { // left over after an error
		job.file.release(&r.opts, false)
	}
	return err
}

// names makes every entry and hands content to the workers.
func (r *restorer) names(ctx context.Context, t *treeRoot) error {
	defer func() {
		for _, d := range r.dirs {
			if d.fd >= 0 {
				unix.Close(d.fd)
			}
		}
	}()
	for record, err := range r.repo.records(ctx, t) {
		if err != nil {
			return err
		}
		if err := r.make(ctx, record); err != nil {
			return fmt.Errorf("%s: %w", record.Path, err)
		}
	}
	for len(r.dirs) > 0 {
		if err := r.leave(); err != nil {
			return err
		}
	}
	if !r.order.started {
		return &DamagedError{Object: "tree " + t.Name, Err: errors.New("it has no root")}
	}
	return nil
}

// make creates one entry.
func (r *restorer) make(ctx context.Context, record *entryRecord) error {
	e := record.entry()
	left, err := r.order.enter(&e)
	if err != nil {
		return &DamagedError{Object: "a list of entries", Err: err}
	}
	for range left {
		if err := r.leave(); err != nil {
			return err
		}
	}
	chosen := e.Path == "." || r.opts.Only == nil || r.opts.Only(e)
	if e.Type == TypeDir {
		r.dirs = append(r.dirs, openDir{-1, e})
	}
	if !chosen {
		return nil
	}
	if err := r.makeDirs(); err != nil || e.Type == TypeDir {
		return err
	}
	dir, name := r.dirs[len(r.dirs)-1].fd, path.Base(e.Path)
	switch e.Type {
	case TypeFile:
		return r.makeFile(ctx, dir, name, e, record.Segments)
	case TypeHardlink:
		return r.link(dir, name, e.Target)
	case TypeSymlink:
		err = unix.Symlinkat(e.Target, dir, name)
	default:
		err = unix.Mknodat(dir, name, nodeMode(e.Type)|0o600, int(unix.Mkdev(e.Major, e.Minor)))
	}
	if err != nil {
		return fmt.Errorf("create %s: %w", e.Type, err)
	}
	return r.dress(dir, name, &e)
}

func nodeMode(t EntryType) uint32 {
	switch t {
	case TypeFifo:
		return unix.S_IFIFO
	case TypeSocket:
		return unix.S_IFSOCK
	case TypeChar:
		return unix.S_IFCHR
	}
	return unix.S_IFBLK
}

// makeDirs makes the directories that lead to the present entry, as far as
// they are not there.
func (r *restorer) makeDirs() error {
	parent := r.root
	for i := range r.dirs {
		d := &r.dirs[i]
		if d.fd >= 0 {
			parent = d.fd
			continue
		}
		name := path.Base(d.entry.Path)
		if name != "." {
			if err := unix.Mkdirat(parent, name, 0o700); err != nil {
				return fmt.Errorf("create directory: %w", err)
			}
		}
		fd, err := unix.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open directory: %w", err)
		}
		d.fd, parent = fd, fd
	}
	return nil
}

// leave completes the innermost directory.
func (r *restorer) leave() error {
	d := r.dirs[len(r.dirs)-1]
	r.dirs = r.dirs[:len(r.dirs)-1]
	if d.fd < 0 {
		return nil
	}
	defer unix.Close(d.fd)
	return dressFD(d.fd, &d.entry, &r.opts)
}

func (r *restorer) makeFile(ctx context.Context, dir int, name string, e Entry, refs []segmentRef) error {
	fd, err := unix.Openat(dir, name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	f := &openFile{fd: fd, local: r.openLocal(e), entry: e}
	f.left.Store(int64(len(refs)))
	if err := unix.Ftruncate(fd, e.Size); err != nil {
		f.close()
		return fmt.Errorf("set the size: %w", err)
	}
	if len(refs) == 0 {
		f.left.Store(1)
		return f.release(&r.opts, true)
	}
	var at int64
	for i, ref := range refs {
		select {
		case r.jobs <- fillJob{f, ref, at}:
		case <-ctx.Done():
			if f.left.Add(int64(i-len(refs))) == 0 {
				f.close()
			}
			return ctx.Err()
		}
		at += ref.Bytes
	}
	return nil
}

// openLocal opens a file that may have the content of an entry; nil if there is none.
func (r *restorer) openLocal(e Entry) *os.File {
	if r.opts.Local == nil {
		return nil
	}
	path := r.opts.Local(e)
	if path == "" {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	return f
}

// release counts a segment as done, and completes the file after the last.
func (f *openFile) release(opts *RestoreOptions, ok bool) error {
	if f.left.Add(-1) > 0 {
		return nil
	}
	defer f.close()
	if !ok {
		return nil
	}
	return dressFD(f.fd, &f.entry, opts)
}

// fill writes segments until there are no more.
func (r *restorer) fill(ctx context.Context) error {
	f := newFetcher(r.repo)
	for job := range r.jobs {
		err := r.fillOne(ctx, f, &job)
		if err2 := job.file.release(&r.opts, err == nil); err == nil {
			err = err2
		}
		if err != nil {
			return fmt.Errorf("%s: %w", job.file.entry.Path, err)
		}
		if done := r.done.Add(job.ref.Bytes); r.opts.Progress != nil {
			r.opts.Progress(done)
		}
	}
	return nil
}

func (r *restorer) fillOne(ctx context.Context, f *fetcher, job *fillJob) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s, err := r.repo.segment(ctx, &job.ref)
	if err != nil {
		return err
	}
	if job.file.local != nil {
		if s, err = job.file.copyLocal(s, job.at); err != nil {
			return err
		}
	}
	return f.fetch(ctx, s, job.at, job.file.write)
}

func (f *openFile) write(p []byte, at int64) error {
	for len(p) > 0 {
		n, err := unix.Pwrite(f.fd, p, at)
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		p, at = p[n:], at+int64(n)
	}
	return nil
}

// copyLocal takes what it can of a segment that begins at an offset from the local
// file, and returns the segment with holes there.
func (f *openFile) copyLocal(s *segment, at int64) (*segment, error) {
	rest := &segment{Chunks: s.Chunks, Runs: slices.Clone(s.Runs)}
	buf := make([]byte, maxChunk)
	for i, r := range s.Runs {
		if r.Chunk != hole && r.Offset == 0 && r.Length <= maxChunk {
			p := buf[:r.Length]
			if n, _ := f.local.ReadAt(p, at); n == len(p) && hashOf(p) == s.Chunks[r.Chunk] {
				if err := f.write(p, at); err != nil {
					return nil, err
				}
				rest.Runs[i].Chunk = hole
			}
		}
		at += r.Length
	}
	return rest, nil
}

// link makes another name of an entry that was made before.
func (r *restorer) link(dir int, name, target string) error {
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV}
	from, err := unix.Openat2(r.root, path.Dir(target), how)
	if err != nil {
		return fmt.Errorf("hard link to %s: %w", target, err)
	}
	defer unix.Close(from)
	if err := unix.Linkat(from, path.Base(target), dir, name, 0); err != nil {
		return fmt.Errorf("hard link to %s: %w", target, err)
	}
	return nil
}

// dressFD gives an open file or directory its metadata. The order matters: a
// change of owner clears setuid bits and security.capability.
func dressFD(fd int, e *Entry, opts *RestoreOptions) error {
	if !opts.KeepOwner {
		if err := unix.Fchown(fd, int(e.UID), int(e.GID)); err != nil {
			return fmt.Errorf("%s: set the owner %d:%d: %w", e.Path, e.UID, e.GID, err)
		}
	}
	for name, value := range e.Xattrs {
		if err := unix.Fsetxattr(fd, name, value, 0); err != nil {
			return fmt.Errorf("%s: set the extended attribute %s: %w", e.Path, name, err)
		}
	}
	if err := unix.Fchmod(fd, e.Mode); err != nil {
		return fmt.Errorf("%s: set the mode %o: %w", e.Path, e.Mode, err)
	}
	if err := setTimes(fd, "", e.ModTime, unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("%s: set the time: %w", e.Path, err)
	}
	return nil
}

// dress gives a node that cannot be opened its metadata.
func (r *restorer) dress(dir int, name string, e *Entry) error {
	if !r.opts.KeepOwner {
		if err := unix.Fchownat(dir, name, int(e.UID), int(e.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("set the owner %d:%d: %w", e.UID, e.GID, err)
		}
	}
	for attr, value := range e.Xattrs {
		if err := unix.Lsetxattr("/proc/self/fd/"+strconv.Itoa(dir)+"/"+name, attr, value, 0); err != nil {
			return fmt.Errorf("set the extended attribute %s: %w", attr, err)
		}
	}
	if e.Type != TypeSymlink { // whose mode means nothing
		if err := unix.Fchmodat(dir, name, e.Mode, 0); err != nil {
			return fmt.Errorf("set the mode %o: %w", e.Mode, err)
		}
	}
	if err := setTimes(dir, name, e.ModTime, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set the time: %w", err)
	}
	return nil
}

func setTimes(dir int, name string, mtime int64, flags int) error {
	ts := unix.NsecToTimespec(mtime)
	return unix.UtimesNanoAt(dir, name, []unix.Timespec{ts, ts}, flags)
}
