// Package client is the Go SDK of Dormouse's REST API; the command line uses
// nothing else.
//
// A Client is made once per installation and is safe for concurrent use. Several
// controllers are tried in turn: when one cannot be reached, or has no leader to
// turn to, the next is asked, and stays the one that is asked first. Every method
// takes a context that ends the call. What can go wrong is one of:
//
//   - *api.Problem: the controller answered with an error; Status is the HTTP
//     status (404 not found, 409 refused, 400 and 422 a bad request) and Detail
//     one sentence for people.
//   - *UnreachableError: no controller answered at any address.
//   - *CertificateError: something answered that is not the pinned controller.
//   - the context's error.
//
// A call that changes something carries an Idempotency-Key, and is repeated under
// the same key when its connection breaks, or the controller stops or is busy,
// before it is answered: the controller does it once. That ends with the
// Config's Patience. Calls that only ask are not repeated, nor is any that found
// nobody at first: a caller who waits for something long, such as an operation,
// decides itself how long a controller may be away.
//
// Long-running actions (Checkpoint, Suspend, Resume, ...) answer an
// api.Operation at once; Operation with a wait follows it. Logs and Events are
// streams read with a callback; Exec upgrades its connection and exchanges
// frames (see Session).
package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"dormouse/api"
)

// dialTimeout bounds how long a controller may take to accept a connection;
// nextTimeout if there are others to try.
const (
	dialTimeout = 10 * time.Second
	nextTimeout = 2 * time.Second
)

// A body larger than largeBody is sent when the controller has said that it will
// read it, or nothing within continueTimeout.
const (
	largeBody       = 64 << 10
	continueTimeout = 5 * time.Second
)

// maxProblemBytes bounds how much of an error's body is read.
const maxProblemBytes = 64 << 10

// Config says where the controller is and how to prove who is calling.
type Config struct {
	URL   string // https://HOST:PORT; of several controllers, separated by commas
	Token string // bearer token
	// CAFile holds the PEM certificates that may have signed the controller's
	// certificate. Empty: the system's authorities.
	CAFile string
	// Patience is for how long a call that changes something is repeated until it
	// is answered. Zero: 30 s. Negative: it is not.
	Patience time.Duration
}

// defaultPatience outlasts a controller's restart.
const defaultPatience = 30 * time.Second

// Client calls one controller, or one of several.
type Client struct {
	bases  []*url.URL
	first  atomic.Int32 // of bases, to be tried next
	token  string
	caFile string
	http   *http.Client

	patience time.Duration
}

// New checks the configuration; it does not connect.
func New(config Config) (*Client, error) {
	bases, err := parseURLs(config.URL)
	if err != nil {
		return nil, err
	}
	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12}
	if config.CAFile != "" {
		tlsConfig.RootCAs, err = readCA(config.CAFile)
		if err != nil {
			return nil, err
		}
	}
	patience := dialTimeout
	if len(bases) > 1 {
		patience = nextTimeout
	}
	// HTTP/1.1 only (ForceAttemptHTTP2 stays false): Exec upgrades its
	// connection, which HTTP/2 cannot.
	transport := &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: patience}).DialContext,
		TLSClientConfig:     tlsConfig,
		TLSHandshakeTimeout: patience,

		ExpectContinueTimeout: continueTimeout,
	}
	if config.Patience == 0 {
		config.Patience = defaultPatience
	}
	return &Client{
		bases: bases, token: config.Token, caFile: config.CAFile, patience: config.Patience,
		http: &http.Client{Transport: transport},
	}, nil
}

func parseURLs(list string) (bases []*url.URL, err error) {
	for text := range strings.SplitSeq(list, ",") {
		base, err := url.Parse(strings.TrimRight(strings.TrimSpace(text), "/"))
		if err != nil || base.Host == "" || (base.Scheme != "https" && base.Scheme != "http") {
			return nil, fmt.Errorf("the controller's address %q is not a URL such as https://127.0.0.1:7117", strings.TrimSpace(text))
		}
		bases = append(bases, base)
	}
	return bases, nil
}

func readCA(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the controller's CA certificate: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no PEM certificate: it must be the controller's ca.pem", file)
	}
	return pool, nil
}

// URL is the address of the controller that is asked first at the moment.
func (c *Client) URL() string { return c.bases[c.first.Load()].String() }

// Close lets go of idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// one asks for one thing.
func one[T any](ctx context.Context, c *Client, method, path string, query url.Values, in any) (*T, error) {
	answer := new(T)
	if err := c.call(ctx, method, path, query, in, answer); err != nil {
		return nil, err
	}
	return answer, nil
}

// list asks for a list; it is never nil when there is no error.
func list[T any](ctx context.Context, c *Client, path string, query url.Values) ([]T, error) {
	answer, err := one[[]T](ctx, c, http.MethodGet, path, query, nil)
	if err != nil {
		return nil, err
	}
	if *answer == nil {
		return []T{}, nil
	}
	return *answer, nil
}

// call sends in (nil: no body) and reads one JSON answer into out (nil: ignored).
func (c *Client) call(ctx context.Context, method, path string, query url.Values, in, out any) error {
	if method == http.MethodGet {
		return c.exchange(ctx, method, path, query, "", in, out)
	}
	return c.insist(ctx, func(key string) error {
		return c.exchange(ctx, method, path, query, key, in, out)
	})
}

