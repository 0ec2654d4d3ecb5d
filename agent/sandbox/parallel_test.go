package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"dormouse/agent/criu"
	"dormouse/agent/network"
	"dormouse/agent/sandbox"
	"dormouse/api"
	"dormouse/internal/thread"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// fabric is a bridge in a network namespace of its own, to which every sandbox
// is connected by a veth pair.
type fabric struct {
	t     *testing.T
	space *os.File
	nl    *netlink.Handle
	slot  int

	mu        sync.Mutex
	addresses map[string]string // of sandboxes by id
	joined    []string
}

func newFabric(t *testing.T) *fabric {
	t.Helper()
	f := &fabric{t: t, addresses: map[string]string{}}
	err := thread.Spare(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		f.space, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.space.Close() })
	if f.nl, err = netlink.NewHandleAt(netns.NsHandle(f.space.Fd())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.nl.Close)
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
	if err := f.nl.LinkAdd(bridge); err != nil {
		t.Fatal(err)
	}
	if err := f.nl.LinkSetUp(bridge); err != nil {
		t.Fatal(err)
	}
	return f
}

// Join connects a sandbox.
func (f *fabric) Join(_ context.Context, id string, space *os.File) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	address, ok := f.addresses[id]
	if !ok {
		return fmt.Errorf("%s has no address", id)
	}
	f.joined = append(f.joined, id)
	f.slot++
	bridge, err := f.nl.LinkByName("br0")
	if err != nil {
		return err
	}
	near := fmt.Sprintf("port%d", f.slot)
	attrs := netlink.LinkAttrs{Name: near, MTU: 1420, MasterIndex: bridge.Attrs().Index}
	ip := net.ParseIP(address).To4()
	mac := net.HardwareAddr{2, 0x64, ip[0], ip[1], ip[2], ip[3]}
	pair := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerHardwareAddr: mac, PeerNamespace: netlink.NsFd(space.Fd())}
	if err := f.nl.LinkAdd(pair); err != nil {
		return fmt.Errorf("veth: %w", err)
	}
	if err := f.nl.LinkSetUp(pair); err != nil {
		return err
	}
	inside, err := netlink.NewHandleAt(netns.NsHandle(space.Fd()))
	if err != nil {
		return err
	}
	defer inside.Close()
	eth0, err := inside.LinkByName("eth0")
	if err != nil {
		return err
	}
	if err := inside.AddrAdd(eth0, &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(20, 32)}}); err != nil {
		return err
	}
	return inside.LinkSetUp(eth0)
}

// parallel is a job of several tasks on one fabric.
type parallel struct {
	*bench
	fabric *fabric
	secret []byte
}

func newParallel(t *testing.T) *parallel {
	t.Helper()
	b := newBench(t)
	p := &parallel{bench: b, fabric: newFabric(t), secret: []byte("a secret of more than 16 bytes")}
	b.network = p.fabric
	b.runtime = b.newRuntime()
	return p
}

func address(index int) string { return fmt.Sprintf("10.99.0.%d", index+1) }

// task is the configuration of one of n tasks. An empty script makes it one that
// serves the others.
func (p *parallel) task(index, n int, script string) sandbox.Config {
	cfg := p.config(script)
	cfg.Job, cfg.Task, cfg.Tasks, cfg.Run, cfg.Secret = "j-test", index, n, 1, p.secret
	cfg.Hostname, cfg.VirtualIP = fmt.Sprintf("task-%d", index), address(index)
	if script == "" {
		cfg.Command, cfg.Serve = nil, true
	}
	for i := range n {
		cfg.Hosts = append(cfg.Hosts, sandbox.Host{Name: fmt.Sprintf("task-%d", i), IP: address(i)})
	}
	p.at(cfg)
	return cfg
}

// at gives a sandbox its address on the fabric.
func (p *parallel) at(cfg sandbox.Config) {
	p.fabric.mu.Lock()
	defer p.fabric.mu.Unlock()
	p.fabric.addresses[cfg.ID] = cfg.VirtualIP
}

