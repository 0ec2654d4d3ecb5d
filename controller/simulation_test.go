package controller

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/pki"
	"dormouse/controller/store"
	"dormouse/controller/store/bolt"
	"dormouse/drivers"
	failures "dormouse/monitor/failure"
	"dormouse/repository"
	"dormouse/repository/backend"
)

// The tests in this package run a real controller, store and network protocol
// against agents that are simulated: their tasks are entries in a map. A
// world watches over all of them, also while controllers and agents come and go.

// patience bounds every wait of a test: long, because the machine is shared.
const patience = 30 * time.Second

// world is everything outside the controller: the nodes and the repository. It
// survives the controller's restarts.
type world struct {
	t          *testing.T
	dir        string
	repository *memoryRepository
	recovery   failures.Policy
	relief     Relief
	lease      time.Duration

	mu     sync.Mutex
	agents map[string]*simAgent
	addr   string
	pick   func() string // where there are several controllers, the one to dial next
	keys   *pki.PKI
	boot   func(cloud string) drivers.BootstrapFunc
	// fault decides what happens to a command, before it is carried out.
	fault func(a *simAgent, c *agentpb.Command) fault
}

// fault is what goes wrong with one command.
type fault struct {
	failure    *agentpb.Failure // answer this instead of doing it
	disconnect bool             // carry it out, and lose the stream instead of answering
	act        func()           // call this first
}

// simulation is a world with one controller.
type simulation struct {
	*world
	c      *Controller
	store  store.Store
	server *http.Server
	client *http.Client
	url    string
	token  string // of who asks
}

const adminToken = "secret-of-the-admin"

func newSimulation(t *testing.T, nodes ...string) *simulation {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), repository: newMemoryRepository(), agents: make(map[string]*simAgent)}
	w.lease = 3 * time.Second // many heartbeats: these machines stand still at times
	w.relief = Relief{Rest: 100 * time.Millisecond, Lull: 100 * time.Millisecond}
	w.recovery = failures.Policy{First: 20 * time.Millisecond}
	s := &simulation{world: w, token: adminToken}
	s.open()
	t.Cleanup(func() {
		w.stopAgents()
		s.close()
	})
	for _, node := range nodes {
		s.join(node)
	}
	s.awaitReady(nodes...)
	return s
}

// awaitReady waits until the nodes are ready.
func (s *simulation) awaitReady(nodes ...string) {
	s.t.Helper()
	s.awaitState(api.NodeReady, nodes...)
}

// awaitState waits until all nodes are in a state.
func (s *simulation) awaitState(state api.NodeState, nodes ...string) {
	s.t.Helper()
	s.eventually(fmt.Sprintf("%s: %s", strings.Join(nodes, ", "), state), func(tx store.Tx) (bool, error) {
		for _, node := range nodes {
			n, err := store.Get[nodeRecord](tx, store.Nodes, node)
			if err != nil || n.State != state {
				return false, ignoreMissing(err)
			}
		}
		return true, nil
	})
}

func ignoreMissing(err error) error {
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	return err
}

// open starts a controller on the world's files.
func (s *simulation) open() {
	s.t.Helper()
	must := func(err error) {
		s.t.Helper()
		if err != nil {
			s.t.Fatal(err)
		}
	}
	var err error
	s.store, err = bolt.Open(filepath.Join(s.dir, "controller.db"))
	must(err)
	keys, err := pki.Open(filepath.Join(s.dir, "pki"), time.Now)
	must(err)
	s.c, err = New(Parts{
		Store: s.store, PKI: keys, Repository: s.repository, RepositoryConfig: json.RawMessage(`{"backend":"memory"}`),
		AdminToken: adminToken, JoinToken: "shared", Version: "test",
		Heartbeat: 100 * time.Millisecond, Lease: s.lease, Margin: 300 * time.Millisecond, Grace: 200 * time.Millisecond, Retry: 200 * time.Millisecond, Watch: 100 * time.Millisecond,
		Recovery: s.recovery, Round: 200 * time.Millisecond, Relief: s.relief,
		AgentURL: func(string) string { return "https://" + s.addr },
	})
	must(err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	certificate, err := keys.Server(nil, slog.New(slog.DiscardHandler))
	must(err)
	s.server = &http.Server{Handler: s.c, TLSConfig: &tls.Config{
		GetCertificate: certificate.Get, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: keys.Pool(),
	}}
	go s.server.ServeTLS(listener, "", "")
	s.mu.Lock()
	s.addr, s.keys, s.boot = listener.Addr().String(), keys, s.c.Bootstrap
	s.mu.Unlock()
	s.url = "https://" + s.addr
	s.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: keys.Pool()}}}
	must(s.c.Start(s.t.Context()))
	for _, cloud := range []string{"east", "west"} {
		must(s.c.AddCloud(context.Background(), Cloud{Name: cloud, DriverName: driverLocal, Driver: &simDriver{world: s.world}}))
	}
	must(s.c.AddCloud(context.Background(), Cloud{Name: "metal", DriverName: driverStatic}))
}

