package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"dormouse/api"
)

// The launchers that run MPI programs undisturbed.
const (
	openMPI = "mpirun.openmpi"
	mpich   = "mpiexec.hydra"
)

// stopFile is where the programs look, in task 0, for the wish that they end.
const stopFile = "/var/tmp/stop"

// untilAsked has a program look for stopFile.
var untilAsked = []string{"--env", "STOP_FILE=" + stopFile}

// forever is more steps than a program takes before it is asked to end.
const forever = "100000000"

// parallel is a program that runs as several tasks until it is asked to end. Its
// output, per task, says how many steps that were and must be that of an
// undisturbed run of as many.
type parallel struct {
	name    string
	tasks   int
	command []string
	// mpi is openMPI or mpich for an MPI program.
	mpi string
	// steps is where the number of steps is in the command.
	steps int
}

// built for which MPI: the suffix of the programs.
var suffix = map[string]string{openMPI: ".openmpi", mpich: ".mpich"}

func stencil(launcher, mpi string) parallel {
	return parallel{name: "stencil, " + launcher, tasks: 4, mpi: mpi, steps: 3,
		command: []string{launcher, program("stencil" + suffix[mpi]), "128", forever, "10", "5", stopFile}}
}

func ring(launcher, mpi string) parallel {
	return parallel{name: "ring, " + launcher, tasks: 4, mpi: mpi, steps: 2,
		command: []string{launcher, program("ring" + suffix[mpi]), forever, "5", "10", stopFile}}
}

func tasksOf(n int, name, file string) parallel {
	return parallel{name: name, tasks: n, steps: 2, command: []string{"python3", program(file), forever, "20"}}
}

// parallelPrograms are what the promises for parallel jobs are checked with.
func parallelPrograms() []parallel {
	return []parallel{
		stencil(openMPI, openMPI),
		stencil(mpich, mpich),
		ring(openMPI, openMPI),
		ring(mpich, mpich),
		plainMPIRun(),
		tasksOf(2, "redis and its load", "redis_pair.py"),
		tasksOf(4, "multiprocessing over sockets", "workers.py"),
		tasksOf(4, "clients and a server", "pair.py"),
	}
}

// plainMPIRun is the stencil under the name mpirun, whichever MPI that stands for.
func plainMPIRun() parallel {
	target, _ := filepath.EvalSymlinks("/usr/bin/mpirun")
	if strings.Contains(target, "openmpi") || strings.Contains(target, "orterun") {
		return stencil("mpirun", openMPI)
	}
	return stencil("mpirun", mpich)
}

// submitParallel submits the program with one processor per task.
func (p *platform) submitParallel(prog parallel, flags ...string) string {
	p.t.Helper()
	args := slices.Concat([]string{"--tasks", strconv.Itoa(prog.tasks), "--cpus", "1", "--mem", "256M"}, untilAsked, flags)
	return p.submit(append(append(args, "--"), prog.command...)...)
}

// ends has the program end, waits for the end, and compares all output with an
// undisturbed run's.
func (p *platform) ends(job string, prog parallel) {
	p.t.Helper()
	p.stop(job)
	if prog.mpi != "" {
		p.until(job, "its last line is there", func() bool { return endLine.MatchString(p.outputOf(job, 0)) })
	}
	if prog.mpi != mpich || p.try("wait", job, "--for", string(api.PhaseCompleted), "--timeout", "20s").status == 0 {
		p.waitFor(job, api.PhaseCompleted)
	} else {
		p.t.Log("the program has printed all, but not ended: MPICH 4.0 can hang in MPI_Finalize, also without Dormouse")
	}
	outputs := make([]string, prog.tasks)
	for i := range outputs {
		outputs[i] = p.outputOf(job, i)
	}
	for i, want := range prog.undisturbed(p.t, outputs) {
		if outputs[i] != want {
			p.t.Errorf("task %d:", i)
			sameOutput(p.t, outputs[i], want)
		}
	}
}

// stop asks the program of a job to end, as soon as the agent of its first task
// is there, which may have been killed.
func (p *platform) stop(job string) {
	p.t.Helper()
	p.until(job, "it can be asked to end", func() bool {
		return p.try("exec", job, "--task", "0", "--", "touch", stopFile).status == 0 || p.inspect(job).Phase == api.PhaseCompleted
	})
}

// outputOf returns what one task has written to standard output.
func (p *platform) outputOf(job string, task int) string {
	p.t.Helper()
	return p.try("logs", job, "--task", strconv.Itoa(task)).stdout
}

