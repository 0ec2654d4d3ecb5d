package controller

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"dormouse/api"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
)

// stuck is an operation of a job whose agent hangs at a step, until released.
type stuck struct {
	job, op string
	release func()
}

// hangAt begins what a scenario does, and lets the agent hang at a step of it.
func hangAt(s *simulation, sc scenario, step string) stuck {
	s.t.Helper()
	id := s.running(api.JobSpec{})
	sc.prepare(s, id)
	open := make(chan struct{})
	reached := s.faultOnce(step, func(*simAgent) fault { return fault{act: func() { <-open }} })
	op := s.begin(sc.path(s, id), nil)
	<-reached
	release := sync.OnceFunc(func() { close(open) })
	s.t.Cleanup(release)
	return stuck{job: id, op: op.ID, release: release}
}

// cancellable are the steps, as agents see them, at which an operation may be
// called off, and what the job is then.
var cancellable = map[string]api.Phase{
	"checkpoint/preflight": api.PhaseRunning, "checkpoint/freeze": api.PhaseRunning, "checkpoint/capture": api.PhaseRunning,
	"checkpoint/thaw": api.PhaseRunning, "checkpoint/upload": api.PhaseRunning,
	"suspend/preflight": api.PhaseRunning, "suspend/freeze": api.PhaseRunning, "suspend/capture": api.PhaseRunning, "suspend/upload": api.PhaseRunning,
	"preempt/preflight": api.PhaseRunning, "preempt/freeze": api.PhaseRunning, "preempt/capture": api.PhaseRunning, "preempt/upload": api.PhaseRunning,
	"resume/restore":  api.PhaseSuspended,
	"restart/restore": api.PhaseFailed, // its old run is gone
}

// TestCancelAtEachStepOfEachKind calls operations off while an agent hangs, with
// and without the controller being killed in between.
func TestCancelAtEachStepOfEachKind(t *testing.T) {
	for _, sc := range scenarios() {
		for _, step := range sc.steps {
			for _, killed := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/killed=%v", sc.name, step, killed), func(t *testing.T) {
					cancelAt(t, sc, step, killed)
				})
			}
		}
	}
}

func cancelAt(t *testing.T, sc scenario, step string, killed bool) {
	s := newSimulation(t, "east-0", "west-0")
	h := hangAt(s, sc, step)
	older := s.repository.ids()
	phase, may := cancellable[sc.name+"/"+step]
	if !may {
		if detail := s.want(http.StatusConflict, "POST", "/v1/operations/"+h.op+"/cancel", nil, nil); !strings.Contains(detail, "cannot be cancelled: ") {
			t.Errorf("the refusal gives no reason: %q", detail)
		}
		h.release()
		if op := s.awaitEnd(h.op); op.Phase != api.OpDone {
			t.Errorf("the operation went on to be %s: %s", op.Phase, op.Error)
		}
		return
	}
	s.begin("/v1/operations/"+h.op+"/cancel", nil)
	if killed {
		s.restart()
	}
	h.release()
	op := s.awaitEnd(h.op)
	if op.Phase != api.OpCancelled || op.Error != "cancelled by `dormouse operations cancel`" {
		t.Errorf("the operation: %s, %q", op.Phase, op.Error)
	}
	s.awaitPhase(h.job, phase)
	s.checkAlive(h.job, phase)
	if ids := s.repository.ids(); !slices.Equal(ids, older) {
		t.Errorf("the repository held %v, and holds %v", older, ids)
	}
	s.want(http.StatusConflict, "POST", "/v1/operations/"+h.op+"/cancel", nil, nil)
	s.awaitReady("east-0", "west-0")
	next := map[api.Phase]string{api.PhaseRunning: "checkpoints", api.PhaseSuspended: "resume", api.PhaseFailed: "restart"}[phase]
	s.do("/v1/jobs/"+h.job+"/"+next, nil)
	s.awaitPhase(h.job, api.PhaseRunning)
}

// held lets the agent hang at the next step so called, until released.
func (s *simulation) held(step string) (reached <-chan struct{}, release func()) {
	s.t.Helper()
	open := make(chan struct{})
	reached = s.faultOnce(step, func(*simAgent) fault { return fault{act: func() { <-open }} })
	release = sync.OnceFunc(func() { close(open) })
	s.t.Cleanup(release)
	return reached, release
}

