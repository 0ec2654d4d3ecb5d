package fleet

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"dormouse/api"
	"dormouse/api/agentpb"
)

// Pauses between two attempts to reach the controller, as of the real agent.
const (
	firstPause = 100 * time.Millisecond
	maxPause   = 5 * time.Second
)

type taskKey struct {
	job   string
	index int32
	run   int64
}

func keyOf(ref *agentpb.TaskRef) taskKey {
	return taskKey{ref.GetJob(), ref.GetIndex(), ref.GetRun()}
}

func (k taskKey) ref() *agentpb.TaskRef {
	return &agentpb.TaskRef{Job: k.job, Index: k.index, Run: k.run}
}

// task is one simulated task.
type task struct {
	exited bool
	code   int32
}

func (t *task) state(key taskKey) *agentpb.TaskState {
	if t.exited {
		phase := api.PhaseCompleted
		if t.code != 0 {
			phase = api.PhaseFailed
		}
		return &agentpb.TaskState{Task: key.ref(), Phase: string(phase), Exited: true, ExitCode: t.code}
	}
	return &agentpb.TaskState{Task: key.ref(), Phase: string(api.PhaseRunning), Pid: 4711}
}

// agent is one simulated node.
type agent struct {
	fleet       *Fleet
	node        string
	turns       chan struct{} // held while joining
	certificate *tls.Certificate

	mu    sync.Mutex
	tasks map[taskKey]*task
	err   error // of the last session

	sendMu sync.Mutex
}

func (a *agent) failure() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

func (a *agent) alive() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	for _, t := range a.tasks {
		if !t.exited {
			n++
		}
	}
	return n
}

// live keeps a session with the controller until ctx ends.
func (a *agent) live(ctx context.Context) {
	pause := firstPause
	for ctx.Err() == nil {
		welcomed, err := a.session(ctx)
		a.mu.Lock()
		a.err = err
		a.mu.Unlock()
		if welcomed {
			pause = firstPause
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, maxPause)
	}
}

func (a *agent) dial() (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+a.fleet.options.Address, grpc.WithTransportCredentials(credentials.NewTLS(a.fleet.tls(a.certificate))),
		grpc.WithReadBufferSize(4<<10), grpc.WithWriteBufferSize(4<<10)) // a thousand of them share a process
}

// join trades the join token for a certificate.
func (a *agent) join(ctx context.Context) error {
	select {
	case a.turns <- struct{}{}:
		defer func() { <-a.turns }()
	case <-ctx.Done():
		return ctx.Err()
	}
	conn, err := a.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	o := a.fleet.options
	response, err := agentpb.NewAgentServiceClient(conn).Join(ctx, &agentpb.JoinRequest{Token: o.Token, Node: a.node, Cloud: o.Cloud, Csr: csr})
	if err != nil {
		return err
	}
	a.certificate = &tls.Certificate{Certificate: [][]byte{response.GetCertificate()}, PrivateKey: key}
	return nil
}

// session holds one stream until it breaks, and reports whether the controller
// welcomed the agent.
func (a *agent) session(ctx context.Context) (welcomed bool, err error) {
	if a.certificate == nil {
		if err := a.join(ctx); err != nil {
			return false, err
		}
	}
	conn, err := a.dial()
	if err != nil {
		return false, err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := agentpb.NewAgentServiceClient(conn).Connect(ctx)
	if err != nil {
		return false, err
	}
	if err := stream.Send(&agentpb.FromAgent{Body: &agentpb.FromAgent_Hello{Hello: a.hello()}}); err != nil {
		return false, err
	}
	first, err := stream.Recv()
	if err != nil {
		return false, err
	}
	welcome := first.GetWelcome()
	if welcome == nil {
		return false, errors.New("the controller's first message is no welcome")
	}
	a.obey(welcome)
	select {
	case a.fleet.welcome <- struct{}{}:
	default: // nobody counts
	}
	var beating sync.WaitGroup
	defer beating.Wait()
	defer cancel()
	beating.Go(func() { a.beat(ctx, stream, time.Duration(welcome.GetHeartbeatMs())*time.Millisecond) })
	for {
		message, err := stream.Recv()
		if err != nil {
			return true, err
		}
		if message.GetHeartbeatAck() != nil {
			a.fleet.beats.Add(1)
		}
		if command := message.GetCommand(); command != nil {
			a.send(stream, &agentpb.FromAgent{Body: &agentpb.FromAgent_Reply{Reply: a.carryOut(command)}})
		}
	}
}

type connection = grpc.BidiStreamingClient[agentpb.FromAgent, agentpb.ToAgent]

// send may be called by several goroutines. A broken stream is seen by its reader.
func (a *agent) send(stream connection, m *agentpb.FromAgent) {
	a.sendMu.Lock()
	defer a.sendMu.Unlock()
	stream.Send(m)
}

// beat sends heartbeats, and begins somewhere in the period: real agents do not
// beat in step either.
func (a *agent) beat(ctx context.Context, stream connection, period time.Duration) {
	phase := time.Duration(math.Mod(float64(time.Now().UnixNano()), float64(period)))
	for seq, wait := uint64(1), phase; ; seq, wait = seq+1, period {
		select {
		case <-time.After(wait):
			a.send(stream, &agentpb.FromAgent{Body: &agentpb.FromAgent_Heartbeat{Heartbeat: &agentpb.Heartbeat{Seq: seq}}})
		case <-ctx.Done():
			return
		}
	}
}

func (a *agent) hello() *agentpb.Hello {
	a.mu.Lock()
	defer a.mu.Unlock()
	o := a.fleet.options
	h := &agentpb.Hello{Node: a.node, Cloud: o.Cloud, Cpus: o.CPUs, MemBytes: o.MemBytes, CriuVersion: "4.2", AgentVersion: "fleet"}
	for key, t := range a.tasks {
		h.Tasks = append(h.Tasks, t.state(key))
	}
	return h
}

// obey destroys what the controller says must not be.
func (a *agent) obey(w *agentpb.Welcome) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, ref := range w.GetDestroy() {
		if t := a.tasks[keyOf(ref)]; t != nil && !t.exited {
			t.exited, t.code = true, 137
		}
	}
}

// carryOut does what can be done without a process: start, signal, destroy.
// Every command may come again.
func (a *agent) carryOut(c *agentpb.Command) *agentpb.Reply {
	a.mu.Lock()
	defer a.mu.Unlock()
	key := keyOf(c.GetTask())
	t := a.tasks[key]
	reply := &agentpb.Reply{Id: c.GetId()}
	switch body := c.GetBody().(type) {
	case *agentpb.Command_Start:
		if t == nil {
			t = &task{}
			a.tasks[key] = t
			if a.fleet.options.Started != nil {
				a.fleet.options.Started(key.job, time.Now())
			}
		}
		reply.Result = &agentpb.Reply_Started{Started: t.state(key)}
	case *agentpb.Command_PrepareNetwork:
		reply.Result = &agentpb.Reply_Network{Network: &agentpb.NetworkEndpoint{Address: a.node + ":51820", PublicKey: []byte(a.node)}}
	case *agentpb.Command_ConnectNetwork, *agentpb.Command_OpenNetwork, *agentpb.Command_Discard:
	case *agentpb.Command_Destroy:
		if t != nil && !t.exited {
			t.exited, t.code = true, 137
		}
		if !body.Destroy.GetKeepLogs() {
			delete(a.tasks, key)
		}
	default:
		reply.Failure = &agentpb.Failure{Message: "a simulated agent cannot do this", Refused: true}
	}
	return reply
}