// close ends the controller as a crash would: nothing is concluded.
func (s *simulation) close() {
	s.c.Stop()
	s.server.Close()
	s.client.CloseIdleConnections()
	if err := s.store.Close(); err != nil {
		s.t.Error(err)
	}
}

// restart replaces the controller by a new one on the same store.
func (s *simulation) restart() {
	s.t.Helper()
	s.close()
	s.open()
}

// eventually waits until cond holds in the store.
func (s *simulation) eventually(what string, cond func(store.Tx) (bool, error)) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := s.c.until(ctx, nil, cond); err != nil {
		s.t.Fatalf("waiting until %s: %v\n%s", what, err, s.dump())
	}
}

// dump tells the state of everything, for a test that failed.
func (s *simulation) dump() string {
	var text strings.Builder
	s.store.View(context.Background(), func(tx store.Tx) error {
		for _, table := range []store.Table{store.Jobs, store.Operations, store.Nodes, store.Checkpoints, store.Cleanups, store.Events} {
			tx.Scan(table, "", func(key string, value []byte) error {
				fmt.Fprintf(&text, "%s %s %s\n", table, key, value)
				return nil
			})
		}
		return nil
	})
	return text.String()
}

func (s *simulation) jobNow(id string) *jobRecord {
	s.t.Helper()
	job, err := s.c.job(context.Background(), id)
	if err != nil {
		s.t.Fatal(err)
	}
	return job
}

// awaitPhase waits until the job is in phase with no operation under way.
func (s *simulation) awaitPhase(id string, phase api.Phase) *jobRecord {
	s.t.Helper()
	s.eventually(fmt.Sprintf("job %s is %s", id, phase), func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, id)
		return err == nil && job.Phase == phase && job.Operation == "", err
	})
	return s.jobNow(id)
}

// awaitEnd waits until the operation has ended.
func (s *simulation) awaitEnd(id string) *opRecord {
	s.t.Helper()
	var op *opRecord
	s.eventually("operation "+id+" has ended", func(tx store.Tx) (ended bool, err error) {
		op, err = getOperation(tx, id)
		return err == nil && op.Phase != api.OpRunning, err
	})
	return op
}

// send makes a request and returns the status and body of the answer.
func (s *simulation) send(method, path string, body any) (status int, raw []byte, err error) {
	var reader io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		reader = strings.NewReader(b)
	default:
		encoded, err := json.Marshal(b)
		if err != nil {
			return 0, nil, err
		}
		reader = bytes.NewReader(encoded)
	}
	request, err := http.NewRequestWithContext(s.t.Context(), method, s.url+path, reader)
	if err != nil {
		return 0, nil, err
	}
	request.Header.Set("Authorization", "Bearer "+s.token)
	request.Header.Set("Content-Type", "application/json")
	response, raw, err := s.roundTrip(request)
	if err != nil {
		return 0, nil, err
	}
	if kind := response.Header.Get("Content-Type"); response.StatusCode >= 400 && kind != "application/problem+json" {
		err = fmt.Errorf("%s %s: status %d with content type %q: %s", method, path, response.StatusCode, kind, raw)
	}
	return response.StatusCode, raw, err
}

// roundTrip makes one request and reads its answer.
func (s *simulation) roundTrip(request *http.Request) (*http.Response, []byte, error) {
	response, err := s.client.Do(request)
	if err != nil {
		return nil, nil, err
	}
	defer response.Body.Close()
	raw, err := io.ReadAll(response.Body)
	return response, raw, err
}

// killNode cuts a node's power, from a goroutine of a test, which may end before
// there is an answer.
func (s *simulation) killNode(node string) {
	status, raw, err := s.send("POST", "/v1/nodes/"+node+"/kill", nil)
	if over := s.t.Context().Err() != nil; !over && (err != nil || status != http.StatusNoContent) {
		s.t.Errorf("kill node %s: status %d, %s, %v", node, status, raw, err)
	}
}

// call makes a request and decodes the answer into out; it returns the status
// and the detail of a problem.
func (s *simulation) call(method, path string, body any, out any) (int, string) {
	s.t.Helper()
	status, raw, err := s.send(method, path, body)
	if err != nil {
		s.t.Fatal(err)
	}
	if status >= 400 {
		var p api.Problem
		if err := json.Unmarshal(raw, &p); err != nil || p.Status != status || p.Detail == "" {
			s.t.Fatalf("%s %s: not a problem document: %s", method, path, raw)
		}
		return status, p.Detail
	}
	if out != nil {
		if err := json.Unmarshal(raw, out); err != nil {
			s.t.Fatalf("%s %s: %v in %s", method, path, err, raw)
		}
	}
	return status, ""
}

