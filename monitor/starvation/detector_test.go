package starvation

import (
	"strings"
	"testing"
	"time"
)

// phase of a scenario: so many periods of a life.
type phase struct {
	periods int
	life
}

var (
	worker   = life{used: 0.97, waiting: 0.03, full: -1, progress: 1.6, others: 0.5}
	squeezed = life{used: 0.19, waiting: 0.81, full: -1, progress: 12.0 / 60, others: 1.8}
	idle     = life{}
	mapping  = life{used: 0.36, waiting: 0.18, full: -1, memory: 0.05, io: 0.43, faults: 11000, operations: 11000, short: true, progress: 1}
	reader   = life{used: 0.2, io: 0.8, operations: 200, progress: 1} // 4 ms an operation
)

func (l life) with(change func(*life)) life {
	change(&l)
	return l
}

func silently(l life) life  { return l.with(func(l *life) { l.silent = true }) }
func unpressed(l life) life { return l.with(func(l *life) { l.noPSI = true }) }

// alternate between lives, a period each, so many rounds.
func alternate(rounds int, lives ...life) []phase {
	var phases []phase
	for range rounds {
		for _, l := range lives {
			phases = append(phases, phase{1, l})
		}
	}
	return phases
}

// run feeds phases to a detector.
func run(d *Detector, s *simulation, phases ...phase) (last Verdict) {
	for _, phase := range phases {
		for range phase.periods {
			s.live(phase.life, 10*time.Second)
			last = d.Feed(s.task, s.host)
		}
	}
	return last
}

