package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"dormouse/api"
	"dormouse/controller/scheduler"
	"dormouse/controller/store"
)

// A job that is kept from working is suspended, or moved, as its policy says. It
// is suspended as by command, but comes back by itself: to a node where it can
// breathe, or after a while to any. How much of this there may be is bounded:
//
//   - a job is relieved at most once in Relief.Gap, then in twice that, and so on
//     as long as it does not run undisturbed for as long in between;
//   - at most Relief.AtOnce jobs of a cloud are at once;
//   - of the jobs on one node only one is, the least important, and then the
//     others are judged anew: there may be enough for them now.
//
// Nothing is lost by that: a job that still starves is looked at in each round.

// Relief bounds what is done about jobs that are kept from working. A zero field
// gets the value named beside it.
type Relief struct {
	Policy  string        // for jobs that name none; suspend
	Gap     time.Duration // between two for one job, at first; 10 min
	AtOnce  int           // jobs of a cloud; 2
	Lull    time.Duration // after one on a node, before another there; 30 s, three periods
	Rest    time.Duration // that a suspended job sleeps at least, at first; 30 s
	Patient time.Duration // that it waits for a node that is not pressed; 10 min
}

const longestGap = 4 * time.Hour

func (r Relief) filled() Relief {
	setDefault(&r.Gap, 10*time.Minute)
	setDefault(&r.Lull, 30*time.Second)
	setDefault(&r.Rest, 30*time.Second)
	setDefault(&r.Patient, 10*time.Minute)
	if r.AtOnce <= 0 {
		r.AtOnce = 2
	}
	r.Policy = cmp.Or(r.Policy, api.StarvationSuspend)
	return r
}

// policy is what is done about a job.
func (r Relief) policy(job *jobRecord) string { return cmp.Or(job.Spec.OnStarvation, r.Policy) }

// relief is what was done last about a job that was kept from working.
type relief struct {
	At    time.Time `json:"at"`
	Count int       `json:"count"` // in a row
	Nodes []string  `json:"nodes,omitempty"`
}

// doubled is a time that doubles with each relief in a row.
func (r relief) doubled(first time.Duration) time.Duration {
	return first << max(0, min(r.Count-1, 10))
}

// again is when the job may be relieved again.
func (r relief) again(bounds Relief) time.Time {
	if r.Count == 0 {
		return time.Time{}
	}
	return r.At.Add(min(r.doubled(bounds.Gap), longestGap))
}

// reliefDecision is what is done about one job; the action is for people, and nothing
// is done unless do is set.
type reliefDecision struct {
	job    string
	do     bool
	action string
}

// decideRelief decides about all jobs that starve. stuck says why a job cannot be
// moved to another node; empty: it can. It is a pure function: the same records at
// the same time have the same answer.
func decideRelief(jobs []*jobRecord, bounds Relief, stuck func(*jobRecord) string, now time.Time) []reliefDecision {
	var starving []*jobRecord
	busy := make(map[string]int)      // jobs that are being relieved, by cloud
	lull := make(map[string]relieved) // what was done last on a node
	for _, j := range jobs {
		if j.Phase == api.PhaseSuspending && j.Yield != nil && j.Yield.Starved != "" {
			busy[j.Cloud]++
		}
		for _, n := range j.Relief.Nodes {
			if j.Relief.At.After(lull[n].at) {
				lull[n] = relieved{j.ID, j.Relief.At}
			}
		}
		if j.Phase == api.PhaseRunning && j.Starvation != nil {
			starving = append(starving, j)
		}
	}
	slices.SortFunc(starving, func(a, b *jobRecord) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), a.Starvation.Since.Compare(b.Starvation.Since), cmp.Compare(a.ID, b.ID))
	})
	decisions := make([]reliefDecision, 0, len(starving))
	for _, j := range starving {
		d := reliefDecision{job: j.ID}
		last := lull[j.Starvation.Node]
		switch policy := bounds.policy(j); {
		case policy == api.StarvationNotify || policy == api.StarvationIgnore:
			d.action = "nothing is done: its policy is " + policy
		case now.Before(j.Relief.again(bounds)):
			d.action = fmt.Sprintf("nothing is done before %s: it was taken off its place for this at %s",
				j.Relief.again(bounds).Format(time.TimeOnly), j.Relief.At.Format(time.TimeOnly))
		case j.Operation != "":
			d.action = fmt.Sprintf("waits until operation %s has ended", j.Operation)
		case busy[j.Cloud] >= bounds.AtOnce:
			d.action = fmt.Sprintf("waits: %d jobs of cloud %s are suspended at once for this", bounds.AtOnce, j.Cloud)
		case j.Starvation.Node != "" && last.job != j.ID && now.Before(last.at.Add(bounds.Lull)):
			d.action = fmt.Sprintf("waits until %s: job %s has just left node %s", last.at.Add(bounds.Lull).Format(time.TimeOnly), last.job, j.Starvation.Node)
		default:
			d.do, d.action = true, "is suspended, and comes back by itself"
			if policy == api.StarvationMigrate {
				d.action = "is moved to another node"
				if why := stuck(j); why != "" {
					d.do, d.action = false, "is not moved, no other node can have it: "+why
					break // and is in nobody's way
				}
			}
			busy[j.Cloud]++
			lull[j.Starvation.Node] = relieved{j.ID, now}
		}
		decisions = append(decisions, d)
	}
	return decisions
}

