package starvation

import (
	"time"

	"dormouse/monitor/sample"
)

// Condition is what a verdict says.
type Condition string

// The conditions.
const (
	Healthy       Condition = "healthy" // runs, or has nothing to do
	NoProgress    Condition = "no_progress"
	StarvedIO     Condition = "starved_io"
	StarvedCPU    Condition = "starved_cpu"
	StarvedMemory Condition = "starved_memory"
)

const (
	// looked is how many periods the figures of a verdict reach back.
	looked = 6
	// manyFaults a second are suspect, where PSI does not tell what they cost.
	manyFaults = 50
)

// Config of a detector. A zero field gets the value named beside it.
type Config struct {
	Name   string        // of the task, for explanations; "the task"
	CPUs   float64       // the task is due; 0: its greatest quota so far, or the whole machine
	Period time.Duration // between samples; sample.DefaultPeriod
	// Restored is set for a task that was restored: one that was stopped in its
	// checkpoint is so still, which is judged only once it has run.
	Restored bool

	StartUp int // periods after the first sample that are not judged; 1
	Confirm int // suspect periods in a row that make a verdict; 2
	Clear   int // good periods in a row that withdraw it; 3
	History int // periods remembered; 360

	Missed      float64 // share of the CPU time due that is suspect to miss; 0.4
	MemoryStall float64 // share of the time standing still for memory that is suspect; 0.3
	IOStall     float64 // share of the time standing still for I/O that is suspect; 0.5
	IOSlowdown  float64 // times its normal that an operation must take besides; 3
}

func (c Config) filled() Config {
	if c.Name == "" {
		c.Name = "the task"
	}
	if c.Period <= 0 {
		c.Period = sample.DefaultPeriod
	}
	orInt(&c.StartUp, 1)
	orInt(&c.Confirm, 2)
	orInt(&c.Clear, 3)
	orInt(&c.History, 360)
	orFloat(&c.Missed, 0.4)
	orFloat(&c.MemoryStall, 0.3)
	orFloat(&c.IOStall, 0.5)
	orFloat(&c.IOSlowdown, 3)
	return c
}

func orInt(field *int, value int) {
	if *field <= 0 {
		*field = value
	}
}

func orFloat(field *float64, value float64) {
	if *field <= 0 {
		*field = value
	}
}

// Verdict is what is known of a task after a sample.
type Verdict struct {
	Condition Condition
	// Suspected is the condition that the last periods hint at without
	// confirmation; Healthy when there is none.
	Suspected Condition
	// Since is when the trouble began, confirmed or suspected; zero without.
	Since time.Time
	// Stopped is set when the task makes no progress because it is stopped.
	Stopped bool
	// Figures of the trouble so far, at most of the last few periods; of the last
	// period when there is none.
	Figures     Figures
	Explanation string // one sentence with the figures
}

// Troubled reports whether the verdict is anything but healthy.
func (v Verdict) Troubled() bool { return v.Condition != Healthy }

// Detector judges one task. It is not safe for concurrent use.
type Detector struct {
	config  Config
	began   time.Time // the start-up not to be judged
	recent  []point   // the last periods without an excuse between them, oldest first
	excused string    // why the period now running is, from samples that came too early to end it
	quota   float64   // the greatest seen; 0: none yet
	free    bool      // the task was once without quota
	asleep  bool      // it was restored as one that is stopped, and has not run since

	used                                            series // CPUs
	missed, waited, stalled, faults, waits, latency history
	progress                                        progress

	verdict   Verdict
	bad, good int
}

// NewDetector returns the detector of a task whose first sample is to come.
func NewDetector(config Config) *Detector {
	d := &Detector{config: config.filled()}
	d.verdict = Verdict{Condition: Healthy, Suspected: Healthy}
	return d
}

// Verdict is the last one.
func (d *Detector) Verdict() Verdict { return d.verdict }

// Feed takes in the samples of one moment and returns the verdict from then on.
// A zero host means that it was not measured. Samples less than half a period
// apart are put together; those from before the last one are ignored.
func (d *Detector) Feed(task sample.Task, host sample.Host) Verdict {
	now := point{task, host}
	if len(d.recent) == 0 {
		return d.begin(now, "is starting")
	}
	last := d.recent[len(d.recent)-1]
	if task.Excused != "" {
		d.excused = task.Excused
	}
	span := task.Time.Sub(last.task.Time)
	switch {
	case span <= 0 || span < d.config.Period/2:
		return d.verdict
	case restarted(last, now):
		return d.begin(now, "is starting")
	}
	why := d.unjudged(now)
	d.excused = ""
	d.entitle(task.Quota)
	if why != "" {
		return d.skip(now, why)
	}
	return d.judge(now, span)
}

