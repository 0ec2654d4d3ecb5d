package starvation

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"

	"dormouse/api"
)

// The controller judges a job as one would who has the verdicts themselves.
func TestFindingsAreJudgedAsTheirVerdicts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tasks := rapid.SliceOf(rapid.SampledFrom([]Verdict{
			well(), lock(), held(), ill(StarvedCPU, 0.5), ill(StarvedIO, 0), ill(StarvedMemory, 1), suspect(StarvedIO),
		})).Draw(t, "tasks")
		var told []Verdict
		for _, v := range tasks {
			raw, err := json.Marshal(v.Finding(time.Now()))
			if err != nil {
				t.Fatal(err)
			}
			var f api.Finding
			if err := json.Unmarshal(raw, &f); err != nil {
				t.Fatal(err)
			}
			told = append(told, VerdictOf(f))
		}
		if want, got := Judge(tasks), Judge(told); !reflect.DeepEqual(got, want) {
			t.Fatalf("judged %+v by the findings, and %+v by the verdicts", got, want)
		}
	})
}

func TestATaskThatHasFoundNothingIsHealthy(t *testing.T) {
	if v := VerdictOf(api.Finding{}); v.Troubled() || v.Suspected != Healthy {
		t.Errorf("it is judged %+v", v)
	}
}
