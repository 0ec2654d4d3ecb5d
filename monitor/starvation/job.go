package starvation

import "fmt"

// JobVerdict joins the verdicts of a job's tasks.
type JobVerdict struct {
	Condition Condition
	// Straggler is the task that keeps the job back: its place in the argument of
	// Judge; -1 when there is none, or all are at fault alike.
	Straggler int
	// Waiting are the tasks that seem to make no progress and in truth wait for
	// the straggler.
	Waiting     []int
	Explanation string
}

// Judge a job by its tasks' last verdicts. A job is as ill as its worst task, for
// its tasks wait for each other; but a task that spins without progress is only
// believed to be in a live-lock when no other is starved or stopped, nor
// suspected to be.
func Judge(tasks []Verdict) JobVerdict {
	job := JobVerdict{Condition: Healthy, Straggler: -1}
	var spinning []int
	worst := 0.0
	suspicion := false
	for i, task := range tasks {
		if task.Spins() {
			spinning = append(spinning, i)
			continue
		}
		suspicion = suspicion || task.Suspected != Healthy
		if severity := task.severity(); task.Troubled() && severity > worst {
			worst, job.Straggler, job.Condition = severity, i, task.Condition
		}
	}
	switch {
	case job.Straggler >= 0:
		job.Waiting = spinning
		job.Explanation = tasks[job.Straggler].Explanation
		if n := len(spinning); n > 0 {
			job.Explanation += "; waiting for it without rest: " + others(n)
		}
	case len(spinning) == 0 || suspicion:
		job.Waiting = spinning
	default:
		job.Condition = NoProgress
		job.Explanation = tasks[spinning[0]].Explanation
		if len(spinning) == 1 {
			job.Straggler = spinning[0]
		} else {
			job.Explanation += "; the same goes for " + others(len(spinning)-1)
		}
	}
	return job
}

func others(n int) string {
	if n == 1 {
		return "1 other task"
	}
	return fmt.Sprintf("%d other tasks", n)
}

// Spins reports a verdict of live-lock.
func (v Verdict) Spins() bool { return v.Condition == NoProgress && !v.Stopped }

// severity orders starved tasks: the share of its time a task lost, 0 to 1.
func (v Verdict) severity() float64 {
	switch v.Condition {
	case StarvedCPU:
		return max(v.Figures.Missed, 0.01)
	case StarvedMemory:
		return max(v.Figures.MemoryStall, v.Figures.FaultStall, 0.01)
	case StarvedIO:
		return max(v.Figures.IOStall, 0.01)
	case NoProgress:
		return 1
	}
	return 0
}
