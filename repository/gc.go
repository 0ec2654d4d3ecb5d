package repository

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"dormouse/repository/backend"
)

// GCOptions of GC. The zero value of each but Verifier is the default.
type GCOptions struct {
	Verifier *Verifier
	// Grace is how long parts that no manifest refers to, and all they need, are
	// kept after they were written; default one hour, negative for none.
	// That is for a part whose agent has died while other tasks of the checkpoint
	// are still being stored. Parts of removed checkpoints have none.
	Grace time.Duration
}

// GCStats is what a garbage collection did.
type GCStats struct {
	Checkpoints    int      `json:"checkpoints"` // whose data was marked
	Packs          int      `json:"packs"`       // that are needed
	RemovedPacks   int      `json:"removed_packs"`
	RemovedBytes   int64    `json:"removed_bytes"`
	RemovedParts   int      `json:"removed_parts"`
	RepackedBytes  int64    `json:"repacked_bytes"`  // moved out of packs that were mostly garbage
	CondemnedPacks int      `json:"condemned_packs"` // to be removed as soon as WaitingFor have ended
	WaitingFor     []string `json:"waiting_for"`     // holders of leases
}

// condemned is a list of what a garbage collection wants to delete: the lock
// object "condemned-<random>". Who takes a lease after it was written will not
// refer to anything in it.
type condemned struct {
	name    string
	Format  int       `json:"dormouse_condemned"`
	Created time.Time `json:"created"`
	Packs   []ID      `json:"packs"`
	Parts   []ID      `json:"parts"`
}

// released is the lock object "released-<random>": the parts of a checkpoint
// that was removed, which therefore do not wait for a manifest.
type released struct {
	name   string
	Format int  `json:"dormouse_released"`
	Parts  []ID `json:"parts"`
}

// release writes down the parts of a manifest that is about to be removed. The
// manifest's signature does not matter: whatever is named here only loses its
// grace.
func (r *Repository) release(ctx context.Context, manifest []byte) error {
	_, payload, _ := bytes.Cut(manifest, []byte("\n"))
	var m Manifest
	if json.Unmarshal(payload, &m) != nil {
		return nil // its parts are freed when their grace is over
	}
	list := released{Format: formatVersion}
	for _, t := range m.Tasks {
		if id, err := ParseID(t.Part); err == nil {
			list.Parts = append(list.Parts, id)
		}
	}
	p, err := json.Marshal(list)
	if err != nil || len(list.Parts) == 0 {
		return err
	}
	return r.be.Save(ctx, backend.Handle{Kind: backend.Lock, Name: releasedPrefix + rand.Text()}, bytes.NewReader(p), int64(len(p)))
}

// readReleased reads all lists of released parts. One that cannot be read does
// not matter: its parts are freed later.
func (r *Repository) readReleased(ctx context.Context) (lists []released, err error) {
	err = r.be.List(ctx, backend.Lock, func(info backend.Info) error {
		if !strings.HasPrefix(info.Name, releasedPrefix) {
			return nil
		}
		p, err := backend.ReadAll(ctx, r.be, backend.Handle{Kind: backend.Lock, Name: info.Name}, lockLimit)
		if errors.Is(err, backend.ErrNotExist) {
			return nil
		}
		l := released{name: info.Name}
		if err == nil && json.Unmarshal(p, &l) != nil {
			l.Parts = nil
		}
		lists = append(lists, l)
		return err
	})
	return lists, err
}

const (
	defaultGrace    = time.Hour
	condemnedAtMost = 1 << 20 // ids in one list
)

