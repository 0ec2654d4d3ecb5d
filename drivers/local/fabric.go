package local

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Fabric is the network between the virtual nodes of one installation: a bridge
// in the network namespace of this process, and for each node a veth whose other
// end is the node's eth0. The bridge has the first address of a subnet of its
// own, so that this machine reaches the nodes, and is their way out.
//
// What it decides (the subnet, the address of each node) is in a file, and
// every device bears a name that follows from it; so a process that begins anew
// finds and repairs what the one before it left.
type Fabric struct {
	file   string
	bridge string
	log    *slog.Logger

	mu     sync.Mutex
	plan   fabricPlan
	opened bool // the bridge is there
	wayOut bool // beyond this machine
}

// fabricPlan is what the file holds.
type fabricPlan struct {
	Bridge string         `json:"bridge"` // for people
	Subnet netip.Prefix   `json:"subnet"`
	Nodes  map[string]int `json:"nodes"` // host number in the subnet
}

const (
	// subnetBits leaves room for as many nodes as a bridge has ports: 1024,
	// BR_MAX_PORTS of the kernel.
	subnetBits = 22
	// maxHost is the last host number that is not the broadcast address.
	maxHost = 1<<(32-subnetBits) - 2
	// bridgeHost is the bridge's own number.
	bridgeHost = 1
	// nodeLink is the node's end of its veth.
	nodeLink = "eth0"
)

// shared is the space that RFC 6598 sets aside for networks within a provider;
// no address in it is anyone's on the internet, nor usually in an office.
var shared = netip.MustParsePrefix("100.64.0.0/10")

// NewFabric returns the fabric of the installation of that id, which keeps its
// plan in file. Nothing of it is made before the first node.
func NewFabric(file, id string, log *slog.Logger) (*Fabric, error) {
	sum := sha256.Sum256([]byte(id))
	f := &Fabric{file: file, bridge: fmt.Sprintf("%s%x", bridgePrefix, sum[:3]), log: log}
	raw, err := os.ReadFile(file)
	if missing(err) {
		f.plan = fabricPlan{Bridge: f.bridge, Subnet: subnetAt(binary.BigEndian.Uint32(sum[3:])), Nodes: map[string]int{}}
		return f, nil
	}
	if err != nil {
		return nil, fmt.Errorf("plan of the nodes' network: %w", err)
	}
	if err := json.Unmarshal(raw, &f.plan); err != nil || f.plan.Nodes == nil || f.plan.Subnet.Bits() != subnetBits || !f.plan.Subnet.Addr().Is4() {
		return nil, fmt.Errorf("%s, the plan of the nodes' network, is damaged; end all nodes and remove it", file)
	}
	return f, nil
}

// address is where a node is or will be on the fabric. The node keeps it until
// forget.
func (f *Fabric) address(node string) (netip.Addr, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.open(); err != nil {
		return netip.Addr{}, err
	}
	host, ok := f.plan.Nodes[node]
	if !ok {
		var err error
		if host, err = f.freeHost(); err != nil {
			return netip.Addr{}, err
		}
		f.plan.Nodes[node] = host
		if err := writeJSON(f.file, f.plan); err != nil {
			delete(f.plan.Nodes, node)
			return netip.Addr{}, fmt.Errorf("keep the address of node %s: %w", node, err)
		}
	}
	return hostAt(f.plan.Subnet, host), nil
}

func (f *Fabric) freeHost() (int, error) {
	taken := map[int]bool{}
	for _, host := range f.plan.Nodes {
		taken[host] = true
	}
	for host := bridgeHost + 1; host <= maxHost; host++ {
		if !taken[host] {
			return host, nil
		}
	}
	return 0, fmt.Errorf("the network %s has an address for no more than %d nodes", f.plan.Subnet, maxHost-bridgeHost)
}

// attach connects the network namespace of a node. It may be repeated, and then
// mends what is missing.
func (f *Fabric) attach(node string, namespace *os.File) error {
	address, err := f.address(node)
	if err != nil {
		return err
	}
	inside, err := netlink.NewHandleAt(netns.NsHandle(namespace.Fd()))
	if err != nil {
		return fmt.Errorf("configure the network namespace of node %s: %w", node, err)
	}
	defer inside.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.plug(inside, namespace, address); err != nil {
		return fmt.Errorf("connect node %s to the network of the nodes: %w", node, err)
	}
	return nil
}

