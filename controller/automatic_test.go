package controller

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
	"dormouse/drivers"
)

func (s *simulation) checkpointsNow(id string) (list []api.Checkpoint) {
	s.t.Helper()
	s.want(http.StatusOK, "GET", "/v1/jobs/"+id+"/checkpoints", nil, &list)
	return list
}

// awaitCheckpoints waits until cond holds for the job's checkpoints.
func (s *simulation) awaitCheckpoints(id, what string, cond func([]api.Checkpoint) bool) {
	s.t.Helper()
	s.eventually(what, func(tx store.Tx) (bool, error) {
		list, err := checkpointsOf(tx, id)
		return cond(list), err
	})
}

func durable(list []api.Checkpoint) (ids []string) {
	for _, cp := range list {
		if cp.State == api.CheckpointDurable {
			ids = append(ids, cp.ID)
		}
	}
	return ids
}

func TestJobIsCheckpointedByItselfAndPruned(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{CheckpointEvery: "1s", Keep: 2})
	s.eventually("three checkpoints were durable", func(tx store.Tx) (bool, error) {
		made := 0
		events, err := store.All[api.Event](tx, store.Events)
		for _, e := range events {
			if e.Type == "checkpoint" && strings.Contains(e.Message, "is durable") {
				made++
			}
		}
		return made >= 3, err
	})
	s.awaitCheckpoints(id, "two are left", func(list []api.Checkpoint) bool { return len(list) == 2 })
	for _, cp := range s.checkpointsNow(id) {
		if cp.Trigger != api.TriggerPeriodic {
			t.Errorf("want the trigger periodic, got %s", cp.Trigger)
		}
	}
}

// ownOnes checks that every job knows its own checkpoints, all and no others.
func (s *simulation) ownOnes() {
	s.t.Helper()
	err := s.store.View(s.t.Context(), func(tx store.Tx) error {
		all, err := store.All[api.Checkpoint](tx, store.Checkpoints)
		if err != nil {
			return err
		}
		want := map[string][]string{}
		for _, cp := range all {
			want[cp.Job] = append(want[cp.Job], cp.ID)
		}
		jobs, err := store.All[jobRecord](tx, store.Jobs)
		for _, job := range jobs {
			if got := slices.Sorted(slices.Values(job.Own)); !slices.Equal(got, slices.Sorted(slices.Values(want[job.ID]))) {
				s.t.Errorf("job %s knows the checkpoints %v, and has %v", job.ID, got, want[job.ID])
			}
		}
		return err
	})
	if err != nil {
		s.t.Error(err)
	}
}

func TestJobsKnowTheirOwnCheckpoints(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	id := s.running(api.JobSpec{Keep: 2})
	for range 4 {
		s.do("/v1/jobs/"+id+"/checkpoints", nil)
	}
	s.ownOnes()
	newest := s.checkpointsNow(id)[1].ID
	clone := s.do("/v1/checkpoints/"+newest+"/clone", map[string]string{"cloud": "west"}).Job
	s.do("/v1/jobs/"+clone+"/suspend", nil)
	s.want(http.StatusNoContent, "DELETE", "/v1/checkpoints/"+s.checkpointsNow(id)[0].ID, nil, nil)
	s.ownOnes()
	// A record from before there were such lists still finds its checkpoints.
	err := s.store.Update(t.Context(), func(tx store.Tx) error {
		job, err := getJob(tx, id)
		if err != nil {
			return err
		}
		job.Own = nil
		return putJob(tx, job)
	})
	if err != nil {
		t.Fatal(err)
	}
	if list := s.checkpointsNow(id); len(list) != 1 || list[0].ID != newest {
		t.Errorf("want %s, got %+v", newest, list)
	}
	s.do("/v1/jobs/"+id+"/checkpoints", nil)
	if list := s.checkpointsNow(id); len(list) != 2 {
		t.Errorf("want two checkpoints, got %+v", list)
	}
}

