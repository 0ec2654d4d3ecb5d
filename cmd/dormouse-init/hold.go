package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"dormouse/internal/emptyroot"
)

// bare is the argument after `hold` that says: this process has a mount
// namespace of its own, and shall not keep anything in it mounted.
const bare = "--bare"

// hold keeps the namespaces it was started in alive until it is killed. It
// touches nothing, so that it can serve as the anchor of any namespace.
func hold(args []string) {
	if len(args) > 0 && args[0] == bare {
		if err := emptyroot.Enter(); err != nil {
			fmt.Fprintln(os.Stderr, "dormouse-init: cannot let go of the mounts:", err)
			os.Exit(1)
		}
	}
	for {
		// pause(2) returns after a caught signal only; the runtime catches some.
		_ = unix.Pause()
	}
}
