package starvation

import "time"

// progress follows what a task reports: how fast, and how long it usually pauses
// between two reports.
type progress struct {
	rate   series  // units per minute
	pauses history // seconds between two changes, as seen once a period
	last   float64
	still  time.Duration // since the last change, excused time left out
	since  float64       // the count when the present stretch of rates began
	span   time.Duration // of that stretch
	// current is the last rate found.
	current float64
	begun   bool
}

// report takes in the count at the end of a judged period. learn says that
// nothing was suspect.
func (p *progress) report(count float64, span, period time.Duration, learn bool, size int) {
	p.still += span
	p.span += span
	if count != p.last {
		// Two samples far apart say nothing of the pauses between them.
		if learn && span < 2*period {
			p.pauses.add(p.still.Seconds(), size)
		}
		p.still = 0
	}
	p.last = count
	// Reports that come more rarely than periods must not look like a rate that
	// jumps between nothing and much.
	if p.span < max(period/2, p.pause()) {
		return
	}
	p.current = (count - p.since) / p.span.Minutes()
	p.rate.observe(p.current)
	if learn {
		p.rate.add(p.current, size)
	}
	p.since, p.span = count, 0
}

// begin takes count as where counting starts: at the first report, and where
// the time before must not be judged.
func (p *progress) begin(count float64) {
	if count != p.last {
		p.still = 0
	}
	p.last, p.since, p.span, p.begun = count, count, 0, true
}

// pause that is usual between two changes.
func (p *progress) pause() time.Duration {
	normal, _ := p.pauses.normal()
	return time.Duration(normal * float64(time.Second))
}

// patience is how long the count may stand still before that is strange.
func (p *progress) patience(config Config) time.Duration {
	longest := time.Duration(p.pauses.most() * float64(time.Second))
	return max(time.Duration(config.Confirm)*config.Period, 2*longest)
}

// stands reports whether the count has stood still for strangely long.
func (p *progress) stands(config Config) bool {
	// Clocks tick unevenly: a period may be a little short.
	const slack = 20
	return p.begun && p.pauses.known() && p.still >= p.patience(config)-config.Period/slack
}
