package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"dormouse/agent/sandbox/pid1"

	"golang.org/x/sys/unix"
)

// ExitStatus is how a sandbox's command ended.
type ExitStatus struct {
	Code   int    // 128+signal when a signal ended it
	Signal string // SIGKILL, ...; empty when it exited by itself
	// OOMKilled: it was killed because the sandbox's memory was used up.
	OOMKilled bool
	Reason    string // for people; empty when the code says it all
}

// Wait returns when the sandbox has ended, with how.
func (s *Sandbox) Wait(ctx context.Context) (ExitStatus, error) {
	s.mu.Lock()
	p, status, started := s.process, s.status, s.state.Pid != 0
	s.mu.Unlock()
	if status != nil {
		return *status, nil
	}
	if !started {
		return ExitStatus{}, fmt.Errorf("the sandbox %s was never started", s.ID())
	}
	if p != nil {
		if err := p.wait(ctx); err != nil {
			return ExitStatus{}, fmt.Errorf("waiting for sandbox %s: %w", s.ID(), err)
		}
	}
	return s.settle(), nil
}

// settle works out the exit status of a sandbox whose pid 1 is gone.
func (s *Sandbox) settle() ExitStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.status != nil {
		return *s.status
	}
	exit, err := readExit(s.UpperDir())
	status := ExitStatus{Code: exit.Code}
	ownEnd := true
	switch {
	case errors.Is(err, os.ErrNotExist):
		// pid 1 writes how the command ended before it ends itself. It did not
		// come to that, and against its will only SIGKILL ends it.
		exit.Signal, ownEnd = syscall.SIGKILL, false
		status.Code = 128 + int(exit.Signal)
	case err != nil:
		status.Code = 1
		status.Reason = fmt.Sprintf("the command ended, but its record of how was spoiled: %v", err)
	}
	if exit.Signal != 0 {
		status.Signal = unix.SignalName(exit.Signal)
	}
	// The count is gone with a cgroup that was removed behind our back.
	kills, _ := s.state.Cgroup.OOMKills()
	switch {
	case exit.Signal == syscall.SIGKILL && kills > 0 && !s.killed:
		status.OOMKilled = true
		status.Reason = fmt.Sprintf("killed by the kernel because its memory limit of %d bytes was reached", s.state.Config.MemBytes)
	case kills > 0 && status.Code == 128+int(syscall.SIGKILL) && !s.killed: // as a shell says it of its child
		status.OOMKilled = true
		status.Reason = fmt.Sprintf("a process of it was killed by the kernel because the memory limit of %d bytes was reached", s.state.Config.MemBytes)
	case kills > 0 && status.Code != 0 && !s.killed && status.Reason == "":
		status.Reason = fmt.Sprintf("it failed after the kernel had killed %s because the memory limit of %d bytes was reached", processes(kills), s.state.Config.MemBytes)
	case !ownEnd && s.killed:
		status.Reason = "the sandbox was killed"
	case !ownEnd:
		status.Reason = "the sandbox's first process was killed from outside"
	}
	s.status = &status
	return status
}

func processes(n int64) string {
	if n == 1 {
		return "a process of it"
	}
	return fmt.Sprintf("%d processes of it", n)
}

func readExit(upper string) (pid1.Exit, error) {
	var exit pid1.Exit
	file, err := openInside(upper, filepath.Join(pid1.Directory, pid1.ExitFile))
	if err != nil {
		return exit, err
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, 4096))
	if err != nil {
		return exit, err
	}
	if err := json.Unmarshal(content, &exit); err != nil {
		return exit, fmt.Errorf("%s is damaged: %w", pid1.ExitFile, err)
	}
	return exit, nil
}

// openInside opens a regular file below the directory upper for reading. The
// task may have put anything there, so links out of it are not followed and
// nothing but a regular file is opened.
func openInside(upper, name string) (*os.File, error) {
	root, err := os.OpenRoot(upper)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	file, err := root.OpenFile(filepath.Clean(name)[1:], os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", name)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}
