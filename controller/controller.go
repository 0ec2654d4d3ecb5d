package controller

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"dormouse/api"
	"dormouse/controller/access"
	"dormouse/controller/interval"
	"dormouse/controller/pki"
	"dormouse/controller/store"
	"dormouse/drivers"
	failures "dormouse/monitor/failure"
	"dormouse/repository"
)

// Repository is what the controller needs of the repository of checkpoints;
// *repository.Repository has it.
type Repository interface {
	PutManifest(context.Context, *repository.Manifest, repository.Signer) error
	LoadManifest(context.Context, string, *repository.Verifier) (*repository.Manifest, error)
	RemoveManifest(context.Context, string) error
	GC(context.Context, repository.GCOptions) (repository.GCStats, error)
	Verify(context.Context, *repository.Verifier, []string, func(done, total int64)) (*repository.VerifyReport, error)
}

// Cloud is a named platform. A nil Driver means that its agents join by
// themselves.
type Cloud struct {
	Name       string
	DriverName string
	Driver     drivers.Driver
	Tunnel     string             // TunnelVXLAN where the network between the nodes is trusted
	Nodes      []drivers.NodeSpec // to provision at the start
	// Most is how many nodes the cloud may have while jobs wait for room; those
	// beyond Nodes are given back when nothing was on them for Idle.
	Most int
	Idle time.Duration // idleLong if it is 0
	// Dumps is how many checkpoints the cloud makes at once before automatic ones
	// wait; 0: as many as it has nodes.
	Dumps int
	// UploadRate is what all nodes of the cloud together may send to the
	// repository, in bytes per second; 0: without limit.
	UploadRate int64
}

// Cluster is what a Controller knows of the others on its store. Leads is asked
// before anything that only the leader may do and the store cannot refuse: to
// prolong an agent's lease, to command it.
type Cluster interface {
	Leads() bool
	Controllers() []api.Controller
}

// alone is the Cluster of a controller that shares its store with no other.
type alone struct{ self api.Controller }

func (a alone) Leads() bool                   { return true }
func (a alone) Controllers() []api.Controller { return []api.Controller{a.self} }

// Parts are what a Controller is made of. Store, PKI and Repository are
// required; the caller closes them after Run has returned.
type Parts struct {
	Store      store.Store
	PKI        *pki.PKI
	Repository Repository
	// RepositoryConfig is handed to agents: {"backend":"local","path":DIR}.
	RepositoryConfig json.RawMessage
	AdminToken       string
	// Access are the limits of tokens; zero fields: AccessConfig's defaults.
	Access AccessConfig
	// State is the directory of the keys, which a back-up has in it, too.
	State string
	// Cluster tells of the other controllers on the store; nil: there are none.
	Cluster   Cluster
	JoinToken string // lets agents of clouds without a driver join; empty: none
	Clock     Clock  // nil: WallClock
	Logger    *slog.Logger
	Version   string
	// Heartbeat is the agents' period, Lease what they may be silent for before
	// they freeze their tasks. Margin is what the controller waits beyond it
	// before it takes a node for lost. Zero: 1 s, 30 s, a third of the lease.
	Heartbeat, Lease, Margin time.Duration
	// AgentLife is how long an agent's certificate is good for. Zero: pki.AgentLife.
	AgentLife time.Duration
	// Grace is what a killed job gets between SIGTERM and SIGKILL. Zero: 10 s.
	Grace time.Duration
	// Watch is how long a restore on trial must live. Zero: 3 s.
	Watch time.Duration
	// Retry is how long a job that could not be checkpointed to give way, or not be
	// restored, is left alone at first; then twice as long each time. Zero: 10 s.
	Retry time.Duration
	// Recovery says how failed jobs are started again; Spec.MaxRestarts of each
	// says how often.
	Recovery failures.Policy
	// Round is the period of the monitoring tree, Arity how many children a node of
	// it has. Zero: 5 s, 8.
	Round time.Duration
	Arity int
	// Relief bounds what is done about jobs that are kept from working.
	Relief Relief
	// Bounds hold the interval of automatic checkpoints. Zero: interval.Usual.
	Bounds interval.Bounds
	// AgentURL is where a cloud's new agents dial.
	AgentURL func(cloud string) string
}

