package criu

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// child is one criu process.
//
// If CRIU is killed, the kernel lets the processes that it had stopped run on,
// with sockets they cannot use, before anybody could do something about it. So
// during a dump we trace CRIU itself, for one purpose: with PTRACE_O_TRACEEXIT
// a process that dies, from whatever cause, stops once more at the very
// beginning of its end, still holding everything (ptrace(2)). There we repair
// what it leaves behind, and then let it die. Should we die first, CRIU simply
// is no longer traced.
type child struct {
	pid    int
	exited chan struct{} // closed when the process is gone and reaped
	status string        // how it ended, valid after exited

	mu    sync.Mutex
	pidfd int // -1 after close
}

// startChild starts the command, which must not be waited for otherwise. dying
// may be nil: then the child is not traced.
func startChild(cmd *exec.Cmd, dying func()) (*child, error) {
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &child{pid: cmd.Process.Pid, exited: make(chan struct{})}
	// It cannot be reaped before attend does so: the number is still its own.
	var err error
	if c.pidfd, err = unix.PidfdOpen(c.pid, 0); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, fmt.Errorf("pidfd_open: %w", err)
	}
	_ = cmd.Process.Release()
	if dying != nil {
		// The machine's memory being short is no reason to lose a dump; refused
		// without CAP_SYS_RESOURCE.
		_ = os.WriteFile(procPath(c.pid, "oom_score_adj"), []byte("-1000"), 0)
	}
	ready := make(chan struct{})
	go c.attend(dying, ready)
	<-ready
	return c, nil
}

// kill ends the process by force.
func (c *child) kill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pidfd >= 0 {
		_ = unix.PidfdSendSignal(c.pidfd, unix.SIGKILL, nil, 0)
	}
}

// close waits for the child's end.
func (c *child) close() {
	<-c.exited
	c.mu.Lock()
	defer c.mu.Unlock()
	unix.Close(c.pidfd)
	c.pidfd = -1
}

// attend waits for the child's end and, if it is traced, passes its signals on.
// Tracing is bound to a thread, so this goroutine keeps its own.
func (c *child) attend(dying func(), ready chan<- struct{}) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if dying != nil {
		// On failure we merely notice CRIU's death later.
		_ = ptrace(unix.PTRACE_SEIZE, c.pid, unix.PTRACE_O_TRACEEXIT)
	}
	close(ready)
	defer close(c.exited)
	for {
		var ws unix.WaitStatus
		_, err := unix.Wait4(c.pid, &ws, unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			c.status = err.Error()
			return
		case ws.Exited():
			c.status = fmt.Sprintf("exit status %d", ws.ExitStatus())
			return
		case ws.Signaled():
			c.status = fmt.Sprintf("signal: %v", ws.Signal())
			return
		default:
			c.resume(ws, dying)
		}
	}
}

// resume lets a stopped, traced child go on.
func (c *child) resume(ws unix.WaitStatus, dying func()) {
	const eventShift = 16 // wait status: signal in bits 8 to 15, event above
	switch event := int(ws) >> eventShift; {
	case event == unix.PTRACE_EVENT_EXIT:
		dying()
		_ = ptrace(unix.PTRACE_CONT, c.pid, 0)
	case event == unix.PTRACE_EVENT_STOP && ws.StopSignal() != unix.SIGTRAP:
		_ = ptrace(unix.PTRACE_LISTEN, c.pid, 0) // stopped like any process
	case event != 0:
		_ = ptrace(unix.PTRACE_CONT, c.pid, 0)
	default:
		_ = ptrace(unix.PTRACE_CONT, c.pid, uintptr(ws.StopSignal()))
	}
}

func ptrace(request, pid int, data uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(pid), 0, data, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
