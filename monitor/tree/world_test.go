package tree

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"dormouse/api/agentpb"
)

// world is nodes, a controller and the ways between them, all driven by one seed.
type world struct {
	*rand.Rand
	now     time.Time
	events  events
	order   int
	tracing bool
	trace   []string
	planted string // a bug

	calm    bool // nodes crash, and nothing else is wrong
	faults  bool
	wire    bool // every message is encoded and decoded
	config  Config
	nodes   []*simNode
	blocked map[Edge]bool // ways between nodes that do not exist
	hub     hub

	raised   map[Position]bool // and on disk; true: told
	raisedAt map[Position]time.Time
	rounds   []Round
	bytes    traffic
}

// traffic is what is measured when nothing is wrong.
type traffic struct {
	reports, bytes int            // to the controller
	answers        int            // from it
	perNode        map[string]int // messages that a node received
	links          int            // bytes between nodes
}

// hub is the controller: what it runs and what is stored.
type hub struct {
	core    *Collector
	life    int // counts its starts
	wake    time.Time
	stored  State
	members []Member
}

type simNode struct {
	id      string
	member  Member
	core    *Node
	disk    Outbox
	skew    time.Duration
	life    int
	wake    time.Time
	gone    bool // for good
	upSince time.Time
	placed  time.Time // when it was first given a place in this life; zero: not yet
}

type event struct {
	at    time.Time
	order int
	do    func()
}

type events []event

func (e events) Len() int      { return len(e) }
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e events) Less(i, j int) bool {
	if e[i].at.Equal(e[j].at) {
		return e[i].order < e[j].order
	}
	return e[i].at.Before(e[j].at)
}
func (e *events) Push(x any) { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	last := len(*e) - 1
	x := (*e)[last]
	(*e)[last] = event{}
	*e = (*e)[:last]
	return x
}

type broken string

func (w *world) fail(format string, args ...any) { panic(broken(fmt.Sprintf(format, args...))) }

func (w *world) note(format string, args ...any) {
	if w.tracing {
		w.trace = append(w.trace, fmt.Sprintf("%9.3f  ", float64(w.now.Sub(start).Microseconds())/1000)+fmt.Sprintf(format, args...))
	}
}

var start = time.Unix(1000, 0)

func (w *world) after(d time.Duration, do func()) {
	w.order++
	heap.Push(&w.events, event{w.now.Add(d), w.order, do})
}

func (w *world) step() {
	e := heap.Pop(&w.events).(event)
	w.now = e.at
	e.do()
}

func (w *world) runUntil(at time.Time) {
	for len(w.events) > 0 && !w.events[0].at.After(at) {
		w.step()
	}
	w.now = at
}

// one in n.
func (w *world) one(n int) bool { return w.IntN(n) == 0 }

func (w *world) upTo(d time.Duration) time.Duration { return time.Duration(w.Int64N(int64(d) + 1)) }

func (w *world) slot() time.Duration { return schedule{w.config.Period, 4}.slot() }

// way carries something: mostly soon, and with faults now and then late, twice,
// or not at all.
func (w *world) way(lost func(), do func()) {
	if w.faults && !w.calm {
		switch w.IntN(20) {
		case 0:
			if lost != nil {
				w.after(w.upTo(w.slot()), lost)
			}
			return
		case 1:
			w.after(w.upTo(2*w.config.Period), do)
		case 2:
			w.after(w.upTo(2*w.config.Period), do)
			return
		}
	}
	w.after(w.upTo(w.slot()/5), do)
}

func (w *world) node(id string) *simNode {
	i, _ := slices.BinarySearchFunc(w.nodes, id, func(n *simNode, id string) int {
		if n.id < id {
			return -1
		}
		return map[bool]int{true: 1, false: 0}[n.id > id]
	})
	return w.nodes[i]
}

func (w *world) addNode() *simNode {
	id := fmt.Sprintf("n%03d", len(w.nodes))
	n := &simNode{id: id, member: Member{ID: id, Cloud: "a", Address: "x"}}
	if w.one(6) && !w.calm {
		n.member.Address = ""
	}
	if w.one(3) {
		n.member.Cloud = "b"
	}
	n.skew = w.upTo(w.slot()/4) - w.slot()/8
	w.nodes = append(w.nodes, n)
	w.boot(n, true)
	return n
}

