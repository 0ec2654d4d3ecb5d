package repository

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"dormouse/repository/backend"
)

func signBase64(t *testing.T, s Signer, payload []byte) string {
	t.Helper()
	sig, err := s.Sign(signedMessage(payload))
	must(t, err)
	return base64.StdEncoding.EncodeToString(sig)
}

// gc collects with no grace, on a machine of its own.
func (r *testRepo) gc(t *testing.T) GCStats {
	t.Helper()
	stats, err := openTestRepo(t, r).GC(t.Context(), GCOptions{Verifier: r.keys, Grace: -1})
	must(t, err)
	return stats
}

func images(t *testing.T, pages int, seed uint64) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "dump")
	contiguous(0x10000+seed<<24, pages, seed).writeImages(t, dir)
	return dir
}

func (r *testRepo) wantRestorable(t *testing.T, id, images string) {
	t.Helper()
	got, err := r.restore(t, id)
	if err != nil {
		t.Fatalf("checkpoint %s can no longer be restored: %v", id, err)
	}
	wantSameFiles(t, images, got)
}

func TestGCFreesWhatOnlyRemovedCheckpointsNeeded(t *testing.T) {
	r := newTestRepo(t)
	a, b := images(t, 500, 1), images(t, 500, 2)
	r.checkpoint(t, "c-1", a, PartOptions{})
	r.checkpoint(t, "c-2", b, PartOptions{})
	if s := r.gc(t); s.RemovedPacks != 0 || s.RemovedParts != 0 {
		t.Errorf("with all checkpoints there GC removed %+v", s)
	}
	must(t, r.RemoveManifest(t.Context(), "c-1"))
	s := r.gc(t)
	if s.RemovedPacks == 0 || s.RemovedBytes < 500*pageSize || s.RemovedParts != 1 {
		t.Errorf("GC removed %+v, want what c-1 needed", s)
	}
	r.wantRestorable(t, "c-2", b)
	must(t, r.RemoveManifest(t.Context(), "c-2"))
	r.gc(t)
	for _, kind := range []string{"packs", "index", "parts", "manifests", "locks", "tmp"} {
		if left := r.objects(t, kind); len(left) > 0 {
			t.Errorf("with no checkpoint left there is still %q", left)
		}
	}
	r.checkpoint(t, "c-3", a, PartOptions{})
	r.wantRestorable(t, "c-3", a)
}

func TestGCKeepsSharedChunks(t *testing.T) {
	r := newTestRepo(t)
	a := images(t, 500, 1)
	r.checkpoint(t, "c-1", a, PartOptions{})
	r.checkpoint(t, "c-2", a, PartOptions{})
	must(t, r.RemoveManifest(t.Context(), "c-1"))
	r.gc(t)
	r.wantRestorable(t, "c-2", a)
}

func TestGCKeepsYoungPartsForTheirManifest(t *testing.T) {
	r := newTestRepo(t)
	a := images(t, 100, 1)
	res, w := r.upload(t, a, PartOptions{}, nil)
	must(t, w.Close())
	stats, err := r.GC(t.Context(), GCOptions{Verifier: r.keys}) // grace of an hour
	must(t, err)
	if stats.RemovedPacks+stats.CondemnedPacks != 0 {
		t.Errorf("GC with grace removed %+v", stats)
	}
	must(t, r.PutManifest(t.Context(), &Manifest{Checkpoint: "c-1", Tasks: []TaskManifest{{Part: res.ID}}}, r.signer))
	r.wantRestorable(t, "c-1", a)
}

