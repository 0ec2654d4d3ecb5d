// Package drivertest is the conformance suite of drivers.Driver: what the
// controller relies on, whatever the platform.
package drivertest

import (
	"context"
	"errors"
	"testing"
	"time"

	"dormouse/drivers"
)

// Suite makes the driver to test. Reopen returns a second Driver over the same
// platform, as after the death of the process that had the first.
type Suite struct {
	Open   func(t *testing.T) drivers.Driver
	Reopen func(t *testing.T) drivers.Driver
	// Unclosed lets go of a Driver as the death of its process would.
	Unclosed func(t *testing.T, d drivers.Driver)
}

// patience is how long a platform may take for one step.
const patience = time.Minute

// Run runs every test of the suite.
func (s Suite) Run(t *testing.T) {
	t.Run("ProvisionMakesNodes", s.provisionMakesNodes)
	t.Run("ProvisionTwiceChangesNothing", s.provisionTwiceChangesNothing)
	t.Run("PowerOffIsCertain", s.powerOffIsCertain)
	t.Run("PowerOnBringsTheNodeBack", s.powerOnBringsTheNodeBack)
	t.Run("ReleaseTakesTheNodeForGood", s.releaseTakesTheNodeForGood)
	t.Run("UnknownNodes", s.unknownNodes)
	t.Run("EventsAreNotLost", s.eventsAreNotLost)
	if s.Reopen != nil {
		t.Run("NodesOutliveTheProcess", s.nodesOutliveTheProcess)
	}
}

func (s Suite) open(t *testing.T) (context.Context, drivers.Driver) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	d := s.Open(t)
	t.Cleanup(func() { closeDriver(t, d) })
	return ctx, d
}

func closeDriver(t *testing.T, d drivers.Driver) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := d.Close(ctx); err != nil {
		t.Errorf("Close: %v", err)
	}
}

func provision(t *testing.T, ctx context.Context, d drivers.Driver, names ...string) []drivers.Node {
	t.Helper()
	var specs []drivers.NodeSpec
	for _, name := range names {
		specs = append(specs, drivers.NodeSpec{Name: name, CPUs: 1, MemBytes: 256 << 20})
	}
	made, err := d.Provision(ctx, specs)
	if err != nil {
		t.Fatalf("Provision(%v): %v", names, err)
	}
	return made
}

func powers(t *testing.T, ctx context.Context, d drivers.Driver) map[string]drivers.Power {
	t.Helper()
	nodes, err := d.Nodes(ctx)
	if err != nil {
		t.Fatalf("Nodes: %v", err)
	}
	all := map[string]drivers.Power{}
	for _, n := range nodes {
		all[n.Name] = n.Power
	}
	return all
}

func expect(t *testing.T, got map[string]drivers.Power, want map[string]drivers.Power) {
	t.Helper()
	for name, power := range want {
		if got[name] != power {
			t.Errorf("node %s is %q, expected %q", name, got[name], power)
		}
	}
	if len(got) != len(want) {
		t.Errorf("nodes %v, expected %v", got, want)
	}
}

func (s Suite) provisionMakesNodes(t *testing.T) {
	ctx, d := s.open(t)
	made := provision(t, ctx, d, "a", "b")
	if len(made) != 2 {
		t.Errorf("Provision made %v, expected two nodes", made)
	}
	expect(t, powers(t, ctx, d), map[string]drivers.Power{"a": drivers.PowerOn, "b": drivers.PowerOn})
}

func (s Suite) provisionTwiceChangesNothing(t *testing.T) {
	ctx, d := s.open(t)
	first := provision(t, ctx, d, "a")
	second := provision(t, ctx, d, "a")
	if len(second) != 1 || second[0] != first[0] {
		t.Errorf("the second Provision answered %v, expected %v", second, first)
	}
}

func (s Suite) powerOffIsCertain(t *testing.T) {
	ctx, d := s.open(t)
	provision(t, ctx, d, "a", "b")
	for range 2 {
		if err := d.PowerOff(ctx, "a"); err != nil {
			t.Fatalf("PowerOff: %v", err)
		}
		expect(t, powers(t, ctx, d), map[string]drivers.Power{"a": drivers.PowerOff, "b": drivers.PowerOn})
	}
}

func (s Suite) powerOnBringsTheNodeBack(t *testing.T) {
	ctx, d := s.open(t)
	provision(t, ctx, d, "a")
	if err := d.PowerOff(ctx, "a"); err != nil {
		t.Fatalf("PowerOff: %v", err)
	}
	for range 2 {
		if err := d.PowerOn(ctx, "a"); err != nil {
			t.Fatalf("PowerOn: %v", err)
		}
		expect(t, powers(t, ctx, d), map[string]drivers.Power{"a": drivers.PowerOn})
	}
}

func (s Suite) releaseTakesTheNodeForGood(t *testing.T) {
	ctx, d := s.open(t)
	provision(t, ctx, d, "a", "b")
	for range 2 {
		if err := d.Release(ctx, "a"); err != nil {
			t.Fatalf("Release: %v", err)
		}
	}
	expect(t, powers(t, ctx, d), map[string]drivers.Power{"b": drivers.PowerOn})
}

func (s Suite) unknownNodes(t *testing.T) {
	ctx, d := s.open(t)
	if err := d.PowerOff(ctx, "nobody"); !errors.Is(err, drivers.ErrNoNode) {
		t.Errorf("PowerOff of an unknown node: %v, expected ErrNoNode", err)
	}
	if err := d.PowerOn(ctx, "nobody"); !errors.Is(err, drivers.ErrNoNode) {
		t.Errorf("PowerOn of an unknown node: %v, expected ErrNoNode", err)
	}
	if err := d.Release(ctx, "nobody"); err != nil {
		t.Errorf("Release of an unknown node: %v, expected none", err)
	}
}

func (s Suite) eventsAreNotLost(t *testing.T) {
	ctx, d := s.open(t)
	events, err := d.Events(ctx)
	if err != nil {
		t.Fatalf("Events: %v", err)
	}
	provision(t, ctx, d, "a")
	if err := d.PowerOff(ctx, "a"); err != nil {
		t.Fatalf("PowerOff: %v", err)
	}
	if err := d.PowerOn(ctx, "a"); err != nil {
		t.Fatalf("PowerOn: %v", err)
	}
	for i, want := range []drivers.Power{drivers.PowerOn, drivers.PowerOff, drivers.PowerOn} {
		select {
		case e := <-events:
			if e.Node != "a" || e.Power != want {
				t.Errorf("event %d is %+v, expected node a to be %s", i, e, want)
			}
		case <-ctx.Done():
			t.Fatalf("event %d (%s) did not come", i, want)
		}
	}
}

func (s Suite) nodesOutliveTheProcess(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	first := s.Open(t)
	before := provision(t, ctx, first, "a")
	s.Unclosed(t, first)
	second := s.Reopen(t)
	defer closeDriver(t, second)
	expect(t, powers(t, ctx, second), map[string]drivers.Power{"a": drivers.PowerOn})
	after := provision(t, ctx, second, "a")
	if len(after) != 1 || after[0] != before[0] {
		t.Errorf("the next process sees %v, expected the node to go on as %v", after, before)
	}
	if err := second.PowerOff(ctx, "a"); err != nil {
		t.Fatalf("PowerOff by the next process: %v", err)
	}
	expect(t, powers(t, ctx, second), map[string]drivers.Power{"a": drivers.PowerOff})
}
