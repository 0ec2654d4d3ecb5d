package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/api"
	"dormouse/api/agentpb"
)

// caller is a program that, when it is told to, connects to the outside, reads
// from there and says what comes of it.
const caller = `
use IO::Socket::INET;
$| = 1;
my $told = 0;
$SIG{USR1} = sub { $told = 1 };
$SIG{PIPE} = 'IGNORE';
print "ready\n";
select(undef, undef, undef, 0.05) until $told;
my $c = IO::Socket::INET->new(PeerAddr => $ENV{PEER}) or die $!;
print "connected\n";
my $r = sysread($c, my $data, 1);
print defined $r ? ($r ? "read $data\n" : "end\n") : "read: $!\n";
print defined syswrite($c, "x") ? "written\n" : "write: $!\n";
sleep 1000;
`

// calling is a job that runs the caller on the node east, and whom it calls.
type calling struct {
	*pair
	east     string
	ref      *agentpb.TaskRef
	listener *net.TCPListener
}

func newCalling(t *testing.T, policy string) *calling {
	t.Helper()
	c := &calling{pair: newPair(t, "vxlan", "/usr/bin/perl", "-e", caller)}
	c.plan.Tasks, c.plan.Spans = 1, false
	c.east = c.nodes[0].name
	must(t, inNamespace(c.nodes[1].netns, func() (err error) {
		c.listener, err = net.ListenTCP("tcp", &net.TCPAddr{IP: net.ParseIP(underlay(1))})
		return err
	}))
	t.Cleanup(func() { c.listener.Close() })
	must(t, c.listener.SetDeadline(time.Now().Add(30*time.Second)))
	c.spec.Tasks, c.spec.Connections = 1, policy
	c.spec.Env = map[string]string{"PEER": c.listener.Addr().String()}
	c.ref = c.controller.start(c.east, "j-outside", c.spec)
	c.awaitLog(c.east, c.ref, "that it is ready", says("ready"))
	return c
}

// call makes the job connect, and returns the other end.
func (c *calling) call() net.Conn {
	c.t.Helper()
	c.mustDo(c.east, c.ref, &agentpb.SignalTask{Signal: int32(syscall.SIGUSR1)})
	conn, err := c.listener.Accept()
	must(c.t, err)
	c.t.Cleanup(func() { conn.Close() })
	c.awaitLog(c.east, c.ref, "its connection", says("connected"))
	return conn
}

func says(what string) func(string) bool {
	return func(text string) bool { return strings.Contains(text, what+"\n") }
}

func TestAConnectionThatLeavesTheJobIsARefusal(t *testing.T) {
	for _, policy := range []string{"", api.ConnectionsRefuse} {
		t.Run(fmt.Sprintf("policy=%s", policy), func(t *testing.T) {
			c := newCalling(t, policy)
			conn := c.call()
			reply := c.mustDo(c.east, c.ref, &agentpb.Preflight{Checkpoint: "c-refused"})
			refusals := strings.Join(reply.GetPreflight().GetRefusals(), "; ")
			if !strings.Contains(refusals, conn.LocalAddr().String()) {
				t.Errorf("the refusals are %q; want one that names %s", refusals, conn.LocalAddr())
			}
		})
	}
}

