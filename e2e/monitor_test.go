package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/api"
	"dormouse/internal/child"
	"dormouse/monitor/sample"
	"dormouse/monitor/starvation"
)

// The monitor, with real jobs that are really kept from working. The tests in
// which jobs must be well are not parallel: beside others they would not be.

const (
	watchedEvery = 3 * time.Second // the starvation period of these jobs
	treeRound    = 5 * time.Second // of the monitoring tree: a finding may wait so long
)

// scenario is one job, what is done to it, and what the monitor must say.
type scenario struct {
	name    string
	flags   []string
	command []string
	harm    func(*watched)       // nil: it is well all the time
	want    starvation.Condition // Healthy: no word about it
	task    int                  // the one to be named, of several

	job    string
	harmed time.Time
}

// watched is a job under observation.
type watched struct {
	*platform
	job string
}

const burn = "while :; do :; done"

// scenarios: on processor 0 the squeezed job only, on 1 those that take little.
func scenarios() []*scenario {
	some := func(n int) string { return fmt.Sprintf("i=0; while [ $i -lt %d ]; do i=$((i+1)); done", n) }
	return []*scenario{
		{name: "squeezed by a hog outside", command: on(0, "sh", "-c", burn), harm: (*watched).hog, want: starvation.StarvedCPU},
		{name: "throttled", flags: []string{"--cpus", "0.3"}, command: on(1, "sh", "-c", burn), harm: (*watched).throttle, want: starvation.StarvedCPU},
		{name: "short of memory", flags: []string{"--mem", "256M"}, command: on(1, "python3", program("thrash.py"), "/mapped"), harm: (*watched).shrink, want: starvation.StarvedMemory},
		{name: "slow disk", flags: []string{"--cpus", "0.2"}, command: on(1, "python3", program("direct.py"), "/var/tmp/direct"), harm: (*watched).slowDisk, want: starvation.StarvedIO},
		{name: "live-locked", flags: []string{"--cpus", "0.2", "--progress-regex", "^step ([0-9]+)"},
			command: on(1, "bash", "-c", "trap 'go=no' USR1; n=0; while [ -z $go ]; do "+some(1000)+"; n=$((n+1)); echo step $n; done; "+burn),
			harm:    func(w *watched) { w.run("kill", w.job, "--signal", "USR1") }, want: starvation.NoProgress},
		{name: "stopped", command: on(1, "sh", "-c", "while :; do sleep 0.1; done"),
			harm: (*watched).stop, want: starvation.NoProgress},
		{name: "peer of a stopped rank", flags: []string{"--tasks", "2", "--cpus", "0.2"},
			command: []string{openMPI, program("stencil" + suffix[openMPI]), "64", forever, "10", "50", stopFile},
			harm:    func(w *watched) { w.run("exec", w.job, "--task", "1", "--", "pkill", "-STOP", "stencil") }, want: starvation.NoProgress, task: 1},

		{name: "idle", command: []string{"sleep", "1000"}},
		{name: "idle server", command: []string{"python3", "-m", "http.server", "8000"}},
		{name: "cron-like", command: on(1, "sh", "-c", "while :; do "+some(5000)+"; sleep 4; done")},
		{name: "bursty", command: on(1, "sh", "-c", "while :; do "+some(20000)+"; sleep 0.5; done")},
		{name: "start-up and end", command: on(1, "sh", "-c", some(300000))},
		{name: "slowed by its checkpoints", flags: []string{"--progress-regex", "^[0-9]+$"},
			command: on(1, "sh", "-c", "n=0; while :; do n=$((n+1)); echo $n; sleep 0.05; done")},
	}
}

// on keeps a program on one processor.
func on(cpu int, command ...string) []string {
	return append([]string{"taskset", "-c", fmt.Sprint(cpu)}, command...)
}

// TestStarvingJobsAreFoundAndOthersLeftAlone, with short periods: each is found
// within three until its node says so, which may just miss a round of the tree.
func TestStarvingJobsAreFoundAndOthersLeftAlone(t *testing.T) {
	starvingAreFound(t, watchedEvery, 3*watchedEvery+2*treeRound)
}

