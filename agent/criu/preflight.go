package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// PreflightRequest names a running task.
type PreflightRequest struct {
	// Pid of the tree's init, in our own pid namespace.
	Pid int
	// Cgroup is the task's cgroup v2 directory. Empty: only the tree is looked at.
	Cgroup string
	// ExternalMounts are as in the DumpRequest.
	ExternalMounts []DumpMount
	// ControlledInit: unix sockets from outside that the tree's init holds are
	// its connections to the caller, who closes them before the dump.
	ControlledInit bool
	// AllowDevices are paths, inside the task, of device files that may be open
	// beyond the default set (null zero full random urandom tty ptmx pts).
	AllowDevices []string
}

// PreflightReport is what a look at the running task gave.
type PreflightReport struct {
	// Refusals say what cannot be captured; none means that a dump is expected
	// to succeed.
	Refusals []Refusal `json:"refusals"`
	// ImageBytes is an upper estimate of the size of a dump's images.
	ImageBytes int64 `json:"image_bytes"`
	Processes  int   `json:"processes"`
}

// Refusal is one reason why a task cannot be checkpointed.
type Refusal struct {
	Pid  int    `json:"pid"` // inside the task, as its user sees it
	Comm string `json:"comm"`
	What string `json:"what"` // "has an io_uring (descriptor 5)"
	Fix  string `json:"fix"`  // "run it without io_uring"
}

// String is one sentence.
func (r Refusal) String() string {
	return fmt.Sprintf("process %d (%s) %s: %s", r.Pid, r.Comm, r.What, r.Fix)
}

// NewRefusal is one about a process, which is given by its number in our own pid
// namespace.
func NewRefusal(pid int, what, fix string) Refusal {
	inner, err := innerID(procPath(pid), "NSpid")
	if err != nil {
		inner = pid
	}
	return Refusal{Pid: inner, Comm: comm(pid), What: what, Fix: fix}
}

// Preflight looks through /proc for everything in a task that CRIU cannot
// capture or would silently lose. It is ErrUnread, beside a report, when that can
// be otherwise at the next look. Nothing is stopped; processes that end or
// change during the look are no error. Its cost is some microseconds for each
// descriptor and mapping. Connections that leave the job are none of its
// business: they can be captured, but have another end (package plugins).
func (e *Engine) Preflight(ctx context.Context, r PreflightRequest) (*PreflightReport, error) {
	tree, err := treePIDs(r.Pid)
	if err != nil {
		return nil, fmt.Errorf("preflight: %w", err)
	}
	i := &inspection{
		request: r,
		report:  &PreflightReport{Processes: len(tree)},
		mounts:  map[int]mountEntry{},
		counted: map[string]bool{},
		seen:    map[string]bool{},
	}
	defer i.close()
	if r.Cgroup != "" {
		if err := i.enteredFromOutside(tree); err != nil {
			return nil, fmt.Errorf("preflight: %w", err)
		}
	}
	if err := i.readNamespaces(tree); err != nil {
		return nil, fmt.Errorf("preflight: %w", err)
	}
	for _, pid := range tree {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		if err := i.checkProcess(pid); err != nil && !gone(err) {
			return nil, fmt.Errorf("preflight: process %d (%s): %w", pid, comm(pid), err)
		}
	}
	if err := i.checkUnixPeers(); err != nil {
		return nil, fmt.Errorf("preflight: %w", err)
	}
	if len(i.report.Refusals) == 0 { // which would come again, too
		return i.report, unreadEvents(tree)
	}
	return i.report, nil
}

// inspection is one look at a task.
type inspection struct {
	request PreflightRequest
	report  *PreflightReport

	mounts     map[int]mountEntry // of all mount namespaces of the tree, by id
	rootDevice string             // of the init's root
	counted    map[string]bool    // devices that are in the estimate
	nets       []*network
	unixOwned  []unixSocket    // held by the tree
	seen       map[string]bool // sockets already looked at
}

func (i *inspection) refuse(pid int, what, fix string) {
	r := NewRefusal(pid, what, fix)
	if !slices.Contains(i.report.Refusals, r) {
		i.report.Refusals = append(i.report.Refusals, r)
	}
}

// enteredFromOutside refuses processes that CRIU would leave out: those in the
// cgroup that do not descend from the task's init.
func (i *inspection) enteredFromOutside(tree []int) error {
	members, err := CgroupPIDs(i.request.Cgroup)
	if err != nil {
		return err
	}
	for _, pid := range members {
		if slices.Contains(tree, pid) || descends(pid, i.request.Pid) {
			continue
		}
		if _, err := os.Stat(procPath(pid)); err != nil && pid != 0 {
			continue
		}
		i.refuse(pid, "was entered into the task from outside, is no child of it and would be lost",
			"end it, or start such programs with `dormouse exec`")
	}
	return nil
}

// descends follows the parents: a process may have been born since the tree was
// listed.
func descends(pid, ancestor int) bool {
	for range 1 << 16 {
		if pid == ancestor {
			return true
		}
		value, err := statusField(procPath(pid, "status"), "PPid")
		if err != nil {
			return true // ended, or was never visible: not lost
		}
		if pid, err = strconv.Atoi(value); err != nil || pid <= 0 {
			return false
		}
	}
	return false
}

