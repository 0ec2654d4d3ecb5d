package controller

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
	"dormouse/drivers"
)

var onTrial = map[string]bool{"restore": true}

// checkpointNow is a checkpoint as it is shown.
func (s *simulation) checkpointNow(id string) (cp api.Checkpoint) {
	s.t.Helper()
	s.want(http.StatusOK, "GET", "/v1/checkpoints/"+id, nil, &cp)
	return cp
}

// nothingOfTrials checks that no trace of a trial is left but its result.
func (s *simulation) nothingOfTrials() {
	s.t.Helper()
	s.eventually("the trial has ended", func(tx store.Tx) (bool, error) {
		ops, err := store.All[opRecord](tx, store.Operations)
		return !slices.ContainsFunc(ops, func(op opRecord) bool { return op.Phase == api.OpRunning }), err
	})
	s.eventually("it is gone from its nodes", noCleanups)
	err := s.store.View(s.t.Context(), func(tx store.Tx) error {
		jobs, err := store.All[jobRecord](tx, store.Jobs)
		for _, job := range jobs {
			if job.Drill {
				s.t.Errorf("the trial's job %s is left", job.ID)
			}
		}
		checkpoints, _ := store.All[api.Checkpoint](tx, store.Checkpoints)
		for _, cp := range checkpoints {
			if len(cp.Clones) != 0 {
				s.t.Errorf("checkpoint %s remembers the trial: %v", cp.ID, cp.Clones)
			}
		}
		return err
	})
	if err != nil {
		s.t.Error(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for node, a := range s.agents {
		for ref := range a.tasks {
			if strings.HasPrefix(ref.Job, "d-") {
				s.t.Errorf("node %s still has task %v of a trial", node, ref)
			}
		}
	}
}

func TestDrillRestoresBesideTheRunningJobAndLeavesOnlyItsResult(t *testing.T) {
	for _, tasks := range []int{1, 2} {
		s := newSimulation(t, "east-0", "east-1")
		s.renew("east-1", true)
		id := s.running(api.JobSpec{Tasks: tasks, Publish: []api.Publish{{Port: 8080}}})
		cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
		before := s.jobNow(id)
		plans := 0
		s.setFault(func(_ *simAgent, c *agentpb.Command) fault {
			plan := c.GetPrepareNetwork().GetPlan()
			if plan == nil {
				plan = c.GetRestore().GetNetwork()
			}
			if plan != nil {
				plans++
			}
			if plan != nil && (!plan.GetIsolated() || len(plan.GetPublish()) != 0) {
				t.Errorf("the trial's network is not isolated: %v", plan)
			}
			if c.GetTask().GetJob() == id {
				t.Errorf("the running job was sent %v", c)
			}
			return fault{}
		})
		op := s.do("/v1/checkpoints/"+cp+"/verify", onTrial)
		if op.Kind != api.OpDrill || op.Job != id || !strings.Contains(string(op.Result), `"ok":true`) {
			t.Errorf("the operation: %+v, %s", op.Operation, op.Result)
		}
		if plans == 0 {
			t.Error("nobody was told of the trial's network")
		}
		drill := s.checkpointNow(cp).Drill
		if drill == nil || !drill.OK || drill.RestoreMS <= 0 || len(drill.Nodes) != tasks || drill.Time.IsZero() {
			t.Fatalf("the checkpoint is stamped %+v", drill)
		}
		after := s.jobNow(id)
		if after.Run != before.Run || after.Restarts != before.Restarts || len(s.aliveTasks(id)) != tasks {
			t.Errorf("the running job was touched: run %d, %d restarts", after.Run, after.Restarts)
		}
		var jobs []api.Job
		s.want(http.StatusOK, "GET", "/v1/jobs?all=true", nil, &jobs)
		if len(jobs) != 1 {
			t.Errorf("want one job in the list, got %+v", jobs)
		}
		s.nothingOfTrials()
	}
}

func TestTrialIsInNoListWhileItLasts(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{Keep: 1})
	cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	hold := make(chan struct{})
	reached := s.faultOnce(protocol.StepRestore, func(*simAgent) fault { return fault{act: func() { <-hold }} })
	op := s.begin("/v1/checkpoints/"+cp+"/verify", onTrial)
	<-reached
	var jobs []api.Job
	s.want(http.StatusOK, "GET", "/v1/jobs?all=true", nil, &jobs)
	if len(jobs) != 1 || jobs[0].ID != id {
		t.Errorf("want the running job alone in the list, got %+v", jobs)
	}
	if detail := s.want(http.StatusConflict, "DELETE", "/v1/checkpoints/"+cp, nil, nil); !strings.Contains(detail, "on trial") {
		t.Errorf("a checkpoint can be removed under its trial: %q", detail)
	}
	s.do("/v1/jobs/"+id+"/checkpoints", nil) // retention would remove the first
	close(hold)
	if ended := s.awaitEnd(op.ID); ended.Phase != api.OpDone {
		t.Errorf("the trial is %s: %s", ended.Phase, ended.Error)
	}
	s.nothingOfTrials()
}

func TestDrillTellsWhatKeepsACheckpointFromBeingRestored(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1")
	id := s.running(api.JobSpec{})
	cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	s.faultOnce(protocol.StepRestore, func(*simAgent) fault {
		return fault{failure: &agentpb.Failure{Message: "a file has the wrong size"}}
	})
	op := s.awaitEnd(s.begin("/v1/checkpoints/"+cp+"/verify", onTrial).ID)
	if op.Phase != api.OpFailed || op.Error != "a file has the wrong size" {
		t.Errorf("the operation: %+v", op.Operation)
	}
	if drill := s.checkpointNow(cp).Drill; drill == nil || drill.OK || drill.Error != op.Error {
		t.Errorf("the checkpoint is stamped %+v", drill)
	}
	s.nothingOfTrials()
}

func TestDrillOfATaskThatCrashesAtOnceFails(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	s.c.parts.Watch = patience
	op := s.begin("/v1/checkpoints/"+cp+"/verify", onTrial)
	s.eventually("the trial is watched", func(tx store.Tx) (bool, error) {
		now, err := getOperation(tx, op.ID)
		return err == nil && now.Step == protocol.StepWatch, err
	})
	trial := ""
	s.mu.Lock()
	for ref := range s.agents["east-0"].tasks {
		if strings.HasPrefix(ref.Job, "d-") {
			trial = ref.Job
		}
	}
	s.mu.Unlock()
	s.end(trial, 139)
	ended := s.awaitEnd(op.ID)
	if want := "the program exited with status 139 right after it was restored"; ended.Error != want {
		t.Errorf("want %q, got %q", want, ended.Error)
	}
	if drill := s.checkpointNow(cp).Drill; drill == nil || drill.OK {
		t.Errorf("the checkpoint is stamped %+v", drill)
	}
	s.awaitPhase(id, api.PhaseRunning)
	s.nothingOfTrials()
}

func TestDrillWouldNotWriteToSharedVolumes(t *testing.T) {
	s := newSimulation(t, "east-0")
	for _, readOnly := range []bool{false, true} {
		id := s.running(api.JobSpec{Volumes: []api.Volume{{Source: "/srv", Destination: "/data", ReadOnly: readOnly}}})
		cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
		if readOnly {
			s.do("/v1/checkpoints/"+cp+"/verify", onTrial)
			continue
		}
		if detail := s.want(http.StatusConflict, "POST", "/v1/checkpoints/"+cp+"/verify", onTrial, nil); !strings.Contains(detail, "shares /srv") {
			t.Errorf("the refusal does not name the volume: %q", detail)
		}
	}
	s.nothingOfTrials()
}

func TestDrillWithoutRoomIsRefusedAndNotHeldAgainstTheCheckpoint(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{CPUs: 3})
	cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	s.want(http.StatusConflict, "POST", "/v1/checkpoints/"+cp+"/verify", onTrial, nil)
	if drill := s.checkpointNow(cp).Drill; drill != nil {
		t.Errorf("the checkpoint is stamped %+v", drill)
	}
	s.nothingOfTrials()
}

