package agent

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"dormouse/agent/criu"
	"dormouse/agent/network"
	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/internal/ownnet"
	"dormouse/monitor/tree"
	"dormouse/repository"
	"dormouse/repository/backend/local"
)

// agentConfigVariable makes the test binary an agent with the configuration
// file that it names.
const agentConfigVariable = "DORMOUSE_TEST_AGENT"

// tools are the programs that agents under test use.
var tools struct{ dir, init, shim, why string }

func TestMain(m *testing.M) {
	if path := os.Getenv(agentConfigVariable); path != "" {
		if err := runAgent(path); err != nil {
			fmt.Fprintln(os.Stderr, "agent:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) > 1 && os.Args[1] == "network-holder" { // an agent under test starts its own program for this
		if err := network.RunHolder(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "network-holder:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if err := ownnet.EnterIfRoot(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if err := buildTools(); err != nil {
		tools.why = err.Error()
	}
	code := m.Run()
	os.RemoveAll(tools.dir)
	os.Exit(code)
}

func runAgent(path string) error {
	config, err := LoadConfig(path)
	if err != nil {
		return err
	}
	config.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	a, err := New(config)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return a.Run(ctx)
}

func buildTools() error {
	if os.Geteuid() != 0 {
		return errors.New("these tests need root")
	}
	var err error
	if tools.dir, err = os.MkdirTemp("", "dormouse-agent-tools"); err != nil {
		return err
	}
	tools.init = filepath.Join(tools.dir, "dormouse-init")
	build := exec.Command("go", "build", "-o", tools.init, "dormouse/cmd/dormouse-init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build dormouse-init: %v: %s", err, out)
	}
	tools.shim = filepath.Join(tools.dir, "libdormouse-criu.so")
	if out, err := exec.Command("gcc", "-shared", "-fPIC", "-O2", "-o", tools.shim, "criu/shim/prlimit.c").CombinedOutput(); err != nil {
		return fmt.Errorf("build the preload library: %v: %s", err, out)
	}
	engine, err := criu.New(context.Background(), criu.Options{Shim: tools.shim, Libexec: filepath.Join(tools.dir, "libexec")})
	if err != nil {
		return err
	}
	_ = engine
	return nil
}

// needTools skips a test where sandboxes cannot be made; under CI that is a
// failure.
func needTools(t *testing.T) {
	t.Helper()
	if tools.why == "" {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal(tools.why)
	}
	t.Skip(tools.why)
}

// controller is a small one that speaks the real protocol.
type controller struct {
	agentpb.UnimplementedAgentServiceServer
	t      *testing.T
	dir    string
	repo   *repository.Repository
	signer repository.Signer
	verify *repository.Verifier
	public ed25519.PublicKey
	server *grpc.Server
	ca     *x509.Certificate
	caKey  ed25519.PrivateKey
	lease  time.Duration
	aged   bool                 // certificates of agents that join are due to be renewed
	plan   *agentpb.NetworkPlan // of every job: each has a network of its own

	mu      sync.Mutex
	nodes   map[string]*connection
	changed chan struct{} // closed and replaced at each change
	replies map[string]*agentpb.Reply
	events  []*agentpb.TaskState
	asked   []*agentpb.AppRequest
	places  map[string]*agentpb.TreeAssignment // in the monitoring tree
	told    []*agentpb.TreeReport
	heard   map[tree.Position]bool
	found   []api.Finding
	streams map[string]chan agentpb.AgentService_AttachServer
	deaf    bool // heartbeats are not acknowledged
	destroy []*agentpb.TaskRef
	next    int
	shown   []string // serial numbers of the certificates that said hello
	issued  []string // of those that were given out
}

// connection is one agent's stream.
type connection struct {
	hello  *agentpb.Hello
	stream agentpb.AgentService_ConnectServer
	sendMu sync.Mutex
	cancel context.CancelFunc
}

func newController(t *testing.T) *controller {
	t.Helper()
	needTools(t)
	dir, err := os.MkdirTemp("", "dm") // sockets need short paths
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := &controller{
		t: t, dir: dir, lease: 30 * time.Second, nodes: map[string]*connection{}, changed: make(chan struct{}),
		heard: map[tree.Position]bool{}, places: map[string]*agentpb.TreeAssignment{}, replies: map[string]*agentpb.Reply{}, streams: map[string]chan agentpb.AgentService_AttachServer{},
		plan: &agentpb.NetworkPlan{Subnet: "10.77.0.0/20", Gateway: "10.77.15.254", Number: 7, Tasks: 1},
	}
	c.openRepository()
	c.listen()
	return c
}

func (c *controller) openRepository() {
	path := filepath.Join(c.dir, "repository")
	backend, err := local.Open(path)
	must(c.t, err)
	must(c.t, repository.Init(c.t.Context(), backend))
	c.repo, err = repository.Open(c.t.Context(), backend, repository.Options{CacheDir: filepath.Join(c.dir, "cache")})
	must(c.t, err)
	c.t.Cleanup(func() { c.repo.Close() })
	public, private, err := ed25519.GenerateKey(rand.Reader)
	must(c.t, err)
	c.public = public
	c.signer, c.verify = repository.NewSigner(private), repository.NewVerifier(public)
}

func (c *controller) listen() {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	must(c.t, err)
	c.caKey = private
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	must(c.t, err)
	c.ca, err = x509.ParseCertificate(der)
	must(c.t, err)
	must(c.t, os.WriteFile(filepath.Join(c.dir, "ca.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))

	serverPublic, serverKey, err := ed25519.GenerateKey(rand.Reader)
	must(c.t, err)
	pool := x509.NewCertPool()
	pool.AddCert(c.ca)
	config := &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{c.certify("dormouse", serverPublic, time.Hour)}, PrivateKey: serverKey}},
		ClientAuth:   tls.VerifyClientCertIfGiven, ClientCAs: pool,
	}
	listener, err := net.Listen("unix", c.socket())
	must(c.t, err)
	c.server = grpc.NewServer(grpc.Creds(credentials.NewTLS(config)))
	agentpb.RegisterAgentServiceServer(c.server, c)
	go c.server.Serve(listener)
	c.t.Cleanup(c.server.Stop)
}

func (c *controller) socket() string { return filepath.Join(c.dir, "s") }

// certify signs a certificate that has an hour left, and is of the given age.
func (c *controller) certify(name string, key any, age time.Duration) []byte {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-age), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.ca, key, c.caKey)
	must(c.t, err)
	return der
}

