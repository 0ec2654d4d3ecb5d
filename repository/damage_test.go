package repository

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"dormouse/repository/backend"
)

// objects returns the files of a kind below the repository's directory.
func (r *testRepo) objects(t *testing.T, kind string) []string {
	t.Helper()
	var names []string
	for _, p := range list(t, filepath.Join(r.dir, kind)) {
		full := filepath.Join(r.dir, kind, p)
		if fi, err := os.Stat(full); err == nil && fi.Mode().IsRegular() {
			names = append(names, full)
		}
	}
	return names
}

// twoCheckpoints makes c-1 and c-2, which share no chunk, and returns the objects that c-1 made.
func twoCheckpoints(t *testing.T) (r *testRepo, images string, mine map[string][]string) {
	t.Helper()
	r = newTestRepo(t)
	kinds := []string{"packs", "index", "parts", "manifests"}
	mine = make(map[string][]string)
	for i, id := range []string{"c-1", "c-2"} {
		dir := filepath.Join(t.TempDir(), id)
		m := contiguous(0x10000, 200+i, uint64(i+1))
		maps.Copy(m, contiguous(0x7000_0000, 3, uint64(i+10)))
		m.writeImages(t, dir)
		must(t, os.WriteFile(filepath.Join(dir, "core-1.img"), []byte("core of "+id), 0o600))
		r.checkpoint(t, id, dir, PartOptions{})
		if i == 0 {
			images = dir
			for _, k := range kinds {
				mine[k] = r.objects(t, k)
			}
		}
	}
	return r, images, mine
}

func flip(t *testing.T, file string, at int64) {
	t.Helper()
	p, err := os.ReadFile(file)
	must(t, err)
	if at < 0 {
		at += int64(len(p))
	}
	p[at] ^= 0x10
	must(t, os.WriteFile(file, p, 0o600))
}

func TestDamageIsRefusedByName(t *testing.T) {
	cases := []struct {
		name   string
		kind   string // of the object that is damaged; its id must be in the message
		damage func(t *testing.T, file string)
		harms  bool // whether c-1 can no longer be restored
		found  string
	}{
		{"flipped bit in a pack", "packs", func(t *testing.T, f string) { flip(t, f, 100_000) }, true, "content does not match"},
		{"flipped bit in the first chunk", "packs", func(t *testing.T, f string) { flip(t, f, packHeader) }, true, "content does not match"},
		{"flipped bit in a pack's table", "packs", func(t *testing.T, f string) { flip(t, f, -20) }, false, "does not match its name"},
		{"truncated pack", "packs", func(t *testing.T, f string) { must(t, os.Truncate(f, 50_000)) }, true, "truncated"},
		{"empty pack", "packs", func(t *testing.T, f string) { must(t, os.Truncate(f, 0)) }, true, ""},
		{"missing pack", "packs", func(t *testing.T, f string) { must(t, os.Remove(f)) }, true, ""},
		{"flipped bit in the part", "parts", func(t *testing.T, f string) { flip(t, f, 30) }, true, "does not match its name"},
		{"missing part", "parts", func(t *testing.T, f string) { must(t, os.Remove(f)) }, true, ""},
		{"flipped bit in the manifest", "manifests", func(t *testing.T, f string) { flip(t, f, -30) }, true, "signature"},
		{"flipped bit in the signature", "manifests", func(t *testing.T, f string) { flip(t, f, 50) }, true, "signature"},
		{"truncated manifest", "manifests", func(t *testing.T, f string) { must(t, os.Truncate(f, 20)) }, true, ""},
		{"flipped bit in the index", "index", func(t *testing.T, f string) { flip(t, f, 200) }, false, "packs stand in for it"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			r, images, mine := twoCheckpoints(t)
			object := mine[c.kind][0]
			c.damage(t, object)

			dir, err := r.restore(t, "c-1")
			if c.harms {
				if err == nil {
					t.Fatal("the damaged checkpoint was restored")
				}
				if !strings.Contains(err.Error(), filepath.Base(object)) {
					t.Errorf("the error %q does not name %s", err, filepath.Base(object))
				}
				if _, err := os.Lstat(dir); dir != "" && !os.IsNotExist(err) {
					t.Errorf("a refused restore left %s", dir)
				}
			} else {
				must(t, err)
				wantSameFiles(t, images, dir)
			}
			if _, err := r.restore(t, "c-2"); err != nil {
				t.Errorf("the other checkpoint cannot be restored: %v", err)
			}

			report, err := openTestRepo(t, r).Verify(t.Context(), r.keys, nil, nil)
			must(t, err)
			if report.OK() {
				t.Fatal("Verify found nothing")
			}
			all := ""
			for _, p := range report.Problems {
				all += p.String() + "\n"
			}
			if !strings.Contains(all, filepath.Base(object)) || !strings.Contains(all, c.found) {
				t.Errorf("Verify says\n%swant %s and %q in it", all, filepath.Base(object), c.found)
			}
			// A pack's own table is of the checkpoint too, though it can be restored without.
			concerned := c.harms || c.kind == "packs"
			if told := len(report.Checkpoints["c-1"].Problems) > 0; told != concerned {
				t.Errorf("Verify says it concerns c-1: %v, want %v:\n%s", told, concerned, all)
			}
			if p := report.Checkpoints["c-2"].Problems; len(p) > 0 {
				t.Errorf("Verify says c-2 is harmed: %q", p)
			}
		})
	}
}

