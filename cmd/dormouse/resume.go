package main

import (
	"github.com/spf13/cobra"

	"dormouse/client"
)

func (c *cli) resumeCommand() *cobra.Command {
	wake, detach := client.Wake{}, false
	command := &cobra.Command{
		Use:   "resume JOB",
		Short: "Wake a suspended job",
		Long:  "Restore a suspended job from its newest durable checkpoint, or from another one.",
		Example: `  dormouse resume counter
  dormouse resume counter --cloud west
  dormouse resume counter --from c-3f7k2m5q`,
		Args:              exactly("JOB"),
		ValidArgsFunction: firstArgument(c.jobs()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			operation, err := controller.Resume(command.Context(), args[0], wake)
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

func (c *cli) addWake(command *cobra.Command, wake *client.Wake) {
	command.Flags().StringVar(&wake.Cloud, "cloud", "", "restore in this `cloud` (default: where there is room)")
	command.Flags().StringVar(&wake.From, "from", "", "restore this `checkpoint` (default: the newest durable one)")
	mustComplete(command, "cloud", c.clouds())
	mustComplete(command, "from", c.checkpoints())
}
