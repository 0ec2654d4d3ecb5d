package main

import (
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

// setup is the first stage. It never returns: it becomes the second stage, or
// reports its failure and exits.
func setup() {
	status := os.NewFile(pid1.StatusFD, "status")
	err := build()
	report(status, pid1.Report{Failure: failureOf(err)})
	os.Exit(1)
}

// build makes the sandbox around this process and executes the second stage.
func build() error {
	cfg, err := readSetup()
	if err != nil {
		return err
	}
	if err := unix.Setns(pid1.NetNSFD, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("cannot enter the network namespace: %w", err)
	}
	if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	// Volumes are taken hold of while the node's tree can still be seen.
	volumes, err := openVolumes(cfg.Volumes)
	if err != nil {
		return err
	}
	if err := enterRoot(cfg); err != nil {
		return err
	}
	if err := mountSystem(cfg); err != nil {
		return err
	}
	where, err := attachVolumes(volumes, cfg.Volumes)
	if err != nil {
		return err
	}
	if err := coverProc(); err != nil {
		return err
	}
	if err := writeIdentity(cfg); err != nil {
		return err
	}
	cmd, err := resolve(cfg)
	if err != nil {
		return err
	}
	cmd.Volumes = where
	if err := writeRun(cmd, cfg.Secret); err != nil {
		return err
	}
	return becomeInit(cfg)
}

func readSetup() (*pid1.Setup, error) {
	file := os.NewFile(pid1.SetupFD, "setup")
	defer file.Close()
	content, err := io.ReadAll(file)
	if err != nil {
		return nil, fmt.Errorf("cannot read what the agent wants: %w", err)
	}
	var cfg pid1.Setup
	if err := json.Unmarshal(content, &cfg); err != nil {
		return nil, fmt.Errorf("cannot understand what the agent wants: %w", err)
	}
	return &cfg, nil
}

// enterRoot mounts the overlay and makes it the root; nothing of the old tree
// stays reachable. Devices on it are inert: only /dev has live ones.
func enterRoot(cfg *pid1.Setup) error {
	if err := mount("overlay", cfg.Target, "overlay", unix.MS_NODEV, cfg.Overlay); err != nil {
		return err
	}
	if err := os.Chdir(cfg.Target); err != nil {
		return fmt.Errorf("cannot enter the root: %w", err)
	}
	// pivot_root(2), "pivot_root(".", ".")": the old root is stacked on the
	// new one and detached from there.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("cannot change the root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("cannot leave the old root: %w", err)
	}
	return os.Chdir("/")
}

const silent = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// mountSystem mounts what every program expects besides its root.
func mountSystem(cfg *pid1.Setup) error {
	type system struct {
		source, target, kind string
		flags                uintptr
		data                 string
	}
	mounts := []system{
		{"proc", "/proc", "proc", silent, ""},
		{"sysfs", "/sys", "sysfs", silent | unix.MS_RDONLY, ""},
	}
	for _, m := range pid1.TmpfsMounts(cfg.TmpBytes) {
		mounts = append(mounts, system{m.Source, m.Target, "tmpfs", m.Flags, m.Options})
	}
	mounts = append(mounts,
		system{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"})
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return fmt.Errorf("cannot make %s in the root: %w", m.target, err)
		}
		if err := mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
			return err
		}
	}
	return fillDev()
}

// fillDev makes the devices and links that every container has.
func fillDev() error {
	for name, minor := range map[string]uint32{"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9} {
		if err := device("/dev/"+name, 1, minor); err != nil {
			return err
		}
	}
	if err := device("/dev/tty", 5, 0); err != nil {
		return err
	}
	for name, target := range map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd",
		"stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, "/dev/"+name); err != nil {
			return fmt.Errorf("cannot make a link in /dev: %w", err)
		}
	}
	return nil
}

func device(name string, major, minor uint32) error {
	if err := unix.Mknod(name, unix.S_IFCHR|0o666, int(unix.Mkdev(major, minor))); err != nil {
		return fmt.Errorf("cannot make the device %s: %w", name, err)
	}
	// The mode given to mknod(2) is cut by the umask.
	return os.Chmod(name, 0o666)
}

