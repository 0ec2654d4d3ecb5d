package controller

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"crypto/tls"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/client"
	"dormouse/controller/pki"
	"dormouse/controller/store"
	"dormouse/controller/store/etcd"
	"dormouse/controller/store/etcd/etcdtest"
)

// league is a simulation with several controllers on one etcd. The simulation's
// own controller is an observer that only reads.
type league struct {
	*simulation
	server  *etcdtest.Server
	options etcd.Options
	players []*player
}

// player is one of the controllers, and its network to etcd.
type player struct {
	*Daemon
	network *etcdtest.Proxy
	address string
}

// newLeague has a short lease, so that a test sees several leaders.
func newLeague(t *testing.T, controllers int, nodes ...string) *league {
	t.Helper()
	return newLeagueOf(t, 2*time.Second, controllers, nodes...)
}

func newLeagueOf(t *testing.T, lease time.Duration, controllers int, nodes ...string) *league {
	t.Helper()
	l := &league{server: etcdtest.Start(t)}
	l.options = etcd.Options{Endpoints: []string{l.server.URL}, Lease: lease}
	w := &world{t: t, dir: t.TempDir(), repository: newMemoryRepository(), agents: make(map[string]*simAgent)}
	l.simulation = &simulation{world: w, token: adminToken}
	var err error
	if w.keys, err = pki.Open(filepath.Join(w.dir, "pki"), time.Now); err != nil {
		t.Fatal(err)
	}
	observed, err := etcd.Open(t.Context(), l.options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { observed.Close() })
	l.store = etcd.Following{Store: observed}
	if l.c, err = New(l.parts(l.store)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.c.Stop)
	for i := range controllers {
		l.enter(fmt.Sprintf("c%d", i))
	}
	next := 0
	w.pick = func() string { // called with the lock of the world
		next++
		return l.players[next%len(l.players)].address
	}
	l.url = l.players[0].URL()
	l.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: w.keys.Pool()}}}
	t.Cleanup(func() {
		w.stopAgents()
		l.client.CloseIdleConnections()
	})
	l.leader()
	for _, node := range nodes {
		l.join(node)
	}
	l.awaitReady(nodes...)
	return l
}

func (l *league) parts(s store.Store) Parts {
	return Parts{
		Store: s, PKI: l.keys, Repository: l.repository, RepositoryConfig: json.RawMessage(`{"backend":"memory"}`),
		AdminToken: adminToken, JoinToken: "shared", Version: "test",
		Heartbeat: 100 * time.Millisecond, Lease: 5 * time.Second, Grace: 200 * time.Millisecond, Watch: 100 * time.Millisecond,
		AgentURL: func(string) string { return "" },
	}
}

// enter starts one more controller, behind a network of its own to etcd.
func (l *league) enter(name string) {
	l.t.Helper()
	must := func(err error) {
		l.t.Helper()
		if err != nil {
			l.t.Fatal(err)
		}
	}
	network := etcdtest.NewProxy(l.t, l.server)
	options := l.options
	options.Endpoints = []string{network.URL}
	shared, err := etcd.Open(l.t.Context(), options)
	must(err)
	config := Config{State: l.t.TempDir(), Listen: "127.0.0.1:0", Name: name, Clouds: []CloudConfig{{Name: "metal", Driver: driverStatic}}}
	must(config.complete())
	d := &Daemon{config: config, log: slog.New(slog.NewTextHandler(l.t.Output(), nil)).With("controller", name), keys: l.keys, store: shared, done: make(chan struct{})}
	must(d.listen())
	must(d.startMember(l.t.Context(), shared, l.parts(nil)))
	l.t.Cleanup(func() { closeDaemon(l.t, d) })
	l.players = append(l.players, &player{Daemon: d, network: network, address: d.tcp.Addr().String()})
}

// leader waits until one of the controllers leads, and has taken up its work.
func (l *league) leader() *player {
	l.t.Helper()
	return l.leaderBut(nil)
}

// leaderBut waits until one that is not the given one leads.
func (l *league) leaderBut(not *player) *player {
	l.t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		for _, p := range l.players {
			if p != not && l.roleOf(p) == "leader" {
				return p
			}
		}
	}
	l.t.Fatal("no controller leads")
	return nil
}

func (l *league) roleOf(p *player) string {
	response, err := l.client.Get(p.URL() + "/healthz")
	if err != nil {
		return err.Error()
	}
	defer response.Body.Close()
	var health struct{ Role string }
	json.NewDecoder(response.Body).Decode(&health) // of a problem there is no role
	return health.Role
}

func (l *league) follower(leader *player) *player {
	for _, p := range l.players {
		if p != leader {
			return p
		}
	}
	return nil
}

