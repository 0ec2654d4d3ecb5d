// Package local is the driver of virtual nodes: agents that run as processes of
// this machine, so that `dormouse up` is a whole cloud for someone trying it and
// for every test.
//
// A virtual node is one control group with everything that happens on it:
//
//	<cgroup v2>/GROUP/NODE/anchor    a process that owns the network namespace
//	<cgroup v2>/GROUP/NODE/agent     the agent
//	<cgroup v2>/GROUP/NODE/tasks/... the tasks it runs
//
// and a directory with its files. The agent has a mount namespace of its own, so
// what it mounts goes with it. The network namespace is the node's: it outlives the
// agent, because the networks of its jobs lead through it, and goes with the node.
// A Fabric connects the nodes of all clouds.
//
// Power off writes to the group's cgroup.kill (cgroups(7)): agent and tasks end at
// the same instant, as in a power cut. An agent that merely dies is started
// again, and finds its tasks alive. A process that begins anew, after the one
// before it was killed, takes over the agents that still run.
package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"dormouse/drivers"
)

// Options make a Driver.
type Options struct {
	Cloud string // name of the cloud the nodes belong to
	Dir   string // directory for the nodes' directories
	Group string // cgroup of this installation, such as dormouse-1a2b
	// CPUs and MemBytes are the size of a node whose NodeSpec has none; 0: all
	// the machine has, as the agent finds out itself.
	CPUs     float64
	MemBytes int64
	// Command returns the agent's program and arguments, for a configuration
	// file that is among the arguments.
	Command func(configFile string) []string
	// Hold is a program and its arguments that does nothing until it is killed:
	// the anchor of a node's network namespace.
	Hold []string
	// Fabric connects the nodes; clouds share it, and whoever made it closes it.
	Fabric *Fabric
	// Agent is added to the agent's configuration file as it is.
	Agent     map[string]any
	Bootstrap drivers.BootstrapFunc
	Logger    *slog.Logger
}

// Driver gives virtual nodes of one cloud.
type Driver struct {
	options Options
	cgroups *cgroups
	events  *queue

	mu    sync.Mutex
	nodes map[string]*node
}

