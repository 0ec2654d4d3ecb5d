package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/agent/sandbox/cgroup"
)

var background = context.Background()

func TestTasksOnOneNodeReachEachOther(t *testing.T) {
	node := newFabric(t).node()
	j := newJob("j-same")
	tasks := node.join(j, 0, 1)
	at := listen(t, tasks[1].ns, onPort(tasks[1].address, 0))
	if seen := reach(t, tasks[0].ns, at.String()); seen != tasks[0].address {
		t.Errorf("task 1 sees a call from %v; want task 0's address %v", seen, tasks[0].address)
	}
}

// A packet that is lost because a device was not ready costs a second or more;
// TCP counts the ones it sent again.
func TestTheFirstPacketArrives(t *testing.T) {
	for _, tunnel := range []string{"", TunnelVXLAN, TunnelWireGuard} {
		t.Run("tunnel="+tunnel, func(t *testing.T) {
			f := newFabric(t)
			a, b := f.node(), f.node()
			lossy := 0
			for run := range 10 {
				j := newJob(fmt.Sprint("j-", run), func(p *Plan) { p.Number = uint32(run + 1) })
				var tasks []task
				if tunnel == "" {
					tasks = a.join(j, 0, 1)
				} else {
					over(tunnel)(&j.plan)
					tasks = span(t, j, a, b)
				}
				at := listen(t, tasks[1].ns, onPort(tasks[1].address, 0))
				conn, err := dial(tasks[0].ns, at.String(), ample)
				if err != nil {
					t.Fatal(err)
				}
				echo(t, conn)
				if again := sentAgain(t, conn); again > 0 {
					t.Logf("in network %d TCP sent %d packets again", run, again)
					lossy++
				}
				conn.Close()
			}
			if lossy > 2 { // where a machine stands still for a second, TCP sends again, too
				t.Errorf("in %d of 10 networks the first call lost a packet", lossy)
			}
		})
	}
}

// sentAgain is how many segments TCP has sent more than once, of its handshake
// too: tcpi_total_retrans of tcp(7).
func sentAgain(t *testing.T, conn net.Conn) uint32 {
	t.Helper()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var info *unix.TCPInfo
	var failed error
	if err := raw.Control(func(fd uintptr) { info, failed = unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO) }); err != nil {
		t.Fatal(err)
	}
	if failed != nil {
		t.Fatal(failed)
	}
	return info.Total_retrans
}

func TestEth0IsTheSameForLife(t *testing.T) {
	node := newFabric(t).node()
	inside := open(t, node.join(newJob("j-eth0"), 0)[0].ns)
	link, err := inside.links.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if mac, want := link.Attrs().HardwareAddr.String(), "02:64:0a:40:10:01"; mac != want {
		t.Errorf("eth0 has the address %s; want %s", mac, want)
	}
	if mtu := link.Attrs().MTU; mtu != TaskMTU {
		t.Errorf("eth0's MTU is %d; want %d", mtu, TaskMTU)
	}
	addresses, err := inside.links.AddrList(link, 0)
	if err != nil || len(addresses) != 1 || addresses[0].IPNet.String() != "10.64.16.1/20" {
		t.Errorf("eth0's addresses are %v, %v; want 10.64.16.1/20 alone", addresses, err)
	}
}

func TestJobsReachTheOutsideUnderTheirNodesAddress(t *testing.T) {
	fabric := newFabric(t)
	node := fabric.node()
	tasks := node.join(newJob("j-out"), 0)
	at := listen(t, fabric.ns, onPort(fabricAddress, 0))
	if seen := reach(t, tasks[0].ns, at.String()); seen != node.underlay {
		t.Errorf("the outside sees a call from %v; want the node's address %v", seen, node.underlay)
	}
}

func TestLastLeaveRemovesEverything(t *testing.T) {
	node := newFabric(t).node()
	j := newJob("j-leave", publishing(Publish{Task: 0, Port: 8080}))
	tasks := node.join(j, 0, 1)
	if err := node.Leave(background, j.key, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, tasks[0].ns).links.LinkByName("eth0"); !missing(err) {
		t.Errorf("the task that left still has eth0 (%v)", err)
	}
	if _, err := open(t, tasks[1].ns).links.LinkByName("eth0"); err != nil {
		t.Errorf("the task that stayed lost its eth0: %v", err)
	}
	if err := node.Leave(background, j.key, 1); err != nil {
		t.Fatal(err)
	}
	node.nothingLeft()
}

func TestEverythingMayBeRepeated(t *testing.T) {
	node := newFabric(t).node()
	j := newJob("j-twice", over(TunnelWireGuard))
	first := node.prepare(j)
	if again := node.prepare(j); fmt.Sprint(again) != fmt.Sprint(first) {
		t.Errorf("Prepare returned %v, then %v; want the same", first, again)
	}
	tasks := node.join(j, 0, 1)
	for range 2 {
		if err := node.Join(background, j.key, Member{Index: 0, Address: tasks[0].address}, tasks[0].ns); err != nil {
			t.Fatal(err)
		}
		if err := node.Connect(background, j.key, nil); err != nil {
			t.Fatal(err)
		}
	}
	reach(t, tasks[0].ns, listen(t, tasks[1].ns, onPort(tasks[1].address, 0)).String())
	for range 2 {
		for _, task := range tasks {
			if err := node.Leave(background, j.key, task.index); err != nil {
				t.Fatal(err)
			}
		}
	}
	node.nothingLeft()
}

