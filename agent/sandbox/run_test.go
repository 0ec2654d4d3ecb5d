package sandbox_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"dormouse/agent/sandbox"
)

// copyProgram puts programs and the libraries they need into a root.
func copyProgram(t *testing.T, root string, programs ...string) {
	t.Helper()
	files := map[string]bool{}
	for _, program := range programs {
		files[program] = true
		out, err := exec.Command("ldd", program).Output()
		if err != nil {
			t.Fatalf("ldd %s: %v", program, err)
		}
		for _, word := range strings.Fields(string(out)) {
			if strings.HasPrefix(word, "/") {
				files[word] = true
			}
		}
	}
	for file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(root, file)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, content, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

func TestZombiesAreReaped(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config(`
for i in 1 2 3 4 5 6 7 8 9 10; do ( ( : ) & ) ; done
setsid sh -c 'sleep 0.05' &
echo ready; sleep 1000`))
	b.logs(s, "ready")
	b.eventually("only pid 1, the shell and its two sleeps are left", func() bool {
		pids, err := s.Pids()
		if err != nil {
			t.Fatal(err)
		}
		zombies := 0
		for _, pid := range pids {
			if stat, err := os.ReadFile("/proc/" + itoa(pid) + "/stat"); err == nil && strings.Contains(string(stat), ") Z ") {
				zombies++
			}
		}
		return zombies == 0 && len(pids) <= 4
	})
}

func itoa(n int) string {
	var digits []byte
	for ; n > 0; n /= 10 {
		digits = append([]byte{byte('0' + n%10)}, digits...)
	}
	return string(digits)
}

func TestSignalsReachTheCommand(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config(`
trap 'echo got USR1' USR1; trap 'echo got HUP' HUP; trap 'echo got URG' URG; trap 'echo got TERM; exit 5' TERM
echo ready; while :; do sleep 0.02; done`))
	b.logs(s, "ready")
	for _, sig := range []syscall.Signal{syscall.SIGUSR1, syscall.SIGHUP, syscall.SIGURG, syscall.SIGTERM} {
		if err := s.Signal(b.context(), sig); err != nil {
			t.Fatalf("Signal(%v): %v", sig, err)
		}
		name := map[syscall.Signal]string{syscall.SIGUSR1: "USR1", syscall.SIGHUP: "HUP", syscall.SIGURG: "URG", syscall.SIGTERM: "TERM"}[sig]
		b.logs(s, "got "+name)
	}
	if got := b.wait(s); got.Code != 5 || got.Signal != "" {
		t.Errorf("got %+v, want the command's own exit status 5", got)
	}
}

func TestStopAndContinue(t *testing.T) {
	b := newBench(t)
	cfg := b.config("")
	cfg.Command = []string{"sleep", "1000"}
	s := b.start(cfg)
	stopped := func() bool {
		_, out, _ := b.exec(s, "grep -h '(sleep)' /proc/[0-9]*/stat")
		return strings.Contains(out, ") T ")
	}
	if err := s.Signal(b.context(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	b.eventually("the command stops", stopped)
	if err := s.Signal(b.context(), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	b.eventually("the command goes on", func() bool { return !stopped() })
}

func TestKillEndsEverythingEvenFrozen(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("trap '' TERM; setsid sleep 1000 & sleep 1000"))
	if err := s.Freeze(b.context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Signal(b.context(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	got := b.wait(s)
	if got.Code != 137 || got.Signal != "SIGKILL" || got.OOMKilled {
		t.Errorf("got %+v", got)
	}
	if pids, err := s.Pids(); err != nil || len(pids) != 0 {
		t.Errorf("left: %v %v", pids, err)
	}
}

func TestFreezeStopsTime(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("while :; do echo tick; done"))
	b.logs(s, "tick")
	if err := s.Freeze(b.context()); err != nil {
		t.Fatal(err)
	}
	if frozen, err := s.Frozen(); err != nil || !frozen {
		t.Errorf("Frozen: %v %v", frozen, err)
	}
	before := len(b.log(s, "stdout"))
	time.Sleep(50 * time.Millisecond) // time in which it would write, were it not frozen
	if after := len(b.log(s, "stdout")); after != before {
		t.Errorf("a frozen task wrote %d bytes", after-before)
	}
	if err := s.Thaw(b.context()); err != nil {
		t.Fatal(err)
	}
	b.eventually("it writes again", func() bool { return len(b.log(s, "stdout")) > before })
}

func TestCPULimitHolds(t *testing.T) {
	b := newBench(t)
	cfg := b.config("while :; do :; done & while :; do :; done")
	cfg.CPUs = 0.25
	s := b.start(cfg)
	used := func() time.Duration {
		pids, err := s.Pids()
		if err != nil {
			t.Fatal(err)
		}
		var ticks int
		for _, pid := range pids {
			stat, err := os.ReadFile("/proc/" + itoa(pid) + "/stat")
			if err != nil {
				t.Fatal(err)
			}
			fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')'):]))
			for _, f := range fields[12:14] { // utime, stime
				n := 0
				for _, c := range f {
					n = n*10 + int(c-'0')
				}
				ticks += n
			}
		}
		return time.Duration(ticks) * 10 * time.Millisecond
	}
	b.eventually("two loops run", func() bool { pids, _ := s.Pids(); return len(pids) == 3 })
	began, before := time.Now(), used()
	time.Sleep(time.Second)
	share := float64(used()-before) / float64(time.Since(began))
	if share > 0.33 || share < 0.05 {
		t.Errorf("two loops got %.2f processors, limit 0.25", share)
	}
}

