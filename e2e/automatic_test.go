package e2e

import (
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"dormouse/api"
)

func (p *platform) checkpoints(job string) []api.Checkpoint {
	p.t.Helper()
	return decode[[]api.Checkpoint](p, "checkpoints", job)
}

// TestCheckpointsAppearAndArePrunedByThemselves: and the newest is what a lost
// node's job goes on from.
func TestCheckpointsAppearAndArePrunedByThemselves(t *testing.T) {
	p := onOwn(t, built.bin, nil, "--cloud", "east=2")
	job := p.submit(append([]string{"--checkpoint-every", "1s", "--keep", "2", "--max-restarts", "1", "--mem", "64M"}, counter...)...)
	seen := map[string]bool{}
	p.until(job, "five checkpoints were durable", func() bool {
		for _, cp := range p.checkpoints(job) {
			if cp.Trigger != api.TriggerPeriodic {
				t.Fatalf("checkpoint %s has the trigger %s", cp.ID, cp.Trigger)
			}
			seen[cp.ID] = seen[cp.ID] || cp.State == api.CheckpointDurable
		}
		made := 0
		for _, durable := range seen {
			if durable {
				made++
			}
		}
		return made >= 5
	})
	// Two are kept; one is being made, and another may just be leaving.
	if n := len(p.checkpoints(job)); n > 4 {
		t.Errorf("there are %d checkpoints, and 2 are to be kept", n)
	}
	node := p.node(job)
	p.run("node", "kill", node)
	p.until(job, "it runs on the other node", func() bool {
		detail := p.inspect(job)
		return detail.Phase == api.PhaseRunning && detail.TaskStatus[0].Node != node
	})
	p.moves(job)
	counts(t, p.output(job))
}

func TestAutoExplainsItsInterval(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit(append([]string{"--checkpoint-every", "auto"}, counter...)...)
	p.waitFor(job, api.PhaseRunning)
	a := p.inspect(job).Automatic
	if a == nil || a.Inputs == nil || a.Inputs.Measured != 0 || a.IntervalMS <= 0 || a.Next == nil {
		t.Fatalf("before a checkpoint: %+v", a)
	}
	cp := p.checkpoint(job)
	a = p.inspect(job).Automatic
	if a.Inputs.Measured != 1 || a.Inputs.PauseMS != roundMS(cp.PauseMS) || a.Inputs.OverheadMS <= 0 || a.Inputs.NodeDays <= 0 {
		t.Errorf("after a checkpoint with a pause of %g ms: %+v", cp.PauseMS, a.Inputs)
	}
	if wait := time.Until(*a.Next).Milliseconds(); float64(wait) > a.IntervalMS {
		t.Errorf("the next is in %d ms, and the interval %g ms", wait, a.IntervalMS)
	}
	text := p.run("inspect", job)
	for _, part := range []string{"every ", "a checkpoint costs ", "(measured once)", "its node fails once per ", " node days", "next at "} {
		if !strings.Contains(text, part) {
			t.Errorf("inspect does not say %q:\n%s", part, text)
		}
	}
}

// roundMS is ms as whole nanoseconds, shown in microseconds.
func roundMS(ms float64) float64 {
	return float64(time.Duration(ms*float64(time.Millisecond)).Microseconds()) / 1000
}

// caller sends its count to the outside, for ever.
const caller = `
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
n = 0
while True:
    n += 1
    try: s.sendto(str(n).encode(), (sys.argv[1], int(sys.argv[2])))
    except OSError: pass
    print(n, flush=True)
    time.sleep(0.02)
`

