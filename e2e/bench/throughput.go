package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"

	"dormouse/e2e/cluster"
)

const (
	streamPort    = "7070"
	streamSeconds = "3"
)

// throughput measures one TCP connection between two tasks of a job, for each
// kind of tunnel and on one node, beside a plain pair of virtual Ethernet devices.
func (b *parallelBench) throughput(ctx context.Context) ([]parallelRow, error) {
	var rows []parallelRow
	for _, kind := range []struct{ name, tunnel, cloud string }{
		{"one node", "auto", "bench=1"}, {"tunnel wireguard", "wireguard", "bench=2"}, {"tunnel vxlan", "vxlan", "bench=2"},
	} {
		row := parallelRow{Name: "network, " + kind.name, Unit: "MB/s"}
		err := b.with(ctx, []string{"--cloud", kind.cloud, "--cpus", "4", "--mem", "2G", "--tunnel", kind.tunnel}, func(c *cluster.Cluster) error {
			for round := range b.rounds {
				fmt.Fprintf(os.Stderr, "%s: round %d of %d\n", row.Name, round+1, b.rounds)
				plain, err := b.plainStream(ctx)
				if err != nil {
					return fmt.Errorf("plain veth: %w", err)
				}
				ours, err := b.jobStream(ctx, c)
				if err != nil {
					return err
				}
				row.Plain = append(row.Plain, plain/1e6)
				row.Dormouse = append(row.Dormouse, ours/1e6)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", row.Name, err)
		}
		rows = append(rows, row)
	}
	return rows, nil
}

// jobStream runs the stream in a job of two tasks; bytes per second.
func (b *parallelBench) jobStream(ctx context.Context, c *cluster.Cluster) (float64, error) {
	job, err := submit(ctx, c, "--tasks", "2", "--mem", "128M", "--cpus", "2", "--volume", b.program("")+":/subject:ro", "--", "sh", "-c",
		fmt.Sprintf("[ $DORMOUSE_TASK = 0 ] && exec /subject/stream receive %s %s; exec /subject/stream send task-0 %s", streamPort, streamSeconds, streamPort))
	if err != nil {
		return 0, err
	}
	d := dormouse{c: c}
	defer d.remove(job)
	if _, err := c.Run(ctx, "wait", job); err != nil {
		return 0, err
	}
	out, err := c.Run(ctx, "logs", job, "--task", "0")
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(strings.TrimSpace(out), 64)
}

// plainStream runs the stream between two network namespaces that a pair of
// virtual Ethernet devices connects.
func (b *parallelBench) plainStream(ctx context.Context) (float64, error) {
	receiver, sender := exec.CommandContext(ctx, b.program("stream"), "receive", streamPort, streamSeconds), exec.CommandContext(ctx, b.program("stream"), "send", "192.0.2.1", streamPort)
	var out strings.Builder
	receiver.Stdout, receiver.Stderr = &out, os.Stderr
	for _, side := range []*exec.Cmd{receiver, sender} {
		side.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if err := side.Start(); err != nil {
			return 0, err
		}
		defer side.Wait()
		defer side.Process.Kill()
	}
	// The sender tries until there is a way.
	if err := joinByVeth(receiver.Process.Pid, sender.Process.Pid); err != nil {
		return 0, err
	}
	if err := receiver.Wait(); err != nil {
		return 0, err
	}
	return strconv.ParseFloat(strings.TrimSpace(out.String()), 64)
}

// joinByVeth connects the network namespaces of two processes; they have
// 192.0.2.1 and 192.0.2.2 then.
func joinByVeth(a, b int) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "benchA", Namespace: netlink.NsPid(a)}, PeerName: "benchB", PeerNamespace: netlink.NsPid(b)}
	if err := netlink.LinkAdd(link); err != nil {
		return fmt.Errorf("a pair of virtual Ethernet devices: %w", err)
	}
	for _, end := range []struct {
		pid          int
		name, prefix string
	}{{a, "benchA", "192.0.2.1/24"}, {b, "benchB", "192.0.2.2/24"}} {
		if err := raise(end.pid, end.name, end.prefix); err != nil {
			return fmt.Errorf("device %s: %w", end.name, err)
		}
	}
	return nil
}

// raise gives a device in the network namespace of a process its address.
func raise(pid int, name, prefix string) error {
	out, err := exec.Command("nsenter", "-t", strconv.Itoa(pid), "-n", "sh", "-c",
		fmt.Sprintf("ip addr add %s dev %s && ip link set %s up", prefix, name, name)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}
