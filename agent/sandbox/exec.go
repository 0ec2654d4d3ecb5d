package sandbox

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"dormouse/agent/sandbox/pid1"
)

// ExecRequest asks for a process beside the command, with its user, root and
// environment.
type ExecRequest struct {
	Command []string
	Env     map[string]string // added to the command's
	TTY     bool              // a terminal; everything is then Stdout
	// Whole has all that the process started killed at its end. When ctx ends first
	// the process is killed, too, and Exec returns when nothing is left; of a sandbox
	// that is frozen, nothing will be left when it goes on.
	Whole bool
	Size  Size // of the terminal
	// Stdin may be nil. A Read that is under way when the process ends is
	// left behind: close the source to end it.
	Stdin          io.Reader
	Stdout, Stderr io.Writer // nil: thrown away
	Resize         <-chan Size
}

// Size is a terminal's, in characters.
type Size struct{ Rows, Cols uint16 }

// errEnded is why sessions of a destroyed sandbox end.
var errEnded = errors.New("the sandbox was ended")

// Exec runs a process in the sandbox and returns its exit code, 128+signal when
// a signal ended it (as when the whole sandbox ends first). It lives through
// checkpoints. When ctx ends, the process is hung up.
func (s *Sandbox) Exec(ctx context.Context, r ExecRequest) (int, error) {
	request := &pid1.Request{Op: pid1.OpExec, Command: r.Command, TTY: r.TTY, Whole: r.Whole, Rows: r.Size.Rows, Cols: r.Size.Cols}
	for key, value := range r.Env {
		request.Env = append(request.Env, key+"="+value)
	}
	slices.Sort(request.Env)
	x, err := s.startSession(ctx, request, r)
	if err != nil {
		return 0, fmt.Errorf("cannot exec in sandbox %s: %w", s.ID(), err)
	}
	defer s.link.remove(x)
	stop := context.AfterFunc(ctx, func() {
		if r.Whole {
			x.kill()
		}
		x.fail(context.Cause(ctx))
	})
	defer stop()
	code, err := x.converse(r)
	if r.Whole && ctx.Err() != nil {
		return 0, fmt.Errorf("exec in sandbox %s: %w", s.ID(), context.Cause(ctx))
	}
	if errors.Is(err, errLost) && s.goes(ctx) {
		return 128 + int(syscall.SIGKILL), nil // the kernel killed it together with pid 1
	}
	if err != nil {
		return 0, fmt.Errorf("exec in sandbox %s: %w", s.ID(), err)
	}
	return code, nil
}

func (s *Sandbox) startSession(ctx context.Context, request *pid1.Request, r ExecRequest) (*session, error) {
	if err := s.link.enter(ctx); err != nil {
		return nil, err
	}
	defer s.link.leave()
	conn, answer, err := s.open(ctx, request)
	if err != nil {
		return nil, err
	}
	x := newSession(answer.Session, conn)
	s.link.add(x)
	return x, nil
}

