package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"dormouse/internal/failpoint"
)

// Prepare makes the network of a run on this node and returns how other nodes
// reach it. Called again it returns the same, or makes anew what was lost when
// the holder was killed; the tasks then have to join again. When it fails, nothing
// is left of what it made.
func (m *Manager) Prepare(ctx context.Context, key Key, plan Plan) (Endpoint, error) {
	plan, err := plan.check()
	if err == nil {
		err = key.check()
	}
	if err != nil {
		return Endpoint{}, fmt.Errorf("prepare the network of job %s: %w", key.Job, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	endpoint, err := m.prepare(ctx, key, plan)
	if err != nil {
		return Endpoint{}, fmt.Errorf("prepare the network of job %s: %w", key.Job, err)
	}
	return endpoint, nil
}

func (m *Manager) prepare(ctx context.Context, key Key, plan Plan) (Endpoint, error) {
	n, known := m.networks[key]
	if known && !reflect.DeepEqual(n.Plan, plan) {
		return Endpoint{}, errors.New("it was prepared by another plan; a run's plan never changes")
	}
	if known && n.usable() {
		return m.endpoint(n)
	}
	if !known {
		var err error
		if n, err = m.newNetwork(key, plan); err != nil {
			return Endpoint{}, err
		}
	}
	if err := m.rebuild(ctx, n); err != nil {
		return Endpoint{}, errors.Join(err, m.remove(context.WithoutCancel(ctx), n))
	}
	m.log.Info("made a network", "job", key.Job, "run", key.Run, "subnet", plan.Subnet, "tunnel", n.Tunnel)
	return m.endpoint(n)
}

// newNetwork thinks of a network and records it.
func (m *Manager) newNetwork(key Key, plan Plan) (*network, error) {
	n := &network{record: record{Key: key, Plan: plan}, holder: m.holderOf(key)}
	var err error
	if n.Tunnel, err = m.tunnelFor(plan); err != nil {
		return nil, err
	}
	if n.Slot, err = m.freeSlot(); err != nil {
		return nil, err
	}
	if n.Tunnel == tunnelKernel || n.Tunnel == tunnelUserspace {
		private, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			return nil, fmt.Errorf("make the tunnel's key: %w", err)
		}
		n.PrivateKey = private[:]
	}
	if err := m.save(n.record); err != nil {
		return nil, err
	}
	m.networks[key] = n
	failpoint.Hit("network.prepare.recorded")
	return n, nil
}

// freeSlot finds a number that neither a network here has nor the addresses of
// which the node has from elsewhere.
func (m *Manager) freeSlot() (int, error) {
	addresses, err := m.node.addresses()
	if err != nil {
		return 0, fmt.Errorf("list the node's addresses: %w", err)
	}
	taken := map[netip.Addr]bool{}
	for _, a := range addresses {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			taken[ip.Unmap()] = true
		}
	}
	for _, n := range m.networks {
		taken[uplinkOf(n.Slot).node] = true
	}
	for slot := range maxSlots {
		if !taken[uplinkOf(slot).node] {
			return slot, nil
		}
	}
	return 0, fmt.Errorf("the node has %d networks already", maxSlots)
}

// rebuild makes everything of a recorded network, in place of what may be left
// of it.
func (m *Manager) rebuild(ctx context.Context, n *network) error {
	if n.Built {
		n.Built = false
		if err := m.save(n.record); err != nil {
			return err
		}
	}
	if err := m.dismantle(ctx, n); err != nil {
		return err
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"holder", func() error { return m.startHolder(ctx, n) }},
		{"router", func() error { return m.openRouter(n) }},
		{"uplink", func() error { return m.buildUplink(n) }},
		{"tunnel", func() error { return m.buildTunnel(ctx, n) }},
		{"rules", func() error { return filterRouter(n.router, n.Plan, nil) }},
		{"node", func() error { return m.filterNode() }},
		{"built", func() error { n.Built = true; return m.save(n.record) }},
		{"watched", func() error { return m.watch(n) }},
	} {
		err := ctx.Err()
		if err == nil {
			err = step.do()
		}
		if err != nil {
			return err
		}
		failpoint.Hit("network.prepare." + step.name)
	}
	return nil
}

func (m *Manager) openRouter(n *network) error {
	var err error
	if n.router, err = m.routerOf(n); err != nil {
		return err
	}
	return buildRouter(n.router, n.Plan)
}

func (m *Manager) endpoint(n *network) (Endpoint, error) {
	if n.Tunnel == tunnelNone {
		return Endpoint{}, nil
	}
	e := Endpoint{Address: netip.AddrPortFrom(m.options.Underlay, n.Port)}
	if n.PrivateKey == nil {
		return e, nil
	}
	private, err := wgtypes.NewKey(n.PrivateKey)
	if err != nil {
		return e, fmt.Errorf("read the tunnel's recorded key: %w", err)
	}
	public := private.PublicKey()
	e.PublicKey = public[:]
	return e, nil
}
