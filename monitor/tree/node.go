package tree

import (
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
)

// Controller is where a message goes that goes to no node.
const Controller = ""

// Node is one node's part in the tree.
//
// Every method takes the time on the controller's clock, as well as the node
// knows it: an error of less than a slot costs nothing, a larger one makes the
// node report to the controller itself.
type Node struct {
	id     string
	outbox Outbox
	place  *Assignment // nil: it has none yet
	next   *Assignment // from the next round on
	round  round
	early  map[string]Report // of the next round, by child
}

// round is what a node knows of the present one.
type round struct {
	number int64
	own    *Summary
	from   map[string]Report // by child
	sent   *Report
	until  uint64 // own verdicts up to this one were raised before it was sent
	direct bool   // the controller was told instead
	rest   bool   // and what did not fit
	answer *Ack   // the controller has it
}

// NewNode is a node that goes on with the outbox it has stored. A new outbox has
// a stream that is higher than any the node had: the time will do.
func NewNode(id string, outbox Outbox) *Node { return &Node{id: id, outbox: outbox} }

// Output is what a node is to do now.
type Output struct {
	// Store is set when Outbox has to be on disk before anything else of this
	// output is done.
	Store bool
	// Sample is the round for which a sample is to be taken and given to Observe;
	// 0: none.
	Sample int64
	Send   []Message
	// Wake is when to call Tick, if nothing happens before. Zero: never.
	Wake time.Time
}

// Message is a report or an answer.
type Message struct {
	To     string // a node, or the Controller
	Report *Report
	Ack    *Ack
}

// Outbox is what has to be stored for NewNode.
func (n *Node) Outbox() Outbox {
	return Outbox{n.outbox.Stream, n.outbox.Last, slices.Clone(n.outbox.Pending)}
}

// Place is where the node is, and false as long as it is nowhere.
func (n *Node) Place() (Assignment, bool) {
	if n.place == nil {
		return Assignment{}, false
	}
	return *n.place, true
}

// Assign gives the node its place from the next round on.
func (n *Node) Assign(a Assignment, now time.Time) Output {
	if n.latest() != nil && a.Epoch <= n.latest().Epoch {
		return n.after(now, Output{})
	}
	if n.place != nil && n.place.Period != a.Period {
		n.place = nil
	}
	if n.place == nil {
		n.round = round{number: schedule{a.Period, a.Levels}.round(now)} // in which it has no part
	}
	n.next = &a
	return n.after(now, Output{})
}

func (n *Node) latest() *Assignment {
	if n.next != nil {
		return n.next
	}
	return n.place
}

// Raise adds a verdict, which is told with the next report. An error means that
// it can never be.
func (n *Node) Raise(body []byte, now time.Time) (Output, error) {
	if err := n.outbox.add(n.id, body); err != nil {
		return Output{}, err
	}
	return n.after(now, Output{Store: true}), nil
}

// Observe takes the node's own sample of a round. An error means that it is out
// of bounds, and is not sent.
func (n *Node) Observe(round int64, sample Summary, now time.Time) (Output, error) {
	if err := sample.Check(); err != nil {
		return Output{}, err
	}
	var out Output
	n.advance(now, &out)
	if n.place != nil && round == n.round.number {
		sample.Nodes = SetOf(n.place.Number)
		n.round.own = &sample
	}
	return n.after(now, out), nil
}

// Report takes what a child reports.
func (n *Node) Report(from string, r Report, now time.Time) Output {
	var out Output
	n.advance(now, &out)
	_, has := n.round.from[from]
	switch {
	case n.place == nil || !slices.Contains(n.place.Children, from) || r.Depth != n.place.Depth+1:
		n.refuse(from, r, &out)
	case r.Round == n.round.number+1: // the child's clock is ahead
		if n.early == nil {
			n.early = map[string]Report{}
		}
		n.early[from] = r
	case r.Round != n.round.number:
		n.refuse(from, r, &out)
	case has:
		if n.round.answer != nil { // repeated, because the answer was lost
			n.answer(from, &out)
		}
	case n.round.sent != nil:
		n.refuse(from, r, &out)
	default:
		n.round.from[from] = r
	}
	return n.after(now, out)
}

func (n *Node) refuse(from string, r Report, out *Output) {
	out.Send = append(out.Send, Message{To: from, Ack: &Ack{Round: r.Round, Refused: true}})
}

// Ack takes the answer of the parent or of the controller.
func (n *Node) Ack(from string, a Ack, now time.Time) Output {
	var out Output
	n.advance(now, &out)
	for _, p := range a.Stored {
		if p.Node == n.id && n.outbox.drop(p) {
			out.Store = true
		}
	}
	if n.round.sent != nil && a.Round == n.round.number && !n.passed(from, a, &out) && n.round.rest && out.Store {
		n.sendRest(&out)
	}
	return n.after(now, out)
}

// passed takes the first answer that says that the report has arrived, and
// passes it on to the children.
func (n *Node) passed(from string, a Ack, out *Output) bool {
	switch {
	case n.round.answer != nil, from != Controller && from != n.place.Parent:
		return false
	case a.Refused:
		if !n.round.direct {
			n.goDirect(true, out)
		}
		return true
	}
	n.round.answer = &a
	for _, child := range slices.Sorted(maps.Keys(n.round.from)) {
		n.answer(child, out)
	}
	return true
}

// answer tells a child what came of its report: of the verdicts in it, which the
// controller has.
func (n *Node) answer(child string, out *Output) {
	brought := map[string]bool{}
	for _, v := range n.round.from[child].Verdicts {
		brought[v.Node] = true
	}
	ack := Ack{Round: n.round.number}
	for _, p := range n.round.answer.Stored {
		if brought[p.Node] {
			ack.Stored = append(ack.Stored, p)
		}
	}
	out.Send = append(out.Send, Message{To: child, Ack: &ack})
}

