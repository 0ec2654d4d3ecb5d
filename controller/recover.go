package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"dormouse/api"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
	failures "dormouse/monitor/failure"
)

// A job that has failed is recovered, or is over. Package failure decides which
// of them, and from what and when it is started again; here its past is written
// down, and what it decided. The wait before it is a step of the operation, so
// that it outlives the controller, and the room of the job is free meanwhile.

// breakdown is what has happened to a job that has failed.
type breakdown struct {
	cause  failures.Cause
	reason string
	node   string    // where
	lost   time.Time // when it ceased to run
	code   *int      // of the task that ended
	// from and began are the checkpoint and the start of what has failed; damaged
	// is set when that checkpoint cannot be restored whatever is tried.
	from    string
	began   time.Time
	damaged bool
}

// failedRun is one life of a job that ended in failure, as failure.Run.
type failedRun struct {
	From    string         `json:"from,omitempty"`
	Started time.Time      `json:"started"`
	Failed  time.Time      `json:"failed"`
	Cause   failures.Cause `json:"cause"`
	Damaged bool           `json:"damaged,omitempty"`
}

// Older runs and incidents are forgotten.
const (
	keptRuns      = 100
	keptIncidents = 20
)

// runFailed is the breakdown of a job's present run.
func (c *Controller) runFailed(job *jobRecord, cause failures.Cause, reason, node string) breakdown {
	b := breakdown{cause: cause, reason: reason, node: node, lost: c.clock.Now().UTC(), from: job.From, began: job.History.Begun}
	if cause != failures.Node {
		return b
	}
	seen, _ := c.fleet.lastSeen(node)
	if seen.Before(b.began) {
		seen = b.began
	}
	if !seen.IsZero() && seen.Before(b.lost) {
		b.lost = seen.UTC()
	}
	return b
}

// fail ends a job that has failed, or begins to recover it.
func (c *Controller) fail(tx store.Tx, job *jobRecord, b breakdown) error {
	job.noteFailure(b, c.clock.Now().UTC())
	job.Starvation = nil
	candidates, err := restorable(tx, job)
	if err != nil {
		return err
	}
	policy := c.parts.Recovery
	policy.MaxRestarts = job.Spec.MaxRestarts
	decision := failures.Next(policy, job.pastRuns(), candidates)
	if !decision.Restart {
		return c.failForGood(tx, job, b, decision)
	}
	job.Phase, job.Reason = api.PhaseRecovering, b.reason+"; "+decision.Reason
	if decision.At.After(c.clock.Now()) {
		job.Reason += ", at " + decision.At.UTC().Format(time.TimeOnly)
	}
	if err := c.emit(tx, api.Event{Job: job.ID, Type: "recovering", Message: job.Reason, Node: b.node}); err != nil {
		return err
	}
	c.logJob(job)
	c.metrics.recoveries.WithLabelValues(string(b.cause)).Inc()
	_, err = c.beginOperation(tx, api.OpRecover, job, request{From: decision.From, Anew: decision.From == "", NotBefore: decision.At.UTC()})
	return err
}

// failForGood ends a job that is not recovered, and names the way back.
func (c *Controller) failForGood(tx store.Tx, job *jobRecord, b breakdown, d failures.Decision) error {
	checkpoint, err := newestDurable(tx, job)
	if err != nil {
		return err
	}
	reason := b.reason
	if job.Spec.MaxRestarts > 0 {
		reason += "; " + d.Reason
	}
	if job.Spec.MaxRestarts > 0 || b.cause != failures.Program {
		reason += "; " + adviceFor(job.ID, checkpoint)
	}
	return c.finish(tx, job, api.PhaseFailed, reason, b.code)
}

