package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	pureV2 = `25 1 0:23 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate
26 1 0:24 / /proc rw - proc proc rw`
	hybrid = `31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/my\040unified rw - cgroup2 cgroup2 rw`
	inContainer = `32 31 0:29 /docker/1 /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
41 31 0:38 / /c2 rw - cgroup2 cgroup2 rw`
	onlyV1 = `35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory`
)

func TestDetection(t *testing.T) {
	for _, c := range []struct{ mounts, unified, cpu, memory string }{
		{pureV2, "/sys/fs/cgroup", "", ""},
		{hybrid, "/sys/fs/cgroup/my unified", "/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/memory"},
		{inContainer, "/c2", "", ""}, // a subtree of a hierarchy is not the hierarchy
	} {
		h, err := parse(strings.NewReader(c.mounts))
		if err != nil {
			t.Errorf("%v", err)
			continue
		}
		if h.Unified != c.unified || h.V1["cpu"] != c.cpu || h.V1["memory"] != c.memory {
			t.Errorf("got %+v, want %+v", h, c)
		}
	}
	if _, err := parse(strings.NewReader(onlyV1)); !errors.Is(err, ErrNoUnified) {
		t.Errorf("without cgroup2: got %v, want ErrNoUnified", err)
	}
}

func TestRelativePaths(t *testing.T) {
	h := &Hierarchies{Unified: "/sys/fs/cgroup"}
	for path, want := range map[string]string{
		"a/b": "a/b", "/a/b": "a/b", "/sys/fs/cgroup/a/b": "a/b", "a/../../b": "b", "a//b/": "a/b",
	} {
		if got, err := h.Relative(path); err != nil || got != want {
			t.Errorf("Relative(%q) = %q, %v, want %q", path, got, err, want)
		}
	}
	for _, path := range []string{"", "/", "..", "/sys/fs/cgroup/"} {
		if got, err := h.Relative(path); err == nil && got == "" {
			t.Errorf("Relative(%q) is the root", path)
		}
	}
}

func TestNoDirectoryIsCalledTasksInV1(t *testing.T) {
	if got := V1Path("x/tasks/y"); got != "x/tasks.d/y" {
		t.Errorf("got %q", got)
	}
}

// A machine whose v2 hierarchy has cpu and memory, imitated by plain
// directories: what would be written to the kernel is looked at.
func TestUnifiedLimitsAreWrittenWhereThereAreControllers(t *testing.T) {
	root := t.TempDir()
	path := "node/tasks/t"
	for dir := filepath.Join(root, path); strings.HasPrefix(dir, root); dir = filepath.Dir(dir) {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"cgroup.subtree_control", "cpu.max", "memory.max", "memory.swap.max"} {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	g := &Group{Unified: filepath.Join(root, path)}
	h := &Hierarchies{Unified: root, V1: map[string]string{}}
	if err := errors.Join(g.limitCPU(h, path, 1.5, true, false), g.limitMemory(h, path, 1<<20, true)); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"cpu.max": "150000 100000", "memory.max": "1048576", "memory.swap.max": "0"} {
		if got, err := os.ReadFile(filepath.Join(root, path, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q (%v), want %q", name, got, err, want)
		}
	}
	if len(g.V1) != 0 {
		t.Errorf("v1 directories on a v2 machine: %v", g.V1)
	}
}

func TestALimitThatCannotBeEnforcedIsAnError(t *testing.T) {
	h := &Hierarchies{Unified: t.TempDir(), V1: map[string]string{}}
	_, err := h.Create("node/t", Limits{CPUs: 1})
	if err == nil || !strings.Contains(err.Error(), "cpu limit cannot be enforced") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(filepath.Join(h.Unified, "node/t")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a failed Create left its directory (%v)", err)
	}
}

// newGroup is a real cgroup.
func newGroup(t *testing.T, limits Limits) *Group {
	t.Helper()
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("making cgroups needs root")
		}
		t.Skip("making cgroups needs root")
	}
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	parent := fmt.Sprintf("dormouse-cgroup-test-%d", os.Getpid())
	g, err := h.Create(parent+"/t", limits)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := errors.Join(g.Kill(), g.Remove(ctx), g.Remove(ctx)); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		_ = syscall.Rmdir(filepath.Join(h.Unified, parent))
		for _, mount := range h.V1 {
			_ = syscall.Rmdir(filepath.Join(mount, parent))
		}
	})
	return g
}

