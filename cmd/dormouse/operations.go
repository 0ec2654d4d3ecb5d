package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"dormouse/api"
	"dormouse/client"
)

func (c *cli) operationsCommand() *cobra.Command {
	wait := false
	command := &cobra.Command{
		Use:   "operations [OPERATION]",
		Short: "Show operations that are under way or were done lately",
		Long: `List operations, or show one; of a checkpoint, also what each task's part took so
far (see ` + "`dormouse inspect --help`" + `). With --wait, wait until that one has ended, and exit
with its status: 0 done, 1 failed, 4 refused.`,
		Example: `  dormouse operations
  dormouse operations o-3f7k2m5q --wait`,
		Args:              atMostOne,
		ValidArgsFunction: firstArgument(c.operationIDs()),
		RunE: func(command *cobra.Command, args []string) error {
			if wait && len(args) == 0 {
				return usagef("OPERATION is missing: --wait waits for one operation")
			}
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			if len(args) == 0 {
				operations, err := controller.Operations(command.Context())
				if err != nil {
					return err
				}
				return c.printOperations(operations)
			}
			operation, err := controller.Operation(command.Context(), args[0], 0)
			if err != nil {
				return err
			}
			if wait {
				operation, err = c.follow(command.Context(), controller, operation)
				if err != nil {
					return err
				}
			}
			if c.json() {
				return c.printDocument(operation)
			}
			if err := c.printOperations([]api.Operation{*operation}); err != nil {
				return err
			}
			return c.printStepsOf(command.Context(), controller, operation)
		},
	}
	command.Flags().BoolVar(&wait, "wait", false, "wait until the operation has ended")
	return command
}

// printStepsOf shows what is measured so far of the checkpoint that an operation
// takes.
func (c *cli) printStepsOf(ctx context.Context, controller *client.Client, operation *api.Operation) error {
	if operation.Checkpoint == "" || operation.Kind != api.OpCheckpoint && operation.Kind != api.OpSuspend && operation.Kind != api.OpPreempt {
		return nil
	}
	checkpoint, err := controller.GetCheckpoint(ctx, operation.Checkpoint)
	if client.IsNotFound(err) || err == nil && len(checkpoint.Steps) == 0 {
		return nil // not begun, or removed since
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(c.out)
	return c.printSteps(checkpoint)
}

func (c *cli) printOperations(operations []api.Operation) error {
	if c.json() {
		return c.printDocument(operations)
	}
	rows := [][]string{}
	for _, operation := range operations {
		rows = append(rows, []string{
			operation.ID, string(operation.Kind), firstOf(operation.Job, operation.Node), string(operation.Phase), fmt.Sprintf("%.0f%%", operation.Progress*100),
			firstOf(operation.Error, operation.Message, operation.Step), c.age(operation.Started),
		})
	}
	return c.printTable([]string{"ID", "KIND", "JOB", "PHASE", "PROGRESS", "STEP", "AGE"}, rows)
}
