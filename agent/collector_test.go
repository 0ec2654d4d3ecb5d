package agent

import (
	"runtime/debug"
	"testing"
)

func TestGarbageIsCollectedAsBeforeOnceNobodyIsWaitedFor(t *testing.T) {
	before := debug.SetGCPercent(70)
	defer debug.SetGCPercent(before)
	percent := func() int {
		now := debug.SetGCPercent(70)
		debug.SetGCPercent(now)
		return now
	}
	var c collector
	first, second := c.relax(), c.relax()
	first()
	if got := percent(); got != relaxedPercent {
		t.Errorf("while one is waited for: %d, want %d", got, relaxedPercent)
	}
	second()
	if got := percent(); got != 70 {
		t.Errorf("afterwards: %d, want 70", got)
	}
}
