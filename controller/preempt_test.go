package controller

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
)

// Simulated nodes have 4 processors.

func TestHigherPriorityPreemptsAndTheVictimComesBack(t *testing.T) {
	s := newSimulation(t, "east-0")
	low := s.running(api.JobSpec{CPUs: 3})
	high := s.running(api.JobSpec{CPUs: 3, Priority: 1})
	victim := s.jobNow(low)
	if victim.Phase != api.PhaseSuspended || !victim.Queued || !strings.HasPrefix(victim.Reason, "preempted by job "+high) {
		t.Errorf("the victim: %+v", victim.Job)
	}
	if list := s.checkpoints(low); len(list) != 1 || list[0].State != api.CheckpointDurable || list[0].Trigger != api.TriggerPreempt {
		t.Errorf("want one durable checkpoint for the preemption, got %+v", list)
	}
	if alive := s.aliveTasks(low); len(alive) != 0 {
		t.Errorf("the victim still has %v", alive)
	}
	s.end(high, 0)
	back := s.awaitPhase(low, api.PhaseRunning)
	if back.Queued || back.Reason != "" || back.Restarts != 1 || back.Priority != 0 || back.From != s.checkpoints(low)[0].ID {
		t.Errorf("the victim that came back: %+v from %q", back.Job, back.From)
	}
}

func (s *simulation) checkpoints(job string) (list []api.Checkpoint) {
	s.t.Helper()
	s.want(http.StatusOK, "GET", "/v1/jobs/"+job+"/checkpoints", nil, &list)
	return list
}

func TestVictimComesBackElsewhere(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	low := s.running(api.JobSpec{CPUs: 4, Constraints: map[string]string{"cloud": "east"}})
	other := s.running(api.JobSpec{CPUs: 4, Cloud: "west"})
	high := s.submit(api.JobSpec{CPUs: 4, Priority: 1, Constraints: map[string]string{"node": "west-0"}})
	s.awaitPhase(high, api.PhaseRunning)
	s.awaitReason(other, "preempted by job "+high)
	s.end(low, 0)
	if job := s.jobNow(other); job.Phase != api.PhaseSuspended {
		t.Errorf("a job of cloud west is %s with room in east only", job.Phase)
	}
	free := s.running(api.JobSpec{CPUs: 4})
	s.want(http.StatusAccepted, "POST", "/v1/jobs/"+free+"/preempt", nil, nil)
	if job := s.awaitPhase(free, api.PhaseRunning); job.Cloud != "east" {
		t.Errorf("the job that may run anywhere is in %s", job.Cloud)
	}
}

// awaitReason waits until a job's reason begins so.
func (s *simulation) awaitReason(id, reason string) {
	s.t.Helper()
	s.eventually(fmt.Sprintf("job %s: %s", id, reason), func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && strings.HasPrefix(job.Reason, reason), err
	})
}

func TestEqualPriorityWaits(t *testing.T) {
	s := newSimulation(t, "east-0")
	first := s.running(api.JobSpec{CPUs: 3, Priority: 5})
	second := s.submit(api.JobSpec{CPUs: 3, Priority: 5})
	s.awaitReason(second, "waits for room: needs 3 cpus and 512 MiB on one node, and the most that is free is 1 cpu")
	third := s.submit(api.JobSpec{CPUs: 2, Priority: 4})
	s.awaitReason(third, "waits for room: needs 2 cpus and 512 MiB on one node")
	if reason := s.jobNow(third).Reason; !strings.HasSuffix(reason, "job "+second+" of priority 5 is ahead") {
		t.Errorf("the reason of the job behind: %q", reason)
	}
	if job := s.jobNow(first); job.Phase != api.PhaseRunning || job.Operation != "" {
		t.Errorf("the first job: %+v", job.Job)
	}
}

// One processor is of no use to the job ahead, three are.
func TestJobsBehindTakeOnlyWhatIsOfNoUseToTheOneAhead(t *testing.T) {
	s := newSimulation(t, "east-0")
	s.running(api.JobSpec{CPUs: 2, Priority: 5})
	big := s.submit(api.JobSpec{CPUs: 3, Priority: 5})
	s.awaitReason(big, "waits for room")
	s.running(api.JobSpec{CPUs: 1, Priority: 1})
	small := s.submit(api.JobSpec{CPUs: 1, Priority: 1})
	s.awaitReason(small, "waits for room: the room that is free is kept; job "+big)
}

