package controller

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"crypto/rand"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/store"
	"dormouse/drivers"
	"dormouse/internal/lazyregexp"
)

// tokenLife is how long a new machine may take to boot and join.
const tokenLife = time.Hour

// maxMessage bounds one message of an agent: a Hello with many tasks, or the
// part of a manifest.
const maxMessage = 64 << 20

// agentService is the gRPC side of a Controller.
type agentService struct {
	agentpb.UnimplementedAgentServiceServer
	c *Controller
}

func (c *Controller) newAgentServer() *grpc.Server {
	server := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage))
	agentpb.RegisterAgentServiceServer(server, &agentService{c: c})
	return server
}

// Bootstrap makes what a new node of a cloud needs to join; tokens made for the
// node before are void.
func (c *Controller) Bootstrap(cloud string) drivers.BootstrapFunc {
	return func(ctx context.Context, node string) (drivers.Bootstrap, error) {
		token := "jt-" + rand.Text()
		err := c.store.Update(ctx, func(tx store.Tx) error {
			if err := dropTokens(tx, node); err != nil {
				return err
			}
			return store.Put(tx, store.Tokens, hashToken(token), tokenRecord{Cloud: cloud, Node: node, Expires: c.clock.Now().Add(tokenLife)})
		})
		if err != nil {
			return drivers.Bootstrap{}, fmt.Errorf("make a join token for node %s: %w", node, err)
		}
		return drivers.Bootstrap{URL: c.parts.AgentURL(cloud), Token: token, CA: c.parts.PKI.CAPEM()}, nil
	}
}

func hashToken(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

func dropTokens(tx store.Tx, node string) error {
	var keys []string
	err := tx.Scan(store.Tokens, "", func(key string, _ []byte) error {
		record, err := store.Get[tokenRecord](tx, store.Tokens, key)
		if err == nil && record.Node == node {
			keys = append(keys, key)
		}
		return err
	})
	for _, key := range keys {
		err = errors.Join(err, tx.Delete(store.Tokens, key))
	}
	return err
}

var nodeName = lazyregexp.New(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)

// Join implements agentpb.AgentServiceServer.
func (s *agentService) Join(ctx context.Context, request *agentpb.JoinRequest) (*agentpb.JoinResponse, error) {
	c := s.c
	if !nodeName.MatchString(request.GetNode()) {
		return nil, status.Errorf(codes.InvalidArgument, "%q is not a node name: use up to 63 small letters, digits, dots and dashes", request.GetNode())
	}
	var certificate *x509.Certificate
	err := c.store.Update(ctx, func(tx store.Tx) (err error) { // a refusal leaves the token as it was
		if err := c.useToken(tx, request); err != nil {
			return err
		}
		certificate, err = c.admit(tx, request)
		return err
	})
	if err != nil {
		return nil, agentStatus(err)
	}
	c.log.Info("node joined", "node", request.GetNode(), "cloud", request.GetCloud())
	return &agentpb.JoinResponse{Certificate: certificate.Raw, Ca: c.parts.PKI.CADER(), NodeId: request.GetNode()}, nil
}

// useToken checks a join token, and uses up one that is for a single node.
func (c *Controller) useToken(tx store.Tx, request *agentpb.JoinRequest) error {
	if c.parts.JoinToken != "" && subtle.ConstantTimeCompare([]byte(request.GetToken()), []byte(c.parts.JoinToken)) == 1 {
		return c.checkOpenCloud(request.GetCloud())
	}
	key := hashToken(request.GetToken())
	record, err := store.Get[tokenRecord](tx, store.Tokens, key)
	if errors.Is(err, store.ErrNotFound) {
		return refused("the join token of node %s is wrong or was used before", request.GetNode())
	}
	if err != nil {
		return err
	}
	if record.Node != request.GetNode() || record.Cloud != request.GetCloud() {
		return refused("the join token is not for node %s of cloud %s", request.GetNode(), request.GetCloud())
	}
	if c.clock.Now().After(record.Expires) {
		return refused("the join token of node %s has expired", request.GetNode())
	}
	return tx.Delete(store.Tokens, key)
}

// checkOpenCloud refuses the shared join token for clouds whose driver makes
// the nodes.
func (c *Controller) checkOpenCloud(name string) error {
	cloud, known := c.cloud(name)
	if !known {
		return refused("there is no cloud %q: known are %s", name, commas(c.cloudNames()))
	}
	if cloud.Driver != nil {
		return refused("the nodes of cloud %s are made by its driver and do not join by themselves", name)
	}
	return nil
}

// admit makes the node known, and the certificate that it returns the only one
// that the node may show.
func (c *Controller) admit(tx store.Tx, request *agentpb.JoinRequest) (*x509.Certificate, error) {
	id := request.GetNode()
	record, err := store.Get[nodeRecord](tx, store.Nodes, id)
	switch {
	case errors.Is(err, store.ErrNotFound):
		record = nodeRecord{Node: api.Node{ID: id, Name: id, Cloud: request.GetCloud(), State: api.NodeJoining}}
	case err != nil:
		return nil, err
	case record.Cloud != request.GetCloud():
		return nil, refused("there is a node %s in cloud %s already: choose another name", id, record.Cloud)
	case record.Driver == "" && (record.State == api.NodeReady || record.State == api.NodeCordoned):
		return nil, refused("there is a node %s already, and it is ready: choose another name", id)
	}
	certificate, err := c.sign(&record, request.GetCsr())
	if err != nil {
		return nil, err
	}
	return certificate, store.Put(tx, store.Nodes, id, record)
}

// Connect implements agentpb.AgentServiceServer.
func (s *agentService) Connect(stream grpc.BidiStreamingServer[agentpb.FromAgent, agentpb.ToAgent]) error {
	c := s.c
	shown, err := shownBy(stream.Context())
	if err != nil {
		return err
	}
	id := shown.Subject.CommonName
	if err := c.acceptCertificate(stream.Context(), shown); err != nil {
		return err
	}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	hello := first.GetHello()
	if hello == nil {
		return status.Error(codes.InvalidArgument, "an agent's first message must be its Hello")
	}
	if hello.GetNode() != id {
		return status.Errorf(codes.PermissionDenied, "the certificate is of node %s and the Hello of node %s", id, hello.GetNode())
	}
	ctx, end := context.WithCancelCause(stream.Context())
	defer end(nil)
	stopped := context.AfterFunc(c.run, func() { end(errors.New("the controller is stopping")) })
	defer stopped()
	welcome, err := c.welcome(ctx, id, hello)
	if errors.Is(err, store.ErrNotFound) {
		return status.Error(codes.PermissionDenied, err.Error())
	}
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	welcome.UploadRate = c.uploadRate(hello.GetCloud(), id)
	se := &session{node: id, cloud: hello.GetCloud(), out: make(chan *agentpb.ToAgent), done: make(chan struct{}), end: end}
	return s.serve(ctx, stream, se, welcome)
}

// serve runs one agent's stream until either side ends it.
func (s *agentService) serve(ctx context.Context, stream grpc.BidiStreamingServer[agentpb.FromAgent, agentpb.ToAgent], se *session, welcome *agentpb.Welcome) error {
	c := s.c
	if err := stream.Send(&agentpb.ToAgent{Body: &agentpb.ToAgent_Welcome{Welcome: welcome}}); err != nil {
		return err
	}
	c.fleet.attach(se, c.clock.Now())
	c.monitor.connected(ctx, se.node)
	defer c.fleet.detach(se)
	defer close(se.done)
	received := make(chan error, 1)
	// The goroutine ends with the stream, which ends when this function returns.
	go func() { received <- s.receive(ctx, stream, se) }()
	for {
		select {
		case message := <-se.out:
			if err := stream.Send(message); err != nil {
				return err
			}
		case err := <-received:
			return err
		case <-ctx.Done():
			if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
				return status.Error(codes.Aborted, cause.Error())
			}
			return ctx.Err()
		}
	}
}

