package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"dormouse/agent/network"
	"dormouse/agent/sandbox"
	"dormouse/api/agentpb"
	"dormouse/internal/failpoint"
)

// taskNetworks puts tasks on the networks of their jobs; see sandbox.Network.
type taskNetworks struct{ agent *Agent }

// Join implements sandbox.Network. What is restored is cut off until every
// connection is there.
func (n taskNetworks) Join(ctx context.Context, id string, netns *os.File) error {
	a := n.agent
	a.tasksMu.Lock()
	t, known := a.tasks[id]
	a.tasksMu.Unlock()
	if !known {
		return fmt.Errorf("task %s: %w", id, errNoTask)
	}
	r, _ := t.snapshot()
	address, err := netip.ParseAddr(r.VirtualIP)
	if err != nil {
		return fmt.Errorf("the task's address: %w", err)
	}
	member := network.Member{Index: int(r.Index), Address: address, Cut: r.Stage == stageRestoring}
	err = a.networks.Join(ctx, r.network(), member, netns)
	var taken *network.PortTakenError
	if errors.As(err, &taken) {
		return refusal{err}
	}
	if err != nil {
		return retry{err} // the agent may have been restarted since it was prepared
	}
	return nil
}

// network names the network of the task's job in this run.
func (r *record) network() network.Key { return network.Key{Job: r.Job, Run: r.Run} }

func networkOf(ref *agentpb.TaskRef) network.Key {
	return network.Key{Job: ref.GetJob(), Run: ref.GetRun()}
}

func (a *Agent) openNetworks() (err error) {
	a.networks, err = network.New(network.Options{
		State: filepath.Join(a.config.State, "networks"), Cgroup: filepath.Join(filepath.Dir(a.boxes.Cgroup()), "networks"),
		Underlay: a.underlay(), Init: a.config.Init, Logger: a.log,
	})
	return err
}

// retainNetworks removes what an earlier agent left of networks that no task is
// on any more.
func (a *Agent) retainNetworks(ctx context.Context) error {
	live := map[network.Key][]int{}
	for _, t := range a.allTasks() {
		r, box := t.snapshot()
		if box != nil && r.Stage == stageRunning {
			live[r.network()] = append(live[r.network()], int(r.Index))
		}
	}
	return a.networks.Retain(ctx, live)
}

// prepareNetwork makes the job's network on this node.
func (a *Agent) prepareNetwork(ctx context.Context, key network.Key, p *agentpb.NetworkPlan) (*agentpb.NetworkEndpoint, error) {
	plan := network.Plan{Number: p.GetNumber(), Tunnel: p.GetTunnel(), Spans: p.GetSpans(), Isolated: p.GetIsolated()}
	var err error
	if plan.Subnet, err = netip.ParsePrefix(p.GetSubnet()); err != nil {
		return nil, fmt.Errorf("the network of job %s: %w", key.Job, err)
	}
	if plan.Gateway, err = netip.ParseAddr(p.GetGateway()); err != nil {
		return nil, fmt.Errorf("the network of job %s: %w", key.Job, err)
	}
	for _, port := range p.GetPublish() {
		plan.Publish = append(plan.Publish, network.Publish{
			Task: int(port.GetTask()), Protocol: port.GetProtocol(), Port: int(port.GetPort()), Target: int(port.GetTarget()),
		})
	}
	end, err := a.networks.Prepare(ctx, key, plan)
	if err != nil {
		return nil, err
	}
	answer := &agentpb.NetworkEndpoint{PublicKey: end.PublicKey}
	if end.Address.IsValid() {
		answer.Address = end.Address.String()
	}
	return answer, nil
}

// connectNetwork tells the job's network on this node of the others.
func (a *Agent) connectNetwork(ctx context.Context, ref *agentpb.TaskRef, request *agentpb.ConnectNetwork) error {
	peers := make([]network.Peer, 0, len(request.GetPeers()))
	for _, p := range request.GetPeers() {
		address, err := netip.ParseAddrPort(p.GetEndpoint().GetAddress())
		if err != nil {
			return fmt.Errorf("the way to node %s: %w", p.GetNode(), err)
		}
		peer := network.Peer{Node: p.GetNode(), Endpoint: network.Endpoint{Address: address, PublicKey: p.GetEndpoint().GetPublicKey()}}
		for _, text := range p.GetVirtualIps() {
			ip, err := netip.ParseAddr(text)
			if err != nil {
				return fmt.Errorf("the tasks on node %s: %w", p.GetNode(), err)
			}
			peer.Addresses = append(peer.Addresses, ip)
		}
		peers = append(peers, peer)
	}
	if err := a.networks.Connect(ctx, networkOf(ref), peers); err != nil {
		return retry{err}
	}
	return nil
}

// openNetwork reconnects a task that stands still after its capture, or that is
// restored and held.
func (a *Agent) openNetwork(ref *agentpb.TaskRef) error {
	t, err := a.find(ref)
	if err != nil {
		return err
	}
	failpoint.Hit("agent.open.before")
	r, _ := t.snapshot()
	if h := t.heldRestore(); h != nil {
		return a.resume(a.life, &r, h.netns)
	}
	box, err := t.live()
	if err != nil {
		return notHeld(ref, err)
	}
	return a.resumeTies(a.life, &r, box)
}

// inNetwork does something with the network namespace of a task. One whose
// processes are gone needs it no more.
func inNetwork(box *sandbox.Sandbox, do func(*os.File) error) error {
	netns, err := network.OfProcess(box.Pid())
	if notExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer netns.Close()
	return do(netns)
}

// leaveNetwork takes the task off its job's network.
func (a *Agent) leaveNetwork(ref *agentpb.TaskRef) error {
	return a.networks.Leave(context.WithoutCancel(a.life), networkOf(ref), int(ref.GetIndex()))
}

// jobNetworks are the addresses with which connections stay inside the job.
func (a *Agent) jobNetworks(r *record) []netip.Prefix {
	if subnet, known := a.networks.Subnet(r.network()); known {
		return []netip.Prefix{subnet}
	}
	return nil
}
