package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// boxed measures plain CRIU on the same subject in a sandbox such as every
// container has: namespaces for pids, mounts, network, ipc and host name, an overlay
// over the host's root, and tmpfs for /dev, /dev/shm and /tmp. What raw leaves out
// is what this costs CRIU itself, whoever runs it: namespaces, mounts, the content
// of each tmpfs. The network namespace is external and its lock skipped, as in
// Dormouse.
type boxed struct{ raw }

// boxedResult is one round of plain CRIU in a sandbox.
type boxedResult struct {
	pause   time.Duration
	restore time.Duration // from the start of criu to the first instruction
}

// boxScript builds the sandbox and becomes the subject: its arguments are the
// directory with upper, work and root, the shared directory, and the command.
const boxScript = `set -e
dir=$1 shared=$2; shift 2
mount -t overlay overlay -o "lowerdir=/,upperdir=$dir/upper,workdir=$dir/work" "$dir/root"
cd "$dir/root"
mount -t proc proc proc
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/shm dev/pts
for device in null:3 zero:5 full:7 random:8 urandom:9; do mknod -m 666 "dev/${device%:*}" c 1 "${device#*:}"; done
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
mount -t tmpfs -o mode=1777 tmpfs tmp
mkdir -p mnt/bench
mount --bind "$shared" mnt/bench
pivot_root . .
umount -l .
cd /
for fd in /proc/self/fd/*; do [ ${fd##*/} -le 2 ] || eval "exec ${fd##*/}>&-"; done # whoever runs this may leave some open
exec setsid "$@" </dev/null >/dev/null 2>&1
`

func (b *boxed) round(ctx context.Context, s scenario, scratch string) (result boxedResult, err error) {
	dir, images := filepath.Join(scratch, "box"), filepath.Join(b.images, "boxed")
	tickFile := filepath.Join(scratch, "boxed-ticks")
	defer os.RemoveAll(images)
	defer os.RemoveAll(dir)
	for _, d := range []string{images, dir, filepath.Join(dir, "upper"), filepath.Join(dir, "work"), filepath.Join(dir, "root")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return result, err
		}
	}
	if err := errors.Join(os.RemoveAll(tickFile), copyFile(b.subject, filepath.Join(scratch, "boxed-subject"))); err != nil {
		return result, err
	}
	args := append([]string{"-c", boxScript, "box", dir, scratch, "/mnt/bench/boxed-subject"}, s.args("/mnt/bench/boxed-ticks", "/mnt/bench/boxed-dirty")...)
	box := exec.Command("bash", args...)
	box.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Unshareflags: unix.CLONE_NEWNS, // which package syscall makes private
	}
	problem := &strings.Builder{}
	box.Stderr = problem
	if err := box.Start(); err != nil {
		return result, err
	}
	ended := make(chan struct{})
	go func() { box.Wait(); close(ended) }()
	kill := func() {
		box.Process.Kill()
		<-ended
	}
	defer kill()
	if err := waitTicking(ctx, tickFile); err != nil {
		return result, fmt.Errorf("%w: %s", err, problem)
	}
	if result.pause, err = b.dump(ctx, box.Process.Pid, images, tickFile); err != nil {
		return result, err
	}
	kill()
	result.restore, err = b.restore(ctx, dir, scratch, images, tickFile)
	return result, err
}

// options are those that a dump and a restore have in common.
func (b *boxed) options(more ...string) []string {
	return append([]string{"--network-lock", "skip", "--manage-cgroups=ignore"}, more...)
}

func (b *boxed) dump(ctx context.Context, pid int, images, tickFile string) (time.Duration, error) {
	var network unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &network); err != nil {
		return 0, os.NewSyscallError("stat", err)
	}
	begin := time.Now()
	err := b.run(ctx, images, "dump", b.options("-t", strconv.Itoa(pid), "--leave-running",
		"--external", fmt.Sprintf("net[%d]:box", network.Ino), "--external", "mnt[/mnt/bench]:bench")...)
	if err != nil {
		return 0, err
	}
	if _, err := firstTick(ctx, tickFile, time.Now()); err != nil {
		return 0, err
	}
	return longestGap(tickFile, begin)
}

// restore restores into a root and a network that are there already.
func (b *boxed) restore(ctx context.Context, dir, scratch, images, tickFile string) (time.Duration, error) {
	root := filepath.Join(dir, "root")
	layers := fmt.Sprintf("lowerdir=/,upperdir=%s,workdir=%s", filepath.Join(dir, "upper"), filepath.Join(dir, "work"))
	if err := unix.Mount("overlay", root, "overlay", 0, layers); err != nil {
		return 0, os.NewSyscallError("mount", err)
	}
	defer unix.Unmount(root, unix.MNT_DETACH)
	if err := unix.Mount("", root, "", unix.MS_PRIVATE, ""); err != nil {
		return 0, os.NewSyscallError("mount", err)
	}
	network, end, err := newNetwork()
	if err != nil {
		return 0, err
	}
	defer end()
	pidFile := filepath.Join(dir, "pid")
	begin := time.Now()
	err = b.runWith(ctx, network, images, "restore", b.options("--restore-detached", "--root", root, "--pidfile", pidFile,
		"--external", "mnt[bench]:"+scratch, "--inherit-fd", "fd[3]:box")...)
	if err != nil {
		return 0, err
	}
	first, err := firstTick(ctx, tickFile, begin)
	if err != nil {
		return 0, err
	}
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, fmt.Errorf("%s: %w", pidFile, err)
	}
	return first.Sub(begin), endRestored(ctx, pid)
}

// newNetwork makes a network namespace; end lets go of it.
func newNetwork() (network *os.File, end func(), err error) {
	holder := exec.Command("sleep", "infinity")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := holder.Start(); err != nil {
		return nil, nil, err
	}
	defer func() {
		holder.Process.Kill()
		holder.Wait()
	}()
	network, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", holder.Process.Pid))
	return network, func() { network.Close() }, err
}

func copyFile(from, to string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o755)
}