// relieved is a job that was taken off a node, and when.
type relieved struct {
	job string
	at  time.Time
}

// relieve does what is due about jobs that starve. It is called in each round.
func (c *Controller) relieve(ctx context.Context) error {
	due := false
	err := c.store.View(ctx, func(tx store.Tx) error { // spares the writers' lock
		jobs, err := c.jobs.all(tx)
		if err != nil {
			return err
		}
		byID := make(map[string]*jobRecord)
		for _, j := range jobs {
			if j.Starvation != nil {
				byID[j.ID] = j
			}
		}
		if len(byID) == 0 {
			return nil
		}
		decisions, err := c.decideRelief(tx, jobs)
		due = slices.ContainsFunc(decisions, func(d reliefDecision) bool {
			return d.do || byID[d.job].Starvation.Action != d.action
		})
		return err
	})
	if err != nil || !due {
		return err
	}
	return c.store.Update(ctx, func(tx store.Tx) error {
		jobs, err := c.jobs.all(tx)
		if err != nil {
			return err
		}
		decisions, err := c.decideRelief(tx, jobs)
		if err != nil {
			return err
		}
		for _, d := range decisions {
			if err := c.carryOutRelief(tx, d); err != nil {
				return err
			}
		}
		return nil
	})
}

func (c *Controller) decideRelief(tx store.Tx, jobs []*jobRecord) (decisions []reliefDecision, err error) {
	stuck := func(job *jobRecord) string {
		why, failed := c.nowhereElse(tx, job)
		err = errors.Join(err, failed)
		return why
	}
	decisions = decideRelief(jobs, c.parts.Relief, stuck, c.clock.Now().UTC())
	return decisions, err
}

// carryOutRelief writes what was decided about a job, and begins what follows.
func (c *Controller) carryOutRelief(tx store.Tx, d reliefDecision) error {
	job, err := getJob(tx, d.job)
	if err != nil || job.Starvation == nil || !d.do && job.Starvation.Action == d.action {
		return err
	}
	now := c.parts.Relief.policy(job) == api.StarvationMigrate
	job.Starvation.Action = d.action
	if !d.do {
		return putJob(tx, job)
	}
	at := c.clock.Now().UTC()
	if left := job.Relief.again(c.parts.Relief).Sub(job.Relief.At); at.Sub(job.Relief.At) > 2*left {
		job.Relief.Count = 0 // it ran undisturbed for long
	}
	nodes := job.starvedOn()
	job.Relief = relief{At: at, Count: job.Relief.Count + 1, Nodes: nodes}
	job.Yield = &yield{Since: at, Starved: job.Starvation.Explanation, Nodes: nodes, Now: now, Patient: true}
	job.Phase, job.Reason = api.PhaseSuspending, job.Yield.text()
	c.logJob(job)
	c.metrics.reliefs.WithLabelValues(c.parts.Relief.policy(job)).Inc()
	message := d.action + ": " + job.Starvation.Explanation
	if err := c.emit(tx, api.Event{Job: job.ID, Type: "starvation", Node: job.Starvation.Node, Message: message}); err != nil {
		return err
	}
	_, err = c.beginCapture(tx, api.OpSuspend, job, request{Trigger: api.TriggerStarvation, Why: job.Reason})
	return err
}

// starvedOn are the nodes that are at fault: the straggler's or, where all tasks
// are alike, all.
func (j *jobRecord) starvedOn() []string {
	if j.Starvation.Node != "" {
		return []string{j.Starvation.Node}
	}
	var nodes []string
	for _, ref := range j.refs() {
		nodes = append(nodes, ref.Node)
	}
	return unique(nodes)
}

