package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"dormouse/api"
	"dormouse/e2e/cluster"
)

const (
	taskMiB = 128 // memory of each task, half of it random
	nodes   = 4   // that the tasks of a job are spread over
)

// parallelRow is what was measured of one kind of job, a slice element per
// round: ours beside the same without Dormouse.
type parallelRow struct {
	Name     string    `json:"name"`
	Unit     string    `json:"unit"`
	Dormouse []float64 `json:"dormouse"`
	Plain    []float64 `json:"plain"`
}

// parallelBench measures jobs of several tasks.
type parallelBench struct {
	binary, criu string
	dir          string // scratch, on disk
	images       string // scratch, on a tmpfs
	rounds       int
}

func runParallel(ctx context.Context, rounds int, file, binary, criu string) error {
	binary, err := filepath.Abs(binary)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("/var/tmp", "dormouse-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	images, err := os.MkdirTemp("/dev/shm", "dormouse-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(images)
	b := &parallelBench{binary: binary, criu: criu, dir: dir, images: images, rounds: rounds}
	if err := b.compile(ctx); err != nil {
		return err
	}
	var rows []parallelRow
	for _, measure := range []func(context.Context) ([]parallelRow, error){b.pauses, b.throughput, b.slowdown} {
		more, err := measure(ctx)
		if err != nil {
			return err
		}
		rows = append(rows, more...)
	}
	printParallel(rows)
	text, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

func printParallel(rows []parallelRow) {
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "medians\tdormouse\tplain\tratio")
	for _, r := range rows {
		ours, plain := median(r.Dormouse), median(r.Plain)
		fmt.Fprintf(table, "%s, %s\t%.4g\t%.4g\t%.3f\n", r.Name, r.Unit, ours, plain, ours/plain)
	}
	table.Flush()
}

func (b *parallelBench) compile(ctx context.Context) error {
	if err := os.Mkdir(b.program(""), 0o755); err != nil {
		return err
	}
	for _, command := range [][]string{
		{"gcc", "-O2", "-o", b.program("subject"), "e2e/bench/subject/subject.c"},
		{"gcc", "-O2", "-o", b.program("stream"), "e2e/bench/subject/stream.c"},
		{"mpicc.openmpi", "-O2", "-o", b.program("stencil"), "e2e/programs/mpi/stencil.c"},
	} {
		if out, err := exec.CommandContext(ctx, command[0], command[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(command, " "), err, out)
		}
	}
	return nil
}

func (b *parallelBench) program(name string) string { return filepath.Join(b.dir, "bin", name) }

// with runs a cluster for as long as do takes.
func (b *parallelBench) with(ctx context.Context, args []string, do func(*cluster.Cluster) error) error {
	state, err := os.MkdirTemp(b.dir, "state-")
	if err != nil {
		return err
	}
	c, err := cluster.Start(ctx, cluster.Options{Binary: b.binary, State: state, Args: args})
	if err != nil {
		return err
	}
	defer func() {
		end, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := c.Stop(end); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
		}
	}()
	return do(c)
}

// pauses measures for how long the slowest of n tasks stands still: in one
// coordinated checkpoint, and when n plain `criu dump` start at the same time.
func (b *parallelBench) pauses(ctx context.Context) (rows []parallelRow, err error) {
	args := []string{"--cloud", fmt.Sprintf("bench=%d", nodes), "--cpus", "8", "--mem", "8G", "--on-starvation", "ignore"}
	err = b.with(ctx, args, func(c *cluster.Cluster) error {
		for _, tasks := range []int{1, 2, 4, 8} {
			row := parallelRow{Name: fmt.Sprintf("pause of %d tasks of %d MiB", tasks, taskMiB), Unit: "ms"}
			for round := range b.rounds {
				fmt.Fprintf(os.Stderr, "%s: round %d of %d\n", row.Name, round+1, b.rounds)
				plain, err := b.plainPause(ctx, tasks)
				if err != nil {
					return fmt.Errorf("plain criu: %w", err)
				}
				ours, err := b.coordinatedPause(ctx, c, tasks)
				if err != nil {
					return err
				}
				row.Plain = append(row.Plain, inMS(plain))
				row.Dormouse = append(row.Dormouse, inMS(ours))
			}
			rows = append(rows, row)
		}
		return nil
	})
	return rows, err
}

