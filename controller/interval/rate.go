package interval

import (
	"math"
	"time"
)

// memory is how long an observation counts: after it, it has the weight 1/e.
const memory = 30 * 24 * time.Hour

// Tally is how often a node was lost in how much time. Both are forgotten
// exponentially, so that a rate that changes is followed.
type Tally struct {
	Losses float64 `json:"losses"`
	Up     float64 `json:"up"` // seconds
	// At is when the two were true; zero: the tally is empty.
	At time.Time `json:"at,omitzero"`
}

// After is the tally at a later time, given whether the node was up meanwhile.
func (t Tally) After(now time.Time, up bool) Tally {
	if t.At.IsZero() {
		return Tally{At: now}
	}
	passed := now.Sub(t.At)
	if passed <= 0 {
		return t
	}
	kept := math.Exp(-passed.Seconds() / memory.Seconds())
	t.Losses, t.Up, t.At = t.Losses*kept, t.Up*kept, now
	if up {
		t.Up += memory.Seconds() * (1 - kept)
	}
	return t
}

// Lose counts one loss.
func (t Tally) Lose() Tally {
	t.Losses++
	return t
}

// Plus adds what was seen of another node.
func (t Tally) Plus(other Tally) Tally {
	t.Losses += other.Losses
	t.Up += other.Up
	return t
}

// Rate is failures per second.
type Rate float64

// MTBF is the mean time between failures; the longest there is when there are
// none.
func (r Rate) MTBF() time.Duration {
	if r <= 0 {
		return time.Duration(math.MaxInt64)
	}
	return seconds(1 / float64(r))
}

// What is presumed of a cloud before anything was seen: a node is lost once per
// presumedMTBF. It counts as much as presumedWeight losses. Schroeder and Gibson
// (2010) found from a few weeks to years for nodes of large systems.
const (
	presumedMTBF   = 30 * 24 * time.Hour
	presumedWeight = 0.5
	nodeWeight     = 1.0
)

// posterior is the mean rate after a tally, where a Gamma distribution with
// the given mean, worth so many losses, was presumed: the conjugate of
// exponential times between failures (Gelman et al., Bayesian Data Analysis,
// 2.6).
func posterior(presumed Rate, weight float64, t Tally) Rate {
	return Rate((weight + t.Losses) / (weight/float64(presumed) + t.Up))
}

// CloudRate is how often one of a cloud's nodes is lost, given what was seen of
// all of them.
func CloudRate(all Tally) Rate {
	return posterior(Rate(1/presumedMTBF.Seconds()), presumedWeight, all)
}

// NodeRate is how often one node is lost: as its cloud's others, until its own
// history says otherwise.
func NodeRate(cloud Rate, own Tally) Rate { return posterior(cloud, nodeWeight, own) }
