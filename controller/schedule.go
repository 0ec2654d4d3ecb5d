package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"dormouse/api"
	"dormouse/controller/protocol"
	"dormouse/controller/scheduler"
	"dormouse/controller/store"
)

// How jobs get their places: survey makes of the store what the scheduler needs
// to know, it decides about all that wait at once, and schedule writes what was
// decided: operations that start or wake those that have room, and operations
// that preempt those that give way. Operations that have to place their job
// themselves (a recovery, a restart) are in the same queue, and look there with
// choose whether it is their turn. Nothing that was decided is remembered but by
// these operations: the next look at the store decides anew, and finds the room
// of those that are giving way kept for the same job.

// survey is the store as the scheduler sees it.
type survey struct {
	version uint64 // as store.Recent's; 0: it is no version's
	nodes   []scheduler.Node
	running []scheduler.Running // in the order of ids
	queue   []scheduler.Waiting
	places  []string              // of those that are running, one after the other
	jobs    map[string]*jobRecord // those in the queue; shared, to be read only
	// pressed says of nodes what they are short of, round is how long that holds.
	pressed map[string]string
	round   time.Duration
	patient time.Duration // Relief.Patient
	// next is when a job is no longer held back or stubborn; zero: none is.
	next time.Time
	// making are the further nodes that are being made, coming those of them that
	// each job will be put on.
	making map[string]bool
	coming map[string][]string
}

