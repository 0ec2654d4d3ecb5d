package network

import "net/netip"

// Subnet is that of a prepared network: addresses in it are of the job's tasks.
func (m *Manager) Subnet(key Key) (netip.Prefix, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, known := m.networks[key]
	if !known {
		return netip.Prefix{}, false
	}
	return n.Plan.Subnet, true
}