// Each step of an upload, with a collection between any two of them.
func TestGCBetweenTheStepsOfAnUpload(t *testing.T) {
	r := newTestRepo(t)
	a, b := images(t, 500, 1), images(t, 500, 2)
	r.checkpoint(t, "c-1", a, PartOptions{})
	must(t, r.RemoveManifest(t.Context(), "c-1")) // all chunks of a are garbage now

	w, err := r.NewPart(t.Context(), PartOptions{Holder: "the upload"})
	must(t, err)
	s := r.gc(t)
	if s.RemovedPacks != 0 || s.CondemnedPacks == 0 || len(s.WaitingFor) == 0 || s.WaitingFor[0] != "the upload" {
		t.Errorf("beside an upload that may refer to garbage GC did %+v, want it to wait for \"the upload\"", s)
	}
	must(t, w.AddImages(t.Context(), a)) // refers to condemned chunks
	r.gc(t)
	src := t.TempDir()
	must(t, os.WriteFile(filepath.Join(src, "f"), []byte("file"), 0o600))
	must(t, w.AddTree(t.Context(), "upper", Walk(src)))
	r.gc(t)
	res, err := w.Commit(t.Context())
	must(t, err)
	if res.NewBytes > 64<<10 {
		t.Errorf("the upload stored %d bytes, want it to use what was there", res.NewBytes)
	}
	r.gc(t)
	must(t, r.PutManifest(t.Context(), &Manifest{Checkpoint: "c-2", Tasks: []TaskManifest{{Part: res.ID}}}, r.signer))
	r.gc(t)
	must(t, w.Close())
	if s := r.gc(t); s.CondemnedPacks != 0 {
		t.Errorf("after the upload GC still waits: %+v", s)
	}
	r.wantRestorable(t, "c-2", a)
	r.checkpoint(t, "c-3", b, PartOptions{})
	r.wantRestorable(t, "c-3", b)
}

// An upload that begins after a list was written stores again what it condemns.
func TestUploadAvoidsCondemnedChunks(t *testing.T) {
	r := newTestRepo(t)
	a := images(t, 500, 1)
	r.checkpoint(t, "c-1", a, PartOptions{})
	must(t, r.RemoveManifest(t.Context(), "c-1"))
	blocker, err := r.NewPart(t.Context(), PartOptions{Holder: "blocker"})
	must(t, err)
	r.gc(t)

	second := openTestRepo(t, r)
	res, w := second.upload(t, a, PartOptions{}, nil)
	if res.NewBytes < 500*pageSize {
		t.Errorf("the upload stored %d bytes, want everything anew", res.NewBytes)
	}
	must(t, blocker.Close())
	if s := r.gc(t); s.RemovedPacks == 0 {
		t.Errorf("GC = %+v, want the condemned packs removed beside an upload that avoids them", s)
	}
	must(t, second.PutManifest(t.Context(), &Manifest{Checkpoint: "c-2", Tasks: []TaskManifest{{Part: res.ID}}}, r.signer))
	must(t, w.Close())
	r.gc(t)
	r.wantRestorable(t, "c-2", a)
}

func TestPartThatExpiredIsRefused(t *testing.T) {
	r := newTestRepo(t)
	res, w := r.upload(t, images(t, 100, 1), PartOptions{}, nil)
	must(t, w.Close())
	blocker, err := r.NewPart(t.Context(), PartOptions{})
	must(t, err)
	r.gc(t) // condemns the part
	m := &Manifest{Checkpoint: "c-1", Tasks: []TaskManifest{{Part: res.ID}}}
	if err := r.PutManifest(t.Context(), m, r.signer); !errors.Is(err, ErrPartExpired) {
		t.Errorf("a manifest over a condemned part = %v, want ErrPartExpired", err)
	}
	must(t, blocker.Close())
	r.gc(t) // removes it
	if err := r.PutManifest(t.Context(), m, r.signer); !errors.Is(err, ErrDamaged) {
		t.Errorf("a manifest over a removed part = %v, want ErrDamaged", err)
	}
}

func TestLeaseOfADeadUploadRunsOut(t *testing.T) {
	r := newTestRepo(t)
	_, w := r.upload(t, images(t, 100, 1), PartOptions{}, nil)
	w.lease.stop() // as if the process had died: nobody renews or removes the lease
	if s := r.gc(t); s.RemovedParts != 0 || s.CondemnedPacks != 0 {
		t.Errorf("GC touched the part of a lease that is alive: %+v", s)
	}
	old := time.Now().Add(-2 * time.Hour)
	for _, f := range r.objects(t, "locks") {
		must(t, os.Chtimes(f, old, old))
	}
	if s := r.gc(t); s.RemovedParts != 1 || s.RemovedPacks == 0 {
		t.Errorf("after the lease ran out GC did %+v, want the part of the dead upload removed", s)
	}
	if left := r.objects(t, "locks"); len(left) > 0 {
		t.Errorf("lock objects %q are left", left)
	}
}

