package scheduler_test

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"dormouse/api"
	"dormouse/controller/scheduler"
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func waiting(id string, priority int, r scheduler.Request) scheduler.Waiting {
	return scheduler.Waiting{ID: id, Priority: priority, Created: epoch, Since: epoch, Request: r}
}

func one(cpus float64) scheduler.Request { return scheduler.Request{Tasks: 1, CPUs: cpus} }

func running(id string, priority int, cpus float64, bytes int64, on ...string) scheduler.Running {
	return scheduler.Running{ID: id, Priority: priority, CPUs: cpus, Bytes: bytes, On: on}
}

func TestWhatBecomesOfWaitingJobs(t *testing.T) {
	labelled := node("east-0", 4, 8*gib)
	labelled.Labels = map[string]string{"disk": "ssd"}
	silent := node("east-1", 4, 8*gib)
	silent.State = api.NodeUnreachable
	busy := running("old", 0, 4, 10, "east-0")
	busy.Stays = "it is being checkpointed"
	leaving := running("old", 0, 4, 10, "east-0")
	leaving.Leaving = true
	publishing := running("web", 0, 1, 10, "east-0")
	publishing.Ports = map[string][]string{"east-0": {"80/tcp"}}
	patient := waiting("new", 5, one(4))
	patient.Patient = true
	held := waiting("new", 5, one(1))
	held.Hold = "waits a minute"
	for _, c := range []struct {
		name  string
		nodes []scheduler.Node
		jobs  []scheduler.Running
		queue []scheduler.Waiting
		want  []scheduler.Decision
	}{
		{"room", []scheduler.Node{node("east-0", 4, 8*gib)}, nil, []scheduler.Waiting{waiting("new", 0, one(4))},
			[]scheduler.Decision{{ID: "new", Placement: []string{"east-0"}}}},
		{"a label", []scheduler.Node{node("east-1", 4, 8*gib), labelled}, nil,
			[]scheduler.Waiting{waiting("new", 0, scheduler.Request{Tasks: 1, CPUs: 1, Labels: map[string]string{"disk": "ssd"}})},
			[]scheduler.Decision{{ID: "new", Placement: []string{"east-0"}}}},
		{"a label that no node has", []scheduler.Node{labelled}, nil,
			[]scheduler.Waiting{waiting("new", 0, scheduler.Request{Tasks: 1, CPUs: 1, Labels: map[string]string{"disk": "tape"}})},
			[]scheduler.Decision{{ID: "new", Reason: "no node with label disk=tape is ready"}}},
		{"no room, equal priority", []scheduler.Node{node("east-0", 4, 8*gib)}, []scheduler.Running{running("old", 5, 2, 10, "east-0")},
			[]scheduler.Waiting{waiting("new", 5, one(4))},
			[]scheduler.Decision{{ID: "new", Reason: "needs 4 cpus and 0 bytes on one node, and the most that is free is 2 cpus and 8 GiB, on east-0"}}},
		{"a lower priority gives way", []scheduler.Node{node("east-0", 4, 8*gib)}, []scheduler.Running{running("old", 4, 2, 10, "east-0")},
			[]scheduler.Waiting{waiting("new", 5, one(4))},
			[]scheduler.Decision{{ID: "new", Evict: []string{"old"}, Reason: "waits until job old of lower priority has given way"}}},
		{"one that is leaving already", []scheduler.Node{node("east-0", 4, 8*gib)}, []scheduler.Running{leaving, running("older", 0, 4, 1, "east-1")},
			[]scheduler.Waiting{waiting("new", 5, one(4))},
			[]scheduler.Decision{{ID: "new", Reason: "waits until job old has given way"}}},
		{"one that cannot", []scheduler.Node{node("east-0", 4, 8*gib)}, []scheduler.Running{busy}, []scheduler.Waiting{waiting("new", 5, one(4))},
			[]scheduler.Decision{{ID: "new", Reason: "needs 4 cpus and 0 bytes on one node, and the most that is free is 0 cpus and 8 GiB, on east-0; job old of priority 0 does not give way: it is being checkpointed"}}},
		{"a patient job evicts nobody", []scheduler.Node{node("east-0", 4, 8*gib)}, []scheduler.Running{running("old", 4, 2, 10, "east-0")}, []scheduler.Waiting{patient},
			[]scheduler.Decision{{ID: "new", Reason: "needs 4 cpus and 0 bytes on one node, and the most that is free is 2 cpus and 8 GiB, on east-0"}}},
		{"one that is held back", []scheduler.Node{node("east-0", 4, 8*gib)}, nil, []scheduler.Waiting{held},
			[]scheduler.Decision{{ID: "new", Reason: "waits a minute"}}},
		{"a node not heard of", []scheduler.Node{node("east-0", 4, 8*gib), silent}, []scheduler.Running{running("old", 0, 4, 10, "east-0")},
			[]scheduler.Waiting{waiting("new", 5, one(4))},
			[]scheduler.Decision{{ID: "new", Reason: "room is on east-1, not heard of at the moment"}}},
		{"a port", []scheduler.Node{node("east-0", 4, 8*gib)}, []scheduler.Running{publishing},
			[]scheduler.Waiting{waiting("new", 0, scheduler.Request{Tasks: 1, CPUs: 1, Ports: []string{"80/tcp"}})},
			[]scheduler.Decision{{ID: "new", Reason: "job web publishes port 80/tcp on node east-0"}}},
		{"a port of a lower priority", []scheduler.Node{node("east-0", 4, 8*gib)}, []scheduler.Running{publishing},
			[]scheduler.Waiting{waiting("new", 1, scheduler.Request{Tasks: 1, CPUs: 1, Ports: []string{"80/tcp"}})},
			[]scheduler.Decision{{ID: "new", Evict: []string{"web"}, Reason: "waits until job web of lower priority has given way"}}},
		{"only what the job ahead cannot use", []scheduler.Node{node("east-0", 4, 8*gib)}, []scheduler.Running{running("old", 5, 2, 10, "east-0")},
			[]scheduler.Waiting{waiting("big", 5, one(3)), waiting("one", 4, one(1)), waiting("two", 3, one(2))},
			[]scheduler.Decision{
				{ID: "big", Reason: "needs 3 cpus and 0 bytes on one node, and the most that is free is 2 cpus and 8 GiB, on east-0"},
				{ID: "one", Placement: []string{"east-0"}},
				{ID: "two", Reason: "needs 2 cpus and 0 bytes on one node, and the most that is free is 1 cpu and 8 GiB, on east-0; job big of priority 5 is ahead"},
			}},
		{"not what the job ahead can use", []scheduler.Node{node("east-0", 4, 8*gib)}, []scheduler.Running{running("old", 5, 2, 10, "east-0")},
			[]scheduler.Waiting{waiting("big", 5, one(4)), waiting("one", 4, one(1))},
			[]scheduler.Decision{
				{ID: "big", Reason: "needs 4 cpus and 0 bytes on one node, and the most that is free is 2 cpus and 8 GiB, on east-0"},
				{ID: "one", Reason: "the room that is free is kept; job big of priority 5 is ahead"},
			}},
		{"a job that waits for nodes keeps none free", []scheduler.Node{node("east-0", 4, 8*gib), lost("east-1", 8)}, nil,
			[]scheduler.Waiting{waiting("big", 5, one(8)), waiting("one", 4, one(1))},
			[]scheduler.Decision{
				{ID: "big", Reason: "needs 8 cpus and 0 bytes on one node, and the most that is free is 4 cpus and 8 GiB, on east-0"},
				{ID: "one", Placement: []string{"east-0"}},
			}},
		{"the same needs", []scheduler.Node{node("east-0", 4, 8*gib)}, []scheduler.Running{running("old", 5, 4, 10, "east-0")},
			[]scheduler.Waiting{waiting("a", 5, one(1)), waiting("b", 5, one(1))},
			[]scheduler.Decision{
				{ID: "a", Reason: "needs 1 cpu and 0 bytes on one node, and the most that is free is 0 cpus and 8 GiB, on east-0"},
				{ID: "b", Reason: "job a, which needs the same, is ahead", Alike: true},
			}},
		{"never", []scheduler.Node{node("east-0", 4, 8*gib)}, nil, []scheduler.Waiting{waiting("new", 0, one(5))},
			[]scheduler.Decision{{ID: "new", Reason: "no node has 5 cpus: the largest has 4", Never: true}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := scheduler.Schedule(c.nodes, c.jobs, c.queue); !reflect.DeepEqual(got, c.want) {
				t.Fatalf("want\n%+v\ngot\n%+v", c.want, got)
			}
		})
	}
}

