package criu

import (
	"encoding/binary"
	"errors"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// unixDiagEntry is a unix socket as the kernel's sock_diag(7) tells it.
type unixDiagEntry struct {
	inode uint32
	peer  uint32 // inode of the other end, 0 if there is none
	name  string // path, @NAME if abstract, empty if unnamed
}

// unixDiagRequest is struct unix_diag_req of linux/unix_diag.h.
type unixDiagRequest struct{}

func (unixDiagRequest) Len() int { return 24 }

func (r unixDiagRequest) Serialize() []byte {
	const showName, showPeer = 1, 4
	b := make([]byte, r.Len())
	b[0] = unix.AF_UNIX
	binary.NativeEndian.PutUint32(b[4:], ^uint32(0)) // in all states
	binary.NativeEndian.PutUint32(b[12:], showName|showPeer)
	return b
}

// unixDiag lists the unix sockets of a network namespace.
func unixDiag(n *network) ([]unixDiagEntry, error) {
	s, err := nl.GetNetlinkSocketAt(netns.NsHandle(n.file.Fd()), netns.None(), unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_SOCK_DIAG: {Socket: s}}
	req.AddData(unixDiagRequest{})
	for try := 0; ; try++ {
		messages, err := req.Execute(unix.NETLINK_SOCK_DIAG, nl.SOCK_DIAG_BY_FAMILY)
		if errors.Is(err, netlink.ErrDumpInterrupted) && try < 3 {
			continue // sockets came and went: some may be missing
		}
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return nil, err
		}
		list := make([]unixDiagEntry, 0, len(messages))
		for _, m := range messages {
			if entry, ok := parseUnixDiag(m); ok {
				list = append(list, entry)
			}
		}
		return list, nil
	}
}

// parseUnixDiag reads struct unix_diag_msg and its attributes.
func parseUnixDiag(m []byte) (unixDiagEntry, bool) {
	const fixed, attributeName, attributePeer = 16, 0, 2
	if len(m) < fixed {
		return unixDiagEntry{}, false
	}
	entry := unixDiagEntry{inode: binary.NativeEndian.Uint32(m[4:])}
	attributes, err := nl.ParseRouteAttr(m[fixed:])
	if err != nil {
		return unixDiagEntry{}, false
	}
	for _, a := range attributes {
		switch {
		case a.Attr.Type == attributeName:
			entry.name = socketName(string(a.Value))
		case a.Attr.Type == attributePeer && len(a.Value) >= 4:
			entry.peer = binary.NativeEndian.Uint32(a.Value)
		}
	}
	return entry, true
}

// socketName shows an abstract address, which begins with a zero byte, as @NAME.
func socketName(name string) string {
	if rest, ok := strings.CutPrefix(name, "\x00"); ok {
		return "@" + rest
	}
	return strings.TrimRight(name, "\x00")
}
