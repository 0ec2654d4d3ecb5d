//go:build nightly

package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"dormouse/api"
)

// Chaos: jobs of all kinds on twelve machines, which lose their power, are cut
// off, slowed, hang and are healed at random, and so does the controller. The
// seed, which is logged, decides what is done to whom and when:
// DORMOUSE_E2E_SEED repeats it, as far as time repeats itself.

const (
	chaosMachines = 12
	chaosHarmed   = 3 // machines at a time
	chaosLease    = 4 * time.Second
	chaosUsual    = 20 * time.Minute
)

// harm is something done to a machine, which can be undone.
type harm struct {
	name     string
	do, undo func(*machine)
}

func (s *site) harms() []harm {
	slowed := slowed{}
	return []harm{
		{"loses its power", s.powerOff, s.powerOn},
		{"is cut off", s.cut, s.heal},
		{"is slowed", func(m *machine) { s.slow(m, slowed) }, func(m *machine) { s.quicken(m, slowed) }},
		{"has an agent that hangs", s.hang, s.unhang},
		{"has an agent that dies", func(m *machine) { m.agent.Process.Kill(); <-m.ended }, s.startAgent},
	}
}

// slowed are the quotas that tasks had before they were slowed, by machine and file.
type slowed map[*machine]map[string]string

// chaosJob is a job and what must have come of it.
type chaosJob struct {
	id    string
	steps int
	prog  parallel // of several tasks
	seen  string   // the file in which all copies of a single task write what they do
}

func TestChaos(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("DORMOUSE_E2E_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d", seed)
	random, long := rand.New(rand.NewPCG(seed, 0)), lasts(t, chaosUsual)
	s := newSite(t, 4, chaosMachines, chaosLease, api.StarvationSuspend)
	s.revive = s.startController
	jobs := s.submitForChaos(random, long)
	began := time.Now()
	s.wreak(random, began.Add(long))
	s.awaitAll(jobs, time.Now().Add(2*long))
	t.Logf("all have ended after %s", time.Since(began).Round(time.Second))
	for _, j := range jobs {
		s.mustBeRight(j)
	}
	s.run("verify")
	s.nothingRuns()
}

// submitForChaos submits thirty jobs, each of which works for a part of the time.
func (s *site) submitForChaos(random *rand.Rand, long time.Duration) []*chaosJob {
	s.t.Helper()
	var jobs []*chaosJob
	usual := func(pace time.Duration) (steps int, flags []string) {
		work := time.Duration((0.2 + 0.5*random.Float64()) * float64(long))
		return int(work / pace), []string{
			"--priority", strconv.Itoa(random.IntN(3)), "--cpus", "0.7", "--mem", "128M",
			"--checkpoint-every", "30s", "--keep", "3", "--max-restarts", "1000", "--env", "MARK=" + s.dir,
		}
	}
	for i := range 20 {
		steps, flags := usual(250 * time.Millisecond)
		j := &chaosJob{steps: steps, seen: filepath.Join(s.dir, fmt.Sprintf("shared%d", i), "seen")}
		s.must(os.Mkdir(filepath.Dir(j.seen), 0o777))
		flags = append(flags, "--volume", filepath.Dir(j.seen)+":/shared", "--")
		j.id = s.submit(append(flags, "sh", "-c", strings.Replace(fmt.Sprintf(witness, strconv.Itoa(steps)), "sleep 0.1", "sleep 0.25", 1))...)
		jobs = append(jobs, j)
	}
	for i := range 10 {
		steps, flags := usual(200 * time.Millisecond)
		j := &chaosJob{steps: steps}
		if i < 6 {
			j.prog = parallel{tasks: 2 + i%2, steps: 2, command: []string{"python3", program("pair.py"), strconv.Itoa(steps), "200"}}
		} else {
			j.prog = parallel{tasks: 2, mpi: openMPI, steps: 3,
				command: []string{openMPI, program("stencil" + suffix[openMPI]), "64", strconv.Itoa(steps), "10", "200", stopFile}}
		}
		flags = append(flags, "--tasks", strconv.Itoa(j.prog.tasks), "--")
		j.id = s.submit(append(flags, j.prog.command...)...)
		jobs = append(jobs, j)
	}
	return jobs
}

// wreak does harm and heals until the time has come, and heals all then.
func (s *site) wreak(random *rand.Rand, end time.Time) {
	s.t.Helper()
	type patient struct {
		m    *machine
		harm harm
		heal time.Time
	}
	var ill []patient
	harms := s.harms()
	counted := map[string]int{}
	for time.Now().Before(end) {
		time.Sleep(time.Duration(1+random.IntN(5)) * time.Second)
		m, h := s.machines[random.IntN(len(s.machines))], harms[random.IntN(len(harms))]
		lasting := time.Duration(1+random.IntN(20)) * time.Second
		ill = slices.DeleteFunc(ill, func(p patient) bool {
			if time.Now().Before(p.heal) {
				return false
			}
			p.harm.undo(p.m)
			return true
		})
		if random.IntN(30) == 0 {
			counted["the controller is killed"]++
			s.c.Up().Kill()
			<-s.c.Exited()
			s.startController()
		}
		if len(ill) == chaosHarmed || slices.ContainsFunc(ill, func(p patient) bool { return p.m == m }) {
			continue
		}
		counted[h.name]++
		h.do(m)
		ill = append(ill, patient{m, h, time.Now().Add(lasting)})
	}
	for _, p := range ill {
		p.harm.undo(p.m)
	}
	s.t.Logf("done: %v", counted)
}

// powerOff ends all that runs on a machine, and its network.
func (s *site) powerOff(m *machine) {
	s.t.Helper()
	m.agent.Process.Kill()
	s.must(m.clear())
	<-m.ended
	s.must(netlink.LinkDel(m.cable))
	m.anchor.Process.Kill()
	m.anchor.Wait()
}

