package retention

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"dormouse/api"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// every makes n durable checkpoints, c0 the oldest, the newest at noon.
func every(n int, apart time.Duration) (list []api.Checkpoint) {
	for i := range n {
		list = append(list, api.Checkpoint{ID: fmt.Sprintf("c%d", i), State: api.CheckpointDurable, Created: noon.Add(-time.Duration(n-1-i) * apart)})
	}
	return list
}

// kept are the ids that Surplus leaves.
func kept(list []api.Checkpoint, policy Policy, needed func(string) bool) (ids []string) {
	drop := Surplus(list, policy, needed)
	for _, cp := range list {
		if !slices.Contains(drop, cp.ID) {
			ids = append(ids, cp.ID)
		}
	}
	return ids
}

func TestSurplus(t *testing.T) {
	labelled := every(4, time.Minute)
	labelled[0].Label = "before the change"
	failed := every(4, time.Minute)
	failed[3].State = api.CheckpointFailed
	cases := map[string]struct {
		list   []api.Checkpoint
		policy Policy
		needed string
		want   []string
	}{
		"no policy keeps all":               {every(3, time.Minute), Policy{}, "", []string{"c0", "c1", "c2"}},
		"the newest":                        {every(5, time.Minute), Policy{Last: 2}, "", []string{"c3", "c4"}},
		"labels stay and do not count":      {labelled, Policy{Last: 2}, "", []string{"c0", "c2", "c3"}},
		"what failed does not count":        {failed, Policy{Last: 1}, "", []string{"c2", "c3"}},
		"what is needed stays":              {every(4, time.Minute), Policy{Last: 1}, "c1", []string{"c1", "c3"}},
		"the newest of each hour":           {every(7, 20*time.Minute), Policy{Hourly: 2}, "", []string{"c5", "c6"}}, // 11:40 and 12:00
		"the newest of each day":            {every(5, 12*time.Hour), Policy{Daily: 2}, "", []string{"c2", "c4"}},
		"hours without a checkpoint":        {every(3, 5*time.Hour), Policy{Hourly: 2}, "", []string{"c1", "c2"}},
		"rules add":                         {every(6, 12*time.Hour), Policy{Last: 2, Daily: 3}, "", []string{"c1", "c3", "c4", "c5"}},
		"the newest stays without any rule": {every(2, 48*time.Hour), Policy{Daily: 1}, "", []string{"c1"}},
	}
	for name, c := range cases {
		if got := kept(c.list, c.policy, func(id string) bool { return id == c.needed }); !slices.Equal(got, c.want) {
			t.Errorf("%s: want %v kept, got %v", name, c.want, got)
		}
	}
}

func TestFailedRecordsAreFewAndTheNewest(t *testing.T) {
	list := every(5, time.Minute)
	for _, i := range []int{0, 1, 3} {
		list[i].State = api.CheckpointFailed
	}
	if got := Failed(list, 1); !slices.Equal(got, []string{"c0", "c1"}) {
		t.Errorf("want the two oldest failed ones, got %v", got)
	}
}

func TestSurplusHolds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(0, 40).Draw(t, "n")
		list, needed := make([]api.Checkpoint, n), map[string]bool{}
		for i := range list {
			list[i] = api.Checkpoint{
				ID: fmt.Sprintf("c%d", i), Created: noon.Add(time.Duration(rapid.IntRange(0, 5*24*3600).Draw(t, "age")) * time.Second),
				State: rapid.SampledFrom([]api.CheckpointState{api.CheckpointDurable, api.CheckpointDurable, api.CheckpointLocal, api.CheckpointFailed}).Draw(t, "state"),
				Label: rapid.SampledFrom([]string{"", "", "", "mine"}).Draw(t, "label"),
			}
			needed[list[i].ID] = rapid.IntRange(0, 9).Draw(t, "needed") == 0
		}
		policy := Policy{rapid.IntRange(0, 5).Draw(t, "last"), rapid.IntRange(0, 5).Draw(t, "hourly"), rapid.IntRange(0, 5).Draw(t, "daily")}
		need := func(id string) bool { return needed[id] }
		drop := Surplus(list, policy, need)
		left := slices.DeleteFunc(slices.Clone(list), func(cp api.Checkpoint) bool { return slices.Contains(drop, cp.ID) })
		checkDropped(t, list, drop, needed)
		if again := Surplus(left, policy, need); len(again) != 0 {
			t.Fatalf("applied again, %v goes too", again)
		}
		plain := func(l []api.Checkpoint) []api.Checkpoint {
			return newestFirst(l, func(cp api.Checkpoint) bool { return cp.State == api.CheckpointDurable && cp.Label == "" })
		}
		before, after := plain(list), plain(left)
		if want := min(policy.Last, len(before)); len(after) < want {
			t.Fatalf("want at least %d kept, got %d", want, len(after))
		}
		if policy.IsZero() {
			return
		}
		most := policy.Last + policy.Hourly + policy.Daily + 1
		for _, cp := range after {
			if needed[cp.ID] {
				most++
			}
		}
		if len(after) > most {
			t.Fatalf("%d are kept by rules that keep %d", len(after), most)
		}
	})
}

// checkDropped fails unless everything that must stay stays.
func checkDropped(t *rapid.T, list []api.Checkpoint, drop []string, needed map[string]bool) {
	var newest api.Checkpoint
	for _, cp := range list {
		if cp.State == api.CheckpointDurable && (newest.ID == "" || cp.Created.After(newest.Created)) {
			newest = cp
		}
	}
	for _, cp := range list {
		if !slices.Contains(drop, cp.ID) {
			continue
		}
		switch {
		case cp.ID == newest.ID:
			t.Fatalf("the newest durable one, %s, was dropped", cp.ID)
		case needed[cp.ID]:
			t.Fatalf("%s is needed and was dropped", cp.ID)
		case cp.Label != "":
			t.Fatalf("%s has a label and was dropped", cp.ID)
		case cp.State != api.CheckpointDurable:
			t.Fatalf("%s is %s and was dropped", cp.ID, cp.State)
		}
	}
}
