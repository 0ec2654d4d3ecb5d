package starvation_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/monitor/internal/testgroup"
	"dormouse/monitor/sample"
	"dormouse/monitor/starvation"
)

// mapping in the environment makes this program a task that reads a file of
// that name, at random, through its memory.
const mapping = "MONITOR_TEST_MAPPING"

func TestMain(m *testing.M) {
	if file := os.Getenv(mapping); file != "" {
		fmt.Fprintln(os.Stderr, readAtRandom(file))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// readAtRandom makes the file and reads it until it is killed.
func readAtRandom(name string) error {
	const size = 64 << 20
	file, err := os.Create(name)
	if err != nil {
		return err
	}
	// Not zeros: those some disks do not store.
	if _, err := io.CopyN(file, rand.NewChaCha8([32]byte{}), size); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	memory, err := unix.Mmap(int(file.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	if err := unix.Madvise(memory, unix.MADV_RANDOM); err != nil {
		return err
	}
	sum := byte(0)
	for {
		for range 2000 {
			sum += memory[rand.IntN(size)]
		}
		time.Sleep(5 * time.Millisecond)
		runtime.KeepAlive(sum)
	}
}

// Short, and yet longer than the kernel takes to bring its pressures up to date.
const period = 2500 * time.Millisecond

const spin = "while :; do :; done"

// subject is one real task under observation.
type subject struct {
	name    string
	script  string
	cpus    float64 // due
	quota   float64 // its own limit from the start; 0: none
	cpu     int     // it runs on
	trouble func(*testing.T, *subject)
	want    starvation.Condition

	group     *testgroup.Group
	process   *os.Process
	collector *sample.Collector
	detector  *starvation.Detector
	file      string // where it writes how far it is; "" when it does not
}

// Real tasks side by side: all are well for a while, then some are harmed. The
// harmed ones are found within three periods, and no other is ever accused.
func TestRealTasks(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 18 seconds")
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	progress := filepath.Join(dir, "progress")
	subjects := []*subject{
		{name: "squeezed", script: spin, cpus: 1, cpu: 0, want: starvation.StarvedCPU, trouble: hog},
		{name: "throttled", script: spin, cpus: 0.4, quota: 0.4, cpu: 1, want: starvation.StarvedCPU,
			trouble: func(_ *testing.T, s *subject) { s.group.LimitCPU(0.1) }},
		{name: "live-locked", script: "n=0; while [ -e " + dir + "/go ]; do i=0; while [ $i -lt 5000 ]; do i=$((i+1)); done; n=$((n+1)); echo $n > " + progress + "; done; " + spin,
			cpus: 0.3, quota: 0.3, cpu: 1, file: progress, want: starvation.NoProgress,
			trouble: func(t *testing.T, _ *subject) {
				if err := os.Remove(filepath.Join(dir, "go")); err != nil {
					t.Error(err)
				}
			}},
		{name: "stopped", script: "while :; do sleep 0.1; done", cpus: 1, cpu: 1, want: starvation.NoProgress,
			trouble: func(t *testing.T, s *subject) {
				if err := s.process.Signal(syscall.SIGSTOP); err != nil {
					t.Error(err)
				}
			}},
		{name: "thrashing", script: mapping + "=" + filepath.Join(dir, "mapped") + " exec " + program, cpus: 1, cpu: 1, want: starvation.StarvedMemory,
			trouble: func(_ *testing.T, s *subject) { s.group.LimitMemory(24 << 20) }},
		{name: "idle", script: "exec sleep 60", cpus: 1, cpu: 0, want: starvation.Healthy},
		{name: "cron-like", script: "while :; do i=0; while [ $i -lt 5000 ]; do i=$((i+1)); done; sleep 3; done", cpus: 1, cpu: 1, want: starvation.Healthy},
		{name: "bursty", script: "while :; do i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 0.3; done", cpus: 1, cpu: 1, want: starvation.Healthy},
	}
	if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, s := range subjects {
		s.start(t)
	}
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	// The first samples, a period of start-up, three of good health, three of harm. A
	// machine that is too busy to take the samples in time gets one more. To stand still
	// takes twice the longest period before, less period/20: with one that was too long by
	// the slack and two that are too short by it together, that is just reached.
	const harm, end, slack = 4, 7, period / 60
	begun, late := time.Now(), time.Duration(0)
	for n := 0; n <= end || n == end+1 && late > slack; n++ {
		if n > 0 {
			<-ticker.C
		}
		feed(t, subjects)
		late = max(late, time.Since(begun)-time.Duration(n)*period)
		for _, s := range subjects {
			if v := s.detector.Verdict(); v.Troubled() && (n <= harm || s.trouble == nil) {
				t.Errorf("accused while it is well: %s\n%+v", v.Explanation, v.Figures)
			}
			if n == harm && s.trouble != nil {
				s.trouble(t, s)
			}
		}
	}
	for _, s := range subjects {
		v := s.detector.Verdict()
		if v.Condition != s.want {
			t.Errorf("%s: %s, want %s: %s\n%+v", s.name, v.Condition, s.want, v.Explanation, v.Figures)
			continue
		}
		t.Logf("%s: %s", v.Condition, v.Explanation)
	}
}

func (s *subject) start(t *testing.T) {
	s.group = testgroup.New(t, "cpu", "memory")
	if s.quota > 0 {
		s.group.LimitCPU(s.quota)
	}
	s.process = s.group.Start(s.script)
	testgroup.Pin(t, s.process.Pid, s.cpu)
	// Whatever else this machine does must not make a healthy task starve.
	s.group.Favour(20)
	s.collector = sample.NewCollector(sample.Group{Unified: s.group.Unified, V1: s.group.V1})
	s.detector = starvation.NewDetector(starvation.Config{Name: s.name, CPUs: s.cpus, Period: period})
}

// hog on the subject's CPU.
func hog(t *testing.T, s *subject) {
	group := testgroup.New(t, "cpu")
	group.Favour(80)
	testgroup.Pin(t, group.Start(spin).Pid, s.cpu)
}

// feed every detector with what is measured now.
func feed(t *testing.T, subjects []*subject) {
	t.Helper()
	host, err := sample.ReadHost(t.Context(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range subjects {
		task, err := s.collector.Collect(time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if s.file != "" {
			task.Progress = reported(t, s.file)
		}
		s.detector.Feed(task, host)
	}
}

// reported is the number in file; nil before there is one, or while it is just
// being written.
func reported(t *testing.T, file string) *float64 {
	t.Helper()
	for range 100 {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil
		}
		if n, err := strconv.ParseFloat(strings.TrimSpace(string(text)), 64); err == nil {
			return &n
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("%s holds no number", file)
	return nil
}
