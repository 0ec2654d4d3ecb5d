package starvation

import (
	"math"
	"slices"
)

// history is the recent past of one figure.
type history struct {
	values []float64 // a ring once it is full
	oldest int
}

// spread makes the median absolute deviation an estimate of the standard
// deviation where values are normally distributed.
const spread = 1.4826

func (h *history) add(value float64, size int) {
	if len(h.values) < size {
		h.values = append(h.values, value)
		return
	}
	h.values[h.oldest] = value
	h.oldest = (h.oldest + 1) % len(h.values)
}

// known reports whether there is enough of a past to speak of a normal.
func (h *history) known() bool { return len(h.values) >= 3 }

// normal is the median, deviation its robust spread.
func (h *history) normal() (normal, deviation float64) {
	if len(h.values) == 0 {
		return 0, 0
	}
	sorted := slices.Sorted(slices.Values(h.values))
	normal = median(sorted)
	for i, value := range sorted {
		sorted[i] = math.Abs(value - normal)
	}
	slices.Sort(sorted)
	return normal, spread * median(sorted)
}

func (h *history) most() float64 {
	if len(h.values) == 0 {
		return 0
	}
	return slices.Max(h.values)
}

func median(sorted []float64) float64 {
	n := len(sorted)
	if n%2 == 1 {
		return sorted[n/2]
	}
	return (sorted[n/2-1] + sorted[n/2]) / 2
}

// The cumulative sum, in spreads: what is allowed for in each period, where the
// alarm is, the most one period may add. One period cannot raise the alarm, two
// bad ones do.
const (
	allowance = 1.5
	alarm     = 6
	furthest  = 6
)

// series is a figure whose fall matters: its past, and how far it has lately
// been below.
type series struct {
	history
	sum float64
}

// observe a value, without learning it.
func (s *series) observe(value float64) {
	if !s.known() {
		return
	}
	normal, deviation := s.normal()
	// A machine-like past has no spread at all; a tenth is within anyone's.
	deviation = max(deviation, normal/10)
	if deviation == 0 {
		return
	}
	below := min((normal-value)/deviation, furthest)
	s.sum = max(0, min(s.sum+below-allowance, 2*alarm))
}

// fallen reports whether value, the last one observed, is the end of a sustained
// fall to less than half of the normal.
func (s *series) fallen(value float64) bool {
	normal, _ := s.normal()
	return s.known() && s.sum >= alarm && value < normal/2
}