// openVolumes takes a detached copy of each volume's mount.
func openVolumes(volumes []pid1.Volume) ([]int, error) {
	var fds []int
	for _, v := range volumes {
		fd, err := unix.OpenTree(unix.AT_FDCWD, v.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return nil, pid1.Refuse("the volume %s cannot be opened: %v", v.Source, err)
		}
		if v.ReadOnly {
			attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
			if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
				return nil, fmt.Errorf("the volume %s cannot be made read-only: %w", v.Source, err)
			}
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// attachVolumes puts the volumes where they belong and returns where that is
// with all links resolved: that is the name by which CRIU knows a mount.
func attachVolumes(fds []int, volumes []pid1.Volume) ([]string, error) {
	var where []string
	for i, fd := range fds {
		var stat unix.Stat_t
		if err := unix.Fstat(fd, &stat); err != nil {
			return nil, fmt.Errorf("cannot look at the volume %s: %w", volumes[i].Source, err)
		}
		target, err := mountPoint(volumes[i].Destination, stat.Mode&unix.S_IFMT == unix.S_IFDIR)
		if err != nil {
			return nil, pid1.Refuse("the volume %s cannot be put on %s: %v", volumes[i].Source, volumes[i].Destination, err)
		}
		if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return nil, fmt.Errorf("cannot put the volume %s on %s: %w", volumes[i].Source, target, err)
		}
		if err := unix.Close(fd); err != nil {
			return nil, err
		}
		where = append(where, target)
	}
	return where, nil
}

// mountPoint makes name, a directory or a file, if it is not there.
func mountPoint(name string, directory bool) (string, error) {
	parent := name
	if !directory {
		parent = filepath.Dir(name)
	}
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", err
	}
	if !directory {
		file, err := os.OpenFile(name, os.O_CREATE|os.O_RDONLY|syscall.O_NONBLOCK, 0o644)
		if err != nil {
			return "", err
		}
		if err := file.Close(); err != nil {
			return "", err
		}
	}
	return filepath.EvalSymlinks(name)
}

// coverProc hides or write-protects what of /proc and /sys belongs to the whole
// node, because root in a sandbox is root on the node as far as file
// permissions go. Covers are binds within the sandbox, which CRIU restores
// without help; a tmpfs each would cost a run of tar in every dump.
func coverProc() error {
	empty := filepath.Join(pid1.Directory, pid1.EmptyDir)
	for _, name := range []string{"/proc/kcore", "/proc/keys", "/proc/timer_list"} {
		if err := bind("/dev/null", name, 0); err != nil {
			return err
		}
	}
	for _, name := range []string{"/proc/acpi", "/proc/scsi", "/sys/firmware"} {
		if err := bind(empty, name, 0); err != nil {
			return err
		}
	}
	for _, name := range []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"} {
		if err := bind(name, name, silent|unix.MS_RDONLY); err != nil {
			return err
		}
	}
	return nil
}

// bind binds source on target, if there is a target, and then sets flags.
func bind(source, target string, flags uintptr) error {
	if _, err := os.Lstat(target); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err := mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if flags == 0 {
		return nil
	}
	return mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|flags, "")
}

// writeIdentity sets the host name and writes the three files in /etc that
// name the job's own hosts. They are removed first: they may be links.
func writeIdentity(cfg *pid1.Setup) error {
	if err := unix.Sethostname([]byte(cfg.Hostname)); err != nil {
		return fmt.Errorf("cannot set the host name %s: %w", cfg.Hostname, err)
	}
	if err := os.MkdirAll("/etc", 0o755); err != nil {
		return fmt.Errorf("cannot make /etc in the root: %w", err)
	}
	for name, content := range map[string]string{
		"/etc/hostname": cfg.Hostname + "\n", "/etc/hosts": cfg.Hosts, "/etc/resolv.conf": cfg.ResolvConf,
	} {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("cannot replace %s: %w", name, err)
		}
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			return fmt.Errorf("cannot write %s: %w", name, err)
		}
	}
	return nil
}

