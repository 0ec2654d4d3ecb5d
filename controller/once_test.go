package controller

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/client"
	"dormouse/controller/store"
)

// sendKeyed makes a request with an Idempotency-Key.
func (s *simulation) sendKeyed(key, method, path, body string) (status int, answer string, replayed bool) {
	s.t.Helper()
	request, err := http.NewRequestWithContext(s.t.Context(), method, s.url+path, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	request.Header.Set("Authorization", "Bearer "+adminToken)
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set(keyHeader, key)
	response, raw, err := s.roundTrip(request)
	if err != nil {
		s.t.Fatal(err)
	}
	return response.StatusCode, strings.TrimSpace(string(raw)), response.Header.Get(replayHeader) == "true"
}

func (s *simulation) count(table store.Table) (n int) {
	s.t.Helper()
	err := s.store.View(s.t.Context(), func(tx store.Tx) error {
		return tx.Scan(table, "", func(string, []byte) error { n++; return nil })
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

// TestRepeatedRequestIsDoneOnce lets every kind of request that changes the
// store be answered, and repeats it after the controller was killed.
func TestRepeatedRequestIsDoneOnce(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	job := s.running(api.JobSpec{Name: "one"})
	other := s.running(api.JobSpec{Name: "two"})
	s.end(other, 0)
	s.awaitPhase(other, api.PhaseCompleted)
	cp := s.do("/v1/jobs/"+job+"/checkpoints", nil).Checkpoint
	rm := s.do("/v1/jobs/"+job+"/checkpoints", nil).Checkpoint
	for i, c := range []struct {
		method, path, body string
		status             int
		then               func()
	}{
		{"POST", "/v1/jobs", `{"command":["x"]}`, 201, nil},
		{"POST", "/v1/jobs/one/checkpoints", `{"label":"a"}`, 202, func() { s.settled(job) }},
		{"POST", "/v1/checkpoints/" + cp + "/verify", "", 202, nil},
		{"POST", "/v1/verify", "", 202, nil},
		{"POST", "/v1/checkpoints/" + cp + "/clone", `{}`, 202, nil},
		{"POST", "/v1/jobs/one/suspend", "", 202, func() { s.awaitPhase(job, api.PhaseSuspended) }},
		{"POST", "/v1/jobs/one/resume", `{}`, 202, func() { s.awaitPhase(job, api.PhaseRunning) }},
		{"POST", "/v1/jobs/one/restart", `{}`, 202, func() { s.awaitPhase(job, api.PhaseRunning) }},
		{"DELETE", "/v1/checkpoints/" + rm, "", 204, nil},
		{"DELETE", "/v1/jobs/two", "", 204, nil},
		{"POST", "/v1/jobs/one/kill", `{"signal":"USR1"}`, 202, func() { s.awaitPhase(job, api.PhaseFailed) }}, // it does not survive that
		{"POST", "/v1/jobs/one/suspend", "", 409, nil},
		{"POST", "/v1/jobs/none/suspend", "", 404, nil},
		{"POST", "/v1/jobs", `{"command":[]}`, 422, nil},
		{"POST", "/v1/nodes/west-0/kill", "", 204, nil},
	} {
		key := fmt.Sprintf("key %d", i)
		status, first, replayed := s.sendKeyed(key, c.method, c.path, c.body)
		if status != c.status || replayed {
			t.Fatalf("%s %s: want status %d, got %d: %s", c.method, c.path, c.status, status, first)
		}
		if c.then != nil {
			c.then()
		}
		s.restart()
		s.awaitReady("east-0")
		s.eventually("no job is to be placed, which takes an operation", func(tx store.Tx) (bool, error) {
			jobs, err := store.All[jobRecord](tx, store.Jobs)
			return !slices.ContainsFunc(jobs, func(j jobRecord) bool { return j.waits() }), err
		})
		operations, jobs := s.count(store.Operations), s.count(store.Jobs)
		status, second, replayed := s.sendKeyed(key, c.method, c.path, c.body)
		if status != c.status || second != first || !replayed {
			t.Errorf("%s %s again: want status %d and %s, got %d (replayed: %v) and %s", c.method, c.path, c.status, first, status, replayed, second)
		}
		if o, j := s.count(store.Operations), s.count(store.Jobs); o != operations || j != jobs {
			t.Errorf("%s %s again: %d operations and %d jobs became %d and %d", c.method, c.path, operations, jobs, o, j)
		}
	}
}

// settled waits until the job has no operation.
func (s *simulation) settled(id string) {
	s.t.Helper()
	s.eventually("job "+id+" is settled", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && job.Operation == "", err
	})
}

func TestEffectAndReceiptAreOneTransaction(t *testing.T) {
	s := newSimulation(t, "east-0")
	var job api.JobDetail
	_, answer, _ := s.sendKeyed("k", "POST", "/v1/jobs", `{"command":["x"]}`)
	if err := json.Unmarshal([]byte(answer), &job); err != nil {
		t.Fatal(err)
	}
	s.restart()
	// A transaction that has no receipt had no effect, and so may be repeated:
	// the one of a request whose effect fails to be written has neither.
	err := s.store.Update(t.Context(), func(tx store.Tx) error {
		call := &call{receipt: "r", request: "q"}
		if err := s.c.answered(withCall(t.Context(), call), tx, 201, job); err != nil {
			return err
		}
		if err := s.c.answered(withCall(t.Context(), call), tx, 201, job); err == nil {
			t.Error("one request was answered twice")
		}
		return errAnswered
	})
	if err != errAnswered {
		t.Fatal(err)
	}
	if found, err := s.c.findReceipt(t.Context(), &call{receipt: "r"}); err != nil || found != nil {
		t.Errorf("the receipt of a transaction that failed: %v, %v", found, err)
	}
}

func TestTwinsAreOneRequest(t *testing.T) {
	s := newSimulation(t, "east-0")
	answers := make([]string, 8)
	var group sync.WaitGroup
	for i := range answers {
		group.Go(func() {
			_, answers[i], _ = s.sendKeyed("twin", "POST", "/v1/jobs", `{"command":["x"]}`)
		})
	}
	group.Wait()
	for _, a := range answers {
		if a != answers[0] {
			t.Errorf("twins were answered %s and %s", answers[0], a)
		}
	}
	if n := s.count(store.Jobs); n != 1 {
		t.Errorf("want one job, got %d", n)
	}
}

func TestKeyIsForOneRequest(t *testing.T) {
	s := newSimulation(t, "east-0")
	s.sendKeyed("k", "POST", "/v1/jobs", `{"command":["x"]}`)
	const detail = "the Idempotency-Key was used for another request before: give every request a key of its own"
	for _, c := range []struct{ path, body string }{
		{"/v1/jobs", `{"command":["y"]}`}, {"/v1/jobs?all=true", `{"command":["x"]}`}, {"/v1/verify", ""},
	} {
		if status, answer, _ := s.sendKeyed("k", "POST", c.path, c.body); status != 422 || !strings.Contains(answer, detail) {
			t.Errorf("%s %s under a used key: %d %s", c.path, c.body, status, answer)
		}
	}
	if status, answer, _ := s.sendKeyed(strings.Repeat("k", longestKey+1), "POST", "/v1/verify", ""); status != 400 {
		t.Errorf("a key that is too long: %d %s", status, answer)
	}
	if status, answer, _ := s.sendKeyed("big", "POST", "/v1/jobs", strings.Repeat(" ", maxBody+2)); status != 413 {
		t.Errorf("a request that is too long: %d %s", status, answer)
	}
}

func TestReceiptsAreForgottenAfterADay(t *testing.T) {
	s := newSimulation(t, "east-0")
	s.sendKeyed("new", "POST", "/v1/verify", "")
	old := &call{receipt: "0ld"}
	err := s.store.Update(t.Context(), func(tx store.Tx) error {
		age := receiptAge(time.Now().Add(-receiptLife-time.Minute), old.receipt)
		return errors.Join(store.Put(tx, store.Receipts, receiptKey(old.receipt), receipt{}), tx.Put(store.Receipts, age, []byte("{}")))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.c.forgetReceipts(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := s.count(store.Receipts); n != 2 { // by key and by age
		t.Errorf("want the records of one receipt, got %d", n)
	}
	if _, _, replayed := s.sendKeyed("new", "POST", "/v1/verify", ""); !replayed {
		t.Error("the new receipt was forgotten")
	}
	if found, err := s.c.findReceipt(t.Context(), old); err != nil || found != nil {
		t.Errorf("the old receipt: %v, %v", found, err)
	}
}

// TestKilledBetweenEffectAndAnswer has the controller die with each answer in
// its hands, and the real client ask the next one.
func TestKilledBetweenEffectAndAnswer(t *testing.T) {
	s := newSimulation(t, "east-0")
	requests := 0
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if requests++; requests > 1 {
			s.awaitReady("east-0")
		}
		r.URL.Host, r.URL.Scheme, r.RequestURI = strings.TrimPrefix(s.url, "https://"), "https", ""
		response, raw, err := s.roundTrip(r)
		if err != nil {
			t.Error(err)
			return
		}
		if requests == 1 {
			s.restart()
			if conn, _, err := w.(http.Hijacker).Hijack(); err == nil {
				conn.Close()
			}
			return
		}
		for name, values := range response.Header {
			w.Header()[name] = values
		}
		w.WriteHeader(response.StatusCode)
		w.Write(raw)
	}))
	defer front.Close()
	c, err := client.New(client.Config{URL: front.URL, Token: adminToken})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, job := t.Context(), ""
	for _, step := range []struct {
		name string
		do   func() error
		left func() bool
	}{
		{"submit", func() error {
			detail, err := c.Submit(ctx, api.JobSpec{Command: []string{"x"}})
			if err == nil {
				job = detail.ID
			}
			return err
		}, func() bool { s.awaitPhase(job, api.PhaseRunning); return s.count(store.Jobs) == 1 }},
		{"checkpoint", func() error {
			_, err := c.Checkpoint(ctx, job, "")
			return err
		}, func() bool { s.settled(job); return s.count(store.Checkpoints) == 1 }},
		{"suspend", func() error {
			_, err := c.Suspend(ctx, job)
			return err
		}, func() bool { s.awaitPhase(job, api.PhaseSuspended); return s.count(store.Checkpoints) == 2 }},
		{"resume", func() error {
			_, err := c.Resume(ctx, job, client.Wake{})
			return err
		}, func() bool { return s.awaitPhase(job, api.PhaseRunning).Restarts == 1 }},
		{"kill", func() error {
			_, err := c.Kill(ctx, job, "")
			return err
		}, func() bool { s.awaitPhase(job, api.PhaseCancelled); return true }},
		{"remove", func() error { return c.RemoveJob(ctx, job) }, func() bool { return s.count(store.Jobs) == 0 }},
	} {
		requests = 0
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if requests != 2 {
			t.Errorf("%s: want one repetition, got %d requests", step.name, requests)
		}
		if !step.left() {
			t.Errorf("%s was done twice:\n%s", step.name, s.dump())
		}
	}
}
