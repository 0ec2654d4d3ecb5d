package etcd

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"dormouse/controller/store"
)

const (
	// widest is how many operations go into one level of a transaction. etcd allows
	// 128 for a level and all above it together, so three levels of 40 fit.
	widest = 40
	// answerTime is how long one attempt of a commit may take, and retryPause lies
	// between two.
	answerTime = 2 * time.Second
	retryPause = 50 * time.Millisecond
)

// guard is a further condition of every commit.
type guard struct {
	condition clientv3.Cmp
	// key is read when a condition failed, and broken says what it means for what
	// is there; nil: the condition holds.
	key    clientv3.Op
	broken func(*clientv3.GetResponse) error
}

// Update implements store.Store. It fails while a controller leads.
func (s *Store) Update(ctx context.Context, fn func(store.Tx) error) error {
	return s.update(ctx, s.nobody(), s.fresh, s.ordinary(fn))
}

// ordinary makes of a function on a transaction one that may not see an older schema.
func (s *Store) ordinary(fn func(store.Tx) error) func(*writer, *image) error {
	return func(w *writer, from *image) error {
		if err := s.ready(from); err != nil {
			return err
		}
		return fn(w)
	}
}

// nobody is the condition that no controller leads or wants to.
func (s *Store) nobody() guard {
	all := s.prefix + keyLead
	return guard{
		condition: clientv3.Compare(clientv3.CreateRevision(all), "=", 0).WithPrefix(),
		key:       clientv3.OpGet(all, clientv3.WithPrefix()),
		broken: func(response *clientv3.GetResponse) error {
			if len(response.Kvs) == 0 {
				return nil
			}
			c := readCandidate(response.Kvs[0])
			return fmt.Errorf("the store %s is in use by controller %s at %s: stop all controllers first", s.where(), c.Name, c.URL)
		},
	}
}

// update runs fn and commits what it wrote, until nobody else wrote meanwhile.
// current returns when the copy in memory is so.
func (s *Store) update(ctx context.Context, g guard, current func(context.Context) error, fn func(*writer, *image) error) error {
	if err := s.usable(ctx); err != nil {
		return err
	}
	select {
	case <-s.writing:
		defer func() { s.writing <- struct{}{} }()
	case <-ctx.Done():
		return ctx.Err()
	case <-s.life.Done():
		return store.ErrClosed
	}
	for {
		if err := current(ctx); err != nil {
			return err
		}
		s.mu.Lock()
		from, err := s.image, s.broken
		s.mu.Unlock()
		if err != nil {
			return err
		}
		w := s.newWriter(from)
		if err := fn(w, from); err != nil || len(w.puts) == 0 {
			return err
		}
		err = s.commit(w, from, g)
		if !errors.Is(err, errConflict) {
			return err
		}
		if err := s.fresh(ctx); err != nil {
			return err
		}
	}
}

// errConflict says that something was committed since the picture was taken.
var errConflict = errors.New("another commit came first")

// pending is a commit whose outcome must be found out: only the first commit
// after base can be it.
type pending struct {
	base   int64  // the commit that it follows
	id     string // its own name
	winner string // the name of the commit that did follow base
}

// follows notes that commit id came right after base.
func (p *pending) follows(base int64, id string) {
	if p != nil && p.base == base && p.winner == "" {
		p.winner = id
	}
}

// unknowable is the winner when what followed base was not seen.
const unknowable = "?"

// skipped notes that commits may have been missed, of which id is the newest.
func (p *pending) skipped(id string) {
	if p == nil || p.winner != "" {
		return
	}
	p.winner = unknowable
	if p.id == id {
		p.winner = id
	}
}

