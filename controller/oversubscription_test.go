package controller

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/store"
)

// Three times more work than there is room for, with random priorities, arrivals,
// losses of nodes, broken commands and kills of the controller: a job's work is counted only while its tasks live, and
// what a checkpoint captured of it is what a restore goes on with. Every job must
// end having done all of its work, once; no node may ever hold more than it has;
// and everything must end, so no two jobs may push each other out for ever.
func TestOverSubscription(t *testing.T) {
	// One of them is enough, at 5 s each, unless by chance no job had to give way.
	swaps := 0
	for seed := uint64(0); swaps == 0 && seed < 3; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { swaps = overSubscribe(t, seed) })
	}
	if swaps == 0 {
		t.Error("no job has given way to another: nothing was tested")
	}
}

const (
	workNodes = 3
	workJobs  = 24
	workStep  = 20 * time.Millisecond
	workSteps = 40 // the most that one job takes
)

// overSubscribe returns how often a job has given way to another.
func overSubscribe(t *testing.T, seed uint64) int {
	var nodes []string
	for i := range workNodes {
		nodes = append(nodes, fmt.Sprintf("east-%d", i))
	}
	s := newSimulation(t, nodes...)
	for i, node := range nodes {
		s.renew(node, i%2 == 0)
	}
	random := rand.New(rand.NewPCG(seed, 7))
	work := newLabour(s.world)
	breaks := randomFaults(seed)
	s.setFault(func(a *simAgent, c *agentpb.Command) fault {
		work.captured(a, c)
		f := breaks(a, c)
		if !capturing(c) {
			f.failure = nil // a job that cannot be started fails, and rightly so
		}
		return f
	})
	ctx, stop := context.WithCancel(t.Context())
	var working sync.WaitGroup
	working.Go(func() { work.run(ctx) })
	defer working.Wait()
	defer stop()

	began := time.Now()
	var jobs []string
	asked, total := 0.0, map[string]int{}
	for i := range workJobs {
		spec := api.JobSpec{
			Name: fmt.Sprintf("work-%d", i), Tasks: 1 + random.IntN(2), CPUs: float64(1 + random.IntN(3)), Priority: random.IntN(4), MaxRestarts: 100,
		}
		if i%6 == 5 { // needs most of the room, whoever has it
			spec.Tasks, spec.CPUs, spec.Priority = 2, simCPUs, 4+i
		}
		need := 10 + random.IntN(workSteps-10)
		work.await(3 * i)
		id := s.submit(spec)
		work.expect(id, spec.Tasks, need)
		jobs, total[id] = append(jobs, id), need
		asked += float64(spec.Tasks) * spec.CPUs
		if i == workJobs/2 || i == workJobs-1 {
			s.killNode(nodes[random.IntN(workNodes)])
		}
		if random.IntN(3) == 0 {
			s.startLost(nodes)
		}
		if random.IntN(10) == 0 {
			s.restart() // as a kill of the controller
		}
	}
	if room := float64(simCPUs * workNodes); asked < 3*room {
		t.Fatalf("the jobs ask for %g processors and there are %g: nothing is over-subscribed", asked, room)
	}
	close(work.all)
	s.startLost(nodes)
	for _, id := range jobs {
		s.eventually("job "+id+" is over", func(tx store.Tx) (bool, error) {
			job, err := getJob(tx, id)
			return err == nil && job.Phase.Final() && job.Operation == "", err
		})
		job := s.jobNow(id)
		if job.Phase != api.PhaseCompleted {
			t.Errorf("job %s is %s: %s", id, job.Phase, job.Reason)
		}
		if done := work.done(id); done != total[id] {
			t.Errorf("job %s ended after %d steps of work, and it has %d", id, done, total[id])
		}
	}
	return s.reportSwapping(time.Since(began), jobs)
}

// capturing reports whether a command is one of a checkpoint.
func capturing(c *agentpb.Command) bool {
	return c.GetPreflight() != nil || c.GetFreeze() != nil || c.GetCapture() != nil || c.GetUpload() != nil
}

// startLost gives the nodes without power theirs back.
func (s *simulation) startLost(nodes []string) {
	s.t.Helper()
	for _, node := range nodes {
		if s.nodeNow(node).State == api.NodeLost {
			s.want(http.StatusNoContent, "POST", "/v1/nodes/"+node+"/start", nil, nil)
		}
	}
}

