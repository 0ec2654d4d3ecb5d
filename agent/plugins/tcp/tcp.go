// Package tcp is what a checkpoint does about TCP connections beyond what CRIU
// does.
//
// Connections whose two ends are in tasks of the job are captured by CRIU and
// restored as they were: every task keeps its address for life, all of them stand
// still at once, and while they do no packet passes (package network). A
// connection that leaves the job has an end that no checkpoint holds. By the
// job's policy such a one makes the checkpoint refuse itself, or is kept as it
// is, or is ended here, so that the program sees its end: an error (ECONNABORTED)
// in the job that runs on, the end of the data in each restored copy, because CRIU
// restores an aborted connection as one that was shut down.
package tcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
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
	diag, err := diagnose(namespace)
	if err != nil {
		return err
	}
	defer diag.Close()
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
			if err := end(diag, s); err != nil {
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

// diagnose opens a socket with which to ask about others in a namespace.
func diagnose(namespace *os.File) (*nl.NetlinkSocket, error) {
	diag, err := nl.GetNetlinkSocketAt(netns.NsHandle(namespace.Fd()), netns.None(), unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, fmt.Errorf("reach the task's network namespace: %w", err)
	}
	return diag, nil
}

// end resets one connection. One that ended by itself meanwhile is no error.
func end(diag *nl.NetlinkSocket, s *netlink.Socket) error {
	request := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
	request.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_INET_DIAG: {Socket: diag}}
	request.AddData((*destroyed)(s))
	_, err := request.Execute(unix.NETLINK_INET_DIAG, 0)
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE) {
		return nil
	}
	local, remote := address(s.ID.Source, s.ID.SourcePort), address(s.ID.Destination, s.ID.DestinationPort)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("end the connection from %v to %v: the kernel cannot (it has no CONFIG_INET_DIAG_DESTROY); "+
			"close it in the program, or use the policy keep", local, remote)
	}
	return fmt.Errorf("end the connection from %v to %v: %w", local, remote, err)
}

func address(ip net.IP, port uint16) *net.TCPAddr { return &net.TCPAddr{IP: ip, Port: int(port)} }

// destroyed is a socket as SOCK_DESTROY names it: struct inet_diag_req_v2 of
// linux/inet_diag.h. It carries the socket's cookie: the kernel looks for
// addresses and ports alone otherwise, and ends the listener instead when the
// connection is gone.
type destroyed netlink.Socket

func (s *destroyed) Len() int { return 56 }

func (s *destroyed) Serialize() []byte {
	source, destination := s.ID.Source.To16(), s.ID.Destination.To16()
	if s.Family == unix.AF_INET {
		source, destination = s.ID.Source.To4(), s.ID.Destination.To4()
	}
	b := make([]byte, s.Len())
	b[0], b[1] = s.Family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[4:], ^uint32(0)) // in any state
	binary.BigEndian.PutUint16(b[8:], s.ID.SourcePort)
	binary.BigEndian.PutUint16(b[10:], s.ID.DestinationPort)
	copy(b[12:28], source)
	copy(b[28:44], destination)
	binary.NativeEndian.PutUint32(b[44:], s.ID.Interface)
	binary.NativeEndian.PutUint32(b[48:], s.ID.Cookie[0])
	binary.NativeEndian.PutUint32(b[52:], s.ID.Cookie[1])
	return b
}
