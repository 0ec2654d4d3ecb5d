package repository

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/zeebo/xxh3"
)

// A page cache is a file on the agent's own disk that remembers, for each page
// of a task's last checkpoint, a fingerprint and where its content lies, so
// that the next checkpoint stores only the pages that changed. It may be lost
// or stale: what it refers to is looked up in the index before use, and what
// is not there counts as changed.
//
//	header   "DMPAGE" 0x00 0x01, seed u64
//	blocks   length u32, xxh3-64 of the payload u64, payload
//	toc      JSON: {"regions": {"pagemap-7.img": [offset, length], ...}}
//	trailer  length of the toc u32, xxh3-64 of the toc u64, "DMPG"
//
// A region is a run of blocks, in address order. A block's payload is
//
//	number of chunks (uvarint), their ids [32] each, then per page: distance to the
//	page before in pages (uvarint; of the first page: its number), fingerprint
//	[16], chunk (uvarint), page in the chunk (uvarint)
//
// Pages that are zero are left out. Integers are little-endian. A fingerprint
// is the 128-bit xxh3 of the page with the file's seed, which is random and
// secret, so that a task cannot prepare two pages of one fingerprint.
type pageCache struct {
	f       *os.File
	seed    uint64
	regions map[string][2]int64
}

var (
	pageCacheMagic = []byte("DMPAGE\x00\x01")
	pageCacheTail  = []byte("DMPG")
)

const (
	pageCacheHeader     = 16
	pageCacheTrailer    = 16
	pageCacheTOCLimit   = 64 << 20
	pageCacheBlockLimit = 1 << 20
)

// cachedPage is what a cache says about a page. The zero value says nothing.
type cachedPage struct {
	fingerprint xxh3.Uint128
	chunk       ID
	page        uint8 // in the chunk
	known       bool
}

func fingerprintOf(page []byte, seed uint64) xxh3.Uint128 { return xxh3.Hash128Seed(page, seed) }

func putFingerprint(p []byte, fp xxh3.Uint128) {
	binary.LittleEndian.PutUint64(p, fp.Lo)
	binary.LittleEndian.PutUint64(p[8:], fp.Hi)
}

func getFingerprint(p []byte) xxh3.Uint128 {
	return xxh3.Uint128{Lo: binary.LittleEndian.Uint64(p), Hi: binary.LittleEndian.Uint64(p[8:])}
}

func newSeed() uint64 {
	var seed [8]byte
	rand.Read(seed[:])
	return binary.LittleEndian.Uint64(seed[:])
}

// openPageCache opens a cache, or returns nil if there is none that can be used.
func openPageCache(path string) *pageCache {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	c, err := readPageCache(f)
	if err != nil {
		f.Close()
		return nil
	}
	return c
}

func readPageCache(f *os.File) (*pageCache, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	var head [pageCacheHeader]byte
	var tail [pageCacheTrailer]byte
	if _, err := f.ReadAt(head[:], 0); err != nil {
		return nil, err
	}
	if _, err := f.ReadAt(tail[:], fi.Size()-pageCacheTrailer); err != nil {
		return nil, err
	}
	n := int64(binary.LittleEndian.Uint32(tail[:]))
	if !bytes.HasPrefix(head[:], pageCacheMagic) || !bytes.Equal(tail[12:], pageCacheTail) || n > pageCacheTOCLimit {
		return nil, errors.New("not a page cache")
	}
	toc := make([]byte, n)
	if _, err := f.ReadAt(toc, fi.Size()-pageCacheTrailer-n); err != nil {
		return nil, err
	}
	if xxh3.Hash(toc) != binary.LittleEndian.Uint64(tail[4:]) {
		return nil, errors.New("the page cache is damaged")
	}
	c := &pageCache{f: f, seed: binary.LittleEndian.Uint64(head[8:])}
	var t struct{ Regions map[string][2]int64 }
	if err := json.Unmarshal(toc, &t); err != nil {
		return nil, err
	}
	c.regions = t.Regions
	return c, nil
}

func (c *pageCache) close() {
	if c != nil {
		c.f.Close()
	}
}

// region returns a reader of one region; of none when the cache does not have it.
func (c *pageCache) region(name string) *pageCacheReader {
	if c == nil {
		return &pageCacheReader{}
	}
	at, ok := c.regions[name]
	if !ok {
		return &pageCacheReader{}
	}
	return &pageCacheReader{in: bufio.NewReaderSize(io.NewSectionReader(c.f, at[0], at[1]), 64<<10)}
}

// pageCacheReader walks a region forward.
type pageCacheReader struct {
	in     *bufio.Reader // nil: nothing more
	chunks []ID
	block  varints
	first  bool   // the next page is the first of its block
	number uint64 // of page
	page   cachedPage
}

// find returns what the region says about the page at an address. Addresses
// must ascend from call to call.
func (r *pageCacheReader) find(address uint64) cachedPage {
	number := address / pageSize
	for !r.page.known || r.number < number {
		if !r.next() {
			return cachedPage{}
		}
	}
	if r.number != number {
		return cachedPage{}
	}
	return r.page
}

