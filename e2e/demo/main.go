// Command demo tells Dormouse's story on one machine: a redis server full of
// data and a long computation lose the node they run on, and go on elsewhere
// as if nothing had happened.
//
// It drives the real binary (bin/dormouse, or the path in the first argument),
// in a network namespace of its own, checks every promise it prints, and ends with status 1 if one is broken.
package main

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"dormouse/api"
	"dormouse/e2e/cluster"
	"dormouse/internal/ownnet"
)

const (
	keyCount = 250_000
	piCount  = 450 // lines
	limit    = 5 * time.Minute
)

//go:embed pi.py
var piProgram string

func main() {
	if err := ownnet.EnterIfRoot(); err != nil {
		fmt.Fprintln(os.Stderr, "demo: "+err.Error())
		os.Exit(1)
	}
	binary := "bin/dormouse"
	if len(os.Args) > 1 {
		binary = os.Args[1]
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := run(ctx, binary); err != nil {
		fmt.Fprintln(os.Stderr, "demo: "+err.Error())
		os.Exit(1)
	}
}

// run sets the stage, plays the story and clears the stage.
func run(ctx context.Context, binary string) (err error) {
	binary, err = filepath.Abs(binary)
	if err != nil {
		return err
	}
	state, err := os.MkdirTemp("", "dormouse-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(state)
	say("$ dormouse up --cloud east=2 --cloud west=2 &")
	c, err := cluster.Start(ctx, cluster.Options{Binary: binary, State: state,
		Args: []string{"--cloud", "east=2", "--cloud", "west=2"}})
	if err != nil {
		return err
	}
	s := &story{ctx: ctx, c: c}
	err = s.play()
	if stopErr := clear(c); err == nil {
		err = stopErr
	}
	if err != nil {
		return err
	}
	say("\nThe cluster is down; no process, mount or cgroup of it is left.")
	return nil
}

func clear(c *cluster.Cluster) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := c.Stop(ctx); err != nil {
		return err
	}
	left, err := c.Leftovers()
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("left behind: %s", strings.Join(left, "; "))
	}
	return err
}

// story holds what happens on the stage.
type story struct {
	ctx context.Context
	c   *cluster.Cluster
}

