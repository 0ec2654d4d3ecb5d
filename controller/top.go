package controller

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"dormouse/api"
	"dormouse/controller/store"
	"dormouse/monitor/tally"
)

// top is what was measured in the newest round, for whoever asks.
func (c *Controller) top(ctx context.Context) (api.Top, error) {
	now := c.clock.Now()
	last, pressed := c.monitor.last(), c.monitor.pressed(now)
	top := api.Top{PeriodMS: c.parts.Round.Milliseconds(), Missing: last.missing, Reports: last.reports, Nodes: []api.TopNode{}, Jobs: []api.TopJob{}}
	if !last.at.IsZero() {
		top.Time = &last.at
	}
	err := c.store.View(ctx, func(tx store.Tx) error {
		nodes, err := c.nodes.all(tx)
		if err != nil {
			return err
		}
		for _, n := range nodes {
			top.Nodes = append(top.Nodes, topNode(n, last.round, pressed[n.ID], c.monitor.silentRounds(n.ID)))
		}
		jobs, err := c.jobs.all(tx)
		if err != nil {
			return err
		}
		for _, j := range jobs {
			if !j.Phase.Final() && !j.Drill && sees(ctx, j.Owner) {
				top.Jobs = append(top.Jobs, topJob(j, last.round))
			}
		}
		return nil
	})
	if err != nil {
		return top, err
	}
	slices.SortFunc(top.Nodes, func(a, b api.TopNode) int {
		if a.Cloud != b.Cloud {
			return strings.Compare(a.Cloud, b.Cloud)
		}
		return strings.Compare(a.ID, b.ID)
	})
	if n := last.round.OtherNodes; n != (tally.Node{}) {
		top.OtherNodes = nodeFigures(n)
	}
	if j := last.round.OtherJobs; j != (tally.Job{}) && sees(ctx, "") {
		top.OtherJobs = jobFigures(j)
	}
	return top, nil
}

// longSilent are the rounds without a report after which the monitor of a node
// whose heartbeats come must be stuck.
const longSilent = 3

func topNode(n *seenNode, round tally.Round, pressed string, silent int) api.TopNode {
	t := api.TopNode{ID: n.ID, Cloud: n.Cloud, State: n.State, Health: "ok"}
	switch {
	case n.Trouble != nil:
		t.Health = n.Trouble.Explanation
	case n.State != api.NodeReady && n.Reason != "":
		t.Health = n.Reason
	case silent >= longSilent:
		t.Health = fmt.Sprintf("its agent has not said what it measures for %d rounds", silent)
	case pressed != "":
		t.Health = pressed
	}
	if measured, ok := round.Nodes[n.ID]; ok {
		t.Figures = nodeFigures(measured)
	}
	return t
}

func nodeFigures(n tally.Node) *api.NodeFigures {
	return &api.NodeFigures{
		CPUs: n.CPUs, CPUsBusy: n.CPUsBusy, CPUsStolen: n.CPUsStolen, MemBytes: n.MemBytes, MemBusy: n.MemUsed,
		DiskBytes: n.DiskBytes, DiskFree: n.DiskFree, Tasks: n.Tasks, Troubled: n.Troubled,
		CPUStall: n.CPUStall, MemoryStall: n.MemoryStall, IOStall: n.IOStall,
	}
}

func topJob(j *jobRecord, round tally.Round) api.TopJob {
	t := api.TopJob{ID: j.ID, Name: j.Name, Phase: j.Phase, Cloud: j.Cloud, Tasks: j.Tasks, Health: api.ConditionHealthy}
	if i := slices.IndexFunc(j.TaskStatus, unhealthy); i >= 0 {
		t.Health, t.Reason = api.ConditionUnhealthy, j.TaskStatus[i].Health.Explanation
	} else if j.Starvation != nil && j.Phase == api.PhaseRunning {
		t.Health, t.Reason = j.Starvation.Condition, j.Starvation.Explanation
	} else if j.Phase != api.PhaseRunning {
		t.Health, t.Reason = "", j.Reason
	}
	if measured, ok := round.Jobs[j.ID]; ok && j.Phase.Placed() {
		t.Figures = jobFigures(measured)
	}
	return t
}

func jobFigures(j tally.Job) *api.JobFigures {
	n := max(float64(j.Tasks), 1)
	f := &api.JobFigures{
		Tasks: j.Tasks, CPUs: j.CPUs, CPUsDue: j.CPUsDue, MemUsed: j.MemUsed, MemBytes: j.MemBytes,
		Waited: j.Waited / n, Stalled: j.Stalled / n, NormalProgress: j.NormalProgress,
	}
	if j.Reporting > 0 {
		f.Progress = &j.Progress
	}
	return f
}

// gauges shows what was measured in the newest round, for Prometheus. A job or a
// node that is among the others of the round is not in it.
type gauges struct{ c *Controller }

func gauge(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("dormouse_"+name, help, labels, nil)
}

