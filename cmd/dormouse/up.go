package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"dormouse/agent/criu"
	"dormouse/api"
	"dormouse/controller"
	"dormouse/internal/lazyregexp"
)

const (
	// joinTimeout bounds how long the agents of all virtual nodes may take to join.
	joinTimeout = 2 * time.Minute
	// closeTimeout bounds how long a graceful end may take.
	closeTimeout = time.Minute

	defaultListen = "127.0.0.1:7117"
	maxNodes      = 256 // virtual nodes of one machine
	// hostMemoryShare is what `up` offers of the machine's memory; the rest is
	// for the machine itself and the images of checkpoints.
	hostMemoryShare = 0.75
)

// tunnels are the values of --tunnel.
var tunnels = []string{controller.TunnelAuto, controller.TunnelWireGuard, controller.TunnelVXLAN}

var cloudName = lazyregexp.New(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)

// upOptions are the values of up's flags.
type upOptions struct {
	clouds        []string
	cpus          float64
	mem           int64
	state, listen string
	tunnel        string
	onStarvation  string
}

func (c *cli) upCommand() *cobra.Command {
	options := upOptions{}
	command := &cobra.Command{
		Use:   "up",
		Short: "Run a controller and local clouds of virtual nodes here",
		Long: `Run a whole Dormouse on this machine: a controller with its store and repository,
and clouds of virtual nodes, each an agent process with its own state, network
and share of the machine. A bridge in 100.64.0.0/10 connects the nodes. It prints "ready URL" when jobs can be submitted, and
runs until it is interrupted; then the virtual nodes are powered off. Jobs that
ran can be restarted from their newest checkpoint at the next start.

It needs root, as namespaces, cgroups and CRIU do.`,
		Example: `  sudo dormouse up
  sudo dormouse up --cloud east=2 --cloud west=2 --cpus 2 --mem 4G`,
		Args: exactly(),
		RunE: func(command *cobra.Command, _ []string) error {
			clouds, err := options.parse(command.Flags().Changed("cpus"), command.Flags().Changed("mem"))
			if err != nil {
				return err
			}
			return c.up(command.Context(), options, clouds, !command.Flags().Changed("listen"))
		},
	}
	set := command.Flags()
	set.StringArrayVar(&options.clouds, "cloud", []string{"local=1"}, "a cloud and its number of virtual nodes, `NAME=N`, or NAME=N..MAX for one that gets further nodes while jobs wait for room (may be repeated)")
	set.Float64Var(&options.cpus, "cpus", 0, "processors that each node offers (default: all of this machine)")
	set.Var(sizeFlag{&options.mem}, "mem", "memory that each node offers (default: an equal share of three quarters of this machine's)")
	set.StringVar(&options.state, "state", defaultState, "`directory` for everything that must be remembered")
	set.StringVar(&options.listen, "listen", defaultListen, "`address` to listen on (default: any free port if that one is taken)")
	set.StringVar(&options.tunnel, "tunnel", controller.TunnelAuto, "what carries a job's network between nodes: `auto|wireguard|vxlan`; vxlan trusts the network between them")
	set.Lookup("cpus").DefValue = ""
	set.StringVar(&options.onStarvation, "on-starvation", api.StarvationSuspend, "what is done with jobs that are kept from working and do not say it themselves: `suspend|migrate|notify|ignore`")
	return command
}

// parse turns the flags into the controller's clouds.
func (o *upOptions) parse(cpusGiven, memGiven bool) ([]controller.CloudConfig, error) {
	clouds, total, seen := []controller.CloudConfig{}, 0, map[string]bool{}
	for _, text := range o.clouds {
		name, count, found := strings.Cut(text, "=")
		count, greatest, elastic := strings.Cut(count, "..")
		nodes, err := strconv.Atoi(count)
		most := nodes
		if elastic && err == nil {
			most, err = strconv.Atoi(greatest)
		}
		switch {
		case !found || err != nil:
			return nil, usagef("the cloud %q is not NAME=N, as in east=2, nor NAME=N..MAX", text)
		case !cloudName.MatchString(name):
			return nil, usagef("the cloud's name %q is not made of at most 32 small letters, digits and inner dashes", name)
		case seen[name]:
			return nil, usagef("the cloud %s is given twice", name)
		case nodes < 1 || nodes > maxNodes:
			return nil, usagef("the cloud %s cannot have %d nodes: give it 1 to %d", name, nodes, maxNodes)
		case most < nodes || most > maxNodes:
			return nil, usagef("the cloud %s cannot have %d nodes at most: give it %d to %d", name, most, nodes, maxNodes)
		}
		seen[name] = true
		total += most
		clouds = append(clouds, controller.CloudConfig{Name: name, Driver: "local", Tunnel: o.tunnel, Local: &controller.LocalCloud{Nodes: nodes, MaxNodes: most}})
	}
	if !slices.Contains(tunnels, o.tunnel) {
		return nil, usagef("there is no tunnel %q: choose one of %s", o.tunnel, strings.Join(tunnels, ", "))
	}
	if !slices.Contains(api.StarvationPolicies(), o.onStarvation) {
		return nil, usagef("nothing is known to be done about starvation that is called %q: choose one of %s", o.onStarvation, strings.Join(api.StarvationPolicies(), ", "))
	}
	if _, _, err := net.SplitHostPort(o.listen); err != nil {
		return nil, usagef("the address %q is not HOST:PORT, as in %s", o.listen, defaultListen)
	}
	if err := o.capacity(cpusGiven, memGiven, total); err != nil {
		return nil, err
	}
	for i := range clouds {
		clouds[i].Local.CPUs, clouds[i].Local.MemBytes = o.cpus, o.mem
	}
	return clouds, nil
}