func (s *story) play() error {
	redis, err := s.submit("redis", "redis-server", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
	if err != nil {
		return err
	}
	pi, err := s.submit("pi", "python3", "-c", piProgram, strconv.Itoa(piCount))
	if err != nil {
		return err
	}
	if err := s.load(redis); err != nil {
		return err
	}
	if err := s.waitLines(pi, 200); err != nil {
		return err
	}
	say("\nBoth are checkpointed while they run:")
	for _, job := range []string{redis, pi} {
		if err := s.checkpoint(job); err != nil {
			return err
		}
	}
	lines, err := s.lines(pi)
	if err != nil {
		return err
	}
	if err := s.waitLines(pi, lines+5); err != nil {
		return err
	}
	say("\npi has printed %d lines more since. Now the power fails:", 5)
	for _, job := range []string{redis, pi} {
		if err := s.loseNode(job); err != nil {
			return err
		}
	}
	say("")
	for _, job := range []string{redis, pi} {
		if err := s.restart(job); err != nil {
			return err
		}
	}
	if err := s.checkKeys(redis); err != nil {
		return err
	}
	if err := s.sleepElsewhere(redis); err != nil {
		return err
	}
	if err := s.checkKeys(redis); err != nil {
		return err
	}
	return s.checkPi(pi)
}

func (s *story) submit(name string, command ...string) (string, error) {
	args := append([]string{"submit", "--name", name, "--mem", "512M", "--"}, command...)
	out, err := s.c.Run(s.ctx, args...)
	if err != nil {
		return "", err
	}
	id := strings.TrimSpace(out)
	say("$ dormouse submit --name %s -- %s ...\n%s", name, command[0], id)
	_, err = s.c.Run(s.ctx, "wait", id, "--for", "running", "--timeout", "60s")
	return id, err
}

// load fills redis through its own client, run inside the job.
func (s *story) load(job string) error {
	ping := func() (bool, error) {
		out, err := s.c.Run(s.ctx, "exec", job, "--", "redis-cli", "ping")
		return err == nil && strings.TrimSpace(out) == "PONG", nil
	}
	if err := cluster.WaitFor(s.ctx, "redis", ping); err != nil {
		return err
	}
	out, err := s.c.RunInput(s.ctx, strings.NewReader(dataSet(keyCount)), "exec", "-i", job, "--", "redis-cli", "--pipe")
	if err != nil {
		return err
	}
	if want := fmt.Sprintf("errors: 0, replies: %d", keyCount); !strings.Contains(out, want) {
		return fmt.Errorf("redis-cli --pipe answered %q, expected %q", out, want)
	}
	say("$ dormouse exec -i %s -- redis-cli --pipe < %d-keys\n%s", job, keyCount, lastLine(out))
	return s.checkKeys(job)
}

// checkKeys compares redis' whole content with what was put there.
func (s *story) checkKeys(job string) error {
	got, err := s.c.Run(s.ctx, "exec", job, "--", "redis-cli", "EVAL", digestScript, "0")
	if err != nil {
		return err
	}
	if want := digest(keyCount); strings.TrimSpace(got) != want {
		return fmt.Errorf("redis holds %q, expected %q", strings.TrimSpace(got), want)
	}
	say("redis holds every one of its %d keys with the right value (digest %.12s).", keyCount, strings.Fields(got)[1])
	return nil
}

func (s *story) checkpoint(job string) error {
	var cp api.Checkpoint
	if err := s.c.JSON(s.ctx, &cp, "checkpoint", job); err != nil {
		return err
	}
	if cp.State != api.CheckpointDurable {
		return fmt.Errorf("checkpoint %s of %s is %s, expected durable", cp.ID, job, cp.State)
	}
	say("$ dormouse checkpoint %s\n%s  paused %.0f ms, captured %s, stored %s, durable after %.1f s",
		job, cp.ID, cp.PauseMS, size(cp.SizeBytes), size(cp.StoredBytes), cp.DurableMS/1000)
	return nil
}

func (s *story) node(job string) (string, error) {
	var detail api.JobDetail
	if err := s.c.JSON(s.ctx, &detail, "inspect", job); err != nil {
		return "", err
	}
	if len(detail.TaskStatus) != 1 {
		return "", fmt.Errorf("job %s has %d tasks, expected 1", job, len(detail.TaskStatus))
	}
	return detail.TaskStatus[0].Node, nil
}

// loseNode cuts the power of the node that job runs on, unless that is done.
func (s *story) loseNode(job string) error {
	node, err := s.node(job)
	if err != nil {
		return err
	}
	var detail api.JobDetail
	if err := s.c.JSON(s.ctx, &detail, "inspect", job); err != nil {
		return err
	}
	if detail.Phase == api.PhaseRunning {
		if _, err := s.c.Run(s.ctx, "node", "kill", node); err != nil {
			return err
		}
		say("$ dormouse node kill %s", node)
	}
	if _, err := s.c.Run(s.ctx, "wait", job, "--for", "failed", "--timeout", "60s"); err != nil {
		return err
	}
	if err := s.c.JSON(s.ctx, &detail, "inspect", job); err != nil {
		return err
	}
	say("%s is %s: %s", detail.Name, detail.Phase, detail.Reason)
	return nil
}

func (s *story) restart(job string) error {
	before, err := s.node(job)
	if err != nil {
		return err
	}
	begin := time.Now()
	if _, err := s.c.Run(s.ctx, "restart", job); err != nil {
		return err
	}
	took := time.Since(begin)
	after, err := s.node(job)
	if err != nil {
		return err
	}
	say("$ dormouse restart %s\n%s -> %s, running again after %.2f s", job, before, after, took.Seconds())
	return nil
}

// sleepElsewhere suspends the job in one cloud and wakes it in the other.
func (s *story) sleepElsewhere(job string) error {
	before, err := s.node(job)
	if err != nil {
		return err
	}
	cloud := "west"
	if strings.HasPrefix(before, cloud) {
		cloud = "east"
	}
	if _, err := s.c.Run(s.ctx, "suspend", job); err != nil {
		return err
	}
	if _, err := s.c.Run(s.ctx, "node", "start", cloud+"-0"); err != nil {
		return err
	}
	begin := time.Now()
	if _, err := s.c.Run(s.ctx, "resume", job, "--cloud", cloud); err != nil {
		return err
	}
	took := time.Since(begin)
	after, err := s.node(job)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(after, cloud) {
		return fmt.Errorf("job %s woke on %s, expected a node of %s", job, after, cloud)
	}
	say("\n$ dormouse suspend %[1]s; dormouse resume %[1]s --cloud %[2]s\nslept on %[3]s, woke on %[4]s after %.2[5]f s", job, cloud, before, after, took.Seconds())
	return nil
}

func (s *story) lines(job string) (int, error) {
	out, err := s.c.Run(s.ctx, "logs", job)
	return strings.Count(out, "\n"), err
}

func (s *story) waitLines(job string, count int) error {
	return cluster.WaitFor(s.ctx, fmt.Sprintf("%d lines of %s", count, job), func() (bool, error) {
		lines, err := s.lines(job)
		return lines >= count, err
	})
}

func (s *story) checkPi(job string) error {
	if _, err := s.c.Run(s.ctx, "wait", job, "--timeout", "3m"); err != nil {
		return err
	}
	got, err := s.c.Run(s.ctx, "logs", job)
	if err != nil {
		return err
	}
	if want := piLines(piCount); got != want {
		return fmt.Errorf("pi printed %d lines that differ from the %d expected", strings.Count(got, "\n"), piCount)
	}
	say("pi ended: its %d lines are the %d digits of pi, none lost, none twice.", piCount, piCount*digitsPerLine)
	return nil
}

func say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

func size(bytes int64) string { return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20)) }