var (
	nodeCPUs     = gauge("node_cpus", "CPUs of the node.", "node", "cloud")
	nodeCPUsBusy = gauge("node_cpus_busy", "CPUs that were busy in the last round.", "node", "cloud")
	nodeMemory   = gauge("node_memory_bytes", "Memory of the node.", "node", "cloud")
	nodeMemBusy  = gauge("node_memory_used_bytes", "Memory that is in use.", "node", "cloud")
	nodeDisk     = gauge("node_disk_bytes", "Size of the disk where the agent's state is.", "node", "cloud")
	nodeDiskFree = gauge("node_disk_free_bytes", "What is free of it.", "node", "cloud")
	nodeStall    = gauge("node_stall_ratio", "Share of the time in which something waited (cpu) or everything stood still (memory, io).", "node", "cloud", "resource")
	nodeKept     = gauge("node_tasks_troubled", "Tasks that are kept from working or unhealthy.", "node", "cloud")
	nodeSilence  = gauge("node_silence_seconds", "Since the node's agent was heard of.", "node", "cloud")
	nodeTrouble  = gauge("node_trouble", "1 while the node has found itself unfit for more tasks, by condition.", "node", "cloud", "condition")

	jobCPUs     = gauge("job_cpus_used", "CPUs that the job's tasks used in the last round.", "job", "name")
	jobMemory   = gauge("job_memory_used_bytes", "Memory that the job's tasks use.", "job", "name")
	jobWaited   = gauge("job_waited_ratio", "Share of the time ready in which the tasks' threads did not run; the mean of the tasks.", "job", "name")
	jobStalled  = gauge("job_stalled_ratio", "Share of the time in which the tasks stood still for memory or I/O; the mean of the tasks.", "job", "name")
	jobProgress = gauge("job_progress_per_minute", "Progress that the job's tasks report.", "job", "name")
	jobStarving = gauge("job_starving", "1 while the job is kept from working, by condition.", "job", "name", "condition")
	jobIll      = gauge("job_tasks_unhealthy", "Tasks that their health checks say are ill.", "job", "name")

	tasksWaited  = gauge("tasks_waited_ratio", "Quantiles over all tasks: share of the time ready in which they did not run.", "quantile")
	roundReports = gauge("monitor_reports", "Messages in which the controller heard of all nodes in the last round.")
	roundMissing = gauge("monitor_missing_nodes", "Nodes of which nothing was heard in the last round.")
	roundAge     = gauge("monitor_age_seconds", "Since the last round has ended.")
)

// Describe implements prometheus.Collector. What is measured differs from round
// to round: the collector is unchecked.
func (*gauges) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (g *gauges) Collect(out chan<- prometheus.Metric) {
	now, last := g.c.clock.Now(), g.c.monitor.last()
	say := func(desc *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	err := g.c.store.View(context.Background(), func(tx store.Tx) error {
		nodes, err := g.c.nodes.all(tx)
		if err != nil {
			return err
		}
		for _, n := range nodes {
			g.node(n, last.round, now, say)
		}
		jobs, err := g.c.jobs.all(tx)
		for _, j := range jobs {
			g.job(j, last.round, say)
		}
		return err
	})
	if err != nil {
		out <- prometheus.NewInvalidMetric(nodeCPUs, err)
		return
	}
	if last.at.IsZero() {
		return
	}
	for label, q := range map[string]float64{"0.5": 0.5, "0.9": 0.9, "0.99": 0.99} {
		say(tasksWaited, last.round.Waited.Quantile(q), label)
	}
	say(roundReports, float64(last.reports))
	say(roundMissing, float64(last.missing))
	say(roundAge, now.Sub(last.at).Seconds())
}

func (g *gauges) node(n *seenNode, round tally.Round, now time.Time, say func(*prometheus.Desc, float64, ...string)) {
	if seen, _ := g.c.fleet.lastSeen(n.ID); up(n.State) && !seen.IsZero() {
		say(nodeSilence, now.Sub(seen).Seconds(), n.ID, n.Cloud)
	}
	if n.Trouble != nil {
		say(nodeTrouble, 1, n.ID, n.Cloud, n.Trouble.Condition)
	}
	m, ok := round.Nodes[n.ID]
	if !ok {
		return
	}
	for desc, value := range map[*prometheus.Desc]float64{
		nodeCPUs: m.CPUs, nodeCPUsBusy: m.CPUsBusy, nodeMemory: float64(m.MemBytes), nodeMemBusy: float64(m.MemUsed),
		nodeDisk: float64(m.DiskBytes), nodeDiskFree: float64(m.DiskFree), nodeKept: float64(m.Troubled),
	} {
		say(desc, value, n.ID, n.Cloud)
	}
	for resource, share := range map[string]float64{"cpu": m.CPUStall, "memory": m.MemoryStall, "io": m.IOStall} {
		say(nodeStall, share, n.ID, n.Cloud, resource)
	}
}

func (g *gauges) job(j *jobRecord, round tally.Round, say func(*prometheus.Desc, float64, ...string)) {
	if j.Phase != api.PhaseRunning || j.Drill {
		return
	}
	if j.Starvation != nil {
		say(jobStarving, 1, j.ID, j.Name, j.Starvation.Condition)
	}
	m, ok := round.Jobs[j.ID]
	if !ok {
		return
	}
	f := jobFigures(m)
	say(jobCPUs, f.CPUs, j.ID, j.Name)
	say(jobMemory, float64(f.MemUsed), j.ID, j.Name)
	say(jobWaited, f.Waited, j.ID, j.Name)
	say(jobStalled, f.Stalled, j.ID, j.Name)
	say(jobIll, float64(m.Unhealthy), j.ID, j.Name)
	if f.Progress != nil {
		say(jobProgress, *f.Progress, j.ID, j.Name)
	}
}
