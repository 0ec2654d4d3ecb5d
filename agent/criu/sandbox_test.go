package criu

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The tests run real programs in a small sandbox of their own: pid, mount, net,
// ipc and uts namespaces, the machine's root bound below fresh /proc, /dev and
// /tmp, one cgroup. The test binary itself sets that up in the child.

const stageVariable = "DORMOUSE_CRIU_TEST_STAGE"

func TestMain(m *testing.M) {
	if stage := os.Getenv(stageVariable); stage != "" {
		fmt.Fprintln(os.Stderr, sandboxStage(stage))
		os.Exit(120)
	}
	if request := os.Getenv(dumperVariable); request != "" {
		fmt.Fprintln(os.Stderr, dumpAndHang(request))
		os.Exit(120)
	}
	os.Exit(m.Run())
}

// stage is what the child needs to know.
type stage struct {
	Root    string   // mount point for its root
	Program string   // copied to /tmp/job
	Args    []string // of it
	Volume  string   // a directory bound to /mnt, if any
	Leak    string   // a file of the machine that the program finds open, if any
	Overlay string   // options of an overlay as the root, instead of the bind, if any
}

// sandboxStage runs as pid 1 of the sandbox and returns only on failure.
func sandboxStage(encoded string) error {
	var s stage
	if err := json.Unmarshal([]byte(encoded), &s); err != nil {
		return err
	}
	program, err := os.ReadFile(s.Program)
	if err != nil {
		return err
	}
	type mount struct {
		source, target, kind string
		flags                uintptr
		data                 string
	}
	at := func(p string) string { return filepath.Join(s.Root, p) }
	mounts := []mount{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE, ""},
		{"/", s.Root, "", unix.MS_BIND, ""},
		{"proc", at("proc"), "proc", 0, ""},
		{"dev", at("dev"), "tmpfs", 0, "mode=755"},
		{"tmp", at("tmp"), "tmpfs", 0, "mode=1777"},
	}
	if s.Overlay != "" {
		mounts[1] = mount{"overlay", s.Root, "overlay", 0, s.Overlay}
	}
	if s.Volume != "" {
		mounts = append(mounts, mount{s.Volume, at("mnt"), "", unix.MS_BIND, ""})
	}
	for _, m := range mounts {
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	if err := unix.Mknod(at("dev/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		return err
	}
	if err := os.WriteFile(at("tmp/job"), program, 0o755); err != nil {
		return err
	}
	if err := os.Chmod(at("tmp/job"), 0o755); err != nil {
		return err
	}
	if s.Leak != "" {
		if _, err := unix.Open(s.Leak, unix.O_RDONLY, 0); err != nil {
			return err
		}
	}
	if err := os.Chdir(s.Root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	return execInside(s.Args, s.Leak != "")
}

func execInside(args []string, leak bool) error {
	null, err := unix.Open("/dev/null", unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	out, err := unix.Open("/tmp/out", unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND, 0o666)
	if err != nil {
		return err
	}
	for from, to := range map[int]int{null: 0, out: 1} {
		if err := unix.Dup3(from, to, 0); err != nil {
			return err
		}
	}
	if err := unix.Dup3(1, 2, 0); err != nil {
		return err
	}
	if !leak {
		if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
			return err
		}
	}
	return unix.Exec("/tmp/job", append([]string{"/tmp/job"}, args...), []string{"PATH=/usr/bin:/bin"})
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// sandbox is one running tree.
type sandbox struct {
	t      *testing.T
	engine *Engine
	cgroup string
	pid    int
	dir    string
}

var sandboxes atomic.Int64

// newSandbox makes the cgroup and directory of one sandbox; the tree comes with
// start or restore.
func newSandbox(t *testing.T, e *Engine) *sandbox {
	t.Helper()
	parent := cgroup2Mount(t)
	dir := filepath.Join(parent, fmt.Sprintf("dormouse-criu-test-%d-%d", os.Getpid(), sandboxes.Add(1)))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s := &sandbox{t: t, engine: e, cgroup: dir, dir: t.TempDir()}
	t.Cleanup(func() {
		s.kill()
		waitFor(t, "the cgroup to be removed", func() bool {
			err := os.Remove(dir)
			return err == nil || os.IsNotExist(err)
		})
	})
	return s
}

func startSandbox(t *testing.T, e *Engine, program string, args ...string) *sandbox {
	t.Helper()
	return startStage(t, e, unix.CLONE_NEWNET, stage{Program: program, Args: args})
}

// startStage uses the calling thread's network namespace if netFlag is 0.
func startStage(t *testing.T, e *Engine, netFlag uintptr, st stage) *sandbox {
	t.Helper()
	s := newSandbox(t, e)
	root := filepath.Join(s.dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	st.Root = root
	encoded, err := json.Marshal(st)
	if err != nil {
		t.Fatal(err)
	}
	cgroup, err := os.Open(s.cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{stageVariable + "=" + string(encoded)}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWPID | unix.CLONE_NEWNS | netFlag | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Setsid:      true,
		UseCgroupFD: true,
		CgroupFD:    int(cgroup.Fd()),
	}
	log, err := os.Create(filepath.Join(s.dir, "stage.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatalf("start the sandbox: %v", err)
	}
	s.pid = cmd.Process.Pid
	go cmd.Wait()
	waitFor(t, "the program's first line", func() bool {
		// While another thread than the first calls execve(2), that one is a zombie.
		if pids, err := CgroupPIDs(s.cgroup); err == nil && len(pids) == 0 {
			text, _ := os.ReadFile(log.Name())
			t.Fatalf("the sandbox ended: %s", text)
		}
		return strings.Contains(s.output(), "\n")
	})
	return s
}

// output is what the program has written so far.
func (s *sandbox) output() string {
	data, _ := os.ReadFile(procPath(s.pid, "root/tmp/out"))
	return string(data)
}

// lines waits until n more lines have been written and returns all.
func (s *sandbox) moreLines(n int) []string {
	s.t.Helper()
	want := strings.Count(s.output(), "\n") + n
	waitFor(s.t, fmt.Sprintf("%d more lines", n), func() bool {
		if out := s.output(); strings.Contains(out, "ERROR") {
			s.t.Fatalf("the program failed: %s", tail(out))
		}
		return strings.Count(s.output(), "\n") >= want
	})
	out := s.output()
	return strings.Split(strings.TrimSpace(out[:strings.LastIndexByte(out, '\n')]), "\n")
}

func tail(s string) string { return s[max(0, len(s)-200):] }

func (s *sandbox) write(file, text string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.cgroup, file), []byte(text), 0); err != nil {
		s.t.Fatal(err)
	}
}

func (s *sandbox) freeze() {
	s.t.Helper()
	s.write("cgroup.freeze", "1")
	waitFor(s.t, "the cgroup to freeze", s.frozen)
}

func (s *sandbox) thaw() { s.t.Helper(); s.write("cgroup.freeze", "0") }

func (s *sandbox) frozen() bool {
	data, _ := os.ReadFile(filepath.Join(s.cgroup, "cgroup.events"))
	return strings.Contains(string(data), "frozen 1")
}

// kill ends every process and waits for it.
func (s *sandbox) kill() {
	waitFor(s.t, "the cgroup to become empty", func() bool {
		// Again each time: a process in the midst of execve(2) is passed over.
		_ = os.WriteFile(filepath.Join(s.cgroup, "cgroup.kill"), []byte("1"), 0)
		pids, err := CgroupPIDs(s.cgroup)
		return err != nil || len(pids) == 0
	})
}

func (s *sandbox) waitEmpty() {
	waitFor(s.t, "the cgroup to become empty", func() bool {
		pids, err := CgroupPIDs(s.cgroup)
		return err != nil || len(pids) == 0
	})
}

// request is a dump request of this sandbox into a new directory.
func (s *sandbox) request() DumpRequest {
	s.t.Helper()
	images, err := os.MkdirTemp(s.dir, "images")
	if err != nil {
		s.t.Fatal(err)
	}
	return DumpRequest{Pid: s.pid, ImagesDir: images, FreezeCgroup: s.cgroup, ExternalNetNS: true}
}

// restore brings images up in a new sandbox.
func (s *sandbox) restore(images string, mounts ...RestoreMount) *sandbox {
	s.t.Helper()
	n, err := s.tryRestore(s.t.Context(), images, nil, mounts...)
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(n.dir, restoreLog))
		s.t.Fatalf("restore: %v\n%s", err, tail(string(log)))
	}
	return n
}

// tryRestore calls at, which may be nil, at each event.
func (s *sandbox) tryRestore(ctx context.Context, images string, at func(*sandbox, Event) error, mounts ...RestoreMount) (*sandbox, error) {
	s.t.Helper()
	n := newSandbox(s.t, s.engine)
	root := filepath.Join(n.dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		s.t.Fatal(err)
	}
	ns := newNetNS(s.t)
	defer ns.Close()
	group, err := os.Open(n.cgroup)
	if err != nil {
		s.t.Fatal(err)
	}
	defer group.Close()
	// CRIU starts before its root is there.
	pending, err := s.engine.PrepareRestore(Birth{NetNS: ns, Cgroup: group})
	if err != nil {
		s.t.Fatal(err)
	}
	if err := unix.Mount("/", root, "", unix.MS_BIND, ""); err != nil {
		s.t.Fatal(err)
	}
	defer unix.Unmount(root, unix.MNT_DETACH)
	if err := unix.Mount("", root, "", unix.MS_PRIVATE, ""); err != nil {
		s.t.Fatal(err)
	}
	result, err := pending.Restore(ctx, RestoreRequest{
		ImagesDir:      images,
		WorkDir:        n.dir,
		Root:           root,
		ExternalMounts: mounts,
		Notify: func(_ context.Context, event Event, _ int) error {
			if at == nil {
				return nil
			}
			return at(n, event)
		},
	})
	if err == nil {
		n.pid = result.Pid
	}
	return n, err
}

// newNetNS makes a network namespace with its loopback up.
func newNetNS(t *testing.T) *os.File {
	t.Helper()
	type answer struct {
		file *os.File
		err  error
	}
	ready := make(chan answer)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ready <- answer{nil, err}
			return
		}
		if err := loopbackUp(); err != nil {
			ready <- answer{nil, err}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		ready <- answer{f, err}
	}()
	a := <-ready
	if a.err != nil {
		t.Fatal(a.err)
	}
	return a.file
}

