package controller

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
	"dormouse/repository"
)

func TestJobRunsAndCompletes(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{Name: "hello"})
	s.end(id, 0)
	job := s.awaitPhase(id, api.PhaseCompleted)
	if job.ExitCode == nil || *job.ExitCode != 0 || job.Finished == nil || job.Started == nil {
		t.Errorf("want exit code 0 and times, got %+v", job.Job)
	}
	s.eventually("the task is cleaned up", noCleanups)
	if alive := s.aliveTasks(id); len(alive) != 0 {
		t.Errorf("tasks are left: %v", alive)
	}
}

func noCleanups(tx store.Tx) (bool, error) {
	orders, err := store.All[cleanup](tx, store.Cleanups)
	return len(orders) == 0, err
}

func TestFailedTaskFailsItsJobAndEndsTheOthers(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1")
	id := s.running(api.JobSpec{Tasks: 2})
	s.end(id, 3)
	job := s.awaitPhase(id, api.PhaseFailed)
	if job.ExitCode == nil || *job.ExitCode != 3 || job.Reason != "task 0 exited with status 3" {
		t.Errorf("want exit code 3 of task 0, got %v, %q", job.ExitCode, job.Reason)
	}
	s.eventually("all tasks are cleaned up", noCleanups)
	if alive := s.aliveTasks(id); len(alive) != 0 {
		t.Errorf("tasks are left: %v", alive)
	}
}

func TestJobWithoutRoomIsPendingWithAReasonAndStartsWhenThereIs(t *testing.T) {
	s := newSimulation(t, "east-0")
	first := s.running(api.JobSpec{CPUs: 4})
	second := s.submit(api.JobSpec{CPUs: 1})
	s.eventually("the second job has a reason to wait", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, second)
		return err == nil && job.Phase == api.PhasePending && strings.HasPrefix(job.Reason, "waits for room: "), err
	})
	s.end(first, 0)
	s.awaitPhase(second, api.PhaseRunning)
}

func TestCheckpointLeavesTheJobRunning(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	op := s.do("/v1/jobs/"+id+"/checkpoints", map[string]string{"label": "before lunch"})
	if op.Checkpoint == "" || op.Progress != 1 || op.Step != protocol.StepRetention {
		t.Errorf("the operation: %+v", op.Operation)
	}
	var list []api.Checkpoint
	s.want(http.StatusOK, "GET", "/v1/jobs/"+id+"/checkpoints", nil, &list)
	if len(list) != 1 {
		t.Fatalf("want one checkpoint, got %+v", list)
	}
	cp := list[0]
	if cp.ID != op.Checkpoint || cp.State != api.CheckpointDurable || cp.Label != "before lunch" || cp.PauseMS != 12.5 ||
		cp.SizeBytes != 1000 || cp.NewBytes != 10 || len(cp.Steps) != 1 || cp.Durable == nil || cp.Trigger != api.TriggerUser {
		t.Errorf("the checkpoint: %+v", cp)
	}
	job := s.awaitPhase(id, api.PhaseRunning)
	if job.Checkpoints != 1 || len(s.stillFrozen(id)) != 0 {
		t.Errorf("the job: %+v, frozen %v", job.Job, s.stillFrozen(id))
	}
}

// A job of one task waits for nobody while it stands still.
func TestSingleTaskGoesOnBeforeItsFreezeIsAnswered(t *testing.T) {
	for _, older := range []bool{false, true} {
		s := newSimulation(t, "east-0")
		s.agents["east-0"].older = older
		id := s.running(api.JobSpec{})
		for _, kind := range []string{"checkpoints", "suspend"} {
			var frozen []taskRef
			s.faultOnce(protocol.StepCapture, func(*simAgent) fault {
				frozen = s.stillFrozen(id)
				return fault{}
			})
			s.do("/v1/jobs/"+id+"/"+kind, nil)
			if want := kind == "suspend" || older; (len(frozen) == 1) != want {
				t.Errorf("%s, agent without Freeze.alone %v: want a task that stands still at capture: %v, got %v", kind, older, want, frozen)
			}
		}
	}
}

// A job of one task has its network made by the command that restores it, unless the
// agent does not know that.
func TestNetworkOfASingleTaskIsMadeByItsRestore(t *testing.T) {
	for _, newer := range []bool{false, true} {
		s := newSimulation(t, "east-0")
		s.renew("east-0", newer)
		id := s.running(api.JobSpec{})
		s.do("/v1/jobs/"+id+"/suspend", nil)
		sent := s.commands(func(c *agentpb.Command) bool {
			return c.GetPrepareNetwork() != nil || c.GetRestore().GetNetwork() != nil
		})
		s.do("/v1/jobs/"+id+"/resume", nil)
		if list := sent(); len(list) != 1 || (list[0].GetRestore() != nil) != newer {
			t.Errorf("agent with RestoreTask.network %v: it was sent %v", newer, list)
		}
	}
}