// TestDrillIsNeverSeen: the copy on trial sends numbers that the running job has
// sent before, so that one of them outside would tell.
func TestDrillIsNeverSeen(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	outside, err := net.ListenPacket("udp4", net.JoinHostPort(p.gateway(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	host, port, _ := net.SplitHostPort(outside.LocalAddr().String())
	job := p.submit("--publish", "7411/udp", "--", "python3", "-c", caller, host, port)
	heard := make(chan int, 1<<16)
	go func() {
		defer close(heard)
		buffer := make([]byte, 64)
		for {
			n, _, err := outside.ReadFrom(buffer)
			if err != nil {
				return
			}
			if number, err := strconv.Atoi(string(buffer[:n])); err == nil {
				heard <- number
			}
		}
	}()
	p.waitLines(job, 20)
	cp := p.checkpoint(job)
	p.moves(job)
	before := p.inspect(job)

	reports := decode[[]api.VerifyReport](p, "verify", "--restore", cp.ID)
	if len(reports) != 1 || !reports[0].OK || reports[0].Drill == nil || reports[0].Drill.RestoreMS <= 0 {
		t.Fatalf("the trial: %+v", reports)
	}
	p.moves(job)
	after := p.inspect(job)
	if after.Phase != api.PhaseRunning || after.Run != before.Run || after.TaskStatus[0].Pid != before.TaskStatus[0].Pid || after.Restarts != 0 {
		t.Errorf("the running job was touched: %+v", after.Job)
	}
	all := p.checkpoints(job)
	if len(all) != 1 || all[0].Drill == nil || !all[0].Drill.OK {
		t.Errorf("the checkpoint is not stamped: %+v", all)
	}
	for _, other := range decode[[]api.Job](p, "ps", "--all") {
		if strings.HasPrefix(other.ID, "d-") {
			t.Errorf("the trial is in the list: %+v", other)
		}
	}
	outside.Close()
	last := 0
	for number := range heard {
		if number <= last {
			t.Fatalf("the outside heard %d after %d: the trial got out", number, last)
		}
		last = number
	}
	if last < 20 {
		t.Fatalf("the outside has heard up to %d only: the test proves nothing", last)
	}
	counts(t, p.output(job))
}

// TestDrillsOfAPolicy: of a job of two tasks that talk to each other; the
// original goes on.
func TestDrillsOfAPolicy(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit("--tasks", "2", "--cpus", "0.1", "--mem", "64M", "--drill-every", "2", "--", "python3", program("pair.py"), "100000", "20")
	p.waitLines(job, 5)
	first, second := p.checkpoint(job), p.checkpoint(job)
	var tried []string
	p.until(job, "the second checkpoint was tried", func() bool {
		tried = nil
		for _, cp := range p.checkpoints(job) {
			if cp.Drill != nil {
				tried = append(tried, cp.ID)
				if !cp.Drill.OK {
					t.Fatalf("the trial of %s failed: %s", cp.ID, cp.Drill.Error)
				}
			}
		}
		return len(tried) > 0
	})
	if !slices.Equal(tried, []string{second.ID}) {
		t.Errorf("want %s tried and not %s, got %v", second.ID, first.ID, tried)
	}
	p.moves(job)
}

func TestWalltimeEndsInSleep(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit(append([]string{"--walltime", "12s"}, counter...)...)
	detail := p.waitFor(job, api.PhaseSuspended)
	if !strings.HasPrefix(detail.Reason, "its walltime of 12s is over: sleeps in checkpoint ") {
		t.Errorf("the reason is %q", detail.Reason)
	}
	p.run("resume", job)
	p.moves(job)
	counts(t, p.output(job))
}

// drillSteps are the instants of a drill at which something is killed.
func drillSteps() (names []string) {
	for _, step := range strings.Fields("look place network connect restore open release watch unplace") {
		names = append(names, "controller."+string(api.OpDrill)+"."+step)
	}
	for _, step := range strings.Fields("restore.files restore.before-criu restore.unlock restore.after-criu release.before release.after destroy.before destroy.after") {
		names = append(names, "agent."+step)
	}
	return names
}

// TestNothingOfADrillIsLeftWhateverIsKilled: neither processes nor operations,
// and the job and its checkpoint are as before.
func TestNothingOfADrillIsLeftWhateverIsKilled(t *testing.T) {
	for _, name := range drillSteps() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, once := faulty(t, name, "kill")
			prog := talkers()
			job := p.submitDespite(append([]string{"--tasks", strconv.Itoa(prog.tasks), "--mem", "64M", "--env", "MARK=" + once, "--"}, prog.command...)...)
			p.waitLines(job, 5)
			cp := p.checkpoint(job)
			before := p.inspect(job)
			if got := p.try("verify", "--restore", cp.ID); got.status != 0 {
				t.Logf("the trial that was hit: %s", strings.TrimSpace(got.stderr))
			}
			p.until(job, "no trial is under way", func() bool {
				return !slices.ContainsFunc(decode[[]api.Operation](p, "operations"), func(op api.Operation) bool { return op.Phase == api.OpRunning })
			})
			if _, err := os.Stat(once); err != nil {
				t.Errorf("the step %s was never reached", name)
			}
			p.eachOnce(job, prog, once)
			p.run("verify", "--restore", cp.ID)
			p.eachOnce(job, prog, once)
			if after := p.inspect(job); after.Run != before.Run || after.Phase != api.PhaseRunning {
				t.Errorf("the job is %s in run %d and was in run %d", p.phase(job), after.Run, before.Run)
			}
			for _, node := range decode[[]api.Node](p, "nodes") {
				if node.Tasks > 1 {
					t.Errorf("node %s has %d tasks: the trial still holds room", node.Name, node.Tasks)
				}
			}
			p.moves(job)
			p.run("kill", job)
		})
	}
}

func TestControllerKilledWhileItRemovesACheckpoint(t *testing.T) {
	for _, step := range []string{"marked", "removed"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			p, once := faulty(t, "controller.removal."+step, "kill")
			job := p.submit(append([]string{"--keep", "1", "--mem", "64M"}, counter...)...)
			p.waitLines(job, 5)
			p.checkpoint(job)
			p.despite(job, api.PhaseRunning, "checkpoint", job)
			p.until(job, "one checkpoint is left", func() bool {
				all := p.checkpoints(job)
				return len(all) == 1 && all[0].State == api.CheckpointDurable
			})
			if _, err := os.Stat(once); err != nil {
				t.Errorf("the step %s was never reached", step)
			}
			if reports := decode[[]api.VerifyReport](p, "verify"); len(reports) != 1 || !reports[0].OK {
				t.Errorf("the repository: %+v", reports)
			}
			p.run("restart", job)
			p.moves(job)
			counts(t, p.output(job))
		})
	}
}
