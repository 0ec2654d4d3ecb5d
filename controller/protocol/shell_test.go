package protocol

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"dormouse/api"
)

// disk is what the controller has written: all that outlives it.
type disk struct {
	phase      api.Phase
	run        int
	nodes      []int  // of the run's tasks
	lost       []bool // tasks that went with their nodes
	op         *operation
	durable    []string
	cleanups   map[string]cleanup
	orders     int // to clean up, ever
	lostNodes  map[int]bool
	hellos     map[int]int // of each node
	operations int
}

// operation is one as it is written; all but State is its steps'.
type operation struct {
	id         string
	kind       api.OperationKind
	state      []byte // a State, as JSON
	checkpoint string
	anew       bool
	stopped    bool
	run        int // that it has begun
	parts      []*piece
}

// cleanup is a task, or with checkpoint what was captured of it, that a node
// must remove.
type cleanup struct {
	node       int
	task       ref
	checkpoint string
	number     int // tells it from earlier ones for the same task
}

func (c cleanup) key() string {
	return fmt.Sprintf("cleanup/%d/%v/%s", c.node, c.task, c.checkpoint)
}

func (c cleanup) id() string { return fmt.Sprintf("cleanup/%d", c.number) }

// controller is one process of it: a shell around the protocol as
// controller/operations.go is one.
type controller struct {
	w        *world
	sessions map[int]*session
	lastSeen []int64
	core     *Operation
	round    map[string]*call // commands without an answer
	over     func(*Failure)   // what the step does after its round
}

type call struct {
	node    int
	order   order
	part    func(*piece)
	cleanup cleanup
}

func nodeName(n int) string { return fmt.Sprintf("n%d", n) }

// startController begins from what is written.
func (w *world) startController() {
	w.note("the controller starts")
	c := &controller{w: w, sessions: map[int]*session{}, lastSeen: make([]int64, len(w.agents)), round: map[string]*call{}}
	for n := range c.lastSeen {
		c.lastSeen[n] = w.now
	}
	w.c = c
	c.tick()
	c.drive()
	c.startCleanups()
}

func (w *world) crashController() {
	if w.c == nil {
		return
	}
	w.note("the controller crashes")
	for _, a := range w.agents {
		if a.session != nil {
			w.endSession(a.session)
		}
	}
	w.c = nil
	w.after(w.downtime(), func() {
		if w.c == nil {
			w.startController()
		}
	})
}

// later does something unless the controller has crashed meanwhile.
func (c *controller) later(ms int64, do func()) {
	c.w.after(ms, func() {
		if c.w.c == c {
			do()
		}
	})
}

// tick exchanges heartbeats and looks at the leases.
func (c *controller) tick() {
	w := c.w
	for n, a := range w.agents {
		if s := c.sessions[n]; s != nil && s.open && !a.cutOff && a.alive && !w.disk.lostNodes[n] && !w.fault(8) {
			c.lastSeen[n] = w.now
			if !w.fault(8) { // the acknowledgement is lost
				a.renew(w.now - w.between(0, 300))
			}
		}
		if !w.disk.lostNodes[n] && w.now-c.lastSeen[n] > lease+margin {
			c.lose(n)
		}
	}
	c.later(heartbeat, c.tick)
}

// lose declares that nothing runs on a node any more.
func (c *controller) lose(n int) {
	d := &c.w.disk
	if d.lostNodes[n] {
		return
	}
	c.w.note("node %d is lost", n)
	d.lostNodes[n] = true
	if s := c.sessions[n]; s != nil {
		c.w.endSession(s)
	}
	c.loseTasks(n, nil)
	var calls []string
	for id, call := range c.round {
		if call.node == n {
			calls = append(calls, id)
		}
	}
	for _, id := range calls {
		delete(c.round, id)
	}
	if c.core != nil {
		c.follow(c.core.Lost(nodeName(n)))
	}
}

func (c *controller) loseTasks(n int, held []ref) {
	d := &c.w.disk
	if !d.phase.Placed() {
		return
	}
	for i, node := range d.nodes {
		if node == n && !slices.Contains(held, ref{i, d.run}) {
			d.lost[i] = true
		}
	}
	c.settle()
}

// settle recovers a running job that lost a task, unless an operation does
// something with it.
func (c *controller) settle() {
	d := &c.w.disk
	if d.phase == api.PhaseRunning && d.op == nil && slices.Contains(d.lost, true) {
		d.phase = api.PhaseRecovering
		c.begin(api.OpRecover)
	}
}

