package oci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"
)

// entry is one line of a layer.
type entry struct {
	name, link, content string
	kind                byte
	mode                int64
	uid                 int
	xattr               string
}

func file(name, content string) entry {
	return entry{name: name, content: content, kind: tar.TypeReg, mode: 0o644}
}
func dir(name string) entry { return entry{name: name, kind: tar.TypeDir, mode: 0o755} }
func symlink(name, to string) entry {
	return entry{name: name, link: to, kind: tar.TypeSymlink, mode: 0o777}
}
func link(name, to string) entry { return entry{name: name, link: to, kind: tar.TypeLink, mode: 0o644} }

// archive is a tar of entries.
func archive(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		header := &tar.Header{Name: e.name, Linkname: e.link, Typeflag: e.kind, Mode: e.mode, Uid: e.uid, Size: int64(len(e.content))}
		if e.xattr != "" {
			key, value, _ := strings.Cut(e.xattr, "=")
			header.PAXRecords = map[string]string{"SCHILY.xattr." + key: value}
		}
		if err := w.WriteHeader(header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// build makes an image of layers.
func build(t *testing.T, layers ...[]byte) v1.Image {
	t.Helper()
	image := empty.Image
	for _, content := range layers {
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil })
		if err != nil {
			t.Fatal(err)
		}
		if image, err = mutate.AppendLayers(image, layer); err != nil {
			t.Fatal(err)
		}
	}
	image, err := mutate.Config(image, v1.Config{
		Env: []string{"A=a"}, Entrypoint: []string{"/entry"}, Cmd: []string{"arg"}, User: "7:8", WorkingDir: "/w",
	})
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// save writes an image as `docker save` does.
func save(t *testing.T, image v1.Image) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.tar")
	tag, err := name.NewTag("test/image:latest")
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(path, tag, image); err != nil {
		t.Fatal(err)
	}
	return path
}

// writeLayout writes an image as an OCI layout.
func writeLayout(t *testing.T, image v1.Image) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := path.AppendImage(image); err != nil {
		t.Fatal(err)
	}
	return dir
}

// pack makes a tar of a directory.
func pack(t *testing.T, dir string) string {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	if err := w.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "layout.tar")
	if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func compress(t *testing.T, file string) string {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file+".gz", out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return file + ".gz"
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("unpacking images sets owners: it needs root")
	}
	t.Skip("unpacking images sets owners: it needs root")
}

func get(t *testing.T, ref string) (*Image, error) {
	t.Helper()
	needRoot(t)
	return NewCache(filepath.Join(t.TempDir(), "images")).Get(context.Background(), ref)
}

func read(t *testing.T, image *Image, name string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(image.Root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func TestEveryFormOfAnImageIsTheSame(t *testing.T) {
	image := build(t, archive(t, dir("etc"), file("etc/hello", "hello\n")))
	saved, dir := save(t, image), writeLayout(t, image)
	packed := pack(t, dir)
	forms := map[string]string{
		"docker save": saved, "docker save, gzipped": compress(t, saved),
		"layout": dir, "layout archive": packed, "layout archive, gzipped": compress(t, packed),
	}
	for form, ref := range forms {
		got, err := get(t, ref)
		if err != nil {
			t.Errorf("%s: %v", form, err)
			continue
		}
		if text := read(t, got, "etc/hello"); text != "hello\n" {
			t.Errorf("%s: read %q", form, text)
		}
		if got.Config.User != "7:8" || got.Config.WorkDir != "/w" || got.Config.Env[0] != "A=a" || got.Config.Entrypoint[0] != "/entry" || got.Config.Cmd[0] != "arg" {
			t.Errorf("%s: config %+v", form, got.Config)
		}
		digest, err := image.ConfigName()
		if err != nil || got.Digest != digest.String() {
			t.Errorf("%s: digest %s, want %s", form, got.Digest, digest)
		}
	}
}

func TestImageIsPulledByReference(t *testing.T) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	ref := strings.TrimPrefix(server.URL, "http://") + "/test/image:1"
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, build(t, archive(t, file("hello", "pulled")))); err != nil {
		t.Fatal(err)
	}
	got, err := get(t, ref)
	if err != nil {
		t.Fatal(err)
	}
	if text := read(t, got, "hello"); text != "pulled" {
		t.Errorf("read %q", text)
	}
	if _, err := get(t, strings.TrimPrefix(server.URL, "http://")+"/no/such:1"); err == nil || !strings.Contains(err.Error(), "cannot be pulled") {
		t.Errorf("a missing image: %v", err)
	}
	server.Close()
	if _, err := get(t, ref); err == nil || !strings.Contains(err.Error(), "cannot be pulled") {
		t.Errorf("a registry that is gone: %v", err)
	}
}

