package network

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

var tunnels = []string{TunnelVXLAN, TunnelWireGuard}

// eachTunnel runs a test over every kind of tunnel that this machine has.
func eachTunnel(t *testing.T, test func(t *testing.T, f *fabric, j job)) {
	for _, tunnel := range tunnels {
		t.Run(tunnel, func(t *testing.T) { test(t, newFabric(t), newJob("j-tunnel", over(tunnel))) })
	}
}

func TestTasksOnSeveralNodesReachEachOther(t *testing.T) {
	eachTunnel(t, func(t *testing.T, f *fabric, j job) {
		tasks := span(t, j, f.node(), f.node(), f.node())
		for _, a := range tasks {
			at := listen(t, a.ns, onPort(a.address, 0))
			for _, b := range tasks {
				if seen := reach(t, b.ns, at.String()); seen != b.address {
					t.Errorf("task %d sees a call of task %d from %v; want %v", a.index, b.index, seen, b.address)
				}
			}
		}
	})
}

func TestMuchCrossesATunnelIntact(t *testing.T) {
	eachTunnel(t, func(t *testing.T, f *fabric, j job) {
		tasks := span(t, j, f.node(), f.node())
		at := listen(t, tasks[1].ns, onPort(tasks[1].address, 0))
		sent := make([]byte, 16<<20)
		_, _ = rand.Read(sent)
		if got := roundTrip(t, tasks[0], at, sent); !bytes.Equal(got, sent) {
			t.Errorf("%d bytes came back changed", len(got))
		}
	})
}

// An underlay narrower than WireGuard's and tasks' MTU together must work: no
// fragment, no black hole.
func TestANarrowUnderlayIsNoHindrance(t *testing.T) {
	eachTunnel(t, func(t *testing.T, f *fabric, j job) {
		a, b := f.node(), f.node()
		for _, n := range []*node{a, b} {
			link, err := n.links.links.LinkByName("under0")
			if err != nil {
				t.Fatal(err)
			}
			if err := n.links.links.LinkSetMTU(link, 1400); err != nil {
				t.Fatal(err)
			}
		}
		tasks := span(t, j, a, b)
		sent := make([]byte, 1<<20)
		if got := roundTrip(t, tasks[0], listen(t, tasks[1].ns, onPort(tasks[1].address, 0)), sent); !bytes.Equal(got, sent) {
			t.Errorf("%d bytes came back changed", len(got))
		}
	})
}