func (c *controller) Join(_ context.Context, r *agentpb.JoinRequest) (*agentpb.JoinResponse, error) {
	if r.GetToken() != "open sesame" {
		return nil, status.Error(codes.Unauthenticated, "the join token is wrong")
	}
	age := time.Duration(0)
	if c.aged {
		age = 2 * time.Hour
	}
	certificate, err := c.issue(r.GetNode(), r.GetCsr(), age)
	return &agentpb.JoinResponse{Certificate: certificate, Ca: c.ca.Raw, NodeId: r.GetNode()}, err
}

func (c *controller) issue(node string, request []byte, age time.Duration) ([]byte, error) {
	csr, err := x509.ParseCertificateRequest(request)
	if err != nil {
		return nil, err
	}
	der := c.certify(node, csr.PublicKey, age)
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	c.change(func() { c.issued = append(c.issued, certificate.SerialNumber.String()) })
	return der, nil
}

func (c *controller) Renew(ctx context.Context, r *agentpb.RenewRequest) (*agentpb.RenewResponse, error) {
	shown := shownBy(ctx)
	if shown == nil {
		return nil, status.Error(codes.Unauthenticated, "no certificate was shown")
	}
	certificate, err := c.issue(shown.Subject.CommonName, r.GetCsr(), 0)
	return &agentpb.RenewResponse{Certificate: certificate}, err
}

func shownBy(ctx context.Context) *x509.Certificate {
	from, _ := peer.FromContext(ctx)
	info, _ := from.AuthInfo.(credentials.TLSInfo)
	if len(info.State.VerifiedChains) == 0 {
		return nil
	}
	return info.State.VerifiedChains[0][0]
}

