package repository

import (
	"bytes"
	"slices"
	"testing"
)

// Large chunks that are not compressed can be read straight to where they belong.
func TestRawChunksBeginAtABlock(t *testing.T) {
	b := newPackBuilder()
	sizes := []struct {
		stored int
		how    byte
	}{{maxChunk, codecRaw}, {1000, codecZstd}, {maxChunk, codecRaw}, {maxChunk, codecRaw}, {100, codecRaw}, {alignedChunk, codecRaw}}
	for i, s := range sizes {
		b.add(ID{byte(i)}, bytes.Repeat([]byte{byte(i + 1)}, s.stored), maxChunk*int(s.how)+s.stored*(1-int(s.how)), s.how)
	}
	name := b.finish()
	got, chunks, err := parsePack(bytes.NewReader(b.buf), int64(len(b.buf)))
	must(t, err)
	if got != name || !slices.Equal(chunks, b.chunks) {
		t.Errorf("the pack %s reads as %s with %v", name, got, chunks)
	}
	for i, c := range chunks {
		if c.Codec == codecRaw && c.Stored >= alignedChunk && c.Offset%packAlign != 0 {
			t.Errorf("chunk %d begins at %d", i, c.Offset)
		}
		if content := b.buf[c.Offset:][:c.Stored]; !bytes.Equal(content, bytes.Repeat([]byte{byte(i + 1)}, len(content))) {
			t.Errorf("chunk %d lies elsewhere than its line says", i)
		}
	}
	if gap := chunks[3].Offset - chunks[2].Offset; gap != maxChunk {
		t.Errorf("two chunks that follow each other are %d bytes apart", gap)
	}
}

// Nothing that a writer makes is refused by readers for its size.
func TestTheLargestPackCanBeRead(t *testing.T) {
	b := newPackBuilder()
	small, large := make([]byte, packTarget/(packFull-1)-8), make([]byte, maxChunk)
	for !b.full() {
		if len(b.buf)+len(small) < packHeader+packTarget && len(b.chunks) < packFull-1 {
			b.add(ID{}, small, len(small), codecRaw)
			continue
		}
		b.add(ID{}, large, len(large), codecRaw)
	}
	b.finish()
	if len(b.buf) > packMaxSize {
		t.Errorf("the pack has %d bytes, more than %d", len(b.buf), packMaxSize)
	}
	_, _, err := parsePack(bytes.NewReader(b.buf), int64(len(b.buf)))
	must(t, err)
}
