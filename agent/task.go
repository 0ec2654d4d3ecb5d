package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"dormouse/agent/health"
	"dormouse/agent/sandbox"
	"dormouse/api"
	"dormouse/api/agentpb"
)

// stage is how far a task has come on this node. It is written to the task's
// state file before the step that it names is taken.
type stage string

const (
	stageStarting  stage = "starting"  // being built; undone when found after a restart
	stageRestoring stage = "restoring" // being built from a checkpoint; undone likewise
	stageRunning   stage = "running"   // its processes exist, maybe frozen
	stageEnded     stage = "ended"     // its processes are gone, its sandbox is not
	stageDestroyed stage = "destroyed" // only its logs are left
)

// Reasons for which a task stands still. It runs when there is none.
const (
	holdLease      = "lease"
	holdCheckpoint = "checkpoint"
)

// record is what the agent must remember of a task: the state file.
type record struct {
	Job       string         `json:"job"`
	Index     int32          `json:"index"`
	Run       int64          `json:"run"`
	Spec      api.JobSpec    `json:"spec"`
	VirtualIP string         `json:"virtual_ip,omitempty"`
	Hosts     []sandbox.Host `json:"hosts,omitempty"`
	Stage     stage          `json:"stage"`
	Holds     []string       `json:"holds,omitempty"`
	// Checkpoint is the one being taken, from before the freeze until the thaw.
	Checkpoint string `json:"checkpoint,omitempty"`
	// Work is where CRIU takes its notes while it dumps or restores the task.
	Work string `json:"work,omitempty"`
	// Stopped is set while the user has it stopped by a signal.
	Stopped bool `json:"stopped,omitempty"`
	// From is the checkpoint that the task was restored from.
	From   string              `json:"from,omitempty"`
	Secret []byte              `json:"secret,omitempty"` // of the job
	Exit   *sandbox.ExitStatus `json:"exit,omitempty"`
	Reason string              `json:"reason,omitempty"`
}

// task is one incarnation of a job's task on this node.
type task struct {
	dir string // <state>/tasks/<id>

	// holding serialises freezing and thawing.
	holding sync.Mutex
	watcher context.CancelFunc // ends watching for the exit
	watched sync.WaitGroup
	excuses excuses
	gate    health.Gate
	ended   chan struct{} // closed when the processes are gone or the task is destroyed

	mu     sync.Mutex
	record record
	box    *sandbox.Sandbox // nil before it was created and after it was destroyed
	over   bool             // ended is closed
	// restore is the one that makes the task, or made it.
	restore *restoring
}

const stateFile = "state.json"

func taskID(ref *agentpb.TaskRef) string {
	return fmt.Sprintf("%s-%d-%d", ref.GetJob(), ref.GetIndex(), ref.GetRun())
}

func (r *record) ref() *agentpb.TaskRef {
	return &agentpb.TaskRef{Job: r.Job, Index: r.Index, Run: r.Run}
}

func newTask(dir string, r record) *task {
	return &task{dir: dir, record: r, ended: make(chan struct{}), watcher: func() {}}
}

// readTask reads the state file of the task in dir; fs.ErrNotExist if there is
// none.
func readTask(dir string) (*task, error) {
	var r record
	if err := readJSON(filepath.Join(dir, stateFile), &r); err != nil {
		return nil, err
	}
	return newTask(dir, r), nil
}

func (t *task) boxDir() string { return filepath.Join(t.dir, "box") }

func (t *task) id() string { return filepath.Base(t.dir) }

// update changes the record and writes it durably; when that fails the record
// stays as it was.
func (t *task) update(change func(*record)) error { return t.write(change, writeJSONDurably) }

// note is update for what matters only while the task's processes live, and so
// only until the machine ends: it waits for no disk, and may be part of a pause.
func (t *task) note(change func(*record)) error { return t.write(change, writeJSONQuickly) }

func (t *task) write(change func(*record), write func(string, any) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := t.record
	next.Holds = slices.Clone(next.Holds)
	change(&next)
	if err := os.MkdirAll(t.dir, 0o700); err != nil {
		return err
	}
	if err := write(filepath.Join(t.dir, stateFile), &next); err != nil {
		return fmt.Errorf("remember the state of task %s: %w", t.id(), err)
	}
	t.record = next
	return nil
}

func (t *task) snapshot() (record, *sandbox.Sandbox) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.record, t.box
}

func (t *task) setBox(box *sandbox.Sandbox) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.box = box
}

// live returns the sandbox of a task whose processes exist.
func (t *task) live() (*sandbox.Sandbox, error) {
	r, box := t.snapshot()
	if r.Stage != stageRunning || box == nil {
		return nil, refuse("task %d of job %s is %s", r.Index, r.Job, r.Stage)
	}
	return box, nil
}

// hold freezes the task for a reason; it stays frozen while any reason is left.
func (t *task) hold(ctx context.Context, reason string) error {
	t.holding.Lock()
	defer t.holding.Unlock()
	before, _ := t.snapshot()
	err := t.note(func(r *record) {
		if !slices.Contains(r.Holds, reason) {
			r.Holds = append(r.Holds, reason)
		}
	})
	if err != nil {
		return err
	}
	r, box := t.snapshot()
	if r.Stage != stageRunning || box == nil {
		return nil // a task that is being built is looked after when it is complete
	}
	if slices.Contains(before.Holds, holdCheckpoint) {
		return nil // it stands still, or CRIU is at work in it and may not be disturbed
	}
	if err := box.Freeze(ctx); err != nil {
		return retry{fmt.Errorf("freeze task %s: %w", t.id(), err)}
	}
	return nil
}

