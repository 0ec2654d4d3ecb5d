package repository

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"dormouse/repository/backend"
)

// Problem is one thing that Verify found.
type Problem struct {
	Object      string   `json:"object"`          // such as "pack 1f0c...", "manifest c-7"
	Chunk       string   `json:"chunk,omitempty"` // id
	Error       string   `json:"error"`
	Checkpoints []string `json:"checkpoints"` // that refer to it
}

func (p Problem) String() string {
	if p.Chunk != "" {
		return fmt.Sprintf("%s: chunk %s: %s", p.Object, p.Chunk, p.Error)
	}
	return p.Object + ": " + p.Error
}

// VerifyReport is what Verify found.
type VerifyReport struct {
	Checkpoints map[string]*CheckpointReport `json:"checkpoints"`
	Bytes       int64                        `json:"bytes"` // read from packs and hashed
	Problems    []Problem                    `json:"problems"`
}

// CheckpointReport is the part of a report that concerns one checkpoint.
type CheckpointReport struct {
	Bytes    int64    `json:"bytes"` // of chunks it refers to, in packs; shared ones count in each
	Problems []string `json:"problems,omitempty"`
}

// OK reports whether no problem was found.
func (r *VerifyReport) OK() bool { return len(r.Problems) == 0 }

// verifier is one run of Verify.
type verifier struct {
	repo     *Repository
	progress func(done, total int64)

	report VerifyReport
	packs  map[ID]int64     // to be read → bytes wanted from it
	bad    map[ID]*badChunk // chunks that are damaged or missing
	tables map[ID]*badChunk // whole chunks of packs whose tables are damaged; one value per pack
	mu     sync.Mutex
}

type badChunk struct {
	object, err string
	used        []string // by checkpoints
}

// Verify reads and hashes everything that the given checkpoints refer to, or
// all checkpoints if none is given, and reports what is damaged by name. It
// returns an error only when it could not look. progress, which may be nil, is
// told the bytes of packs read so far and in all.
//
// It walks the metadata of each checkpoint to find the packs, then reads each
// pack once, compares its table with its name and every chunk with its id, and
// if anything is wrong walks the metadata again to tell whom it concerns. In
// memory it keeps 100 bytes per pack (16 MiB) and what it reports.
func (r *Repository) Verify(ctx context.Context, keys *Verifier, checkpoints []string, progress func(done, total int64)) (*VerifyReport, error) {
	if progress == nil {
		progress = func(int64, int64) {}
	}
	v := &verifier{
		repo: r, progress: progress, packs: make(map[ID]int64), bad: make(map[ID]*badChunk), tables: make(map[ID]*badChunk),
		report: VerifyReport{Checkpoints: make(map[string]*CheckpointReport)},
	}
	if err := v.run(ctx, keys, checkpoints); err != nil {
		return nil, fmt.Errorf("verify: %w", err)
	}
	return &v.report, nil
}

func (v *verifier) run(ctx context.Context, keys *Verifier, checkpoints []string) (err error) {
	if len(checkpoints) == 0 {
		if checkpoints, err = v.repo.ListManifests(ctx); err != nil {
			return err
		}
	}
	slices.Sort(checkpoints)
	if err := v.repo.sync(ctx); err != nil {
		return err
	}
	if err := v.indexes(ctx); err != nil {
		return err
	}
	var readable []*Manifest
	for _, id := range checkpoints {
		v.report.Checkpoints[id] = &CheckpointReport{}
		m, err := v.repo.LoadManifest(ctx, id, keys)
		if err != nil && !refusal(err) {
			return err
		}
		if err != nil {
			v.problem(Problem{Object: "manifest " + id, Error: err.Error(), Checkpoints: []string{id}})
			continue
		}
		readable = append(readable, m)
		if err := v.metadata(ctx, m); err != nil {
			return err
		}
	}
	if err := v.readPacks(ctx); err != nil {
		return err
	}
	return v.attribute(ctx, readable)
}

