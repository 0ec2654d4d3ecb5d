package repository

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"dormouse/repository/backend"
)

// PartOptions of NewPart. The zero value of each is usable.
type PartOptions struct {
	// Holder says for people who uploads what, in the lease.
	Holder string
	// PageCache is a file on the local disk with the page table of this task's
	// last checkpoint. It is used if it is there and valid, and replaced by the
	// new checkpoint's on Commit. Empty: every page counts as changed, though
	// windows that are in the repository are not stored again.
	PageCache string
	// FileCache tells which files are unchanged; may be nil.
	FileCache *FileCache
	// Captured is when the task stood still; zero means now.
	Captured time.Time
	// Progress is told how many bytes of images and files are done in all. It is
	// called from one goroutine at a time.
	Progress func(bytes int64)
}

// PartResult is what Commit made.
type PartResult struct {
	ID string `json:"id"` // of the part, for the manifest
	// SizeBytes is the size of all images and files as captured.
	SizeBytes int64 `json:"size_bytes"`
	// StoredBytes is what the chunks it refers to take in packs; a chunk that
	// is used in several stretches of 4 MiB counts in each.
	StoredBytes int64 `json:"stored_bytes"`
	// NewBytes is what this upload added to the repository, metadata included.
	NewBytes int64 `json:"new_bytes"`
	// CacheErr says why the page or file cache could not be written. The part is
	// whole; the next checkpoint will read and store more than it need.
	CacheErr error `json:"-"`
}

// part is the content of a part object.
type part struct {
	Format  int        `json:"dormouse_part"`
	Created time.Time  `json:"created"`
	Lease   string     `json:"lease"`
	Holder  string     `json:"holder"`
	Trees   []treeRoot `json:"trees"`
	Size    int64      `json:"size_bytes"`
	Stored  int64      `json:"stored_bytes"`
}

// treeRoot is a tree in a part: a stream of entries, one JSON object a line,
// stored as content like that of a file.
type treeRoot struct {
	Name     string       `json:"name"`
	Entries  int64        `json:"entries"`
	Size     int64        `json:"size"` // of the stream, in bytes
	Segments []segmentRef `json:"segments"`
}

const (
	// imagesTree is the name of the tree that holds the images.
	imagesTree = "images"
	partLimit  = 256 << 20
)

// PartWriter uploads one task's share of a checkpoint. Its methods may not be
// called at once. After an error only Close is of use.
type PartWriter struct {
	repo   *Repository
	opts   PartOptions
	lease  *lease
	upload *upload
	part   part
	parent *pageCache
	cache  *pageCacheWriter // nil without a page cache
	done   int64            // logical bytes, for Progress
	closed atomic.Bool
}

