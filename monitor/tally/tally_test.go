package tally

import (
	"fmt"
	"math"
	"reflect"
	"testing"

	"dormouse/monitor/tree"
)

func rate(v float64) *float64 { return &v }

func TestWhatIsFilledIsRead(t *testing.T) {
	node := Node{
		CPUsBusy: 1.5, CPUs: 2, CPUsStolen: 0.25, MemUsed: 1 << 30, MemBytes: 4 << 30, DiskFree: 7, DiskBytes: 9,
		Tasks: 3, Troubled: 1, CPUStall: 0.5, MemoryStall: 0.125, IOStall: 0.25,
	}
	got := Read(onTheWire(t, Fill("n1", node, []Task{
		{Job: "a", CPUs: 0.5, CPUsDue: 1, MemUsed: 10, MemBytes: 20, Waited: 0.75, MemoryStall: 0.125, IOStall: 0.25, Troubled: true, Progress: rate(12), NormalProgress: 95},
		{Job: "a", CPUs: 1, CPUsDue: 1, MemUsed: 5, MemBytes: 20, Unhealthy: true},
		{Job: "b", CPUs: 0.25, CPUsDue: 2, Progress: rate(0), NormalProgress: -1},
	})))
	if !reflect.DeepEqual(got.Nodes, map[string]Node{"n1": node}) {
		t.Errorf("the node reads as %+v, want %+v", got.Nodes["n1"], node)
	}
	want := map[string]Job{
		"a": {CPUs: 1.5, CPUsDue: 2, MemUsed: 15, MemBytes: 40, Waited: 0.75, Stalled: 0.25, Tasks: 2, Troubled: 1, Unhealthy: 1, Reporting: 1, Progress: 12, NormalProgress: 95},
		"b": {CPUs: 0.25, CPUsDue: 2, Tasks: 1, Reporting: 1},
	}
	if !reflect.DeepEqual(got.Jobs, want) {
		t.Errorf("the jobs read as %+v, want %+v", got.Jobs, want)
	}
	if n := got.Waited.Count(); n != 3 {
		t.Errorf("%d tasks were counted, want 3", n)
	}
	if worst := got.Waited.Quantile(1); worst < 0.75 || worst > 0.75*1.25 {
		t.Errorf("the longest wait reads as %v, want 0.75 and at most a quarter more", worst)
	}
	if b := got.Busy.Quantile(0.5); b < 0.75 || b > 1 {
		t.Errorf("the node's use reads as %v, want 0.75 and at most a quarter more", b)
	}
}

func TestJobsOfSeveralNodesAddUp(t *testing.T) {
	one := Fill("n1", Node{CPUs: 1, CPUsBusy: 1, Tasks: 1}, []Task{{Job: "a", CPUs: 0.5, Waited: 0.5}})
	two := Fill("n2", Node{CPUs: 1, Tasks: 1}, []Task{{Job: "a", CPUs: 0.25, Waited: 0.25}})
	one.Nodes, two.Nodes = tree.SetOf(0), tree.SetOf(1)
	got := Read(onTheWire(t, one.Merge(two)))
	if len(got.Nodes) != 2 || got.Busy.Count() != 2 {
		t.Errorf("%d nodes and %d shares, want 2 of each", len(got.Nodes), got.Busy.Count())
	}
	if job := got.Jobs["a"]; job.Tasks != 2 || job.CPUs != 0.75 || job.Waited != 0.75 {
		t.Errorf("the job reads as %+v, want 2 tasks, 0.75 CPUs and waits that sum up to 0.75", job)
	}
}

func TestJobsThatAreTooManyAreAddedUp(t *testing.T) {
	var tasks []Task
	for i := range 2 * tree.MaxRows {
		tasks = append(tasks, Task{Job: fmt.Sprint("job", i), CPUs: float64(i)})
	}
	got := Read(onTheWire(t, Fill("n1", Node{CPUs: 1}, tasks)))
	if len(got.Jobs) != tree.MaxRows || got.OtherJobs.Tasks != tree.MaxRows || got.MissingCPUs != tree.MaxRows-1 {
		t.Errorf("%d jobs, %d others and at most %v CPUs missing, want %d, %d and %d",
			len(got.Jobs), got.OtherJobs.Tasks, got.MissingCPUs, tree.MaxRows, tree.MaxRows, tree.MaxRows-1)
	}
}

func TestWhatIsNoNumberCountsAsNone(t *testing.T) {
	got := Read(Fill("n1", Node{CPUs: math.NaN(), CPUsBusy: -1, CPUsStolen: math.Inf(1)}, nil)).Nodes["n1"]
	if got.CPUs != 0 || got.CPUsBusy != 0 || math.IsInf(got.CPUsStolen, 0) {
		t.Errorf("the node reads as %+v", got)
	}
}

func TestEmptyAndForeignSummariesAreRead(t *testing.T) {
	for _, s := range []tree.Summary{
		{},
		{Tables: make([]tree.Table, 1), Histograms: make([]tree.Histogram, 1)},
		{Tables: []tree.Table{{Rows: []tree.Row{{Key: "n"}}}, {Rows: []tree.Row{{Key: "j", Values: []uint64{1000}}}}}},
	} {
		r := Read(s)
		if len(r.Jobs) == 1 && r.Jobs["j"].CPUs != 1 {
			t.Errorf("the job reads as %+v", r.Jobs["j"])
		}
		if q := r.Busy.Quantile(0.5); q != 0 {
			t.Errorf("nothing was measured, and half of it is %v", q)
		}
	}
}

// onTheWire is a summary as its reader gets it.
func onTheWire(t *testing.T, s tree.Summary) tree.Summary {
	t.Helper()
	report, err := tree.ReportFrom(tree.Report{Summary: s}.Proto())
	if err != nil {
		t.Fatal(err)
	}
	return report.Summary
}
