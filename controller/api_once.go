package controller

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"dormouse/api"
	"dormouse/controller/store"
)

// A request that changes something may carry an Idempotency-Key. What it was
// answered, a receipt, is stored in the transaction of its effect: whoever
// repeats the request under the same key, because the connection broke or the
// controller was killed before the answer came, gets that answer and no second
// effect. What was refused for good is remembered too, after the fact: a refusal
// has no effect to be one with. Nothing is remembered of requests that failed
// (5xx) or may fare better later (401, 403, 408, 413, 429): those are for
// repeating.

const (
	keyHeader    = "Idempotency-Key"
	replayHeader = "Idempotency-Replayed" // true: the answer is a stored one
	longestKey   = 200
	receiptLife  = 24 * time.Hour
	receiptsAtA  = 1000 // time are forgotten, so that no transaction is long
)

// receipt is the answer to a request, stored under whose and which key it was.
type receipt struct {
	Request string          `json:"request"` // the SHA-256 of method, target and body
	Status  int             `json:"status"`
	Body    json.RawMessage `json:"body,omitempty"` // from status 400 on, a problem document
}

// Receipts have two records, so that the oldest are found without reading all.
func receiptKey(id string) string               { return "key/" + id }
func receiptAge(at time.Time, id string) string { return fmt.Sprintf("age/%016x/%s", at.Unix(), id) }
func receiptOfAgeKey(key string) (id string)    { return key[strings.LastIndexByte(key, '/')+1:] }
func mutates(method string) bool {
	return method != http.MethodGet && method != http.MethodHead && method != http.MethodOptions
}
func upgrades(r *http.Request) bool { return r.Header.Get("Upgrade") != "" }
func repeatable(status int) bool    { return status >= 500 || retryStatus[status] }

var retryStatus = map[int]bool{
	http.StatusUnauthorized: true, http.StatusForbidden: true, http.StatusRequestTimeout: true,
	http.StatusRequestEntityTooLarge: true, http.StatusTooManyRequests: true,
}

// call is a request that changes something, while it is served.
type call struct {
	receipt string // what its receipt is stored under; empty: it came without a key
	request string // as in receipt
	entry   api.AuditEntry
	audited bool // with its effect
}

type callKey struct{}

func callOf(ctx context.Context) *call {
	c, _ := ctx.Value(callKey{}).(*call)
	return c
}

func withCall(ctx context.Context, c *call) context.Context {
	return context.WithValue(ctx, callKey{}, c)
}

var errAnswered = errors.New("this request was answered before")

// answered writes, in the transaction of a request's effect, what the request
// is answered. Every request that changes the store ends its transaction so. It
// fails, and so undoes the transaction, when a twin of the request was quicker.
func (c *Controller) answered(ctx context.Context, tx store.Tx, status int, body any) error {
	call := callOf(ctx)
	if call == nil {
		return nil
	}
	entry := call.entry
	entry.Status, entry.Target = status, targetOf(body)
	if err := c.writeAudit(tx, entry); err != nil {
		return err
	}
	call.audited = true
	if call.receipt == "" {
		return nil
	}
	if _, err := tx.Get(store.Receipts, receiptKey(call.receipt)); !errors.Is(err, store.ErrNotFound) {
		return errors.Join(err, errAnswered)
	}
	r := receipt{Request: call.request, Status: status}
	if body != nil {
		var err error
		if r.Body, err = json.Marshal(body); err != nil {
			return fmt.Errorf("encode the answer: %w", err)
		}
	}
	return c.putReceipt(tx, call.receipt, r)
}

func (c *Controller) putReceipt(tx store.Tx, id string, r receipt) error {
	return errors.Join(
		store.Put(tx, store.Receipts, receiptKey(id), r),
		tx.Put(store.Receipts, receiptAge(c.clock.Now(), id), []byte("{}")),
	)
}

