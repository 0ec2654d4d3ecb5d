package main

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"dormouse/api"
	"dormouse/client"
)

// inspected is what inspect shows of a job: with what is known of its newest
// checkpoint, task by task.
type inspected struct {
	*api.JobDetail
	Newest *api.Checkpoint `json:"newest_checkpoint,omitempty"`
}

func (c *cli) inspectCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "inspect JOB|CHECKPOINT",
		Short: "Show everything about one job or checkpoint",
		Long: `Show everything about a job: what was submitted, where each task is, and what each
task's part of the newest checkpoint took; or the same of one checkpoint.

The steps of a checkpoint: FREEZE stops the task, DUMP captures its memory, FILES
its changed files; PAUSE is how long it stood still, all tasks together; UPLOAD
stores the capture, while the job runs on. NEW is what was not stored before.`,
		Example: `  dormouse inspect counter
  dormouse inspect j-3f7k2m5q -o json
  dormouse inspect c-3f7k2m5q`,
		Args:              exactly("JOB"),
		ValidArgsFunction: firstArgument(either(c.jobs(), c.checkpoints())),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			job, err := controller.Job(command.Context(), args[0])
			if client.IsNotFound(err) && strings.HasPrefix(args[0], "c-") {
				checkpoint, err := controller.GetCheckpoint(command.Context(), args[0])
				if err != nil {
					return err
				}
				return c.showCheckpoint(checkpoint)
			}
			if err != nil {
				return err
			}
			checkpoints, err := controller.Checkpoints(command.Context(), job.ID)
			if err != nil {
				return err
			}
			newest := newestMeasured(checkpoints)
			if c.json() {
				return c.printDocument(inspected{job, newest})
			}
			addresses, err := addressesOf(command.Context(), controller, job)
			if err != nil {
				return err
			}
			if err := c.printJob(job, addresses); err != nil || newest == nil {
				return err
			}
			fmt.Fprintf(c.out, "\ncheckpoint %s, %s, %s ago\n", newest.ID, newest.State, c.age(newest.Created))
			return c.printSteps(newest)
		},
	}
}

func (c *cli) showCheckpoint(checkpoint *api.Checkpoint) error {
	if c.json() {
		return c.printDocument(checkpoint)
	}
	table, line := c.properties()
	line("id", checkpoint.ID)
	line("job", checkpoint.Job)
	line("state", string(checkpoint.State))
	line("error", checkpoint.Error)
	line("trigger", string(checkpoint.Trigger))
	line("label", checkpoint.Label)
	line("created", c.age(checkpoint.Created)+" ago")
	line("parent", checkpoint.Parent)
	line("tasks", strconv.Itoa(checkpoint.Tasks))
	line("pause", humanMS(checkpoint.PauseMS))
	line("captured", humanSize(checkpoint.SizeBytes))
	line("stored", fmt.Sprintf("%s, of which %s new", humanSize(checkpoint.StoredBytes), humanSize(checkpoint.NewBytes)))
	if checkpoint.DurableMS > 0 {
		line("durable after", humanMS(checkpoint.DurableMS))
	}
	line("CRIU", checkpoint.CRIUVersion)
	line("restored on trial", c.drillText(checkpoint.Drill))
	if drill := checkpoint.Drill; drill != nil {
		line("trial's error", drill.Error)
	}
	if err := table.Flush(); err != nil || len(checkpoint.Steps) == 0 {
		return err
	}
	fmt.Fprintln(c.out)
	return c.printSteps(checkpoint)
}

