package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"dormouse/api"
)

// fake is a controller that answers "METHOD /path" with a canned document, and
// remembers what it was asked.
type fake struct {
	t      *testing.T
	routes map[string]any // a value, a problem, or an http.HandlerFunc
	url    string

	mutex sync.Mutex
	calls []string // METHOD /path?query body
}

func newFake(t *testing.T, routes map[string]any) *fake {
	f := &fake{t: t, routes: routes}
	server := httptest.NewServer(f)
	t.Cleanup(server.Close)
	f.url = server.URL
	return f
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	f.mutex.Lock()
	f.calls = append(f.calls, strings.TrimSpace(r.Method+" "+r.URL.RequestURI()+" "+string(body)))
	f.mutex.Unlock()
	route, ok := f.routes[r.Method+" "+r.URL.Path]
	if !ok {
		route = &api.Problem{Title: "Not Found", Status: 404, Detail: "there is no " + r.URL.Path}
	}
	switch answer := route.(type) {
	case http.HandlerFunc:
		answer(w, r)
	case *api.Problem:
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(answer.Status)
		json.NewEncoder(w).Encode(answer)
	default:
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(answer)
	}
}

func (f *fake) called(call string) bool {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	for _, made := range f.calls {
		if made == call {
			return true
		}
	}
	return false
}

// inTurn answers with one document after the other, then with the last again.
func inTurn(answers ...any) http.HandlerFunc {
	var mutex sync.Mutex
	next := 0
	return func(w http.ResponseWriter, r *http.Request) {
		mutex.Lock()
		defer mutex.Unlock()
		json.NewEncoder(w).Encode(answers[next])
		next = min(next+1, len(answers)-1)
	}
}

var testNow = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// result is what a command line did.
type result struct {
	status      int
	out, errors string
}

// dormouse runs one command line against a controller (empty: none is known).
func dormouse(t *testing.T, controller string, args ...string) result {
	t.Helper()
	return dormouseIn(t, context.Background(), controller, "", args...)
}

func dormouseIn(t *testing.T, ctx context.Context, controller, input string, args ...string) result {
	t.Helper()
	out, errors := bytes.Buffer{}, bytes.Buffer{}
	c := &cli{
		in: strings.NewReader(input), out: &out, err: &errors, now: func() time.Time { return testNow }, runDir: t.TempDir(),
		getenv: func(name string) string {
			return map[string]string{"DORMOUSE_CONTROLLER": controller, "DORMOUSE_TOKEN": "secret", "PASSED": "on"}[name]
		},
	}
	status := run(ctx, c, args)
	return result{status, out.String(), errors.String()}
}

// check compares a result; want* may be empty to accept anything.
func (r result) check(t *testing.T, status int, out, errors string) {
	t.Helper()
	if r.status != status {
		t.Errorf("exit status %d, want %d; standard error: %s", r.status, status, r.errors)
	}
	if !strings.Contains(r.out, out) {
		t.Errorf("standard output is\n%s\nwant it to hold %q", r.out, out)
	}
	if !strings.Contains(r.errors, errors) {
		t.Errorf("standard error is\n%s\nwant it to hold %q", r.errors, errors)
	}
	if status != exitDone && strings.Count(strings.TrimSpace(r.errors), "\n") > 0 {
		t.Errorf("the error is more than one line:\n%s", r.errors)
	}
}

func number(n int) *int { return &n }

func moment(ago time.Duration) time.Time { return testNow.Add(-ago) }

var (
	started    = moment(50 * time.Second)
	finished   = moment(10 * time.Second)
	runningJob = api.JobDetail{
		Job: api.Job{
			ID: "j-aaaaaaaa", Name: "counter", Phase: api.PhaseRunning, Tasks: 1, Cloud: "east", Checkpoints: 2, Restarts: 1,
			Created: moment(time.Minute), Started: &started, Operation: "o-11111111",
		},
		Spec:       api.JobSpec{Command: []string{"count", "to", "10"}, Tasks: 1, CPUs: 1, MemBytes: 512 << 20, User: "root", Volumes: []api.Volume{{Source: "/srv", Destination: "/data"}}},
		TaskStatus: []api.TaskStatus{{Index: 0, Node: "east-1", Phase: api.PhaseRunning, Pid: 4711, VirtualIP: "10.90.0.1"}},
		Run:        2, From: "c-bbbbbbbb",
	}
	durableCheckpoint = api.Checkpoint{
		ID: "c-bbbbbbbb", Job: "j-aaaaaaaa", State: api.CheckpointDurable, Trigger: api.TriggerUser, Label: "first", Created: moment(30 * time.Second),
		PauseMS: 84.2, SizeBytes: 1 << 30, StoredBytes: 600 << 20, NewBytes: 6 << 20, Tasks: 1, Parent: "c-cccccccc", DurableMS: 1234,
	}
	readyNode = api.Node{ID: "east-1", Name: "east-1", Cloud: "east", State: api.NodeReady, CPUs: 2, MemBytes: 2 << 30, CPUsUsed: 1, MemUsed: 512 << 20, Tasks: 1, CRIUVersion: "4.2.1", Underlay: "100.64.0.2"}
)

// parallelJob has four tasks on two nodes.
func parallelJob() api.JobDetail {
	job := runningJob
	job.Tasks, job.Spec.Tasks, job.TaskStatus = 4, 4, nil
	for i := range 4 {
		job.TaskStatus = append(job.TaskStatus, api.TaskStatus{Index: i, Node: []string{"east-0", "east-1"}[i%2], Phase: api.PhaseRunning, Pid: 100 + i, VirtualIP: "10.64.16." + strconv.Itoa(1+i)})
	}
	return job
}

func phased(phase api.Phase, reason string, code *int) api.JobDetail {
	job := runningJob
	job.Phase, job.Reason, job.ExitCode, job.Finished = phase, reason, code, &finished
	return job
}

func operation(kind api.OperationKind, phase api.OperationPhase) api.Operation {
	return api.Operation{ID: "o-11111111", Kind: kind, Job: "j-aaaaaaaa", Phase: phase, Started: started, Step: "capture", Progress: 0.5, Checkpoint: "c-bbbbbbbb"}
}