func (f *Fabric) plug(inside *netlink.Handle, namespace *os.File, address netip.Addr) error {
	ours, theirs, err := f.cable(inside, namespace, address)
	if err != nil {
		return err
	}
	bridge, err := netlink.LinkByName(f.bridge)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetMaster(ours, bridge); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(ours); err != nil {
		return err
	}
	lo, err := inside.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := inside.LinkSetUp(lo); err != nil {
		return err
	}
	if err := inside.AddrReplace(theirs, onSubnet(address)); err != nil {
		return err
	}
	if err := inside.LinkSetUp(theirs); err != nil {
		return err
	}
	gateway := hostAt(f.plan.Subnet, bridgeHost)
	return inside.RouteReplace(&netlink.Route{LinkIndex: theirs.Attrs().Index, Gw: gateway.AsSlice()})
}

// cable returns both ends of the veth between this namespace and the node's. One
// with an end elsewhere, as when an earlier process ran in another namespace, is
// made anew.
func (f *Fabric) cable(inside *netlink.Handle, namespace *os.File, address netip.Addr) (ours, theirs netlink.Link, err error) {
	name := f.linkName(address)
	ours, err = linkOrNil(netlink.LinkByName(name))
	if err != nil {
		return nil, nil, err
	}
	theirs, err = linkOrNil(inside.LinkByName(nodeLink))
	if err != nil {
		return nil, nil, err
	}
	if ours != nil && theirs != nil && ours.Attrs().ParentIndex == theirs.Attrs().Index && theirs.Attrs().ParentIndex == ours.Attrs().Index {
		return ours, theirs, nil
	}
	if ours != nil {
		if err := deleted(netlink.LinkDel(ours)); err != nil {
			return nil, nil, err
		}
	}
	if theirs != nil {
		if err := deleted(inside.LinkDel(theirs)); err != nil {
			return nil, nil, err
		}
	}
	attributes := netlink.NewLinkAttrs()
	attributes.Name = name
	veth := netlink.NewVeth(attributes)
	veth.PeerName, veth.PeerHardwareAddr = nodeLink, hardwareAddress(address)
	veth.PeerNamespace = netlink.NsFd(namespace.Fd())
	if err := netlink.LinkAdd(veth); err != nil {
		return nil, nil, err
	}
	if theirs, err = inside.LinkByName(nodeLink); err != nil {
		return nil, nil, err
	}
	ours, err = netlink.LinkByName(name)
	return ours, theirs, err
}

// detach takes the node's cable away. The node's namespace may be there still,
// be on its way out, or gone.
func (f *Fabric) detach(node string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	host, ok := f.plan.Nodes[node]
	if !ok {
		return nil
	}
	return removeLink(f.linkName(hostAt(f.plan.Subnet, host)))
}

// forget frees the address of a node that is gone for good.
func (f *Fabric) forget(node string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.plan.Nodes[node]; !ok {
		return nil
	}
	delete(f.plan.Nodes, node)
	return writeJSON(f.file, f.plan)
}

// Close removes the bridge and the way out; all nodes are off by then. The plan
// stays.
func (f *Fabric) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.opened = false
	if err := f.close(); err != nil {
		return fmt.Errorf("remove the network of the nodes: %w", err)
	}
	return nil
}

func (f *Fabric) close() error {
	release, err := lockNamespace()
	if err != nil {
		return err
	}
	defer release()
	bridge, err := linkOrNil(netlink.LinkByName(f.bridge))
	if err != nil || bridge == nil {
		return err
	}
	if err := deleted(netlink.LinkDel(bridge)); err != nil {
		return err
	}
	if err := f.closeOutbound(bridge.Attrs().Alias == forwardingWasOff); f.wayOut {
		return err
	}
	return nil
}

// open makes the bridge, or finds it. The caller holds the lock.
func (f *Fabric) open() error {
	if f.opened {
		return nil
	}
	release, err := lockNamespace()
	if err != nil {
		return err
	}
	defer release()
	if err := f.makeBridge(); err != nil {
		return fmt.Errorf("make the network of the nodes: %w; `dormouse doctor` tells what this machine lacks", err)
	}
	f.opened = true
	return nil
}

