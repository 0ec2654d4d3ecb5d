package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"dormouse/api"
	"dormouse/controller/interval"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
)

// automatic begins what jobs are due for by themselves: checkpoints, the sleep
// at the end of their walltime, and drills. What is due follows from the store
// alone (see interval), so a controller that was away catches up with one
// checkpoint per job, and another that leads goes on where this one ended.
func (c *Controller) automatic(ctx context.Context) {
	watched := c.bootTime()
	if err := c.finishRemovals(ctx); err != nil && ctx.Err() == nil {
		c.log.Warn("checkpoints that are being removed are still there: they go with the next of their jobs", "error", err)
	}
	for {
		revision := c.store.Revision()
		begun := c.clock.Now()
		next, err := c.beginDue(ctx, watched)
		if err != nil && ctx.Err() == nil {
			c.log.Error("what is due cannot be begun", "error", err)
		}
		// Looking at all jobs takes its time: at most a twentieth of all time.
		if c.pause(ctx, max(c.parts.Heartbeat, 20*c.clock.Now().Sub(begun))) != nil {
			return
		}
		if !c.awaitDue(ctx, revision, next) {
			return
		}
	}
}

// awaitDue waits until next, when it is set, or until the store changes. It
// reports false when ctx has ended.
func (c *Controller) awaitDue(ctx context.Context, revision uint64, next time.Time) bool {
	var timer <-chan time.Time
	if !next.IsZero() {
		timer = c.clock.After(max(next.Sub(c.clock.Now()), 0))
	}
	waiting, end := context.WithCancel(ctx)
	changed := make(chan struct{})
	go func() {
		defer close(changed)
		c.store.Wait(waiting, revision) // whatever it says, it is time to look
	}()
	select {
	case <-timer:
	case <-changed:
	}
	end()
	<-changed
	return ctx.Err() == nil
}

// due is something that a job is to do by itself.
type due struct {
	at    time.Time
	job   string
	cloud string
	// seen is the job's history when it became due: another one means that it was
	// done by other means.
	seen  history
	dumps bool // it makes a checkpoint, of which a cloud makes so many at once
	begin func(tx store.Tx, job *jobRecord) error
	run   func() error // instead of begin, where one transaction does not do
}

// beginDue begins what is due now, as far as the clouds' limits let it, and
// returns when the next thing is. watched is since when it was looked at.
func (c *Controller) beginDue(ctx context.Context, watched time.Time) (next time.Time, err error) {
	var all []due
	var free map[string]int
	now := c.clock.Now()
	err = c.store.View(ctx, func(tx store.Tx) error {
		jobs, err := c.jobs.all(tx)
		if err != nil {
			return err
		}
		clouds, err := c.tallies(tx)
		if err != nil {
			return err
		}
		for i := range jobs {
			all = append(all, c.dueOf(jobs[i], clouds, watched)...)
		}
		trial, err := c.drillDue(ctx, tx, jobs)
		if err != nil {
			return err
		}
		if trial != nil {
			all = append(all, *trial)
		}
		free, err = c.freeDumps(tx, jobs, clouds)
		return err
	})
	if err != nil {
		return next, err
	}
	slices.SortFunc(all, func(a, b due) int { return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.job, b.job)) })
	for _, d := range all {
		if d.at.After(now) {
			return d.at, err
		}
		if d.dumps {
			if free[d.cloud] <= 0 {
				continue // the end of another checkpoint changes the store
			}
			free[d.cloud]--
		}
		err = errors.Join(err, c.beginOne(ctx, d))
	}
	return next, err
}

// beginOne begins one thing, unless the job has become busy or something was
// done meanwhile.
func (c *Controller) beginOne(ctx context.Context, d due) error {
	if d.run != nil {
		return d.run()
	}
	return c.store.Update(ctx, func(tx store.Tx) error {
		job, err := getJob(tx, d.job)
		if err != nil {
			return ignoreNotFound(err)
		}
		if job.Operation != "" || !job.History.Durable.Equal(d.seen.Durable) || !job.History.Begun.Equal(d.seen.Begun) || job.History.Failures != d.seen.Failures {
			return nil
		}
		return d.begin(tx, job)
	})
}

// dueOf is what a job is to do by itself, now or later. A job that is busy is
// looked at again when it is not.
func (c *Controller) dueOf(job *jobRecord, clouds map[string]cloudTally, watched time.Time) (all []due) {
	if job.Phase != api.PhaseRunning || job.Operation != "" {
		return nil
	}
	one := due{job: job.ID, cloud: job.Cloud, seen: job.History, dumps: true}
	if end := job.walltimeEnds(); !end.IsZero() {
		sleep := one
		sleep.at, sleep.begin = job.sleepAt(end), c.endWalltime
		all = append(all, sleep)
	}
	if plan, planned := c.plan(job, clouds, watched); planned {
		one.at, one.begin = plan.Due, c.beginPeriodic
		all = append(all, one)
	}
	return all
}

