package tree

import (
	"maps"
	"reflect"
	"slices"
	"time"
)

// State is what a collector has to remember; it is stored whenever Output says so.
type State struct {
	Epoch int64 `json:"epoch"`
	Tree  *Tree `json:"tree,omitempty"`
	// Inbox is, for each node that ever raised a verdict, the last that was
	// stored. It may be forgotten with the node, when that never comes back.
	Inbox map[string]Position `json:"inbox,omitempty"`
}

// Config is what a controller decides about its tree.
type Config struct {
	Arity  int           // children of a node, at least 1
	Period time.Duration // of a round
}

// Collector is the controller's part: it builds the tree, hands it out, and
// gathers what comes up.
type Collector struct {
	config  Config
	state   State
	members map[string]Member     // nil: not known yet
	given   map[string]Assignment // as of state.Tree
	rebuild bool
	doubts  doubts
	closed  int64 // the last round that was closed
	rounds  map[int64]*gathering
	writing *writing
	waiting []arrived // reports with verdicts, while something is being written
}

// gathering is what has come in of a round.
type gathering struct {
	summaries  []Summary
	reports    int
	complaints map[string]complaint // by child
}

type complaint struct {
	parent  string
	refused bool
}

type arrived struct {
	from   string
	report Report
}

type writing struct {
	write   Write
	reports []arrived
}

// Write is what has to be stored, all or nothing. Since the last one the inbox has
// changed for the nodes of the verdicts, and the tree only if the epoch has.
type Write struct {
	Verdicts []Verdict // told now, and never again
	State    State     // from now on
}

// CollectorOutput is what the controller is to do now.
type CollectorOutput struct {
	// Write this, and tell whether it was Written. There is never more than one.
	Write  *Write
	Assign []Assigned
	Send   []Message // answers
	Rounds []Round   // that are over
	Wake   time.Time // when to call Tick, if nothing happens before
}

// Assigned is a node's new place.
type Assigned struct {
	Node  string
	Place Assignment
}

// Round is what a round has brought.
type Round struct {
	Number  int64
	Summary Summary
	Heard   []string // nodes in the tree of which something was heard
	Missing []string // and those of which nothing was
	Reports int      // how many came
	Orphans int      // of these, from nodes whose parent should have told it
}

// NewCollector goes on with what was stored.
func NewCollector(config Config, state State, now time.Time) *Collector {
	c := &Collector{config: config, state: state, rounds: map[int64]*gathering{}, doubts: newDoubts()}
	if c.state.Tree == nil {
		c.state.Tree = Build(nil, nil, nil, config.Arity)
	}
	c.state.Inbox = maps.Clone(state.Inbox)
	c.given = map[string]Assignment{}
	c.closed = c.times().round(now)
	return c
}

func (c *Collector) times() schedule { return schedule{c.config.Period, c.state.Tree.Levels} }

// Members says which nodes are to be in the tree. It changes at the end of the
// round, so that many that come at once make one change; the first are placed at
// once.
func (c *Collector) Members(members []Member, now time.Time) CollectorOutput {
	next := map[string]Member{}
	for _, m := range members {
		next[m.ID] = m
	}
	if c.members == nil || !maps.Equal(next, c.members) {
		c.members, c.rebuild = next, true
	}
	var out CollectorOutput
	if len(c.state.Tree.Places) == 0 {
		c.flush(&out)
	}
	return c.after(now, out)
}

// Connected says that a node has a new stream: it is given its place again. After
// a restart of the controller, Members comes before.
func (c *Collector) Connected(node string, now time.Time) CollectorOutput {
	var out CollectorOutput
	if place, ok := c.state.Tree.Places[node]; ok {
		a := c.assignment(c.state.Tree, node, place, c.state.Tree.children()[node])
		c.given[node] = a
		out.Assign = append(out.Assign, Assigned{node, a})
	}
	return c.after(now, out)
}

// Report takes what a node reports, for itself and all below it.
func (c *Collector) Report(from string, r Report, now time.Time) CollectorOutput {
	var out CollectorOutput
	if _, ok := c.members[from]; !ok {
		return c.after(now, out)
	}
	c.gather(from, r)
	if c.news(r) {
		c.waiting = append(c.waiting, arrived{from, r})
		c.flush(&out)
	} else {
		out.Send = append(out.Send, c.answer(from, r))
	}
	return c.after(now, out)
}

func (c *Collector) gather(from string, r Report) {
	if r.Round <= c.closed || r.Round > c.closed+2 {
		return
	}
	g := c.rounds[r.Round]
	if g == nil {
		g = &gathering{complaints: map[string]complaint{}}
		c.rounds[r.Round] = g
	}
	g.reports++
	if len(r.Summary.Nodes) > 0 {
		g.summaries = append(g.summaries, r.Summary)
	}
	if r.Orphan != "" && c.state.Tree.Places[from].Parent == r.Orphan {
		g.complaints[from] = complaint{r.Orphan, r.Refused}
	}
}

// news reports whether a verdict in a report has yet to be stored.
func (c *Collector) news(r Report) bool {
	return slices.ContainsFunc(r.Verdicts, func(v Verdict) bool {
		return c.isNext(v.Position, c.state.Inbox[v.Node])
	})
}

// isNext reports whether a verdict follows the last one that was stored. One
// that does not is either stored, of a stream that has ended, or will come again
// after those before it.
func (c *Collector) isNext(v, last Position) bool {
	_, known := c.members[v.Node]
	switch {
	case !known:
		return false
	case v.Stream > last.Stream:
		return v.Seq == 1
	}
	return v.Stream == last.Stream && v.Seq == last.Seq+1
}