func TestRealtimeSchedulingForThoseWhoMay(t *testing.T) {
	b := newBench(t)
	script := "chrt -f 5 sh -c 'chrt -p $$'"
	if _, err := exec.LookPath("chrt"); err != nil {
		missing(t, "this test needs chrt (util-linux)")
	}
	cfg := b.config(script)
	cfg.CapAdd = []string{"SYS_NICE"}
	contains(t, "with SYS_NICE", b.output(cfg), "SCHED_FIFO")
	if b.wait(b.start(b.config(script))).Code == 0 {
		t.Error("real time without SYS_NICE")
	}
}

func TestMemoryLimitHoldsAndIsReported(t *testing.T) {
	b := newBench(t)
	// One process alone: of several that ask for memory the kernel at times kills
	// a second one, while the first has not given its memory back yet. That may
	// be pid 1, which is the end of the sandbox.
	const hog = "dd if=/dev/zero of=/dev/null bs=200M count=1"
	cfg := b.config("exec " + hog)
	cfg.MemBytes = 32 << 20
	got := b.wait(b.start(cfg))
	if got.Code != 137 || got.Signal != "SIGKILL" || !got.OOMKilled {
		t.Errorf("got %+v, want a kill for want of memory", got)
	}
	contains(t, "reason", got.Reason, "memory limit of 33554432 bytes")

	// The command outlived its child and failed because of that.
	for script, code := range map[string]int{"exit $?": 137, "exit 3": 3, "exit 0": 0} {
		cfg := b.config(hog + "; " + script)
		cfg.MemBytes = 32 << 20
		got := b.wait(b.start(cfg))
		if got.Code != code || got.OOMKilled != (code == 137) {
			t.Errorf("%s: got %+v, want code %d", script, got, code)
		}
		if code == 0 {
			expect(t, "reason", got.Reason, "")
			continue
		}
		contains(t, "reason", got.Reason, "because the memory limit of 33554432 bytes was reached")
	}
}

func TestMemoryOfTmpCounts(t *testing.T) {
	b := newBench(t)
	cfg := b.config("head -c 100000000 /dev/zero > /tmp/big")
	cfg.MemBytes = 32 << 20
	if got := b.wait(b.start(cfg)); got.Code == 0 {
		t.Error("100 MB of tmpfs fitted into 32 MiB of memory")
	}
}

