package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"dormouse/api"
	"dormouse/controller/scheduler"
	"dormouse/controller/store"
)

// What requests do to the store: each is one transaction that checks the state
// and begins an operation, or refuses.

// submit accepts a job.
func (c *Controller) submit(ctx context.Context, spec api.JobSpec) (*jobRecord, error) {
	if err := c.checkCloud(spec.Cloud); err != nil {
		return nil, err
	}
	job := &jobRecord{Secret: newSecret(), Own: []string{}, JobDetail: api.JobDetail{
		Spec: spec, TaskStatus: make([]api.TaskStatus, spec.Tasks),
		Job: api.Job{
			ID: newID("j"), Name: spec.Name, Phase: api.PhasePending, Tasks: spec.Tasks, Priority: spec.Priority,
			Cloud: spec.Cloud, Created: c.clock.Now().UTC(), Owner: owner(ctx),
		},
	}}
	err := c.store.Update(ctx, func(tx store.Tx) error {
		if err := c.possible(tx, job); err != nil {
			return err
		}
		number, err := tx.Sequence(store.Jobs)
		if err != nil {
			return err
		}
		for i := range job.TaskStatus {
			job.TaskStatus[i] = api.TaskStatus{Index: i, Phase: api.PhasePending, VirtualIP: virtualIP(number, i)}
		}
		if err := putJob(tx, job); err != nil {
			return err
		}
		if err := c.emit(tx, api.Event{Job: job.ID, Type: "submitted", Message: "submitted"}); err != nil {
			return err
		}
		return c.answered(ctx, tx, http.StatusCreated, job.JobDetail)
	})
	c.log.Info("job pending", "job", job.ID, "command", spec.Command[0])
	return job, err
}

// possible refuses a job that will not fit even if nothing else runs. It looks at
// no more nodes than it needs to know that the job will.
func (c *Controller) possible(tx store.Tx, job *jobRecord) error {
	request, room := requestFor(job), 0
	var nodes []scheduler.Node
	err := tx.Scan(store.Nodes, "", func(key string, value []byte) error {
		n, err := c.nodes.decode(key, value)
		if err != nil {
			return err
		}
		nodes = append(nodes, n.scheduler)
		if room += scheduler.Room(nodes[len(nodes)-1], request); room >= job.Tasks {
			return store.ErrStop
		}
		return nil
	})
	if err != nil || room >= job.Tasks {
		return err
	}
	if err := scheduler.Possible(nodes, request); err != nil {
		return invalid("%v", err)
	}
	return nil
}

func (c *Controller) checkCloud(name string) error {
	if name == "" {
		return nil
	}
	if _, known := c.cloud(name); known {
		return nil
	}
	known := c.cloudNames()
	if len(known) == 0 {
		return notFound("there is no cloud %q, and none at all yet", name)
	}
	return notFound("there is no cloud %q: known are %s", name, commas(known))
}

// idle refuses a job that has an operation under way.
func idle(tx store.Tx, job *jobRecord) error {
	if job.Operation == "" {
		return nil
	}
	op, err := getOperation(tx, job.Operation)
	if err != nil {
		return err
	}
	return refused("job %s is busy with operation %s (%s): wait until it has ended", job.ID, op.ID, op.Kind)
}

func inPhase(job *jobRecord, what string, phases ...api.Phase) error {
	for _, phase := range phases {
		if job.Phase == phase {
			return nil
		}
	}
	return refused("job %s is %s: only a job that is %s can be %s", job.ID, job.Phase, alternatives(phases), what)
}

// onJob runs one transaction on an idle job.
func (c *Controller) onJob(ctx context.Context, ref string, act func(tx store.Tx, job *jobRecord) (*opRecord, error)) (*opRecord, error) {
	if err := c.afterOwn(ctx, ref); err != nil {
		return nil, err
	}
	var op *opRecord
	err := c.store.Update(ctx, func(tx store.Tx) error {
		job, err := findJob(tx, ref)
		if err != nil {
			return err
		}
		if err := idle(tx, job); err != nil {
			return err
		}
		op, err = act(tx, job)
		return c.accepted(ctx, tx, op, err)
	})
	return op, err
}

