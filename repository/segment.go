package repository

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// A run is a stretch of content: a hole that reads as zeros, or bytes of a chunk.
type run struct {
	Length int64
	Chunk  int // index into the segment's chunks, or hole
	Offset int // in the chunk's plaintext
}

const hole = -1

// A segment describes a stretch of content as runs that follow one another
// without a gap. Encoded:
//
//	number of chunks (uvarint), their ids [32] each,
//	then per run: length, 0 for a hole or 1 + the chunk's number, and then for
//	data the offset in the chunk; all uvarints.
//
// It says nothing about where it lies, so that unchanged content has an
// unchanged segment even if it moved.
type segment struct {
	Chunks []ID
	Runs   []run
}

const (
	// segmentSpan is the address (or offset) unit at which content is cut into
	// segments.
	segmentSpan = 64 << 20
	// segmentInline is the largest encoded segment that is stored where it is
	// referred to instead of in a chunk.
	segmentInline = 512
)

// bound is an upper bound of the encoded length.
func (s *segment) bound() int { return 3 + 32*len(s.Chunks) + 15*len(s.Runs) }

func (s *segment) length() int64 {
	var n int64
	for _, r := range s.Runs {
		n += r.Length
	}
	return n
}

// add appends a run and joins it with the one before where both continue.
func (s *segment) add(length int64, chunk, offset int) {
	if n := len(s.Runs); n > 0 {
		last := &s.Runs[n-1]
		if last.Chunk == chunk && (chunk == hole || last.Offset+int(last.Length) == offset) {
			last.Length += length
			return
		}
	}
	s.Runs = append(s.Runs, run{length, chunk, offset})
}

// clip is the stretch of a segment from an offset to another, of the same chunks.
func (s *segment) clip(from, to int64) *segment {
	part := &segment{Chunks: s.Chunks}
	var at int64
	for _, r := range s.Runs {
		begin, end := max(at, from), min(at+r.Length, to)
		if begin < end {
			offset := r.Offset
			if r.Chunk != hole {
				offset += int(begin - at)
			}
			part.Runs = append(part.Runs, run{end - begin, r.Chunk, offset})
		}
		at += r.Length
	}
	return part
}

func (s *segment) encode() []byte {
	p := binary.AppendUvarint(nil, uint64(len(s.Chunks)))
	for i := range s.Chunks {
		p = append(p, s.Chunks[i][:]...)
	}
	for _, r := range s.Runs {
		p = binary.AppendUvarint(p, uint64(r.Length))
		p = binary.AppendUvarint(p, uint64(r.Chunk+1))
		if r.Chunk != hole {
			p = binary.AppendUvarint(p, uint64(r.Offset))
		}
	}
	return p
}

// decodeSegment reads a segment that must cover exactly length bytes.
func decodeSegment(p []byte, length int64) (*segment, error) {
	d := varints{p: p}
	n := d.next(uint64(len(p) / 32))
	s := &segment{Chunks: make([]ID, n)}
	for i := range s.Chunks {
		copy(s.Chunks[i][:], d.bytes(32))
	}
	var total int64
	for len(d.p) > 0 && d.err == nil {
		r := run{Length: int64(d.next(1 << 62)), Chunk: int(d.next(n)) - 1}
		if r.Chunk != hole {
			r.Offset = int(d.next(maxChunk))
		}
		if d.err == nil && (r.Length == 0 || r.Length > length-total) {
			return nil, errors.New("a segment's runs do not add up to its length")
		}
		if r.Chunk != hole && int64(r.Offset)+r.Length > maxChunk {
			return nil, errors.New("a run goes beyond its chunk")
		}
		total += r.Length
		s.Runs = append(s.Runs, r)
	}
	if d.err != nil {
		return nil, d.err
	}
	if total != length {
		return nil, fmt.Errorf("a segment covers %d bytes instead of %d", total, length)
	}
	return s, nil
}

// varints reads uvarints and bytes; after the first error everything is zero.
type varints struct {
	p   []byte
	err error
}

// next reads a uvarint that must not be greater than most.
func (d *varints) next(most uint64) uint64 {
	v, n := binary.Uvarint(d.p)
	if d.err == nil && (n <= 0 || v > most) {
		d.err = errors.New("a number is cut off or out of range")
	}
	if d.err != nil {
		return 0
	}
	d.p = d.p[n:]
	return v
}

func (d *varints) bytes(n int) []byte {
	if d.err == nil && n > len(d.p) {
		d.err = errors.New("the data is cut off")
	}
	if d.err != nil {
		return make([]byte, n)
	}
	b := d.p[:n]
	d.p = d.p[n:]
	return b
}
