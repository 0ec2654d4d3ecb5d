package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"dormouse/api"
	"dormouse/e2e/cluster"
	"dormouse/internal/child"
)

// Fencing, with a real cut: a controller and agents as on machines of their own,
// each agent in a network namespace that the test made, with one cable to a
// bridge. The agents reach the controller over TCP through that cable and in no
// other way, and a cut takes it down.
//
// The jobs write to their standard output, which belongs to the checkpoint, and to
// a file that all nodes share and no checkpoint has: the first must come out as if
// nothing had happened, the second shows what each copy of the job really did, and
// in which order.

// site is a controller and its machines.
type site struct {
	*platform
	number   int // of the test: names and addresses are made of it
	dir      string
	bridge   *netlink.Bridge
	machines []*machine
}

// machine is a network namespace with an agent.
type machine struct {
	name   string
	number int          // of its address
	cable  netlink.Link // our end
	anchor *exec.Cmd    // keeps the namespace
	agent  *exec.Cmd
	ended  chan struct{} // closed when the agent was waited for
}

const fencedHeartbeat = 300 * time.Millisecond

// newSite starts a controller with n machines, whose leases last so long, and
// which treats starving jobs so.
func newSite(t *testing.T, number, n int, lease time.Duration, starvation string) *site {
	t.Helper()
	if unavailable != "" {
		t.Skip(unavailable)
	}
	s := &site{platform: &platform{t: t}, number: number, dir: directory(t)}
	s.build()
	config := fmt.Sprintf("listen: %s:7117\nstate: %s\nlease: %s\nheartbeat: %s\non_starvation: %s\nclouds:\n- name: rack\n  driver: static\n",
		s.address(1), s.state(), lease, fencedHeartbeat, starvation)
	s.must(os.WriteFile(s.config(), []byte(config), 0o600))
	s.must(os.Mkdir(s.state(), 0o755))
	s.startController()
	t.Cleanup(func() {
		ending, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.c.Stop(ending); err != nil {
			t.Error(err)
		}
	})
	for i := range n {
		s.addMachine(i)
	}
	t.Cleanup(s.logs)
	s.until("", "all nodes are ready", func() bool {
		nodes := decode[[]api.Node](s.platform, "nodes")
		return len(nodes) == n && !slices.ContainsFunc(nodes, func(n api.Node) bool { return n.State != api.NodeReady })
	})
	return s
}

func (s *site) config() string { return filepath.Join(s.dir, "controller.yaml") }

// startController may be called again when it was killed.
func (s *site) startController() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := cluster.Start(ctx, cluster.Options{
		Binary: built.bin + "/dormouse", State: s.state(), Config: s.config(), Log: logFile(filepath.Join(s.dir, "controller.log")),
	})
	s.must(err)
	s.c = c
}

func (s *site) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) state() string { return filepath.Join(s.dir, "state") }

// until polls; job may be empty.
func (s *site) until(job, what string, condition func() bool) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := cluster.WaitFor(ctx, what, func() (bool, error) { return condition(), nil }); err != nil {
		if job != "" {
			s.report(job)
			s.showNetworks()
		}
		s.t.Fatal(err)
	}
}

// logs shows what the daemons said about a failed test.
func (s *site) logs() {
	if !s.t.Failed() {
		return
	}
	files, _ := filepath.Glob(filepath.Join(s.dir, "*.log"))
	for _, file := range files {
		text, _ := os.ReadFile(file)
		s.t.Logf("%s:\n%s", filepath.Base(file), tail(string(text), 60))
	}
}

func (s *site) showNetworks() {
	for _, m := range s.machines {
		for namespace, pid := range m.networks() {
			out, _ := exec.Command("nsenter", "--net=/proc/"+pid+"/ns/net", "ip", "-statistics", "address").CombinedOutput()
			routes, _ := exec.Command("nsenter", "--net=/proc/"+pid+"/ns/net", "ip", "route").CombinedOutput()
			rules, _ := exec.Command("nsenter", "--net=/proc/"+pid+"/ns/net", "nft", "list", "ruleset").CombinedOutput()
			s.t.Logf("%s, %s:\n%s%s%s", m.name, namespace, out, routes, rules)
		}
	}
}

