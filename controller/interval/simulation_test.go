package interval

import (
	"math/rand/v2"
	"testing"
	"time"
)

// life is a job that runs on nodes which fail at random, and is checkpointed by
// its policy. What is lost is every second that did not become work that lasted.
type life struct {
	nodes     int
	mtbf      time.Duration // of one node
	cost      Cost
	restart   time.Duration // after a failure
	span      time.Duration
	costAfter Cost // from the middle of the span on; zero: the same
}

// lose lives the life once and returns the time lost. The failures depend on
// the seed only, not on the policy.
func (l life) lose(policy Policy, seed uint64) time.Duration {
	chance := rand.New(rand.NewPCG(seed, 1))
	between := func() time.Duration {
		return max(seconds(chance.ExpFloat64()*l.mtbf.Seconds()/float64(l.nodes)), time.Nanosecond)
	}
	job := Job{ID: "j", Begun: noon, Nodes: make([]Node, l.nodes), Clouds: map[string]Tally{}}
	for i := range job.Nodes {
		job.Nodes[i] = Node{Cloud: "east", Own: Tally{At: noon}}
	}
	end, now := noon.Add(l.span), noon
	failure := noon.Add(between())
	var kept time.Duration // work in durable checkpoints
	for {
		l.look(&job, now)
		plan, _ := policy.For(job, Bounds{}, noon)
		due := plan.Due
		if due.Before(now) {
			due = now
		}
		cost := l.costAt(due)
		durable := due.Add(max(cost.Durable, cost.Pause))
		if end.Before(durable) && end.Before(failure) {
			return l.span - kept - end.Sub(now) // the last stretch is nobody's loss
		}
		if failure.Before(durable) { // what was done since now is lost
			victim := chance.IntN(l.nodes)
			job.Nodes[victim].Own = job.Nodes[victim].Own.After(failure, true).Lose()
			now = failure.Add(l.restart)
			job.Begun = now
			for !failure.After(now) {
				failure = failure.Add(between())
			}
			if now.After(end) {
				return l.span - kept
			}
			continue
		}
		kept += due.Sub(now) - cost.Overhead
		job.Durable, job.Costs = due, Remember(job.Costs, cost)
		now = due.Add(cost.Pause)
	}
}

func (l life) costAt(now time.Time) Cost {
	if l.costAfter != (Cost{}) && now.Sub(noon) > l.span/2 {
		return l.costAfter
	}
	return l.cost
}

// look brings the tallies up to date, as the controller does.
func (l life) look(job *Job, now time.Time) {
	var all Tally
	for i := range job.Nodes {
		job.Nodes[i].Own = job.Nodes[i].Own.After(now, true)
		all = all.Plus(job.Nodes[i].Own)
	}
	job.Clouds["east"] = all
}

var fixedIntervals = []string{"1m", "3m", "10m", "20m", "30m", "1h", "2h", "4h", "8h"}

// rates is the range of failure rates that the comparisons are made over: the
// job of 8 nodes loses one every 15 minutes to every 30 days.
func rates() (lives []life) {
	cost := Cost{Pause: 3 * time.Second, Overhead: 2 * time.Second, Durable: 20 * time.Second}
	const day = 24 * time.Hour
	for _, mtbf := range []time.Duration{2 * time.Hour, 8 * time.Hour, day, 4 * day, 16 * day, 60 * day, 240 * day} {
		lives = append(lives, life{nodes: 8, mtbf: mtbf, cost: cost, restart: 30 * time.Second, span: 90 * day})
	}
	return lives
}

func TestAutoLosesLessThanAnyFixedIntervalOverARangeOfFailureRates(t *testing.T) {
	const seeds = 3
	sum := map[string]time.Duration{}
	for _, l := range rates() {
		lost := map[string]time.Duration{}
		for _, text := range append([]string{Auto}, fixedIntervals...) {
			for seed := range uint64(seeds) {
				lost[text] += l.lose(parse(t, text), seed)
			}
			sum[text] += lost[text]
		}
		best := fixedIntervals[0]
		for _, text := range fixedIntervals {
			if lost[text] < lost[best] {
				best = text
			}
		}
		share := lost[Auto].Hours() / (seeds * l.span).Hours()
		t.Logf("a node fails once per %8s: auto loses %6.1f h (%5.2f %%), the best fixed interval, %4s, %6.1f h",
			Short(l.mtbf), lost[Auto].Hours()/seeds, 100*share, best, lost[best].Hours()/seeds)
		if limit := lost[best] + lost[best]/10; lost[Auto] > limit {
			t.Errorf("a node fails once per %s: auto loses %s, more than a tenth above the %s of %s", Short(l.mtbf), lost[Auto], lost[best], best)
		}
	}
	for _, text := range fixedIntervals {
		t.Logf("over all rates: %5s loses %7.1f h, auto %7.1f h", text, sum[text].Hours()/seeds, sum[Auto].Hours()/seeds)
		if sum[Auto] >= sum[text] {
			t.Errorf("over all rates auto loses %s, and every %s only %s", sum[Auto], text, sum[text])
		}
	}
}

func TestAutoFollowsACostThatChanges(t *testing.T) {
	l := rates()[2]
	l.costAfter = Cost{Pause: 60 * time.Second, Overhead: 20 * time.Second, Durable: 200 * time.Second}
	auto := l.lose(parse(t, Auto), 1)
	for _, text := range fixedIntervals {
		if fixed := l.lose(parse(t, text), 1); auto > fixed+fixed/50 {
			t.Errorf("auto loses %s, and every %s only %s", auto, text, fixed)
		}
	}
}
