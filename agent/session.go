package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/shirou/gopsutil/v3/load"
	"github.com/shirou/gopsutil/v3/mem"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"dormouse/api/agentpb"
	"dormouse/monitor/tree"
)

// Pauses between attempts to reach the controller.
const (
	firstPause = 100 * time.Millisecond
	maxPause   = 5 * time.Second
	// With several controllers a session does not wait for TCP to notice that one
	// is gone: the next is tried when nothing was heard for so long, or for a third
	// of the lease if that is shorter.
	silenceLimit = 5 * time.Second
	// welcomeLimit bounds the wait for a Welcome, which is written to the store first.
	welcomeLimit = 10 * time.Second
	// shortPause is the longest pause between two of several controllers: those
	// that do not lead answer at once.
	shortPause = time.Second
)

// session is one Connect stream, from its Hello to its end.
type session struct {
	agent  *Agent
	client agentpb.AgentServiceClient
	stream grpc.BidiStreamingClient[agentpb.FromAgent, agentpb.ToAgent]
	done   <-chan struct{} // of the stream's context
	end    context.CancelCauseFunc
	out    chan *agentpb.FromAgent

	mu   sync.Mutex
	seq  uint64
	sent map[uint64]time.Duration // heartbeats without acknowledgement, by boot time

	silence time.Duration // after which another controller is tried; 0: never
}

// serve keeps a session with the controller until ctx ends.
func (a *Agent) serve(ctx context.Context) {
	pause, longest := firstPause, maxPause
	if a.masters.several() {
		longest = shortPause
	}
	for ctx.Err() == nil {
		welcomed, err := false, a.stillGood(ctx)
		if err == nil {
			welcomed, err = a.session(ctx)
		}
		if ctx.Err() != nil {
			return
		}
		if welcomed {
			pause = firstPause
		}
		if errors.Is(err, errRenewed) {
			continue
		}
		a.log.Warn("lost the controller", "error", err, "again_in", pause)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, longest)
	}
}

// session runs one stream and reports whether the controller welcomed it. When
// it did not, or does not go on, the next session is with the next controller.
func (a *Agent) session(parent context.Context) (welcomed bool, err error) {
	ctx, end := context.WithCancelCause(parent)
	defer end(nil)
	id := a.identity.Load()
	client, to, err := a.masters.client(a.mutualTLS())
	if err != nil {
		return false, err
	}
	var trailer metadata.MD
	defer func() {
		if !errors.Is(err, errRenewed) {
			a.masters.failed(trailer)
		}
	}()
	late := time.AfterFunc(welcomeLimit, func() {
		if a.masters.several() {
			end(fmt.Errorf("controller %s does not answer", to.address))
		}
	})
	defer late.Stop()
	stream, err := client.Connect(ctx)
	if err != nil {
		return false, err
	}
	asked := bootTime()
	if err := stream.Send(&agentpb.FromAgent{Body: &agentpb.FromAgent_Hello{Hello: a.hello()}}); err != nil {
		trailer, err = streamError(stream, err)
		return false, fmt.Errorf("say hello: %w", err)
	}
	first, err := stream.Recv()
	if err != nil {
		trailer = stream.Trailer()
		return false, causeOf(ctx, err)
	}
	welcome := first.GetWelcome()
	if welcome == nil {
		return false, errors.New("the controller's first message is no welcome")
	}
	late.Stop()
	s := &session{
		agent: a, client: client, stream: stream, done: ctx.Done(), end: end,
		out: make(chan *agentpb.FromAgent, 256), sent: map[uint64]time.Duration{},
	}
	if a.masters.several() {
		s.silence = min(silenceLimit, time.Duration(welcome.GetLeaseMs())*time.Millisecond/3)
	}
	if err := a.welcome(ctx, welcome, asked); err != nil {
		return false, err
	}
	a.clock.connected()
	a.attachSession(s)
	defer a.attachSession(nil)
	if a.identity.Load() != id {
		return true, errRenewed // while this session began
	}
	a.log.Info("connected", "controller", to.address, "node", welcome.GetNodeId())

	var writing sync.WaitGroup
	writing.Go(func() { s.write(ctx, time.Duration(welcome.GetHeartbeatMs())*time.Millisecond) })
	defer writing.Wait()
	defer end(nil)
	a.reportTasks()
	a.repeatRequests()
	for {
		message, err := stream.Recv()
		if err != nil {
			trailer = stream.Trailer()
			return true, causeOf(ctx, err)
		}
		s.receive(parent, message)
	}
}

