package agent

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"dormouse/agent/sandbox"
	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/internal/failpoint"
)

// start builds a task and starts its command. A repeated start of a task that
// is there answers its state.
func (a *Agent) start(ctx context.Context, ref *agentpb.TaskRef, request *agentpb.StartTask) (*agentpb.TaskState, error) {
	if t, err := a.find(ref); err == nil {
		return t.state(), nil
	}
	spec, err := parseSpec(request.GetSpec())
	if err != nil {
		return nil, err
	}
	t, err := a.newTask(record{
		Job: ref.GetJob(), Index: ref.GetIndex(), Run: ref.GetRun(), Spec: spec, Stage: stageStarting,
		VirtualIP: request.GetVirtualIp(), Hosts: hosts(request.GetHosts()), Secret: request.GetSecret(),
	})
	if err != nil {
		return nil, err
	}
	failpoint.Hit("agent.start.before")
	if err := a.startBox(ctx, t); err != nil {
		return nil, errors.Join(err, a.undo(t))
	}
	return a.begin(ctx, t)
}

func (a *Agent) startBox(ctx context.Context, t *task) error {
	r, _ := t.snapshot()
	box, err := a.boxes.Create(ctx, boxConfig(t, &r))
	if err != nil {
		return err
	}
	t.setBox(box)
	failpoint.Hit("agent.start.created")
	if err := box.Start(ctx); err != nil {
		return err
	}
	failpoint.Hit("agent.start.after")
	return nil
}

// newTask writes down that a task is about to be built.
func (a *Agent) newTask(r record) (*task, error) {
	ref := r.ref()
	if !validID.MatchString(taskID(ref)) {
		return nil, refuse("%q is no usable name of a task", taskID(ref))
	}
	t := newTask(a.taskDir(ref), r)
	if err := t.update(func(*record) {}); err != nil {
		return nil, err
	}
	a.addTask(t)
	return t, nil
}

func hosts(entries []*agentpb.HostEntry) (list []sandbox.Host) {
	for _, e := range entries {
		list = append(list, sandbox.Host{Name: e.GetName(), IP: e.GetIp()})
	}
	return list
}

func boxConfig(t *task, r *record) sandbox.Config {
	s := &r.Spec
	return sandbox.Config{
		ID: t.id(), Dir: t.boxDir(), Root: s.Root, Confined: s.Confined, Command: s.Command, Env: s.Env, WorkDir: s.Dir, User: s.User,
		CapAdd: s.CapAdd, Volumes: s.Volumes, Hostname: fmt.Sprintf("task-%d", r.Index), Hosts: r.Hosts,
		Job: r.Job, Task: int(r.Index), Tasks: s.Tasks, Run: r.Run, Secret: r.Secret,
		Serve:     s.Launch == api.LaunchFirst && r.Index > 0,
		VirtualIP: r.VirtualIP, CPUs: s.CPUs, MemBytes: s.MemBytes, CPUBaseline: s.CPUBaseline,
	}
}

// begin makes a task whose processes exist a running one.
func (a *Agent) begin(ctx context.Context, t *task) (*agentpb.TaskState, error) {
	if err := t.update(func(r *record) { r.Stage, r.Work = stageRunning, "" }); err != nil {
		return nil, errors.Join(err, a.undo(t))
	}
	if err := a.holdIfDue(ctx, t); err != nil {
		return nil, errors.Join(err, a.undo(t))
	}
	a.watch(t)
	a.log.Info("task runs", "task", t.id())
	state := t.state()
	a.report(t)
	return state, nil
}

// holdIfDue freezes a task that became complete after the lease ran out.
func (a *Agent) holdIfDue(ctx context.Context, t *task) error {
	if a.lease.hasLapsed() {
		return t.hold(ctx, holdLease)
	}
	if r, _ := t.snapshot(); len(r.Holds) > 0 {
		return t.hold(ctx, r.Holds[0])
	}
	return nil
}

// undo tears down a task that was not completed.
func (a *Agent) undo(t *task) error {
	t.finish()
	_, box := t.snapshot()
	if box != nil {
		if err := box.Destroy(context.WithoutCancel(a.life), sandbox.DestroyOptions{}); err != nil {
			return fmt.Errorf("tear down task %s: %w", t.id(), err)
		}
		t.setBox(nil)
	}
	r, _ := t.snapshot()
	if err := a.leaveNetwork(r.ref()); err != nil {
		return fmt.Errorf("tear down task %s: %w", t.id(), err)
	}
	return a.forget(t)
}

func (a *Agent) signal(ctx context.Context, ref *agentpb.TaskRef, number int32) error {
	t, err := a.find(ref)
	if err != nil {
		return err
	}
	if number <= 0 || number > 64 {
		return refuse("there is no signal %d", number)
	}
	r, box := t.snapshot()
	if r.Stage == stageEnded || r.Stage == stageDestroyed {
		return nil // it is over already
	}
	if box == nil || r.Stage != stageRunning {
		return refuse("task %d of job %s is %s", r.Index, r.Job, r.Stage)
	}
	if err := t.noteStop(syscall.Signal(number)); err != nil {
		return err
	}
	return box.Signal(ctx, syscall.Signal(number))
}

// noteStop remembers whether the user has the task stopped.
func (t *task) noteStop(signal syscall.Signal) error {
	switch signal {
	case syscall.SIGSTOP, syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU:
		return t.note(func(r *record) { r.Stopped = true })
	case syscall.SIGCONT:
		return t.note(func(r *record) { r.Stopped = false })
	}
	return nil
}

// destroy ends a task, if it still runs, and removes what it used. Destroying
// what is not there is a success.
func (a *Agent) destroy(ctx context.Context, ref *agentpb.TaskRef, keepLogs bool) error {
	t, err := a.find(ref)
	if err == nil {
		if h := t.underway(); h != nil {
			h.abandon()
			t, err = a.find(ref) // an abandoned restore leaves nothing
		}
	}
	if err != nil {
		return a.leaveNetwork(ref) // it may have been prepared
	}
	t.unwatch()
	r, box := t.snapshot()
	failpoint.Hit("agent.destroy.before")
	if box == nil && r.Stage != stageDestroyed {
		box, err = a.boxes.Open(ctx, t.boxDir())
		if err != nil && !notExist(err) {
			return err
		}
	}
	if box != nil {
		if err := box.Destroy(ctx, sandbox.DestroyOptions{KeepLogs: keepLogs}); err != nil {
			return fmt.Errorf("destroy task %s: %w", t.id(), err)
		}
	}
	if err := a.leaveNetwork(ref); err != nil {
		return fmt.Errorf("destroy task %s: %w", t.id(), err)
	}
	failpoint.Hit("agent.destroy.after")
	t.finish()
	t.setBox(nil)
	a.log.Info("task destroyed", "task", t.id())
	if !keepLogs {
		return a.forget(t)
	}
	return t.update(func(r *record) { r.Stage, r.Holds, r.Checkpoint = stageDestroyed, nil, "" })
}
