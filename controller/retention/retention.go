// Package retention decides which checkpoints a job does not need any more.
//
// It is pure. A policy keeps the newest checkpoints, and the newest of each of
// the last hours and days (UTC) that have one; what no rule keeps may go. Only
// durable checkpoints are counted. Whatever the policy says, these stay:
//
//   - the newest durable one: without it a failure would cost the job's work
//   - those with a label: a user named them
//   - those that are needed: a suspended job sleeps in it, a clone has no other,
//     an operation reads it
package retention

import (
	"slices"
	"time"

	"dormouse/api"
)

// Policy is what to keep. The zero Policy keeps everything.
type Policy struct {
	Last   int // the newest so many
	Hourly int // the newest of each of so many hours that have one
	Daily  int // and of so many days
}

// IsZero reports whether nothing is ever removed.
func (p Policy) IsZero() bool { return p == Policy{} }

// Surplus names the checkpoints of one job that nothing keeps, oldest first.
// needed are those that something depends on.
func Surplus(list []api.Checkpoint, policy Policy, needed func(id string) bool) []string {
	if policy.IsZero() {
		return nil
	}
	durable := newestFirst(list, func(cp api.Checkpoint) bool { return cp.State == api.CheckpointDurable })
	kept := make(map[string]bool)
	if len(durable) > 0 {
		kept[durable[0].ID] = true
	}
	plain := slices.DeleteFunc(slices.Clone(durable), func(cp api.Checkpoint) bool { return cp.Label != "" })
	for _, cp := range plain[:min(policy.Last, len(plain))] {
		kept[cp.ID] = true
	}
	keepPeriods(kept, plain, policy.Hourly, time.Hour)
	keepPeriods(kept, plain, policy.Daily, 24*time.Hour)
	return idsWithout(plain, func(id string) bool { return kept[id] || needed(id) })
}

// keepPeriods keeps the newest checkpoint of each of the last n periods that
// have one.
func keepPeriods(kept map[string]bool, list []api.Checkpoint, n int, period time.Duration) {
	var last time.Time
	for _, cp := range list {
		if n == 0 {
			return
		}
		if at := cp.Created.UTC().Truncate(period); !at.Equal(last) {
			last, n = at, n-1
			kept[cp.ID] = true
		}
	}
}

// Failed names the records of failed checkpoints but the newest keep, oldest
// first. They hold nothing; they tell why.
func Failed(list []api.Checkpoint, keep int) []string {
	failed := newestFirst(list, func(cp api.Checkpoint) bool { return cp.State == api.CheckpointFailed })
	return idsWithout(failed[min(keep, len(failed)):], func(string) bool { return false })
}

func newestFirst(list []api.Checkpoint, want func(api.Checkpoint) bool) []api.Checkpoint {
	list = slices.DeleteFunc(slices.Clone(list), func(cp api.Checkpoint) bool { return !want(cp) })
	slices.SortStableFunc(list, func(a, b api.Checkpoint) int { return b.Created.Compare(a.Created) })
	return list
}

// idsWithout are the ids that none of keep holds, in the opposite order.
func idsWithout(list []api.Checkpoint, keep func(id string) bool) []string {
	var ids []string
	for _, cp := range slices.Backward(list) {
		if !keep(cp.ID) {
			ids = append(ids, cp.ID)
		}
	}
	return ids
}
