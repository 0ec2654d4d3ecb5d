package tree

import (
	"cmp"
	"fmt"
	"maps"
	"math/bits"
	"slices"
)

// Bounds of a summary. With all of them reached, one takes less than 128 KiB
// on the wire, and one more byte for each eight nodes.
const (
	MaxRows       = 64  // of a table
	MaxTables     = 4   // of a summary
	MaxHistograms = 16  // of a summary
	MaxValues     = 12  // of a row
	MaxKey        = 128 // bytes
	MaxNodes      = 128 << 10
	maxBuckets    = 252
)

// Summary is what was measured on some nodes in one round. Merging two is
// exact in everything but which rows a full table shows. What the tables, values
// and histograms mean is agreed between those who fill and those who read them:
// the tree adds them up by position.
type Summary struct {
	Nodes      Set // the numbers of the nodes that are in it
	Tables     []Table
	Histograms []Histogram
}

// Merge adds what is in other. Both must be of different nodes.
func (s Summary) Merge(other Summary) Summary {
	return Summary{
		Nodes:      s.Nodes.union(other.Nodes),
		Tables:     zip(s.Tables, other.Tables, Table.merge),
		Histograms: zip(s.Histograms, other.Histograms, Histogram.merge),
	}
}

// Check says what of a summary is out of bounds.
func (s Summary) Check() error {
	if len(s.Nodes) > MaxNodes/8 {
		return fmt.Errorf("a summary has a set of %d bytes, at most %d are allowed", len(s.Nodes), MaxNodes/8)
	}
	if len(s.Tables) > MaxTables || len(s.Histograms) > MaxHistograms {
		return fmt.Errorf("a summary has %d tables and %d histograms, at most %d and %d are allowed",
			len(s.Tables), len(s.Histograms), MaxTables, MaxHistograms)
	}
	for i, t := range s.Tables {
		if len(t.Rows) > MaxRows || len(t.Rest) > MaxValues {
			return fmt.Errorf("table %d of a summary has %d rows and %d values, at most %d and %d are allowed", i, len(t.Rows), len(t.Rest), MaxRows, MaxValues)
		}
		for j, r := range t.Rows {
			if len(r.Key) > MaxKey || len(r.Values) > MaxValues {
				return fmt.Errorf("row %d of table %d of a summary has a key of %d bytes and %d values, at most %d and %d are allowed", j, i, len(r.Key), len(r.Values), MaxKey, MaxValues)
			}
			if j > 0 && t.Rows[j-1].Key >= r.Key {
				return fmt.Errorf("row %d of table %d of a summary is not in the order of the keys", j, i)
			}
		}
	}
	for i, h := range s.Histograms {
		if len(h.Counts) > maxBuckets {
			return fmt.Errorf("histogram %d of a summary has %d buckets, at most %d are allowed", i, len(h.Counts), maxBuckets)
		}
	}
	return nil
}

// Table is sums by key, of which the heaviest MaxRows are shown; a row weighs
// its first value. The rows and the rest together are exact.
//
// A key may have been among the rest below one node and shown below another, so
// a row may lack something: no more than Floor of its first value, and the same
// bounds what a key that is not shown has. (Mergeable summaries: Agarwal et al.,
// PODS 2012.) Floor is 0 as long as all keys fit.
type Table struct {
	Rows  []Row // in the order of their keys
	Rest  []uint64
	Floor uint64
}

// Row is the sums of one key.
type Row struct {
	Key    string
	Values []uint64
}

func (r Row) weight() uint64 {
	if len(r.Values) == 0 {
		return 0
	}
	return r.Values[0]
}

// Add adds values to the row of a key.
func (t *Table) Add(key string, values ...uint64) {
	*t = t.merge(Table{Rows: []Row{{Key: key, Values: values}}})
}

func (t Table) merge(other Table) Table {
	merged := Table{Rest: add(t.Rest, other.Rest), Floor: t.Floor + other.Floor}
	x, y := t.Rows, other.Rows
	for len(x) > 0 && len(y) > 0 {
		switch c := cmp.Compare(x[0].Key, y[0].Key); {
		case c < 0:
			merged.Rows, x = append(merged.Rows, x[0]), x[1:]
		case c > 0:
			merged.Rows, y = append(merged.Rows, y[0]), y[1:]
		default:
			merged.Rows = append(merged.Rows, Row{Key: x[0].Key, Values: add(x[0].Values, y[0].Values)})
			x, y = x[1:], y[1:]
		}
	}
	merged.Rows = append(append(merged.Rows, x...), y...)
	merged.fold()
	return merged
}

