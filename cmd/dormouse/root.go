package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// cli is what the commands reach of the outside world, and what the flags that
// every command takes were set to.
type cli struct {
	in       io.Reader
	out, err io.Writer
	getenv   func(string) string
	now      func() time.Time
	runDir   string // where a running `up` leaves its pointer file
	terminal bool   // err is a terminal: progress may be drawn

	controller, token, ca string
	output                string
	started               bool // a command's own code was reached: the usage was right
}

// The groups of `dormouse --help`.
const (
	groupJobs     = "jobs"
	groupSleep    = "sleep"
	groupPlatform = "platform"
	groupDaemons  = "daemons"
)

// run executes one command line and returns the exit status.
func run(ctx context.Context, c *cli, args []string) int {
	root := newRoot(c)
	root.SetArgs(args)
	root.SetIn(c.in)
	root.SetOut(c.out)
	root.SetErr(c.err)
	command, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitDone
	}
	if !c.started {
		err = &usageError{reason: err.Error()}
	}
	return report(c.err, command.CommandPath(), err)
}

func newRoot(c *cli) *cobra.Command {
	root := &cobra.Command{
		Use:   "dormouse COMMAND",
		Short: "Put jobs to sleep and wake them elsewhere",
		Long: `Dormouse checkpoints unmodified programs with CRIU, stores the checkpoints, and
restores them on another node.

On a machine where ` + "`dormouse up`" + ` runs, no flag is needed to reach the controller.
Elsewhere, set DORMOUSE_CONTROLLER, DORMOUSE_TOKEN and DORMOUSE_CA; ` + "`dormouse env`" + `
on the controller's machine prints them.

Exit status: 0 done; 1 failed; 2 wrong usage; 3 not found; 4 refused (the state
or a policy forbids it); 5 timed out. ` + "`dormouse exec`" + ` passes on that of its command.`,
		Example: `  sudo dormouse up --cloud east=2 --cloud west=2
  dormouse submit --name counter -- python3 -c 'import itertools,time; [(print(i, flush=True), time.sleep(1)) for i in itertools.count()]'
  dormouse checkpoint counter
  dormouse suspend counter
  dormouse resume counter --cloud west`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		PersistentPreRunE: func(*cobra.Command, []string) error { return c.start() },
	}
	flags := root.PersistentFlags()
	flags.StringVar(&c.controller, "controller", "", "the controller's `URL`, or those of several, separated by commas (default $DORMOUSE_CONTROLLER, else the `up` of this machine)")
	flags.StringVar(&c.token, "token", "", "the `token` to call the controller with (default $DORMOUSE_TOKEN)")
	flags.StringVar(&c.ca, "ca", "", "`file` with the controller's CA certificate (default $DORMOUSE_CA)")
	flags.StringVarP(&c.output, "output", "o", outputTable, "output `format`: table or json")
	mustComplete(root, "output", fixed(outputTable, outputJSON))
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return flagError(err) })
	root.SetHelpCommand(&cobra.Command{Use: "help [COMMAND]", Short: "Show help for a command", Hidden: true, RunE: func(_ *cobra.Command, args []string) error {
		found, rest, err := root.Find(args)
		if err != nil || len(rest) > 0 {
			return usagef("%q is not a command of dormouse", rest[0])
		}
		return found.Help()
	}})
	root.AddGroup(
		&cobra.Group{ID: groupJobs, Title: "Jobs:"},
		&cobra.Group{ID: groupSleep, Title: "Checkpoints, sleep and wake:"},
		&cobra.Group{ID: groupPlatform, Title: "Platform:"},
		&cobra.Group{ID: groupDaemons, Title: "Daemons and set-up:"},
	)
	addGrouped(root, groupJobs, c.submitCommand(), c.psCommand(), c.inspectCommand(), c.waitCommand(), c.logsCommand(), c.execCommand(), c.topCommand(), c.killCommand(), c.rmCommand())
	addGrouped(root, groupSleep, c.checkpointCommand(), c.checkpointsCommand(), c.verifyCommand(), c.suspendCommand(), c.resumeCommand(), c.restartCommand(), c.cloneCommand(), c.preemptCommand(), c.swapCommand())
	addGrouped(root, groupPlatform, c.nodesCommand(), c.nodeCommand(), c.drainCommand(), c.uncordonCommand(), c.cloudsCommand(), c.controllersCommand(), c.eventsCommand(), c.operationsCommand(), c.tokenCommand(), c.auditCommand())
	addGrouped(root, groupDaemons, c.upCommand(), c.controllerCommand(), c.agentCommand(), c.doctorCommand(), c.envCommand(), c.versionCommand(), c.completionCommand())
	root.AddCommand(c.docsCommand(), c.networkHolderCommand())
	onlyCommands(root)
	// Our usage lines say COMMAND themselves.
	root.SetUsageTemplate(strings.Replace(root.UsageTemplate(), "{{if .HasAvailableSubCommands}}\n  {{.CommandPath}} [command]{{end}}", "", 1))
	return root
}

func addGrouped(parent *cobra.Command, group string, commands ...*cobra.Command) {
	for _, command := range commands {
		command.GroupID = group
		parent.AddCommand(command)
	}
}

// onlyCommands makes a command that only has commands below it say so when it
// is called with anything else. Left alone, cobra would print help and succeed.
func onlyCommands(parent *cobra.Command) {
	parent.Args = cobra.ArbitraryArgs
	parent.DisableFlagsInUseLine = true
	parent.SuggestionsMinimumDistance = 2
	parent.RunE = func(command *cobra.Command, args []string) error {
		if len(args) == 0 {
			return command.Help()
		}
		if near := command.SuggestionsFor(args[0]); len(near) > 0 {
			return usagef("%q is not a command of %s; did you mean %q?", args[0], command.CommandPath(), near[0])
		}
		return usagef("%q is not a command of %s", args[0], command.CommandPath())
	}
}

// start is run once a command line was understood, before the command.
func (c *cli) start() error {
	c.started = true
	if c.output != outputTable && c.output != outputJSON {
		return usagef("the output format is %q, but it can only be table or json", c.output)
	}
	return nil
}

// exactly demands one argument for each name.
func exactly(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return fmt.Errorf("%s is missing", names[len(args)])
		}
		if len(args) > len(names) {
			return fmt.Errorf("%q is one argument too many", args[len(names)])
		}
		return nil
	}
}

// atMostOne allows one optional argument.
func atMostOne(_ *cobra.Command, args []string) error {
	if len(args) > 1 {
		return fmt.Errorf("%q is one argument too many", args[1])
	}
	return nil
}
