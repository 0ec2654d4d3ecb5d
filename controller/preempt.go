package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"dormouse/api"
	"dormouse/controller/scheduler"
	"dormouse/controller/store"
)

// A job that gives way is suspended: its checkpoint is durable before its tasks
// are destroyed, and if there can be none it runs on. From the transaction that
// begins this, its record says that it comes back and for whom it went; it is in
// the queue as soon as it sleeps.

// Labels that every node has.
const (
	labelNode  = "node"
	labelCloud = "cloud"
)

// yield is why and since when a job has given up its place.
type yield struct {
	To    string    `json:"to,omitempty"`   // the job that it gave way to
	From  string    `json:"from,omitempty"` // the node that was drained
	Since time.Time `json:"since"`
	// Starved is why the job was kept from working, when it was moved for that, and
	// Nodes are where. Now is set when it is to go on at once, elsewhere.
	Starved string   `json:"starved,omitempty"`
	Nodes   []string `json:"nodes,omitempty"`
	Now     bool     `json:"now,omitempty"`
	// Patient jobs were told to go: they evict nobody to come back, and let those
	// go first that waited already.
	Patient bool `json:"patient,omitempty"`
	// Waits is set once there was found to be no room for it.
	Waits bool `json:"waits,omitempty"`
	// Failures counts how often it could not be restored, NotBefore is when that is
	// tried again, Why what to tell until then.
	Failures  int       `json:"failures,omitempty"`
	NotBefore time.Time `json:"not_before,omitzero"`
	Why       string    `json:"why,omitempty"`
}

// text says in a few words why the job sleeps.
func (y *yield) text() string {
	switch {
	case y.Starved != "":
		return "kept from working (" + y.Starved + ")"
	case y.To != "" && y.Patient:
		return "swapped for job " + y.To
	case y.To != "":
		return "preempted by job " + y.To
	case y.From != "":
		return "moved off node " + y.From
	}
	return "preempted by command"
}

// stubborn remembers that a job could not give way.
type stubborn struct {
	Failures int       `json:"failures"`
	Until    time.Time `json:"until"` // it is not asked again before
	Why      string    `json:"why"`
}

// Retries of what failed wait twice as long each time.
const (
	usualRetry = 10 * time.Second // Parts.Retry
	lastRetry  = 10 * time.Minute
)

// retryAfter is how long to wait after so many failures in a row, from 1.
func (c *Controller) retryAfter(failures int) time.Duration {
	return min(c.parts.Retry<<min(failures-1, 20), lastRetry)
}

// giveWay begins to take a job off its place.
func (c *Controller) giveWay(tx store.Tx, job *jobRecord, why yield, trigger api.Trigger) (*opRecord, error) {
	why.Since = c.clock.Now().UTC()
	job.Yield = &why
	job.Phase, job.Reason = api.PhaseSuspending, why.text()
	c.logJob(job)
	message := "gives up its place: " + why.text()
	if err := c.emit(tx, api.Event{Job: job.ID, Type: "preempting", Message: message}); err != nil {
		return nil, err
	}
	return c.beginCapture(tx, api.OpPreempt, job, request{Trigger: trigger, For: why.To})
}

// concludePreempt puts a job that gave way into the queue, or lets it run on.
func (c *Controller) concludePreempt(tx store.Tx, op *opRecord, job *jobRecord, done bool) error {
	if done {
		job.Stubborn = nil
		job.History.rest(c.clock.Now().UTC())
		job.Phase, job.Reason = api.PhaseSuspended, job.Yield.text()+", comes back when there is room"
		for i := range job.TaskStatus {
			job.TaskStatus[i].Phase, job.TaskStatus[i].Pid = api.PhaseSuspended, 0
		}
		c.logJob(job)
		return c.emit(tx, api.Event{Job: job.ID, Type: "preempted", Message: job.Reason + "; sleeps in checkpoint " + op.Checkpoint})
	}
	failures := 1
	if job.Stubborn != nil {
		failures = job.Stubborn.Failures + 1
	}
	job.Yield = nil
	job.Phase, job.Reason = api.PhaseRunning, "preempt failed: "+op.Error
	job.Stubborn = &stubborn{Failures: failures, Until: c.clock.Now().UTC().Add(c.retryAfter(failures)), Why: "it could not be checkpointed: " + op.Error}
	c.logJob(job)
	return c.concludeCheckpoint(tx, op, job, false)
}

