package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/store"
	"dormouse/drivers"
	failures "dormouse/monitor/failure"
)

// The life of a node, as the controller sees it:
//
//	joining ──Hello──> ready ──silent for unusually long──> unreachable ──silent for lease + margin──> lost
//	                     ^──────────Hello────────────────────┴───────────────Hello──────────────────────┘
//
// from everywhere to lost when the driver says that the power is off, and from
// lost to joining when it is switched on again.

// What is unusual package failure learns of each node's heartbeats; less than
// silence of them missing is not, and half a lease always is. That a node is
// unreachable keeps jobs from being placed there, and says nothing of its tasks:
// only the end of its lease does.
const silence = 3

func accrualBounds(parts Parts) failures.Bounds {
	least := silence * parts.Heartbeat
	return failures.Bounds{Interval: parts.Heartbeat, Min: least, Max: max(least, parts.Lease/2)}
}

// bootNodes begins every node's lease anew: it may have been renewed until the
// moment the controller before this one ended.
func (c *Controller) bootNodes(ctx context.Context) error {
	return c.store.Update(ctx, func(tx store.Tx) error {
		jobs, err := c.jobs.all(tx)
		if err != nil {
			return err
		}
		for _, job := range jobs {
			for _, t := range job.TaskStatus {
				c.placed.add(job.ID, []string{t.Node})
			}
		}
		nodes, err := store.All[nodeRecord](tx, store.Nodes)
		if err != nil {
			return err
		}
		for _, n := range nodes {
			if n.State == api.NodeLost || n.State == api.NodeJoining {
				c.fleet.lose(n.ID) // until it says Hello
				continue
			}
			c.fleet.seen(n.ID, c.clock.Now())
			if n.State != api.NodeReady && n.State != api.NodeCordoned {
				continue
			}
			n.State, n.Reason = api.NodeUnreachable, "the controller was started and has not heard of it yet"
			if err := store.Put(tx, store.Nodes, n.ID, n); err != nil {
				return err
			}
		}
		return nil
	})
}

// registerNodes makes the nodes that a cloud is to have known.
func (c *Controller) registerNodes(ctx context.Context, cloud Cloud) error {
	return c.store.Update(ctx, func(tx store.Tx) error {
		for _, spec := range cloud.Nodes {
			n, err := store.Get[nodeRecord](tx, store.Nodes, spec.Name)
			if err == nil {
				if err := c.joinsAgain(tx, n); err != nil {
					return err
				}
				continue
			}
			if !errors.Is(err, store.ErrNotFound) {
				return err
			}
			record := nodeRecord{Driver: cloud.DriverName, Node: api.Node{
				ID: spec.Name, Name: spec.Name, Cloud: cloud.Name, State: api.NodeJoining, CPUs: spec.CPUs, MemBytes: spec.MemBytes,
			}}
			if err := store.Put(tx, store.Nodes, spec.Name, record); err != nil {
				return err
			}
		}
		return nil
	})
}

// joinsAgain notes that a lost node is being started. Nothing of before runs on
// it, as when it was lost, until its agent says otherwise.
func (c *Controller) joinsAgain(tx store.Tx, n nodeRecord) error {
	if n.State != api.NodeLost {
		return nil
	}
	return c.putNodeState(tx, n, api.NodeJoining, "its agent is being started")
}

func (c *Controller) nodeStarts(ctx context.Context, id string) error {
	return c.store.Update(ctx, func(tx store.Tx) error {
		n, err := store.Get[nodeRecord](tx, store.Nodes, id)
		if err != nil {
			return err
		}
		return c.joinsAgain(tx, n)
	})
}

// watchNodes looks at every node's silence, once per heartbeat. When it comes to
// that later than the margin allows for, the controller stood still, or its store
// did: nobody was heard of.
func (c *Controller) watchNodes(ctx context.Context) {
	looked := c.clock.Now()
	for {
		select {
		case <-c.clock.After(c.parts.Heartbeat):
		case <-ctx.Done():
			return
		}
		now := c.clock.Now()
		if late := now.Sub(looked) - c.parts.Heartbeat; late > c.parts.Margin {
			c.log.Warn("the controller or its store stood still: no node's silence counts meanwhile", "for", late.Round(time.Millisecond))
			c.fleet.excuse(late, now)
		}
		looked = now
		if err := c.checkLeases(ctx); err != nil && ctx.Err() == nil {
			c.log.Error("the nodes' leases cannot be checked", "error", err)
		}
		if err := c.monitor.follow(ctx); err != nil && ctx.Err() == nil {
			c.log.Error("the monitoring tree cannot follow the nodes", "error", err)
		}
	}
}

