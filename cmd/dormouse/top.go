package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"dormouse/api"
)

func (c *cli) topCommand() *cobra.Command {
	once := false
	interval := 2 * time.Second
	command := &cobra.Command{
		Use:   "top",
		Short: "Watch what nodes and jobs use, wait for and achieve",
		Long: `Watch what nodes and jobs use, wait for and achieve, as the monitor has measured it in
its newest round (every 5 s).

Of a node: CPUs that are busy, memory in use, what the disk of the agent's state has
left, and the shares of the time in which something waited for a CPU, or everything
stood still for memory or I/O. Of a job: the CPUs and memory of all its tasks, WAITED,
the share of the time ready in which its threads did not run, STALLED, the one in which
its tasks stood still for memory or I/O, and PROGRESS a minute where they report any,
with what is normal for it.

On a terminal the picture is redrawn until Ctrl-C; elsewhere it is printed once. With
-o json there is one document for each refresh, on one line.`,
		Example: `  dormouse top
  dormouse top --once
  dormouse top --interval 10s -o json`,
		Args: exactly(),
		RunE: func(command *cobra.Command, _ []string) error {
			if interval < 100*time.Millisecond {
				return usagef("the interval %s is too short: at least 100ms", interval)
			}
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			live := c.liveOutput()
			for {
				top, err := controller.Top(command.Context())
				if err == nil {
					err = c.showTop(top, live && !once)
				}
				if errors.Is(err, context.Canceled) {
					return nil // Ctrl-C is how one stops watching
				}
				if err != nil || once || !live && !c.json() {
					return err
				}
				select {
				case <-time.After(interval):
				case <-command.Context().Done():
					return nil
				}
			}
		},
	}
	command.Flags().BoolVar(&once, "once", false, "print one picture and end")
	command.Flags().DurationVar(&interval, "interval", interval, "`time` between two pictures")
	return command
}

// liveOutput reports whether what is written is seen on a terminal.
func (c *cli) liveOutput() bool {
	file, ok := c.out.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}

// The escape sequences that redraw: cursor to the top left, erase to the end of
// the line, erase all below; ECMA-48, CUP, EL and ED.
const (
	cursorHome = "\x1b[H"
	eraseLine  = "\x1b[K"
	eraseBelow = "\x1b[J"
)

func (c *cli) showTop(top *api.Top, redraw bool) error {
	if c.json() {
		return c.printLine(top)
	}
	if !redraw {
		return c.printTop(top)
	}
	var picture bytes.Buffer
	drawn := *c
	drawn.out = &picture
	if err := drawn.printTop(top); err != nil {
		return err
	}
	width, height, err := term.GetSize(int(c.out.(*os.File).Fd()))
	if err != nil {
		return fmt.Errorf("find the size of the terminal: %w", err)
	}
	_, err = fmt.Fprint(c.out, fitted(picture.String(), width, height))
	return err
}

// fitted is a picture that fills the terminal and leaves nothing of the last one.
func fitted(picture string, width, height int) string {
	lines := strings.Split(strings.TrimRight(picture, "\n"), "\n")
	lines = lines[:min(len(lines), max(height-1, 1))]
	var text strings.Builder
	text.WriteString(cursorHome)
	for _, line := range lines {
		if runes := []rune(line); len(runes) > width {
			line = string(runes[:max(width, 0)])
		}
		text.WriteString(line + eraseLine + "\r\n")
	}
	text.WriteString(eraseBelow)
	return text.String()
}

func (c *cli) printTop(top *api.Top) error {
	when := "nothing was measured yet"
	if top.Time != nil {
		when = "measured " + c.age(*top.Time) + " ago"
	}
	starving := 0
	for _, job := range top.Jobs {
		if job.Health != "" && job.Health != api.ConditionHealthy {
			starving++
		}
	}
	fmt.Fprintf(c.out, "%s, %s, %d not healthy; %s", numbered(len(top.Nodes), "node"), numbered(len(top.Jobs), "job"), starving, when)
	if top.Missing > 0 {
		fmt.Fprintf(c.out, ", nothing heard of %s", numbered(top.Missing, "node"))
	}
	fmt.Fprint(c.out, "\n\n")
	if err := c.printTopNodes(top); err != nil {
		return err
	}
	fmt.Fprintln(c.out)
	return c.printTopJobs(top)
}

