// Package protocol is the core of the operations on jobs, above all of the
// two-phase checkpoint of a parallel job. It does no I/O: what happens is told
// to an Operation, which answers with what is to be done.
//
//	Begin, Waited                  ->  Take: take this step
//	   Command the tasks           ->  Send: one command each, repeated until answered
//	   Answered, Lost              ->  Over: all tasks are through, and this is how
//	Ended: the step is over        ->  Write: this state, with what the step changed
//	Cancel: it is called off       ->  Write: the undoing begins, or is the end
//	Written, NotWritten            ->  Take the next step, Wait before it, or the End
//
// What is between two steps is a barrier: no task is in the next one before all
// have left this one. A controller that was killed begins with the state that it
// wrote last, sends the same commands again, and has the agents' same answers.
package protocol

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"dormouse/api"
)

// Failure is why a step of an operation did not succeed; it is stored with the
// operation.
type Failure struct {
	Message   string `json:"message"`
	Refused   bool   `json:"refused,omitempty"`   // may not be done, as opposed to broken
	Retryable bool   `json:"retryable,omitempty"` // worth another attempt after undoing
	// Cancelled is set when somebody called the operation off.
	Cancelled bool `json:"cancelled,omitempty"`
	// Lost is set when nothing answers any more.
	Lost bool `json:"-"`
}

func (f *Failure) Error() string { return f.Message }

// Task is one task of the job, and where it is.
type Task struct {
	Index int
	Node  string
}

// Command is the order to one task to take part in the present step. An agent
// that gets an ID again does nothing and repeats its answer.
type Command struct {
	ID   string
	Task Task
}

// Operation is one operation that is being driven.
type Operation struct {
	id      string
	flow    Flow
	state   State
	next    Move // once the step has ended
	repeats int  // of this step, or of attempts, in a row

	// The round of commands under way.
	tasks    []Task
	awaited  []bool
	failures []*Failure
	missed   []Task
}

// New is the operation id, as far as state says it has come.
func New(id string, flow Flow, state State) *Operation {
	return &Operation{id: id, flow: flow, state: state}
}

// Output is what is to be done now; one of its fields is set, or none: wait for
// the next input.
type Output struct {
	// Take this step, and tell when it has Ended.
	Take string
	// Send these commands, each again on every new way to its node, until it is
	// Answered or the node Lost.
	Send []Command
	// Over is set when all tasks are through the round; Failed is the failure
	// to report.
	Over   bool
	Failed *Failure
	// Missed are, when the round is over, the tasks that took no part in it, and
	// that does no harm to the operation.
	Missed []Task
	// Write what the step changed and the state that follows, at once.
	Write *Move
	// Wait so long.
	Wait time.Duration
	// End is how the operation has ended.
	End api.OperationPhase
}

// Begin takes the step that is written: at first, after a restart of the
// controller, and when the step must be taken anew.
func (o *Operation) Begin() Output {
	o.tasks = nil
	return Output{Take: o.state.Step}
}

// Waited is to be called when a Wait is over.
func (o *Operation) Waited() Output { return o.Begin() }

// Command begins a round of commands to tasks, as a part of the present step.
func (o *Operation) Command(tasks []Task) Output {
	o.tasks, o.awaited, o.failures = tasks, make([]bool, len(tasks)), make([]*Failure, len(tasks))
	o.missed = nil
	if len(tasks) == 0 {
		return Output{Over: true}
	}
	commands := make([]Command, len(tasks))
	for i, t := range tasks {
		o.awaited[i] = true
		commands[i] = Command{ID: o.commandID(t), Task: t}
	}
	return Output{Send: commands}
}

func (o *Operation) commandID(t Task) string {
	attempt := strconv.Itoa(o.state.Attempt)
	if try := o.state.Try; try > 0 {
		attempt += "." + strconv.Itoa(try)
	}
	return fmt.Sprintf("%s/%s/%s/%d", o.id, attempt, o.state.Step, t.Index)
}

