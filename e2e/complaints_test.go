package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"dormouse/api"
)

// The complaints that users of other tools have about one machine, in the order
// in which trackers know them. Each is solved, or named before the freeze.

func TestComplaintIoUring(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := row{name: "io_uring", fate: "refused"}.start(p, "")
	if job == "" {
		return
	}
	got := p.try("checkpoint", job)
	if got.status != refused || !strings.Contains(got.stderr, "io_uring") || !strings.Contains(got.stderr, "matrix") {
		t.Errorf("exit status %d and %q, expected %d and a sentence naming io_uring and the process matrix", got.status, got.stderr, refused)
	}
	p.moves(job)
}

// TestComplaintCPUDifferences: a job can be kept from features that another
// processor lacks, and nodes tell theirs.
func TestComplaintCPUDifferences(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	for _, node := range decode[[]api.Node](p, "nodes") {
		if len(node.CPUFeatures) == 0 || node.CPUModel == "" {
			t.Errorf("node %s does not tell its processor's features", node.Name)
		}
	}
	job := p.submit("--cpu-baseline", "x86-64-v2", "--", "sh", "-c", "echo $GLIBC_TUNABLES; while :; do echo; sleep 0.02; done")
	p.waitLines(job, 3)
	if out := p.output(job); !strings.Contains(out, "AVX2") {
		t.Errorf("with a baseline of x86-64-v2 the C library may use AVX2: GLIBC_TUNABLES is %q", strings.TrimSpace(out))
	}
	p.checkpoint(job)
	p.run("restart", job, "--cloud", p.otherCloud(job))
	p.moves(job)
}

// TestComplaintProgramFilesDiffer: the program that runs was replaced or removed
// since; the checkpoint carries its own.
func TestComplaintProgramFilesDiffer(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	dir := directory(t)
	for _, test := range []struct {
		name   string
		change func(binary string) error
	}{
		{"removed", os.Remove},
		{"replaced", func(binary string) error {
			return errors.Join(os.Remove(binary), os.WriteFile(binary, []byte("something else"), 0o755))
		}},
		{"another mode", func(binary string) error { return os.Chmod(binary, 0o700) }},
	} {
		binary := filepath.Join(dir, "tcp-"+strings.ReplaceAll(test.name, " ", "-"))
		if err := tool(nil, "cp", program("matrix"), binary); err != nil {
			t.Fatal(err)
		}
		job := p.submit("--", binary, "tcp", "/var/tmp/matrix")
		p.waitLines(job, 3)
		p.checkpoint(job)
		if err := test.change(binary); err != nil {
			t.Fatal(err)
		}
		p.run("restart", job, "--cloud", p.otherCloud(job))
		p.moves(job)
		p.checkpoint(job) // and the restored job can be checkpointed
		p.run("restart", job)
		p.moves(job)
	}
}

// TestComplaintOutputFileChanged: a job's files go back with it, so that a file
// it goes on writing is as long as it was.
func TestComplaintOutputFileChanged(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	writer := `
import os, time
f = open("/var/tmp/output", "w+")
step = 0
while True:
    step += 1
    f.write("%09d\n" % step)
    f.flush()
    size = os.stat("/var/tmp/output").st_size
    print(step, flush=True)
    if size != 10 * step:
        print("BROKEN: after", step, "lines the file has", size, "bytes", flush=True)
        raise SystemExit(1)
    time.sleep(0.01)
`
	job := p.submit("--", "python3", "-c", writer)
	p.waitLines(job, 10)
	c := p.checkpoint(job)
	p.waitLines(job, p.lines(job)+50)
	for range 2 {
		p.run("restart", job, "--from", c.ID, "--cloud", p.otherCloud(job))
		p.moves(job)
	}
	counts(t, p.output(job))
}

// TestComplaintPidTaken: copies of a job live beside it with the same pids.
func TestComplaintPidTaken(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit("--cloud", "west", "--", "sh", "-c", "while :; do echo $$; sleep 0.02; done")
	p.waitLines(job, 3)
	c := p.checkpoint(job)
	for range 2 {
		clone := p.run("clone", c.ID, "--cloud", "west")
		t.Cleanup(func() { p.forget(clone) })
		p.moves(clone)
		pids := strings.Fields(p.output(clone))
		if pids[0] != pids[len(pids)-1] {
			t.Errorf("the pid was %s and is %s in the clone", pids[0], pids[len(pids)-1])
		}
	}
	p.moves(job)
}

