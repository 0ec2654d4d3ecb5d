package agent

import (
	"bytes"
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
	if cpu, err := criu.CPUInfo(); err == nil {
		h.CpuModel, h.CpuFeatures = cpu.Model, cpu.Features
	}
	for _, t := range a.allTasks() {
		h.Tasks = append(h.Tasks, t.state())
	}
	return h
}

func kernelRelease() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return ""
	}
	return string(bytes.TrimRight(name.Release[:], "\x00"))
}
