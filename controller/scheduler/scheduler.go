// Package scheduler decides where tasks go.
//
// It is pure: a snapshot of the nodes and a request come in, a placement or
// the reason why there is none goes out; nothing is read, written or kept.
// The tasks of a job are placed as a gang, all or none.
//
// Place sorts the eligible nodes so that the least loaded comes first, by the
// share of its processors that would be in use and then by name, gives it one
// task, and repeats. As all tasks of a job are equal, it finds a placement
// whenever there is one.
package scheduler

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"dormouse/api"
)

// Node is a node as the scheduler sees it.
type Node struct {
	ID          string
	Cloud       string
	State       api.NodeState
	CPUs        float64
	MemBytes    int64
	CPUsUsed    float64
	MemUsed     int64
	CRIUVersion string
}

// Request is one gang to place.
type Request struct {
	Tasks    int
	CPUs     float64 // per task
	MemBytes int64   // per task
	Cloud    string  // only there; empty: anywhere
	// Avoid names nodes to use only when no other placement exists.
	Avoid []string
	// Unfit gives the reason why a node that is ready and has room cannot take
	// the tasks nevertheless; empty when it can. Nil: every node can.
	Unfit func(Node) string
}

// NoRoomError says why a gang has no place.
type NoRoomError struct {
	Reason string
	// Never is set when even idle nodes would not do.
	Never bool
}

func (e *NoRoomError) Error() string { return e.Reason }

// epsilon absorbs the rounding of sums of processors.
const epsilon = 1e-9

// slots is how many tasks of the request fit on what is left of a node.
func slots(n Node, r Request) int {
	fit := r.Tasks
	if r.CPUs > 0 {
		fit = min(fit, int((n.CPUs-n.CPUsUsed+epsilon)/r.CPUs))
	}
	if r.MemBytes > 0 {
		fit = min(fit, int((n.MemBytes-n.MemUsed)/r.MemBytes))
	}
	return max(fit, 0)
}

// Place returns the node of each task, or a *NoRoomError.
func Place(nodes []Node, r Request) ([]string, error) {
	eligible := eligible(nodes, r)
	preferred := slices.DeleteFunc(slices.Clone(eligible), func(n Node) bool { return slices.Contains(r.Avoid, n.ID) })
	if placement := spread(preferred, r); placement != nil {
		return placement, nil
	}
	if placement := spread(eligible, r); placement != nil {
		return placement, nil
	}
	return nil, explain(nodes, r)
}

func eligible(nodes []Node, r Request) []Node {
	var fit []Node
	for _, n := range nodes {
		if n.State == api.NodeReady && inCloud(n, r) && (r.Unfit == nil || r.Unfit(n) == "") {
			fit = append(fit, n)
		}
	}
	return fit
}

func inCloud(n Node, r Request) bool { return r.Cloud == "" || n.Cloud == r.Cloud }

// spread gives one task after the other to the least loaded node; nil when
// they do not all fit.
func spread(nodes []Node, r Request) []string {
	left := slices.Clone(nodes)
	placement := make([]string, 0, max(r.Tasks, 0))
	for range r.Tasks {
		best := -1
		for i, n := range left {
			if slots(n, r) > 0 && (best < 0 || before(n, left[best], r)) {
				best = i
			}
		}
		if best < 0 {
			return nil
		}
		left[best].CPUsUsed += r.CPUs
		left[best].MemUsed += r.MemBytes
		placement = append(placement, left[best].ID)
	}
	return placement
}

// before reports whether a is to take a task rather than b.
func before(a, b Node, r Request) bool {
	return cmp.Or(cmp.Compare(load(a, r), load(b, r)), cmp.Compare(a.ID, b.ID)) < 0
}

// load is the share of a node in use once it has one task more.
func load(n Node, r Request) float64 {
	share := 0.0
	if n.CPUs > 0 {
		share = (n.CPUsUsed + r.CPUs) / n.CPUs
	}
	if n.MemBytes > 0 {
		share = max(share, float64(n.MemUsed+r.MemBytes)/float64(n.MemBytes))
	}
	return share
}

// Possible reports, as a *NoRoomError with Never set, that the known nodes
// could not hold the gang even if all were ready and idle.
func Possible(nodes []Node, r Request) error {
	var known []Node
	for _, n := range nodes {
		if inCloud(n, r) && n.CPUs > 0 {
			n.CPUsUsed, n.MemUsed = 0, 0
			known = append(known, n)
		}
	}
	if len(known) == 0 {
		return nil // they may join yet
	}
	largest, memory, room := 0.0, int64(0), 0
	for _, n := range known {
		largest, memory = max(largest, n.CPUs), max(memory, n.MemBytes)
		room += slots(n, r)
	}
	switch {
	case r.CPUs > largest+epsilon:
		return never("no node%s has %s: the largest has %g", ofCloud(r), cpus(r.CPUs), largest)
	case r.MemBytes > memory:
		return never("no node%s has %s of memory: the largest has %s", ofCloud(r), size(r.MemBytes), size(memory))
	case room < r.Tasks && room == 0:
		return never("no node%s has %s and %s of memory together", ofCloud(r), cpus(r.CPUs), size(r.MemBytes))
	case room < r.Tasks:
		return never("the nodes%s have room for at most %s of %s and %s at once, not %d", ofCloud(r), count(room, "task"), cpus(r.CPUs), size(r.MemBytes), r.Tasks)
	}
	return nil
}

func never(format string, args ...any) error {
	return &NoRoomError{Reason: fmt.Sprintf(format, args...), Never: true}
}

// explain says why Place found nothing.
func explain(nodes []Node, r Request) error {
	if err := Possible(nodes, r); err != nil {
		return err
	}
	ready, free, unfit := 0, 0, ""
	for _, n := range nodes {
		if n.State != api.NodeReady || !inCloud(n, r) {
			continue
		}
		ready++
		if slots(n, r) == 0 {
			continue
		}
		if r.Unfit != nil {
			if reason := r.Unfit(n); reason != "" {
				unfit = reason
				continue
			}
		}
		free += slots(n, r)
	}
	if ready == 0 {
		return &NoRoomError{Reason: fmt.Sprintf("no node%s is ready", ofCloud(r))}
	}
	if free == 0 && unfit != "" {
		return &NoRoomError{Reason: unfit}
	}
	return &NoRoomError{Reason: fmt.Sprintf("the ready nodes%s have room for %d of %s of %s and %s at the moment",
		ofCloud(r), free, count(r.Tasks, "task"), cpus(r.CPUs), size(r.MemBytes))}
}

func ofCloud(r Request) string {
	if r.Cloud == "" {
		return ""
	}
	return " of cloud " + r.Cloud
}

func cpus(n float64) string {
	if n == 1 {
		return "1 cpu"
	}
	return fmt.Sprintf("%g cpus", n)
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// size prints bytes for people, in binary units.
func size(n int64) string {
	units := []string{"bytes", "KiB", "MiB", "GiB", "TiB"}
	value, unit := float64(n), 0
	for value >= 1024 && unit < len(units)-1 {
		value, unit = value/1024, unit+1
	}
	text := strings.TrimSuffix(fmt.Sprintf("%.1f", value), ".0")
	return text + " " + units[unit]
}
