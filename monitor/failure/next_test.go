package failure

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// run of the given length, cut off at a time that does not matter here.
func run(from string, length time.Duration, cause Cause) Run {
	return Run{From: from, Started: epoch, Failed: epoch.Add(length), Cause: cause}
}

func TestNext(t *testing.T) {
	policy := Policy{MaxRestarts: 5}
	soon, fair, long := 3*time.Second, 5*time.Minute, time.Hour
	for name, c := range map[string]struct {
		policy      Policy
		runs        []Run
		checkpoints []string
		want        bool
		from        string
		delay       time.Duration
	}{
		"the first failure goes on from the newest checkpoint": {
			policy, []Run{run("", fair, Program)}, []string{"c2", "c1"}, true, "c2", time.Second},
		"without a checkpoint it starts from nothing": {
			policy, []Run{run("", fair, Program)}, nil, true, "", time.Second},
		"the first loss of a node is no reason to wait": {
			policy, []Run{run("", fair, Node)}, []string{"c1"}, true, "c1", 0},
		"the second in a row is": {
			policy, []Run{run("c1", fair, Node), run("c1", fair, Node)}, []string{"c1"}, true, "c1", 2 * time.Second},
		"unless it got further in between": {
			policy, []Run{run("c1", fair, Node), run("c1", fair, Node)}, []string{"c2", "c1"}, true, "c2", 0},
		"what was before that is forgotten": {
			policy, []Run{run("c1", fair, Node), run("c1", fair, Node), run("c2", fair, Node)}, []string{"c2", "c1"}, true, "c2", 0},
		"a program that gets further and fails waits all the same": {
			policy, []Run{run("c1", fair, Program), run("c2", fair, Program)}, []string{"c3", "c2", "c1"}, true, "c3", 2 * time.Second},
		"no restarts allowed": {
			Policy{}, []Run{run("", fair, Node)}, []string{"c1"}, false, "", 0},
		"the attempts are used up": {
			Policy{MaxRestarts: 2}, slices.Repeat([]Run{run("c1", fair, Program)}, 3), []string{"c1"}, false, "", 0},
		"a run that held gives the attempts back": {
			Policy{MaxRestarts: 2}, []Run{run("", fair, Program), run("c1", fair, Program), run("c1", long, Program)}, []string{"c1"}, true, "c1", time.Second},
		"delays double": {
			policy, slices.Repeat([]Run{run("c1", fair, Program)}, 4), []string{"c1"}, true, "c1", 8 * time.Second},
		"one quick failure poisons nothing": {
			policy, []Run{run("", fair, Program), run("c2", soon, Program)}, []string{"c2", "c1"}, true, "c2", 2 * time.Second},
		"two quick failures poison a checkpoint": {
			policy, []Run{run("", fair, Program), run("c2", soon, Program), run("c2", soon, Program)}, []string{"c2", "c1"}, true, "c1", 4 * time.Second},
		"a checkpoint that cannot be restored is left after as many tries": {
			policy, []Run{run("", fair, Program), run("c2", fair, Restore), run("c2", fair, Restore)}, []string{"c2", "c1"}, true, "c1", 4 * time.Second},
		"a poisoned checkpoint stays poisoned after a long run from another": {
			policy, []Run{run("c2", soon, Program), run("c2", soon, Program), run("c1", long, Node)}, []string{"c2", "c1"}, true, "c1", 0},
		"but a newer one may have been taken in that run": {
			policy, []Run{run("c2", soon, Program), run("c2", soon, Program), run("c1", long, Node)}, []string{"c3", "c2", "c1"}, true, "c3", 0},
		"a slow failure in between is not a row": {
			policy, []Run{run("c1", soon, Program), run("c1", fair, Program), run("c1", soon, Program)}, []string{"c1"}, true, "c1", 4 * time.Second},
		"when every checkpoint is poisoned it starts from nothing": {
			policy, []Run{run("c1", soon, Program), run("c1", soon, Program)}, []string{"c1"}, true, "", 2 * time.Second},
		"a crash loop ends before its attempts": {
			policy, []Run{run("c1", soon, Program), run("c1", soon, Program), run("", soon, Program), run("", soon, Program)}, []string{"c1"}, false, "", 0},
		"nodes lost right after each start make no crash loop": {
			policy, slices.Repeat([]Run{run("", soon, Node)}, 4), nil, true, "", 8 * time.Second},
		"and neither poison a checkpoint nor clear it": {
			policy, []Run{run("c1", soon, Program), run("c1", soon, Node), run("c1", soon, Program)}, []string{"c1"}, true, "", 4 * time.Second},
		"a repository that does not answer is not the checkpoint's fault": {
			policy, slices.Repeat([]Run{run("c1", soon, Platform)}, 4), []string{"c1"}, true, "c1", 8 * time.Second},
		"but attempts are used up by lost nodes": {
			policy, slices.Repeat([]Run{run("", soon, Node)}, 6), nil, false, "", 0},
		"without end": {
			Policy{MaxRestarts: -1}, slices.Repeat([]Run{run("c1", fair, Program)}, 1000), []string{"c1"}, true, "c1", 5 * time.Minute},
		"a clock set back counts as a quick failure": {
			policy, []Run{run("c1", -time.Hour, Program), run("c1", -time.Hour, Program)}, []string{"c1"}, true, "", 2 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			got := Next(c.policy, c.runs, c.checkpoints)
			if got.Restart != c.want || got.From != c.from {
				t.Fatalf("restart %v from %q (%s), want %v from %q", got.Restart, got.From, got.Reason, c.want, c.from)
			}
			if c.want && got.At.Sub(c.runs[len(c.runs)-1].Failed) != c.delay {
				t.Errorf("after %v, want %v", got.At.Sub(c.runs[len(c.runs)-1].Failed), c.delay)
			}
		})
	}
}

