package tree

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// check fails unless t is a tree of exactly these members within its bounds.
func check(t interface{ Fatalf(string, ...any) }, built *Tree, members []Member, avoid map[Edge]bool) {
	byID := map[string]Member{}
	for _, m := range members {
		byID[m.ID] = m
	}
	if len(built.Places) != len(members) {
		t.Fatalf("%d places for %d members", len(built.Places), len(members))
	}
	numbers := map[int]string{}
	for id, p := range built.Places {
		m, ok := byID[id]
		if !ok || m.Cloud != p.Cloud {
			t.Fatalf("%s has a place in cloud %q and is in %q", id, p.Cloud, m.Cloud)
		}
		if other, taken := numbers[p.Number]; taken {
			t.Fatalf("%s and %s are both number %d", id, other, p.Number)
		}
		numbers[p.Number] = id
		if p.Depth > built.Levels {
			t.Fatalf("%s is at depth %d of %d levels", id, p.Depth, built.Levels)
		}
		if p.Parent == "" {
			if p.Depth != 0 {
				t.Fatalf("%s reports to the controller at depth %d", id, p.Depth)
			}
			continue
		}
		parent := built.Places[p.Parent]
		if parent.Cloud != p.Cloud || parent.Depth+1 != p.Depth { // which also excludes a cycle
			t.Fatalf("%s at %+v is below %s at %+v", id, p, p.Parent, parent)
		}
		if byID[p.Parent].Address == "" {
			t.Fatalf("%s is below %s, which cannot be dialled", id, p.Parent)
		}
		if avoid[Edge{id, p.Parent}] {
			t.Fatalf("%s is below %s, which was to be avoided", id, p.Parent)
		}
	}
	for id, below := range built.children() {
		if id != "" && len(below) > built.Arity {
			t.Fatalf("%s has %d children, arity %d", id, len(below), built.Arity)
		}
	}
}

// depthOf is how deep a cloud's tree is, and how many of its nodes report to the
// controller.
func depthOf(t *Tree, cloud string) (depth, roots int) {
	for _, p := range t.Places {
		if p.Cloud == cloud {
			depth = max(depth, p.Depth)
			if p.Parent == "" {
				roots++
			}
		}
	}
	return depth, roots
}

func moved(old, next *Tree) []string {
	var who []string
	for id, p := range next.Places {
		if before, ok := old.Places[id]; ok && before.Parent != p.Parent {
			who = append(who, id)
		}
	}
	slices.Sort(who)
	return who
}

func dialled(n int) []Member {
	members := make([]Member, n)
	for i := range members {
		members[i] = Member{ID: fmt.Sprintf("n%04d", i), Cloud: "a", Address: "x"}
	}
	return members
}

func TestBuildIsAsFlatAsCanBe(t *testing.T) {
	for _, c := range []struct{ nodes, arity, depth int }{
		{0, 8, 0}, {1, 8, 0}, {2, 8, 1}, {9, 8, 1}, {10, 8, 2}, {73, 8, 2}, {74, 8, 3}, {585, 8, 3}, {1000, 8, 4}, {7, 2, 2}, {8, 2, 3}, {5, 1, 4},
	} {
		members := dialled(c.nodes)
		built := Build(nil, members, nil, c.arity)
		check(t, built, members, nil)
		if depth, roots := depthOf(built, "a"); depth != c.depth || roots != min(1, c.nodes) {
			t.Errorf("%d nodes, arity %d: depth %d with %d roots, want %d with one", c.nodes, c.arity, depth, roots, c.depth)
		}
	}
}

func TestNodesThatCannotBeDialledAreLeaves(t *testing.T) {
	members := dialled(20)
	for i := range members {
		if i != 7 {
			members[i].Address = ""
		}
	}
	built := Build(nil, members, nil, 4)
	check(t, built, members, nil)
	if _, roots := depthOf(built, "a"); roots != 16 || built.Roots["a"] != "n0007" {
		t.Errorf("%d roots and %q, want 16 with four nodes below n0007", roots, built.Roots["a"])
	}
}

// What is below a lost node moves, its replacement moves, and nothing else.
func TestLosingAnInnerNodeMovesOnlyItsChildren(t *testing.T) {
	for _, n := range []int{10, 50, 100, 400} {
		members := dialled(n)
		built := Build(nil, members, nil, 4)
		below := built.children()
		for i, m := range members {
			rest := slices.Delete(slices.Clone(members), i, i+1)
			next := Build(built, rest, nil, 4)
			check(t, next, rest, nil)
			bound := len(below[m.ID])
			if bound > 0 {
				bound++
			}
			if got := moved(built, next); len(got) > bound {
				t.Errorf("%d nodes: the loss of %s with %d children moves %v", n, m.ID, len(below[m.ID]), got)
			}
		}
	}
}

