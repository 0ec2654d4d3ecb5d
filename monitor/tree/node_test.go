package tree

import (
	"bytes"
	"testing"
	"time"
)

const period = 16 * time.Second // of two levels: a slot is 1.6 s

func schedule2() schedule { return schedule{period, 2} }

// placed is a node below p with the child c, at the beginning of round 100.
func placed(t *testing.T) (*Node, time.Time) {
	t.Helper()
	s := schedule2()
	n := NewNode("n", Outbox{Stream: 1})
	n.Assign(Assignment{Epoch: 1, Number: 3, Parent: "p", Depth: 1, Levels: 2, Children: []string{"c"}, Period: period}, s.at(99, 1))
	if out := n.Tick(s.at(99, 9)); out.Sample != 0 || !out.Wake.Equal(s.at(100, 0)) {
		t.Fatalf("a node with a new place does %+v in the same round, want nothing", out)
	}
	if out := n.Tick(s.at(100, 0)); out.Sample != 100 {
		t.Fatalf("the round begins with %+v, want a sample of round 100", out)
	}
	return n, s.at(100, 0)
}

func raise(t *testing.T, n *Node, body []byte, now time.Time) {
	t.Helper()
	if out, err := n.Raise(body, now); err != nil || !out.Store {
		t.Fatalf("raising answers %+v, %v; want that it is to be stored", out, err)
	}
}

func childReport(verdicts ...Verdict) Report {
	return Report{Round: 100, Depth: 2, Summary: Summary{Nodes: SetOf(4)}, Verdicts: verdicts}
}

// only is the one message of an output.
func only(t *testing.T, out Output) Message {
	t.Helper()
	if len(out.Send) != 1 {
		t.Fatalf("sent %+v, want one message", out.Send)
	}
	return out.Send[0]
}

func TestANodeReportsWhenItsChildrenHave(t *testing.T) {
	n, now := placed(t)
	if out, err := n.Observe(100, Summary{}, now); err != nil || len(out.Send) != 0 {
		t.Fatalf("before its child has reported: %+v, %v; want nothing", out.Send, err)
	}
	m := only(t, n.Report("c", childReport(), now))
	if m.To != "p" || m.Report == nil || m.Report.Summary.Nodes.Len() != 2 {
		t.Fatalf("then: %+v, want a report of two nodes to p", m)
	}
	if out := n.Ack("p", Ack{Round: 100}, now); only(t, out).To != "c" {
		t.Fatalf("the answer is passed on as %+v, want to c", out.Send)
	}
	if out := n.Tick(schedule2().answerBy(100, 1)); len(out.Send) != 0 {
		t.Fatalf("and after that: %+v, want nothing", out.Send)
	}
}

func TestANodeDoesNotWaitForAChildThatIsLate(t *testing.T) {
	n, now := placed(t)
	if _, err := n.Observe(100, Summary{}, now); err != nil {
		t.Fatal(err)
	}
	late := schedule2().reportBy(100, 1)
	if m := only(t, n.Tick(late)); m.To != "p" || m.Report.Summary.Nodes.Len() != 1 {
		t.Fatalf("sent %+v, want a report of itself to p", m)
	}
	if m := only(t, n.Report("c", childReport(), late)); m.To != "c" || !m.Ack.Refused {
		t.Fatalf("the late child gets %+v, want a refusal", m)
	}
}