// Answered notes an agent's answer to a command; nil: it succeeded. An answer
// that is not awaited changes nothing.
func (o *Operation) Answered(id string, failed *Failure) Output {
	i := slices.IndexFunc(o.tasks, func(t Task) bool { return o.commandID(t) == id })
	if i < 0 || !o.awaited[i] {
		return Output{}
	}
	o.through(i, failed)
	return o.overYet()
}

// Lost ends the waiting for all tasks on a node.
func (o *Operation) Lost(node string) Output {
	any := false
	for i, t := range o.tasks {
		if t.Node == node && o.awaited[i] {
			o.through(i, &Failure{Message: fmt.Sprintf("node %s was lost", node), Lost: true})
			any = true
		}
	}
	if !any {
		return Output{}
	}
	return o.overYet()
}

func (o *Operation) through(i int, failed *Failure) {
	o.awaited[i] = false
	switch {
	case failed == nil:
	case o.flow.tolerates(o.state, failed):
		o.missed = append(o.missed, o.tasks[i])
	default:
		o.failures[i] = failed
	}
}

func (o *Operation) overYet() Output {
	if slices.Contains(o.awaited, true) {
		return Output{}
	}
	out := Output{Over: true, Failed: o.worst(), Missed: o.missed}
	o.tasks = nil
	return out
}

// worst picks the failure to report, and says whose it is when there are
// several tasks: a refusal rather than a breakage, and that rather than a loss.
func (o *Operation) worst() *Failure {
	who, rank := -1, -1
	for i, failed := range o.failures {
		if failed != nil && rankOf(failed) > rank {
			who, rank = i, rankOf(failed)
		}
	}
	if who < 0 {
		return nil
	}
	worst := *o.failures[who]
	if len(o.tasks) > 1 && !worst.Lost {
		worst.Message = fmt.Sprintf("task %d on node %s: %s", o.tasks[who].Index, o.tasks[who].Node, worst.Message)
	}
	worst.Retryable = worst.Retryable || worst.Lost && o.flow.elsewhere
	return &worst
}

func rankOf(f *Failure) int {
	switch {
	case f.Refused:
		return 3
	case f.Lost:
		return 1
	case f.Retryable:
		return 0
	}
	return 2
}

// Late are the tasks that are awaited while others are there; none when all are
// or none is.
func (o *Operation) Late() []Task {
	var late []Task
	for i, t := range o.tasks {
		if o.awaited[i] {
			late = append(late, t)
		}
	}
	if len(late) == len(o.tasks) {
		return nil
	}
	return late
}

// Ended is to be called when the step is over; nil: it succeeded.
func (o *Operation) Ended(failed *Failure) Output {
	o.next = o.flow.next(o.state, failed)
	o.next.Failed = failed
	return Output{Write: &o.next}
}

// Cancel calls the operation off: instead of its present step, its undoing
// begins. One that is being undone goes on with that, and is not tried again.
func (o *Operation) Cancel(why string) Output {
	failed := &Failure{Message: why, Cancelled: true}
	if o.state.Cause != nil {
		o.state.Cause = failed
		return Output{}
	}
	return o.Ended(failed)
}

// Undoing reports whether the operation is on its way back.
func (o *Operation) Undoing() bool { return o.state.Cause != nil }

// Written goes on after what followed the step was written.
func (o *Operation) Written() Output {
	o.state = o.next.To
	switch {
	case o.next.Phase != api.OpRunning:
		return Output{End: o.next.Phase}
	case o.next.Anew: // later each time: what was in the way may take a while to go
		return Output{Wait: Backoff(o.state.Attempt)}
	case o.next.Again:
		return o.wait()
	}
	o.repeats = 0
	return o.Begin()
}

// NotWritten takes the step again after a while: the state on disk is the one
// before it.
func (o *Operation) NotWritten() Output { return o.wait() }

func (o *Operation) wait() Output {
	o.repeats++
	return Output{Wait: Backoff(o.repeats)}
}