// accepted ends the transaction of a request that has begun an operation.
func (c *Controller) accepted(ctx context.Context, tx store.Tx, op *opRecord, err error) error {
	if err != nil {
		return err
	}
	return c.answered(ctx, tx, http.StatusAccepted, op.Operation)
}

// checkpoint begins to checkpoint a running job.
func (c *Controller) checkpoint(ctx context.Context, ref, label string) (*opRecord, error) {
	return c.onJob(ctx, ref, func(tx store.Tx, job *jobRecord) (*opRecord, error) {
		if err := inPhase(job, "checkpointed", api.PhaseRunning); err != nil {
			return nil, err
		}
		return c.beginCapture(tx, api.OpCheckpoint, job, request{Label: label, Trigger: api.TriggerUser})
	})
}

// suspend begins to put a running job to sleep.
func (c *Controller) suspend(ctx context.Context, ref string) (*opRecord, error) {
	return c.onJob(ctx, ref, func(tx store.Tx, job *jobRecord) (*opRecord, error) {
		if job.waits() && job.Phase == api.PhaseSuspended {
			return c.stayAsleep(tx, job)
		}
		if err := inPhase(job, "suspended", api.PhaseRunning); err != nil {
			return nil, err
		}
		job.Phase, job.Reason = api.PhaseSuspending, ""
		return c.beginCapture(tx, api.OpSuspend, job, request{Trigger: api.TriggerSuspend})
	})
}

func (c *Controller) beginCapture(tx store.Tx, kind api.OperationKind, job *jobRecord, ask request) (*opRecord, error) {
	id := newID("c")
	if job.Own != nil {
		job.Own = append(job.Own, id)
	}
	op, err := c.beginOperation(tx, kind, job, ask)
	if err != nil {
		return nil, err
	}
	op.Checkpoint = id
	cp := api.Checkpoint{
		ID: op.Checkpoint, Job: job.ID, Owner: job.Owner, State: api.CheckpointCapturing, Trigger: ask.Trigger, Label: ask.Label,
		Created: op.Started, Tasks: job.Tasks,
	}
	return op, errors.Join(store.Put(tx, store.Checkpoints, cp.ID, cp), putOperation(tx, op))
}

// resume begins to wake a suspended job.
func (c *Controller) resume(ctx context.Context, ref, cloud, from string) (*opRecord, error) {
	if err := c.checkCloud(cloud); err != nil {
		return nil, err
	}
	return c.onJob(ctx, ref, func(tx store.Tx, job *jobRecord) (*opRecord, error) {
		if err := inPhase(job, "resumed", api.PhaseSuspended); err != nil {
			return nil, err
		}
		return c.beginRestore(tx, api.OpResume, job, request{Cloud: cloud, From: from})
	})
}

// restart begins to restore a job from its newest or a named checkpoint, or
// to start it anew when it has none.
func (c *Controller) restart(ctx context.Context, ref, cloud, from string) (*opRecord, error) {
	if err := c.checkCloud(cloud); err != nil {
		return nil, err
	}
	return c.onJob(ctx, ref, func(tx store.Tx, job *jobRecord) (*opRecord, error) {
		err := inPhase(job, "restarted", api.PhaseRunning, api.PhaseFailed, api.PhaseCompleted, api.PhaseCancelled, api.PhaseSuspended)
		if err != nil {
			return nil, err
		}
		return c.beginRestore(tx, api.OpRestart, job, request{Cloud: cloud, From: from})
	})
}

