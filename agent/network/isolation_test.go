package network

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// atAll listens on all addresses of a namespace.
func atAll(t *testing.T, ns *os.File, port string) { t.Helper(); listen(t, ns, "0.0.0.0:"+port) }

func TestJobsReachNoSocketOfTheirNode(t *testing.T) {
	f := newFabric(t)
	n := f.node()
	inside := n.join(newJob("j-node"), 0)[0]
	atAll(t, n.ns, "22")
	pair := uplinkOf(0)
	for _, address := range []string{n.underlay.String(), "10.64.31.254", pair.node.String(), pair.router.String()} {
		unreachable(t, inside.ns, address+":22")
	}
	if conn, err := dial(f.ns, onPort(n.underlay, 22), ample); err != nil {
		t.Errorf("others do not reach the node's own service any more: %v", err)
	} else {
		conn.Close()
	}
}

func TestJobsOnOneNodeReachNothingOfEachOther(t *testing.T) {
	n := newFabric(t).node()
	first := n.join(newJob("j-first"), 0)[0]
	second := n.join(newJob("j-second", publishing(Publish{Task: 1, Port: 8080})), 1)[0]
	atAll(t, second.ns, "7000")
	atAll(t, second.ns, "8080")
	for _, address := range []string{second.address.String(), uplinkOf(0).router.String(), uplinkOf(1).router.String(), n.underlay.String()} {
		unreachable(t, first.ns, address+":7000")
	}
	// What is published is so at the node's address only.
	unreachable(t, first.ns, onPort(uplinkOf(1).router, 8080))
}

func TestTheOutsideReachesOnlyWhatIsPublished(t *testing.T) {
	f := newFabric(t)
	n := f.node()
	inside := n.join(newJob("j-closed", publishing(Publish{Task: 0, Port: 8080, Target: 80})), 0)[0]
	atAll(t, inside.ns, "80")
	atAll(t, inside.ns, "81")
	// A neighbour may try to be clever and route to the job by way of the node.
	if err := defaultRoute(f.links, "underlay", n.underlay); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{onPort(n.underlay, 80), onPort(n.underlay, 81), onPort(inside.address, 80), onPort(uplinkOf(0).router, 8080)} {
		unreachable(t, f.ns, to)
	}
	if seen := reach(t, f.ns, onPort(n.underlay, 8080)); seen != fabricAddress {
		t.Errorf("the task sees a caller from %v; want the caller's own address %v", seen, fabricAddress)
	}
}

func TestPublishedPortsAreReachedFromTheNodeItself(t *testing.T) {
	n := newFabric(t).node()
	inside := n.join(newJob("j-local", publishing(Publish{Task: 0, Port: 8080})), 0)[0]
	atAll(t, inside.ns, "8080")
	reach(t, n.ns, onPort(n.underlay, 8080))
	reach(t, n.ns, "127.0.0.1:8080")
}

func TestPublishedPortsAreReachedFromJobs(t *testing.T) {
	f := newFabric(t)
	n := f.node()
	served := n.join(newJob("j-served", publishing(Publish{Task: 0, Port: 8080})), 0)[0]
	other := n.join(newJob("j-other"), 1)[0]
	far := f.node().join(newJob("j-far"), 2)[0]
	atAll(t, served.ns, "8080")
	for _, by := range []task{served, other, far} {
		reach(t, by.ns, onPort(n.underlay, 8080))
	}
}