// causeOf is why ctx was ended, when it was, and err otherwise.
func causeOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// streamError replaces the io.EOF of a failed Send by the stream's status.
func streamError(stream grpc.BidiStreamingClient[agentpb.FromAgent, agentpb.ToAgent], err error) (metadata.MD, error) {
	if _, status := stream.Recv(); status != nil {
		return stream.Trailer(), status
	}
	return nil, err
}

// write is the only sender of the stream.
func (s *session) write(ctx context.Context, period time.Duration) {
	if period <= 0 {
		period = time.Second
	}
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	message := s.heartbeat()
	for {
		if err := s.stream.Send(message); err != nil {
			s.end(fmt.Errorf("send to the controller: %w", err))
			return
		}
		select {
		case <-ctx.Done():
			return
		case message = <-s.out:
		case <-ticker.C:
			if quiet := s.quiet(); s.silence > 0 && quiet > s.silence {
				s.end(fmt.Errorf("the controller has acknowledged nothing for %s", quiet.Round(time.Millisecond)))
				return
			}
			message = s.heartbeat()
		}
	}
}

func (s *session) heartbeat() *agentpb.FromAgent {
	beat := &agentpb.Heartbeat{}
	if average, err := load.Avg(); err == nil {
		beat.Load = average.Load1
	}
	if memory, err := mem.VirtualMemory(); err == nil {
		beat.MemAvailable = int64(memory.Available)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seq++
	beat.Seq = s.seq
	s.sent[s.seq] = bootTime()
	return &agentpb.FromAgent{Body: &agentpb.FromAgent_Heartbeat{Heartbeat: beat}}
}

// quiet is the age of the oldest heartbeat without acknowledgement.
func (s *session) quiet() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, oldest := bootTime(), time.Duration(0)
	for _, sent := range s.sent {
		oldest = max(oldest, now-sent)
	}
	return oldest
}

// acknowledged returns when heartbeat seq was sent.
func (s *session) acknowledged(seq uint64) (sent time.Duration, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sent, ok = s.sent[seq]
	for earlier := range s.sent {
		if earlier <= seq {
			delete(s.sent, earlier)
		}
	}
	return sent, ok
}

func (s *session) receive(ctx context.Context, message *agentpb.ToAgent) {
	switch body := message.GetBody().(type) {
	case *agentpb.ToAgent_HeartbeatAck:
		s.agent.bandwidth.set(body.HeartbeatAck.GetUploadRate())
		sent, ok := s.acknowledged(body.HeartbeatAck.GetSeq())
		if !ok {
			return
		}
		if clock := body.HeartbeatAck.GetClockUs(); clock != 0 {
			s.agent.clock.read(time.UnixMicro(clock), sent, bootTime())
		}
		if err := s.agent.lease.renew(sent); err != nil {
			s.agent.log.Error("cannot store the lease", "error", err)
		}
	case *agentpb.ToAgent_AppAnswer:
		s.agent.answered(ctx, body.AppAnswer)
	// The tree writes to the disk, for which acknowledgements of heartbeats must not wait.
	case *agentpb.ToAgent_TreeAssignment:
		s.agent.lanes.run(treeLane, func() { s.agent.tree.assign(body.TreeAssignment) })
	case *agentpb.ToAgent_TreeAck:
		s.agent.lanes.run(treeLane, func() { s.agent.tree.answered(tree.Controller, tree.AckFrom(body.TreeAck)) })
	case *agentpb.ToAgent_Command:
		s.agent.accept(ctx, body.Command)
	case *agentpb.ToAgent_Welcome:
		s.agent.log.Warn("a second welcome on one stream", slog.String("node", body.Welcome.GetNodeId()))
	}
}

// send queues a message for the controller; without a session it is dropped:
// what matters is told again by the next Hello, and unanswered commands are
// repeated.
func (a *Agent) send(message *agentpb.FromAgent) {
	a.sessionMu.Lock()
	s := a.current
	a.sessionMu.Unlock()
	if s == nil {
		return
	}
	select {
	case s.out <- message:
	case <-s.done:
	}
}

func (a *Agent) attachSession(s *session) {
	a.sessionMu.Lock()
	defer a.sessionMu.Unlock()
	a.current = s
}

// endSession makes the agent say hello anew.
func (a *Agent) endSession(reason error) {
	a.sessionMu.Lock()
	defer a.sessionMu.Unlock()
	if a.current != nil {
		a.current.end(reason)
	}
}
