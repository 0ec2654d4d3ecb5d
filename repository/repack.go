package repository

import (
	"cmp"
	"context"
	"errors"
	"math/bits"
	"slices"

	"dormouse/repository/backend"
)

// usage tells which blocks of 4 KiB of a pack hold chunks that are needed.
type usage [(packMaxSize/usageBlock + 63) / 64]uint64

const usageBlock = 4096

func (c *collector) use(loc location) {
	u := c.packs[loc.Pack]
	if u == nil {
		u = new(usage)
		c.packs[loc.Pack] = u
	}
	for b := loc.Offset / usageBlock; b <= (loc.Offset+loc.Stored-1)/usageBlock && int(b/64) < len(u); b++ {
		u[b/64] |= 1 << (b % 64)
	}
}

func (u *usage) bytes() int64 {
	n := 0
	for _, word := range u {
		n += bits.OnesCount64(word)
	}
	return int64(n) * usageBlock
}

const (
	repackBudget = 1 << 30 // bytes moved in one collection
	smallPack    = packTarget / 4
	manySmall    = 16
)

// repack moves what is needed out of packs that are not worth keeping.
func (c *collector) repack(ctx context.Context) error {
	c.moved = make(map[ID]bool)
	packs, err := c.wasteful(ctx)
	if err != nil || len(packs) == 0 {
		return err
	}
	live, err := c.liveChunks(ctx, packs)
	if err != nil {
		return err
	}
	l, err := c.repo.acquire(ctx, "repacking by garbage collection")
	if err != nil {
		return err
	}
	defer l.release()
	for pack := range packs {
		l.avoid[pack] = true // so that their chunks count as new
	}
	u := c.repo.newUpload(ctx, l)
	defer u.abandon()
	if err := c.move(ctx, u, live); err != nil {
		return err
	}
	if err := errors.Join(u.finish(), l.check()); err != nil {
		return err
	}
	for _, chunk := range live { // the new packs are needed
		loc, ok, err := c.repo.db.lookup(chunk, l.avoid)
		if err != nil {
			return err
		}
		if ok {
			c.use(loc)
		}
	}
	c.stats.RepackedBytes = u.newBytes.Load()
	c.moved = packs
	return nil
}

// wasteful chooses packs of which less than half is needed, or which are small
// and many, those with least to move first.
func (c *collector) wasteful(ctx context.Context) (map[ID]bool, error) {
	type candidate struct {
		id    ID
		live  int64
		small bool
	}
	var all []candidate
	small, condemned := 0, c.avoid()
	err := c.repo.be.List(ctx, backend.Pack, func(info backend.Info) error {
		id, err := ParseID(info.Name)
		if err != nil || c.packs[id] == nil || condemned[id] {
			return nil
		}
		k := candidate{id, c.packs[id].bytes(), info.Size < smallPack}
		if k.small {
			small++
		} else if 2*k.live >= info.Size {
			return nil
		}
		all = append(all, k)
		return nil
	})
	slices.SortFunc(all, func(a, b candidate) int { return cmp.Compare(a.live, b.live) })
	packs, budget := make(map[ID]bool), int64(repackBudget)
	for _, k := range all {
		if k.small && small < manySmall || k.live > budget {
			continue
		}
		budget -= k.live
		packs[k.id] = true
	}
	return packs, err
}

// liveChunks finds the needed chunks of some packs, in the order of use.
func (c *collector) liveChunks(ctx context.Context, packs map[ID]bool) ([]ID, error) {
	var live []ID
	found, seen, avoid := make(map[ID]bool), make(map[ID]bool), c.avoid()
	for name := range c.parts {
		p, err := c.repo.loadPart(ctx, name)
		if err == nil {
			err = c.repo.walkPart(ctx, &p, seen, func(chunk ID) error {
				loc, ok, err := c.repo.db.lookup(chunk, avoid)
				if ok && packs[loc.Pack] && !found[chunk] {
					found[chunk] = true
					live = append(live, chunk)
				}
				return err
			})
		}
		if err != nil {
			return nil, err
		}
	}
	return live, nil
}

// move stores chunks again. One that is damaged stays where it is, and so does
// its pack, for the next round marks it there.
func (c *collector) move(ctx context.Context, u *upload, chunks []ID) error {
	zip := make([]byte, 0, maxChunk+maxChunk/8)
	for _, id := range chunks {
		plain, err := c.repo.loadChunk(ctx, id)
		if errors.Is(err, ErrDamaged) {
			continue
		}
		if err != nil {
			return err
		}
		if _, _, err := u.put(plain, zip); err != nil {
			return err
		}
	}
	return nil
}