// NewPart begins a part: it takes a lease, so that nothing the part may refer
// to is deleted, and brings the index up to date. ctx bounds only this call.
// It costs a few round trips, so call it before the task is frozen.
func (r *Repository) NewPart(ctx context.Context, opts PartOptions) (*PartWriter, error) {
	if opts.Captured.IsZero() {
		opts.Captured = time.Now()
	}
	l, err := r.acquire(ctx, opts.Holder)
	if err != nil {
		return nil, err
	}
	w := &PartWriter{
		repo: r, opts: opts, lease: l,
		upload: r.newUpload(context.WithoutCancel(ctx), l),
		part:   part{Format: formatVersion, Created: time.Now().UTC(), Lease: l.record.ID, Holder: opts.Holder},
	}
	if opts.PageCache == "" {
		return w, nil
	}
	w.parent = openPageCache(opts.PageCache)
	seed := newSeed()
	if w.parent != nil {
		seed = w.parent.seed // so that fingerprints need to be computed once only
	}
	if w.cache, err = newPageCacheWriter(opts.PageCache, seed); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

// SetCaptured says when the task stood still, if that was not known to NewPart.
func (w *PartWriter) SetCaptured(t time.Time) { w.opts.Captured = t }

// Unchanged reports whether the content of a file is in the repository
// already. If so it stays there until Close, and AddTree will not open the file,
// unless its entry says Reread or another upload has met a newer version of the
// same file meanwhile.
func (w *PartWriter) Unchanged(key FileKey) bool {
	_, ok := w.cached(key)
	return ok
}

// cached returns the content of an unchanged file whose chunks are all there.
func (w *PartWriter) cached(key FileKey) ([]cachedSegment, bool) {
	segments, ok := w.opts.FileCache.get(key)
	if !ok {
		return nil, false
	}
	for _, cs := range segments {
		s, err := decodeSegment(cs.encoded, cs.length)
		if err != nil {
			return nil, false
		}
		for _, id := range s.Chunks {
			if _, ok, err := w.upload.has(id); !ok || err != nil {
				return nil, false
			}
		}
	}
	return segments, true
}

// AddImages adds the images that CRIU wrote to dir, which must not change before
// it has returned. Pages images that a pagemap image describes are cut by address
// and compared with the page cache.
func (w *PartWriter) AddImages(ctx context.Context, dir string) error {
	images, err := findImages(dir)
	if err != nil {
		return fmt.Errorf("checkpoint images: %w", err)
	}
	mapped := inMemory(dir)
	return w.addTree(ctx, imagesTree, func(yield func(*step, error) bool) {
		root := &TreeEntry{Entry: Entry{Path: ".", Type: TypeDir, Mode: 0o700}}
		if !yield(&step{entry: root, last: true}, nil) {
			return
		}
		for i := range images {
			if !images[i].steps(w.parent, mapped, yield) {
				return
			}
		}
	})
}

// AddTree adds files: "upper", "closure", whatever the caller restores by that
// name. Entries come as Walk gives them: the root "." first, a directory before
// what is in it, and all of that before what is not.
func (w *PartWriter) AddTree(ctx context.Context, name string, entries iter.Seq2[TreeEntry, error]) error {
	if name == "" || name == imagesTree {
		return fmt.Errorf("a tree cannot be named %q", name)
	}
	return w.addTree(ctx, name, func(yield func(*step, error) bool) {
		var order nesting
		for e, err := range entries {
			if err == nil {
				err = e.check()
			}
			if err == nil {
				_, err = order.enter(&e.Entry)
			}
			if err != nil {
				yield(nil, err)
				return
			}
			if !w.fileSteps(&e, yield) {
				return
			}
		}
		if !order.started {
			yield(nil, errors.New("the tree has no root entry"))
		}
	})
}

// step is a piece of work in adding a tree: a batch of an entry's content, or
// the entry itself where there is none to read.
type step struct {
	entry  *TreeEntry
	batch  *batch
	cached []cachedSegment
	region string // of the page cache
	last   bool   // of the entry
}

// fileSteps gives the steps of one entry; false when yield has had enough.
func (w *PartWriter) fileSteps(e *TreeEntry, yield func(*step, error) bool) bool {
	if e.Type != TypeFile || e.Size == 0 {
		return yield(&step{entry: e, last: true}, nil)
	}
	if !e.Reread {
		if segments, ok := w.cached(e.Key); ok {
			return yield(&step{entry: e, cached: segments, last: true}, nil)
		}
	}
	if e.Open == nil {
		return yield(nil, fmt.Errorf("%s: its content is not in the repository and it cannot be opened", e.Path))
	}
	for b, err := range fileBatches(e.Open, e.Size) {
		if err != nil {
			return yield(nil, fmt.Errorf("read %s: %w", e.Path, err))
		}
		if !yield(&step{entry: e, batch: b, last: b.offset+b.length == e.Size}, nil) {
			return false
		}
	}
	return true
}

// fileBatches cuts a file by offset and finds its holes.
func fileBatches(open func() (*os.File, error), size int64) iter.Seq2[*batch, error] {
	return func(yield func(*batch, error) bool) {
		if size <= batchSize {
			yield(&batch{open: open, length: size}, nil)
			return
		}
		f, err := open()
		if err != nil {
			yield(nil, err)
			return
		}
		defer f.Close()
		for off, last := int64(0), int64(0); off < size; {
			b := nextBatch(f, off, size)
			b.open, b.begins = open, off/segmentSpan != last/segmentSpan
			if !yield(b, nil) {
				return
			}
			last, off = off, off+b.length
		}
	}
}

// nextBatch is the hole at off, or as much data as fits a batch.
func nextBatch(f *os.File, off, size int64) *batch {
	data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // nothing but a hole
		data = size
	case err != nil: // the file system cannot tell
		data = off
	}
	if data = min(size, data-data%windowSize); data > off {
		return &batch{offset: off, length: data - off, hole: true}
	}
	return &batch{offset: off, length: min(size, off-off%batchSize+batchSize) - off}
}

