package controller

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/controller/store"
	"dormouse/drivers"
)

// addElastic adds the cloud north, which begins with one node and may have two.
func (s *simulation) addElastic(make func(ctx context.Context, node string) error) {
	s.t.Helper()
	err := s.c.AddCloud(s.t.Context(), Cloud{
		Name: "north", DriverName: driverLocal, Driver: &simDriver{world: s.world, make: make},
		Nodes: []drivers.NodeSpec{{Name: "north-0"}}, Most: 2, Idle: 300 * time.Millisecond,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.awaitReady("north-0")
}

// filling is a job that has a node of its own.
var filling = api.JobSpec{Cloud: "north", CPUs: 4, MaxRestarts: 3}

func (s *simulation) awaitNoNode(node string) {
	s.t.Helper()
	s.eventually("there is no node "+node, func(tx store.Tx) (bool, error) {
		_, err := tx.Get(store.Nodes, node)
		return errors.Is(err, store.ErrNotFound), ignoreMissing(err)
	})
}

func TestCloudGetsFurtherNodesWhileJobsWaitAndGivesThemBack(t *testing.T) {
	s := newSimulation(t)
	s.addElastic(nil)
	first, second := s.running(filling), s.running(filling)
	if on := s.jobNow(second).TaskStatus[0].Node; on != "north-1" {
		t.Errorf("the second job is on %s, want it to be on a further node", on)
	}
	third := s.submit(filling)
	s.eventually("the third job waits", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, third)
		return err == nil && job.Reason != "", err
	})
	if n := len(s.nodesOf("north")); n != 2 {
		t.Errorf("the cloud has %d nodes, want no more than the 2 that it may have", n)
	}
	for _, id := range []string{second, third} {
		s.awaitPhase(id, api.PhaseRunning)
		s.end(id, 0)
		s.awaitPhase(id, api.PhaseCompleted)
	}
	if !slices.Contains(s.nodesOf("north"), "north-1") {
		t.Error("the node is gone that has the logs of jobs that are over")
	}
	for _, id := range []string{second, third} {
		s.want(http.StatusNoContent, "DELETE", "/v1/jobs/"+id, nil, nil)
	}
	s.awaitNoNode("north-1")
	if s.agent("north-1") != nil {
		t.Error("the node was forgotten and not taken away")
	}
	if s.jobNow(first).Phase != api.PhaseRunning || s.agent("north-0") == nil {
		t.Error("a node that the cloud begins with was taken away, or its job ended")
	}
	s.running(filling) // and so again
}

// nodesOf are the nodes of a cloud.
func (s *simulation) nodesOf(cloud string) (names []string) {
	s.t.Helper()
	err := s.store.View(s.t.Context(), func(tx store.Tx) error {
		nodes, err := store.All[nodeRecord](tx, store.Nodes)
		for _, n := range nodes {
			if n.Cloud == cloud {
				names = append(names, n.ID)
			}
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return names
}

func TestJobOfALostNodeIsRecoveredOnAFurtherOne(t *testing.T) {
	s := newSimulation(t)
	s.addElastic(nil)
	id := s.running(filling)
	s.killNode("north-0")
	s.eventually("the job runs on a further node", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && job.Phase == api.PhaseRunning && job.TaskStatus[0].Node == "north-1", err
	})
}

func TestAJobThatWaitsForANodeBeingMadeIsProvisioning(t *testing.T) {
	s := newSimulation(t)
	made := make(chan struct{})
	s.addElastic(func(_ context.Context, node string) error {
		if node != "north-0" {
			<-made
		}
		return nil
	})
	first := s.running(filling)
	second := s.submit(filling)
	job := s.awaitPhase(second, api.PhaseProvisioning)
	if !strings.Contains(job.Reason, "north-1") {
		t.Errorf("the reason is %q, want it to name the node that is being made", job.Reason)
	}
	third := s.submit(filling)
	s.eventually("the third job has a reason", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, third)
		return err == nil && job.Reason != "", err
	})
	if job := s.jobNow(third); job.Phase != api.PhasePending {
		t.Errorf("the third job is %s, want it pending: no node is made for it", job.Phase)
	}
	s.do("/v1/jobs/"+third+"/kill", struct{}{})
	s.awaitPhase(third, api.PhaseCancelled)
	close(made)
	s.awaitPhase(second, api.PhaseRunning)
	s.checkAlive(first, api.PhaseRunning)
}

func TestFurtherNodeThatCannotBeMadeIsForgotten(t *testing.T) {
	s := newSimulation(t)
	var asked atomic.Int32
	s.addElastic(func(_ context.Context, node string) error {
		if node == "north-0" {
			return nil
		}
		asked.Add(1)
		return errors.New("the quota is exhausted")
	})
	s.running(filling)
	second := s.submit(filling)
	s.eventually("the driver was asked", func(store.Tx) (bool, error) { return asked.Load() > 0, nil })
	s.awaitNoNode("north-1")
	s.awaitPhase(second, api.PhasePending)
	if n := asked.Load(); n != 1 {
		t.Errorf("the driver was asked %d times at once, want it to be left alone for a while", n)
	}
	var told []api.Event
	err := s.store.View(t.Context(), func(tx store.Tx) (err error) { told, err = store.All[api.Event](tx, store.Events); return err })
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(told, func(e api.Event) bool { return strings.Contains(e.Message, "the quota is exhausted") }) {
		t.Errorf("no event tells why: %+v", told)
	}
}

func TestFurtherNodeUnderWayIsMadeByTheNextController(t *testing.T) {
	s := newSimulation(t)
	begun := make(chan struct{})
	s.addElastic(func(ctx context.Context, node string) error {
		if node == "north-0" {
			return nil
		}
		close(begun)
		<-ctx.Done()
		return ctx.Err()
	})
	s.running(filling)
	second := s.submit(filling)
	<-begun
	s.restart()
	s.addElastic(nil)
	if on := s.awaitPhase(second, api.PhaseRunning).TaskStatus[0].Node; on != "north-1" {
		t.Errorf("the job is on %s, want the node that was under way", on)
	}
}
