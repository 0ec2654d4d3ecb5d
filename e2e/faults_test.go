package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"dormouse/api"
)

// distributedSteps are the steps of the operations on a job of several tasks.
var distributedSteps = map[api.OperationKind]string{
	api.OpStart:      "network connect start",
	api.OpCheckpoint: "preflight freeze capture open thaw upload publish published discard retention",
	api.OpSuspend:    "preflight freeze capture upload publish published destroy retention",
	api.OpResume:     "look place network connect restore open release",
	api.OpRestart:    "look stop place network connect restore open release",
}

// talkers is what the fault tests disturb: three tasks in which nothing may be
// lost, repeated or changed on the way.
func talkers() parallel { return tasksOf(3, "clients and a server", "pair.py") }

// faulty starts an `up` whose processes act at the named step, with three nodes
// more than talkers need.
func faulty(t *testing.T, name, action string) (p *platform, once string) {
	t.Helper()
	if unavailable != "" {
		t.Skip(unavailable)
	}
	p, dir := &platform{t: t}, directory(t)
	once = filepath.Join(dir, "once")
	if action == "pause" {
		action += ":" + once
	}
	env := []string{"DORMOUSE_FAILPOINT=" + name + "=" + action, "DORMOUSE_FAILPOINT_ONCE=" + once}
	args := []string{"--cloud", "east=3", "--cloud", "west=3", "--cpus", "1", "--mem", "1G", "--listen", freeAddress()}
	p.start(built.killable, dir, env, args...)
	p.revive = func() { p.start(built.killable, dir, env, args...) }
	return p, once
}

func TestAgentKilledAtEveryStepOfAParallelJob(t *testing.T) {
	for _, name := range failpoints(t, "../agent", "../agent/network") {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			parallelKilledAt(t, name)
		})
	}
}

func TestControllerKilledAtEveryStepOfAParallelJob(t *testing.T) {
	for kind, steps := range distributedSteps {
		for _, step := range strings.Fields(steps) {
			t.Run(string(kind)+" "+step, func(t *testing.T) {
				t.Parallel()
				parallelKilledAt(t, "controller."+string(kind)+"."+step)
			})
		}
	}
}

// parallelKilledAt is killedAt for a job that spans nodes.
func parallelKilledAt(t *testing.T, name string) {
	p, once := faulty(t, name, "kill")
	t.Cleanup(func() {
		if _, err := os.Stat(once); err != nil {
			t.Errorf("the step %s was never reached", name)
		}
	})
	prog := talkers()
	job := p.submitDespite(slices.Concat([]string{"--tasks", strconv.Itoa(prog.tasks), "--mem", "64M", "--env", "MARK=" + once}, untilAsked, []string{"--"}, prog.command)...)
	p.waitLines(job, 5)
	p.despite(job, api.PhaseRunning, "checkpoint", job)
	p.moves(job)
	p.despite(job, api.PhaseRunning, "restart", job, "--cloud", p.otherCloud(job))
	p.eachOnce(job, prog, once)
	p.moves(job)
	p.despite(job, api.PhaseSuspended, "suspend", job)
	p.despite(job, api.PhaseRunning, "resume", job)
	p.eachOnce(job, prog, once)
	p.ends(job, prog)
	p.onlyWholeCheckpoints(job)
	p.run("verify")
}

// eachOnce checks that the program of every task is there, once.
func (p *platform) eachOnce(job string, prog parallel, mark string) {
	p.t.Helper()
	count := make([]int, prog.tasks)
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, process := range processes {
		environment, err := os.ReadFile(filepath.Join(process, "environ"))
		command, _ := os.ReadFile(filepath.Join(process, "cmdline"))
		if err != nil || !strings.Contains("\x00"+string(environment), "\x00MARK="+mark+"\x00") || !strings.HasPrefix(string(command), "python") {
			continue
		}
		for i := range count {
			if strings.Contains("\x00"+string(environment), "\x00DORMOUSE_TASK="+strconv.Itoa(i)+"\x00") {
				count[i]++
			}
		}
	}
	for i, n := range count {
		if n != 1 {
			p.t.Errorf("the program of task %d of job %s runs %d times, expected once", i, job, n)
		}
	}
}