func TestControllerThatWasAwayCatchesUpWithOneCheckpoint(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{CheckpointEvery: "1h"})
	s.close()
	s.open() // and make believe that it was away for days
	s.setHistory(id, func(h *history) {
		h.Begun = h.Begun.Add(-72 * time.Hour)
		h.Durable = h.Begun.Add(time.Hour)
	})
	first := s.explained(id)
	if wait := time.Until(*first.Next); wait > time.Minute {
		t.Fatalf("want the missed checkpoint within a minute, got in %s", wait)
	}
	s.setHistory(id, func(h *history) { h.Durable = h.Begun.Add(72 * time.Hour) }) // as if it were made
	if wait := time.Until(*s.explained(id).Next); wait < 55*time.Minute {
		t.Errorf("want the next one an hour later, got in %s", wait)
	}
}

// setHistory changes what is remembered of a job.
func (s *simulation) setHistory(id string, change func(*history)) {
	s.t.Helper()
	err := s.store.Update(s.t.Context(), func(tx store.Tx) error {
		job, err := getJob(tx, id)
		if err != nil {
			return err
		}
		change(&job.History)
		return putJob(tx, job)
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *simulation) explained(id string) *api.Automatic {
	s.t.Helper()
	var job api.JobDetail
	s.want(http.StatusOK, "GET", "/v1/jobs/"+id, nil, &job)
	if job.Automatic == nil {
		s.t.Fatalf("job %s has no explanation", id)
	}
	return job.Automatic
}

func TestAutoIsExplainedWithWhatWasMeasured(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1")
	id := s.running(api.JobSpec{CheckpointEvery: "auto", Tasks: 2, CPUs: 3})
	a := s.explained(id)
	if a.Inputs == nil || a.Inputs.Measured != 0 || a.Inputs.Nodes != 2 || !strings.Contains(a.Why, "presumed") || a.Next == nil {
		t.Fatalf("before the first checkpoint: %+v with %+v", a, a.Inputs)
	}
	before := a.Inputs.MTBFMS
	s.do("/v1/jobs/"+id+"/checkpoints", nil)
	if a = s.explained(id); a.Inputs.Measured != 1 || a.Inputs.PauseMS != 12.5 || a.Inputs.CostMS != 12.5 {
		t.Errorf("after a checkpoint with a pause of 12.5 ms: %+v", a.Inputs)
	}
	s.want(http.StatusNoContent, "POST", "/v1/nodes/east-1/kill", nil, nil)
	s.awaitPhase(id, api.PhaseFailed)
	s.want(http.StatusNoContent, "POST", "/v1/nodes/east-1/start", nil, nil)
	s.eventually("the node is ready", func(tx store.Tx) (bool, error) {
		n, err := store.Get[nodeRecord](tx, store.Nodes, "east-1")
		return n.State == api.NodeReady, err
	})
	s.do("/v1/jobs/"+id+"/restart", nil)
	a = s.explained(id)
	if a.Inputs.Losses < 0.99 || a.Inputs.MTBFMS > before/2 || !strings.Contains(a.Why, "1 loss in 0 node days, so this is mostly presumed") {
		t.Errorf("after a loss: %q, %+v, before %g ms", a.Why, a.Inputs, before)
	}
}

func TestCordonedNodeThatGoesIsNoFailure(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for state, want := range map[api.NodeState]float64{api.NodeReady: 1, api.NodeUnreachable: 1, api.NodeCordoned: 0, api.NodeLost: 0, api.NodeJoining: 0} {
		n := nodeRecord{Node: api.Node{State: state}}
		n.note(api.NodeLost, now)
		if n.Tally.Losses != want {
			t.Errorf("from %s to lost: want %g losses, got %g", state, want, n.Tally.Losses)
		}
	}
}

func TestNoticeOfThePlatformMovesJobsOffTheNode(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1")
	id := s.running(api.JobSpec{})
	node := s.jobNow(id).TaskStatus[0].Node
	cloud, _ := s.c.cloud("east")
	events := make(chan drivers.Event, 1)
	events <- drivers.Event{Node: node, Power: drivers.PowerOn, Leaves: time.Now().Add(time.Minute), Reason: "the end of its spot time"}
	close(events)
	s.c.followDriver(cloud, events)
	s.eventually("the job runs on the other node", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && job.Phase == api.PhaseRunning && job.TaskStatus[0].Node != node, err
	})
	list := s.checkpointsNow(id)
	if len(list) != 1 || list[0].Trigger != api.TriggerDrain {
		t.Errorf("want one checkpoint for the drain, got %+v", list)
	}
	if s.c.loseNode(t.Context(), node, "its power is off") != nil {
		t.Fatal("the node cannot be lost")
	}
	s.eventually("its end is no failure", func(tx store.Tx) (bool, error) {
		n, err := store.Get[nodeRecord](tx, store.Nodes, node)
		return n.State == api.NodeLost && n.Tally.Losses == 0, err
	})
}

func TestAutomaticCheckpointsNeverRunBesideAnotherOperation(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{CheckpointEvery: "1s"})
	held, hold := make(chan struct{}), make(chan struct{})
	var once sync.Once
	s.setFault(func(_ *simAgent, c *agentpb.Command) fault {
		if c.GetUpload() == nil {
			return fault{}
		}
		return fault{act: func() { once.Do(func() { close(held); <-hold }) }}
	})
	s.begin("/v1/jobs/"+id+"/checkpoints", nil)
	<-held
	due := s.explained(id).Next
	time.Sleep(time.Until(*due)) // the time itself is what is waited for
	if a := s.explained(id); !strings.Contains(a.Waits, "(checkpoint) of the job is under way") {
		t.Errorf("what it waits for is not said: %q", a.Waits)
	}
	if n := len(s.checkpointsNow(id)); n != 1 {
		t.Errorf("want one checkpoint under way, got %d", n)
	}
	close(hold)
	s.awaitCheckpoints(id, "the due one is made afterwards", func(list []api.Checkpoint) bool { return len(durable(list)) >= 2 })
}