func (c *controller) Connect(stream agentpb.AgentService_ConnectServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	n := &connection{hello: first.GetHello(), stream: stream, cancel: cancel}
	c.mu.Lock()
	welcome := &agentpb.Welcome{
		NodeId: n.hello.GetNode(), HeartbeatMs: 100, LeaseMs: c.lease.Milliseconds(), ManifestKey: c.public, Destroy: c.destroy,
		Repository: fmt.Appendf(nil, `{"backend":"local","path":%q}`, filepath.Join(c.dir, "repository")),
	}
	for _, task := range n.hello.GetTasks() {
		if !contains(c.destroy, task.GetTask()) {
			welcome.Keep = append(welcome.Keep, task.GetTask())
		}
	}
	c.mu.Unlock()
	if err := n.send(&agentpb.ToAgent{Body: &agentpb.ToAgent_Welcome{Welcome: welcome}}); err != nil {
		return err
	}
	c.change(func() {
		c.nodes[n.hello.GetNode()] = n
		if shown := shownBy(ctx); shown != nil {
			c.shown = append(c.shown, shown.SerialNumber.String())
		}
	})
	if place := c.placeOf(n.hello.GetNode()); place != nil {
		n.send(&agentpb.ToAgent{Body: &agentpb.ToAgent_TreeAssignment{TreeAssignment: place}})
	}
	defer c.change(func() {
		if c.nodes[n.hello.GetNode()] == n {
			delete(c.nodes, n.hello.GetNode())
		}
	})
	received := make(chan error, 1)
	go func() { received <- c.receive(n) }()
	select {
	case err := <-received:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *controller) receive(n *connection) error {
	for {
		message, err := n.stream.Recv()
		if err != nil {
			return err
		}
		switch body := message.GetBody().(type) {
		case *agentpb.FromAgent_Heartbeat:
			c.mu.Lock()
			deaf := c.deaf
			c.mu.Unlock()
			if !deaf {
				n.send(&agentpb.ToAgent{Body: &agentpb.ToAgent_HeartbeatAck{HeartbeatAck: &agentpb.HeartbeatAck{
					Seq: body.Heartbeat.GetSeq(), ClockUs: time.Now().UnixMicro(),
				}}})
			}
		case *agentpb.FromAgent_Reply:
			c.change(func() { c.replies[body.Reply.GetId()] = body.Reply })
		case *agentpb.FromAgent_TaskEvent:
			c.change(func() { c.events = append(c.events, body.TaskEvent.GetState()) })
		case *agentpb.FromAgent_AppRequest:
			c.change(func() { c.asked = append(c.asked, body.AppRequest) })
		case *agentpb.FromAgent_TreeReport:
			n.send(&agentpb.ToAgent{Body: &agentpb.ToAgent_TreeAck{TreeAck: c.hear(body.TreeReport)}})
		}
	}
}

func (n *connection) send(m *agentpb.ToAgent) error {
	n.sendMu.Lock()
	defer n.sendMu.Unlock()
	return n.stream.Send(m)
}

func (c *controller) Attach(stream agentpb.AgentService_AttachServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	c.mu.Lock()
	waiting := c.streams[first.GetStream()]
	c.mu.Unlock()
	if waiting == nil {
		return status.Error(codes.NotFound, "nobody asked for this stream")
	}
	done := make(chan struct{})
	waiting <- attached{stream, done}
	<-done
	return nil
}

type attached struct {
	agentpb.AgentService_AttachServer
	done chan struct{}
}

// change runs f and wakes those who wait for something.
func (c *controller) change(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
	close(c.changed)
	c.changed = make(chan struct{})
}

// await waits until f, called under the lock, says true.
func (c *controller) await(what string, f func() bool) {
	c.t.Helper()
	timeout := time.After(60 * time.Second)
	for {
		c.mu.Lock()
		ok, changed := f(), c.changed
		c.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			c.t.Fatalf("waited in vain for %s", what)
		}
	}
}

const firstAddress = "10.77.0.1"

