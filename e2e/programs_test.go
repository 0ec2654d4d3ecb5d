package e2e

import (
	"slices"
	"strconv"
	"testing"
)

// pace is the time between two steps of a program that runs as a job, in ms.
const pace = "20"

// single is the command of a program that runs as one task, for a number of steps
// or until it is asked to end.
type single func(steps, pace string) []string

// programs are real programs of many kinds. Each writes one line per step; the
// lines depend on the number of steps only.
var programs = []struct {
	name    string
	command single
	flags   []string
}{
	{name: "python with children and pipes", command: script("python3", "tree.py")},
	{name: "pseudo-terminal", command: script("python3", "terminal.py")},
	{name: "deleted files and locks", command: script("python3", "files.py")},
	{name: "shell pipeline", command: script("sh", "pipeline.sh")},
	{name: "node.js", command: script("node", "server.js"), flags: []string{"--mem", "1G"}},
	{name: "go", command: func(steps, pace string) []string {
		return []string{program("web"), steps, pace}
	}},
	{name: "redis under load", command: script("python3", "load.py")},
	{name: "threads with 1 GiB", command: func(steps, pace string) []string {
		return []string{program("memory"), "1024", "4", steps, pace}
	}, flags: []string{"--mem", "1536M"}},
}

func script(interpreter, file string) single {
	return func(steps, pace string) []string {
		return []string{interpreter, program(file), steps, pace}
	}
}

// endsAsSeen has the program end, waits for the end, and compares its output with
// an undisturbed run's of as many steps. What was seen of it before may be more, when
// the job was restored since; it is compared with a run that is longer.
func (p *platform) endsAsSeen(job string, command single, seen ...string) {
	p.t.Helper()
	p.stop(job)
	got := p.completes(job)
	longest := 0
	for _, output := range append(seen, got) {
		longest = max(longest, stepsOf(output))
	}
	whole := undisturbed(p.t, command(strconv.Itoa(longest+1), "0")...)
	for _, output := range seen {
		prefixOutput(p.t, output, whole)
	}
	sameOutput(p.t, got, undisturbed(p.t, command(strconv.Itoa(stepsOf(got)), "0")...))
}

// TestProgramsGoOnAsIfNothingHappened checkpoints each program five times and
// restores it three times: from an old checkpoint in the other cloud, from a
// checkpoint of the restored job, and from one of that.
func TestProgramsGoOnAsIfNothingHappened(t *testing.T) {
	for _, test := range programs {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := onShared(t)
			job := p.submit(slices.Concat(test.flags, untilAsked, []string{"--"}, test.command(forever, pace))...)
			var checkpoints, seen []string
			for i := 1; i <= 5; i++ {
				p.waitLines(job, 10*i)
				checkpoints = append(checkpoints, p.checkpoint(job).ID)
				seen = append(seen, p.output(job))
			}
			cloud := p.otherCloud(job)
			p.run("restart", job, "--from", checkpoints[2], "--cloud", cloud)
			if got := p.inspect(job).Cloud; got != cloud {
				t.Errorf("the job was restored in %s, expected %s", got, cloud)
			}
			p.moves(job)
			seen = append(seen, p.output(job))

			second := p.checkpoint(job)
			p.run("restart", job, "--from", second.ID, "--cloud", p.otherCloud(job))
			p.moves(job)
			seen = append(seen, p.output(job))

			p.run("suspend", job)
			p.run("resume", job)
			p.endsAsSeen(job, test.command, seen...)
			if got := p.inspect(job).Restarts; got != 3 {
				t.Errorf("the job was restored %d times, expected 3", got)
			}
		})
	}
}
