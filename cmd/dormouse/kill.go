package main

import (
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func (c *cli) killCommand() *cobra.Command {
	name, detach := "", false
	command := &cobra.Command{
		Use:   "kill JOB",
		Short: "End a job, or send it a signal",
		Long: `End a job: its processes get SIGTERM, and SIGKILL if they do not end. The job is
then cancelled; its checkpoints stay. An operation that the job is in is called off
where that is safe, and otherwise waited for.

With --signal, only send that signal; the job goes on if its processes do.`,
		Example: `  dormouse kill counter
  dormouse kill counter --signal USR1`,
		Args:              exactly("JOB"),
		ValidArgsFunction: firstArgument(c.jobs()),
		RunE: func(command *cobra.Command, args []string) error {
			signal, err := signalName(name)
			if err != nil {
				return err
			}
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			operation, err := controller.Kill(command.Context(), args[0], signal)
			if err != nil {
				return err
			}
			if signal == "" || detach || c.json() {
				return c.finish(command.Context(), controller, operation, detach)
			}
			operation, err = c.follow(command.Context(), controller, operation)
			if err != nil {
				return err
			}
			return c.show(nil, "%s got %s", operation.Job, signal)
		},
	}
	command.Flags().StringVarP(&name, "signal", "s", "", "send only this `signal`, such as USR1 or SIGHUP")
	addDetach(command, &detach)
	mustComplete(command, "signal", fixed("HUP", "INT", "QUIT", "KILL", "USR1", "USR2", "TERM", "CONT", "STOP"))
	return command
}

// signalName completes USR1 to SIGUSR1 and refuses what is no signal.
func signalName(name string) (string, error) {
	if name == "" {
		return "", nil
	}
	full := strings.ToUpper(name)
	if !strings.HasPrefix(full, "SIG") {
		full = "SIG" + full
	}
	if unix.SignalNum(full) == 0 {
		return "", usagef("%q is not a signal such as TERM or SIGUSR1", name)
	}
	return full, nil
}
