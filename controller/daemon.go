package controller

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/api"
	"dormouse/controller/interval"
	"dormouse/controller/pki"
	"dormouse/controller/store"
	"dormouse/controller/store/etcd"
	"dormouse/drivers"
	"dormouse/drivers/local"
	"dormouse/repository"
	backendlocal "dormouse/repository/backend/local"
)

// Env is what a Daemon needs of the program that it is part of.
type Env struct {
	Logger  *slog.Logger
	Version string
	// AgentCommand is the command line of an agent with a configuration file,
	// for local clouds.
	AgentCommand func(configFile string) []string
	// HoldCommand is the command line of the anchor of a virtual node's network
	// namespace, for local clouds.
	HoldCommand []string
}

// Daemon is a controller with its store, keys, repository, clouds and listener.
type Daemon struct {
	config     Config
	log        *slog.Logger
	lock       *os.File
	store      store.Store
	repository *repository.Repository
	keys       *pki.PKI
	controller *Controller
	server     *http.Server
	tcp        net.Listener
	token      string
	clouds     []Cloud
	fabric     *local.Fabric // of all local clouds
	done       chan struct{}
	failed     sync.Once
	err        error

	role    atomic.Pointer[role]
	resign  context.CancelFunc // ends members; nil when this controller is alone
	members sync.WaitGroup
}

// Start brings a controller up: it opens what is in the state directory,
// listens, takes up what was under way, and provisions the clouds' nodes. It
// leaves nothing behind when it fails.
func Start(ctx context.Context, config Config, env Env) (*Daemon, error) {
	if err := config.complete(); err != nil {
		return nil, err
	}
	d := &Daemon{config: config, log: env.Logger, done: make(chan struct{})}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	if err := d.start(ctx, env); err != nil {
		return nil, errors.Join(err, d.Close(context.WithoutCancel(ctx)))
	}
	return d, nil
}

func (d *Daemon) start(ctx context.Context, env Env) error {
	if err := d.openState(ctx); err != nil {
		return err
	}
	if err := d.listen(); err != nil {
		return err
	}
	joinToken, err := secret(d.path("join.token"))
	if err != nil {
		return err
	}
	repositoryConfig, err := json.Marshal(d.config.Repository)
	if err != nil {
		return err
	}
	parts := Parts{
		Store: d.store, PKI: d.keys, Repository: d.repository, RepositoryConfig: repositoryConfig,
		AdminToken: d.token, Access: d.config.Access, JoinToken: joinToken, Logger: d.log, Version: env.Version,
		Heartbeat: d.config.Heartbeat, Lease: d.config.Lease, AgentURL: d.agentURL, State: d.config.State,
		AgentLife: d.config.AgentCertificates, Round: d.config.Monitor.Round, Arity: d.config.Monitor.Arity,
		Relief:  Relief{Policy: d.config.OnStarvation, Gap: d.config.Monitor.Gap, AtOnce: d.config.Monitor.AtOnce},
		Bounds:  interval.Bounds{Min: d.config.Auto.Shortest, Max: d.config.Auto.Longest},
		Cluster: alone{api.Controller{Name: d.config.Name, URL: d.URL(), Version: env.Version, Leads: true}},
	}
	if shared, several := d.store.(*etcd.Store); several {
		return d.startMember(ctx, shared, parts)
	}
	if d.controller, err = New(parts); err != nil {
		return err
	}
	d.role.Store(&role{d.controller})
	if err := d.controller.Start(ctx); err != nil {
		return err
	}
	if err := d.serve(); err != nil {
		return err
	}
	return d.addClouds(ctx, env)
}

func (d *Daemon) path(name string) string { return filepath.Join(d.config.State, name) }

