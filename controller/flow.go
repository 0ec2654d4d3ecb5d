package controller

import (
	"slices"
	"time"

	"dormouse/api"
)

// flow is the plan of one kind of operation. It is data: how an operation
// moves through it is decided by next, which does nothing else.
type flow struct {
	steps []string
	// undo are the steps after a failure, in order.
	undo []string
	// commit is the step whose success cannot be undone: a later one that
	// fails is taken again until it succeeds. Empty: there is none.
	commit string
	// once is set when another attempt is not the operation's to make.
	once bool
}

// The steps. "Take a step" is what the methods of Controller of the same name do.
const (
	stepNetwork   = "network" // every node makes the job's network
	stepConnect   = "connect" // and learns of the others
	stepStart     = "start"
	stepPreflight = "preflight"
	stepFreeze    = "freeze"
	stepCapture   = "capture" // which cuts the tasks off the network
	stepOpen      = "open"    // and this reconnects them
	stepThaw      = "thaw"
	stepUpload    = "upload"
	stepPublish   = "publish"
	stepDiscard   = "discard"
	stepDestroy   = "destroy"
	stepRetention = "retention"
	stepReopen    = "reopen"
	stepAbort     = "abort"
	stepLook      = "look" // choose the checkpoint and check its manifest
	stepStop      = "stop"
	stepPlace     = "place"
	stepRestore   = "restore"
	stepRelease   = "release"
	stepUnplace   = "unplace"
	stepSignal    = "signal"
	stepGrace     = "grace"
	stepVerify    = "verify"
)

func flowOf(kind api.OperationKind, r request) flow {
	switch kind {
	case api.OpStart:
		// A job that could not be started is pending again: placing is the reconciler's.
		return flow{steps: []string{stepNetwork, stepConnect, stepStart}, undo: []string{stepUnplace}, once: true}
	case api.OpCheckpoint:
		return flow{
			steps: join(
				[]string{stepPreflight, stepFreeze, stepCapture}, severally(r, stepOpen),
				[]string{stepThaw, stepUpload, stepPublish, stepDiscard, stepRetention}),
			undo: append(severally(r, stepReopen), stepAbort), commit: stepPublish,
		}
	case api.OpSuspend:
		return flow{
			steps: []string{stepPreflight, stepFreeze, stepCapture, stepUpload, stepPublish, stepDestroy, stepRetention},
			undo:  append(severally(r, stepReopen), stepAbort), commit: stepPublish,
		}
	case api.OpResume, api.OpClone:
		return flow{steps: join([]string{stepLook, stepPlace}, restoring(r)), undo: []string{stepUnplace}}
	case api.OpRestart, api.OpRecover:
		return flow{steps: join([]string{stepLook, stepStop, stepPlace}, restoring(r)), undo: []string{stepUnplace}}
	case api.OpKill:
		if r.Signal != 0 {
			return flow{steps: []string{stepSignal}}
		}
		return flow{steps: []string{stepSignal, stepGrace, stepDestroy}, commit: stepSignal}
	case api.OpVerify:
		return flow{steps: []string{stepVerify}}
	}
	return flow{}
}

// severally is for jobs of several tasks only. What is between two steps is a
// barrier, and a single task needs none: its agent reconnects it and lets it go
// on at once.
func severally(r request, steps ...string) []string {
	if r.Tasks > 1 {
		return steps
	}
	return nil
}

// restoring are the steps that wake a placed job.
func restoring(r request) []string {
	return join([]string{stepNetwork, stepConnect, stepRestore}, severally(r, stepOpen, stepRelease))
}

func join(parts ...[]string) []string { return slices.Concat(parts...) }

// maxAttempts bounds how often an operation begins anew after failures that
// are worth it.
const maxAttempts = 5

// position is where an operation is in its flow.
type position struct {
	Step    string `json:"step"`
	Attempt int    `json:"attempt"` // from 1
	// Try counts how often the step has failed and was taken again within the
	// attempt. It is part of the commands' ids: an agent gives a repeated id its
	// first answer, also when that was a failure.
	Try int `json:"try,omitempty"`
	// Cause is why the operation is being undone; nil on the way forward.
	Cause *failure `json:"cause,omitempty"`
}

// begin is the first position of a flow.
func (f flow) begin() position { return position{Step: f.steps[0], Attempt: 1} }

// move is what follows a step.
type move struct {
	To    position
	Phase api.OperationPhase // running, or how it ended
	// Again is set when the same step must be taken again, after a while.
	Again bool
	// Anew is set when another attempt begins, after a while.
	Anew bool
}

// next decides what follows the step at which an operation is, given how the
// step ended. It is a pure function.
func (f flow) next(at position, failed *failure) move {
	if at.Cause != nil {
		return f.nextUndo(at, failed)
	}
	i := slices.Index(f.steps, at.Step)
	switch {
	case failed == nil && i+1 < len(f.steps):
		return move{To: position{Step: f.steps[i+1], Attempt: at.Attempt}, Phase: api.OpRunning}
	case failed == nil:
		return move{To: at, Phase: api.OpDone}
	case f.committed(i):
		return again(at)
	case len(f.undo) > 0:
		return move{To: position{Step: f.undo[0], Attempt: at.Attempt, Cause: failed}, Phase: api.OpRunning}
	}
	at.Cause = failed
	return move{To: at, Phase: api.OpFailed}
}

// again takes the same step with new commands.
func again(at position) move {
	at.Try++
	return move{To: at, Phase: api.OpRunning, Again: true}
}

// committed reports whether step i comes after the commit.
func (f flow) committed(i int) bool {
	return f.commit != "" && i > slices.Index(f.steps, f.commit)
}

func (f flow) nextUndo(at position, failed *failure) move {
	if failed != nil {
		return again(at)
	}
	if i := slices.Index(f.undo, at.Step); i+1 < len(f.undo) {
		return move{To: position{Step: f.undo[i+1], Attempt: at.Attempt, Cause: at.Cause}, Phase: api.OpRunning}
	}
	if at.Cause.Retryable && at.Attempt < maxAttempts && !f.once {
		return move{To: position{Step: f.steps[0], Attempt: at.Attempt + 1}, Phase: api.OpRunning, Anew: true}
	}
	return move{To: at, Phase: api.OpFailed}
}

// progress is the share of the flow that is done at a position, of which the
// present step has done fraction.
func (f flow) progress(at position, fraction float64) float64 {
	i := slices.Index(f.steps, at.Step)
	if i < 0 {
		return 0
	}
	return (float64(i) + min(max(fraction, 0), 1)) / float64(len(f.steps))
}

// backoff is how long to wait before the n-th repetition of something, from 1.
func backoff(n int) time.Duration {
	const first, most = 200 * time.Millisecond, 10 * time.Second
	return min(first<<min(n-1, 10), most)
}