// onlyWholeCheckpoints checks that no half-made checkpoint is left.
func (p *platform) onlyWholeCheckpoints(job string) {
	p.t.Helper()
	for _, c := range decode[[]api.Checkpoint](p, "checkpoints", job) {
		if c.State != api.CheckpointDurable && c.State != api.CheckpointFailed {
			p.t.Errorf("checkpoint %s is %s", c.ID, c.State)
		}
		if c.State == api.CheckpointDurable && c.Tasks != p.inspect(job).Tasks {
			p.t.Errorf("checkpoint %s is durable and has %d of %d tasks", c.ID, c.Tasks, p.inspect(job).Tasks)
		}
	}
}

// TestNodeLostAtEveryStepOfACheckpoint: one of the job's nodes loses its power
// while the controller is at the step; the job recovers from its last durable
// checkpoint by itself, and nothing of the half-made one is left.
func TestNodeLostAtEveryStepOfACheckpoint(t *testing.T) {
	for _, kind := range []api.OperationKind{api.OpCheckpoint, api.OpSuspend} {
		for _, step := range strings.Fields(distributedSteps[kind]) {
			t.Run(string(kind)+" "+step, func(t *testing.T) {
				t.Parallel()
				p, paused := faulty(t, "controller."+string(kind)+"."+step, "pause")
				prog := talkers()
				job := p.submitParallel(prog, "--max-restarts", "3", "--mem", "64M")
				p.waitLines(job, 5)
				if kind == api.OpCheckpoint {
					p.whilePaused(paused, func() {}, "checkpoint", job)
				} else {
					p.run("checkpoint", job)
				}
				p.moves(job)
				victim := p.placement(job)[1]
				got := p.whilePaused(paused, func() { p.run("node", "kill", victim) }, string(kind), job)
				t.Logf("%s: exit status %d: %s%s", kind, got.status, got.stdout, got.stderr)
				p.settledAfterLoss(job)
				if detail := p.inspect(job); detail.Phase == api.PhaseSuspended {
					p.run("resume", job) // it was captured in time
				}
				p.waitFor(job, api.PhaseRunning)
				for _, node := range p.placement(job) {
					if node == victim {
						t.Errorf("the job is on %s, which has no power", victim)
					}
				}
				p.moves(job)
				p.ends(job, prog)
				p.onlyWholeCheckpoints(job)
				p.run("verify")
			})
		}
	}
}

// TestNodeLostAtEveryStepOfARestore: a node that the job is being restored on
// loses its power; the job is restored elsewhere, at once or at the next try.
func TestNodeLostAtEveryStepOfARestore(t *testing.T) {
	for _, step := range strings.Fields(distributedSteps[api.OpRestart])[2:] {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			p, paused := faulty(t, "controller.restart."+step, "pause")
			prog := talkers()
			job := p.submitParallel(prog, "--mem", "64M")
			p.waitLines(job, 5)
			p.run("checkpoint", job)
			p.moves(job)
			got := p.whilePaused(paused, func() {
				if nodes := p.placement(job); nodes[1] != "" {
					p.run("node", "kill", nodes[1])
				}
			}, "restart", job)
			t.Logf("restart: exit status %d: %s%s", got.status, got.stdout, got.stderr)
			p.settled(job)
			if p.inspect(job).Phase != api.PhaseRunning {
				p.whilePaused(paused, func() {}, "restart", job)
			}
			p.waitFor(job, api.PhaseRunning)
			p.moves(job)
			p.ends(job, prog)
			p.onlyWholeCheckpoints(job)
		})
	}
}

