package scheduler_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"dormouse/api"
	"dormouse/controller/scheduler"
)

const gib = int64(1) << 30

func node(id string, cpus float64, mem int64) scheduler.Node {
	return scheduler.Node{ID: id, Cloud: strings.Split(id, "-")[0], State: api.NodeReady, CPUs: cpus, MemBytes: mem}
}

func TestPlaceSpreadsOverTheLeastLoadedNodes(t *testing.T) {
	busy := node("east-0", 4, 8*gib)
	busy.CPUsUsed = 3
	got, err := scheduler.Place([]scheduler.Node{busy, node("east-1", 4, 8*gib), node("east-2", 4, 8*gib)},
		scheduler.Request{Tasks: 2, CPUs: 1, MemBytes: gib})
	if err != nil || !slices.Equal(got, []string{"east-1", "east-2"}) {
		t.Fatalf("want east-1 and east-2, got %v, %v", got, err)
	}
}

func TestPlaceAvoidsANodeUnlessItIsTheOnlyOne(t *testing.T) {
	nodes := []scheduler.Node{node("east-0", 2, gib), node("east-1", 2, gib)}
	request := scheduler.Request{Tasks: 1, CPUs: 1, Avoid: []string{"east-0"}}
	if got, err := scheduler.Place(nodes, request); err != nil || got[0] != "east-1" {
		t.Fatalf("want east-1, got %v, %v", got, err)
	}
	if got, err := scheduler.Place(nodes[:1], request); err != nil || got[0] != "east-0" {
		t.Fatalf("want east-0, got %v, %v", got, err)
	}
}

func TestReasonsAreSentences(t *testing.T) {
	full := node("west-0", 2, gib)
	full.CPUsUsed = 2
	down := node("west-0", 2, gib)
	down.State = api.NodeLost
	for _, c := range []struct {
		name    string
		nodes   []scheduler.Node
		request scheduler.Request
		want    string
		never   bool
	}{
		{"absurd cpus", []scheduler.Node{node("west-0", 2, gib)}, scheduler.Request{Tasks: 1, CPUs: 900, Cloud: "west"},
			"no node of cloud west has 900 cpus: the largest has 2", true},
		{"absurd memory", []scheduler.Node{node("west-0", 2, gib)}, scheduler.Request{Tasks: 1, CPUs: 1, MemBytes: 900 * gib},
			"no node has 900 GiB of memory: the largest has 1 GiB", true},
		{"gang too large", []scheduler.Node{node("west-0", 2, gib)}, scheduler.Request{Tasks: 3, CPUs: 1},
			"the nodes have room for at most 2 tasks of 1 cpu and 0 bytes at once, not 3", true},
		{"full", []scheduler.Node{full}, scheduler.Request{Tasks: 1, CPUs: 1, Cloud: "west"},
			"needs 1 cpu and 0 bytes on one node of cloud west, and the most that is free is 0 cpus and 1 GiB, on west-0", false},
		{"none ready", []scheduler.Node{down}, scheduler.Request{Tasks: 1, CPUs: 1}, "no node is ready", false},
		{"none known", nil, scheduler.Request{Tasks: 1, CPUs: 1, Cloud: "west"}, "no node of cloud west is ready", false},
		{"unfit", []scheduler.Node{node("west-0", 2, gib)}, scheduler.Request{Tasks: 1, CPUs: 1, Unfit: func(scheduler.Node) string { return "too old" }},
			"too old", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := scheduler.Place(c.nodes, c.request)
			var noRoom *scheduler.NoRoomError
			if !errors.As(err, &noRoom) || err.Error() != c.want || noRoom.Never != c.never {
				t.Fatalf("want %q (never %v), got %q", c.want, c.never, err)
			}
		})
	}
}

