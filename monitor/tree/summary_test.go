package tree

import (
	"fmt"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestBucketsAreAtMostAQuarterWide(t *testing.T) {
	for b := range maxBuckets {
		top := upper(b)
		if bucket(top) != b {
			t.Fatalf("bucket %d ends at %d, which is in bucket %d", b, top, bucket(top))
		}
		if top < math.MaxUint64 && bucket(top+1) != b+1 {
			t.Fatalf("after %d in bucket %d comes bucket %d", top, b, bucket(top+1))
		}
		if b > 0 && float64(top) > 1.25*float64(upper(b-1)+1) {
			t.Fatalf("bucket %d is from %d to %d", b, upper(b-1)+1, top)
		}
	}
	if upper(maxBuckets-1) != math.MaxUint64 {
		t.Fatalf("the last bucket ends at %d", upper(maxBuckets-1))
	}
}

func TestQuantilesOfAHistogram(t *testing.T) {
	var h Histogram
	if h.Quantile(0.5) != 0 {
		t.Errorf("the median of nothing is %d, want 0", h.Quantile(0.5))
	}
	for v := range uint64(1000) {
		h.Observe(v)
	}
	for _, c := range []struct {
		q    float64
		want uint64
	}{{0, 0}, {0.5, 499}, {0.9, 899}, {1, 999}} {
		if got := h.Quantile(c.q); got < c.want || float64(got) > 1.25*float64(c.want) {
			t.Errorf("quantile %.2f is %d, want between %d and a quarter more", c.q, got, c.want)
		}
	}
}

// However samples are split over a tree: totals and histograms are exact, and a
// row lacks no more than the table says.
func TestMergedTablesKeepTheirPromise(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		truth := map[string]uint64{}
		total := uint64(0)
		var counted Histogram
		parts := rapid.IntRange(1, 12).Draw(t, "parts")
		queue := make([]Summary, parts)
		for i := range queue {
			var table Table
			var h Histogram
			for range rapid.IntRange(0, 90).Draw(t, "rows") {
				key := fmt.Sprintf("job-%d", rapid.IntRange(0, 150).Draw(t, "key"))
				v := rapid.Uint64Range(0, 1000).Draw(t, "value")
				truth[key] += v
				total += v
				table.Add(key, v, 2*v)
				h.Observe(v)
				counted.Observe(v)
			}
			queue[i] = Summary{Nodes: SetOf(i), Tables: []Table{table}, Histograms: []Histogram{h}}
		}
		for len(queue) > 1 { // any two, as a tree would
			i := rapid.IntRange(1, len(queue)-1).Draw(t, "with")
			queue[0] = queue[0].Merge(queue[i])
			queue = slices.Delete(queue, i, i+1)
		}
		all := queue[0]
		if err := all.Check(); err != nil {
			t.Fatal(err)
		}
		if all.Nodes.Len() != parts {
			t.Fatalf("it is of %d nodes, want %d", all.Nodes.Len(), parts)
		}
		table := all.Tables[0]
		sum := add(table.Rest, []uint64{0, 0})
		shown := map[string]uint64{}
		for _, r := range table.Rows {
			sum = add(sum, r.Values)
			shown[r.Key] = r.weight()
		}
		if sum[0] != total || sum[1] != 2*total {
			t.Fatalf("rows and rest are %v, want %d and its double", sum, total)
		}
		for key, v := range truth {
			if shown[key] > v || shown[key]+table.Floor < v {
				t.Fatalf("%s is shown with %d of %d, and no more than %d may be missing", key, shown[key], v, table.Floor)
			}
		}
		if len(truth) <= MaxRows && table.Floor != 0 {
			t.Fatalf("all %d keys fit, and %d may be missing", len(truth), table.Floor)
		}
		if !slices.Equal(all.Histograms[0].Counts, counted.Counts) {
			t.Fatalf("counted %v, want %v", all.Histograms[0].Counts, counted.Counts)
		}
	})
}

func TestGatherCountsNothingTwice(t *testing.T) {
	one := func(nodes ...int) Summary {
		return Summary{Nodes: SetOf(nodes...), Tables: []Table{Rows(map[string][]uint64{"nodes": {uint64(len(nodes))}})}}
	}
	got := Gather([]Summary{one(3), one(1, 2, 3, 9), one(1, 2, 3, 9), one(17), one(), one(2, 3)})
	if got.Nodes.Len() != 5 || got.Tables[0].Rows[0].Values[0] != 5 {
		t.Errorf("gathered %d nodes and counted %v, want 5", got.Nodes.Len(), got.Tables[0].Rows)
	}
	for n := range 20 {
		if want := slices.Contains([]int{1, 2, 3, 9, 17}, n); got.Nodes.Has(n) != want {
			t.Errorf("node %d: %v, want %v", n, got.Nodes.Has(n), want)
		}
	}
}

func TestSummariesOutOfBoundsAreRefused(t *testing.T) {
	for name, s := range map[string]Summary{
		"nodes":      {Nodes: make(Set, MaxNodes/8+1)},
		"tables":     {Tables: make([]Table, MaxTables+1)},
		"histograms": {Histograms: make([]Histogram, MaxHistograms+1)},
		"rows":       {Tables: []Table{{Rows: make([]Row, MaxRows+1)}}},
		"values":     {Tables: []Table{{Rows: []Row{{Values: make([]uint64, MaxValues+1)}}}}},
		"rest":       {Tables: []Table{{Rest: make([]uint64, MaxValues+1)}}},
		"key":        {Tables: []Table{{Rows: []Row{{Key: string(make([]byte, MaxKey+1))}}}}},
		"order":      {Tables: []Table{{Rows: []Row{{Key: "b"}, {Key: "a"}}}}},
		"buckets":    {Histograms: []Histogram{{Counts: make([]uint64, maxBuckets+1)}}},
	} {
		if s.Check() == nil {
			t.Errorf("%s: nothing is said", name)
		}
	}
}