func writeRun(cmd *pid1.Run, secret []byte) error {
	content, err := json.Marshal(cmd)
	if err != nil {
		return err
	}
	// The environment may hold secrets.
	if err := os.WriteFile(inside(pid1.RunFile), content, 0o600); err != nil {
		return fmt.Errorf("cannot store the command: %w", err)
	}
	if len(secret) > 0 {
		if err := writeSecret(secret, cmd); err != nil {
			return fmt.Errorf("cannot store the job's secret: %w", err)
		}
	}
	for _, name := range []string{pid1.StdoutFile, pid1.StderrFile} {
		file, err := os.OpenFile(inside(name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return fmt.Errorf("cannot make the output files: %w", err)
		}
		// A program may open /dev/stdout again, as its own user.
		if err := errors.Join(file.Chown(int(cmd.UID), int(cmd.GID)), file.Close()); err != nil {
			return fmt.Errorf("cannot make the output files: %w", err)
		}
	}
	return makeProgress()
}

// makeProgress makes the file that any process of the task may write to.
func makeProgress() error {
	file, err := os.OpenFile(inside(pid1.ProgressFile), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o666)
	if err == nil {
		err = errors.Join(file.Chmod(0o666), file.Close()) // the mode given was cut by the umask
	}
	if err != nil {
		return fmt.Errorf("cannot make the progress file: %w", err)
	}
	return nil
}

// writeSecret stores what dormouse-rsh, as the task's user, has to know.
func writeSecret(secret []byte, cmd *pid1.Run) error {
	file, err := os.OpenFile(inside(pid1.SecretFile), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o400)
	if err != nil {
		return err
	}
	_, err = file.Write(secret)
	return errors.Join(err, file.Chown(int(cmd.UID), int(cmd.GID)), file.Close())
}

// becomeInit gives up privileges and executes the second stage.
func becomeInit(cfg *pid1.Setup) error {
	log, err := unix.Open(inside(pid1.InitLogFile), unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT, 0o600)
	if err != nil {
		return fmt.Errorf("cannot open the log of pid 1: %w", err)
	}
	null, err := unix.Open("/dev/null", unix.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("cannot open /dev/null: %w", err)
	}
	for target, source := range []int{null, log, log} {
		if err := unix.Dup3(source, target, 0); err != nil {
			return fmt.Errorf("cannot replace descriptor %d: %w", target, err)
		}
	}
	// Whatever was inherited by mistake would tie the sandbox to this node; the
	// status pipe alone has to live until the command runs.
	if err := errors.Join(
		unix.CloseRange(3, pid1.StatusFD-1, 0),
		unix.CloseRange(pid1.StatusFD+1, 1<<31-1, unix.CLOSE_RANGE_CLOEXEC),
		clearCloseOnExec(pid1.StatusFD),
	); err != nil {
		return fmt.Errorf("cannot close inherited descriptors: %w", err)
	}
	unix.Umask(0o022)
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 0, Max: coreLimit()}); err != nil {
		return fmt.Errorf("cannot set resource limits: %w", err)
	}
	if err := dropCapabilities(cfg.Capabilities); err != nil {
		return err
	}
	// Each thread takes CRIU time in every pause; this process has little to do.
	env := []string{"GODEBUG=" + plainCPU, "GOMAXPROCS=1"}
	path := inside(pid1.InitFile)
	if err := unix.Exec(path, []string{"dormouse-init", "run"}, env); err != nil {
		return fmt.Errorf("cannot execute %s: %w", path, err)
	}
	return nil
}

// plainCPU, as GODEBUG, keeps Go from using instructions that the processor of
// another node may lack. Speed is no concern here.
const plainCPU = "cpu.all=off"

func coreLimit() uint64 {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &limit); err != nil {
		return 0
	}
	return limit.Max
}

func clearCloseOnExec(fd uintptr) error {
	_, err := unix.FcntlInt(fd, unix.F_SETFD, 0)
	return err
}

// dropCapabilities leaves only keep in every capability set, for good.
func dropCapabilities(keep []int) error {
	var sets [2]unix.CapUserData
	for _, c := range keep {
		sets[c/32].Permitted |= 1 << (c % 32)
	}
	for i := range sets {
		sets[i].Effective = sets[i].Permitted
	}
	for c := 0; ; c++ {
		held, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0)
		if err != nil {
			break // c is beyond the last capability of this kernel
		}
		if held == 0 || c/32 < len(sets) && sets[c/32].Permitted&(1<<(c%32)) != 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil {
			return fmt.Errorf("cannot give up capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot forbid new privileges: %w", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capset(&header, &sets[0]); err != nil {
		return fmt.Errorf("cannot set the capabilities: %w", err)
	}
	return nil
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		what := kind
		if what == "" {
			what = source
		}
		return fmt.Errorf("cannot mount %s on %s: %w", what, target, err)
	}
	return nil
}

// inside names one of pid 1's own files.
func inside(name string) string { return filepath.Join(pid1.Directory, name) }

// failureOf makes an error fit to be sent.
func failureOf(err error) *pid1.Failure {
	if err == nil {
		return nil
	}
	var f *pid1.Failure
	if errors.As(err, &f) {
		return f
	}
	return &pid1.Failure{Kind: pid1.KindBroken, Message: err.Error()}
}

// report sends r; when the agent is gone there is nobody to tell.
func report(status *os.File, r pid1.Report) {
	if content, err := json.Marshal(r); err == nil {
		_, _ = status.Write(content)
	}
	_ = status.Close()
}
