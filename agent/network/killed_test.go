//go:build failpoint

package network

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// points are all instants at which the manager can be killed, in the order of a
// network's life.
var points = []string{
	"network.prepare.recorded",
	"network.prepare.holder",
	"network.prepare.router",
	"network.prepare.uplink",
	"network.prepare.tunnel",
	"network.prepare.rules",
	"network.prepare.node",
	"network.prepare.built",
	"network.connect.peers",
	"network.join.recorded",
	"network.join.linked",
	"network.leave.recorded",
	"network.leave.unlinked",
	"network.remove.devices",
	"network.remove.dismantled",
	"network.remove.rules",
}

// dieAt lets an agent make and remove a network, and kills it on the way.
func dieAt(t *testing.T, point string, n *node, j job, tasks []*os.File) {
	t.Helper()
	arguments, err := json.Marshal(victim{State: n.options.State, Cgroup: n.options.Cgroup, Program: n.options.Program,
		Underlay: n.underlay, Key: j.key, Plan: j.plan})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(n.options.Program, "victim", string(arguments))
	cmd.Env = append(os.Environ(), "DORMOUSE_FAILPOINT="+point+"=kill")
	cmd.ExtraFiles = append([]*os.File{n.ns}, tasks...)
	said, err := cmd.CombinedOutput()
	exit := &exec.ExitError{}
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the agent was not killed at %s: %v\n%s", point, err, said)
	}
	n.restart()
}

func eachDeath(t *testing.T, test func(t *testing.T, n *node, j job, tasks []*os.File)) {
	for _, tunnel := range tunnels {
		for _, point := range points {
			t.Run(tunnel+"/"+point, func(t *testing.T) {
				n := newFabric(t).node()
				j := newJob("j-dies", over(tunnel), publishing(Publish{Task: 0, Port: 8080}))
				tasks := []*os.File{newNamespace(t), newNamespace(t)}
				dieAt(t, point, n, j, tasks)
				test(t, n, j, tasks)
			})
		}
	}
}

func TestNothingIsLeftOfAKilledAgentsNetworks(t *testing.T) {
	eachDeath(t, func(t *testing.T, n *node, _ job, tasks []*os.File) {
		if err := n.Retain(background, nil); err != nil {
			t.Fatal(err)
		}
		n.nothingLeft()
		for _, task := range tasks {
			if _, err := open(t, task).links.LinkByName(taskDevice); !missing(err) {
				t.Errorf("a task still has eth0 (%v)", err)
			}
		}
	})
}

func TestTheNextAgentFinishesWhatAKilledOneBegan(t *testing.T) {
	eachDeath(t, func(t *testing.T, n *node, j job, tasks []*os.File) {
		if err := n.Retain(background, map[Key][]int{j.key: {0, 1}}); err != nil {
			t.Fatal(err)
		}
		n.prepare(j)
		for index, task := range tasks {
			if err := n.Join(background, j.key, Member{Index: index, Address: addressOf(index)}, task); err != nil {
				t.Fatal(err)
			}
		}
		atAll(t, tasks[0], "8080")
		reach(t, tasks[1], onPort(addressOf(0), 8080))
		reach(t, n.ns, onPort(n.underlay, 8080))
		for index := range tasks {
			if err := n.Leave(background, j.key, index); err != nil {
				t.Fatal(err)
			}
		}
		n.nothingLeft()
	})
}

// An agent may die while it cleans up after another that died.
func TestRetainAfterAKilledLeaveIsEnough(t *testing.T) {
	n := newFabric(t).node()
	j := newJob("j-dies", over(TunnelVXLAN))
	for _, point := range []string{"network.prepare.tunnel", "network.remove.devices", "network.remove.rules"} {
		dieAt(t, point, n, j, []*os.File{newNamespace(t), newNamespace(t)})
	}
	if err := n.Retain(background, nil); err != nil {
		t.Fatal(err)
	}
	n.nothingLeft()
}
