package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dormouse/api"
)

// counter writes a number per line, for ever.
var counter = []string{"--", "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"}

// counts checks that the lines are 1, 2, 3, ... without a gap.
func counts(t *testing.T, output string) {
	t.Helper()
	for i, line := range strings.Fields(output) {
		if line != fmt.Sprint(i+1) {
			t.Fatalf("line %d is %q: one was lost or repeated", i+1, line)
		}
	}
}

func TestExitStatusIsReportedTruthfully(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		command string
		phase   api.Phase
		code    int
		signal  string
	}{
		{"exit 0", api.PhaseCompleted, 0, ""},
		{"exit 3", api.PhaseFailed, 3, ""},
		{"kill -9 $$", api.PhaseFailed, 137, "SIGKILL"},
		{"kill -11 $$", api.PhaseFailed, 139, "SIGSEGV"},
	} {
		p := onShared(t)
		job := p.submit("--", "sh", "-c", "echo out; echo err >&2; "+test.command)
		detail := p.waitFor(job, test.phase)
		if detail.ExitCode == nil || *detail.ExitCode != test.code || detail.TaskStatus[0].Signal != test.signal {
			t.Errorf("%q ended as %+v, expected exit code %d, signal %q", test.command, detail.TaskStatus[0], test.code, test.signal)
		}
		if got := p.try("logs", job); got.stdout != "out\n" || got.stderr != "err\n" {
			t.Errorf("logs are %q and %q, expected out and err", got.stdout, got.stderr)
		}
	}
}

// TestExitStatusAfterARestore: the agent is no longer the parent of what it restored.
func TestExitStatusAfterARestore(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit("--", "sh", "-c", "i=0; while [ $i -lt 200 ]; do i=$((i+1)); echo $i; sleep 0.02; done; exit 7")
	p.waitLines(job, 5)
	p.checkpoint(job)
	p.run("restart", job)
	if detail := p.waitFor(job, api.PhaseFailed); *detail.ExitCode != 7 {
		t.Errorf("exit code %d, expected 7", *detail.ExitCode)
	}
	counts(t, p.output(job))
}

func TestSuspendedJobUsesNothingAndResumesElsewhere(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit(counter...)
	p.waitLines(job, 10)
	p.run("suspend", job)
	detail := p.inspect(job)
	if detail.Phase != api.PhaseSuspended {
		t.Fatalf("the job is %s, expected suspended", p.phase(job))
	}
	if pid := detail.TaskStatus[0].Pid; pid != 0 {
		t.Errorf("a suspended job has pid %d", pid)
	}
	slept := p.lines(job)
	cloud := p.otherCloud(job)
	p.run("resume", job, "--cloud", cloud)
	p.waitLines(job, slept+5)
	counts(t, p.output(job))
	if got := p.inspect(job).Cloud; got != cloud {
		t.Errorf("the job woke in %s, expected %s", got, cloud)
	}
}

// TestCloneBesideTheOriginal: the same pids, ports and files twice, on one node set.
func TestCloneBesideTheOriginal(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit("--cloud", "east", "--", program("matrix"), "tcp", "/var/tmp/matrix")
	p.waitLines(job, 5)
	c := p.checkpoint(job)
	clones := []string{p.run("clone", c.ID, "--cloud", "east"), p.run("clone", c.ID, "--cloud", "west")}
	for _, clone := range clones {
		t.Cleanup(func() { p.forget(clone) })
		if clone == job {
			t.Fatal("the clone has the original's id")
		}
	}
	for _, each := range append(clones, job) {
		p.moves(each)
	}
}

