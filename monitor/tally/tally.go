package tally

import (
	"math"

	"dormouse/monitor/tree"
)

// Positions in a summary.
const (
	nodes = iota
	jobs
	tables
)

const (
	waited = iota
	memoryStall
	ioStall
	busy
	histograms
)

// Node is what was measured of one node in a round, or the sum of several.
type Node struct {
	CPUsBusy   float64
	CPUs       float64
	CPUsStolen float64 // wanted by the node, given to others by its hypervisor
	MemUsed    uint64  // bytes
	MemBytes   uint64
	DiskFree   uint64 // bytes, where the agent's state is
	DiskBytes  uint64
	Tasks      uint64 // running, those that stand still included
	Troubled   uint64 // of them, kept from working or unhealthy
	// Shares of the time, 0 to 1, in which something waited (CPU) or everything
	// stood still (memory, I/O) on the node. The sum's are sums: divide by the
	// number of nodes.
	CPUStall, MemoryStall, IOStall float64
}

// Task is what was measured of one task in a round.
type Task struct {
	Job      string
	CPUs     float64 // used
	CPUsDue  float64
	MemUsed  uint64 // bytes
	MemBytes uint64 // limit; 0: none
	// Waited is the share of the time its threads were ready in which they did not
	// run; the stalls are the shares in which it stood still. 0 to 1.
	Waited, MemoryStall, IOStall float64
	Troubled                     bool // kept from working
	Unhealthy                    bool // by its health check
	// Progress is in units per minute and nil if the task reports none;
	// NormalProgress is 0 while it is not known.
	Progress       *float64
	NormalProgress float64
}

// Job is the sum of what was measured of a job's tasks in a round.
type Job struct {
	CPUs, CPUsDue     float64
	MemUsed, MemBytes uint64
	Waited            float64 // sum over tasks: divide by Tasks
	Stalled           float64 // sum over tasks of the greater of both stalls
	Tasks             uint64  // measured in this round
	Troubled          uint64  // of them, kept from working
	Unhealthy         uint64  // of them, by their health checks
	Reporting         uint64  // of them, reporting progress
	Progress          float64 // units per minute, sum over the reporting tasks
	NormalProgress    float64 // sum over those whose normal is known
}

// Round is what the nodes of a tree have measured in one round.
type Round struct {
	Nodes      map[string]Node // by id; the busiest, where there are many
	OtherNodes Node            // the sum of the others
	Jobs       map[string]Job  // by id; those that use most CPU time
	OtherJobs  Job
	// MissingCPUs bounds the CPUs that a job shown may have used beyond what is
	// shown, since on some nodes it was among the others.
	MissingCPUs float64

	// Waited, MemoryStall and IOStall are over all tasks, Busy over all nodes. A
	// quantile is at most a quarter too high.
	Waited, MemoryStall, IOStall, Busy Shares
}

// Shares is a distribution of numbers between 0 and 1.
type Shares struct{ counts tree.Histogram }

// Quantile is a share that at least the part q (0 to 1) of all do not exceed.
func (s Shares) Quantile(q float64) float64 { return min(1, fromMilli(s.counts.Quantile(q))) }

// Count is how many there are.
func (s Shares) Count() uint64 {
	n := uint64(0)
	for _, count := range s.counts.Counts {
		n += count
	}
	return n
}

// Fill makes the summary of one node.
func Fill(id string, node Node, tasks []Task) tree.Summary {
	byJob := map[string]Job{}
	counts := make([]tree.Histogram, histograms)
	for _, t := range tasks {
		byJob[t.Job] = byJob[t.Job].plus(t)
		counts[waited].Observe(milli(t.Waited))
		counts[memoryStall].Observe(milli(t.MemoryStall))
		counts[ioStall].Observe(milli(t.IOStall))
	}
	if node.CPUs > 0 {
		counts[busy].Observe(milli(node.CPUsBusy / node.CPUs))
	}
	rows := map[string][]uint64{}
	for job, sum := range byJob {
		rows[job] = sum.values()
	}
	all := make([]tree.Table, tables)
	all[nodes] = tree.Rows(map[string][]uint64{id: node.values()})
	all[jobs] = tree.Rows(rows)
	return tree.Summary{Tables: all, Histograms: counts}
}