func TestBarriersHoldBetweenTheTasksOfAJob(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1")
	id := s.running(api.JobSpec{Tasks: 2})
	var mu sync.Mutex
	var order []string
	s.setFault(func(_ *simAgent, c *agentpb.Command) fault {
		mu.Lock()
		defer mu.Unlock()
		order = append(order, stepIn(c.GetId()))
		return fault{}
	})
	s.do("/v1/jobs/"+id+"/checkpoints", nil)
	mu.Lock()
	defer mu.Unlock()
	want := []string{}
	for _, step := range []string{protocol.StepPreflight, protocol.StepFreeze, protocol.StepCapture, protocol.StepOpen, protocol.StepThaw, protocol.StepUpload, protocol.StepDiscard} {
		want = append(want, step, step)
	}
	if !slices.Equal(order, want) {
		t.Errorf("want each step at both tasks before the next, got %v", order)
	}
}

func TestSuspendedJobWakesInTheOtherCloud(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	id := s.running(api.JobSpec{})
	from := s.jobNow(id).Cloud
	to := map[string]string{"east": "west", "west": "east"}[from]
	s.do("/v1/jobs/"+id+"/suspend", nil)
	s.awaitPhase(id, api.PhaseSuspended)
	if len(s.aliveTasks(id)) != 0 {
		t.Fatalf("a suspended job has tasks: %v", s.aliveTasks(id))
	}
	s.do("/v1/jobs/"+id+"/resume", map[string]string{"cloud": to})
	job := s.awaitPhase(id, api.PhaseRunning)
	if job.Cloud != to || job.Restarts != 1 || job.Run != 2 || job.From == "" {
		t.Errorf("the woken job: %+v, run %d, from %q", job.Job, job.Run, job.From)
	}
}

func TestRestartOfARunningJobDestroysTheOldRunFirst(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	id := s.running(api.JobSpec{})
	cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	s.do("/v1/jobs/"+id+"/restart", nil)
	job := s.awaitPhase(id, api.PhaseRunning)
	if job.Run != 2 || job.From != cp || len(s.aliveTasks(id)) != 1 {
		t.Errorf("want run 2 from %s once, got run %d from %s: %v", cp, job.Run, job.From, s.aliveTasks(id))
	}
}

func TestRestartWithoutCheckpointStartsAnew(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.end(id, 1)
	s.awaitPhase(id, api.PhaseFailed)
	s.do("/v1/jobs/"+id+"/restart", nil)
	job := s.awaitPhase(id, api.PhaseRunning)
	if job.From != "" || job.Run != 2 || job.ExitCode != nil || job.Finished != nil {
		t.Errorf("want a fresh run 2, got %+v from %q", job.Job, job.From)
	}
}

func TestCloneRunsBesideTheOriginal(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	id := s.running(api.JobSpec{Name: "one"})
	cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	op := s.do("/v1/checkpoints/"+cp+"/clone", map[string]string{"cloud": "west", "name": "two"})
	if op.Job == id {
		t.Fatal("the clone's operation names the original")
	}
	twin := s.awaitPhase(op.Job, api.PhaseRunning)
	if twin.Name != "two" || twin.Cloud != "west" || twin.From != cp || twin.Restarts != 0 {
		t.Errorf("the clone: %+v from %q", twin.Job, twin.From)
	}
	if original := s.awaitPhase(id, api.PhaseRunning); original.TaskStatus[0].VirtualIP != twin.TaskStatus[0].VirtualIP {
		t.Error("the clone has another address inside than what it was captured with")
	}
	// A clone without checkpoints of its own goes back to where it came from.
	s.do("/v1/jobs/"+op.Job+"/restart", nil)
	if again := s.awaitPhase(op.Job, api.PhaseRunning); again.From != cp {
		t.Errorf("the restarted clone comes from %q", again.From)
	}
}

func TestKillEndsAJob(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.do("/v1/jobs/"+id+"/kill", nil)
	job := s.awaitPhase(id, api.PhaseCancelled)
	if job.ExitCode == nil || *job.ExitCode != 143 || len(s.aliveTasks(id)) != 0 {
		t.Errorf("want 143 and nothing alive, got %v and %v", job.ExitCode, s.aliveTasks(id))
	}
}

