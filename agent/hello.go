package agent

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"runtime"

	"github.com/shirou/gopsutil/v3/mem"
	"golang.org/x/sys/unix"

	"dormouse/agent/criu"
	"dormouse/api/agentpb"
)

// hello says what this node is, has and holds.
func (a *Agent) hello() *agentpb.Hello {
	h := &agentpb.Hello{
		Node: a.config.Node, Cloud: a.config.Cloud, Cpus: a.config.CPUs, MemBytes: a.config.MemBytes,
		Kernel: kernelRelease(), AgentVersion: a.config.Version, AgentPid: int64(os.Getpid()),
	}
	if h.Cpus == 0 {
		h.Cpus = float64(runtime.NumCPU())
	}
	if h.MemBytes == 0 {
		if memory, err := mem.VirtualMemory(); err == nil {
			h.MemBytes = int64(memory.Total)
		}
	}
	if a.criu != nil {
		h.CriuVersion = a.criu.Version().String()
	}
	if underlay := a.underlay(); underlay.IsValid() {
		h.Underlay = underlay.String()
	}
	if cpu, err := criu.CPUInfo(); err == nil {
		h.CpuModel, h.CpuFeatures = cpu.Model, cpu.Features
	}
	for _, t := range a.allTasks() {
		h.Tasks = append(h.Tasks, t.state())
	}
	return h
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
