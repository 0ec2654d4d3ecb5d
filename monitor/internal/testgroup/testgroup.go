// Package testgroup gives a test control groups of its own with real processes
// in them, on machines with cgroup v2, v1 or both. Everything is removed with
// the test.
package testgroup

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Group is one control group: a directory in cgroup v2 and one in each v1
// hierarchy that was asked for.
type Group struct {
	t       testing.TB
	Unified string
	V1      map[string]string // by controller
}

// New makes a group with directories in the v1 hierarchies of controllers, as
// far as this machine has them.
func New(t testing.TB, controllers ...string) *Group {
	t.Helper()
	points := mounts(t)
	if os.Getuid() != 0 || points[""] == "" {
		skip(t, "needs root and a mounted cgroup2 file system")
	}
	g := &Group{t: t, V1: map[string]string{}}
	g.Unified = g.mkdir(points[""])
	for _, controller := range controllers {
		if point := points[controller]; point != "" {
			g.V1[controller] = g.mkdir(point)
		}
	}
	return g
}

// skip where a developer's machine lacks something; where the tests must all run
// it is a failure.
func skip(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

func (g *Group) mkdir(parent string) string {
	g.t.Helper()
	dir, err := os.MkdirTemp(parent, "monitor-test-")
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() {
		if err := g.remove(dir); err != nil {
			g.t.Error(err)
		}
	})
	return dir
}

// remove dir, which its processes leave a moment after they were waited for.
func (g *Group) remove(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for {
		err := os.Remove(dir)
		if err == nil || ctx.Err() != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// LimitCPU to as many processors' worth of time; 0 lifts the limit.
func (g *Group) LimitCPU(cpus float64) {
	g.t.Helper()
	const period = 100_000
	quota := strconv.Itoa(int(cpus * period))
	if dir := g.V1["cpu"]; dir != "" {
		if cpus == 0 {
			quota = "-1"
		}
		g.write(filepath.Join(dir, "cpu.cfs_quota_us"), quota)
		return
	}
	if cpus == 0 {
		quota = "max"
	}
	if _, err := os.Stat(filepath.Join(g.Unified, "cpu.max")); err != nil {
		skip(g.t, "needs a cpu controller: "+err.Error())
	}
	g.write(filepath.Join(g.Unified, "cpu.max"), fmt.Sprintf("%s %d", quota, period))
}

func (g *Group) write(path, value string) {
	g.t.Helper()
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		g.t.Fatal(err)
	}
}

// LimitMemory to so many bytes, page cache included.
func (g *Group) LimitMemory(bytes int) {
	g.t.Helper()
	path := filepath.Join(g.Unified, "memory.max")
	if dir := g.V1["memory"]; dir != "" {
		path = filepath.Join(dir, "memory.limit_in_bytes")
	}
	if _, err := os.Stat(path); err != nil {
		skip(g.t, "needs a memory controller: "+err.Error())
	}
	g.write(path, strconv.Itoa(bytes))
}

// Favour the group over others: the share of the CPU it gets is that of so many
// ordinary groups.
func (g *Group) Favour(times int) {
	g.t.Helper()
	if dir := g.V1["cpu"]; dir != "" {
		g.write(filepath.Join(dir, "cpu.shares"), strconv.Itoa(1024*times))
		return
	}
	if _, err := os.Stat(filepath.Join(g.Unified, "cpu.weight")); err != nil {
		skip(g.t, "needs a cpu controller: "+err.Error())
	}
	g.write(filepath.Join(g.Unified, "cpu.weight"), strconv.Itoa(100*times))
}

// Freeze or thaw the group.
func (g *Group) Freeze(frozen bool) {
	g.t.Helper()
	g.write(filepath.Join(g.Unified, "cgroup.freeze"), map[bool]string{true: "1", false: "0"}[frozen])
}

// Start runs a shell script in the group until the test ends.
func (g *Group) Start(script string) *os.Process {
	g.t.Helper()
	// The shell waits to be told to go on until it is in the group. The limit is
	// for a test that dies without cleaning up.
	cmd := exec.Command("sh", "-c", "read go; ulimit -t 120; "+script)
	var output bytes.Buffer
	cmd.Stderr = &output
	in, err := cmd.StdinPipe()
	if err != nil {
		g.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() {
		g.kill()
		_ = cmd.Wait() // killed: that is its error
		if output.Len() > 0 {
			g.t.Logf("%s: %s", script, output.String())
		}
	})
	for _, dir := range g.dirs() {
		g.write(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(cmd.Process.Pid))
	}
	if _, err := fmt.Fprintln(in, "go"); err != nil {
		g.t.Fatal(err)
	}
	return cmd.Process
}

// kill everything in the group, with what the shells have started.
func (g *Group) kill() {
	if err := os.WriteFile(filepath.Join(g.Unified, "cgroup.kill"), []byte("1"), 0); err != nil {
		g.t.Error(err)
	}
}

func (g *Group) dirs() []string {
	dirs := []string{g.Unified}
	for _, dir := range g.V1 {
		dirs = append(dirs, dir)
	}
	return dirs
}

// mounts of the hierarchies by controller; "" is cgroup v2.
func mounts(t testing.TB) map[string]string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	points := map[string]string{}
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) < 4 {
			continue
		}
		switch words[2] {
		case "cgroup2":
			points[""] = words[1]
		case "cgroup":
			for option := range strings.SplitSeq(words[3], ",") {
				points[option] = words[1]
			}
		}
	}
	return points
}

// Pin process pid, and what it starts from now on, to the n-th of the CPUs this
// test may use, counted from 0 and around again.
func Pin(t testing.TB, pid, n int) {
	t.Helper()
	var allowed, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		t.Fatal(err)
	}
	n %= allowed.Count()
	for cpu := range 64 * len(allowed) {
		if !allowed.IsSet(cpu) {
			continue
		}
		if n == 0 {
			one.Set(cpu)
			break
		}
		n--
	}
	if err := unix.SchedSetaffinity(pid, &one); err != nil {
		t.Fatal(err)
	}
}
