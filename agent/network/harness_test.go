package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"dormouse/agent/sandbox/cgroup"
	"dormouse/internal/emptyroot"
	"dormouse/internal/thread"
)

// The test program serves as dormouse and dormouse-init for the holders it
// starts, and as the agent that is killed at failpoints.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "hold":
			if err := emptyroot.Enter(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			for {
				_ = unix.Pause()
			}
		case "network-holder":
			if err := RunHolder(os.Args[2:]); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		case "victim":
			os.Exit(runVictim(os.Args[2:]))
		}
	}
	os.Exit(m.Run())
}

// needsRoot skips a test that cannot run here; with CI=true it fails instead.
func needsRoot(t testing.TB) {
	t.Helper()
	why := ""
	if os.Geteuid() != 0 {
		why = "root is needed to make network namespaces"
	} else if _, err := cgroup.Detect(); err != nil {
		why = err.Error()
	} else if _, err := os.Stat(tunDevice); err != nil {
		why = "userspace WireGuard needs " + tunDevice
	}
	if why == "" {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// newNamespace is a network namespace with lo up that ends with the test.
func newNamespace(t testing.TB) *os.File {
	t.Helper()
	var file *os.File
	err := thread.Spare(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		file, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		t.Fatalf("make a network namespace: %v", err)
	}
	t.Cleanup(func() { file.Close() })
	ns := open(t, file)
	if err := up(ns, "lo"); err != nil {
		t.Fatal(err)
	}
	return file
}

func open(t testing.TB, file *os.File) *namespace {
	t.Helper()
	ns, err := openNamespace(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ns.close)
	return ns
}

// fabric is an underlay: a bridge in a namespace of its own, which is also "the
// outside" of the nodes.
type fabric struct {
	t     testing.TB
	ns    *os.File
	links *namespace
	nodes int
}

var fabricAddress = netip.MustParseAddr("100.64.7.1")

func newFabric(t testing.TB) *fabric {
	t.Helper()
	needsRoot(t)
	f := &fabric{t: t, ns: newNamespace(t)}
	f.links = open(t, f.ns)
	attributes := netlink.NewLinkAttrs()
	attributes.Name = "underlay"
	if err := f.links.links.LinkAdd(&netlink.Bridge{LinkAttrs: attributes}); err != nil {
		t.Fatal(err)
	}
	if err := address(f.links, "underlay", netip.PrefixFrom(fabricAddress, 24)); err != nil {
		t.Fatal(err)
	}
	return f
}

// node is one node on the fabric.
type node struct {
	*Manager
	t        testing.TB
	ns       *os.File
	links    *namespace
	underlay netip.Addr
	options  Options
}

var groups atomic.Int32

func (f *fabric) node(change ...func(*Options)) *node {
	f.t.Helper()
	f.nodes++
	n := &node{t: f.t, ns: newNamespace(f.t), underlay: netip.AddrFrom4([4]byte{100, 64, 7, byte(f.nodes + 1)})}
	n.links = open(f.t, n.ns)
	// A new namespace has this setting from the machine's.
	if err := n.links.apply(setting{name: forwardingSetting, value: "0"}); err != nil {
		f.t.Fatal(err)
	}
	attributes := netlink.NewLinkAttrs()
	attributes.Name = fmt.Sprintf("n%d", f.nodes)
	pair := &netlink.Veth{LinkAttrs: attributes, PeerName: "under0", PeerNamespace: netlink.NsFd(n.ns.Fd())}
	if err := f.links.links.LinkAdd(pair); err != nil {
		f.t.Fatal(err)
	}
	bridge, err := f.links.links.LinkByName("underlay")
	if err != nil {
		f.t.Fatal(err)
	}
	if err := f.links.links.LinkSetMaster(pair, bridge); err != nil {
		f.t.Fatal(err)
	}
	if err := errors.Join(up(f.links, attributes.Name),
		address(n.links, "under0", netip.PrefixFrom(n.underlay, 24)),
		defaultRoute(n.links, "under0", fabricAddress)); err != nil {
		f.t.Fatal(err)
	}
	n.options = Options{
		State:     filepath.Join(f.t.TempDir(), "networks"),
		Cgroup:    testCgroup(f.t),
		Underlay:  n.underlay,
		Init:      testProgram(f.t),
		Program:   testProgram(f.t),
		Namespace: n.ns,
	}
	for _, c := range change {
		c(&n.options)
	}
	n.start()
	f.t.Cleanup(func() {
		if err := n.Retain(context.Background(), nil); err != nil {
			f.t.Errorf("clear the node: %v", err)
		}
		n.Close()
	})
	return n
}

// restart replaces the agent.
func (n *node) restart() {
	n.t.Helper()
	n.Close()
	n.start()
}

// start is what a new agent does first.
func (n *node) start() {
	n.t.Helper()
	manager, err := New(n.options)
	if err != nil {
		n.t.Fatal(err)
	}
	n.Manager = manager
}

func testProgram(t testing.TB) string {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return program
}

func testCgroup(t testing.TB) string {
	t.Helper()
	hierarchies, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(hierarchies.Unified, fmt.Sprintf("dormouse-network-test-%d-%d", os.Getpid(), groups.Add(1)))
}

// job is one run of a job and its plan.
type job struct {
	key  Key
	plan Plan
}

func newJob(name string, change ...func(*Plan)) job {
	j := job{key: Key{Job: name, Run: 1}, plan: Plan{
		Subnet:  netip.MustParsePrefix("10.64.16.0/20"),
		Gateway: netip.MustParseAddr("10.64.31.254"),
		Number:  7,
	}}
	for _, c := range change {
		c(&j.plan)
	}
	return j
}

func over(tunnel string) func(*Plan) {
	return func(p *Plan) { p.Spans, p.Tunnel = true, tunnel }
}

func publishing(list ...Publish) func(*Plan) {
	return func(p *Plan) { p.Publish = list }
}

func addressOf(index int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 64, 16, byte(1 + index)})
}

