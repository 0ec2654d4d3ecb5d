package agent

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// leaseFile remembers the lease across a restart of the agent.
const leaseFile = "lease.json"

// lease is the agent's right to let its tasks run. It runs out when no
// heartbeat that was sent within the last term has been acknowledged; counting
// from the sending, not from the acknowledgement, makes it end earlier here
// than in the controller's reckoning.
//
// Times are those of CLOCK_BOOTTIME, which goes on while the machine sleeps and
// which nobody can set.
type lease struct {
	path string

	mu      sync.Mutex
	term    time.Duration
	until   time.Duration // boot time
	lapsed  bool
	held    bool          // all tasks stand still since then
	changed chan struct{} // capacity 1: the end moved
}

// storedLease is the lease in its file. Boot tells whether Until is of this
// boot of the machine.
type storedLease struct {
	Boot  string        `json:"boot"`
	Until time.Duration `json:"until_ns"`
	Term  time.Duration `json:"term_ns,omitempty"`
	// Held is set when the agent has frozen all tasks since the lease ran out.
	Held bool `json:"held,omitempty"`
}

// openLease reads the lease that an earlier agent process held. Without one it
// has not lapsed: there are no tasks that it could have been about.
func openLease(dir string) (*lease, error) {
	l := &lease{path: filepath.Join(dir, leaseFile), changed: make(chan struct{}, 1)}
	var stored storedLease
	err := readJSON(l.path, &stored)
	if os.IsNotExist(err) {
		return l, nil
	}
	if err != nil {
		return nil, err
	}
	if stored.Boot == bootID() {
		l.until, l.term = stored.Until, stored.Term
		l.lapsed = bootTime() >= stored.Until
	}
	return l, nil
}

// grant starts the lease anew: the controller has just said what became of
// each task. sent is when it was asked.
func (l *lease) grant(term, sent time.Duration) error {
	l.mu.Lock()
	l.term = term
	l.lapsed = false
	l.mu.Unlock()
	return l.renew(sent)
}

// renew moves the end of the lease: a heartbeat sent at sent was acknowledged.
// A lease that has lapsed is not renewed, only granted anew.
func (l *lease) renew(sent time.Duration) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lapsed || sent+l.term <= l.until {
		return nil
	}
	l.until, l.held = sent+l.term, false
	select {
	case l.changed <- struct{}{}:
	default:
	}
	return l.store()
}

// store needs no fsync: the lease matters only while the machine stays up.
func (l *lease) store() error {
	return writeJSONQuickly(l.path, storedLease{Boot: bootID(), Until: l.until, Term: l.term, Held: l.held})
}

// hold tells the guard that all tasks stand still for want of a lease.
func (l *lease) hold() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.lapsed {
		return nil // it was granted anew meanwhile
	}
	l.held = true
	return l.store()
}

// hasLapsed reports whether tasks must stand still.
func (l *lease) hasLapsed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lapsed
}

// watch calls lapse each time the lease runs out, until ctx ends.
func (l *lease) watch(ctx context.Context, lapse func()) {
	for {
		left, counting := l.left()
		if counting && left <= 0 {
			l.mu.Lock()
			l.lapsed = true
			l.mu.Unlock()
			lapse()
			continue
		}
		if !counting {
			left = time.Hour // until granted
		}
		timer := time.NewTimer(left)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-l.changed:
			timer.Stop()
		case <-timer.C:
		}
	}
}

func (l *lease) left() (left time.Duration, counting bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.until - bootTime(), !l.lapsed && l.until > 0
}

// bootTime is the time since the machine started.
func bootTime() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		panic("clock_gettime(CLOCK_BOOTTIME): " + err.Error()) // Linux has it since 2.6.39
	}
	return time.Duration(now.Nano())
}

func bootID() string {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}
