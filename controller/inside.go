package controller

import (
	"context"
	"errors"
	"fmt"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/store"
)

// fromInside serves what a program inside a task asks for. The agent repeats it
// until it is answered; the operation carries the request's id, so that it is
// done once, whoever dies meanwhile.
func (c *Controller) fromInside(ctx context.Context, node string, r *agentpb.AppRequest) {
	name := "request " + r.GetId()
	if r.GetId() == "" || !c.claim(name) {
		return
	}
	c.work.Go(func() {
		defer c.release(name)
		answer := &agentpb.AppAnswer{Id: r.GetId()}
		op, err := c.applicationCheckpoint(ctx, r)
		switch {
		case ctx.Err() != nil:
			return // asked again at the next start
		case err != nil:
			answer.Failure = &agentpb.Failure{Message: err.Error(), Refused: isRefused(err)}
		case op.Phase != api.OpDone:
			answer.Failure = &agentpb.Failure{Message: op.Error, Refused: op.Refused}
		default:
			answer.Checkpoint = op.Checkpoint
		}
		c.fleet.tell(ctx, node, &agentpb.ToAgent{Body: &agentpb.ToAgent_AppAnswer{AppAnswer: answer}})
	})
}

func isRefused(err error) bool {
	var p *problem
	return errors.As(err, &p) && p.Status < 500
}

// applicationCheckpoint waits until the job can be checkpointed, does it, and
// returns the ended operation.
func (c *Controller) applicationCheckpoint(ctx context.Context, r *agentpb.AppRequest) (*opRecord, error) {
	var op *opRecord
	_, err := c.until(ctx, nil, func(tx store.Tx) (bool, error) {
		if found, err := operationFor(tx, r); err != nil || found != nil {
			op = found
			return true, err
		}
		job, err := jobThatAsks(tx, r)
		return err == nil && job.Operation == "" && job.Phase == api.PhaseRunning, err
	})
	if err != nil {
		return nil, err
	}
	if op == nil {
		if op, err = c.beginFor(ctx, r); err != nil {
			return nil, err
		}
	}
	id := op.ID
	_, err = c.until(ctx, nil, func(tx store.Tx) (ended bool, err error) {
		op, err = getOperation(tx, id)
		return err == nil && op.Phase != api.OpRunning, err
	})
	return op, err
}

// beginFor begins the checkpoint unless that was done or the job became busy,
// in which case it is waited for again.
func (c *Controller) beginFor(ctx context.Context, r *agentpb.AppRequest) (*opRecord, error) {
	var op *opRecord
	err := c.store.Update(ctx, func(tx store.Tx) (err error) {
		if op, err = operationFor(tx, r); err != nil || op != nil {
			return err
		}
		job, err := jobThatAsks(tx, r)
		if err != nil || job.Operation != "" || job.Phase != api.PhaseRunning {
			return err
		}
		op, err = c.beginCapture(tx, api.OpCheckpoint, job, request{
			Label: r.GetCheckpoint().GetLabel(), Trigger: api.TriggerApplication, Request: r.GetId(),
		})
		return err
	})
	if err == nil && op == nil {
		return c.applicationCheckpoint(ctx, r)
	}
	return op, err
}

// operationFor finds the operation that was begun for a request.
func operationFor(tx store.Tx, r *agentpb.AppRequest) (*opRecord, error) {
	ops, err := store.All[opRecord](tx, store.Operations)
	if err != nil {
		return nil, err
	}
	for i := range ops {
		if ops[i].Job != r.GetTask().GetJob() {
			continue
		}
		if ask, err := ops[i].request(); err == nil && ask.Request == r.GetId() {
			return &ops[i], nil
		}
	}
	return nil, nil
}

// jobThatAsks refuses requests of jobs that are over and of runs that are not
// the present one.
func jobThatAsks(tx store.Tx, r *agentpb.AppRequest) (*jobRecord, error) {
	job, err := getJob(tx, r.GetTask().GetJob())
	if errors.Is(err, store.ErrNotFound) {
		return nil, notFound("there is no job %q", r.GetTask().GetJob())
	}
	if err != nil {
		return nil, err
	}
	if job.Phase.Final() || job.Run != r.GetTask().GetRun() {
		return nil, refused("run %d of job %s is over", r.GetTask().GetRun(), job.ID)
	}
	if r.GetCheckpoint() == nil {
		return nil, refused("this controller does not know the request %s", fmt.Sprintf("%T", r.GetBody()))
	}
	return job, nil
}
