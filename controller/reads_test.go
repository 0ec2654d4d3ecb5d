package controller

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/controller/pki"
	"dormouse/controller/store"
	"dormouse/controller/store/bolt"
)

// BenchmarkReads asks a controller of 1,000 nodes and 10,000 running jobs, one of
// which changes before each question.
func BenchmarkReads(b *testing.B) {
	s, err := bolt.Open(filepath.Join(b.TempDir(), "db"))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	keys, err := pki.Open(filepath.Join(b.TempDir(), "pki"), time.Now)
	if err != nil {
		b.Fatal(err)
	}
	c, err := New(Parts{Store: s, PKI: keys, Repository: newMemoryRepository(), AdminToken: adminToken})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Stop()
	job := func(n, run int) *jobRecord {
		node := fmt.Sprintf("fleet-%04d", n%1000)
		id := fmt.Sprintf("j-%08x", uint32(n)*2654435761)
		return &jobRecord{Secret: make([]byte, 32), Own: []string{}, JobDetail: api.JobDetail{
			Run: int64(run),
			Job: api.Job{
				ID: id, Phase: api.PhaseRunning, Tasks: 1, Cloud: "fleet",
				Created: time.Unix(int64(n), 0).UTC(),
			},
			Spec:       api.JobSpec{Command: []string{"sleep", "3600"}, Tasks: 1, CPUs: 1, MemBytes: 1 << 30},
			TaskStatus: []api.TaskStatus{{Phase: api.PhaseRunning, Node: node, Pid: 4711, VirtualIP: "10.64.0.1"}},
		}}
	}
	fill := func(tx store.Tx) error {
		for n := range 1000 {
			id := fmt.Sprintf("fleet-%04d", n)
			node := nodeRecord{Node: api.Node{ID: id, Name: id, Cloud: "fleet", State: api.NodeReady, CPUs: 12, MemBytes: 64 << 30}}
			if err := store.Put(tx, store.Nodes, id, node); err != nil {
				return err
			}
		}
		for n := range 10_000 {
			if err := putJob(tx, job(n, 1)); err != nil {
				return err
			}
			op := &opRecord{Operation: api.Operation{ID: fmt.Sprintf("o-%08x", n), Kind: api.OpStart, Phase: api.OpDone, Started: time.Unix(int64(n), 0).UTC(), Job: job(n, 1).ID}}
			if err := putOperation(tx, op); err != nil {
				return err
			}
		}
		return nil
	}
	if err := s.Update(b.Context(), fill); err != nil {
		b.Fatal(err)
	}
	for _, path := range []string{"/v1/jobs/" + job(4711, 1).ID, "/v1/jobs?limit=100", "/v1/nodes?limit=100", "/v1/operations?limit=100"} {
		b.Run(path, func(b *testing.B) {
			b.ReportAllocs()
			for run := 2; b.Loop(); run++ {
				if err := s.Update(b.Context(), func(tx store.Tx) error { return putJob(tx, job(run%10_000, run)) }); err != nil {
					b.Fatal(err)
				}
				request := httptest.NewRequest(http.MethodGet, path, nil)
				request.Header.Set("Authorization", "Bearer "+adminToken)
				answer := httptest.NewRecorder()
				c.ServeHTTP(answer, request)
				if answer.Code != http.StatusOK {
					b.Fatal(answer.Code, answer.Body)
				}
			}
		})
	}
}