func TestKillEndsAJobThatIgnoresSIGTERM(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.mu.Lock()
	for _, task := range s.agents["east-0"].tasks {
		task.log = "deaf"
	}
	s.mu.Unlock()
	s.do("/v1/jobs/"+id+"/kill", nil)
	s.awaitPhase(id, api.PhaseCancelled)
	if alive := s.aliveTasks(id); len(alive) != 0 {
		t.Errorf("tasks are left: %v", alive)
	}
}

func TestKillWithASignalOnlySendsIt(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.do("/v1/jobs/"+id+"/kill", map[string]string{"signal": "USR1"})
	job := s.awaitPhase(id, api.PhaseFailed) // the simulated program does not survive it
	if job.ExitCode == nil || *job.ExitCode != 138 {
		t.Errorf("want 128+10, got %v", job.ExitCode)
	}
}

func TestKillOfPendingAndSuspendedJobsIsImmediate(t *testing.T) {
	s := newSimulation(t, "east-0")
	first := s.running(api.JobSpec{CPUs: 4})
	second := s.submit(api.JobSpec{})
	if op := s.begin("/v1/jobs/"+second+"/kill", nil); op.Phase != api.OpDone {
		t.Errorf("kill of a pending job: %+v", op)
	}
	s.do("/v1/jobs/"+first+"/suspend", nil)
	s.begin("/v1/jobs/"+first+"/kill", nil)
	if job := s.awaitPhase(first, api.PhaseCancelled); job.Checkpoints != 1 {
		t.Errorf("the killed job lost its checkpoint: %+v", job.Job)
	}
}

func TestRetentionKeepsTheNewestAndTheLabelled(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{Keep: 2})
	var made []string
	for _, label := range []string{"keep me", "", "", ""} {
		made = append(made, s.do("/v1/jobs/"+id+"/checkpoints", map[string]string{"label": label}).Checkpoint)
	}
	kept := s.repository.ids()
	for i, want := range []bool{true, false, true, true} {
		if slices.Contains(kept, made[i]) != want {
			t.Errorf("checkpoint %d kept: want %v, in %v of %v", i, want, kept, made)
		}
	}
	if job := s.jobNow(id); job.Checkpoints != 3 {
		t.Errorf("want 3 checkpoints, got %d", job.Checkpoints)
	}
}

func TestRemoveForgetsJobCheckpointsAndLogs(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.do("/v1/jobs/"+id+"/checkpoints", nil)
	if detail := s.want(http.StatusConflict, "DELETE", "/v1/jobs/"+id, nil, nil); !strings.Contains(detail, "dormouse kill") {
		t.Errorf("the refusal does not say what to do: %q", detail)
	}
	s.end(id, 0)
	s.awaitPhase(id, api.PhaseCompleted)
	s.want(http.StatusNoContent, "DELETE", "/v1/jobs/"+id, nil, nil)
	s.want(http.StatusNotFound, "GET", "/v1/jobs/"+id, nil, nil)
	if left := s.repository.ids(); len(left) != 0 {
		t.Errorf("manifests are left: %v", left)
	}
	s.eventually("the node has forgotten the logs", noCleanups)
	s.mu.Lock()
	defer s.mu.Unlock()
	if left := len(s.agents["east-0"].tasks); left != 0 {
		t.Errorf("the node still has %d tasks", left)
	}
}

func TestVerifyReportsEachCheckpoint(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	op := s.do("/v1/verify", nil)
	if want := fmt.Sprintf(`[{"checkpoint":%q,"ok":true,"bytes":100}]`, cp); string(op.Result) != want {
		t.Errorf("want %s, got %s", want, op.Result)
	}
}

func TestRefusedPreflightNamesTheReasonsAndFreezesNothing(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.setFault(func(_ *simAgent, c *agentpb.Command) fault {
		if c.GetPreflight() == nil {
			return fault{}
		}
		return fault{failure: &agentpb.Failure{Message: "process 7 (db) has an io_uring", Refused: true}}
	})
	op := s.awaitEnd(s.begin("/v1/jobs/"+id+"/checkpoints", nil).ID)
	if op.Phase != api.OpFailed || !op.Refused || op.Error != "process 7 (db) has an io_uring" {
		t.Errorf("the operation: %+v", op.Operation)
	}
	s.awaitPhase(id, api.PhaseRunning)
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.Contains(s.agents["east-0"].seen, protocol.StepFreeze) {
		t.Error("the job was frozen")
	}
}

func TestRetryableFailureIsTriedAgainAfterAThaw(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.faultOnce(protocol.StepCapture, func(*simAgent) fault {
		return fault{failure: &agentpb.Failure{Message: "a process appeared", Retryable: true}}
	})
	op := s.do("/v1/jobs/"+id+"/checkpoints", nil)
	if op.Position.Attempt != 2 {
		t.Errorf("want success at the second attempt, got %d", op.Position.Attempt)
	}
}

