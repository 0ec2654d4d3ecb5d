// Package health asks a task how it is, as its job says: by a command inside the
// sandbox or by an HTTP request.
//
// A Checker asks once a period, never while an earlier probe is under way, and
// kills one that takes longer than its timeout. Retries failures in a row make a
// task unhealthy, and one success makes it healthy again. Failures during the
// start delay do not count until the task has once been healthy.
//
// While its Gate is shut nothing is asked: a probe in the sandbox would become
// part of a checkpoint, and a task that stands still cannot answer. Shutting the
// gate ends the probe under way, which then says nothing about the task.
package health

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"dormouse/api"
)

// Defaults of api.HealthCheck.
const (
	defaultPeriod  = 10 * time.Second
	defaultTimeout = 5 * time.Second
	defaultRetries = 3
)

// Probe asks once: nil is healthy, an error says why not, in a few words. When
// ctx ends it returns at once and leaves nothing.
type Probe func(ctx context.Context) error

// Checker asks one task.
type Checker struct {
	Probe Probe
	Gate  *Gate
	// Excused says why a failure would not be the task's fault just now; "" if it
	// would.
	Excused func() string
	// Changed is told of each change. It must not call the Checker.
	Changed func(Verdict)

	period, timeout, startDelay time.Duration
	retries                     int

	failures  int
	since     time.Time // the first of them
	unhealthy bool
	once      bool // it was healthy before
}

// Verdict is how a task is.
type Verdict struct {
	Healthy  bool
	Since    time.Time // the first failure
	Failures int       // in a row
	Reason   string    // of the last one
}

// New makes a checker by what a job says. unhealthy is what was found before, by
// an agent process that is gone.
func New(c api.HealthCheck, unhealthy bool) *Checker {
	or := func(ms int64, otherwise time.Duration) time.Duration {
		if ms <= 0 {
			return otherwise
		}
		return time.Duration(ms) * time.Millisecond
	}
	checker := &Checker{
		period: or(c.PeriodMS, defaultPeriod), timeout: or(c.TimeoutMS, defaultTimeout), startDelay: or(c.StartDelayMS, 0),
		retries: c.Retries, unhealthy: unhealthy,
	}
	if checker.retries <= 0 {
		checker.retries = defaultRetries
	}
	return checker
}

// Run asks until ctx ends.
func (c *Checker) Run(ctx context.Context) {
	begun := time.Now()
	ticker := time.NewTicker(c.period)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if c.Excused() != "" {
			continue
		}
		err, answered := c.ask(ctx)
		if ctx.Err() != nil {
			return
		}
		if answered {
			c.take(err, time.Now(), time.Since(begun))
		}
	}
}

// ask once. What was disturbed is no answer.
func (c *Checker) ask(ctx context.Context) (err error, answered bool) {
	ctx, leave, open := c.Gate.enter(ctx)
	if !open {
		return nil, false
	}
	defer leave()
	limited, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	err = c.Probe(limited)
	switch {
	case ctx.Err() != nil, err != nil && c.Excused() != "":
		return nil, false
	case limited.Err() != nil && err != nil:
		return fmt.Errorf("no answer within %s", c.timeout), true
	}
	return err, true
}

// take an answer, at a time and so long after the task began.
func (c *Checker) take(err error, now time.Time, age time.Duration) {
	if err == nil {
		was := c.unhealthy
		c.failures, c.unhealthy, c.once = 0, false, true
		if was {
			c.Changed(Verdict{Healthy: true})
		}
		return
	}
	if !c.once && !c.unhealthy && age < c.startDelay {
		return
	}
	if c.failures == 0 {
		c.since = now
	}
	c.failures++
	if c.failures >= c.retries && !c.unhealthy {
		c.unhealthy = true
		c.Changed(Verdict{Since: c.since, Failures: c.failures, Reason: err.Error()})
	}
}

// errShut is why a probe ends when its gate is shut.
var errShut = errors.New("the task is about to stand still")

// Gate lets probes in while nobody has shut it. The zero Gate is open.
type Gate struct {
	mu   sync.Mutex
	shut map[string]bool
	end  context.CancelCauseFunc // of the probe under way
	done chan struct{}           // closed when it has left; nil: there is none
}

// Shut ends the probe under way, and returns when it has left or ctx ends. The
// gate stays shut until Open is called for the same reason.
func (g *Gate) Shut(ctx context.Context, reason string) {
	g.mu.Lock()
	if g.shut == nil {
		g.shut = map[string]bool{}
	}
	g.shut[reason] = true
	end, done := g.end, g.done
	g.mu.Unlock()
	if done == nil {
		return
	}
	end(errShut)
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// Open takes a reason away; it may not be there.
func (g *Gate) Open(reason string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.shut, reason)
}

// enter lets one probe in, whose context ends when the gate is shut.
func (g *Gate) enter(ctx context.Context) (_ context.Context, leave func(), open bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.shut) > 0 || g.done != nil {
		return nil, nil, false
	}
	ctx, end := context.WithCancelCause(ctx)
	done := make(chan struct{})
	g.end, g.done = end, done
	return ctx, func() {
		g.mu.Lock()
		g.end, g.done = nil, nil
		g.mu.Unlock()
		end(nil)
		close(done)
	}, true
}
