package main

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"dormouse/api"
)

func (c *cli) verifyCommand() *cobra.Command {
	detach, restore := false, false
	command := &cobra.Command{
		Use:   "verify [CHECKPOINT]",
		Short: "Read and hash everything that checkpoints refer to, or restore one on trial",
		Long: `Read and hash every byte that a checkpoint refers to, or that all checkpoints do,
and check the manifests' signatures. Exit status 1 when anything is damaged.

With --restore, the checkpoint is restored on some node with room, out of reach of
everything: its network is connected to nothing, it publishes no port, and the
running copy of the job never learns of it. When all tasks have come up and lived
for a moment, the trial is thrown away, and the checkpoint keeps the result, which
` + "`dormouse checkpoints`" + ` shows. A job that shares a volume it may write to is
refused: the trial would write there too.`,
		Example: `  dormouse verify
  dormouse verify c-3f7k2m5q
  dormouse verify --restore c-3f7k2m5q`,
		Args:              atMostOne,
		ValidArgsFunction: firstArgument(c.checkpoints()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			begin := controller.Verify
			if restore {
				if len(args) == 0 {
					return usagef("--restore needs the checkpoint to restore: `dormouse checkpoints` lists them")
				}
				begin = controller.Drill
			}
			operation, err := begin(command.Context(), argument(args))
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
			return c.printReports(operation.Result)
		},
	}
	addDetach(command, &detach)
	command.Flags().BoolVar(&restore, "restore", false, "restore the checkpoint on trial, watch it, and throw it away")
	return command
}

// drillText says in a few words how the newest restore on trial went.
func (c *cli) drillText(drill *api.Drill) string {
	if drill == nil {
		return ""
	}
	verdict := "ok"
	if !drill.OK {
		verdict = "failed"
	}
	if drill.RestoreMS > 0 {
		verdict += " in " + humanMS(drill.RestoreMS)
	}
	return verdict + ", " + c.age(drill.Time) + " ago"
}

func (c *cli) printReports(result json.RawMessage) error {
	reports := []api.VerifyReport{}
	if len(result) > 0 {
		if err := json.Unmarshal(result, &reports); err != nil {
			return fmt.Errorf("read the result of the verification: %w", err)
		}
	}
	damaged, rows := 0, [][]string{}
	for _, report := range reports {
		verdict := "ok"
		if !report.OK {
			verdict = "damaged"
			damaged++
		}
		read := humanSize(report.Bytes)
		if report.Drill != nil {
			read = fmt.Sprintf("restored on %s in %s", strings.Join(report.Drill.Nodes, ", "), humanMS(report.Drill.RestoreMS))
		}
		rows = append(rows, []string{report.Checkpoint, verdict, read, strings.Join(report.Problems, "; ")})
	}
	var err error
	if c.json() {
		err = c.printDocument(reports)
	} else {
		err = c.printTable([]string{"CHECKPOINT", "VERDICT", "READ", "PROBLEMS"}, rows)
	}
	if err != nil {
		return err
	}
	if damaged > 0 {
		return fmt.Errorf("%d of %d checkpoints damaged: they cannot be restored, the others can", damaged, len(reports))
	}
	return nil
}
