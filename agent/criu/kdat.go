package criu

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"dormouse/internal/thread"
)

// kernelFacts are what a CRIU has found out about the kernel. Finding it out
// takes a CRIU 25 to 30 ms and connections on its loopback device, so it writes it
// to /run/criu.kdat for the next one; but only where /run is a tmpfs, whose content
// cannot outlive the kernel (criu/kerndat.c), and any CRIU of another build writes
// its own there. So each CRIU gets a mount namespace with a /run of its own and the
// file of an earlier CRIU in it. Between them the file is in our memory: it lives no
// longer than we do, so no longer than the kernel.
type kernelFacts struct {
	mu   sync.Mutex
	data []byte // of the file; nil at first
}

const (
	runDir   = "/run"
	kdatFile = "criu.kdat"
)

// known reports whether a CRIU started now would find out nothing itself.
func (k *kernelFacts) known() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.data != nil
}

// start starts a CRIU that sees these files as we do, with what is known of the
// kernel if that can be; the directory, which is nil if not, is for learn. If netNS
// is not nil, it can only be so, and CRIU is started in that network namespace.
func (k *kernelFacts) start(cmd *exec.Cmd, dying func(), netNS *os.File, files []string) (c *child, run *os.File, err error) {
	if netNS == nil && contain(files, runDir) {
		c, err = startChild(cmd, dying)
		return c, nil, err
	}
	before := identify(files)
	err = thread.Spare(func() (err error) {
		run, err = ownRun()
		if err != nil {
			return err
		}
		if !slices.Equal(identify(files), before) {
			return errHidden
		}
		if err := k.write(run); err != nil {
			return err
		}
		if netNS != nil {
			if err := unix.Setns(int(netNS.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter the task's network namespace: %w", err)
			}
		}
		c, err = startChild(cmd, dying)
		return err
	})
	switch {
	case c != nil:
		return c, run, nil
	case run != nil:
		run.Close()
	}
	if netNS == nil && (errors.Is(err, errNoOwnRun) || errors.Is(err, errHidden)) {
		c, err = startChild(cmd, dying)
	}
	return c, nil, err
}

var (
	errNoOwnRun = errors.New("cannot give CRIU a /run of its own")
	errHidden   = errors.New("what CRIU needs is below /run")
)

// ownRun gives the calling thread a mount namespace with a new /run.
func ownRun() (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return nil, fmt.Errorf("%w: unshare: %w", errNoOwnRun, err)
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return nil, fmt.Errorf("%w: make / a slave: %w", errNoOwnRun, err)
	}
	if err := unix.Mount("criu-run", runDir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755,size=1m"); err != nil {
		return nil, fmt.Errorf("%w: mount a tmpfs: %w", errNoOwnRun, err)
	}
	run, err := os.Open(runDir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoOwnRun, err)
	}
	return run, nil
}

// write puts what is known into a new /run.
func (k *kernelFacts) write(run *os.File) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.data == nil {
		return nil
	}
	f, err := openIn(run, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return err
	}
	_, err = f.Write(k.data)
	return errors.Join(err, f.Close())
}

// learn takes over what a CRIU that has ended has left in its /run, which may be
// nil. CRIU renames the file to its place when it is complete.
func (k *kernelFacts) learn(run *os.File) {
	if run == nil {
		return
	}
	defer run.Close()
	f, err := openIn(run, unix.O_RDONLY)
	if err != nil {
		return // it did not come that far
	}
	defer f.Close()
	data, err := io.ReadAll(f)
	if err != nil || len(data) == 0 {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.data = data
}

func openIn(dir *os.File, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), kdatFile, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: filepath.Join(runDir, kdatFile), Err: err}
	}
	return os.NewFile(uintptr(fd), kdatFile), nil
}
