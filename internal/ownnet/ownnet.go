// Package ownnet gives tests, benchmarks and the demonstration a network
// namespace of their own, so that what they build is seen by no one, harms no
// one, and is gone with their last process.
package ownnet

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// entered marks a program that Enter has started again.
const entered = "DORMOUSE_OWN_NETWORK"

// Enter moves the whole program into a new network namespace that has nothing
// but the loopback device, which is up. It starts the program again, with the
// same process id, arguments and standard streams, so call it first in main or
// TestMain. In the program that was started again it does nothing. It needs root.
func Enter() error {
	if os.Getenv(entered) != "" {
		return os.Unsetenv(entered)
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	runtime.LockOSThread() // exec keeps the namespaces of the thread that calls it
	defer runtime.UnlockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("a network namespace of our own: %w", err)
	}
	if err := raiseLoopback(); err != nil {
		return fmt.Errorf("the loopback device of our own network namespace: %w", err)
	}
	err = unix.Exec(program, os.Args, append(os.Environ(), entered+"=1"))
	return fmt.Errorf("start %s again: %w", program, err)
}

// EnterIfRoot is Enter for tests of which some need no root: without it they run
// where they are.
func EnterIfRoot() error {
	if err := Enter(); !errors.Is(err, unix.EPERM) {
		return err
	}
	return nil
}

func raiseLoopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}