// whilePaused runs a command, does something when the controller has come to
// the step at which it pauses, lets it go on, and returns how the command ended.
func (p *platform) whilePaused(file string, do func(), args ...string) outcome {
	p.t.Helper()
	ended := make(chan outcome, 1)
	go func() { ended <- p.try(args...) }()
	done := false
	for limit := time.Now().Add(patience); ; {
		select {
		case got := <-ended:
			if !done {
				p.t.Errorf("dormouse %s ended with status %d without coming to the step: %s", strings.Join(args, " "), got.status, got.stderr)
			}
			return got
		case <-time.After(10 * time.Millisecond):
		}
		if _, err := os.Stat(file); err == nil {
			if !done {
				done = true
				do()
			}
			os.Remove(file)
		}
		if time.Now().After(limit) {
			p.t.Fatalf("dormouse %s did not end; operations:\n%s", strings.Join(args, " "), p.try("operations").stdout)
		}
	}
}

// settledAfterLoss waits until a job that recovers by itself has come to rest:
// it may still be running, in name, when its node is already lost.
func (p *platform) settledAfterLoss(job string) {
	p.t.Helper()
	p.until(job, "it has noticed the loss", func() bool {
		detail := p.inspect(job)
		return detail.Restarts > 0 && detail.Operation == "" || detail.Phase == api.PhaseSuspended
	})
	p.settled(job)
}

// TestAStragglerIsNamed: while one node does not answer, the operation says
// which task on which node it waits for; when it does, all goes on.
func TestAStragglerIsNamed(t *testing.T) {
	t.Parallel()
	p := onOwn(t, built.bin, nil, "--cloud", "east=3", "--cpus", "1", "--mem", "1G")
	prog := talkers()
	job := p.submitParallel(prog, "--mem", "64M")
	p.waitLines(job, 5)
	slow := p.placement(job)[2]
	agent := 0
	for _, node := range decode[[]api.Node](p, "nodes") {
		if node.Name == slow {
			agent = node.AgentPid
		}
	}
	if err := syscall.Kill(agent, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resumed := false
	goOn := func() {
		if !resumed {
			resumed = true
			syscall.Kill(agent, syscall.SIGCONT)
		}
	}
	defer goOn()
	p.run("checkpoint", job, "--detach")
	p.until(job, "the operation names task 2 and its node", func() bool {
		for _, operation := range decode[[]api.Operation](p, "operations") {
			if operation.Kind == api.OpCheckpoint && strings.Contains(operation.Message, "task 2") && strings.Contains(operation.Message, slow) {
				t.Log(operation.Message)
				return true
			}
		}
		return false
	})
	goOn()
	p.until(job, "the checkpoint is durable", func() bool {
		all := decode[[]api.Checkpoint](p, "checkpoints", job)
		return len(all) == 1 && all[0].State == api.CheckpointDurable
	})
	p.ends(job, prog)
}

// TestStepsOfEveryTaskAreShown: what each task's part of a checkpoint took.
func TestStepsOfEveryTaskAreShown(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit(everyTask...)
	p.waitLines(job, 6)
	c := p.checkpoint(job)
	if c.Tasks != 3 || len(c.Steps) != 3 {
		t.Fatalf("the checkpoint has %d tasks and steps %+v, expected three of each", c.Tasks, c.Steps)
	}
	on := p.placement(job)
	for i, step := range c.Steps {
		if step.Task != i || step.Node != on[i] || step.DumpMS <= 0 || step.SizeBytes <= 0 || step.PauseMS <= 0 {
			t.Errorf("task %d on %s has the steps %+v", i, on[i], step)
		}
		if step.PauseMS > c.PauseMS+1 {
			t.Errorf("task %d stood still for %.1f ms, the job for %.1f", i, step.PauseMS, c.PauseMS)
		}
	}
	if text := p.run("inspect", job); !strings.Contains(text, "task") || !strings.Contains(text, c.ID) {
		t.Errorf("inspect shows nothing of the checkpoint's steps:\n%s", text)
	}
}