func TestRetriesAreBounded(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.setFault(func(_ *simAgent, c *agentpb.Command) fault {
		if c.GetCapture() == nil {
			return fault{}
		}
		return fault{failure: &agentpb.Failure{Message: "a process appeared", Retryable: true}}
	})
	op := s.awaitEnd(s.begin("/v1/jobs/"+id+"/checkpoints", nil).ID)
	if op.Phase != api.OpFailed || op.Position.Attempt != protocol.MaxAttempts || op.Error != "a process appeared" {
		t.Errorf("the operation: %+v after %d attempts", op.Operation, op.Position.Attempt)
	}
	if s.awaitPhase(id, api.PhaseRunning); len(s.stillFrozen(id)) != 0 {
		t.Error("the job is still frozen")
	}
}

// captureSteps are the steps of a capture that an agent takes part in before
// the commit.
var captureSteps = []string{protocol.StepPreflight, protocol.StepFreeze, protocol.StepCapture, protocol.StepThaw, protocol.StepUpload}

func TestFailureAtAnyStepOfACheckpointLeavesTheJobAndOlderCheckpoints(t *testing.T) {
	for _, kind := range []string{"checkpoints", "suspend"} {
		for _, step := range captureSteps {
			if kind == "suspend" && step == protocol.StepThaw {
				continue
			}
			t.Run(kind+"/"+step, func(t *testing.T) {
				s := newSimulation(t, "east-0")
				id := s.running(api.JobSpec{})
				older := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
				s.faultOnce(step, func(*simAgent) fault { return fault{failure: &agentpb.Failure{Message: "it broke"}} })
				op := s.awaitEnd(s.begin("/v1/jobs/"+id+"/"+kind, nil).ID)
				if op.Phase != api.OpFailed || op.Error != "it broke" || op.Refused {
					t.Errorf("the operation: %+v", op.Operation)
				}
				s.awaitPhase(id, api.PhaseRunning)
				if frozen := s.stillFrozen(id); len(frozen) != 0 {
					t.Errorf("still frozen: %v", frozen)
				}
				if ids := s.repository.ids(); !slices.Equal(ids, []string{older}) {
					t.Errorf("want only the older checkpoint, got %v", ids)
				}
				var cp api.Checkpoint
				s.want(http.StatusOK, "GET", "/v1/checkpoints/"+op.Checkpoint, nil, &cp)
				if cp.State != api.CheckpointFailed || cp.Error != "it broke" {
					t.Errorf("the checkpoint: %+v", cp)
				}
			})
		}
	}
}

func TestFailureToPublishThawsTheJob(t *testing.T) {
	for _, kind := range []string{"checkpoints", "suspend"} {
		t.Run(kind, func(t *testing.T) {
			s := newSimulation(t, "east-0")
			id := s.running(api.JobSpec{})
			s.repository.put = func() error { return errors.New("no space left in the repository") }
			op := s.awaitEnd(s.begin("/v1/jobs/"+id+"/"+kind, nil).ID)
			if op.Phase != api.OpFailed || op.Error != "no space left in the repository" {
				t.Errorf("the operation: %+v", op.Operation)
			}
			s.awaitPhase(id, api.PhaseRunning)
			if frozen := s.stillFrozen(id); len(frozen) != 0 {
				t.Errorf("still frozen: %v", frozen)
			}
		})
	}
}

// scenario is an operation that is disturbed at each of its steps.
type scenario struct {
	name    string
	steps   []string
	prepare func(s *simulation, id string)
	path    func(s *simulation, id string) string
	phase   api.Phase // of the job after success
}

func scenarios() []scenario {
	nothing := func(*simulation, string) {}
	on := func(action string) func(*simulation, string) string {
		return func(_ *simulation, id string) string { return "/v1/jobs/" + id + "/" + action }
	}
	checkpointed := func(s *simulation, id string) { s.do("/v1/jobs/"+id+"/checkpoints", nil) }
	return []scenario{
		{"checkpoint", append(captureSteps, protocol.StepDiscard), nothing, on("checkpoints"), api.PhaseRunning},
		{"suspend", []string{protocol.StepPreflight, protocol.StepFreeze, protocol.StepCapture, protocol.StepUpload, "cleanup", protocol.StepDestroy}, nothing, on("suspend"), api.PhaseSuspended},
		{"preempt", []string{protocol.StepPreflight, protocol.StepFreeze, protocol.StepCapture, protocol.StepUpload, "cleanup", protocol.StepDestroy}, nothing, on("preempt"), api.PhaseRunning}, // it comes back at once
		{"resume", []string{protocol.StepRestore}, func(s *simulation, id string) { s.do("/v1/jobs/"+id+"/suspend", nil) }, on("resume"), api.PhaseRunning},
		{"restart", []string{"cleanup", protocol.StepRestore}, checkpointed, on("restart"), api.PhaseRunning},
		{"kill", []string{protocol.StepSignal, "cleanup"}, nothing, on("kill"), api.PhaseCancelled},
	}
}

