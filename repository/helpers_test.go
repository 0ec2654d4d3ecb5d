package repository

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"dormouse/repository/backend"
	"dormouse/repository/backend/local"
)

// testRepo is a repository in a directory, with a key.
type testRepo struct {
	*Repository
	dir    string
	be     backend.Backend
	signer Signer
	keys   *Verifier
}

func newTestRepo(t testing.TB) *testRepo {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "repo")
	be, err := local.Open(dir)
	must(t, err)
	must(t, Init(t.Context(), be))
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	return openTestRepo(t, &testRepo{dir: dir, be: be, signer: NewSigner(key), keys: NewVerifier(key.Public().(ed25519.PublicKey))})
}

// openTestRepo opens the repository as another machine would.
func openTestRepo(t testing.TB, r *testRepo) *testRepo {
	t.Helper()
	repo, err := Open(t.Context(), r.be, Options{CacheDir: filepath.Join(t.TempDir(), "cache")})
	must(t, err)
	t.Cleanup(func() { repo.Close() })
	other := *r
	other.Repository = repo
	return &other
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// memory is the address space of a task: page number → content.
type memory map[uint64][]byte

// writeImages writes a directory of CRIU images with the memory of process 1
// and a few small images.
func (m memory) writeImages(t testing.TB, dir string) {
	t.Helper()
	must(t, os.MkdirAll(dir, 0o700))
	numbers := slices.Sorted(maps.Keys(m))
	pages, err := os.Create(filepath.Join(dir, "pages-1.img"))
	must(t, err)
	defer pages.Close()
	var ranges []pageRange
	for _, n := range numbers {
		_, err := pages.Write(m[n])
		must(t, err)
		if k := len(ranges); k > 0 && ranges[k-1].Address/pageSize+ranges[k-1].Pages == n {
			ranges[k-1].Pages++
			continue
		}
		ranges = append(ranges, pageRange{n * pageSize, 1})
	}
	must(t, os.WriteFile(filepath.Join(dir, "pagemap-1.img"), encodePagemap(1, ranges, true), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "core-1.img"), fmt.Append(nil, "registers ", numbers[0], m[numbers[0]][:8]), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "empty.img"), nil, 0o600))
}

// encodePagemap is a pagemap image; new as CRIU 4.2 writes it.
func encodePagemap(id uint32, ranges []pageRange, new bool) []byte {
	p := binary.LittleEndian.AppendUint32(nil, criuImageMagic)
	p = binary.LittleEndian.AppendUint32(p, criuPagemapMagic)
	message := func(m []byte) {
		p = binary.LittleEndian.AppendUint32(p, uint32(len(m)))
		p = append(p, m...)
	}
	field := func(m []byte, number protowire.Number, v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(m, number, protowire.VarintType), v)
	}
	message(field(nil, 1, uint64(id)))
	for _, r := range ranges {
		m := field(nil, 1, r.Address)
		if new {
			m = field(field(field(m, 2, 0), 4, pagemapPresent), 5, r.Pages)
		} else {
			m = field(m, 2, r.Pages)
		}
		message(m)
	}
	return p
}

// randomPage is a page of bytes that do not compress.
func randomPage(seed uint64) []byte {
	p := make([]byte, pageSize)
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	rand.NewChaCha8(key).Read(p)
	return p
}

// contiguous is n random pages at an address.
func contiguous(address uint64, n int, seed uint64) memory {
	m := make(memory)
	for i := range n {
		m[address/pageSize+uint64(i)] = randomPage(seed*1_000_003 + uint64(i))
	}
	return m
}

// upload stores images (and trees) as one part.
func (r *testRepo) upload(t testing.TB, images string, opts PartOptions, trees map[string]string) (PartResult, *PartWriter) {
	t.Helper()
	w, err := r.NewPart(t.Context(), opts)
	must(t, err)
	t.Cleanup(func() { w.Close() })
	if images != "" {
		must(t, w.AddImages(t.Context(), images))
	}
	for name, dir := range trees {
		must(t, w.AddTree(t.Context(), name, Walk(dir)))
	}
	res, err := w.Commit(t.Context())
	must(t, err)
	return res, w
}

// checkpoint uploads images and makes them durable.
func (r *testRepo) checkpoint(t testing.TB, id, images string, opts PartOptions) PartResult {
	t.Helper()
	res, w := r.upload(t, images, opts, nil)
	m := &Manifest{Checkpoint: id, Job: "j1", Created: time.Now(), Tasks: []TaskManifest{{Part: res.ID}}}
	must(t, r.PutManifest(t.Context(), m, r.signer))
	must(t, w.Close())
	return res
}

// restore restores a checkpoint's images on another machine, or returns the error.
func (r *testRepo) restore(t testing.TB, id string) (string, error) {
	t.Helper()
	other := openTestRepo(t, r)
	m, err := other.LoadManifest(t.Context(), id, r.keys)
	if err != nil {
		return "", err
	}
	p, err := other.OpenPart(t.Context(), m.Tasks[0].Part)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(t.TempDir(), "images")
	return dir, p.RestoreImages(t.Context(), dir, RestoreOptions{})
}

func wantSameFiles(t testing.TB, want, got string) {
	t.Helper()
	a, b := list(t, want), list(t, got)
	if strings.Join(a, "\n") != strings.Join(b, "\n") {
		t.Fatalf("files differ:\nwant %q\ngot  %q", a, b)
	}
	for _, name := range a {
		fi, err := os.Lstat(filepath.Join(want, name))
		must(t, err)
		if !fi.Mode().IsRegular() {
			continue
		}
		p, err := os.ReadFile(filepath.Join(want, name))
		must(t, err)
		q, err := os.ReadFile(filepath.Join(got, name))
		must(t, err)
		if !bytes.Equal(p, q) {
			t.Errorf("%s differs: %s", name, firstDifference(p, q))
		}
	}
}

func firstDifference(p, q []byte) string {
	for i := range min(len(p), len(q)) {
		if p[i] != q[i] {
			return fmt.Sprintf("at byte %d of %d", i, len(p))
		}
	}
	return fmt.Sprintf("%d bytes instead of %d", len(q), len(p))
}

func list(t testing.TB, dir string) []string {
	t.Helper()
	var names []string
	must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(dir, p)
		names = append(names, rel)
		return err
	}))
	return names
}