func lost(id string, cpus float64) scheduler.Node {
	n := node(id, cpus, 8*gib)
	n.State = api.NodeLost
	return n
}

// The victims are of the least priority that makes room, then the fewest bytes,
// and no more than needed.
func TestChoiceOfVictims(t *testing.T) {
	nodes := []scheduler.Node{node("east-0", 4, 8*gib), node("east-1", 4, 8*gib)}
	for _, c := range []struct {
		name string
		jobs []scheduler.Running
		ask  scheduler.Request
		want []string
	}{
		{"fewest bytes", []scheduler.Running{running("a", 0, 4, 20, "east-0"), running("b", 0, 4, 10, "east-1")}, one(4), []string{"b"}},
		{"least priority before fewest bytes", []scheduler.Running{running("a", 0, 4, 20, "east-0"), running("b", 1, 4, 10, "east-1")}, one(4), []string{"a"}},
		{"two small ones rather than a large one", []scheduler.Running{
			running("a", 0, 4, 20, "east-0"), running("b", 0, 2, 5, "east-1"), running("c", 0, 2, 5, "east-1")}, one(4), []string{"b", "c"}},
		{"none that does not help", []scheduler.Running{
			running("a", 0, 1, 1, "east-0"), running("b", 0, 3, 9, "east-0"), running("c", 5, 4, 9, "east-1")}, one(3), []string{"b"}},
		{"a gang", []scheduler.Running{running("a", 0, 4, 9, "east-0"), running("b", 1, 4, 9, "east-1")},
			scheduler.Request{Tasks: 2, CPUs: 3}, []string{"a", "b"}},
		{"all of a gang for one of its tasks", []scheduler.Running{running("a", 0, 4, 9, "east-0", "east-1")}, one(4), []string{"a"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := scheduler.Schedule(nodes, c.jobs, []scheduler.Waiting{waiting("new", 9, c.ask)})
			if !slices.Equal(got[0].Evict, c.want) {
				t.Fatalf("want %v to give way, got %+v", c.want, got[0])
			}
		})
	}
}

