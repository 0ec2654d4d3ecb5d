package etcd

import (
	"encoding/binary"
	"errors"
	"hash/crc32"

	"github.com/klauspost/compress/zstd"
)

// How a record is encoded: one byte of encoding, the CRC-32C of the key and the
// value, and the value, compressed or not.
const (
	plain      = 0
	compressed = 1
	sealLength = 5
	// worthwhile is the size from which a value is compressed.
	worthwhile = 256
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Both are stateless as they are used here, and safe for concurrent use.
var (
	encoder, _ = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest))
	decoder, _ = zstd.NewReader(nil, zstd.WithDecoderConcurrency(0))
)

// seal encodes a record's value.
func seal(key string, value []byte) []byte {
	sum := crc32.Update(crc32.Checksum([]byte(key), castagnoli), castagnoli, value)
	sealed := binary.BigEndian.AppendUint32([]byte{plain}, sum)
	if len(value) >= worthwhile {
		if smaller := encoder.EncodeAll(value, sealed); len(smaller) < sealLength+len(value) {
			smaller[0] = compressed
			return smaller
		}
	}
	return append(sealed[:sealLength], value...)
}

var errWrongSum = errors.New("has a wrong check sum")

// unseal decodes a record's value.
func unseal(key string, sealed []byte) ([]byte, error) {
	if len(sealed) < sealLength {
		return nil, errors.New("is cut short")
	}
	value := sealed[sealLength:]
	switch sealed[0] {
	case plain:
	case compressed:
		var err error
		if value, err = decoder.DecodeAll(value, nil); err != nil {
			return nil, errWrongSum
		}
	default:
		return nil, errWrongSum
	}
	if crc32.Update(crc32.Checksum([]byte(key), castagnoli), castagnoli, value) != binary.BigEndian.Uint32(sealed[1:]) {
		return nil, errWrongSum
	}
	return value, nil
}
