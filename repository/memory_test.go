package repository

import (
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"testing"
)

// What an upload and a restore hold in memory is bounded by the number of
// workers, and does not grow with the job.
func TestMemoryDoesNotGrowWithTheJob(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(5)) // so that garbage does not count
	peaks := func(mib int) (upload, restore uint64) {
		r := newTestRepo(t)
		dir := benchMemory(t, mib, false)
		var peak uint64
		var mu sync.Mutex
		sample := func(int64) {
			mu.Lock()
			defer mu.Unlock()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			peak = max(peak, m.HeapAlloc)
		}
		runtime.GC()
		cache := filepath.Join(t.TempDir(), "cache")
		r.checkpoint(t, "c-1", dir, PartOptions{Progress: sample, PageCache: cache})
		res := r.checkpoint(t, "c-2", dir, PartOptions{Progress: sample, PageCache: cache})
		upload, peak = peak, 0
		runtime.GC()
		p, err := r.OpenPart(t.Context(), res.ID)
		must(t, err)
		must(t, p.RestoreImages(t.Context(), filepath.Join(dir, "restored"), RestoreOptions{Progress: sample}))
		return upload, peak
	}
	smallUpload, smallRestore := peaks(64)
	bigUpload, bigRestore := peaks(320)
	t.Logf("upload: %d MiB for 64 MiB, %d MiB for 320 MiB; restore: %d MiB and %d MiB", smallUpload>>20, bigUpload>>20, smallRestore>>20, bigRestore>>20)
	const slack = 12 << 20
	if bigUpload > smallUpload+slack || bigRestore > smallRestore+slack {
		t.Error("memory grows with the job")
	}
	workers := uint64(runtime.GOMAXPROCS(0))
	if limit := (68<<20 + workers*(17<<20/2) + slack) * 11 / 10; bigUpload > limit {
		t.Errorf("an upload holds %d MiB, want at most %d MiB", bigUpload>>20, limit>>20)
	}
	if limit := workers*(43<<20/10) + slack; bigRestore > limit {
		t.Errorf("a restore holds %d MiB, want at most %d MiB", bigRestore>>20, limit>>20)
	}
}
