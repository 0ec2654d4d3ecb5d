package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// numbers checks that lines count up from 0 without a gap or a repetition.
func checkCounted(t *testing.T, lines []string) {
	t.Helper()
	for i, line := range lines {
		if line != strconv.Itoa(i) {
			t.Fatalf("line %d is %q: output was lost or repeated", i, line)
		}
	}
}

func mustDump(t *testing.T, s *sandbox, r DumpRequest) *DumpResult {
	t.Helper()
	result, err := s.engine.Dump(t.Context(), r)
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(r.ImagesDir, dumpLog))
		t.Fatalf("dump: %v\n%s", err, tail(string(log)))
	}
	return result
}

func TestDumpKillsTheTreeAndRestoreContinuesIt(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "counter")
	s.moreLines(5)
	r := s.request()
	result := mustDump(t, s, r)
	if pids, _ := CgroupPIDs(s.cgroup); len(pids) != 0 {
		t.Errorf("processes %v live after a dump that does not leave running", pids)
	}
	if result.Stats.Frozen <= 0 || result.Stats.PagesWritten == 0 || result.Bytes < 4096 {
		t.Errorf("statistics are missing: %+v, %d bytes", result.Stats, result.Bytes)
	}
	if len(result.Tree) != 1 || result.Tree[0].PID != 1 {
		t.Errorf("tree is %+v, expected one process with pid 1", result.Tree)
	}
	restored := s.restore(r.ImagesDir)
	checkCounted(t, restored.moreLines(20))
	pids, err := CgroupPIDs(restored.cgroup)
	if err != nil || !slices.Equal(pids, []int{restored.pid}) {
		t.Errorf("the new cgroup has %v (%v), expected only %d", pids, err, restored.pid)
	}
}

func TestSecondGenerationOfARestoredTree(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "counter")
	s.moreLines(2)
	for range 3 {
		r := s.request()
		mustDump(t, s, r)
		s = s.restore(r.ImagesDir)
		checkCounted(t, s.moreLines(5))
	}
}

func TestLeaveRunningKeepsTheCgroupAsItWas(t *testing.T) {
	e := newEngine(t)
	for _, frozen := range []bool{true, false} {
		t.Run(fmt.Sprintf("frozen=%v", frozen), func(t *testing.T) {
			s := startSandbox(t, e, job(t), "counter")
			s.moreLines(2)
			if frozen {
				s.freeze()
			}
			r := s.request()
			r.LeaveRunning = true
			mustDump(t, s, r)
			if s.frozen() != frozen {
				t.Errorf("the cgroup is frozen=%v after the dump, it was %v", s.frozen(), frozen)
			}
			s.thaw()
			checkCounted(t, s.moreLines(5))
			restored := s.restore(r.ImagesDir)
			checkCounted(t, restored.moreLines(5))
		})
	}
}

func TestFreezingAtPreDumpIsKeptToo(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "tcp")
	r := s.request()
	r.LeaveRunning = true
	r.Notify = func(_ context.Context, event Event, _ int) error {
		if event == EventPreDump {
			s.freeze()
		}
		return nil
	}
	mustDump(t, s, r)
	if !s.frozen() {
		t.Error("the cgroup is thawed after the dump")
	}
	s.thaw()
	s.moreLines(3)
}

