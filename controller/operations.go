package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/store"
	"dormouse/internal/failpoint"
)

// effect is what a step changes in the store, in the same transaction that
// writes the next step. job is nil for operations without one.
type effect func(tx store.Tx, op *opRecord, job *jobRecord) error

// doing is an operation while one of its steps is taken.
type doing struct {
	*Controller
	op  *opRecord
	job *jobRecord // nil for operations without one
	ask request

	mu        sync.Mutex
	fractions []float64 // per task, of the present step
	reported  time.Time
}

// beginOperation writes a new operation of job, which may be nil, into the
// store. The reconciler drives it from there.
func (c *Controller) beginOperation(tx store.Tx, kind api.OperationKind, job *jobRecord, ask request) (*opRecord, error) {
	if job != nil {
		ask.Tasks = job.Tasks
	}
	input, err := json.Marshal(ask)
	if err != nil {
		return nil, err
	}
	op := &opRecord{Operation: api.Operation{
		ID: newID("o"), Kind: kind, Phase: api.OpRunning, Started: c.clock.Now().UTC(), Input: input,
	}}
	op.Position = flowOf(kind, ask).begin()
	op.Step = op.Position.Step
	if job != nil {
		op.Job, job.Operation = job.ID, op.ID
		if err := putJob(tx, job); err != nil {
			return nil, err
		}
	}
	return op, putOperation(tx, op)
}

// drive takes the steps of an operation until it has ended or ctx does.
func (c *Controller) drive(ctx context.Context, id string) {
	log := c.log.With("operation", id)
	for repeats := 0; ; {
		d, err := c.load(ctx, id)
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, store.ErrNotFound) {
				log.Error("an operation cannot be read", "error", err)
			}
			return
		}
		if d.op.Phase != api.OpRunning {
			return
		}
		log.Debug("step", "kind", d.op.Kind, "job", d.op.Job, "step", d.op.Step, "attempt", d.op.Position.Attempt)
		failpoint.Hit("controller." + string(d.op.Kind) + "." + d.op.Step)
		change, err := d.take(ctx)
		if ctx.Err() != nil {
			return // taken again at the next start
		}
		next, err := c.advance(ctx, id, asFailure(err), change)
		if err != nil && ctx.Err() == nil {
			log.Error("the next step of an operation cannot be written: taking this one again", "error", err)
			next = move{Again: true}
		}
		if !next.Again && !next.Anew {
			repeats = 0
			continue
		}
		repeats++
		if c.pause(ctx, backoff(repeats)) != nil {
			return
		}
	}
}

// keptOperations is how many ended operations are remembered.
const keptOperations = 2000

// prune forgets the oldest ended operations.
func (c *Controller) prune(ctx context.Context) error {
	return c.store.Update(ctx, func(tx store.Tx) error {
		ops, err := store.All[opRecord](tx, store.Operations)
		if err != nil {
			return err
		}
		ended := slices.DeleteFunc(ops, func(op opRecord) bool { return op.Phase == api.OpRunning })
		sortBy(ended, func(op opRecord) (time.Time, string) { return op.Started, op.ID })
		for i := range len(ended) - keptOperations {
			if err := tx.Delete(store.Operations, ended[i].ID); err != nil {
				return err
			}
		}
		return nil
	})
}

// load reads an operation and its job.
func (c *Controller) load(ctx context.Context, id string) (*doing, error) {
	d := &doing{Controller: c}
	err := c.store.View(ctx, func(tx store.Tx) (err error) {
		if d.op, err = getOperation(tx, id); err != nil {
			return err
		}
		if d.op.Job != "" {
			if d.job, err = getJob(tx, d.op.Job); err != nil {
				return err
			}
		}
		d.ask, err = d.op.request()
		return err
	})
	if err == nil && d.job != nil {
		d.fractions = make([]float64, max(len(d.job.TaskStatus), 1))
	}
	return d, err
}

