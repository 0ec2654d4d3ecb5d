// Package api is Dormouse's vocabulary as Go types: what the REST API, the
// command line and the store exchange. It holds no logic beyond what a word
// means (is this phase final?) and imports nothing else of Dormouse.
//
// Field names in JSON are a contract with programs outside this repository:
// they may be added to, never renamed. Times are RFC 3339, sizes are bytes,
// durations end in _ms.
package api

import "time"

// Phase is where a job is in its life.
type Phase string

// The phases of a job, in the order of an undisturbed life, then the detours.
const (
	PhasePending      Phase = "pending"      // accepted, waits for room
	PhaseProvisioning Phase = "provisioning" // a driver is making nodes for it
	PhaseStarting     Phase = "starting"     // agents are building its sandboxes
	PhaseRunning      Phase = "running"
	PhaseCompleted    Phase = "completed" // every task exited with status 0
	PhaseFailed       Phase = "failed"    // a task failed or its node was lost
	PhaseCancelled    Phase = "cancelled" // ended by `dormouse kill`
	PhaseSuspending   Phase = "suspending"
	PhaseSuspended    Phase = "suspended" // lives in the repository only
	PhaseRestoring    Phase = "restoring"
	PhaseMigrating    Phase = "migrating"
	PhaseRecovering   Phase = "recovering" // after a failure, from a checkpoint
)

// Final reports whether a job in phase p is over and uses nothing.
func (p Phase) Final() bool {
	return p == PhaseCompleted || p == PhaseFailed || p == PhaseCancelled
}

// Placed reports whether a job in phase p holds room on nodes.
func (p Phase) Placed() bool {
	switch p {
	case PhaseStarting, PhaseRunning, PhaseSuspending, PhaseRestoring, PhaseMigrating, PhaseRecovering:
		return true
	}
	return false
}

// RootKind says what a sandbox's root file system is made of.
type RootKind string

// The kinds of root: the node's own tree, a directory, an OCI image.
const (
	RootHost RootKind = "host"
	RootDir  RootKind = "dir"
	RootOCI  RootKind = "oci"
)

// Volume is a directory of the node bound into the sandbox. It is shared with
// the outside, and so never part of a checkpoint.
type Volume struct {
	Source      string `json:"source"`
	Destination string `json:"destination"`
	ReadOnly    bool   `json:"read_only,omitempty"`
}

// Publish lets the outside reach a port of a task through the node it is on.
type Publish struct {
	Task     int    `json:"task" yaml:"task"`
	Protocol string `json:"protocol,omitempty" yaml:"protocol"` // tcp, the default, or udp
	Port     int    `json:"port" yaml:"port"`                   // of the node
	Target   int    `json:"target,omitempty" yaml:"target"`     // of the task; the same unless given
}

// Values of JobSpec.Launch, JobSpec.Placement and JobSpec.Connections.
const (
	LaunchAuto  = "auto"
	LaunchEach  = "each"
	LaunchFirst = "first"

	PlacementSpread = "spread"
	PlacementPack   = "pack"

	ConnectionsRefuse = "refuse"
	ConnectionsClose  = "close"
	ConnectionsKeep   = "keep"
)

