package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process is a hold on a process by pidfd, which cannot come to mean another
// one. It need not be a child of the agent.
type process struct {
	pid  int
	file *os.File // the pidfd, non-blocking, so that the runtime's poller waits
}

// errGone means that the process looked for does not exist any more.
var errGone = errors.New("the process is gone")

// openProcess takes hold of process pid if it started at startTime (0: any).
func openProcess(pid int, startTime uint64) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err == unix.ESRCH {
		return nil, errGone
	}
	if err != nil {
		return nil, fmt.Errorf("cannot take hold of process %d: %w", pid, err)
	}
	p := &process{pid: pid, file: os.NewFile(uintptr(fd), "pidfd")}
	// After the hold: from now on the number cannot be given to another.
	began, err := startTimeOf(pid)
	if err == nil && startTime != 0 && began != startTime {
		err = errGone
	}
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func (p *process) Close() error { return p.file.Close() }

// ended reports whether the process has exited.
func (p *process) ended() bool {
	raw, err := p.file.SyscallConn()
	if err != nil {
		return false
	}
	ended := false
	_ = raw.Control(func(fd uintptr) { ended = readable(fd) })
	return ended
}

// wait returns when the process has exited. As its parent, it also takes its
// status, so that no zombie stays.
func (p *process) wait(ctx context.Context) error {
	fd, err := p.duplicate()
	if err != nil {
		return fmt.Errorf("cannot wait for process %d: %w", p.pid, err)
	}
	// Each wait polls a descriptor of its own, as deadlines belong to files.
	file := os.NewFile(uintptr(fd), "pidfd")
	defer file.Close()
	raw, err := file.SyscallConn()
	if err != nil {
		return fmt.Errorf("cannot wait for process %d: %w", p.pid, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := raw.Read(readable); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("cannot wait for process %d: %w", p.pid, err)
	}
	// ECHILD: somebody else's child, or taken already.
	_ = raw.Control(func(fd uintptr) { _ = unix.Waitid(unix.P_PIDFD, int(fd), nil, unix.WEXITED|unix.WNOHANG, nil) })
	return nil
}

func (p *process) duplicate() (int, error) {
	raw, err := p.file.SyscallConn()
	if err != nil {
		return -1, err
	}
	var fd int
	var failed error
	if err := raw.Control(func(own uintptr) { fd, failed = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return -1, err
	}
	return fd, failed
}

// readable: pidfd_open(2), "the file descriptor is readable when the process
// terminates".
func readable(fd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1
}

// signal sends a signal to this process and no other.
func (p *process) signal(sig unix.Signal) error {
	raw, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return err
	}
	return failed
}

// startTimeOf reads field 22 of /proc/PID/stat, in clock ticks since boot.
func startTimeOf(pid int) (uint64, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, errGone
	}
	if err != nil {
		return 0, fmt.Errorf("cannot tell when process %d began: %w", pid, err)
	}
	// The second field is the name, in parentheses, with any characters.
	text := string(content)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("cannot tell when process %d began from %q", pid, text)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}