// nowhereElse says why a job cannot be moved off the nodes where it starves;
// empty: it can.
func (c *Controller) nowhereElse(tx store.Tx, job *jobRecord) (string, error) {
	s, err := c.survey(tx)
	if err != nil {
		return "", err
	}
	moved := *job
	moved.Phase, moved.Operation = api.PhaseSuspended, ""
	moved.Yield = &yield{Since: c.clock.Now(), Starved: "it", Nodes: job.starvedOn(), Now: true, Patient: true}
	s.running = slices.DeleteFunc(s.running, func(r scheduler.Running) bool { return r.ID == job.ID })
	s.queue = append(s.queue, s.waiting(&moved, c.clock.Now()))
	for _, d := range s.decide() {
		if d.ID == job.ID && d.Placement != nil {
			return "", nil
		}
		if d.ID == job.ID {
			return d.Reason, nil
		}
	}
	return "many jobs are ahead", nil
}

// concludeRelief puts a job that was suspended for starvation into the queue.
func (c *Controller) concludeRelief(tx store.Tx, op *opRecord, job *jobRecord) error {
	now := c.clock.Now().UTC()
	job.History.rest(now)
	job.Phase, job.Reason = api.PhaseSuspended, job.Yield.text()+", comes back when there is healthy room"
	if !job.Yield.Now {
		job.Yield.NotBefore = now.Add(min(job.Relief.doubled(c.parts.Relief.Rest), c.parts.Relief.Gap))
		job.Yield.Why = fmt.Sprintf("it sleeps until %s at least", job.Yield.NotBefore.Format(time.TimeOnly))
	}
	for i := range job.TaskStatus {
		job.TaskStatus[i].Phase, job.TaskStatus[i].Pid = api.PhaseSuspended, 0
	}
	c.logJob(job)
	return c.emit(tx, api.Event{Job: job.ID, Type: "suspended", Message: job.Reason + "; sleeps in checkpoint " + op.Checkpoint})
}

// pressed says of nodes what they are short of: by what they measure, and by what
// is found of the tasks on them.
func (c *Controller) pressed(jobs []*jobRecord, now time.Time) map[string]string {
	pressed := c.monitor.pressed(now)
	for _, j := range jobs {
		if j.Phase != api.PhaseRunning {
			continue
		}
		for _, t := range j.TaskStatus {
			if t.Starvation != nil && short(t.Starvation.Condition) {
				pressed[t.Node] = fmt.Sprintf("node %s starves job %s (%s)", t.Node, j.ID, t.Starvation.Condition)
			}
		}
	}
	return pressed
}

// breathe keeps a job that starved from the nodes where it would again.
func (s *survey) breathe(w *scheduler.Waiting, y *yield, now time.Time) {
	patient := now.Before(y.Since.Add(s.patient))
	left := func(node string) bool { return y.Now && slices.Contains(y.Nodes, node) }
	if !patient {
		for node := range s.pressed {
			w.Request.Avoid = append(w.Request.Avoid, node)
		}
		slices.Sort(w.Request.Avoid)
		return
	}
	if len(s.pressed) == 0 && !y.Now {
		return
	}
	s.note(now.Add(s.round)) // what nodes measure is no change of the store
	before := w.Request.Unfit
	w.Request.Unfit = func(n scheduler.Node) string {
		switch {
		case left(n.ID):
			return fmt.Sprintf("node %s is where it starved", n.ID)
		case s.pressed[n.ID] != "":
			return s.pressed[n.ID]
		case before != nil:
			return before(n)
		}
		return ""
	}
}

// What is measured of a node makes it pressed from these shares of the time on.
// That something waits for a CPU does not: on a machine with more to do than
// processors something always does, and each task may still have its due.
const (
	pressedMemory = 0.2  // everything stands still for memory
	pressedIO     = 0.4  // or for I/O
	pressedBusy   = 0.95 // of the CPUs
)

// pressed says of nodes what the last round has shown them to be short of.
func (m *monitor) pressed(now time.Time) map[string]string {
	pressed := make(map[string]string)
	last := m.last()
	if now.Sub(last.at) > 3*m.c.parts.Round {
		return pressed
	}
	for id, n := range last.round.Nodes {
		switch {
		case n.MemoryStall >= pressedMemory:
			pressed[id] = fmt.Sprintf("on node %s everything stands still for memory %.0f %% of the time", id, 100*n.MemoryStall)
		case n.IOStall >= pressedIO:
			pressed[id] = fmt.Sprintf("on node %s everything stands still for I/O %.0f %% of the time", id, 100*n.IOStall)
		case n.CPUs > 0 && n.CPUsBusy >= pressedBusy*n.CPUs:
			pressed[id] = fmt.Sprintf("the CPUs of node %s are %.0f %% busy", id, 100*n.CPUsBusy/n.CPUs)
		}
	}
	return pressed
}