// job starts tasks 1 to n-1 to serve, and then task 0 with the script.
func (p *parallel) job(n int, script string, change func(*sandbox.Config)) []*sandbox.Sandbox {
	p.t.Helper()
	tasks := make([]*sandbox.Sandbox, n)
	for i := n - 1; i >= 0; i-- {
		cfg := p.task(i, n, "")
		if i == 0 {
			cfg.Serve, cfg.Command = false, []string{"/bin/sh", "-c", script}
		}
		if change != nil {
			change(&cfg)
		}
		tasks[i] = p.start(cfg)
	}
	return tasks
}

// result is what task 0 of a job wrote, after its good end.
func (p *parallel) result(tasks []*sandbox.Sandbox) string {
	p.t.Helper()
	if status := p.wait(tasks[0]); status.Code != 0 {
		p.t.Fatalf("exit status %+v; stdout: %s; stderr: %s", status, p.log(tasks[0], "stdout"), p.log(tasks[0], "stderr"))
	}
	return p.log(tasks[0], "stdout")
}

func TestTheNetworkIsJoinedByStart(t *testing.T) {
	p := newParallel(t)
	tasks := p.job(2, "ip -o -4 addr show eth0; ip addr show lo; dormouse-rsh task-1 echo reached", nil)
	out := p.result(tasks)
	contains(t, "addresses", out, "10.99.0.1/20")
	contains(t, "output", out, "reached")
	if strings.Contains(out, "10.99.0.1/32") {
		t.Errorf("the address is on lo, too: %s", out)
	}
}

func TestAFailingNetworkFailsTheStart(t *testing.T) {
	p := newParallel(t)
	cfg := p.task(0, 2, "true")
	delete(p.fabric.addresses, cfg.ID)
	s := p.create(cfg)
	if err := s.Start(p.context()); err == nil || !strings.Contains(err.Error(), "has no address") {
		t.Errorf("Start: %v, want the network's own words", err)
	}
}

func TestTheEnvironmentNamesTheJob(t *testing.T) {
	p := newParallel(t)
	cfg := p.task(1, 3, `echo $DORMOUSE_JOB $DORMOUSE_TASK $DORMOUSE_TASKS $DORMOUSE_HOSTS; echo $PATH; cat /.dormouse/hosts.openmpi /.dormouse/hosts.hydra; echo $OMPI_ALLOW_RUN_AS_ROOT $HYDRA_IFACE`)
	cfg.CPUs = 2.5
	cfg.Env = map[string]string{"HYDRA_IFACE": "mine"}
	want := "j-test 1 3 task-0,task-1,task-2\n/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/.dormouse/bin\n" +
		"task-0 slots=2\ntask-1 slots=2\ntask-2 slots=2\ntask-0:2\ntask-1:2\ntask-2:2\n1 mine\n"
	expect(t, "output", p.output(cfg), want)

	cfg = p.config("echo $DORMOUSE_JOB $DORMOUSE_TASKS $DORMOUSE_HOSTS; env | grep -c -e MPI -e HYDRA -e PRTE; ls /.dormouse/hosts* 2>&1 | grep -c cannot")
	cfg.Job = "j-one"
	p.at(cfg)
	expect(t, "a job of one task", p.output(cfg), "j-one 1 task-0\n0\n1\n")
}

func TestRemoteStart(t *testing.T) {
	p := newParallel(t)
	tasks := p.job(2, `
set -e
dormouse-rsh task-1 hostname
dormouse-rsh task-1 'pwd; echo $DORMOUSE_TASK; id -u'
dormouse-rsh task-1 'echo lost; echo err >&2' 2>&1 >/dev/null
echo in | dormouse-rsh -x -q -o BatchMode=yes -l root task-1 cat
echo in | dormouse-rsh -n task-1 cat
set +e
dormouse-rsh task-1 exit 7; echo $?
dormouse-rsh task-1 'kill -TERM $$'; echo $?
dormouse-rsh task-1 no-such-thing 2>/dev/null; echo $?
dormouse-rsh localhost hostname
dormouse-rsh 10.99.0.2 -x hostname
dormouse-rsh nowhere true; echo $?
dormouse-rsh -l daemon task-1 true; echo $?
dormouse-rsh task-1; echo $?
`, func(c *sandbox.Config) { c.WorkDir = "/usr" })
	expect(t, "stdout", p.result(tasks), "task-1\n/usr\n1\n0\nerr\nin\n7\n143\n127\ntask-0\ntask-1\n255\n255\n255\n")
	contains(t, "stderr", p.log(tasks[0], "stderr"), "dormouse-rsh: nowhere is no task of this job")
	contains(t, "stderr", p.log(tasks[0], "stderr"), "cannot start anything as \"daemon\"")
	contains(t, "stderr", p.log(tasks[0], "stderr"), "no command was given")
	if !tasks[1].Running() {
		t.Error("the task without a command ended by itself")
	}
}

