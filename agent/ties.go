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
		return do(plugins.Task{Spec: &r.Spec, Networks: a.jobNetworks(r), NetNS: netns, PIDs: pids})
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

// resumeTies lets go what quiesceTies held, in the reverse order.
func (a *Agent) resumeTies(ctx context.Context, r *record, box *sandbox.Sandbox) error {
	return a.withTies(r, box, func(t plugins.Task) error { return a.resume(ctx, t) })
}

// resumeRestored does so for a restored task before its processes run.
func (a *Agent) resumeRestored(ctx context.Context, r *record, netns *os.File) error {
	return a.resume(ctx, plugins.Task{Spec: &r.Spec, Networks: a.jobNetworks(r), NetNS: netns})
}

func (a *Agent) resume(ctx context.Context, t plugins.Task) error {
	var errs []error
	for _, p := range slices.Backward(a.plugins) {
		errs = append(errs, p.Resume(ctx, t))
	}
	return errors.Join(errs...)
}
