package controller

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"

	"dormouse/api"
	"dormouse/controller/store"
)

// A drain takes everything off a node: it cordons the node in the transaction
// that begins it, and then, job by job as each becomes idle, has jobs give up
// their places. They come back through the queue, which does not use a cordoned
// node. It ends when nothing is left there and each job that it moved runs
// elsewhere, is over, or is known to wait for room.

// drain begins to empty a node, or finds the operation that does so already.
func (c *Controller) drain(ctx context.Context, ref string) (*opRecord, error) {
	var op *opRecord
	err := c.onNode(ctx, ref, func(tx store.Tx, n nodeRecord) error {
		running, err := drainsOf(tx, n.ID)
		if err != nil {
			return err
		}
		if len(running) > 0 {
			op = &running[0]
			return c.accepted(ctx, tx, op, nil)
		}
		if err := c.cordon(tx, n, true); err != nil {
			return err
		}
		if op, err = c.beginOperation(tx, api.OpDrain, nil, request{Node: n.ID}); err != nil {
			return err
		}
		op.Node = n.ID
		return c.accepted(ctx, tx, op, putOperation(tx, op))
	})
	return op, err
}

// uncordon lets jobs onto a node again, and ends a drain of it.
func (c *Controller) uncordon(ctx context.Context, ref string) error {
	return c.onNode(ctx, ref, func(tx store.Tx, n nodeRecord) error {
		if !n.Cordoned {
			return refused("node %s is not cordoned: it is %s", n.ID, n.State)
		}
		running, err := drainsOf(tx, n.ID)
		if err != nil {
			return err
		}
		for i := range running {
			op := &running[i]
			now := c.clock.Now().UTC()
			op.Phase, op.Finished, op.Error = api.OpCancelled, &now, "the node was uncordoned"
			if err := putOperation(tx, op); err != nil {
				return err
			}
		}
		if err := c.cordon(tx, n, false); err != nil {
			return err
		}
		return c.answered(ctx, tx, http.StatusNoContent, nil)
	})
}

// cordon keeps jobs off a node, or lets them onto it. A node that is not up stays
// what it is until it is heard of.
func (c *Controller) cordon(tx store.Tx, n nodeRecord, cordoned bool) error {
	n.Cordoned = cordoned
	if n.State != api.NodeReady && n.State != api.NodeCordoned {
		return store.Put(tx, store.Nodes, n.ID, n)
	}
	state, reason := n.heard()
	return c.putNodeState(tx, n, state, reason)
}

// label sets labels of a node, and removes those with an empty value.
func (c *Controller) label(ctx context.Context, ref string, labels map[string]string) error {
	for key, value := range labels {
		if err := checkLabel(key, value); err != nil {
			return err
		}
		if key == labelNode || key == labelCloud {
			return invalid("the label %s is the %s's own name and cannot be set", key, key)
		}
	}
	return c.onNode(ctx, ref, func(tx store.Tx, n nodeRecord) error {
		if n.Labels == nil {
			n.Labels = make(map[string]string)
		}
		for key, value := range labels {
			if value == "" {
				delete(n.Labels, key)
				continue
			}
			n.Labels[key] = value
		}
		return store.Put(tx, store.Nodes, n.ID, n)
	})
}

// onNode runs one transaction on a node.
func (c *Controller) onNode(ctx context.Context, ref string, act func(tx store.Tx, n nodeRecord) error) error {
	return c.store.Update(ctx, func(tx store.Tx) error {
		id, err := findID(tx, store.Nodes, "node", ref)
		if err != nil {
			return err
		}
		n, err := store.Get[nodeRecord](tx, store.Nodes, id)
		if err != nil {
			return err
		}
		return act(tx, n)
	})
}

// drainsOf are the drains of a node that are under way.
func drainsOf(tx store.Tx, node string) ([]opRecord, error) {
	ops, err := store.All[opRecord](tx, store.Operations)
	return slices.DeleteFunc(ops, func(op opRecord) bool {
		return op.Kind != api.OpDrain || op.Phase != api.OpRunning || op.Node != node
	}), err
}

