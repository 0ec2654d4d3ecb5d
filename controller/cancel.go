package controller

import (
	"context"
	"errors"
	"fmt"

	"dormouse/api"
	"dormouse/controller/access"
	"dormouse/controller/store"
)

// An operation is called off by a wish that is written into it. Whoever drives
// it sees the wish before each step and, woken by interrupt, during one; it
// then undoes the operation as it would after a failure of that step, and does
// not try it again. A wish that was accepted is kept: no step ahead is written
// over it, and none is accepted once the operation is past its commit.

// errCalledOff ends a step of an operation that is called off meanwhile.
var errCalledOff = errors.New("the operation was called off")

// cancel calls an operation off.
func (c *Controller) cancel(ctx context.Context, ref string) (*opRecord, error) {
	var op *opRecord
	err := c.store.Update(ctx, func(tx store.Tx) error {
		id, err := findID(tx, store.Operations, "operation", ref)
		if err != nil {
			return err
		}
		if op, err = getOperation(tx, id); err != nil {
			return err
		}
		if err := maySpare(ctx, op); err != nil {
			return err
		}
		if err := mayCancel(op); err != nil {
			return err
		}
		op.Cancel, op.Message = "cancelled by `dormouse operations cancel`", "is being cancelled"
		return c.accepted(ctx, tx, op, putOperation(tx, op))
	})
	if err == nil {
		c.interrupt(op.ID)
	}
	return op, err
}

// maySpare keeps users from calling off what makes room for others at their
// jobs' cost.
func maySpare(ctx context.Context, op *opRecord) error {
	who, _ := askerOf(ctx)
	if who.Role == api.RoleUser && op.Kind == api.OpPreempt {
		return &access.DeniedError{Reason: fmt.Sprintf("operation %s makes room for others: only an admin or an operator may cancel it", op.ID)}
	}
	return nil
}

func mayCancel(op *opRecord) error {
	switch {
	case op.Phase != api.OpRunning:
		return refused("operation %s (%s) has ended: it is %s", op.ID, op.Kind, op.Phase)
	case op.Cancel != "":
		return refused("operation %s (%s) is being cancelled already", op.ID, op.Kind)
	case op.After != "":
		return refused("operation %s (%s) cannot be cancelled: what it waits for is being undone for it", op.ID, op.Kind)
	}
	ask, err := op.request()
	if err != nil {
		return err
	}
	if ok, why := ask.flow(op.Kind).MayCancel(op.Position, false); !ok {
		return refused("operation %s (%s) cannot be cancelled: %s", op.ID, op.Kind, why)
	}
	return nil
}

// killNext begins to end a job that has an operation under way: as soon as that
// is undone or, where it cannot be, has ended.
func (c *Controller) killNext(tx store.Tx, job *jobRecord) (*opRecord, error) {
	under, err := getOperation(tx, job.Operation)
	if err != nil {
		return nil, err
	}
	ask, err := under.request()
	if err != nil {
		return nil, err
	}
	switch {
	case under.Then != "":
		return nil, refused("job %s is being ended already, by operation %s", job.ID, under.Then)
	case under.Kind == api.OpKill && ask.Signal == 0:
		return nil, refused("job %s is being ended already, by operation %s", job.ID, under.ID)
	}
	kill, err := c.beginOperation(tx, api.OpKill, job, request{})
	if err != nil {
		return nil, err
	}
	kill.After, kill.Message = under.ID, fmt.Sprintf("waits until operation %s (%s) has ended", under.ID, under.Kind)
	under.Then, job.Operation = kill.ID, under.ID
	if ok, _ := ask.flow(under.Kind).MayCancel(under.Position, true); ok && under.Cancel == "" {
		under.Cancel, under.Message = "the job was ended by `dormouse kill`", "is being cancelled"
		kill.Message = fmt.Sprintf("waits until operation %s (%s) is undone", under.ID, under.Kind)
	}
	return kill, errors.Join(putOperation(tx, under), putOperation(tx, kill), putJob(tx, job))
}

// takeOver hands a job on to the operation that waits for the end of op.
func (c *Controller) takeOver(tx store.Tx, op *opRecord, job *jobRecord) error {
	next, err := getOperation(tx, op.Then)
	if err != nil {
		return err
	}
	next.After, next.Message, job.Operation = "", "", next.ID
	switch {
	case job.Phase == api.PhaseRunning:
		return errors.Join(putOperation(tx, next), putJob(tx, job))
	case job.Phase.Final():
		next.Phase = api.OpFailed
		next.Position.Cause = &failure{Message: fmt.Sprintf("job %s is over already: it is %s", job.ID, job.Phase), Refused: true}
	default:
		next.Phase = api.OpDone // nothing of it runs: it is over at once
	}
	return c.endOperation(tx, next, job)
}

// interruptible takes a step, until it is called off. Steps that undo are not.
func (c *Controller) interruptible(ctx context.Context, d *doing) (effect, error) {
	if d.core.Undoing() {
		return d.take(ctx)
	}
	step, end := context.WithCancelCause(ctx)
	defer end(nil)
	c.mu.Lock()
	c.interrupts[d.op.ID] = end
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.interrupts, d.op.ID)
	}()
	// The wish may have been written before there was something to interrupt.
	called := false
	err := c.store.View(ctx, func(tx store.Tx) error {
		now, err := c.operations.get(tx, d.op.ID)
		called = err == nil && now.Cancel != ""
		return err
	})
	if err == nil && called {
		return nil, errCalledOff
	}
	change, err := d.take(step)
	if errors.Is(context.Cause(step), errCalledOff) {
		return nil, errCalledOff
	}
	return change, err
}

// interrupt has the driver of an operation look at its wish now.
func (c *Controller) interrupt(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if end := c.interrupts[id]; end != nil {
		end(errCalledOff)
	}
}
