// Package scheduler decides where tasks go, who waits and who gives way.
//
// It is pure: a snapshot of nodes, jobs and the queue comes in, decisions go
// out; nothing is read, written or kept, and the same input has the same answer.
//
// Place finds nodes for one gang, all of its tasks or none. Spread, the default,
// gives one task after the other to the least loaded node; pack uses as few
// nodes as possible and of those the most loaded. As all tasks of a job are
// equal, both find a placement whenever there is one.
//
// Schedule goes through the queue, the most important and oldest first. What it
// gives one job is taken for all that follow:
//
//	there is room                         start there
//	there will be, as jobs are leaving    keep that room, wait
//	there is if lesser jobs give way      evict the cheapest such set, keep their room, wait
//	otherwise                             wait; jobs behind go ahead only where that does no harm
//
// A place does no harm to a waiting job when, whichever of the jobs on the node
// end, and in whatever order, the node would hold as many of its tasks as
// without whoever took the place. So no start is ever delayed by a job further
// behind, and no run times need to be known. A job that would not fit on all the
// nodes that are up even if they were idle waits for nodes, and keeps none free.
//
// Victims are of strictly lower priority than the job they give way for: first,
// the least priority up to which jobs must give way is looked for (evicting a job
// that outranks another one there would evict that one next, when it comes back),
// then, among these, the set with the fewest bytes to checkpoint. It is minimal:
// without any one of its members there would be no room.
package scheduler

import (
	"cmp"
	"fmt"
	"maps"
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
	Labels      map[string]string
	// Ports are taken there, such as 80/tcp, each by the job that it maps to.
	Ports map[string]string
}

