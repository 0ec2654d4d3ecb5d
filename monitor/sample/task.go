package sample

import "time"

// DefaultPeriod is how often a task is measured unless its job says otherwise:
// long enough for the scheduler's unevenness to average out, short enough that a
// verdict over three periods comes within half a minute.
const DefaultPeriod = 10 * time.Second

// Task is what was measured of one task. Figures are sums unless they say
// otherwise: when they began does not matter, only their differences tell
// anything. What this machine does not tell is zero.
type Task struct {
	Time time.Time

	CPU       time.Duration // used, all threads
	Delay     time.Duration // runnable but not running, all threads
	Throttled time.Duration // held back by the group's own quota
	Quota     float64       // CPUs the group may use at present; 0: no limit
	Switches  uint64        // times a thread was put on a CPU

	PSI      bool // the pressures below were measured
	Pressure Pressures

	MajorFaults uint64 // page faults that had to wait for a device
	Refaults    uint64 // pages taken away and needed again
	MemoryBytes uint64 // at present, page cache included
	MemoryLimit uint64 // at present; 0: no limit
	SwapBytes   uint64 // at present

	BlockDelay time.Duration // all threads, waiting for block I/O; 0 without delay accounting
	ReadBytes  uint64
	WriteBytes uint64
	// BlockAccounting: the group counts its own operations on block devices.
	// Without it Operations is 0, and the bytes are what the present processes made
	// the page cache fetch and what they dirtied.
	BlockAccounting bool
	Operations      uint64

	Processes int // at present, ended ones not counted
	Threads   int
	Running   int // threads running or runnable at this instant
	Sleeping  int // threads waiting for an event
	Blocked   int // threads in uninterruptible sleep, mostly waiting for I/O
	Stopped   int // processes stopped by a signal or a tracer
	// StoppedShare is the part of the CPU time of all present processes that was
	// used by those now stopped, 0 to 1.
	StoppedShare float64
	Frozen       bool // the group is frozen

	// Progress is what the task itself reports (units of its own choosing, a sum);
	// the collector leaves it to whoever hears the report. Nil: it reports none.
	Progress *float64
	// Excused says why nothing may be concluded from the time since the sample
	// before: "checkpoint", "stopped on purpose", "shutting down". Set by the
	// collector's caller; empty: nothing special.
	Excused string
}

// Pressures are the sums of pressure stall information (PSI, kernel
// Documentation/accounting/psi.rst) of a group or a machine.
type Pressures struct {
	CPU, Memory, IO Pressure
}

// Pressure on one resource.
type Pressure struct {
	Some time.Duration // at least one thread waited
	Full time.Duration // all threads that had something to do waited at once
}

// Host is what was measured of the machine. Figures are sums since it booted,
// unless they say otherwise.
type Host struct {
	Time time.Time

	CPUs   int
	Busy   time.Duration // all CPUs
	Idle   time.Duration // all CPUs, waiting for I/O included
	IOWait time.Duration // part of Idle
	Steal  time.Duration // wanted by this machine, given to another by the hypervisor
	Load   float64       // average over one minute

	PSI      bool
	Pressure Pressures

	MemoryBytes     uint64 // at present
	MemoryAvailable uint64 // at present, for new programs without swapping
	SwapInBytes     uint64
	SwapOutBytes    uint64

	DiskOperations uint64        // of all block devices
	DiskTime       time.Duration // those operations took, waiting in the queue included
}
