package protocol

import (
	"cmp"
	"container/heap"
	"fmt"
	"math/rand/v2"
	"slices"
)

// world is everything: a controller, agents, their tasks and the time, of
// which one seed decides all.
type world struct {
	*rand.Rand
	now    int64 // ms
	order  int64 // of events at one time
	events schedule
	trace  []string
	tracing,
	faults bool
	tasks   int
	agents  []*agent
	c       *controller
	disk    disk                // the controller's
	repo    map[string][]*piece // published checkpoints
	running []int               // per task: copies that run
	planted string              // a bug, to see it found
	settled map[string]int      // how many operations ended how
}

// broken is a violated invariant.
type broken string

func (w *world) fail(format string, args ...any) { panic(broken(fmt.Sprintf(format, args...))) }

func (w *world) note(format string, args ...any) {
	if w.tracing {
		w.trace = append(w.trace, fmt.Sprintf("%8d ", w.now)+fmt.Sprintf(format, args...))
	}
}

// fault is true once in n times, while there are faults.
func (w *world) fault(n int) bool { return w.faults && w.IntN(n) == 0 }

func (w *world) between(from, to int) int64 { return int64(from + w.IntN(to-from+1)) }

// downtime is mostly short, and sometimes longer than a lease.
func (w *world) downtime() int64 {
	if w.IntN(4) == 0 {
		return w.between(500, 12000)
	}
	return w.between(10, 500)
}

type event struct {
	at, order int64
	do        func()
}

type schedule []event

func (s schedule) Len() int { return len(s) }
func (s schedule) Less(i, j int) bool {
	return s[i].at < s[j].at || s[i].at == s[j].at && s[i].order < s[j].order
}
func (s schedule) Swap(i, j int) { s[i], s[j] = s[j], s[i] }
func (s *schedule) Push(e any)   { *s = append(*s, e.(event)) }
func (s *schedule) Pop() any {
	last := (*s)[len(*s)-1]
	*s = (*s)[:len(*s)-1]
	return last
}

func (w *world) after(ms int64, do func()) {
	w.order++
	heap.Push(&w.events, event{w.now + ms, w.order, do})
}

// step lets the next thing happen.
func (w *world) step() {
	e := heap.Pop(&w.events).(event)
	w.now = e.at
	e.do()
}

// Terms of the leases, in ms.
const (
	heartbeat = 1000
	lease     = 6000
	margin    = 2000
)

// ref is one run of a task.
type ref struct {
	index int
	run   int
}

// order is a command, as an agent gets it.
type order struct {
	id         string
	step       string // what is to be done
	task       ref
	checkpoint string
	hold       bool
	alone      bool // a freeze that captures and thaws
}

// plantedThaw is a capture that does not wait for the others.
const plantedThaw = "capture and thaw"

// piece is what an agent captured of one task: the order of events at which
// the capture began and ended, and between which the task stood still.
type piece struct {
	task         ref
	begun, ended int64
	frozen       int64
	thawed       int64 // 0: stands still
}

// session is one stream between an agent and the controller. What was sent on
// one never arrives on another.
type session struct {
	a    *agent
	open bool // after the welcome
	over bool
}

// agent is a model of the agent of one node, and of the node.
type agent struct {
	w         *world
	node      int
	power     bool
	alive     bool // the process
	life      int  // counts processes: what one began ends with it
	cutOff    bool // from the controller
	session   *session
	until     int64 // of the lease
	lapsed    bool
	onDisk    bool // keeps complete captures over a restart
	boxes     map[ref]*box
	captures  map[string]*taken
	uploads   map[string]*piece
	replies   map[string]*reply // nil: under way
	laneUntil map[string]int64
}

type reply struct {
	failed *Failure
	part   *piece
}

// box is a task on a node.
type box struct {
	a          *agent
	task       ref
	complete   bool // as opposed to being restored
	held       bool // at the end of a restore
	checkpoint string
	byLease    bool
	cut        bool
	runs       bool
	froze      int64
	pieces     []*piece
}

// taken is a checkpoint of one task on a node.
type taken struct {
	frozen, complete bool
	piece            *piece
}

