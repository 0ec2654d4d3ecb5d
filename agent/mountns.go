package agent

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// ownMounts marks a process that EnterMountNamespace has started.
const ownMounts = "DORMOUSE_OWN_MOUNTS"

// EnterMountNamespace gives the process a mount namespace of its own by
// starting the program again, so that whatever the agent mounts vanishes with
// it. Call it first; in the program that was started again it does nothing.
// Mounts that the machine makes later still appear.
func EnterMountNamespace() error {
	if os.Getenv(ownMounts) != "" {
		return os.Unsetenv(ownMounts)
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	runtime.LockOSThread() // namespaces belong to threads, and exec keeps the caller's
	defer runtime.UnlockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("a mount namespace for the agent: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("a mount namespace for the agent: %w", err)
	}
	environment := append(os.Environ(), ownMounts+"=1")
	if err := syscall.Exec(program, os.Args, environment); err != nil {
		return fmt.Errorf("start %s again: %w", strings.Join(os.Args, " "), err)
	}
	return nil
}