// localhost is taken by one undisturbed run at a time: they use fixed ports.
var localhost sync.Mutex

// undisturbed runs the program outside of Dormouse for as many steps as it took
// to write what each task has written, and returns each task's output.
func (prog parallel) undisturbed(t *testing.T, got []string) []string {
	t.Helper()
	localhost.Lock()
	defer localhost.Unlock()
	outputs := make([]string, prog.tasks)
	if prog.mpi != "" {
		outputs[0] = prog.undisturbedMPI(t, got[0])
		return outputs
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	hosts := strings.Join(slices.Repeat([]string{"127.0.0.1"}, prog.tasks), ",")
	var all sync.WaitGroup
	for i := range outputs {
		command := slices.Clone(prog.command)
		command[prog.steps] = strconv.Itoa(stepsOf(got[i]))
		command[len(command)-1] = "0" // no pace
		cmd := exec.CommandContext(ctx, command[0], command[1:]...)
		cmd.Env = append(os.Environ(), "DORMOUSE_TASK="+strconv.Itoa(i), "DORMOUSE_TASKS="+strconv.Itoa(prog.tasks), "DORMOUSE_HOSTS="+hosts)
		all.Go(func() {
			ended := runCommand(t, cmd, nil)
			if ended.status != 0 {
				t.Errorf("%v as task %d, undisturbed: exit status %d: %s", command, i, ended.status, ended.stderr)
			}
			outputs[i] = ended.stdout
		})
	}
	all.Wait()
	return outputs
}

var (
	lineNumber = regexp.MustCompile(`(?m)^(?:step|message|item) (\d+) `)
	endLine    = regexp.MustCompile(`(?m)^end.*\n`)
)

// stepsOf returns how many steps a program has taken, by its output.
func stepsOf(output string) int {
	lines := lineNumber.FindAllStringSubmatch(output, -1)
	if len(lines) == 0 {
		return 0
	}
	n, _ := strconv.Atoi(lines[len(lines)-1][1]) // it consists of digits
	return n
}

func (prog parallel) undisturbedMPI(t *testing.T, got string) string {
	t.Helper()
	arguments := slices.Clone(prog.command[1:])
	arguments[prog.steps-1] = strconv.Itoa(stepsOf(got))
	arguments[len(arguments)-2] = "0" // no pace
	launcher := []string{mpich, "-n", strconv.Itoa(prog.tasks)}
	if prog.mpi == openMPI {
		launcher = []string{openMPI, "--allow-run-as-root", "--oversubscribe", "-n", strconv.Itoa(prog.tasks)}
	}
	return undisturbed(t, append(launcher, arguments...)...)
}

// placement returns the node of each task.
func (p *platform) placement(job string) []string {
	p.t.Helper()
	var nodes []string
	for _, task := range p.inspect(job).TaskStatus {
		nodes = append(nodes, task.Node)
	}
	return nodes
}

// nodesOf returns the nodes a job is on, each once.
func (p *platform) nodesOf(job string) []string {
	p.t.Helper()
	nodes := p.placement(job)
	slices.Sort(nodes)
	return slices.Compact(nodes)
}

// TestParallelProgramsGoOnAsIfNothingHappened checkpoints each program three
// times, restores it from an old checkpoint in the other cloud, then suspends and
// resumes what was restored.
func TestParallelProgramsGoOnAsIfNothingHappened(t *testing.T) {
	if unavailable != "" {
		t.Skip(unavailable)
	}
	for _, prog := range parallelPrograms() {
		t.Run(prog.name, func(t *testing.T) {
			t.Parallel()
			p := onShared(t)
			job := p.submitParallel(prog)
			var checkpoints []string
			for i := 1; i <= 3; i++ {
				p.waitLines(job, 5*i)
				checkpoints = append(checkpoints, p.checkpoint(job).ID)
			}
			p.moves(job)
			p.run("restart", job, "--from", checkpoints[1], "--cloud", p.otherCloud(job))
			p.moves(job)
			p.run("suspend", job)
			p.run("resume", job)
			p.moves(job)
			p.ends(job, prog)
		})
	}
}

// rounds is how often the longest test is run: 3 unless DORMOUSE_E2E_ROUNDS
// says otherwise (`make nightly`).
func rounds(t *testing.T) int {
	t.Helper()
	text := os.Getenv("DORMOUSE_E2E_ROUNDS")
	if text == "" {
		return 3
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("DORMOUSE_E2E_ROUNDS is %q, expected a number of rounds", text)
	}
	return n
}

// TestTwentyCheckpointsAndTheLossOfEveryNode: an MPI program that spans four
// nodes of two clouds is checkpointed twenty times under full traffic; after one
// of the checkpoints all its nodes lose their power at once, and it goes on from
// there on four others.
func TestTwentyCheckpointsAndTheLossOfEveryNode(t *testing.T) {
	if unavailable != "" {
		t.Skip(unavailable)
	}
	programs := []parallel{
		ring(openMPI, openMPI), stencil(mpich, mpich), ring(mpich, mpich), stencil(openMPI, openMPI),
	}
	for round := range rounds(t) {
		prog := programs[round%len(programs)]
		t.Run(fmt.Sprintf("%d %s", round+1, prog.name), func(t *testing.T) {
			t.Parallel()
			p := onOwn(t, built.bin, nil, "--cloud", "east=4", "--cloud", "west=4", "--cpus", "1", "--mem", "1G")
			after := 1 + (round*7+os.Getpid())%20
			t.Logf("the nodes are lost after checkpoint %d", after)
			job := p.submitParallel(prog)
			for i := 1; i <= 20; i++ {
				p.moves(job)
				p.checkpoint(job)
				if i == after {
					p.losesEveryNode(job)
				}
			}
			p.moves(job)
			p.ends(job, prog)
		})
	}
}

// losesEveryNode cuts the power of all nodes of a job and restores it elsewhere.
func (p *platform) losesEveryNode(job string) {
	p.t.Helper()
	p.moves(job) // what is done after the checkpoint is done again
	lost := p.nodesOf(job)
	if len(lost) != 4 {
		p.t.Errorf("the job is on %v, expected four nodes", lost)
	}
	var all sync.WaitGroup
	for _, node := range lost {
		all.Go(func() {
			if got := p.try("node", "kill", node); got.status != 0 {
				p.t.Errorf("node kill %s: %s", node, got.stderr)
			}
		})
	}
	all.Wait()
	if detail := p.waitFor(job, api.PhaseFailed); !strings.Contains(detail.Reason, "dormouse restart") {
		p.t.Errorf("the reason %q does not say what to do", detail.Reason)
	}
	p.run("restart", job)
	for _, node := range p.nodesOf(job) {
		if slices.Contains(lost, node) {
			p.t.Errorf("the job was restored on %s, which has no power", node)
		}
	}
	p.moves(job)
}

// TestPlacementMayChange: four tasks on four nodes come back on two, on one, and
// on four again.
func TestPlacementMayChange(t *testing.T) {
	if unavailable != "" {
		t.Skip(unavailable)
	}
	for _, prog := range []parallel{stencil(openMPI, openMPI), ring(mpich, mpich), tasksOf(4, "clients and a server", "pair.py")} {
		t.Run(prog.name, func(t *testing.T) {
			t.Parallel()
			p := onOwn(t, built.bin, nil, "--cloud", "four=4", "--cloud", "two=2", "--cloud", "one=1", "--cpus", "4", "--mem", "2G")
			job := p.submitParallel(prog, "--cloud", "four")
			p.moves(job)
			for _, to := range []struct {
				cloud string
				nodes int
			}{{"two", 2}, {"one", 1}, {"four", 4}} {
				p.run("suspend", job)
				p.run("resume", job, "--cloud", to.cloud)
				if on := p.nodesOf(job); len(on) != to.nodes {
					t.Errorf("in cloud %s the job is on %v, expected %d nodes", to.cloud, on, to.nodes)
				}
				p.moves(job)
				p.checkpoint(job)
			}
			p.ends(job, prog)
		})
	}
}

// TestParallelCloneBesideTheOriginal: the same addresses twice, on the same nodes.
func TestParallelCloneBesideTheOriginal(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	prog := stencil(openMPI, openMPI)
	job := p.submitParallel(prog)
	p.moves(job)
	c := p.checkpoint(job)
	clone := p.run("clone", c.ID)
	t.Cleanup(func() { p.forget(clone) })
	p.moves(clone)
	p.moves(job)
	if ours, theirs := p.addresses(job), p.addresses(clone); !slices.Equal(ours, theirs) {
		t.Errorf("the clone has the addresses %v, the original %v: they are the program's own", theirs, ours)
	}
	p.ends(clone, prog)
	p.moves(job)
	p.checkpoint(job)
	p.ends(job, prog)
}

func (p *platform) addresses(job string) []string {
	p.t.Helper()
	var all []string
	for _, task := range p.inspect(job).TaskStatus {
		all = append(all, task.VirtualIP)
	}
	return all
}

// everyTask counts in each task, for ever.
var everyTask = []string{"--tasks", "3", "--mem", "64M", "--", "sh", "-c", "i=0; while :; do i=$((i+1)); echo $DORMOUSE_TASK of $DORMOUSE_TASKS: $i; sleep 0.05; done"}

func TestEachTaskIsItsOwn(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit(everyTask...)
	p.waitFor(job, api.PhaseRunning)
	p.waitLines(job, 9)
	look := func() {
		t.Helper()
		merged := p.output(job)
		for i := range 3 {
			index := strconv.Itoa(i)
			if line := "task " + index + " | " + index + " of 3: 1\n"; !strings.Contains(merged, line) {
				t.Errorf("the merged output has no line %q:\n%s", line, merged)
			}
			if out := p.outputOf(job, i); !strings.HasPrefix(out, index+" of 3: 1\n"+index+" of 3: 2\n") {
				t.Errorf("the output of task %d begins with %q", i, out[:min(len(out), 40)])
			}
			if got := p.run("exec", job, "--task", index, "--", "sh", "-c", "hostname; echo $DORMOUSE_HOSTS"); got != "task-"+index+"\ntask-0,task-1,task-2" {
				t.Errorf("task %d is called %q", i, got)
			}
			peer := (i + 1) % 3
			want := p.inspect(job).TaskStatus[peer].VirtualIP
			if got := p.run("exec", job, "--task", index, "--", "getent", "hosts", fmt.Sprintf("task-%d", peer)); !strings.HasPrefix(got, want+" ") {
				t.Errorf("task %d sees task-%d as %q, expected %s", i, peer, got, want)
			}
		}
	}
	look()
	before := p.addresses(job)
	p.checkpoint(job)
	p.run("restart", job, "--cloud", p.otherCloud(job))
	p.moves(job)
	look()
	if now := p.addresses(job); !slices.Equal(now, before) {
		t.Errorf("the addresses were %v and are %v", before, now)
	}
	if got := p.try("exec", job, "--task", "3", "--", "true"); got.status == 0 {
		t.Error("exec in task 3 of three succeeded")
	}
	p.run("kill", job)
	p.waitFor(job, api.PhaseCancelled)
}

// TestOneFailingTaskEndsTheJob, with its exit code.
func TestOneFailingTaskEndsTheJob(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit("--tasks", "3", "--mem", "64M", "--", "sh", "-c", "[ $DORMOUSE_TASK = 1 ] && exit 9; sleep 600")
	if detail := p.waitFor(job, api.PhaseFailed); detail.ExitCode == nil || *detail.ExitCode != 9 {
		t.Errorf("the job failed with %+v, expected exit code 9 of task 1", detail.Job)
	}
}

// TestAllTasksOrNone: a gang that does not fit waits as a whole, and starts as
// a whole when there is room.
func TestAllTasksOrNone(t *testing.T) {
	t.Parallel()
	p := onOwn(t, built.bin, nil, "--cloud", "east=2", "--cpus", "2", "--mem", "1G")
	first := p.submit("--mem", "64M", "--", "sleep", "600")
	p.waitFor(first, api.PhaseRunning)
	gang := p.submit("--tasks", "4", "--mem", "64M", "--", "sh", "-c", "echo here; sleep 600")
	p.moves0(gang, api.PhasePending)
	p.run("kill", first)
	p.waitFor(gang, api.PhaseRunning)
	p.waitLines(gang, 4)
}

// moves0 checks that a job is in a phase and has no task on any node.
func (p *platform) moves0(job string, phase api.Phase) {
	p.t.Helper()
	detail := p.waitFor(job, phase)
	for _, task := range detail.TaskStatus {
		if task.Node != "" || task.Pid != 0 {
			p.t.Errorf("job %s is %s and has task %d on %q with pid %d", job, phase, task.Index, task.Node, task.Pid)
		}
	}
}

// TestAProgramAsksForItsCheckpoint from inside, from any task, and learns
// whether it goes on in the original or in a restored run.
func TestAProgramAsksForItsCheckpoint(t *testing.T) {
	if unavailable != "" {
		t.Skip(unavailable)
	}
	for asker, tasks := range []int{1, 3} {
		t.Run(fmt.Sprintf("task %d of %d", asker, tasks), func(t *testing.T) {
			t.Parallel()
			p := onShared(t)
			index := strconv.Itoa(asker)
			job := p.submit("--tasks", strconv.Itoa(tasks), "--mem", "64M", "--", "sh", program("asks.sh"), index, "200", "0.05")
			p.until(job, "the program has its answer", func() bool { return strings.Contains(p.outputOf(job, asker), "status") })
			all := decode[[]api.Checkpoint](p, "checkpoints", job)
			if len(all) != 1 || all[0].Trigger != api.TriggerApplication || all[0].Label != "middle" || all[0].State != api.CheckpointDurable {
				t.Fatalf("the checkpoints are %+v, expected a durable one of trigger application and label middle", all)
			}
			if out := p.outputOf(job, asker); !strings.Contains(out, "\n10\ncheckpointed "+all[0].ID+"\nstatus 0\n") {
				t.Errorf("the program was answered %q", out)
			}
			p.run("restart", job, "--from", all[0].ID)
			p.waitFor(job, api.PhaseCompleted)
			out := p.outputOf(job, asker)
			if !strings.Contains(out, "\n10\nrestored "+all[0].ID+"\nstatus 0\n11\n") || !strings.HasSuffix(out, "\n200\n") {
				t.Errorf("in the restored run the program was answered %q", out)
			}
			if n := len(decode[[]api.Checkpoint](p, "checkpoints", job)); n != 1 {
				t.Errorf("there are %d checkpoints, one was asked for", n)
			}
		})
	}
}

// TestTheControlFile: what cannot start a program can write a line.
func TestTheControlFile(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit("--mem", "64M", "--", "sh", "-c", "echo 'checkpoint from a file' > /.dormouse/control; i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done")
	p.until(job, "there is a checkpoint", func() bool {
		all := decode[[]api.Checkpoint](p, "checkpoints", job)
		return len(all) == 1 && all[0].State == api.CheckpointDurable && all[0].Label == "from a file"
	})
	id := decode[[]api.Checkpoint](p, "checkpoints", job)[0].ID
	p.until(job, "the answer is in the file", func() bool {
		return strings.Contains(p.run("exec", job, "--", "cat", "/.dormouse/control.log"), id)
	})
}

// TestNothingRemainsOfARemovedParallelJob looks at the nodes' own network, too.
func TestNothingRemainsOfARemovedParallelJob(t *testing.T) {
	t.Parallel()
	p := onOwn(t, built.bin, nil, "--cloud", "east=2", "--cpus", "4", "--mem", "2G")
	before := p.networks()
	prog := stencil(openMPI, openMPI)
	job := p.submitParallel(prog, "--publish", "18181")
	p.moves(job)
	p.checkpoint(job)
	p.run("restart", job)
	p.moves(job)
	p.run("suspend", job)
	p.until(job, "a job that sleeps has no network", func() bool { return p.networks() == before })
	p.run("resume", job)
	p.moves(job)
	p.ends(job, prog)
	if now := p.networks(); now != before {
		t.Errorf("a job that has ended left behind:\n%s\nbefore it there was:\n%s", now, before)
	}
	p.run("rm", job)
	p.leavesNothing(job, p.c.State())
}

// networks lists the devices and firewall tables of every node, and the
// processes that hold a network.
func (p *platform) networks() string {
	p.t.Helper()
	var all bytes.Buffer
	for _, node := range decode[[]api.Node](p, "nodes") {
		out, err := exec.Command("nsenter", "-t", strconv.Itoa(node.AgentPid), "-n", "ip", "-br", "link").CombinedOutput()
		if err != nil {
			p.t.Fatalf("devices of %s: %v: %s", node.Name, err, out)
		}
		for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
			fmt.Fprintln(&all, node.Name, strings.Fields(line)[0])
		}
	}
	holders, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range holders {
		text, err := os.ReadFile(path)
		cgroup, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cgroup"))
		if err == nil && bytes.Contains(cgroup, []byte("/networks")) && p.ours(string(cgroup)) {
			fmt.Fprintf(&all, "%q\n", text)
		}
	}
	return all.String()
}

// ours tells whether a path of cgroups belongs to this `up`.
func (p *platform) ours(cgroups string) bool {
	id, err := os.ReadFile(filepath.Join(p.c.State(), "id"))
	return err == nil && len(id) >= 8 && strings.Contains(cgroups, strings.ToLower(string(id[:8])))
}
