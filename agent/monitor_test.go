package agent

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/monitor/tally"
	"dormouse/monitor/tree"
)

// place gives a node its place in the monitoring tree: at once, and whenever it
// says hello.
func (c *controller) place(node string, place tree.Assignment) {
	c.t.Helper()
	c.mu.Lock()
	c.places[node] = place.Proto()
	n := c.nodes[node]
	c.mu.Unlock()
	must(c.t, n.send(&agentpb.ToAgent{Body: &agentpb.ToAgent_TreeAssignment{TreeAssignment: place.Proto()}}))
}

func (c *controller) placeOf(node string) *agentpb.TreeAssignment {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.places[node]
}

// alone is the place of a node that reports to the controller, each second.
var alone = tree.Assignment{Epoch: 1, Period: time.Second}

// hear takes a report of the monitoring tree, and in it what is new: a finding is
// repeated until its node has heard that it is stored.
func (c *controller) hear(p *agentpb.TreeReport) *agentpb.TreeAck {
	report, err := tree.ReportFrom(p)
	if err != nil {
		c.t.Errorf("a report cannot be read: %v", err)
	}
	ack := tree.Ack{Round: report.Round}
	c.change(func() {
		c.told = append(c.told, p)
		for _, v := range report.Verdicts {
			ack.Stored = append(ack.Stored, v.Position)
			if c.heard[v.Position] {
				continue
			}
			c.heard[v.Position] = true
			var f api.Finding
			if err := json.Unmarshal(v.Body, &f); err != nil {
				c.t.Errorf("a finding cannot be read: %v", err)
			}
			c.found = append(c.found, f)
		}
	})
	return ack.Proto()
}

// awaitFinding waits for one from the nth on that is about a condition.
func (c *controller) awaitFinding(from int, condition string) (f api.Finding, next int) {
	c.t.Helper()
	c.await("the finding "+condition, func() bool {
		for i := from; i < len(c.found); i++ {
			if c.found[i].Condition == condition {
				f, next = c.found[i], i+1
				return true
			}
		}
		return false
	})
	return f, next
}

// awaitRound waits for a summary that satisfies ok.
func (c *controller) awaitRound(what string, ok func(tally.Round) bool) (r tally.Round) {
	c.t.Helper()
	c.mu.Lock()
	seen := len(c.told)
	c.mu.Unlock()
	c.await(what, func() bool {
		for ; seen < len(c.told); seen++ {
			report, err := tree.ReportFrom(c.told[seen])
			if err != nil {
				return false
			}
			if r = tally.Read(report.Summary); ok(r) {
				return true
			}
		}
		return false
	})
	return r
}

// firstChild is the process that a pid 1 has started.
func firstChild(t *testing.T, pid int64) int {
	t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	must(t, err)
	for _, list := range lists {
		raw, err := os.ReadFile(list)
		must(t, err)
		if first, _, ok := strings.Cut(string(raw), " "); ok {
			n, err := strconv.Atoi(first)
			must(t, err)
			return n
		}
	}
	t.Fatalf("process %d has no child", pid)
	return 0
}

// idle is a command that wants little, also on a machine that has nothing left.
var idle = []string{"/usr/bin/tail", "-f", "/dev/null"}

func TestATaskThatStandsStillIsFoundOnceAndFoundWellAgainOnce(t *testing.T) {
	t.Parallel()
	c := newController(t)
	c.addNode("east-0")
	c.place("east-0", alone)
	ref := &agentpb.TaskRef{Job: "j-stop", Run: 4}
	spec := api.JobSpec{Command: idle, CPUs: 1, MemBytes: 64 << 20, StarvationPeriodMS: 2500}
	started := c.mustDo("east-0", ref, &agentpb.StartTask{Spec: specJSON(t, spec)}).GetStarted()
	round := c.awaitRound("the job's figures", func(r tally.Round) bool { return r.Jobs["j-stop"].Tasks == 1 })
	if node, job := round.Nodes["east-0"], round.Jobs["j-stop"]; node.Tasks != 1 || node.MemBytes == 0 || node.DiskBytes == 0 || job.Tasks != 1 || job.CPUsDue != 1 || job.MemUsed == 0 {
		t.Errorf("the summary says %+v of the node and %+v of the job", node, job)
	}

	must(t, syscall.Kill(firstChild(t, started.GetPid()), syscall.SIGSTOP))
	f, next := c.awaitFinding(0, "no_progress")
	if f.Job != "j-stop" || f.Run != 4 || f.Node != "east-0" || f.Kind != api.FindingStarvation || f.Spins || f.Severity != 1 || f.Since == nil || !strings.Contains(f.Explanation, "stopped by a signal") {
		t.Errorf("found %+v", f)
	}
	c.awaitRound("the trouble in the figures", func(r tally.Round) bool { return r.Jobs["j-stop"].Troubled == 1 && r.Nodes["east-0"].Troubled == 1 })

	must(t, syscall.Kill(firstChild(t, started.GetPid()), syscall.SIGCONT))
	_, next = c.awaitFinding(next, api.ConditionHealthy)
	c.awaitRound("the end of the trouble in the figures", func(r tally.Round) bool { return r.Jobs["j-stop"].Troubled == 0 })
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.found) != 2 || next != 2 {
		t.Errorf("found %+v, want the trouble and its end", c.found)
	}
}