func TestExec(t *testing.T) {
	b := newBench(t)
	cfg := b.config("exec sleep 1000")
	cfg.User, cfg.Env = "daemon", map[string]string{"A": "a", "B": "b"}
	s := b.start(cfg)
	var out, errs bytes.Buffer
	code, err := s.Exec(b.context(), sandbox.ExecRequest{
		Command: []string{"sh", "-c", "cat; echo $A$B $(id -u) $PPID; echo oops >&2; exit 9"},
		Env:     map[string]string{"B": "B"}, Stdin: strings.NewReader("input\n"), Stdout: &out, Stderr: &errs,
	})
	if err != nil || code != 9 {
		t.Fatalf("got %d, %v, want exit code 9", code, err)
	}
	expect(t, "stdout", out.String(), "input\naB 1 1\n")
	expect(t, "stderr", errs.String(), "oops\n")
	if code, _, _ := b.exec(s, "kill -TERM $$"); code != 143 {
		t.Errorf("got %d, want 128+SIGTERM", code)
	}
	if _, err := s.Exec(b.context(), sandbox.ExecRequest{Command: []string{"no-such"}}); !errors.Is(err, sandbox.ErrCommandNotFound) {
		t.Errorf("got %v, want ErrCommandNotFound", err)
	}
}

func TestExecRelaysMuchInBothDirections(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("exec sleep 1000"))
	input := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB, many times any buffer
	var out bytes.Buffer
	code, err := s.Exec(b.context(), sandbox.ExecRequest{Command: []string{"cat"}, Stdin: bytes.NewReader(input), Stdout: &out})
	if err != nil || code != 0 {
		t.Fatalf("%d %v", code, err)
	}
	if !bytes.Equal(out.Bytes(), input) {
		t.Errorf("%d bytes came back changed, of %d", out.Len(), len(input))
	}
}

func TestNothingStaysBehindAWholeExec(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("exec sleep 1000"))
	processes := func() int {
		pids, err := s.Pids()
		if err != nil {
			t.Error(err)
		}
		return len(pids)
	}
	before := processes()
	for name, command := range map[string]string{
		"that ends":                "trap '' HUP TERM; sleep 900 & sleep 900 & exit 3",
		"that ends with its child": "sh -c 'trap \"\" HUP; sleep 900 & exit 3'; exit 3",
		"that hangs":               "trap '' HUP TERM; sleep 900 & echo up; while :; do sleep 900; done",
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(b.context())
			defer cancel()
			out := newWatcher()
			if name == "that hangs" {
				go func() { out.await(t, "up"); cancel() }()
			}
			code, err := s.Exec(ctx, sandbox.ExecRequest{Command: []string{"sh", "-c", command}, Whole: true, Stdout: out})
			if name == "that hangs" {
				if !errors.Is(err, context.Canceled) {
					t.Errorf("it ends with %d, %v, want that it was cancelled", code, err)
				}
			} else if code != 3 || err != nil {
				t.Errorf("it ends with %d, %v, want 3", code, err)
			}
			b.eventually("nothing is left of it", func() bool { return processes() == before })
		})
	}
}

func TestExecDoesNotWaitForWhatStaysBehind(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("exec sleep 1000"))
	code, out, _ := b.exec(s, "sleep 1000 & echo done")
	if code != 0 || out != "done\n" {
		t.Errorf("%d %q", code, out)
	}
}

func TestExecWithTerminal(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("exec sleep 1000"))
	out := newWatcher()
	input, typed := io.Pipe()
	sizes := make(chan sandbox.Size)
	done := make(chan error, 1)
	go func() {
		code, err := s.Exec(b.context(), sandbox.ExecRequest{
			Command: []string{"sh", "-c", "tty; stty size; while read x; do echo got $x; stty size; done; exit 4"},
			TTY:     true, Size: sandbox.Size{Rows: 11, Cols: 22}, Stdin: input, Stdout: out, Resize: sizes,
		})
		if err == nil && code != 4 {
			err = errors.New("wrong exit code")
		}
		done <- err
	}()
	out.await(t, "/dev/pts/0")
	out.await(t, "11 22")
	sizes <- sandbox.Size{Rows: 33, Cols: 44}
	io.WriteString(typed, "hello\n")
	out.await(t, "got hello")
	b.eventually("the terminal has its new size", func() bool {
		io.WriteString(typed, "and?\n")
		return strings.Contains(out.String(), "33 44")
	})
	typed.Close() // ^D
	if err := <-done; err != nil {
		t.Errorf("%v; output %q", err, out)
	}
}

// watcher is an output whose reader waits for text.
type watcher struct {
	mu      sync.Mutex
	changed *sync.Cond
	text    bytes.Buffer
}

func newWatcher() *watcher {
	w := &watcher{}
	w.changed = sync.NewCond(&w.mu)
	return w
}

