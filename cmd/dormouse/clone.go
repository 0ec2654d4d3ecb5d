package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func (c *cli) cloneCommand() *cobra.Command {
	cloud, name, detach := "", "", false
	command := &cobra.Command{
		Use:   "clone CHECKPOINT",
		Short: "Start a new job from a checkpoint and print its id",
		Example: `  dormouse clone c-3f7k2m5q
  dormouse clone c-3f7k2m5q --cloud west --name what-if`,
		Args:              exactly("CHECKPOINT"),
		ValidArgsFunction: firstArgument(c.checkpoints()),
		RunE: func(command *cobra.Command, args []string) error {
			if name != "" && !jobName.MatchString(name) {
				return badName(name)
			}
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			operation, err := controller.Clone(command.Context(), args[0], cloud, name)
			if err != nil {
				return err
			}
			if detach {
				return c.show(operation, "%s", operation.ID)
			}
			operation, err = c.follow(command.Context(), controller, operation)
			if err != nil {
				return err
			}
			job, err := controller.Job(command.Context(), operation.Job)
			if err != nil {
				return fmt.Errorf("the clone %s runs, but cannot be shown: %w", operation.Job, err)
			}
			return c.show(job, "%s", job.ID)
		},
	}
	command.Flags().StringVar(&cloud, "cloud", "", "start in this `cloud` (default: where there is room)")
	command.Flags().StringVar(&name, "name", "", "`name` by which the new job can be called instead of its id")
	addDetach(command, &detach)
	mustComplete(command, "cloud", c.clouds())
	return command
}