// drillSteps are the steps of a trial that a node takes part in.
var drillSteps = []string{protocol.StepNetwork, protocol.StepRestore, protocol.StepOpen, protocol.StepRelease, "cleanup"}

func TestRestartedControllerFinishesADrill(t *testing.T) {
	for _, step := range drillSteps {
		t.Run(step, func(t *testing.T) {
			s := newSimulation(t, "east-0", "east-1")
			id := s.running(api.JobSpec{Tasks: 2})
			cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
			reached := s.faultOnce(step, func(*simAgent) fault { return fault{disconnect: true} })
			op := s.begin("/v1/checkpoints/"+cp+"/verify", onTrial)
			<-reached
			s.restart()
			if ended := s.awaitEnd(op.ID); ended.Phase != api.OpDone {
				t.Fatalf("the trial is %s: %s", ended.Phase, ended.Error)
			}
			if drill := s.checkpointNow(cp).Drill; drill == nil || !drill.OK {
				t.Errorf("the checkpoint is stamped %+v", drill)
			}
			s.nothingOfTrials()
			s.awaitPhase(id, api.PhaseRunning)
		})
	}
}

func TestDrillOnANodeThatIsLostIsMadeElsewhere(t *testing.T) {
	for _, step := range []string{protocol.StepNetwork, protocol.StepRestore, "cleanup"} {
		t.Run(step, func(t *testing.T) {
			s := newSimulation(t, "east-0", "west-0")
			id := s.running(api.JobSpec{})
			cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
			lost := make(chan struct{})
			s.faultOnce(step, func(a *simAgent) fault { // on the other node, which has more room
				go func() {
					defer close(lost)
					s.killNode(a.node)
				}()
				<-a.done
				return fault{disconnect: true}
			})
			op := s.begin("/v1/checkpoints/"+cp+"/verify", onTrial)
			<-lost
			if ended := s.awaitEnd(op.ID); ended.Phase != api.OpDone {
				t.Fatalf("the trial is %s: %s", ended.Phase, ended.Error)
			}
			s.awaitPhase(id, api.PhaseRunning)
		})
	}
}