func TestVictimThatCannotBeCheckpointedRunsOnAndAnotherGivesWay(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	small := s.running(api.JobSpec{CPUs: 4, MemBytes: 64 << 20})
	large := s.running(api.JobSpec{CPUs: 4, MemBytes: 1 << 30})
	s.refuseCheckpointsOf(small)
	high := s.running(api.JobSpec{CPUs: 4, Priority: 1})
	kept := s.awaitPhase(small, api.PhaseRunning)
	if kept.Restarts != 0 || len(s.aliveTasks(small)) != 1 || !strings.Contains(kept.Reason, "it has a wire to the moon") {
		t.Errorf("the job that cannot be checkpointed: %+v", kept.Job)
	}
	s.awaitReason(large, "preempted by job "+high)
}

// refuseCheckpointsOf has a job's pre-flight refuse.
func (s *simulation) refuseCheckpointsOf(job string) {
	s.setFault(func(_ *simAgent, c *agentpb.Command) fault {
		if c.GetPreflight() != nil && c.GetTask().GetJob() == job {
			return fault{failure: &agentpb.Failure{Message: "it has a wire to the moon", Refused: true}}
		}
		return fault{}
	})
}

func TestPreemptorWaitsForAStubbornVictimAndAsksAgain(t *testing.T) {
	s := newSimulation(t, "east-0")
	low := s.running(api.JobSpec{CPUs: 4})
	s.refuseCheckpointsOf(low)
	high := s.submit(api.JobSpec{CPUs: 4, Priority: 1})
	s.eventually("the preemptor knows why it waits", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, high)
		return err == nil && strings.Contains(job.Reason, "job "+low+" of priority 0 does not give way: it could not be checkpointed: it has a wire to the moon"), err
	})
	s.eventually("the victim was asked twice", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, low)
		return err == nil && job.Stubborn != nil && job.Stubborn.Failures >= 2, err
	})
	if len(s.aliveTasks(low)) != 1 {
		t.Error("the victim was killed")
	}
	s.setFault(nil)
	s.awaitPhase(high, api.PhaseRunning)
	if job := s.jobNow(low); job.Stubborn != nil || job.Phase != api.PhaseSuspended {
		t.Errorf("the victim in the end: %+v", job)
	}
}

func TestPreemptionSurvivesTheControllerAtEachStep(t *testing.T) {
	for _, step := range []string{
		protocol.StepPreflight, protocol.StepFreeze, protocol.StepCapture, protocol.StepUpload, "cleanup", protocol.StepDestroy,
		protocol.StepNetwork, protocol.StepStart,
	} {
		t.Run(step, func(t *testing.T) {
			s := newSimulation(t, "east-0")
			low := s.running(api.JobSpec{CPUs: 4})
			reached := s.faultOnce(step, func(*simAgent) fault { return fault{disconnect: true} })
			high := s.submit(api.JobSpec{CPUs: 4, Priority: 1})
			<-reached
			s.restart()
			s.awaitPhase(high, api.PhaseRunning)
			s.checkAlive(low, api.PhaseSuspended)
			s.end(high, 0)
			s.awaitPhase(low, api.PhaseRunning)
			s.checkAlive(low, api.PhaseRunning)
		})
	}
}

