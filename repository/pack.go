package repository

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/zeebo/blake3"
)

// A pack is a file of chunks:
//
//	header   "DMPACK" 0x00 0x01, 16 random bytes
//	chunks   as stored; between them may be zeros
//	table    per chunk 48 bytes: id [32], offset u32, stored u32, raw u32, codec u8, 3 zero bytes
//	trailer  number of chunks u32, "DMPK"
//
// Integers are little-endian. The name of a pack is the BLAKE3 hash of header,
// table and trailer, in hexadecimal; the table's ids cover the chunks, so that
// nothing is hashed twice. The random bytes make every pack's name new, so that
// a pack that is about to be deleted can never be written again.
const (
	packTarget    = 16 << 20 // a pack is closed when its chunks reach this
	packMaxChunks = 8192
	// packAlign is what large chunks that are not compressed begin at a multiple of:
	// they can be read past the page cache straight to where they belong.
	packAlign    = 4096
	alignedChunk = 32 << 10
	// packFull leaves room, of lines of the table, for what aligns the last chunk.
	packFull    = packMaxChunks - packAlign/packEntry - 1
	packHeader  = 24
	packEntry   = 48
	packTrailer = 8
	packMaxSize = packHeader + packTarget + maxChunk + packMaxChunks*packEntry + packTrailer
)

var (
	packMagic = []byte("DMPACK\x00\x01")
	packTail  = []byte("DMPK")
)

// packChunk is one line of a pack's table.
type packChunk struct {
	ID ID
	location
}

// packBuilder gathers chunks in memory.
type packBuilder struct {
	buf    []byte
	chunks []packChunk
}

func newPackBuilder() *packBuilder {
	// So large a piece of memory begins at a page: it can be written past the page
	// cache.
	b := &packBuilder{buf: make([]byte, 0, packMaxSize)}
	b.reset()
	return b
}

func (b *packBuilder) reset() {
	b.buf = append(b.buf[:0], packMagic...)
	b.buf = b.buf[:packHeader]
	rand.Read(b.buf[len(packMagic):])
	b.chunks = b.chunks[:0]
}

func (b *packBuilder) add(id ID, stored []byte, raw int, how byte) {
	if how == codecRaw && len(stored) >= alignedChunk {
		b.buf = append(b.buf, make([]byte, -len(b.buf)&(packAlign-1))...)
	}
	b.chunks = append(b.chunks, packChunk{id, location{
		Offset: uint32(len(b.buf)), Stored: uint32(len(stored)), Raw: uint32(raw), Codec: how,
	}})
	b.buf = append(b.buf, stored...)
}

func (b *packBuilder) full() bool {
	return len(b.buf) >= packHeader+packTarget || len(b.chunks) == packFull
}

// finish appends table and trailer and returns the pack's name.
func (b *packBuilder) finish() ID {
	table := len(b.buf)
	for i := range b.chunks {
		b.buf = appendPackEntry(b.buf, b.chunks[i])
	}
	b.buf = binary.LittleEndian.AppendUint32(b.buf, uint32(len(b.chunks)))
	b.buf = append(b.buf, packTail...)
	name := packName(b.buf[:packHeader], b.buf[table:])
	for i := range b.chunks {
		b.chunks[i].Pack = name
	}
	return name
}

// packName hashes a pack's header, and its table with the trailer.
func packName(header, table []byte) (name ID) {
	h := blake3.New()
	h.Write(header)
	h.Write(table)
	h.Sum(name[:0])
	return name
}

func appendPackEntry(p []byte, c packChunk) []byte {
	p = append(p, c.ID[:]...)
	p = binary.LittleEndian.AppendUint32(p, c.Offset)
	p = binary.LittleEndian.AppendUint32(p, c.Stored)
	p = binary.LittleEndian.AppendUint32(p, c.Raw)
	return append(p, c.Codec, 0, 0, 0)
}

// parsePackEntry reads one table line of a pack whose chunks end at end.
func parsePackEntry(p []byte, end int64) (packChunk, error) {
	c := packChunk{ID: ID(p[:32]), location: location{
		Offset: binary.LittleEndian.Uint32(p[32:]),
		Stored: binary.LittleEndian.Uint32(p[36:]),
		Raw:    binary.LittleEndian.Uint32(p[40:]),
		Codec:  p[44],
	}}
	return c, c.check(end)
}

// check refuses a location that no writer makes; end is where chunks end in the pack.
func (l location) check(end int64) error {
	switch {
	case l.Codec > codecZstd:
		return fmt.Errorf("unknown codec %d", l.Codec)
	case l.Raw == 0 || l.Raw > maxChunk || l.Stored == 0 || l.Stored > l.Raw:
		return fmt.Errorf("a chunk of %d bytes cannot be stored in %d", l.Raw, l.Stored)
	case l.Codec == codecRaw && l.Stored != l.Raw:
		return errors.New("a raw chunk has two lengths")
	case l.Offset < packHeader || int64(l.Offset)+int64(l.Stored) > end:
		return errors.New("a chunk lies outside the pack")
	}
	return nil
}

// parsePack reads the table of a pack of the given size, and the name that the
// pack has if it is whole. The index can be rebuilt from nothing but packs.
func parsePack(rd io.ReaderAt, size int64) (name ID, chunks []packChunk, err error) {
	if size < packHeader+packTrailer || size > packMaxSize {
		return name, nil, fmt.Errorf("a pack cannot have %d bytes", size)
	}
	head, tail := make([]byte, packHeader), make([]byte, packTrailer)
	if err := readFull(rd, head, 0); err != nil {
		return name, nil, err
	}
	if err := readFull(rd, tail, size-packTrailer); err != nil {
		return name, nil, err
	}
	if !bytes.HasPrefix(head, packMagic) {
		return name, nil, errors.New("it does not begin like a pack of version 1")
	}
	n := int64(binary.LittleEndian.Uint32(tail))
	end := size - packTrailer - n*packEntry
	if !bytes.Equal(tail[4:], packTail) || n > packMaxChunks || end < packHeader {
		return name, nil, errors.New("it does not end like a pack")
	}
	p := make([]byte, n*packEntry+packTrailer)
	if err := readFull(rd, p, end); err != nil {
		return name, nil, err
	}
	name = packName(head, p)
	chunks = make([]packChunk, n)
	for i := range chunks {
		c, err := parsePackEntry(p[i*packEntry:][:packEntry], end)
		if err != nil {
			return name, nil, fmt.Errorf("table line %d: %w", i, err)
		}
		c.Pack = name
		chunks[i] = c
	}
	return name, chunks, nil
}

func readFull(rd io.ReaderAt, p []byte, off int64) error {
	n, err := rd.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	return err
}
