package scheduler

import (
	"cmp"
	"slices"
	"sort"

	"dormouse/api"
)

// exactVictims is up to how many candidates every set of them is looked at;
// beyond, sets are built up step by step.
const exactVictims = 12

// victims chooses the jobs of lower priority that give way for w, of those that
// may; nil when that does not make room.
func (f *floor) victims(w *Waiting, may func(*Running) bool) []int {
	s := &search{f: f, w: w, base: make([]int, len(f.soon))}
	for i, n := range f.soon {
		s.base[i] = min(f.places(w.Request, n, true), w.Request.Tasks)
		s.total += s.base[i]
	}
	for j := range f.jobs {
		job := &f.jobs[j]
		if !job.Leaving && job.Priority < w.Priority && may(job) && s.useful(job) {
			s.candidates = append(s.candidates, j)
		}
	}
	slices.SortFunc(s.candidates, func(a, b int) int { return f.cheaper(a, b) })
	bound := s.bound()
	if bound == 0 {
		return nil
	}
	s.candidates = s.candidates[:bound]
	if bound <= exactVictims {
		return s.prune(s.exact())
	}
	return s.prune(s.stepwise())
}

// search is one search for victims.
type search struct {
	f          *floor
	w          *Waiting
	base       []int // places of w on each node if nobody gives way
	total      int   // of them
	candidates []int // by priority, then bytes
}

// cheaper orders candidates: least priority, fewest bytes, then by name.
func (f *floor) cheaper(a, b int) int {
	x, y := &f.jobs[a], &f.jobs[b]
	return cmp.Or(cmp.Compare(x.Priority, y.Priority), cmp.Compare(x.Bytes, y.Bytes), cmp.Compare(x.ID, y.ID))
}

// useful reports whether the job has a place that w could use.
func (s *search) useful(job *Running) bool {
	for i := range s.f.placesOf(job) {
		n := s.f.soon[i]
		if n.State == api.NodeReady && asked(n, s.w.Request) && (s.w.Request.Unfit == nil || s.w.Request.Unfit(n) == "") {
			return true
		}
	}
	return false
}

// room reports whether w has a place once the victims have gone.
func (s *search) room(victims []int) bool {
	changed := make(map[int]Node)
	for _, v := range victims {
		job := &s.f.jobs[v]
		for i := range s.f.placesOf(job) {
			n, known := changed[i]
			if !known {
				n = s.f.soon[i]
			}
			n.take(job)
			changed[i] = n
		}
	}
	total := s.total
	for i, n := range changed {
		total += min(s.f.places(s.w.Request, n, true), s.w.Request.Tasks) - s.base[i]
	}
	return total >= s.w.Request.Tasks
}

// bound is how many of the candidates, from the least priority on, are needed to
// make room, rounded up to all of one priority; 0: all are not enough.
func (s *search) bound() int {
	for end := 0; end < len(s.candidates); {
		priority := s.f.jobs[s.candidates[end]].Priority
		for end < len(s.candidates) && s.f.jobs[s.candidates[end]].Priority == priority {
			end++
		}
		if s.room(s.candidates[:end]) {
			return end
		}
	}
	return 0
}

// bytes is what evicting victims costs.
func (s *search) bytes(victims []int) (sum int64) {
	for _, v := range victims {
		sum += s.f.jobs[v].Bytes
	}
	return sum
}

// exact looks at every set of candidates: the fewest bytes, then the fewest jobs.
func (s *search) exact() (best []int) {
	for mask := 1; mask < 1<<len(s.candidates); mask++ {
		var set []int
		for i, c := range s.candidates {
			if mask&(1<<i) != 0 {
				set = append(set, c)
			}
		}
		if best != nil && cmp.Or(cmp.Compare(s.bytes(set), s.bytes(best)), len(set)-len(best)) >= 0 {
			continue
		}
		if s.room(set) {
			best = set
		}
	}
	return best
}

// stepwise makes room for one task after the other, each time on the node where
// that costs least.
func (s *search) stepwise() []int {
	here := make([][]int, len(s.base)) // candidates by node, the smallest first
	bySize := slices.Clone(s.candidates)
	slices.SortFunc(bySize, func(a, b int) int {
		return cmp.Or(cmp.Compare(s.f.jobs[a].Bytes, s.f.jobs[b].Bytes), s.f.cheaper(a, b))
	})
	for _, v := range bySize {
		for i := range s.f.placesOf(&s.f.jobs[v]) {
			if n := len(here[i]); n == 0 || here[i][n-1] != v {
				here[i] = append(here[i], v)
			}
		}
	}
	var victims []int
	gone := make(map[int]bool)
	steps := make([][]int, len(here))
	for i := range here {
		steps[i] = s.oneMore(i, here[i], gone)
	}
	for !s.room(victims) {
		best := -1
		for i, set := range steps {
			if set != nil && (best < 0 || s.less(set, steps[best])) {
				best = i
			}
		}
		if best < 0 {
			return s.candidates // together they do, as bound found
		}
		touched := []int{best}
		for _, v := range steps[best] {
			victims, gone[v] = append(victims, v), true
			touched = slices.AppendSeq(touched, s.f.placesOf(&s.f.jobs[v]))
		}
		for _, i := range touched {
			steps[i] = s.oneMore(i, here[i], gone)
		}
	}
	return victims
}

// less reports whether a set of victims costs less than another.
func (s *search) less(a, b []int) bool {
	return cmp.Or(cmp.Compare(s.bytes(a), s.bytes(b)), len(a)-len(b), s.f.cheaper(a[0], b[0])) < 0
}

// oneMore finds which of the candidates on node i must go, beside those that are
// gone, so that it has room for one task more; nil: all are not enough.
func (s *search) oneMore(i int, candidates []int, gone map[int]bool) []int {
	left := slices.DeleteFunc(slices.Clone(candidates), func(v int) bool { return gone[v] })
	before := s.placesWithout(i, gone, nil)
	enough := func(set []int) bool { return s.placesWithout(i, gone, set) > before }
	n := sort.Search(len(left), func(n int) bool { return enough(left[:n+1]) }) // more victims, more room
	if n == len(left) {
		return nil
	}
	return spare(left[:n+1], enough)
}

// placesWithout is how many tasks node i can take once the jobs have gone.
func (s *search) placesWithout(i int, gone map[int]bool, set []int) int {
	n := s.f.soon[i]
	for _, v := range s.f.on[i] {
		if !gone[v] && !slices.Contains(set, v) {
			continue
		}
		for _, id := range s.f.jobs[v].On {
			if id == n.ID {
				n.take(&s.f.jobs[v])
			}
		}
	}
	return s.f.places(s.w.Request, n, true)
}

// spare takes out of a set, from its end, whatever it is enough without.
func spare(set []int, enough func([]int) bool) []int {
	set = slices.Clone(set)
	for i := len(set) - 1; i >= 0 && len(set) > 1; i-- {
		if rest := slices.Delete(slices.Clone(set), i, i+1); enough(rest) {
			set = rest
		}
	}
	return set
}

// prune lets every victim stay that need not go, the most costly first.
func (s *search) prune(victims []int) []int {
	victims = slices.Clone(victims)
	slices.SortFunc(victims, func(a, b int) int {
		return cmp.Or(cmp.Compare(s.f.jobs[a].Bytes, s.f.jobs[b].Bytes), s.f.cheaper(a, b))
	})
	victims = spare(victims, s.room)
	slices.SortFunc(victims, s.f.cheaper)
	return victims
}