// openState opens everything in the state directory, for this process only.
func (d *Daemon) openState(ctx context.Context) (err error) {
	if err := os.MkdirAll(d.config.State, 0o700); err != nil {
		return fmt.Errorf("make the state directory: %w", err)
	}
	if d.lock, err = lockFile(d.path("lock"), d.config.State); err != nil {
		return err
	}
	if d.store, err = OpenStore(ctx, d.config, d.log); err != nil {
		return err
	}
	if shared, several := d.store.(*etcd.Store); several {
		if err := d.shareKeys(ctx, shared); err != nil {
			return err
		}
	}
	if d.keys, err = pki.Open(d.path("pki"), time.Now); err != nil {
		return err
	}
	if d.token, err = secret(d.path("admin.token")); err != nil {
		return err
	}
	backend, err := backendlocal.Open(d.config.Repository.Path)
	if err != nil {
		return err
	}
	if err := repository.Init(ctx, backend); err != nil {
		return err
	}
	d.repository, err = repository.Open(ctx, backend, repository.Options{CacheDir: d.path("repository-cache")})
	return err
}

func lockFile(file, state string) (*os.File, error) {
	lock, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the state directory: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("another controller runs with the state directory %s: stop it, or choose another with --state", state)
	}
	return lock, nil
}

// secret reads the token in file, and makes one when there is none.
func secret(file string) (string, error) {
	text, err := os.ReadFile(file)
	if err == nil && len(strings.TrimSpace(string(text))) > 0 {
		return strings.TrimSpace(string(text)), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read a token: %w", err)
	}
	token := rand.Text()
	temporary := file + ".new"
	if err := os.WriteFile(temporary, []byte(token+"\n"), 0o600); err != nil {
		return "", fmt.Errorf("write a token: %w", err)
	}
	return token, os.Rename(temporary, file)
}

func (d *Daemon) listen() error {
	listener, err := net.Listen("tcp", d.config.Listen)
	if errors.Is(err, syscall.EADDRINUSE) && d.config.AnyPort {
		host, _, splitErr := net.SplitHostPort(d.config.Listen)
		if splitErr != nil {
			return splitErr
		}
		listener, err = net.Listen("tcp", net.JoinHostPort(host, "0"))
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("the address %s is in use: stop what listens there, or choose another with --listen", d.config.Listen)
	}
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	d.tcp = listener
	return nil
}

func (d *Daemon) socket() string { return d.path("controller.sock") }

// serve answers on TCP and on the unix socket that virtual nodes, which have
// no network, use.
func (d *Daemon) serve() error {
	host, _, err := net.SplitHostPort(d.tcp.Addr().String())
	if err != nil {
		return err
	}
	names := append([]string{}, d.config.Names...)
	if ip := net.ParseIP(host); ip == nil || !ip.IsUnspecified() {
		names = append(names, host)
	}
	if name, err := os.Hostname(); err == nil {
		names = append(names, name)
	}
	certificate, err := d.keys.Server(names, d.log)
	if err != nil {
		return err
	}
	// A socket file that a killed controller left behind; the lock says that it is dead.
	if err := os.Remove(d.socket()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the old socket: %w", err)
	}
	socket, err := net.Listen("unix", d.socket())
	if err != nil {
		return fmt.Errorf("listen on %s (a socket's path may have 107 characters): %w", d.socket(), err)
	}
	if err := os.Chmod(d.socket(), 0o600); err != nil {
		return errors.Join(err, socket.Close())
	}
	d.server = &http.Server{
		Handler: d, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		TLSConfig: &tls.Config{
			GetCertificate: certificate.Get, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: d.keys.Pool(), MinVersion: tls.VersionTLS13,
		},
		ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelDebug),
	}
	ended := make(chan error, 2)
	for _, listener := range []net.Listener{d.tcp, socket} {
		go func() { ended <- d.server.ServeTLS(listener, "", "") }()
	}
	go d.watchServer(ended)
	return nil
}

// watchServer ends the daemon when a listener breaks.
func (d *Daemon) watchServer(ended <-chan error) {
	for range 2 {
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			d.fail(fmt.Errorf("the controller's listener broke: %w", err))
		}
	}
	close(d.done)
}

// fail ends the daemon by itself.
func (d *Daemon) fail(err error) {
	d.failed.Do(func() {
		d.err = err
		d.server.Close()
	})
}

