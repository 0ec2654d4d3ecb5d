// Command bench measures Dormouse beside plain CRIU, in one run, alternating,
// on the same machine and with the same program.
//
//	go run ./e2e/bench [-sizes 64,1024,4096] [-rounds 5] [-json bench.json] [-binary bin/dormouse]
//	go run ./e2e/bench -parallel [-rounds 5] [-json bench-parallel.json] [-binary bin/dormouse]
//	go run ./e2e/bench -fleet [-agents 10,100,1000] [-json bench-fleet.json] [-binary bin/dormouse]
//
// The second form measures jobs of several tasks: what is in parallel.go,
// throughput.go and slowdown.go. The third measures one controller with many
// agents, which are simulated: fleet.go. It needs neither root nor CRIU.
//
// It prints a table of medians and ratios and writes every single figure to the
// JSON file. It asserts nothing: these are measurements, not tests.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"dormouse/e2e/cluster"
	"dormouse/internal/ownnet"
)

const (
	pageSize = 4096
	perMille = 10 // of the pages rewritten before the second checkpoint
)

// scenario is one program size and content.
type scenario struct {
	name   string
	mib    int
	random int // per cent of the memory that is random; the rest is zeros
	rounds int
}

func (s scenario) args(ticks, dirty string) []string {
	return []string{strconv.Itoa(s.mib), strconv.Itoa(s.random), ticks, dirty}
}

func (s scenario) randomPages() int64 {
	return int64(s.mib) << 20 / pageSize * int64(s.random) / 100
}

func main() {
	if len(os.Args) == 2 && os.Args[1] == readerVerb {
		if err := serveReader(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "bench: "+err.Error())
			os.Exit(1)
		}
		return
	}
	if err := ownnet.EnterIfRoot(); err != nil {
		fmt.Fprintln(os.Stderr, "bench: "+err.Error())
		os.Exit(1)
	}
	sizes := flag.String("sizes", "64,1024,4096", "sizes of the program's memory in MiB")
	rounds := flag.Int("rounds", 5, "rounds per size; three at most above 2 GiB")
	file := flag.String("json", "", "file for every figure (default bench.json, bench-parallel.json, bench-fleet.json or bench-monitor.json)")
	binary := flag.String("binary", "bin/dormouse", "the dormouse to measure")
	criu := flag.String("criu", cmp.Or(os.Getenv("DORMOUSE_CRIU"), "/opt/dormouse/criu/sbin/criu"), "the CRIU to compare with")
	parallel := flag.Bool("parallel", false, "measure jobs of several tasks")
	many := flag.Bool("fleet", false, "measure one controller with many simulated agents")
	watching := flag.Bool("monitor", false, "measure what it costs to watch tasks")
	agents := flag.String("agents", "10,100,1000", "sizes of the fleet, in agents")
	rate := flag.Int("rate", 0, "submissions a second to the fleet; 0: as fast as they are taken")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	measure := func() error { return run(ctx, *sizes, *rounds, cmp.Or(*file, "bench.json"), *binary, *criu) }
	if *parallel {
		measure = func() error { return runParallel(ctx, *rounds, cmp.Or(*file, "bench-parallel.json"), *binary, *criu) }
	}
	if *watching {
		measure = func() error { return runWatching(ctx, cmp.Or(*file, "bench-monitor.json"), *binary) }
	}
	if *many {
		measure = func() error { return runFleet(ctx, *agents, *rate, cmp.Or(*file, "bench-fleet.json"), *binary) }
	}
	if err := measure(); err != nil {
		fmt.Fprintln(os.Stderr, "bench: "+err.Error())
		os.Exit(1)
	}
}

func scenarios(sizes string, rounds int) ([]scenario, error) {
	var all []scenario
	for _, size := range strings.Split(sizes, ",") {
		mib, err := strconv.Atoi(size)
		if err != nil || mib <= 0 {
			return nil, fmt.Errorf("-sizes: %q is not a number of MiB", size)
		}
		s := scenario{name: fmt.Sprintf("%d MiB", mib), mib: mib, random: 50, rounds: rounds}
		if mib > 2048 {
			s.rounds = min(rounds, 3)
		}
		all = append(all, s)
		if mib == 1024 {
			all = append(all, scenario{name: "1024 MiB random", mib: mib, random: 100, rounds: rounds})
		}
	}
	return all, nil
}

