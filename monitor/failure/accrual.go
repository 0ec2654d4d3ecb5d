package failure

import (
	"math"
	"time"
)

// Bounds configure an Accrual. A zero field gets the value named beside it.
type Bounds struct {
	Interval  time.Duration // expected between two heartbeats; 1 s
	Window    int           // gaps remembered; 200
	Threshold float64       // the phi from which a node is suspect; 8
	Min       time.Duration // no shorter silence is suspect; 2 intervals
	Max       time.Duration // every longer silence is suspect; 30 intervals
}

func (b Bounds) filled() Bounds {
	if b.Interval <= 0 {
		b.Interval = time.Second
	}
	if b.Window <= 0 {
		b.Window = 200
	}
	if b.Threshold <= 0 {
		b.Threshold = 8
	}
	if b.Min <= 0 {
		b.Min = 2 * b.Interval
	}
	if b.Max <= 0 {
		b.Max = 30 * b.Interval
	}
	b.Max = max(b.Max, b.Min)
	return b
}

const (
	// enough gaps for a mean; before, the configured interval stands for it.
	enough = 5
	// leastDeviation of the gaps, as a share of their mean.
	leastDeviation = 0.25
)

// Accrual judges the silence of one node. It is not safe for concurrent use.
type Accrual struct {
	bounds     Bounds
	suspicious float64 // deviations above the mean that make phi the threshold
	last       time.Time
	gaps       []float64 // seconds; a ring once it is full
	oldest     int
	sum, sumSq float64
}

// NewAccrual returns the detector of a node last heard of at now.
func NewAccrual(bounds Bounds, now time.Time) *Accrual {
	bounds = bounds.filled()
	return &Accrual{bounds: bounds, suspicious: deviations(bounds.Threshold), last: now}
}

// Heartbeat records that the node was heard of at now. One that seems to come
// from before the last is ignored.
func (a *Accrual) Heartbeat(now time.Time) {
	gap := now.Sub(a.last)
	if gap <= 0 {
		return
	}
	a.record(min(gap, a.Patience()).Seconds())
	a.last = now
}

func (a *Accrual) record(gap float64) {
	a.sum += gap
	a.sumSq += gap * gap
	if len(a.gaps) < a.bounds.Window {
		a.gaps = append(a.gaps, gap)
		return
	}
	old := a.gaps[a.oldest]
	a.gaps[a.oldest] = gap
	a.oldest = (a.oldest + 1) % len(a.gaps)
	a.sum -= old
	a.sumSq -= old * old
	if a.oldest == 0 {
		a.recount()
	}
}

// recount sums anew, once per turn of the ring, what rounding has worn.
func (a *Accrual) recount() {
	a.sum, a.sumSq = 0, 0
	for _, gap := range a.gaps {
		a.sum += gap
		a.sumSq += gap * gap
	}
}

// distribution of the gaps, in seconds.
func (a *Accrual) distribution() (mean, deviation float64) {
	mean = a.bounds.Interval.Seconds()
	if n := float64(len(a.gaps)); n >= enough {
		mean = a.sum / n
		deviation = math.Sqrt(max(0, a.sumSq/n-mean*mean))
	}
	return mean, max(deviation, leastDeviation*mean)
}

// Phi is how much the silence until now speaks for the node being gone: wrong
// with probability 10^-phi if gaps stay distributed as they were. It grows with
// the silence and is never infinite.
func (a *Accrual) Phi(now time.Time) float64 {
	mean, deviation := a.distribution()
	return surprise((now.Sub(a.last).Seconds() - mean) / deviation)
}

// Patience is the silence from which the node is suspect, as learned so far.
func (a *Accrual) Patience() time.Duration {
	mean, deviation := a.distribution()
	seconds := mean + deviation*a.suspicious
	silence := time.Duration(min(seconds, a.bounds.Max.Seconds()) * float64(time.Second))
	return min(max(silence, a.bounds.Min), a.bounds.Max)
}

// Suspect reports whether the silence until now is longer than Patience.
func (a *Accrual) Suspect(now time.Time) bool {
	return now.Sub(a.last) > a.Patience()
}

// Last is when the node was last heard of.
func (a *Accrual) Last() time.Time { return a.last }

// Usual is the mean of the gaps between heartbeats and how far they deviate from
// it, as the judgement takes them.
func (a *Accrual) Usual() (mean, deviation time.Duration) {
	m, d := a.distribution()
	return time.Duration(m * float64(time.Second)), time.Duration(d * float64(time.Second))
}

// surprise is -log10 of the probability that a standard normal variable
// exceeds z.
func surprise(z float64) float64 {
	if z < 30 {
		return -math.Log10(math.Erfc(z/math.Sqrt2) / 2)
	}
	// Where erfc nears underflow: its asymptotic expansion,
	// Abramowitz and Stegun 26.2.12.
	return z*z/2*math.Log10E + math.Log10(z*math.Sqrt(2*math.Pi)) - math.Log10(1-1/(z*z))
}

// deviations is the inverse of surprise, by bisection: erfcinv loses all its
// digits where thresholds are.
func deviations(phi float64) float64 {
	low, high := -10.0, 10.0
	for surprise(high) < phi {
		high *= 2
	}
	for range 60 {
		middle := (low + high) / 2
		if surprise(middle) < phi {
			low = middle
		} else {
			high = middle
		}
	}
	return high
}