func (d *Daemon) agentURL(cloud string) string {
	for _, c := range d.config.Clouds {
		if c.Name == cloud && c.Driver == driverLocal {
			return "unix://" + d.socket()
		}
	}
	return d.URL()
}

func (d *Daemon) addClouds(ctx context.Context, env Env) error {
	id, err := secret(d.path("id"))
	if err != nil {
		return err
	}
	if d.fabric, err = local.NewFabric(d.path("fabric.json"), id, d.log); err != nil {
		return err
	}
	for _, config := range d.config.Clouds {
		cloud := config.cloud()
		if config.Driver == driverLocal {
			cloud.Nodes, cloud.Most, cloud.Idle = config.nodes(), config.Local.MaxNodes, config.Local.IdleFor
			cloud.Driver, err = local.New(local.Options{
				Cloud: config.Name, Dir: d.path("nodes"), Group: "dormouse-" + strings.ToLower(id[:8]),
				Bootstrap: d.controller.Bootstrap(config.Name), Command: env.AgentCommand, Logger: d.log,
				Fabric: d.fabric, Hold: env.HoldCommand,
				// Tasks share this machine: they must not find our keys on it.
				Agent: map[string]any{"hide": []string{d.config.State}},
			})
			if err != nil {
				return fmt.Errorf("cloud %s: %w", config.Name, err)
			}
		}
		d.clouds = append(d.clouds, cloud)
		if err := d.controller.AddCloud(ctx, cloud); err != nil {
			return err
		}
	}
	return nil
}

// URL is where REST answers.
func (d *Daemon) URL() string {
	if d.config.Advertise != "" {
		return d.config.Advertise
	}
	return "https://" + d.tcp.Addr().String()
}

// Token is the admin token.
func (d *Daemon) Token() string { return d.token }

// TokenPath is the file that holds it.
func (d *Daemon) TokenPath() string { return d.path("admin.token") }

// JoinTokenPath is the file with the token for agents that join by themselves.
func (d *Daemon) JoinTokenPath() string { return d.path("join.token") }

// CAPath is the certificate that clients and agents check the controller by.
func (d *Daemon) CAPath() string { return d.keys.CAPath() }

// Done is closed when the listener has ended, by Close or by itself.
func (d *Daemon) Done() <-chan struct{} { return d.done }

// Err is why the daemon ended by itself; nil after Close. Valid after Done.
func (d *Daemon) Err() error { return d.err }

// WaitNodes returns when every node of the local clouds is ready.
func (d *Daemon) WaitNodes(ctx context.Context) error {
	var waiting string
	_, err := d.controller.until(ctx, nil, func(tx store.Tx) (bool, error) {
		for _, cloud := range d.clouds {
			for _, spec := range cloud.Nodes {
				n, err := store.Get[nodeRecord](tx, store.Nodes, spec.Name)
				if err != nil {
					return false, err
				}
				if n.State != api.NodeReady && n.State != api.NodeCordoned {
					waiting = fmt.Sprintf("node %s is %s; its agent's log is %s", n.ID, n.State, filepath.Join(d.path("nodes"), n.ID, "agent.log"))
					return false, nil
				}
			}
		}
		return true, nil
	})
	if err != nil && waiting != "" {
		return fmt.Errorf("%s: %w", waiting, err)
	}
	return err
}

// Close ends everything. Virtual nodes are powered off, and the jobs on them
// recorded as failed, with what restarts them. Jobs on real nodes run on. It
// may be called again, and after a Start that failed.
func (d *Daemon) Close(ctx context.Context) error {
	var errs []error
	if d.resign != nil {
		d.resign()
		d.members.Wait()
	}
	if d.controller != nil {
		d.controller.Stop()
	}
	if d.server != nil {
		errs = append(errs, d.server.Close())
		<-d.done
		os.Remove(d.socket())
	} else if d.tcp != nil {
		errs = append(errs, d.tcp.Close())
	}
	for _, cloud := range d.clouds {
		if cloud.Driver == nil {
			continue
		}
		errs = append(errs, cloud.Driver.Close(ctx))
		nodes, err := cloud.Driver.Nodes(ctx)
		errs = append(errs, err, d.controller.powerWasCut(ctx, nodes))
	}
	if d.fabric != nil {
		errs = append(errs, d.fabric.Close())
	}
	if d.repository != nil {
		errs = append(errs, d.repository.Close())
	}
	if d.store != nil {
		errs = append(errs, d.store.Close())
	}
	if d.lock != nil {
		errs = append(errs, d.lock.Close())
	}
	d.clouds, d.fabric, d.server, d.tcp, d.repository, d.store, d.lock = nil, nil, nil, nil, nil, nil, nil
	return errors.Join(errs...)
}