// goes reports whether pid 1 ends, as it must when it falls silent: a process
// that exits closes its descriptors some instants before it can be waited for.
func (s *Sandbox) goes(ctx context.Context) bool {
	s.mu.Lock()
	p := s.process
	s.mu.Unlock()
	if p == nil {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return p.wait(ctx) == nil
}

// session is the agent's end of an exec session. Its connection is replaced
// when a checkpoint comes between.
type session struct {
	id uint64

	mu        sync.Mutex
	changed   *sync.Cond
	conn      net.Conn // nil while detached
	quiescing bool     // nothing more may be sent on conn
	ended     bool
	failure   error  // why it ended, if not by itself
	sent      uint64 // bytes of input
	consumed  uint64 // of them, given to the process
	// output waits for its writer: bounded, except while quiescing, when
	// everything pid 1 still sends has to be taken.
	output  []chunk
	waiting int
}

// chunk is output on its way to the caller.
type chunk struct {
	kind pid1.FrameType
	data []byte
}

// maxWaiting bounds a session's output in the agent, in bytes.
const maxWaiting = 256 << 10

// errLost means that the connection ended without a last word.
var errLost = errors.New("the connection to pid 1 was lost")

func newSession(id uint64, conn net.Conn) *session {
	x := &session{id: id, conn: conn}
	x.changed = sync.NewCond(&x.mu)
	return x
}

// converse relays until the process has ended.
func (x *session) converse(r ExecRequest) (int, error) {
	var writer sync.WaitGroup
	writer.Go(func() { x.write(r.Stdout, r.Stderr) })
	if r.Stdin != nil {
		go x.sendInput(r.Stdin)
	} else {
		go func() { _ = x.send(pid1.FrameStdin, nil) }()
	}
	done := make(chan struct{})
	var resizer sync.WaitGroup
	resizer.Go(func() { x.sendSizes(r.Resize, done) })
	code, err := x.receive()
	x.end(err)
	writer.Wait()
	close(done)
	resizer.Wait()
	x.mu.Lock()
	defer x.mu.Unlock()
	return code, x.failure
}

// receive takes what pid 1 sends, over as many connections as it needs.
func (x *session) receive() (int, error) {
	for {
		conn := x.connection()
		if conn == nil {
			return 0, nil // ended, with a reason
		}
		kind, payload, err := pid1.ReadFrame(conn)
		if err != nil {
			return 0, errLost
		}
		switch kind {
		case pid1.FrameStdout, pid1.FrameStderr:
			x.take(chunk{kind, payload})
		case pid1.FrameAck:
			if len(payload) == 8 {
				x.acknowledged(binary.BigEndian.Uint64(payload))
			}
		case pid1.FrameDetached:
			x.detach()
		case pid1.FrameFailure:
			return 0, failureIn(payload)
		case pid1.FrameExit:
			var exit pid1.Exit
			if err := json.Unmarshal(payload, &exit); err != nil {
				return 0, fmt.Errorf("pid 1 reports an exit that cannot be read: %w", err)
			}
			return exit.Code, nil
		}
	}
}

// connection waits for one while the session is detached; nil when it is over.
func (x *session) connection() net.Conn {
	x.mu.Lock()
	defer x.mu.Unlock()
	for x.conn == nil && !x.ended {
		x.changed.Wait()
	}
	if x.ended {
		return nil
	}
	return x.conn
}

// end makes everything that belongs to the session stop; the first reason
// stays.
func (x *session) end(reason error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.ended {
		x.ended, x.failure = true, reason
	}
	if x.conn != nil {
		x.conn.Close()
		x.conn = nil
	}
	x.changed.Broadcast()
}

// fail ends the session for a reason from outside.
func (x *session) fail(reason error) { x.end(reason) }

// killTime is how long pid 1 may take to kill a session.
const killTime = 5 * time.Second

// kill asks pid 1 to kill the whole session, and waits until it has.
func (x *session) kill() {
	late := time.AfterFunc(killTime, func() { x.fail(errors.New("pid 1 does not answer")) })
	defer late.Stop()
	if !x.send(pid1.FrameKill, nil) {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for !x.ended {
		x.changed.Wait()
	}
}

// take queues output for the writer.
func (x *session) take(c chunk) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for x.waiting > maxWaiting && !x.quiescing && !x.ended {
		x.changed.Wait()
	}
	x.output = append(x.output, c)
	x.waiting += len(c.data)
	x.changed.Broadcast()
}

// write gives queued output to the caller. One that cannot be written to gets
// no more, and the process goes on.
func (x *session) write(stdout, stderr io.Writer) {
	to := map[pid1.FrameType]io.Writer{pid1.FrameStdout: stdout, pid1.FrameStderr: stderr}
	for {
		x.mu.Lock()
		for len(x.output) == 0 && !x.ended {
			x.changed.Wait()
		}
		batch := x.output
		x.output, x.waiting = nil, 0
		over := x.ended && len(batch) == 0
		x.changed.Broadcast()
		x.mu.Unlock()
		if over {
			return
		}
		for _, c := range batch {
			if w := to[c.kind]; w != nil {
				if _, err := w.Write(c.data); err != nil {
					to[c.kind] = nil
				}
			}
		}
	}
}

func (x *session) acknowledged(consumed uint64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.consumed = consumed
	x.changed.Broadcast()
}

// sendInput relays the caller's input, no further ahead of the process than
// pid1.Window.
func (x *session) sendInput(stdin io.Reader) {
	buffer := make([]byte, 16<<10)
	for {
		n, err := stdin.Read(buffer)
		if n > 0 && !x.send(pid1.FrameStdin, buffer[:n]) {
			return
		}
		if err != nil {
			// However the source ended, the process sees the end of its input.
			_ = x.send(pid1.FrameStdin, nil)
			return
		}
	}
}

// send sends a frame as soon as it may; false when the session is over.
func (x *session) send(kind pid1.FrameType, payload []byte) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	size := uint64(0)
	if kind == pid1.FrameStdin {
		size = uint64(len(payload))
	}
	for !x.ended && (x.conn == nil || x.quiescing || size > 0 && x.sent+size-x.consumed > pid1.Window) {
		x.changed.Wait()
	}
	if x.ended {
		return false
	}
	x.sent += size
	// A failing connection is noticed by receive.
	_ = pid1.WriteFrame(x.conn, kind, payload)
	return true
}

func (x *session) sendSizes(sizes <-chan Size, done <-chan struct{}) {
	for {
		select {
		case size, ok := <-sizes:
			if !ok {
				return
			}
			payload := binary.BigEndian.AppendUint16(nil, size.Rows)
			if !x.send(pid1.FrameResize, binary.BigEndian.AppendUint16(payload, size.Cols)) {
				return
			}
		case <-done:
			return
		}
	}
}

// quiesce asks pid 1 to let go of the connection.
func (x *session) quiesce() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.ended || x.conn == nil || x.quiescing {
		return nil
	}
	x.quiescing = true
	x.changed.Broadcast()
	return pid1.WriteFrame(x.conn, pid1.FrameQuiesce, nil)
}

// detach notes that pid 1 has let go.
func (x *session) detach() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.conn != nil {
		_ = finish(x.conn) // whatever came of it, it is over
		x.conn = nil
	}
	x.changed.Broadcast()
}

// resume goes on over a new connection.
func (x *session) resume(conn net.Conn) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.ended {
		conn.Close()
		return
	}
	x.conn, x.quiescing = conn, false
	x.changed.Broadcast()
}

// settleQuiesce waits for the end of a quiesce that was begun, and reports
// whether the session is now detached.
func (x *session) settleQuiesce(ctx context.Context) (bool, error) {
	x.mu.Lock()
	begun := x.quiescing && !x.ended
	x.mu.Unlock()
	if !begun {
		return false, nil
	}
	err := x.waitDetached(ctx)
	x.mu.Lock()
	defer x.mu.Unlock()
	return err == nil && !x.ended, err
}

// waitDetached returns when the session has no connection.
func (x *session) waitDetached(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.changed.Broadcast()
	})
	defer stop()
	x.mu.Lock()
	defer x.mu.Unlock()
	for x.conn != nil && !x.ended {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		x.changed.Wait()
	}
	return nil
}
