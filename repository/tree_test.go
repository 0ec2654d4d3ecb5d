package repository

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/repository/backend"
)

// needRoot skips a test that makes devices, owners and trusted attributes.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("needs root")
	}
	t.Skip("needs root: it makes device nodes and trusted.* attributes")
}

// entries is what a tree looks like to Walk, without what differs between copies.
func entries(t *testing.T, dir string) map[string]Entry {
	t.Helper()
	all := make(map[string]Entry)
	for e, err := range Walk(dir) {
		must(t, err)
		all[e.Path] = e.Entry
	}
	return all
}

func wantSameTree(t *testing.T, want, got string) {
	t.Helper()
	a, b := entries(t, want), entries(t, got)
	for p, e := range a {
		if !reflect.DeepEqual(e, b[p]) {
			t.Errorf("%s:\nwant %+v\ngot  %+v", p, e, b[p])
		}
	}
	for p := range b {
		if _, ok := a[p]; !ok {
			t.Errorf("%s was not there before", p)
		}
	}
	wantSameFiles(t, want, got)
}

// restoreTree restores a tree of a part on another machine.
func (r *testRepo) restoreTree(t *testing.T, part, tree string) (string, error) {
	t.Helper()
	p, err := openTestRepo(t, r).OpenPart(t.Context(), part)
	must(t, err)
	dest := filepath.Join(t.TempDir(), "restored")
	return dest, p.RestoreTree(t.Context(), tree, dest, RestoreOptions{KeepOwner: os.Geteuid() != 0})
}

func TestTreeComesBackWithEverything(t *testing.T) {
	needRoot(t)
	src := filepath.Join(t.TempDir(), "src")
	in := func(name string) string { return filepath.Join(src, name) }
	must(t, os.MkdirAll(in("a/deep/dir"), 0o755))
	must(t, os.MkdirAll(in("a-not-a"), 0o711))
	must(t, os.WriteFile(in("a/small"), []byte("hello"), 0o644))
	must(t, os.WriteFile(in("a/deep/empty"), nil, 0o600))
	must(t, os.WriteFile(in("a/setuid"), []byte("#!"), 0o755))
	must(t, os.Chown(in("a/setuid"), 12, 34))
	must(t, os.Chmod(in("a/setuid"), 0o755|os.ModeSetuid))
	must(t, os.WriteFile(in("big"), contiguousBytes(9<<20+123), 0o640))
	must(t, os.WriteFile(in("not\xffutf8 \"<&\n"), []byte("x"), 0o600))
	must(t, os.Symlink("/etc/passwd", in("a/link")))
	must(t, os.Symlink("dangling\xfe", in("link2")))
	must(t, os.Lchown(in("link2"), 5, 6))
	must(t, os.Link(in("a/small"), in("z-hard")))
	must(t, os.Link(in("a/link"), in("z-hard-symlink")))
	must(t, unix.Mkfifo(in("fifo"), 0o622))
	must(t, unix.Mknod(in("sock"), unix.S_IFSOCK|0o700, 0))
	must(t, unix.Mknod(in("whiteout"), unix.S_IFCHR, 0))
	must(t, unix.Mknod(in("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(t, unix.Setxattr(in("a/deep"), "trusted.overlay.opaque", []byte("y"), 0))
	must(t, unix.Setxattr(in("a/small"), "user.note", []byte{0, 1, 255}, 0))
	must(t, unix.Lsetxattr(in("link2"), "trusted.overlay.origin", []byte("o"), 0))
	must(t, os.Chmod(in("a/deep"), 0o555|os.ModeSticky))
	sparse(t, in("sparse"), 300<<20, map[int64]string{0: "begin", 100<<20 + 77: "middle", 300<<20 - 3: "end"})
	for i, name := range []string{"a/deep/dir", "a/deep", "a", "big", "fifo", "whiteout", "."} {
		when := []unix.Timespec{unix.NsecToTimespec(1e18 + int64(i)*1_000_000_007)}
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, in(name), append(when, when...), unix.AT_SYMLINK_NOFOLLOW))
	}

	r := newTestRepo(t)
	res, _ := r.upload(t, "", PartOptions{}, map[string]string{"upper": src})
	got, err := r.restoreTree(t, res.ID, "upper")
	must(t, err)
	wantSameTree(t, src, got)
	var st syscall.Stat_t
	must(t, syscall.Stat(filepath.Join(got, "sparse"), &st))
	if st.Blocks*512 > 1<<20 {
		t.Errorf("the sparse file takes %d bytes after the restore, want only its data", st.Blocks*512)
	}
	if res.NewBytes > 11<<20 {
		t.Errorf("the tree took %d bytes, holes must cost nothing", res.NewBytes)
	}
}

func contiguousBytes(n int) []byte {
	var p []byte
	for i := uint64(0); len(p) < n; i++ {
		p = append(p, randomPage(i)...)
	}
	return p[:n]
}

func sparse(t *testing.T, name string, size int64, data map[int64]string) {
	t.Helper()
	f, err := os.Create(name)
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(size))
	for off, s := range data {
		_, err := f.WriteAt([]byte(s), off)
		must(t, err)
	}
}