// starvingAreFound runs the scenarios. Side by side all are well for a while. Then
// some are harmed, and each of those is found in time, and named for what it
// suffers; nobody else is ever accused.
func starvingAreFound(t *testing.T, period, most time.Duration) {
	t.Helper()
	p := onOwn(t, built.bin, nil, "--cloud", "east=2", "--cpus", "16", "--mem", "6G", "--on-starvation", "notify")
	all := scenarios()
	for _, s := range all {
		s.job = p.submit(slices.Concat([]string{"--starvation-period", period.String()}, s.flags, []string{"--"}, s.command)...)
	}
	for _, s := range all {
		p.waitFor(s.job, api.PhaseRunning)
	}
	(&watched{p, all[0].job}).favour()
	time.Sleep(6 * period) // what is normal is learned meanwhile
	for _, s := range all {
		s.mustBeWell(p)
		if s.harm != nil {
			s.harmed = time.Now()
			s.harm(&watched{p, s.job})
		}
	}
	checkpointed := all[slices.IndexFunc(all, func(s *scenario) bool { return s.name == "slowed by its checkpoints" })].job
	for end := time.Now().Add(6 * period); time.Now().Before(end); {
		p.checkpoint(checkpointed)
	}
	for _, s := range all {
		if s.harm == nil {
			s.mustBeWell(p)
			continue
		}
		s.mustBeFound(p, period, most)
	}
}

// starving are the events that tell that a job starves, or did.
func (p *platform) starving(job string) (found []api.Event) {
	for line := range bytes.Lines([]byte(p.run("-o", "json", "events", job))) {
		var e api.Event
		if err := json.Unmarshal(line, &e); err != nil {
			p.t.Fatalf("events: %v in %q", err, line)
		}
		if e.Type == "starving" || e.Type == "starvation" {
			found = append(found, e)
		}
	}
	return found
}

func (s *scenario) mustBeWell(p *platform) {
	p.t.Helper()
	for _, e := range p.starving(s.job) {
		p.t.Errorf("%s: accused while it is well: %s", s.name, e.Message)
	}
}

func (s *scenario) mustBeFound(p *platform, period, most time.Duration) {
	p.t.Helper()
	p.until(s.job, s.name+": it is found to starve", func() bool { return len(p.starving(s.job)) > 0 })
	e := p.starving(s.job)[0]
	detail := p.inspect(s.job)
	found := detail.Starvation
	if found == nil || found.Condition != string(s.want) {
		p.t.Errorf("%s: want it to be %s, got %+v", s.name, s.want, found)
		return
	}
	if detail.Tasks > 1 && (found.Task == nil || *found.Task != s.task) {
		p.t.Errorf("%s: want task %d to be named, got %+v", s.name, s.task, found)
	}
	delay := e.Time.Sub(s.harmed)
	p.t.Logf("%-26s %-15s after %4.1f periods: %s", s.name, found.Condition, float64(delay)/float64(period), e.Message)
	if delay > most {
		p.t.Errorf("%s: found after %s, expected at most %s", s.name, delay.Round(time.Millisecond), most)
	}
}

// hog takes the processor of a job, from outside of it.
func (w *watched) hog() { w.t.Cleanup(hogs(w.t)) }