func TestPreemptByCommandLetsOthersGoFirst(t *testing.T) {
	s := newSimulation(t, "east-0")
	first := s.running(api.JobSpec{CPUs: 4, Priority: 5})
	second := s.submit(api.JobSpec{CPUs: 4})
	s.awaitReason(second, "waits for room")
	var plan api.PreemptPlan
	s.want(http.StatusOK, "GET", "/v1/jobs/"+first+"/preempt", nil, &plan)
	out := plan.Out[0]
	if plan.In != nil || out.Job != first || !slices.Equal(out.Nodes, []string{"east-0"}) || out.Bytes != 512<<20 || out.BytesFrom != "the memory reserved" ||
		out.EstimatedMS != nil || !strings.HasPrefix(out.Comes, "waits for room: ") {
		t.Errorf("the plan: %+v", plan)
	}
	if job := s.jobNow(first); job.Operation != "" || job.Phase != api.PhaseRunning {
		t.Fatalf("planning did something: %+v", job.Job)
	}
	s.do("/v1/jobs/"+first+"/preempt", nil)
	s.awaitPhase(second, api.PhaseRunning)
	s.awaitReason(first, "preempted by command; waits for room: ")
	if job := s.jobNow(second); job.Operation != "" {
		t.Errorf("the patient job makes another give way: %+v", job.Job)
	}
	s.end(second, 0)
	s.awaitPhase(first, api.PhaseRunning)
	s.want(http.StatusOK, "GET", "/v1/jobs/"+first+"/preempt", nil, &plan)
	if out := plan.Out[0]; out.Bytes != 1000 || out.BytesFrom != "the newest checkpoint" || out.EstimatedMS == nil || out.Comes != "back at once, on east-0" {
		t.Errorf("the plan once a checkpoint was made: %+v", out)
	}
}

func TestSuspendKeepsAPreemptedJobAsleep(t *testing.T) {
	s := newSimulation(t, "east-0")
	low := s.running(api.JobSpec{CPUs: 4})
	high := s.running(api.JobSpec{CPUs: 4, Priority: 1})
	s.awaitPhase(low, api.PhaseSuspended)
	s.do("/v1/jobs/"+low+"/suspend", nil)
	s.end(high, 0)
	s.awaitPhase(high, api.PhaseCompleted)
	s.running(api.JobSpec{CPUs: 4, Name: "other"})
	if job := s.jobNow(low); job.Phase != api.PhaseSuspended || job.Queued {
		t.Errorf("the job that was told to sleep: %+v", job.Job)
	}
}

func TestQueuedJobThatCannotBeRestoredIsTriedAgain(t *testing.T) {
	s := newSimulation(t, "east-0")
	low := s.running(api.JobSpec{CPUs: 4})
	high := s.running(api.JobSpec{CPUs: 4, Priority: 1})
	s.awaitPhase(low, api.PhaseSuspended)
	s.setFault(func(_ *simAgent, c *agentpb.Command) fault {
		if c.GetRestore() != nil {
			return fault{failure: &agentpb.Failure{Message: "the moon is in the way"}}
		}
		return fault{}
	})
	s.end(high, 0)
	s.awaitReason(low, "resume failed: the moon is in the way; it is tried again at ")
	s.setFault(nil)
	s.awaitPhase(low, api.PhaseRunning)
}

func TestSwap(t *testing.T) {
	for _, suspended := range []bool{false, true} {
		t.Run(fmt.Sprintf("in is suspended %v", suspended), func(t *testing.T) {
			s := newSimulation(t, "east-0", "west-0")
			in := s.running(api.JobSpec{CPUs: 4, Priority: -1})
			if suspended {
				s.do("/v1/jobs/"+in+"/suspend", nil)
			} else {
				s.do("/v1/jobs/"+in+"/kill", nil)
			}
			out := s.running(api.JobSpec{CPUs: 4, Priority: 5, Cloud: "east"})
			s.running(api.JobSpec{CPUs: 4, Priority: 5, Cloud: "west"})
			ahead := s.submit(api.JobSpec{CPUs: 4, Priority: 3})
			if !suspended {
				in = s.submit(api.JobSpec{CPUs: 4, Priority: -1})
			}
			s.awaitReason(ahead, "waits for room")
			var plan api.PreemptPlan
			s.want(http.StatusOK, "GET", "/v1/jobs/"+out+"/swap?in="+in, nil, &plan)
			if plan.Out[0].Job != out || plan.In == nil || !slices.Equal(plan.In.Nodes, []string{"east-0"}) || (plan.In.From != "") != suspended ||
				!strings.HasPrefix(plan.Out[0].Comes, "waits for room") {
				t.Errorf("the plan: %+v, %+v", plan, plan.In)
			}
			s.do("/v1/jobs/"+out+"/swap", map[string]string{"in": in})
			job := s.awaitPhase(in, api.PhaseRunning)
			if job.TaskStatus[0].Node != "east-0" || (job.Restarts == 1) != suspended {
				t.Errorf("the job that was put there: %+v on %s", job.Job, job.TaskStatus[0].Node)
			}
			s.awaitReason(out, "swapped for job "+in+"; waits for room")
			if job := s.jobNow(ahead); job.Phase != api.PhasePending {
				t.Errorf("the job that waited before is %s", job.Phase)
			}
			// Job ahead outranks what was put there, and waited before the one that went.
			s.awaitReason(in, "preempted by job "+ahead)
		})
	}
}