// walkUnopened is Walk with files that fail the test when they are read.
func walkUnopened(t *testing.T, dir string) iter.Seq2[TreeEntry, error] {
	return func(yield func(TreeEntry, error) bool) {
		for e, err := range Walk(dir) {
			if e.Type == TypeFile {
				e.Open = func() (*os.File, error) {
					t.Errorf("%s was read again", e.Path)
					return os.Open(filepath.Join(dir, e.Path))
				}
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

func TestUnchangedFilesAreNotReadAgain(t *testing.T) {
	src := t.TempDir()
	must(t, os.WriteFile(filepath.Join(src, "big"), contiguousBytes(5<<20), 0o644))
	must(t, os.WriteFile(filepath.Join(src, "small"), []byte("small"), 0o644))
	r := newTestRepo(t)
	cachePath := filepath.Join(t.TempDir(), "files.db")
	cache, err := OpenFileCache(cachePath)
	must(t, err)
	later := time.Now().Add(time.Minute)
	first, _ := r.upload(t, "", PartOptions{FileCache: cache, Captured: later}, map[string]string{"upper": src})
	must(t, cache.Close())
	cache, err = OpenFileCache(cachePath)
	must(t, err)
	defer cache.Close()

	w, err := r.NewPart(t.Context(), PartOptions{FileCache: cache, Captured: later})
	must(t, err)
	defer w.Close()
	fi, err := os.Stat(filepath.Join(src, "big"))
	must(t, err)
	if !w.Unchanged(FileKeyOf(fi)) {
		t.Error("Unchanged = false for a file that was stored and not touched")
	}
	must(t, w.AddTree(t.Context(), "upper", walkUnopened(t, src)))
	second, err := w.Commit(t.Context())
	must(t, err)
	if second.SizeBytes != first.SizeBytes || second.StoredBytes != first.StoredBytes {
		t.Errorf("sizes went from %+v to %+v", first, second)
	}
	got, err := r.restoreTree(t, second.ID, "upper")
	must(t, err)
	wantSameFiles(t, src, got)

	must(t, os.WriteFile(filepath.Join(src, "small"), []byte("SMALL"), 0o644)) // same size
	fi, err = os.Stat(filepath.Join(src, "small"))
	must(t, err)
	if w.Unchanged(FileKeyOf(fi)) {
		t.Error("Unchanged = true for a file that was written to")
	}
}

func TestFilesThatChangedWithinATimestampAreReadAgain(t *testing.T) {
	src := t.TempDir()
	must(t, os.WriteFile(filepath.Join(src, "busy"), []byte("x"), 0o644))
	r := newTestRepo(t)
	cache, err := OpenFileCache(filepath.Join(t.TempDir(), "files.db"))
	must(t, err)
	defer cache.Close()
	_, w := r.upload(t, "", PartOptions{FileCache: cache}, map[string]string{"upper": src})
	fi, err := os.Stat(filepath.Join(src, "busy"))
	must(t, err)
	if w.Unchanged(FileKeyOf(fi)) {
		t.Error("a file that changed just before it was captured must not be trusted by its timestamps")
	}
}

func TestRereadFilesAreReadEvenIfTheyLookUnchanged(t *testing.T) {
	src := t.TempDir()
	file := filepath.Join(src, "mapped")
	must(t, os.WriteFile(file, []byte("old"), 0o644))
	r := newTestRepo(t)
	cache, err := OpenFileCache(filepath.Join(t.TempDir(), "files.db"))
	must(t, err)
	defer cache.Close()
	opts := PartOptions{FileCache: cache, Captured: time.Now().Add(time.Minute)}
	r.upload(t, "", opts, map[string]string{"upper": src})

	// The same key as before with other content, as after a write through a mapping.
	other := filepath.Join(t.TempDir(), "copy")
	must(t, os.WriteFile(other, []byte("new"), 0o644))
	w, err := r.NewPart(t.Context(), opts)
	must(t, err)
	defer w.Close()
	must(t, w.AddTree(t.Context(), "upper", func(yield func(TreeEntry, error) bool) {
		for e, err := range Walk(src) {
			if e.Type == TypeFile {
				e.Reread = true
				e.Open = func() (*os.File, error) { return os.Open(other) }
			}
			if !yield(e, err) {
				return
			}
		}
	}))
	res, err := w.Commit(t.Context())
	must(t, err)
	got, err := r.restoreTree(t, res.ID, "upper")
	must(t, err)
	if p, _ := os.ReadFile(filepath.Join(got, "mapped")); string(p) != "new" {
		t.Errorf("restored %q, want the content that was read again", p)
	}
}

func TestPickTakesOnlyWhatIsNamed(t *testing.T) {
	src := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(src, "usr/lib/x"), 0o755))
	for _, name := range []string{"usr/lib/libc.so", "usr/lib/libm.so", "usr/lib/x/libz.so", "usr/other"} {
		must(t, os.WriteFile(filepath.Join(src, name), []byte(name), 0o644))
	}
	r := newTestRepo(t)
	w, err := r.NewPart(t.Context(), PartOptions{})
	must(t, err)
	defer w.Close()
	must(t, w.AddTree(t.Context(), "closure", Pick(src, []string{"usr/lib/x/libz.so", "usr/lib/libc.so"})))
	res, err := w.Commit(t.Context())
	must(t, err)
	got, err := r.restoreTree(t, res.ID, "closure")
	must(t, err)
	want := []string{".", "usr", "usr/lib", "usr/lib/libc.so", "usr/lib/x", "usr/lib/x/libz.so"}
	if have := list(t, got); !reflect.DeepEqual(have, want) {
		t.Errorf("restored %q, want %q", have, want)
	}
}

func TestFileThatShrinksWhileItIsReadIsRefused(t *testing.T) {
	src := t.TempDir()
	must(t, os.WriteFile(filepath.Join(src, "f"), []byte("short"), 0o644))
	r := newTestRepo(t)
	w, err := r.NewPart(t.Context(), PartOptions{})
	must(t, err)
	defer w.Close()
	err = w.AddTree(t.Context(), "upper", func(yield func(TreeEntry, error) bool) {
		for e, err := range Walk(src) {
			e.Size *= 100
			if !yield(e, err) {
				return
			}
		}
	})
	if !errors.Is(err, ErrChanged) {
		t.Errorf("AddTree = %v, want ErrChanged", err)
	}
}

// craft stores a tree as a malicious agent could, with no checks.
func (r *testRepo) craft(t *testing.T, list ...Entry) string {
	t.Helper()
	w, err := r.NewPart(t.Context(), PartOptions{})
	must(t, err)
	defer w.Close()
	must(t, w.addTree(t.Context(), "upper", func(yield func(*step, error) bool) {
		for _, e := range list {
			if !yield(&step{entry: &TreeEntry{Entry: e}, last: true}, nil) {
				return
			}
		}
	}))
	res, err := w.Commit(t.Context())
	must(t, err)
	return res.ID
}

func TestCraftedTreeCannotEscape(t *testing.T) {
	outside := t.TempDir()
	root := Entry{Path: ".", Type: TypeDir, Mode: 0o755}
	file := func(p string) Entry { return Entry{Path: p, Type: TypeFile, Mode: 0o644} }
	cases := map[string][]Entry{
		"dot dot":                    {root, file("../evil")},
		"dot dot inside":             {root, {Path: "a", Type: TypeDir}, file("a/../../evil")},
		"absolute":                   {root, file(filepath.Join(outside, "evil"))},
		"parent is a symlink":        {root, {Path: "a", Type: TypeSymlink, Target: outside}, file("a/evil")},
		"parent replaced by symlink": {root, {Path: "a", Type: TypeDir}, {Path: "a", Type: TypeSymlink, Target: outside}, file("a/evil")},
		"same name twice":            {root, {Path: "a", Type: TypeSymlink, Target: filepath.Join(outside, "evil")}, file("a")},
		"no parent":                  {root, file("a/b/evil")},
		"no root":                    {file("evil")},
		"root is a symlink":          {{Path: ".", Type: TypeSymlink, Target: outside}},
		"hard link out":              {root, {Path: "h", Type: TypeHardlink, Target: "../../../../../../../../etc/passwd"}},
		"hard link over symlink":     {root, {Path: "a", Type: TypeSymlink, Target: "/etc"}, {Path: "h", Type: TypeHardlink, Target: "a/passwd"}},
		"empty path":                 {root, file("")},
		"NUL":                        {root, file("a\x00b")},
		"unknown type":               {root, {Path: "a", Type: "door"}},
		"mode":                       {root, {Path: "a", Type: TypeFile, Mode: 0o40777}},
		"size without content":       {root, {Path: "a", Type: TypeFile, Size: 1 << 40}},
		"bad symlink":                {root, {Path: "a", Type: TypeSymlink}},
	}
	r := newTestRepo(t)
	for name, list := range cases {
		t.Run(name, func(t *testing.T) {
			dest, err := r.restoreTree(t, r.craft(t, list...), "upper")
			if err == nil {
				t.Error("the tree was restored, want it refused")
			}
			if _, err := os.Lstat(dest); !os.IsNotExist(err) {
				t.Errorf("%s is still there after a refused restore", dest)
			}
			if left, _ := os.ReadDir(outside); len(left) > 0 {
				t.Errorf("%v was written outside", left)
			}
		})
	}
}

func TestRestoreRefusesADirectoryInUse(t *testing.T) {
	r := newTestRepo(t)
	part := r.craft(t, Entry{Path: ".", Type: TypeDir, Mode: 0o755})
	p, err := r.OpenPart(t.Context(), part)
	must(t, err)
	dest := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dest, "mine"), nil, 0o600))
	err = p.RestoreTree(t.Context(), "upper", dest, RestoreOptions{})
	if err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("restore over files = %v, want a refusal", err)
	}
	if _, err := os.Stat(filepath.Join(dest, "mine")); err != nil {
		t.Errorf("the file that was there is gone: %v", err)
	}
}

