package repository

import (
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"
)

const (
	// batchPages is how many pages one goroutine reads and works on at a time.
	batchPages = 1024
	batchSize  = batchPages * pageSize
	// maxWindowChunks bounds how many chunks a window may be scattered over: a
	// window that needs more is stored anew.
	maxWindowChunks = 12
)

// batch is a stretch of one file to be turned into runs.
type batch struct {
	open   func() (*os.File, error)
	offset int64 // a multiple of pageSize
	length int64
	hole   bool // it has no content, and any length; else length <= batchSize
	// mapped says that the file does not change and lies in memory, so that it
	// can be looked at where it is.
	mapped bool
	// addresses and parent have one element per page of a pages image; they are
	// nil for other files, which are cut by offset.
	addresses []uint64
	parent    []cachedPage
	// begins is set when a new segment has to begin here.
	begins bool
}

// batchResult is what became of a batch.
type batchResult struct {
	segment segment
	stored  int64 // bytes that the chunks have in packs, each counted once
	cache   []byte
}

// chunker works on batches, one at a time.
type chunker struct {
	upload *upload
	seed   uint64 // of the page cache

	data    []byte // of the batch: buf, or a mapping of the file
	buf     []byte // nil until it is needed
	mapping []byte
	gather  []byte // pages of several windows that changed
	compact []byte // a window without its zero pages
	zip     []byte
	news    []newChunk // of the batch, not in a pack yet
	arena   []byte     // what they hold beyond data

	b       *batch
	out     *segment
	known   map[ID]int // chunks of out
	stored  int64
	prints  [batchPages]xxh3.Uint128
	kind    [batchPages]pageKind
	where   [batchPages]pageRef
	waiting []int // pages that are in gather
}

type pageKind uint8

const (
	pageZero pageKind = iota
	pageChanged
	pageSame // as in the parent
)

// pageRef says where a page's content lies.
type pageRef struct {
	chunk int // in segment.Chunks
	page  int
}

func newChunker(u *upload, seed uint64) *chunker {
	return &chunker{
		upload:  u,
		seed:    seed,
		gather:  make([]byte, 0, maxChunk),
		compact: make([]byte, 0, maxChunk),
		zip:     make([]byte, 0, maxChunk+maxChunk/8),
	}
}

// work reads a batch and stores what is new in it.
//
// For each window of 64 KiB:
//  1. pages that are all zero become holes;
//  2. a page whose fingerprint is that of the same address in the parent, and
//     whose chunk there may be referred to, refers to it;
//  3. when nothing but changed pages is left, or when they are more than two
//     thirds, or when the window would be scattered over more than
//     maxWindowChunks chunks, the whole window becomes one chunk;
//  4. otherwise the changed pages wait, and those of many windows become one
//     chunk together.
func (c *chunker) work(b *batch) (batchResult, error) {
	c.b, c.out, c.known, c.stored = b, &segment{}, make(map[ID]int), 0
	c.gather, c.waiting = c.gather[:0], c.waiting[:0]
	c.news = c.news[:0]
	if b.hole {
		c.out.add(b.length, hole, 0)
		return batchResult{segment: *c.out}, nil
	}
	if err := c.read(); err != nil {
		return batchResult{}, err
	}
	defer c.unmap()
	if c.arena = c.arena[:0]; cap(c.arena) < int(b.length) {
		c.arena = make([]byte, 0, b.length)
	}
	pages := c.pages()
	for from := 0; from < pages; {
		to := c.windowEnd(from, pages)
		if err := c.window(from, to); err != nil {
			return batchResult{}, err
		}
		from = to
	}
	if err := c.flush(); err != nil {
		return batchResult{}, err
	}
	if err := c.upload.add(c.news); err != nil {
		return batchResult{}, err
	}
	for p := range pages {
		if c.kind[p] == pageZero {
			c.out.add(int64(len(c.page(p))), hole, 0)
		} else {
			c.out.add(int64(len(c.page(p))), c.where[p].chunk, c.where[p].page*pageSize)
		}
	}
	return batchResult{*c.out, c.stored, c.remember(pages)}, nil
}

