// Package plugintest is the conformance suite of plugins.Plugin. A plugin's own
// test needs only:
//
//	func TestConformance(t *testing.T) {
//		plugintest.Run(t, func(t *testing.T) *plugintest.Fixture {
//			... a real, running task with ties of the plugin's kind, that goes away with t ...
//		})
//	}
package plugintest

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"dormouse/agent/criu"
	"dormouse/agent/plugins"
	"dormouse/api"
)

// Fixture is a task that has ties which a checkpoint captures. What is at the
// other end of them, in another task of the job, uses them all the time, and is not
// stopped by Freeze: so the ties move unless the plugin sees to it that they do not.
type Fixture struct {
	// Plugin makes the plugin, as every agent does at its start.
	Plugin func() plugins.Plugin
	Task   plugins.Task
	// Progress counts what has passed over the ties and was seen by both ends.
	Progress func() int
	// State describes what the kernel, or the device, holds of the task's ties: it
	// changes when anything arrives.
	State func() string
	// Freeze stops the task's processes and returns when they stand still.
	Freeze, Thaw func()
	// Offend gives the task a tie that its policy refuses. It returns what a refusal
	// must say of it, and what takes it away again.
	Offend func() (says []string, undo func())
	// End ends the task's processes.
	End func()
}

// Run checks every promise of plugins.Plugin, each on a new fixture.
func Run(t *testing.T, start func(t *testing.T) *Fixture) {
	for name, check := range map[string]func(*testing.T, *Fixture){
		"LookDisturbsNothing":               lookDisturbsNothing,
		"LookNamesWhatIsRefused":            lookNamesWhatIsRefused,
		"LookRefusesNothingUnderOtherRules": lookFollowsThePolicy,
		"QuiesceRefusesWhatCameLater":       quiesceRefuses,
		"QuiescedStaysAtRest":               quiescedStaysAtRest,
		"QuiesceMayBeRepeated":              quiesceMayBeRepeated,
		"QuiesceEndsWithItsContext":         quiesceEndsWithContext,
		"ResumeOfWhatIsNotHeld":             resumeOfWhatIsNotHeld,
		"ResumeByAnAgentThatWasRestarted":   resumeByAnotherAgent,
		"ResumeNeedsNoProcesses":            resumeWithoutProcesses,
		"ProcessesThatEndAreNoError":        processesThatEnd,
	} {
		t.Run(name, func(t *testing.T) {
			f := start(t)
			works(t, f)
			check(t, f)
		})
	}
}

// works waits until the ties were used anew.
func works(t *testing.T, f *Fixture) {
	t.Helper()
	before := f.Progress()
	await(t, "something to pass over the task's ties", func() bool { return f.Progress() >= before+5 })
}