// refusal reports whether an error is about what is stored, rather than about
// the way to it.
func refusal(err error) bool {
	for _, target := range []error{ErrDamaged, ErrSignature, ErrVersion, backend.ErrNotExist} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

func (v *verifier) problem(p Problem) {
	v.report.Problems = append(v.report.Problems, p)
	for _, id := range p.Checkpoints {
		if c := v.report.Checkpoints[id]; c != nil {
			c.Problems = append(c.Problems, p.String())
		}
	}
}

// indexes checks the index objects. Packs replace what a damaged one says, so
// it concerns no checkpoint.
func (v *verifier) indexes(ctx context.Context) error {
	return v.repo.be.List(ctx, backend.Index, func(info backend.Info) error {
		name, err := ParseID(info.Name)
		if err != nil {
			return nil
		}
		_, err = v.repo.loadIndex(ctx, name)
		if errors.Is(err, ErrDamaged) {
			v.problem(Problem{Object: "index " + info.Name, Error: err.Error() + "; the tables of the packs stand in for it until the next garbage collection replaces it"})
			return nil
		}
		if errors.Is(err, backend.ErrNotExist) {
			return nil
		}
		return err
	})
}

// metadata walks one checkpoint, notes the packs it needs and what is missing.
func (v *verifier) metadata(ctx context.Context, m *Manifest) error {
	report := v.report.Checkpoints[m.Checkpoint]
	for _, t := range m.Tasks {
		seen := make(map[ID]bool)
		err := v.walk(ctx, t.Part, seen, func(id ID) error {
			loc, ok, err := v.repo.db.lookup(id, nil)
			if err != nil {
				return err
			}
			if !ok {
				if v.bad[id] == nil {
					v.bad[id] = &badChunk{object: "the repository", err: "no pack contains it"}
				}
				return nil
			}
			v.packs[loc.Pack] += int64(loc.Stored)
			report.Bytes += int64(loc.Stored)
			return nil
		})
		if err != nil && !refusal(err) {
			return err
		}
		if err != nil {
			v.problem(Problem{Object: fmt.Sprintf("part %s of task %d", t.Part, t.Index), Error: err.Error(), Checkpoints: []string{m.Checkpoint}})
		}
	}
	return nil
}

func (v *verifier) walk(ctx context.Context, part string, seen map[ID]bool, visit func(ID) error) error {
	name, err := ParseID(part)
	if err != nil {
		return &DamagedError{Object: "manifest", Err: err}
	}
	p, err := v.repo.loadPart(ctx, name)
	if err != nil {
		return err
	}
	return v.repo.walkPart(ctx, &p, seen, visit)
}

// readPacks reads and hashes every pack that is needed.
func (v *verifier) readPacks(ctx context.Context) error {
	var done, total int64
	sizes := make(map[ID]int64)
	for pack := range v.packs {
		info, err := v.repo.be.Stat(ctx, backend.Handle{Kind: backend.Pack, Name: pack.String()})
		if err != nil && !errors.Is(err, backend.ErrNotExist) {
			return err
		}
		sizes[pack] = info.Size
		total += info.Size
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(v.repo.workers)
	for pack, size := range sizes {
		g.Go(func() error {
			if err := v.pack(ctx, pack, size); err != nil {
				return err
			}
			v.mu.Lock()
			defer v.mu.Unlock()
			done += size
			v.progress(done, total)
			return nil
		})
	}
	err := g.Wait()
	v.report.Bytes = done
	return err
}

// pack checks one pack: its table against its name, and by the table each chunk.
func (v *verifier) pack(ctx context.Context, pack ID, size int64) error {
	p := make([]byte, min(size, packMaxSize))
	if err := v.repo.readPack(ctx, pack, p, 0); err != nil && !refusal(err) {
		return err
	} else if err != nil {
		p = nil
	}
	name, chunks, err := parsePack(bytes.NewReader(p), size)
	whole := err == nil && name == pack
	if !whole {
		if chunks, err = v.table(ctx, pack); err != nil {
			return err
		}
	}
	buf, broken := make([]byte, 0, maxChunk), 0
	for _, c := range chunks {
		fault := v.chunk(c, p, buf)
		if fault == "" {
			continue
		}
		broken++
		v.mu.Lock()
		v.bad[c.ID] = &badChunk{object: "pack " + pack.String(), err: fault}
		v.mu.Unlock()
	}
	if !whole && broken == 0 {
		v.badTable(pack, chunks)
	}
	return nil
}

// badTable notes that a pack is damaged where no chunk is.
func (v *verifier) badTable(pack ID, chunks []packChunk) {
	bad := &badChunk{object: "pack " + pack.String(), err: errPackName.Error() + ", though every chunk in it is whole"}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, c := range chunks {
		v.tables[c.ID] = bad
	}
}

var errPackName = errors.New("its table does not match its name")

// table lists the chunks of a pack by the index.
func (v *verifier) table(ctx context.Context, pack ID) ([]packChunk, error) {
	names, err := v.repo.db.indexNames()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		ids, err := v.repo.db.packsOf(name)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(ids, pack) {
			continue
		}
		packs, err := v.repo.loadIndex(ctx, name)
		if refusal(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, index := range packs {
			if index.Name == pack {
				return index.Chunks, nil
			}
		}
	}
	return nil, nil
}

// chunk returns what is wrong with a chunk of a pack with the content p.
func (v *verifier) chunk(c packChunk, p, buf []byte) string {
	end := int64(c.Offset) + int64(c.Stored)
	switch {
	case len(p) == 0:
		return "the pack is missing"
	case end > int64(len(p)):
		return "the pack is truncated"
	}
	if _, err := v.repo.codec.decode(c.ID, c.location, p[c.Offset:end], buf); err != nil {
		return err.Error()
	}
	return ""
}

// attribute finds which checkpoints use the damaged chunks.
func (v *verifier) attribute(ctx context.Context, manifests []*Manifest) error {
	if len(v.bad) == 0 && len(v.tables) == 0 {
		return nil
	}
	for _, m := range manifests {
		for _, t := range m.Tasks {
			err := v.walk(ctx, t.Part, make(map[ID]bool), func(id ID) error {
				v.bad[id].usedBy(m.Checkpoint)
				v.tables[id].usedBy(m.Checkpoint)
				return nil
			})
			if err != nil && !refusal(err) {
				return err
			}
		}
	}
	var ids []ID
	for id, bad := range v.bad {
		if len(bad.used) > 0 { // what no checkpoint needs harms nobody
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, compareIDs)
	v.reportTables()
	for _, id := range ids {
		bad := v.bad[id]
		v.problem(Problem{Object: bad.object, Chunk: id.String(), Error: bad.err, Checkpoints: bad.used})
	}
	return nil
}

// usedBy notes a checkpoint that needs the chunk. The nil chunk is whole.
func (c *badChunk) usedBy(checkpoint string) {
	if c != nil && !slices.Contains(c.used, checkpoint) {
		c.used = append(c.used, checkpoint)
	}
}

// reportTables reports each damaged table once.
func (v *verifier) reportTables() {
	seen := make(map[*badChunk]bool)
	for _, bad := range v.tables {
		if !seen[bad] && len(bad.used) > 0 {
			v.problem(Problem{Object: bad.object, Error: bad.err, Checkpoints: bad.used})
		}
		seen[bad] = true
	}
}
