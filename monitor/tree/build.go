package tree

import (
	"cmp"
	"container/heap"
	"maps"
	"slices"
)

// Member is a node that is to have a place in the tree.
type Member struct {
	ID    string `json:"id"`
	Cloud string `json:"cloud"`
	// Address is where other nodes of its cloud can dial it. Empty: they cannot,
	// and it has no children.
	Address string `json:"address,omitempty"`
}

// Edge is a child and a parent.
type Edge struct{ Child, Parent string }

// Place is where a node is in the tree.
type Place struct {
	Cloud  string `json:"cloud"`
	Parent string `json:"parent,omitempty"` // empty: it reports to the controller
	Depth  int    `json:"depth"`            // 0: it reports to the controller
	// Number names the node within the tree: small, and its own as long as it
	// stays. A number that was given back is free from the next tree on.
	Number int `json:"number"`
}

// Tree says to whom each node reports. It is never changed once built.
type Tree struct {
	Arity  int              `json:"arity"`
	Places map[string]Place `json:"places"`
	// Roots is the root of each cloud that has nodes which can be dialled. Nodes
	// for which there is no place below it report to the controller themselves.
	Roots map[string]string `json:"roots"`
	// Levels bounds every depth. It is the same for all nodes, as the times of a
	// round follow from it, and it never falls: a level too many costs nothing.
	Levels int `json:"levels"`
}

// Build makes the tree of members with no more than arity children each,
// keeping of old (nil: none) what it can: what has a place moves only when its
// parent has gone or when the tree would be more than a level deeper than it must
// be. No edge to avoid is in it. The result depends on nothing but the arguments.
//
//	a parent that is gone    one childless node takes its place, the rest stay: a
//	                         new one, else one of its children, else a deepest one
//	a new node               the shallowest place that is free, with the fewest siblings
//	a tree too deep          the deepest go to the shallowest free places
//	and if that is not enough (nodes that cannot be dialled are in the way)
//	                         that cloud's tree is built anew
func Build(old *Tree, members []Member, avoid map[Edge]bool, arity int) *Tree {
	if old == nil {
		old = &Tree{}
	}
	next := &Tree{Arity: arity, Places: map[string]Place{}, Roots: map[string]string{}, Levels: old.Levels}
	clouds := map[string][]Member{}
	for _, m := range members {
		clouds[m.Cloud] = append(clouds[m.Cloud], m)
	}
	for _, cloud := range slices.Sorted(maps.Keys(clouds)) {
		b := grow(old, cloud, clouds[cloud], avoid, arity)
		if !b.good() {
			if anew := grow(&Tree{}, cloud, clouds[cloud], avoid, arity); anew.betterThan(b) {
				b = anew
			}
		}
		b.into(next, cloud)
	}
	next.number(old)
	return next
}

// number keeps the numbers of old and gives the lowest free ones.
func (t *Tree) number(old *Tree) {
	taken := map[int]bool{}
	for _, p := range old.Places {
		taken[p.Number] = true
	}
	free := 0
	for _, id := range slices.Sorted(maps.Keys(t.Places)) {
		p := t.Places[id]
		if before, ok := old.Places[id]; ok {
			p.Number = before.Number
		} else {
			for taken[free] {
				free++
			}
			p.Number, taken[free] = free, true
		}
		t.Places[id] = p
	}
}

// children are the nodes below each node, and below "" those that report to the
// controller, in order.
func (t *Tree) children() map[string][]string {
	below := map[string][]string{}
	for _, id := range slices.Sorted(maps.Keys(t.Places)) {
		p := t.Places[id].Parent
		below[p] = append(below[p], id)
	}
	return below
}

// bush is the tree of one cloud while it is built. What has no parent and is
// not the root is loose: it is to be placed, with all that is below it.
type bush struct {
	arity    int
	avoid    map[Edge]bool
	members  map[string]Member
	root     string
	parent   map[string]string
	children map[string][]string
	depth    map[string]int // of what hangs on the root
	spots    spots
}

func grow(old *Tree, cloud string, members []Member, avoid map[Edge]bool, arity int) *bush {
	b := &bush{arity: arity, avoid: avoid, members: map[string]Member{}, parent: map[string]string{},
		children: map[string][]string{}, depth: map[string]int{}}
	for _, m := range members {
		b.members[m.ID] = m
	}
	b.keep(old, cloud)
	b.replaceLost(old, cloud)
	b.chooseRoot()
	b.place()
	b.balance()
	return b
}

func (b *bush) inner(id string) bool { return b.members[id].Address != "" }

// takes reports whether a node can be another's parent.
func (b *bush) takes(parent, child string) bool {
	return b.inner(parent) && len(b.children[parent]) < b.arity && !b.avoid[Edge{child, parent}]
}

func (b *bush) join(child, parent string) {
	b.parent[child] = parent
	b.children[parent] = append(b.children[parent], child)
}