func TestATaskMayJoinAnewFromAnotherNamespace(t *testing.T) {
	node := newFabric(t).node()
	j := newJob("j-move")
	node.join(j, 0)
	tasks := node.join(j, 0, 1) // task 0 again, in a new namespace
	reach(t, tasks[1].ns, listen(t, tasks[0].ns, onPort(tasks[0].address, 0)).String())
}

func TestNetworksOutliveTheAgent(t *testing.T) {
	node := newFabric(t).node()
	j := newJob("j-live")
	if subnet, known := node.Subnet(j.key); known {
		t.Errorf("a network that was not prepared has the subnet %v", subnet)
	}
	gone := newJob("j-gone")
	tasks := node.join(j, 0, 1)
	left := node.join(gone, 0)
	at := listen(t, tasks[1].ns, onPort(tasks[1].address, 0))
	node.restart()
	if err := node.Retain(background, map[Key][]int{j.key: {0, 1}}); err != nil {
		t.Fatal(err)
	}
	if subnet, known := node.Subnet(j.key); !known || subnet != j.plan.Subnet {
		t.Errorf("the network has the subnet %v, %v; want %v", subnet, known, j.plan.Subnet)
	}
	reach(t, tasks[0].ns, at.String())
	if _, err := open(t, left[0].ns).links.LinkByName("eth0"); !missing(err) {
		t.Errorf("a task of a network that nobody needs still has eth0 (%v)", err)
	}
	more := node.join(j, 2)
	reach(t, more[0].ns, at.String())
	for index := range 3 {
		if err := node.Leave(background, j.key, index); err != nil {
			t.Fatal(err)
		}
	}
	node.nothingLeft()
}

func TestRetainKeepsANetworkThatTasksAreAboutToJoin(t *testing.T) {
	node := newFabric(t).node()
	j := newJob("j-soon", over(TunnelWireGuard))
	before := node.prepare(j)
	node.restart()
	if err := node.Retain(background, map[Key][]int{j.key: {}}); err != nil {
		t.Fatal(err)
	}
	if after := node.prepare(j); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("the endpoint was %v, and is %v after a restart", before, after)
	}
}

func TestRetainTakesDeadMembersOut(t *testing.T) {
	node := newFabric(t).node()
	j := newJob("j-part")
	tasks := node.join(j, 0, 1)
	node.restart()
	if err := node.Retain(background, map[Key][]int{j.key: {1}}); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, tasks[0].ns).links.LinkByName("eth0"); !missing(err) {
		t.Errorf("the dead member still has eth0 (%v)", err)
	}
	if err := node.Leave(background, j.key, 1); err != nil {
		t.Fatal(err)
	}
	node.nothingLeft()
}

// While the manager lives, a killed holder is replaced, and tasks notice little.
func TestAKilledHolderIsReplaced(t *testing.T) {
	eachTunnel(t, func(t *testing.T, f *fabric, j job) {
		nodes := []*node{f.node(), f.node()}
		tasks := span(t, j, nodes...)
		conn, err := dial(tasks[0].ns, listen(t, tasks[1].ns, onPort(tasks[1].address, 0)).String(), ample)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		for _, n := range nodes {
			n.killHolder(j)
			n.awaitHolder(j)
		}
		echo(t, conn)
		for i, n := range nodes {
			n.restart() // only the new holder keeps the network now
			if err := n.Retain(background, map[Key][]int{j.key: {i}}); err != nil {
				t.Fatal(err)
			}
		}
		if seen := reach(t, tasks[1].ns, listen(t, tasks[0].ns, onPort(tasks[0].address, 0)).String()); seen != tasks[1].address {
			t.Errorf("a call came from %v; want %v", seen, tasks[1].address)
		}
		for i, n := range nodes {
			if err := n.Leave(background, j.key, i); err != nil {
				t.Fatal(err)
			}
			n.nothingLeft()
		}
	})
}

