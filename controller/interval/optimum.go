package interval

import (
	"math"
	"slices"
	"time"
)

// Cost is what one checkpoint took from its job.
type Cost struct {
	// Pause is how long the job stood still.
	Pause time.Duration `json:"pause"`
	// Overhead is what the rest of it took from the node's processors while the
	// job ran on, as time of the whole node.
	Overhead time.Duration `json:"overhead"`
	// Durable is how long it took from the request until the checkpoint was
	// durable.
	Durable time.Duration `json:"durable"`
}

// Remembered is how many checkpoints the cost is taken from.
const Remembered = 5

// Remember adds the newest cost to those of before, oldest first, and forgets
// what is too old.
func Remember(costs []Cost, newest Cost) []Cost {
	costs = append(slices.Clone(costs), newest)
	return costs[max(len(costs)-Remembered, 0):]
}

// presumed stands for the cost of a job that was never checkpointed.
var presumed = Cost{Pause: 2 * time.Second, Durable: 10 * time.Second}

// typical is the median of each part, which one slow checkpoint does not move,
// and three in a row do.
func typical(costs []Cost) Cost {
	if len(costs) == 0 {
		return presumed
	}
	return Cost{
		Pause:    median(costs, func(c Cost) time.Duration { return c.Pause }),
		Overhead: median(costs, func(c Cost) time.Duration { return c.Overhead }),
		Durable:  median(costs, func(c Cost) time.Duration { return c.Durable }),
	}
}

func median(costs []Cost, part func(Cost) time.Duration) time.Duration {
	parts := make([]time.Duration, len(costs))
	for i, c := range costs {
		parts[i] = part(c)
	}
	slices.Sort(parts)
	middle := len(parts) / 2
	if len(parts)%2 == 1 {
		return parts[middle]
	}
	return (parts[middle-1] + parts[middle]) / 2
}

// Daly is the time between two checkpoints that makes the expected loss
// smallest, for checkpoints that cost the given time and failures that come
// once per mtbf on average: Daly 2006, eq. 37. Its first term is Young's (1974).
func Daly(cost, mtbf time.Duration) time.Duration {
	if cost <= 0 || mtbf <= 0 {
		return 0
	}
	if cost >= 2*mtbf {
		return mtbf
	}
	half := cost.Seconds() / (2 * mtbf.Seconds())
	young := math.Sqrt(2 * cost.Seconds() * mtbf.Seconds())
	best := young*(1+math.Sqrt(half)/3+half/9) - cost.Seconds()
	return seconds(best)
}

// Loss is the share of the time that is lost in the long run when a checkpoint
// is taken every interval: the checkpoints themselves, and per failure half an
// interval and what was captured but not durable yet. First order in
// interval/mtbf, as Young 1974; Vaidya 1997 for the latency, which unlike the
// cost does not change the best interval.
func Loss(interval time.Duration, cost Cost, mtbf time.Duration) float64 {
	paid := (cost.Pause + cost.Overhead).Seconds() / interval.Seconds()
	redone := (interval.Seconds()/2 + cost.Durable.Seconds()) / mtbf.Seconds()
	return min(paid+redone, 1)
}

// Lead is how long before the end of a job's walltime its last checkpoint must
// begin to be durable in time: twice what is typical and some seconds, and
// never more than a quarter of the walltime.
func Lead(costs []Cost, walltime time.Duration) time.Duration {
	return min(2*typical(costs).Durable+5*time.Second, walltime/4)
}

// Again is how long to wait after so many failures of what cannot wait long.
func Again(failures int) time.Duration {
	return min(5*time.Second<<min(max(failures, 1)-1, 10), 5*time.Minute)
}

// seconds makes a duration of a number that may be out of all bounds.
func seconds(s float64) time.Duration {
	const most = float64(math.MaxInt64 / int64(time.Second))
	return time.Duration(min(max(s, 0), most-1) * float64(time.Second))
}
