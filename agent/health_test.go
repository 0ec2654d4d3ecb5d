package agent

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
)

// moody is a program that is sick from SIGUSR1 until SIGUSR2.
const moody = `trap 'touch /tmp/sick' USR1; trap 'rm /tmp/sick' USR2; echo ready; while :; do sleep 0.05; done`

// moodyServer says so by HTTP.
const moodyServer = `use IO::Socket::INET; $SIG{USR1} = sub { $sick = 1 }; $SIG{USR2} = sub { $sick = 0 };
my $s = IO::Socket::INET->new(LocalPort => 8080, Listen => 5) or die "listen: $!";
$| = 1; print "ready\n";
while (1) { my $c = $s->accept or next; my $asked = <$c>; while (<$c> =~ /\S/) {}
print $c $asked !~ m{^GET /well } ? "HTTP/1.0 404 no\r\n\r\n" : $sick ? "HTTP/1.0 500 sick\r\n\r\n" : "HTTP/1.0 200 ok\r\n\r\n"; close $c }`

func TestAnUnhealthyTaskIsFoundOnceAndFoundWellAgainOnce(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		command []string
		check   api.HealthCheck
		says    string
	}{
		"command": {[]string{"/bin/sh", "-c", moody}, api.HealthCheck{Command: []string{"/bin/sh", "-c", "test ! -e /tmp/sick || { echo it hurts >&2; exit 7; }"}}, "exit status 7: it hurts"},
		"http":    {[]string{"/usr/bin/perl", "-e", moodyServer}, api.HealthCheck{HTTP: ":8080/well"}, "status 500"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newController(t)
			w.addNode("east-0")
			w.place("east-0", alone)
			c.check.PeriodMS, c.check.TimeoutMS, c.check.StartDelayMS, c.check.Retries = 200, 30000, 5000, 3
			ref := w.start("east-0", "j-sick", api.JobSpec{Command: c.command, CPUs: 1, MemBytes: 64 << 20, Health: &c.check, StarvationPeriodMS: 3600000})
			w.awaitLog("east-0", ref, "that it is ready", says("ready"))
			w.mustDo("east-0", ref, &agentpb.SignalTask{Signal: int32(syscall.SIGUSR1)})
			f, next := w.awaitFinding(0, api.ConditionUnhealthy)
			if f.Kind != api.FindingHealth || f.Job != "j-sick" || f.Run != 1 || f.Node != "east-0" || f.Since == nil || !strings.Contains(f.Explanation, c.says) {
				t.Errorf("found %+v, want that it says %s", f, c.says)
			}
			w.mustDo("east-0", ref, &agentpb.SignalTask{Signal: int32(syscall.SIGUSR2)})
			w.awaitFinding(next, api.ConditionHealthy)
			w.mu.Lock()
			defer w.mu.Unlock()
			if len(w.found) != 2 {
				t.Errorf("found %+v, want two things", w.found)
			}
		})
	}
}

// processes counts those of a task.
func (n *node) processes(t *testing.T, ref *agentpb.TaskRef) int {
	t.Helper()
	procs := filepath.Join(cgroup2(), "dormouse-"+filepath.Base(n.c.dir), n.name, "jobs", taskID(ref), "cgroup.procs")
	content, err := os.ReadFile(procs)
	must(t, err)
	return strings.Count(string(content), "\n")
}

func (n *node) awaitProcesses(t *testing.T, ref *agentpb.TaskRef, want int) {
	t.Helper()
	for limit := time.Now().Add(20 * time.Second); n.processes(t, ref) != want; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("the task has %d processes, want %d", n.processes(t, ref), want)
		}
	}
}

// A probe is no part of a checkpoint, and a checkpoint is nothing against a task.
func TestAHungProbeIsInNoCheckpoint(t *testing.T) {
	t.Parallel()
	c := newController(t)
	n := c.addNode("east-0")
	c.place("east-0", alone)
	spec := api.JobSpec{
		Command: []string{"/bin/sh", "-c", "trap '' HUP; exec sleep 1000"}, CPUs: 1, MemBytes: 64 << 20, StarvationPeriodMS: 3600000,
		Health: &api.HealthCheck{Command: []string{"/bin/sh", "-c", "trap '' HUP TERM; while :; do sleep 900; done"}, PeriodMS: 50, TimeoutMS: 600000, Retries: 1},
	}
	ref := c.start("east-0", "j-hang", spec)
	const alone, probed = 2, 4
	n.awaitProcesses(t, ref, probed)
	c.captureTask("east-0", ref, "c-hang")
	if got := n.processes(t, ref); got != alone {
		t.Errorf("captured with %d processes, want %d", got, alone)
	}
	c.mustDo("east-0", ref, &agentpb.Thaw{Checkpoint: "c-hang"})
	c.store("east-0", ref, "c-hang")
	n.awaitProcesses(t, ref, probed) // it goes on
	c.mustDo("east-0", ref, &agentpb.DestroyTask{})

	spec.Health = nil
	again := c.restore("east-0", ref, "c-hang", spec)
	n.awaitProcesses(t, again, alone)
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.found) != 0 {
		t.Errorf("found %+v, want nothing", c.found)
	}
}