func (s *agentService) receive(ctx context.Context, stream grpc.BidiStreamingServer[agentpb.FromAgent, agentpb.ToAgent], se *session) error {
	c := s.c
	for {
		message, err := stream.Recv()
		if err != nil {
			return err
		}
		switch body := message.GetBody().(type) {
		case *agentpb.FromAgent_Heartbeat:
			err = s.acknowledge(ctx, se, body.Heartbeat.GetSeq())
		case *agentpb.FromAgent_Reply:
			c.fleet.answer(se.node, body.Reply)
		case *agentpb.FromAgent_Progress:
			c.fleet.progress(se.node, body.Progress)
		case *agentpb.FromAgent_TaskEvent:
			err = c.taskEvent(ctx, se.node, body.TaskEvent.GetState())
		case *agentpb.FromAgent_AppRequest:
			c.fromInside(c.run, se.node, body.AppRequest)
		case *agentpb.FromAgent_TreeReport:
			err = c.monitor.reported(ctx, se.node, body.TreeReport)
		}
		if err != nil {
			return err
		}
	}
}

// acknowledge renews the node's lease. A node that was taken for lost must say
// Hello again before it may go on.
func (s *agentService) acknowledge(ctx context.Context, se *session, seq uint64) error {
	c := s.c
	if !c.fleet.renew(se, c.clock.Now()) {
		return status.Error(codes.Aborted, "the node was taken for lost, has a newer stream, or another controller leads: connect again")
	}
	if err := c.reachable(ctx, se.node); err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	select {
	case se.out <- &agentpb.ToAgent{Body: &agentpb.ToAgent_HeartbeatAck{HeartbeatAck: &agentpb.HeartbeatAck{
		Seq: seq, UploadRate: c.uploadRate(se.cloud, se.node), ClockUs: c.clock.Now().UnixMicro(),
	}}}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// reachable makes a node ready again that was only silent for a while.
func (c *Controller) reachable(ctx context.Context, id string) error {
	var n *seenNode
	err := c.store.View(ctx, func(tx store.Tx) (err error) { // spares the writers' lock
		n, err = c.nodes.get(tx, id)
		return err
	})
	if err != nil || n.State != api.NodeUnreachable {
		return err
	}
	return c.store.Update(ctx, func(tx store.Tx) error {
		n, err := store.Get[nodeRecord](tx, store.Nodes, id)
		if err != nil || n.State != api.NodeUnreachable {
			return err
		}
		heard, reason := n.heard()
		return c.putNodeState(tx, n, heard, reason)
	})
}
