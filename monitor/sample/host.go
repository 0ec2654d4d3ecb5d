package sample

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"runtime"
	"strings"
	"time"

	"github.com/shirou/gopsutil/v3/cpu"
	"github.com/shirou/gopsutil/v3/load"
	"github.com/shirou/gopsutil/v3/mem"
)

// ReadHost measures this machine now.
func ReadHost(ctx context.Context, now time.Time) (Host, error) {
	host := Host{Time: now, CPUs: runtime.NumCPU()}
	times, err := cpu.TimesWithContext(ctx, false)
	if err != nil || len(times) != 1 {
		return Host{}, fmt.Errorf("cannot read the machine's CPU times: %w", err)
	}
	total := times[0]
	host.Busy = seconds(total.User + total.Nice + total.System + total.Irq + total.Softirq)
	host.Idle, host.IOWait = seconds(total.Idle+total.Iowait), seconds(total.Iowait)
	host.Steal = seconds(total.Steal)
	average, err := load.AvgWithContext(ctx)
	if err != nil {
		return Host{}, fmt.Errorf("cannot read the machine's load: %w", err)
	}
	host.Load = average.Load1
	memory, err := mem.VirtualMemoryWithContext(ctx)
	if err != nil {
		return Host{}, fmt.Errorf("cannot read the machine's memory: %w", err)
	}
	host.MemoryBytes, host.MemoryAvailable = memory.Total, memory.Available
	swap, err := mem.SwapMemoryWithContext(ctx)
	if err != nil {
		return Host{}, fmt.Errorf("cannot read the machine's swapping: %w", err)
	}
	host.SwapInBytes, host.SwapOutBytes = swap.Sin, swap.Sout
	return host, host.readKernel()
}

func seconds(s float64) time.Duration {
	return time.Duration(math.Round(s * float64(time.Second)))
}

// readKernel reads what gopsutil does not have (PSI), or only together with a
// look-up of every device's name and serial number (diskstats).
func (h *Host) readKernel() error {
	var files reader
	for _, resource := range []struct {
		file string
		to   *Pressure
	}{
		{"/proc/pressure/cpu", &h.Pressure.CPU},
		{"/proc/pressure/memory", &h.Pressure.Memory},
		{"/proc/pressure/io", &h.Pressure.IO},
	} {
		text, err := files.read(resource.file)
		if gone(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("cannot read the machine's pressure: %w", err)
		}
		h.PSI = true
		*resource.to = pressure(text)
	}
	text, err := files.read("/proc/diskstats")
	if gone(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot read the machine's disks: %w", err)
	}
	h.DiskOperations, h.DiskTime = parseDiskstats(text)
	return nil
}

// parseDiskstats sums completed reads and writes and the milliseconds they took
// (kernel Documentation/admin-guide/iostats.rst, fields 1, 4, 5 and 8). A
// partition's are counted with its disk's: only their ratio is of use.
func parseDiskstats(text []byte) (operations uint64, took time.Duration) {
	for line := range bytes.Lines(text) {
		words := strings.Fields(string(line))
		if len(words) < 11 {
			continue
		}
		field := func(n int) uint64 { return number([]byte(words[2+n])) }
		operations += field(1) + field(5)
		took += time.Duration(field(4)+field(8)) * time.Millisecond
	}
	return operations, took
}
