package main

import "github.com/spf13/cobra"

func (c *cli) rmCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rm JOB",
		Short: "Forget a job that is over, with its checkpoints",
		Long: `Forget a job that is over or suspended: its record, its logs and its checkpoints.
A job that runs is refused: end it first with ` + "`dormouse kill`" + `.`,
		Example: `  dormouse rm counter`,
		Args:    exactly("JOB"), ValidArgsFunction: firstArgument(c.jobs()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			job, err := controller.Job(command.Context(), args[0])
			if err != nil {
				return err
			}
			if err := controller.RemoveJob(command.Context(), job.ID); err != nil {
				return err
			}
			return c.show(job, "%s removed", job.ID)
		},
	}
}
