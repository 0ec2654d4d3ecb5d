package cgroup

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Group is one sandbox's set of cgroups. Its fields are all that is needed to
// find it again, so it may be stored as JSON.
type Group struct {
	Unified  string   `json:"unified"`             // the v2 directory
	V1       []string `json:"v1,omitempty"`        // directories in v1 hierarchies
	MemoryV2 bool     `json:"memory_v2,omitempty"` // memory is limited by v2
	Devices  bool     `json:"devices,omitempty"`   // only harmless device nodes can be opened
	Realtime bool     `json:"realtime,omitempty"`  // has a share of the real-time classes
}

// EnterV1 moves the process pid into the v1 cgroups only: for one that was
// born in the v2 cgroup.
func (g *Group) EnterV1(pid int) error {
	for _, dir := range g.V1 {
		if err := write(dir, "cgroup.procs", strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("cannot put process %d into the cgroup: %w", pid, err)
		}
	}
	return nil
}

// TaskFiles are the files through which a process that was born in the v2 cgroup
// moves itself into the v1 ones: cgroups(7), "writing the value 0".
func (g *Group) TaskFiles() []string {
	var files []string
	for _, dir := range g.V1 {
		files = append(files, filepath.Join(dir, "tasks"))
	}
	return files
}

// Contains reports whether pid is in the group's v2 cgroup.
func (g *Group) Contains(pid int) (bool, error) {
	pids, err := g.Pids()
	if err != nil {
		return false, err
	}
	for _, p := range pids {
		if p == pid {
			return true, nil
		}
	}
	return false, nil
}

// Pids lists the processes in the group, in the reader's pid namespace.
func (g *Group) Pids() ([]int, error) {
	file, err := os.Open(filepath.Join(g.Unified, "cgroup.procs"))
	if err != nil {
		return nil, fmt.Errorf("cannot list the processes of the cgroup: %w", err)
	}
	defer file.Close()
	var pids []int
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		pid, err := strconv.Atoi(lines.Text())
		if err != nil {
			return nil, fmt.Errorf("the cgroup %s lists %q as a process", g.Unified, lines.Text())
		}
		pids = append(pids, pid)
	}
	return pids, lines.Err()
}

// freezeAttempts bounds how often Freeze tries again for a better moment.
const freezeAttempts = 50

// Freeze stops every process of the group and returns when all have stopped.
// When ctx ends first, the group thaws again.
//
// A thread that waits in vfork(2) for its child to execute something counts as
// frozen, but a debugger, and so CRIU, cannot take hold of it. Such moments last
// some microseconds, so Freeze tries again; if it is always one, the group stays
// frozen as it is.
func (g *Group) Freeze(ctx context.Context) error {
	for attempt := 1; ; attempt++ {
		if err := write(g.Unified, "cgroup.freeze", "1"); err != nil {
			return err
		}
		if err := g.waitEvent(ctx, "frozen", "1"); err != nil {
			return errors.Join(fmt.Errorf("the processes could not be frozen: %w", err), write(g.Unified, "cgroup.freeze", "0"))
		}
		waiting := g.inVfork()
		if attempt == freezeAttempts || len(waiting) == 0 {
			return nil
		}
		if err := g.Thaw(ctx); err != nil {
			return err
		}
		letGo(waiting)
	}
}

// letGo gives vforked children a moment to execute their programs. There is no
// event for that, so it looks, for 10 ms at most.
func letGo(threads []string) {
	for range 100 {
		if !slices.ContainsFunc(threads, func(id string) bool { return threadState(id) == 'D' }) {
			return
		}
		time.Sleep(100 * time.Microsecond)
	}
}

// inVfork lists the threads of the frozen group that sleep uninterruptibly: of
// the reasons for that, only vfork counts as frozen.
func (g *Group) inVfork() []string {
	threads, err := os.ReadFile(filepath.Join(g.Unified, "cgroup.threads"))
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(strings.Fields(string(threads)), func(id string) bool { return !sleepsInVfork(id) })
}

// sleepsInVfork tells of a thread of a frozen group. One that enters vfork is
// counted as frozen an instant before it sleeps, which may be long when it has
// to wait for a processor; one that does not get there in time is taken for one.
func sleepsInVfork(thread string) bool {
	for attempt := range 1000 {
		if state := threadState(thread); state != 'R' {
			return state == 'D'
		}
		if attempt > 100 {
			time.Sleep(100 * time.Microsecond)
		} else {
			runtime.Gosched()
		}
	}
	return true
}

// threadState reads the state of a thread, which in proc_pid_stat(5) follows
// the name in parentheses; 0 when it is gone.
func threadState(thread string) byte {
	stat, err := os.ReadFile("/proc/" + thread + "/stat")
	end := bytes.LastIndexByte(stat, ')')
	if err != nil || end < 0 || len(stat) < end+3 {
		return 0
	}
	return stat[end+2]
}