func TestTheReasonNamesWhatWasAvoided(t *testing.T) {
	got := Next(Policy{MaxRestarts: 5}, []Run{run("c2", time.Second, Program), run("c2", time.Second, Program)}, []string{"c2", "c1"}).Reason
	want := "program failure after 1s: starts again from checkpoint c1 (the newest, c2, failed 2 times in a row within 1m0s of its start) in 2s, restart 2 of 5"
	if got != want {
		t.Errorf("reason:\n%s\nwant:\n%s", got, want)
	}
	if got := Next(Policy{}, []Run{run("", time.Hour, Program)}, nil).Reason; !strings.Contains(got, "its limit is 0 restarts") {
		t.Errorf("reason %q does not name the limit", got)
	}
}

// A world in which a job fails as it likes: whatever happens, Next keeps its
// promises.
func TestNextKeepsItsPromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		policy := Policy{
			MaxRestarts: rapid.IntRange(-1, 8).Draw(t, "max restarts"),
			QuickLimit:  rapid.IntRange(1, 4).Draw(t, "quick limit"),
		}.filled()
		var runs []Run
		var checkpoints []string
		now, from := epoch, ""
		for range rapid.IntRange(1, 40).Draw(t, "failures") {
			length := time.Duration(rapid.Int64Range(0, int64(20*time.Minute)).Draw(t, "length"))
			cause := rapid.SampledFrom([]Cause{Program, Node, Restore, Platform}).Draw(t, "cause")
			if cause != Restore && rapid.Bool().Draw(t, "checkpointed") {
				checkpoints = slices.Insert(checkpoints, 0, fmt.Sprintf("c%d", len(checkpoints)))
			}
			runs = append(runs, Run{From: from, Started: now, Failed: now.Add(length), Cause: cause})
			now = now.Add(length)
			next := Next(policy, runs, checkpoints)
			if next.Reason == "" {
				t.Fatal("no reason given")
			}
			if !next.Restart {
				return
			}
			if next.From != "" && !slices.Contains(checkpoints, next.From) {
				t.Fatalf("restores %q, which is not a checkpoint", next.From)
			}
			if poisoned(policy, runs, next.From) {
				t.Fatalf("restores %q again, which is poisoned", next.From)
			}
			delay := next.At.Sub(now)
			least := policy.First
			if cause == Node {
				least = 0
			}
			if delay < least || delay > policy.Longest {
				t.Fatalf("delay %v, want it within %v and %v", delay, policy.First, policy.Longest)
			}
			if row := inRow(policy, runs); policy.MaxRestarts >= 0 && row > policy.MaxRestarts {
				t.Fatalf("%d failures in a row with %d restarts allowed", row, policy.MaxRestarts)
			}
			now, from = next.At, next.From
		}
	})
}

// However many restarts are allowed, a job that always fails at once tries each
// checkpoint QuickLimit times, newest first, then the start from nothing, and
// then is left alone.
func TestAJobThatAlwaysFailsAtOnceEnds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		policy := Policy{MaxRestarts: -1, QuickLimit: rapid.IntRange(1, 4).Draw(t, "quick limit")}
		var checkpoints []string
		for i := range rapid.IntRange(0, 6).Draw(t, "checkpoints") {
			checkpoints = append(checkpoints, fmt.Sprintf("c%d", i))
		}
		runs := []Run{run("", time.Hour, Program)}
		var tried []string
		for next := Next(policy, runs, checkpoints); next.Restart; next = Next(policy, runs, checkpoints) {
			tried = append(tried, next.From)
			runs = append(runs, run(next.From, time.Second, Program))
			if len(tried) > 100 {
				t.Fatal("restarted for ever")
			}
		}
		var want []string
		for _, from := range append(slices.Clone(checkpoints), "") {
			want = append(want, slices.Repeat([]string{from}, policy.QuickLimit)...)
		}
		if !slices.Equal(tried, want) {
			t.Fatalf("tried %q, want %q", tried, want)
		}
	})
}

func TestDelayNeverFallsWithMoreFailures(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		policy := Policy{
			First:   time.Duration(rapid.Int64Range(0, int64(time.Minute)).Draw(t, "first")),
			Factor:  rapid.Float64Range(0, 10).Draw(t, "factor"),
			Longest: time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "longest")),
		}
		row := rapid.IntRange(0, 100_000).Draw(t, "row")
		if a, b := policy.Delay(row), policy.Delay(row+1); a > b || a <= 0 || b > policy.filled().Longest {
			t.Fatalf("after %d failures %v, after one more %v", row, a, b)
		}
	})
}
