package controller

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/store"
	"dormouse/monitor/tally"
)

// finds has the node's agent find something, and returns when that is stored.
func (a *simAgent) finds(f api.Finding) {
	a.t.Helper()
	f.Time = time.Now().UTC()
	body, err := json.Marshal(f)
	if err != nil {
		a.t.Fatal(err)
	}
	a.mu.Lock()
	seq := uint64(len(a.verdicts) + 1)
	a.verdicts = append(a.verdicts, &agentpb.TreeVerdict{Node: a.node, Stream: 1, Seq: seq, Body: body})
	a.mu.Unlock()
	for begun := time.Now(); ; {
		a.report(tally.Node{CPUs: simCPUs}, nil)
		a.mu.Lock()
		heard := a.heard
		a.mu.Unlock()
		if heard >= seq {
			return
		}
		if time.Since(begun) > patience {
			a.t.Fatalf("finding %d of node %s was not stored", seq, a.node)
		}
		time.Sleep(20 * time.Millisecond) // as a node's next round
	}
}

// report sends what was measured in this round, and all that was found.
func (a *simAgent) report(node tally.Node, tasks []tally.Task) {
	summary := tally.Fill(a.node, node, tasks)
	report := &agentpb.TreeReport{Round: time.Now().UnixNano() / int64(200*time.Millisecond), Summary: &agentpb.TreeSummary{}}
	for _, t := range summary.Tables {
		table := &agentpb.TreeTable{Rest: t.Rest, Floor: t.Floor}
		for _, r := range t.Rows {
			table.Rows = append(table.Rows, &agentpb.TreeRow{Key: r.Key, Values: r.Values})
		}
		report.Summary.Tables = append(report.Summary.Tables, table)
	}
	for _, h := range summary.Histograms {
		report.Summary.Histograms = append(report.Summary.Histograms, &agentpb.TreeHistogram{Counts: h.Counts})
	}
	a.mu.Lock()
	number := 0
	for _, other := range a.agents { // any number of its own will do
		if other.node < a.node {
			number++
		}
	}
	report.Verdicts = slices.Clone(a.verdicts)
	a.mu.Unlock()
	report.Summary.Nodes = []byte{1 << number}
	a.send(&agentpb.FromAgent{Body: &agentpb.FromAgent_TreeReport{TreeReport: report}})
}

// starves has the node of a task find that it is kept from working.
func (s *simulation) starves(id string, task int) {
	s.t.Helper()
	s.finding(id, task, api.Finding{
		Kind: api.FindingStarvation, Condition: "starved_cpu", Severity: 0.8,
		Explanation: fmt.Sprintf("task %d waited 81 %% of the last 60 s for a CPU (normal 3 %%)", task),
	})
}

func (s *simulation) finding(id string, task int, f api.Finding) {
	s.t.Helper()
	job := s.jobNow(id)
	f.Job, f.Task, f.Run = id, task, job.Run
	s.agent(job.TaskStatus[task].Node).finds(f)
}

func (s *simulation) awaitEvent(id, kind string) api.Event {
	s.t.Helper()
	s.eventually("job "+id+" has an event of type "+kind, func(tx store.Tx) (bool, error) {
		all, err := store.All[api.Event](tx, store.Events)
		return slices.ContainsFunc(all, func(e api.Event) bool { return e.Job == id && e.Type == kind }), err
	})
	events := s.eventsOf(id, kind)
	return events[len(events)-1]
}

func (s *simulation) awaitAction(id, action string) {
	s.t.Helper()
	s.eventually(fmt.Sprintf("what is done about job %s is %q", id, action), func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && job.Starvation != nil && strings.Contains(job.Starvation.Action, action), err
	})
}

func TestAStarvingJobIsSuspendedAndComesBackByItself(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.starves(id, 0)
	if e := s.awaitEvent(id, "starving"); e.Message != "task 0 waited 81 % of the last 60 s for a CPU (normal 3 %)" || e.Node != "east-0" {
		t.Errorf("the event: %+v", e)
	}
	s.eventually("it is asleep, and queued", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && (job.Queued && strings.Contains(job.Reason, "kept from working (task 0 waited 81 %") || job.Run == 2), err
	})
	job := s.awaitRun(id, 2)
	if list := s.checkpointsNow(id); len(list) != 1 || list[0].Trigger != api.TriggerStarvation {
		t.Errorf("its checkpoint: %+v", list)
	}
	if job.Starvation != nil || job.TaskStatus[0].Starvation != nil || job.Restarts != 1 || len(job.Incidents) != 0 {
		t.Errorf("the job that came back: %+v, starvation %+v", job.Job, job.Starvation)
	}
	// It is left alone now, whatever is found.
	s.starves(id, 0)
	s.awaitAction(id, "nothing is done before")
	if job := s.jobNow(id); job.Phase != api.PhaseRunning || job.Run != 2 {
		t.Errorf("the job: %+v", job.Job)
	}
}