// Unreachable says that the parent could not be told the report of a round.
func (n *Node) Unreachable(parent string, round int64, now time.Time) Output {
	var out Output
	n.advance(now, &out)
	r := &n.round
	if r.number == round && r.sent != nil && r.answer == nil && !r.direct && parent == n.place.Parent && parent != Controller {
		n.goDirect(false, &out)
	}
	return n.after(now, out)
}

// Tick does what is due.
func (n *Node) Tick(now time.Time) Output { return n.after(now, Output{}) }

// after ends every input.
func (n *Node) after(now time.Time, out Output) Output {
	n.advance(now, &out)
	out.Wake = n.wake(now)
	return out
}

func (n *Node) times() schedule { return schedule{n.place.Period, n.place.Levels} }

// advance begins a round, reports, and tells the controller instead, when it is
// time to.
func (n *Node) advance(now time.Time, out *Output) {
	if n.place == nil && n.next == nil {
		return
	}
	current := n.latest()
	if n.place != nil {
		current = n.place
	}
	number := schedule{current.Period, current.Levels}.round(now)
	// One round back is a clock that was corrected a little.
	if number > n.round.number || number < n.round.number-1 {
		n.begin(number, out)
	}
	r := &n.round
	if n.place == nil {
		return
	}
	if r.sent == nil && n.mayReport(now) {
		n.report(out)
	}
	if r.sent == nil || now.Before(n.times().answerBy(r.number, n.place.Depth)) {
		return
	}
	switch {
	case r.answer == nil && !r.direct:
		n.goDirect(false, out)
	case r.answer != nil && !r.rest && n.unstored():
		r.rest = true
		n.sendRest(out)
	}
}

func (n *Node) begin(number int64, out *Output) {
	if n.next != nil {
		n.place, n.next = n.next, nil
	}
	n.round = round{number: number, from: map[string]Report{}}
	for child, r := range n.early {
		if r.Round == number && slices.Contains(n.place.Children, child) {
			n.round.from[child] = r
		}
	}
	n.early = nil
	out.Sample = number
}

// mayReport reports whether there is nothing more to wait for.
func (n *Node) mayReport(now time.Time) bool {
	r, t := &n.round, n.times()
	if !now.Before(t.reportBy(r.number, n.place.Depth)) {
		return true
	}
	if n.place.Parent == Controller && len(n.place.Children) == 0 && now.Before(t.spread(r.number, n.place.Number)) {
		return false
	}
	return r.own != nil && len(r.from) == len(n.place.Children)
}

func (n *Node) report(out *Output) {
	r := &n.round
	report := Report{Round: r.number, Depth: n.place.Depth, Summary: n.summary()}
	room := MaxReport - reserve - proto.Size(report.Proto())
	report.Verdicts = fitting(n.verdicts(), room)
	r.sent, r.until = &report, n.outbox.Last
	out.Send = append(out.Send, Message{To: n.place.Parent, Report: r.sent})
}

// reserve is for what is added when the controller is told instead.
const reserve = 1 << 10

func (n *Node) summary() Summary {
	var all []Summary
	if n.round.own != nil {
		all = append(all, *n.round.own)
	}
	for _, child := range slices.Sorted(maps.Keys(n.round.from)) {
		all = append(all, n.round.from[child].Summary)
	}
	return Gather(all)
}

// verdicts are the node's own and its children's, of which another is the first
// in each round. Those of one node stay in order.
func (n *Node) verdicts() []Verdict {
	all := slices.Clone(n.outbox.Pending)
	children := slices.Sorted(maps.Keys(n.round.from))
	for i := range children {
		child := children[(i+int(n.round.number))%len(children)]
		all = append(all, n.round.from[child].Verdicts...)
	}
	return all
}

// fitting are the first verdicts for which there is room.
func fitting(all []Verdict, room int) []Verdict {
	for i, v := range all {
		if room -= v.size(); room < 0 {
			return all[:i]
		}
	}
	return all
}

// goDirect tells the controller what the parent should have told it.
func (n *Node) goDirect(refused bool, out *Output) {
	n.round.direct = true
	report := *n.round.sent
	report.Orphan, report.Refused = n.place.Parent, refused
	out.Send = append(out.Send, Message{To: Controller, Report: &report})
}

// unstored reports whether verdicts are pending that should have been in what
// the controller has.
func (n *Node) unstored() bool {
	return len(n.outbox.Pending) > 0 && n.outbox.Pending[0].Seq <= n.round.until
}

// sendRest tells the controller verdicts that somewhere on the way did not fit.
func (n *Node) sendRest(out *Output) {
	if !n.unstored() {
		return
	}
	report := Report{Round: n.round.number, Depth: n.place.Depth}
	report.Verdicts = fitting(n.outbox.Pending, MaxReport-reserve)
	out.Send = append(out.Send, Message{To: Controller, Report: &report})
}

// wake is when something is due next.
func (n *Node) wake(now time.Time) time.Time {
	if n.place == nil {
		if n.next == nil {
			return time.Time{}
		}
		return schedule{n.next.Period, n.next.Levels}.at(n.round.number+1, 0)
	}
	r, t := &n.round, n.times()
	due := []time.Time{t.at(r.number+1, 0)}
	if r.sent == nil {
		due = append(due, t.spread(r.number, n.place.Number), t.reportBy(r.number, n.place.Depth))
	} else {
		due = append(due, t.answerBy(r.number, n.place.Depth))
	}
	slices.SortFunc(due, time.Time.Compare)
	for _, at := range due {
		if at.After(now) {
			return at
		}
	}
	return now.Add(t.slot())
}
