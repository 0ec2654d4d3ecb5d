package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/spf13/pflag"

	"dormouse/api"
	"dormouse/client"
)

// The exit statuses; a contract with scripts.
const (
	exitDone     = 0
	exitFailed   = 1
	exitUsage    = 2
	exitNotFound = 3
	exitRefused  = 4
	exitTimedOut = 5
)

// usageError is a command line that cannot be understood or cannot be meant.
type usageError struct{ reason string }

func (e *usageError) Error() string { return e.reason }

func usagef(format string, args ...any) error {
	return &usageError{reason: fmt.Sprintf(format, args...)}
}

// timeoutError is a wait that took longer than it was allowed to.
type timeoutError struct{ reason string }

func (e *timeoutError) Error() string { return e.reason }

// refusedError is something that the state of this machine forbids.
type refusedError struct{ reason string }

func (e *refusedError) Error() string { return e.reason }

// statusError ends the command with a status of its own and no message: the
// command that exec ran has said what there was to say.
type statusError struct{ status int }

func (e *statusError) Error() string { return fmt.Sprintf("exit status %d", e.status) }

// operationError is an operation that ended otherwise than done.
type operationError struct{ operation *api.Operation }

func (e *operationError) Error() string {
	if e.operation.Error != "" {
		return e.operation.Error
	}
	return fmt.Sprintf("the %s was %s; `dormouse events %s` may say why", e.operation.Kind, e.operation.Phase, e.operation.Job)
}

// report writes why a command failed and returns its exit status.
func report(to io.Writer, command string, err error) int {
	status := exitStatus(err)
	var silent *statusError
	if errors.As(err, &silent) {
		return status
	}
	message := strings.TrimSpace(err.Error())
	if errors.Is(err, context.Canceled) {
		message = "interrupted"
	}
	var usage *usageError
	if errors.As(err, &usage) {
		message += fmt.Sprintf("; see `%s --help`", command)
	}
	fmt.Fprintf(to, "dormouse: %s\n", message)
	return status
}

func exitStatus(err error) int {
	var silent *statusError
	var usage *usageError
	var timeout *timeoutError
	var refused *refusedError
	var operation *operationError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &silent):
		return silent.status
	case errors.As(err, &usage):
		return exitUsage
	case errors.As(err, &timeout):
		return exitTimedOut
	case errors.As(err, &refused):
		return exitRefused
	case errors.As(err, &operation):
		if operation.operation.Refused {
			return exitRefused
		}
		return exitFailed
	}
	switch client.Status(err) {
	case http.StatusBadRequest, http.StatusUnprocessableEntity:
		return exitUsage
	case http.StatusNotFound:
		return exitNotFound
	case http.StatusConflict, http.StatusForbidden:
		return exitRefused
	case http.StatusRequestTimeout, http.StatusGatewayTimeout:
		return exitTimedOut
	}
	return exitFailed
}

// flagError words the flag parser's complaints for people.
func flagError(err error) error {
	var unknown *pflag.NotExistError
	if errors.As(err, &unknown) {
		return fmt.Errorf("there is no flag %s (put -- before a program that has flags of its own)", dashed(unknown.GetSpecifiedName()))
	}
	var missing *pflag.ValueRequiredError
	if errors.As(err, &missing) {
		return fmt.Errorf("the flag %s needs a value", dashed(missing.GetSpecifiedName()))
	}
	var invalid *pflag.InvalidValueError
	if errors.As(err, &invalid) {
		flag := invalid.GetFlag()
		if expected, ok := flagTypes[flag.Value.Type()]; ok {
			return fmt.Errorf("--%s is %q, but it must be %s", flag.Name, invalid.GetValue(), expected)
		}
		return fmt.Errorf("--%s: %w", flag.Name, errors.Unwrap(invalid))
	}
	return err
}

// flagTypes says what the flag parser's own types take.
var flagTypes = map[string]string{
	"bool":     "true or false",
	"int":      "a whole number",
	"float64":  "a number",
	"duration": "a duration such as 90s, 10m or 1h30m",
}

func dashed(name string) string {
	if len(name) == 1 {
		return "-" + name
	}
	return "--" + name
}