// begin anew with the first sample of a task, or of one that went on elsewhere:
// its past stays, what is under way does not.
func (d *Detector) begin(now point, why string) Verdict {
	d.began, d.excused = now.task.Time, ""
	d.asleep = d.config.Restored && stopped(now.task)
	d.bad = 0
	d.verdict = Verdict{Condition: Healthy, Suspected: Healthy}
	d.entitle(now.task.Quota)
	return d.skip(now, why)
}

// unjudged says why the period that ends now counts neither way; "" if it does.
func (d *Detector) unjudged(now point) string {
	startUp := time.Duration(d.config.StartUp) * d.config.Period
	d.asleep = d.asleep && stopped(now.task)
	switch {
	case d.excused != "":
		return "is not judged: " + d.excused
	case d.asleep:
		return "is stopped, as it was in its checkpoint"
	case now.task.Processes == 0:
		return "has ended"
	case now.task.Time.Sub(d.began) < startUp+d.config.Period/2:
		return "is starting"
	}
	return ""
}

func (d *Detector) skip(now point, why string) Verdict {
	d.recent = append(d.recent[:0], now)
	if now.task.Progress != nil {
		d.progress.begin(*now.task.Progress)
	}
	if !d.verdict.Troubled() && d.verdict.Suspected == Healthy {
		d.verdict.Explanation = d.config.Name + " " + why
	}
	return d.verdict
}

// entitle remembers the most the task was ever allowed: a quota lowered later
// takes away what it is due.
func (d *Detector) entitle(quota float64) {
	if quota == 0 {
		d.free = true
	}
	d.quota = max(d.quota, quota)
}

func (d *Detector) due() float64 {
	switch {
	case d.config.CPUs > 0:
		return d.config.CPUs
	case d.free:
		return 0
	}
	return d.quota
}

func (d *Detector) judge(now point, span time.Duration) Verdict {
	last := d.recent[len(d.recent)-1]
	f := between(last, now, d.due())
	d.observe(now, f, span)
	suspected := d.suspect(f)
	d.recent = append(d.recent, now)
	if len(d.recent) > looked+1 {
		d.recent = d.recent[1:]
	}
	if suspected == Healthy {
		d.relieve()
	} else {
		d.incriminate(suspected, last.task.Time)
		d.verdict.Stopped = f.Stopped
	}
	if d.verdict.Suspected == Healthy && !d.verdict.Troubled() {
		d.learn(f)
	}
	d.verdict.Figures = d.normals(d.look(now))
	d.verdict.Explanation = d.explain()
	return d.verdict
}

// observe follows what may fall. Progress is learned at once, except in trouble:
// a suspicion that only begins now has not yet shown in it.
func (d *Detector) observe(now point, f Figures, span time.Duration) {
	d.used.observe(f.CPU)
	if now.task.Progress == nil {
		return
	}
	if !d.progress.begun {
		d.progress.begin(*now.task.Progress)
		return
	}
	calm := d.verdict.Suspected == Healthy && !d.verdict.Troubled()
	d.progress.report(*now.task.Progress, span, d.config.Period, calm, d.config.History)
}

// brokenDown reports whether progress, reported or consumed, has fallen far
// below its normal and stayed there.
func (d *Detector) brokenDown(f Figures) bool {
	if f.Reports && d.progress.rate.known() {
		return d.progress.rate.fallen(d.progress.current)
	}
	return d.used.fallen(f.CPU)
}

// suspect names what the figures of one period hint at. While a verdict stands,
// less suffices to keep it.
func (d *Detector) suspect(f Figures) Condition {
	ease := 1.0
	if d.verdict.Troubled() {
		ease = 0.6
	}
	broken := d.brokenDown(f)
	switch {
	case f.Stopped:
		return NoProgress
	case d.thrashes(f, ease, broken):
		return StarvedMemory
	case d.squeezed(f, ease, broken):
		return StarvedCPU
	case d.slowDevice(f, ease):
		return StarvedIO
	case d.spins(f):
		return NoProgress
	}
	return Healthy
}