// Controller is the brain; see the package comment.
type Controller struct {
	parts   Parts
	store   store.Store
	clock   Clock
	log     *slog.Logger
	fleet   *fleet
	streams *attachments
	// bandwidth is shared out among the nodes that send to the repository.
	bandwidth *bandwidth
	garbage   chan struct{} // capacity 1: manifests are gone
	metrics   *metrics
	monitor   *monitor
	signer    repository.Signer
	verifier  *repository.Verifier
	handler   http.Handler
	// limiter bounds how often a token asks, guesses how often an address without.
	limiter, guesses *access.Limiter
	guests           *guests
	watchGuests      sync.Once
	refusals         chan api.AuditEntry // to be written into the audit log
	unaudited        atomic.Int64        // that were too many to be
	newestAudit      atomic.Uint64       // number of the newest entry written
	newestEvent      atomic.Uint64       // and of the newest event
	grpc             *grpc.Server

	// What was decoded of the store last, and where jobs are: see image.go.
	jobs       *image[jobRecord]
	operations *image[opRecord]
	nodes      *image[seenNode]
	placed     *whereabouts

	mu        sync.Mutex
	clouds    map[string]Cloud
	order     []string // of clouds
	booted    time.Time
	operating map[string]bool      // operations that have a goroutine
	resting   map[string]time.Time // until when a cloud gets no further nodes
	loads     chan struct{}        // held while one of them reads what it is to do
	turns     *turns
	// interrupts end the steps that operations are taking.
	interrupts map[string]context.CancelCauseFunc
	started    bool

	work sync.WaitGroup // everything that runs
	run  context.Context
	stop context.CancelFunc
}

// New makes a controller of its parts. It does nothing until Run.
func New(parts Parts) (*Controller, error) {
	if parts.Store == nil || parts.PKI == nil || parts.Repository == nil || parts.AdminToken == "" {
		return nil, errors.New("a controller needs a store, keys, a repository and an admin token")
	}
	if parts.Clock == nil {
		parts.Clock = WallClock{}
	}
	if parts.Cluster == nil {
		parts.Cluster = alone{api.Controller{Version: parts.Version, Leads: true}}
	}
	if parts.Logger == nil {
		parts.Logger = slog.New(slog.DiscardHandler)
	}
	setDefault(&parts.Heartbeat, time.Second)
	setDefault(&parts.Lease, 30*time.Second)
	setDefault(&parts.Margin, parts.Lease/3)
	setDefault(&parts.AgentLife, pki.AgentLife)
	parts.Access.complete()
	setDefault(&parts.Grace, 10*time.Second)
	setDefault(&parts.Watch, 3*time.Second)
	setDefault(&parts.Retry, usualRetry)
	setDefault(&parts.Round, 5*time.Second)
	parts.Relief = parts.Relief.filled()
	if parts.Arity <= 0 {
		parts.Arity = 8
	}
	key := parts.PKI.ManifestKey()
	c := &Controller{
		parts: parts, store: parts.Store, clock: parts.Clock, log: parts.Logger,
		fleet: newFleet(parts.Cluster.Leads, accrualBounds(parts)), streams: newAttachments(), bandwidth: newBandwidth(), garbage: make(chan struct{}, 1),
		signer:     repository.NewSigner(key),
		verifier:   repository.NewVerifier(key.Public().(ed25519.PublicKey)),
		jobs:       newImage(store.Jobs, func(j *jobRecord) (time.Time, string) { return j.Created, j.ID }),
		operations: newImage(store.Operations, func(op *opRecord) (time.Time, string) { return op.Started, op.ID }),
		nodes:      newImage(store.Nodes, func(n *seenNode) (time.Time, string) { return time.Time{}, n.ID }),
		placed:     &whereabouts{jobs: make(map[string]map[string]bool)},
		clouds:     make(map[string]Cloud), resting: make(map[string]time.Time), operating: make(map[string]bool), loads: make(chan struct{}, mostLoads), interrupts: make(map[string]context.CancelCauseFunc),
		turns: newTurns(),
	}
	c.run, c.stop = context.WithCancel(context.Background())
	c.limiter, c.guesses = access.NewLimiter(c.parts.Access.Rate, c.parts.Access.Burst), access.NewLimiter(guessRate, guessBurst)
	c.guests, c.refusals = newGuests(), make(chan api.AuditEntry, auditQueue)
	c.metrics, c.monitor = newMetrics(c), newMonitor(c)
	c.grpc = c.newAgentServer()
	c.handler = c.newHandler()
	return c, nil
}

func setDefault(d *time.Duration, value time.Duration) {
	if *d <= 0 {
		*d = value
	}
}

// ServeHTTP answers REST and the agents' gRPC.
func (c *Controller) ServeHTTP(w http.ResponseWriter, r *http.Request) { c.handler.ServeHTTP(w, r) }

