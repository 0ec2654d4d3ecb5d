package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/monitor/tree"
)

// monitorFile holds what the monitor must remember.
const monitorFile = "monitor.json"

// treeLane is the lane on which the node hears from the controller.
const treeLane = "monitoring tree"

// maxOutbox bounds the findings that wait for a controller. What is found beyond
// is told when there is room, if it is still so.
const maxOutbox = 1000

// storeAgain is the pause after findings could not be stored.
const storeAgain = time.Second

// findings is monitorFile: what the controller is not known to have, and what was
// last said about each task and the node. Both change in one write, so that each
// change is said exactly once.
type findings struct {
	Outbox tree.Outbox            `json:"outbox"`
	Said   map[string]api.Finding `json:"said,omitempty"`
}

// treeNode is this node in the monitoring tree: it carries out what tree.Node
// decides.
type treeNode struct {
	path   string
	clock  *controllerClock
	log    *slog.Logger
	sample func() tree.Summary
	// toController sends what goes there; what it cannot is lost, and told again
	// in the next round.
	toController func(*agentpb.FromAgent)
	peers        treePeers
	wake         chan struct{} // capacity 1: something is due earlier

	mu      sync.Mutex
	node    *tree.Node
	said    map[string]api.Finding
	unsaved bool
	due     time.Time // by the controller's clock; zero: never
}

// treePeers are the ways to other nodes.
type treePeers interface {
	// report tells the parent and gives the answer to treeNode.answered, or calls
	// treeNode.unreachable. It does not wait.
	report(place tree.Assignment, r *tree.Report)
	// answer gives a child the answer to its report. It does not wait.
	answer(child string, a *tree.Ack)
}

func openTreeNode(state, id string, clock *controllerClock, log *slog.Logger) (*treeNode, error) {
	n := &treeNode{path: filepath.Join(state, monitorFile), clock: clock, log: log, wake: make(chan struct{}, 1)}
	stored := findings{Outbox: tree.Outbox{Stream: time.Now().UnixNano()}}
	if err := readJSON(n.path, &stored); err != nil && !notExist(err) {
		// Findings are no reason not to run tasks. The new stream is higher.
		log.Error("what the monitor had found is lost", "error", err)
		stored = findings{Outbox: tree.Outbox{Stream: time.Now().UnixNano()}}
	}
	if n.said = stored.Said; n.said == nil {
		n.said = map[string]api.Finding{}
	}
	n.node = tree.NewNode(id, stored.Outbox)
	return n, nil
}

// run does what is due until ctx ends.
func (n *treeNode) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.wake:
		case <-timer.C:
			n.input(func(now time.Time) tree.Output { return n.node.Tick(now) })
		}
		n.mu.Lock()
		due := n.due
		n.mu.Unlock()
		if due.IsZero() {
			timer.Stop()
			continue
		}
		timer.Reset(max(0, due.Sub(n.clock.now())))
	}
}

// input gives the node an input and carries out what follows.
func (n *treeNode) input(give func(now time.Time) tree.Output) {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := n.clock.now()
	n.carryOut(give(now), now)
}

// carryOut does what an output says. n.mu is held.
func (n *treeNode) carryOut(out tree.Output, now time.Time) {
	n.unsaved = n.unsaved || out.Store
	if n.unsaved {
		if err := n.save(); err != nil {
			n.log.Error("cannot store what the monitor found", "error", err)
			n.setDue(now.Add(storeAgain)) // and nothing is said before
			return
		}
	}
	n.setDue(out.Wake)
	for _, m := range out.Send {
		n.deliver(m)
	}
	if out.Sample == 0 {
		return
	}
	more, err := n.node.Observe(out.Sample, n.sample(), now)
	if err != nil {
		n.log.Error("a sample is not sent", "error", err)
		return
	}
	n.carryOut(more, now)
}

func (n *treeNode) save() error {
	err := writeJSONDurably(n.path, findings{Outbox: n.node.Outbox(), Said: n.said})
	n.unsaved = err != nil
	return err
}

func (n *treeNode) setDue(due time.Time) {
	if due.Equal(n.due) {
		return
	}
	n.due = due
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

func (n *treeNode) deliver(m tree.Message) {
	switch {
	case m.To == tree.Controller && m.Report != nil:
		n.toController(&agentpb.FromAgent{Body: &agentpb.FromAgent_TreeReport{TreeReport: m.Report.Proto()}})
	case m.Report != nil:
		place, _ := n.node.Place()
		n.peers.report(place, m.Report)
	case m.Ack != nil:
		n.peers.answer(m.To, m.Ack)
	}
}

// assign takes the node's place from the controller.
func (n *treeNode) assign(p *agentpb.TreeAssignment) {
	place, err := tree.AssignmentFrom(p)
	if err != nil {
		n.log.Error("the node's place in the monitoring tree is not taken", "error", err)
		return
	}
	n.log.Debug("place in the monitoring tree", "parent", place.Parent, "depth", place.Depth, "children", place.Children)
	n.input(func(now time.Time) tree.Output { return n.node.Assign(place, now) })
}

// answered takes the answer to a report from the parent or the controller.
func (n *treeNode) answered(from string, a tree.Ack) {
	n.input(func(now time.Time) tree.Output { return n.node.Ack(from, a, now) })
}

// unreachable says that a parent could not be told the report of a round.
func (n *treeNode) unreachable(parent string, round int64) {
	n.input(func(now time.Time) tree.Output { return n.node.Unreachable(parent, round, now) })
}

// reported takes a child's report.
func (n *treeNode) reported(child string, r tree.Report) {
	n.input(func(now time.Time) tree.Output { return n.node.Report(child, r, now) })
}

// errOutboxFull means that the controller has not been heard of for long.
var errOutboxFull = errors.New("too many findings wait for the controller")

// last is what was last said about key.
func (n *treeNode) last(key string) api.Finding {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.said[key]
}

// say tells the controller f, once, as the present state of key.
func (n *treeNode) say(key string, f api.Finding) error {
	body, err := json.Marshal(f)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.node.Outbox().Pending) >= maxOutbox {
		return errOutboxFull
	}
	now := n.clock.now()
	out, err := n.node.Raise(body, now)
	if err != nil {
		return fmt.Errorf("a finding about %s cannot be told: %w", key, err)
	}
	n.said[key] = f
	n.carryOut(out, now)
	return nil
}

// forget what was said about what is not kept any more. It need not be stored at
// once.
func (n *treeNode) forget(kept func(key string) bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for key := range n.said {
		if !kept(key) {
			delete(n.said, key)
		}
	}
}
