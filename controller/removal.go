package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"dormouse/api"
	"dormouse/controller/retention"
	"dormouse/controller/store"
	"dormouse/internal/failpoint"
	"dormouse/repository"
	"dormouse/repository/backend"
)

// A checkpoint is removed in three steps, each of which may be taken again: its
// record says that it is being removed, so that nothing begins to use it; the
// repository forgets the manifest; the record goes. What a killed controller
// has left is found by its state and finished.

// keptFailures is how many records of failed automatic checkpoints tell why.
const keptFailures = 5

// retention removes the checkpoints that the job's policy does not keep. What
// fails here is told and left for the next checkpoint: this one is safe.
func (d *doing) retention(ctx context.Context) (effect, error) {
	spec := d.job.Spec
	policy := retention.Policy{Last: spec.Keep, Hourly: spec.KeepHourly, Daily: spec.KeepDaily}
	if policy.IsZero() {
		return nil, nil
	}
	var drop []string
	err := d.store.View(ctx, func(tx store.Tx) error {
		list, err := checkpointsOf(tx, d.job.ID)
		if err != nil {
			return err
		}
		needed, err := neededOf(tx, list)
		drop = append(retention.Surplus(list, policy, func(id string) bool { return needed[id] }), removing(list)...)
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, id := range drop {
		if err := d.forgetCheckpoint(ctx, id, stillNeeded); err != nil && ctx.Err() == nil {
			d.log.Warn("an old checkpoint was not removed", "checkpoint", id, "error", err)
		}
	}
	if len(drop) > 0 {
		d.leaveGarbage()
	}
	return nil, nil
}

// removing are the checkpoints whose removal has begun.
func removing(list []api.Checkpoint) (ids []string) {
	for _, cp := range list {
		if cp.State == api.CheckpointRemoving {
			ids = append(ids, cp.ID)
		}
	}
	return ids
}

// neededOf are those of a job's checkpoints that something else depends on.
func neededOf(tx store.Tx, list []api.Checkpoint) (map[string]bool, error) {
	needed := make(map[string]bool)
	for _, cp := range list {
		who, err := neededBy(tx, cp)
		if err != nil {
			return nil, err
		}
		needed[cp.ID] = who != ""
	}
	return needed, nil
}

// neededBy names the clone that has no checkpoint of its own and would be lost
// without this one; a drill is one, too. Empty: there is none.
func neededBy(tx store.Tx, cp api.Checkpoint) (string, error) {
	for _, id := range cp.Clones {
		job, err := getJob(tx, id)
		if errors.Is(err, store.ErrNotFound) {
			continue
		}
		if err != nil {
			return "", err
		}
		over := job.Phase == api.PhaseCompleted || job.Phase == api.PhaseCancelled
		if job.From == cp.ID && job.Checkpoints == 0 && !over {
			return id, nil
		}
	}
	return "", nil
}

// stillNeeded refuses the removal of a checkpoint that has come to be needed.
func stillNeeded(tx store.Tx, cp api.Checkpoint) error {
	who, err := neededBy(tx, cp)
	if err == nil && strings.HasPrefix(who, "d-") {
		return refused("checkpoint %s is being restored on trial: wait until that has ended", cp.ID)
	}
	if err == nil && who != "" {
		err = refused("checkpoint %s is all that job %s, its clone, has", cp.ID, who)
	}
	return err
}

// noteClone remembers at a checkpoint that a job was made of it.
func noteClone(tx store.Tx, id, job string) error {
	cp, err := store.Get[api.Checkpoint](tx, store.Checkpoints, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	cp.Clones = append(slices.Clone(cp.Clones), job)
	return store.Put(tx, store.Checkpoints, id, cp)
}

// forgetCheckpoint removes a checkpoint, unless allowed refuses it in the
// transaction that decides.
func (c *Controller) forgetCheckpoint(ctx context.Context, id string, allowed func(store.Tx, api.Checkpoint) error) error {
	err := c.store.Update(ctx, func(tx store.Tx) error { return beginRemoval(tx, id, allowed) })
	if err != nil {
		return err
	}
	failpoint.Hit("controller.removal.marked")
	err = c.parts.Repository.RemoveManifest(ctx, id)
	if err != nil && !errors.Is(err, backend.ErrNotExist) {
		return err
	}
	failpoint.Hit("controller.removal.removed")
	return c.store.Update(ctx, func(tx store.Tx) error { return endRemoval(tx, id) })
}

// endRemoval forgets the record of a checkpoint that the repository has
// forgotten.
func endRemoval(tx store.Tx, id string) error {
	cp, err := store.Get[api.Checkpoint](tx, store.Checkpoints, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	if err := tx.Delete(store.Checkpoints, id); err != nil {
		return err
	}
	job, err := getJob(tx, cp.Job)
	if err != nil || job.Own == nil {
		return ignoreNotFound(err)
	}
	job.disown(id)
	return putJob(tx, job)
}

// beginRemoval makes a checkpoint unusable.
func beginRemoval(tx store.Tx, id string, allowed func(store.Tx, api.Checkpoint) error) error {
	cp, err := store.Get[api.Checkpoint](tx, store.Checkpoints, id)
	if err != nil {
		return ignoreNotFound(err)
	}
	if cp.State == api.CheckpointRemoving {
		return nil
	}
	if err := allowed(tx, cp); err != nil {
		return err
	}
	durable := cp.State == api.CheckpointDurable
	cp.State = api.CheckpointRemoving
	if err := store.Put(tx, store.Checkpoints, id, cp); err != nil || !durable {
		return err
	}
	job, err := getJob(tx, cp.Job)
	if err != nil {
		return ignoreNotFound(err)
	}
	job.Checkpoints = max(job.Checkpoints-1, 0)
	return putJob(tx, job)
}

// finishRemovals goes on with the removals that a controller before this one
// had begun.
func (c *Controller) finishRemovals(ctx context.Context) error {
	var left []string
	err := c.store.View(ctx, func(tx store.Tx) error {
		list, err := checkpointsOf(tx, "")
		left = removing(list)
		return err
	})
	if err != nil || len(left) == 0 {
		return err
	}
	for _, id := range left {
		if failed := c.forgetCheckpoint(ctx, id, stillNeeded); failed != nil {
			err = errors.Join(err, fmt.Errorf("remove checkpoint %s: %w", id, failed))
		}
	}
	c.leaveGarbage()
	return err
}

// leaveGarbage tells the collector that manifests are gone.
func (c *Controller) leaveGarbage() {
	select {
	case c.garbage <- struct{}{}:
	default: // it knows
	}
}

// collectGarbage frees what no manifest needs, whenever manifests are gone. That
// reads much of the repository: it takes at most a twentieth of all time.
func (c *Controller) collectGarbage(ctx context.Context) {
	for {
		select {
		case <-c.garbage:
		case <-ctx.Done():
			return
		}
		begun := c.clock.Now()
		stats, err := c.parts.Repository.GC(ctx, repository.GCOptions{Verifier: c.verifier})
		switch {
		case err == nil:
			c.log.Info("collected the repository's garbage", "packs", stats.RemovedPacks, "bytes", stats.RemovedBytes)
		case ctx.Err() == nil:
			c.log.Warn("the repository's garbage was not collected", "error", err)
		}
		if c.pause(ctx, 20*c.clock.Now().Sub(begun)) != nil {
			return
		}
	}
}

// forgetFailed removes the oldest records of a job's failed automatic
// checkpoints; the caller writes the job. They hold nothing.
func forgetFailed(tx store.Tx, job *jobRecord) error {
	list, err := checkpointsOf(tx, job.ID)
	if err != nil {
		return err
	}
	list = slices.DeleteFunc(list, func(cp api.Checkpoint) bool { return cp.Trigger != api.TriggerPeriodic })
	old := retention.Failed(list, keptFailures)
	if job.Own != nil {
		job.disown(old...)
	}
	for _, id := range old {
		if err := tx.Delete(store.Checkpoints, id); err != nil {
			return err
		}
	}
	return nil
}
