package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/protocol"
	"dormouse/controller/scheduler"
	"dormouse/controller/store"
	"dormouse/repository"
	"dormouse/repository/backend"
)

// look chooses the checkpoint and checks its manifest's signature, before
// anything of the job is touched.
func (d *doing) look(ctx context.Context) (effect, error) {
	from := d.ask.From
	if from == "" && !d.ask.Anew {
		err := d.store.View(ctx, func(tx store.Tx) (err error) {
			from, err = newestDurable(tx, d.job)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	anew := from == ""
	if anew && d.op.Kind == api.OpResume {
		return nil, &failure{Message: fmt.Sprintf("job %s has no durable checkpoint to resume from", d.job.ID), Refused: true}
	}
	if !anew {
		if _, err := d.loadManifest(ctx, from); err != nil {
			return nil, err
		}
	}
	return func(_ store.Tx, op *opRecord, _ *jobRecord) error {
		op.Checkpoint, op.Anew = from, anew
		return nil
	}, nil
}

// loadManifest reads a manifest. One that is missing, damaged or not signed by
// this controller is refused.
func (d *doing) loadManifest(ctx context.Context, id string) (*repository.Manifest, error) {
	manifest, err := d.parts.Repository.LoadManifest(ctx, id, d.verifier)
	if err != nil {
		bad := errors.Is(err, repository.ErrSignature) || errors.Is(err, repository.ErrDamaged) ||
			errors.Is(err, repository.ErrVersion) || errors.Is(err, backend.ErrNotExist)
		return nil, &failure{Message: err.Error(), Refused: bad}
	}
	if len(manifest.Tasks) != d.job.Tasks {
		return nil, &failure{Message: fmt.Sprintf("checkpoint %s has %d tasks and job %s has %d", id, len(manifest.Tasks), d.job.ID, d.job.Tasks), Refused: true}
	}
	return manifest, nil
}

// stopTasks destroys what still runs of the job, and waits until it is certain
// that nothing of it does.
func (d *doing) stopTasks(ctx context.Context) (effect, error) {
	phase := api.PhaseRestoring
	if d.op.Kind == api.OpRecover {
		phase = api.PhaseRecovering
	}
	var refs []taskRef
	err := d.store.Update(ctx, func(tx store.Tx) error {
		op, err := getOperation(tx, d.op.ID)
		if err != nil {
			return err
		}
		job, err := getJob(tx, op.Job)
		if err != nil {
			return err
		}
		refs, op.Stopped, job.Phase = job.liveRefs(), true, phase
		for _, ref := range refs {
			if err := putCleanup(tx, cleanup{Task: ref, KeepLogs: true}); err != nil {
				return err
			}
		}
		return errors.Join(putOperation(tx, op), putJob(tx, job))
	})
	if err != nil {
		return nil, err
	}
	// Those of a job that was over may still be on their way out.
	if err := d.gone(ctx, append(refs, d.job.Kept...)); err != nil {
		return nil, err
	}
	return func(_ store.Tx, _ *opRecord, job *jobRecord) error {
		job.Kept = append(job.Kept, job.liveRefs()...)
		return nil
	}, nil
}

// errTryAgain makes advance take the same step again: what the step saw is not
// true any more.
var errTryAgain = errors.New("what was seen has changed")

// place finds nodes for the job's next run. A job that has lost its tasks
// already waits for room; any other is refused.
func (d *doing) place(ctx context.Context) (effect, error) {
	if d.op.Run != 0 {
		return nil, nil // the queue has placed it
	}
	unfit, err := d.unfit(ctx)
	if err != nil {
		return nil, err
	}
	if err := d.awaitRoom(ctx, unfit); err != nil {
		return nil, err
	}
	return func(tx store.Tx, op *opRecord, job *jobRecord) error {
		placement, nodes, kept, err := d.takePlace(tx, job, op)
		if err == nil && !kept {
			placement, nodes, err = d.choose(tx, job, op, unfit)
		}
		if err != nil {
			return errTryAgain
		}
		phase := api.PhaseRestoring
		switch {
		case op.Kind == api.OpRecover:
			phase = api.PhaseRecovering
		case op.Kind == api.OpSwap && op.Anew:
			phase = api.PhaseStarting
		}
		if err := numberNetwork(tx, job); err != nil {
			return err
		}
		d.placed.add(job.ID, placement)
		job.settleOn(placement, nodes, phase)
		op.Run = job.Run
		op.Placed, op.Nodes, op.Up = d.clock.Now().UTC(), unique(placement), time.Time{}
		if job.Drill {
			return nil // the history is of jobs that are seen
		}
		return d.emit(tx, api.Event{Job: job.ID, Type: "placed", Message: "placed on " + placementText(placement), Node: placement[0]})
	}, nil
}

// awaitRoom returns when the job could be placed, or its operation was
// cancelled.
func (d *doing) awaitRoom(ctx context.Context, unfit func(scheduler.Node) string) error {
	last := "" // why it waits, by the newest look at the queue
	for {
		revision := d.store.Revision()
		_, _, next := d.turns.look(d.op.Job)
		var op *opRecord
		var job *jobRecord
		hope := false
		err := d.store.View(ctx, func(tx store.Tx) (err error) {
			if op, err = getOperation(tx, d.op.ID); err != nil || op.Phase != api.OpRunning {
				return err
			}
			if hope, err = anyUnreachable(tx); err != nil {
				return err
			}
			if job, err = getJob(tx, op.Job); err != nil {
				return err
			}
			if _, _, kept, err := d.takePlace(tx, job, op); kept || err != nil {
				return err
			}
			_, _, err = d.choose(tx, job, op, unfit)
			return err
		})
		var noRoom *scheduler.NoRoomError
		if !errors.As(err, &noRoom) {
			return err
		}
		if noRoom.Never || !op.waits(job) && !hope {
			return &failure{Message: noRoom.Reason, Refused: true}
		}
		d.say(ctx, "waits for room: "+noRoom.Reason)
		if op.waits(job) {
			last, err = d.turns.await(ctx, job.ID, last, next)
		} else {
			_, err = d.store.Wait(ctx, revision)
		}
		if err != nil {
			return err
		}
	}
}

// anyUnreachable reports whether a node may come back, as all do after the
// controller was restarted. It is ready or lost before long.
func anyUnreachable(tx store.Tx) (bool, error) {
	nodes, err := store.All[nodeRecord](tx, store.Nodes)
	return slices.ContainsFunc(nodes, func(n nodeRecord) bool { return n.State == api.NodeUnreachable }), err
}

// unfit says which nodes cannot take the checkpoint.
func (d *doing) unfit(ctx context.Context) (func(scheduler.Node) string, error) {
	if d.op.Anew {
		return nil, nil
	}
	manifest, err := d.loadManifest(ctx, d.op.Checkpoint)
	if err != nil {
		return nil, err
	}
	return func(n scheduler.Node) string {
		for _, task := range manifest.Tasks {
			if olderVersion(n.CRIUVersion, task.CRIU) {
				return fmt.Sprintf("node %s has CRIU %s and checkpoint %s needs %s or newer", n.ID, n.CRIUVersion, manifest.Checkpoint, task.CRIU)
			}
		}
		return ""
	}, nil
}

// olderVersion reports whether dotted version a is older than b. An unknown
// version is not older: the agent has the last word.
func olderVersion(a, b string) bool {
	if a == "" || b == "" {
		return false
	}
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	for i := range max(len(as), len(bs)) {
		x, y := versionPart(as, i), versionPart(bs, i)
		if x != y {
			return x < y
		}
	}
	return false
}

func versionPart(parts []string, i int) int {
	if i >= len(parts) {
		return 0
	}
	n, err := strconv.Atoi(parts[i])
	if err != nil {
		return 0
	}
	return n
}

// restore has every task's agent build it again, or start it where there is no
// checkpoint.
func (d *doing) restore(ctx context.Context) (effect, error) {
	if d.op.Anew {
		replies, err := d.startTasks(ctx)
		if err != nil {
			return nil, err
		}
		return applyStates(replies, (*agentpb.Reply).GetStarted), nil
	}
	spec, err := json.Marshal(d.job.Spec)
	if err != nil {
		return nil, err
	}
	var network *agentpb.NetworkPlan
	if within, err := d.networkWithin(ctx); err != nil {
		return nil, err
	} else if within {
		if network, err = d.trustedPlan(ctx); err != nil {
			return nil, err
		}
	}
	replies, err := d.each(ctx, func(ref taskRef) *agentpb.Command {
		return &agentpb.Command{Body: &agentpb.Command_Restore{Restore: &agentpb.RestoreTask{
			Checkpoint: d.op.Checkpoint, Spec: spec, VirtualIp: d.job.TaskStatus[ref.Index].VirtualIP, Hosts: d.job.hosts(),
			Hold: d.job.Tasks > 1, Network: network,
		}}}
	})
	if err != nil {
		return nil, err
	}
	return d.allUp(applyStates(replies, (*agentpb.Reply).GetRestored)), nil
}

// allUp notes, with an effect, that all tasks run.
func (d *doing) allUp(change effect) effect {
	return func(tx store.Tx, op *opRecord, job *jobRecord) error {
		op.Up = d.clock.Now().UTC()
		return change(tx, op, job)
	}
}

// concludeRestore gives a job its phase after it was restored, or was not.
func (c *Controller) concludeRestore(tx store.Tx, op *opRecord, job *jobRecord, done bool) error {
	if done {
		return c.nowRestored(tx, op, job)
	}
	if op.Phase == api.OpCancelled && op.Then != "" {
		return nil // the kill that follows concludes
	}
	if err := c.emit(tx, api.Event{Job: job.ID, Type: string(op.Kind), Message: string(op.Kind) + " failed: " + op.Error}); err != nil {
		return err
	}
	switch {
	case op.Kind == api.OpResume:
		job.Phase, job.Reason = api.PhaseSuspended, "resume failed: "+op.Error
		if job.Yield != nil {
			c.comeBackLater(job, job.Reason)
		}
		c.logJob(job)
		return nil
	case op.Kind == api.OpRestart && !op.Stopped:
		return nil // as it was
	case op.Kind == api.OpClone && op.Phase == api.OpCancelled:
		return c.finish(tx, job, api.PhaseCancelled, "the clone was "+op.Error, nil)
	}
	if op.Kind == api.OpRecover && op.Phase == api.OpFailed && op.Then == "" && op.Broke != protocol.StepPlace {
		return c.recoverAgain(tx, op, job)
	}
	checkpoint, err := newestDurable(tx, job)
	if err != nil {
		return err
	}
	return c.finish(tx, job, api.PhaseFailed, fmt.Sprintf("%s failed: %s; %s", op.Kind, op.Error, adviceFor(job.ID, checkpoint)), nil)
}

func (c *Controller) nowRestored(tx store.Tx, op *opRecord, job *jobRecord) error {
	// The logs of older runs are part of what was restored.
	for _, ref := range job.Kept {
		if err := putCleanup(tx, cleanup{Task: ref}); err != nil {
			return err
		}
	}
	job.Kept = nil
	how := "started anew"
	job.From = ""
	if !op.Anew {
		job.From = op.Checkpoint
		how = "restored from checkpoint " + op.Checkpoint
	}
	if op.Kind != api.OpClone && (op.Kind != api.OpSwap || !op.Anew) {
		job.Restarts++
	}
	if op.Kind == api.OpRestart {
		job.Runs = nil // a person knows better
	}
	if op.Kind != api.OpRecover {
		job.History.wake(c.clock.Now().UTC(), job.Yield != nil)
	}
	return c.nowRunning(tx, job, how)
}
