package agent

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/api"
	"dormouse/api/agentpb"
)

// counter is a job that writes 1, 2, 3, ...
func counter() api.JobSpec {
	return api.JobSpec{
		Command: []string{"/bin/sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; echo $i > /root/last; sleep 0.02; done"},
		CPUs:    1, MemBytes: 256 << 20,
	}
}

func counted(n int) func(string) bool {
	return func(text string) bool {
		last, err := countsUp(text)
		return err == nil && last >= n
	}
}

func TestTaskRunsAndItsLogsAndExitCodeAreTrue(t *testing.T) {
	c := newController(t)
	c.addNode("east-0")
	ref := c.start("east-0", "j-hello", api.JobSpec{
		Command: []string{"/bin/sh", "-c", "echo out; echo err >&2; exit 7"}, CPUs: 1, MemBytes: 64 << 20,
	})
	if got := c.logs("east-0", ref, true); got != "out\n" {
		t.Errorf("stdout is %q", got)
	}
	c.await("the end of the task", func() bool {
		for _, e := range c.events {
			if e.GetExited() && e.GetExitCode() == 7 && e.GetPhase() == string(api.PhaseFailed) {
				return true
			}
		}
		return false
	})
	c.mustDo("east-0", ref, &agentpb.DestroyTask{KeepLogs: true})
	if got := c.logs("east-0", ref, false); got != "out\n" {
		t.Errorf("after the task was destroyed stdout is %q", got)
	}
	c.mustDo("east-0", ref, &agentpb.DestroyTask{})
	if reply := c.do("east-0", ref, &agentpb.SignalTask{Signal: 15}); !strings.Contains(reply.GetFailure().GetMessage(), "no such task") {
		t.Errorf("a command for a forgotten task was answered by %v", reply)
	}
}

func TestCheckpointRestoresOnAnotherNode(t *testing.T) {
	c := newController(t)
	c.addNode("east-0")
	ref := c.start("east-0", "j-count", counter())
	c.awaitLog("east-0", ref, "20 lines", counted(20))
	steps := c.checkpoint("east-0", ref, "c-one")
	if steps.PauseMS <= 0 || steps.SizeBytes <= 0 || steps.DumpMS <= 0 {
		t.Errorf("the steps were not measured: %+v", steps)
	}
	t.Logf("steps: %+v", steps)
	seen, err := countsUp(c.logs("east-0", ref, false))
	must(t, err)
	c.awaitLog("east-0", ref, "more lines after the thaw", counted(seen+10))
	c.mustDo("east-0", ref, &agentpb.DestroyTask{})

	c.addNode("west-0")
	again := c.restore("west-0", ref, "c-one", counter())
	text := c.awaitLog("west-0", again, "more lines after the restore", counted(seen+20))
	if _, err := countsUp(text); err != nil {
		t.Errorf("the output was broken by the restore: %v", err)
	}
	c.mustDo("west-0", again, &agentpb.DestroyTask{})
}

// A task that is captured alone goes on, and may end, before anybody asks for
// what was captured.
func TestTaskThatEndsRightAfterItWasCapturedAloneIsStored(t *testing.T) {
	c := newController(t)
	c.addNode("east-0")
	ref := c.start("east-0", "j-alone", counter())
	c.awaitLog("east-0", ref, "10 lines", counted(10))
	c.mustDo("east-0", ref, &agentpb.Preflight{Checkpoint: "c-1"})
	c.mustDo("east-0", ref, &agentpb.Freeze{Checkpoint: "c-1", Alone: true})
	last, err := countsUp(c.logs("east-0", ref, false))
	must(t, err)
	c.awaitLog("east-0", ref, "more lines", counted(last+10))
	c.mustDo("east-0", ref, &agentpb.SignalTask{Signal: int32(unix.SIGKILL)})
	c.await("the end of the task", func() bool {
		return slices.ContainsFunc(c.events, func(e *agentpb.TaskState) bool { return e.GetExited() && e.GetSignal() != "" })
	})
	c.mustDo("east-0", ref, &agentpb.Freeze{Checkpoint: "c-1", Alone: true})
	c.mustDo("east-0", ref, &agentpb.Capture{Checkpoint: "c-1"})
	c.mustDo("east-0", ref, &agentpb.Thaw{Checkpoint: "c-1"})
	if steps := c.store("east-0", ref, "c-1"); steps.PauseMS < steps.DumpMS || steps.DumpMS <= 0 {
		t.Errorf("the measures make no sense: %+v", steps)
	}
	c.mustDo("east-0", ref, &agentpb.DestroyTask{})
	again := c.restore("east-0", ref, "c-1", counter())
	c.awaitLog("east-0", again, "lines of the restored task", counted(last+10))
}

