package network

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// vxlanPort is the UDP port of VXLAN: RFC 7348, 5.
const vxlanPort = 4789

// buildVXLAN makes a VXLAN device that learns nothing and floods nothing.
func (m *Manager) buildVXLAN(ctx context.Context, n *network) error {
	mtu, err := m.tunnelMTU(vxlanOverhead)
	if err != nil {
		return err
	}
	name := m.tunnelDevice(n.Slot)
	attributes := netlink.NewLinkAttrs()
	attributes.Name = name
	attributes.MTU = mtu
	attributes.HardwareAddr = vxlanMAC(m.options.Underlay)
	device := &netlink.Vxlan{
		LinkAttrs: attributes,
		VxlanId:   int(n.Plan.Number),
		SrcAddr:   m.options.Underlay.AsSlice(),
		Port:      vxlanPort,
	}
	if err := m.addVXLAN(ctx, device); err != nil {
		return fmt.Errorf("make the VXLAN device: %w", err)
	}
	n.Port = vxlanPort
	return m.moveToRouter(n.router, name)
}

// addVXLAN makes the device. When the holder was killed, the kernel takes the
// older device of the same number away some milliseconds later, and does not say
// when; so this tries for a while.
func (m *Manager) addVXLAN(ctx context.Context, device *netlink.Vxlan) error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		err := m.node.links.LinkAdd(device)
		if !errors.Is(err, unix.EEXIST) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// vxlanMAC is the address of a node's tunnel devices. Every node can work out
// every other's.
func vxlanMAC(underlay netip.Addr) net.HardwareAddr {
	sum := sha256.Sum256([]byte(underlay.String()))
	return append(net.HardwareAddr{0x02}, sum[:5]...)
}

// connectVXLAN makes the device know exactly these peers.
func connectVXLAN(router *namespace, peers []Peer) error {
	link, err := router.links.LinkByName(tunnelName)
	if err != nil {
		return fmt.Errorf("find the tunnel's device: %w", err)
	}
	index := link.Attrs().Index
	wanted := map[string]bool{}
	for _, peer := range peers {
		mac := vxlanMAC(peer.Endpoint.Address.Addr())
		entries := []netlink.Neigh{{LinkIndex: index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, State: netlink.NUD_PERMANENT,
			HardwareAddr: mac, IP: peer.Endpoint.Address.Addr().AsSlice()}}
		for _, address := range peer.Addresses {
			entries = append(entries, netlink.Neigh{LinkIndex: index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, HardwareAddr: mac, IP: address.AsSlice()})
		}
		for _, entry := range entries {
			if err := router.links.NeighSet(&entry); err != nil {
				return fmt.Errorf("tell the VXLAN device of node %s: %w", peer.Node, err)
			}
			wanted[entryName(entry)] = true
		}
	}
	for _, family := range []int{unix.AF_BRIDGE, unix.AF_INET} {
		if err := forgetOthers(router, index, family, wanted); err != nil {
			return err
		}
	}
	return nil
}

// forgetOthers removes the static entries that are not wanted.
func forgetOthers(router *namespace, index, family int, wanted map[string]bool) error {
	entries, err := complete(func() ([]netlink.Neigh, error) { return router.links.NeighList(index, family) })
	if err != nil {
		return fmt.Errorf("list the neighbours of the VXLAN device: %w", err)
	}
	for _, entry := range entries {
		if entry.State&netlink.NUD_PERMANENT == 0 || wanted[entryName(entry)] {
			continue
		}
		entry.Family = family
		if err := router.links.NeighDel(&entry); err != nil {
			return fmt.Errorf("remove a neighbour of the VXLAN device: %w", err)
		}
	}
	return nil
}

func entryName(n netlink.Neigh) string { return n.IP.String() + " " + n.HardwareAddr.String() }