// boot starts a node, with what is on its disk or with an empty one.
func (w *world) boot(n *simNode, empty bool) {
	if empty {
		n.disk = Outbox{Stream: w.now.UnixNano()}
	}
	n.life++
	n.core, n.upSince, n.placed, n.wake = NewNode(n.id, n.disk), w.now, time.Time{}, time.Time{}
	w.note("%s starts, with %d verdicts", n.id, len(n.disk.Pending))
	w.connect(n)
}

// connect is a new stream between a node and the controller.
func (w *world) connect(n *simNode) {
	life := n.life
	w.after(w.upTo(w.slot()), func() {
		if n.life != life || n.core == nil || w.hub.core == nil {
			return // whoever starts connects
		}
		if !slices.Contains(w.hub.members, n.member) {
			w.hub.members = append(w.hub.members, n.member)
			w.hubDo(w.hub.core.Members(w.hub.members, w.now))
		}
		w.hubDo(w.hub.core.Connected(n.id, w.now))
	})
}

func (w *world) crash(n *simNode) {
	w.note("%s crashes", n.id)
	n.core = nil
	n.life++
}

// retire takes a node out of the tree after it was missed for a while.
func (w *world) retire(n *simNode) {
	n.gone = true
	w.after(w.upTo(3*w.config.Period), func() {
		w.hub.members = slices.DeleteFunc(slices.Clone(w.hub.members), func(m Member) bool { return m.ID == n.id })
		if w.hub.core != nil {
			w.note("%s is lost for good", n.id)
			w.hubDo(w.hub.core.Members(w.hub.members, w.now))
		}
	})
}

// nodeDo does what a node's core says.
func (w *world) nodeDo(n *simNode, out Output) {
	if out.Store {
		if w.faults && !w.calm && w.one(60) {
			w.crashAndReturn(n)
			return
		}
		n.disk = n.core.Outbox()
		for _, v := range n.disk.Pending {
			if _, known := w.raised[v.Position]; !known {
				w.raised[v.Position], w.raisedAt[v.Position] = false, w.now
			}
		}
		if w.faults && !w.calm && w.one(60) {
			w.crashAndReturn(n)
			return
		}
	}
	if out.Sample != 0 {
		life := n.life
		w.after(w.upTo(w.slot()/4), func() {
			if n.life == life {
				sample := Summary{Tables: []Table{Rows(map[string][]uint64{"nodes": {1}})}}
				out, err := n.core.Observe(out.Sample, sample, w.now.Add(n.skew))
				if err != nil {
					w.fail("%s: %v", n.id, err)
				}
				w.nodeDo(n, out)
			}
		})
	}
	for _, m := range out.Send {
		if m.To == Controller {
			w.toHub(n, *m.Report)
		} else {
			w.toNode(n, m)
		}
	}
	w.wakeNode(n, out.Wake)
}

func (w *world) wakeNode(n *simNode, at time.Time) {
	if at.IsZero() || at.Equal(n.wake) {
		return
	}
	n.wake = at
	life := n.life
	w.after(at.Add(-n.skew).Sub(w.now), func() {
		if n.life == life && n.wake.Equal(at) {
			n.wake = time.Time{}
			w.nodeDo(n, n.core.Tick(w.now.Add(n.skew)))
		}
	})
}

func (w *world) toHub(n *simNode, r Report) {
	if r.Orphan != "" && w.planted == "no fallback" {
		return
	}
	w.note("%s tells the controller of round %d: %d nodes, %d verdicts, orphan of %q", n.id, r.Round, r.Summary.Nodes.Len(), len(r.Verdicts), r.Orphan)
	if w.calm && r.Orphan != "" && !r.Refused && w.livedThrough(w.node(r.Orphan), r.Round) {
		w.fail("%s gave up %s in round %d, which was there all the time", n.id, r.Orphan, r.Round)
	}
	p := w.encoded(r.Proto())
	w.way(nil, func() {
		if w.hub.core == nil {
			return
		}
		if p != nil {
			w.bytes.reports++
			w.bytes.bytes += len(p)
			r = w.decoded(p)
		}
		w.hubDo(w.hub.core.Report(n.id, r, w.now))
	})
}

