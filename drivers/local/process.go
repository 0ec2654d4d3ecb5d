package local

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// startedWith reports whether argument is among the process' arguments.
func startedWith(pid int, argument string) bool {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return false
	}
	return slices.ContainsFunc(bytes.Split(line, []byte{0}), func(a []byte) bool { return string(a) == argument })
}

// awaitExit returns when the process of a pidfd has ended, pidfd_open(2).
func awaitExit(pidfd int) {
	poll := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(poll, -1); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// startIn starts cmd in the cgroup of that directory and, unless it is nil, in a
// network namespace.
func startIn(cmd *exec.Cmd, cgroup string, namespace *os.File) error {
	place, err := os.Open(cgroup)
	if err != nil {
		return err
	}
	defer place.Close()
	cmd.Dir = "/"
	cmd.SysProcAttr.Setsid = true // a Ctrl-C at our terminal is not for it
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(place.Fd())
	if namespace == nil {
		return cmd.Start()
	}
	// A child is in the namespaces of the thread that it was started from.
	runtime.LockOSThread()
	ours, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer ours.Close()
	if err := unix.Setns(int(namespace.Fd()), syscall.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter its network namespace: %w", err)
	}
	err = cmd.Start()
	if back := unix.Setns(int(ours.Fd()), syscall.CLONE_NEWNET); back != nil {
		return errors.Join(err, fmt.Errorf("leave its network namespace: %w", back)) // locked: the thread is of no more use
	}
	runtime.UnlockOSThread()
	return err
}
