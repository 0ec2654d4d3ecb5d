package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"dormouse/api/agentpb"
	"dormouse/controller/store"
	"dormouse/monitor/tally"
	"dormouse/monitor/tree"
)

// monitor is the controller's end of the monitoring tree. One goroutine owns the
// Collector; what happens is handed to it, and it does what that answers:
// writes the tree and the verdicts in one transaction, together with all that
// follows from them, and tells the nodes.
type monitor struct {
	c      *Controller
	inputs chan func(now time.Time) tree.CollectorOutput
	// collector is the loop's alone.
	collector *tree.Collector

	mu     sync.Mutex
	latest measured
	silent map[string]silentFor // by node
}

// silentFor is for how many rounds in a row nothing was heard of a node's monitor,
// and whether it ever was before.
type silentFor struct {
	rounds int
	heard  bool
}

// measured is what the last round has brought.
type measured struct {
	number  int64
	at      time.Time
	round   tally.Round
	missing int // nodes of which nothing was heard
	reports int // that came to the controller
}

// Keys of store.Monitor.
const (
	treeKey     = "tree"
	inboxPrefix = "inbox/" // and the node
)

// storedTree is the tree as it is stored; the inbox is apart, by node.
type storedTree struct {
	Epoch int64      `json:"epoch"`
	Tree  *tree.Tree `json:"tree,omitempty"`
}

func newMonitor(c *Controller) *monitor {
	return &monitor{c: c, inputs: make(chan func(time.Time) tree.CollectorOutput)}
}

// start goes on with what was stored. It runs before the loop does.
func (m *monitor) start(ctx context.Context) error {
	var state tree.State
	err := m.c.store.View(ctx, func(tx store.Tx) error {
		stored, err := store.Get[storedTree](tx, store.Monitor, treeKey)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		state = tree.State{Epoch: stored.Epoch, Tree: stored.Tree, Inbox: make(map[string]tree.Position)}
		return tx.Scan(store.Monitor, inboxPrefix, func(key string, _ []byte) error {
			node, found := strings.CutPrefix(key, inboxPrefix)
			if !found {
				return store.ErrStop
			}
			state.Inbox[node], err = store.Get[tree.Position](tx, store.Monitor, key)
			return err
		})
	})
	if err != nil {
		return err
	}
	if state.Tree != nil && state.Tree.Arity != m.c.parts.Arity {
		state.Tree = nil // built anew
	}
	m.collector = tree.NewCollector(tree.Config{Arity: m.c.parts.Arity, Period: m.c.parts.Round}, state, m.c.clock.Now())
	members, err := m.members(ctx)
	if err != nil {
		return err
	}
	m.carryOut(ctx, m.collector.Members(members, m.c.clock.Now()))
	return nil
}

// members are the nodes whose agents may be heard.
func (m *monitor) members(ctx context.Context) ([]tree.Member, error) {
	var nodes []*seenNode
	err := m.c.store.View(ctx, func(tx store.Tx) (err error) {
		nodes, err = m.c.nodes.all(tx)
		return err
	})
	members := make([]tree.Member, 0, len(nodes))
	for _, n := range nodes {
		if up(n.State) {
			members = append(members, tree.Member{ID: n.ID, Cloud: n.Cloud, Address: n.TreeAddress})
		}
	}
	return members, err
}

// follow tells the collector which nodes there are.
func (m *monitor) follow(ctx context.Context) error {
	members, err := m.members(ctx)
	if err != nil {
		return err
	}
	m.hand(ctx, func(now time.Time) tree.CollectorOutput { return m.collector.Members(members, now) })
	return nil
}

// connected gives a node its place on a new stream.
func (m *monitor) connected(ctx context.Context, node string) {
	m.hand(ctx, func(now time.Time) tree.CollectorOutput { return m.collector.Connected(node, now) })
}

// reported takes a report from a node's stream. One that is out of bounds ends
// the stream.
func (m *monitor) reported(ctx context.Context, node string, report *agentpb.TreeReport) error {
	r, err := tree.ReportFrom(report)
	if err != nil {
		return fmt.Errorf("the monitor's report of node %s is refused: %w", node, err)
	}
	m.hand(ctx, func(now time.Time) tree.CollectorOutput { return m.collector.Report(node, r, now) })
	return nil
}

// hand gives the loop something to do.
func (m *monitor) hand(ctx context.Context, input func(time.Time) tree.CollectorOutput) {
	select {
	case m.inputs <- input:
	case <-ctx.Done():
	case <-m.c.run.Done():
	}
}

