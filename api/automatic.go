package api

import "time"

// Automatic says when a job is checkpointed by itself, and why then.
type Automatic struct {
	Policy     string  `json:"policy"`
	IntervalMS float64 `json:"interval_ms"`
	// Next is when the next checkpoint is due; nil while the job does not run.
	Next *time.Time `json:"next,omitempty"`
	Why  string     `json:"why"`
	// Waits says what a checkpoint that is due waits for.
	Waits string `json:"waits,omitempty"`
	// Failures counts the attempts since the newest durable checkpoint.
	Failures int              `json:"failures,omitempty"`
	Inputs   *AutomaticInputs `json:"inputs,omitempty"` // of the policy auto
}

// AutomaticInputs are what the interval of the policy auto is made of.
type AutomaticInputs struct {
	CostMS     float64 `json:"cost_ms"` // of a checkpoint: pause and overhead
	PauseMS    float64 `json:"pause_ms"`
	OverheadMS float64 `json:"overhead_ms"`
	DurableMS  float64 `json:"durable_ms"` // from request to durable
	// Measured is how many checkpoints the cost is the median of; 0: it is presumed.
	Measured int     `json:"measured"`
	MTBFMS   float64 `json:"mtbf_ms"` // between failures of any node of the job
	Nodes    int     `json:"nodes"`   // of the job
	// Losses and NodeDays are what was seen of all nodes of the job's clouds;
	// older things count less.
	Losses    float64 `json:"losses"`
	NodeDays  float64 `json:"node_days"`
	OptimumMS float64 `json:"optimum_ms"` // before the bounds
	MinMS     float64 `json:"min_ms"`
	MaxMS     float64 `json:"max_ms"`
	Loss      float64 `json:"expected_loss"` // share of the time, 0 to 1
}
