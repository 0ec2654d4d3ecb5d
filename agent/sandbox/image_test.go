package sandbox_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"dormouse/agent/sandbox"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// saveImage makes a docker archive of a shell with its libraries.
func saveImage(t *testing.T, dir string) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root")
	copyProgram(t, root, "/bin/sh", "/bin/cat", "/bin/sleep", "/usr/bin/id")
	if err := os.MkdirAll(root+"/etc", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/etc/passwd", []byte("app:x:4242:4343::/home/app:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var content bytes.Buffer
	w := tar.NewWriter(&content)
	if err := errors.Join(w.AddFS(os.DirFS(root)), w.Close()); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		t.Fatal(err)
	}
	image, err = mutate.Config(image, v1.Config{
		Env: []string{"GREETING=hello", "PATH=/bin:/usr/bin"}, User: "app", WorkingDir: "/work",
		Entrypoint: []string{"/bin/sh", "-c"}, Cmd: []string{"echo default"},
	})
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag("test/shell:1")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "shell.tar")
	if err := tarball.WriteToFile(path, tag, image); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestImageRoot(t *testing.T) {
	b := newBench(t)
	archive := saveImage(t, b.dir)
	cfg := b.config("echo $GREETING $OTHER $PWD $HOME $(id -u) $(id -g); cat /etc/hostname")
	cfg.Root, cfg.Command[0] = "oci:"+archive, "sh"
	cfg.Env = map[string]string{"OTHER": "world"}
	expect(t, "output", b.output(cfg), "hello world /work /home/app 4242 4343\ntask-0\n")

	cfg = b.config("")
	cfg.Root, cfg.Command = archive, nil // a plain path, and the image's own command
	expect(t, "the image's own command", b.output(cfg), "default\n")

	cfg = b.config("echo $GREETING $PWD; id -u")
	cfg.Root, cfg.User, cfg.WorkDir, cfg.Env = "oci:"+archive, "0", "/etc", map[string]string{"GREETING": "mine"}
	expect(t, "what the user says wins", b.output(cfg), "mine /etc\n0\n")

	cfg = b.config("")
	cfg.Root, cfg.Command = "oci:"+archive, []string{"python3"}
	if err := b.create(cfg).Start(b.context()); !errors.Is(err, sandbox.ErrCommandNotFound) {
		t.Errorf("got %v, want ErrCommandNotFound", err)
	}
}

func TestBadImageIsRefusedAndLeavesNothing(t *testing.T) {
	b := newBench(t)
	bad := filepath.Join(b.dir, "bad.tar")
	if err := os.WriteFile(bad, []byte("not an image"), 0o644); err != nil {
		t.Fatal(err)
	}
	cfg := b.config("true")
	cfg.Root = "oci:" + bad
	_, err := b.runtime.Create(b.context(), cfg)
	if !errors.Is(err, sandbox.ErrBadImage) {
		t.Errorf("got %v, want ErrBadImage", err)
	}
	if _, err := os.Stat(cfg.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is there (%v)", cfg.Dir, err)
	}
}

func TestImageRootIsRestored(t *testing.T) {
	engine := newEngine(t)
	b := newBench(t)
	cfg := b.config("i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo $i; sleep 0.02; done")
	cfg.Root, cfg.User = "oci:"+saveImage(t, b.dir), "0"
	s := b.start(cfg)
	b.logs(s, "5\n")
	s = b.resume(engine, b.suspend(engine, s))
	if got := b.wait(s); got.Code != 0 {
		t.Errorf("%+v: %s", got, b.log(s, "stderr"))
	}
	contains(t, "output", b.log(s, "stdout"), "\n98\n99\n100\n")
}
