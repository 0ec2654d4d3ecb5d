package controller

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/controller/access"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
)

// as returns the simulation as the bearer of a new token sees it.
func (s *simulation) as(ask api.TokenRequest) *simulation {
	s.t.Helper()
	var token api.NewToken
	s.want(http.StatusCreated, "POST", "/v1/tokens", ask, &token)
	other := *s
	other.token = token.Secret
	return &other
}

func (s *simulation) asUser(name string, uid int) *simulation {
	return s.as(api.TokenRequest{Name: name + "-token", Role: api.RoleUser, User: fmt.Sprintf("%s:%d:%d", name, uid, uid)})
}

// apiRoute is one way to ask the controller.
type apiRoute struct{ id, method, path string }

// allRoutes are the routes of the OpenAPI description, and those outside of it.
func allRoutes(s *simulation) (routes []apiRoute) {
	var document struct {
		Paths map[string]map[string]struct {
			OperationID string `json:"operationId"`
		} `json:"paths"`
	}
	s.want(http.StatusOK, "GET", "/openapi.json", nil, &document)
	for path, methods := range document.Paths {
		for method, op := range methods {
			routes = append(routes, apiRoute{op.OperationID, strings.ToUpper(method), path})
		}
	}
	for _, plain := range s.c.plainRoutes() {
		method, path, _ := strings.Cut(plain.pattern, " ")
		routes = append(routes, apiRoute{plain.id, method, path})
	}
	return routes
}