// fold moves the lightest rows that are too many to the rest.
func (t *Table) fold() {
	over := len(t.Rows) - MaxRows
	if over <= 0 {
		return
	}
	lightest := slices.Clone(t.Rows)
	slices.SortFunc(lightest, func(x, y Row) int {
		return cmp.Or(cmp.Compare(x.weight(), y.weight()), cmp.Compare(y.Key, x.Key))
	})
	gone := map[string]bool{}
	for _, r := range lightest[:over] {
		gone[r.Key] = true
		t.Rest = add(t.Rest, r.Values)
	}
	t.Floor += lightest[over-1].weight()
	t.Rows = slices.DeleteFunc(t.Rows, func(r Row) bool { return gone[r.Key] })
}

// add is the sum of two vectors, of which one may be longer.
func add(x, y []uint64) []uint64 {
	if len(x) < len(y) {
		x, y = y, x
	}
	sum := slices.Clone(x)
	for i, v := range y {
		sum[i] += v
	}
	return sum
}

// Histogram counts values: exactly up to 3, then in four steps for each doubling,
// so that a bucket's bounds are at most a quarter apart.
type Histogram struct {
	Counts []uint64 // by bucket; those after the last are 0
}

// Observe counts a value.
func (h *Histogram) Observe(value uint64) {
	b := bucket(value)
	if b >= len(h.Counts) {
		h.Counts = append(h.Counts, make([]uint64, b+1-len(h.Counts))...)
	}
	h.Counts[b]++
}

// Quantile is a value that at least the share q (0 to 1) of all counted values
// do not exceed, and at most a quarter above the least such value. 0: nothing
// was counted.
func (h Histogram) Quantile(q float64) uint64 {
	total := uint64(0)
	for _, n := range h.Counts {
		total += n
	}
	seen := uint64(0)
	for b, n := range h.Counts {
		if seen += n; seen > 0 && float64(seen) >= q*float64(total) {
			return upper(b)
		}
	}
	return 0
}

func (h Histogram) merge(other Histogram) Histogram {
	return Histogram{Counts: add(h.Counts, other.Counts)}
}

func bucket(v uint64) int {
	if v < 4 {
		return int(v)
	}
	shift := bits.Len64(v) - 3 // which leaves the leading bit and two more
	return 4*shift + int(v>>shift)
}

// upper is the largest value in a bucket.
func upper(b int) uint64 {
	if b < 4 {
		return uint64(b)
	}
	shift := (b - 4) / 4
	return uint64(b-4*shift+1)<<shift - 1
}

// Set is a set of small numbers, one bit each, the least significant first.
type Set []byte

// SetOf is the set of these numbers.
func SetOf(numbers ...int) Set {
	var s Set
	for _, n := range numbers {
		if n/8 >= len(s) {
			s = append(s, make(Set, n/8+1-len(s))...)
		}
		s[n/8] |= 1 << (n % 8)
	}
	return s
}

// Has reports whether a number is in the set.
func (s Set) Has(n int) bool { return n/8 < len(s) && s[n/8]&(1<<(n%8)) != 0 }

// Len counts the set's numbers.
func (s Set) Len() int {
	n := 0
	for _, b := range s {
		n += bits.OnesCount8(b)
	}
	return n
}

func (s Set) overlaps(other Set) bool {
	for i := range min(len(s), len(other)) {
		if s[i]&other[i] != 0 {
			return true
		}
	}
	return false
}

func (s Set) union(other Set) Set {
	if len(s) < len(other) {
		s, other = other, s
	}
	all := slices.Clone(s)
	for i, b := range other {
		all[i] |= b
	}
	return all
}

// zip merges two lists by position.
func zip[T any](x, y []T, merge func(T, T) T) []T {
	if len(x) < len(y) {
		x, y = y, x
	}
	all := slices.Clone(x)
	for i := range y {
		all[i] = merge(x[i], y[i])
	}
	return all
}

// Gather merges summaries that may be of the same nodes, as when a node has
// reported to its parent and, having heard nothing, to the controller too. The
// larger come first, and one that has a node which is there already is left out:
// nothing is counted twice.
func Gather(summaries []Summary) Summary {
	order := slices.Clone(summaries)
	slices.SortStableFunc(order, func(x, y Summary) int { return cmp.Compare(y.Nodes.Len(), x.Nodes.Len()) })
	var all Summary
	for _, s := range order {
		if !all.Nodes.overlaps(s.Nodes) {
			all = all.Merge(s)
		}
	}
	return all
}

// Rows makes a table of rows in any order.
func Rows(rows map[string][]uint64) Table {
	var t Table
	for _, key := range slices.Sorted(maps.Keys(rows)) {
		t.Rows = append(t.Rows, Row{Key: key, Values: rows[key]})
	}
	t.fold()
	return t
}
