package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"dormouse/agent/health"
	"dormouse/agent/network"
	"dormouse/agent/sandbox"
	"dormouse/api"
	"dormouse/monitor/policy"
)

// Reasons for which nobody may ask a task how it is.
const (
	gatePreflight  = "preflight"
	gateCheckpoint = "checkpoint"
)

// maxReason bounds what of a failed check's output becomes part of a finding, in
// bytes.
const maxReason = 300

// healthKey is under what a task's health is remembered.
func healthKey(t *task) string { return t.id() + " " + string(api.FindingHealth) }

// askHealth asks a task how it is, as its job says, until ctx ends.
func (a *Agent) askHealth(ctx context.Context, t *task, box *sandbox.Sandbox) {
	r, _ := t.snapshot()
	if r.Spec.Health == nil {
		return
	}
	probe, err := probeOf(&r, box)
	if err != nil {
		a.log.Error("a task's health is not asked", "task", t.id(), "error", err)
		return
	}
	c := health.New(*r.Spec.Health, a.tree.last(healthKey(t)).Condition == api.ConditionUnhealthy)
	c.Probe, c.Gate = probe, &t.gate
	c.Excused = func() string {
		if !box.Running() {
			return "it has ended"
		}
		return t.standsStill()
	}
	c.Changed = func(v health.Verdict) {
		f := healthFinding(&r, v)
		f.Node = a.config.Node
		a.log.Info("health", "task", t.id(), "condition", f.Condition, "explanation", f.Explanation)
		if err := a.tree.say(healthKey(t), f); err != nil {
			a.log.Error("a finding is not told", "task", t.id(), "error", err)
		}
	}
	c.Run(ctx)
}

func healthFinding(r *record, v health.Verdict) api.Finding {
	f := api.Finding{Time: time.Now(), Kind: api.FindingHealth, Job: r.Job, Task: int(r.Index), Run: r.Run}
	if v.Healthy {
		f.Condition, f.Explanation = api.ConditionHealthy, fmt.Sprintf("task %d is healthy again", r.Index)
		return f
	}
	f.Condition, f.Since = api.ConditionUnhealthy, &v.Since
	f.Explanation = fmt.Sprintf("task %d failed its health check %d times in a row: %s", r.Index, v.Failures, v.Reason)
	return f
}

func probeOf(r *record, box *sandbox.Sandbox) (health.Probe, error) {
	check := r.Spec.Health
	if len(check.Command) > 0 {
		return func(ctx context.Context) error { return runProbe(ctx, box, check.Command) }, nil
	}
	target, err := policy.ParseTarget(check.HTTP)
	if err != nil {
		return nil, err
	}
	address, err := netip.ParseAddr(r.VirtualIP)
	if err != nil {
		return nil, fmt.Errorf("the task's address: %w", err)
	}
	dial := func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
		netns, err := network.OfProcess(box.Pid())
		if err != nil {
			return nil, err
		}
		defer netns.Close()
		return network.Dial(ctx, netns, to)
	}
	return health.HTTP(dial, address, target), nil
}

// runProbe runs a command beside the task's own.
func runProbe(ctx context.Context, box *sandbox.Sandbox, command []string) error {
	var output lastBytes
	code, err := box.Exec(ctx, sandbox.ExecRequest{Command: command, Whole: true, Stdout: &output, Stderr: &output})
	switch {
	case errors.Is(err, sandbox.ErrCommandNotFound):
		return fmt.Errorf("there is no command %s in the sandbox", strconv.Quote(command[0]))
	case err != nil:
		return err
	case code == 0:
		return nil
	}
	if said := output.String(); said != "" {
		return fmt.Errorf("exit status %d: %s", code, said)
	}
	return fmt.Errorf("exit status %d", code)
}

// lastBytes keeps the end of what is written.
type lastBytes struct{ kept []byte }

func (b *lastBytes) Write(p []byte) (int, error) {
	b.kept = append(b.kept, p...)
	if over := len(b.kept) - maxReason; over > 0 {
		b.kept = append(b.kept[:0], b.kept[over:]...)
	}
	return len(p), nil
}

// String is fit for one line.
func (b *lastBytes) String() string {
	text := bytes.ToValidUTF8(b.kept, []byte(string(utf8.RuneError)))
	printable := func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}
	return strings.Join(strings.Fields(strings.Map(printable, string(text))), " ")
}
