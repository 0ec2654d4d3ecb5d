package etcd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"dormouse/controller/store"
)

const (
	// renewals is how often a lease is renewed while it lasts.
	renewals = 4
	// history is how much of etcd's is kept, for watches that were interrupted.
	history = 5 * time.Minute
)

// Candidate is a controller that leads, or would.
type Candidate struct {
	Name    string `json:"name"`
	URL     string `json:"url"` // where it answers REST and agents
	Version string `json:"version"`
	Leads   bool   `json:"-"`
}

// candidate is a Candidate as it is in etcd.
type candidate struct {
	Candidate
	created int64 // revision; of all, the least leads
}

func readCandidate(kv *mvccpb.KeyValue) candidate {
	c := candidate{created: kv.CreateRevision}
	if err := json.Unmarshal(kv.Value, &c.Candidate); err != nil {
		c.Name = fmt.Sprintf("(%s, of another dormouse)", kv.Key)
	}
	return c
}

// Candidates are the controllers that are there, the leader first.
func (s *Store) Candidates() []Candidate {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []candidate
	for _, c := range s.candidates {
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b candidate) int { return int(a.created - b.created) })
	list := make([]Candidate, len(all))
	for i, c := range all {
		list[i] = c.Candidate
		list[i].Leads = i == 0
	}
	return list
}

// Leader is the controller that leads, as far as is known here.
func (s *Store) Leader() (Candidate, bool) {
	if all := s.Candidates(); len(all) > 0 {
		return all[0], true
	}
	return Candidate{}, false
}

// WaitLeader returns when the leader is another one than was.
func (s *Store) WaitLeader(ctx context.Context, was Candidate) (Candidate, error) {
	err := s.until(ctx, func() bool {
		leader, some := first(s.candidates)
		return some && leader.Candidate != was
	})
	leader, _ := s.Leader()
	return leader, err
}

func first(candidates map[string]candidate) (leader candidate, some bool) {
	for _, c := range candidates {
		if !some || c.created < leader.created {
			leader, some = c, true
		}
	}
	return leader, some
}

// Term is the time for which a controller leads, and the store as only the leader
// may use it. etcd refuses its writes once it has been replaced.
//
// A Term ends by itself when it is not certain any more: when its lease could not
// be renewed in time, measured on this machine from before each renewal, which is
// earlier than etcd's end of it.
type Term struct {
	s       *Store
	lease   clientv3.LeaseID
	key     string       // of etcd, without prefix
	created int64        // its create revision, which no other ever has
	until   atomic.Int64 // boot time, ns, until which the lease certainly lasts

	ended chan struct{}
	once  sync.Once
	cause error // why it ended; valid once ended is closed
	work  sync.WaitGroup
}

var _ store.Store = (*Term)(nil)

// bootTime counts on while the machine sleeps.
func bootTime() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		panic(err) // clock_gettime(2): only for a clock that does not exist
	}
	return time.Duration(now.Nano())
}

// Campaign stands for election and returns once this controller leads. It fails
// when ctx ends, or when etcd stayed away for longer than a lease; then it may be
// called again.
func (s *Store) Campaign(ctx context.Context, c Candidate) (*Term, error) {
	t, err := s.stand(ctx, c)
	if err != nil {
		return nil, err
	}
	waiting, stop := context.WithCancel(ctx)
	defer stop()
	go func() { // ends with this function
		select {
		case <-t.ended:
			stop()
		case <-waiting.Done():
		}
	}()
	err = s.until(waiting, func() bool {
		leader, some := first(s.candidates)
		return some && leader.created == t.created
	})
	if err == nil {
		// What the leader before has written is read before anything is done.
		err = s.fresh(ctx)
	}
	if err != nil {
		select {
		case <-t.ended:
			err = t.cause
		default:
		}
		return nil, errors.Join(err, t.Close())
	}
	if err := t.upgrade(ctx); err != nil {
		return nil, errors.Join(err, t.Close())
	}
	t.work.Go(t.compact)
	return t, nil
}

// upgrade brings the store to the present schema. From then on etcd refuses the
// commits of older controllers.
func (t *Term) upgrade(ctx context.Context) error {
	return t.s.update(ctx, t.fence(), t.check, func(w *writer, from *image) error {
		if t.s.ready(from) == nil {
			return nil
		}
		t.s.log.Info("upgrading the store", "from", from.schema, "to", t.s.plan.Schema())
		if err := t.s.plan.Run(w, from.schema); err != nil {
			return err
		}
		w.puts[keySchema] = fmt.Append(nil, t.s.plan.Schema())
		w.next.schema = t.s.plan.Schema()
		return nil
	})
}

// stand makes this controller a candidate.
func (s *Store) stand(ctx context.Context, c Candidate) (*Term, error) {
	if err := s.usable(ctx); err != nil {
		return nil, err
	}
	value, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	asked := bootTime()
	lease, err := s.client.Grant(ctx, int64(s.options.Lease/time.Second))
	if err != nil {
		return nil, s.explain(err)
	}
	t := &Term{s: s, lease: lease.ID, key: fmt.Sprintf("%s%016x", keyLead, lease.ID), ended: make(chan struct{})}
	t.renewed(asked)
	key := s.prefix + t.key
	response, err := s.client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
		Then(clientv3.OpPut(key, string(value), clientv3.WithLease(lease.ID))).
		Commit()
	if err != nil {
		return nil, errors.Join(s.explain(err), t.revoke())
	}
	t.created = response.Header.Revision
	t.work.Go(t.keep)
	return t, nil
}

