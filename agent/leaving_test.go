package agent

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

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
print "ready\n";
select(undef, undef, undef, 0.05) until $told;
my $c = IO::Socket::INET->new(PeerAddr => $ENV{PEER}) or die $!;
print "connected\n";
my $r = sysread($c, my $data, 1);
print defined $r ? ($r ? "read $data\n" : "end\n") : "error\n";
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
	c.awaitLog(c.east, c.ref, "the end of its connection", says("error"))
	c.controller.store(c.east, c.ref, "c-close")
	c.mustDo(c.east, c.ref, &agentpb.DestroyTask{})
	west := c.nodes[1].name
	again := c.restore(west, c.ref, "c-close", c.spec)
	// CRIU restores an aborted connection as one that was shut down.
	c.awaitLog(west, again, "the end of its connection", says("end"))
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
