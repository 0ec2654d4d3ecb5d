package e2e

import (
	"strconv"
	"testing"
)

const (
	steps = 800 // of each program, so that it outlives its checkpoints
	pace  = 20  // ms between two steps, when it runs as a job
)

// programs are real programs of many kinds. Each writes one line per step; the
// lines depend on the number of steps only.
var programs = []struct {
	name    string
	command func(pace int) []string
	flags   []string
}{
	{name: "python with children and pipes", command: script("python3", "tree.py")},
	{name: "pseudo-terminal", command: script("python3", "terminal.py")},
	{name: "deleted files and locks", command: script("python3", "files.py")},
	{name: "shell pipeline", command: script("sh", "pipeline.sh")},
	{name: "node.js", command: script("node", "server.js"), flags: []string{"--mem", "1G"}},
	{name: "go", command: func(pace int) []string {
		return []string{program("web"), strconv.Itoa(steps), strconv.Itoa(pace)}
	}},
	{name: "redis under load", command: script("python3", "load.py")},
	{name: "threads with 1 GiB", command: func(pace int) []string {
		return []string{program("memory"), "1024", "4", strconv.Itoa(steps), strconv.Itoa(pace)}
	}, flags: []string{"--mem", "1536M"}},
}

func script(interpreter, file string) func(pace int) []string {
	return func(pace int) []string {
		return []string{interpreter, program(file), strconv.Itoa(steps), strconv.Itoa(pace)}
	}
}

// TestProgramsGoOnAsIfNothingHappened checkpoints each program five times and
// restores it three times: from an old checkpoint in the other cloud, from a
// checkpoint of the restored job, and from one of that.
func TestProgramsGoOnAsIfNothingHappened(t *testing.T) {
	for _, test := range programs {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := onShared(t)
			want := undisturbed(t, test.command(0)...)
			job := p.submit(append(append(test.flags, "--"), test.command(pace)...)...)
			var checkpoints []string
			for i := 1; i <= 5; i++ {
				p.waitLines(job, 10*i)
				checkpoints = append(checkpoints, p.checkpoint(job).ID)
				prefixOutput(t, p.output(job), want)
			}
			cloud := p.otherCloud(job)
			p.run("restart", job, "--from", checkpoints[2], "--cloud", cloud)
			if got := p.inspect(job).Cloud; got != cloud {
				t.Errorf("the job was restored in %s, expected %s", got, cloud)
			}
			p.moves(job)
			prefixOutput(t, p.output(job), want)

			second := p.checkpoint(job)
			p.run("restart", job, "--from", second.ID, "--cloud", p.otherCloud(job))
			p.moves(job)
			prefixOutput(t, p.output(job), want)

			p.run("suspend", job)
			p.run("resume", job)
			sameOutput(t, p.completes(job), want)
			if got := p.inspect(job).Restarts; got != 3 {
				t.Errorf("the job was restored %d times, expected 3", got)
			}
		})
	}
}