// partition cuts the leader off from etcd until another leads, and mends it.
func (l *league) partition() {
	l.t.Helper()
	old := l.leader()
	old.network.Cut()
	l.leaderBut(old)
	old.network.Mend()
}

func TestEveryControllerAnswersAndTheLeaderActs(t *testing.T) {
	l := newLeague(t, 3, "metal-0")
	for i, p := range l.players {
		l.url = p.URL()
		id := l.submit(api.JobSpec{Name: fmt.Sprintf("job-%d", i)})
		for _, other := range l.players {
			l.url = other.URL()
			var job api.JobDetail
			l.want(http.StatusOK, "GET", "/v1/jobs/"+id, nil, &job) // at once, from each
		}
		l.awaitPhase(id, api.PhaseRunning)
		l.url = l.follower(l.leader()).URL()
		if text := l.logs(id); text == "" {
			t.Error("no logs by way of a follower")
		}
		l.do("/v1/jobs/"+id+"/kill", nil)
	}
	var all []api.Controller
	l.want(http.StatusOK, "GET", "/v1/controllers", nil, &all)
	if len(all) != 3 || !all[0].Leads || all[1].Leads || all[0].URL != l.leader().URL() {
		t.Errorf("want three controllers, of which the first leads, got %+v", all)
	}
}

func TestFollowersAskForTheToken(t *testing.T) {
	l := newLeague(t, 2)
	for _, path := range []string{"/v1/jobs", "/v1/jobs/x/suspend"} {
		for _, method := range []string{"GET", "POST"} {
			request, err := http.NewRequest(method, l.follower(l.leader()).URL()+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			response, err := l.client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			if response.StatusCode != http.StatusUnauthorized {
				t.Errorf("%s %s without a token: status %d", method, path, response.StatusCode)
			}
		}
	}
}

func TestFollowersTellAgentsWhereTheLeaderIs(t *testing.T) {
	l := newLeague(t, 2)
	leader := l.leader()
	follower := l.follower(leader)
	if _, err := follower.store.(*etcd.Store).WaitLeader(t.Context(), etcd.Candidate{}); err != nil {
		t.Fatal(err)
	}
	l.mu.Lock()
	l.pick = func() string { return follower.address }
	l.mu.Unlock()
	a := &simAgent{world: l.world, node: "metal-9", cloud: "metal"}
	conn, err := a.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := agentpb.NewAgentServiceClient(conn).Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), leader.URL()) {
		t.Errorf("want Unavailable with the leader's URL, got %v", err)
	}
	if got := stream.Trailer().Get(api.LeaderHeader); !equal(got, leader.URL()) {
		t.Errorf("want %s in the trailer, got %v", leader.URL(), metadata.MD(stream.Trailer()))
	}
}

func equal(got []string, want string) bool { return len(got) == 1 && got[0] == want }

// What runs does not notice, what was under way is resumed, and what the old
// leader still tries is refused.
func TestLeadershipMovesWhileACheckpointIsMade(t *testing.T) {
	t.Parallel()
	l := newLeague(t, 2, "metal-0", "metal-1")
	id := l.running(api.JobSpec{Tasks: 2})
	run := l.jobNow(id).Run
	hit := l.faultOnce("capture", func(*simAgent) fault {
		l.leader().network.Cut()
		return fault{}
	})
	old := l.leader()
	op := l.begin("/v1/jobs/"+id+"/checkpoints", nil)
	<-hit
	fresh := l.leaderBut(old)
	old.network.Mend()
	l.url = fresh.URL()
	if ended := l.awaitEnd(op.ID); ended.Phase != api.OpDone {
		t.Errorf("the checkpoint is %s: %s", ended.Phase, ended.Error)
	}
	job := l.awaitPhase(id, api.PhaseRunning)
	if job.Run != run || job.Checkpoints != 1 || len(l.aliveTasks(id)) != 2 || len(l.stillFrozen(id)) != 0 {
		t.Errorf("the job was disturbed: run %d instead of %d, %d checkpoints, alive %v", job.Run, run, job.Checkpoints, l.aliveTasks(id))
	}
	if role := l.roleOf(old); role == "leader" {
		t.Error("the old leader thinks that it leads")
	}
}

func TestALeaderThatIsClosedIsReplacedAtOnce(t *testing.T) {
	l := newLeagueOf(t, time.Hour, 2, "metal-0") // one that does not resign leads for an hour
	id := l.running(api.JobSpec{})
	old := l.leader()
	l.url = l.follower(old).URL()
	closeDaemon(t, old.Daemon)
	l.do("/v1/jobs/"+id+"/suspend", nil) // waits for the next leader by itself
}

