package repository

import (
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/blake3"
)

const (
	pageSize = 4096
	// windowSize is the unit of chunking: memory is cut at addresses, files at
	// offsets, that are multiples of it.
	windowSize  = 64 << 10
	windowPages = windowSize / pageSize
	// maxChunk is the largest plaintext of a chunk.
	maxChunk = windowSize
)

// ID is the BLAKE3-256 hash of a chunk's plaintext, or of a whole object.
type ID [32]byte

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText writes an ID as 64 hexadecimal digits.
func (id ID) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, id[:]), nil }

// UnmarshalText reads what MarshalText writes.
func (id *ID) UnmarshalText(text []byte) error {
	p, err := ParseID(string(text))
	*id = p
	return err
}

// ParseID reads 64 hexadecimal digits.
func ParseID(s string) (ID, error) {
	var id ID
	if len(s) != 2*len(id) {
		return id, fmt.Errorf("%.80q is not an id of %d hexadecimal digits", s, 2*len(id))
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil {
		return ID{}, fmt.Errorf("%q is not an id: %w", s, err)
	}
	return id, nil
}

func hashOf(p []byte) ID { return blake3.Sum256(p) }

// The codecs of a stored chunk.
const (
	codecRaw  = 0
	codecZstd = 1
)

// location is where a chunk lies.
type location struct {
	Pack   ID
	Offset uint32 // in the pack
	Stored uint32 // length in the pack
	Raw    uint32 // length of the plaintext
	Codec  byte
}

// codec compresses and decompresses chunks; safe for concurrent use.
type codec struct {
	enc *zstd.Encoder
	dec *zstd.Decoder
}

func newCodec(workers int) (*codec, error) {
	enc, err := zstd.NewWriter(nil,
		zstd.WithEncoderLevel(zstd.SpeedFastest),
		zstd.WithEncoderConcurrency(workers),
		zstd.WithEncoderCRC(false), // the id is a far better check
		zstd.WithWindowSize(maxChunk))
	if err != nil {
		return nil, err
	}
	dec, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(workers),
		zstd.WithDecoderMaxMemory(maxChunk),
		zstd.WithDecodeAllCapLimit(true))
	return &codec{enc, dec}, err
}

// encode returns p in the form it is stored in. It appends to buf[:0] when
// compression saves at least 1/32, and returns p itself otherwise.
func (c *codec) encode(p, buf []byte) (stored []byte, how byte) {
	z := c.enc.EncodeAll(p, buf[:0])
	if len(z) > len(p)-len(p)/32 {
		return p, codecRaw
	}
	return z, codecZstd
}

var errChunkHash = errors.New("its content does not match its id")

// decode returns the plaintext of a stored chunk after checking its hash. The
// result is stored itself or uses buf, whose capacity must do.
func (c *codec) decode(id ID, loc location, stored, buf []byte) ([]byte, error) {
	plain := stored
	switch loc.Codec {
	case codecRaw:
	case codecZstd:
		var err error
		if plain, err = c.dec.DecodeAll(stored, buf[:0]); err != nil {
			return nil, fmt.Errorf("decompress: %w", err)
		}
	default:
		return nil, fmt.Errorf("unknown codec %d", loc.Codec)
	}
	if len(plain) != int(loc.Raw) || hashOf(plain) != id {
		return nil, errChunkHash
	}
	return plain, nil
}