func TestEverySecondCheckpointIsTried(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{DrillEvery: 2})
	var made []string
	for range 4 {
		cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
		made = append(made, cp)
		if len(made)%2 == 0 {
			s.eventually("the checkpoint was tried", func(tx store.Tx) (bool, error) {
				record, err := store.Get[api.Checkpoint](tx, store.Checkpoints, cp)
				return err == nil && record.Drill != nil && record.Drill.OK, err
			})
		}
	}
	var tried []string
	for _, cp := range s.checkpointsNow(id) {
		if cp.Drill != nil {
			tried = append(tried, cp.ID)
		}
	}
	if want := []string{made[1], made[3]}; !slices.Equal(tried, want) {
		t.Errorf("want %v tried, got %v", want, tried)
	}
	s.nothingOfTrials()
}

func TestDrillThatAPolicyAsksForWaitsForTheNextCheckpointWithoutRoom(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{CPUs: 3, DrillEvery: 1})
	s.do("/v1/jobs/"+id+"/checkpoints", nil)
	s.eventually("the history says why there is none", func(tx store.Tx) (bool, error) {
		events, err := store.All[api.Event](tx, store.Events)
		return slices.ContainsFunc(events, func(e api.Event) bool {
			return e.Type == "drill" && e.Job == id && strings.HasPrefix(e.Message, "no restore on trial: ")
		}), err
	})
	if n := s.jobNow(id).History.Undrilled; n != 0 {
		t.Errorf("want it tried again after the next checkpoint, got %d since the last", n)
	}
	s.nothingOfTrials()
}

func TestEndOfUpForgetsTheTrialAndIsNoFailureOfItsNodes(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	hold := make(chan struct{})
	defer close(hold)
	reached := s.faultOnce(protocol.StepRestore, func(*simAgent) fault { return fault{act: func() { <-hold }} })
	s.begin("/v1/checkpoints/"+cp+"/verify", onTrial)
	<-reached
	s.c.Stop()
	if err := s.c.powerWasCut(t.Context(), []drivers.Node{{Name: "east-0", Power: drivers.PowerOff}}); err != nil {
		t.Fatal(err)
	}
	err := s.store.View(t.Context(), func(tx store.Tx) error {
		jobs, err := store.All[jobRecord](tx, store.Jobs)
		if err != nil {
			return err
		}
		if len(jobs) != 1 || jobs[0].ID != id || jobs[0].Phase != api.PhaseFailed {
			t.Errorf("want the job alone, and failed, got %+v", jobs)
		}
		node, err := store.Get[nodeRecord](tx, store.Nodes, "east-0")
		if node.State != api.NodeLost || node.Tally.Losses != 0 {
			t.Errorf("want the node lost without a failure, got %s with %g", node.State, node.Tally.Losses)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestDrillThatIsCalledOffSaysNothingOfTheCheckpoint(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	hold := make(chan struct{})
	reached := s.faultOnce(protocol.StepRestore, func(*simAgent) fault { return fault{act: func() { <-hold }} })
	op := s.begin("/v1/checkpoints/"+cp+"/verify", onTrial)
	<-reached
	s.want(http.StatusAccepted, "POST", "/v1/operations/"+op.ID+"/cancel", nil, nil)
	close(hold)
	if ended := s.awaitEnd(op.ID); ended.Phase != api.OpCancelled {
		t.Errorf("the trial is %s: %s", ended.Phase, ended.Error)
	}
	if drill := s.checkpointNow(cp).Drill; drill != nil {
		t.Errorf("the checkpoint is stamped %+v", drill)
	}
	s.nothingOfTrials()
}
