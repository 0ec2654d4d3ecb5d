package interval

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"strconv"
	"time"
)

// Bounds hold the interval of auto.
type Bounds struct{ Min, Max time.Duration }

// Usual are the bounds unless others are given.
var Usual = Bounds{Min: 30 * time.Second, Max: 6 * time.Hour}

// unmeasured bounds the interval of auto until there is a cost to go by.
const unmeasured = 10 * time.Minute

// Node is one of the nodes that a job is on.
type Node struct {
	Cloud string
	Own   Tally
}

// Job is what a plan depends on.
type Job struct {
	ID string
	// Begun is when the present run began.
	Begun time.Time
	// Durable is when the newest durable checkpoint was asked for; zero: there
	// is none.
	Durable time.Time
	// Failed is when the newest attempt was made, if it failed, and Failures how
	// many have since the newest durable checkpoint.
	Failed   time.Time
	Failures int
	Costs    []Cost // of the newest durable checkpoints, oldest first
	Nodes    []Node // each once
	// Clouds is what was seen of all nodes, by cloud.
	Clouds map[string]Tally
}

// Plan is when a job is checkpointed next, and why then.
type Plan struct {
	Policy Policy
	// Interval is the time between checkpoints; of a cron line, between its next
	// two times.
	Interval time.Duration
	Due      time.Time
	Failures int
	Auto     *Inputs // nil unless the policy is auto
}

// Inputs are what the interval of auto was made of.
type Inputs struct {
	Cost     Cost
	Measured int // checkpoints that the cost was taken from; 0: it is presumed
	Nodes    int // of the job
	MTBF     time.Duration
	// Losses and NodeTime are what was seen of all nodes of the job's clouds,
	// older things counting less.
	Losses   float64
	NodeTime time.Duration
	// Optimum is Daly's interval, before Bounds.
	Optimum time.Duration
	Bounds  Bounds
	Loss    float64 // expected share of the time
}

// For plans the next checkpoint of a running job. watched is since when
// somebody has looked at what is due. The zero Policy has no plan.
func (p Policy) For(job Job, bounds Bounds, watched time.Time) (plan Plan, planned bool) {
	plan = Plan{Policy: p, Failures: job.Failures}
	base := job.Begun
	if job.Durable.After(base) {
		base = job.Durable
	}
	chance := fixedChance(job.ID)
	switch {
	case p.IsZero():
		return Plan{}, false
	case p.schedule != nil:
		next := p.tick(base)
		plan.Interval = p.tick(next).Sub(next)
		plan.Due = next.Add(portion(min(plan.Interval/20, 5*time.Minute), chance))
	default:
		plan.Interval = p.every
		if p.auto {
			plan.Auto = inputsOf(job, bounds)
			plan.Interval = plan.Auto.interval()
		}
		plan.Due = base.Add(plan.Interval)
		if base.Equal(job.Begun) { // the first of this run
			plan.Due = plan.Due.Add(-portion(plan.Interval/2, chance))
		}
	}
	if job.Failures > 0 && !job.Failed.Before(base) {
		plan.Due = job.Failed.Add(retryAfter(plan.Interval, job.Failures))
	}
	if plan.Due.Before(watched) {
		plan.Due = watched.Add(portion(min(plan.Interval/2, time.Minute), chance))
	}
	return plan, true
}

// retryAfter is how long to wait after so many failures.
func retryAfter(interval time.Duration, failures int) time.Duration {
	return interval / time.Duration(1<<max(4-failures, 0))
}

// fixedChance is a number in [0, 1) that looks like chance and is always the
// same for the same id.
func fixedChance(id string) float64 {
	sum := sha256.Sum256([]byte(id))
	return float64(binary.BigEndian.Uint64(sum[:])>>11) / (1 << 53)
}

func portion(d time.Duration, share float64) time.Duration {
	return time.Duration(float64(d) * share)
}

