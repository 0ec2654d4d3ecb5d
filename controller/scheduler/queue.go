package scheduler

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"dormouse/api"
)

// Running is a job that has a place.
type Running struct {
	ID       string
	Priority int
	On       []string // the node of each task
	CPUs     float64  // per task
	MemBytes int64    // per task
	// Ports are those that the job has to itself, by node.
	Ports map[string][]string
	// Leaving is set when the job is giving up its place already.
	Leaving bool
	// Stays says why the job cannot give way at the moment; empty: it can.
	Stays string
	// Bytes are what a checkpoint of the job would have to store.
	Bytes int64
}

// Waiting is a job in the queue.
type Waiting struct {
	ID       string
	Priority int
	Created  time.Time
	// Since is when it began to wait.
	Since time.Time
	// Patient jobs were told to give up their place: they go behind whoever
	// waited before them, and make nobody give way.
	Patient bool
	// Spares jobs make nobody give way either.
	Spares bool
	// Hold says why the job is not to be placed for now, although it waits; empty:
	// it may.
	Hold    string
	Request Request
}

// Decision is what becomes of one waiting job. Exactly one of Placement and
// Reason is set.
type Decision struct {
	ID        string
	Placement []string // the node of each task: start there
	Evict     []string // the jobs to make give way, before it can start
	Reason    string   // why it waits
	// Never is set when even idle nodes would not do.
	Never bool
	// Alike is set when the reason is only that of a job ahead with the same needs.
	Alike bool
}

// Order sorts a queue: by priority, then age. A patient job goes behind the last
// that waited when it began to.
func Order(queue []Waiting) []Waiting {
	sorted := make([]Waiting, 0, len(queue))
	var patient []Waiting
	for _, w := range queue {
		if w.Patient {
			patient = append(patient, w)
		} else {
			sorted = append(sorted, w)
		}
	}
	slices.SortFunc(sorted, rank)
	slices.SortFunc(patient, rank)
	for _, w := range patient {
		at, _ := slices.BinarySearchFunc(sorted, w, rank)
		for i := len(sorted) - 1; i >= at; i-- {
			if sorted[i].Since.Before(w.Since) {
				at = i + 1
				break
			}
		}
		sorted = slices.Insert(sorted, at, w)
	}
	return sorted
}

