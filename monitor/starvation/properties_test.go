package starvation

import (
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"dormouse/monitor/sample"
)

// anyLife, plausible or not.
func anyLife(t *rapid.T) life {
	share := func(name string) float64 { return rapid.Float64Range(0, 1).Draw(t, name) }
	return life{
		used: 4 * share("used"), waiting: 8 * share("waiting"), full: share("full"),
		throttled: share("throttled"), quota: share("quota"), stolen: 0.9 * share("stolen"), others: 2 * share("others"),
		faults: 1000 * share("faults"), refaults: 1000 * share("refaults"), short: rapid.Bool().Draw(t, "short"), memory: share("memory"), io: share("io"), operations: 500 * share("operations"),
		progress: 3 * share("progress"), silent: rapid.Bool().Draw(t, "silent"),
		stopped: rapid.IntRange(0, 9).Draw(t, "stopped") == 0, frozen: rapid.IntRange(0, 9).Draw(t, "frozen") == 0,
		ended: rapid.IntRange(0, 9).Draw(t, "ended") == 0,
	}
}

// healthyLife of a task that gets what it wants: however its use of the CPU, of
// the disk and its progress change from period to period.
func healthyLife(t *rapid.T) life {
	used := rapid.SampledFrom([]float64{0, 0.001, 0.05, 0.3, 0.6, 0.9}).Draw(t, "used")
	io := rapid.Float64Range(0, 0.95-used).Draw(t, "io")
	return life{
		used: used, waiting: rapid.Float64Range(0, 0.15).Draw(t, "waiting"), full: -1,
		io: io, operations: 250 * io, // 4 ms each
		memory: rapid.Float64Range(0, 0.05).Draw(t, "memory"), faults: rapid.Float64Range(0, 40).Draw(t, "faults"),
		progress: rapid.Float64Range(0.2, 20).Draw(t, "progress"), others: rapid.Float64Range(0, 1).Draw(t, "others"),
	}
}

func TestAHealthyTaskIsNeverAccused(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		first := healthyLife(t)
		d, s := NewDetector(Config{CPUs: 1}), newSimulation(first)
		d.Feed(s.task, s.host)
		for range rapid.IntRange(1, 60).Draw(t, "periods") {
			s.live(healthyLife(t), time.Duration(rapid.IntRange(8, 14).Draw(t, "seconds"))*time.Second)
			if v := d.Feed(s.task, s.host); v.Troubled() {
				t.Fatalf("accused: %s", v.Explanation)
			}
		}
	})
}

// Whatever went before, and wherever in a period it begins.
func TestAStarvedTaskIsFoundWithinThreePeriods(t *testing.T) {
	ills := map[Condition]life{
		StarvedCPU:    squeezed,
		StarvedMemory: {used: 0.05, memory: 0.6, faults: 500, io: 0.7, operations: 500},
		StarvedIO:     {io: 0.95, operations: 3},
		NoProgress:    {stopped: true},
	}
	rapid.Check(t, func(t *rapid.T) {
		d, s := NewDetector(Config{CPUs: 1}), newSimulation(worker)
		d.Feed(s.task, s.host)
		for range rapid.IntRange(1, 40).Draw(t, "healthy periods") {
			s.live(healthyLife(t), 10*time.Second)
			d.Feed(s.task, s.host)
		}
		want := rapid.SampledFrom([]Condition{StarvedCPU, StarvedMemory, StarvedIO, NoProgress}).Draw(t, "ill")
		before := time.Duration(rapid.Int64Range(1, int64(10*time.Second)-1).Draw(t, "before"))
		s.live(worker, before)
		s.live(ills[want], 10*time.Second-before)
		d.Feed(s.task, s.host)
		for range 2 {
			s.live(ills[want], 10*time.Second)
			d.Feed(s.task, s.host)
		}
		v := d.Verdict()
		if v.Condition != want {
			t.Fatalf("%s (%s), want %s", v.Condition, v.Explanation, want)
		}
	})
}

// A task that works evenly and then spins.
func TestALiveLockIsFoundWithinThreePeriods(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		use := rapid.Float64Range(0.3, 1).Draw(t, "used")
		even := life{used: use, progress: rapid.Float64Range(0.2, 100).Draw(t, "progress")}
		d, s := NewDetector(Config{CPUs: 1}), newSimulation(even)
		d.Feed(s.task, s.host)
		run(d, s, phase{rapid.IntRange(5, 50).Draw(t, "periods"), even})
		before := time.Duration(rapid.Int64Range(1, int64(10*time.Second)-1).Draw(t, "before"))
		s.live(even, before)
		s.live(life{used: use}, 10*time.Second-before)
		d.Feed(s.task, s.host)
		v := run(d, s, phase{2, life{used: use}})
		if v.Condition != NoProgress {
			t.Fatalf("%s (%s), want no_progress", v.Condition, v.Explanation)
		}
	})
}