// task is a namespace that joined.
type task struct {
	index   int
	address netip.Addr
	ns      *os.File
}

func (n *node) prepare(j job) Endpoint {
	n.t.Helper()
	endpoint, err := n.Prepare(context.Background(), j.key, j.plan)
	if err != nil {
		n.t.Fatal(err)
	}
	return endpoint
}

// join prepares, if need be, and joins tasks to the job's network.
func (n *node) join(j job, indexes ...int) []task {
	n.t.Helper()
	n.prepare(j)
	var tasks []task
	for _, index := range indexes {
		created := task{index: index, address: addressOf(index), ns: newNamespace(n.t)}
		if err := n.Join(context.Background(), j.key, Member{Index: index, Address: created.address}, created.ns); err != nil {
			n.t.Fatal(err)
		}
		tasks = append(tasks, created)
	}
	return tasks
}

// span joins one task per node and connects the nodes.
func span(t testing.TB, j job, nodes ...*node) []task {
	t.Helper()
	var tasks []task
	endpoints := make([]Endpoint, len(nodes))
	for i, n := range nodes {
		endpoints[i] = n.prepare(j)
	}
	for i, n := range nodes {
		connectAll(t, j, nodes, endpoints, i)
		tasks = append(tasks, n.join(j, i)...)
	}
	return tasks
}

func connectAll(t testing.TB, j job, nodes []*node, endpoints []Endpoint, own int) {
	t.Helper()
	var peers []Peer
	for i := range nodes {
		if i != own {
			peers = append(peers, Peer{Node: fmt.Sprint("node-", i), Endpoint: endpoints[i], Addresses: []netip.Addr{addressOf(i)}})
		}
	}
	if err := nodes[own].Connect(context.Background(), j.key, peers); err != nil {
		t.Fatal(err)
	}
}

