package api

import "time"

// Values of JobSpec.OnStarvation: what is done with a job that is kept from
// working. Whatever it is, an event tells of it.
const (
	StarvationSuspend = "suspend" // checkpoint, free the node, come back by itself when there is room; the default
	StarvationMigrate = "migrate" // checkpoint and go on at once on another node
	StarvationNotify  = "notify"  // tell, by an event and the job's webhook
	StarvationIgnore  = "ignore"  // tell by an event only
)

// StarvationPolicies lists them.
func StarvationPolicies() []string {
	return []string{StarvationSuspend, StarvationMigrate, StarvationNotify, StarvationIgnore}
}

// FindingKind says which part of the monitor found something.
type FindingKind string

// The kinds of findings.
const (
	FindingStarvation FindingKind = "starvation" // a task kept from working, or well again
	FindingHealth     FindingKind = "health"     // what a task's health check says
	FindingNode       FindingKind = "node"       // a node's disk, memory or agent
)

// Conditions of a finding. Starvation has further ones: no_progress,
// starved_io, starved_cpu, starved_memory.
const (
	ConditionHealthy   = "healthy"
	ConditionUnhealthy = "unhealthy" // the health check failed as often as it may
	ConditionDiskFull  = "disk_full"
	ConditionAgentHung = "agent_hung" // of a node: its agent is there and measures nothing any more
)

// Finding is something a node found out about one of its tasks, or about
// itself, and that has changed. It travels as JSON, at most 4 KiB.
type Finding struct {
	Time        time.Time   `json:"time"`
	Kind        FindingKind `json:"kind"`
	Condition   string      `json:"condition"`
	Since       *time.Time  `json:"since,omitempty"` // when the trouble began
	Explanation string      `json:"explanation"`     // one sentence with the figures

	Node string `json:"node,omitempty"` // name
	Job  string `json:"job,omitempty"`  // empty: about the node
	Task int    `json:"task"`
	Run  int64  `json:"run,omitempty"` // of the job; a finding about an older one is void
	// Suspected is the condition that the last periods hint at, unconfirmed.
	Suspected string `json:"suspected,omitempty"`
	// Spins and Severity are for the judgement of a whole job: the task seems to
	// run without progress, and how ill it is, from 0 to 1.
	Spins    bool    `json:"spins,omitempty"`
	Severity float64 `json:"severity,omitempty"`
}

// Starvation says that a job is kept from working, by what its tasks' findings
// say together.
type Starvation struct {
	Condition   string    `json:"condition"`
	Since       time.Time `json:"since"`
	Task        *int      `json:"task,omitempty"`    // the straggler; none: all are at fault alike
	Node        string    `json:"node,omitempty"`    // where that is
	Waiting     []int     `json:"waiting,omitempty"` // tasks that seem to spin, and wait for the straggler
	Explanation string    `json:"explanation"`       // one sentence with the figures
	Action      string    `json:"action,omitempty"`  // what is done about it, or why nothing is for now
}

// WebhookPost is what is posted to a job's webhook: an event of type starving,
// recovered, unhealthy or healthy.
type WebhookPost struct {
	ID          uint64     `json:"id"` // the same when it is posted again
	Event       string     `json:"event"`
	Time        time.Time  `json:"time"`
	Job         string     `json:"job"`
	Name        string     `json:"name,omitempty"` // of the job
	Phase       Phase      `json:"phase"`
	Task        *int       `json:"task,omitempty"`
	Node        string     `json:"node,omitempty"`
	Condition   string     `json:"condition"`
	Since       *time.Time `json:"since,omitempty"`
	Explanation string     `json:"explanation"`
}

// HealthCheck says how a task's health is asked. Command and HTTP exclude each
// other.
type HealthCheck struct {
	Command []string `json:"command,omitempty" yaml:"command"` // run inside the sandbox; exit status 0 is healthy
	HTTP    string   `json:"http,omitempty" yaml:"http"`       // [:PORT]/PATH, asked of the task's own address; 2xx and 3xx are healthy

	PeriodMS     int64 `json:"period_ms,omitempty" yaml:"period_ms"`           // 10 s unless given
	TimeoutMS    int64 `json:"timeout_ms,omitempty" yaml:"timeout_ms"`         // 5 s
	StartDelayMS int64 `json:"start_delay_ms,omitempty" yaml:"start_delay_ms"` // 0; failures before the first success count after it only
	Retries      int   `json:"retries,omitempty" yaml:"retries"`               // failures in a row that make a task unhealthy; 3
}