func TestPackUsesFewNodesAndLeavesLargeOnesFree(t *testing.T) {
	nodes := []scheduler.Node{node("east-0", 8, 8*gib), node("east-1", 4, 8*gib), node("east-2", 2, 8*gib)}
	for _, c := range []struct {
		ask  scheduler.Request
		want []string
	}{
		{scheduler.Request{Tasks: 1, CPUs: 1, Pack: true}, []string{"east-2"}},
		{scheduler.Request{Tasks: 4, CPUs: 1, Pack: true}, []string{"east-1", "east-1", "east-1", "east-1"}},
		{scheduler.Request{Tasks: 3, CPUs: 4, Pack: true}, []string{"east-0", "east-0", "east-1"}},
		{scheduler.Request{Tasks: 3, CPUs: 2}, []string{"east-0", "east-0", "east-1"}},
	} {
		got, err := scheduler.Place(nodes, c.ask)
		slices.Sort(got)
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%+v: want %v, got %v, %v", c.ask, c.want, got, err)
		}
	}
}

func TestPatientJobsGoBehindThoseThatWaitedBeforeThem(t *testing.T) {
	at := func(id string, priority, since int, patient bool) scheduler.Waiting {
		w := waiting(id, priority, one(1))
		w.Created, w.Since, w.Patient = epoch.Add(time.Duration(since)), epoch.Add(time.Duration(since)), patient
		return w
	}
	var got []string
	for _, w := range scheduler.Order([]scheduler.Waiting{
		at("later", 0, 9, false), at("gave way", 5, 4, true), at("before", 1, 3, false), at("high", 9, 9, false), at("early", 2, 1, false),
	}) {
		got = append(got, w.ID)
	}
	if want := "high early before gave-way later"; strings.ReplaceAll(strings.Join(got, " "), "gave way", "gave-way") != want {
		t.Fatalf("want %s, got %v", want, got)
	}
}