func TestRequestWaitsForAnAutomaticCheckpointRatherThanBeingRefused(t *testing.T) {
	for _, action := range []string{"suspend", "restart", "checkpoints"} {
		s := newSimulation(t, "east-0")
		hold := make(chan struct{})
		held := s.faultOnce(protocol.StepUpload, func(*simAgent) fault { return fault{act: func() { <-hold }} })
		id := s.running(api.JobSpec{CheckpointEvery: "1s"})
		<-held
		answered := make(chan int)
		go func() {
			status, _, err := s.send("POST", "/v1/jobs/"+id+"/"+action, nil)
			if err != nil {
				t.Error(err)
			}
			answered <- status
		}()
		select {
		case status := <-answered:
			t.Errorf("%s is answered with %d while an automatic checkpoint is under way", action, status)
		case <-time.After(100 * time.Millisecond): // it waits, as far as one can see
			close(hold)
			if status := <-answered; status != http.StatusAccepted {
				t.Errorf("%s after an automatic checkpoint: status %d", action, status)
			}
		}
	}
}

func TestCloudMakesNoMoreCheckpointsAtOnceThanAllowed(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0") // unless given, as many as a cloud has nodes: one
	var ids []string
	for range 3 {
		ids = append(ids, s.running(api.JobSpec{CheckpointEvery: "1h", Cloud: "east"}))
	}
	var mu sync.Mutex
	var order []string
	now, most := 0, 0
	s.setFault(func(_ *simAgent, c *agentpb.Command) fault {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case c.GetFreeze() != nil:
			order = append(order, c.GetTask().GetJob())
			now++
			most = max(most, now)
		case c.GetUpload() != nil:
			now--
		}
		return fault{}
	})
	for i, id := range ids { // due in the opposite order of their making
		s.setHistory(id, func(h *history) { h.Begun = h.Begun.Add(-time.Duration(i+2) * time.Hour) })
	}
	// What was due before the controller began to look is spread over a minute.
	s.c.mu.Lock()
	s.c.booted = s.c.booted.Add(-24 * time.Hour)
	s.c.mu.Unlock()
	next, err := s.c.beginDue(t.Context(), s.c.booted)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		s.awaitCheckpoints(id, "every job has a checkpoint", func(list []api.Checkpoint) bool {
			if len(durable(list)) == 0 {
				_, err := s.c.beginDue(t.Context(), s.c.booted)
				return err != nil
			}
			return true
		})
	}
	mu.Lock()
	defer mu.Unlock()
	if most != 1 {
		t.Errorf("want one checkpoint at a time, got %d", most)
	}
	if want := []string{ids[2], ids[1], ids[0]}; !slices.Equal(order, want) {
		t.Errorf("want the longest overdue first, %v, got %v (next %s)", want, order, next)
	}
}