// networks are the namespaces of the machine's processes, with a process in each.
func (m *machine) networks() map[string]string {
	found := make(map[string]string)
	for _, top := range m.cgroups() {
		filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.Name() != "cgroup.procs" {
				return nil
			}
			pids, _ := os.ReadFile(path) // it may be gone already
			for _, pid := range strings.Fields(string(pids)) {
				if namespace, err := os.Readlink("/proc/" + pid + "/ns/net"); err == nil {
					found[namespace] = pid
				}
			}
			return nil
		})
	}
	return found
}

// address is of the subnet of this site: 1 is the controller.
func (s *site) address(host int) string { return fmt.Sprintf("10.213.%d.%d", s.number, host) }

// build makes the bridge that the controller listens on. All of it is in the
// network namespace of this test program.
func (s *site) build() {
	s.t.Helper()
	s.bridge = &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("fence%d", s.number)}}
	s.must(netlink.LinkAdd(s.bridge))
	s.t.Cleanup(func() { netlink.LinkDel(s.bridge) })
	address, err := netlink.ParseAddr(s.address(1) + "/24")
	s.must(err)
	s.must(netlink.AddrAdd(s.bridge, address))
	s.must(netlink.LinkSetUp(s.bridge))
}

// addMachine makes a machine and starts its agent.
func (s *site) addMachine(i int) {
	s.t.Helper()
	m := &machine{name: fmt.Sprintf("fence%d-%d-%d", s.number, i, os.Getpid()), number: i}
	s.powerOn(m)
	s.t.Cleanup(func() {
		m.agent.Process.Signal(syscall.SIGTERM)
		<-m.ended
		if err := m.clear(); err != nil {
			s.t.Error(err)
		}
		netlink.LinkDel(m.cable)
		m.anchor.Process.Kill()
		m.anchor.Wait()
	})
	s.machines = append(s.machines, m)
}

// powerOn starts a machine, which has its disk and nothing else from before.
func (s *site) powerOn(m *machine) {
	s.t.Helper()
	m.anchor = exec.Command("sleep", "infinity")
	m.anchor.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	s.must(child.Start(m.anchor, syscall.SIGKILL))
	s.plug(m)
	s.startAgent(m)
}

// plug lays the cable between the bridge and the machine.
func (s *site) plug(m *machine) {
	s.t.Helper()
	cable := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("fence%d.%d", s.number, m.number), MasterIndex: s.bridge.Index},
		PeerName:  "eth0", PeerNamespace: netlink.NsPid(m.anchor.Process.Pid),
	}
	s.must(netlink.LinkAdd(cable))
	m.cable = cable
	s.must(netlink.LinkSetUp(cable))
	namespace, err := netns.GetFromPid(m.anchor.Process.Pid)
	s.must(err)
	defer namespace.Close()
	inside, err := netlink.NewHandleAt(namespace)
	s.must(err)
	defer inside.Close()
	for _, name := range []string{"lo", "eth0"} {
		link, err := inside.LinkByName(name)
		s.must(err)
		if name == "eth0" {
			address, err := netlink.ParseAddr(s.address(10+m.number) + "/24")
			s.must(err)
			s.must(inside.AddrAdd(link, address))
		}
		s.must(inside.LinkSetUp(link))
	}
}