// Read is the meaning of a summary.
func Read(s tree.Summary) Round {
	r := Round{Nodes: map[string]Node{}, Jobs: map[string]Job{}}
	if len(s.Tables) > nodes {
		for _, row := range s.Tables[nodes].Rows {
			r.Nodes[row.Key] = nodeFrom(row.Values)
		}
		r.OtherNodes = nodeFrom(s.Tables[nodes].Rest)
	}
	if len(s.Tables) > jobs {
		for _, row := range s.Tables[jobs].Rows {
			r.Jobs[row.Key] = jobFrom(row.Values)
		}
		r.OtherJobs = jobFrom(s.Tables[jobs].Rest)
		r.MissingCPUs = fromMilli(s.Tables[jobs].Floor)
	}
	for i, to := range []*Shares{&r.Waited, &r.MemoryStall, &r.IOStall, &r.Busy} {
		if i < len(s.Histograms) {
			to.counts = s.Histograms[i]
		}
	}
	return r
}

func (j Job) plus(t Task) Job {
	j.CPUs += t.CPUs
	j.CPUsDue += t.CPUsDue
	j.MemUsed += t.MemUsed
	j.MemBytes += t.MemBytes
	j.Waited += t.Waited
	j.Stalled += max(t.MemoryStall, t.IOStall)
	j.Tasks++
	if t.Troubled {
		j.Troubled++
	}
	if t.Unhealthy {
		j.Unhealthy++
	}
	if t.Progress != nil {
		j.Reporting++
		j.Progress += *t.Progress
		j.NormalProgress += max(0, t.NormalProgress)
	}
	return j
}

// values and what reads them again give each position its meaning. The first is
// the weight.
func (j Job) values() []uint64 {
	return []uint64{
		milli(j.CPUs), milli(j.CPUsDue), j.MemUsed, j.MemBytes, milli(j.Waited), milli(j.Stalled),
		j.Tasks, j.Troubled, j.Unhealthy, j.Reporting, milli(j.Progress), milli(j.NormalProgress),
	}
}

func jobFrom(values []uint64) Job {
	at := position(values)
	return Job{
		CPUs: fromMilli(at(0)), CPUsDue: fromMilli(at(1)), MemUsed: at(2), MemBytes: at(3),
		Waited: fromMilli(at(4)), Stalled: fromMilli(at(5)),
		Tasks: at(6), Troubled: at(7), Unhealthy: at(8), Reporting: at(9),
		Progress: fromMilli(at(10)), NormalProgress: fromMilli(at(11)),
	}
}

func (n Node) values() []uint64 {
	return []uint64{
		milli(n.CPUsBusy), milli(n.CPUs), milli(n.CPUsStolen), n.MemUsed, n.MemBytes, n.DiskFree, n.DiskBytes,
		n.Tasks, n.Troubled, milli(n.CPUStall), milli(n.MemoryStall), milli(n.IOStall),
	}
}

func nodeFrom(values []uint64) Node {
	at := position(values)
	return Node{
		CPUsBusy: fromMilli(at(0)), CPUs: fromMilli(at(1)), CPUsStolen: fromMilli(at(2)),
		MemUsed: at(3), MemBytes: at(4), DiskFree: at(5), DiskBytes: at(6), Tasks: at(7), Troubled: at(8),
		CPUStall: fromMilli(at(9)), MemoryStall: fromMilli(at(10)), IOStall: fromMilli(at(11)),
	}
}

func position(values []uint64) func(int) uint64 {
	return func(i int) uint64 {
		if i < len(values) {
			return values[i]
		}
		return 0
	}
}

// milli is a number in thousandths. What no sum of nodes can reach counts as
// the most there is, so that sums do not overflow.
func milli(value float64) uint64 {
	const most = 1 << 40
	switch {
	case math.IsNaN(value) || value <= 0:
		return 0
	case value*1000 >= most:
		return most
	}
	return uint64(math.Round(value * 1000))
}

func fromMilli(value uint64) float64 { return float64(value) / 1000 }
