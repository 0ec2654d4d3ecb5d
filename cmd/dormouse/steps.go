package main

import (
	"fmt"
	"strconv"

	"dormouse/api"
)

// newestMeasured is the newest checkpoint whose capture was measured, nil when
// there is none.
func newestMeasured(checkpoints []api.Checkpoint) *api.Checkpoint {
	var newest *api.Checkpoint
	for i, checkpoint := range checkpoints {
		if len(checkpoint.Steps) > 0 && (newest == nil || checkpoint.Created.After(newest.Created)) {
			newest = &checkpoints[i]
		}
	}
	return newest
}

// printSteps shows what each task's part of a checkpoint took.
func (c *cli) printSteps(checkpoint *api.Checkpoint) error {
	rows := [][]string{}
	for _, step := range checkpoint.Steps {
		rows = append(rows, []string{
			strconv.Itoa(step.Task), step.Node, humanMS(step.FreezeMS), humanMS(step.DumpMS), humanMS(step.FilesMS), humanMS(step.PauseMS),
			humanSize(step.SizeBytes), humanSize(step.NewBytes), humanMS(step.UploadMS),
		})
	}
	if err := c.printTable([]string{"TASK", "NODE", "FREEZE", "DUMP", "FILES", "PAUSE", "BYTES", "NEW", "UPLOAD"}, rows); err != nil {
		return err
	}
	if slowest := straggler(checkpoint); slowest != "" {
		_, err := fmt.Fprintf(c.out, "slowest: %s\n", slowest)
		return err
	}
	return nil
}

// straggler names the task that the others of a checkpoint waited for. Empty:
// there are no others.
func straggler(checkpoint *api.Checkpoint) string {
	if len(checkpoint.Steps) < 2 {
		return ""
	}
	slowest := checkpoint.Steps[0]
	for _, step := range checkpoint.Steps {
		if captureMS(step) > captureMS(slowest) {
			slowest = step
		}
	}
	return fmt.Sprintf("task %d on %s, captured in %s", slowest.Task, slowest.Node, humanMS(captureMS(slowest)))
}

func captureMS(step api.CaptureSteps) float64 { return step.FreezeMS + step.DumpMS + step.FilesMS }