func TestJoiningMovesNobody(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		arity := rapid.IntRange(1, 8).Draw(t, "arity")
		before := rapid.IntRange(0, 60).Draw(t, "before")
		members := dialled(before + rapid.IntRange(1, 40).Draw(t, "new"))
		rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "order"), 0)).Shuffle(len(members), func(i, j int) {
			members[i], members[j] = members[j], members[i]
		})
		old := Build(nil, members[:before], nil, arity)
		next := Build(old, members, nil, arity)
		check(t, next, members, nil)
		if who := moved(old, next); len(who) > 0 {
			t.Fatalf("%v moved", who)
		}
	})
}

// Over a history in which all nodes can be dialled, a tree moves no more nodes
// than lost their parent, one for each parent lost, and those too deep.
func TestBuildChangesLittle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		arity := rapid.IntRange(2, 8).Draw(t, "arity")
		var tree *Tree = Build(nil, nil, nil, arity)
		pool := dialled(120)
		there := map[int]bool{}
		for range rapid.IntRange(1, 12).Draw(t, "trees") {
			for _, i := range rapid.SliceOfN(rapid.IntRange(0, len(pool)-1), 0, 50).Draw(t, "toggle") {
				there[i] = !there[i]
			}
			var members []Member
			for i, m := range pool {
				if there[i] {
					members = append(members, m)
				}
			}
			next := Build(tree, members, nil, arity)
			check(t, next, members, nil)
			least, leastRoots := grow(&Tree{}, "a", members, nil, arity).least()
			depth, roots := depthOf(next, "a")
			if depth > least+1 || len(members) > 0 && roots != leastRoots {
				t.Fatalf("%d nodes: depth %d with %d roots, want at most %d with %d", len(members), depth, roots, least+1, leastRoots)
			}
			bound := 0
			replaced := map[string]bool{}
			for id, p := range tree.Places {
				if _, stays := next.Places[id]; !stays {
					continue
				}
				if _, stays := next.Places[p.Parent]; !stays && p.Parent != "" {
					bound++
					replaced[p.Parent] = true
				} else if p.Depth > least+1 {
					bound++
				}
			}
			root := tree.Roots["a"]
			if _, stays := next.Places[root]; !stays && root != "" {
				replaced[root] = true
			}
			if who := moved(tree, next); len(who) > bound+len(replaced) {
				t.Fatalf("%d moved: %v, at most %d have to", len(who), who, bound+len(replaced))
			}
			tree = next
		}
	})
}

// Whatever cannot be dialled, is to be avoided, comes and goes: every node has a
// place, and the same history makes the same tree.
func TestBuildStaysWithinItsBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		arity := rapid.IntRange(1, 5).Draw(t, "arity")
		var tree *Tree
		for range rapid.IntRange(1, 8).Draw(t, "trees") {
			members := rapid.SliceOfNDistinct(rapid.Custom(func(t *rapid.T) Member {
				return Member{
					ID:      fmt.Sprintf("n%02d", rapid.IntRange(0, 40).Draw(t, "id")),
					Cloud:   rapid.SampledFrom([]string{"a", "b"}).Draw(t, "cloud"),
					Address: rapid.SampledFrom([]string{"", "x", "x"}).Draw(t, "address"),
				}
			}), 0, 40, func(m Member) string { return m.ID }).Draw(t, "members")
			avoid := map[Edge]bool{}
			for range rapid.IntRange(0, 20).Draw(t, "avoided") {
				avoid[Edge{
					fmt.Sprintf("n%02d", rapid.IntRange(0, 40).Draw(t, "child")),
					fmt.Sprintf("n%02d", rapid.IntRange(0, 40).Draw(t, "parent")),
				}] = true
			}
			if rapid.Bool().Draw(t, "nothing to avoid") {
				avoid = nil
			}
			next := Build(tree, members, avoid, arity)
			check(t, next, members, avoid)
			if avoid == nil {
				checkFlat(t, next, members, arity)
			}
			slices.Reverse(members)
			if again := Build(tree, members, maps.Clone(avoid), arity); !sameTree(next, again) {
				t.Fatalf("the same members make two trees:\n%+v\n%+v", next, again)
			}
			tree = next
		}
	})
}

func checkFlat(t *rapid.T, tree *Tree, members []Member, arity int) {
	for _, cloud := range []string{"a", "b"} {
		mine := slices.DeleteFunc(slices.Clone(members), func(m Member) bool { return m.Cloud != cloud })
		least, leastRoots := grow(&Tree{}, cloud, mine, nil, arity).least()
		if depth, roots := depthOf(tree, cloud); depth > least+1 || roots > leastRoots {
			t.Fatalf("cloud %s: depth %d with %d roots, want at most %d with %d", cloud, depth, roots, least+1, leastRoots)
		}
	}
}

func sameTree(x, y *Tree) bool {
	return x.Levels == y.Levels && maps.Equal(x.Places, y.Places) && maps.Equal(x.Roots, y.Roots)
}
