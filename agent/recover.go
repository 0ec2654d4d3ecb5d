package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"dormouse/agent/criu"
	"dormouse/agent/sandbox"
	"dormouse/api/agentpb"
	"dormouse/internal/lazyregexp"
)

// validID keeps names of tasks usable as file and cgroup names.
var validID = lazyregexp.New(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}$`)

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
	tasks, err := a.readTasks(ctx)
	if err != nil {
		return err
	}
	for _, t := range tasks {
		if r, _ := t.snapshot(); a.lease.hasLapsed() && r.Checkpoint == "" {
			if err := t.hold(ctx, holdLease); err != nil {
				return err
			}
		}
	}
	// What the lease guard froze is now frozen task by task, but for tasks in
	// which an interrupted CRIU needs to run to undo its work.
	if a.lease.hasLapsed() {
		if err := a.lease.hold(); err != nil {
			return err
		}
	}
	if err := freezeCgroup(a.boxes.Cgroup(), false); err != nil && !notExist(err) {
		return err
	}
	for _, t := range tasks {
		if err := a.recoverTask(ctx, t); err != nil {
			return fmt.Errorf("task %s: %w", t.id(), err)
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
	return a.retainNetworks(ctx)
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

// readTasks reads the state files of all tasks and opens their sandboxes.
func (a *Agent) readTasks(ctx context.Context) ([]*task, error) {
	dirs, err := os.ReadDir(a.tasksDir())
	if err != nil {
		return nil, err
	}
	for _, entry := range dirs {
		dir := filepath.Join(a.tasksDir(), entry.Name())
		t, err := readTask(dir)
		if notExist(err) || emptyFile(filepath.Join(dir, stateFile)) {
			// It was being made, or being forgotten; or the machine crashed before
			// the file was on the disk, and the task's processes with it.
			if err := os.RemoveAll(dir); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		if r, _ := t.snapshot(); r.Stage != stageDestroyed {
			box, err := a.boxes.Open(ctx, t.boxDir())
			if err != nil && !notExist(err) {
				return nil, err
			}
			t.setBox(box)
		}
		a.addTask(t)
	}
	return a.allTasks(), nil
}

func emptyFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Size() == 0
}

// recoverTask takes a task over, or undoes it.
func (a *Agent) recoverTask(ctx context.Context, t *task) error {
	r, box := t.snapshot()
	switch {
	case r.Stage == stageDestroyed || r.Stage == stageEnded:
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

// adopt takes over a task whose processes live, or lived. It stands still
// afterwards exactly if there is a reason for it.
func (a *Agent) adopt(ctx context.Context, t *task, box *sandbox.Sandbox) error {
	r, _ := t.snapshot()
	if r.Checkpoint != "" {
		interrupted := a.findCapture(r.ref(), r.Checkpoint) == nil
		if interrupted {
			a.log.Warn("a capture was interrupted and is rolled back", "task", t.id())
			if err := a.settle(ctx, box.Pid(), r.Work); err != nil {
				return err
			}
		}
		if a.lease.hasLapsed() {
			if err := t.hold(ctx, holdLease); err != nil {
				return err
			}
		}
		if !interrupted {
			a.watch(t)
			return nil
		}
	}
	if err := a.goOn(t); err != nil {
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