// commit writes what w wrote if nothing was committed since from, and tries for
// as long as patience lasts. It does not end with the context of whoever asked: a
// commit under way is finished.
func (s *Store) commit(w *writer, from *image, g guard) error {
	id := fmt.Sprintf("%s-%d", s.name, s.commits.Add(1))
	p := &pending{base: from.commit, id: id}
	s.mu.Lock()
	s.pending = p
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.pending = nil
		s.mu.Unlock()
	}()
	ctx, cancel := context.WithTimeout(s.life, patience)
	defer cancel()
	conditions, then, otherwise := s.request(w, from, id, g)
	for {
		attempt, done := context.WithTimeout(ctx, answerTime)
		response, err := s.client.Txn(attempt).If(conditions...).Then(then...).Else(otherwise...).Commit()
		done()
		switch {
		case err == nil && response.Succeeded:
			s.committed(w, id, response.Header.Revision)
			return nil
		case err == nil:
			return s.lostTo(ctx, p, from, g, response)
		case definite(err):
			return s.explain(err)
		}
		select {
		case <-time.After(retryPause):
		case <-ctx.Done():
			return &store.UncertainError{Where: s.members(), Err: err}
		}
	}
}

func (s *Store) request(w *writer, from *image, id string, g guard) (conditions []clientv3.Cmp, then, otherwise []clientv3.Op) {
	commit, schema := s.prefix+keyCommit, s.prefix+keySchema
	conditions = []clientv3.Cmp{
		clientv3.Compare(clientv3.ModRevision(commit), "=", from.commit),
		clientv3.Compare(clientv3.Value(schema), "=", fmt.Sprint(from.schema)),
		g.condition,
	}
	var changes []clientv3.Op
	for _, key := range slices.Sorted(maps.Keys(w.puts)) {
		if value := w.puts[key]; value != nil {
			changes = append(changes, clientv3.OpPut(s.prefix+key, string(value)))
		} else {
			changes = append(changes, clientv3.OpDelete(s.prefix+key))
		}
	}
	then = append(nest(changes), clientv3.OpPut(commit, id))
	return conditions, then, []clientv3.Op{clientv3.OpGet(commit), clientv3.OpGet(schema), g.key}
}

// nest puts operations that are too many for one level into transactions within.
func nest(ops []clientv3.Op) []clientv3.Op {
	for len(ops) > widest {
		var outer []clientv3.Op
		for group := range slices.Chunk(ops, widest) {
			outer = append(outer, clientv3.OpTxn(nil, group, nil))
		}
		ops = outer
	}
	return ops
}

// committed shows a commit of our own without waiting for the watch to tell.
func (s *Store) committed(w *writer, id string, revision int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.image.revision >= revision {
		return // the watch was faster
	}
	w.next.revision, w.next.commit, w.next.commitID = revision, revision, id
	s.publish(&w.next.image, s.candidates)
}

// lostTo says why a commit's conditions did not hold, unless an earlier attempt
// of it had succeeded.
func (s *Store) lostTo(ctx context.Context, p *pending, from *image, g guard, response *clientv3.TxnResponse) error {
	commit := response.Responses[0].GetResponseRange()
	newest := int64(0)
	if len(commit.Kvs) > 0 {
		newest = commit.Kvs[0].ModRevision
	}
	if newest < from.commit {
		err := &store.DamagedError{Where: s.where(), What: "it has gone back to an older state while this controller ran"}
		s.breakDown(err)
		return err
	}
	if newest > from.commit {
		// Ours may be the first of those that came.
		if err := s.reach(ctx, newest); err != nil {
			return &store.UncertainError{Where: s.members(), Err: err}
		}
		s.mu.Lock()
		winner := p.winner
		s.mu.Unlock()
		switch winner {
		case p.id:
			return nil
		case unknowable:
			return &store.UncertainError{Where: s.members(), Err: errors.New("the history of what was written is gone")}
		}
	}
	if schema := response.Responses[1].GetResponseRange(); len(schema.Kvs) == 0 || string(schema.Kvs[0].Value) != fmt.Sprint(from.schema) {
		return fmt.Errorf("the store %s was given another schema: restart this controller", s.where())
	}
	if err := g.broken((*clientv3.GetResponse)(response.Responses[2].GetResponseRange())); err != nil {
		return err
	}
	return errConflict
}
