package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dormouse/api"
)

// underlay returns the address by which a node is reached.
func (p *platform) underlay(node string) string {
	p.t.Helper()
	for _, n := range decode[[]api.Node](p, "nodes") {
		if n.Name == node {
			if n.Underlay == "" {
				p.t.Fatalf("node %s has no address on the underlay", node)
			}
			return n.Underlay
		}
	}
	p.t.Fatalf("there is no node %s", node)
	return ""
}

// gateway returns the address by which jobs reach this machine.
func (p *platform) gateway() string {
	p.t.Helper()
	var plan struct{ Bridge string }
	raw, err := os.ReadFile(filepath.Join(p.c.State(), "fabric.json"))
	if err == nil {
		err = json.Unmarshal(raw, &plan)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	bridge, err := net.InterfaceByName(plan.Bridge)
	if err != nil {
		p.t.Fatal(err)
	}
	addresses, err := bridge.Addrs()
	if err != nil {
		p.t.Fatal(err)
	}
	for _, address := range addresses {
		if network, ok := address.(*net.IPNet); ok && network.IP.To4() != nil {
			return network.IP.String()
		}
	}
	p.t.Fatalf("the bridge %s has no address", plan.Bridge)
	return ""
}

// echo serves connections from jobs until the test ends and tells who calls.
func (p *platform) echo() (address string, callers <-chan string) {
	p.t.Helper()
	listener, err := net.Listen("tcp", net.JoinHostPort(p.gateway(), "0"))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { listener.Close() })
	called := make(chan string, 16)
	go func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			called <- connection.RemoteAddr().String()
			go func() {
				defer connection.Close()
				io.Copy(connection, connection)
			}()
		}
	}()
	return listener.Addr().String(), called
}

// callsOutside submits a job of two tasks of which each keeps a connection to the
// outside.
func callsOutside(p *platform, policy string) (job, address string) {
	p.t.Helper()
	address, callers := p.echo()
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		p.t.Fatal(err)
	}
	args := []string{"--tasks", "2", "--mem", "64M"}
	if policy != "" {
		args = append(args, "--connections", policy)
	}
	job = p.submit(append(args, "--", "python3", program("outside.py"), host, port)...)
	p.until(job, "both tasks talk to the outside", func() bool {
		return strings.Contains(p.outputOf(job, 0), " echoed") && strings.Contains(p.outputOf(job, 1), " echoed")
	})
	nodes := []string{}
	for range 2 {
		caller, _, _ := net.SplitHostPort(<-callers)
		nodes = append(nodes, caller)
	}
	for _, node := range p.placement(job) {
		if !strings.Contains(strings.Join(nodes, " "), p.underlay(node)) {
			p.t.Errorf("the outside was called from %v, expected the address %s of node %s", nodes, p.underlay(node), node)
		}
	}
	return job, address
}

// TestConnectionsThatLeaveTheJobAreRefused, by name, before anything is frozen.
func TestConnectionsThatLeaveTheJobAreRefused(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job, address := callsOutside(p, "")
	for _, verb := range []string{"checkpoint", "suspend"} {
		got := p.try(verb, job)
		if got.status != refused {
			t.Fatalf("%s: exit status %d, expected %d: %s%s", verb, got.status, refused, got.stdout, got.stderr)
		}
		for _, word := range []string{"python3", address, p.addresses(job)[0] + ":"} {
			if !strings.Contains(got.stderr, word) {
				t.Errorf("%s was refused by %q, expected a sentence with %q", verb, got.stderr, word)
			}
		}
	}
	p.moves(job)
	if out := p.output(job); strings.Contains(out, "alone") {
		t.Errorf("a refused checkpoint has ended a connection:\n%s", tail(out, 5))
	}
	for _, c := range decode[[]api.Checkpoint](p, "checkpoints", job) {
		if c.State != api.CheckpointFailed {
			t.Errorf("there is a checkpoint %s of state %s", c.ID, c.State)
		}
	}
}

// TestConnectionsThatLeaveTheJobAreClosed in the restored job, and only there.
func TestConnectionsThatLeaveTheJobAreClosed(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job, _ := callsOutside(p, api.ConnectionsClose)
	p.checkpoint(job)
	p.moves(job)
	p.run("restart", job, "--cloud", p.otherCloud(job))
	p.until(job, "both tasks have seen the end of their connection", func() bool {
		return strings.Contains(p.outputOf(job, 0), " alone") && strings.Contains(p.outputOf(job, 1), " alone")
	})
	p.checkpoint(job) // nothing leaves it any more
	p.moves(job)
}

// TestConnectionsThatLeaveTheJobAreKept through any number of checkpoints.
func TestConnectionsThatLeaveTheJobAreKept(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job, _ := callsOutside(p, api.ConnectionsKeep)
	for range 3 {
		p.checkpoint(job)
		p.moves(job)
	}
	if out := p.output(job); strings.Contains(out, "alone") {
		t.Errorf("a checkpoint has ended a connection that is to be kept:\n%s", tail(out, 5))
	}
	p.run("restart", job, "--cloud", p.otherCloud(job)) // the outside may not know it there: it must live, no more
	p.waitFor(job, api.PhaseRunning)
}

