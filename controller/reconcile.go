package controller

import (
	"context"
	"errors"
	"slices"
	"time"

	"dormouse/api"
	"dormouse/controller/scheduler"
	"dormouse/controller/store"
)

// reconcile looks at the store whenever it has changed: operations without a
// goroutine get one, and so do orders to destroy tasks.
func (c *Controller) reconcile(ctx context.Context) {
	for {
		revision := c.store.Revision()
		begun := c.clock.Now()
		err := errors.Join(c.driveOperations(ctx), c.startCleanups(ctx))
		if err != nil && ctx.Err() == nil {
			c.log.Error("the controller cannot look at its store", "error", err)
		}
		if c.restAfter(ctx, c.clock.Now().Sub(begun)) != nil {
			return
		}
		if _, err := c.store.Wait(ctx, revision); err != nil {
			return
		}
	}
}

// Looks at all records take their time, with many of them: at most a fifth of
// all time. One that took less than cheapLook needs no rest after it, and none
// is longer than longestRest.
const (
	cheapLook   = time.Millisecond
	longestRest = 500 * time.Millisecond
)

// restAfter rests after a look that took so long.
func (c *Controller) restAfter(ctx context.Context, took time.Duration) error {
	if took <= cheapLook {
		return nil
	}
	return c.pause(ctx, min(4*took, longestRest))
}

// driveOperations gives every operation under way a goroutine.
func (c *Controller) driveOperations(ctx context.Context) error {
	var running []string
	err := c.store.View(ctx, func(tx store.Tx) error {
		ops, err := c.operations.all(tx)
		for _, op := range ops {
			if op.Phase == api.OpRunning && op.After == "" {
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

// settleOn begins a new run of the job on the nodes of placement.
func (j *jobRecord) settleOn(placement []string, nodes []scheduler.Node, phase api.Phase) {
	j.Run++
	j.Starvation = nil
	j.Phase, j.Reason, j.ExitCode, j.Finished = phase, "", nil, nil
	for i := range j.TaskStatus {
		t := &j.TaskStatus[i]
		*t = api.TaskStatus{Index: i, Node: placement[i], Phase: phase, VirtualIP: t.VirtualIP}
	}
	if i := slices.IndexFunc(nodes, func(n scheduler.Node) bool { return n.ID == placement[0] }); i >= 0 {
		j.Cloud = nodes[i].Cloud
	}
}

func placementText(placement []string) string { return sentences(unique(placement)) }

func unique(placement []string) []string {
	return slices.Compact(slices.Sorted(slices.Values(placement)))
}