func (c *Client) exchange(ctx context.Context, method, path string, query url.Values, key string, in, out any) error {
	response, err := c.send(ctx, method, path, query, key, in)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if out == nil || response.StatusCode == http.StatusNoContent {
		return nil
	}
	if err := json.NewDecoder(response.Body).Decode(out); err != nil {
		return c.failed(ctx, fmt.Errorf("read the answer to %s %s: %w", method, path, err))
	}
	return nil
}

// send returns the response of a call that succeeded; its body is the caller's
// to close. key is the Idempotency-Key, if any.
func (c *Client) send(ctx context.Context, method, path string, query url.Values, key string, in any) (*http.Response, error) {
	response, err := c.do(ctx, func(base string) (*http.Request, error) {
		request, err := c.request(ctx, method, base+path, query, in)
		if err == nil && key != "" {
			request.Header.Set("Idempotency-Key", key)
		}
		return request, err
	})
	if err != nil {
		return nil, err
	}
	if response.StatusCode >= 300 {
		defer response.Body.Close()
		return nil, problem(response)
	}
	return response, nil
}

// do asks one controller after the other, beginning with the one that answered
// last, until one answers. What may have been acted upon goes to another one
// only if doing it again changes nothing. A question whose connection breaks is asked
// once more: whoever was there may be there again.
//
// Whether anything was sent is not read from the error: net/http repeats a request
// that has a key by itself, when a connection that it had used before breaks, and
// tells how the last try ended.
func (c *Client) do(ctx context.Context, ask func(base string) (*http.Request, error)) (*http.Response, error) {
	left := len(c.bases)
	var sent atomic.Bool
	trace := &httptrace.ClientTrace{WroteHeaders: func() { sent.Store(true) }}
	for asked := false; ; {
		at := c.first.Load()
		request, err := ask(c.bases[at].String())
		if err != nil {
			return nil, err
		}
		response, err := c.http.Do(request.WithContext(httptrace.WithClientTrace(request.Context(), trace)))
		if err == nil && response.StatusCode != http.StatusServiceUnavailable || ctx.Err() != nil {
			return response, c.failed(ctx, err)
		}
		c.first.CompareAndSwap(at, (at+1)%int32(len(c.bases)))
		left--
		if left == 0 && !asked && request.Method == http.MethodGet && broke(err) {
			asked, left = true, 1
		}
		if left == 0 || sent.Load() && !repeatable(request) {
			return response, c.failedAt(ctx, c.bases[at], err, sent.Load() && request.Method != http.MethodGet)
		}
		if err == nil {
			response.Body.Close()
		}
	}
}

// repeatable reports whether a request that was sent may be sent again.
func repeatable(request *http.Request) bool {
	return request.Method == http.MethodGet || request.Header.Get("Idempotency-Key") != ""
}

// broke reports whether a connection ended that somebody had taken.
func broke(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// notSent reports whether a request did not even find anybody.
func notSent(err error) bool {
	var unreachable *UnreachableError
	if errors.As(err, &unreachable) && unreachable.Sent {
		return false
	}
	var dial *net.OpError
	return errors.As(err, &dial) && dial.Op == "dial"
}

func (c *Client) request(ctx context.Context, method, address string, query url.Values, in any) (*http.Request, error) {
	var body io.Reader
	if in != nil {
		encoded, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("encode the request for %s %s: %w", method, address, err)
		}
		body = bytes.NewReader(encoded)
	}
	if len(query) > 0 {
		address += "?" + query.Encode()
	}
	request, err := http.NewRequestWithContext(ctx, method, address, body)
	if err != nil {
		return nil, fmt.Errorf("make the request %s %s: %w", method, address, err)
	}
	if in != nil {
		request.Header.Set("Content-Type", "application/json")
		if request.ContentLength > largeBody {
			request.Header.Set("Expect", "100-continue")
		}
	}
	request.Header.Set("Accept", "application/json, application/problem+json")
	if c.token != "" {
		request.Header.Set("Authorization", "Bearer "+c.token)
	}
	return request, nil
}

// problem reads the error document of a failed call. An answer that is not one
// comes from something that is not a Dormouse controller, or from a proxy.
func problem(response *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(response.Body, maxProblemBytes))
	kind, _, _ := mime.ParseMediaType(response.Header.Get("Content-Type"))
	found := &api.Problem{}
	if (kind == "application/problem+json" || kind == "application/json") && json.Unmarshal(body, found) == nil && found.Error() != "" {
		found.Status, found.RetryAfter = response.StatusCode, retryAfter(response)
		return found
	}
	return &api.Problem{
		Title:  http.StatusText(response.StatusCode),
		Status: response.StatusCode,
		Detail: fmt.Sprintf("the controller answered %s to %s %s", response.Status, response.Request.Method, response.Request.URL.Path),
	}
}

// failed explains why no whole answer came, if err is not nil.
func (c *Client) failed(ctx context.Context, err error) error {
	return c.failedAt(ctx, c.bases[c.first.Load()], err, false)
}

func (c *Client) failedAt(ctx context.Context, from *url.URL, err error, sent bool) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var certificate *tls.CertificateVerificationError
	if errors.As(err, &certificate) {
		return &CertificateError{URL: from.String(), CAFile: c.caFile, Err: certificate.Err}
	}
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		err = wrapped.Err
	}
	return &UnreachableError{URL: from.String(), Err: err, Sent: sent}
}

// segment makes a user's word one segment of a path.
func segment(word string) string { return url.PathEscape(word) }
