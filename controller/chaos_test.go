package controller

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"testing"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
)

// Random operations on a few jobs, while commands fail, streams break, nodes
// lose their power and come back, and the controller is killed: at no instant
// may a task run twice (the world checks at each start), nothing may stay
// frozen, every operation must end, and what the store says must be what the
// nodes have.
func TestChaos(t *testing.T) {
	seeds := uint64(6)
	if testing.Short() {
		seeds = 1
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { chaos(t, seed) })
	}
}

func chaos(t *testing.T, seed uint64) {
	nodes := []string{"east-0", "east-1", "west-0"}
	s := newSimulation(t, nodes...)
	random := rand.New(rand.NewPCG(seed, 0))
	s.setFault(randomFaults(seed))
	var jobs []string
	for i := range 3 {
		jobs = append(jobs, s.submit(api.JobSpec{Name: fmt.Sprintf("chaos-%d", i), Tasks: 1 + i%2, MaxRestarts: 3}))
	}
	off := map[string]bool{}
	actions := []string{"checkpoints", "suspend", "resume", "restart", "checkpoints", "suspend", "resume"}
	for range 40 {
		job, node := jobs[random.IntN(len(jobs))], nodes[random.IntN(len(nodes))]
		switch dice := random.IntN(20); {
		case dice == 0:
			s.restart()
		case dice == 1 && len(off) == 0:
			s.want(http.StatusNoContent, "POST", "/v1/nodes/"+node+"/kill", nil, nil)
			off[node] = true
		case dice <= 3 && off[node]:
			s.want(http.StatusNoContent, "POST", "/v1/nodes/"+node+"/start", nil, nil)
			delete(off, node)
		case dice <= 9: // let what is under way get somewhere
			s.idleJob(job)
		default: // refused where the job's state does not allow it
			s.call("POST", "/v1/jobs/"+job+"/"+actions[random.IntN(len(actions))], nil, nil)
		}
	}
	s.setFault(nil)
	for node := range off {
		s.want(http.StatusNoContent, "POST", "/v1/nodes/"+node+"/start", nil, nil)
	}
	s.eventually("everything has settled", settled)
	for _, id := range jobs {
		s.checkSettled(id)
	}
}

// randomFaults breaks every tenth command or so.
func randomFaults(seed uint64) func(*simAgent, *agentpb.Command) fault {
	var mu sync.Mutex
	random := rand.New(rand.NewPCG(seed, 1))
	return func(a *simAgent, c *agentpb.Command) fault {
		mu.Lock()
		defer mu.Unlock()
		switch random.IntN(20) {
		case 0:
			return fault{disconnect: true}
		case 1:
			return fault{failure: &agentpb.Failure{Message: "it broke", Retryable: random.IntN(2) == 0}}
		}
		return fault{}
	}
}

// idleJob waits until no operation of the job is under way, unless it waits
// for room.
func (s *simulation) idleJob(id string) {
	s.t.Helper()
	s.eventually("job "+id+" is idle", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		if err != nil || job.Operation == "" {
			return job.Phase != api.PhaseStarting, err
		}
		op, err := getOperation(tx, job.Operation)
		return err == nil && op.Step == protocol.StepPlace, err
	})
}

// settled holds when all nodes are ready and nothing is under way.
func settled(tx store.Tx) (bool, error) {
	nodes, err := store.All[nodeRecord](tx, store.Nodes)
	if err != nil {
		return false, err
	}
	for _, n := range nodes {
		if n.State != api.NodeReady {
			return false, nil
		}
	}
	jobs, err := store.All[jobRecord](tx, store.Jobs)
	if err != nil {
		return false, err
	}
	for _, job := range jobs {
		if job.Operation != "" || job.Phase == api.PhasePending {
			return false, nil
		}
	}
	return noCleanups(tx)
}

// checkSettled compares the store with the nodes.
func (s *simulation) checkSettled(id string) {
	s.t.Helper()
	job := s.jobNow(id)
	alive := s.aliveTasks(id)
	want := 0
	if job.Phase == api.PhaseRunning {
		want = job.Tasks
	}
	if len(alive) != want {
		s.t.Errorf("job %s is %s (%s) with %d tasks, and on the nodes are %v", id, job.Phase, job.Reason, job.Tasks, alive)
	}
	for _, ref := range alive {
		if !job.owns(ref) {
			s.t.Errorf("job %s is at run %d, and %+v is alive", id, job.Run, ref)
		}
	}
	if frozen := s.stillFrozen(id); len(frozen) != 0 {
		s.t.Errorf("job %s: still frozen: %v", id, frozen)
	}
	if !job.Phase.Final() && job.Phase != api.PhaseRunning && job.Phase != api.PhaseSuspended {
		s.t.Errorf("job %s has settled as %s", id, job.Phase)
	}
}
