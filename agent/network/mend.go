package network

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A holder ends with its network, or because somebody, the kernel short of
// memory included, killed it. The manager still has the router's namespace then,
// so it starts another holder in it: tasks notice nothing, or, of a userspace
// tunnel, a short silence.

// mendInterval keeps a holder that ends again and again from eating the node.
const mendInterval = time.Second

// watch mends the network when its holder ends, until dismantle, or Close, stops
// it.
func (m *Manager) watch(n *network) error {
	pidfd, err := n.holder.pidfd()
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(m.living)
	n.unwatch = stop
	m.watchers.Go(func() {
		defer pidfd.Close()
		if awaitExit(ctx, pidfd) != nil {
			return
		}
		m.holderEnded(ctx, n)
	})
	return nil
}

// awaitExit returns nil when the process of a pidfd has ended: pidfd_open(2).
func awaitExit(ctx context.Context, pidfd *os.File) error {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = pidfd.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	return raw.Read(func(fd uintptr) bool {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		ready, err := unix.Poll(poll, 0)
		return err == nil && ready == 1
	})
}

func (m *Manager) holderEnded(ctx context.Context, n *network) {
	select {
	case <-ctx.Done():
		return
	case <-time.After(time.Until(n.held.Add(mendInterval))):
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if ctx.Err() != nil || n.router == nil {
		return // it was meant to end
	}
	if err := m.mend(ctx, n); err != nil {
		m.log.Error("the process that held a network ended, and another cannot be started", "job", n.Key.Job, "run", n.Key.Run, "error", err)
		return
	}
	m.log.Warn("the process that held a network ended; started another", "job", n.Key.Job, "run", n.Key.Run)
}

// mend gives the router another holder and makes again what the old one took
// with it.
func (m *Manager) mend(ctx context.Context, n *network) error {
	n.holder.reap()
	if err := m.startHolder(ctx, n); err != nil {
		return err
	}
	if n.Tunnel == tunnelUserspace {
		if err := m.reconnect(ctx, n); err != nil {
			return fmt.Errorf("make the tunnel again: %w", err)
		}
	}
	return m.watch(n)
}

// reconnect sets a new userspace tunnel up like the one before. Its other ends
// need not be told: they are greeted, and see where from.
func (m *Manager) reconnect(ctx context.Context, n *network) error {
	if err := m.buildTunnel(ctx, n); err != nil {
		return err
	}
	if err := m.save(n.record); err != nil {
		return err
	}
	if err := m.connectWireGuard(ctx, n, n.Peers); err != nil {
		return err
	}
	if _, err := m.greet(ctx, n, true); err != nil {
		return err
	}
	return routeTo(n.router, addressesOf(n.Peers))
}