func TestManySmallFiles(t *testing.T) {
	src := t.TempDir()
	for i := range 3000 {
		dir := filepath.Join(src, fmt.Sprint("d", i%50))
		must(t, os.MkdirAll(dir, 0o755))
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprint("f", i)), fmt.Append(nil, "content ", i), 0o644))
	}
	r := newTestRepo(t)
	first, _ := r.upload(t, "", PartOptions{}, map[string]string{"upper": src})
	must(t, os.WriteFile(filepath.Join(src, "d7/new"), []byte("new"), 0o644))
	second, _ := r.upload(t, "", PartOptions{}, map[string]string{"upper": src})
	if second.NewBytes > first.NewBytes/4 {
		t.Errorf("one more file added %d bytes, all of them took %d", second.NewBytes, first.NewBytes)
	}
	got, err := r.restoreTree(t, second.ID, "upper")
	must(t, err)
	wantSameFiles(t, src, got)
}

func TestOnlyWhatDiffersIsRestored(t *testing.T) {
	src := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(src, "lib/deep"), 0o750))
	must(t, os.MkdirAll(filepath.Join(src, "etc"), 0o755))
	must(t, os.WriteFile(filepath.Join(src, "lib/same"), contiguousBytes(5<<20+17), 0o644))
	must(t, os.WriteFile(filepath.Join(src, "lib/deep/other"), contiguousBytes(100_000), 0o644))
	must(t, os.WriteFile(filepath.Join(src, "etc/empty"), nil, 0o644))
	sparse(t, filepath.Join(src, "lib/sparse"), 20<<20, map[int64]string{70_000: "x", 15 << 20: "y"})
	r := newTestRepo(t)
	res, _ := r.upload(t, "", PartOptions{}, map[string]string{"closure": src})
	must(t, os.WriteFile(filepath.Join(src, "lib/deep/other"), contiguousBytes(100_001)[1:], 0o644))

	p, err := r.OpenPart(t.Context(), res.ID)
	must(t, err)
	differs := make(map[string]bool)
	for e, err := range p.Entries(t.Context(), "closure") {
		must(t, err)
		if e.Type != TypeFile {
			continue
		}
		f, err := os.Open(filepath.Join(src, e.Path))
		must(t, err)
		same, err := p.SameContent(t.Context(), e, f)
		must(t, err)
		f.Close()
		differs[e.Path] = !same
	}
	if want := map[string]bool{"lib/same": false, "lib/sparse": false, "lib/deep/other": true, "etc/empty": false}; !reflect.DeepEqual(differs, want) {
		t.Errorf("differs: %v, want %v", differs, want)
	}
	dest := filepath.Join(t.TempDir(), "dest")
	must(t, p.RestoreTree(t.Context(), "closure", dest, RestoreOptions{Only: func(e Entry) bool { return differs[e.Path] }}))
	if got, want := list(t, dest), []string{".", "lib", "lib/deep", "lib/deep/other"}; !reflect.DeepEqual(got, want) {
		t.Errorf("restored %q, want %q", got, want)
	}
	fi, err := os.Stat(filepath.Join(dest, "lib/deep"))
	must(t, err)
	if fi.Mode().Perm() != 0o750 {
		t.Errorf("a directory on the way has mode %o, want 750", fi.Mode().Perm())
	}
}