// Every scenario ends with the phase that matters. Starving ones must be found
// within three periods of its beginning, and stay found; healthy ones never.
func TestScenarios(t *testing.T) {
	for name, c := range map[string]struct {
		config Config
		phases []phase
		want   Condition
		says   string
	}{
		"squeezed by hogs": {Config{Name: "task 2", CPUs: 1}, []phase{{30, worker}, {6, squeezed}}, StarvedCPU,
			"task 2 waited 81 % of the last 60 s for a CPU (normal 3 %), got 0.19 of the 1 CPUs due, progress 12/min (normal 96/min)"},
		"squeezed from the start": {Config{CPUs: 1}, []phase{{6, squeezed}}, StarvedCPU, "waited 81 %"},
		"squeezed, reporting nothing": {Config{CPUs: 1}, []phase{{30, silently(worker)}, {6, silently(squeezed)}}, StarvedCPU,
			"waited 81 % of the last 60 s for a CPU (normal 3 %), got 0.19 of the 1 CPUs due"},
		"squeezed without PSI":  {Config{CPUs: 1}, []phase{{30, unpressed(worker)}, {6, unpressed(squeezed)}}, StarvedCPU, "waited 81 %"},
		"many threads squeezed": {Config{CPUs: 2}, []phase{{30, life{used: 2, waiting: 2, full: 0.05}}, {6, life{used: 0.6, waiting: 3.4, full: 0.7, others: 1.4}}}, StarvedCPU, ""},
		"half squeezed while progress breaks down": {Config{CPUs: 1}, []phase{{30, worker}, {6, worker.with(func(l *life) {
			l.used, l.waiting, l.progress = 0.7, 0.3, 0.4
		})}}, StarvedCPU, ""},
		"its quota was lowered": {Config{CPUs: 1}, []phase{{30, worker}, {6, life{used: 0.2, waiting: 0.8, full: -1, throttled: 0.8, quota: 0.2, progress: 0.3}}}, StarvedCPU,
			"; it is limited to 0.2 CPUs"},
		"its quota was lowered, nothing was asked for": {Config{}, []phase{{30, worker.with(func(l *life) { l.quota = 1 })}, {6, life{used: 0.2, waiting: 0.8, full: -1, throttled: 0.8, quota: 0.2}}}, StarvedCPU, ""},
		"its quota is all it is due":                   {Config{CPUs: 0.2}, []phase{{36, life{used: 0.2, waiting: 0.8, full: -1, throttled: 0.8, quota: 0.2}}}, Healthy, ""},
		"bursts up to its own quota":                   {Config{CPUs: 0.3}, []phase{{36, life{used: 0.1, waiting: 0.45, full: -1, throttled: 0.43, quota: 0.3}}}, Healthy, ""},
		"bursts up to its own quota without PSI":       {Config{CPUs: 0.3}, []phase{{36, life{used: 0.1, waiting: 0.45, throttled: 0.43, quota: 0.3, noPSI: true}}}, Healthy, ""},
		"squeezed below its own quota":                 {Config{CPUs: 0.3}, []phase{{6, life{used: 0.06, waiting: 0.94, full: -1, throttled: 0.05, quota: 0.3, others: 1.9}}}, StarvedCPU, ""},
		"sixteen threads on the two CPUs due":          {Config{CPUs: 2}, []phase{{36, life{used: 2, waiting: 14, full: 0.02}}}, Healthy, ""},
		"bursts of many threads":                       {Config{CPUs: 2}, []phase{{36, life{used: 0.1, waiting: 0.7, full: 0.01}}}, Healthy, ""},
		"bursts of many threads without PSI":           {Config{CPUs: 2}, []phase{{36, life{used: 0.1, waiting: 0.7, noPSI: true, others: 0.1}}}, Healthy, ""},
		"the hypervisor steals": {Config{CPUs: 1}, []phase{{30, worker}, {6, worker.with(func(l *life) { l.stolen, l.progress = 0.6, 0.6 })}}, StarvedCPU,
			"60 % of the node's time was stolen"},

		"thrashing": {Config{CPUs: 1}, []phase{{30, worker}, {6, life{used: 0.1, memory: 0.7, faults: 800, io: 0.8, progress: 0.1}}}, StarvedMemory,
			"stood still 70 % of the last 60 s for memory (normal 0 %), 800 major faults/s (normal 0)"},
		"thrashing a little while progress breaks down": {Config{CPUs: 1}, []phase{{30, worker}, {6, life{used: 0.4, memory: 0.2, io: 0.2, operations: 500, progress: 0.1}}}, StarvedMemory, ""},
		"thrashing a little as it can afford":           {Config{CPUs: 1}, []phase{{30, worker}, {6, worker.with(func(l *life) { l.used, l.memory = 0.8, 0.2 })}}, Healthy, ""},
		"thrashing without PSI":                         {Config{CPUs: 1}, []phase{{30, unpressed(worker)}, {6, life{noPSI: true, used: 0.1, faults: 800, progress: 0.1}}}, StarvedMemory, ""},
		// Figures of a process whose limit was set to a third of the file it has mapped.
		"thrashing on a quick disk": {Config{CPUs: 1}, []phase{{30, worker}, {6, mapping.with(func(l *life) { l.refaults = 11000 })}}, StarvedMemory,
			"stood still 48 % of the last 60 s for memory (normal 0 %), 11000 major faults/s (normal 0), uses 99 % of its limit"},
		"mapping in more than fits, once": {Config{CPUs: 1}, []phase{{30, worker}, {30, mapping}}, Healthy, ""},
		"with room left":                  {Config{CPUs: 1}, []phase{{30, worker}, {30, mapping.with(func(l *life) { l.refaults, l.short = 11000, false })}}, Healthy, ""},
		"always lived from hand to mouth": {Config{CPUs: 1}, []phase{{60, mapping.with(func(l *life) { l.refaults = 11000 })}}, Healthy, ""},
		"reading programs in":             {Config{CPUs: 1}, []phase{{1, life{used: 0.3, memory: 0.5, faults: 500, io: 0.6}}, {30, worker}}, Healthy, ""},

		"a slow disk": {Config{CPUs: 1}, []phase{{30, reader}, {6, life{used: 0.02, io: 0.97, operations: 10, progress: 0.05}}}, StarvedIO,
			"stood still 97 % of the last 60 s for I/O (normal 80 %) at 97 ms an operation (normal 4 ms)"},
		"a dead disk":                         {Config{CPUs: 1}, []phase{{30, worker}, {6, life{io: 1}}}, StarvedIO, ""},
		"waiting for a disk at its own speed": {Config{CPUs: 1}, []phase{{30, worker}, {60, reader}}, Healthy, "waits for I/O"},
		"more I/O than ever, as fast as ever": {Config{CPUs: 1}, []phase{{30, reader}, {30, life{used: 0.01, io: 0.99, operations: 240, progress: 0.1}}}, Healthy, ""},

		"a disk that has always been slow": {Config{CPUs: 1}, []phase{{30, life{used: 0.1, io: 0.9, operations: 45, progress: 1}}}, Healthy, ""},

		"a helper is stopped": {Config{CPUs: 1}, []phase{{30, worker}, {30, worker.with(func(l *life) { l.helper = true })}}, Healthy, ""},
		"stopped by a signal": {Config{CPUs: 1}, []phase{{30, worker}, {6, life{stopped: true}}}, NoProgress,
			"is stopped by a signal, for the last 60 s, and not by Dormouse: used 0 CPUs (normal 0.97), progress 0/min (normal 96/min)"},
		"frozen":                          {Config{CPUs: 1}, []phase{{30, worker}, {6, life{frozen: true}}}, NoProgress, "is frozen"},
		"an idle server is stopped":       {Config{CPUs: 1}, []phase{{30, silently(idle)}, {6, life{stopped: true, silent: true}}}, NoProgress, ""},
		"restored as one that is stopped": {Config{CPUs: 1, Restored: true}, []phase{{60, life{stopped: true}}}, Healthy, "the task is stopped, as it was in its checkpoint"},
		"restored, runs and is stopped":   {Config{CPUs: 1, Restored: true}, []phase{{30, worker}, {6, life{stopped: true}}}, NoProgress, ""},
		"wakes and is stopped again":      {Config{CPUs: 1, Restored: true}, []phase{{6, life{stopped: true}}, {30, worker}, {6, life{stopped: true}}}, NoProgress, ""},
		"stopped on purpose":              {Config{CPUs: 1}, []phase{{30, worker}, {60, life{stopped: true, frozen: true, excused: "stopped on purpose"}}}, Healthy, ""},
		"in a live-lock":                  {Config{CPUs: 1}, []phase{{30, worker}, {6, worker.with(func(l *life) { l.progress = 0 })}}, NoProgress, "reported no progress for the last 60 s (longest pause so far 10 s)"},
		"waits for a peer, sleeping":      {Config{CPUs: 1}, []phase{{30, worker}, {60, life{used: 0.001}}}, Healthy, "is idle"},
		"a slower phase of its own":       {Config{CPUs: 1}, []phase{{30, worker}, {60, worker.with(func(l *life) { l.progress = 0.1 })}}, Healthy, ""},
		"spins before its first report":   {Config{CPUs: 1}, []phase{{60, worker.with(func(l *life) { l.progress = 0 })}}, Healthy, ""},
		"reports rarely":                  {Config{CPUs: 1}, []phase{{120, worker.with(func(l *life) { l.progress = 1.0 / 45 })}}, Healthy, ""},
		"an idle server":                  {Config{CPUs: 1}, []phase{{200, silently(idle)}}, Healthy, "is idle"},
		"a server with little to do":      {Config{CPUs: 1}, []phase{{60, life{used: 0.02, waiting: 0.02, full: -1, silent: true, others: 1.9}}}, Healthy, ""},
		"works, then has nothing to do":   {Config{CPUs: 1}, []phase{{30, silently(worker)}, {60, silently(idle)}}, Healthy, ""},
		"slowed by its own checkpoint":    {Config{CPUs: 1}, []phase{{30, worker}, {10, squeezed.with(func(l *life) { l.memory, l.io, l.excused = 0.5, 0.9, "checkpoint" })}}, Healthy, "is not judged: checkpoint"},
		"shuts down":                      {Config{CPUs: 1}, []phase{{30, worker}, {3, squeezed.with(func(l *life) { l.excused = "shutting down" })}, {5, life{ended: true}}}, Healthy, "has ended"},
		"one bad period":                  {Config{CPUs: 1}, []phase{{30, worker}, {1, squeezed}, {30, worker}}, Healthy, ""},
		"bad periods with good between":   {Config{CPUs: 1}, alternate(20, squeezed, worker), Healthy, ""},
		"a cron-like sleeper":             {Config{CPUs: 1}, alternate(30, worker, idle, idle, idle), Healthy, ""},
		"bursty beside others":            {Config{CPUs: 1}, alternate(30, life{used: 0.6, waiting: 0.3, full: -1, others: 1, progress: 1}, idle), Healthy, ""},
		"checkpoints do not acquit":       {Config{CPUs: 1}, []phase{{30, worker}, {1, squeezed}, {1, squeezed.with(func(l *life) { l.excused = "checkpoint" })}, {5, squeezed}}, StarvedCPU, ""},
		"misery does not become normal":   {Config{CPUs: 1}, []phase{{10, worker}, {500, squeezed}}, StarvedCPU, "waited 81 % of the last 60 s for a CPU (normal 3 %)"},
	} {
		t.Run(name, func(t *testing.T) {
			detector, s := NewDetector(c.config), newSimulation(c.phases[0].life)
			detector.Feed(s.task, s.host)
			for i, phase := range c.phases {
				final := i == len(c.phases)-1
				for n := range phase.periods {
					s.live(phase.life, 10*time.Second)
					verdict := detector.Feed(s.task, s.host)
					settled := n >= 2 || phase.periods < 3
					if c.want == Healthy && verdict.Troubled() || final && settled && verdict.Condition != c.want {
						t.Fatalf("phase %d, period %d: %s (%s), want %s", i, n, verdict.Condition, verdict.Explanation, c.want)
					}
				}
			}
			if got := detector.Verdict().Explanation; !strings.Contains(got, c.says) {
				t.Errorf("says\n%s\nwant\n%s", got, c.says)
			}
		})
	}
}

