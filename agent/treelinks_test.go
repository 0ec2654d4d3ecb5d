package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
	"math/big"
	"net/netip"
	"sync"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/monitor/tally"
	"dormouse/monitor/tree"
)

// authority signs certificates of nodes as the controller does.
type authority struct {
	t           *testing.T
	certificate *x509.Certificate
	key         ed25519.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	must(t, err)
	certificate, err := x509.ParseCertificate(der)
	must(t, err)
	return &authority{t, certificate, private}
}

// identify gives a node what it proves itself with; it trusts only trusted.
func (a *authority) identify(name string, trusted *authority) *identity {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	must(a.t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, public, a.key)
	must(a.t, err)
	leaf, err := x509.ParseCertificate(der)
	must(a.t, err)
	roots := x509.NewCertPool()
	roots.AddCert(trusted.certificate)
	return &identity{certificate: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private, Leaf: leaf}, roots: roots}
}

// grove is nodes of a tree that are connected, and a controller that remembers
// what each tells it and answers.
type grove struct {
	t         *testing.T
	authority *authority

	mu      sync.Mutex
	changed chan struct{}
	told    map[string][]tree.Report
	nodes   map[string]*treeNode
	at      map[string]string
	stop    map[string]func()
}

func newGrove(t *testing.T, names ...string) *grove {
	g := &grove{
		t: t, authority: newAuthority(t), changed: make(chan struct{}), told: map[string][]tree.Report{},
		nodes: map[string]*treeNode{}, at: map[string]string{}, stop: map[string]func(){},
	}
	for _, name := range names {
		g.add(name, g.authority.identify(name, g.authority))
	}
	return g
}

func (g *grove) add(name string, id *identity) {
	g.t.Helper()
	n, err := openTreeNode(g.t.TempDir(), name, &controllerClock{}, slog.New(slog.DiscardHandler))
	must(g.t, err)
	links := newTreeLinks(func() *identity { return id }, n.log)
	links.node, n.peers = n, links
	n.sample = func() tree.Summary { return tally.Fill(name, tally.Node{CPUs: 1}, nil) }
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	n.toController = func(m *agentpb.FromAgent) {
		running.Go(func() { n.answered(tree.Controller, g.hear(name, m.GetTreeReport())) })
	}
	running.Go(func() { n.run(ctx) })
	g.nodes[name], g.at[name] = n, links.listen(netip.MustParseAddr("127.0.0.1"))
	g.stop[name] = sync.OnceFunc(func() { cancel(); links.close(); running.Wait() })
	g.t.Cleanup(g.stop[name])
}

