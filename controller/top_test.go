package controller

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/monitor/tally"
)

// measured reports figures of a job on its node until they are shown.
func (s *simulation) measured(id string) (top api.Top) {
	s.t.Helper()
	a := s.agent(s.jobNow(id).TaskStatus[0].Node)
	progress := 12.0
	for deadline := time.Now().Add(patience); ; {
		a.report(tally.Node{CPUs: simCPUs, CPUsBusy: 3, MemUsed: 1 << 30, MemBytes: 8 << 30, DiskFree: 5, DiskBytes: 10, Tasks: 1, CPUStall: 0.5}, []tally.Task{{
			Job: id, CPUs: 0.5, CPUsDue: 1, MemUsed: 1 << 20, MemBytes: 1 << 29, Waited: 0.4, IOStall: 0.1, Progress: &progress, NormalProgress: 95,
		}})
		s.want(http.StatusOK, "GET", "/v1/top", nil, &top)
		if len(top.Jobs) > 0 && top.Jobs[0].Figures != nil {
			return top
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("nothing measured is shown: %+v", top)
		}
		top = api.Top{}
		time.Sleep(50 * time.Millisecond) // until the round is over
	}
}

func TestTopShowsWhatTheRoundHasBrought(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{Name: "sim", OnStarvation: api.StarvationIgnore})
	s.starves(id, 0)
	top := s.measured(id)
	if top.Time == nil || time.Since(*top.Time) > time.Minute || top.PeriodMS != 200 || top.Reports < 1 {
		t.Errorf("the round: %+v", top)
	}
	if n := top.Nodes[0]; n.ID != "east-0" || n.Health != "ok" || n.Figures.CPUsBusy != 3 || n.Figures.DiskFree != 5 || n.Figures.CPUStall != 0.5 {
		t.Errorf("the node: %+v, %+v", n, n.Figures)
	}
	j := top.Jobs[0]
	if f := j.Figures; j.Health != "starved_cpu" || !strings.Contains(j.Reason, "81 %") || f.CPUs != 0.5 || f.Waited != 0.4 || f.Stalled != 0.1 || *f.Progress != 12 || f.NormalProgress != 95 {
		t.Errorf("the job: %+v, %+v", j, f)
	}
	_, raw, err := s.send("GET", "/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`dormouse_node_cpus_busy{cloud="east",node="east-0"} 3`,
		`dormouse_node_stall_ratio{cloud="east",node="east-0",resource="cpu"} 0.5`,
		`dormouse_node_silence_seconds{cloud="east",node="east-0"}`,
		`dormouse_job_waited_ratio{job="` + id + `",name="sim"} 0.4`,
		`dormouse_job_progress_per_minute{job="` + id + `",name="sim"} 12`,
		`dormouse_job_starving{condition="starved_cpu",job="` + id + `",name="sim"} 1`,
		`dormouse_findings_total{condition="starved_cpu",kind="starvation"} 1`,
		`dormouse_monitor_missing_nodes 0`,
		`dormouse_tasks_waited_ratio{quantile="0.99"}`,
	} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("/metrics lacks %s", want)
		}
	}
}

func TestANodeThatMeasuresNothingIsShown(t *testing.T) {
	s := newSimulation(t, "east-0")
	health := ""
	for deadline := time.Now().Add(patience); !strings.Contains(health, "has not said what it measures for"); {
		if time.Now().After(deadline) {
			t.Fatalf("a node that is silent is %q", health)
		}
		time.Sleep(100 * time.Millisecond) // half a round
		var top api.Top
		s.want(http.StatusOK, "GET", "/v1/top", nil, &top)
		health = top.Nodes[0].Health
	}
}

func TestAUserSeesTheFiguresOfOwnJobsOnly(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.measured(id)
	var top api.Top
	s.asUser("alice", 1000).want(http.StatusOK, "GET", "/v1/top", nil, &top)
	if len(top.Jobs) != 0 || len(top.Nodes) != 1 || top.OtherJobs != nil {
		t.Errorf("a user sees %+v", top)
	}
}