// plan is when the job is checkpointed next, and why.
func (c *Controller) plan(job *jobRecord, clouds map[string]cloudTally, watched time.Time) (interval.Plan, bool) {
	policy, err := interval.Parse(job.Spec.CheckpointEvery)
	if err != nil || policy.IsZero() {
		return interval.Plan{}, false // it was checked when it was submitted
	}
	h := job.History
	in := interval.Job{
		ID: job.ID, Begun: h.Begun, Durable: h.Durable, Failed: h.Failed, Failures: h.Failures, Costs: h.Costs,
		Clouds: make(map[string]interval.Tally),
	}
	seen := make(map[string]bool)
	for _, t := range job.TaskStatus {
		if t.Node == "" || seen[t.Node] {
			continue
		}
		seen[t.Node] = true
		node := interval.Node{Cloud: job.Cloud}
		for name, cloud := range clouds {
			if own, here := cloud.nodes[t.Node]; here {
				node = interval.Node{Cloud: name, Own: own}
				in.Clouds[name] = cloud.all
			}
		}
		in.Nodes = append(in.Nodes, node)
	}
	return policy.For(in, c.parts.Bounds, watched)
}

// beginPeriodic begins the automatic checkpoint of a job. The records of what
// failed before do not pile up.
func (c *Controller) beginPeriodic(tx store.Tx, job *jobRecord) error {
	if job.Phase != api.PhaseRunning {
		return nil
	}
	if job.History.Failures >= keptFailures {
		if err := forgetFailed(tx, job); err != nil {
			return err
		}
	}
	_, err := c.beginCapture(tx, api.OpCheckpoint, job, request{Trigger: api.TriggerPeriodic})
	return err
}

// longestStart is how long a request waits for a start that is under way.
const longestStart = 10 * time.Second

// afterOwn waits, for a while, until a job is not busy any more with what nobody
// waited for: its start, when its program can be seen to run already, or an
// automatic checkpoint. Nobody is refused because of these.
func (c *Controller) afterOwn(ctx context.Context, ref string) error {
	err := c.whileBusy(ctx, ref, longestStart, func(op *opRecord) (bool, error) { return op.Kind == api.OpStart, nil })
	if err != nil {
		return err
	}
	return c.whileBusy(ctx, ref, longestWait, func(op *opRecord) (bool, error) {
		ask, err := op.request()
		return op.Kind == api.OpCheckpoint && ask.Trigger == api.TriggerPeriodic, err
	})
}

// whileBusy waits as long as a job is busy with such an operation, and at most so long.
func (c *Controller) whileBusy(ctx context.Context, ref string, longest time.Duration, such func(op *opRecord) (bool, error)) error {
	_, err := c.until(ctx, c.clock.After(longest), func(tx store.Tx) (bool, error) {
		job, err := findJob(tx, ref)
		if err != nil || job.Operation == "" {
			return true, err
		}
		op, err := getOperation(tx, job.Operation)
		if err != nil {
			return true, err
		}
		busy, err := such(op)
		return !busy, err
	})
	return err
}

// walltimeEnds is when the job's time is over; zero: never.
func (j *jobRecord) walltimeEnds() time.Time {
	if j.Spec.WalltimeMS == 0 || j.History.Awake.IsZero() || j.Phase != api.PhaseRunning {
		return time.Time{}
	}
	return j.History.Awake.Add(time.Duration(j.Spec.WalltimeMS)*time.Millisecond - j.History.Ran)
}

// sleepAt is when the job's last checkpoint must begin to be durable when its
// walltime ends, or when to try again.
func (j *jobRecord) sleepAt(end time.Time) time.Time {
	at := end.Add(-interval.Lead(j.History.Costs, time.Duration(j.Spec.WalltimeMS)*time.Millisecond))
	if again := j.History.Failed.Add(interval.Again(j.History.Failures)); j.History.Failures > 0 && again.After(at) {
		return again
	}
	return at
}

// endWalltime suspends a job whose walltime is about to end.
func (c *Controller) endWalltime(tx store.Tx, job *jobRecord) error {
	if job.Phase != api.PhaseRunning {
		return nil
	}
	walltime := time.Duration(job.Spec.WalltimeMS) * time.Millisecond
	job.Phase, job.Reason = api.PhaseSuspending, fmt.Sprintf("its walltime of %s ends", walltime)
	_, err := c.beginCapture(tx, api.OpSuspend, job, request{Trigger: api.TriggerSuspend, Why: fmt.Sprintf("its walltime of %s is over", walltime)})
	return err
}

// cloudTally is what was seen of a cloud's nodes until now.
type cloudTally struct {
	all   interval.Tally
	nodes map[string]interval.Tally
	up    int // nodes that may run tasks
}

// tallies brings what was seen of all nodes up to now.
func (c *Controller) tallies(tx store.Tx) (map[string]cloudTally, error) {
	records, err := c.nodes.all(tx)
	if err != nil {
		return nil, err
	}
	now := c.clock.Now().UTC()
	clouds := make(map[string]cloudTally)
	for _, n := range records {
		cloud, known := clouds[n.Cloud]
		if !known {
			cloud.nodes = make(map[string]interval.Tally)
		}
		own := n.Tally.After(now, up(n.State))
		cloud.nodes[n.ID], cloud.all = own, cloud.all.Plus(own)
		if up(n.State) {
			cloud.up++
		}
		clouds[n.Cloud] = cloud
	}
	return clouds, nil
}

