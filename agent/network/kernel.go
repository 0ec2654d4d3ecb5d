package network

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
)

// kernelHasWireGuard finds out by making a device.
func (m *Manager) kernelHasWireGuard() (bool, error) {
	if m.options.Userspace {
		return false, nil
	}
	attributes := netlink.NewLinkAttrs()
	attributes.Name = m.uplinkPrefix() + "try"
	if err := m.node.deleteLink(attributes.Name); err != nil {
		return false, err
	}
	err := m.node.links.LinkAdd(&netlink.Wireguard{LinkAttrs: attributes})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("see whether the kernel has WireGuard: %w", err)
	}
	return true, m.node.deleteLink(attributes.Name)
}

// buildKernel makes the kernel's own WireGuard device.
func (m *Manager) buildKernel(n *network) error {
	mtu, err := m.tunnelMTU(wireguardOverhead)
	if err != nil {
		return err
	}
	name := m.tunnelDevice(n.Slot)
	attributes := netlink.NewLinkAttrs()
	attributes.Name = name
	attributes.MTU = mtu
	if err := m.node.links.LinkAdd(&netlink.Wireguard{LinkAttrs: attributes}); err != nil {
		return fmt.Errorf("make the WireGuard device: %w", err)
	}
	return m.moveToRouter(n.router, name)
}

// withKernel talks to the kernel's WireGuard about the router's device.
func (n *network) withKernel(work func(*wgctrl.Client) error) error {
	return within(n.router.file, func() error {
		client, err := wgctrl.New()
		if err != nil {
			return fmt.Errorf("talk to the kernel's WireGuard: %w", err)
		}
		defer client.Close()
		if err := work(client); err != nil {
			return fmt.Errorf("configure the kernel's WireGuard: %w", err)
		}
		return nil
	})
}
