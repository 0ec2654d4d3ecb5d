package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"dormouse/controller/store"
)

// definite reports whether an error is etcd's refusal, so that nothing happened
// and repeating it is of no use.
func definite(err error) bool {
	for _, refusal := range []error{
		rpctypes.ErrTooManyOps, rpctypes.ErrRequestTooLarge, rpctypes.ErrNoSpace, rpctypes.ErrDuplicateKey,
		rpctypes.ErrPermissionDenied, rpctypes.ErrAuthFailed, rpctypes.ErrUserEmpty, rpctypes.ErrInvalidAuthMgmt,
	} {
		if errors.Is(rpctypes.Error(err), refusal) {
			return true
		}
	}
	return status.Code(err) == codes.ResourceExhausted && strings.Contains(err.Error(), "larger than max")
}

// explain makes one sentence of what etcd or its client answers.
func (s *Store) explain(err error) error {
	at := s.members()
	known := rpctypes.Error(err)
	var alert tls.AlertError
	switch {
	case s.life.Err() != nil:
		return store.ErrClosed
	case errors.Is(known, rpctypes.ErrNoSpace):
		return fmt.Errorf("%s is full: defragment it and disarm its alarm, or raise --quota-backend-bytes", at)
	case errors.Is(known, rpctypes.ErrRequestTooLarge), status.Code(err) == codes.ResourceExhausted && strings.Contains(err.Error(), "larger than max"):
		return fmt.Errorf("%s refuses a change of this size: raise its --max-request-bytes", at)
	case errors.Is(known, rpctypes.ErrTooManyOps):
		return fmt.Errorf("%s refuses a change of so many records: set its --max-txn-ops to 128 or more", at)
	case errors.Is(known, rpctypes.ErrPermissionDenied) && s.options.User == "":
		// etcd takes the name in a client's certificate for a user.
		return fmt.Errorf("%s asks for a user who may read and write %s*: set store.user and store.password_file", at, s.prefix)
	case errors.Is(known, rpctypes.ErrPermissionDenied):
		return fmt.Errorf("%s does not let user %q read and write %s*: grant it that, as with `etcdctl role grant-permission --prefix=true ROLE readwrite %s`", at, s.options.User, s.prefix, s.prefix)
	case errors.Is(known, rpctypes.ErrUserEmpty):
		return fmt.Errorf("%s asks for a user: set store.user and store.password_file", at)
	case errors.Is(known, rpctypes.ErrAuthFailed), errors.Is(known, rpctypes.ErrAuthNotEnabled):
		return fmt.Errorf("%s refuses user %q (%v): correct store.user and store.password_file", at, s.options.User, known)
	case errors.Is(err, context.Canceled):
		return err
	case errors.As(err, &alert), strings.Contains(err.Error(), "x509: "), strings.Contains(err.Error(), "tls: "):
		return certificatesError(at, err)
	}
	return &store.UnreachableError{Where: at, Err: errors.New(plainText(err))}
}

func certificatesError(at string, err error) error {
	return fmt.Errorf("%s and this controller do not accept each other's certificates (%s): correct store.ca, store.cert and store.key", at, plainText(err))
}

// untrusted finds out whether an etcd that could not be reached is there and one
// side refuses the other's certificate: gRPC tries that again until the time is
// over, and does not tell.
func (s *Store) untrusted(err error) error {
	var unreachable *store.UnreachableError
	if s.options.TLS == nil || !errors.As(err, &unreachable) {
		return err
	}
	for _, endpoint := range s.options.Endpoints {
		if refusal := s.shakeHands(strings.TrimPrefix(endpoint, "https://")); refusal != nil {
			return certificatesError("etcd at "+endpoint, refusal)
		}
	}
	return err
}

// shakeHands returns why a member's certificate, or ours, is refused. In TLS 1.3
// a server refuses when the client believes itself connected (RFC 8446, 4.4.2.4),
// so the answer to that is read, too.
func (s *Store) shakeHands(address string) error {
	ctx, cancel := context.WithTimeout(s.life, answerTime)
	defer cancel()
	connection, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil // it is not there
	}
	defer connection.Close()
	config := s.options.TLS.Clone()
	config.ServerName, _, _ = net.SplitHostPort(address)
	config.NextProtos = []string{"h2"}
	secured := tls.Client(connection, config)
	var wrong *tls.CertificateVerificationError
	var alert *net.OpError // "remote error", as crypto/tls has what the peer said
	err = secured.HandshakeContext(ctx)
	if err == nil {
		connection.SetReadDeadline(time.Now().Add(answerTime / 4))
		_, err = secured.Read(make([]byte, 1))
	}
	if errors.As(err, &wrong) || errors.As(err, &alert) && alert.Op == "remote error" {
		return err
	}
	return nil
}

// plainText is what gRPC wraps into its own words.
func plainText(err error) string {
	text := err.Error()
	if state, ok := status.FromError(err); ok {
		text = state.Message()
	}
	if errors.Is(err, context.DeadlineExceeded) || strings.Contains(text, "context deadline exceeded") {
		text = "no answer in time"
	}
	return strings.ReplaceAll(text, "\n", " ")
}
