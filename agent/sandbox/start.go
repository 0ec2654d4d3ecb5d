package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"dormouse/agent/sandbox/pid1"

	"golang.org/x/sys/unix"
)

// Start runs the command. It returns when the command has been executed, or
// why it could not be: errors.Is knows ErrCommandNotFound and ErrBadRequest. On
// failure no process and nothing in the upper layer is left.
func (s *Sandbox) Start(ctx context.Context) error {
	if s.Pid() != 0 {
		return fmt.Errorf("the sandbox %s was started before", s.ID())
	}
	setup, err := s.setup()
	if err != nil {
		return err
	}
	err = take(ctx, []step{
		{do: s.fillUpper, undo: s.emptyUpper},
		{do: func(ctx context.Context) error { return s.launch(ctx, setup) }, undo: s.unlaunch},
	})
	if err != nil {
		return err
	}
	s.runtime.log.Info("sandbox started", "sandbox", s.ID(), "pid", s.Pid())
	return nil
}

// Bounds of a job's secret, in bytes.
const minSecret, maxSecret = 16, 256

// setup translates Config into what pid 1 is told.
func (s *Sandbox) setup() (*pid1.Setup, error) {
	cfg := &s.state.Config
	added, err := capabilityNumbers(cfg.CapAdd)
	if err != nil {
		return nil, err
	}
	resolv, err := os.ReadFile("/etc/resolv.conf")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cannot copy the node's resolv.conf: %w", err)
	}
	if n := len(cfg.Secret); cfg.tasks() > 1 && (n < minSecret || n > maxSecret) {
		return nil, refuse("the tasks of a job need a secret of %d to %d bytes, and this has %d", minSecret, maxSecret, n)
	}
	setup := &pid1.Setup{
		Hostname: cfg.Hostname, Target: s.rootDir(), Overlay: s.overlay(),
		Hosts: hostsFile(cfg), ResolvConf: string(resolv), TmpBytes: cfg.TmpBytes,
		Command: s.command(), Env: s.environment(), RootEnv: cfg.rootEnv(), WorkDir: cfg.WorkDir, User: cfg.User,
		Capabilities: capabilities(added, s.state.Cgroup.Devices), Ambient: added,
		JobRun: cfg.Run,
	}
	if cfg.tasks() > 1 {
		setup.Remote, setup.Secret = cfg.VirtualIP, cfg.Secret
	}
	if setup.Hostname == "" {
		setup.Hostname = "task-0"
	}
	for _, v := range cfg.Volumes {
		setup.Volumes = append(setup.Volumes, pid1.Volume(v))
	}
	if image := s.state.Image; image != nil {
		if setup.WorkDir == "" && image.WorkDir != "" {
			setup.WorkDir, setup.MakeWorkDir = image.WorkDir, true
		}
		if setup.User == "" {
			setup.User = image.User
		}
	}
	return setup, nil
}

// environment merges, the later ones winning, the image's variables, those that
// name the job and its tasks, those of the CPU baseline, and the user's.
func (s *Sandbox) environment() []string {
	merged := map[string]string{}
	if s.state.Image != nil {
		for _, entry := range s.state.Image.Env {
			if key, value, ok := strings.Cut(entry, "="); ok && key != "" {
				merged[key] = value
			}
		}
	}
	// The level was validated by Create.
	limits, _ := baselineEnv(s.state.Config.CPUBaseline)
	cfg := &s.state.Config
	for _, vars := range []map[string]string{cfg.launcherEnv(), cfg.jobEnv(), limits, cfg.Env} {
		for key, value := range vars {
			merged[key] = value
		}
	}
	env := make([]string, 0, len(merged))
	for key, value := range merged {
		env = append(env, key+"="+value)
	}
	slices.Sort(env)
	return env
}

func hostsFile(cfg *Config) string {
	var file strings.Builder
	file.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	for _, host := range cfg.Hosts {
		fmt.Fprintf(&file, "%s\t%s\n", host.IP, host.Name)
	}
	return file.String()
}

