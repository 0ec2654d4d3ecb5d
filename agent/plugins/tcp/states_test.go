package tcp

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"dormouse/agent/plugins"
	"dormouse/api"
)

// quiesce quiesces a task under the policy, and lets go what that holds.
func quiesce(t *testing.T, task plugins.Task, policy string) error {
	t.Helper()
	task.Spec.Connections = policy
	err := Plugin{}.Quiesce(t.Context(), task)
	must(t, Plugin{}.Resume(context.WithoutCancel(t.Context()), task))
	return err
}

// expectSettles quiesces again and again, as the kernel may acknowledge a while
// after the program has read.
func expectSettles(t *testing.T, task plugins.Task, after string) {
	t.Helper()
	err := quiesce(t, task, "")
	for end := time.Now().Add(10 * time.Second); errors.Is(err, plugins.ErrUnsettled) && time.Now().Before(end); {
		time.Sleep(50 * time.Millisecond)
		err = quiesce(t, task, "")
	}
	if err != nil {
		t.Errorf("after %s: %v", after, err)
	}
}

func expectUnsettled(t *testing.T, err error, says ...string) {
	t.Helper()
	if !errors.Is(err, plugins.ErrUnsettled) {
		t.Fatalf("Quiesce returned %v; want ErrUnsettled", err)
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("Quiesce returned %q, which does not say %q", err, s)
		}
	}
}

// halfOpen is a socket whose connection request is answered by nobody.
func halfOpen(t *testing.T) (fd int) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	// What comes in at the loopback device for an address that is not ours is dropped.
	silent := &net.IPNet{IP: net.IPv4(203, 0, 113, 0), Mask: net.CIDRMask(24, 32)}
	must(t, netlink.RouteReplace(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: silent}))
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	must(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	err = unix.Connect(fd, &unix.SockaddrInet4{Port: 80, Addr: [4]byte{203, 0, 113, 1}})
	if !errors.Is(err, unix.EINPROGRESS) {
		t.Fatalf("the connection request was answered: %v", err)
	}
	return fd
}

func TestAConnectionRequestToTheOutsideIsRefused(t *testing.T) {
	task := ownTask(t)
	halfOpen(t)
	refusals, err := Plugin{}.Look(t.Context(), task)
	must(t, err)
	if len(refusals) != 1 || !strings.Contains(refusals[0].String(), "to 203.0.113.1:80 (descriptor ") {
		t.Errorf("refused is %v; want the connection to 203.0.113.1:80", refusals)
	}
	var refused *plugins.RefusedError
	if err := quiesce(t, task, api.ConnectionsRefuse); !errors.As(err, &refused) {
		t.Errorf("Quiesce returned %v; want a refusal", err)
	}
}

func TestAConnectionRequestToTheOutsideIsClosed(t *testing.T) {
	task := ownTask(t)
	fd := halfOpen(t)
	must(t, quiesce(t, task, api.ConnectionsClose))
	result, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	must(t, err)
	if syscall.Errno(result) != unix.ECONNABORTED {
		t.Errorf("the request ended with %v; want %v", syscall.Errno(result), unix.ECONNABORTED)
	}
}

func TestAConnectionRequestToTheOutsideIsKept(t *testing.T) {
	task := ownTask(t)
	fd := halfOpen(t)
	must(t, quiesce(t, task, api.ConnectionsKeep))
	result, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	must(t, err)
	if result != 0 {
		t.Errorf("the request ended with %v", syscall.Errno(result))
	}
}

// One that is not the checkpoint's to capture is not broken for it either.
func TestAConnectionThatWaitsToBeAcceptedIsUnsettledAndStays(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "192.0.2.9:0"} {
		for _, policy := range []string{api.ConnectionsRefuse, api.ConnectionsClose, api.ConnectionsKeep} {
			t.Run(at+" "+policy, func(t *testing.T) {
				task := ownTask(t)
				listener, err := net.Listen("tcp", at)
				must(t, err)
				defer listener.Close()
				conn, err := net.Dial("tcp", listener.Addr().String())
				must(t, err)
				defer conn.Close()
				expectUnsettled(t, quiesce(t, task, policy), conn.LocalAddr().String(), "waits to be accepted")
				peer, err := listener.Accept()
				must(t, err)
				defer peer.Close()
				_, err = conn.Write([]byte("x"))
				must(t, err)
				must(t, read(t, peer))
			})
		}
	}
}

func expectAll(t *testing.T, conn net.Conn, want []byte) {
	t.Helper()
	must(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes came, then %v; want the %d bytes that were sent", len(got), err, len(want))
	}
}

// A restored copy of the peer would wait for the rest of the data for ever.
func TestAConnectionThatWasClosedWithDataUnderWayIsUnsettled(t *testing.T) {
	task := ownTask(t)
	here, there, _ := connect(t, "tcp", "127.0.0.1:0")
	sent, err := stuff(here)
	must(t, err)
	must(t, here.Close())
	expectUnsettled(t, quiesce(t, task, ""), here.RemoteAddr().String(), "data under way")
	expectAll(t, there, sent)
	expectSettles(t, task, "all data was delivered")
}

func TestADeferredConnectionIsUnsettled(t *testing.T) {
	task := ownTask(t)
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		outer := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 60) })
		return errors.Join(outer, err)
	}}
	listener, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	defer listener.Close()
	conn, err := net.Dial("tcp", listener.Addr().String())
	must(t, err)
	defer conn.Close()
	expectUnsettled(t, quiesce(t, task, ""), conn.LocalAddr().String())
	_, err = conn.Write([]byte("x"))
	must(t, err)
	peer, err := listener.Accept()
	must(t, err)
	defer peer.Close()
	expectSettles(t, task, "it was accepted")
}

// The kernel delivers it for the job that runs on.
func TestWhatAProgramHasClosedIsDeliveredToTheOutside(t *testing.T) {
	for _, policy := range []string{api.ConnectionsRefuse, api.ConnectionsClose} {
		t.Run(policy, func(t *testing.T) {
			needRoot(t)
			p := startProgram(t)
			task := plugins.Task{Spec: &api.JobSpec{Tasks: 1}, NetNS: wire(t, p), PIDs: []int{p.cmd.Process.Pid}}
			listener, err := net.Listen("tcp", outside+":0")
			must(t, err)
			defer listener.Close()
			p.tell("pour " + listener.Addr().String())
			conn, err := listener.Accept()
			must(t, err)
			defer conn.Close()
			must(t, quiesce(t, task, policy))
			must(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
			if n, err := io.Copy(io.Discard, conn); err != nil || n < 1<<16 {
				t.Errorf("%d bytes came, then %v; want all that was sent before the end", n, err)
			}
		})
	}
}
