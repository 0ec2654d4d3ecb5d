package bolt

import (
	"path/filepath"
	"strconv"
	"testing"

	"dormouse/controller/store"
)

func TestWhatIsLongAgoIsNotRemembered(t *testing.T) {
	s, err := Open(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	version := func() (v uint64) {
		err := s.View(t.Context(), func(tx store.Tx) error { v = tx.(store.Recent).Version(); return nil })
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	fill := func(n int) {
		err := s.Update(t.Context(), func(tx store.Tx) error {
			for i := range n {
				if err := tx.Put(store.Jobs, strconv.Itoa(i), nil); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	first := version()
	fill(remembered)
	fill(remembered)
	second := version()
	fill(1)
	err = s.View(t.Context(), func(tx store.Tx) error {
		if _, known := tx.(store.Recent).Changed(store.Jobs, first); known {
			t.Errorf("%d changes are claimed to be remembered", 2*remembered)
		}
		if keys, known := tx.(store.Recent).Changed(store.Jobs, second); !known || len(keys) != 1 {
			t.Errorf("of the newest change %d keys are remembered (%v)", len(keys), known)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
