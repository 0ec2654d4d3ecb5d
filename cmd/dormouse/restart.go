package main

import (
	"github.com/spf13/cobra"

	"dormouse/client"
)

func (c *cli) restartCommand() *cobra.Command {
	wake, detach := client.Wake{}, false
	command := &cobra.Command{
		Use:   "restart JOB",
		Short: "Take a job back to a checkpoint, whatever it does now",
		Long: `Restore a job from its newest durable checkpoint, or from another one. A job that
runs is ended first: what it did since that checkpoint is lost. A job without any
checkpoint starts anew.`,
		Example: `  dormouse restart counter
  dormouse restart counter --from c-3f7k2m5q --cloud west`,
		Args:              exactly("JOB"),
		ValidArgsFunction: firstArgument(c.jobs()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			operation, err := controller.Restart(command.Context(), args[0], wake)
			if err != nil {
				return err
			}
			return c.finish(command.Context(), controller, operation, detach)
		},
	}
	c.addWake(command, &wake)
	addDetach(command, &detach)
	return command
}
