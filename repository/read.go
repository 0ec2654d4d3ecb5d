package repository

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"

	"dormouse/repository/backend"
)

// PartReader restores one part. It is safe for concurrent use.
type PartReader struct {
	repo *Repository
	id   ID
	part part

	known *FileCache // nil: nothing is known
}

// OpenPart reads a part object, whose id comes from a manifest that was verified.
func (r *Repository) OpenPart(ctx context.Context, id string) (*PartReader, error) {
	name, err := ParseID(id)
	if err != nil {
		return nil, fmt.Errorf("part: %w", err)
	}
	p, err := r.loadPart(ctx, name)
	if err != nil {
		return nil, err
	}
	return &PartReader{repo: r, id: name, part: p}, nil
}

// loadPart reads and checks a part object.
func (r *Repository) loadPart(ctx context.Context, name ID) (part, error) {
	data, err := r.loadHashed(ctx, backend.Part, name, partLimit)
	if errors.Is(err, backend.ErrNotExist) {
		return part{}, &DamagedError{Object: "part " + name.String(), Err: err}
	}
	if err != nil {
		return part{}, fmt.Errorf("read part %s: %w", name, err)
	}
	p, err := parsePart(data)
	if err != nil {
		return part{}, fmt.Errorf("read part %s: %w", name, err)
	}
	return p, nil
}

func parsePart(data []byte) (part, error) {
	var p part
	if err := json.Unmarshal(data, &p); err != nil {
		return part{}, &DamagedError{Object: "part", Err: err}
	}
	if p.Format != formatVersion {
		return part{}, fmt.Errorf("it has format %d, this program reads %d: %w", p.Format, formatVersion, ErrVersion)
	}
	return p, nil
}

// ID is the part's id.
func (p *PartReader) ID() string { return p.id.String() }

// Trees names the trees that AddTree has added.
func (p *PartReader) Trees() []string {
	var names []string
	for _, t := range p.part.Trees {
		if t.Name != imagesTree {
			names = append(names, t.Name)
		}
	}
	return names
}

// Size is the size of all images and files as captured, in bytes.
func (p *PartReader) Size() int64 { return p.part.Size }

func (p *PartReader) tree(name string) (*treeRoot, error) {
	for i := range p.part.Trees {
		if p.part.Trees[i].Name == name {
			return &p.part.Trees[i], nil
		}
	}
	return nil, fmt.Errorf("part %s has no tree %q", p.id, name)
}

// segment loads a segment.
func (r *Repository) segment(ctx context.Context, ref *segmentRef) (*segment, error) {
	p := ref.Inline
	if ref.Chunk != nil {
		var err error
		if p, err = r.loadChunk(ctx, *ref.Chunk); err != nil {
			return nil, err
		}
	}
	s, err := decodeSegment(p, ref.Bytes)
	if err != nil {
		return nil, &DamagedError{Object: "a segment", Err: err}
	}
	return s, nil
}

// records gives the entries of a tree.
func (r *Repository) records(ctx context.Context, t *treeRoot) iter.Seq2[*entryRecord, error] {
	return func(yield func(*entryRecord, error) bool) {
		in := bufio.NewReaderSize(&streamReader{ctx: ctx, repo: r, refs: t.Segments}, maxChunk)
		for {
			line, err := readLine(in)
			if err == io.EOF {
				return
			}
			record := new(entryRecord)
			if err == nil {
				err = json.Unmarshal(line, record)
			}
			if err == nil {
				err = record.check()
			}
			if err != nil {
				yield(nil, fmt.Errorf("list of entries of tree %q: %w", t.Name, err))
				return
			}
			if !yield(record, nil) {
				return
			}
		}
	}
}

// lineLimit bounds an entry: 100 bytes for 64 MiB of content, plus its xattrs.
const lineLimit = 64 << 20

func readLine(in *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		p, err := in.ReadSlice('\n')
		line = append(line, p...)
		switch {
		case err == nil:
			return line, nil
		case err == io.EOF && len(line) > 0:
			return nil, io.ErrUnexpectedEOF
		case err != bufio.ErrBufferFull:
			return nil, err
		case len(line) > lineLimit:
			return nil, &DamagedError{Object: "an entry", Err: errors.New("it is too long")}
		}
	}
}

