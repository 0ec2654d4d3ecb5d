package tree

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
)

// What one round costs the controller when nothing is wrong, beside every node
// reporting to it. Each node runs 20 tasks of 200 jobs that all span nodes, and
// fills two tables (nodes, jobs) of eight values and four histograms; one in a
// hundred raises a verdict of 300 bytes in each round.
//
//	go test -v -run Load ./monitor/tree
func TestLoadGrowsWithTheArityNotWithTheNodes(t *testing.T) {
	const arity = 8
	t.Log("nodes  depth | controller: messages  bytes in | any node: messages in, most | flat: messages  bytes in")
	for _, nodes := range []int{10, 100, 1000} {
		l := measure(t, nodes, arity)
		t.Logf("%5d  %5d | %20d  %8d | %27d | %14d  %8d", nodes, l.depth, l.messages, l.bytes, l.most, l.flat, l.flatBytes)
		if l.messages != 1 {
			t.Errorf("%d nodes: the controller gets %d messages in a round, want one from its only root", nodes, l.messages)
		}
		if l.most > arity+1 {
			t.Errorf("%d nodes: a node gets %d messages in a round, more than from %d children and its parent", nodes, l.most, arity)
		}
		if l.nodes != nodes || l.verdicts != (nodes+99)/100 {
			t.Errorf("%d nodes: a round brought %d nodes and %d verdicts", nodes, l.nodes, l.verdicts)
		}
	}
}

type load struct {
	depth, nodes, verdicts, messages, bytes, most, flat, flatBytes int
}

// measure takes one round of a whole tree, in which no message takes time.
func measure(t *testing.T, nodes, arity int) load {
	t.Helper()
	w := rand.New(rand.NewPCG(uint64(nodes), 2))
	config := Config{Arity: arity, Period: 5 * time.Second}
	c := NewCollector(config, State{}, start)
	all := map[string]*Node{}
	out := c.Members(dialled(nodes), start)
	if out.Write == nil {
		t.Fatal("no tree was built")
	}
	l := load{depth: out.Write.State.Tree.Levels}
	for _, a := range c.Written(true, start).Assign {
		all[a.Node] = NewNode(a.Node, Outbox{Stream: 1})
		all[a.Node].Assign(a.Place, start)
	}
	now := start.Add(config.Period)
	received := map[string]int{}
	var carry func(from string, m Message)
	do := func(id string, out Output) {
		for _, m := range out.Send {
			carry(id, m)
		}
	}
	var tell func(out CollectorOutput)
	tell = func(out CollectorOutput) {
		for _, m := range out.Send {
			received[m.To]++
			do(m.To, all[m.To].Ack(Controller, *m.Ack, now))
		}
		if out.Write != nil {
			l.verdicts += len(out.Write.Verdicts)
			tell(c.Written(true, now))
		}
		for _, r := range out.Rounds {
			l.nodes = max(l.nodes, r.Summary.Nodes.Len())
		}
	}
	carry = func(from string, m Message) {
		if m.To == Controller {
			l.messages++
			l.bytes += proto.Size(m.Report.Proto())
			tell(c.Report(from, *m.Report, now))
			return
		}
		received[m.To]++
		if m.Ack != nil {
			do(m.To, all[m.To].Ack(from, *m.Ack, now))
		} else {
			do(m.To, all[m.To].Report(from, *m.Report, now))
		}
	}
	for i, m := range dialled(nodes) {
		n := all[m.ID]
		var own []Verdict
		if i%100 == 0 {
			body := []byte(strings.Repeat("v", 300))
			if _, err := n.Raise(body, start); err != nil {
				t.Fatal(err)
			}
			own = n.Outbox().Pending
		}
		round := n.Tick(now).Sample
		sample := nodeSample(w, m.ID)
		flat := Report{Round: round, Summary: sample, Verdicts: own}
		flat.Summary.Nodes = SetOf(i)
		l.flat++
		l.flatBytes += proto.Size(flat.Proto())
		out, err := n.Observe(round, sample, now)
		if err != nil {
			t.Fatal(err)
		}
		do(m.ID, out)
	}
	tell(c.Tick(now.Add(config.Period)))
	for _, n := range received {
		l.most = max(l.most, n)
	}
	return l
}

// nodeSample is what a node with 20 tasks might have measured.
func nodeSample(w *rand.Rand, node string) Summary {
	values := func() []uint64 {
		v := make([]uint64, 8)
		for i := range v {
			v[i] = w.Uint64N(1 << (4 + 4*i))
		}
		return v
	}
	var jobs Table
	h := make([]Histogram, 4)
	for range 20 {
		jobs.Add(fmt.Sprintf("job-%016x", w.IntN(200)), values()...)
		for i := range h {
			h[i].Observe(w.Uint64N(1000))
		}
	}
	return Summary{Tables: []Table{Rows(map[string][]uint64{node: values()}), jobs}, Histograms: h}
}
