package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"dormouse/api"
)

// memory is the resident memory of a process, proc(5): all of it at its peak as
// the kernel notes it (VmHWM), and the peaks of two of its kinds as seen.
type memory struct {
	resident  int64
	anonymous int64 // RssAnon: heap, stacks, buffers
	shared    int64 // RssShmem: what is mapped of files in memory
}

func (m memory) max(other memory) memory {
	return memory{max(m.resident, other.resident), max(m.anonymous, other.anonymous), max(m.shared, other.shared)}
}

// watched looks at the memory of all agents until it is stopped.
type watched struct {
	cancel context.CancelFunc
	done   chan struct{}
	peak   memory // valid after done
	err    error
}

// watchPeriod is how often memory is looked at.
const watchPeriod = 10 * time.Millisecond

func (d *dormouse) watchAgents(ctx context.Context) (*watched, error) {
	var nodes []api.Node
	if err := d.c.JSON(ctx, &nodes, "nodes"); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	w := &watched{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		ticker := time.NewTicker(watchPeriod)
		defer ticker.Stop()
		for w.err == nil {
			for _, node := range nodes {
				w.look(node.AgentPid)
			}
			select {
			case <-ticker.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	return w, nil
}

func (w *watched) look(pid int) {
	if pid == 0 {
		return
	}
	m, err := residentMemory(pid)
	if err != nil {
		w.err = err
	}
	w.peak = w.peak.max(m)
}

// stop returns the peaks. It may be called again.
func (w *watched) stop() (memory, error) {
	w.cancel()
	<-w.done
	return w.peak, w.err
}

func residentMemory(pid int) (m memory, err error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return m, err
	}
	defer f.Close()
	fields := map[string]*int64{"VmHWM": &m.resident, "RssAnon": &m.anonymous, "RssShmem": &m.shared}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ":")
		field := fields[name]
		if field == nil {
			continue
		}
		kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(value, "kB")), 10, 64)
		if err != nil {
			return m, fmt.Errorf("/proc/%d/status: %s: %w", pid, name, err)
		}
		*field = kib << 10
	}
	return m, lines.Err()
}