func TestRemoteStartWaitsForATaskThatIsNotThereYet(t *testing.T) {
	p := newParallel(t)
	first := p.start(p.task(0, 2, "dormouse-rsh task-1 hostname"))
	p.logsNothing(first)
	p.start(p.task(1, 2, ""))
	expect(t, "stdout", p.result([]*sandbox.Sandbox{first}), "task-1\n")
}

// logsNothing waits until dormouse-rsh is there and has nothing to say.
func (p *parallel) logsNothing(s *sandbox.Sandbox) {
	p.t.Helper()
	p.eventually("dormouse-rsh tries", func() bool {
		pids, _ := s.Pids()
		for _, pid := range pids {
			if comm, _ := os.ReadFile("/proc/" + itoa(pid) + "/comm"); strings.HasPrefix(string(comm), "dormouse-rsh") {
				return true
			}
		}
		return false
	})
	expect(p.t, "stderr", p.log(s, "stderr"), "")
}

func TestRemoteStartGivesUpInTime(t *testing.T) {
	p := newParallel(t)
	out := p.output(p.task(0, 2, "dormouse-rsh -o ConnectTimeout=1 task-1 hostname; echo $?"))
	expect(t, "stdout", out, "255\n")
}

func TestRemoteStartAsAnOrdinaryUser(t *testing.T) {
	p := newParallel(t)
	tasks := p.job(2, `dormouse-rsh task-1 'id -u; test -r /.dormouse/secret && echo readable'; dormouse-rsh daemon@task-1 id -un; dormouse-rsh root@task-1 id; echo $?`,
		func(c *sandbox.Config) { c.User = "daemon" })
	expect(t, "stdout", p.result(tasks), "1\nreadable\ndaemon\n255\n")
}

func TestRemoteStartNeedsTheSecret(t *testing.T) {
	p := newParallel(t)
	stranger := p.task(1, 2, "")
	stranger.Secret = []byte("another secret of 16 bytes")
	p.start(stranger)
	first := p.start(p.task(0, 2, "dormouse-rsh task-1 hostname; echo $?"))
	expect(t, "stdout", p.result([]*sandbox.Sandbox{first}), "255\n")
	contains(t, "stderr", p.log(first, "stderr"), "the secret is not that of this job")
}

func TestSignalsAndHangUpReachTheRemoteProcess(t *testing.T) {
	p := newParallel(t)
	tasks := p.job(2, `
dormouse-rsh task-1 'trap "echo got it; exit 3" TERM; echo ready > /tmp/ready; while :; do sleep 0.05; done' & rsh=$!
until dormouse-rsh task-1 test -e /tmp/ready; do sleep 0.05; done
kill -TERM $rsh; wait $rsh; echo $?
dormouse-rsh task-1 'exec sleep 12345' & rsh=$!
sleeps="grep -qsz '^12345$' /proc/[0-9]*/cmdline"
until dormouse-rsh task-1 "$sleeps"; do sleep 0.05; done
kill -KILL $rsh; wait $rsh
while dormouse-rsh task-1 "$sleeps"; do sleep 0.05; done
echo hung up
`, nil)
	expect(t, "stdout", p.result(tasks), "got it\n3\nhung up\n")
}

func Test64RemoteStartsAtATime(t *testing.T) {
	p := newParallel(t)
	tasks := p.job(2, `
for i in $(seq 64); do
  (head -c 300000 /dev/zero | tr '\0' $((i % 10)) | dormouse-rsh task-1 'md5sum; exit 5' > /tmp/$i; echo $? >> /tmp/$i) &
done
wait
for i in $(seq 64); do head -c 300000 /dev/zero | tr '\0' $((i % 10)) | md5sum > /tmp/want; echo 5 >> /tmp/want; cmp /tmp/want /tmp/$i && echo same; done | sort | uniq -c
`, func(c *sandbox.Config) { c.MemBytes = 2 << 30 })
	expect(t, "stdout", strings.TrimSpace(p.result(tasks)), "64 same")
}

