package controller

import (
	"context"
	"encoding/json"
	"syscall"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/store"
	"dormouse/repository"
)

// signal sends the asked signal, or SIGTERM to a job that is to end.
func (d *doing) signal(ctx context.Context) (effect, error) {
	number := d.ask.Signal
	if number == 0 {
		number = int(syscall.SIGTERM)
	}
	patience, end := context.WithCancel(ctx)
	defer end()
	if d.ask.Signal == 0 {
		// Who does not answer is destroyed all the same.
		go func() { // ends with this function
			select {
			case <-d.clock.After(d.parts.Grace):
				end()
			case <-patience.Done():
			}
		}()
	}
	_, err := d.each(patience, func(taskRef) *agentpb.Command {
		return &agentpb.Command{Body: &agentpb.Command_Signal{Signal: &agentpb.SignalTask{Signal: int32(number)}}}
	})
	if patience.Err() != nil && ctx.Err() == nil {
		return nil, nil
	}
	return nil, err
}

// grace waits until every task has ended, for a while.
func (d *doing) grace(ctx context.Context) (effect, error) {
	patience := d.clock.After(d.parts.Grace)
	_, err := d.until(ctx, patience, func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, d.op.Job)
		if err != nil {
			return false, err
		}
		tasks := job.TaskStatus
		if job.Spec.Launch == api.LaunchFirst {
			tasks = tasks[:1] // the others serve until they are destroyed
		}
		for _, t := range tasks {
			if t.ExitCode == nil && t.Phase != api.PhaseFailed && t.Node != "" {
				return false, nil
			}
		}
		return true, nil
	})
	return nil, err
}

func (c *Controller) concludeKill(tx store.Tx, op *opRecord, job *jobRecord, done bool) error {
	ask, err := op.request()
	if err != nil || ask.Signal != 0 || !done {
		return err
	}
	var code *int
	for _, t := range job.TaskStatus {
		if t.ExitCode != nil {
			code = t.ExitCode
			break
		}
	}
	return c.finish(tx, job, api.PhaseCancelled, "ended by `dormouse kill`", code)
}

// verify reads and hashes checkpoints in the repository.
func (d *doing) verify(ctx context.Context) (effect, error) {
	last := time.Time{}
	progress := make(chan float64, 1)
	written := make(chan struct{})
	go func() {
		defer close(written)
		for fraction := range progress {
			if now := d.clock.Now(); now.Sub(last) >= reportEvery {
				last = now
				d.write(ctx, fraction, "reading and hashing")
			}
		}
	}()
	report, err := d.parts.Repository.Verify(ctx, d.verifier, d.ask.Checkpoints, func(done, total int64) {
		select {
		case progress <- float64(done) / float64(max(total, 1)):
		default: // the writer is behind: the next one counts
		}
	})
	close(progress)
	<-written
	if err != nil {
		return nil, err
	}
	result, err := json.Marshal(verifyReports(report, d.ask.Checkpoints))
	if err != nil {
		return nil, err
	}
	return func(_ store.Tx, op *opRecord, _ *jobRecord) error {
		op.Result = result
		return nil
	}, nil
}

// verifyReports gives each checkpoint its report. Problems of the repository
// that concern no checkpoint make one without a name.
func verifyReports(report *repository.VerifyReport, asked []string) []api.VerifyReport {
	list := []api.VerifyReport{}
	for id, r := range report.Checkpoints {
		list = append(list, api.VerifyReport{Checkpoint: id, OK: len(r.Problems) == 0, Bytes: r.Bytes, Problems: r.Problems})
	}
	var others []string
	for _, p := range report.Problems {
		if len(p.Checkpoints) == 0 {
			others = append(others, p.String())
		}
	}
	if len(others) > 0 && len(asked) == 0 {
		list = append(list, api.VerifyReport{Problems: others})
	}
	sortBy(list, func(r api.VerifyReport) (time.Time, string) { return time.Time{}, r.Checkpoint })
	return list
}