// drawFloor makes nodes, jobs that fit on them, and a queue.
func drawFloor(t *rapid.T) ([]scheduler.Node, []scheduler.Running, []scheduler.Waiting) {
	nodes := drawNodes(t)
	for i := range nodes {
		nodes[i].CPUsUsed, nodes[i].MemUsed = 0, 0
		if rapid.Bool().Draw(t, "labelled") {
			nodes[i].Labels = map[string]string{"disk": "ssd"}
		}
	}
	var jobs []scheduler.Running
	left := slices.Clone(nodes)
	for i := range rapid.IntRange(0, 10).Draw(t, "jobs") {
		ask := drawRequest(t)
		placement, err := scheduler.Place(left, ask)
		if err != nil {
			continue
		}
		job := scheduler.Running{
			ID: fmt.Sprintf("r-%d", i), Priority: rapid.IntRange(0, 3).Draw(t, "priority"), On: placement, CPUs: ask.CPUs, MemBytes: ask.MemBytes,
			Leaving: rapid.IntRange(0, 5).Draw(t, "leaving") == 0, Bytes: int64(rapid.IntRange(0, 5).Draw(t, "bytes")),
		}
		if rapid.IntRange(0, 4).Draw(t, "stays") == 0 {
			job.Stays = "it is busy"
		}
		for _, id := range placement {
			use(left, id, ask.CPUs, ask.MemBytes)
		}
		jobs = append(jobs, job)
	}
	var queue []scheduler.Waiting
	for i := range rapid.IntRange(1, 8).Draw(t, "waiting") {
		ask := drawRequest(t)
		ask.Pack = rapid.Bool().Draw(t, "pack")
		if rapid.IntRange(0, 3).Draw(t, "constrained") == 0 {
			ask.Labels = map[string]string{"disk": "ssd"}
		}
		w := waiting(fmt.Sprintf("w-%d", i), rapid.IntRange(0, 4).Draw(t, "priority"), ask)
		w.Created = epoch.Add(time.Duration(rapid.IntRange(0, 3).Draw(t, "age")) * time.Second)
		w.Since, w.Patient = w.Created, rapid.IntRange(0, 5).Draw(t, "patient") == 0
		queue = append(queue, w)
	}
	return nodes, jobs, queue
}

func use(nodes []scheduler.Node, id string, cpus float64, mem int64) *scheduler.Node {
	i := slices.IndexFunc(nodes, func(n scheduler.Node) bool { return n.ID == id })
	nodes[i].CPUsUsed += cpus
	nodes[i].MemUsed += mem
	return &nodes[i]
}

func TestScheduleNeverExceedsCapacityAndPlacesGangsWhole(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nodes, jobs, queue := drawFloor(t)
		after := slices.Clone(nodes)
		for _, job := range jobs {
			for _, id := range job.On {
				use(after, id, job.CPUs, job.MemBytes)
			}
		}
		decisions := scheduler.Schedule(nodes, jobs, queue)
		if len(decisions) != len(queue) {
			t.Fatalf("%d decisions about %d jobs", len(decisions), len(queue))
		}
		for _, d := range decisions {
			w := queue[slices.IndexFunc(queue, func(w scheduler.Waiting) bool { return w.ID == d.ID })]
			if (d.Placement == nil) == (d.Reason == "") || d.Placement != nil && (len(d.Placement) != w.Request.Tasks || d.Evict != nil) {
				t.Fatalf("job %+v got %+v", w, d)
			}
			for _, id := range d.Placement {
				n := use(after, id, w.Request.CPUs, w.Request.MemBytes)
				if n.State != api.NodeReady || n.CPUsUsed > n.CPUs || n.MemUsed > n.MemBytes || w.Request.Cloud != "" && w.Request.Cloud != n.Cloud ||
					w.Request.Labels["disk"] != "" && n.Labels["disk"] != "ssd" {
					t.Fatalf("a task of %+v went to %+v", w, *n)
				}
			}
		}
	})
}

