package controller

import (
	"time"

	"dormouse/api"
	"dormouse/controller/interval"
	"dormouse/controller/store"
)

// history is what automatic checkpoints go by: what was measured of a job, and
// what was done. It outlives the checkpoints that it tells of.
type history struct {
	// Begun is when the present run began.
	Begun time.Time `json:"begun,omitzero"`
	// Awake is since when the job uses up its walltime, of which it used Ran before
	// it gave way to another job.
	Awake time.Time     `json:"awake,omitzero"`
	Ran   time.Duration `json:"ran,omitempty"`
	// Durable is when the newest durable checkpoint was asked for. Failed is when
	// the newest failed attempt after it was, and Failures how many there were.
	Durable  time.Time       `json:"durable,omitzero"`
	Failed   time.Time       `json:"failed,omitzero"`
	Failures int             `json:"failures,omitempty"`
	Costs    []interval.Cost `json:"costs,omitempty"`
	// Undrilled counts the durable checkpoints since the newest drill.
	Undrilled int `json:"undrilled,omitempty"`
}

func (h *history) begin(now time.Time) {
	h.Begun, h.Failed, h.Failures = now, time.Time{}, 0
}

// wake begins the job's walltime, or goes on with it after the job gave way.
func (h *history) wake(now time.Time, gaveWay bool) {
	h.Awake = now
	if !gaveWay {
		h.Ran = 0
	}
}

// rest stops the job's walltime while it gives way to another.
func (h *history) rest(now time.Time) {
	h.Ran, h.Awake = h.Ran+now.Sub(h.Awake), time.Time{}
}

func (h *history) fail(asked time.Time) {
	h.Failed = asked
	h.Failures++
}

// noteDurable remembers what a checkpoint cost that has just become durable.
func noteDurable(tx store.Tx, op *opRecord, job *jobRecord, cp api.Checkpoint) error {
	h := &job.History
	h.Durable, h.Failed, h.Failures = cp.Created, time.Time{}, 0
	h.Undrilled++
	if op.Kind != api.OpCheckpoint {
		return nil // the job did not go on: it has no pause
	}
	overhead, err := overheadOf(tx, cp.Steps)
	if err != nil {
		return err
	}
	h.Costs = interval.Remember(h.Costs, interval.Cost{
		Pause: milliseconds(cp.PauseMS), Overhead: overhead, Durable: milliseconds(cp.DurableMS),
	})
	return nil
}

// overheadOf is the most that storing the tasks' captures has taken from one
// node of the job, as time of the whole node. A job that leaves processors idle
// lost less.
func overheadOf(tx store.Tx, steps []api.CaptureSteps) (most time.Duration, err error) {
	perNode := make(map[string]float64)
	for _, s := range steps {
		perNode[s.Node] += s.UploadCPUMS
	}
	for id, ms := range perNode {
		node, err := store.Get[nodeRecord](tx, store.Nodes, id)
		if ignored := ignoreNotFound(err); ignored != nil {
			return 0, ignored
		}
		most = max(most, milliseconds(ms/max(node.CPUs, 1)))
	}
	return most, nil
}

func milliseconds(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }

func inMilliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// note counts the loss of a node, and the time that it was up. A node that was
// cordoned before it went was meant to go.
func (n *nodeRecord) note(state api.NodeState, now time.Time) {
	n.Tally = n.Tally.After(now.UTC(), up(n.State))
	if state == api.NodeLost && (n.State == api.NodeReady || n.State == api.NodeUnreachable) && !n.Cordoned {
		n.Tally = n.Tally.Lose()
	}
}

// up reports whether a node in a state may run tasks.
func up(state api.NodeState) bool {
	return state != api.NodeLost && state != api.NodeJoining && state != ""
}
