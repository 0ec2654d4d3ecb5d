package main

import "github.com/spf13/cobra"

func (c *cli) suspendCommand() *cobra.Command {
	detach := false
	command := &cobra.Command{
		Use:   "suspend JOB",
		Short: "Put a job to sleep: checkpoint it and free its nodes",
		Long: `Checkpoint a running job and take it off its nodes. It then lives in the
repository only, until ` + "`dormouse resume`" + `. If anything fails, the job runs on.`,
		Example:           `  dormouse suspend counter`,
		Args:              exactly("JOB"),
		ValidArgsFunction: firstArgument(c.jobs()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			operation, err := controller.Suspend(command.Context(), args[0])
			if err != nil {
				return err
			}
			return c.finish(command.Context(), controller, operation, detach)
		},
	}
	addDetach(command, &detach)
	return command
}
