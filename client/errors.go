package client

import (
	"errors"
	"fmt"
	"net/http"

	"dormouse/api"
)

// UnreachableError says that no controller answered.
type UnreachableError struct {
	URL string
	Err error
	// Sent: the call, which changes something, was sent before all of it was
	// given up. It may have been carried out.
	Sent bool
}

func (e *UnreachableError) Error() string {
	if e.Sent {
		return fmt.Sprintf("cannot reach the controller at %s any more (%v): it may have done what it was asked, so look before you repeat it", e.URL, e.Err)
	}
	return fmt.Sprintf("cannot reach the controller at %s (%v): is `dormouse up` running?", e.URL, e.Err)
}

func (e *UnreachableError) Unwrap() error { return e.Err }

// CertificateError says that what answered did not prove to be the controller.
type CertificateError struct {
	URL    string
	CAFile string
	Err    error
}

func (e *CertificateError) Error() string {
	if e.CAFile == "" {
		return fmt.Sprintf("the certificate of %s is not trusted (%v): give the controller's ca.pem with --ca or DORMOUSE_CA", e.URL, e.Err)
	}
	return fmt.Sprintf("the certificate of %s was not signed by %s (%v): is that file the ca.pem of this controller?", e.URL, e.CAFile, e.Err)
}

func (e *CertificateError) Unwrap() error { return e.Err }

// Status returns the HTTP status of the problem that err is, 0 when it is none.
func Status(err error) int {
	var problem *api.Problem
	if errors.As(err, &problem) {
		return problem.Status
	}
	return 0
}

// IsNotFound reports whether the controller does not know what was asked for.
func IsNotFound(err error) bool { return Status(err) == http.StatusNotFound }

// IsRefused reports whether the state, a policy or the token's role forbids what
// was asked.
func IsRefused(err error) bool {
	return Status(err) == http.StatusConflict || Status(err) == http.StatusForbidden
}

// IsUnreachable reports whether no controller answered.
func IsUnreachable(err error) bool {
	var unreachable *UnreachableError
	return errors.As(err, &unreachable)
}
