package etcd_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	random "math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"dormouse/controller/store"
	"dormouse/controller/store/etcd"
	"dormouse/controller/store/etcd/etcdtest"
	"dormouse/controller/store/storetest"
)

// place is a range of keys that no other test uses.
type place etcd.Options

func (p place) Open(t *testing.T) store.Store {
	t.Helper()
	return p.open(t)
}

func (p place) open(t *testing.T) *etcd.Store {
	t.Helper()
	s, err := etcd.Open(t.Context(), etcd.Options(p))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

var places atomic.Int64

func newPlace(server *etcdtest.Server) place {
	return place{Endpoints: []string{server.URL}, Prefix: fmt.Sprintf("/test-%d/", places.Add(1))}
}

func TestConformance(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t)
	storetest.Run(t, func(*testing.T) storetest.Opener { return newPlace(server) })
}

func put(s store.Store, key, value string) error {
	return s.Update(context.Background(), func(tx store.Tx) error { return tx.Put(store.Jobs, key, []byte(value)) })
}

func get(t *testing.T, s store.Store, key string) (value string) {
	t.Helper()
	err := s.View(t.Context(), func(tx store.Tx) error {
		got, err := tx.Get(store.Jobs, key)
		value = string(got)
		if errors.Is(err, store.ErrNotFound) {
			value = "absent"
			return nil
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return value
}

func elect(t *testing.T, s *etcd.Store, name string) *etcd.Term {
	t.Helper()
	term, err := s.Campaign(t.Context(), etcd.Candidate{Name: name, URL: "https://" + name})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { term.Close() })
	return term
}

// oneSentence checks that an error says what, where and what to do.
func oneSentence(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil || strings.Contains(err.Error(), "\n") {
		t.Fatalf("want one sentence, got %v", err)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("want a sentence with %q, got %q", word, err)
		}
	}
}

func TestWhatOneStoreCommitsTheOthersReadAtOnce(t *testing.T) {
	t.Parallel()
	place := newPlace(etcdtest.Start(t))
	one, other := place.open(t), place.open(t)
	for i := range 50 {
		value := fmt.Sprint(i)
		if err := put(one, "j", value); err != nil {
			t.Fatal(err)
		}
		if got := get(t, other, "j"); got != value {
			t.Fatalf("want %s, which was committed before, got %s", value, got)
		}
	}
}

func TestWritersOfSeveralStoresAreSerialized(t *testing.T) {
	t.Parallel()
	place := newPlace(etcdtest.Start(t))
	const writers, each = 3, 20
	var group sync.WaitGroup
	for range writers {
		s := place.open(t)
		group.Go(func() {
			for range each {
				err := s.Update(context.Background(), func(tx store.Tx) error {
					// A range, and the absence of what others put into it meanwhile.
					all, err := store.All[int](tx, store.Jobs)
					if err != nil {
						return err
					}
					return store.Put(tx, store.Jobs, fmt.Sprintf("%06d", len(all)), len(all))
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	err := place.open(t).View(t.Context(), func(tx store.Tx) error {
		all, err := store.All[int](tx, store.Jobs)
		if len(all) != writers*each {
			t.Errorf("want %d records, each counted by the next, got %d", writers*each, len(all))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestTransactionsOfManyRecordsAreCommittedWhole(t *testing.T) {
	t.Parallel()
	place := newPlace(etcdtest.Start(t))
	s := place.open(t)
	const many = 5000 // etcd takes 128 in one level
	err := s.Update(t.Context(), func(tx store.Tx) error {
		for i := range many {
			if err := tx.Put(store.Nodes, fmt.Sprintf("n-%05d", i), []byte(`{"state":"ready"}`)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]store.Store{"the writer": s, "a reader that came later": place.open(t)} {
		count := 0
		err := s.View(t.Context(), func(tx store.Tx) error {
			return tx.Scan(store.Nodes, "", func(string, []byte) error { count++; return nil })
		})
		if err != nil || count != many {
			t.Errorf("%s: want %d records, got %d, %v", name, many, count, err)
		}
	}
}

func TestAChangeLargerThanARequestIsRefusedByName(t *testing.T) {
	t.Parallel()
	s := newPlace(etcdtest.Start(t)).open(t)
	noise := make([]byte, 3<<20)
	rand.Read(noise)
	oneSentence(t, put(s, "j", string(noise)), "--max-request-bytes")
	if got := get(t, s, "j"); got != "absent" {
		t.Error("the refused change is there")
	}
	if err := put(s, "j", "small"); err != nil {
		t.Errorf("after a refusal: %v", err)
	}
}

func TestOneLeadsUntilItResigns(t *testing.T) {
	t.Parallel()
	place := newPlace(etcdtest.Start(t))
	a, b := place.open(t), place.open(t)
	first := elect(t, a, "a")
	elected := make(chan *etcd.Term)
	go func() {
		term, err := b.Campaign(context.Background(), etcd.Candidate{Name: "b", URL: "https://b"})
		if err != nil {
			t.Error(err)
		}
		elected <- term
	}()
	// b stands: a sees it, and does not give way.
	for len(a.Candidates()) < 2 {
		if _, err := a.Wait(timeout(t, time.Second/10), a.Revision()); err != nil && t.Context().Err() != nil {
			t.Fatal(err)
		}
	}
	if leader, _ := b.Leader(); leader.Name != "a" || !first.Holds() {
		t.Fatalf("want a to lead, got %+v", leader)
	}
	if err := put(first, "j", "of a"); err != nil {
		t.Fatal(err)
	}
	first.Close()
	second := <-elected
	defer second.Close()
	if got := get(t, second, "j"); got != "of a" {
		t.Errorf("the second leader reads %q", got)
	}
	if err := put(second, "j", "of b"); err != nil {
		t.Error(err)
	}
	if err := put(first, "j", "late"); !errors.Is(err, store.ErrDeposed) {
		t.Errorf("a write after resigning: want ErrDeposed, got %v", err)
	}
	if got := get(t, a, "j"); got != "of b" {
		t.Errorf("want what the second leader wrote, got %q", got)
	}
}

// A leader that does not know yet that it was replaced is refused by etcd itself.
func TestAReplacedLeaderCannotWrite(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t)
	place := newPlace(server)
	a, b := place.open(t), place.open(t)
	network := etcdtest.NewProxy(t, server)
	cut := place
	cut.Endpoints = []string{network.URL}
	old := elect(t, cut.open(t), "old")
	if err := put(old, "j", "1"); err != nil {
		t.Fatal(err)
	}
	late := make(chan error, 1)
	// Its write is on the way while its lease runs out.
	network.Cut()
	go func() { late <- put(old, "j", "2") }()
	fresh := elect(t, b, "new")
	if old.Holds() {
		t.Error("two leaders at one time")
	}
	if err := put(fresh, "j", "3"); err != nil {
		t.Fatal(err)
	}
	network.Mend()
	if err := <-late; !store.IsAway(err) {
		t.Errorf("the write of a replaced leader: want a refusal, got %v", err)
	}
	if got := get(t, a, "j"); got != "3" {
		t.Errorf("want what the new leader wrote, got %q", got)
	}
	select {
	case <-old.Done():
	case <-time.After(10 * time.Second):
		t.Error("the old term has not ended")
	}
}

// The fence alone: the lease ends behind the leader's back, before anything
// tells it.
func TestEtcdRefusesALeaderWhoseLeaseEnded(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t)
	place := newPlace(server)
	s := place.open(t)
	term := elect(t, s, "a")
	client := server.Client(t)
	leases, err := client.Leases(t.Context())
	if err != nil || len(leases.Leases) != 1 {
		t.Fatalf("leases: %+v, %v", leases, err)
	}
	if _, err := client.Revoke(t.Context(), leases.Leases[0].ID); err != nil {
		t.Fatal(err)
	}
	if err := put(term, "j", "1"); !errors.Is(err, store.ErrDeposed) {
		t.Errorf("want ErrDeposed, got %v", err)
	}
	if got := get(t, s, "j"); got != "absent" {
		t.Error("the write was made")
	}
}

// The dead one's lease runs out in time for it to be replaced within ten
// seconds on a machine that is not slow.
func TestADeadLeaderIsReplaced(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t)
	place := newPlace(server)
	network := etcdtest.NewProxy(t, server)
	cut := place
	cut.Endpoints = []string{network.URL}
	elect(t, cut.open(t), "old")
	client := server.Client(t)
	leases, err := client.Leases(t.Context())
	if err != nil || len(leases.Leases) != 1 {
		t.Fatalf("leases: %+v, %v", leases, err)
	}
	lease, err := client.TimeToLive(t.Context(), leases.Leases[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	if lease.GrantedTTL > 5 {
		t.Errorf("etcd holds on to a dead leader for %d s, want 5", lease.GrantedTTL)
	}
	s := place.open(t)
	network.Cut()
	elect(t, s, "new")
}

func TestNobodyElseWritesWhileAControllerLeads(t *testing.T) {
	t.Parallel()
	place := newPlace(etcdtest.Start(t))
	elect(t, place.open(t), "c1")
	oneSentence(t, put(place.open(t), "j", "1"), "in use by controller c1", "stop all controllers")
}

func TestAnEtcdThatWasRestartedIsUsedOn(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t)
	s := newPlace(server).open(t)
	term := elect(t, s, "a")
	if err := put(term, "j", "1"); err != nil {
		t.Fatal(err)
	}
	server.Kill()
	done := make(chan error, 1)
	go func() { done <- put(term, "j", "2") }()
	server.Restart(t)
	// It went through, or is known not to have, or is admitted to be unknown.
	err := <-done
	if err != nil && !store.IsAway(err) {
		t.Errorf("a write across the restart: %v", err)
	}
	if term.Holds() {
		if got := get(t, term, "j"); err == nil && got != "2" {
			t.Errorf("a write that succeeded is gone: %q", got)
		}
		return
	}
	again := elect(t, s, "a")
	if got := get(t, again, "j"); err == nil && got != "2" {
		t.Errorf("a write that succeeded is gone: %q", got)
	}
	if err := put(again, "j", "3"); err != nil {
		t.Error(err)
	}
}

func TestCommitsSurviveLostAnswers(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t)
	place := newPlace(server)
	network := etcdtest.NewProxy(t, server)
	cut := place
	cut.Endpoints = []string{network.URL}
	s := cut.open(t)
	// With time enough between two of them for a slow machine to connect again.
	const most = 40
	var breaks atomic.Int64
	var breaking sync.WaitGroup
	breaking.Go(func() {
		for range most {
			time.Sleep(10*time.Millisecond + random.N(150*time.Millisecond))
			network.Break()
			breaks.Add(1)
		}
	})
	writes := 0
	for ; breaks.Load() < most; writes++ {
		err := s.Update(t.Context(), func(tx store.Tx) error {
			n, err := store.Get[int](tx, store.Jobs, "count")
			if err != nil && !errors.Is(err, store.ErrNotFound) {
				return err
			}
			return store.Put(tx, store.Jobs, "count", n+1)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	breaking.Wait()
	if got := get(t, place.open(t), "count"); got != fmt.Sprint(writes) {
		t.Errorf("want each of %d increments once, got %s", writes, got)
	}
}

func TestAHistoryThatIsGoneIsReadAnew(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t)
	place := newPlace(server)
	network := etcdtest.NewProxy(t, server)
	cut := place
	cut.Endpoints = []string{network.URL}
	late, s := cut.open(t), place.open(t)
	network.Cut()
	for i := range 5 {
		if err := put(s, "j", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	client := server.Client(t)
	if _, err := client.Compact(t.Context(), int64(s.Revision())); err != nil {
		t.Fatal(err)
	}
	network.Mend()
	if _, err := late.Wait(timeout(t, 20*time.Second), s.Revision()-1); err != nil {
		t.Fatal(err)
	}
	if got := get(t, late, "j"); got != "4" {
		t.Errorf("want 4, got %s", got)
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t)
	client := server.Client(t)
	open := func(options etcd.Options) error {
		s, err := etcd.Open(t.Context(), options)
		if err == nil {
			s.Close()
		}
		return err
	}
	t.Run("nobody there", func(t *testing.T) {
		oneSentence(t, open(etcd.Options{Endpoints: []string{"http://127.0.0.1:1"}}), "etcd at http://127.0.0.1:1", "does not answer", "start it")
	})
	t.Run("no endpoints", func(t *testing.T) { oneSentence(t, open(etcd.Options{}), "name at least one") })
	for _, c := range []struct{ name, key, value, want string }{
		{"newer schema", "schema", fmt.Sprint(store.Schema + 1), "newer dormouse"},
		{"schema is no number", "schema", "x", "damaged"},
		{"records without schema", "r/jobs/j", "\x00abcd", "damaged"},
		{"record with a wrong sum", "r/jobs/j", "\x00abcdvalue", "record j of table jobs has a wrong check sum"},
		{"record cut short", "r/jobs/j", "x", "cut short"},
		{"sequence is no number", "s/jobs", "many", "the sequence of table jobs"},
	} {
		t.Run(c.name, func(t *testing.T) {
			place := newPlace(server)
			if _, err := client.Put(t.Context(), place.Prefix+c.key, c.value); err != nil {
				t.Fatal(err)
			}
			oneSentence(t, open(etcd.Options(place)), c.want, place.Prefix)
		})
	}
}

func TestANewerSchemaStopsAStoreThatIsOpen(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t)
	place := newPlace(server)
	s := place.open(t)
	if _, err := server.Client(t).Put(t.Context(), place.Prefix+"schema", fmt.Sprint(store.Schema+1)); err != nil {
		t.Fatal(err)
	}
	_, err := s.Wait(timeout(t, 10*time.Second), s.Revision())
	oneSentence(t, err, "newer dormouse")
	oneSentence(t, put(s, "j", "1"), "schema")
}

func timeout(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}
