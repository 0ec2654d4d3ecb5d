package network

import (
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// Where two tasks can be to each other. The first is the yardstick: a veth pair
// and nothing else.
var places = []struct {
	name string
	make func(b *testing.B) (client, server *os.File, at string)
}{
	{"veth", plainVeth},
	{"same-node", sameNode},
	{"vxlan", acrossNodes(TunnelVXLAN)},
	{"wireguard", acrossNodes(TunnelWireGuard)},
}

// BenchmarkThroughput is one TCP stream from task to task.
func BenchmarkThroughput(b *testing.B) {
	for _, place := range places {
		b.Run(place.name, func(b *testing.B) {
			client, server, at := place.make(b)
			conn := connected(b, client, server, at, func(served net.Conn) { _, _ = io.Copy(io.Discard, served) })
			block := make([]byte, 1<<20)
			b.SetBytes(int64(len(block)))
			for b.Loop() {
				if _, err := conn.Write(block); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkRoundTrip is one byte to the other task and back.
func BenchmarkRoundTrip(b *testing.B) {
	for _, place := range places {
		b.Run(place.name, func(b *testing.B) {
			client, server, at := place.make(b)
			conn := connected(b, client, server, at, func(served net.Conn) { _, _ = io.Copy(served, served) })
			single := make([]byte, 1)
			for b.Loop() {
				if _, err := conn.Write(single); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(conn, single); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkLife is a network with one task, from Prepare to Leave.
func BenchmarkLife(b *testing.B) {
	for _, tunnel := range []string{"", TunnelVXLAN, TunnelWireGuard} {
		b.Run("tunnel="+tunnel, func(b *testing.B) {
			n := newFabric(b).node()
			j := newJob("j-bench")
			if tunnel != "" {
				j = newJob("j-bench", over(tunnel))
			}
			ns := newNamespace(b)
			for b.Loop() {
				n.prepare(j)
				if err := n.Join(background, j.key, Member{Index: 0, Address: addressOf(0)}, ns); err != nil {
					b.Fatal(err)
				}
				if err := n.Leave(background, j.key, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkCut is a namespace cut off, and opened again later.
func BenchmarkCut(b *testing.B) {
	needsRoot(b)
	ns := newNamespace(b)
	for b.Loop() {
		if err := Cut(ns); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		time.Sleep(50 * time.Millisecond) // the next change would wait until the kernel has freed what this one replaced
		b.StartTimer()
		if err := Open(ns); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		time.Sleep(50 * time.Millisecond)
		b.StartTimer()
	}
}

func connected(b *testing.B, client, server *os.File, at string, serve func(net.Conn)) net.Conn {
	b.Helper()
	var listener net.Listener
	err := within(server, func() (err error) {
		listener, err = net.Listen("tcp4", at)
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { listener.Close() })
	go func() {
		if served, err := listener.Accept(); err == nil {
			serve(served)
			served.Close()
		}
	}()
	conn, err := dial(client, listener.Addr().String(), ample)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	return conn
}

func plainVeth(b *testing.B) (client, server *os.File, at string) {
	needsRoot(b)
	client, server = newNamespace(b), newNamespace(b)
	near, far := open(b, client), open(b, server)
	attributes := netlink.NewLinkAttrs()
	attributes.Name, attributes.MTU = "near", TaskMTU
	if err := near.links.LinkAdd(&netlink.Veth{LinkAttrs: attributes, PeerName: "far", PeerMTU: TaskMTU, PeerNamespace: netlink.NsFd(server.Fd())}); err != nil {
		b.Fatal(err)
	}
	if err := connectPair(near, far); err != nil {
		b.Fatal(err)
	}
	return client, server, "192.0.2.2:0"
}

func sameNode(b *testing.B) (client, server *os.File, at string) {
	tasks := newFabric(b).node().join(newJob("j-bench"), 0, 1)
	return tasks[0].ns, tasks[1].ns, onPort(tasks[1].address, 0)
}

func acrossNodes(tunnel string) func(*testing.B) (client, server *os.File, at string) {
	return func(b *testing.B) (client, server *os.File, at string) {
		f := newFabric(b)
		tasks := span(b, newJob("j-bench", over(tunnel)), f.node(), f.node())
		return tasks[0].ns, tasks[1].ns, onPort(tasks[1].address, 0)
	}
}