func (d *Detector) squeezed(f Figures, ease float64, broken bool) bool {
	if f.Missed >= ease*d.config.Missed {
		return true
	}
	normal, deviation := d.missed.normal()
	return broken && f.Missed >= ease*d.config.Missed/2 && f.Missed >= normal+max(0.1, 3*deviation)
}

func (d *Detector) thrashes(f Figures, ease float64, broken bool) bool {
	if f.MemoryStall >= ease*d.config.MemoryStall {
		return true
	}
	if broken && f.MemoryStall >= ease*d.config.MemoryStall/3 {
		return true
	}
	normal, deviation := d.faults.normal()
	if !d.faults.known() || f.MajorFaults < ease*max(manyFaults, 5*normal, normal+6*deviation) {
		return false
	}
	if f.FaultStall >= ease*d.config.MemoryStall {
		return true
	}
	// Without PSI: the CPU use has gone where the faults have come.
	usual, _ := d.used.normal()
	return f.MemoryStall == 0 && f.CPU < usual/2 && broken
}

func (d *Detector) slowDevice(f Figures, ease float64) bool {
	if f.IOStall < ease*d.config.IOStall {
		return false
	}
	// Slower than this per operation is no working device, whatever the past; and
	// faster than the other is none that starves.
	const broken, quick = 0.1, 0.005
	normal, _ := d.latency.normal()
	if f.IOLatency < quick {
		return false
	}
	return f.IOLatency >= broken || d.latency.known() && f.IOLatency >= ease*d.config.IOSlowdown*normal
}

// spins reports a live-lock: progress was reported, no longer is, and CPU is
// used as ever.
func (d *Detector) spins(f Figures) bool {
	usual, _ := d.used.normal()
	return f.Reports && d.progress.stands(d.config) && f.CPU >= max(usual/2, min(1, f.Due)/5)
}

func (d *Detector) relieve() {
	d.bad = 0
	d.good++
	if d.verdict.Troubled() && d.good < d.config.Clear {
		return
	}
	d.verdict = Verdict{Condition: Healthy, Suspected: Healthy}
}

func (d *Detector) incriminate(suspected Condition, since time.Time) {
	d.good = 0
	d.bad++
	if d.verdict.Suspected == Healthy {
		d.verdict.Since = since
	}
	d.verdict.Suspected = suspected
	// A live-lock is only suspected after several periods without progress.
	confirmed := d.bad >= d.config.Confirm ||
		suspected == NoProgress && d.progress.stands(d.config)
	if confirmed || d.verdict.Troubled() {
		d.verdict.Condition = suspected
	}
}

// learn from a period above suspicion.
func (d *Detector) learn(f Figures) {
	size := d.config.History
	d.used.add(f.CPU, size)
	d.missed.add(f.Missed, size)
	d.waited.add(f.Waited, size)
	d.stalled.add(f.MemoryStall, size)
	d.faults.add(f.MajorFaults, size)
	d.waits.add(f.IOStall, size)
	if f.IOLatency > 0 {
		d.latency.add(f.IOLatency, size)
	}
}

// look sums up the trouble so far, or the last period.
func (d *Detector) look(now point) Figures {
	from := d.recent[max(0, len(d.recent)-2)]
	if !d.verdict.Since.IsZero() {
		for _, p := range d.recent[:len(d.recent)-1] {
			if !p.task.Time.Before(d.verdict.Since) {
				from = p
				break
			}
		}
	}
	return between(from, now, d.due())
}

// normals completes figures by what is usual for this task.
func (d *Detector) normals(f Figures) Figures {
	for _, one := range []struct {
		to   *float64
		past *history
	}{
		{&f.NormalCPU, &d.used.history}, {&f.NormalWaited, &d.waited},
		{&f.NormalMemoryStall, &d.stalled}, {&f.NormalMajorFaults, &d.faults},
		{&f.NormalIOStall, &d.waits}, {&f.NormalIOLatency, &d.latency},
		{&f.NormalProgress, &d.progress.rate.history},
	} {
		if *one.to = -1; one.past.known() {
			*one.to, _ = one.past.normal()
		}
	}
	return f
}
