package tree

const (
	// patience is how many rounds in a row a child must complain about its parent:
	// one may be a message that was lost.
	patience = 2
	// grudge is for how many rounds it is avoided then, the first time; it doubles
	// with each time, up to 64 times as many.
	grudge     = 20
	mostDoubts = 6
)

// doubts is whom others could not reach lately.
type doubts struct {
	edges map[Edge]doubt
	nodes map[string]doubt
}

type doubt struct {
	last  int64 // round of the last complaint
	row   int   // in so many rounds up to it
	times int   // how often it came to be avoided
	until int64 // the round before which it is avoided
	now   bool  // it is avoided
}

func newDoubts() doubts { return doubts{map[Edge]doubt{}, map[string]doubt{}} }

// judge takes the complaints of a round, and reports whether what is avoided has
// changed. A pair is avoided after complaints in a row. A node that most of its
// children, two at least, could not reach in one round gets no children any more:
// it is the node, and not the way from one of them.
func (d doubts) judge(round int64, complaints map[string]complaint, tree *Tree) bool {
	changed := forgive(d.edges, round)
	changed = forgive(d.nodes, round) || changed
	silent := map[string]int{}
	for child, c := range complaints {
		changed = complain(d.edges, Edge{child, c.parent}, round, patience) || changed
		if !c.refused {
			silent[c.parent]++
		}
	}
	below := tree.children()
	for parent, n := range silent {
		if n >= 2 && 2*n > len(below[parent]) {
			changed = complain(d.nodes, parent, round, 1) || changed
		}
	}
	return changed
}

// complain notes a complaint, and reports whether it was the last straw.
func complain[K comparable](all map[K]doubt, about K, round int64, patience int) bool {
	d := all[about]
	if d.last != round-1 {
		d.row = 0
	}
	d.last, d.row = round, d.row+1
	avoid := !d.now && d.row >= patience
	if avoid {
		d.now, d.until = true, round+grudge<<d.times
		d.times = min(d.times+1, mostDoubts)
	}
	all[about] = d
	return avoid
}

// forgive ends what has lasted long enough, and forgets what is long past.
func forgive[K comparable](all map[K]doubt, round int64) bool {
	changed := false
	for about, d := range all {
		switch {
		case d.now && round >= d.until:
			d.now, d.row = false, 0
			all[about] = d
			changed = true
		case !d.now && round > d.last+grudge<<mostDoubts:
			delete(all, about)
		case !d.now && d.times == 0 && round > d.last+1:
			delete(all, about)
		}
	}
	return changed
}

func (d doubts) node(id string) bool { return d.nodes[id].now }

func (d doubts) avoided() map[Edge]bool {
	avoided := map[Edge]bool{}
	for e, doubt := range d.edges {
		if doubt.now {
			avoided[e] = true
		}
	}
	return avoided
}
