package e2e

import (
	"testing"

	"dormouse/api"
)

// TestCloudGrowsForJobsThatWaitAndForThoseThatLostTheirNode: the second job waits
// until a node was made for it; when one node is lost, its job goes on, on yet
// another.
func TestCloudGrowsForJobsThatWaitAndForThoseThatLostTheirNode(t *testing.T) {
	t.Parallel()
	p := onOwn(t, built.bin, nil, "--cloud", "east=1..2", "--cpus", "1", "--mem", "512M")
	count := []string{"--cpus", "1", "--mem", "64M", "--max-restarts", "3", "--", "sh", "-c", "n=0; while :; do n=$((n+1)); echo $n; sleep 0.1; done"}
	first := p.submit(count...)
	p.waitLines(first, 5)
	second := p.submit(count...)
	p.waitFor(second, api.PhaseRunning)
	if on := []string{p.node(first), p.node(second)}; on[0] != "east-0" || on[1] != "east-1" {
		t.Errorf("the jobs are on %v, want one on the first node and one on a further one", on)
	}
	p.checkpoint(first)
	p.run("node", "kill", "east-0")
	p.until(first, "it runs on a third node", func() bool {
		detail := p.inspect(first)
		return detail.Phase == api.PhaseRunning && detail.TaskStatus[0].Node == "east-2"
	})
	p.moves(first)
	p.run("kill", first)
	counts(t, p.output(first))
}
