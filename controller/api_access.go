package controller

import (
	"bytes"
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"dormouse/api"
	"dormouse/controller/access"
	"dormouse/controller/store"
)

// A request passes, in this order: who asks (authorize), how often (Limiter),
// whether it was answered before (once), whether the role may use the route, and,
// for users, whether the thing it names is theirs (decide). What changes
// something, and what is refused, is written into the audit log.

// Guesses of tokens are limited by the address that they come from.
const (
	guessRate  = 5
	guessBurst = 30
)

// localAdmin is who shows the token in the controller's own file.
var localAdmin = access.Identity{Token: "local", Name: "local", Role: api.RoleAdmin}

type askerKey struct{}

// askerOf is who makes the request; the controller itself has no request.
func askerOf(ctx context.Context) (access.Identity, bool) {
	who, ok := ctx.Value(askerKey{}).(access.Identity)
	return who, ok
}

// sees reports whether what belongs to owner may be shown to who asks.
func sees(ctx context.Context, owner string) bool {
	who, ok := askerOf(ctx)
	return !ok || who.Sees(owner)
}

// owner is whose that will be which the request makes.
func owner(ctx context.Context) string {
	if who, ok := askerOf(ctx); ok {
		return who.Owner()
	}
	return ""
}

// authorize finds out who asks, and lets nobody else through.
func (c *Controller) authorize(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if open(r.URL.Path) {
			next.ServeHTTP(w, r)
			return
		}
		who, problem := c.identify(w, r)
		if problem != nil {
			c.refuse(w, r, who, problem)
			return
		}
		ctx, end := c.guests.admit(context.WithValue(r.Context(), askerKey{}, who), who.Token)
		defer end()
		if who.Token != localAdmin.Token {
			c.watchGuests.Do(func() { c.work.Go(func() { c.guardGuests(c.run) }) })
		}
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// refuse answers a request that does not get far enough to be looked at.
func (c *Controller) refuse(w http.ResponseWriter, r *http.Request, who access.Identity, p *problem) {
	entry := auditEntry(r, who)
	entry.Status, entry.Detail = p.Status, p.Detail
	c.auditLater(entry)
	writeProblem(w, p)
}

// identify returns who asks, or why that is not known or too often.
func (c *Controller) identify(w http.ResponseWriter, r *http.Request) (access.Identity, *problem) {
	secret, bearer := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if bearer && subtle.ConstantTimeCompare([]byte(secret), []byte(c.parts.AdminToken)) == 1 {
		return localAdmin, nil
	}
	if wait, ok := c.guesses.Take(address(r), c.clock.Now()); !ok {
		return access.Identity{}, tooOften(w, wait, fmt.Sprintf("more than %d requests a second without a valid token come from %s", guessRate, address(r)))
	}
	if !bearer {
		w.Header().Set("WWW-Authenticate", `Bearer realm="dormouse"`)
		return access.Identity{}, newProblem(http.StatusUnauthorized, "a token is needed: set DORMOUSE_TOKEN, or give --token")
	}
	token, why, err := c.findToken(r.Context(), secret)
	if err != nil {
		return access.Identity{}, asProblem(err)
	}
	if why != "" {
		w.Header().Set("WWW-Authenticate", `Bearer realm="dormouse", error="invalid_token"`)
		return token.Identity(), newProblem(http.StatusUnauthorized, "%s", why)
	}
	c.guesses.Return(address(r))
	who := token.Identity()
	if wait, ok := c.limiter.Take(who.Token, c.clock.Now()); !ok {
		return who, tooOften(w, wait, fmt.Sprintf("the token %s asks more often than %g times a second", who.Name, c.parts.Access.Rate))
	}
	return who, nil
}

func tooOften(w http.ResponseWriter, wait time.Duration, why string) *problem {
	seconds := int(math.Ceil(wait.Seconds()))
	w.Header().Set("Retry-After", strconv.Itoa(seconds))
	return newProblem(http.StatusTooManyRequests, "%s: try again in %d s", why, seconds)
}

// address is where a request comes from, without its port.
func address(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

// findToken looks a secret up, and says why it is not good.
func (c *Controller) findToken(ctx context.Context, secret string) (token access.Token, why string, err error) {
	err = c.store.View(ctx, func(tx store.Tx) error {
		token, err = store.Get[access.Token](tx, store.AccessTokens, access.Hash(secret))
		return err
	})
	if errors.Is(err, store.ErrNotFound) {
		return token, "the token is wrong: `dormouse env` prints the right one on the controller's machine", nil
	}
	return token, token.Valid(c.clock.Now()), err
}

// decide lets a token's role through to a route, and users only to what is theirs.
func (c *Controller) decide(ctx huma.Context, next func(huma.Context)) {
	r, w := humago.Unwrap(ctx)
	if err := c.mayUse(r, ctx.Operation().OperationID, ctx.Operation().Path); err != nil {
		writeProblem(w, asProblem(err))
		return
	}
	next(ctx)
}

// only guards a route that is not in the OpenAPI description.
func (c *Controller) only(route string, handle http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := c.mayUse(r, route, ""); err != nil {
			writeProblem(w, asProblem(err))
			return
		}
		handle.ServeHTTP(w, r)
	})
}