// targetOf is the id of what a request was about or brought.
func targetOf(body any) string {
	switch b := body.(type) {
	case api.JobDetail:
		return b.ID
	case api.Operation:
		return b.ID
	case api.NewToken:
		return b.ID
	}
	return ""
}

// called gives every request that changes something its call.
func (c *Controller) called(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if mutates(r.Method) {
			who, _ := askerOf(r.Context())
			r = r.WithContext(withCall(r.Context(), &call{entry: auditEntry(r, who)}))
		}
		next.ServeHTTP(w, r)
	})
}

// once answers a repeated request from its receipt.
func (c *Controller) once(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !mutates(r.Method) || upgrades(r) {
			next.ServeHTTP(w, r)
			return
		}
		call := callOf(r.Context())
		body, err := c.readCall(w, r, call)
		if err != nil {
			writeProblem(w, asProblem(err))
			return
		}
		r.Body = io.NopCloser(body)
		if call.receipt == "" {
			next.ServeHTTP(w, r)
			return
		}
		if !c.replay(w, r, call) {
			answer := &heldAnswer{header: make(http.Header), to: w}
			next.ServeHTTP(answer, r)
			c.conclude(w, r, call, answer)
		}
	})
}

// readCall reads a whole request, which is short; one that is too long or
// breaks off does so for whoever reads body.
func (c *Controller) readCall(w http.ResponseWriter, r *http.Request, call *call) (body io.Reader, err error) {
	key := r.Header.Get(keyHeader)
	if key == "" {
		return r.Body, nil
	}
	if len(key) > longestKey || strings.ContainsFunc(key, func(c rune) bool { return c < ' ' || c > '~' }) {
		return nil, newProblem(http.StatusBadRequest, "the %s must be up to %d printable ASCII characters", keyHeader, longestKey)
	}
	deadline := http.NewResponseController(w)
	if err := deadline.SetReadDeadline(time.Now().Add(bodyTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return nil, err
	}
	raw, broken := io.ReadAll(r.Body)
	if err := deadline.SetReadDeadline(time.Time{}); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return nil, err
	}
	request := sha256.New()
	fmt.Fprintf(request, "%s\n%s\n%s", r.Method, r.URL.RequestURI(), raw)
	who, _ := askerOf(r.Context())
	id := sha256.Sum256([]byte(who.Token + "\n" + key))
	if broken != nil {
		return io.MultiReader(bytes.NewReader(raw), brokenBody{broken}), nil
	}
	call.receipt, call.request = hex.EncodeToString(id[:]), hex.EncodeToString(request.Sum(nil))
	return bytes.NewReader(raw), nil
}

type brokenBody struct{ err error }

func (b brokenBody) Read([]byte) (int, error) { return 0, b.err }

// replay answers from the receipt, and reports whether there is one.
func (c *Controller) replay(w http.ResponseWriter, r *http.Request, call *call) bool {
	found, err := c.findReceipt(r.Context(), call)
	if err != nil {
		writeProblem(w, asProblem(err))
		return true
	}
	if found != nil {
		found.write(w, call)
	}
	return found != nil
}

func (c *Controller) findReceipt(ctx context.Context, call *call) (found *receipt, err error) {
	err = c.store.View(ctx, func(tx store.Tx) error {
		found, err = getReceipt(tx, call)
		return err
	})
	return found, err
}

// getReceipt is nil when there is none.
func getReceipt(tx store.Tx, call *call) (*receipt, error) {
	r, err := store.Get[receipt](tx, store.Receipts, receiptKey(call.receipt))
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	return &r, err
}

func (r *receipt) write(w http.ResponseWriter, call *call) {
	if r.Request != call.request {
		writeProblem(w, newProblem(http.StatusUnprocessableEntity, "the %s was used for another request before: give every request a key of its own", keyHeader))
		return
	}
	w.Header().Set(replayHeader, "true")
	switch {
	case r.Status >= 400:
		w.Header().Set("Content-Type", "application/problem+json")
	case len(r.Body) > 0:
		w.Header().Set("Content-Type", "application/json")
	}
	w.WriteHeader(r.Status)
	w.Write(r.Body) // a client that has gone asks again
}

