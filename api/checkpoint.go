package api

import (
	"encoding/json"
	"time"
)

// CheckpointState is how far a checkpoint has come.
type CheckpointState string

// A checkpoint is captured, lies on the nodes' disks while the job runs on,
// and becomes durable by the write of its signed manifest.
const (
	CheckpointCapturing CheckpointState = "capturing"
	CheckpointLocal     CheckpointState = "local"
	CheckpointDurable   CheckpointState = "durable"
	CheckpointFailed    CheckpointState = "failed"
	// CheckpointRemoving is one that may not be used any more, until the
	// repository has forgotten it too.
	CheckpointRemoving CheckpointState = "removing"
)

// Trigger says why a checkpoint was taken.
type Trigger string

// The triggers.
const (
	TriggerUser        Trigger = "user"
	TriggerPeriodic    Trigger = "periodic"
	TriggerPreempt     Trigger = "preempt"
	TriggerSuspend     Trigger = "suspend"
	TriggerDrain       Trigger = "drain"
	TriggerMigrate     Trigger = "migrate"
	TriggerStarvation  Trigger = "starvation"
	TriggerApplication Trigger = "application"
)

// Checkpoint is one immutable, consistent capture of all tasks of a job.
type Checkpoint struct {
	ID      string          `json:"id"`
	Job     string          `json:"job"`
	Owner   string          `json:"owner,omitempty"` // of the job
	State   CheckpointState `json:"state"`
	Trigger Trigger         `json:"trigger"`
	Label   string          `json:"label"`
	Created time.Time       `json:"created"`
	// PauseMS is how long the application stood still.
	PauseMS     float64 `json:"pause_ms"`
	SizeBytes   int64   `json:"size_bytes"`   // as captured
	StoredBytes int64   `json:"stored_bytes"` // compressed, of all chunks it refers to
	NewBytes    int64   `json:"new_bytes"`    // compressed, that the repository did not have yet
	Tasks       int     `json:"tasks"`
	Parent      string  `json:"parent"`

	Error       string     `json:"error,omitempty"`
	DurableMS   float64    `json:"durable_ms,omitempty"` // from request to durable
	Durable     *time.Time `json:"durable,omitempty"`
	CRIUVersion string     `json:"criu_version,omitempty"`
	// Steps are the measured parts of the capture, per task.
	Steps []CaptureSteps `json:"steps,omitempty"`
	// Clones are the jobs that were made of it.
	Clones []string `json:"clones,omitempty"`
	// Drill is how its newest restore on trial went; nil: there was none.
	Drill *Drill `json:"drill,omitempty"`
}

// Drill is what came of a restore on trial.
type Drill struct {
	Time time.Time `json:"time"`
	OK   bool      `json:"ok"`
	// RestoreMS is the time from the placement until all tasks ran; 0: not known.
	RestoreMS float64  `json:"restore_ms"`
	Nodes     []string `json:"nodes"`
	Error     string   `json:"error,omitempty"`
}

// CaptureSteps are one task's measured steps of a checkpoint.
type CaptureSteps struct {
	Task         int     `json:"task"`
	Node         string  `json:"node"`
	FreezeMS     float64 `json:"freeze_ms"`
	DumpMS       float64 `json:"dump_ms"`
	FilesMS      float64 `json:"files_ms"`
	PauseMS      float64 `json:"pause_ms"`
	UploadMS     float64 `json:"upload_ms"`
	UploadCPUMS  float64 `json:"upload_cpu_ms"` // processor time of the agent while it stored this
	FrozenMS     float64 `json:"frozen_ms"`     // CRIU's frozen_time
	MemDumpMS    float64 `json:"memdump_ms"`    // CRIU's memdump_time
	PagesWritten int64   `json:"pages_written"`
	SizeBytes    int64   `json:"size_bytes"`
	StoredBytes  int64   `json:"stored_bytes"`
	NewBytes     int64   `json:"new_bytes"`
}

// VerifyReport is what `dormouse verify` found in one checkpoint.
type VerifyReport struct {
	Checkpoint string   `json:"checkpoint"`
	OK         bool     `json:"ok"`
	Bytes      int64    `json:"bytes"` // read and hashed
	Problems   []string `json:"problems,omitempty"`
	Drill      *Drill   `json:"drill,omitempty"` // of a restore on trial
}

// OperationKind names a long-running action.
type OperationKind string

// The kinds of operations.
const (
	OpStart      OperationKind = "start"
	OpCheckpoint OperationKind = "checkpoint"
	OpSuspend    OperationKind = "suspend"
	OpPreempt    OperationKind = "preempt"
	OpSwap       OperationKind = "swap"
	OpDrain      OperationKind = "drain"
	OpResume     OperationKind = "resume"
	OpRestart    OperationKind = "restart"
	OpClone      OperationKind = "clone"
	OpKill       OperationKind = "kill"
	OpRecover    OperationKind = "recover"
	OpVerify     OperationKind = "verify"
	OpDrill      OperationKind = "drill"
)

// OperationPhase is the state of an operation.
type OperationPhase string

// An operation ends done, failed or cancelled. While it runs, its phase is
// running and Step names the step that was persisted before it was taken.
const (
	OpRunning   OperationPhase = "running"
	OpDone      OperationPhase = "done"
	OpFailed    OperationPhase = "failed"
	OpCancelled OperationPhase = "cancelled"
)

// Operation is one long-running, persisted, resumable action.
type Operation struct {
	ID       string         `json:"id"`
	Kind     OperationKind  `json:"kind"`
	Job      string         `json:"job"`
	Node     string         `json:"node,omitempty"`  // of operations on a node
	Owner    string         `json:"owner,omitempty"` // of the job, or who asked where there is none
	Phase    OperationPhase `json:"phase"`
	Progress float64        `json:"progress"` // 0 to 1
	Error    string         `json:"error,omitempty"`
	Started  time.Time      `json:"started"`
	Finished *time.Time     `json:"finished,omitempty"`

	Step       string `json:"step"`
	Message    string `json:"message,omitempty"` // the present step, for people
	Checkpoint string `json:"checkpoint,omitempty"`
	// Refused is set when the operation failed because something may not be
	// done (exit status 4) rather than because it broke.
	Refused bool `json:"refused,omitempty"`
	// Result is the kind's own result, such as []VerifyReport.
	Result json.RawMessage `json:"result,omitempty"`
	// Input is what the operation was asked to do, so that a controller that
	// was killed can go on.
	Input json.RawMessage `json:"input,omitempty"`
}

// Event is one line in a job's (or node's) durable history.
type Event struct {
	ID      uint64    `json:"id"`
	Time    time.Time `json:"time"`
	Job     string    `json:"job"`
	Type    string    `json:"type"`
	Message string    `json:"message"`
	Node    string    `json:"node,omitempty"`
	Owner   string    `json:"owner,omitempty"` // of the job
}