func TestLostConnectionAtAnyStepIsSurvived(t *testing.T) {
	for _, sc := range scenarios() {
		for _, step := range sc.steps {
			t.Run(sc.name+"/"+step, func(t *testing.T) {
				s := newSimulation(t, "east-0", "west-0")
				id := s.running(api.JobSpec{})
				sc.prepare(s, id)
				hit := s.faultOnce(step, func(*simAgent) fault { return fault{disconnect: true} })
				s.do(sc.path(s, id), nil)
				<-hit
				s.awaitPhase(id, sc.phase)
				s.checkAlive(id, sc.phase)
			})
		}
	}
}

func TestRestartedControllerFinishesWhatWasUnderWay(t *testing.T) {
	for _, sc := range scenarios() {
		for _, step := range sc.steps {
			t.Run(sc.name+"/"+step, func(t *testing.T) {
				s := newSimulation(t, "east-0", "west-0")
				id := s.running(api.JobSpec{})
				sc.prepare(s, id)
				reached := s.faultOnce(step, func(*simAgent) fault { return fault{disconnect: true} })
				op := s.begin(sc.path(s, id), nil)
				<-reached
				s.restart()
				if ended := s.awaitEnd(op.ID); ended.Phase != api.OpDone {
					t.Fatalf("the operation is %s: %s", ended.Phase, ended.Error)
				}
				s.awaitPhase(id, sc.phase)
				s.checkAlive(id, sc.phase)
			})
		}
	}
}

// checkAlive checks that a running job has one task, and any other none.
func (s *simulation) checkAlive(id string, phase api.Phase) {
	s.t.Helper()
	want := 0
	if phase == api.PhaseRunning {
		want = 1
	}
	if alive := s.aliveTasks(id); len(alive) != want {
		s.t.Errorf("a %s job has tasks %v", phase, alive)
	}
	if frozen := s.stillFrozen(id); len(frozen) != 0 {
		s.t.Errorf("still frozen: %v", frozen)
	}
}

func TestControllerThatDiesAfterTheManifestFindsIt(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	written := make(chan struct{})
	s.repository.put = func() error {
		s.repository.put = nil
		close(written)
		s.c.stop() // the controller never learns that the write succeeded
		return nil
	}
	op := s.begin("/v1/jobs/"+id+"/checkpoints", nil)
	<-written
	s.restart()
	if ended := s.awaitEnd(op.ID); ended.Phase != api.OpDone {
		t.Fatalf("the operation is %s: %s", ended.Phase, ended.Error)
	}
	if job := s.awaitPhase(id, api.PhaseRunning); job.Checkpoints != 1 {
		t.Errorf("want one checkpoint, got %d", job.Checkpoints)
	}
}

func TestLostNodeAtAnyStep(t *testing.T) {
	for _, sc := range scenarios() {
		for _, step := range sc.steps {
			t.Run(sc.name+"/"+step, func(t *testing.T) {
				s := newSimulation(t, "east-0", "west-0")
				id := s.running(api.JobSpec{MaxRestarts: 1})
				sc.prepare(s, id)
				lost := make(chan struct{})
				s.faultOnce(step, func(a *simAgent) fault {
					go func() {
						defer close(lost)
						s.killNode(a.node)
					}()
					<-a.done // until its power is cut
					return fault{disconnect: true}
				})
				op := s.begin(sc.path(s, id), nil)
				<-lost
				s.awaitEnd(op.ID)
				s.eventually("the job has settled", func(tx store.Tx) (bool, error) {
					job, err := getJob(tx, id)
					return err == nil && job.Operation == "" &&
						(job.Phase == api.PhaseRunning || job.Phase == api.PhaseSuspended || job.Phase == api.PhaseCancelled), err
				})
				s.checkAlive(id, s.jobNow(id).Phase)
			})
		}
	}
}

