package capture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"dormouse/repository"
)

func unknown(repository.FileKey) bool { return false }
func every(string) bool               { return true }

func must(t interface {
	Helper()
	Fatal(...any)
}, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t interface {
	Helper()
	Fatal(...any)
}, path, text string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(text), 0o644))
}

func newUpper(t *testing.T, dir string) *Upper {
	t.Helper()
	u, err := NewUpper(dir, t.TempDir(), unknown, every)
	must(t, err)
	return u
}

// contents reads the captured files.
func contents(t interface {
	Helper()
	Fatal(...any)
}, x *Index) map[string]string {
	t.Helper()
	got := map[string]string{}
	for entry, err := range x.Entries() {
		must(t, err)
		if entry.Type != repository.TypeFile {
			got[entry.Path] = string(entry.Type) + " " + entry.Target
			continue
		}
		f, err := entry.Open()
		must(t, err)
		text, err := io.ReadAll(f)
		must(t, errors.Join(err, f.Close()))
		got[entry.Path] = string(text)
	}
	return got
}

// present reads what is in a directory, in the form of contents.
func present(t interface {
	Helper()
	Fatal(...any)
}, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	for entry, err := range repository.Walk(dir) {
		must(t, err)
		if entry.Type != repository.TypeFile {
			got[entry.Path] = string(entry.Type) + " " + entry.Target
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, entry.Path))
		must(t, err)
		got[entry.Path] = string(text)
	}
	return got
}

func TestCaptureIsTheLayerAsItWasAtTheFreeze(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		dir, spool := mkdirs(t)
		defer os.RemoveAll(filepath.Dir(dir))
		change := func(step string) {
			for range rapid.IntRange(0, 8).Draw(rt, step) {
				mutate(rt, dir)
			}
		}
		change("before")
		u, err := NewUpper(dir, spool, unknown, every)
		must(rt, err)
		for range rapid.IntRange(0, 2).Draw(rt, "pre-copies") {
			must(rt, u.PreCopy(t.Context(), nil))
			change("meanwhile")
		}
		index, err := u.Finish(t.Context(), nil)
		must(rt, err)
		want := present(rt, dir)
		change("afterwards")
		if got := contents(rt, index); !maps.Equal(got, want) {
			rt.Fatalf("captured %q, want %q", got, want)
		}
	})
}

func mkdirs(t *testing.T) (dir, spool string) {
	t.Helper()
	base, err := os.MkdirTemp("", "capture")
	must(t, err)
	dir, spool = filepath.Join(base, "upper"), filepath.Join(base, "spool")
	must(t, errors.Join(os.Mkdir(dir, 0o755), os.Mkdir(spool, 0o755)))
	return dir, spool
}

// mutate does one thing that a task may do to its files. Failures are fine: a
// task also tries what does not work.
func mutate(rt *rapid.T, dir string) {
	names := []string{"a", "b", "c", "d/a", "d/b"}
	one := filepath.Join(dir, rapid.SampledFrom(names).Draw(rt, "one"))
	two := filepath.Join(dir, rapid.SampledFrom(names).Draw(rt, "two"))
	text := rapid.SampledFrom([]string{"", "x", "yy", "zz", strings.Repeat("long", 3000)}).Draw(rt, "text")
	os.MkdirAll(filepath.Join(dir, "d"), 0o755)
	switch rapid.IntRange(0, 6).Draw(rt, "action") {
	case 0, 1:
		os.WriteFile(one, []byte(text), 0o644)
	case 2:
		if f, err := os.OpenFile(one, os.O_WRONLY|os.O_APPEND, 0); err == nil {
			f.WriteString(text)
			f.Close()
		}
	case 3:
		os.Rename(one, two)
	case 4:
		os.Remove(one)
	case 5:
		os.Link(one, two)
	case 6:
		os.Symlink("a", two)
	}
}

func TestWriteRightAfterThePreCopyIsSeen(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "f")
	for i := range 300 {
		write(t, name, fmt.Sprintf("%03d a", i))
		u := newUpper(t, dir)
		must(t, u.PreCopy(t.Context(), nil))
		want := fmt.Sprintf("%03d b", i)
		write(t, name, want)
		index, err := u.Finish(t.Context(), nil)
		must(t, err)
		if got := contents(t, index)["f"]; got != want {
			t.Fatalf("captured %q, want %q", got, want)
		}
	}
}