func TestAttributesAreKept(t *testing.T) {
	got, err := get(t, save(t, build(t, archive(t,
		dir("bin"),
		entry{name: "bin/su", content: "x", kind: tar.TypeReg, mode: 0o4755, uid: 3, xattr: "user.note=kept"},
		link("bin/su2", "bin/su"),
		symlink("su", "bin/su"),
		entry{name: "pipe", kind: tar.TypeFifo, mode: 0o600},
		entry{name: "disk", kind: tar.TypeBlock, mode: 0o600},
	))))
	if err != nil {
		t.Fatal(err)
	}
	var stat, other unix.Stat_t
	if err := unix.Lstat(filepath.Join(got.Root, "bin/su"), &stat); err != nil || stat.Mode&0o7777 != 0o4755 || stat.Uid != 3 {
		t.Errorf("set-uid file: mode %o uid %d (%v)", stat.Mode, stat.Uid, err)
	}
	if err := unix.Lstat(filepath.Join(got.Root, "bin/su2"), &other); err != nil || other.Ino != stat.Ino {
		t.Errorf("hard link: inode %d, want %d (%v)", other.Ino, stat.Ino, err)
	}
	note := make([]byte, 16)
	n, err := unix.Lgetxattr(filepath.Join(got.Root, "bin/su"), "user.note", note)
	if err == nil && string(note[:n]) != "kept" || err != nil && err != syscall.ENOTSUP {
		t.Errorf("attribute: %q %v", note[:max(n, 0)], err)
	}
	if err := unix.Lstat(filepath.Join(got.Root, "pipe"), &other); err != nil || other.Mode&unix.S_IFMT != unix.S_IFIFO {
		t.Errorf("fifo: mode %o (%v)", other.Mode, err)
	}
	if err := unix.Lstat(filepath.Join(got.Root, "disk"), &other); err != nil || other.Mode&unix.S_IFMT != unix.S_IFREG {
		t.Errorf("device: mode %o (%v), want an inert file", other.Mode, err)
	}
}

func TestLayersAndWhiteouts(t *testing.T) {
	got, err := get(t, save(t, build(t,
		archive(t, dir("a"), file("a/gone", "1"), file("a/stays", "1"), dir("b"), file("b/old", "1"), dir("b/sub"), file("b/sub/old", "1"), file("c", "1"), dir("usr/lib"), symlink("lib", "usr/lib"), symlink("var", "/usr")),
		archive(t, file("a/.wh.gone", ""), file("b/new", "2"), file("b/sub/new", "2"), file("b/.wh..wh..opq", ""), dir("c"), file("c/d", "2"), file("lib/x", "through a link"), file("var/y", "through an absolute link"), file(".wh..wh.plnk", "")),
	)))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"a/stays": "1", "b/new": "2", "b/sub/new": "2", "c/d": "2", "usr/lib/x": "through a link", "usr/y": "through an absolute link"} {
		if text := read(t, got, name); text != want {
			t.Errorf("%s: %q, want %q", name, text, want)
		}
	}
	for _, name := range []string{"a/gone", "a/.wh.gone", "b/old", "b/sub/old", "b/.wh..wh..opq", ".wh..wh.plnk"} {
		if _, err := os.Lstat(filepath.Join(got.Root, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there (%v)", name, err)
		}
	}
}

