package controller

import (
	"strings"
	"testing"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
)

// Several tasks of a job are lost at once when they share the node: the step
// must not take the loss of the last for the success of all.
func TestLossOfANodeThatTasksShareFailsTheStep(t *testing.T) {
	for _, step := range []string{protocol.StepPreflight, protocol.StepFreeze, protocol.StepCapture, protocol.StepThaw, protocol.StepUpload} {
		t.Run(step, func(t *testing.T) {
			s := newSimulation(t, "east-0")
			id := s.running(api.JobSpec{Tasks: 3})
			s.faultOnce(step, func(a *simAgent) fault {
				return fault{disconnect: true, act: func() { s.killNode(a.node) }}
			})
			op := s.awaitEnd(s.begin("/v1/jobs/"+id+"/checkpoints", nil).ID)
			if op.Phase != api.OpFailed || !strings.Contains(op.Error, "node east-0 was lost") {
				t.Errorf("want the operation failed for the loss of the node, got %s: %q", op.Phase, op.Error)
			}
		})
	}
}

// Jobs that wait for the same port do not get it at the same time.
func TestPortThatBecomesFreeGoesToOneJob(t *testing.T) {
	s := newSimulation(t, "east-0")
	spec := api.JobSpec{Publish: []api.Publish{{Port: 8080}}}
	first := s.running(spec)
	var waiting []string
	for range 2 {
		id := s.submit(spec)
		waiting = append(waiting, id)
		s.eventually("the job waits", func(tx store.Tx) (bool, error) {
			job, err := getJob(tx, id)
			return err == nil && strings.HasPrefix(job.Reason, "waits for room: "), err
		})
	}
	placed := s.commands(func(c *agentpb.Command) bool { return c.GetPrepareNetwork() != nil })
	s.end(first, 0)
	s.awaitPhase(waiting[0], api.PhaseRunning)
	if n := len(placed()); n != 1 {
		t.Errorf("want one of the jobs placed, got %d", n)
	}
	if job := s.jobNow(waiting[1]); job.Phase != api.PhasePending {
		t.Errorf("the other job is %s", job.Phase)
	}
}