// take does the present step.
func (d *doing) take(ctx context.Context) (effect, error) {
	switch d.op.Step {
	case stepNetwork:
		return d.prepareNetwork(ctx)
	case stepConnect:
		return d.connectNetwork(ctx)
	case stepOpen:
		return d.openNetwork(ctx)
	case stepReopen:
		return d.reopen(ctx)
	case stepRelease:
		return d.releaseTasks(ctx)
	case stepStart:
		return d.start(ctx)
	case stepPreflight:
		return d.preflight(ctx)
	case stepFreeze:
		return d.freeze(ctx)
	case stepCapture:
		return d.capture(ctx)
	case stepThaw:
		return d.thaw(ctx)
	case stepUpload:
		return d.upload(ctx)
	case stepPublish:
		return d.publish(ctx)
	case stepDiscard:
		return d.discard(ctx)
	case stepDestroy:
		return d.destroy(ctx)
	case stepRetention:
		return d.retention(ctx)
	case stepAbort:
		return d.abort(ctx)
	case stepLook:
		return d.look(ctx)
	case stepStop:
		return d.stopTasks(ctx)
	case stepPlace:
		return d.place(ctx)
	case stepRestore:
		return d.restore(ctx)
	case stepUnplace:
		return d.unplace(ctx)
	case stepSignal:
		return d.signal(ctx)
	case stepGrace:
		return d.grace(ctx)
	case stepVerify:
		return d.verify(ctx)
	}
	return nil, fmt.Errorf("this dormouse does not know the step %q", d.op.Step)
}

// advance writes what a step changed and what follows it, at once.
func (c *Controller) advance(ctx context.Context, id string, failed *failure, change effect) (move, error) {
	var next move
	err := c.store.Update(ctx, func(tx store.Tx) error {
		op, err := getOperation(tx, id)
		if err != nil {
			return err
		}
		if op.Phase != api.OpRunning { // cancelled meanwhile
			next = move{Phase: op.Phase}
			return nil
		}
		var job *jobRecord
		if op.Job != "" {
			if job, err = getJob(tx, op.Job); err != nil {
				return err
			}
		}
		ask, err := op.request()
		if err != nil {
			return err
		}
		if change != nil {
			if err := change(tx, op, job); err != nil {
				return err
			}
		}
		plan := flowOf(op.Kind, ask)
		next = plan.next(op.Position, failed)
		op.Position, op.Step, op.Phase = next.To, next.To.Step, next.Phase
		op.Progress = max(op.Progress, plan.progress(next.To, 0))
		op.Message = ""
		if failed != nil && next.Phase == api.OpRunning {
			op.Message = failed.Message
		}
		if next.Phase != api.OpRunning {
			return c.endOperation(tx, op, job)
		}
		if job != nil {
			if err := putJob(tx, job); err != nil {
				return err
			}
		}
		return putOperation(tx, op)
	})
	if errors.Is(err, errTryAgain) {
		return move{Phase: api.OpRunning}, nil
	}
	return next, err
}

// endOperation writes the end of an operation and what it means for its job.
func (c *Controller) endOperation(tx store.Tx, op *opRecord, job *jobRecord) error {
	now := c.clock.Now().UTC()
	op.Finished = &now
	if op.Phase == api.OpDone {
		op.Progress = 1
	} else if cause := op.Position.Cause; cause != nil {
		op.Error, op.Refused = cause.Message, cause.Refused
	}
	if err := putOperation(tx, op); err != nil {
		return err
	}
	c.metrics.operationEnded(op)
	c.log.Info("operation "+string(op.Phase), "operation", op.ID, "kind", op.Kind, "job", op.Job, "error", op.Error)
	if job == nil {
		return nil
	}
	job.Operation = ""
	if err := c.concludeJob(tx, op, job); err != nil {
		return err
	}
	return c.settle(tx, job)
}

// concludeJob gives the job the phase that the operation leaves it in.
func (c *Controller) concludeJob(tx store.Tx, op *opRecord, job *jobRecord) error {
	done := op.Phase == api.OpDone
	switch op.Kind {
	case api.OpStart:
		return c.concludeStart(tx, op, job, done)
	case api.OpCheckpoint:
		return c.concludeCheckpoint(tx, op, job, done)
	case api.OpSuspend:
		return c.concludeSuspend(tx, op, job, done)
	case api.OpResume, api.OpRestart, api.OpRecover, api.OpClone:
		return c.concludeRestore(tx, op, job, done)
	case api.OpKill:
		return c.concludeKill(tx, op, job, done)
	}
	return nil
}