func TestJobIsSuspendedBeforeItsWalltimeEnds(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{WalltimeMS: 10_000})
	var job api.JobDetail
	s.want(http.StatusOK, "GET", "/v1/jobs/"+id, nil, &job)
	if job.WalltimeEnds == nil || time.Until(*job.WalltimeEnds) > 10*time.Second {
		t.Fatalf("the end of the walltime is not shown: %v", job.WalltimeEnds)
	}
	s.setHistory(id, func(h *history) { h.Awake = h.Awake.Add(-8 * time.Second) })
	slept := s.awaitPhase(id, api.PhaseSuspended)
	if !strings.HasPrefix(slept.Reason, "its walltime of 10s is over: sleeps in checkpoint ") {
		t.Errorf("the reason is %q", slept.Reason)
	}
	s.do("/v1/jobs/"+id+"/resume", nil)
	if job := s.awaitPhase(id, api.PhaseRunning); time.Until(job.walltimeEnds()) < 4*time.Second {
		t.Errorf("a resumed job has %s left, want its whole walltime again", time.Until(job.walltimeEnds()))
	}
}

func TestWalltimeStandsStillWhileTheJobGivesWay(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{WalltimeMS: 3600_000, CPUs: 4})
	s.setHistory(id, func(h *history) { h.Awake = h.Awake.Add(-40 * time.Minute) })
	other := s.submit(api.JobSpec{CPUs: 4, Priority: 10})
	s.awaitPhase(other, api.PhaseRunning)
	s.awaitPhase(id, api.PhaseSuspended)
	if end := s.jobNow(id).walltimeEnds(); !end.IsZero() {
		t.Errorf("a job that gave way has an end, %s", end)
	}
	s.end(other, 0)
	job := s.awaitPhase(id, api.PhaseRunning)
	if left := time.Until(job.walltimeEnds()); left > 20*time.Minute || left < 19*time.Minute {
		t.Errorf("want the 20 minutes that were left, got %s", left)
	}
}

func TestFailedAutomaticCheckpointsBackOffAndLeaveFewRecords(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{CheckpointEvery: "1h"})
	s.setFault(func(_ *simAgent, c *agentpb.Command) fault {
		if c.GetPreflight() == nil {
			return fault{}
		}
		return fault{failure: &agentpb.Failure{Message: "process 7 has an io_uring", Refused: true}}
	})
	for n := 1; n <= keptFailures+3; n++ {
		s.setHistory(id, func(h *history) { h.Begun, h.Failed = time.Now().Add(-2*time.Hour), time.Now().Add(-2*time.Hour) })
		watched := time.Now().Add(-24 * time.Hour)
		if _, err := s.c.beginDue(t.Context(), watched); err != nil {
			t.Fatal(err)
		}
		s.eventually("the attempt has failed", func(tx store.Tx) (bool, error) {
			job, err := getJob(tx, id)
			return err == nil && job.Operation == "" && job.History.Failures == n, err
		})
	}
	s.ownOnes()
	if n := len(s.checkpointsNow(id)); n > keptFailures+1 {
		t.Errorf("%d records of failures are left, want at most %d", n, keptFailures+1)
	}
	a := s.explained(id)
	if a.Failures != keptFailures+3 || time.Until(*a.Next) < 55*time.Minute {
		t.Errorf("want the whole interval after %d failures, got %d and %s", keptFailures+3, a.Failures, time.Until(*a.Next))
	}
}

func TestCloneKeepsItsOriginUntilItHasACheckpointOfItsOwn(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	id := s.running(api.JobSpec{Keep: 1})
	origin := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	clone := s.do("/v1/checkpoints/"+origin+"/clone", map[string]string{"cloud": "west"}).Job
	s.do("/v1/jobs/"+id+"/checkpoints", nil)
	if kept := s.repository.ids(); !slices.Contains(kept, origin) {
		t.Fatalf("the clone's origin %s was removed: %v", origin, kept)
	}
	if detail := s.want(http.StatusConflict, "DELETE", "/v1/checkpoints/"+origin, nil, nil); !strings.Contains(detail, clone) {
		t.Errorf("the refusal does not name the clone: %q", detail)
	}
	s.do("/v1/jobs/"+clone+"/checkpoints", nil)
	s.do("/v1/jobs/"+id+"/checkpoints", nil)
	if kept := s.repository.ids(); slices.Contains(kept, origin) {
		t.Errorf("the origin %s is kept though the clone needs it no more: %v", origin, kept)
	}
}

