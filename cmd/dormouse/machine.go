package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"dormouse/agent/criu"
)

// Below these amounts of free space checkpoints fail, or soon will.
const (
	scarceSpace  = 256 << 20
	littleSpace  = 4 << 30
	littleMemory = 1 << 30
)

// machine is the computer that doctor examines.
type machine struct {
	proc, cgroups string // mount points, so that tests can forge them
	uid           int
	state         string
	criu          criu.Options
	beside        string // the directory of the running program
}

func newMachine(getenv func(string) string, state string) (*machine, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find the running program: %w", err)
	}
	beside := filepath.Dir(program)
	options := criu.Options{Path: getenv("DORMOUSE_CRIU"), Logger: slog.New(slog.DiscardHandler)}
	if shim := filepath.Join(beside, shimName); fileExists(shim) {
		options.Shim = shim
	}
	return &machine{proc: "/proc", cgroups: "/sys/fs/cgroup", uid: os.Geteuid(), state: state, criu: options, beside: beside}, nil
}

// examine makes every check that makes sense for who calls it.
func (m *machine) examine(ctx context.Context) []finding {
	findings := []finding{m.root(), m.capabilities(), m.kernel(), m.tracing(), m.programs()}
	if m.uid == 0 {
		findings = append(findings, m.namespaces(ctx), m.overlay())
	}
	findings = append(findings, m.freezer(), m.limits(), m.space(), m.memory(), m.network())
	if m.uid == 0 {
		findings = append(findings, m.jobNetwork()...)
	}
	return append(findings, m.engine(ctx)...)
}

func (m *machine) root() finding {
	if m.uid == 0 {
		return finding{"root", verdictOK, "runs as root", ""}
	}
	return finding{"root", verdictFail, fmt.Sprintf("runs as user %d, but namespaces, cgroups and CRIU need root", m.uid), "run `sudo dormouse doctor`: most checks need root, too"}
}

// needed are the capabilities without which sandboxes or CRIU do not work.
var needed = []struct {
	bit  uint
	name string
}{
	{unix.CAP_SYS_ADMIN, "SYS_ADMIN"}, {unix.CAP_SYS_PTRACE, "SYS_PTRACE"}, {unix.CAP_NET_ADMIN, "NET_ADMIN"}, {unix.CAP_SYS_CHROOT, "SYS_CHROOT"},
	{unix.CAP_SETUID, "SETUID"}, {unix.CAP_SETGID, "SETGID"}, {unix.CAP_SETPCAP, "SETPCAP"}, {unix.CAP_KILL, "KILL"}, {unix.CAP_CHOWN, "CHOWN"},
	{unix.CAP_FOWNER, "FOWNER"}, {unix.CAP_DAC_OVERRIDE, "DAC_OVERRIDE"}, {unix.CAP_MKNOD, "MKNOD"},
}

func (m *machine) capabilities() finding {
	text, err := m.field("self/status", "CapEff:")
	if err != nil {
		return finding{"capabilities", verdictFail, err.Error(), "mount /proc"}
	}
	held, err := strconv.ParseUint(text, 16, 64)
	if err != nil {
		return finding{"capabilities", verdictFail, "cannot read " + text, ""}
	}
	missing := []string{}
	for _, capability := range needed {
		if held&(1<<capability.bit) == 0 {
			missing = append(missing, "CAP_"+capability.name)
		}
	}
	if len(missing) > 0 {
		return finding{"capabilities", verdictFail, "missing: " + strings.Join(missing, ", "), "run as root, in a container only as a privileged one"}
	}
	return finding{"capabilities", verdictOK, "all that sandboxes and CRIU need", ""}
}

func (m *machine) kernel() finding {
	release, err := os.ReadFile(filepath.Join(m.proc, "sys/kernel/osrelease"))
	if err != nil {
		return finding{"kernel", verdictFail, err.Error(), "mount /proc"}
	}
	text := strings.TrimSpace(string(release))
	major, minor := 0, 0
	fmt.Sscanf(text, "%d.%d", &major, &minor)
	// 5.14 brought cgroup.kill, by which a task ends as one.
	if major < 5 || major == 5 && minor < 14 {
		return finding{"kernel", verdictFail, "Linux " + text + " is too old", "use Linux 5.14 or newer"}
	}
	return finding{"kernel", verdictOK, "Linux " + text, ""}
}

func (m *machine) tracing() finding {
	scope, err := os.ReadFile(filepath.Join(m.proc, "sys/kernel/yama/ptrace_scope"))
	if err == nil && strings.TrimSpace(string(scope)) == "3" {
		return finding{"ptrace", verdictFail, "kernel.yama.ptrace_scope is 3: nothing can be captured until the next boot", "set it to 1 and reboot"}
	}
	return finding{"ptrace", verdictOK, "allowed", ""}
}

