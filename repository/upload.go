package repository

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"dormouse/repository/backend"
)

// upload stores chunks that the repository does not have yet. It gathers them
// in packs in memory, of which packBuffers exist: one is being filled while
// the others are on their way.
type upload struct {
	repo   *Repository
	lease  *lease
	ctx    context.Context // ends when the upload fails
	cancel context.CancelCauseFunc
	savers errgroup.Group

	filling sync.Mutex
	current *packBuilder
	free    chan *packBuilder

	mu sync.Mutex
	// own has the stored size of chunks in packs that no index lists yet: at
	// most those of packBuffers + indexPacks packs.
	own       map[ID]uint32
	unindexed []packIndex

	newBytes atomic.Int64
}

const packBuffers = 4

func (r *Repository) newUpload(ctx context.Context, l *lease) *upload {
	u := &upload{repo: r, lease: l, own: make(map[ID]uint32), free: make(chan *packBuilder, packBuffers)}
	u.ctx, u.cancel = context.WithCancelCause(ctx)
	for range packBuffers {
		u.free <- nil // made when first used
	}
	return u
}

// has returns the stored size of a chunk that may be referred to.
func (u *upload) has(id ID) (stored uint32, ok bool, err error) {
	u.mu.Lock()
	stored, ok = u.own[id]
	u.mu.Unlock()
	if ok {
		return stored, true, nil
	}
	loc, ok, err := u.repo.db.lookup(id, u.lease.avoid)
	return loc.Stored, ok, err
}

// newChunk is a chunk that the repository does not have, as it is to be stored.
type newChunk struct {
	id   ID
	data []byte
	raw  int
	how  byte
}

// put stores a chunk unless it is there, and returns its id and stored size.
// buf is scratch space.
func (u *upload) put(plain []byte, buf []byte) (ID, uint32, error) {
	id, stored, chunk, err := u.prepare(plain, buf)
	if err == nil && chunk != nil {
		err = u.add([]newChunk{*chunk})
	}
	return id, stored, err
}

// prepare is put without the storing: chunk, if not nil, must be given to add.
// Its data is plain or uses buf.
func (u *upload) prepare(plain []byte, buf []byte) (id ID, stored uint32, chunk *newChunk, err error) {
	id = hashOf(plain)
	stored, ok, err := u.has(id)
	if ok || err != nil {
		return id, stored, nil, err
	}
	if !u.claim(id, uint32(len(plain))) {
		return id, uint32(len(plain)), nil, nil
	}
	data, how := u.repo.codec.encode(plain, buf)
	u.mu.Lock()
	u.own[id] = uint32(len(data))
	u.mu.Unlock()
	return id, uint32(len(data)), &newChunk{id, data, len(plain), how}, nil
}

// claim makes the caller the one who stores the chunk.
func (u *upload) claim(id ID, size uint32) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, ok := u.own[id]; ok {
		return false
	}
	u.own[id] = size
	return true
}

// add stores new chunks, one behind the other: what is read together later
// should lie together.
func (u *upload) add(chunks []newChunk) error {
	u.filling.Lock()
	defer u.filling.Unlock()
	for i := range chunks {
		if err := u.addOne(&chunks[i]); err != nil {
			return err
		}
	}
	return nil
}

func (u *upload) addOne(c *newChunk) error {
	if u.ctx.Err() != nil {
		return context.Cause(u.ctx)
	}
	if u.current == nil {
		select {
		case u.current = <-u.free:
		case <-u.ctx.Done():
			return context.Cause(u.ctx)
		}
		if u.current == nil {
			u.current = newPackBuilder()
		}
	}
	u.current.add(c.id, c.data, c.raw, c.how)
	if u.current.full() {
		u.send()
	}
	return nil
}

// send stores the current pack in the background.
func (u *upload) send() {
	b := u.current
	u.current = nil
	u.savers.Go(func() error {
		pack, err := u.save(b)
		b.reset()
		u.free <- b
		if err == nil {
			err = u.index(pack, indexPacks)
		}
		if err != nil {
			u.cancel(err)
		}
		return err
	})
}

func (u *upload) save(b *packBuilder) (packIndex, error) {
	name := b.finish()
	h := backend.Handle{Kind: backend.Pack, Name: name.String()}
	if err := u.repo.be.Save(u.ctx, h, bytes.NewReader(b.buf), int64(len(b.buf))); err != nil {
		return packIndex{}, fmt.Errorf("store a pack: %w", err)
	}
	u.newBytes.Add(int64(len(b.buf)))
	return packIndex{name, append([]packChunk(nil), b.chunks...)}, nil
}

// index notes stored packs, and writes an index object when it has atLeast.
func (u *upload) index(pack packIndex, atLeast int) error {
	u.mu.Lock()
	u.unindexed = append(u.unindexed, pack)
	if len(u.unindexed) < atLeast {
		u.mu.Unlock()
		return nil
	}
	packs := u.unindexed
	u.unindexed = nil
	u.mu.Unlock()
	return u.writeIndex(packs)
}

func (u *upload) writeIndex(packs []packIndex) error {
	p := encodeIndex(packs)
	name, err := u.repo.saveHashed(u.ctx, backend.Index, p)
	if err != nil {
		return fmt.Errorf("store an index: %w", err)
	}
	u.newBytes.Add(int64(len(p)))
	if err := u.repo.db.add(name, packs); err != nil {
		return fmt.Errorf("write the local copy of the index %s: %w", u.repo.db.path, err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, pack := range packs {
		for _, c := range pack.Chunks {
			delete(u.own, c.ID)
		}
	}
	return nil
}

// finish stores what is in memory; afterwards every chunk is in an index.
func (u *upload) finish() error {
	u.filling.Lock()
	if u.current != nil && len(u.current.chunks) > 0 {
		u.send()
	}
	u.filling.Unlock()
	err := u.savers.Wait()
	u.forget()
	if err != nil {
		return err
	}
	packs := u.unindexed
	u.unindexed = nil
	if len(packs) == 0 {
		return nil
	}
	return u.writeIndex(packs)
}

// abandon ends the upload; what it has stored may serve the next one.
func (u *upload) abandon() {
	u.cancel(context.Canceled)
	u.savers.Wait()
	u.forget()
}

// forget frees the buffers, for an upload lives on until its manifest is written.
func (u *upload) forget() {
	u.current = nil
	for range len(u.free) {
		<-u.free
	}
}
