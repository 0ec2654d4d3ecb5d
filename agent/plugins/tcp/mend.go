package tcp

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// mend corrects what the kernel computes for a connection when CRIU makes it,
// before CRIU can say what was agreed upon with the peer (tcp(7), TCP_REPAIR):
//
//   - Segments stay as small as without an agreement, 536 bytes, until the path's
//     MTU changes, which it does not.
//   - Where window scaling was not agreed upon, windows are told to the peer scaled
//     all the same: 64 KiB as 4 bytes.
//
// It is called while the socket is in repair mode.
func mend(fd int) error {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return fmt.Errorf("TCP_INFO: %w", err)
	}
	const established, scaled = 1, 4 // TCP_ESTABLISHED, TCPI_OPT_WSCALE
	if info.State != established {
		return nil
	}
	if info.Options&scaled == 0 {
		// Agreed upon is now a scale of 1 in both directions, which is the same as none.
		err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_OPTIONS, string([]byte{3, 0, 0, 0, 0, 0, 0, 0}))
		if err != nil {
			return fmt.Errorf("TCP_REPAIR_OPTIONS: %w", err)
		}
	}
	// With no IP options given, all it does is to compute the size of segments
	// again. On a connection over IPv6, which the job's network has not, it does
	// nothing.
	err = unix.SetsockoptString(fd, unix.IPPROTO_IP, unix.IP_OPTIONS, "")
	if err != nil && !errors.Is(err, unix.ENOPROTOOPT) {
		return fmt.Errorf("IP_OPTIONS: %w", err)
	}
	return nil
}
