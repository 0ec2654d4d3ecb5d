package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"dormouse/api"
)

// oneSentence checks an error message: one line that begins with the program's
// name and shows no trace of a program's inside.
func oneSentence(t *testing.T, what string, got outcome, status int, words ...string) {
	t.Helper()
	text := strings.TrimSpace(got.stderr)
	if got.status != status {
		t.Errorf("%s: exit status %d, expected %d: %s%s", what, got.status, status, got.stdout, text)
	}
	if text == "" || strings.Count(text, "\n") > 1 || strings.Contains(text, "goroutine") || strings.Contains(text, "rpc error") {
		t.Errorf("%s: expected one clear sentence, got %q", what, text)
	}
	for _, word := range words {
		if !strings.Contains(strings.ToLower(text), strings.ToLower(word)) {
			t.Errorf("%s: %q does not mention %q", what, text, word)
		}
	}
}

// TestBadInput: each gets one clear sentence and the right exit status, and no job.
func TestBadInput(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit("--name", "bad-input", "--", "sleep", "1000")
	p.waitFor(job, api.PhaseRunning)
	for _, test := range []struct {
		args   string
		status int
		words  []string
	}{
		{"inspect nobody", notFound, []string{"nobody"}},
		{"logs nobody", notFound, []string{"nobody"}},
		{"checkpoint nobody", notFound, []string{"nobody"}},
		{"suspend nobody", notFound, []string{"nobody"}},
		{"kill nobody", notFound, []string{"nobody"}},
		{"exec nobody -- true", notFound, []string{"nobody"}},
		{"clone c-nothing", notFound, []string{"c-nothing"}},
		{"verify c-nothing", notFound, []string{"c-nothing"}},
		{"restart bad-input --from c-nothing", notFound, []string{"c-nothing"}},
		{"restart bad-input --cloud mars", notFound, []string{"mars"}},
		{"node kill mars-0", notFound, []string{"mars-0"}},
		{"submit --cloud mars -- true", notFound, []string{"mars"}},
		{"resume bad-input", refused, []string{"suspended"}},
		{"rm bad-input", refused, []string{"run"}},
		{"submit", usage, []string{"command"}},
		{"submit --cpus 0 -- true", usage, []string{"processors"}},
		{"submit --cpus -1 -- true", usage, []string{"processors"}},
		{"submit --mem 0 -- true", usage, []string{"mem"}},
		{"submit --mem lots -- true", usage, []string{"mem"}},
		{"submit --tasks 0 -- true", usage, []string{"task"}},
		{"submit --env =x -- true", usage, []string{"env"}},
		{"submit --volume relative -- true", usage, []string{"relative"}},
		{"submit --cpu-baseline z80 -- true", usage, []string{"z80"}},
		{"submit -f /no/such/job.yaml", usage, []string{"/no/such/job.yaml"}},
		{"kill bad-input --signal NOSUCH", usage, []string{"NOSUCH"}},
		{"wait bad-input --for sometime", usage, []string{"sometime"}},
		{"wait bad-input --for completed --timeout 1s", timedOut, []string{"running"}},
		{"frobnicate", usage, []string{"frobnicate"}},
		{"inspect", usage, []string{"JOB"}},
	} {
		oneSentence(t, test.args, p.try(strings.Fields(test.args)...), test.status, test.words...)
	}
	if detail := p.inspect(job); detail.Phase != api.PhaseRunning {
		t.Errorf("after all that the job is %s", p.phase(job))
	}
}

