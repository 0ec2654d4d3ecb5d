package sandbox_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"dormouse/agent/sandbox"
	"dormouse/agent/sandbox/cgroup"
)

// initBinary is dormouse-init, built once for all tests of the package.
var initBinary string

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "dormouse-sandbox-test-*")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	initBinary = filepath.Join(dir, "dormouse-init")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", initBinary, "dormouse/cmd/dormouse-init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building dormouse-init: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// missing skips, or fails where everything has to be there.
func missing(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// bench is a place for sandboxes whose emptiness is checked at the end.
type bench struct {
	t       *testing.T
	dir     string
	parent  string // cgroup, relative
	runtime *sandbox.Runtime
	network sandbox.Network
	n       int
}

func newBench(t *testing.T, hide ...string) *bench {
	t.Helper()
	if os.Getuid() != 0 {
		missing(t, "this test makes namespaces and mounts: it needs root")
	}
	// Not below /tmp, which every sandbox covers.
	dir, err := os.MkdirTemp("/var/lib", "dormouse-test-*")
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, dir: dir, parent: filepath.Base(dir) + "/node/tasks"}
	b.runtime = b.newRuntime(hide...)
	t.Cleanup(b.checkEmpty)
	return b
}

// state is what an agent keeps for itself.
func (b *bench) state() string { return filepath.Join(b.dir, "state") }

// newRuntime is a second agent on the same state.
func (b *bench) newRuntime(hide ...string) *sandbox.Runtime {
	b.t.Helper()
	r, err := sandbox.New(sandbox.Options{
		Init: initBinary, Cgroup: b.parent, Images: filepath.Join(b.state(), "images"), Hide: append(hide, b.state()),
		Log: slog.New(slog.NewTextHandler(testWriter{b.t}, nil)), Network: b.network,
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// checkEmpty fails the test if a sandbox has left something behind.
func (b *bench) checkEmpty() {
	b.t.Helper()
	for _, mount := range b.mountsBelow() {
		b.t.Errorf("left mounted: %s", mount)
		_ = syscall.Unmount(mount, syscall.MNT_DETACH)
	}
	for _, dir := range b.cgroups() {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, entry := range entries {
			if entry.IsDir() {
				b.t.Errorf("left cgroup: %s", filepath.Join(dir, entry.Name()))
				_ = os.WriteFile(filepath.Join(dir, entry.Name(), "cgroup.kill"), []byte("1"), 0)
			}
		}
		for at := dir; strings.Contains(at, filepath.Base(b.dir)); at = filepath.Dir(at) {
			_ = syscall.Rmdir(at)
		}
	}
	if err := os.RemoveAll(b.dir); err != nil {
		b.t.Error(err)
	}
}

func (b *bench) mountsBelow() []string {
	content, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		b.t.Error(err)
	}
	var below []string
	for line := range strings.Lines(string(content)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], b.dir) {
			below = append(below, fields[4])
		}
	}
	return below
}

// cgroups are the parents of tasks' cgroups in all hierarchies.
func (b *bench) cgroups() []string {
	h, err := cgroup.Detect()
	if err != nil {
		b.t.Fatal(err)
	}
	dirs := []string{filepath.Join(h.Unified, b.parent)}
	for _, mount := range h.V1 {
		dirs = append(dirs, filepath.Join(mount, cgroup.V1Path(b.parent)))
	}
	return dirs
}

// config is a small sandbox for a shell script.
func (b *bench) config(script string) sandbox.Config {
	b.n++
	id := fmt.Sprintf("j-test-0-%d", b.n)
	return sandbox.Config{
		ID: id, Dir: filepath.Join(b.state(), "tasks", id, "box"), Hostname: "task-0",
		Command: []string{"/bin/sh", "-c", script}, CPUs: 1, MemBytes: 256 << 20, VirtualIP: "10.99.0.1",
	}
}

// create makes a sandbox that is destroyed at the end of the test.
func (b *bench) create(cfg sandbox.Config) *sandbox.Sandbox {
	b.t.Helper()
	s, err := b.runtime.Create(b.context(), cfg)
	if err != nil {
		b.t.Fatalf("Create: %v", err)
	}
	b.destroyLater(s)
	return s
}

func (b *bench) destroyLater(s *sandbox.Sandbox) {
	b.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := s.Destroy(ctx, sandbox.DestroyOptions{}); err != nil {
			b.t.Errorf("Destroy: %v", err)
		}
		if _, err := os.Stat(s.Dir()); !errors.Is(err, os.ErrNotExist) {
			b.t.Errorf("%s is still there after Destroy", s.Dir())
		}
	})
}

// start makes and starts a sandbox.
func (b *bench) start(cfg sandbox.Config) *sandbox.Sandbox {
	b.t.Helper()
	s := b.create(cfg)
	if err := s.Start(b.context()); err != nil {
		b.t.Fatalf("Start: %v", err)
	}
	return s
}

// context ends long before the test's own limit.
func (b *bench) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	b.t.Cleanup(cancel)
	return ctx
}

func (b *bench) wait(s *sandbox.Sandbox) sandbox.ExitStatus {
	b.t.Helper()
	status, err := s.Wait(b.context())
	if err != nil {
		b.t.Fatalf("Wait: %v", err)
	}
	return status
}

// output runs a config to its end, which must be good, and returns its stdout.
func (b *bench) output(cfg sandbox.Config) string {
	b.t.Helper()
	s := b.start(cfg)
	if status := b.wait(s); status.Code != 0 {
		b.t.Fatalf("exit status %+v; stderr: %s", status, b.log(s, "stderr"))
	}
	return b.log(s, "stdout")
}

func (b *bench) log(s *sandbox.Sandbox, stream string) string {
	b.t.Helper()
	file, err := s.OpenLog(stream)
	if err != nil {
		b.t.Fatalf("OpenLog: %v", err)
	}
	defer file.Close()
	content, err := io.ReadAll(file)
	if err != nil {
		b.t.Fatal(err)
	}
	return string(content)
}

// eventually polls for what a program in the sandbox will do on its own.
func (b *bench) eventually(what string, condition func() bool) {
	b.t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.t.Fatalf("it did not happen: %s", what)
		}
	}
}

// logs waits until stdout contains text.
func (b *bench) logs(s *sandbox.Sandbox, text string) {
	b.t.Helper()
	b.eventually("stdout contains "+text, func() bool { return strings.Contains(b.log(s, "stdout"), text) })
}

// exec runs a script beside the command.
func (b *bench) exec(s *sandbox.Sandbox, script string) (code int, stdout, stderr string) {
	b.t.Helper()
	var out, errs bytes.Buffer
	code, err := s.Exec(b.context(), sandbox.ExecRequest{Command: []string{"/bin/sh", "-c", script}, Stdout: &out, Stderr: &errs})
	if err != nil {
		b.t.Fatalf("Exec: %v", err)
	}
	return code, out.String(), errs.String()
}

func expect(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}

func contains(t *testing.T, what, got, want string) {
	t.Helper()
	if !strings.Contains(got, want) {
		t.Errorf("%s: got %q, which lacks %q", what, got, want)
	}
}
