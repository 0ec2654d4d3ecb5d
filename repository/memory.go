package repository

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"sync"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"
)

// MemoryReader reads the pages images of a part, and verifies what it reads. It
// works ahead of its callers, who are expected to read each image from its
// beginning to its end, each byte once, in several goroutines at once. What it
// holds is bounded by memoryBlocks blocks, whatever the size of the images.
type MemoryReader struct {
	repo   *Repository
	ctx    context.Context // of all reading
	cancel context.CancelFunc
	files  []*memoryFile
	names  map[string]*memoryFile
	memory []byte   // of all blocks
	prints *os.File // fingerprints of the pages that were read, in order of files and pages
	seed   uint64

	mu      sync.Mutex
	changed *sync.Cond
	blocks  map[blockKey]*memoryBlock // wanted, being fetched, or held
	wanted  []*memoryBlock            // by a caller, and nobody fetches it yet
	free    [][]byte
	closed  bool
	err     error // the first
	workers sync.WaitGroup
}

const (
	memorySpan    = batchSize
	memoryBlocks  = 24
	memoryReserve = 2 // blocks that only callers may take
	printSize     = 16
)

// memoryFile is one pages image.
type memoryFile struct {
	record *entryRecord
	index  int
	starts []int64 // where each segment begins
	first  int64   // number of its first page among those of all files
	ahead  int64   // the next block to fetch before it is asked for
	asked  int64   // the block that was asked for last

	loading sync.Mutex
	loaded  int // which segment
	segment *segment
}

type blockKey struct {
	file  int
	block int64
}

// memoryBlock is a stretch of an image.
type memoryBlock struct {
	key   blockKey
	data  []byte // nil until it is being fetched
	ready bool
	err   error
	users int
	done  int64 // how much of it callers have read
}

// OpenMemory finds the pages images. The directory dir receives a file of 16 bytes
// per page. ctx ends all reading.
func (p *PartReader) OpenMemory(ctx context.Context, dir string, isPages func(Entry) bool) (_ *MemoryReader, err error) {
	t, err := p.tree(imagesTree)
	if err != nil {
		return nil, err
	}
	m := &MemoryReader{repo: p.repo, names: make(map[string]*memoryFile), blocks: make(map[blockKey]*memoryBlock), seed: newSeed()}
	m.changed = sync.NewCond(&m.mu)
	var pages int64
	for record, err := range p.repo.records(ctx, t) {
		if err != nil {
			return nil, fmt.Errorf("part %s: %w", p.id, err)
		}
		if e := record.entry(); e.Type != TypeFile || !isPages(e) {
			continue
		}
		f := &memoryFile{record: record, index: len(m.files), first: pages, asked: -1, loaded: -1}
		var at int64
		for _, ref := range record.Segments {
			f.starts = append(f.starts, at)
			at += ref.Bytes
		}
		m.files = append(m.files, f)
		m.names[string(record.Path)] = f
		pages += (record.Size + pageSize - 1) / pageSize
	}
	if m.prints, err = os.CreateTemp(dir, "fingerprints-"); err != nil {
		return nil, err
	}
	if m.memory, err = unix.Mmap(-1, 0, memoryBlocks*memorySpan, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		return nil, errors.Join(os.NewSyscallError("mmap", err), m.prints.Close())
	}
	// A fault per 2 MiB rather than per 4 KiB while a task waits for its memory,
	// madvise(2). Where the kernel has no huge pages, it takes longer, that is all.
	_ = unix.Madvise(m.memory, unix.MADV_HUGEPAGE)
	for i := range memoryBlocks {
		m.free = append(m.free, m.memory[i*memorySpan:(i+1)*memorySpan])
	}
	m.ctx, m.cancel = context.WithCancel(ctx)
	return m, nil
}

