package controller

import (
	"context"
	"sync"

	"dormouse/controller/scheduler"
)

// turns tells operations that wait for room when it may be their turn: looking
// at all jobs again for each of them, whenever anything changes, would be too
// much after the loss of many nodes.
type turns struct {
	mu      sync.Mutex
	decided map[string]scheduler.Decision // by job
	next    chan struct{}                 // closed by the next look
}

func newTurns() *turns { return &turns{next: make(chan struct{})} }

// announce tells what the newest look at the queue has decided.
func (t *turns) announce(decisions []scheduler.Decision) {
	decided := make(map[string]scheduler.Decision, len(decisions))
	for _, d := range decisions {
		decided[d.ID] = d
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.next)
	t.decided, t.next = decided, make(chan struct{})
}

// look returns what is decided about a job, if anything is, and what is closed
// when that may have changed.
func (t *turns) look(job string) (d scheduler.Decision, known bool, next <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	d, known = t.decided[job]
	return d, known, t.next
}

// await waits until something else is decided about a job than that it waits for
// the given reason. It returns the new reason.
func (t *turns) await(ctx context.Context, job, reason string, next <-chan struct{}) (string, error) {
	for {
		select {
		case <-next:
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
		var d scheduler.Decision
		var known bool
		if d, known, next = t.look(job); !known || d.Placement != nil || d.Reason != reason {
			return d.Reason, nil
		}
	}
}