func TestRemovalThatWasBegunIsFinished(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	cp := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	allow := func(store.Tx, api.Checkpoint) error { return nil }
	if err := s.store.Update(t.Context(), func(tx store.Tx) error { return beginRemoval(tx, cp, allow) }); err != nil {
		t.Fatal(err)
	}
	if detail := s.want(http.StatusConflict, "POST", "/v1/checkpoints/"+cp+"/clone", nil, nil); !strings.Contains(detail, "removing") {
		t.Errorf("a checkpoint that is being removed can be used: %q", detail)
	}
	s.restart()
	s.awaitCheckpoints(id, "the record is gone", func(list []api.Checkpoint) bool { return len(list) == 0 })
	if left := s.repository.ids(); len(left) != 0 {
		t.Errorf("manifests are left: %v", left)
	}
	if job := s.jobNow(id); job.Checkpoints != 0 {
		t.Errorf("the job counts %d checkpoints", job.Checkpoints)
	}
}

func TestPoliciesAreCheckedAtSubmit(t *testing.T) {
	s := newSimulation(t, "east-0")
	for body, want := range map[string]string{
		`{"command":["x"],"checkpoint_every":"sometimes"}`:                    "checkpoint_every: ",
		`{"command":["x"],"keep_daily":-1}`:                                   "keep_daily must be 0 or greater, got -1",
		`{"command":["x"],"drill_every":-1}`:                                  "drill_every must be 0 or greater, got -1",
		fmt.Sprintf(`{"command":["x"],"walltime_ms":%d}`, time.Second/1e6):    "walltime_ms must be from 10000 to",
		fmt.Sprintf(`{"command":["x"],"walltime_ms":%d}`, -time.Hour/1e6):     "walltime_ms must be from 10000 to",
		`{"command":["x"],"checkpoint_every":"0 0 31 2 *"}`:                   "never comes",
		`{"command":["x"],"checkpoint_every":"CRON_TZ=Asia/Tokyo 0 * * * *"}`: "UTC",
	} {
		if detail := s.want(http.StatusUnprocessableEntity, "POST", "/v1/jobs", body, nil); !strings.Contains(detail, want) {
			t.Errorf("%s: want %q, got %q", body, want, detail)
		}
	}
}

func TestPeriodicCheckpointGoesOnAfterARestart(t *testing.T) {
	for _, step := range append(captureSteps, protocol.StepDiscard) {
		t.Run(step, func(t *testing.T) {
			s := newSimulation(t, "east-0")
			reached := s.faultOnce(step, func(*simAgent) fault { return fault{disconnect: true} })
			id := s.running(api.JobSpec{CheckpointEvery: "1s", Keep: 1})
			<-reached
			s.restart()
			s.awaitCheckpoints(id, "a checkpoint is durable and no other is left", func(list []api.Checkpoint) bool {
				return len(list) == 1 && list[0].State == api.CheckpointDurable
			})
			s.awaitPhase(id, api.PhaseRunning)
			s.checkAlive(id, api.PhaseRunning)
		})
	}
}

func TestGarbageIsCollectedOnceManifestsAreGone(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{Keep: 1})
	collected := func() int {
		s.repository.mu.Lock()
		defer s.repository.mu.Unlock()
		return s.repository.collected
	}
	for n := range 3 {
		s.do("/v1/jobs/"+id+"/checkpoints", nil)
		for end := time.Now().Add(patience); n > 0 && collected() < n; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d manifests were removed, and the garbage collected %d times", n, collected())
			}
		}
	}
}

// TestACheckpointWaitsForTheStart: a job whose program can be seen to run is not
// refused a checkpoint because its start is still being written down.
func TestACheckpointWaitsForTheStart(t *testing.T) {
	s := newSimulation(t, "east-0")
	reached, release := s.held(protocol.StepStart)
	id := s.submit(api.JobSpec{})
	<-reached
	status := make(chan int, 1)
	go func() {
		got, _, _ := s.send("POST", "/v1/jobs/"+id+"/checkpoints", nil)
		status <- got
	}()
	select {
	case got := <-status:
		t.Fatalf("the checkpoint was answered %d during the start", got)
	case <-time.After(100 * time.Millisecond):
	}
	release()
	if got := <-status; got != http.StatusAccepted {
		t.Errorf("the checkpoint was answered %d after the start, want it accepted", got)
	}
}