func TestVictimsAreOfLowerPriorityOnceAndNeverMoreThanNeeded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nodes, jobs, queue := drawFloor(t)
		evicted := map[string]bool{}
		for _, d := range scheduler.Schedule(nodes, jobs, queue) {
			w := queue[slices.IndexFunc(queue, func(w scheduler.Waiting) bool { return w.ID == d.ID })]
			for _, id := range d.Evict {
				v := jobs[slices.IndexFunc(jobs, func(j scheduler.Running) bool { return j.ID == id })]
				if v.Priority >= w.Priority || v.Leaving || v.Stays != "" || w.Patient || evicted[id] {
					t.Fatalf("job %+v makes %+v give way", w, v)
				}
				evicted[id] = true
			}
		}
		// Alone in the queue, what a victim is needed for can be seen from outside.
		first := queue[0]
		d := scheduler.Schedule(nodes, jobs, queue[:1])[0]
		for spared := range d.Evict {
			gone := slices.Delete(slices.Clone(d.Evict), spared, spared+1)
			if fitsWithout(nodes, jobs, gone, first.Request) {
				t.Fatalf("job %+v makes %v give way, without need of %s", first, d.Evict, d.Evict[spared])
			}
		}
		if len(d.Evict) > 0 && !fitsWithout(nodes, jobs, d.Evict, first.Request) {
			t.Fatalf("job %+v makes %v give way in vain", first, d.Evict)
		}
	})
}

// With more candidates than can be tried in every combination, the sets are
// minimal, too.
func TestVictimsAmongManyAreNeverMoreThanNeeded(t *testing.T) {
	evicted := 0
	rapid.Check(t, func(t *rapid.T) {
		var nodes []scheduler.Node
		var jobs []scheduler.Running
		for i := range rapid.IntRange(2, 4).Draw(t, "nodes") {
			nodes = append(nodes, node(fmt.Sprintf("n-%d", i), 12, 12*gib))
		}
		left := slices.Clone(nodes)
		for i := range 40 {
			ask := scheduler.Request{Tasks: rapid.IntRange(1, 2).Draw(t, "tasks"), CPUs: float64(rapid.IntRange(1, 2).Draw(t, "cpus")), MemBytes: gib}
			placement, err := scheduler.Place(left, ask)
			if err != nil {
				break
			}
			for _, id := range placement {
				use(left, id, ask.CPUs, ask.MemBytes)
			}
			jobs = append(jobs, scheduler.Running{
				ID: fmt.Sprintf("r-%02d", i), On: placement, CPUs: ask.CPUs, MemBytes: ask.MemBytes, Bytes: int64(rapid.IntRange(1, 9).Draw(t, "bytes")),
			})
		}
		ask := scheduler.Request{Tasks: rapid.IntRange(1, 6).Draw(t, "tasks"), CPUs: float64(rapid.IntRange(2, 8).Draw(t, "cpus")), MemBytes: gib}
		d := scheduler.Schedule(nodes, jobs, []scheduler.Waiting{waiting("new", 1, ask)})[0]
		if fits := fitsWithout(nodes, nil, nil, ask); fits != (d.Placement != nil || len(d.Evict) > 0) {
			t.Fatalf("the request fits without the others: %v, and it gets %+v", fits, d)
		}
		if len(d.Evict) == 0 {
			return
		}
		evicted++
		if !fitsWithout(nodes, jobs, d.Evict, ask) {
			t.Fatalf("%v give way in vain", d.Evict)
		}
		for i := range d.Evict {
			if fitsWithout(nodes, jobs, slices.Delete(slices.Clone(d.Evict), i, i+1), ask) {
				t.Fatalf("%v give way, without need of %s", d.Evict, d.Evict[i])
			}
		}
	})
	if evicted == 0 {
		t.Error("no job gave way: nothing was tested")
	}
}