// addTree works on steps in parallel and writes the entries in order.
func (w *PartWriter) addTree(ctx context.Context, name string, steps iter.Seq2[*step, error]) error {
	for _, t := range w.part.Trees {
		if t.Name == name {
			return fmt.Errorf("tree %q was added before", name)
		}
	}
	stop := context.AfterFunc(ctx, func() { w.upload.cancel(ctx.Err()) })
	defer stop()
	var seed uint64
	if w.cache != nil {
		seed = w.cache.seed
	}
	t := newTreeWriter(w)
	err := ordered(w.upload.ctx, w.repo.workers, steps,
		func() *chunker { return newChunker(w.upload, seed) },
		func(_ context.Context, c *chunker, s *step) (batchResult, error) {
			if s.batch == nil {
				return batchResult{}, nil
			}
			r, err := c.work(s.batch)
			if err != nil {
				err = fmt.Errorf("%s: %w", s.entry.Path, err)
			}
			return r, err
		},
		t.add)
	if err == nil {
		err = t.finish()
	}
	if cause := context.Cause(w.upload.ctx); cause != nil {
		err = cause // what the others failed for
	}
	if err != nil {
		return fmt.Errorf("store tree %q: %w", name, err)
	}
	w.part.Trees = append(w.part.Trees, treeRoot{Name: name, Entries: t.entries, Size: t.size, Segments: t.stream.refs})
	w.part.Stored += t.stored + t.stream.stored
	return nil
}

// treeWriter turns results into entries and these into a stream of lines.
type treeWriter struct {
	w       *PartWriter
	content *contentBuilder // of the present entry
	partial bool            // the present entry is not complete
	lines   []byte
	zip     []byte
	stream  contentBuilder
	entries int64
	size    int64
	stored  int64
}

func newTreeWriter(w *PartWriter) *treeWriter {
	zip := make([]byte, 0, maxChunk+maxChunk/8)
	t := &treeWriter{w: w, zip: zip, stream: contentBuilder{upload: w.upload, zip: zip}}
	t.begin()
	return t
}

func (t *treeWriter) begin() {
	t.content = &contentBuilder{upload: t.w.upload, zip: t.zip, keep: t.w.opts.FileCache != nil}
}

func (t *treeWriter) add(s *step, r batchResult) error {
	for _, cs := range s.cached {
		if err := t.content.addEncoded(cs.encoded, cs.length); err != nil {
			return err
		}
		if err := t.countCached(cs); err != nil {
			return err
		}
	}
	if s.batch != nil {
		if err := t.content.add(&r.segment, s.batch.begins); err != nil {
			return err
		}
		t.progress(s.batch.length)
	}
	t.stored += r.stored
	if t.w.cache != nil {
		t.w.cache.block(s.region, r.cache)
	}
	if t.partial = !s.last; t.partial {
		return nil
	}
	return t.entry(s)
}

// countCached adds up the chunks of a file that was not read.
func (t *treeWriter) countCached(cs cachedSegment) error {
	s, err := decodeSegment(cs.encoded, cs.length)
	if err != nil {
		return err
	}
	for _, id := range s.Chunks {
		stored, _, err := t.w.upload.has(id)
		if err != nil {
			return err
		}
		t.stored += int64(stored)
	}
	t.progress(cs.length)
	return nil
}