func (m *machine) programs() finding {
	if !fileExists(filepath.Join(m.beside, initName)) {
		return finding{"programs", verdictFail, fmt.Sprintf("%s is not in %s", initName, m.beside), "run `make build`, and install both programs into one directory"}
	}
	if m.criu.Shim == "" {
		return finding{"programs", verdictWarn, fmt.Sprintf("%s is not in %s: where root lacks CAP_SYS_RESOURCE, jobs of other users cannot be captured", shimName, m.beside), "run `make build`, and install it beside dormouse"}
	}
	return finding{"programs", verdictOK, fmt.Sprintf("%s and %s are in %s", initName, shimName, m.beside), ""}
}

// namespaces really makes the namespaces of a sandbox.
func (m *machine) namespaces(ctx context.Context) finding {
	probe := exec.CommandContext(ctx, "/proc/self/exe", "version")
	probe.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS | syscall.CLONE_NEWNET}
	if err := probe.Run(); err != nil {
		return finding{"namespaces", verdictFail, fmt.Sprintf("cannot make pid, mount, ipc, uts and net namespaces: %v", err), "run outside of a container, or in a privileged one"}
	}
	return finding{"namespaces", verdictOK, "pid, mount, ipc, uts, net", ""}
}

// overlay really mounts one over / with its upper layer where the state is.
func (m *machine) overlay() finding {
	parent := existingParent(m.state)
	if err := mountOverlay(parent); err != nil {
		return finding{"overlay", verdictFail, fmt.Sprintf("cannot mount an overlay with its upper layer in %s: %v", parent, err), "keep the state (--state) on ext4, xfs or btrfs, and load the kernel module overlay"}
	}
	return finding{"overlay", verdictOK, "upper layers can be kept in " + parent, ""}
}

// mountOverlay mounts in a namespace of a thread that ends with its goroutine,
// so nothing stays mounted.
func mountOverlay(parent string) error {
	dir, err := os.MkdirTemp(parent, ".dormouse-doctor-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, name := range []string{"upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			return err
		}
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread has changed
		result <- func() error {
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return err
			}
			if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
				return err
			}
			target := filepath.Join(dir, "root")
			options := fmt.Sprintf("lowerdir=/,upperdir=%s/upper,workdir=%s/work", dir, dir)
			if err := unix.Mount("overlay", target, "overlay", 0, options); err != nil {
				return err
			}
			return unix.Unmount(target, unix.MNT_DETACH)
		}()
	}()
	return <-result
}

// mounts lists the mount points of one type of file system with their options.
func (m *machine) mounts(kind string) (points []string, options [][]string) {
	content, err := os.ReadFile(filepath.Join(m.proc, "self/mounts"))
	if err != nil {
		return nil, nil
	}
	for _, line := range strings.Split(string(content), "\n") {
		// proc(5), /proc/PID/mounts as fstab(5): source, target, type, options.
		fields := strings.Fields(line)
		if len(fields) >= 4 && fields[2] == kind {
			points = append(points, fields[1])
			options = append(options, strings.Split(fields[3], ","))
		}
	}
	return points, options
}

func (m *machine) freezer() finding {
	points, _ := m.mounts("cgroup2")
	if len(points) == 0 {
		return finding{"cgroup v2", verdictFail, "is not mounted, but jobs are frozen and ended through it", "mount -t cgroup2 none /sys/fs/cgroup/unified"}
	}
	if m.uid != 0 {
		return finding{"cgroup v2", verdictOK, "at " + points[0], ""}
	}
	probe := filepath.Join(points[0], fmt.Sprintf("dormouse-doctor-%d", os.Getpid()))
	if err := os.Mkdir(probe, 0o755); err != nil {
		return finding{"cgroup v2", verdictFail, fmt.Sprintf("cannot make a cgroup: %v", err), "let root write below " + points[0]}
	}
	defer os.Remove(probe)
	for _, file := range []string{"cgroup.freeze", "cgroup.kill"} {
		if !fileExists(filepath.Join(probe, file)) {
			return finding{"cgroup v2", verdictFail, points[0] + " has no " + file, "use Linux 5.14 or newer"}
		}
	}
	return finding{"cgroup v2", verdictOK, "at " + points[0] + ", with freezer and kill", ""}
}

// limits finds out which hierarchy limits cpu and memory.
func (m *machine) limits() finding {
	found := map[string]string{}
	points, _ := m.mounts("cgroup2")
	for _, point := range points {
		controllers, _ := os.ReadFile(filepath.Join(point, "cgroup.controllers"))
		for _, controller := range strings.Fields(string(controllers)) {
			found[controller] = "v2"
		}
	}
	points, options := m.mounts("cgroup")
	for i := range points {
		for _, controller := range []string{"cpu", "memory"} {
			if found[controller] == "" && slices.Contains(options[i], controller) {
				found[controller] = "v1"
			}
		}
	}
	missing := []string{}
	for _, controller := range []string{"cpu", "memory"} {
		if found[controller] == "" {
			missing = append(missing, controller)
		}
	}
	if len(missing) > 0 {
		return finding{"limits", verdictFail, "no cgroup hierarchy limits " + strings.Join(missing, " and "), "mount the controllers, or enable them in cgroup.subtree_control"}
	}
	return finding{"limits", verdictOK, fmt.Sprintf("cpu by cgroup %s, memory by cgroup %s", found["cpu"], found["memory"]), ""}
}