// check refuses a record that cannot be restored or not safely.
func (r *entryRecord) check() error {
	e := r.entry()
	if err := e.check(); err != nil {
		return &DamagedError{Object: "an entry", Err: err}
	}
	var total int64
	for _, ref := range r.Segments {
		if ref.Bytes <= 0 || ref.Bytes > r.Size-total || (ref.Chunk != nil) == (ref.Inline != nil) {
			return &DamagedError{Object: fmt.Sprintf("entry %q", r.Path), Err: errors.New("its segments do not fit its size")}
		}
		total += ref.Bytes
	}
	if total != r.Size {
		return &DamagedError{Object: fmt.Sprintf("entry %q", r.Path), Err: fmt.Errorf("its segments have %d bytes, the file %d", total, r.Size)}
	}
	return nil
}

// streamReader reads content in order; only metadata is read so.
type streamReader struct {
	ctx  context.Context
	repo *Repository
	refs []segmentRef
	seg  *segment
	buf  []byte
}

func (s *streamReader) Read(p []byte) (int, error) {
	for len(s.buf) == 0 {
		if s.seg == nil || len(s.seg.Runs) == 0 {
			if len(s.refs) == 0 {
				return 0, io.EOF
			}
			var err error
			if s.seg, err = s.repo.segment(s.ctx, &s.refs[0]); err != nil {
				return 0, err
			}
			s.refs = s.refs[1:]
			continue
		}
		r := s.seg.Runs[0]
		s.seg.Runs = s.seg.Runs[1:]
		if r.Chunk == hole {
			return 0, &DamagedError{Object: "a list of entries", Err: errors.New("it has a hole")}
		}
		plain, err := s.repo.loadChunk(s.ctx, s.seg.Chunks[r.Chunk])
		if err != nil {
			return 0, err
		}
		if int64(r.Offset)+r.Length > int64(len(plain)) {
			return 0, &DamagedError{Object: "a list of entries", Err: errors.New("a run goes beyond its chunk")}
		}
		s.buf = plain[r.Offset : int64(r.Offset)+r.Length]
	}
	n := copy(p, s.buf)
	s.buf = s.buf[n:]
	return n, nil
}

// walkPart calls visit for every chunk that a part refers to: those of
// metadata before they are read. Segments in seen are skipped, as are their
// chunks, and segments that were walked are added to it.
func (r *Repository) walkPart(ctx context.Context, p *part, seen map[ID]bool, visit func(ID) error) error {
	refs := func(refs []segmentRef) error {
		for i := range refs {
			if err := r.walkSegment(ctx, &refs[i], seen, visit); err != nil {
				return err
			}
		}
		return nil
	}
	for i := range p.Trees {
		if err := refs(p.Trees[i].Segments); err != nil {
			return err
		}
		for record, err := range r.records(ctx, &p.Trees[i]) {
			if err != nil {
				return err
			}
			if err := refs(record.Segments); err != nil {
				return fmt.Errorf("%s: %w", record.Path, err)
			}
		}
	}
	return nil
}

// seenLimit bounds the memory of a walk: about 64 MiB.
const seenLimit = 1 << 20

func (r *Repository) walkSegment(ctx context.Context, ref *segmentRef, seen map[ID]bool, visit func(ID) error) error {
	if ref.Chunk != nil {
		if seen[*ref.Chunk] {
			return nil
		}
		if len(seen) >= seenLimit {
			clear(seen)
		}
		seen[*ref.Chunk] = true
		if err := visit(*ref.Chunk); err != nil {
			return err
		}
	}
	s, err := r.segment(ctx, ref)
	if err != nil {
		return err
	}
	for _, id := range s.Chunks {
		if err := visit(id); err != nil {
			return err
		}
	}
	return nil
}

// fetcher reads the chunks of segments in the order they lie in packs, with
// few large reads, and decodes each once per segment.
type fetcher struct {
	repo  *Repository
	read  []byte // of a pack
	plain []byte // of a chunk
	// verified, if set, is called by fill with each piece that is in its place,
	// while it is in the processor's cache, and where in the segment that is.
	verified func(p []byte, at int64)
}

const (
	fetchSize = 1 << 20  // stays in the processor's cache until it is decoded
	fetchGap  = 64 << 10 // read over what is not wanted rather than read twice
)

func newFetcher(r *Repository) *fetcher {
	return &fetcher{repo: r, plain: make([]byte, 0, maxChunk)}
}

// room is memory to read n bytes of a pack into, and what readAligned reads around
// them. What is so large begins at a page.
func (f *fetcher) room(n int64) []byte {
	if n += 2 * packAlign; int64(len(f.read)) < n {
		f.read = make([]byte, min(max(2*n, 64<<10), fetchSize+2*packAlign))
	}
	return f.read
}