func (g *grove) hear(from string, p *agentpb.TreeReport) tree.Ack {
	r, err := tree.ReportFrom(p)
	if err != nil {
		g.t.Error(err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.told[from] = append(g.told[from], r)
	close(g.changed)
	g.changed = make(chan struct{})
	ack := tree.Ack{Round: r.Round}
	for _, v := range r.Verdicts {
		ack.Stored = append(ack.Stored, v.Position)
	}
	return ack
}

// await waits for a report of a node that satisfies ok.
func (g *grove) await(from, what string, ok func(tree.Report) bool) tree.Report {
	g.t.Helper()
	limit := time.After(20 * time.Second)
	for seen := 0; ; {
		g.mu.Lock()
		told, changed := g.told[from], g.changed
		g.mu.Unlock()
		for ; seen < len(told); seen++ {
			if ok(told[seen]) {
				return told[seen]
			}
		}
		select {
		case <-changed:
		case <-limit:
			g.t.Fatalf("node %s did not tell %s", from, what)
		}
	}
}

// grow places the nodes one below the other, in the order of their names.
func (g *grove) grow(epoch int64, names ...string) {
	for i, name := range names {
		place := tree.Assignment{Epoch: epoch, Number: i, Depth: i, Levels: len(names) - 1, Period: 2 * time.Second}
		if i > 0 {
			place.Parent, place.ParentAddress = names[i-1], g.at[names[i-1]]
		}
		if i < len(names)-1 {
			place.Children = names[i+1 : i+2]
		}
		g.nodes[name].assign(place.Proto())
	}
}

func nodesIn(want int) func(tree.Report) bool {
	return func(r tree.Report) bool {
		return r.Summary.Nodes.Len() == want && len(tally.Read(r.Summary).Nodes) == want
	}
}

func verdicts(r tree.Report) bool { return len(r.Verdicts) > 0 }

func TestReportsAndFindingsGoUpTheTree(t *testing.T) {
	t.Parallel()
	g := newGrove(t, "a", "b", "c")
	g.grow(1, "a", "b", "c")
	g.await("a", "of all three", nodesIn(3))
	must(t, g.nodes["c"].say("x", api.Finding{Condition: "bad"}))
	r := g.await("a", "what c found", verdicts)
	if r.Verdicts[0].Node != "c" {
		t.Errorf("it is %s that found it, want c", r.Verdicts[0].Node)
	}
	// The answer goes down again, or c would tell it once more.
	seen := r.Round
	r = g.await("a", "of two rounds later", func(r tree.Report) bool { return r.Round >= seen+2 && nodesIn(3)(r) })
	if len(r.Verdicts) != 0 {
		t.Errorf("it is told again: %v", r.Verdicts)
	}
}

func TestTheChildrenOfANodeThatIsGoneTellTheController(t *testing.T) {
	t.Parallel()
	g := newGrove(t, "a", "b", "c")
	g.grow(1, "a", "b", "c")
	g.await("a", "of all three", nodesIn(3))
	g.stop["a"]()
	must(t, g.nodes["c"].say("x", api.Finding{Condition: "bad"}))
	r := g.await("b", "what c found", verdicts)
	if r.Orphan != "a" || r.Refused || !nodesIn(2)(r) {
		t.Errorf("it tells %+v, want that it is an orphan of a, and of two nodes", r)
	}
	g.grow(2, "b", "c")
	g.await("b", "as the root", func(r tree.Report) bool { return r.Orphan == "" && nodesIn(2)(r) })
}

func TestANodeThatIsNoChildIsRefused(t *testing.T) {
	t.Parallel()
	g := newGrove(t, "a", "b", "c")
	g.grow(1, "a", "b")
	g.nodes["c"].assign(tree.Assignment{Epoch: 1, Number: 2, Depth: 1, Levels: 1, Parent: "a", ParentAddress: g.at["a"], Period: 2 * time.Second}.Proto())
	r := g.await("c", "the controller", func(r tree.Report) bool { return r.Orphan == "a" && r.Refused })
	if !nodesIn(1)(r) {
		t.Errorf("it tells %+v", r)
	}
	g.await("a", "of its child", nodesIn(2))
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, r := range g.told["a"] {
		if r.Summary.Nodes.Has(2) {
			t.Errorf("what it told the other was taken: %+v", r)
		}
	}
}

// A node tells only the one it was told to tell, and hears only those whom the
// controller knows.
func TestNodesKnowEachOtherByTheirCertificates(t *testing.T) {
	t.Parallel()
	other := newAuthority(t)
	for name, c := range map[string]struct {
		parent func(g *grove) *identity
		child  func(g *grove) *identity
	}{
		"another node answers": {
			func(g *grove) *identity { return g.authority.identify("z", g.authority) },
			func(g *grove) *identity { return g.authority.identify("b", g.authority) },
		},
		"a stranger answers": {
			func(g *grove) *identity { return other.identify("a", g.authority) },
			func(g *grove) *identity { return g.authority.identify("b", g.authority) },
		},
		"a stranger speaks": {
			func(g *grove) *identity { return g.authority.identify("a", g.authority) },
			func(g *grove) *identity { return other.identify("b", g.authority) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGrove(t)
			g.add("a", c.parent(g))
			g.add("b", c.child(g))
			g.grow(1, "a", "b")
			r := g.await("b", "the controller itself", func(tree.Report) bool { return true })
			if r.Orphan != "a" || r.Refused {
				t.Errorf("it tells %+v, want that it is an orphan of a", r)
			}
			g.await("a", "of itself", nodesIn(1))
		})
	}
}

func TestANodeWithoutAnAddressIsNotReachable(t *testing.T) {
	l := newTreeLinks(nil, slog.New(slog.DiscardHandler))
	defer l.close()
	if at := l.listen(netip.Addr{}); at != "" {
		t.Errorf("it is reached at %s", at)
	}
	first := l.listen(netip.MustParseAddr("127.0.0.1"))
	if again := l.listen(netip.MustParseAddr("127.0.0.1")); again != first || first == "" {
		t.Errorf("it is reached at %q and then at %q, want the same", first, again)
	}
	if moved := l.listen(netip.MustParseAddr("127.0.0.2")); moved == first || moved == "" {
		t.Errorf("it is reached at %q, want another address", moved)
	}
}

func TestAnAgentSaysWhereOthersReachIt(t *testing.T) {
	c := newController(t)
	c.addNode("east-0", func(config *Config) { config.Underlay = netip.MustParseAddr("127.0.0.1") })
	c.addNode("east-1")
	c.mu.Lock()
	defer c.mu.Unlock()
	if at, err := netip.ParseAddrPort(c.nodes["east-0"].hello.GetTreeAddress()); err != nil || at.Addr().String() != "127.0.0.1" || at.Port() == 0 {
		t.Errorf("it is reached at %v, %v; want 127.0.0.1 and a port", at, err)
	}
	if at := c.nodes["east-1"].hello.GetTreeAddress(); at != "" {
		t.Errorf("without an underlay it is reached at %q", at)
	}
}