func TestAJobThatBreathesAgainIsSaidTo(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{OnStarvation: api.StarvationIgnore})
	s.starves(id, 0)
	s.awaitAction(id, "nothing is done: its policy is ignore")
	s.finding(id, 0, api.Finding{Kind: api.FindingStarvation, Condition: api.ConditionHealthy, Explanation: "task 0 waited 2 % of the last 60 s for a CPU"})
	if e := s.awaitEvent(id, "recovered"); !strings.HasPrefix(e.Message, "task 0 waited 2 % of the last 60 s for a CPU; it was kept from working for ") {
		t.Errorf("the event: %+v", e)
	}
	if job := s.jobNow(id); job.Starvation != nil || job.TaskStatus[0].Starvation.Condition != api.ConditionHealthy || job.Phase != api.PhaseRunning {
		t.Errorf("the job: %+v", job.JobDetail)
	}
}

func TestTheStragglerOfAJobIsNamed(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	id := s.running(api.JobSpec{Tasks: 2, OnStarvation: api.StarvationNotify})
	s.finding(id, 0, api.Finding{Kind: api.FindingStarvation, Condition: "no_progress", Spins: true, Explanation: "task 0 spins"})
	s.starves(id, 1)
	s.eventually("the job is judged by both", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && job.Starvation != nil && job.Starvation.Condition == "starved_cpu", err
	})
	job := s.jobNow(id)
	if n := job.Starvation; *n.Task != 1 || n.Node != job.TaskStatus[1].Node || !slices.Equal(n.Waiting, []int{0}) {
		t.Errorf("the job is judged %+v", n)
	}
	if e := s.awaitEvent(id, "starving"); !strings.HasSuffix(e.Message, "waiting for it without rest: 1 other task; task 1 keeps the job back") {
		t.Errorf("the event: %q", e.Message)
	}
}

func TestAMigratedJobGoesOnElsewhere(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{OnStarvation: api.StarvationMigrate})
	s.starves(id, 0)
	s.awaitAction(id, "is not moved, no other node can have it: ")
	s.join("east-1")
	s.awaitReady("east-1")
	if job := s.awaitRun(id, 2); job.TaskStatus[0].Node != "east-1" {
		t.Errorf("the job is on %s", job.TaskStatus[0].Node)
	}
	if cp := s.checkpointsNow(id)[0]; cp.Trigger != api.TriggerStarvation {
		t.Errorf("its checkpoint: %+v", cp)
	}
}

// A job comes back to a node that starves others only when it has waited long
// for a better one.
func TestASuspendedJobAvoidsANodeThatStarvesOthers(t *testing.T) {
	s := newSimulation(t, "east-0")
	s.relief.Patient = 2 * time.Second
	s.restart()
	s.awaitReady("east-0")
	stays := s.running(api.JobSpec{OnStarvation: api.StarvationIgnore, Priority: 1})
	id := s.running(api.JobSpec{})
	s.starves(stays, 0)
	s.starves(id, 0)
	s.eventually("it waits for a better node", func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && strings.Contains(job.Reason, "node east-0 starves job "+stays+" (starved_cpu)"), err
	})
	since := s.jobNow(id).Yield.Since
	s.awaitRun(id, 2)
	if waited := time.Since(since); waited < 2*time.Second {
		t.Errorf("it came back after %s", waited)
	}
}