func TestSwapThatFailsChangesNothing(t *testing.T) {
	s := newSimulation(t, "east-0")
	out := s.running(api.JobSpec{CPUs: 4})
	in := s.submit(api.JobSpec{CPUs: 4})
	s.awaitReason(in, "waits for room")
	s.refuseCheckpointsOf(out)
	op := s.awaitEnd(s.begin("/v1/jobs/"+out+"/swap", map[string]string{"in": in}).ID)
	if op.Phase != api.OpFailed || !op.Refused || !strings.Contains(op.Error, "did not give way: it has a wire to the moon") {
		t.Errorf("the swap: %s %q", op.Phase, op.Error)
	}
	s.awaitPhase(out, api.PhaseRunning)
	s.awaitPhase(in, api.PhasePending)
	s.setFault(nil)
	s.end(out, 0)
	s.awaitPhase(in, api.PhaseRunning)
}

func TestSwapWhoseNewcomerCannotBeStartedBringsTheOtherBack(t *testing.T) {
	s := newSimulation(t, "east-0")
	out := s.running(api.JobSpec{CPUs: 4})
	in := s.submit(api.JobSpec{CPUs: 4, Cloud: "east"})
	s.awaitReason(in, "waits for room")
	s.setFault(func(_ *simAgent, c *agentpb.Command) fault {
		if c.GetStart() != nil {
			return fault{failure: &agentpb.Failure{Message: "no such program"}}
		}
		return fault{}
	})
	op := s.awaitEnd(s.begin("/v1/jobs/"+out+"/swap", map[string]string{"in": in}).ID)
	if op.Phase != api.OpFailed || op.Error != "no such program" {
		t.Errorf("the swap: %s %q", op.Phase, op.Error)
	}
	s.awaitPhase(in, api.PhaseFailed) // by its own start, next
	s.awaitPhase(out, api.PhaseRunning)
}

func TestSwapSurvivesTheControllerAtEachStep(t *testing.T) {
	for _, step := range []string{protocol.StepPreflight, protocol.StepUpload, "cleanup", protocol.StepNetwork, protocol.StepRestore} {
		t.Run(step, func(t *testing.T) {
			s := newSimulation(t, "east-0")
			out := s.running(api.JobSpec{CPUs: 4})
			in := s.submit(api.JobSpec{CPUs: 4})
			s.awaitReason(in, "waits for room")
			reached := s.faultOnce(step, func(*simAgent) fault { return fault{disconnect: true} })
			op := s.begin("/v1/jobs/"+out+"/swap", map[string]string{"in": in})
			<-reached
			s.restart()
			if ended := s.awaitEnd(op.ID); ended.Phase != api.OpDone {
				t.Fatalf("the swap is %s: %s", ended.Phase, ended.Error)
			}
			s.awaitPhase(in, api.PhaseRunning)
			s.checkAlive(in, api.PhaseRunning)
			s.checkAlive(out, api.PhaseSuspended)
			s.end(in, 0)
			s.awaitPhase(out, api.PhaseRunning)
		})
	}
}

