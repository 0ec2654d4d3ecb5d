package starvation

import (
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func well() Verdict { return Verdict{Condition: Healthy, Suspected: Healthy, Explanation: "works"} }

func ill(condition Condition, share float64) Verdict {
	return Verdict{Condition: condition, Suspected: condition, Explanation: "is " + string(condition),
		Figures: Figures{Missed: share, MemoryStall: share, IOStall: share}}
}

func lock() Verdict { return ill(NoProgress, 0) }

func held() Verdict {
	v := ill(NoProgress, 0)
	v.Stopped = true
	return v
}

func suspect(condition Condition) Verdict {
	return Verdict{Condition: Healthy, Suspected: condition, Explanation: "works"}
}

func TestJudge(t *testing.T) {
	for name, c := range map[string]struct {
		tasks     []Verdict
		want      Condition
		straggler int
		waiting   []int
		says      string
	}{
		"all work":                        {[]Verdict{well(), well()}, Healthy, -1, nil, ""},
		"no tasks":                        {nil, Healthy, -1, nil, ""},
		"one starves":                     {[]Verdict{well(), ill(StarvedCPU, 0.8), well()}, StarvedCPU, 1, nil, "is starved_cpu"},
		"the one that lost most is named": {[]Verdict{ill(StarvedCPU, 0.5), ill(StarvedIO, 0.9), ill(StarvedMemory, 0.6)}, StarvedIO, 1, nil, ""},
		"peers of a starved one spin":     {[]Verdict{lock(), ill(StarvedCPU, 0.8), lock()}, StarvedCPU, 1, []int{0, 2}, "is starved_cpu; waiting for it without rest: 2 other tasks"},
		"peers of a stopped one spin":     {[]Verdict{lock(), lock(), held()}, NoProgress, 2, []int{0, 1}, ""},
		"it is only suspected yet":        {[]Verdict{lock(), suspect(StarvedCPU)}, Healthy, -1, []int{0}, ""},
		"one in a live-lock":              {[]Verdict{well(), lock()}, NoProgress, 1, nil, ""},
		"all in a live-lock":              {[]Verdict{lock(), lock()}, NoProgress, -1, nil, "; the same goes for 1 other task"},
	} {
		t.Run(name, func(t *testing.T) {
			got := Judge(c.tasks)
			if got.Condition != c.want || got.Straggler != c.straggler || !slices.Equal(got.Waiting, c.waiting) || !strings.Contains(got.Explanation, c.says) {
				t.Errorf("judged %+v, want %s, straggler %d, waiting %v", got, c.want, c.straggler, c.waiting)
			}
		})
	}
}

// Of a parallel job whose ranks spin while they wait, the squeezed rank is
// named, though all of them stop reporting.
func TestTheStragglerOfAParallelJobIsNamed(t *testing.T) {
	const ranks, slow = 4, 2
	var detectors []*Detector
	var lives []*simulation
	for range ranks {
		s := newSimulation(worker)
		d := NewDetector(Config{CPUs: 1})
		d.Feed(s.task, s.host)
		run(d, s, phase{20, worker})
		detectors, lives = append(detectors, d), append(lives, s)
	}
	for period := range 6 {
		var verdicts []Verdict
		for i, d := range detectors {
			l := worker
			if l.progress = 0; i == slow {
				l.used, l.waiting = 0.1, 0.9
			}
			verdicts = append(verdicts, run(d, lives[i], phase{1, l}))
		}
		job := Judge(verdicts)
		if job.Condition == NoProgress {
			t.Fatalf("period %d: taken for a live-lock: %s", period, job.Explanation)
		}
		if period >= 2 && (job.Condition != StarvedCPU || job.Straggler != slow) {
			t.Fatalf("period %d: %s, straggler %d, want starved_cpu, straggler %d", period, job.Condition, job.Straggler, slow)
		}
	}
}

func TestTheStragglerIsAlwaysATroubledTask(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tasks := rapid.SliceOf(rapid.SampledFrom([]Verdict{
			well(), lock(), held(), ill(StarvedCPU, 0.5), ill(StarvedIO, 0), ill(StarvedMemory, 1), suspect(StarvedIO),
		})).Draw(t, "tasks")
		job := Judge(tasks)
		if job.Straggler >= 0 && (!tasks[job.Straggler].Troubled() || tasks[job.Straggler].Condition != job.Condition) {
			t.Fatalf("%+v of %+v", job, tasks)
		}
		if (job.Condition == Healthy) != (job.Explanation == "") {
			t.Fatalf("%s with explanation %q", job.Condition, job.Explanation)
		}
	})
}