func (w *world) toNode(n *simNode, m Message) {
	to := w.node(m.To)
	if m.Ack != nil {
		a := *m.Ack
		if p := w.encoded(a.Proto()); p != nil {
			w.bytes.links += len(p)
		}
		w.way(nil, func() {
			if to.core != nil {
				w.countAt(to)
				w.nodeDo(to, to.core.Ack(n.id, a, w.now.Add(to.skew)))
			}
		})
		return
	}
	r := *m.Report
	p := w.encoded(r.Proto())
	w.bytes.links += len(p)
	life := n.life
	unreachable := func() {
		if n.life == life && w.one(2) {
			w.nodeDo(n, n.core.Unreachable(to.id, r.Round, w.now.Add(n.skew)))
		}
	}
	if w.blocked[Edge{n.id, to.id}] {
		w.after(w.upTo(w.slot()), unreachable)
		return
	}
	w.way(unreachable, func() {
		if to.core == nil {
			w.after(w.upTo(w.slot()/5), unreachable)
			return
		}
		if p != nil {
			w.countAt(to)
			r = w.decoded(p)
		}
		if w.planted == "early answer" {
			a := Ack{Round: r.Round}
			for _, v := range r.Verdicts {
				a.Stored = append(a.Stored, v.Position)
			}
			w.after(0, func() {
				if n.life == life {
					w.nodeDo(n, n.core.Ack(to.id, a, w.now.Add(n.skew)))
				}
			})
		}
		w.nodeDo(to, to.core.Report(n.id, r, w.now.Add(to.skew)))
	})
}

func (w *world) countAt(n *simNode) {
	if w.bytes.perNode != nil {
		w.bytes.perNode[n.id]++
	}
}

func (w *world) encoded(p proto.Message) []byte {
	if !w.wire {
		return nil
	}
	b, err := proto.Marshal(p)
	if err != nil || len(b) > MaxReport {
		w.fail("a message has %d bytes: %v", len(b), err)
	}
	return b
}

func (w *world) decoded(b []byte) Report {
	var p agentpb.TreeReport
	if err := proto.Unmarshal(b, &p); err != nil {
		w.fail("%v", err)
	}
	r, err := ReportFrom(&p)
	if err != nil {
		w.fail("%v", err)
	}
	return r
}

// hubDo does what the controller's core says.
func (w *world) hubDo(out CollectorOutput) {
	if out.Write != nil {
		w.write(*out.Write)
	}
	for _, a := range out.Assign {
		w.assign(a)
	}
	for _, m := range out.Send {
		to, ack := w.node(m.To), *m.Ack
		w.bytes.answers++
		w.way(nil, func() {
			if to.core != nil {
				w.nodeDo(to, to.core.Ack(Controller, ack, w.now.Add(to.skew)))
			}
		})
	}
	for _, r := range out.Rounds {
		w.checkRound(r)
	}
	w.wakeHub(out.Wake)
}

func (w *world) assign(a Assigned) {
	n := w.node(a.Node)
	life := n.life
	w.note("%s: %+v", a.Node, a.Place)
	place := a.Place
	if w.wire {
		var err error
		if place, err = AssignmentFrom(place.Proto()); err != nil {
			w.fail("%v", err)
		}
	}
	// What is lost with a stream is given again on the next one.
	w.way(func() { w.connect(n) }, func() {
		if n.life != life || n.core == nil {
			return
		}
		if n.placed.IsZero() {
			n.placed = w.now
		}
		w.nodeDo(n, n.core.Assign(place, w.now.Add(n.skew)))
	})
}

func (w *world) wakeHub(at time.Time) {
	if at.Equal(w.hub.wake) {
		return
	}
	w.hub.wake = at
	life := w.hub.life
	w.after(at.Sub(w.now), func() {
		if w.hub.life == life && w.hub.wake.Equal(at) {
			w.hub.wake = time.Time{}
			w.hubDo(w.hub.core.Tick(w.now))
		}
	})
}

// write stores what the controller wants to: it may fail, and the controller may
// be killed before, or after.
func (w *world) write(what Write) {
	life := w.hub.life
	bad := w.faults && !w.calm
	w.after(w.upTo(w.slot()/4), func() {
		if w.hub.life != life {
			return
		}
		if bad && w.one(20) {
			w.hubDo(w.hub.core.Written(false, w.now))
			return
		}
		for _, v := range what.Verdicts {
			w.tell(v)
		}
		w.hub.stored = what.State
		if w.planted == "forgetful" {
			w.hub.stored.Inbox = nil
		}
		if bad && w.one(30) {
			w.crashHub()
			return
		}
		w.hubDo(w.hub.core.Written(true, w.now))
	})
}