// powerWasCut records what the end of `up` means for its nodes and their jobs.
func (c *Controller) powerWasCut(ctx context.Context, nodes []drivers.Node) error {
	off := make(map[string]bool)
	for _, n := range nodes {
		off[n.Name] = n.Power == drivers.PowerOff
	}
	return c.store.Update(ctx, func(tx store.Tx) error {
		for id, isOff := range off {
			n, err := store.Get[nodeRecord](tx, store.Nodes, id)
			if errors.Is(err, store.ErrNotFound) || !isOff {
				continue
			}
			if err != nil {
				return err
			}
			n.AgentPid = 0
			n.Tally = n.Tally.After(c.clock.Now().UTC(), up(n.State)) // its end is no failure
			if err := c.writeNodeState(tx, n, api.NodeLost, "`dormouse up` ended"); err != nil {
				return err
			}
		}
		jobs, err := store.All[jobRecord](tx, store.Jobs)
		if err != nil {
			return err
		}
		for i := range jobs {
			if err := c.endWithUp(tx, &jobs[i], off); err != nil {
				return err
			}
		}
		return nil
	})
}

// endWithUp fails a job that had tasks on nodes that are off now, and the
// operation it was in.
func (c *Controller) endWithUp(tx store.Tx, job *jobRecord, off map[string]bool) error {
	affected := false
	for _, ref := range job.liveRefs() {
		affected = affected || off[ref.Node]
	}
	if !affected || !job.Phase.Placed() {
		return nil
	}
	const reason = "`dormouse up` was ended while the job ran"
	if err := c.failOperation(tx, job, reason); err != nil {
		return err
	}
	if job.Drill {
		_, err := forgetTrial(tx, job)
		return err
	}
	for i := range job.TaskStatus {
		loseTasks(job, job.TaskStatus[i].Node, reason)
	}
	checkpoint, err := newestDurable(tx, job)
	if err != nil {
		return err
	}
	job.Operation = ""
	if err := c.finish(tx, job, api.PhaseFailed, reason+"; "+adviceFor(job.ID, checkpoint), nil); err != nil {
		return err
	}
	return errors.Join(keepLogsOnly(tx, job), putJob(tx, job))
}

// failOperation ends the operation that a job is in, without its undo steps:
// there is nothing left to undo.
func (c *Controller) failOperation(tx store.Tx, job *jobRecord, reason string) error {
	if job.Operation == "" {
		return nil
	}
	op, err := getOperation(tx, job.Operation)
	if err != nil {
		return err
	}
	now := c.clock.Now().UTC()
	op.Phase, op.Finished, op.Error = api.OpFailed, &now, reason
	if op.Kind == api.OpCheckpoint || op.Kind == api.OpSuspend || op.Kind == api.OpPreempt {
		cp, err := store.Get[api.Checkpoint](tx, store.Checkpoints, op.Checkpoint)
		if err != nil {
			return err
		}
		if cp.State != api.CheckpointDurable {
			cp.State, cp.Error = api.CheckpointFailed, reason
			if err := store.Put(tx, store.Checkpoints, cp.ID, cp); err != nil {
				return err
			}
		}
	}
	if op.Then != "" {
		next, err := getOperation(tx, op.Then)
		if err != nil {
			return err
		}
		next.Phase, next.Finished, next.Error, next.After = api.OpFailed, &now, reason, ""
		if err := putOperation(tx, next); err != nil {
			return err
		}
	}
	return putOperation(tx, op)
}