func TestAPressedNodeIsToldByItsFigures(t *testing.T) {
	s := newSimulation(t, "east-0")
	a := s.agent("east-0")
	deadline := time.Now().Add(patience)
	for {
		a.report(tally.Node{CPUs: simCPUs, MemoryStall: 0.5}, nil)
		if why := s.c.monitor.pressed(time.Now())["east-0"]; why != "" {
			if !strings.Contains(why, "stands still for memory 50 % of the time") {
				t.Errorf("the reason: %q", why)
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the node is not pressed")
		}
		time.Sleep(50 * time.Millisecond) // until the round is over
	}
}

func TestFindingsOfAnOlderRunOrOfAnotherNodeAreVoid(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	id := s.running(api.JobSpec{})
	job := s.jobNow(id)
	other := "east-0"
	if job.TaskStatus[0].Node == other {
		other = "west-0"
	}
	f := api.Finding{Kind: api.FindingHealth, Condition: api.ConditionUnhealthy, Job: id, Explanation: "x"}
	s.agent(job.TaskStatus[0].Node).finds(f) // of run 0
	f.Run = job.Run
	s.agent(other).finds(f)
	f.Task = 5
	s.agent(job.TaskStatus[0].Node).finds(f)
	if job := s.jobNow(id); job.Phase != api.PhaseRunning || job.TaskStatus[0].Health != nil {
		t.Errorf("the job: %+v", job.JobDetail)
	}
	if _, err := s.c.job(t.Context(), id); err != nil {
		t.Fatal(err)
	}
}

func TestAnUnhealthyJobIsRecoveredOrFails(t *testing.T) {
	s := newSimulation(t, "east-0")
	ill := api.Finding{Kind: api.FindingHealth, Condition: api.ConditionUnhealthy, Explanation: "`curl` exited with status 7, 3 times in a row"}
	id := s.running(api.JobSpec{MaxRestarts: 1})
	s.finding(id, 0, api.Finding{Kind: api.FindingHealth, Condition: api.ConditionHealthy, Explanation: "exited with status 0"})
	s.finding(id, 0, ill)
	job := s.awaitRun(id, 2)
	if len(job.Incidents) != 1 || job.Incidents[0].Reason != "unhealthy: "+ill.Explanation || job.Incidents[0].Cause != "program" {
		t.Errorf("the incidents: %+v", job.Incidents)
	}
	if e := s.eventsOf(id, "unhealthy"); len(e) != 1 || e[0].Message != ill.Explanation || len(s.eventsOf(id, "healthy")) != 0 {
		t.Errorf("the events: %+v", e)
	}
	s.finding(id, 0, ill)
	job = s.awaitPhase(id, api.PhaseFailed)
	if !strings.HasPrefix(job.Reason, "unhealthy: `curl` exited") {
		t.Errorf("the reason: %q", job.Reason)
	}
	s.eventually("nothing of it runs", func(store.Tx) (bool, error) { return len(s.aliveTasks(id)) == 0, nil })
}

func TestANodeWithAFullDiskGetsNoJobs(t *testing.T) {
	s := newSimulation(t, "east-0")
	a := s.agent("east-0")
	a.finds(api.Finding{Kind: api.FindingNode, Condition: api.ConditionDiskFull, Explanation: "the disk of /d has 0.1 GB of 100.0 GB left"})
	id := s.submit(api.JobSpec{})
	s.awaitReason(id, "waits for room: ")
	var nodes []api.Node
	s.want(http.StatusOK, "GET", "/v1/nodes", nil, &nodes)
	if n := nodes[0]; n.State != api.NodeReady || n.Trouble == nil || n.Trouble.Condition != api.ConditionDiskFull {
		t.Errorf("the node: %+v", n)
	}
	a.finds(api.Finding{Kind: api.FindingNode, Condition: api.ConditionHealthy, Explanation: "the disk of /d has 50 GB of 100.0 GB left"})
	s.awaitPhase(id, api.PhaseRunning)
}

func TestANodeWhoseAgentMeasuresNothingAnyMoreGetsNoJobs(t *testing.T) {
	s := newSimulation(t, "east-0")
	trouble := func() string {
		var nodes []api.Node
		s.want(http.StatusOK, "GET", "/v1/nodes", nil, &nodes)
		if nodes[0].Trouble == nil {
			return ""
		}
		return nodes[0].Trouble.Condition
	}
	awaitTrouble := func(want string, meanwhile func()) {
		t.Helper()
		for begun := time.Now(); trouble() != want; time.Sleep(20 * time.Millisecond) {
			if meanwhile(); time.Since(begun) > patience {
				t.Fatalf("the node's trouble is %q, want %q", trouble(), want)
			}
		}
	}
	speaks := func() { s.agent("east-0").report(tally.Node{CPUs: 4}, nil) }
	heard := func() bool {
		s.c.monitor.mu.Lock()
		defer s.c.monitor.mu.Unlock()
		return s.c.monitor.silent["east-0"].heard
	}
	for begun := time.Now(); !heard(); time.Sleep(20 * time.Millisecond) {
		if speaks(); time.Since(begun) > patience {
			t.Fatal("nothing was heard of the node")
		}
	}
	awaitTrouble(api.ConditionAgentHung, func() {})
	id := s.submit(api.JobSpec{})
	s.awaitReason(id, "waits for room: ")
	awaitTrouble("", speaks)
	s.awaitPhase(id, api.PhaseRunning)
}

// What was found is told once, also by a controller that takes over.
func TestAFindingIsToldOnce(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{OnStarvation: api.StarvationIgnore})
	s.starves(id, 0)
	s.restart()
	s.awaitReady("east-0")
	s.finding(id, 0, api.Finding{Kind: api.FindingStarvation, Condition: api.ConditionHealthy, Explanation: "well"}) // and all before it again
	if n, m := len(s.eventsOf(id, "starving")), len(s.eventsOf(id, "recovered")); n != 1 || m != 1 {
		t.Errorf("starving was told %d times, recovered %d times", n, m)
	}
}

