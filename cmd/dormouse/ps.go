package main

import (
	"context"
	"strconv"

	"github.com/spf13/cobra"

	"dormouse/api"
	"dormouse/client"
)

func (c *cli) psCommand() *cobra.Command {
	all, tasks := false, false
	command := &cobra.Command{
		Use:   "ps",
		Short: "List jobs",
		Long: `List the jobs that are not over, or with --all every job; with --tasks, a line for
each of their tasks.`,
		Example: `  dormouse ps
  dormouse ps --tasks
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
			if tasks {
				return c.showTasks(command.Context(), controller, jobs)
			}
			if c.json() {
				return c.printDocument(jobs)
			}
			return c.printJobs(jobs)
		},
	}
	command.Flags().BoolVarP(&all, "all", "a", false, "also jobs that are over")
	command.Flags().BoolVarP(&tasks, "tasks", "t", false, "list the tasks of the jobs")
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

// jobTask is a task as ps lists it.
type jobTask struct {
	Job  string `json:"job"`
	Name string `json:"name"`
	api.TaskStatus
}

func (c *cli) showTasks(ctx context.Context, controller *client.Client, jobs []api.Job) error {
	tasks, rows := []jobTask{}, [][]string{}
	for _, job := range jobs {
		detail, err := controller.Job(ctx, job.ID)
		if client.IsNotFound(err) {
			continue // removed since it was listed
		}
		if err != nil {
			return err
		}
		for _, task := range detail.TaskStatus {
			tasks = append(tasks, jobTask{job.ID, job.Name, task})
			rows = append(rows, append([]string{job.ID, job.Name}, taskRow(task)...))
		}
	}
	if c.json() {
		return c.printDocument(tasks)
	}
	return c.printTable(append([]string{"JOB", "NAME"}, taskHeader...), rows)
}

var taskHeader = []string{"TASK", "NODE", "PHASE", "PID", "ADDRESS", "EXIT", "SIGNAL", "REASON"}

func taskRow(task api.TaskStatus) []string {
	return []string{
		strconv.Itoa(task.Index), task.Node, string(task.Phase), strconv.Itoa(task.Pid), task.VirtualIP,
		exitCode(task.ExitCode), task.Signal, task.Reason,
	}
}

func exitCode(code *int) string {
	if code == nil {
		return ""
	}
	return strconv.Itoa(*code)
}