// beginRestore checks the checkpoint and that there is room, and begins.
func (c *Controller) beginRestore(tx store.Tx, kind api.OperationKind, job *jobRecord, ask request) (*opRecord, error) {
	if ask.From != "" {
		cp, err := usableCheckpoint(tx, ask.From)
		if err != nil {
			return nil, err
		}
		if cp.Job != job.ID && cp.ID != job.From {
			return nil, refused("checkpoint %s is of job %s, not of %s: `dormouse clone` makes a new job of it", cp.ID, cp.Job, job.ID)
		}
		ask.From = cp.ID
	}
	op, err := c.beginOperation(tx, kind, job, ask)
	if err != nil {
		return nil, err
	}
	_, _, err = c.choose(tx, job, op, nil)
	var noRoom *scheduler.NoRoomError
	if errors.As(err, &noRoom) {
		return nil, refused("job %s cannot be placed: %s", job.ID, noRoom.Reason)
	}
	return op, err
}

func usableCheckpoint(tx store.Tx, ref string) (api.Checkpoint, error) {
	cp, err := findCheckpoint(tx, ref)
	if err == nil && cp.State != api.CheckpointDurable {
		err = refused("checkpoint %s is %s: only a durable one can be restored", cp.ID, cp.State)
	}
	return cp, err
}

// clone begins to make a new job of a checkpoint.
func (c *Controller) clone(ctx context.Context, ref, cloud, name string) (*opRecord, error) {
	if err := c.checkCloud(cloud); err != nil {
		return nil, err
	}
	if name != "" && !jobName.MatchString(name) {
		return nil, invalid("the name must be up to 63 letters, digits, dots, dashes and underscores, got %q", name)
	}
	job, err := c.jobFromCheckpoint(ctx, ref, name)
	if err != nil {
		return nil, err
	}
	id := job.From
	var op *opRecord
	err = c.store.Update(ctx, func(tx store.Tx) error {
		if err := putJob(tx, job); err != nil {
			return err
		}
		if err := noteClone(tx, id, job.ID); err != nil {
			return err
		}
		message := fmt.Sprintf("cloned from checkpoint %s of job %s", id, ref)
		if err := c.emit(tx, api.Event{Job: job.ID, Type: "submitted", Message: message}); err != nil {
			return err
		}
		op, err = c.beginRestore(tx, api.OpClone, job, request{Cloud: cloud, From: id})
		return c.accepted(ctx, tx, op, err)
	})
	return op, err
}

// jobFromCheckpoint makes a job of what the manifest of a durable checkpoint says,
// so that a clone needs nothing of the job it comes from.
func (c *Controller) jobFromCheckpoint(ctx context.Context, ref, name string) (*jobRecord, error) {
	var cp api.Checkpoint
	err := c.store.View(ctx, func(tx store.Tx) (err error) {
		cp, err = usableCheckpoint(tx, ref)
		return err
	})
	if err != nil {
		return nil, err
	}
	id := cp.ID
	manifest, err := c.parts.Repository.LoadManifest(ctx, id, c.verifier)
	if err != nil {
		return nil, refused("%v", err)
	}
	var spec api.JobSpec
	var net network
	if err := json.Unmarshal(manifest.Spec, &spec); err != nil {
		return nil, fmt.Errorf("the job in checkpoint %s cannot be read: %w", id, err)
	}
	if err := json.Unmarshal(manifest.Network, &net); err != nil || len(net.Addresses) != len(manifest.Tasks) {
		return nil, refused("the network in checkpoint %s cannot be read", id)
	}
	spec.Name = name // the original's would mean two jobs from now on
	job := &jobRecord{Secret: newSecret(), Own: []string{}, JobDetail: api.JobDetail{
		Spec: spec, From: id,
		Job: api.Job{
			ID: newID("j"), Name: name, Owner: cp.Owner, Phase: api.PhaseRestoring, Tasks: len(manifest.Tasks), Priority: spec.Priority, Created: c.clock.Now().UTC(),
		},
	}}
	for i, ip := range net.Addresses {
		job.TaskStatus = append(job.TaskStatus, api.TaskStatus{Index: i, Phase: api.PhaseRestoring, VirtualIP: ip})
	}
	return job, nil
}