// numbered is a number of things, whose plural is regular.
func numbered(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

func (c *cli) printTopNodes(top *api.Top) error {
	rows := [][]string{}
	for _, node := range top.Nodes {
		rows = append(rows, nodeFigures([]string{node.ID, node.Cloud, string(node.State)}, node.Figures, node.Health))
	}
	if top.OtherNodes != nil {
		rows = append(rows, nodeFigures([]string{"(others)", "", ""}, top.OtherNodes, ""))
	}
	return c.printTable([]string{"NODE", "CLOUD", "STATE", "CPUS BUSY", "MEMORY", "DISK FREE", "TASKS", "CPU WAIT", "MEM STALL", "IO STALL", "HEALTH"}, rows)
}

func nodeFigures(row []string, f *api.NodeFigures, health string) []string {
	if f == nil || f.CPUs == 0 { // not measured, or not yet
		return append(row, "", "", "", "", "", "", "", health)
	}
	tasks := strconv.FormatUint(f.Tasks, 10)
	if f.Troubled > 0 {
		tasks += fmt.Sprintf(" (%d ill)", f.Troubled)
	}
	return append(row,
		fmt.Sprintf("%.1f of %.4g", f.CPUsBusy, f.CPUs), fmt.Sprintf("%s of %s", humanSize(int64(f.MemBusy)), humanSize(int64(f.MemBytes))),
		humanSize(int64(f.DiskFree)), tasks, percent(f.CPUStall), percent(f.MemoryStall), percent(f.IOStall), health)
}

// printTopJobs lists those that are in trouble first, then those that use most.
func (c *cli) printTopJobs(top *api.Top) error {
	jobs := slices.Clone(top.Jobs)
	rank := func(j api.TopJob) (ill int, cpus float64) {
		if j.Health == "" || j.Health == api.ConditionHealthy {
			ill = 1
		}
		if j.Figures != nil {
			cpus = j.Figures.CPUs
		}
		return ill, cpus
	}
	slices.SortStableFunc(jobs, func(a, b api.TopJob) int {
		illA, cpusA := rank(a)
		illB, cpusB := rank(b)
		return cmp.Or(cmp.Compare(illA, illB), cmp.Compare(cpusB, cpusA), cmp.Compare(a.ID, b.ID))
	})
	rows := [][]string{}
	for _, job := range jobs {
		rows = append(rows, jobFigures([]string{job.ID, job.Name, string(job.Phase), strconv.Itoa(job.Tasks)}, job.Figures, job.Health, job.Reason))
	}
	if top.OtherJobs != nil {
		rows = append(rows, jobFigures([]string{"(others)", "", "", strconv.FormatUint(top.OtherJobs.Tasks, 10)}, top.OtherJobs, "", ""))
	}
	return c.printTable([]string{"JOB", "NAME", "PHASE", "TASKS", "CPUS", "MEMORY", "WAITED", "STALLED", "PROGRESS", "HEALTH", "WHY"}, rows)
}

func jobFigures(row []string, f *api.JobFigures, health, why string) []string {
	if f == nil {
		return append(row, "", "", "", "", "", health, why)
	}
	progress := ""
	if f.Progress != nil {
		progress = fmt.Sprintf("%.4g/min", *f.Progress)
		if f.NormalProgress > 0 {
			progress += fmt.Sprintf(" (normal %.4g)", f.NormalProgress)
		}
	}
	return append(row,
		fmt.Sprintf("%.2f of %.4g", f.CPUs, f.CPUsDue), fmt.Sprintf("%s of %s", humanSize(int64(f.MemUsed)), humanSize(int64(f.MemBytes))),
		percent(f.Waited), percent(f.Stalled), progress, health, why)
}

func percent(share float64) string { return fmt.Sprintf("%.0f%%", 100*share) }
