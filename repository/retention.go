package repository

import (
	"cmp"
	"slices"
)

// Keep says which checkpoints stay when of each job the newest n are to be
// kept: those, and all that have a label. Of checkpoints of the same moment
// the one with the greater id is newer. Both results are in the order of list.
// n <= 0 keeps everything. Checkpoints do not depend on one another, so any of
// drop can be removed.
func Keep(list []*Manifest, n int) (keep, drop []*Manifest) {
	newest := slices.Clone(list)
	slices.SortStableFunc(newest, func(a, b *Manifest) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(b.Checkpoint, a.Checkpoint))
	})
	kept, count := make(map[*Manifest]bool), make(map[string]int)
	for _, m := range newest {
		if m.Label != "" || n <= 0 {
			kept[m] = true
			continue
		}
		count[m.Job]++
		kept[m] = count[m.Job] <= n
	}
	for _, m := range list {
		if kept[m] {
			keep = append(keep, m)
		} else {
			drop = append(drop, m)
		}
	}
	return keep, drop
}
