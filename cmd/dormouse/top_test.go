package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"dormouse/api"
)

func someTop() api.Top {
	at, progress := testNow.Add(-3*time.Second), 12.0
	return api.Top{
		Time: &at, PeriodMS: 5000, Reports: 1, Missing: 1,
		Nodes: []api.TopNode{
			{ID: "east-0", Cloud: "east", State: api.NodeReady, Health: "ok", Figures: &api.NodeFigures{
				CPUs: 4, CPUsBusy: 3.5, MemBytes: 8 << 30, MemBusy: 2 << 30, DiskBytes: 100 << 30, DiskFree: 40 << 30, Tasks: 3, Troubled: 1, CPUStall: 0.81, IOStall: 0.02,
			}},
			{ID: "east-1", Cloud: "east", State: api.NodeUnreachable, Health: "its agent has been silent"},
		},
		Jobs: []api.TopJob{
			{ID: "j-1", Name: "busy", Phase: api.PhaseRunning, Tasks: 1, Health: "healthy", Figures: &api.JobFigures{Tasks: 1, CPUs: 2, CPUsDue: 2, MemUsed: 1 << 20, MemBytes: 1 << 30}},
			{ID: "j-2", Name: "squeezed", Phase: api.PhaseRunning, Tasks: 1, Health: "starved_cpu", Reason: "task 0 waited 81 %", Figures: &api.JobFigures{
				Tasks: 1, CPUs: 0.2, CPUsDue: 1, MemUsed: 64 << 20, MemBytes: 512 << 20, Waited: 0.81, Progress: &progress, NormalProgress: 95,
			}},
			{ID: "j-3", Name: "waits", Phase: api.PhasePending, Tasks: 4, Reason: "waits for room"},
		},
	}
}

func TestTopShowsTheIllFirst(t *testing.T) {
	f := newFake(t, map[string]any{"GET /v1/top": someTop()})
	got := dormouse(t, f.url, "top")
	want := `2 nodes, 3 jobs, 1 not healthy; measured 3s ago, nothing heard of 1 node

NODE    CLOUD  STATE        CPUS BUSY  MEMORY                DISK FREE  TASKS      CPU WAIT  MEM STALL  IO STALL  HEALTH
east-0  east   ready        3.5 of 4   2.00 GiB of 8.00 GiB  40.0 GiB   3 (1 ill)  81%       0%         2%        ok
east-1  east   unreachable  -          -                     -          -          -         -          -         its agent has been silent

JOB  NAME      PHASE    TASKS  CPUS       MEMORY                WAITED  STALLED  PROGRESS            HEALTH       WHY
j-2  squeezed  running  1      0.20 of 1  64.0 MiB of 512 MiB   81%     0%       12/min (normal 95)  starved_cpu  task 0 waited 81 %
j-1  busy      running  1      2.00 of 2  1.00 MiB of 1.00 GiB  0%      0%       -                   healthy      -
j-3  waits     pending  4      -          -                     -       -        -                   -            waits for room
`
	got.check(t, exitDone, "", "")
	if got.out != want {
		t.Errorf("printed\n%s\nwant\n%s", got.out, want)
	}
	if n := len(f.calls); n != 1 {
		t.Errorf("where there is no terminal it asked %d times", n)
	}
}

func TestTopShowsNoFiguresOfANodeThatWasNotMeasuredYet(t *testing.T) {
	top := api.Top{Nodes: []api.TopNode{{ID: "east-0", Cloud: "east", State: api.NodeReady, Health: "ok", Figures: &api.NodeFigures{}}}, Jobs: []api.TopJob{{ID: "j-1"}}}
	got := dormouse(t, newFake(t, map[string]any{"GET /v1/top": top}).url, "top")
	if !strings.HasPrefix(got.out, "1 node, 1 job, ") || strings.Contains(got.out, "0.0 of 0") {
		t.Errorf("printed\n%s", got.out)
	}
}

func TestTopPrintsADocumentOnOneLine(t *testing.T) {
	f := newFake(t, map[string]any{"GET /v1/top": someTop()})
	got := dormouse(t, f.url, "top", "--once", "-o", "json")
	var top api.Top
	if err := json.Unmarshal([]byte(got.out), &top); err != nil || strings.Count(got.out, "\n") != 1 || len(top.Jobs) != 3 {
		t.Errorf("printed %v\n%s", err, got.out)
	}
	dormouse(t, f.url, "top", "--interval", "1ms").check(t, exitUsage, "", "too short")
}

func TestAPictureFitsTheTerminal(t *testing.T) {
	got := fitted("123456\nab\nlost\n", 4, 3)
	if want := cursorHome + "1234" + eraseLine + "\r\nab" + eraseLine + "\r\n" + eraseBelow; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
