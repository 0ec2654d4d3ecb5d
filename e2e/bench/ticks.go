package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	"dormouse/e2e/cluster"
)

// ticks reads the times a subject wrote down.
func ticks(path string) ([]time.Time, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []time.Time
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		ns, err := strconv.ParseInt(lines.Text(), 10, 64)
		if err != nil {
			continue // the last line may be half written
		}
		all = append(all, time.Unix(0, ns))
	}
	return all, lines.Err()
}

// longestGap returns the longest time between two ticks from begin on: the
// pause as the application felt it.
func longestGap(path string, begin time.Time) (time.Duration, error) {
	all, err := ticks(path)
	if err != nil {
		return 0, err
	}
	var longest time.Duration
	for i := 1; i < len(all); i++ {
		if all[i].After(begin) {
			longest = max(longest, all[i].Sub(all[i-1]))
		}
	}
	return longest, nil
}

// firstTick waits for the first tick after begin.
func firstTick(ctx context.Context, path string, begin time.Time) (time.Time, error) {
	var found time.Time
	err := cluster.WaitFor(ctx, "the first instruction", func() (bool, error) {
		all, err := ticks(path)
		if err != nil || len(all) == 0 || !all[len(all)-1].After(begin) {
			return false, err
		}
		for _, tick := range all {
			if tick.After(begin) {
				found = tick
				return true, nil
			}
		}
		return false, nil
	})
	return found, err
}

// waitTicking waits until the subject in path has filled its memory.
func waitTicking(ctx context.Context, path string) error {
	return cluster.WaitFor(ctx, "the subject", func() (bool, error) {
		info, err := os.Stat(path)
		return err == nil && info.Size() > 0, nil
	})
}

// rewrite has the subject rewrite a share of its pages.
func rewrite(ctx context.Context, dirty string, perMille int) error {
	if err := os.WriteFile(dirty, fmt.Append(nil, perMille), 0o644); err != nil {
		return err
	}
	return cluster.WaitFor(ctx, "rewritten pages", func() (bool, error) {
		_, err := os.Stat(dirty)
		return os.IsNotExist(err), nil
	})
}
