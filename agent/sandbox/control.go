package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"

	"dormouse/agent/sandbox/pid1"

	"golang.org/x/sys/unix"
)

// link is the agent's side of what goes on with pid 1: short requests, which
// pass a gate that Quiesce closes, exec sessions, which it detaches, and
// listeners, which it stops.
type link struct {
	mu        sync.Mutex
	closed    bool // by Quiesce
	active    int  // requests under way
	listeners map[*listener]struct{}
	changed   chan struct{} // closed and replaced whenever the above change
	sessions  map[*session]struct{}
}

// change tells all who wait. l.mu is held.
func (l *link) change() {
	if l.changed != nil {
		close(l.changed)
	}
	l.changed = make(chan struct{})
}

// until waits for a condition on the fields of l, and then does something with
// them while they cannot change.
func (l *link) until(ctx context.Context, condition func() bool, then func()) error {
	for {
		l.mu.Lock()
		if condition() {
			then()
			l.change()
			l.mu.Unlock()
			return nil
		}
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		changed := l.changed
		l.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// enter begins a request, once the gate is open.
func (l *link) enter(ctx context.Context) error {
	return l.until(ctx, func() bool { return !l.closed }, func() { l.active++ })
}

func (l *link) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.active--
	l.change()
}

// shut closes the gate and waits for the requests under way.
func (l *link) shut(ctx context.Context) error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	return l.until(ctx, func() bool { return l.active == 0 }, func() {})
}

func (l *link) open() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = false
	l.change()
}

func (l *link) add(x *session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.sessions == nil {
		l.sessions = map[*session]struct{}{}
	}
	l.sessions[x] = struct{}{}
}

func (l *link) remove(x *session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.sessions, x)
}

func (l *link) list() []*session {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []*session
	for x := range l.sessions {
		all = append(all, x)
	}
	return all
}

// Quiesce drops every connection to pid 1, because CRIU cannot take a socket
// that leaves the sandbox. Exec sessions stay alive behind it and go on after
// Unquiesce; new ones wait. Call it before Freeze, while the tasks run.
func (s *Sandbox) Quiesce(ctx context.Context) error {
	err := s.link.shut(ctx)
	if err == nil {
		err = s.link.stopListening(ctx)
	}
	sessions := s.link.list()
	for _, x := range sessions {
		if err == nil {
			err = x.quiesce()
		}
	}
	for _, x := range sessions {
		if err == nil {
			err = x.waitDetached(ctx)
		}
	}
	if err == nil {
		err = s.waitQuiet(ctx)
	}
	if err != nil {
		return fmt.Errorf("cannot close the connections into sandbox %s: %w", s.ID(), err)
	}
	return nil
}

// waitQuiet returns when pid 1 has closed its end of every connection, also of
// those that an earlier agent left.
func (s *Sandbox) waitQuiet(ctx context.Context) error {
	conn, _, err := s.open(ctx, &pid1.Request{Op: pid1.OpQuiet})
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		// A task may have broken its own control socket: then nobody connects.
		s.runtime.log.Warn("the sandbox's pid 1 does not answer", "sandbox", s.ID(), "error", err)
		return nil
	}
	return finish(conn)
}

// finish waits until pid 1 has closed its end, which it does at once after its
// last word, and then closes ours.
func finish(conn net.Conn) error {
	_, err := io.Copy(io.Discard, conn)
	return errors.Join(err, ignoreClosed(conn.Close()))
}

// Unquiesce connects the exec sessions again. Call it after Thaw; without a
// Quiesce before, it does nothing. A session that cannot go on ends with the
// reason, which is not an error here.
func (s *Sandbox) Unquiesce(ctx context.Context) error {
	defer s.link.open()
	for _, x := range s.link.list() {
		// After a Quiesce that was given up half-way, pid 1 may still be at it.
		if quiet, err := x.settleQuiesce(ctx); err != nil || !quiet {
			continue
		}
		conn, _, err := s.open(ctx, &pid1.Request{Op: pid1.OpAttach, Session: x.id})
		if err != nil {
			x.fail(fmt.Errorf("the session could not be resumed: %w", err))
			continue
		}
		x.resume(conn)
	}
	return s.keepSessions(ctx)
}