// serves answers on port 80 of a task with the task's name.
const serves = `import os, socket
listener = socket.create_server(("", 80))
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    connection.sendall(b"task %s\n" % os.environ["DORMOUSE_TASK"].encode())
    connection.close()
`

// ask calls a port and returns the line that it answers.
func ask(address string) (string, error) {
	connection, err := net.DialTimeout("tcp", address, 2*time.Second)
	if err != nil {
		return "", err
	}
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(5 * time.Second))
	line, err := bufio.NewReader(connection).ReadString('\n')
	return strings.TrimSpace(line), err
}

// TestPublishedPortsAreReachedOnTheNodeOfTheTask, wherever that is, and no other port is.
func TestPublishedPortsAreReachedOnTheNodeOfTheTask(t *testing.T) {
	t.Parallel()
	p := onShared(t)
	job := p.submit("--tasks", "2", "--mem", "64M", "--publish", "0:28080:80", "--publish", "1:28081:80", "--", "python3", "-c", serves)
	p.waitLines(job, 2)
	reached := func() {
		t.Helper()
		for task, node := range p.placement(job) {
			want := fmt.Sprint("task ", task)
			if got, err := ask(fmt.Sprintf("%s:%d", p.underlay(node), 28080+task)); err != nil || got != want {
				t.Errorf("the published port of task %d on %s answers %q, %v; expected %q", task, node, got, err, want)
			}
			if got, err := ask(p.underlay(node) + ":80"); err == nil {
				t.Errorf("port 80 of %s, which is not published, answers %q", node, got)
			}
		}
	}
	reached()
	p.checkpoint(job)
	reached()
	before := p.placement(job)
	p.run("restart", job, "--cloud", p.otherCloud(job))
	reached()
	after := p.placement(job)
	for task, node := range before {
		if after[task] == node {
			continue // the job was in both clouds
		}
		if got, err := ask(fmt.Sprintf("%s:%d", p.underlay(node), 28080+task)); err == nil {
			t.Errorf("node %s, which task %d has left, answers %q", node, task, got)
		}
	}
	p.run("kill", job)
	for _, node := range p.placement(job) {
		if node == "" {
			continue
		}
		if got, err := ask(p.underlay(node) + ":28080"); err == nil {
			t.Errorf("the port of a job that has ended answers %q", got)
		}
	}
}

// TestTwoJobsCannotReachEachOther, nor the nodes themselves, though their tasks
// may share a node.
func TestTwoJobsCannotReachEachOther(t *testing.T) {
	t.Parallel()
	p := onOwn(t, built.bin, nil, "--cloud", "east=2", "--cpus", "4", "--mem", "2G")
	server := p.submit("--tasks", "2", "--mem", "64M", "--publish", "1:28090:80", "--", "python3", "-c", serves)
	p.waitLines(server, 2)
	other := p.submit("--tasks", "2", "--mem", "64M", "--", "sleep", "600")
	p.waitFor(other, api.PhaseRunning)
	reach := func(job string, task int, address string) bool {
		t.Helper()
		host, port, _ := net.SplitHostPort(address)
		got := p.try("exec", job, "--task", fmt.Sprint(task), "--", "python3", "-c",
			"import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).makefile().readline() or sys.exit('silent')", host, port)
		return got.status == 0
	}
	addresses := p.addresses(server)
	if !reach(server, 0, addresses[1]+":80") || !reach(server, 1, "task-0:80") {
		t.Error("the tasks of one job do not reach each other")
	}
	for task := range 2 {
		for _, address := range addresses {
			if reach(other, task, address+":80") {
				t.Errorf("task %d of another job reaches %s", task, address)
			}
			if reach(other, task, address+":7999") {
				t.Errorf("task %d of another job reaches the remote start of %s", task, address)
			}
		}
	}
	own := p.addresses(other)
	for task := range 2 {
		for _, address := range own {
			if reach(server, task, address+":7999") {
				t.Errorf("task %d of the server's job reaches %s of another", task, address)
			}
		}
	}
}

// TestEveryTunnel: the same program over each kind of tunnel.
func TestEveryTunnel(t *testing.T) {
	if unavailable != "" {
		t.Skip(unavailable)
	}
	for _, tunnel := range []string{"wireguard", "vxlan"} {
		t.Run(tunnel, func(t *testing.T) {
			t.Parallel()
			p := onOwn(t, built.bin, nil, "--cloud", "east=2", "--cloud", "west=2", "--cpus", "1", "--mem", "1G", "--tunnel", tunnel)
			prog := ring(openMPI, openMPI)
			job := p.submitParallel(prog)
			p.moves(job)
			p.run("suspend", job)
			p.run("resume", job)
			p.moves(job)
			p.ends(job, prog)
		})
	}
}
