package controller

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/access"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
)

// ignoreNotFound is for what may have been removed meanwhile.
func ignoreNotFound(err error) error {
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	return err
}

// problem is an answer to a request that cannot be served: RFC 9457.
type problem struct {
	api.Problem
}

// GetStatus implements huma.StatusError.
func (p *problem) GetStatus() int { return p.Status }

// ContentType implements huma.ContentTypeFilter.
func (p *problem) ContentType(string) string { return "application/problem+json" }

func newProblem(status int, format string, args ...any) *problem {
	return &problem{api.Problem{Title: http.StatusText(status), Status: status, Detail: fmt.Sprintf(format, args...)}}
}

// invalid says that a request makes no sense.
func invalid(format string, args ...any) error {
	return newProblem(http.StatusUnprocessableEntity, format, args...)
}

// notFound says that a thing is not there.
func notFound(format string, args ...any) error {
	return newProblem(http.StatusNotFound, format, args...)
}

// refused says that something may not be done in the present state.
func refused(format string, args ...any) error {
	return newProblem(http.StatusConflict, format, args...)
}

// asProblem makes an answer of any error.
func asProblem(err error) *problem {
	var p *problem
	var denied *access.DeniedError
	switch {
	case errors.As(err, &p):
		return p
	case errors.As(err, &denied):
		return newProblem(http.StatusForbidden, "%v", denied)
	case errors.Is(err, store.ErrDeposed):
		return newProblem(http.StatusServiceUnavailable, "%v: try again", store.ErrDeposed)
	case store.IsAway(err):
		return newProblem(http.StatusServiceUnavailable, "%v", err)
	case errors.Is(err, store.ErrClosed), errors.Is(err, errStopping):
		return newProblem(http.StatusServiceUnavailable, "%v", errStopping)
	}
	return newProblem(http.StatusInternalServerError, "%v", err)
}

// failure is why a step of an operation did not succeed.
type failure = protocol.Failure

// asFailure makes a failure of any error.
func asFailure(err error) *failure {
	if err == nil {
		return nil
	}
	var f *failure
	if errors.As(err, &f) {
		return &failure{Message: err.Error(), Refused: f.Refused, Retryable: f.Retryable, Lost: f.Lost}
	}
	var p *problem
	if errors.As(err, &p) {
		return &failure{Message: err.Error(), Refused: p.Status == http.StatusConflict || p.Status == http.StatusNotFound}
	}
	return &failure{Message: err.Error()}
}

func fromAgent(f *agentpb.Failure) error {
	if f == nil {
		return nil
	}
	return &failure{Message: f.GetMessage(), Refused: f.GetRefused(), Retryable: f.GetRetryable()}
}

// nodeLostError ends every command to a node that was lost.
type nodeLostError struct{ node string }

func (e *nodeLostError) Error() string { return fmt.Sprintf("node %s was lost", e.node) }

func isNodeLost(err error) bool {
	var lost *nodeLostError
	return errors.As(err, &lost)
}

func commas(list []string) string { return strings.Join(list, ", ") }

// alternatives lists phases as "a, b or c".
func alternatives(phases []api.Phase) string {
	text := ""
	for i, phase := range phases {
		switch {
		case i == 0:
		case i == len(phases)-1:
			text += " or "
		default:
			text += ", "
		}
		text += string(phase)
	}
	return text
}

// sortBy sorts by time and then by id.
func sortBy[T any](list []T, key func(T) (time.Time, string)) {
	slices.SortFunc(list, func(a, b T) int {
		at, aid := key(a)
		bt, bid := key(b)
		return cmp.Or(at.Compare(bt), cmp.Compare(aid, bid))
	})
}
