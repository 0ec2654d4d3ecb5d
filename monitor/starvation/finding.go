package starvation

import (
	"cmp"
	"time"

	"dormouse/api"
)

// Finding is the verdict as it goes to the controller. Whose it is, the caller
// knows.
func (v Verdict) Finding(at time.Time) api.Finding {
	f := api.Finding{
		Time: at, Kind: api.FindingStarvation, Condition: string(v.Condition), Explanation: v.Explanation,
		Spins: v.Spins(), Severity: v.severity(),
	}
	if v.Suspected != Healthy && v.Suspected != v.Condition {
		f.Suspected = string(v.Suspected)
	}
	if !v.Since.IsZero() {
		f.Since = &v.Since
	}
	return f
}

// VerdictOf rebuilds as much of a verdict from its finding as Judge needs. The
// verdict of a task that has found nothing yet is the zero finding's: healthy.
func VerdictOf(f api.Finding) Verdict {
	v := Verdict{
		Condition: cmp.Or(Condition(f.Condition), Healthy), Suspected: cmp.Or(Condition(f.Suspected), Condition(f.Condition), Healthy),
		Explanation: f.Explanation, Stopped: !f.Spins,
		Figures: Figures{Missed: f.Severity, MemoryStall: f.Severity, IOStall: f.Severity},
	}
	if f.Since != nil {
		v.Since = *f.Since
	}
	return v
}