// What one call decides is bounded, and the next goes on from there.
func TestLongQueueIsDecidedInParts(t *testing.T) {
	nodes := []scheduler.Node{node("east-0", 3000, 0)}
	var jobs []scheduler.Running
	var queue []scheduler.Waiting
	for i := range 2500 {
		w := waiting(fmt.Sprintf("w-%d", i), 0, one(1))
		w.Created = epoch.Add(time.Duration(i))
		queue = append(queue, w)
	}
	for calls := 0; len(queue) > 0; calls++ {
		decisions := scheduler.Schedule(nodes, jobs, queue)
		if len(decisions) == 0 || calls > 2500 {
			t.Fatalf("%d jobs are left", len(queue))
		}
		for i, d := range decisions {
			if d.ID != queue[i].ID || d.Placement == nil {
				t.Fatalf("job %s got %+v", queue[i].ID, d)
			}
			jobs = append(jobs, running(d.ID, 0, 1, 1, d.Placement...))
		}
		queue = queue[len(decisions):]
	}
}

// fitsWithout reports whether a request fits once the named jobs, and those
// that are leaving, have gone.
func fitsWithout(nodes []scheduler.Node, jobs []scheduler.Running, gone []string, r scheduler.Request) bool {
	left := slices.Clone(nodes)
	for _, job := range jobs {
		if !job.Leaving && !slices.Contains(gone, job.ID) {
			for _, id := range job.On {
				use(left, id, job.CPUs, job.MemBytes)
			}
		}
	}
	return room(left, r) >= r.Tasks
}

// Among the sets of the least priority that make room, no other costs less.
func TestVictimsAreTheCheapest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nodes, jobs, queue := drawFloor(t)
		w := queue[0]
		d := scheduler.Schedule(nodes, jobs, queue[:1])[0]
		if len(d.Evict) == 0 {
			return
		}
		highest, bytes := cost(jobs, d.Evict)
		for mask := range 1 << len(jobs) {
			var set []string
			for i, job := range jobs {
				if mask&(1<<i) != 0 && job.Priority < w.Priority && job.Stays == "" && !job.Leaving {
					set = append(set, job.ID)
				}
			}
			h, b := cost(jobs, set)
			if (h < highest || h == highest && b < bytes) && fitsWithout(nodes, jobs, set, w.Request) {
				t.Fatalf("%v (priority %d, %d bytes) give way rather than %v (priority %d, %d bytes)", d.Evict, highest, bytes, set, h, b)
			}
		}
	})
}

func cost(jobs []scheduler.Running, ids []string) (highest int, bytes int64) {
	highest = -1
	for _, job := range jobs {
		if slices.Contains(ids, job.ID) {
			highest, bytes = max(highest, job.Priority), bytes+job.Bytes
		}
	}
	return highest, bytes
}

func TestDecisionsDependOnNothingBehindAndNotOnTheOrderOfTheInput(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nodes, jobs, queue := drawFloor(t)
		all := scheduler.Schedule(nodes, jobs, queue)
		ordered := scheduler.Order(queue)
		n := rapid.IntRange(0, len(queue)).Draw(t, "ahead")
		if ahead := scheduler.Schedule(nodes, jobs, ordered[:n]); len(ahead) != 0 && !slices.ContainsFunc(queue, patient) && !reflect.DeepEqual(ahead, all[:n]) {
			t.Fatalf("alone, those ahead get\n%+v\nand with the others\n%+v", ahead, all[:n])
		}
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		random.Shuffle(len(queue), func(i, j int) { queue[i], queue[j] = queue[j], queue[i] })
		random.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
		random.Shuffle(len(jobs), func(i, j int) { jobs[i], jobs[j] = jobs[j], jobs[i] })
		if again := scheduler.Schedule(nodes, jobs, queue); !reflect.DeepEqual(placed(all), placed(again)) {
			t.Fatalf("shuffled, the jobs get\n%+v\nand before\n%+v", placed(again), placed(all))
		}
	})
}

