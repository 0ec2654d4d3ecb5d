package main

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"dormouse/api"
)

func (c *cli) verifyCommand() *cobra.Command {
	detach := false
	command := &cobra.Command{
		Use:   "verify [CHECKPOINT]",
		Short: "Read and hash everything that checkpoints refer to",
		Long: `Read and hash every byte that a checkpoint refers to, or that all checkpoints do,
and check the manifests' signatures. Exit status 1 when anything is damaged.`,
		Example: `  dormouse verify
  dormouse verify c-3f7k2m5q`,
		Args:              atMostOne,
		ValidArgsFunction: firstArgument(c.checkpoints()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			operation, err := controller.Verify(command.Context(), argument(args))
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
	return command
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
		rows = append(rows, []string{report.Checkpoint, verdict, humanSize(report.Bytes), strings.Join(report.Problems, "; ")})
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