// condemned reads all condemned lists. One that vanishes was carried out.
func (r *Repository) condemned(ctx context.Context) ([]condemned, error) {
	var lists []condemned
	err := r.be.List(ctx, backend.Lock, func(info backend.Info) error {
		if !strings.HasPrefix(info.Name, condemnedPrefix) {
			return nil
		}
		p, err := backend.ReadAll(ctx, r.be, backend.Handle{Kind: backend.Lock, Name: info.Name}, lockLimit)
		if errors.Is(err, backend.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		c := condemned{name: info.Name}
		if err := json.Unmarshal(p, &c); err != nil || c.Format != formatVersion {
			return &DamagedError{Object: "lock " + info.Name, Err: errors.Join(err, errors.New("remove this object from the repository: it only holds what garbage collection will find again"))}
		}
		lists = append(lists, c)
		return nil
	})
	return lists, err
}

// collector is one garbage collection.
type collector struct {
	repo  *Repository
	opts  GCOptions
	lock  *lease
	now   time.Time // by the backend's clock
	stats GCStats

	lists  []condemned
	freed  []released
	living map[string]leaseRecord
	packs  map[ID]*usage // needed
	parts  map[ID]bool   // needed
	moved  map[ID]bool   // packs whose needed chunks lie elsewhere too
}

// GC deletes what no checkpoint needs. It is safe beside running uploads, and
// when it or they die at any moment, because it deletes in two steps:
//
//  1. mark what manifests refer to, what young parts refer to, and what parts of
//     living leases refer to; write the rest down in a condemned list;
//  2. later, when every living lease knows that list: mark again, and delete
//     what is in the list and still not marked.
//
// An upload takes its lease, then reads the lists and avoids what they
// condemn, and only then looks for chunks. So an upload either knows a list,
// or its lease holds up step 2 until it has ended; and what it has referred to
// by then is marked. With no upload running both steps happen in one call.
//
// Packs of which less than half is needed, and small packs when there are
// many, are repacked before step 1: their needed chunks are stored again in
// new packs, and they are condemned.
//
// In memory GC keeps 700 bytes per pack (16 MiB), and 64 MiB at most for what
// else it has seen.
//
// GC deletes nothing when the manifest or the metadata of any checkpoint is
// damaged, because then it cannot tell what that checkpoint needs: remove the
// checkpoint or bring the object back, then collect.
func (r *Repository) GC(ctx context.Context, opts GCOptions) (GCStats, error) {
	if opts.Grace == 0 {
		opts.Grace = defaultGrace
	}
	c := &collector{repo: r, opts: opts}
	if err := c.begin(ctx); err != nil {
		return GCStats{}, fmt.Errorf("garbage collection: %w", err)
	}
	defer c.lock.release()
	if err := c.run(ctx); err != nil {
		return c.stats, fmt.Errorf("garbage collection: %w", err)
	}
	return c.stats, nil
}

// begin makes sure that no other collection runs, and learns the time.
func (c *collector) begin(ctx context.Context) error {
	r := c.repo
	l, err := r.newLease(ctx, collectorPrefix, "garbage collection")
	if err != nil {
		return err
	}
	c.lock = l
	c.now, err = l.backendTime(ctx)
	if err == nil {
		var others map[string]leaseRecord
		if others, err = r.leases(ctx, collectorPrefix, c.now); err == nil && len(others) > 1 {
			err = ErrBusy
		}
	}
	if err != nil {
		l.release()
	}
	return err
}

func (c *collector) run(ctx context.Context) error {
	if err := c.repo.be.RemoveIncomplete(ctx, max(c.opts.Grace, defaultGrace)); err != nil {
		return err
	}
	for round := range 2 {
		if err := c.mark(ctx); err != nil {
			return err
		}
		if round == 0 {
			if err := c.repack(ctx); err != nil {
				return err
			}
		}
		for i := range c.lists {
			if err := c.carryOut(ctx, &c.lists[i]); err != nil {
				return err
			}
		}
		found, err := c.condemn(ctx)
		if err != nil {
			return err
		}
		if !found {
			break
		}
	}
	return c.forgetReleased(ctx)
}

// mark finds what is needed. The order counts: the lists before the leases,
// so that a lease that does not know a list is seen; the leases before the
// manifests, so that a lease that has ended has left its manifest.
func (c *collector) mark(ctx context.Context) (err error) {
	r := c.repo
	c.packs, c.parts = make(map[ID]*usage), make(map[ID]bool)
	if c.lists, err = r.condemned(ctx); err != nil {
		return err
	}
	if c.living, err = r.leases(ctx, leasePrefix, c.now); err != nil {
		return err
	}
	if c.freed, err = r.readReleased(ctx); err != nil {
		return err
	}
	if err := c.markManifests(ctx); err != nil {
		return err
	}
	if err := c.markParts(ctx); err != nil {
		return err
	}
	c.stats.Packs = len(c.packs)
	return nil
}

func (c *collector) markManifests(ctx context.Context) error {
	ids, err := c.repo.ListManifests(ctx)
	if err != nil {
		return err
	}
	if err := c.repo.sync(ctx); err != nil {
		return err
	}
	seen, avoid := make(map[ID]bool), c.avoid()
	for _, id := range ids {
		m, err := c.repo.LoadManifest(ctx, id, c.opts.Verifier)
		if errors.Is(err, backend.ErrNotExist) {
			continue // removed just now
		}
		if err != nil {
			return fmt.Errorf("nothing was deleted, because checkpoint %s cannot be read (remove it, then collect again): %w", id, err)
		}
		for _, t := range m.Tasks {
			if err := c.markPart(ctx, t.Part, seen, avoid); err != nil {
				return fmt.Errorf("nothing was deleted, because checkpoint %s cannot be read (remove it, then collect again): %w", id, err)
			}
		}
	}
	c.stats.Checkpoints = len(ids)
	return nil
}

// markParts marks parts that wait for their manifest. What is damaged in them
// cannot come into a manifest any more, so it does not matter.
func (c *collector) markParts(ctx context.Context) error {
	seen, avoid := make(map[ID]bool), c.avoid()
	return c.repo.be.List(ctx, backend.Part, func(info backend.Info) error {
		name, err := ParseID(info.Name)
		if err != nil || c.parts[name] {
			return nil
		}
		if c.old(name, info) {
			p, err := c.repo.loadPart(ctx, name)
			if _, alive := c.living[p.Lease]; err != nil || !alive {
				return ctx.Err()
			}
		}
		err = c.markPart(ctx, info.Name, seen, avoid)
		if errors.Is(err, ErrDamaged) || errors.Is(err, ErrVersion) {
			return nil
		}
		return err
	})
}

// old reports whether a part does not wait for its manifest any more.
func (c *collector) old(part ID, info backend.Info) bool {
	for _, l := range c.freed {
		if slices.Contains(l.Parts, part) {
			return true
		}
	}
	return c.now.Sub(info.Modified) >= c.opts.Grace
}

// forgetReleased removes the lists whose parts are gone or in use.
func (c *collector) forgetReleased(ctx context.Context) error {
	for _, l := range c.freed {
		waiting := false
		for _, part := range l.Parts {
			_, err := c.repo.be.Stat(ctx, backend.Handle{Kind: backend.Part, Name: part.String()})
			if err != nil && !errors.Is(err, backend.ErrNotExist) {
				return err
			}
			waiting = waiting || err == nil && !c.parts[part]
		}
		if waiting {
			continue
		}
		if err := c.repo.be.Remove(ctx, backend.Handle{Kind: backend.Lock, Name: l.name}); err != nil {
			return err
		}
	}
	return nil
}

// avoid are all condemned packs: of a chunk that lies in two packs, the one
// that stays is marked.
func (c *collector) avoid() map[ID]bool {
	avoid := make(map[ID]bool)
	for _, l := range c.lists {
		for _, id := range l.Packs {
			avoid[id] = true
		}
	}
	return avoid
}

func (c *collector) markPart(ctx context.Context, id string, seen, avoid map[ID]bool) error {
	name, err := ParseID(id)
	if err != nil || c.parts[name] {
		return err
	}
	p, err := c.repo.loadPart(ctx, name)
	if err != nil {
		return err
	}
	err = c.repo.walkPart(ctx, &p, seen, func(chunk ID) error {
		loc, ok, err := c.repo.db.lookup(chunk, avoid)
		if err == nil && !ok {
			loc, ok, err = c.repo.db.lookup(chunk, nil)
		}
		if err != nil {
			return err
		}
		if !ok {
			return &DamagedError{Object: "part " + id, Chunk: chunk.String(), Err: errors.New("no pack contains it")}
		}
		c.use(loc)
		return nil
	})
	if err == nil {
		c.parts[name] = true
	}
	return err
}

// carryOut deletes what a list condemns and nothing needs, once every living
// lease knows the list. Index objects go first, so that who looks for chunks
// from now on does not find them; the list goes last, so that an interrupted
// deletion is resumed.
func (c *collector) carryOut(ctx context.Context, list *condemned) error {
	for _, l := range c.living {
		if !l.knows(list.name) {
			c.stats.CondemnedPacks += len(list.Packs)
			c.stats.WaitingFor = append(c.stats.WaitingFor, l.Holder)
			return nil
		}
	}
	if err := c.lock.check(); err != nil {
		return err
	}
	dead := make(map[ID]bool)
	for _, id := range list.Packs {
		if c.packs[id] == nil {
			dead[id] = true
		}
	}
	if err := c.repo.dropFromIndex(ctx, dead); err != nil {
		return err
	}
	for id := range dead {
		h := backend.Handle{Kind: backend.Pack, Name: id.String()}
		info, err := c.repo.be.Stat(ctx, h)
		if errors.Is(err, backend.ErrNotExist) {
			continue
		}
		if err := errors.Join(err, c.repo.be.Remove(ctx, h)); err != nil {
			return err
		}
		c.stats.RemovedPacks++
		c.stats.RemovedBytes += info.Size
	}
	for _, id := range list.Parts {
		if c.parts[id] {
			continue
		}
		if err := c.repo.be.Remove(ctx, backend.Handle{Kind: backend.Part, Name: id.String()}); err != nil {
			return err
		}
		c.stats.RemovedParts++
	}
	return c.repo.be.Remove(ctx, backend.Handle{Kind: backend.Lock, Name: list.name})
}

func (l *leaseRecord) knows(list string) bool {
	for _, k := range l.Knows {
		if k == list {
			return true
		}
	}
	return false
}

// condemn writes down what is not needed and not condemned yet.
func (c *collector) condemn(ctx context.Context) (found bool, err error) {
	already := c.avoid()
	for _, l := range c.lists {
		for _, id := range l.Parts {
			already[id] = true
		}
	}
	list := condemned{Format: formatVersion, Created: time.Now().UTC()}
	collect := func(kind backend.Kind, keep func(ID, backend.Info) bool, into *[]ID) error {
		return c.repo.be.List(ctx, kind, func(info backend.Info) error {
			id, err := ParseID(info.Name)
			if err == nil && !keep(id, info) && !already[id] && len(*into) < condemnedAtMost {
				*into = append(*into, id)
			}
			return nil
		})
	}
	err = errors.Join(
		collect(backend.Pack, func(id ID, _ backend.Info) bool { return c.packs[id] != nil && !c.moved[id] }, &list.Packs),
		collect(backend.Part, func(id ID, info backend.Info) bool { return c.parts[id] || !c.old(id, info) }, &list.Parts))
	if err != nil {
		return false, err
	}
	if len(list.Packs)+len(list.Parts) == 0 {
		return false, nil
	}
	p, err := json.Marshal(list)
	if err != nil {
		return false, err
	}
	h := backend.Handle{Kind: backend.Lock, Name: condemnedPrefix + rand.Text()}
	c.stats.CondemnedPacks, c.stats.WaitingFor = 0, nil // the next round counts
	return true, c.repo.be.Save(ctx, h, bytes.NewReader(p), int64(len(p)))
}

// dropFromIndex replaces the index objects that list dead packs by ones that
// do not, and joins small ones on the way. The new ones are written before the
// old ones go.
func (r *Repository) dropFromIndex(ctx context.Context, dead map[ID]bool) error {
	old, err := r.indexesToReplace(ctx, dead)
	if err != nil || len(old) == 0 {
		return err
	}
	var merged []packIndex
	kept := make(map[ID]bool)
	write := func() error {
		if len(merged) == 0 {
			return nil
		}
		name, err := r.saveHashed(ctx, backend.Index, encodeIndex(merged))
		kept[name] = true
		merged = nil
		return err
	}
	listed := make(map[ID]bool)
	for _, name := range old {
		packs, err := r.packsOfIndex(ctx, name)
		if err != nil {
			return err
		}
		for _, pack := range packs {
			if dead[pack.Name] || listed[pack.Name] {
				continue
			}
			listed[pack.Name] = true
			if merged = append(merged, pack); len(merged) == indexMerged {
				if err := write(); err != nil {
					return err
				}
			}
		}
	}
	if err := write(); err != nil {
		return err
	}
	for _, name := range old {
		if kept[name] {
			continue
		}
		if err := r.be.Remove(ctx, backend.Handle{Kind: backend.Index, Name: name.String()}); err != nil {
			return err
		}
	}
	return r.sync(ctx)
}

// mergeFrom is how many small index objects there are before they are joined.
const mergeFrom = 32

// indexesToReplace returns the index objects that list dead packs, and all
// small ones if there are many.
func (r *Repository) indexesToReplace(ctx context.Context, dead map[ID]bool) ([]ID, error) {
	if err := r.sync(ctx); err != nil {
		return nil, err
	}
	names, err := r.db.indexNames()
	if err != nil {
		return nil, err
	}
	var replace, small []ID
	for _, name := range names {
		packs, err := r.db.packsOf(name)
		if err != nil {
			return nil, err
		}
		hasDead := false
		for _, pack := range packs {
			hasDead = hasDead || dead[pack]
		}
		switch {
		case hasDead:
			replace = append(replace, name)
		case len(packs) < indexMerged/2:
			small = append(small, name)
		}
	}
	if len(small) >= mergeFrom {
		replace = append(replace, small...)
	}
	return replace, nil
}

// packsOfIndex reads an index object, or in place of a damaged one the tables
// of the packs that were entered for it.
func (r *Repository) packsOfIndex(ctx context.Context, name ID) ([]packIndex, error) {
	packs, err := r.loadIndex(ctx, name)
	if !errors.Is(err, ErrDamaged) {
		return packs, err
	}
	ids, err := r.db.packsOf(name)
	if err != nil {
		return nil, err
	}
	packs = nil
	for _, id := range ids {
		info, err := r.be.Stat(ctx, backend.Handle{Kind: backend.Pack, Name: id.String()})
		if errors.Is(err, backend.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		is, chunks, err := parsePack(packReader{ctx, r.be, id}, info.Size)
		if err != nil || is != id {
			return nil, &DamagedError{Object: "pack " + id.String(), Err: errors.Join(err, errPackName)}
		}
		packs = append(packs, packIndex{id, chunks})
	}
	return packs, nil
}