// do sends a command, again after each reconnection, and returns its reply.
func (c *controller) do(node string, ref *agentpb.TaskRef, body any) *agentpb.Reply {
	c.t.Helper()
	switch b := body.(type) { // as the real controller does
	case *agentpb.StartTask:
		b.VirtualIp = cmp.Or(b.VirtualIp, firstAddress)
		c.mustDo(node, ref, &agentpb.PrepareNetwork{Plan: c.plan})
	case *agentpb.RestoreTask:
		b.VirtualIp = cmp.Or(b.VirtualIp, firstAddress)
		if b.GetHold() {
			c.mustDo(node, ref, &agentpb.PrepareNetwork{Plan: c.plan})
		} else {
			b.Network = c.plan
		}
	}
	c.mu.Lock()
	c.next++
	command := &agentpb.Command{Id: fmt.Sprintf("c%d", c.next), Task: ref}
	c.mu.Unlock()
	switch b := body.(type) {
	case *agentpb.StartTask:
		command.Body = &agentpb.Command_Start{Start: b}
	case *agentpb.Preflight:
		command.Body = &agentpb.Command_Preflight{Preflight: b}
	case *agentpb.Freeze:
		command.Body = &agentpb.Command_Freeze{Freeze: b}
	case *agentpb.Capture:
		command.Body = &agentpb.Command_Capture{Capture: b}
	case *agentpb.Thaw:
		command.Body = &agentpb.Command_Thaw{Thaw: b}
	case *agentpb.Upload:
		command.Body = &agentpb.Command_Upload{Upload: b}
	case *agentpb.Discard:
		command.Body = &agentpb.Command_Discard{Discard: b}
	case *agentpb.RestoreTask:
		command.Body = &agentpb.Command_Restore{Restore: b}
	case *agentpb.SignalTask:
		command.Body = &agentpb.Command_Signal{Signal: b}
	case *agentpb.DestroyTask:
		command.Body = &agentpb.Command_Destroy{Destroy: b}
	case *agentpb.PrepareNetwork:
		command.Body = &agentpb.Command_PrepareNetwork{PrepareNetwork: b}
	case *agentpb.ConnectNetwork:
		command.Body = &agentpb.Command_ConnectNetwork{ConnectNetwork: b}
	case *agentpb.OpenNetwork:
		command.Body = &agentpb.Command_OpenNetwork{OpenNetwork: b}
	case *agentpb.ReleaseTask:
		command.Body = &agentpb.Command_Release{Release: b}
	case *agentpb.OpenStream:
		command.Body = &agentpb.Command_OpenStream{OpenStream: b}
	default:
		c.t.Fatalf("no command %T", body)
	}
	var reply *agentpb.Reply
	var told *connection
	c.await(fmt.Sprintf("the answer to %T", body), func() bool {
		if reply = c.replies[command.GetId()]; reply != nil {
			return true
		}
		if n := c.nodes[node]; n != nil && n != told {
			told = n
			n.send(&agentpb.ToAgent{Body: &agentpb.ToAgent_Command{Command: command}})
		}
		return false
	})
	return reply
}

// must do is do for a command that may not fail.
func (c *controller) mustDo(node string, ref *agentpb.TaskRef, body any) *agentpb.Reply {
	c.t.Helper()
	reply := c.do(node, ref, body)
	if f := reply.GetFailure(); f != nil {
		c.t.Fatalf("%T on %s failed: %s", body, node, f.GetMessage())
	}
	return reply
}

// logs reads a task's stdout.
func (c *controller) logs(node string, ref *agentpb.TaskRef, follow bool) string {
	c.t.Helper()
	var out bytes.Buffer
	c.stream(node, ref, &agentpb.OpenStream{Kind: &agentpb.OpenStream_Logs{Logs: &agentpb.Logs{Follow: follow}}}, func(f *agentpb.Frame) {
		out.Write(f.GetStdout())
		if f.GetError() != "" {
			c.t.Errorf("logs of %s: %s", taskID(ref), f.GetError())
		}
	})
	return out.String()
}

// stream opens a stream and hands on its frames until it ends.
func (c *controller) stream(node string, ref *agentpb.TaskRef, open *agentpb.OpenStream, each func(*agentpb.Frame), send ...*agentpb.Frame) {
	c.t.Helper()
	waiting := make(chan agentpb.AgentService_AttachServer, 1)
	c.mu.Lock()
	c.next++
	open.Stream = fmt.Sprintf("s%d", c.next)
	c.streams[open.Stream] = waiting
	c.mu.Unlock()
	c.mustDo(node, ref, open)
	var s attached
	select {
	case stream := <-waiting:
		s = stream.(attached)
	case <-time.After(20 * time.Second):
		c.t.Fatal("the agent did not attach")
	}
	defer close(s.done)
	for _, frame := range send {
		must(c.t, s.Send(frame))
	}
	for {
		frame, err := s.Recv()
		if err != nil {
			return
		}
		each(frame)
	}
}

// checkpoint takes a checkpoint and makes it durable.
func (c *controller) checkpoint(node string, ref *agentpb.TaskRef, id string) api.CaptureSteps {
	c.t.Helper()
	c.captureTask(node, ref, id)
	c.mustDo(node, ref, &agentpb.Thaw{Checkpoint: id})
	return c.store(node, ref, id)
}

// captureTask captures a task, again when it is told that this may help.
func (c *controller) captureTask(node string, ref *agentpb.TaskRef, id string) {
	c.t.Helper()
	for try := 1; ; try++ {
		f := c.tryCapture(node, ref, &agentpb.Freeze{Checkpoint: id})
		if f == nil {
			return
		}
		if !f.GetRetryable() || try == 5 {
			c.t.Fatalf("checkpoint %s failed: %s", id, f.GetMessage())
		}
		c.t.Logf("checkpoint %s again: %s", id, f.GetMessage())
		c.mustDo(node, ref, &agentpb.Thaw{Checkpoint: id, Abort: true})
	}
}

