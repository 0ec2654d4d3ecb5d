package repository

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// benchMemory writes images of n MiB to a memory file system: incompressible,
// or half of it zero.
func benchMemory(b testing.TB, mib int, halfZero bool) string {
	b.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "dormouse-bench-")
	must(b, err)
	b.Cleanup(func() { os.RemoveAll(dir) })
	pages := mib << 20 / pageSize
	f, err := os.Create(filepath.Join(dir, "pages-1.img"))
	must(b, err)
	defer f.Close()
	rnd := rand.NewChaCha8([32]byte{1})
	buf := make([]byte, 1<<20)
	for i := range mib {
		if !halfZero || i%2 == 0 {
			rnd.Read(buf)
		} else {
			clear(buf)
		}
		_, err := f.Write(buf)
		must(b, err)
	}
	image := encodePagemap(1, []pageRange{{0x7f00_0000_0000, uint64(pages)}}, true)
	must(b, os.WriteFile(filepath.Join(dir, "pagemap-1.img"), image, 0o600))
	return dir
}

// scatter overwrites a share of a pages image, page by page.
func scatter(b *testing.B, dir string, share float64, seed uint64) (changed int64) {
	b.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "pages-1.img"), os.O_RDWR, 0)
	must(b, err)
	defer f.Close()
	fi, err := f.Stat()
	must(b, err)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for off := int64(0); off < fi.Size(); off += pageSize {
		if rnd.Float64() < share {
			_, err := f.WriteAt(randomPage(rnd.Uint64()), off)
			must(b, err)
			changed += pageSize
		}
	}
	return changed
}

var benchSizes = []int{64, 1024}

func BenchmarkUpload(b *testing.B) {
	for _, mib := range benchSizes {
		for _, half := range []bool{false, true} {
			b.Run(fmt.Sprintf("%dMiB/halfZero=%v", mib, half), func(b *testing.B) {
				dir := benchMemory(b, mib, half)
				b.SetBytes(int64(mib) << 20)
				for b.Loop() {
					b.StopTimer()
					r := newTestRepo(b)
					b.StartTimer()
					r.checkpoint(b, "c-1", dir, PartOptions{PageCache: filepath.Join(b.TempDir(), "cache")})
					b.StopTimer()
					os.RemoveAll(r.dir) // or the next one would pay for memory never used before
					b.StartTimer()
				}
			})
		}
	}
}

// The second checkpoint after one percent of the pages changed.
func BenchmarkIncremental(b *testing.B) {
	for _, mib := range benchSizes {
		b.Run(fmt.Sprintf("%dMiB", mib), func(b *testing.B) {
			dir, cache := benchMemory(b, mib, false), filepath.Join(b.TempDir(), "cache")
			r := newTestRepo(b)
			r.checkpoint(b, "c-0", dir, PartOptions{PageCache: cache})
			b.SetBytes(int64(mib) << 20)
			var changed, added int64
			for i := uint64(1); b.Loop(); i++ {
				b.StopTimer()
				changed += scatter(b, dir, 0.01, i)
				b.StartTimer()
				added += r.checkpoint(b, fmt.Sprint("c-", i), dir, PartOptions{PageCache: cache}).NewBytes
			}
			b.ReportMetric(float64(added)/float64(changed), "new/changed")
		})
	}
}

func BenchmarkRestore(b *testing.B) {
	for _, mib := range benchSizes {
		for _, half := range []bool{false, true} {
			b.Run(fmt.Sprintf("%dMiB/halfZero=%v", mib, half), func(b *testing.B) {
				r := newTestRepo(b)
				res := r.checkpoint(b, "c-1", benchMemory(b, mib, half), PartOptions{})
				b.SetBytes(int64(mib) << 20)
				for b.Loop() {
					p, err := r.OpenPart(b.Context(), res.ID)
					must(b, err)
					dir, err := os.MkdirTemp("/dev/shm", "dormouse-bench-")
					must(b, err)
					must(b, p.RestoreImages(b.Context(), dir, RestoreOptions{}))
					b.StopTimer()
					os.RemoveAll(dir)
					b.StartTimer()
				}
			})
		}
	}
}
