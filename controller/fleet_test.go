package controller

import (
	"strings"
	"testing"
	"time"
)

// beating is a fleet with one node that was heard of n times, each so long after
// the one before.
func beating(n int, gap func(i int) time.Duration) (*fleet, *session, time.Time) {
	parts := Parts{Heartbeat: time.Second, Lease: 30 * time.Second}
	f := newFleet(func() bool { return true }, accrualBounds(parts))
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	s := &session{node: "n", end: func(error) {}}
	f.revive("n", now)
	f.attach(s, now)
	for i := range n {
		now = now.Add(gap(i))
		f.renew(s, now)
	}
	return f, s, now
}

// suspectAfter is the silence after which the node is suspect.
func suspectAfter(f *fleet, last time.Time) time.Duration {
	silent := time.Duration(0)
	for ; silent < time.Hour; silent += 10 * time.Millisecond {
		if _, suspect := f.suspect("n", last.Add(silent)); suspect {
			break
		}
	}
	return silent
}

func TestARegularNodeIsMissedSoonAndOneOnABadLineLate(t *testing.T) {
	f, _, last := beating(100, func(int) time.Duration { return time.Second })
	if after := suspectAfter(f, last); after < silence*time.Second || after > silence*time.Second+time.Second/10 {
		t.Errorf("a node that is heard of every second is suspect after %s", after)
	}
	irregular := func(i int) time.Duration { return time.Second + time.Duration(i%7)*600*time.Millisecond }
	f, _, last = beating(300, irregular)
	if after := suspectAfter(f, last); after < 8*time.Second || after > 15*time.Second {
		t.Errorf("a node that is heard of every 1 to 4.6 seconds is suspect after %s", after)
	}
	why, _ := f.suspect("n", last.Add(20*time.Second))
	for _, want := range []string{"silent for 20s", "usually heard of every 2.", "phi "} {
		if !strings.Contains(why, want) {
			t.Errorf("the reason %q lacks %q", why, want)
		}
	}
}

// However long the learned silences are, half a lease is suspect, and the lease
// itself is no matter of what was learned.
func TestWhatWasLearnedNeverOutlastsTheLease(t *testing.T) {
	f, _, last := beating(500, func(int) time.Duration { return 12 * time.Second })
	if after := suspectAfter(f, last); after > 16*time.Second {
		t.Errorf("suspect after %s with a lease of 30 s", after)
	}
	if f.expire("n", last.Add(39*time.Second), 40*time.Second) {
		t.Error("the node was lost before its lease and the margin were over")
	}
	if !f.expire("n", last.Add(41*time.Second), 40*time.Second) {
		t.Error("the node was not lost after its lease and the margin")
	}
}

// What the controller slept through is no silence of the nodes, and no more than
// they were silent for.
func TestSilenceInWhichNobodyListenedIsExcused(t *testing.T) {
	f, s, last := beating(100, func(int) time.Duration { return time.Second })
	slept := last.Add(60 * time.Second)
	f.excuse(59*time.Second, slept)
	if why, suspect := f.suspect("n", slept); suspect || f.expire("n", slept, 40*time.Second) {
		t.Errorf("the node is suspect or lost: %s", why)
	}
	if !f.expire("n", slept.Add(40*time.Second), 40*time.Second) {
		t.Error("the node was not lost a lease after the controller woke")
	}
	f.revive("n", slept)
	f.attach(s, slept)
	f.excuse(time.Hour, slept.Add(time.Second))
	if quiet := f.silence("n", slept.Add(2*time.Second)); quiet != time.Second {
		t.Errorf("the node is said to be silent for %s, want 1s", quiet)
	}
}

func TestANodeNeverHeardOfIsNotSuspect(t *testing.T) {
	f := newFleet(func() bool { return true }, accrualBounds(Parts{Heartbeat: time.Second, Lease: 30 * time.Second}))
	if why, suspect := f.suspect("n", time.Now()); suspect {
		t.Errorf("suspect: %s", why)
	}
}

func BenchmarkRenew(b *testing.B) {
	f, s, now := beating(300, func(int) time.Duration { return time.Second })
	for b.Loop() {
		now = now.Add(time.Second)
		f.renew(s, now)
	}
}