// webhook is a server that jobs' findings are posted to.
func webhook(t *testing.T, answer func(n int, w http.ResponseWriter)) (url string, posts func() []api.WebhookPost) {
	var mu sync.Mutex
	var got []api.WebhookPost
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		raw, err := io.ReadAll(r.Body)
		var p api.WebhookPost
		if err == nil {
			err = json.Unmarshal(raw, &p)
		}
		if err != nil || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s %s: %s, %v", r.Method, r.URL, raw, err)
		}
		mu.Lock()
		defer mu.Unlock()
		got = append(got, p)
		answer(len(got), w)
	}))
	t.Cleanup(server.Close)
	return server.URL, func() []api.WebhookPost {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(got)
	}
}

func TestFindingsArePostedToTheWebhookUntilItTakesThem(t *testing.T) {
	s := newSimulation(t, "east-0")
	url, posts := webhook(t, func(n int, w http.ResponseWriter) {
		if n == 1 {
			w.WriteHeader(http.StatusInternalServerError)
		}
	})
	id := s.running(api.JobSpec{Name: "sim", OnStarvation: api.StarvationNotify, Webhook: url})
	s.starves(id, 0)
	s.eventually("it is posted", func(tx store.Tx) (bool, error) {
		_, err := store.Get[post](tx, store.Monitor, post{Number: 1}.key())
		return err != nil, ignoreMissing(err)
	})
	got := posts()
	if len(got) != 2 || got[0].ID != got[1].ID {
		t.Fatalf("posted: %+v", got)
	}
	if p := got[1]; p.Event != "starving" || p.Job != id || p.Name != "sim" || p.Condition != "starved_cpu" || *p.Task != 0 || p.Node != "east-0" ||
		!strings.Contains(p.Explanation, "81 %") || p.Since == nil || p.Phase != api.PhaseRunning {
		t.Errorf("posted: %+v", p)
	}
	if job := s.jobNow(id); job.Phase != api.PhaseRunning || job.Run != 1 {
		t.Errorf("a job that is only to be told of: %+v", job.Job)
	}
}

func TestAWebhookLeadsNowhereElse(t *testing.T) {
	s := newSimulation(t)
	target, posts := webhook(t, func(int, http.ResponseWriter) {})
	redirects, _ := webhook(t, func(_ int, w http.ResponseWriter) {
		w.Header().Set("Location", target)
		w.WriteHeader(http.StatusTemporaryRedirect)
	})
	body := json.RawMessage(`{"id":1}`)
	for _, c := range []struct {
		p    post
		want string
	}{
		{post{URL: redirects, Body: body}, "307"},
		{post{URL: target, Body: body, Confined: true}, "the controller's own machine"},
		{post{URL: "http://169.254.169.254/latest", Body: body}, "may not be at"},
		{post{URL: "file:///etc/passwd", Body: body}, "unsupported protocol"},
	} {
		if err := s.c.send(t.Context(), c.p); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: want %q, got %v", c.p.URL, c.want, err)
		}
	}
	if n := len(posts()); n != 0 {
		t.Errorf("%d posts arrived", n)
	}
}