// command builds one task's command of a step.
type command func(ref taskRef) *agentpb.Command

// each sends one command to the agent of every task of the job's present run
// and waits for all of them: no task is in the next step before all have left
// this one. Answers are in the order of tasks. Of several failures, a refusal
// is reported rather than a breakage, and that rather than a lost node.
func (d *doing) each(ctx context.Context, build command) ([]*agentpb.Reply, error) {
	refs := d.job.refs()
	replies := make([]*agentpb.Reply, len(refs))
	errs := make([]error, len(refs))
	awaited := newAwaited(refs)
	watching, stop := context.WithCancel(ctx)
	defer stop()
	if len(refs) > 1 {
		go d.nameStragglers(watching, awaited)
	}
	var group errgroup.Group
	for i, ref := range refs {
		group.Go(func() error {
			defer awaited.arrived(i)
			order := build(ref)
			order.Id = d.commandID(ref.Index)
			order.Task = ref.proto()
			replies[i], errs[i] = d.fleet.call(ctx, ref.Node, order, func(fraction float64, message string) {
				d.report(ctx, i, fraction, message)
			})
			return nil
		})
	}
	group.Wait() // the goroutines keep their errors
	return replies, d.worst(refs, errs)
}

func (d *doing) commandID(index int) string {
	attempt := strconv.Itoa(d.op.Position.Attempt)
	if try := d.op.Position.Try; try > 0 {
		attempt += "." + strconv.Itoa(try)
	}
	return fmt.Sprintf("%s/%s/%s/%d", d.op.ID, attempt, d.op.Step, index)
}

// worst picks the error to report and says whose it is when there are several tasks.
func (d *doing) worst(refs []taskRef, errs []error) error {
	var worst error
	rank := -1
	for i, err := range errs {
		if err == nil {
			continue
		}
		if len(refs) > 1 && !isNodeLost(err) {
			err = fmt.Errorf("task %d on node %s: %w", refs[i].Index, refs[i].Node, err)
		}
		if r := rankOf(err); r > rank {
			worst, rank = err, r
		}
	}
	return worst
}

func rankOf(err error) int {
	var f *failure
	switch {
	case errors.As(err, &f) && f.Refused:
		return 3
	case errors.As(err, &f) && !f.Retryable:
		return 2
	case isNodeLost(err):
		return 1
	}
	return 0
}

// reportEvery bounds how often progress is written.
const reportEvery = 500 * time.Millisecond

// report notes the progress of one task's command.
func (d *doing) report(ctx context.Context, task int, fraction float64, message string) {
	d.mu.Lock()
	d.fractions[task] = fraction
	total := 0.0
	for _, f := range d.fractions {
		total += f
	}
	now := d.clock.Now()
	due := now.Sub(d.reported) >= reportEvery
	if due {
		d.reported = now
	}
	mean := total / float64(len(d.fractions))
	d.mu.Unlock()
	if due {
		d.write(ctx, mean, message)
	}
}

// write stores the present step's progress. It is for people: a failure to
// write it changes nothing.
func (d *doing) write(ctx context.Context, fraction float64, message string) {
	err := d.store.Update(ctx, func(tx store.Tx) error {
		op, err := getOperation(tx, d.op.ID)
		if err != nil || op.Phase != api.OpRunning || op.Step != d.op.Step {
			return err
		}
		op.Message = message
		op.Progress = max(op.Progress, flowOf(op.Kind, d.ask).progress(op.Position, fraction))
		return putOperation(tx, op)
	})
	if err != nil && ctx.Err() == nil {
		d.log.Warn("progress was not written", "operation", d.op.ID, "error", err)
	}
}

// say writes what the operation waits for, once.
func (d *doing) say(ctx context.Context, message string) {
	if message != d.op.Message {
		d.op.Message = message
		d.write(ctx, 0, message)
	}
}

func sentences(list []string) string { return strings.Join(list, "; ") }