// roundTrip sends bytes through an echo.
func roundTrip(t *testing.T, by task, at netip.AddrPort, sent []byte) []byte {
	t.Helper()
	conn, err := dial(by.ns, at.String(), ample)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	go func() {
		_, _ = conn.Write(sent)
		_ = conn.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	_, got, _ = bytes.Cut(got, []byte("\n")) // the greeting
	return got
}

// A clone has its original's addresses and may be on the same nodes.
func TestJobsWithTheSameAddressesNeverMeet(t *testing.T) {
	eachTunnel(t, func(t *testing.T, f *fabric, original job) {
		clone := newJob("j-clone", over(original.plan.Tunnel), func(p *Plan) { p.Number = 8 })
		a, b := f.node(), f.node()
		ours, theirs := span(t, original, a, b), span(t, clone, a, b)
		// The same address and port in both, and each reaches its own.
		listen(t, ours[1].ns, onPort(ours[1].address, 700))
		refused, err := dial(theirs[0].ns, onPort(ours[1].address, 700), blocked)
		if err == nil {
			refused.Close()
			t.Errorf("a task of the clone reaches a listener that only the original has")
		}
		listen(t, theirs[1].ns, onPort(theirs[1].address, 701))
		reach(t, ours[0].ns, onPort(ours[1].address, 700))
		reach(t, theirs[0].ns, onPort(theirs[1].address, 701))
		if conn, err := dial(ours[0].ns, onPort(theirs[1].address, 701), blocked); err == nil {
			conn.Close()
			t.Errorf("a task of the original reaches a listener that only the clone has")
		}
	})
}

func TestATaskMayMoveToAnotherNode(t *testing.T) {
	eachTunnel(t, func(t *testing.T, f *fabric, j job) {
		nodes := []*node{f.node(), f.node(), f.node()}
		endpoints := make([]Endpoint, 3)
		for i, n := range nodes {
			endpoints[i] = n.prepare(j)
		}
		first := nodes[0].join(j, 0)[0]
		connect := func(own int, peers ...Peer) {
			t.Helper()
			if err := nodes[own].Connect(background, j.key, peers); err != nil {
				t.Fatal(err)
			}
		}
		at := func(node int, tasks ...int) Peer {
			p := Peer{Node: fmt.Sprint(node), Endpoint: endpoints[node]}
			for _, index := range tasks {
				p.Addresses = append(p.Addresses, addressOf(index))
			}
			return p
		}
		connect(0, at(1, 1), at(2))
		connect(1, at(0, 0), at(2))
		reach(t, first.ns, listen(t, nodes[1].join(j, 1)[0].ns, onPort(addressOf(1), 0)).String())
		if err := nodes[1].Leave(background, j.key, 1); err != nil {
			t.Fatal(err)
		}
		connect(0, at(2, 1))
		connect(2, at(0, 0))
		reach(t, first.ns, listen(t, nodes[2].join(j, 1)[0].ns, onPort(addressOf(1), 0)).String())
	})
}

func TestConnectForgetsPeersThatAreLeftOut(t *testing.T) {
	eachTunnel(t, func(t *testing.T, f *fabric, j job) {
		a, b := f.node(), f.node()
		tasks := span(t, j, a, b)
		at := listen(t, tasks[1].ns, onPort(tasks[1].address, 0))
		reach(t, tasks[0].ns, at.String())
		if err := a.Connect(background, j.key, nil); err != nil {
			t.Fatal(err)
		}
		unreachable(t, tasks[0].ns, at.String())
		if a.networks[j.key].Tunnel == tunnelVXLAN {
			return
		}
		if left, err := a.tunnelPeers(background, a.networks[j.key]); err != nil || len(left) > 0 {
			t.Errorf("the tunnel still knows %v (%v)", left, err)
		}
	})
}

func TestEveryRunHasNewKeys(t *testing.T) {
	f := newFabric(t)
	a, b := f.node(), f.node()
	j := newJob("j-keys", over(TunnelWireGuard))
	old := a.prepare(j)
	stale := b.prepare(j)
	if err := b.Connect(background, j.key, []Peer{{Node: "a", Endpoint: old, Addresses: []netip.Addr{addressOf(0)}}}); err != nil {
		t.Fatal(err)
	}
	speaker := b.join(j, 1)[0]
	// Node b keeps the old run, as one does that the controller lost. Node a has the
	// new one, with the same addresses and on the same port.
	if err := a.Leave(background, j.key, 0); err != nil {
		t.Fatal(err)
	}
	next := newJob("j-keys", over(TunnelWireGuard))
	next.key.Run = 2
	fresh := a.prepare(next)
	if fresh.Address != old.Address {
		t.Fatalf("the test wants the new run on the old port %v, not %v", old.Address, fresh.Address)
	}
	if bytes.Equal(fresh.PublicKey, old.PublicKey) {
		t.Fatal("the new run has the old key")
	}
	if len(fresh.PublicKey) != wgtypes.KeyLen || bytes.Equal(stale.PublicKey, old.PublicKey) {
		t.Fatal("two nodes have one key")
	}
	listener := a.join(next, 0)[0]
	at := listen(t, listener.ns, onPort(listener.address, 0))
	unreachable(t, speaker.ns, at.String())
	// Even told of the old peer's key, it cannot be understood by who has the old
	// key of this node.
	err := a.Connect(background, next.key, []Peer{{Node: "b", Endpoint: stale, Addresses: []netip.Addr{addressOf(1)}}})
	if err != nil {
		t.Fatal(err)
	}
	unreachable(t, speaker.ns, at.String())
	// The new key of node a is all that was missing.
	err = b.Connect(background, j.key, []Peer{{Node: "a", Endpoint: fresh, Addresses: []netip.Addr{addressOf(0)}}})
	if err != nil {
		t.Fatal(err)
	}
	reach(t, speaker.ns, at.String())
}

func TestWireGuardHidesWhatCrossesTheUnderlay(t *testing.T) {
	eachTunnel(t, func(t *testing.T, f *fabric, j job) {
		tasks := span(t, j, f.node(), f.node())
		secret := []byte("a secret that nobody on the underlay may read")
		tap := f.tap()
		roundTrip(t, tasks[0], listen(t, tasks[1].ns, onPort(tasks[1].address, 0)), secret)
		// VXLAN is here to show that the tap would see it.
		seen, plain := tap(), j.plan.Tunnel == TunnelVXLAN
		if bytes.Contains(seen, secret) != plain {
			t.Errorf("among %d bytes on the underlay the plain text is seen: %v; want %v", len(seen), !plain, plain)
		}
	})
}

func TestTunnelsSurviveAnAgentsRestart(t *testing.T) {
	eachTunnel(t, func(t *testing.T, f *fabric, j job) {
		a, b := f.node(), f.node()
		tasks := span(t, j, a, b)
		conn, err := dial(tasks[0].ns, listen(t, tasks[1].ns, onPort(tasks[1].address, 0)).String(), ample)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		before := a.prepare(j)
		for i, n := range []*node{a, b} {
			n.restart()
			if err := n.Retain(background, map[Key][]int{j.key: {i}}); err != nil {
				t.Fatal(err)
			}
		}
		echo(t, conn)
		if after := a.prepare(j); fmt.Sprint(after) != fmt.Sprint(before) {
			t.Errorf("the endpoint was %v, and is %v after a restart", before, after)
		}
	})
}

func TestNetworksOfOneNodeHaveNoTunnel(t *testing.T) {
	n := newFabric(t).node(func(o *Options) { o.Underlay = netip.Addr{} })
	j := newJob("j-local")
	if endpoint := n.prepare(j); endpoint.Address.IsValid() {
		t.Errorf("the endpoint is %v; want none", endpoint)
	}
	if err := n.Connect(background, j.key, []Peer{{Node: "x"}}); err == nil {
		t.Error("a network planned for one node was connected to another")
	}
}

func TestAPeerWithoutAKeyIsRefused(t *testing.T) {
	n := newFabric(t).node()
	j := newJob("j-nokey", over(TunnelWireGuard))
	n.prepare(j)
	if err := n.Connect(background, j.key, []Peer{{Node: "x", Endpoint: Endpoint{Address: netip.MustParseAddrPort("100.64.7.9:1")}}}); err == nil {
		t.Error("a peer without a key was accepted")
	}
}

// The kernel's own WireGuard, where there is one: here only that its absence is
// found out cleanly.
func TestKernelWireGuardIsDetected(t *testing.T) {
	n := newFabric(t).node()
	has, err := n.kernelHasWireGuard()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the kernel has WireGuard: %v", has)
	kind, err := n.tunnelFor(newJob("j", over(TunnelWireGuard)).plan)
	if err != nil || (kind == tunnelKernel) != has {
		t.Errorf("the tunnel would be %q, %v", kind, err)
	}
	if _, err := n.links.links.LinkByName(n.uplinkPrefix() + "try"); err == nil {
		t.Error("the device of the attempt is left")
	}
}