// JobSpec is what a user submits.
type JobSpec struct {
	Name    string   `json:"name,omitempty" yaml:"name"`
	Command []string `json:"command" yaml:"command" doc:"program and its arguments"`
	Tasks   int      `json:"tasks,omitempty" yaml:"tasks" doc:"number of tasks, 1 unless given"`
	// CPUs and MemBytes are per task.
	CPUs     float64 `json:"cpus,omitempty" yaml:"cpus" doc:"processors per task, 1 unless given"`
	MemBytes int64   `json:"mem_bytes,omitempty" yaml:"mem_bytes" doc:"memory per task, 512 MiB unless given"`
	Priority int     `json:"priority,omitempty" yaml:"priority"`
	Cloud    string  `json:"cloud,omitempty" yaml:"cloud" doc:"run only in this cloud"`
	// Constraints are the labels, with their values, that a node must have. Every
	// node has the labels node and cloud, its own names.
	Constraints map[string]string `json:"constraints,omitempty" yaml:"constraints"`
	// Placement is "spread" (the default), each task on the least loaded node, or
	// "pack", on as few nodes as possible.
	Placement string `json:"placement,omitempty" yaml:"placement"`
	// Root is "host", "dir:PATH", "oci:PATH", "oci:REFERENCE" or a plain path.
	Root    string            `json:"root,omitempty" yaml:"root"`
	Env     map[string]string `json:"env,omitempty" yaml:"env"`
	Dir     string            `json:"dir,omitempty" yaml:"dir" doc:"working directory inside the sandbox"`
	Volumes []Volume          `json:"volumes,omitempty" yaml:"volumes"`
	// User is NAME, UID, NAME:GROUP or UID:GID, resolved inside the root.
	User string `json:"user,omitempty" yaml:"user"`
	// Confined is set by the controller for jobs of users: the agent refuses volumes
	// and roots whose path could be made to lead elsewhere.
	Confined bool `json:"confined,omitempty" yaml:"-" readOnly:"true"`
	// CapAdd names Linux capabilities beyond the default set of containers.
	CapAdd []string `json:"cap_add,omitempty" yaml:"cap_add"`
	// Launch says where the command runs: "each" task, the "first" one, which
	// starts the rest itself as mpirun does, or "auto", the default: first for
	// the MPI launchers known by name, otherwise each.
	Launch string `json:"launch,omitempty" yaml:"launch"`
	// Publish lets the outside reach ports of the job's tasks.
	Publish []Publish `json:"publish,omitempty" yaml:"publish"`
	// Connections says what a checkpoint does about TCP connections that leave
	// the job: "refuse" (the default), "close" or "keep".
	Connections string `json:"connections,omitempty" yaml:"connections"`
	// CPUBaseline keeps libraries from using what another cloud's processors
	// lack: native, x86-64-v2, x86-64-v3 or x86-64-v4.
	CPUBaseline string `json:"cpu_baseline,omitempty" yaml:"cpu_baseline"`
	// CheckpointEvery makes the job be checkpointed by itself: a duration such as
	// 10m, a cron line in UTC such as "0 * * * *", or auto, the interval that
	// loses least. Empty: never.
	CheckpointEvery string `json:"checkpoint_every,omitempty" yaml:"checkpoint_every" doc:"a duration, a cron line (UTC) or auto"`
	// Keep is how many durable checkpoints are retained, and KeepHourly and
	// KeepDaily the newest of how many hours and days. All 0: every one is.
	Keep       int `json:"keep,omitempty" yaml:"keep"`
	KeepHourly int `json:"keep_hourly,omitempty" yaml:"keep_hourly"`
	KeepDaily  int `json:"keep_daily,omitempty" yaml:"keep_daily"`
	// DrillEvery makes one in so many durable checkpoints be restored on trial;
	// 0: none is.
	DrillEvery int `json:"drill_every,omitempty" yaml:"drill_every"`
	// WalltimeMS is how long the job may run until it is suspended; 0: as long as
	// it takes.
	WalltimeMS int64 `json:"walltime_ms,omitempty" yaml:"walltime_ms"`
	// MaxRestarts is how often in a row the job is recovered by itself after it has
	// failed or a node was lost, from its newest durable checkpoint that can be used
	// or, without one, from nothing. A run of 10 minutes begins a new row.
	MaxRestarts int `json:"max_restarts,omitempty" yaml:"max_restarts"`
	// Health is how each task's health is asked; none: a task is well while it
	// runs. A job with an unhealthy task has failed.
	Health *HealthCheck `json:"health,omitempty" yaml:"health"`
	// OnStarvation is what is done with the job when it is kept from working:
	// suspend (the default), migrate, notify or ignore.
	OnStarvation string `json:"on_starvation,omitempty" yaml:"on_starvation"`
	// StarvationPeriodMS is how often each task is measured; 10 s unless given. A
	// verdict takes two or three periods.
	StarvationPeriodMS int64 `json:"starvation_period_ms,omitempty" yaml:"starvation_period_ms"`
	// ProgressRegex is matched against each line a task writes to its output; what
	// its first group matches, a number, is the task's progress. Without a group,
	// each match is one step.
	ProgressRegex string `json:"progress_regex,omitempty" yaml:"progress_regex"`
	// Webhook is the http or https address that findings about the job are posted
	// to, as JSON.
	Webhook string `json:"webhook,omitempty" yaml:"webhook"`
}

