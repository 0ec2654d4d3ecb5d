package starvation

import (
	"math"
	"time"

	"dormouse/monitor/sample"
)

// life is what a task does and is done to for some time: everything per second,
// so that one of them lasts as long as a test likes.
type life struct {
	used, waiting float64 // CPUs
	full          float64 // share of the time it stands still behind strangers; -1: as waiting
	throttled     float64
	quota         float64
	stolen        float64 // share of the node's time
	others        float64 // CPUs used by others
	faults        float64
	refaults      float64
	short         bool    // it is at its memory limit
	memory, io    float64 // share of the time it stands still
	operations    float64
	progress      float64 // units
	silent        bool    // reports no progress at all
	stopped       bool
	helper        bool // one of ten processes is stopped, which has never done much
	frozen        bool
	ended         bool
	excused       string
	noPSI         bool
}

// simulation turns lives into samples.
type simulation struct {
	now  time.Time
	host sample.Host
	task sample.Task
	done float64
}

// newSimulation has lived l for a second.
func newSimulation(l life) *simulation {
	s := &simulation{now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), host: sample.Host{CPUs: 2}}
	s.live(l, time.Second)
	return s
}

// live for some time.
func (s *simulation) live(l life, span time.Duration) {
	of := func(rate float64) time.Duration { return time.Duration(rate * float64(span)) }
	s.now = s.now.Add(span)
	s.task.Time, s.host.Time = s.now, s.now
	full := l.full
	if full < 0 {
		full = min(1, l.waiting)
	}
	t := &s.task
	t.PSI = !l.noPSI
	t.CPU += of(l.used)
	t.Delay += of(l.waiting)
	t.Throttled += of(l.throttled)
	t.Quota = l.quota
	if t.PSI {
		t.Pressure.CPU.Some += of(min(1, l.waiting))
		t.Pressure.CPU.Full += of(full) + 1
		t.Pressure.Memory.Full += of(l.memory)
		t.Pressure.Memory.Some += of(l.memory)
		t.Pressure.IO.Full += of(l.io)
		t.Pressure.IO.Some += of(l.io)
	}
	t.MajorFaults += uint64(l.faults * span.Seconds())
	t.Refaults += uint64(l.refaults * span.Seconds())
	t.MemoryBytes, t.MemoryLimit = 10<<20, 100<<20
	if l.short {
		t.MemoryBytes = 99 << 20
	}
	t.BlockAccounting = true
	t.Operations += uint64(l.operations * span.Seconds())
	s.done += l.progress * span.Seconds()
	t.Progress = nil
	if !l.silent {
		done := math.Floor(s.done)
		t.Progress = &done
	}
	t.Stopped, t.Frozen, t.Processes = 0, l.frozen, 2
	if l.stopped {
		t.Stopped, t.StoppedShare = 1, 1
	}
	if l.helper {
		t.Stopped, t.StoppedShare, t.Processes = 1, 0.001, 10
	}
	if l.ended {
		t.Processes = 0
	}
	t.Excused = l.excused
	busy := l.used + l.others
	s.host.Busy += of(busy)
	s.host.Idle += of(max(0, 2-busy))
	if l.stolen > 0 {
		s.host.Steal += of(busy * l.stolen / (1 - l.stolen))
	}
}
