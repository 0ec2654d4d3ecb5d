package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"dormouse/api"
)

// failpoints reads the names of all instants at which an agent can be killed
// from the code itself, so that none is forgotten.
func failpoints(t *testing.T, folders ...string) []string {
	t.Helper()
	var names []string
	call := regexp.MustCompile(`failpoint\.Hit\("([^"]+)"\)`)
	for _, folder := range folders {
		sources, err := filepath.Glob(folder + "/*.go")
		if err != nil {
			t.Fatal(err)
		}
		for _, source := range sources {
			text, err := os.ReadFile(source)
			if err != nil {
				t.Fatal(err)
			}
			for _, match := range call.FindAllStringSubmatch(string(text), -1) {
				if !slices.Contains(names, match[1]) && !elsewhere.MatchString(match[1]) {
					names = append(names, match[1])
				}
			}
		}
	}
	if len(names) == 0 {
		t.Fatal("the agent has no failpoint: the test looks in the wrong place")
	}
	return names
}

// elsewhere are the instants that the agent's own tests come to: those of
// restores on nodes whose kernel has no FUSE, and those of certificates that
// grow old.
var elsewhere = regexp.MustCompile(`^agent\.(restore\.images$|renew\.)`)

// severally are the instants that only a job of several tasks comes to.
var severally = regexp.MustCompile(`^agent\.(open|release)\.`)

func TestAgentKilledAtEveryStep(t *testing.T) {
	for _, name := range failpoints(t, "../agent") {
		if severally.MatchString(name) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			killedAt(t, name)
		})
	}
}

// controllerSteps are the steps of the operations in the life that killedAt
// leads. The controller has a failpoint at each, after the step was written to
// the store and before it is taken.
var controllerSteps = map[api.OperationKind]string{
	api.OpStart:      "network start",
	api.OpCheckpoint: "preflight freeze capture thaw upload publish published discard retention",
	api.OpSuspend:    "preflight freeze capture upload publish published destroy retention",
	api.OpResume:     "look place network restore",
	api.OpRestart:    "look stop place network restore",
	api.OpKill:       "signal grace destroy",
	api.OpVerify:     "verify",
}

func TestControllerKilledAtEveryStep(t *testing.T) {
	for kind, steps := range controllerSteps {
		for _, step := range strings.Fields(steps) {
			t.Run(string(kind)+" "+step, func(t *testing.T) {
				t.Parallel()
				killedAt(t, "controller."+string(kind)+"."+step)
			})
		}
	}
}

// killedAt takes a job through every operation of its life while one process
// ends itself, once, at the named step. Whatever a command answers then, the job
// must be neither lost nor doubled, and its output must be that of an undisturbed run.
func killedAt(t *testing.T, name string) {
	if unavailable != "" {
		t.Skip(unavailable)
	}
	p, dir := &platform{t: t}, directory(t)
	once := filepath.Join(dir, "once")
	env := []string{"DORMOUSE_FAILPOINT=" + name + "=kill", "DORMOUSE_FAILPOINT_ONCE=" + once}
	args := []string{"--cloud", "east=1", "--cloud", "west=1", "--cpus", "8", "--mem", "4G", "--listen", freeAddress()}
	p.start(built.killable, dir, env, args...)
	p.revive = func() { p.start(built.killable, dir, env, args...) }
	t.Cleanup(func() {
		if _, err := os.Stat(once); err != nil {
			t.Errorf("the step %s was never reached", name)
		}
	})

	tree := script("python3", "tree.py")
	job := p.submitDespite(slices.Concat([]string{"--mem", "64M", "--env", "MARK=" + dir}, untilAsked, []string{"--"}, tree(forever, pace))...)
	p.waitLines(job, 5)
	p.despite(job, api.PhaseRunning, "checkpoint", job)
	seen := []string{p.output(job)}
	p.despite(job, api.PhaseRunning, "restart", job, "--cloud", p.otherCloud(job))
	seen = append(seen, p.output(job))
	p.alone(job, dir)
	p.moves(job)
	p.despite(job, api.PhaseSuspended, "suspend", job)
	p.despite(job, api.PhaseRunning, "resume", job)
	p.alone(job, dir)
	p.endsAsSeen(job, tree, seen...)
	p.run("verify")
	p.run("restart", job) // so that there is something to kill
	p.try("kill", job)
	p.settled(job)
	p.run("rm", job)
}