// changed notes whether the task runs now.
func (b *box) changed() {
	w := b.a.w
	runs := b.complete && b.checkpoint == "" && !b.byLease && b.a.power && b.a.boxes[b.task] == b
	if runs == b.runs {
		return
	}
	b.runs = runs
	w.order++
	if !runs {
		b.froze = w.order
		w.running[b.task.index]--
		return
	}
	for _, p := range b.pieces {
		if p.thawed == 0 {
			p.thawed = w.order
		}
	}
	w.running[b.task.index]++
	if n := w.running[b.task.index]; n > 1 {
		w.fail("%d copies of task %d run", n, b.task.index)
	}
}

func (a *agent) remove(b *box) {
	delete(a.boxes, b.task)
	b.changed()
}

// goOn lets a task run that was stopped for a checkpoint.
func (b *box) goOn() {
	if b.checkpoint != "" {
		b.cut = false
	}
	b.checkpoint = ""
	b.changed()
}

func key(checkpoint string, t ref) string { return fmt.Sprintf("%s-%d", checkpoint, t.index) }

func fails(text string) *reply       { return &reply{failed: &Failure{Message: text}} }
func failsForNow(text string) *reply { return &reply{failed: &Failure{Message: text, Retryable: true}} }

// accept takes a command as agent.accept does.
func (a *agent) accept(o order) {
	r, known := a.replies[o.id]
	if known {
		if r != nil {
			a.answer(o.id, r)
		}
		return
	}
	a.replies[o.id] = nil
	lane := fmt.Sprint(o.task)
	if o.step == StepUpload || o.step == StepDiscard {
		lane += o.checkpoint
	}
	w, life := a.w, a.life
	begin := max(w.now, a.laneUntil[lane])
	took := w.between(1, 60)
	if w.fault(8) {
		took = w.between(60, 9000) // longer than any lease
	}
	a.laneUntil[lane] = begin + took
	w.after(begin-w.now, func() {
		if a.life == life {
			a.begin(o)
		}
	})
	w.after(begin-w.now+took, func() {
		if a.life != life {
			return
		}
		r := a.perform(o)
		w.note("node %d: %s of task %v: %v", a.node, o.id, o.task, r.failed)
		a.replies[o.id] = r
		a.answer(o.id, r)
	})
}

func (a *agent) answer(id string, r *reply) {
	if s := a.session; s != nil && s.open {
		a.w.deliver(s, func() { a.w.c.answered(a.node, id, r) })
	}
}

// deliver carries a message: late, twice, or not at all, and then nothing that
// follows on the session either.
func (w *world) deliver(s *session, do func()) {
	if w.fault(60) {
		w.endSession(s)
		return
	}
	times := 1
	if w.fault(10) {
		times = 2
	}
	for range times {
		late := w.between(0, 3)
		if w.fault(10) {
			late = w.between(0, 2500)
		}
		w.after(late, func() {
			if s.a.cutOff {
				w.endSession(s)
			}
			if !s.over {
				do()
			}
		})
	}
}

// endSession ends a session; its agent notices, and says hello again.
func (w *world) endSession(s *session) {
	if s.over {
		return
	}
	s.over = true
	w.note("node %d: the session ends", s.a.node)
	if w.c != nil && w.c.sessions[s.a.node] == s {
		delete(w.c.sessions, s.a.node)
	}
	if s.a.session == s {
		s.a.session = nil
	}
	life := s.a.life
	w.after(w.between(50, 1500), func() {
		if s.a.life == life {
			s.a.connect()
		}
	})
}

// connect says hello until there is a session.
func (a *agent) connect() {
	w := a.w
	if !a.alive || a.session != nil {
		return
	}
	life := a.life
	again := func(ms int64) {
		w.after(ms, func() {
			if a.life == life {
				a.connect()
			}
		})
	}
	if a.cutOff || w.c == nil {
		again(w.between(200, 1000))
		return
	}
	var holds []ref
	for _, b := range a.ordered() {
		holds = append(holds, b.task)
	}
	asked, s, c := w.now, &session{a: a}, w.c
	a.session = s // of the agent; it is told nothing before the welcome
	w.after(w.between(0, 20), func() {
		if s.over || a.life != life || a.cutOff || w.c != c {
			w.endSession(s)
			return
		}
		keep, destroy := c.welcome(a, s, holds)
		w.after(w.between(0, 20), func() {
			if s.over || a.life != life {
				return
			}
			s.open = true
			a.welcomed(asked, keep, destroy)
			c.connected(a.node)
		})
	})
}

