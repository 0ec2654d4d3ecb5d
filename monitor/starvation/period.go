package starvation

import (
	"time"

	"dormouse/monitor/sample"
)

// point is one moment's samples.
type point struct {
	task sample.Task
	host sample.Host
}

// pressureLag is how old the sums of PSI files may be: the kernel brings them up
// to date at most every two seconds (PSI_FREQ).
const pressureLag = 2 * time.Second

// Figures are what happened to a task in a span of time. Shares are of that
// span, 0 to 1. A normal is negative while it is not known.
type Figures struct {
	Span time.Duration

	Due       float64 // CPUs the task may count on
	CPU       float64 // CPUs used
	Waited    float64 // share of the time its threads were ready in which they did not run
	Missed    float64 // share of the CPU time wanted and due that it did not get
	Throttled float64 // share in which its own quota held it back
	Quota     float64 // CPUs, at the end of the span; 0: none
	Stolen    float64 // share of the machine's running time taken by the hypervisor

	MemoryStall float64 // share in which it stood still for memory
	MajorFaults float64 // per second
	Refaults    float64 // pages a second that were taken from it and needed again
	MemoryUsed  float64 // share of its limit, at the end of the span; 0 without limit
	MemoryShort bool    // it is at its limit, or the machine has hardly any left
	// FaultStall is the share in which it stood still for memory or for I/O, if
	// most of its major faults fetched back pages it had lost to a shortage: on a
	// quick disk the kernel books little of that as waiting for memory.
	FaultStall float64
	IOStall    float64 // share in which it stood still for I/O
	IOLatency  float64 // seconds per operation of up to 128 KiB; 0: none was made

	Reports  bool    // it reports progress
	Progress float64 // units per minute

	Stopped bool // by a signal, a tracer or the freezer

	NormalCPU, NormalWaited, NormalMemoryStall, NormalMajorFaults float64
	NormalIOStall, NormalIOLatency, NormalProgress                float64
}

// between computes the figures from one moment to another. due is what the task
// may count on; 0 leaves the whole machine.
func between(from, to point, due float64) Figures {
	f := Figures{Span: to.task.Time.Sub(from.task.Time), Quota: to.task.Quota, Due: due}
	if f.Due <= 0 || to.host.CPUs > 0 && f.Due > float64(to.host.CPUs) {
		f.Due = float64(max(1, to.host.CPUs))
	}
	f.cpu(from, to)
	f.io(from, to)
	f.memory(from, to)
	f.Stopped = stopped(to.task)
	if a, b := from.task.Progress, to.task.Progress; a != nil && b != nil {
		f.Reports = true
		f.Progress = max(0, *b-*a) / f.Span.Minutes()
	}
	return f
}

// share of span, at most all of it. Times measured a moment apart may exceed it.
func (f *Figures) share(span time.Duration) float64 {
	return min(1, max(0, span.Seconds()/f.Span.Seconds()))
}

func (f *Figures) cpu(from, to point) {
	a, b := from.task, to.task
	seconds := f.Span.Seconds()
	f.CPU = (b.CPU - a.CPU).Seconds() / seconds
	if steal, busy := to.host.Steal-from.host.Steal, to.host.Busy-from.host.Busy; known(from, to) && steal > 0 {
		f.Stolen = steal.Seconds() / (steal + busy).Seconds()
	}
	// At least one thread waited in that share of the time, so one or more did on
	// average: the better figure where threads end before they are read.
	waiting := max((b.Delay-a.Delay).Seconds()/seconds, f.share(b.Pressure.CPU.Some-a.Pressure.CPU.Some))
	ready := f.CPU + waiting
	if ready == 0 {
		return
	}
	// The kernel adds up the time on every CPU the group was held back on.
	on := max(1, min(ready, float64(to.host.CPUs)))
	f.Throttled = f.share(time.Duration(float64(b.Throttled-a.Throttled) / on))
	f.Waited = waiting / max(1, ready)
	f.Waited += (1 - f.Waited) * f.Stolen * min(1, f.CPU)
	wanted := min(f.Due, ready)
	unmet := min(wanted-min(f.CPU, wanted), f.strangers(from, to, ready))
	got := (wanted - unmet) * (1 - f.Stolen)
	f.Missed = (wanted - got) / max(wanted, min(1, f.Due))
}

