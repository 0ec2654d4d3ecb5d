// Package plugins is what a checkpoint must handle beyond what CRIU captures: a
// task's ties to what is outside of it. Each kind of tie is one [Plugin]; package
// plugintest is what all of them pass.
//
// The agent asks its plugins at three of its steps. Each step is taken on all
// tasks of the job before the next is taken on any:
//
//	Preflight   Look      the task runs; what cannot be captured is named
//	Freeze                all processes of the job stand still
//	Capture     Quiesce   what is under way arrives, the job's policy is applied,
//	                      nothing of the kind moves any more; then CRIU dumps
//	Open        Resume    what Quiesce holds is let go; then the processes go on
//
// Whatever goes wrong before or after Quiesce, the answer is Resume. A restore begins
// in the state that Quiesce leaves:
//
//	Restore   Restored  CRIU has built everything, nothing runs yet
//	Open      Resume    as above, once all tasks of the job have come as far
package plugins

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"strings"

	"dormouse/agent/criu"
	"dormouse/api"
)

// Plugin handles one kind of tie. It keeps nothing in memory from one call to the
// next: an agent that was restarted calls Resume for a task that its predecessor
// had quiesced. Calls for different tasks come at the same time.
type Plugin interface {
	// Look tells why a task, which runs on undisturbed, cannot be captured as it is
	// under its job's policy. No refusals mean that Quiesce is expected to succeed. That
	// things change or processes end meanwhile is no error.
	Look(ctx context.Context, t Task) ([]criu.Refusal, error)

	// Quiesce brings the ties of a task to rest, all of whose job is frozen. They
	// stay at rest until Resume, also when the agent dies. It is part of the pause.
	// Called again, it changes nothing more. It fails with a *RefusedError if Look
	// would now refuse, with ErrUnsettled if it might succeed once the job has run on
	// for a moment, and with ctx. What a failed Quiesce holds, Resume lets go.
	//
	// What the job's policy gives up (connections that are closed) is not brought
	// back by Resume, even if the checkpoint comes to nothing.
	Quiesce(ctx context.Context, t Task) error

	// Restored mends what CRIU does not bring back as it was. The processes are built
	// and have not run.
	Restored(ctx context.Context, t Task) error

	// Resume lets go what Quiesce holds, in a task that goes on or that was restored.
	// It changes nothing if nothing is held.
	Resume(ctx context.Context, t Task) error
}

// Task is a task as plugins see it.
type Task struct {
	Spec     *api.JobSpec   // of its job, with the policies
	Networks []netip.Prefix // addresses of the job's tasks
	NetNS    *os.File       // its network namespace
	PIDs     []int          // its processes, in our own pid namespace; not given to Resume
}

// ErrUnsettled: something is on its way between two states neither of which
// has it as a whole.
var ErrUnsettled = errors.New("a connection is just changing its state")

// RefusedError is a task that cannot be captured as it is.
type RefusedError struct{ Refusals []criu.Refusal }

func (e *RefusedError) Error() string {
	sentences := make([]string, 0, len(e.Refusals))
	for _, r := range e.Refusals {
		sentences = append(sentences, r.String())
	}
	return strings.Join(sentences, "; ")
}