// want calls and fails the test unless the status is right.
func (s *simulation) want(status int, method, path string, body any, out any) string {
	s.t.Helper()
	got, detail := s.call(method, path, body, out)
	if got != status {
		s.t.Fatalf("%s %s: want status %d, got %d: %s\n%s", method, path, status, got, detail, s.dump())
	}
	return detail
}

// submit submits a job that runs until it is told to end.
func (s *simulation) submit(spec api.JobSpec) string {
	s.t.Helper()
	if spec.Command == nil {
		spec.Command = []string{"forever"}
	}
	var job api.JobDetail
	s.want(http.StatusCreated, "POST", "/v1/jobs", spec, &job)
	return job.ID
}

func (s *simulation) running(spec api.JobSpec) string {
	s.t.Helper()
	id := s.submit(spec)
	s.awaitPhase(id, api.PhaseRunning)
	return id
}

// begin starts an operation.
func (s *simulation) begin(path string, body any) api.Operation {
	s.t.Helper()
	var op api.Operation
	s.want(http.StatusAccepted, "POST", path, body, &op)
	return op
}

// do starts an operation and waits for its success.
func (s *simulation) do(path string, body any) *opRecord {
	s.t.Helper()
	op := s.awaitEnd(s.begin(path, body).ID)
	if op.Phase != api.OpDone {
		s.t.Fatalf("%s: operation %s is %s: %s\n%s", path, op.ID, op.Phase, op.Error, s.dump())
	}
	return op
}

// agent returns the node's agent.
func (w *world) agent(node string) *simAgent {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.agents[node]
}

func (w *world) stopAgents() {
	w.mu.Lock()
	agents := w.agents
	w.agents = map[string]*simAgent{}
	w.mu.Unlock()
	for _, a := range agents {
		a.stop()
	}
}

// join makes a node whose agent joins.
func (w *world) join(node string) *simAgent {
	cloud, _, _ := strings.Cut(node, "-")
	a := &simAgent{world: w, node: node, cloud: cloud, tasks: make(map[taskRef]*simTask), networks: make(map[taskRef]bool), answers: make(map[string]*agentpb.Reply), lanes: make(map[string]chan struct{}), appAnswers: make(chan *agentpb.AppAnswer, 16)}
	w.mu.Lock()
	w.agents[node] = a
	w.mu.Unlock()
	a.start()
	return a
}

// checkOneCopy fails the test when two tasks of one job and index could run.
// The caller holds the lock.
func (w *world) checkOneCopy(job string, index int) {
	alive := []string{}
	for _, a := range w.agents {
		for ref, t := range a.tasks {
			if ref.Job == job && ref.Index == index && t.alive && !t.fenced {
				alive = append(alive, fmt.Sprintf("run %d on %s", ref.Run, a.node))
			}
		}
	}
	if len(alive) > 1 {
		w.t.Errorf("job %s task %d runs twice: %s", job, index, strings.Join(alive, ", "))
	}
}

// simTask is a task of a simulated node.
type simTask struct {
	alive    bool
	frozen   string // for this checkpoint
	shut     bool   // cut off the job's network
	held     bool   // restored and waiting for its release
	captured string
	fenced   bool // by the end of the lease
	code     int32
	cpus     float64
	log      string
}

// simAgent is a node and its agent. Its tasks survive its streams, and die when
// its power is cut.
type simAgent struct {
	*world
	node, cloud string
	cut         bool // the network is cut: it cannot connect
	off         bool // the power is cut: nothing happens any more
	older       bool // it does not know Freeze.alone
	newer       bool // it knows RestoreTask.network

	// guarded by world.mu
	tasks    map[taskRef]*simTask
	networks map[taskRef]bool // made, of the first task's run
	answers  map[string]*agentpb.Reply
	seen     []string                 // steps of commands, in order of arrival
	lanes    map[string]chan struct{} // closed when the newest command of a lane is done

	appAnswers chan *agentpb.AppAnswer

	verdicts []*agentpb.TreeVerdict // that it has raised; guarded by world.mu
	heard    uint64                 // the last that is stored

	certificate *tls.Certificate
	cancel      context.CancelFunc
	done        chan struct{}
	conn        context.CancelFunc // of the present stream
	sendMu      sync.Mutex
	stream      grpc.BidiStreamingClient[agentpb.FromAgent, agentpb.ToAgent]
}

func (a *simAgent) start() {
	a.mu.Lock()
	a.off = false
	a.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	a.cancel, a.done = cancel, make(chan struct{})
	go func() {
		defer close(a.done)
		for ctx.Err() == nil {
			if err := a.connect(ctx); err != nil && ctx.Err() == nil {
				select { // as a real agent waits before it dials again
				case <-time.After(20 * time.Millisecond):
				case <-ctx.Done():
				}
			}
		}
	}()
}

