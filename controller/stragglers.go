package controller

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// stragglerAfter is how long all tasks of a job may take for a step until those
// that are awaited are named.
const stragglerAfter = 2 * time.Second

// awaited are the tasks of which a step waits for an answer.
type awaited struct {
	mu    sync.Mutex
	refs  []taskRef
	there []bool
}

func newAwaited(refs []taskRef) *awaited {
	return &awaited{refs: refs, there: make([]bool, len(refs))}
}

func (a *awaited) arrived(i int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.there[i] = true
}

// late names those that are awaited while others are there; nothing when all
// are or none is.
func (a *awaited) late() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	first := slices.Index(a.there, false)
	if first < 0 || !slices.Contains(a.there, true) {
		return ""
	}
	more := 0
	for _, there := range a.there[first+1:] {
		if !there {
			more++
		}
	}
	who := fmt.Sprintf("task %d on node %s", a.refs[first].Index, a.refs[first].Node)
	if more > 0 {
		who += fmt.Sprintf(" and %d more", more)
	}
	return who
}

// nameStragglers tells whom a step waits for, from time to time until ctx ends.
func (d *doing) nameStragglers(ctx context.Context, a *awaited) {
	for {
		select {
		case <-d.clock.After(stragglerAfter):
		case <-ctx.Done():
			return
		}
		if who := a.late(); who != "" {
			d.write(ctx, 0, fmt.Sprintf("%s waits for %s", d.op.Step, who))
		}
	}
}
