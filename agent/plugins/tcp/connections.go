package tcp

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"dormouse/agent/criu"
	"dormouse/agent/plugins"
)

// States of a TCP socket in which it has a peer: include/net/tcp_states.h.
var connected = []uint8{
	netlink.TCP_ESTABLISHED, netlink.TCP_SYN_SENT, netlink.TCP_SYN_RECV, netlink.TCP_FIN_WAIT1,
	netlink.TCP_FIN_WAIT2, netlink.TCP_CLOSE_WAIT, netlink.TCP_LAST_ACK, netlink.TCP_CLOSING,
}

// connection is one that the task has.
type connection struct {
	Local, Remote netip.AddrPort
	leaves        bool // the job
	socket        *netlink.Socket
	namespace     *os.File
}

// String is for people: "10.64.0.1:40000 to 192.0.2.1:443".
func (c connection) String() string { return fmt.Sprintf("%v to %v", c.Local, c.Remote) }

// held reports whether a process has it. Otherwise it is the kernel's.
func (c connection) held() bool { return c.socket.INode != 0 }

// waits reports whether nobody has accepted it yet. Its peer may have closed it
// already. One that its own process has closed is in neither of these states.
func (c connection) waits() bool {
	return !c.held() && (c.socket.State == netlink.TCP_ESTABLISHED || c.socket.State == netlink.TCP_CLOSE_WAIT)
}

// unsettled reports whether it is the kernel's and the peer, in the job, counts
// on it.
func (c connection) unsettled() bool {
	if c.held() || c.leaves {
		return false
	}
	switch c.socket.State {
	case netlink.TCP_SYN_RECV, netlink.TCP_FIN_WAIT1, netlink.TCP_CLOSING, netlink.TCP_LAST_ACK:
		return true
	}
	return false
}

// seen is what a survey of a task found. It must be closed.
type seen struct {
	namespaces  []namespace
	connections []connection
}

// namespace is a network namespace of the task.
type namespace struct {
	inode uint64
	pid   int // of a process in it
	file  *os.File
}

func (s *seen) close() {
	for _, n := range s.namespaces {
		n.file.Close()
	}
}

// leaving are the connections that leave the job and that a process has.
func (s *seen) leaving() (list []connection) {
	for _, c := range s.connections {
		if c.leaves && c.held() {
			list = append(list, c)
		}
	}
	return list
}

func (s *seen) find(is func(connection) bool) (connection, bool) {
	if i := slices.IndexFunc(s.connections, is); i >= 0 {
		return s.connections[i], true
	}
	return connection{}, false
}

// survey lists all TCP connections of a task, those in network namespaces of its
// programs' own included.
func survey(t plugins.Task) (_ *seen, err error) {
	s := &seen{}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	for _, pid := range t.PIDs {
		if err := s.addNamespace(pid); err != nil && !gone(err) {
			return nil, fmt.Errorf("reach the network namespace of process %d: %w", pid, err)
		}
	}
	for _, n := range s.namespaces {
		found, err := used(n.pid)
		if err != nil && !gone(err) {
			return nil, err
		}
		// A process that is gone tells nothing of the others in its namespace.
		if !found && err == nil {
			continue
		}
		if err := s.addConnections(n.file, t.Networks); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *seen) addNamespace(pid int) error {
	path := fmt.Sprintf("/proc/%d/ns/net", pid)
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return err
	}
	if slices.ContainsFunc(s.namespaces, func(n namespace) bool { return n.inode == st.Ino }) {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	s.namespaces = append(s.namespaces, namespace{st.Ino, pid, f})
	return nil
}

// used reports whether a process's network namespace has a TCP socket that is
// connected or listens. It is much faster than a list of them, for which the
// kernel looks through the connections of all namespaces (proc(5), sockstat).
func used(pid int) (bool, error) {
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

// addConnections adds those of one network namespace.
func (s *seen) addConnections(namespace *os.File, job []netip.Prefix) error {
	handle, err := netlink.NewHandleAt(netns.NsHandle(namespace.Fd()), unix.NETLINK_INET_DIAG)
	if err != nil {
		return fmt.Errorf("reach the task's network namespace: %w", err)
	}
	defer handle.Close()
	var own map[netip.Addr]bool // read when it is needed: for most tasks it is not worth a part of the pause
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, err := whole(func() ([]*netlink.Socket, error) { return handle.SocketDiagTCP(family) })
		if err != nil {
			return fmt.Errorf("list the task's TCP sockets: %w", err)
		}
		for _, socket := range sockets {
			if !slices.Contains(connected, socket.State) {
				continue
			}
			c := connection{
				Local:  addrPort(socket.ID.Source, socket.ID.SourcePort),
				Remote: addrPort(socket.ID.Destination, socket.ID.DestinationPort),
				socket: socket, namespace: namespace,
			}
			if !stays(c.Remote.Addr(), job) {
				if own == nil {
					if own, err = addresses(namespace); err != nil {
						return err
					}
				}
				c.leaves = !own[c.Remote.Addr()]
			}
			s.connections = append(s.connections, c)
		}
	}
	return nil
}

// addresses are those of the namespace's devices.
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

// refusals name connections and, of each, the first process that has it. One
// that was closed meanwhile is in no way any more.
func refusals(pids []int, connections []connection) (list []criu.Refusal) {
	wanted := map[string]connection{} // by what a descriptor of it points to: "socket:[INODE]"
	for _, c := range connections {
		wanted[fmt.Sprintf("socket:[%d]", c.socket.INode)] = c
	}
	for _, pid := range slices.Sorted(slices.Values(pids)) {
		if len(wanted) == 0 {
			break
		}
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue // it has ended
		}
		for _, entry := range entries {
			link, err := os.Readlink(dir + "/" + entry.Name())
			c, found := wanted[link]
			if err != nil || !found {
				continue
			}
			delete(wanted, link)
			list = append(list, refusal(pid, entry.Name(), c))
		}
	}
	return list
}

func refusal(pid int, fd string, c connection) criu.Refusal {
	return criu.NewRefusal(pid, fmt.Sprintf("has a TCP connection that leaves the job, from %v (descriptor %s)", c, fd),
		"close it before the checkpoint")
}

// gone tells whether an error only says that a process has ended meanwhile.
func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) }
