package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"dormouse/api"
	"dormouse/controller/store"
)

// A drill restores a checkpoint on trial: whether it can be restored is known
// before it is needed. It is a clone that nobody sees: a job of its own, which is
// in no list and never leaves the phase restoring, on an isolated network, with
// nothing published. When it has come up it is destroyed, and the checkpoint
// keeps what came of it. While the trial runs it takes room as any job does;
// one that would have to wait for room is refused.

// drill begins to restore a checkpoint on trial.
func (c *Controller) drill(ctx context.Context, ref string) (*opRecord, error) {
	job, err := c.jobFromCheckpoint(ctx, ref, "")
	if err != nil {
		return nil, err
	}
	id := job.From
	if err := harmless(id, job.Spec); err != nil {
		return nil, err
	}
	job.ID, job.Drill, job.Spec.Publish, job.Spec.MaxRestarts = newID("d"), true, nil, 0
	job.Priority = math.MinInt32 // nothing gives way to a trial, or waits for it
	var op *opRecord
	err = c.store.Update(ctx, func(tx store.Tx) error {
		if err := putJob(tx, job); err != nil {
			return err
		}
		if err := noteClone(tx, id, job.ID); err != nil {
			return err
		}
		if err := undrilled(tx, id, 0); err != nil {
			return err
		}
		op, err = c.beginRestore(tx, api.OpDrill, job, request{From: id})
		return c.accepted(ctx, tx, op, err)
	})
	return op, err
}

// harmless refuses jobs that share with the outside what a trial would change
// under the running copy.
func harmless(id string, spec api.JobSpec) error {
	for _, v := range spec.Volumes {
		if !v.ReadOnly {
			return refused("checkpoint %s cannot be restored on trial: its job shares %s with its node, and the trial would write there", id, v.Source)
		}
	}
	return nil
}

// undrilled sets how many durable checkpoints the job of a checkpoint has had
// since its newest drill.
func undrilled(tx store.Tx, checkpoint string, n int) error {
	cp, err := store.Get[api.Checkpoint](tx, store.Checkpoints, checkpoint)
	if err != nil {
		return ignoreNotFound(err)
	}
	job, err := getJob(tx, cp.Job)
	if err != nil {
		return ignoreNotFound(err)
	}
	job.History.Undrilled = n
	return putJob(tx, job)
}

// watch looks at the tasks of a drill for a moment after they were let go.
func (d *doing) watch(ctx context.Context) (effect, error) {
	var state verdict
	var task *api.TaskStatus
	_, err := d.until(ctx, d.clock.After(d.parts.Watch), func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, d.op.Job)
		if err != nil {
			return false, err
		}
		state, task = judge(job.TaskStatus, job.Spec.Launch)
		d.job = job
		return state != goesOn, nil
	})
	switch {
	case err != nil:
		return nil, err
	case state == lost:
		return nil, &failure{Message: task.Reason, Retryable: true}
	case state == broke:
		return nil, &failure{Message: describeExit(d.job, task) + " right after it was restored"}
	}
	return func(tx store.Tx, op *opRecord, job *jobRecord) error {
		return d.stamp(tx, op, job, "")
	}, nil
}

// stamp notes at the checkpoint how its trial went; problem is empty when it
// came up.
func (c *Controller) stamp(tx store.Tx, op *opRecord, job *jobRecord, problem string) error {
	cp, err := store.Get[api.Checkpoint](tx, store.Checkpoints, job.From)
	if err != nil {
		return ignoreNotFound(err)
	}
	cp.Drill = &api.Drill{Time: c.clock.Now().UTC(), OK: problem == "", RestoreMS: op.restoreTime(c.bootTime()), Nodes: op.Nodes, Error: problem}
	report := api.VerifyReport{Checkpoint: cp.ID, OK: cp.Drill.OK, Drill: cp.Drill}
	message := fmt.Sprintf("checkpoint %s was restored on trial on %s", cp.ID, strings.Join(op.Nodes, ", "))
	if cp.Drill.RestoreMS > 0 {
		message += fmt.Sprintf(" in %.0f ms", cp.Drill.RestoreMS)
	}
	if problem != "" {
		message = fmt.Sprintf("checkpoint %s could not be restored on trial: %s", cp.ID, problem)
		report.Problems = []string{problem}
	}
	if op.Result, err = json.Marshal([]api.VerifyReport{report}); err != nil {
		return err
	}
	if err := store.Put(tx, store.Checkpoints, cp.ID, cp); err != nil {
		return err
	}
	return c.emit(tx, api.Event{Job: cp.Job, Type: "drill", Message: message})
}