// noteFailure writes down how a run has failed.
func (j *jobRecord) noteFailure(b breakdown, now time.Time) {
	j.Runs = append(j.Runs, failedRun{From: b.from, Started: b.began, Failed: now, Cause: b.cause, Damaged: b.damaged})
	j.Runs = j.Runs[max(0, len(j.Runs)-keptRuns):]
	if n := len(j.Incidents); n > 0 && j.Incidents[n-1].Running == nil {
		j.Incidents[n-1].Failures++
		j.Incidents[n-1].Reason = b.reason
		return
	}
	j.Incidents = append(j.Incidents, api.Incident{
		Cause: string(b.cause), Reason: b.reason, Node: b.node, Lost: b.lost, Detected: now, Failures: 1,
	})
	j.Incidents = j.Incidents[max(0, len(j.Incidents)-keptIncidents):]
}

// endIncident notes that a job that had failed runs again, and tells of it.
func (c *Controller) endIncident(tx store.Tx, job *jobRecord, now time.Time) error {
	n := len(job.Incidents)
	if n == 0 || job.Incidents[n-1].Running != nil {
		return nil
	}
	incident := &job.Incidents[n-1]
	down := now.Sub(incident.Lost)
	ms := inMilliseconds(down)
	incident.Running, incident.DownMS, incident.From = &now, &ms, job.From
	c.metrics.down.Observe(down.Seconds())
	what := "from nothing"
	if job.From != "" {
		what = "from checkpoint " + job.From
	}
	message := fmt.Sprintf("runs again %s, %s after its failure (%s)", what, down.Round(time.Millisecond), incident.Reason)
	return c.emit(tx, api.Event{Job: job.ID, Type: "incident", Message: message, Node: incident.Node})
}

// pastRuns are the job's failures as package failure wants them.
func (j *jobRecord) pastRuns() []failures.Run {
	runs := make([]failures.Run, len(j.Runs))
	for i, r := range j.Runs {
		runs[i] = failures.Run{From: r.From, Started: r.Started, Failed: r.Failed, Cause: r.Cause}
	}
	return runs
}

// restorable are the checkpoints that a job may be recovered from, newest first:
// its own durable ones, then the one that it was cloned from.
func restorable(tx store.Tx, job *jobRecord) ([]string, error) {
	list, err := checkpointsOf(tx, job.ID)
	if err != nil {
		return nil, err
	}
	var usable []string
	for _, cp := range slices.Backward(list) {
		if cp.State == api.CheckpointDurable {
			usable = append(usable, cp.ID)
		}
	}
	if job.From != "" && !slices.Contains(usable, job.From) {
		from, err := store.Get[api.Checkpoint](tx, store.Checkpoints, job.From)
		if err == nil && from.State == api.CheckpointDurable {
			usable = append(usable, from.ID)
		} else if err != nil && !errors.Is(err, store.ErrNotFound) {
			return nil, err
		}
	}
	return slices.DeleteFunc(usable, job.damaged), nil
}

// damaged reports whether a checkpoint was found not to be restorable.
func (j *jobRecord) damaged(checkpoint string) bool {
	return slices.ContainsFunc(j.Runs, func(r failedRun) bool { return r.Damaged && r.From == checkpoint })
}

// delay waits until a failed job may be started again.
func (d *doing) delay(ctx context.Context) (effect, error) {
	left := d.ask.NotBefore.Sub(d.clock.Now())
	if d.ask.NotBefore.IsZero() || left <= 0 {
		return nil, nil
	}
	d.say(ctx, "starts again at "+d.ask.NotBefore.Format(time.TimeOnly))
	return nil, d.pause(ctx, left)
}

// recoverAgain decides about a job whose recovery has failed.
func (c *Controller) recoverAgain(tx store.Tx, op *opRecord, job *jobRecord) error {
	ask, err := op.request()
	if err != nil {
		return err
	}
	b := breakdown{
		cause: failures.Restore, reason: "recover failed: " + op.Error, lost: c.clock.Now().UTC(), from: op.Checkpoint, began: op.Placed,
	}
	if op.Broke == protocol.StepLook {
		b.from = ask.From // which is as far as it came
	}
	if b.began.IsZero() {
		b.began = b.lost
	}
	switch {
	case op.Broke == protocol.StepLook && !op.Refused:
		b.cause = failures.Platform
	case op.Refused:
		b.damaged = b.from != ""
	}
	return c.fail(tx, job, b)
}
