package repository

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"pgregory.net/rapid"
)

// Any history of memory, with or without a page cache that may be lost or
// damaged between checkpoints, comes back byte for byte, every checkpoint of it.
func TestAnyMemoryComesBack(t *testing.T) {
	r := newTestRepo(t)
	rapid.Check(t, func(rt *rapid.T) {
		base, err := os.MkdirTemp(t.TempDir(), "")
		must(t, err)
		cache := filepath.Join(base, "cache")
		m := make(memory)
		for step := range rapid.IntRange(1, 6).Draw(rt, "checkpoints") {
			mutate(rt, m)
			dir := filepath.Join(base, fmt.Sprint("dump", step))
			m.writeImages(t, dir)
			switch rapid.SampledFrom([]string{"keep", "keep", "keep", "lose", "damage"}).Draw(rt, "cache") {
			case "lose":
				os.Remove(cache)
			case "damage":
				if p, err := os.ReadFile(cache); err == nil {
					p[rapid.IntRange(0, len(p)-1).Draw(rt, "at")] ^= 1
					must(t, os.WriteFile(cache, p, 0o600))
				}
			}
			id := fmt.Sprintf("c-%s-%d", filepath.Base(base), step)
			r.checkpoint(t, id, dir, PartOptions{PageCache: cache})
			got, err := r.restoreHere(t, id)
			must(t, err)
			wantSameFiles(t, dir, got)
		}
	})
}

// mutate maps, unmaps and writes ranges of pages.
func mutate(rt *rapid.T, m memory) {
	m[rapid.Uint64Range(0, 50).Draw(rt, "first")] = randomPage(1)
	for range rapid.IntRange(0, 8).Draw(rt, "changes") {
		at := rapid.SampledFrom([]uint64{0, 16, 100, 1 << 14, 1<<14 + 5, 0x7ffff0000}).Draw(rt, "near") + rapid.Uint64Range(0, 40).Draw(rt, "offset")
		n := rapid.Uint64Range(1, 60).Draw(rt, "pages")
		kind := rapid.SampledFrom([]string{"random", "random", "same", "zero", "unmap", "one"}).Draw(rt, "kind")
		for p := at; p < at+n; p++ {
			switch kind {
			case "random":
				m[p] = randomPage(rapid.Uint64Range(0, 1<<40).Draw(rt, "seed"))
			case "same":
				m[p] = randomPage(42)
			case "zero":
				m[p] = make([]byte, pageSize)
			case "unmap":
				delete(m, p)
			case "one":
				page := bytes.Clone(m[p])
				if page == nil {
					page = make([]byte, pageSize)
				}
				page[p%pageSize] ^= 0xff
				m[p] = page
			}
		}
	}
	if len(m) == 0 {
		maps.Copy(m, contiguous(0x1000, 1, 9))
	}
}

// Any file content comes back, whatever its size and holes.
func TestAnyFileComesBack(t *testing.T) {
	r := newTestRepo(t)
	rapid.Check(t, func(rt *rapid.T) {
		src, err := os.MkdirTemp(t.TempDir(), "")
		must(t, err)
		for i := range rapid.IntRange(1, 3).Draw(rt, "files") {
			f, err := os.Create(filepath.Join(src, fmt.Sprint("f", i)))
			must(t, err)
			size := rapid.OneOf(rapid.Int64Range(0, 5000), rapid.Int64Range(0, 200_000), rapid.Int64Range(batchSize-10, 3*batchSize)).Draw(rt, "size")
			for range rapid.IntRange(0, 4).Draw(rt, "writes") {
				if size == 0 {
					break
				}
				p := randomPage(rapid.Uint64().Draw(rt, "seed"))
				p = bytes.Repeat(p, rapid.IntRange(1, 20).Draw(rt, "pages"))
				at := rapid.Int64Range(0, size-1).Draw(rt, "at")
				_, err := f.WriteAt(p[:min(int64(len(p)), size-at)], at)
				must(t, err)
			}
			must(t, f.Truncate(size))
			must(t, f.Close())
		}
		res, w := r.upload(t, "", PartOptions{}, map[string]string{"upper": src})
		must(t, w.Close())
		p, err := r.OpenPart(t.Context(), res.ID)
		must(t, err)
		dest := src + "-restored"
		must(t, p.RestoreTree(t.Context(), "upper", dest, RestoreOptions{KeepOwner: os.Geteuid() != 0}))
		wantSameFiles(t, src, dest)
	})
}