// renew starts an agent again that knows RestoreTask.network, or does not.
func (s *simulation) renew(node string, newer bool) {
	s.t.Helper()
	a := s.agents[node]
	a.stop()
	a.newer = newer
	a.start()
	s.eventually("node "+node+" has said what it knows", func(tx store.Tx) (bool, error) {
		n, err := store.Get[nodeRecord](tx, store.Nodes, node)
		return err == nil && n.State == api.NodeReady && n.RestoresWithNetwork == newer, err
	})
}

func (a *simAgent) stop() {
	a.cancel()
	<-a.done
}

func (a *simAgent) dial() (*grpc.ClientConn, error) {
	a.mu.Lock()
	addr, keys, cut := a.addr, a.keys, a.cut
	if a.pick != nil {
		addr = a.pick()
	}
	a.mu.Unlock()
	if cut {
		return nil, errors.New("the network is cut")
	}
	config := &tls.Config{RootCAs: keys.Pool(), ServerName: pki.ServerName}
	if a.certificate != nil {
		config.Certificates = []tls.Certificate{*a.certificate}
	}
	return grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(credentials.NewTLS(config)))
}

func (a *simAgent) join(ctx context.Context) error {
	a.mu.Lock()
	boot := a.boot
	a.mu.Unlock()
	token := "shared"
	if a.cloud != "metal" {
		b, err := boot(a.cloud)(ctx, a.node)
		if err != nil {
			return err
		}
		token = b.Token
	}
	certificate, err := a.joinWith(ctx, token)
	if err != nil {
		return err
	}
	a.certificate = certificate
	return nil
}

func (a *simAgent) joinWith(ctx context.Context, token string) (*tls.Certificate, error) {
	conn, err := a.dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "whatever"}}, key)
	if err != nil {
		return nil, err
	}
	response, err := agentpb.NewAgentServiceClient(conn).Join(ctx, &agentpb.JoinRequest{Token: token, Node: a.node, Cloud: a.cloud, Csr: csr})
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{response.GetCertificate()}, PrivateKey: key}, nil
}

// connect holds one stream until it breaks.
func (a *simAgent) connect(ctx context.Context) error {
	if a.certificate == nil {
		if err := a.join(ctx); err != nil {
			return err
		}
	}
	conn, err := a.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	client := agentpb.NewAgentServiceClient(conn)
	stream, err := client.Connect(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&agentpb.FromAgent{Body: &agentpb.FromAgent_Hello{Hello: a.hello()}}); err != nil {
		return err
	}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	a.welcomed(first.GetWelcome())
	a.sendMu.Lock()
	a.stream = stream
	a.sendMu.Unlock()
	a.mu.Lock()
	a.conn = cancel
	a.mu.Unlock()
	a.sendEnded()
	var beats sync.WaitGroup
	defer beats.Wait()
	defer cancel()
	beats.Go(func() { a.beat(ctx, first.GetWelcome()) })
	for {
		message, err := stream.Recv()
		if err != nil {
			return err
		}
		if answer := message.GetAppAnswer(); answer != nil {
			a.appAnswers <- answer
		}
		for _, p := range message.GetTreeAck().GetStored() {
			a.mu.Lock()
			a.heard = p.GetSeq()
			a.mu.Unlock()
		}
		if command := message.GetCommand(); command != nil {
			turn := a.turn(command)
			go func() {
				defer turn()()
				a.handle(ctx, client, cancel, command)
			}()
		}
	}
}

// turn queues a command behind the earlier ones of its task, as a real agent
// does; storing goes on beside them. The function waits, and the one it returns
// lets the next one go.
func (a *simAgent) turn(c *agentpb.Command) func() (done func()) {
	lane := c.GetTask().String()
	if u := c.GetUpload(); u != nil {
		lane += u.GetCheckpoint()
	}
	over := make(chan struct{})
	a.mu.Lock()
	before := a.lanes[lane]
	a.lanes[lane] = over
	a.mu.Unlock()
	return func() func() {
		if before != nil {
			<-before
		}
		return func() { close(over) }
	}
}

func (a *simAgent) beat(ctx context.Context, w *agentpb.Welcome) {
	tick := time.NewTicker(time.Duration(w.GetHeartbeatMs()) * time.Millisecond)
	defer tick.Stop()
	for seq := uint64(1); ; seq++ {
		select {
		case <-tick.C:
			a.send(&agentpb.FromAgent{Body: &agentpb.FromAgent_Heartbeat{Heartbeat: &agentpb.Heartbeat{Seq: seq}}})
		case <-ctx.Done():
			return
		}
	}
}

func (a *simAgent) send(m *agentpb.FromAgent) {
	a.sendMu.Lock()
	defer a.sendMu.Unlock()
	if a.stream != nil {
		a.stream.Send(m) // a broken stream is seen by its reader
	}
}