func (t *treeWriter) progress(n int64) {
	t.w.done += n
	if t.w.opts.Progress != nil {
		t.w.opts.Progress(t.w.done)
	}
}

// entry writes the line of an entry whose content is complete.
func (t *treeWriter) entry(s *step) error {
	if err := t.content.cut(); err != nil {
		return err
	}
	if s.cached == nil && s.batch != nil {
		t.w.opts.FileCache.put(s.entry.Key, t.w.opts.Captured, t.content)
	}
	record := recordOf(&s.entry.Entry)
	record.Segments = t.content.refs
	t.stored += t.content.stored
	t.w.part.Size += s.entry.Size
	t.begin()
	line, err := json.Marshal(record)
	if err != nil {
		return err
	}
	t.lines = append(append(t.lines, line...), '\n')
	t.entries++
	// Where the stream is cut depends on the paths near by, so that a file that
	// comes or goes leaves the chunks far from it as they are.
	if len(t.lines) < maxChunk/8 || xxh3.HashString(s.entry.Path)%64 != 0 && len(t.lines) < maxChunk {
		return nil
	}
	return t.flush()
}

// flush stores the lines as chunks of the stream.
func (t *treeWriter) flush() error {
	for len(t.lines) > 0 {
		n := min(len(t.lines), maxChunk)
		id, stored, err := t.w.upload.put(t.lines[:n], t.zip)
		if err != nil {
			return err
		}
		t.stored += int64(stored)
		t.size += int64(n)
		s := segment{Chunks: []ID{id}, Runs: []run{{Length: int64(n)}}}
		if err := t.stream.add(&s, false); err != nil {
			return err
		}
		t.lines = t.lines[n:]
	}
	t.lines = nil
	return nil
}

func (t *treeWriter) finish() error {
	if t.partial {
		return ErrChanged
	}
	if err := t.flush(); err != nil {
		return err
	}
	return t.stream.cut()
}

// Commit stores the part object, after everything it refers to, and replaces
// the page cache. The part stays safe from garbage collection until Close and
// for a grace period (GCOptions) after; so keep the PartWriter open until the
// manifest is written or given up.
func (w *PartWriter) Commit(ctx context.Context) (PartResult, error) {
	stop := context.AfterFunc(ctx, func() { w.upload.cancel(ctx.Err()) })
	defer stop()
	id, err := w.commit()
	if cause := context.Cause(w.upload.ctx); cause != nil {
		err = cause
	}
	if err != nil {
		return PartResult{}, fmt.Errorf("store the part: %w", err)
	}
	return PartResult{
		ID: id.String(), SizeBytes: w.part.Size, StoredBytes: w.part.Stored, NewBytes: w.upload.newBytes.Load(),
		CacheErr: w.publishCaches(),
	}, nil
}

func (w *PartWriter) commit() (ID, error) {
	if err := w.upload.finish(); err != nil {
		return ID{}, err
	}
	p, err := json.Marshal(&w.part)
	if err != nil {
		return ID{}, err
	}
	if len(p) > partLimit {
		return ID{}, fmt.Errorf("it has %d bytes, more than the %d allowed", len(p), partLimit)
	}
	id := hashOf(p)
	h := backend.Handle{Kind: backend.Part, Name: id.String()}
	if err := w.repo.be.Save(w.upload.ctx, h, bytes.NewReader(p), int64(len(p))); err != nil {
		return ID{}, err
	}
	w.upload.newBytes.Add(int64(len(p)))
	return id, w.lease.check()
}

func (w *PartWriter) publishCaches() error {
	err := w.opts.FileCache.flush()
	if w.cache != nil {
		err = errors.Join(err, w.cache.publish())
	}
	return err
}