var validName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$`)

// New returns the driver of one cloud of virtual nodes. Nodes that an earlier
// process left are known; those whose agents still run are watched again by
// Provision or PowerOn.
func New(o Options) (*Driver, error) {
	groups, err := findCgroups(o.Group)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("directory of cloud %s: %w", o.Cloud, err)
	}
	d := &Driver{options: o, cgroups: groups, events: newQueue(), nodes: map[string]*node{}}
	return d, d.loadNodes()
}

// loadNodes learns of the nodes of an earlier process.
func (d *Driver) loadNodes() error {
	files, err := filepath.Glob(filepath.Join(d.options.Dir, "*", specFile))
	if err != nil {
		return err
	}
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("node of cloud %s: %w", d.options.Cloud, err)
		}
		var stored storedSpec
		if err := json.Unmarshal(raw, &stored); err != nil {
			return fmt.Errorf("node file %s is damaged: %w; remove its directory to make the node anew", file, err)
		}
		if stored.Cloud == d.options.Cloud {
			d.nodes[stored.Name] = d.newNode(stored.NodeSpec)
		}
	}
	return nil
}

const specFile = "node.json"

// storedSpec is what specFile holds.
type storedSpec struct {
	Cloud string
	drivers.NodeSpec
}

// Provision implements drivers.Driver.
func (d *Driver) Provision(ctx context.Context, specs []drivers.NodeSpec) ([]drivers.Node, error) {
	var made []drivers.Node
	var failed error
	for _, spec := range specs {
		n, err := d.ensure(spec)
		if err == nil {
			err = n.powerOn(ctx)
		}
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("node %s: %w", spec.Name, err))
			continue
		}
		made = append(made, n.describe())
	}
	return made, failed
}

// ensure makes the node's directory before anything of it runs.
func (d *Driver) ensure(spec drivers.NodeSpec) (*node, error) {
	if !validName.MatchString(spec.Name) {
		return nil, fmt.Errorf("%q is no name for a node: 1 to 63 letters, digits, '.', '_' or '-'", spec.Name)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if spec.CPUs == 0 {
		spec.CPUs = d.options.CPUs
	}
	if spec.MemBytes == 0 {
		spec.MemBytes = d.options.MemBytes
	}
	n, ok := d.nodes[spec.Name]
	if ok && !n.resize(spec) {
		return n, nil
	}
	if !ok {
		n = d.newNode(spec)
	}
	if err := os.MkdirAll(n.dir, 0o700); err != nil {
		return nil, err
	}
	if err := writeJSON(filepath.Join(n.dir, specFile), storedSpec{d.options.Cloud, spec}); err != nil {
		return nil, err
	}
	d.nodes[spec.Name] = n
	return n, nil
}

func (d *Driver) newNode(spec drivers.NodeSpec) *node {
	return &node{
		spec:    spec,
		options: d.options,
		dir:     filepath.Join(d.options.Dir, spec.Name),
		group:   d.cgroups.node(spec.Name),
		events:  d.events,
		log:     d.options.Logger.With("node", spec.Name),
	}
}

// Nodes implements drivers.Driver.
func (d *Driver) Nodes(context.Context) ([]drivers.Node, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []drivers.Node
	for _, n := range d.nodes {
		all = append(all, n.describe())
	}
	slices.SortFunc(all, func(a, b drivers.Node) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// Release implements drivers.Driver.
func (d *Driver) Release(ctx context.Context, name string) error {
	n, err := d.find(name)
	if errors.Is(err, drivers.ErrNoNode) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := n.powerOff(ctx, "it was released"); err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(n.dir), d.options.Fabric.forget(name)); err != nil {
		return fmt.Errorf("node %s: %w", name, err)
	}
	d.mu.Lock()
	delete(d.nodes, name)
	d.mu.Unlock()
	d.events.add(drivers.Event{Node: name, Power: drivers.PowerGone, Reason: "it was released"})
	return nil
}

// PowerOff implements drivers.Driver.
func (d *Driver) PowerOff(ctx context.Context, name string) error {
	n, err := d.find(name)
	if err != nil {
		return err
	}
	return n.powerOff(ctx, "its power was cut")
}

// PowerOn implements drivers.Driver.
func (d *Driver) PowerOn(ctx context.Context, name string) error {
	n, err := d.find(name)
	if err != nil {
		return err
	}
	return n.powerOn(ctx)
}

func (d *Driver) find(name string) (*node, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if n, ok := d.nodes[name]; ok {
		return n, nil
	}
	return nil, fmt.Errorf("cloud %s, node %q: %w", d.options.Cloud, name, drivers.ErrNoNode)
}

// Events implements drivers.Driver.
func (d *Driver) Events(ctx context.Context) (<-chan drivers.Event, error) {
	return d.events.channel(ctx), nil
}

// Close powers all nodes off and removes the installation's control groups.
func (d *Driver) Close(ctx context.Context) error {
	d.mu.Lock()
	nodes := make([]*node, 0, len(d.nodes))
	for _, n := range d.nodes {
		nodes = append(nodes, n)
	}
	d.mu.Unlock()
	var failed error
	for _, n := range nodes {
		failed = errors.Join(failed, n.powerOff(ctx, "the controller ended"))
	}
	d.events.close()
	return errors.Join(failed, d.cgroups.removeTop())
}

// writeJSON replaces a file that only root may read.
func writeJSON(path string, value any) error {
	raw, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(path, append(raw, '\n'))
}

func writeFile(path string, content []byte) error {
	temporary := path + ".new"
	if err := os.WriteFile(temporary, content, 0o600); err != nil {
		return err
	}
	if err := os.Rename(temporary, path); err != nil {
		os.Remove(temporary)
		return err
	}
	return nil
}

func missing(err error) bool { return errors.Is(err, fs.ErrNotExist) }
