package etcd

import (
	"errors"
	"testing"
	"time"

	"dormouse/controller/store"
	"dormouse/controller/store/etcd/etcdtest"
)

func openWith(t *testing.T, server *etcdtest.Server, plan store.Plan) *Store {
	t.Helper()
	s, err := open(t.Context(), Options{Endpoints: []string{server.URL}, Lease: 2 * time.Second}, plan)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func campaign(t *testing.T, s *Store) *Term {
	t.Helper()
	term, err := s.Campaign(t.Context(), Candidate{Name: "c"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { term.Close() })
	return term
}

func write(t *testing.T, s store.Store, value string) error {
	return s.Update(t.Context(), func(tx store.Tx) error { return tx.Put(store.Jobs, "j", []byte(value)) })
}

func read(t *testing.T, s store.Store) (value string) {
	t.Helper()
	err := s.View(t.Context(), func(tx store.Tx) error {
		got, err := tx.Get(store.Jobs, "j")
		value = string(got)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// The controllers are replaced one by one by newer ones, of which the first that
// leads upgrades the store.
func TestTheFirstNewerLeaderUpgrades(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t)
	before := store.Upgrades()
	plan := append(before[:len(before):len(before)], store.Upgrade{Do: func(tx store.Tx) error {
		value, err := tx.Get(store.Jobs, "j")
		if err != nil {
			return err
		}
		return tx.Put(store.Jobs, "j", []byte(string(value)+"-upgraded"))
	}})
	older := openWith(t, server, before)
	olderTerm := campaign(t, older)
	if err := write(t, olderTerm, "old"); err != nil {
		t.Fatal(err)
	}
	newer := openWith(t, server, plan)
	// While the older one leads, the newer waits and does not read what it may misread.
	var old *store.OlderSchemaError
	if err := newer.View(t.Context(), func(store.Tx) error { return nil }); !errors.As(err, &old) {
		t.Errorf("a newer controller reads an older store: %v", err)
	}
	if err := write(t, olderTerm, "old, again"); err != nil {
		t.Errorf("the older leader was disturbed: %v", err)
	}
	bystander := openWith(t, server, before)
	olderTerm.Close()
	term := campaign(t, newer)
	if got := read(t, term); got != "old, again-upgraded" {
		t.Errorf("want the upgraded record, got %q", got)
	}
	var refusal *store.NewerSchemaError
	if _, err := bystander.Wait(t.Context(), bystander.Revision()); err != nil && !errors.As(err, &refusal) {
		t.Errorf("an older follower: %v", err)
	}
	if err := write(t, bystander, "misread"); err == nil {
		t.Error("an older controller wrote to the upgraded store")
	}
	if _, err := open(t.Context(), Options{Endpoints: []string{server.URL}}, before); !errors.As(err, &refusal) {
		t.Errorf("an older dormouse opens the upgraded store: %v", err)
	}
	term.Close()
	again := campaign(t, newer)
	if got := read(t, again); got != "old, again-upgraded" {
		t.Errorf("a step was taken twice: %q", got)
	}
}

func TestAnUpgradeThatFailsChangesNothing(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t)
	before := store.Upgrades()
	older := openWith(t, server, before)
	if err := write(t, older, "old"); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	plan := append(before[:len(before):len(before)],
		store.Upgrade{Do: func(tx store.Tx) error { return tx.Put(store.Jobs, "j", []byte("half")) }},
		store.Upgrade{Do: func(store.Tx) error { return broken }})
	if _, err := openWith(t, server, plan).Campaign(t.Context(), Candidate{Name: "c"}); !errors.Is(err, broken) {
		t.Fatalf("want the step's error, got %v", err)
	}
	if got := read(t, older); got != "old" {
		t.Errorf("want what was before, got %q", got)
	}
}
