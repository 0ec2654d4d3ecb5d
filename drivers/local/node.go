package local

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/drivers"
)

// An agent that ends is started again after minBackoff, twice as long each
// time, up to maxBackoff; one that lived for steady starts over at minBackoff.
const (
	minBackoff = 200 * time.Millisecond
	maxBackoff = 10 * time.Second
	steady     = 30 * time.Second
)

// node is one virtual node. Its supervisor is the goroutine that keeps an agent
// running while the node is on.
type node struct {
	spec    drivers.NodeSpec
	options Options
	dir     string
	group   group
	events  *queue
	log     *slog.Logger

	// power orders powerOn and powerOff.
	power sync.Mutex

	mu    sync.Mutex
	agent *agent             // the one that runs now
	stop  context.CancelFunc // ends the supervisor; nil while the node is off
	done  chan struct{}      // closed when the supervisor has ended
}

// agent is a running agent process: our child, or one that the process
// before us started.
type agent struct {
	pid    int
	exited chan struct{}
}

func (n *node) describe() drivers.Node {
	n.mu.Lock()
	defer n.mu.Unlock()
	described := drivers.Node{Name: n.spec.Name, CPUs: n.spec.CPUs, MemBytes: n.spec.MemBytes, Power: drivers.PowerOff}
	if n.agent != nil {
		described.Pid = n.agent.pid
	}
	if n.stop != nil || n.group.populated() {
		described.Power = drivers.PowerOn
	}
	return described
}

// powerOn starts the agent, or takes over the one that still runs, and keeps
// one running from then on.
func (n *node) powerOn(ctx context.Context) error {
	n.power.Lock()
	defer n.power.Unlock()
	if n.supervised() {
		return nil
	}
	if err := n.group.create(); err != nil {
		return err
	}
	first, err := n.adopt()
	if err == nil && first == nil {
		first, err = n.start(ctx)
	}
	if err != nil {
		return errors.Join(err, n.group.killAndRemove(ctx), n.options.Fabric.detach(n.spec.Name))
	}
	supervising, stop := context.WithCancel(context.WithoutCancel(ctx))
	n.mu.Lock()
	n.agent, n.stop, n.done = first, stop, make(chan struct{})
	done := n.done
	n.mu.Unlock()
	go func() {
		defer close(done)
		n.supervise(supervising, first)
	}()
	n.events.add(drivers.Event{Node: n.spec.Name, Power: drivers.PowerOn, Reason: "it was powered on"})
	return nil
}

// resize gives a node that is off another size, and reports whether it did. One
// that is on keeps its own.
func (n *node) resize(spec drivers.NodeSpec) bool {
	n.power.Lock()
	defer n.power.Unlock()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stop != nil || n.spec == spec {
		return false
	}
	n.spec = spec
	return true
}

func (n *node) supervised() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.stop != nil
}

// powerOff ends everything on the node at once. It does nothing when the node
// is off.
func (n *node) powerOff(ctx context.Context, reason string) error {
	n.power.Lock()
	defer n.power.Unlock()
	n.mu.Lock()
	stop, done := n.stop, n.done
	n.mu.Unlock()
	if stop == nil && !n.group.exists() {
		return nil
	}
	if stop != nil {
		stop() // before the kill, lest the supervisor start another agent
	}
	if err := n.group.kill(ctx); err != nil {
		return fmt.Errorf("cut the power of node %s: %w", n.spec.Name, err)
	}
	if done != nil {
		<-done
		// It may have been starting an agent while we killed.
		if err := n.group.kill(ctx); err != nil {
			return fmt.Errorf("cut the power of node %s: %w", n.spec.Name, err)
		}
	}
	n.mu.Lock()
	n.agent, n.stop, n.done = nil, nil, nil
	n.mu.Unlock()
	if err := errors.Join(n.group.remove(), n.options.Fabric.detach(n.spec.Name)); err != nil {
		return fmt.Errorf("clear node %s away: %w", n.spec.Name, err)
	}
	n.events.add(drivers.Event{Node: n.spec.Name, Power: drivers.PowerOff, Reason: reason})
	return nil
}

