package sandbox

import (
	"context"
	"encoding/json"
	"fmt"
	"net"

	"dormouse/agent/sandbox/pid1"
)

// AppRequest is a program's request for a checkpoint of its job.
type AppRequest struct {
	// ID names the request for ever: restores and clones do not repeat it.
	ID    string
	Label string
}

// Outcome is how a request ended: with a durable checkpoint, unless Failure says
// why there is none.
type Outcome struct {
	Checkpoint string
	Failure    string
	Refused    bool // it may not be done, as opposed to broken
}

// listener is the connection on which pid 1 tells of requests.
type listener struct{ conn net.Conn }

// Listen gives take every request of a program in the sandbox, until ctx or the
// sandbox ends: then it returns nil. While the sandbox is quiesced it is not
// connected; afterwards, and after a restart of the agent, everything that was
// not answered comes again. In a restored sandbox call Restored first. take must
// not wait.
func (s *Sandbox) Listen(ctx context.Context, take func(AppRequest)) error {
	s.mu.Lock()
	p := s.process
	s.mu.Unlock()
	if p == nil {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = p.wait(ctx) // whatever it says, it is over
		cancel()
	}()
	defer func() { cancel(); <-ended }()
	for {
		err := s.listen(ctx, take)
		if err != nil && s.goes(ctx) || ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("cannot listen to the programs in sandbox %s: %w", s.ID(), err)
		}
	}
}

// listen takes requests until the sandbox is quiesced: then it returns nil.
func (s *Sandbox) listen(ctx context.Context, take func(AppRequest)) error {
	l, err := s.startListener(ctx)
	if err != nil {
		return err
	}
	defer s.link.forget(l)
	defer l.conn.Close()
	stop := context.AfterFunc(ctx, func() { l.conn.Close() })
	defer stop()
	for {
		kind, payload, err := pid1.ReadFrame(l.conn)
		if err != nil {
			return errLost
		}
		switch kind {
		case pid1.FrameDetached:
			_ = finish(l.conn) // whatever came of it, it is over
			return nil
		case pid1.FrameFailure:
			return failureIn(payload)
		case pid1.FrameApp:
			var request pid1.AppRequest
			if err := json.Unmarshal(payload, &request); err != nil {
				return fmt.Errorf("a request cannot be understood: %w", err)
			}
			take(AppRequest(request))
		}
	}
}

func (s *Sandbox) startListener(ctx context.Context) (*listener, error) {
	if err := s.link.enter(ctx); err != nil {
		return nil, err
	}
	defer s.link.leave()
	conn, _, err := s.open(ctx, &pid1.Request{Op: pid1.OpListen})
	if err != nil {
		return nil, err
	}
	l := &listener{conn}
	s.link.note(l)
	return l, nil
}

// Answer ends a request. One that nobody waits for any more is no error. While
// the sandbox is quiesced, Answer waits.
func (s *Sandbox) Answer(ctx context.Context, id string, o Outcome) error {
	outcome := pid1.Outcome(o)
	err := s.request(ctx, &pid1.Request{Op: pid1.OpAnswer, ID: id, Outcome: &outcome})
	if err != nil && !s.goes(ctx) {
		return fmt.Errorf("cannot answer a program in sandbox %s: %w", s.ID(), err)
	}
	return nil
}

// Restored tells the programs in a restored sandbox from which checkpoint, and
// as which run of the job. It answers every request that had not been answered
// when the checkpoint was captured. A run that is not newer than the last one
// told changes nothing.
func (s *Sandbox) Restored(ctx context.Context, checkpoint string, run int64) error {
	err := s.request(ctx, &pid1.Request{Op: pid1.OpRestored, JobRun: run, Outcome: &pid1.Outcome{Checkpoint: checkpoint}})
	if err != nil {
		return fmt.Errorf("cannot tell sandbox %s that it was restored: %w", s.ID(), err)
	}
	return nil
}

// note and forget keep the listeners that a Quiesce has to stop.
func (l *link) note(x *listener) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.listeners == nil {
		l.listeners = map[*listener]struct{}{}
	}
	l.listeners[x] = struct{}{}
}

func (l *link) forget(x *listener) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.listeners, x)
	l.change()
}

// stopListening asks pid 1 to let go of every listener, and waits.
func (l *link) stopListening(ctx context.Context) error {
	l.mu.Lock()
	for x := range l.listeners {
		// One that fails is being forgotten.
		_ = pid1.WriteFrame(x.conn, pid1.FrameQuiesce, nil)
	}
	l.mu.Unlock()
	return l.until(ctx, func() bool { return len(l.listeners) == 0 }, func() {})
}
