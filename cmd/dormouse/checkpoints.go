package main

import (
	"github.com/spf13/cobra"

	"dormouse/api"
)

func (c *cli) checkpointsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "checkpoints [JOB]",
		Short: "List checkpoints, of one job or of all",
		Example: `  dormouse checkpoints counter
  dormouse checkpoints -o json`,
		Args:              atMostOne,
		ValidArgsFunction: firstArgument(c.jobs()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			checkpoints, err := controller.Checkpoints(command.Context(), argument(args))
			if err != nil {
				return err
			}
			if c.json() {
				return c.printDocument(checkpoints)
			}
			return c.printCheckpoints(checkpoints)
		},
	}
}

func (c *cli) printCheckpoints(checkpoints []api.Checkpoint) error {
	rows := [][]string{}
	for _, checkpoint := range checkpoints {
		rows = append(rows, []string{
			checkpoint.ID, checkpoint.Job, string(checkpoint.State), string(checkpoint.Trigger), checkpoint.Label, c.age(checkpoint.Created),
			humanMS(checkpoint.PauseMS), humanSize(checkpoint.SizeBytes), humanSize(checkpoint.StoredBytes), humanSize(checkpoint.NewBytes), checkpoint.Parent, firstOf(c.drillText(checkpoint.Drill), "-"),
		})
	}
	return c.printTable([]string{"ID", "JOB", "STATE", "TRIGGER", "LABEL", "AGE", "PAUSE", "SIZE", "STORED", "NEW", "PARENT", "DRILL"}, rows)
}

// argument is the optional argument of a command.
func argument(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}