// Without a manager nobody replaces it, and the router is gone.
func TestAHolderKilledWithItsAgentIsNoHindrance(t *testing.T) {
	for _, tunnel := range []string{"", TunnelWireGuard, TunnelVXLAN} {
		t.Run("tunnel="+tunnel, func(t *testing.T) {
			node := newFabric(t).node()
			j := newJob("j-killed")
			if tunnel != "" {
				j = newJob("j-killed", over(tunnel))
			}
			node.join(j, 0)
			node.Close()
			node.killHolder(j)
			node.start()
			if err := node.Join(background, j.key, Member{Index: 1, Address: addressOf(1)}, newNamespace(t)); !errors.Is(err, errHolderGone) {
				t.Errorf("joining a network that is gone: %v; want %v", err, errHolderGone)
			}
			tasks := node.join(j, 0, 1) // prepares again
			reach(t, tasks[0].ns, listen(t, tasks[1].ns, onPort(tasks[1].address, 0)).String())
			node.Close()
			node.killHolder(j)
			node.start()
			for index := range 2 {
				if err := node.Leave(background, j.key, index); err != nil {
					t.Fatal(err)
				}
			}
			node.nothingLeft()
		})
	}
}

func TestAFailedPrepareLeavesNothing(t *testing.T) {
	fabric := newFabric(t)
	for name, change := range map[string]func(*Options){
		"no holder program": func(o *Options) { o.Init, o.Program = "/nonexistent", "/nonexistent" },
		"holder fails":      func(o *Options) { o.Program = "/bin/false" },
		"no underlay":       func(o *Options) { o.Underlay = netip.Addr{} },
		"foreign underlay":  func(o *Options) { o.Underlay = netip.MustParseAddr("192.0.2.1") },
	} {
		t.Run(name, func(t *testing.T) {
			node := fabric.node(change)
			j := newJob("j-fails", over(TunnelWireGuard))
			if _, err := node.Prepare(background, j.key, j.plan); err == nil {
				t.Fatal("Prepare succeeded")
			} else {
				t.Log(err)
			}
			node.nothingLeft()
		})
	}
}

func TestPlansThatCannotBeAreRefused(t *testing.T) {
	for name, change := range map[string]func(*Plan){
		"no subnet":        func(p *Plan) { p.Subnet = netip.Prefix{} },
		"IPv6":             func(p *Plan) { p.Subnet = netip.MustParsePrefix("fd00::/64") },
		"foreign gateway":  func(p *Plan) { p.Gateway = netip.MustParseAddr("10.0.0.1") },
		"unknown tunnel":   func(p *Plan) { p.Tunnel = "gre" },
		"no VXLAN number":  func(p *Plan) { p.Spans, p.Tunnel, p.Number = true, TunnelVXLAN, 0 },
		"port too high":    func(p *Plan) { p.Publish = []Publish{{Port: 70000}} },
		"unknown protocol": func(p *Plan) { p.Publish = []Publish{{Port: 1, Protocol: "sctp"}} },
	} {
		if _, err := newJob("j", change).plan.check(); err == nil {
			t.Errorf("%s: the plan was accepted", name)
		}
	}
}

func TestKeysOfNetworksAreSafeNames(t *testing.T) {
	for _, bad := range []Key{{Job: ""}, {Job: "../x"}, {Job: "a/b"}, {Job: "a.b"}, {Job: "j", Run: -1}} {
		if bad.check() == nil {
			t.Errorf("%q was accepted", bad.String())
		}
	}
	key := Key{Job: "j-abc234", Run: 12}
	if parsed, ok := parseKey(key.String()); !ok || parsed != key {
		t.Errorf("%q was read as %v, %v", key.String(), parsed, ok)
	}
}

func TestUplinksNeverOverlap(t *testing.T) {
	seen := map[netip.Addr]int{}
	for slot := range maxSlots {
		pair := uplinkOf(slot)
		for _, a := range []netip.Addr{pair.node, pair.router} {
			if other, ok := seen[a]; ok || !uplinkPool.Contains(a) {
				t.Fatalf("slot %d has the address %v, as has %d; or it is outside the pool", slot, a, other)
			}
			seen[a] = slot
		}
	}
}

// The agent's mounts, its spool in memory for one, are to end with the agent.
func TestHoldersKeepNothingMounted(t *testing.T) {
	eachTunnel(t, func(t *testing.T, f *fabric, j job) {
		n := f.node()
		n.join(j, 0)
		pids, err := n.holderOf(j.key).group.Pids()
		if err != nil || len(pids) != 1 {
			t.Fatalf("the holder's processes are %v, %v; want one", pids, err)
		}
		mounts := ""
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline) && strings.Count(mounts, "\n") != 1; {
			raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pids[0]))
			if err != nil {
				t.Fatal(err)
			}
			mounts = string(raw)
		}
		if strings.Count(mounts, "\n") != 1 {
			t.Errorf("the holder keeps mounted:\n%s", mounts)
		}
	})
}

// A holder must end with its node: its cgroup is below the node's.
func TestCuttingTheNodesPowerEndsHolders(t *testing.T) {
	node := newFabric(t).node()
	j := newJob("j-power", over(TunnelWireGuard))
	node.join(j, 0)
	node.Close() // the agent dies as well
	group := cgroup.Group{Unified: node.options.Cgroup}
	if err := group.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := group.WaitEmpty(background); err != nil {
		t.Fatal(err)
	}
	node.start()
	if err := node.Retain(background, nil); err != nil {
		t.Fatal(err)
	}
	node.nothingLeft()
}
