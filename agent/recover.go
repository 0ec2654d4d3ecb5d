package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"dormouse/agent/criu"
	"dormouse/agent/sandbox"
	"dormouse/api/agentpb"
)

// validID keeps names of tasks usable as file and cgroup names.
var validID = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}$`)

func (a *Agent) taskDir(ref *agentpb.TaskRef) string { return filepath.Join(a.tasksDir(), taskID(ref)) }

// workDir is where CRIU takes its notes of the work that name stands for.
func (a *Agent) workDir(name string) string { return filepath.Join(a.config.State, "work", name) }

// clearWork removes the notes of work that is over.
func (a *Agent) clearWork() error {
	dir := a.workDir("")
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Mkdir(dir, 0o700)
}

func notExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// recover finds what an earlier agent process left: complete captures on disk
// are kept, tasks that run are taken over, half-made things are undone.
func (a *Agent) recover(ctx context.Context) error {
	rest, err := a.recoverCaptures()
	if err != nil {
		return err
	}
	dirs, err := os.ReadDir(a.tasksDir())
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if err := a.recoverTask(ctx, filepath.Join(a.tasksDir(), dir.Name())); err != nil {
			return fmt.Errorf("task %s: %w", dir.Name(), err)
		}
	}
	// Only now does no CRIU write to them any more.
	if err := a.clearWork(); err != nil {
		return err
	}
	for _, spool := range rest {
		if err := spool.close(); err != nil {
			return err
		}
	}
	if a.lease.hasLapsed() {
		a.holdAll(ctx)
	}
	return nil
}

// recoverCaptures finds the complete captures on disk and returns the other
// directories of the spool.
func (a *Agent) recoverCaptures() (rest []*spoolDir, err error) {
	dirs, err := a.spool.leftovers()
	if err != nil {
		return nil, err
	}
	for _, spool := range dirs {
		c := &capturing{spool: spool, complete: true, frozen: true}
		if err := readJSON(filepath.Join(spool.path, captureFile), &c.result); err != nil {
			rest = append(rest, spool)
			continue
		}
		c.key = captureKey(&agentpb.TaskRef{Index: c.result.Index}, c.result.Checkpoint)
		a.captures[c.key] = c
	}
	return rest, nil
}

func (a *Agent) recoverTask(ctx context.Context, dir string) error {
	t, err := readTask(dir)
	if notExist(err) {
		return os.RemoveAll(dir) // it was being made, or being forgotten
	}
	if err != nil {
		return err
	}
	a.addTask(t)
	r, _ := t.snapshot()
	if r.Stage == stageDestroyed {
		t.finish()
		return nil
	}
	box, err := a.boxes.Open(ctx, t.boxDir())
	if err != nil && !notExist(err) {
		return err
	}
	if box != nil {
		t.setBox(box)
	}
	switch {
	case r.Stage == stageEnded:
		t.finish()
		return nil
	case r.Stage == stageRunning && box != nil:
		return a.adopt(ctx, t, box)
	}
	a.log.Warn("a task was left half made and is undone", "task", t.id(), "stage", r.Stage)
	if err := a.settle(ctx, 0, r.Work); err != nil {
		return err
	}
	return a.undo(t)
}

// adopt takes over a task whose processes live, or lived.
func (a *Agent) adopt(ctx context.Context, t *task, box *sandbox.Sandbox) error {
	r, _ := t.snapshot()
	if r.Checkpoint != "" {
		if c := a.findCapture(r.ref(), r.Checkpoint); c == nil {
			a.log.Warn("a capture was interrupted and is rolled back", "task", t.id())
			if err := a.settle(ctx, box.Pid(), r.Work); err != nil {
				return err
			}
			if err := a.goOn(t); err != nil {
				return err
			}
		}
	}
	r, _ = t.snapshot()
	if len(r.Holds) > 0 {
		if err := t.hold(ctx, r.Holds[0]); err != nil {
			return err
		}
	} else if err := a.goOn(t); err != nil {
		return err
	}
	a.watch(t)
	return nil
}

// settle waits until what CRIU left behind in the middle of its work has undone
// itself, and takes the sockets of the tree below pid out of repair mode.
func (a *Agent) settle(ctx context.Context, pid int, work string) error {
	if work == "" || a.criu == nil {
		return nil
	}
	if err := a.criu.Recover(ctx, criu.RecoverRequest{Pid: pid, WorkDir: work}); err != nil {
		return fmt.Errorf("undo what an interrupted CRIU did: %w", err)
	}
	return nil
}