func (c *Controller) checkLeases(ctx context.Context) error {
	var nodes []*seenNode
	err := c.store.View(ctx, func(tx store.Tx) (err error) {
		nodes, err = c.nodes.all(tx)
		return err
	})
	now, lease := c.clock.Now(), c.parts.Lease+c.parts.Margin
	for _, n := range nodes {
		if n.State != api.NodeReady && n.State != api.NodeUnreachable && n.State != api.NodeCordoned {
			continue
		}
		quiet := c.fleet.silence(n.ID, now)
		switch {
		case quiet > lease:
			if prompt, broken := c.storeIsPrompt(ctx); !prompt {
				return errors.Join(err, broken)
			}
			if c.fleet.expire(n.ID, now, lease) {
				err = errors.Join(err, c.loseNode(ctx, n.ID, fmt.Sprintf("its agent was silent for %s, longer than its lease", quiet.Round(time.Millisecond))))
			}
		case n.State != api.NodeUnreachable:
			if why, suspect := c.fleet.suspect(n.ID, now); suspect {
				err = errors.Join(err, c.changeNode(ctx, n.ID, api.NodeUnreachable, why+"; its tasks may still run"))
			}
		}
	}
	return err
}

// storeIsPrompt reports whether the store can be written to within the margin.
// Where it cannot, what comes from the agents waits for it, their heartbeats too.
func (c *Controller) storeIsPrompt(ctx context.Context) (bool, error) {
	asked := c.clock.Now()
	err := c.store.Update(ctx, func(store.Tx) error { return nil })
	return err == nil && c.clock.Now().Sub(asked) <= c.parts.Margin, err
}

// changeNode writes a node's new state.
func (c *Controller) changeNode(ctx context.Context, id string, state api.NodeState, reason string) error {
	return c.store.Update(ctx, func(tx store.Tx) error {
		n, err := store.Get[nodeRecord](tx, store.Nodes, id)
		if err != nil || n.State == state {
			return err
		}
		return c.putNodeState(tx, n, state, reason)
	})
}

// putNodeState writes a node's new state, and counts its loss.
func (c *Controller) putNodeState(tx store.Tx, n nodeRecord, state api.NodeState, reason string) error {
	n.note(state, c.clock.Now())
	return c.writeNodeState(tx, n, state, reason)
}

func (c *Controller) writeNodeState(tx store.Tx, n nodeRecord, state api.NodeState, reason string) error {
	if n.State != state {
		c.log.Info("node "+string(state), "node", n.ID, "reason", reason)
		message := fmt.Sprintf("node %s is %s", n.ID, state)
		if reason != "" {
			message += ": " + reason
		}
		if err := c.emit(tx, api.Event{Type: "node", Node: n.ID, Message: message}); err != nil {
			return err
		}
	}
	n.State, n.Reason = state, reason
	return store.Put(tx, store.Nodes, n.ID, n)
}

// loseNode declares that nothing runs on a node any more.
func (c *Controller) loseNode(ctx context.Context, id, reason string) error {
	c.fleet.lose(id)
	return c.store.Update(ctx, func(tx store.Tx) error {
		if !c.fleet.lost(id) {
			return nil // it came back meanwhile, and welcome decides
		}
		n, err := store.Get[nodeRecord](tx, store.Nodes, id)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		n.AgentPid = 0
		if err := c.putNodeState(tx, n, api.NodeLost, reason); err != nil {
			return err
		}
		return c.loseTasksOf(tx, id, fmt.Sprintf("node %s was lost (%s)", id, reason), nil)
	})
}

