package protocol

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"dormouse/api"
)

var kinds = []api.OperationKind{api.OpStart, api.OpCheckpoint, api.OpSuspend, api.OpResume, api.OpRestart, api.OpClone, api.OpKill, api.OpRecover, api.OpVerify, api.OpDrill}

// Whatever fails, in whatever order, an operation moves through its flow as the
// flow says, and comes to an end once failures do.
func TestFlowsAlwaysEnd(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		kind := rapid.SampledFrom(kinds).Draw(t, "kind")
		f := FlowOf(kind, 4, 0)
		at := f.Begin()
		failures := rapid.IntRange(0, 30).Draw(t, "failures")
		committed := false
		for range 500 {
			var failed *Failure
			if failures > 0 && rapid.Bool().Draw(t, "fails") {
				failures--
				failed = &Failure{Message: "broke", Retryable: rapid.Bool().Draw(t, "retryable")}
			}
			m := f.next(at, failed)
			if failed == nil && at.Cause == nil && at.Step == f.commit {
				committed = true
			}
			if committed && m.To.Cause != nil {
				t.Fatalf("%s is undone at %s although %s had succeeded", kind, m.To.Step, f.commit)
			}
			if m.To.Attempt > MaxAttempts || (f.once && m.To.Attempt > 1) {
				t.Fatalf("%s is at attempt %d", kind, m.To.Attempt)
			}
			if m.Phase == api.OpDone && (failed != nil || at.Step != f.steps[len(f.steps)-1]) {
				t.Fatalf("%s is done at %s, failed: %v", kind, at.Step, failed)
			}
			if m.Phase == api.OpFailed && len(f.undo) > 0 && at.Step != f.undo[len(f.undo)-1] {
				t.Fatalf("%s failed at %s without being undone", kind, at.Step)
			}
			if m.Phase != api.OpRunning {
				return
			}
			if known := slices.Contains(f.steps, m.To.Step) || slices.Contains(f.undo, m.To.Step); !known {
				t.Fatalf("%s went to the unknown step %q", kind, m.To.Step)
			}
			at = m.To
		}
		t.Fatalf("%s has not ended", kind)
	})
}

func TestUndisturbedFlowTakesEachStepOnce(t *testing.T) {
	for _, kind := range kinds {
		f := FlowOf(kind, 4, 0)
		at, taken, last := f.Begin(), []string{}, -1.0
		for {
			taken = append(taken, at.Step)
			if p := f.Progress(at, 0); p <= last || p > 1 {
				t.Errorf("%s: progress goes from %v to %v at %s", kind, last, p, at.Step)
			} else {
				last = p
			}
			m := f.next(at, nil)
			if m.Phase == api.OpDone {
				break
			}
			at = m.To
		}
		if !slices.Equal(taken, f.steps) {
			t.Errorf("%s: want %v, got %v", kind, f.steps, taken)
		}
	}
}
