package interval

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func parse(t interface{ Fatal(...any) }, text string) Policy {
	p, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestParseRefusesWhatIsNoPolicy(t *testing.T) {
	for text, want := range map[string]string{
		"ten minutes":           "cron line",
		"10":                    "neither a duration",
		"-10m":                  "not every -10m",
		"1ms":                   "not every 1ms",
		"10000h":                "not every 10000h",
		"0 * * *":               "cannot be read",
		"61 * * * *":            "cannot be read",
		"0 0 30 2 *":            "never comes",
		"TZ=Asia/Tokyo 0 * * *": "UTC",
		"@every 10m":            "write it as a duration",
		"@sometimes":            "cannot be read",
		"Auto":                  "neither a duration",
	} {
		if _, err := Parse(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Parse(%q): want an error with %q, got %v", text, want, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{"", "10m", "auto", "0 * * * *", "*/5 1-3 * * 1", "@hourly", "TZ=", "* * * * */0"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := Parse(text)
		if err != nil || p.IsZero() {
			return
		}
		plan, planned := p.For(Job{ID: "j", Begun: noon, Nodes: []Node{{}}}, Bounds{}, noon)
		if !planned || plan.Due.Before(noon) || plan.Why() == "" {
			t.Errorf("the policy %q has the plan %+v", text, plan)
		}
	})
}

func TestIntervalRunsFromTheNewestDurableCheckpoint(t *testing.T) {
	plan, _ := parse(t, "10m").For(Job{ID: "j", Begun: noon, Durable: noon.Add(time.Hour)}, Bounds{}, noon)
	if want := noon.Add(70 * time.Minute); !plan.Due.Equal(want) {
		t.Errorf("want the next at %s, got %s", want, plan.Due)
	}
}

func TestRestoredJobIsSafeFromItsBeginning(t *testing.T) {
	// Its checkpoint is older than the run that was restored from it.
	plan, _ := parse(t, "10m").For(Job{ID: "j", Begun: noon, Durable: noon.Add(-time.Hour)}, Bounds{}, noon)
	if plan.Due.Before(noon.Add(5*time.Minute)) || plan.Due.After(noon.Add(10*time.Minute)) {
		t.Errorf("want the next in 5 to 10 minutes, got %s", plan.Due.Sub(noon))
	}
}

func TestCronLineIsInUTC(t *testing.T) {
	begun := noon.In(time.FixedZone("elsewhere", 5*3600+1800))
	plan, _ := parse(t, "30 12 * * *").For(Job{ID: "j", Begun: begun}, Bounds{}, noon)
	if plan.Due.Before(noon.Add(30*time.Minute)) || plan.Due.After(noon.Add(35*time.Minute)) {
		t.Errorf("want it at 12:30 UTC or shortly after, got %s", plan.Due.UTC())
	}
}

func TestFailedAttemptIsRepeatedSoonAndThenMoreRarely(t *testing.T) {
	job := Job{ID: "j", Begun: noon, Durable: noon, Failed: noon.Add(time.Hour)}
	for failures, want := range map[int]time.Duration{1: 5 * time.Minute, 2: 10 * time.Minute, 3: 20 * time.Minute, 4: 40 * time.Minute, 50: 40 * time.Minute} {
		job.Failures = failures
		plan, _ := parse(t, "40m").For(job, Bounds{}, noon)
		if got := plan.Due.Sub(job.Failed); got != want {
			t.Errorf("after %d failures: want %s, got %s", failures, want, got)
		}
	}
}

func TestOneCheckpointMakesUpForAllThatWereMissed(t *testing.T) {
	back := noon.Add(48 * time.Hour)
	for _, text := range []string{"10m", "0 * * * *", Auto} {
		job := Job{ID: "j", Begun: noon, Durable: noon, Nodes: []Node{{}}}
		first, _ := parse(t, text).For(job, Bounds{}, back)
		if first.Due.Before(back) || first.Due.After(back.Add(time.Minute)) {
			t.Errorf("%s: want the missed one within a minute, got %s", text, first.Due.Sub(back))
		}
		job.Durable = first.Due
		if second, _ := parse(t, text).For(job, Bounds{}, back); second.Due.Before(first.Due.Add(first.Interval / 2)) {
			t.Errorf("%s: want the one after it an interval later, got %s", text, second.Due.Sub(first.Due))
		}
	}
}

func TestThousandJobsAreNotDueInOneSecond(t *testing.T) {
	back := noon.Add(24 * time.Hour)
	cases := map[string]struct {
		policy  string
		watched time.Time
		most    int // in one second; 1000 spread evenly over the time, and four deviations
	}{
		"submitted together":            {"10m", noon, 12},
		"one cron line":                 {"0 * * * *", noon, 20},
		"after the controller was away": {"10m", back, 34},
	}
	for name, c := range cases {
		perSecond := map[int64]int{}
		for i := range 1000 {
			plan, _ := parse(t, c.policy).For(Job{ID: fmt.Sprintf("j-%d", i), Begun: noon}, Bounds{}, c.watched)
			perSecond[plan.Due.Unix()]++
		}
		for second, n := range perSecond {
			if n > c.most {
				t.Errorf("%s: %d jobs are due in second %d, want at most %d", name, n, second, c.most)
			}
		}
	}
}

// minimum finds the interval with the smallest exact expected loss: with
// exponential failures, the time to get through one interval t and its
// checkpoint c is M(e^((t+c)/M) - 1) (Daly 2006, eq. 14, without the restart).
func minimum(cost, mtbf float64) float64 {
	best, at := math.Inf(1), 0.0
	for t := cost / 100; t < 20*mtbf; t *= 1.002 {
		if loss := mtbf * math.Expm1((t+cost)/mtbf) / t; loss < best {
			best, at = loss, t
		}
	}
	return at
}

func TestDalyIsCloseToTheTrueOptimum(t *testing.T) {
	for _, ratio := range []float64{1e-6, 1e-4, 1e-2, 0.1, 0.5, 1} { // of cost to mtbf
		mtbf := 10 * time.Hour
		cost := portion(mtbf, ratio)
		got, want := Daly(cost, mtbf).Seconds(), minimum(cost.Seconds(), mtbf.Seconds())
		if math.Abs(got-want) > 0.03*want {
			t.Errorf("cost/mtbf %g: want %.0f s within 3 %%, got %.0f s", ratio, want, got)
		}
	}
}

func TestDalyIsTheMTBFWhereACheckpointTakesLonger(t *testing.T) {
	if got := Daly(3*time.Hour, time.Hour); got != time.Hour {
		t.Errorf("want the mtbf, got %s", got)
	}
}

func TestRateOfAGangIsTheSumOfItsNodes(t *testing.T) {
	job := Job{ID: "j", Begun: noon, Nodes: make([]Node, 1)}
	one, _ := parse(t, Auto).For(job, Bounds{}, noon)
	job.Nodes = make([]Node, 16)
	many, _ := parse(t, Auto).For(job, Bounds{}, noon)
	if got, want := many.Auto.MTBF, one.Auto.MTBF/16; (got - want).Abs() > time.Second {
		t.Errorf("want %s for 16 nodes of %s each, got %s", want, one.Auto.MTBF, got)
	}
}

func TestRateFollowsWhatIsSeen(t *testing.T) {
	const day = 24 * time.Hour
	seen := func(tally Tally, days int, between time.Duration) Tally {
		for range int(time.Duration(days) * day / between) {
			tally = tally.After(tally.At.Add(between), true).Lose()
		}
		return tally
	}
	quiet := (Tally{At: noon}).After(noon.Add(1000*day), true)
	if got := CloudRate(quiet).MTBF(); got < 60*day {
		t.Errorf("want a quiet node to be trusted more than presumed, got one loss per %s", got)
	}
	bad := seen(quiet, 60, 2*time.Hour)
	if got := CloudRate(bad).MTBF(); got > 4*time.Hour {
		t.Errorf("want nearly 2 h between losses once that was seen for two months, got %s", got)
	}
	good := bad.After(bad.At.Add(120*day), true)
	if got := CloudRate(good).MTBF(); got < 3*day {
		t.Errorf("want what is four months old to be as good as forgotten, got one loss per %s", got)
	}
	if node, cloud := NodeRate(CloudRate(quiet), seen(Tally{At: noon}, 2, time.Hour)), CloudRate(quiet); node < 20*cloud {
		t.Errorf("want a node that was lost 48 times in two days to be told from its cloud, got %g and %g", node, cloud)
	}
}

func TestTimeOffIsNoTimeWithoutLoss(t *testing.T) {
	up := (Tally{At: noon}).After(noon.Add(time.Hour), true)
	if off := up.After(up.At.Add(time.Hour), false); off.Up > up.Up {
		t.Errorf("want no more node time than %g s, got %g s", up.Up, off.Up)
	}
}

func TestAutoIsExplainedWithItsInputs(t *testing.T) {
	cost := Cost{Pause: time.Second, Overhead: 200 * time.Millisecond, Durable: 4 * time.Second}
	job := Job{
		ID: "j", Begun: noon, Durable: noon, Costs: []Cost{cost, cost, cost, cost, cost},
		Nodes:  []Node{{Cloud: "east", Own: Tally{Losses: 2, Up: 19.6 * 86400, At: noon}}},
		Clouds: map[string]Tally{"east": {Losses: 2, Up: 19.6 * 86400, At: noon}},
	}
	plan, _ := parse(t, Auto).For(job, Bounds{}, noon)
	want := "every 25 min: a checkpoint costs 1.2 s (median of 5), its node fails once per 11 days (2 losses in 19.6 node days)"
	if plan.Why() != want {
		t.Errorf("want %q, got %q", want, plan.Why())
	}
	job.Costs, job.Nodes = nil, make([]Node, 3)
	plan, _ = parse(t, Auto).For(job, Bounds{}, noon)
	if why := plan.Why(); !strings.Contains(why, "presumed") || !strings.Contains(why, "one of its 3 nodes") || !strings.Contains(why, "longest allowed without a measured cost") {
		t.Errorf("what is presumed is not said: %q", why)
	}
}

// TestWorkedExamples are the numbers of docs/checkpoint-policies.md.
func TestWorkedExamples(t *testing.T) {
	const day = 86400.0
	for _, example := range []struct {
		cost         time.Duration
		nodes        int
		losses, days float64 // of the cloud, the same for each of the job's nodes
		want         string
		loss         string // per cent
	}{
		{1200 * time.Millisecond, 1, 2, 19.6, "every 25 min: a checkpoint costs 1.2 s (median of 5), its node fails once per 11 days (2 losses in 19.6 node days)", "0.16"},
		{1200 * time.Millisecond, 16, 2, 19.6, "every 6.9 min: a checkpoint costs 1.2 s (median of 5), one of its 16 nodes fails once per 20 h (2 losses in 19.6 node days)", "0.58"},
		{30 * time.Second, 1, 2, 19.6, "every 2.1 h: a checkpoint costs 30 s (median of 5), its node fails once per 11 days (2 losses in 19.6 node days)", "0.79"},
		{30 * time.Second, 64, 12, 640, "every 34 min: a checkpoint costs 30 s (median of 5), one of its 64 nodes fails once per 20 h (12 losses in 640 node days)", "2.92"},
	} {
		cost, n := Cost{Pause: example.cost, Durable: 5 * time.Second}, float64(example.nodes)
		job := Job{
			ID: "j", Begun: noon, Durable: noon, Costs: []Cost{cost, cost, cost, cost, cost},
			Clouds: map[string]Tally{"east": {Losses: example.losses, Up: example.days * day, At: noon}},
		}
		for range example.nodes {
			job.Nodes = append(job.Nodes, Node{"east", Tally{Losses: example.losses / n, Up: example.days * day / n, At: noon}})
		}
		plan, _ := parse(t, Auto).For(job, Bounds{}, noon)
		if loss := fmt.Sprintf("%.2f", 100*plan.Auto.Loss); plan.Why() != example.want || loss != example.loss {
			t.Errorf("want %q and %s %%, got %q and %s %%", example.want, example.loss, plan.Why(), loss)
		}
	}
}

func TestOneSlowCheckpointDoesNotMoveTheCost(t *testing.T) {
	var costs []Cost
	for _, s := range []int{9, 1, 1, 60, 1, 1} {
		costs = Remember(costs, Cost{Pause: time.Duration(s) * time.Second})
	}
	if len(costs) != Remembered || typical(costs).Pause != time.Second {
		t.Errorf("want a second of the newest %d, got %s of %d", Remembered, typical(costs).Pause, len(costs))
	}
}

func TestPlansHoldTheirBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		duration := func(name string) time.Duration {
			return time.Duration(rapid.Int64Range(0, int64(1e6*time.Second)).Draw(t, name))
		}
		job := Job{ID: rapid.String().Draw(t, "id"), Begun: noon, Clouds: map[string]Tally{"east": {Losses: rapid.Float64Range(0, 1e6).Draw(t, "losses"), Up: rapid.Float64Range(0, 1e9).Draw(t, "up"), At: noon}}}
		for range rapid.IntRange(0, 8).Draw(t, "costs") {
			job.Costs = Remember(job.Costs, Cost{duration("pause"), duration("overhead"), duration("durable")})
		}
		job.Nodes = make([]Node, rapid.IntRange(0, 1000).Draw(t, "nodes"))
		for i := range job.Nodes {
			job.Nodes[i].Cloud = "east"
		}
		if rapid.Bool().Draw(t, "durable") {
			job.Durable = noon.Add(duration("since"))
		}
		plan, _ := parse(t, Auto).For(job, Bounds{}, noon)
		least, most := Usual.Min, max(Usual.Max, 2*typical(job.Costs).Durable)
		if plan.Interval < least || plan.Interval > most.Round(time.Millisecond) {
			t.Fatalf("the interval %s is not within %s and %s", plan.Interval, least, most)
		}
		if plan.Due.Before(noon.Add(plan.Interval / 2)) {
			t.Fatalf("due %s after the run began, and the interval is %s", plan.Due.Sub(noon), plan.Interval)
		}
		if plan.Auto.Loss < 0 || plan.Auto.Loss > 1 || math.IsNaN(plan.Auto.Loss) {
			t.Fatalf("a loss of %g", plan.Auto.Loss)
		}
	})
}