// startAgent runs the agent in the machine's namespace.
func (s *site) startAgent(m *machine) {
	s.t.Helper()
	out, err := os.OpenFile(filepath.Join(s.dir, m.name+".log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	s.must(err)
	defer out.Close()
	m.agent = exec.Command("nsenter", "--net=/proc/"+strconv.Itoa(m.anchor.Process.Pid)+"/ns/net", built.bin+"/dormouse", "agent",
		"--join", "https://"+s.address(1)+":7117", "--token-file", filepath.Join(s.state(), "join.token"), "--ca", filepath.Join(s.state(), "pki", "ca.pem"),
		"--cloud", "rack", "--node", m.name, "--state", filepath.Join(s.dir, m.name), "--cpus", "2", "--mem", "2G")
	m.agent.Stdout, m.agent.Stderr = out, out
	s.must(child.Start(m.agent, syscall.SIGTERM))
	agent, ended := m.agent, make(chan struct{})
	m.ended = ended
	go func() {
		defer close(ended)
		agent.Wait()
	}()
}

// clear ends what is left in the node's cgroup, the guard of its lease as well, and
// removes it.
func (m *machine) clear() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, top := range m.cgroups() { // only those of cgroup v2 have that file
		if err := os.WriteFile(filepath.Join(top, "cgroup.kill"), []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
			return err
		}
	}
	return removeCgroups(ctx, m.name)
}

// cgroups are the node's directories in all hierarchies.
func (m *machine) cgroups() []string { return nodeCgroups(m.name) }

func nodeCgroups(node string) []string {
	var found []string
	for _, pattern := range []string{"/sys/fs/cgroup/dormouse/", "/sys/fs/cgroup/*/dormouse/"} {
		dirs, _ := filepath.Glob(pattern + node) // the pattern is well-formed
		found = append(found, dirs...)
	}
	return found
}

// removeCgroups removes a node's cgroups once nothing is in them, and the one above
// all nodes' if it was the last.
func removeCgroups(ctx context.Context, node string) error {
	for _, top := range nodeCgroups(node) {
		err := cluster.WaitFor(ctx, "the cgroup "+top+" is removed", func() (bool, error) {
			var dirs []string
			filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
				if err == nil && entry.IsDir() {
					dirs = append(dirs, path)
				}
				return nil
			})
			for _, dir := range slices.Backward(dirs) {
				os.Remove(dir)
			}
			_, err := os.Stat(top)
			return errors.Is(err, fs.ErrNotExist), nil
		})
		if err != nil {
			return err
		}
		os.Remove(filepath.Dir(top)) // fails while others use it
	}
	return nil
}

// tasks tells of the cgroups of the tasks what cgroup.events says, cgroups(7).
func (m *machine) tasks() (populated, frozen bool) {
	for _, top := range m.cgroups() {
		filepath.WalkDir(filepath.Join(top, "jobs"), func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.Name() != "cgroup.events" {
				return nil
			}
			text, _ := os.ReadFile(path) // it may be gone already
			if strings.Contains(string(text), "populated 1") {
				populated = true
				frozen = frozen || strings.Contains(string(text), "frozen 1")
			}
			return nil
		})
	}
	return populated, frozen
}

func (s *site) machine(name string) *machine {
	s.t.Helper()
	i := slices.IndexFunc(s.machines, func(m *machine) bool { return m.name == name })
	if i < 0 {
		s.t.Fatalf("there is no machine %q", name)
	}
	return s.machines[i]
}

// fenced reports whether the machine's tasks are frozen. They must be when the
// controller takes the node for lost.
func (s *site) fenced(m *machine) bool {
	s.t.Helper()
	state := s.nodeState(m.name) // first: what it says was so before we looked at the tasks
	_, frozen := m.tasks()
	if state == api.NodeLost && !frozen {
		s.t.Fatalf("node %s is taken for lost and has not frozen its tasks", m.name)
	}
	return frozen
}

func (s *site) cut(m *machine)  { s.t.Helper(); s.must(netlink.LinkSetDown(m.cable)) }
func (s *site) heal(m *machine) { s.t.Helper(); s.must(netlink.LinkSetUp(m.cable)) }

func (s *site) nodeState(name string) api.NodeState {
	s.t.Helper()
	for _, n := range decode[[]api.Node](s.platform, "nodes") {
		if n.Name == name {
			return n.State
		}
	}
	return ""
}

