package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/e2e/cluster"
)

// Exit statuses of the command line.
const (
	failed   = 1
	usage    = 2
	notFound = 3
	refused  = 4
	timedOut = 5
)

// patience bounds every single wait. A wait ends as soon as what it is for has happened.
const patience = 90 * time.Second

// platform is a running `dormouse up` as one test sees it.
type platform struct {
	t *testing.T
	c *cluster.Cluster
	// revive starts `up` again after it was killed; nil where that is not foreseen.
	revive func()
}

// onShared returns the `up` that most tests share.
func onShared(t *testing.T) *platform {
	t.Helper()
	if unavailable != "" {
		t.Skip(unavailable)
	}
	c, err := startShared()
	if err != nil {
		t.Fatal(err)
	}
	return &platform{t: t, c: c}
}

// onOwn returns an `up` of its own, which the test may break: with the given
// binaries, state directory and additional environment. It ends with the test,
// which fails when something is left behind.
func onOwn(t *testing.T, bin string, env []string, args ...string) *platform {
	t.Helper()
	if unavailable != "" {
		t.Skip(unavailable)
	}
	p := &platform{t: t}
	p.start(bin, directory(t), env, args...)
	return p
}

// start runs `up`; it is called again to start a killed one anew.
func (p *platform) start(bin, dir string, env []string, args ...string) {
	p.t.Helper()
	c, err := startUp(bin, dir, env, args...)
	if err != nil {
		p.t.Fatal(err)
	}
	p.c = c
	p.t.Cleanup(func() {
		if p.c != c {
			return // it was killed; its successor cleans up
		}
		if err := stopUp(c); err != nil {
			p.t.Error(err)
		}
		if p.t.Failed() {
			log, _ := os.ReadFile(filepath.Join(dir, "up.log"))
			p.t.Logf("log of up:\n%s", log)
		}
	})
}