func TestUploadThatLostItsLeaseFails(t *testing.T) {
	r := newTestRepo(t)
	w, err := r.NewPart(t.Context(), PartOptions{})
	must(t, err)
	defer w.Close()
	w.lease.mu.Lock()
	w.lease.renewed = time.Now().Add(-time.Hour) // as after an hour of sleep
	w.lease.mu.Unlock()
	must(t, w.AddImages(t.Context(), images(t, 10, 1)))
	if _, err := w.Commit(t.Context()); !errors.Is(err, ErrLeaseLost) {
		t.Errorf("Commit without a lease = %v, want ErrLeaseLost", err)
	}
}

func TestTwoCollectionsDoNotRunAtOnce(t *testing.T) {
	r := newTestRepo(t)
	l, err := r.newLease(t.Context(), collectorPrefix, "another collection")
	must(t, err)
	defer l.release()
	if _, err := r.GC(t.Context(), GCOptions{Verifier: r.keys}); !errors.Is(err, ErrBusy) {
		t.Errorf("GC beside another = %v, want ErrBusy", err)
	}
}

func TestGCDeletesNothingBesideADamagedCheckpoint(t *testing.T) {
	r, _, mine := twoCheckpoints(t)
	must(t, r.RemoveManifest(t.Context(), "c-2"))
	flip(t, mine["parts"][0], 30)
	before := len(r.objects(t, "packs"))
	_, err := openTestRepo(t, r).GC(t.Context(), GCOptions{Verifier: r.keys, Grace: -1})
	if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "c-1") {
		t.Errorf("GC = %v, want a refusal that names c-1", err)
	}
	if after := len(r.objects(t, "packs")); after != before {
		t.Errorf("%d packs of %d are left", after, before)
	}
	must(t, r.RemoveManifest(t.Context(), "c-1"))
	r.gc(t)
	if left := r.objects(t, "packs"); len(left) > 0 {
		t.Errorf("after the damaged checkpoint was removed there is still %q", left)
	}
}

func TestGCReplacesADamagedIndex(t *testing.T) {
	r, images, mine := twoCheckpoints(t)
	flip(t, mine["index"][0], 200)
	must(t, r.RemoveManifest(t.Context(), "c-2"))
	r.gc(t)
	r.wantRestorable(t, "c-1", images)
	r.checkpoint(t, "c-3", images, PartOptions{})
	must(t, r.RemoveManifest(t.Context(), "c-1"))
	r.gc(t)
	r.wantRestorable(t, "c-3", images)
}

// cutBackend fails every Save of a pack or part after that of the first index.
type cutBackend struct {
	backend.Backend
	cut atomic.Bool
}

var errCut = errors.New("the connection was cut")

func (b *cutBackend) Save(ctx context.Context, h backend.Handle, rd io.Reader, size int64) error {
	if b.cut.Load() && (h.Kind == backend.Pack || h.Kind == backend.Part) {
		return errCut
	}
	err := b.Backend.Save(ctx, h, rd, size)
	if err == nil && h.Kind == backend.Index {
		b.cut.Store(true)
	}
	return err
}

func TestInterruptedUploadResumes(t *testing.T) {
	const pages = 64 << 20 / pageSize * 2 // 128 MiB: 9 packs
	r := newTestRepo(t)
	dir := images(t, pages, 1)
	cut := &cutBackend{Backend: r.be}
	first, err := Open(t.Context(), cut, Options{CacheDir: filepath.Join(t.TempDir(), "cache")})
	must(t, err)
	defer first.Close()
	w, err := first.NewPart(t.Context(), PartOptions{})
	must(t, err)
	err = w.AddImages(t.Context(), dir)
	if err == nil {
		_, err = w.Commit(t.Context())
	}
	if !errors.Is(err, errCut) {
		t.Fatalf("the upload = %v, want it cut", err)
	}
	must(t, w.Close())

	res := r.checkpoint(t, "c-1", dir, PartOptions{})
	saved := int64(indexPacks * packTarget)
	if limit := int64(pages*pageSize) - saved + 2<<20; res.NewBytes > limit {
		t.Errorf("the second try stored %d bytes of %d, want at most %d: %d packs were complete and indexed", res.NewBytes, pages*pageSize, limit, indexPacks)
	}
	r.wantRestorable(t, "c-1", dir)
	r.gc(t) // removes the packs that no index lists
	r.wantRestorable(t, "c-1", dir)
}