func (a *agent) welcomed(asked int64, keep, destroy []ref) {
	for _, t := range destroy {
		if b := a.boxes[t]; b != nil {
			a.remove(b)
		}
	}
	a.lapsed = false
	a.renew(asked)
	for _, t := range keep {
		if b := a.boxes[t]; b != nil && !a.lapsed {
			b.byLease = false
			b.changed()
		}
	}
}

func (a *agent) renew(sent int64) {
	if a.lapsed || sent+lease <= a.until {
		return
	}
	a.until = sent + lease
	life := a.power
	a.w.after(max(a.until-a.w.now, 0), func() { // also by the guard, when the agent is dead
		if !life || !a.power || a.lapsed || a.w.now < a.until {
			return
		}
		a.w.note("node %d: the lease ran out", a.node)
		a.lapsed = true
		for _, b := range a.ordered() {
			b.byLease = true
			b.changed()
		}
		if a.session != nil {
			a.w.endSession(a.session)
		}
	})
}

func (a *agent) ordered() []*box {
	var refs []ref
	for t := range a.boxes {
		refs = append(refs, t)
	}
	slices.SortFunc(refs, func(x, y ref) int { return cmp.Or(x.index-y.index, x.run-y.run) })
	list := make([]*box, len(refs))
	for i, t := range refs {
		list[i] = a.boxes[t]
	}
	return list
}

// begin is what a command does at once.
func (a *agent) begin(o order) {
	b := a.boxes[o.task]
	if o.step == StepFreeze && o.alone {
		a.freeze(o)
		o.step = StepCapture
	}
	switch o.step {
	case StepCapture, plantedThaw:
		if t := a.captures[key(o.checkpoint, o.task)]; b != nil && t != nil && t.frozen && !t.complete {
			b.cut = true
			a.w.order++
			t.piece = &piece{task: o.task, begun: a.w.order, frozen: b.froze}
			if b.runs {
				a.w.fail("task %d runs while it is captured", o.task.index)
			}
			b.pieces = append(b.pieces, t.piece)
		}
	case StepRestore:
		if b == nil {
			a.boxes[o.task] = &box{a: a, task: o.task, cut: true, froze: a.w.order}
		}
	}
}

// perform does the rest.
func (a *agent) perform(o order) *reply {
	w, b := a.w, a.boxes[o.task]
	k := key(o.checkpoint, o.task)
	taking := a.captures[k]
	live := b != nil && b.complete
	if w.fault(40) && o.step != StepThaw && o.step != StepAbort && o.step != "cleanup" {
		if taking != nil && (o.step == StepFreeze || o.step == StepCapture) {
			a.dropCapture(k)
			if b != nil {
				b.goOn()
			}
		}
		if o.step == StepRestore && b != nil && !b.complete {
			a.remove(b)
		}
		return &reply{failed: &Failure{Message: "it broke", Retryable: w.IntN(2) == 0, Refused: w.IntN(4) == 0}}
	}
	switch o.step {
	case StepNetwork, StepConnect:
		return &reply{}
	case StepStart:
		if b == nil {
			b = &box{a: a, task: o.task, complete: true, byLease: a.lapsed}
			a.boxes[o.task] = b
			b.changed()
		}
		return &reply{}
	case StepPreflight:
		if !live {
			return fails("not there")
		}
		delete(a.uploads, k)
		a.captures[k] = &taken{}
	case StepFreeze:
		if !a.freeze(o) {
			return failsForNow("not prepared")
		}
		if !o.alone {
			break
		}
		if !a.capture(o) {
			return failsForNow("not frozen")
		}
		if b.checkpoint == o.checkpoint {
			b.goOn()
		}
	case StepCapture, plantedThaw:
		if !a.capture(o) {
			return failsForNow("not frozen")
		}
		if o.step == plantedThaw {
			b.goOn()
		}
	case StepOpen, StepReopen:
		if b == nil || !b.complete && !b.held {
			return failsForNow("not held")
		}
		b.cut = false
	case StepThaw, StepAbort:
		if b != nil && b.checkpoint == o.checkpoint {
			b.goOn()
		}
		if o.step == StepAbort {
			a.dropCapture(k)
		}
	case StepUpload:
		if a.uploads[k] == nil {
			if taking == nil || !taking.complete {
				return fails("lost when the agent ended")
			}
			a.uploads[k] = taking.piece
		}
		return &reply{part: a.uploads[k]}
	case StepDiscard:
		a.dropCapture(k)
	case StepRestore:
		if b == nil {
			return fails("abandoned")
		}
		if !b.complete && !b.held {
			if b.held = o.hold; !o.hold {
				b.complete, b.cut, b.byLease = true, false, a.lapsed
				b.changed()
			}
		}
	case StepRelease:
		switch {
		case b == nil:
			return failsForNow("not held here")
		case b.held && a.lapsed:
			return failsForNow("the lease ran out")
		case b.held:
			b.held, b.complete = false, true
			b.changed()
		case !b.complete:
			return failsForNow("not held here")
		}
	case "cleanup":
		if o.checkpoint != "" {
			a.dropCapture(k)
		} else if b != nil {
			a.remove(b)
		}
	}
	return &reply{}
}