func inMS(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// plainPause dumps n subjects at once with plain CRIU.
func (b *parallelBench) plainPause(ctx context.Context, n int) (time.Duration, error) {
	dir, err := os.MkdirTemp(b.images, "plain-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	plain := raw{criu: b.criu}
	pids := make([]int, n)
	for i := range n {
		subject := exec.Command(b.program("subject"), strconv.Itoa(taskMiB), "50", tickFile(dir, i), filepath.Join(dir, "dirty"))
		subject.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		subject.Dir = "/"
		if err := subject.Start(); err != nil {
			return 0, err
		}
		defer subject.Wait()
		defer subject.Process.Kill()
		pids[i] = subject.Process.Pid
		if err := os.Mkdir(filepath.Join(dir, strconv.Itoa(i)), 0o700); err != nil {
			return 0, err
		}
	}
	if err := allTicking(ctx, dir, n); err != nil {
		return 0, err
	}
	var all sync.WaitGroup
	failures := make([]error, n)
	begin := time.Now()
	for i, pid := range pids {
		all.Go(func() {
			failures[i] = plain.run(ctx, filepath.Join(dir, strconv.Itoa(i)), "dump", "-t", strconv.Itoa(pid), "--leave-running")
		})
	}
	all.Wait()
	for _, err := range failures {
		if err != nil {
			return 0, err
		}
	}
	return slowest(ctx, dir, n, begin)
}

// coordinatedPause takes a checkpoint of one job of n tasks.
func (b *parallelBench) coordinatedPause(ctx context.Context, c *cluster.Cluster, n int) (time.Duration, error) {
	dir, err := os.MkdirTemp(b.images, "ticks-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	command := fmt.Sprintf("exec /subject/subject %d 50 /bench/ticks-$DORMOUSE_TASK /bench/dirty", taskMiB)
	job, err := submit(ctx, c, "--tasks", strconv.Itoa(n), "--mem", strconv.Itoa(taskMiB+128)+"M", "--volume", dir+":/bench",
		"--volume", b.program("")+":/subject:ro", "--", "sh", "-c", command)
	if err != nil {
		return 0, err
	}
	d := dormouse{c: c}
	defer d.remove(job)
	if err := allTicking(ctx, dir, n); err != nil {
		return 0, err
	}
	begin := time.Now()
	var cp api.Checkpoint
	if err := c.JSON(ctx, &cp, "checkpoint", job); err != nil {
		return 0, err
	}
	if cp.State != api.CheckpointDurable || cp.Tasks != n {
		return 0, fmt.Errorf("checkpoint %s is %s and has %d tasks, expected durable and %d", cp.ID, cp.State, cp.Tasks, n)
	}
	return slowest(ctx, dir, n, begin)
}

func submit(ctx context.Context, c *cluster.Cluster, args ...string) (job string, err error) {
	out, err := c.Run(ctx, append([]string{"submit"}, args...)...)
	return strings.TrimSpace(out), err
}

func tickFile(dir string, i int) string { return filepath.Join(dir, "ticks-"+strconv.Itoa(i)) }

func allTicking(ctx context.Context, dir string, n int) error {
	for i := range n {
		if err := waitTicking(ctx, tickFile(dir, i)); err != nil {
			return err
		}
	}
	return nil
}

// slowest returns the longest pause that any of n subjects has felt since begin.
func slowest(ctx context.Context, dir string, n int, begin time.Time) (time.Duration, error) {
	var longest time.Duration
	end := time.Now()
	for i := range n {
		if _, err := firstTick(ctx, tickFile(dir, i), end); err != nil {
			return 0, err
		}
		gap, err := longestGap(tickFile(dir, i), begin)
		if err != nil {
			return 0, err
		}
		longest = max(longest, gap)
	}
	return longest, nil
}