func TestSuspendedTaskGoesOnWhereItStoodStill(t *testing.T) {
	c := newController(t)
	c.addNode("east-0")
	ref := c.start("east-0", "j-sleep", counter())
	c.awaitLog("east-0", ref, "10 lines", counted(10))
	c.captureTask("east-0", ref, "c-sleep")
	frozen := c.logs("east-0", ref, false)
	if steps := c.store("east-0", ref, "c-sleep"); steps.PauseMS <= 0 {
		t.Errorf("the time from the freeze to the capture was not measured: %+v", steps)
	}
	if now := c.logs("east-0", ref, false); now != frozen {
		t.Errorf("a task that is held wrote %q", strings.TrimPrefix(now, frozen))
	}
	c.mustDo("east-0", ref, &agentpb.DestroyTask{KeepLogs: true})

	last, err := countsUp(frozen)
	must(t, err)
	again := c.restore("east-0", ref, "c-sleep", counter())
	text := c.awaitLog("east-0", again, "more lines", counted(last+5))
	if !strings.HasPrefix(text, frozen) {
		t.Errorf("the restored log does not begin with what was written before:\n%s", text)
	}
}

func TestFailedCheckpointLeavesTheTaskRunning(t *testing.T) {
	c := newController(t)
	c.addNode("east-0")
	ref := c.start("east-0", "j-abort", counter())
	c.awaitLog("east-0", ref, "10 lines", counted(10))
	c.captureTask("east-0", ref, "c-abort")
	last, err := countsUp(c.logs("east-0", ref, false))
	must(t, err)
	for range 2 { // an abort may be repeated
		c.mustDo("east-0", ref, &agentpb.Thaw{Checkpoint: "c-abort", Abort: true})
	}
	c.awaitLog("east-0", ref, "more lines", counted(last+5))
	if reply := c.do("east-0", ref, &agentpb.Upload{Checkpoint: "c-abort"}); reply.GetFailure() == nil {
		t.Error("a checkpoint that was thrown away could be stored")
	}
	c.checkpoint("east-0", ref, "c-next")
}

func TestSecondGenerationRestores(t *testing.T) {
	c := newController(t)
	c.addNode("east-0")
	c.addNode("west-0")
	ref := c.start("east-0", "j-gen", counter())
	nodes := []string{"east-0", "west-0", "east-0", "west-0"}
	for i, next := range nodes[1:] {
		id := "c-gen" + string(rune('0'+i))
		last, _ := countsUp(c.logs(nodes[i], ref, false))
		c.awaitLog(nodes[i], ref, "more lines", counted(last+10))
		c.checkpoint(nodes[i], ref, id)
		c.mustDo(nodes[i], ref, &agentpb.DestroyTask{})
		ref = c.restore(next, ref, id, counter())
	}
	last, err := countsUp(c.logs("west-0", ref, false))
	must(t, err)
	c.awaitLog("west-0", ref, "more lines", counted(last+10))
	c.mustDo("west-0", ref, &agentpb.SignalTask{Signal: 9})
	c.await("the end of the restored task", func() bool {
		for _, e := range c.events {
			if e.GetTask().GetRun() == 4 && e.GetExitCode() == 137 && e.GetSignal() == "SIGKILL" {
				return true
			}
		}
		return false
	})
}

