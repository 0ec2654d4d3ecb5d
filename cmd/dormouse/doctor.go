package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

// doctorTimeout bounds all checks; the probe dumps and restores a process.
const doctorTimeout = 2 * time.Minute

// verdict is how a check came out.
type verdict string

const (
	verdictOK   verdict = "ok"
	verdictWarn verdict = "warn" // something cannot be done, or is slower
	verdictFail verdict = "fail" // Dormouse does not work here
)

// finding is what one check found, and what to do about it.
type finding struct {
	Name   string  `json:"name"`
	Status verdict `json:"status"`
	Detail string  `json:"detail"`
	Fix    string  `json:"fix,omitempty"`
}

func (c *cli) doctorCommand() *cobra.Command {
	state := ""
	command := &cobra.Command{
		Use:   "doctor",
		Short: "Tell what this machine can and cannot checkpoint",
		Long: `Check everything that checkpoints need on this machine, try CRIU on a real
process, and say what to do about what is missing. Exit status 1 when a check
failed; a warning means that something special cannot be checkpointed here, or
is slower.`,
		Example: `  sudo dormouse doctor
  sudo dormouse doctor -o json`,
		Args: exactly(),
		RunE: func(command *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(command.Context(), doctorTimeout)
			defer cancel()
			machine, err := newMachine(c.getenv, state)
			if err != nil {
				return err
			}
			return c.printFindings(machine.examine(ctx))
		},
	}
	command.Flags().StringVar(&state, "state", defaultState, "`directory` of the state of `up` or the agent, whose file system is checked")
	return command
}

func (c *cli) printFindings(findings []finding) error {
	failed := 0
	rows := [][]string{}
	for _, finding := range findings {
		if finding.Status == verdictFail {
			failed++
		}
		rows = append(rows, []string{string(finding.Status), finding.Name, finding.Detail})
		if finding.Fix != "" {
			rows = append(rows, []string{"", "", "→ " + finding.Fix})
		}
	}
	err := c.printFindingRows(findings, rows)
	if err != nil {
		return err
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d checks failed: this machine cannot run jobs until they are mended", failed, len(findings))
	}
	return nil
}

func (c *cli) printFindingRows(findings []finding, rows [][]string) error {
	if c.json() {
		return c.printDocument(findings)
	}
	for _, row := range rows {
		if _, err := fmt.Fprintf(c.out, "%-5s %-22s %s\n", row[0], row[1], oneLine(row[2])); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintln(c.out, "\nPrograms that use io_uring, userfaultfd, perf events, BPF maps, AF_VSOCK or AF_ALG sockets, devices, or\n(unless the job's --connections allows it) connections that leave the job are refused by name before\nanything is frozen.")
	return err
}