// kill begins to end a job, or sends it a signal.
func (c *Controller) kill(ctx context.Context, ref, signalName string) (*opRecord, error) {
	number, err := parseSignal(signalName)
	if err == nil && number != 0 {
		err = c.afterOwn(ctx, ref)
	}
	if err != nil {
		return nil, err
	}
	var op *opRecord
	err = c.store.Update(ctx, func(tx store.Tx) error {
		job, err := findJob(tx, ref)
		if err != nil {
			return err
		}
		if number == 0 && job.Operation != "" {
			op, err = c.killNext(tx, job)
			return c.accepted(ctx, tx, op, err)
		}
		if err := idle(tx, job); err != nil {
			return err
		}
		op, err = c.beginKill(tx, job, number)
		return c.accepted(ctx, tx, op, err)
	})
	if err == nil && op.After != "" {
		c.interrupt(op.After)
	}
	return op, err
}

func (c *Controller) beginKill(tx store.Tx, job *jobRecord, number int) (*opRecord, error) {
	if job.Phase.Final() {
		return nil, refused("job %s is over already: it is %s", job.ID, job.Phase)
	}
	if number != 0 {
		if err := inPhase(job, "sent a signal", api.PhaseRunning); err != nil {
			return nil, err
		}
		return c.beginOperation(tx, api.OpKill, job, request{Signal: number})
	}
	op, err := c.beginOperation(tx, api.OpKill, job, request{})
	if err != nil || job.Phase == api.PhaseRunning {
		return op, err
	}
	// Nothing of it runs: it is over at once.
	op.Phase = api.OpDone
	return op, c.endOperation(tx, op, job)
}

