package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"dormouse/api/agentpb"
	"dormouse/internal/failpoint"
)

// holdLimit is how long a restored task waits for its release: longer than any
// step of a controller that lives, and not for ever.
const holdLimit = 5 * time.Minute

// restoring is one restore, from its command to the running task. It has a
// goroutine of its own, because one that is held goes on after its command was
// answered.
type restoring struct {
	hold   bool
	cancel context.CancelFunc

	reached  chan struct{} // closed when the restore is held
	netns    *os.File      // of the task, while it is held
	released chan struct{}
	once     sync.Once     // for released
	done     chan struct{} // closed at the end, after err was set
	err      error
}

func newRestoring(hold bool, cancel context.CancelFunc) *restoring {
	return &restoring{
		hold: hold, cancel: cancel,
		reached: make(chan struct{}), released: make(chan struct{}), done: make(chan struct{}),
	}
}

// wait holds CRIU, which has built everything and let nothing go yet, until the
// release.
func (h *restoring) wait(ctx context.Context, netns *os.File) error {
	h.netns = netns
	close(h.reached)
	limit := time.NewTimer(holdLimit)
	defer limit.Stop()
	select {
	case <-h.released:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-limit.C:
		return fmt.Errorf("the restored task was not released for %v", holdLimit)
	}
}

// abandon gives a restore up and returns when nothing of it is left.
func (h *restoring) abandon() {
	h.cancel()
	<-h.done
}

// heldRestore is the task's restore if it is held now, else nil.
func (t *task) heldRestore() *restoring {
	t.mu.Lock()
	h := t.restore
	t.mu.Unlock()
	if h == nil || !h.hold {
		return nil
	}
	select {
	case <-h.done:
		return nil
	default:
	}
	select {
	case <-h.reached:
		return h
	default:
		return nil
	}
}

// underway is the task's restore until that has ended, else nil.
func (t *task) underway() *restoring {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.restore == nil {
		return nil
	}
	select {
	case <-t.restore.done:
		return nil
	default:
		return t.restore
	}
}

// errNotHeld answers commands for a held task that is not there.
var errNotHeld = errors.New("the restored task is not held here: the agent was restarted since, or the restore failed")

func notHeld(ref *agentpb.TaskRef, err error) error {
	return retry{fmt.Errorf("task %d of job %s: %w (%w)", ref.GetIndex(), ref.GetJob(), errNotHeld, err)}
}

// release lets a held task go on, and returns its state.
func (a *Agent) release(ctx context.Context, ref *agentpb.TaskRef) (*agentpb.TaskState, error) {
	t, err := a.find(ref)
	if err != nil {
		return nil, notHeld(ref, err)
	}
	h := t.heldRestore()
	if h == nil {
		if _, err := t.live(); err != nil {
			return nil, notHeld(ref, err)
		}
		return t.state(), nil
	}
	if a.lease.hasLapsed() {
		return nil, retry{fmt.Errorf("task %d of job %s stays held: the node's lease ran out", ref.GetIndex(), ref.GetJob())}
	}
	failpoint.Hit("agent.release.before")
	h.once.Do(func() { close(h.released) })
	select {
	case <-h.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if h.err != nil {
		return nil, h.err
	}
	failpoint.Hit("agent.release.after")
	return t.state(), nil
}