// sendEnded tells again of tasks that have ended: on the stream before, or since
// the Hello, nobody may have heard it.
func (a *simAgent) sendEnded() {
	a.mu.Lock()
	var ended []*agentpb.TaskState
	for ref, t := range a.tasks {
		if !t.alive {
			ended = append(ended, stateOf(ref, t))
		}
	}
	a.mu.Unlock()
	for _, state := range ended {
		a.send(&agentpb.FromAgent{Body: &agentpb.FromAgent_TaskEvent{TaskEvent: &agentpb.TaskEvent{State: state}}})
	}
}

func (a *simAgent) hello() *agentpb.Hello {
	a.mu.Lock()
	defer a.mu.Unlock()
	h := &agentpb.Hello{Node: a.node, Cloud: a.cloud, Cpus: simCPUs, MemBytes: 8 << 30, CriuVersion: "4.2.1", AgentVersion: "sim", RestoresWithNetwork: a.newer}
	for ref, t := range a.tasks {
		h.Tasks = append(h.Tasks, stateOf(ref, t))
	}
	return h
}

func stateOf(ref taskRef, t *simTask) *agentpb.TaskState {
	state := &agentpb.TaskState{Task: ref.proto(), Phase: string(api.PhaseRunning), Pid: 4711}
	switch {
	case !t.alive:
		state.Exited, state.ExitCode, state.Phase, state.Pid = true, t.code, string(api.PhaseCompleted), 0
		if t.code != 0 {
			state.Phase = string(api.PhaseFailed)
		}
	case t.frozen != "":
		state.Phase, state.Checkpoint = string(api.PhaseSuspending), t.frozen
	}
	return state
}

func (a *simAgent) refOf(r *agentpb.TaskRef) taskRef {
	return taskRef{Node: a.node, Job: r.GetJob(), Index: int(r.GetIndex()), Run: r.GetRun()}
}

// welcomed does what the controller decided: destroy, or go on.
func (a *simAgent) welcomed(w *agentpb.Welcome) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range w.GetDestroy() {
		if t := a.tasks[a.refOf(r)]; t != nil && t.alive {
			t.alive, t.code = false, 137
		}
	}
	for _, r := range w.GetKeep() {
		if t := a.tasks[a.refOf(r)]; t != nil {
			t.fenced = false
			a.checkOneCopy(r.GetJob(), int(r.GetIndex()))
		}
	}
}

// handle answers one command, as the world's fault says.
func (a *simAgent) handle(ctx context.Context, client agentpb.AgentServiceClient, disconnect func(), c *agentpb.Command) {
	a.mu.Lock()
	a.seen = append(a.seen, stepIn(c.GetId()))
	known, decide := a.answers[c.GetId()], a.fault
	a.mu.Unlock()
	f := fault{}
	if decide != nil {
		f = decide(a, c)
	}
	if f.act != nil {
		f.act()
	}
	reply := known
	if reply == nil {
		reply = &agentpb.Reply{Id: c.GetId(), Failure: f.failure}
		if f.failure == nil {
			reply = a.carryOut(ctx, client, c)
		}
		a.mu.Lock()
		a.answers[c.GetId()] = reply
		a.mu.Unlock()
	}
	if f.disconnect {
		disconnect()
		return
	}
	a.send(&agentpb.FromAgent{Body: &agentpb.FromAgent_Reply{Reply: reply}})
}

// stepIn is the step in a command's id.
func stepIn(id string) string {
	parts := strings.Split(id, "/")
	if len(parts) == 4 && strings.HasPrefix(id, "o-") {
		return parts[2]
	}
	return parts[0]
}

func broken(c *agentpb.Command, format string, args ...any) *agentpb.Reply {
	return &agentpb.Reply{Id: c.GetId(), Failure: &agentpb.Failure{Message: fmt.Sprintf(format, args...)}}
}