// comeBackLater puts a job that could not be restored back into the queue.
func (c *Controller) comeBackLater(job *jobRecord, why string) {
	y := job.Yield
	y.Failures++
	y.NotBefore, y.Waits = c.clock.Now().UTC().Add(c.retryAfter(y.Failures)), true
	y.Why = fmt.Sprintf("%s; it is tried again at %s", why, y.NotBefore.Format(time.TimeOnly))
	job.Reason = y.Why
}

// preempt begins to take a running job off its place by command.
func (c *Controller) preempt(ctx context.Context, ref string) (*opRecord, error) {
	return c.onJob(ctx, ref, func(tx store.Tx, job *jobRecord) (*opRecord, error) {
		if err := inPhase(job, "preempted", api.PhaseRunning); err != nil {
			return nil, err
		}
		return c.giveWay(tx, job, yield{Patient: true}, api.TriggerPreempt)
	})
}

// stayAsleep takes a sleeping job out of the queue.
func (c *Controller) stayAsleep(tx store.Tx, job *jobRecord) (*opRecord, error) {
	job.Yield = nil
	job.Reason = "does not come back by itself any more: `dormouse resume` wakes it"
	op, err := c.beginOperation(tx, api.OpSuspend, job, request{})
	if err != nil {
		return nil, err
	}
	now := c.clock.Now().UTC()
	op.Phase, op.Finished, op.Progress, job.Operation = api.OpDone, &now, 1, ""
	err = c.emit(tx, api.Event{Job: job.ID, Type: "suspended", Message: job.Reason})
	return op, errors.Join(err, putOperation(tx, op), putJob(tx, job))
}

// planPreempt says what preempt would do.
func (c *Controller) planPreempt(ctx context.Context, ref string) (plan api.PreemptPlan, err error) {
	err = c.store.View(ctx, func(tx store.Tx) error {
		job, err := findJob(tx, ref)
		if err == nil {
			err = idle(tx, job)
		}
		if err == nil {
			err = inPhase(job, "preempted", api.PhaseRunning)
		}
		if err != nil {
			return err
		}
		s, err := c.survey(tx)
		if err != nil {
			return err
		}
		plan, err = s.plan(tx, job, nil, yield{Patient: true, Since: c.clock.Now()})
		return err
	})
	return plan, err
}

// swap begins to put one job where another is.
func (c *Controller) swap(ctx context.Context, outRef, inRef string) (*opRecord, error) {
	if err := c.afterOwn(ctx, outRef); err != nil {
		return nil, err
	}
	var op *opRecord
	err := c.store.Update(ctx, func(tx store.Tx) error {
		s, err := c.survey(tx)
		if err != nil {
			return err
		}
		out, in, nodes, err := s.swappable(tx, outRef, inRef)
		if err != nil {
			return err
		}
		leaving, err := c.giveWay(tx, out, yield{To: in.ID, Patient: true}, api.TriggerPreempt)
		if err != nil {
			return err
		}
		in.Reason = "takes the place of job " + out.ID
		op, err = c.beginOperation(tx, api.OpSwap, in, request{Out: out.ID, Yield: leaving.ID, Nodes: nodes})
		return c.accepted(ctx, tx, op, err)
	})
	return op, err
}