// freeDumps is how many more checkpoints each cloud may make now.
func (c *Controller) freeDumps(tx store.Tx, jobs []*jobRecord, clouds map[string]cloudTally) (map[string]int, error) {
	free := make(map[string]int)
	for name, tally := range clouds {
		free[name] = c.dumpLimit(name, tally)
	}
	for i := range jobs {
		busy, err := c.dumping(tx, jobs[i])
		if err != nil {
			return nil, err
		}
		if busy {
			free[jobs[i].Cloud]--
		}
	}
	return free, nil
}

func (c *Controller) dumpLimit(name string, tally cloudTally) int {
	if cloud, known := c.cloud(name); known && cloud.Dumps > 0 {
		return cloud.Dumps
	}
	return max(tally.up, 1)
}

// dumping reports whether a checkpoint of the job is being made and is not in
// the repository yet.
func (c *Controller) dumping(tx store.Tx, job *jobRecord) (bool, error) {
	if job.Operation == "" {
		return false, nil
	}
	op, err := c.operations.get(tx, job.Operation)
	if err != nil {
		return false, err
	}
	switch op.Step {
	case protocol.StepPreflight, protocol.StepFreeze, protocol.StepCapture, protocol.StepThaw, protocol.StepUpload, protocol.StepPublish:
		return true, nil
	case protocol.StepOpen:
		return op.Kind == api.OpCheckpoint, nil
	}
	return false, nil
}

// explainedJob is a job as it is shown, with why it will be checkpointed when.
func (c *Controller) explainedJob(ctx context.Context, ref string) (detail api.JobDetail, err error) {
	err = c.store.View(ctx, func(tx store.Tx) error {
		job, err := findJob(tx, ref)
		if err != nil {
			return err
		}
		detail = job.JobDetail
		if end := job.walltimeEnds(); !end.IsZero() {
			detail.WalltimeEnds = &end
		}
		detail.Automatic, err = c.explain(tx, job)
		return err
	})
	return detail, err
}

// explain tells when and why a job is checkpointed by itself; nil when it is
// not.
func (c *Controller) explain(tx store.Tx, job *jobRecord) (*api.Automatic, error) {
	if job.Spec.CheckpointEvery == "" || job.Phase.Final() {
		return nil, nil
	}
	clouds, err := c.tallies(tx)
	if err != nil {
		return nil, err
	}
	plan, planned := c.plan(job, clouds, c.bootTime())
	if !planned {
		return nil, nil
	}
	a := &api.Automatic{
		Policy: plan.Policy.String(), IntervalMS: inMilliseconds(plan.Interval), Why: plan.Why(),
		Failures: plan.Failures, Inputs: explainInputs(plan.Auto),
	}
	if job.Phase != api.PhaseRunning {
		a.Waits = fmt.Sprintf("the job is %s", job.Phase)
		return a, nil
	}
	next := plan.Due.UTC()
	a.Next = &next
	if next.After(c.clock.Now()) {
		return a, nil
	}
	a.Waits, err = c.whatItWaitsFor(tx, job, clouds)
	return a, err
}

// whatItWaitsFor says why a checkpoint that is due has not begun.
func (c *Controller) whatItWaitsFor(tx store.Tx, job *jobRecord, clouds map[string]cloudTally) (string, error) {
	if job.Operation != "" {
		op, err := getOperation(tx, job.Operation)
		return fmt.Sprintf("operation %s (%s) of the job is under way", op.ID, op.Kind), err
	}
	jobs, err := c.jobs.all(tx)
	if err != nil {
		return "", err
	}
	free, err := c.freeDumps(tx, jobs, clouds)
	if err != nil || free[job.Cloud] > 0 {
		return "", err
	}
	return fmt.Sprintf("cloud %s makes at most %d checkpoints at once", job.Cloud, c.dumpLimit(job.Cloud, clouds[job.Cloud])), nil
}

func explainInputs(in *interval.Inputs) *api.AutomaticInputs {
	if in == nil {
		return nil
	}
	return &api.AutomaticInputs{
		CostMS: inMilliseconds(in.Cost.Pause + in.Cost.Overhead), PauseMS: inMilliseconds(in.Cost.Pause), OverheadMS: inMilliseconds(in.Cost.Overhead),
		DurableMS: inMilliseconds(in.Cost.Durable), Measured: in.Measured, MTBFMS: inMilliseconds(in.MTBF), Nodes: in.Nodes,
		Losses: in.Losses, NodeDays: in.NodeTime.Hours() / 24, OptimumMS: inMilliseconds(in.Optimum),
		MinMS: inMilliseconds(in.Bounds.Min), MaxMS: inMilliseconds(in.Bounds.Max), Loss: in.Loss,
	}
}
