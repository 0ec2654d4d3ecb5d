package bolt

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"dormouse/controller/store"
)

// older is a store of schema 2 with one job.
func older(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "controller.db")
	s, err := open(file, store.Upgrades()[:1])
	if err != nil {
		t.Fatal(err)
	}
	err = s.Update(t.Context(), func(tx store.Tx) error { return tx.Put(store.Jobs, "j", []byte("old")) })
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	return file
}

func jobIn(t *testing.T, file string, plan store.Plan) string {
	t.Helper()
	s, err := open(file, plan)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var job []byte
	err = s.View(t.Context(), func(tx store.Tx) (err error) {
		value, err := tx.Get(store.Jobs, "j")
		job = append(job, value...)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(job)
}

// appends is a step that shows that it was taken, and how often.
func appends(text string) store.Upgrade {
	return store.Upgrade{Tables: []store.Table{store.Table("made-by-" + text)}, Do: func(tx store.Tx) error {
		value, err := tx.Get(store.Jobs, "j")
		if err != nil {
			return err
		}
		if err := tx.Put(store.Table("made-by-"+text), "k", nil); err != nil {
			return err
		}
		return tx.Put(store.Jobs, "j", append([]byte(nil), string(value)+text...))
	}}
}

func TestUpgradeTakesEveryStepOnceAndKeepsACopy(t *testing.T) {
	file := older(t)
	before := store.Upgrades()[:1]
	plan := append(before[:1:1], appends("-a"), appends("-b"))
	for range 2 {
		if got := jobIn(t, file, plan); got != "old-a-b" {
			t.Fatalf("want every step once, got %q", got)
		}
	}
	kept := file + ".schema-2"
	if info, err := os.Stat(kept); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the copy: %v, %v", info, err)
	}
	if got := jobIn(t, kept, before); got != "old" {
		t.Errorf("the copy has %q", got)
	}
	var newer *store.NewerSchemaError
	if _, err := open(file, before); !errors.As(err, &newer) {
		t.Errorf("the older dormouse: want a refusal, got %v", err)
	}
}

func TestAnUpgradeThatFailsChangesNothing(t *testing.T) {
	file := older(t)
	before := store.Upgrades()[:1]
	broken := errors.New("broken")
	plan := append(before[:1:1], appends("-a"), store.Upgrade{Do: func(store.Tx) error { return broken }})
	if _, err := open(file, plan); !errors.Is(err, broken) {
		t.Fatalf("want the step's error, got %v", err)
	}
	if got := jobIn(t, file, before); got != "old" {
		t.Errorf("want what was before, got %q", got)
	}
}

func TestThePlanLeadsToThePresentSchema(t *testing.T) {
	if got := store.Upgrades().Schema(); got != store.Schema {
		t.Errorf("the upgrades lead to schema %d, and the present one is %d", got, store.Schema)
	}
}