func TestNoSpaceIsOneSentenceAndLeavesOthersWhole(t *testing.T) {
	r := newTestRepo(t)
	a := images(t, 100, 1)
	r.checkpoint(t, "c-1", a, PartOptions{})
	full, err := Open(t.Context(), fullBackend{r.be}, Options{CacheDir: filepath.Join(t.TempDir(), "cache")})
	must(t, err)
	defer full.Close()
	w, err := full.NewPart(t.Context(), PartOptions{})
	must(t, err)
	err = w.AddImages(t.Context(), images(t, 5000, 2))
	if err == nil {
		_, err = w.Commit(t.Context())
	}
	if !errors.Is(err, backend.ErrNoSpace) || strings.Contains(err.Error(), "\n") {
		t.Errorf("an upload into a full repository = %v, want ErrNoSpace in one line", err)
	}
	must(t, w.Close())
	r.wantRestorable(t, "c-1", a)
}

type fullBackend struct{ backend.Backend }

func (b fullBackend) Save(ctx context.Context, h backend.Handle, rd io.Reader, size int64) error {
	if h.Kind == backend.Pack {
		return fmt.Errorf("no space left in the repository directory /x: %w", backend.ErrNoSpace)
	}
	return b.Backend.Save(ctx, h, rd, size)
}

// Uploads, removals and collections at once: what has a manifest can be
// restored, always.
func TestGCStress(t *testing.T) {
	r := newTestRepo(t)
	dirs := make([]string, 6)
	for i := range dirs {
		dirs[i] = filepath.Join(t.TempDir(), fmt.Sprint(i))
		m := contiguous(0x10000, 150, uint64(i/2)) // pairs share most chunks
		for n, p := range contiguous(0x9000_0000+uint64(i)<<24, 40, uint64(i)+100) {
			m[n] = p
		}
		m.writeImages(t, dirs[i])
	}
	done := make(chan struct{})
	var uploads, collections sync.WaitGroup
	for worker := range 3 {
		repo := openTestRepo(t, r)
		rnd := rand.New(rand.NewPCG(uint64(worker), 7))
		uploads.Go(func() {
			for i := range 12 {
				which := rnd.IntN(len(dirs))
				id := fmt.Sprintf("c-%d-%d", worker, i)
				if err := stressCheckpoint(t, repo, id, dirs[which]); err != nil {
					t.Errorf("checkpoint %s: %v", id, err)
					return
				}
				dir, err := repo.restoreHere(t, id)
				if err != nil {
					t.Errorf("restore of %s: %v", id, err)
					return
				}
				wantSameFiles(t, dirs[which], dir)
				if err := repo.RemoveManifest(t.Context(), id); err != nil {
					t.Error(err)
				}
			}
		})
	}
	collector := openTestRepo(t, r)
	removed := 0
	collections.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			s, err := collector.GC(t.Context(), GCOptions{Verifier: r.keys, Grace: -1})
			if err != nil {
				t.Errorf("GC: %v", err)
				return
			}
			removed += s.RemovedPacks
		}
	})
	uploads.Wait()
	close(done)
	collections.Wait()
	r.gc(t)
	t.Logf("%d packs were removed beside 36 uploads", removed)
	if left := r.objects(t, "packs"); len(left) > 0 {
		t.Errorf("%d packs are left though no checkpoint is", len(left))
	}
}

func stressCheckpoint(t *testing.T, r *testRepo, id, dir string) error {
	w, err := r.NewPart(t.Context(), PartOptions{Holder: id})
	if err != nil {
		return err
	}
	defer w.Close()
	if err := w.AddImages(t.Context(), dir); err != nil {
		return err
	}
	res, err := w.Commit(t.Context())
	if err != nil {
		return err
	}
	return r.PutManifest(t.Context(), &Manifest{Checkpoint: id, Job: "j", Tasks: []TaskManifest{{Part: res.ID}}}, r.signer)
}

func (r *testRepo) restoreHere(t *testing.T, id string) (string, error) {
	m, err := r.LoadManifest(t.Context(), id, r.keys)
	if err != nil {
		return "", err
	}
	p, err := r.OpenPart(t.Context(), m.Tasks[0].Part)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(t.TempDir(), "images")
	return dir, p.RestoreImages(t.Context(), dir, RestoreOptions{})
}

