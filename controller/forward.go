package controller

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	"dormouse/api"
	"dormouse/controller/pki"
	"dormouse/controller/store/etcd"
	"dormouse/internal/lazyregexp"
)

const (
	// leaderWait is how long a request waits for a leader: a dead one is replaced
	// in less.
	leaderWait = 10 * time.Second
	// headerForwarded marks what came from another controller, and is not handed on
	// again; headerNotLeading the answer of one that does not lead.
	headerForwarded  = "Dormouse-Forwarded"
	headerNotLeading = "Dormouse-Not-Leading"
	// leaderPoll bounds how long a change of leaders goes unnoticed by a request
	// that waits for one which answers.
	leaderPoll = 200 * time.Millisecond
)

// fromStore are the requests that the store alone answers. What is not named here
// needs what only the leader has: streams to agents, or the right to write.
var fromStore = lazyregexp.New(`^/(healthz|metrics|openapi[^/]*|v1/(version|controllers|clouds|nodes|events|whoami|tokens|audit|backup|jobs|jobs/[^/]+|jobs/[^/]+/(wait|checkpoints)|checkpoints|checkpoints/[^/]+|operations|operations/[^/]+))$`)

// follow answers requests while another controller leads.
func (m *member) follow() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case isGRPC(r):
			m.sendToLeader(w)
		case r.Method == http.MethodGet && fromStore.MatchString(r.URL.Path):
			m.following.ServeHTTP(w, r)
		case r.Header.Get(headerForwarded) != "":
			w.Header().Set(headerNotLeading, "1")
			notLeading(w)
		default:
			m.forward.ServeHTTP(w, r)
		}
	})
}

func isGRPC(r *http.Request) bool {
	return r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc")
}

func notLeading(w http.ResponseWriter) {
	w.Header().Set("Retry-After", "1")
	writeProblem(w, newProblem(http.StatusServiceUnavailable, "no controller leads at the moment: try again in a few seconds"))
}

// sendToLeader tells an agent where it has to go: a gRPC answer without messages,
// which is only trailers sent as headers.
func (m *member) sendToLeader(w http.ResponseWriter) {
	message := "no controller leads at the moment"
	if leader, some := m.store.Leader(); some && leader.URL != m.self.URL {
		message = fmt.Sprintf("controller %s does not lead, %s at %s does", m.self.Name, leader.Name, leader.URL)
		w.Header().Set(api.LeaderHeader, leader.URL)
	}
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("Grpc-Status", fmt.Sprint(int(codes.Unavailable)))
	w.Header().Set("Grpc-Message", url.PathEscape(message)) // percent-encoded, as gRPC over HTTP/2 has it
}

// forwarder hands requests on to the leader.
type forwarder struct {
	store     *etcd.Store
	proxy     *httputil.ReverseProxy
	transport *http.Transport
}

func newForwarder(shared *etcd.Store, self etcd.Candidate, roots *x509.CertPool, log *slog.Logger) *forwarder {
	f := &forwarder{store: shared}
	f.transport = &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			connection, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, network, address)
			if err != nil {
				return nil, &dialError{err}
			}
			return connection, nil
		},
		// HTTP/1.1, because exec upgrades its connection.
		TLSClientConfig:     &tls.Config{RootCAs: roots, ServerName: pki.ServerName, MinVersion: tls.VersionTLS13},
		TLSHandshakeTimeout: 5 * time.Second, MaxIdleConnsPerHost: 16, IdleConnTimeout: time.Minute,
	}
	f.proxy = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.Header.Set(headerForwarded, self.Name)
			r.SetXForwarded()
		},
		Transport:     f,
		FlushInterval: -1, // logs are read as they are written
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if errors.Is(err, errNoLeader) {
				notLeading(w)
				return
			}
			writeProblem(w, newProblem(http.StatusBadGateway, "the leading controller did not answer (%v): look whether the request was done before it is repeated", err))
		},
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	return f
}

func (f *forwarder) close() { f.transport.CloseIdleConnections() }

// dialError says that a request did not even leave.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

var errNoLeader = errors.New("no controller leads")

// ServeHTTP hands a request on. Its body is read first, so that it can be sent
// again when a controller that leads no more refuses it.
func (f *forwarder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") == "" {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil {
			writeProblem(w, newProblem(http.StatusRequestEntityTooLarge, "the request cannot be read, or is larger than %d bytes", maxBody))
			return
		}
		r.ContentLength = int64(len(body))
		r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	}
	f.proxy.ServeHTTP(w, r)
}

// mayRepeat reports whether a request may be sent again though it may have been
// acted upon: it changes nothing, or has a key by which it is done once.
func mayRepeat(r *http.Request) bool {
	return r.GetBody != nil && (r.Method == http.MethodGet || r.Header.Get(keyHeader) != "")
}

// RoundTrip implements http.RoundTripper: it sends a request to whoever leads,
// and again when it certainly was not acted upon, or may be repeated.
func (f *forwarder) RoundTrip(r *http.Request) (*http.Response, error) {
	waiting, cancel := context.WithTimeout(r.Context(), leaderWait)
	defer cancel()
	for {
		leader, some := f.store.Leader()
		if some {
			response, err := f.send(r, leader)
			var dial *dialError
			switch {
			case err == nil && response.Header.Get(headerNotLeading) == "":
				return response, nil
			case err == nil:
				response.Body.Close()
			case !errors.As(err, &dial) && !mayRepeat(r):
				return nil, err
			}
		}
		// Another leader, or the same one, when it has noticed that it leads.
		moment, done := context.WithTimeout(waiting, leaderPoll)
		f.store.WaitLeader(moment, leader)
		done()
		if waiting.Err() != nil {
			if r.Context().Err() != nil {
				return nil, r.Context().Err()
			}
			return nil, errNoLeader
		}
	}
}

func (f *forwarder) send(r *http.Request, leader etcd.Candidate) (*http.Response, error) {
	target, err := url.Parse(leader.URL)
	if err != nil {
		return nil, fmt.Errorf("the leader's address %q is no URL: %w", leader.URL, err)
	}
	out := r.Clone(r.Context())
	out.URL.Scheme, out.URL.Host, out.Host = target.Scheme, target.Host, target.Host
	if r.GetBody != nil {
		if out.Body, err = r.GetBody(); err != nil {
			return nil, err
		}
	}
	return f.transport.RoundTrip(out)
}