// answer acknowledges a report: of each node in it, what is stored.
func (c *Collector) answer(to string, r Report) Message {
	ack := Ack{Round: r.Round}
	named := map[string]bool{}
	for _, v := range r.Verdicts {
		if p, ok := c.state.Inbox[v.Node]; ok && !named[v.Node] {
			named[v.Node] = true
			ack.Stored = append(ack.Stored, p)
		}
	}
	return Message{To: to, Ack: &ack}
}

// flush writes what there is to write, unless something is being written.
func (c *Collector) flush(out *CollectorOutput) {
	if c.writing != nil || len(c.waiting) == 0 && !c.rebuild {
		return
	}
	next := c.state
	next.Inbox = maps.Clone(c.state.Inbox)
	if next.Inbox == nil {
		next.Inbox = map[string]Position{}
	}
	w := &writing{reports: c.waiting}
	c.waiting = nil
	for _, a := range w.reports {
		for _, v := range a.report.Verdicts {
			if c.isNext(v.Position, next.Inbox[v.Node]) {
				next.Inbox[v.Node] = v.Position
				w.write.Verdicts = append(w.write.Verdicts, v)
			}
		}
	}
	if c.rebuild {
		c.rebuild = false
		next.Tree = c.build()
		next.Epoch++
	}
	w.write.State = next
	c.writing = w
	out.Write = &w.write
}

// build is the tree of the members, without what is doubted.
func (c *Collector) build() *Tree {
	members := make([]Member, 0, len(c.members))
	for _, m := range c.members {
		if c.doubts.node(m.ID) {
			m.Address = ""
		}
		members = append(members, m)
	}
	return Build(c.state.Tree, members, c.doubts.avoided(), c.config.Arity)
}

// Written says whether the Write is stored. If not, those who have reported will
// repeat it.
func (c *Collector) Written(stored bool, now time.Time) CollectorOutput {
	var out CollectorOutput
	w := c.writing
	if w == nil {
		return c.after(now, out)
	}
	c.writing = nil
	if !stored {
		c.rebuild = c.rebuild || w.write.State.Epoch != c.state.Epoch
		c.flushVerdicts(&out)
		return c.after(now, out)
	}
	changed := w.write.State.Epoch != c.state.Epoch
	c.state = w.write.State
	if changed {
		c.handOut(&out)
	}
	for _, a := range w.reports {
		out.Send = append(out.Send, c.answer(a.from, a.report))
	}
	c.flushVerdicts(&out)
	return c.after(now, out)
}

// flushVerdicts leaves a new tree to the end of the round.
func (c *Collector) flushVerdicts(out *CollectorOutput) {
	if len(c.waiting) > 0 {
		c.flush(out)
	}
}

// handOut gives their places to the nodes whose place has changed.
func (c *Collector) handOut(out *CollectorOutput) {
	tree := c.state.Tree
	below := tree.children()
	given := make(map[string]Assignment, len(tree.Places))
	for _, id := range slices.Sorted(maps.Keys(tree.Places)) {
		a := c.assignment(tree, id, tree.Places[id], below[id])
		given[id] = a
		before := c.given[id]
		before.Epoch = a.Epoch
		if !reflect.DeepEqual(before, a) {
			out.Assign = append(out.Assign, Assigned{id, a})
		}
	}
	c.given = given
}

func (c *Collector) assignment(tree *Tree, id string, p Place, children []string) Assignment {
	return Assignment{
		Epoch: c.state.Epoch, Number: p.Number, Parent: p.Parent, ParentAddress: c.members[p.Parent].Address,
		Depth: p.Depth, Levels: tree.Levels, Children: children, Period: c.config.Period,
	}
}

// Tick does what is due.
func (c *Collector) Tick(now time.Time) CollectorOutput { return c.after(now, CollectorOutput{}) }

// after ends every input.
func (c *Collector) after(now time.Time, out CollectorOutput) CollectorOutput {
	if n := c.times().round(now); c.closed < n-2 { // it slept, or the clock jumped
		c.closed = n - 2
	}
	for !now.Before(c.times().closes(c.closed + 1)) {
		c.close(&out)
	}
	out.Wake = c.times().closes(c.closed + 1)
	return out
}

func (c *Collector) close(out *CollectorOutput) {
	c.closed++
	g := c.rounds[c.closed]
	if g == nil {
		g = &gathering{}
	}
	maps.DeleteFunc(c.rounds, func(n int64, _ *gathering) bool { return n <= c.closed })
	r := Round{Number: c.closed, Summary: Gather(g.summaries), Reports: g.reports, Orphans: len(g.complaints)}
	for _, id := range slices.Sorted(maps.Keys(c.state.Tree.Places)) {
		if r.Summary.Nodes.Has(c.state.Tree.Places[id].Number) {
			r.Heard = append(r.Heard, id)
		} else {
			r.Missing = append(r.Missing, id)
		}
	}
	out.Rounds = append(out.Rounds, r)
	if c.doubts.judge(c.closed, g.complaints, c.state.Tree) {
		c.rebuild = true
	}
	c.flush(out)
}

// Forget drops what is remembered of a node that will never come back.
func (c *Collector) Forget(node string) {
	forget := func(s *State) {
		s.Inbox = maps.Clone(s.Inbox)
		delete(s.Inbox, node)
	}
	forget(&c.state)
	if c.writing != nil {
		w := *c.writing // the one that is being written is read by others
		forget(&w.write.State)
		c.writing = &w
	}
}
