package agent

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"dormouse/agent/criu"
	"dormouse/agent/network"
	"dormouse/agent/plugins"
	"dormouse/agent/plugins/tcp"
	"dormouse/agent/sandbox"
	"dormouse/api/agentpb"
	"dormouse/repository"
)

// Agent is the daemon of one node.
type Agent struct {
	config   Config
	masters  *controllers
	identity atomic.Pointer[identity] // since it joined
	now      func() time.Time
	after    func(time.Duration) <-chan time.Time
	log      *slog.Logger
	lock     *os.File // flock on the state directory
	lease    *lease
	criu     *criu.Engine
	criuErr  error                    // why there is no engine; tasks run, checkpoints are refused
	cpu      func() (criu.CPU, error) // the same from the machine's start to its end
	boxes    *sandbox.Runtime
	networks *network.Manager
	plugins  []plugins.Plugin // quiesced in this order, resumed in the reverse one
	requests requests
	restores sync.WaitGroup // restores under way
	known    *repository.FileCache
	spool    *spooler
	lanes    *lanes
	answers  *answers
	clock    controllerClock
	garbage  collector
	tree     *treeNode
	links    *treeLinks
	monitor  *monitor
	life     context.Context // of Run
	streams  sync.WaitGroup  // logs and execs under way

	// fateMu keeps the freezing of all tasks at the end of a lease and their
	// thawing by a welcome apart.
	fateMu sync.Mutex

	tasksMu sync.Mutex
	tasks   map[string]*task

	capturesMu sync.Mutex
	captures   map[string]*capturing

	sessionMu sync.Mutex
	current   *session

	bandwidth  bandwidth
	repoMu     sync.Mutex
	repo       *repository.Repository
	repoConfig string
	manifest   ed25519.PublicKey
}

// forgetFiles is after how long without a checkpoint of it the content of a file
// that has not changed is forgotten.
const forgetFiles = 30 * 24 * time.Hour

// New prepares an agent: it checks the configuration, takes the lock of the
// state directory and looks for CRIU. Close, or the end of Run, releases it.
func New(config Config) (_ *Agent, err error) {
	config, err = config.complete()
	if err != nil {
		return nil, err
	}
	a := &Agent{
		config: config, log: config.Logger, life: context.Background(), now: time.Now, after: time.After,
		lanes: newLanes(), answers: newAnswers(), bandwidth: newBandwidth(),
		plugins: []plugins.Plugin{tcp.Plugin{}}, cpu: sync.OnceValues(criu.CPUInfo),
		tasks: map[string]*task{}, captures: map[string]*capturing{},
		requests: requests{waiting: map[string]*agentpb.AppRequest{}},
	}
	defer func() {
		if err != nil {
			a.Close()
		}
	}()
	if a.masters, err = parseControllers(config.Join, config.ServerName); err != nil {
		return nil, err
	}
	for _, dir := range []string{a.tasksDir(), a.workDir(""), a.pagesDir(), a.uploadsDir(), a.criuLogsDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("agent: state directory: %w", err)
		}
	}
	if a.lock, err = lockState(config.State); err != nil {
		return nil, err
	}
	if a.lease, err = openLease(config.State); err != nil {
		return nil, err
	}
	if a.known, err = repository.OpenFileCache(filepath.Join(config.State, "files.cache")); err != nil {
		return nil, err
	}
	if err := a.known.Prune(forgetFiles); err != nil {
		return nil, err
	}
	if a.tree, err = openTreeNode(config.State, config.Node, &a.clock, a.log); err != nil {
		return nil, err
	}
	a.monitor = newMonitor(a)
	a.links = newTreeLinks(a.identity.Load, a.log)
	a.links.node = a.tree
	a.tree.sample, a.tree.toController, a.tree.peers = a.monitor.summary, a.send, a.links
	a.boxes, err = sandbox.New(sandbox.Options{
		Init: config.Init, Cgroup: config.Cgroup, Images: filepath.Join(config.State, "images"),
		Hide: append([]string{config.State, config.Spool}, config.Hide...), Network: taskNetworks{a}, Log: a.log,
	})
	if err != nil {
		return nil, err
	}
	if a.spool, err = newSpooler(config); err != nil {
		return nil, err
	}
	return a, nil
}

// Close gives up what New took. Tasks live on.
func (a *Agent) Close() error {
	var errs []error
	if a.networks != nil {
		errs = append(errs, a.networks.Close())
		a.networks = nil
	}
	if a.repo != nil {
		errs = append(errs, a.repo.Close())
		a.repo = nil
	}
	if a.known != nil {
		errs = append(errs, a.known.Close())
		a.known = nil
	}
	if a.lock != nil {
		errs = append(errs, a.lock.Close())
		a.lock = nil
	}
	return errors.Join(errs...)
}

func (a *Agent) tasksDir() string { return filepath.Join(a.config.State, "tasks") }

