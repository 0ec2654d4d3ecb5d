package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"dormouse/drivers"
	"dormouse/drivers/drivertest"
	"dormouse/internal/ownnet"
)

// The test binary is also the agent, a real process with a real task, and the
// anchor.
const (
	agentArgument  = "stand-in-for-the-agent"
	anchorArgument = "stand-in-for-the-anchor"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == anchorArgument {
		for {
			syscall.Pause()
		}
	}
	if len(os.Args) == 3 && os.Args[1] == agentArgument {
		if err := standIn(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	if err := ownnet.EnterIfRoot(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// standIn starts one task in the cgroup for tasks, unless it runs, writes down
// both pids, and stays.
func standIn(configFile string) error {
	raw, err := os.ReadFile(configFile)
	if err != nil {
		return err
	}
	var config struct{ State, Cgroup string }
	if err := json.Unmarshal(raw, &config); err != nil {
		return err
	}
	if err := os.MkdirAll(config.State, 0o700); err != nil {
		return err
	}
	task := filepath.Join(config.State, "task")
	if _, err := os.Stat(task); err != nil {
		groups, err := findCgroups("")
		if err != nil {
			return err
		}
		place, err := os.Open(filepath.Join(groups.unified, config.Cgroup))
		if err != nil {
			return err
		}
		sleep := exec.Command("sleep", "600")
		sleep.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(place.Fd())}
		if err := sleep.Start(); err != nil {
			return err
		}
		if err := writeFile(task, []byte(strconv.Itoa(sleep.Process.Pid))); err != nil {
			return err
		}
	}
	if err := writeFile(filepath.Join(config.State, "agent"), []byte(strconv.Itoa(os.Getpid()))); err != nil {
		return err
	}
	return syscall.Pause()
}

// site is a platform of virtual nodes for one test.
type site struct {
	dir, group string
}

func newSite(t *testing.T) *site {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test needs root: virtual nodes are namespaces and cgroups")
		}
		t.Skip("needs root: virtual nodes are namespaces and cgroups")
	}
	return &site{dir: t.TempDir(), group: fmt.Sprintf("dormouse-test-%d-%d", os.Getpid(), time.Now().UnixNano())}
}

func (s *site) open(t *testing.T) *Driver {
	fabric, err := NewFabric(filepath.Join(s.dir, "fabric.json"), s.group, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := fabric.Close(); err != nil {
			t.Error(err)
		}
	})
	d, err := New(Options{Cloud: "test", Dir: s.dir, Group: s.group, Logger: slog.New(slog.DiscardHandler),
		Fabric: fabric, Hold: []string{"/proc/self/exe", anchorArgument},
		Command: func(file string) []string { return []string{"/proc/self/exe", agentArgument, file} },
		Bootstrap: func(context.Context, string) (drivers.Bootstrap, error) {
			return drivers.Bootstrap{URL: "unix:///nowhere", Token: "secret"}, nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestConformance(t *testing.T) {
	sites := map[string]*site{} // the site of a test is that of its Reopen
	drivertest.Suite{
		Open: func(t *testing.T) drivers.Driver {
			sites[t.Name()] = newSite(t)
			return sites[t.Name()].open(t)
		},
		Reopen: func(t *testing.T) drivers.Driver { return sites[t.Name()].open(t) },
		Unclosed: func(t *testing.T, d drivers.Driver) {
			for _, n := range d.(*Driver).nodes {
				n.stop() // the supervisor is a goroutine of the process that died
			}
		},
	}.Run(t)
}

// pidIn waits for the stand-in to have written the file and reads the pid.
func (s *site) pidIn(t *testing.T, node, file string, not int) int {
	t.Helper()
	path := filepath.Join(s.dir, node, "agent", file)
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if pid, err := strconv.Atoi(string(raw)); err == nil && pid != not {
			return pid
		}
	}
	log, _ := os.ReadFile(filepath.Join(s.dir, node, "agent.log"))
	t.Fatalf("%s was not written; the agent's log: %s", path, log)
	return 0
}

func alive(pid int) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(status), ") Z ")
}

func openWithNode(t *testing.T) (context.Context, *site, *Driver) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	s := newSite(t)
	d := s.open(t)
	t.Cleanup(func() {
		if err := d.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if _, err := d.Provision(ctx, []drivers.NodeSpec{{Name: "a"}}); err != nil {
		t.Fatal(err)
	}
	return ctx, s, d
}

func TestKilledAgentIsStartedAgainAndItsTaskLives(t *testing.T) {
	_, s, _ := openWithNode(t)
	task := s.pidIn(t, "a", "task", 0)
	first := s.pidIn(t, "a", "agent", 0)
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.pidIn(t, "a", "agent", first)
	if !alive(task) {
		t.Error("the task died with its agent")
	}
}

func TestPowerOffEndsAgentAndTasks(t *testing.T) {
	ctx, s, d := openWithNode(t)
	task, agent := s.pidIn(t, "a", "task", 0), s.pidIn(t, "a", "agent", 0)
	if err := d.PowerOff(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if alive(task) || alive(agent) {
		t.Errorf("after the power cut: task alive %v, agent alive %v", alive(task), alive(agent))
	}
	if d.nodes["a"].group.exists() {
		t.Error("the node's cgroup is still there")
	}
}

func TestAgentHasItsOwnNamespaces(t *testing.T) {
	_, s, _ := openWithNode(t)
	agent := s.pidIn(t, "a", "agent", 0)
	for _, kind := range []string{"net", "mnt"} {
		its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", agent, kind))
		if err != nil {
			t.Fatal(err)
		}
		ours, err := os.Readlink("/proc/self/ns/" + kind)
		if err != nil {
			t.Fatal(err)
		}
		if its == ours {
			t.Errorf("the agent shares our %s namespace", kind)
		}
	}
}

func TestConfigurationIsSecret(t *testing.T) {
	_, s, _ := openWithNode(t)
	info, err := os.Stat(filepath.Join(s.dir, "a", "agent.json"))
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("agent.json, which holds the join token, has mode %o, expected 600", info.Mode().Perm())
	}
}

func TestBadNames(t *testing.T) {
	s := newSite(t)
	d := s.open(t)
	for _, name := range []string{"", "../x", "a/b", ".hidden"} {
		if _, err := d.Provision(t.Context(), []drivers.NodeSpec{{Name: name}}); err == nil {
			t.Errorf("a node named %q was made", name)
		}
	}
}

func TestDamagedNodeFileIsNamed(t *testing.T) {
	s := newSite(t)
	file := filepath.Join(s.dir, "a", specFile)
	if err := errors.Join(os.Mkdir(filepath.Dir(file), 0o700), os.WriteFile(file, []byte("{"), 0o600)); err != nil {
		t.Fatal(err)
	}
	_, err := New(Options{Cloud: "test", Dir: s.dir, Group: s.group, Logger: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("New over a damaged %s: %v, expected an error naming it", file, err)
	}
}

func TestNodeThatIsOffTakesItsNewSize(t *testing.T) {
	ctx, s, d := openWithNode(t)
	if err := d.PowerOff(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	made, err := d.Provision(ctx, []drivers.NodeSpec{{Name: "a", CPUs: 3}})
	if err != nil || len(made) != 1 || made[0].CPUs != 3 {
		t.Fatalf("want 3 cpus, got %+v, %v", made, err)
	}
	raw, err := os.ReadFile(filepath.Join(s.dir, "a", "agent.json"))
	if err != nil || !strings.Contains(string(raw), `"cpus": 3`) {
		t.Errorf("the agent's configuration: %s, %v", raw, err)
	}
}
