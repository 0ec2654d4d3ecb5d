package network

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// forgetConnections makes the node look anew at what is said to published
// ports. Rules are asked only when a connection is new, and that of a client
// which goes on sending datagrams never ends: it would keep on going to the node
// from before the port was published, or to a router that is gone.
func (m *Manager) forgetConnections(ports []Publish) error {
	if len(ports) == 0 {
		return nil
	}
	addresses, err := m.node.addresses()
	if err != nil {
		return fmt.Errorf("list the node's addresses: %w", err)
	}
	match := portFlows{ports: map[portKey]bool{}, own: map[netip.Addr]bool{}}
	for _, a := range addresses {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			match.own[ip.Unmap()] = true
		}
	}
	for _, p := range ports {
		match.ports[portKey{protocols[p.Protocol], uint16(p.Port)}] = true
	}
	handle, err := netlink.NewHandleAt(netns.NsHandle(m.node.file.Fd()), unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("reach the node's connection tracking: %w", err)
	}
	defer handle.Close()
	_, err = complete(func() ([]struct{}, error) {
		_, err := handle.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, match)
		return nil, err
	})
	// A flow may end by itself meanwhile, and a kernel may not let its table be read.
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("forget the connections of published ports: %w", err)
	}
	return nil
}

// portFlows are the flows to some ports of the node itself.
type portFlows struct {
	ports map[portKey]bool
	own   map[netip.Addr]bool
}

type portKey struct {
	protocol byte
	port     uint16
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (f portFlows) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	to, ok := netip.AddrFromSlice(flow.Forward.DstIP)
	to = to.Unmap()
	return ok && f.ports[portKey{flow.Forward.Protocol, flow.Forward.DstPort}] && (f.own[to] || to.IsLoopback())
}
