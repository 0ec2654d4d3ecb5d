package agent

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"runtime"

	"github.com/shirou/gopsutil/v3/mem"
	"golang.org/x/sys/unix"

	"dormouse/api/agentpb"
)

// hello says what this node is, has and holds.
func (a *Agent) hello() *agentpb.Hello {
	h := &agentpb.Hello{
		Node: a.config.Node, Cloud: a.config.Cloud, Cpus: a.cpus(), MemBytes: a.memory(),
		Kernel: kernelRelease(), AgentVersion: a.config.Version, AgentPid: int64(os.Getpid()),
		RestoresWithNetwork: true,
	}
	if a.criu != nil {
		h.CriuVersion = a.criu.Version().String()
	}
	if underlay := a.underlay(); underlay.IsValid() {
		h.Underlay = underlay.String()
		h.TreeAddress = a.links.listen(underlay)
	}
	if cpu, err := a.cpu(); err == nil {
		h.CpuModel, h.CpuFeatures = cpu.Model, cpu.Features
	}
	for _, t := range a.allTasks() {
		h.Tasks = append(h.Tasks, t.state())
	}
	return h
}

// cpus is how many processors the node offers.
func (a *Agent) cpus() float64 {
	if a.config.CPUs > 0 {
		return a.config.CPUs
	}
	return float64(runtime.NumCPU())
}

// memory is how much the node offers, in bytes; 0: not known.
func (a *Agent) memory() int64 {
	if a.config.MemBytes > 0 {
		return a.config.MemBytes
	}
	memory, err := mem.VirtualMemory()
	if err != nil {
		return 0
	}
	return int64(memory.Total)
}

// underlay is where other nodes reach this one: as configured, or the address
// from which the controller is reached.
func (a *Agent) underlay() netip.Addr {
	to := a.masters.now()
	if a.config.Underlay.IsValid() || to.network != "tcp" {
		return a.config.Underlay
	}
	// udp(7): connect sends nothing, and chooses the source address.
	connection, err := net.Dial("udp", to.address)
	if err != nil {
		return netip.Addr{}
	}
	defer connection.Close()
	address, err := netip.ParseAddrPort(connection.LocalAddr().String())
	if err != nil || address.Addr().IsLoopback() {
		return netip.Addr{}
	}
	return address.Addr().Unmap()
}

func kernelRelease() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return ""
	}
	return string(bytes.TrimRight(name.Release[:], "\x00"))
}
