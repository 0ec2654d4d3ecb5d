package repository

import (
	"bytes"
	"crypto/ed25519"
	"os"
	"path/filepath"
	"testing"
)

// The fuzz targets cover everything that is read from a repository, from CRIU
// or from a cache: no input may crash, hang, or be accepted half understood.

func FuzzPagemap(f *testing.F) {
	f.Add(encodePagemap(1, []pageRange{{0x1000, 3}, {0x10000, 1}}, true))
	f.Add(encodePagemap(7, []pageRange{{0x7fff_0000_0000, 1 << 20}}, false))
	f.Add([]byte("short"))
	f.Fuzz(func(t *testing.T, p []byte) {
		path := filepath.Join(t.TempDir(), "pagemap-1.img")
		must(t, os.WriteFile(path, p, 0o600))
		_, size, err := pagemapOf(path)
		if err == nil && (size < 0 || size%pageSize != 0) {
			t.Errorf("a pagemap of %d bytes was accepted", size)
		}
	})
}

func FuzzPack(f *testing.F) {
	b := newPackBuilder()
	b.add(hashOf([]byte("a")), []byte("a"), 1, codecRaw)
	b.finish()
	f.Add(bytes.Clone(b.buf))
	f.Fuzz(func(t *testing.T, p []byte) {
		_, chunks, err := parsePack(bytes.NewReader(p), int64(len(p)))
		if err != nil {
			return
		}
		for _, c := range chunks {
			if int(c.Offset)+int(c.Stored) > len(p) {
				t.Errorf("chunk at %d+%d was accepted in a pack of %d bytes", c.Offset, c.Stored, len(p))
			}
		}
	})
}

func FuzzIndex(f *testing.F) {
	f.Add(encodeIndex([]packIndex{{ID{1}, []packChunk{{ID{2}, location{Offset: 24, Stored: 5, Raw: 9, Codec: 1}}}}}))
	f.Fuzz(func(t *testing.T, p []byte) {
		packs, err := parseIndex(p)
		if err == nil && !bytes.Equal(encodeIndex(packs), p) && len(packs) == 0 {
			t.Error("accepted without its content")
		}
	})
}

func FuzzSegment(f *testing.F) {
	s := segment{Chunks: []ID{{1}, {2}}}
	s.add(4096, hole, 0)
	s.add(8192, 0, 0)
	s.add(4096, 1, 4096)
	f.Add(s.encode(), s.length())
	f.Fuzz(func(t *testing.T, p []byte, length int64) {
		s, err := decodeSegment(p, length)
		if err == nil && s.length() != length {
			t.Errorf("a segment of %d bytes was accepted as one of %d", s.length(), length)
		}
	})
}

func FuzzPart(f *testing.F) {
	f.Add([]byte(`{"dormouse_part":1,"trees":[{"name":"images","entries":1,"size":10,"segments":[{"bytes":10,"inline":"AAA="}]}]}`))
	f.Fuzz(func(t *testing.T, p []byte) { parsePart(p) })
}

// A tree's list of entries, as restores read it.
func FuzzEntries(f *testing.F) {
	f.Add([]byte(`{"path":".","type":"dir","mode":493}` + "\n" + `{"path":"a","type":"symlink","target":"b"}` + "\n"))
	f.Add([]byte(`{"path":".","type":"dir"}` + "\n" + `{"path":{"base64":"/w=="},"type":"file","xattrs":[{"name":"user.a","value":"AA=="}]}` + "\n"))
	f.Fuzz(func(t *testing.T, lines []byte) {
		if len(lines) == 0 || len(lines) > maxChunk {
			return
		}
		r := newTestRepo(t)
		id := craftLines(t, r, lines)
		p, err := r.OpenPart(t.Context(), id)
		must(t, err)
		outer := t.TempDir()
		err = p.RestoreTree(t.Context(), "upper", filepath.Join(outer, "dest"), RestoreOptions{KeepOwner: true})
		names, _ := os.ReadDir(outer)
		if len(names) > 1 || err != nil && len(names) > 0 {
			t.Errorf("after %v there is %v beside the destination", err, names)
		}
	})
}

// craftLines stores a part whose tree has exactly these lines.
func craftLines(t *testing.T, r *testRepo, lines []byte) string {
	t.Helper()
	w, err := r.NewPart(t.Context(), PartOptions{})
	must(t, err)
	defer w.Close()
	tree := newTreeWriter(w)
	tree.lines = lines
	must(t, tree.finish())
	w.part.Trees = append(w.part.Trees, treeRoot{Name: "upper", Size: tree.size, Segments: tree.stream.refs})
	res, err := w.Commit(t.Context())
	must(t, err)
	return res.ID
}

func FuzzManifest(f *testing.F) {
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	good, err := encodeManifest(&Manifest{Format: 1, Checkpoint: "c-1"}, NewSigner(key))
	must(f, err)
	f.Add(good)
	f.Add([]byte("dormouse-manifest 2 x\n{}"))
	keys := NewVerifier(key.Public().(ed25519.PublicKey))
	f.Fuzz(func(t *testing.T, p []byte) {
		m, err := parseManifest(p, keys)
		if err != nil {
			return
		}
		_, want, _ := bytes.Cut(good, []byte("\n"))
		if _, payload, _ := bytes.Cut(p, []byte("\n")); !bytes.Equal(payload, want) {
			t.Errorf("%+v was accepted though it was never signed", m)
		}
	})
}

func FuzzPageCache(f *testing.F) {
	path := filepath.Join(f.TempDir(), "cache")
	w, err := newPageCacheWriter(path, newSeed())
	must(f, err)
	var b pageCacheBlock
	b.add(0x1000, fingerprintOf([]byte("x"), 1), 0, 3)
	b.add(0x4000, fingerprintOf([]byte("y"), 1), 1, 0)
	w.block("pagemap-1.img", b.payload([]ID{{1}, {2}}))
	must(f, w.publish())
	good, err := os.ReadFile(path)
	must(f, err)
	f.Add(good)
	f.Fuzz(func(t *testing.T, p []byte) {
		path := filepath.Join(t.TempDir(), "cache")
		must(t, os.WriteFile(path, p, 0o600))
		c := openPageCache(path)
		defer c.close()
		r := c.region("pagemap-1.img")
		for address := range uint64(20) {
			if page := r.find(address * pageSize); page.known && page.page >= windowPages {
				t.Errorf("page %d of a chunk was accepted", page.page)
			}
		}
	})
}

func FuzzFileCacheValue(f *testing.F) {
	f.Add([]byte{5, 3, 'a', 'b', 'c'}, int64(5))
	f.Fuzz(func(t *testing.T, p []byte, size int64) { decodeCached(p, size) })
}