// planSwap says what swap would do.
func (c *Controller) planSwap(ctx context.Context, outRef, inRef string) (plan api.PreemptPlan, err error) {
	err = c.store.View(ctx, func(tx store.Tx) error {
		s, err := c.survey(tx)
		if err != nil {
			return err
		}
		out, in, nodes, err := s.swappable(tx, outRef, inRef)
		if err != nil {
			return err
		}
		from := ""
		if in.Phase == api.PhaseSuspended {
			if from, err = newestDurable(tx, in); err != nil {
				return err
			}
		}
		arrival := &api.Arrival{Job: in.ID, Name: in.Name, Nodes: nodes, From: from}
		s.running = append(s.running, runningOn(in, nodes, "it is being put there"))
		plan, err = s.plan(tx, out, arrival, yield{To: in.ID, Patient: true, Since: c.clock.Now()})
		return err
	})
	return plan, err
}

// swappable finds the two jobs of a swap, and the nodes of the one that comes.
func (s *survey) swappable(tx store.Tx, outRef, inRef string) (out, in *jobRecord, nodes []string, err error) {
	if out, err = findJob(tx, outRef); err != nil {
		return nil, nil, nil, err
	}
	if in, err = findJob(tx, inRef); err != nil {
		return nil, nil, nil, err
	}
	if out.ID == in.ID {
		return nil, nil, nil, refused("job %s cannot be swapped for itself", out.ID)
	}
	for _, check := range []error{
		idle(tx, out), inPhase(out, "swapped out", api.PhaseRunning),
		idle(tx, in), inPhase(in, "swapped in", api.PhasePending, api.PhaseProvisioning, api.PhaseSuspended),
	} {
		if check != nil {
			return nil, nil, nil, check
		}
	}
	if in.Phase == api.PhaseSuspended {
		from, err := newestDurable(tx, in)
		if err == nil && from == "" {
			err = refused("job %s has no durable checkpoint to come back from", in.ID)
		}
		if err != nil {
			return nil, nil, nil, err
		}
	}
	nodes, err = s.placeOf(out, in)
	return out, in, nodes, err
}

// placeOf finds room for in once out has gone: on its nodes if they do, with
// others where they do not.
func (s *survey) placeOf(out, in *jobRecord) ([]string, error) {
	nodes := slices.Clone(s.nodes)
	at := make(map[string]int)
	for i, n := range nodes {
		at[n.ID] = i
		nodes[i].Ports = make(map[string]string)
	}
	for _, r := range s.running {
		if r.ID == out.ID {
			continue
		}
		for _, id := range r.On {
			if i, known := at[id]; known {
				nodes[i].CPUsUsed += r.CPUs
				nodes[i].MemUsed += r.MemBytes
				for _, port := range r.Ports[id] {
					nodes[i].Ports[port] = r.ID
				}
			}
		}
	}
	request := requestFor(in)
	if in.Phase == api.PhaseSuspended {
		request.Unfit = s.tooOld(in)
	}
	for _, t := range out.TaskStatus {
		request.Only = append(request.Only, t.Node)
	}
	if placement, err := scheduler.Place(nodes, request); err == nil {
		return placement, nil
	}
	request.Only = nil
	placement, err := scheduler.Place(nodes, request)
	if err != nil {
		return nil, refused("job %s does not fit where job %s is: without it, job %s %v", in.ID, out.ID, in.ID, err)
	}
	if !slices.ContainsFunc(placement, func(id string) bool {
		return slices.ContainsFunc(out.refs(), func(r taskRef) bool { return r.Node == id })
	}) {
		return nil, refused("job %s does not fit where job %s is, and there is room for it elsewhere: nobody needs to go", in.ID, out.ID)
	}
	return placement, nil
}

// plan tells what it costs when a job goes, and where it is likely to go then.
func (s *survey) plan(tx store.Tx, out *jobRecord, in *api.Arrival, why yield) (api.PreemptPlan, error) {
	eviction := api.Eviction{Job: out.ID, Name: out.Name, Priority: out.Priority, Comes: s.comesBack(out, in, why)}
	eviction.Bytes, eviction.BytesFrom = out.bytes()
	for _, t := range out.TaskStatus {
		if !slices.Contains(eviction.Nodes, t.Node) {
			eviction.Nodes = append(eviction.Nodes, t.Node)
		}
	}
	var err error
	eviction.EstimatedMS, eviction.EstimatedFrom, err = estimate(tx, out)
	return api.PreemptPlan{Out: []api.Eviction{eviction}, In: in, Bytes: eviction.Bytes, EstimatedMS: eviction.EstimatedMS}, err
}

