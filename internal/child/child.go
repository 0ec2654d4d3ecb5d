// Package child starts processes that do not outlive the one which started them,
// however that ends: the servers and daemons of a test that is killed.
package child

import (
	"errors"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// Start starts a command that gets the signal when this process ends. Waiting
// for it is the caller's.
//
// prctl(2), PR_SET_PDEATHSIG: the parent is the thread that made the child, not
// its process, and Go ends threads as it likes. So one thread makes the child and
// is kept until the child has ended.
func Start(command *exec.Cmd, signal syscall.Signal) error {
	if command.SysProcAttr == nil {
		command.SysProcAttr = &syscall.SysProcAttr{}
	}
	command.SysProcAttr.Pdeathsig = signal
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := command.Start()
		started <- err
		if err == nil {
			ended(command.Process.Pid)
		}
	}()
	return <-started
}

// ended returns when a child has ended, and leaves its status to whoever waits
// for that; or when that has been so quick that there is no such child any more.
func ended(pid int) {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