func (a *simAgent) carryOut(ctx context.Context, client agentpb.AgentServiceClient, c *agentpb.Command) *agentpb.Reply {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.off {
		return broken(c, "the power is off")
	}
	ref := a.refOf(c.GetTask())
	t := a.tasks[ref]
	reply := &agentpb.Reply{Id: c.GetId()}
	steps := []byte(`{"pause_ms":12.5,"dump_ms":10}`)
	needsTask := func() bool { return t != nil && t.alive }
	switch body := c.GetBody().(type) {
	case *agentpb.Command_PrepareNetwork:
		a.networks[ref.run()] = true
		reply.Result = &agentpb.Reply_Network{Network: &agentpb.NetworkEndpoint{Address: a.node + ":51820", PublicKey: []byte(a.node)}}
	case *agentpb.Command_ConnectNetwork:
		for _, peer := range body.ConnectNetwork.GetPeers() {
			if string(peer.GetEndpoint().GetPublicKey()) != peer.GetNode() || peer.GetNode() == a.node || len(peer.GetVirtualIps()) == 0 {
				return broken(c, "peer %v makes no sense", peer)
			}
		}
	case *agentpb.Command_OpenNetwork:
		if t == nil || !t.alive {
			return broken(c, "no such task")
		}
		if t.shut { // opening what is open does nothing
			a.mustStandStill(ref, "opened")
		}
		t.shut = false
	case *agentpb.Command_Release:
		if t == nil || !t.held && !t.alive {
			return broken(c, "the task is not held")
		}
		a.mustBeOpen(ref)
		t.held = false
		reply.Result = &agentpb.Reply_Restored{Restored: stateOf(ref, t)}
	case *agentpb.Command_Start:
		if !a.networks[ref.run()] {
			return broken(c, "the job's network was not prepared")
		}
		t = a.create(ref, body.Start.GetSpec(), "")
		reply.Result = &agentpb.Reply_Started{Started: stateOf(ref, t)}
	case *agentpb.Command_Restore:
		if _, err := a.repository.LoadManifest(ctx, body.Restore.GetCheckpoint(), nil); err != nil {
			return broken(c, "%v", err)
		}
		if body.Restore.GetNetwork() != nil && a.newer {
			a.networks[ref.run()] = true
		}
		if !a.networks[ref.run()] {
			return broken(c, "the job's network was not prepared")
		}
		t = a.create(ref, body.Restore.GetSpec(), "restored from "+body.Restore.GetCheckpoint()+"\n")
		t.held = body.Restore.GetHold()
		t.shut = t.held
		reply.Result = &agentpb.Reply_Restored{Restored: stateOf(ref, t)}
	case *agentpb.Command_Preflight:
		if !needsTask() {
			return broken(c, "no such task")
		}
		reply.Result = &agentpb.Reply_Preflight{Preflight: &agentpb.PreflightResult{EstimatedBytes: 1}}
	case *agentpb.Command_Freeze:
		if !needsTask() {
			return broken(c, "no such task")
		}
		t.frozen = body.Freeze.GetCheckpoint()
		if body.Freeze.GetAlone() && !a.older {
			if len(a.tasksOf(ref.Job)) > 1 {
				return broken(c, "the task is not alone")
			}
			t.captured, t.frozen = t.frozen, ""
		}
	case *agentpb.Command_Capture:
		if t != nil && t.captured == body.Capture.GetCheckpoint() {
			reply.Result = &agentpb.Reply_Captured{Captured: &agentpb.CaptureResult{Steps: steps}}
			return reply
		}
		if !needsTask() || t.frozen != body.Capture.GetCheckpoint() {
			return broken(c, "the task is not frozen for checkpoint %s", body.Capture.GetCheckpoint())
		}
		a.mustStandStill(ref, "captured")
		t.captured, t.shut = t.frozen, true
		reply.Result = &agentpb.Reply_Captured{Captured: &agentpb.CaptureResult{Steps: steps}}
	case *agentpb.Command_Thaw:
		if t != nil {
			if !body.Thaw.GetAbort() {
				t.shut = t.shut && len(a.tasksOf(ref.Job)) > 1 // a single task is reconnected by its thaw
				a.mustBeOpen(ref)
			}
			t.frozen, t.shut = "", false
			if body.Thaw.GetAbort() {
				t.captured = ""
			}
		}
	case *agentpb.Command_Upload:
		if t == nil || t.captured != body.Upload.GetCheckpoint() {
			return broken(c, "checkpoint %s was not captured here", body.Upload.GetCheckpoint())
		}
		part, _ := json.Marshal(repository.TaskManifest{Index: ref.Index, Part: "p", SizeBytes: 1000, StoredBytes: 100, NewBytes: 10, CRIU: "4.2.1"})
		reply.Result = &agentpb.Reply_Uploaded{Uploaded: &agentpb.UploadResult{Part: part, Steps: steps}}
	case *agentpb.Command_Discard:
		if t != nil {
			t.captured = ""
		}
	case *agentpb.Command_Signal:
		if !needsTask() {
			return broken(c, "no such task")
		}
		if t.log != "deaf" {
			go a.exit(ref, 128+body.Signal.GetSignal())
		}
	case *agentpb.Command_Destroy:
		if t != nil && t.alive {
			t.alive, t.code = false, 137
		}
		if !body.Destroy.GetKeepLogs() {
			delete(a.tasks, ref)
		}
	case *agentpb.Command_OpenStream:
		if t == nil {
			return broken(c, "no such task")
		}
		go a.attach(ctx, client, t.log, body.OpenStream)
	}
	return reply
}

// tasksOf are the living tasks of a job's present run on all nodes. The caller
// holds the lock.
func (w *world) tasksOf(job string) map[taskRef]*simTask {
	tasks := map[taskRef]*simTask{}
	for _, a := range w.agents {
		for ref, t := range a.tasks {
			if ref.Job == job && t.alive {
				tasks[ref] = t
			}
		}
	}
	return tasks
}

