package protocol

import (
	"fmt"
	"slices"
	"time"

	"dormouse/api"
)

// Flow is the plan of one kind of operation. It is data: how an operation
// moves through it is decided by next, which does nothing else.
type Flow struct {
	steps []string
	// undo are the steps after a failure, in order.
	undo []string
	// commit is the step whose success cannot be undone: a later one that
	// fails is taken again until it succeeds. Empty: there is none.
	commit string
	// once is set when another attempt is not the operation's to make.
	once bool
	// elsewhere is set when the loss of a node is worth another attempt: other
	// nodes may do.
	elsewhere bool
}

// The steps. What is done in each is its taker's.
const (
	StepNetwork   = "network" // every node makes the job's network
	StepConnect   = "connect" // and learns of the others
	StepStart     = "start"
	StepPreflight = "preflight"
	StepFreeze    = "freeze"
	StepCapture   = "capture" // which cuts the tasks off the network
	StepOpen      = "open"    // and this reconnects them
	StepThaw      = "thaw"
	StepUpload    = "upload"
	StepPublish   = "publish"
	StepDiscard   = "discard"
	StepDestroy   = "destroy"
	StepRetention = "retention"
	StepReopen    = "reopen"
	StepAbort     = "abort"
	StepLook      = "look" // choose the checkpoint and check its manifest
	StepStop      = "stop"
	StepDelay     = "delay" // before a failed job is started again
	StepPlace     = "place"
	StepRestore   = "restore"
	StepRelease   = "release"
	StepUnplace   = "unplace"
	StepSignal    = "signal"
	StepGrace     = "grace"
	StepVerify    = "verify"
	StepWatch     = "watch" // whether what was restored on trial lives
	StepYield     = "yield" // wait until the job that is swapped out has gone
	StepEvict     = "evict" // everything off a node, and wait where it goes
)

// FlowOf is the plan of an operation of a job of so many tasks. signal is what
// a kill sends; 0: it ends the job.
func FlowOf(kind api.OperationKind, tasks, signal int) Flow {
	switch kind {
	case api.OpStart:
		// A job that could not be started is pending again: placing is the reconciler's.
		return Flow{steps: join(connecting(tasks), []string{StepStart}), undo: []string{StepUnplace}, once: true, elsewhere: true}
	case api.OpCheckpoint:
		return Flow{
			steps: join(
				[]string{StepPreflight, StepFreeze, StepCapture}, severally(tasks, StepOpen),
				[]string{StepThaw, StepUpload, StepPublish, StepDiscard, StepRetention}),
			undo: append(severally(tasks, StepReopen), StepAbort), commit: StepPublish,
		}
	case api.OpSuspend, api.OpPreempt:
		return Flow{
			steps: []string{StepPreflight, StepFreeze, StepCapture, StepUpload, StepPublish, StepDestroy, StepRetention},
			undo:  append(severally(tasks, StepReopen), StepAbort), commit: StepPublish,
		}
	case api.OpResume, api.OpClone:
		return Flow{steps: join([]string{StepLook, StepPlace}, restoring(tasks)), undo: []string{StepUnplace}, elsewhere: true}
	case api.OpSwap:
		return Flow{steps: join([]string{StepYield, StepLook, StepPlace}, restoring(tasks)), undo: []string{StepUnplace}, elsewhere: true}
	case api.OpDrain:
		return Flow{steps: []string{StepEvict}}
	case api.OpRecover:
		return Flow{
			steps: join([]string{StepLook, StepStop, StepDelay, StepPlace}, restoring(tasks)), undo: []string{StepUnplace}, elsewhere: true,
		}
	case api.OpRestart:
		return Flow{steps: join([]string{StepLook, StepStop, StepPlace}, restoring(tasks)), undo: []string{StepUnplace}, elsewhere: true}
	case api.OpKill:
		if signal != 0 {
			return Flow{steps: []string{StepSignal}}
		}
		return Flow{steps: []string{StepSignal, StepGrace, StepDestroy}, commit: StepSignal}
	case api.OpDrill:
		return Flow{
			steps: join([]string{StepLook, StepPlace}, restoring(tasks), []string{StepWatch, StepUnplace}),
			undo:  []string{StepUnplace}, commit: StepWatch, elsewhere: true,
		}
	case api.OpVerify:
		return Flow{steps: []string{StepVerify}}
	}
	return Flow{}
}

// severally is for jobs of several tasks only. What is between two steps is a
// barrier, and a single task needs none: its agent reconnects it and lets it go
// on at once.
func severally(tasks int, steps ...string) []string {
	if tasks > 1 {
		return steps
	}
	return nil
}

// restoring are the steps that wake a placed job.
func restoring(tasks int) []string {
	return join(connecting(tasks), []string{StepRestore}, severally(tasks, StepOpen, StepRelease))
}

// connecting are the steps that make the network of a placed job. A single task
// is on one node, which has no other to learn of.
func connecting(tasks int) []string {
	return join([]string{StepNetwork}, severally(tasks, StepConnect))
}