// strangers bounds the CPUs' worth of time others than the task itself can have
// kept from it. Its own quota is a stranger only when it gives less than is due:
// else the task has it in its hands to want the CPU evenly.
func (f *Figures) strangers(from, to point, ready float64) float64 {
	own := 0.0
	if f.Quota >= 0.99*f.Due {
		own = f.Throttled
	}
	full := to.task.Pressure.CPU.Full - from.task.Pressure.CPU.Full
	// Kernels before 5.13 do not account "full" for the CPU: it stays 0.
	if to.task.PSI && to.task.Pressure.CPU.Full > 0 && f.Span >= pressureLag {
		return max(0, f.share(full)-own) * min(f.Due, max(1, ready))
	}
	if !known(from, to) {
		return (1 - own) * f.Due
	}
	busy := to.host.Busy - from.host.Busy + to.host.Steal - from.host.Steal
	others := max(0, busy.Seconds()/f.Span.Seconds()-f.CPU)
	return others + (f.Throttled-own)*f.Due
}

// known reports whether the host was measured at both moments.
func known(from, to point) bool {
	return !from.host.Time.IsZero() && to.host.Time.After(from.host.Time)
}

func (f *Figures) memory(from, to point) {
	a, b := from.task, to.task
	f.MemoryStall = f.share(b.Pressure.Memory.Full - a.Pressure.Memory.Full)
	f.MajorFaults = float64(b.MajorFaults-a.MajorFaults) / f.Span.Seconds()
	f.Refaults = float64(b.Refaults-a.Refaults) / f.Span.Seconds()
	if b.MemoryLimit > 0 {
		f.MemoryUsed = float64(b.MemoryBytes) / float64(b.MemoryLimit)
	}
	host := to.host
	f.MemoryShort = f.MemoryUsed > 0.9 || host.MemoryBytes > 0 && host.MemoryAvailable < host.MemoryBytes/20
	if f.MemoryShort && f.Refaults > 0 && f.Refaults >= f.MajorFaults/2 {
		f.FaultStall = min(1, f.MemoryStall+f.IOStall)
	}
}

func (f *Figures) io(from, to point) {
	a, b := from.task, to.task
	switch delay := b.BlockDelay - a.BlockDelay; {
	case b.PSI:
		f.IOStall = f.share(b.Pressure.IO.Full - a.Pressure.IO.Full)
	case delay > 0:
		f.IOStall = f.share(delay)
	case a.Blocked > 0 && b.Blocked > 0 && b.Running == 0:
		f.IOStall = max(0, 1-f.CPU)
	}
	if !b.BlockAccounting {
		f.hostLatency(from, to)
		return
	}
	const large = 128 << 10
	bytes := float64(b.ReadBytes - a.ReadBytes + b.WriteBytes - a.WriteBytes)
	operations := max(float64(b.Operations-a.Operations), bytes/large)
	if stalled := f.IOStall * f.Span.Seconds(); operations > 0 || stalled > 0 {
		f.IOLatency = stalled / max(1, operations)
	}
}

// hostLatency stands for the task's where its group has no I/O accounting.
func (f *Figures) hostLatency(from, to point) {
	if operations := to.host.DiskOperations - from.host.DiskOperations; known(from, to) && operations > 0 {
		f.IOLatency = (to.host.DiskTime - from.host.DiskTime).Seconds() / float64(operations)
	}
}

// stopped reports whether the task as a whole is held: frozen, or stopped in
// what does its work. One process (an init, a shell) that waits for the
// stopped ones does not change that.
func stopped(task sample.Task) bool {
	if task.Frozen {
		return true
	}
	return task.Stopped > 0 && (2*task.Stopped >= task.Processes-1 || task.StoppedShare >= 0.1)
}

// restarted reports whether the sums began anew: another collector, or the
// same task on another node.
func restarted(from, to point) bool {
	a, b := from.task, to.task
	return b.CPU < a.CPU || b.Delay < a.Delay || b.MajorFaults < a.MajorFaults || b.Refaults < a.Refaults ||
		b.ReadBytes < a.ReadBytes || b.WriteBytes < a.WriteBytes || b.Operations < a.Operations ||
		a.PSI != b.PSI || a.BlockAccounting != b.BlockAccounting ||
		a.Progress != nil && b.Progress != nil && *b.Progress < *a.Progress ||
		known(from, to) && (to.host.Busy < from.host.Busy || to.host.DiskOperations < from.host.DiskOperations)
}