// survey looks at all nodes and jobs.
func (c *Controller) survey(tx store.Tx) (*survey, error) {
	nodes, err := c.nodes.all(tx)
	if err != nil {
		return nil, err
	}
	jobs, err := c.jobs.all(tx)
	if err != nil {
		return nil, err
	}
	s := &survey{
		nodes: make([]scheduler.Node, len(nodes)), running: make([]scheduler.Running, 0, len(jobs)), places: make([]string, 0, len(jobs)),
		jobs: make(map[string]*jobRecord), making: make(map[string]bool), round: c.parts.Round, patient: c.parts.Relief.Patient,
	}
	if recent, ok := tx.(store.Recent); ok {
		s.version = recent.Version()
	}
	for i, n := range nodes {
		s.nodes[i] = n.scheduler
		if n.Further && n.State == api.NodeJoining {
			s.making[n.ID] = true
		}
	}
	now := c.clock.Now()
	s.pressed = c.pressed(jobs, now)
	for _, job := range jobs {
		stance, op, err := c.stance(tx, job)
		if err != nil {
			return nil, err
		}
		if err := s.enlist(job, stance, op, now); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// seenNode is a node, and what the scheduler sees of it.
type seenNode struct {
	nodeRecord
	scheduler scheduler.Node
}

// UnmarshalJSON decodes a nodeRecord.
func (n *seenNode) UnmarshalJSON(text []byte) error {
	if err := json.Unmarshal(text, &n.nodeRecord); err != nil {
		return err
	}
	n.scheduler = n.seen()
	return nil
}

// seen is the node as the scheduler sees it, with nothing in use.
func (n *nodeRecord) seen() scheduler.Node {
	labels := maps.Clone(n.Labels)
	if labels == nil {
		labels = make(map[string]string, 2)
	}
	labels[labelNode], labels[labelCloud] = n.ID, n.Cloud
	state := n.State
	if state == api.NodeReady && n.Trouble != nil {
		state = nodeTroubled
	}
	return scheduler.Node{
		ID: n.ID, Cloud: n.Cloud, State: state, CPUs: n.CPUs, MemBytes: n.MemBytes, CRIUVersion: n.CRIUVersion, Labels: labels,
	}
}

// stance is what a job has to do with places.
type stance int

const (
	outside stance = iota // nothing
	queues                // it waits for one by itself
	asks                  // its operation waits for one
	arrives               // it is put where another gives way
	resides               // it has one
)

// stance tells what a job has to do with places, and which operation is under way
// with it, shared; nil when none is, or when it is being started.
func (c *Controller) stance(tx store.Tx, job *jobRecord) (stance, *opRecord, error) {
	var op *opRecord
	if job.Operation != "" && job.Phase != api.PhaseStarting {
		var err error
		if op, err = c.operations.get(tx, job.Operation); err != nil {
			return outside, nil, err
		}
	}
	switch {
	case job.waits():
		return queues, op, nil
	case op != nil && op.Step == protocol.StepPlace && op.Run == 0 && (op.Kind != api.OpSwap || len(op.Avoid) > 0):
		return asks, op, nil
	case op != nil && op.Kind == api.OpSwap && op.Run == 0:
		return arrives, op, nil
	case op != nil && op.Step == protocol.StepDelay: // its tasks are gone, and it does not wait yet
		return outside, op, nil
	case job.Phase.Placed():
		return resides, op, nil
	}
	return outside, op, nil
}

// enlist puts a job where it belongs: into the queue, among those that have a
// place, or nowhere.
func (s *survey) enlist(job *jobRecord, what stance, op *opRecord, now time.Time) error {
	switch what {
	case queues:
		s.jobs[job.ID] = job
		s.queue = append(s.queue, s.waiting(job, now))
	case asks:
		ask, err := op.request()
		if err != nil {
			return err
		}
		s.jobs[job.ID] = job
		w := s.waiting(job, now)
		w.Since, w.Hold, w.Patient, w.Spares = op.Started, "", false, !op.waits(job)
		w.Request.Avoid = op.Avoid
		if ask.Cloud != "" {
			w.Request.Cloud = ask.Cloud
		}
		if op.Anew {
			w.Request.Unfit = nil
		}
		s.queue = append(s.queue, w)
	case arrives:
		ask, err := op.request()
		if err != nil {
			return err
		}
		s.running = append(s.running, runningOn(job, ask.Nodes, "it is being put there"))
	case resides:
		s.running = append(s.running, s.placed(job, op, now))
	}
	return nil
}

// waits reports whether the job is in the queue by itself, without an operation.
func (j *jobRecord) waits() bool {
	return j.Operation == "" && (j.fresh() || j.Phase == api.PhaseSuspended && j.Yield != nil)
}

// fresh reports whether the job waits to be started.
func (j *jobRecord) fresh() bool {
	return j.Phase == api.PhasePending || j.Phase == api.PhaseProvisioning
}

// waits reports whether an operation that places its job waits for room rather
// than failing: nothing else could be done with the job.
func (o *opRecord) waits(job *jobRecord) bool {
	return o.Kind == api.OpRecover || o.Stopped || job.Yield != nil || o.Kind == api.OpSwap
}

// waiting is a job as one that waits.
func (s *survey) waiting(job *jobRecord, now time.Time) scheduler.Waiting {
	w := scheduler.Waiting{ID: job.ID, Priority: job.Priority, Created: job.Created, Since: job.Created, Request: requestFor(job)}
	if !job.fresh() {
		w.Request.Unfit = s.tooOld(job)
	}
	if y := job.Yield; y != nil {
		w.Since, w.Patient = y.Since, y.Patient
		if y.Starved != "" {
			s.breathe(&w, y, now)
		}
		if y.NotBefore.After(now) {
			w.Hold = y.Why
			s.note(y.NotBefore)
		}
	}
	return w
}

// note remembers when to look again.
func (s *survey) note(at time.Time) {
	if s.next.IsZero() || at.Before(s.next) {
		s.next = at
	}
}

// tooOld says of nodes why they cannot restore the job; nil when all can, as far
// as is known.
func (s *survey) tooOld(job *jobRecord) func(scheduler.Node) string {
	if !slices.ContainsFunc(s.nodes, func(n scheduler.Node) bool { return olderVersion(n.CRIUVersion, job.CRIU) }) {
		return nil
	}
	return func(n scheduler.Node) string {
		if olderVersion(n.CRIUVersion, job.CRIU) {
			return fmt.Sprintf("node %s has CRIU %s and the job's checkpoint needs %s or newer", n.ID, n.CRIUVersion, job.CRIU)
		}
		return ""
	}
}

// placed is a job as one that has a place, and op what is under way with it.
func (s *survey) placed(job *jobRecord, op *opRecord, now time.Time) scheduler.Running {
	first := len(s.places)
	for _, t := range job.TaskStatus {
		s.places = append(s.places, t.Node)
	}
	r := runningOn(job, slices.Clip(s.places[first:]), "")
	switch {
	case job.Phase == api.PhaseSuspending, op != nil && op.Kind == api.OpKill && op.Step != protocol.StepSignal:
		r.Leaving = true
	case job.Phase != api.PhaseRunning:
		r.Stays = fmt.Sprintf("it is %s", job.Phase)
	case op != nil:
		r.Stays = fmt.Sprintf("operation %s (%s) is under way", op.ID, op.Kind)
	case job.Stubborn != nil && job.Stubborn.Until.After(now):
		r.Stays = fmt.Sprintf("%s; it is asked again at %s", job.Stubborn.Why, job.Stubborn.Until.UTC().Format(time.TimeOnly))
		s.note(job.Stubborn.Until)
	}
	return r
}

func runningOn(job *jobRecord, on []string, stays string) scheduler.Running {
	bytes, _ := job.bytes()
	r := scheduler.Running{
		ID: job.ID, Priority: job.Priority, On: on, CPUs: job.Spec.CPUs, MemBytes: job.Spec.MemBytes, Stays: stays, Bytes: bytes,
	}
	for _, p := range job.Spec.Publish {
		if r.Ports == nil {
			r.Ports = make(map[string][]string)
		}
		node := on[p.Task]
		r.Ports[node] = append(r.Ports[node], portText(p))
	}
	return r
}

func portText(p api.Publish) string { return fmt.Sprintf("%d/%s", p.Port, p.Protocol) }

// bytes is what a checkpoint of the job would have to store, and how that is
// known.
func (j *jobRecord) bytes() (int64, string) {
	if j.Size > 0 {
		return j.Size, "the newest checkpoint"
	}
	return j.Spec.MemBytes * int64(j.Tasks), "the memory reserved"
}

// requestFor is what a job needs.
func requestFor(job *jobRecord) scheduler.Request {
	r := scheduler.Request{
		Tasks: job.Tasks, CPUs: job.Spec.CPUs, MemBytes: job.Spec.MemBytes, Cloud: job.Spec.Cloud, Labels: job.Spec.Constraints,
		Pack: job.Spec.Placement == api.PlacementPack,
	}
	for _, p := range job.Spec.Publish {
		r.Ports = append(r.Ports, portText(p))
	}
	return r
}

// decide is what becomes of all that wait.
func (s *survey) decide() []scheduler.Decision {
	return scheduler.Schedule(s.nodes, s.running, s.queue)
}

// resolve decides, and finds out for whom nodes are being made.
func (s *survey) resolve() []scheduler.Decision {
	decisions := s.decide()
	s.coming = s.expected(decisions)
	return decisions
}

// expected are the nodes that are being made on which jobs without a place would
// get one.
func (s *survey) expected(decisions []scheduler.Decision) map[string][]string {
	if len(s.making) == 0 || s.unplaced(decisions) == 0 {
		return nil
	}
	imagined := *s
	imagined.nodes = slices.Clone(s.nodes)
	for i, n := range imagined.nodes {
		if s.making[n.ID] {
			imagined.nodes[i] = imaginedNode(n.ID, n)
		}
	}
	coming := make(map[string][]string)
	for _, d := range imagined.decide() {
		for _, node := range d.Placement {
			if s.making[node] && !slices.Contains(coming[d.ID], node) {
				coming[d.ID] = append(coming[d.ID], node)
			}
		}
	}
	for _, d := range decisions {
		if d.Placement != nil || len(d.Evict) > 0 {
			delete(coming, d.ID)
		}
	}
	return coming
}

// placeJobs schedules whenever the store has changed.
func (c *Controller) placeJobs(ctx context.Context) {
	for {
		revision := c.store.Revision()
		begun := c.clock.Now()
		next, err := c.schedule(ctx)
		if err != nil && ctx.Err() == nil {
			c.log.Error("jobs cannot be placed", "error", err)
		}
		if c.restAfter(ctx, c.clock.Now().Sub(begun)) != nil {
			return
		}
		if !c.awaitDue(ctx, revision, next) {
			return
		}
	}
}

// schedule places the jobs that wait for it, and makes others give way.
//
// It looks and decides without the writers' lock, and carries out under it what
// was decided: as it is if everything still has room where it is to go, else as is
// decided then.
//
// It returns when to look again although nothing has changed; zero: never.
func (c *Controller) schedule(ctx context.Context) (next time.Time, err error) {
	var seen *survey
	var decisions []scheduler.Decision
	err = c.store.View(ctx, func(tx store.Tx) error {
		if seen, err = c.survey(tx); err == nil && len(seen.queue) > 0 {
			decisions, next = seen.resolve(), seen.next
		}
		return err
	})
	if err != nil {
		return next, err
	}
	c.turns.announce(decisions)
	if err := c.grow(ctx, seen, decisions); err != nil {
		return next, err
	}
	if !slices.ContainsFunc(decisions, seen.changes) {
		return next, nil
	}
	return next, c.store.Update(ctx, func(tx store.Tx) error {
		now, decided := seen, decisions
		fits, err := c.stillFits(tx, seen, decisions)
		if err != nil {
			return err
		}
		if !fits {
			if now, err = c.survey(tx); err != nil {
				return err
			}
			decided = now.resolve()
		}
		for _, d := range decided {
			if now.changes(d) {
				if err := c.carryOut(tx, now, d); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// stillFits reports whether what was decided from a survey can be carried out as
// it is: since then nobody has got a place, and no node has changed. Jobs that
// have come meanwhile are for the next look, and those that wait no longer are
// left alone by carryOut.
func (c *Controller) stillFits(tx store.Tx, s *survey, decisions []scheduler.Decision) (bool, error) {
	recent, ok := tx.(store.Recent)
	if !ok || s.version == 0 || slices.ContainsFunc(decisions, func(d scheduler.Decision) bool { return len(d.Evict) > 0 }) {
		return false, nil
	}
	if nodes, known := recent.Changed(store.Nodes, s.version); !known || len(nodes) > 0 {
		return false, nil
	}
	jobs, known := recent.Changed(store.Jobs, s.version)
	for _, id := range jobs {
		job, err := c.jobs.get(tx, id)
		if errors.Is(err, store.ErrNotFound) {
			continue
		}
		if err != nil {
			return false, err
		}
		what, _, err := c.stance(tx, job)
		if err != nil || what == arrives || what == resides && !s.resides(job) {
			return false, err
		}
	}
	return known, nil
}

// resides reports whether the survey saw the job where it is.
func (s *survey) resides(job *jobRecord) bool {
	at, found := slices.BinarySearchFunc(s.running, job.ID, func(r scheduler.Running, id string) int { return strings.Compare(r.ID, id) })
	return found && slices.EqualFunc(s.running[at].On, job.TaskStatus, func(node string, t api.TaskStatus) bool { return node == t.Node })
}

// changes reports whether a decision changes anything in the store.
func (s *survey) changes(d scheduler.Decision) bool {
	job := s.jobs[d.ID]
	if len(d.Evict) > 0 || !job.waits() {
		return len(d.Evict) > 0
	}
	phase, reason := s.waitsFor(job, d)
	return d.Placement != nil || job.Phase != phase || job.Reason != reason || job.Yield != nil && !job.Yield.Waits
}

// waitsFor is a waiting job's phase and reason. One that only waits as another does
// is told so once: who it is changes too often.
func (s *survey) waitsFor(j *jobRecord, d scheduler.Decision) (phase api.Phase, reason string) {
	phase, reason = j.Phase, "waits for room: "+d.Reason
	coming := s.coming[d.ID]
	switch {
	case len(coming) > 0 && j.fresh():
		phase = api.PhaseProvisioning
	case j.fresh():
		phase = api.PhasePending
	}
	switch {
	case len(coming) > 0:
		reason = "waits for a place on " + commas(coming) + ": being made"
	case d.Alike && phase == j.Phase && j.Reason != "" && (j.Yield == nil || j.Yield.Waits):
		return phase, j.Reason
	}
	if j.Yield != nil {
		reason = j.Yield.text() + "; " + reason
	}
	return phase, reason
}

// carryOut writes what was decided about a job, and begins what follows.
func (c *Controller) carryOut(tx store.Tx, s *survey, d scheduler.Decision) error {
	job, err := getJob(tx, d.ID)
	if err != nil {
		return err
	}
	for _, victim := range d.Evict {
		leaves, err := getJob(tx, victim)
		if err != nil {
			return err
		}
		if _, err := c.giveWay(tx, leaves, yield{To: job.ID}, api.TriggerPreempt); err != nil {
			return err
		}
	}
	switch {
	case !job.waits():
		return nil // its operation looks itself
	case d.Placement == nil:
		job.Phase, job.Reason = s.waitsFor(job, d)
		if job.Yield != nil {
			job.Yield.Waits = true
		}
		return putJob(tx, job)
	}
	return c.settleWaiting(tx, s, job, d.Placement)
}

// settleWaiting begins to start, or to wake, a job on its nodes.
func (c *Controller) settleWaiting(tx store.Tx, s *survey, job *jobRecord, placement []string) error {
	kind, phase := api.OpStart, api.PhaseStarting
	if job.Phase == api.PhaseSuspended {
		kind, phase = api.OpResume, api.PhaseRestoring
	}
	if err := numberNetwork(tx, job); err != nil {
		return err
	}
	c.placed.add(job.ID, placement)
	job.settleOn(placement, s.nodes, phase)
	op, err := c.beginOperation(tx, kind, job, request{})
	if err != nil {
		return err
	}
	op.Run = job.Run
	if err := putOperation(tx, op); err != nil {
		return err
	}
	return c.emit(tx, api.Event{Job: job.ID, Type: "placed", Message: "placed on " + placementText(placement), Node: placement[0]})
}

// choose looks whether it is the turn of an operation that places its job, and
// where that goes. Unfit, when it is given, knows more about nodes than the store.
func (c *Controller) choose(tx store.Tx, job *jobRecord, op *opRecord, unfit func(scheduler.Node) string) ([]string, []scheduler.Node, error) {
	s, err := c.survey(tx)
	if err != nil {
		return nil, nil, err
	}
	if err := s.enter(job, op, unfit); err != nil {
		return nil, nil, err
	}
	for _, d := range s.decide() {
		if d.ID != job.ID {
			continue
		}
		if d.Placement == nil {
			return nil, nil, &scheduler.NoRoomError{Reason: d.Reason, Never: d.Never}
		}
		return d.Placement, s.nodes, nil
	}
	return nil, nil, &scheduler.NoRoomError{Reason: "many jobs are ahead"} // and are decided about first
}

// enter puts the job of an operation into the queue, in place of all else that
// the survey knows of it.
func (s *survey) enter(job *jobRecord, op *opRecord, unfit func(scheduler.Node) string) error {
	ask, err := op.request()
	if err != nil {
		return err
	}
	s.running = slices.DeleteFunc(s.running, func(r scheduler.Running) bool { return r.ID == job.ID })
	s.queue = slices.DeleteFunc(s.queue, func(w scheduler.Waiting) bool { return w.ID == job.ID })
	w := scheduler.Waiting{
		ID: job.ID, Priority: job.Priority, Created: job.Created, Since: op.Started, Spares: !op.waits(job), Request: requestFor(job),
	}
	w.Request.Unfit, w.Request.Avoid = unfit, op.Avoid
	if ask.Cloud != "" {
		w.Request.Cloud = ask.Cloud
	}
	s.queue = append(s.queue, w)
	return nil
}

// usage is what is reserved of one node.
type usage struct {
	cpus  float64
	mem   int64
	tasks int
}

// usage is what is reserved of some nodes, as `dormouse nodes` shows it.
func (c *Controller) usage(tx store.Tx, nodes []*seenNode) (map[string]usage, error) {
	used := make(map[string]usage, len(nodes))
	for _, n := range nodes {
		used[n.ID] = usage{}
	}
	take := func(job *jobRecord, node string) {
		if u, asked := used[node]; asked {
			used[node] = usage{u.cpus + job.Spec.CPUs, u.mem + job.Spec.MemBytes, u.tasks + 1}
		}
	}
	jobs, err := c.jobs.all(tx)
	if err != nil {
		return nil, err
	}
	for _, job := range jobs {
		what, op, err := c.stance(tx, job)
		if err != nil {
			return nil, err
		}
		switch what {
		case arrives:
			ask, err := op.request()
			if err != nil {
				return nil, err
			}
			for _, node := range ask.Nodes {
				take(job, node)
			}
		case resides:
			for _, t := range job.TaskStatus {
				take(job, t.Node)
			}
		}
	}
	return used, nil
}