func join(parts ...[]string) []string { return slices.Concat(parts...) }

// MaxAttempts bounds how often an operation begins anew after failures that
// are worth it.
const MaxAttempts = 5

// State is where an operation is in its flow: all that has to be remembered of
// it. It is written before the step that it names is taken.
type State struct {
	Step    string `json:"step"`
	Attempt int    `json:"attempt"` // from 1
	// Try counts how often the step has failed and was taken again within the
	// attempt. It is part of the commands' ids: an agent gives a repeated id its
	// first answer, also when that was a failure.
	Try int `json:"try,omitempty"`
	// Cause is why the operation is being undone; nil on the way forward.
	Cause *Failure `json:"cause,omitempty"`
}

// Begin is the first state of a flow.
func (f Flow) Begin() State { return State{Step: f.steps[0], Attempt: 1} }

// Move is what follows a step.
type Move struct {
	To    State
	Phase api.OperationPhase // running, or how it ended
	// Failed is how the step ended; nil: well.
	Failed *Failure
	// Again is set when the same step must be taken again, after a while.
	Again bool
	// Anew is set when another attempt begins, after a while.
	Anew bool
}

// next decides what follows the step at which an operation is, given how the
// step ended. It is a pure function. After a step that an earlier version wrote
// and that the flow does not have, the flow begins anew.
func (f Flow) next(at State, failed *Failure) Move {
	if at.Cause != nil {
		return f.nextUndo(at, failed)
	}
	i := slices.Index(f.steps, at.Step)
	switch {
	case failed == nil && i+1 < len(f.steps):
		return Move{To: State{Step: f.steps[i+1], Attempt: at.Attempt}, Phase: api.OpRunning}
	case failed == nil:
		return Move{To: at, Phase: api.OpDone}
	case f.committed(i):
		return again(at)
	case len(f.undo) > 0:
		return Move{To: State{Step: f.undo[0], Attempt: at.Attempt, Cause: failed}, Phase: api.OpRunning}
	}
	at.Cause = failed
	return Move{To: at, Phase: failed.end()}
}

// end is how an operation ends that was undone because of f.
func (f *Failure) end() api.OperationPhase {
	if f.Cancelled {
		return api.OpCancelled
	}
	return api.OpFailed
}

// MayCancel reports whether an operation may be called off at a state, and
// why not. What is being undone may: it is not tried again then. ending is set
// when the job is to be ended anyway, so that nothing of it need be whole.
func (f Flow) MayCancel(at State, ending bool) (ok bool, why string) {
	i := slices.Index(f.steps, at.Step)
	switch {
	case at.Cause != nil:
		return true, ""
	case f.commit != "" && i >= slices.Index(f.steps, f.commit):
		return false, fmt.Sprintf("its step %s and what follows cannot be undone", f.commit)
	case at.Step == StepStop && !ending:
		return false, "the job's tasks are being destroyed, and would be missing"
	}
	return true, ""
}

// again takes the same step with new commands.
func again(at State) Move {
	at.Try++
	return Move{To: at, Phase: api.OpRunning, Again: true}
}

// committed reports whether step i comes after the commit.
func (f Flow) committed(i int) bool {
	return f.commit != "" && i > slices.Index(f.steps, f.commit)
}

func (f Flow) nextUndo(at State, failed *Failure) Move {
	if failed != nil {
		return again(at)
	}
	if i := slices.Index(f.undo, at.Step); i+1 < len(f.undo) {
		return Move{To: State{Step: f.undo[i+1], Attempt: at.Attempt, Cause: at.Cause}, Phase: api.OpRunning}
	}
	if at.Cause.Retryable && at.Attempt < MaxAttempts && !f.once {
		return Move{To: State{Step: f.steps[0], Attempt: at.Attempt + 1}, Phase: api.OpRunning, Anew: true}
	}
	return Move{To: at, Phase: at.Cause.end()}
}

// Progress is the share of the flow that is done at a state, of which the
// present step has done fraction.
func (f Flow) Progress(at State, fraction float64) float64 {
	i := slices.Index(f.steps, at.Step)
	if i < 0 {
		return 0
	}
	return (float64(i) + min(max(fraction, 0), 1)) / float64(len(f.steps))
}

// Backoff is how long to wait before the n-th repetition of something, from 1.
func Backoff(n int) time.Duration {
	const first, most = 200 * time.Millisecond, 10 * time.Second
	return min(first<<min(n-1, 10), most)
}

// tolerates reports whether a task's failure in a step is none of the
// operation's.
func (f Flow) tolerates(at State, failed *Failure) bool {
	switch at.Step {
	case StepReopen:
		return true // it only spares retransmissions: thawing opens what is still cut
	case StepSignal:
		return f.commit == StepSignal // destroyed in the end, whatever came of the signal
	case StepDiscard, StepAbort, StepDestroy:
		return failed.Lost // with all that was to be removed there
	}
	return false
}
