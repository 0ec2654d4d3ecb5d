package sandbox

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"path/filepath"
	"strings"

	"dormouse/agent/sandbox/oci"
	"dormouse/api"
	"dormouse/internal/lazyregexp"
)

// Errors that a caller decides on. Each comes wrapped in a full sentence.
var (
	// ErrCommandNotFound means that the root has no such command.
	ErrCommandNotFound = errors.New("command not found")
	// ErrBadRequest means that the sandbox cannot be as it was asked for.
	ErrBadRequest = errors.New("bad request")
	// ErrBadImage means that an OCI image is unusable.
	ErrBadImage = oci.ErrBadImage
)

// Config says what a sandbox is to be.
type Config struct {
	// ID names the sandbox and its cgroup: letters, digits, '.', '_', '-'.
	ID string `json:"id"`
	// Dir is the sandbox's directory. It must not exist, and belongs wholly to
	// the sandbox.
	Dir string `json:"dir"`
	// Root is "host" (or empty), "dir:PATH", "oci:PATH", "oci:REFERENCE" or a
	// plain path; see ParseRoot.
	Root string `json:"root,omitempty"`
	// Command is executed as it stands. Empty means what an OCI image says.
	Command []string          `json:"command,omitempty"`
	Env     map[string]string `json:"env,omitempty"`
	// WorkDir must exist in the root. Empty means the image's, or "/".
	WorkDir string `json:"work_dir,omitempty"`
	// User is NAME, UID, NAME:GROUP or UID:GID of the root. Empty means the
	// image's, or root.
	User    string       `json:"user,omitempty"`
	CapAdd  []string     `json:"cap_add,omitempty"` // "NET_ADMIN" or "CAP_NET_ADMIN"
	Volumes []api.Volume `json:"volumes,omitempty"`
	// Confined is for jobs of users who must not reach what they could not reach
	// without Dormouse: see checkPath.
	Confined bool   `json:"confined,omitempty"`
	Hostname string `json:"hostname,omitempty"`
	Hosts    []Host `json:"hosts,omitempty"`
	// VirtualIP is the task's own address; empty leaves only the loopback one.
	VirtualIP string  `json:"virtual_ip,omitempty"`
	CPUs      float64 `json:"cpus,omitempty"`      // 0: no limit
	MemBytes  int64   `json:"mem_bytes,omitempty"` // 0: no limit
	// CPUBaseline is native (or empty), x86-64-v2, x86-64-v3 or x86-64-v4.
	CPUBaseline string `json:"cpu_baseline,omitempty"`
	TmpBytes    int64  `json:"tmp_bytes,omitempty"` // size of /tmp; 0: the kernel's default

	// Job, Task and Tasks are the job's id, the task's index and how many the
	// job has (0 counts as 1). The tasks of a job of several reach each other by
	// the names of Hosts, task-0 and so on, and start programs in each other.
	Job   string `json:"job,omitempty"`
	Task  int    `json:"task,omitempty"`
	Tasks int    `json:"tasks,omitempty"`
	// Run is which of the job's starts and restores a Start is.
	Run int64 `json:"run,omitempty"`
	// Slots is how many processes of a parallel program a task has room for; 0:
	// one per whole processor.
	Slots int `json:"slots,omitempty"`
	// Secret is the job's own: who knows it may start programs in its tasks. Start
	// needs it when there are several. It is kept inside the sandbox only.
	Secret []byte `json:"-"`
	// Serve is set for a task without a command: it serves what other tasks start
	// in it until it is killed. Signals other than SIGKILL do nothing to it.
	Serve bool `json:"serve,omitempty"`
}

// Host is one line of /etc/hosts.
type Host struct {
	Name string `json:"name"`
	IP   string `json:"ip"`
}

// Root is where a sandbox's root file system comes from.
type Root struct {
	Kind api.RootKind
	// Path is a directory (RootDir), or a path or registry reference (RootOCI).
	Path string
}

// ParseRoot understands the forms of Config.Root. A plain path is a directory
// of files or, when it holds one, an OCI image.
func ParseRoot(s string) (Root, error) {
	kind, rest, hasKind := strings.Cut(s, ":")
	switch {
	case s == "" || s == "host":
		return Root{Kind: api.RootHost, Path: "/"}, nil
	case filepath.IsAbs(s):
		if oci.IsImage(s) {
			return Root{Kind: api.RootOCI, Path: s}, nil
		}
		return Root{Kind: api.RootDir, Path: filepath.Clean(s)}, nil
	case hasKind && kind == "dir" && filepath.IsAbs(rest):
		return Root{Kind: api.RootDir, Path: filepath.Clean(rest)}, nil
	case hasKind && kind == "dir":
		return Root{}, refuse("the root %q must be an absolute path, as in dir:/srv/root", s)
	case hasKind && kind == "oci" && rest != "":
		return Root{Kind: api.RootOCI, Path: rest}, nil
	}
	return Root{}, refuse("the root %q is none of host, dir:PATH, oci:PATH, oci:REFERENCE or an absolute path", s)
}

