package network

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// routerTable is the table of a router's namespace; the node's is named after
// the manager as well.
const routerTable = "dormouse"

func (m *Manager) nodeTable() string { return routerTable + "-" + m.token }

// filterRouter writes the router's rules, in place of those it has.
func filterRouter(router *namespace, plan Plan, published []forward) error {
	conn, err := dialFilter(router.file)
	if err != nil {
		return fmt.Errorf("write the router's rules: %w", err)
	}
	defer hangUp(conn)
	table := replaceTable(conn, nftables.TableFamilyIPv4, routerTable)
	chain := chains(conn, table)

	// What stays in the job needs no tracking, and after a restore there is
	// nothing to track it by.
	early := chain("early", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, nftables.ChainPolicyAccept)
	rule(conn, early, from(bridgeName), destinationIn(plan.Subnet), untracked())
	rule(conn, early, from(tunnelName), untracked())

	input := chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
	rule(conn, input, from(bridgeName), protocol("icmp"), accept())
	rule(conn, input, answers(), accept())

	forwarding := chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
	rule(conn, forwarding, from(bridgeName), sourceNotIn(plan.Subnet), drop())
	rule(conn, forwarding, from(bridgeName), to(tunnelName), clampMSS())
	rule(conn, forwarding, from(tunnelName), to(bridgeName), clampMSS())
	rule(conn, forwarding, from(bridgeName), to(tunnelName), accept())
	rule(conn, forwarding, from(tunnelName), to(bridgeName), sourceIn(plan.Subnet), destinationIn(plan.Subnet), accept())
	// Untranslated, it would show the job's addresses to the outside.
	rule(conn, forwarding, to(uplinkName), invalid(), drop())
	rule(conn, forwarding, from(bridgeName), to(uplinkName), accept())
	rule(conn, forwarding, from(uplinkName), to(bridgeName), answers(), accept())
	rule(conn, forwarding, from(uplinkName), to(bridgeName), redirected(), accept())

	incoming := chain("incoming", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, nftables.ChainPolicyAccept)
	for _, p := range published {
		rule(conn, incoming, from(uplinkName), port(p.Protocol, p.Port), redirect(p.To, p.Target))
	}
	outgoing := chain("outgoing", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept)
	rule(conn, outgoing, to(uplinkName), masquerade())
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("write the router's rules: %w", err)
	}
	return nil
}

// filterNode makes the node's namespace fit the networks that exist now: its
// rules and its forwarding. Nothing of it is left when there are none.
func (m *Manager) filterNode() error {
	if len(m.networks) == 0 {
		return errors.Join(m.removeNodeTable(), m.stopForwarding())
	}
	others, err := m.startForwarding()
	if err != nil {
		return err
	}
	var published []forward
	for _, n := range m.networks {
		published = append(published, n.published()...)
	}
	return m.writeNodeTable(published, others)
}

// writeNodeTable sets the node's rules. others is what becomes of packets that
// are forwarded and none of ours.
func (m *Manager) writeNodeTable(published []forward, others nftables.ChainPolicy) error {
	conn, err := dialFilter(m.node.file)
	if err != nil {
		return fmt.Errorf("write the node's rules: %w", err)
	}
	defer hangUp(conn)
	table := replaceTable(conn, nftables.TableFamilyIPv4, m.nodeTable())
	chain := chains(conn, table)
	uplinks := m.uplinkPrefix()

	input := chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
	rule(conn, input, from(uplinks), answers(), accept())
	rule(conn, input, from(uplinks), drop())

	forwarding := chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, others)
	// Other nodes would take it for a tunnel of ours.
	rule(conn, forwarding, from(uplinks), port("udp", vxlanPort), drop())
	rule(conn, forwarding, to(uplinks), redirected(), accept())
	rule(conn, forwarding, from(uplinks), to(uplinks), drop())
	rule(conn, forwarding, from(uplinks), accept())
	rule(conn, forwarding, to(uplinks), answers(), accept())
	rule(conn, forwarding, to(uplinks), drop())

	incoming := chain("incoming", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, nftables.ChainPolicyAccept)
	local := chain("local", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest, nftables.ChainPolicyAccept)
	for _, p := range published {
		rule(conn, incoming, toNode(), port(p.Protocol, p.Port), redirect(p.Via, p.Port))
		rule(conn, local, toNode(), port(p.Protocol, p.Port), redirect(p.Via, p.Port))
	}
	outgoing := chain("outgoing", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept)
	rule(conn, outgoing, notTo(uplinks), sourceIn(uplinkPool), masquerade())
	// Published ports called from 127.0.0.1, and from a job on this node: the
	// answer must come back through here.
	rule(conn, outgoing, to(uplinks), sourceIn(loopback), masquerade())
	rule(conn, outgoing, to(uplinks), sourceIn(uplinkPool), masquerade())
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("write the node's rules: %w", err)
	}
	return nil
}

