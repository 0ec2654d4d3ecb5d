package controller

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/controller/store"
	"dormouse/controller/store/bolt"
)

func bornJob(j *api.Job) (time.Time, string) { return j.Created, j.ID }

func TestImageIsRightInEveryTransaction(t *testing.T) {
	s, err := bolt.Open(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	m := newImage(store.Jobs, bornJob)
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

// TestImageShowsWhatTheStoreHolds compares all with the store itself through
// random histories: failed updates, several in one commit, and views that stay
// open while the table moves on.
func TestImageShowsWhatTheStoreHolds(t *testing.T) {
	s, err := bolt.Open(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	m := newImage(store.Jobs, bornJob)
	compare := func(tx store.Tx) {
		t.Helper()
		got, err := m.all(tx)
		if err != nil {
			t.Fatal(err)
		}
		wanted, err := store.All[api.Job](tx, store.Jobs)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.EqualFunc(got, wanted, func(a *api.Job, b api.Job) bool { return a.ID == b.ID && a.Name == b.Name }) {
			t.Fatalf("the image has %d records, the store %d: %v, %v", len(got), len(wanted), got, wanted)
		}
		aged, err := m.oldest(tx)
		if err != nil {
			t.Fatal(err)
		}
		sortBy(wanted, func(j api.Job) (time.Time, string) { return j.Created, j.ID })
		if !slices.EqualFunc(aged, wanted, func(a *api.Job, b api.Job) bool { return a.ID == b.ID && a.Name == b.Name }) {
			t.Fatalf("the oldest first: the image has %v, the store %v", aged, wanted)
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	change := func(tx store.Tx) error {
		for range random.IntN(4) {
			id := string(rune('a' + random.IntN(20)))
			if random.IntN(3) == 0 {
				if err := tx.Delete(store.Jobs, id); err != nil {
					return err
				}
				continue
			}
			job := api.Job{ID: id, Name: fmt.Sprint(random.IntN(3)), Created: time.Unix(random.Int64N(5), 0).UTC()}
			if err := store.Put(tx, store.Jobs, id, job); err != nil {
				return err
			}
		}
		compare(tx)
		if random.IntN(4) == 0 {
			return errors.New("not meant")
		}
		return nil
	}
	var step func(depth int)
	step = func(depth int) {
		_ = s.Update(t.Context(), change)
		err := s.View(t.Context(), func(tx store.Tx) error {
			if random.IntN(2) == 0 {
				compare(tx)
			}
			for range random.IntN(3) {
				if depth < 4 {
					step(depth + 1)
				}
			}
			compare(tx)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 60 {
		step(0)
	}
}

// unscanned is a transaction of which no table can be read as a whole.
type unscanned struct {
	store.Tx
	store.Recent
}

func (unscanned) Scan(table store.Table, _ string, _ func(string, []byte) error) error {
	return fmt.Errorf("table %s is read again", table)
}

func TestImageReadsOnlyWhatHasChanged(t *testing.T) {
	s, err := bolt.Open(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	m := newImage(store.Jobs, bornJob)
	write := func(id string) {
		t.Helper()
		if err := s.Update(t.Context(), func(tx store.Tx) error { return store.Put(tx, store.Jobs, id, api.Job{ID: id}) }); err != nil {
			t.Fatal(err)
		}
	}
	look := func(want int, wrap func(store.Tx) store.Tx) {
		t.Helper()
		err := s.View(t.Context(), func(tx store.Tx) error {
			all, err := m.all(wrap(tx))
			if err == nil && len(all) != want {
				t.Errorf("want %d records, got %d", want, len(all))
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	write("a")
	look(1, func(tx store.Tx) store.Tx { return tx })
	write("b")
	look(2, func(tx store.Tx) store.Tx { return unscanned{tx, tx.(store.Recent)} })
}

func TestImageGivesOneRecordUntilItChanges(t *testing.T) {
	s, err := bolt.Open(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	m := newImage(store.Jobs, bornJob)
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

// TestPagesAreThoseOfTheSortedList compares pages with what sorting and cutting
// the whole table brings.
func TestPagesAreThoseOfTheSortedList(t *testing.T) {
	s, err := bolt.Open(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	m := newImage(store.Jobs, bornJob)
	random := rand.New(rand.NewPCG(3, 4))
	may := func(j *api.Job) bool { return j.Owner != "other" }
	wanted := func(j *api.Job) bool { return !j.Phase.Final() }
	for range 200 {
		err := s.Update(t.Context(), func(tx store.Tx) error {
			job := api.Job{
				ID: fmt.Sprint(random.IntN(40)), Created: time.Unix(random.Int64N(9), 0).UTC(),
				Phase: []api.Phase{api.PhaseRunning, api.PhaseCompleted}[random.IntN(2)], Owner: []string{"", "other"}[random.IntN(2)],
			}
			return store.Put(tx, store.Jobs, job.ID, job)
		})
		if err != nil {
			t.Fatal(err)
		}
		err = s.View(t.Context(), func(tx store.Tx) error {
			all, err := store.All[api.Job](tx, store.Jobs)
			if err != nil {
				return err
			}
			sortBy(all, func(j api.Job) (time.Time, string) { return j.Created, j.ID })
			p := Page{Limit: random.IntN(5)}
			if at := random.IntN(len(all)); may(&all[at]) && random.IntN(3) > 0 {
				p.After, all = all[at].ID, all[at+1:]
			}
			want := slices.DeleteFunc(all, func(j api.Job) bool { return !may(&j) || !wanted(&j) })
			if p.Limit > 0 {
				want = want[:min(p.Limit, len(want))]
			}
			got, err := pageOf(tx, m, p, may, wanted)
			if !slices.EqualFunc(got, want, func(a *api.Job, b api.Job) bool { return a.ID == b.ID }) {
				t.Errorf("page %+v: want %v, got %v", p, want, got)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestPagesMissNothingWhileJobsComeAndChange walks through a list whose jobs
// change meanwhile: those that were there at the beginning, and stay, come once
// and in order.
func TestPagesMissNothingWhileJobsComeAndChange(t *testing.T) {
	s, err := bolt.Open(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	m := newImage(store.Jobs, bornJob)
	const before = 300
	put := func(n int, name string) {
		job := api.Job{ID: fmt.Sprintf("%x", uint32(n)*2654435761), Name: name, Created: time.Unix(int64(n), 0).UTC()}
		if err := s.Update(t.Context(), func(tx store.Tx) error { return store.Put(tx, store.Jobs, job.ID, job) }); err != nil {
			t.Error(err)
		}
	}
	for n := range before {
		put(n, "")
	}
	end, changed := make(chan struct{}), make(chan struct{})
	defer func() { close(end); <-changed }()
	go func() {
		defer close(changed)
		for n := 0; ; n++ {
			select {
			case <-end:
				return
			default:
				put(before+n, "") // comes
				put(n%before, "changed")
			}
		}
	}()
	for range 5 {
		var walked []*api.Job
		for after := ""; ; after = walked[len(walked)-1].ID {
			var page []*api.Job
			err := s.View(t.Context(), func(tx store.Tx) (err error) {
				page, err = pageOf(tx, m, Page{Limit: 7, After: after}, always, always)
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			walked = append(walked, page...)
			if len(page) == 0 || len(walked) > 2*before {
				break
			}
		}
		for n, job := range walked {
			if job.Created.Unix() != int64(n) {
				t.Fatalf("place %d of the list has the job of %d", n, job.Created.Unix())
			}
		}
		if len(walked) < before {
			t.Errorf("%d jobs were there, the pages have %d", before, len(walked))
		}
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