// loop does what is handed to it, and what is due, until ctx ends.
func (m *monitor) loop(ctx context.Context) {
	wake := m.c.clock.After(0)
	for {
		var out tree.CollectorOutput
		select {
		case input := <-m.inputs:
			out = input(m.c.clock.Now())
		case <-wake:
			out = m.collector.Tick(m.c.clock.Now())
		case <-ctx.Done():
			return
		}
		wake = m.c.clock.After(m.carryOut(ctx, out).Sub(m.c.clock.Now()))
	}
}

// carryOut does what the collector wants done, and returns when to wake it.
func (m *monitor) carryOut(ctx context.Context, out tree.CollectorOutput) time.Time {
	for {
		for _, a := range out.Assign {
			m.tell(ctx, a.Node, &agentpb.ToAgent{Body: &agentpb.ToAgent_TreeAssignment{TreeAssignment: a.Place.Proto()}})
		}
		for _, s := range out.Send {
			m.tell(ctx, s.To, &agentpb.ToAgent{Body: &agentpb.ToAgent_TreeAck{TreeAck: s.Ack.Proto()}})
		}
		for _, r := range out.Rounds {
			m.note(r)
		}
		if len(out.Rounds) > 0 {
			if err := m.c.judgeAgents(ctx); err != nil && ctx.Err() == nil {
				m.c.log.Error("agents that hang cannot be told of", "error", err)
			}
			if err := m.c.relieve(ctx); err != nil && ctx.Err() == nil {
				m.c.log.Error("jobs that starve cannot be helped", "error", err)
			}
		}
		if out.Write == nil {
			return out.Wake
		}
		err := m.write(ctx, out.Write)
		if err != nil && ctx.Err() == nil {
			m.c.log.Error("what the nodes have found was not stored: they tell it again", "error", err)
		}
		out = m.collector.Written(err == nil, m.c.clock.Now())
	}
}

// tell sends a message of the tree to a node. It is not waited for, and given up
// with the round: the node asks again, or is given its place on its next stream.
func (m *monitor) tell(ctx context.Context, node string, message *agentpb.ToAgent) {
	if !m.c.fleet.connected(node) {
		return
	}
	m.c.work.Go(func() {
		ctx, end := context.WithTimeout(ctx, m.c.parts.Round)
		defer end()
		m.c.fleet.tell(ctx, node, message)
	})
}

// write stores what is to be remembered of the tree, and each verdict with all
// that follows from it.
func (m *monitor) write(ctx context.Context, w *tree.Write) error {
	return m.c.store.Update(ctx, func(tx store.Tx) error {
		stored, err := store.Get[storedTree](tx, store.Monitor, treeKey)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		nobody := (stored.Tree == nil || len(stored.Tree.Places) == 0) && len(w.State.Tree.Places) == 0 // was given a place
		if stored.Epoch != w.State.Epoch && !nobody {
			if err := store.Put(tx, store.Monitor, treeKey, storedTree{w.State.Epoch, w.State.Tree}); err != nil {
				return err
			}
		}
		for _, v := range w.Verdicts {
			if err := store.Put(tx, store.Monitor, inboxPrefix+v.Node, v.Position); err != nil {
				return err
			}
			if err := m.c.found(tx, v); err != nil {
				return err
			}
		}
		return nil
	})
}

// note remembers what a round has brought.
func (m *monitor) note(r tree.Round) {
	m.mu.Lock()
	silent := make(map[string]silentFor, len(r.Heard)+len(r.Missing))
	for _, node := range r.Heard {
		silent[node] = silentFor{heard: true}
	}
	for _, node := range r.Missing {
		silent[node] = silentFor{m.silent[node].rounds + 1, m.silent[node].heard}
	}
	m.silent = silent
	m.latest = measured{
		number: r.Number, at: time.Unix(0, (r.Number+1)*int64(m.c.parts.Round)).UTC(), round: tally.Read(r.Summary),
		missing: len(r.Missing), reports: r.Reports,
	}
	m.mu.Unlock()
}

// silentRounds is for how many rounds nothing was heard of a node.
func (m *monitor) silentRounds(node string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.silent[node].rounds
}

// hangs reports whether the monitor of a node has ceased to tell anything.
func (m *monitor) hangs(node string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.silent[node]
	return s.heard && s.rounds >= hungRounds
}

// forget drops what is remembered of a node that is gone for good.
func (m *monitor) forget(ctx context.Context, node string) {
	m.hand(ctx, func(now time.Time) tree.CollectorOutput {
		m.collector.Forget(node)
		return m.collector.Tick(now)
	})
}

// last is what the newest round has brought.
func (m *monitor) last() measured {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.latest
}