// loseTasksOf marks tasks on a node as gone with it, but those in held, and
// settles their jobs.
func (c *Controller) loseTasksOf(tx store.Tx, node, reason string, held map[taskRef]bool) error {
	jobs, err := c.jobsOn(tx, node)
	if err != nil {
		return err
	}
	for _, job := range jobs {
		if !job.Phase.Placed() || !holdsUnheld(job, node, held) {
			continue
		}
		if loseTasks(job, node, reason) {
			if err := c.settle(tx, job); err != nil {
				return err
			}
		}
	}
	return nil
}

// jobsOn returns the jobs that may have a task on the node.
func (c *Controller) jobsOn(tx store.Tx, node string) ([]*jobRecord, error) {
	ids := c.placed.on(node)
	slices.Sort(ids)
	jobs := make([]*jobRecord, 0, len(ids))
	for _, id := range ids {
		job, err := getJob(tx, id)
		if errors.Is(err, store.ErrNotFound) {
			c.placed.forget(node, id)
			continue
		}
		if err != nil {
			return nil, err
		}
		jobs = append(jobs, job)
	}
	return jobs, nil
}

// holdsUnheld reports whether the job has a task on node that is not in held.
func holdsUnheld(job *jobRecord, node string, held map[taskRef]bool) bool {
	for _, ref := range job.refs() {
		if ref.Node == node && !held[ref] {
			return true
		}
	}
	return false
}

// followDriver acts on what a driver tells of its nodes.
func (c *Controller) followDriver(cloud Cloud, events <-chan drivers.Event) {
	for e := range events {
		if c.run.Err() != nil {
			continue // Stop: the daemon looks itself
		}
		if !e.Leaves.IsZero() && e.Power == drivers.PowerOn {
			if err := c.nodeLeaves(c.run, e); err != nil && c.run.Err() == nil {
				c.log.Error("a node that will leave cannot be drained", "node", e.Node, "error", err)
			}
			continue
		}
		if e.Power != drivers.PowerOff && e.Power != drivers.PowerGone {
			continue
		}
		if err := c.loseNode(c.run, e.Node, e.Reason); err != nil && c.run.Err() == nil {
			c.log.Error("the loss of a node cannot be written", "node", e.Node, "error", err)
		}
	}
}

// nodeLeaves takes everything off a node that its platform will take away: each
// job is checkpointed and goes on elsewhere, or waits for room.
func (c *Controller) nodeLeaves(ctx context.Context, e drivers.Event) error {
	c.log.Info("node leaves", "node", e.Node, "at", e.Leaves, "reason", e.Reason)
	err := c.store.Update(ctx, func(tx store.Tx) error {
		message := fmt.Sprintf("node %s will be taken away at %s: %s", e.Node, e.Leaves.UTC().Format(time.RFC3339), e.Reason)
		return c.emit(tx, api.Event{Type: "node", Node: e.Node, Message: message})
	})
	if err != nil {
		return err
	}
	_, err = c.drain(ctx, e.Node)
	return err
}

// welcome decides the fate of everything that a node's agent holds, and makes
// the node ready, in one transaction.
func (c *Controller) welcome(ctx context.Context, id string, hello *agentpb.Hello) (*agentpb.Welcome, error) {
	w := &agentpb.Welcome{
		NodeId: id, HeartbeatMs: c.parts.Heartbeat.Milliseconds(), LeaseMs: c.parts.Lease.Milliseconds(),
		Repository: c.parts.RepositoryConfig, ManifestKey: c.signer.Public(),
	}
	c.fleet.revive(id, c.clock.Now())
	err := c.store.Update(ctx, func(tx store.Tx) error {
		w.Keep, w.Destroy = nil, nil
		n, err := store.Get[nodeRecord](tx, store.Nodes, id)
		if err != nil {
			return fmt.Errorf("node %s is not known: it must join first: %w", id, err)
		}
		noteHello(&n, hello)
		n.Hellos++
		state, reason := n.heard()
		if err := c.putNodeState(tx, n, state, reason); err != nil {
			return err
		}
		held := make(map[taskRef]bool)
		for _, t := range hello.GetTasks() {
			ref := taskRef{Node: id, Job: t.GetTask().GetJob(), Index: int(t.GetTask().GetIndex()), Run: t.GetTask().GetRun()}
			held[ref] = true
			keep, err := c.judgeHeld(tx, ref, t)
			if err != nil {
				return err
			}
			if keep {
				w.Keep = append(w.Keep, t.GetTask())
			} else {
				w.Destroy = append(w.Destroy, t.GetTask())
			}
		}
		return c.loseVanished(tx, id, held)
	})
	return w, err
}