// callOff calls an operation off whose agent hangs, with the controller being
// killed before the agent goes on or not.
func (s *simulation) callOff(op string, killed bool, release func()) {
	s.t.Helper()
	s.begin("/v1/operations/"+op+"/cancel", nil)
	if killed {
		s.restart()
	}
	release()
	if ended := s.awaitEnd(op); ended.Phase != api.OpCancelled || ended.Error != "cancelled by `dormouse operations cancel`" {
		s.t.Errorf("the operation: %s, %q", ended.Phase, ended.Error)
	}
	s.want(http.StatusConflict, "POST", "/v1/operations/"+op+"/cancel", nil, nil)
}

// atEach runs a test for each step at which an agent may hang, with and without
// the controller being killed.
func atEach(t *testing.T, steps []string, test func(t *testing.T, step string, killed bool)) {
	for _, step := range steps {
		for _, killed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/killed=%v", step, killed), func(t *testing.T) { test(t, step, killed) })
		}
	}
}

// TestCancelledSwapLeavesOneRunningAndOneQueued: whichever it is that has the
// place then, the other has it next.
func TestCancelledSwapLeavesOneRunningAndOneQueued(t *testing.T) {
	atEach(t, []string{protocol.StepPreflight, protocol.StepFreeze, protocol.StepCapture, protocol.StepUpload, "cleanup", protocol.StepNetwork, protocol.StepRestore}, func(t *testing.T, step string, killed bool) {
		s := newSimulation(t, "east-0")
		out := s.running(api.JobSpec{CPUs: 4})
		in := s.submit(api.JobSpec{CPUs: 4})
		s.awaitReason(in, "waits for room")
		reached, release := s.held(step)
		op := s.begin("/v1/jobs/"+out+"/swap", map[string]string{"in": in})
		<-reached
		s.callOff(op.ID, killed, release)
		first, second := "", ""
		s.eventually("one has the place and the other waits", func(tx store.Tx) (bool, error) {
			one, err := getJob(tx, out)
			if err != nil {
				return false, err
			}
			other, err := getJob(tx, in)
			if err != nil {
				return false, err
			}
			if one.Phase != api.PhaseRunning {
				one, other = other, one
			}
			first, second = one.ID, other.ID
			return one.Phase == api.PhaseRunning && one.Operation == "" && other.waits() && other.Operation == "", nil
		})
		s.checkAlive(first, api.PhaseRunning)
		s.checkAlive(second, api.PhaseSuspended)
		s.end(first, 0)
		s.awaitPhase(second, api.PhaseRunning)
		s.checkAlive(second, api.PhaseRunning)
	})
}

// TestCancelledCloneIsNoJobThatRuns, and the one that it was to be made of does
// not notice.
func TestCancelledCloneIsNoJobThatRuns(t *testing.T) {
	atEach(t, []string{protocol.StepNetwork, protocol.StepRestore}, func(t *testing.T, step string, killed bool) {
		s := newSimulation(t, "east-0", "west-0")
		id := s.running(api.JobSpec{})
		cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
		reached, release := s.held(step)
		op := s.begin("/v1/checkpoints/"+cp+"/clone", nil)
		<-reached
		s.callOff(op.ID, killed, release)
		if job := s.awaitPhase(op.Job, api.PhaseCancelled); !strings.Contains(job.Reason, "the clone was cancelled") {
			t.Errorf("the clone's reason: %q", job.Reason)
		}
		s.eventually("it is gone from its nodes", noCleanups)
		s.checkAlive(op.Job, api.PhaseCancelled)
		s.checkAlive(id, api.PhaseRunning)
		s.awaitReady("east-0", "west-0")
		again := s.do("/v1/checkpoints/"+cp+"/clone", nil)
		s.awaitPhase(again.Job, api.PhaseRunning)
	})
}