func (m *machine) space() finding {
	parent := existingParent(m.state)
	stat := unix.Statfs_t{}
	if err := unix.Statfs(parent, &stat); err != nil {
		return finding{"disk", verdictFail, fmt.Sprintf("cannot look at %s: %v", parent, err), "choose another directory with --state"}
	}
	free := int64(stat.Bavail) * stat.Bsize
	detail := fmt.Sprintf("%s free in %s", humanSize(free), parent)
	switch {
	case free < scarceSpace:
		return finding{"disk", verdictFail, detail, "make room: checkpoints are stored there"}
	case free < littleSpace:
		return finding{"disk", verdictWarn, detail + ": only for small checkpoints", "make room, or choose another directory with --state"}
	}
	return finding{"disk", verdictOK, detail, ""}
}

func (m *machine) memory() finding {
	text, err := m.field("meminfo", "MemAvailable:")
	if err != nil {
		return finding{"memory", verdictWarn, err.Error(), ""}
	}
	kib, _ := strconv.ParseInt(text, 10, 64)
	available := kib << 10
	detail := humanSize(available) + " available"
	if available < littleMemory {
		return finding{"memory", verdictWarn, detail + ": images are captured to disk, which makes pauses longer", "give the machine more memory than its jobs use"}
	}
	return finding{"memory", verdictOK, detail + "; images are captured to memory as long as they fit", ""}
}

func (m *machine) network() finding {
	if !fileExists(filepath.Join(m.proc, "net/if_inet6")) {
		return finding{"network", verdictWarn, "no IPv6: jobs with IPv6 sockets from other machines cannot be restored here", "boot without ipv6.disable=1"}
	}
	mptcp, err := os.ReadFile(filepath.Join(m.proc, "sys/net/mptcp/enabled"))
	if err == nil && strings.TrimSpace(string(mptcp)) == "1" {
		return finding{"network", verdictOK, "IPv4 and IPv6; MPTCP, which CRIU cannot capture, is switched off inside sandboxes", ""}
	}
	return finding{"network", verdictOK, "IPv4 and IPv6", ""}
}

// engine looks for CRIU, tries it on a real process, and asks for its features.
func (m *machine) engine(ctx context.Context) []finding {
	const setup = "run `make setup`: it gets a CRIU that works here"
	libexec, err := os.MkdirTemp("", "dormouse-doctor-")
	if err != nil {
		return []finding{{"CRIU", verdictFail, fmt.Sprintf("make a directory for it: %v", err), ""}}
	}
	defer os.RemoveAll(libexec)
	options := m.criu
	options.Libexec = libexec
	engine, err := criu.New(ctx, options)
	if err != nil {
		return []finding{{"CRIU", verdictFail, err.Error(), setup}}
	}
	findings := []finding{{"CRIU", verdictOK, fmt.Sprintf("version %s at %s", engine.Version(), engine.Path()), ""}}
	if m.uid != 0 {
		return findings
	}
	if err := engine.Probe(ctx); err != nil {
		return append(findings, finding{"CRIU probe", verdictFail, err.Error(), setup})
	}
	findings = append(findings, finding{"CRIU probe", verdictOK, "a process with a listening TCP socket was dumped and restored", ""})
	features, err := engine.Features(ctx)
	if err != nil {
		return append(findings, finding{"CRIU features", verdictFail, err.Error(), setup})
	}
	for _, feature := range features {
		findings = append(findings, featureFinding(feature))
	}
	return findings
}

func featureFinding(feature criu.Feature) finding {
	switch {
	case feature.OK:
		return finding{feature.Name, verdictOK, firstOf(feature.Detail, "available"), ""}
	case feature.Needed:
		return finding{feature.Name, verdictFail, feature.Detail, ""}
	}
	return finding{feature.Name, verdictWarn, feature.Detail, ""}
}

// field reads the first word after a name at the beginning of a line.
func (m *machine) field(file, name string) (string, error) {
	content, err := os.ReadFile(filepath.Join(m.proc, file))
	if err != nil {
		return "", err
	}
	for _, line := range strings.Split(string(content), "\n") {
		if rest, ok := strings.CutPrefix(line, name); ok {
			if words := strings.Fields(rest); len(words) > 0 {
				return words[0], nil
			}
		}
	}
	return "", errors.New(filepath.Join(m.proc, file) + " does not say " + name)
}

// existingParent is dir, or the nearest directory above it that exists.
func existingParent(dir string) string {
	for !fileExists(dir) && dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
	}
	return dir
}