// Begin begins to read ahead; no Read returns before.
func (m *MemoryReader) Begin() {
	var blocks int64
	for _, f := range m.files {
		blocks += (f.record.Size + memorySpan - 1) / memorySpan
	}
	// Half of them wait for the disk while the others verify.
	for range min(int64(2*m.repo.workers), blocks) {
		m.workers.Go(func() { m.work(m.ctx) })
	}
}

// Sizes are the sizes of the images by name.
func (m *MemoryReader) Sizes() map[string]int64 {
	sizes := make(map[string]int64)
	for name, f := range m.names {
		sizes[name] = f.record.Size
	}
	return sizes
}

// Read calls use with the content of up to n bytes of an image at an offset, in
// parts that are valid during the call; with fewer only at the image's end.
func (m *MemoryReader) Read(name string, offset int64, n int, use func(parts [][]byte) error) error {
	f := m.names[name]
	if f == nil {
		return fmt.Errorf("the part has no image %q", name)
	}
	end := min(offset+int64(n), f.record.Size)
	var parts [][]byte
	var held []*memoryBlock
	defer func() { m.release(held, parts) }()
	for offset < end {
		b, err := m.acquire(f, offset/memorySpan)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		held = append(held, b)
		at := offset % memorySpan
		stop := min(memorySpan, end-b.key.block*memorySpan)
		parts = append(parts, b.data[at:stop])
		offset += stop - at
	}
	return use(parts)
}

// Rewind says that an image will be read once more from its beginning on, parts of
// it that were not read before.
func (m *MemoryReader) Rewind(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f := m.names[name]; f != nil {
		f.asked, f.ahead = -1, 0
		m.changed.Broadcast()
	}
}

// acquire returns a block that was fetched, for the caller to release.
func (m *MemoryReader) acquire(f *memoryFile, number int64) (*memoryBlock, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	key := blockKey{f.index, number}
	b := m.blocks[key]
	if b == nil {
		b = &memoryBlock{key: key}
		m.blocks[key] = b
		m.wanted = append(m.wanted, b)
	}
	b.users++
	if f.asked = number; f.ahead <= number {
		f.ahead = number + 1
	}
	m.changed.Broadcast()
	for !b.ready && !m.closed {
		m.changed.Wait()
	}
	switch {
	case b.err != nil:
		b.users--
		return nil, b.err
	case !b.ready:
		b.users--
		return nil, errMemoryClosed
	}
	return b, nil
}

var errMemoryClosed = errors.New("the restore has ended")

// release gives blocks back of which parts were read, one of each.
func (m *MemoryReader) release(held []*memoryBlock, parts [][]byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, b := range held {
		b.users--
		b.done += int64(len(parts[i]))
		if b.done >= m.length(b) && b.users == 0 {
			m.drop(b)
		}
	}
	m.changed.Broadcast()
}

// drop frees a block.
func (m *MemoryReader) drop(b *memoryBlock) {
	delete(m.blocks, b.key)
	m.free = append(m.free, b.data)
	b.data = nil
}

func (m *MemoryReader) length(b *memoryBlock) int64 {
	return min(memorySpan, m.files[b.key.file].record.Size-b.key.block*memorySpan)
}

// work fetches blocks until the reader is closed.
func (m *MemoryReader) work(ctx context.Context) {
	f := newFetcher(m.repo)
	for {
		b := m.next()
		if b == nil {
			return
		}
		err := m.fetch(ctx, f, b)
		m.mu.Lock()
		b.ready, b.err = true, err
		if err != nil && m.err == nil {
			m.err = err
		}
		m.changed.Broadcast()
		m.mu.Unlock()
	}
}

// next waits for a block to fetch: one that a caller waits for, or else one
// that will be needed soon.
func (m *MemoryReader) next() *memoryBlock {
	m.mu.Lock()
	defer m.mu.Unlock()
	for ; !m.closed; m.changed.Wait() {
		if len(m.wanted) > 0 && m.room() {
			b := m.wanted[0]
			m.wanted = m.wanted[1:]
			m.give(b)
			return b
		}
		if b := m.foresee(); b != nil {
			m.blocks[b.key] = b
			m.give(b)
			return b
		}
	}
	return nil
}