func run(ctx context.Context, sizes string, rounds int, file, binary, criu string) error {
	all, err := scenarios(sizes, rounds)
	if err != nil {
		return err
	}
	if binary, err = filepath.Abs(binary); err != nil {
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
	subject := filepath.Join(dir, "bin", "subject")
	if err := os.Mkdir(filepath.Dir(subject), 0o755); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "gcc", "-O2", "-o", subject, "e2e/bench/subject/subject.c").CombinedOutput(); err != nil {
		return fmt.Errorf("compile subject.c: %w: %s", err, out)
	}
	c, err := cluster.Start(ctx, cluster.Options{Binary: binary, State: filepath.Join(dir, "state"),
		Args: []string{"--cloud", "bench=1", "--cpus", "2", "--mem", "8G"}})
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
	b := &bench{raw: raw{criu: criu, subject: subject, images: images, binary: binary},
		dormouse: dormouse{c: c, subject: subject, packs: filepath.Join(dir, "state", "repository", "packs")}, scratch: filepath.Join(dir, "scratch")}
	if err := os.Mkdir(b.scratch, 0o755); err != nil {
		return err
	}
	var rows []row
	for _, s := range all {
		r, err := b.measure(ctx, s)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		rows = append(rows, r)
	}
	printTable(rows)
	text, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

type bench struct {
	raw      raw
	dormouse dormouse
	scratch  string
}

// row is every figure of one scenario, a slice element per round.
type row struct {
	Name        string    `json:"name"`
	PauseMS     []float64 `json:"pause_ms"`
	RawPauseMS  []float64 `json:"raw_pause_ms"`
	RestoreMS   []float64 `json:"restore_ms"`
	WarmMS      []float64 `json:"warm_restore_ms"`
	PlacedMS    []float64 `json:"warm_restore_from_placed_ms"`
	RawRestore  []float64 `json:"raw_restore_ms"`
	BoxPauseMS  []float64 `json:"boxed_pause_ms"`
	BoxRestore  []float64 `json:"boxed_restore_ms"`
	FloorMS     []float64 `json:"floor_restore_ms"`
	DurableMS   []float64 `json:"durable_ms"`
	CopySyncMS  []float64 `json:"copy_sync_ms"`
	Pause2MS    []float64 `json:"second_pause_ms"`
	RawPause2MS []float64 `json:"raw_second_pause_ms"`
	SecondMS    []float64 `json:"second_durable_ms"`
	NewBytes    []float64 `json:"second_new_bytes"`
	Changed     []float64 `json:"changed_bytes"`
	Stored      []float64 `json:"stored_bytes"`
	ImageBytes  []float64 `json:"raw_image_bytes"`
	AgentMemory []float64 `json:"agent_peak_bytes"`
	AgentAnon   []float64 `json:"agent_peak_anonymous_bytes"`
	AgentShared []float64 `json:"agent_peak_shared_bytes"`
}

// measure alternates between plain CRIU and Dormouse.
func (b *bench) measure(ctx context.Context, s scenario) (row, error) {
	r := row{Name: s.name}
	for round := range s.rounds {
		fmt.Fprintf(os.Stderr, "%s: round %d of %d\n", s.name, round+1, s.rounds)
		plain, err := b.raw.round(ctx, s, b.scratch)
		if err != nil {
			return r, fmt.Errorf("plain criu: %w", err)
		}
		box := boxed{b.raw}
		inBox, err := box.round(ctx, s, b.scratch)
		if err != nil {
			return r, fmt.Errorf("plain criu in a sandbox: %w", err)
		}
		ours, err := b.dormouse.round(ctx, s, b.scratch)
		if err != nil {
			return r, err
		}
		r.add(plain, inBox, ours)
	}
	return r, nil
}

func (r *row) add(plain rawResult, inBox boxedResult, ours dormouseResult) {
	ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	r.PauseMS = append(r.PauseMS, ms(ours.pause))
	r.RawPauseMS = append(r.RawPauseMS, ms(plain.pause))
	r.RestoreMS = append(r.RestoreMS, ms(ours.restore))
	r.WarmMS = append(r.WarmMS, ms(ours.warm))
	r.PlacedMS = append(r.PlacedMS, ms(ours.placed))
	r.RawRestore = append(r.RawRestore, ms(plain.restore))
	r.BoxPauseMS = append(r.BoxPauseMS, ms(inBox.pause))
	r.BoxRestore = append(r.BoxRestore, ms(inBox.restore))
	r.FloorMS = append(r.FloorMS, ms(plain.floor))
	r.DurableMS = append(r.DurableMS, ms(ours.durable))
	r.CopySyncMS = append(r.CopySyncMS, ms(plain.copied))
	r.Pause2MS = append(r.Pause2MS, ms(ours.pause2))
	r.RawPause2MS = append(r.RawPause2MS, ms(plain.pause2))
	r.SecondMS = append(r.SecondMS, ms(ours.second))
	r.NewBytes = append(r.NewBytes, float64(ours.newBytes))
	r.Changed = append(r.Changed, float64(ours.changed))
	r.Stored = append(r.Stored, float64(ours.stored))
	r.ImageBytes = append(r.ImageBytes, float64(plain.bytes))
	r.AgentMemory = append(r.AgentMemory, float64(ours.peak.resident))
	r.AgentAnon = append(r.AgentAnon, float64(ours.peak.anonymous))
	r.AgentShared = append(r.AgentShared, float64(ours.peak.shared))
}

func printTable(rows []row) {
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "medians\tdormouse\tplain CRIU\tratio")
	for _, r := range rows {
		both := func(what string, ours, plain []float64, unit float64, format string) {
			a, b := median(ours)/unit, median(plain)/unit
			fmt.Fprintf(table, "%s: %s\t"+format+"\t"+format+"\t%.2f\n", r.Name, what, a, b, a/b)
		}
		one := func(what string, ours []float64, unit float64, format string) {
			fmt.Fprintf(table, "%s: %s\t"+format+"\t\t\n", r.Name, what, median(ours)/unit)
		}
		const mib = 1 << 20
		both("pause, ms", r.PauseMS, r.RawPauseMS, 1, "%.0f")
		both("  the same beside plain CRIU in a sandbox, ms", r.PauseMS, r.BoxPauseMS, 1, "%.0f")
		both("restore to first instruction, chunks in memory as plain CRIU's images, ms", r.WarmMS, r.RawRestore, 1, "%.0f")
		both("  of it from the decision on which node, ms", r.PlacedMS, r.RawRestore, 1, "%.0f")
		both("  all of it beside plain CRIU in a sandbox that is there, ms", r.WarmMS, r.BoxRestore, 1, "%.0f")
		both("  all of it beside the floor: plain CRIU that verifies and writes down, ms", r.WarmMS, r.FloorMS, 1, "%.0f")
		both("restore to first instruction, chunks on the disk, ms", r.RestoreMS, r.RawRestore, 1, "%.0f")
		both("durable (plain: cp and sync of the images), ms", r.DurableMS, r.CopySyncMS, 1, "%.0f")
		both("stored (plain: images), MiB", r.Stored, r.ImageBytes, mib, "%.1f")
		both("second checkpoint, 1 % rewritten: pause (plain: a second dump), ms", r.Pause2MS, r.RawPause2MS, 1, "%.0f")
		one("second checkpoint, 1 % rewritten: durable, ms", r.SecondMS, 1, "%.0f")
		both("second checkpoint: new (plain: bytes rewritten), MiB", r.NewBytes, r.Changed, mib, "%.2f")
		one("peak resident memory of the agent, MiB", r.AgentMemory, mib, "%.0f")
		one("  of it anonymous", r.AgentAnon, mib, "%.0f")
		one("  of it shared (windows of files in memory)", r.AgentShared, mib, "%.0f")
	}
	table.Flush()
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	if len(sorted) == 0 {
		return 0
	}
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}