func rank(a, b Waiting) int {
	return cmp.Or(cmp.Compare(b.Priority, a.Priority), a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
}

// What one call decides is bounded, so that it takes little time whatever the
// queue: what is not decided is so by the next, as decisions never depend on jobs
// behind.
const (
	mostStarts    = 1024 // jobs that get a place
	mostEvictions = 16   // jobs that make others give way
	// mostAhead are the jobs with different needs that may wait; nothing is started
	// behind more of them.
	mostAhead = 128
)

// Schedule decides about the jobs of the queue, in its order, and at least about
// the first that can be helped. Nodes need not say what is used of them: that is
// what jobs have.
func Schedule(nodes []Node, jobs []Running, queue []Waiting) []Decision {
	f := newFloor(nodes, jobs)
	queue = Order(queue)
	decisions := make([]Decision, 0, len(queue))
	alike := make(map[string]string) // the first that waits, by needs
	starts, evictions := 0, 0
	for i := range queue {
		w := &queue[i]
		needs := w.needs()
		var d Decision
		switch {
		case w.Hold != "":
			d = Decision{Reason: w.Hold}
		case alike[needs] != "":
			d = Decision{Reason: fmt.Sprintf("job %s, which needs the same, is ahead", alike[needs]), Alike: true}
		case len(f.ahead) >= mostAhead:
			d = Decision{Reason: fmt.Sprintf("%d jobs with other needs are ahead", len(f.ahead)), Alike: true}
		default:
			if d = f.decide(w); d.Placement == nil && len(d.Evict) == 0 && needs != "" {
				alike[needs] = w.ID
			}
		}
		d.ID = w.ID
		decisions = append(decisions, d)
		if d.Placement != nil {
			starts++
		}
		if len(d.Evict) > 0 {
			evictions++
		}
		if starts == mostStarts || evictions == mostEvictions {
			break
		}
	}
	return decisions
}

// needs is the same text for jobs that can be placed, or not, alike; empty when
// that cannot be said.
func (w *Waiting) needs() string {
	if w.Request.Unfit != nil || len(w.Request.Avoid) > 0 || w.Patient || w.Spares {
		return ""
	}
	r := w.Request
	return fmt.Sprint(r.Tasks, r.CPUs, r.MemBytes, r.Cloud, r.Labels, r.Pack, r.Ports, r.Only) // maps are printed in order
}

// floor is the state of all places while the queue is gone through.
type floor struct {
	nodes []Node // with all that is used of them, and kept for jobs ahead
	soon  []Node // and without what is used by jobs that are leaving
	index map[string]int
	jobs  []Running
	on    [][]int // the jobs with tasks on each node
	// ahead are the jobs that wait and that room is not to be taken from.
	ahead []*Waiting
	sums  map[int][]usage // of jobs on a node, see backfill.go
}

// usage is processors and memory in use.
type usage struct {
	cpus float64
	mem  int64
}

func newFloor(nodes []Node, jobs []Running) *floor {
	f := &floor{
		nodes: idle(nodes), soon: idle(nodes), index: make(map[string]int, len(nodes)), on: make([][]int, len(nodes)),
		jobs: make([]Running, 0, len(jobs)+mostStarts), sums: make(map[int][]usage),
	}
	for i, n := range nodes {
		f.index[n.ID] = i
	}
	for _, job := range jobs {
		f.add(job)
	}
	return f
}

// idle are the nodes with nothing in use.
func idle(nodes []Node) []Node {
	nodes = slices.Clone(nodes)
	for i := range nodes {
		nodes[i].CPUsUsed, nodes[i].MemUsed, nodes[i].Ports = 0, 0, nil
	}
	return nodes
}

// add puts a job on its nodes.
func (f *floor) add(job Running) {
	f.jobs = append(f.jobs, job)
	at := len(f.jobs) - 1
	for i := range f.placesOf(&job) {
		f.nodes[i].give(&job)
		if !job.Leaving {
			f.soon[i].give(&job)
		}
		if on := f.on[i]; len(on) == 0 || on[len(on)-1] != at {
			f.on[i] = append(on, at)
		}
		delete(f.sums, i)
	}
}

// placesOf are the indexes of the job's nodes, one for each task.
func (f *floor) placesOf(job *Running) iter.Seq[int] {
	return func(yield func(int) bool) {
		for _, id := range job.On {
			if i, known := f.index[id]; known && !yield(i) {
				return
			}
		}
	}
}

// give lets one task of a job use the node, with the ports it has there.
func (n *Node) give(job *Running) {
	n.CPUsUsed += job.CPUs
	n.MemUsed += job.MemBytes
	for _, port := range job.Ports[n.ID] {
		if n.Ports == nil {
			n.Ports = make(map[string]string)
		}
		n.Ports[port] = job.ID
	}
}

// take undoes give. The node's ports are copied: others may look at them.
func (n *Node) take(job *Running) {
	n.CPUsUsed -= job.CPUs
	n.MemUsed -= job.MemBytes
	if len(job.Ports[n.ID]) > 0 {
		n.Ports = maps.Clone(n.Ports)
		for _, port := range job.Ports[n.ID] {
			delete(n.Ports, port)
		}
	}
}

// decide finds out what becomes of a job, and keeps for it what it gets.
func (f *floor) decide(w *Waiting) Decision {
	r := w.Request
	if placement := f.find(r, f.nodes, true); placement != nil {
		f.keep(w, placement, "it is being started")
		return Decision{Placement: placement}
	}
	if err := Possible(f.nodes, r); err != nil {
		return Decision{Reason: err.Error(), Never: true}
	}
	if placement := f.find(r, f.soon, true); placement != nil {
		f.keep(w, placement, keptStays)
		return Decision{Reason: f.untilGone(placement)}
	}
	if placement := f.find(r, heardAgain(f.soon), true); placement != nil {
		f.keep(w, placement, keptStays)
		return Decision{Reason: "room is on " + strings.Join(f.silent(placement), ", ") + ", not heard of at the moment"}
	}
	if !w.Patient && !w.Spares {
		if victims := f.victims(w, func(j *Running) bool { return j.Stays == "" }); victims != nil {
			ids := f.evict(victims)
			f.keep(w, f.find(r, f.soon, true), keptStays)
			return Decision{Evict: ids, Reason: "waits until " + list(ids, "job") + " of lower priority has given way"}
		}
	}
	reason := f.why(w)
	if f.fitsIdle(r) {
		f.ahead = append(f.ahead, w)
	}
	return Decision{Reason: reason}
}

// keep takes the places of a job from all that come after it.
func (f *floor) keep(w *Waiting, placement []string, stays string) {
	job := Running{ID: w.ID, Priority: w.Priority, On: placement, CPUs: w.Request.CPUs, MemBytes: w.Request.MemBytes, Stays: stays}
	if len(w.Request.Ports) > 0 {
		job.Ports = make(map[string][]string)
		for _, id := range placement {
			job.Ports[id] = w.Request.Ports
		}
	}
	f.add(job)
}

// evict marks jobs as leaving.
func (f *floor) evict(victims []int) (ids []string) {
	for _, v := range victims {
		job := &f.jobs[v]
		job.Leaving = true
		ids = append(ids, job.ID)
		for i := range f.placesOf(job) {
			f.soon[i].take(job)
			delete(f.sums, i)
		}
	}
	return ids
}

// find places a request on nodes, as they are given.
func (f *floor) find(r Request, nodes []Node, harmless bool) []string {
	fits := func(i int) int { return f.places(r, nodes[i], harmless) }
	if len(r.Avoid) > 0 {
		avoiding := func(i int) int {
			if slices.Contains(r.Avoid, nodes[i].ID) {
				return 0
			}
			return fits(i)
		}
		if placement := fill(nodes, r, avoiding); placement != nil {
			return placement
		}
	}
	return fill(nodes, r, fits)
}

// places is how many tasks of a request a node can take, without harm to jobs
// ahead if so asked.
func (f *floor) places(r Request, n Node, harmless bool) int {
	room := slots(n, r)
	if room == 0 || suits(n, r) != "" {
		return 0
	}
	if !harmless {
		return room
	}
	for _, w := range f.ahead {
		room = min(room, f.harmless(f.index[n.ID], r, room, w.Request))
	}
	return room
}

// heardAgain are the nodes as if those that are silent had been heard of.
func heardAgain(nodes []Node) []Node {
	nodes = slices.Clone(nodes)
	for i := range nodes {
		if nodes[i].State == api.NodeUnreachable {
			nodes[i].State = api.NodeReady
		}
	}
	return nodes
}

func (f *floor) silent(placement []string) (ids []string) {
	for _, id := range placement {
		if f.nodes[f.index[id]].State == api.NodeUnreachable && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids
}

// fitsIdle reports whether the request would fit on the nodes that are up if
// nothing ran there.
func (f *floor) fitsIdle(r Request) bool {
	nodes := heardAgain(idle(f.nodes))
	return fill(nodes, r, func(i int) int { return f.places(r, nodes[i], false) }) != nil
}

// untilGone names the jobs that are leaving the nodes of a placement.
func (f *floor) untilGone(placement []string) string {
	var ids []string
	for i := range f.jobs {
		job := &f.jobs[i]
		if job.Leaving && slices.ContainsFunc(job.On, func(id string) bool { return slices.Contains(placement, id) }) {
			ids = append(ids, job.ID)
		}
	}
	return "waits until " + list(ids, "job") + " has given way"
}

// why tells a person why a job waits.
func (f *floor) why(w *Waiting) string {
	reason := ""
	if f.find(w.Request, f.withoutKept(), false) != nil {
		reason = "the room that is free is kept"
	} else {
		var noRoom *NoRoomError
		if errors.As(explain(f.nodes, w.Request), &noRoom) {
			reason = noRoom.Reason
		}
	}
	if len(f.ahead) > 0 {
		reason += fmt.Sprintf("; job %s of priority %d is ahead", f.ahead[0].ID, f.ahead[0].Priority)
	}
	if stays := f.staying(w); stays != "" {
		reason += "; " + stays
	}
	return reason
}

// withoutKept are the nodes with what is used of them, but not what is kept for
// jobs ahead.
func (f *floor) withoutKept() []Node {
	nodes := slices.Clone(f.nodes)
	for j := range f.jobs {
		if job := &f.jobs[j]; job.Stays == keptStays {
			for i := range f.placesOf(job) {
				nodes[i].take(job)
			}
		}
	}
	return nodes
}

// staying says of the job that would have to give way, and cannot, why.
func (f *floor) staying(w *Waiting) string {
	if w.Patient || w.Spares {
		return ""
	}
	for _, v := range f.victims(w, func(j *Running) bool { return j.Stays != keptStays }) {
		if job := f.jobs[v]; job.Stays != "" {
			return fmt.Sprintf("job %s of priority %d does not give way: %s", job.ID, job.Priority, job.Stays)
		}
	}
	return ""
}

// keptStays marks jobs that are only about to have their place.
const keptStays = "it is about to be started"

// list names things, at most a few of them.
func list(ids []string, what string) string {
	const most = 3
	text := what
	if len(ids) > 1 {
		text += "s"
	}
	text += " " + strings.Join(ids[:min(len(ids), most)], ", ")
	if more := len(ids) - most; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}
