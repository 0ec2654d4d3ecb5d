package controller

import (
	"context"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"dormouse/api"
	"dormouse/controller/store"
)

// metrics are what /metrics shows: counts are read from the store when asked
// for, so that they cannot drift; durations are observed as they happen.
type metrics struct {
	registry    *prometheus.Registry
	pause       prometheus.Histogram
	durable     prometheus.Histogram
	checkpoints *prometheus.CounterVec
	operations  *prometheus.CounterVec
	requests    *prometheus.CounterVec
	recoveries  *prometheus.CounterVec
	down        prometheus.Histogram
	findings    *prometheus.CounterVec
	reliefs     *prometheus.CounterVec
	posts       *prometheus.CounterVec
}

func newMetrics(c *Controller) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		pause: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "dormouse_checkpoint_pause_seconds", Help: "How long jobs stood still for durable checkpoints.",
			Buckets: prometheus.ExponentialBuckets(0.01, 2, 14),
		}),
		durable: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "dormouse_checkpoint_durable_seconds", Help: "From the request of a checkpoint until it was durable.",
			Buckets: prometheus.ExponentialBuckets(0.1, 2, 16),
		}),
		checkpoints: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dormouse_checkpoints_total", Help: "Checkpoints that ended, by their state.",
		}, []string{"state"}),
		operations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dormouse_operations_total", Help: "Operations that ended, by kind and how.",
		}, []string{"kind", "phase"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dormouse_http_requests_total", Help: "REST requests, by method and status.",
		}, []string{"method", "status"}),
		recoveries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dormouse_recoveries_total", Help: "Failures of jobs that were followed by a recovery, by cause.",
		}, []string{"cause"}),
		findings: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dormouse_findings_total", Help: "Jobs found to be kept from working and tasks found unhealthy or well again, by kind and condition.",
		}, []string{"kind", "condition"}),
		reliefs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dormouse_starvation_actions_total", Help: "Jobs taken off their places because they were kept from working, by policy.",
		}, []string{"policy"}),
		posts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dormouse_webhook_posts_total", Help: "Findings posted to webhooks, by result: taken, refused, given_up.",
		}, []string{"result"}),
		down: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "dormouse_incident_down_seconds", Help: "From the failure of a job until it ran again.",
			Buckets: prometheus.ExponentialBuckets(0.25, 2, 16),
		}),
	}
	m.registry.MustRegister(m.pause, m.durable, m.checkpoints, m.operations, m.requests, m.recoveries, m.down, m.findings, m.reliefs, m.posts,
		&census{c: c}, &gauges{c: c},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

func (m *metrics) checkpointDurable(cp api.Checkpoint) {
	m.pause.Observe(cp.PauseMS / 1000)
	m.durable.Observe(cp.DurableMS / 1000)
	m.checkpoints.WithLabelValues(string(api.CheckpointDurable)).Inc()
}

func (m *metrics) checkpointFailed() {
	m.checkpoints.WithLabelValues(string(api.CheckpointFailed)).Inc()
}

func (m *metrics) operationEnded(op *opRecord) {
	m.operations.WithLabelValues(string(op.Kind), string(op.Phase)).Inc()
}

// census counts what is in the store.
type census struct{ c *Controller }

var (
	jobsDesc  = prometheus.NewDesc("dormouse_jobs", "Jobs, by phase.", []string{"phase"}, nil)
	nodesDesc = prometheus.NewDesc("dormouse_nodes", "Nodes, by cloud and state.", []string{"cloud", "state"}, nil)
	opsDesc   = prometheus.NewDesc("dormouse_operations_running", "Operations under way, by kind.", []string{"kind"}, nil)
)

// Describe implements prometheus.Collector.
func (*census) Describe(out chan<- *prometheus.Desc) {
	out <- jobsDesc
	out <- nodesDesc
	out <- opsDesc
}

// Collect implements prometheus.Collector.
func (s *census) Collect(out chan<- prometheus.Metric) {
	phases, kinds := make(map[api.Phase]int), make(map[api.OperationKind]int)
	type place struct {
		cloud string
		state api.NodeState
	}
	nodes := make(map[place]int)
	err := s.c.store.View(context.Background(), func(tx store.Tx) error {
		jobs, err := s.c.jobs.all(tx)
		if err != nil {
			return err
		}
		for i := range jobs {
			if !jobs[i].Drill {
				phases[jobs[i].Phase]++
			}
		}
		ops, err := s.c.operations.all(tx)
		if err != nil {
			return err
		}
		for i := range ops {
			if ops[i].Phase == api.OpRunning {
				kinds[ops[i].Kind]++
			}
		}
		all, err := s.c.nodes.all(tx)
		for i := range all {
			nodes[place{all[i].Cloud, all[i].State}]++
		}
		return err
	})
	if err != nil {
		out <- prometheus.NewInvalidMetric(jobsDesc, err)
		return
	}
	for phase, n := range phases {
		out <- prometheus.MustNewConstMetric(jobsDesc, prometheus.GaugeValue, float64(n), string(phase))
	}
	for kind, n := range kinds {
		out <- prometheus.MustNewConstMetric(opsDesc, prometheus.GaugeValue, float64(n), string(kind))
	}
	for at, n := range nodes {
		out <- prometheus.MustNewConstMetric(nodesDesc, prometheus.GaugeValue, float64(n), at.cloud, string(at.state))
	}
}