// slow leaves each task of a machine a tenth of its processor time.
func (s *site) slow(m *machine, before slowed) {
	s.t.Helper()
	before[m] = map[string]string{}
	for _, top := range m.cgroups() {
		filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.Name() != "cpu.cfs_quota_us" && entry.Name() != "cpu.max" {
				return nil
			}
			text, _ := os.ReadFile(path) // it may be gone already
			quota, period, _ := strings.Cut(strings.TrimSpace(string(text)), " ")
			if n, err := strconv.Atoi(quota); err == nil && n > 0 { // a task's own, not that of those above
				before[m][path] = string(text)
				s.writeThere(path, strings.TrimSpace(fmt.Sprintf("%d %s", max(1000, n/10), period)))
			}
			return nil
		})
	}
}

func (s *site) quicken(m *machine, before slowed) {
	s.t.Helper()
	for path, quota := range before[m] {
		s.writeThere(path, quota)
	}
}

// writeThere writes to a file of a cgroup that may be gone.
func (s *site) writeThere(path, value string) {
	s.t.Helper()
	if err := os.WriteFile(path, []byte(value), 0); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENODEV) && !errors.Is(err, fs.ErrPermission) {
		s.t.Fatal(err)
	}
}

// awaitAll waits until all jobs have completed.
func (s *site) awaitAll(jobs []*chaosJob, deadline time.Time) {
	s.t.Helper()
	for _, j := range jobs {
		for {
			phase := s.inspect(j.id).Phase
			if phase == api.PhaseCompleted {
				break
			}
			if phase.Final() || time.Now().After(deadline) {
				s.report(j.id)
				s.t.Errorf("job %s is %s, want it to be completed", j.id, s.phase(j.id))
				break
			}
			s.try("wait", j.id, "--for", string(api.PhaseCompleted), "--timeout", "30s")
		}
	}
}

// mustBeRight checks the output of a job, and that never two copies of it ran.
func (s *site) mustBeRight(j *chaosJob) {
	s.t.Helper()
	detail := s.inspect(j.id)
	s.t.Logf("%s: %d steps, %d tasks, %d restarts", j.id, j.steps, detail.Tasks, detail.Restarts)
	s.onlyWholeCheckpoints(j.id)
	if j.seen == "" {
		s.parallelMustBeRight(j)
		return
	}
	output := s.output(j.id)
	counts(s.t, output)
	if got := strings.Count(output, "\n"); got != j.steps {
		s.t.Errorf("job %s has written %d lines, want %d", j.id, got, j.steps)
	}
	text, err := os.ReadFile(j.seen)
	s.must(err)
	last := 0
	for i, word := range strings.Fields(string(text)) {
		n, err := strconv.Atoi(word)
		s.must(err)
		// A copy goes on where the last one was, or from a checkpoint before it.
		if n > last+1 {
			s.t.Errorf("job %s: step %d, the %dth taken, comes after step %d: another copy was there meanwhile", j.id, n, i+1, last)
		}
		last = n
	}
	if last != j.steps {
		s.t.Errorf("job %s: the last step taken is %d, want %d", j.id, last, j.steps)
	}
}

func (s *site) parallelMustBeRight(j *chaosJob) {
	s.t.Helper()
	got := make([]string, j.prog.tasks)
	for task := range got {
		got[task] = s.outputOf(j.id, task)
	}
	for task, want := range j.prog.undisturbed(s.t, got) {
		if got[task] != want {
			s.t.Errorf("job %s, task %d:", j.id, task)
			sameOutput(s.t, got[task], want)
		}
	}
	last := j.prog.tasks - 1
	if j.prog.mpi != "" {
		last = 0
	}
	if stepsOf(got[last]) != j.steps {
		s.t.Errorf("job %s has not taken %d steps", j.id, j.steps)
	}
}

// nothingRuns checks that no machine has anything of a job that is over.
func (s *site) nothingRuns() {
	s.t.Helper()
	left := s.remains()
	for end := time.Now().Add(patience); len(left) > 0 && time.Now().Before(end); left = s.remains() {
		time.Sleep(time.Second)
	}
	if len(left) > 0 {
		s.t.Errorf("all jobs are over, and there is left: %s", strings.Join(left, "; "))
	}
}

func (s *site) remains() (left []string) {
	s.t.Helper()
	environments, _ := filepath.Glob("/proc/[0-9]*/environ") // the pattern is well-formed
	for _, file := range environments {
		if text, err := os.ReadFile(file); err == nil && strings.Contains("\x00"+string(text), "\x00MARK="+s.dir+"\x00") {
			left = append(left, "the process "+filepath.Base(filepath.Dir(file)))
		}
	}
	for _, m := range s.machines {
		for _, top := range m.cgroups() {
			groups, _ := filepath.Glob(filepath.Join(top, "jobs", "*")) // as above
			for _, group := range groups {
				if info, err := os.Stat(group); err == nil && info.IsDir() {
					left = append(left, group)
				}
			}
		}
		left = append(left, m.devices(s)...)
	}
	return left
}

// devices are those of the machine that are not its own.
func (m *machine) devices(s *site) (more []string) {
	s.t.Helper()
	namespace, err := netns.GetFromPid(m.anchor.Process.Pid)
	s.must(err)
	defer namespace.Close()
	inside, err := netlink.NewHandleAt(namespace)
	s.must(err)
	defer inside.Close()
	links, err := inside.LinkList()
	s.must(err)
	for _, link := range links {
		if name := link.Attrs().Name; name != "lo" && name != "eth0" {
			more = append(more, m.name+" has the device "+name)
		}
	}
	return more
}