// echoDatagrams serves UDP port 53 of a task.
func echoDatagrams(t *testing.T, inside task) {
	t.Helper()
	err := within(inside.ns, func() error {
		conn, err := net.ListenPacket("udp4", ":53")
		if err != nil {
			return err
		}
		t.Cleanup(func() { conn.Close() })
		go func() {
			buffer := make([]byte, 100)
			for {
				n, from, err := conn.ReadFrom(buffer)
				if err != nil {
					return
				}
				_, _ = conn.WriteTo(buffer[:n], from)
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A client of datagrams knows nothing of starts and restores, and goes on
// sending from one port.
func TestPublishedUDPFollowsItsTask(t *testing.T) {
	f := newFabric(t)
	n := f.node()
	var client net.Conn
	err := within(f.ns, func() (err error) {
		client, err = net.Dial("udp4", onPort(n.underlay, 5353))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	answered := func(wait time.Duration) bool {
		_ = client.SetDeadline(time.Now().Add(wait))
		_, _ = client.Write([]byte("hello"))
		for { // an earlier refusal comes as an error of a later call
			_, err := client.Read(make([]byte, 5))
			if !errors.Is(err, unix.ECONNREFUSED) {
				return err == nil
			}
			_, _ = client.Write([]byte("hello"))
		}
	}
	if answered(blocked) {
		t.Fatal("something answers before anything is published")
	}
	other := n.join(newJob("j-other"), 3) // takes the slot that would be used again
	for run := range 3 {
		j := newJob("j-udp", publishing(Publish{Task: 0, Protocol: "udp", Port: 5353, Target: 53}))
		j.key.Run = int64(run)
		echoDatagrams(t, n.join(j, 0)[0])
		if !answered(ample) {
			t.Errorf("run %d does not answer", run)
		}
		if err := n.Leave(background, j.key, 0); err != nil {
			t.Fatal(err)
		}
		if run == 0 { // from here on, runs are in another slot
			if err := n.Leave(background, newJob("j-other").key, other[0].index); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestAPortIsPublishedWhereItsTaskIs(t *testing.T) {
	f := newFabric(t)
	a, b := f.node(), f.node()
	j := newJob("j-where", over(TunnelVXLAN), publishing(Publish{Task: 1, Port: 8080}))
	tasks := span(t, j, a, b)
	for _, inside := range tasks {
		atAll(t, inside.ns, "8080")
	}
	reach(t, f.ns, onPort(b.underlay, 8080))
	unreachable(t, f.ns, onPort(a.underlay, 8080))
	if err := b.Leave(background, j.key, 1); err != nil {
		t.Fatal(err)
	}
	unreachable(t, f.ns, onPort(b.underlay, 8080))
}

func TestAPortCannotBePublishedTwice(t *testing.T) {
	n := newFabric(t).node()
	listen(t, n.ns, "0.0.0.0:22")
	plan := publishing(Publish{Task: 0, Port: 8080})
	n.join(newJob("j-first", plan), 0)
	for name, j := range map[string]job{
		"job j-first":           newJob("j-second", plan),
		"a program of the node": newJob("j-third", publishing(Publish{Task: 0, Port: 22})),
	} {
		n.prepare(j)
		ns := newNamespace(t)
		err := n.Join(background, j.key, Member{Index: 0, Address: addressOf(0)}, ns)
		taken := &PortTakenError{}
		if !errors.As(err, &taken) || taken.By != name {
			t.Errorf("publishing a port that %s has: %v; want a PortTakenError", name, err)
		}
		if _, err := open(t, ns).links.LinkByName("eth0"); !missing(err) {
			t.Errorf("the refused task has eth0 (%v)", err)
		}
	}
	// The same port of another protocol is another port.
	n.join(newJob("j-udp", publishing(Publish{Task: 0, Protocol: "udp", Port: 8080})), 0)
}

func TestJobsCannotForgeTunnels(t *testing.T) {
	f := newFabric(t)
	n := f.node()
	inside := n.join(newJob("j-forger"), 0)[0]
	tap := f.tap()
	for _, port := range []string{"4789", "4790"} { // VXLAN's, and another to see that this would be seen
		err := within(inside.ns, func() error {
			conn, err := net.Dial("udp4", fabricAddress.String()+":"+port)
			if err != nil {
				return err
			}
			defer conn.Close()
			_, err = conn.Write([]byte("forged for port " + port))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	seen := ""
	for deadline := time.Now().Add(ample); !strings.Contains(seen, "forged for port 4790") && time.Now().Before(deadline); {
		seen += string(tap())
	}
	if strings.Contains(seen, "forged for port 4789") || !strings.Contains(seen, "forged for port 4790") {
		t.Errorf("a job's VXLAN packet left the node, or no packet of it was seen")
	}
}

// What connection tracking cannot follow it does not translate either.
func TestNoJobsAddressIsSeenOutside(t *testing.T) {
	f := newFabric(t)
	inside := f.node().join(newJob("j-null"), 0)[0]
	at := listen(t, f.ns, onPort(fabricAddress, 0))
	reach(t, inside.ns, at.String())
	tap := f.tap()
	err := within(inside.ns, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		segment := make([]byte, 20) // no flags at all, which is no TCP
		binary.BigEndian.PutUint16(segment[2:], at.Port())
		segment[12] = 5 << 4
		return unix.Sendto(fd, segment, 0, &unix.SockaddrInet4{Addr: at.Addr().As4()})
	})
	if err != nil {
		t.Fatal(err)
	}
	reach(t, inside.ns, at.String()) // has passed the same way, later
	own := inside.address.As4()
	if seen := tap(); len(seen) == 0 || bytes.Contains(seen, own[:]) {
		t.Errorf("among %d bytes on the underlay the job's address is seen, or nothing is", len(seen))
	}
}

// A node that was no router must not become one for everybody.
func TestTheNodeForwardsForJobsOnly(t *testing.T) {
	f := newFabric(t)
	n := f.node()
	n.join(newJob("j-router"), 0)
	if value, err := n.links.value(forwardingSetting); err != nil || strings.TrimSpace(value) != "1" {
		t.Fatalf("ip_forward is %q, %v", value, err)
	}
	beyond := newNamespace(t)
	link(t, n.links, open(t, beyond))
	if err := defaultRoute(f.links, "underlay", n.underlay); err != nil {
		t.Fatal(err)
	}
	atAll(t, beyond, "7000")
	unreachable(t, f.ns, "192.0.2.2:7000")
}

func TestANodeThatIsARouterStaysOne(t *testing.T) {
	f := newFabric(t)
	n := f.node()
	if err := n.links.apply(setting{name: forwardingSetting, value: "1"}); err != nil {
		t.Fatal(err)
	}
	beyond := newNamespace(t)
	link(t, n.links, open(t, beyond))
	if err := errors.Join(defaultRoute(f.links, "underlay", n.underlay), defaultRoute(open(t, beyond), "far", netip.MustParseAddr("192.0.2.1"))); err != nil {
		t.Fatal(err)
	}
	atAll(t, beyond, "7000")
	j := newJob("j-guest")
	n.join(j, 0)
	reach(t, f.ns, "192.0.2.2:7000")
	if err := n.Leave(background, j.key, 0); err != nil {
		t.Fatal(err)
	}
	if value, err := n.links.value(forwardingSetting); err != nil || strings.TrimSpace(value) != "1" {
		t.Errorf("ip_forward is %q, %v; want 1 as before", value, err)
	}
}

func TestADomesticServiceKeepsItsPort(t *testing.T) {
	f := newFabric(t)
	n := f.node()
	n.join(newJob("j-quiet", publishing(Publish{Task: 1, Port: 22})), 0) // task 1 is elsewhere
	atAll(t, n.ns, "22")
	reach(t, f.ns, onPort(n.underlay, 22))
}

// link joins a namespace to a node: 192.0.2.1 on the node's side, 192.0.2.2 on
// the other.
func link(t *testing.T, near, far *namespace) {
	t.Helper()
	attributes := netlink.NewLinkAttrs()
	attributes.Name = "near"
	err := near.links.LinkAdd(&netlink.Veth{LinkAttrs: attributes, PeerName: "far", PeerNamespace: netlink.NsFd(far.file.Fd())})
	if err := errors.Join(err, connectPair(near, far)); err != nil {
		t.Fatal(err)
	}
}

func TestIsolatedNetworkIsConnectedToNothing(t *testing.T) {
	f := newFabric(t)
	a, b := f.node(), f.node()
	isolated := newJob("j-trial", over(TunnelWireGuard), func(p *Plan) { p.Isolated = true })
	tasks := span(t, isolated, a, b)
	atAll(t, f.ns, "9000")
	atAll(t, a.ns, "9000")
	for _, task := range tasks {
		atAll(t, task.ns, "7000")
		for _, address := range []string{fabricAddress.String(), a.underlay.String(), b.underlay.String(), uplinkOf(0).node.String()} {
			unreachable(t, task.ns, address+":9000")
		}
	}
	for _, address := range []string{tasks[0].address.String(), uplinkOf(0).router.String()} {
		unreachable(t, a.ns, address+":7000")
	}
	reach(t, tasks[0].ns, onPort(tasks[1].address, 7000)) // but itself it does reach
}

func TestIsolatedNetworkPublishesNothing(t *testing.T) {
	n := newFabric(t).node()
	j := newJob("j-trial", publishing(Publish{Port: 80}), func(p *Plan) { p.Isolated = true })
	if _, err := n.Prepare(t.Context(), j.key, j.plan); err == nil || !strings.Contains(err.Error(), "publishes nothing") {
		t.Errorf("want a refusal, got %v", err)
	}
}
