package sample_test

import (
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"dormouse/monitor/internal/testgroup"
	"dormouse/monitor/sample"
)

func collect(t testing.TB, c *sample.Collector) sample.Task {
	t.Helper()
	task, err := c.Collect(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return task
}

// until calls done with fresh samples until it is content.
func until(t *testing.T, c *sample.Collector, what string, done func(sample.Task) bool) sample.Task {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		task := collect(t, c)
		if done(task) {
			return task
		}
		if time.Now().After(deadline) {
			t.Fatalf("not seen within a minute: %s; last %+v", what, task)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestARealTaskIsMeasured(t *testing.T) {
	group := testgroup.New(t, "cpu")
	hog := group.Start("while :; do :; done")
	found, err := sample.GroupOf(hog.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if found.Unified != group.Unified || found.V1["cpu"] != group.V1["cpu"] {
		t.Fatalf("the group of process %d is %+v, want %+v", hog.Pid, found, group)
	}
	c := sample.NewCollector(found)
	until(t, c, "100 ms of CPU used", func(task sample.Task) bool { return task.CPU > 100*time.Millisecond })

	before := collect(t, c)
	group.LimitCPU(0.2)
	limited := until(t, c, "waiting while limited to a fifth of a CPU", func(task sample.Task) bool {
		return task.Throttled-before.Throttled > 300*time.Millisecond
	})
	if limited.Quota != 0.2 {
		t.Errorf("quota %v, want 0.2", limited.Quota)
	}
	if limited.PSI && limited.Pressure.CPU.Some-before.Pressure.CPU.Some < 200*time.Millisecond {
		t.Errorf("throttled for %v, but pressure only %v", limited.Throttled-before.Throttled, limited.Pressure.CPU.Some-before.Pressure.CPU.Some)
	}

	if err := hog.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	until(t, c, "one stopped process", func(task sample.Task) bool { return task.Stopped == 1 && task.StoppedShare == 1 })
	group.Freeze(true)
	until(t, c, "a frozen group", func(task sample.Task) bool { return task.Frozen })
	group.Freeze(false)
}

func TestWaitingBehindAnotherIsMeasured(t *testing.T) {
	group, other := testgroup.New(t), testgroup.New(t)
	victim := group.Start("while :; do :; done")
	testgroup.Pin(t, victim.Pid, 0)
	for range 3 {
		testgroup.Pin(t, other.Start("while :; do :; done").Pid, 0)
	}
	c := sample.NewCollector(sample.Group{Unified: group.Unified})
	before := collect(t, c)
	time.Sleep(time.Second) // the time measured
	after := collect(t, c)
	wall := after.Time.Sub(before.Time).Seconds()
	used, waited := (after.CPU-before.CPU).Seconds()/wall, (after.Delay-before.Delay).Seconds()/wall
	if used > 0.5 || waited < 0.5 || used+waited > 1.2 {
		t.Errorf("beside three hogs on its CPU it used %.0f %% of the time and waited %.0f %%, want about 25 and 75", used*100, waited*100)
	}
}

func TestTheHostIsMeasured(t *testing.T) {
	host, err := sample.ReadHost(t.Context(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if host.CPUs != runtime.NumCPU() || host.Busy <= 0 || host.Idle <= 0 || host.MemoryBytes == 0 || host.MemoryAvailable > host.MemoryBytes {
		t.Errorf("measured %+v", host)
	}
	later, err := sample.ReadHost(t.Context(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if later.Busy < host.Busy || later.DiskTime < host.DiskTime || later.Steal < host.Steal {
		t.Errorf("sums went back from %+v to %+v", host, later)
	}
}

// BenchmarkNode measures 20 tasks of four processes each, and their host, as an
// agent does once a period. "%core" is the part of one core that costs at the
// default period, system time included.
func BenchmarkNode(b *testing.B) {
	const tasks = 20
	var collectors []*sample.Collector
	for range tasks {
		group := testgroup.New(b, "cpu", "memory")
		group.Start(strings.Repeat("while :; do sleep 0.1; done & ", 3) + "wait")
		collectors = append(collectors, sample.NewCollector(sample.Group{Unified: group.Unified, V1: group.V1}))
	}
	start := used(b)
	b.ResetTimer()
	rounds := 0
	for b.Loop() {
		rounds++
		for _, c := range collectors {
			if _, err := c.Collect(time.Now()); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := sample.ReadHost(b.Context(), time.Now()); err != nil {
			b.Fatal(err)
		}
	}
	share := (used(b) - start).Seconds() / float64(rounds) / sample.DefaultPeriod.Seconds()
	b.ReportMetric(share*100, "%core")
}

// used is the processor time of this process so far.
func used(t testing.TB) time.Duration {
	t.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		t.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
