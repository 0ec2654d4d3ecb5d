package repository

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// An index object says which chunks packs hold, so that a reader need not
// fetch every pack's table:
//
//	header   "DMINDX" 0x00 0x01
//	per pack: name [32], number of chunks u32, then the pack's table, 48 bytes per chunk
//
// An upload writes one for every few packs; garbage collection merges small
// ones. Several index objects may list one pack. The name of an index object
// is the BLAKE3 hash of its bytes.
var indexMagic = []byte("DMINDX\x00\x01")

const (
	// indexPacks is how many packs an upload stores before it writes an index
	// object: what an interrupted upload has to store again at most, besides
	// the packs that were on their way.
	indexPacks = 4
	// indexMerged is how many packs garbage collection puts into one object.
	indexMerged  = 64
	indexMaxSize = int64(len("DMINDX\x00\x01")) + indexMerged*(36+packMaxChunks*packEntry)
)

// packIndex is the table of one pack.
type packIndex struct {
	Name   ID
	Chunks []packChunk
}

func encodeIndex(packs []packIndex) []byte {
	p := bytes.Clone(indexMagic)
	for _, pack := range packs {
		p = append(p, pack.Name[:]...)
		p = binary.LittleEndian.AppendUint32(p, uint32(len(pack.Chunks)))
		for _, c := range pack.Chunks {
			p = appendPackEntry(p, c)
		}
	}
	return p
}

func parseIndex(p []byte) ([]packIndex, error) {
	if !bytes.HasPrefix(p, indexMagic) {
		return nil, errors.New("it does not begin like an index of version 1")
	}
	var packs []packIndex
	for p = p[len(indexMagic):]; len(p) > 0; {
		if len(p) < 36 {
			return nil, errors.New("the index is cut off")
		}
		pack := packIndex{Name: ID(p[:32])}
		n := int(binary.LittleEndian.Uint32(p[32:]))
		p = p[36:]
		if n > packMaxChunks || n*packEntry > len(p) {
			return nil, errors.New("the index is cut off")
		}
		pack.Chunks = make([]packChunk, n)
		for i := range n {
			c, err := parsePackEntry(p[i*packEntry:][:packEntry], packMaxSize)
			if err != nil {
				return nil, fmt.Errorf("pack %s, line %d: %w", pack.Name, i, err)
			}
			c.Pack = pack.Name
			pack.Chunks[i] = c
		}
		p = p[n*packEntry:]
		packs = append(packs, pack)
	}
	return packs, nil
}