// placed is a run of data and where it goes.
type placed struct {
	run
	at int64
}

// wanted is a chunk, where it lies, and the runs that use it.
type wanted struct {
	id   ID
	loc  location
	runs []placed
}

// fetch calls write with all data of a segment whose content begins at at, in
// no particular order. Nothing that does not match its hash is passed on.
func (f *fetcher) fetch(ctx context.Context, s *segment, at int64, write func(p []byte, at int64) error) error {
	err := f.try(ctx, s, at, write)
	if errors.Is(err, backend.ErrNotExist) {
		// Garbage collection has moved chunks since the last look at the index.
		if err := f.repo.sync(ctx); err != nil {
			return err
		}
		err = f.try(ctx, s, at, write)
	}
	if errors.Is(err, backend.ErrNotExist) {
		return &DamagedError{Object: "the repository in " + f.repo.be.Location(), Err: err}
	}
	return err
}

func (f *fetcher) try(ctx context.Context, s *segment, at int64, write func(p []byte, at int64) error) error {
	list, err := f.locate(ctx, s, at)
	if err != nil {
		return err
	}
	for len(list) > 0 {
		n, end := together(list)
		begin := int64(list[0].loc.Offset)
		p, err := f.repo.readAligned(ctx, list[0].loc.Pack, f.room(end-begin), begin, end)
		if err != nil {
			return err
		}
		for i := range list[:n] {
			if err := f.place(&list[i], p[int64(list[i].loc.Offset)-begin:], write); err != nil {
				return err
			}
		}
		list = list[n:]
	}
	return nil
}

// locate finds a segment's chunks and sorts them by where they lie.
func (f *fetcher) locate(ctx context.Context, s *segment, at int64) ([]wanted, error) {
	list := make([]wanted, len(s.Chunks))
	for _, r := range s.Runs {
		if r.Chunk != hole {
			list[r.Chunk].runs = append(list[r.Chunk].runs, placed{r, at})
		}
		at += r.Length
	}
	used := list[:0]
	var ids []ID
	for i, w := range list {
		if len(w.runs) > 0 {
			w.id = s.Chunks[i]
			used, ids = append(used, w), append(ids, w.id)
		}
	}
	found, err := f.repo.find(ctx, ids...)
	if err != nil {
		return nil, err
	}
	for i := range used {
		used[i].loc = found[i]
	}
	slices.SortFunc(used, func(a, b wanted) int {
		if c := bytes.Compare(a.loc.Pack[:], b.loc.Pack[:]); c != 0 {
			return c
		}
		return int(a.loc.Offset) - int(b.loc.Offset)
	})
	return used, nil
}

// together counts how many chunks to read at once, and where they end.
func together(list []wanted) (n int, end int64) {
	first := list[0].loc
	end = int64(first.Offset) + int64(first.Stored)
	for n = 1; n < len(list); n++ {
		loc := list[n].loc
		next := int64(loc.Offset) + int64(loc.Stored)
		if loc.Pack != first.Pack || int64(loc.Offset) > end+fetchGap || next-int64(first.Offset) > fetchSize {
			break
		}
		end = max(end, next)
	}
	return n, end
}

func (f *fetcher) place(w *wanted, stored []byte, write func(p []byte, at int64) error) error {
	plain, err := f.repo.codec.decode(w.id, w.loc, stored[:w.loc.Stored], f.plain)
	if err != nil {
		return &DamagedError{Object: "pack " + w.loc.Pack.String(), Chunk: w.id.String(), Err: err}
	}
	for _, r := range w.runs {
		if int64(r.Offset)+r.Length > int64(len(plain)) {
			return &DamagedError{Object: "a segment", Chunk: w.id.String(), Err: errors.New("a run goes beyond its chunk")}
		}
		if err := write(plain[r.Offset:int64(r.Offset)+r.Length], r.at); err != nil {
			return err
		}
	}
	return nil
}

// fill puts the content of a segment into dst, which has its length. Where it
// can, it reads and decompresses straight into its place; nothing counts before
// fill has returned without an error.
func (f *fetcher) fill(ctx context.Context, s *segment, dst []byte) error {
	var at int64
	for _, r := range s.Runs {
		if r.Chunk == hole {
			clear(dst[at : at+r.Length])
		}
		at += r.Length
	}
	err := f.tryFill(ctx, s, dst)
	if errors.Is(err, backend.ErrNotExist) {
		// Garbage collection has moved chunks since the last look at the index.
		if err := f.repo.sync(ctx); err != nil {
			return err
		}
		err = f.tryFill(ctx, s, dst)
	}
	if errors.Is(err, backend.ErrNotExist) {
		return &DamagedError{Object: "the repository in " + f.repo.be.Location(), Err: err}
	}
	return err
}

