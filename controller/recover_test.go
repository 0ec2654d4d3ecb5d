package controller

import (
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
	"dormouse/repository"
)

// awaitRun waits until the job runs in the given run.
func (s *simulation) awaitRun(id string, run int64) *jobRecord {
	s.t.Helper()
	s.eventually(fmt.Sprintf("job %s is in run %d", id, run), func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && job.Phase == api.PhaseRunning && job.Run == run && job.Operation == "", err
	})
	return s.jobNow(id)
}

// awaitStep waits until the job's operation is at a step.
func (s *simulation) awaitStep(id, step string) {
	s.t.Helper()
	s.eventually("job "+id+" is at step "+step, func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		if err != nil || job.Operation == "" {
			return false, err
		}
		op, err := getOperation(tx, job.Operation)
		return err == nil && op.Step == step, err
	})
}

func (s *simulation) eventsOf(id, kind string) (found []api.Event) {
	s.t.Helper()
	err := s.store.View(s.t.Context(), func(tx store.Tx) error {
		all, err := store.All[api.Event](tx, store.Events)
		for _, e := range all {
			if e.Job == id && e.Type == kind {
				found = append(found, e)
			}
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return found
}

func TestAProgramThatFailsGoesOnFromItsNewestCheckpoint(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{MaxRestarts: 1})
	s.do("/v1/jobs/"+id+"/checkpoints", nil)
	newest := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	s.end(id, 3)
	job := s.awaitRun(id, 2)
	if job.From != newest || job.Restarts != 1 || job.ExitCode != nil {
		t.Errorf("the recovered job: %+v from %q", job.Job, job.From)
	}
	if len(job.Incidents) != 1 {
		t.Fatalf("want one incident, got %+v", job.Incidents)
	}
	incident := job.Incidents[0]
	if incident.Cause != "program" || incident.Reason != "the program exited with status 3" || incident.Node != "east-0" || incident.From != newest ||
		incident.Failures != 1 || incident.Running == nil || *incident.DownMS < 20 || *incident.DownMS != inMilliseconds(incident.Running.Sub(incident.Lost)) {
		t.Errorf("the incident: %+v", incident)
	}
	begun, over := s.eventsOf(id, "recovering"), s.eventsOf(id, "incident")
	if len(begun) != 1 || !strings.HasPrefix(begun[0].Message, "the program exited with status 3; program failure after 0s: starts again from checkpoint "+newest+" in 20ms, restart 1 of 1") {
		t.Errorf("the event that a recovery began: %+v", begun)
	}
	if len(over) != 1 || !strings.HasPrefix(over[0].Message, "runs again from checkpoint "+newest) {
		t.Errorf("the event that it is over: %+v", over)
	}
	s.end(id, 4)
	job = s.awaitPhase(id, api.PhaseFailed)
	if !strings.Contains(job.Reason, "status 4; it failed 2 times without holding") || !strings.Contains(job.Reason, "dormouse restart") || *job.ExitCode != 4 {
		t.Errorf("the reason after its only restart: %q", job.Reason)
	}
	if n := len(job.Incidents); n != 2 || job.Incidents[1].Running != nil {
		t.Errorf("the incidents: %+v", job.Incidents)
	}
}

func TestALostNodeIsAnIncidentSinceItWasHeardOfLast(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	id := s.running(api.JobSpec{MaxRestarts: 1})
	a := s.agent(s.jobNow(id).TaskStatus[0].Node)
	a.cutNetwork(true)
	s.awaitState(api.NodeUnreachable, a.node)
	a.fence()
	job := s.awaitRun(id, 2)
	if silent := job.Incidents[0].Detected.Sub(job.Incidents[0].Lost); silent < s.lease*9/10 || job.Incidents[0].Cause != "node" {
		t.Errorf("a node that was silent for a lease of %s is said to be lost for %s when noticed", s.lease, silent)
	}
}

func TestADamagedCheckpointIsLeftForAnOlderOne(t *testing.T) {
	for name, spoil := range map[string]func(s *simulation, newest string){
		"its manifest": func(s *simulation, newest string) {
			s.repository.mu.Lock()
			defer s.repository.mu.Unlock()
			s.repository.bad[newest] = fmt.Errorf("checkpoint %s: %w", newest, repository.ErrSignature)
		},
		"what is in it": func(s *simulation, newest string) {
			s.setFault(func(_ *simAgent, c *agentpb.Command) fault {
				if c.GetRestore().GetCheckpoint() == newest {
					return fault{failure: &agentpb.Failure{Message: "a chunk is damaged", Refused: true}}
				}
				return fault{}
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSimulation(t, "east-0", "west-0")
			id := s.running(api.JobSpec{MaxRestarts: 3})
			older := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
			spoil(s, s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint)
			s.killNode(s.jobNow(id).TaskStatus[0].Node)
			s.eventually("the job runs again", func(tx store.Tx) (bool, error) {
				job, err := getJob(tx, id)
				return err == nil && job.Phase == api.PhaseRunning && job.Operation == "" && job.Restarts == 1, err
			})
			job := s.jobNow(id)
			if job.From != older || len(job.Incidents) != 1 || job.Incidents[0].Failures != 2 {
				t.Errorf("restored from %q, want %q; incidents %+v", job.From, older, job.Incidents)
			}
		})
	}
}

// A repository that does not answer says nothing of the checkpoint.
func TestARecoveryWaitsForTheRepository(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	id := s.running(api.JobSpec{MaxRestarts: 20})
	newest := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	away := func(err error) {
		s.repository.mu.Lock()
		defer s.repository.mu.Unlock()
		s.repository.bad[newest] = err
	}
	away(fmt.Errorf("the bucket does not answer"))
	s.killNode(s.jobNow(id).TaskStatus[0].Node)
	s.eventually("it was tried several times", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && len(job.Runs) > 4, err
	})
	away(nil)
	s.eventually("the job runs again", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && job.Phase == api.PhaseRunning && job.Operation == "" && job.From == newest, err
	})
}

// A checkpoint that fails soon after each restore is left, and when all do, and
// the start from nothing too, the job is left alone.
func TestACrashLoopEnds(t *testing.T) {
	s := newSimulation(t, "east-0")
	s.recovery.First = time.Millisecond
	s.restart()
	s.awaitReady("east-0")
	id := s.running(api.JobSpec{MaxRestarts: 1000})
	older := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	newer := s.do("/v1/jobs/"+id+"/checkpoints", nil).Checkpoint
	var tried []string
	for run := int64(1); run <= 6; run++ {
		if run > 1 {
			tried = append(tried, s.awaitRun(id, run).From)
		}
		s.end(id, 139)
	}
	job := s.awaitPhase(id, api.PhaseFailed)
	// The run that was not restored failed soon, too: one start from nothing is left.
	if want := []string{newer, newer, older, older, ""}; !slices.Equal(tried, want) {
		t.Errorf("tried %q, want %q", tried, want)
	}
	if !strings.Contains(job.Reason, "crash loop") {
		t.Errorf("the reason: %q", job.Reason)
	}
}

func TestTheWaitForARestartOutlivesTheController(t *testing.T) {
	s := newSimulation(t, "east-0")
	s.recovery.First = 2 * time.Second
	s.restart()
	s.awaitReady("east-0")
	id := s.running(api.JobSpec{CPUs: simCPUs, MaxRestarts: 1})
	s.end(id, 1)
	s.awaitStep(id, protocol.StepDelay)
	due := s.jobNow(id).Runs[0].Failed.Add(2 * time.Second)
	if job := s.jobNow(id); job.Phase != api.PhaseRecovering || !strings.Contains(job.Reason, "starts again from nothing in 2s, restart 1 of 1, at "+due.Format(time.TimeOnly)) {
		t.Errorf("a job that waits is %s: %q", job.Phase, job.Reason)
	}
	// Nobody keeps its room free meanwhile.
	other := s.running(api.JobSpec{CPUs: simCPUs})
	s.want(http.StatusAccepted, "POST", "/v1/jobs/"+other+"/kill", nil, nil)
	s.awaitPhase(other, api.PhaseCancelled)
	s.restart()
	if job := s.awaitRun(id, 2); job.Incidents[0].Running.Before(due) {
		t.Errorf("it runs again at %s, and was to wait until %s", job.Incidents[0].Running, due)
	}
}

func TestAJobThatWaitsForItsRestartCanBeKilled(t *testing.T) {
	s := newSimulation(t, "east-0")
	s.recovery.First = time.Hour
	s.recovery.Longest = time.Hour
	s.restart()
	s.awaitReady("east-0")
	id := s.running(api.JobSpec{MaxRestarts: 1})
	s.end(id, 1)
	s.awaitStep(id, protocol.StepDelay)
	s.want(http.StatusAccepted, "POST", "/v1/jobs/"+id+"/kill", nil, nil)
	s.awaitPhase(id, api.PhaseCancelled)
}

func TestAFailureDuringACheckpointIsRecoveredAfterIt(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{MaxRestarts: 1})
	reached, release := s.held(protocol.StepUpload)
	op := s.begin("/v1/jobs/"+id+"/checkpoints", nil)
	<-reached
	s.end(id, 1)
	s.eventually("the end is known", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && job.TaskStatus[0].ExitCode != nil, err
	})
	release()
	s.awaitEnd(op.ID)
	if job := s.awaitRun(id, 2); job.From != op.Checkpoint {
		t.Errorf("restored from %q, want the checkpoint that was being stored, %s", job.From, op.Checkpoint)
	}
}

func TestARestartByHandGivesAllAttemptsBack(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{MaxRestarts: 1})
	s.end(id, 1)
	s.awaitRun(id, 2)
	s.end(id, 1)
	s.awaitPhase(id, api.PhaseFailed)
	s.do("/v1/jobs/"+id+"/restart", nil)
	s.awaitRun(id, 3)
	s.end(id, 1)
	s.awaitRun(id, 4)
}
