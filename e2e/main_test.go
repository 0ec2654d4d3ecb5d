package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/e2e/cluster"
	"dormouse/internal/ownnet"
)

// built is what TestMain made for all tests. It lies outside of /tmp, which a
// job does not share with the host.
var built struct {
	dir      string // removed at the end
	bin      string // dormouse, dormouse-init, the preload library
	killable string // the same with failpoints
	programs string
}

// together is how many tests run at once: each one is mostly a wait.
const together = "4"

func TestMain(m *testing.M) {
	if err := ownnet.EnterIfRoot(); err != nil {
		os.Exit(complain(err))
	}
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if why := missing(); why != "" {
		return without(m, why)
	}
	flag.Set("test.parallel", together)
	dir, err := os.MkdirTemp("/var/tmp", "dormouse-e2e-")
	if err != nil {
		return complain(err)
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755) // jobs of ordinary users read the programs
	if err := build(dir); err != nil {
		return complain(err)
	}
	status := m.Run()
	if err := endShared(); err != nil {
		return complain(err)
	}
	return status
}

func complain(err error) int {
	fmt.Fprintln(os.Stderr, "e2e:", err)
	return 1
}

// missing says what the machine lacks for these tests, or nothing.
func missing() string {
	if os.Getuid() != 0 {
		return "the end-to-end tests need root"
	}
	criu := os.Getenv("DORMOUSE_CRIU")
	if criu == "" {
		criu = "/opt/dormouse/criu/sbin/criu"
	}
	for _, tool := range []string{criu, "gcc", "python3", "redis-server", "redis-cli", "node", "mpirun.openmpi", "mpicc.openmpi", "mpiexec.hydra", "mpicc.mpich"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Sprintf("%s is missing: run `make setup`", tool)
		}
	}
	return ""
}

// without skips every test with the reason; on CI it fails them.
func without(m *testing.M, why string) int {
	if os.Getenv("CI") == "true" {
		return complain(errors.New(why))
	}
	unavailable = why
	return m.Run()
}

var unavailable string

func build(dir string) error {
	built.dir, built.bin, built.killable, built.programs = dir, filepath.Join(dir, "bin"), filepath.Join(dir, "killable"), filepath.Join(dir, "programs")
	for _, made := range []string{built.bin, built.killable, built.programs} {
		if err := os.Mkdir(made, 0o755); err != nil {
			return err
		}
	}
	shim, err := filepath.Glob("../agent/criu/shim/*.c")
	if err != nil {
		return err
	}
	matrix, err := filepath.Glob("programs/matrix/*.c")
	if err != nil {
		return err
	}
	pure := []string{"CGO_ENABLED=0"}
	goBuild := func(out, tags, path string) error {
		return tool(pure, "go", "build", "-trimpath", "-tags", tags, "-o", out, path)
	}
	gcc := func(out string, args ...string) error {
		return tool(nil, "gcc", append([]string{"-O1", "-pthread", "-o", out}, args...)...)
	}
	steps := []func() error{
		func() error { return goBuild(built.bin+"/dormouse", "", "../cmd/dormouse") },
		func() error { return goBuild(built.killable+"/dormouse", "failpoint", "../cmd/dormouse") },
		func() error { return gcc(built.programs+"/matrix", matrix...) },
		func() error { return gcc(built.programs+"/memory", "programs/memory.c") },
		func() error { return goBuild(built.programs+"/web", "", "./programs/web") },
		func() error {
			return tool(nil, "cp", "programs/steps.py", "programs/tree.py", "programs/terminal.py", "programs/files.py", "programs/load.py", "programs/thrash.py", "programs/direct.py", "programs/pipeline.sh", "programs/server.js",
				"programs/parallel/pair.py", "programs/parallel/redis_pair.py", "programs/parallel/workers.py", "programs/parallel/asks.sh", "programs/parallel/outside.py", built.programs)
		},
	}
	for _, mpi := range []string{"openmpi", "mpich"} {
		for _, name := range []string{"stencil", "ring"} {
			steps = append(steps, func() error {
				return tool(nil, "mpicc."+mpi, "-O2", "-o", built.programs+"/"+name+"."+mpi, "programs/mpi/"+name+".c")
			})
		}
	}
	for _, bin := range []string{built.bin, built.killable} {
		steps = append(steps,
			func() error { return goBuild(bin+"/dormouse-init", "", "../cmd/dormouse-init") },
			func() error {
				return gcc(bin+"/libdormouse-criu.so", append([]string{"-shared", "-fPIC"}, shim...)...)
			})
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func tool(env []string, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// shared is the `dormouse up` that most tests use.
var shared struct {
	once sync.Once
	c    *cluster.Cluster
	dir  string
	err  error
}

func startShared() (*cluster.Cluster, error) {
	shared.once.Do(func() {
		shared.dir = filepath.Join(built.dir, "shared")
		shared.c, shared.err = startUp(built.bin, shared.dir, nil, roomy...)
	})
	return shared.c, shared.err
}

// roomy has place for every test that runs at once: what a node offers is a
// promise, not the machine's own size.
var roomy = []string{"--cloud", "east=2", "--cloud", "west=2", "--cpus", "64", "--mem", "64G"}

func startUp(bin, dir string, env []string, args ...string) (*cluster.Cluster, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	// Tests side by side starve each other's jobs; only some are about that.
	if !slices.Contains(args, "--on-starvation") {
		args = append(slices.Clone(args), "--on-starvation", api.StarvationIgnore)
	}
	return cluster.Start(ctx, cluster.Options{Binary: bin + "/dormouse", State: filepath.Join(dir, "state"), Args: args, Env: env, Log: logFile(filepath.Join(dir, "up.log"))})
}

// logFile appends to a file that it keeps closed, so that what it lies on can be unmounted.
type logFile string

func (l logFile) Write(p []byte) (int, error) {
	f, err := os.OpenFile(string(l), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return 0, err
	}
	n, err := f.Write(p)
	return n, errors.Join(err, f.Close())
}

// endShared stops the shared `up` and checks that it leaves nothing behind.
func endShared() error {
	if shared.c == nil {
		return shared.err
	}
	return stopUp(shared.c)
}

func stopUp(c *cluster.Cluster) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := c.Stop(ctx); err != nil {
		return err
	}
	left, err := c.Leftovers()
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("`dormouse up` left behind: %s", strings.Join(left, "; "))
	}
	return err
}
