package agent

import (
	"fmt"

	"github.com/vishvananda/netlink"
)

// raiseLoopback sets the loopback device of the agent's network namespace up.
// A virtual node's namespace is new, so there it is down, and CRIU tries the
// kernel's TCP features over it.
func raiseLoopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the loopback device: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set the loopback device up: %w", err)
	}
	return nil
}