func TestMaliciousLayersAreHarmless(t *testing.T) {
	needRoot(t)
	outside := t.TempDir()
	precious := filepath.Join(outside, "precious")
	for attack, layers := range map[string][][]byte{
		"dots":                       {archive(t, file("../../../../../../.."+precious, "evil"))},
		"dots inside":                {archive(t, file("a/../../../../../../.."+precious, "evil"))},
		"link to a directory":        {archive(t, symlink("out", outside), file("out/precious", "evil"))},
		"relative link":              {archive(t, symlink("out", "../../../../../../../../.."+outside), file("out/precious", "evil"))},
		"link in another layer":      {archive(t, symlink("out", outside)), archive(t, file("out/precious", "evil"))},
		"link to the file":           {archive(t, symlink("f", precious)), archive(t, file("f", "evil"))},
		"hard link":                  {archive(t, link("f", precious), file("f", "evil"))},
		"hard link with dots":        {archive(t, link("f", "../../../../../../.."+precious))},
		"hard link through a link":   {archive(t, symlink("out", outside), link("f", "out/precious"), file("f", "evil"))},
		"whiteout through a link":    {archive(t, symlink("out", outside), file("out/.wh.precious", ""))},
		"opaque through a link":      {archive(t, symlink("out", outside), file("out/.wh..wh..opq", ""))},
		"whiteout of dots":           {archive(t, file("a/.wh...", ""))},
		"chmod through a link":       {archive(t, symlink("out", outside), dir("out"))},
		"proc":                       {archive(t, symlink("out", "/proc/self/root"+outside), file("out/precious", "evil"))},
		"directory over a hard link": {archive(t, link("d", precious), dir("d"))},
	} {
		if err := os.WriteFile(precious, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(outside, 0o711); err != nil {
			t.Fatal(err)
		}
		_, err := get(t, save(t, build(t, layers...)))
		if err != nil && !errors.Is(err, ErrBadImage) {
			t.Errorf("%s: got error %v, want ErrBadImage or none", attack, err)
		}
		content, err := os.ReadFile(precious)
		info, statErr := os.Stat(outside)
		entries, _ := os.ReadDir(outside)
		if err != nil || statErr != nil || string(content) != "precious" || info.Mode().Perm() != 0o711 || len(entries) != 1 {
			t.Fatalf("%s reached outside of the image: %q %v %v %v", attack, content, err, info.Mode(), entries)
		}
	}
}

func TestBombsAreStopped(t *testing.T) {
	needRoot(t)
	big := save(t, build(t, archive(t, file("zeros", strings.Repeat("\x00", 1<<20)))))
	blobs := pack(t, writeLayout(t, build(t, archive(t, file("f", "x")))))
	many := save(t, build(t, archive(t, file("1", ""), file("2", ""), file("3", ""), file("4", ""))))
	for _, c := range []struct {
		ref    string
		limits limits
		want   string
	}{
		{big, limits{entries: 10, bytes: 1 << 19}, "unfolds to more than the 524288 bytes allowed"},
		{blobs, limits{entries: 10, bytes: 100, spare: 0}, "unfolds to more than the 100 bytes allowed"},
		{many, limits{entries: 3, bytes: 1 << 30}, "holds more than the 3 files allowed"},
		{big, limits{entries: 10, bytes: 1 << 30, spare: 1 << 60}, "no space is left"},
	} {
		cache := &Cache{dir: t.TempDir(), limits: c.limits}
		_, err := cache.Get(context.Background(), c.ref)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got error %v, want one with %q", err, c.want)
		}
		left, _ := filepath.Glob(filepath.Join(cache.dir, "*[0-9a-f]"))
		if len(left) != 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}

func TestBadArchivesAreNamed(t *testing.T) {
	write := func(content []byte) string {
		path := filepath.Join(t.TempDir(), "x.tar")
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := save(t, build(t, archive(t, file("f", strings.Repeat("content", 10000)))))
	content, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ ref, want string }{
		"missing":     {"/no/such/image.tar", "there is no image at /no/such/image.tar"},
		"empty":       {write(nil), "holds neither manifest.json"},
		"text":        {write([]byte("this is not an archive, whatever its name may say\n")), "is not an image archive"},
		"other tar":   {write(archive(t, file("f", "x"))), "holds neither manifest.json"},
		"truncated":   {write(content[:len(content)/2]), ""},
		"empty dir":   {t.TempDir(), "is not an OCI image layout"},
		"bad name":    {"NOT A NAME", "neither a file on this node nor the name of an image"},
		"device":      {"/dev/null", "neither a file nor a directory"},
		"half a gzip": {write([]byte("\x1f\x8b\x08")), "is not an image archive"},
	} {
		_, err := get(t, c.ref)
		if !errors.Is(err, ErrBadImage) {
			t.Errorf("%s: got error %v, want ErrBadImage", name, err)
			continue
		}
		if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %q lacks %q", name, err, c.want)
		}
	}
}

func TestTamperedLayerIsRefused(t *testing.T) {
	dir := writeLayout(t, build(t, archive(t, file("f", "genuine"))))
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, blob := range blobs {
		content, err := os.ReadFile(blob)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.HasPrefix(content, []byte("\x1f\x8b")) || bytes.Contains(content, []byte("genuine")) {
			var forged bytes.Buffer
			w := gzip.NewWriter(&forged)
			_, _ = w.Write(archive(t, file("f", "forged!")))
			w.Close()
			if err := os.WriteFile(blob, forged.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := get(t, dir); !errors.Is(err, ErrBadImage) {
		t.Errorf("got error %v, want ErrBadImage", err)
	}
}

func TestImagesAreUnpackedOnce(t *testing.T) {
	needRoot(t)
	ref := save(t, build(t, archive(t, file("f", "x"))))
	cache := NewCache(t.TempDir())
	done := make(chan error)
	for range 4 {
		go func() {
			image, err := cache.Get(context.Background(), ref)
			if err == nil {
				_, err = os.Stat(filepath.Join(image.Root, "f"))
			}
			done <- err
		}()
	}
	for range 4 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	first, err := cache.Get(context.Background(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(first.Root, "mark"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := cache.Get(context.Background(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(again.Root, "mark")); err != nil {
		t.Error("the image was unpacked a second time")
	}
}

func TestInterruptedUnpackingIsDoneAgain(t *testing.T) {
	needRoot(t)
	ref := save(t, build(t, archive(t, file("f", "x"))))
	cache := NewCache(t.TempDir())
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := cache.Get(ctx, ref); err == nil {
		t.Fatal("an ended context was no reason to stop")
	}
	image, err := cache.Get(context.Background(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if text := read(t, image, "f"); text != "x" {
		t.Errorf("read %q", text)
	}
}
