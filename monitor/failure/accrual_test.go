package failure

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// beating returns a detector fed with gaps, and the time of the last heartbeat.
func beating(bounds Bounds, gaps ...time.Duration) (*Accrual, time.Time) {
	now := epoch
	a := NewAccrual(bounds, now)
	for _, gap := range gaps {
		now = now.Add(gap)
		a.Heartbeat(now)
	}
	return a, now
}

func repeat(gap time.Duration, n int) []time.Duration {
	gaps := make([]time.Duration, n)
	for i := range gaps {
		gaps[i] = gap
	}
	return gaps
}

// The tails of the normal distribution, from published tables.
func TestSurpriseIsTheTailOfTheNormalDistribution(t *testing.T) {
	for _, c := range []struct{ z, probability float64 }{
		{0, 0.5}, {1, 0.158655253931}, {2, 0.0227501319482}, {3, 1.34989803163e-3},
		{6, 9.86587645038e-10}, {-2, 0.977249868052},
	} {
		want := -math.Log10(c.probability)
		if got := surprise(c.z); math.Abs(got-want) > 1e-9*max(1, want) {
			t.Errorf("surprise(%v) = %v, want %v", c.z, got, want)
		}
	}
	below, above := surprise(math.Nextafter(30, 0)), surprise(30)
	if math.Abs(above-below) > 1e-4*above {
		t.Errorf("the two branches meet at z = 30 with %v and %v, want the same", below, above)
	}
}

func TestDeviationsInvertSurprise(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		phi := rapid.Float64Range(0.001, 500).Draw(t, "phi")
		if got := surprise(deviations(phi)); math.Abs(got-phi) > 1e-6*max(1, phi) {
			t.Fatalf("surprise(deviations(%v)) = %v", phi, got)
		}
	})
}

func TestPhiGrowsWithSilenceAndStaysFinite(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		gaps := rapid.SliceOfN(rapid.Int64Range(1, int64(time.Minute)), 0, 300).Draw(t, "gaps")
		durations := make([]time.Duration, len(gaps))
		for i, gap := range gaps {
			durations[i] = time.Duration(gap)
		}
		a, now := beating(Bounds{}, durations...)
		earlier := time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "earlier"))
		later := earlier + time.Duration(rapid.Int64Range(0, int64(24*time.Hour)).Draw(t, "later"))
		before, after := a.Phi(now.Add(earlier)), a.Phi(now.Add(later))
		if before > after*(1+1e-4) || math.IsInf(after, 0) || math.IsNaN(after) || before < 0 {
			t.Fatalf("phi after %v is %v, after %v it is %v: want finite, not negative and not falling", earlier, before, later, after)
		}
	})
}

func TestPatienceStaysWithinItsBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bounds := Bounds{
			Interval: time.Duration(rapid.Int64Range(1, int64(time.Minute)).Draw(t, "interval")),
			Window:   rapid.IntRange(1, 50).Draw(t, "window"),
			Min:      time.Duration(rapid.Int64Range(1, int64(time.Minute)).Draw(t, "min")),
			Max:      time.Duration(rapid.Int64Range(1, int64(time.Hour)).Draw(t, "max")),
		}.filled()
		now := epoch
		a := NewAccrual(bounds, now)
		for _, gap := range rapid.SliceOfN(rapid.Int64Range(-int64(time.Second), int64(24*time.Hour)), 0, 200).Draw(t, "gaps") {
			now = now.Add(time.Duration(gap))
			a.Heartbeat(now)
			if p := a.Patience(); p < bounds.Min || p > bounds.Max {
				t.Fatalf("patience %v, want it within %v and %v", p, bounds.Min, bounds.Max)
			}
		}
		if a.Suspect(a.Last().Add(bounds.Min)) {
			t.Fatalf("suspect after %v of silence, the least there may be", bounds.Min)
		}
		if !a.Suspect(a.Last().Add(bounds.Max + 1)) {
			t.Fatalf("not suspect after %v of silence, the most there may be", bounds.Max)
		}
	})
}

// Silence longer than patience and phi above the threshold are one and the same
// where no bound speaks.
func TestPatienceIsWherePhiReachesTheThreshold(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var gaps []time.Duration
	for range 100 {
		gaps = append(gaps, time.Second+time.Duration(random.NormFloat64()*float64(300*time.Millisecond)))
	}
	a, now := beating(Bounds{Min: time.Millisecond, Max: time.Hour}, gaps...)
	if phi := a.Phi(now.Add(a.Patience())); math.Abs(phi-8) > 0.01 {
		t.Errorf("phi at the end of patience (%v) is %v, want the threshold, 8", a.Patience(), phi)
	}
}

func TestARegularNodeIsMissedSoonerThanAnIrregularOne(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	var irregular []time.Duration
	for range 100 {
		irregular = append(irregular, time.Duration(random.Int64N(int64(4*time.Second)))+1)
	}
	steady, _ := beating(Bounds{}, repeat(2*time.Second, 100)...)
	shaky, _ := beating(Bounds{}, irregular...)
	if steady.Patience() >= shaky.Patience() {
		t.Errorf("patience with a regular node %v, with an irregular one %v: want less with the regular one", steady.Patience(), shaky.Patience())
	}
}

func TestOneLongAbsenceDoesNotBlindTheDetector(t *testing.T) {
	gaps := append(repeat(time.Second, 100), time.Hour)
	a, _ := beating(Bounds{}, append(gaps, repeat(time.Second, 10)...)...)
	if p := a.Patience(); p > 4*time.Second {
		t.Errorf("patience %v after an hour's absence, want it near the 2.4 s of before", p)
	}
}

func TestALineSlowedForGoodIsLearned(t *testing.T) {
	bounds := Bounds{Window: 50}
	a, now := beating(bounds, repeat(time.Second, 50)...)
	if !a.Suspect(now.Add(5 * time.Second)) {
		t.Fatal("5 s of silence of a node that beat every second is not suspect")
	}
	for range 50 {
		now = now.Add(5 * time.Second)
		a.Heartbeat(now)
	}
	if a.Suspect(now.Add(6 * time.Second)) {
		t.Errorf("a node that has long beaten every 5 s is suspect after 6 s; patience %v", a.Patience())
	}
}

// Ten days of heartbeats with the jitter, the loss and the pauses of a bad line.
func TestABadLineRaisesNoFalseAlarm(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	a, now := beating(Bounds{})
	beats, alarms := 10*24*3600, 0
	for range beats {
		gap := time.Second + time.Duration(random.ExpFloat64()*float64(100*time.Millisecond))
		if random.IntN(100) == 0 {
			gap += time.Second // one in a hundred is lost
		}
		if a.Suspect(now.Add(gap)) {
			alarms++
		}
		now = now.Add(gap)
		a.Heartbeat(now)
	}
	if rate := float64(alarms) / float64(beats); rate > 1e-3 {
		t.Errorf("%d false alarms in %d heartbeats", alarms, beats)
	}
}