func (c *controller) tryCapture(node string, ref *agentpb.TaskRef, freeze *agentpb.Freeze) *agentpb.Failure {
	c.t.Helper()
	id := freeze.GetCheckpoint()
	reply := c.do(node, ref, &agentpb.Preflight{Checkpoint: id})
	if refusals := reply.GetPreflight().GetRefusals(); len(refusals) > 0 {
		c.t.Fatalf("checkpoint %s was refused: %q", id, refusals)
	}
	for _, next := range []any{freeze, &agentpb.Capture{Checkpoint: id}} {
		if reply.GetFailure() == nil {
			reply = c.do(node, ref, next)
		}
	}
	return reply.GetFailure()
}

func (c *controller) store(node string, ref *agentpb.TaskRef, id string) api.CaptureSteps {
	c.t.Helper()
	return c.finish(node, ref, id, c.mustDo(node, ref, &agentpb.Upload{Checkpoint: id}).GetUploaded())
}

// finish makes an uploaded checkpoint durable.
func (c *controller) finish(node string, ref *agentpb.TaskRef, id string, uploaded *agentpb.UploadResult) api.CaptureSteps {
	c.t.Helper()
	var task repository.TaskManifest
	must(c.t, json.Unmarshal(uploaded.GetPart(), &task))
	var steps api.CaptureSteps
	must(c.t, json.Unmarshal(uploaded.GetSteps(), &steps))
	manifest := &repository.Manifest{
		Checkpoint: id, Job: ref.GetJob(), Created: time.Now(), Trigger: "user", Tasks: []repository.TaskManifest{task},
	}
	must(c.t, c.repo.PutManifest(c.t.Context(), manifest, c.signer))
	c.mustDo(node, ref, &agentpb.Discard{Checkpoint: id})
	return steps
}

// start starts a task and returns its reference.
func (c *controller) start(node, job string, spec api.JobSpec) *agentpb.TaskRef {
	c.t.Helper()
	ref := &agentpb.TaskRef{Job: job, Run: 1}
	c.mustDo(node, ref, &agentpb.StartTask{Spec: specJSON(c.t, spec)})
	return ref
}

// restore restores a checkpoint as the next run of a task.
func (c *controller) restore(node string, ref *agentpb.TaskRef, id string, spec api.JobSpec) *agentpb.TaskRef {
	c.t.Helper()
	next := &agentpb.TaskRef{Job: ref.GetJob(), Index: ref.GetIndex(), Run: ref.GetRun() + 1}
	c.mustDo(node, next, &agentpb.RestoreTask{Checkpoint: id, Spec: specJSON(c.t, spec)})
	return next
}

