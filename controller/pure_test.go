package controller

import (
	"testing"

	"dormouse/api"
)

func TestJudge(t *testing.T) {
	zero, one, two := 0, 1, 2
	running := api.TaskStatus{Phase: api.PhaseRunning}
	ok := api.TaskStatus{Phase: api.PhaseCompleted, ExitCode: &zero}
	bad := api.TaskStatus{Index: 1, Phase: api.PhaseFailed, ExitCode: &one}
	worse := api.TaskStatus{Index: 2, Phase: api.PhaseFailed, ExitCode: &two}
	gone := api.TaskStatus{Phase: api.PhaseFailed, Reason: "node lost"}
	for _, c := range []struct {
		name  string
		tasks []api.TaskStatus
		want  verdict
		index int
	}{
		{"all run", []api.TaskStatus{running, running}, goesOn, -1},
		{"one is done", []api.TaskStatus{ok, running}, goesOn, -1},
		{"all are done", []api.TaskStatus{ok, ok}, succeeded, 0},
		{"the first failure counts", []api.TaskStatus{running, bad, worse}, broke, 1},
		{"a lost task", []api.TaskStatus{running, gone}, lost, 0},
		{"a failure counts before a loss", []api.TaskStatus{gone, bad}, broke, 1},
	} {
		got, task := judge(c.tasks, "")
		if got != c.want || (task == nil) != (c.index < 0) || (task != nil && task.Index != c.index) {
			t.Errorf("%s: want %v of task %d, got %v of %+v", c.name, c.want, c.index, got, task)
		}
	}
}

func TestOlderVersion(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"4.2.1", "4.2.1", false}, {"4.2", "4.2.1", true}, {"4.10", "4.9", false}, {"3.17", "4.2", true}, {"", "4.2", false}, {"4.2.1", "4.2", false},
	} {
		if olderVersion(c.a, c.b) != c.want {
			t.Errorf("%q older than %q: want %v", c.a, c.b, c.want)
		}
	}
}

func TestVirtualAddressesDoNotCollide(t *testing.T) {
	seen := map[string]bool{}
	for job := range uint64(64) {
		for _, task := range []int{0, 1, 255, mostTasks - 2} {
			ip := virtualIP(job, task)
			if seen[ip] {
				t.Fatalf("%s is given twice", ip)
			}
			seen[ip] = true
		}
	}
	if ip := virtualIP(1, 0); ip != "10.64.16.1" {
		t.Errorf("want 10.64.16.1, got %s", ip)
	}
}
