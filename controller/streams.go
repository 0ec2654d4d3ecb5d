package controller

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"dormouse/api/agentpb"
)

// attachments are the Attach streams that someone waits for.
type attachments struct {
	mu      sync.Mutex
	waiting map[string]*attachment
}

// attachment is one log or exec stream between a request and an agent.
type attachment struct {
	node   string
	stream chan agentStream // of size 1
	done   chan struct{}    // closed when the request has ended
}

type agentStream = grpc.BidiStreamingServer[agentpb.Frame, agentpb.Frame]

func newAttachments() *attachments { return &attachments{waiting: make(map[string]*attachment)} }

// Attach implements agentpb.AgentServiceServer.
func (s *agentService) Attach(stream agentStream) error {
	shown, err := shownBy(stream.Context())
	if err != nil {
		return err
	}
	if err := s.c.acceptCertificate(stream.Context(), shown); err != nil {
		return err
	}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	a := s.c.streams.take(first.GetStream(), shown.Subject.CommonName)
	if a == nil {
		return status.Error(codes.NotFound, "nobody waits for this stream")
	}
	a.stream <- stream
	select {
	case <-a.done:
		return nil
	case <-stream.Context().Done():
		return stream.Context().Err()
	case <-s.c.run.Done():
		return status.Error(codes.Unavailable, "the controller is stopping")
	}
}

func (a *attachments) take(id, node string) *attachment {
	a.mu.Lock()
	defer a.mu.Unlock()
	found := a.waiting[id]
	if found == nil || found.node != node {
		return nil
	}
	delete(a.waiting, id)
	return found
}

// openStream asks a task's agent for a stream. The caller closes it with the
// returned function.
func (c *Controller) openStream(ctx context.Context, ref taskRef, open *agentpb.OpenStream) (agentStream, func(), error) {
	if !c.fleet.connected(ref.Node) {
		return nil, nil, refused("node %s is not connected: try again when it is ready", ref.Node)
	}
	open.Stream = newID("s")
	a := &attachment{node: ref.Node, stream: make(chan agentStream, 1), done: make(chan struct{})}
	c.streams.mu.Lock()
	c.streams.waiting[open.Stream] = a
	c.streams.mu.Unlock()
	end := sync.OnceFunc(func() {
		c.streams.mu.Lock()
		delete(c.streams.waiting, open.Stream)
		c.streams.mu.Unlock()
		close(a.done)
	})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answered := make(chan error, 1)
	go func() { // ends with ctx
		_, err := c.fleet.call(ctx, ref.Node, &agentpb.Command{
			Id: "stream/" + open.Stream, Task: ref.proto(), Body: &agentpb.Command_OpenStream{OpenStream: open},
		}, nil)
		answered <- err
	}()
	for {
		select {
		case stream := <-a.stream:
			return stream, end, nil
		case err := <-answered:
			if err == nil {
				answered = nil // the stream is on its way
				continue
			}
			end()
			return nil, nil, streamError(ref, err)
		case <-ctx.Done():
			end()
			return nil, nil, ctx.Err()
		}
	}
}

func streamError(ref taskRef, err error) error {
	var f *failure
	if errors.As(err, &f) {
		return refused("%s", f.Message)
	}
	if isNodeLost(err) {
		return refused("node %s was lost, and task %d with it", ref.Node, ref.Index)
	}
	return err
}

// copyLogs hands every piece of output to write until the stream ends.
func copyLogs(stream agentStream, write func(kind string, data []byte) error) error {
	for {
		frame, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("the node's log stream broke: %w", err)
		}
		switch body := frame.GetBody().(type) {
		case *agentpb.Frame_Stdout:
			err = write("stdout", body.Stdout)
		case *agentpb.Frame_Stderr:
			err = write("stderr", body.Stderr)
		case *agentpb.Frame_Error:
			return errors.New(body.Error)
		}
		if err != nil {
			return err
		}
	}
}