func TestAConnectionThatWasOpenedAfterThePreflightIsARefusal(t *testing.T) {
	c := newCalling(t, "")
	c.mustDo(c.east, c.ref, &agentpb.Preflight{Checkpoint: "c-late"})
	conn := c.call()
	c.mustDo(c.east, c.ref, &agentpb.Freeze{Checkpoint: "c-late"})
	f := c.do(c.east, c.ref, &agentpb.Capture{Checkpoint: "c-late"}).GetFailure()
	if !f.GetRefused() || !strings.Contains(f.GetMessage(), conn.LocalAddr().String()) {
		t.Errorf("the capture was answered by %v; want a refusal that names %s", f, conn.LocalAddr())
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	c.awaitLog(c.east, c.ref, "what the peer sent after the refusal", says("read x"))
}

func TestConnectionsThatLeaveTheJobAreClosedInTheJobAndInItsCopies(t *testing.T) {
	c := newCalling(t, api.ConnectionsClose)
	conn := c.call()
	c.captureTask(c.east, c.ref, "c-close")
	must(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the peer reads %v; want the end of its connection at the capture", err)
	}
	if text := c.logs(c.east, c.ref, false); !strings.HasSuffix(text, "connected\n") {
		t.Errorf("the task had written %q before it was thawed", text)
	}
	c.mustDo(c.east, c.ref, &agentpb.Thaw{Checkpoint: "c-close"})
	c.awaitLog(c.east, c.ref, "the end of its connection", says("read: Software caused connection abort\nwrite: Broken pipe"))
	c.controller.store(c.east, c.ref, "c-close")
	c.mustDo(c.east, c.ref, &agentpb.DestroyTask{})
	west := c.nodes[1].name
	again := c.restore(west, c.ref, "c-close", c.spec)
	// CRIU restores an aborted connection as one that was shut down.
	c.awaitLog(west, again, "the end of its connection", says("end\nwrite: Broken pipe"))
}

func TestAClosedConnectionStaysClosedWhenTheCheckpointIsAborted(t *testing.T) {
	c := newCalling(t, api.ConnectionsClose)
	c.call()
	c.captureTask(c.east, c.ref, "c-aborted")
	c.mustDo(c.east, c.ref, &agentpb.Thaw{Checkpoint: "c-aborted", Abort: true})
	c.awaitLog(c.east, c.ref, "the end of its connection", says("read: Software caused connection abort"))
}

func TestConnectionsThatLeaveTheJobAreKept(t *testing.T) {
	c := newCalling(t, api.ConnectionsKeep)
	conn := c.call()
	c.checkpoint(c.east, c.ref, "c-keep")
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	c.awaitLog(c.east, c.ref, "what the peer sent", says("read x"))
}

// requester asks for a connection and does not wait for the answer. When there is one, it says
// what it is.
const requester = `
use IO::Socket::INET;
use Socket qw(SOL_SOCKET SO_ERROR);
$| = 1;
$SIG{PIPE} = 'IGNORE';
my $c = IO::Socket::INET->new(PeerAddr => $ENV{PEER}, Blocking => 0) or die $!;
print "asked\n";
vec(my $set = '', fileno $c, 1) = 1;
select(undef, my $writable = $set, undef, undef);
$! = unpack 'i', getsockopt($c, SOL_SOCKET, SO_ERROR);
print $! + 0 ? "answer: $!\n" : "answer\n";
print defined syswrite($c, "x") ? "written\n" : "write: $!\n";
sleep 1000;
`

// newRequesting is a job whose connection request to the outside the kernel there drops, until
// answer is called.
func newRequesting(t *testing.T, policy string) (c *calling, answer func()) {
	t.Helper()
	c = &calling{pair: newPair(t, "vxlan", "/usr/bin/perl", "-e", requester)}
	c.plan.Tasks, c.plan.Spans = 1, false
	c.east = c.nodes[0].name
	var listener, filler int
	must(t, inNamespace(c.nodes[1].netns, func() (err error) {
		listener, filler, err = fullListener(underlay(1))
		return err
	}))
	t.Cleanup(func() { unix.Close(listener); unix.Close(filler) })
	address, err := unix.Getsockname(listener)
	must(t, err)
	c.spec.Tasks, c.spec.Connections = 1, policy
	c.spec.Env = map[string]string{"PEER": fmt.Sprintf("%s:%d", underlay(1), address.(*unix.SockaddrInet4).Port)}
	c.ref = c.controller.start(c.east, "j-asking", c.spec)
	c.awaitLog(c.east, c.ref, "its request", says("asked"))
	return c, func() {
		accepted, _, err := unix.Accept(listener)
		must(t, err)
		unix.Close(accepted)
	}
}

// fullListener is a listening socket whose queue is full: what asks for a connection
// gets no answer (listen(2)).
func fullListener(ip string) (listener, filler int, err error) {
	at := &unix.SockaddrInet4{Addr: netip.MustParseAddr(ip).As4()}
	if listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, -1, err
	}
	if filler, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return listener, -1, err
	}
	if err := errors.Join(unix.Bind(listener, at), unix.Listen(listener, 0)); err != nil {
		return listener, filler, err
	}
	bound, err := unix.Getsockname(listener)
	if err != nil {
		return listener, filler, err
	}
	return listener, filler, unix.Connect(filler, bound)
}