// conclude sends what a request is answered: its own answer or, when there is
// a receipt of another, that one: its twin was quicker, or it broke between its
// effect and here. The receipt of a request whose client has gone is still
// wanted: by its repetition.
func (c *Controller) conclude(w http.ResponseWriter, r *http.Request, call *call, answer *heldAnswer) {
	written, err := c.remember(context.WithoutCancel(r.Context()), call, answer)
	if err != nil {
		c.log.Warn("a request was answered without a receipt: its repetition may be answered otherwise", "request", r.Method+" "+r.URL.Path, "error", err)
	}
	if written != nil && (written.Status != answer.status || written.Request != call.request) {
		written.write(w, call)
		return
	}
	answer.send()
}

// remember returns the receipt of a request, and writes one when there is none
// and its answer is for good.
func (c *Controller) remember(ctx context.Context, call *call, answer *heldAnswer) (*receipt, error) {
	found, err := c.findReceipt(ctx, call)
	if err != nil || found != nil || repeatable(answer.status) {
		return found, err
	}
	err = c.store.Update(ctx, func(tx store.Tx) error {
		if found, err = getReceipt(tx, call); err != nil || found != nil {
			return err
		}
		return c.putReceipt(tx, call.receipt, receipt{Request: call.request, Status: answer.status, Body: bytes.TrimSpace(answer.body.Bytes())})
	})
	return found, err
}

// heldAnswer holds an answer back until its receipt is written.
type heldAnswer struct {
	header http.Header
	status int
	body   bytes.Buffer
	to     http.ResponseWriter
}

func (a *heldAnswer) Header() http.Header { return a.header }

func (a *heldAnswer) WriteHeader(status int) {
	if a.status == 0 {
		a.status = status
	}
}

func (a *heldAnswer) Write(data []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	return a.body.Write(data)
}

// SetReadDeadline lets huma bound how long a request may take to arrive.
func (a *heldAnswer) SetReadDeadline(t time.Time) error {
	return http.NewResponseController(a.to).SetReadDeadline(t)
}

func (a *heldAnswer) send() {
	for name, values := range a.header {
		a.to.Header()[name] = values
	}
	a.to.WriteHeader(max(a.status, http.StatusOK))
	a.to.Write(a.body.Bytes()) // a client that has gone asks again
}

// forgetReceipts removes the receipts that are too old.
func (c *Controller) forgetReceipts(ctx context.Context) error {
	for {
		var old []string
		oldest := c.clock.Now().Add(-receiptLife)
		err := c.store.Update(ctx, func(tx store.Tx) error {
			old = old[:0]
			err := tx.Scan(store.Receipts, "age/", func(key string, _ []byte) error {
				if !strings.HasPrefix(key, "age/") || key >= receiptAge(oldest, "") || len(old) == receiptsAtA {
					return store.ErrStop
				}
				old = append(old, key)
				return nil
			})
			for _, key := range old {
				err = errors.Join(err, tx.Delete(store.Receipts, key), tx.Delete(store.Receipts, receiptKey(receiptOfAgeKey(key))))
			}
			return err
		})
		if err != nil || len(old) < receiptsAtA {
			return err
		}
	}
}

// tidyEvery is how often what is too old is forgotten.
const tidyEvery = 10 * time.Minute

// tidy forgets what is kept for a time only.
func (c *Controller) tidy(ctx context.Context) {
	for {
		err := errors.Join(c.forgetReceipts(ctx), c.forgetAudit(ctx), c.forgetEvents(ctx), c.forgetTokens(ctx), c.prune(ctx))
		if err != nil && ctx.Err() == nil {
			c.log.Warn("old answers, tokens, operations, events and audit entries were not forgotten: they are at the next time", "error", err)
		}
		if c.pause(ctx, tidyEvery) != nil {
			return
		}
	}
}
