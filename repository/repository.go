package repository

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"time"

	"dormouse/repository/backend"
)

// Options of Open. The zero value of each but CacheDir is the default.
type Options struct {
	// CacheDir is a directory on the local disk for the copy of the index. Each
	// process needs its own; it may be lost at any time.
	CacheDir string
	// Workers is how many goroutines hash, compress and read; 0 means one per
	// CPU. Memory grows with it: see the package comment.
	Workers int
	// LeaseTTL is how long an upload that died keeps garbage collection from
	// deleting; default 10 minutes, at most one hour.
	LeaseTTL time.Duration
}

// Repository is an open repository, safe for use by many uploads, restores
// and other calls at once.
type Repository struct {
	be      backend.Backend
	config  config
	db      *indexDB
	codec   *codec
	workers int
	ttl     time.Duration
	syncing sync.Mutex
}

// config is the object "config/config".
type config struct {
	Format  int       `json:"dormouse_repository"`
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
}

const (
	formatVersion = 1
	configLimit   = 64 << 10
)

var configHandle = backend.Handle{Kind: backend.Config, Name: "config"}

// Init makes be a repository unless it is one already.
func Init(ctx context.Context, be backend.Backend) error {
	p, err := json.MarshalIndent(config{formatVersion, rand.Text(), time.Now().UTC()}, "", "  ")
	if err != nil {
		return err
	}
	err = be.Save(ctx, configHandle, bytes.NewReader(p), int64(len(p)))
	if err != nil && !errors.Is(err, backend.ErrExist) {
		return fmt.Errorf("create the repository in %s: %w", be.Location(), err)
	}
	return nil
}

// Open opens a repository that Init has made.
func Open(ctx context.Context, be backend.Backend, opts Options) (*Repository, error) {
	c, err := readConfig(ctx, be)
	if err != nil {
		return nil, err
	}
	if opts.Workers <= 0 {
		opts.Workers = runtime.NumCPU()
	}
	if opts.LeaseTTL <= 0 {
		opts.LeaseTTL = 10 * time.Minute
	}
	codec, err := newCodec(opts.Workers)
	if err != nil {
		return nil, err
	}
	db, err := openIndexDB(opts.CacheDir, c.ID)
	if err != nil {
		return nil, err
	}
	return &Repository{be: be, config: c, db: db, codec: codec, workers: opts.Workers, ttl: min(opts.LeaseTTL, maxLeaseTTL)}, nil
}

func readConfig(ctx context.Context, be backend.Backend) (config, error) {
	p, err := backend.ReadAll(ctx, be, configHandle, configLimit)
	if errors.Is(err, backend.ErrNotExist) {
		return config{}, fmt.Errorf("there is no repository in %s: %w", be.Location(), err)
	}
	if err != nil {
		return config{}, fmt.Errorf("open the repository in %s: %w", be.Location(), err)
	}
	var c config
	if err := json.Unmarshal(p, &c); err != nil || c.ID == "" {
		return config{}, &DamagedError{Object: "config of the repository in " + be.Location(), Err: errors.Join(err, errors.New("it has no id"))}
	}
	if c.Format != formatVersion {
		return config{}, fmt.Errorf("the repository in %s has format %d, this program reads %d: %w", be.Location(), c.Format, formatVersion, ErrVersion)
	}
	return c, nil
}

// Close closes the local copy of the index. Uploads and restores must have ended.
func (r *Repository) Close() error { return r.db.close() }

// ID is the repository's own name, unique among all repositories.
func (r *Repository) ID() string { return r.config.ID }

// Location names the place of the repository for people.
func (r *Repository) Location() string { return r.be.Location() }

// sync brings the local copy of the index up to date. A list of objects is not
// made at one moment: where index objects are merged meanwhile, it may have neither
// them nor what they were merged into. So two lists in a row have to agree.
func (r *Repository) sync(ctx context.Context) error {
	r.syncing.Lock()
	defer r.syncing.Unlock()
	var vanished bool
	for look := range 10 {
		var changed bool
		var err error
		if changed, vanished, err = r.syncOnce(ctx); err != nil {
			return fmt.Errorf("read the repository's index: %w", err)
		}
		if look > 0 && !changed {
			return nil
		}
	}
	if !vanished { // others only add to it
		return nil
	}
	return fmt.Errorf("read the repository's index: it keeps changing in %s", r.be.Location())
}

// syncOnce looks once. It reports whether that is not what the local copy had, and
// whether an object vanished before it was read.
func (r *Repository) syncOnce(ctx context.Context) (changed, vanished bool, err error) {
	have, err := r.db.indexNames()
	if err != nil {
		return false, false, err
	}
	there := make(map[ID]bool)
	var damaged []ID
	err = r.be.List(ctx, backend.Index, func(info backend.Info) error {
		name, err := ParseID(info.Name)
		if err != nil {
			return nil // not one of ours
		}
		there[name] = true
		if _, found := slices.BinarySearchFunc(have, name, compareIDs); found {
			return nil
		}
		changed = true
		packs, err := r.loadIndex(ctx, name)
		switch {
		case errors.Is(err, backend.ErrNotExist):
			vanished = true
			return nil
		case errors.Is(err, ErrDamaged):
			damaged = append(damaged, name)
			return nil
		case err != nil:
			return err
		}
		return r.db.add(name, packs)
	})
	if err != nil {
		return false, false, err
	}
	for _, name := range have {
		if there[name] {
			continue
		}
		changed = true
		if err := r.db.drop(name); err != nil {
			return false, false, err
		}
	}
	for _, name := range damaged {
		if err := r.indexFromPacks(ctx, name); err != nil {
			return false, false, fmt.Errorf("read the tables of packs in place of the damaged index %s: %w", name, err)
		}
	}
	return changed, vanished, nil
}