// evictAll takes everything off the node, and waits where it goes.
func (d *doing) evictAll(ctx context.Context) (effect, error) {
	for {
		revision := d.store.Revision()
		var s *drainState
		err := d.store.View(ctx, func(tx store.Tx) (err error) { // spares the writers' lock
			s, err = d.lookAround(tx, nil)
			return err
		})
		if err == nil && s.idle {
			err = d.store.Update(ctx, func(tx store.Tx) (err error) {
				s, err = d.lookAround(tx, d.evictOne)
				return err
			})
		}
		if err != nil {
			return nil, err
		}
		if s.cancelled {
			return nil, nil
		}
		if len(s.stuck) > 0 && len(s.going) == 0 {
			return nil, &failure{Refused: true, Message: fmt.Sprintf("node %s is cordoned, but not empty: %s", d.op.Node, sentences(s.stuck))}
		}
		if len(s.going) == 0 {
			raw, err := json.Marshal(s.moved)
			if err != nil {
				return nil, err
			}
			return func(tx store.Tx, op *opRecord, _ *jobRecord) error {
				op.Result = raw
				return d.emit(tx, api.Event{Type: "node", Node: op.Node, Message: fmt.Sprintf("node %s is drained", op.Node)})
			}, nil
		}
		d.say(ctx, "waits for "+sentences(s.going))
		if _, err := d.store.Wait(ctx, revision); err != nil {
			return nil, err
		}
	}
}

// drainState is how far a drain is.
type drainState struct {
	cancelled bool
	idle      bool     // a job there could give up its place now
	going     []string // what is still to be waited for
	stuck     []string // jobs that cannot leave, and why
	moved     []api.DrainResult
}

// lookAround looks at every job that is on the node, or was moved off it, and has
// evict, when it is given, take the idle ones off.
func (d *doing) lookAround(tx store.Tx, evict func(store.Tx, *opRecord, *jobRecord) error) (*drainState, error) {
	s := &drainState{}
	op, err := getOperation(tx, d.op.ID)
	if err != nil || op.Phase != api.OpRunning {
		s.cancelled = true
		return s, err
	}
	jobs, err := store.All[jobRecord](tx, store.Jobs)
	if err != nil {
		return nil, err
	}
	for i := range jobs {
		job := &jobs[i]
		on, err := job.usesNode(tx, op.Node)
		if err != nil {
			return nil, err
		}
		idle := s.note(op, job, on)
		s.idle = s.idle || idle
		if idle && evict != nil {
			if err := evict(tx, op, job); err != nil {
				return nil, err
			}
		}
	}
	return s, nil
}

// note notes how far the drain is with a job, and reports whether the job could
// give up its place now.
func (s *drainState) note(op *opRecord, job *jobRecord, on bool) (idle bool) {
	moved := slices.Contains(op.Moved, job.ID)
	switch {
	case !on && !moved:
	case on && (job.Operation != "" || job.Phase != api.PhaseRunning):
		s.going = append(s.going, fmt.Sprintf("job %s, which is %s", job.ID, job.Phase))
	case on && job.Stubborn != nil && moved:
		s.stuck = append(s.stuck, fmt.Sprintf("job %s: %s", job.ID, job.Stubborn.Why))
	case on:
		s.going = append(s.going, fmt.Sprintf("job %s, which is %s", job.ID, api.PhaseSuspending))
		return true
	case job.Operation != "" && job.Phase != api.PhaseRunning, job.waits() && (job.Yield == nil || !job.Yield.Waits):
		s.going = append(s.going, fmt.Sprintf("job %s, which is %s", job.ID, job.Phase))
	default:
		r := api.DrainResult{Job: job.ID, Name: job.Name, Phase: job.Phase, Reason: job.Reason}
		if job.Phase == api.PhaseRunning {
			for _, t := range job.TaskStatus {
				r.Nodes = append(r.Nodes, t.Node)
			}
		}
		s.moved = append(s.moved, r)
	}
	return false
}

// evictOne has a job give up its place.
func (d *doing) evictOne(tx store.Tx, op *opRecord, job *jobRecord) error {
	if !slices.Contains(op.Moved, job.ID) {
		op.Moved = append(op.Moved, job.ID)
	}
	job.Stubborn = nil
	if _, err := d.giveWay(tx, job, yield{From: op.Node}, api.TriggerDrain); err != nil {
		return err
	}
	return putOperation(tx, op)
}

// usesNode reports whether the job has a task on the node, or one on its way.
func (j *jobRecord) usesNode(tx store.Tx, node string) (bool, error) {
	on := j.Phase.Placed() && slices.ContainsFunc(j.liveRefs(), func(r taskRef) bool { return r.Node == node })
	if on || j.Operation == "" {
		return on, nil
	}
	op, err := getOperation(tx, j.Operation)
	if err != nil {
		return false, err
	}
	ask, err := op.request()
	return op.Kind == api.OpSwap && op.Run == 0 && slices.Contains(ask.Nodes, node), err
}