func TestAConnectionRequestThatLeavesTheJobIsARefusal(t *testing.T) {
	c, _ := newRequesting(t, "")
	reply := c.mustDo(c.east, c.ref, &agentpb.Preflight{Checkpoint: "c-asking"})
	refusals := strings.Join(reply.GetPreflight().GetRefusals(), "; ")
	if !strings.Contains(refusals, "to "+c.spec.Env["PEER"]) || !strings.Contains(refusals, "(perl)") {
		t.Errorf("the refusals are %q; want one that names perl and %s", refusals, c.spec.Env["PEER"])
	}
}

func TestAConnectionRequestThatLeavesTheJobIsClosed(t *testing.T) {
	c, _ := newRequesting(t, api.ConnectionsClose)
	c.checkpoint(c.east, c.ref, "c-asking")
	c.awaitLog(c.east, c.ref, "the end of its request", says("answer: Software caused connection abort\nwrite: Broken pipe"))
	c.mustDo(c.east, c.ref, &agentpb.DestroyTask{})
	again := c.restore(c.nodes[1].name, c.ref, "c-asking", c.spec)
	// CRIU restores it as a connection that was shut down.
	c.awaitLog(c.nodes[1].name, again, "the end of its request", says("answer\nwrite: Broken pipe"))
}

func TestAConnectionRequestThatLeavesTheJobIsKept(t *testing.T) {
	c, answer := newRequesting(t, api.ConnectionsKeep)
	c.checkpoint(c.east, c.ref, "c-asking")
	c.mustDo(c.east, c.ref, &agentpb.DestroyTask{})
	again := c.restore(c.east, c.ref, "c-asking", c.spec)
	answer()
	c.awaitLog(c.east, again, "its connection", says("answer\nwritten"))
}

// late is a server that accepts only when it is told to.
const late = `
use IO::Socket::INET;
$| = 1;
my $told = 0;
$SIG{USR1} = sub { $told = 1 };
my $l = IO::Socket::INET->new(Listen => 5, LocalPort => 5000, ReuseAddr => 1) or die $!;
print "ready\n";
select(undef, undef, undef, 0.05) until $told;
my $c = $l->accept or die $!;
print "accepted\n";
while (sysread($c, my $data, 1)) { print "read $data\n" }
sleep 1000;
`

func TestAConnectionThatWaitsAtAPublishedPortIsNotBrokenForACheckpoint(t *testing.T) {
	c := &calling{pair: newPair(t, "vxlan", "/usr/bin/perl", "-e", late)}
	c.plan.Tasks, c.plan.Spans = 1, false
	c.plan.Publish = []*agentpb.Publish{{Protocol: "tcp", Port: 8080, Target: 5000}}
	c.east = c.nodes[0].name
	c.spec.Tasks, c.spec.Connections = 1, api.ConnectionsClose
	c.ref = c.controller.start(c.east, "j-late", c.spec)
	c.awaitLog(c.east, c.ref, "that it is ready", says("ready"))
	var conn net.Conn
	must(t, inNamespace(c.nodes[1].netns, func() (err error) {
		conn, err = net.DialTimeout("tcp", underlay(0)+":8080", 10*time.Second)
		return err
	}))
	defer conn.Close()
	f := c.tryCapture(c.east, c.ref, &agentpb.Freeze{Checkpoint: "c-waiting"})
	if !f.GetRetryable() || !f.GetRefused() || !strings.Contains(f.GetMessage(), conn.LocalAddr().String()) {
		t.Errorf("the capture was answered by %v; want to be asked again, for %s", f, conn.LocalAddr())
	}
	c.mustDo(c.east, c.ref, &agentpb.Thaw{Checkpoint: "c-waiting", Abort: true})
	c.mustDo(c.east, c.ref, &agentpb.SignalTask{Signal: int32(syscall.SIGUSR1)})
	c.awaitLog(c.east, c.ref, "the connection", says("accepted"))
	_, err := conn.Write([]byte("x"))
	must(t, err)
	c.awaitLog(c.east, c.ref, "what was sent", says("read x"))
	c.checkpoint(c.east, c.ref, "c-accepted")
	must(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the peer reads %v; want the end of its connection at the capture", err)
	}
}