func compareIDs(a, b ID) int { return bytes.Compare(a[:], b[:]) }

func (r *Repository) loadIndex(ctx context.Context, name ID) ([]packIndex, error) {
	p, err := r.loadHashed(ctx, backend.Index, name, indexMaxSize)
	if err != nil {
		return nil, err
	}
	packs, err := parseIndex(p)
	if err != nil {
		return nil, &DamagedError{Object: "index " + name.String(), Err: err}
	}
	return packs, nil
}

// loadHashed reads an object whose name is the hash of its bytes.
func (r *Repository) loadHashed(ctx context.Context, kind backend.Kind, name ID, limit int64) ([]byte, error) {
	p, err := backend.ReadAll(ctx, r.be, backend.Handle{Kind: kind, Name: name.String()}, limit)
	if err != nil {
		return nil, err
	}
	if hashOf(p) != name {
		return nil, &DamagedError{Object: string(kind) + " " + name.String(), Err: errors.New("its content does not match its name")}
	}
	return p, nil
}

// saveHashed stores an object under the hash of its bytes.
func (r *Repository) saveHashed(ctx context.Context, kind backend.Kind, p []byte) (ID, error) {
	name := hashOf(p)
	err := r.be.Save(ctx, backend.Handle{Kind: kind, Name: name.String()}, bytes.NewReader(p), int64(len(p)))
	if errors.Is(err, backend.ErrExist) {
		return name, nil
	}
	return name, err
}

// indexFromPacks reads the tables of all packs that no index lists and enters
// them in the place of a damaged index object, so that one flipped bit there
// harms no checkpoint.
func (r *Repository) indexFromPacks(ctx context.Context, damaged ID) error {
	known := make(map[ID]bool)
	if err := r.db.packNames(func(name ID) { known[name] = true }); err != nil {
		return err
	}
	var packs []packIndex
	err := r.be.List(ctx, backend.Pack, func(info backend.Info) error {
		name, err := ParseID(info.Name)
		if err != nil || known[name] {
			return nil
		}
		is, chunks, err := parsePack(packReader{ctx, r.be, name}, info.Size)
		if errors.Is(err, backend.ErrNotExist) || ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil || is != name {
			return nil // verify and restores name it when they need it
		}
		packs = append(packs, packIndex{name, chunks})
		return nil
	})
	if err != nil {
		return err
	}
	return r.db.add(damaged, packs)
}

// packReader is a pack as an io.ReaderAt.
type packReader struct {
	ctx  context.Context
	be   backend.Backend
	pack ID
}

func (p packReader) ReadAt(b []byte, off int64) (int, error) {
	return p.be.ReadAt(p.ctx, backend.Handle{Kind: backend.Pack, Name: p.pack.String()}, b, off)
}

// find returns where chunks lie, after one look at the backend's index if the
// local copy does not know them all.
func (r *Repository) find(ctx context.Context, ids ...ID) ([]location, error) {
	found, unknown, err := r.db.lookupAll(ids)
	if err != nil || unknown == nil {
		return found, err
	}
	if err := r.sync(ctx); err != nil {
		return nil, err
	}
	found, unknown, err = r.db.lookupAll(ids)
	if err == nil && unknown != nil {
		err = &DamagedError{Object: "the repository in " + r.be.Location(), Chunk: unknown.String(), Err: errors.New("no pack contains it")}
	}
	return found, err
}

// loadChunk reads one chunk, for metadata; content is read by fetch.
func (r *Repository) loadChunk(ctx context.Context, id ID) ([]byte, error) {
	for attempt := 0; ; attempt++ {
		found, err := r.find(ctx, id)
		if err != nil {
			return nil, err
		}
		loc := found[0]
		stored := make([]byte, loc.Stored)
		err = r.readPack(ctx, loc.Pack, stored, int64(loc.Offset))
		if errors.Is(err, backend.ErrNotExist) && attempt == 0 {
			// Garbage collection may have moved the chunk since the last sync.
			if err := r.sync(ctx); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		plain, err := r.codec.decode(id, loc, stored, make([]byte, 0, maxChunk))
		if err != nil {
			return nil, &DamagedError{Object: "pack " + loc.Pack.String(), Chunk: id.String(), Err: err}
		}
		return plain, nil
	}
}

// readAligned reads a stretch of a pack with what is around it, into buf, so that it
// can go past the page cache. buf has room for 2*packAlign bytes more.
func (r *Repository) readAligned(ctx context.Context, pack ID, buf []byte, begin, end int64) ([]byte, error) {
	from := begin &^ (packAlign - 1)
	p := buf[:(end-from+packAlign-1)&^(packAlign-1)]
	n, err := r.be.ReadAt(ctx, backend.Handle{Kind: backend.Pack, Name: pack.String()}, p, from)
	if err == io.EOF && int64(n) >= end-from {
		err = nil
	}
	return p[begin-from : end-from], packError(pack, err)
}

// readPack reads len(p) bytes of a pack.
func (r *Repository) readPack(ctx context.Context, pack ID, p []byte, off int64) error {
	_, err := r.be.ReadAt(ctx, backend.Handle{Kind: backend.Pack, Name: pack.String()}, p, off)
	return packError(pack, err)
}

func packError(pack ID, err error) error {
	if err == io.EOF {
		return &DamagedError{Object: "pack " + pack.String(), Err: errors.New("it is truncated")}
	}
	if err != nil {
		return fmt.Errorf("read pack %s: %w", pack, err)
	}
	return nil
}
