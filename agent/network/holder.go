package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"dormouse/agent/sandbox/cgroup"
)

// holder is the process that owns a router's namespace. Its cgroup is named
// after the network, so it is found without having been recorded.
type holder struct {
	group cgroup.Group
	child *exec.Cmd // set in the process that started it, which must reap it
}

func (m *Manager) holderOf(key Key) *holder {
	return &holder{group: cgroup.Group{Unified: filepath.Join(m.options.Cgroup, key.String())}}
}

// start runs argv in the router's namespace, a new one when there is none. The
// descriptors in files become 3, 4, ... there.
func (h *holder) start(router *namespace, log string, argv []string, files ...*os.File) error {
	if err := os.MkdirAll(h.group.Unified, 0o755); err != nil {
		return fmt.Errorf("make the holder's cgroup: %w", err)
	}
	place, err := os.Open(h.group.Unified)
	if err != nil {
		return fmt.Errorf("open the holder's cgroup: %w", err)
	}
	defer place.Close()
	output, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("open the holder's log: %w", err)
	}
	defer output.Close()
	child := exec.Command(argv[0], argv[1:]...)
	child.Env = []string{} // nothing of the agent's, such as tokens
	child.Dir = "/"
	child.Stderr = output
	child.ExtraFiles = files
	child.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		// Its own mounts, which it drops: the agent's would outlive the agent in it.
		Cloneflags:  syscall.CLONE_NEWNS,
		UseCgroupFD: true,
		CgroupFD:    int(place.Fd()),
	}
	if router == nil {
		child.SysProcAttr.Cloneflags |= syscall.CLONE_NEWNET
		err = child.Start()
	} else {
		err = within(router.file, child.Start)
	}
	if err != nil {
		return fmt.Errorf("start the network's holder: %w", err)
	}
	h.child = child
	spare(child.Process.Pid)
	return nil
}

// spare asks the kernel to end something else first when memory runs out:
// proc_pid_oom_score_adj(5). Only who has CAP_SYS_RESOURCE may.
func spare(pid int) {
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("-900"), 0)
}

// reap takes the status of a holder that has ended, so that no zombie stays.
func (h *holder) reap() {
	if h.child != nil {
		_ = h.child.Wait() // killed, as its status says
		h.child = nil
	}
}

// pidfd takes hold of the holder's process.
func (h *holder) pidfd() (*os.File, error) {
	pids, err := h.group.Pids()
	if err != nil {
		return nil, err
	}
	if len(pids) == 0 {
		return nil, errHolderGone
	}
	fd, err := unix.PidfdOpen(pids[0], unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("take hold of the network's holder: %w", err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// namespace opens the router's namespace; errHolderGone when nothing holds it.
func (h *holder) namespace() (*namespace, error) {
	pids, err := h.group.Pids()
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) || (err == nil && len(pids) == 0) {
		return nil, errHolderGone
	}
	if err != nil {
		return nil, err
	}
	file, err := OfProcess(pids[0])
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil, errHolderGone
	}
	if err != nil {
		return nil, fmt.Errorf("open the router's namespace: %w", err)
	}
	defer file.Close()
	return openNamespace(file)
}

var errHolderGone = errors.New("the process that holds the network is gone")

// alive reports whether the holder's process runs.
func (h *holder) alive() bool {
	pids, err := h.group.Pids()
	return err == nil && len(pids) > 0
}

// remove ends the holder, if there is one, and removes its cgroup.
func (h *holder) remove(ctx context.Context) error {
	if _, err := os.Stat(h.group.Unified); err == nil {
		if err := h.group.KillAll(ctx); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("end the network's holder: %w", err)
		}
		if err := h.group.Remove(ctx); err != nil {
			return fmt.Errorf("end the network's holder: %w", err)
		}
	}
	h.reap()
	return nil
}
