package agent

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/monitor/tree"
)

// treeWorld is a tree node whose controller remembers what it is told.
type treeWorld struct {
	t    *testing.T
	dir  string
	node *treeNode
	told []*agentpb.TreeReport
	at   time.Time
}

// noPeers is for a node that has neither parent nor children.
type noPeers struct{}

func (noPeers) report(tree.Assignment, *tree.Report) {}
func (noPeers) answer(string, *tree.Ack)             {}

func newTreeWorld(t *testing.T) *treeWorld {
	w := &treeWorld{t: t, dir: filepath.Join(t.TempDir(), "state")}
	must(t, os.Mkdir(w.dir, 0o700))
	w.start()
	return w
}

func (w *treeWorld) start() {
	w.t.Helper()
	n, err := openTreeNode(w.dir, "n", &controllerClock{}, slog.New(slog.DiscardHandler))
	must(w.t, err)
	n.sample, n.peers = func() tree.Summary { return tree.Summary{} }, noPeers{}
	n.toController = func(m *agentpb.FromAgent) { w.told = append(w.told, m.GetTreeReport()) }
	w.node = n
	n.assign(tree.Assignment{Epoch: 1, Period: time.Hour}.Proto())
}

// nextRound is what the node tells in it.
func (w *treeWorld) nextRound() *agentpb.TreeReport {
	w.t.Helper()
	n := w.node
	n.mu.Lock()
	defer n.mu.Unlock()
	if w.at.IsZero() {
		w.at = n.clock.now()
	}
	w.at = w.at.Truncate(time.Hour).Add(time.Hour)
	before := len(w.told)
	for range 3 {
		n.carryOut(n.node.Tick(w.at), w.at)
		if len(w.told) > before {
			return w.told[before]
		}
		w.at = w.at.Add(10 * time.Minute)
	}
	return nil
}

func TestAFindingIsStoredBeforeItIsTold(t *testing.T) {
	w := newTreeWorld(t)
	must(t, os.Rename(w.dir, w.dir+".away"))
	must(t, w.node.say("x", api.Finding{Condition: "bad"}))
	if r := w.nextRound(); r != nil {
		t.Fatalf("it is told though it cannot be stored: %v", r)
	}
	must(t, os.Rename(w.dir+".away", w.dir))
	if r := w.nextRound(); len(r.GetVerdicts()) != 1 {
		t.Fatalf("when it can be stored %v is told, want the finding", r)
	}
}

func TestWhatWasSaidAndNotHeardIsSaidByTheNextAgent(t *testing.T) {
	w := newTreeWorld(t)
	must(t, w.node.say("x", api.Finding{Condition: "bad"}))
	w.start()
	if got := w.node.last("x").Condition; got != "bad" {
		t.Errorf("the next agent has said %q, want bad", got)
	}
	r := w.nextRound()
	if len(r.GetVerdicts()) != 1 {
		t.Fatalf("it tells %v, want the finding", r)
	}
	first := r.GetVerdicts()[0]
	w.node.answered(tree.Controller, tree.Ack{Round: r.GetRound(), Stored: []tree.Position{{Node: "n", Stream: first.GetStream(), Seq: first.GetSeq()}}})
	w.start()
	if r := w.nextRound(); len(r.GetVerdicts()) != 0 {
		t.Errorf("what was heard is told again: %v", r)
	}
	must(t, w.node.say("x", api.Finding{Condition: "good"}))
	if r := w.nextRound(); len(r.GetVerdicts()) != 1 || r.GetVerdicts()[0].GetSeq() != first.GetSeq()+1 {
		t.Errorf("then %v is told, want the second finding", r)
	}
}

func TestFindingsThatNobodyHearsAreBounded(t *testing.T) {
	w := newTreeWorld(t)
	w.node.node = tree.NewNode("n", tree.Outbox{Stream: 1, Last: maxOutbox, Pending: make([]tree.Verdict, maxOutbox)})
	if err := w.node.say("x", api.Finding{Condition: "bad"}); err == nil || w.node.last("x").Condition != "" {
		t.Errorf("one more is taken: %v", err)
	}
}

func TestADamagedRecordBeginsAnew(t *testing.T) {
	w := newTreeWorld(t)
	must(t, w.node.say("x", api.Finding{Condition: "bad"}))
	old := w.node.node.Outbox().Stream
	must(t, os.WriteFile(filepath.Join(w.dir, monitorFile), []byte("{"), 0o600))
	w.start()
	if got := w.node.node.Outbox(); got.Stream <= old || len(got.Pending) != 0 {
		t.Errorf("begun anew with %+v, want a higher stream than %d", got, old)
	}
}

func TestADiskIsFullWithHysteresis(t *testing.T) {
	const gb = 1e9
	d := diskWatch{dir: "/d"}
	for _, c := range []struct {
		free, total uint64
		was         bool
		want        string
		changed     bool
	}{
		{6 * gb, 100 * gb, false, api.ConditionHealthy, false},
		{4 * gb, 100 * gb, false, api.ConditionDiskFull, true},
		{6 * gb, 100 * gb, true, api.ConditionDiskFull, false},
		{8 * gb, 100 * gb, true, api.ConditionHealthy, true},
		{12 * gb, 10000 * gb, false, api.ConditionHealthy, false}, // enough for a large disk, too
	} {
		t.Run(fmt.Sprint(c.free/gb, c.total/gb, c.was), func(t *testing.T) {
			well := api.Finding{Condition: api.ConditionHealthy}
			f, changed := worstDisk([]api.Finding{well, d.judge(c.free, c.total, c.was), well}, c.was)
			if f.Condition != c.want || changed != c.changed {
				t.Errorf("judged %s, changed %v: %s; want %s, %v", f.Condition, changed, f.Explanation, c.want, c.changed)
			}
		})
	}
}

func TestAClockThatIsSetBackStopsNoMeasuring(t *testing.T) {
	now := time.Unix(1000000, 0)
	for due, want := range map[time.Duration]bool{0: true, -time.Second: true, time.Second: false, 10 * time.Second: false, time.Hour: true} {
		if got := isDue(now.Add(due), now, 10*time.Second); got != want {
			t.Errorf("what is due in %s: %v, want %v", due, got, want)
		}
	}
}
