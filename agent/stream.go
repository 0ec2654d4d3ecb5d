package agent

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"

	"google.golang.org/grpc"

	"dormouse/agent/sandbox"
	"dormouse/api/agentpb"
)

// piece is the most that one frame of a stream carries.
const piece = 32 << 10

// attachment is an Attach stream of the agent. Its sends are serialised.
type attachment struct {
	stream grpc.BidiStreamingClient[agentpb.Frame, agentpb.Frame]
	mu     sync.Mutex
}

func (s *attachment) send(frame *agentpb.Frame) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stream.Send(frame)
}

// openStream serves the logs or an exec of a task on a stream of its own. The
// command is answered at once; the stream goes on beside it.
func (a *Agent) openStream(ref *agentpb.TaskRef, request *agentpb.OpenStream) error {
	t, err := a.find(ref)
	if err != nil {
		return err
	}
	var serve func(context.Context, *attachment) error
	switch kind := request.GetKind().(type) {
	case *agentpb.OpenStream_Logs:
		serve = func(ctx context.Context, s *attachment) error { return t.sendLogs(ctx, s, kind.Logs.GetFollow()) }
	case *agentpb.OpenStream_Exec:
		box, err := t.live()
		if err != nil {
			return err
		}
		serve = func(ctx context.Context, s *attachment) error { return runExec(ctx, s, box, kind.Exec) }
	default:
		return errors.New("the stream is neither logs nor an exec")
	}
	a.streams.Go(func() {
		if err := a.attach(request.GetStream(), serve); err != nil && a.life.Err() == nil {
			a.log.Debug("stream ended", "stream", request.GetStream(), "error", err)
		}
	})
	return nil
}

func (a *Agent) attach(name string, serve func(context.Context, *attachment) error) error {
	ctx, cancel := context.WithCancel(a.life)
	defer cancel()
	a.sessionMu.Lock()
	current := a.current
	a.sessionMu.Unlock()
	if current == nil {
		return errors.New("the controller that asked for the stream is gone")
	}
	stream, err := current.client.Attach(ctx)
	if err != nil {
		return err
	}
	s := &attachment{stream: stream}
	if err := s.send(&agentpb.Frame{Stream: name}); err != nil {
		return err
	}
	if err := serve(stream.Context(), s); err != nil {
		s.send(&agentpb.Frame{Body: &agentpb.Frame_Error{Error: err.Error()}})
	}
	if err := s.stream.CloseSend(); err != nil {
		return err
	}
	for { // the frames are delivered when the controller has ended the stream
		if _, err := stream.Recv(); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

// runExec runs a command in the task's sandbox.
func runExec(ctx context.Context, s *attachment, box *sandbox.Sandbox, e *agentpb.Exec) error {
	input, feed := io.Pipe()
	resize := make(chan sandbox.Size, 1)
	var reading sync.WaitGroup
	reading.Go(func() { readInput(s, feed, resize) })
	code, err := box.Exec(ctx, sandbox.ExecRequest{
		Command: e.GetCommand(), Env: e.GetEnv(), TTY: e.GetTty(),
		Size:  sandbox.Size{Rows: uint16(e.GetRows()), Cols: uint16(e.GetCols())},
		Stdin: input, Resize: resize,
		Stdout: frameWriter(func(p []byte) error {
			return s.send(&agentpb.Frame{Body: &agentpb.Frame_Stdout{Stdout: p}})
		}),
		Stderr: frameWriter(func(p []byte) error {
			return s.send(&agentpb.Frame{Body: &agentpb.Frame_Stderr{Stderr: p}})
		}),
	})
	input.Close() // nobody reads it any more: readInput goes on to the end of the stream
	if err != nil {
		return err
	}
	if err := s.send(&agentpb.Frame{Body: &agentpb.Frame_Exit{Exit: &agentpb.Exit{Code: int32(code)}}}); err != nil {
		return err
	}
	if err := s.stream.CloseSend(); err != nil {
		return err
	}
	reading.Wait()
	return nil
}

// readInput passes on what the controller sends until the stream ends.
func readInput(s *attachment, feed *io.PipeWriter, resize chan sandbox.Size) {
	defer feed.Close()
	defer close(resize)
	for {
		frame, err := s.stream.Recv()
		if err != nil {
			return
		}
		switch body := frame.GetBody().(type) {
		case *agentpb.Frame_Stdin:
			if len(body.Stdin) == 0 {
				feed.Close()
				continue
			}
			feed.Write(body.Stdin) // fails when the command is over
		case *agentpb.Frame_Resize:
			offerSize(resize, sandbox.Size{Rows: uint16(body.Resize.GetRows()), Cols: uint16(body.Resize.GetCols())})
		}
	}
}

// offerSize leaves the newest size in the channel.
func offerSize(resize chan sandbox.Size, size sandbox.Size) {
	select {
	case <-resize:
	default:
	}
	resize <- size
}

// frameWriter is a Writer that sends what it gets in pieces.
type frameWriter func([]byte) error

func (send frameWriter) Write(p []byte) (int, error) {
	for sent := 0; sent < len(p); {
		next := p[sent:min(len(p), sent+piece)]
		if err := send(append([]byte(nil), next...)); err != nil {
			return sent, err
		}
		sent += len(next)
	}
	return len(p), nil
}

// sendLogs sends the task's stdout and stderr; with follow, also what it
// writes later, until it has ended.
func (t *task) sendLogs(ctx context.Context, s *attachment, follow bool) error {
	stdout, err := t.openLog("stdout")
	if err != nil {
		return err
	}
	defer stdout.Close()
	stderr, err := t.openLog("stderr")
	if err != nil {
		return err
	}
	defer stderr.Close()
	logs := []*logTail{
		{file: stdout, send: func(p []byte) error {
			return s.send(&agentpb.Frame{Body: &agentpb.Frame_Stdout{Stdout: p}})
		}},
		{file: stderr, send: func(p []byte) error {
			return s.send(&agentpb.Frame{Body: &agentpb.Frame_Stderr{Stderr: p}})
		}},
	}
	return followLogs(ctx, logs, t.ended, follow)
}

func (t *task) openLog(name string) (*os.File, error) {
	_, box := t.snapshot()
	if box != nil {
		return box.OpenLog(name)
	}
	return sandbox.OpenLog(t.boxDir(), name)
}