func (w *watcher) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.changed.Broadcast()
	return w.text.Write(p)
}

func (w *watcher) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text.String()
}

func (w *watcher) await(t *testing.T, text string) {
	t.Helper()
	expired := false
	timer := time.AfterFunc(15*time.Second, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		expired = true
		w.changed.Broadcast()
	})
	defer timer.Stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	for !strings.Contains(w.text.String(), text) {
		if expired {
			t.Fatalf("%q did not come; got %q", text, w.text.String())
		}
		w.changed.Wait()
	}
}

func TestExecEndsWithTheSandbox(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("exec sleep 1000"))
	code, out := make(chan int, 1), newWatcher()
	go func() {
		c, err := s.Exec(b.context(), sandbox.ExecRequest{Command: []string{"sh", "-c", "echo up; exec sleep 1000"}, Stdout: out})
		if err != nil {
			t.Error(err)
		}
		code <- c
	}()
	out.await(t, "up")
	if err := s.Signal(b.context(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if c := <-code; c != 137 {
		t.Errorf("got %d, want 137", c)
	}
}

func TestAnEndedSandboxSaysSo(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("exit 0"))
	b.wait(s)
	if s.Running() {
		t.Error("Running after the end")
	}
	_, err := s.Exec(b.context(), sandbox.ExecRequest{Command: []string{"true"}})
	for _, err := range []error{err, s.Signal(b.context(), syscall.SIGTERM)} {
		if err == nil || !strings.Contains(err.Error(), "does not run") {
			t.Errorf("got %v", err)
		}
	}
}

func TestExecIsHungUpWhenItsUserLeaves(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("exec sleep 1000"))
	ctx, leave := context.WithCancel(b.context())
	out := newWatcher()
	done := make(chan error, 1)
	go func() {
		_, err := s.Exec(ctx, sandbox.ExecRequest{Command: []string{"sh", "-c", "echo up; exec sleep 999"}, Stdout: out})
		done <- err
	}()
	out.await(t, "up")
	leave()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	b.eventually("the process is gone", func() bool {
		code, _, _ := b.exec(s, "grep -qsz '^999$' /proc/[0-9]*/cmdline")
		return code != 0
	})
}

func TestQuiesceDropsEveryConnectionAndSessionsGoOn(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("exec sleep 1000"))
	b.listen(s)
	input, typed := io.Pipe()
	out := newWatcher()
	done := make(chan int, 1)
	go func() {
		code, err := s.Exec(b.context(), sandbox.ExecRequest{Command: []string{"sh", "-c", "while read x; do echo got $x; done; exit 6"}, Stdin: input, Stdout: out})
		if err != nil {
			t.Error(err)
		}
		done <- code
	}()
	// A second session that never stops writing.
	flood, flooded := newCounter(), make(chan struct{})
	floodCtx, stopFlood := context.WithCancel(b.context())
	go func() {
		defer close(flooded)
		_, _ = s.Exec(floodCtx, sandbox.ExecRequest{Command: []string{"seq", "1", "100000000"}, Stdout: flood})
	}()
	for round := range 5 {
		word := "round" + itoa(round+1)
		io.WriteString(typed, word+"\n")
		out.await(t, "got "+word)
		if err := s.Quiesce(b.context()); err != nil {
			t.Fatal(err)
		}
		if n := connections(t, s.Pid()); n != 0 {
			t.Errorf("%d connections into the sandbox after Quiesce", n)
		}
		if err := s.Freeze(b.context()); err != nil {
			t.Fatal(err)
		}
		written := make(chan struct{})
		go func() { io.WriteString(typed, "held"+word+"\n"); close(written) }()
		if err := s.Thaw(b.context()); err != nil {
			t.Fatal(err)
		}
		if err := s.Unquiesce(b.context()); err != nil {
			t.Fatal(err)
		}
		out.await(t, "got held"+word)
		<-written
	}
	typed.Close()
	if code := <-done; code != 6 {
		t.Errorf("exit code %d, want 6", code)
	}
	stopFlood()
	<-flooded
	flood.check(t)
}

// counter checks that it is written the numbers from 1 on, without a gap.
type counter struct {
	mu   sync.Mutex
	rest []byte
	next int
	bad  string
}