// What is known of a file of this machine is believed as long as it is the file
// that was looked at.
func TestAKnownFileIsComparedWithoutReadingIt(t *testing.T) {
	src := t.TempDir()
	file := filepath.Join(src, "program")
	must(t, os.WriteFile(file, contiguousBytes(5<<20+17), 0o755))
	cache, err := OpenFileCache(filepath.Join(t.TempDir(), "files.db"))
	must(t, err)
	defer cache.Close()
	r := newTestRepo(t)
	res, _ := r.upload(t, "", PartOptions{FileCache: cache, Captured: time.Now().Add(time.Minute)}, map[string]string{"closure": src})
	p, err := r.OpenPart(t.Context(), res.ID)
	must(t, err)
	same := func(p *PartReader) (bool, error) {
		f, err := os.OpenFile(file, os.O_WRONLY, 0)
		must(t, err)
		defer f.Close()
		for e, err := range p.Entries(t.Context(), "closure") {
			must(t, err)
			if e.Path == "program" {
				return p.SameContent(t.Context(), e, f)
			}
		}
		panic("it was not stored")
	}
	if same, err := same(p); !errors.Is(err, syscall.EBADF) {
		t.Errorf("a file that cannot be read compares as %v, %v", same, err)
	}
	if same, err := same(p.Knowing(cache)); !same || err != nil {
		t.Errorf("a file that is known compares as %v, %v", same, err)
	}
	must(t, os.WriteFile(file, contiguousBytes(5<<20 + 18)[1:], 0o755))
	if same, err := same(p.Knowing(cache)); !errors.Is(err, syscall.EBADF) {
		t.Errorf("a file that has changed since compares as %v, %v", same, err)
	}
}