var validID = lazyregexp.New(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// validate finds what is wrong with a Config without looking at the machine.
func (c *Config) validate() error {
	if !validID.MatchString(c.ID) {
		return refuse("the sandbox id %q must be 1 to 128 letters, digits, dots, dashes or underscores", c.ID)
	}
	if !filepath.IsAbs(c.Dir) || filepath.Clean(c.Dir) != c.Dir || strings.ContainsAny(c.Dir, `,:\`) {
		// These three characters separate and escape overlay mount options.
		return refuse("the sandbox directory %q must be a clean absolute path without comma, colon or backslash", c.Dir)
	}
	if math.IsNaN(c.CPUs) || c.CPUs < 0 || c.CPUs > 1<<16 {
		return refuse("%v processors cannot be given to a task", c.CPUs)
	}
	if c.MemBytes < 0 || c.MemBytes > 0 && c.MemBytes < minMemory {
		return refuse("%d bytes of memory are too few for a task: give at least %d", c.MemBytes, minMemory)
	}
	if c.TmpBytes < 0 {
		return refuse("the size of /tmp cannot be negative")
	}
	if len(c.Hostname) > 64 {
		return refuse("the host name %q is longer than the 64 bytes allowed", c.Hostname)
	}
	if c.VirtualIP != "" {
		if _, err := netip.ParseAddr(c.VirtualIP); err != nil {
			return refuse("the virtual address %q is not an IP address", c.VirtualIP)
		}
	}
	for name, value := range c.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.Contains(value, "\x00") {
			return refuse("%q is not the name of an environment variable, or its value holds a zero byte", name)
		}
	}
	if len(c.Command) > 0 && c.Command[0] == "" {
		return refuse("the command's name is empty")
	}
	for _, arg := range c.Command {
		if strings.Contains(arg, "\x00") {
			return refuse("the command holds a zero byte")
		}
	}
	if err := c.validateJob(); err != nil {
		return err
	}
	if _, err := baselineEnv(c.CPUBaseline); err != nil {
		return err
	}
	if _, err := capabilityNumbers(c.CapAdd); err != nil {
		return err
	}
	return c.validateVolumes()
}

// maxTasks and maxSlots bound a job's host files.
const maxTasks, maxSlots = 1 << 12, 1 << 16

func (c *Config) validateJob() error {
	switch {
	case c.Tasks < 0 || c.Tasks > maxTasks:
		return refuse("a job cannot have %d tasks: the most is %d", c.Tasks, maxTasks)
	case c.Task < 0 || c.Task >= c.tasks():
		return refuse("there is no task %d in a job of %d tasks", c.Task, c.tasks())
	case c.Slots < 0 || c.Slots > maxSlots:
		return refuse("a task cannot have %d slots: the most is %d", c.Slots, maxSlots)
	case c.tasks() > 1 && c.VirtualIP == "":
		return refuse("a task of a job of %d tasks needs an address of its own", c.tasks())
	case strings.ContainsAny(c.Job, "\x00"):
		return refuse("the job's id holds a zero byte")
	}
	return nil
}

// minMemory is what pid 1 and a small command need to start at all.
const minMemory = 8 << 20

func (c *Config) validateVolumes() error {
	seen := map[string]bool{}
	for _, v := range c.Volumes {
		to := filepath.Clean(v.Destination)
		switch {
		case !filepath.IsAbs(v.Source) || !filepath.IsAbs(v.Destination):
			return refuse("the volume %s:%s needs two absolute paths", v.Source, v.Destination)
		case to == "/" || to == "/.dormouse" || strings.HasPrefix(to, "/.dormouse/"):
			return refuse("a volume cannot be put on %s", v.Destination)
		case seen[to]:
			return refuse("two volumes are put on %s", to)
		}
		for _, own := range []string{"/proc", "/sys", "/dev"} {
			if to == own || strings.HasPrefix(to, own+"/") && own != "/dev" {
				return refuse("a volume cannot be put on %s: the sandbox has its own %s", v.Destination, own)
			}
		}
		seen[to] = true
	}
	return nil
}

// refuse makes an error for what the caller asked wrongly.
func refuse(format string, args ...any) error {
	return &requestError{ErrBadRequest, fmt.Sprintf(format, args...)}
}

// requestError is a full sentence that errors.Is knows as its kind.
type requestError struct {
	kind    error
	message string
}

func (e *requestError) Error() string { return e.message }
func (e *requestError) Unwrap() error { return e.kind }