// TestCancelledDrillLeavesNothing; once the trial has shown what it was for, there
// is nothing to call off.
func TestCancelledDrillLeavesNothing(t *testing.T) {
	atEach(t, []string{protocol.StepNetwork, protocol.StepRestore, "cleanup"}, func(t *testing.T, step string, killed bool) {
		s := newSimulation(t, "east-0", "west-0")
		id := s.running(api.JobSpec{})
		cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
		reached, release := s.held(step)
		op := s.begin("/v1/checkpoints/"+cp+"/verify", onTrial)
		<-reached
		if step != "cleanup" {
			s.callOff(op.ID, killed, release)
		} else {
			detail := s.want(http.StatusConflict, "POST", "/v1/operations/"+op.ID+"/cancel", nil, nil)
			if want := "operation " + op.ID + " (drill) cannot be cancelled: its step watch and what follows cannot be undone"; detail != want {
				t.Errorf("the refusal: %q, want %q", detail, want)
			}
			release()
			s.awaitEnd(op.ID)
		}
		if drill := s.checkpointNow(cp).Drill; (drill != nil) != (step == "cleanup") {
			t.Errorf("the checkpoint is stamped %+v", drill)
		}
		s.nothingOfTrials()
		s.checkAlive(id, api.PhaseRunning)
	})
}

// TestCancelledDrainLeavesItsJobsRunningAndTheNodeCordoned: what has left comes up
// elsewhere, what has not stays.
func TestCancelledDrainLeavesItsJobsRunningAndTheNodeCordoned(t *testing.T) {
	atEach(t, []string{protocol.StepPreflight, protocol.StepCapture, protocol.StepUpload, "cleanup", protocol.StepRestore}, func(t *testing.T, step string, killed bool) {
		s := newSimulation(t, "east-0", "east-1")
		id := s.running(api.JobSpec{})
		node := s.jobNow(id).TaskStatus[0].Node
		reached, release := s.held(step)
		op := s.begin("/v1/nodes/"+node+"/drain", nil)
		<-reached
		s.callOff(op.ID, killed, release)
		s.eventually("the job runs, and rests", func(tx store.Tx) (bool, error) {
			job, err := getJob(tx, id)
			return err == nil && job.Phase == api.PhaseRunning && job.Operation == "", err
		})
		s.checkAlive(id, api.PhaseRunning)
		s.awaitReady(map[string]string{"east-0": "east-1", "east-1": "east-0"}[node])
		if n := s.nodeNow(node); !n.Cordoned {
			t.Errorf("the node is %s", n.State)
		}
		s.want(http.StatusNoContent, "POST", "/v1/nodes/"+node+"/uncordon", nil, nil)
		s.do("/v1/nodes/"+node+"/drain", nil)
	})
}

func TestCancelledStartEndsTheJob(t *testing.T) {
	s := newSimulation(t, "east-0")
	open := make(chan struct{})
	reached := s.faultOnce(protocol.StepStart, func(*simAgent) fault { return fault{act: func() { <-open }} })
	id := s.submit(api.JobSpec{})
	<-reached
	s.begin("/v1/operations/"+s.jobNow(id).Operation+"/cancel", nil)
	close(open)
	if job := s.awaitPhase(id, api.PhaseCancelled); !strings.Contains(job.Reason, "its start was cancelled") {
		t.Errorf("the job's reason: %q", job.Reason)
	}
	s.eventually("nothing of it is left", func(tx store.Tx) (bool, error) {
		orders, err := store.All[cleanup](tx, store.Cleanups)
		return len(orders) == 0, err
	})
	s.checkAlive(id, api.PhaseCancelled)
}

func TestVerifyIsCancelled(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.do("/v1/jobs/"+id+"/checkpoints", nil)
	s.repository.hangs.Store(true)
	op := s.begin("/v1/verify", nil)
	s.begin("/v1/operations/"+op.ID+"/cancel", nil)
	if ended := s.awaitEnd(op.ID); ended.Phase != api.OpCancelled {
		t.Errorf("the operation is %s: %s", ended.Phase, ended.Error)
	}
}

