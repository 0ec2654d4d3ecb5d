//go:build failpoint

package agent

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"dormouse/api/agentpb"
)

// killedAtWith starts a node whose agent is killed once at a failpoint, and
// comes back.
func (c *controller) killedAtWith(name, point string, change func(*Config)) *node {
	c.t.Helper()
	n := c.addNode(name, change)
	n.killAt(point)
	return n
}

// killAt starts the agent again, has it killed once at a failpoint, and brings it
// back.
func (n *node) killAt(point string) {
	c := n.c
	c.t.Helper()
	n.kill()
	once := filepath.Join(c.dir, "once")
	n.start("DORMOUSE_FAILPOINT="+point+"=kill", "DORMOUSE_FAILPOINT_ONCE="+once)
	ctx, cancel := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	watching.Go(func() { n.respawn(ctx) })
	c.t.Cleanup(func() {
		cancel()
		n.command.Process.Kill()
		watching.Wait()
		if _, err := os.Stat(once); err != nil {
			c.t.Errorf("the agent never came to %s", point)
		}
	})
}

func TestAgentKilledDuringACheckpoint(t *testing.T) {
	paused := []string{
		"agent.freeze.frozen", "agent.capture.dumping", "agent.capture.files", "agent.capture.dumped", "agent.thaw.before", "agent.thaw.after",
	}
	others := []string{"agent.preflight.done", "agent.upload.half", "agent.upload.done"}
	for _, memory := range []int64{0, -1} {
		where := " memory"
		if memory < 0 {
			where = " disk"
		}
		for _, point := range slices.Concat(paused, others) {
			t.Run(point+where, func(t *testing.T) { killDuringCheckpoint(t, point, memory, false) })
		}
		for _, point := range paused {
			t.Run(point+where+" alone", func(t *testing.T) { killDuringCheckpoint(t, point, memory, true) })
		}
	}
}

func killDuringCheckpoint(t *testing.T, point string, memory int64, alone bool) {
	c := newController(t)
	n := c.killedAtWith("east-0", point, func(config *Config) { config.SpoolMemBytes = memory })
	ref := c.start("east-0", "j-kill", counter())
	c.awaitLog("east-0", ref, "10 lines", counted(10))
	id := "c-kill"
	stored := false
	for try := 0; try < 3 && !stored; try++ {
		id += "x"
		stored = c.wholeCheckpoint("east-0", ref, id, alone)
	}
	if !stored {
		t.Fatal("no checkpoint came about after the agent had returned")
	}
	last, err := countsUp(c.logs("east-0", ref, false))
	must(t, err)
	c.awaitLog("east-0", ref, "more lines", counted(last+10))
	n.nothingSpooled(t)
	c.mustDo("east-0", ref, &agentpb.DestroyTask{})
	c.addNode("west-0")
	again := c.restore("west-0", ref, id, counter())
	c.awaitLog("west-0", again, "lines of the restored task", counted(10))
}

// wholeCheckpoint does what the controller does: all steps, and an abort when
// one fails.
func (c *controller) wholeCheckpoint(node string, ref *agentpb.TaskRef, id string, alone bool) bool {
	c.t.Helper()
	f := c.tryCapture(node, ref, &agentpb.Freeze{Checkpoint: id, Alone: alone})
	if f == nil {
		f = c.do(node, ref, &agentpb.Thaw{Checkpoint: id}).GetFailure()
	}
	if f == nil {
		reply := c.do(node, ref, &agentpb.Upload{Checkpoint: id})
		if f = reply.GetFailure(); f == nil {
			c.finish(node, ref, id, reply.GetUploaded())
			return true
		}
	}
	c.t.Logf("checkpoint %s: %s", id, f.GetMessage())
	c.mustDo(node, ref, &agentpb.Thaw{Checkpoint: id, Abort: true})
	return false
}

func TestAgentKilledWhileASuspendedTaskIsHeld(t *testing.T) {
	c := newController(t)
	c.killedAtWith("east-0", "agent.upload.half", func(config *Config) { config.SpoolMemBytes = -1 })
	ref := c.start("east-0", "j-held", counter())
	c.awaitLog("east-0", ref, "10 lines", counted(10))
	c.captureTask("east-0", ref, "c-held")
	frozen := c.logs("east-0", ref, false)
	c.store("east-0", ref, "c-held")
	if now := c.logs("east-0", ref, false); now != frozen {
		t.Error("the task ran although it was held for its suspension")
	}
	c.mustDo("east-0", ref, &agentpb.DestroyTask{KeepLogs: true})
	c.restore("east-0", ref, "c-held", counter())
}

func TestAgentKilledWhileItBuildsATask(t *testing.T) {
	for _, point := range []string{"agent.start.before", "agent.start.created", "agent.start.after"} {
		t.Run(point, func(t *testing.T) {
			c := newController(t)
			n := c.killedAtWith("east-0", point, func(*Config) {})
			ref := &agentpb.TaskRef{Job: "j-start", Run: 1}
			c.again("east-0", ref, func() any { return &agentpb.StartTask{Spec: specJSON(t, counter())} })
			c.awaitLog("east-0", ref, "10 lines", counted(10))
			c.mustDo("east-0", ref, &agentpb.DestroyTask{})
			n.nothingSpooled(t)
		})
	}
}

