package network

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
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
	if err := m.moveToRouter(n.router, name); err != nil {
		return err
	}
	port, err := m.freePort(n.Slot)
	if err != nil {
		return err
	}
	key, err := wgtypes.NewKey(n.PrivateKey)
	if err != nil {
		return fmt.Errorf("read the tunnel's recorded key: %w", err)
	}
	number := int(port)
	if err := n.configureKernel(wgtypes.Config{PrivateKey: &key, ListenPort: &number}); err != nil {
		return err
	}
	n.Port = port
	return nil
}

func (n *network) connectKernel(peers []Peer) error {
	config := wgtypes.Config{}
	wanted := map[wgtypes.Key]bool{}
	interval := keepalive
	for _, peer := range peers {
		key := wgtypes.Key(peer.Endpoint.PublicKey)
		wanted[key] = true
		entry := wgtypes.PeerConfig{PublicKey: key, Endpoint: net.UDPAddrFromAddrPort(peer.Endpoint.Address),
			PersistentKeepaliveInterval: &interval, ReplaceAllowedIPs: true}
		for _, host := range hosts(peer.Addresses) {
			entry.AllowedIPs = append(entry.AllowedIPs, *ipNet(host))
		}
		config.Peers = append(config.Peers, entry)
	}
	present, err := n.kernelPeers()
	if err != nil {
		return err
	}
	for _, peer := range present {
		if !wanted[peer.PublicKey] {
			config.Peers = append(config.Peers, wgtypes.PeerConfig{PublicKey: peer.PublicKey, Remove: true})
		}
	}
	return n.configureKernel(config)
}

func (n *network) kernelPeers() (peers []wgtypes.Peer, err error) {
	err = n.withKernel(func(client *wgctrl.Client) error {
		device, err := client.Device(tunnelName)
		if err == nil {
			peers = device.Peers
		}
		return err
	})
	return peers, err
}

func (n *network) configureKernel(config wgtypes.Config) error {
	return n.withKernel(func(client *wgctrl.Client) error { return client.ConfigureDevice(tunnelName, config) })
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
