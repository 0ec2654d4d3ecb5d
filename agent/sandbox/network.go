package sandbox

import (
	"context"
	"fmt"
	"net"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"dormouse/internal/thread"
)

// Network gives sandboxes their place on their job's network.
type Network interface {
	// Join puts devices into the network namespace of the sandbox id, in which
	// the loopback device is up and no process runs yet. When it returns, the
	// sandbox's address is there. What it did is for others to take back, after
	// the sandbox was destroyed or was not made.
	Join(ctx context.Context, id string, netns *os.File) error
}

// MakeNetwork makes the network namespace of a sandbox, for PrepareRestore. The
// sandbox need not be there yet. Without a Network the task's address is on the
// loopback device; with one, Connect is still to be called.
func (r *Runtime) MakeNetwork(cfg Config) (*os.File, error) {
	if r.options.Network == nil {
		return newNetwork(cfg.VirtualIP)
	}
	return newNetwork("")
}

// Connect puts a namespace that MakeNetwork has made on the network of the task's job.
func (r *Runtime) Connect(ctx context.Context, cfg Config, netns *os.File) error {
	if r.options.Network == nil {
		return nil
	}
	if err := r.options.Network.Join(ctx, cfg.ID, netns); err != nil {
		return fmt.Errorf("cannot connect sandbox %s to its network: %w", cfg.ID, err)
	}
	return nil
}

// newNetwork makes a network namespace with the loopback device up and, on it,
// virtualIP, if there is one. The namespace lives as long as the file or a
// process in it.
func newNetwork(virtualIP string) (*os.File, error) {
	var file *os.File
	err := thread.Spare(func() (err error) {
		file, err = enterNewNetwork(virtualIP)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cannot make the network namespace: %w", err)
	}
	return file, nil
}

// enterNewNetwork moves the calling thread.
func enterNewNetwork(virtualIP string) (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	if err := configure(virtualIP); err != nil {
		return nil, err
	}
	return os.Open("/proc/thread-self/ns/net")
}

func configure(virtualIP string) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	// CRIU cannot dump MPTCP sockets, which Go programs listen on by default;
	// with MPTCP off they get plain TCP. The file is missing where the kernel has no MPTCP.
	err = os.WriteFile("/proc/sys/net/mptcp/enabled", []byte("0"), 0)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	if virtualIP == "" {
		return nil
	}
	ip := net.ParseIP(virtualIP)
	bits := 128
	if v4 := ip.To4(); v4 != nil {
		ip, bits = v4, 32
	}
	return netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(bits, bits)}})
}
