package controller

import (
	"context"
	"encoding/json"
	"fmt"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
)

// start has every task's agent start it. The job was placed by the reconciler.
func (d *doing) start(ctx context.Context) (effect, error) {
	replies, err := d.startTasks(ctx)
	if err != nil {
		return nil, err
	}
	return applyStates(replies, (*agentpb.Reply).GetStarted), nil
}

func (d *doing) startTasks(ctx context.Context) ([]*agentpb.Reply, error) {
	spec, err := json.Marshal(d.job.Spec)
	if err != nil {
		return nil, err
	}
	return d.each(ctx, func(ref taskRef) *agentpb.Command {
		return &agentpb.Command{Body: &agentpb.Command_Start{Start: &agentpb.StartTask{
			Spec: spec, VirtualIp: d.job.TaskStatus[ref.Index].VirtualIP, Hosts: d.job.hosts(), Secret: d.job.Secret,
		}}}
	})
}

// hosts are the names and addresses of all tasks, the same for life.
func (j *jobRecord) hosts() []*agentpb.HostEntry {
	hosts := make([]*agentpb.HostEntry, len(j.TaskStatus))
	for i, t := range j.TaskStatus {
		hosts[i] = &agentpb.HostEntry{Name: fmt.Sprintf("task-%d", i), Ip: t.VirtualIP}
	}
	return hosts
}

// applyStates notes the state that each reply holds.
func applyStates(replies []*agentpb.Reply, state func(*agentpb.Reply) *agentpb.TaskState) effect {
	return func(_ store.Tx, _ *opRecord, job *jobRecord) error {
		for i, reply := range replies {
			if s := state(reply); s != nil {
				if s.Task == nil {
					s.Task = job.refs()[i].proto()
				}
				applyState(job, s)
			}
		}
		return nil
	}
}

// unplace destroys what an attempt to start or restore a job has left.
func (d *doing) unplace(ctx context.Context) (effect, error) {
	if d.op.Run == 0 {
		return nil, nil // nothing was begun: the job is as it was
	}
	refs := d.job.liveRefs()
	if err := d.orderDestroyed(ctx, refs, false); err != nil {
		return nil, err
	}
	if err := d.gone(ctx, refs); err != nil {
		return nil, err
	}
	return func(_ store.Tx, op *opRecord, job *jobRecord) error {
		for i := range job.TaskStatus {
			t := &job.TaskStatus[i]
			if t.Node != "" {
				op.Avoid = append(op.Avoid, t.Node)
			}
			*t = api.TaskStatus{Index: i, VirtualIP: t.VirtualIP, Phase: job.Phase}
		}
		op.Run = 0
		return nil
	}, nil
}

// concludeStart gives a job its phase after it was started, or was not. After
// what is worth another try it is pending again: another node may do better.
func (c *Controller) concludeStart(tx store.Tx, op *opRecord, job *jobRecord, done bool) error {
	if done {
		job.History.wake(c.clock.Now().UTC(), false)
		return c.nowRunning(tx, job, "started")
	}
	cause := op.Position.Cause
	switch {
	case cause.Cancelled && op.Then != "":
		return nil // the kill that follows concludes
	case cause.Cancelled:
		return c.finish(tx, job, api.PhaseCancelled, "its start was "+cause.Message, nil)
	}
	if cause.Retryable && job.Starts < protocol.MaxAttempts {
		job.Starts++
		job.Phase, job.Reason = api.PhasePending, "waits to be started again: "+cause.Message
		c.logJob(job)
		return c.emit(tx, api.Event{Job: job.ID, Type: "pending", Message: job.Reason})
	}
	return c.finish(tx, job, api.PhaseFailed, cause.Message, nil)
}

// nowRunning notes that all tasks of a job run.
func (c *Controller) nowRunning(tx store.Tx, job *jobRecord, how string) error {
	now := c.clock.Now().UTC()
	job.Phase, job.Reason, job.Yield = api.PhaseRunning, "", nil
	job.History.begin(now)
	if job.Started == nil {
		job.Started = &now
	}
	node := ""
	if refs := job.refs(); len(refs) > 0 {
		node = refs[0].Node
	}
	c.logJob(job)
	if err := c.emit(tx, api.Event{Job: job.ID, Type: "running", Message: how + " on " + node, Node: node}); err != nil {
		return err
	}
	return c.endIncident(tx, job, now)
}
