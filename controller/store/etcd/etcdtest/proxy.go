package etcdtest

import (
	"io"
	"net"
	"strings"
	"sync"
	"testing"
)

// Proxy is a network between an etcd and one that uses it, which a test can cut.
type Proxy struct {
	URL string // for clients

	target string
	mu     sync.Mutex
	cut    bool
	links  map[*link]bool
	work   sync.WaitGroup
}

// link is one connection through the proxy.
type link struct{ client, server net.Conn }

func (l *link) close() {
	l.client.Close()
	if l.server != nil {
		l.server.Close()
	}
}

// NewProxy begins to pass connections on to the server, until the test ends.
func NewProxy(t testing.TB, s *Server) *Proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{URL: "http://" + listener.Addr().String(), target: strings.TrimPrefix(s.URL, "http://"), links: make(map[*link]bool)}
	p.work.Go(func() { p.accept(listener) })
	t.Cleanup(func() {
		listener.Close()
		p.Mend()
		p.Break()
		p.work.Wait()
	})
	return p
}

func (p *Proxy) accept(listener net.Listener) {
	for {
		connection, err := listener.Accept()
		if err != nil {
			return
		}
		p.work.Go(func() { p.serve(&link{client: connection}) })
	}
}

func (p *Proxy) serve(l *link) {
	defer l.close()
	if !p.connect(l) {
		return
	}
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.links, l)
	}()
	var copying sync.WaitGroup
	copying.Go(func() { p.copy(l, l.server, l.client) })
	copying.Go(func() { p.copy(l, l.client, l.server) })
	copying.Wait()
}

func (p *Proxy) connect(l *link) bool {
	server, err := net.Dial("tcp", p.target)
	p.mu.Lock()
	defer p.mu.Unlock()
	// While the network is cut a connection is accepted and leads nowhere, as a
	// packet does.
	if err == nil {
		l.server = server
	}
	p.links[l] = true
	return err == nil || p.cut
}

// copy passes on what comes; what comes while the network is cut is lost, and
// the connection with it.
func (p *Proxy) copy(l *link, to, from net.Conn) {
	defer l.close()
	if to == nil || from == nil {
		return
	}
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		p.mu.Lock()
		cut := p.cut
		p.mu.Unlock()
		if cut {
			io.Copy(io.Discard, from) // until Break, or the other end gives up
			return
		}
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// Cut loses everything from now on, without telling either side.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = true
}

// Mend ends Cut; connections that lost something are broken.
func (p *Proxy) Mend() {
	p.mu.Lock()
	was := p.cut
	p.cut = false
	p.mu.Unlock()
	if was {
		p.Break()
	}
}

// Break ends every connection at once, whatever is on its way.
func (p *Proxy) Break() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		l.close()
	}
}