// witness is a job whose standard output is 1, 2, 3 and so on, up to a number or
// until it is asked to end, and which appends the same to a file that all nodes share.
const witness = `i=0; while [ $i -lt %s ] && [ ! -e "$STOP_FILE" ]; do i=$((i+1)); echo $i; echo $i >>/shared/seen; sleep 0.1; done`

func (s *site) submitWitness() (job string, seen func() []int) {
	s.t.Helper()
	shared := filepath.Join(s.dir, "shared")
	s.must(os.Mkdir(shared, 0o777))
	job = s.submit(slices.Concat(untilAsked, []string{"--max-restarts", "3", "--mem", "64M", "--volume", shared + ":/shared", "--", "sh", "-c", fmt.Sprintf(witness, forever)})...)
	return job, func() []int {
		text, err := os.ReadFile(filepath.Join(shared, "seen"))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		s.must(err)
		var numbers []int
		for _, line := range strings.Fields(string(text)) {
			n, err := strconv.Atoi(line)
			s.must(err)
			numbers = append(numbers, n)
		}
		return numbers
	}
}

// TestNodeThatIsCutOffIsFencedBeforeItsJobGoesOnElsewhere, and when the cut heals
// the copy on it is destroyed without having run again.
func TestNodeThatIsCutOffIsFencedBeforeItsJobGoesOnElsewhere(t *testing.T) {
	fencedFirst(t, 1, (*site).cut, (*site).heal)
}

// TestNodeWhoseAgentHangsIsFencedBeforeItsJobGoesOnElsewhere: such an agent cannot
// freeze anything, and seems to live.
func TestNodeWhoseAgentHangsIsFencedBeforeItsJobGoesOnElsewhere(t *testing.T) {
	fencedFirst(t, 5, (*site).hang, (*site).unhang)
}

func (s *site) hang(m *machine)   { s.t.Helper(); s.must(m.agent.Process.Signal(syscall.SIGSTOP)) }
func (s *site) unhang(m *machine) { s.t.Helper(); s.must(m.agent.Process.Signal(syscall.SIGCONT)) }

func fencedFirst(t *testing.T, number int, away, back func(*site, *machine)) {
	s := newSite(t, number, 2, 4*time.Second, api.StarvationIgnore)
	job, seen := s.submitWitness()
	s.until(job, "it writes", func() bool { return len(seen()) >= 5 })
	s.checkpoint(job)
	safe := s.lines(job)
	written := len(seen())
	s.until(job, "it is beyond its checkpoint", func() bool { return len(seen()) >= written+3 })
	left := s.machine(s.node(job))

	away(s, left)
	atCut := len(seen())
	s.until(job, "it runs on without the controller", func() bool { return len(seen()) >= atCut+3 })
	s.until(job, "its tasks are frozen", func() bool {
		return s.fenced(left)
	})
	s.until(job, "it runs elsewhere", func() bool {
		detail := s.inspect(job)
		return detail.Phase == api.PhaseRunning && detail.TaskStatus[0].Node != left.name
	})
	s.until(job, "the new copy writes", func() bool { return len(goesBack(seen())) > 0 })
	if populated, frozen := left.tasks(); !populated || !frozen {
		t.Errorf("the tasks on the node that is cut off: populated %v, frozen %v; want them to stand still, not to be gone", populated, frozen)
	}

	back(s, left)
	s.until(job, "the node is ready again", func() bool { return s.nodeState(left.name) == api.NodeReady })
	s.until(job, "the old copy is destroyed", func() bool { populated, _ := left.tasks(); return !populated })
	s.countsToItsEnd(job)
	goesBackOnce(t, seen(), safe, s.lines(job))
}

// goesBack are the places where a number is not the next one.
func goesBack(seen []int) (places []int) {
	for i, n := range seen {
		if i > 0 && n != seen[i-1]+1 {
			places = append(places, i)
		}
	}
	return places
}