func TestPreparedDumpWaitsBeforeItTouchesAnything(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "tcp")
	r := s.request()
	r.LeaveRunning = true
	p, err := e.PrepareDump(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	s.moreLines(5)
	s.freeze()
	result, err := p.Dump(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(result.Tree) != 2 || !s.frozen() {
		t.Errorf("%d processes, frozen=%v", len(result.Tree), s.frozen())
	}
	s.thaw()
	s.moreLines(3)
	p.Abort() // too late, and harmless
}

func TestPreparedDumpCanBeGivenUp(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "counter")
	for _, end := range []string{"abort", "cancel", "kill"} {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		r := s.request()
		p, err := e.PrepareDump(ctx, r)
		if err != nil {
			t.Fatal(err)
		}
		switch end {
		case "abort":
			p.Abort()
		case "cancel":
			cancel()
			_, err = p.Dump(t.Context())
			if !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled: got %v", err)
			}
		case "kill":
			killCRIU(r.ImagesDir)
			if _, err = p.Dump(t.Context()); !errors.Is(err, ErrDied) {
				t.Errorf("killed: got %v", err)
			}
		}
		if _, err := os.Stat(filepath.Join(r.ImagesDir, runningFile)); err == nil {
			t.Errorf("%s: CRIU still works", end)
		}
		checkCounted(t, s.moreLines(3))
	}
	r := s.request()
	r.ImagesDir = "/nonexistent"
	if _, err := e.PrepareDump(t.Context(), r); err == nil {
		t.Error("a dump into a missing directory can be prepared")
	}
}

func TestTCPConnectionUnderTrafficSurvives(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "tcp")
	s.moreLines(2)
	for range 2 {
		r := s.request()
		s.freeze()
		mustDump(t, s, r)
		s = s.restore(r.ImagesDir)
		s.moreLines(5) // fails on any error of the program
	}
}

func TestJobOfAnOrdinaryUser(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "counter", "65534")
	s.moreLines(2)
	if uid, _ := statusField(procPath(s.pid, "status"), "Uid"); !strings.HasPrefix(uid, "65534") {
		t.Fatalf("the job runs as %s", uid)
	}
	r := s.request()
	mustDump(t, s, r)
	restored := s.restore(r.ImagesDir)
	checkCounted(t, restored.moreLines(5))
	if uid, _ := statusField(procPath(restored.pid, "status"), "Uid"); !strings.HasPrefix(uid, "65534") {
		t.Errorf("the restored job runs as %s", uid)
	}
}

func TestPinnedThreadsStayPinned(t *testing.T) {
	if runtime.NumCPU() < 2 {
		missing(t, "two CPUs")
	}
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "affinity")
	s.moreLines(10)
	before := cpusOf(t, s)
	r := s.request()
	mustDump(t, s, r)
	restored := s.restore(r.ImagesDir)
	seen := len(strings.Split(s.output(), "\n"))
	lines := restored.moreLines(10)[max(0, seen-1):]
	for _, line := range lines {
		if strings.HasPrefix(line, "thread") && !strings.Contains(line, " has 1 cpus") {
			t.Fatalf("a thread ran unpinned after the restore: %q", line)
		}
	}
	if after := cpusOf(t, restored); !slices.Equal(before, after) {
		t.Errorf("threads may use %v after the restore, %v before", after, before)
	}
}

// cpusOf lists the CPUs allowed to each thread, by ascending thread number.
func cpusOf(t *testing.T, s *sandbox) []string {
	t.Helper()
	tids, err := threadIDs(s.pid)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(tids)
	var list []string
	for _, tid := range tids {
		cpus, err := statusField(procPath(s.pid, "task", strconv.Itoa(tid), "status"), "Cpus_allowed_list")
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, cpus)
	}
	return list
}

func TestMonotonicClockContinues(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "monotonic")
	s.moreLines(5)
	r := s.request()
	mustDump(t, s, r)
	const asleep = 1500 * time.Millisecond
	time.Sleep(asleep) // the time that must not be seen
	restored := s.restore(r.ImagesDir)
	last := 0
	for _, line := range restored.moreLines(10) {
		now, err := strconv.Atoi(line)
		if err != nil {
			t.Fatalf("unexpected line %q", line)
		}
		if last != 0 && (now < last || now-last > 1000) {
			t.Fatalf("CLOCK_MONOTONIC went from %d to %d ms across a restore after %v", last, now, asleep)
		}
		last = now
	}
}

