package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
	"dormouse/internal/failpoint"
)

// effect is what a step changes in the store, in the same transaction that
// writes the next step. job is nil for operations without one.
type effect func(tx store.Tx, op *opRecord, job *jobRecord) error

// doing is an operation while one of its steps is taken.
type doing struct {
	*Controller
	op   *opRecord
	job  *jobRecord // nil for operations without one; shared, to be read only
	ask  request
	core *protocol.Operation

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
	op.Position = ask.flow(kind).Begin()
	op.Step = op.Position.Step
	if job != nil {
		op.Job, op.Owner, job.Operation = job.ID, job.Owner, op.ID
		if err := putJob(tx, job); err != nil {
			return nil, err
		}
	}
	return op, putOperation(tx, op)
}

// drive does what the protocol says until the operation has ended or ctx does.
func (c *Controller) drive(ctx context.Context, id string) {
	log := c.log.With("operation", id)
	d, err := c.load(ctx, id)
	if err != nil || d.op.Phase != api.OpRunning {
		c.cannotRead(ctx, log, err)
		return
	}
	core := protocol.New(id, d.ask.flow(d.op.Kind), d.op.Position)
	out := core.Begin()
	for fresh := true; out.End == ""; fresh = false {
		if out.Wait > 0 {
			if c.pause(ctx, out.Wait) != nil {
				return
			}
			out = core.Waited()
			continue
		}
		if !fresh {
			if d, err = c.load(ctx, id); err != nil || d.op.Phase != api.OpRunning {
				c.cannotRead(ctx, log, err)
				return
			}
		}
		d.core = core
		if d.op.Cancel != "" {
			if called := core.Cancel(d.op.Cancel); called.Write != nil {
				if err := c.advance(ctx, id, called.Write, nil); err == nil {
					out = core.Written()
				} else if ctx.Err() != nil {
					return
				} else {
					log.Error("the undoing of an operation cannot be written: trying again", "error", err)
					out = core.NotWritten()
				}
				continue
			}
		}
		log.Debug("step", "kind", d.op.Kind, "job", d.op.Job, "step", out.Take, "attempt", d.op.Position.Attempt)
		failpoint.Hit("controller." + string(d.op.Kind) + "." + out.Take)
		change, err := c.interruptible(ctx, d)
		if ctx.Err() != nil {
			return // taken again at the next start
		}
		if errors.Is(err, errCalledOff) {
			out = core.Begin()
			continue
		}
		if store.IsAway(err) {
			log.Warn("the store is away: taking a step again", "step", out.Take, "error", err)
			out = core.NotWritten()
			continue
		}
		err = c.advance(ctx, id, core.Ended(asFailure(err)).Write, change)
		switch {
		case err == nil:
			out = core.Written()
		case errors.Is(err, errTryAgain), errors.Is(err, errCalledOff):
			out = core.Begin()
		case errors.Is(err, errCancelled) || ctx.Err() != nil:
			return
		default:
			log.Error("the next step of an operation cannot be written: taking this one again", "error", err)
			out = core.NotWritten()
		}
	}
}

func (c *Controller) cannotRead(ctx context.Context, log *slog.Logger, err error) {
	if err != nil && ctx.Err() == nil && !errors.Is(err, store.ErrNotFound) {
		log.Error("an operation cannot be read", "error", err)
	}
}

// Ended operations are remembered for keptFor, so that who waits for one learns
// how it has ended, and the newest keptOperations for longer.
const (
	keptOperations = 2000
	keptFor        = time.Hour
	prunedAtA      = 1000 // in one transaction
)