// Job is one submitted job and where it is in its life.
type Job struct {
	ID          string     `json:"id"`
	Name        string     `json:"name"`
	Phase       Phase      `json:"phase"`
	Reason      string     `json:"reason"` // why it is in this phase, for people
	Tasks       int        `json:"tasks"`
	Priority    int        `json:"priority"`
	Cloud       string     `json:"cloud"`           // where it runs or ran last
	Owner       string     `json:"owner,omitempty"` // the user, or @ and the token's name, that submitted it
	Checkpoints int        `json:"checkpoints"`
	Restarts    int        `json:"restarts"` // restores into running since submission
	Created     time.Time  `json:"created"`
	Started     *time.Time `json:"started,omitempty"`
	Finished    *time.Time `json:"finished,omitempty"`
	ExitCode    *int       `json:"exit_code,omitempty"` // of the first failing task; 128+signal when a signal ended it
	Operation   string     `json:"operation,omitempty"` // id of the one under way
	// Queued is set while a suspended job waits to come back by itself: it gave way
	// to another, or left a node that was drained.
	Queued bool `json:"queued,omitempty"`
}

// JobDetail is a job with everything `dormouse inspect` shows.
type JobDetail struct {
	Job
	Spec       JobSpec      `json:"spec"`
	TaskStatus []TaskStatus `json:"task_status"`
	// Run counts the job's starts and restores; an agent holding a task of an
	// older run must destroy it.
	Run int64 `json:"run"`
	// From is the checkpoint that the present run was restored from.
	From string `json:"from,omitempty"`
	// Automatic explains the job's automatic checkpoints, when it has a policy.
	Automatic *Automatic `json:"automatic,omitempty"`
	// Starvation is set while the job is kept from working, and after it was
	// suspended for that until it runs again.
	Starvation *Starvation `json:"starvation,omitempty"`
	// Incidents are the job's failures and how long each kept it from running,
	// oldest first; the newest 20.
	Incidents []Incident `json:"incidents,omitempty"`
	// WalltimeEnds is when a running job will be suspended.
	WalltimeEnds *time.Time `json:"walltime_ends,omitempty"`
}

// Incident is one failure of a job, up to when it ran again.
type Incident struct {
	Cause    string     `json:"cause"`  // program or node
	Reason   string     `json:"reason"` // one sentence
	Node     string     `json:"node,omitempty"`
	Lost     time.Time  `json:"lost"`              // the program ended, or the node was heard of last
	Detected time.Time  `json:"detected"`          // and this was noticed
	Running  *time.Time `json:"running,omitempty"` // the job runs again
	DownMS   *float64   `json:"down_ms,omitempty"` // from Lost to Running
	Failures int        `json:"failures"`          // 1, and one more for each recovery that failed
	From     string     `json:"from,omitempty"`    // checkpoint that it went on from; empty: from nothing
}

// TaskStatus is one task as its agent last reported it.
type TaskStatus struct {
	Index     int    `json:"index"`
	Node      string `json:"node"`
	Phase     Phase  `json:"phase"`
	Pid       int    `json:"pid"` // of the task's pid 1, in the node's pid namespace
	VirtualIP string `json:"virtual_ip"`
	ExitCode  *int   `json:"exit_code,omitempty"`
	Signal    string `json:"signal,omitempty"` // SIGKILL, ... when one ended it
	Reason    string `json:"reason,omitempty"`
	// Starvation and Health are what its node has found last; none: nothing yet.
	Starvation *Finding `json:"starvation,omitempty"`
	Health     *Finding `json:"health,omitempty"`
}
