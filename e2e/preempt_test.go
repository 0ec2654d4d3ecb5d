package e2e

import (
	"slices"
	"strings"
	"testing"

	"dormouse/api"
)

// counting counts until it is asked to end: its output tells whether a line was
// lost or repeated on the way.
var counting = slices.Concat(untilAsked, []string{"--", "sh", "-c", "i=0; while [ ! -e $STOP_FILE ]; do i=$((i+1)); echo $i; sleep 0.02; done"})

// countsToItsEnd has a job that counts end and checks what it has written.
func (p *platform) countsToItsEnd(job string) {
	p.t.Helper()
	p.stop(job)
	counts(p.t, p.completes(job))
}

// submitWith submits a job with flags before its command.
func (p *platform) submitWith(command []string, flags ...string) string {
	p.t.Helper()
	return p.submit(append(flags, command...)...)
}

func TestUrgentJobPreemptsAndTheVictimComesBack(t *testing.T) {
	t.Parallel()
	p := onOwn(t, built.bin, nil, "--cloud", "east=1", "--cpus", "1", "--mem", "1G")
	low := p.submitWith(counting, "--name", "low")
	p.waitLines(low, 10)
	equal := p.submitWith(counting, "--name", "equal")
	p.until(equal, "it says why it waits", func() bool {
		return strings.HasPrefix(p.inspect(equal).Reason, "waits for room: needs 1 cpu and 512 MiB on one node, and the most that is free is 0 cpus")
	})
	high := p.submitWith(counting, "--name", "high", "--priority", "10")
	p.waitFor(high, api.PhaseRunning)
	victim := p.inspect(low)
	if victim.Phase != api.PhaseSuspended || !victim.Queued || !strings.HasPrefix(victim.Reason, "preempted by job "+high) {
		t.Errorf("the victim is %s, queued %v: %s", victim.Phase, victim.Queued, victim.Reason)
	}
	checkpoints := decode[[]api.Checkpoint](p, "checkpoints", low)
	if len(checkpoints) != 1 || checkpoints[0].State != api.CheckpointDurable || checkpoints[0].Trigger != api.TriggerPreempt {
		t.Errorf("the victim's checkpoints: %+v", checkpoints)
	}
	for _, job := range []string{high, low, equal} {
		p.countsToItsEnd(job)
	}
	if restarts := p.inspect(low).Restarts; restarts != 1 {
		t.Errorf("the victim was restored %d times", restarts)
	}
}

func TestSwapPutsOneJobWhereAnotherIs(t *testing.T) {
	t.Parallel()
	p := onOwn(t, built.bin, nil, "--cloud", "east=1", "--cpus", "1", "--mem", "1G")
	out := p.submitWith(counting, "--priority", "5")
	p.waitLines(out, 10)
	in := p.submitWith(counting)
	plan := decode[api.PreemptPlan](p, "swap", out, in, "--dry-run")
	if len(plan.Out) != 1 || plan.Out[0].Job != out || plan.Bytes <= 0 || plan.In == nil || !slices.Equal(plan.In.Nodes, []string{p.node(out)}) {
		t.Errorf("the plan: %+v", plan)
	}
	if p.inspect(out).Phase != api.PhaseRunning || len(decode[[]api.Checkpoint](p, "checkpoints", out)) != 0 {
		t.Fatal("a plan was carried out")
	}
	node := p.node(out)
	p.run("swap", out, in)
	if got := p.inspect(in); got.TaskStatus[0].Node != node || got.Restarts != 0 {
		t.Errorf("job %s is on %s after %d restarts, expected on %s", in, got.TaskStatus[0].Node, got.Restarts, node)
	}
	if got := p.try("swap", out, out); got.status != refused {
		t.Errorf("a job swapped for itself: exit status %d: %s", got.status, got.stderr)
	}
	p.countsToItsEnd(in)
	p.countsToItsEnd(out) // it came back by itself
	if restarts := p.inspect(out).Restarts; restarts != 1 {
		t.Errorf("the job that was swapped out was restored %d times", restarts)
	}
}

func TestPreemptAndDrainMoveJobs(t *testing.T) {
	t.Parallel()
	p := onOwn(t, built.bin, nil, "--cloud", "east=2", "--cpus", "1", "--mem", "1G")
	job := p.submitWith(counting, "--name", "moves")
	p.waitLines(job, 10)
	before := p.node(job)
	p.run("drain", before)
	detail := p.waitFor(job, api.PhaseRunning)
	after := detail.TaskStatus[0].Node
	if after == before || detail.Restarts != 1 {
		t.Errorf("the job is on %s after %d restarts; it was on %s, which was drained", after, detail.Restarts, before)
	}
	if checkpoints := decode[[]api.Checkpoint](p, "checkpoints", job); checkpoints[len(checkpoints)-1].Trigger != api.TriggerDrain {
		t.Errorf("the checkpoint's trigger is %s", checkpoints[len(checkpoints)-1].Trigger)
	}
	for _, node := range decode[[]api.Node](p, "nodes") {
		want := api.NodeReady
		if node.Name == before {
			want = api.NodeCordoned
		}
		if node.State != want {
			t.Errorf("node %s is %s, expected %s", node.Name, node.State, want)
		}
	}
	p.run("uncordon", before)
	if got := p.try("uncordon", before); got.status != refused {
		t.Errorf("uncordoned twice: exit status %d: %s", got.status, got.stderr)
	}
	// Nobody else wants its place, so it is back at once.
	p.run("preempt", job)
	p.waitFor(job, api.PhaseRunning)
	p.countsToItsEnd(job)
}