func (f *fetcher) tryFill(ctx context.Context, s *segment, dst []byte) error {
	list, err := f.locate(ctx, s, 0)
	if err != nil {
		return err
	}
	for len(list) > 0 {
		n, err := f.fillSome(ctx, list, dst)
		if err != nil {
			return err
		}
		list = list[n:]
	}
	return nil
}

// fillSome reads the first chunks of a list, once from their pack, and returns
// how many those are.
func (f *fetcher) fillSome(ctx context.Context, list []wanted, dst []byte) (int, error) {
	if n := straight(list); n > 0 {
		return n, f.fillStraight(ctx, list[:n], dst)
	}
	n, _ := together(list)
	for i := 1; i < n; i++ {
		if straight(list[i:]) > 0 {
			n = i
		}
	}
	n, end := together(list[:n])
	begin := int64(list[0].loc.Offset)
	p, err := f.repo.readAligned(ctx, list[0].loc.Pack, f.room(end-begin), begin, end)
	if err != nil {
		return 0, err
	}
	for i := range list[:n] {
		if err := f.fillOne(&list[i], p[int64(list[i].loc.Offset)-begin:], dst); err != nil {
			return 0, err
		}
	}
	return n, nil
}

// straightLeast is how much has to lie straight to be worth a read of its own.
const straightLeast = 1 << 20

// straight returns how many of the first chunks lie in their pack just as they do
// in the content, back to back; 0 if they are few.
func straight(list []wanted) int {
	var bytes int64
	n := 0
	for ; n < len(list); n++ {
		w := &list[n]
		if w.loc.Codec != codecRaw || len(w.runs) != 1 || !w.whole() {
			break
		}
		if first := &list[0]; w.loc.Pack != first.loc.Pack ||
			int64(w.loc.Offset) != int64(first.loc.Offset)+bytes || w.runs[0].at != first.runs[0].at+bytes {
			break
		}
		bytes += int64(w.loc.Raw)
	}
	if bytes < straightLeast {
		return 0
	}
	return n
}

// whole reports whether the first run is all of the chunk.
func (w *wanted) whole() bool {
	return w.runs[0].Offset == 0 && w.runs[0].Length == int64(w.loc.Raw)
}

// fillStraight reads chunks to their place and verifies them there.
func (f *fetcher) fillStraight(ctx context.Context, list []wanted, dst []byte) error {
	first, last := &list[0], &list[len(list)-1]
	at := first.runs[0].at
	p := dst[at : last.runs[0].at+int64(last.loc.Raw)]
	if err := f.repo.readPack(ctx, first.loc.Pack, p, int64(first.loc.Offset)); err != nil {
		return err
	}
	for i := range list {
		w := &list[i]
		piece := dst[w.runs[0].at:][:w.loc.Raw]
		if hashOf(piece) != w.id {
			return w.damaged(errChunkHash)
		}
		if f.verified != nil {
			f.verified(piece, w.runs[0].at)
		}
	}
	return nil
}

func (w *wanted) damaged(err error) error {
	return &DamagedError{Object: "pack " + w.loc.Pack.String(), Chunk: w.id.String(), Err: err}
}

// fillOne decodes a chunk, if possible in its place.
func (f *fetcher) fillOne(w *wanted, stored, dst []byte) error {
	buf := f.plain
	if w.whole() && w.loc.Codec != codecRaw {
		buf = dst[w.runs[0].at:][:0:w.loc.Raw]
	}
	plain, err := f.repo.codec.decode(w.id, w.loc, stored[:w.loc.Stored], buf)
	if err != nil {
		return w.damaged(err)
	}
	for _, r := range w.runs {
		if int64(r.Offset)+r.Length > int64(len(plain)) {
			return &DamagedError{Object: "a segment", Chunk: w.id.String(), Err: errors.New("a run goes beyond its chunk")}
		}
		piece := dst[r.at : r.at+r.Length]
		copy(piece, plain[r.Offset:]) // of itself where it was decoded in place
		if f.verified != nil {
			f.verified(piece, r.at)
		}
	}
	return nil
}
