package network

import (
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func isCut(t *testing.T, ns *os.File) bool {
	t.Helper()
	cut, err := IsCut(ns)
	if err != nil {
		t.Fatal(err)
	}
	return cut
}

func do(t *testing.T, what func(*os.File) error, ns *os.File) {
	t.Helper()
	if err := what(ns); err != nil {
		t.Fatal(err)
	}
}

func TestNothingPassesACut(t *testing.T) {
	node := newFabric(t).node()
	tasks := node.join(newJob("j-cut"), 0, 1)
	cut, other := tasks[0], tasks[1]
	inside := listen(t, cut.ns, onPort(cut.address, 0))
	outside := listen(t, other.ns, onPort(other.address, 0))
	loop := listen(t, cut.ns, "127.0.0.1:0")

	do(t, Cut, cut.ns)
	do(t, Cut, cut.ns) // again
	if !isCut(t, cut.ns) {
		t.Fatal("IsCut says that the network is not cut")
	}
	unreachable(t, cut.ns, outside.String())
	unreachable(t, cut.ns, loop.String())
	unreachable(t, other.ns, inside.String())

	do(t, Open, cut.ns)
	do(t, Open, cut.ns) // again
	if isCut(t, cut.ns) {
		t.Fatal("IsCut says that the network is cut")
	}
	reach(t, cut.ns, outside.String())
	reach(t, cut.ns, loop.String())
	reach(t, other.ns, inside.String())
}

func TestWhatCRIUMarksPassesACut(t *testing.T) {
	node := newFabric(t).node()
	tasks := node.join(newJob("j-mark"), 0, 1)
	at := receive(t, tasks[0])
	do(t, Cut, tasks[0].ns)
	do(t, Cut, tasks[1].ns)
	send(t, tasks[0], at, 0, "plain, over lo")
	send(t, tasks[1], at, 0, "plain")
	// A mark is the sender's alone: it does not cross a veth pair, so over lo.
	send(t, tasks[0], at, criuMark, "marked")
	if got := next(t, at, ample); got != "marked" {
		t.Errorf("the cut let %q pass first; want only what is marked", got)
	}
	if got := next(t, at, blocked); got != "" {
		t.Errorf("the cut let %q pass", got)
	}
}

func TestAnEstablishedConnectionOutlivesACut(t *testing.T) {
	node := newFabric(t).node()
	tasks := node.join(newJob("j-live"), 0, 1)
	conn, err := dial(tasks[0].ns, listen(t, tasks[1].ns, onPort(tasks[1].address, 0)).String(), ample)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	do(t, Cut, tasks[0].ns)
	do(t, Cut, tasks[1].ns)
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write([]byte("hello\n"))
		sent <- err
	}()
	if err := <-sent; err != nil {
		t.Fatalf("a write behind the cut fails: %v", err)
	}
	do(t, Open, tasks[0].ns)
	do(t, Open, tasks[1].ns)
	echo(t, conn)
}

func TestATaskCanJoinCut(t *testing.T) {
	node := newFabric(t).node()
	j := newJob("j-joincut")
	other := node.join(j, 1)[0]
	ns := newNamespace(t)
	if err := node.Join(background, j.key, Member{Index: 0, Address: addressOf(0), Cut: true}, ns); err != nil {
		t.Fatal(err)
	}
	at := listen(t, other.ns, onPort(other.address, 0))
	unreachable(t, ns, at.String())
	do(t, Open, ns)
	reach(t, ns, at.String())
}

// receive opens a UDP socket of a task.
func receive(t *testing.T, at task) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	err := within(at.ns, func() (err error) {
		conn, err = net.ListenUDP("udp4", &net.UDPAddr{IP: at.address.AsSlice()})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func send(t *testing.T, by task, to *net.UDPConn, mark int, text string) {
	t.Helper()
	err := within(by.ns, func() error {
		dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
			var failed error
			err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark) })
			if err == nil {
				err = failed
			}
			return err
		}}
		conn, err := dialer.Dial("udp4", to.LocalAddr().String())
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Write([]byte(text))
		return err
	})
	if err != nil && mark != 0 { // EPERM: a drop on the way out is told to the sender of a datagram
		t.Fatal(err)
	}
}

// next is the next datagram, or nothing when none comes in time.
func next(t *testing.T, conn *net.UDPConn, within time.Duration) string {
	t.Helper()
	_ = conn.SetReadDeadline(time.Now().Add(within))
	buffer := make([]byte, 2000)
	n, err := conn.Read(buffer)
	if err != nil {
		return ""
	}
	return string(buffer[:n])
}
