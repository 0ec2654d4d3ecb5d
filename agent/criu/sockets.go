package criu

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// network is one network namespace of the task.
type network struct {
	inode uint64
	file  *os.File
}

func (n *network) close() { n.file.Close() }

func (i *inspection) addNetwork(pid int) error {
	inode, err := nsInode(pid, "net")
	if err != nil {
		return err
	}
	if i.network(inode) != nil {
		return nil
	}
	f, err := os.Open(procPath(pid, "ns", "net"))
	if err != nil {
		return err
	}
	i.nets = append(i.nets, &network{inode, f})
	return nil
}

func (i *inspection) network(inode uint64) *network {
	for _, n := range i.nets {
		if n.inode == inode {
			return n
		}
	}
	return nil
}

// checkSockets duplicates each socket for a moment and asks it what it is:
// /proc names neither family nor protocol of most.
func (i *inspection) checkSockets(pid int, fds []int) error {
	if len(fds) == 0 {
		return nil
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	defer unix.Close(pidfd)
	for _, fd := range fds {
		s, err := unix.PidfdGetfd(pidfd, fd, 0)
		if errors.Is(err, unix.EBADF) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return fmt.Errorf("pidfd_getfd: %w", err)
		}
		err = i.checkSocket(pid, fd, s)
		unix.Close(s)
		if err != nil {
			return fmt.Errorf("descriptor %d: %w", fd, err)
		}
	}
	return nil
}

// families that CRIU does not know, with names for people.
var families = map[int]string{
	unix.AF_VSOCK: "vsock", unix.AF_ALG: "kernel crypto (AF_ALG)", unix.AF_XDP: "XDP", unix.AF_CAN: "CAN",
	unix.AF_TIPC: "TIPC", unix.AF_RDS: "RDS", unix.AF_BLUETOOTH: "Bluetooth", unix.AF_KEY: "IPsec key (AF_KEY)",
	unix.AF_SMC: "SMC", unix.AF_QIPCRTR: "QIPCRTR", unix.AF_PPPOX: "PPP", unix.AF_RXRPC: "RxRPC", unix.AF_KCM: "KCM",
}

// protocols on top of IP that CRIU does not know, except in raw sockets.
var protocols = map[int]string{
	unix.IPPROTO_MPTCP: "an MPTCP", unix.IPPROTO_SCTP: "an SCTP", unix.IPPROTO_DCCP: "a DCCP",
	unix.IPPROTO_ICMP: "a ping (ICMP)", unix.IPPROTO_ICMPV6: "a ping (ICMPv6)", unix.IPPROTO_L2TP: "an L2TP",
}

func (i *inspection) checkSocket(pid, fd, s int) error {
	domain, err := unix.GetsockoptInt(s, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return fmt.Errorf("SO_DOMAIN: %w", err)
	}
	kind, err := unix.GetsockoptInt(s, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return fmt.Errorf("SO_TYPE: %w", err)
	}
	protocol, err := unix.GetsockoptInt(s, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil {
		return fmt.Errorf("SO_PROTOCOL: %w", err)
	}
	where := fmt.Sprintf("(descriptor %d)", fd)
	switch domain {
	case unix.AF_NETLINK, unix.AF_PACKET:
		return nil
	case unix.AF_UNIX:
		return i.noteUnix(pid, fd, s)
	case unix.AF_INET, unix.AF_INET6:
	default:
		name := cmp.Or(families[domain], fmt.Sprintf("family %d", domain))
		i.refuse(pid, fmt.Sprintf("has a %s socket %s", name, where), "close such sockets before the checkpoint")
		return nil
	}
	if name := protocols[protocol]; name != "" && kind != unix.SOCK_RAW {
		fix := "close such sockets before the checkpoint"
		if protocol == unix.IPPROTO_MPTCP {
			fix = "use plain TCP (Go programs: GODEBUG=multipathtcp=0)"
		}
		i.refuse(pid, fmt.Sprintf("has %s socket %s", name, where), fix)
		return nil
	}
	if protocol != unix.IPPROTO_TCP {
		return nil
	}
	return i.checkTCP(pid, fd, s)
}

// checkTCP refuses a connection in a network namespace that the task does not
// have. All others can be captured.
func (i *inspection) checkTCP(pid, fd, s int) error {
	peer, err := unix.Getpeername(s)
	if errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.EINVAL) {
		return nil // listening, or closed
	}
	if err != nil {
		return fmt.Errorf("getpeername: %w", err)
	}
	own, err := unix.Getsockname(s)
	if err != nil {
		return fmt.Errorf("getsockname: %w", err)
	}
	_, err = i.networkOf(s)
	if errors.Is(err, errUnknownNetwork) {
		i.refuse(pid, fmt.Sprintf("has a TCP connection (descriptor %d, %s to %s) that was made outside of the task", fd, addrPort(own), addrPort(peer)),
			"close it before the checkpoint")
		return nil
	}
	return err
}