func (b *bush) leave(child string) {
	p := b.parent[child]
	delete(b.parent, child)
	b.children[p] = slices.DeleteFunc(b.children[p], func(id string) bool { return id == child })
}

func (b *bush) ids() []string { return slices.Sorted(maps.Keys(b.members)) }

// keep takes over every edge of old that may stay.
func (b *bush) keep(old *Tree, cloud string) {
	if r := old.Roots[cloud]; b.inner(r) {
		b.root = r
	}
	for _, id := range b.ids() {
		p, ok := old.Places[id]
		if ok && p.Cloud == cloud && p.Parent != "" && id != b.root && b.takes(p.Parent, id) {
			b.join(id, p.Parent)
		}
	}
}

// replaceLost puts a childless node where one was that can have no children any
// more, from the top down.
func (b *bush) replaceLost(old *Tree, cloud string) {
	below := old.children()
	lost := make([]string, 0)
	for id, p := range old.Places {
		isRoot := id == old.Roots[cloud]
		if p.Cloud == cloud && !b.inner(id) && (isRoot || len(below[id]) > 0) {
			lost = append(lost, id)
		}
	}
	slices.SortFunc(lost, func(x, y string) int {
		return cmp.Or(cmp.Compare(old.Places[x].Depth, old.Places[y].Depth), cmp.Compare(x, y))
	})
	instead := map[string]string{}
	for _, gone := range lost {
		up := old.Places[gone].Parent
		if by, ok := instead[up]; ok {
			up = by
		}
		left := slices.DeleteFunc(slices.Clone(below[gone]), func(id string) bool {
			_, member := b.members[id]
			return !member || b.placed(id) || old.Places[id].Parent != gone
		})
		if len(left) > 0 || gone == old.Roots[cloud] {
			instead[gone] = b.replace(gone, up, gone == old.Roots[cloud], left, old)
		}
	}
}

func (b *bush) placed(id string) bool {
	_, has := b.parent[id]
	return has || id == b.root
}

// replace finds a node that takes the place of gone below up, and puts what is
// left of its children below it; with isRoot, it becomes the root. Empty: there is none.
func (b *bush) replace(gone, up string, isRoot bool, left []string, old *Tree) string {
	if b.parent[gone] != "" {
		b.leave(gone) // it is still there, and will be a leaf
	}
	by, least := "", 0
	for _, id := range b.replacements(left, old) {
		if up != "" && (id == up || b.avoid[Edge{id, up}]) {
			continue
		}
		avoided := 1 // of edges, and then some
		for _, child := range left {
			if b.avoid[Edge{child, id}] {
				avoided++
			}
		}
		if by == "" || avoided < least {
			by, least = id, avoided
		}
		if least == 1 {
			break
		}
	}
	if by == "" {
		return ""
	}
	if b.parent[by] != "" {
		b.leave(by)
	}
	if isRoot {
		b.root = by
	} else if up != "" && b.takes(up, by) {
		b.join(by, up)
	}
	for _, child := range left {
		if child != by && b.takes(by, child) {
			b.join(child, by)
		}
	}
	return by
}

// replacements are the childless nodes that may have children, the cheapest to
// move first.
func (b *bush) replacements(left []string, old *Tree) []string {
	cost := func(id string) int {
		p, known := old.Places[id]
		switch {
		case !known:
			return -2
		case slices.Contains(left, id):
			return -1
		}
		return -p.Depth + old.Levels
	}
	var free []string
	for _, id := range b.ids() {
		if b.inner(id) && len(b.children[id]) == 0 && id != b.root {
			free = append(free, id)
		}
	}
	slices.SortStableFunc(free, func(x, y string) int { return cmp.Compare(cost(x), cost(y)) })
	return free
}

// chooseRoot makes the node the root below which most is already.
func (b *bush) chooseRoot() {
	if b.root != "" {
		return
	}
	most := 0
	for _, id := range b.ids() {
		if b.inner(id) && b.parent[id] == "" {
			if n := b.size(id); n > most {
				b.root, most = id, n
			}
		}
	}
}

func (b *bush) size(id string) int {
	n := 1
	for _, child := range b.children[id] {
		n += b.size(child)
	}
	return n
}

func (b *bush) height(id string) int {
	h := 0
	for _, child := range b.children[id] {
		h = max(h, 1+b.height(child))
	}
	return h
}

// place finds a place for all that is loose: first what may have children, of
// that the tallest first.
func (b *bush) place() {
	if b.root == "" {
		return
	}
	b.settle(b.root, 0)
	type loose struct {
		id     string
		inner  bool
		height int
	}
	var all []loose
	for _, id := range b.ids() {
		if !b.placed(id) {
			all = append(all, loose{id, b.inner(id), b.height(id)})
		}
	}
	slices.SortStableFunc(all, func(x, y loose) int {
		if x.inner != y.inner {
			return map[bool]int{true: -1, false: 1}[x.inner]
		}
		return cmp.Compare(y.height, x.height)
	})
	for _, l := range all {
		if parent, ok := b.freeSpot(l.id); ok {
			b.hang(l.id, parent)
		}
	}
}