func TestControllersOutliveTheirEtcd(t *testing.T) {
	t.Parallel()
	l := newLeague(t, 2, "metal-0")
	id := l.running(api.JobSpec{})
	l.server.Kill()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		status, detail := l.call("GET", "/v1/jobs/"+id, nil, nil)
		if status == http.StatusServiceUnavailable && strings.Contains(detail, "etcd at") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("without etcd: status %d, %s", status, detail)
		}
	}
	l.server.Restart(t)
	l.leader()
	l.do("/v1/jobs/"+id+"/suspend", nil)
	l.do("/v1/jobs/"+id+"/resume", nil)
	l.awaitPhase(id, api.PhaseRunning)
	l.checkSettled(id)
}

// As TestChaos, but instead of being killed, the leader is cut off from the store
// and goes on as long as it is certain that it leads.
func TestChaosWithSeveralControllers(t *testing.T) {
	t.Parallel()
	l := newLeague(t, 3, "metal-0", "metal-1", "metal-2")
	random := rand.New(rand.NewPCG(7, 0))
	l.setFault(randomFaults(7))
	var jobs []string
	for i := range 3 {
		jobs = append(jobs, l.submit(api.JobSpec{Name: fmt.Sprintf("chaos-%d", i), Tasks: 1 + i%2, MaxRestarts: 3}))
	}
	actions := []string{"checkpoints", "suspend", "resume", "restart"}
	for step := range 30 {
		job := jobs[random.IntN(len(jobs))]
		l.url = l.players[random.IntN(len(l.players))].URL()
		switch {
		case step%10 == 9:
			l.partition()
		case random.IntN(3) == 0:
			l.idleJob(job)
		default: // refused where the job's state does not allow it
			l.call("POST", "/v1/jobs/"+job+"/"+actions[random.IntN(len(actions))], nil, nil)
		}
	}
	l.setFault(nil)
	l.url = l.leader().URL()
	l.eventually("everything has settled", settled)
	for _, id := range jobs {
		l.checkSettled(id)
	}
}

func TestControllersShareTheirKeys(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t)
	secret := filepath.Join(t.TempDir(), "secret")
	writeTestFile(t, secret, strings.Repeat("s3cret", 8))
	repository := t.TempDir()
	config := func(name string) Config {
		c := localConfig(t)
		c.Name, c.Repository.Path = name, repository
		c.Store = StoreConfig{Backend: storeEtcd, Endpoints: []string{server.URL}, SecretFile: secret}
		return c
	}
	a, b := startDaemon(t, config("a")), startDaemon(t, config("b"))
	if a.Token() != b.Token() || !a.keys.ManifestKey().Equal(b.keys.ManifestKey()) || string(a.keys.CAPEM()) != string(b.keys.CAPEM()) {
		t.Error("the controllers have different keys")
	}
	stored, err := server.Client(t).Get(t.Context(), etcd.DefaultPrefix+"keys")
	if err != nil || len(stored.Kvs) != 1 || strings.Contains(string(stored.Kvs[0].Value), "PRIVATE") || strings.Contains(string(stored.Kvs[0].Value), a.Token()) {
		t.Errorf("the keys in etcd can be read: %v", err)
	}
	other := config("c")
	other.Store.SecretFile = filepath.Join(t.TempDir(), "secret")
	writeTestFile(t, other.Store.SecretFile, strings.Repeat("another", 8))
	refusedStart(t, other, "cannot be decrypted")
	stranger := localConfig(t)
	closeDaemon(t, startDaemon(t, stranger)) // makes keys of its own
	stranger.Store = config("d").Store
	refusedStart(t, stranger, "of another installation")
	short := config("e")
	short.Store.SecretFile = filepath.Join(t.TempDir(), "secret")
	writeTestFile(t, short.Store.SecretFile, "short")
	refusedStart(t, short, "at least 32")
}

func writeTestFile(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// The client has asked a follower, and the leader dies with the request: under its
// key it is repeated, and done once.
func TestAKeyedRequestOutlivesTheLeader(t *testing.T) {
	t.Parallel()
	l := newLeague(t, 2, "metal-0")
	old := l.leader()
	asked, err := client.New(client.Config{URL: l.follower(old).URL(), Token: adminToken, CAFile: l.keys.CAPath()})
	if err != nil {
		t.Fatal(err)
	}
	defer asked.Close()
	old.network.Cut() // what it is asked from here on it cannot write
	submitted, err := asked.Submit(t.Context(), api.JobSpec{Name: "once", Command: []string{"forever"}})
	if err != nil {
		t.Fatal(err)
	}
	old.network.Mend()
	jobs, err := asked.Jobs(t.Context(), true)
	if err != nil || len(jobs) != 1 || jobs[0].ID != submitted.ID {
		t.Errorf("want one job %s, got %+v, %v", submitted.ID, jobs, err)
	}
}