func TestFailedDumpLeavesTheTreeRunning(t *testing.T) {
	e := newEngine(t)
	refused := errors.New("refused by the test")
	for _, event := range []Event{EventPreDump, EventPostDump} {
		t.Run(string(event), func(t *testing.T) {
			s := startSandbox(t, e, job(t), "tcp")
			s.moreLines(2)
			s.freeze()
			r := s.request()
			r.Notify = func(_ context.Context, at Event, _ int) error {
				if at == event {
					return refused
				}
				return nil
			}
			_, err := e.Dump(t.Context(), r)
			var failure *Error
			if !errors.Is(err, refused) || !errors.As(err, &failure) {
				t.Fatalf("got %v, expected the notification's error", err)
			}
			if !s.frozen() {
				t.Error("the cgroup is thawed after the failure")
			}
			s.thaw()
			s.moreLines(5)
		})
	}
}

func TestCancelledDumpUndoesItself(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "counter", "0", "512")
	s.moreLines(2)
	s.freeze()
	r := s.request()
	ctx, cancel := context.WithCancel(t.Context())
	var written atomic.Bool
	r.Notify = func(_ context.Context, at Event, _ int) error {
		if at == EventPreDump {
			go func() { // during the dump of memory
				waitFor(t, "pages to be written", func() bool {
					n, _ := imageBytes(r.ImagesDir)
					return n > 64<<20
				})
				cancel()
			}()
		}
		written.Store(written.Load() || at == EventPostDump)
		return nil
	}
	_, err := e.Dump(ctx, r)
	if !errors.Is(err, context.Canceled) || errors.Is(err, ErrDied) {
		t.Fatalf("got %v, expected a dump that CRIU itself gave up", err)
	}
	if n, _ := imageBytes(r.ImagesDir); written.Load() || n > 500<<20 {
		t.Errorf("CRIU wrote %d MiB to the end instead of giving up", n>>20)
	}
	if !s.frozen() {
		t.Error("the cgroup is thawed after the cancellation")
	}
	s.thaw()
	checkCounted(t, s.moreLines(5))
	mustDump(t, s, s.request())
}

func TestDumpRefusesToLeaveAProcessOut(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "counter")
	outsider := exec.Command("nsenter", "-t", strconv.Itoa(s.pid), "-p", "-m", "-n", "-i", "-u", "sleep", "1000")
	if err := outsider.Start(); err != nil {
		missing(t, "nsenter")
	}
	defer outsider.Wait()
	defer outsider.Process.Kill()
	var inside []int
	waitFor(t, "sleep to run inside", func() bool {
		for _, pid := range []int{outsider.Process.Pid} {
			inside, _ = treePIDs(pid)
		}
		return len(inside) == 2 && comm(inside[1]) == "sleep"
	})
	s.write("cgroup.procs", strconv.Itoa(inside[1]))
	_, err := e.Dump(t.Context(), s.request())
	if !errors.Is(err, ErrLeftOut) || !strings.Contains(err.Error(), "sleep") {
		t.Fatalf("got %v, expected the process to be named", err)
	}
	checkCounted(t, s.moreLines(5))
}

func TestDumpOfMissingProcessSaysSo(t *testing.T) {
	e := newEngine(t)
	_, err := e.Dump(t.Context(), DumpRequest{Pid: 1 << 22, ImagesDir: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "4194304 does not exist") {
		t.Fatalf("got %v", err)
	}
}

func TestRestoreOfDamagedImagesFailsWithCRIUsWords(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "counter")
	s.moreLines(2)
	r := s.request()
	mustDump(t, s, r)
	if err := os.Truncate(filepath.Join(r.ImagesDir, "core-1.img"), 20); err != nil {
		t.Fatal(err)
	}
	failed, err := s.tryRestore(t.Context(), r.ImagesDir, nil)
	var failure *Error
	if !errors.As(err, &failure) || len(failure.Lines) == 0 || !strings.Contains(err.Error(), "core-1") {
		t.Fatalf("got %v (%+v), expected CRIU's line about core-1", err, failure)
	}
	failed.waitEmpty()
}

