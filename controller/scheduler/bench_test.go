package scheduler_test

import (
	"fmt"
	"testing"
	"time"

	"dormouse/controller/scheduler"
)

// One look at 10,000 waiting jobs and 1,000 nodes.
func BenchmarkSchedule(b *testing.B) {
	for _, c := range []struct {
		name                      string
		running, priority, shapes int
	}{{"room for all", 0, 0, 1}, {"no room", 8, 0, 1}, {"no room, many needs", 8, 0, 1000}, {"eviction", 8, 1, 20}} {
		b.Run(c.name, func(b *testing.B) {
			var nodes []scheduler.Node
			var jobs []scheduler.Running
			var queue []scheduler.Waiting
			for i := range 1000 {
				nodes = append(nodes, node(fmt.Sprintf("east-%04d", i), 10, 32*gib))
				for k := range c.running {
					jobs = append(jobs, running(fmt.Sprintf("r-%d-%d", i, k), 0, 1, int64(i), fmt.Sprintf("east-%04d", i)))
				}
			}
			for i := range 10000 {
				ask := scheduler.Request{Tasks: 1, CPUs: 1, MemBytes: int64(i%c.shapes+1) << 20}
				if c.running > 0 {
					ask.CPUs = 3
				}
				w := waiting(fmt.Sprintf("w-%d", i), c.priority, ask)
				w.Created = w.Created.Add(time.Duration(i))
				queue = append(queue, w)
			}
			for b.Loop() {
				scheduler.Schedule(nodes, jobs, queue)
			}
		})
	}
}
