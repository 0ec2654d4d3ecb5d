package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"dormouse/agent/sandbox/pid1"
)

// run is the second stage: it starts the command and ends with it. Without one
// it serves remote starts until it is killed.
func run() {
	syscall.CloseOnExec(pid1.StatusFD)
	status := os.NewFile(pid1.StatusFD, "status")
	family := newFamily()
	// A channel of its own: no flood of other signals may displace SIGCHLD.
	children, signals := make(chan os.Signal, 1), make(chan os.Signal, 64)
	signal.Notify(children, syscall.SIGCHLD)
	signal.Notify(signals)

	servers, exited, err := begin(family)
	if err != nil {
		report(status, pid1.Report{Failure: failureOf(err)})
		os.Exit(1)
	}
	report(status, pid1.Report{Volumes: servers.control.run.Volumes})
	servers.serve()

	for {
		select {
		case <-children:
			family.reap()
		case s := <-signals:
			family.forward(s.(syscall.Signal))
		case status := <-exited:
			finish(pid1.ExitOf(status))
		}
	}
}

// servers answer the agent, the programs of the task, and the job's other tasks.
type servers struct {
	control *control
	apps    *apps
	remote  *remote // nil in a job of one task
}

// serve answers for the life of the process.
func (s *servers) serve() {
	go s.control.serve()
	go s.apps.serve()
	go s.apps.readFifo()
	if s.remote != nil {
		go s.remote.serve()
	}
}

// begin listens, and then starts what the sandbox is for.
func begin(f *family) (*servers, <-chan syscall.WaitStatus, error) {
	content, err := os.ReadFile(inside(pid1.RunFile))
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the command: %w", err)
	}
	var cmd pid1.Run
	if err := json.Unmarshal(content, &cmd); err != nil {
		return nil, nil, fmt.Errorf("cannot understand the command: %w", err)
	}
	if err := reserveExit(); err != nil {
		return nil, nil, err
	}
	var s servers
	if s.apps, err = listenApps(cmd.JobRun); err != nil {
		return nil, nil, err
	}
	if s.control, err = listen(f, &cmd, s.apps); err != nil {
		return nil, nil, err
	}
	if s.remote, err = listenRemote(f, &cmd); err != nil {
		return nil, nil, err
	}
	if len(cmd.Command) == 0 {
		return &s, nil, nil
	}
	exited, err := startCommand(f, &cmd)
	return &s, exited, err
}

// startCommand starts the command with its output going to files.
func startCommand(f *family, cmd *pid1.Run) (<-chan syscall.WaitStatus, error) {
	var files []uintptr
	defer func() {
		for _, fd := range files {
			_ = syscall.Close(int(fd))
		}
	}()
	for _, f := range []struct {
		name  string
		flags int
	}{{"/dev/null", os.O_RDONLY}, {inside(pid1.StdoutFile), os.O_WRONLY | os.O_APPEND}, {inside(pid1.StderrFile), os.O_WRONLY | os.O_APPEND}} {
		fd, err := syscall.Open(f.name, f.flags|syscall.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("cannot open %s: %w", f.name, err)
		}
		files = append(files, uintptr(fd))
	}
	pid, exited, err := f.start(cmd, cmd.Path, cmd.Command, cmd.Env, files, false)
	f.command = pid
	return exited, err
}

// exitDraft becomes the exit file. It is written at the beginning, so that the
// end can be recorded on a full disk.
const exitDraft = pid1.ExitFile + ".new"

func reserveExit() error {
	if err := os.WriteFile(inside(exitDraft), bytes.Repeat([]byte(" "), 128), 0o600); err != nil {
		return fmt.Errorf("cannot make room for the exit status: %w", err)
	}
	return nil
}

// finish writes down how the command ended, and ends the sandbox: the kernel
// kills what is left of it.
func finish(exit pid1.Exit) {
	if err := record(exit); err != nil {
		fmt.Fprintln(os.Stderr, "cannot record the exit status:", err)
	}
	os.Exit(exit.Code)
}

func record(exit pid1.Exit) error {
	content, err := json.Marshal(exit)
	if err != nil {
		return err
	}
	draft, err := os.OpenFile(inside(exitDraft), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = draft.Write(content)
	if err := errors.Join(err, draft.Close()); err != nil {
		return err
	}
	return os.Rename(inside(exitDraft), inside(pid1.ExitFile))
}

// family are the processes of the sandbox as seen by their first ancestor.
type family struct {
	command int // pid of the command; 0 when there is none

	mu      sync.Mutex
	waiting map[int]chan<- syscall.WaitStatus
}

func newFamily() *family {
	return &family{waiting: map[int]chan<- syscall.WaitStatus{}}
}

// start executes file as run's user. The channel gets its status when it ends.
func (f *family) start(run *pid1.Run, file string, argv, env []string, files []uintptr, tty bool) (int, <-chan syscall.WaitStatus, error) {
	attr := &syscall.ProcAttr{Dir: run.WorkDir, Env: env, Files: files, Sys: &syscall.SysProcAttr{
		Setsid:     true,
		Setctty:    tty,
		Credential: &syscall.Credential{Uid: run.UID, Gid: run.GID, Groups: run.Groups},
	}}
	for _, c := range run.Ambient {
		attr.Sys.AmbientCaps = append(attr.Sys.AmbientCaps, uintptr(c))
	}
	// Held over the fork, so that reap cannot meet a child it does not know.
	f.mu.Lock()
	defer f.mu.Unlock()
	pid, err := syscall.ForkExec(file, argv, attr)
	if err != nil {
		return 0, nil, startError(argv[0], err)
	}
	exited := make(chan syscall.WaitStatus, 1)
	f.waiting[pid] = exited
	return pid, exited, nil
}

func startError(name string, err error) error {
	switch {
	case errors.Is(err, syscall.ENOENT):
		return pid1.NotFound("the command %s cannot be run: its interpreter or dynamic loader is not in the sandbox's root", name)
	case errors.Is(err, syscall.ENOEXEC):
		return pid1.NotFound("the command %s cannot be run: it is neither a program of this machine's kind nor a script that names its interpreter (#!)", name)
	case errors.Is(err, syscall.EACCES):
		return pid1.NotFound("the command %s cannot be run: permission denied", name)
	}
	return pid1.Refuse("the command %s cannot be run: %v", name, err)
}

// forward passes a signal that was sent to pid 1 on to the command it was
// meant for. What this process causes itself stays here.
func (f *family) forward(s syscall.Signal) {
	switch s {
	case syscall.SIGCHLD, syscall.SIGURG, syscall.SIGPIPE:
		// SIGURG is how Go's scheduler interrupts its own threads.
	default:
		// The command may be gone; its status is then on the way.
		_ = f.signal(s)
	}
}

// signal sends a signal to the command. A task without one takes it silently:
// what it serves belongs to other tasks, which pass on what they want to.
func (f *family) signal(s syscall.Signal) error {
	if f.command == 0 {
		return nil
	}
	return syscall.Kill(f.command, s)
}

// signalGroup sends a signal to the process group of a child that still lives.
func (f *family) signalGroup(pid int, s syscall.Signal) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, alive := f.waiting[pid]; alive {
		_ = syscall.Kill(-pid, s)
	}
}

// reap takes the status of every child that has ended: of our own and of the
// orphans that the kernel gave to pid 1. One SIGCHLD may stand for many.
func (f *family) reap() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid == 0 {
			return
		}
		if exited, ok := f.waiting[pid]; ok {
			exited <- status
			delete(f.waiting, pid)
		}
	}
}