// estimate is how long a checkpoint of the job is likely to take, and how that is
// known.
func estimate(tx store.Tx, job *jobRecord) (*float64, string, error) {
	if job.Took > 0 {
		took := job.Took
		return &took, "its newest checkpoint", nil
	}
	list, err := checkpointsOf(tx, "")
	if err != nil {
		return nil, "", err
	}
	var bytes, ms float64
	for _, cp := range list {
		if cp.State == api.CheckpointDurable && cp.DurableMS > 0 {
			bytes, ms = bytes+float64(cp.SizeBytes), ms+cp.DurableMS
		}
	}
	if bytes == 0 {
		return nil, "no checkpoint was made yet", nil
	}
	size, _ := job.bytes()
	guess := ms * float64(size) / bytes
	return &guess, "the checkpoints of other jobs", nil
}

// comesBack says where a job would go once it has given way, as things are.
func (s *survey) comesBack(out *jobRecord, in *api.Arrival, why yield) string {
	after := &survey{nodes: s.nodes, jobs: s.jobs}
	for _, r := range s.running {
		if r.ID != out.ID {
			after.running = append(after.running, r)
		}
	}
	for _, w := range s.queue {
		if in == nil || w.ID != in.Job {
			after.queue = append(after.queue, w)
		}
	}
	gone := *out
	gone.Yield, gone.Phase = &why, api.PhaseSuspended
	after.queue = append(after.queue, after.waiting(&gone, why.Since))
	for _, d := range after.decide() {
		if d.ID == out.ID && d.Placement != nil {
			return "back at once, on " + placementText(d.Placement)
		}
		if d.ID == out.ID {
			return "waits for room: " + d.Reason
		}
	}
	return ""
}

// yield waits until the job that is swapped out has gone.
func (d *doing) yield(ctx context.Context) (effect, error) {
	var leaving *opRecord
	_, err := d.until(ctx, nil, func(tx store.Tx) (ended bool, err error) {
		leaving, err = getOperation(tx, d.ask.Yield)
		return err == nil && leaving.Phase != api.OpRunning, err
	})
	if err != nil {
		return nil, err
	}
	if leaving.Phase != api.OpDone {
		return nil, &failure{Message: fmt.Sprintf("job %s did not give way: %s", d.ask.Out, leaving.Error), Refused: leaving.Refused}
	}
	return nil, nil
}

// takePlace settles a swapped job on the nodes that were kept for it. It reports
// false when they do not do any more.
func (c *Controller) takePlace(tx store.Tx, job *jobRecord, op *opRecord) ([]string, []scheduler.Node, bool, error) {
	ask, err := op.request()
	if err != nil || op.Kind != api.OpSwap || len(op.Avoid) > 0 {
		return nil, nil, false, err
	}
	s, err := c.survey(tx)
	if err != nil {
		return nil, nil, false, err
	}
	for _, id := range ask.Nodes {
		i := slices.IndexFunc(s.nodes, func(n scheduler.Node) bool { return n.ID == id })
		if i < 0 || s.nodes[i].State != api.NodeReady {
			return nil, nil, false, nil
		}
	}
	return ask.Nodes, s.nodes, true, nil
}

// concludeSwap gives the job that was to come in its phase.
func (c *Controller) concludeSwap(tx store.Tx, op *opRecord, job *jobRecord, done bool) error {
	if done {
		return c.nowRestored(tx, op, job)
	}
	if job.Phase.Placed() {
		job.Phase = api.PhaseSuspended
		if op.Anew {
			job.Phase = api.PhasePending
		}
	}
	job.Reason = "swap failed: " + op.Error
	c.logJob(job)
	return c.emit(tx, api.Event{Job: job.ID, Type: "swap", Message: job.Reason})
}
