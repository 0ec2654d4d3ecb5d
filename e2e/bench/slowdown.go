package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"dormouse/e2e/cluster"
)

// stencilArguments make a run of some seconds on two cores.
var stencilArguments = []string{"1024", "1200", "100", "0"}

// slowdown measures the steps of an MPI program with two processes on one node:
// in a job of one task, and under plain mpirun.
func (b *parallelBench) slowdown(ctx context.Context) ([]parallelRow, error) {
	row := parallelRow{Name: "MPI stencil, two processes on one node", Unit: "s"}
	err := b.with(ctx, []string{"--cloud", "bench=1", "--cpus", "2", "--mem", "2G"}, func(c *cluster.Cluster) error {
		for round := range b.rounds {
			fmt.Fprintf(os.Stderr, "%s: round %d of %d\n", row.Name, round+1, b.rounds)
			plain, err := b.plainStencil(ctx)
			if err != nil {
				return err
			}
			ours, err := b.jobStencil(ctx, c)
			if err != nil {
				return err
			}
			row.Plain = append(row.Plain, plain)
			row.Dormouse = append(row.Dormouse, ours)
		}
		return nil
	})
	return []parallelRow{row}, err
}

func (b *parallelBench) plainStencil(ctx context.Context) (float64, error) {
	cmd := exec.CommandContext(ctx, "mpirun.openmpi", append([]string{"--allow-run-as-root", "-n", "2", b.program("stencil")}, stencilArguments...)...)
	var seconds strings.Builder
	cmd.Stderr = &seconds
	cmd.Env = append(os.Environ(), "STENCIL_TIME=1")
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("plain mpirun: %w: %s", err, seconds.String())
	}
	return strconv.ParseFloat(strings.TrimSpace(seconds.String()), 64)
}

func (b *parallelBench) jobStencil(ctx context.Context, c *cluster.Cluster) (float64, error) {
	args := []string{"--cpus", "2", "--mem", "512M", "--env", "STENCIL_TIME=1", "--volume", b.program("") + ":/subject:ro", "--", "mpirun.openmpi", "--allow-run-as-root", "-n", "2", "/subject/stencil"}
	job, err := submit(ctx, c, append(args, stencilArguments...)...)
	if err != nil {
		return 0, err
	}
	d := dormouse{c: c}
	defer d.remove(job)
	if _, err := c.Run(ctx, "wait", job); err != nil {
		return 0, err
	}
	// What a job writes to standard error, `logs` does, too.
	var seconds strings.Builder
	logs := c.Command(ctx, "logs", job, "--task", "0")
	logs.Stderr = &seconds
	if err := logs.Run(); err != nil {
		return 0, fmt.Errorf("logs %s: %w: %s", job, err, seconds.String())
	}
	return strconv.ParseFloat(strings.TrimSpace(seconds.String()), 64)
}