// remove forgets a job that is over or asleep, with its checkpoints and logs.
func (c *Controller) remove(ctx context.Context, ref string) error {
	var id string
	var checkpoints []api.Checkpoint
	err := c.store.View(ctx, func(tx store.Tx) error {
		job, err := removable(tx, ref)
		if err != nil {
			return err
		}
		id = job.ID
		if checkpoints, err = checkpointsOf(tx, id); err != nil {
			return err
		}
		for _, cp := range checkpoints {
			err = errors.Join(err, stillNeeded(tx, cp))
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, cp := range checkpoints {
		if err := c.forgetCheckpoint(ctx, cp.ID, stillNeeded); err != nil {
			return fmt.Errorf("remove checkpoint %s of job %s: %w", cp.ID, id, err)
		}
	}
	err = c.store.Update(ctx, func(tx store.Tx) error {
		job, err := removable(tx, id)
		if err != nil {
			return err
		}
		for _, task := range append(job.Kept, job.liveRefs()...) {
			if err := putCleanup(tx, cleanup{Task: task}); err != nil {
				return err
			}
		}
		if err := c.emit(tx, api.Event{Job: id, Type: "removed", Message: "removed with its checkpoints and logs"}); err != nil {
			return err
		}
		if err := tx.Delete(store.Jobs, id); err != nil {
			return err
		}
		return c.answered(ctx, tx, http.StatusNoContent, nil)
	})
	if err == nil && len(checkpoints) > 0 {
		c.leaveGarbage()
	}
	return err
}

func removable(tx store.Tx, ref string) (*jobRecord, error) {
	job, err := findJob(tx, ref)
	if err != nil {
		return nil, err
	}
	if !job.Phase.Final() && job.Phase != api.PhaseSuspended {
		return nil, refused("job %s is %s: end it with `dormouse kill` first", job.ID, job.Phase)
	}
	return job, idle(tx, job)
}

// removeCheckpoint forgets a checkpoint that nothing depends on.
func (c *Controller) removeCheckpoint(ctx context.Context, ref string) error {
	var id string
	err := c.store.View(ctx, func(tx store.Tx) error {
		cp, err := findCheckpoint(tx, ref)
		id = cp.ID
		return err
	})
	if err != nil {
		return err
	}
	// What is begun is finished, whoever is killed meanwhile: that is the answer.
	err = c.forgetCheckpoint(ctx, id, func(tx store.Tx, cp api.Checkpoint) error {
		if err := free(tx, cp); err != nil {
			return err
		}
		return c.answered(ctx, tx, http.StatusNoContent, nil)
	})
	if err != nil {
		return err
	}
	c.leaveGarbage()
	return nil
}

// free refuses a checkpoint that an operation works on, or that a suspended
// job or a clone would be lost without.
func free(tx store.Tx, cp api.Checkpoint) error {
	if err := stillNeeded(tx, cp); err != nil {
		return err
	}
	job, err := getJob(tx, cp.Job)
	if err != nil {
		return ignoreNotFound(err)
	}
	if job.Operation != "" {
		op, err := getOperation(tx, job.Operation)
		if err != nil {
			return err
		}
		if op.Checkpoint == cp.ID {
			return refused("checkpoint %s is in use by operation %s (%s)", cp.ID, op.ID, op.Kind)
		}
	}
	newest, err := newestDurable(tx, job)
	if err == nil && job.Phase == api.PhaseSuspended && newest == cp.ID {
		return refused("job %s sleeps in checkpoint %s: resume or remove the job instead", job.ID, cp.ID)
	}
	return err
}

// verifyCheckpoints begins to read and hash a checkpoint, or all.
func (c *Controller) verifyCheckpoints(ctx context.Context, ref string) (*opRecord, error) {
	var op *opRecord
	err := c.store.Update(ctx, func(tx store.Tx) error {
		var ask request
		if ref != "" {
			cp, err := usableCheckpoint(tx, ref)
			if err != nil {
				return err
			}
			ask.Checkpoints = []string{cp.ID}
		}
		var err error
		if op, err = c.beginOperation(tx, api.OpVerify, nil, ask); err == nil {
			op.Owner = owner(ctx)
			err = putOperation(tx, op)
		}
		return c.accepted(ctx, tx, op, err)
	})
	return op, err
}

// cutPower kills a virtual node as a power cut would.
func (c *Controller) cutPower(ctx context.Context, ref string) error {
	node, cloud, err := c.virtualNode(ctx, ref)
	if err != nil {
		return err
	}
	if err := cloud.Driver.PowerOff(ctx, node.ID); err != nil {
		return fmt.Errorf("cut the power of node %s: %w", node.ID, err)
	}
	return c.loseNode(ctx, node.ID, "its power was cut")
}

// powerOn starts a virtual node again.
func (c *Controller) powerOn(ctx context.Context, ref string) error {
	node, cloud, err := c.virtualNode(ctx, ref)
	if err != nil {
		return err
	}
	if err := cloud.Driver.PowerOn(ctx, node.ID); err != nil {
		return fmt.Errorf("start node %s: %w", node.ID, err)
	}
	return c.nodeStarts(ctx, node.ID)
}

func (c *Controller) virtualNode(ctx context.Context, ref string) (nodeRecord, Cloud, error) {
	var node nodeRecord
	err := c.store.View(ctx, func(tx store.Tx) error {
		id, err := findID(tx, store.Nodes, "node", ref)
		if err != nil {
			return err
		}
		node, err = store.Get[nodeRecord](tx, store.Nodes, id)
		return err
	})
	if err != nil {
		return node, Cloud{}, err
	}
	cloud, known := c.cloud(node.Cloud)
	if !known || cloud.DriverName != "local" {
		return node, cloud, refused("node %s is not a virtual node: only those of `dormouse up` can be killed and started", node.ID)
	}
	return node, cloud, nil
}
