package main

import (
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"dormouse/api"
)

func (c *cli) inspectCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "inspect JOB",
		Short: "Show everything about one job",
		Example: `  dormouse inspect counter
  dormouse inspect j-3f7k2m5q -o json`,
		Args:              exactly("JOB"),
		ValidArgsFunction: firstArgument(c.jobs()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			job, err := controller.Job(command.Context(), args[0])
			if err != nil {
				return err
			}
			if c.json() {
				return c.printDocument(job)
			}
			return c.printJob(job)
		},
	}
}

// commandLine words a command so that a shell would run the same.
func commandLine(words []string) string {
	quoted := []string{}
	for _, word := range words {
		if word == "" || strings.ContainsAny(word, " \t\n'\"\\$`*?[](){}<>|&;#~!") {
			word = shellQuote(word)
		}
		quoted = append(quoted, word)
	}
	return oneLine(strings.Join(quoted, " "))
}

func (c *cli) printJob(job *api.JobDetail) error {
	table := tabwriter.NewWriter(c.out, 0, 8, 2, ' ', 0)
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(table, "%s\t%s\n", name, value)
		}
	}
	line("id", job.ID)
	line("name", job.Name)
	line("phase", string(job.Phase))
	line("reason", job.Reason)
	line("exit code", exitCode(job.ExitCode))
	line("cloud", job.Cloud)
	line("created", c.age(job.Created)+" ago")
	line("checkpoints", strconv.Itoa(job.Checkpoints))
	line("restarts", strconv.Itoa(job.Restarts))
	line("restored from", job.From)
	line("operation", job.Operation)
	line("command", commandLine(job.Spec.Command))
	line("user", job.Spec.User)
	line("root", firstOf(job.Spec.Root, string(api.RootHost)))
	line("directory", job.Spec.Dir)
	line("per task", fmt.Sprintf("%v cpus, %s", job.Spec.CPUs, humanSize(job.Spec.MemBytes)))
	for _, volume := range job.Spec.Volumes {
		line("volume", volume.Source+" on "+volume.Destination)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	if len(job.TaskStatus) == 0 {
		return nil
	}
	fmt.Fprintln(c.out)
	rows := [][]string{}
	for _, task := range job.TaskStatus {
		rows = append(rows, []string{
			strconv.Itoa(task.Index), task.Node, string(task.Phase), strconv.Itoa(task.Pid), task.VirtualIP,
			exitCode(task.ExitCode), task.Signal, task.Reason,
		})
	}
	return c.printTable([]string{"TASK", "NODE", "PHASE", "PID", "ADDRESS", "EXIT", "SIGNAL", "REASON"}, rows)
}