func inputsOf(job Job, bounds Bounds) *Inputs {
	in := &Inputs{Cost: typical(job.Costs), Measured: len(job.Costs), Nodes: len(job.Nodes), Bounds: bounds}
	if in.Bounds == (Bounds{}) {
		in.Bounds = Usual
	}
	rate, seen := Rate(0), map[string]bool{}
	for _, node := range job.Nodes {
		all := job.Clouds[node.Cloud]
		rate += NodeRate(CloudRate(all), node.Own)
		if !seen[node.Cloud] {
			seen[node.Cloud] = true
			in.Losses += all.Losses
			in.NodeTime += seconds(all.Up)
		}
	}
	in.MTBF = rate.MTBF()
	in.Optimum = Daly(in.Cost.Pause+in.Cost.Overhead, in.MTBF)
	in.Loss = Loss(in.interval(), in.Cost, in.MTBF)
	return in
}

// interval is the optimum within its bounds. A checkpoint cannot begin before
// the one before it is durable, and storing one after the other without end is
// no life for a node.
func (in *Inputs) interval() time.Duration {
	best := in.Optimum
	if in.Measured == 0 {
		best = min(best, unmeasured)
	}
	return min(max(best, in.Bounds.Min, 2*in.Cost.Durable), max(in.Bounds.Max, 2*in.Cost.Durable)).Round(time.Millisecond)
}

// Why says in one clause why the interval is what it is.
func (p Plan) Why() string {
	switch {
	case p.Auto != nil:
		return "every " + Short(p.Interval) + ": " + p.Auto.why(p.Interval)
	case p.Policy.schedule != nil:
		return fmt.Sprintf("at %q (UTC)", p.Policy)
	}
	return "every " + Short(p.Interval) + ", as asked for"
}

func (in *Inputs) why(interval time.Duration) string {
	cost := fmt.Sprintf("a checkpoint costs %s", Short(in.Cost.Pause+in.Cost.Overhead))
	switch in.Measured {
	case 0:
		cost += " (presumed: none is measured yet)"
	case 1:
		cost += " (measured once)"
	default:
		cost += fmt.Sprintf(" (median of %d)", in.Measured)
	}
	who := "its node fails"
	if in.Nodes != 1 {
		who = fmt.Sprintf("one of its %d nodes fails", in.Nodes)
	}
	seen := fmt.Sprintf("%s in %s node days", count(in.Losses), days(in.NodeTime))
	if in.NodeTime < portion(presumedMTBF, presumedWeight) {
		seen += ", so this is mostly presumed"
	}
	text := fmt.Sprintf("%s, %s once per %s (%s)", cost, who, Short(in.MTBF), seen)
	switch {
	case interval == in.Optimum.Round(time.Millisecond):
	case interval < in.Optimum:
		text += fmt.Sprintf("; %s would be best, and this is the longest allowed", Short(in.Optimum))
		if in.Measured == 0 {
			text += " without a measured cost"
		}
	default:
		text += fmt.Sprintf("; %s would be best, and this is the shortest allowed", Short(in.Optimum))
	}
	return text
}

func count(losses float64) string {
	text := strconv.FormatFloat(math.Round(losses*10)/10, 'f', -1, 64)
	if text == "1" {
		return "1 loss"
	}
	return text + " losses"
}

func days(d time.Duration) string {
	return strconv.FormatFloat(math.Round(d.Hours()/24*10)/10, 'f', -1, 64)
}

// Short words a duration for people, in two digits or three.
func Short(d time.Duration) string {
	number := func(value float64, unit string) string {
		if value < 10 {
			value = math.Round(value*10) / 10
		} else {
			value = math.Round(value)
		}
		return strconv.FormatFloat(value, 'f', -1, 64) + " " + unit
	}
	switch {
	case d < time.Second:
		return number(float64(d.Microseconds())/1000, "ms")
	case d < 2*time.Minute:
		return number(d.Seconds(), "s")
	case d < 2*time.Hour:
		return number(d.Minutes(), "min")
	case d < 48*time.Hour:
		return number(d.Hours(), "h")
	}
	return number(d.Hours()/24, "days")
}
