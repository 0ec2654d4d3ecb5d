package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"dormouse/api"
	"dormouse/client"
)

// waitPoll is how long one question for a job's phase may stay open.
const waitPoll = 30 * time.Second

var phases = []api.Phase{
	api.PhasePending, api.PhaseProvisioning, api.PhaseStarting, api.PhaseRunning, api.PhaseCompleted, api.PhaseFailed, api.PhaseCancelled,
	api.PhaseSuspending, api.PhaseSuspended, api.PhaseRestoring, api.PhaseMigrating, api.PhaseRecovering,
}

func (c *cli) waitCommand() *cobra.Command {
	phase, timeout := "", time.Duration(0)
	command := &cobra.Command{
		Use:   "wait JOB",
		Short: "Wait until a job is over or in a phase",
		Long: `Wait until a job is over, or with --for until it is in a phase.

Exit status: 0 when the phase was reached; 1 when the job failed or was cancelled
instead, or can no longer reach the phase; 5 when the time-out ran out first.`,
		Example: `  dormouse wait counter
  dormouse wait counter --for running --timeout 30s`,
		Args:              exactly("JOB"),
		ValidArgsFunction: firstArgument(c.jobs()),
		RunE: func(command *cobra.Command, args []string) error {
			if phase != "" && !slices.Contains(phases, api.Phase(phase)) {
				return usagef("%q is not a phase of a job; the phases are %s", phase, joinPhases())
			}
			if timeout < 0 {
				return usagef("the time-out %s is negative", timeout)
			}
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			job, err := c.waitFor(command.Context(), controller, args[0], api.Phase(phase), timeout)
			if err != nil {
				return err
			}
			return c.show(job, "%s %s", job.ID, job.Phase)
		},
	}
	command.Flags().StringVar(&phase, "for", "", "wait for this `phase` (default: until the job is over)")
	command.Flags().DurationVar(&timeout, "timeout", 0, "give up after this `duration` with exit status 5 (0: never)")
	mustComplete(command, "for", fixed(strings.Split(joinPhases(), ", ")...))
	return command
}

func joinPhases() string {
	words := []string{}
	for _, phase := range phases {
		words = append(words, string(phase))
	}
	return strings.Join(words, ", ")
}

// waitFor waits until a job is in the phase (empty: over), for at most timeout
// (0: for ever).
func (c *cli) waitFor(ctx context.Context, controller *client.Client, name string, phase api.Phase, timeout time.Duration) (*api.JobDetail, error) {
	bounded := ctx
	if timeout > 0 {
		var cancel context.CancelFunc
		bounded, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	// The first answer must not wait: it tells an unknown job, and says in which
	// phase the job was when the time ran out.
	poll := time.Duration(0)
	var job *api.JobDetail
	for {
		err := c.patiently(bounded, func() error {
			answer, err := controller.WaitJob(bounded, name, phase, poll)
			if err == nil {
				job = answer
			}
			return err
		})
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			return nil, timedOut(job, name, timeout)
		}
		if err != nil {
			return nil, err
		}
		if ended, err := judge(job, phase); ended {
			return job, err
		}
		poll = waitPoll
	}
}

func timedOut(job *api.JobDetail, name string, timeout time.Duration) error {
	if job == nil {
		return &timeoutError{fmt.Sprintf("the controller said nothing about %s within %s", name, timeout)}
	}
	return &timeoutError{fmt.Sprintf("%s is still %s after %s", job.ID, job.Phase, timeout)}
}

// judge tells whether there is nothing more to wait for, and why it is no
// success.
func judge(job *api.JobDetail, phase api.Phase) (ended bool, err error) {
	switch {
	case phase == "" && job.Phase == api.PhaseCompleted, phase != "" && job.Phase == phase:
		return true, nil
	case phase == "" && job.Phase.Final():
		return true, fmt.Errorf("%s %s%s", job.ID, job.Phase, because(job))
	case job.Phase.Final():
		return true, fmt.Errorf("%s %s%s, so it can no longer be %s", job.ID, job.Phase, because(job), phase)
	case before(phase) && !before(job.Phase):
		return true, fmt.Errorf("%s is already %s, so it can no longer be %s", job.ID, job.Phase, phase)
	}
	return false, nil
}

// before tells the phases that a job has only once, before it runs.
func before(phase api.Phase) bool {
	return phase == api.PhasePending || phase == api.PhaseProvisioning || phase == api.PhaseStarting
}

func because(job *api.JobDetail) string {
	switch {
	case job.Reason != "":
		return " (" + job.Reason + ")"
	case job.ExitCode != nil && job.Tasks > 1:
		return fmt.Sprintf(" (%sexit code %d)", failingTask(job), *job.ExitCode)
	case job.ExitCode != nil:
		return fmt.Sprintf(" (exit code %d)", *job.ExitCode)
	}
	return ""
}

// failingTask names the task whose exit code is the job's.
func failingTask(job *api.JobDetail) string {
	for _, task := range job.TaskStatus {
		if task.ExitCode != nil && *task.ExitCode == *job.ExitCode {
			return fmt.Sprintf("task %d on %s: ", task.Index, task.Node)
		}
	}
	return ""
}
