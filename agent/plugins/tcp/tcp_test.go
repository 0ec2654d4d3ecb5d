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

	"dormouse/agent/plugins"
	"dormouse/api"
	"dormouse/internal/ownnet"
)

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		if err := runProgram(); err != nil {
			fmt.Fprintln(os.Stderr, "program:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if err := ownnet.EnterIfRoot(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// ownTask is the test itself, in its network namespace, with these addresses for
// the job's. A connection leaves the job here if its remote end is in 192.0.2.0/24,
// which the kernel takes for its own although no device has an address in it.
func ownTask(t *testing.T, job ...netip.Prefix) plugins.Task {
	t.Helper()
	needRoot(t)
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
	return plugins.Task{Spec: &api.JobSpec{Tasks: 1}, Networks: job, NetNS: f, PIDs: []int{os.Getpid()}}
}

// connect makes a connection between local and remote, with the end of each.
func connect(t *testing.T, network, at string) (here, there *net.TCPConn, listener net.Listener) {
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

func see(t *testing.T, task plugins.Task) *seen {
	t.Helper()
	s, err := survey(task)
	must(t, err)
	t.Cleanup(s.close)
	return s
}

func endLeaving(t *testing.T, task plugins.Task) {
	t.Helper()
	must(t, end(see(t, task).leaving()))
}

func TestConnectionsAreTold(t *testing.T) {
	task := ownTask(t)
	here, there, _ := connect(t, "tcp", "192.0.2.9:0")
	inside, _, _ := connect(t, "tcp", "127.0.0.1:0")
	waiting, err := net.Listen("tcp", "192.0.2.9:0")
	must(t, err)
	defer waiting.Close()
	unaccepted, err := net.Dial("tcp", waiting.Addr().String())
	must(t, err)
	defer unaccepted.Close()
	want := map[string]string{
		fmt.Sprintf("%v to %v", here.LocalAddr(), here.RemoteAddr()):             "leaves",
		fmt.Sprintf("%v to %v", there.LocalAddr(), there.RemoteAddr()):           "leaves",
		fmt.Sprintf("%v to %v", unaccepted.LocalAddr(), unaccepted.RemoteAddr()): "leaves",
		fmt.Sprintf("%v to %v", unaccepted.RemoteAddr(), unaccepted.LocalAddr()): "waits",
		fmt.Sprintf("%v to %v", inside.LocalAddr(), inside.RemoteAddr()):         "stays",
	}
	s := see(t, task)
	for _, c := range s.connections {
		kind := "stays"
		if c.waits() {
			kind = "waits"
		} else if c.leaves {
			kind = "leaves"
		}
		if wanted, ok := want[c.String()]; ok && kind != wanted {
			t.Errorf("%v: %s; want %s", c, kind, wanted)
		}
		delete(want, c.String())
	}
	if len(want) > 0 {
		t.Errorf("among %v are not %v", s.connections, want)
	}
}

func TestANamespaceIsUsedWhileItHasASocket(t *testing.T) {
	ownTask(t)
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		awaitUnused(t) // sockets of earlier tests end on their own
		listener, err := net.Listen("tcp", at)
		must(t, err)
		if inUse, err := used(os.Getpid()); err != nil || !inUse {
			t.Errorf("with one that listens on %s: %v, %v", at, inUse, err)
		}
		listener.Close()
	}
}

func awaitUnused(t *testing.T) {
	t.Helper()
	for limit := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		inUse, err := used(os.Getpid())
		must(t, err)
		if !inUse {
			return
		}
		if time.Now().After(limit) {
			t.Fatal("sockets are said to be there long after the last was closed")
		}
	}
}

func BenchmarkUsed(b *testing.B) {
	for b.Loop() {
		if _, err := used(os.Getpid()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSurvey(b *testing.B) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer listener.Close()
	for b.Loop() {
		s, err := survey(plugins.Task{PIDs: []int{os.Getpid()}})
		if err != nil {
			b.Fatal(err)
		}
		s.close()
	}
}

func TestConnectionsThatLeaveEnd(t *testing.T) {
	task := ownTask(t)
	here, there, _ := connect(t, "tcp", "192.0.2.9:0")
	endLeaving(t, task)
	if err := read(t, here); !isEnded(err) {
		t.Errorf("the program reads %v; want the end of its connection", err)
	}
	if err := read(t, there); !isEnded(err) {
		t.Errorf("the peer reads %v; want a reset", err)
	}
}

func TestConnectionsOfIPv6SocketsToIPv4End(t *testing.T) {
	task := ownTask(t)
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	listener, err := net.Listen("tcp4", "192.0.2.9:0")
	must(t, err)
	defer listener.Close()
	to := listener.Addr().(*net.TCPAddr)
	must(t, unix.Connect(fd, &unix.SockaddrInet6{Port: to.Port, Addr: [16]byte(to.IP.To16())}))
	endLeaving(t, task)
	if _, err := unix.Read(fd, make([]byte, 1)); !isEnded(err) {
		t.Errorf("the program reads %v; want the end of its connection", err)
	}
}

func TestConnectionsInsideTheJobStay(t *testing.T) {
	task := ownTask(t, netip.MustParsePrefix("192.0.2.0/28"))
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	own := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(198, 51, 100, 7), Mask: net.CIDRMask(32, 32)}}
	must(t, netlink.AddrReplace(lo, own))
	for _, at := range []string{"127.0.0.1:0", "[::1]:0", "192.0.2.7:0", "198.51.100.7:0"} {
		here, there, _ := connect(t, "tcp", at)
		endLeaving(t, task)
		if _, err := there.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := read(t, here); err != nil {
			t.Errorf("a connection to %s, inside the job, reads %v", at, err)
		}
	}
}

func TestListenersStay(t *testing.T) {
	task := ownTask(t)
	_, _, listener := connect(t, "tcp", "192.0.2.9:0")
	endLeaving(t, task)
	conn, err := net.DialTimeout("tcp", listener.Addr().String(), 5*time.Second)
	if err != nil {
		t.Fatalf("nobody listens any more: %v", err)
	}
	conn.Close()
}

// The kernel finds the listener when it looks for a connection that is gone.
func TestAConnectionThatEndedMeanwhileDoesNotTakeItsListenerAlong(t *testing.T) {
	task := ownTask(t)
	here, there, listener := connect(t, "tcp", "192.0.2.9:0")
	seen := see(t, task).leaving()
	must(t, here.SetLinger(0))
	must(t, here.Close())
	if err := read(t, there); !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("the connection did not end: %v", err)
	}
	must(t, end(seen))
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
