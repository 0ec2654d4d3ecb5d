package sandbox_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"dormouse/agent/criu"
	"dormouse/agent/sandbox"
	"dormouse/api"

	"golang.org/x/sys/unix"
)

// newEngine is the real CRIU.
func newEngine(t *testing.T) *criu.Engine {
	t.Helper()
	path := os.Getenv("DORMOUSE_CRIU")
	if path == "" {
		path = criu.DefaultPath
	}
	if _, err := os.Stat(path); err != nil {
		missing(t, "this test needs a CRIU that works, at %s: run `make setup`", path)
	}
	shim := filepath.Join(t.TempDir(), "shim.so")
	if out, err := exec.Command("gcc", "-shared", "-fPIC", "-O2", "-o", shim, "../criu/shim/prlimit.c").CombinedOutput(); err != nil {
		missing(t, "this test needs gcc: %v: %s", err, out)
	}
	engine, err := criu.New(context.Background(), criu.Options{Path: path, Libexec: t.TempDir(), Shim: shim})
	if err != nil {
		t.Fatal(err)
	}
	return engine
}

// image is a sandbox that sleeps.
type image struct {
	images, upper string
	config        sandbox.Config
}

// suspend dumps a sandbox, keeps its upper layer, and destroys it.
func (b *bench) suspend(engine *criu.Engine, s *sandbox.Sandbox) image {
	b.t.Helper()
	saved := image{images: b.t.TempDir(), upper: filepath.Join(b.dir, s.ID()+"-saved"), config: s.Config()}
	if err := b.dump(engine, s, saved); err != nil {
		b.t.Fatalf("dump: %v", err)
	}
	if err := s.Destroy(b.context(), sandbox.DestroyOptions{}); err != nil {
		b.t.Fatal(err)
	}
	return saved
}

func (b *bench) dump(engine *criu.Engine, s *sandbox.Sandbox, to image) error {
	if err := s.Quiesce(b.context()); err != nil {
		return err
	}
	defer s.Unquiesce(b.context())
	if err := s.Freeze(b.context()); err != nil {
		return err
	}
	defer s.Thaw(b.context())
	return b.capture(engine, s, to)
}

// capture dumps a frozen sandbox.
func (b *bench) capture(engine *criu.Engine, s *sandbox.Sandbox, to image) error {
	request := criu.DumpRequest{Pid: s.Pid(), ImagesDir: to.images, LeaveRunning: true, FreezeCgroup: s.CgroupPath(), ExternalNetNS: true}
	for _, x := range s.External() {
		request.ExternalMounts = append(request.ExternalMounts, criu.DumpMount{Key: x.Key, Mountpoint: x.Mountpoint})
	}
	// At this moment CRIU's links to files that have no name any more are there.
	request.Notify = func(_ context.Context, event criu.Event, _ int) error {
		if event != criu.EventPostDump {
			return nil
		}
		if out, err := exec.Command("cp", "-a", s.UpperDir(), to.upper).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return stripXattrs(to.upper)
	}
	_, err := engine.Dump(b.context(), request)
	return err
}

