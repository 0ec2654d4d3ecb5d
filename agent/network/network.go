package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"dormouse/internal/lazyregexp"
)

// Kinds of tunnel between the nodes of a job.
const (
	TunnelWireGuard = "wireguard"
	TunnelVXLAN     = "vxlan" // neither encrypted nor authenticated: for trusted underlays
)

// TaskMTU is the MTU of every task's eth0, in bytes. It never changes in a
// task's life, wherever it runs, as programs and TCP connections remember it: it
// is what WireGuard leaves of an underlay's 1500 (60 bytes of header over IPv4,
// 80 over IPv6). A narrower underlay narrows the tunnel alone.
const TaskMTU = 1420

// Key names one network: that of one run of a job.
type Key struct {
	Job string
	Run int64
}

func (k Key) String() string { return fmt.Sprintf("%s.%d", k.Job, k.Run) }

// Plan is what all nodes of a job know of its network.
type Plan struct {
	Subnet  netip.Prefix
	Gateway netip.Addr // in the subnet; the same on every node
	// Number tells networks apart where the tunnel does not authenticate: of the live
	// ones on one underlay no two have the same. 1 to 1<<24-1.
	Number  uint32
	Tunnel  string    // empty: TunnelWireGuard
	Publish []Publish // of the whole job
	Spans   bool      // over several nodes, so that a tunnel is needed
	// Isolated leaves out the link to the node: the job reaches nothing but
	// itself, and nothing reaches it.
	Isolated bool
}

// Publish lets the outside reach a port of a task through the node it is on.
type Publish struct {
	Task     int
	Protocol string // tcp, when empty, or udp
	Port     int    // of the node
	Target   int    // of the task; 0: the same
}

// Endpoint is how other nodes reach a network on this node. It is zero unless
// the plan spans nodes.
type Endpoint struct {
	Address   netip.AddrPort // on the underlay
	PublicKey []byte         // WireGuard's; empty for VXLAN
}

// Peer is another node of the run, and the virtual addresses there.
type Peer struct {
	Node      string
	Endpoint  Endpoint
	Addresses []netip.Addr
}

// Member is one task of the job on this node.
type Member struct {
	Index   int
	Address netip.Addr
	// Cut builds the network closed: see Cut.
	Cut bool
}

// PortTakenError says that a published port of the node is in use.
type PortTakenError struct {
	Protocol string
	Port     int
	By       string // who has it
}

func (e *PortTakenError) Error() string {
	return fmt.Sprintf("port %d/%s of this node cannot be published: %s uses it; publish another port or run the job elsewhere", e.Port, e.Protocol, e.By)
}

// validJob keeps names of jobs usable in file and cgroup names.
var validJob = lazyregexp.New(`^[a-zA-Z0-9][a-zA-Z0-9_-]{0,62}$`)

func (k Key) check() error {
	if !validJob.MatchString(k.Job) || k.Run < 0 {
		return fmt.Errorf("%q run %d cannot name a network: a job's name is 1 to 63 letters, digits, '_' or '-'", k.Job, k.Run)
	}
	return nil
}

// check returns the plan with what was left out filled in.
func (p Plan) check() (Plan, error) {
	if p.Tunnel == "" {
		p.Tunnel = TunnelWireGuard
	}
	p.Subnet = p.Subnet.Masked()
	switch {
	case !p.Subnet.IsValid() || !p.Subnet.Addr().Is4() || p.Subnet.Bits() > 30:
		return p, fmt.Errorf("%v is no IPv4 subnet that a job's tasks could share", p.Subnet)
	case !p.Subnet.Contains(p.Gateway):
		return p, fmt.Errorf("the gateway %v is not in the subnet %v", p.Gateway, p.Subnet)
	case p.Tunnel != TunnelWireGuard && p.Tunnel != TunnelVXLAN:
		return p, fmt.Errorf("there is no tunnel %q: it can be %s or %s", p.Tunnel, TunnelWireGuard, TunnelVXLAN)
	case p.Spans && p.Tunnel == TunnelVXLAN && (p.Number == 0 || p.Number >= 1<<24):
		return p, fmt.Errorf("the number of a VXLAN network is 1 to %d, not %d", 1<<24-1, p.Number)
	}
	if p.Isolated && len(p.Publish) > 0 {
		return p, errors.New("an isolated network publishes nothing")
	}
	published := make([]Publish, 0, len(p.Publish))
	for _, port := range p.Publish {
		port, err := port.check()
		if err != nil {
			return p, err
		}
		published = append(published, port)
	}
	p.Publish = published
	return p, nil
}

func (p Publish) check() (Publish, error) {
	if p.Protocol == "" {
		p.Protocol = "tcp"
	}
	if p.Target == 0 {
		p.Target = p.Port
	}
	if p.Protocol != "tcp" && p.Protocol != "udp" {
		return p, fmt.Errorf("a port of protocol %q cannot be published, only tcp and udp", p.Protocol)
	}
	if p.Port < 1 || p.Port > 65535 || p.Target < 1 || p.Target > 65535 {
		return p, fmt.Errorf("port %d to %d cannot be published: ports are 1 to 65535", p.Port, p.Target)
	}
	return p, nil
}

// checkMember refuses addresses that cannot be a task's.
func (p Plan) checkMember(m Member) error {
	if m.Index < 0 {
		return errors.New("a task's index is not negative")
	}
	return p.checkAddress(m.Address)
}

func (p Plan) checkAddress(address netip.Addr) error {
	if !p.Subnet.Contains(address) || address == p.Subnet.Addr() || address == p.Gateway {
		return fmt.Errorf("%v cannot be a task's address in %v with gateway %v", address, p.Subnet, p.Gateway)
	}
	return nil
}

// taskMAC is the same wherever the task runs: neighbours that remember it need
// not ask again. Its first byte says "locally administered" (IEEE 802).
func taskMAC(address netip.Addr) net.HardwareAddr {
	ip := address.As4()
	return net.HardwareAddr{0x02, 0x64, ip[0], ip[1], ip[2], ip[3]}
}