func TestSwapsThatMakeNoSenseAreRefused(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	out := s.running(api.JobSpec{CPUs: 1, Cloud: "east"})
	west := s.submit(api.JobSpec{CPUs: 1, Cloud: "west", Constraints: map[string]string{"disk": "tape"}})
	s.awaitReason(west, "waits for room: no node of cloud west with label disk=tape is ready")
	for _, c := range []struct{ out, in, want string }{
		{out, out, "cannot be swapped for itself"},
		{west, out, "only a job that is running can be swapped out"},
		{out, west, "does not fit where job " + out},
		{out, s.running(api.JobSpec{CPUs: 1}), "only a job that is pending, provisioning or suspended can be swapped in"},
	} {
		if detail := s.want(http.StatusConflict, "POST", "/v1/jobs/"+c.out+"/swap", map[string]string{"in": c.in}, nil); !strings.Contains(detail, c.want) {
			t.Errorf("want %q, got %q", c.want, detail)
		}
		s.want(http.StatusConflict, "GET", "/v1/jobs/"+c.out+"/swap?in="+c.in, nil, nil)
	}
	s.want(http.StatusNotFound, "POST", "/v1/jobs/"+out+"/swap", map[string]string{"in": "nobody"}, nil)
	s.want(http.StatusConflict, "POST", "/v1/jobs/"+west+"/preempt", nil, nil)
}

func TestDrainMovesEverythingOffANode(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1")
	one := s.running(api.JobSpec{CPUs: 2, Constraints: map[string]string{"cloud": "east"}})
	two := s.running(api.JobSpec{CPUs: 2, Tasks: 2})
	stays := s.running(api.JobSpec{CPUs: 1, Constraints: map[string]string{"node": "east-1"}})
	_ = stays
	s.want(http.StatusNoContent, "POST", "/v1/nodes/east-1/labels", map[string]string{"disk": "ssd"}, nil)
	op := s.do("/v1/nodes/east-0/drain", nil)
	var moved []api.DrainResult
	if err := json.Unmarshal(op.Result, &moved); err != nil || len(moved) == 0 {
		t.Fatalf("the result %s: %v", op.Result, err)
	}
	for _, m := range moved {
		if m.Phase == api.PhaseRunning && !slices.Equal(slices.Compact(m.Nodes), []string{"east-1"}) || m.Phase == api.PhaseSuspended && !strings.Contains(m.Reason, "moved off node east-0; waits for room") {
			t.Errorf("moved: %+v", m)
		}
	}
	for _, id := range []string{one, two} {
		for _, ref := range s.aliveTasks(id) {
			if ref.Node == "east-0" {
				t.Errorf("%+v is still there", ref)
			}
		}
	}
	if state := s.nodeNow("east-0"); state.State != api.NodeCordoned {
		t.Errorf("the node is %s", state.State)
	}
	s.want(http.StatusNoContent, "POST", "/v1/nodes/east-0/uncordon", nil, nil)
	s.awaitPhase(one, api.PhaseRunning)
	s.awaitPhase(two, api.PhaseRunning)
	if detail := s.want(http.StatusConflict, "POST", "/v1/nodes/east-0/uncordon", nil, nil); !strings.Contains(detail, "node east-0 is not cordoned: it is ready") {
		t.Errorf("uncordoned twice: %q", detail)
	}
}

func (s *simulation) nodeNow(id string) nodeRecord {
	s.t.Helper()
	var n nodeRecord
	if err := s.store.View(s.t.Context(), func(tx store.Tx) (err error) {
		n, err = store.Get[nodeRecord](tx, store.Nodes, id)
		return err
	}); err != nil {
		s.t.Fatal(err)
	}
	return n
}

func TestCordonOutlivesTheControllerAndThePower(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1")
	s.do("/v1/nodes/east-0/drain", nil)
	cordoned := func(tx store.Tx) (bool, error) {
		n, err := store.Get[nodeRecord](tx, store.Nodes, "east-0")
		return err == nil && n.State == api.NodeCordoned, err
	}
	s.restart()
	s.eventually("the node is heard of again", cordoned)
	s.killNode("east-0")
	s.want(http.StatusNoContent, "POST", "/v1/nodes/east-0/start", nil, nil)
	s.eventually("the node is back", cordoned)
	if job := s.awaitPhase(s.running(api.JobSpec{}), api.PhaseRunning); job.TaskStatus[0].Node != "east-1" {
		t.Errorf("a job was put on the cordoned node")
	}
}

