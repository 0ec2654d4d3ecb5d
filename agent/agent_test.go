package agent

import (
	"strings"
	"testing"

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