// settle notes the depth of a node and of all below it.
func (b *bush) settle(id string, depth int) {
	b.depth[id] = depth
	b.offer(id)
	for _, child := range b.children[id] {
		b.settle(child, depth+1)
	}
}

func (b *bush) hang(child, parent string) {
	b.join(child, parent)
	b.settle(child, b.depth[parent]+1)
	b.offer(parent)
}

// balance moves the deepest to the shallowest free places, until the tree is no
// more than one level deeper than it must be: with no slack at all, a node that
// comes and goes might move many others each time.
func (b *bush) balance() {
	least, _ := b.least()
	deep := slices.Collect(maps.Keys(b.depth))
	slices.SortFunc(deep, func(x, y string) int {
		return cmp.Or(cmp.Compare(b.depth[y], b.depth[x]), cmp.Compare(x, y))
	})
	for _, id := range deep {
		if b.depth[id] <= least+1 || len(b.children[id]) > 0 {
			continue
		}
		if parent, ok := b.freeSpot(id); ok && b.depth[parent]+1 < b.depth[id] {
			from := b.parent[id]
			b.leave(id)
			b.offer(from)
			b.hang(id, parent)
		}
	}
}

// least is the smallest depth that a tree of the members can have, and how many
// report to the controller then: the nodes that may have children go first.
func (b *bush) least() (depth, roots int) {
	inner := 0
	for _, m := range b.members {
		if m.Address != "" {
			inner++
		}
	}
	leaves := len(b.members) - inner
	if inner == 0 {
		return 0, leaves
	}
	for width := 1; ; depth++ {
		here := min(width, inner)
		inner -= here
		leaves -= min(width-here, leaves)
		if inner == 0 && leaves == 0 {
			return depth, 1
		}
		if width = here * b.arity; width == 0 {
			return depth - 1, 1 + leaves
		}
	}
}

// rank is what makes one tree worse than another: first how many nodes report
// to the controller, then how deep it is.
func (b *bush) rank() (roots, depth int) {
	for id := range b.members {
		if b.parent[id] == "" {
			roots++
		}
	}
	if b.root != "" {
		depth = b.height(b.root)
	}
	return roots, depth
}

func (b *bush) good() bool {
	roots, depth := b.rank()
	leastDepth, leastRoots := b.least()
	return roots <= leastRoots && depth <= leastDepth+1
}

func (b *bush) betterThan(other *bush) bool {
	roots, depth := b.rank()
	otherRoots, otherDepth := other.rank()
	return cmp.Or(cmp.Compare(roots, otherRoots), cmp.Compare(depth, otherDepth)) < 0
}

// into writes the places down. What is still loose reports to the controller.
func (b *bush) into(t *Tree, cloud string) {
	if b.root != "" {
		t.Roots[cloud] = b.root
	}
	var walk func(id string, depth int)
	walk = func(id string, depth int) {
		t.Places[id] = Place{Cloud: cloud, Parent: b.parent[id], Depth: depth}
		t.Levels = max(t.Levels, depth)
		for _, child := range b.children[id] {
			walk(child, depth+1)
		}
	}
	for id := range b.members {
		if b.parent[id] == "" {
			walk(id, 0)
		}
	}
}

// spots are parents with room for a child, the best first. A spot that has
// changed since is there again as it is now, and the old one is passed over.
type spots []spot

type spot struct {
	id              string
	depth, children int
}

func (s spots) Len() int      { return len(s) }
func (s spots) Swap(i, j int) { s[i], s[j] = s[j], s[i] }
func (s spots) Less(i, j int) bool {
	return cmp.Or(cmp.Compare(s[i].depth, s[j].depth), cmp.Compare(s[i].children, s[j].children), cmp.Compare(s[i].id, s[j].id)) < 0
}
func (s *spots) Push(x any) { *s = append(*s, x.(spot)) }
func (s *spots) Pop() any {
	last := len(*s) - 1
	x := (*s)[last]
	*s = (*s)[:last]
	return x
}

// offer adds a node to the spots, if it has room.
func (b *bush) offer(id string) {
	if b.inner(id) && len(b.children[id]) < b.arity {
		heap.Push(&b.spots, spot{id, b.depth[id], len(b.children[id])})
	}
}

// freeSpot is the best parent for a node that hangs on the root.
func (b *bush) freeSpot(child string) (parent string, ok bool) {
	var others []spot
	for !ok && b.spots.Len() > 0 {
		s := heap.Pop(&b.spots).(spot)
		if s.depth != b.depth[s.id] || s.children != len(b.children[s.id]) {
			continue
		}
		others = append(others, s)
		parent, ok = s.id, s.id != child && b.takes(s.id, child)
	}
	for _, s := range others {
		heap.Push(&b.spots, s)
	}
	return parent, ok
}
