package api

import "time"

// Top is what the monitor has measured in its newest round, beside the state of
// all nodes and of all jobs that are not over.
type Top struct {
	// Time is when the round ended; none: nothing was measured yet.
	Time     *time.Time `json:"time,omitempty"`
	PeriodMS int64      `json:"period_ms"` // of the rounds
	Missing  int        `json:"missing"`   // nodes in the monitoring tree of which nothing was heard
	Reports  int        `json:"reports"`   // messages in which the controller heard of the others
	Nodes    []TopNode  `json:"nodes"`
	Jobs     []TopJob   `json:"jobs"`
	// OtherNodes and OtherJobs are the sums of those that are too many to be
	// measured one by one: the busiest are.
	OtherNodes *NodeFigures `json:"other_nodes,omitempty"`
	OtherJobs  *JobFigures  `json:"other_jobs,omitempty"`
}

// TopNode is one node.
type TopNode struct {
	ID      string       `json:"id"`
	Cloud   string       `json:"cloud"`
	State   NodeState    `json:"state"`
	Health  string       `json:"health"` // ok, or what it is short of
	Figures *NodeFigures `json:"figures,omitempty"`
}

// NodeFigures are what was measured of a node in the round.
type NodeFigures struct {
	CPUs       float64 `json:"cpus"`
	CPUsBusy   float64 `json:"cpus_busy"`
	CPUsStolen float64 `json:"cpus_stolen"` // by its hypervisor
	MemBytes   uint64  `json:"mem_bytes"`
	MemBusy    uint64  `json:"mem_busy"`
	DiskBytes  uint64  `json:"disk_bytes"` // where the agent's state is
	DiskFree   uint64  `json:"disk_free"`
	Tasks      uint64  `json:"tasks"`
	Troubled   uint64  `json:"troubled"` // of them, kept from working or unhealthy
	// Shares of the time, from 0 to 1, in which something waited for a CPU, or
	// everything stood still for memory or for I/O.
	CPUStall    float64 `json:"cpu_stall"`
	MemoryStall float64 `json:"memory_stall"`
	IOStall     float64 `json:"io_stall"`
}

// TopJob is one job that is not over.
type TopJob struct {
	ID      string      `json:"id"`
	Name    string      `json:"name"`
	Phase   Phase       `json:"phase"`
	Cloud   string      `json:"cloud"`
	Tasks   int         `json:"tasks"`
	Health  string      `json:"health"`           // healthy, unhealthy, starved_cpu, ...
	Reason  string      `json:"reason,omitempty"` // the figures for that, or why it does not run
	Figures *JobFigures `json:"figures,omitempty"`
}

// JobFigures are what was measured of a job's tasks in the round.
type JobFigures struct {
	Tasks    uint64  `json:"tasks"` // that were measured
	CPUs     float64 `json:"cpus"`  // used
	CPUsDue  float64 `json:"cpus_due"`
	MemUsed  uint64  `json:"mem_used"`
	MemBytes uint64  `json:"mem_bytes"` // limit
	// Waited is the share of the time that its threads were ready in which they
	// did not run, Stalled the one in which its tasks stood still for memory or
	// I/O; means over the tasks.
	Waited  float64 `json:"waited"`
	Stalled float64 `json:"stalled"`
	// Progress is in units a minute, of all tasks that report any; none: no task does.
	Progress       *float64 `json:"progress,omitempty"`
	NormalProgress float64  `json:"normal_progress,omitempty"`
}