func (m *MemoryReader) give(b *memoryBlock) {
	last := len(m.free) - 1
	b.data, m.free = m.free[last], m.free[:last]
}

// room makes sure that there is a free block, if need be by dropping the one
// that nobody uses now and that is needed last.
func (m *MemoryReader) room() bool {
	if len(m.free) > 0 {
		return true
	}
	var last *memoryBlock
	var farthest int64
	for _, b := range m.blocks {
		if !b.ready || b.users > 0 || b.data == nil {
			continue
		}
		distance := b.key.block - m.files[b.key.file].asked
		if distance < 0 { // it was passed by
			distance = 1 << 62
		}
		if last == nil || distance > farthest {
			last, farthest = b, distance
		}
	}
	if last == nil {
		return false
	}
	if f := m.files[last.key.file]; last.key.block > f.asked {
		f.ahead = min(f.ahead, last.key.block)
	}
	m.drop(last)
	return true
}

// dropPassed drops a block that was left unread, or in part, well behind the reader
// of its image.
func (m *MemoryReader) dropPassed() bool {
	for _, b := range m.blocks {
		if b.ready && b.users == 0 && b.key.block+memoryBlocks/4 < m.files[b.key.file].asked {
			m.drop(b)
			return true
		}
	}
	return false
}

// foresee chooses a block of the image that is being read furthest behind what
// was fetched ahead of it, or of the first that was not begun.
func (m *MemoryReader) foresee() *memoryBlock {
	if len(m.free) <= memoryReserve && !m.dropPassed() {
		return nil
	}
	var best *memoryFile
	for _, f := range m.files {
		for f.ahead*memorySpan < f.record.Size && m.blocks[blockKey{f.index, f.ahead}] != nil {
			f.ahead++
		}
		if f.ahead*memorySpan >= f.record.Size {
			continue
		}
		if best == nil || f.asked >= 0 && (best.asked < 0 || f.ahead-f.asked < best.ahead-best.asked) {
			best = f
		}
	}
	if best == nil {
		return nil
	}
	b := &memoryBlock{key: blockKey{best.index, best.ahead}}
	best.ahead++
	return b
}

// fetch reads and verifies the content of a block.
func (m *MemoryReader) fetch(ctx context.Context, f *fetcher, b *memoryBlock) error {
	file := m.files[b.key.file]
	from := b.key.block * memorySpan
	end := from + m.length(b)
	var prints blockPrints
	for i := range file.starts {
		start := file.starts[i]
		stop := start + file.record.Segments[i].Bytes
		if stop <= from || start >= end {
			continue
		}
		s, err := m.loadSegment(ctx, file, i)
		if err != nil {
			return err
		}
		begin, length := max(start, from), min(end, stop)-max(start, from)
		f.verified = func(p []byte, at int64) { prints.add(p, begin-from+at, m.seed) }
		if err := f.fill(ctx, s.clip(begin-start, begin-start+length), b.data[begin-from:][:length]); err != nil {
			return err
		}
	}
	n := (end - from) / pageSize * printSize
	_, err := m.prints.WriteAt(prints[:n], (file.first+from/pageSize)*printSize)
	return err
}

// blockPrints are the fingerprints of the pages of a block; zero where a page is
// a hole, or in odd pieces.
type blockPrints [memorySpan / pageSize * printSize]byte

func (b *blockPrints) add(p []byte, at int64, seed uint64) {
	for ; at%pageSize == 0 && len(p) >= pageSize; at, p = at+pageSize, p[pageSize:] {
		putFingerprint(b[at/pageSize*printSize:], fingerprintOf(p[:pageSize], seed))
	}
}

func (m *MemoryReader) loadSegment(ctx context.Context, f *memoryFile, i int) (*segment, error) {
	f.loading.Lock()
	defer f.loading.Unlock()
	if f.loaded == i {
		return f.segment, nil
	}
	s, err := m.repo.segment(ctx, &f.record.Segments[i])
	if err == nil {
		f.loaded, f.segment = i, s
	}
	return s, err
}