// TestEveryRouteDecidesForEveryRole asks every route as every role, of things
// that belong to somebody else. A new route needs a rule, or this fails.
func TestEveryRouteDecidesForEveryRole(t *testing.T) {
	s := newSimulation(t, "east-0")
	bob := s.asUser("bob", 2000)
	var job api.JobDetail
	bob.want(http.StatusCreated, "POST", "/v1/jobs", api.JobSpec{Command: []string{"forever"}}, &job)
	s.awaitPhase(job.ID, api.PhaseRunning)
	op := s.do("/v1/jobs/"+job.ID+"/checkpoints", nil)
	roles := map[api.Role]*simulation{
		api.RoleOperator: s.as(api.TokenRequest{Name: "op", Role: api.RoleOperator}),
		api.RoleUser:     s.asUser("alice", 1000),
	}
	ids := map[string]string{"jobs": job.ID, "checkpoints": op.Checkpoint, "operations": op.ID, "nodes": "none", "tokens": "none"}
	routes := allRoutes(s)
	for _, r := range routes {
		rule, known := access.Rules[r.id]
		if !known {
			t.Errorf("%s %s (%s) has no rule: add one to access.Rules", r.method, r.path, r.id)
			continue
		}
		named := strings.Contains(r.path, "{id}")
		if named {
			r.path = strings.Replace(r.path, "{id}", ids[strings.Split(r.path, "/")[2]], 1)
		}
		for role, who := range roles {
			denied := rule == access.Admin || role == api.RoleUser && (rule == access.Operator || rule == access.Own && named)
			if !denied && r.method != "GET" || r.id == "wait-job" && !denied {
				continue // that it may is for the other tests: here it would do it
			}
			status, raw, err := who.send(r.method, r.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			if denied != (status == http.StatusForbidden) {
				t.Errorf("%s %s as %s: status %d: %s", r.method, r.path, role, status, raw)
			}
			for what, id := range ids {
				if role == api.RoleUser && !denied && strings.Contains(string(raw), id) && id != "none" {
					t.Errorf("%s %s shows alice one of bob's %s: %s", r.method, r.path, what, raw)
				}
			}
		}
	}
	for id := range access.Rules {
		if !slices.ContainsFunc(routes, func(r apiRoute) bool { return r.id == id }) {
			t.Errorf("there is a rule for %s, and no such route", id)
		}
	}
}

// TestNothingIsAnsweredWithoutAToken but whether the controller lives, and the
// description of its interface.
func TestNothingIsAnsweredWithoutAToken(t *testing.T) {
	s := newSimulation(t)
	s.c.guesses = access.NewLimiter(1e6, 1e6)
	routes := append(allRoutes(s), apiRoute{"", "GET", "/v1/none"}, apiRoute{"", "GET", "/"}, apiRoute{"", "GET", "/debug/pprof/"})
	for _, r := range routes {
		for _, header := range []string{"", "Bearer ", "Bearer wrong", "Basic " + s.token, s.token} {
			request, err := http.NewRequestWithContext(t.Context(), r.method, s.url+strings.Replace(r.path, "{id}", "x", 1), nil)
			if err != nil {
				t.Fatal(err)
			}
			request.Header.Set("Authorization", header)
			response, raw, err := s.roundTrip(request)
			if err != nil {
				t.Fatal(err)
			}
			if response.StatusCode != http.StatusUnauthorized || response.Header.Get("WWW-Authenticate") == "" && header == "" {
				t.Errorf("%s %s with %q: status %d: %s", r.method, r.path, header, response.StatusCode, raw)
			}
		}
	}
}

// TestUsersDoNotKeepTheirPlaceAgainstOthers: a preemption is for the sake of
// somebody else, so that the victim's owner cannot call it off.
func TestUsersDoNotKeepTheirPlaceAgainstOthers(t *testing.T) {
	s := newSimulation(t, "east-0")
	alice := s.asUser("alice", 1000)
	var job api.JobDetail
	alice.want(http.StatusCreated, "POST", "/v1/jobs", api.JobSpec{Command: []string{"forever"}, CPUs: 4}, &job)
	s.awaitPhase(job.ID, api.PhaseRunning)
	open := make(chan struct{})
	release := sync.OnceFunc(func() { close(open) })
	t.Cleanup(release)
	reached := s.faultOnce(protocol.StepCapture, func(*simAgent) fault { return fault{act: func() { <-open }} })
	urgent := s.submit(api.JobSpec{CPUs: 4, Priority: 1})
	<-reached
	op := s.jobNow(job.ID).Operation
	detail := alice.want(http.StatusForbidden, "POST", "/v1/operations/"+op+"/cancel", nil, nil)
	if want := "operation " + op + " makes room for others: only an admin or an operator may cancel it"; detail != want {
		t.Errorf("the refusal: %q, want %q", detail, want)
	}
	release()
	s.awaitPhase(urgent, api.PhaseRunning)
	alice.want(http.StatusForbidden, "POST", "/v1/jobs/"+urgent+"/kill", nil, nil)
}

func TestUsersSeeTheirOwnOnly(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	alice, bob := s.asUser("alice", 1000), s.asUser("bob", 2000)
	ids := map[*simulation]string{}
	for _, who := range []*simulation{alice, bob} {
		var job api.JobDetail
		who.want(http.StatusCreated, "POST", "/v1/jobs", api.JobSpec{Name: "db", Command: []string{"forever"}}, &job)
		ids[who] = job.ID
		s.awaitPhase(job.ID, api.PhaseRunning)
		var op api.Operation
		who.want(http.StatusAccepted, "POST", "/v1/jobs/db/checkpoints", nil, &op) // each finds its own by name
		if op.Job != job.ID {
			t.Errorf("a name found the job %s of somebody else, want %s", op.Job, job.ID)
		}
		s.awaitEnd(op.ID)
		s.settled(job.ID)
	}
	for who, id := range ids {
		for path, of := range map[string]func(map[string]any) any{
			"/v1/jobs":        func(v map[string]any) any { return v["id"] },
			"/v1/checkpoints": func(v map[string]any) any { return v["job"] },
			"/v1/operations":  func(v map[string]any) any { return v["job"] },
		} {
			var list []map[string]any
			who.want(http.StatusOK, "GET", path, nil, &list)
			if len(list) == 0 || slices.ContainsFunc(list, func(v map[string]any) bool { return of(v) != id }) {
				t.Errorf("%s shows %v, want those of job %s only", path, list, id)
			}
		}
		_, raw, err := who.send("GET", "/v1/events", nil)
		if err != nil || !strings.Contains(string(raw), id) {
			t.Errorf("the events: %s, %v", raw, err)
		}
		for other, otherID := range ids {
			if other != who && strings.Contains(string(raw), otherID) {
				t.Errorf("the events tell of job %s: %s", otherID, raw)
			}
		}
	}
	if detail := alice.want(http.StatusForbidden, "GET", "/v1/jobs/"+ids[bob], nil, nil); detail != "job "+ids[bob]+" does not belong to user alice" {
		t.Errorf("the refusal: %q", detail)
	}
	alice.want(http.StatusForbidden, "POST", "/v1/jobs/"+ids[bob]+"/kill", nil, nil)
	alice.want(http.StatusForbidden, "GET", "/v1/events?job="+ids[bob], nil, nil)
	alice.want(http.StatusNotFound, "GET", "/v1/jobs/"+ids[bob][:6], nil, nil)
	if job := s.jobNow(ids[alice]); job.Owner != "alice" || job.Spec.User != "1000:1000" || !job.Spec.Confined {
		t.Errorf("alice's job: owner %q, user %q, confined %v", job.Owner, job.Spec.User, job.Spec.Confined)
	}
	alice.want(http.StatusForbidden, "POST", "/v1/jobs", api.JobSpec{Command: []string{"x"}, User: "root"}, nil)
}

func TestRevokedAndExpiredTokensEndWhatTheyHaveOpen(t *testing.T) {
	s := newSimulation(t, "east-0")
	for name, ask := range map[string]api.TokenRequest{
		"revoked": {Name: "revoked", Role: api.RoleOperator},
		"expired": {Name: "expired", Role: api.RoleOperator, ExpiresMS: 1500},
	} {
		who := s.as(ask)
		request, err := http.NewRequestWithContext(t.Context(), "GET", s.url+"/v1/events?follow=true", nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Authorization", "Bearer "+who.token)
		response, err := s.client.Do(request)
		if err != nil || response.StatusCode != http.StatusOK {
			t.Fatalf("%s: %v, %v", name, response, err)
		}
		defer response.Body.Close()
		lines := bufio.NewReader(response.Body)
		if _, err := lines.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		if name == "revoked" {
			s.want(http.StatusNoContent, "DELETE", "/v1/tokens/revoked", nil, nil)
		}
		ended := make(chan error, 1)
		go func() {
			_, err := lines.WriteTo(discard{})
			ended <- err
		}()
		select {
		case <-ended:
		case <-time.After(patience):
			t.Fatalf("the stream of the %s token goes on", name)
		}
		if status, raw, _ := who.send("GET", "/v1/jobs", nil); status != http.StatusUnauthorized || !strings.Contains(string(raw), name) {
			t.Errorf("the %s token: %d %s", name, status, raw)
		}
	}
}

type discard struct{}

func (discard) Write(data []byte) (int, error) { return len(data), nil }

func TestTokensAreHashedAtRest(t *testing.T) {
	s := newSimulation(t)
	who := s.as(api.TokenRequest{Name: "a", Role: api.RoleAdmin})
	s.want(http.StatusConflict, "POST", "/v1/tokens", api.TokenRequest{Name: "a", Role: api.RoleAdmin}, nil)
	_, answer, _ := s.sendKeyed("k", "POST", "/v1/tokens", `{"name":"b","role":"operator"}`)
	var keyed api.NewToken
	if err := json.Unmarshal([]byte(answer), &keyed); err != nil || keyed.Secret == "" {
		t.Fatalf("%s: %v", answer, err)
	}
	if _, again, replayed := s.sendKeyed("k", "POST", "/v1/tokens", `{"name":"b","role":"operator"}`); !replayed || strings.Contains(again, keyed.Secret) {
		t.Errorf("the secret was told again: %s", again)
	}
	dump := ""
	for _, table := range store.Tables() {
		s.store.View(t.Context(), func(tx store.Tx) error {
			return tx.Scan(table, "", func(key string, value []byte) error {
				dump += key + " " + string(value) + "\n"
				return nil
			})
		})
	}
	for _, secret := range []string{who.token, keyed.Secret, adminToken} {
		if strings.Contains(dump, secret) {
			t.Errorf("the store holds the secret %s", secret)
		}
	}
}

func TestAuditLogTellsWhoDidWhat(t *testing.T) {
	s := newSimulation(t, "east-0")
	alice := s.asUser("alice", 1000)
	var job api.JobDetail
	alice.want(http.StatusCreated, "POST", "/v1/jobs", api.JobSpec{Command: []string{"x"}}, &job)
	alice.want(http.StatusForbidden, "GET", "/v1/audit", nil, nil)
	alice.want(http.StatusForbidden, "POST", "/v1/nodes/east-0/drain", nil, nil)
	stranger := *s
	stranger.token = "wrong"
	stranger.want(http.StatusUnauthorized, "GET", "/v1/jobs", nil, nil)
	alice.want(http.StatusOK, "GET", "/v1/jobs", nil, nil) // changes nothing: not in it
	want := []string{
		"local POST /v1/tokens 201", "alice-token POST /v1/jobs 201", "alice-token GET /v1/audit 403",
		"alice-token POST /v1/nodes/east-0/drain 403", " GET /v1/jobs 401",
	}
	var got []string
	s.eventually("the refusals are written", func(tx store.Tx) (bool, error) {
		entries, err := store.All[api.AuditEntry](tx, store.Audit)
		got = nil
		for _, e := range entries {
			got = append(got, fmt.Sprintf("%s %s %s %d", e.Name, e.Method, e.Path, e.Status))
		}
		return len(entries) >= len(want), err
	})
	if slices.Sort(got); !slices.Equal(got, slices.Sorted(slices.Values(want))) {
		t.Errorf("want %q, got %q", want, got)
	}
	var entries []api.AuditEntry
	s.want(http.StatusOK, "GET", "/v1/audit", nil, &entries)
	i := slices.IndexFunc(entries, func(e api.AuditEntry) bool { return e.Path == "/v1/jobs" && e.Status == 201 })
	if i < 0 || entries[i].Target != job.ID || entries[i].User != "alice" || entries[i].Address != "127.0.0.1" {
		t.Errorf("the entry of the submission: %+v", entries)
	}
	s.c.parts.Access.AuditKeep = 2
	if err := s.c.forgetAudit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := s.count(store.Audit); n > 2 {
		t.Errorf("%d entries are kept, want at most 2", n)
	}
}

func TestOldEventsAreForgotten(t *testing.T) {
	s := newSimulation(t, "east-0")
	s.running(api.JobSpec{})
	before := s.count(store.Events)
	if before <= 2 {
		t.Fatalf("there are %d events, want more than are kept", before)
	}
	if err := s.c.forgetEvents(t.Context()); err != nil || s.count(store.Events) < before {
		t.Errorf("%d of %d events are kept (%v), want all: they are few", s.count(store.Events), before, err)
	}
	newest := s.c.newestEvent.Load()
	if err := s.c.forgetOldest(t.Context(), store.Events, newest, 2); err != nil {
		t.Fatal(err)
	}
	kept, _, err := s.c.events(t.Context(), "", 0, 100)
	if err != nil || len(kept) < 2 || kept[0].ID != newest-1 {
		t.Errorf("kept are %+v (%v), want the newest two before %d", kept, err, newest+1)
	}
}

func TestTokenThatAsksTooOftenIsToldWhenToAskAgain(t *testing.T) {
	s := newSimulation(t)
	s.c.limiter = access.NewLimiter(0.1, 3)
	who := s.as(api.TokenRequest{Name: "busy", Role: api.RoleOperator})
	for range 3 {
		who.want(http.StatusOK, "GET", "/v1/jobs", nil, nil)
	}
	request, err := http.NewRequestWithContext(t.Context(), "GET", s.url+"/v1/jobs", nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Authorization", "Bearer "+who.token)
	response, raw, err := s.roundTrip(request)
	if err != nil || response.StatusCode != http.StatusTooManyRequests {
		t.Errorf("the fourth request: %v, %s, %v", response, raw, err)
	}
	// Ten seconds for each request, of which some have passed.
	if after, err := strconv.Atoi(response.Header.Get("Retry-After")); err != nil || after < 1 || after > 10 {
		t.Errorf("the fourth request: Retry-After is %q", response.Header.Get("Retry-After"))
	}
	s.want(http.StatusOK, "GET", "/v1/jobs", nil, nil) // the local admin is let through
	stranger := *s
	stranger.token = "guess"
	for i := range guessBurst + 1 {
		status, _ := stranger.call("GET", "/v1/jobs", nil, nil)
		if want := map[bool]int{true: http.StatusUnauthorized, false: http.StatusTooManyRequests}[i < guessBurst-1]; i < guessBurst-1 && status != want || i == guessBurst && status != want {
			t.Errorf("guess %d: status %d, want %d", i, status, want)
		}
	}
}