// TestJobsThatCannotStart end as failed with a reason that says what to do.
func TestJobsThatCannotStart(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	dir := directory(t)
	noImage := filepath.Join(dir, "image.tar")
	if err := os.WriteFile(noImage, []byte("this is no archive"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		what  string
		args  []string
		words string
	}{
		{"command not found", []string{"--", "/no/such/command"}, "/no/such/command"},
		{"command not executable", []string{"--", "/etc/passwd"}, "/etc/passwd"},
		{"bad archive", []string{"--root", "oci:" + noImage, "--", "true"}, noImage},
		{"unknown user", []string{"--user", "nobodyatall", "--", "true"}, "nobodyatall"},
		{"missing directory", []string{"--dir", "/no/such/dir", "--", "true"}, "/no/such/dir"},
		{"missing root", []string{"--root", "dir:/no/such/root", "--", "true"}, "/no/such/root"},
		{"unknown capability", []string{"--cap-add", "FLY", "--", "true"}, "FLY"},
		{"missing volume", []string{"--volume", "/no/such/source:/data", "--", "true"}, "/no/such/source"},
	} {
		got := p.try(append([]string{"submit"}, test.args...)...)
		if got.status != 0 { // what can be known at submission may be refused there
			oneSentence(t, test.what, got, usage, test.words)
			continue
		}
		job := strings.TrimSpace(got.stdout)
		t.Cleanup(func() { p.forget(job) })
		p.waitFor(job, api.PhaseFailed)
		if reason := p.inspect(job).Reason; !strings.Contains(reason, test.words) || strings.Contains(reason, "\n") {
			t.Errorf("%s: the reason %q does not mention %q in one line", test.what, reason, test.words)
		}
	}
}

// TestJobTooBigForAnyNode is refused or waits with a reason; it never starts.
func TestJobTooBigForAnyNode(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	for _, args := range [][]string{{"--mem", "900T"}, {"--cpus", "100000"}} {
		got := p.try(append(append([]string{"submit"}, args...), "--", "true")...)
		if got.status == 0 {
			t.Cleanup(func() { p.forget(strings.TrimSpace(got.stdout)) })
			t.Errorf("%v was accepted", args)
			continue
		}
		if got.status != usage && got.status != refused {
			t.Errorf("%v: exit status %d, expected %d or %d: %s", args, got.status, usage, refused, got.stderr)
		}
	}
}

func TestControllerDownOrWrongToken(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	wrong := p.c.Command(ctx, "ps")
	wrong.Env = append(wrong.Env, "DORMOUSE_TOKEN=wrong")
	oneSentence(t, "wrong token", runCommand(t, wrong, nil), failed, "token")
	down := p.c.Command(ctx, "ps")
	down.Env = append(down.Env, "DORMOUSE_CONTROLLER=https://127.0.0.1:1")
	oneSentence(t, "controller down", runCommand(t, down, nil), failed, "127.0.0.1:1")
}

// upThatFails runs `dormouse up` in a way that must end it by itself.
func upThatFails(t *testing.T, state string, change func(*exec.Cmd)) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, built.bin+"/dormouse", "up", "--state", state)
	cmd.Env = os.Environ()
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	change(cmd)
	got := runCommand(t, cmd, nil)
	if ctx.Err() != nil {
		t.Errorf("`dormouse up` did not end by itself")
	}
	return got
}

func TestUpOnABadMachine(t *testing.T) {
	t.Parallel()
	if unavailable != "" {
		t.Skip(unavailable)
	}
	dir := directory(t)
	other := filepath.Join(dir, "criu")
	if err := os.WriteFile(other, []byte("#!/bin/sh\necho Version: 3.17\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	corrupt := filepath.Join(dir, "corrupt")
	if err := os.MkdirAll(corrupt, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(corrupt, "controller.db"), []byte(strings.Repeat("not a store ", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		what, state string
		change      func(*exec.Cmd)
		words       []string
	}{
		{"criu missing", filepath.Join(dir, "a"), func(c *exec.Cmd) { c.Env = append(c.Env, "DORMOUSE_CRIU=/no/such/criu") }, []string{"criu"}},
		{"no criu at all", filepath.Join(dir, "b"), func(c *exec.Cmd) { c.Env = append(c.Env, "DORMOUSE_CRIU="+other) }, []string{"criu", other}},
		{"corrupt store", corrupt, func(*exec.Cmd) {}, []string{"controller.db"}},
		{"without root", filepath.Join(dir, "c"), func(c *exec.Cmd) {
			c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		}, []string{"root"}},
		{"bad cloud", filepath.Join(dir, "d"), func(c *exec.Cmd) { c.Args = append(c.Args, "--cloud", "east=none") }, []string{"east=none"}},
	} {
		got := upThatFails(t, test.state, test.change)
		status := failed
		if test.what == "bad cloud" {
			status = usage
		}
		oneSentence(t, test.what, outcome{got.stdout, lastLine(got.stderr), got.status}, status, test.words...)
	}
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

func TestTwoUpsOnOneState(t *testing.T) {
	t.Parallel()
	onShared(t)
	got := upThatFails(t, filepath.Join(shared.dir, "state"), func(*exec.Cmd) {})
	if got.status == 0 || !strings.Contains(got.stderr, filepath.Join(shared.dir, "state")) {
		t.Errorf("a second `up` on the same state: exit status %d, %q", got.status, got.stderr)
	}
}

// TestNoSpaceInTheRepository: the checkpoint fails by a sentence, the job goes
// on, and with room again the next checkpoint is taken.
func TestNoSpaceInTheRepository(t *testing.T) {
	if unavailable != "" {
		t.Skip(unavailable)
	}
	dir := directory(t)
	if err := syscall.Mount("dormouse-e2e", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	p := &platform{t: t}
	p.start(built.bin, dir, nil, "--cloud", "east=1", "--mem", "4G")
	job := p.submit("--mem", "512M", "--", program("memory"), "256", "2", "1000000", "10")
	p.waitLines(job, 3)
	got := p.try("checkpoint", job)
	if got.status != failed && got.status != refused {
		t.Errorf("checkpoint without space: exit status %d, expected %d or %d", got.status, failed, refused)
	}
	if !strings.Contains(got.stderr, "space") {
		t.Errorf("the error does not say that space is missing: %s", got.stderr)
	}
	p.moves(job)
	if err := syscall.Mount("dormouse-e2e", dir, "tmpfs", syscall.MS_REMOUNT, "size=1g"); err != nil {
		t.Fatal(err)
	}
	p.checkpoint(job)
	p.run("restart", job)
	p.moves(job)
}