func TestATaskThatIsStoppedOnPurposeIsNotFound(t *testing.T) {
	t.Parallel()
	c := newController(t)
	c.plan.Tasks = 2
	c.addNode("east-0")
	c.place("east-0", alone)
	spec := api.JobSpec{Command: idle, Tasks: 2, CPUs: 1, MemBytes: 64 << 20, StarvationPeriodMS: 2500}
	secret := make([]byte, 32)
	ref := &agentpb.TaskRef{Job: "j-stop", Run: 1}
	c.mustDo("east-0", ref, &agentpb.StartTask{Spec: specJSON(t, spec), Secret: secret})
	other := &agentpb.TaskRef{Job: "j-stop", Index: 1, Run: 1}
	started := c.mustDo("east-0", other, &agentpb.StartTask{Spec: specJSON(t, spec), VirtualIp: "10.77.0.2", Secret: secret}).GetStarted()
	c.awaitRound("the job's figures", func(r tally.Round) bool { return r.Jobs["j-stop"].Tasks == 2 })
	c.mustDo("east-0", ref, &agentpb.SignalTask{Signal: int32(syscall.SIGSTOP)})
	// Both are measured at the same moments: when the other is found, this one
	// would be, too.
	must(t, syscall.Kill(firstChild(t, started.GetPid()), syscall.SIGSTOP))
	c.awaitFinding(0, "no_progress")
	c.awaitRound("one task in trouble", func(r tally.Round) bool { return r.Jobs["j-stop"].Troubled == 1 })
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.found {
		if f.Task != 1 {
			t.Errorf("found %+v, want only the task that was stopped from outside", f)
		}
	}
}

func TestProgressIsHeardAlsoAfterARestore(t *testing.T) {
	t.Parallel()
	c := newController(t)
	c.addNode("east-0")
	c.place("east-0", alone)
	spec := api.JobSpec{
		Command: []string{"/bin/sh", "-c", "i=0; while sleep 0.1; do i=$((i+1)); echo step $i; done"},
		CPUs:    1, MemBytes: 64 << 20, StarvationPeriodMS: 2500, ProgressRegex: `^step (\d+)`,
	}
	heard := func(r tally.Round) bool { return r.Jobs["j-step"].Reporting == 1 && r.Jobs["j-step"].Progress > 60 }
	ref := c.start("east-0", "j-step", spec)
	c.awaitRound("the progress", heard)
	c.checkpoint("east-0", ref, "c-step")
	c.mustDo("east-0", ref, &agentpb.DestroyTask{})
	c.awaitRound("the end of the task", func(r tally.Round) bool { return len(r.Jobs) == 0 })
	c.restore("east-0", ref, "c-step", spec)
	c.awaitRound("the progress of the restored task", heard)
}

// A sample comes half a second before each round of the tree that its period ends
// with, and once a period, whenever the last one was taken.
func TestSamplesAreTakenAheadOfTheRound(t *testing.T) {
	at := func(seconds float64) time.Time {
		return time.Unix(1_800_000_000, 0).Add(time.Duration(seconds * float64(time.Second)))
	}
	for _, c := range []struct {
		now, want float64
		period    time.Duration
	}{
		{0, 9.5, 10 * time.Second}, {9.4, 9.5, 10 * time.Second}, {9.5, 19.5, 10 * time.Second}, {9.9, 19.5, 10 * time.Second}, {10.1, 19.5, 10 * time.Second},
		{2.5, 5.5, 3 * time.Second}, {2, 4.5, 2500 * time.Millisecond},
	} {
		if got := nextSample(at(c.now), c.period); !got.Equal(at(c.want)) {
			t.Errorf("after %v every %v: at %v, want %v", c.now, c.period, got.Sub(at(0)).Seconds(), c.want)
		}
	}
}
