//go:build nightly

package e2e

import (
	"os"
	"slices"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/monitor/sample"
)

// What takes too long for every run of the tests: `make nightly`.

// lasts is for how long a test goes on: DORMOUSE_E2E_LASTS says otherwise.
func lasts(t *testing.T, usual time.Duration) time.Duration {
	t.Helper()
	text := os.Getenv("DORMOUSE_E2E_LASTS")
	if text == "" {
		return usual
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestStarvingJobsAreFoundWithinThreePeriodsOfTheDefault: the way up the tree
// included.
func TestStarvingJobsAreFoundWithinThreePeriodsOfTheDefault(t *testing.T) {
	starvingAreFound(t, sample.DefaultPeriod, 3*sample.DefaultPeriod)
}

// well is what never starves: it is idle, waits, computes with a processor of its
// own, or is slow by nature.
func well() []*scenario {
	some := func(n string) string { return "i=0; while [ $i -lt " + n + " ]; do i=$((i+1)); done" }
	return []*scenario{
		{name: "idle", command: []string{"sleep", "100000"}},
		{name: "idle server", command: []string{"python3", "-m", "http.server", "8000"}},
		{name: "redis, asked now and then", command: on(1, "sh", "-c",
			"redis-server --save '' --port 6390 >&2 & while sleep 2; do redis-benchmark -p 6390 -n 500 -c 5 -q >&2; done")},
		{name: "cron-like", command: on(1, "sh", "-c", "while :; do "+some("5000")+"; sleep 4; done")},
		{name: "every two minutes", command: on(1, "sh", "-c", "while :; do "+some("400000")+"; sleep 120; done")},
		{name: "bursty", command: on(1, "sh", "-c", "while :; do "+some("20000")+"; sleep 0.5; done")},
		{name: "slow phases", flags: []string{"--progress-regex", "^[0-9]+$"}, command: on(1, "sh", "-c",
			"n=0; while :; do for k in $(seq 400); do n=$((n+1)); echo $n; sleep 0.1; done; for k in $(seq 20); do n=$((n+1)); echo $n; sleep 2; done; done")},
		{name: "waits for a disk", command: on(1, "sh", "-c", "while :; do dd if=/dev/zero of=/srv/f bs=1M count=8 conv=fsync 2>/dev/null; sleep 1; done")},
		{name: "waits for a peer", flags: []string{"--tasks", "2", "--cpus", "0.2"}, command: []string{"python3", program("pair.py"), "1000000", "500"}},
		{name: "MPI", flags: []string{"--tasks", "2", "--cpus", "0.2"}, command: []string{openMPI, program("stencil" + suffix[openMPI]), "64", forever, "10", "50", stopFile}},
		{name: "checkpointed", flags: []string{"--checkpoint-every", "20s", "--keep", "2", "--progress-regex", "^[0-9]+$"},
			command: on(1, "sh", "-c", "n=0; while :; do n=$((n+1)); echo $n; sleep 0.05; done")},
	}
}

// TestHealthyJobsAreLeftAlone: whatever jobs do that have what they want, nobody
// says that they starve; not with the shortest usual period, not with the default.
func TestHealthyJobsAreLeftAlone(t *testing.T) {
	end := time.Now().Add(lasts(t, 30*time.Minute))
	p := onOwn(t, built.bin, nil, "--cloud", "east=2", "--cpus", "32", "--mem", "12G", "--on-starvation", "notify")
	brief := []string{"--starvation-period", watchedEvery.String()}
	all := []*scenario{{name: "computes", flags: brief, command: on(0, "sh", "-c", burn)}}
	for _, s := range well() {
		again := *s
		again.flags = slices.Concat(brief, s.flags)
		again.name += ", every " + watchedEvery.String()
		all = append(all, s, &again)
	}
	for _, s := range all {
		s.job = p.submit(slices.Concat(s.flags, []string{"--"}, s.command)...)
	}
	for _, s := range all {
		p.waitFor(s.job, api.PhaseRunning)
	}
	(&watched{p, all[0].job}).favour()
	comings := 0
	for ; time.Now().Before(end); comings++ {
		s := scenario{name: "comes and goes"}
		s.job = p.submit(slices.Concat(brief, []string{"--"}, on(1, "sh", "-c", "sleep 1; for k in $(seq 60); do seq 5000 >/dev/null; sleep 0.2; done; sleep 5"))...)
		p.completes(s.job)
		s.mustBeWell(p)
	}
	for _, s := range all {
		s.mustBeWell(p)
		if phase := p.inspect(s.job).Phase; phase != api.PhaseRunning {
			t.Errorf("%s: is %s, want it to run on", s.name, phase)
		}
	}
	t.Logf("%d jobs at a time, %d that came and went", len(all)+1, comings)
}