// Thaw lets the processes of the group go on, and returns when they do.
func (g *Group) Thaw(ctx context.Context) error {
	if err := write(g.Unified, "cgroup.freeze", "0"); err != nil {
		return err
	}
	return g.waitEvent(ctx, "frozen", "0")
}

// Frozen reports whether the group is, or is being, frozen.
func (g *Group) Frozen() (bool, error) {
	value, err := os.ReadFile(filepath.Join(g.Unified, "cgroup.freeze"))
	if err != nil {
		return false, fmt.Errorf("cannot see whether the cgroup is frozen: %w", err)
	}
	return strings.TrimSpace(string(value)) == "1", nil
}

// Kill sends SIGKILL to every process of the group at once, frozen ones too.
func (g *Group) Kill() error {
	return write(g.Unified, "cgroup.kill", "1")
}

// killAgain is how long KillAll waits for processes to end before it looks again.
const killAgain = time.Second

// KillAll returns when every process of the group has ended. The kernel passes
// over a process whose first thread is being killed already; if that is because
// another of its threads calls execve(2) just then, the process lives on. So what
// is left after a while is killed again.
func (g *Group) KillAll(ctx context.Context) error {
	for {
		if err := g.Kill(); err != nil {
			return err
		}
		waiting, cancel := context.WithTimeout(ctx, killAgain)
		err := g.WaitEmpty(waiting)
		cancel()
		if err == nil || ctx.Err() != nil || waiting.Err() == nil {
			return err
		}
	}
}

// WaitEmpty returns when no process is left in the group.
func (g *Group) WaitEmpty(ctx context.Context) error {
	return g.waitEvent(ctx, "populated", "0")
}

// OOMKills counts the processes that the kernel killed because the group's
// memory was used up.
func (g *Group) OOMKills() (int64, error) {
	file := filepath.Join(g.Unified, "memory.events")
	if !g.MemoryV2 {
		file = ""
		for _, dir := range g.V1 {
			// Of the v1 hierarchies only memory's has this file.
			if name := filepath.Join(dir, "memory.oom_control"); exists(name) {
				file = name
			}
		}
	}
	if file == "" {
		return 0, nil
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return 0, fmt.Errorf("cannot count the out-of-memory kills: %w", err)
	}
	kills, _ := field(string(content), "oom_kill")
	return strconv.ParseInt(kills, 10, 64)
}

// Remove deletes the group's directories. The group must be empty; one that is
// gone already is no error.
func (g *Group) Remove(ctx context.Context) error {
	if exists(g.Unified) {
		if err := g.WaitEmpty(ctx); err != nil {
			return err
		}
	}
	for {
		err := g.removeDirs()
		// A v1 directory may stay busy for an instant after its last process is
		// gone, and v1 has no event for it.
		if !errors.Is(err, syscall.EBUSY) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (g *Group) removeDirs() error {
	var errs []error
	for _, dir := range append([]string{g.Unified}, g.V1...) {
		if g.Realtime {
			returnRealtime(dir)
		}
		if err := syscall.Rmdir(dir); err != nil && err != syscall.ENOENT {
			errs = append(errs, fmt.Errorf("cannot remove the cgroup %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}

// waitEvent returns when the key of cgroup.events has the value wanted. The
// kernel wakes a poll(2) for POLLPRI at every change of that file.
func (g *Group) waitEvent(ctx context.Context, key, want string) error {
	file, err := os.Open(filepath.Join(g.Unified, "cgroup.events"))
	if err != nil {
		return fmt.Errorf("cannot watch the cgroup: %w", err)
	}
	defer file.Close()
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("cannot watch the cgroup: %w", err)
	}
	defer unix.Close(wake)
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	// The write must be over before wake is closed and its number reused.
	defer func() {
		if !stop() {
			<-woken
		}
	}()
	content := make([]byte, 256)
	for {
		n, err := file.ReadAt(content, 0)
		if n == 0 && err != nil {
			return fmt.Errorf("cannot watch the cgroup: %w", err)
		}
		if value, ok := field(string(content[:n]), key); ok && value == want {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s did not become %s in %s: %w", key, want, g.Unified, context.Cause(ctx))
		}
		fds := []unix.PollFd{{Fd: int32(file.Fd()), Events: unix.POLLPRI}, {Fd: int32(wake), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
			return fmt.Errorf("cannot watch the cgroup: %w", err)
		}
	}
}

// field finds "key value" among lines.
func field(lines, key string) (string, bool) {
	for line := range strings.Lines(lines) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && name == key {
			return value, true
		}
	}
	return "", false
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}
