package controller

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/netip"
	"slices"

	"dormouse/api/agentpb"
	"dormouse/controller/store"
)

// networkBits is the size of a job's subnet. With it, a job has at most
// mostTasks tasks: its subnet's first and last address are reserved, and the one
// before the last is the gateway.
const networkBits = 20

// virtualIP is a task's address for life, in 10.64.0.0/10, the part of 10/8
// that is least in use. Jobs get consecutive networks; that two live ones may
// have the same does no harm, because a job's network is its own.
func virtualIP(job uint64, task int) string {
	const networks = 1 << (networkBits - 10)
	n := 10<<24 | 64<<16 | uint32(job%networks)<<(32-networkBits) | uint32(task+1)
	return fmt.Sprintf("%d.%d.%d.%d", n>>24, n>>16&255, n>>8&255, n&255)
}

// subnetOf returns the subnet in which a task's address is, and its gateway.
func subnetOf(address string) (subnet netip.Prefix, gateway netip.Addr, err error) {
	ip, err := netip.ParseAddr(address)
	if err != nil || !ip.Is4() {
		return subnet, gateway, fmt.Errorf("%q is no task's address", address)
	}
	if subnet, err = ip.Prefix(networkBits); err != nil {
		return subnet, gateway, err
	}
	last := subnet.Addr().As4()
	const host = 1<<(32-networkBits) - 2 // the address before the broadcast one
	last[2] |= byte(host >> 8)
	last[3] |= byte(host & 0xff)
	return subnet, netip.AddrFrom4(last), nil
}

// numberNetwork gives the run that is about to begin a number that no network
// of a run that may still be alive has: a frozen copy behind a cut must not
// reach the new one, also where nothing is encrypted.
func numberNetwork(tx store.Tx, job *jobRecord) error {
	const numbers = 1<<24 - 1 // as many as VXLAN has
	n, err := tx.Sequence(store.Jobs)
	job.Network = uint32(n%numbers) + 1
	return err
}

// plan describes the network of the job's present run.
func (d *doing) plan() (*agentpb.NetworkPlan, error) {
	refs := d.job.refs()
	subnet, gateway, err := subnetOf(d.job.TaskStatus[0].VirtualIP)
	if err != nil {
		return nil, err
	}
	plan := &agentpb.NetworkPlan{
		Subnet: subnet.String(), Gateway: gateway.String(), Number: d.job.Network, Tasks: int32(d.job.Tasks),
		Spans:  slices.ContainsFunc(refs, func(r taskRef) bool { return r.Node != refs[0].Node }),
		Tunnel: TunnelWireGuard, Isolated: d.job.Drill,
	}
	for _, p := range d.job.Spec.Publish {
		plan.Publish = append(plan.Publish, &agentpb.Publish{
			Task: int32(p.Task), Protocol: p.Protocol, Port: int32(p.Port), Target: int32(p.Target),
		})
	}
	return plan, nil
}

// trusted reports whether the operator trusts the network between all nodes of
// the job, so that its tunnels need no encryption.
func (d *doing) trusted(ctx context.Context) (bool, error) {
	trusted := true
	err := d.store.View(ctx, func(tx store.Tx) error {
		for _, ref := range d.job.refs() {
			node, err := d.nodes.get(tx, ref.Node)
			if err != nil {
				return err
			}
			cloud, known := d.cloud(node.Cloud)
			trusted = trusted && known && cloud.Tunnel == TunnelVXLAN
		}
		return nil
	})
	return trusted, err
}

// prepareNetwork has every node of the job make the job's network, unless the command
// that restores its only task says so, too.
func (d *doing) prepareNetwork(ctx context.Context) (effect, error) {
	within, err := d.networkWithin(ctx)
	if within || err != nil {
		return nil, err
	}
	plan, err := d.trustedPlan(ctx)
	if err != nil {
		return nil, err
	}
	replies, err := d.each(ctx, func(taskRef) *agentpb.Command {
		return &agentpb.Command{Body: &agentpb.Command_PrepareNetwork{PrepareNetwork: &agentpb.PrepareNetwork{Plan: plan}}}
	})
	if err != nil {
		return nil, err
	}
	return func(_ store.Tx, op *opRecord, job *jobRecord) error {
		op.Endpoints = make(map[string]endpoint)
		for i, ref := range job.refs() {
			e := replies[i].GetNetwork()
			op.Endpoints[ref.Node] = endpoint{Address: e.GetAddress(), PublicKey: e.GetPublicKey()}
		}
		return nil
	}, nil
}