func TestUnchangedFilesAreCopiedOnceAndKnownOnesNever(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "known"), strings.Repeat("k", 1000))
	write(t, filepath.Join(dir, "unchanged"), strings.Repeat("u", 100))
	write(t, filepath.Join(dir, "changed"), strings.Repeat("c", 10))
	settle()
	info, err := os.Stat(filepath.Join(dir, "known"))
	must(t, err)
	known := repository.FileKeyOf(info)
	u, err := NewUpper(dir, t.TempDir(), func(k repository.FileKey) bool { return k == known }, every)
	must(t, err)
	must(t, u.PreCopy(t.Context(), nil))
	if u.CopiedBytes() != 110 {
		t.Errorf("copied %d bytes ahead, want 110", u.CopiedBytes())
	}
	write(t, filepath.Join(dir, "changed"), "new")
	index, err := u.Finish(t.Context(), nil)
	must(t, err)
	if u.CopiedBytes() != 113 {
		t.Errorf("copied %d bytes in all, want 113", u.CopiedBytes())
	}
	for entry := range index.Entries() {
		if entry.Path == "known" {
			if _, err := entry.Open(); !errors.Is(err, ErrLost) {
				t.Errorf("a file that the repository holds was copied: %v", err)
			}
		}
	}
}

// settle waits until the files are old enough to be copied ahead.
func settle() { time.Sleep(2 * granularity) }

func TestStoresThroughASharedMappingAreCaptured(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "mapped")
	write(t, name, strings.Repeat(".", 4096))
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	memory, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	defer unix.Munmap(memory)
	memory[0] = '1' // the page is dirty now: later stores leave the times alone
	settle()

	view, err := Look(os.Getpid(), []int{os.Getpid()}, dir)
	must(t, err)
	info, err := f.Stat()
	must(t, err)
	if !view.Shared.Has(repository.FileKeyOf(info)) {
		t.Fatal("the mapping was not seen")
	}
	u := newUpper(t, dir)
	must(t, u.PreCopy(t.Context(), view.Shared))
	memory[0] = '2'
	index, err := u.Finish(t.Context(), view.Shared)
	must(t, err)
	if got := contents(t, index)["mapped"][0]; got != '2' {
		t.Errorf("captured %q", got)
	}
	if key := index.Items[1].Key; key != (repository.FileKey{}) {
		t.Errorf("the identity of a mapped file would be remembered: %v", key)
	}
}

func TestIndexSurvivesARestartAndRestoresEveryKindOfFile(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root, for device nodes and trusted attributes")
		}
		t.Skip("needs root, for device nodes and trusted attributes")
	}
	dir, spool := t.TempDir(), t.TempDir()
	everyKind(t, dir)
	u, err := NewUpper(dir, spool, unknown, func(name string) bool { return name != "trusted.overlay.origin" })
	must(t, err)
	index, err := u.Finish(t.Context(), nil)
	must(t, err)
	must(t, index.Save(spool, "index"))
	index, err = OpenIndex(spool, "index")
	must(t, err)

	dest := filepath.Join(t.TempDir(), "restored")
	must(t, store(t, "upper", index).RestoreTree(t.Context(), "upper", dest, repository.RestoreOptions{}))
	compare(t, dir, dest)
	if _, err := unix.Lgetxattr(filepath.Join(dest, "dir"), "trusted.overlay.origin", nil); !errors.Is(err, unix.ENODATA) {
		t.Errorf("an attribute of this node alone was kept: %v", err)
	}
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(dest, "sparse"), &st))
	if st.Blocks*512 > 1<<20 {
		t.Errorf("the holes of a sparse file were filled: it takes %d bytes", st.Blocks*512)
	}
}