func TestAVerdictIsWithdrawnOnlyWhenItIsGoodForLong(t *testing.T) {
	d, s := NewDetector(Config{CPUs: 1}), newSimulation(worker)
	d.Feed(s.task, s.host)
	if v := run(d, s, phase{10, worker}, phase{5, squeezed}, phase{2, worker}); !v.Troubled() {
		t.Errorf("withdrawn after two good periods: %s", v.Explanation)
	}
	if v := run(d, s, phase{1, squeezed}, phase{2, worker}); !v.Troubled() {
		t.Errorf("withdrawn though a bad period came between: %s", v.Explanation)
	}
	// Better than what would raise a verdict is not good enough to end it.
	if v := run(d, s, phase{10, life{used: 0.7, waiting: 0.3, full: -1, progress: 1}}); !v.Troubled() {
		t.Errorf("withdrawn while 30 %% are missed: %s", v.Explanation)
	}
	if v := run(d, s, phase{3, worker}); v.Troubled() {
		t.Errorf("not withdrawn after three good periods: %s", v.Explanation)
	}
}

func TestATaskThatWentOnElsewhereBeginsAnewButKeepsItsPast(t *testing.T) {
	d, s := NewDetector(Config{CPUs: 1}), newSimulation(worker)
	d.Feed(s.task, s.host)
	if v := run(d, s, phase{10, worker}, phase{5, squeezed}); !v.Troubled() {
		t.Fatal("a squeezed task is not found")
	}
	s.task.CPU, s.task.Delay, s.done = 0, 0, 0
	if v := run(d, s, phase{1, worker}); v.Troubled() {
		t.Errorf("the verdict of the old node is kept: %s", v.Explanation)
	}
	if v := run(d, s, phase{2, worker}); v.Figures.NormalProgress < 90 {
		t.Errorf("its normal progress is %v/min, want the 96/min of before", v.Figures.NormalProgress)
	}
}