func TestGCRepacksPacksThatAreMostlyGarbage(t *testing.T) {
	r := newTestRepo(t)
	big, dir := contiguous(0x10000, 6000, 1), filepath.Join(t.TempDir(), "a") // two packs
	big.writeImages(t, dir)
	r.checkpoint(t, "c-1", dir, PartOptions{})
	few, kept := make(memory), filepath.Join(t.TempDir(), "b")
	for n := range uint64(1600) { // whole windows, so that chunks are shared
		few[0x10+n] = big[0x10+n]
	}
	few.writeImages(t, kept)
	r.checkpoint(t, "c-2", kept, PartOptions{})
	must(t, r.RemoveManifest(t.Context(), "c-1"))
	s := r.gc(t)
	if s.RepackedBytes == 0 || s.RemovedPacks == 0 {
		t.Errorf("GC = %+v, want it to repack", s)
	}
	var size int64
	for _, f := range r.objects(t, "packs") {
		fi, err := os.Stat(f)
		must(t, err)
		size += fi.Size()
	}
	if size > 1600*pageSize*3/2 {
		t.Errorf("%d bytes of packs are left for %d bytes of memory", size, 1600*pageSize)
	}
	r.wantRestorable(t, "c-2", kept)
	if s := r.gc(t); s.RepackedBytes != 0 || s.CondemnedPacks != 0 {
		t.Errorf("a second GC did %+v, want nothing", s)
	}
}

func TestGCJoinsManySmallPacks(t *testing.T) {
	r := newTestRepo(t)
	dirs := make(map[string]string)
	for i := range 40 {
		id := fmt.Sprint("c-", i)
		dirs[id] = images(t, 20, uint64(i)+1)
		r.checkpoint(t, id, dirs[id], PartOptions{})
	}
	r.gc(t)
	if packs, indexes := len(r.objects(t, "packs")), len(r.objects(t, "index")); packs > 3 || indexes > 3 {
		t.Errorf("after GC there are %d packs and %d index objects, want them joined", packs, indexes)
	}
	for id, dir := range dirs {
		r.wantRestorable(t, id, dir)
	}
}

func TestGCFreesARemovedCheckpointAtOnce(t *testing.T) {
	r := newTestRepo(t)
	r.checkpoint(t, "c-1", images(t, 500, 1), PartOptions{})
	must(t, r.RemoveManifest(t.Context(), "c-1"))
	stats, err := r.GC(t.Context(), GCOptions{Verifier: r.keys})
	must(t, err)
	if stats.RemovedPacks == 0 {
		t.Errorf("GC = %+v, want its part and packs removed though they are young", stats)
	}
	if left := r.objects(t, "locks"); len(left) > 0 {
		t.Errorf("lock objects %q are left", left)
	}
}

// mergedMeanwhile is a backend whose first list of index objects takes so long that
// they are merged within it: what was there at its beginning is not there any more
// when it comes to it, and what is new has its place before.
type mergedMeanwhile struct {
	backend.Backend
	merge func()
}

func (b *mergedMeanwhile) List(ctx context.Context, kind backend.Kind, fn func(backend.Info) error) error {
	if kind != backend.Index || b.merge == nil {
		return b.Backend.List(ctx, kind, fn)
	}
	before := make(map[string]bool)
	if err := b.Backend.List(ctx, kind, func(info backend.Info) error { before[info.Name] = true; return nil }); err != nil {
		return err
	}
	b.merge()
	b.merge = nil
	return b.Backend.List(ctx, kind, func(info backend.Info) error {
		if !before[info.Name] {
			return nil
		}
		return fn(info)
	})
}

func TestAChunkIsFoundWhereIndexesAreMergedWhileTheyAreListed(t *testing.T) {
	r := newTestRepo(t)
	dir := images(t, 50, 1)
	slow := &mergedMeanwhile{Backend: r.be}
	reader, err := Open(t.Context(), slow, Options{CacheDir: filepath.Join(t.TempDir(), "cache")})
	must(t, err)
	defer reader.Close()
	res := r.checkpoint(t, "c-1", dir, PartOptions{})
	slow.merge = func() {
		for i := range mergeFrom { // of which each makes an index object
			r.checkpoint(t, fmt.Sprint("c-more-", i), images(t, 2, uint64(100+i)), PartOptions{})
		}
		must(t, r.dropFromIndex(t.Context(), nil))
	}
	p, err := reader.OpenPart(t.Context(), res.ID)
	must(t, err)
	dest := filepath.Join(t.TempDir(), "dest")
	must(t, p.RestoreImages(t.Context(), dest, RestoreOptions{}))
	wantSameFiles(t, dir, dest)
	if slow.merge != nil {
		t.Error("nothing was merged while the index was listed")
	}
}