func (c *Controller) mayUse(r *http.Request, route, template string) error {
	who, known := askerOf(r.Context())
	if !known {
		return errors.New("a request came in without an asker")
	}
	if err := access.Decide(who, route); err != nil {
		return err
	}
	table, named := tableOf(template)
	if who.Role != api.RoleUser || !named || access.Rules[route] != access.Own {
		return nil
	}
	id, err := c.ownID(r.Context(), who, table, r.PathValue("id"))
	if err != nil {
		return err
	}
	r.SetPathValue("id", id) // by name and prefix, too, only what is theirs is found
	if route == "exec" && !who.AllowRoot {
		return c.runsAsUser(r.Context(), id)
	}
	return nil
}

// tableOf is where the {id} of a route's path is.
func tableOf(template string) (store.Table, bool) {
	for start, table := range map[string]store.Table{"/v1/jobs/{id}": store.Jobs, "/v1/checkpoints/{id}": store.Checkpoints, "/v1/operations/{id}": store.Operations} {
		if strings.HasPrefix(template, start) {
			return table, true
		}
	}
	return "", false
}

// runsAsUser refuses to enter a job that another token of its user was allowed
// to run as root.
func (c *Controller) runsAsUser(ctx context.Context, id string) error {
	job, err := c.job(ctx, id)
	if err != nil {
		return err
	}
	if uid, _, _ := strings.Cut(job.Spec.User, ":"); uid == "0" {
		return &access.DeniedError{Reason: fmt.Sprintf("job %s runs as root, which this token was not allowed", id)}
	}
	return nil
}

// owned is what all records that belong to somebody have.
type owned struct {
	ID    string    `json:"id"`
	Name  string    `json:"name"`
	Phase api.Phase `json:"phase"`
	Owner string    `json:"owner"`
}

// ownID resolves an id, a name or a prefix among what belongs to a user. What
// belongs to others is refused by its id, and not found by anything less.
func (c *Controller) ownID(ctx context.Context, who access.Identity, table store.Table, ref string) (id string, err error) {
	what := strings.TrimSuffix(string(table), "s")
	err = c.store.View(ctx, func(tx store.Tx) error {
		exact, err := store.Get[owned](tx, table, ref)
		switch {
		case err == nil && who.Sees(exact.Owner):
			id = ref
			return nil
		case err == nil:
			return &access.DeniedError{Reason: fmt.Sprintf("%s %s does not belong to user %s", what, ref, who.User)}
		case !errors.Is(err, store.ErrNotFound):
			return err
		}
		var named, live, begun []string
		err = tx.Scan(table, "", func(key string, value []byte) error {
			var o owned
			if err := json.Unmarshal(value, &o); err != nil {
				return err
			}
			switch {
			case ref == "" || !who.Sees(o.Owner):
			case table == store.Jobs && o.Name == ref && !o.Phase.Final():
				named, live = append(named, key), append(live, key)
			case table == store.Jobs && o.Name == ref:
				named = append(named, key)
			case strings.HasPrefix(key, ref):
				begun = append(begun, key)
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, found := range [][]string{live, named} {
			if len(found) == 1 {
				id = found[0]
				return nil
			}
		}
		if len(named) == 0 {
			named = begun
		}
		id, err = onlyOne(named, what, ref)
		return err
	})
	return id, err
}

// visibleJob resolves a job that who asks may see.
func (c *Controller) visibleJob(ctx context.Context, ref string) (string, error) {
	who, ok := askerOf(ctx)
	if !ok || who.Role != api.RoleUser {
		return ref, nil
	}
	return c.ownID(ctx, who, store.Jobs, ref)
}

// confine narrows what the one who asks may submit.
func (c *Controller) confine(ctx context.Context, spec *api.JobSpec) error {
	who, ok := askerOf(ctx)
	if !ok {
		return nil
	}
	return access.Confine(who, access.Limits{Paths: c.parts.Access.Paths, Priority: c.parts.Access.Priority}, spec)
}

// auditing writes down what a request came to.
func (c *Controller) auditing(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen := &auditWriter{statusWriter: statusWriter{ResponseWriter: w, status: http.StatusOK}}
		next.ServeHTTP(seen, r)
		refused := seen.status == http.StatusUnauthorized || seen.status == http.StatusForbidden
		if !mutates(r.Method) && !refused || upgrades(r) && seen.status < 400 || w.Header().Get(replayHeader) != "" {
			return
		}
		call := callOf(r.Context())
		if seen.status < 400 && call != nil && call.audited {
			return // together with its effect
		}
		who, _ := askerOf(r.Context())
		entry := auditEntry(r, who)
		entry.Status, entry.Detail = seen.status, seen.detail()
		if seen.status >= 400 {
			c.auditLater(entry)
			return
		}
		c.auditNow(r.Context(), entry)
	})
}

// auditWriter keeps what is answered to a refused request.
type auditWriter struct {
	statusWriter
	head bytes.Buffer
}

func (w *auditWriter) Write(data []byte) (int, error) {
	if w.status >= 400 && w.head.Len() < 4<<10 {
		w.head.Write(data)
	}
	return w.ResponseWriter.Write(data)
}

func (w *auditWriter) detail() string {
	var p api.Problem
	if json.Unmarshal(w.head.Bytes(), &p) != nil {
		return ""
	}
	return p.Detail
}
