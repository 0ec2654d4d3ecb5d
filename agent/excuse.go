package agent

import (
	"slices"
	"sync"
	"time"

	"dormouse/api/agentpb"
)

// Why nothing may be concluded from how a task fared.
const (
	excuseCheckpoint = "a checkpoint is taken"
	excuseLease      = "it is frozen, because the node has lost the controller"
	excuseStopped    = "it is stopped on purpose"
	excuseSignal     = "it was sent a signal"
	excuseEnding     = "it is being ended"
)

// longestExcuse bounds for how long one command excuses a task: what takes longer
// is an upload that was given little bandwidth, and so takes little from the task.
const longestExcuse = 5 * time.Minute

// excuses are what Dormouse itself does to a task.
type excuses struct {
	mu    sync.Mutex
	since []string // lasting, or begun and ended since the last take
	now   []string // lasting
}

// begin an excuse that lasts until the returned function is called.
func (e *excuses) begin(why string) (end func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.now, e.since = append(e.now, why), append(e.since, why)
	return sync.OnceFunc(func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		if i := slices.Index(e.now, why); i >= 0 {
			e.now = slices.Delete(e.now, i, i+1)
		}
	})
}

// take returns an excuse for the time since the last take; "" if there is none.
func (e *excuses) take() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	why := ""
	if len(e.since) > 0 {
		why = e.since[0]
	}
	e.since = slices.Clone(e.now)
	return why
}

// excuse is why the time since the last one says nothing about the task.
func (t *task) excuse() string {
	why := t.excuses.take() // in any case: it begins the next span
	if still := t.standsStill(); still != "" {
		return still
	}
	return why
}

// standsStill is why the task cannot do anything at present; "" if it can.
func (t *task) standsStill() string {
	r, _ := t.snapshot()
	switch {
	case r.Checkpoint != "" || slices.Contains(r.Holds, holdCheckpoint):
		return excuseCheckpoint
	case len(r.Holds) > 0:
		return excuseLease
	case r.Stopped:
		return excuseStopped
	}
	return ""
}

// excuseOf is what a command does to its task for as long as it is carried out.
func excuseOf(command *agentpb.Command) string {
	switch command.GetBody().(type) {
	case *agentpb.Command_Preflight, *agentpb.Command_Freeze, *agentpb.Command_Capture, *agentpb.Command_OpenNetwork,
		*agentpb.Command_Thaw, *agentpb.Command_Upload:
		return excuseCheckpoint
	case *agentpb.Command_Signal:
		return excuseSignal
	case *agentpb.Command_Destroy:
		return excuseEnding
	}
	return ""
}