func cgroup2Mount(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1]
		}
	}
	missing(t, "a cgroup v2 mount")
	return ""
}

// missing skips a test, but never in CI.
func missing(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("this test needs %s", what)
	}
	t.Skipf("this test needs %s", what)
}

// newEngine is the engine under test, or the end of the test.
func newEngine(t *testing.T) *Engine {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "root")
	}
	e, err := New(t.Context(), Options{
		Path:    os.Getenv("DORMOUSE_CRIU"),
		Libexec: filepath.Join(t.TempDir(), "libexec"),
		Shim:    compile(t, "shim/prlimit.c", "-shared", "-fPIC"),
	})
	if err != nil {
		missing(t, err.Error())
	}
	return e
}

func job(t *testing.T) string { t.Helper(); return compile(t, "testdata/job.c", "-static", "-pthread") }

func objects(t *testing.T) string {
	t.Helper()
	return compile(t, "testdata/objects.c", "-static", "-lutil", "-lrt")
}

// compile builds a C file with gcc.
func compile(t *testing.T, source string, flags ...string) string {
	t.Helper()
	if _, err := exec.LookPath("gcc"); err != nil {
		missing(t, "gcc")
	}
	out := filepath.Join(t.TempDir(), "compiled")
	args := append([]string{"-O1", "-Wall", "-o", out, source}, flags...)
	if text, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		t.Fatalf("gcc %s: %v\n%s", source, err, text)
	}
	return out
}

func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for tick := time.NewTicker(2 * time.Millisecond); ; {
		if done() {
			tick.Stop()
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