// namespaceKinds must be the same for every process of a task: CRIU does not
// capture nested ones of these kinds. Mount and network ones it does.
var namespaceKinds = []struct{ kind, name string }{
	{"user", "user"}, {"pid", "pid"}, {"pid_for_children", "pid"}, {"uts", "uts"}, {"ipc", "ipc"},
}

func (i *inspection) readNamespaces(tree []int) error {
	own := map[string]uint64{}
	for _, ns := range namespaceKinds {
		inode, err := nsInode(i.request.Pid, ns.kind)
		if err != nil {
			return err
		}
		own[ns.kind] = inode
	}
	for _, pid := range tree {
		for _, ns := range namespaceKinds {
			if inode, err := nsInode(pid, ns.kind); err == nil && inode != own[ns.kind] {
				i.refuse(pid, fmt.Sprintf("runs in a nested %s namespace", ns.name), "run it without `unshare` or a container of its own")
				break
			}
		}
		if err := i.addMounts(pid); err != nil && !gone(err) {
			return err
		}
		if err := i.addNetwork(pid); err != nil && !gone(err) {
			return err
		}
	}
	return nil
}

func (i *inspection) checkProcess(pid int) error {
	status, err := os.ReadFile(procPath(pid, "status"))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "TracerPid":
			if value != "0" {
				i.refuse(pid, "is being traced by process "+value, "end the debugger or strace first")
			}
		case "RssAnon", "RssShmem", "VmSwap":
			kib, _ := strconv.ParseInt(strings.TrimSuffix(value, " kB"), 10, 64)
			i.report.ImageBytes += kib << 10
		}
	}
	if err := i.checkMappings(pid); err != nil {
		return err
	}
	return i.checkDescriptors(pid)
}

// anonymous are anon_inode kinds and their like that CRIU cannot capture, by
// the beginning of the link text or the mapping's name.
var anonymous = []struct{ prefix, what, fix string }{
	{"anon_inode:[io_uring]", "uses io_uring", "run it without io_uring (Node.js: UV_USE_IO_URING=0)"},
	{"anon_inode:[userfaultfd]", "uses userfaultfd", "run it without userfaultfd"},
	{"anon_inode:[perf_event]", "has a perf event open", "stop profiling it first"},
	{"anon_inode:bpf-map", "has a BPF map open", "close BPF objects before the checkpoint"},
	{"anon_inode:bpf-prog", "has a BPF program open", "close BPF objects before the checkpoint"},
	{"anon_inode:bpf", "has a BPF object open", "close BPF objects before the checkpoint"},
	{"anon_inode:btf", "has a BPF object open", "close BPF objects before the checkpoint"},
	{"anon_inode:kvm", "runs a virtual machine (KVM)", "checkpoint the virtual machine by its own means"},
	{"anon_inode:seccomp notify", "supervises others with seccomp", "run it without a seccomp supervisor"},
	{"anon_inode:[fscontext]", "is just mounting a file system", "try again later"},
	{"anon_inode:sync_file", "uses a GPU fence", "run it without a GPU"},
	{"anon_inode:[iommufd]", "uses a device directly", "run it without that device"},
	{"anon_inode:[landlock-ruleset]", "has a landlock ruleset open", "close rulesets once they are in force"},
	{"/secretmem", "uses secret memory (memfd_secret)", "run it without memfd_secret"},
	{"/dmabuf:", "shares memory with a device (dma-buf)", "run it without that device"},
}

func (i *inspection) refuseAnonymous(pid int, name, where string) bool {
	for _, a := range anonymous {
		if strings.HasPrefix(name, a.prefix) {
			i.refuse(pid, a.what+" ("+where+")", a.fix)
			return true
		}
	}
	if kind, ok := strings.CutPrefix(name, "anon_inode:"); ok && !slices.Contains(knownAnonymous, kind) {
		i.refuse(pid, fmt.Sprintf("uses %s (%s), which CRIU does not know", kind, where), "close it before the checkpoint")
		return true
	}
	return false
}

// knownAnonymous are the other anon_inode kinds, which CRIU captures.
var knownAnonymous = []string{"[eventfd]", "[eventpoll]", "[signalfd]", "[timerfd]", "inotify", "[fanotify]", "[pidfd]"}

// checkMappings looks for mappings of what has no descriptor any more, and of
// devices.
func (i *inspection) checkMappings(pid int) error {
	maps, err := os.ReadFile(procPath(pid, "maps"))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		// address perms offset device inode      path
		fields := strings.Fields(line)
		if len(fields) < 6 {
			continue
		}
		path := strings.Join(fields[5:], " ")
		if i.refuseAnonymous(pid, path, "mapped at "+fields[0]) || !strings.HasPrefix(path, "/dev/") ||
			strings.HasPrefix(path, "/dev/shm/") || slices.Contains(i.request.AllowDevices, path) {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(procPath(pid, "map_files", fields[0]), &st) == nil && isDevice(st) && !defaultDevice(st) {
			i.refuse(pid, fmt.Sprintf("has the device %s mapped", path), "run it without that device")
		}
	}
	return nil
}

