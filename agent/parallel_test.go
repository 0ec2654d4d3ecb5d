package agent

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"dormouse/agent/network"
	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/internal/child"
	"dormouse/repository"
)

// talkers is a job of two tasks. Task 0 sends numbered lines over one TCP
// connection, faster than task 1 reads them, so that both queues are full at any
// instant. Task 1 checks the numbers and confirms every hundredth. Both write what
// was confirmed as 1, 2, 3, ...; a line that is lost, repeated or broken ends them.
const talkers = `
use IO::Socket::INET;
$| = 1;
sub nap { select(undef, undef, undef, $_[0]) }
if ($ENV{DORMOUSE_TASK} == 1) {
	my $l = IO::Socket::INET->new(Listen => 1, LocalPort => 5000, ReuseAddr => 1) or die $!;
	my $c = $l->accept or die $!;
	$c->autoflush(1);
	my $n = 0;
	while (my $line = <$c>) {
		my ($k, $pad) = split / /, $line;
		$n++;
		die "line $k came instead of $n" if $k != $n || length $pad != 1001;
		next if $n % 100;
		my $i = $n / 100;
		print "$i\n";
		print $c "$i\n" or die $!;
		nap(0.01);
	}
	die "the connection ended after $n lines";
}
my $c;
until ($c = IO::Socket::INET->new(PeerAddr => "task-1:5000")) { nap(0.05) }
if (fork) {
	my $n = 0;
	while (<$c>) { chomp; $n++; die "confirmation $_ came instead of $n" if $_ != $n; print "$n\n" }
	die "the connection ended after $n confirmations";
}
my $pad = "x" x 1000;
for (my $i = 1; ; $i++) { print $c "$i $pad\n" or die $! }
`

// pair is a job of two tasks on two nodes that are joined by a wire, and what
// moves it about.
type pair struct {
	*controller
	spec  api.JobSpec
	nodes [2]*node
	at    [2]int // the node of each task
	run   int64

	started [2]*agentpb.TaskState
}

var addresses = [2]string{"10.77.0.1", "10.77.0.2"}

func newPair(t *testing.T, tunnel string, command ...string) *pair {
	t.Helper()
	p := &pair{controller: newController(t), at: [2]int{0, 1}, run: 1}
	p.plan.Tasks, p.plan.Tunnel, p.plan.Spans = 2, tunnel, true
	p.spec = api.JobSpec{Command: command, Tasks: 2, Launch: api.LaunchEach, CPUs: 1, MemBytes: 256 << 20}
	for i, netns := range wiredNamespaces(t) {
		p.nodes[i] = p.addNodeIn(netns, []string{"east-0", "west-0"}[i], func(c *Config) {
			c.Underlay = netip.MustParseAddr(underlay(i))
		})
	}
	return p
}

func underlay(i int) string { return fmt.Sprintf("100.64.7.%d", i+1) }

// wiredNamespaces makes two network namespaces with a wire between them.
func wiredNamespaces(t *testing.T) (list [2]*os.File) {
	t.Helper()
	for i := range list {
		anchor := exec.Command(tools.init, "hold", t.Name())
		anchor.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		must(t, child.Start(anchor, syscall.SIGKILL))
		t.Cleanup(func() { anchor.Process.Kill(); anchor.Wait() })
		var err error
		list[i], err = network.OfProcess(anchor.Process.Pid)
		must(t, err)
		t.Cleanup(func() { list[i].Close() })
	}
	must(t, inNamespace(list[0], func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "wire"}, PeerName: "wire", PeerNamespace: netlink.NsFd(int(list[1].Fd())),
		})
	}))
	for i := range list {
		must(t, inNamespace(list[i], func() error {
			link, err := netlink.LinkByName("wire")
			if err != nil {
				return err
			}
			address := &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(underlay(i)), Mask: net.CIDRMask(24, 32)}}
			if err := netlink.AddrAdd(link, address); err != nil {
				return err
			}
			return netlink.LinkSetUp(link)
		}))
	}
	return list
}

func (p *pair) node(task int) string { return p.nodes[p.at[task]].name }

func (p *pair) ref(task int) *agentpb.TaskRef {
	return &agentpb.TaskRef{Job: "j-pair", Index: int32(task), Run: p.run}
}