func TestNodeLossAndAutomaticRecovery(t *testing.T) {
	p := onOwn(t, built.bin, nil, "--cloud", "east=2")
	patient := p.submit(append([]string{"--max-restarts", "1", "--mem", "64M"}, counter...)...)
	p.waitLines(patient, 5)
	p.checkpoint(patient)
	node := p.node(patient)
	p.run("node", "kill", node)
	p.until(patient, "it runs on the other node", func() bool {
		detail := p.inspect(patient)
		return detail.Phase == api.PhaseRunning && detail.TaskStatus[0].Node != node
	})
	p.moves(patient)
	counts(t, p.output(patient))

	p.run("node", "start", node)
	single := p.submit(append([]string{"--mem", "64M"}, counter...)...)
	p.waitLines(single, 5)
	c := p.checkpoint(single)
	p.run("node", "kill", p.node(single))
	detail := p.waitFor(single, api.PhaseFailed)
	if !strings.Contains(detail.Reason, c.ID) || !strings.Contains(detail.Reason, "restart") {
		t.Errorf("the reason %q does not say how to go on from %s", detail.Reason, c.ID)
	}
	p.run("restart", single)
	p.moves(single)
	counts(t, p.output(single))
}

func TestOrdinaryUsersJob(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit("--user", "nobody", "--", "sh", "-c", "id -u; while :; do date +%N; sleep 0.02; done")
	p.waitLines(job, 5)
	p.checkpoint(job)
	p.run("restart", job, "--cloud", p.otherCloud(job))
	p.moves(job)
	if id, _, _ := strings.Cut(p.output(job), "\n"); id != "65534" {
		t.Errorf("the job ran as user %s, expected 65534", id)
	}
	if got := p.run("exec", job, "--", "cat", "/proc/1/status"); !strings.Contains(got, "NoNewPrivs:\t1") {
		t.Error("the job runs without no-new-privileges")
	}
}