func TestExcusedTimeIsNeverHeldAgainstATask(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d, s := NewDetector(Config{CPUs: 1}), newSimulation(worker)
		d.Feed(s.task, s.host)
		for range rapid.IntRange(1, 60).Draw(t, "periods") {
			l := healthyLife(t)
			if rapid.Bool().Draw(t, "excused") {
				l = anyLife(t)
				l.excused, l.silent = "checkpoint", false
			}
			s.live(l, 10*time.Second)
			if v := d.Feed(s.task, s.host); v.Troubled() {
				t.Fatalf("accused: %s", v.Explanation)
			}
		}
	})
}

func TestFiguresAreAlwaysWithinTheirBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := NewDetector(Config{CPUs: rapid.Float64Range(0, 4).Draw(t, "cpus")})
		s := newSimulation(anyLife(t))
		d.Feed(s.task, s.host)
		for range rapid.IntRange(1, 30).Draw(t, "periods") {
			s.live(anyLife(t), time.Duration(rapid.Int64Range(1, int64(time.Minute)).Draw(t, "span")))
			host := s.host
			if rapid.IntRange(0, 5).Draw(t, "no host") == 0 {
				host = sample.Host{}
			}
			v := d.Feed(s.task, host)
			check(t, v)
		}
	})
}

func check(t *rapid.T, v Verdict) {
	t.Helper()
	f := v.Figures
	for name, share := range map[string]float64{
		"waited": f.Waited, "missed": f.Missed, "throttled": f.Throttled, "stolen": f.Stolen,
		"memory": f.MemoryStall, "faults": f.FaultStall, "io": f.IOStall,
	} {
		if !(share >= 0 && share <= 1+1e-9) {
			t.Fatalf("share %s is %v", name, share)
		}
	}
	for name, figure := range map[string]float64{"CPU": f.CPU, "faults": f.MajorFaults, "latency": f.IOLatency, "progress": f.Progress} {
		if figure < 0 || math.IsNaN(figure) || math.IsInf(figure, 0) {
			t.Fatalf("%s is %v", name, figure)
		}
	}
	if v.Explanation == "" || strings.Contains(v.Explanation, "NaN") || strings.Contains(v.Explanation, "-") {
		t.Fatalf("explanation %q", v.Explanation)
	}
	if v.Troubled() == v.Since.IsZero() && v.Suspected == Healthy {
		t.Fatalf("%s since %v", v.Condition, v.Since)
	}
}

// Samples taken more often than once a period change no verdict.
func TestExtraSamplesChangeNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		first := anyLife(t)
		config := Config{CPUs: 1}
		a, b, s := NewDetector(config), NewDetector(config), newSimulation(first)
		a.Feed(s.task, s.host)
		b.Feed(s.task, s.host)
		for range rapid.IntRange(1, 20).Draw(t, "periods") {
			l := anyLife(t)
			early := time.Duration(rapid.Int64Range(1, int64(5*time.Second)-1).Draw(t, "early"))
			s.live(l, early)
			b.Feed(s.task, s.host)
			b.Feed(s.task, s.host)
			s.live(l, 10*time.Second-early)
			if x, y := a.Feed(s.task, s.host), b.Feed(s.task, s.host); !reflect.DeepEqual(x, y) {
				t.Fatalf("verdicts differ:\n%+v\n%+v", x, y)
			}
		}
	})
}

func TestNormalIsTheMedianAndItsSpreadTheDeviationFromIt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var h history
		size := rapid.IntRange(1, 20).Draw(t, "size")
		values := rapid.SliceOfN(rapid.Float64Range(-100, 100), 1, 60).Draw(t, "values")
		for _, value := range values {
			h.add(value, size)
		}
		last := values[max(0, len(values)-size):]
		normal, deviation := h.normal()
		below, above := 0, 0
		for _, value := range last {
			if value < normal {
				below++
			}
			if value > normal {
				above++
			}
		}
		if 2*below > len(last) || 2*above > len(last) {
			t.Fatalf("%v is not a median of %v", normal, last)
		}
		if deviation < 0 || h.most() != slices.Max(last) {
			t.Fatalf("deviation %v, most %v of %v", deviation, h.most(), last)
		}
	})
}

// Not even half of the past being strange moves the normal into the strange.
func TestTheNormalWithstandsAStrangePast(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var h history
		n := rapid.IntRange(3, 100).Draw(t, "sane")
		for range n {
			h.add(rapid.Float64Range(9, 11).Draw(t, "value"), 1000)
		}
		for range rapid.IntRange(0, n-1).Draw(t, "strange") {
			h.add(rapid.SampledFrom([]float64{0, 1e9}).Draw(t, "outlier"), 1000)
		}
		if normal, _ := h.normal(); normal < 9 || normal > 11 {
			t.Fatalf("normal %v, want it among the sane values, 9 to 11", normal)
		}
	})
}

func TestOnePeriodNeverIsAFall(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s series
		for range rapid.IntRange(3, 50).Draw(t, "past") {
			s.add(rapid.Float64Range(50, 150).Draw(t, "value"), 100)
		}
		if s.observe(0); s.fallen(0) {
			t.Fatal("a single zero is taken for a fall")
		}
		s.observe(0)
		normal, deviation := s.normal()
		if deviation < normal/5 && !s.fallen(0) {
			t.Fatal("two zeros after an even past are no fall")
		}
	})
}