func TestWhatIsDoneAboutStarvingJobs(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	bounds := Relief{}.filled()
	starving := func(id, node string, change func(*jobRecord)) *jobRecord {
		j := &jobRecord{JobDetail: api.JobDetail{Job: api.Job{ID: id, Phase: api.PhaseRunning, Cloud: "east"}}}
		j.Starvation = &api.Starvation{Condition: "starved_cpu", Node: node, Since: now.Add(-time.Minute)}
		if change != nil {
			change(j)
		}
		return j
	}
	leaving := func(id string) *jobRecord {
		return &jobRecord{Yield: &yield{Starved: "x"}, JobDetail: api.JobDetail{Job: api.Job{ID: id, Phase: api.PhaseSuspending, Cloud: "east"}}}
	}
	for name, c := range map[string]struct {
		jobs []*jobRecord
		do   []string
		why  string // of the first that nothing is done about
		full bool   // there is no other node with room
	}{
		"one is suspended":    {jobs: []*jobRecord{starving("a", "n", nil)}, do: []string{"a"}},
		"a policy may forbid": {jobs: []*jobRecord{starving("a", "n", func(j *jobRecord) { j.Spec.OnStarvation = api.StarvationNotify })}, why: "its policy is notify"},
		"of one node's, the least important": {
			jobs: []*jobRecord{starving("a", "n", func(j *jobRecord) { j.Priority = 1 }), starving("b", "n", nil)}, do: []string{"b"}, why: "job b has just left node n",
		},
		"two of a cloud at once": {
			jobs: []*jobRecord{starving("a", "n", nil), starving("b", "m", nil), starving("c", "o", nil)}, do: []string{"a", "b"}, why: "2 jobs of cloud east",
		},
		"those that are on their way count": {jobs: []*jobRecord{leaving("x"), leaving("y"), starving("a", "n", nil)}, why: "2 jobs of cloud east"},
		"not again soon": {
			jobs: []*jobRecord{starving("a", "n", func(j *jobRecord) { j.Relief = relief{At: now.Add(-9 * time.Minute), Count: 1} })}, why: "nothing is done before 12:01:00",
		},
		"but later": {jobs: []*jobRecord{starving("a", "n", func(j *jobRecord) { j.Relief = relief{At: now.Add(-11 * time.Minute), Count: 1} })}, do: []string{"a"}},
		"and later still the second time": {
			jobs: []*jobRecord{starving("a", "n", func(j *jobRecord) { j.Relief = relief{At: now.Add(-11 * time.Minute), Count: 2} })}, why: "nothing is done before 12:09:00",
		},
		"one is moved": {jobs: []*jobRecord{starving("a", "n", func(j *jobRecord) { j.Spec.OnStarvation = api.StarvationMigrate })}, do: []string{"a"}},
		"one that cannot be moved is in nobody's way": {
			jobs: []*jobRecord{starving("a", "n", func(j *jobRecord) { j.Spec.OnStarvation = api.StarvationMigrate }), starving("b", "n", nil)},
			do:   []string{"b"}, why: "no other node can have it: no room", full: true,
		},
		"not during an operation": {jobs: []*jobRecord{starving("a", "n", func(j *jobRecord) { j.Operation = "o-1" })}, why: "waits until operation o-1"},
		"nor right after another left": {
			jobs: []*jobRecord{starving("a", "n", nil), {Relief: relief{At: now.Add(-20 * time.Second), Count: 1, Nodes: []string{"n"}}, JobDetail: api.JobDetail{Job: api.Job{ID: "b"}}}},
			why:  "waits until 12:00:10: job b has just left node n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			var do []string
			why := ""
			stuck := func(*jobRecord) string {
				if c.full {
					return "no room"
				}
				return ""
			}
			for _, d := range decideRelief(c.jobs, bounds, stuck, now) {
				if d.do {
					do = append(do, d.job)
				} else if why == "" {
					why = d.action
				}
			}
			slices.Sort(do)
			if !slices.Equal(do, c.do) || !strings.Contains(why, c.why) || (c.why == "") != (why == "") {
				t.Errorf("done about %q, want %q; %q, want %q", do, c.do, why, c.why)
			}
		})
	}
}

func TestWhatIsAskedOfTheMonitorIsCheckedAndFilledIn(t *testing.T) {
	s := newSimulation(t)
	refused := api.JobSpec{Command: []string{"x"}, OnStarvation: "panic"}
	if detail := s.want(http.StatusUnprocessableEntity, "POST", "/v1/jobs", refused, nil); !strings.Contains(detail, "suspend, migrate, notify or ignore") {
		t.Errorf("the refusal: %q", detail)
	}
	var job api.JobDetail
	s.want(http.StatusCreated, "POST", "/v1/jobs", api.JobSpec{Command: []string{"x"}, Health: &api.HealthCheck{HTTP: "/"}}, &job)
	if h := job.Spec.Health; h.PeriodMS != 10_000 || h.TimeoutMS != 5000 || h.Retries != 3 {
		t.Errorf("the health check: %+v", h)
	}
}