func TestAgentKilledDuringARestore(t *testing.T) {
	for _, point := range []string{
		"agent.restore.files", "agent.restore.before-criu", "agent.restore.unlock", "agent.restore.after-criu",
		"agent.destroy.before", "agent.destroy.after",
	} {
		t.Run(point, func(t *testing.T) {
			c := newController(t)
			c.addNode("west-0")
			ref := c.start("west-0", "j-wake", counter())
			c.awaitLog("west-0", ref, "10 lines", counted(10))
			c.checkpoint("west-0", ref, "c-wake")
			c.mustDo("west-0", ref, &agentpb.DestroyTask{})

			c.killedAtWith("east-0", point, func(*Config) {})
			again := &agentpb.TaskRef{Job: ref.GetJob(), Run: 2}
			c.again("east-0", again, func() any { return &agentpb.RestoreTask{Checkpoint: "c-wake", Spec: specJSON(t, counter())} })
			last, err := countsUp(c.logs("east-0", again, false))
			must(t, err)
			c.awaitLog("east-0", again, "more lines", counted(last+10))
			c.mustDo("east-0", again, &agentpb.DestroyTask{})
		})
	}
}

func TestAgentKilledWhileATaskIsHeldOrReleased(t *testing.T) {
	for _, point := range []string{"agent.restore.before-criu", "agent.restore.unlock", "agent.restore.after-criu"} {
		t.Run(point, func(t *testing.T) {
			p := newPair(t, "vxlan", "/usr/bin/perl", "-e", talkers)
			p.start()
			p.talk()
			p.capture("c-kill")
			p.store("c-kill")
			p.destroy()
			p.nodes[0].killAt(point)
			for try := 1; ; try++ {
				f := p.tryRestore("c-kill")
				if f == nil {
					break
				}
				t.Log(f.GetMessage())
				if !f.GetRetryable() || try == 3 {
					t.Fatalf("restore %d failed: %s", try, f.GetMessage())
				}
				p.destroy()
			}
			p.talk()
			p.destroy()
		})
	}
}

// tryRestore does all steps of a restore until one fails.
func (p *pair) tryRestore(id string) *agentpb.Failure {
	p.t.Helper()
	p.run++
	p.at[0], p.at[1] = p.at[1], p.at[0]
	p.connect()
	for _, command := range []func(task int) any{
		func(task int) any { return p.restoreCommand(id, task) },
		func(int) any { return &agentpb.OpenNetwork{Checkpoint: id} },
		func(int) any { return &agentpb.ReleaseTask{Checkpoint: id} },
	} {
		for task := range addresses {
			if f := p.do(p.node(task), p.ref(task), command(task)).GetFailure(); f != nil {
				return f
			}
		}
	}
	return nil
}

// again sends a command that an agent is killed at. The network went with what
// was half made, so one retry is due.
func (c *controller) again(node string, ref *agentpb.TaskRef, body func() any) {
	c.t.Helper()
	f := c.do(node, ref, body()).GetFailure()
	if f != nil && !f.GetRetryable() {
		c.t.Fatalf("%T on %s failed for good: %s", body(), node, f.GetMessage())
	}
	if f != nil {
		c.mustDo(node, ref, body())
	}
}

// respawn starts the agent again when it has ended, until ctx ends.
func (n *node) respawn(ctx context.Context) {
	for {
		n.command.Wait()
		if ctx.Err() != nil {
			return
		}
		n.spawn()
	}
}

func TestAgentKilledDuringARenewalOfItsCertificate(t *testing.T) {
	for point, want := range map[string]int{
		"agent.renew.issued": 3, // joined, renewed and forgotten, renewed
		"agent.renew.kept":   2,
	} {
		t.Run(point, func(t *testing.T) {
			c := newController(t)
			n := c.addNode("east-0")
			ref := c.start("east-0", "j-renew", counter())
			c.awaitLog("east-0", ref, "10 lines", counted(10))
			n.kill()
			n.aged()
			n.spawn("DORMOUSE_FAILPOINT=" + point + "=kill")
			n.command.Wait()
			n.spawn()
			c.awaitRenewed()
			c.mu.Lock()
			issued := len(c.issued)
			c.mu.Unlock()
			if issued != want {
				t.Errorf("expected %d certificates to be given out, got %d", want, issued)
			}
			last, err := countsUp(c.logs("east-0", ref, false))
			must(t, err)
			if _, err := countsUp(c.awaitLog("east-0", ref, "more lines after the renewal", counted(last+10))); err != nil {
				t.Error(err)
			}
			c.mustDo("east-0", ref, &agentpb.DestroyTask{})
		})
	}
}
