package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"dormouse/agent/sandbox/cgroup"
	"dormouse/agent/sandbox/oci"
)

// Sandbox is one task's sandbox. Its methods may be called from several
// goroutines, except that Create, Start, the restore and Destroy are one after
// the other.
type Sandbox struct {
	runtime *Runtime
	dir     string
	madeDir bool // the directory is ours to remove

	mu      sync.Mutex
	state   state
	process *process // nil: not started, or already gone when opened
	status  *ExitStatus
	killed  bool // by Signal or Destroy

	link link // exec sessions and whether they may be connected
}

// state is what sandbox.json holds.
type state struct {
	Version int          `json:"version"`
	Config  Config       `json:"config"`
	Lower   string       `json:"lower"` // the overlay's lower layer
	Image   *oci.Config  `json:"image,omitempty"`
	Cgroup  cgroup.Group `json:"cgroup"`
	// MountPoints are where the volumes lie inside, links resolved.
	MountPoints []string `json:"mount_points,omitempty"`
	// Pid 1 in the agent's pid namespace, with what tells it from a later
	// process of that number.
	Pid       int    `json:"pid,omitempty"`
	StartTime uint64 `json:"start_time,omitempty"` // clock ticks since boot, proc_pid_stat(5) field 22
	Boot      string `json:"boot,omitempty"`       // random/boot_id
	NetNS     uint64 `json:"net_ns,omitempty"`     // inode of the network namespace
}

const stateFile = "sandbox.json"

// save writes the state so that a crash leaves the old one or the new one.
func (s *Sandbox) save(context.Context) error { return s.write(true) }

// note records the sandbox without waiting for the disk: no process, mount or cgroup
// outlives the machine.
func (s *Sandbox) note(context.Context) error { return s.write(false) }

func (s *Sandbox) write(durably bool) error {
	content, err := json.MarshalIndent(&s.state, "", "  ")
	if err != nil {
		return fmt.Errorf("cannot record the sandbox %s: %w", s.ID(), err)
	}
	if err := writeFileAtomically(filepath.Join(s.dir, stateFile), content, durably); err != nil {
		return fmt.Errorf("cannot record the sandbox %s: %w", s.ID(), err)
	}
	return nil
}

func writeFileAtomically(name string, content []byte, durably bool) error {
	draft, err := os.OpenFile(name+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = draft.Write(content)
	if err == nil && durably {
		err = draft.Sync()
	}
	if err := errors.Join(err, draft.Close()); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

func (s *Sandbox) load() error {
	content, err := os.ReadFile(filepath.Join(s.dir, stateFile))
	if err != nil {
		return fmt.Errorf("cannot read what the sandbox is: %w", err)
	}
	if len(content) == 0 {
		return fmt.Errorf("the machine crashed before the sandbox's record was on the disk: %w", fs.ErrNotExist)
	}
	if err := json.Unmarshal(content, &s.state); err != nil {
		return fmt.Errorf("the sandbox's record %s is damaged: %w", filepath.Join(s.dir, stateFile), err)
	}
	if s.state.Version != 1 {
		return fmt.Errorf("the sandbox's record %s is of version %d, which this agent does not know", filepath.Join(s.dir, stateFile), s.state.Version)
	}
	return nil
}

// ID is Config.ID.
func (s *Sandbox) ID() string { return s.state.Config.ID }

// Config is what the sandbox was made from.
func (s *Sandbox) Config() Config { return s.state.Config }

// Dir is the sandbox's directory.
func (s *Sandbox) Dir() string { return s.dir }

// UpperDir is the overlay's upper layer: every file that the task changed, and
// pid 1's own in .dormouse. Attributes to leave out of a copy: see KeepXattr.
func (s *Sandbox) UpperDir() string { return filepath.Join(s.dir, "upper") }

// LowerDir is the overlay's lower layer: "/" for a host root.
func (s *Sandbox) LowerDir() string { return s.state.Lower }

func (s *Sandbox) rootDir() string { return filepath.Join(s.dir, "root") }

// Pid is that of pid 1 in the agent's pid namespace; 0 before Start.
func (s *Sandbox) Pid() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state.Pid
}

// Running reports whether pid 1 was started and has not ended.
func (s *Sandbox) Running() bool {
	s.mu.Lock()
	p := s.process
	s.mu.Unlock()
	return p != nil && !p.ended()
}

// NetNS is the inode of the sandbox's network namespace: CRIU's name for it is
// "net[INODE]".
func (s *Sandbox) NetNS() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state.NetNS
}

// External is a mount that CRIU neither dumps nor makes: at a dump it is told
// "mnt[Mountpoint]:Key", at a restore "mnt[Key]:Source".
type External struct {
	Mountpoint string // inside the sandbox
	Key        string
	Source     string // on this node
}

// External lists the volumes.
func (s *Sandbox) External() []External {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []External
	for i, v := range s.state.Config.Volumes {
		at := filepath.Clean(v.Destination)
		if i < len(s.state.MountPoints) {
			at = s.state.MountPoints[i]
		}
		list = append(list, External{Mountpoint: at, Key: "volume-" + strconv.Itoa(i), Source: v.Source})
	}
	return list
}

// CgroupPath is the v2 cgroup's directory.
func (s *Sandbox) CgroupPath() string { return s.state.Cgroup.Unified }

// Pids are the sandbox's processes, in the agent's pid namespace.
func (s *Sandbox) Pids() ([]int, error) { return s.state.Cgroup.Pids() }

// Freeze stops all processes and returns when they have stopped.
func (s *Sandbox) Freeze(ctx context.Context) error {
	if err := s.state.Cgroup.Freeze(ctx); err != nil && !s.gone() {
		return fmt.Errorf("cannot freeze sandbox %s: %w", s.ID(), err)
	}
	return nil
}

// Thaw lets them go on.
func (s *Sandbox) Thaw(ctx context.Context) error {
	if err := s.state.Cgroup.Thaw(ctx); err != nil && !s.gone() {
		return fmt.Errorf("cannot thaw sandbox %s: %w", s.ID(), err)
	}
	return nil
}

// gone tells that there is no cgroup any more, and so no process of the
// sandbox: its node lost its power.
func (s *Sandbox) gone() bool {
	_, err := os.Stat(s.state.Cgroup.Unified)
	return errors.Is(err, os.ErrNotExist)
}

// Frozen reports whether Freeze was the last of the two.
func (s *Sandbox) Frozen() (bool, error) { return s.state.Cgroup.Frozen() }

// command is what will be executed; nothing when the task serves others.
func (s *Sandbox) command() []string {
	if s.state.Config.Serve {
		return nil
	}
	if image := s.state.Image; len(s.state.Config.Command) == 0 && image != nil {
		return append(append([]string{}, image.Entrypoint...), image.Cmd...)
	}
	return s.state.Config.Command
}

func bootID() (string, error) {
	content, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("cannot tell this boot of the machine from others: %w", err)
	}
	return strings.TrimSpace(string(content)), nil
}
