package network

import (
	"context"
	"errors"
	"fmt"
	"os"

	"dormouse/internal/failpoint"
)

// Join gives a task's namespace its eth0, address and default route, and
// publishes the task's ports. Called again with the same namespace it changes
// nothing, with another one it moves the task there. When it fails, the task has
// not joined. A published port in use is a *PortTakenError.
func (m *Manager) Join(ctx context.Context, key Key, member Member, netns *os.File) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.join(ctx, key, member, netns); err != nil {
		return fmt.Errorf("join task %d of job %s to its network: %w", member.Index, key.Job, err)
	}
	return nil
}

func (m *Manager) join(ctx context.Context, key Key, member Member, netns *os.File) error {
	n, err := m.find(key)
	if err != nil {
		return err
	}
	if err := n.Plan.checkMember(member); err != nil {
		return err
	}
	for _, other := range n.Members {
		if other.Index != member.Index && other.Address == member.Address {
			return fmt.Errorf("task %d has the address %v", other.Index, member.Address)
		}
	}
	if err := m.checkPorts(n, member); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := m.change(n, n.with(member)); err != nil {
		return err
	}
	failpoint.Hit("network.join.recorded")
	err = linkMember(n.router, n.Plan, member, netns)
	failpoint.Hit("network.join.linked")
	if err == nil {
		err = m.publish(n)
	}
	if err == nil {
		err = m.forgetConnections(n.portsOf(member.Index))
	}
	if err != nil {
		return errors.Join(err, m.unlink(n, member.Index), m.change(n, n.without(member.Index)), m.publish(n))
	}
	return nil
}

// change records what the network shall be, before anything is done about it.
func (m *Manager) change(n *network, changed record) error {
	if err := m.save(changed); err != nil {
		return err
	}
	n.record = changed
	return nil
}

// publish makes the rules fit the members. A network without ports to publish
// has had its rules from the start.
func (m *Manager) publish(n *network) error {
	if len(n.Plan.Publish) == 0 {
		return nil
	}
	if n.router != nil {
		if err := filterRouter(n.router, n.Plan, n.published()); err != nil {
			return err
		}
	}
	return m.filterNode()
}

// unlink removes a task's link, both ends of it.
func (m *Manager) unlink(n *network, index int) error {
	if n.router == nil {
		return nil
	}
	return n.router.deleteLink(portOf(index))
}

// Leave takes a task out of its network, and removes the network when no task
// is left in it. A network or task that is not there is no error.
func (m *Manager) Leave(ctx context.Context, key Key, index int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, known := m.networks[key]
	if !known {
		return nil
	}
	err := m.takeOut(n, index)
	if err == nil && len(n.Members) == 0 {
		err = m.remove(ctx, n)
	}
	if err != nil {
		return fmt.Errorf("take task %d of job %s out of its network: %w", index, key.Job, err)
	}
	return nil
}

// takeOut removes what is there of a member alone. The last one leaves the
// rest to remove.
func (m *Manager) takeOut(n *network, index int) error {
	if err := m.change(n, n.without(index)); err != nil {
		return err
	}
	failpoint.Hit("network.leave.recorded")
	if err := m.unlink(n, index); err != nil {
		return err
	}
	failpoint.Hit("network.leave.unlinked")
	if err := m.publish(n); err != nil {
		return err
	}
	return m.forgetConnections(n.portsOf(index))
}
