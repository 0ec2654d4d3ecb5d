package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"dormouse/api/agentpb"
	"dormouse/monitor/tree"
)

// maxTreeMessage is what a node takes from another, in bytes: more than any
// report has, so that one that is too large is refused with a reason.
const maxTreeMessage = 2 * tree.MaxReport

// treeLinks connects a node of the monitoring tree with its parent, to which it
// speaks, and with its children, which speak to it. Both sides show the
// certificates that the controller gave them, in which their names are.
type treeLinks struct {
	agentpb.UnimplementedTreeServiceServer
	identity func() *identity
	log      *slog.Logger
	// node gets what comes. It is set before anything can come.
	node *treeNode

	life  context.Context
	end   context.CancelFunc
	calls sync.WaitGroup

	mu      sync.Mutex
	server  *grpc.Server // nil: no other node can reach this one
	address netip.AddrPort
	parent  parentLink
	waiting map[string]chan *tree.Ack // children whose report is not answered
}

// parentLink is the connection to the parent.
type parentLink struct {
	name, address string
	connection    *grpc.ClientConn
	stop          context.CancelFunc // of the call under way
}

func newTreeLinks(identity func() *identity, log *slog.Logger) *treeLinks {
	l := &treeLinks{identity: identity, log: log, waiting: map[string]chan *tree.Ack{}}
	l.life, l.end = context.WithCancel(context.Background())
	return l
}

// listen makes the node reachable at an address of its own and says where;
// without an address, nowhere. It may be repeated.
func (l *treeLinks) listen(at netip.Addr) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.server != nil && l.address.Addr() == at {
		return l.address.String()
	}
	if l.server != nil {
		l.calls.Go(l.server.Stop) // which waits for calls, and they need l.mu
		l.server = nil
	}
	if !at.IsValid() || l.life.Err() != nil {
		return ""
	}
	listener, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(at, 0)))
	if err != nil {
		l.log.Warn("other nodes cannot reach this one with what they measured", "error", err)
		return ""
	}
	l.address = listener.Addr().(*net.TCPAddr).AddrPort()
	l.address = netip.AddrPortFrom(l.address.Addr().Unmap(), l.address.Port())
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(l.serverTLS())), grpc.MaxRecvMsgSize(maxTreeMessage),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second}), grpc.MaxConcurrentStreams(8))
	agentpb.RegisterTreeServiceServer(server, l)
	l.server = server
	l.calls.Go(func() {
		if err := server.Serve(listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			l.log.Error("other nodes cannot reach this one any more", "error", err)
		}
	})
	return l.address.String()
}

// close ends everything.
func (l *treeLinks) close() {
	l.mu.Lock()
	l.end()
	server, parent := l.server, l.parent
	l.server, l.parent = nil, parentLink{}
	l.mu.Unlock()
	if server != nil {
		server.Stop()
	}
	parent.close()
	l.calls.Wait()
}

func (p parentLink) close() {
	if p.connection != nil {
		p.stop()
		p.connection.Close()
	}
}

// Report takes a child's report and answers when the controller has it. Who is
// no child, the node refuses.
func (l *treeLinks) Report(ctx context.Context, p *agentpb.TreeReport) (*agentpb.TreeAck, error) {
	child, err := callerOf(ctx)
	if err != nil {
		return nil, status.Error(codes.Unauthenticated, err.Error())
	}
	report, err := tree.ReportFrom(p)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	answer := make(chan *tree.Ack, 1)
	l.mu.Lock()
	l.waiting[child] = answer // of an earlier call nobody needs the answer any more
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.waiting[child] == answer {
			delete(l.waiting, child)
		}
	}()
	l.node.reported(child, report)
	select {
	case ack := <-answer:
		return ack.Proto(), nil
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// answer gives a child the answer it waits for. It does not wait.
func (l *treeLinks) answer(child string, a *tree.Ack) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if waiting := l.waiting[child]; waiting != nil {
		waiting <- a
		delete(l.waiting, child)
	}
}

// report tells the parent, for so long at most.
func (l *treeLinks) report(place tree.Assignment, r *tree.Report) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.life.Err() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(l.life, place.Period)
	client, err := l.dial(place.Parent, place.ParentAddress, cancel)
	l.calls.Go(func() {
		defer cancel()
		if err == nil {
			var answer *agentpb.TreeAck
			if answer, err = client.Report(ctx, r.Proto()); err == nil {
				l.node.answered(place.Parent, tree.AckFrom(answer))
				return
			}
		}
		l.log.Debug("the parent in the monitoring tree was not told", "parent", place.Parent, "error", err)
		l.node.unreachable(place.Parent, r.Round)
	})
}

// dial gives the connection to a parent; stop ends the call that is to come, when
// the next one begins. l.mu is held.
func (l *treeLinks) dial(name, address string, stop context.CancelFunc) (agentpb.TreeServiceClient, error) {
	if l.parent.connection == nil || l.parent.name != name || l.parent.address != address {
		l.parent.close()
		l.parent = parentLink{}
		pauses := backoff.DefaultConfig
		pauses.BaseDelay, pauses.MaxDelay = 100*time.Millisecond, 2*time.Second
		connection, err := grpc.NewClient("passthrough:///"+address,
			grpc.WithTransportCredentials(credentials.NewTLS(l.clientTLS(name))), grpc.WithAuthority(name),
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: pauses, MinConnectTimeout: time.Second}),
			grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		)
		if err != nil {
			return nil, err
		}
		l.parent = parentLink{name: name, address: address, connection: connection}
	} else {
		l.parent.stop()
	}
	l.parent.stop = stop
	return agentpb.NewTreeServiceClient(l.parent.connection), nil
}

func (l *treeLinks) serverTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			id := l.identity()
			return &tls.Config{
				Certificates: []tls.Certificate{id.certificate}, ClientCAs: id.roots,
				ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"},
			}, nil
		},
	}
}

// clientTLS wants the certificate of one node. The controller gives nodes
// certificates of clients, so what Go asks of a server's does not hold, and the
// same is asked here: that the authority signed it, for this name, and that it
// has not run out.
func (l *treeLinks) clientTLS(name string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: name,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &l.identity().certificate, nil },
		InsecureSkipVerify:   true, // VerifyConnection does
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 {
				return errors.New("no certificate was shown")
			}
			shown := state.PeerCertificates[0]
			_, err := shown.Verify(x509.VerifyOptions{Roots: l.identity().roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
			if err != nil {
				return err
			}
			if shown.Subject.CommonName != name {
				return fmt.Errorf("it is node %s that answers, not %s", shown.Subject.CommonName, name)
			}
			return nil
		},
	}
}

// callerOf is the node that calls, by the certificate it has shown.
func callerOf(ctx context.Context) (string, error) {
	from, _ := peer.FromContext(ctx)
	if from != nil {
		if info, ok := from.AuthInfo.(credentials.TLSInfo); ok && len(info.State.VerifiedChains) > 0 {
			return info.State.VerifiedChains[0][0].Subject.CommonName, nil
		}
	}
	return "", errors.New("no certificate was shown")
}
