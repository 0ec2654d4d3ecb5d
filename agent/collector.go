package agent

import (
	"runtime/debug"
	"sync"
)

// collector is Go's garbage collector, which is to stay out of the way of tasks
// that are waited for. An agent's heap is small, so the little garbage of a restore
// is enough for several collections within it (runtime/debug, SetGCPercent).
type collector struct {
	mu      sync.Mutex
	waiting int // tasks that are waited for
	percent int // as it was before
}

// relaxedPercent is how much the heap may grow while a task is waited for.
const relaxedPercent = 400

// relax lets the heap grow further before garbage is collected, until the returned
// function is called.
func (c *collector) relax() (done func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.waiting++; c.waiting == 1 {
		c.percent = debug.SetGCPercent(relaxedPercent)
	}
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.waiting--; c.waiting == 0 {
			debug.SetGCPercent(c.percent)
		}
	}
}