func (a *Agent) pagesDir() string { return filepath.Join(a.config.State, "pages") }

func (a *Agent) uploadsDir() string { return filepath.Join(a.config.State, "uploads") }

// lockFile is locked by the agent of a state directory.
const lockFile = "lock"

// lockState keeps a second agent from the same state.
func lockState(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	// The lease guard tries the lock, too, for an instant.
	for deadline := time.Now().Add(time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("agent: another agent runs on %s", dir)
		}
	}
}

// Run joins the controller if this node has not yet, finds its tasks again and
// serves until ctx ends. Tasks live on when it returns.
func (a *Agent) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a.life = ctx
	if a.config.Virtual {
		if err := raiseLoopback(); err != nil {
			return err
		}
	}
	a.criu, a.criuErr = criu.New(ctx, criu.Options{
		Path: a.config.CRIU, Shim: a.config.Shim, Libexec: filepath.Join(a.config.State, "libexec"), Logger: a.log,
	})
	if a.criuErr != nil {
		a.log.Warn("no checkpoints on this node", "error", a.criuErr)
	}
	if err := a.openNetworks(); err != nil {
		return err
	}
	if err := a.recover(ctx); err != nil {
		return fmt.Errorf("find the tasks of an earlier agent: %w", err)
	}
	if err := a.startGuard(); err != nil {
		return err
	}
	var watching sync.WaitGroup
	watching.Go(func() { a.lease.watch(ctx, a.lapse) })
	watching.Go(func() { a.tree.run(ctx) })
	watching.Go(func() { a.monitor.run(ctx) })
	err := a.joinAndServe(ctx)
	cancel()
	a.links.close()
	watching.Wait()
	a.lanes.wait()
	a.restores.Wait()
	a.lanes.wait() // for what restores left to them
	a.streams.Wait()
	for _, t := range a.allTasks() {
		t.unwatch()
	}
	return errors.Join(err, a.closeCaptures(), a.Close())
}

func (a *Agent) joinAndServe(ctx context.Context) error {
	if err := a.join(ctx); err != nil {
		return err
	}
	defer a.masters.close()
	var renewing sync.WaitGroup
	defer renewing.Wait()
	renewing.Go(func() { a.renewCertificates(ctx) })
	a.serve(ctx)
	return nil
}

// lapse freezes every task: the lease has run out, and the controller may give
// them to another node soon.
func (a *Agent) lapse() {
	a.fateMu.Lock()
	defer a.fateMu.Unlock()
	if !a.lease.hasLapsed() {
		return // a welcome came first
	}
	a.log.Warn("the lease ran out: all tasks stand still")
	err := a.holdAll(a.life)
	if err == nil {
		err = a.lease.hold()
	}
	if err != nil {
		a.log.Error("not all tasks stand still: the guard of the lease freezes them", "error", err)
	}
	a.endSession(errors.New("the lease ran out"))
}

func (a *Agent) holdAll(ctx context.Context) error {
	var freezing errgroup.Group
	for _, t := range a.allTasks() {
		freezing.Go(func() error {
			if r, _ := t.snapshot(); r.Stage == stageEnded || r.Stage == stageDestroyed {
				return nil
			}
			if err := t.hold(ctx, holdLease); err != nil {
				return fmt.Errorf("freeze task %s without a lease: %w", t.id(), err)
			}
			return nil
		})
	}
	return freezing.Wait()
}

// welcome does what the controller's first message says. asked is when the
// agent said hello.
func (a *Agent) welcome(ctx context.Context, w *agentpb.Welcome, asked time.Duration) error {
	a.bandwidth.set(w.GetUploadRate())
	if err := a.openRepository(ctx, w.GetRepository(), w.GetManifestKey()); err != nil {
		return err
	}
	a.fateMu.Lock()
	defer a.fateMu.Unlock()
	for _, ref := range w.GetDestroy() {
		a.lanes.run(taskID(ref), func() {
			if err := a.destroy(a.life, ref, true); err != nil {
				a.log.Error("cannot destroy a task", "task", taskID(ref), "error", err)
			}
		})
	}
	if err := a.lease.grant(time.Duration(w.GetLeaseMs())*time.Millisecond, asked); err != nil {
		return err
	}
	// The guard would do this, too, but later.
	if err := freezeCgroup(a.boxes.Cgroup(), false); err != nil && !notExist(err) {
		return fmt.Errorf("let tasks go on: %w", err)
	}
	for _, ref := range w.GetKeep() {
		t, err := a.find(ref)
		if err != nil {
			continue
		}
		if err := t.release(ctx, holdLease); err != nil {
			a.log.Error("cannot let a task go on", "task", t.id(), "error", err)
		}
	}
	return nil
}

// reportTasks tells of what changed between the hello and the session's start.
func (a *Agent) reportTasks() {
	for _, t := range a.allTasks() {
		if r, _ := t.snapshot(); r.Stage == stageEnded {
			a.report(t)
		}
	}
}