func await(t *testing.T, what string, reached func() bool) {
	t.Helper()
	for limit := time.Now().Add(20 * time.Second); !reached(); time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func look(t *testing.T, f *Fixture) []criu.Refusal {
	t.Helper()
	refusals, err := f.Plugin().Look(t.Context(), f.Task)
	must(t, err)
	return refusals
}

// quiesce freezes the task and quiesces it.
func quiesce(t *testing.T, f *Fixture) {
	t.Helper()
	f.Freeze()
	must(t, f.Plugin().Quiesce(t.Context(), f.Task))
}

// resume lets the task go on and expects its ties to work.
func resume(t *testing.T, f *Fixture) {
	t.Helper()
	must(t, f.Plugin().Resume(t.Context(), f.Task))
	f.Thaw()
	works(t, f)
}

func expectRefusal(t *testing.T, refusals []criu.Refusal, says []string) {
	t.Helper()
	for _, r := range refusals {
		if namesAll(r, says) {
			return
		}
	}
	t.Errorf("refused is %v; want one refusal that names %q, the process and what to do", refusals, says)
}

func namesAll(r criu.Refusal, says []string) bool {
	for _, s := range says {
		if !strings.Contains(r.String(), s) {
			return false
		}
	}
	return r.Pid > 0 && r.Comm != "" && r.Fix != ""
}

func lookDisturbsNothing(t *testing.T, f *Fixture) {
	if refusals := look(t, f); len(refusals) > 0 {
		t.Errorf("a task that can be captured is refused: %v", refusals)
	}
	works(t, f)
}

func lookNamesWhatIsRefused(t *testing.T, f *Fixture) {
	says, undo := f.Offend()
	expectRefusal(t, look(t, f), says)
	works(t, f)
	undo()
	await(t, "the refusal to end with its reason", func() bool { return len(look(t, f)) == 0 })
}

func lookFollowsThePolicy(t *testing.T, f *Fixture) {
	f.Offend()
	for _, policy := range []string{api.ConnectionsClose, api.ConnectionsKeep} {
		f.Task.Spec.Connections = policy
		if refusals := look(t, f); len(refusals) > 0 {
			t.Errorf("under the policy %s is refused: %v", policy, refusals)
		}
	}
}

func quiesceRefuses(t *testing.T, f *Fixture) {
	if refusals := look(t, f); len(refusals) > 0 {
		t.Fatalf("a task that can be captured is refused: %v", refusals)
	}
	says, _ := f.Offend()
	f.Freeze()
	err := f.Plugin().Quiesce(t.Context(), f.Task)
	var refused *plugins.RefusedError
	if !errors.As(err, &refused) {
		t.Fatalf("Quiesce returned %v; want a *RefusedError", err)
	}
	expectRefusal(t, refused.Refusals, says)
	resume(t, f)
}

func quiescedStaysAtRest(t *testing.T, f *Fixture) {
	f.Freeze()
	moving := f.State()
	await(t, "something to arrive in a frozen task before it is quiesced", func() bool { return f.State() != moving })
	must(t, f.Plugin().Quiesce(t.Context(), f.Task))
	before := f.State()
	time.Sleep(100 * time.Millisecond) // the time in which nothing must happen
	if after := f.State(); after != before {
		t.Errorf("at rest the state went from %q to %q", before, after)
	}
	resume(t, f)
}

func quiesceMayBeRepeated(t *testing.T, f *Fixture) {
	quiesce(t, f)
	before := f.State()
	must(t, f.Plugin().Quiesce(t.Context(), f.Task))
	if after := f.State(); after != before {
		t.Errorf("a second Quiesce changed the state from %q to %q", before, after)
	}
	resume(t, f)
}

func quiesceEndsWithContext(t *testing.T, f *Fixture) {
	f.Freeze()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.Plugin().Quiesce(ctx, f.Task); !errors.Is(err, context.Canceled) {
		t.Errorf("Quiesce returned %v; want the end of its context", err)
	}
	resume(t, f)
}

func resumeOfWhatIsNotHeld(t *testing.T, f *Fixture) {
	must(t, f.Plugin().Resume(t.Context(), f.Task))
	works(t, f)
	quiesce(t, f)
	must(t, f.Plugin().Resume(t.Context(), f.Task))
	resume(t, f)
}

func resumeByAnotherAgent(t *testing.T, f *Fixture) {
	first, second := f.Plugin(), f.Plugin()
	f.Freeze()
	must(t, first.Quiesce(t.Context(), f.Task))
	must(t, second.Resume(t.Context(), f.Task))
	f.Thaw()
	works(t, f)
}

func resumeWithoutProcesses(t *testing.T, f *Fixture) {
	quiesce(t, f)
	unnamed := f.Task
	unnamed.PIDs = nil
	must(t, f.Plugin().Resume(t.Context(), unnamed))
	f.Thaw()
	works(t, f)
}

func processesThatEnd(t *testing.T, f *Fixture) {
	f.End()
	if refusals := look(t, f); len(refusals) > 0 {
		t.Errorf("a task whose processes are gone is refused: %v", refusals)
	}
	must(t, f.Plugin().Quiesce(t.Context(), f.Task))
	must(t, f.Plugin().Restored(t.Context(), f.Task))
	must(t, f.Plugin().Resume(t.Context(), f.Task))
}
