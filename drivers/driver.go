// Package drivers is the border between the controller and the platforms that
// give and take nodes.
//
// A Driver knows machines, not jobs: it makes them with an agent that will join
// the controller, takes them away, and tells when one is off. What runs on a
// node is between the controller and the node's agent. The controller never
// asks what kind of driver it has; drivertest checks that it need not.
package drivers

import (
	"context"
	"errors"
	"time"
)

// Power is what the platform knows of a machine.
type Power string

// A machine is on, certainly off (no process on it runs), or gone for good.
// Unknown says that the platform cannot tell at the moment.
const (
	PowerOn      Power = "on"
	PowerOff     Power = "off"
	PowerGone    Power = "gone"
	PowerUnknown Power = "unknown"
)

// ErrNoNode says that the driver has no node of that name.
var ErrNoNode = errors.New("the cloud has no such node")

// ErrUnsupported says that the platform has no such action.
var ErrUnsupported = errors.New("the cloud's driver cannot do that")

// NodeSpec is one node to make. CPUs and MemBytes of 0 leave the size to the
// driver's configuration.
type NodeSpec struct {
	Name     string
	CPUs     float64
	MemBytes int64
}

// Node is one node that the driver made.
type Node struct {
	Name     string
	Power    Power
	CPUs     float64
	MemBytes int64
	Pid      int // of the agent's process, where the node is a local one; else 0
}

// Event tells that a node's power changed without having been asked to, or
// because of PowerOff and PowerOn. Power off and gone are certain: nothing of
// the node runs any more.
type Event struct {
	Node   string
	Power  Power
	Reason string // one clause, for people
	// Leaves is set, with Power on, when the platform gives notice that it will
	// take the node away then, as for maintenance or the end of a spot machine.
	Leaves time.Time
}

// Bootstrap is what a new machine needs to join: how it gets there (user data,
// a file, ssh) is the driver's concern, but never on a command line.
type Bootstrap struct {
	URL   string // https://HOST:PORT or unix:///PATH
	Token string // joins once, as this node of this cloud only
	CA    []byte // PEM
}

// BootstrapFunc makes the Bootstrap of one node. A driver calls it right
// before the machine starts; each call makes the tokens before it void.
type BootstrapFunc func(ctx context.Context, node string) (Bootstrap, error)

// Driver gives and takes the nodes of one cloud.
//
// Contract: all methods are safe for concurrent use, and idempotent: called
// again after success, or after a failure at any point, also by the next
// process, they finish what was begun. They return when the thing is true, or
// with ctx's error, having left what can be finished later. Errors are one
// sentence naming the node.
type Driver interface {
	// Provision makes the nodes that are not there and powers on those that
	// are off. It returns what it made; their agents join on their own time.
	// What could not be made is in the error; what was made stays.
	Provision(ctx context.Context, nodes []NodeSpec) ([]Node, error)

	// Nodes lists every node that Provision made and Release did not take, by
	// name. A process that begins anew sees those of the process before it.
	Nodes(ctx context.Context) ([]Node, error)

	// Release takes a node away for good, with what is on it. One that is not
	// there is no error.
	Release(ctx context.Context, node string) error

	// PowerOff cuts the node's power: when it returns nil, no process of the
	// node runs, for certain. ErrNoNode when there is none of that name.
	PowerOff(ctx context.Context, node string) error

	// PowerOn starts a node that is off; its agent joins again, with no task
	// alive. ErrNoNode when there is none of that name.
	PowerOn(ctx context.Context, node string) error

	// Events returns a channel of what happens to nodes from now on, closed
	// after ctx ends or Close. It is asked for once. A slow reader loses
	// nothing.
	Events(ctx context.Context) (<-chan Event, error)

	// Close lets go of what the driver holds in this process. Nodes of real
	// platforms stay; nodes that live only as long as this process are
	// powered off first.
	Close(ctx context.Context) error
}
