package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/store"
	"dormouse/internal/failpoint"
	"dormouse/repository"
	"dormouse/repository/backend"
)

// preflight asks every agent what keeps its task from being checkpointed,
// before anything is frozen.
func (d *doing) preflight(ctx context.Context) (effect, error) {
	replies, err := d.each(ctx, func(taskRef) *agentpb.Command {
		return &agentpb.Command{Body: &agentpb.Command_Preflight{Preflight: &agentpb.Preflight{Checkpoint: d.op.Checkpoint}}}
	})
	if err != nil {
		return nil, err
	}
	var refusals []string
	for i, reply := range replies {
		for _, refusal := range reply.GetPreflight().GetRefusals() {
			if len(replies) > 1 {
				refusal = fmt.Sprintf("task %d: %s", i, refusal)
			}
			refusals = append(refusals, refusal)
		}
	}
	if len(refusals) > 0 {
		return nil, &failure{Message: sentences(refusals), Refused: true}
	}
	return func(_ store.Tx, op *opRecord, _ *jobRecord) error {
		op.Frozen = d.clock.Now().UTC() // the next step freezes
		return nil
	}, nil
}

// freeze stops the job: its pause begins. A job of one task that is to go on has
// its whole pause in this step.
func (d *doing) freeze(ctx context.Context) (effect, error) {
	alone := d.job.Tasks == 1 && d.op.Kind == api.OpCheckpoint
	_, err := d.each(ctx, func(taskRef) *agentpb.Command {
		return &agentpb.Command{Body: &agentpb.Command_Freeze{Freeze: &agentpb.Freeze{Checkpoint: d.op.Checkpoint, Alone: alone}}}
	})
	return nil, err
}