// TestVolumeIsSharedNotCaptured: what is in a volume stays as it is when the job goes back.
func TestVolumeIsSharedNotCaptured(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	volume := directory(t)
	job := p.submit("--volume", volume+":/data", "--", "sh", "-c", "while :; do echo x >> /data/log; date >> /var/tmp/own; echo; sleep 0.02; done")
	p.waitLines(job, 5)
	p.checkpoint(job)
	p.moves(job)
	size := func() int64 {
		info, err := os.Stat(filepath.Join(volume, "log"))
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	before := size()
	p.run("restart", job, "--cloud", p.otherCloud(job))
	p.moves(job)
	if after := size(); after <= before {
		t.Errorf("the volume's log has %d bytes, it had %d: it was taken back", after, before)
	}
	if _, err := os.Stat("/var/tmp/own"); err == nil {
		t.Error("what the job wrote into its own layer is on the host")
	}
}

func TestReadOnlyVolume(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	volume := directory(t)
	job := p.submit("--volume", volume+":/data:ro", "--", "sh", "-c", "echo x > /data/log || echo refused; while :; do echo; sleep 0.02; done")
	p.waitLines(job, 3)
	p.checkpoint(job)
	p.run("restart", job)
	if got := p.try("exec", job, "--", "touch", "/data/log"); got.status == 0 {
		t.Error("after the restore the read-only volume can be written")
	}
	if _, err := os.Stat(filepath.Join(volume, "log")); err == nil {
		t.Error("the read-only volume was written")
	}
}

// TestMemoryLimitIsEnforced, before and after a restore: the limit belongs to the job's new place, too.
func TestMemoryLimitIsEnforced(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	eater := `
import sys, time
eaten = []
step = 0
while True:
    step += 1
    print(step, flush=True)
    if step > 400 or (len(sys.argv) > 1):
        eaten.append(bytearray(b"x" * (8 << 20)))
    time.sleep(0.01)
`
	job := p.submit("--mem", "128M", "--", "python3", "-c", eater, "now")
	if detail := p.waitFor(job, api.PhaseFailed); *detail.ExitCode != 137 || !strings.Contains(detail.Reason, "memory") {
		t.Errorf("a job above its memory limit ended with exit code %d because of %q", *detail.ExitCode, detail.Reason)
	}
	job = p.submit("--mem", "128M", "--", "python3", "-c", eater)
	p.waitLines(job, 3)
	p.checkpoint(job)
	p.run("restart", job, "--cloud", p.otherCloud(job))
	if detail := p.waitFor(job, api.PhaseFailed); *detail.ExitCode != 137 {
		t.Errorf("a restored job above its memory limit ended with exit code %d", *detail.ExitCode)
	}
}

func TestCPULimitIsEnforced(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	// The share of processor time the job gets while it wants all: a tenth.
	busy := `
import time
while True:
    wall, used = time.monotonic(), time.process_time()
    while time.monotonic() < wall + 1:
        pass
    print(int(100 * (time.process_time() - used) / (time.monotonic() - wall)), flush=True)
`
	job := p.submit("--cpus", "0.1", "--", "python3", "-c", busy)
	p.waitLines(job, 3)
	p.checkpoint(job)
	before := p.lines(job)
	p.run("restart", job, "--cloud", p.otherCloud(job))
	p.waitLines(job, before+3)
	for _, share := range strings.Fields(p.output(job))[1:] {
		var percent int
		fmt.Sscan(share, &percent)
		if percent > 25 {
			t.Errorf("a job limited to 10 %% of a processor got %d %%", percent)
		}
	}
}

func TestExecRunsInTheJobsSandbox(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit("--env", "COLOUR=green", "--", "sh", "-c", "echo content > /tmp/file; while :; do echo; sleep 0.02; done")
	p.waitLines(job, 2)
	if got := p.run("exec", job, "--", "cat", "/tmp/file"); got != "content" {
		t.Errorf("exec sees %q in the job's /tmp", got)
	}
	if got := p.tryInput(strings.NewReader("to stdin"), "exec", "-i", job, "--", "sh", "-c", "cat; echo err >&2; exit 5"); got.stdout != "to stdin" || got.stderr != "err\n" || got.status != 5 {
		t.Errorf("exec gave %+v", got)
	}
	p.checkpoint(job)
	p.run("restart", job, "--cloud", p.otherCloud(job))
	if got := p.run("exec", job, "--", "cat", "/tmp/file"); got != "content" {
		t.Errorf("after the restore exec sees %q in the job's /tmp", got)
	}
	if _, err := os.Stat("/tmp/file"); err == nil {
		t.Error("the job's /tmp is the host's")
	}
}

// TestSignalReachesTheProgram also after a restore, where pid 1 is not the agent's child.
func TestSignalReachesTheProgram(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit("--", "python3", "-uc", "import signal,time\nsignal.signal(signal.SIGUSR1, lambda *_: print('signal'))\nwhile True: time.sleep(0.02); print('.')")
	p.waitLines(job, 2)
	p.checkpoint(job)
	p.run("restart", job)
	p.run("kill", job, "--signal", "USR1")
	p.until(job, "the signal has arrived", func() bool { return strings.Contains(p.output(job), "signal") })
}

// TestOCIRoot runs and moves a job whose root is an image archive, made here of
// one static program.
func TestOCIRoot(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	dir := directory(t)
	binary := filepath.Join(dir, "hello")
	source := filepath.Join(dir, "main.go")
	program := `package main
import ("fmt"; "os"; "time")
func main() {
	host, _ := os.ReadFile("/etc/image")
	for i := 1; ; i++ { fmt.Println(i, os.Getenv("FROM"), string(host)); os.WriteFile("/state", []byte(fmt.Sprint(i)), 0o644); time.Sleep(20*time.Millisecond) }
}`
	if err := os.WriteFile(source, []byte(program), 0o644); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-o", binary, source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	archive := filepath.Join(dir, "image.tar")
	saveImage(t, archive, binary)

	job := p.submit("--root", "oci:"+archive, "--", "/hello")
	p.waitLines(job, 5)
	p.checkpoint(job)
	if err := os.Remove(archive); err != nil { // what runs needs its archive no more
		t.Fatal(err)
	}
	p.run("restart", job, "--cloud", p.otherCloud(job))
	p.moves(job)
	for i, line := range strings.Split(strings.TrimSpace(p.output(job)), "\n") {
		if want := fmt.Sprintf("%d image inside", i+1); strings.TrimSpace(line) != want {
			t.Fatalf("line %d is %q, expected %q", i+1, line, want)
		}
	}
}

// saveImage writes what `docker save` writes for an image of two files in one layer.
func saveImage(t *testing.T, path, binary string) {
	t.Helper()
	content, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	layer := tarOf(t, map[string][]byte{"hello": content, "etc/image": []byte("inside")})
	config, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux",
		"config": map[string]any{"Env": []string{"FROM=image"}, "Cmd": []string{"/hello"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}},
	})
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("%x.json", sha256.Sum256(config))
	manifest, err := json.Marshal([]map[string]any{{"Config": name, "RepoTags": []string{"hello:latest"}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		t.Fatal(err)
	}
	image := tarOf(t, map[string][]byte{name: config, "layer.tar": layer, "manifest.json": manifest})
	if err := os.WriteFile(path, image, 0o644); err != nil {
		t.Fatal(err)
	}
}

func tarOf(t *testing.T, files map[string][]byte) []byte {
	t.Helper()
	var buffer bytes.Buffer
	w := tar.NewWriter(&buffer)
	for name, content := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(content)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buffer.Bytes()
}

// TestDirectoryRoot: the files of the root itself stay untouched, changes travel.
func TestDirectoryRoot(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	root := directory(t)
	for _, tree := range []string{"bin", "lib", "lib64", "usr"} {
		if target, err := os.Readlink("/" + tree); err == nil {
			if err := os.Symlink(target, filepath.Join(root, tree)); err != nil {
				t.Fatal(err)
			}
			continue
		}
	}
	if err := tool(nil, "sh", "-c", `mkdir -p "$0/usr/bin" "$0/usr/lib/x86_64-linux-gnu" "$0/usr/lib64" "$0/etc" && cd /usr/bin && cp sh dash sleep cat "$0/usr/bin" && cp -a /usr/lib64/. "$0/usr/lib64/" && cp -L /lib/x86_64-linux-gnu/libc.so.6 /lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 "$0/usr/lib/x86_64-linux-gnu"`, root); err != nil {
		t.Skip(err) // no usr-merged Debian
	}
	job := p.submit("--root", "dir:"+root, "--", "/bin/sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; echo $i > /count; sleep 0.02; done")
	p.waitLines(job, 5)
	p.checkpoint(job)
	p.run("restart", job, "--cloud", p.otherCloud(job))
	p.moves(job)
	counts(t, p.output(job))
	if _, err := os.Stat(filepath.Join(root, "count")); err == nil {
		t.Error("the job has written into the directory that is its root")
	}
}

func TestRetentionKeepsTheNewest(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit(append([]string{"--keep", "2"}, counter...)...)
	var ids []string
	for i := range 4 {
		p.waitLines(job, 3*i+1)
		ids = append(ids, p.checkpoint(job).ID)
	}
	var kept []string
	for _, c := range decode[[]api.Checkpoint](p, "checkpoints", job) {
		kept = append(kept, c.ID)
	}
	if len(kept) != 2 || !strings.Contains(strings.Join(kept, " "), ids[2]) || !strings.Contains(strings.Join(kept, " "), ids[3]) {
		t.Errorf("kept %v, expected the newest two of %v", kept, ids)
	}
	p.run("restart", job, "--from", ids[2])
	p.moves(job)
	counts(t, p.output(job))
	if got := p.try("restart", job, "--from", ids[0]); got.status != notFound {
		t.Errorf("restart from a dropped checkpoint: exit status %d, expected %d: %s", got.status, notFound, got.stderr)
	}
}

// leavesNothing waits until a removed job has neither cgroups nor files: rm
// returns once that is ordered, and the nodes do it as soon as they can.
func (p *platform) leavesNothing(job, state string) {
	p.t.Helper()
	var left []string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		left = nil
		for _, root := range []string{"/sys/fs/cgroup", state} {
			_ = filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
				if err == nil && strings.Contains(filepath.Base(path), job) {
					left = append(left, path)
				}
				return nil // other jobs' files come and go meanwhile
			})
		}
		if len(left) == 0 {
			return
		}
	}
	p.t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
}

// TestNothingRemainsOfARemovedJob looks for the job's processes, cgroups and files.
func TestNothingRemainsOfARemovedJob(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.run(append([]string{"submit"}, counter...)...)
	p.waitLines(job, 2)
	p.checkpoint(job)
	p.run("restart", job)
	p.run("kill", job)
	p.run("rm", job)
	p.leavesNothing(job, filepath.Join(shared.dir, "state"))
	if got := p.try("inspect", job); got.status != notFound {
		t.Errorf("inspect of a removed job: exit status %d, expected %d", got.status, notFound)
	}
}
