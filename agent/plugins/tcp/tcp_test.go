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
// its remote end is in 192.0.2.0/24, which the kernel takes for its own although no device
// has an address in it.
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

func endLeaving(t *testing.T, ns *os.File, job ...netip.Prefix) {
	t.Helper()
	leaving, err := Leaving(ns, job)
	must(t, err)
	must(t, End(ns, leaving))
}

func TestConnectionsThatLeaveAreNamed(t *testing.T) {
	ns := namespace(t)
	here, there, _ := connection(t, "tcp", "192.0.2.9:0")
	waiting, err := net.Listen("tcp", "192.0.2.9:0")
	must(t, err)
	defer waiting.Close()
	unaccepted, err := net.Dial("tcp", waiting.Addr().String())
	must(t, err)
	defer unaccepted.Close()
	want := map[string]bool{ // with whether a process has it
		fmt.Sprintf("%v to %v", here.LocalAddr(), here.RemoteAddr()):             true,
		fmt.Sprintf("%v to %v", there.LocalAddr(), there.RemoteAddr()):           true,
		fmt.Sprintf("%v to %v", unaccepted.LocalAddr(), unaccepted.RemoteAddr()): true,
		fmt.Sprintf("%v to %v", unaccepted.RemoteAddr(), unaccepted.LocalAddr()): false,
	}
	leaving, err := Leaving(ns, nil)
	must(t, err)
	for _, c := range leaving {
		if held, ok := want[c.String()]; ok && held != c.Held {
			t.Errorf("%v: a process has it: %v; want %v", c, c.Held, held)
		}
		delete(want, c.String())
	}
	if len(want) > 0 {
		t.Errorf("among %v are not %v", leaving, want)
	}
}

func TestANamespaceIsUsedWhileItHasASocket(t *testing.T) {
	namespace(t)
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		awaitUnused(t) // sockets of earlier tests end on their own
		listener, err := net.Listen("tcp", at)
		must(t, err)
		if used, err := Used(os.Getpid()); err != nil || !used {
			t.Errorf("with one that listens on %s: %v, %v", at, used, err)
		}
		listener.Close()
	}
}

func awaitUnused(t *testing.T) {
	t.Helper()
	for limit := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		used, err := Used(os.Getpid())
		must(t, err)
		if !used {
			return
		}
		if time.Now().After(limit) {
			t.Fatal("sockets are said to be there long after the last was closed")
		}
	}
}

func BenchmarkUsed(b *testing.B) {
	for b.Loop() {
		if _, err := Used(os.Getpid()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLeaving(b *testing.B) {
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		b.Fatal(err)
	}
	defer ns.Close()
	for b.Loop() {
		if _, err := Leaving(ns, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func TestConnectionsThatLeaveEnd(t *testing.T) {
	ns := namespace(t)
	here, there, _ := connection(t, "tcp", "192.0.2.9:0")
	endLeaving(t, ns)
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
	endLeaving(t, ns)
	if _, err := unix.Read(fd, make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the program reads %v; want the end of its connection", err)
	}
}

func TestConnectionsInsideTheJobStay(t *testing.T) {
	ns := namespace(t)
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	own := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(198, 51, 100, 7), Mask: net.CIDRMask(32, 32)}}
	must(t, netlink.AddrReplace(lo, own))
	for _, at := range []string{"127.0.0.1:0", "[::1]:0", "192.0.2.7:0", "198.51.100.7:0"} {
		here, there, _ := connection(t, "tcp", at)
		endLeaving(t, ns, netip.MustParsePrefix("192.0.2.0/28"))
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
	endLeaving(t, ns)
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
	seen, err := Leaving(ns, nil)
	must(t, err)
	must(t, here.SetLinger(0))
	must(t, here.Close())
	if err := read(t, there); !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("the connection did not end: %v", err)
	}
	must(t, End(ns, seen))
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