func (d *doing) capture(ctx context.Context) (effect, error) {
	replies, err := d.each(ctx, func(taskRef) *agentpb.Command {
		return &agentpb.Command{Body: &agentpb.Command_Capture{Capture: &agentpb.Capture{Checkpoint: d.op.Checkpoint}}}
	})
	if err != nil {
		return nil, err
	}
	return func(_ store.Tx, op *opRecord, job *jobRecord) error {
		for i, reply := range replies {
			if err := noteSteps(op, job, i, reply.GetCaptured().GetSteps()); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

// noteSteps keeps what an agent measured of one task's capture.
func noteSteps(op *opRecord, job *jobRecord, index int, raw []byte) error {
	steps := api.CaptureSteps{}
	if len(raw) > 0 {
		if err := json.Unmarshal(raw, &steps); err != nil {
			return fmt.Errorf("the measures of task %d cannot be read: %w", index, err)
		}
	}
	steps.Task, steps.Node = index, job.TaskStatus[index].Node
	if op.Steps == nil {
		op.Steps = make(map[int]api.CaptureSteps)
	}
	op.Steps[index] = steps
	return nil
}

// thaw lets the job go on: the pause ends here, at the latest.
func (d *doing) thaw(ctx context.Context) (effect, error) {
	_, err := d.each(ctx, func(taskRef) *agentpb.Command {
		return &agentpb.Command{Body: &agentpb.Command_Thaw{Thaw: &agentpb.Thaw{Checkpoint: d.op.Checkpoint}}}
	})
	if err != nil {
		return nil, err
	}
	return func(tx store.Tx, op *opRecord, job *jobRecord) error {
		cp, err := store.Get[api.Checkpoint](tx, store.Checkpoints, op.Checkpoint)
		if err != nil {
			return err
		}
		cp.State, cp.PauseMS, cp.Steps = api.CheckpointLocal, op.pause(), op.steps()
		if cp.PauseMS == 0 {
			cp.PauseMS = float64(d.clock.Now().Sub(op.Frozen).Microseconds()) / 1000
		}
		return store.Put(tx, store.Checkpoints, cp.ID, cp)
	}, nil
}

// pause is the longest pause of a task, in ms.
func (o *opRecord) pause() (ms float64) {
	for _, s := range o.Steps {
		ms = max(ms, s.PauseMS)
	}
	return ms
}

func (o *opRecord) steps() []api.CaptureSteps {
	steps := make([]api.CaptureSteps, 0, len(o.Steps))
	for _, s := range o.Steps {
		steps = append(steps, s)
	}
	slices.SortFunc(steps, func(a, b api.CaptureSteps) int { return a.Task - b.Task })
	return steps
}

// upload has the agents store what they captured.
func (d *doing) upload(ctx context.Context) (effect, error) {
	parent := ""
	err := d.store.View(ctx, func(tx store.Tx) (err error) {
		parent, err = newestDurable(tx, d.job)
		return err
	})
	if err != nil {
		return nil, err
	}
	sent, err := d.sending(ctx)
	defer sent()
	if err != nil {
		return nil, err
	}
	replies, err := d.each(ctx, func(taskRef) *agentpb.Command {
		return &agentpb.Command{Body: &agentpb.Command_Upload{Upload: &agentpb.Upload{Checkpoint: d.op.Checkpoint, Parent: parent}}}
	})
	if err != nil {
		return nil, err
	}
	for i, reply := range replies {
		if len(reply.GetUploaded().GetPart()) == 0 {
			return nil, fmt.Errorf("the agent of task %d has stored its part and does not say where", i)
		}
	}
	return func(_ store.Tx, op *opRecord, job *jobRecord) error {
		op.Parts = make(map[int]json.RawMessage)
		for i, reply := range replies {
			op.Parts[i] = reply.GetUploaded().GetPart()
			if err := noteSteps(op, job, i, reply.GetUploaded().GetSteps()); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

// network is a manifest's Network: the addresses that a restored job keeps.
type network struct {
	Addresses []string `json:"addresses"` // of the tasks, by index
}

// publish writes the signed manifest: the commit point. A controller that was
// killed here finds the manifest, or writes it again.
func (d *doing) publish(ctx context.Context) (effect, error) {
	manifest, err := d.manifest(ctx)
	if err != nil {
		return nil, err
	}
	if !d.published(ctx) {
		err := d.parts.Repository.PutManifest(ctx, manifest, d.signer)
		if err != nil && !d.published(ctx) {
			return nil, &failure{Message: err.Error(), Refused: errors.Is(err, backend.ErrNoSpace)}
		}
	}
	failpoint.Hit("controller." + string(d.op.Kind) + ".published")
	return func(tx store.Tx, op *opRecord, job *jobRecord) error {
		cp, err := store.Get[api.Checkpoint](tx, store.Checkpoints, op.Checkpoint)
		if err != nil {
			return err
		}
		now := d.clock.Now().UTC()
		cp.State, cp.Durable, cp.Error = api.CheckpointDurable, &now, ""
		cp.DurableMS = float64(now.Sub(op.Started).Microseconds()) / 1000
		cp.SizeBytes, cp.StoredBytes, cp.NewBytes = manifest.SizeBytes, manifest.StoredBytes, manifest.NewBytes
		cp.Steps, cp.Parent, cp.CRIUVersion = op.steps(), manifest.Parent, manifest.Tasks[0].CRIU
		if pause := op.pause(); pause > 0 {
			cp.PauseMS = pause
		}
		job.Checkpoints++
		job.Size, job.Took, job.CRIU = cp.SizeBytes, cp.DurableMS, cp.CRIUVersion
		if err := noteDurable(tx, op, job, cp); err != nil {
			return err
		}
		d.metrics.checkpointDurable(cp)
		if err := store.Put(tx, store.Checkpoints, cp.ID, cp); err != nil {
			return err
		}
		message := fmt.Sprintf("checkpoint %s is durable: %d bytes, %d new ones stored", cp.ID, cp.SizeBytes, cp.NewBytes)
		if cp.PauseMS > 0 {
			message += fmt.Sprintf(", the job stood still for %.0f ms", cp.PauseMS)
		}
		return d.emit(tx, api.Event{Job: job.ID, Type: "checkpoint", Message: message})
	}, nil
}

// published reports whether the checkpoint's manifest is in the repository.
func (d *doing) published(ctx context.Context) bool {
	_, err := d.parts.Repository.LoadManifest(ctx, d.op.Checkpoint, d.verifier)
	return err == nil
}

func (d *doing) manifest(ctx context.Context) (*repository.Manifest, error) {
	var cp api.Checkpoint
	parent := ""
	err := d.store.View(ctx, func(tx store.Tx) (err error) {
		if parent, err = newestDurable(tx, d.job); err != nil {
			return err
		}
		cp, err = store.Get[api.Checkpoint](tx, store.Checkpoints, d.op.Checkpoint)
		return err
	})
	if err != nil {
		return nil, err
	}
	m := &repository.Manifest{
		Checkpoint: cp.ID, Job: d.job.ID, JobName: d.job.Name, Created: cp.Created, Trigger: string(cp.Trigger),
		Label: cp.Label, Parent: parent, PauseMS: d.op.pause(),
	}
	if m.Spec, err = json.Marshal(d.job.Spec); err != nil {
		return nil, err
	}
	var net network
	for i, t := range d.job.TaskStatus {
		net.Addresses = append(net.Addresses, t.VirtualIP)
		var task repository.TaskManifest
		if err := json.Unmarshal(d.op.Parts[i], &task); err != nil {
			return nil, fmt.Errorf("the part of task %d cannot be read: %w", i, err)
		}
		task.Index = i
		m.Tasks = append(m.Tasks, task)
		m.SizeBytes += task.SizeBytes
		m.StoredBytes += task.StoredBytes
		m.NewBytes += task.NewBytes
	}
	m.Network, err = json.Marshal(net)
	return m, err
}

// discard lets the agents forget their local copies.
func (d *doing) discard(ctx context.Context) (effect, error) {
	_, err := d.each(ctx, func(taskRef) *agentpb.Command {
		return &agentpb.Command{Body: &agentpb.Command_Discard{Discard: &agentpb.Discard{Checkpoint: d.op.Checkpoint}}}
	})
	return nil, err
}

// abort lets the job go on and has what was captured thrown away.
func (d *doing) abort(ctx context.Context) (effect, error) {
	_, err := d.each(ctx, func(taskRef) *agentpb.Command {
		return &agentpb.Command{Body: &agentpb.Command_Thaw{Thaw: &agentpb.Thaw{Checkpoint: d.op.Checkpoint, Abort: true}}}
	})
	if err != nil {
		return nil, err
	}
	return func(_ store.Tx, op *opRecord, _ *jobRecord) error {
		op.Parts, op.Steps = nil, nil
		return nil
	}, nil
}

// destroy ends the job's tasks for good, and waits until that is certain.
func (d *doing) destroy(ctx context.Context) (effect, error) {
	refs := d.job.liveRefs()
	if err := d.orderDestroyed(ctx, refs, true); err != nil {
		return nil, err
	}
	if err := d.gone(ctx, refs); err != nil {
		return nil, err
	}
	if d.op.Kind != api.OpKill {
		if _, err := d.discard(ctx); err != nil {
			return nil, err
		}
	}
	return func(_ store.Tx, _ *opRecord, job *jobRecord) error {
		job.Kept = append(job.Kept, job.liveRefs()...)
		return nil
	}, nil
}

func (c *Controller) concludeCheckpoint(tx store.Tx, op *opRecord, job *jobRecord, done bool) error {
	if done {
		return nil
	}
	cp, err := store.Get[api.Checkpoint](tx, store.Checkpoints, op.Checkpoint)
	if err != nil {
		return err
	}
	cp.State, cp.Error = api.CheckpointFailed, op.Error
	job.History.fail(op.Started)
	if err := store.Put(tx, store.Checkpoints, cp.ID, cp); err != nil {
		return err
	}
	c.metrics.checkpointFailed()
	return c.emit(tx, api.Event{Job: job.ID, Type: "checkpoint", Message: fmt.Sprintf("checkpoint %s failed: %s", cp.ID, cp.Error)})
}

func (c *Controller) concludeSuspend(tx store.Tx, op *opRecord, job *jobRecord, done bool) error {
	if !done {
		job.Phase, job.Reason, job.Yield = api.PhaseRunning, "suspend failed: "+op.Error, nil
		c.logJob(job)
		return c.concludeCheckpoint(tx, op, job, false)
	}
	if job.Yield != nil {
		return c.concludeRelief(tx, op, job)
	}
	ask, err := op.request()
	if err != nil {
		return err
	}
	job.Phase, job.Reason = api.PhaseSuspended, "sleeps in checkpoint "+op.Checkpoint
	if ask.Why != "" {
		job.Reason = ask.Why + ": " + job.Reason
	}
	for i := range job.TaskStatus {
		job.TaskStatus[i].Phase, job.TaskStatus[i].Pid = api.PhaseSuspended, 0
	}
	c.logJob(job)
	return c.emit(tx, api.Event{Job: job.ID, Type: "suspended", Message: job.Reason})
}