// heard is the state of a node whose agent is heard of, and why.
func (n *nodeRecord) heard() (api.NodeState, string) {
	if n.Cordoned {
		return api.NodeCordoned, "it was drained: `dormouse uncordon " + n.ID + "` lets jobs onto it again"
	}
	return api.NodeReady, ""
}

func noteHello(n *nodeRecord, h *agentpb.Hello) {
	n.CPUs, n.MemBytes = h.GetCpus(), h.GetMemBytes()
	n.CRIUVersion, n.Kernel, n.Underlay = h.GetCriuVersion(), h.GetKernel(), h.GetUnderlay()
	n.CPUModel, n.CPUFeatures = h.GetCpuModel(), h.GetCpuFeatures()
	n.TreeAddress, n.RestoresWithNetwork = h.GetTreeAddress(), h.GetRestoresWithNetwork()
	n.AgentVersion, n.AgentPid = h.GetAgentVersion(), int(h.GetAgentPid())
}

// judgeHeld decides whether a node keeps a task that its agent reports, and
// notes its state. What is not kept is also ordered destroyed, so that it is
// confirmed.
func (c *Controller) judgeHeld(tx store.Tx, ref taskRef, state *agentpb.TaskState) (keep bool, err error) {
	_, err = tx.Get(store.Cleanups, cleanup{Task: ref}.key())
	if !errors.Is(err, store.ErrNotFound) {
		return false, err
	}
	job, err := getJob(tx, ref.Job)
	if errors.Is(err, store.ErrNotFound) {
		return false, putCleanup(tx, cleanup{Task: ref})
	}
	if err != nil {
		return false, err
	}
	for _, kept := range job.Kept {
		if kept == ref {
			return true, nil // only its logs
		}
	}
	if !job.owns(ref) {
		return false, putCleanup(tx, cleanup{Task: ref})
	}
	if !job.Phase.Placed() || lostTask(job.TaskStatus[ref.Index]) {
		job.Kept = append(job.Kept, ref)
		if err := putJob(tx, job); err != nil {
			return false, err
		}
		return false, putCleanup(tx, cleanup{Task: ref, KeepLogs: true})
	}
	applyState(job, state)
	return true, c.settle(tx, job)
}

// owns reports whether ref is a task of the job's present run, on its node.
func (j *jobRecord) owns(ref taskRef) bool {
	return ref.Run == j.Run && ref.Index >= 0 && ref.Index < len(j.TaskStatus) && j.TaskStatus[ref.Index].Node == ref.Node
}

// loseVanished marks tasks that should be on the node, and that its agent does
// not hold. While a job is being started or restored its commands tell.
func (c *Controller) loseVanished(tx store.Tx, node string, held map[taskRef]bool) error {
	jobs, err := c.jobsOn(tx, node)
	if err != nil {
		return err
	}
	for _, job := range jobs {
		if job.Phase != api.PhaseRunning && job.Phase != api.PhaseSuspending || !holdsUnheld(job, node, held) {
			continue
		}
		changed := false
		for _, ref := range job.liveRefs() {
			if t := &job.TaskStatus[ref.Index]; ref.Node == node && !held[ref] && t.ExitCode == nil && t.Phase != api.PhaseFailed {
				t.Phase, t.Pid, t.Reason = api.PhaseFailed, 0, fmt.Sprintf("node %s was restarted and no longer has the task", node)
				changed = true
			}
		}
		if changed {
			if err := c.settle(tx, job); err != nil {
				return err
			}
		}
	}
	return nil
}

// taskEvent notes what an agent tells of a task.
func (c *Controller) taskEvent(ctx context.Context, node string, state *agentpb.TaskState) error {
	ref := taskRef{Node: node, Job: state.GetTask().GetJob(), Index: int(state.GetTask().GetIndex()), Run: state.GetTask().GetRun()}
	return c.store.Update(ctx, func(tx store.Tx) error {
		job, err := getJob(tx, ref.Job)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		if err != nil || !job.owns(ref) || job.Phase.Final() {
			return err
		}
		applyState(job, state)
		return c.settle(tx, job)
	})
}