// TestKillEndsAJobWhateverItIsIn kills jobs at each step of each kind.
func TestKillEndsAJobWhateverItIsIn(t *testing.T) {
	for _, sc := range scenarios() {
		if sc.name == "kill" {
			continue
		}
		for _, step := range sc.steps {
			t.Run(sc.name+"/"+step, func(t *testing.T) {
				s := newSimulation(t, "east-0", "west-0")
				h := hangAt(s, sc, step)
				kill := s.begin("/v1/jobs/"+h.job+"/kill", nil)
				if kill.Kind != api.OpKill || !strings.Contains(kill.Message, h.op) {
					t.Errorf("the kill does not say what it waits for: %+v", kill)
				}
				detail := s.want(http.StatusConflict, "POST", "/v1/jobs/"+h.job+"/kill", nil, nil)
				ended := step == "cleanup" && strings.Contains(detail, "is over already") // a kill need not wait for it
				if !ended && !strings.Contains(detail, "is being ended already, by operation "+kill.ID) {
					t.Errorf("a second kill: %q", detail)
				}
				s.want(http.StatusConflict, "POST", "/v1/operations/"+kill.ID+"/cancel", nil, nil)
				s.restart()
				h.release()
				if op := s.awaitEnd(kill.ID); op.Phase != api.OpDone {
					t.Errorf("the kill is %s: %s", op.Phase, op.Error)
				}
				s.awaitPhase(h.job, api.PhaseCancelled)
				s.eventually("nothing of it is left", func(tx store.Tx) (bool, error) {
					orders, err := store.All[cleanup](tx, store.Cleanups)
					return len(orders) == 0, err
				})
				s.checkAlive(h.job, api.PhaseCancelled)
			})
		}
	}
}

// TestKillOfAJobThatEndsMeanwhileLeavesItsEnd: what a program came to by itself
// is not written over.
func TestKillOfAJobThatEndsMeanwhileLeavesItsEnd(t *testing.T) {
	s := newSimulation(t, "east-0")
	h := hangAt(s, scenarios()[0], protocol.StepDiscard) // past its commit
	kill := s.begin("/v1/jobs/"+h.job+"/kill", nil)
	s.end(h.job, 0)
	s.eventually("the job is over", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, h.job)
		return err == nil && job.Phase == api.PhaseCompleted, err
	})
	h.release()
	op := s.awaitEnd(kill.ID)
	if op.Phase != api.OpFailed || !op.Refused || !strings.Contains(op.Error, "is over already: it is completed") {
		t.Errorf("the kill: %+v", op.Operation)
	}
	s.awaitPhase(h.job, api.PhaseCompleted)
}

// TestKillGivesUpOnAnAgentThatDoesNotAnswerTheSignal, but not on its destruction.
func TestKillGivesUpOnAnAgentThatDoesNotAnswerTheSignal(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	open := make(chan struct{})
	s.faultOnce(protocol.StepSignal, func(*simAgent) fault { return fault{act: func() { <-open }} })
	op := s.begin("/v1/jobs/"+id+"/kill", nil)
	s.eventually("the tasks are being destroyed", func(tx store.Tx) (bool, error) {
		now, err := getOperation(tx, op.ID)
		return err == nil && now.Step == protocol.StepDestroy, err
	})
	close(open)
	s.awaitEnd(op.ID)
	s.awaitPhase(id, api.PhaseCancelled)
}

// TestRestartWaitsForTheOldRunOfAJobThatIsOver: of a killed or failed job, too,
// nothing may be left when it begins anew.
func TestRestartWaitsForTheOldRunOfAJobThatIsOver(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	id := s.running(api.JobSpec{Tasks: 2, CPUs: 2})
	open := make(chan struct{})
	reached := s.faultOnce("cleanup", func(*simAgent) fault { return fault{act: func() { <-open }} })
	s.end(id, 1) // fails the job; the other task is to be destroyed
	<-reached
	s.awaitPhase(id, api.PhaseFailed)
	op := s.begin("/v1/jobs/"+id+"/restart", nil)
	other := s.running(api.JobSpec{})
	s.do("/v1/jobs/"+other+"/restart", nil) // time enough for the first, too, did it not wait
	var waiting api.Operation
	if s.want(http.StatusOK, "GET", "/v1/operations/"+op.ID, nil, &waiting); waiting.Step != protocol.StepStop {
		t.Errorf("the restart is at %q while a task of the old run is being destroyed", waiting.Step)
	}
	close(open)
	s.awaitPhase(id, api.PhaseRunning) // and checkOneCopy has watched
}
