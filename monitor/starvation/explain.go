package starvation

import (
	"fmt"
	"math"
	"strconv"
	"time"
)

// explain the verdict in one sentence with its figures.
func (d *Detector) explain() string {
	condition := d.verdict.Condition
	if condition == Healthy {
		condition = d.verdict.Suspected
	}
	f, name := d.verdict.Figures, d.config.Name
	if d.good > 0 {
		condition = Healthy
	}
	switch condition {
	case StarvedCPU:
		return name + f.explainCPU()
	case StarvedMemory:
		return name + f.explainMemory()
	case StarvedIO:
		return name + fmt.Sprintf(" stood still %s of the last %s for I/O%s at %s an operation%s%s",
			percent(f.IOStall), length(f.Span), normally(percent, f.NormalIOStall),
			seconds(f.IOLatency), normally(seconds, f.NormalIOLatency), f.progressed())
	case NoProgress:
		return name + d.explainNoProgress()
	}
	return name + d.explainHealthy()
}

func (f Figures) explainCPU() string {
	text := fmt.Sprintf(" waited %s of the last %s for a CPU%s, got %s of the %s CPUs due%s",
		percent(f.Waited), length(f.Span), normally(percent, f.NormalWaited),
		decimal(f.CPU*(1-f.Stolen)), decimal(f.Due), f.progressed())
	// What kept it waiting, when that is known.
	switch {
	case f.Quota > 0 && f.Quota < f.Due && f.Throttled >= 0.1:
		text += fmt.Sprintf("; it is limited to %s CPUs", decimal(f.Quota))
	case f.Stolen >= 0.1:
		text += fmt.Sprintf("; %s of the node's time was stolen by its hypervisor", percent(f.Stolen))
	}
	return text
}

func (f Figures) explainMemory() string {
	text := fmt.Sprintf(" stood still %s of the last %s for memory%s, %s major faults/s%s",
		percent(max(f.MemoryStall, f.FaultStall)), length(f.Span), normally(percent, f.NormalMemoryStall),
		decimal(f.MajorFaults), normally(decimal, f.NormalMajorFaults))
	if f.MemoryUsed > 0 {
		text += fmt.Sprintf(", uses %s of its limit", percent(f.MemoryUsed))
	}
	return text + f.progressed()
}

func (d *Detector) explainNoProgress() string {
	f := d.verdict.Figures
	if f.Stopped {
		how := "stopped by a signal"
		if d.recent[len(d.recent)-1].task.Frozen {
			how = "frozen"
		}
		return fmt.Sprintf(" is %s, for the last %s, and not by Dormouse: used %s CPUs%s%s",
			how, length(f.Span), decimal(f.CPU), normally(decimal, f.NormalCPU), f.progressed())
	}
	return fmt.Sprintf(" used %s CPUs%s and reported no progress for the last %s (longest pause so far %s)%s",
		decimal(f.CPU), normally(decimal, f.NormalCPU), length(d.progress.still),
		length(time.Duration(d.progress.pauses.most()*float64(time.Second))), f.progressed())
}

func (d *Detector) explainHealthy() string {
	f := d.verdict.Figures
	switch {
	case d.verdict.Troubled():
		return " recovers"
	case f.IOStall >= 0.5:
		return fmt.Sprintf(" waits for I/O, %s an operation%s%s", seconds(f.IOLatency), normally(seconds, f.NormalIOLatency), f.progressed())
	case f.CPU < 0.01:
		return " is idle" + f.progressed()
	}
	text := fmt.Sprintf(" used %s CPUs%s, waited %s%s%s", decimal(f.CPU), normally(decimal, f.NormalCPU),
		percent(f.Waited), normally(percent, f.NormalWaited), f.progressed())
	if d.brokenDown(f) {
		text += "; slower by itself: it lacks nothing"
	}
	return text
}

func (f Figures) progressed() string {
	if !f.Reports {
		return ""
	}
	return fmt.Sprintf(", progress %s/min%s", decimal(f.Progress),
		normally(func(rate float64) string { return decimal(rate) + "/min" }, f.NormalProgress))
}

// normally puts what is usual in parentheses, if it is known.
func normally(format func(float64) string, normal float64) string {
	if normal < 0 {
		return ""
	}
	return " (normal " + format(normal) + ")"
}

func percent(share float64) string {
	return strconv.Itoa(int(math.Round(share*100))) + " %"
}

// decimal with two significant digits below ten.
func decimal(value float64) string {
	switch {
	case value >= 10:
		return strconv.FormatFloat(value, 'f', 0, 64)
	case value >= 1:
		return strconv.FormatFloat(math.Round(value*10)/10, 'f', -1, 64)
	}
	return strconv.FormatFloat(math.Round(value*100)/100, 'f', -1, 64)
}

func seconds(value float64) string {
	if value < 1 {
		return decimal(value*1000) + " ms"
	}
	return decimal(value) + " s"
}

func length(span time.Duration) string {
	return decimal(math.Round(span.Seconds())) + " s"
}