// keepSessions tells pid 1 that no session which is detached now will be
// attached again. A task may have broken its own control socket, and that is no
// reason to fail what was otherwise done.
func (s *Sandbox) keepSessions(ctx context.Context) error {
	if frozen, err := s.Frozen(); err != nil || frozen {
		return nil // nobody would answer; Unquiesce follows
	}
	conn, _, err := s.open(ctx, &pid1.Request{Op: pid1.OpKeep})
	if err == nil {
		err = finish(conn)
	}
	if err != nil && s.Running() {
		s.runtime.log.Warn("the sandbox's pid 1 does not answer", "sandbox", s.ID(), "error", err)
	}
	return context.Cause(ctx)
}

// dropSessions ends every exec session of this agent.
func (s *Sandbox) dropSessions() {
	for _, x := range s.link.list() {
		x.fail(errEnded)
	}
}

// open connects to pid 1 and makes one request. The caller has the connection.
func (s *Sandbox) open(ctx context.Context, request *pid1.Request) (net.Conn, *pid1.OK, error) {
	conn, err := s.dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	answer, err := ask(conn, request)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, nil, errors.Join(err, ignoreClosed(conn.Close()))
	}
	return conn, answer, nil
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// dial connects to the control socket and makes sure that pid 1 answers there:
// the task could have put anything at that path.
func (s *Sandbox) dial(ctx context.Context) (*net.UnixConn, error) {
	if !s.Running() {
		return nil, fmt.Errorf("the sandbox %s does not run", s.ID())
	}
	pid := s.Pid()
	path := fmt.Sprintf("/proc/%d/root%s/%s", pid, pid1.Directory, pid1.ControlSocket)
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("cannot reach pid 1 of sandbox %s: %w", s.ID(), err)
	}
	unixConn := conn.(*net.UnixConn)
	raw, err := unixConn.SyscallConn()
	var peer *unix.Ucred
	if err == nil {
		controlErr := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
		err = errors.Join(err, controlErr)
	}
	if err == nil && int(peer.Pid) != pid {
		err = fmt.Errorf("process %d listens on the control socket of sandbox %s, not its pid 1 (%d)", peer.Pid, s.ID(), pid)
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return unixConn, nil
}

// ask makes a request and reads its answer.
func ask(conn net.Conn, request *pid1.Request) (*pid1.OK, error) {
	content, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	if err := pid1.WriteFrame(conn, pid1.FrameRequest, content); err != nil {
		return nil, fmt.Errorf("pid 1 does not listen: %w", err)
	}
	kind, payload, err := pid1.ReadFrame(conn)
	if err != nil {
		return nil, fmt.Errorf("pid 1 did not answer: %w", err)
	}
	switch kind {
	case pid1.FrameOK:
		var ok pid1.OK
		return &ok, json.Unmarshal(payload, &ok)
	case pid1.FrameFailure:
		return nil, failureIn(payload)
	}
	return nil, fmt.Errorf("pid 1 answered a request with frame %d", kind)
}

func failureIn(payload []byte) error {
	var f pid1.Failure
	if err := json.Unmarshal(payload, &f); err != nil {
		return fmt.Errorf("pid 1 reports a failure that cannot be read: %w", err)
	}
	return failure(&f)
}

// Signal sends sig to the command. SIGKILL is for the whole sandbox: nothing in
// it survives, frozen or not.
func (s *Sandbox) Signal(ctx context.Context, sig syscall.Signal) error {
	s.mu.Lock()
	p := s.process
	if sig == syscall.SIGKILL {
		s.killed = true
	}
	s.mu.Unlock()
	if p == nil || p.ended() {
		return fmt.Errorf("the sandbox %s does not run", s.ID())
	}
	switch sig {
	case syscall.SIGKILL:
		return s.state.Cgroup.Kill()
	case syscall.SIGSTOP, syscall.SIGURG, syscall.SIGCHLD, syscall.SIGPIPE:
		// These mean something to pid 1 itself, so it has to be asked.
		return s.request(ctx, &pid1.Request{Op: pid1.OpSignal, Signal: sig})
	}
	// The rest is forwarded; a frozen sandbox gets it when it thaws.
	if err := p.signal(sig); err != nil {
		return fmt.Errorf("cannot send %s to sandbox %s: %w", unix.SignalName(sig), s.ID(), err)
	}
	return nil
}

// request makes a request that ends with its answer.
func (s *Sandbox) request(ctx context.Context, r *pid1.Request) error {
	if err := s.link.enter(ctx); err != nil {
		return err
	}
	defer s.link.leave()
	conn, _, err := s.open(ctx, r)
	if err != nil {
		return err
	}
	return finish(conn)
}