// goesBackOnce checks what all copies together have done: the first one counted up
// to where it was frozen, the second from the checkpoint to the end, and there was
// never a step of the first after one of the second. The checkpoint was taken
// before the job had written safe+1.
func goesBackOnce(t *testing.T, seen []int, safe, lines int) {
	t.Helper()
	places := goesBack(seen)
	if len(places) != 1 {
		t.Fatalf("the copies of the job took turns %d times, want one to follow the other: %v", len(places), seen)
	}
	first, last := seen[places[0]], seen[places[0]-1]
	if seen[0] != 1 || first <= 1 || first > safe+1 || last < first {
		t.Errorf("the first copy went from %d to %d and the second on from %d; the checkpoint was taken before %d", seen[0], last, first, safe+1)
	}
	if got := seen[len(seen)-1]; got != lines {
		t.Errorf("the last step is %d, want %d", got, lines)
	}
}

// TestCutShorterThanTheLeaseChangesNothing: the job does not even stop.
func TestCutShorterThanTheLeaseChangesNothing(t *testing.T) {
	s := newSite(t, 2, 2, 30*time.Second, api.StarvationIgnore)
	job, seen := s.submitWitness()
	s.until(job, "it writes", func() bool { return len(seen()) >= 5 })
	left := s.machine(s.node(job))
	s.cut(left)
	s.until(job, "the controller misses the node", func() bool {
		if _, frozen := left.tasks(); frozen {
			t.Fatal("the tasks were frozen although the lease has not run out")
		}
		return s.nodeState(left.name) == api.NodeUnreachable
	})
	atCut := len(seen())
	s.until(job, "it runs on while its node is cut off", func() bool { return len(seen()) >= atCut+5 })
	s.heal(left)
	s.until(job, "the node is ready again", func() bool {
		if _, frozen := left.tasks(); frozen {
			t.Fatal("the tasks were frozen when the node came back")
		}
		return s.nodeState(left.name) == api.NodeReady
	})
	s.countsToItsEnd(job)
	for i, n := range seen() {
		if n != i+1 {
			t.Fatalf("step %d is %d: the job did not just run on", i, n)
		}
	}
	if detail := s.inspect(job); detail.Restarts != 0 || detail.TaskStatus[0].Node != left.name {
		t.Errorf("the job has %d restarts and is on %s, want none, on %s", detail.Restarts, detail.TaskStatus[0].Node, left.name)
	}
}

// TestParallelJobOfACutOffNodeGoesOnOnce: a server and its client on two nodes, of
// which one is cut off. Each compares every message with what it should be, so a
// copy too many, or a message lost or repeated, ends the job with an error.
func TestParallelJobOfACutOffNodeGoesOnOnce(t *testing.T) {
	s := newSite(t, 3, 3, 4*time.Second, api.StarvationIgnore)
	prog := tasksOf(2, "a server and its client", "pair.py")
	job := s.submitParallel(prog, "--cpus", "2", "--max-restarts", "3", "--mem", "64M")
	s.until(job, "its tasks talk", func() bool { return strings.Count(s.outputOf(job, 1), "\n") >= 5 })
	s.checkpoint(job)
	on := s.placement(job)
	if on[0] == on[1] {
		t.Fatalf("both tasks are on %s, want two nodes", on[0])
	}
	left := s.machine(on[1])
	s.cut(left)
	s.until(job, "the tasks of the node are frozen", func() bool {
		return s.fenced(left)
	})
	s.until(job, "it runs without that node", func() bool {
		return s.inspect(job).Phase == api.PhaseRunning && !slices.Contains(s.placement(job), left.name)
	})
	if populated, frozen := left.tasks(); !populated || !frozen {
		t.Errorf("the tasks on the node that is cut off: populated %v, frozen %v; want them to stand still", populated, frozen)
	}
	s.heal(left)
	s.until(job, "the old copy is destroyed", func() bool { populated, _ := left.tasks(); return !populated })
	s.ends(job, prog)
}