func TestTasksOutliveTheirAgent(t *testing.T) {
	c := newController(t)
	n := c.addNode("east-0")
	ref := c.start("east-0", "j-live", counter())
	quits := c.start("east-0", "j-quit", api.JobSpec{Command: []string{"/bin/sh", "-c", "sleep 1; exit 3"}, CPUs: 1, MemBytes: 64 << 20})
	c.awaitLog("east-0", ref, "10 lines", counted(10))
	n.kill()
	time.Sleep(1500 * time.Millisecond) // until the second task has ended unseen
	n.start()
	c.mu.Lock()
	tasks := c.nodes["east-0"].hello.GetTasks()
	c.mu.Unlock()
	if len(tasks) != 2 {
		t.Fatalf("the new agent reports %v", tasks)
	}
	c.await("the exit code of the task that ended meanwhile", func() bool {
		for _, e := range c.events {
			if e.GetTask().GetJob() == quits.GetJob() && e.GetExitCode() == 3 {
				return true
			}
		}
		return false
	})
	text := c.awaitLog("east-0", ref, "lines after the restart", counted(60))
	if _, err := countsUp(text); err != nil {
		t.Error(err)
	}
	c.checkpoint("east-0", ref, "c-later")
}

func TestLapsedLeaseFreezesUntilTheControllerDecides(t *testing.T) {
	c := newController(t)
	c.lease = 700 * time.Millisecond
	n := c.addNode("east-0")
	keep := c.start("east-0", "j-keep", counter())
	drop := c.start("east-0", "j-drop", counter())
	c.awaitLog("east-0", keep, "10 lines", counted(10))
	c.change(func() { c.deaf = true })
	c.await("the agent to give up its session", func() bool { return c.nodes["east-0"] == nil })

	log := filepath.Join(n.state, "tasks", taskID(keep), "box", "upper", ".dormouse", "stdout")
	frozen, err := os.ReadFile(log)
	must(t, err)
	c.change(func() { c.destroy = []*agentpb.TaskRef{drop} })
	c.await("the agent's return", func() bool { return c.nodes["east-0"] != nil })
	c.change(func() { c.deaf = false })
	last, err := countsUp(string(frozen))
	must(t, err)
	text := c.awaitLog("east-0", keep, "more lines", counted(last+5))
	if !strings.HasPrefix(text, string(frozen)) {
		t.Error("the task ran while there was no lease")
	}
	c.await("the end of the task that is not ours any more", func() bool {
		_, err := os.Stat(filepath.Join(n.state, "tasks", taskID(drop), "box", "upper"))
		return os.IsNotExist(err)
	})
}

func TestTasksOfADeadAgentStandStillWhenTheLeaseRunsOut(t *testing.T) {
	c := newController(t)
	c.lease = 700 * time.Millisecond
	n := c.addNode("east-0")
	ref := c.start("east-0", "j-orphan", counter())
	c.awaitLog("east-0", ref, "10 lines", counted(10))
	n.kill()
	time.Sleep(2 * c.lease)
	log := filepath.Join(n.state, "tasks", taskID(ref), "box", "upper", ".dormouse", "stdout")
	frozen, err := os.ReadFile(log)
	must(t, err)
	time.Sleep(500 * time.Millisecond)
	if later, err := os.ReadFile(log); err != nil || len(later) != len(frozen) {
		t.Errorf("the task of a dead agent went on: %d bytes, then %d (%v)", len(frozen), len(later), err)
	}
	n.start()
	last, err := countsUp(string(frozen))
	must(t, err)
	text := c.awaitLog("east-0", ref, "more lines", counted(last+10))
	if !strings.HasPrefix(text, string(frozen)) {
		t.Error("the task ran while there was no lease")
	}
	c.checkpoint("east-0", ref, "c-orphan")
}