// mustStandStill checks that no task of the job runs while one is captured or
// reconnected.
func (w *world) mustStandStill(of taskRef, what string) {
	for ref, t := range w.tasksOf(of.Job) {
		if ref.Run == of.Run && t.frozen == "" && !t.held {
			w.t.Errorf("task %d of job %s is %s while task %d runs", of.Index, of.Job, what, ref.Index)
		}
	}
}

// mustBeOpen checks that every task of the job is reconnected before one goes on.
func (w *world) mustBeOpen(of taskRef) {
	for ref, t := range w.tasksOf(of.Job) {
		if ref.Run == of.Run && t.shut {
			w.t.Errorf("task %d of job %s goes on while task %d is cut off", of.Index, of.Job, ref.Index)
		}
	}
}

// create makes a task. The caller holds the lock.
// run names the run of a task's job.
func (r taskRef) run() taskRef { return taskRef{Job: r.Job, Run: r.Run} }

func (a *simAgent) create(ref taskRef, spec []byte, log string) *simTask {
	t := a.tasks[ref]
	if t == nil {
		var s api.JobSpec
		if err := json.Unmarshal(spec, &s); err != nil {
			a.t.Errorf("task %+v has a spec that cannot be read: %v", ref, err)
		}
		t = &simTask{alive: true, cpus: s.CPUs, log: log + fmt.Sprintf("run %d on %s\n", ref.Run, ref.Node)}
		a.tasks[ref] = t
	}
	a.checkOneCopy(ref.Job, ref.Index)
	a.checkCapacity()
	return t
}

// checkCapacity fails the test when the node holds more than it has. The caller
// holds the lock.
func (a *simAgent) checkCapacity() {
	used := 0.0
	for _, t := range a.tasks {
		if t.alive {
			used += t.cpus
		}
	}
	if used > simCPUs {
		a.t.Errorf("node %s holds tasks of %g processors, and has %d", a.node, used, simCPUs)
	}
}

// simCPUs is how many processors a simulated node has.
const simCPUs = 4

// attach serves logs, or an exec that echoes its input.
func (a *simAgent) attach(ctx context.Context, client agentpb.AgentServiceClient, log string, open *agentpb.OpenStream) {
	stream, err := client.Attach(ctx)
	if err != nil {
		return
	}
	stream.Send(&agentpb.Frame{Stream: open.GetStream()})
	if open.GetLogs() != nil {
		stream.Send(&agentpb.Frame{Body: &agentpb.Frame_Stdout{Stdout: []byte(log)}})
		stream.CloseSend()
		stream.Recv()
		return
	}
	for {
		frame, err := stream.Recv()
		if err != nil {
			return
		}
		if data := frame.GetStdin(); len(data) > 0 {
			stream.Send(&agentpb.Frame{Body: &agentpb.Frame_Stdout{Stdout: data}})
			continue
		}
		stream.Send(&agentpb.Frame{Body: &agentpb.Frame_Exit{Exit: &agentpb.Exit{Code: 7}}})
		stream.CloseSend()
		stream.Recv()
		return
	}
}

// exit ends a task by itself.
func (a *simAgent) exit(ref taskRef, code int32) {
	a.mu.Lock()
	t := a.tasks[ref]
	if t == nil || !t.alive {
		a.mu.Unlock()
		return
	}
	t.alive, t.code = false, code
	state := stateOf(ref, t)
	a.mu.Unlock()
	a.send(&agentpb.FromAgent{Body: &agentpb.FromAgent_TaskEvent{TaskEvent: &agentpb.TaskEvent{State: state}}})
}

// end makes task 0 of a job exit.
func (s *simulation) end(job string, code int32) {
	s.t.Helper()
	ref := s.jobNow(job).refs()[0]
	s.agent(ref.Node).exit(ref, code)
}

// cutPower ends the agent and all tasks at once.
func (a *simAgent) cutPower() {
	a.mu.Lock()
	a.off = true
	clear(a.networks)
	a.mu.Unlock()
	a.stop()
	a.mu.Lock()
	defer a.mu.Unlock()
	for ref, t := range a.tasks {
		if t.alive {
			delete(a.tasks, ref)
		}
	}
	a.answers = make(map[string]*agentpb.Reply)
}

// cutNetwork keeps the agent from reaching the controller. Its tasks run on
// until fence is called, as at the end of the lease.
func (a *simAgent) cutNetwork(cut bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cut = cut
	if cut && a.conn != nil {
		a.conn()
	}
}

func (a *simAgent) fence() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, t := range a.tasks {
		t.fenced = true
	}
}

// aliveTasks are the tasks of a job that are alive, on any node.
func (w *world) aliveTasks(job string) (refs []taskRef) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range w.agents {
		for ref, t := range a.tasks {
			if ref.Job == job && t.alive {
				refs = append(refs, ref)
			}
		}
	}
	return refs
}