func (p *pair) hosts() []*agentpb.HostEntry {
	return []*agentpb.HostEntry{{Name: "task-0", Ip: addresses[0]}, {Name: "task-1", Ip: addresses[1]}}
}

// both sends a command to the agents of both tasks: the next one only when both
// have answered.
func (p *pair) both(body func(task int) any) (replies [2]*agentpb.Reply) {
	p.t.Helper()
	for task := range replies {
		replies[task] = p.mustDo(p.node(task), p.ref(task), body(task))
	}
	return replies
}

// connect makes the network of a run.
func (p *pair) connect() {
	p.t.Helper()
	ends := p.both(func(int) any { return &agentpb.PrepareNetwork{Plan: p.plan} })
	p.both(func(task int) any {
		other := 1 - task
		return &agentpb.ConnectNetwork{Peers: []*agentpb.NetworkPeer{{
			Node: p.node(other), Endpoint: ends[other].GetNetwork(), VirtualIps: addresses[other : other+1],
		}}}
	})
}

func (p *pair) start() {
	p.t.Helper()
	p.connect()
	replies := p.both(func(task int) any {
		return &agentpb.StartTask{
			Spec: specJSON(p.t, p.spec), VirtualIp: addresses[task], Hosts: p.hosts(), Secret: bytes.Repeat([]byte("s"), 32),
		}
	})
	for task, reply := range replies {
		p.started[task] = reply.GetStarted()
	}
}

// capture stops both tasks and captures them.
func (p *pair) capture(id string) {
	p.t.Helper()
	for task, reply := range p.both(func(int) any { return &agentpb.Preflight{Checkpoint: id} }) {
		if refusals := reply.GetPreflight().GetRefusals(); len(refusals) > 0 {
			p.t.Fatalf("the checkpoint of task %d was refused: %q", task, refusals)
		}
	}
	p.both(func(int) any { return &agentpb.Freeze{Checkpoint: id} })
	p.both(func(int) any { return &agentpb.Capture{Checkpoint: id} })
}

// goOn lets both tasks run after a capture.
func (p *pair) goOn(id string) {
	p.t.Helper()
	p.both(func(int) any { return &agentpb.OpenNetwork{Checkpoint: id} })
	p.both(func(int) any { return &agentpb.Thaw{Checkpoint: id} })
}

// store makes the captured checkpoint durable.
func (p *pair) store(id string) {
	p.t.Helper()
	manifest := &repository.Manifest{Checkpoint: id, Job: "j-pair", Created: time.Now(), Trigger: "user"}
	for _, reply := range p.both(func(int) any { return &agentpb.Upload{Checkpoint: id} }) {
		var task repository.TaskManifest
		must(p.t, json.Unmarshal(reply.GetUploaded().GetPart(), &task))
		manifest.Tasks = append(manifest.Tasks, task)
	}
	must(p.t, p.repo.PutManifest(p.t.Context(), manifest, p.signer))
	p.both(func(int) any { return &agentpb.Discard{Checkpoint: id} })
}

func (p *pair) destroy() {
	p.t.Helper()
	p.both(func(int) any { return &agentpb.DestroyTask{} })
}

// hold restores both tasks, each on the node of the other, up to where they wait
// for their release.
func (p *pair) hold(id string) {
	p.t.Helper()
	p.run++
	p.at[0], p.at[1] = p.at[1], p.at[0]
	p.connect()
	p.both(func(task int) any { return p.restoreCommand(id, task) })
}

func (p *pair) restoreCommand(id string, task int) *agentpb.RestoreTask {
	return &agentpb.RestoreTask{
		Checkpoint: id, Spec: specJSON(p.t, p.spec), VirtualIp: addresses[task], Hosts: p.hosts(), Hold: true,
	}
}

func (p *pair) open(id string) {
	p.t.Helper()
	p.both(func(int) any { return &agentpb.OpenNetwork{Checkpoint: id} })
}

func (p *pair) release(id string) {
	p.t.Helper()
	for task, reply := range p.both(func(int) any { return &agentpb.ReleaseTask{Checkpoint: id} }) {
		if phase := reply.GetRestored().GetPhase(); phase != string(api.PhaseRunning) {
			p.t.Errorf("task %d is %q after its release", task, phase)
		}
	}
}

// talk waits until both tasks have confirmed more than before.
func (p *pair) talk() {
	p.t.Helper()
	for task := range addresses {
		before, err := countsUp(p.log(task))
		must(p.t, err)
		p.awaitLog(p.node(task), p.ref(task), "more of the conversation", counted(before+20))
	}
}