// prune forgets the oldest ended operations.
func (c *Controller) prune(ctx context.Context) error {
	var ended []*opRecord
	err := c.store.View(ctx, func(tx store.Tx) error {
		ops, err := c.operations.oldest(tx)
		for _, op := range ops {
			if op.Phase != api.OpRunning && op.Finished != nil {
				ended = append(ended, op)
			}
		}
		return err
	})
	if err != nil {
		return err
	}
	old := ended[:max(len(ended)-keptOperations, 0)]
	since := c.clock.Now().Add(-keptFor)
	old = slices.DeleteFunc(old, func(op *opRecord) bool { return op.Finished.After(since) })
	for part := range slices.Chunk(old, prunedAtA) {
		err := c.store.Update(ctx, func(tx store.Tx) error {
			for _, op := range part {
				if err := tx.Delete(store.Operations, op.ID); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// mostLoads is how many operations are read at once. One look at the queue can
// begin a thousand, and if all of them were to run at the same time, every
// request would wait until the last has had its turn.
const mostLoads = 16

// load reads an operation and its job.
func (c *Controller) load(ctx context.Context, id string) (*doing, error) {
	select {
	case c.loads <- struct{}{}:
		defer func() { <-c.loads }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	d := &doing{Controller: c}
	err := c.store.View(ctx, func(tx store.Tx) (err error) {
		op, err := c.operations.get(tx, id)
		if err != nil {
			return err
		}
		own := *op
		d.op = &own
		if d.op.Job != "" {
			if d.job, err = c.jobs.get(tx, d.op.Job); err != nil {
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
	case protocol.StepNetwork:
		return d.prepareNetwork(ctx)
	case protocol.StepConnect:
		return d.connectNetwork(ctx)
	case protocol.StepOpen, protocol.StepReopen:
		return d.openNetwork(ctx)
	case protocol.StepRelease:
		return d.there(ctx, d.releaseTasks)
	case protocol.StepStart:
		return d.there(ctx, d.start)
	case protocol.StepPreflight:
		return d.preflight(ctx)
	case protocol.StepFreeze:
		return d.freeze(ctx)
	case protocol.StepCapture:
		return d.capture(ctx)
	case protocol.StepThaw:
		return d.thaw(ctx)
	case protocol.StepUpload:
		return d.upload(ctx)
	case protocol.StepPublish:
		return d.publish(ctx)
	case protocol.StepDiscard:
		return d.discard(ctx)
	case protocol.StepDestroy:
		return d.destroy(ctx)
	case protocol.StepRetention:
		return d.retention(ctx)
	case protocol.StepAbort:
		return d.abort(ctx)
	case protocol.StepLook:
		return d.look(ctx)
	case protocol.StepStop:
		return d.stopTasks(ctx)
	case protocol.StepDelay:
		return d.delay(ctx)
	case protocol.StepPlace:
		return d.place(ctx)
	case protocol.StepRestore:
		return d.there(ctx, d.restore)
	case protocol.StepUnplace:
		return d.unplace(ctx)
	case protocol.StepSignal:
		return d.signal(ctx)
	case protocol.StepGrace:
		return d.grace(ctx)
	case protocol.StepVerify:
		return d.verify(ctx)
	case protocol.StepWatch:
		return d.watch(ctx)
	case protocol.StepYield:
		return d.yield(ctx)
	case protocol.StepEvict:
		return d.evictAll(ctx)
	}
	return nil, fmt.Errorf("this dormouse does not know the step %q", d.op.Step)
}

// errCancelled says that the operation was ended meanwhile.
var errCancelled = errors.New("the operation was cancelled")

// advance writes what a step changed and what follows it, at once.
func (c *Controller) advance(ctx context.Context, id string, next *protocol.Move, change effect) error {
	return c.store.Update(ctx, func(tx store.Tx) error {
		op, err := getOperation(tx, id)
		if err != nil {
			return err
		}
		if op.Phase != api.OpRunning {
			return errCancelled
		}
		var job *jobRecord
		if op.Job != "" {
			if job, err = getJob(tx, op.Job); err != nil {
				return err
			}
		}
		if op.Cancel != "" && op.Position.Cause == nil && next.To.Cause == nil {
			return errCalledOff
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
		if op.Position.Cause == nil && next.To.Cause != nil {
			op.Broke = op.Step
		}
		op.Position, op.Step, op.Phase = next.To, next.To.Step, next.Phase
		op.Progress = max(op.Progress, ask.flow(op.Kind).Progress(next.To, 0))
		op.Message = ""
		if next.Failed != nil && next.Phase == api.OpRunning {
			op.Message = next.Failed.Message
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
	if op.Kind == api.OpDrill {
		return c.concludeDrill(tx, op, job)
	}
	if err := c.concludeJob(tx, op, job); err != nil {
		return err
	}
	if op.Then != "" {
		return c.takeOver(tx, op, job)
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
	case api.OpPreempt:
		return c.concludePreempt(tx, op, job, done)
	case api.OpSwap:
		return c.concludeSwap(tx, op, job, done)
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
// and waits until the protocol has what it needs of them. Answers are in the
// order of tasks.
func (d *doing) each(ctx context.Context, build command) ([]*agentpb.Reply, error) {
	refs := d.job.refs()
	tasks := make([]protocol.Task, len(refs))
	for i, ref := range refs {
		tasks[i] = protocol.Task{Index: ref.Index, Node: ref.Node}
	}
	out := d.core.Command(tasks)
	answers := make(chan taskAnswer, len(refs))
	for i, c := range out.Send {
		if t := d.job.TaskStatus[refs[i].Index]; lostTask(t) {
			answers <- taskAnswer{i, c, nil, &failure{Message: t.Reason, Lost: true}}
			continue
		}
		order := build(refs[i])
		order.Id, order.Task = c.ID, refs[i].proto()
		go func() {
			reply, err := d.fleet.call(ctx, refs[i].Node, order, func(fraction float64, message string) {
				d.report(ctx, i, fraction, message)
			})
			answers <- taskAnswer{i, c, reply, err}
		}()
	}
	replies := make([]*agentpb.Reply, len(refs))
	late := d.clock.After(stragglerAfter)
	for waiting := len(out.Send); waiting > 0; {
		select {
		case a := <-answers:
			waiting--
			replies[a.index] = a.reply
			if o := d.heard(a); o.Over {
				out = o // and it stays so: tasks that shared a lost node were all told of at once
			}
		case <-late:
			if who := stragglers(d.core.Late()); who != "" {
				d.write(ctx, 0, fmt.Sprintf("%s waits for %s", d.op.Step, who))
			}
			late = d.clock.After(stragglerAfter)
		}
	}
	if err := d.forsaken(ctx, out.Missed); err != nil {
		return nil, err
	}
	if out.Failed != nil {
		return nil, out.Failed
	}
	return replies, ctx.Err()
}

// forsaken remembers what nodes that did not hear of the end of a capture must
// throw away once they are back.
func (d *doing) forsaken(ctx context.Context, tasks []protocol.Task) error {
	if len(tasks) == 0 || d.op.Checkpoint == "" || d.op.Step == protocol.StepReopen {
		return nil
	}
	return d.store.Update(ctx, func(tx store.Tx) error {
		for _, t := range tasks {
			ref := taskRef{Node: t.Node, Job: d.job.ID, Index: t.Index, Run: d.job.Run}
			if err := putCleanup(tx, cleanup{Task: ref, Checkpoint: d.op.Checkpoint}); err != nil {
				return err
			}
		}
		return nil
	})
}

// there makes a step that begins tasks look again when an agent said Hello
// after the step began: it may have restarted behind its answer, without them.
func (d *doing) there(ctx context.Context, step func(context.Context) (effect, error)) (effect, error) {
	var before map[string]int64
	err := d.store.View(ctx, func(tx store.Tx) (err error) {
		before, err = d.hellos(tx, d.job)
		return err
	})
	if err != nil {
		return nil, err
	}
	change, err := step(ctx)
	if err != nil {
		return nil, err
	}
	return func(tx store.Tx, op *opRecord, job *jobRecord) error {
		now, err := d.hellos(tx, job)
		if err != nil {
			return err
		}
		if !maps.Equal(before, now) {
			return errTryAgain
		}
		if change == nil {
			return nil
		}
		return change(tx, op, job)
	}, nil
}

// hellos counts the sessions that the agents of the job's nodes have begun.
func (c *Controller) hellos(tx store.Tx, job *jobRecord) (map[string]int64, error) {
	counts := make(map[string]int64)
	for _, ref := range job.refs() {
		node, err := c.nodes.get(tx, ref.Node)
		switch {
		case err == nil:
			counts[ref.Node] = node.Hellos
		case errors.Is(err, store.ErrNotFound):
			counts[ref.Node] = 0
		default:
			return nil, err
		}
	}
	return counts, nil
}

// heard tells the protocol how a command has ended.
func (d *doing) heard(a taskAnswer) protocol.Output {
	if isNodeLost(a.err) {
		return d.core.Lost(a.command.Task.Node)
	}
	return d.core.Answered(a.command.ID, asFailure(a.err))
}

// taskAnswer is how one command of a step ended.
type taskAnswer struct {
	index   int
	command protocol.Command
	reply   *agentpb.Reply
	err     error
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
		op.Progress = max(op.Progress, d.ask.flow(op.Kind).Progress(op.Position, fraction))
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