func (w *world) tell(v Verdict) {
	w.note("verdict %+v is told", v.Position)
	told, raised := w.raised[v.Position]
	if told {
		w.fail("verdict %+v is told twice", v.Position)
	}
	if before := (Position{v.Node, v.Stream, v.Seq - 1}); v.Seq > 1 && !w.raised[before] {
		w.fail("verdict %+v is told before %+v", v.Position, before)
	}
	if !raised || string(v.Body) != fmt.Sprint(v.Node, v.Seq) {
		w.fail("verdict %+v with %q was never raised", v.Position, v.Body)
	}
	w.raised[v.Position] = true
}

func (w *world) startHub() {
	w.hub.life++
	w.hub.wake = time.Time{}
	w.hub.core = NewCollector(w.config, w.hub.stored, w.now)
	w.hubDo(w.hub.core.Members(w.hub.members, w.now))
	for _, n := range w.nodes {
		if n.core != nil {
			w.connect(n)
		}
	}
}

func (w *world) crashHub() {
	w.note("the controller crashes")
	w.hub.core = nil
	w.hub.life++
	w.after(w.upTo(2*w.config.Period), func() {
		if w.hub.core == nil {
			w.note("the controller starts")
			w.startHub()
		}
	})
}

// crashAndReturn ends a node, which mostly comes back, sometimes without its disk.
func (w *world) crashAndReturn(n *simNode) {
	w.crash(n)
	if w.one(3) {
		w.retire(n)
		return
	}
	empty := w.one(5)
	if empty {
		w.forget(n)
	}
	life := n.life
	w.after(w.upTo(3*w.config.Period), func() {
		if n.life == life {
			w.boot(n, empty)
		}
	})
}

// forget takes what a node had on its lost disk off what must be told.
func (w *world) forget(n *simNode) {
	for _, v := range n.disk.Pending {
		if told, ok := w.raised[v.Position]; ok && !told {
			w.note("verdict %+v is lost with its disk", v.Position)
		}
	}
	n.disk = Outbox{}
}

// owed are verdicts that must have been told and were not.
func (w *world) owed() []Position {
	var owed []Position
	for _, n := range w.nodes {
		if n.gone {
			continue
		}
		for _, v := range n.disk.Pending {
			if !w.raised[v.Position] {
				owed = append(owed, v.Position)
			}
		}
	}
	return owed
}

// checkRound looks at what the controller made of a round.
func (w *world) checkRound(r Round) {
	w.note("round %d: %d nodes, missing %v, %d reports, %d orphans", r.Number, r.Summary.Nodes.Len(), r.Missing, r.Reports, r.Orphans)
	counted := uint64(0)
	if len(r.Summary.Tables) > 0 {
		counted = r.Summary.Tables[0].Rows[0].Values[0]
	}
	if counted != uint64(r.Summary.Nodes.Len()) {
		w.fail("round %d counts %d nodes and names %d", r.Number, counted, r.Summary.Nodes.Len())
	}
	w.rounds = append(w.rounds, r)
	if !w.calm {
		return
	}
	// Nothing is wrong but that nodes crash: of all that lived through the round
	// and had a place before it began, nothing is missing.
	for _, id := range r.Missing {
		if w.livedThrough(w.node(id), r.Number) {
			w.fail("round %d lacks %s, which was there all the time", r.Number, id)
		}
	}
	for _, n := range w.alive() {
		for _, v := range n.disk.Pending {
			if w.livedThrough(n, r.Number) && !w.raised[v.Position] && w.raisedAt[v.Position].Before(w.begin(r.Number)) {
				w.fail("round %d did not bring %+v", r.Number, v.Position)
			}
		}
	}
}

// begin is safely before all nodes' clocks show a round.
func (w *world) begin(round int64) time.Time {
	return schedule{w.config.Period, 0}.at(round, 0).Add(-w.slot())
}

func (w *world) livedThrough(n *simNode, round int64) bool {
	return n.core != nil && !n.placed.IsZero() && n.placed.Before(w.begin(round))
}

func (w *world) alive() []*simNode {
	return slices.DeleteFunc(slices.Clone(w.nodes), func(n *simNode) bool { return n.core == nil })
}