// Close gives the lease back and frees everything. It may be called at any
// time and more than once; without Commit nothing of the part remains but
// chunks, which the next upload may use.
func (w *PartWriter) Close() error {
	if w.closed.Swap(true) {
		return nil
	}
	w.upload.abandon()
	w.parent.close()
	if w.cache != nil {
		w.cache.discard()
	}
	w.lease.release()
	return nil
}

// image is one file of CRIU's.
type image struct {
	path    string
	entry   Entry
	pagemap string // path of the pagemap image that describes it, or empty
}

// findImages lists a directory of images and matches pages with pagemaps.
func findImages(dir string) ([]image, error) {
	names, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var images []image
	pagemaps := make(map[string]string) // pages image → pagemap image
	sizes := make(map[string]int64)
	for _, d := range names {
		fi, err := d.Info()
		if err != nil {
			return nil, err
		}
		path := filepath.Join(dir, d.Name())
		if !fi.Mode().IsRegular() {
			return nil, fmt.Errorf("%s is not a regular file", path)
		}
		images = append(images, image{path: path, entry: Entry{
			Path: d.Name(), Type: TypeFile, Mode: uint32(fi.Mode().Perm()), ModTime: fi.ModTime().UnixNano(), Size: fi.Size(),
		}})
		if ok, _ := filepath.Match("pagemap-*.img", d.Name()); !ok {
			continue
		}
		id, size, err := pagemapOf(path)
		if err != nil {
			continue // stored like any other file
		}
		pages := fmt.Sprintf("pages-%d.img", id)
		if _, twice := sizes[pages]; twice {
			size = -1
		}
		pagemaps[pages], sizes[pages] = path, size
	}
	for i := range images {
		if e := images[i].entry; e.Size > 0 && sizes[e.Path] == e.Size {
			images[i].pagemap = pagemaps[e.Path]
		}
	}
	return images, nil
}

// inMemory reports whether a directory is on a file system that has nothing but
// memory below it.
func inMemory(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.TMPFS_MAGIC
}

func (im *image) open() (*os.File, error) { return os.Open(im.path) }

// steps gives the steps of one image; false when yield has had enough.
func (im *image) steps(parent *pageCache, mapped bool, yield func(*step, error) bool) bool {
	e := &TreeEntry{Entry: im.entry, Open: im.open}
	if im.entry.Size == 0 {
		return yield(&step{entry: e, last: true}, nil)
	}
	batches, region := fileBatches(im.open, im.entry.Size), ""
	if im.pagemap != "" {
		region = filepath.Base(im.pagemap)
		batches = pageBatches(im.open, pagemapRanges(im.pagemap), parent.region(region))
	}
	for b, err := range batches {
		if err != nil {
			return yield(nil, fmt.Errorf("read %s: %w", im.path, err))
		}
		b.mapped = mapped
		if !yield(&step{entry: e, batch: b, region: region, last: b.offset+b.length == e.Size}, nil) {
			return false
		}
	}
	return true
}

// pageBatches cuts a pages image by address: no window is in two batches.
func pageBatches(open func() (*os.File, error), ranges iter.Seq2[pageRange, error], parent *pageCacheReader) iter.Seq2[*batch, error] {
	return func(yield func(*batch, error) bool) {
		b := &batch{open: open}
		for address, err := range addresses(ranges) {
			if err != nil {
				yield(nil, err)
				return
			}
			if b.full(address) {
				next := &batch{open: open, offset: b.offset + b.length}
				next.begins = address/segmentSpan != b.addresses[0]/segmentSpan
				if !yield(b, nil) {
					return
				}
				b = next
			}
			b.addresses = append(b.addresses, address)
			b.parent = append(b.parent, parent.find(address))
			b.length += pageSize
		}
		if b.length > 0 {
			yield(b, nil)
		}
	}
}

// full reports whether the page at an address belongs into the next batch.
func (b *batch) full(address uint64) bool {
	n := len(b.addresses)
	if n == 0 || b.addresses[n-1]/windowSize == address/windowSize {
		return false
	}
	return n > batchPages-windowPages || b.addresses[0]/segmentSpan != address/segmentSpan
}
