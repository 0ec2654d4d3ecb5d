package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// Devices of the router's namespace, besides one `tN` for each task N.
const (
	bridgeName = "br0"
	uplinkName = "up0"
	tunnelName = "tun0"
)

// uplinkPool holds the addresses of the links between routers and their node,
// two for each. They are of RFC 2544, which nothing routes, and are never seen
// outside the node, which translates them.
var uplinkPool = netip.MustParsePrefix("198.18.0.0/15")

const maxSlots = 1 << 16

// uplink is the pair of addresses of a network's link to its node.
type uplink struct{ node, router netip.Addr }

// loopback is RFC 1122, 3.2.1.3.
var loopback = netip.MustParsePrefix("127.0.0.0/8")

func uplinkOf(slot int) uplink {
	base := uplinkPool.Addr().As4()
	at := func(n int) netip.Addr {
		return netip.AddrFrom4([4]byte{base[0], base[1] + byte(n>>16), byte(n >> 8), byte(n)})
	}
	return uplink{node: at(2 * slot), router: at(2*slot + 1)}
}

// uplinkPrefix begins the names of all devices that this manager makes in the
// node's namespace.
func (m *Manager) uplinkPrefix() string { return "dm" + m.token + "-" }

func (m *Manager) uplinkDevice(slot int) string { return fmt.Sprintf("%s%d", m.uplinkPrefix(), slot) }

// buildRouter gives a new namespace what every router has.
func buildRouter(router *namespace, plan Plan) error {
	if err := up(router, "lo"); err != nil {
		return err
	}
	// IPv6 is not routed; without it no device makes itself an address. Tasks must
	// not be told of shorter ways: there are none.
	err := router.apply(
		setting{name: "ipv4/ip_forward", value: "1"},
		setting{name: "ipv4/conf/all/rp_filter", value: "0"},
		setting{name: "ipv4/conf/default/rp_filter", value: "0"},
		setting{name: "ipv4/conf/all/send_redirects", value: "0"},
		setting{name: "ipv4/conf/default/send_redirects", value: "0"},
		setting{name: "ipv6/conf/all/disable_ipv6", value: "1", optional: true},
		setting{name: "ipv6/conf/default/disable_ipv6", value: "1", optional: true},
	)
	if err != nil {
		return err
	}
	attributes := netlink.NewLinkAttrs()
	attributes.Name = bridgeName
	attributes.MTU = TaskMTU
	attributes.HardwareAddr = taskMAC(plan.Gateway)
	snooping := false // it would delay, and there are no multicast routers
	bridge := &netlink.Bridge{LinkAttrs: attributes, MulticastSnooping: &snooping}
	if err := router.links.LinkAdd(bridge); err != nil {
		return fmt.Errorf("make the network's bridge: %w", err)
	}
	if err := router.links.AddrAdd(bridge, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(plan.Gateway, plan.Subnet.Bits()))}); err != nil {
		return fmt.Errorf("give the network's bridge the address %v: %w", plan.Gateway, err)
	}
	// The router answers for tasks on other nodes, and at once: by default it
	// would wait up to 0.8 s (arp(7), proxy_delay).
	if err := router.apply(
		setting{name: "ipv4/conf/" + bridgeName + "/proxy_arp", value: "1"},
		setting{name: "ipv4/neigh/" + bridgeName + "/proxy_delay", value: "0"},
	); err != nil {
		return err
	}
	// Frames between tasks of one node are nobody's packets to filter.
	if err := router.apply(setting{name: "bridge/bridge-nf-call-iptables", value: "0", optional: true}); err != nil {
		return err
	}
	return up(router, bridgeName)
}

// buildUplink joins the router to the node, unless the network is isolated.
func (m *Manager) buildUplink(n *network) error {
	if n.Plan.Isolated {
		return nil
	}
	router, addresses := n.router, uplinkOf(n.Slot)
	attributes := netlink.NewLinkAttrs()
	attributes.Name = m.uplinkDevice(n.Slot)
	pair := &netlink.Veth{LinkAttrs: attributes, PeerName: uplinkName, PeerNamespace: netlink.NsFd(router.file.Fd())}
	if err := m.node.links.LinkAdd(pair); err != nil {
		return fmt.Errorf("make the network's link to the node: %w", err)
	}
	if err := m.node.apply(
		setting{name: "ipv6/conf/" + attributes.Name + "/disable_ipv6", value: "1", optional: true},
		// For the node's own connections to published ports of 127.0.0.1. What
		// comes the other way is dropped by the node's table.
		setting{name: "ipv4/conf/" + attributes.Name + "/route_localnet", value: "1"},
	); err != nil {
		return err
	}
	if err := address(m.node, attributes.Name, netip.PrefixFrom(addresses.node, 31)); err != nil {
		return err
	}
	if err := address(router, uplinkName, netip.PrefixFrom(addresses.router, 31)); err != nil {
		return err
	}
	if err := defaultRoute(router, uplinkName, addresses.node); err != nil {
		return err
	}
	return errors.Join(m.node.await(attributes.Name), router.await(uplinkName))
}

// address gives a device an address and sets it up.
func address(in *namespace, device string, prefix netip.Prefix) error {
	link, err := in.links.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find the network device %s: %w", device, err)
	}
	if err := in.links.AddrReplace(link, &netlink.Addr{IPNet: ipNet(prefix)}); err != nil {
		return fmt.Errorf("give %s the address %v: %w", device, prefix, err)
	}
	return up(in, device)
}

func up(in *namespace, device string) error {
	link, err := in.links.LinkByName(device)
	if err == nil {
		err = in.links.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("set the network device %s up: %w", device, err)
	}
	return nil
}

func defaultRoute(in *namespace, device string, gateway netip.Addr) error {
	link, err := in.links.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find the network device %s: %w", device, err)
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway.AsSlice()}
	if err := in.links.RouteReplace(route); err != nil {
		return fmt.Errorf("route through %v on %s: %w", gateway, device, err)
	}
	return nil
}

func ipNet(prefix netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())}
}