// freePort is the last port that freeAddress gave. They lie below those that the
// kernel gives (ip_local_port_range), so that nobody takes one while `up` is down:
// the tests have a network of their own.
var freePort atomic.Int32

// freeAddress returns an address that stays the same when `up` is started again.
func freeAddress() string {
	const first = 20000
	return fmt.Sprintf("127.0.0.1:%d", first+freePort.Add(1))
}

// submitDespite submits one job, once, though the controller may die of it.
func (p *platform) submitDespite(args ...string) string {
	p.t.Helper()
	got := p.try(append([]string{"submit"}, args...)...)
	jobs := decode[[]api.Job](p, "ps", "--all")
	if len(jobs) > 1 {
		p.t.Fatalf("there are %d jobs, one was submitted (exit status %d: %s%s): %+v", len(jobs), got.status, got.stdout, got.stderr, jobs)
	}
	if len(jobs) == 0 { // the controller died before it had promised anything
		p.t.Logf("submit: %s", strings.TrimSpace(got.stderr))
		return p.submit(args...)
	}
	job := jobs[0].ID
	p.t.Cleanup(func() {
		if p.t.Failed() {
			p.report(job)
		}
	})
	p.settled(job)
	return job
}

// despite runs an operation that may be hit; it must succeed at the first try
// or leave everything such that the second one does.
func (p *platform) despite(job string, phase api.Phase, args ...string) {
	p.t.Helper()
	got := p.try(args...)
	p.settled(job)
	if got.status != 0 {
		p.t.Logf("%s: %s", strings.Join(args, " "), strings.TrimSpace(got.stderr))
		now := p.inspect(job).Phase
		if now.Final() && args[0] != "restart" && args[0] != "resume" {
			p.t.Fatalf("a %s that was hit has ended the job: %s", args[0], p.phase(job))
		}
		if now != phase || args[0] == "checkpoint" {
			p.run(args...)
		}
	}
	p.waitFor(job, phase)
}

// settled waits until no operation is under way.
func (p *platform) settled(job string) {
	p.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		if detail := p.inspect(job); detail.Operation == "" && settledPhase(detail.Phase) {
			return
		}
		if time.Now().After(end) {
			p.t.Fatalf("job %s did not come to rest: %s; operations:\n%s", job, p.phase(job), p.try("operations").stdout)
		}
	}
}

func settledPhase(phase api.Phase) bool {
	return phase.Final() || phase == api.PhaseRunning || phase == api.PhaseSuspended
}

// alone checks that the job runs once: its program, a parent of four, is there
// no second time.
func (p *platform) alone(job, mark string) {
	p.t.Helper()
	environments, _ := filepath.Glob("/proc/[0-9]*/environ")
	parents := 0
	for _, path := range environments {
		text, err := os.ReadFile(path)
		if err != nil || !strings.Contains("\x00"+string(text), "\x00MARK="+mark+"\x00") {
			continue
		}
		children, err := os.ReadFile(filepath.Join(filepath.Dir(path), "task", filepath.Base(filepath.Dir(path)), "children"))
		if err == nil && len(strings.Fields(string(children))) == 4 {
			parents++
		}
	}
	if parents != 1 {
		p.t.Errorf("the program of job %s runs %d times, expected once", job, parents)
	}
}