// hogs burn all they get of processor 0 until they are called off. They are
// sessions of their own, as what the kernel weighs may be sessions (sched(7),
// "The autogroup feature").
func hogs(t *testing.T) (off func()) {
	t.Helper()
	var all []*exec.Cmd
	for range 8 {
		hog := exec.Command("taskset", "-c", "0", "nice", "-n", "-20", "sh", "-c", burn)
		hog.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := child.Start(hog, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		all = append(all, hog)
	}
	return sync.OnceFunc(func() {
		for _, hog := range all {
			hog.Process.Kill()
			hog.Wait()
		}
	})
}

// stop stops a job's program from outside, where Dormouse has no part in it.
func (w *watched) stop() {
	w.t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", w.inspect(w.job).TaskStatus[0].Pid))
	if err != nil {
		w.t.Fatal(err)
	}
	stopped := 0
	for _, thread := range threads {
		children, err := os.ReadFile(thread)
		if err != nil {
			w.t.Fatal(err)
		}
		for child := range strings.FieldsSeq(string(children)) {
			pid, err := strconv.Atoi(child)
			if err := errors.Join(err, syscall.Kill(pid, syscall.SIGSTOP)); err != nil {
				w.t.Fatal(err)
			}
			stopped++
		}
	}
	if stopped == 0 {
		w.t.Fatal("the task's first process has no child")
	}
}

// group is where the limits of a job's only task are.
func (w *watched) group() sample.Group {
	w.t.Helper()
	group, err := sample.GroupOf(w.inspect(w.job).TaskStatus[0].Pid)
	if err != nil {
		w.t.Fatal(err)
	}
	return group
}

// limit writes a limit of a job's task, as its name is in cgroup v1 or v2.
func (w *watched) limit(controller, v1, v2, value string) {
	w.t.Helper()
	group := w.group()
	file := filepath.Join(group.Unified, v2)
	if dir := group.V1[controller]; dir != "" {
		file = filepath.Join(dir, v1)
	}
	if err := os.WriteFile(file, []byte(value), 0); err != nil {
		w.t.Fatal(err)
	}
}

// favour gives the group above all jobs of this `up` much of the
// processors: whatever else this machine does must not make a healthy job starve.
func (w *watched) favour() {
	w.t.Helper()
	group := w.group()
	dir, file, weight := group.Unified, "cpu.weight", "800"
	if group.V1["cpu"] != "" {
		dir, file, weight = group.V1["cpu"], "cpu.shares", "8192"
	}
	for !isMountPoint(w.t, filepath.Dir(dir)) {
		dir = filepath.Dir(dir)
	}
	if err := os.WriteFile(filepath.Join(dir, file), []byte(weight), 0); err != nil {
		w.t.Fatal(err)
	}
}

func isMountPoint(t *testing.T, dir string) bool {
	t.Helper()
	var here, above syscall.Stat_t
	if err := errors.Join(syscall.Stat(dir, &here), syscall.Stat(filepath.Dir(dir), &above)); err != nil {
		t.Fatal(err)
	}
	return here.Dev != above.Dev
}

func (w *watched) throttle() { w.limit("cpu", "cpu.cfs_quota_us", "cpu.max", "7500") }

// shrink takes most of a job's memory away. What it then lacks comes back no quicker
// than from a common disk, however quick this machine's is.
func (w *watched) shrink() {
	w.throttleDisk("read_bps", "rbps", 8<<20)
	w.limit("memory", "memory.limit_in_bytes", "memory.max", fmt.Sprint(24<<20))
}

// slowDisk lets a job write 100 kB a second to the disk that its files are on.
func (w *watched) slowDisk() { w.throttleDisk("write_bps", "wbps", 100000) }

// throttleDisk bounds the bytes a second between a job and the disk that its files
// are on.
func (w *watched) throttleDisk(v1, v2 string, bytes int) {
	w.t.Helper()
	var disk syscall.Stat_t
	if err := syscall.Stat(w.c.State(), &disk); err != nil {
		w.t.Fatal(err)
	}
	limit := fmt.Sprintf("%d:%d ", unix.Major(disk.Dev), unix.Minor(disk.Dev))
	if w.group().V1["blkio"] == "" {
		limit += v2 + "="
	}
	w.limit("blkio", "blkio.throttle."+v1+"_device", "io.max", limit+fmt.Sprint(bytes))
}

// TestAStarvingJobSleepsAndComesBack: by the usual policy it is checkpointed and
// suspended, and runs on when its node is well again, with nothing lost.
func TestAStarvingJobSleepsAndComesBack(t *testing.T) {
	p := onOwn(t, built.bin, nil, "--cloud", "east=1", "--cpus", "8", "--mem", "2G", "--on-starvation", "suspend")
	job := p.submit("--starvation-period", watchedEvery.String(), "--",
		"taskset", "-c", "0", "sh", "-c", "n=0; while :; do n=$((n+1)); i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo $n; done")
	p.waitLines(job, 10)
	off := hogs(t)
	t.Cleanup(off)
	p.waitFor(job, api.PhaseSuspended)
	off()
	detail := p.inspect(job)
	if !detail.Queued || !strings.Contains(detail.Reason, "CPU") {
		t.Errorf("it is suspended, queued %v: %q, expected it to wait for room and to say why", detail.Queued, detail.Reason)
	}
	list := decode[[]api.Checkpoint](p, "checkpoints", job)
	if len(list) != 1 || list[0].Trigger != api.TriggerStarvation || list[0].State != api.CheckpointDurable {
		t.Errorf("want one durable checkpoint for starvation, got %+v", list)
	}
	before := p.lines(job)
	p.waitFor(job, api.PhaseRunning)
	p.waitLines(job, before+5)
	p.run("kill", job)
	counts(t, p.output(job))
}

// TestAnUnhealthyJobIsRecovered: from its newest checkpoint, in which it was well,
// by either kind of health check.
func TestAnUnhealthyJobIsRecovered(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	quick := []string{"--health-period", "500ms", "--health-timeout", "2s", "--health-retries", "2", "--max-restarts", "3"}
	for _, test := range []struct {
		name    string
		flags   []string
		command []string
		harm    []string
		says    string
	}{
		{"by command", []string{"--health-cmd", "test -e /tmp/well || { echo it hurts; exit 7; }"},
			[]string{"sh", "-c", "touch /tmp/well; n=0; while :; do n=$((n+1)); echo $n; sleep 0.1; done"},
			[]string{"rm", "/tmp/well"}, "exit status 7: it hurts"},
		{"by HTTP", []string{"--health-http", ":8000/well", "--health-start-delay", "60s"},
			[]string{"sh", "-c", "mkdir /srv/w; cd /srv/w; touch well; python3 -m http.server 8000 & n=0; while :; do n=$((n+1)); echo $n; sleep 0.1; done"},
			[]string{"rm", "/srv/w/well"}, "404"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := &platform{t: t, c: p.c}
			job := p.submit(slices.Concat(quick, test.flags, []string{"--"}, test.command)...)
			p.waitLines(job, 20) // its health has been asked by then
			c := p.checkpoint(job)
			p.run(slices.Concat([]string{"exec", job, "--"}, test.harm)...)
			p.until(job, "it was recovered", func() bool { d := p.inspect(job); return d.Restarts == 1 && d.Phase == api.PhaseRunning })
			detail := p.inspect(job)
			if n := len(detail.Incidents); n != 1 || detail.Incidents[0].From != c.ID || !strings.Contains(detail.Incidents[0].Reason, test.says) || detail.Incidents[0].DownMS == nil {
				t.Errorf("want one incident, recovered from %s, that says %q, got %+v", c.ID, test.says, detail.Incidents)
			}
			p.moves(job)
			p.run("kill", job)
			counts(t, p.output(job))
		})
	}
}

// TestACrashLoopEnds: a job that fails again and again is left failed, and says so.
func TestACrashLoopEnds(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit("--max-restarts", "10", "--", "sh", "-c", "echo begins; exit 7")
	p.waitFor(job, api.PhaseFailed)
	detail := p.inspect(job)
	if detail.ExitCode == nil || *detail.ExitCode != 7 || !strings.Contains(detail.Reason, "crash loop") {
		t.Errorf("it ended with %v: %s; expected status 7 and a crash loop", detail.ExitCode, detail.Reason)
	}
	if n := len(detail.Incidents); n < 2 || n > 10 {
		t.Errorf("want several incidents, and not ten attempts, got %+v", detail.Incidents)
	}
}