func everyKind(t *testing.T, dir string) {
	t.Helper()
	write(t, filepath.Join(dir, "dir/file"), "text")
	write(t, filepath.Join(dir, "dir/empty"), "")
	write(t, filepath.Join(dir, "odd \xff\n\\name"), "odd")
	must(t, os.Chmod(filepath.Join(dir, "dir/file"), 0o4751))
	must(t, os.Chmod(filepath.Join(dir, "dir/file"), 0o751|os.ModeSetuid))
	must(t, os.Lchown(filepath.Join(dir, "dir/file"), 1234, 4321))
	must(t, os.Link(filepath.Join(dir, "dir/file"), filepath.Join(dir, "hard")))
	must(t, os.Symlink("/nowhere", filepath.Join(dir, "soft")))
	must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o620))
	must(t, unix.Mknod(filepath.Join(dir, "gone"), unix.S_IFCHR, 0))
	must(t, unix.Mknod(filepath.Join(dir, "socket"), unix.S_IFSOCK|0o700, 0))
	must(t, unix.Lsetxattr(filepath.Join(dir, "dir"), "trusted.overlay.opaque", []byte("y"), 0))
	must(t, unix.Lsetxattr(filepath.Join(dir, "dir"), "trusted.overlay.origin", []byte("inode"), 0))
	must(t, unix.Lsetxattr(filepath.Join(dir, "dir/empty"), "user.note", []byte("a\x00b"), 0))
	sparse, err := os.Create(filepath.Join(dir, "sparse"))
	must(t, err)
	defer sparse.Close()
	must(t, sparse.Truncate(64<<20))
	_, err = sparse.WriteAt([]byte("in the middle"), 20<<20)
	must(t, err)
	_, err = sparse.WriteAt([]byte("end"), 64<<20-3)
	must(t, err)
	old := time.Unix(1e9, 123456789)
	must(t, os.Chtimes(filepath.Join(dir, "dir/empty"), old, old))
	must(t, os.Chtimes(filepath.Join(dir, "dir"), old, old))
}

// compare checks that b has what a has, by rsync's or our own eyes: types,
// modes, owners, times, links, attributes and contents.
func compare(t *testing.T, a, b string) {
	t.Helper()
	describe := func(dir string) []string {
		var lines []string
		for e, err := range repository.Walk(dir) {
			must(t, err)
			delete(e.Xattrs, "trusted.overlay.origin")
			line := fmt.Sprintf("%q %s %o %d:%d %d %d %q %d:%d %q", e.Path, e.Type, e.Mode, e.UID, e.GID, e.ModTime, e.Size, e.Target, e.Major, e.Minor, e.Xattrs)
			if e.Type == repository.TypeFile {
				f, err := e.Open()
				must(t, err)
				text, err := io.ReadAll(f)
				must(t, errors.Join(err, f.Close()))
				line += fmt.Sprintf(" %d zeros", bytes.Count(text, []byte{0})) + string(bytes.Trim(text, "\x00"))
			}
			lines = append(lines, line)
		}
		return lines
	}
	want, got := describe(a), describe(b)
	if !slices.Equal(want, got) {
		t.Errorf("captured:\n%s\nrestored:\n%s", strings.Join(want, "\n"), strings.Join(got, "\n"))
	}
}

func TestClosureIsWhatTheTreeUsesFromBelow(t *testing.T) {
	lower, upper := t.TempDir(), t.TempDir()
	for _, name := range []string{"lib/one.so", "lib/two.so", "hidden/three.so", "etc/data"} {
		write(t, filepath.Join(lower, name), name)
	}
	write(t, filepath.Join(upper, "lib/two.so"), "newer")
	must(t, os.Mkdir(filepath.Join(upper, "hidden"), 0o755))
	if err := unix.Lsetxattr(filepath.Join(upper, "hidden"), "trusted.overlay.opaque", []byte("y"), 0); err != nil {
		t.Skipf("needs root, for trusted attributes: %v", err)
	}
	index, err := Closure(t.Context(), lower, upper, []string{"etc", "hidden/three.so", "lib/one.so", "lib/two.so", "missing"})
	must(t, err)
	want := map[string]string{".": "dir ", "etc": "dir ", "lib": "dir ", "lib/one.so": "lib/one.so"}
	if got := contents(t, index); !maps.Equal(got, want) {
		t.Errorf("the closure is %q, want %q", got, want)
	}
	write(t, filepath.Join(lower, "lib/one.so"), "upgraded")
	for entry := range index.Entries() {
		if entry.Type != repository.TypeFile {
			continue
		}
		if _, err := entry.Open(); !errors.Is(err, ErrLost) {
			t.Errorf("a file that was replaced after the capture would be stored: %v", err)
		}
	}
}

