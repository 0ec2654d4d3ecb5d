package controller

import (
	"fmt"
	"net/http"
	"path/filepath"
	"testing"

	"dormouse/api"
	"dormouse/controller/store"
	"dormouse/controller/store/bolt"
)

func TestImageIsRightInEveryTransaction(t *testing.T) {
	s, err := bolt.Open(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	m := newImage[api.Job](store.Jobs)
	write := func(id, name string) {
		t.Helper()
		if err := s.Update(t.Context(), func(tx store.Tx) error { return store.Put(tx, store.Jobs, id, api.Job{ID: id, Name: name}) }); err != nil {
			t.Fatal(err)
		}
	}
	want := func(tx store.Tx, want string) {
		t.Helper()
		jobs, err := m.all(tx)
		got := ""
		for _, j := range jobs {
			got += j.ID + j.Name + " "
		}
		if err != nil || got != want {
			t.Errorf("want %q, got %q, %v", want, got, err)
		}
	}
	view := func(fn func(tx store.Tx)) {
		t.Helper()
		if err := s.View(t.Context(), func(tx store.Tx) error { fn(tx); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	write("a", "1")
	write("b", "1")
	view(func(old store.Tx) {
		want(old, "a1 b1 ")
		write("a", "2") // not seen by the view, which began before it
		view(func(tx store.Tx) { want(tx, "a2 b1 ") })
		want(old, "a1 b1 ")
	})
	err = s.Update(t.Context(), func(tx store.Tx) error {
		if err := tx.Delete(store.Jobs, "b"); err != nil {
			return err
		}
		want(tx, "a2 ")
		return fmt.Errorf("not meant")
	})
	if err == nil {
		t.Fatal("the update did not fail")
	}
	view(func(tx store.Tx) { want(tx, "a2 b1 ") })
}

func TestImageGivesOneRecordUntilItChanges(t *testing.T) {
	s, err := bolt.Open(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	m := newImage[api.Job](store.Jobs)
	look := func(name string) *api.Job {
		t.Helper()
		var jobs []*api.Job
		err := s.Update(t.Context(), func(tx store.Tx) (err error) {
			if err := store.Put(tx, store.Jobs, "a", api.Job{ID: "a", Name: name}); err != nil {
				return err
			}
			jobs, err = m.all(tx)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return jobs[0]
	}
	first := look("1")
	if look("1") != first {
		t.Error("a record that did not change was decoded again")
	}
	if look("2") == first {
		t.Error("a record that changed was not decoded again")
	}
}

func TestLongListsComeInPages(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1", "east-2")
	var ids []string
	for range 5 {
		ids = append(ids, s.submit(api.JobSpec{}))
	}
	for _, list := range []struct {
		path string
		want []string
	}{{"/v1/jobs", ids}, {"/v1/nodes", []string{"east-0", "east-1", "east-2"}}} {
		var got []string
		after := ""
		for {
			var page []struct {
				ID string `json:"id"`
			}
			s.want(http.StatusOK, "GET", list.path+"?limit=2&after="+after, nil, &page)
			if len(page) > 2 {
				t.Fatalf("%s: a page of at most 2 has %d", list.path, len(page))
			}
			if len(page) == 0 {
				break
			}
			for _, one := range page {
				got = append(got, one.ID)
			}
			after = got[len(got)-1]
		}
		if fmt.Sprint(got) != fmt.Sprint(list.want) {
			t.Errorf("%s in pages: want %v, got %v", list.path, list.want, got)
		}
		s.want(http.StatusNotFound, "GET", list.path+"?after=gone", nil, nil)
	}
	s.want(http.StatusUnprocessableEntity, "GET", "/v1/jobs?limit=-1", nil, nil)
}
