package agent

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
)

// caller is a program that reads from a connection to the outside and says what
// comes of it.
const caller = `
use IO::Socket::INET;
$| = 1;
my $c = IO::Socket::INET->new(PeerAddr => $ENV{PEER}) or die $!;
print "connected\n";
my $r = sysread($c, my $data, 1);
print defined $r ? ($r ? "read $data\n" : "end\n") : "error\n";
sleep 1000;
`

// outside starts a job that holds a connection that leaves it, and returns the
// other end of that.
func outside(t *testing.T, policy string) (*pair, *agentpb.TaskRef, net.Conn) {
	t.Helper()
	p := newPair(t, "vxlan", "/usr/bin/perl", "-e", caller)
	p.plan.Tasks, p.plan.Spans = 1, false
	var listener net.Listener
	must(t, inNamespace(p.nodes[1].netns, func() (err error) {
		listener, err = net.Listen("tcp", underlay(1)+":0")
		return err
	}))
	t.Cleanup(func() { listener.Close() })
	p.spec.Tasks, p.spec.Connections = 1, policy
	p.spec.Env = map[string]string{"PEER": listener.Addr().String()}
	ref := p.controller.start(p.nodes[0].name, "j-outside", p.spec)
	must(t, listener.(*net.TCPListener).SetDeadline(time.Now().Add(30*time.Second)))
	conn, err := listener.Accept()
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	p.awaitLog(p.nodes[0].name, ref, "its connection", says("connected"))
	return p, ref, conn
}

func says(what string) func(string) bool {
	return func(text string) bool { return strings.Contains(text, what+"\n") }
}

func TestAConnectionThatLeavesTheJobIsARefusal(t *testing.T) {
	for _, policy := range []string{"", api.ConnectionsRefuse} {
		t.Run(fmt.Sprintf("policy=%s", policy), func(t *testing.T) {
			p, ref, conn := outside(t, policy)
			reply := p.mustDo(p.nodes[0].name, ref, &agentpb.Preflight{Checkpoint: "c-refused"})
			refusals := strings.Join(reply.GetPreflight().GetRefusals(), "; ")
			if !strings.Contains(refusals, conn.LocalAddr().String()) {
				t.Errorf("the refusals are %q; want one that names %s", refusals, conn.LocalAddr())
			}
		})
	}
}

func TestConnectionsThatLeaveTheJobAreClosedInTheJobAndInItsCopies(t *testing.T) {
	p, ref, conn := outside(t, api.ConnectionsClose)
	east := p.nodes[0].name
	p.captureTask(east, ref, "c-close")
	must(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
	if _, err := conn.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("the peer reads %v; want the end of its connection at the capture", err)
	}
	if text := p.logs(east, ref, false); text != "connected\n" {
		t.Errorf("the task wrote %q before it was thawed", text)
	}
	p.mustDo(east, ref, &agentpb.Thaw{Checkpoint: "c-close"})
	p.awaitLog(east, ref, "the end of its connection", says("error"))
	p.controller.store(east, ref, "c-close")
	p.mustDo(east, ref, &agentpb.DestroyTask{})
	again := p.restore(p.nodes[1].name, ref, "c-close", p.spec)
	// CRIU restores an aborted connection as one that was shut down.
	p.awaitLog(p.nodes[1].name, again, "the end of its connection", says("end"))
}

func TestConnectionsThatLeaveTheJobAreKept(t *testing.T) {
	p, ref, conn := outside(t, api.ConnectionsKeep)
	east := p.nodes[0].name
	p.checkpoint(east, ref, "c-keep")
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	p.awaitLog(east, ref, "what the peer sent", says("read x"))
}
