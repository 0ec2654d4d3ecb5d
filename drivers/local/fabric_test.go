package local

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"dormouse/drivers"
)

// inside runs do on a thread that is in the namespace; sockets made there stay
// there.
func inside(namespace *os.File, do func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET); err != nil {
			result <- err
			return
		}
		result <- do()
	}()
	return <-result
}

// newNamespace returns an empty network namespace that lives as long as the test.
func newNamespace(t *testing.T) *os.File {
	t.Helper()
	made := make(chan *os.File)
	go func() {
		runtime.LockOSThread()
		defer close(made)
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		file, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			t.Error(err)
			return
		}
		made <- file
	}()
	namespace := <-made
	if namespace == nil {
		t.FailNow()
	}
	t.Cleanup(func() { namespace.Close() })
	return namespace
}

// echo serves one connection in the namespace that says where the caller came from.
func echo(t *testing.T, namespace *os.File, address string) {
	t.Helper()
	var listener net.Listener
	err := inside(namespace, func() (err error) {
		listener, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(connection, connection.RemoteAddr().(*net.TCPAddr).IP)
			connection.Close()
		}
	}()
}

// call returns what the server at the address says to a caller in the namespace.
func call(namespace *os.File, address string, patience time.Duration) (said string, err error) {
	err = inside(namespace, func() error {
		connection, err := net.DialTimeout("tcp", address, patience)
		if err != nil {
			return err
		}
		defer connection.Close()
		text := make([]byte, 64)
		n, err := connection.Read(text)
		said = string(text[:n])
		return err
	})
	return said, err
}

func own(t *testing.T) *os.File {
	t.Helper()
	namespace, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { namespace.Close() })
	return namespace
}

// nodeNamespace is that of the node's anchor.
func nodeNamespace(t *testing.T, d *Driver, name string) *os.File {
	t.Helper()
	pid, err := d.nodes[name].anchor()
	if err != nil || pid == 0 {
		t.Fatalf("the anchor of node %s: pid %d, %v", name, pid, err)
	}
	namespace, err := namespaceOf(pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { namespace.Close() })
	return namespace
}

func underlay(t *testing.T, d *Driver, name string) netip.Addr {
	t.Helper()
	address, err := d.options.Fabric.address(name)
	if err != nil {
		t.Fatal(err)
	}
	return address
}

func inode(t *testing.T, file *os.File) uint64 {
	t.Helper()
	var stat unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &stat); err != nil {
		t.Fatal(err)
	}
	return stat.Ino
}

func ourDevices(t *testing.T, f *Fabric) (names []string) {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if strings.HasPrefix(link.Attrs().Name, f.bridge) {
			names = append(names, link.Attrs().Name)
		}
	}
	return names
}

func TestNodesAndMachineReachEachOther(t *testing.T) {
	ctx, _, d := openWithNode(t)
	if _, err := d.Provision(ctx, []drivers.NodeSpec{{Name: "b"}}); err != nil {
		t.Fatal(err)
	}
	a, b := nodeNamespace(t, d, "a"), nodeNamespace(t, d, "b")
	atB := netip.AddrPortFrom(underlay(t, d, "b"), 7000).String()
	echo(t, b, atB)
	if said, err := call(a, atB, 5*time.Second); said != underlay(t, d, "a").String() {
		t.Errorf("from the other node: it says %q, %v; want the caller's own address", said, err)
	}
	machine := hostAt(d.options.Fabric.plan.Subnet, bridgeHost).String()
	if said, err := call(own(t), atB, 5*time.Second); said != machine {
		t.Errorf("from the machine: it says %q, %v; want %s", said, err, machine)
	}
}