// fillUpper puts into the upper layer what a fresh sandbox has there.
func (s *Sandbox) fillUpper(context.Context) error {
	if err := s.matchRoot(); err != nil {
		return err
	}
	if err := hideNode(s.UpperDir(), s.state.Lower, s.hidden()); err != nil {
		return err
	}
	if s.state.Lower == "/" {
		if err := freshRun(s.UpperDir()); err != nil {
			return err
		}
	}
	if err := plantInit(s.UpperDir(), s.runtime.options.Init); err != nil {
		return err
	}
	return s.writeHostFiles()
}

// matchRoot gives "/" of the sandbox the owner and mode it has in the root.
func (s *Sandbox) matchRoot() error {
	var stat syscall.Stat_t
	err := syscall.Stat(s.state.Lower, &stat)
	if err == nil {
		err = syscall.Chown(s.UpperDir(), int(stat.Uid), int(stat.Gid))
	}
	if err == nil {
		err = syscall.Chmod(s.UpperDir(), stat.Mode&0o7777)
	}
	if err != nil {
		return fmt.Errorf("cannot make the sandbox's root like %s: %w", s.state.Lower, err)
	}
	return nil
}

// hidden are the node's directories that no task may see.
func (s *Sandbox) hidden() []string {
	dirs := append(slices.Clone(s.runtime.options.Hide), s.dir)
	// An unpacked image lies in the directory of images, and is to be seen.
	if images := s.runtime.options.Images; images != "" && !within(s.state.Lower, images) {
		dirs = append(dirs, images)
	}
	return slices.DeleteFunc(dirs, func(dir string) bool { return within(s.state.Lower, dir) })
}

// emptyUpper takes fillUpper back, and what a failed birth has written.
func (s *Sandbox) emptyUpper(context.Context) error {
	var errs []error
	for _, dir := range []string{"upper", "work"} {
		entries, err := os.ReadDir(filepath.Join(s.dir, dir))
		errs = append(errs, err)
		for _, entry := range entries {
			errs = append(errs, os.RemoveAll(filepath.Join(s.dir, dir, entry.Name())))
		}
	}
	return errors.Join(errs...)
}

// launch clones pid 1 into its namespaces and cgroups and sees it through its
// set-up.
func (s *Sandbox) launch(ctx context.Context, setup *pid1.Setup) error {
	content, err := json.Marshal(setup)
	if err != nil {
		return fmt.Errorf("cannot tell pid 1 what to do: %w", err)
	}
	network, err := s.runtime.MakeNetwork(s.state.Config)
	if err != nil {
		return err
	}
	defer network.Close()
	if err := s.runtime.Connect(ctx, s.state.Config, network); err != nil {
		return err
	}
	group, err := os.Open(s.CgroupPath())
	if err != nil {
		return fmt.Errorf("cannot open the cgroup: %w", err)
	}
	defer group.Close()
	setupRead, setupWrite, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("cannot make a pipe to pid 1: %w", err)
	}
	defer setupRead.Close()
	defer setupWrite.Close()
	statusRead, statusWrite, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("cannot make a pipe to pid 1: %w", err)
	}
	defer statusRead.Close()
	defer statusWrite.Close()

	child, err := os.StartProcess(s.runtime.options.Init, []string{"dormouse-init", "setup"}, &os.ProcAttr{
		Dir:   "/",
		Env:   []string{},
		Files: []*os.File{nil, nil, nil, pid1.SetupFD: setupRead, pid1.StatusFD: statusWrite, pid1.NetNSFD: network},
		Sys: &syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
			Setsid:      true,
			UseCgroupFD: true,
			CgroupFD:    int(group.Fd()),
		},
	})
	if err != nil {
		return fmt.Errorf("cannot start pid 1 of sandbox %s: %w", s.ID(), err)
	}
	// From here on it is waited for by pidfd, as after a restart of the agent.
	pid := child.Pid
	_ = child.Release()
	setupRead.Close()
	statusWrite.Close()
	init, err := s.take(pid, network)
	if err != nil {
		return err
	}
	s.adopt(init)
	// It does nothing before it has been told everything, so by then it is in
	// all its cgroups and on record.
	if err := s.state.Cgroup.EnterV1(pid); err != nil {
		return err
	}
	if err := s.save(ctx); err != nil {
		return err
	}
	_, err = setupWrite.Write(content)
	if err := errors.Join(err, setupWrite.Close()); err != nil && !errors.Is(err, syscall.EPIPE) {
		return fmt.Errorf("cannot tell pid 1 what to do: %w", err)
	}
	return s.born(ctx, statusRead)
}