// capacity checks or chooses what one node offers.
func (o *upOptions) capacity(cpusGiven, memGiven bool, nodes int) error {
	if !cpusGiven {
		o.cpus = float64(runtime.NumCPU())
	}
	if !(o.cpus >= minCPUs && o.cpus <= maxCPUs) {
		return usagef("a node cannot offer %v processors", o.cpus)
	}
	if memGiven {
		if o.mem < minMem || o.mem > maxMem {
			return usagef("a node cannot offer %s of memory", humanSize(o.mem))
		}
		return nil
	}
	info := unix.Sysinfo_t{}
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("find out how much memory this machine has: %w", err)
	}
	total := float64(info.Totalram) * float64(info.Unit)
	o.mem = int64(total*hostMemoryShare/float64(nodes)) &^ (1<<20 - 1)
	return nil
}

// up runs everything until ctx ends.
func (c *cli) up(ctx context.Context, options upOptions, clouds []controller.CloudConfig, anyPort bool) (err error) {
	program, err := c.checkPrograms(ctx, "up")
	if err != nil {
		return err
	}
	outliveReaders()
	state, err := filepath.Abs(options.state)
	if err != nil {
		return fmt.Errorf("find the state directory: %w", err)
	}
	lock, err := lockState(state)
	if err != nil {
		return err
	}
	defer lock.Close()
	logFile, err := os.OpenFile(filepath.Join(state, "controller.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	defer logFile.Close()
	c.note("dormouse %s: state in %s, log in %s", version, state, logFile.Name())

	if before, ok := addressBefore(state); ok && anyPort {
		options.listen = before
	}
	daemon, err := controller.Start(ctx, controller.Config{Listen: options.listen, AnyPort: anyPort, State: state, Clouds: clouds, OnStarvation: options.onStarvation}, controller.Env{
		Logger: upLogger(c.err, logFile), Version: version,
		AgentCommand: func(config string) []string { return []string{program, "agent", "--config", config} },
		HoldCommand:  holdCommand(program),
	})
	if err != nil {
		return err
	}
	defer func() {
		c.note("dormouse: powering the virtual nodes off")
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		err = errors.Join(err, daemon.Close(closing))
	}()
	remove, err := c.publish(pointer{URL: daemon.URL(), TokenFile: daemon.TokenPath(), CAFile: daemon.CAPath(), State: state, Pid: os.Getpid()})
	if err != nil {
		return err
	}
	defer remove()
	return c.serve(ctx, daemon, clouds)
}

// holdCommand is the anchor of virtual nodes that belongs to this program.
func holdCommand(program string) []string {
	return []string{filepath.Join(filepath.Dir(program), initName), "hold"}
}

// addressBefore is where an `up` on this state listened that was killed: who
// waited for it then finds it again.
func addressBefore(state string) (address string, found bool) {
	killed, err := readPointer(filepath.Join(state, pointerFile))
	if err != nil {
		return "", false
	}
	return strings.CutPrefix(killed.URL, "https://")
}

// serve waits for the nodes, says that all is ready, and waits for the end.
func (c *cli) serve(ctx context.Context, daemon *controller.Daemon, clouds []controller.CloudConfig) error {
	for _, cloud := range clouds {
		c.note("cloud %s: starting %d virtual nodes, each with %v cpus and %s", cloud.Name, cloud.Local.Nodes, cloud.Local.CPUs, humanSize(cloud.Local.MemBytes))
	}
	joining, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	if err := daemon.WaitNodes(joining); err != nil {
		if ctx.Err() == nil && joining.Err() != nil {
			return fmt.Errorf("not every agent joined within %s: %s", joinTimeout, strings.TrimSuffix(err.Error(), ": "+joining.Err().Error()))
		}
		return err
	}
	if err := c.showReady(daemon.URL()); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return nil // interrupted: the usual end
	case <-daemon.Done():
		return daemon.Err()
	}
}

func (c *cli) showReady(url string) error {
	if c.json() {
		return c.printLine(map[string]string{"ready": url})
	}
	_, err := fmt.Fprintf(c.out, "ready %s\n", url)
	return err
}

// upLogger writes everything to the log file, and warnings to people.
func upLogger(people io.Writer, file io.Writer) *slog.Logger {
	return slog.New(slog.NewMultiHandler(
		slog.NewTextHandler(people, &slog.HandlerOptions{Level: slog.LevelWarn}),
		slog.NewTextHandler(file, nil),
	))
}

// checkPrograms makes sure, before anything is changed, that this process may do
// what it must and has the programs it needs; it returns the path of its own.
func (c *cli) checkPrograms(ctx context.Context, verb string) (string, error) {
	if os.Geteuid() != 0 {
		return "", fmt.Errorf("`dormouse %s` needs root, because namespaces, cgroups and CRIU do: run `sudo dormouse %s`", verb, verb)
	}
	program, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find the running program: %w", err)
	}
	if init := filepath.Join(filepath.Dir(program), initName); !fileExists(init) {
		return "", fmt.Errorf("%s is missing: run `make build`, and keep both programs in one directory", init)
	}
	if err := c.checkCRIU(ctx); err != nil {
		return "", err
	}
	return program, nil
}