// start puts a program into a group.
func start(t *testing.T, g *Group, command ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(command[0], command[1:]...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if err := enter(g, cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	return cmd
}

func TestLifeOfAGroup(t *testing.T) {
	g := newGroup(t, Limits{CPUs: 1, MemBytes: 64 << 20})
	cmd := start(t, g, "sleep", "1000")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if pids, err := g.Pids(); err != nil || len(pids) != 1 || pids[0] != cmd.Process.Pid {
		t.Errorf("Pids: %v %v, want %d", pids, err, cmd.Process.Pid)
	}
	for range 3 {
		if err := g.Freeze(ctx); err != nil {
			t.Fatal(err)
		}
		if frozen, err := g.Frozen(); err != nil || !frozen {
			t.Errorf("Frozen after Freeze: %v %v", frozen, err)
		}
		if err := g.Thaw(ctx); err != nil {
			t.Fatal(err)
		}
		if frozen, err := g.Frozen(); err != nil || frozen {
			t.Errorf("Frozen after Thaw: %v %v", frozen, err)
		}
	}
	short, stop := context.WithTimeout(ctx, 20*time.Millisecond)
	defer stop()
	if err := g.WaitEmpty(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("WaitEmpty of a full group: %v", err)
	}
	if err := g.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := g.WaitEmpty(ctx); err != nil {
		t.Error(err)
	}
}

func TestRealtimeShareIsGivenAndReturned(t *testing.T) {
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(h.V1["cpu"], realtimeFile)); err != nil || h.V1["cpu"] == "" {
		t.Skip("this kernel does not ration real time among cgroups, so there is nothing to give")
	}
	share := func(path string) string {
		content, err := os.ReadFile(filepath.Join(h.V1["cpu"], path, realtimeFile))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(content))
	}
	g := newGroup(t, Limits{CPUs: 1, Realtime: true})
	parent := fmt.Sprintf("dormouse-cgroup-test-%d", os.Getpid())
	if got, above := share(parent+"/t"), share(parent); got != "50000" || above != "50000" {
		t.Errorf("the group has %s, its parent %s, want 50000 each", got, above)
	}
	if err := g.Remove(context.Background()); err != nil {
		t.Fatal(err)
	}
	if above := share(parent); above != "0" {
		t.Errorf("the parent keeps %s", above)
	}
}

// On a machine without v1 a program filters devices; both ways let the same
// through.
func TestDevicesAreFilteredEitherWay(t *testing.T) {
	for name, v1 := range map[string]bool{"v1": true, "v2": false} {
		t.Run(name, func(t *testing.T) {
			g := newGroup(t, Limits{})
			h, err := Detect()
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := h.V1["devices"]; v1 && !ok {
				t.Skip("this machine has no v1 devices hierarchy")
			}
			if !v1 {
				for _, dir := range g.V1 {
					if err := syscall.Rmdir(dir); err != nil {
						t.Fatal(err)
					}
				}
				g.V1 = nil
				if err := g.attachDeviceFilter(); err != nil {
					t.Fatal(err)
				}
			}
			dir, err := os.MkdirTemp("/var/lib", "dormouse-test-*")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(dir) })
			out := filepath.Join(dir, "out")
			cmd := exec.Command("sh", "-c", `read go; cd $0
				for d in null zero full random urandom ptmx; do head -c0 /dev/$d && echo opened $d; done
				mknod disk b 254 0 && echo made disk; head -c1 disk || echo closed disk
				mknod kmem c 1 2 && echo made kmem; head -c1 kmem || echo closed kmem
				mknod loop c 10 237 && echo made loop; head -c1 loop || echo closed loop`, dir)
			file, err := os.Create(out)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			cmd.Stdout = file
			input, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if err := enter(g, cmd.Process.Pid); err != nil {
				t.Fatal(err)
			}
			if _, err := input.Write([]byte("go\n")); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait() // the script says itself how it went
			content, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			want := "opened null\nopened zero\nopened full\nopened random\nopened urandom\nopened ptmx\nmade disk\nclosed disk\nmade kmem\nclosed kmem\nmade loop\nclosed loop\n"
			if string(content) != want {
				t.Errorf("got:\n%swant:\n%s", content, want)
			}
		})
	}
}

// A shell that does nothing but start programs is inside vfork much of the
// time; a tracer must still be able to take hold of what is frozen.
func TestFreezeAvoidsVfork(t *testing.T) {
	g := newGroup(t, Limits{})
	start(t, g, "sh", "-c", "while :; do /bin/true; done")
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for range 100 {
		if err := g.Freeze(ctx); err != nil {
			t.Fatal(err)
		}
		if threads := g.inVfork(); len(threads) != 0 {
			t.Errorf("frozen inside vfork: %v", threads)
		}
		if err := g.Thaw(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// enter moves a process into all cgroups of the group.
func enter(g *Group, pid int) error {
	return errors.Join(write(g.Unified, "cgroup.procs", strconv.Itoa(pid)), g.EnterV1(pid))
}
