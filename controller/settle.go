package controller

import (
	"fmt"
	"slices"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/store"
	failures "dormouse/monitor/failure"
)

// verdict is what a running job's tasks say about the job.
type verdict int

const (
	goesOn verdict = iota
	succeeded
	broke // a task ended with a failure
	lost  // a task vanished with its node
	sick  // a task is unhealthy by its health check
)

// judge looks at the tasks of a running job. It is a pure function. A failed
// task counts before a lost one: it would have failed the job anyway. Where the
// first task launches the others, the job ends with it.
func judge(tasks []api.TaskStatus, launch string) (verdict, *api.TaskStatus) {
	if launch == api.LaunchFirst && tasks[0].ExitCode != nil {
		if *tasks[0].ExitCode == 0 {
			return succeeded, &tasks[0]
		}
		return broke, &tasks[0]
	}
	var first *api.TaskStatus
	state, ended := goesOn, 0
	for i := range tasks {
		t := &tasks[i]
		switch {
		case t.ExitCode != nil && *t.ExitCode != 0:
			if state != broke {
				state, first = broke, t
			}
		case t.ExitCode != nil:
			ended++
		case lostTask(*t):
			if state == goesOn {
				state, first = lost, t
			}
		}
	}
	if i := slices.IndexFunc(tasks, unhealthy); i >= 0 && state == goesOn {
		state, first = sick, &tasks[i]
	}
	if len(tasks) > 0 && ended == len(tasks) {
		return succeeded, &tasks[0]
	}
	return state, first
}

// unhealthy reports whether a task runs and its health check says that it is ill.
func unhealthy(t api.TaskStatus) bool {
	return t.ExitCode == nil && t.Health != nil && t.Health.Condition == api.ConditionUnhealthy
}

// lostTask reports whether a task went with its node: whatever comes back of it
// is destroyed.
func lostTask(t api.TaskStatus) bool { return t.Phase == api.PhaseFailed && t.ExitCode == nil }

// settle gives a running job the phase that its tasks call for, and writes the
// job. Jobs in other phases belong to an operation.
func (c *Controller) settle(tx store.Tx, job *jobRecord) error {
	if job.Phase == api.PhaseRunning {
		ending, err := c.beingEnded(tx, job)
		if err != nil {
			return err
		}
		if !ending {
			if err := c.settleRunning(tx, job); err != nil {
				return err
			}
		}
	}
	if err := c.retire(tx, job); err != nil {
		return err
	}
	return putJob(tx, job)
}

// beingEnded reports whether `dormouse kill` is ending the job.
func (c *Controller) beingEnded(tx store.Tx, job *jobRecord) (bool, error) {
	if job.Operation == "" {
		return false, nil
	}
	op, err := getOperation(tx, job.Operation)
	if err != nil {
		return false, err
	}
	ask, err := op.request()
	return op.Kind == api.OpKill && ask.Signal == 0, err
}

func (c *Controller) settleRunning(tx store.Tx, job *jobRecord) error {
	state, task := judge(job.TaskStatus, job.Spec.Launch)
	switch state {
	case succeeded:
		return c.finish(tx, job, api.PhaseCompleted, "", task.ExitCode)
	case broke:
		if job.Spec.MaxRestarts > 0 && job.Operation != "" {
			return nil // decided when the operation has ended
		}
		b := c.runFailed(job, failures.Program, describeExit(job, task), task.Node)
		b.code = task.ExitCode
		return c.fail(tx, job, b)
	case lost:
		if job.Operation != "" {
			return nil // as above
		}
		return c.fail(tx, job, c.runFailed(job, failures.Node, task.Reason, task.Node))
	case sick:
		if job.Operation != "" {
			return nil // as above
		}
		return c.fail(tx, job, c.runFailed(job, failures.Program, "unhealthy: "+task.Health.Explanation, task.Node))
	}
	return nil
}

func describeExit(job *jobRecord, task *api.TaskStatus) string {
	who := "the program"
	if job.Tasks > 1 {
		who = fmt.Sprintf("task %d", task.Index)
	}
	switch {
	case task.Reason != "":
		return task.Reason
	case task.Signal != "":
		return fmt.Sprintf("%s was ended by %s", who, task.Signal)
	}
	return fmt.Sprintf("%s exited with status %d", who, *task.ExitCode)
}

// adviceFor tells what restart would do.
func adviceFor(job, checkpoint string) string {
	if checkpoint == "" {
		return "there is no durable checkpoint: `dormouse restart " + job + "` starts it anew"
	}
	return "`dormouse restart " + job + "` restores checkpoint " + checkpoint
}

// finish ends a job.
func (c *Controller) finish(tx store.Tx, job *jobRecord, phase api.Phase, reason string, code *int) error {
	now := c.clock.Now().UTC()
	job.Phase, job.Reason, job.Finished, job.ExitCode, job.Yield, job.Starvation = phase, reason, &now, code, nil, nil
	message := reason
	if message == "" {
		message = "every task exited with status 0"
	}
	c.logJob(job)
	return c.emit(tx, api.Event{Job: job.ID, Type: string(phase), Message: message})
}

// retire has the remaining tasks of a job that is over destroyed. While an
// operation is under way it may still need them.
func (c *Controller) retire(tx store.Tx, job *jobRecord) error {
	if !job.Phase.Final() || job.Operation != "" {
		return nil
	}
	return keepLogsOnly(tx, job)
}

// keepLogsOnly orders the tasks of the present run destroyed and remembers
// where their logs are.
func keepLogsOnly(tx store.Tx, job *jobRecord) error {
	for _, ref := range job.liveRefs() {
		if err := putCleanup(tx, cleanup{Task: ref, KeepLogs: true}); err != nil {
			return err
		}
		job.Kept = append(job.Kept, ref)
	}
	return nil
}

// liveRefs are the tasks of the present run that were not ordered destroyed.
func (j *jobRecord) liveRefs() []taskRef {
	return slices.DeleteFunc(j.refs(), func(r taskRef) bool { return slices.Contains(j.Kept, r) })
}

// applyState notes what an agent says of a task of the present run. What has
// ended stays ended.
func applyState(job *jobRecord, state *agentpb.TaskState) {
	index := int(state.GetTask().GetIndex())
	if index < 0 || index >= len(job.TaskStatus) {
		return
	}
	t := &job.TaskStatus[index]
	if t.ExitCode != nil || t.Phase == api.PhaseFailed {
		return
	}
	t.Phase, t.Pid, t.Reason, t.Signal = api.Phase(state.GetPhase()), int(state.GetPid()), state.GetReason(), state.GetSignal()
	if ip := state.GetVirtualIp(); ip != "" {
		t.VirtualIP = ip
	}
	if !state.GetExited() {
		return
	}
	code := int(state.GetExitCode())
	t.ExitCode, t.Pid, t.Phase = &code, 0, api.PhaseCompleted
	if code != 0 {
		t.Phase = api.PhaseFailed
	}
}

// loseTasks marks the job's tasks on a node as gone with it.
func loseTasks(job *jobRecord, node, reason string) (any bool) {
	for i := range job.TaskStatus {
		t := &job.TaskStatus[i]
		if t.Node != node || t.ExitCode != nil || t.Phase == api.PhaseFailed {
			continue
		}
		t.Phase, t.Pid, t.Reason = api.PhaseFailed, 0, reason
		any = true
	}
	return any
}