func TestLostNodeFailsAJobAndNamesTheWayBack(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	id := s.running(api.JobSpec{})
	cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	node := s.jobNow(id).TaskStatus[0].Node
	s.want(http.StatusNoContent, "POST", "/v1/nodes/"+node+"/kill", nil, nil)
	job := s.awaitPhase(id, api.PhaseFailed)
	if want := "`dormouse restart " + id + "` restores checkpoint " + cp; !strings.Contains(job.Reason, want) || !strings.Contains(job.Reason, node) {
		t.Errorf("the reason %q does not name the node and %q", job.Reason, want)
	}
	s.do("/v1/jobs/"+id+"/restart", nil)
	if job = s.awaitPhase(id, api.PhaseRunning); job.TaskStatus[0].Node == node {
		t.Error("the job was restored on the lost node")
	}
	s.want(http.StatusNoContent, "POST", "/v1/nodes/"+node+"/start", nil, nil)
	s.eventually("the node is ready again", func(tx store.Tx) (bool, error) {
		n, err := store.Get[nodeRecord](tx, store.Nodes, node)
		return err == nil && n.State == api.NodeReady, err
	})
}

func TestLostNodeRecoversAJobThatMayRestart(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	id := s.running(api.JobSpec{MaxRestarts: 1})
	cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	s.want(http.StatusNoContent, "POST", "/v1/nodes/"+s.jobNow(id).TaskStatus[0].Node+"/kill", nil, nil)
	s.eventually("the job runs again", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && job.Phase == api.PhaseRunning && job.Run == 2, err
	})
	if job := s.awaitPhase(id, api.PhaseRunning); job.From != cp || job.Restarts != 1 {
		t.Errorf("the recovered job: %+v from %q", job.Job, job.From)
	}
	// The second loss is one too many, and there is no node left anyway.
	s.want(http.StatusNoContent, "POST", "/v1/nodes/"+s.jobNow(id).TaskStatus[0].Node+"/kill", nil, nil)
	s.awaitPhase(id, api.PhaseFailed)
}

func TestRecoveringJobWaitsForRoomAndCanBeKilled(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{MaxRestarts: 1})
	s.want(http.StatusNoContent, "POST", "/v1/nodes/east-0/kill", nil, nil)
	s.eventually("the recovery waits for room", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		if err != nil || job.Operation == "" {
			return false, err
		}
		op, err := getOperation(tx, job.Operation)
		return err == nil && strings.HasPrefix(op.Message, "waits for room"), err
	})
	s.want(http.StatusAccepted, "POST", "/v1/jobs/"+id+"/kill", nil, nil)
	s.awaitPhase(id, api.PhaseCancelled)
}

func TestCutOffNodeIsLostAfterItsLeaseAndItsTasksAreDestroyedWhenItReturns(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	id := s.running(api.JobSpec{MaxRestarts: 1})
	s.do("/v1/jobs/"+id+"/checkpoints", nil)
	node := s.jobNow(id).TaskStatus[0].Node
	a := s.agent(node)
	a.cutNetwork(true)
	s.awaitState(api.NodeUnreachable, node)
	a.fence() // its lease has ended before the controller's patience does
	s.eventually("the job runs elsewhere", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && job.Phase == api.PhaseRunning && job.Run == 2 && job.TaskStatus[0].Node != node, err
	})
	a.cutNetwork(false)
	s.eventually("the old task is destroyed", func(tx store.Tx) (bool, error) {
		n, err := store.Get[nodeRecord](tx, store.Nodes, node)
		if err != nil || n.State != api.NodeReady {
			return false, err
		}
		return noCleanups(tx)
	})
	s.checkAlive(id, api.PhaseRunning)
}

func TestShortSilenceChangesNothing(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	a := s.agent("east-0")
	a.cutNetwork(true)
	s.awaitState(api.NodeUnreachable, "east-0")
	a.cutNetwork(false)
	s.awaitState(api.NodeReady, "east-0")
	if job := s.jobNow(id); job.Phase != api.PhaseRunning || job.Run != 1 {
		t.Errorf("the job: %+v", job.Job)
	}
}

