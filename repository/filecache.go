package repository

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// FileCache remembers on the agent's own disk the content of files that were
// stored, so that a file whose device, inode, size, modification time and
// change time are the same is not read again. It may be lost at any time: what
// it refers to is looked up in the index before use. It is safe for use by
// many uploads at once.
//
// The file is a bbolt database, written without fsync and begun anew after a
// boot. Its bucket "files" has device u64, inode u64 → size, mtime, ctime i64,
// day of last use u32, then the content: per segment its length (uvarint), the
// length of its encoding (uvarint) and its encoding.
type FileCache struct {
	db *bolt.DB

	mu      sync.Mutex
	pending map[[16]byte][]byte
	size    int
	failed  error // of a write since the last flush that was asked for
}

var bucketFiles = []byte("files")

const (
	fileCacheHeader  = 28
	fileCachePending = 1 << 20 // bytes gathered before they are written
	// fileCacheLongest is the most bytes of segments remembered of one file:
	// enough for files of up to about 10 GiB.
	fileCacheLongest = 8 << 20
	// timestampSlack is the coarsest step of a file system's timestamps: a file
	// that changed less than this before it was captured may change again
	// without its timestamps moving, and is not remembered.
	timestampSlack = 2 * time.Second
)

// OpenFileCache opens the cache at path and makes it if need be. One process
// at a time can have it open.
func OpenFileCache(path string) (*FileCache, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("create the file cache: %w", err)
	}
	db, err := openFileDB(path)
	if err != nil && !errors.Is(err, bolterrors.ErrTimeout) {
		os.Remove(path) // damaged: begin anew
		db, err = openFileDB(path)
	}
	if err != nil {
		return nil, fmt.Errorf("open the file cache %s: %w", path, err)
	}
	return &FileCache{db: db, pending: make(map[[16]byte][]byte)}, nil
}

func openFileDB(path string) (db *bolt.DB, err error) {
	defer func() { // bbolt panics on some damaged files
		if r := recover(); r != nil {
			db, err = nil, fmt.Errorf("damaged: %v", r)
		}
	}()
	db, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second, NoSync: true, NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return nil, err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		meta, err := tx.CreateBucketIfNotExists(bucketMeta)
		if err != nil {
			return err
		}
		if _, err := tx.CreateBucketIfNotExists(bucketFiles); err != nil {
			return err
		}
		return checkBoot(meta)
	})
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

// Close writes what is pending and closes the cache.
func (c *FileCache) Close() error { return errors.Join(c.flush(), c.db.Close()) }

// Prune forgets files that were not met for as long as age.
func (c *FileCache) Prune(age time.Duration) error {
	if err := c.flush(); err != nil {
		return err
	}
	oldest := day(time.Now().Add(-age))
	return c.db.Update(func(tx *bolt.Tx) error {
		var old [][]byte
		b := tx.Bucket(bucketFiles)
		err := b.ForEach(func(k, v []byte) error {
			if len(v) < fileCacheHeader || binary.BigEndian.Uint32(v[24:]) < oldest {
				old = append(old, slices.Clone(k))
			}
			return nil
		})
		for _, k := range old {
			err = errors.Join(err, b.Delete(k))
		}
		return err
	})
}

func day(t time.Time) uint32 { return uint32(t.Unix() / 86400) }

func (k FileKey) dbKey() (key [16]byte) {
	binary.BigEndian.PutUint64(key[:], k.Dev)
	binary.BigEndian.PutUint64(key[8:], k.Ino)
	return key
}

func (k FileKey) header() []byte {
	p := binary.BigEndian.AppendUint64(nil, uint64(k.Size))
	p = binary.BigEndian.AppendUint64(p, uint64(k.Mtime))
	p = binary.BigEndian.AppendUint64(p, uint64(k.Ctime))
	return binary.BigEndian.AppendUint32(p, day(time.Now()))
}

// cachedSegment is an encoded segment and the length of what it describes.
type cachedSegment struct {
	encoded []byte
	length  int64
}

// is reports whether ref refers to it.
func (s cachedSegment) is(ref segmentRef) bool {
	if ref.Chunk == nil {
		return s.length == ref.Bytes && bytes.Equal(s.encoded, ref.Inline)
	}
	return s.length == ref.Bytes && hashOf(s.encoded) == *ref.Chunk
}

// get returns the content of a file that is unchanged.
func (c *FileCache) get(k FileKey) ([]cachedSegment, bool) {
	if c == nil || k == (FileKey{}) {
		return nil, false
	}
	key := k.dbKey()
	c.mu.Lock()
	v := slices.Clone(c.pending[key])
	c.mu.Unlock()
	if v == nil {
		c.db.View(func(tx *bolt.Tx) error {
			v = slices.Clone(tx.Bucket(bucketFiles).Get(key[:]))
			return nil
		})
	}
	want := k.header()
	if len(v) < fileCacheHeader || string(v[:24]) != string(want[:24]) {
		return nil, false
	}
	if string(v[24:28]) != string(want[24:]) {
		c.store(key, append(want, v[fileCacheHeader:]...)) // used today
	}
	return decodeCached(v[fileCacheHeader:], k.Size)
}

func decodeCached(p []byte, size int64) (segments []cachedSegment, ok bool) {
	d := varints{p: p}
	var total int64
	for len(d.p) > 0 && d.err == nil {
		length := int64(d.next(1 << 62))
		encoded := d.bytes(int(d.next(maxChunk)))
		segments = append(segments, cachedSegment{encoded, length})
		total += length
	}
	return segments, d.err == nil && total == size
}

// put remembers the content of a file captured at a time.
func (c *FileCache) put(k FileKey, captured time.Time, b *contentBuilder) {
	if c == nil || k == (FileKey{}) || !b.keep || k.Ctime > captured.Add(-timestampSlack).UnixNano() {
		return
	}
	v := k.header()
	for i, encoded := range b.encoded {
		v = binary.AppendUvarint(v, uint64(b.refs[i].Bytes))
		v = binary.AppendUvarint(v, uint64(len(encoded)))
		v = append(v, encoded...)
	}
	c.store(k.dbKey(), v)
}

func (c *FileCache) store(key [16]byte, v []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pending[key] = v
	c.size += len(v) + 100
	if c.size > fileCachePending {
		c.failed = errors.Join(c.failed, c.write())
	}
}

// flush writes what is pending. When it fails files are read again, no more.
func (c *FileCache) flush() error {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	err := errors.Join(c.failed, c.write())
	c.failed = nil
	if err != nil {
		return fmt.Errorf("write the file cache: %w", err)
	}
	return nil
}

func (c *FileCache) write() error {
	if len(c.pending) == 0 {
		return nil
	}
	err := c.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketFiles)
		for key, v := range c.pending {
			if err := b.Put(key[:], v); err != nil {
				return err
			}
		}
		return nil
	})
	c.pending, c.size = make(map[[16]byte][]byte), 0
	return err
}