func TestWithoutAnAnswerTheControllerIsTold(t *testing.T) {
	s := schedule2()
	for name, lose := range map[string]func(n *Node) Output{
		"silence":     func(n *Node) Output { return n.Tick(s.answerBy(100, 1)) },
		"unreachable": func(n *Node) Output { return n.Unreachable("p", 100, s.at(100, 2)) },
		"refused":     func(n *Node) Output { return n.Ack("p", Ack{Round: 100, Refused: true}, s.at(100, 2)) },
	} {
		n, now := placed(t)
		raise(t, n, []byte("v"), now)
		if _, err := n.Observe(100, Summary{}, now); err != nil {
			t.Fatal(err)
		}
		only(t, n.Report("c", childReport(Verdict{Position{"c", 1, 1}, nil}), now))
		m := only(t, lose(n))
		if m.To != Controller || m.Report.Orphan != "p" || len(m.Report.Verdicts) != 2 || m.Report.Summary.Nodes.Len() != 2 {
			t.Errorf("%s: sent %+v, want the whole report to the controller", name, m)
		}
		out := n.Ack(Controller, Ack{Round: 100, Stored: []Position{{"c", 1, 1}, {"n", 1, 1}}}, s.at(100, 6))
		if m := only(t, out); m.To != "c" || len(m.Ack.Stored) != 1 || m.Ack.Stored[0].Node != "c" {
			t.Errorf("%s: the child gets %+v, want that its verdict is stored", name, m)
		}
		if !out.Store || len(n.Outbox().Pending) != 0 {
			t.Errorf("%s: the node keeps %+v", name, n.Outbox())
		}
	}
}

func TestVerdictsThatDidNotFitAreToldByTheirNode(t *testing.T) {
	s := schedule2()
	n, now := placed(t)
	const many = 3 * MaxReport / MaxBody
	for range many {
		raise(t, n, bytes.Repeat([]byte("v"), MaxBody), now)
	}
	if _, err := n.Observe(100, Summary{}, now); err != nil {
		t.Fatal(err)
	}
	m := only(t, n.Report("c", childReport(), now))
	if _, err := ReportFrom(m.Report.Proto()); err != nil {
		t.Fatal(err)
	}
	stored := Position{"n", 1, m.Report.Verdicts[len(m.Report.Verdicts)-1].Seq}
	n.Ack("p", Ack{Round: 100, Stored: []Position{stored}}, now)
	out := n.Tick(s.answerBy(100, 1))
	for len(out.Send) > 0 {
		m := only(t, out)
		if _, err := ReportFrom(m.Report.Proto()); err != nil || m.To != Controller {
			t.Fatalf("to %q: %v", m.To, err)
		}
		if first := m.Report.Verdicts[0].Seq; first != stored.Seq+1 {
			t.Fatalf("the next report begins with verdict %d, want %d", first, stored.Seq+1)
		}
		stored.Seq = m.Report.Verdicts[len(m.Report.Verdicts)-1].Seq
		out = n.Ack(Controller, Ack{Round: 100, Stored: []Position{stored}}, s.at(100, 6))
	}
	if stored.Seq != many || len(n.Outbox().Pending) != 0 {
		t.Errorf("the controller has %d of %d verdicts by the end of the round", stored.Seq, many)
	}
}

func TestANodeTakesReportsOnlyOfItsChildren(t *testing.T) {
	n, now := placed(t)
	for name, m := range map[string]Message{
		"a stranger":          only(t, n.Report("x", childReport(), now)),
		"another depth":       only(t, n.Report("c", Report{Round: 100, Depth: 1}, now)),
		"a round that is old": only(t, n.Report("c", Report{Round: 99, Depth: 2}, now)),
	} {
		if m.Ack == nil || !m.Ack.Refused {
			t.Errorf("%s gets %+v, want a refusal", name, m)
		}
	}
}

func TestAChildWhoseClockIsAheadIsHeard(t *testing.T) {
	s := schedule2()
	n, now := placed(t)
	r := childReport()
	r.Round = 101
	before := now.Add(period - time.Millisecond)
	n.Tick(before)
	if out := n.Report("c", r, before); len(out.Send) != 0 {
		t.Fatalf("a report of the next round is answered with %+v, want nothing yet", out.Send)
	}
	n.Tick(s.at(101, 0))
	out, err := n.Observe(101, Summary{}, s.at(101, 0))
	if err != nil {
		t.Fatal(err)
	}
	if m := only(t, out); m.Report.Summary.Nodes.Len() != 2 {
		t.Errorf("the next round's report is %+v, want one of two nodes", m)
	}
}

func TestAVerdictTooLongIsRefused(t *testing.T) {
	n, now := placed(t)
	if _, err := n.Raise(make([]byte, MaxBody+1), now); err == nil || n.Outbox().Last != 0 {
		t.Errorf("it is taken: %v", err)
	}
}
