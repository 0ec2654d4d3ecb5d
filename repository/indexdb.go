package repository

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// indexDB is the local copy of the repository's index: a bbolt file, about 120
// bytes per chunk (0.2 % of what the repository stores), of which the kernel
// keeps in memory what is used. It holds nothing that cannot be read again
// from the backend, so it is written without fsync, and thrown away when it is
// damaged or belongs to another repository.
//
//	meta     "repository" → the repository's id
//	indexes  index object's name → u32 pack numbers
//	packs    u32 pack number → name [32], u32 how many index objects list it
//	numbers  pack name → u32 pack number
//	chunks   chunk id [32], u32 pack number → offset, stored, raw u32, codec u8
//
// Numbers in this file are big-endian. A pack that no index object lists any
// more is gone; its chunks are ignored, and swept when the file is reopened
// and more than half of all packs are gone.
type indexDB struct {
	db   *bolt.DB
	path string
}

var (
	bucketMeta    = []byte("meta")
	bucketIndexes = []byte("indexes")
	bucketPacks   = []byte("packs")
	bucketNumbers = []byte("numbers")
	bucketChunks  = []byte("chunks")
	keyRepository = []byte("repository")
	keyBoot       = []byte("boot")
)

func openIndexDB(dir, repository string) (*indexDB, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create the repository's cache directory: %w", err)
	}
	path := filepath.Join(dir, "index.db")
	x, err := tryIndexDB(path, repository)
	if err == nil || errors.Is(err, bolterrors.ErrTimeout) {
		return x, err
	}
	// Damaged, of another repository or mostly of packs that are gone: all of
	// it can be read again.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("replace the repository's cache: %w", err)
	}
	return tryIndexDB(path, repository)
}

func tryIndexDB(path, repository string) (x *indexDB, err error) {
	defer func() { // bbolt panics on some damaged files
		if r := recover(); r != nil {
			x, err = nil, fmt.Errorf("the repository's cache %s is damaged: %v", path, r)
		}
	}()
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second, NoSync: true, NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("the repository's cache %s is in use by another process: give each process its own: %w", path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("open the repository's cache %s: %w", path, err)
	}
	x = &indexDB{db: db, path: path}
	if err := x.prepare(repository); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return x, nil
}

func (x *indexDB) prepare(repository string) error {
	return x.db.Update(func(tx *bolt.Tx) error {
		for _, name := range [][]byte{bucketMeta, bucketIndexes, bucketPacks, bucketNumbers, bucketChunks} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		meta := tx.Bucket(bucketMeta)
		if have := meta.Get(keyRepository); have != nil && string(have) != repository {
			return fmt.Errorf("%s is the cache of repository %s", x.path, have)
		}
		if packs, gone := countPacks(tx); packs > 100 && gone > packs/2 {
			return fmt.Errorf("%s is mostly about packs that are gone", x.path)
		}
		if err := checkBoot(meta); err != nil {
			return err
		}
		return meta.Put(keyRepository, []byte(repository))
	})
}

// checkBoot refuses a database of unsynced writes from before the last boot.
func checkBoot(meta *bolt.Bucket) error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("read the kernel's boot id: %w", err)
	}
	if have := meta.Get(keyBoot); have != nil && !bytes.Equal(have, boot) {
		return errors.New("the machine was booted since")
	}
	return meta.Put(keyBoot, boot)
}

func countPacks(tx *bolt.Tx) (packs, gone int) {
	tx.Bucket(bucketPacks).ForEach(func(_, v []byte) error {
		packs++
		if binary.BigEndian.Uint32(v[32:]) == 0 {
			gone++
		}
		return nil
	})
	return packs, gone
}

func (x *indexDB) close() error { return x.db.Close() }

// indexNames returns the index objects that were added, sorted.
func (x *indexDB) indexNames() (names []ID, err error) {
	err = x.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketIndexes).ForEach(func(k, _ []byte) error {
			names = append(names, ID(k))
			return nil
		})
	})
	return names, err
}

// add enters an index object.
func (x *indexDB) add(index ID, packs []packIndex) error {
	return x.db.Update(func(tx *bolt.Tx) error {
		if tx.Bucket(bucketIndexes).Get(index[:]) != nil {
			return nil
		}
		var numbers []byte
		for _, pack := range packs {
			n, err := countPack(tx, pack.Name, +1)
			if err != nil {
				return err
			}
			numbers = binary.BigEndian.AppendUint32(numbers, n)
			if err := putChunks(tx, n, pack.Chunks); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketIndexes).Put(index[:], numbers)
	})
}

