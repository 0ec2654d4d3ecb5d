// Package tcp is what a checkpoint does about TCP connections beyond what CRIU
// does.
//
// Connections whose two ends are in tasks of the job are captured by CRIU and
// restored as they were: every task keeps its address for life, all of them stand
// still at once, and while they do no packet passes (package network). A
// connection that leaves the job has an end that no checkpoint holds. By the
// job's policy such a one makes the checkpoint refuse itself, or is kept as it
// is, or is ended here, so that the program sees its end, in the job that runs on
// and in each restored copy alike.
package tcp

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// States of a TCP socket in which it has a peer: include/net/tcp_states.h.
var connected = []uint8{
	netlink.TCP_ESTABLISHED, netlink.TCP_SYN_SENT, netlink.TCP_SYN_RECV, netlink.TCP_FIN_WAIT1,
	netlink.TCP_FIN_WAIT2, netlink.TCP_CLOSE_WAIT, netlink.TCP_LAST_ACK, netlink.TCP_CLOSING,
}

// EndLeaving ends every TCP connection in a task's network namespace whose remote
// address is neither the task's own nor in one of the job's networks: the peer
// gets a reset and the program ECONNABORTED (sock_diag(7), SOCK_DESTROY). It is
// for a task that stands still and is not cut off yet.
func EndLeaving(namespace *os.File, job []netip.Prefix) error {
	handle, err := netlink.NewHandleAt(netns.NsHandle(namespace.Fd()), unix.NETLINK_ROUTE, unix.NETLINK_INET_DIAG)
	if err != nil {
		return fmt.Errorf("reach the task's network namespace: %w", err)
	}
	defer handle.Close()
	own, err := addresses(handle)
	if err != nil {
		return err
	}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, err := handle.SocketDiagTCP(family)
		if err != nil {
			return fmt.Errorf("list the task's TCP sockets: %w", err)
		}
		for _, s := range sockets {
			if !slices.Contains(connected, s.State) || stays(s.ID.Destination, own, job) {
				continue
			}
			if err := end(handle, s.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

// addresses are those of the task's devices.
func addresses(handle *netlink.Handle) (map[netip.Addr]bool, error) {
	list, err := handle.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list the task's addresses: %w", err)
	}
	own := map[netip.Addr]bool{}
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			own[ip.Unmap()] = true
		}
	}
	return own, nil
}

func stays(remote net.IP, own map[netip.Addr]bool, job []netip.Prefix) bool {
	ip, ok := netip.AddrFromSlice(remote)
	if !ok {
		return false
	}
	ip = ip.Unmap()
	return ip.IsLoopback() || own[ip] || slices.ContainsFunc(job, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// end resets one connection. One that ended by itself meanwhile is no error.
func end(handle *netlink.Handle, id netlink.SocketID) error {
	local := &net.TCPAddr{IP: id.Source, Port: int(id.SourcePort)}
	remote := &net.TCPAddr{IP: id.Destination, Port: int(id.DestinationPort)}
	if err := handle.SocketDestroy(local, remote); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("end the connection from %v to %v: %w", local, remote, err)
	}
	return nil
}
