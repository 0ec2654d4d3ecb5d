package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"dormouse/api"
)

func (c *cli) preemptCommand() *cobra.Command {
	detach, dryRun := false, false
	command := &cobra.Command{
		Use:   "preempt JOB",
		Short: "Take a job off its place until there is room for it again",
		Long: `Checkpoint a running job and take it off its nodes. Jobs that waited before it go
first; as soon as there is room, here or elsewhere, it comes back by itself from that
checkpoint. It makes no other job give way for that. If it cannot be checkpointed, it
runs on. ` + "`dormouse suspend`" + ` on a job that waits to come back lets it sleep.

With --dry-run nothing is done: the plan and its estimated cost are printed.`,
		Example: `  dormouse preempt counter --dry-run
  dormouse preempt counter`,
		Args:              exactly("JOB"),
		ValidArgsFunction: firstArgument(c.jobs()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			if dryRun {
				plan, err := controller.PlanPreempt(command.Context(), args[0])
				if err != nil {
					return err
				}
				return c.printPlan(plan)
			}
			operation, err := controller.Preempt(command.Context(), args[0])
			if err != nil {
				return err
			}
			return c.finish(command.Context(), controller, operation, detach)
		},
	}
	addDetach(command, &detach)
	addDryRun(command, &dryRun)
	return command
}

func (c *cli) swapCommand() *cobra.Command {
	detach, dryRun := false, false
	command := &cobra.Command{
		Use:   "swap OUT IN",
		Short: "Put one job where another is",
		Long: `Checkpoint the running job OUT, take it off its nodes and put IN there, which is
pending or suspended, whatever waits before it. OUT comes back by itself as soon as
there is room, here or elsewhere. If OUT cannot be checkpointed, it runs on and nothing
changes.

With --dry-run nothing is done: the plan and its estimated cost are printed.`,
		Example: `  dormouse swap simulation urgent --dry-run
  dormouse swap simulation urgent`,
		Args:              exactly("OUT", "IN"),
		ValidArgsFunction: c.jobs(),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			if dryRun {
				plan, err := controller.PlanSwap(command.Context(), args[0], args[1])
				if err != nil {
					return err
				}
				return c.printPlan(plan)
			}
			operation, err := controller.Swap(command.Context(), args[0], args[1])
			if err != nil {
				return err
			}
			return c.finish(command.Context(), controller, operation, detach)
		},
	}
	addDetach(command, &detach)
	addDryRun(command, &dryRun)
	return command
}

func addDryRun(command *cobra.Command, dryRun *bool) {
	command.Flags().BoolVarP(dryRun, "dry-run", "n", false, "only print what would be done, and its estimated cost")
}

func (c *cli) printPlan(plan *api.PreemptPlan) error {
	if c.json() {
		return c.printDocument(plan)
	}
	table, line := c.properties()
	for _, out := range plan.Out {
		line("out", fmt.Sprintf("%s, priority %d, on %s", jobTitle(out.Job, out.Name), out.Priority, strings.Join(out.Nodes, ", ")))
		line("to checkpoint", fmt.Sprintf("%s (known from %s)", humanSize(out.Bytes), out.BytesFrom))
		line("estimated time", estimateText(out))
		line("then", out.Comes)
	}
	if in := plan.In; in != nil {
		from := "started"
		if in.From != "" {
			from = "restored from " + in.From
		}
		line("in", fmt.Sprintf("%s, %s on %s", jobTitle(in.Job, in.Name), from, strings.Join(in.Nodes, ", ")))
	}
	return table.Flush()
}

func jobTitle(id, name string) string {
	if name == "" {
		return id
	}
	return fmt.Sprintf("%s (%s)", id, name)
}

func estimateText(out api.Eviction) string {
	if out.EstimatedMS == nil {
		return "not known: " + out.EstimatedFrom
	}
	return fmt.Sprintf("%s (known from %s)", humanMS(*out.EstimatedMS), out.EstimatedFrom)
}