func putChunks(tx *bolt.Tx, pack uint32, chunks []packChunk) error {
	sorted := slices.Clone(chunks) // bbolt is many times faster in key order
	slices.SortFunc(sorted, func(a, b packChunk) int { return bytes.Compare(a.ID[:], b.ID[:]) })
	b := tx.Bucket(bucketChunks)
	for _, c := range sorted {
		k := binary.BigEndian.AppendUint32(bytes.Clone(c.ID[:]), pack)
		v := binary.BigEndian.AppendUint32(nil, c.Offset)
		v = binary.BigEndian.AppendUint32(v, c.Stored)
		v = binary.BigEndian.AppendUint32(v, c.Raw)
		if err := b.Put(k, append(v, c.Codec)); err != nil {
			return err
		}
	}
	return nil
}

// countPack changes how many index objects list a pack, and returns its number.
func countPack(tx *bolt.Tx, name ID, change int) (uint32, error) {
	packs, numbers := tx.Bucket(bucketPacks), tx.Bucket(bucketNumbers)
	var n, count uint32
	if have := numbers.Get(name[:]); have != nil {
		n = binary.BigEndian.Uint32(have)
		count = binary.BigEndian.Uint32(packs.Get(have)[32:])
	} else {
		next, err := packs.NextSequence()
		if err != nil {
			return 0, err
		}
		n = uint32(next)
		if err := numbers.Put(name[:], binary.BigEndian.AppendUint32(nil, n)); err != nil {
			return 0, err
		}
	}
	v := binary.BigEndian.AppendUint32(bytes.Clone(name[:]), count+uint32(change))
	return n, packs.Put(binary.BigEndian.AppendUint32(nil, n), v)
}

// drop forgets an index object that is no longer in the repository.
func (x *indexDB) drop(index ID) error {
	return x.db.Update(func(tx *bolt.Tx) error {
		indexes, packs := tx.Bucket(bucketIndexes), tx.Bucket(bucketPacks)
		numbers := bytes.Clone(indexes.Get(index[:]))
		for n := range slices.Chunk(numbers, 4) {
			name := ID(packs.Get(n)[:32])
			if _, err := countPack(tx, name, -1); err != nil {
				return err
			}
		}
		return indexes.Delete(index[:])
	})
}

func decodeLocation(pack ID, v []byte) location {
	return location{
		Pack:   pack,
		Offset: binary.BigEndian.Uint32(v),
		Stored: binary.BigEndian.Uint32(v[4:]),
		Raw:    binary.BigEndian.Uint32(v[8:]),
		Codec:  v[12],
	}
}

// lookup finds a chunk in any pack that avoid does not hold.
func (x *indexDB) lookup(id ID, avoid map[ID]bool) (loc location, found bool, err error) {
	err = x.db.View(func(tx *bolt.Tx) error {
		loc, found = finderIn(tx).find(id, avoid)
		return nil
	})
	return loc, found, err
}

// lookupAll finds chunks, or the first that no pack contains.
func (x *indexDB) lookupAll(ids []ID) (found []location, unknown *ID, err error) {
	found = make([]location, len(ids))
	err = x.db.View(func(tx *bolt.Tx) error {
		finder := finderIn(tx)
		for i, id := range ids {
			var ok bool
			if found[i], ok = finder.find(id, nil); !ok {
				unknown = &id
				break
			}
		}
		return nil
	})
	return found, unknown, err
}

// finder finds chunks within a transaction.
type finder struct {
	packs  *bolt.Bucket
	chunks *bolt.Cursor
}

func finderIn(tx *bolt.Tx) finder {
	return finder{tx.Bucket(bucketPacks), tx.Bucket(bucketChunks).Cursor()}
}

func (f finder) find(id ID, avoid map[ID]bool) (loc location, found bool) {
	for k, v := f.chunks.Seek(id[:]); bytes.HasPrefix(k, id[:]); k, v = f.chunks.Next() {
		pack := f.packs.Get(k[32:])
		if binary.BigEndian.Uint32(pack[32:]) > 0 && !avoid[ID(pack[:32])] {
			return decodeLocation(ID(pack[:32]), v), true
		}
	}
	return loc, false
}

// packsOf returns the packs that an index object lists.
func (x *indexDB) packsOf(index ID) (names []ID, err error) {
	err = x.db.View(func(tx *bolt.Tx) error {
		for n := range slices.Chunk(tx.Bucket(bucketIndexes).Get(index[:]), 4) {
			names = append(names, ID(tx.Bucket(bucketPacks).Get(n)[:32]))
		}
		return nil
	})
	return names, err
}

// packNames calls fn for every pack that an index object lists.
func (x *indexDB) packNames(fn func(ID)) error {
	return x.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketPacks).ForEach(func(_, v []byte) error {
			if binary.BigEndian.Uint32(v[32:]) > 0 {
				fn(ID(v[:32]))
			}
			return nil
		})
	})
}