func (c *Controller) bootTime() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.booted
}

// restoreTime is how long a drill took from its placement until all tasks ran,
// in ms; 0 when it is not known, because the controller was restarted meanwhile
// or they never ran.
func (o *opRecord) restoreTime(booted time.Time) float64 {
	if o.Up.IsZero() || o.Placed.Before(booted) {
		return 0
	}
	return inMilliseconds(o.Up.Sub(o.Placed))
}

// concludeDrill forgets the trial's job, of which nothing is left on any node.
// A failure that another node would not have had is the checkpoint's.
func (c *Controller) concludeDrill(tx store.Tx, op *opRecord, job *jobRecord) error {
	if cause := op.Position.Cause; op.Phase == api.OpFailed && !op.Placed.IsZero() && cause != nil && !cause.Retryable {
		if err := c.stamp(tx, op, job, op.Error); err != nil {
			return err
		}
	}
	original, err := forgetTrial(tx, job)
	op.Job = original
	return errors.Join(err, putOperation(tx, op))
}

// forgetTrial forgets a trial's job, and returns whose checkpoint it tried.
func forgetTrial(tx store.Tx, job *jobRecord) (original string, err error) {
	if err := tx.Delete(store.Jobs, job.ID); err != nil {
		return "", err
	}
	cp, err := store.Get[api.Checkpoint](tx, store.Checkpoints, job.From)
	if err != nil {
		return "", ignoreNotFound(err)
	}
	cp.Clones = slices.DeleteFunc(slices.Clone(cp.Clones), func(id string) bool { return id == job.ID })
	return cp.Job, store.Put(tx, store.Checkpoints, cp.ID, cp)
}

// drillDue is the next trial that a job's policy asks for. One is made at a
// time, and none while jobs wait for room.
func (c *Controller) drillDue(ctx context.Context, tx store.Tx, jobs []*jobRecord) (*due, error) {
	var next *jobRecord
	for _, job := range jobs {
		if job.Drill || job.waits() {
			return nil, nil
		}
		wanted := job.Spec.DrillEvery > 0 && job.History.Undrilled >= job.Spec.DrillEvery && !job.Phase.Final()
		if wanted && (next == nil || job.History.Durable.Before(next.History.Durable)) {
			next = job
		}
	}
	if next == nil {
		return nil, nil
	}
	id, err := newestDurable(tx, next)
	if err != nil || id == "" {
		return nil, err
	}
	every := next.Spec.DrillEvery
	return &due{at: next.History.Durable, job: next.ID, run: func() error { return c.beginDrill(ctx, id, every) }}, nil
}

// beginDrill begins the trial that a policy asks for. One that is refused, for
// want of room for example, is asked for again by the job's next checkpoint.
func (c *Controller) beginDrill(ctx context.Context, id string, every int) error {
	_, err := c.drill(ctx, id)
	var why *problem
	if !errors.As(err, &why) {
		return err
	}
	return c.store.Update(ctx, func(tx store.Tx) error {
		cp, err := store.Get[api.Checkpoint](tx, store.Checkpoints, id)
		if err != nil {
			return ignoreNotFound(err)
		}
		if err := undrilled(tx, id, every-1); err != nil {
			return err
		}
		return c.emit(tx, api.Event{Job: cp.Job, Type: "drill", Message: "no restore on trial: " + why.Detail})
	})
}
