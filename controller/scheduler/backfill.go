package scheduler

import (
	"maps"
	"slices"
)

// mostSums bounds the sums of jobs that are looked at on one node. Jobs of equal
// needs have equal sums, so that real nodes stay far below it; on one that does
// not, nothing goes ahead of a waiting job that could use the node.
const mostSums = 2048

// harmless is how many of want tasks of request r node i can take, such that the
// job ahead would find as many places there as without them, whichever of the
// jobs on the node have ended by then.
func (f *floor) harmless(i int, r Request, want int, ahead Request) int {
	n := f.nodes[i]
	if !asked(n, ahead) {
		return want
	}
	n.CPUsUsed, n.MemUsed = 0, 0
	if slots(n, ahead) == 0 {
		return want
	}
	if slices.ContainsFunc(r.Ports, func(port string) bool { return slices.Contains(ahead.Ports, port) }) {
		return 0
	}
	sums := f.sumsOn(i)
	if sums == nil {
		return 0
	}
	for k := want; k > 0; k-- { // fewer tasks never do more harm
		mine := usage{float64(k) * r.CPUs, int64(k) * r.MemBytes}
		if !slices.ContainsFunc(sums, func(u usage) bool { return harms(n, u, mine, ahead) }) {
			return k
		}
	}
	return 0
}

// harms reports whether mine beside used takes places from the job ahead.
func harms(n Node, used, mine usage, ahead Request) bool {
	n.CPUsUsed, n.MemUsed = used.cpus, used.mem
	before := slots(n, ahead)
	n.CPUsUsed, n.MemUsed = used.cpus+mine.cpus, used.mem+mine.mem
	return slots(n, ahead) < before
}

// sumsOn is what may be in use on node i once some of its jobs have ended: the
// sums of every subset of them. Nil when these are too many.
func (f *floor) sumsOn(i int) []usage {
	if sums, known := f.sums[i]; known {
		return sums
	}
	found := map[usage]bool{{}: true}
	for _, j := range f.on[i] {
		job := &f.jobs[j]
		if job.Leaving {
			continue
		}
		var here usage
		for _, id := range job.On {
			if id == f.nodes[i].ID {
				here.cpus, here.mem = here.cpus+job.CPUs, here.mem+job.MemBytes
			}
		}
		for u := range maps.Clone(found) {
			found[usage{u.cpus + here.cpus, u.mem + here.mem}] = true
		}
		if len(found) > mostSums {
			f.sums[i] = nil
			return nil
		}
	}
	f.sums[i] = slices.Collect(maps.Keys(found))
	return f.sums[i]
}