// directory returns a new directory outside of /tmp, readable by every user.
func directory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(built.dir, "test-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// outcome is how one command ended.
type outcome struct {
	stdout, stderr string
	status         int
}

// try runs a command and returns how it ended.
func (p *platform) try(args ...string) outcome {
	p.t.Helper()
	return p.tryInput(nil, args...)
}

func (p *platform) tryInput(stdin io.Reader, args ...string) outcome {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	ended, asked := make(chan outcome, 1), p.c
	go func() { ended <- runCommand(p.t, asked.Command(ctx, args...), stdin) }()
	for {
		select {
		case got := <-ended:
			if p.revive == nil || !strings.Contains(got.stderr, "cannot reach the controller") {
				return got
			}
			<-asked.Exited()
			if p.c == asked {
				p.revive()
			}
			p.t.Logf("%s: %s", args[0], strings.TrimSpace(got.stderr))
			if slices.Contains(args, "submit") && strings.Contains(got.stderr, "may have done what it was asked") {
				return got // it was perhaps begun
			}
			return p.tryInput(stdin, args...)
		case <-p.death():
			p.revive()
		}
	}
}

// death is closed when an `up` that can be revived has ended.
func (p *platform) death() <-chan struct{} {
	if p.revive == nil {
		return nil
	}
	return p.c.Exited()
}

func runCommand(t *testing.T, cmd *exec.Cmd, stdin io.Reader) outcome {
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Errorf("%v: %v", cmd.Args, err)
		return outcome{stderr: err.Error(), status: -1}
	}
	return outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// run runs a command that must succeed and returns what it printed, trimmed.
func (p *platform) run(args ...string) string {
	p.t.Helper()
	got := p.try(args...)
	if got.status != 0 {
		p.t.Fatalf("dormouse %s: exit status %d, expected 0: %s", strings.Join(args, " "), got.status, got.stderr)
	}
	return strings.TrimSpace(got.stdout)
}

// decode runs a command with -o json and decodes its document.
func decode[T any](p *platform, args ...string) T {
	p.t.Helper()
	var value T
	out := p.run(append([]string{"-o", "json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &value); err != nil {
		p.t.Fatalf("dormouse %s -o json: %v in %q", strings.Join(args, " "), err, out)
	}
	return value
}

// submit submits a job that is ended and forgotten with the test.
func (p *platform) submit(args ...string) string {
	p.t.Helper()
	job := p.run(append([]string{"submit"}, args...)...)
	p.t.Cleanup(func() { p.forget(job) })
	return job
}

// forget ends and removes a job; one that has been forgotten already is fine,
// and so is one whose `up` has ended.
func (p *platform) forget(job string) {
	select {
	case <-p.c.Exited():
		return
	default:
	}
	if p.t.Failed() {
		p.report(job)
	}
	if got := p.try("kill", job); got.status != 0 && got.status != refused && got.status != notFound {
		p.t.Errorf("kill %s: %s", job, got.stderr)
	}
	if got := p.try("rm", job); got.status != 0 && got.status != notFound {
		p.t.Errorf("rm %s: %s", job, got.stderr)
	}
}

// report logs what is known about the job of a failed test.
func (p *platform) report(job string) {
	logs := p.try("logs", job)
	p.t.Logf("events of %s:\n%s", job, p.try("events", job).stdout)
	p.t.Logf("end of the output of %s:\n%s%s", job, tail(logs.stdout, 5), tail(logs.stderr, 20))
}

func tail(text string, lines int) string {
	all := strings.SplitAfter(text, "\n")
	return strings.Join(all[max(0, len(all)-lines-1):], "")
}

func (p *platform) inspect(job string) api.JobDetail {
	p.t.Helper()
	return decode[api.JobDetail](p, "inspect", job)
}

// output returns what the job has written to standard output. While an agent
// that was killed comes back nobody can read it, so it is asked for again.
func (p *platform) output(job string) string {
	p.t.Helper()
	got := p.try("logs", job)
	for end := time.Now().Add(20 * time.Second); got.status != 0; got = p.try("logs", job) {
		if time.Now().After(end) {
			p.t.Fatalf("logs %s: exit status %d: %s", job, got.status, got.stderr)
		}
		time.Sleep(100 * time.Millisecond)
	}
	return got.stdout
}

// lines counts the whole lines of the job's output.
func (p *platform) lines(job string) int {
	p.t.Helper()
	return strings.Count(p.output(job), "\n")
}

// waitLines waits until the job has written at least n lines, and the controller knows
// that it runs: it learns so a little later.
func (p *platform) waitLines(job string, n int) {
	p.t.Helper()
	onItsWay := []api.Phase{api.PhaseStarting, api.PhaseRestoring, api.PhaseRecovering}
	p.until(job, "it has written enough lines", func() bool {
		return p.lines(job) >= n && !slices.Contains(onItsWay, p.inspect(job).Phase)
	})
}

// moves waits until the job has written more lines than now.
func (p *platform) moves(job string) {
	p.t.Helper()
	p.waitLines(job, p.lines(job)+2)
}

// until polls a state that nobody announces, such as a program's output.
func (p *platform) until(job, what string, condition func() bool) {
	p.t.Helper()
	for end := time.Now().Add(patience); !condition(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			p.t.Fatalf("job %s: waited in vain until %s; it is %s; end of its output:\n%s", job, what, p.phase(job), tail(p.output(job), 3))
		}
		if phase := p.inspect(job).Phase; phase.Final() && !condition() {
			p.t.Fatalf("job %s is %s (%s) before %s; end of its output:\n%s", job, phase, p.inspect(job).Reason, what, tail(p.output(job), 3))
		}
	}
}

func (p *platform) phase(job string) string {
	detail := p.inspect(job)
	return string(detail.Phase) + " (" + detail.Reason + ")"
}

// waitFor waits for a phase.
func (p *platform) waitFor(job string, phase api.Phase) api.JobDetail {
	p.t.Helper()
	if got := p.try("wait", job, "--for", string(phase), "--timeout", patience.String()); got.status != 0 {
		p.t.Fatalf("job %s is %s, waited for %s: exit status %d: %s", job, p.phase(job), phase, got.status, got.stderr)
	}
	return p.inspect(job)
}

// completes waits for the end of the job and returns its output.
func (p *platform) completes(job string) string {
	p.t.Helper()
	p.waitFor(job, api.PhaseCompleted)
	return p.output(job)
}

// checkpoint takes a checkpoint that becomes durable.
func (p *platform) checkpoint(job string) api.Checkpoint {
	p.t.Helper()
	c := decode[api.Checkpoint](p, "checkpoint", job)
	if c.State != api.CheckpointDurable {
		p.t.Fatalf("checkpoint %s of %s is %s (%s), expected durable", c.ID, job, c.State, c.Error)
	}
	return c
}

// node returns where the job's only task is.
func (p *platform) node(job string) string {
	p.t.Helper()
	detail := p.inspect(job)
	if len(detail.TaskStatus) != 1 || detail.TaskStatus[0].Node == "" {
		p.t.Fatalf("job %s is %s and on no node", job, p.phase(job))
	}
	return detail.TaskStatus[0].Node
}

// otherCloud names the cloud the job does not run in.
func (p *platform) otherCloud(job string) string {
	p.t.Helper()
	if p.inspect(job).Cloud == "east" {
		return "west"
	}
	return "east"
}

// program returns the path of a test program.
func program(name string) string { return filepath.Join(built.programs, name) }

// undisturbed runs a command outside of Dormouse and returns its output.
func undisturbed(t *testing.T, command ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	got := runCommand(t, exec.CommandContext(ctx, command[0], command[1:]...), nil)
	if got.status != 0 {
		t.Fatalf("%v, undisturbed: exit status %d: %s", command, got.status, got.stderr)
	}
	return got.stdout
}

// sameOutput compares outputs byte for byte and shows where they part.
func sameOutput(t *testing.T, got, want string) {
	t.Helper()
	if got == want {
		return
	}
	t.Errorf("the output differs from an undisturbed run's after %d bytes:\ngot  %q\nwant %q", common(got, want), around(got, common(got, want)), around(want, common(got, want)))
}

// prefixOutput checks the output of a program that still runs.
func prefixOutput(t *testing.T, got, want string) {
	t.Helper()
	if !strings.HasPrefix(want, got) {
		sameOutput(t, got, want)
	}
}

func common(a, b string) int {
	n := 0
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return n
}

func around(text string, at int) string {
	return text[max(0, at-80):min(len(text), at+80)]
}