func (c *chunker) read() error {
	f, err := c.b.open()
	if err != nil {
		return err
	}
	defer f.Close()
	if c.b.mapped && c.mapFile(f) {
		return nil
	}
	if c.buf == nil {
		c.buf = make([]byte, batchSize)
	}
	c.data = c.buf
	n, err := f.ReadAt(c.data[:c.b.length], c.b.offset)
	if err == io.EOF {
		return fmt.Errorf("%s ends at %d instead of %d bytes or more: %w", f.Name(), c.b.offset+int64(n), c.b.offset+c.b.length, ErrChanged)
	}
	return err
}

// mapFile makes data the file itself, and reports whether it could.
func (c *chunker) mapFile(f *os.File) bool {
	if fi, err := f.Stat(); err != nil || fi.Size() < c.b.offset+c.b.length {
		return false
	}
	p, err := unix.Mmap(int(f.Fd()), c.b.offset, int(c.b.length), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	c.mapping, c.data = p, p
	return err == nil
}

func (c *chunker) unmap() {
	if c.mapping != nil {
		unix.Munmap(c.mapping)
	}
	c.mapping = nil
}

func (c *chunker) pages() int { return int((c.b.length + pageSize - 1) / pageSize) }

// page is one page of the batch; the last of a file may be short.
func (c *chunker) page(p int) []byte {
	return c.data[p*pageSize : min(int64(p+1)*pageSize, c.b.length)]
}

// windowEnd returns the first page behind the window that page from begins.
func (c *chunker) windowEnd(from, pages int) int {
	if c.b.addresses == nil {
		first := int(c.b.offset/pageSize) % windowPages
		return min(from+windowPages-(first+from)%windowPages, pages)
	}
	to := from + 1
	for to < pages && c.b.addresses[to]/windowSize == c.b.addresses[from]/windowSize {
		to++
	}
	return to
}

func (c *chunker) window(from, to int) error {
	changed, same, chunks, err := c.compare(from, to)
	if err != nil {
		return err
	}
	switch {
	case changed == 0:
		return nil
	case same == 0, changed > 2*same, chunks+1 > maxWindowChunks:
		return c.store(from, to)
	}
	for p := from; p < to; p++ {
		if c.kind[p] != pageChanged {
			continue
		}
		if len(c.gather)+pageSize > maxChunk {
			if err := c.flush(); err != nil {
				return err
			}
		}
		c.gather = append(c.gather, c.page(p)...)
		c.waiting = append(c.waiting, p)
	}
	return nil
}

// compare sorts out the pages of a window. It returns how many changed, how
// many are the same, and how many chunks these lie in.
func (c *chunker) compare(from, to int) (changed, same, chunks int, err error) {
	var refs [windowPages]int
	for p := from; p < to; p++ {
		if isZero(c.page(p)) {
			c.kind[p] = pageZero
			continue
		}
		ref, known, err := c.lookUp(p)
		if err != nil {
			return 0, 0, 0, err
		}
		if !known {
			c.kind[p] = pageChanged
			changed++
			continue
		}
		c.kind[p], c.where[p] = pageSame, ref
		same++
		if !slices.Contains(refs[:chunks], ref.chunk) {
			refs[chunks] = ref.chunk
			chunks++
		}
	}
	return changed, same, chunks, nil
}

// lookUp finds a page where the parent had it, if it is the same and still there.
func (c *chunker) lookUp(p int) (ref pageRef, known bool, err error) {
	if c.b.addresses == nil {
		return ref, false, nil
	}
	c.prints[p] = fingerprintOf(c.page(p), c.seed)
	parent := &c.b.parent[p]
	if !parent.known || parent.fingerprint != c.prints[p] {
		return ref, false, nil
	}
	n, known, err := c.refer(parent.chunk)
	return pageRef{n, int(parent.page)}, known, err
}

// refer returns the number of a chunk that is in the repository already.
func (c *chunker) refer(id ID) (int, bool, error) {
	if n, ok := c.known[id]; ok {
		return n, n >= 0, nil
	}
	stored, ok, err := c.upload.has(id)
	if err != nil {
		return 0, false, err
	}
	if !ok {
		c.known[id] = -1
		return 0, false, nil
	}
	return c.number(id, stored), true, nil
}

// number adds a chunk to the segment.
func (c *chunker) number(id ID, stored uint32) int {
	if n, ok := c.known[id]; ok && n >= 0 {
		return n
	}
	n := len(c.out.Chunks)
	c.out.Chunks = append(c.out.Chunks, id)
	c.known[id] = n
	c.stored += int64(stored)
	return n
}

// store makes one chunk of all pages of a window that are not zero.
func (c *chunker) store(from, to int) error {
	first, last, holes := -1, -1, false
	for p := from; p < to; p++ {
		if c.kind[p] == pageZero {
			continue
		}
		holes = holes || last >= 0 && last != p-1
		if first < 0 {
			first = p
		}
		last = p
	}
	plain := c.data[first*pageSize : last*pageSize+len(c.page(last))]
	if holes {
		plain = c.compact[:0]
		for p := first; p <= last; p++ {
			if c.kind[p] != pageZero {
				plain = append(plain, c.page(p)...)
			}
		}
	}
	ref, err := c.put(plain, !holes)
	for p, n := first, 0; p <= last; p++ {
		if c.kind[p] != pageZero {
			c.where[p] = pageRef{ref, n}
			n++
		}
	}
	return err
}

// flush makes a chunk of the pages that wait.
func (c *chunker) flush() error {
	if len(c.waiting) == 0 {
		return nil
	}
	ref, err := c.put(c.gather, false)
	for n, p := range c.waiting {
		c.where[p] = pageRef{ref, n}
	}
	c.gather, c.waiting = c.gather[:0], c.waiting[:0]
	return err
}

// put makes a chunk. It is stored with the others of the batch, at its end, so
// that they lie in order also when others work on other batches. stays says that
// plain is left alone until then.
func (c *chunker) put(plain []byte, stays bool) (int, error) {
	id, stored, chunk, err := c.upload.prepare(plain, c.zip)
	if err != nil {
		return 0, err
	}
	if chunk != nil {
		if !stays || chunk.how != codecRaw {
			from := len(c.arena)
			c.arena = append(c.arena, chunk.data...)
			chunk.data = c.arena[from:]
		}
		c.news = append(c.news, *chunk)
	}
	return c.number(id, stored), nil
}

// remember is the batch's block of the page cache.
func (c *chunker) remember(pages int) []byte {
	if c.b.addresses == nil {
		return nil
	}
	var block pageCacheBlock
	for p := range pages {
		if c.kind[p] != pageZero {
			block.add(c.b.addresses[p], c.prints[p], c.where[p].chunk, c.where[p].page)
		}
	}
	return block.payload(c.out.Chunks)
}

var zeros [pageSize]byte

func isZero(p []byte) bool { return string(p) == string(zeros[:len(p)]) }

// segmentRef is a segment in an entry: in a chunk, or inline when it is short.
type segmentRef struct {
	Bytes  int64  `json:"bytes"` // how much content it describes
	Chunk  *ID    `json:"chunk,omitempty"`
	Inline []byte `json:"inline,omitempty"`
}

// contentBuilder joins the runs of batches to segments.
type contentBuilder struct {
	upload *upload
	refs   []segmentRef
	// encoded are the segments themselves, for the file cache, while keep is
	// set; it is cleared when they grow long.
	keep    bool
	encoded [][]byte
	kept    int
	open    segment
	stored  int64
	zip     []byte
}

func (b *contentBuilder) add(s *segment, begins bool) error {
	if begins || b.open.bound()+s.bound() > maxChunk {
		if err := b.cut(); err != nil {
			return err
		}
	}
	first := len(b.open.Chunks)
	b.open.Chunks = append(b.open.Chunks, s.Chunks...)
	for _, r := range s.Runs {
		if r.Chunk != hole {
			r.Chunk += first
		}
		b.open.add(r.Length, r.Chunk, r.Offset)
	}
	return nil
}

func (b *contentBuilder) cut() error {
	if len(b.open.Runs) == 0 {
		return nil
	}
	err := b.addEncoded(b.open.encode(), b.open.length())
	b.open = segment{}
	return err
}

// addEncoded adds a finished segment.
func (b *contentBuilder) addEncoded(p []byte, length int64) error {
	ref := segmentRef{Bytes: length}
	if len(p) <= segmentInline {
		ref.Inline = p
	} else {
		id, stored, err := b.upload.put(p, b.zip)
		if err != nil {
			return err
		}
		ref.Chunk = &id
		b.stored += int64(stored)
	}
	b.refs = append(b.refs, ref)
	if b.kept += len(p); b.kept > fileCacheLongest {
		b.keep, b.encoded = false, nil
	}
	if b.keep {
		b.encoded = append(b.encoded, p)
	}
	return nil
}
