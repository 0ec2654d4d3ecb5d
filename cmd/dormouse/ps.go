package main

import (
	"strconv"

	"github.com/spf13/cobra"

	"dormouse/api"
)

func (c *cli) psCommand() *cobra.Command {
	all := false
	command := &cobra.Command{
		Use:   "ps",
		Short: "List jobs",
		Long:  "List the jobs that are not over, or with --all every job.",
		Example: `  dormouse ps
  dormouse ps --all -o json`,
		Args: exactly(),
		RunE: func(command *cobra.Command, _ []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			jobs, err := controller.Jobs(command.Context(), all)
			if err != nil {
				return err
			}
			if c.json() {
				return c.printDocument(jobs)
			}
			return c.printJobs(jobs)
		},
	}
	command.Flags().BoolVarP(&all, "all", "a", false, "also jobs that are over")
	return command
}

func (c *cli) printJobs(jobs []api.Job) error {
	rows := [][]string{}
	for _, job := range jobs {
		rows = append(rows, []string{
			job.ID, job.Name, string(job.Phase), job.Cloud, strconv.Itoa(job.Tasks), strconv.Itoa(job.Checkpoints),
			strconv.Itoa(job.Restarts), c.age(job.Created), exitCode(job.ExitCode), job.Reason,
		})
	}
	return c.printTable([]string{"ID", "NAME", "PHASE", "CLOUD", "TASKS", "CHECKPOINTS", "RESTARTS", "AGE", "EXIT", "REASON"}, rows)
}

func exitCode(code *int) string {
	if code == nil {
		return ""
	}
	return strconv.Itoa(*code)
}