// properties is a table of names and values; a line without a value is left out.
func (c *cli) properties() (table *tabwriter.Writer, line func(name, value string)) {
	table = tabwriter.NewWriter(c.out, 0, 8, 2, ' ', 0)
	return table, func(name, value string) {
		if value != "" {
			fmt.Fprintf(table, "%s\t%s\n", name, value)
		}
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

// addressesOf are the addresses of the nodes that a job's published ports are on,
// by task. What is nowhere now, or on a node without an address, has none.
func addressesOf(ctx context.Context, controller *client.Client, job *api.JobDetail) (map[int]string, error) {
	if len(job.Spec.Publish) == 0 || !job.Phase.Placed() {
		return nil, nil
	}
	nodes, err := controller.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	addresses := map[int]string{}
	for _, task := range job.TaskStatus {
		for _, node := range nodes {
			if node.Name == task.Node {
				addresses[task.Index] = node.Underlay
			}
		}
	}
	return addresses, nil
}

// describeAutomatic tells when the job is checkpointed by itself, and why then.
func (c *cli) describeAutomatic(job *api.JobDetail, line func(name, value string)) {
	if a := job.Automatic; a != nil {
		text := a.Why
		if a.Next != nil {
			text += ", next at " + a.Next.UTC().Format(time.RFC3339)
		}
		line("automatic", text)
		line("waits", a.Waits)
		if a.Failures > 0 {
			line("failed", fmt.Sprintf("%d automatic checkpoints in a row: `dormouse events %s` says why", a.Failures, job.ID))
		}
		if a.Inputs != nil {
			line("expected loss", fmt.Sprintf("%.2g %% of the time", 100*a.Inputs.Loss))
		}
	}
	line("keeps", kept(job.Spec))
	if job.Spec.DrillEvery > 0 {
		line("drills", fmt.Sprintf("one in %d checkpoints is restored on trial", job.Spec.DrillEvery))
	}
	if end := job.WalltimeEnds; end != nil {
		line("walltime", fmt.Sprintf("%s: suspended at %s", time.Duration(job.Spec.WalltimeMS)*time.Millisecond, end.UTC().Format(time.RFC3339)))
	}
}

// mostIncidents are shown; all of them are in -o json.
const mostIncidents = 3

// describeIncidents tells of a job's newest failures, newest first.
func (c *cli) describeIncidents(incidents []api.Incident, line func(name, value string)) {
	for i := len(incidents) - 1; i >= max(0, len(incidents)-mostIncidents); i-- {
		incident := incidents[i]
		text := "does not run again yet"
		if incident.DownMS != nil {
			text = "ran again after " + humanMS(*incident.DownMS)
		}
		line("incident", fmt.Sprintf("%s ago: %s; %s", c.age(incident.Lost), incident.Reason, text))
	}
}

// describeFindings tells what the monitor has found, with its figures.
func (c *cli) describeFindings(job *api.JobDetail, line func(name, value string)) {
	if s := job.Starvation; s != nil {
		line("starving", fmt.Sprintf("%s for %s: %s", s.Condition, c.age(s.Since), s.Explanation))
		line("action", s.Action)
	}
	for _, task := range job.TaskStatus {
		for _, f := range []*api.Finding{task.Health, task.Starvation} {
			if f != nil && (job.Starvation == nil || f.Explanation != job.Starvation.Explanation) {
				line(fmt.Sprintf("task %d", task.Index), fmt.Sprintf("%s ago %s: %s", c.age(f.Time), f.Condition, f.Explanation))
			}
		}
	}
	if h := job.Spec.Health; h != nil {
		asked := commandLine(h.Command)
		if h.HTTP != "" {
			asked = "GET " + h.HTTP
		}
		line("health check", fmt.Sprintf("%s, every %s, unhealthy after %d failures", asked, time.Duration(h.PeriodMS)*time.Millisecond, h.Retries))
	}
	if job.Spec.OnStarvation != "" {
		line("on starvation", job.Spec.OnStarvation)
	}
}

// kept says which checkpoints are kept; nothing when all are.
func kept(spec api.JobSpec) string {
	rules := []string{}
	for _, rule := range []struct {
		n    int
		what string
	}{{spec.Keep, "the newest %d"}, {spec.KeepHourly, "%d hourly"}, {spec.KeepDaily, "%d daily"}} {
		if rule.n > 0 {
			rules = append(rules, fmt.Sprintf(rule.what, rule.n))
		}
	}
	return strings.Join(rules, ", ")
}

func (c *cli) printJob(job *api.JobDetail, addresses map[int]string) error {
	table, line := c.properties()
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
	c.describeIncidents(job.Incidents, line)
	c.describeFindings(job, line)
	line("operation", job.Operation)
	c.describeAutomatic(job, line)
	line("command", commandLine(job.Spec.Command))
	line("user", job.Spec.User)
	line("root", firstOf(job.Spec.Root, string(api.RootHost)))
	line("directory", job.Spec.Dir)
	line("per task", fmt.Sprintf("%v cpus, %s", job.Spec.CPUs, humanSize(job.Spec.MemBytes)))
	for _, volume := range job.Spec.Volumes {
		line("volume", volume.Source+" on "+volume.Destination)
	}
	if job.Tasks > 1 {
		line("launch", firstOf(job.Spec.Launch, api.LaunchAuto))
	}
	for _, publish := range job.Spec.Publish {
		line("published", fmt.Sprintf("%s/%s leads to port %d of task %d", net.JoinHostPort(addresses[publish.Task], strconv.Itoa(publish.Port)),
			firstOf(publish.Protocol, protocolTCP), target(publish), publish.Task))
	}
	line("connections", job.Spec.Connections)
	if err := table.Flush(); err != nil {
		return err
	}
	if len(job.TaskStatus) == 0 {
		return nil
	}
	fmt.Fprintln(c.out)
	rows := [][]string{}
	for _, task := range job.TaskStatus {
		rows = append(rows, taskRow(task))
	}
	return c.printTable(taskHeader, rows)
}
