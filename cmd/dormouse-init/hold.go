package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// bare is the argument after `hold` that says: this process has a mount
// namespace of its own, and shall not keep anything in it mounted.
const bare = "--bare"

// hold keeps the namespaces it was started in alive until it is killed. It
// touches nothing, so that it can serve as the anchor of any namespace.
func hold(args []string) {
	if len(args) > 0 && args[0] == bare {
		if err := abandonMounts(); err != nil {
			fmt.Fprintln(os.Stderr, "dormouse-init: cannot let go of the mounts:", err)
			os.Exit(1)
		}
	}
	for {
		// pause(2) returns after a caught signal only; the runtime catches some.
		_ = unix.Pause()
	}
}

// abandonMounts leaves this mount namespace nothing but an empty root. What
// remained mounted here would stay so after everybody else has let go of it.
// pivot_root(2), "pivot_root(".", ".")".
func abandonMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("empty", "/proc", "tmpfs", unix.MS_RDONLY, "size=4k"); err != nil {
		return err
	}
	if err := unix.Chdir("/proc"); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return err
	}
	return unix.Unmount(".", unix.MNT_DETACH)
}