func TestExecRunsInTheSandbox(t *testing.T) {
	c := newController(t)
	c.addNode("east-0")
	ref := c.start("east-0", "j-exec", counter())
	var out, errs strings.Builder
	code := int32(-1)
	open := &agentpb.OpenStream{Kind: &agentpb.OpenStream_Exec{Exec: &agentpb.Exec{
		Command: []string{"/bin/sh", "-c", "hostname; echo $GREETING; cat; echo bad >&2; exit 5"}, Env: map[string]string{"GREETING": "hello"},
	}}}
	c.stream("east-0", ref, open, func(f *agentpb.Frame) {
		out.Write(f.GetStdout())
		errs.Write(f.GetStderr())
		if f.GetExit() != nil {
			code = f.GetExit().GetCode()
		}
		if f.GetError() != "" {
			t.Error(f.GetError())
		}
	}, &agentpb.Frame{Body: &agentpb.Frame_Stdin{Stdin: []byte("from outside\n")}}, &agentpb.Frame{Body: &agentpb.Frame_Stdin{}})
	if out.String() != "task-0\nhello\nfrom outside\n" || errs.String() != "bad\n" || code != 5 {
		t.Errorf("stdout %q, stderr %q, code %d", out.String(), errs.String(), code)
	}
}

func TestLogsFollowUntilTheEnd(t *testing.T) {
	c := newController(t)
	c.addNode("east-0")
	ref := c.start("east-0", "j-follow", api.JobSpec{
		Command: []string{"/bin/sh", "-c", "for i in 1 2 3 4 5; do echo $i; sleep 0.1; done"}, CPUs: 1, MemBytes: 64 << 20,
	})
	if got := c.logs("east-0", ref, true); got != "1\n2\n3\n4\n5\n" {
		t.Errorf("stdout is %q", got)
	}
}

func TestBadJobsAreRefusedAndLeaveNothing(t *testing.T) {
	c := newController(t)
	n := c.addNode("east-0")
	for name, spec := range map[string]api.JobSpec{
		"no such command": {Command: []string{"/no/such/command"}},
		"no such user":    {Command: []string{"/bin/true"}, User: "nobody-of-that-name"},
		"no such root":    {Command: []string{"/bin/true"}, Root: "dir:/no/such/root"},
	} {
		ref := &agentpb.TaskRef{Job: "j-bad", Run: 1}
		spec.CPUs, spec.MemBytes = 1, 64<<20
		f := c.do("east-0", ref, &agentpb.StartTask{Spec: specJSON(t, spec)}).GetFailure()
		if f == nil || !f.GetRefused() {
			t.Errorf("%s: answered by %v", name, f)
		}
		t.Logf("%s: %s", name, f.GetMessage())
	}
	if left, err := os.ReadDir(filepath.Join(n.state, "tasks")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestCheckpointWithoutRoomIsRefusedBeforeTheFreeze(t *testing.T) {
	c := newController(t)
	small := filepath.Join(c.dir, "small")
	must(t, os.Mkdir(small, 0o700))
	must(t, unix.Mount("small", small, "tmpfs", 0, "size=4m"))
	t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) })
	c.addNode("east-0", func(config *Config) { config.Spool, config.SpoolMemBytes = filepath.Join(small, "spool"), -1 })
	ref := c.start("east-0", "j-small", counter())
	found := c.mustDo("east-0", ref, &agentpb.Preflight{Checkpoint: "c-small"}).GetPreflight()
	if len(found.GetRefusals()) != 1 || !strings.Contains(found.GetRefusals()[0], "no space for the checkpoint on "+small) {
		t.Errorf("refusals: %q", found.GetRefusals())
	}
	c.awaitLog("east-0", ref, "lines", counted(20))
}
