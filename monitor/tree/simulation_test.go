package tree

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Each seed is one history of up to 40 nodes in two clouds. In most, messages are
// lost, late, repeated and out of order, some ways between nodes do not exist,
// nodes crash at any moment, come back with their disk, without it, or never,
// others join, the store fails and the controller crashes. In every fourth, nodes
// crash and nothing else is wrong. Then faults cease.
//
// In all of it: a verdict is told once, in its node's order, and each whose node
// or its disk is still there is told in the end; no node counts twice in a round;
// when only nodes crash, no round lacks a node that lived through it or a verdict
// raised before it, and only those whose own parent crashed turn to the
// controller; and when nothing happens any more, it hears only the roots.
//
//	DORMOUSE_SEEDS=100000  so many seeds instead of 2,000
//	DORMOUSE_SEED=17       only this one, with its trace
func TestSimulation(t *testing.T) {
	if text := os.Getenv("DORMOUSE_SEED"); text != "" {
		seed, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		w, problem := simulate(seed, true, "")
		t.Logf("%s\nproblem: %v", strings.Join(w.trace, "\n"), problem)
		if problem != "" {
			t.Fail()
		}
		return
	}
	seeds := uint64(2000)
	if text := os.Getenv("DORMOUSE_SEEDS"); text != "" {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seeds = n
	}
	var all sync.WaitGroup
	var mu sync.Mutex
	rounds, verdicts := 0, 0
	workers := uint64(runtime.GOMAXPROCS(0))
	for first := range workers {
		all.Go(func() {
			for seed := first; seed < seeds && !t.Failed(); seed += workers {
				w, problem := simulate(seed, false, "")
				mu.Lock()
				rounds += len(w.rounds)
				verdicts += len(w.raised)
				mu.Unlock()
				if problem != "" {
					w, _ = simulate(seed, true, "")
					last := w.trace[max(0, len(w.trace)-60):]
					t.Errorf("seed %d: %s\nrepeat with: DORMOUSE_SEED=%d go test -v -run Simulation ./monitor/tree\n%s",
						seed, problem, seed, strings.Join(last, "\n"))
				}
			}
		})
	}
	all.Wait()
	t.Logf("%d histories, %d rounds, %d verdicts", seeds, rounds, verdicts)
}

// A tree with a known bug does not pass.
func TestSimulationFindsPlantedBugs(t *testing.T) {
	for _, bug := range []string{"early answer", "no fallback", "forgetful"} {
		found := ""
		for seed := uint64(0); seed < 500 && found == ""; seed++ {
			_, found = simulate(seed, false, bug)
		}
		if found == "" {
			t.Errorf("%q was not found", bug)
		}
		t.Logf("%s: %s", bug, found)
	}
}

func simulate(seed uint64, tracing bool, planted string) (w *world, problem string) {
	w = &world{Rand: rand.New(rand.NewPCG(seed, 1)), now: start, tracing: tracing, planted: planted, faults: true,
		calm: seed%4 == 3, wire: seed%8 == 0, blocked: map[Edge]bool{}, raised: map[Position]bool{}, raisedAt: map[Position]time.Time{}}
	defer func() {
		if r := recover(); r != nil {
			b, ok := r.(broken)
			if !ok {
				panic(r)
			}
			problem = string(b)
			w.note("%s", problem)
		}
	}()
	w.config = Config{Arity: 1 + w.IntN(4), Period: time.Second}
	if w.config.Arity == 1 {
		w.config.Arity = 2 + w.IntN(3)
	}
	w.startHub()
	for range 1 + w.IntN([]int{4, 12, 12, 40}[w.IntN(4)]) {
		w.addNode()
	}
	if !w.calm && w.one(3) {
		w.block()
	}
	w.runUntil(w.now.Add(2 * w.config.Period))
	w.raiseSome()
	w.mishap()
	w.runUntil(w.now.Add(time.Duration(5+w.IntN(10)) * w.config.Period))
	w.note("faults cease")
	w.faults = false
	w.settle()
	return w, ""
}

// block takes some ways between nodes away for ever.
func (w *world) block() {
	for range 1 + w.IntN(len(w.nodes)) {
		w.blocked[Edge{w.nodes[w.IntN(len(w.nodes))].id, w.nodes[w.IntN(len(w.nodes))].id}] = true
	}
}

// raiseSome lets nodes find something, as long as there are faults.
func (w *world) raiseSome() {
	if !w.faults {
		return
	}
	n := w.nodes[w.IntN(len(w.nodes))]
	for range 1 + w.IntN(3) {
		if n.core == nil {
			break
		}
		out, err := n.core.Raise(fmt.Append(nil, n.id, n.core.outbox.Last+1), w.now.Add(n.skew))
		if err != nil {
			w.fail("%v", err)
		}
		w.nodeDo(n, out)
	}
	w.after(w.upTo(w.config.Period), w.raiseSome)
}

// mishap breaks something, now and then.
func (w *world) mishap() {
	if !w.faults {
		return
	}
	n := w.nodes[w.IntN(len(w.nodes))]
	switch w.IntN(8) {
	case 0, 1, 2, 3:
		if n.core != nil && len(w.alive()) > 1 {
			w.crashAndReturn(n)
		}
	case 4, 5:
		if len(w.nodes) < 60 {
			w.addNode()
		}
	case 6:
		if !w.calm && w.hub.core != nil {
			w.crashHub()
		}
	case 7:
		if n.core != nil && n.disk.Pending != nil && !w.calm { // a new address
			n.member.Address = "y"
			w.connect(n)
		}
	}
	w.after(w.upTo(2*w.config.Period), w.mishap)
}

// settle waits until the tree is whole, which it must be once all that is held
// against a node is forgiven, and looks.
func (w *world) settle() {
	quiet := 0
	for range 12 * grudge {
		w.runUntil(w.now.Add(w.config.Period))
		if w.unrest() != "" {
			quiet = 0
		} else if quiet++; quiet == 3 {
			return
		}
	}
	w.fail("it does not come to rest: %s", w.unrest())
}

func (w *world) unrest() string {
	if owed := w.owed(); len(owed) > 0 {
		return fmt.Sprintf("never told: %v", owed)
	}
	if len(w.rounds) == 0 || w.hub.core == nil {
		return "there was no round"
	}
	last := w.rounds[len(w.rounds)-1]
	alive := len(w.alive())
	if len(last.Missing) > 0 || last.Summary.Nodes.Len() != alive {
		return fmt.Sprintf("round %d has %d of %d nodes and lacks %v", last.Number, last.Summary.Nodes.Len(), alive, last.Missing)
	}
	if len(w.blocked) > 0 {
		return "" // some nodes may have to report to the controller
	}
	roots := 0
	for _, cloud := range []string{"a", "b"} {
		var members []Member
		for _, n := range w.alive() {
			if n.member.Cloud == cloud {
				members = append(members, n.member)
			}
		}
		if len(members) > 0 {
			_, r := grow(&Tree{}, cloud, members, nil, w.config.Arity).least()
			roots += r
		}
	}
	if last.Orphans > 0 || last.Reports != roots {
		return fmt.Sprintf("round %d reached the controller in %d reports, %d of them from orphans, want %d", last.Number, last.Reports, last.Orphans, roots)
	}
	return ""
}