// networkWithin reports whether the job's network is made by the command that restores
// its task.
func (d *doing) networkWithin(ctx context.Context) (within bool, err error) {
	if d.op.Checkpoint == "" || d.op.Anew || d.job.Tasks != 1 {
		return false, nil
	}
	err = d.store.View(ctx, func(tx store.Tx) error {
		node, err := d.nodes.get(tx, d.job.refs()[0].Node)
		if err == nil {
			within = node.RestoresWithNetwork
		}
		return err
	})
	return within, err
}

// trustedPlan is the plan of the job's network with the tunnel that its nodes use.
func (d *doing) trustedPlan(ctx context.Context) (*agentpb.NetworkPlan, error) {
	plan, err := d.plan()
	if err != nil {
		return nil, err
	}
	trusted, err := d.trusted(ctx)
	if trusted {
		plan.Tunnel = TunnelVXLAN
	}
	return plan, err
}

// endpoint is how the other nodes of a job reach its network on one.
type endpoint struct {
	Address   string `json:"address"`
	PublicKey []byte `json:"public_key,omitempty"`
}

// connectNetwork tells the nodes of the job of each other.
func (d *doing) connectNetwork(ctx context.Context) (effect, error) {
	if len(d.op.Endpoints) < 2 {
		return nil, nil
	}
	var all []*agentpb.NetworkPeer
	for _, ref := range d.job.refs() {
		i := slices.IndexFunc(all, func(p *agentpb.NetworkPeer) bool { return p.GetNode() == ref.Node })
		if i < 0 {
			e := d.op.Endpoints[ref.Node]
			all = append(all, &agentpb.NetworkPeer{Node: ref.Node, Endpoint: &agentpb.NetworkEndpoint{Address: e.Address, PublicKey: e.PublicKey}})
			i = len(all) - 1
		}
		all[i].VirtualIps = append(all[i].VirtualIps, d.job.TaskStatus[ref.Index].VirtualIP)
	}
	_, err := d.each(ctx, func(ref taskRef) *agentpb.Command {
		others := slices.DeleteFunc(slices.Clone(all), func(p *agentpb.NetworkPeer) bool { return p.GetNode() == ref.Node })
		return &agentpb.Command{Body: &agentpb.Command_ConnectNetwork{ConnectNetwork: &agentpb.ConnectNetwork{Peers: others}}}
	})
	return nil, err
}

// openNetwork reconnects all tasks, none of which runs.
func (d *doing) openNetwork(ctx context.Context) (effect, error) {
	if d.op.Anew {
		return nil, nil // started, not restored: nothing was cut
	}
	_, err := d.each(ctx, func(taskRef) *agentpb.Command {
		return &agentpb.Command{Body: &agentpb.Command_OpenNetwork{OpenNetwork: &agentpb.OpenNetwork{Checkpoint: d.op.Checkpoint}}}
	})
	return nil, err
}

// releaseTasks lets the restored and held tasks go on.
func (d *doing) releaseTasks(ctx context.Context) (effect, error) {
	if d.op.Anew {
		return nil, nil
	}
	replies, err := d.each(ctx, func(taskRef) *agentpb.Command {
		return &agentpb.Command{Body: &agentpb.Command_Release{Release: &agentpb.ReleaseTask{Checkpoint: d.op.Checkpoint}}}
	})
	if err != nil {
		return nil, err
	}
	return d.allUp(applyStates(replies, (*agentpb.Reply).GetRestored)), nil
}

// newSecret makes what the tasks of one job know each other by.
func newSecret() []byte {
	secret := make([]byte, 32)
	rand.Read(secret) // never fails: crypto/rand.Read
	return secret
}