// release takes a reason away and thaws the task if it was the last.
func (t *task) release(ctx context.Context, reason string) error {
	t.holding.Lock()
	defer t.holding.Unlock()
	err := t.note(func(r *record) {
		r.Holds = slices.DeleteFunc(r.Holds, func(h string) bool { return h == reason })
	})
	if err != nil {
		return err
	}
	r, box := t.snapshot()
	if len(r.Holds) > 0 || box == nil || r.Stage != stageRunning {
		return nil
	}
	if err := box.Thaw(ctx); err != nil {
		return fmt.Errorf("thaw task %s: %w", t.id(), err)
	}
	return box.Unquiesce(ctx)
}

// state says the task's record in the words of the protocol.
func (t *task) state() *agentpb.TaskState {
	r, box := t.snapshot()
	s := &agentpb.TaskState{
		Task: r.ref(), VirtualIp: r.VirtualIP, Reason: r.Reason, Checkpoint: r.Checkpoint,
	}
	switch r.Stage {
	case stageStarting:
		s.Phase = string(api.PhaseStarting)
	case stageRestoring:
		s.Phase = string(api.PhaseRestoring)
	case stageRunning:
		s.Phase = string(api.PhaseRunning)
		if slices.Contains(r.Holds, holdCheckpoint) {
			s.Phase = string(api.PhaseSuspending)
		}
		if box != nil {
			s.Pid = int64(box.Pid())
		}
	case stageDestroyed:
		s.Exited = true
		s.Phase = string(api.PhaseCancelled)
	case stageEnded:
		s.Exited = true
	}
	if r.Exit != nil {
		s.ExitCode, s.Signal = int32(r.Exit.Code), r.Exit.Signal
		s.Phase = string(api.PhaseFailed)
		if r.Exit.Code == 0 {
			s.Phase = string(api.PhaseCompleted)
		}
		if s.Reason == "" {
			s.Reason = r.Exit.Reason
		}
	}
	return s
}

// finish marks the task's processes as gone for those who wait for that.
func (t *task) finish() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.over {
		t.over = true
		close(t.ended)
	}
}

// watch waits for the end of the task and tells the controller.
func (a *Agent) watch(t *task) {
	a.monitor.began()
	ctx, cancel := context.WithCancel(a.life)
	t.watcher = cancel
	t.watched.Go(func() {
		if _, box := t.snapshot(); box != nil {
			a.attend(ctx, t, box)
		}
	})
	t.watched.Go(func() {
		if _, box := t.snapshot(); box != nil {
			a.askHealth(ctx, t, box)
		}
	})
	t.watched.Go(func() {
		defer cancel()
		_, box := t.snapshot()
		status, err := box.Wait(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			status = sandbox.ExitStatus{Code: 255, Reason: fmt.Sprintf("its end was not seen: %v", err)}
		}
		err = t.update(func(r *record) {
			r.Stage, r.Exit, r.Holds = stageEnded, &status, nil
		})
		if err != nil {
			a.log.Error("cannot remember the end of a task", "task", t.id(), "error", err)
		}
		t.finish()
		a.log.Info("task ended", "task", t.id(), "code", status.Code, "signal", status.Signal)
		a.report(t)
	})
}

// unwatch stops watching, so that an end that the agent brings about is not
// reported as one of the task's own.
func (t *task) unwatch() {
	t.watcher()
	t.watched.Wait()
}

func (a *Agent) report(t *task) {
	a.send(&agentpb.FromAgent{Body: &agentpb.FromAgent_TaskEvent{TaskEvent: &agentpb.TaskEvent{State: t.state()}}})
}

// find returns the task of a reference.
func (a *Agent) find(ref *agentpb.TaskRef) (*task, error) {
	a.tasksMu.Lock()
	defer a.tasksMu.Unlock()
	t, ok := a.tasks[taskID(ref)]
	if !ok {
		return nil, fmt.Errorf("task %d of job %s, run %d: %w", ref.GetIndex(), ref.GetJob(), ref.GetRun(), errNoTask)
	}
	return t, nil
}

func (a *Agent) addTask(t *task) {
	a.tasksMu.Lock()
	defer a.tasksMu.Unlock()
	a.tasks[t.id()] = t
}

func (a *Agent) allTasks() []*task {
	a.tasksMu.Lock()
	defer a.tasksMu.Unlock()
	list := make([]*task, 0, len(a.tasks))
	for _, t := range a.tasks {
		list = append(list, t)
	}
	return list
}

// forget removes all that is left of a task.
func (a *Agent) forget(t *task) error {
	// The state file goes first: a directory without one is not a task.
	if err := os.Remove(filepath.Join(t.dir, stateFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.RemoveAll(t.dir); err != nil {
		return err
	}
	a.tasksMu.Lock()
	defer a.tasksMu.Unlock()
	delete(a.tasks, t.id())
	gone, _ := t.snapshot()
	for _, other := range a.tasks {
		if r, _ := other.snapshot(); r.Job == gone.Job && r.Index == gone.Index {
			return nil // another run of it uses the table of pages
		}
	}
	if err := os.Remove(a.pageCache(&gone)); err != nil && !notExist(err) {
		return err
	}
	return nil
}

func parseSpec(raw []byte) (api.JobSpec, error) {
	var spec api.JobSpec
	if err := json.Unmarshal(raw, &spec); err != nil {
		return spec, fmt.Errorf("the job's specification: %w", err)
	}
	return spec, nil
}