func drawNodes(t *rapid.T) []scheduler.Node {
	states := []api.NodeState{api.NodeReady, api.NodeReady, api.NodeReady, api.NodeLost, api.NodeCordoned}
	nodes := make([]scheduler.Node, rapid.IntRange(0, 6).Draw(t, "nodes"))
	for i := range nodes {
		cpus, mem := rapid.IntRange(1, 8).Draw(t, "cpus"), rapid.IntRange(1, 8).Draw(t, "mem")
		nodes[i] = scheduler.Node{
			ID: fmt.Sprintf("n-%d", i), Cloud: rapid.SampledFrom([]string{"east", "west"}).Draw(t, "cloud"),
			State: rapid.SampledFrom(states).Draw(t, "state"),
			CPUs:  float64(cpus), MemBytes: int64(mem) * gib,
			CPUsUsed: float64(rapid.IntRange(0, cpus).Draw(t, "used")), MemUsed: int64(rapid.IntRange(0, mem).Draw(t, "memused")) * gib,
		}
	}
	return nodes
}

func drawRequest(t *rapid.T) scheduler.Request {
	return scheduler.Request{
		Tasks: rapid.IntRange(1, 6).Draw(t, "tasks"), CPUs: float64(rapid.IntRange(1, 4).Draw(t, "taskcpus")),
		MemBytes: int64(rapid.IntRange(1, 4).Draw(t, "taskmem")) * gib,
		Cloud:    rapid.SampledFrom([]string{"", "east", "west"}).Draw(t, "only"),
		Avoid:    rapid.SampledFrom([][]string{nil, {"n-0"}, {"n-0", "n-1"}}).Draw(t, "avoid"),
	}
}

// room counts how many tasks fit, independently of the scheduler.
func room(nodes []scheduler.Node, r scheduler.Request) int {
	total := 0
	for _, n := range nodes {
		if n.State != api.NodeReady || (r.Cloud != "" && n.Cloud != r.Cloud) || (r.Labels["disk"] != "" && n.Labels["disk"] != r.Labels["disk"]) {
			continue
		}
		for n.CPUsUsed+r.CPUs <= n.CPUs && n.MemUsed+r.MemBytes <= n.MemBytes {
			n.CPUsUsed, n.MemUsed = n.CPUsUsed+r.CPUs, n.MemUsed+r.MemBytes
			total++
		}
	}
	return total
}

func TestPlacesTheWholeGangWheneverThereIsRoomAndNeverBeyondIt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nodes, request := drawNodes(t), drawRequest(t)
		placement, err := scheduler.Place(nodes, request)
		fits := room(nodes, request) >= request.Tasks
		if fits != (err == nil) {
			t.Fatalf("room for the gang: %v, placement %v, error %v", fits, placement, err)
		}
		if err != nil {
			return
		}
		if len(placement) != request.Tasks {
			t.Fatalf("%d tasks were placed of %d", len(placement), request.Tasks)
		}
		for _, id := range placement {
			i := slices.IndexFunc(nodes, func(n scheduler.Node) bool { return n.ID == id })
			n := &nodes[i]
			n.CPUsUsed, n.MemUsed = n.CPUsUsed+request.CPUs, n.MemUsed+request.MemBytes
			if n.State != api.NodeReady || n.CPUsUsed > n.CPUs || n.MemUsed > n.MemBytes || (request.Cloud != "" && n.Cloud != request.Cloud) {
				t.Fatalf("a task went to %+v", *n)
			}
		}
	})
}

func TestImpossibleMeansThatIdleNodesWouldNotDo(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nodes, request := drawNodes(t), drawRequest(t)
		idle, known := slices.Clone(nodes), 0
		for i := range idle {
			idle[i].State, idle[i].CPUsUsed, idle[i].MemUsed = api.NodeReady, 0, 0
			if request.Cloud == "" || idle[i].Cloud == request.Cloud {
				known++
			}
		}
		impossible := scheduler.Possible(nodes, request) != nil
		if impossible != (known > 0 && room(idle, request) < request.Tasks) {
			t.Fatalf("impossible: %v, room when idle: %d", impossible, room(idle, request))
		}
	})
}
