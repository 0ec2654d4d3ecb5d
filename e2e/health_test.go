package e2e

import (
	"strings"
	"testing"

	"dormouse/api"
)

// sickly counts, and is sick from SIGUSR1 on.
const sickly = `trap 'touch /tmp/sick' USR1; i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done`

// TestASickTaskIsRestoredFromWhenItWasWell: a health check fails, and the job is
// recovered from the checkpoint, in which it is well.
func TestASickTaskIsRestoredFromWhenItWasWell(t *testing.T) {
	p := onShared(t)
	job := p.submit("--mem", "64M", "--max-restarts", "3",
		"--health-cmd", "test ! -e /tmp/sick || { echo it hurts; exit 7; }", "--health-period", "500ms", "--health-retries", "2",
		"--", "/bin/sh", "-c", sickly)
	p.waitLines(job, 5)
	taken := p.checkpoint(job)
	p.run("kill", "--signal", "USR1", job)
	p.until(job, "it runs again", func() bool {
		detail := p.inspect(job)
		return detail.Restarts == 1 && detail.Phase == api.PhaseRunning
	})
	p.moves(job)
	counts(t, p.output(job))
	detail := p.inspect(job)
	if detail.From != taken.ID {
		t.Errorf("it was restored from %q, want %s", detail.From, taken.ID)
	}
	events := p.run("events", job)
	if !strings.Contains(events, "exit status 7: it hurts") {
		t.Errorf("no event says why:\n%s", events)
	}
	// The new run is asked, too, and is well.
	p.moves(job)
	if got := p.inspect(job); got.Restarts != 1 || got.Phase != api.PhaseRunning {
		t.Errorf("then the job is %s after %d restarts, want running after 1", got.Phase, got.Restarts)
	}
}
