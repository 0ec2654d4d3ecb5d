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
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

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

// Connection is one that leaves the job.
type Connection struct {
	Local, Remote netip.AddrPort
	// Held: a process of the task has it. Otherwise it is the kernel's: not yet
	// accepted, or closed by its process and still being taken down.
	Held   bool
	socket *netlink.Socket
}

// String is for people: "10.64.0.1:40000 to 192.0.2.1:443".
func (c Connection) String() string { return fmt.Sprintf("%v to %v", c.Local, c.Remote) }

// Used reports whether a process's network namespace has a TCP socket that is
// connected or listens. It is much faster than Leaving, for which the kernel looks
// through the connections of all namespaces (proc(5), sockstat).
func Used(pid int) (bool, error) {
	for _, name := range []string{"sockstat", "sockstat6"} {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, name))
		if errors.Is(err, fs.ErrNotExist) && name == "sockstat6" {
			continue // a kernel without IPv6
		}
		if err != nil {
			return false, fmt.Errorf("count the task's TCP sockets: %w", err)
		}
		for line := range strings.Lines(string(data)) {
			if fields := strings.Fields(line); len(fields) > 2 && strings.HasPrefix(fields[0], "TCP") && fields[2] != "0" {
				return true, nil
			}
		}
	}
	return false, nil
}

// Leaving lists the TCP connections in a task's network namespace whose remote
// address is neither the task's own nor in one of the job's networks.
func Leaving(namespace *os.File, job []netip.Prefix) ([]Connection, error) {
	handle, err := netlink.NewHandleAt(netns.NsHandle(namespace.Fd()), unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, fmt.Errorf("reach the task's network namespace: %w", err)
	}
	defer handle.Close()
	var leaving []Connection
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, err := whole(func() ([]*netlink.Socket, error) { return handle.SocketDiagTCP(family) })
		if err != nil {
			return nil, fmt.Errorf("list the task's TCP sockets: %w", err)
		}
		for _, s := range sockets {
			remote := addrPort(s.ID.Destination, s.ID.DestinationPort)
			if !slices.Contains(connected, s.State) || stays(remote.Addr(), job) {
				continue
			}
			local := addrPort(s.ID.Source, s.ID.SourcePort)
			leaving = append(leaving, Connection{Local: local, Remote: remote, Held: s.INode != 0, socket: s})
		}
	}
	if len(leaving) == 0 {
		return nil, nil // most tasks: the rest is not worth a part of the pause
	}
	own, err := addresses(namespace)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(leaving, func(c Connection) bool { return own[c.Remote.Addr()] }), nil
}

// End ends connections of a task that stands still and is not cut off yet: the
// peer gets a reset and the program ECONNABORTED (sock_diag(7), SOCK_DESTROY). One
// that ended by itself meanwhile is no error.
func End(namespace *os.File, connections []Connection) error {
	if len(connections) == 0 {
		return nil
	}
	diag, err := nl.GetNetlinkSocketAt(netns.NsHandle(namespace.Fd()), netns.None(), unix.NETLINK_INET_DIAG)
	if err != nil {
		return fmt.Errorf("reach the task's network namespace: %w", err)
	}
	defer diag.Close()
	for _, c := range connections {
		if err := end(diag, c); err != nil {
			return fmt.Errorf("end the connection from %v: %w", c, err)
		}
	}
	return nil
}

// addresses are those of the task's devices.
func addresses(namespace *os.File) (map[netip.Addr]bool, error) {
	handle, err := netlink.NewHandleAt(netns.NsHandle(namespace.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("reach the task's network namespace: %w", err)
	}
	defer handle.Close()
	list, err := whole(func() ([]netlink.Addr, error) { return handle.AddrList(nil, netlink.FAMILY_ALL) })
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

// whole asks the kernel for a list until nothing changed while it was sent, a few
// times at most: what concerns a task that stands still does not change.
func whole[T any](ask func() ([]T, error)) (list []T, err error) {
	for range 5 {
		if list, err = ask(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return list, err
		}
	}
	return list, nil
}

func stays(remote netip.Addr, job []netip.Prefix) bool {
	return remote.IsLoopback() || slices.ContainsFunc(job, func(p netip.Prefix) bool { return p.Contains(remote) })
}

func addrPort(ip net.IP, port uint16) netip.AddrPort {
	address, _ := netip.AddrFromSlice(ip) // of the kernel: 4 or 16 bytes
	return netip.AddrPortFrom(address.Unmap(), port)
}

func end(diag *nl.NetlinkSocket, c Connection) error {
	request := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
	request.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_INET_DIAG: {Socket: diag}}
	request.AddData((*destroyed)(c.socket))
	_, err := request.Execute(unix.NETLINK_INET_DIAG, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESTALE):
		return nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("the kernel cannot (it has no CONFIG_INET_DIAG_DESTROY); close it in the program, or use the policy keep: %w", err)
	}
	return err
}

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
