package agent

import (
	"context"
	"errors"
	"os"
	"slices"

	"dormouse/agent/criu"
	"dormouse/agent/plugins"
	"dormouse/agent/sandbox"
)

// withTies shows plugins a task. One whose processes are gone has no ties.
func (a *Agent) withTies(r *record, box *sandbox.Sandbox, do func(plugins.Task) error) error {
	return inNetwork(box, func(netns *os.File) error {
		pids, err := box.Pids()
		if err != nil {
			return err
		}
		return do(a.tied(r, netns, pids))
	})
}

// lookAtTies tells what keeps a running task from being checkpointed.
func (a *Agent) lookAtTies(ctx context.Context, r *record, box *sandbox.Sandbox) (all []criu.Refusal, err error) {
	err = a.withTies(r, box, func(t plugins.Task) error {
		for _, p := range a.plugins {
			refusals, err := p.Look(ctx, t)
			if err != nil {
				return err
			}
			all = append(all, refusals...)
		}
		return nil
	})
	return all, err
}

// quiesceTies brings the ties of a task to rest, all of whose job is frozen.
func (a *Agent) quiesceTies(ctx context.Context, r *record, box *sandbox.Sandbox) error {
	return a.withTies(r, box, func(t plugins.Task) error {
		for _, p := range a.plugins {
			if err := p.Quiesce(ctx, t); err != nil {
				return err
			}
		}
		return nil
	})
}

// resumeTies lets go what quiesceTies held.
func (a *Agent) resumeTies(ctx context.Context, r *record, box *sandbox.Sandbox) error {
	return inNetwork(box, func(netns *os.File) error { return a.resume(ctx, r, netns) })
}

// mendTies does what CRIU left to do in a task that it has built.
func (a *Agent) mendTies(ctx context.Context, r *record, box *sandbox.Sandbox, netns *os.File) error {
	pids, err := box.Pids()
	if err != nil {
		return err
	}
	for _, p := range a.plugins {
		if err := p.Restored(ctx, a.tied(r, netns, pids)); err != nil {
			return err
		}
	}
	return nil
}

// resume lets go a task, whose processes it need not know, in the reverse order.
func (a *Agent) resume(ctx context.Context, r *record, netns *os.File) error {
	var errs []error
	for _, p := range slices.Backward(a.plugins) {
		errs = append(errs, p.Resume(ctx, a.tied(r, netns, nil)))
	}
	return errors.Join(errs...)
}

// tied is a task as plugins see it.
func (a *Agent) tied(r *record, netns *os.File, pids []int) plugins.Task {
	return plugins.Task{Spec: &r.Spec, Networks: a.jobNetworks(r), NetNS: netns, PIDs: pids}
}
