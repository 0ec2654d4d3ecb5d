package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"dormouse/api"
	"dormouse/client"
)

// lately is for how long an operation that has ended is listed.
const lately = time.Hour

func (c *cli) operationsCommand() *cobra.Command {
	wait, all := false, false
	command := &cobra.Command{
		Use:   "operations [JOB|OPERATION]",
		Short: "Show operations that are under way or were done lately",
		Long: `List the operations that are under way or ended within the last hour, with --all
all that are remembered; with JOB, only that job's. Or show one operation; of a
checkpoint, also what each task's part took so far (see ` + "`dormouse inspect --help`" + `).
With --wait, wait until that one has ended, and exit with its status: 0 done,
1 failed or cancelled, 4 refused.`,
		Example: `  dormouse operations
  dormouse operations --all counter
  dormouse operations o-3f7k2m5q --wait
  dormouse operations cancel o-3f7k2m5q`,
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
				return c.listOperations(command.Context(), controller, "", all)
			}
			operation, err := controller.Operation(command.Context(), args[0], 0)
			if client.IsNotFound(err) && !wait {
				job, jobErr := controller.Job(command.Context(), args[0])
				if client.IsNotFound(jobErr) {
					return fmt.Errorf("there is no job and %w", err)
				}
				if jobErr != nil {
					return jobErr
				}
				return c.listOperations(command.Context(), controller, job.ID, all)
			}
			if err != nil {
				return err
			}
			if wait {
				operation, err = c.follow(command.Context(), controller, operation)
				if err != nil {
					return err
				}
			}
			return c.showOperation(command.Context(), controller, operation)
		},
	}
	command.Flags().BoolVar(&wait, "wait", false, "wait until the operation has ended")
	command.Flags().BoolVarP(&all, "all", "a", false, "also those that ended long ago")
	addGrouped(command, "", c.operationsCancelCommand())
	return command
}

// listOperations lists those of a job; of all jobs when job is empty.
func (c *cli) listOperations(ctx context.Context, controller *client.Client, job string, all bool) error {
	operations, err := controller.Operations(ctx)
	if err != nil {
		return err
	}
	return c.printOperations(slices.DeleteFunc(operations, func(o api.Operation) bool {
		old := o.Finished != nil && c.now().Sub(*o.Finished) > lately
		return job != "" && o.Job != job || old && !all
	}))
}

func (c *cli) showOperation(ctx context.Context, controller *client.Client, operation *api.Operation) error {
	if c.json() {
		return c.printDocument(operation)
	}
	if err := c.printOperations([]api.Operation{*operation}); err != nil {
		return err
	}
	return c.printStepsOf(ctx, controller, operation)
}

func (c *cli) operationsCancelCommand() *cobra.Command {
	detach := false
	command := &cobra.Command{
		Use:   "cancel OPERATION",
		Short: "Call an operation off, where that is safe",
		Long: `Undo what an operation has done so far, and end it. A checkpoint is thrown away
while it is not durable, and its job runs on; so it does when it was to be
suspended. A job that was to be resumed sleeps on. A job that was to be started is
cancelled, and one whose old run is gone has failed, until it is restarted. Of a
preemption or a swap, whoever has the place keeps it, and the other is queued. A
drain moves no further jobs, and its node stays cordoned (see ` + "`dormouse uncordon`" + `).

Refused once there is no way back: after a checkpoint is signed, while the tasks of
a job are being destroyed, for ` + "`dormouse kill`" + `, and to users for what takes the place
of their jobs for the sake of others. An agent that is in the middle of a
step finishes that first.`,
		Example:           `  dormouse operations cancel o-3f7k2m5q`,
		Args:              exactly("OPERATION"),
		ValidArgsFunction: firstArgument(c.operationIDs()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			operation, err := controller.CancelOperation(command.Context(), args[0])
			if err != nil {
				return err
			}
			if !detach {
				var ended *operationError
				operation, err = c.follow(command.Context(), controller, operation)
				if errors.As(err, &ended) && ended.operation.Phase == api.OpCancelled {
					operation, err = ended.operation, nil
				}
				if err != nil {
					return err
				}
			}
			return c.show(operation, "%s %s", operation.ID, operation.Phase)
		},
	}
	addDetach(command, &detach)
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
