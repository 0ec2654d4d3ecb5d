package criu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// Probe dumps and restores a small process that listens on a TCP socket. That
// tells more than `criu check`: CRIU up to 4.1 passes the check on kernels ≥
// 6.16, where it cannot dump a single socket.
func (e *Engine) Probe(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "dormouse-probe-")
	if err != nil {
		return fmt.Errorf("criu probe: %w", err)
	}
	defer os.RemoveAll(dir)
	if err := e.probe(ctx, dir); err != nil {
		return fmt.Errorf("criu probe with %s (version %s): %w", e.path, e.version, err)
	}
	return nil
}

func (e *Engine) probe(ctx context.Context, dir string) error {
	pid, err := startProbe(ctx)
	if err != nil {
		return err
	}
	images, err := os.Open(dir)
	if err != nil {
		killChild(pid)
		return err
	}
	defer images.Close()

	options := common(images, images, dumpLog, 0)
	options.Pid = proto.Int32(int32(pid))
	if err := e.probeStep(ctx, rpc.CriuReqType_DUMP, options, dir); err != nil {
		killChild(pid)
		return err
	}
	reap(pid)

	options = common(images, images, restoreLog, 0)
	options.RstSibling = proto.Bool(true) // so that it can be waited for
	if err := e.probeStep(ctx, rpc.CriuReqType_RESTORE, options, dir); err != nil {
		return err
	}
	defer killChild(pid)
	if link, err := os.Readlink(procPath(pid, "fd", strconv.Itoa(probeFD))); err != nil || !strings.HasPrefix(link, "socket:") {
		return fmt.Errorf("the restored process has lost its socket (%s)", link)
	}
	return nil
}

// probeFD is the descriptor of the probe's listening socket.
const probeFD = 3

// startProbe starts `sleep` with a listening socket, in a session of its own
// and with nothing else inherited.
func startProbe(ctx context.Context) (int, error) {
	var config net.ListenConfig
	config.SetMultipathTCP(false) // Go's default, and nothing CRIU knows
	l, err := config.Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	socket, err := l.(*net.TCPListener).File()
	if err != nil {
		return 0, err
	}
	defer socket.Close()
	cmd := exec.Command("sleep", "1000")
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	pid := cmd.Process.Pid
	// Waited for by number: after the restore it is another child of ours.
	return pid, cmd.Process.Release()
}

func (e *Engine) probeStep(ctx context.Context, kind rpc.CriuReqType, options *rpc.CriuOpts, dir string) error {
	s, err := e.start(sessionOptions{})
	if err != nil {
		return err
	}
	resp, err := s.call(ctx, &rpc.CriuReq{Type: &kind, Opts: options}, nil)
	if err == nil && resp.GetSuccess() {
		return nil
	}
	failure := newError(strings.ToLower(kind.String()), filepath.Join(dir, options.GetLogFile()), resp.GetCrErrmsg(), err)
	failure.LogPath = "" // removed with the directory
	return failure
}

func killChild(pid int) {
	_ = unix.Kill(pid, unix.SIGKILL)
	reap(pid)
}

func reap(pid int) {
	for {
		_, err := unix.Wait4(pid, nil, 0, nil)
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