func (m *Manager) removeNodeTable() error {
	conn, err := dialFilter(m.node.file)
	if err != nil {
		return fmt.Errorf("remove the node's rules: %w", err)
	}
	defer hangUp(conn)
	conn.DelTable(conn.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: m.nodeTable()}))
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("remove the node's rules: %w", err)
	}
	return nil
}

// chains returns a maker of base chains in a table.
func chains(conn *nftables.Conn, table *nftables.Table) func(string, nftables.ChainType, *nftables.ChainHook, *nftables.ChainPriority, nftables.ChainPolicy) *nftables.Chain {
	return func(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority, policy nftables.ChainPolicy) *nftables.Chain {
		return conn.AddChain(&nftables.Chain{Name: name, Table: table, Type: kind, Hooknum: hook, Priority: priority, Policy: &policy})
	}
}

// forwardingSetting makes the node a router.
const forwardingSetting = "ipv4/ip_forward"

// forwardingRecord is there while the setting is ours. It names the namespace:
// after a restart of the node the setting is somebody else's again.
func (m *Manager) forwardingRecord() string { return filepath.Join(m.options.State, "forwarding") }

// place names the node's namespace among all there ever were.
func (m *Manager) place() (string, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	stat := unix.Stat_t{}
	if err := unix.Fstat(int(m.node.file.Fd()), &stat); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s %d", strings.TrimSpace(string(boot)), stat.Ino), nil
}

// startForwarding makes the node forward packets and returns what shall become
// of those that are none of ours: a node that was no router before must not
// become one for everybody.
func (m *Manager) startForwarding() (nftables.ChainPolicy, error) {
	ours, err := m.forwardingIsOurs()
	if err != nil {
		return 0, err
	}
	if ours {
		// Written again, in case the agent ended between record and setting.
		return nftables.ChainPolicyDrop, m.node.apply(setting{name: forwardingSetting, value: "1"})
	}
	value, err := m.node.value(forwardingSetting)
	if err != nil {
		return 0, fmt.Errorf("see whether the node forwards packets: %w", err)
	}
	if strings.TrimSpace(value) == "1" {
		return nftables.ChainPolicyAccept, nil
	}
	place, err := m.place()
	if err == nil {
		err = replaceFile(m.forwardingRecord(), []byte(place))
	}
	if err != nil {
		return 0, fmt.Errorf("record that forwarding was off: %w", err)
	}
	return nftables.ChainPolicyDrop, m.node.apply(setting{name: forwardingSetting, value: "1"})
}

// stopForwarding puts the setting back to what it was.
func (m *Manager) stopForwarding() error {
	ours, err := m.forwardingIsOurs()
	if err != nil || !ours {
		return err
	}
	if err := m.node.apply(setting{name: forwardingSetting, value: "0"}); err != nil {
		return err
	}
	return os.Remove(m.forwardingRecord())
}

func (m *Manager) forwardingIsOurs() (bool, error) {
	recorded, err := os.ReadFile(m.forwardingRecord())
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	place, err := m.place()
	if err != nil || place == string(recorded) {
		return err == nil, err
	}
	return false, os.Remove(m.forwardingRecord())
}

// checkPorts refuses what a member would publish when somebody has the port.
func (m *Manager) checkPorts(own *network, member Member) error {
	for _, wanted := range own.portsOf(member.Index) {
		if err := m.checkPort(own, member.Index, wanted); err != nil {
			return err
		}
	}
	return nil
}

func (m *Manager) checkPort(own *network, index int, wanted Publish) error {
	for _, n := range m.networks {
		for _, has := range n.published() {
			same := has.Port == wanted.Port && has.Protocol == wanted.Protocol
			if same && (n != own || has.Task != index) {
				return &PortTakenError{Protocol: wanted.Protocol, Port: wanted.Port, By: "job " + n.Key.Job}
			}
		}
	}
	err := within(m.node.file, func() error { return bindOnce(wanted.Protocol, wanted.Port) })
	if errors.Is(err, unix.EADDRINUSE) {
		return &PortTakenError{Protocol: wanted.Protocol, Port: wanted.Port, By: "a program of the node"}
	}
	if err != nil {
		return fmt.Errorf("see whether port %d/%s of the node is free: %w", wanted.Port, wanted.Protocol, err)
	}
	return nil
}

// bindOnce takes a port of all IPv4 addresses and gives it back.
func bindOnce(protocol string, port int) error {
	kind := unix.SOCK_STREAM
	if protocol == "udp" {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if protocol == "tcp" {
		// Connections that wait for their end are nobody's; listeners are.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return err
		}
	}
	return unix.Bind(fd, &unix.SockaddrInet4{Port: port})
}
