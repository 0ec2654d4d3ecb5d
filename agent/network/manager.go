package network

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Options are what a Manager needs.
type Options struct {
	// State is the directory of the records; it is made when missing. No two
	// managers share one.
	State string
	// Cgroup is the cgroup v2 directory below which every holder gets a group of
	// its own: an absolute path, made when missing. It must end with the node and
	// outlive the agent.
	Cgroup string
	// Underlay is the node's address on the network that reaches the other nodes;
	// zero when there is none, and jobs cannot span this node.
	Underlay netip.Addr
	// Init is the program dormouse-init, Program the program dormouse; empty: this
	// one.
	Init, Program string
	// Userspace makes WireGuard tunnels in userspace even where the kernel has
	// WireGuard.
	Userspace bool
	// Namespace is the node's network namespace; nil: that of the caller.
	Namespace *os.File
	Logger    *slog.Logger
}

// Manager makes and removes the networks of jobs on one node. Its methods may be
// called at the same time; they take turns.
type Manager struct {
	options Options
	token   string // tells this manager's devices and rules from those of others
	node    *namespace
	log     *slog.Logger

	mu       sync.Mutex
	networks map[Key]*network

	living   context.Context // until Close
	die      context.CancelFunc
	watchers sync.WaitGroup
}

// network is one job's network on this node.
type network struct {
	record
	holder *holder
	router *namespace // nil when nothing holds it
	held   time.Time  // when the holder was started
	// unwatch ends the watch over the holder; nil without one.
	unwatch context.CancelFunc
}

// New reads what an earlier manager with the same State recorded and takes over
// what is alive of it. It changes nothing; see Retain.
func New(options Options) (*Manager, error) {
	if options.State == "" || !filepath.IsAbs(options.Cgroup) {
		return nil, errors.New("networks need a directory for their state and the absolute path of a cgroup")
	}
	if options.Program == "" {
		program, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("find the program that holds networks: %w", err)
		}
		options.Program = program
	}
	state, err := filepath.Abs(options.State)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of networks: %w", err)
	}
	options.State = state
	options.Underlay = options.Underlay.Unmap()
	sum := sha256.Sum256([]byte(state))
	m := &Manager{options: options, token: hex.EncodeToString(sum[:2]), log: options.Logger, networks: map[Key]*network{}}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	if m.node, err = openNode(options.Namespace); err != nil {
		return nil, err
	}
	m.living, m.die = context.WithCancel(context.Background())
	if err := m.adopt(); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

func openNode(given *os.File) (*namespace, error) {
	if given != nil {
		return openNamespace(given)
	}
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open the node's network namespace: %w", err)
	}
	defer own.Close()
	return openNamespace(own)
}

func (m *Manager) adopt() error {
	records, _, err := m.recorded()
	if err != nil {
		return err
	}
	for _, r := range records {
		n := &network{record: r, holder: m.holderOf(r.Key)}
		if n.router, err = m.routerOf(n); err != nil && !errors.Is(err, errHolderGone) {
			return err
		}
		m.networks[r.Key] = n
		if n.usable() {
			if err := m.watch(n); err != nil {
				return err
			}
		}
	}
	return nil
}

// routerOf opens the namespace that the network's holder holds.
func (m *Manager) routerOf(n *network) (*namespace, error) {
	router, err := n.holder.namespace()
	if err != nil {
		return nil, err
	}
	if router.same(m.node) {
		// Never to be: what would be done to a router must not be done to the node.
		router.close()
		return nil, fmt.Errorf("the holder of the network of job %s is in the node's own namespace", n.Key.Job)
	}
	return router, nil
}

// Close lets go of everything; networks live on.
func (m *Manager) Close() error {
	m.die()
	m.watchers.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range m.networks {
		n.letGo()
	}
	m.node.close()
	return nil
}

func (n *network) letGo() {
	if n.unwatch != nil {
		n.unwatch()
	}
	if n.router != nil {
		n.router.close()
		n.router = nil
	}
}

// usable reports whether everything of the network is there.
func (n *network) usable() bool { return n.Built && n.router != nil && n.holder.alive() }

// Subnet returns the subnet of a network that was prepared here.
func (m *Manager) Subnet(key Key) (subnet netip.Prefix, known bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, known := m.networks[key]
	if !known {
		return netip.Prefix{}, false
	}
	return n.Plan.Subnet, true
}

// find returns a network that can be used.
func (m *Manager) find(key Key) (*network, error) {
	n, known := m.networks[key]
	if !known || !n.Built {
		return nil, errors.New("it was not prepared on this node")
	}
	if !n.usable() {
		return nil, fmt.Errorf("%w: prepare it again", errHolderGone)
	}
	return n, nil
}