// first is a hold on a sandbox's pid 1, with what tells how to find it again.
type first struct {
	process *process
	began   uint64
	boot    string
	netns   uint64
}

// take takes hold of pid 1, which is in a network namespace.
func (s *Sandbox) take(pid int, network *os.File) (f *first, err error) {
	f = &first{}
	if f.process, err = openProcess(pid, 0); err != nil {
		return nil, fmt.Errorf("cannot take hold of pid 1 of sandbox %s: %w", s.ID(), err)
	}
	if f.began, err = startTimeOf(pid); err == nil {
		f.boot, err = bootID()
	}
	if err == nil {
		f.netns, err = inodeOf(network)
	}
	if err != nil {
		return nil, errors.Join(err, f.process.Close())
	}
	return f, nil
}

// adopt makes it the sandbox's.
func (s *Sandbox) adopt(f *first) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.process = f.process
	s.state.Pid, s.state.StartTime, s.state.Boot, s.state.NetNS = f.process.pid, f.began, f.boot, f.netns
}

func inodeOf(file *os.File) (uint64, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &stat); err != nil {
		return 0, fmt.Errorf("cannot identify the network namespace: %w", err)
	}
	return stat.Ino, nil
}

// born waits for pid 1's report.
func (s *Sandbox) born(ctx context.Context, status *os.File) error {
	stop := context.AfterFunc(ctx, func() { _ = status.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	content, err := io.ReadAll(status)
	if ctx.Err() != nil {
		return fmt.Errorf("the start of sandbox %s was given up: %w", s.ID(), context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("cannot learn whether sandbox %s started: %w", s.ID(), err)
	}
	var report pid1.Report
	if err := json.Unmarshal(content, &report); err != nil {
		return fmt.Errorf("pid 1 of sandbox %s ended before the command ran%s", s.ID(), s.initLog())
	}
	if report.Failure != nil {
		return failure(report.Failure)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.MountPoints = report.Volumes
	return s.save(ctx)
}

// initLog quotes the last thing pid 1 complained about.
func (s *Sandbox) initLog() string {
	file, err := openInside(s.UpperDir(), filepath.Join(pid1.Directory, pid1.InitLogFile))
	if err != nil {
		return ""
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, 4096))
	line, _, _ := strings.Cut(strings.TrimSpace(string(content)), "\n")
	if err != nil || line == "" {
		return ""
	}
	return ": " + line
}

// failure translates what pid 1 says into this package's errors.
func failure(f *pid1.Failure) error {
	switch f.Kind {
	case pid1.KindNotFound:
		return &requestError{ErrCommandNotFound, f.Message}
	case pid1.KindRequest:
		return &requestError{ErrBadRequest, f.Message}
	}
	return errors.New(f.Message)
}

// unlaunch ends what launch has begun.
func (s *Sandbox) unlaunch(ctx context.Context) error {
	if err := s.killAll(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.Pid, s.state.StartTime, s.state.NetNS = 0, 0, 0
	return s.save(ctx)
}

// killAll ends every process of the sandbox and waits until they are gone.
func (s *Sandbox) killAll(ctx context.Context) error {
	if _, err := os.Stat(s.CgroupPath()); errors.Is(err, os.ErrNotExist) {
		return s.release(ctx)
	}
	if err := s.state.Cgroup.KillAll(ctx); err != nil {
		return fmt.Errorf("the processes of sandbox %s do not end: %w", s.ID(), err)
	}
	return s.release(ctx)
}

// release waits for pid 1, which frees its number, and lets go of it.
func (s *Sandbox) release(ctx context.Context) error {
	s.mu.Lock()
	p := s.process
	s.process = nil
	s.mu.Unlock()
	if p == nil {
		return nil
	}
	return errors.Join(p.wait(ctx), p.Close())
}
