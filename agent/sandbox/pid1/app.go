package pid1

// What programs of the task ask of their pid 1, on AppSocket: a connection
// carries one FrameRequest with an AppCall and its answer, FrameOK with an
// Answer or a Status, or FrameFailure. An AppCheckpoint is answered when the
// checkpoint is durable, and in a copy restored from any checkpoint that was
// captured in the meantime, once that copy runs. It is withdrawn when its
// connection ends.

// AppOp names a call.
type AppOp string

// The calls.
const (
	AppCheckpoint AppOp = "checkpoint"
	AppStatus     AppOp = "status"
)

// AppCall is the first frame of a connection.
type AppCall struct {
	Op    AppOp  `json:"op"`
	Label string `json:"label,omitempty"`
}

// Bounds of what programs may ask for.
const (
	MaxLabel   = 256 // bytes
	MaxAppCall = 4096
	MaxApps    = 64 // requests at a time
)

// AppRequest is a request on its way to the agent.
type AppRequest struct {
	ID    string `json:"id"` // random: it stays unique over restores and clones
	Label string `json:"label,omitempty"`
}

// Outcome is how the agent ends an AppRequest.
type Outcome struct {
	Checkpoint string `json:"checkpoint,omitempty"`
	Failure    string `json:"failure,omitempty"` // empty: the checkpoint is durable
	Refused    bool   `json:"refused,omitempty"` // it may not be done, as opposed to broken
}

// Answer is an Outcome as the program sees it, and a line of ControlLog.
type Answer struct {
	Label      string `json:"label,omitempty"`
	Checkpoint string `json:"checkpoint,omitempty"`
	// Restored: the program goes on in a copy that was restored from Checkpoint.
	Restored bool   `json:"restored"`
	Run      int64  `json:"run"` // of the job: 1 from its first start, and one more with every restore
	Error    string `json:"error,omitempty"`
	Refused  bool   `json:"refused,omitempty"` // Error says why it may not be done
}

// Status is what pid 1 knows about its task.
type Status struct {
	Run int64 `json:"run"`
	// From is the checkpoint that this run was restored from.
	From string `json:"restored_from,omitempty"`
}