func (c *cli) checkCRIU(ctx context.Context) error {
	libexec, err := os.MkdirTemp("", "dormouse-criu-")
	if err != nil {
		return fmt.Errorf("look for CRIU: %w", err)
	}
	defer os.RemoveAll(libexec)
	_, err = criu.New(ctx, criu.Options{Path: c.getenv("DORMOUSE_CRIU"), Libexec: libexec, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return fmt.Errorf("%w; `make setup` gets a CRIU that works here", err)
	}
	return nil
}

// lockState makes the state directory and takes it for this process; the lock
// ends with the file.
func lockState(state string) (*os.File, error) {
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, fmt.Errorf("make the state directory: %w", err)
	}
	file, err := os.OpenFile(filepath.Join(state, "up.pid"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the state directory: %w", err)
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer file.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock the state directory: %w", err)
		}
		holder, _ := io.ReadAll(file)
		return nil, &refusedError{fmt.Sprintf("another `dormouse up` (pid %s) uses the state directory %s: end it, or choose another one with --state", strings.TrimSpace(string(holder)), state)}
	}
	if err := file.Truncate(0); err == nil {
		_, err = file.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("write the pid into the state directory: %w", err), file.Close())
		}
	}
	return file, nil
}

// publish writes the pointer files by which the other commands find this `up`.
// The machine's own points to the `up` that came first.
func (c *cli) publish(p pointer) (remove func(), err error) {
	files := []string{filepath.Join(p.State, pointerFile)}
	shared := filepath.Join(c.runDir, pointerFile)
	if other, err := readPointer(shared); err == nil && other.State != p.State && stateLocked(other.State) {
		c.note("another `dormouse up` (pid %d) is this machine's own: reach this one by eval \"$(dormouse env --state %s)\"", other.Pid, p.State)
	} else {
		files = append(files, shared)
	}
	remove = func() {
		for _, file := range files {
			os.Remove(file)
		}
	}
	for _, file := range files {
		if err := writePointer(file, p); err != nil {
			remove()
			return nil, err
		}
	}
	return remove, nil
}

// stateLocked reports whether an `up` runs on a state directory.
func stateLocked(state string) bool {
	file, err := os.Open(filepath.Join(state, "up.pid"))
	if err != nil {
		return false
	}
	defer file.Close()
	return errors.Is(unix.Flock(int(file.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// writePointer replaces the file in one step: a reader sees the old or the new.
func writePointer(file string, p pointer) error {
	encoded, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("encode %s: %w", file, err)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return fmt.Errorf("make the directory of %s: %w", file, err)
	}
	fresh := fmt.Sprintf("%s.%d", file, os.Getpid())
	if err := os.WriteFile(fresh, append(encoded, '\n'), 0o600); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	if err := os.Rename(fresh, file); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", file, err), os.Remove(fresh))
	}
	return nil
}