// listen serves an echo of everything in a namespace, with the peer's address
// said first.
func listen(t testing.TB, ns *os.File, at string) netip.AddrPort {
	t.Helper()
	var listener net.Listener
	err := within(ns, func() (err error) {
		listener, err = net.Listen("tcp4", at)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				fmt.Fprintln(conn, conn.RemoteAddr())
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	return listener.Addr().(*net.TCPAddr).AddrPort()
}

// blocked is how long a test waits for what must not happen.
const blocked = 300 * time.Millisecond

func dial(ns *os.File, to string, timeout time.Duration) (conn net.Conn, err error) {
	err = within(ns, func() (err error) {
		conn, err = net.DialTimeout("tcp4", to, timeout)
		return err
	})
	return conn, err
}

// ample is how long a machine may take for what should happen at once.
const ample = 30 * time.Second

// reach connects, has something echoed and returns the address that the server
// saw.
func reach(t testing.TB, ns *os.File, to string) netip.Addr {
	t.Helper()
	conn, err := dial(ns, to, ample)
	if err != nil {
		t.Fatalf("%s cannot be reached: %v", to, err)
	}
	defer conn.Close()
	return echo(t, conn)
}

func echo(t testing.TB, conn net.Conn) netip.Addr {
	t.Helper()
	_ = conn.SetDeadline(time.Now().Add(ample))
	if _, err := fmt.Fprintln(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	var seen, said string
	if _, err := fmt.Fscanln(conn, &seen); err != nil {
		t.Fatalf("the server says nothing: %v", err)
	}
	if _, err := fmt.Fscanln(conn, &said); err != nil || said != "hello" {
		t.Fatalf("the server echoes %q, %v; want hello", said, err)
	}
	return netip.MustParseAddrPort(seen).Addr()
}

// unreachable fails the test when a connection comes about.
func unreachable(t testing.TB, ns *os.File, to string) {
	t.Helper()
	conn, err := dial(ns, to, blocked)
	if err == nil {
		conn.Close()
		t.Errorf("%s can be reached; it must not be", to)
	}
}

// nothingLeft checks that the node is as it was before any network.
func (n *node) nothingLeft() {
	n.t.Helper()
	links, err := n.links.links.LinkList()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, link := range links {
		if name := link.Attrs().Name; name != "lo" && name != "under0" {
			n.t.Errorf("the device %s is left", name)
		}
	}
	conn, err := dialFilter(n.ns)
	if err != nil {
		n.t.Fatal(err)
	}
	defer conn.CloseLasting()
	tables, err := conn.ListTables()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, table := range tables {
		n.t.Errorf("the nftables table %s is left", table.Name)
	}
	if value, err := n.links.value(forwardingSetting); err != nil || strings.TrimSpace(value) != "0" {
		n.t.Errorf("ip_forward is %q, %v; want 0 as before", value, err)
	}
	if _, err := os.Stat(n.options.Cgroup); !errors.Is(err, os.ErrNotExist) {
		n.t.Errorf("the cgroup %s is left", n.options.Cgroup)
	}
	entries, err := os.ReadDir(n.options.State)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, entry := range entries {
		n.t.Errorf("%s is left in the state directory", entry.Name())
	}
}

// killHolder ends the process that holds a job's network.
func (n *node) killHolder(j job) {
	n.t.Helper()
	pids, err := n.holderOf(j.key).group.Pids()
	if err != nil || len(pids) != 1 {
		n.t.Fatalf("the holder's processes are %v, %v; want one", pids, err)
	}
	pidfd, err := unix.PidfdOpen(pids[0], 0)
	if err != nil {
		n.t.Fatal(err)
	}
	defer unix.Close(pidfd)
	if err := unix.Kill(pids[0], unix.SIGKILL); err != nil {
		n.t.Fatal(err)
	}
	if err := unix.Waitid(unix.P_PIDFD, pidfd, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil && !errors.Is(err, unix.ECHILD) {
		n.t.Fatal(err)
	}
}

// awaitHolder returns when a killed holder has been replaced.
func (n *node) awaitHolder(j job) {
	n.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		n.mu.Lock()
		usable := n.networks[j.key].usable()
		n.mu.Unlock()
		if usable {
			return
		}
	}
	n.t.Fatal("the killed holder was not replaced within 10 s")
}

func onPort(address netip.Addr, port int) string {
	return net.JoinHostPort(address.String(), strconv.Itoa(port))
}

// connectPair sets the two ends of a link up.
func connectPair(near, far *namespace) error {
	return errors.Join(
		address(near, "near", netip.MustParsePrefix("192.0.2.1/24")),
		address(far, "far", netip.MustParsePrefix("192.0.2.2/24")),
		near.await("near"), far.await("far"))
}
