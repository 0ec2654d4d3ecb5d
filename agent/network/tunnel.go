package network

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tunnelKind says how a network reaches its other nodes.
type tunnelKind string

const (
	tunnelNone      tunnelKind = ""
	tunnelKernel    tunnelKind = "kernel-wireguard"
	tunnelUserspace tunnelKind = "userspace-wireguard"
	tunnelVXLAN     tunnelKind = "vxlan"
)

// Bytes that a tunnel adds to every packet, over IPv4; over IPv6, whose header
// is longer, it is ipv6Extra more.
const (
	wireguardOverhead = 60 // IPv4 20, UDP 8, WireGuard 32: wireguard.com/papers/wireguard.pdf, 5.4.6
	vxlanOverhead     = 50 // IPv4 20, UDP 8, VXLAN 8, Ethernet 14: RFC 7348, 5
	ipv6Extra         = 20
	smallestMTU       = 576 // RFC 791: every host takes packets of this size
)

// tunnelMTU is what the underlay leaves, and never more than tasks send.
func (m *Manager) tunnelMTU(overhead int) (int, error) {
	device, err := m.underlayDevice()
	if err != nil {
		return 0, err
	}
	if m.options.Underlay.Is6() {
		overhead += ipv6Extra
	}
	mtu := min(TaskMTU, device.Attrs().MTU-overhead)
	if mtu < smallestMTU {
		return 0, fmt.Errorf("the MTU of %s, %d bytes, is too small for a tunnel", device.Attrs().Name, device.Attrs().MTU)
	}
	return mtu, nil
}

// underlayDevice is the device that has the node's underlay address.
func (m *Manager) underlayDevice() (netlink.Link, error) {
	if !m.options.Underlay.IsValid() {
		return nil, errNoAddress
	}
	addresses, err := m.node.addresses()
	if err != nil {
		return nil, fmt.Errorf("list the node's addresses: %w", err)
	}
	for _, a := range addresses {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap() == m.options.Underlay {
			return m.node.links.LinkByIndex(a.LinkIndex)
		}
	}
	return nil, fmt.Errorf("no device of the node has its underlay address %v", m.options.Underlay)
}

// routeTo makes exactly these addresses be on the other side of the tunnel.
func routeTo(router *namespace, addresses []netip.Addr) error {
	tunnel, err := router.links.LinkByName(tunnelName)
	if err != nil {
		return fmt.Errorf("find the tunnel's device: %w", err)
	}
	wanted := map[netip.Addr]bool{}
	for _, a := range addresses {
		wanted[a] = true
		route := &netlink.Route{LinkIndex: tunnel.Attrs().Index, Dst: ipNet(netip.PrefixFrom(a, a.BitLen())), Scope: netlink.SCOPE_LINK}
		if err := router.links.RouteReplace(route); err != nil {
			return fmt.Errorf("route %v to the tunnel: %w", a, err)
		}
	}
	routes, err := complete(func() ([]netlink.Route, error) { return router.links.RouteList(tunnel, unix.AF_INET) })
	if err != nil {
		return fmt.Errorf("list the routes to the tunnel: %w", err)
	}
	for _, route := range routes {
		if a, ok := hostOf(route.Dst); ok && wanted[a] {
			continue
		}
		if err := router.links.RouteDel(&route); err != nil {
			return fmt.Errorf("remove the route to %v: %w", route.Dst, err)
		}
	}
	return nil
}

func hostOf(n *net.IPNet) (netip.Addr, bool) {
	if n == nil {
		return netip.Addr{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	return a.Unmap(), ok
}

// startHolder starts the process that will own the router, and with it whatever
// part of the tunnel lives in a process.
func (m *Manager) startHolder(ctx context.Context, n *network) error {
	n.held = time.Now()
	log := filepath.Join(m.directory(n.Key), "holder.log")
	if n.Tunnel != tunnelUserspace {
		return n.holder.start(n.router, log, []string{m.options.Init, "hold", "--bare", n.Key.String()})
	}
	return m.startUserspace(ctx, n, log)
}

// buildTunnel makes tun0 in the router and sets it up.
func (m *Manager) buildTunnel(ctx context.Context, n *network) error {
	var err error
	switch n.Tunnel {
	case tunnelVXLAN:
		err = m.buildVXLAN(ctx, n)
	case tunnelKernel:
		if err = m.buildKernel(n); err == nil {
			err = m.secureTunnel(ctx, n)
		}
	case tunnelUserspace:
		err = m.secureTunnel(ctx, n) // the holder makes the device
	}
	if err != nil || n.Tunnel == tunnelNone {
		return err
	}
	return up(n.router, tunnelName)
}

// tunnelFor chooses how a plan's tunnel is made on this node.
func (m *Manager) tunnelFor(plan Plan) (tunnelKind, error) {
	switch {
	case !plan.Spans:
		return tunnelNone, nil
	case !m.options.Underlay.IsValid():
		return tunnelNone, errNoAddress
	case plan.Tunnel == TunnelVXLAN:
		return tunnelVXLAN, nil
	}
	kernel, err := m.kernelHasWireGuard()
	if err != nil {
		return tunnelNone, err
	}
	if kernel {
		return tunnelKernel, nil
	}
	if _, err := os.Stat(tunDevice); err != nil {
		return tunnelNone, fmt.Errorf("the kernel has neither WireGuard nor TUN devices: load its module wireguard or tun (%w)", err)
	}
	return tunnelUserspace, nil
}

// moveToRouter takes a device that was made in the node's namespace, where its
// UDP socket stays, to the router.
func (m *Manager) moveToRouter(router *namespace, name string) error {
	link, err := m.node.links.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find the tunnel's device: %w", err)
	}
	if err := m.node.links.LinkSetNsFd(link, int(router.file.Fd())); err != nil {
		return fmt.Errorf("move the tunnel's device to its router: %w", err)
	}
	moved, err := router.links.LinkByName(name)
	if err == nil {
		err = router.links.LinkSetName(moved, tunnelName)
	}
	if err != nil {
		return fmt.Errorf("name the tunnel's device: %w", err)
	}
	return nil
}

// tunnelDevice is a tunnel's name while it is still in the node's namespace.
func (m *Manager) tunnelDevice(slot int) string { return fmt.Sprintf("%st%d", m.uplinkPrefix(), slot) }