func (p *pair) log(task int) string {
	p.t.Helper()
	return p.logs(p.node(task), p.ref(task), false)
}

func TestTasksThatTalkAreCapturedTogetherAndGoOn(t *testing.T) {
	for _, tunnel := range []string{"vxlan", "wireguard"} {
		t.Run(tunnel, func(t *testing.T) {
			p := newPair(t, tunnel, "/usr/bin/perl", "-e", talkers)
			p.start()
			p.talk()
			for _, id := range []string{"c-one", "c-two"} {
				p.capture(id)
				p.goOn(id)
				p.talk()
				p.store(id)
				p.destroy()
				p.hold(id)
				p.open(id)
				p.release(id)
				p.talk()
			}
			p.destroy()
		})
	}
}

func TestHeldTasksDoNotRun(t *testing.T) {
	p := newPair(t, "vxlan", "/usr/bin/perl", "-e", talkers)
	p.start()
	p.talk()
	p.capture("c-held")
	p.store("c-held")
	p.destroy()
	p.hold("c-held")
	before := [2]string{p.log(0), p.log(1)}
	p.open("c-held")
	p.open("c-held") // may be repeated
	time.Sleep(300 * time.Millisecond)
	for task := range before {
		if now := p.log(task); now != before[task] {
			t.Errorf("task %d wrote %q while it was held", task, strings.TrimPrefix(now, before[task]))
		}
	}
	p.release("c-held")
	p.release("c-held")
	p.talk()
}

func TestAHeldTaskMayBeDestroyed(t *testing.T) {
	p := newPair(t, "vxlan", "/usr/bin/perl", "-e", talkers)
	p.start()
	p.talk()
	p.capture("c-gone")
	p.store("c-gone")
	p.destroy()
	p.hold("c-gone")
	p.destroy()
	for task := range addresses {
		f := p.do(p.node(task), p.ref(task), &agentpb.ReleaseTask{Checkpoint: "c-gone"}).GetFailure()
		if !f.GetRetryable() || !strings.Contains(f.GetMessage(), "not held here") {
			t.Errorf("the release of a task that is gone was answered by %v", f)
		}
	}
	for _, n := range p.nodes {
		n.nothingSpooled(t)
	}
	p.hold("c-gone")
	p.open("c-gone")
	p.release("c-gone")
	p.talk()
}

func TestAgentKilledWhileItHoldsATask(t *testing.T) {
	p := newPair(t, "vxlan", "/usr/bin/perl", "-e", talkers)
	p.start()
	p.talk()
	p.capture("c-lost")
	p.store("c-lost")
	p.destroy()
	p.hold("c-lost")
	n := p.nodes[p.at[1]]
	n.kill()
	n.start()
	f := p.do(p.node(1), p.ref(1), &agentpb.ReleaseTask{Checkpoint: "c-lost"}).GetFailure()
	if !f.GetRetryable() || !strings.Contains(f.GetMessage(), "restarted since") {
		t.Errorf("the release of a task that was held by a killed agent was answered by %v", f)
	}
	p.destroy()
	p.hold("c-lost")
	p.open("c-lost")
	p.release("c-lost")
	p.talk()
}

func TestAgentKilledBetweenFreezeAndCaptureOfTasksThatTalk(t *testing.T) {
	for _, captured := range []bool{false, true} {
		t.Run(fmt.Sprintf("captured=%v", captured), func(t *testing.T) {
			p := newPair(t, "vxlan", "/usr/bin/perl", "-e", talkers)
			p.start()
			p.talk()
			p.both(func(int) any { return &agentpb.Preflight{Checkpoint: "c-half"} })
			p.both(func(int) any { return &agentpb.Freeze{Checkpoint: "c-half"} })
			if captured {
				p.both(func(int) any { return &agentpb.Capture{Checkpoint: "c-half"} })
			}
			n := p.nodes[p.at[1]]
			n.kill()
			n.start()
			// What the controller does when a step fails or an agent is lost.
			p.open("c-half")
			p.both(func(int) any { return &agentpb.Thaw{Checkpoint: "c-half", Abort: true} })
			p.talk()
			p.capture("c-whole")
			p.goOn("c-whole")
			p.talk()
		})
	}
}
