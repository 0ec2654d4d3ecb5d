package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"dormouse/api"
	"dormouse/client"
)

func addDetach(command *cobra.Command, detach *bool) {
	command.Flags().BoolVarP(detach, "detach", "d", false, "do not wait; print the operation")
}

// finish waits for an operation on a job and shows the job, or with detach shows
// the operation at once.
func (c *cli) finish(ctx context.Context, controller *client.Client, operation *api.Operation, detach bool) error {
	if detach {
		return c.show(operation, "%s", operation.ID)
	}
	operation, err := c.follow(ctx, controller, operation)
	if err != nil {
		return err
	}
	job, err := controller.Job(ctx, operation.Job)
	if err != nil {
		return fmt.Errorf("the %s is done, but its job cannot be shown: %w", operation.Kind, err)
	}
	return c.show(job, "%s", describe(job, operation))
}

// describe says in one line what a job is after an operation.
func describe(job *api.JobDetail, operation *api.Operation) string {
	text := fmt.Sprintf("%s %s", job.ID, job.Phase)
	switch job.Phase {
	case api.PhaseSuspended:
		if operation.Checkpoint != "" {
			text += " as " + operation.Checkpoint
		}
	case api.PhaseRunning:
		if nodes := nodesOf(job); len(nodes) > 0 {
			text += " on " + strings.Join(nodes, ", ")
		}
		if job.From != "" {
			text += " from " + job.From
		}
	}
	return text
}

// nodesOf are the nodes that a job's tasks are on, in the order of the tasks.
func nodesOf(job *api.JobDetail) (nodes []string) {
	for _, task := range job.TaskStatus {
		if task.Node != "" && !slices.Contains(nodes, task.Node) {
			nodes = append(nodes, task.Node)
		}
	}
	return nodes
}