func TestDrainThatCannotMoveAJobSaysSoAndLeavesItRunning(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1")
	one := s.running(api.JobSpec{Constraints: map[string]string{"node": "east-0"}})
	s.refuseCheckpointsOf(one)
	op := s.awaitEnd(s.begin("/v1/nodes/east-0/drain", nil).ID)
	want := "node east-0 is cordoned, but not empty: job " + one + ": it could not be checkpointed: it has a wire to the moon"
	if op.Phase != api.OpFailed || !op.Refused || op.Error != want {
		t.Errorf("want %q, got %s %q", want, op.Phase, op.Error)
	}
	s.checkAlive(one, api.PhaseRunning)
}

func TestUncordonEndsADrain(t *testing.T) {
	s := newSimulation(t, "east-0")
	reached := s.faultOnce(protocol.StepStart, func(*simAgent) fault { return fault{act: func() { time.Sleep(300 * time.Millisecond) }} })
	id := s.submit(api.JobSpec{})
	<-reached
	op := s.begin("/v1/nodes/east-0/drain", nil) // waits for the start
	if again := s.begin("/v1/nodes/east-0/drain", nil); again.ID != op.ID {
		t.Errorf("a second drain of the same node was begun")
	}
	s.want(http.StatusNoContent, "POST", "/v1/nodes/east-0/uncordon", nil, nil)
	if ended := s.awaitEnd(op.ID); ended.Phase != api.OpCancelled {
		t.Errorf("the drain is %s: %s", ended.Phase, ended.Error)
	}
	s.awaitPhase(id, api.PhaseRunning)
}

func TestDrainSurvivesTheControllerAtEachStep(t *testing.T) {
	for _, step := range []string{protocol.StepPreflight, protocol.StepUpload, "cleanup", protocol.StepRestore} {
		t.Run(step, func(t *testing.T) {
			s := newSimulation(t, "east-0", "east-1")
			id := s.running(api.JobSpec{})
			node := s.jobNow(id).TaskStatus[0].Node
			reached := s.faultOnce(step, func(*simAgent) fault { return fault{disconnect: true} })
			op := s.begin("/v1/nodes/"+node+"/drain", nil)
			<-reached
			s.restart()
			if ended := s.awaitEnd(op.ID); ended.Phase != api.OpDone {
				t.Fatalf("the drain is %s: %s", ended.Phase, ended.Error)
			}
			if job := s.awaitPhase(id, api.PhaseRunning); job.TaskStatus[0].Node == node {
				t.Error("the job is still there")
			}
			s.checkAlive(id, api.PhaseRunning)
		})
	}
}

// A recovery is in the same queue: it makes lower priorities give way, and waits
// behind higher ones.
func TestRecoveryPreempts(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1")
	high := s.running(api.JobSpec{CPUs: 4, Priority: 5, MaxRestarts: 1, Constraints: map[string]string{"cloud": "east"}})
	s.do("/v1/jobs/"+high+"/checkpoints", nil)
	low := s.running(api.JobSpec{CPUs: 4})
	s.killNode(s.jobNow(high).TaskStatus[0].Node)
	s.awaitPhase(high, api.PhaseRunning)
	s.awaitReason(low, "preempted by job "+high)
}

func TestBadConstraintsAreRefused(t *testing.T) {
	s := newSimulation(t)
	for _, c := range []struct {
		spec api.JobSpec
		want string
	}{
		{api.JobSpec{Command: []string{"x"}, Placement: "anywhere"}, "placement must be spread or pack"},
		{api.JobSpec{Command: []string{"x"}, Constraints: map[string]string{"disk": ""}}, "the constraint disk needs a value"},
		{api.JobSpec{Command: []string{"x"}, Constraints: map[string]string{"a b": "c"}}, "a label and its value are"},
	} {
		if detail := s.want(http.StatusUnprocessableEntity, "POST", "/v1/jobs", c.spec, nil); !strings.Contains(detail, c.want) {
			t.Errorf("want %q, got %q", c.want, detail)
		}
	}
	s.want(http.StatusNotFound, "POST", "/v1/nodes/nowhere/drain", nil, nil)
	s.want(http.StatusNotFound, "POST", "/v1/nodes/nowhere/uncordon", nil, nil)
}
