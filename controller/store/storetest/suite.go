// Package storetest is the conformance suite of store.Store: every
// implementation passes it with a few lines of glue.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"

	"dormouse/controller/store"
)

// Opener gives access to one store that starts empty.
type Opener interface {
	// Open opens the store; after a Close, with everything that was committed.
	Open(t *testing.T) store.Store
}

// Run checks every promise of store.Store. fresh gives an empty store for each.
func Run(t *testing.T, fresh func(t *testing.T) Opener) {
	for name, check := range map[string]func(*testing.T, Opener){
		"GetFindsWhatPutWrote":              getFindsWhatPutWrote,
		"DeleteForgetsAndIsIdempotent":      deleteForgets,
		"FailedUpdateChangesNothing":        failedUpdateChangesNothing,
		"UpdateChangesAllTablesTogether":    updateChangesAllTables,
		"ViewIsOnePictureAndReadOnly":       viewIsOnePicture,
		"ScanGoesInOrderFromTheGivenKey":    scanInOrder,
		"SequenceNeverRepeats":              sequenceNeverRepeats,
		"WaitWakesAtTheNextCommit":          waitWakes,
		"WaitEndsWithItsContext":            waitEndsWithContext,
		"EmptyUpdateKeepsTheRevision":       emptyUpdateKeepsRevision,
		"CommitsSurviveReopening":           commitsSurvive,
		"ConcurrentUpdatesAreSerialized":    concurrentUpdates,
		"EverythingFailsAfterClose":         failsAfterClose,
		"GenericHelpersRoundTripTheirTypes": helpersRoundTrip,
		"CopyHasEverythingOfOneMoment":      copyHasEverything,
		"RecentChangesAreToldWhole":         recentChanges,
	} {
		t.Run(name, func(t *testing.T) { check(t, fresh(t)) })
	}
}

func open(t *testing.T, o Opener) store.Store {
	t.Helper()
	s := o.Open(t)
	t.Cleanup(func() { s.Close() })
	return s
}

func put(t *testing.T, s store.Store, table store.Table, key, value string) {
	t.Helper()
	err := s.Update(t.Context(), func(tx store.Tx) error { return tx.Put(table, key, []byte(value)) })
	if err != nil {
		t.Fatalf("put %s: %v", key, err)
	}
}

// get returns the value, or "absent".
func get(t *testing.T, s store.Store, table store.Table, key string) string {
	t.Helper()
	found := "absent"
	err := s.View(t.Context(), func(tx store.Tx) error {
		value, err := tx.Get(table, key)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		found = string(value)
		return err
	})
	if err != nil {
		t.Fatalf("get %s: %v", key, err)
	}
	return found
}

func want(t *testing.T, what, got, wanted string) {
	t.Helper()
	if got != wanted {
		t.Fatalf("%s: want %q, got %q", what, wanted, got)
	}
}

