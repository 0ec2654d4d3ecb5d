package controller

import (
	"context"
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
)

// commands records what agents are sent.
func (w *world) commands(keep func(*agentpb.Command) bool) func() []*agentpb.Command {
	var mu sync.Mutex
	var list []*agentpb.Command
	w.setFault(func(_ *simAgent, c *agentpb.Command) fault {
		mu.Lock()
		defer mu.Unlock()
		if keep(c) {
			list = append(list, c)
		}
		return fault{}
	})
	return func() []*agentpb.Command {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(list)
	}
}

func TestNodesOfAJobLearnOfEachOther(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	sent := s.commands(func(c *agentpb.Command) bool { return c.GetPrepareNetwork() != nil || c.GetConnectNetwork() != nil })
	id := s.running(api.JobSpec{Tasks: 2, CPUs: 3})
	var plans []*agentpb.NetworkPlan
	peers := map[int32]string{}
	for _, c := range sent() {
		if p := c.GetPrepareNetwork().GetPlan(); p != nil {
			plans = append(plans, p)
		}
		for _, p := range c.GetConnectNetwork().GetPeers() {
			peers[c.GetTask().GetIndex()] += p.GetNode() + " " + p.GetEndpoint().GetAddress() + " " + strings.Join(p.GetVirtualIps(), ",")
		}
	}
	job := s.jobNow(id)
	if len(plans) != 2 || plans[0].GetNumber() == 0 || plans[0].GetNumber() != plans[1].GetNumber() || !plans[0].GetSpans() || plans[0].GetTunnel() != TunnelWireGuard {
		t.Errorf("want the same spanning plan on both nodes, got %v", plans)
	}
	for i, task := range job.TaskStatus {
		other := job.TaskStatus[1-i]
		if want := other.Node + " " + other.Node + ":51820 " + other.VirtualIP; peers[int32(i)] != want {
			t.Errorf("task %d on %s learnt of %q, want %q", i, task.Node, peers[int32(i)], want)
		}
	}
}

func TestEachRunsNetworkHasAnotherNumber(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1")
	id := s.running(api.JobSpec{Tasks: 2})
	first := s.jobNow(id).Network
	s.do("/v1/jobs/"+id+"/checkpoints", nil)
	s.do("/v1/jobs/"+id+"/restart", map[string]string{})
	if second := s.awaitPhase(id, api.PhaseRunning).Network; second == first {
		t.Errorf("both runs have network %d", first)
	}
}

func TestParallelJobIsRestoredBehindBarriers(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1", "west-0", "west-1")
	id := s.running(api.JobSpec{Tasks: 4, CPUs: 2})
	s.do("/v1/jobs/"+id+"/checkpoints", nil)
	sent := s.commands(func(c *agentpb.Command) bool { return true })
	s.do("/v1/jobs/"+id+"/restart", map[string]string{})
	var order []string
	for _, c := range sent() {
		if step := stepIn(c.GetId()); step != "cleanup" && (len(order) == 0 || order[len(order)-1] != step) {
			order = append(order, step)
		}
	}
	want := []string{protocol.StepNetwork, protocol.StepConnect, protocol.StepRestore, protocol.StepOpen, protocol.StepRelease}
	if !slices.Equal(order, want) {
		t.Errorf("want each step at all tasks before the next, %v, got %v", want, order)
	}
}

func TestHeldRestoreThatWasLostIsTriedAgain(t *testing.T) {
	for _, step := range []string{protocol.StepNetwork, protocol.StepConnect, protocol.StepRestore, protocol.StepOpen, protocol.StepRelease} {
		t.Run(step, func(t *testing.T) {
			s := newSimulation(t, "east-0", "east-1")
			id := s.running(api.JobSpec{Tasks: 2})
			s.do("/v1/jobs/"+id+"/checkpoints", nil)
			s.faultOnce(step, func(*simAgent) fault {
				return fault{failure: &agentpb.Failure{Message: "the agent was restarted since", Retryable: true}}
			})
			s.do("/v1/jobs/"+id+"/restart", map[string]string{})
			s.awaitPhase(id, api.PhaseRunning)
			if alive := s.aliveTasks(id); len(alive) != 2 {
				t.Errorf("want two living tasks, got %v", alive)
			}
		})
	}
}

func TestJobOfALauncherEndsWithItsFirstTask(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1")
	id := s.running(api.JobSpec{Tasks: 3, Command: []string{"/usr/bin/mpirun.openmpi", "./program"}})
	if launch := s.jobNow(id).Spec.Launch; launch != api.LaunchFirst {
		t.Errorf("launch is %q", launch)
	}
	s.end(id, 0)
	job := s.awaitPhase(id, api.PhaseCompleted)
	if job.ExitCode == nil || *job.ExitCode != 0 {
		t.Errorf("exit code %v", job.ExitCode)
	}
	s.eventually("the other tasks are gone", func(store.Tx) (bool, error) { return len(s.aliveTasks(id)) == 0, nil })
}

