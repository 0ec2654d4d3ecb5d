package api

import "time"

// NodeState is whether a node can run tasks.
type NodeState string

// A node is ready while its agent's lease is renewed, unreachable when the
// agent is silent but its tasks may still run, lost when they certainly do not.
const (
	NodeJoining     NodeState = "joining"
	NodeReady       NodeState = "ready"
	NodeCordoned    NodeState = "cordoned"
	NodeUnreachable NodeState = "unreachable"
	NodeLost        NodeState = "lost"
)

// Node is one machine that runs an agent.
type Node struct {
	ID       string    `json:"id"`
	Name     string    `json:"name"`
	Cloud    string    `json:"cloud"`
	State    NodeState `json:"state"`
	CPUs     float64   `json:"cpus"`
	MemBytes int64     `json:"mem_bytes"`
	// CPUsUsed and MemUsed are what placed tasks reserve.
	CPUsUsed float64 `json:"cpus_used"`
	MemUsed  int64   `json:"mem_used"`
	Tasks    int     `json:"tasks"`

	// Underlay is the address by which other nodes, and whoever calls a port that
	// a job publishes, reach the node. Empty: none is known.
	Underlay string `json:"underlay,omitempty"`
	// Cordoned nodes get no more tasks, until they are uncordoned.
	Cordoned bool `json:"cordoned,omitempty"`
	// Labels are what constraints of jobs ask for, beside node and cloud.
	Labels map[string]string `json:"labels,omitempty"`

	// Trouble is what the node has found about itself that keeps jobs away.
	Trouble *Finding `json:"trouble,omitempty"`

	Reason       string   `json:"reason,omitempty"`
	CRIUVersion  string   `json:"criu_version,omitempty"`
	Kernel       string   `json:"kernel,omitempty"`
	CPUModel     string   `json:"cpu_model,omitempty"`
	CPUFeatures  []string `json:"cpu_features,omitempty"`
	AgentPid     int      `json:"agent_pid,omitempty"` // of a virtual node
	AgentVersion string   `json:"agent_version,omitempty"`
}

// Cloud is a named platform: a driver and its configuration.
type Cloud struct {
	Name   string `json:"name"`
	Driver string `json:"driver"`
	Nodes  int    `json:"nodes"`
}

// Problem is an error document, RFC 9457.
type Problem struct {
	Type   string `json:"type,omitempty"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
	// RetryAfter is the header of that name: when it is worth asking again.
	RetryAfter time.Duration `json:"-"`
}

// Error makes a Problem usable as the error of a client's call.
func (p *Problem) Error() string {
	if p.Detail != "" {
		return p.Detail
	}
	return p.Title
}

// Version is what GET /v1/version and `dormouse version` answer.
type Version struct {
	Version string `json:"version"`
	Go      string `json:"go"`
}