// welcome decides what becomes of the tasks that an agent holds.
func (c *controller) welcome(a *agent, s *session, holds []ref) (keep, destroy []ref) {
	d := &c.w.disk
	c.w.note("node %d says hello with %v", a.node, holds)
	if old := c.sessions[a.node]; old != nil {
		c.w.endSession(old)
	}
	c.sessions[a.node], c.lastSeen[a.node] = s, c.w.now
	delete(d.lostNodes, a.node)
	d.hellos[a.node]++
	for _, t := range holds {
		_, ordered := d.cleanups[cleanup{node: a.node, task: t}.key()]
		switch {
		case ordered:
			destroy = append(destroy, t)
		case t.run == d.run && d.phase.Placed() && d.nodes[t.index] == a.node && !d.lost[t.index]:
			keep = append(keep, t)
		default:
			c.order(cleanup{node: a.node, task: t})
			destroy = append(destroy, t)
		}
	}
	if d.phase == api.PhaseRunning || d.phase == api.PhaseSuspending {
		c.loseTasks(a.node, holds)
	}
	return keep, destroy
}

// connected sends what has no answer yet on a new session.
func (c *controller) connected(node int) {
	var ids []string
	for id, call := range c.round {
		if call.node == node {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	for _, id := range ids {
		c.send(c.round[id])
	}
	c.startCleanups()
}

func (c *controller) send(call *call) {
	if s := c.sessions[call.node]; s != nil && s.open {
		a := s.a
		c.w.deliver(s, func() { a.accept(call.order) })
	}
}

func (c *controller) answered(node int, id string, r *reply) {
	call := c.round[id]
	if call == nil || call.node != node {
		return
	}
	delete(c.round, id)
	if call.order.step == "cleanup" {
		if key := call.cleanup.key(); c.w.disk.cleanups[key] == call.cleanup {
			delete(c.w.disk.cleanups, key)
		}
		return
	}
	if r.failed == nil && call.part != nil {
		call.part(r.part)
	}
	if c.core != nil {
		c.follow(c.core.Answered(id, r.failed))
	}
}

func (c *controller) order(o cleanup) {
	if d := &c.w.disk; d.cleanups[o.key()] == (cleanup{}) {
		d.orders++
		o.number = d.orders
		d.cleanups[o.key()] = o
	}
	c.startCleanups()
}

// startCleanups sends the orders to nodes that are not lost.
func (c *controller) startCleanups() {
	d := &c.w.disk
	var keys []string
	for k, o := range d.cleanups {
		if c.round[o.id()] == nil && !d.lostNodes[o.node] && c.sessions[o.node] != nil {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	for _, k := range keys {
		o := d.cleanups[k]
		c.round[o.id()] = &call{node: o.node, cleanup: o, order: order{id: o.id(), step: "cleanup", task: o.task, checkpoint: o.checkpoint}}
		c.send(c.round[o.id()])
	}
}

// gone waits until each task was confirmed destroyed, or its node is lost.
func (c *controller) gone(refs []cleanup, then func()) {
	d := &c.w.disk
	for _, o := range refs {
		if _, waits := d.cleanups[o.key()]; waits && !d.lostNodes[o.node] {
			c.later(50, func() { c.gone(refs, then) })
			return
		}
	}
	then()
}

// begin writes a new operation.
func (c *controller) begin(kind api.OperationKind) {
	d := &c.w.disk
	d.operations++
	d.op = &operation{id: fmt.Sprintf("o%d", d.operations), kind: kind}
	if kind == api.OpCheckpoint || kind == api.OpSuspend {
		d.op.checkpoint = fmt.Sprintf("c%d", d.operations)
	}
	if kind == api.OpStart {
		d.op.run = d.run
	}
	d.op.state = written(FlowOf(kind, c.w.tasks, 0).Begin())
	c.w.note("operation %s: %s", d.op.id, kind)
	c.later(1, c.drive)
}

func written(s State) []byte {
	raw, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return raw
}

// drive takes up the operation that is written.
func (c *controller) drive() {
	op := c.w.disk.op
	if op == nil || c.core != nil {
		return
	}
	var state State
	if err := json.Unmarshal(op.state, &state); err != nil {
		panic(err)
	}
	c.core = New(op.id, FlowOf(op.kind, c.w.tasks, 0), state)
	c.follow(c.core.Begin())
}

// follow does what the protocol says.
func (c *controller) follow(out Output) {
	switch {
	case out.Take != "":
		c.w.note("step %s", c.w.disk.op.state)
		c.take(out.Take)
	case out.Over:
		over := c.over
		c.over = nil
		c.forsaken(out.Missed)
		over(out.Failed)
	case out.Wait > 0:
		c.later(out.Wait.Milliseconds(), func() { c.follow(c.core.Waited()) })
	case out.End != "":
		c.core = nil
		c.conclude(out.End)
	}
}

// forsaken remembers what a lost node must forget when it comes back.
func (c *controller) forsaken(tasks []Task) {
	op := c.w.disk.op
	if op.checkpoint == "" || c.core.state.Step == StepReopen {
		return
	}
	for _, t := range tasks {
		c.order(cleanup{node: c.w.disk.nodes[t.Index], task: ref{t.Index, c.w.disk.run}, checkpoint: op.checkpoint})
	}
}

// ended writes what the step changed and what follows, at once.
func (c *controller) ended(failed *Failure, change func() bool) {
	out := c.core.Ended(failed)
	if failed != nil {
		change = nil
	}
	c.later(c.w.between(0, 5), func() {
		if c.w.fault(50) {
			c.follow(c.core.NotWritten())
			return
		}
		if change != nil && !change() {
			c.follow(c.core.Begin()) // what the step saw is not true any more
			return
		}
		c.w.disk.op.state = written(out.Write.To)
		c.follow(c.core.Written())
	})
}

// commands sends one command per task and goes on when all are through.
func (c *controller) commands(step string, part func(int, *piece), then func() bool) {
	d := &c.w.disk
	c.over = func(failed *Failure) { c.ended(failed, then) }
	tasks := make([]Task, len(d.nodes))
	for i, n := range d.nodes {
		tasks[i] = Task{Index: i, Node: nodeName(n)}
	}
	for _, command := range c.core.Command(tasks).Send {
		i := command.Task.Index
		o := order{id: command.ID, step: step, task: ref{i, d.run}, checkpoint: d.op.checkpoint, hold: c.w.tasks > 1,
			alone: c.w.tasks == 1 && d.op.kind == api.OpCheckpoint}
		sent := &call{node: d.nodes[i], order: o}
		if part != nil {
			sent.part = func(p *piece) { part(i, p) }
		}
		c.round[o.id] = sent
	}
	for i, n := range d.nodes {
		if d.lostNodes[n] || d.lost[i] {
			id := c.core.commandID(tasks[i])
			delete(c.round, id)
			if out := c.core.Answered(id, &Failure{Message: "it went with its node", Lost: true}); out.Over {
				c.follow(out)
				return
			}
		} else if sent := c.round[c.core.commandID(tasks[i])]; sent != nil {
			c.send(sent)
		}
	}
}

// take does one step, as the controller's methods of that name do.
func (c *controller) take(step string) {
	w, d := c.w, &c.w.disk
	op := d.op
	switch step {
	case StepStart:
		c.make(step)
	case StepNetwork, StepConnect, StepPreflight, StepFreeze, StepThaw, StepDiscard, StepReopen, StepCapture:
		if w.planted == "thaw early" && step == StepCapture {
			c.commands("capture and thaw", nil, nil)
			return
		}
		c.commands(step, nil, nil)
	case StepOpen, StepRelease:
		if op.anew || w.planted == "no open" && step == StepOpen {
			c.ended(nil, nil)
			return
		}
		if step == StepRelease {
			c.make(step)
			return
		}
		c.commands(step, nil, nil)
	case StepRestore:
		if op.anew {
			step = StepStart
		}
		c.make(step)
	case StepAbort:
		c.commands(StepAbort, nil, func() bool { op.parts = nil; return true })
	case StepUpload:
		parts := make([]*piece, w.tasks)
		c.commands(step, func(i int, p *piece) { parts[i] = p }, func() bool { op.parts = parts; return true })
	case StepPublish:
		c.later(w.between(1, 200), func() {
			if w.repo[op.checkpoint] == nil {
				if w.fault(10) {
					c.ended(&Failure{Message: "the repository is not there"}, nil)
					return
				}
				w.publish(op.checkpoint, op.parts)
			}
			c.later(w.between(0, 50), func() {
				c.ended(nil, func() bool { d.durable = append(d.durable, op.checkpoint); return true })
			})
		})
	case StepRetention:
		c.ended(nil, nil)
	case StepLook:
		c.ended(nil, func() bool {
			op.checkpoint, op.anew = "", true
			if n := len(d.durable); n > 0 {
				op.checkpoint, op.anew = d.durable[n-1], false
			}
			return true
		})
	case StepStop:
		op.stopped, d.phase = true, api.PhaseRestoring
		refs := c.orderAll()
		c.gone(refs, func() { c.ended(nil, nil) })
	case StepDestroy:
		refs := c.orderAll()
		c.gone(refs, func() { c.commands(StepDiscard, nil, nil) })
	case StepUnplace:
		if op.run == 0 {
			c.ended(nil, nil)
			return
		}
		refs := c.orderAll()
		c.gone(refs, func() { c.ended(nil, func() bool { op.run, d.nodes = 0, nil; return true }) })
	case StepDelay:
		c.later(w.between(0, 2000), func() { c.ended(nil, nil) })
	case StepPlace:
		c.place()
	default:
		panic(step)
	}
}

// make is a step after which the tasks are there: on agents that have not
// forgotten them since they said so.
func (c *controller) make(step string) {
	d := &c.w.disk
	before := maps.Clone(d.hellos)
	c.commands(step, nil, func() bool {
		for _, n := range d.nodes {
			if d.hellos[n] != before[n] && c.w.planted != "no look back" {
				return false
			}
		}
		return true
	})
}

func (c *controller) orderAll() (refs []cleanup) {
	d := &c.w.disk
	for i, n := range d.nodes {
		o := cleanup{node: n, task: ref{i, d.run}}
		refs = append(refs, o)
		c.order(o)
	}
	return refs
}

// place waits for a node that has a session, and begins a run.
func (c *controller) place() {
	nodes := c.choose()
	if nodes == nil {
		c.later(500, c.place)
		return
	}
	c.ended(nil, func() bool {
		d := &c.w.disk
		c.settleOn(nodes)
		d.phase, d.op.run = api.PhaseRestoring, d.run
		return true
	})
}

func (c *controller) choose() []int {
	w := c.w
	var ready []int
	for n := range w.agents {
		if c.sessions[n] != nil && !w.disk.lostNodes[n] {
			ready = append(ready, n)
		}
	}
	if len(ready) == 0 {
		return nil
	}
	nodes := make([]int, w.tasks)
	for i := range nodes {
		nodes[i] = ready[w.IntN(len(ready))]
	}
	return nodes
}

func (c *controller) settleOn(nodes []int) {
	d := &c.w.disk
	d.run++
	d.nodes, d.lost = nodes, make([]bool, len(nodes))
}

// conclude gives the job the phase in which the operation leaves it.
func (c *controller) conclude(phase api.OperationPhase) {
	d := &c.w.disk
	op, done := d.op, phase == api.OpDone
	d.op = nil
	how := fmt.Sprintf("%s %s", op.kind, phase)
	if op.anew {
		how = "anew: " + how
	}
	c.w.settled[how]++
	c.w.note("operation %s %s", op.id, phase)
	switch op.kind {
	case api.OpStart:
		d.phase = api.PhaseRunning
		if !done {
			d.phase = api.PhasePending
		}
	case api.OpSuspend:
		d.phase = api.PhaseRunning
		if done {
			d.phase, d.nodes = api.PhaseSuspended, nil
		}
	case api.OpResume, api.OpRestart, api.OpRecover:
		switch {
		case done:
			d.phase = api.PhaseRunning
		case op.kind == api.OpResume:
			d.phase = api.PhaseSuspended
		case op.kind == api.OpRestart && !op.stopped:
		default:
			d.phase = api.PhaseFailed
		}
	}
	if d.phase == api.PhaseRunning {
		c.w.checkConnected()
	}
	c.settle()
}

// want asks for a random operation that fits.
func (c *controller) want() {
	w, d := c.w, &c.w.disk
	if d.op != nil {
		return
	}
	switch d.phase {
	case api.PhasePending:
		if nodes := c.choose(); nodes != nil {
			c.settleOn(nodes)
			d.phase = api.PhaseStarting
			c.begin(api.OpStart)
		}
	case api.PhaseRunning:
		kinds := []api.OperationKind{api.OpCheckpoint, api.OpCheckpoint, api.OpCheckpoint, api.OpSuspend, api.OpRestart}
		c.begin(kinds[w.IntN(len(kinds))])
		if d.op.kind == api.OpSuspend {
			d.phase = api.PhaseSuspending
		}
	case api.PhaseSuspended:
		c.begin(api.OpResume)
	case api.PhaseFailed:
		d.phase = api.PhaseRecovering
		c.begin(api.OpRestart)
	}
}