// reportSwapping tells what giving way has cost, from the events, and returns how
// often that was.
func (s *simulation) reportSwapping(took time.Duration, jobs []string) int {
	s.t.Helper()
	var events []api.Event
	err := s.store.View(s.t.Context(), func(tx store.Tx) (err error) {
		events, err = store.All[api.Event](tx, store.Events)
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	var out, asleep, in time.Duration
	last, swaps := map[string]api.Event{}, 0
	for _, e := range events {
		before := last[e.Job]
		switch {
		case e.Type == "preempted":
			out, swaps = out+e.Time.Sub(before.Time), swaps+1
		case e.Type == "placed" && before.Type == "preempted":
			asleep += e.Time.Sub(before.Time)
			e.Type = "woken"
		case e.Type == "running" && before.Type == "woken":
			in += e.Time.Sub(before.Time)
		}
		if e.Type != "checkpoint" { // comes between preempting and preempted
			last[e.Job] = e
		}
	}
	s.t.Logf("%d jobs in %v: %d preemptions, lost to swapping: %v to checkpoint and evict, %v to restore; asleep in between: %v",
		len(jobs), took.Round(time.Millisecond), swaps, out.Round(time.Millisecond), in.Round(time.Millisecond), asleep.Round(time.Millisecond))
	return swaps
}

// labour does the work of simulated tasks: a step of every living task at a
// time, and of a job only when all of its tasks go on.
type labour struct {
	*world
	jobs  map[string]*toil
	ticks chan struct{}             // one for each step, while jobs are still to come
	seen  int                       // of these, by await
	all   chan struct{}             // closed when all jobs were submitted
	saved map[string]map[string]int // steps done, by checkpoint and job
}

// toil is the work of one job.
type toil struct {
	tasks, need int
	run         int64
	steps       int
}

func newLabour(w *world) *labour {
	return &labour{world: w, jobs: map[string]*toil{}, ticks: make(chan struct{}), all: make(chan struct{}), saved: map[string]map[string]int{}}
}

func (l *labour) expect(job string, tasks, need int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.jobs[job] = &toil{tasks: tasks, need: need}
}

// await waits until so many steps were taken. No work is done before it is waited
// for: on a slow machine each job would be over before the next one comes.
func (l *labour) await(steps int) {
	for ; l.seen < steps; l.seen++ {
		<-l.ticks
	}
}

func (l *labour) done(job string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.jobs[job].steps
}

// captured saves what a job has done when its tasks are captured: all stand still
// then. A repeated command captures nothing.
func (l *labour) captured(a *simAgent, c *agentpb.Command) {
	l.mu.Lock()
	defer l.mu.Unlock()
	job, t := l.jobs[c.GetTask().GetJob()], a.tasks[a.refOf(c.GetTask())]
	if job == nil || t == nil || a.answers[c.GetId()] != nil {
		return
	}
	checkpoint := c.GetCapture().GetCheckpoint()
	if c.GetFreeze().GetAlone() {
		checkpoint = c.GetFreeze().GetCheckpoint()
	}
	if checkpoint != "" && checkpoint != t.captured {
		l.saved[checkpoint] = map[string]int{c.GetTask().GetJob(): job.steps}
	}
}

func (l *labour) run(ctx context.Context) {
	tick := time.NewTicker(workStep)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			select {
			case l.ticks <- struct{}{}:
			case <-l.all:
			case <-ctx.Done():
				return
			}
			for _, end := range l.step() {
				end()
			}
		case <-ctx.Done():
			return
		}
	}
}

// step lets every job whose tasks all go on do one step. It returns how to end
// the tasks that are through.
func (l *labour) step() (ends []func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, job := range l.jobs {
		going := map[taskRef]*simAgent{}
		var run int64
		for _, a := range l.agents {
			for ref, t := range a.tasks {
				if ref.Job == id && t.alive && t.frozen == "" && !t.held && !t.fenced {
					going[ref], run = a, ref.Run
					l.resume(job, ref.Run, t.log)
				}
			}
		}
		if len(going) < job.tasks || job.run != run {
			continue
		}
		if job.steps++; job.steps >= job.need {
			job.steps = job.need
			for ref, a := range going {
				ends = append(ends, func() { a.exit(ref, 0) })
			}
		}
	}
	return ends
}

// resume sets a job of a new run back to what its checkpoint has, or to nothing.
func (l *labour) resume(job *toil, run int64, log string) {
	if run <= job.run {
		return
	}
	job.run, job.steps = run, 0
	if from, restored := strings.CutPrefix(log, "restored from "); restored {
		checkpoint, _, _ := strings.Cut(from, "\n")
		for _, steps := range l.saved[checkpoint] {
			job.steps = steps
		}
	}
}
