package controller

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"dormouse/api/agentpb"
	"dormouse/controller/store"
	failures "dormouse/monitor/failure"
)

// fleet holds the streams to the agents, and the commands that wait for an
// answer. A command outlives a stream: it is sent again on the next one, until
// it is answered, its caller gives up, or the node is lost.
type fleet struct {
	leads  func() bool // nothing is sent after it became false
	bounds failures.Bounds
	mu     sync.Mutex
	links  map[string]*link
}

// link is what the controller knows of the way to one node.
type link struct {
	node     string
	session  *session // nil while there is none
	lost     bool
	lastSeen time.Time
	excused  time.Duration        // of the silence since, in which nobody listened
	beats    *failures.Accrual    // judges its silence; nil before it was first heard of
	changed  chan struct{}        // closed when session or lost change
	calls    map[string]*callSite // by the command's id
}

// callSite is a command that waits for its answer.
type callSite struct {
	reply    chan *agentpb.Reply // of size 1
	progress func(float64, string)
}

// session is one Connect stream.
type session struct {
	node  string
	cloud string
	out   chan *agentpb.ToAgent
	done  chan struct{} // closed when the stream ends
	end   context.CancelCauseFunc
}

func newFleet(leads func() bool, bounds failures.Bounds) *fleet {
	return &fleet{leads: leads, bounds: bounds, links: make(map[string]*link)}
}

// link returns the node's link; the caller holds the lock.
func (f *fleet) link(node string) *link {
	l, ok := f.links[node]
	if !ok {
		l = &link{node: node, changed: make(chan struct{}), calls: make(map[string]*callSite)}
		f.links[node] = l
	}
	return l
}

// hear notes that the node was heard of; the caller holds the lock.
func (f *fleet) hear(l *link, now time.Time) {
	l.lastSeen, l.excused = now, 0
	if l.beats == nil {
		l.beats = failures.NewAccrual(f.bounds, now)
		return
	}
	l.beats.Heartbeat(now)
}

// suspect reports whether the node's silence is longer than what its heartbeats
// have been like lets expect, and says why. It decides about no lease.
func (f *fleet) suspect(node string, now time.Time) (why string, suspect bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.link(node)
	beats, now := l.beats, now.Add(-l.excused)
	if beats == nil || !beats.Suspect(now) {
		return "", false
	}
	mean, deviation := beats.Usual()
	return fmt.Sprintf("its agent has been silent for %s, and is usually heard of every %s ± %s (phi %.0f)",
		now.Sub(beats.Last()).Round(time.Millisecond), mean.Round(time.Millisecond), deviation.Round(time.Millisecond), beats.Phi(now)), true
}

func (l *link) change() {
	close(l.changed)
	l.changed = make(chan struct{})
}

var errNewerStream = errors.New("the node's agent opened a newer stream")

// attach makes s the node's stream, and ends the one before it.
func (f *fleet) attach(s *session, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.link(s.node)
	if l.session != nil {
		l.session.end(errNewerStream)
	}
	if l.lost {
		s.end(&nodeLostError{s.node}) // between its welcome and now
		return
	}
	l.session, l.lastSeen, l.excused = s, now, 0 // its Hello was heard when it was revived
	l.change()
}

// detach forgets s unless a newer stream took its place.
func (f *fleet) detach(s *session) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.link(s.node)
	if l.session == s {
		l.session = nil
		l.change()
	}
}

// revive ends the loss of a node, before it is decided what becomes of its
// tasks: a loss that was under way meanwhile sees it and is called off.
func (f *fleet) revive(node string, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.link(node)
	l.lost = false
	f.hear(l, now)
	l.change()
}

// renew renews the lease of the node of s, and reports whether it may be
// acknowledged: never once the node was taken for lost, and not by a controller
// that another has replaced, which counts from its own start.
func (f *fleet) renew(s *session, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.link(s.node)
	if l.lost || l.session != s || !f.leads() {
		return false
	}
	f.hear(l, now)
	return true
}

