package criu

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

const dumperVariable = "DORMOUSE_CRIU_TEST_DUMPER"

// dumper is what a process that dumps and is then killed needs to know.
type dumper struct {
	Options Options
	Request DumpRequest
}

// dumpAndHang runs in a process of its own: it dumps up to the last event, says
// so and waits for its end.
func dumpAndHang(encoded string) error {
	var d dumper
	if err := json.Unmarshal([]byte(encoded), &d); err != nil {
		return err
	}
	e, err := New(context.Background(), d.Options)
	if err != nil {
		return err
	}
	d.Request.Notify = func(_ context.Context, event Event, _ int) error {
		if event == EventPostDump {
			fmt.Println("dumped")
			select {}
		}
		return nil
	}
	_, err = e.Dump(context.Background(), d.Request)
	return fmt.Errorf("the dump ended: %w", err)
}

// interruptedDump leaves a dump behind whose client was killed. The CRIU of it
// is stopped if hold is set: it does not notice yet.
func interruptedDump(t *testing.T, s *sandbox, hold bool) DumpRequest {
	t.Helper()
	r := s.request()
	r.LeaveRunning = true
	encoded, err := json.Marshal(dumper{Options{Path: s.engine.path, Libexec: s.engine.libexec, Shim: s.engine.shim}, r})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{dumperVariable + "=" + string(encoded)}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("the dumper said %q, %v", line, err)
	}
	if hold {
		signalCRIU(r.ImagesDir, unix.SIGSTOP)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	return r
}

func TestRecoverAfterTheEndOfTheAgent(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "tcp")
	s.moreLines(2)
	s.freeze()
	r := interruptedDump(t, s, false)
	if err := e.Recover(t.Context(), RecoverRequest{Pid: s.pid, WorkDir: r.ImagesDir}); err != nil {
		t.Fatal(err)
	}
	if !s.frozen() {
		t.Error("the cgroup is not frozen any more")
	}
	s.thaw()
	s.moreLines(3)
	again := s.request()
	mustDump(t, s, again)
	s.restore(again.ImagesDir).moreLines(3)
}

func TestRecoverWaitsForALeftoverCRIU(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "counter")
	r := interruptedDump(t, s, true)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(fmt.Errorf("enough waited"))
	if err := e.Recover(ctx, RecoverRequest{Pid: s.pid, WorkDir: r.ImagesDir}); err == nil {
		t.Error("it does not wait for a CRIU that is still there")
	}
	signalCRIU(r.ImagesDir, unix.SIGCONT)
	if err := e.Recover(t.Context(), RecoverRequest{Pid: s.pid, WorkDir: r.ImagesDir}); err != nil {
		t.Fatal(err)
	}
	checkCounted(t, s.moreLines(3))
}

func TestRecoverAfterTheEndOfAgentAndCRIU(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, objects(t), "plain")
	r := interruptedDump(t, s, true)
	signalCRIU(r.ImagesDir, unix.SIGKILL)
	if err := e.Recover(t.Context(), RecoverRequest{Pid: s.pid, WorkDir: r.ImagesDir}); err != nil {
		t.Fatal(err)
	}
	pids, err := treePIDs(s.pid)
	if err != nil {
		t.Fatal(err)
	}
	g, err := newGuard(pids, "")
	if err != nil {
		t.Fatal(err)
	}
	defer g.close()
	for _, held := range g.sockets {
		if mode, _ := unix.GetsockoptInt(held.fd, unix.IPPROTO_TCP, unix.TCP_REPAIR); mode != 0 {
			t.Error("a socket is still in repair mode")
		}
	}
	if len(g.sockets) != 4 {
		t.Errorf("%d TCP sockets, expected 4", len(g.sockets))
	}
	mustDump(t, s, s.request())
}
