package repository

import (
	"context"
	"fmt"
	"io"
	"iter"
	"os"
	"slices"
)

// StoredEntry is an entry of a part, and what its content is.
type StoredEntry struct {
	Entry
	content []segmentRef
}

// Entries gives the entries of a tree in the order they were added.
func (p *PartReader) Entries(ctx context.Context, tree string) iter.Seq2[StoredEntry, error] {
	return func(yield func(StoredEntry, error) bool) {
		t, err := p.tree(tree)
		if err != nil {
			yield(StoredEntry{}, err)
			return
		}
		for record, err := range p.repo.records(ctx, t) {
			if err != nil {
				yield(StoredEntry{}, fmt.Errorf("part %s: %w", p.id, err))
				return
			}
			if !yield(StoredEntry{record.entry(), record.Segments}, nil) {
				return
			}
		}
	}
}

// Images gives the entries of the images.
func (p *PartReader) Images(ctx context.Context) iter.Seq2[StoredEntry, error] {
	return p.Entries(ctx, imagesTree)
}

// Knowing is the same part, read on a machine of whose files known remembers the
// content.
func (p *PartReader) Knowing(known *FileCache) *PartReader {
	knowing := *p
	knowing.known = known
	return &knowing
}

// SameContent reports whether the content of f is that of a stored file. Unless
// its content is known, it reads f and no chunk of content, so it answers by hash.
// It may say no of a file that is the same but was stored with other bounds of
// chunks, which none that AddTree stores is.
func (p *PartReader) SameContent(ctx context.Context, e StoredEntry, f *os.File) (bool, error) {
	fi, err := f.Stat()
	if err != nil || fi.Size() != e.Size || !fi.Mode().IsRegular() {
		return false, err
	}
	if cached, ok := p.known.get(FileKeyOf(fi)); ok && slices.EqualFunc(cached, e.content, cachedSegment.is) {
		return true, nil
	}
	c := comparison{f: f, chunk: make([]byte, 0, maxChunk)}
	for i := range e.content {
		s, err := p.repo.segment(ctx, &e.content[i])
		if err != nil {
			return false, err
		}
		for _, r := range s.Runs {
			if same, err := c.run(s, r); !same || err != nil {
				return false, err
			}
		}
		if !c.ends() {
			return false, nil
		}
	}
	return true, nil
}

// comparison puts the chunks of a file together from another file.
type comparison struct {
	f     *os.File
	at    int64
	id    ID
	chunk []byte // so far
	read  []byte // where a hole is to be
}

func (c *comparison) run(s *segment, r run) (bool, error) {
	if r.Chunk == hole {
		return c.isHole(r.Length)
	}
	if r.Offset == 0 {
		if !c.ends() {
			return false, nil
		}
		c.id = s.Chunks[r.Chunk]
	}
	if c.id != s.Chunks[r.Chunk] || r.Offset != len(c.chunk) {
		return false, nil
	}
	c.chunk = c.chunk[:r.Offset+int(r.Length)]
	_, err := c.f.ReadAt(c.chunk[r.Offset:], c.at)
	c.at += r.Length
	if err == io.EOF {
		return false, nil // it was truncated meanwhile
	}
	return err == nil, err
}

// ends checks the chunk that is complete.
func (c *comparison) ends() bool {
	same := len(c.chunk) == 0 || hashOf(c.chunk) == c.id
	c.chunk = c.chunk[:0]
	return same
}

func (c *comparison) isHole(length int64) (bool, error) {
	if c.read == nil {
		c.read = make([]byte, 1<<20)
	}
	for length > 0 {
		p := c.read[:min(length, int64(len(c.read)))]
		if _, err := c.f.ReadAt(p, c.at); err != nil && err != io.EOF {
			return false, err
		}
		for i := 0; i < len(p); i += pageSize {
			if !isZero(p[i:min(i+pageSize, len(p))]) {
				return false, nil
			}
		}
		c.at += int64(len(p))
		length -= int64(len(p))
	}
	return true, nil
}
