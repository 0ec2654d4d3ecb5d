package bolt

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"dormouse/controller/store"
)

// TestUpdatesOfOneCommit come while another is under way. Those that fail leave
// nothing, not even a number, and what the others wrote stays.
func TestUpdatesOfOneCommit(t *testing.T) {
	s, err := Open(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	must := func(fn func(store.Tx) error) {
		t.Helper()
		if err := s.Update(t.Context(), fn); err != nil {
			t.Fatal(err)
		}
	}
	must(func(tx store.Tx) error {
		return errors.Join(tx.Put(store.Jobs, "old", []byte("0")), tx.Put(store.Jobs, "gone", []byte("0")))
	})
	begun, hold := make(chan struct{}), make(chan struct{})
	var work sync.WaitGroup
	work.Go(func() {
		must(func(store.Tx) error { close(begun); <-hold; return nil })
	})
	<-begun
	refused := errors.New("refused")
	const n = 40
	results := make([]error, n)
	for i := range n {
		work.Go(func() {
			results[i] = s.Update(t.Context(), func(tx store.Tx) error {
				number, err := tx.Sequence(store.Jobs)
				err = errors.Join(err, tx.Put(store.Jobs, fmt.Sprint("new", number), []byte("1")), tx.Put(store.Jobs, "old", []byte(fmt.Sprint(i))), tx.Delete(store.Jobs, "gone"))
				if i%2 == 1 {
					return errors.Join(err, tx.Put(store.Jobs, "gone", []byte("2")), refused)
				}
				return errors.Join(err, tx.Put(store.Jobs, "gone", []byte("0")))
			})
		})
	}
	cancelled, cancel := context.WithCancel(t.Context())
	var late error
	work.Go(func() {
		late = s.Update(cancelled, func(tx store.Tx) error { return tx.Put(store.Jobs, "late", nil) })
	})
	work.Go(func() {
		defer func() {
			if got := recover(); got != "broken" {
				t.Errorf("the Update panicked with %v, want what its function did", got)
			}
		}()
		s.Update(t.Context(), func(tx store.Tx) error { tx.Put(store.Jobs, "broken", nil); panic("broken") })
	})
	for s.waiting() < n+2 {
		runtime.Gosched()
	}
	cancel()
	before := s.Revision()
	close(hold)
	work.Wait()
	if got := s.Revision(); got != before+1 {
		t.Errorf("there were %d commits, want 1 for all", got-before)
	}
	for i, err := range results {
		if want := i%2 == 1; errors.Is(err, refused) != want || !want && err != nil {
			t.Errorf("Update %d: %v", i, err)
		}
	}
	if !errors.Is(late, context.Canceled) {
		t.Errorf("the Update whose context ended: %v", late)
	}
	got := map[string]string{}
	err = s.View(t.Context(), func(tx store.Tx) error {
		return tx.Scan(store.Jobs, "", func(key string, value []byte) error { got[key] = string(value); return nil })
	})
	if err != nil {
		t.Fatal(err)
	}
	for i := range n / 2 { // numbers of those that failed were given again
		if key := fmt.Sprint("new", i+1); got[key] != "1" {
			t.Errorf("%s is missing in %v", key, got)
		}
		delete(got, fmt.Sprint("new", i+1))
	}
	if got["gone"] != "0" || got["old"] == "" || len(got) != 2 {
		t.Errorf("the table is %v, want old and gone as a successful Update left them", got)
	}
}

// waiting is how many Updates wait.
func (s *Store) waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.queue)
}