// Start takes up what the store says: operations that were under way, pending
// jobs, nodes that may be gone. Everything it starts ends with Stop.
func (c *Controller) Start(ctx context.Context) error {
	c.mu.Lock()
	if c.started {
		c.mu.Unlock()
		return errors.New("the controller was started before")
	}
	c.started, c.booted = true, c.clock.Now()
	c.mu.Unlock()
	if err := c.prune(ctx); err != nil {
		return fmt.Errorf("forget old operations: %w", err)
	}
	if err := c.bootNodes(ctx); err != nil {
		return fmt.Errorf("take up the nodes: %w", err)
	}
	if err := c.monitor.start(ctx); err != nil {
		return fmt.Errorf("take up the monitoring tree: %w", err)
	}
	c.work.Go(func() { c.monitor.loop(c.run) })
	c.work.Go(func() { c.deliver(c.run) })
	c.work.Go(func() { c.watchNodes(c.run) })
	c.work.Go(func() { c.reconcile(c.run) })
	c.work.Go(func() { c.tidy(c.run) })
	c.work.Go(func() { c.auditRefusals(c.run) })
	c.work.Go(func() { c.placeJobs(c.run) })
	c.work.Go(func() { c.shrink(c.run) })
	c.work.Go(func() { c.automatic(c.run) })
	c.work.Go(func() { c.collectGarbage(c.run) })
	return nil
}

// Stop ends everything that Start and requests have begun, and waits for it.
// Operations go on at the next Start.
func (c *Controller) Stop() {
	c.stop()
	c.grpc.Stop()
	c.work.Wait()
}

// AddCloud makes a cloud known, provisions its nodes and follows what its driver
// tells. It returns when the driver has made the nodes; they join on their own time.
func (c *Controller) AddCloud(ctx context.Context, cloud Cloud) error {
	c.mu.Lock()
	if _, known := c.clouds[cloud.Name]; known {
		c.mu.Unlock()
		return fmt.Errorf("there are two clouds named %q", cloud.Name)
	}
	c.clouds[cloud.Name] = cloud
	c.order = append(c.order, cloud.Name)
	c.mu.Unlock()
	if cloud.Driver == nil {
		return nil
	}
	if err := c.registerNodes(ctx, cloud); err != nil {
		return err
	}
	events, err := cloud.Driver.Events(c.run)
	if err != nil {
		return fmt.Errorf("follow the nodes of cloud %s: %w", cloud.Name, err)
	}
	c.work.Go(func() { c.followDriver(cloud, events) })
	further, err := c.furtherSpecs(ctx, cloud)
	if err != nil {
		return err
	}
	if _, err := cloud.Driver.Provision(ctx, slices.Concat(cloud.Nodes, further)); err != nil {
		return fmt.Errorf("provision the nodes of cloud %s: %w", cloud.Name, err)
	}
	return nil
}

func (c *Controller) cloud(name string) (Cloud, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cloud, ok := c.clouds[name]
	return cloud, ok
}

func (c *Controller) cloudNames() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.order...)
}

// until waits for cond to hold in the store, and reports whether it did before
// patience, when given, was over. It ends with the controller, too.
func (c *Controller) until(ctx context.Context, patience <-chan time.Time, cond func(store.Tx) (bool, error)) (bool, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.run, func() { cancel(errStopping) })()
	if patience != nil {
		go func() { // ends with this function
			select {
			case <-patience:
				cancel(errTimeIsOver)
			case <-ctx.Done():
			}
		}()
	}
	for {
		revision := c.store.Revision()
		holds := false
		err := c.store.View(context.WithoutCancel(ctx), func(tx store.Tx) (err error) {
			holds, err = cond(tx)
			return err
		})
		if err != nil || holds {
			return holds, err
		}
		_, err = c.store.Wait(ctx, revision)
		switch {
		case err == nil:
		case errors.Is(context.Cause(ctx), errTimeIsOver):
			return false, nil
		case errors.Is(context.Cause(ctx), errStopping):
			return false, errStopping
		default:
			return false, err
		}
	}
}

var (
	errTimeIsOver = errors.New("the time is over")
	errStopping   = errors.New("the controller is stopping: try again")
)

// job returns a job as it is stored.
func (c *Controller) job(ctx context.Context, id string) (*jobRecord, error) {
	var job *jobRecord
	err := c.store.View(ctx, func(tx store.Tx) (err error) {
		job, err = getJob(tx, id)
		return err
	})
	return job, err
}

func (c *Controller) logJob(job *jobRecord) {
	c.log.Info("job "+string(job.Phase), "job", job.ID, "reason", job.Reason, "run", job.Run)
}