func isDevice(st unix.Stat_t) bool {
	kind := st.Mode & unix.S_IFMT
	return kind == unix.S_IFCHR || kind == unix.S_IFBLK
}

// defaultDevice tells whether CRIU can open the device again: memory devices
// and terminals (Linux, Documentation/admin-guide/devices.txt).
func defaultDevice(st unix.Stat_t) bool {
	if st.Mode&unix.S_IFMT != unix.S_IFCHR {
		return false
	}
	major, minor := unix.Major(st.Rdev), unix.Minor(st.Rdev)
	switch {
	case major == 1:
		return slices.Contains([]uint32{3, 5, 7, 8, 9}, minor) // null zero full random urandom
	case major == 5:
		return minor == 0 || minor == 2 // tty ptmx
	}
	return major >= 136 && major <= 143 // pts
}

func (i *inspection) checkDescriptors(pid int) error {
	dir := procPath(pid, "fd")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var sockets []int
	for _, entry := range entries {
		link, err := os.Readlink(filepath.Join(dir, entry.Name()))
		if err != nil {
			continue
		}
		fd, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		where := "descriptor " + entry.Name()
		switch {
		case i.refuseAnonymous(pid, link, where):
		case strings.HasPrefix(link, "socket:"):
			if !i.seen[link] {
				i.seen[link] = true
				sockets = append(sockets, fd)
			}
		case strings.HasPrefix(link, "/"):
			i.checkFile(pid, fd, link)
		case link == inotifyLink || link == fanotifyLink:
			i.checkWatches(pid, fd)
		}
	}
	return i.checkSockets(pid, sockets)
}

// checkFile looks at a descriptor of something with a path.
func (i *inspection) checkFile(pid, fd int, link string) {
	path := procPath(pid, "fd", strconv.Itoa(fd))
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return
	}
	where := fmt.Sprintf("descriptor %d", fd)
	if isDevice(st) && !defaultDevice(st) {
		if !slices.Contains(i.request.AllowDevices, link) {
			i.refuse(pid, fmt.Sprintf("has the device %s open (%s)", link, where), "run it without that device")
		}
		return
	}
	var fs unix.Statfs_t
	if unix.Statfs(path, &fs) != nil {
		return
	}
	switch {
	case fs.Type == mqueueMagic:
		i.refuse(pid, fmt.Sprintf("has the POSIX message queue %s open (%s)", link, where), "run it without POSIX message queues")
	case fs.Type == unix.PROC_SUPER_MAGIC && st.Mode&unix.S_IFMT == unix.S_IFDIR && processDirectory(link):
		i.refuse(pid, fmt.Sprintf("has the directory %s open (%s), which cannot be opened again", link, where), "close it before the checkpoint")
	case st.Nlink == 0 && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size > ghostLimit && !strings.HasPrefix(link, "/memfd:"):
		i.refuse(pid, fmt.Sprintf("holds the deleted file %s of %d MiB open (%s)", strings.TrimSuffix(link, " (deleted)"), st.Size>>20, where),
			fmt.Sprintf("keep deleted files below %d MiB", ghostLimit>>20))
	default:
		i.checkReachable(pid, fd, link)
	}
}

// mqueueMagic is MQUEUE_MAGIC of the kernel's ipc/mqueue.c.
const mqueueMagic = 0x19800202

// processDirectory tells whether a path is /proc/N. CRIU fails to open just
// that again; files and directories in it are no problem.
func processDirectory(path string) bool {
	_, err := strconv.Atoi(strings.TrimPrefix(path, "/proc/"))
	return err == nil
}

// unnamed are links that look like paths and belong to mounts of the kernel's
// own.
var unnamed = []string{"/memfd:", "/SYSV", "/dev/zero", "/anon_hugepage"}

// checkReachable refuses a file that was opened in a mount the task does not
// have, as a program does that was handed descriptors from outside.
func (i *inspection) checkReachable(pid, fd int, link string) {
	if slices.ContainsFunc(unnamed, func(p string) bool { return strings.HasPrefix(link, p) }) {
		return
	}
	value, err := statusField(procPath(pid, "fdinfo", strconv.Itoa(fd)), "mnt_id")
	if err != nil {
		return
	}
	id, err := strconv.Atoi(value)
	if err != nil {
		return
	}
	if _, ok := i.mounts[id]; ok {
		return
	}
	if i.addMounts(pid) == nil { // mounted meanwhile?
		if _, ok := i.mounts[id]; ok {
			return
		}
	}
	i.refuse(pid, fmt.Sprintf("has %s open (descriptor %d) that was opened outside of the task", link, fd), "open it inside the task")
}

func (i *inspection) close() {
	for _, n := range i.nets {
		n.close()
	}
}

var errUnknownNetwork = errors.New("socket of a network namespace outside of the task")
