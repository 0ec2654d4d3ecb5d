package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"dormouse/api"
	"dormouse/e2e/cluster"
)

// dormouse measures Dormouse through its command line.
type dormouse struct {
	c       *cluster.Cluster
	subject string
	packs   string // directory of the repository's packs
}

// dormouseResult is one round of Dormouse.
type dormouseResult struct {
	pause    time.Duration // as the application felt it
	durable  time.Duration // from the command to durable
	restore  time.Duration // from `resume` to the first instruction, chunks on the disk
	warm     time.Duration // the same, chunks in the page cache
	placed   time.Duration // of warm, from the decision on which node
	stored   int64
	second   time.Duration // the checkpoint after 1 % was rewritten, to durable
	pause2   time.Duration
	newBytes int64 // of the second
	changed  int64 // bytes really rewritten before the second
	peak     memory
}

func (d *dormouse) round(ctx context.Context, s scenario, scratch string) (result dormouseResult, err error) {
	tickFile, dirty := filepath.Join(scratch, "ticks"), filepath.Join(scratch, "dirty")
	if err := os.RemoveAll(tickFile); err != nil {
		return result, err
	}
	args := []string{"submit", "--mem", strconv.Itoa(s.mib+256) + "M", "--volume", scratch + ":/bench",
		"--volume", filepath.Dir(d.subject) + ":/subject:ro", "--", "/subject/" + filepath.Base(d.subject)}
	out, err := d.c.Run(ctx, append(args, s.args("/bench/ticks", "/bench/dirty")...)...)
	if err != nil {
		return result, err
	}
	job := strings.TrimSpace(out)
	defer d.remove(job)
	if err := waitTicking(ctx, tickFile); err != nil {
		return result, err
	}
	watch, err := d.watchAgents(ctx)
	if err != nil {
		return result, err
	}
	defer watch.stop()
	first, pause, err := d.checkpoint(ctx, job, tickFile)
	if err != nil {
		return result, err
	}
	result.pause, result.stored = pause, first.StoredBytes
	result.durable = milliseconds(first.DurableMS)
	if err := rewrite(ctx, dirty, perMille); err != nil {
		return result, err
	}
	result.changed = s.randomPages() * perMille / 1000 * pageSize
	second, pause, err := d.checkpoint(ctx, job, tickFile)
	if err != nil {
		return result, err
	}
	result.second, result.pause2, result.newBytes = milliseconds(second.DurableMS), pause, second.NewBytes
	if result.restore, _, err = d.sleep(ctx, job, tickFile, func() error { return nil }); err != nil {
		return result, err
	}
	if result.warm, result.placed, err = d.sleep(ctx, job, tickFile, d.readPacks); err != nil {
		return result, err
	}
	result.peak, err = watch.stop()
	return result, err
}

// sleep suspends the job and resumes it after meanwhile, and returns how long it took
// from there to its first instruction, and how long from the decision on which node.
func (d *dormouse) sleep(ctx context.Context, job, tickFile string, meanwhile func() error) (all, placed time.Duration, err error) {
	if _, err := d.c.Run(ctx, "suspend", job); err != nil {
		return 0, 0, err
	}
	if err := meanwhile(); err != nil {
		return 0, 0, err
	}
	begin := time.Now()
	if _, err := d.c.Run(ctx, "resume", job); err != nil {
		return 0, 0, err
	}
	tick, err := firstTick(ctx, tickFile, begin)
	if err != nil {
		return 0, 0, err
	}
	decided, err := d.lastPlaced(ctx, job)
	return tick.Sub(begin), tick.Sub(decided), err
}

// lastPlaced is when the controller last decided where the job is to run.
func (d *dormouse) lastPlaced(ctx context.Context, job string) (last time.Time, err error) {
	out, err := d.c.Run(ctx, "-o", "json", "events", job)
	if err != nil {
		return last, err
	}
	for line := range strings.Lines(out) {
		var event api.Event
		if err := json.Unmarshal([]byte(line), &event); err != nil {
			return last, fmt.Errorf("events of %s: %w in %q", job, err, line)
		}
		if event.Type == "placed" {
			last = event.Time
		}
	}
	if last.IsZero() {
		return last, fmt.Errorf("job %s was never placed", job)
	}
	return last, nil
}

// readPacks brings all packs into the page cache: the images of plain CRIU are in
// memory, too.
func (d *dormouse) readPacks() error {
	return filepath.WalkDir(d.packs, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(io.Discard, f)
		return err
	})
}

func (d *dormouse) checkpoint(ctx context.Context, job, tickFile string) (cp api.Checkpoint, pause time.Duration, err error) {
	begin := time.Now()
	if err := d.c.JSON(ctx, &cp, "checkpoint", job); err != nil {
		return cp, 0, err
	}
	if cp.State != api.CheckpointDurable {
		return cp, 0, fmt.Errorf("checkpoint %s is %s, expected durable", cp.ID, cp.State)
	}
	pause, err = longestGap(tickFile, begin)
	return cp, pause, err
}

func (d *dormouse) remove(job string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	// Some jobs have ended by themselves: then kill refuses, and rm does not.
	_, killed := d.c.Run(ctx, "kill", job)
	if _, err := d.c.Run(ctx, "rm", job); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", errors.Join(killed, err))
	}
}

func milliseconds(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }
