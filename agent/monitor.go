package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/agent/progress"
	"dormouse/agent/sandbox"
	"dormouse/agent/sandbox/pid1"
	"dormouse/api"
	"dormouse/monitor/sample"
	"dormouse/monitor/starvation"
	"dormouse/monitor/tally"
	"dormouse/monitor/tree"
)

// minPeriod is how often a task is measured at most: the kernel brings its
// pressure figures up to date every two seconds.
const minPeriod = 2500 * time.Millisecond

// settled is how many periods a trouble that an earlier agent process found must
// be away before it is withdrawn: this process knows nothing of it.
const settled = 5

// monitor measures every running task and the node, judges the tasks one by one,
// and says what has changed. All tasks that are due are measured at one moment,
// at multiples of their period, so that one look at the node does for all.
type monitor struct {
	agent *Agent
	log   *slog.Logger
	woken chan struct{} // capacity 1: a task began
	disks []diskWatch

	// These are of run's goroutine only.
	tasks    map[string]*watchedTask
	host     sample.Host
	hostDue  time.Time
	measured bool // host is

	mu    sync.Mutex
	node  tally.Node
	tally map[string]tally.Task // by task id
}

// watchedTask is a task that is measured.
type watchedTask struct {
	task      *task
	period    time.Duration
	due       time.Time
	collector *sample.Collector
	detector  *starvation.Detector
	progress  *progress.Reader
	last      sample.Task
	judged    int // samples
}

func newMonitor(a *Agent) *monitor {
	return &monitor{
		agent: a, log: a.log, woken: make(chan struct{}, 1), disks: []diskWatch{{a.config.State}, {a.config.Spool}},
		tasks: map[string]*watchedTask{}, tally: map[string]tally.Task{},
	}
}

// began says that there is a task to be measured.
func (m *monitor) began() {
	select {
	case m.woken <- struct{}{}:
	default:
	}
}

// run measures until ctx ends.
func (m *monitor) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-m.woken:
		}
		now := time.Now()
		m.follow(now)
		timer.Reset(time.Until(m.measure(ctx, now)))
	}
}

// follow takes up tasks that run and gives up those that do not any more.
func (m *monitor) follow(now time.Time) {
	known := map[string]bool{}
	for _, t := range m.agent.allTasks() {
		r, box := t.snapshot()
		known[t.id()] = true
		if r.Stage != stageRunning || box == nil {
			m.drop(t.id())
			continue
		}
		if w := m.tasks[t.id()]; w == nil || w.task != t {
			m.take(t, r, box, now)
		}
	}
	for id := range m.tasks {
		if !known[id] {
			m.drop(id)
		}
	}
	m.agent.tree.forget(func(key string) bool {
		id, _, about := strings.Cut(key, " ")
		return !about || known[id]
	})
}

func (m *monitor) take(t *task, r record, box *sandbox.Sandbox, now time.Time) {
	group, err := sample.GroupOf(box.Pid())
	if err != nil {
		m.log.Debug("a task is not measured", "task", t.id(), "error", err) // it is about to end
		return
	}
	period := sample.DefaultPeriod
	if ms := r.Spec.StarvationPeriodMS; ms > 0 {
		period = max(minPeriod, time.Duration(ms)*time.Millisecond)
	}
	m.tasks[t.id()] = &watchedTask{
		progress: m.progressOf(t, &r, box), task: t, period: period, due: now, collector: sample.NewCollector(group),
		detector: starvation.NewDetector(starvation.Config{Name: fmt.Sprintf("task %d", r.Index), CPUs: r.Spec.CPUs, Period: period, Restored: r.From != ""}),
	}
}

// progressOf reads how far the task says it has come. The output of a task whose
// expression is none says nothing.
func (m *monitor) progressOf(t *task, r *record, box *sandbox.Sandbox) *progress.Reader {
	var pattern *regexp.Regexp
	if text := r.Spec.ProgressRegex; text != "" {
		var err error
		if pattern, err = regexp.Compile(text); err != nil {
			m.log.Warn("progress is not read from the output", "task", t.id(), "error", err)
		}
	}
	log := func(stream string) func() (*os.File, error) {
		return func() (*os.File, error) { return box.OpenLog(stream) }
	}
	return progress.New(box.OpenProgress, pattern, log(pid1.StdoutFile), log(pid1.StderrFile))
}

func (m *monitor) drop(id string) {
	delete(m.tasks, id)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.tally, id)
}

// measure all that is due, and return when something is next.
func (m *monitor) measure(ctx context.Context, now time.Time) time.Time {
	var due []*watchedTask
	for _, w := range m.tasks {
		if isDue(w.due, now, w.period) {
			due = append(due, w)
		}
	}
	node := isDue(m.hostDue, now, sample.DefaultPeriod)
	if node || len(due) > 0 {
		m.lookAtHost(ctx, now)
	}
	for _, w := range due {
		m.look(w, now)
		w.due = nextSample(now, w.period)
	}
	if node {
		m.hostDue = nextSample(now, sample.DefaultPeriod)
		m.lookAtDisks(now)
	}
	next := m.hostDue
	for _, w := range m.tasks {
		if w.due.Before(next) {
			next = w.due
		}
	}
	return next
}

// ahead is how long before the end of a period its sample is taken: rounds of the
// monitoring tree end at the same moments, and what is found then shall go up with
// the one that ends.
const ahead = 500 * time.Millisecond

// nextSample is when the next one of a period is taken.
func nextSample(now time.Time, period time.Duration) time.Time {
	return now.Add(ahead).Truncate(period).Add(period - ahead)
}

