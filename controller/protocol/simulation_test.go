package protocol

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"

	"dormouse/api"
)

// Each seed is one history of one job of up to 64 tasks on up to 64 nodes:
// started, checkpointed, suspended, resumed and restarted while messages are
// lost, late, repeated and out of order, agents and the controller crash, nodes
// lose their power or their way to the controller. Then faults cease, and it
// must come to rest.
//
//	DORMOUSE_SEEDS=100000  so many seeds instead of 2,000
//	DORMOUSE_SEED=17       only this one, with its trace
func TestSimulation(t *testing.T) {
	if text := os.Getenv("DORMOUSE_SEED"); text != "" {
		seed, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		w, problem := simulate(seed, true, "")
		t.Logf("%s\nproblem: %v", strings.Join(w.trace, "\n"), problem)
		if problem != "" {
			t.Fail()
		}
		return
	}
	seeds := uint64(2000)
	if text := os.Getenv("DORMOUSE_SEEDS"); text != "" {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seeds = n
	}
	ends := map[string]int{}
	for seed := range seeds {
		w, problem := simulate(seed, false, "")
		for kind, n := range w.settled {
			ends[kind] += n
		}
		if problem != "" {
			w, _ = simulate(seed, true, "")
			last := w.trace[max(0, len(w.trace)-60):]
			t.Fatalf("seed %d: %s\nrepeat with: DORMOUSE_SEED=%d go test -v -run Simulation ./controller/protocol\n%s",
				seed, problem, seed, strings.Join(last, "\n"))
		}
	}
	t.Logf("%d jobs, operations: %v", seeds, ends)
}

// A protocol with a known bug does not pass.
func TestSimulationFindsPlantedBugs(t *testing.T) {
	for _, bug := range []string{"thaw early", "missing part", "no open", "no look back"} {
		found := ""
		for seed := uint64(0); seed < 500 && found == ""; seed++ {
			_, found = simulate(seed, false, bug)
		}
		if found == "" {
			t.Errorf("%q was not found", bug)
		}
		t.Logf("%s: %s", bug, found)
	}
}

func simulate(seed uint64, tracing bool, planted string) (w *world, problem string) {
	w = &world{Rand: rand.New(rand.NewPCG(seed, 1)), tracing: tracing, planted: planted, faults: true, repo: map[string][]*piece{}, settled: map[string]int{}}
	defer func() {
		if r := recover(); r != nil {
			b, ok := r.(broken)
			if !ok {
				panic(r)
			}
			problem = string(b)
			w.note("%s", problem)
		}
	}()
	most := []int{1, 2, 4, 8, 64}[w.IntN(5)]
	w.tasks = 1 + w.IntN(most)
	w.running = make([]int, w.tasks)
	w.disk = disk{phase: api.PhasePending, cleanups: map[string]cleanup{}, lostNodes: map[int]bool{}, hellos: map[int]int{}}
	for n := range 1 + w.IntN(most) {
		a := &agent{w: w, node: n, power: true, onDisk: w.IntN(2) == 0, boxes: map[ref]*box{},
			captures: map[string]*taken{}, uploads: map[string]*piece{}, replies: map[string]*reply{}, laneUntil: map[string]int64{}}
		w.agents = append(w.agents, a)
	}
	w.startController()
	for _, a := range w.agents {
		a.boot()
	}
	w.wish()
	w.mishap()
	for end := w.between(20000, 90000); w.now < end; {
		w.step()
	}
	w.note("faults cease")
	w.faults = false
	for _, a := range w.agents {
		a.cutOff = false
	}
	for end := w.now + 600000; !w.atRest(); {
		if w.now > end {
			w.fail("it does not come to rest: %s", w.unrest())
		}
		w.step()
	}
	return w, ""
}

// wish asks for operations, as long as there are faults, and then only what
// brings the job to run.
func (w *world) wish() {
	if w.c != nil && (w.faults || w.disk.phase == api.PhasePending || w.disk.phase == api.PhaseFailed) {
		w.c.want()
	}
	w.after(w.between(10, 1500), w.wish)
}