// awaitLog waits until a task's stdout satisfies ok.
func (c *controller) awaitLog(node string, ref *agentpb.TaskRef, what string, ok func(string) bool) string {
	c.t.Helper()
	limit := time.Now().Add(30 * time.Second)
	for {
		text := c.logs(node, ref, false)
		if ok(text) {
			return text
		}
		if time.Now().After(limit) {
			c.t.Fatalf("waited in vain for %s; stdout is:\n%s", what, text)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// node is an agent in a process of its own, as drivers/local starts it.
type node struct {
	c       *controller
	name    string
	state   string
	netns   *os.File // that the agent starts in; nil: a new one each time
	command *exec.Cmd
	mu      sync.Mutex
	log     bytes.Buffer
}

func (n *node) Write(p []byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.log.Write(p)
}

// addNode starts a node; change may alter its configuration.
func (c *controller) addNode(name string, change ...func(*Config)) *node {
	c.t.Helper()
	return c.addNodeIn(nil, name, change...)
}

// addNodeIn starts a node whose network namespace outlives its agent.
func (c *controller) addNodeIn(netns *os.File, name string, change ...func(*Config)) *node {
	c.t.Helper()
	n := &node{c: c, name: name, state: filepath.Join(c.dir, name), netns: netns}
	config := Config{
		Node: name, Cloud: "test", Join: "unix://" + c.socket(), Token: "open sesame", CA: filepath.Join(c.dir, "ca.pem"),
		State: n.state, Cgroup: fmt.Sprintf("dormouse-%s/%s/jobs", filepath.Base(c.dir), name),
		Init: tools.init, Shim: tools.shim, Virtual: true,
	}
	for _, f := range change {
		f(&config)
	}
	raw, err := json.Marshal(config)
	must(c.t, err)
	must(c.t, os.MkdirAll(n.state, 0o700))
	must(c.t, os.WriteFile(n.state+".json", raw, 0o600))
	c.t.Cleanup(n.remove)
	n.start()
	return n
}

// start starts the agent's process and waits for its hello.
func (n *node) start(env ...string) {
	n.c.t.Helper()
	n.spawn(env...)
	n.c.await("node "+n.name, func() bool { return n.c.nodes[n.name] != nil })
}

func (n *node) spawn(env ...string) {
	n.c.t.Helper()
	n.command = exec.Command("/proc/self/exe")
	n.command.Env = append(append(os.Environ(), agentConfigVariable+"="+n.state+".json"), env...)
	n.command.Stderr = n
	n.command.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true, Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET, Unshareflags: syscall.CLONE_NEWNS,
	}
	if n.netns == nil {
		must(n.c.t, n.command.Start())
		return
	}
	n.command.SysProcAttr.Cloneflags &^= syscall.CLONE_NEWNET
	must(n.c.t, inNamespace(n.netns, n.command.Start))
}

// inNamespace calls f in a network namespace.
func inNamespace(netns *os.File, f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer own.Close()
	if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
		return err
	}
	return errors.Join(f(), unix.Setns(int(own.Fd()), unix.CLONE_NEWNET))
}

// kill ends the agent's process as a crash does.
func (n *node) kill() {
	n.command.Process.Kill()
	n.command.Wait()
	n.c.await("the end of node "+n.name, func() bool { return n.c.nodes[n.name] == nil })
}

// remove ends the agent and all its tasks and checks that nothing is left.
func (n *node) remove() {
	n.command.Process.Kill()
	n.command.Wait()
	cgroup := filepath.Join(cgroup2(), "dormouse-"+filepath.Base(n.c.dir))
	os.WriteFile(filepath.Join(cgroup, "cgroup.kill"), []byte("1"), 0)
	os.WriteFile(filepath.Join(cgroup, "cgroup.freeze"), []byte("0"), 0)
	for range 200 {
		if removeCgroups("dormouse-" + filepath.Base(n.c.dir)) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if n.c.t.Failed() {
		n.c.t.Logf("log of node %s:\n%s", n.name, n.log.String())
	}
}

// nothingSpooled checks that no images and no notes are left.
func (n *node) nothingSpooled(t *testing.T) {
	t.Helper()
	for _, dir := range []string{"spool", "memory", "work", "uploads"} {
		left, err := os.ReadDir(filepath.Join(n.state, dir))
		if err != nil || len(left) > 0 {
			t.Errorf("left in %s: %v, %v", dir, left, err)
		}
	}
}

func cgroup2() string {
	for _, dir := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if fileExists(filepath.Join(dir, "cgroup.procs")) && fileExists(filepath.Join(dir, "cgroup.controllers")) {
			return dir
		}
	}
	return "/sys/fs/cgroup"
}

// removeCgroups removes a group and those below it from all hierarchies, and
// reports whether none is left.
func removeCgroups(name string) bool {
	left := false
	roots, _ := filepath.Glob("/sys/fs/cgroup/*/" + name)
	more, _ := filepath.Glob("/sys/fs/cgroup/" + name)
	for _, root := range append(roots, more...) {
		var dirs []string
		filepath.WalkDir(root, func(path string, entry os.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		for i := len(dirs) - 1; i >= 0; i-- {
			if err := os.Remove(dirs[i]); err != nil && !os.IsNotExist(err) {
				left = true
			}
		}
	}
	return !left
}

func contains(refs []*agentpb.TaskRef, ref *agentpb.TaskRef) bool {
	for _, r := range refs {
		if taskID(r) == taskID(ref) {
			return true
		}
	}
	return false
}

func specJSON(t *testing.T, spec api.JobSpec) []byte {
	t.Helper()
	raw, err := json.Marshal(spec)
	must(t, err)
	return raw
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// countsUpTo checks that text is the numbers 1, 2, 3, ... one per line.
func countsUp(text string) (last int, err error) {
	for line := range strings.Lines(text) {
		if !strings.HasSuffix(line, "\n") {
			break // still being written
		}
		var n int
		if _, err := fmt.Sscanf(line, "%d", &n); err != nil || n != last+1 {
			return last, fmt.Errorf("after %d comes %q", last, strings.TrimSpace(line))
		}
		last = n
	}
	return last, nil
}
