package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"dormouse/api"
	"dormouse/e2e/cluster"
)

// What `-monitor` measures: the processor time of a node's agent while nothing
// happens but that tasks are watched, with the default period. All of the agent is
// in it, its heartbeats too.
const (
	watchSettle = 30 * time.Second
	watchTime   = 2 * time.Minute
)

// watchRow is what was measured with one number of tasks.
type watchRow struct {
	Tasks int `json:"tasks"`
	// Percent of one processor that the agent used.
	Percent float64 `json:"percent_of_a_cpu"`
}

func runWatching(ctx context.Context, file, binary string) error {
	binary, err := filepath.Abs(binary)
	if err != nil {
		return err
	}
	b := &parallelBench{binary: binary}
	if b.dir, err = os.MkdirTemp("/var/tmp", "dormouse-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	var rows []watchRow
	err = b.with(ctx, []string{"--cloud", "bench=1", "--cpus", "32", "--mem", "8G", "--on-starvation", "notify"}, func(c *cluster.Cluster) error {
		for _, more := range []int{0, 20, 20} {
			for i := range more {
				// Half of them do a little, and say how far they have come.
				work := []string{"sleep 100000", "n=0; while sleep 1; do n=$((n+1)); echo step $n; done"}[i%2]
				if _, err := submit(ctx, c, "--cpus", "0.5", "--mem", "64M", "--progress-regex", "^step ([0-9]+)", "--", "sh", "-c", work); err != nil {
					return err
				}
			}
			row := watchRow{Tasks: more}
			if len(rows) > 0 {
				row.Tasks += rows[len(rows)-1].Tasks
			}
			if row.Percent, err = agentsShare(ctx, c); err != nil {
				return err
			}
			rows = append(rows, row)
		}
		return nil
	})
	if err != nil {
		return err
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "tasks\tthe agent's share of one CPU")
	for _, r := range rows {
		fmt.Fprintf(table, "%d\t%.2f %%\n", r.Tasks, r.Percent)
	}
	table.Flush()
	text, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

// agentsShare is how many hundredths of a processor the only agent uses from soon
// on.
func agentsShare(ctx context.Context, c *cluster.Cluster) (float64, error) {
	var nodes []api.Node
	if err := c.JSON(ctx, &nodes, "nodes"); err != nil {
		return 0, err
	}
	if err := rest(ctx, watchSettle); err != nil {
		return 0, err
	}
	begin := time.Now()
	before, err := cpuOf(nodes[0].AgentPid)
	if err != nil {
		return 0, err
	}
	if err := rest(ctx, watchTime); err != nil {
		return 0, err
	}
	after, err := cpuOf(nodes[0].AgentPid)
	return 100 * (after - before).Seconds() / time.Since(begin).Seconds(), err
}

// rest waits: that the time passes is what is measured.
func rest(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