func TestFirstFailingTaskFailsAJobAndEndsTheOthers(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1")
	id := s.running(api.JobSpec{Tasks: 3})
	s.end(id, 4)
	job := s.awaitPhase(id, api.PhaseFailed)
	if !strings.Contains(job.Reason, "task 0 exited with status 4") {
		t.Errorf("reason: %s", job.Reason)
	}
	s.eventually("the other tasks are gone", func(store.Tx) (bool, error) { return len(s.aliveTasks(id)) == 0, nil })
}

func TestPortsArePublishedOncePerNode(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1")
	publish := []api.Publish{{Port: 8080, Target: 80}}
	first := s.jobNow(s.running(api.JobSpec{Publish: publish}))
	second := s.jobNow(s.running(api.JobSpec{Publish: publish}))
	if first.TaskStatus[0].Node == second.TaskStatus[0].Node {
		t.Errorf("both jobs publish the port on %s", first.TaskStatus[0].Node)
	}
	third := s.submit(api.JobSpec{Publish: publish})
	s.eventually("the third waits and says why", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, third)
		return err == nil && strings.Contains(job.Reason, "publishes port 8080/tcp on node"), err
	})
	for what, bad := range map[string][]api.Publish{
		"is published twice": {{Port: 1}, {Port: 1, Target: 2}}, "there is no task 1": {{Task: 1, Port: 1}},
		"is tcp or udp": {{Port: 1, Protocol: "sctp"}}, "from 1 to 65535": {{Port: 70000}},
	} {
		if detail := s.want(http.StatusUnprocessableEntity, "POST", "/v1/jobs", api.JobSpec{Command: []string{"x"}, Publish: bad}, nil); !strings.Contains(detail, what) {
			t.Errorf("want %q in %q", what, detail)
		}
	}
}

// ask has an agent ask for a checkpoint, and returns the answer. Like a real
// one, it repeats itself: its stream may be broken.
func (s *simulation) ask(ref taskRef, request string) *agentpb.AppAnswer {
	s.t.Helper()
	agent := s.agent(ref.Node)
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	for {
		agent.send(&agentpb.FromAgent{Body: &agentpb.FromAgent_AppRequest{AppRequest: &agentpb.AppRequest{
			Id: request, Task: ref.proto(), Body: &agentpb.AppRequest_Checkpoint{Checkpoint: &agentpb.AppCheckpoint{Label: "inner"}},
		}}})
		select {
		case answer := <-agent.appAnswers:
			return answer
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			s.t.Fatalf("no answer\n%s", s.dump())
		}
	}
}

func TestProgramInsideAsksForACheckpointOnce(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1")
	id := s.running(api.JobSpec{Tasks: 2})
	ref := s.jobNow(id).refs()[0]
	answer := s.ask(ref, "r-1")
	if answer.GetFailure() != nil || answer.GetCheckpoint() == "" {
		t.Fatalf("answer: %v", answer)
	}
	s.restart()
	if again := s.ask(ref, "r-1"); again.GetCheckpoint() != answer.GetCheckpoint() {
		t.Errorf("asked again: %v, first %v", again, answer)
	}
	list := s.checkpointsOf(id)
	if len(list) != 1 || list[0].Trigger != api.TriggerApplication || list[0].Label != "inner" {
		t.Errorf("checkpoints: %+v", list)
	}
}

func TestRequestOfAnOldRunIsRefused(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	ref := s.jobNow(id).refs()[0]
	ref.Run = 7
	if answer := s.ask(ref, "r-2"); !answer.GetFailure().GetRefused() {
		t.Errorf("answer: %v", answer)
	}
}

func (s *simulation) checkpointsOf(id string) (list []api.Checkpoint) {
	s.t.Helper()
	err := s.store.View(s.t.Context(), func(tx store.Tx) (err error) {
		list, err = checkpointsOf(tx, id)
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return list
}

func TestSubnetHoldsTheTasksAndTheGateway(t *testing.T) {
	seen := map[string]bool{}
	for _, job := range []uint64{0, 1, 1023} {
		subnet, gateway, err := subnetOf(virtualIP(job, 0))
		if err != nil {
			t.Fatal(err)
		}
		if seen[subnet.String()] || !subnet.Contains(gateway) {
			t.Errorf("job %d: subnet %v, gateway %v", job, subnet, gateway)
		}
		seen[subnet.String()] = true
		last, _, err := subnetOf(virtualIP(job, mostTasks-1))
		if err != nil || last != subnet || virtualIP(job, mostTasks) != gateway.String() {
			t.Errorf("job %d: the last task is in %v, the gateway is %v: %v", job, last, gateway, err)
		}
	}
}
