package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"dormouse/api"
)

func (c *cli) checkpointCommand() *cobra.Command {
	label, detach := "", false
	command := &cobra.Command{
		Use:   "checkpoint JOB",
		Short: "Checkpoint a running job and print the checkpoint's id",
		Long: `Capture a running job and store the capture in the repository. The job stands
still only while it is captured, not while it is stored; all its tasks at the same
time, so that what they sent each other is captured too. The command returns when
the checkpoint is durable: from then on it survives the loss of the job's nodes.

` + "`dormouse inspect`" + ` shows what each task's part took. A program can ask for a checkpoint
of its own job, from inside, with dormouse-ctl checkpoint.`,
		Example: `  dormouse checkpoint counter --label before-upgrade
  dormouse checkpoint rm c-3f7k2m5q`,
		Args:              exactly("JOB"),
		ValidArgsFunction: firstArgument(c.jobs()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			operation, err := controller.Checkpoint(command.Context(), args[0], label)
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
			checkpoint, err := controller.GetCheckpoint(command.Context(), operation.Checkpoint)
			if err != nil {
				return fmt.Errorf("the checkpoint %s is done, but cannot be shown: %w", operation.Checkpoint, err)
			}
			if c.terminal {
				c.note("%s", summarise(checkpoint))
			}
			return c.show(checkpoint, "%s", checkpoint.ID)
		},
	}
	command.Flags().StringVarP(&label, "label", "l", "", "`text` to tell the checkpoint by")
	addDetach(command, &detach)
	addGrouped(command, "", c.checkpointRmCommand())
	return command
}

func (c *cli) checkpointRmCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "rm CHECKPOINT",
		Short:             "Remove a checkpoint from the repository",
		Long:              "Remove a checkpoint. What no other checkpoint needs leaves the repository.",
		Example:           `  dormouse checkpoint rm c-3f7k2m5q`,
		Args:              exactly("CHECKPOINT"),
		ValidArgsFunction: firstArgument(c.checkpoints()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			checkpoint, err := controller.GetCheckpoint(command.Context(), args[0])
			if err != nil {
				return err
			}
			if err := controller.RemoveCheckpoint(command.Context(), checkpoint.ID); err != nil {
				return err
			}
			return c.show(checkpoint, "%s removed", checkpoint.ID)
		},
	}
}

func summarise(checkpoint *api.Checkpoint) string {
	text := fmt.Sprintf("paused %s, captured %s, stored as %s of which %s new, durable after %s",
		humanMS(checkpoint.PauseMS), humanSize(checkpoint.SizeBytes), humanSize(checkpoint.StoredBytes), humanSize(checkpoint.NewBytes), humanMS(checkpoint.DurableMS))
	if slowest := straggler(checkpoint); slowest != "" {
		text += "; slowest: " + slowest
	}
	return text
}
