package tcp

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// end ends connections of a task that stands still and is not cut off yet: the
// peer gets a reset and the program ECONNABORTED (sock_diag(7), SOCK_DESTROY). One
// that ended by itself meanwhile is no error.
func end(connections []connection) error {
	for _, c := range connections {
		if err := destroy(c); err != nil {
			return fmt.Errorf("end the connection from %v: %w", c, err)
		}
	}
	return nil
}

func destroy(c connection) error {
	diag, err := nl.GetNetlinkSocketAt(netns.NsHandle(c.namespace.Fd()), netns.None(), unix.NETLINK_INET_DIAG)
	if err != nil {
		return fmt.Errorf("reach the task's network namespace: %w", err)
	}
	defer diag.Close()
	request := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
	request.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_INET_DIAG: {Socket: diag}}
	request.AddData((*destroyed)(c.socket))
	_, err = request.Execute(unix.NETLINK_INET_DIAG, 0)
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
