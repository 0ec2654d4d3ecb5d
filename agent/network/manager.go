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
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"dormouse/internal/failpoint"
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
		router, err := n.holder.namespace()
		if err != nil && !errors.Is(err, errHolderGone) {
			return err
		}
		n.router = router
		m.networks[r.Key] = n
		if n.usable() {
			if err := m.watch(n); err != nil {
				return err
			}
		}
	}
	return nil
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
	addresses, err := m.node.links.AddrList(nil, 0)
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
		{"router", func() error { return n.openRouter() }},
		{"uplink", func() error { return m.buildUplink(n.router, n.Slot) }},
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

func (n *network) openRouter() error {
	var err error
	if n.router, err = n.holder.namespace(); err != nil {
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
	if err := m.filterNode(); err != nil {
		return err
	}
	failpoint.Hit("network.remove.rules")
	if err := m.forget(n.Key); err != nil {
		return err
	}
	m.removeCgroup()
	m.log.Info("removed a network", "job", n.Key.Job, "run", n.Key.Run)
	return nil
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
	links, err := m.node.links.LinkList()
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