// stripXattrs removes what must not travel.
func stripXattrs(dir string) error {
	return filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		names := make([]byte, 4096)
		n, err := unix.Llistxattr(path, names)
		if err != nil {
			return err
		}
		for name := range strings.SplitSeq(strings.TrimRight(string(names[:n]), "\x00"), "\x00") {
			if name != "" && !sandbox.KeepXattr(name) {
				if err := unix.Lremovexattr(path, name); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// resume restores an image into a new sandbox, as another node would.
func (b *bench) resume(engine *criu.Engine, saved image) *sandbox.Sandbox {
	b.t.Helper()
	s, err := b.tryResume(engine, saved)
	if err != nil {
		b.t.Fatalf("restore: %v", err)
	}
	return s
}

func (b *bench) tryResume(engine *criu.Engine, saved image) (*sandbox.Sandbox, error) {
	s := b.create(b.again(saved))
	return s, b.restore(engine, saved, s, nil, nil)
}

// again is the configuration of a copy.
func (b *bench) again(saved image) sandbox.Config {
	fresh := b.config("")
	cfg := saved.config
	cfg.ID, cfg.Dir = fresh.ID, fresh.Dir
	return cfg
}

// restore puts an image into a sandbox that was created for it. Without an
// error of held, which is given the sandbox's network while no process runs, it
// goes on; woken is given pid 1 then.
func (b *bench) restore(engine *criu.Engine, saved image, s *sandbox.Sandbox, held func(netns *os.File) error, woken func(pid int)) error {
	if err := os.Remove(s.UpperDir()); err != nil {
		return err
	}
	if out, err := exec.Command("cp", "-a", saved.upper, s.UpperDir()).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	netns, err := b.runtime.MakeNetwork(s.Config())
	if err != nil {
		return err
	}
	defer netns.Close()
	if err := b.runtime.Connect(b.context(), s.Config(), netns); err != nil {
		return err
	}
	group, tasks, err := s.OpenCgroup()
	if err != nil {
		return err
	}
	defer group.Close()
	pending, err := engine.PrepareRestore(criu.Birth{NetNS: netns, Cgroup: group, Tasks: tasks})
	if err != nil {
		return err
	}
	target, err := s.PrepareRestore(b.context(), netns)
	if err != nil {
		pending.Abort()
		return err
	}
	request := criu.RestoreRequest{ImagesDir: saved.images, WorkDir: b.t.TempDir(), Root: target.Root}
	for _, x := range target.External {
		request.ExternalMounts = append(request.ExternalMounts, criu.RestoreMount{Key: x.Key, Source: x.Source})
	}
	var tree *sandbox.Restored
	request.Notify = func(_ context.Context, event criu.Event, pid int) (err error) {
		switch {
		case event == criu.EventNetworkUnlock && held != nil:
			return held(netns)
		case event == criu.EventPreResume:
			tree, err = s.Recognize(pid)
		}
		return err
	}
	result, err := pending.Restore(b.context(), request)
	if err != nil {
		tree.Close()
		return err
	}
	if woken != nil {
		woken(result.Pid)
	}
	return s.FinishRestore(b.context(), tree)
}

func TestCheckpointAndRestoreOverGenerations(t *testing.T) {
	engine := newEngine(t)
	b := newBench(t)
	data := filepath.Join(b.dir, "data")
	if err := os.Mkdir(data, 0o755); err != nil {
		t.Fatal(err)
	}
	cfg := b.config(`
echo in root > /var/lib/state; echo in tmp > /tmp/state; echo in shm > /dev/shm/state; rm /etc/fstab
trap 'cat /var/lib/state /tmp/state /dev/shm/state /data/state; test ! -e /etc/fstab && echo gone; hostname; cat /etc/hosts; exit 21' TERM
i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done`)
	cfg.Volumes = []api.Volume{{Source: data, Destination: "/data"}}
	cfg.Hosts = []sandbox.Host{{Name: "task-0", IP: "10.99.0.1"}}
	s := b.start(cfg)
	for generation := range 3 {
		b.eventually("it counts on", func() bool { return strings.Count(b.log(s, "stdout"), "\n") > 10*(generation+1) })
		s = b.resume(engine, b.suspend(engine, s))
	}
	if code, out, _ := b.exec(s, "cat /proc/1/comm; ip addr show lo"); code != 0 || !strings.Contains(out, "10.99.0.1/32") {
		t.Errorf("exec in a restored sandbox: %d %q", code, out)
	}
	if err := os.WriteFile(data+"/state", []byte("in volume\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.Signal(b.context(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := b.wait(s); got.Code != 21 {
		t.Errorf("got %+v, want the command's own exit status 21; stderr: %s", got, b.log(s, "stderr"))
	}
	lines := strings.Split(b.log(s, "stdout"), "\n")
	n := 1
	for ; lines[n-1] == fmt.Sprint(n); n++ {
	}
	if n < 30 {
		t.Errorf("the count breaks off at line %d: %q", n, lines[n-1])
	}
	rest := strings.Join(lines[n-1:], "\n")
	if !strings.HasPrefix(rest, "in root\nin tmp\nin shm\nin volume\ngone\ntask-0\n127.0.0.1") {
		t.Errorf("after the count: %q", rest)
	}
	contains(t, "hosts", rest, "10.99.0.1\ttask-0")
}

func TestTheJobOfAnOrdinaryUserIsRestored(t *testing.T) {
	engine := newEngine(t)
	b := newBench(t)
	cfg := b.config(`echo mine > /tmp/mine; trap 'id -u; id -G; grep -E "CapEff|CapBnd|NoNew" /proc/self/status; cat /tmp/mine; exit 0' TERM; echo ready; while :; do sleep 0.01; done`)
	cfg.User, cfg.CapAdd = "daemon", []string{"NET_ADMIN"}
	s := b.start(cfg)
	b.logs(s, "ready")
	s = b.resume(engine, b.suspend(engine, s))
	if err := s.Signal(b.context(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	b.wait(s)
	expect(t, "after the restore", b.log(s, "stdout"), "ready\n1\n1\nCapEff:\t0000000000001000\nCapBnd:\t00000000a80435fb\nNoNewPrivs:\t1\nmine\n")
}

func TestLimitsHoldAfterARestore(t *testing.T) {
	engine := newEngine(t)
	b := newBench(t)
	cfg := b.config(`trap 'x=$(head -c 200000000 /dev/zero | tr "\0" a)' USR1; echo ready; while :; do sleep 0.01; done`)
	cfg.MemBytes = 48 << 20
	s := b.start(cfg)
	b.logs(s, "ready")
	s = b.resume(engine, b.suspend(engine, s))
	if err := s.Signal(b.context(), syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	if got := b.wait(s); !got.OOMKilled {
		t.Errorf("got %+v, want a kill for want of memory", got)
	}
}

func TestExecSurvivesACheckpointAndEndsWithARestoreElsewhere(t *testing.T) {
	engine := newEngine(t)
	b := newBench(t)
	s := b.start(b.config("exec sleep 1000"))
	input, typed := io.Pipe()
	defer typed.Close()
	out, done := newWatcher(), make(chan error, 1)
	go func() {
		_, err := s.Exec(b.context(), sandbox.ExecRequest{Command: []string{"sh", "-c", "while read x; do echo got $x; done"}, TTY: true, Stdin: input, Stdout: out})
		done <- err
	}()
	io.WriteString(typed, "one\n")
	out.await(t, "got one")
	saved := image{images: t.TempDir(), upper: filepath.Join(b.dir, "saved"), config: s.Config()}
	if err := b.dump(engine, s, saved); err != nil {
		t.Fatal(err)
	}
	io.WriteString(typed, "two\n")
	out.await(t, "got two")
	if err := s.Destroy(b.context(), sandbox.DestroyOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Error("the session of a destroyed sandbox ended without a reason")
	}
	elsewhere := b.resume(engine, saved)
	b.eventually("the session that nobody holds is hung up", func() bool {
		code, _, _ := b.exec(elsewhere, "grep -q 'while read' /proc/[3-9]*/cmdline")
		return code != 0
	})
}

// A program may be over before anybody looks: one that was about to end.
func TestWhatEndsAsSoonAsItIsRestoredHasItsOwnExitStatus(t *testing.T) {
	engine := newEngine(t)
	b := newBench(t)
	s := b.start(b.config(`exec bash -c 'echo ready; a=$EPOCHREALTIME; until b=$EPOCHREALTIME; ((${b/./} - ${a/./} > 300000)); do a=$b; done; exit 7'`))
	b.logs(s, "ready")
	saved := b.suspend(engine, s)
	time.Sleep(300 * time.Millisecond) // what it waits for
	again := b.create(b.again(saved))
	ended := func(pid int) {
		b.eventually("it has ended", func() bool {
			state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			return err != nil || strings.Contains(string(state), ") Z ")
		})
	}
	if err := b.restore(engine, saved, again, nil, ended); err != nil {
		t.Fatal(err)
	}
	if got := b.wait(again); got.Code != 7 {
		t.Errorf("got %+v, want exit status 7", got)
	}
}

func TestAFailedRestoreLeavesNothing(t *testing.T) {
	engine := newEngine(t)
	b := newBench(t)
	saved := b.suspend(engine, b.start(b.config("exec sleep 1000")))
	if err := os.Remove(filepath.Join(saved.images, "pstree.img")); err != nil {
		t.Fatal(err)
	}
	if _, err := b.tryResume(engine, saved); err == nil {
		t.Fatal("restored from damaged images")
	}
	// The bench checks that Destroy, which comes with its clean-up, cleans all.
}

func TestPrepareRestoreRefusesWhatIsNoCheckpoint(t *testing.T) {
	b := newBench(t)
	s := b.create(b.config("true"))
	netns, err := b.runtime.MakeNetwork(s.Config())
	if err != nil {
		t.Fatal(err)
	}
	defer netns.Close()
	if _, err := s.PrepareRestore(b.context(), netns); err == nil {
		t.Error("an empty upper layer passed for a checkpoint")
	}
}

// What an overlay root is known to break in CRIU, on files and directories of
// either layer.
func TestHoldsOnFilesOfTheOverlaySurvive(t *testing.T) {
	engine := newEngine(t)
	b := newBench(t)
	bin := filepath.Join(b.dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("gcc", "-O1", "-Wall", "-o", bin+"/hold", "testdata/hold.c").CombinedOutput(); err != nil {
		missing(t, "this test needs gcc: %v: %s", err, out)
	}
	for _, hold := range []string{
		"inotify /usr/local", "inotify /newdir", "inotify /tmp",
		"fanotify /usr/local", "fanotify /newdir",
		"flock /etc/passwd", "flock /newfile", "posix /etc/passwd", "posix /newfile",
		"ofd /etc/passwd", "ofd /newfile", "lease /etc/passwd", "lease /newfile",
		"deleted /newfile", "deleted /etc/passwd", "unlinked /newfile",
	} {
		cfg := b.config("mkdir /newdir; exec /prog/hold " + hold)
		cfg.Volumes = []api.Volume{{Source: bin, Destination: "/prog", ReadOnly: true}}
		cfg.CapAdd = []string{"SYS_ADMIN"} // fanotify needs it
		s := b.start(cfg)
		b.logs(s, "ready")
		for range 2 {
			s = b.resume(engine, b.suspend(engine, s))
		}
		if err := s.Signal(b.context(), syscall.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		b.wait(s)
		expect(t, hold, b.log(s, "stdout"), "ready\nkept\n")
		if err := s.Destroy(b.context(), sandbox.DestroyOptions{}); err != nil {
			t.Error(err)
		}
	}
}