// networkOf finds the network namespace of a socket (ioctl SIOCGSKNS gives a
// descriptor of it).
func (i *inspection) networkOf(s int) (*network, error) {
	ns, err := unix.IoctlRetInt(s, unix.SIOCGSKNS)
	if err != nil {
		return nil, fmt.Errorf("SIOCGSKNS: %w", err)
	}
	defer unix.Close(ns)
	var st unix.Stat_t
	if err := unix.Fstat(ns, &st); err != nil {
		return nil, err
	}
	if n := i.network(st.Ino); n != nil {
		return n, nil
	}
	return nil, errUnknownNetwork
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
	}
	return netip.AddrPort{}
}

// unixSocket is a unix socket held by a process of the task.
type unixSocket struct {
	pid, fd int
	inode   uint32
}

func (i *inspection) noteUnix(pid, fd, s int) error {
	var st unix.Stat_t
	if err := unix.Fstat(s, &st); err != nil {
		return err
	}
	_, err := i.networkOf(s)
	outside := errors.Is(err, errUnknownNetwork)
	if outside && pid == i.request.Pid && i.request.ControlledInit {
		return nil
	}
	i.unixOwned = append(i.unixOwned, unixSocket{pid, fd, uint32(st.Ino)})
	if outside {
		i.refuse(pid, fmt.Sprintf("has a unix socket (descriptor %d) that was made outside of the task", fd), "close it before the checkpoint")
	}
	return nil
}

// checkUnixPeers refuses unix sockets whose other end nobody in the task holds.
func (i *inspection) checkUnixPeers() error {
	owned := map[uint32]bool{}
	for _, s := range i.unixOwned {
		owned[s.inode] = true
	}
	sockets := map[uint32]unixDiagEntry{}
	for _, n := range i.nets {
		list, err := unixDiag(n)
		if err != nil {
			return fmt.Errorf("list unix sockets: %w", err)
		}
		for _, d := range list {
			sockets[d.inode] = d
		}
	}
	for _, s := range i.unixOwned {
		peer := sockets[s.inode].peer
		if peer == 0 || owned[peer] {
			continue
		}
		if _, ok := sockets[peer]; !ok {
			sockets[peer] = unixDiagEntry{name: outsideName(peer)}
		}
		to := cmp.Or(sockets[peer].name, sockets[s.inode].name, "an unnamed socket")
		i.refuse(s.pid, fmt.Sprintf("has a unix socket (descriptor %d) connected to %s, outside of the job", s.fd, to),
			"close it before the checkpoint")
	}
	return nil
}

// outsideName finds the name of a socket that is in none of the task's network
// namespaces: most likely it is in ours or in the machine's.
func outsideName(inode uint32) string {
	for _, path := range []string{"/proc/thread-self/ns/net", "/proc/1/ns/net"} {
		f, err := os.Open(path)
		if err != nil {
			continue // init may be shielded from us
		}
		list, _ := unixDiag(&network{file: f})
		f.Close()
		for _, d := range list {
			if d.inode == inode {
				return d.name
			}
		}
	}
	return ""
}
