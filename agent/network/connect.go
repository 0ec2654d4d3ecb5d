package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"dormouse/internal/failpoint"
)

// Connect tells the network its other nodes, all of them, each time.
func (m *Manager) Connect(ctx context.Context, key Key, peers []Peer) error {
	secure, err := m.connect(ctx, key, peers)
	if err == nil && secure {
		err = m.shakeHands(ctx, key)
	}
	if err != nil {
		return fmt.Errorf("connect the network of job %s: %w", key.Job, err)
	}
	return nil
}

// connect reports whether the tunnel is one whose ends shake hands.
func (m *Manager) connect(ctx context.Context, key Key, peers []Peer) (secure bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find(key)
	if err != nil {
		return false, err
	}
	if n.Tunnel == tunnelNone && len(peers) > 0 {
		return false, errors.New("it was planned for one node only")
	}
	for _, peer := range peers {
		for _, a := range peer.Addresses {
			if err := n.Plan.checkAddress(a); err != nil {
				return false, fmt.Errorf("node %s: %w", peer.Node, err)
			}
		}
	}
	if n.Tunnel == tunnelNone {
		return false, nil
	}
	changed := n.record
	changed.Peers = peers
	if err := m.change(n, changed); err != nil {
		return false, err
	}
	switch n.Tunnel {
	case tunnelVXLAN:
		err = connectVXLAN(n.router, peers)
	default:
		err = m.connectWireGuard(ctx, n, peers)
	}
	if err != nil {
		return false, err
	}
	failpoint.Hit("network.connect.peers")
	return n.Tunnel != tunnelVXLAN, routeTo(n.router, addressesOf(peers))
}

func addressesOf(peers []Peer) []netip.Addr {
	var list []netip.Addr
	for _, peer := range peers {
		list = append(list, peer.Addresses...)
	}
	return list
}