// Request is one gang to place.
type Request struct {
	Tasks    int
	CPUs     float64 // per task
	MemBytes int64   // per task
	Cloud    string  // only there; empty: anywhere
	// Labels are what a node must have.
	Labels map[string]string
	// Pack puts the tasks on as few nodes as possible, rather than spread them.
	Pack bool
	// Ports are those that the job needs to itself on its nodes, such as 80/tcp.
	Ports []string
	// Only names the nodes to use; empty: all.
	Only []string
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

// Room is how many of the request's tasks the node would take if nothing else were
// on it.
func Room(n Node, r Request) int {
	n.CPUsUsed, n.MemUsed = 0, 0
	if !asked(n, r) {
		return 0
	}
	return slots(n, r)
}

// Place returns the node of each task, or a *NoRoomError.
func Place(nodes []Node, r Request) ([]string, error) {
	fits := func(i int) int {
		if suits(nodes[i], r) != "" {
			return 0
		}
		return slots(nodes[i], r)
	}
	if placement := fill(nodes, r, func(i int) int {
		if slices.Contains(r.Avoid, nodes[i].ID) {
			return 0
		}
		return fits(i)
	}); placement != nil {
		return placement, nil
	}
	if placement := fill(nodes, r, fits); placement != nil {
		return placement, nil
	}
	return nil, explain(nodes, r)
}

// suits says why a node may not take the tasks although it has room, or is not
// theirs to take; empty: it may.
func suits(n Node, r Request) string {
	if n.State != api.NodeReady {
		return fmt.Sprintf("node %s is %s", n.ID, n.State)
	}
	if !asked(n, r) {
		return fmt.Sprintf("node %s is not one that was asked for", n.ID)
	}
	for _, port := range r.Ports {
		if job := n.Ports[port]; job != "" {
			return fmt.Sprintf("job %s publishes port %s on node %s", job, port, n.ID)
		}
	}
	if r.Unfit != nil {
		return r.Unfit(n)
	}
	return ""
}

// asked reports whether the node is in the cloud, and has the labels, that were
// asked for.
func asked(n Node, r Request) bool {
	if r.Cloud != "" && n.Cloud != r.Cloud || len(r.Only) > 0 && !slices.Contains(r.Only, n.ID) {
		return false
	}
	for key, value := range r.Labels {
		if got, has := n.Labels[key]; !has || got != value {
			return false
		}
	}
	return true
}

// fill gives every task a node, of which node i has fits(i) places; nil when
// they do not all fit.
func fill(nodes []Node, r Request, fits func(i int) int) []string {
	if r.Tasks < 1 {
		return nil
	}
	if r.Tasks == 1 {
		return fillOne(nodes, r, fits)
	}
	room, total := make([]int, len(nodes)), 0
	for i := range nodes {
		room[i] = min(fits(i), r.Tasks)
		total += room[i]
	}
	if total < r.Tasks {
		return nil
	}
	taken := make([]int, len(nodes))
	placement := make([]string, 0, r.Tasks)
	for len(placement) < r.Tasks {
		left := r.Tasks - len(placement)
		best, most := -1, 0
		for i := range nodes {
			fit := min(room[i]-taken[i], left)
			if fit > 0 && (best < 0 || before(candidate{&nodes[i], taken[i], fit}, candidate{&nodes[best], taken[best], most}, r)) {
				best, most = i, fit
			}
		}
		count := 1
		if r.Pack {
			count = most
		}
		taken[best] += count
		for range count {
			placement = append(placement, nodes[best].ID)
		}
	}
	return placement
}

// fillOne is fill for one task: what most jobs have. It asks of few nodes whether
// the task fits: of those that would be better than the best so far.
func fillOne(nodes []Node, r Request, fits func(i int) int) []string {
	best, lowest := -1, 0.0
	for i := range nodes {
		n := load(&nodes[i], 1, r)
		if r.Pack {
			n = -n
		}
		if (best < 0 || n < lowest || n == lowest && nodes[i].ID < nodes[best].ID) && fits(i) > 0 {
			best, lowest = i, n
		}
	}
	if best < 0 {
		return nil
	}
	return []string{nodes[best].ID}
}

// candidate is a node that could take tasks next.
type candidate struct {
	node  *Node
	taken int // it takes already
	fit   int // it could take
}

// before reports whether a is to take a task rather than b.
func before(a, b candidate, r Request) bool {
	order := cmp.Compare(load(a.node, a.taken+1, r), load(b.node, b.taken+1, r))
	if r.Pack {
		order = cmp.Or(b.fit-a.fit, -order)
	}
	if order == 0 {
		return a.node.ID < b.node.ID
	}
	return order < 0
}

// load is the share of a node in use once it has so many tasks more.
func load(n *Node, tasks int, r Request) float64 {
	share := 0.0
	if n.CPUs > 0 {
		share = (n.CPUsUsed + float64(tasks)*r.CPUs) / n.CPUs
	}
	if n.MemBytes > 0 {
		share = max(share, float64(n.MemUsed+int64(tasks)*r.MemBytes)/float64(n.MemBytes))
	}
	return share
}

// Possible reports, as a *NoRoomError with Never set, that the known nodes
// could not hold the gang even if all were ready and idle.
func Possible(nodes []Node, r Request) error {
	var known []Node
	for _, n := range nodes {
		if asked(n, r) && n.CPUs > 0 {
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
	var ready []Node
	free, unfit := 0, ""
	for _, n := range nodes {
		if n.State != api.NodeReady || !asked(n, r) {
			continue
		}
		ready = append(ready, n)
		if slots(n, r) == 0 {
			continue
		}
		if reason := suits(n, r); reason != "" {
			unfit = reason
			continue
		}
		free += slots(n, r)
	}
	switch {
	case len(ready) == 0:
		return &NoRoomError{Reason: fmt.Sprintf("no node%s is ready", ofCloud(r))}
	case free == 0 && unfit != "":
		return &NoRoomError{Reason: unfit}
	case r.Tasks > 1:
		return &NoRoomError{Reason: fmt.Sprintf("needs %d places of %s, and the ready nodes%s have %d free", r.Tasks, needs(r.CPUs, r.MemBytes), ofCloud(r), free)}
	}
	n := freest(ready)
	return &NoRoomError{Reason: fmt.Sprintf("needs %s on one node%s, and the most that is free is %s, on %s",
		needs(r.CPUs, r.MemBytes), ofCloud(r), needs(max(n.CPUs-n.CPUsUsed, 0), max(n.MemBytes-n.MemUsed, 0)), n.ID)}
}

// freest is the node with the most free processors, then memory.
func freest(nodes []Node) Node {
	return slices.MaxFunc(nodes, func(a, b Node) int {
		return cmp.Or(cmp.Compare(a.CPUs-a.CPUsUsed, b.CPUs-b.CPUsUsed), cmp.Compare(a.MemBytes-a.MemUsed, b.MemBytes-b.MemUsed), cmp.Compare(b.ID, a.ID))
	})
}

func needs(processors float64, memory int64) string { return cpus(processors) + " and " + size(memory) }

// ofCloud names what the nodes that were asked for have in common.
func ofCloud(r Request) string {
	text := ""
	if r.Cloud != "" {
		text = " of cloud " + r.Cloud
	}
	for i, key := range slices.Sorted(maps.Keys(r.Labels)) {
		text += []string{" with label ", ", "}[min(i, 1)] + key + "=" + r.Labels[key]
	}
	if len(r.Only) > 0 {
		text += " among " + strings.Join(r.Only, ", ")
	}
	return text
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