// freeze stops a task that is prepared for it, unless it was captured already.
func (a *agent) freeze(o order) bool {
	b, taking := a.boxes[o.task], a.captures[key(o.checkpoint, o.task)]
	if b == nil || !b.complete || taking == nil {
		return false
	}
	if !taking.frozen {
		taking.frozen = true
		b.checkpoint = o.checkpoint
		b.changed()
	}
	return true
}

// capture completes what begin has begun.
func (a *agent) capture(o order) bool {
	b, taking := a.boxes[o.task], a.captures[key(o.checkpoint, o.task)]
	if b == nil || !b.complete || taking == nil || !taking.frozen || taking.piece == nil {
		return false
	}
	if !taking.complete {
		a.w.order++
		taking.complete, taking.piece.ended = true, a.w.order
	}
	return true
}

func (a *agent) dropCapture(k string) {
	delete(a.captures, k)
	delete(a.uploads, k)
}

// crash ends the agent's process; its tasks live on.
func (a *agent) crash() {
	if !a.alive {
		return
	}
	w := a.w
	w.note("node %d: the agent crashes", a.node)
	a.alive = false
	a.life++
	if a.session != nil {
		w.endSession(a.session)
	}
	a.replies, a.laneUntil = map[string]*reply{}, map[string]int64{}
	for _, b := range a.ordered() {
		if !b.complete {
			a.remove(b)
		}
	}
	w.after(w.downtime(), func() { a.boot() })
}

// boot starts the agent's process, which takes over what is there: agent.recover.
func (a *agent) boot() {
	if !a.power || a.alive {
		return
	}
	a.w.note("node %d: the agent starts", a.node)
	a.alive = true
	a.life++
	for k, t := range a.captures {
		if !t.complete || !a.onDisk {
			delete(a.captures, k)
		}
	}
	if a.until > 0 && a.w.now >= a.until {
		a.lapsed = true
	}
	for _, b := range a.ordered() {
		b.byLease = b.byLease || a.lapsed
		if b.checkpoint != "" && a.captures[key(b.checkpoint, b.task)] == nil {
			b.goOn()
		}
		b.changed()
	}
	a.connect()
}

// cutPower ends all that is on the node.
func (a *agent) cutPower() {
	w := a.w
	w.note("node %d: the power is cut", a.node)
	a.crash()
	a.power = false
	for _, b := range a.ordered() {
		a.remove(b)
	}
	a.captures, a.uploads, a.until, a.lapsed = map[string]*taken{}, map[string]*piece{}, 0, false
	if told := w.c; told != nil && w.IntN(2) == 0 {
		w.after(w.between(1, 500), func() {
			if w.c == told && !a.power {
				told.lose(a.node)
			}
		})
	}
	w.after(w.between(1000, 30000), func() { a.power = true; a.boot() })
}
