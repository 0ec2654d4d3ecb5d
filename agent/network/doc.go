// Package network gives a job its own network on a node.
//
// Every (job, run) has, on each of its nodes, one network namespace, the
// router. It belongs to a holder process in a cgroup of its own, so that it
// outlives the agent, and ends with the node or by one write to cgroup.kill:
//
//	task's namespace     router (one per job run and node)           node's namespace
//	eth0 ── veth ── t0 ┐
//	                   ├ br0  gateway address, proxy ARP
//	eth0 ── veth ── t1 ┘  │
//	                      ├─ up0 ── veth ─────────────────────────── dmXXXX-SLOT   NAT to the outside
//	                      └─ tun0 ══ UDP socket ════════════════════ underlay      to the job's other nodes
//
// A namespace per job is what keeps jobs apart: two of them may use the same
// addresses on the same nodes, as a clone and its original do. In the node's
// namespace one nftables table, which is replaced as a whole at every change,
// lets jobs reach the outside but neither each other nor the node's own sockets,
// and lets the outside reach what a job publishes.
//
// An isolated network, which a restore on trial has, is made without up0: there
// is no way out of its routers but the tunnels between them.
//
// Between nodes packets are routed, never bridged: the router of each node
// answers the tasks' ARP requests for addresses elsewhere and has a route for
// each of them to tun0, so no broadcast crosses the underlay and all kinds of
// tunnel look the same:
//
//	kernel WireGuard     made in the node's namespace, where its UDP socket stays
//	                     for ever, then moved to the router (wg(8))
//	userspace WireGuard  on a TUN device of the router, in the holder process, with its UDP
//	                     socket opened in the node's namespace
//	VXLAN                made in the node's namespace and moved likewise; forwarding entries
//	                     and neighbours are all static
//
// WireGuard's keys are made by Prepare: every run has new ones, so nothing that
// an earlier run's nodes still hold opens what this one says.
//
// Everything is recorded before it is made, under Options.State. An agent that
// starts calls New, which takes over what is alive, and Retain, which removes
// everything that no living task needs, down to links, cgroups and rules that no
// record names. Removal never presumes that anything is still there: holders may
// have been killed.
//
// Cut and Open work on a task's own namespace and need no Manager. A cut
// namespace drops every packet, in and out, loopback included, but those CRIU
// marks as its own; the rule is part of the namespace, so it stays whatever
// becomes of the agent.
package network
