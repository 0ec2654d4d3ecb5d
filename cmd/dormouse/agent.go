package main

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"dormouse/agent"
	"dormouse/agent/pagefs"
)

// defaultAgentState is where an agent keeps what it must remember.
const defaultAgentState = "/var/lib/dormouse/agent"

// agentFlags are the values of agent's flags.
type agentFlags struct {
	file     string
	underlay string
	config   agent.Config
}

func (c *cli) agentCommand() *cobra.Command {
	flags := agentFlags{}
	command := &cobra.Command{
		Use:   "agent",
		Short: "Run the agent of one node",
		Long: `Run the agent by which a node belongs to a cloud. It dials the controller, so the
node may be behind NAT; nothing dials it. The join token is needed only the first
time: with it the agent gets a certificate, which it keeps in its state directory.
Tasks live on when the agent ends, and are found again by the next one.

The token may also be given by $DORMOUSE_JOIN_TOKEN or --token-file, where other
users cannot see it.`,
		Example: `  sudo dormouse agent --join https://controller.example:7117 --token-file join.token --ca ca.pem --cloud rack1
  sudo dormouse agent --config /etc/dormouse/agent.yaml`,
		Args: exactly(),
		RunE: func(command *cobra.Command, _ []string) error {
			config, err := c.agentConfig(command, flags)
			if err != nil {
				return err
			}
			return c.agent(command.Context(), config)
		},
	}
	set := command.Flags()
	set.StringVar(&flags.file, "config", "", "read everything from a YAML or JSON `file`; flags override it")
	set.StringVar(&flags.config.Join, "join", "", "the controller's `URL`; where there are several, all of them with commas between")
	set.StringVar(&flags.config.Token, "token", "", "join `token`")
	set.StringVar(&flags.config.TokenFile, "token-file", "", "`file` with the join token")
	set.StringVar(&flags.config.CA, "ca", "", "`file` with the controller's CA certificate")
	set.StringVar(&flags.config.Node, "node", "", "the node's `name` (default: the host name)")
	set.StringVar(&flags.config.Cloud, "cloud", "", "the `cloud` that the node belongs to")
	set.StringVar(&flags.config.State, "state", "", "`directory` for everything that must be remembered (default "+defaultAgentState+")")
	set.StringVar(&flags.config.Spool, "spool", "", "`directory` for captured images when memory is short (default: below the state)")
	set.StringVar(&flags.underlay, "underlay", "", "the `address` by which other nodes reach this one (default: the one from which it reaches the controller)")
	set.Float64Var(&flags.config.CPUs, "cpus", 0, "processors to offer (default: all)")
	set.Var(sizeFlag{&flags.config.MemBytes}, "mem", "memory to offer (default: all)")
	set.Lookup("cpus").DefValue = ""
	return command
}

// agentConfig merges the file, the flags and the environment.
func (c *cli) agentConfig(command *cobra.Command, flags agentFlags) (agent.Config, error) {
	config := agent.Config{}
	if flags.file != "" {
		read, err := agent.LoadConfig(flags.file)
		if err != nil {
			return config, usagef("read the agent's configuration: %v", err)
		}
		config = read
	}
	changed, given := command.Flags().Changed, flags.config
	override(changed("join"), &config.Join, given.Join)
	override(changed("token"), &config.Token, given.Token)
	override(changed("token-file"), &config.TokenFile, given.TokenFile)
	override(changed("ca"), &config.CA, given.CA)
	override(changed("node"), &config.Node, given.Node)
	override(changed("cloud"), &config.Cloud, given.Cloud)
	override(changed("state"), &config.State, given.State)
	override(changed("spool"), &config.Spool, given.Spool)
	override(changed("cpus"), &config.CPUs, given.CPUs)
	override(changed("mem"), &config.MemBytes, given.MemBytes)
	if changed("underlay") {
		address, err := netip.ParseAddr(flags.underlay)
		if err != nil {
			return config, usagef("the underlay address %q is no IP address, as in 10.0.0.7", flags.underlay)
		}
		config.Underlay = address
	}
	if config.Token == "" && config.TokenFile == "" {
		config.Token = c.getenv("DORMOUSE_JOIN_TOKEN")
	}
	config.CA = firstOf(config.CA, c.getenv("DORMOUSE_CA"))
	config.State = firstOf(config.State, defaultAgentState)
	config.CRIU = firstOf(config.CRIU, c.getenv("DORMOUSE_CRIU"))
	config.Version = version
	if config.Node == "" {
		name, err := os.Hostname()
		if err != nil {
			return config, usagef("find out the host name: %v; name the node with --node", err)
		}
		config.Node, _, _ = strings.Cut(name, ".")
	}
	return config, checkAgentConfig(config)
}

func checkAgentConfig(config agent.Config) error {
	switch {
	case config.Join == "":
		return usagef("there is no controller to join: give its URL with --join")
	case config.Cloud == "":
		return usagef("the node belongs to no cloud: name one with --cloud")
	case config.CPUs < 0 || config.CPUs > maxCPUs:
		return usagef("a node cannot offer %v processors", config.CPUs)
	case config.MemBytes < 0:
		return usagef("a node cannot offer %d bytes of memory", config.MemBytes)
	}
	return nil
}

// agent runs until ctx ends; then its tasks live on.
func (c *cli) agent(ctx context.Context, config agent.Config) error {
	if os.Geteuid() != 0 {
		return errors.New("`dormouse agent` needs root, because namespaces, cgroups and CRIU do: run it with sudo or as a system service")
	}
	if !config.Virtual {
		if err := agent.EnterMountNamespace(); err != nil {
			return err
		}
	}
	outliveReaders()
	config.Logger = c.daemonLogger()
	// While as many goroutines hash as there are processors, the answer to a read
	// of CRIU's must not wait until one of them has used up its share.
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + pagefs.Readers)
	daemon, err := agent.New(config)
	if err != nil {
		return err
	}
	err = daemon.Run(ctx)
	if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
		return nil
	}
	return err
}

// outliveReaders lets a daemon go on when whoever read its output is gone: a
// write then fails, instead of ending the process by SIGPIPE, signal(7). The
// signal is caught rather than ignored, because ignoring is inherited by every
// child.
func outliveReaders() { signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) }

// daemonLogger logs to standard error, where a system service's log is.
func (c *cli) daemonLogger() *slog.Logger {
	if c.json() {
		return slog.New(slog.NewJSONHandler(c.err, nil))
	}
	return slog.New(slog.NewTextHandler(c.err, nil))
}
