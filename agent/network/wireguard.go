package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// The UDP ports of WireGuard tunnels: the network in slot N has firstPort+N,
// or the next one that is free.
const (
	firstPort = 51820
	portCount = 8192
)

// keepalive makes an end of a tunnel shake hands at once, so that no task's
// packet waits for it, and keeps a NAT in between from forgetting: wg(8),
// PersistentKeepalive.
const keepalive = 25 * time.Second

// yield is how long the end of a tunnel that does not begin waits for the one
// that does: see shakeHands.
const yield = 250 * time.Millisecond

// freePort finds a UDP port of the node for the tunnel of a slot.
func (m *Manager) freePort(slot int) (uint16, error) {
	for i := range portCount {
		port := firstPort + (slot+i)%portCount
		err := within(m.node.file, func() error { return bindOnce("udp", port) })
		if err == nil {
			return uint16(port), nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return 0, fmt.Errorf("find a UDP port for the tunnel: %w", err)
		}
	}
	return 0, fmt.Errorf("no UDP port from %d to %d is free for the tunnel", firstPort, firstPort+portCount-1)
}

// connectWireGuard makes the tunnel know exactly these peers. Sessions with
// peers that stay are kept.
func (m *Manager) connectWireGuard(ctx context.Context, n *network, peers []Peer) error {
	present, err := m.tunnelPeers(ctx, n)
	if err != nil {
		return err
	}
	config := wgtypes.Config{}
	wanted := map[wgtypes.Key]bool{}
	for _, peer := range peers {
		if len(peer.Endpoint.PublicKey) != wgtypes.KeyLen || !peer.Endpoint.Address.IsValid() {
			return fmt.Errorf("node %s gave no key or no address for its tunnel: prepare the network there first", peer.Node)
		}
		entry := wgtypes.PeerConfig{PublicKey: wgtypes.Key(peer.Endpoint.PublicKey), Endpoint: net.UDPAddrFromAddrPort(peer.Endpoint.Address), ReplaceAllowedIPs: true}
		for _, a := range peer.Addresses {
			entry.AllowedIPs = append(entry.AllowedIPs, *ipNet(netip.PrefixFrom(a, a.BitLen())))
		}
		if n.begins(entry.PublicKey) {
			interval := keepalive
			entry.PersistentKeepaliveInterval = &interval
		}
		wanted[entry.PublicKey] = true
		config.Peers = append(config.Peers, entry)
	}
	for _, peer := range present {
		if !wanted[peer.PublicKey] {
			config.Peers = append(config.Peers, wgtypes.PeerConfig{PublicKey: peer.PublicKey, Remove: true})
		}
	}
	return m.configureTunnel(ctx, n, config)
}

// begins decides which end of a tunnel begins the handshake: the one with the
// lower key.
func (n *network) begins(peer wgtypes.Key) bool {
	own := wgtypes.Key(n.PrivateKey).PublicKey()
	return bytes.Compare(own[:], peer[:]) < 0
}

// shakeHands lets the tunnel's ends find each other, whichever is connected
// first. A handshake begun with one that is not connected yet is lost, and two
// that are begun at once destroy each other; WireGuard tries again, but only
// after five seconds. So the end with the lower key begins when it is connected,
// and the other some time later, unless it has been greeted by then: at least one
// of these handshakes finds both connected, and they do not meet.
func (m *Manager) shakeHands(ctx context.Context, key Key) error {
	for deadline := time.Now().Add(yield); ; {
		late := time.Now().After(deadline)
		waiting, err := m.greetLocked(ctx, key, late)
		if err != nil || !waiting {
			return err
		}
		pause := yield / 25
		if late {
			pause = yield / 5 // who is told to connect only now must not hear this greeting
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

func (m *Manager) greetLocked(ctx context.Context, key Key, late bool) (waiting bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find(key)
	if err != nil {
		return false, err
	}
	return m.greet(ctx, n, late)
}

// greet reports whether there are peers that did not greet yet. When it is late,
// it greets them.
func (m *Manager) greet(ctx context.Context, n *network, late bool) (waiting bool, err error) {
	peers, err := m.tunnelPeers(ctx, n)
	if err != nil {
		return false, err
	}
	config := wgtypes.Config{}
	for _, peer := range peers {
		if n.begins(peer.PublicKey) || peer.PersistentKeepaliveInterval != 0 {
			continue
		}
		silent := peer.LastHandshakeTime.IsZero()
		waiting = waiting || silent
		if silent && !late {
			continue
		}
		interval := keepalive
		config.Peers = append(config.Peers, wgtypes.PeerConfig{PublicKey: peer.PublicKey, UpdateOnly: true, PersistentKeepaliveInterval: &interval})
	}
	if len(config.Peers) == 0 {
		return waiting, nil
	}
	return waiting, m.configureTunnel(ctx, n, config)
}

// configureTunnel changes the router's WireGuard device, tunnelPeers lists its
// peers; both whether the device is the kernel's or a holder's.
func (m *Manager) configureTunnel(ctx context.Context, n *network, config wgtypes.Config) error {
	if n.Tunnel == tunnelKernel {
		return n.withKernel(func(client *wgctrl.Client) error { return client.ConfigureDevice(tunnelName, config) })
	}
	_, err := m.converse(ctx, n.Key, settings(config))
	return err
}

func (m *Manager) tunnelPeers(ctx context.Context, n *network) (peers []wgtypes.Peer, err error) {
	if n.Tunnel == tunnelKernel {
		err = n.withKernel(func(client *wgctrl.Client) error {
			device, err := client.Device(tunnelName)
			if err == nil {
				peers = device.Peers
			}
			return err
		})
		return peers, err
	}
	lines, err := m.converse(ctx, n.Key, []string{"get=1"})
	if err != nil {
		return nil, err
	}
	return parsePeers(lines)
}

// secureTunnel gives the device its key and a port of the node.
func (m *Manager) secureTunnel(ctx context.Context, n *network) error {
	free, err := m.freePort(n.Slot)
	if err != nil {
		return err
	}
	key, err := wgtypes.NewKey(n.PrivateKey)
	if err != nil {
		return fmt.Errorf("read the tunnel's recorded key: %w", err)
	}
	port := int(free)
	if err := m.configureTunnel(ctx, n, wgtypes.Config{PrivateKey: &key, ListenPort: &port}); err != nil {
		return fmt.Errorf("give the tunnel its key and port %d: %w", port, err)
	}
	n.Port = free
	return nil
}