// renewed notes that the lease was renewed by a request made at asked. A tenth
// is for clocks that go at different rates.
func (t *Term) renewed(asked time.Duration) { t.until.Store(int64(asked + t.s.options.Lease*9/10)) }

// Holds reports whether this controller certainly leads at this moment.
func (t *Term) Holds() bool {
	select {
	case <-t.ended:
		return false
	default:
		return int64(bootTime()) < t.until.Load()
	}
}

// Done is closed when the term has ended; Err then says why.
func (t *Term) Done() <-chan struct{} { return t.ended }

// Err is why the term ended; valid after Done.
func (t *Term) Err() error { return t.cause }

func (t *Term) finish(cause error) {
	t.once.Do(func() {
		t.cause = cause
		close(t.ended)
	})
}

// keep renews the lease until the term ends.
func (t *Term) keep() {
	for {
		asked := bootTime()
		ctx, cancel := context.WithTimeout(t.s.life, time.Duration(t.until.Load())-asked)
		_, err := t.s.client.KeepAliveOnce(ctx, t.lease)
		cancel()
		switch {
		case err == nil:
			t.renewed(asked)
		case errors.Is(rpctypes.Error(err), rpctypes.ErrLeaseNotFound):
			t.finish(fmt.Errorf("%w: its lease in etcd has ended", store.ErrDeposed))
		case !t.Holds():
			t.finish(fmt.Errorf("%w: its lease could not be renewed (%w)", store.ErrDeposed, t.s.explain(err)))
		}
		select {
		case <-t.ended:
			return
		case <-t.s.life.Done():
			t.finish(store.ErrClosed)
			return
		case <-time.After(t.s.options.Lease / renewals):
		}
	}
}

// compact has etcd forget old values every now and then: every commit leaves some.
func (t *Term) compact() {
	ticker := time.NewTicker(history)
	defer ticker.Stop()
	before := int64(0)
	for {
		select {
		case <-t.ended:
			return
		case <-ticker.C:
		}
		ctx, cancel := context.WithTimeout(t.s.life, patience)
		if before > 0 {
			if _, err := t.s.client.Compact(ctx, before); err != nil && !errors.Is(rpctypes.Error(err), rpctypes.ErrCompacted) {
				t.s.log.Warn("etcd's history cannot be compacted", "error", t.s.explain(err))
			}
		}
		cancel()
		before = int64(t.s.Revision())
	}
}

// check is what every use of the store by the leader begins with.
func (t *Term) check(ctx context.Context) error {
	if err := t.s.usable(ctx); err != nil {
		return err
	}
	if t.Holds() {
		return nil
	}
	select {
	case <-t.ended:
		return t.cause
	default:
		return store.ErrDeposed
	}
}

// fence is the condition that this term has not been ended by etcd.
func (t *Term) fence() guard {
	key := t.s.prefix + t.key
	return guard{
		condition: clientv3.Compare(clientv3.CreateRevision(key), "=", t.created),
		key:       clientv3.OpGet(key),
		broken: func(response *clientv3.GetResponse) error {
			if len(response.Kvs) == 1 && response.Kvs[0].CreateRevision == t.created {
				return nil
			}
			err := fmt.Errorf("%w: its lease in etcd has ended", store.ErrDeposed)
			t.finish(err)
			return err
		},
	}
}

// View implements store.Store. It needs no round trip.
func (t *Term) View(ctx context.Context, fn func(store.Tx) error) error {
	if err := t.check(ctx); err != nil {
		return err
	}
	return t.s.look(fn)
}

// Update implements store.Store.
func (t *Term) Update(ctx context.Context, fn func(store.Tx) error) error {
	err := t.s.update(ctx, t.fence(), t.check, t.s.ordinary(fn))
	var uncertain *store.UncertainError
	if errors.As(err, &uncertain) {
		t.finish(err) // who leads next reads what has become of it
	}
	return err
}

// Copy implements store.Copier.
func (t *Term) Copy(ctx context.Context, fn func(store.Item) error) (int, error) {
	if err := t.check(ctx); err != nil {
		return 0, err
	}
	return t.s.copy(fn)
}

// Revision implements store.Store.
func (t *Term) Revision() uint64 { return t.s.Revision() }

// Wait implements store.Store.
func (t *Term) Wait(ctx context.Context, after uint64) (uint64, error) { return t.s.Wait(ctx, after) }

// Close ends the term at once, so that another controller leads without delay.
// The Store stays open.
func (t *Term) Close() error {
	t.finish(fmt.Errorf("%w: it has resigned", store.ErrDeposed))
	t.work.Wait()
	return t.revoke()
}

func (t *Term) revoke() error {
	ctx, cancel := context.WithTimeout(t.s.life, answerTime)
	defer cancel()
	_, err := t.s.client.Revoke(ctx, t.lease)
	if err == nil || errors.Is(rpctypes.Error(err), rpctypes.ErrLeaseNotFound) {
		return nil
	}
	// The lease ends by itself.
	t.s.log.Warn("etcd was not told that this controller leads no more", "error", t.s.explain(err))
	return nil
}

// Following is the store as a controller that does not lead uses it.
type Following struct{ *Store }

// Update implements store.Store: it fails.
func (f Following) Update(context.Context, func(store.Tx) error) error { return store.ErrDeposed }

// Close implements store.Store: the Store stays open.
func (f Following) Close() error { return nil }
