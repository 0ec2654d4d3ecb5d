package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"dormouse/internal/failpoint"
)

// remove takes a network away, whatever there is of it, and last its record.
func (m *Manager) remove(ctx context.Context, n *network) error {
	if n.Built {
		n.Built = false
		if err := m.save(n.record); err != nil {
			return err
		}
	}
	if err := m.dismantle(ctx, n); err != nil {
		return err
	}
	failpoint.Hit("network.remove.dismantled")
	delete(m.networks, n.Key)
	if err := m.forgetAll(n); err != nil {
		m.networks[n.Key] = n // to be tried again
		return err
	}
	m.removeCgroup()
	m.log.Info("removed a network", "job", n.Key.Job, "run", n.Key.Run)
	return nil
}

// forgetAll makes the node forget a network that is gone, and last its record.
func (m *Manager) forgetAll(n *network) error {
	if err := m.filterNode(); err != nil {
		return err
	}
	failpoint.Hit("network.remove.rules")
	for _, member := range n.Members {
		if err := m.forgetConnections(n.portsOf(member.Index)); err != nil {
			return err
		}
	}
	return m.forget(n.Key)
}

// dismantle removes devices and holder. Devices first, by name: those that
// vanish with a namespace do so some time later, and their names and numbers may
// be wanted at once.
func (m *Manager) dismantle(ctx context.Context, n *network) error {
	if n.unwatch != nil {
		n.unwatch()
	}
	errs := []error{
		m.node.deleteLink(m.uplinkDevice(n.Slot)),
		m.node.deleteLink(m.tunnelDevice(n.Slot)),
	}
	if n.router != nil {
		errs = append(errs, unlinkOthers(n.router, nil), n.router.deleteLink(tunnelName))
		failpoint.Hit("network.remove.devices")
	}
	n.letGo()
	return errors.Join(append(errs, n.holder.remove(ctx))...)
}

// Retain removes all networks and members but the live ones, and whatever else
// an earlier manager left. An agent calls it when it knows its tasks. A key
// without indexes keeps a network that no task has joined yet.
func (m *Manager) Retain(ctx context.Context, live map[Key][]int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	for key, n := range m.networks {
		indexes, wanted := live[key]
		if !wanted || !n.Built {
			errs = append(errs, m.remove(ctx, n))
			continue
		}
		for _, member := range n.Members {
			if !slices.Contains(indexes, member.Index) {
				errs = append(errs, m.takeOut(n, member.Index))
			}
		}
		if n.router != nil { // an earlier manager may have died half-way through Leave
			errs = append(errs, unlinkOthers(n.router, n.Members))
		}
	}
	errs = append(errs, m.sweep(ctx))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove the networks that nobody needs: %w", err)
	}
	return nil
}

// sweep removes what no record names.
func (m *Manager) sweep(ctx context.Context) error {
	return errors.Join(m.sweepHolders(ctx), m.sweepDevices(), m.sweepRecords(), m.filterNode())
}

func (m *Manager) sweepHolders(ctx context.Context) error {
	entries, err := os.ReadDir(m.options.Cgroup)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list the holders of networks: %w", err)
	}
	var errs []error
	for _, entry := range entries {
		if key, ok := parseKey(entry.Name()); ok && entry.IsDir() && m.networks[key] == nil {
			errs = append(errs, m.holderOf(key).remove(ctx))
		}
	}
	m.removeCgroup()
	return errors.Join(errs...)
}

// removeCgroup removes the parent of the holders' groups when there are none.
func (m *Manager) removeCgroup() {
	if len(m.networks) == 0 {
		_ = os.Remove(m.options.Cgroup) // not empty: somebody else uses it too
	}
}

func (m *Manager) sweepDevices() error {
	links, err := complete(m.node.links.LinkList)
	if err != nil {
		return fmt.Errorf("list the node's network devices: %w", err)
	}
	known := map[string]bool{}
	for _, n := range m.networks {
		known[m.uplinkDevice(n.Slot)] = true
	}
	var errs []error
	for _, link := range links {
		name := link.Attrs().Name
		if strings.HasPrefix(name, m.uplinkPrefix()) && !known[name] {
			errs = append(errs, m.node.deleteLink(name))
		}
	}
	return errors.Join(errs...)
}

func (m *Manager) sweepRecords() error {
	_, damaged, err := m.recorded()
	if err != nil {
		return err
	}
	var errs []error
	for _, key := range damaged {
		if m.networks[key] == nil {
			errs = append(errs, m.forget(key))
		}
	}
	return errors.Join(errs...)
}