// mishap breaks something, now and then.
func (w *world) mishap() {
	if !w.faults {
		return
	}
	a := w.agents[w.IntN(len(w.agents))]
	if n := w.disk.nodes; len(n) > 0 {
		a = w.agents[n[w.IntN(len(n))]]
	}
	switch w.IntN(8) {
	case 0, 1:
		w.crashController()
	case 2, 3:
		if a.alive {
			a.crash()
		}
	case 4:
		if a.power && w.IntN(2) == 0 {
			a.cutPower()
		}
	case 5:
		w.note("node %d is cut off", a.node)
		a.cutOff = true
		w.after(w.between(500, 20000), func() { a.cutOff = false })
	case 6:
		if a.session != nil {
			w.endSession(a.session)
		}
	}
	w.after(w.between(10, 9000), w.mishap)
}

// publish is the write of a manifest.
func (w *world) publish(checkpoint string, parts []*piece) {
	if w.planted == "missing part" && len(parts) > 1 {
		parts = parts[1:]
	}
	w.note("%s is published", checkpoint)
	if len(parts) != w.tasks {
		w.fail("%s has %d parts of %d tasks", checkpoint, len(parts), w.tasks)
	}
	for i, p := range parts {
		if p == nil || p.ended == 0 {
			w.fail("%s has no part of task %d", checkpoint, i)
		}
		if p.task != (ref{i, w.disk.run}) {
			w.fail("%s has %v as the part of task %d of run %d", checkpoint, p.task, i, w.disk.run)
		}
		for _, q := range parts {
			if q == nil || p.frozen > q.begun || p.thawed != 0 && p.thawed < q.ended {
				w.fail("%s is inconsistent: task %d ran while another was captured: %+v, %+v", checkpoint, i, p, q)
			}
		}
	}
	w.repo[checkpoint] = parts
}

// checkConnected looks at a job that runs after its operation ended.
func (w *world) checkConnected() {
	for i, n := range w.disk.nodes {
		b := w.agents[n].boxes[ref{i, w.disk.run}]
		if b == nil || w.disk.lost[i] || w.disk.lostNodes[n] {
			continue // it is recovered next
		}
		if b.cut || b.checkpoint != "" || !b.complete {
			w.fail("the job runs and task %d is cut %v, frozen %q, complete %v", i, b.cut, b.checkpoint, b.complete)
		}
	}
}

func (w *world) atRest() bool { return w.unrest() == "" }

// unrest is what is not as it must be in the end.
func (w *world) unrest() string {
	d := &w.disk
	switch {
	case w.c == nil:
		return "there is no controller"
	case d.op != nil:
		return fmt.Sprintf("operation %s is under way at %s", d.op.kind, d.op.state)
	case len(d.cleanups) > 0:
		return fmt.Sprintf("not cleaned up: %v", d.cleanups)
	case d.phase != api.PhaseRunning && d.phase != api.PhaseSuspended:
		return fmt.Sprintf("the job is %s", d.phase)
	case d.phase == api.PhaseSuspended && (len(d.durable) == 0 || w.repo[d.durable[len(d.durable)-1]] == nil):
		return "the job is suspended without a checkpoint"
	}
	boxes := 0
	for _, a := range w.agents {
		if !a.alive || a.session == nil || !a.session.open {
			return fmt.Sprintf("node %d is not there", a.node)
		}
		if len(a.captures)+len(a.uploads) > 0 {
			return fmt.Sprintf("node %d keeps captures: %v %v", a.node, a.captures, a.uploads)
		}
		boxes += len(a.boxes)
		for _, b := range a.boxes {
			if !b.runs || b.cut || b.byLease || b.held {
				return fmt.Sprintf("task %v on node %d: %+v", b.task, a.node, *b)
			}
		}
	}
	want := 0
	if d.phase == api.PhaseRunning {
		want = w.tasks
	}
	if boxes != want {
		return fmt.Sprintf("%d tasks of a job of %d that is %s", boxes, w.tasks, d.phase)
	}
	return ""
}