func patient(w scheduler.Waiting) bool { return w.Patient }

// placed is what was decided, without the reasons.
func placed(decisions []scheduler.Decision) (list []string) {
	for _, d := range decisions {
		list = append(list, fmt.Sprint(d.ID, d.Placement, d.Evict))
	}
	return list
}

// The first job that has to wait starts at the same instant whether or not
// others are behind it, whenever the jobs that run may end.
func TestNoJobIsDelayedByOneBehindIt(t *testing.T) {
	went := 0
	rapid.Check(t, func(t *rapid.T) {
		nodes, jobs, queue := drawFloor(t)
		for i := range jobs {
			jobs[i].Leaving, jobs[i].Stays = false, "it never does"
		}
		ends := map[string]int{}
		for _, job := range jobs {
			ends[job.ID] = rapid.IntRange(1, 20).Draw(t, "end")
		}
		queue = scheduler.Order(queue)
		decisions := scheduler.Schedule(nodes, jobs, queue)
		blocked := slices.IndexFunc(decisions, func(d scheduler.Decision) bool { return d.Placement == nil })
		if blocked < 0 || !possibleNow(nodes, queue[blocked].Request) {
			return
		}
		for i := range 6 { // small ones, which may find a place that the other cannot use
			small := waiting(fmt.Sprintf("small-%d", i), -1, scheduler.Request{Tasks: 1, CPUs: 1, MemBytes: gib})
			small.Since = epoch.Add(time.Hour)
			queue = append(queue, small)
		}
		alone, _ := play(nodes, jobs, queue[:blocked+1], ends, queue[blocked].ID)
		among, started := play(nodes, jobs, queue, ends, queue[blocked].ID)
		went += started
		if among != alone {
			t.Fatalf("job %+v starts at %d among others and at %d without those behind it", queue[blocked], among, alone)
		}
	})
	if went == 0 {
		t.Error("no job ever went ahead of one that waits: nothing was tested")
	}
}

// possibleNow reports whether the request fits on the ready nodes when idle.
func possibleNow(nodes []scheduler.Node, r scheduler.Request) bool {
	return fitsWithout(nodes, nil, nil, r)
}

// play lets time pass until a job starts: what is started ahead or behind never
// ends. It returns when, and how many jobs that were behind started before.
func play(nodes []scheduler.Node, jobs []scheduler.Running, queue []scheduler.Waiting, ends map[string]int, id string) (at, ahead int) {
	jobs, queue = slices.Clone(jobs), slices.Clone(queue)
	rank := slices.IndexFunc(queue, func(w scheduler.Waiting) bool { return w.ID == id })
	behind := map[string]bool{}
	for _, w := range queue[rank+1:] {
		behind[w.ID] = true
	}
	for now := 0; now <= 21; now++ {
		jobs = slices.DeleteFunc(jobs, func(j scheduler.Running) bool { return ends[j.ID] == now && now > 0 })
		for _, d := range scheduler.Schedule(nodes, jobs, queue) {
			if d.Placement == nil {
				continue
			}
			if d.ID == id {
				return now, ahead
			}
			if behind[d.ID] {
				ahead++
			}
			i := slices.IndexFunc(queue, func(w scheduler.Waiting) bool { return w.ID == d.ID })
			r := queue[i].Request
			jobs = append(jobs, scheduler.Running{ID: d.ID, Priority: queue[i].Priority, On: d.Placement, CPUs: r.CPUs, MemBytes: r.MemBytes, Stays: "it never does"})
			queue = slices.Delete(queue, i, i+1)
		}
	}
	return -1, ahead
}