// silence is how long the node was not heard of while somebody listened.
func (l *link) silence(now time.Time) time.Duration {
	return now.Sub(l.lastSeen) - l.excused
}

// silence is how long the node was not heard of while somebody listened.
func (f *fleet) silence(node string, now time.Time) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.link(node).silence(now)
}

// excuse takes d, in which the controller itself stood still until now, off the
// silence of every node.
func (f *fleet) excuse(d time.Duration, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.links {
		l.excused = min(l.excused+d, max(0, now.Sub(l.lastSeen)))
	}
}

// expire takes a node for lost if it was silent for longer than limit. From
// then on its lease is not renewed.
func (f *fleet) expire(node string, now time.Time, limit time.Duration) bool {
	f.mu.Lock()
	expired := f.link(node).silence(now) > limit
	if expired {
		f.link(node).lost = true
	}
	f.mu.Unlock()
	if expired {
		f.lose(node)
	}
	return expired
}

// lost reports whether the node is taken for lost.
func (f *fleet) lost(node string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.link(node).lost
}

// seen notes that the node was heard of.
func (f *fleet) seen(node string, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hear(f.link(node), now)
}

// lastSeen is when the node was heard of last, and whether it has a stream.
func (f *fleet) lastSeen(node string) (time.Time, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.link(node)
	return l.lastSeen, l.session != nil
}

// lose fails all commands to the node until it comes back.
func (f *fleet) lose(node string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.link(node)
	if l.session != nil {
		l.session.end(&nodeLostError{node})
		l.session = nil
	}
	l.lost = true
	l.change()
}

// connected reports whether the node has a stream.
func (f *fleet) connected(node string) bool {
	_, connected := f.lastSeen(node)
	return connected
}

// answer gives a reply to the command that waits for it. Answers that nobody
// waits for any more are dropped.
func (f *fleet) answer(node string, reply *agentpb.Reply) {
	if site := f.site(node, reply.GetId()); site != nil {
		select {
		case site.reply <- reply:
		default: // a repeated answer
		}
	}
}

func (f *fleet) progress(node string, p *agentpb.Progress) {
	if site := f.site(node, p.GetId()); site != nil && site.progress != nil {
		site.progress(p.GetFraction(), p.GetMessage())
	}
}

func (f *fleet) site(node, id string) *callSite {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.link(node).calls[id]
}

// tell sends a message to a node, on the stream it has now or next.
func (f *fleet) tell(ctx context.Context, node string, message *agentpb.ToAgent) {
	for {
		f.mu.Lock()
		l := f.link(node)
		current, lost, changed := l.session, l.lost, l.changed
		f.mu.Unlock()
		if lost || !f.leads() {
			return
		}
		if current != nil {
			select {
			case current.out <- message:
				return
			case <-current.done:
			case <-ctx.Done():
				return
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// call sends a command to a node and returns the agent's answer. It fails with
// what the agent says, with a *nodeLostError, or with the context's error.
func (f *fleet) call(ctx context.Context, node string, command *agentpb.Command, progress func(float64, string)) (*agentpb.Reply, error) {
	site := &callSite{reply: make(chan *agentpb.Reply, 1), progress: progress}
	f.mu.Lock()
	f.link(node).calls[command.GetId()] = site
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if l := f.link(node); l.calls[command.GetId()] == site {
			delete(l.calls, command.GetId())
		}
	}()
	message := &agentpb.ToAgent{Body: &agentpb.ToAgent_Command{Command: command}}
	var sentOn *session
	for {
		f.mu.Lock()
		l := f.link(node)
		current, lost, changed := l.session, l.lost, l.changed
		f.mu.Unlock()
		if lost {
			return nil, &nodeLostError{node}
		}
		if !f.leads() {
			return nil, store.ErrDeposed
		}
		if current != nil && current != sentOn {
			select {
			case current.out <- message:
				sentOn = current
			case <-current.done:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		select {
		case reply := <-site.reply:
			return reply, fromAgent(reply.GetFailure())
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
