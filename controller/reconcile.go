package controller

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"dormouse/api"
	"dormouse/controller/scheduler"
	"dormouse/controller/store"
)

// reconcile looks at the store whenever it has changed: pending jobs that have
// room are started, operations without a goroutine get one, and so do orders
// to destroy tasks.
func (c *Controller) reconcile(ctx context.Context) {
	for {
		revision := c.store.Revision()
		err := errors.Join(c.startPending(ctx), c.driveOperations(ctx), c.startCleanups(ctx))
		if err != nil && ctx.Err() == nil {
			c.log.Error("the controller cannot look at its store", "error", err)
		}
		if _, err := c.store.Wait(ctx, revision); err != nil {
			return
		}
	}
}

// driveOperations gives every operation under way a goroutine.
func (c *Controller) driveOperations(ctx context.Context) error {
	var running []string
	err := c.store.View(ctx, func(tx store.Tx) error {
		ops, err := store.All[opRecord](tx, store.Operations)
		for _, op := range ops {
			if op.Phase == api.OpRunning {
				running = append(running, op.ID)
			}
		}
		return err
	})
	for _, id := range running {
		if c.claim(id) {
			c.work.Go(func() {
				defer c.release(id)
				c.drive(ctx, id)
			})
		}
	}
	return err
}

// startPending places pending jobs, the most important and oldest first.
func (c *Controller) startPending(ctx context.Context) error {
	var some bool
	err := c.store.View(ctx, func(tx store.Tx) error { // spares the writers' lock
		pending, _, err := pendingJobs(tx)
		some = len(pending) > 0
		return err
	})
	if err != nil || !some {
		return err
	}
	return c.store.Update(ctx, func(tx store.Tx) error {
		pending, jobs, err := pendingJobs(tx)
		if err != nil {
			return err
		}
		nodes, err := snapshot(tx, jobs, "")
		if err != nil {
			return err
		}
		for i := range pending {
			if err := c.startOne(tx, &pending[i], jobs, nodes); err != nil {
				return err
			}
		}
		return nil
	})
}

// pendingJobs are the jobs to place, in order, and all jobs.
func pendingJobs(tx store.Tx) (pending, all []jobRecord, err error) {
	all, err = store.All[jobRecord](tx, store.Jobs)
	for _, j := range all {
		if j.Phase == api.PhasePending && j.Operation == "" {
			pending = append(pending, j)
		}
	}
	slices.SortFunc(pending, func(a, b jobRecord) int {
		return cmp.Or(b.Priority-a.Priority, a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
	})
	return pending, all, err
}

// startOne begins to start a pending job if nodes have room, and takes that from
// nodes and notes it in jobs.
func (c *Controller) startOne(tx store.Tx, job *jobRecord, jobs []jobRecord, nodes []scheduler.Node) error {
	ask := requestFor(job, job.Spec.Cloud)
	ask.Unfit = portsTaken(jobs, job)
	placement, err := scheduler.Place(nodes, ask)
	if err != nil {
		if reason := "waits for room: " + err.Error(); job.Reason != reason {
			job.Reason = reason
			return putJob(tx, job)
		}
		return nil
	}
	for _, id := range placement {
		i := slices.IndexFunc(nodes, func(n scheduler.Node) bool { return n.ID == id })
		nodes[i].CPUsUsed += ask.CPUs
		nodes[i].MemUsed += ask.MemBytes
	}
	if err := numberNetwork(tx, job); err != nil {
		return err
	}
	job.settleOn(placement, nodes, api.PhaseStarting)
	for i := range jobs {
		if jobs[i].ID == job.ID {
			jobs[i] = *job // the ports it publishes are taken for the next one
		}
	}
	op, err := c.beginOperation(tx, api.OpStart, job, request{})
	if err != nil {
		return err
	}
	op.Run = job.Run
	if err := putOperation(tx, op); err != nil {
		return err
	}
	return c.emit(tx, api.Event{Job: job.ID, Type: "placed", Message: "placed on " + placementText(placement), Node: placement[0]})
}

// settleOn begins a new run of the job on the nodes of placement.
func (j *jobRecord) settleOn(placement []string, nodes []scheduler.Node, phase api.Phase) {
	j.Run++
	j.Phase, j.Reason, j.ExitCode, j.Finished = phase, "", nil, nil
	for i := range j.TaskStatus {
		t := &j.TaskStatus[i]
		*t = api.TaskStatus{Index: i, Node: placement[i], Phase: phase, VirtualIP: t.VirtualIP}
	}
	for _, n := range nodes {
		if n.ID == placement[0] {
			j.Cloud = n.Cloud
		}
	}
}

func placementText(placement []string) string { return sentences(unique(placement)) }

func unique(placement []string) []string {
	return slices.Compact(slices.Sorted(slices.Values(placement)))
}

func requestFor(job *jobRecord, cloud string) scheduler.Request {
	return scheduler.Request{Tasks: job.Tasks, CPUs: job.Spec.CPUs, MemBytes: job.Spec.MemBytes, Cloud: cloud}
}

// snapshot is what the scheduler sees: the nodes and what placed jobs reserve
// on them, without those of job except.
func snapshot(tx store.Tx, jobs []jobRecord, except string) ([]scheduler.Node, error) {
	records, err := store.All[nodeRecord](tx, store.Nodes)
	if err != nil {
		return nil, err
	}
	nodes := make([]scheduler.Node, len(records))
	byID := make(map[string]*scheduler.Node, len(records))
	for i, r := range records {
		nodes[i] = scheduler.Node{ID: r.ID, Cloud: r.Cloud, State: r.State, CPUs: r.CPUs, MemBytes: r.MemBytes, CRIUVersion: r.CRIUVersion}
		byID[r.ID] = &nodes[i]
	}
	for i := range jobs {
		job := &jobs[i]
		if !job.Phase.Placed() || job.ID == except {
			continue
		}
		for _, ref := range job.refs() {
			if n := byID[ref.Node]; n != nil {
				n.CPUsUsed += job.Spec.CPUs
				n.MemUsed += job.Spec.MemBytes
			}
		}
	}
	return nodes, nil
}