// isDue reports whether it is time for what comes once a period. What is due later
// than that was due by a clock that has been set back since.
func isDue(due, now time.Time, period time.Duration) bool {
	return !now.Before(due) || due.Sub(now) > period
}

// lookAtHost measures the node.
func (m *monitor) lookAtHost(ctx context.Context, now time.Time) {
	host, err := sample.ReadHost(ctx, now)
	if err != nil {
		m.log.Debug("the node is not measured", "error", err)
		m.host, m.measured = sample.Host{}, false
		return
	}
	if m.measured {
		m.setNode(m.host, host)
	}
	m.host, m.measured = host, true
}

// look measures one task, judges it, and says what has changed.
func (m *monitor) look(w *watchedTask, now time.Time) {
	excused := w.task.excuse()
	s, err := w.collector.Collect(now)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return // it has just ended
	}
	if err != nil {
		m.log.Warn("a task cannot be measured", "task", w.task.id(), "error", err)
		return
	}
	s.Excused = excused
	if s.Progress, err = w.progress.Read(); err != nil {
		m.log.Debug("a task's progress cannot be read", "task", w.task.id(), "error", err)
	}
	verdict := w.detector.Feed(s, m.host)
	w.judged++
	m.setTask(w, s, verdict)
	m.conclude(w, verdict, now)
	w.last = s
}

// conclude says what has changed about a task.
func (m *monitor) conclude(w *watchedTask, v starvation.Verdict, now time.Time) {
	r, _ := w.task.snapshot()
	key := w.task.id() + " " + string(api.FindingStarvation)
	f := v.Finding(now)
	f.Node, f.Job, f.Task, f.Run = m.agent.config.Node, r.Job, int(r.Index), r.Run
	said := starvation.VerdictOf(m.agent.tree.last(key))
	if sameVerdict(said, starvation.VerdictOf(f), r.Spec.Tasks > 1) || said.Troubled() && !v.Troubled() && w.judged <= settled {
		return
	}
	if string(said.Condition) != f.Condition {
		m.log.Info("starvation", "task", w.task.id(), "condition", f.Condition, "explanation", f.Explanation)
	}
	if err := m.agent.tree.say(key, f); err != nil {
		m.log.Error("a finding is not told yet", "task", w.task.id(), "error", err)
	}
}

// sameVerdict reports whether there is nothing new in a verdict. What is only
// suspected matters where it may clear other tasks of the job.
func sameVerdict(said, now starvation.Verdict, several bool) bool {
	return said.Condition == now.Condition && said.Spins() == now.Spins() && (!several || said.Suspected == now.Suspected)
}

// setTask is what the next summary says of a task.
func (m *monitor) setTask(w *watchedTask, s sample.Task, v starvation.Verdict) {
	r, _ := w.task.snapshot()
	f := v.Figures
	t := tally.Task{
		Job: r.Job, CPUsDue: r.Spec.CPUs, MemUsed: s.MemoryBytes, MemBytes: s.MemoryLimit,
		Waited: f.Waited, MemoryStall: max(f.MemoryStall, f.FaultStall), IOStall: f.IOStall, Troubled: v.Troubled(),
		Unhealthy: m.agent.tree.last(healthKey(w.task)).Condition == api.ConditionUnhealthy,
	}
	if span := s.Time.Sub(w.last.Time).Seconds(); !w.last.Time.IsZero() && span > 0 {
		t.CPUs = max(0, (s.CPU-w.last.CPU).Seconds()/span)
	}
	if s.Progress != nil {
		t.Progress, t.NormalProgress = &f.Progress, f.NormalProgress
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tally[w.task.id()] = t
}

// setNode is what the next summary says of the node.
func (m *monitor) setNode(before, after sample.Host) {
	span := after.Time.Sub(before.Time)
	if span <= 0 {
		return
	}
	share := func(a, b time.Duration) float64 { return min(1, max(0, (b-a).Seconds()/span.Seconds())) }
	n := tally.Node{
		CPUs:       m.agent.cpus(),
		CPUsBusy:   max(0, (after.Busy-before.Busy).Seconds()/span.Seconds()),
		CPUsStolen: max(0, (after.Steal-before.Steal).Seconds()/span.Seconds()),
		MemBytes:   uint64(m.agent.memory()), MemUsed: after.MemoryBytes - min(after.MemoryBytes, after.MemoryAvailable),
		CPUStall:    share(before.Pressure.CPU.Some, after.Pressure.CPU.Some),
		MemoryStall: share(before.Pressure.Memory.Full, after.Pressure.Memory.Full),
		IOStall:     share(before.Pressure.IO.Full, after.Pressure.IO.Full),
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n.DiskFree, n.DiskBytes = m.node.DiskFree, m.node.DiskBytes
	m.node = n
}

// summary is what was measured last. It is called with the tree locked.
func (m *monitor) summary() tree.Summary {
	m.mu.Lock()
	defer m.mu.Unlock()
	node, tasks := m.node, make([]tally.Task, 0, len(m.tally))
	if m.agent.config.Virtual {
		node.CPUsBusy, node.MemUsed = 0, 0 // others share the machine
	}
	for _, t := range m.tally {
		tasks = append(tasks, t)
		node.Tasks++
		if t.Troubled || t.Unhealthy {
			node.Troubled++
		}
		if m.agent.config.Virtual {
			node.CPUsBusy += t.CPUs
			node.MemUsed += t.MemUsed
		}
	}
	node.CPUsBusy = math.Min(node.CPUsBusy, node.CPUs)
	return tally.Fill(m.agent.config.Node, node, tasks)
}