// readCounter counts the bytes that are read of packs.
type readCounter struct {
	backend.Backend
	bytes atomic.Int64
}

func (c *readCounter) ReadAt(ctx context.Context, h backend.Handle, p []byte, off int64) (int, error) {
	n, err := c.Backend.ReadAt(ctx, h, p, off)
	c.bytes.Add(int64(n))
	return n, err
}

func TestWhatALocalFileHasIsNotReadFromTheRepository(t *testing.T) {
	src := t.TempDir()
	content := contiguousBytes(3<<20 + 17)
	must(t, os.WriteFile(filepath.Join(src, "program"), content, 0o755))
	sparse(t, filepath.Join(src, "sparse"), 20<<20, map[int64]string{70_000: "x", 15 << 20: "y"})
	r := newTestRepo(t)
	counter := &readCounter{Backend: r.be}
	r.be = counter
	r = openTestRepo(t, r)
	res, _ := r.upload(t, "", PartOptions{}, map[string]string{"upper": src})

	changed := bytes.Clone(content)
	changed[1<<20] ^= 1
	local := filepath.Join(t.TempDir(), "local")
	for _, c := range []struct {
		name   string
		local  []byte // nil: no such file
		atMost int64
	}{
		{"the same", content, 1 << 20}, {"another byte", changed, 1 << 20}, {"longer", append(bytes.Clone(content), 'x'), 1 << 20},
		{"shorter", content[:2<<20], 2 << 20}, {"empty", []byte{}, 4 << 20}, {"missing", nil, 4 << 20},
	} {
		os.Remove(local)
		if c.local != nil {
			must(t, os.WriteFile(local, c.local, 0o600))
		}
		p, err := r.OpenPart(t.Context(), res.ID)
		must(t, err)
		counter.bytes.Store(0)
		dest := filepath.Join(t.TempDir(), "dest")
		must(t, p.RestoreTree(t.Context(), "upper", dest, RestoreOptions{Local: func(e Entry) string {
			if e.Path == "program" || e.Path == "sparse" {
				return local
			}
			return ""
		}}))
		wantSameFiles(t, src, dest)
		if n := counter.bytes.Load(); n > c.atMost {
			t.Errorf("%s: %d bytes were read from the repository, want at most %d", c.name, n, c.atMost)
		}
	}
}
