package controller

import (
	"bytes"
	"context"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"dormouse/api"
	"dormouse/controller/store"
	"dormouse/controller/store/archive"
	"dormouse/controller/store/etcd"
)

// onlyTheLeader can answer these: they need streams to agents, what those measure,
// or the leader's view of what it is about to do.
var onlyTheLeader = map[string]bool{"logs": true, "top": true, "plan-preempt": true, "plan-swap": true}

// ownToEach are answers that two controllers, or two moments, do not have in common.
var ownToEach = map[string]bool{"metrics": true, "backup": true, "nodes": true, "audit": true, "top": true}

// readOnly is the store of a follower that must not even try to write.
type readOnly struct {
	etcd.Following
	t *testing.T
}

func (r readOnly) Update(context.Context, func(store.Tx) error) error {
	r.t.Error("a follower wrote to the store")
	return store.ErrDeposed
}

// TestAFollowerAnswersEveryQuestionAsTheLeaderDoes asks each route that only
// reads, of things that are there, as an admin and as a user. A new route that a
// follower answers in another way fails here.
func TestAFollowerAnswersEveryQuestionAsTheLeaderDoes(t *testing.T) {
	l := newLeague(t, 2, "metal-0")
	leader := l.leader()
	follower := l.follower(leader)
	follower.controller.store = readOnly{follower.controller.store.(etcd.Following), t}
	alice := l.asUser("alice", 1000)
	var job, waiting api.JobDetail
	alice.want(http.StatusCreated, "POST", "/v1/jobs", api.JobSpec{Name: "runs", Command: []string{"forever"}}, &job)
	l.awaitPhase(job.ID, api.PhaseRunning)
	op := l.do("/v1/jobs/"+job.ID+"/checkpoints", nil)
	alice.want(http.StatusCreated, "POST", "/v1/jobs", api.JobSpec{Name: "waits", Command: []string{"forever"}, Constraints: map[string]string{"disk": "fast"}}, &waiting)
	ids := map[string][]string{"jobs": {job.ID, waiting.ID}, "checkpoints": {op.Checkpoint}, "operations": {op.ID}}
	for _, r := range allRoutes(l.simulation) {
		if r.method != http.MethodGet {
			continue
		}
		for _, path := range l.paths(r, ids, waiting.ID) {
			for name, who := range map[string]*simulation{"admin": l.simulation, "alice": alice} {
				status, want := ask(who, leader, path, "")
				got, text := ask(who, follower, path, "")
				if got != status || !ownToEach[r.id] && text != want {
					t.Errorf("GET %s as %s (%s): the follower says %d %s\nthe leader %d %s", path, name, r.id, got, text, status, want)
				}
				if name == "admin" && got != http.StatusOK && !strings.HasPrefix(r.id, "plan-") {
					t.Errorf("GET %s: status %d: %s", path, got, text)
				}
				alone, text := ask(who, follower, path, leader.config.Name)
				if (alone == http.StatusServiceUnavailable) != onlyTheLeader[r.id] {
					t.Errorf("GET %s as %s (%s): without a leader, the follower says %d %s", path, name, r.id, alone, text)
				}
			}
		}
	}
}

// paths are what to ask a route.
func (l *league) paths(r apiRoute, ids map[string][]string, in string) (paths []string) {
	l.t.Helper()
	suffix := map[string]string{"wait-job": "?timeout=1ms", "plan-swap": "?in=" + in}[r.id]
	if !strings.Contains(r.path, "{id}") {
		return []string{r.path + suffix}
	}
	known := ids[strings.Split(r.path, "/")[2]]
	if len(known) == 0 {
		l.t.Fatalf("this test has nothing to ask %s about", r.path)
	}
	for _, id := range known {
		paths = append(paths, strings.Replace(r.path, "{id}", id, 1)+suffix)
	}
	return paths
}

// ask asks one of the controllers, as if another had handed the question on when
// that is named.
func ask(who *simulation, p *player, path, from string) (int, string) {
	who.t.Helper()
	request, err := http.NewRequestWithContext(who.t.Context(), http.MethodGet, p.URL()+path, nil)
	if err != nil {
		who.t.Fatal(err)
	}
	request.Header.Set("Authorization", "Bearer "+who.token)
	if from != "" {
		request.Header.Set(headerForwarded, from)
	}
	response, raw, err := who.roundTrip(request)
	if err != nil {
		who.t.Fatal(err)
	}
	return response.StatusCode, string(raw)
}

func TestABackupOfAFollowerIsWhole(t *testing.T) {
	l := newLeague(t, 2, "metal-0")
	follower := l.follower(l.leader())
	id := l.submit(api.JobSpec{Name: "kept"})
	_, text := ask(l.simulation, follower, "/v1/backup", "another")
	file := filepath.Join(t.TempDir(), "backup")
	writeTestFile(t, file, text)
	if _, err := archive.Check(file); err != nil {
		t.Fatal(err)
	}
	for item, err := range archive.Items(file) {
		if err != nil {
			t.Fatal(err)
		}
		if item.Table == store.Jobs && item.Key == id && bytes.Contains(item.Value, []byte("kept")) {
			return
		}
	}
	t.Error("the job is not in it")
}