// TestAStoreThatStandsStillLosesNoNode, though the Hello of a node that was out
// of reach waits for the store for longer than a lease.
func TestAStoreThatStandsStillLosesNoNode(t *testing.T) {
	s := newSimulation(t, "east-0")
	s.lease = 500 * time.Millisecond
	s.restart()
	s.awaitReady("east-0")
	id := s.running(api.JobSpec{})
	a := s.agent("east-0")
	a.cutNetwork(true)
	s.awaitState(api.NodeUnreachable, "east-0")
	err := s.store.Update(t.Context(), func(store.Tx) error {
		a.cutNetwork(false)
		time.Sleep(4 * s.lease)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s.awaitReady("east-0")
	s.neverLost(id)
}

// TestAControllerThatStoodStillLosesNoNode: nobody listened meanwhile.
func TestAControllerThatStoodStillLosesNoNode(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	s.lease = 500 * time.Millisecond
	s.restart()
	s.awaitReady("east-0", "west-0")
	id := s.running(api.JobSpec{})
	self := strconv.Itoa(os.Getpid())
	if out, err := exec.Command("sh", "-c", "kill -STOP $0 && sleep 2; kill -CONT $0", self).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s.do("/v1/jobs/"+id+"/checkpoints", nil)
	s.awaitReady("east-0", "west-0")
	s.neverLost(id)
}

// neverLost checks that no node was ever lost, and that the job is in its first run.
func (s *simulation) neverLost(id string) {
	s.t.Helper()
	if job := s.awaitPhase(id, api.PhaseRunning); job.Run != 1 {
		s.t.Errorf("the job is in run %d", job.Run)
	}
	if events := s.dump(); strings.Contains(events, "is lost") {
		s.t.Errorf("a node was lost:\n%s", events)
	}
}

func TestNodeThatForgotItsTasksFailsTheirJobs(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	a := s.agent("east-0")
	a.cutPower() // and back before anyone noticed
	a.start()
	if job := s.awaitPhase(id, api.PhaseFailed); !strings.Contains(job.Reason, "node east-0 was restarted") {
		t.Errorf("the reason: %q", job.Reason)
	}
}

func TestFailedStartTellsWhy(t *testing.T) {
	s := newSimulation(t, "east-0")
	s.faultOnce(protocol.StepStart, func(*simAgent) fault {
		return fault{failure: &agentpb.Failure{Message: `there is no program "nosuch" in the root`, Refused: true}}
	})
	id := s.submit(api.JobSpec{Command: []string{"nosuch"}})
	job := s.awaitPhase(id, api.PhaseFailed)
	if job.Reason != `there is no program "nosuch" in the root` {
		t.Errorf("the reason: %q", job.Reason)
	}
	s.eventually("nothing is left", noCleanups)
}

func TestNodeLostAtTheStartPlacesTheJobElsewhere(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	s.faultOnce(protocol.StepStart, func(a *simAgent) fault {
		go s.killNode(a.node)
		<-a.done
		return fault{disconnect: true}
	})
	id := s.submit(api.JobSpec{})
	s.awaitPhase(id, api.PhaseRunning)
	s.checkAlive(id, api.PhaseRunning)
}

func TestTamperedManifestIsRefusedBeforeAnythingIsTouched(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	s.repository.bad[cp] = fmt.Errorf("manifest of checkpoint %s refused: %w", cp, repository.ErrSignature)
	op := s.awaitEnd(s.begin("/v1/jobs/"+id+"/restart", nil).ID)
	if op.Phase != api.OpFailed || !op.Refused || !strings.Contains(op.Error, cp) {
		t.Errorf("the operation: %+v", op.Operation)
	}
	if job := s.awaitPhase(id, api.PhaseRunning); job.Run != 1 {
		t.Errorf("the running job was touched: run %d", job.Run)
	}
}

func TestFailedResumeLeavesTheJobSuspended(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.do("/v1/jobs/"+id+"/suspend", nil)
	s.faultOnce(protocol.StepRestore, func(*simAgent) fault { return fault{failure: &agentpb.Failure{Message: "a chunk is damaged"}} })
	if op := s.awaitEnd(s.begin("/v1/jobs/"+id+"/resume", nil).ID); op.Phase != api.OpFailed || op.Error != "a chunk is damaged" {
		t.Errorf("the operation: %+v", op.Operation)
	}
	s.awaitPhase(id, api.PhaseSuspended)
	s.checkAlive(id, api.PhaseSuspended)
	s.do("/v1/jobs/"+id+"/resume", nil)
	s.awaitPhase(id, api.PhaseRunning)
}

func TestOldCRIUIsRefused(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	cp := s.do("/v1/jobs/"+id+"/suspend", nil).Checkpoint
	s.repository.manifests[cp].Tasks[0].CRIU = "4.3"
	op := s.awaitEnd(s.begin("/v1/jobs/"+id+"/resume", nil).ID)
	if op.Phase != api.OpFailed || !op.Refused || !strings.Contains(op.Error, "has CRIU 4.2.1") {
		t.Errorf("the operation: %+v", op.Operation)
	}
}

func TestOneOperationAtATime(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	release := make(chan struct{})
	reached := s.faultOnce(protocol.StepUpload, func(*simAgent) fault { return fault{act: func() { <-release }} })
	op := s.begin("/v1/jobs/"+id+"/checkpoints", nil)
	<-reached
	for _, action := range []string{"checkpoints", "suspend", "restart"} {
		detail := s.want(http.StatusConflict, "POST", "/v1/jobs/"+id+"/"+action, nil, nil)
		if !strings.Contains(detail, op.ID) {
			t.Errorf("%s: the refusal does not name operation %s: %q", action, op.ID, detail)
		}
	}
	close(release)
	s.awaitEnd(op.ID)
}

func TestJobThatEndsDuringTheUploadKeepsItsCheckpoint(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	release := make(chan struct{})
	reached := s.faultOnce(protocol.StepUpload, func(*simAgent) fault { return fault{act: func() { <-release }} })
	op := s.begin("/v1/jobs/"+id+"/checkpoints", nil)
	<-reached
	s.end(id, 0)
	s.eventually("the job is over at once", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && job.Phase == api.PhaseCompleted, err
	})
	close(release)
	if ended := s.awaitEnd(op.ID); ended.Phase != api.OpDone {
		t.Errorf("the checkpoint is %s: %s", ended.Phase, ended.Error)
	}
	s.eventually("the task is cleaned up", noCleanups)
}

func TestSuspendedJobsOnlyCheckpointCannotBeRemoved(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	cp := s.do("/v1/jobs/"+id+"/suspend", nil).Checkpoint
	s.want(http.StatusConflict, "DELETE", "/v1/checkpoints/"+cp, nil, nil)
	s.do("/v1/jobs/"+id+"/resume", nil)
	s.want(http.StatusNoContent, "DELETE", "/v1/checkpoints/"+cp, nil, nil)
	if job := s.jobNow(id); job.Checkpoints != 0 {
		t.Errorf("want no checkpoint, got %d", job.Checkpoints)
	}
}

func TestStepAfterTheCommitIsTakenAgainUntilItSucceeds(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.faultOnce(protocol.StepDiscard, func(*simAgent) fault { return fault{failure: &agentpb.Failure{Message: "it broke"}} })
	op := s.do("/v1/jobs/"+id+"/checkpoints", nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.agents["east-0"].answers[op.ID+"/1.1/discard/0"] == nil {
		t.Errorf("the step was not repeated as a new command: %v", s.agents["east-0"].seen)
	}
}

func TestPlacementWaitsForNodesThatMayComeBack(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.do("/v1/jobs/"+id+"/suspend", nil)
	a := s.agent("east-0")
	a.cutNetwork(true)
	s.awaitState(api.NodeUnreachable, "east-0")
	// As an operation that was under way when the controller was killed.
	var op *opRecord
	err := s.store.Update(t.Context(), func(tx store.Tx) error {
		job, err := getJob(tx, id)
		if err != nil {
			return err
		}
		op, err = s.c.beginOperation(tx, api.OpResume, job, request{})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	s.eventually("the operation waits for room", func(tx store.Tx) (bool, error) {
		now, err := getOperation(tx, op.ID)
		return err == nil && strings.HasPrefix(now.Message, "waits for room"), err
	})
	a.cutNetwork(false)
	if ended := s.awaitEnd(op.ID); ended.Phase != api.OpDone {
		t.Errorf("the operation is %s: %s", ended.Phase, ended.Error)
	}
}

func TestOnlyOldEndedOperationsAreForgotten(t *testing.T) {
	s := newSimulation(t)
	now := time.Now()
	ended := func(id string, at time.Time) *opRecord {
		return &opRecord{Operation: api.Operation{ID: id, Kind: api.OpVerify, Phase: api.OpDone, Started: at, Finished: &at}}
	}
	err := s.store.Update(t.Context(), func(tx store.Tx) error {
		long := ended("o-old", now.Add(-4*keptFor))
		under := ended("o-running", now.Add(-4*keptFor))
		under.Phase, under.Finished, under.After = api.OpRunning, nil, "o-other" // so that nobody drives it
		err := errors.Join(putOperation(tx, long), putOperation(tx, under), putOperation(tx, ended("o-recent", now.Add(-2*keptFor))))
		for i := range keptOperations - 1 {
			err = errors.Join(err, putOperation(tx, ended(fmt.Sprintf("o-new-%04d", i), now)))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.c.prune(t.Context()); err != nil {
		t.Fatal(err)
	}
	err = s.store.View(t.Context(), func(tx store.Tx) error {
		if _, err := getOperation(tx, "o-old"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("the oldest ended operation is still there (%v)", err)
		}
		_, running := getOperation(tx, "o-running")
		_, recent := getOperation(tx, "o-recent")
		return errors.Join(running, recent)
	})
	if err != nil {
		t.Error(err)
	}
	if n := s.count(store.Operations); n != keptOperations+1 {
		t.Errorf("want %d operations, got %d", keptOperations+1, n)
	}
}