func TestDaemonsStartedRemotelyStay(t *testing.T) {
	p := newParallel(t)
	tasks := p.job(2, `dormouse-rsh task-1 'setsid sleep 12345 > /dev/null 2>&1 < /dev/null & exit 0'; echo $?`, nil)
	expect(t, "stdout", p.result(tasks), "0\n")
	code, out, _ := p.exec(tasks[1], "grep -h PPid $(dirname $(grep -lsz '^12345$' /proc/[0-9]*/cmdline))/status")
	if code != 0 || out != "PPid:\t1\n" {
		t.Errorf("the daemon's parent: %d %q, want pid 1", code, out)
	}
}

func TestATaskThatServesIgnoresSignalsUntilItIsKilled(t *testing.T) {
	p := newParallel(t)
	s := p.start(p.task(1, 2, ""))
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGHUP, unix.SIGSTOP} {
		if err := s.Signal(p.context(), sig); err != nil {
			t.Fatal(err)
		}
	}
	if code, out, _ := p.exec(s, "echo alive"); code != 0 || out != "alive\n" {
		t.Errorf("exec: %d %q", code, out)
	}
	if err := s.Signal(p.context(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if status := p.wait(s); status.Code != 137 {
		t.Errorf("got %+v, want 137", status)
	}
}

// compile makes an MPI program and returns a volume with it.
func (p *parallel) compile(compiler string) api.Volume {
	p.t.Helper()
	path, err := exec.LookPath(compiler)
	if err != nil {
		missing(p.t, "this test needs %s: run `make setup`", compiler)
	}
	bin := filepath.Join(p.dir, "bin-"+compiler)
	if err := os.Mkdir(bin, 0o755); err != nil {
		p.t.Fatal(err)
	}
	if out, err := exec.Command(path, "-O1", "-Wall", "-o", bin+"/ring", "testdata/ring.c").CombinedOutput(); err != nil {
		p.t.Fatalf("%s: %v: %s", compiler, err, out)
	}
	return api.Volume{Source: bin, Destination: "/prog", ReadOnly: true}
}

// launchers are the launchers of MPI programs, with the compiler of each.
var launchers = map[string]string{"mpirun.openmpi": "mpicc.openmpi", "mpiexec.hydra": "mpicc.mpich"}

func TestUnmodifiedMPIPrograms(t *testing.T) {
	for launcher, compiler := range launchers {
		for _, user := range []string{"", "daemon", "12345"} {
			t.Run(launcher+" "+user, func(t *testing.T) {
				p := newParallel(t)
				volume := p.compile(compiler)
				tasks := p.job(3, launcher+" /prog/ring 20", func(c *sandbox.Config) {
					c.User, c.CPUs, c.MemBytes, c.Volumes = user, 2, 1<<30, []api.Volume{volume}
				})
				out := p.ringResult(launcher, tasks)
				contains(t, "stdout", out, "6 ranks on task-0 task-0 task-1 task-1 task-2 task-2\n")
				contains(t, "stdout", out, "sum 300\n") // 20 rounds of 0+1+...+5
			})
		}
	}
}

// ringResult is what the ring wrote. MPICH before 4.2 may hang in MPI_Finalize
// when ranks on several hosts share processors: one that waits in its barrier
// does not answer the others any more. So its end is not waited for.
func (p *parallel) ringResult(launcher string, tasks []*sandbox.Sandbox) string {
	p.t.Helper()
	if launcher == "mpiexec.hydra" {
		p.logs(tasks[0], "sum ")
		return p.log(tasks[0], "stdout")
	}
	return p.result(tasks)
}

func TestMPIProgramsSurviveTheLossOfAllTheirTasks(t *testing.T) {
	engine := newEngine(t)
	for launcher, compiler := range launchers {
		for _, user := range []string{"", "daemon"} {
			t.Run(launcher+" "+user, func(t *testing.T) {
				p := newParallel(t)
				volume := p.compile(compiler)
				tasks := p.job(2, launcher+" /prog/ring 100 5", func(c *sandbox.Config) {
					c.User, c.CPUs, c.MemBytes, c.Volumes = user, 2, 1<<30, []api.Volume{volume}
				})
				for generation := range 3 {
					p.logs(tasks[0], fmt.Sprintf("round %d\n", 20*(generation+1)))
					tasks = p.resumeAll(engine, p.suspendAll(engine, tasks))
				}
				contains(t, "stdout", p.ringResult(launcher, tasks), "round 99\nsum 600\n") // 100 rounds of 0+1+2+3
				if _, out, _ := p.exec(tasks[1], "dormouse-rsh task-1 hostname"); out != "task-1\n" {
					t.Errorf("a remote start after a restore: %q", out)
				}
			})
		}
	}
}

func TestRemoteStartsAreRestored(t *testing.T) {
	engine := newEngine(t)
	p := newParallel(t)
	tasks := p.job(2, `
mkfifo /tmp/in
dormouse-rsh task-1 'while read x; do echo got $x; done; echo bye; exit 3' < /tmp/in & rsh=$!
exec 5> /tmp/in
echo one >&5
until test -e /go; do sleep 0.02; done
echo two >&5
exec 5>&-
wait $rsh; echo $?`, nil)
	p.logs(tasks[0], "got one")
	tasks = p.resumeAll(engine, p.suspendAll(engine, tasks))
	if code, _, _ := p.exec(tasks[0], "touch /go"); code != 0 {
		t.Fatal("cannot touch")
	}
	expect(t, "stdout", p.result(tasks), "got one\ngot two\nbye\n3\n")
}

// suspendAll captures all tasks of a job at one instant, and destroys them.
func (p *parallel) suspendAll(engine *criu.Engine, tasks []*sandbox.Sandbox) []image {
	p.t.Helper()
	images := make([]image, len(tasks))
	p.all(tasks, func(i int, s *sandbox.Sandbox) error {
		images[i] = image{images: p.t.TempDir(), upper: filepath.Join(p.dir, s.ID()+"-saved"), config: s.Config()}
		return errors.Join(s.Quiesce(p.context()), s.Freeze(p.context()))
	})
	time.Sleep(20 * time.Millisecond) // what is in flight arrives
	p.all(tasks, func(i int, s *sandbox.Sandbox) error {
		netns, err := network.OfProcess(s.Pid())
		if err != nil {
			return err
		}
		defer netns.Close()
		if err := network.Cut(netns); err != nil {
			return err
		}
		return p.capture(engine, s, images[i])
	})
	p.all(tasks, func(_ int, s *sandbox.Sandbox) error { return s.Destroy(p.context(), sandbox.DestroyOptions{}) })
	return images
}

// resumeAll restores a job: no process goes on before all are there.
func (p *parallel) resumeAll(engine *criu.Engine, images []image) []*sandbox.Sandbox {
	p.t.Helper()
	tasks := make([]*sandbox.Sandbox, len(images))
	for i, saved := range images {
		cfg := p.again(saved)
		p.at(cfg)
		tasks[i] = p.create(cfg)
	}
	var arrived, opened sync.WaitGroup
	arrived.Add(len(tasks))
	opened.Add(len(tasks))
	p.all(tasks, func(i int, s *sandbox.Sandbox) error {
		return p.restore(engine, images[i], s, func(netns *os.File) error {
			if err := network.Cut(netns); err != nil {
				return err
			}
			arrived.Done()
			arrived.Wait()
			err := network.Open(netns)
			opened.Done()
			opened.Wait()
			return err
		}, nil)
	})
	return tasks
}

// all does something with all tasks at a time.
func (p *parallel) all(tasks []*sandbox.Sandbox, do func(int, *sandbox.Sandbox) error) {
	p.t.Helper()
	errs := make([]error, len(tasks))
	var group sync.WaitGroup
	for i, s := range tasks {
		group.Go(func() { errs[i] = do(i, s) })
	}
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		p.t.Fatal(err)
	}
}