func TestVerifyOfAWholeRepositoryReadsEverything(t *testing.T) {
	r, _, _ := twoCheckpoints(t)
	var last int64
	report, err := r.Verify(t.Context(), r.keys, nil, func(done, total int64) { last = done })
	must(t, err)
	if !report.OK() {
		t.Errorf("Verify found %v", report.Problems)
	}
	var size int64
	for _, f := range r.objects(t, "packs") {
		fi, err := os.Stat(f)
		must(t, err)
		size += fi.Size()
	}
	if report.Bytes != size || last != size {
		t.Errorf("read %d bytes and told of %d, want all %d bytes of packs", report.Bytes, last, size)
	}
}

func TestManifestIsRefused(t *testing.T) {
	r := newTestRepo(t)
	dir := filepath.Join(t.TempDir(), "dump")
	contiguous(0, 1, 1).writeImages(t, dir)
	res := r.checkpoint(t, "c-1", dir, PartOptions{})
	other := NewSigner(ed25519.NewKeyFromSeed([]byte(strings.Repeat("x", 32))))
	good, err := encodeManifest(&Manifest{Format: 1, Checkpoint: "c-9", Tasks: []TaskManifest{{Part: res.ID}}}, r.signer)
	must(t, err)
	foreign, err := encodeManifest(&Manifest{Format: 1, Checkpoint: "c-9"}, other)
	must(t, err)
	format2, err := encodeManifest(&Manifest{Format: 2, Checkpoint: "c-9"}, r.signer)
	must(t, err)
	renamed, err := encodeManifest(&Manifest{Format: 1, Checkpoint: "c-8"}, r.signer)
	must(t, err)
	cases := map[string]struct {
		content []byte
		want    error
	}{
		"other key":            {foreign, ErrSignature},
		"other checkpoint":     {renamed, ErrSignature},
		"changed":              {bytes.Replace(good, []byte(`"c-9"`), []byte(`"c-7"`), 1), ErrSignature},
		"appended":             {append(bytes.Clone(good), ' '), ErrSignature},
		"no signature":         {[]byte("dormouse-manifest 1\n{}"), ErrSignature},
		"key of this, sig not": {bytes.Replace(foreign, []byte(keyID(other.Public())), []byte(keyID(r.signer.Public())), 1), ErrSignature},
		"version 2":            {bytes.Replace(good, []byte("manifest 1 "), []byte("manifest 2 "), 1), ErrVersion},
		"format 2":             {format2, ErrVersion},
		"not a manifest":       {[]byte("hello"), ErrDamaged},
		"empty":                {nil, ErrDamaged},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			h := backend.Handle{Kind: backend.Manifest, Name: "c-9"}
			must(t, r.be.Save(t.Context(), h, bytes.NewReader(c.content), int64(len(c.content))))
			defer r.be.Remove(t.Context(), h)
			if m, err := r.LoadManifest(t.Context(), "c-9", r.keys); !errors.Is(err, c.want) || m != nil || !strings.Contains(err.Error(), "c-9") {
				t.Errorf("LoadManifest = %v, %v, want %v that names c-9", m, err, c.want)
			}
		})
	}
	h := backend.Handle{Kind: backend.Manifest, Name: "c-9"}
	unknown := bytes.Replace(good, []byte("\n{"), []byte("\n{\"field_of_a_later_version\": 1,"), 1)
	line, payload, _ := bytes.Cut(unknown, []byte("\n"))
	f := strings.Fields(string(line))
	f[4] = signBase64(t, r.signer, payload)
	unknown = append([]byte(strings.Join(f, " ")+"\n"), payload...)
	must(t, r.be.Save(t.Context(), h, bytes.NewReader(unknown), int64(len(unknown))))
	if _, err := r.LoadManifest(t.Context(), "c-9", r.keys); err != nil {
		t.Errorf("a manifest with an unknown field was refused: %v", err)
	}
}