func TestSuspicionComesBeforeTheVerdict(t *testing.T) {
	d, s := NewDetector(Config{CPUs: 1}), newSimulation(worker)
	d.Feed(s.task, s.host)
	run(d, s, phase{10, worker})
	began := s.now
	v := run(d, s, phase{1, squeezed})
	if v.Condition != Healthy || v.Suspected != StarvedCPU || !v.Since.Equal(began) {
		t.Errorf("after one bad period: %s, suspected %s since %v, want healthy, suspected starved_cpu since %v", v.Condition, v.Suspected, v.Since, began)
	}
}

func TestRareReportsAreARateToo(t *testing.T) {
	rare := worker.with(func(l *life) { l.progress = 1.0 / 45 })
	d, s := NewDetector(Config{CPUs: 1}), newSimulation(rare)
	d.Feed(s.task, s.host)
	if v := run(d, s, phase{60, rare}); v.Figures.NormalProgress < 1 || v.Figures.NormalProgress > 2 {
		t.Errorf("normal progress of one unit in 45 s is %v/min, want about 1.3", v.Figures.NormalProgress)
	}
}

// BenchmarkFeed is the cost of one task's verdict with a long past.
func BenchmarkFeed(b *testing.B) {
	d, s := NewDetector(Config{CPUs: 1}), newSimulation(worker)
	d.Feed(s.task, s.host)
	run(d, s, phase{400, worker})
	for b.Loop() {
		s.live(worker, 10*time.Second)
		d.Feed(s.task, s.host)
	}
}