// supervise keeps an agent running until ctx ends. It returns after the last
// agent has ended.
func (n *node) supervise(ctx context.Context, running *agent) {
	backoff, began := minBackoff, time.Now()
	for {
		if running != nil {
			<-running.exited
			if ctx.Err() != nil {
				return
			}
			if time.Since(began) > steady {
				backoff = minBackoff
			}
			n.log.Warn("the agent ended; starting it again", "pid", running.pid, "after", backoff)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, maxBackoff)
		began = time.Now()
		next, err := n.start(ctx)
		if err != nil {
			n.log.Error("cannot start the agent", "error", err)
		}
		n.mu.Lock()
		n.agent = next
		n.mu.Unlock()
		running = next
	}
}

// start runs the agent inside the node's control group and namespaces.
func (n *node) start(ctx context.Context) (*agent, error) {
	namespace, err := n.network(0)
	if err != nil {
		return nil, err
	}
	defer namespace.Close()
	boot, err := n.options.Bootstrap(ctx, n.spec.Name)
	if err != nil {
		return nil, fmt.Errorf("prepare the join of node %s: %w", n.spec.Name, err)
	}
	if err := n.writeConfig(boot); err != nil {
		return nil, fmt.Errorf("configure the agent of node %s: %w", n.spec.Name, err)
	}
	log, err := os.OpenFile(filepath.Join(n.dir, "agent.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	argv := n.options.Command(n.configFile())
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	// Unshared, not cloned: only then does os/exec make the mounts private.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	if err := startIn(cmd, n.group.agentDir(), namespace); err != nil {
		return nil, fmt.Errorf("start the agent of node %s: %w", n.spec.Name, err)
	}
	a := &agent{pid: cmd.Process.Pid, exited: make(chan struct{})}
	go func() {
		defer close(a.exited)
		cmd.Wait() // how it ended is in its log
	}()
	return a, nil
}

func (n *node) configFile() string { return filepath.Join(n.dir, "agent.json") }

// writeConfig writes the agent's configuration; see agent.Config.
func (n *node) writeConfig(boot drivers.Bootstrap) error {
	underlay, err := n.options.Fabric.address(n.spec.Name)
	if err != nil {
		return err
	}
	ca := filepath.Join(n.dir, "ca.pem")
	if err := writeFile(ca, boot.CA); err != nil {
		return err
	}
	config := map[string]any{
		"node":      n.spec.Name,
		"cloud":     n.options.Cloud,
		"join":      boot.URL,
		"token":     boot.Token,
		"ca":        ca,
		"state":     filepath.Join(n.dir, "agent"),
		"cgroup":    n.group.tasksPath(),
		"cpus":      n.spec.CPUs,
		"mem_bytes": n.spec.MemBytes,
		"underlay":  underlay,
		"virtual":   true,
	}
	for name, value := range n.options.Agent {
		config[name] = value
	}
	return writeJSON(n.configFile(), config)
}

// adopt finds the agent that an earlier process left running: the one in the
// node's group that was started with our configuration file. It returns nil when
// there is none.
func (n *node) adopt() (*agent, error) {
	pids, err := n.group.pids(n.group.agentDir())
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // it has just ended
		}
		if !startedWith(pid, n.configFile()) {
			unix.Close(fd)
			continue
		}
		namespace, err := n.network(pid)
		if err != nil {
			unix.Close(fd)
			return nil, err
		}
		namespace.Close()
		a := &agent{pid: pid, exited: make(chan struct{})}
		go func() {
			defer close(a.exited)
			defer unix.Close(fd)
			awaitExit(fd)
		}()
		n.log.Info("took over the running agent", "pid", pid)
		return a, nil
	}
	return nil, nil
}
