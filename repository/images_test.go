package repository

import (
	"bytes"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestImagesComeBackOnAnotherMachine(t *testing.T) {
	r := newTestRepo(t)
	m := contiguous(0x400000, 300, 1)
	maps.Copy(m, contiguous(0x7fff_0000_3000, 1500, 2))
	for i := range 100 { // zero pages, which CRIU writes too
		m[0x400000/pageSize+uint64(i*3)] = make([]byte, pageSize)
	}
	dir := filepath.Join(t.TempDir(), "dump")
	m.writeImages(t, dir)
	r.checkpoint(t, "c-1", dir, PartOptions{})
	got, err := r.restore(t, "c-1")
	must(t, err)
	wantSameFiles(t, dir, got)
}

// The promise of the design: after one percent of a job's pages changed, the
// next checkpoint adds at most 1.5 times what changed plus 1 MiB.
func TestSecondCheckpointStoresOnlyChangedPages(t *testing.T) {
	const pages = 16384 // 64 MiB
	r := newTestRepo(t)
	m := contiguous(0x7f00_0000_0000, pages, 1)
	dir, cache := t.TempDir(), filepath.Join(t.TempDir(), "pages.cache")
	rnd := rand.New(rand.NewPCG(1, 2))
	for i, share := range []float64{1, 0.01, 0.01, 0.10, 0.0, 0.5} {
		changed := 0
		for n := range m {
			if i > 0 && rnd.Float64() < share {
				m[n] = randomPage(rnd.Uint64())
				changed++
			}
		}
		images := filepath.Join(dir, string(rune('a'+i)))
		m.writeImages(t, images)
		id := "c-" + string(rune('a'+i))
		res := r.checkpoint(t, id, images, PartOptions{PageCache: cache})
		bytes := int64(changed * pageSize)
		t.Logf("%s: %d pages changed, %d KiB, %d KiB new, %d KiB stored", id, changed, bytes>>10, res.NewBytes>>10, res.StoredBytes>>10)
		if i > 0 && res.NewBytes > bytes*3/2+1<<20 {
			t.Errorf("%d bytes changed, %d are new, want at most %d", bytes, res.NewBytes, bytes*3/2+1<<20)
		}
		got, err := r.restore(t, id)
		must(t, err)
		wantSameFiles(t, images, got)
	}
}

func TestRestoredTaskContinuesIncrementally(t *testing.T) {
	r := newTestRepo(t)
	m := contiguous(0x7f00_0000_0000, 5000, 1)
	dir := t.TempDir()
	m.writeImages(t, filepath.Join(dir, "one"))
	first := r.checkpoint(t, "c-1", filepath.Join(dir, "one"), PartOptions{})

	other := openTestRepo(t, r)
	p, err := other.OpenPart(t.Context(), first.ID)
	must(t, err)
	restored, cache := filepath.Join(dir, "restored"), filepath.Join(dir, "cache")
	must(t, p.RestoreImages(t.Context(), restored, RestoreOptions{}))
	memory, err := p.OpenMemory(t.Context(), t.TempDir(), isPagesImage)
	must(t, err)
	memory.Begin()
	wantSameMemory(t, memory, restored)
	memory.Stop()
	must(t, memory.SavePageCache(t.Context(), restored, cache))
	must(t, memory.Close())

	for i := range 50 {
		m[0x7f00_0000_0000/pageSize+uint64(i*97)] = randomPage(uint64(i) + 1<<40)
	}
	m.writeImages(t, filepath.Join(dir, "two"))
	second := other.checkpoint(t, "c-2", filepath.Join(dir, "two"), PartOptions{PageCache: cache})
	if limit := int64(50*pageSize*3/2 + 1<<20); second.NewBytes > limit {
		t.Errorf("50 pages changed since the restore and %d bytes are new, want at most %d", second.NewBytes, limit)
	}
	got, err := r.restore(t, "c-2")
	must(t, err)
	wantSameFiles(t, filepath.Join(dir, "two"), got)
}

// TestMemoryIsReadTwiceInParts reads every other stretch, and then the others.
func TestMemoryIsReadTwiceInParts(t *testing.T) {
	r := newTestRepo(t)
	dir := t.TempDir()
	contiguous(0x7f00_0000_0000, 30_000, 1).writeImages(t, dir)
	result := r.checkpoint(t, "c-1", dir, PartOptions{})
	p, err := r.OpenPart(t.Context(), result.ID)
	must(t, err)
	memory, err := p.OpenMemory(t.Context(), t.TempDir(), isPagesImage)
	must(t, err)
	defer memory.Close()
	memory.Begin()
	const step = 3 << 20
	for name, size := range memory.Sizes() {
		want, err := os.ReadFile(filepath.Join(dir, name))
		must(t, err)
		got := make([]byte, size)
		for _, first := range []int64{step, 0} {
			for at := first; at < size; at += 2 * step {
				to := got[at:]
				must(t, memory.Read(name, at, step, func(parts [][]byte) error {
					for _, p := range parts {
						to = to[copy(to, p):]
					}
					return nil
				}))
			}
			memory.Rewind(name)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what was stored", name)
		}
	}
}

func isPagesImage(e Entry) bool { return strings.HasPrefix(e.Path, "pages-") }

// wantSameMemory reads all pages images to their ends, in odd steps.
func wantSameMemory(t *testing.T, m *MemoryReader, dir string) {
	t.Helper()
	for name, size := range m.Sizes() {
		want, err := os.ReadFile(filepath.Join(dir, name))
		must(t, err)
		if int64(len(want)) != size {
			t.Fatalf("%s has %d bytes, expected %d", name, size, len(want))
		}
		var got []byte
		for len(got) < len(want) {
			n := len(got)
			must(t, m.Read(name, int64(n), 300_000, func(parts [][]byte) error {
				for _, p := range parts {
					got = append(got, p...)
				}
				return nil
			}))
			if len(got) == n {
				t.Fatalf("%s ends at %d of %d bytes", name, n, len(want))
			}
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what was stored", name)
		}
	}
}