// stillFrozen are the tasks of a job that are frozen for a checkpoint.
func (w *world) stillFrozen(job string) (refs []taskRef) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range w.agents {
		for ref, t := range a.tasks {
			if ref.Job == job && t.alive && t.frozen != "" {
				refs = append(refs, ref)
			}
		}
	}
	return refs
}

func (w *world) setFault(decide func(*simAgent, *agentpb.Command) fault) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fault = decide
}

// faultOnce makes f happen to the first command of a step.
func (w *world) faultOnce(step string, f func(a *simAgent) fault) (hit <-chan struct{}) {
	happened := make(chan struct{})
	var once sync.Once
	w.setFault(func(a *simAgent, c *agentpb.Command) (out fault) {
		if stepIn(c.GetId()) == step {
			once.Do(func() {
				out = f(a)
				close(happened)
			})
		}
		return out
	})
	return happened
}

// simDriver makes simulated nodes, and cuts and restores their power.
type simDriver struct {
	world *world
	// make, when it is given, is called before a node is made, and may refuse to.
	make func(ctx context.Context, node string) error
}

func (d *simDriver) Provision(ctx context.Context, specs []drivers.NodeSpec) (made []drivers.Node, err error) {
	for _, spec := range specs {
		if d.world.agent(spec.Name) == nil {
			if d.make != nil {
				if err := d.make(ctx, spec.Name); err != nil {
					return made, err
				}
			}
			d.world.join(spec.Name)
		}
		made = append(made, drivers.Node{Name: spec.Name, Power: drivers.PowerOn})
	}
	return made, nil
}
func (d *simDriver) Nodes(context.Context) (nodes []drivers.Node, err error) {
	d.world.mu.Lock()
	defer d.world.mu.Unlock()
	for name := range d.world.agents {
		nodes = append(nodes, drivers.Node{Name: name, Power: drivers.PowerOn})
	}
	return nodes, nil
}
func (d *simDriver) Release(_ context.Context, node string) error {
	a := d.world.agent(node)
	if a == nil {
		return nil
	}
	a.cutPower()
	d.world.mu.Lock()
	defer d.world.mu.Unlock()
	delete(d.world.agents, node)
	return nil
}
func (d *simDriver) Close(context.Context) error { return nil }
func (d *simDriver) PowerOff(_ context.Context, node string) error {
	d.world.agent(node).cutPower()
	return nil
}
func (d *simDriver) PowerOn(_ context.Context, node string) error {
	d.world.agent(node).start()
	return nil
}
func (d *simDriver) Events(ctx context.Context) (<-chan drivers.Event, error) {
	events := make(chan drivers.Event)
	context.AfterFunc(ctx, func() { close(events) })
	return events, nil
}

// memoryRepository keeps manifests in memory.
type memoryRepository struct {
	mu        sync.Mutex
	manifests map[string]*repository.Manifest
	put       func() error // fails PutManifest
	bad       map[string]error
	hangs     atomic.Bool // verify does, until it is called off
	collected int
}

func newMemoryRepository() *memoryRepository {
	return &memoryRepository{manifests: make(map[string]*repository.Manifest), bad: make(map[string]error)}
}

func (r *memoryRepository) PutManifest(_ context.Context, m *repository.Manifest, _ repository.Signer) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.put != nil {
		if err := r.put(); err != nil {
			return err
		}
	}
	if r.manifests[m.Checkpoint] != nil {
		return backend.ErrExist
	}
	r.manifests[m.Checkpoint] = m
	return nil
}

func (r *memoryRepository) LoadManifest(_ context.Context, id string, _ *repository.Verifier) (*repository.Manifest, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.bad[id]; err != nil {
		return nil, err
	}
	if m := r.manifests[id]; m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("read the manifest of checkpoint %s: %w", id, backend.ErrNotExist)
}

func (r *memoryRepository) RemoveManifest(_ context.Context, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.manifests[id] == nil {
		return backend.ErrNotExist
	}
	delete(r.manifests, id)
	return nil
}

func (r *memoryRepository) GC(context.Context, repository.GCOptions) (repository.GCStats, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.collected++
	return repository.GCStats{}, nil
}

func (r *memoryRepository) Verify(ctx context.Context, _ *repository.Verifier, ids []string, progress func(int64, int64)) (*repository.VerifyReport, error) {
	if r.hangs.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	progress(1, 1)
	report := &repository.VerifyReport{Checkpoints: map[string]*repository.CheckpointReport{}}
	for id := range r.manifests {
		if len(ids) == 0 || ids[0] == id {
			report.Checkpoints[id] = &repository.CheckpointReport{Bytes: 100}
		}
	}
	return report, nil
}

func (r *memoryRepository) ids() (ids []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id := range r.manifests {
		ids = append(ids, id)
	}
	return ids
}