func TestManifestIsWrittenOnlyOverWholeParts(t *testing.T) {
	r, _, mine := twoCheckpoints(t)
	m, err := r.LoadManifest(t.Context(), "c-1", r.keys)
	must(t, err)
	m.Checkpoint = "c-3"
	must(t, r.PutManifest(t.Context(), m, r.signer))
	if err := r.PutManifest(t.Context(), m, r.signer); !errors.Is(err, backend.ErrExist) {
		t.Errorf("a second manifest of one checkpoint = %v, want ErrExist", err)
	}
	must(t, os.Remove(mine["packs"][0]))
	must(t, os.Remove(mine["index"][0]))
	m.Checkpoint = "c-4"
	if err := openTestRepo(t, r).PutManifest(t.Context(), m, r.signer); !errors.Is(err, ErrDamaged) {
		t.Errorf("a manifest over missing chunks = %v, want ErrDamaged", err)
	}
	m.Tasks[0].Part = ID{}.String()
	if err := r.PutManifest(t.Context(), m, r.signer); !errors.Is(err, ErrDamaged) {
		t.Errorf("a manifest over a missing part = %v, want ErrDamaged", err)
	}
	ids, err := r.ListManifests(t.Context())
	must(t, err)
	slices.Sort(ids)
	if !slices.Equal(ids, []string{"c-1", "c-2", "c-3"}) {
		t.Errorf("manifests are %q", ids)
	}
}

func TestKeepNewestOfEachJobAndLabelled(t *testing.T) {
	at := func(id, job, label string, minute int) *Manifest {
		return &Manifest{Checkpoint: id, Job: job, Label: label, Created: time.Unix(int64(minute)*60, 0)}
	}
	all := []*Manifest{at("a1", "a", "", 1), at("a2", "a", "gold", 2), at("a3", "a", "", 3), at("a4", "a", "", 4), at("a5", "a", "", 4), at("b1", "b", "", 0)}
	for n, want := range map[int]string{0: "a1 a2 a3 a4 a5 b1", 1: "a2 a5 b1", 2: "a2 a4 a5 b1", 3: "a2 a3 a4 a5 b1", 9: "a1 a2 a3 a4 a5 b1"} {
		keep, drop := Keep(all, n)
		var ids []string
		for _, m := range keep {
			ids = append(ids, m.Checkpoint)
		}
		if got := strings.Join(ids, " "); got != want || len(keep)+len(drop) != len(all) {
			t.Errorf("Keep %d = %s (%d dropped), want %s", n, got, len(drop), want)
		}
	}
}
