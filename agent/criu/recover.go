package criu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// RecoverRequest names a task whose dump may have been interrupted by the end
// of the process that ran it.
type RecoverRequest struct {
	Pid     int    // the tree's init, in our own pid namespace
	WorkDir string // of the interrupted dump or restore (its ImagesDir if it had none)
}

// Recover waits for a CRIU that an earlier process of ours left behind, and
// makes the tree usable should that CRIU have died as well. A CRIU whose client
// ended undoes its dump at the next notification, or finishes killing a tree
// whose dump is complete. What remains to the caller is the cgroup's frozen
// state. Recover may be called when nothing was interrupted.
func (e *Engine) Recover(ctx context.Context, r RecoverRequest) error {
	if err := waitForLeftover(ctx, r.WorkDir); err != nil {
		return fmt.Errorf("criu recover: %w", err)
	}
	if r.Pid <= 0 {
		return nil
	}
	pids, err := treePIDs(r.Pid)
	if err != nil {
		return nil // the tree is gone: nothing to repair
	}
	g, err := newGuard(pids, "")
	if err != nil {
		return fmt.Errorf("criu recover: %w", err)
	}
	defer g.close()
	if err := g.repair(); err != nil {
		return fmt.Errorf("criu recover: %w", err)
	}
	return nil
}

// runningFile, in a work directory, says which CRIU process works there.
const runningFile = "dormouse-criu.json"

// running identifies a process beyond the reuse of its number.
type running struct {
	PID   int    `json:"pid"`
	Start string `json:"start"` // start time, /proc/PID/stat field 22
}

func noteRunning(workDir string, pid int) error {
	data, err := json.Marshal(running{pid, startTime(pid)})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(workDir, runningFile), data, 0o600)
}

func forgetRunning(workDir string) { _ = os.Remove(filepath.Join(workDir, runningFile)) }

func startTime(pid int) string {
	data, err := os.ReadFile(procPath(pid, "stat"))
	if err != nil {
		return ""
	}
	text := string(data)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return ""
	}
	return fields[19]
}

// waitForLeftover returns nil when no CRIU works in the directory any more.
func waitForLeftover(ctx context.Context, workDir string) error {
	data, err := os.ReadFile(filepath.Join(workDir, runningFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var left running
	// A half-written note means that CRIU had not been asked for anything yet.
	if json.Unmarshal(data, &left) == nil && left.PID > 0 {
		if err := left.wait(ctx); err != nil {
			return err
		}
	}
	forgetRunning(workDir)
	return nil
}

func (r running) wait(ctx context.Context) error {
	pidfd, err := unix.PidfdOpen(r.PID, 0)
	if err != nil {
		return nil // gone
	}
	defer unix.Close(pidfd)
	if startTime(r.PID) != r.Start {
		return nil // another process has got its number
	}
	return waitPidfd(ctx, pidfd)
}

// waitPidfd waits until the process has ended.
func waitPidfd(ctx context.Context, pidfd int) error {
	const step = 100 // ms between looks at ctx
	for ctx.Err() == nil {
		fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, step)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n > 0 {
			return nil
		}
	}
	return context.Cause(ctx)
}
