package api

// PreemptPlan is what a preemption or a swap would do, and its estimated cost.
type PreemptPlan struct {
	// Out are the jobs that would give up their places.
	Out []Eviction `json:"out"`
	// In is the job that would be put there; nil: whoever is first in the queue.
	In *Arrival `json:"in,omitempty"`
	// Bytes is what all checkpoints would have to store, EstimatedMS how long it
	// would take until the places are free. Nil: nothing is known to tell it from.
	Bytes       int64    `json:"bytes"`
	EstimatedMS *float64 `json:"estimated_ms,omitempty"`
}

// Eviction is a job that would give up its place.
type Eviction struct {
	Job      string   `json:"job"`
	Name     string   `json:"name"`
	Priority int      `json:"priority"`
	Nodes    []string `json:"nodes"`
	Bytes    int64    `json:"bytes"`
	// BytesFrom says how Bytes is known: "the newest checkpoint" or "the memory
	// reserved", which is the most it can be.
	BytesFrom   string   `json:"bytes_from"`
	EstimatedMS *float64 `json:"estimated_ms,omitempty"`
	// EstimatedFrom says how EstimatedMS is known: "its newest checkpoint", "the
	// checkpoints of other jobs" or, with no estimate, "no checkpoint was made yet".
	EstimatedFrom string `json:"estimated_from"`
	// Comes says where the job would go next, as far as can be told now.
	Comes string `json:"comes"`
}

// Arrival is a job that would be put somewhere.
type Arrival struct {
	Job   string   `json:"job"`
	Name  string   `json:"name"`
	Nodes []string `json:"nodes"`
	From  string   `json:"from,omitempty"` // checkpoint; empty: it would be started
}

// DrainResult is what became of one job that a drain moved.
type DrainResult struct {
	Job    string   `json:"job"`
	Name   string   `json:"name"`
	Phase  Phase    `json:"phase"`
	Nodes  []string `json:"nodes,omitempty"`
	Reason string   `json:"reason,omitempty"`
}
