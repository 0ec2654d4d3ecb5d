package agent

import (
	"errors"
	"fmt"

	"dormouse/agent/criu"
	"dormouse/agent/plugins"
	"dormouse/agent/sandbox"
	"dormouse/api/agentpb"
)

// refusal is an error of what may not be done, as opposed to what broke.
type refusal struct{ err error }

func (r refusal) Error() string { return r.err.Error() }
func (r refusal) Unwrap() error { return r.err }

func refuse(format string, arguments ...any) error {
	return refusal{fmt.Errorf(format, arguments...)}
}

// retry is an error that may not come again once the task has run for a moment.
type retry struct{ err error }

func (r retry) Error() string { return r.err.Error() }
func (r retry) Unwrap() error { return r.err }

// errNoTask answers commands for tasks, or incarnations of tasks, that this
// node does not have.
var errNoTask = errors.New("this node has no such task")

// failure says err in the words of the protocol.
func failure(err error) *agentpb.Failure {
	f := &agentpb.Failure{Message: err.Error()}
	var refused refusal
	var tied *plugins.RefusedError
	var again retry
	switch {
	case errors.As(err, &refused), errors.As(err, &tied),
		errors.Is(err, criu.ErrMissing), errors.Is(err, criu.ErrTooOld),
		errors.Is(err, sandbox.ErrCommandNotFound), errors.Is(err, sandbox.ErrBadRequest), errors.Is(err, sandbox.ErrBadImage):
		f.Refused = true
	case errors.Is(err, criu.ErrInFlight), errors.Is(err, criu.ErrUnread), errors.Is(err, plugins.ErrUnsettled):
		f.Retryable, f.Refused = true, true // a connection that nobody ever accepts is the job's own
	case errors.As(err, &again), errors.Is(err, criu.ErrBusy):
		f.Retryable = true
	}
	return f
}