func TestNodesReachBeyondTheMachineButAreNotReached(t *testing.T) {
	_, _, d := openWithNode(t)
	world := newNamespace(t)
	street := netlink.NewVeth(netlink.LinkAttrs{Name: "street"})
	street.PeerName, street.PeerNamespace = "street", netlink.NsFd(world.Fd())
	if err := netlink.LinkAdd(street); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(street) })
	there, err := netlink.NewHandleAt(netns.NsHandle(world.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	here, err := netlink.NewHandle()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	for address, handle := range map[string]*netlink.Handle{"192.0.2.1/24": here, "192.0.2.2/24": there} {
		link, err := handle.LinkByName("street")
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := netlink.ParseAddr(address)
		if err != nil {
			t.Fatal(err)
		}
		if err := handle.AddrAdd(link, parsed); err != nil {
			t.Fatal(err)
		}
		if err := handle.LinkSetUp(link); err != nil {
			t.Fatal(err)
		}
	}
	if err := there.RouteAdd(&netlink.Route{Gw: net.ParseIP("192.0.2.1")}); err != nil {
		t.Fatal(err)
	}
	a := nodeNamespace(t, d, "a")
	echo(t, world, "192.0.2.2:80")
	if said, err := call(a, "192.0.2.2:80", 5*time.Second); said != "192.0.2.1" {
		t.Errorf("the world says %q, %v; want to be called from this machine's address", said, err)
	}
	atA := netip.AddrPortFrom(underlay(t, d, "a"), 7000).String()
	echo(t, a, atA)
	if said, err := call(world, atA, 300*time.Millisecond); err == nil {
		t.Errorf("the world reached a node, which says %q", said)
	}
}

func TestForwardingIsSwitchedOffAgain(t *testing.T) {
	forwarding := func() string {
		raw, err := os.ReadFile(forwardingFile)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(raw))
	}
	newSite(t) // or skip
	if err := os.WriteFile(forwardingFile, []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	var open []*Fabric
	for _, id := range []string{"one", "two"} {
		f, err := NewFabric(filepath.Join(t.TempDir(), "fabric.json"), id, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if _, err := f.address("a"); err != nil {
			t.Fatal(err)
		}
		open = append(open, f)
	}
	if got := forwarding(); got != "1" {
		t.Errorf("with two fabrics, ip_forward is %s, want 1", got)
	}
	for i, want := range []string{"1", "0"} {
		if err := open[i].Close(); err != nil {
			t.Fatal(err)
		}
		if got := forwarding(); got != want {
			t.Errorf("after the end of %d fabrics, ip_forward is %s, want %s", i+1, got, want)
		}
	}
}

// TestOtherBridgesGoOn: what passes over a bridge that is not ours is none of our
// business, also where the kernel's br_netfilter shows it to our rules.
func TestOtherBridgesGoOn(t *testing.T) {
	newSite(t) // or skip
	if err := os.WriteFile(forwardingFile, []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	f, err := NewFabric(filepath.Join(t.TempDir(), "fabric.json"), "one", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.address("a"); err != nil {
		t.Fatal(err)
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "others"}}
	if err := netlink.LinkAdd(bridge); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(bridge) })
	if err := netlink.LinkSetUp(bridge); err != nil {
		t.Fatal(err)
	}
	var guests []*os.File
	for i, address := range []string{"198.51.100.1/24", "198.51.100.2/24"} {
		guest := newNamespace(t)
		cable := netlink.NewVeth(netlink.LinkAttrs{Name: fmt.Sprintf("others%d", i), MasterIndex: bridge.Index})
		cable.PeerName, cable.PeerNamespace = "eth0", netlink.NsFd(guest.Fd())
		if err := netlink.LinkAdd(cable); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { netlink.LinkDel(cable) })
		if err := netlink.LinkSetUp(cable); err != nil {
			t.Fatal(err)
		}
		inside, err := netlink.NewHandleAt(netns.NsHandle(guest.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		defer inside.Close()
		link, err := inside.LinkByName("eth0")
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := netlink.ParseAddr(address)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(inside.AddrAdd(link, parsed), inside.LinkSetUp(link)); err != nil {
			t.Fatal(err)
		}
		guests = append(guests, guest)
	}
	echo(t, guests[0], "198.51.100.1:80")
	if said, err := call(guests[1], "198.51.100.1:80", 5*time.Second); said != "198.51.100.2" {
		t.Errorf("the other guest says %q, %v; want to be called from 198.51.100.2", said, err)
	}
}

func TestNetworkOutlivesTheAgent(t *testing.T) {
	_, s, d := openWithNode(t)
	before := inode(t, nodeNamespace(t, d, "a"))
	agent := s.pidIn(t, "a", "agent", 0)
	if err := unix.Kill(agent, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	next := s.pidIn(t, "a", "agent", agent)
	its, err := namespaceOf(next)
	if err != nil {
		t.Fatal(err)
	}
	defer its.Close()
	if after := inode(t, its); after != before {
		t.Errorf("the next agent is in the namespace %d, want %d", after, before)
	}
}

func TestNextProcessTakesTheNetworkOverAndMendsIt(t *testing.T) {
	ctx, s, first := openWithNode(t)
	before := nodeNamespace(t, first, "a")
	address := underlay(t, first, "a")
	first.nodes["a"].stop() // the supervisor is a goroutine of the process that died
	cable, err := netlink.LinkByName(first.options.Fabric.linkName(address))
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkDel(cable); err != nil {
		t.Fatal(err)
	}
	second := s.open(t)
	defer second.Close(ctx)
	if _, err := second.Provision(ctx, []drivers.NodeSpec{{Name: "a"}}); err != nil {
		t.Fatal(err)
	}
	if after := nodeNamespace(t, second, "a"); inode(t, after) != inode(t, before) {
		t.Error("the node has another network namespace than before")
	}
	if got := underlay(t, second, "a"); got != address {
		t.Errorf("the node's address is %s, want %s as before", got, address)
	}
	at := netip.AddrPortFrom(address, 7000).String()
	echo(t, before, at)
	if _, err := call(own(t), at, 5*time.Second); err != nil {
		t.Errorf("the cable that was cut is not mended: %v", err)
	}
}

func TestPowerCutUnplugsTheNodeAndItComesBackWithItsAddress(t *testing.T) {
	ctx, _, d := openWithNode(t)
	address := underlay(t, d, "a")
	for range 5 {
		if err := d.PowerOff(ctx, "a"); err != nil {
			t.Fatal(err)
		}
		if left := ourDevices(t, d.options.Fabric); len(left) != 1 {
			t.Fatalf("after the power cut there are %v, want only the bridge", left)
		}
		if err := d.PowerOn(ctx, "a"); err != nil {
			t.Fatal(err)
		}
	}
	at := netip.AddrPortFrom(address, 7000).String()
	echo(t, nodeNamespace(t, d, "a"), at)
	if _, err := call(own(t), at, 5*time.Second); err != nil {
		t.Error(err)
	}
}

func TestNothingIsLeftOfTheFabric(t *testing.T) {
	ctx, _, d := openWithNode(t)
	if err := d.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if err := d.options.Fabric.Close(); err != nil {
		t.Fatal(err)
	}
	if left := ourDevices(t, d.options.Fabric); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestAnchorThatWasKilledIsReplaced(t *testing.T) {
	_, s, d := openWithNode(t)
	agent := s.pidIn(t, "a", "agent", 0)
	anchor, err := d.nodes["a"].anchor()
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range []int{anchor, agent} {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	s.pidIn(t, "a", "agent", agent)
	at := netip.AddrPortFrom(underlay(t, d, "a"), 7000).String()
	echo(t, nodeNamespace(t, d, "a"), at)
	if _, err := call(own(t), at, 5*time.Second); err != nil {
		t.Errorf("the node of the new anchor is not connected: %v", err)
	}
}

func TestSubnetInUseIsAvoided(t *testing.T) {
	newSite(t) // or skip
	dir := t.TempDir()
	log := slog.New(slog.DiscardHandler)
	first, err := NewFabric(filepath.Join(dir, "one"), "same", log)
	if err != nil {
		t.Fatal(err)
	}
	wanted := first.plan.Subnet
	taken := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "office"}}
	if err := netlink.LinkAdd(taken); err != nil {
		t.Fatal(err)
	}
	defer netlink.LinkDel(taken)
	if err := netlink.AddrAdd(taken, &netlink.Addr{IPNet: &net.IPNet{IP: hostAt(wanted, 5).AsSlice(), Mask: net.CIDRMask(30, 32)}}); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(taken); err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	address, err := first.address("a")
	if err != nil {
		t.Fatal(err)
	}
	if wanted.Contains(address) || !shared.Contains(address) {
		t.Errorf("the node's address is %s, which must be in %s but not in %s", address, shared, wanted)
	}
	again, err := NewFabric(filepath.Join(dir, "one"), "same", log)
	if err != nil {
		t.Fatal(err)
	}
	if same, err := again.address("a"); same != address {
		t.Errorf("the next process says %s, %v; want %s as before", same, err, address)
	}
}

func TestAddressesFollowTheirNumbers(t *testing.T) {
	if got := subnetAt(1<<31 + 5); !shared.Contains(got.Addr()) || got != got.Masked() || got.Bits() != subnetBits {
		t.Errorf("subnetAt gives %s, which is no /%d of %s", got, subnetBits, shared)
	}
	f := &Fabric{bridge: "dm123456"}
	if name := f.linkName(hostAt(subnetAt(4095), maxHost)); len(name) >= unix.IFNAMSIZ {
		t.Errorf("the name %s is too long for a network device", name)
	}
}

func TestDamagedPlanIsNamed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "fabric.json")
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewFabric(file, "x", slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("over a damaged plan: %v, want an error naming %s", err, file)
	}
}