// TestComplaintCgroups: limits hold wherever the machine has its cgroup controllers, and frozen jobs thaw.
func TestComplaintCgroups(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit(append([]string{"--mem", "256M"}, counter...)...)
	p.waitLines(job, 3)
	p.checkpoint(job)
	p.run("restart", job, "--cloud", p.otherCloud(job))
	p.moves(job)
	inside := p.run("exec", job, "--", "cat", "/proc/self/cgroup")
	if !strings.Contains(inside, job) {
		t.Errorf("a process of the restored job is in no cgroup of it: %s", inside)
	}
}

// TestComplaintRestartableSequences and C library skew: rseq works after a restore.
func TestComplaintRestartableSequences(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := row{name: "rseq", fate: "carried"}.start(p, "")
	p.checkpoint(job)
	p.run("restart", job, "--cloud", p.otherCloud(job))
	p.moves(job)
}

// TestComplaintGhostFiles: deleted files, also big ones and in /dev/shm, need no limit to be raised.
func TestComplaintGhostFiles(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	ghosts := `
import hashlib, os, time
files = []
for path in ("/dev/shm/ghost", "/tmp/ghost", "/var/tmp/ghost"):
    f = open(path, "w+b")
    f.write(hashlib.shake_128(path.encode()).digest(32 << 20))
    f.flush()
    os.unlink(path)
    files.append((path, f))
while True:
    for path, f in files:
        f.seek(0)
        print("same" if f.read() == hashlib.shake_128(path.encode()).digest(32 << 20) else "BROKEN " + path, flush=True)
    time.sleep(0.1)
`
	job := p.submit("--mem", "1G", "--", "python3", "-c", ghosts)
	p.waitLines(job, 3)
	p.checkpoint(job)
	p.run("restart", job, "--cloud", p.otherCloud(job))
	p.waitLines(job, p.lines(job)+6)
	if out := p.output(job); strings.Contains(out, "BROKEN") {
		t.Errorf("a deleted file has lost its content: %s", tail(out, 6))
	}
}

// TestComplaintSlowWrapper: what Dormouse adds to CRIU's own time is small (how
// small, the bench measures), and the upload of memory is not what the job waits
// for. It runs alone. A machine may stand still during one checkpoint, but hardly
// during each of several.
func TestComplaintSlowWrapper(t *testing.T) {
	p := onShared(t)
	job := p.submit("--mem", "1G", "--", program("memory"), "512", "2", "1000000", "10")
	p.waitLines(job, 3)
	p.checkpoint(job) // the first one of a process touches everything for the first time
	for range 4 {
		c := p.checkpoint(job)
		frozen := c.Steps[0].FrozenMS
		t.Logf("512 MiB: frozen by criu for %.0f ms, paused for %.0f ms", frozen, c.PauseMS)
		if c.PauseMS <= 2*frozen+300 {
			return
		}
	}
	t.Error("the job stood still for more than twice as long as CRIU froze it and 300 ms, each time")
}

// TestComplaintSecretsReadable: nobody but root can read what was captured.
func TestComplaintSecretsReadable(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit(append([]string{"--env", "PASSWORD=hunter2"}, counter...)...)
	p.waitLines(job, 3)
	p.checkpoint(job)
	state := filepath.Join(shared.dir, "state")
	for _, secret := range []string{"repository", "nodes", "pki/ca.key", "pki/manifest.key", "admin.token", "controller.db"} {
		info, err := os.Stat(filepath.Join(state, secret))
		if err != nil {
			t.Error(err)
			continue
		}
		if mode := info.Mode().Perm(); mode&0o077 != 0 && !parentsClosed(t, filepath.Join(state, secret), built.dir) {
			t.Errorf("%s has mode %v: others may read it", secret, mode)
		}
	}
	open := 0
	err := filepath.WalkDir(filepath.Join(state, "repository"), func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return nil // removed meanwhile
		}
		if info, err := entry.Info(); err == nil && info.Mode().Perm()&0o077 != 0 {
			open++
		}
		return nil
	})
	if err != nil || open > 0 {
		t.Errorf("%d files of the repository may be read by others, %v", open, err)
	}
}

// parentsClosed tells whether a directory between path and top keeps others out.
func parentsClosed(t *testing.T, path, top string) bool {
	t.Helper()
	for dir := filepath.Dir(path); dir != top; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm()&0o011 == 0 {
			return true
		}
	}
	return false
}