func (f *Fabric) makeBridge() error {
	bridge, err := linkOrNil(netlink.LinkByName(f.bridge))
	if err != nil {
		return err
	}
	if bridge == nil {
		if err := f.choose(); err != nil {
			return err
		}
		attributes := netlink.NewLinkAttrs()
		attributes.Name = f.bridge
		// The nodes remember it: it must be the same after the bridge was made anew.
		attributes.HardwareAddr = hardwareAddress(hostAt(f.plan.Subnet, bridgeHost))
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attributes}); err != nil {
			return err
		}
		if bridge, err = netlink.LinkByName(f.bridge); err != nil {
			return err
		}
	}
	if err := netlink.AddrReplace(bridge, onSubnet(hostAt(f.plan.Subnet, bridgeHost))); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(bridge); err != nil {
		return err
	}
	err = f.openOutbound(bridge)
	f.wayOut = err == nil
	if err != nil {
		f.log.Warn("jobs on virtual nodes reach this machine, but nothing beyond it", "error", err)
	}
	return nil
}

// choose makes sure that the subnet is nobody else's in this namespace, and
// moves on to another one if it is.
func (f *Fabric) choose() error {
	used, err := usedPrefixes()
	if err != nil {
		return err
	}
	const subnets = 1 << (subnetBits - 10)
	candidate := f.plan.Subnet
	for range subnets {
		if !overlaps(candidate, used) {
			f.plan.Subnet = candidate
			return writeJSON(f.file, f.plan)
		}
		first := candidate.Addr().As4()
		candidate = subnetAt((binary.BigEndian.Uint32(first[:]) >> (32 - subnetBits)) + 1)
	}
	return fmt.Errorf("every part of %s is in use on this machine", shared)
}

// usedPrefixes are the destinations this namespace has routes for, but for
// defaults and those so wide that ours is a part of them anyway.
func usedPrefixes() ([]netip.Prefix, error) {
	routes, err := complete(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, err
	}
	var used []netip.Prefix
	for _, route := range routes {
		if route.Dst == nil {
			continue
		}
		address, ok := netip.AddrFromSlice(route.Dst.IP.To4())
		bits, _ := route.Dst.Mask.Size()
		if ok && bits > shared.Bits() {
			used = append(used, netip.PrefixFrom(address, bits))
		}
	}
	return used, nil
}

func overlaps(prefix netip.Prefix, others []netip.Prefix) bool {
	for _, other := range others {
		if prefix.Overlaps(other) {
			return true
		}
	}
	return false
}

// linkName is this machine's end of a node's cable.
func (f *Fabric) linkName(address netip.Addr) string {
	bytes := address.As4()
	return fmt.Sprintf("%s-%d", f.bridge, binary.BigEndian.Uint32(bytes[:])&(1<<(32-subnetBits)-1))
}

// subnetAt is one of the subnets of the shared space; any number will do.
func subnetAt(number uint32) netip.Prefix {
	first := shared.Addr().As4()
	base := binary.BigEndian.Uint32(first[:])
	number &= 1<<(subnetBits-shared.Bits()) - 1
	var address [4]byte
	binary.BigEndian.PutUint32(address[:], base|number<<(32-subnetBits))
	return netip.PrefixFrom(netip.AddrFrom4(address), subnetBits)
}

func hostAt(subnet netip.Prefix, host int) netip.Addr {
	address := subnet.Addr().As4()
	binary.BigEndian.PutUint32(address[:], binary.BigEndian.Uint32(address[:])+uint32(host))
	return netip.AddrFrom4(address)
}

func onSubnet(address netip.Addr) *netlink.Addr {
	return &netlink.Addr{IPNet: &net.IPNet{IP: address.AsSlice(), Mask: net.CIDRMask(subnetBits, 32)}}
}

// hardwareAddress follows from the IPv4 address, so that what others remember of
// a node that was off is right. 02 marks it as locally administered.
func hardwareAddress(address netip.Addr) net.HardwareAddr {
	bytes := address.As4()
	return append(net.HardwareAddr{0x02, 0x64}, bytes[:]...)
}

// lockNamespace makes fabrics choose their subnets one after another: it locks
// the network namespace itself, which all who share it can.
func lockNamespace() (release func(), err error) {
	namespace, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(namespace.Fd()), unix.LOCK_EX); err != nil {
		namespace.Close()
		return nil, fmt.Errorf("lock the network namespace: %w", err)
	}
	return func() { namespace.Close() }, nil
}

func removeLink(name string) error {
	link, err := linkOrNil(netlink.LinkByName(name))
	if err != nil || link == nil {
		return err
	}
	return deleted(netlink.LinkDel(link))
}

// linkOrNil makes nil of a link that is not there.
func linkOrNil(link netlink.Link, err error) (netlink.Link, error) {
	if _, ok := errors.AsType[netlink.LinkNotFoundError](err); ok {
		return nil, nil
	}
	return link, err
}

// deleted ignores that the link had gone already, by the end of its other end.
func deleted(err error) error {
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}