// Err is the first error met, also while reading ahead.
func (m *MemoryReader) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Stop ends all reading and frees the blocks. Calls of Read must have returned,
// or fail.
func (m *MemoryReader) Stop() {
	m.mu.Lock()
	closed := m.closed
	m.closed = true
	m.changed.Broadcast()
	m.mu.Unlock()
	if closed {
		return
	}
	m.cancel()
	m.workers.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.inUse() {
		m.changed.Wait()
	}
	clear(m.blocks)
	unix.Munmap(m.memory)
	m.memory, m.free = nil, nil
}

func (m *MemoryReader) inUse() bool {
	for _, b := range m.blocks {
		if b.users > 0 {
			return true
		}
	}
	return false
}

// Close is Stop, and removes the fingerprints.
func (m *MemoryReader) Close() error {
	m.Stop()
	return errors.Join(m.prints.Close(), os.Remove(m.prints.Name()))
}

// SavePageCache writes the page cache for the pages that were read, so that the
// next checkpoint of the restored task stores only what changed. dir has the
// pagemap images of the part. Nothing of the repository but its metadata is read
// again.
func (m *MemoryReader) SavePageCache(ctx context.Context, dir, file string) error {
	w, err := newPageCacheWriter(file, m.seed)
	if err != nil {
		return err
	}
	defer w.discard()
	maps, err := filepath.Glob(filepath.Join(dir, "pagemap-*.img"))
	if err != nil {
		return err
	}
	for _, path := range maps {
		id, size, err := pagemapOf(path)
		if err != nil {
			continue // stored like any other file
		}
		f := m.names[fmt.Sprintf("pages-%d.img", id)]
		if f == nil || f.record.Size != size {
			continue
		}
		if err := m.cacheFile(ctx, w, f, path); err != nil {
			return fmt.Errorf("page cache of %s: %w", path, err)
		}
	}
	return w.publish()
}

// cacheFile adds the region of one pages image.
func (m *MemoryReader) cacheFile(ctx context.Context, w *pageCacheWriter, f *memoryFile, pagemap string) error {
	next, stop := iter.Pull2(addresses(pagemapRanges(pagemap)))
	defer stop()
	page := f.first
	for i := range f.record.Segments {
		s, err := m.loadSegment(ctx, f, i)
		if err != nil {
			return err
		}
		prints := make([]byte, s.length()/pageSize*printSize)
		if n, err := m.prints.ReadAt(prints, page*printSize); err != nil && err != io.EOF {
			return err
		} else {
			clear(prints[n:])
		}
		page += s.length() / pageSize
		payload, err := cacheSegment(s, prints, next)
		if err != nil || payload == nil && s.odd() {
			return err // not cut by pages: the rest stays out of the cache
		}
		w.block(filepath.Base(pagemap), payload)
	}
	return nil
}

// odd reports whether a segment is not made of whole pages.
func (s *segment) odd() bool {
	for _, r := range s.Runs {
		if r.Length%pageSize != 0 || r.Chunk != hole && r.Offset%pageSize != 0 {
			return true
		}
	}
	return false
}

// cacheSegment is the block of a page cache about a segment.
func cacheSegment(s *segment, prints []byte, next func() (uint64, error, bool)) ([]byte, error) {
	if s.odd() {
		return nil, nil
	}
	var block pageCacheBlock
	for _, r := range s.Runs {
		for n := range int(r.Length / pageSize) {
			address, err, ok := next()
			if err != nil || !ok {
				return nil, errors.Join(err, ErrChanged)
			}
			fp := getFingerprint(prints)
			prints = prints[printSize:]
			if r.Chunk != hole && fp != (xxh3.Uint128{}) { // zero: it was not read
				block.add(address, fp, r.Chunk, r.Offset/pageSize+n)
			}
		}
	}
	return block.payload(s.Chunks), nil
}