func TestApplyAddsOnlyWhatThisNodeLacksOrHasOtherwise(t *testing.T) {
	captured, lower, upper := t.TempDir(), t.TempDir(), t.TempDir()
	for _, name := range []string{"lib/same", "lib/other", "lib/longer", "lib/mode", "lib/deep/gone", "run/dir/x"} {
		write(t, filepath.Join(captured, name), "text of "+name)
	}
	must(t, os.Chmod(filepath.Join(captured, "lib/mode"), 0o755))
	must(t, os.Chmod(filepath.Join(captured, "lib/deep"), 0o700))
	must(t, os.Symlink("same", filepath.Join(captured, "lib/link")))
	part := closureOf(t, captured, "lib/same", "lib/other", "lib/longer", "lib/mode", "lib/deep/gone", "lib/link", "run/dir")
	write(t, filepath.Join(lower, "lib/same"), "text of lib/same")
	write(t, filepath.Join(lower, "lib/other"), "TEXT of lib/other")
	write(t, filepath.Join(lower, "lib/longer"), "text of lib/longer, and more")
	write(t, filepath.Join(lower, "lib/mode"), "text of lib/mode")
	must(t, os.Symlink("other", filepath.Join(lower, "lib/link")))
	must(t, os.Chmod(filepath.Join(lower, "lib"), 0o711))

	differing, err := Differing(t.Context(), part, "closure", lower)
	must(t, err)
	want := []string{"lib/deep", "lib/deep/gone", "lib/link", "lib/longer", "lib/mode", "lib/other", "run", "run/dir"}
	if got := slices.Sorted(maps.Keys(differing)); !slices.Equal(got, want) {
		t.Errorf("differing: %q, want %q", got, want)
	}
	stored := filepath.Join(t.TempDir(), "stored")
	must(t, part.RestoreTree(t.Context(), "closure", stored, repository.RestoreOptions{
		Only: func(e repository.Entry) bool { return differing[e.Path] },
	}))
	must(t, Apply(stored, lower, upper))
	if got := slices.Sorted(maps.Keys(present(t, upper))); !slices.Equal(got, append([]string{".", "lib"}, want...)) {
		t.Errorf("added: %q", got)
	}
	for name, mode := range map[string]os.FileMode{"lib": 0o711, "lib/deep": 0o700, "lib/mode": 0o755, "lib/other": 0o644} {
		info, err := os.Lstat(filepath.Join(upper, name))
		must(t, err)
		if info.Mode().Perm() != mode {
			t.Errorf("%s has mode %o, want %o", name, info.Mode().Perm(), mode)
		}
	}
}

// closureOf stores some files of a directory.
func closureOf(t *testing.T, dir string, names ...string) *repository.PartReader {
	t.Helper()
	index, err := Closure(t.Context(), dir, t.TempDir(), names)
	must(t, err)
	return store(t, "closure", index)
}

func TestLookSeesWhatAProcessHasOpenMappedAndRuns(t *testing.T) {
	dir := t.TempDir()
	data, gone := filepath.Join(dir, "da ta\n"), filepath.Join(dir, "gone")
	write(t, data, "x")
	write(t, gone, "x")
	command := exec.Command("sleep", "60")
	for _, name := range []string{data, gone} {
		f, err := os.Open(name)
		must(t, err)
		defer f.Close()
		command.ExtraFiles = append(command.ExtraFiles, f)
	}
	command.Dir = dir
	must(t, command.Start())
	defer command.Wait()
	defer command.Process.Kill()
	must(t, os.Remove(gone))
	program, err := filepath.EvalSymlinks(command.Path)
	must(t, err)

	view, err := Look(command.Process.Pid, []int{command.Process.Pid, 1 << 30}, t.TempDir())
	must(t, err)
	for _, want := range []string{data, dir, program} {
		if !slices.Contains(view.Paths, strings.TrimPrefix(want, "/")) {
			t.Errorf("%q is missing in %q", want, view.Paths)
		}
	}
	for _, path := range view.Paths {
		if strings.Contains(path, "gone") || strings.HasPrefix(path, "dev/") || strings.HasPrefix(path, "proc/") {
			t.Errorf("%q is not the closure's", path)
		}
	}
}

// TestAFileMayShrinkWhileItIsCopied rewrites a file all the time, as the shell's ">" does.
func TestAFileMayShrinkWhileItIsCopied(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "rewritten")
	f, err := os.Create(name)
	must(t, err)
	defer f.Close()
	ctx, stop := context.WithCancel(t.Context())
	var rewriting sync.WaitGroup
	rewriting.Go(func() {
		for ctx.Err() == nil {
			_, written := f.WriteAt([]byte("content"), 0)
			if err := errors.Join(written, f.Truncate(0)); err != nil {
				t.Error(err)
				return
			}
		}
	})
	defer rewriting.Wait()
	defer stop()
	for i := range 3000 {
		to := filepath.Join(dir, strconv.Itoa(i))
		if _, err := copyFile(ctx, name, to); err != nil {
			t.Fatalf("copy %d: %v", i, err)
		}
		must(t, os.Remove(to))
	}
}

func TestCopyStopsWhenItIsCancelled(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "f"), "text")
	settle()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := newUpper(t, dir).PreCopy(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
