package tree

import (
	"testing"
	"time"
)

// collecting is a collector with a tree of n nodes in round 100, of arity 4.
func collecting(t *testing.T, n int) (*Collector, time.Time) {
	t.Helper()
	now := schedule2().at(100, 0)
	c := NewCollector(Config{Arity: 4, Period: period}, State{}, now.Add(-period))
	if out := c.Members(dialled(n), now); out.Write == nil {
		t.Fatalf("the first nodes bring %+v, want a tree to write", out)
	}
	if out := c.Written(true, now); len(out.Assign) != n {
		t.Fatalf("%d nodes are given a place, want %d", len(out.Assign), n)
	}
	return c, now
}

func TestAVerdictIsAnsweredOnceItIsStored(t *testing.T) {
	c, now := collecting(t, 5)
	r := Report{Round: 100, Verdicts: []Verdict{{Position{"n0003", 1, 1}, nil}, {Position{"n0003", 1, 2}, nil}, {Position{"n0002", 1, 2}, nil}}}
	out := c.Report("n0000", r, now)
	if out.Write == nil || len(out.Write.Verdicts) != 2 || len(out.Send) != 0 {
		t.Fatalf("a report brings %+v, want two verdicts to write, and not that of which one before is missing", out)
	}
	if again := c.Report("n0001", r, now); again.Write != nil || len(again.Send) != 0 {
		t.Fatalf("while it is written, the same brings %+v, want nothing", again)
	}
	stored := out.Write.State
	out = c.Written(true, now)
	if len(out.Send) != 1 || len(out.Send[0].Ack.Stored) != 1 || out.Send[0].Ack.Stored[0] != (Position{"n0003", 1, 2}) {
		t.Fatalf("then: %+v, want an answer with n0003's second", out)
	}
	if out.Write == nil || len(out.Write.Verdicts) != 0 {
		t.Fatalf("the repeated report brings %+v, want nothing new", out.Write)
	}

	restarted := NewCollector(Config{Arity: 4, Period: period}, stored, now)
	restarted.Members(dialled(5), now)
	if out := restarted.Report("n0000", r, now); out.Write != nil || len(out.Send) != 1 || out.Send[0].Ack.Stored[0].Seq != 2 {
		t.Errorf("after a restart it brings %+v, want only an answer", out)
	}
}

func TestWhatIsNotStoredIsNotAnswered(t *testing.T) {
	c, now := collecting(t, 5)
	r := Report{Round: 100, Verdicts: []Verdict{{Position{"n0003", 1, 1}, nil}}}
	c.Report("n0000", r, now)
	if out := c.Written(false, now); len(out.Send) != 0 || out.Write != nil {
		t.Fatalf("after a failed write: %+v, want nothing", out)
	}
	if out := c.Report("n0000", r, now); out.Write == nil || len(out.Write.Verdicts) != 1 {
		t.Errorf("repeated, it brings %+v, want the verdict to write", out)
	}
}

func TestANewStreamOfANodeBeginsAnew(t *testing.T) {
	c, now := collecting(t, 5)
	for _, step := range []struct {
		verdict Position
		told    bool
	}{
		{Position{"n0003", 7, 1}, true}, {Position{"n0003", 9, 2}, false}, {Position{"n0003", 9, 1}, true},
		{Position{"n0003", 7, 2}, false}, {Position{"n0003", 9, 2}, true}, {Position{"n9999", 1, 1}, false},
	} {
		out := c.Report("n0000", Report{Round: 100, Verdicts: []Verdict{{step.verdict, nil}}}, now)
		if told := out.Write != nil; told != step.told {
			t.Errorf("%+v is told: %v, want %v", step.verdict, told, step.told)
		}
		c.Written(true, now)
	}
}

// closing is the end of a round in which these nodes complain about a parent.
func closing(c *Collector, number int64, about string, refused bool, who ...string) CollectorOutput {
	for _, id := range who {
		c.Report(id, Report{Round: number, Orphan: about, Refused: refused}, schedule2().at(number, 1))
	}
	return c.Tick(schedule2().at(number+1, 0))
}

func TestAParentThatMostCannotReachGetsNoChildren(t *testing.T) {
	c, _ := collecting(t, 5)
	root := c.state.Tree.Roots["a"]
	out := closing(c, 100, root, false, "n0001", "n0002", "n0003")
	if out.Write == nil || out.Write.State.Tree.Roots["a"] == root || out.Write.State.Tree.Places[root].Depth == 0 {
		t.Fatalf("the round ends with %+v, want a tree with %s as a leaf", out, root)
	}
}

func TestOneComplaintMovesNobodyTwoInARowDo(t *testing.T) {
	c, _ := collecting(t, 9)
	var child, parent string
	for id, p := range c.state.Tree.Places {
		if p.Depth == 2 {
			child, parent = id, p.Parent
		}
	}
	for _, number := range []int64{100, 102} {
		if out := closing(c, number, parent, true, child); out.Write != nil {
			t.Fatalf("round %d ends with %+v, want nothing to write", number, out.Write)
		}
		c.Tick(schedule2().at(number+2, 0))
	}
	closing(c, 104, parent, true, child)
	out := closing(c, 105, parent, true, child)
	if out.Write == nil || out.Write.State.Tree.Places[child].Parent == parent {
		t.Fatalf("after two rounds in a row: %+v, want %s below another node than %s", out.Write, child, parent)
	}
	if who := moved(c.state.Tree, out.Write.State.Tree); len(who) != 1 {
		t.Errorf("%v moved, want only %s", who, child)
	}
}

func TestNodesThatHaveAllGoneLeaveTheTreeAfterARestart(t *testing.T) {
	c, now := collecting(t, 3)
	c = NewCollector(Config{Arity: 4, Period: period}, c.state, now)
	c.Members(nil, now)
	if out := c.Tick(now.Add(2 * period)); out.Write == nil || len(out.Write.State.Tree.Places) != 0 {
		t.Errorf("the round ends with %+v, want an empty tree to write", out)
	}
}