func TestVolumesComeFromElsewhereAndTmpfsComesAlong(t *testing.T) {
	e := newEngine(t)
	volume := func(name string) string {
		// A file system of its own, as volumes mostly are.
		dir := t.TempDir()
		if err := unix.Mount("volume", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
		if err := os.WriteFile(filepath.Join(dir, "name"), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	s := startStage(t, e, unix.CLONE_NEWNET, stage{Program: objects(t), Args: []string{"files"}, Volume: volume("first")})
	s.moreLines(2)
	r := s.request()
	r.ExternalMounts = []DumpMount{{Key: "data", Mountpoint: "/mnt"}}
	result := mustDump(t, s, r)
	if result.Bytes < 16<<20 {
		t.Errorf("the images have %d bytes, less than the contents of /tmp", result.Bytes)
	}
	restored := s.restore(r.ImagesDir, RestoreMount{Key: "data", Source: volume("second")})
	lines := restored.moreLines(3)
	if last := lines[len(lines)-1]; last != "n second" {
		t.Errorf("the restored program reads %q, expected its /tmp and the second volume", last)
	}
}

func TestPeriodicTimerWithUnreadExpiriesGoesOn(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, objects(t), "timer")
	s.moreLines(2)
	for range 2 {
		r := s.request()
		mustDump(t, s, r)
		s = s.restore(r.ImagesDir)
		s.moreLines(3)
	}
}

func TestDumpErrorsTellTheReason(t *testing.T) {
	e := newEngine(t)
	t.Run("a connection waits to be accepted", func(t *testing.T) {
		s := startSandbox(t, e, objects(t), "backlog")
		if _, err := e.Dump(t.Context(), s.request()); !errors.Is(err, ErrInFlight) {
			t.Errorf("got %v, expected ErrInFlight", err)
		}
	})
	t.Run("no space", func(t *testing.T) {
		s := startSandbox(t, e, job(t), "counter", "0", "32")
		r := s.request()
		if err := unix.Mount("small", r.ImagesDir, "tmpfs", 0, "size=4m"); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(r.ImagesDir, unix.MNT_DETACH)
		r.WorkDir = s.dir
		s.freeze()
		if _, err := e.Dump(t.Context(), r); !errors.Is(err, ErrNoSpace) {
			t.Errorf("got %v, expected ErrNoSpace", err)
		}
		s.thaw()
		checkCounted(t, s.moreLines(3))
	})
}

func TestCancelledRestoreLeavesNothing(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "tcp", "0", "64")
	s.moreLines(2)
	r := s.request()
	mustDump(t, s, r)
	for _, event := range []Event{EventPreRestore, EventPostSetupNamespaces, EventPostRestore, EventNetworkUnlock, EventPreResume} {
		ctx, cancel := context.WithCancel(t.Context())
		failed, err := s.tryRestore(ctx, r.ImagesDir, func(_ *sandbox, at Event) error {
			if at == event {
				cancel()
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		})
		cancel()
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: got %v, expected the cancellation", event, err)
		}
		failed.waitEmpty()
	}
	s.restore(r.ImagesDir).moreLines(3)
}

func TestKilledCRIUFailsTheRestore(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "tcp")
	s.moreLines(2)
	r := s.request()
	mustDump(t, s, r)
	for _, event := range []Event{EventPreRestore, EventSetupNamespaces, EventPostRestore, EventNetworkUnlock, EventPreResume} {
		failed, err := s.tryRestore(t.Context(), r.ImagesDir, func(n *sandbox, at Event) error {
			if at == event {
				killCRIU(n.dir)
			}
			return nil
		})
		if !errors.Is(err, ErrDied) {
			t.Errorf("%s: got %v, expected ErrDied", event, err)
		}
		failed.kill() // as the caller of Restore must
	}
	s.restore(r.ImagesDir).moreLines(3)
}
