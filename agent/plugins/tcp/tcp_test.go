package tcp

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"dormouse/internal/ownnet"
)

func TestMain(m *testing.M) {
	if err := ownnet.EnterIfRoot(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// namespace is the task's: that of the test. A connection leaves the job here if
// its remote end is in 192.0.2.0/24, which is on a device that EndLeaving is made
// not to know: it routes to lo and has no address.
func namespace(t *testing.T) *os.File {
	t.Helper()
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test needs root: it ends connections in a network namespace of its own")
		}
		t.Skip("this test needs root: it ends connections in a network namespace of its own")
	}
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	route := &netlink.Route{
		LinkIndex: lo.Attrs().Index, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
		Dst: &net.IPNet{IP: net.IPv4(192, 0, 2, 0), Mask: net.CIDRMask(24, 32)},
	}
	must(t, netlink.RouteReplace(route))
	f, err := os.Open("/proc/thread-self/ns/net")
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// connection is one between local and remote, with the end of each.
func connection(t *testing.T, network, at string) (here, there *net.TCPConn, listener net.Listener) {
	t.Helper()
	listener, err := net.Listen(network, at)
	must(t, err)
	t.Cleanup(func() { listener.Close() })
	dialer := net.Dialer{Timeout: 5 * time.Second}
	conn, err := dialer.Dial("tcp", listener.Addr().String())
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	peer, err := listener.Accept()
	must(t, err)
	t.Cleanup(func() { peer.Close() })
	return conn.(*net.TCPConn), peer.(*net.TCPConn), listener
}

func read(t *testing.T, conn net.Conn) error {
	t.Helper()
	must(t, conn.SetReadDeadline(time.Now().Add(5*time.Second)))
	_, err := conn.Read(make([]byte, 1))
	return err
}

func TestConnectionsThatLeaveEnd(t *testing.T) {
	ns := namespace(t)
	here, there, _ := connection(t, "tcp", "192.0.2.9:0")
	must(t, EndLeaving(ns, nil))
	if err := read(t, here); !errors.Is(err, unix.ECONNABORTED) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the program reads %v; want the end of its connection", err)
	}
	if err := read(t, there); !errors.Is(err, unix.ECONNABORTED) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the peer reads %v; want a reset", err)
	}
}

func TestConnectionsOfIPv6SocketsToIPv4End(t *testing.T) {
	ns := namespace(t)
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	listener, err := net.Listen("tcp4", "192.0.2.9:0")
	must(t, err)
	defer listener.Close()
	to := listener.Addr().(*net.TCPAddr)
	must(t, unix.Connect(fd, &unix.SockaddrInet6{Port: to.Port, Addr: [16]byte(to.IP.To16())}))
	must(t, EndLeaving(ns, nil))
	if _, err := unix.Read(fd, make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the program reads %v; want the end of its connection", err)
	}
}

func TestConnectionsInsideTheJobStay(t *testing.T) {
	ns := namespace(t)
	for _, at := range []string{"127.0.0.1:0", "[::1]:0", "192.0.2.7:0"} {
		here, there, _ := connection(t, "tcp", at)
		must(t, EndLeaving(ns, []netip.Prefix{netip.MustParsePrefix("192.0.2.0/28")}))
		if _, err := there.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := read(t, here); err != nil {
			t.Errorf("a connection to %s, inside the job, reads %v", at, err)
		}
	}
}

func TestListenersStay(t *testing.T) {
	ns := namespace(t)
	_, _, listener := connection(t, "tcp", "192.0.2.9:0")
	must(t, EndLeaving(ns, nil))
	conn, err := net.DialTimeout("tcp", listener.Addr().String(), 5*time.Second)
	if err != nil {
		t.Fatalf("nobody listens any more: %v", err)
	}
	conn.Close()
}

// The kernel finds the listener when it looks for a connection that is gone.
func TestAConnectionThatEndedMeanwhileDoesNotTakeItsListenerAlong(t *testing.T) {
	ns := namespace(t)
	here, there, listener := connection(t, "tcp", "192.0.2.9:0")
	handle, err := netlink.NewHandle(unix.NETLINK_INET_DIAG)
	must(t, err)
	defer handle.Close()
	seen, err := handle.SocketGet(there.LocalAddr(), there.RemoteAddr())
	must(t, err)
	must(t, here.SetLinger(0))
	must(t, here.Close())
	if err := read(t, there); !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("the connection did not end: %v", err)
	}
	diag, err := diagnose(ns)
	must(t, err)
	defer diag.Close()
	must(t, end(diag, seen))
	conn, err := net.DialTimeout("tcp", listener.Addr().String(), 5*time.Second)
	if err != nil {
		t.Fatalf("the listener was ended instead: %v", err)
	}
	conn.Close()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