func getFindsWhatPutWrote(t *testing.T, o Opener) {
	s := open(t, o)
	put(t, s, store.Jobs, "a", "1")
	put(t, s, store.Jobs, "a", "2")
	want(t, "the newest value", get(t, s, store.Jobs, "a"), "2")
	want(t, "the same key of another table", get(t, s, store.Nodes, "a"), "absent")
	err := s.Update(t.Context(), func(tx store.Tx) error {
		if err := tx.Put(store.Jobs, "b", []byte("own")); err != nil {
			return err
		}
		value, err := tx.Get(store.Jobs, "b")
		want(t, "a transaction's own write", string(value), "own")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func deleteForgets(t *testing.T, o Opener) {
	s := open(t, o)
	put(t, s, store.Jobs, "a", "1")
	for range 2 {
		err := s.Update(t.Context(), func(tx store.Tx) error { return tx.Delete(store.Jobs, "a") })
		if err != nil {
			t.Fatal(err)
		}
	}
	want(t, "a deleted key", get(t, s, store.Jobs, "a"), "absent")
}

func failedUpdateChangesNothing(t *testing.T, o Opener) {
	s := open(t, o)
	put(t, s, store.Jobs, "a", "before")
	before := s.Revision()
	refusal := errors.New("refused")
	err := s.Update(t.Context(), func(tx store.Tx) error {
		if err := tx.Put(store.Jobs, "a", []byte("after")); err != nil {
			return err
		}
		return refusal
	})
	if !errors.Is(err, refusal) {
		t.Fatalf("want the function's own error, got %v", err)
	}
	want(t, "the value", get(t, s, store.Jobs, "a"), "before")
	if s.Revision() != before {
		t.Fatal("a failed update moved the revision")
	}
}

func updateChangesAllTables(t *testing.T, o Opener) {
	s := open(t, o)
	err := s.Update(t.Context(), func(tx store.Tx) error {
		for _, table := range store.Tables() {
			if err := tx.Put(table, "k", []byte(table)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range store.Tables() {
		want(t, "table "+string(table), get(t, s, table, "k"), string(table))
	}
}

func viewIsOnePicture(t *testing.T, o Opener) {
	s := open(t, o)
	put(t, s, store.Jobs, "a", "1")
	var writer sync.WaitGroup
	defer writer.Wait()
	started := make(chan struct{})
	err := s.View(t.Context(), func(tx store.Tx) error {
		first, err := tx.Get(store.Jobs, "a")
		if err != nil {
			return err
		}
		before := string(first)
		// Another writer comes while this transaction is open. It may have to wait.
		writer.Go(func() {
			close(started)
			if err := s.Update(context.Background(), func(other store.Tx) error { return other.Put(store.Jobs, "a", []byte("2")) }); err != nil {
				t.Error(err)
			}
		})
		<-started
		second, err := tx.Get(store.Jobs, "a")
		want(t, "the same key in the same view", string(second), before)
		if tx.Put(store.Jobs, "b", nil) == nil || tx.Delete(store.Jobs, "a") == nil {
			t.Fatal("a view let itself be written")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func scanInOrder(t *testing.T, o Opener) {
	s := open(t, o)
	for _, key := range []string{"c", "a", "b", "ab"} {
		put(t, s, store.Events, key, key)
	}
	scan := func(from string, limit int) (keys []string) {
		err := s.View(t.Context(), func(tx store.Tx) error {
			return tx.Scan(store.Events, from, func(key string, value []byte) error {
				want(t, "value", string(value), key)
				keys = append(keys, key)
				if len(keys) == limit {
					return store.ErrStop
				}
				return nil
			})
		})
		if err != nil {
			t.Fatal(err)
		}
		return keys
	}
	for _, c := range []struct {
		from  string
		limit int
		want  []string
	}{
		{"", -1, []string{"a", "ab", "b", "c"}},
		{"ab", -1, []string{"ab", "b", "c"}},
		{"aa", 2, []string{"ab", "b"}},
		{"d", -1, nil},
	} {
		if got := scan(c.from, c.limit); !slices.Equal(got, c.want) {
			t.Errorf("scan from %q: want %v, got %v", c.from, c.want, got)
		}
	}
}

func sequenceNeverRepeats(t *testing.T, o Opener) {
	s := open(t, o)
	var last uint64
	next := func() {
		err := s.Update(t.Context(), func(tx store.Tx) error {
			n, err := tx.Sequence(store.Events)
			if n <= last {
				t.Fatalf("sequence gave %d after %d", n, last)
			}
			last = n
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	next()
	next()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, o)
	next()
}

func waitWakes(t *testing.T, o Opener) {
	s := open(t, o)
	before := s.Revision()
	woken := make(chan uint64, 1)
	go func() {
		revision, err := s.Wait(context.Background(), before)
		if err == nil {
			woken <- revision
		}
		close(woken)
	}()
	put(t, s, store.Jobs, "a", "1")
	if revision := <-woken; revision <= before {
		t.Fatalf("want a revision above %d, got %d", before, revision)
	}
	if revision, err := s.Wait(t.Context(), before); err != nil || revision <= before {
		t.Fatalf("Wait for a past commit: %d, %v", revision, err)
	}
}

func waitEndsWithContext(t *testing.T, o Opener) {
	s := open(t, o)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Wait(ctx, s.Revision()); !errors.Is(err, context.Canceled) {
		t.Fatalf("want the context's error, got %v", err)
	}
}

func emptyUpdateKeepsRevision(t *testing.T, o Opener) {
	s := open(t, o)
	before := s.Revision()
	if err := s.Update(t.Context(), func(store.Tx) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if s.Revision() != before {
		t.Fatal("an update that wrote nothing moved the revision")
	}
}

func commitsSurvive(t *testing.T, o Opener) {
	s := open(t, o)
	put(t, s, store.Jobs, "a", "kept")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	want(t, "after reopening", get(t, open(t, o), store.Jobs, "a"), "kept")
}

func concurrentUpdates(t *testing.T, o Opener) {
	s := open(t, o)
	const writers, each = 4, 10
	var group sync.WaitGroup
	for range writers {
		group.Go(func() {
			for range each {
				err := s.Update(context.Background(), func(tx store.Tx) error {
					count, err := store.Get[int](tx, store.Jobs, "count")
					if err != nil && !errors.Is(err, store.ErrNotFound) {
						return err
					}
					return store.Put(tx, store.Jobs, "count", count+1)
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	want(t, "the counter", get(t, s, store.Jobs, "count"), fmt.Sprint(writers*each))
}

func failsAfterClose(t *testing.T, o Opener) {
	s := o.Open(t)
	waiting := make(chan error, 1)
	go func() {
		_, err := s.Wait(context.Background(), s.Revision())
		waiting <- err
	}()
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatalf("close: %v", err)
		}
	}
	if err := <-waiting; !errors.Is(err, store.ErrClosed) {
		t.Errorf("Wait across Close: want ErrClosed, got %v", err)
	}
	nothing := func(store.Tx) error { return nil }
	if err := s.View(t.Context(), nothing); !errors.Is(err, store.ErrClosed) {
		t.Errorf("View: want ErrClosed, got %v", err)
	}
	if err := s.Update(t.Context(), nothing); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Update: want ErrClosed, got %v", err)
	}
}

func copyHasEverything(t *testing.T, o Opener) {
	s := open(t, o)
	copier, ok := s.(store.Copier)
	if !ok {
		t.Fatalf("%T cannot be copied", s)
	}
	err := s.Update(t.Context(), func(tx store.Tx) error {
		for _, table := range store.Tables() {
			if err := tx.Put(table, "k", []byte(table)); err != nil {
				return err
			}
		}
		_, err := tx.Sequence(store.Events)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var writer sync.WaitGroup
	defer writer.Wait()
	copied := map[string]string{}
	schema, err := copier.Copy(t.Context(), func(item store.Item) error {
		if len(copied) == 0 {
			started := make(chan struct{})
			writer.Go(func() {
				close(started)
				put(t, s, store.Nodes, "late", "x")
				put(t, s, store.Jobs, "late", "x")
			})
			<-started
		}
		if item.Key == "" {
			copied[string(item.Table)+" sequence"] = fmt.Sprint(item.Sequence)
		} else {
			copied[string(item.Table)+"/"+item.Key] = string(item.Value)
		}
		return nil
	})
	if err != nil || schema != store.Schema {
		t.Fatalf("schema %d, %v", schema, err)
	}
	wanted := map[string]string{"events sequence": "1"}
	for _, table := range store.Tables() {
		wanted[string(table)+"/k"] = string(table)
	}
	if !maps.Equal(copied, wanted) {
		t.Errorf("want %v, got %v", wanted, copied)
	}
}

// recentChanges concerns transactions that are a store.Recent.
func recentChanges(t *testing.T, o Opener) {
	s := open(t, o)
	table := store.Jobs
	put(t, s, table, "a", "1")
	put(t, s, table, "b", "1")
	var first uint64
	changed := func(tx store.Tx, since uint64, wanted ...string) {
		t.Helper()
		recent, ok := tx.(store.Recent)
		if !ok {
			return
		}
		keys, known := recent.Changed(table, since)
		if !known {
			t.Errorf("it is not known what %v changed", wanted)
		}
		for _, key := range wanted {
			if !slices.Contains(keys, key) {
				t.Errorf("the change of %s is not among %v", key, keys)
			}
		}
	}
	view := func(fn func(tx store.Tx)) {
		t.Helper()
		if err := s.View(t.Context(), func(tx store.Tx) error { fn(tx); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	view(func(tx store.Tx) {
		recent, ok := tx.(store.Recent)
		if !ok {
			return
		}
		first = recent.Version()
		if keys, known := recent.Changed(table, first); first == 0 || !known || len(keys) > 0 {
			t.Errorf("since its own version %d: %v, %v; want none", first, keys, known)
		}
		put(t, s, table, "b", "2")
		if keys, _ := recent.Changed(table, first); len(keys) > 0 {
			t.Errorf("a view knows of changes after it: %v", keys)
		}
		view(func(later store.Tx) {
			version := later.(store.Recent).Version()
			if version <= first {
				t.Errorf("the version is %d after a commit, and was %d", version, first)
			}
			if _, known := recent.Changed(table, version); known {
				t.Error("a view claims to know what changed before a version after it")
			}
		})
	})
	err := s.Update(t.Context(), func(tx store.Tx) error {
		if err := tx.Delete(table, "a"); err != nil {
			return err
		}
		if err := tx.Put(table, "c", []byte("1")); err != nil {
			return err
		}
		changed(tx, first, "a", "b", "c")
		if recent, ok := tx.(store.Recent); ok && recent.Version() != 0 {
			t.Error("what is not committed has a version")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	view(func(tx store.Tx) { changed(tx, first, "a", "b", "c") })
}

func helpersRoundTrip(t *testing.T, o Opener) {
	s := open(t, o)
	type record struct{ Name string }
	err := s.Update(t.Context(), func(tx store.Tx) error {
		for _, name := range []string{"x", "y"} {
			if err := store.Put(tx, store.Nodes, name, record{name}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	err = s.View(t.Context(), func(tx store.Tx) error {
		one, err := store.Get[record](tx, store.Nodes, "y")
		if err != nil || one.Name != "y" {
			t.Errorf("Get: %+v, %v", one, err)
		}
		all, err := store.All[record](tx, store.Nodes)
		if len(all) != 2 || all[0].Name != "x" {
			t.Errorf("All: %+v", all)
		}
		if _, err := store.Get[record](tx, store.Nodes, "z"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("Get of a missing key: want ErrNotFound, got %v", err)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