// TestJobsSurviveTheAgentsRestart: the agent is killed while nothing happens to
// the job, which must not notice, and the new agent must find it again.
func TestJobsSurviveTheAgentsRestart(t *testing.T) {
	p := onOwn(t, built.bin, nil, "--cloud", "east=1")
	job := p.submit(append([]string{"--mem", "64M"}, counter...)...)
	p.waitLines(job, 5)
	pid := p.inspect(job).TaskStatus[0].Pid
	for range 3 {
		agent := decode[[]api.Node](p, "nodes")[0].AgentPid
		if err := syscall.Kill(agent, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		p.until(job, "a new agent is ready", func() bool {
			node := decode[[]api.Node](p, "nodes")[0]
			return node.AgentPid != agent && node.AgentPid != 0 && node.State == api.NodeReady
		})
		p.moves(job)
	}
	if now := p.inspect(job).TaskStatus[0].Pid; now != pid {
		t.Errorf("the task's pid 1 was %d and is %d: it was started anew", pid, now)
	}
	p.checkpoint(job)
	p.run("restart", job)
	p.moves(job)
	counts(t, p.output(job))
}

// TestUpKilledAndStartedAgainAdoptsItsNodes: kill -9 of `up` leaves agents and
// jobs alone; the next one with the same state takes them over.
func TestUpKilledAndStartedAgainAdoptsItsNodes(t *testing.T) {
	if unavailable != "" {
		t.Skip(unavailable)
	}
	p, dir := &platform{t: t}, directory(t)
	args := []string{"--cloud", "east=1", "--cloud", "west=1"}
	p.start(built.bin, dir, nil, args...)
	job := p.submit(append([]string{"--mem", "64M"}, counter...)...)
	p.waitLines(job, 5)
	p.checkpoint(job)
	lines, pid, agents := p.lines(job), p.inspect(job).TaskStatus[0].Pid, agentPids(p)
	if err := p.c.Up().Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.c.Exited()
	p.start(built.bin, dir, nil, args...)
	p.waitLines(job, lines+5)
	if now := p.inspect(job).TaskStatus[0].Pid; now != pid {
		t.Errorf("the task's pid 1 was %d and is %d: it was started anew", pid, now)
	}
	if now := agentPids(p); !slices.Equal(now, agents) {
		t.Errorf("the agents were %v and are %v", agents, now)
	}
	p.run("restart", job, "--cloud", p.otherCloud(job))
	p.moves(job)
	counts(t, p.output(job))
}

func agentPids(p *platform) []string {
	p.t.Helper()
	var pids []string
	for _, node := range decode[[]api.Node](p, "nodes") {
		pids = append(pids, node.Name+" "+strconv.Itoa(node.AgentPid))
	}
	slices.Sort(pids)
	return pids
}

// TestCRIUKilledDuringARestore at several instants: the restart fails or is
// taken again, nothing of the half-made tree stays, and the job can be restored.
func TestCRIUKilledDuringARestore(t *testing.T) {
	p := onOwn(t, built.bin, nil, "--cloud", "east=1", "--mem", "8G", "--cpus", "8")
	job := p.submit("--mem", "1G", "--env", "MARK="+p.c.State(), "--", program("memory"), "300", "2", "1000000", "10")
	p.waitLines(job, 3)
	c := p.checkpoint(job)
	for _, after := range []time.Duration{0, 10 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond} {
		ended, killed := make(chan struct{}), make(chan bool, 1)
		go func() { killed <- killCRIU(p.c.Up().Pid, after, ended) }()
		got := p.try("restart", job, "--from", c.ID)
		close(ended)
		if hit := <-killed; hit && got.status != 0 {
			t.Logf("killed after %v: %s", after, strings.TrimSpace(got.stderr))
		} else if !hit && got.status != 0 {
			t.Fatalf("restart failed though nothing was killed: %s", got.stderr)
		}
		if detail := p.inspect(job); got.status != 0 && !detail.Phase.Final() && detail.Phase != api.PhaseSuspended {
			t.Errorf("after a restart that failed the job is %s", p.phase(job))
		}
		if n := marked("MARK=" + p.c.State()); got.status != 0 && n > 0 {
			t.Errorf("after a restart that failed %d processes of the job are there", n)
		}
	}
	p.run("restart", job, "--from", c.ID)
	p.moves(job)
}

// marked counts processes that have the variable in their environment.
func marked(variable string) int {
	count := 0
	environments, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range environments {
		text, err := os.ReadFile(path)
		if err == nil && strings.Contains("\x00"+string(text), fmt.Sprintf("\x00%s\x00", variable)) {
			count++
		}
	}
	return count
}