// next steps to the next page. Anything unexpected ends the region.
func (r *pageCacheReader) next() bool {
	for len(r.block.p) == 0 {
		if r.in == nil || r.nextBlock() != nil {
			r.in, r.page = nil, cachedPage{}
			return false
		}
	}
	step := r.block.next(addressLimit)
	if r.first {
		r.number, r.first = step, false
	} else {
		r.number += step
	}
	r.page.fingerprint = getFingerprint(r.block.bytes(16))
	chunk := r.block.next(uint64(len(r.chunks) - 1))
	r.page.page = uint8(r.block.next(windowPages - 1))
	if r.block.err != nil {
		r.in, r.page, r.block = nil, cachedPage{}, varints{}
		return false
	}
	r.page.chunk, r.page.known = r.chunks[chunk], true
	return true
}

func (r *pageCacheReader) nextBlock() error {
	var head [12]byte
	if _, err := io.ReadFull(r.in, head[:]); err != nil {
		return err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n > pageCacheBlockLimit {
		return errors.New("block too long")
	}
	p := make([]byte, n)
	if _, err := io.ReadFull(r.in, p); err != nil {
		return err
	}
	if xxh3.Hash(p) != binary.LittleEndian.Uint64(head[4:]) {
		return errors.New("block damaged")
	}
	r.block = varints{p: p}
	chunks := r.block.next(uint64(n / 32))
	if chunks == 0 {
		return errors.New("block without chunks")
	}
	r.chunks = make([]ID, chunks)
	for i := range r.chunks {
		copy(r.chunks[i][:], r.block.bytes(32))
	}
	r.first = true
	return r.block.err
}

// pageCacheBlock builds the payload of one block.
type pageCacheBlock struct {
	pages []byte
	last  uint64
}

func (b *pageCacheBlock) add(address uint64, fp xxh3.Uint128, chunk, page int) {
	number := address / pageSize
	b.pages = binary.AppendUvarint(b.pages, number-b.last)
	b.last = number
	b.pages = binary.LittleEndian.AppendUint64(b.pages, fp.Lo)
	b.pages = binary.LittleEndian.AppendUint64(b.pages, fp.Hi)
	b.pages = binary.AppendUvarint(b.pages, uint64(chunk))
	b.pages = binary.AppendUvarint(b.pages, uint64(page))
}

// payload is nil when there is nothing to say.
func (b *pageCacheBlock) payload(chunks []ID) []byte {
	if len(b.pages) == 0 {
		return nil
	}
	p := binary.AppendUvarint(nil, uint64(len(chunks)))
	for i := range chunks {
		p = append(p, chunks[i][:]...)
	}
	return append(p, b.pages...)
}

// pageCacheWriter writes the cache of the checkpoint that is being taken
// beside the present one; publish replaces that.
type pageCacheWriter struct {
	path    string
	f       *os.File
	out     *bufio.Writer
	at      int64
	seed    uint64
	regions map[string][2]int64
}

// newPageCacheWriter begins a cache whose fingerprints are made with seed.
func newPageCacheWriter(path string, seed uint64) (*pageCacheWriter, error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new-*")
	if err != nil {
		return nil, fmt.Errorf("create the page cache: %w", err)
	}
	w := &pageCacheWriter{path: path, f: f, out: bufio.NewWriterSize(f, 256<<10), seed: seed, regions: make(map[string][2]int64)}
	w.write(pageCacheMagic)
	w.write(binary.LittleEndian.AppendUint64(nil, w.seed))
	return w, nil
}

// write is like bufio.Writer's: publish reports its errors.
func (w *pageCacheWriter) write(p []byte) {
	w.out.Write(p)
	w.at += int64(len(p))
}

func (w *pageCacheWriter) block(region string, payload []byte) {
	if len(payload) == 0 {
		return
	}
	r, ok := w.regions[region]
	if !ok {
		r[0] = w.at
	}
	w.write(binary.LittleEndian.AppendUint32(nil, uint32(len(payload))))
	w.write(binary.LittleEndian.AppendUint64(nil, xxh3.Hash(payload)))
	w.write(payload)
	r[1] = w.at - r[0]
	w.regions[region] = r
}

// publish puts the new cache into the place of the old one.
func (w *pageCacheWriter) publish() error {
	defer w.discard()
	toc, err := json.Marshal(map[string]any{"regions": w.regions})
	if err != nil {
		return err
	}
	w.write(toc)
	w.write(binary.LittleEndian.AppendUint32(nil, uint32(len(toc))))
	w.write(binary.LittleEndian.AppendUint64(nil, xxh3.Hash(toc)))
	w.write(pageCacheTail)
	if err := w.out.Flush(); err != nil {
		return fmt.Errorf("write the page cache: %w", err)
	}
	if err := os.Rename(w.f.Name(), w.path); err != nil {
		return fmt.Errorf("write the page cache: %w", err)
	}
	return nil
}

// discard removes what was not published.
func (w *pageCacheWriter) discard() {
	w.f.Close()
	os.Remove(w.f.Name())
}
