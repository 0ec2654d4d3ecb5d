package controller

import (
	"net/http"
	"strings"
	"testing"

	"dormouse/api"
	"dormouse/controller/store"
)

// What the scheduler has decided without the writers' lock is carried out as it is
// only while all room that it counted on is still there.
func TestDecisionsStandUntilSomebodyGetsAPlace(t *testing.T) {
	for _, c := range []struct {
		name   string
		stands bool
		change func(s *simulation, running string)
	}{
		{"nothing happens", true, func(*simulation, string) {}},
		{"a job comes and waits", true, func(s *simulation, _ string) {
			id := s.submit(api.JobSpec{CPUs: 4})
			s.eventually("the job waits", func(tx store.Tx) (bool, error) {
				job, err := getJob(tx, id)
				return err == nil && strings.HasPrefix(job.Reason, "waits for room: "), err
			})
		}},
		{"a job ends", true, func(s *simulation, running string) {
			s.end(running, 0)
			s.awaitPhase(running, api.PhaseCompleted)
		}},
		{"a job is checkpointed where it is", true, func(s *simulation, running string) { s.do("/v1/jobs/"+running+"/checkpoints", nil) }},
		{"a job gets a place", false, func(s *simulation, _ string) { s.running(api.JobSpec{CPUs: 1}) }},
		{"a job gets another place", false, func(s *simulation, running string) {
			s.do("/v1/jobs/"+running+"/suspend", nil)
			s.do("/v1/jobs/"+running+"/resume", map[string]string{"cloud": "west"})
		}},
		{"a node changes", false, func(s *simulation, _ string) {
			s.want(http.StatusNoContent, "POST", "/v1/nodes/east-0/labels", map[string]string{"disk": "fast"}, nil)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSimulation(t, "east-0", "west-0")
			running := s.running(api.JobSpec{CPUs: 2})
			s.running(api.JobSpec{CPUs: 2})
			var seen *survey
			err := s.store.View(t.Context(), func(tx store.Tx) (err error) {
				seen, err = s.c.survey(tx)
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			c.change(s, running)
			var stands bool
			err = s.store.Update(t.Context(), func(tx store.Tx) (err error) {
				stands, err = s.c.stillFits(tx, seen, seen.decide())
				return err
			})
			if err != nil || stands != c.stands {
				t.Errorf("want %v, got %v, %v", c.stands, stands, err)
			}
		})
	}
}