func newCounter() *counter { return &counter{next: 1} }

func (c *counter) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rest = append(c.rest, p...)
	for {
		line, rest, ok := bytes.Cut(c.rest, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		if c.bad == "" && string(line) != itoa(c.next) {
			c.bad = "got " + string(line) + " in place of " + itoa(c.next)
		}
		c.next++
		c.rest = rest
	}
}

func (c *counter) check(t *testing.T) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bad != "" || c.next < 1000 {
		t.Errorf("output was lost or repeated after %d lines: %s", c.next, c.bad)
	}
}

// connections counts connected unix sockets of a process.
func connections(t *testing.T, pid int) int {
	t.Helper()
	fds, err := filepath.Glob("/proc/" + itoa(pid) + "/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	sockets := 0
	for _, fd := range fds {
		if target, _ := os.Readlink(fd); strings.HasPrefix(target, "socket:") {
			sockets++
		}
	}
	return sockets - 2 // the listeners, for the agent and for programs of the task
}

func TestAgentRestart(t *testing.T) {
	b := newBench(t)
	cfg := b.config("trap 'exit 12' USR1; echo ready; while :; do sleep 0.02; done")
	first := b.start(cfg)
	b.logs(first, "ready")
	second, err := b.newRuntime().Open(b.context(), cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if second.Pid() != first.Pid() || second.ID() != first.ID() {
		t.Errorf("found pid %d of %s, want %d of %s", second.Pid(), second.ID(), first.Pid(), first.ID())
	}
	if code, out, _ := b.exec(second, "echo alive"); code != 0 || out != "alive\n" {
		t.Errorf("exec: %d %q", code, out)
	}
	if err := second.Signal(b.context(), syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*sandbox.Sandbox{second, first} {
		if got := b.wait(s); got.Code != 12 {
			t.Errorf("got %+v, want 12", got)
		}
	}
	third, err := b.newRuntime().Open(b.context(), cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := b.wait(third); got.Code != 12 {
		t.Errorf("an agent that came after the end: got %+v, want 12", got)
	}
}

func TestOpenOfNothing(t *testing.T) {
	b := newBench(t)
	if _, err := b.runtime.Open(b.context(), filepath.Join(b.state(), "nothing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want fs.ErrNotExist", err)
	}
}

func TestOpenDoesNotTakeAnotherProcessForPid1(t *testing.T) {
	b := newBench(t)
	cfg := b.config("exec sleep 1000")
	s := b.start(cfg)
	record := filepath.Join(cfg.Dir, "sandbox.json")
	content, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	// The same number, but of a process that began at another time.
	pid := s.Pid()
	other := bytes.Replace(content, []byte(`"pid": `+itoa(pid)), []byte(`"pid": `+itoa(os.Getpid())), 1)
	if err := os.WriteFile(record, other, 0o600); err != nil {
		t.Fatal(err)
	}
	found, err := b.newRuntime().Open(b.context(), cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := found.Signal(b.context(), syscall.SIGUSR1); err == nil {
		t.Error("a stranger was signalled")
	}
	if err := os.WriteFile(record, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestDestroyIsIdempotentAndComplete(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("setsid sleep 1000 & mkdir -p /a/b; chmod 0 /a; sleep 1000"))
	pid := s.Pid()
	for range 2 {
		if err := s.Destroy(b.context(), sandbox.DestroyOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat("/proc/" + itoa(pid)); err == nil {
		t.Errorf("process %d is still there, perhaps a zombie", pid)
	}
	for _, dir := range b.cgroups() {
		if _, err := os.Stat(filepath.Join(dir, s.ID())); err == nil {
			t.Errorf("cgroup %s is still there", filepath.Join(dir, s.ID()))
		}
	}
}

// The machine may crash before a record is on the disk.
func TestASandboxWithAnEmptyRecordIsNone(t *testing.T) {
	b := newBench(t)
	s := b.create(b.config("true"))
	record := filepath.Join(s.Dir(), "sandbox.json")
	if err := os.Truncate(record, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := b.runtime.Open(b.context(), s.Dir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("opened: %v", err)
	}
	if err := os.WriteFile(record, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := b.runtime.Open(b.context(), s.Dir()); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a damaged record: %v", err)
	}
}
