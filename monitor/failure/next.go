package failure

import (
	"fmt"
	"math"
	"time"
)

// Policy says how a failed job is started again. A zero field but MaxRestarts
// gets the value named beside it.
type Policy struct {
	MaxRestarts int           // in a row, without a run that held; 0: none, negative: without end
	First       time.Duration // delay before the first restart; 1 s
	Factor      float64       // by which each further delay is longer; 2
	Longest     time.Duration // delay; 5 min
	ResetAfter  time.Duration // a run this long has held; 10 min
	Quick       time.Duration // a failure sooner after the start is quick; 1 min
	QuickLimit  int           // quick failures in a row that poison a checkpoint; 2
}

func (p Policy) filled() Policy {
	if p.First <= 0 {
		p.First = time.Second
	}
	if p.Factor < 1 {
		p.Factor = 2
	}
	if p.Longest <= 0 {
		p.Longest = 5 * time.Minute
	}
	p.Longest = max(p.Longest, p.First)
	if p.ResetAfter <= 0 {
		p.ResetAfter = 10 * time.Minute
	}
	if p.Quick <= 0 {
		p.Quick = time.Minute
	}
	p.Quick = min(p.Quick, p.ResetAfter)
	if p.QuickLimit <= 0 {
		p.QuickLimit = 2
	}
	return p
}

// Cause is why a run ended.
type Cause string

// The causes of failure Next tells apart.
const (
	Program  Cause = "program"  // exit status, signal, out of memory, health check
	Node     Cause = "node"     // the node was lost or taken away
	Restore  Cause = "restore"  // the checkpoint could not be restored
	Platform Cause = "platform" // it could not be tried: the repository did not answer
)

// Run is one past life of a job that ended in failure.
type Run struct {
	From    string    // the checkpoint it was restored from; "" for a start from nothing
	Started time.Time // the program ran, or began to be restored
	Failed  time.Time
	Cause   Cause
}

// length of the run; a clock set back makes it zero, not negative.
func (r Run) length() time.Duration { return max(0, r.Failed.Sub(r.Started)) }

// quick reports whether the run speaks against what it was started from.
func (r Run) quick(p Policy) bool {
	return r.Cause == Restore || r.Cause == Program && r.length() < p.Quick
}

// mute reports whether the run says nothing of what it was started from: it ended
// soon, and for another reason.
func (r Run) mute(p Policy) bool {
	return r.Cause == Platform || r.Cause == Node && r.length() < p.Quick
}

func (r Run) held(p Policy) bool {
	return r.Cause != Restore && r.Cause != Platform && r.length() >= p.ResetAfter
}

// Decision is what to do with a failed job.
type Decision struct {
	Restart bool
	From    string    // checkpoint to restore; "" starts from nothing
	At      time.Time // not earlier
	Reason  string    // one sentence for the job's history
}

// Next decides about a job after the last of runs (oldest first) has failed.
// checkpoints are those that may be restored, newest first. It only reads its
// arguments: the same ones always give the same decision.
func Next(policy Policy, runs []Run, checkpoints []string) Decision {
	policy = policy.filled()
	if len(runs) == 0 {
		return Decision{Restart: true, From: first(checkpoints), Reason: "it has never failed"}
	}
	row := inRow(policy, runs)
	if policy.MaxRestarts >= 0 && row > policy.MaxRestarts {
		return Decision{Reason: fmt.Sprintf("it failed %s without holding for %v in between: its limit is %d restarts", times(row), policy.ResetAfter, policy.MaxRestarts)}
	}
	from, found := source(policy, runs, checkpoints)
	if !found {
		return Decision{Reason: fmt.Sprintf(
			"crash loop: from each of its %d checkpoints and from nothing it failed %s in a row within %v of its start",
			len(checkpoints), times(policy.QuickLimit), policy.Quick)}
	}
	stuck := min(row, sinceAdvance(runs, from))
	delay := policy.Delay(stuck)
	if stuck == 0 || stuck == 1 && runs[len(runs)-1].Cause == Node {
		delay = 0 // nothing speaks for another node being lost, too
	}
	return Decision{
		Restart: true,
		From:    from,
		At:      runs[len(runs)-1].Failed.Add(delay),
		Reason:  reason(policy, runs, checkpoints, from, row, delay),
	}
}

// inRow counts the failures since the last run that held, its own included: that
// one begins the new row.
func inRow(p Policy, runs []Run) int {
	for i := len(runs) - 1; i >= 0; i-- {
		if runs[i].held(p) {
			return len(runs) - i
		}
	}
	return len(runs)
}

// sinceAdvance counts the failures since the last run that got further and was then
// lost with its node: what followed went on from another checkpoint than it did.
// from is what follows the last one. Such a run speaks neither against the job nor
// for waiting.
func sinceAdvance(runs []Run, from string) (n int) {
	for i := len(runs) - 1; i >= 0; i-- {
		if runs[i].Cause == Node && runs[i].From != from {
			return n
		}
		n, from = n+1, runs[i].From
	}
	return n
}

// source picks the newest checkpoint that is not poisoned, in the end the start
// from nothing.
func source(p Policy, runs []Run, checkpoints []string) (from string, found bool) {
	for _, checkpoint := range checkpoints {
		if !poisoned(p, runs, checkpoint) {
			return checkpoint, true
		}
	}
	return "", !poisoned(p, runs, "")
}

// poisoned reports whether the runs from checkpoint ever failed quickly
// QuickLimit times in a row. Runs from elsewhere in between change nothing.
// The start from nothing is forgiven by a run that held since.
func poisoned(p Policy, runs []Run, checkpoint string) bool {
	row := 0
	for _, run := range runs {
		if checkpoint == "" && run.held(p) {
			row = 0
			continue
		}
		if run.From != checkpoint || run.mute(p) {
			continue
		}
		if !run.quick(p) {
			row = 0
			continue
		}
		if row++; row >= p.QuickLimit && checkpoint != "" {
			return true
		}
	}
	return row >= p.QuickLimit
}

// Delay before the restart after the given number of failures in a row.
func (p Policy) Delay(row int) time.Duration {
	p = p.filled()
	delay := float64(p.First) * math.Pow(p.Factor, float64(max(0, row-1)))
	return time.Duration(min(delay, float64(p.Longest)))
}

func reason(p Policy, runs []Run, checkpoints []string, from string, row int, delay time.Duration) string {
	what := "from nothing"
	if from != "" {
		what = "from checkpoint " + from
	}
	if newest := first(checkpoints); newest != from {
		what += fmt.Sprintf(" (the newest, %s, failed %s in a row within %v of its start)", newest, times(p.QuickLimit), p.Quick)
	}
	last := runs[len(runs)-1]
	when := "at once"
	if delay > 0 {
		when = "in " + delay.String()
	}
	text := fmt.Sprintf("%s failure after %v: starts again %s %s", last.Cause, last.length().Round(time.Second), what, when)
	if p.MaxRestarts < 0 {
		return text
	}
	return fmt.Sprintf("%s, restart %d of %d", text, row, p.MaxRestarts)
}

func first(checkpoints []string) string {
	if len(checkpoints) == 0 {
		return ""
	}
	return checkpoints[0]
}

func times(n int) string {
	switch n {
	case 1:
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}