// TestComplaintFailedDumpKillsTheJob: CRIU is killed in the middle; the job,
// its connections and its next checkpoint must not suffer.
func TestComplaintFailedDumpKillsTheJob(t *testing.T) {
	p := onOwn(t, built.bin, nil, "--cloud", "east=1", "--mem", "8G", "--cpus", "8")
	job := p.submit("--mem", "1G", "--", "sh", "-c", fmt.Sprintf("%s 400 2 1000000 100 >/dev/null & exec %s tcp /var/tmp/matrix", program("memory"), program("matrix")))
	p.waitLines(job, 20)
	for _, after := range []time.Duration{0, 20 * time.Millisecond, 60 * time.Millisecond, 120 * time.Millisecond, 250 * time.Millisecond} {
		ended := make(chan struct{})
		killed := make(chan bool, 1)
		go func() { killed <- killCRIU(p.c.Up().Pid, after, ended) }()
		got := p.try("checkpoint", job)
		close(ended)
		if <-killed && got.status == 0 {
			t.Logf("criu was killed after %v and the checkpoint was taken at another try", after)
		}
		p.moves(job)
	}
	p.checkpoint(job)
	p.run("restart", job)
	p.moves(job)
}

// killCRIU waits for a criu that descends from ancestor, lets it work for a
// while, kills it with SIGKILL and returns whether that was possible before the end.
func killCRIU(ancestor int, after time.Duration, ended <-chan struct{}) bool {
	for {
		select {
		case <-ended:
			return false
		case <-time.After(time.Millisecond):
		}
		for _, pid := range descendants(ancestor) {
			if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err != nil || !strings.HasPrefix(string(name), "criu") {
				continue
			}
			time.Sleep(after)
			return syscall.Kill(pid, syscall.SIGKILL) == nil
		}
	}
}

// descendants lists the processes below ancestor.
func descendants(ancestor int) []int {
	parents := map[int]int{}
	statuses, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range statuses {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		var pid, parent int
		var state string
		fmt.Sscan(string(text), &pid)
		fmt.Sscan(string(text[strings.LastIndexByte(string(text), ')')+1:]), &state, &parent)
		parents[pid] = parent
	}
	var found []int
	for pid := range parents {
		for at := parents[pid]; at > 1; at = parents[at] {
			if at == ancestor {
				found = append(found, pid)
				break
			}
		}
	}
	return found
}

// TestComplaintSecondCycle: suspend and resume again and again.
func TestComplaintSecondCycle(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit("--", "python3", program("tree.py"), "100000", "20")
	p.waitLines(job, 3)
	for range 5 {
		p.run("suspend", job)
		p.run("resume", job, "--cloud", p.otherCloud(job))
		p.moves(job)
	}
}

// TestComplaintClocksJump: the monotonic clock does not show that the job slept.
func TestComplaintClocksJump(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	const limit = 4 // seconds; the pause itself is seen by the job
	job := p.submit("--", program("matrix"), "monotonic", "/var/tmp/matrix", fmt.Sprint(limit))
	p.waitLines(job, 3)
	p.run("suspend", job)
	time.Sleep((limit + 3) * time.Second) // the sleep is what is tested
	p.run("resume", job, "--cloud", p.otherCloud(job))
	p.moves(job)
}

// TestComplaintOpaqueErrors: an error names the file and passes on what CRIU said.
func TestComplaintOpaqueErrors(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	volume := directory(t)
	job := p.submit("--volume", volume+":/data", "--", "python3", "-c", `
import time
f = open("/data/table", "w+")
f.write("x" * 100)
f.flush()
while True:
    print(".", flush=True)
    time.sleep(0.02)
`)
	p.waitLines(job, 3)
	p.checkpoint(job)
	table := filepath.Join(volume, "table")
	if err := os.Truncate(table, 7); err != nil {
		t.Fatal(err)
	}
	got := p.try("restart", job)
	if got.status == 0 || !strings.Contains(got.stderr, "table") {
		t.Errorf("exit status %d and %q, expected a sentence that names the file", got.status, got.stderr)
	}
	if lines := strings.Count(strings.TrimSpace(got.stderr), "\n"); lines > 2 {
		t.Errorf("the error has %d lines:\n%s", lines+1, got.stderr)
	}
	if err := os.Truncate(table, 100); err != nil {
		t.Fatal(err)
	}
	p.run("restart", job)
	p.moves(job)
}
