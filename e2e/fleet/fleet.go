// Package fleet is a fleet of simulated agents for the benchmarks: they speak
// the real protocol over their own TLS connections, and their tasks are entries
// in a map. There is no sandbox and no CRIU behind them.
//
// Each agent joins with the shared token, gets its certificate, holds a Connect
// stream, sends heartbeats, answers commands at once, and dials again when the
// stream breaks, with the real agent's pauses. The controller cannot tell it
// from a real one.
package fleet

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Options say which fleet to start, and whom it joins.
type Options struct {
	Address    string // HOST:PORT of the controller
	ServerName string // in its certificate
	CA         *x509.CertPool
	Token      string // join token
	Cloud      string
	Agents     int
	CPUs       float64 // of each
	MemBytes   int64   // of each
	// Started is called when an agent is told to start a task of the job.
	Started func(job string, at time.Time)
}

// Fleet is a number of running agents.
type Fleet struct {
	options Options
	agents  []*agent
	stop    context.CancelFunc
	work    sync.WaitGroup

	beats   atomic.Int64 // acknowledged heartbeats
	welcome chan struct{}
}

// joinsAtOnce bounds the agents that join at the same time.
const joinsAtOnce = 16

// Start starts the fleet and returns when every agent was welcomed.
func Start(ctx context.Context, o Options) (*Fleet, error) {
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	f := &Fleet{options: o, stop: stop, welcome: make(chan struct{}, o.Agents)}
	turns := make(chan struct{}, joinsAtOnce)
	for i := range o.Agents {
		a := &agent{fleet: f, node: fmt.Sprintf("%s-%04d", o.Cloud, i), tasks: make(map[taskKey]*task), turns: turns}
		f.agents = append(f.agents, a)
		f.work.Go(func() { a.live(run) })
	}
	if err := f.Welcomed(ctx, o.Agents); err != nil {
		f.Stop()
		return nil, fmt.Errorf("start %d agents: %w", o.Agents, err)
	}
	return f, nil
}

// Welcomed returns when n agents were welcomed that nobody waited for before: at
// first all of them and, after the controller was restarted, all of them again.
func (f *Fleet) Welcomed(ctx context.Context, n int) error {
	for got := range n {
		select {
		case <-f.welcome:
		case <-ctx.Done():
			return fmt.Errorf("%d of %d agents were welcomed (%s): %w", got, n, f.trouble(), ctx.Err())
		}
	}
	return nil
}

// trouble is why an agent is not connected.
func (f *Fleet) trouble() string {
	for _, a := range f.agents {
		if err := a.failure(); err != nil {
			return fmt.Sprintf("%s: %v", a.node, err)
		}
	}
	return "no agent complains"
}

// Heartbeats is how many were acknowledged so far.
func (f *Fleet) Heartbeats() int64 { return f.beats.Load() }

// Tasks is how many tasks are alive.
func (f *Fleet) Tasks() int {
	n := 0
	for _, a := range f.agents {
		n += a.alive()
	}
	return n
}

// Stop ends all agents.
func (f *Fleet) Stop() {
	f.stop()
	f.work.Wait()
}

func (f *Fleet) tls(certificate *tls.Certificate) *tls.Config {
	config := &tls.Config{RootCAs: f.options.CA, ServerName: f.options.ServerName, MinVersion: tls.VersionTLS13}
	if certificate != nil {
		config.Certificates = []tls.Certificate{*certificate}
	}
	return config
}
